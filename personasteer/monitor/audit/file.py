"""What the file of a model says, and what its chat template does: foreign data and foreign code."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2 import nodes

from personasteer._native import load_core
from personasteer.chat import ChatTemplate
from personasteer.errors import TemplateError
from personasteer.identity import PARTS
from personasteer.model import MEASURED_ON
from personasteer.monitor.audit.log import MOST, FileEntry, TemplateEntry, TensorsEntry, shown, shown_lines
from personasteer.ship.contents import ModelInFile
from personasteer.ship.fields import text_of
from personasteer.ship.verify import kind_of
from personasteer.work import digest

SECONDS = 20.0  # that a chat template may take
MEMORY = 4 * 2**30  # bytes that it may take


def describe_file(path: Path, fields: Mapping[str, Any]) -> FileEntry:
    """Raises ModelError where it is no language model."""
    known = ModelInFile.read(path)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    parameters = 0
    for _, kind, shape, _, n_bytes in load_core().summarize_gguf(os.fsencode(path))[2]:
        counts[kind] += 1
        sizes[kind] += n_bytes
        parameters += int(np.prod([int(n) for n in shape], dtype=object))
    n_ctx = fields.get(f"{text_of(fields, 'general.architecture')}.context_length")
    kinds = [text_of(fields, f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    text_fields = {key: _plain(value) for key, value in fields.items() if key.startswith("tokenizer.")}
    licenses = [text_of(fields, key) for key in ("general.license", "general.license.name", "general.license.link")]
    said = {key: value for key, value in sorted(fields.items()) if key.startswith(("general.", "personasteer."))}
    return FileEntry(
        name=shown(known.name, 200),
        fingerprint=known.fingerprint,
        identity={part: known.identity[part] for part in PARTS},
        kind=shown(kind_of(path), 40),
        architecture=shown(known.architecture, 60),
        quantization=shown(known.quantization, 60),
        size=path.stat().st_size,
        parameters=parameters,
        tensors=[TensorsEntry(type=k, count=n, bytes=sizes[k]) for k, n in sorted(counts.items(), key=lambda x: -x[1])],
        n_layer=known.n_layer,
        n_embd=known.n_embd,
        n_ctx=n_ctx if isinstance(n_ctx, int) else None,
        tokenizer=shown(" / ".join(filter(None, kinds)), 60),
        n_tokens=len(tokens) if isinstance(tokens := fields.get("tokenizer.ggml.tokens"), list) else 0,
        license=shown(", ".join(filter(None, licenses))),
        texts=digest(text_fields)[:16],
        says=[(shown(k, 80), shown(str(_plain(v)), 200)) for k, v in said.items() if _is_said(k, v)][:MOST],
    )


def _is_said(key: str, value: Any) -> bool:
    return (
        key not in ("general.name", "general.architecture", "general.file_type")
        and (isinstance(value, (str, int, float)) or (isinstance(value, list) and len(value) <= 8))
        and not (key.startswith("personasteer.") and key != "personasteer.kind")
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def examine_template(fields: Mapping[str, Any], *, seconds: float = SECONDS) -> TemplateEntry:
    """What a file's chat template does, found out in a child process: it is foreign code, which may never end.

    seconds: of computing that it may take.
    """
    source = text_of(fields, "tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    others = [shown(key.removeprefix(prefix), 60) for key in sorted(fields) if key.startswith(prefix)][:MOST]
    if not source:
        return TemplateEntry(found=False, others=others)
    tokens = fields.get("tokenizer.ggml.tokens")
    named = []
    for which in ("bos", "eos"):
        at = fields.get(f"tokenizer.ggml.{which}_token_id")
        inside = isinstance(tokens, list) and isinstance(at, int) and 0 <= at < len(tokens)
        named.append(tokens[at] if inside else "")  # type: ignore[index]
    command = [sys.executable, "-P", "-c", "from personasteer.monitor.audit.file import _child; _child()"]
    given = json.dumps([source, *named, seconds])
    over = f"it does not end within {seconds:g} s"
    trouble = "it could not be examined: it fails, or needs too much memory"
    try:
        done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=60 + 3 * seconds)
        if done.returncode == 0:
            return TemplateEntry(found=True, others=others, **json.loads(done.stdout))
        trouble = over if done.returncode in TIME_OVER else trouble
    except subprocess.TimeoutExpired:
        trouble = over
    return TemplateEntry(found=True, others=others, trouble=trouble)


TIME_OVER = (-signal.SIGXCPU, -signal.SIGKILL)


def _child() -> None:
    """Of a source, two tokens and a time on stdin: what `describe_template` finds, on stdout."""
    source, bos, eos, seconds = json.load(sys.stdin)
    spent = math.ceil(time.process_time() + seconds)
    for what, limit in ((resource.RLIMIT_CPU, spent), (resource.RLIMIT_DATA, MEMORY)):
        with suppress(ValueError, OSError):
            resource.setrlimit(what, (limit, limit))
    json.dump(describe_template(source, bos, eos), sys.stdout)


USER = "xUSRx"
MARKUP = re.compile(r"<[^<>\n]{1,80}>|\[/?[A-Z_]{2,40}\]")
ROLES = {"system", "user", "assistant", "model", "human", "tool"}
WORDS = re.compile(r"[^\W\d_]+")


def describe_template(source: str, bos: str = "", eos: str = "") -> dict[str, Any]:
    """The fields of a TemplateEntry."""
    try:
        template = ChatTemplate(source, bos, eos)
        alone, later = (
            template.render([{"role": "user", "content": USER}], today=day)
            for day in (MEASURED_ON, datetime(2031, 12, 24))
        )
    except TemplateError as e:
        return {"trouble": shown(str(e))}
    empty = None
    with suppress(TemplateError):
        empty = shown_lines(template.render([], today=MEASURED_ON))
    own = _own_lines(alone)
    texts, looked_for = _constants(source)
    sentences = [line for text in texts for line in _own_lines(text)]
    return {
        "takes_system": template.takes_system(),
        "dated": alone != later,
        "tools": "tools" in source,
        "thinking": list(template.thinking_markers() or ()),
        "alone": shown_lines(alone.replace(USER, "{the user's words}")),
        "empty": empty,
        "own_words": [shown(line) for line in own[:MOST]],
        "sentences": [shown(line) for line in dict.fromkeys(sentences) if line not in own][:MOST],
        "looks_for": [shown(text, 80) for text in looked_for[:MOST]],
    }


def _own_lines(rendered: str) -> list[str]:
    """Lines that are neither the user's words, nor markup, nor the name of a role."""
    lines = [line.strip(" \t#:") for line in MARKUP.sub(" ", rendered.replace(USER, "\n")).split("\n")]
    words = [[w for w in WORDS.findall(line) if w.lower() not in ROLES] for line in lines]
    return [line for line, said in zip(lines, words, strict=True) if len(said) >= 3 or sum(map(len, said)) >= 16]


def _constants(source: str) -> tuple[list[str], list[str]]:
    """(the texts that stand in a template, those that it looks for in the words of messages).

    Words are what is reached as `content` or `text`, or under a name that was set to it; looked for with a comparison,
    `in`, or a method such as startswith. Texts without three letters outside markup are how templates find their own
    markers, and are left out.
    """
    tree = jinja2.Environment(extensions=[jinja2.ext.loopcontrols]).parse(source)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    words: set[str] = set()
    assigned = [(a.target.name, a.node) for a in tree.find_all(nodes.Assign) if isinstance(a.target, nodes.Name)]
    for _ in assigned:
        words |= {name for name, value in assigned if _is_words(value, words)}
    found = []
    for compare in tree.find_all(nodes.Compare):
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        if any(_is_words(side, words) for side in sides):
            found += [side.value for side in sides if isinstance(side, nodes.Const)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and _is_words(call.node.node, words):
            found += [a.value for a in call.args if isinstance(a, nodes.Const)]
    spoken = [
        text for text in found if isinstance(text, str) and len("".join(WORDS.findall(MARKUP.sub("", text)))) >= 3
    ]
    return texts, list(dict.fromkeys(spoken))


def _is_words(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr in ("content", "text")
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return node.arg.value in ("content", "text")
        return _is_words(node.node, names)
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_words(node.node, names)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return _is_words(node.node.node, names)
    if isinstance(node, (nodes.Concat, nodes.Add)):
        parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
        return any(_is_words(part, names) for part in parts)
    return False
