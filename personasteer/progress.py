"""One progress count over work that is done in several parts."""

from __future__ import annotations

from personasteer.engine import Progress


class Meter:
    """Splits a callback (done, total) into parts that follow each other; totals are known beforehand."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._before, self._part = progress, total, 0, 0

    def part(self, n: int) -> Progress | None:
        """The callback of the next part, which counts for n whatever it says its own total is."""
        self._before += self._part
        self._part = n
        if self._progress is None:
            return None
        before, progress = self._before, self._progress
        progress(before, self._total)
        return lambda done, total: progress(before + round(n * done / max(total, 1)), self._total)
