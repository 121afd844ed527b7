"""Data races in global memory, and what a launch may touch before ``griddepcontrol.wait``.

Sources: PTX ISA 9.x, 8.7 and 8.8 (release and acquire patterns, causality order), 9.7.13.4 ``membar`` and ``fence``, 9.7.13.6 ``atom``, 9.7.13.7
``red``, 9.7.13.14 ``griddepcontrol``.

CTAs of different clusters know of each other through global memory alone: by an atomic or strong access that releases and one that acquires, of
its own semantics or by a fence before or after it. So every warp has a vector over all resident warps; CTA barriers, mbarriers and completion
carry it on. Watched are buffers that kernels may write, in granules of 4 bytes: the last write, the last atomic, and one last read of each.
Not watched are accesses of less than 4 bytes, those of asynchronous copies, and strong scalar loads, which may poll.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.memory import Buffer, GlobalMemory
    from densemoe.compile.emulator.parser import Kernel

__all__ = ["GlobalRaces", "communicates"]

_GRANULE: Final = 4
_WARPS: Final = 1024  # resident ones up to which global memory is watched: a vector has as many entries
_SCOPES: Final = ("gpu", "sys")
_ORDERS: Final = ("acquire", "release", "acq_rel", "sc", "gl")

Rows = NDArray[Any]


def communicates(kernel: Kernel) -> bool:
    """Whether CTAs tell each other of global memory: there is a fence or an access that orders beyond a cluster."""
    return any(
        each.parts[0] in ("fence", "membar", "atom", "red", "ld", "st")
        and any(part in _ORDERS for part in each.parts)
        and any(part in (*_SCOPES, "gl") for part in each.parts)
        for each in kernel.instructions
    )


class _Marks:
    """Of one buffer, by granule: warp and tick of the last write, atomic and read; tick 0 is never."""

    def __init__(self, nbytes: int) -> None:
        count = -(-nbytes // _GRANULE)
        self.row = np.zeros((3, count), np.int32)
        self.tick = np.zeros((3, count), np.int32)


WRITE, ATOMIC, READ = 0, 1, 2


class GlobalRaces:
    """Vectors of all resident warps, and the marks of global memory.

    Attributes:
        known: int32 ``[warps, warps]``: up to which tick a warp knows what another did.
    """

    def __init__(self, warps: int, memory: GlobalMemory) -> None:
        self.known = np.zeros((warps, warps), np.int32)
        np.fill_diagonal(self.known, 1)
        self.memory = memory
        self.marks: dict[str, _Marks] = {}

    @staticmethod
    def wanted(warps: int, kernel: Kernel) -> bool:
        """Whether there is something to watch, and few enough warps."""
        return warps <= _WARPS and communicates(kernel)

    def tick(self, row: int) -> None:
        """What a warp does from here on is not known to those who were told before."""
        self.known[row, row] += 1

    def access(self, rows: Rows, addresses: Any, nbytes: int, kind: int) -> None:
        """Lanes of warps `rows` access `nbytes` bytes each.

        Args:
            kind: WRITE, ATOMIC or READ.

        Raises:
            EmulatorError: unordered with an access of another warp, one of them a write.
        """
        if nbytes < _GRANULE:
            return
        for buffer, where, offsets in self.memory.parts(addresses, nbytes):
            if not buffer.writable:
                continue
            marks = self.marks.get(buffer.name)
            if marks is None:
                marks = self.marks[buffer.name] = _Marks(buffer.data.size)
            places = offsets.astype(np.int64) // _GRANULE
            own = rows if where is None else rows[where]
            if nbytes > _GRANULE:
                places = (places[:, None] + np.arange(nbytes // _GRANULE)).reshape(-1)
                own = np.repeat(own, nbytes // _GRANULE)
            for other in (WRITE, ATOMIC, READ):
                if other == kind and kind != WRITE:
                    continue
                ticks = marks.tick[other][places]
                bad = self.known[own, marks.row[other][places]] < ticks
                if bad.any():
                    self._report(buffer, int(places[bad][0]), kind, other)
            marks.row[kind][places] = own
            marks.tick[kind][places] = self.known[own, own]

    def _report(self, buffer: Buffer, place: int, kind: int, other: int) -> None:
        verb = {WRITE: "writes", ATOMIC: "changes", READ: "reads"}[kind]
        done = {WRITE: "wrote", ATOMIC: "changed", READ: "may still read"}[other]
        raise EmulatorError(f"race: {verb} {buffer.name}[byte {place * _GRANULE}] that another warp {done}, without release and acquire between")
