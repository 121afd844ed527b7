"""What race detection keeps: clocks of warps and asynchronous operations, and marks of the last accesses of a memory.

Sources: PTX ISA 9.x, 8 (memory consistency); FastTrack (Flanagan, Freund) for epochs. See ``races``.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["READERS", "Clock", "Marks", "Vector"]

READERS: Final = 8  # last reads of a granule that are kept

Vector = NDArray[np.int32]


class Clock:
    """What somebody knows: three vectors; for an asynchronous operation also its own unit and tick."""

    __slots__ = ("issuer", "order", "proxy", "tensor", "tick", "unit", "wide")

    def __init__(self, order: Vector, proxy: Vector, tensor: Vector, unit: int = -1, tick: int = 0, wide: Vector | None = None) -> None:
        self.order, self.proxy, self.tensor, self.wide = order, proxy, tensor, wide
        self.unit, self.tick = unit, tick
        #: of an operation that some lanes of a warp issued: the warp's unit, and the tick up to which its other lanes' reads are done
        self.issuer: tuple[int, int] | None = None

    def copy(self) -> Clock:
        """An independent copy."""
        return Clock(self.order.copy(), self.proxy.copy(), self.tensor.copy(), wide=None if self.wide is None else self.wide.copy())

    def join(self, other: Clock) -> None:
        """Learns what another knows."""
        np.maximum(self.order, other.order, out=self.order)
        np.maximum(self.proxy, other.proxy, out=self.proxy)
        np.maximum(self.tensor, other.tensor, out=self.tensor)
        if self.wide is not None and other.wide is not None:
            np.maximum(self.wide, other.wide, out=self.wide)


class Marks:
    """Last write and last reads of granules: a unit and a tick each; tick 0 is never."""

    def __init__(self, count: int) -> None:
        self.write_unit = np.zeros(count, np.int16)
        self.write_tick = np.zeros(count, np.int32)
        self.read_unit = np.zeros((READERS, count), np.int16)
        self.read_tick = np.zeros((READERS, count), np.int32)

    def unordered_write(self, where: Any, known: Any) -> Any:
        """Positions in `where` whose last write is not known."""
        return known[self.write_unit[where]] < self.write_tick[where]

    def unordered_read(self, where: Any, known: Vector) -> tuple[int, int] | None:
        """(position, unit) of a read that is not known, for one vector of knowledge."""
        ticks = self.read_tick[:, where]
        if not np.count_nonzero(ticks):
            return None
        units = self.read_unit[:, where]
        bad = known[units] < ticks
        if not np.count_nonzero(bad):
            return None
        reader, at = (int(x) for x in np.argwhere(bad)[0])
        return at, int(units[reader, at])

    def wrote(self, where: Any, unit: Any, tick: Any) -> None:
        self.write_unit[where] = unit
        self.write_tick[where] = tick

    def read(self, where: Any, unit: int, tick: int) -> None:
        self.read_unit[unit % READERS][where] = unit
        self.read_tick[unit % READERS][where] = tick
