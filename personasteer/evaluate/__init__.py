"""Measuring what steering does, and what it costs."""

from personasteer.evaluate.controls import random_vectors
from personasteer.evaluate.log_odds import bootstrap_interval, log_odds
from personasteer.evaluate.overhead import measure_overhead

__all__ = ["bootstrap_interval", "log_odds", "measure_overhead", "random_vectors"]
