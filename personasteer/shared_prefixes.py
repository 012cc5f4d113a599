"""Texts that begin alike: which requests compute the rows of all of them from as few tokens as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from personasteer.engine import Request

N_CELLS = 8192  # of the key-value cache; bounds how many texts are computed at once
N_PARALLEL = 64
# from 64 tokens on ggml's flash attention on the CPU sums in tiles: up to here a row has a short text's own sums
N_BATCH = 63
OUTPUT_BYTES = 64 * 2**20  # of llama.cpp's output buffer, 16 bytes per vocabulary entry and text computed at once
MAX_GAP = 4  # an output row costs about as much as a quarter of a token, a text of its own a token and a sequence


def in_sharing_order(requests: Sequence[Request]) -> tuple[list[Request], list[int]]:
    """(the requests such that neighbours begin alike, the place of each given one among them).

    The order is that of a walk through the tree of their tokens: what a text leaves behind beyond its neighbour's
    beginning is needed by no later one.
    """
    order = sorted(range(len(requests)), key=lambda i: (bool(requests[i].steering), list(requests[i].tokens)))
    place = [0] * len(order)
    for at, i in enumerate(order):
        place[i] = at
    return [replace(requests[i], share_prefix=True) for i in order], place


def fold_last_rows(requests: Sequence[Request]) -> tuple[list[Request], list[tuple[int, int]]]:
    """Requests that keep the row of one token each, as fewer: (the requests, for each given one its request and row).

    Unsteered, a text that another one goes on from is computed with it, since its rows are the same. In the order of
    in_sharing_order.
    """
    texts, place = in_sharing_order([_up_to_the_row(r) for r in requests])
    folded: list[Request] = []
    where: list[tuple[int, int]] = []
    for r in texts:
        row = _kept(r)[0]
        if folded and _goes_on(folded[-1], r):
            before = folded.pop()
            r = replace(r, raw=_hull(_kept(before), _kept(r)), outputs=_hull(before.outputs, r.outputs))
        folded.append(r)
        where.append((len(folded) - 1, row))
    return folded, [(i, row - _kept(folded[i])[0]) for i, row in (where[at] for at in place)]


def _kept(r: Request) -> tuple[int, int]:
    assert r.raw is not None
    return r.raw


def _up_to_the_row(r: Request) -> Request:
    if r.steering:  # scopes count from the text's parts
        return r
    return replace(r, tokens=r.tokens[: _kept(r)[1]], n_prompt=None, roles=None)


def _goes_on(before: Request, r: Request) -> bool:
    n, given = len(before.tokens), len(r.tokens)
    if before.steering or r.steering or list(r.tokens[:n]) != list(before.tokens):
        return False
    return given - n <= MAX_GAP or r.outputs == (0, 0)


def _hull(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return min(a[0], b[0]), max(a[1], b[1])


def texts_at_once(requests: Sequence[Request], n_vocab: int) -> int:
    """How many sequences a context for these requests should have: all of them, where memory allows."""
    longest = max(len(r.tokens) for r in requests)
    bound = min(N_CELLS // longest, OUTPUT_BYTES // (16 * n_vocab), N_PARALLEL, len(requests))
    return max(bound, min(4, len(requests)))
