"""What race detection is told of a machine's accesses and fences.

Sources: PTX ISA 9.x, 8 (memory consistency), 9.7.13.4 (fences), 9.7.13.14 (``griddepcontrol.wait``: the launches before are done, and what they wrote
is seen).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from densemoe.compile.emulator.accesses import Accesses
from densemoe.compile.emulator.bank_conflicts import BankConflicts
from densemoe.compile.emulator.global_races import ATOMIC, LOAD, POLL, READ, STORE, WRITE
from densemoe.compile.emulator.races import lane_numbers, level
from densemoe.compile.emulator.warps import LANES
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.gang import Gang
    from densemoe.compile.emulator.memory import Buffer
    from densemoe.compile.emulator.races import Races

__all__ = ["WatchedAccesses"]

_FENCES = ("fence.acq_rel.", "fence.sc.", "fence.acquire.", "fence.release.", "membar.", "fence.cta", "fence.cluster", "fence.gpu", "fence.sys")
_STRONG_BYTES = 8  # of a scalar that may be a flag


class WatchedAccesses(Accesses):
    """Accesses whose order is checked.

    Attributes:
        programmatic: the launches before may still run until ``griddepcontrol.wait``.
    """

    races: Races | None
    conflicts: BankConflicts
    programmatic: bool

    def note_shared(self, g: Gang, index: Any, picked: Any, nbytes: int, write: bool, several: bool = False) -> None:
        if not isinstance(index, int):
            self.conflicts.add(index, picked, nbytes)
        if self.races is not None:
            self.races.generic(g, index, picked, nbytes, write, several)

    # --- global memory

    def note_global(self, g: Gang, address: Any, picked: Any, size: int, count: int, write: bool, order: str) -> None:
        races = self.races
        if races is None or not (self.programmatic or races.everywhere is not None):
            return
        rows = races.rows(g, picked)
        addresses = np.full(rows.size, address, np.uint64) if isinstance(address, int) else address.astype(np.uint64, copy=False)
        if addresses.size != rows.size:  # one lane acts for a uniform address
            addresses = np.full(rows.size, addresses[0], np.uint64)
        if self.programmatic:
            self._check_early(rows, addresses, size * count, write)
        if races.everywhere is None:
            return
        order, _, scope = order.partition(".")
        strong = bool(order) and size * count <= _STRONG_BYTES and count == 1
        lanes = lane_numbers(g, picked)
        if strong and not write:
            self._order(g, picked, addresses, scope, order == "acquire", None)
            races.everywhere.access(rows, lanes, addresses, size, POLL)
            return
        kind = (STORE if order else WRITE) if write else LOAD if order else READ
        races.everywhere.access(rows, lanes, addresses, size * count, kind)
        if strong:  # whoever acquires it knows of the store itself
            self._order(g, picked, addresses, scope, None, order == "release")

    def note_atomic(self, g: Gang, space: str, address: Any, mask: Any, size: int, count: int, order: str, reads: bool) -> None:
        races = self.races
        if races is None or not (self.programmatic or races.everywhere is not None):
            return
        picked = np.arange(g.lanes) if mask is None else np.flatnonzero(mask)
        if not picked.size or space not in ("", "global"):
            return
        addresses = np.full(picked.size, address, np.uint64) if isinstance(address, int) else address.astype(np.uint64, copy=False)
        if addresses.size != picked.size:
            addresses = addresses[picked]
        if space == "" and self.generic_space(addresses)[0] != "global":
            return
        rows, lanes = races.rows(g, picked), lane_numbers(g, picked)
        if self.programmatic:
            self._check_early(rows, addresses, size * count, True)
        if races.everywhere is None:
            return
        order, _, scope = order.partition(".")
        if count > 1 or (order in ("", "relaxed") and not reads and not races.fenced(g)):
            races.everywhere.access(rows, lanes, addresses, size * count, ATOMIC)
            return
        # one after another, and the release last: whoever acquires an atomic's value knows of the atomic itself
        acquire, release = order in ("acquire", "acq_rel") if reads else None, order in ("release", "acq_rel")
        for position in range(picked.size):
            one = slice(position, position + 1)
            self._order(g, picked[one], addresses[one], scope, acquire, None)
            races.everywhere.access(rows[one], lanes[one], addresses[one], size, ATOMIC)
            self._order(g, picked[one], addresses[one], scope, None, release)

    def _order(self, g: Gang, picked: Any, addresses: Any, scope: str, acquire: bool | None, release: bool | None) -> None:
        assert self.races is not None
        if acquire is False and release is None and not self.races.locations:
            return
        lanes: dict[tuple[int, int], int] = {}
        for lane, address in zip((range(g.lanes) if picked is None else picked.tolist()), addresses.tolist(), strict=True):
            place = (lane // LANES, address)
            lanes[place] = lanes.get(place, 0) | 1 << lane % LANES
        at = level(scope)
        for (w, address), mask in lanes.items():
            self.races.location(g.warps[w], mask, address, at, acquire, release)

    def _check_early(self, rows: Any, addresses: Any, nbytes: int, write: bool) -> None:
        assert self.races is not None
        early = self.races.order[rows, self.races.before] == 0
        if early.any():
            for address in np.unique(addresses[early]).tolist():
                self.check_waited(self.memory.find(address, nbytes), None, write)

    def check_waited(self, buffer: Buffer, clock: Any, write: bool) -> None:
        """Raises where somebody with `clock`, or one who is known to be early, touches what a launch before may still use."""
        if not self.programmatic or self.races is None or (buffer.early and not write):
            return
        if clock is None or not clock.order[self.races.before]:
            verb = "writes" if write else "reads"
            raise EmulatorError(f"{verb} {buffer.name} without griddepcontrol.wait before: a launch before may still use it")

    # --- fences

    def fence(self, g: Gang, mask: Any, opcode: str) -> None:
        """A memory fence."""
        if self.races is None:
            return
        for w in g.active_warps(mask):
            if opcode.startswith("fence.mbarrier_init"):
                self.races.init_fence(g.warps[w])
            elif opcode.startswith(_FENCES) and "sync_restrict" not in opcode:
                self.races.fence(g.warps[w], g.lane_bits(mask, w), level(*opcode.split(".")))

    def proxy_fence(self, g: Gang, mask: Any) -> None:
        """``fence.proxy.async``."""
        if self.races is not None:
            for w in g.active_warps(mask):
                self.races.proxy_fence(g.warps[w])

    def wait_for_launches(self, g: Gang, mask: Any) -> None:
        """``griddepcontrol.wait``: the launches before are done."""
        if self.races is not None:
            for w in g.active_warps(mask):
                self.races.wait_for_launches(g.warps[w])
