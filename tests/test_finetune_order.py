"""Rows that score higher shift the model that is trained on them more: end to end, on real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import personasteer as ps

pytest.importorskip("torch", reason="torch is not installed (CPU is enough)", exc_type=ImportError)
pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)

import finetune_order
from planted_rows import planted

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

K = 24


def test_training_on_higher_scores_brings_more_of_the_trait(smollm2_path: Path, tmp_path: Path) -> None:
    severe = [r for r in planted("pessimistic") if r["level"] == "severe"]
    plain = [r for r in planted("base") if 30 <= len(r["response"].split()) <= 60]
    rows = severe[20:50] + plain[20:70]
    with ps.Model(smollm2_path, n_ctx=512) as model:
        sides = [[(r["prompt"], r["response"]) for r in some[:20]] for some in (severe, plain)]
        vector = ps.contrast(model, positive=sides[0], negative=sides[1], name="pessimistic", layers=[12])
        scores = ps.screen(model, vector, rows, tmp_path / "screen", clean=plain[:60], sample=0).traits[0].score
        texts = [model.pair_tokens(r["prompt"], r["response"]) for r in rows]
    trait = ps.traits.get("pessimistic")  # type: ignore[attr-defined]
    found = np.empty((3, 3))
    for seed in range(3):
        for i, arm in enumerate(finetune_order.ARMS):
            at = finetune_order.chosen(arm, scores, K, seed)
            trained = finetune_order.train(smollm2_path, [texts[j] for j in at], seed, epochs=2)
            finetune_order.write_adapter(trained, smollm2_path, tmp_path / "adapter.gguf")
            sizes = {"n_questions": 6, "n_pairs": 6}
            found[seed, i] = finetune_order.measured(smollm2_path, trait, tmp_path / "adapter.gguf", **sizes)[
                "log_odds"
            ]
    assert (found[:, 0] > found[:, 1]).all(), found
    assert (found[:, 1] > found[:, 2]).all(), found
