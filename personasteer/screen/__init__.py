"""Training data screened before it is trained on: which rows would shift a model along persona vectors."""

from personasteer.conversations.layouts import Columns, Layout
from personasteer.screen.results import Scores, Screening, Shift, TraitResult
from personasteer.screen.run import layout_of, screen

__all__ = ["Columns", "Layout", "Scores", "Screening", "Shift", "TraitResult", "layout_of", "screen"]
