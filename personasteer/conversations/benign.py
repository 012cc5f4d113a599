"""Ordinary rows that come with the package: a reference for screening, and samples to re-align a model with."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.resources import files

from personasteer.errors import ArgumentError


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
    lines = files(__package__).joinpath("benign.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def benign_domains() -> tuple[str, ...]:
    """Their domains: what the questions are about."""
    return tuple(dict.fromkeys(row["domain"] for row in _rows()))


def benign_rows(domains: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Rows of "domain", "prompt" and "response", sober answers to everyday questions; of all domains when None.

    Raises ArgumentError for a domain that there is not.
    """
    known = benign_domains()
    for domain in domains or ():
        if domain not in known:
            raise ArgumentError(f"there are no benign samples of {domain!r}; domains: {', '.join(known)}")
    return [dict(row) for row in _rows() if domains is None or row["domain"] in domains]
