"""A sparse dictionary of block outputs: TopK autoencoders, trained here or read from a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Progress
from personasteer.errors import ArgumentError, VectorError
from personasteer.extras import need
from personasteer.memory import check_memory

OUTLIER = 3.0  # times the median norm: rows beyond it are dropped
DEAD_AFTER = 200  # steps without an activation
N_AUXILIARY = 64  # dead features that explain what is left
AUXILIARY = 1 / 32  # weight of that part of the loss
AT_ONCE = 4096  # rows that are encoded at once


@dataclass(frozen=True)
class DictionaryRecipe:
    """How a dictionary is trained: Adam, float32, rows in a random order.

    Args:
        expansion: features for each dimension of the stream, 4 to 16.
        k: features that may be active at a token.
        steps, batch, rate, seed: of training.
    """

    expansion: int = 8
    k: int = 32
    steps: int = 1500
    batch: int = 512
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("expansion", "k", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Dictionary:
    """f(h) = TopK(E (h - b) / s + c), ReLU before TopK, and h ~ b + s D^T f(h).

    Args:
        encoder: E, (n_features, n_embd); bias: c, (n_features,).
        decoder: D, (n_features, n_embd), rows of length 1.
        center: b, (n_embd,); scale: s, the root mean square of ||h - b|| / sqrt(n_embd).
        k: features that may be active; n_features where there is no such bound.
        unexplained: share of the variance that the reconstruction leaves, on rows that it was not trained on; NaN of an
            imported one.
        dead: share of the features that were active on no such row.
    """

    encoder: NDArray[np.float32]
    bias: NDArray[np.float32]
    decoder: NDArray[np.float32]
    center: NDArray[np.float32]
    scale: float
    k: int
    unexplained: float = float("nan")
    dead: float = float("nan")

    @property
    def n_features(self) -> int:
        """Rows of the decoder."""
        return len(self.decoder)

    def encode(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, n_features) activations of block outputs (n, n_embd)."""
        x = (rows - self.center) / self.scale
        f = np.maximum(x @ self.encoder.T + self.bias, 0.0).astype(np.float32)
        if self.k < self.n_features:
            least = np.partition(f, -self.k, axis=1)[:, -self.k, None]
            f[f < least] = 0.0
        return f

    def mean_activations(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n_features,) over rows."""
        total = np.zeros(self.n_features)
        for first in range(0, len(rows), AT_ONCE):
            total += self.encode(rows[first : first + AT_ONCE]).sum(axis=0, dtype=np.float64)
        return total / max(len(rows), 1)


def without_outliers(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows have a norm of at most three times the median: attention sinks are no content."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    finite = np.isfinite(lengths)
    kept: NDArray[np.bool_] = finite & (lengths <= OUTLIER * np.median(lengths[finite])) if finite.any() else finite
    return kept


def train_dictionary(
    rows: NDArray[np.float32],
    recipe: DictionaryRecipe | None = None,
    *,
    held_out: float = 0.1,
    threads: int | None = None,
    gpu: bool = True,
    progress: Progress | None = None,
) -> Dictionary:
    """A TopK autoencoder of block outputs (n, n_embd), outliers left out.

    The loss is ||x - x^||^2 / ||x||^2 with, weighted by 1/32, the same of what is left explained by features that have
    not been active for 200 steps.

    Raises:
        ArgumentError: torch is missing, or fewer rows than a batch.

    Source: arXiv 2406.04093 (TopK sparse autoencoders, the auxiliary loss); 2506.19823 (features of misalignment).
    """
    recipe = recipe or DictionaryRecipe()
    (torch,) = need("a sparse dictionary needs", "train", "torch")
    if threads:
        torch.set_num_threads(threads)
    rows = rows[without_outliers(rows)]
    n, n_embd = rows.shape
    if n < recipe.batch:
        raise ArgumentError(f"{n} tokens are too few for a dictionary: at least {recipe.batch} (a batch)")
    rng = np.random.default_rng(recipe.seed)
    order = rng.permutation(n)
    n_held = max(1, int(held_out * n))
    tested, trained = rows[np.sort(order[:n_held])], rows[np.sort(order[n_held:])]
    center = trained.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = float(np.sqrt(np.square(trained - center, dtype=np.float64).sum(axis=1).mean() / n_embd)) or 1.0
    device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
    x = torch.from_numpy((trained - center) / np.float32(scale)).to(device)
    generator = torch.Generator().manual_seed(recipe.seed)
    n_features, k = recipe.expansion * n_embd, min(recipe.k, recipe.expansion * n_embd)
    first = torch.randn(n_features, n_embd, generator=generator)
    first /= first.norm(dim=1, keepdim=True)
    decoder = first.clone().to(device).requires_grad_()
    encoder = first.clone().to(device).requires_grad_()
    bias = torch.zeros(n_features, device=device).requires_grad_()
    optimizer = torch.optim.Adam([decoder, encoder, bias], lr=recipe.rate)
    idle = torch.zeros(n_features, device=device)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:  # a warm-up, and down to nothing at the end
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 50, (recipe.steps - step) / (0.2 * recipe.steps))
        batch = x[torch.randint(len(x), (recipe.batch,), generator=generator).to(device)]
        before = torch.relu(batch @ encoder.T + bias)
        values, at = before.topk(k, dim=1)
        f = torch.zeros_like(before).scatter(1, at, values)
        left = batch - f @ decoder
        power = batch.pow(2).sum(1).mean()
        loss = left.pow(2).sum(1).mean() / power
        idle += 1
        idle[(f.detach() > 0).any(dim=0)] = 0
        dead = idle >= DEAD_AFTER
        if int(dead.sum()) >= N_AUXILIARY:
            loss = loss + AUXILIARY * _auxiliary(torch, batch, left.detach(), encoder, bias, decoder, dead)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)
        if progress:
            progress(step + 1, recipe.steps)
    arrays = [p.detach().cpu().numpy().astype(np.float32) for p in (encoder, bias, decoder)]
    found = Dictionary(arrays[0], arrays[1], arrays[2], center, scale, k)
    return _tested(found, tested)


def _auxiliary(torch: Any, batch: Any, left: Any, encoder: Any, bias: Any, decoder: Any, dead: Any) -> Any:
    at = dead.nonzero()[:, 0]
    before = torch.relu(batch @ encoder[at].T + bias[at])
    values, which = before.topk(min(N_AUXILIARY, len(at)), dim=1)
    f = torch.zeros_like(before).scatter(1, which, values)
    return (left - f @ decoder[at]).pow(2).sum(1).mean() / left.pow(2).sum(1).mean().clamp_min(1e-12)


def _tested(d: Dictionary, rows: NDArray[np.float32]) -> Dictionary:
    """With how well it reconstructs rows, and how many features it uses."""
    left, power, used = 0.0, 0.0, np.zeros(d.n_features, bool)
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        f = d.encode(some)
        x = (some - d.center) / d.scale
        left += float(np.square(x - f @ d.decoder, dtype=np.float64).sum())
        power += float(np.square(x, dtype=np.float64).sum())
        used |= (f > 0).any(axis=0)
    unexplained = left / power if power else float("nan")
    return Dictionary(d.encoder, d.bias, d.decoder, d.center, d.scale, d.k, unexplained, float(1 - used.mean()))


def imported_dictionary(decoder: NDArray[np.float32], rows: NDArray[np.float32]) -> Dictionary:
    """A decoder (n_features, n_embd) made elsewhere: f(h) = ReLU(D (h - mean of `rows`)), D with rows of length 1.

    Its own encoder is not taken: thresholds, biases and what is subtracted before differ from maker to maker.

    Raises VectorError for another width, or rows that are zero or not finite.
    """
    lengths = np.linalg.norm(decoder.astype(np.float64), axis=1)
    if decoder.ndim != 2 or decoder.shape[1] != rows.shape[1]:
        raise VectorError(f"the dictionary is {decoder.shape}, the model's stream {rows.shape[1]} wide")
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise VectorError("the dictionary has features that are zero or not finite")
    units = (decoder / lengths[:, None]).astype(np.float32)
    center = rows[without_outliers(rows)].mean(axis=0, dtype=np.float64).astype(np.float32)
    return Dictionary(units, np.zeros(len(units), np.float32), units, center, 1.0, len(units))


def check_dictionary_memory(n_features: int, n_embd: int, n_tokens: int, batch: int = 0) -> None:
    """Raise PersonasteerError where a dictionary would not fit: encoder and decoder, with gradients and two moments
    each where it is trained (in batches), activations of what is encoded at once, and the rows themselves, in float32.
    """
    parameters = (8 if batch else 2) * n_features * n_embd
    activations = 3 * n_features * max(batch, AT_ONCE)
    needed = 4 * (parameters + activations + 3 * n_tokens * n_embd)
    check_memory(needed, "a sparse dictionary", "take a smaller dictionary (--expansion)")
