"""Data sets of conversations: rows in files and objects, the columns that hold them, and ordinary ones to go with."""

from personasteer.conversations.benign import benign_domains, benign_rows
from personasteer.conversations.data import Data, Row, first_rows, open_data
from personasteer.conversations.layouts import LOOKED_AT, Columns, Layout, RowError, answers, find_layout

__all__ = [
    "LOOKED_AT",
    "Columns",
    "Data",
    "Layout",
    "Row",
    "RowError",
    "answers",
    "benign_domains",
    "benign_rows",
    "find_layout",
    "first_rows",
    "open_data",
]
