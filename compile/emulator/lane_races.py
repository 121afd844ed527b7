"""Races between lanes of one warp in shared memory.

Sources: PTX ISA 9.x, 9.7.13.2 ``bar.warp.sync`` ("guarantees memory ordering among participating threads"), 8 (memory consistency: program order is a
thread's, and a warp has none of its own). Shuffles, votes and matrix instructions wait for the lanes, but order no memory accesses.

A lane that reads what another lane of its warp wrote, or writes what another wrote or read, does so behind a ``bar.warp.sync`` or a barrier of the
whole warp. Of each granule of 4 bytes the lanes of one warp that read it since the warp's lanes met are kept, and the lane that wrote it last
(``Races``). Several lanes that store to one place in one instruction count as nobody: each may read what it stored. Of accesses of less than four
bytes nobody knows whether they met: a store counts as nobody's, and a load as none.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from densemoe.compile.emulator.masks import some

__all__ = ["PARTLY", "SEVERAL", "LaneRaces"]

SEVERAL: Final = 32  # in place of a lane: several wrote together
PARTLY: Final = 64  # beside a lane: it wrote less than the granule


class LaneRaces:
    """Which lanes of a warp read a granule since its lanes met.

    Args:
        granules: of all resident shared memory.
    """

    def __init__(self, granules: int) -> None:
        self.lanes = np.zeros(granules, np.uint32)
        self.unit = np.zeros(granules, np.int16)
        self.tick = np.zeros(granules, np.int32)

    def written(self, places: Any, lanes: Any, own: Any, write_lane: Any) -> Any:
        """Which of the granules ``[n, words]`` another lane wrote, where ``own`` says that a lane of the warp did since its lanes met.

        Args:
            places: elements of several granules.
            lanes: of each, in its warp; SEVERAL where all of them act.
            write_lane: lane of the last write of each granule, or SEVERAL, or with PARTLY, ``[elements, words]``.
        """
        by = write_lane[places]
        return own & (by < SEVERAL) & (by != (lanes if isinstance(lanes, int) else lanes[:, None]))

    def may_still_read(self, places: Any, words: int, lanes: Any, units: Any, met: Any) -> Any:
        """Which of the granules ``[n, words]`` another lane of the writer's warp read since its lanes met."""
        if isinstance(lanes, int):  # all of them write
            return np.False_
        fresh = (self.tick.reshape(-1, words)[places] > met[:, None]) & (self.unit.reshape(-1, words)[places] == units[:, None])
        if not some(fresh):
            return fresh
        others = self.lanes.reshape(-1, words)[places] & ~(np.uint32(1) << lanes.astype(np.uint32))[:, None]
        return fresh & (others != 0)

    def read(self, places: Any, words: int, bits: Any, units: Any, now: Any, met: Any) -> None:
        """Lanes ``bits`` of a warp read granules."""
        lanes, unit, tick = (each.reshape(-1, words) for each in (self.lanes, self.unit, self.tick))
        kept = (tick[places] > met[:, None]) & (unit[places] == units[:, None])
        lanes[places] = np.where(kept, lanes[places], np.uint32(0))
        np.bitwise_or.at(lanes, places, bits[:, None])
        unit[places], tick[places] = units[:, None], now[:, None]
