"""What race detection keeps: clocks of warps and asynchronous operations, and marks of the last accesses of a memory.

Sources: PTX ISA 9.x, 8 (memory consistency); FastTrack (Flanagan, Freund) for epochs. See ``races``.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALL_LANES", "READERS", "Clock", "Issuer", "Marks", "Vector"]

#: The mask of a warp's 32 lanes.
ALL_LANES: Final = 0xFFFFFFFF
READERS: Final = 8  # last reads of a granule that are kept

Vector = NDArray[np.int32]


class Issuer(NamedTuple):
    """Who issued an operation that not all lanes of a warp did.

    Attributes:
        unit: of the warp.
        lanes: that did, a bit each; those that wrote shared memory since the lanes met need no order between each other.
        read: tick up to which the other lanes' reads are done: all lanes were at one instruction then.
        written: tick up to which their writes are known: memory was ordered between all lanes then.
    """

    unit: int
    lanes: int
    read: int
    written: int


class Clock:
    """What somebody knows: three vectors; for an asynchronous operation also its own unit and tick.

    Args:
        parts: ``[3, units]``: order, proxy and tensor.
    """

    __slots__ = ("_sees", "issuer", "order", "parts", "proxy", "tensor", "tick", "unit", "wide")

    def __init__(self, parts: Any, unit: int = -1, tick: int = 0, wide: Vector | None = None) -> None:
        self.parts, self.wide = parts, wide
        self.order, self.proxy, self.tensor = parts
        self.unit, self.tick = unit, tick
        self.issuer: Issuer | None = None
        self._sees: Vector | None = None

    def sees(self, warps: int) -> Vector:
        """Writes that an asynchronous operation may rely on: those of the first `warps` units, generic ones, need a proxy fence."""
        if self._sees is None:
            self._sees = self.order.copy()
            self._sees[:warps] = self.proxy[:warps]
        return self._sees

    def copy(self) -> Clock:
        """An independent copy."""
        return Clock(self.parts.copy(), wide=None if self.wide is None else self.wide.copy())

    def join(self, other: Clock) -> None:
        """Learns what another knows."""
        self._sees = None
        np.maximum(self.parts, other.parts, out=self.parts)
        if self.wide is not None and other.wide is not None:
            np.maximum(self.wide, other.wide, out=self.wide)


def _of_all_readers(where: Any) -> tuple[Any, ...]:
    """An index of granules as one of what all readers have there."""
    return (slice(None), *where) if isinstance(where, tuple) else (slice(None), where)


class Marks:
    """Last write and last reads of granules: a unit and a tick each; tick 0 is never.

    Args:
        shape: of the granules. `where` below is an index into it: an array of positions, a slice, or of two dimensions a pair of slices.
    """

    def __init__(self, *shape: int) -> None:
        self.write_unit = np.zeros(shape, np.int16)
        self.write_tick = np.zeros(shape, np.int32)
        self.read_unit = np.zeros((READERS, *shape), np.int16)
        self.read_tick = np.zeros((READERS, *shape), np.int32)
        self._elements: dict[int, Marks] = {}

    def elements(self, words: int) -> Marks:
        """The same marks, of one dimension, in elements of several granules each: ``[elements, words]``."""
        found = self._elements.get(words)
        if found is None:
            found = self._elements[words] = Marks.__new__(Marks)
            found.write_unit, found.write_tick = self.write_unit.reshape(-1, words), self.write_tick.reshape(-1, words)
            found.read_unit, found.read_tick = self.read_unit.reshape(READERS, -1, words), self.read_tick.reshape(READERS, -1, words)
        return found

    def unordered_write(self, where: Any, known: Any) -> Any:
        """Which of the granules `where` had a last write that is not known."""
        return known[self.write_unit[where]] < self.write_tick[where]

    def unordered_read(self, where: Any, known: Vector) -> tuple[int, int] | None:
        """(position, unit) of a read that is not known, for one vector of knowledge.

        Reads that are known are forgotten: a write follows, and who knows of that knows of them.
        """
        every = _of_all_readers(where)
        ticks = self.read_tick[every]
        if not np.count_nonzero(ticks):
            return None
        units = self.read_unit[every]
        bad = known[units] < ticks
        if not np.count_nonzero(bad):
            self.read_tick[every] = 0
            return None
        reader, at = (int(x) for x in np.argwhere(bad.reshape(READERS, -1))[0])
        return at, int(units[reader].reshape(-1)[at])

    def forget(self, where: Any, unit: int, tick: int) -> None:
        """Marks a write that knew of everything before it."""
        self.wrote(where, unit, tick)
        self.read_tick[_of_all_readers(where)] = 0

    def wrote(self, where: Any, unit: Any, tick: Any) -> None:
        """Marks a write."""
        self.write_unit[where] = unit
        self.write_tick[where] = tick

    def read(self, where: Any, unit: int, tick: int) -> None:
        """Marks a read."""
        self.read_unit[unit % READERS][where] = unit
        self.read_tick[unit % READERS][where] = tick
