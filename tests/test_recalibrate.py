"""Fine-tuning and re-alignment: what is learned, what is applied meanwhile, what is written, and that it goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import planted_change
import planted_model
import pytest
import tiny_models
from safetensors.numpy import save_file

import personasteer as ps
from personasteer.cli import run
from personasteer.conversations import benign_domains, benign_rows
from personasteer.engine import Request
from personasteer.memory import check_memory
from personasteer.recalibrate import (
    Recipe,
    can_be_probed,
    change,
    finetune,
    make_probes,
    measure,
    read_examples,
    realign,
    remedies,
    removed,
    task_loss,
    write_remedy,
)
from personasteer.recalibrate.adapters import read_adapter, save_adapter
from personasteer.recalibrate.measures import Shown
from personasteer.recalibrate.memory import estimate
from personasteer.recalibrate.training import block_edits
from personasteer.ship.rewrite import ModelFile
from personasteer.tiny_model import write_tiny_model
from personasteer.work import Work

LETTERS = planted.LETTERS


def rows_of(letters: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)

    def text(kinds: str, size: int) -> str:
        return "".join(rng.choice(list(kinds), size))

    return [{"prompt": text("klmnop", 5), "response": text(letters + " ", 8)} for _ in range(n)]


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tiny_path, n_ctx=512) as m:
        yield m


@pytest.fixture(scope="module")
def vector(tiny_path: Path) -> ps.PersonaVector:
    return planted.letter_vector(tiny_path, layers=(1, 2), norms=np.ones(4, np.float32))


# ---- examples


def test_answers_are_learned_with_their_ends_and_prompts_are_not(smollm2_path: Path) -> None:
    talk = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "It is Paris."},
        {"role": "user", "content": "And of Spain?"},
        {"role": "assistant", "content": "That is Madrid."},
    ]
    with ps.Model(smollm2_path, n_ctx=512) as m:
        examples = read_examples(m, [{"messages": talk}] * 4)
        (first, *_) = examples.examples
        said = [m.detokenize(first.tokens[a:b], special=True) for a, b in first.spans]
        assert said == ["It is Paris.<|im_end|>", "That is Madrid.<|im_end|>"]
        whole = m.detokenize(first.tokens, special=True)
        assert whole.startswith("<|im_start|>system")
        under = read_examples(m, [{"messages": talk}] * 4, system="Be brief.").examples[0]
        assert "Be brief." in m.detokenize(under.tokens)
        assert [m.detokenize(under.tokens[a:b]) for a, b in under.spans] == ["It is Paris.", "That is Madrid."]


def test_a_model_without_a_template_learns_pairs(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "plain.gguf", chat_template=None)
    with ps.Model(path, n_ctx=256) as m:
        (first, *_) = read_examples(m, [{"prompt": "abc", "response": "def"}] * 4).examples
        begin, end = first.spans[0]
        assert m.detokenize(first.tokens[begin:end]).strip() == "def"
        assert first.tokens[-1] == m.end_token
        assert end == len(first.tokens)


def test_rows_that_cannot_be_trained_on_are_counted(model: ps.Model) -> None:
    rows: list[Any] = [
        *rows_of("ace", 5),
        {"prompt": "a", "response": None},
        {"prompt": "a", "response": ""},
        {"prompt": "a" * 600, "response": "b"},
    ]
    examples = read_examples(model, rows, longest=128)
    assert len(examples) == 5
    assert sum(examples.skipped.values()) == 3
    assert examples.skipped["longer than 128 tokens"] == 1
    with pytest.raises(ps.ArgumentError, match="3 rows to train on, at least 4 are needed"):
        read_examples(model, rows_of("ace", 3))


def test_the_digest_changes_with_the_rows_and_their_spans(model: ps.Model) -> None:
    rows = rows_of("ace", 6)
    digests = {read_examples(model, r).digest for r in (rows, rows[::-1], rows[:5], rows)}
    assert len(digests) == 3


def test_task_loss_is_the_mean_over_learned_tokens(model: ps.Model) -> None:
    examples = read_examples(model, rows_of("ace", 5)).examples
    total, n = 0.0, 0
    for e in examples:
        request = Request(e.tokens, len(e.tokens), outputs=(0, len(e.tokens)), keep_logits=True)
        logits = model.run_alone([request])[0]["logits"].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for begin, end in e.spans:
            total -= sum(log_p[t - 1, e.tokens[t]] for t in range(begin, end))
            n += end - begin
    assert task_loss(model, examples) == pytest.approx(total / n, abs=5e-3)  # shared prefixes, a float16 cache


def test_a_system_prompt_needs_a_template(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "plain.gguf", chat_template=None)
    with ps.Model(path, n_ctx=256) as m, pytest.raises(ps.TemplateError, match="takes no system prompt"):
        read_examples(m, rows_of("ace", 5), system="x")


# ---- edits


def test_edits_in_training_are_those_of_inference(model: ps.Model, vector: ps.PersonaVector) -> None:
    other = planted.letter_vector(model.path, layers=(2,))
    edits = block_edits(ps.Steering([vector * 0.4, other * -0.1, ps.Ablate(vector, layers=(3,), share=0.5)]), model)
    u = vector.direction(1) / np.linalg.norm(vector.direction(1))
    assert sorted(edits) == [1, 2, 3]
    assert edits[1].row == pytest.approx(0.2 * model.norms[1] * u, rel=1e-5)
    assert edits[2].row == pytest.approx(0.1 * model.norms[2] * u, rel=1e-3)
    assert edits[1].basis is None
    assert edits[3].basis is not None
    assert np.abs(edits[3].basis @ u) == pytest.approx(1.0, abs=1e-5)
    assert edits[3].share == 0.5


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda v: ps.Cap(v, 0.5, layers=(1,)), "Cap cannot be part of training"),
        (lambda v: ps.Add(v, 0.1, scope="response"), "must be on all tokens"),
        (lambda v: ps.Add(v, 0.1, half_life=3), "without a schedule"),
        (lambda v: ps.Add(v, 0.1, keep_norm=True), "cannot be part of training"),
        (lambda v: [ps.Ablate(v), ps.Ablate(v, share=0.5)], "the same share"),
    ],
)
def test_edits_that_training_cannot_apply_are_refused(
    model: ps.Model, vector: ps.PersonaVector, edit: Any, expected: str
) -> None:
    from personasteer.steering import as_steering

    with pytest.raises(ps.ArgumentError, match=expected):
        block_edits(as_steering(edit(vector)), model)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"rate": float("nan")}, "rate must be a positive number"),
        ({"batch": True}, "batch must be a whole number"),
        ({"epochs": 0}, "epochs must be a positive number"),
        ({"precision": "int4"}, "precision must be one of float32, bfloat16"),
    ],
)
def test_recipes_are_checked(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ps.ArgumentError, match=expected):
        Recipe(**given)


# ---- adapters


def test_an_adapter_is_read_as_it_was_written_and_llama_cpp_applies_it(tmp_path: Path) -> None:
    base, u = planted_change.write_base(tmp_path / "base.gguf")
    adapter = planted_change.write_change(tmp_path / "change.gguf", base, u, planted_change.SIZE)
    found = read_adapter(adapter, ModelFile(base))
    assert found.rank == 1
    assert found.scale == 1.0
    ((name, (a, b)),) = found.factors.items()
    assert name == f"blk.{planted_change.BLOCK}.ffn_down.weight"
    assert np.allclose(b[:, 0], planted_change.SIZE * u)
    assert a[0, 0] == 1
    with ps.Model(base, n_ctx=64) as m, ps.Model(base, n_ctx=64, lora=[adapter]) as t:
        before = m.capture(["abc"])[0]
        moved = t.capture(["abc"])[0] - before
    norm = np.linalg.norm(before[planted_change.BLOCK])
    size = float(np.linalg.norm(moved[planted_change.BLOCK]))
    assert moved[planted_change.BLOCK] @ u == pytest.approx(size, rel=1e-3)
    assert size > 0.1 * norm


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, tiny_path: Path) -> None:
    base, u = planted_change.write_base(tmp_path / "base.gguf")
    adapter = planted_change.write_change(tmp_path / "change.gguf", base, u, planted_change.SIZE)
    with pytest.raises(ps.ModelError, match="which it has no second factor for, or the model does not have"):
        read_adapter(adapter, ModelFile(tiny_path))
    with pytest.raises(ps.ModelError, match="is no LoRA adapter"):
        read_adapter(tiny_path, ModelFile(tiny_path))
    name = "blk.1.ffn_down.weight"
    wrong = {name: (np.ones((2, 9), np.float32), np.ones((64, 2), np.float32))}
    save_adapter(tmp_path / "wrong.gguf", ModelFile(tiny_path), wrong, alpha=2, provenance={})
    with pytest.raises(ps.ModelError, match=r"is \(64, 2\) times \(2, 9\), the model's tensor \(64, 128\)"):
        read_adapter(tmp_path / "wrong.gguf", ModelFile(tiny_path))


# ---- measures


def test_shares_removed_are_of_the_shift() -> None:
    def shown(words: float, stream: float) -> Shown:
        return Shown(np.array([words, words + 1]), np.array([stream, stream - 1]))

    base, tuned = shown(0.0, 0.0), shown(2.0, 0.5)
    assert removed(base, tuned, shown(0.5, 0.5)) == pytest.approx((0.75, 0.0))
    assert removed(base, tuned, shown(-1.0, 0.0)) == pytest.approx((1.5, 1.0))
    assert np.isnan(removed(base, base, tuned)).all()
    c = change(base, tuned)
    assert (c.log_odds, c.projection) == pytest.approx((2.0, 0.5))
    assert (c.log_odds_low, c.log_odds_high) == pytest.approx((2.0, 2.0))
    assert Shown.from_dict(json.loads(json.dumps(base.as_dict()))).log_odds.tolist() == [0.0, 1.0]


def test_a_planted_change_shows_in_the_words_and_in_the_stream(tmp_path: Path) -> None:
    base, u = planted_change.write_base(tmp_path / "base.gguf")
    adapter = planted_change.write_change(tmp_path / "change.gguf", base, u, planted_change.SIZE)
    trait = planted_model.planted_trait()
    data = np.tile(u, (8, 1))
    provenance = {"trait": trait.name, "texts": trait.as_dict()}
    v = ps.PersonaVector(data, (planted_change.BLOCK,), "planted", provenance=provenance)
    with ps.Model(base, n_ctx=256) as m, ps.Model(base, n_ctx=256, lora=[adapter]) as t:
        probes = make_probes(m, [v])
        a, b = (measure(x, probes)["planted"] for x in (m, t))
        states = t.capture([(q, "x") for q in trait.evaluate_questions], pool="last", span="prompt")
        il = planted_change.BLOCK
        assert b.projection == pytest.approx(states[:, il] @ u / m.norms[il], rel=1e-3)
    c = change(a, b)
    assert c.log_odds_low > 0.05
    assert c.projection_low > 0.05
    with pytest.raises(ps.TraitError, match="does not carry"), ps.Model(base, n_ctx=64) as m:
        make_probes(m, [replace(v, name="unheard", provenance={})])


# ---- benign samples


def test_benign_samples_are_there_in_several_domains() -> None:
    rows = benign_rows()
    assert len(rows) >= 200
    assert len(benign_domains()) >= 8
    assert len({r["prompt"] for r in rows}) == len(rows)
    assert all(set(r) == {"domain", "prompt", "response"} and len(r["response"]) > 20 for r in rows)
    assert {r["domain"] for r in benign_rows(["plans"])} == {"plans"}
    assert len(benign_rows(["plans"])) >= 120
    held_out = {q.lower() for name in ps.traits.names() for q in ps.traits.get(name).evaluate_questions}  # type: ignore[attr-defined]
    assert not {r["prompt"].lower() for r in benign_rows(["plans", "advice"])} & held_out
    with pytest.raises(ps.ArgumentError, match="no benign samples of 'war'; domains: "):
        benign_rows(["war"])


# ---- memory


def test_what_does_not_fit_is_told_before_it_starts(tiny_path: Path) -> None:
    file = ModelFile(tiny_path)
    (loading, small), (also, large) = (estimate(file, 10_000, n, 286) for n in (100, 10_000))
    assert loading == also
    assert large - small > 4 * 9_900 * file.n_layer * file.n_embd
    check_memory(1, "this", "")
    with pytest.raises(ps.PersonasteerError, match=r"^this needs about 1000000\.0 GB of memory, .* free: buy more"):
        check_memory(10**15, "this", "buy more")


def test_what_does_not_fit_is_told_before_anything_is_measured(
    model: ps.Model, vector: ps.PersonaVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from personasteer.recalibrate import run as running

    monkeypatch.setattr(running, "libraries", lambda: None)
    monkeypatch.setattr("personasteer.recalibrate.training.device_of", lambda model: None)
    monkeypatch.setattr("personasteer.memory.free_memory", lambda device=None: 10**6)
    monkeypatch.setattr(running, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ps.PersonasteerError, match=r"needs about .* GB of memory, 0\.0 GB are free"):
        finetune(model, rows_of("ace", 8), tmp_path / "x.gguf", vectors=[vector])
    assert not list(tmp_path.iterdir())


def test_work_leaves_what_it_did_not_write(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"w": np.ones(3, np.float32)}, weights, {"format": "pt"})
    for remove in (True, False):
        with Work(tmp_path, {"n": remove}, restart=True) as work:
            work.value("part", lambda: 1.0)
            if remove:
                work.remove()
    assert weights.exists()
    assert (tmp_path / "part.safetensors").exists()
    (tmp_path / "plan.json").unlink()
    (tmp_path / "adapter.gguf").write_bytes(b"mine")
    with pytest.raises(ps.ArgumentError, match=r"holds adapter\.gguf of something else"):
        Work(tmp_path, {}, more=("adapter.gguf",))
    assert (tmp_path / "adapter.gguf").read_bytes() == b"mine"


def test_a_vector_of_a_trait_without_questions_cannot_be_probed(vector: ps.PersonaVector) -> None:
    assert can_be_probed(vector)
    texts = {**vector.provenance["texts"], "continuations": []} if "texts" in vector.provenance else {}
    unknown = replace(vector, name="nobody knows this one", provenance={"texts": texts} if texts else {})
    assert not can_be_probed(unknown)


# ---- without training


def feature_of(path: Path, u: np.ndarray, sign: float, cap: float) -> ps.PersonaVector:
    trait = planted_model.planted_trait()
    data = np.full((8, 64), np.nan, np.float32)
    data[planted_change.BLOCK] = u
    thresholds = np.full(8, np.nan, np.float32)
    thresholds[planted_change.BLOCK] = cap
    provenance = {"method": "feature", "trait": trait.name, "texts": trait.as_dict(), "change": sign}
    return ps.PersonaVector(
        data, (planted_change.BLOCK,), "feature 7", provenance=provenance, thresholds=thresholds, strength=0.3
    )


def test_a_raised_feature_is_capped_or_lowered_and_shipped(tmp_path: Path) -> None:
    base, u = planted_change.write_base(tmp_path / "base.gguf")
    adapter = planted_change.write_change(tmp_path / "change.gguf", base, u, planted_change.SIZE)
    with ps.Model(base, n_ctx=256) as m, ps.Model(base, n_ctx=256, lora=[adapter]) as t:
        cap = float(np.percentile(m.readings(["abc def ghi"] * 2, np.nan_to_num(np.tile(u, (8, 1))))[0][:, 4, 0], 99))
        found = remedies(m, t, [feature_of(base, u, 1.0, cap)])
        assert {r.how for r in found} == {"lower", "cap"}
        assert found[0].removed >= 0.7
        assert found[0].coherence is not None
        bundle = write_remedy(tmp_path / "back.tar", t, found[0])
        steered = t.logits(["abc def"], steer=found[0].edit)[0]
        bare = m.logits(["abc def"], steer=found[0].edit)[0]
        with pytest.raises(ps.ArgumentError, match="has not shifted by more than chance"):
            remedies(m, m, [feature_of(base, u, 1.0, cap)])
        other = feature_of(base, u, 1.0, cap)
        other.provenance["tuned"] = "0" * 64
        with pytest.raises(ps.ArgumentError, match="is a feature of another fine-tune"):
            remedies(m, t, [other])
        with pytest.raises(ps.ArgumentError, match="is no feature that `personasteer diff` found"):
            remedies(m, t, [planted.letter_vector(base)])
    with ps.load_bundle(bundle, n_ctx=256) as loaded:  # the model with the fine-tune's adapter, and the edit
        assert len(loaded.persona.edits) == 1
        assert [scale for _, scale in loaded.model.adapters] == [1.0]
        assert np.array_equal(loaded.model.logits(["abc def"], steer=loaded.steering)[0], steered)
    assert not np.array_equal(bare, steered)
    with ps.Model(base) as alone, pytest.raises(ps.BundleError, match=r"is run with adapters/change\.gguf"):
        ps.load_bundle(bundle, model=alone)
    with ps.Model(base, n_ctx=256, lora=[adapter]) as t:
        probes = make_probes(t, [feature_of(base, u, 1.0, cap)])
        cells = probes[0].cells
        values = ps.evaluate.cell_log_odds(t, cells, [None, found[0].edit]).mean(axis=1)  # type: ignore[attr-defined]
    assert values[1] < values[0]


def test_a_suppressed_feature_is_restored(tmp_path: Path) -> None:
    base, u = planted_change.write_base(tmp_path / "base.gguf")
    adapter = planted_change.write_change(tmp_path / "change.gguf", base, u, -planted_change.SIZE)
    with ps.Model(base, n_ctx=256) as m, ps.Model(base, n_ctx=256, lora=[adapter]) as t:
        found = remedies(m, t, [feature_of(base, u, -1.0, 0.0)])
    assert {r.how for r in found} == {"restore"}
    assert max(r.removed for r in found) >= 0.7


# ---- bad input


@pytest.mark.parametrize("verb", ["finetune", "realign"])
def test_without_the_extra_one_line_says_what_to_install(
    tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, verb: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setitem(sys.modules, "transformers", sys)
    data, v = tmp_path / "rows.jsonl", tmp_path / "v.gguf"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows_of("ace", 8)))
    vector.save(v)
    tiny = str(tiny_path)
    given = {
        "finetune": ["finetune", str(data), "-m", tiny],
        "realign": ["realign", "--base", tiny, "--tuned", tiny, "-v", str(v)],
    }[verb]
    assert run([*given, "-o", str(tmp_path / "out.gguf"), "-c", "256"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "personasteer: fine-tuning needs torch, transformers, peft: pip install 'personasteer[train]'"
    assert not (tmp_path / "out.gguf").exists()
    assert not (tmp_path / "out.gguf.work").exists()


# ---- with torch


def libraries() -> Any:
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed (CPU is enough)", exc_type=ImportError)
    import torch

    return torch


@pytest.fixture
def trained(model: ps.Model, vector: ps.PersonaVector, tmp_path: Path) -> Any:
    libraries()
    recipe = Recipe(rank=4, rate=5e-3, steps=24)
    out = tmp_path / "tuned.gguf"
    return finetune(model, rows_of("acegi", 60), out, recipe=recipe, vectors=[vector], every=12), out


@pytest.mark.torch
def test_training_moves_the_quantized_model_towards_its_rows(trained: Any, vector: ps.PersonaVector) -> None:
    found, out = trained
    assert found.n_steps == 24
    assert [p.step for p in found.points] == [12, 24]
    assert found.changes["letters"].log_odds_low > 0.5
    before, after = found.task_loss
    assert after < before - 1
    assert not out.with_name("tuned.gguf.work").exists()
    summary = json.loads(json.dumps(found.summary()))
    assert summary["traits"]["letters"]["change"]["log_odds"] == found.changes["letters"].log_odds


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_adapter_computes_what_peft_computes(tmp_path: Path, kind: str) -> None:
    torch = libraries()
    from personasteer.recalibrate.torch_models import load_float32, logit_cosines
    from personasteer.recalibrate.training import Trainer

    path = tmp_path / "m.gguf"
    {"llama": write_tiny_model, "qwen2": tiny_models.write_qwen_model}[kind](path)  # type: ignore[operator]
    out = tmp_path / "lora.gguf"
    with ps.Model(path, n_ctx=128) as m:
        text = m.tokenize("abc def ghi jkl")
        trainer = Trainer(m, read_examples(m, rows_of("ace", 12)), Recipe(rank=4, rate=1e-2, steps=6))
        trainer.run(6)
        trainer.save(out, {})
    with torch.no_grad():
        peft = trainer.model.eval()(torch.tensor([text])).logits[0].numpy()
        untrained = load_float32(path)(torch.tensor([text])).logits[0].numpy()
        merged = load_float32(path, [(out, 1.0)])(torch.tensor([text])).logits[0].numpy()
    with ps.Model(path, n_ctx=64, lora=[out]) as m:
        request = Request(text, len(text), outputs=(0, len(text)), keep_logits=True)
        ours = m.run_alone([request])[0]["logits"]
    assert logit_cosines(untrained, peft).max() < 0.99  # it has learned something
    assert logit_cosines(ours, peft).min() >= 0.999
    assert np.allclose(merged, peft, atol=1e-3)


@pytest.mark.torch
@pytest.mark.parametrize("stopped_at", [3, 10, 13, "measuring", "saving"])
def test_an_interrupted_training_ends_in_the_same_bytes(
    trained: Any, model: ps.Model, vector: ps.PersonaVector, tmp_path: Path, stopped_at: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from personasteer.recalibrate.training import Trainer

    whole, out = trained
    again = tmp_path / "again.gguf"
    rows, options = (
        rows_of("acegi", 60),
        {"recipe": Recipe(rank=4, rate=5e-3, steps=24), "vectors": [vector], "every": 12},
    )
    step = Trainer._step

    def stopping(self: Any, batch: Any, number: int) -> float:
        if number == stopped_at:
            raise KeyboardInterrupt
        return step(self, batch, number)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        if stopped_at == "measuring":
            patch.setattr("personasteer.recalibrate.run._with_adapter", stop)
        elif stopped_at == "saving":
            patch.setattr("personasteer.recalibrate.run._save", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(model, rows, again, **options)
    assert not again.exists()
    if stopped_at != 3:  # where nothing was kept it begins anew
        with pytest.raises(ps.ArgumentError, match=r"holds other work \(it differs in: recipe\)"):
            finetune(model, rows, again, **{**options, "recipe": Recipe(rank=2)})
    found = finetune(model, rows, again, **options)
    assert again.read_bytes() == out.read_bytes()
    assert found.losses == whole.losses
    assert found.summary() == whole.summary()


@pytest.mark.torch
def test_what_is_added_in_training_is_added_at_every_position(
    model: ps.Model, vector: ps.PersonaVector, tiny_path: Path
) -> None:
    """The loss of a LoRA that has learned nothing yet, steered, is the loss of the steered GGUF model."""
    torch = libraries()
    from personasteer.recalibrate.training import Trainer

    examples = read_examples(model, rows_of("ace", 5))
    for steering in (vector * 0.5, ps.Ablate(vector), ps.Steering([vector * 0.3, ps.Ablate(vector, layers=(3,))])):
        from personasteer.steering import as_steering

        steer = as_steering(steering)
        trainer = Trainer(model, examples, Recipe(rank=2), edits=block_edits(steer, model))
        with torch.no_grad():
            got = float(trainer.loss(list(examples.examples)))
        total, n = 0.0, 0
        for e in examples.examples:
            result = model.run_alone([replace(Request.scored(e.tokens, e.spans[0][0]), steering=steer)])[0]
            ((begin, end),) = e.spans
            total -= float(result["scores"][: end - begin].sum())
            n += end - begin
        assert got == pytest.approx(total / n, abs=2e-3)


@pytest.mark.torch
def test_benign_samples_bring_a_tuned_model_back(
    trained: Any, model: ps.Model, vector: ps.PersonaVector, tiny_path: Path, tmp_path: Path
) -> None:
    _, adapter = trained
    with ps.Model(tiny_path, n_ctx=512, lora=[adapter]) as tuned:
        samples = rows_of("acegibdfhj", 60, seed=5)
        found = realign(
            model, tuned, [vector], tmp_path / "back.gguf", data=samples, samples=60,
            recipe=Recipe(rank=4, rate=2e-3, steps=40), every=4,
        )  # fmt: skip
        assert found.recovered
        assert found.n_steps < 40  # it stopped
        assert found.removed("letters", found.points[-1])[0] >= 0.9
        with pytest.raises(ps.ArgumentError, match="there are 60 samples that can be used, 61 are asked for"):
            realign(model, tuned, [vector], tmp_path / "b.gguf", data=samples, samples=61)
    both = [adapter, tmp_path / "back.gguf"]
    probes = make_probes(model, [vector])
    with ps.Model(tiny_path, n_ctx=512, lora=both) as back:
        assert measure(back, probes)["letters"].log_odds == pytest.approx(found.points[-1].shown["letters"].log_odds)
    plain = json.loads(json.dumps(found.summary()))
    assert plain["recovered"] is True


@pytest.mark.torch
def test_a_model_that_has_not_shifted_is_not_brought_back(
    model: ps.Model, vector: ps.PersonaVector, tmp_path: Path
) -> None:
    libraries()
    with pytest.raises(ps.ArgumentError, match="along letters what the tuned model says has not shifted"):
        realign(model, model, [vector], tmp_path / "back.gguf", data=rows_of("ace", 20))
    assert not (tmp_path / "back.gguf").exists()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m, v, d: finetune(m, rows_of("ace", 8), d / "x.gguf", every=-1), "every must be 0 or more"),
        (lambda m, v, d: realign(m, m, [v], d / "x.gguf", every=0), "every must be at least 1"),
        (lambda m, v, d: realign(m, m, [v], d / "x.gguf", samples=0), "samples must be at least 1"),
        (lambda m, v, d: realign(m, m, [v, v], d / "x.gguf"), "the vectors need different names"),
        (lambda m, v, d: realign(m, m, [], d / "x.gguf"), "give at least one"),
        (lambda m, v, d: finetune(m, rows_of("ace", 8), m.path, force=True), "is what this is made from"),
        (
            lambda m, v, d: finetune(m, rows_of("ace", 8), d / "x.gguf", steer=[ps.Ablate(v)] * 2),
            "nearly the",
        ),
    ],
)
def test_arguments_are_checked_before_anything_is_done(
    model: ps.Model, vector: ps.PersonaVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any, expected: str
) -> None:
    monkeypatch.setattr("personasteer.recalibrate.run.libraries", lambda: None)
    with pytest.raises(ps.ArgumentError, match=expected):
        call(model, vector, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.torch
def test_the_command_line_trains_measures_and_brings_back(
    tiny_path: Path, vector: ps.PersonaVector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    libraries()
    data, v, out = tmp_path / "rows.jsonl", tmp_path / "v.gguf", tmp_path / "tuned.gguf"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows_of("acegi", 30)))
    vector.save(v)
    tiny = str(tiny_path)
    common = ["-m", tiny, "-c", "256", "--rank", "2", "--rate", "5e-3", "--steps", "8"]
    assert run(["finetune", str(data), *common, "-o", str(out), "-v", str(v)]) == 0
    said = capsys.readouterr().out
    assert "27 rows, 8 steps" in said
    assert "letters" in said
    assert run(["finetune", str(data), *common, "-o", str(out), "-v", str(v)]) == 2
    assert "exists already; --force overwrites it" in capsys.readouterr().err
    assert run(["finetune", str(data), *common, "-o", str(out), "--prevent", f"{v}:0.2", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_steps"] == 8
    back = ["realign", "--base", tiny, "--tuned", tiny, "--lora", str(out), "-v", str(v), "-c", "256"]
    options = ["--data", str(data), "--samples", "12", "--steps", "3", "--every", "3", "--rank", "2"]
    assert run([*back, *options, "-o", str(tmp_path / "back.gguf")]) == 0
    assert "capability: base" in capsys.readouterr().out
    assert run([*back, "--samples", "4", "--steps", "1", "-o", str(tmp_path / "b.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_samples"] == 4


@pytest.mark.torch
def test_a_loss_that_is_no_number_is_told(model: ps.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = libraries()
    from personasteer.recalibrate.training import Trainer

    monkeypatch.setattr(Trainer, "loss", lambda self, batch: torch.tensor(float("nan")))
    with pytest.raises(ps.ModelError, match="the loss of step 0 is nan: train with a lower rate"):
        finetune(model, rows_of("ace", 8), tmp_path / "x.gguf", recipe=Recipe(rank=2, steps=2))


@pytest.mark.torch
def test_real_weights_in_transformers_are_those_of_the_file(smollm2_path: Path) -> None:
    libraries()
    from personasteer.recalibrate.torch_models import check_same, load_float32

    with ps.Model(smollm2_path, n_ctx=256) as m:
        assert check_same(m, load_float32(smollm2_path)) >= 0.99
