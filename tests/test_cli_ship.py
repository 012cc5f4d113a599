"""The verbs that ship: export in every form, verify, bundle; what a user sees of them, and of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import planted_model
import pytest
import samples
import tiny_models

import personasteer as ps
from personasteer.cli import run
from personasteer.cli.export import KINDS, parse_shares
from personasteer.ship.fields import Field, read_fields
from personasteer.ship.rewrite import ModelFile, rewrite

Command = Callable[..., tuple[int, str, str]]
FAILED, USAGE = 1, 2


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        out = capfd.readouterr()
        return code, out.out, out.err

    return command


@pytest.fixture
def files(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """m.gguf, and v.gguf, a vector of a trait with continuations."""
    (tmp_path / "m.gguf").symlink_to(tiny_path)
    texts = planted_model.planted_trait().as_dict()
    with ps.Model(tiny_path, n_ctx=64) as model:
        provenance = {"texts": texts, "trait": "planted", **model.origin}
        samples.vector(seed=10, norms=model.norms, name="planted", provenance=provenance).save(tmp_path / "v.gguf")
    return tmp_path


EXPORTS = {
    "control-vector": ("v.gguf:0.3", "o.gguf", "--control-vector o.gguf"),
    "projection": ("v.gguf", "o.gguf", "give it to readers of GLP metadata only"),
    "lora": ("v.gguf", "o.gguf", "llama-server -m MODEL --lora o.gguf"),
    "bake": ("v.gguf:-0.3", "o.gguf", "llama-server -m o.gguf"),
    "ablate": ("v.gguf", "o.gguf", "taken out of 9 tensors"),
    "bundle": ("v.gguf:0.3", "o", "personasteer bundle chat o -p TEXT"),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_every_form_is_exported_and_verified(cli: Command, files: Path, kind: str) -> None:
    vector, out, said = EXPORTS[kind]
    code, text, err = cli("export", kind, vector, "-m", "m.gguf", "-o", out)
    assert code == 0, err
    assert said in text
    code, text, err = cli("verify", out, "-m", "m.gguf", "--texts", "2", "-t", "1")
    assert code == 0, text + err
    assert text.rstrip().endswith("ok")
    code, text, err = cli("verify", out, "-m", "m.gguf", "--texts", "2", "-t", "1", "--json")
    found = json.loads(text)
    assert (code, found["kind"], found["ok"]) == (0, kind, True)
    assert {"max_abs_dlogit", "kl_mean", "kl_p99", "effect_ratio"} <= found.keys()
    code, text, err = cli("export", kind, vector, "-m", "m.gguf", "-o", out)
    assert (code, text) == (USAGE, "")
    assert "--force" in err
    code, text, _ = cli("export", kind, vector, "-m", "m.gguf", "-o", out, "--force", "--json")
    exported = json.loads(text)
    assert (code, exported["kind"], exported["file"]) == (0, kind, out)
    assert set(KINDS) == set(EXPORTS)


def test_a_file_that_does_not_do_what_it_says_fails(cli: Command, files: Path) -> None:
    cli("export", "bake", "v.gguf:0.3", "-m", "m.gguf", "-o", "b.gguf")
    for t in gguf.GGUFReader("b.gguf", "r+").tensors:
        if t.name == "blk.1.ffn_down.bias":
            t.data[:] *= 0.5
            t.data.flush()
    code, text, err = cli("verify", "b.gguf", "-m", "m.gguf", "--texts", "2")
    assert (code, err) == (FAILED, "")
    assert "not ok: the first steered block's output is off" in text
    assert text.rstrip().endswith("failed")
    code, text, _ = cli("verify", "b.gguf", "-m", "m.gguf", "--texts", "2", "--json")
    assert (code, json.loads(text)["ok"]) == (FAILED, False)


def test_a_baked_model_that_says_nothing_is_compared_with_named_vectors(cli: Command, files: Path) -> None:
    cli("export", "bake", "v.gguf:0.3", "-m", "m.gguf", "-o", "b.gguf")
    keys = [key for key in read_fields("b.gguf") if key.startswith("personasteer.")]
    rewrite(ModelFile("b.gguf"), Path("c.gguf"), removed=keys)
    code, _, err = cli("verify", "c.gguf", "-m", "m.gguf")
    assert code == USAGE
    assert "--against FILE:STRENGTH" in err
    code, text, _ = cli("verify", "c.gguf", "-m", "m.gguf", "--against", "v.gguf:0.3", "--texts", "2", "--json")
    assert (code, json.loads(text)["effect_ratio"]) == (0, pytest.approx(1, abs=0.01))
    code, text, _ = cli("verify", "c.gguf", "-m", "m.gguf", "--against", "v.gguf:0.15", "--texts", "2", "--json")
    assert (code, json.loads(text)["ok"]) == (FAILED, False)


def test_a_projection_is_ablated_and_inspected_but_never_added(cli: Command, files: Path) -> None:
    cli("export", "projection", "v.gguf", "-m", "m.gguf", "-o", "p.gguf")
    options = ("-m", "m.gguf", "-p", "hello", "-n", "8", "--temp", "0")
    code, removed, err = cli("generate", *options, "--ablate", "p.gguf")
    assert code == 0, err
    by_vector = cli("generate", *options, "--ablate", "v.gguf")[1]
    vector = ps.PersonaVector.load("v.gguf")
    with ps.Model("m.gguf", n_ctx=64) as model:
        (wanted,) = model.logits(["hello"], steer=ps.Ablate(vector, layers=vector.layers))
        from personasteer.cli._common import load_steering

        (got,) = model.logits(["hello"], steer=load_steering(None, "all", 0, ablate=["p.gguf"]))
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    assert removed or by_vector is not None
    assert cli("inspect", "p.gguf")[0] == 0
    code, _, err = cli("generate", *options, "-v", "p.gguf:0.3")
    assert code == FAILED
    assert "load_projection" in err or "projection" in err


def test_a_bundle_takes_caps_and_a_scope_and_other_forms_take_none(cli: Command, files: Path) -> None:
    rows = samples.vector(seed=30).directions
    ps.PersonaVector(rows, (1,), "held", thresholds=np.full(4, 0.5), norms=np.ones(4)).save("held.gguf")
    options = ("-m", "m.gguf", "--cap", "held.gguf", "--ablate", "v.gguf:0.5", "--scope", "response")
    code, text, err = cli("export", "bundle", *options, "-o", "b.tar")
    assert code == 0, err
    assert "held + planted" in text
    with ps.load_bundle("b.tar", model="m.gguf", n_ctx=64) as bundle:
        edits = [(type(e).__name__, e.scope) for e in bundle.steering]
        assert edits == [("Cap", "response"), ("Ablate", "response")]
        assert bundle.chat("hi", max_tokens=4) is not None
    code, _, err = cli("export", "bundle", *options[:4], "--ablate", "held.gguf:0.5", "-o", "twice")
    assert code == FAILED
    assert "capped, floored, ablated or redirected twice at layer 1" in err
    code, text, err = cli("export", "lora", "v.gguf", *options, "-o", "l.gguf")
    assert (code, text) == (USAGE, "")
    assert "--cap is for bundle, not for lora" in err
    code, _, err = cli("export", "bake", "-m", "m.gguf", "-o", "b.gguf")
    assert code == USAGE
    assert "name at least one vector" in err


def test_shares_by_block_are_read_from_one_option(cli: Command, files: Path) -> None:
    assert parse_shares("0-2:0,3:0.5,-1:0") == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.5, -1: 0.0}
    assert parse_shares(None) is None
    for wrong in ("", "3", "a:1", "1-:1", "3-1:1", "2:x", "1:"):
        with pytest.raises(ps.ArgumentError, match="--layer-shares takes"):
            parse_shares(wrong)
    ablate = ("export", "ablate", "v.gguf", "-m", "m.gguf", "-o", "a.gguf", "--json", "--layer-shares")
    assert cli(*ablate, "-1-1:0")[0] == USAGE
    code, text, _ = cli(*ablate, "-1:0,0-1:0")
    assert {t["name"].split(".")[1] for t in json.loads(text)["tensors"]} == {"2", "3"}
    assert code == 0


def test_several_directions_leave_together_and_summed_vectors_are_baked(cli: Command, files: Path) -> None:
    vector = ps.PersonaVector.load("v.gguf")
    other = samples.vector(seed=20, norms=vector.norms)
    other.save("w.gguf")
    for kind in ("lora", "ablate"):
        code, text, err = cli("export", kind, "v.gguf", "w.gguf", "-m", "m.gguf", "-o", f"{kind}.gguf", "--layer", "2")
        assert code == 0, err
        assert "planted, vector" in text
        assert cli("verify", f"{kind}.gguf", "-m", "m.gguf", "--texts", "2")[0] == 0
    code, _, err = cli("export", "bake", "v.gguf:0.2", "w.gguf:-0.1", "-m", "m.gguf", "-o", "b.gguf")
    assert code == 0, err
    code, text, _ = cli("verify", "b.gguf", "-m", "m.gguf", "--against", "v.gguf:0.2", "--against", "w.gguf:-0.1",
                        "--texts", "2", "--json")  # fmt: skip
    assert (code, json.loads(text)["effect_ratio"]) == (0, pytest.approx(1, abs=0.01))


MISTAKES: dict[str, tuple[str, int, str]] = {
    "an unknown strategy": ("export bake v.gguf:0.3 -m m.gguf -o o.gguf --strategy best", USAGE, "auto, block-bias"),
    "a strategy that does not fit": (
        "export bake v.gguf:0.3 -m q.gguf -o o.gguf --strategy block-bias", FAILED, "export it as a control vector"),
    "an unknown mode": ("export projection v.gguf -m m.gguf -o o.gguf --mode turn", USAGE, "project, add"),
    "two projections": ("export projection v.gguf v.gguf -m m.gguf -o o.gguf", USAGE, "one vector"),
    "a share above 1": ("export lora v.gguf:1.5 -m m.gguf -o o.gguf", USAGE, "at most 1, not 1.5"),
    "a negative share": ("export ablate v.gguf:-1 -m m.gguf -o o.gguf", USAGE, "at most 1, not -1"),
    "a block that is not there": ("export lora v.gguf -m m.gguf -o o.gguf --layer 7", FAILED, "7 is out of range"),
    "an absurd strength": ("export bake v.gguf:1e39 -m m.gguf -o o.gguf", FAILED, "not finite"),
    "no base": ("export bake v.gguf:0.3 -m nothing.gguf -o o.gguf", FAILED, "no such file"),
    "a text as the base": ("export ablate v.gguf -m text.gguf -o o.gguf", FAILED, "not a GGUF"),
    "a truncated base": ("export bake v.gguf:0.3 -m cut.gguf -o o.gguf", FAILED, "cut.gguf"),
    "a part of a split base": ("export lora v.gguf -m part.gguf -o o.gguf", FAILED, "llama-gguf-split --merge"),
    "the base as the target": ("export ablate v.gguf -m m.gguf -o m.gguf --force", USAGE, "is what this is made"),
    "another architecture": ("export ablate v.gguf -m g.gguf -o o.gguf", FAILED, "'gemma2' normalises"),
    "a vector of another model": ("export bake wide.gguf:0.3 -m m.gguf -o o.gguf", FAILED, "width 128"),
    "a zero direction": ("export lora zero.gguf -m m.gguf -o o.gguf --layer 1", FAILED, "is zero at layer 1"),
    "an option of another form": ("export lora v.gguf -m m.gguf -o o.gguf --untie", USAGE, "--untie is for ablate"),
    "a block for a bake": ("export bake v.gguf:1 -m m.gguf -o o.gguf --layer 1", USAGE, "for lora and ablate"),
    "too many blocks": ("export ablate v.gguf -m m.gguf -o o.gguf --layer-shares 0-999999999:0", USAGE, "takes blocks"),
    "a lora of a vector of another model": ("export lora wide.gguf -m m.gguf -o o.gguf", FAILED, "width 128"),
    "a lora in place of its base": ("export lora v.gguf -m m.gguf -o m.gguf --force", USAGE, "is what this is made"),
    "a control vector in place of its base": (
        "export control-vector v.gguf:1 -m m.gguf -o m.gguf --force", USAGE, "is what this is made"),
    "an import in place of its base": ("import v.gguf -m m.gguf -o m.gguf --force", USAGE, "is what this is made"),
    "no folder": ("export lora v.gguf -m m.gguf -o no/o.gguf", USAGE, "cannot write here"),
    "an importance matrix that is none": (
        "export ablate v.gguf -m m.gguf -o o.gguf --imatrix v.gguf", USAGE, "importance matrix"),
    "nothing to verify": ("verify nothing.gguf -m m.gguf", FAILED, "no such file"),
    "a text to verify": ("verify text.gguf -m m.gguf", FAILED, "not a GGUF"),
    "a bundle that is none": ("verify folder -m m.gguf", FAILED, "folder"),
    "a base that is none": ("verify v.gguf -m text.gguf", FAILED, "not a GGUF"),
    "against a file that is none": ("verify v.gguf -m m.gguf --against text.gguf:0.3", FAILED, "not a GGUF"),
}  # fmt: skip


@pytest.mark.parametrize("how", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(cli: Command, files: Path, sliding: Any, how: str) -> None:
    tiny_models.write_qwen_model("q.gguf")
    Path("g.gguf").symlink_to(sliding.path)
    Path("text.gguf").write_text("not a model")
    Path("folder").mkdir()
    data = Path("m.gguf").read_bytes()
    Path("cut.gguf").write_bytes(data[:-9000])
    rewrite(ModelFile("m.gguf"), Path("part.gguf"), fields=[Field.of("split.count", 2)])
    samples.vector(n_embd=128, norms=np.ones(4)).save("wide.gguf")
    rows = np.ones((4, 64), np.float32)
    rows[1] = 0
    ps.PersonaVector(rows, (2,), norms=np.ones(4)).save("zero.gguf")
    before = sorted(p.name for p in Path().iterdir())
    line, code, said = MISTAKES[how]
    got = cli(*line.split())
    assert got[0] == code, got
    assert got[1] == ""
    lines = got[2].splitlines()
    assert len(lines) == 1, got[2]
    assert lines[0].startswith("personasteer: ")
    assert said in lines[0]
    assert sorted(p.name for p in Path().iterdir()) == before
    assert Path("m.gguf").read_bytes() == data


WRONG = gguf.GGUFValueType
HOSTILE = {  # what llama.cpp would end the process over, and what is of another type than it should be
    ("control-vector", "general.architecture"): Field.of("", np.array([1.0, 2.0], np.float32)),
    ("projection", "glp.mode"): Field.of("", np.array([1.0, 2.0], np.float32)),
    ("lora", "general.architecture"): Field.of("", 1.0),
    ("lora", "general.type"): Field.of("", ["adapter", "model"]),
    ("lora", "adapter.type"): Field.of("", True),
    ("lora", "adapter.lora.alpha"): Field.of("", "x"),
    ("lora", "personasteer.n_embd"): Field.of("", float("inf")),
    ("bake", "llama.block_count"): Field.of("", 0),
    ("bake", "llama.attention.layer_norm_rms_epsilon"): Field("", WRONG.FLOAT32, float("nan")),
    ("ablate", "llama.block_count"): Field.of("", 513),
    ("ablate", "llama.attention.layer_norm_rms_epsilon"): Field("", WRONG.FLOAT32, -1.0),
    ("ablate", "personasteer.n_embd"): Field.of("", float("inf")),
}


@pytest.mark.parametrize(("kind", "key"), HOSTILE)
def test_a_hostile_key_value_ends_in_a_line_of_its_own(cli: Command, files: Path, kind: str, key: str) -> None:
    vector, out, _ = EXPORTS[kind]
    assert cli("export", kind, vector, "-m", "m.gguf", "-o", out)[0] == 0
    rewrite(ModelFile(out), Path("h.gguf"), fields=[HOSTILE[kind, key]._replace(key=key)])
    code, _, err = cli("verify", "h.gguf", "-m", "m.gguf", "--texts", "1", "-t", "1")
    assert code in (FAILED, USAGE)
    assert "h.gguf" in err
    assert "not foreseen" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["lora", "bake", "ablate", "bundle"])
@pytest.mark.parametrize(
    ("field", "said"),
    [
        (Field.of("llama.block_count", 0), "block"),
        (Field("llama.attention.layer_norm_rms_epsilon", WRONG.FLOAT32, float("nan")), "epsilon"),
    ],
)
def test_a_hostile_base_model_ends_in_a_line_of_its_own(
    cli: Command, files: Path, kind: str, field: Field, said: str
) -> None:
    rewrite(ModelFile("m.gguf"), Path("h.gguf"), fields=[field])
    vector, out, _ = EXPORTS[kind]
    code, _, err = cli("export", kind, vector, "-m", "h.gguf", "-o", out)
    if code == 0:  # made without computing: then what loads it says so
        code, _, err = cli("verify", out, "-m", "h.gguf", "--texts", "1", "-t", "1")
    assert (code, said in err, err.count("\n")) == (FAILED, True, 1)
    assert "not foreseen" not in err
