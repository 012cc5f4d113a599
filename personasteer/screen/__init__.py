"""Training data screened before it is trained on: which rows would shift a model along persona vectors."""

from personasteer.screen.layouts import Columns
from personasteer.screen.results import Scores, Screening, Shift, TraitResult
from personasteer.screen.run import screen

__all__ = ["Columns", "Scores", "Screening", "Shift", "TraitResult", "screen"]
