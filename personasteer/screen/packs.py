"""Which texts are computed together: packs whose composition follows from the texts alone, not from their order.

A row's numbers depend on its pack by rounding, so a pack is what a resumed run, or another machine, repeats as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice

from personasteer.screen.journal import Journal
from personasteer.screen.texts import SHORTEST_PREFIX, n_common, unpacked

WINDOW = 512  # families that are packed together
MOST = 64  # texts of a pack: sequences of llama.cpp's batch
FEWEST = 8  # texts that make their common beginning worth keeping
AT_ONCE = 16  # own answers that are generated together
ROUNDS = 3  # of them in a pack: while some end, others begin
CELLS = 8192  # tokens of own answers, prompts included, that are in the cache together


def plan_texts(journal: Journal, *, n_batch: int, n_ctx: int) -> None:
    """Pack all texts of the journal, n_batch new tokens a pack: what a family or a prefix shares is counted once."""
    number = 0
    for prefix, group in groupby(journal.texts_in_order(FEWEST), key=lambda t: t[1]):
        families = _families(group, len(prefix) // 4, n_ctx)
        while window := list(islice(families, WINDOW)):
            for cost, keys in best_fit(window, n_batch):
                journal.add_pack("given", number, cost, keys)
                number += 1


def _families(
    texts: Iterable[tuple[bytes, bytes, bytes, bytes, int]], n_prefix: int, n_ctx: int
) -> Iterator[tuple[int, list[bytes]]]:
    """(new tokens, keys) of texts that go on from the same prompt, at most MOST and n_ctx tokens of them."""
    for _, family in groupby(texts, key=lambda t: t[2]):
        cost, keys, before = 0, list[bytes](), b""
        for key, _, _, tokens, n_prompt in family:
            shared = _common(before, tokens[: 4 * (n_prompt - 1)])  # from its last token on, a prompt is read
            new = len(tokens) // 4 - max(shared, n_prefix)
            if keys and (len(keys) == MOST or n_prefix + cost + new > n_ctx):
                yield cost, keys
                cost, keys, new = 0, [], len(tokens) // 4 - n_prefix
            cost += new
            keys.append(key)
            before = tokens
        yield cost, keys


def _common(a: bytes, b: bytes) -> int:
    """Tokens that both begin with, as many as sharing them is worth."""
    shared = n_common(unpacked(a), unpacked(b))
    return shared if shared >= SHORTEST_PREFIX else 0


def best_fit(families: list[tuple[int, list[bytes]]], room: int) -> list[tuple[int, list[bytes]]]:
    """Packs of families: the largest first, each into the fullest pack that has room; one larger than `room` alone.

    Source: D. S. Johnson, Near-optimal bin packing algorithms, 1973 (best fit decreasing).
    """
    packs: list[tuple[int, list[bytes]]] = []
    left: list[int] = []
    for cost, keys in sorted(families, key=lambda f: (-f[0], f[1])):
        fits = [i for i, free in enumerate(left) if cost <= free and len(packs[i][1]) + len(keys) <= MOST]
        if fits:
            at = min(fits, key=lambda i: left[i])
            packs[at] = packs[at][0] + cost, packs[at][1] + keys
            left[at] -= cost
        else:
            packs.append((cost, keys))
            left.append(room - cost)
    return packs


def plan_answers(journal: Journal, *, max_tokens: int) -> None:
    """Pack all prompts of the journal to be answered, neighbours in length together."""
    pack: list[tuple[bytes, int]] = []
    number = 0

    def put() -> None:
        nonlocal pack, number
        if pack:
            journal.add_pack("own", number, sum(n + max_tokens for _, n in pack), [key for key, _ in pack])
            pack, number = [], number + 1

    for key, n in journal.prompts_in_order():
        at_once = CELLS // (n + max_tokens)
        if len(pack) >= (AT_ONCE * ROUNDS if at_once >= AT_ONCE else max(1, at_once)):
            put()
        pack.append((key, n))
    put()
