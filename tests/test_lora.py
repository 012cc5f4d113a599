"""LoRA adapters beside the steering, against plain llama.cpp with the same adapters and control vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import oracle
import pytest
import samples

import personasteer as ps

if TYPE_CHECKING:
    from conftest import Loaded

TEXT = "The harbour was quiet in the morning, said the older man."
ROWS = {"n_layer": 4, "n_embd": 64}
CHANGED = ("blk.1.attn_q.weight", "blk.2.ffn_down.weight")


def write_lora(
    path: Path, *, seed: int = 0, alpha: Any = 8.0, kind: Any = "adapter", architecture: str = "llama",
    method: Any = "lora", change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Path:  # fmt: skip
    """An adapter of rank 4 for two matrices of the tiny model; change: what is to be wrong with its tensors."""
    w = gguf.GGUFWriter(str(path), architecture)
    for key, value in (("general.type", kind), ("adapter.type", method), ("adapter.lora.alpha", alpha)):
        if isinstance(value, str):
            w.add_string(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        elif value is not None:
            w.add_uint32(key, value)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, n_in, n_out in zip(CHANGED, (64, 128), (64, 64), strict=True):
        tensors[f"{name}.lora_a"] = rng.standard_normal((4, n_in)).astype(np.float32) / 8
        tensors[f"{name}.lora_b"] = rng.standard_normal((n_out, 4)).astype(np.float32) / 8
    if change:
        change(tensors)
    for name, data in tensors.items():
        w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("lora")
    return [write_lora(folder / f"{seed}.gguf", seed=seed) for seed in range(2)]


def opened(path: Path, *lora: Any) -> ps.Model:
    return ps.Model(path, n_ctx=256, n_parallel=1, n_threads=2, lora=lora)


@pytest.mark.parametrize("scales", [(1.0, None), (-0.5, None), (None, 2.0), (0.7, 1.3)])
def test_steering_beside_adapters_is_bit_identical_to_llama_cpp_with_the_same_adapters_and_control_vector(
    tiny: Loaded, adapters: list[Path], scales: tuple[float | None, ...]
) -> None:
    chosen = [(file, scale) for file, scale in zip(adapters, scales, strict=True) if scale is not None]
    vector = samples.vector(layers=(1, 2, 3), **ROWS)
    with opened(tiny.path, *chosen) as model:
        tokens = model.tokenize(TEXT)
        (unsteered,), (steered,) = (
            model.logits([TEXT], steer=steer) for steer in (None, ps.Add(vector, 0.5, raw=True))
        )
    plain = oracle.PlainContext(tiny.plain, n_ctx=256, n_parallel=1, n_batch=512, n_threads=2, n_outputs=64)
    plain.set_lora(chosen)
    (expected,), _ = plain.compute([tokens], [(0, len(tokens))])
    assert np.array_equal(unsteered, expected)
    plain.reset()
    plain.set_cvec(0.5 * vector.directions, 1, 3)
    (expected,), _ = plain.compute([tokens], [(0, len(tokens))])
    assert np.array_equal(steered, expected)
    with opened(tiny.path) as bare:
        (without,) = bare.logits([TEXT], steer=ps.Add(vector, 0.5, raw=True))
    assert np.abs(without - steered).max() > 1e-2


def test_generation_capture_and_sessions_run_with_the_adapter(tiny: Loaded, adapters: list[Path]) -> None:
    vector = samples.vector(**ROWS)
    with opened(tiny.path) as bare, opened(tiny.path, (adapters[0], 3.0)) as model:
        captured = [m.capture([TEXT], span="all") for m in (bare, model)]
        assert np.array_equal(captured[0][:, 0], captured[1][:, 0])  # the adapter begins at block 1
        assert np.abs(captured[0][:, 1:3] - captured[1][:, 1:3]).max() > 1e-2
        texts = [m.generate(TEXT, max_tokens=20, temperature=0, steer=vector * 0.2) for m in (bare, model)]
        assert texts[0] != texts[1]
        with model.session() as session:
            stream = session.submit(prompt=TEXT, max_tokens=20, temperature=0, steer=vector * 0.2)
            assert stream.result().text == texts[1]
        assert not np.array_equal(bare.norms, model.norms)


def test_an_adapter_at_scale_0_changes_no_bit(tiny: Loaded, adapters: list[Path]) -> None:
    with opened(tiny.path) as bare, opened(tiny.path, (adapters[0], 0.0)) as model:
        assert np.array_equal(bare.logits([TEXT])[0], model.logits([TEXT])[0])


def test_the_fingerprint_tells_adapters_scales_and_their_order_apart(
    tiny: Loaded, adapters: list[Path], tmp_path: Path
) -> None:
    a, b = adapters
    identities = []
    for lora in ([], [a], [b], [(a, 0.5)], [a, b], [b, a], [(a, 1.0), (b, 0.5)]):
        with opened(tiny.path, *lora) as model:
            identities.append(dict(model.identity))
    assert len({i["fingerprint"] for i in identities}) == len(identities)
    assert "adapters" not in identities[0]
    assert all(i["weights"] == identities[0]["weights"] for i in identities)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(a.read_bytes())
    with opened(tiny.path, str(copy)) as model:  # another path, the same adapter, the same default scale
        assert dict(model.identity) == identities[1]


def test_a_vector_of_the_bare_model_is_used_with_a_warning_that_names_the_adapters(
    tiny: Loaded, adapters: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tiny.path) as bare, opened(tiny.path, adapters[0]) as model:
        vector = samples.vector(provenance={"method": "difference", **bare.origin}, **ROWS)
        with caplog.at_level("WARNING", "personasteer"):
            bare.logits([TEXT], steer=vector * 0.1)
            assert caplog.text == ""
            model.logits([TEXT], steer=vector * 0.1)
        assert "other LoRA adapters" in caplog.text


def rename(before: str, after: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if before in n]:
            tensors[name.replace(before, after)] = tensors.pop(name)

    return change


def narrow(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{CHANGED[0]}.lora_a"] = tensors[f"{CHANGED[0]}.lora_a"][:, :32].copy()


def whole_numbers(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{CHANGED[0]}.lora_b"] = np.ones((64, 4), np.int32)


def uneven(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{CHANGED[0]}.lora_a"] = tensors[f"{CHANGED[0]}.lora_a"][:3].copy()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a model file by its type": ({"kind": "model"}, "general.type"),
    "no type": ({"kind": None}, "general.type"),
    "another architecture": ({"architecture": "qwen2"}, "arch"),
    "another method": ({"method": "ia3"}, "adapter.type"),
    "a block that the model lacks": ({"change": rename("blk.1", "blk.9")}, "blk.9"),
    "one half of a pair": ({"change": lambda t: t.pop(f"{CHANGED[0]}.lora_b")}, "missing one component"),
    "a tensor that is no half": ({"change": rename("lora_a", "lora_c")}, "suffix"),
    "another width": ({"change": narrow}, "incorrect shape"),
    "halves of different rank": ({"change": uneven}, "not transposed"),
    "a tensor of whole numbers": ({"change": whole_numbers}, "lora_b is of type i32"),
    "an alpha of another type": ({"alpha": 8}, "adapter.lora.alpha"),
    "an alpha in words": ({"alpha": "eight"}, "adapter.lora.alpha"),
    "a method that is a number": ({"method": 1}, "adapter.type"),
    "a type that is a number": ({"kind": 1}, "general.type"),
}


@pytest.mark.parametrize("bad", BAD)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tiny: Loaded, tmp_path: Path, bad: str) -> None:
    options, message = BAD[bad]
    file = write_lora(tmp_path / "bad.gguf", **options)
    with pytest.raises(ps.ModelError, match=message) as caught:
        opened(tiny.path, file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 100, 600, -400, -1])
def test_a_truncated_adapter_is_refused_in_one_line(
    tiny: Loaded, adapters: list[Path], tmp_path: Path, size: int
) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(adapters[0].read_bytes()[:size])
    with pytest.raises(ps.ModelError) as caught:
        opened(tiny.path, file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter_is_refused(tiny: Loaded, tmp_path: Path) -> None:
    text, vector = tmp_path / "text.gguf", tmp_path / "vector.gguf"
    text.write_text("no model, no adapter")
    samples.vector(**ROWS).save(vector)
    for file in (tiny.path, text, vector, tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(ps.ModelError) as caught:
            opened(tiny.path, file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(tiny: Loaded, adapters: list[Path], scale: float) -> None:
    with pytest.raises(ps.ArgumentError, match="finite"):
        opened(tiny.path, (adapters[0], scale))


def test_adapters_are_a_list(tiny: Loaded, adapters: list[Path]) -> None:
    for lora in (adapters[0], str(adapters[0])):
        with pytest.raises(ps.ArgumentError, match="list"):
            ps.Model(tiny.path, lora=lora)  # type: ignore[arg-type]
