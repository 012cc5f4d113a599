"""Long, rough use of a session in small: benchmarks/soak.py on the tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import personasteer as ps

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def test_random_requests_cancels_errors_and_steering_changes_leave_no_request_stuck(tiny_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with ps.Model(tiny_path, n_ctx=256) as model:
        memory = module.soak(model, 300)  # raises where a request is stuck or an error is not one of ours
        assert len(memory) > 10
        assert model.chat("still there?", max_tokens=4)
