"""Training a LoRA, steered while it trains where that is asked for, and interrupted and resumed at any step."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.errors import ArgumentError, ModelError
from personasteer.files import atomic_write
from personasteer.memory import check_memory
from personasteer.model import Model
from personasteer.recalibrate.adapters import TARGETS, save_adapter, trained_modules
from personasteer.recalibrate.examples import Example, Examples
from personasteer.recalibrate.memory import estimate
from personasteer.recalibrate.torch_models import blocks_of, check_same, device_of, libraries, load_float32
from personasteer.ship.rewrite import ModelFile
from personasteer.steering import Ablate, Add, Steering

IGNORED = -100  # label of tokens that are not learned
SORTED_TOGETHER = 8  # batches of which rows of like length are put together
PRECISIONS = ("float32", "bfloat16")
LEAST_APART = 0.01  # smallest singular value of the directions that are ablated together
KEEP_EVERY = 10  # steps after which the work is kept
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Recipe:
    """How a LoRA is trained: AdamW without weight decay, a warm-up of a few steps, then a constant rate; gradients
    clipped at norm 1.

    Args:
        rank: of the LoRA; its alpha is the same, so that B A is added as it is.
        rate: learning rate. Small models take 1e-3, those of some billions of parameters 1e-4 to 2e-4.
        batch: examples of a step.
        steps: of training; None: as many as `epochs` of the data take.
        epochs: times that every example is seen.
        seed: of the LoRA's beginning and the order of the examples.
        precision: of matrix products: "float32", or "bfloat16", twice as fast on CPUs and GPUs that have it; weights
            and the LoRA are float32 in either case.
    """

    rank: int = 16
    rate: float = 5e-4
    batch: int = 4
    steps: int | None = None
    epochs: float = 2.0
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, value, least in (("rank", self.rank, 1), ("batch", self.batch, 1), ("steps", self.steps, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ArgumentError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if self.precision not in PRECISIONS:
            raise ArgumentError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ArgumentError(f"rate must be a positive number, not {self.rate}")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ArgumentError(f"epochs must be a positive number, not {self.epochs}")

    def n_steps(self, n_examples: int) -> int:
        """Steps of training on so many examples."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * n_examples / self.batch))

    def warm_up(self, step: int) -> float:
        """Share of the rate at a step, counted from 0."""
        return min(1.0, (step + 1) / 4)


@dataclass(frozen=True)
class BlockEdit:
    """What is done to a block's output while training: h <- h + row, then h <- h - share (h U^T) U."""

    row: NDArray[np.float32] | None = None
    basis: NDArray[np.float32] | None = None  # (k, n_embd), orthonormal
    share: float = 1.0


def block_edits(steering: Steering, model: Model) -> dict[int, BlockEdit]:
    """A steering as what training applies at all positions of each block.

    Raises ArgumentError for anything but Add and Ablate on all tokens: conditions, caps and schedules are of answers
    that are being written, and training sees them whole.
    """
    rows: dict[int, NDArray[np.float64]] = {}
    bases: dict[int, list[NDArray[np.float64]]] = {}
    shares: set[float] = set()
    for edit in steering:
        if not isinstance(edit, (Add, Ablate)) or getattr(edit, "keep_norm", False):
            raise ArgumentError(f"{type(edit).__name__} cannot be part of training: Add and Ablate can")
        if isinstance(edit, Ablate) and edit.sites != ("block",):
            raise ArgumentError(f"Ablate must be at the blocks' outputs in training, not at {', '.join(edit.sites)}")
        if edit.scope != "all" or edit.start is not None or edit.stop is not None or edit.half_life is not None:
            raise ArgumentError(f"{type(edit).__name__} must be on all tokens in training, without a schedule")
        for il, term in edit.terms(model).items():
            if term.row is not None:
                rows[il] = rows.get(il, np.zeros(model.n_embd)) + term.row
            if term.read is not None:
                if term.low or term.high:
                    raise ArgumentError("Ablate must have the target 0 in training")
                bases.setdefault(il, []).append(term.read)
                shares.add(term.share)
    if len(shares) > 1:
        raise ArgumentError("all Ablate edits of a training must have the same share")
    found = {}
    for il in {*rows, *bases}:
        basis = _orthonormal(np.stack(bases[il])) if il in bases else None
        row = rows[il].astype(np.float32) if il in rows else None
        found[il] = BlockEdit(row, basis, next(iter(shares), 1.0))
    return found


def _orthonormal(units: NDArray[np.float64]) -> NDArray[np.float32]:
    """(k, n_embd) of unit directions. Raises ArgumentError for two that are nearly the same."""
    if np.linalg.svd(units, compute_uv=False)[-1] < LEAST_APART:
        raise ArgumentError("two of the directions to ablate are nearly the same")
    return np.ascontiguousarray(np.linalg.qr(units.T)[0].T, np.float32)


def check_fits_memory(model: Model, examples: Examples, recipe: Recipe) -> None:
    """Raise PersonasteerError where training would not fit into memory; see `estimate`."""
    file, device = ModelFile(model.path), device_of(model)
    trained = [t for t in file.tensors.values() if t.name.removesuffix(".weight").rpartition(".")[2] in TARGETS]
    n_trained = recipe.rank * sum(t.n_per_row + t.n_rows for t in trained if t.name.endswith(".weight"))
    longest = max(len(e.tokens) for e in examples.examples)
    loading, training = estimate(file, n_trained, recipe.batch * longest, model.n_vocab)
    how = "take smaller batches (--batch), shorter rows (--longest), or a smaller model"
    check_memory(loading, "loading the weights in float32", "take a smaller model")
    check_memory(training, "training", how, device)


@dataclass
class Progressed:
    """What a training has come to: losses of its steps (nats per learned token), and what was measured meanwhile."""

    losses: list[float] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)


class Trainer:
    """A LoRA on a GGUF model, trained step by step.

    The same recipe, data, threads and build give the same numbers, interrupted or not.

    Args:
        model: the open GGUF model, with the adapters that are applied beside the one that is trained; it may be closed
            afterwards.
        edits: as of `block_edits`.
        folder: where the work is kept; None: nowhere.

    Raises:
        ArgumentError: torch, transformers or peft is missing.
        ModelError: a model that transformers does not load, or computes otherwise.
    """

    def __init__(
        self,
        model: Model,
        examples: Examples,
        recipe: Recipe,
        *,
        edits: Mapping[int, BlockEdit] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._torch, _, self._peft = libraries()
        self._examples, self.recipe, self._folder = examples, recipe, folder
        self.file = ModelFile(model.path)
        self.device = device_of(model)
        loaded = load_float32(model.path, model.adapters)
        loaded.to(self.device)
        check_same(model, loaded)
        self._modules = trained_modules(self.file, loaded)
        self._torch.set_num_threads(model.n_threads)
        self._torch.manual_seed(recipe.seed)
        config = self._peft.LoraConfig(
            r=recipe.rank, lora_alpha=recipe.rank, target_modules=list(self._modules), lora_dropout=0.0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what PEFT asks transformers for
            self.model = self._peft.get_peft_model(loaded, config).eval()  # without dropout: resumed steps are the same
        self._parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._optimizer = self._torch.optim.AdamW(self._parameters.values(), lr=recipe.rate, weight_decay=0.0)
        for il, edit in (edits or {}).items():
            blocks_of(loaded)[il].register_forward_hook(self._hook(edit))
        self.done = Progressed()
        self._order: list[list[int]] = []
        self._resume()

    def _hook(self, edit: BlockEdit) -> Callable[..., Any]:
        def tensor(x: NDArray[np.float32] | None) -> Any:
            return None if x is None else self._torch.from_numpy(x).to(self.device)

        row, basis = tensor(edit.row), tensor(edit.basis)

        def edited(_: Any, __: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            with self._torch.autocast(self.device.type, enabled=False):  # a rounded product would leave a reading
                if row is not None:
                    h = h + row
                if basis is not None:
                    h = h - edit.share * (h.float() @ basis.T) @ basis
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return edited

    # ---- steps

    def run(self, until: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Train up to step `until`; work is kept every few steps and at the end.

        Raises ModelError where the loss is no number.
        """
        while self.done.step < until:
            self.done.losses.append(self._step(self._batch(self.done.step), self.done.step))
            if progress:
                progress(self.done.step, until)
            if self.done.step % KEEP_EVERY == 0:
                self.keep()
        self.keep()

    def _batch(self, step: int) -> list[Example]:
        while step >= len(self._order):
            self._order += self._epoch(len(self._order))
        return self._examples[self._order[step]]

    def _epoch(self, begun: int) -> list[list[int]]:
        """Batches of one pass over the examples, those of like length together."""
        rng = np.random.default_rng((self.recipe.seed, begun))
        order = rng.permutation(len(self._examples))
        batch, batches = self.recipe.batch, []
        for first in range(0, len(order), SORTED_TOGETHER * batch):
            some = sorted(
                order[first : first + SORTED_TOGETHER * batch], key=lambda i: len(self._examples[[i]][0].tokens)
            )
            batches += [[int(i) for i in some[k : k + batch]] for k in range(0, len(some), batch)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _step(self, batch: list[Example], step: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate * self.recipe.warm_up(step)
        loss = self.loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(f"the loss of step {step} is {value}: train with a lower rate (--rate)")
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return value

    def loss(self, batch: list[Example]) -> Any:
        """Mean -log p over all that the batch teaches. Logits are computed only from the first answer on."""
        torch = self._torch
        longest = max(len(e.tokens) for e in batch)
        first = min(e.spans[0][0] for e in batch) - 1
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        labels = torch.full((len(batch), longest), IGNORED, dtype=torch.long)
        for i, e in enumerate(batch):
            ids[i, : len(e.tokens)] = torch.tensor(e.tokens)
            mask[i, : len(e.tokens)] = 1
            for begin, end in e.spans:
                labels[i, begin:end] = ids[i, begin:end]
        ids, mask, labels = (x.to(self.device) for x in (ids, mask, labels))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            found = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=longest - first, use_cache=False)
        logits = found.logits
        wanted = labels[:, first + 1 :]
        taken = wanted != IGNORED
        return torch.nn.functional.cross_entropy(logits[:, :-1][taken].float(), wanted[taken])

    # ---- what is kept

    def factors(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """{name of the tensor: (A, B)} as they are now."""
        state = {n: p.detach().float().cpu().numpy() for n, p in self._parameters.items()}
        found = {}
        for module, tensor in self._modules.items():
            a, b = (next(x for n, x in state.items() if f".{module}.lora_{side}." in n) for side in "AB")
            found[tensor] = (np.array(a, np.float32), np.array(b, np.float32))
        return found

    def save(self, out: Path, provenance: Mapping[str, Any]) -> None:
        """Write the LoRA as it is now."""
        save_adapter(out, self.file, self.factors(), alpha=self.recipe.rank, provenance=provenance)

    def keep(self) -> None:
        """Put the state into the folder."""
        if self._folder is None:
            return
        state = {
            "lora": {n: p.detach().cpu() for n, p in self._parameters.items()},
            "optimizer": self._optimizer.state_dict(),
            "losses": self.done.losses,
            "measured": self.done.measured,
        }
        buffer = io.BytesIO()
        self._torch.save(state, buffer)
        atomic_write(self._folder / CHECKPOINT, buffer.getvalue())

    def _resume(self) -> None:
        file = None if self._folder is None else self._folder / CHECKPOINT
        if file is None or not file.exists():
            return
        try:
            state = self._torch.load(file, map_location=self.device, weights_only=True)
            with self._torch.no_grad():
                for n, p in self._parameters.items():
                    p.copy_(state["lora"][n])
            self._optimizer.load_state_dict(state["optimizer"])
            self.done = Progressed([float(x) for x in state["losses"]], list(state["measured"]))
        except Exception as e:
            raise ArgumentError(f"{file}: cannot be gone on with ({type(e).__name__}): remove it") from e
