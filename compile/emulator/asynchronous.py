"""Asynchronous copies at run time: ``cp.async``, ``cp.async.bulk``, their groups and completion.

Sources: PTX ISA 9.x, 9.7.9.25 ``cp.async``, 9.7.9.27 (``cp.async.bulk``, ``cp.reduce.async.bulk``, prefetch, commit and wait groups), 5.5
(multicast: the same window offset, and an mbarrier at the same offset, in every CTA of the mask).

An operation moves its bytes when it is executed, which the schedule decides: at once, or at any later time before somebody is told of its
completion. It then reads its source as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from densemoe.compile.emulator.clocks import ALL_LANES
from densemoe.compile.emulator.masks import some
from densemoe.compile.emulator.memory import RANK_SHIFT, SHARED_WINDOW, GlobalMemory, SharedMemory
from densemoe.compile.emulator.tile import reduce_elements
from densemoe.compile.emulator.warps import LANES, Condition, Groups
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.gang import Gang
    from densemoe.compile.emulator.memory import Buffer
    from densemoe.compile.emulator.races import Races
    from densemoe.compile.emulator.warps import Warp

__all__ = ["AsyncOperation", "Copies", "condition_of"]

_OFFSET = (1 << RANK_SHIFT) - 1
_ELEMENTS: dict[str, Any] = {
    "u32": np.uint32, "s32": np.uint32, "b32": np.uint32, "f32": np.uint32,
    "u64": np.uint64, "s64": np.uint64, "b64": np.uint64, "f64": np.uint64, "f16": np.uint16, "bf16": np.uint16,
}


def _of_lanes(value: Any, lanes: int, dtype: Any) -> Any:
    """A register, which is an int where it is the same in all lanes, as an array of one element a lane."""
    return np.full(lanes, value, dtype) if isinstance(value, int) else value.astype(dtype, copy=False)


class AsyncOperation:
    """One asynchronous operation.

    Attributes:
        action: does it.
        after: an operation that must be done first (of the same in-order pipe).
        what, issuer: for reports: as a string it is "`what` of `issuer`".
        done: it was executed.
        clock: for race detection: what it happens after.
        touches: slots of the CTAs whose shared or tensor memory it reads or writes, beside those of its signals.
        signals: slot and window offset of the mbarriers that it arrives on.
    """

    __slots__ = ("action", "after", "clock", "done", "issuer", "line", "listeners", "priority", "signals", "touches", "what")

    def __init__(
        self,
        action: Callable[[AsyncOperation], None],
        what: str,
        issuer: Warp | AsyncOperation,
        line: int,
        after: AsyncOperation | None = None,
        touches: Sequence[int] = (),
        signals: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.action, self.what, self.issuer, self.line, self.after = action, what, issuer, line, after
        self.signals, self.touches = signals, touches
        self.done = False
        self.clock: Any = None
        self.priority = 0.0
        self.listeners: list[Callable[[], None]] = []

    def __str__(self) -> str:
        return f"{self.what} of {self.issuer}"

    def needs(self, slot: int) -> bool:
        """Whether it reads, writes or arrives in the memory of a CTA."""
        return slot in self.touches or any(place[0] == slot for place in self.signals)

    @property
    def eligible(self) -> bool:
        """It may be executed now."""
        return self.after is None or self.after.done

    def execute(self) -> None:
        """Does it and tells those who wait."""
        try:
            self.action(self)
        except EmulatorError as error:
            if str(error).startswith("PTX line"):
                raise
            raise EmulatorError(f"PTX line {self.line} (asynchronous), {self}: {error}") from None
        self.done = True
        self.after = None
        for each in self.listeners:
            each()


def condition_of(operations: list[AsyncOperation], text: str) -> Condition | None:
    """Completion of all operations; None where they are done."""
    left = [each for each in operations if not each.done]
    if not left:
        return None
    condition = Condition(lambda: f"{text}: {', '.join(f'{each} of PTX line {each.line}' for each in left if not each.done)}")
    missing = [len(left)]

    def one() -> None:
        missing[0] -= 1
        if missing[0] == 0:
            condition.signal()

    for each in left:
        each.listeners.append(one)
    return condition


class Copies:
    """What `Machine` knows of asynchronous copies."""

    memory: GlobalMemory
    shared: SharedMemory
    clustered: bool
    cluster_size: int
    moved: dict[str, int]
    races: Races | None
    issued_by: dict[Warp, int] | None = None  # lanes of each warp, a bit each, that issue the instruction that runs; None for all

    def submit(self, operation: AsyncOperation) -> None:
        """Hands an operation to the schedule."""
        raise NotImplementedError

    def signal_bytes(self, place: tuple[int, int], nbytes: int, clock: Any) -> None:
        raise NotImplementedError

    def barrier_place(self, warp: Warp, address: int, own: bool = False) -> tuple[int, int]:
        raise NotImplementedError

    def check_waited(self, buffer: Buffer, clock: Any, write: bool) -> None:
        """Raises where an operation touches what a launch before may still use."""
        raise NotImplementedError

    def check_alive(self, slot: int) -> None:
        """Raises where a CTA of the cluster has ended: its shared memory is no longer there."""
        raise NotImplementedError

    # --- addresses

    def generic_shared(self, address: Any) -> Any:
        """Shared address of a generic one."""
        lowest = address if isinstance(address, int) else int(address.min())
        if lowest >= SHARED_WINDOW:
            return address - SHARED_WINDOW if isinstance(address, int) else address - np.uint64(SHARED_WINDOW)
        return address

    def window_range(self, warp: Warp, address: int, nbytes: int, alignment: int) -> tuple[int, int]:
        """Slot and offset of ``[address, address + nbytes)`` in shared memory.

        Raises:
            EmulatorError: out of bounds or misaligned.
        """
        slot = warp.cta.slot
        if self.clustered:
            rank = address >> RANK_SHIFT
            if rank >= self.cluster_size:
                raise EmulatorError(f"shared address {address:#x}: the cluster has {self.cluster_size} CTAs")
            slot += rank - warp.cta.rank
            address &= _OFFSET
            self.check_alive(slot)
        self.check_window(address, nbytes, alignment)
        return slot, address

    def check_window(self, offset: int, nbytes: int, alignment: int) -> None:
        """Raises where a range is out of a CTA's shared memory or misaligned."""
        if not self.shared.start <= offset <= offset + nbytes <= self.shared.end:
            raise EmulatorError(f"{nbytes} bytes at shared address {offset:#x} leave shared memory ({self.shared.start:#x} to {self.shared.end:#x})")
        if offset % alignment:
            raise EmulatorError(f"shared address {offset:#x} must be a multiple of {alignment}")

    def destinations(self, warp: Warp, slot: int, ctas: int | None) -> list[int]:
        """Slots that a copy writes: one, or those of a multicast mask."""
        if ctas is None:
            return [slot]
        if ctas >> self.cluster_size:
            raise EmulatorError(f"multicast mask {ctas:#x}: the cluster has {self.cluster_size} CTAs")
        first = warp.cta.slot - warp.cta.rank
        slots = [first + rank for rank in range(self.cluster_size) if ctas >> rank & 1]
        for each in slots:
            self.check_alive(each)
        return slots

    def write_shared(self, slot: int, offset: int, data: Any, operation: AsyncOperation) -> None:
        """Bytes that an asynchronous operation puts into shared memory."""
        start = slot * self.shared.stride + offset
        if self.races is not None:
            self.races.async_shared(operation, slot, offset, data.size, True)
        self.shared.data[start : start + data.size] = data
        self.shared.written[start : start + data.size] = 0xFF

    def read_shared(self, slot: int, offset: int, nbytes: int, operation: AsyncOperation) -> Any:
        """Bytes that an asynchronous operation takes from shared memory, a view."""
        self.shared.check_range(slot, offset, offset + nbytes)
        if self.races is not None:
            self.races.async_shared(operation, slot, offset, nbytes, False)
        start = slot * self.shared.stride + offset
        return self.shared.data[start : start + nbytes]

    # --- bulk copies

    def lanes_of(self, g: Gang, mask: Any, *operands: Any) -> list[tuple[Warp, int, list[Any]]]:
        """(warp, lane in the warp, operands as ints) of every active lane."""
        found = []
        issued: dict[Warp, int] = {}
        self.issued_by = None if mask is None else issued
        for lane in g.active_lanes(mask):
            values = [each if isinstance(each, int) or each is None else int(each[lane]) for each in operands]
            warp, lane = g.warps[lane // LANES], lane % LANES
            issued[warp] = issued.get(warp, 0) | 1 << lane
            found.append((warp, lane, values))
        return found

    def new_operation(
        self,
        g: Gang,
        warp: Warp,
        action: Callable[[AsyncOperation], None],
        text: str,
        after: Any = None,
        touches: Sequence[int] = (),
        signals: Sequence[tuple[int, int]] = (),
    ) -> AsyncOperation:
        """An operation that happens after everything its warp did so far."""
        operation = AsyncOperation(action, text, warp, g.current_line(), after, touches, signals)
        if self.races is not None:
            operation.clock = self.races.fork(warp, ALL_LANES if self.issued_by is None else self.issued_by[warp])
        return operation

    def bulk_load(self, g: Gang, mask: Any, target: Any, source: Any, size: Any, barrier: Any, ctas: Any, from_shared: bool) -> None:
        """``cp.async.bulk`` to shared memory, completing on an mbarrier."""
        for warp, _, (to, of, nbytes, bar, chosen) in self.lanes_of(g, mask, target, source, size, barrier, ctas):
            if nbytes % 16 or nbytes <= 0:
                raise EmulatorError(f"a bulk copy of {nbytes} bytes: a multiple of 16 needed")
            slot, offset = self.window_range(warp, to, nbytes, 16)
            bar_slot, bar_offset = self.barrier_place(warp, bar)
            if chosen is None and bar_slot != slot:
                raise EmulatorError("a bulk copy's destination and mbarrier lie in different CTAs")
            slots = self.destinations(warp, slot, chosen)
            if of % 16:
                raise EmulatorError(f"bulk copy from address {of:#x}: 16-byte alignment needed")
            if from_shared:
                self._shared_to_shared(g, warp, slot, offset, of, nbytes, (bar_slot, bar_offset))
                continue
            self.memory.find(of, nbytes)

            def action(
                operation: AsyncOperation, slots: list[int] = slots, offset: int = offset, of: int = of, n: int = nbytes, bar: int = bar_offset
            ) -> None:
                data = self.memory.bytes_at(of, n)
                self.check_waited(self.memory.find(of, n), operation.clock, False)
                for each in slots:
                    self.write_shared(each, offset, data, operation)
                for each in slots:
                    self.signal_bytes((each, bar), n, operation.clock)

            self.moved["bulk global to shared"] += nbytes
            signals = [(each, bar_offset) for each in slots]
            self.submit(self.new_operation(g, warp, action, f"bulk copy of {nbytes} bytes", touches=slots, signals=signals))

    def _shared_to_shared(self, g: Gang, warp: Warp, slot: int, offset: int, source: int, nbytes: int, bar: tuple[int, int]) -> None:
        from_slot, from_offset = self.window_range(warp, source, nbytes, 16)

        def action(operation: AsyncOperation) -> None:
            data = self.read_shared(from_slot, from_offset, nbytes, operation).copy()
            self.write_shared(slot, offset, data, operation)
            self.signal_bytes(bar, nbytes, operation.clock)

        self.moved["bulk shared to shared"] += nbytes
        self.submit(self.new_operation(g, warp, action, f"bulk copy of {nbytes} bytes", touches=(slot, from_slot), signals=(bar,)))

    def bulk_store(self, g: Gang, mask: Any, target: Any, source: Any, size: Any, reduction: str, kind: str) -> None:
        """``cp.async.bulk`` and ``cp.reduce.async.bulk`` from shared to global memory, in a bulk group."""
        for warp, lane, (to, of, nbytes) in self.lanes_of(g, mask, target, source, size):
            if nbytes % 16 or nbytes <= 0 or to % 16:
                raise EmulatorError(f"a bulk copy of {nbytes} bytes to address {to:#x}: multiples of 16 needed")
            slot, offset = self.window_range(warp, of, nbytes, 16)
            self.memory.find(to, nbytes)

            def action(operation: AsyncOperation, slot: int = slot, offset: int = offset, to: int = to, n: int = nbytes) -> None:
                data = self.read_shared(slot, offset, n, operation)
                self.check_waited(self.memory.find(to, n), operation.clock, True)
                if not reduction:
                    self.memory.bytes_at(to, n, write=True)[:] = data
                    return
                self.memory.bytes_at(to, n)
                place = self.memory.find(to, n)
                cells = place.data[to - place.address : to - place.address + n].view(_ELEMENTS[kind])
                cells[:] = reduce_elements(reduction, kind, cells, data.view(_ELEMENTS[kind])).view(cells.dtype)

            self.moved["bulk shared to global"] += nbytes
            operation = self.new_operation(g, warp, action, f"bulk store of {nbytes} bytes", touches=(slot,))
            warp.bulk.setdefault(lane, Groups()).open.append(operation)
            self.submit(operation)

    def bulk_prefetch(self, g: Gang, mask: Any, address: Any, size: Any) -> None:
        """``cp.async.bulk.prefetch.L2``: checked for bounds."""
        for _, _, (where, nbytes) in self.lanes_of(g, mask, address, size):
            if nbytes % 16 or where % 16:
                raise EmulatorError(f"a prefetch of {nbytes} bytes at {where:#x}: multiples of 16 needed")
            if nbytes:
                self.memory.find(where, nbytes)

    def bulk_commit(self, g: Gang, mask: Any) -> None:
        """``cp.async.bulk.commit_group``."""
        for warp, lane, _ in self.lanes_of(g, mask):
            groups = warp.bulk.get(lane)
            if groups is not None:
                groups.commit()

    def bulk_wait(self, g: Gang, mask: Any, newest: int, read: bool) -> bool:
        """``cp.async.bulk.wait_group``."""


        def conditions() -> list[Condition | None]:
            found: list[Condition | None] = [None] * len(g.warps)
            for w in g.active_warps(mask):
                warp = g.warps[w]
                mine = [groups for lane, groups in warp.bulk.items() if mask is None or mask[w * LANES + lane]]
                if self.races is not None:
                    warp.bulk_waited = [
                        each for groups in mine for group in groups.committed[: len(groups.committed) - newest] for each in group
                    ]
                found[w] = condition_of([each for groups in mine for each in groups.older_than(newest)], "cp.async.bulk.wait_group")
            return found

        if not g.await_all(conditions):
            return False
        if self.races is not None:
            for w in g.active_warps(mask):
                self.races.waited(g.warps[w], g.warps[w].bulk_waited)
        return True

    def st_async(self, g: Gang, mask: Any, target: Any, barrier: Any, size: int, values: tuple[Any, ...]) -> None:
        """``st.async``: a store to shared memory of the cluster that completes on an mbarrier there."""
        for warp, _, (to, bar, *parts) in self.lanes_of(g, mask, target, barrier, *values):
            data = np.frombuffer(b"".join(int(each).to_bytes(size, "little") for each in parts), np.uint8)
            slot, offset = self.window_range(warp, to, data.size, data.size)
            place = self.barrier_place(warp, bar)
            if place[0] != slot:
                raise EmulatorError("st.async to one CTA with an mbarrier of another")

            def action(operation: AsyncOperation, slot: int = slot, offset: int = offset, data: Any = data, place: tuple[int, int] = place) -> None:
                self.write_shared(slot, offset, data, operation)
                self.signal_bytes(place, data.size, operation.clock)

            self.moved["st.async"] += data.size
            self.submit(self.new_operation(g, warp, action, "st.async", touches=(slot,), signals=(place,)))

    # --- cp.async

    def cp_async(self, g: Gang, mask: Any, target: Any, source: Any, size: int, valid: Any) -> None:
        """``cp.async``: `valid` bytes of the source, the rest zero. One operation a warp."""
        self.issued_by = None  # every lane copies for itself
        operands = ((target, np.int64), (source, np.uint64), (size if valid is None else valid, np.int64))
        wanted = [_of_lanes(each, g.lanes, dtype) for each, dtype in operands]
        for w in g.active_warps(mask):
            warp = g.warps[w]
            own = slice(w * LANES, w * LANES + LANES)
            to, of, counts = (each[own] if mask is None else each[own][mask[own]] for each in wanted)
            wrong = (counts < 0) | (counts > size) | (of % np.uint64(size) != 0)
            if some(wrong):
                at = int(wrong.argmax())
                raise EmulatorError(f"cp.async of {int(counts[at])} of {size} bytes from address {int(of[at]):#x}")
            starts = self._starts(warp, to, size)
            whole, parts = counts == size, np.flatnonzero((counts > 0) & (counts < size)).tolist()
            buffers = [each for each, _, _ in self.memory.parts(of[whole], size)] if some(whole) else []
            buffers += [self.memory.find(int(of[lane]), int(counts[lane])) for lane in parts]

            def action(
                operation: AsyncOperation, starts: Any = starts, of: Any = of, counts: Any = counts, whole: Any = whole,
                parts: Sequence[int] = parts, buffers: Sequence[Buffer] = buffers,
            ) -> None:  # fmt: skip
                data = np.zeros((starts.size, size), np.uint8)
                if some(whole):
                    unit = min(size, 8)
                    data[whole] = self.memory.load(of[whole], unit, size // unit).reshape(-1, size // unit).view(np.uint8)
                for lane in parts:
                    data[lane, : counts[lane]] = self.memory.bytes_at(int(of[lane]), int(counts[lane]))
                for buffer in buffers:
                    self.check_waited(buffer, operation.clock, False)
                places = starts // size
                if self.races is not None:
                    self.races.async_pieces(operation, places, size)
                self.shared.data.reshape(-1, size)[places] = data
                self.shared.written.reshape(-1, size)[places] = 0xFF

            self.moved["cp.async"] += size * starts.size
            operation = self.new_operation(g, warp, action, "cp.async", touches=(warp.cta.slot,))
            warp.copies.setdefault(-1, Groups()).open.append(operation)
            self.submit(operation)

    def _starts(self, warp: Warp, addresses: Any, size: int) -> Any:
        """Index in all windows of each of several shared addresses of `size` bytes, checked as `window_range`."""
        low, high = int(addresses.min()), int(addresses.max())
        if self.clustered or low < self.shared.start or high + size > self.shared.end or some(addresses % size != 0):
            places = [self.window_range(warp, each, size, size) for each in addresses.tolist()]
            return np.array([slot * self.shared.stride + offset for slot, offset in places], np.int64)
        return addresses + warp.cta.slot * self.shared.stride

    def cp_commit(self, g: Gang, mask: Any) -> None:
        """``cp.async.commit_group``; groups are kept by warp."""
        for w in g.active_warps(mask):
            g.warps[w].copies.setdefault(-1, Groups()).commit()

    def cp_wait(self, g: Gang, mask: Any, newest: int | None) -> bool:
        """``cp.async.wait_group`` and ``wait_all``."""

        def conditions() -> list[Condition | None]:
            found: list[Condition | None] = [None] * len(g.warps)
            for w in g.active_warps(mask):
                groups = g.warps[w].copies.get(-1)
                if groups is None:
                    continue
                if self.races is not None:
                    older = groups.committed[: len(groups.committed) - newest] if newest else [*groups.committed]
                    done = [each for group in older for each in group] + (groups.open if newest is None else [])
                    g.warps[w].copies_waited = done
                left = groups.older_than(newest or 0)
                if newest is None:
                    left = left + [each for each in groups.open if not each.done]
                found[w] = condition_of(left, "cp.async.wait")
            return found

        if not g.await_all(conditions):
            return False
        if self.races is not None:
            for w in g.active_warps(mask):
                self.races.waited(g.warps[w], g.warps[w].copies_waited)
        return True

    def cp_mbarrier_arrive(self, g: Gang, mask: Any, address: Any, noinc: bool) -> None:
        """``cp.async.mbarrier.arrive``: one arrival a thread when its earlier copies are done."""
        for warp, _, (where,) in self.lanes_of(g, mask, address):
            place = self.barrier_place(warp, where, True)
            groups = warp.copies.get(-1) or Groups()
            before = [each for group in [*groups.committed, groups.open] for each in group if not each.done]
            barrier = self.mbarrier_at(place)
            if not noinc:
                barrier.pending += 1
            clock = self.races.fork(warp) if self.races is not None else None
            if not before:
                self.signal_arrival(place, 1, clock)
                continue
            missing = [len(before)]

            def one(missing: list[int] = missing, place: tuple[int, int] = place, clock: Any = clock) -> None:
                missing[0] -= 1
                if missing[0] == 0:
                    self.signal_arrival(place, 1, clock)

            for each in before:
                each.listeners.append(one)

    def mbarrier_at(self, place: tuple[int, int]) -> Any:
        raise NotImplementedError

    def signal_arrival(self, place: tuple[int, int], count: int, clock: Any) -> None:
        raise NotImplementedError
