"""What a shell completes, asked as bash, zsh and fish ask, and that help and completion need no model's libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from personasteer import traits
from personasteer.cli import _completion, run
from personasteer.conversations import benign_domains
from personasteer.derive.directions import METHODS
from personasteer.model import POOLS, SPANS
from personasteer.screen.results import MODES
from personasteer.ship.bake import STRATEGIES
from personasteer.ship.glp import MODES as GLP_MODES
from personasteer.ship.verify import KINDS
from personasteer.steering import SCOPES

HEAVY = ("llama_cpp", "numpy", "matplotlib", "torch", "pydantic", "gguf")


PATH = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
Ask = Callable[..., list[str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """What a shell is offered for the last of some words."""

    def asked(words: str, shell: str = "bash", **env: str) -> list[str]:
        known = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_TYPER_COMPLETE_ARGS": words}
        for name, value in {**known, **env, "_PERSONASTEER_COMPLETE": f"complete_{shell}"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as e:
            run([])
        assert not e.value.code
        return capsys.readouterr().out.split()

    return asked


def python(*arguments: str) -> str:
    command = [sys.executable, "-P", *arguments]
    env = {**os.environ, **PATH, "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=True).stdout


def test_the_package_runs_as_a_program_of_its_name() -> None:
    assert "Usage: personasteer [OPTIONS] COMMAND" in python("-m", "personasteer", "--help")


@pytest.mark.parametrize("imported", ["personasteer", "personasteer.cli"])
def test_help_and_completion_load_no_model_libraries(imported: str) -> None:
    code = f"import sys, {imported}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert python("-c", code) == "[]\n"


def test_functions_named_like_their_module_stay_functions() -> None:
    code = (
        "import personasteer.derive.contrast, personasteer.screen.run, personasteer.attach as a, personasteer as ps; "
        "print(callable(ps.derive), callable(ps.screen), callable(ps.attach), callable(a), ps.derive is ps.derive); "
        "from personasteer import monitor, _core; print(monitor.__name__, hasattr(ps, 'nothing'), len(dir(ps)) > 40)"
    )
    assert python("-c", code) == "True True True True True\npersonasteer.monitor False True\n"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("personasteer de", {"demo", "derive"}),
        ("personasteer derive pess", {"pessimistic"}),
        ("personasteer traits sy", {"sycophantic"}),
        ("personasteer derive x --meth", {"--method"}),
        ("personasteer derive x --method p", {"pca", "probe"}),
        ("personasteer chat -m de", {"demo"}),
        ("personasteer chat -m /etc/ho", set()),
        ("personasteer track ", {"add", "list", "compare", "check"}),
        ("personasteer export ab", {"ablate"}),
    ],
)
def test_verbs_options_and_names_are_completed_and_files_left_alone(ask: Ask, words: str, offered: set[str]) -> None:
    assert set(ask(words)) == offered


def test_demo_is_not_offered_where_a_file_begins_like_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _completion.complete_model("de") == ["demo"]
    assert _completion.complete_model("") == []
    (tmp_path / "deepseek.gguf").touch()
    assert _completion.complete_model("de") == []


def test_zsh_and_fish_are_answered(ask: Ask) -> None:
    assert "pessimistic" in " ".join(ask("personasteer derive pess", "zsh"))
    assert ask("personasteer derive pess", "fish", _TYPER_COMPLETE_FISH_ACTION="get-args") == ["pessimistic"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_installs_completion_and_completes_by_it(tmp_path: Path) -> None:
    shim = tmp_path / "personasteer"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m personasteer "$@"\n')
    shim.chmod(0o755)
    script = f"""
    PATH="{tmp_path}:$PATH"
    personasteer --install-completion > said
    . "$HOME/.bashrc"
    complete -p personasteer
    COMP_WORDS=(personasteer derive pess) COMP_CWORD=2
    _personasteer_completion personasteer
    echo "offered: ${{COMPREPLY[*]}}"
    """
    env = {**os.environ, **PATH, "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60)
    assert "complete -o default -F _personasteer_completion personasteer" in done.stdout, done.stderr
    assert done.stdout.endswith("offered: pessimistic\n")
    assert "bash completion installed" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("chat --scope ", SCOPES),
        ("derive x --method ", METHODS),
        ("capture --pool ", POOLS),
        ("capture --span ", SPANS),
        ("screen x --mode ", MODES),
        ("export ", KINDS),
        ("export bake --strategy ", ("auto", *STRATEGIES)),
        ("export projection --mode ", GLP_MODES),
        ("realign --domain ", benign_domains()),
        ("derive ", traits.names()),
        ("demo --trait ", traits.names()),
    ],
)
def test_what_is_offered_is_what_the_library_takes(ask: Ask, words: str, known: tuple[str, ...]) -> None:
    assert set(ask("personasteer " + words)) == set(known)
