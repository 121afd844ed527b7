"""Data races by vector clocks: shared memory, tensor memory, and the proxies between them.

Sources: PTX ISA 9.x, 8 (memory consistency, causality order), 8.? and 9.7.13.4 ``fence.proxy.async`` (generic against asynchronous proxy),
9.7.16.6 (``tcgen05`` ordering, ``tcgen05.fence``), 9.7.13.15 (``mbarrier`` release and acquire); FastTrack (Flanagan, Freund) for epochs.

Every warp and every asynchronous operation of a cluster is a unit with a clock. A clock has three parts, each a vector over units:

- ``order``: what happens before (barriers, mbarriers, completion);
- ``proxy``: generic writes that a proxy fence made visible to asynchronous operations;
- ``tensor``: accesses of tensor memory that a ``tcgen05.fence`` pair, or a commit, ordered.

Shared memory is watched in granules of 4 bytes, tensor memory in columns of 32 lanes. For each granule the last write and up to 8 last reads
are kept, so that a race with an older read may be missed; nothing is reported that is ordered. Reads are forgotten when a write follows that knows
of them. Where some lanes of a warp issue an operation, they may not rely on what its other lanes wrote since the last ``bar.warp.sync``; lanes
of one warp among themselves: see ``lane_races``. Global memory: see ``global_races``. Ranges that asynchronous operations write and read whole have
``spans`` in place of marks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from densemoe.compile.emulator.clocks import ALL_LANES, READERS, Clock, Issuer, Marks, Vector
from densemoe.compile.emulator.global_races import GlobalRaces
from densemoe.compile.emulator.lane_races import PARTLY, SEVERAL, LaneRaces
from densemoe.compile.emulator.masks import every, some
from densemoe.compile.emulator.spans import GRANULE, PAGE, Operand, Spans, dissolve_columns
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.asynchronous import AsyncOperation
    from densemoe.compile.emulator.gang import Gang
    from densemoe.compile.emulator.machine import Cta
    from densemoe.compile.emulator.warps import Warp

__all__ = ["Clock", "Races", "lane_numbers", "level"]

_ASYNC_UNITS: Final = 64  # asynchronous operations told apart at a time; older ones share a unit
_FORKED: Final = np.array([0, 1, 4])  # of what a warp knows: what an operation that it issues knows
_QUARTER: Final = 32  # lanes of tensor memory in a granule
_LANES: Final = 128
_COLUMNS: Final = 512


def lane_numbers(g: Gang, picked: Any) -> Any:
    """The number of each lane in its warp, or of the picked lanes."""
    return (np.arange(g.lanes) if picked is None else picked) % 32


def level(*parts: str) -> int:
    """Of a scope among parts of an opcode: 0 for the CTA, 1 for the cluster, 2 beyond; a fence without one is the widest."""
    return 0 if "cta" in parts else 1 if "cluster" in parts else 2


def _cells(rows: slice, column: int, width: int) -> tuple[slice, slice]:
    """Tensor memory granules of lanes `rows`."""
    return slice(rows.start // _QUARTER, (rows.stop - 1) // _QUARTER + 1), slice(column, column + width)


class Races:
    """The clocks of all warps of a wave, and the marks of their memories.

    Args:
        warps: of all resident CTAs; ``warp.row`` is their index, ``warp.unit`` their number in their cluster.
        cluster_warps: warps of a cluster.
        window: bytes of a CTA's shared window.
        ctas: resident.
    """

    def __init__(
        self, warps: list[Warp], cluster_warps: int, window: int, ctas: int, lints: dict[str, None], tensor_fences: bool = True
    ) -> None:
        self.tensor_fences = tensor_fences
        self.cluster_warps = cluster_warps
        self.units = cluster_warps + _ASYNC_UNITS + 1
        #: unit of the launches before: who waited for them knows its tick 1
        self.before = self.units - 1
        #: of each warp: what it knows; the first three are what it releases
        self.parts = np.zeros((len(warps), 5, self.units), np.int32)
        self.order, self.proxy, self.tensor_out, self.tensor_in, self.tensor = self.parts.transpose(1, 0, 2)
        rows = np.arange(len(warps))
        self.own = np.array([warp.unit for warp in warps])
        self.order[rows, self.own] = 1
        self.window_granules = window // GRANULE
        self.shared = Marks(ctas * self.window_granules)
        #: lane of each granule's last generic write, or SEVERAL; with PARTLY where it wrote a part
        self.write_lane = np.zeros(ctas * self.window_granules, np.uint8)
        self.of_lanes = LaneRaces(ctas * self.window_granules)
        #: pages of shared memory that were accessed in pieces other than 16 bytes
        self.generic_pages = np.zeros(ctas * self.window_granules // PAGE + 1, np.bool_)
        #: granules of mbarriers, and the pages that have some
        self.guarded = np.zeros(ctas * self.window_granules, np.bool_)
        self.guarded_pages = np.zeros_like(self.generic_pages)
        #: of pages that lanes never accessed and that hold no mbarrier
        self.spans = Spans(self.generic_pages.size)
        self.tmem: dict[int, tuple[Marks, Spans]] = {}
        #: own tick of each warp when its lanes were synchronised last
        self.converged = np.zeros(len(warps), np.int32)
        #: the same where that ordered their memory accesses, and of each warp's last generic write of shared memory
        self.met = np.zeros(len(warps), np.int32)
        self.last_write = np.zeros(len(warps), np.int32)
        self.ticks = [0] * _ASYNC_UNITS
        self.next_async = 0
        self.lints = lints
        self.loads_open: dict[int, bool] = {}
        #: by a warp's row and a level: what fences made ready for relaxed arrivals and writes after them, and what relaxed waits and reads saw that
        #: the next fence may rely on, with the lanes whose it is
        self.ready: dict[tuple[int, int], tuple[int, Clock]] = {}
        self.seen: dict[tuple[int, int], tuple[int, Clock]] = {}
        #: by level, group of CTAs at that level, and address: what was released there
        self.locations: dict[tuple[int, int, int], Clock] = {}
        self.everywhere: GlobalRaces | None = None
        self.unfenced: dict[int, list[Any]] = {}

    # --- synchronisation

    def _tick(self, warp: Warp) -> None:
        self.parts[warp.row, 0, warp.unit] += 1
        if self.everywhere is not None:
            self.everywhere.tick(warp.row)

    def _wide(self, row: int, lanes: int = ALL_LANES) -> Vector | None:
        return None if self.everywhere is None else self.everywhere.released(row, lanes)

    def _release(self, clock: Clock | None, warp: Warp, lanes: int = ALL_LANES) -> Clock:
        own = Clock(self.parts[warp.row, :3], wide=self._wide(warp.row, lanes))
        if clock is None:
            clock = own.copy()
        else:
            clock.join(own)
        self._tick(warp)
        return clock

    def _acquire(self, clock: Clock | None, warp: Warp, lanes: int = ALL_LANES) -> None:
        if clock is None:
            return
        row = warp.row
        own, told = self.parts[row], clock.parts
        np.maximum(own[:2], told[:2], out=own[:2])
        np.maximum(own[3], told[2], out=own[3])
        if self.everywhere is not None and clock.wide is not None:
            self.everywhere.acquired(row, clock.wide, lanes)

    def _release_ready(self, clock: Clock | None, warp: Warp, lanes: int = ALL_LANES, at: int = 0) -> Clock | None:
        """A relaxed arrival or write: it releases what fences of its lanes before it made ready, of scope `at` or wider."""
        fenced, ready = self.ready.get((warp.row, at), (0, None))
        if ready is None or not fenced & lanes:
            return clock
        if clock is None:
            return ready.copy()
        clock.join(ready)
        return clock

    def _see(self, clock: Clock | None, warp: Warp, lanes: int = ALL_LANES, at: int = 0) -> None:
        """A relaxed wait or read: a fence of its lanes after it, of scope `at` or wider, acquires what it saw."""
        if clock is None:
            return
        lanes_before, seen = self.seen.get((warp.row, at), (0, None))
        if seen is None:
            seen = clock.copy()
        else:
            seen.join(clock)
        self.seen[warp.row, at] = (lanes | lanes_before, seen)

    def fence(self, warp: Warp, lanes: int = ALL_LANES, scope: int = 2) -> None:
        """``fence.acq_rel``, ``.sc`` and ``membar`` by lanes of a warp; `scope` is a `level`."""
        for at in range(scope + 1):
            seers, seen = self.seen.get((warp.row, at), (0, None))
            if seers & lanes:
                del self.seen[warp.row, at]
                self._acquire(seen, warp, lanes)
        made = self._release(None, warp, lanes)
        for at in range(scope + 1):
            self._make_ready(warp, at, lanes, made.copy())

    def fenced(self, g: Gang) -> bool:
        """Whether a fence of one of the warps made something ready for relaxed writes after it."""
        return bool(self.ready) and any((warp.row, 0) in self.ready for warp in g.warps)

    def _make_ready(self, warp: Warp, at: int, lanes: int, made: Clock) -> None:
        fenced, ready = self.ready.get((warp.row, at), (0, None))
        if ready is not None and fenced & ~lanes:
            made.join(ready)
            lanes |= fenced
        self.ready[warp.row, at] = (lanes, made)

    def wait_for_launches(self, warp: Warp) -> None:
        """``griddepcontrol.wait``."""
        self.order[warp.row, self.before] = 1

    def location(self, warp: Warp, lanes: int, address: int, scope: int, acquire: bool | None, release: bool | None) -> None:
        """A strong access of a word of global memory by lanes of a warp.

        What it releases is for those whom its scope and theirs include: it is kept for its CTA, its cluster and everybody, up to its scope (8.7,
        morally strong operations).

        Args:
            scope: a `level`.
            acquire, release: where it reads and writes, else None; False is relaxed.
        """
        groups = (warp.cta.slot, warp.cta.cluster.first_slot, 0)
        released = self._release(None, warp, lanes) if release else None
        for at in range(scope + 1):
            place = (at, groups[at], address)
            clock = self.locations.get(place)
            if acquire:
                self._acquire(clock, warp, lanes)
            elif acquire is not None:
                self._see(clock, warp, lanes, at)
            if released is not None:
                if clock is None:
                    self.locations[place] = released.copy()
                else:
                    clock.join(released)
            elif release is not None:
                ready = self._release_ready(clock, warp, lanes, at)
                if ready is not None:
                    self.locations[place] = ready

    def barrier_arrive(self, barrier: Any, warp: Warp, release: bool) -> None:
        """A CTA or cluster barrier is reached."""
        barrier.clock = self._release(barrier.clock, warp) if release else self._release_ready(barrier.clock, warp)

    def warp_converged(self, warp: Warp, ordered: bool) -> None:
        """An instruction for which the lanes of a warp wait for each other; memory accesses are `ordered` by ``bar.warp.sync`` alone."""
        self.converged[warp.row] = self.order[warp.row, warp.unit]
        if ordered:
            self.met[warp.row] = self.order[warp.row, warp.unit]
            if self.everywhere is not None:
                self.everywhere.met(warp.row)
        self._tick(warp)

    def barrier_leave(self, barrier: Any, warp: Warp) -> None:
        """A CTA or cluster barrier is left."""
        self.warp_converged(warp, True)
        self._acquire(barrier.completed_clock, warp)

    def mbarrier_init(self, barrier: Any, warp: Warp, lane: int) -> None:
        """``mbarrier.init`` by a lane of a warp."""
        barrier.made_by = (warp.row, warp.unit, int(self.order[warp.row, warp.unit]), lane)
        barrier.fenced = False
        self.unfenced.setdefault(warp.row, []).append(barrier)

    def guard(self, slot: int, offset: int, live: bool) -> None:
        """An mbarrier is made, or invalidated: only mbarrier operations may touch its 8 bytes between."""
        first = slot * self.window_granules + offset // GRANULE
        self._dissolve(first // PAGE, first // PAGE + 1)
        self.guarded[first : first + 2] = live
        self.guarded_pages[first // PAGE] |= live

    def _refuse_guarded(self, places: Any, pages: Any, words: int = 1) -> None:
        if some(self.guarded_pages[pages]):
            hit = self.guarded.reshape(-1, words)[places]
            if some(hit):
                at, word = divmod(int(hit.argmax()), words)
                place = self._place(places, at) * words + word
                raise EmulatorError(f"shared memory at {self._offset(place):#x} is an mbarrier: mbarrier operations alone may touch it")

    def init_fence(self, warp: Warp) -> None:
        """``fence.mbarrier_init`` or ``fence.proxy.async``: asynchronous operations may use the mbarriers that the warp made."""
        barriers = self.unfenced.pop(warp.row, ())
        for barrier in barriers:
            barrier.fenced = True
        if barriers:  # a relaxed arrival on the cluster's barrier tells of them
            row = warp.row
            ready = np.zeros((3, self.units), np.int32)
            ready[0, warp.unit] = self.order[row, warp.unit]
            wide = self._wide(row)
            made = Clock(ready, wide=None if wide is None else np.zeros_like(wide))
            for at in (0, 1):
                self._make_ready(warp, at, ALL_LANES, made.copy())

    def _check_made(self, barrier: Any, warp: Warp, lane: int) -> None:
        row, unit, tick, maker = barrier.made_by
        known = self.order[warp.row, unit] if row != warp.row else tick if lane == maker else self.converged[row]
        if known < tick:
            raise EmulatorError(f"{barrier.slot_text} is used by {warp} without waiting for its initialisation")

    def mbarrier_arrive(self, barrier: Any, warp: Warp, lane: int, relaxed: bool = False) -> None:
        """An arrival by a lane of a warp."""
        self._check_made(barrier, warp, lane)
        if self.loads_open.get(warp.row):
            self.lints["a warp arrives on an mbarrier before tcgen05.wait::ld of its loads"] = None
        release = self._release_ready if relaxed else self._release
        barrier.clock = release(barrier.clock, warp, 1 << lane)

    def mbarrier_join(self, barrier: Any, clock: Clock) -> None:
        """An arrival, or bytes, of an asynchronous operation."""
        if not barrier.fenced:
            raise EmulatorError(
                f"{barrier.slot_text} is used by an asynchronous operation without fence.mbarrier_init or fence.proxy.async after its initialisation"
            )
        if barrier.clock is None:
            barrier.clock = clock.copy()
        else:
            barrier.clock.join(clock)

    def mbarrier_observe(self, barrier: Any, warp: Warp, lane: int, relaxed: bool = False) -> None:
        """A warp sees a completed phase; `lane` is the only one that looks, or -1."""
        self._check_made(barrier, warp, lane)
        lanes = ALL_LANES if lane < 0 else 1 << lane
        if relaxed:
            self._see(barrier.completed_clock, warp, lanes)
        else:
            self._acquire(barrier.completed_clock, warp, lanes)

    def proxy_fence(self, warp: Warp) -> None:
        """``fence.proxy.async``."""
        self.init_fence(warp)
        row = warp.row
        np.maximum(self.proxy[row], self.order[row], out=self.proxy[row])
        self._tick(warp)

    def tensor_order(self, warp: Warp, what: str) -> None:
        """``tcgen05.wait::ld``, ``wait::st``, ``fence::before_thread_sync`` or ``fence::after_thread_sync``."""
        row = warp.row
        if what == "fence::after_thread_sync":
            np.maximum(self.tensor[row], self.tensor_in[row], out=self.tensor[row])
        elif what == "fence::before_thread_sync":
            for known in (self.tensor[row], self.tensor_in[row]):
                np.maximum(self.tensor_out[row], known, out=self.tensor_out[row])
            self.tensor_out[row, warp.unit] = self.order[row, warp.unit]
            self._tick(warp)
        elif what == "wait::ld":
            self.loads_open.pop(row, None)

    # --- asynchronous operations

    def fork(self, warp: Warp, lanes: int = ALL_LANES) -> Clock:
        """The clock of an operation that lanes of a warp issue, which do not wait for the others."""
        row = warp.row
        number = self.next_async
        self.next_async = (number + 1) % _ASYNC_UNITS
        self.ticks[number] += 1
        unit, tick = self.cluster_warps + number, self.ticks[number]
        own = self.parts[row]
        parts = own.take(_FORKED, axis=0)
        parts[2, warp.unit] = own[0, warp.unit]
        parts[:, unit] = tick
        clock = Clock(parts, unit, tick, self._wide(row))
        if lanes != ALL_LANES:
            fresh = self.last_write[row] > self.met[row]
            clock.issuer = Issuer(warp.unit, lanes if fresh else ALL_LANES, int(self.converged[row]), int(self.met[row]))
        self._tick(warp)
        return clock

    def in_pipe(self, operation: AsyncOperation, state: Any) -> None:
        """An operation of an in-order pipe happens after the one before it."""
        clock: Clock = operation.clock
        before: Clock | None = state.clock
        if before is not None:
            clock.join(before)
        state.clock = clock

    def waited(self, warp: Warp, operations: list[AsyncOperation]) -> None:
        """A warp waited for operations by their groups."""
        for each in operations:
            if each.clock is not None:
                self._acquire(each.clock, warp)

    def _name(self, unit: int) -> str:
        return f"warp {unit} of the cluster" if unit < self.cluster_warps else "an asynchronous operation"

    def async_shared(self, operation: AsyncOperation, slot: int, offset: int, nbytes: int, write: bool) -> None:
        """An asynchronous operation reads or writes a range of shared memory."""
        first = slot * self.window_granules + offset // GRANULE
        last = first + -(-nbytes // GRANULE)
        page, end = first // PAGE, -(-last // PAGE)
        clock: Clock = operation.clock
        whole = not (first | last) % PAGE
        if write:
            if whole and self.spans.write(page, end, clock.unit, clock.tick, clock.order):
                return
        elif self.spans.read(page, end, clock.unit, clock.tick, slice(first, last), clock.order):
            return
        self._dissolve(page, end)
        plain = not ((offset | nbytes) % 16 or some(self.generic_pages[page:end]))
        self._async(operation, slice(first, last), slice(first, last, 4 if plain else 1), write)
        if write and whole and plain and not some(self.guarded_pages[page:end]):
            self.spans.put(page, end, clock.unit, clock.tick)

    def async_pieces(self, operation: AsyncOperation, places: Any, nbytes: int) -> None:
        """An asynchronous operation writes pieces of 4, 8 or 16 bytes of shared memory, at element numbers `places` of that size."""
        words = nbytes // GRANULE
        of_pieces = places * words // PAGE
        pages = np.unique(of_pieces)
        for page in pages.tolist():
            self._dissolve(page, page + 1)
        self._refuse_guarded(places, of_pieces, words)
        where = places if words == 1 else (places[:, None] * words + np.arange(words)).reshape(-1)
        plain = words == 4 and not some(self.generic_pages[pages])
        self._async(operation, where, places * words if plain else where, True)

    def async_operand(self, operation: AsyncOperation, operand: Operand) -> None:
        """An asynchronous operation reads an operand in shared memory."""
        marks, clock, pages = self.shared, operation.clock, operand.pages
        if self.spans.read(pages.start, pages.stop, clock.unit, clock.tick, operand.rows, clock.order):
            return
        self._dissolve(pages.start, pages.stop)
        if some(self.generic_pages[pages]):
            where = (operand.starts[:, None] + np.arange(4)).reshape(-1)
            self._async(operation, where, where, False)
            return
        self._check_async(operation, operand.starts, False)
        reader = clock.unit % READERS
        marks.read_unit[reader].reshape(-1, 4)[operand.rows] = clock.unit
        marks.read_tick[reader].reshape(-1, 4)[operand.rows] = clock.tick

    def _dissolve(self, page: int, end: int) -> None:
        """Marks what spans say of pages of shared memory."""
        marks = self.shared
        for span in self.spans.take(page, end):
            first, last = span.first * PAGE, span.end * PAGE
            marks.forget(slice(first, last), span.unit, span.tick)
            for unit, tick, what in span.reads:
                if isinstance(what, slice):
                    marks.read(slice(max(what.start, first), min(what.stop, last)), unit, tick)
                else:  # 16-byte granules
                    rows = what[(what >= first // 4) & (what < last // 4)]
                    marks.read_unit[unit % READERS].reshape(-1, 4)[rows] = unit
                    marks.read_tick[unit % READERS].reshape(-1, 4)[rows] = tick

    def _accessed(self, pages: Any) -> None:
        """Lanes access pages of shared memory for the first time."""
        for page in np.unique(pages[~self.generic_pages[pages]]).tolist():
            self._dissolve(page, page + 1)
        self.generic_pages[pages] = True

    def _async(self, operation: AsyncOperation, where: Any, checked: Any, write: bool) -> None:
        """Checks `checked` (every fourth granule where only whole 16 bytes were accessed) and marks `where`."""
        clock: Clock = operation.clock
        self._check_async(operation, checked, write)
        if write:
            self.shared.wrote(where, clock.unit, clock.tick)
        else:
            self.shared.read(where, clock.unit, clock.tick)

    def _check_async(self, operation: AsyncOperation, where: Any, write: bool) -> None:
        clock: Clock = operation.clock
        marks = self.shared
        if isinstance(where, slice):
            self._refuse_guarded(slice(where.start, where.stop), slice(where.start // PAGE, where.stop // PAGE + 1))
        bad = marks.unordered_write(where, clock.sees(self.cluster_warps))
        if some(bad):
            at = int(bad.argmax())
            place = self._place(where, at)
            unit = int(marks.write_unit[place])
            ordered = clock.order[unit] >= marks.write_tick[place]
            reason = "without fence.proxy.async between" if ordered else "without synchronisation between"
            raise EmulatorError(
                f"race: {'writes' if write else 'reads'} shared memory at {self._offset(place):#x} that {self._name(unit)} wrote, {reason}"
            )
        issuer = clock.issuer
        if issuer is not None and issuer.lanes != ALL_LANES:
            self._check_lanes(issuer, where, write)
        if write:
            known = clock.order
            if issuer is not None:
                known = known.copy()
                known[issuer.unit] = issuer.read
            found = marks.unordered_read(where, known)
            if found is not None:
                place = self._place(where, found[0])
                raise EmulatorError(f"race: overwrites shared memory at {self._offset(place):#x} that {self._name(found[1])} may still read")

    def _check_lanes(self, issuer: Issuer, where: Any, write: bool) -> None:
        marks, lane = self.shared, self.write_lane[where] & (PARTLY - 1)
        others = (lane != SEVERAL) & ((issuer.lanes >> lane.astype(np.int64) & 1) == 0)
        bad = others & (marks.write_unit[where] == issuer.unit) & (marks.write_tick[where] > issuer.written)
        if bad.any():
            at = int(bad.argmax())
            raise EmulatorError(
                f"race: {'writes' if write else 'reads'} shared memory at {self._offset(self._place(where, at)):#x} that lane {int(lane[at])} of the "
                "warp wrote and another lane issued this for, without bar.warp.sync between"
            )

    @staticmethod
    def _place(where: Any, at: int) -> int:
        return where.start + at * (where.step or 1) if isinstance(where, slice) else int(where[at])

    def _offset(self, place: int) -> int:
        return place % self.window_granules * GRANULE

    # --- generic accesses

    def rows(self, g: Gang, picked: Any) -> Any:
        """The row of each lane's warp, or of the picked lanes'."""
        rows = g.race_rows
        if rows is None:
            rows = g.race_rows = np.repeat(np.array([warp.row for warp in g.warps]), 32)
        return rows if picked is None else rows[picked]

    def generic(self, g: Gang, index: Any, picked: Any, nbytes: int, write: bool, several: bool = False) -> None:
        """Lanes of a gang access shared memory at element numbers `index` of `nbytes` bytes; `several`: of a store by many lanes to one place the one
        that is picked stands for all."""
        lanes: Any = SEVERAL
        if isinstance(index, int):
            places = np.full(len(g.warps), index, np.int64)
            rows = np.array([warp.row for warp in g.warps])
            if picked is not None and len(g.warps) > 1:
                rows = np.unique(self.rows(g, picked))
                places = np.full(rows.size, index, np.int64)
            if picked is not None and picked.size == 1:
                lanes = int(picked[0]) % 32
        else:
            places, rows = index, self.rows(g, picked)
            if not several:
                lanes = lane_numbers(g, picked)
        words = max(nbytes // GRANULE, 1)  # of an element, which lies in one page
        if nbytes < GRANULE:
            places = places * nbytes // GRANULE
        marks = self.shared.elements(words)
        pages = places * words // PAGE
        self._refuse_guarded(places, pages, words)
        if not every(self.generic_pages[pages]):
            self._accessed(pages)
        row, units = rows[:, None], self.own[rows]
        writers, written = marks.write_unit.take(places, axis=0), marks.write_tick.take(places, axis=0)
        bad = self.order[row, writers] < written
        if some(bad):
            self._report(places, rows, bad, marks.write_unit, "writes" if write else "reads", "wrote")
        met = self.met[rows]
        own = (writers == units[:, None]) & (written > met[:, None])
        if some(own):
            bad = self.of_lanes.written(places, lanes, own, self.write_lane.reshape(-1, words))
            if some(bad):
                self._report_lanes(places, lanes, bad, "writes" if write else "reads", "wrote")
        now = self.order[rows, units]
        if write:
            ticks = marks.read_tick.take(places, axis=1)
            for reader in np.flatnonzero(ticks.any(axis=(1, 2))).tolist() if np.count_nonzero(ticks) else ():
                bad = self.order[row, marks.read_unit[reader].take(places, axis=0)] < ticks[reader]
                if some(bad):
                    self._report(places, rows, bad, marks.read_unit[reader], "overwrites", "may still read")
            bad = self.of_lanes.may_still_read(places, words, lanes, units, met)
            if some(bad):
                self._report_lanes(places, lanes, bad, "overwrites", "may still read")
            marks.wrote(places, units[:, None], now[:, None])
            by = lanes | (PARTLY if nbytes < GRANULE else 0)
            self.write_lane.reshape(-1, words)[places] = by if isinstance(by, int) else by[:, None]
            self.last_write[rows] = now
        else:
            slots = units % READERS
            marks.read_unit[slots, places] = units[:, None]
            marks.read_tick[slots, places] = now[:, None]
            if nbytes >= GRANULE:
                bits = np.uint32(1) << lane_numbers(g, picked).astype(np.uint32)
                if isinstance(lanes, int):  # a place a warp, which all of its lanes that are picked read
                    of_warps = np.zeros(self.own.size, np.uint32)
                    np.bitwise_or.at(of_warps, self.rows(g, picked), bits)
                    bits = of_warps[rows]
                self.of_lanes.read(places, words, bits, units, now, met)

    def _report_lanes(self, places: Any, lanes: Any, bad: Any, verb: str, other: str) -> None:
        at, word = divmod(int(bad.argmax()), bad.shape[1])
        place = int(places[at]) * bad.shape[1] + word
        who = "every lane" if isinstance(lanes, int) and lanes == SEVERAL else f"lane {lanes if isinstance(lanes, int) else int(lanes[at])}"
        raise EmulatorError(
            f"race: {who} of a warp {verb} shared memory at {self._offset(place):#x} that another lane of it {other}, without bar.warp.sync between"
        )

    def _report(self, places: Any, rows: Any, bad: Any, units: Any, verb: str, other: str) -> None:
        lane, word = divmod(int(bad.argmax()), bad.shape[1])
        place = int(places[lane])
        raise EmulatorError(
            f"race: warp {int(self.own[rows[lane]])} of the cluster {verb} shared memory at {self._offset(place * bad.shape[1] + word):#x} that "
            f"{self._name(int(units[place, word]))} {other}, without synchronisation between"
        )

    def plain_shared(self, warp: Warp, address: int, nbytes: int) -> None:
        """A warp writes a few bytes, at an index of all windows."""
        where = slice(address // GRANULE, -(-(address + nbytes) // GRANULE))
        self._accessed(np.array([address // GRANULE // PAGE]))
        self.shared.wrote(where, warp.unit, int(self.order[warp.row, warp.unit]))

    # --- tensor memory

    def _marks(self, cta: Cta) -> tuple[Marks, Spans]:
        found = self.tmem.get(cta.slot)
        if found is None:
            found = self.tmem[cta.slot] = (Marks(_LANES // _QUARTER, _COLUMNS), Spans(_COLUMNS))
        return found

    def tensor_access(self, warp: Warp, cta: Cta, rows: slice, column: int, width: int, write: bool) -> None:
        """``tcgen05.ld`` and ``st``."""
        marks, spans = self._marks(cta)
        dissolve_columns(marks, spans, column, column + width)
        where = _cells(rows, column, width)
        known = self.tensor[warp.row].copy()
        known[warp.unit] = self.order[warp.row, warp.unit]
        tick = int(self.order[warp.row, warp.unit])
        self._tensor(marks, where, known, self.order[warp.row], write, warp)
        if write:
            marks.wrote(where, warp.unit, tick)
        else:
            self.loads_open[warp.row] = True
            marks.read(where, warp.unit, tick)

    def tensor_async(self, operation: AsyncOperation, cta: Cta, column: int, width: int, write: bool) -> None:
        """``tcgen05.mma`` and ``cp``, of all lanes."""
        clock: Clock = operation.clock
        marks, spans = self._marks(cta)
        end, known = column + width, clock.tensor
        if write:
            if spans.write(column, end, clock.unit, clock.tick, known):
                return
        elif spans.read(column, end, clock.unit, clock.tick, slice(column, end), known):
            return
        dissolve_columns(marks, spans, column, end)
        where = _cells(slice(0, _LANES), column, width)
        self._tensor(marks, where, known, clock.order, write, operation)
        if write:
            marks.wrote(where, clock.unit, clock.tick)
            spans.put(column, end, clock.unit, clock.tick)
        else:
            marks.read(where, clock.unit, clock.tick)

    def _tensor(self, marks: Marks, where: tuple[slice, slice], known: Vector, order: Vector, write: bool, who: Warp | AsyncOperation) -> None:
        bad = marks.unordered_write(where, known)
        if some(bad):
            at = int(bad.argmax())
            unit, tick, what = int(marks.write_unit[where].flat[at]), int(marks.write_tick[where].flat[at]), "wrote"
        elif write:
            found = marks.unordered_read(where, known)
            if found is None:
                return
            at, unit = found
            what, tick = "may still read", int(marks.read_tick[unit % READERS][where].flat[at])
        else:
            return
        reason = "without tcgen05.fence between" if order[unit] >= tick else "without synchronisation between"
        if order[unit] >= tick and not self.tensor_fences:
            self.lints["accesses of tensor memory are ordered by an mbarrier or barrier alone, without tcgen05.fence"] = None
            if known is not order:
                self._tensor(marks, where, order, order, write, who)
            return
        column = where[1].start + at % (where[1].stop - where[1].start)
        raise EmulatorError(f"race: {who} {'writes' if write else 'reads'} tensor memory column {column} that {self._name(unit)} {what}, {reason}")
