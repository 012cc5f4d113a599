"""Where messages stand in a template's text, and which tokens those characters are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import personasteer as ps
from personasteer import ArgumentError, ChatTemplate, TemplateError, _core, chat
from personasteer.spans import Span, locate_contents, thinking_spans, tokens_in_spans
from personasteer.tiny_model import write_tiny_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA_TURNS = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ prefix if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% set prefix = '' %}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + _GEMMA_TURNS
)
GEMMA_3 = (
    "{{ bos_token }}{% set prefix = '' %}{% if messages[0].role == 'system' %}"
    "{% set prefix = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}" + _GEMMA_TURNS
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set reasoning = '' %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
EVERY = {
    "chatml": CHATML,
    "llama 3": LLAMA_3,
    "gemma 3": GEMMA_3,
    "mistral": MISTRAL,
    "qwen 3": QWEN_3,
}


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn, after a system message if there is one."""
    out = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return out if system is None else [{"role": "system", "content": system}, *out]


def parts(source: str, messages: list[dict[str, str]], **options: Any) -> list[tuple[str, str]]:
    """(role, text of the span), after checking that the text is render's and that the spans are in order."""
    template = ChatTemplate(source, "<s>", "</s>")
    options = {"today": datetime(2024, 7, 26), **options}
    text, spans = template.spans(messages, **options)
    assert text == template.render(messages, **options)
    edges = [edge for s in spans for edge in (s.begin, s.end)]
    assert edges == sorted(edges)
    return [(s.role, text[s.begin : s.end]) for s in spans]


# ---- spans


def test_spans_are_the_contents_without_markup() -> None:
    text, spans = ChatTemplate(CHATML).spans(turns("Hi", "Yes?", system="Be brief."))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert spans == [Span("system", 19, 28), Span("user", 56, 58), Span("assistant", 91, 95)]


def test_an_answer_without_thinking_is_asked_of_templates_that_know_how() -> None:
    messages = turns("Hi")
    end = "<|im_start|>assistant\n"
    assert ChatTemplate(QWEN_3).render(messages).endswith(end)
    assert ChatTemplate(QWEN_3).render(messages, thinking=False).endswith(end + "<think>\n\n</think>\n\n")
    assert ChatTemplate(QWEN_3).spans(messages, thinking=False)[0].endswith("</think>\n\n")
    for source in (CHATML, LLAMA_3, GEMMA_3, MISTRAL):
        now = {"today": datetime(2024, 7, 26)}
        assert ChatTemplate(source).render(messages, thinking=False, **now) == ChatTemplate(source).render(
            messages, **now
        )


def test_what_is_measured_is_asked_without_thinking(tmp_path: Path) -> None:
    with ps.Model(write_tiny_model(tmp_path / "thinks.gguf", chat_template=QWEN_3), n_ctx=256) as model:
        assert model.detokenize(model.prompt_tokens("Hi")).endswith("assistant\n")
        assert model.detokenize(model.pair_tokens("Hi", "")[0]).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("source", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("generate", [True, False])
def test_each_template_shows_where_system_user_and_assistant_stand(source: str, generate: bool) -> None:
    messages = turns("How deep is it?", "Deep.", "How cold?", system="You are a sailor.")
    found = parts(source, messages, add_generation_prompt=generate)
    assert sorted(found) == sorted((m["role"], m["content"]) for m in messages)


@pytest.mark.parametrize("source", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(
    "contents",
    [
        ("a", "a", "a"),
        ("user", "assistant", "system"),
        ("s", "t", "<"),
        ("<|im_end|>\n<|im_start|>user\nx", "<end_of_turn>\n<start_of_turn>model\n", "[/INST] [INST] </s>"),
        ("{{ m.content }} {% x %} {}", r"(\d+|.*)[^$]?\1", "%s {0}"),
        ("😀 naïve 日本", "é\n\n\nè", "one\ntwo\r\nthree\tfour"),
        ("XQ0J0Z", "XQ0J1Z XQ0J", "XQ1J0Z"),
        ("/no_think and <b>bold</b>", "[TAG] <i>", "/think"),
    ],
)
def test_awkward_contents_are_found_whole(source: str, contents: tuple[str, ...]) -> None:
    messages = turns(*contents, system="a")
    expected = sorted((m["role"], m["content"].strip()) for m in messages)
    assert sorted((role, text.strip()) for role, text in parts(source, messages)) == expected


def test_spans_point_at_the_contents_and_not_at_the_same_words_in_the_markup() -> None:
    text, spans = ChatTemplate(CHATML).spans(turns("user", "assistant", "user"))
    for s in spans:
        assert text[s.begin - 1] == "\n"
        assert text[s.end :].startswith("<|im_end|>")


def test_whitespace_that_the_template_keeps_belongs_to_the_span() -> None:
    assert parts(CHATML, turns("  hi \n", "\n")) == [("user", "  hi \n"), ("assistant", "\n")]


def test_whitespace_that_the_template_strips_does_not() -> None:
    text, spans = ChatTemplate(MISTRAL).spans(turns(" hi ", "\n yo", " "))
    assert text == "[INST] hi [/INST] yo[INST]  [/INST]"
    assert spans == [Span("user", 7, 9), Span("assistant", 18, 20), Span("user", 27, 27)]


def test_an_empty_content_is_an_empty_span() -> None:
    text, spans = ChatTemplate(CHATML).spans(turns("", "a"), add_generation_prompt=False)
    assert text == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert spans == [Span("user", 17, 17), Span("assistant", 50, 51)]


def test_an_empty_content_that_changes_the_markup_has_no_span() -> None:
    source = "{% for m in messages %}{% if m.content %}[{{ m.role }}: {{ m.content }}]{% endif %}{% endfor %}"
    assert parts(source, turns("a", "b", system="")) == [("user", "a"), ("assistant", "b")]


def test_a_message_that_the_template_leaves_out_has_no_span() -> None:
    source = "{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}"
    assert parts(source, turns("a", "b", system="be a")) == [("user", "a"), ("assistant", "b")]


def test_a_system_message_merged_into_the_users_text_keeps_its_own_span() -> None:
    text, spans = ChatTemplate(GEMMA_3).spans(turns("Hi", system="Be brief."), add_generation_prompt=False)
    assert text == "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
    assert spans == [Span("system", 20, 29), Span("user", 31, 33)]


def test_contents_without_markup_between_them_are_found_one_behind_the_other() -> None:
    def render(contents: Sequence[str]) -> str:
        if list(contents) != ["a", "b", "a"]:
            raise TemplateError("this template takes no other contents")
        return "aba"

    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "a"))]
    assert locate_contents("aba", messages, render, foreign="") == [
        Span("user", 0, 1), Span("assistant", 1, 2), Span("user", 2, 3),
    ]  # fmt: skip


def test_spans_come_in_the_order_of_the_text() -> None:
    found = parts(MISTRAL, turns("Hi", "Yes?", "Sing.", system="Be brief."))
    assert found == [("user", "Hi"), ("assistant", "Yes?"), ("system", "Be brief."), ("user", "Sing.")]


def test_contents_without_markup_between_them_are_told_apart() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert parts(source, turns("aa", "a", "aaa")) == [("user", "aa"), ("assistant", "a"), ("user", "aaa")]


def test_a_content_that_the_template_rewrites_is_what_lies_between_the_markup() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('&', 'and') }}</{{ m.role }}>{% endfor %}"
    assert parts(source, turns("a & b", "c")) == [("user", "a and b"), ("assistant", "c")]


def test_a_refused_system_role_is_a_template_error() -> None:
    with pytest.raises(TemplateError, match="System role not supported"):
        ChatTemplate(GEMMA_2).spans(turns("Hi", system="Be brief."))
    assert parts(GEMMA_2, turns("Hi ", "Yes?")) == [("user", "Hi"), ("assistant", "Yes?")]


def test_a_message_without_a_content_is_an_argument_error() -> None:
    with pytest.raises(ArgumentError, match='"content"'):
        ChatTemplate(CHATML).spans([{"role": "user"}])


def test_the_spans_text_carries_the_date_that_was_asked_for() -> None:
    text, _ = ChatTemplate(LLAMA_3).spans(turns("26 Jul 2024"), today=datetime(2024, 7, 26))
    assert text.count("26 Jul 2024") == 2


# ---- thinking in the contents


def test_thinking_that_the_template_strips_from_an_earlier_turn_is_in_no_span() -> None:
    messages = turns("Hi", "<think>\nA greeting.\n</think>\n\nHello <b>you</b>.", "Bye")
    assert parts(QWEN_3, messages) == [("user", "Hi"), ("assistant", "Hello <b>you</b>."), ("user", "Bye")]


def test_an_earlier_answer_may_begin_and_end_with_a_tag() -> None:
    messages = turns("Hi", "<think>Hm.</think><b>you</b>", "Bye")
    assert parts(QWEN_3, messages)[1] == ("assistant", "<b>you</b>")


def test_thinking_that_the_template_keeps_is_in_the_span() -> None:
    answer = "<think>\nA greeting.\n</think>\n\nHello."
    found = parts(QWEN_3, turns("Hi", answer), add_generation_prompt=False)
    assert found == [("user", "Hi"), ("assistant", answer)]


def test_a_span_begins_where_the_template_rewrote_the_thinking_marker() -> None:
    found = parts(QWEN_3, turns("Hi", "<think>Hm.</think>Hello."), add_generation_prompt=False)
    assert found == [("user", "Hi"), ("assistant", "Hm.\n</think>\n\nHello.")]


def test_an_empty_thinking_block_of_an_earlier_turn_leaves_an_empty_span() -> None:
    found = parts(QWEN_3, turns("Hi", "<think>\n\n</think>\n\n", "Bye"))
    assert found == [("user", "Hi"), ("assistant", ""), ("user", "Bye")]


def test_a_closing_marker_that_the_template_wrote_is_not_the_contents() -> None:
    source = "{% for m in messages %}[{{ m.role }}]</think>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert parts(source, turns("Hi", "<think>Hm.</think>Yo")) == [("user", "Hi"), ("assistant", "Yo")]


# ---- templates that treat other contents otherwise

PICKY = (
    "{% for m in messages %}{% if m.content not in ['Hi', 'Hi there', 'a', ' Bye '] %}"
    "{{ raise_exception('unknown') }}{% endif %}[{{ m.role }}] {{ m.content }} {% endfor %}"
)
SORTED = "{% for m in messages | sort(attribute='content') %}{{ loop.index }}. {{ m.content }}\n{% endfor %}"


def test_contents_are_searched_in_order_where_a_template_refuses_others() -> None:
    found = parts(PICKY, turns("Hi", "Hi there", "Hi", system=" Bye "))
    assert found == [("system", " Bye "), ("user", "Hi"), ("assistant", "Hi there"), ("user", "Hi")]


def test_a_content_that_the_markup_holds_too_is_not_guessed() -> None:
    with pytest.raises(TemplateError, match="the assistant's text 'a' could not be located"):
        ChatTemplate(PICKY).spans(turns("Hi", "a"))


def test_contents_are_found_where_their_order_hangs_on_them() -> None:
    found = parts(SORTED, turns("zebra", "ape", "dog"))
    assert found == [("assistant", "ape"), ("user", "dog"), ("user", "zebra")]


def test_a_text_that_is_not_there_names_its_role() -> None:
    source = "{% for m in messages %}{{ m.content | length }};{% endfor %}"
    with pytest.raises(TemplateError, match="the user's text 'Hi' could not be located"):
        ChatTemplate(source).spans(turns("Hi"))


contents = st.text(max_size=40) | st.sampled_from(
    ["", " ", "\n", "a", "user", "<|im_end|>\n", "<|im_start|>assistant\n", "<think>x</think>", "{{ x }}", "XQ0J0Z"]
)


@settings(deadline=None)  # other processes may hold the machine
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=6))
def test_chatml_spans_are_the_contents_whatever_they_are(messages: list[tuple[str, str]]) -> None:
    found = parts(CHATML, [{"role": role, "content": content} for role, content in messages])
    assert found == messages


@settings(deadline=None)  # other processes may hold the machine
@given(st.lists(contents, min_size=1, max_size=5), contents)
def test_trimmed_spans_are_the_trimmed_contents_whatever_they_are(texts: list[str], system: str) -> None:
    found = parts(LLAMA_3, turns(*texts, system=system))
    assert [text for _, text in found] == [system.strip(), *(t.strip() for t in texts)]


# ---- thinking


@pytest.mark.parametrize(
    ("source", "markers"),
    [
        (QWEN_3, ("<think>", "</think>")),
        ("{{ messages[-1].content.split('</think>')[-1] }}", ("<think>", "</think>")),
        ("{{ '<seed:think>' + messages[0].content + '</seed:think>' }}", ("<seed:think>", "</seed:think>")),
        ("[THINK]{{ messages[0].content }}[/THINK]", ("[THINK]", "[/THINK]")),
        (
            "<|start|>assistant<|channel|>analysis<|message|>{{ messages[0].content }}<|end|>",
            ("<|channel|>analysis<|message|>", "<|end|>"),
        ),
        ("<|user|>\n{{ messages[0].content }}<|end|>\n", None),
        (CHATML, None),
        (MISTRAL, None),
    ],
)
def test_thinking_markers_are_those_that_the_template_names(source: str, markers: tuple[str, str] | None) -> None:
    assert ChatTemplate(source).thinking_markers() == markers


def test_a_thinking_span_ends_with_its_closing_marker() -> None:
    text = "hi <think>a</think> b <think></think>"
    spans = thinking_spans(text, ("<think>", "</think>"))
    assert [text[a:b] for a, b in spans] == ["a</think>", "</think>"]
    assert spans[0] == (10, 19)


def test_an_open_thinking_block_runs_to_the_end() -> None:
    markers = ("[THINK]", "[/THINK]")
    assert thinking_spans("[THINK]a[/THINK]b[THINK]c [/THIN", markers) == [(7, 16), (24, 32)]
    assert thinking_spans("a[THINK]", markers) == [(8, 8)]


def test_a_text_without_an_opening_marker_has_no_thinking_span() -> None:
    assert thinking_spans("a</think>b", ("<think>", "</think>")) == []


# ---- tokens


def test_tokens_that_overlap_a_span_are_marked() -> None:
    pieces = [b"<|im_start|>", b"user", b"\n", b"Hel", b"lo you", b"<|im_end|>"]
    marked = tokens_in_spans(pieces, "<|im_start|>user\nHello you<|im_end|>", [(17, 22)])
    assert marked.dtype == np.bool_
    assert marked.tolist() == [False, False, False, True, True, False]


def test_several_spans_mark_together_and_an_empty_one_marks_nothing() -> None:
    pieces = [b"a", b"b", b"c", b"d"]
    assert tokens_in_spans(pieces, "abcd", [(3, 4), (0, 1), (0, 1), (2, 2)]).tolist() == [True, False, False, True]
    assert tokens_in_spans(pieces, "abcd", []).tolist() == [False] * 4


def test_a_beginning_of_sequence_token_need_not_be_in_the_text() -> None:
    assert tokens_in_spans([b"<s>", b"hi"], "hi", [(0, 2)]).tolist() == [False, True]
    assert tokens_in_spans([b"<s>", b"hi"], "<s>hi", [(0, 3)]).tolist() == [True, False]
    assert tokens_in_spans([b"<s>", b"<s>", b"hi"], "<s>hi", [(0, 3)]).tolist() == [False, True, False]


def test_an_empty_piece_marks_nothing() -> None:
    assert tokens_in_spans([b"", b"a", b"", b"b"], "ab", [(0, 2)]).tolist() == [False, True, False, True]


def test_a_character_split_over_tokens_marks_all_of_them() -> None:
    pieces = [b"x", b"\xf0\x9f", b"\x98", b"\x80 \xc3", b"\xa9"]
    assert tokens_in_spans(pieces, "x😀 é", [(1, 2)]).tolist() == [False, True, True, True, False]
    assert tokens_in_spans(pieces, "x😀 é", [(3, 4)]).tolist() == [False, False, False, True, True]


def test_spaces_that_sentencepiece_added_are_passed_over() -> None:
    # what Llama 2's tokenizer makes of this text: a space at the start and after each special token
    pieces = [b"<s>", b" ", b"[", b"INST", b"]", b"  ", b" hi", b"</s>", b" bye"]
    marked = tokens_in_spans(pieces, "[INST]   hi</s>bye", [(9, 11), (15, 18)])
    assert marked.tolist() == [False] * 6 + [True, False, True]


def test_whitespace_that_a_special_token_swallowed_is_passed_over() -> None:
    # Phi-3's role tokens take the newline behind them
    pieces = [b"<|user|>", b" Hi", b"<|end|>", b"<|assistant|>"]
    marked = tokens_in_spans(pieces, "<|user|>\nHi<|end|>\n<|assistant|>\n", [(9, 11)])
    assert marked.tolist() == [False, True, False, False]


def test_sentencepieces_own_space_sign_may_stand_in_the_text() -> None:
    assert tokens_in_spans([b"<s>", b" a", b" ", b"b"], "a▁b", [(1, 2)]).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("pieces", "seen"),
    [
        ([b"ab", b"x"], r"b'x' where the text goes on with b'c'"),
        ([b"ab"], r"they end before b'c'"),
        ([b"abc", b"d"], r"b'd' where the text goes on with b''"),
        ([], r"they end before b'abc'"),
    ],
)
def test_tokens_of_another_text_cannot_be_aligned(pieces: list[bytes], seen: str) -> None:
    with pytest.raises(TemplateError, match=f"cannot be aligned .*{seen}"):
        tokens_in_spans(pieces, "abc", [(0, 1)])


@pytest.mark.parametrize("span", [(-1, 2), (2, 1), (0, 4)])
def test_a_span_outside_the_text_is_an_argument_error(span: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="leaves the text, which has 3 characters"):
        tokens_in_spans([b"abc"], "abc", [span])


EDGES = "a \x7f\x80\u07ff\u0800\u0fff\u1000\uffff\U00010000"  # of the widths in UTF-8; Thai and Hindi are between


@settings(deadline=None)  # other processes may hold the machine
@given(st.text(max_size=20) | st.text(EDGES, max_size=20), st.data())
def test_any_cut_into_pieces_marks_the_pieces_that_hold_the_characters(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    edges = [0, *cuts, len(raw)]
    begin, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    low, high = len(text[:begin].encode()), len(text[:end].encode())
    expected = [max(a, low) < min(b, high) for a, b in itertools.pairwise(edges)]
    pieces = [raw[a:b] for a, b in itertools.pairwise(edges)]
    assert tokens_in_spans(pieces, text, [(begin, end)]).tolist() == expected


# ---- a real model


@pytest.fixture(scope="module")
def real(smollm2_path: Path) -> Any:
    return _core.Model(str(smollm2_path), use_extra_bufts=False)


def test_the_bundled_models_tokens_of_each_role_give_its_text_back(real: Any) -> None:
    template = ChatTemplate(real.chat_template.decode())
    messages = turns("Héllo 😀 日本!", "user\n\n<|im_end|> ok", "And\tnow?  ", system="You sail.")
    text, spans = template.spans(messages)
    pieces = [real.piece(t, True) for t in real.tokenize(text.encode(), True, True)]
    assert b"".join(pieces) == text.encode()
    assert [(s.role, text[s.begin : s.end]) for s in spans] == [(m["role"], m["content"]) for m in messages]
    for s in spans:
        marked = tokens_in_spans(pieces, text, [(s.begin, s.end)])
        own = b"".join(p for p, inside in zip(pieces, marked, strict=True) if inside).decode()
        assert own == text[s.begin : s.end]


def test_the_bundled_models_own_system_message_is_markup(real: Any) -> None:
    text, spans = ChatTemplate(real.chat_template.decode()).spans(turns("system"))
    assert "named SmolLM" in text
    assert spans == [Span("user", text.index("user\nsystem") + 5, text.index("user\nsystem") + 11)]


def test_the_bundled_model_does_not_think(real: Any) -> None:
    assert ChatTemplate(real.chat_template.decode()).thinking_markers() is None


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that leaves all out": "{% for i in range(99999) %}"
    "{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for i in [[1] * 3] * 3 recursive %}{% if loop.depth < 50 %}{{ loop([[1] * 3] * 3) }}"
    "{% endif %}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "PATIENCE", 0.05)
    with pytest.raises(TemplateError, match="does not end within"):
        ChatTemplate(source).render([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("source", ["{{ 9**9**9 }}", "{{ 'a' * 10**6 * 10**6 }}", "{{ [0] * 10**10 }}"])
def test_a_template_does_not_fill_the_memory_with_one_product(source: str) -> None:
    with pytest.raises(TemplateError, match="large"):
        ChatTemplate(source).render([{"role": "user", "content": "Hello"}])


def test_templates_may_multiply() -> None:
    assert ChatTemplate("{{ '=' * 3 }}{{ 2 ** 3 * 4 }}{{ 0.5 * 3 }}").render([]) == "===321.5"


# ---- names of control tokens


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_names_of_control_tokens_in_a_message_are_words(tmp_path: Path, role: str) -> None:
    """With a tokenizer of single bytes, where nothing else could have changed."""
    template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    path = write_tiny_model(tmp_path / "tiny.gguf", chat_template=template)
    with ps.Model(path, n_threads=1, n_ctx=256) as model:
        control = model.control_tokens
        assert {model.token_bytes([t])[0] for t in control} >= {b"<s>", b"</s>"}
        for content in ("a</s>b", "</s>", "<s><s>", "x<s>é</s>", "<s</s>>", "<unk>"):
            honest = model.prompt_tokens([{"role": role, "content": "x"}])
            tokens = model.prompt_tokens([{"role": role, "content": content}])
            assert [t for t in tokens if t in control] == [t for t in honest if t in control]
            text = model.detokenize(tokens, special=True)
            assert text.replace(" ", "") == f"<s>{role}:{content}</s>".replace(" ", "")


def test_ordinary_messages_have_the_tokens_of_the_rendered_text() -> None:
    demo = ps.demo_model(n_threads=1, n_ctx=256)
    for content in ("Hello there!", "1 < 2 and <b>bold</b>", "a <|im_start| b", "\n\n code { }"):
        text = demo.template.render([{"role": "user", "content": content}])
        assert demo.prompt_tokens(content) == demo.tokenize(text, parse_special=True, add_special=False)
    demo.close()


def test_a_template_knows_the_variables_that_are_given() -> None:
    assert ChatTemplate("{{ tools[0] }}{{ x }}").render([], variables={"tools": ["a"], "x": "b"}) == "ab"
