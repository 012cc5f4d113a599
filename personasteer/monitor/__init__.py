"""Reading a persona before it speaks: calibrated thresholds on projections, of prompts and of whole transcripts."""

from personasteer.monitor.drift import Drift, find_drift
from personasteer.monitor.thresholds import (
    STATES,
    Threshold,
    calibrate,
    clean_prompts,
    load_thresholds,
    save_thresholds,
    thresholds_for,
)
from personasteer.monitor.transcripts import Reading, Turn, read_conversations, watch_transcripts

__all__ = [
    "STATES",
    "Drift",
    "Reading",
    "Threshold",
    "Turn",
    "calibrate",
    "clean_prompts",
    "find_drift",
    "load_thresholds",
    "read_conversations",
    "save_thresholds",
    "thresholds_for",
    "watch_transcripts",
]
