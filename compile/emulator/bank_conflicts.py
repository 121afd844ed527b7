"""Bank conflicts of shared-memory accesses, for the counters.

Source: CUDA C++ Programming Guide, shared memory of compute capability 5.x and later: 32 banks of 4 bytes; lanes that access the same word do
not conflict; accesses of 8 and 16 bytes are served in halves and quarters of a warp.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

__all__ = ["BankConflicts"]

_BANKS: Final = 32
_CACHED: Final = 4096


class BankConflicts:
    """Counts cycles that accesses take beyond the first of each phase; equal patterns are counted once and remembered."""

    def __init__(self) -> None:
        self.cycles = 0
        self._known: dict[tuple[int, int, bytes, bytes], int] = {}

    def add(self, index: Any, lanes: Any, nbytes: int) -> None:
        """One instruction.

        Args:
            index: element number of each access, elements of `nbytes` bytes.
            lanes: lane of each in its gang, or None for lanes 0, 1, ….
        """
        first = int(index.min())
        relative = index - first
        words = max(nbytes // 4, 1)
        place = first * nbytes // 4 % _BANKS if nbytes >= 4 else first % (4 * _BANKS)
        key = (nbytes, place, relative.tobytes(), b"" if lanes is None else lanes.tobytes())
        extra = self._known.get(key)
        if extra is None:
            if len(self._known) >= _CACHED:
                self._known.clear()
            extra = self._known[key] = self._count(index, lanes, nbytes, words)
        self.cycles += extra

    @staticmethod
    def _count(index: Any, lanes: Any, nbytes: int, words: int) -> int:
        phase = (np.arange(index.size) if lanes is None else lanes) // (_BANKS // words)
        word = index * nbytes // 4
        # distinct words of each phase and bank; the fullest bank decides
        pairs = np.unique(np.stack([np.repeat(phase, words), (word[:, None] + np.arange(words)).reshape(-1)], axis=1), axis=0)
        _, counts = np.unique(pairs[:, 0] * _BANKS + pairs[:, 1] % _BANKS, return_counts=True)
        keys = np.unique(pairs[:, 0] * _BANKS + pairs[:, 1] % _BANKS) // _BANKS
        fullest = np.zeros(int(keys.max()) + 1, np.int64)
        np.maximum.at(fullest, keys, counts)
        return int((fullest[fullest > 0] - 1).sum())
