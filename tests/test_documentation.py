"""Every public name is explained, and the examples in the explanations are true."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import planted_model
import pytest

import personasteer as ps
from personasteer import monitor, ship
from personasteer._native import extra_buffers_work

PUBLIC = (
    "", "conversations", "derive", "discover", "evaluate", "monitor", "plots", "recalibrate", "screen", "ship",
    "traits", "traits.formats",
)  # fmt: skip


def public_names() -> dict[str, Any]:
    """What users are to import: by name, in the module where it stands."""
    found = {}
    for name in PUBLIC:
        module = importlib.import_module(f"personasteer.{name}".rstrip("."))
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and k[0] != "_"]
        for k in getattr(module, "__all__", own):
            value = getattr(module, k)
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def public_members(cls: type) -> dict[str, Any]:
    functions = (property, functools.cached_property, classmethod, staticmethod)
    own = {k: v for k, v in vars(cls).items() if k[0] != "_"}
    return {k: getattr(cls, k) for k, v in own.items() if inspect.isfunction(v) or isinstance(v, functions)}


NAMES = public_names()


def test_what_is_loaded_on_use_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(str(ps.__file__)).read_text("utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {alias.name for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    errors = {name for name, value in vars(ps.errors).items() if inspect.isclass(value)}
    errors = {name for name in errors if issubclass(getattr(ps.errors, name), ps.PersonasteerError)}
    assert seen == {name for names in ps._HOMES.values() for name in names}
    assert sorted(seen | errors) == ps.__all__


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_explained(name: str) -> None:
    value = NAMES[name]
    text = inspect.getdoc(value) or ""
    assert text
    assert not text.startswith(value.__name__ + "("), "the signature that dataclasses write"
    if not inspect.isclass(value):
        return
    for member, found in public_members(value).items():
        assert inspect.getdoc(found), member
    if not is_dataclass(value):
        return
    text = " ".join(b.__doc__ or "" for b in value.__mro__ if b.__module__.startswith("personasteer"))
    source = inspect.getsource(value)
    for field in fields(value):
        commented = re.search(rf"^    {field.name}: .*  # \w", source, re.M)
        assert field.name[0] == "_" or commented or re.search(rf"\b{field.name}\b", text), field.name


# ---- examples


def examples() -> dict[str, doctest.DocTest]:
    finder = doctest.DocTestFinder()
    found = {}
    for value in NAMES.values():
        for test in finder.find(value, value.__qualname__, module=sys.modules[value.__module__], globs={}):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()
# calibrated on few conversations, or opened by a stock llama.cpp: on a tiny model instead of the bundled one
TINY = {"attach", "calibrate", "Guard", "load_bundle", "screen", "verify"}
GOOD = ["What a lovely day!", "I am so happy today.", "This is wonderful news.", "Everybody smiled at me."]
BAD = ["What an awful day!", "I am so sad today.", "This is terrible news.", "Everybody shouted at me."]


@pytest.fixture(scope="module")
def bundled() -> Iterator[dict[str, Any]]:
    with ps.demo_model(n_ctx=512) as model:
        mood, other = (ps.contrast(model, GOOD, BAD, name=n, layers=[il]) for n, il in (("mood", 15), ("other", 16)))
        yield {"model": model, "vector": mood, "other": other}


@pytest.fixture(scope="module")
def tiny_one(tmp_path_factory: pytest.TempPathFactory, short_conversations: None) -> Iterator[dict[str, Any]]:
    path, _ = planted_model.write_planted_model(tmp_path_factory.mktemp("planted") / "m.gguf", 3)
    few = monitor.clean_prompts()[:45]
    with pytest.MonkeyPatch.context() as patch, ps.Model(path, n_ctx=1024) as model:
        patch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("personasteer.monitor.everyday.clean_prompts", lambda: few)
        vector = ps.derive(model, planted_model.planted_trait(), max_tokens=16)
        other = ps.PersonaVector(**{**vars(vector), "name": "other"})
        yield {"model": model, "vector": vector, "other": other}


def test_what_one_begins_with_has_an_example() -> None:
    first = {"Model", "PersonaVector", "Steering", "derive", "contrast", "Model.chat", "Model.capture", "Model.session"}
    assert first | TINY <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_true(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "attach" and not extra_buffers_work():
        pytest.skip("a stock Llama crashes on this build of llama.cpp")
    monkeypatch.chdir(tmp_path)
    known = request.getfixturevalue("tiny_one" if name in TINY else "bundled")
    test = EXAMPLES[name]
    test.globs = {"ps": ps, "monitor": monitor, "ship": ship, "llama_cpp": llama_cpp, **known}
    said: list[str] = []
    outcome = doctest.DocTestRunner().run(test, out=said.append)
    assert outcome.failed == 0, "".join(said)
