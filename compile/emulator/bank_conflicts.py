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
_PHASE: Final = 40  # bits below a phase in the key of a word
#: Cycles of patterns met before, by any launch.
_KNOWN: dict[tuple[int, int, bytes, bytes], int] = {}


class BankConflicts:
    """Counts cycles that accesses take beyond the first of each phase; equal patterns are counted once and remembered."""

    def __init__(self) -> None:
        self.cycles = 0

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
        extra = _KNOWN.get(key)
        if extra is None:
            if len(_KNOWN) >= _CACHED:
                _KNOWN.clear()
            extra = _KNOWN[key] = self._count(index, lanes, nbytes, words)
        self.cycles += extra

    @staticmethod
    def _count(index: Any, lanes: Any, nbytes: int, words: int) -> int:
        phase = (np.arange(index.size) if lanes is None else lanes) // (_BANKS // words)
        word = index * nbytes // 4
        # distinct words of each phase and bank; the fullest bank decides
        distinct = np.unique((phase.astype(np.int64) << _PHASE)[:, None] + word[:, None] + np.arange(words))
        banks = np.bincount((distinct >> _PHASE) * _BANKS + distinct % _BANKS)
        fullest = np.pad(banks, (0, -banks.size % _BANKS)).reshape(-1, _BANKS).max(axis=1)
        return int((fullest[fullest > 0] - 1).sum())
