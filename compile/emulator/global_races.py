"""Data races in global memory, and what a launch may touch before ``griddepcontrol.wait``.

Sources: PTX ISA 9.x, 8.7 and 8.8 (release and acquire patterns, causality order), 9.7.13.4 ``membar`` and ``fence``, 9.7.13.6 ``atom``, 9.7.13.7
``red``, 9.7.13.14 ``griddepcontrol``.

CTAs of different clusters know of each other through global memory alone: by an atomic or strong access that releases and one that acquires, of
its own semantics or by a fence before or after it. So every warp has a vector over all resident warps; CTA barriers, mbarriers and completion
carry it on. Watched are buffers that kernels may write, in granules of 4 bytes: the last write, atomic and strong store, and one last read and
strong vector load of each. Not watched are accesses of less than 4 bytes and those of asynchronous copies. Strong scalar loads, which may poll,
race with weak writes alone. A strong vector load is as many strong scalar ones (8.2.2), which may poll words that are their own flags
(``sm90_reduction``): it races with weak writes, and besides, as a sum that is read before all has been added to it, with atomics; not with strong
stores.

What one lane releases or acquires is its own affair until the warp synchronises (9.7.13.2, ``bar.warp.sync``; shuffles order nothing). A vector
therefore has two entries a warp: up to which tick all of its lanes are known, and up to which those lanes are that ever released alone
(``leaders``); what some lanes acquired is kept beside the warp's vector until its lanes meet. A race of two lanes of one warp is not looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.clocks import ALL_LANES, Vector
from densemoe.compile.emulator.masks import some
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.memory import Buffer, GlobalMemory
    from densemoe.compile.emulator.parser import Kernel

__all__ = ["ATOMIC", "LOAD", "POLL", "READ", "STORE", "WRITE", "GlobalRaces", "communicates"]

_GRANULE: Final = 4
_WARPS: Final = 1024  # resident ones up to which global memory is watched: a vector has as many entries
_SCOPES: Final = ("gpu", "sys")
_ORDERS: Final = ("acquire", "release", "acq_rel", "sc", "gl")

Rows = NDArray[Any]


def communicates(kernel: Kernel) -> bool:
    """Whether CTAs may tell each other of global memory: there are atomics of it, or a fence or access that orders beyond a cluster."""
    return any(_tells(each.parts) for each in kernel.instructions)


def _tells(parts: Sequence[str]) -> bool:
    if parts[0] in ("atom", "red") and not any(part.startswith("shared") for part in parts):
        return True
    ordered = parts[0] in ("fence", "membar", "ld", "st") and any(part in _ORDERS for part in parts)
    return ordered and any(part in (*_SCOPES, "gl") for part in parts)


class _Marks:
    """Of one buffer, by granule: warp, lane and tick of the last access of each kind that is marked; tick 0 is never."""

    def __init__(self, nbytes: int) -> None:
        count = -(-nbytes // _GRANULE)
        self.row = np.zeros((POLL, count), np.int32)
        self.tick = np.zeros((POLL, count), np.int32)
        self.lane = np.zeros((POLL, count), np.uint8)


WRITE, ATOMIC, READ, STORE, LOAD, POLL = range(6)
#: By kind of access: the kinds that it must be ordered with.
_CONFLICTS: Final = {
    WRITE: (WRITE, ATOMIC, READ, STORE, LOAD),
    ATOMIC: (WRITE, READ, LOAD),
    READ: (WRITE, ATOMIC, STORE),
    STORE: (WRITE, READ),
    LOAD: (WRITE, ATOMIC),
    POLL: (WRITE,),
}


class GlobalRaces:
    """Vectors of all resident warps, and the marks of global memory.

    Attributes:
        known: int32 ``[warps, 2 * warps]``: up to which tick a warp knows what all lanes of another did, and what the other's leaders did.
    """

    def __init__(self, warps: int, memory: GlobalMemory) -> None:
        self.warps = warps
        self.known = np.zeros((warps, 2 * warps), np.int32)
        every = np.arange(warps)
        self.known[every, every] = self.known[every, warps + every] = 1
        self.memory = memory
        self.marks: dict[str, _Marks] = {}
        #: lanes of each warp that ever released alone
        self._leaders = np.zeros(warps, np.uint32)
        #: own tick of each warp when its lanes met last
        self._met = np.zeros(warps, np.int32)
        #: by warp: lanes, and what they know and the warp does not
        self._alone: dict[int, tuple[int, Vector]] = {}

    @staticmethod
    def wanted(warps: int, kernel: Kernel) -> bool:
        """Whether there is something to watch, and few enough warps."""
        return warps <= _WARPS and communicates(kernel)

    def tick(self, row: int) -> None:
        """What a warp does from here on is not known to those who were told before."""
        self.known[row, row] += 1
        self.known[row, self.warps + row] += 1

    def released(self, row: int, lanes: int) -> Vector:
        """What lanes of a warp may tell others: of the warp's other lanes only what they did before they met."""
        told = self.known[row].copy()
        if row in self._alone and self._alone[row][0] & lanes:
            np.maximum(told, self._alone[row][1], out=told)
        if lanes != ALL_LANES:
            self._leaders[row] |= np.uint32(lanes)
            told[row] = self._met[row]
        return told

    def acquired(self, row: int, told: Vector, lanes: int) -> None:
        """Lanes of a warp learn what others told."""
        if lanes == ALL_LANES:
            np.maximum(self.known[row], told, out=self.known[row])
            return
        before = self._alone.get(row)
        self._alone[row] = (lanes, told.copy()) if before is None else (lanes | before[0], np.maximum(before[1], told))

    def met(self, row: int) -> None:
        """The lanes of a warp waited for each other: each knows what the others do."""
        alone = self._alone.pop(row, None)
        if alone is not None:
            np.maximum(self.known[row], alone[1], out=self.known[row])
        self._met[row] = self.known[row, row]

    def access(self, rows: Rows, lanes: Rows, addresses: Any, nbytes: int, kind: int) -> None:
        """Lanes ``lanes`` of warps `rows` access `nbytes` bytes each.

        Args:
            kind: WRITE and READ for weak accesses, ATOMIC, STORE for a strong store, LOAD for a strong vector load, POLL for a strong scalar one.

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
            own, lane = (rows, lanes) if where is None else (rows[where], lanes[where])
            if nbytes > _GRANULE:
                places = (places[:, None] + np.arange(nbytes // _GRANULE)).reshape(-1)
                own, lane = np.repeat(own, nbytes // _GRANULE), np.repeat(lane, nbytes // _GRANULE)
            for other in _CONFLICTS[kind]:
                bad = self.known[own, marks.row[other][places]] < marks.tick[other][places]
                if some(bad):
                    at = np.flatnonzero(bad)
                    at = at[~self._known_to_lanes(own[at], lane[at], marks, other, places[at])]
                    if at.size:
                        self._report(buffer, int(places[at[0]]), kind, other)
            if kind != POLL:
                marks.row[kind][places] = own
                marks.tick[kind][places] = self.known[own, own]
                marks.lane[kind][places] = lane

    def _known_to_lanes(self, own: Rows, lane: Rows, marks: _Marks, other: int, places: Rows) -> Rows:
        """Which of the accesses that their warps do not know of as a whole are known all the same: as those of a leader, or to the lane."""
        source, tick = marks.row[other][places], marks.tick[other][places]
        leader = (self._leaders[source] >> marks.lane[other][places] & 1).astype(np.bool_)
        known: Rows = leader & (self.known[own, self.warps + source] >= tick)
        for row in np.unique(own).tolist():
            lanes, told = self._alone.get(row, (0, None))
            if told is not None:
                mine = (own == row) & (lanes >> lane.astype(np.int64) & 1).astype(np.bool_)
                known |= mine & ((told[source] >= tick) | leader & (told[self.warps + source] >= tick))
        return known

    def _report(self, buffer: Buffer, place: int, kind: int, other: int) -> None:
        verb = {WRITE: "writes", ATOMIC: "changes", STORE: "changes"}.get(kind, "reads")
        done = {WRITE: "wrote", ATOMIC: "changed", STORE: "changed"}.get(other, "may still read")
        raise EmulatorError(f"race: {verb} {buffer.name}[byte {place * _GRANULE}] that another warp {done}, without release and acquire between")
