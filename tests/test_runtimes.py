"""What other people's runtimes make of the exported files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import gguf
import llama_cpp
import pytest
import samples
from conftest import USE_EXTRA_BUFTS

import personasteer as ps
from personasteer.ship import (
    ablate_weights,
    bake,
    directions_to_remove,
    save_control_vector,
    save_lora,
    save_projection,
)

if TYPE_CHECKING:
    from conftest import Loaded

PROMPT = "The weather tomorrow will be"
FORMS = ("control-vector", "projection", "lora", "bake", "ablate")


def export(form: str, model: Path, vector: ps.PersonaVector, out: Path) -> Path:
    """The vector in a form; a strong one, so that its effect shows in a few words."""
    one = directions_to_remove([(vector, None)], layer=vector.layers[0])
    if form == "control-vector":
        save_control_vector(vector, out, strength=0.6)
    elif form == "projection":
        save_projection(vector, out, mode="add", strength=0.6)
    elif form == "lora":
        save_lora(model, out, one)
    elif form == "bake":
        bake(model, out, vector, strength=0.6)
    else:
        ablate_weights(model, out, one)
    return out


@pytest.fixture(scope="module")
def pessimistic(smollm2: Loaded) -> Iterator[ps.PersonaVector]:
    """A direction that SmolLM2 acts on, found in a second."""
    with ps.Model(smollm2.path, n_ctx=128, n_threads=2) as model:
        found = ps.contrast(
            model,
            positive=["Everything will go wrong, it always does.", "There is no hope that this ends well."],
            negative=["Everything will go right, it always does.", "There is every hope that this ends well."],
        )
        yield replace(found.at((14, 15, 16)), norms=model.norms)


def opened(path: Path, **more: Any) -> llama_cpp.Llama:
    if not USE_EXTRA_BUFTS:
        pytest.skip("this build of llama.cpp crashes in its AMX kernels when a plain Llama computes")
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False, seed=1, **more)


@pytest.mark.parametrize("form", ["lora", "bake", "ablate"])
def test_llama_cpp_python_chats_with_every_form_that_it_loads(
    smollm2: Loaded, pessimistic: ps.PersonaVector, tmp_path: Path, form: str
) -> None:
    path = export(form, smollm2.path, pessimistic, tmp_path / "o.gguf")
    llama = opened(smollm2.path, lora_path=str(path)) if form == "lora" else opened(path)
    plain = opened(smollm2.path)
    messages = [{"role": "user", "content": "How will my exam go?"}]
    answers = [
        x.create_chat_completion(messages, max_tokens=24, temperature=0.0)["choices"][0]["message"]["content"]
        for x in (llama, plain)
    ]
    assert all(a.strip() for a in answers), answers
    assert answers[0] != answers[1]


@pytest.mark.parametrize("form", FORMS)
def test_gguf_dump_shows_what_the_file_is(tiny_path: Path, tmp_path: Path, form: str) -> None:
    with ps.Model(tiny_path, n_ctx=64) as model:
        vector = samples.vector(seed=10, norms=model.norms, name="cheerful")
    path = export(form, tiny_path, vector, tmp_path / "o.gguf")
    command = [sys.executable, "-c", "from gguf.scripts.gguf_dump import main; main()", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    values = {key: field.get("value") for key, field in found["metadata"].items()}
    expected: dict[str, dict[str, Any]] = {
        "control-vector": {"general.architecture": "controlvector", "personasteer.name": "cheerful"},
        "projection": {"general.architecture": "controlvector", "glp.mode": "add", "glp.spec_version": 1},
        "lora": {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"},
        "bake": {"general.architecture": "llama", "personasteer.kind": "bake", "llama.block_count": 4},
        "ablate": {"general.architecture": "llama", "personasteer.kind": "ablate", "llama.block_count": 4},
    }
    assert {key: values.get(key) for key in expected[form]} == expected[form]
    assert "path" not in " ".join(values)
    assert str(tmp_path) not in done.stdout.replace(str(path), "")
    names = set(found["tensors"])
    if form in ("control-vector", "projection"):
        assert names == {"direction.1", "direction.2"}
    elif form == "lora":
        assert len(names) == 18
    else:
        added = {"blk.1.ffn_down.bias", "blk.2.ffn_down.bias"} if form == "bake" else set()
        assert names == {t.name for t in gguf.GGUFReader(tiny_path).tensors} | added


def test_repengs_reader_finds_the_directions(tiny_path: Path, tmp_path: Path) -> None:
    """As repeng 0.4's ControlVector.import_gguf reads: the last part of two texts, and tensors by their number."""
    with ps.Model(tiny_path, n_ctx=64) as model:
        vector = samples.vector(seed=10, norms=model.norms, provenance={"architecture": "llama"})
    reader = gguf.GGUFReader(export("control-vector", tiny_path, vector, tmp_path / "o.gguf"))
    texts = [
        bytes(reader.get_field(key).parts[-1]).decode() for key in ("general.architecture", "controlvector.model_hint")
    ]
    assert texts == ["controlvector", "llama"]
    assert {int(t.name.split(".")[1]): t.data.shape for t in reader.tensors} == {1: (64,), 2: (64,)}


def test_no_time_and_no_path_stand_in_any_file(tiny_path: Path, tmp_path: Path) -> None:
    with ps.Model(tiny_path, n_ctx=64) as model:
        vector = samples.vector(seed=10, norms=model.norms)
    for form in FORMS:
        for folder in ("one", "another folder"):
            (tmp_path / folder).mkdir(exist_ok=True)
            export(form, tiny_path, vector, tmp_path / folder / f"{form}.gguf")
        one, other = ((tmp_path / f / f"{form}.gguf").read_bytes() for f in ("one", "another folder"))
        assert one == other, form


# -- llama.cpp's own programs -----------------------------------------------------------------------------------------


def program(name: str) -> str:
    folder = os.environ.get("PERSONASTEER_LLAMA_CPP_BIN")
    if not folder:
        pytest.skip("PERSONASTEER_LLAMA_CPP_BIN does not name a folder with llama.cpp's programs")
    found = Path(folder) / name
    if not found.is_file():
        pytest.skip(f"{found} does not exist")
    return str(found)


def completion(*arguments: str) -> str:
    """What llama-completion writes after the prompt, greedily."""
    command = [program("llama-completion"), "-no-cnv", "-n", "24", "--temp", "0", "-p", PROMPT, "--no-display-prompt",
               *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """The address of a llama-server on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program("llama-server"), "--host", "127.0.0.1", "--port", str(port), "-c", "256", "-np", "1", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert process.poll() is None, f"llama-server ended with {process.returncode}"
                try:
                    urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:  # not listening yet, or still loading
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def posted(url: str, content: dict[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def served(*arguments: str) -> tuple[str, str]:
    """What llama-server writes after the prompt, and its answer in a chat, greedily."""
    how = {"temperature": 0, "n_predict": 24, "max_tokens": 24, "cache_prompt": False}
    with serving(*arguments) as address:
        text = posted(f"{address}/completion", {"prompt": PROMPT, **how})["content"]
        messages = [{"role": "user", "content": "How will my exam go?"}]
        chat = posted(f"{address}/v1/chat/completions", {"messages": messages, **how})
    return text, chat["choices"][0]["message"]["content"]


@pytest.mark.llama_cpp_programs
def test_llama_cpps_own_program_runs_every_form(smollm2: Loaded, pessimistic: ps.PersonaVector, tmp_path: Path) -> None:
    base = ("-m", str(smollm2.path))
    plain = completion(*base)
    made = {form: export(form, smollm2.path, pessimistic, tmp_path / f"{form}.gguf") for form in FORMS}
    texts = {
        "control-vector": completion(*base, "--control-vector", str(made["control-vector"])),
        "projection": completion(*base, "--control-vector", str(made["projection"])),
        "lora": completion(*base, "--lora", str(made["lora"])),
        "bake": completion("-m", str(made["bake"])),
        "ablate": completion("-m", str(made["ablate"])),
    }
    for form, text in texts.items():
        assert len(text.split()) > 5, form
        assert text != plain, form
    assert texts["control-vector"] == texts["projection"]
    words = [texts[form].split()[:6] for form in ("control-vector", "bake")]
    assert words[0] == words[1]  # later words may turn where two are equally likely
    half = completion(*base, "--control-vector-scaled", f"{made['control-vector']}:0.5")
    assert half not in (plain, texts["control-vector"])


@pytest.mark.llama_cpp_programs
def test_llama_server_runs_every_form(smollm2: Loaded, pessimistic: ps.PersonaVector, tmp_path: Path) -> None:
    base = ("-m", str(smollm2.path))
    made = {form: str(export(form, smollm2.path, pessimistic, tmp_path / f"{form}.gguf")) for form in FORMS}
    options = {
        "control-vector": (*base, "--control-vector", made["control-vector"]),
        "projection": (*base, "--control-vector", made["projection"]),
        "lora": (*base, "--lora", made["lora"]),
        "bake": ("-m", made["bake"]),
        "ablate": ("-m", made["ablate"]),
    }
    plain = served(*base)
    answers = {form: served(*arguments) for form, arguments in options.items()}
    for form, (text, chat) in answers.items():
        assert len(text.split()) > 5, form
        assert chat.strip(), form
        assert (text, chat) != plain, form
    words = [answers[form][0].split()[:6] for form in ("control-vector", "projection", "bake")]
    assert words[0] == words[1] == words[2]


@pytest.mark.llama_cpp_programs
@pytest.mark.larger_model
def test_a_baked_qwen_runs_in_llama_cpps_own_programs(qwen_path: Path, tmp_path: Path) -> None:
    with ps.Model(qwen_path, n_ctx=256, n_parallel=1, repack=False) as model:
        found = ps.contrast(
            model,
            positive=["Everything will go wrong, it always does.", "There is no hope that this ends well."],
            negative=["Everything will go right, it always does.", "There is every hope that this ends well."],
        )
        vector = replace(found.at((14, 15, 16)), norms=model.norms)
        save_control_vector(vector, tmp_path / "v.gguf", strength=0.5)
    texts = {"control-vector": completion("-m", str(qwen_path), "--control-vector", str(tmp_path / "v.gguf"))}
    for strategy in ("as-llama", "value-bias"):
        out = tmp_path / f"{strategy}.gguf"
        assert bake(qwen_path, out, vector, strength=0.5, strategy=strategy).strategy == strategy
        texts[strategy] = completion("-m", str(out))
        assert served("-m", str(out))[0].split()[:6] == texts[strategy].split()[:6]
    plain = completion("-m", str(qwen_path))
    assert all(len(text.split()) > 5 and text != plain for text in texts.values()), texts
    assert texts["as-llama"].split()[:6] == texts["control-vector"].split()[:6]
