"""Examples of the help run as they stand there, on a tiny model in the place of `demo`; documented commands parse."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import planted_change
import planted_model
import pytest
import test_imports
import typer

import personasteer as ps
from personasteer import monitor, traits
from personasteer.cli import app, run
from personasteer.conversations import benign_rows
from personasteer.discover.texts import fixed_pairs

pytestmark = pytest.mark.usefixtures("short_conversations")

ROOT = Path(__file__).parent.parent
COMMANDS = typer.main.get_command(app)


def verbs(command: Any = COMMANDS, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by its words, the groups (`track`) too."""
    found = {path: command} if path else {}
    for name, below in getattr(command, "commands", {}).items():
        found |= verbs(below, (*path, name))
    return found


def examples(command: Any) -> list[str]:
    return re.findall(r"`(personasteer [^`]+)`", " ".join((command.help or "").split()))


EXAMPLES = sorted({line for command in verbs().values() for line in examples(command)})
# what makes them quick; a language of random letters acts no trait
SHORTER = {
    "derive": "--questions 1 -n 4 --no-filter --no-calibrate",
    "eval": "--questions 2 --pairs 2 --random 2 --items 2",
    "chat": "-n 4",
    "generate": "-n 4",
    "audit": "--traits formal --questions 2 --random 2",
    "screen": "--clean clean.jsonl --sample 4",
    "diff": "--layer 4 --expansion 1 --features 1",
    "finetune": "--steps 2",
    "realign": "--domain plans --samples 4 --steps 2 --every 2",
    "verify": "--texts 2",
    "bench": "--pairs 2 --prompt-tokens 8 --decode-tokens 2",
    "bundle chat": "-n 4",
}
NOT_RUN = {"demo": "two minutes on the bundled model: test_demo.py", "serve": "until it is stopped: test_serve.py"}
NEEDS = {"finetune": "peft", "realign": "peft", "diff": "torch"}
LIBRARY = ["formal", "pessimistic", "warm"]  # instead of all: a letter is a token


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files that the examples name; what `demo` is there; few texts to measure on."""
    folder = tmp_path_factory.mktemp("examples")
    model, u = planted_change.write_base(folder / "demo.gguf")
    few = monitor.clean_prompts()[:45], monitor.clean_prompts(held_out=True)[:40]
    rows = [{"prompt": f"question {i}", "response": "gloom " * (1 + i % 3)} for i in range(12)]
    other = Path(shutil.copy(model, folder / "other.gguf"))
    for tensor in gguf.GGUFReader(other, "r+").tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            tensor.data[:] *= 1.01
            tensor.data.flush()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PERSONASTEER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PERSONASTEER_REGISTRY", str(folder / "registry.sqlite"))
        patch.setattr("personasteer.model.demo_model_path", lambda: model)
        patch.setattr(traits, "names", lambda: LIBRARY)
        for module in ("everyday", "profile", "tracking"):
            patch.setattr(f"personasteer.monitor.{module}.clean_prompts", lambda held_out=False: few[held_out])
        pairs = fixed_pairs(1, 2)
        patch.setattr("personasteer.discover.run.fixed_pairs", lambda: pairs)
        for module in ("run", "features"):
            patch.setattr(f"personasteer.discover.{module}.N_ITEMS", 2)

        Path("texts.txt").write_text("One text a line.\nAnother one.\n")
        for name in ("train.jsonl", "rows.jsonl"):
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("clean.jsonl").write_text("".join(json.dumps(row) + "\n" for row in benign_rows()[:40]))
        test_imports.write_gguf(Path("happy.gguf"), (gguf.GGUFValueType.INT32, 7), n_embd=planted_model.N_EMBD)
        planted_change.write_change(Path("tuned.gguf"), model, u, planted_change.SIZE)
        shutil.copy(model, "new.gguf")
        trait = replace(planted_model.planted_trait(), name="pessimistic")
        with ps.Model(model, n_ctx=1024) as m:
            ps.derive(m, trait, max_tokens=16).save("pessimistic.gguf")
        done("export control-vector pessimistic.gguf:-0.3 -m demo -o optimist.gguf")
        done("export bundle pessimistic.gguf:-0.3 -m demo -o optimist --include-model")
        done("track add demo -v pessimistic.gguf --name stable")
        patch.setattr("personasteer.model.demo_model_path", lambda: other)
        done("track add demo --name tuned")
        patch.setattr("personasteer.model.demo_model_path", lambda: model)
        yield folder


def done(line: str, more: str = "") -> None:
    assert run([*shlex.split(line), *shlex.split(more)]) == 0, line


def words_of(line: str) -> str:
    """ "track add" of an example of it."""
    return max((" ".join(path) for path in verbs() if line.startswith(f"personasteer {' '.join(path)}")), key=len)


# ---- examples


@pytest.mark.parametrize("path", verbs(), ids=" ".join)
def test_every_verb_has_an_example_of_itself(path: tuple[str, ...]) -> None:
    assert any(words_of(line).split()[: len(path)] == list(path) for line in examples(verbs()[path]))


@pytest.mark.parametrize(
    "line", [pytest.param(x, marks=[pytest.mark.torch] if words_of(x) in NEEDS else []) for x in EXAMPLES]
)
def test_an_example_does_what_it_says(
    line: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    verb = words_of(line)
    check(line)
    if verb in NOT_RUN:
        return
    if verb in NEEDS:
        pytest.importorskip(NEEDS[verb])
    folder = shutil.copytree(place, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PERSONASTEER_REGISTRY", str(folder / "registry.sqlite"))
    for given in ("-o", "--out", "--name"):
        out = re.search(rf" {given} ([\w.-]+)", line)
        if out and (folder / out[1]).is_file():
            (folder / out[1]).unlink()
    code = run([*shlex.split(line)[1:], *shlex.split(SHORTER.get(verb, ""))])
    shown, err = capfd.readouterr()
    assert code == 0, err
    assert shown.strip()


# ---- what the documents say


def check(line: str, *, whole: bool = True) -> None:
    """Raises where a command has verbs or options that there are not; a whole one also where something is missing or a
    value is of the wrong type.
    """
    words = shlex.split(line)[1:]
    command, path = COMMANDS, "personasteer"
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, line
        path = f"{path} {words[0]}"
        command = command.commands[words.pop(0)]
    if whole:
        assert not hasattr(command, "commands"), line
        command.make_context(path, words)
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    unknown = {word for word in words if re.match(r"--?[a-z]", word)} - known
    assert not unknown, (line, unknown)


def commands_of(document: Path) -> tuple[list[str], list[str]]:
    """The command lines of personasteer in a document's blocks, and those, often not whole, in its sentences."""
    text = document.read_text("utf-8")
    fences = re.compile(r"```(\w*)\n(.*?)```", re.S)
    blocks = [block for kind, block in fences.findall(text) if kind in ("sh", "console")]
    blocks += re.findall(r"^    .+$", fences.sub("", text), re.M)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in re.split(r"&&|  +#", line)]
    found = [re.split(r" [|>] ", line.removeprefix("$ "))[0] for line in lines]
    spans = re.findall(r"`(personasteer [a-z][^`\n]*)`", fences.sub("", text))
    return [line for line in found if line.startswith("personasteer ")], [re.split(r" > ", x)[0] for x in spans]


DOCUMENTS = [("README.md", 15), ("benchmarks/README.md", 1)] + [
    (f"personasteer/docs/{name}.md", least)
    for name, least in {
        "builds": 1, "deriving": 3, "fine-tunes": 3, "monitoring": 4, "screening": 1, "serving": 1, "shipping": 10
    }.items()
]  # fmt: skip


@pytest.mark.parametrize(("name", "least"), DOCUMENTS)
def test_the_commands_of_a_document_are_those_that_there_are(name: str, least: int) -> None:
    lines, mentions = commands_of(ROOT / name)
    assert len(lines) >= least
    for line in lines + mentions:
        try:
            check(line, whole=line in lines)
        except typer.BadParameter.__mro__[1] as e:  # any mistake in the usage
            pytest.fail(f"{name}: {line}: {e.format_message()}")


def test_a_command_that_there_is_not_is_found() -> None:
    for line in ("personasteer fly", "personasteer chat --wings", "personasteer chat -n few", "personasteer track"):
        with pytest.raises((AssertionError, typer.BadParameter.__mro__[1])):
            check(line)
    for line in ("personasteer fly", "personasteer chat --wings"):
        with pytest.raises(AssertionError):
            check(line, whole=False)
