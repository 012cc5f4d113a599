"""Reading a persona before it speaks: calibrated thresholds on projections, of prompts and of whole transcripts."""

from personasteer.monitor.audit import audit_model, load_earlier, read_audit, render_audit, write_audit
from personasteer.monitor.drift import Drift, find_drift
from personasteer.monitor.everyday import clean_prompts, everyday_prompt
from personasteer.monitor.guard import Event, Guard, GuardedAnswer, GuardedStream, Rule
from personasteer.monitor.policy import load_policy
from personasteer.monitor.profile import LEAST_WORDS, Profile, Shift, compare_profiles, measure_profile, whole_states
from personasteer.monitor.readings import (
    Readings,
    TurnDrift,
    check_readings_file,
    drift_of_turns,
    read_baseline,
    read_tokens,
    save_readings,
    watched,
)
from personasteer.monitor.registry import Registry, registry_path
from personasteer.monitor.running import Running, calibrate_running
from personasteer.monitor.thresholds import (
    STATES,
    Threshold,
    calibrate,
    last_states,
    load_thresholds,
    save_thresholds,
    thresholds_for,
)
from personasteer.monitor.tracking import Check, Comparison, check_model, compare_models, track_model
from personasteer.monitor.transcripts import Reading, Turn, read_clean, read_conversations, watch_transcripts

__all__ = [
    "LEAST_WORDS",
    "STATES",
    "Check",
    "Comparison",
    "Drift",
    "Event",
    "Guard",
    "GuardedAnswer",
    "GuardedStream",
    "Profile",
    "Reading",
    "Readings",
    "Registry",
    "Rule",
    "Running",
    "Shift",
    "Threshold",
    "Turn",
    "TurnDrift",
    "audit_model",
    "calibrate",
    "calibrate_running",
    "check_model",
    "check_readings_file",
    "clean_prompts",
    "compare_models",
    "compare_profiles",
    "drift_of_turns",
    "everyday_prompt",
    "find_drift",
    "last_states",
    "load_earlier",
    "load_policy",
    "load_thresholds",
    "measure_profile",
    "read_audit",
    "read_baseline",
    "read_clean",
    "read_conversations",
    "read_tokens",
    "registry_path",
    "render_audit",
    "save_readings",
    "save_thresholds",
    "thresholds_for",
    "track_model",
    "watch_transcripts",
    "watched",
    "write_audit",
    "whole_states",
]
