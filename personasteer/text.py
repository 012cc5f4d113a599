"""Text from elsewhere, as it may be shown."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """The text with control, formatting and other characters that show nothing, or turn the order around, written out:
    a line's end as ↵, a tab as →, others as \\x1b, \\u202e.
    """
    return "".join(_MARKS.get(c) or (c if unicodedata.category(c) not in _HIDDEN else _escape(c)) for c in text)


_MARKS = {"\n": "↵", "\t": "→"}
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escape(c: str) -> str:
    return c.encode("unicode_escape").decode()
