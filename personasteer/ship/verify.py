"""Proof of a shipped file: what stock llama.cpp computes with it, beside the steered engine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer.engine import Request
from personasteer.errors import ArgumentError, ModelError, VectorError
from personasteer.evaluate.evaluation import trait_behind
from personasteer.evaluate.log_odds import Cell, make_cells
from personasteer.identity import check_model_file
from personasteer.model import Model, output_rows
from personasteer.ship.ablate import products
from personasteer.ship.as_llama import TO, as_llama, reordered, turned, why_not_llama
from personasteer.ship.bake import BLOCK, FAR, LEAST, LLAMA, MOST, VALUE
from personasteer.ship.control_vector import adding, load_control_vector, scaled_directions
from personasteer.ship.directions import in_all_blocks
from personasteer.ship.fields import read_fields, text_of, vector_of_fields
from personasteer.ship.plain import PlainModel
from personasteer.ship.rewrite import ModelFile, Progress, Tensor
from personasteer.ship.writers import Writer, has_tied_output, residual_writers
from personasteer.statistics import divergence, log_softmax, slope
from personasteer.steering import SITES, Ablate, Add, Steering
from personasteer.traits import neutral_pairs
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer")

KINDS = ("control-vector", "projection", "lora", "bake", "ablate", "bundle")
NOISE = 2.0**-20  # relative change of a strength that shows what rounding alone does to the logits
EXACT = 1e-4  # of a logit
EXACT_AT_BLOCK = 2e-6  # of the norm of a block's output
REORDERED = 1e-2  # ... where sums of products before it are made in another order, on quantized weights
ROUNDING = 3.0  # times the noise: equal but for rounding
SAME_DISTRIBUTION = 0.05  # of the divergence that the steering itself makes
FINE = 0.03  # rounding of a type of 8 bits
REMOVED, COARSE = 0.01, 0.25  # of what a tensor wrote may be left: from 8 bits on, below
JUDGED = 80  # comparisons for an effect that is judged
TINY = np.finfo(float).tiny

Against: TypeAlias = Sequence[tuple[PersonaVector, float | None]]


@dataclass
class Verification:
    """What was found. Divergences are in nats per token, over the answers of everyday texts.

    max_abs_dlogit: largest difference of a logit between the shipped file and the engine, over all texts. kl_mean,
    kl_p99: KL(engine || shipped). effect_ratio: change of the trait's log-odds (`effect` "log-odds") or, where no trait
    is known, the slope of the changes of the logits ("logits"), shipped over engine; effect_interval: 95 %, over
    comparisons resampled, None where the engine's own effect may be none; effect_slope: sum(m w) / sum(w^2) of the
    changes w by the engine and m by the file, of all comparisons: steadier where some of them hardly change. noise:
    max_abs_dlogit between the engine and itself with a strength changed by one part in a million. effect_engine,
    effect_shipped: the two changes of the log-odds. kl_base_engine, kl_base_shipped: how far everyday text moves from
    the unsteered model, by the engine and by the file. n_texts: compared on; model: the base's name; details: what only
    this kind has. None: not measured for this kind. ok: the file does what it says, or reasons why not.
    """

    kind: str
    file: str
    model: str
    max_abs_dlogit: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    effect_ratio: float | None = None
    ok: bool = False
    reasons: list[str] = field(default_factory=list)  # why it is not ok
    effect: str = ""
    effect_interval: tuple[float, float] | None = None
    effect_slope: float | None = None
    effect_engine: float | None = None
    effect_shipped: float | None = None
    kl_base_engine: float | None = None
    kl_base_shipped: float | None = None
    noise: float | None = None
    n_texts: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What `verify --json` prints."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Text:
    tokens: list[int]
    n_prompt: int
    everyday: bool


SteeringOf: TypeAlias = Callable[[list[int]], Steering]


def kind_of(path: str | os.PathLike[str]) -> str:
    """What a file is: one of KINDS, or "model" where it does not say."""
    p = Path(path)
    if p.is_dir() or p.suffix == ".tar":
        return "bundle"
    fields = read_fields(check_model_file(p))
    if text_of(fields, "general.architecture") == "controlvector":
        return "projection" if any(k.startswith(("glp.", "dspark.")) for k in fields) else "control-vector"
    if text_of(fields, "general.type") == "adapter":
        return "lora"
    return text_of(fields, "personasteer.kind", "model")


def verify(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    against: Against | None = None,
    n_texts: int = 8,
    n_cells: int | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Load a shipped file in stock llama.cpp, without the hook, and compare it with the steered engine on `base`.

    Both decode the same texts in the same shapes on the CPU: answers to everyday questions, and, where the vector's
    trait is known, held-out questions with the trait's continuations. Exact forms are to agree up to what rounding
    does by itself (`noise`), which is measured beside them.

    Args:
        against: (vector, strength) pairs for the engine; what the file carries when None.
        n_texts, n_cells: everyday texts, and comparisons of continuations; 8 of these when None, 80 for an
            approximation, which is judged by its effect.

    Raises:
        ModelError: a file that stock llama.cpp does not load. VectorError: nothing to compare with.

    Example:
        >>> baked = ship.bake(model.path, "baked.gguf", vector, strength=0.3)
        >>> ship.verify("baked.gguf", model.path, n_texts=2).ok
        True
    """
    kind = kind_of(path)
    if kind == "bundle":
        from personasteer.ship.verify_bundle import verify_bundle

        return verify_bundle(path, base, against=against, n_texts=n_texts, n_threads=n_threads, progress=progress)
    if kind == "model":
        if against is None:
            raise ArgumentError(f"{path}: a model that does not say how it was made; name vectors to compare with "
                                "(--against FILE:STRENGTH)")  # fmt: skip
        kind = "bake"
    if kind not in KINDS:
        raise ArgumentError(f"{path}: made as {kind!r}, which this version does not know")
    if against is not None and kind not in ("control-vector", "bake"):
        raise ArgumentError(f"{path}: --against compares additions; a {kind} says itself what it removes")
    with Model(base, n_ctx=512, n_parallel=1, n_threads=n_threads, n_gpu_layers=0, repack=False) as model:
        return _Verifier(model, Path(path), kind, against, n_texts, n_cells, progress).run()


class _Verifier:
    def __init__(
        self,
        model: Model,
        path: Path,
        kind: str,
        against: Against | None,
        n_texts: int,
        n_cells: int | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.path, self.kind, self.progress = model, path, kind, progress
        self.fields = read_fields(path)
        self.against = against
        self.out = Verification(kind, path.name, model.name)
        approximate = text_of(self.fields, "personasteer.strategy") == VALUE
        self.n_texts, self.n_cells = n_texts, n_cells or (JUDGED if approximate else 8)

    def run(self) -> Verification:
        run: Callable[[], None] = getattr(self, "_" + self.kind.replace("-", "_"))
        run()
        self.out.ok = not self.out.reasons
        return self.out

    # -- the kinds --------------------------------------------------------------------------------------------------

    def _control_vector(self) -> None:
        vector = load_control_vector(self.path)
        rows = _tensors_of(self.path, self.model)
        steering, trait = self._additions(vector)
        self._compare(lambda _: steering, trait, lambda: self._plain(control_vector=rows))
        if self.out.max_abs_dlogit != 0:
            self._fail(f"logits differ by up to {self.out.max_abs_dlogit:.3g} from the engine's: exact is 0")

    def _projection(self) -> None:
        from personasteer.ship.projection import load_projection

        found = load_projection(self.path)
        if found.mode == "add" and "personasteer.directions" in self.fields:
            return self._control_vector()
        steering = found.steering()
        noisy = Steering(replace(e, share=e.share * (1 - NOISE)) for e in steering if isinstance(e, Ablate))
        if found.mode == "add":
            rows = _tensors_of(self.path, self.model)
            self._compare(lambda _: steering, found.vector, lambda: self._plain(control_vector=rows))
            return self._must_be_same()
        edits: dict[int, list[tuple[float, NDArray[np.float64]]]] = {}
        for vector, factor in zip(found.basis, found.dir_scales, strict=True):
            for il in vector.layers:
                unit = vector.direction(il) / np.linalg.norm(vector.direction(il).astype(np.float64))
                edits.setdefault(il, []).append((found.alpha[il] * factor, unit))
        self._compare(lambda _: steering, found.vector, lambda: self._plain(projections=edits), noisy=lambda _: noisy)
        self._must_be_same()
        return None

    def _lora(self) -> None:
        basis, share, vector = self._removed()
        file = ModelFile(self.model.path)
        edited = {n.removesuffix(".lora_a") for n in ModelFile(self.path).tensors if n.endswith(".lora_a")}
        wanted = {w.tensor.name: w for w in residual_writers(file)}
        left = sorted(wanted.keys() - edited)
        self.out.details |= {"left_out": left, "tied_output": has_tied_output(file), "share": share}
        self.out.details["largest_error"] = self._adapter_error(file, basis, share)
        if share < 1 or any(wanted[n].kind == "bias" for n in left):
            why = "a share" if share < 1 else "biases that are left"
            self.out.details["not_compared"] = f"the engine has no edit that leaves {why} of what each matrix writes"
            self._compare(None, vector, lambda: self._plain(lora=self.path))
            return
        tables = [wanted[n].tensor for n in left if wanted[n].kind == "table"]
        steer = self._removal(basis, file, tables)
        self._compare(steer(1.0), vector, lambda: self._plain(lora=self.path), noisy=steer(1 - NOISE))
        self._must_be_same()

    def _ablate(self) -> None:
        basis, share, vector = self._removed()
        file, shipped = ModelFile(self.model.path), ModelFile(self.path)
        factors = self._share_factors()
        writers = residual_writers(file)
        changed, added = changed_tensors(file, shipped)
        largest: dict[str, float] = {}
        expected = set()
        for writer in writers:
            name, kind = writer.tensor.name, writer.tensor.type
            wanted = share * factors.get(writer.block, 1.0)
            if not wanted:
                continue
            expected.add(name)
            left, off = _edit_error(file, shipped, writer, basis, wanted)
            largest[kind] = max(largest.get(kind, 0.0), left)
            limit = _rounding_of(writer.tensor)
            most = REMOVED if limit <= FINE else COARSE
            if not left <= most:
                self._fail(f"{name} ({kind}) still writes {left:.1%} of what it wrote along the directions")
            elif not off <= limit:
                self._fail(
                    f"{name} ({kind}) is off by {off:.2g} of its norm from what it should be; its type rounds by "
                    f"{limit:.2g} at most"
                )
        tied = has_tied_output(file) and has_tied_output(shipped)
        self.out.details |= {
            "share": share,
            "largest_reading": largest,
            "changed": len(changed),
            "added": added,
            "tied_output": tied,
        }
        others = sorted(set(changed) - expected) + sorted(set(added) - {"output.weight"})
        if others:
            self._fail(f"other tensors differ from the base: {', '.join(others[:3])}")
        self._must_describe_the_same(file.fields, shipped)
        if share < 1 or factors:
            self.out.details["not_compared"] = "the engine has no edit that leaves a share of what each matrix writes"
            self._compare(None, vector, lambda: self._plain(shipped=True))
            return
        steer = self._removal(basis, file, [])
        self._compare(steer(1.0), vector, lambda: self._plain(shipped=True), noisy=steer(1 - NOISE))
        if not tied and all(_rounding_of(w.tensor) <= EXACT for w in writers):
            self._must_be_same()

    def _share_factors(self) -> dict[int, float]:
        blocks = np.asarray(self.fields.get("personasteer.share_blocks", []), np.int64).ravel()
        factors = np.asarray(self.fields.get("personasteer.share_factors", []), np.float64).ravel()
        if len(blocks) != len(factors) or not np.isfinite(factors).all():
            raise VectorError(f"{self.path.name}: its shares by block do not fit together")
        return dict(zip(blocks.tolist(), factors.tolist(), strict=True))

    def _must_describe_the_same(self, expected: Mapping[str, Any], shipped: ModelFile) -> None:
        """The tokenizer, template and hyperparameters of the base, and nothing else but our own key-values."""
        names = {k for k in (*expected, *shipped.fields) if not k.startswith("personasteer.")}
        other = [k for k in sorted(names) if not _same_value(expected.get(k), shipped.fields.get(k))]
        if other:
            self._fail(f"key-values differ from the base: {', '.join(other[:3])}")

    def _bake(self) -> None:
        file, shipped = ModelFile(self.model.path), ModelFile(self.path)
        vector: PersonaVector | None = None
        if "personasteer.directions" in self.fields:
            vector, rho = vector_of_fields(self.path, self.fields)
            vector = replace(vector, strength=rho)
        elif self.against is None:
            raise VectorError(f"{self.path.name}: carries no vector to compare with (--against FILE:STRENGTH)")
        changed, added = changed_tensors(file, shipped)
        expected = file.fields
        strategy = BLOCK
        if shipped.architecture != file.architecture:
            strategy = LLAMA
            expected = self._as_llama(file, shipped)
            changed = sorted(set(changed) - set(turned(file)))
        elif (changed or added) and all(name.endswith(".attn_v.bias") for name in (*changed, *added)):
            strategy = VALUE
        self.out.details |= {"strategy": strategy, "changed": changed, "added": added}
        self._must_describe_the_same(expected, shipped)
        others = [name for name in (*changed, *added) if not name.endswith(".bias")]
        if others:
            self._fail(f"other tensors than biases differ from the base: {', '.join(others[:3])}")
        steering, trait = self._additions(vector)
        noisy = Steering(e * (1 + NOISE) for e in steering)
        self._compare(lambda _: steering, trait, lambda: self._plain(shipped=True), noisy=lambda _: noisy)
        if strategy == VALUE:
            return self._must_act_alike()
        self.out.details["error_at_block"] = error = self._error_at_block(steering)
        limit = EXACT_AT_BLOCK if strategy == BLOCK else REORDERED
        if error > limit:
            self._fail(f"the first steered block's output is off by {error:.2g} of its norm, more than {limit:.0e}")
        return self._must_be_same()

    def _as_llama(self, file: ModelFile, shipped: ModelFile) -> dict[str, Any]:
        """The key-values that the file should have as a llama; its queries and keys are to be the base's, reordered."""
        why_not = why_not_llama(file) if shipped.architecture == TO else f"it is a {shipped.architecture}"
        if why_not:
            raise ModelError(f"{self.path.name}: of another architecture than {file.path.name} ({why_not})")
        for name in turned(file):
            if name in shipped.tensors and shipped.raw(shipped.tensors[name]) != reordered(file, file.tensors[name]):
                self._fail(f"{name} is not the base's with its rows in the order of a llama")
        fields, removed, _ = as_llama(file)
        kept = {key: value for key, value in file.fields.items() if key not in removed}
        return kept | {f.key: f.value for f in fields}

    # -- what the engine does -----------------------------------------------------------------------------------------

    def _additions(self, vector: PersonaVector | None) -> tuple[Steering, PersonaVector | None]:
        """What the engine adds: `against`, or the very rows that the file was made of."""
        if self.against is not None:
            return Steering(Add(v, v.strength if s is None else s) for v, s in self.against), self.against[0][0]
        assert vector is not None
        if vector.norms is None:
            return Steering([Add(vector, 1.0, raw=True)]), vector
        rho = float(self.fields.get("personasteer.exported_strength", vector.strength))
        rows = {il: row for il, row in scaled_directions(vector, rho).items() if il >= 1 or self.kind == "bake"}
        return adding(rows, vector.n_layer, vector.name, vector.provenance), vector

    def _removed(self) -> tuple[NDArray[np.float64], float, PersonaVector | None]:
        """(basis, share, a vector that knows its trait) of an ablation."""
        try:
            width = int(self.fields["personasteer.n_embd"])
            basis = np.asarray(self.fields["personasteer.removed"], np.float64).reshape(-1, width)
            share = float(self.fields["personasteer.share"])
            provenance = json.loads(self.fields["personasteer.provenance"])
            name = str(self.fields["personasteer.names"][0])
        except (KeyError, ValueError, TypeError, IndexError, OverflowError, RecursionError) as e:
            raise VectorError(f"{self.path.name}: does not say which directions it removes ({e})") from e
        if width != self.model.n_embd or not np.isfinite(basis).all():
            raise VectorError(f"{self.path.name}: its directions of width {width} do not fit a model of width "
                              f"{self.model.n_embd}, or are not finite")  # fmt: skip
        if not len(basis) or np.abs(basis @ basis.T - np.eye(len(basis))).max() > 1e-3 or not 0 < share <= 1:
            raise VectorError(f"{self.path.name}: its directions are not orthonormal, or its share is not one")
        first = provenance[0] if isinstance(provenance, list) and provenance else {}
        vector = in_all_blocks(basis[0], self.model.n_layer, name)
        return basis, share, replace(vector, provenance=first if isinstance(first, Mapping) else {})

    def _removal(
        self, basis: NDArray[np.float64], file: ModelFile, tables: Sequence[Tensor]
    ) -> Callable[[float], SteeringOf]:
        """The engine's own ablation, at all sites; what `tables` (embeddings that were left alone) write stays."""
        vectors = [in_all_blocks(v, self.model.n_layer, f"removed {k}") for k, v in enumerate(basis)]
        scale = float(file.fields.get(f"{file.architecture}.embedding_scale") or 1.0)

        def at(share: float) -> SteeringOf:
            def steering(tokens: list[int]) -> Steering:
                if not tables:
                    return Steering(Ablate(v, sites=SITES, share=share) for v in vectors)
                edits = Steering()
                for t, token in enumerate(tokens):
                    row = sum(file.rows(table, token, 1)[0] for table in tables) * scale
                    for v in vectors:
                        to = np.full(self.model.n_layer, float(row @ v.directions[0]))
                        edits.append(Ablate(v, to=to, scope=(t,), sites=("mid", "block"), share=share))
                return edits

            return steering

        return at

    # -- comparing ----------------------------------------------------------------------------------------------------

    def _plain(self, *, shipped: bool = False, **how: Any) -> PlainModel:
        path = self.path if shipped else self.model.path
        n_ctx, n_threads = self.model.n_ctx, self.model.n_threads
        rows = output_rows(self.model.n_vocab, 1)
        return PlainModel(path, n_ctx=n_ctx, n_threads=n_threads, n_outputs=rows, **how)

    def _texts(self, vector: PersonaVector | None) -> tuple[list[_Text], int]:
        """Everyday texts, then two for each comparison of continuations; the number of these comparisons."""
        texts = [_Text(*self.model.pair_tokens(q, a), True) for q, a in neutral_pairs()[: self.n_texts]]
        trait = trait_behind(vector) if vector is not None else None
        cells: tuple[Cell, ...] = ()
        if trait is not None and trait.evaluate_questions and trait.continuations:
            questions = trait.evaluate_questions[: self.n_cells]
            cells = make_cells(questions, trait.evaluation_pairs, -(-self.n_cells // len(questions)))[: self.n_cells]
        for cell in cells:
            texts += [_Text(*self.model.pair_tokens(cell.question, t), False) for t in (cell.trait, cell.anti)]
        longest = max(len(t.tokens) for t in texts)
        if longest > self.model.n_ctx:
            raise ModelError(f"a text of {longest} tokens does not fit {self.model.n_ctx}")
        return texts, len(cells)

    def _engine(self, text: _Text, steering: Steering) -> NDArray[np.float32]:
        first, n = text.n_prompt - 1, len(text.tokens)
        request = Request(text.tokens, None, steering, outputs=(first, n), keep_logits=True)
        logits: NDArray[np.float32] = self.model.run_requests([request])[0]["logits"]
        return logits

    def _compare(
        self,
        steer: SteeringOf | None,
        vector: PersonaVector | None,
        open_shipped: Callable[[], PlainModel],
        *,
        noisy: SteeringOf | None = None,
    ) -> None:
        """Fill in the figures; `steer` None: there is nothing to compare with but the base."""
        texts, n_cells = self._texts(vector)
        self.out.n_texts = len(texts)
        most = noise = dot = square = 0.0
        kls: dict[str, list[NDArray[np.float64]]] = {"engine": [], "base_engine": [], "base_shipped": []}
        scores = np.zeros((3, len(texts)))
        with self._plain() as base, open_shipped() as shipped:
            if (shipped.n_vocab, shipped.n_embd) != (self.model.n_vocab, self.model.n_embd):
                raise ModelError(
                    f"{self.path.name} is not made of {self.model.path.name}: it is {shipped.n_embd} wide with "
                    f"{shipped.n_vocab} tokens, not {self.model.n_embd} with {self.model.n_vocab}"
                )
            for i, text in enumerate(texts):
                first = text.n_prompt - 1
                given = base.logits(text.tokens, first)
                made = shipped.logits(text.tokens, first)
                wanted = self._engine(text, steer(text.tokens)) if steer else given
                p, q, r = (log_softmax(x) for x in (given, wanted, made))
                for k, rows in enumerate((p, q, r)):
                    scores[k, i] = _mean_log_p(rows, text.tokens[text.n_prompt :])
                for logits, whose in ((made, self.path.name), (wanted, f"{self.model.path.name}, steered")):
                    if not np.isfinite(logits).all():
                        raise ModelError(f"{whose}: computes logits that are not finite")
                most = max(most, float(np.abs(made - wanted).max()))
                if text.everyday:
                    kls["base_shipped"].append(divergence(p, r))
                    if steer:
                        kls["engine"].append(divergence(q, r))
                        kls["base_engine"].append(divergence(p, q))
                        change = (wanted - given).astype(np.float64)
                        dot += float(np.vdot(change, made - given))
                        square += float(np.vdot(change, change))
                    if steer and noisy:
                        noise = max(noise, float(np.abs(self._engine(text, noisy(text.tokens)) - wanted).max()))
                if self.progress:
                    self.progress(i + 1, len(texts))
        self._figures(steer is not None, most, noise if noisy else None, kls, scores, n_cells, dot, square)

    def _figures(
        self,
        compared: bool,
        most: float,
        noise: float | None,
        kls: Mapping[str, list[NDArray[np.float64]]],
        scores: NDArray[np.float64],
        n_cells: int,
        dot: float,
        square: float,
    ) -> None:
        out = self.out
        out.kl_base_shipped = float(np.concatenate(kls["base_shipped"]).mean())
        if n_cells:
            both = scores[:, len(scores[0]) - 2 * n_cells :]
            odds = both[:, ::2] - both[:, 1::2]
            wanted, made = odds[1] - odds[0], odds[2] - odds[0]
            out.effect_shipped = float(made.mean())
            out.effect_engine = float(wanted.mean()) if compared else None
        if not compared:
            return
        out.max_abs_dlogit, out.noise = most, noise
        both = np.concatenate(kls["engine"])
        out.kl_mean, out.kl_p99 = float(both.mean()), float(np.quantile(both, 0.99))
        out.kl_base_engine = float(np.concatenate(kls["base_engine"]).mean())
        if out.effect_engine:
            out.effect, out.effect_ratio = "log-odds", (out.effect_shipped or 0.0) / out.effect_engine
            out.effect_interval = _ratio_interval(made, wanted)
            out.effect_slope = slope(made, wanted)
        elif square > 0:
            out.effect, out.effect_ratio = "logits", dot / square

    def _error_at_block(self, steering: Steering) -> float:
        """Largest difference at the output of the first steered block, in units of the block's norm."""
        il = min(il for e in steering for il in e.terms(self.model))
        text = neutral_pairs()[0][1]
        with Model(self.path, n_ctx=512, n_parallel=1, n_threads=self.model.n_threads, n_gpu_layers=0,
                   repack=False) as shipped:  # fmt: skip
            how: dict[str, Any] = {"pool": "raw", "layers": [il], "last_layer": True}
            made = shipped.capture([text], **how)[0][:, il]
        wanted = self.model.capture([text], steer=[steering], **how)[0][:, il]
        return float((np.abs(made - wanted).max(axis=1) / np.linalg.norm(wanted, axis=1)).max())

    def _adapter_error(self, file: ModelFile, basis: NDArray[np.float64], share: float) -> float:
        """Largest relative difference between scale B A and -share V^T V W, over what the adapter is to edit."""
        adapter = ModelFile(self.path)
        alpha = self.fields.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, float):
            raise ModelError(
                f"{self.path.name}: adapter.lora.alpha must be one number with a fraction, not {alpha!r:.80}"
            )
        tied = has_tied_output(file)
        writers = [
            w
            for w in residual_writers(file)
            if w.kind == "matrix" or (w.tensor.name == "token_embd.weight" and not tied)
        ]
        expected = {f"{w.tensor.name}.lora_{x}" for w in writers for x in "ab"}
        for name in sorted(expected ^ adapter.tensors.keys())[:1]:
            self._fail(f"{name} is {'missing' if name in expected else 'no part of such an adapter'}")
        worst = 0.0
        for writer in writers:
            pair = [adapter.tensors[n] for x in "ab" if (n := f"{writer.tensor.name}.lora_{x}") in adapter.tensors]
            if len(pair) < 2:
                continue
            a, b = (adapter.rows(t).astype(np.float64) for t in pair)
            rank = b.shape[1]
            try:
                if writer.kind == "table":
                    made = [a @ b.T]
                    wanted = [-share * ((file.rows(writer.tensor) @ basis.T) @ basis)]
                else:
                    read = products(file, writer, basis)
                    parts = zip(b.reshape(len(read), -1, rank), a.reshape(len(read), rank, -1), strict=True)
                    made = [x @ y for x, y in parts]
                    wanted = [-share * (basis.T @ w) for w in read]
                errors = [np.abs((alpha / rank if alpha else 1.0) * m - w).max() / max(np.abs(w).max(), TINY)
                          for m, w in zip(made, wanted, strict=True)]  # fmt: skip
            except ValueError as e:
                raise VectorError(f"{self.path.name}: the pair for {writer.tensor.name} has another shape ({e})") from e
            for error in map(float, errors):
                worst = error if not error <= worst else worst
        if not worst <= EXACT:
            self._fail(f"a matrix of the adapter is off by {worst:.2g} of what it removes")
        return worst

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        self.out.reasons.append(reason)

    def _must_be_same(self) -> None:
        """An exact form: equal but for rounding, which quantized models amplify, or at least the same distribution."""
        out = self.out
        assert out.max_abs_dlogit is not None
        assert out.kl_mean is not None
        assert out.kl_base_engine is not None
        if out.max_abs_dlogit <= max(EXACT, ROUNDING * (out.noise or 0.0)):
            return
        if self.kind == "lora" and out.kl_mean <= SAME_DISTRIBUTION * out.kl_base_engine:
            return  # the engine edits what the quantized product gives, the adapter adds to it
        self._fail(
            f"logits differ by up to {out.max_abs_dlogit:.3g} from the engine's; rounding alone makes "
            f"{out.noise or 0:.3g}"
        )

    def _must_act_alike(self) -> None:
        out = self.out
        if out.effect_ratio is None or not LEAST <= out.effect_ratio <= MOST:
            self._fail(f"the effect is {out.effect_ratio or 0:.2f} of the engine's, not within {LEAST} to {MOST}")
        if (out.kl_base_shipped or 0) > FAR * (out.kl_base_engine or 0):
            self._fail(
                f"on everyday text it moves {out.kl_base_shipped:.3f} nats per token from the base, more than "
                f"{FAR} times the engine's {out.kl_base_engine:.3f}"
            )


def _tensors_of(path: Path, model: Model) -> NDArray[np.float32]:
    """(n_layer, n_embd) what llama.cpp adds of a control-vector file, read as it reads it."""
    file = ModelFile(path)
    rows = np.zeros((model.n_layer, model.n_embd), np.float32)
    for name, tensor in file.tensors.items():
        il = int(name.removeprefix("direction."))
        if tensor.n_per_row != model.n_embd:
            raise VectorError(f"{path.name}: is {tensor.n_per_row} wide, the model {model.n_embd}")
        if il < model.n_layer:
            rows[il] = file.rows(tensor)[0]
    return rows


def _edit_error(
    base: ModelFile, other: ModelFile, writer: Writer, basis: NDArray[np.float64], share: float
) -> tuple[float, float]:
    """(||V W' - (1 - share) V W|| / ||V W||, ||W' - (I - share V^T V) W|| / ||W||) of a tensor W' made of W."""
    tensor, made = writer.tensor, other.tensors[writer.tensor.name]
    if (made.shape, made.type) != (tensor.shape, tensor.type):
        return np.inf, np.inf
    count = basis.shape[1] if writer.kind == "matrix" else tensor.n_rows
    read = products(base, writer, basis) if writer.kind == "matrix" else []
    owed = [np.zeros_like(p) for p in read]
    before = left = off = norm = 0.0
    for first in range(0, tensor.n_rows, count):
        for start, rows in base.chunks(tensor, first, count):
            difference = other.rows(made, start, len(rows)).astype(np.float64) - rows
            if read:
                here, product = basis[:, start - first : start - first + len(rows)], read[first // count]
                owed[first // count] += here @ difference
                difference += share * (here.T @ product)
            else:
                reading = rows @ basis.T
                before += float(np.square(reading).sum())
                left += float(np.square(difference @ basis.T + share * reading).sum())
                difference += share * (reading @ basis)
            off += float(np.square(difference).sum())
            norm += float(np.square(rows, dtype=np.float64).sum())
    for product, moved in zip(read, owed, strict=True):
        before += float(np.square(product).sum())
        left += float(np.square(moved + share * product).sum())
    return _ratio(left, before), _ratio(off, norm)


def _ratio(part: float, whole: float) -> float:
    """Of two sums of squares, as lengths; 0 where both vanish."""
    return float(np.sqrt(part / whole)) if whole > 0 else (0.0 if part == 0 else float("inf"))


def _rounding_of(tensor: Tensor) -> float:
    """How far a tensor of this type may be from what it should be, relative to its norm."""
    bits = 8 * tensor.row_bytes / tensor.n_per_row
    limits = ((30, 1e-5), (15, 1e-2), (8, 0.03), (6, 0.06), (4, 0.2))
    return next((limit for least, limit in limits if bits >= least), 0.5)


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and bool(a == b)


def changed_tensors(base: ModelFile, other: ModelFile) -> tuple[list[str], list[str]]:
    """Names of the tensors whose type, shape or SHA-256 differs, and of those that only `other` has.

    Raises ModelError where `other` lacks one.
    """
    lacking = base.tensors.keys() - other.tensors.keys()
    if lacking:
        raise ModelError(f"{other.path.name}: lacks tensor {min(lacking)} of {base.path.name}")
    changed = []
    for name, tensor in base.tensors.items():
        made = other.tensors[name]
        same = (tensor.type, tensor.shape) == (made.type, made.shape) and _digest(base, tensor) == _digest(other, made)
        if not same:
            changed.append(name)
    return changed, sorted(other.tensors.keys() - base.tensors.keys())


def _digest(file: ModelFile, tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    with file.path.open("rb") as f:
        f.seek(tensor.offset)
        left = tensor.n_bytes
        while left > 0:
            data = f.read(min(left, 2**20))
            if not data:
                raise ModelError(f"{file.path}: truncated, tensor {tensor.name} is not all there")
            digest.update(data)
            left -= len(data)
    return digest.digest()


def _ratio_interval(
    made: NDArray[np.float64], wanted: NDArray[np.float64], n: int = 2000
) -> tuple[float, float] | None:
    """95 % bootstrap interval of mean(made) / mean(wanted), the comparisons resampled together; None where 0 is within
    that of mean(wanted).
    """
    at = np.random.default_rng(0).integers(0, len(made), (n, len(made)))
    below, means = made[at].mean(axis=1), wanted[at].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    if low <= 0 <= high:
        return None
    low, high = np.quantile(below / means, [0.025, 0.975])
    return float(low), float(high)


def _mean_log_p(rows: NDArray[np.float64], answer: Sequence[int]) -> float:
    """Mean log p of the answer's tokens; row j is before token j."""
    return float(rows[np.arange(len(answer)), list(answer)].mean())
