"""Measuring what steering does, and what it costs."""

from personasteer.evaluate.capability import capability
from personasteer.evaluate.coherence import SOUND, Coherence, kl_on_neutral, measure_coherence, persona_systems
from personasteer.evaluate.controls import random_vectors, unrelated_vector
from personasteer.evaluate.evaluation import Controls, Dose, Evaluation, cross_talk, evaluate, trait_of
from personasteer.evaluate.log_odds import Cell, cell_log_odds, halves, log_odds, make_cells
from personasteer.evaluate.overhead import measure_overhead
from personasteer.statistics import bootstrap_interval, spearman

__all__ = [
    "SOUND",
    "Cell",
    "Coherence",
    "Controls",
    "Dose",
    "Evaluation",
    "bootstrap_interval",
    "capability",
    "cell_log_odds",
    "cross_talk",
    "evaluate",
    "halves",
    "kl_on_neutral",
    "log_odds",
    "make_cells",
    "measure_coherence",
    "measure_overhead",
    "persona_systems",
    "random_vectors",
    "spearman",
    "trait_of",
    "unrelated_vector",
]
