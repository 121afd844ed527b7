"""Barriers at run time: named CTA barriers, cluster barriers, mbarriers; votes and shuffles between lanes.

Sources: PTX ISA 9.x, 9.7.13.1 ``bar``/``barrier``, 9.7.13.2 ``bar.warp.sync``, 9.7.13.3 ``barrier.cluster``, 9.7.13.8–10 ``vote``, ``match``,
``redux``, 9.7.13.15 ``mbarrier`` (phases, pending and transaction counts), 9.7.13.16 ``elect.sync``, 9.7.9.6 ``shfl.sync``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from densemoe.compile.emulator.memory import RANK_SHIFT, SharedMemory
from densemoe.compile.emulator.warps import LANES, Condition
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.gang import Gang
    from densemoe.compile.emulator.races import Clock, Races
    from densemoe.compile.emulator.warps import Warp

__all__ = ["CtaBarrier", "MBarrier", "Synchronisation"]

_LARGEST_COUNT = (1 << 20) - 1  # of arrivals and of transactions (9.7.13.15.2)
_OFFSET = (1 << RANK_SHIFT) - 1


class MBarrier:
    """An mbarrier object.

    Attributes:
        count: arrivals that a phase needs.
        pending: arrivals that the current phase still needs.
        transactions: bytes that the current phase still waits for; may be negative where they came before they were expected.
        phase: phases completed; its lowest bit is the parity of the current, incomplete one.
        condition: completion of the current phase.
    """

    __slots__ = ("clock", "completed_clock", "condition", "count", "fenced", "made_by", "pending", "phase", "slot_text", "transactions")

    def __init__(self, count: int, text: str) -> None:
        self.count = self.pending = count
        self.transactions = 0
        self.phase = 0
        self.slot_text = text
        self.clock: Clock | None = None
        self.completed_clock: Clock | None = None
        self.made_by = (0, 0, 0, 0)
        self.fenced = True
        self.condition = self._new_condition()

    def _new_condition(self) -> Condition:
        phase = self.phase
        return Condition(lambda: f"{self.slot_text}, phase {phase} ({self.pending} arrivals and {self.transactions} bytes missing)")

    def arrive(self, count: int) -> None:
        """Counts arrivals."""
        if count > self.pending:
            raise EmulatorError(
                f"{self.slot_text}: {count} arrivals where phase {self.phase} awaits {self.pending}: more arrivals than its count {self.count}"
            )
        self.pending -= count
        self._complete()

    def expect(self, nbytes: int) -> None:
        """Raises the transaction count."""
        self.transactions += nbytes
        if abs(self.transactions) > _LARGEST_COUNT:
            raise EmulatorError(f"{self.slot_text}: transaction count {self.transactions} beyond 2^20 - 1")

    def complete_bytes(self, nbytes: int) -> None:
        """Lowers the transaction count."""
        self.expect(-nbytes)
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count
            condition, self.condition = self.condition, self._new_condition()
            if self.clock is not None:
                if self.completed_clock is not None:
                    self.clock.join(self.completed_clock)
                self.completed_clock, self.clock = self.clock, None
            condition.signal()


class CtaBarrier:
    """A named barrier of a CTA, or the barrier of a cluster (counting warps)."""

    __slots__ = ("arrived", "clock", "completed_clock", "condition", "expected", "generation", "text", "votes")

    def __init__(self, text: str) -> None:
        self.text = text
        self.arrived = 0
        self.expected = 0
        self.generation = 0
        self.clock: Clock | None = None
        self.completed_clock: Clock | None = None
        self.votes: dict[int, list[bool]] = {}
        self.condition = self._new_condition()

    def _new_condition(self) -> Condition:
        generation = self.generation
        return Condition(lambda: f"{self.text}, generation {generation} ({self.arrived} of {self.expected} threads arrived)")

    def arrive(self, threads: int, expected: int) -> Condition:
        """Counts threads; returns the condition of this generation."""
        if self.arrived and expected != self.expected:
            raise EmulatorError(f"{self.text}: {expected} threads where others gave {self.expected}")
        self.expected = expected
        self.arrived += threads
        condition = self.condition
        if self.arrived > expected:
            raise EmulatorError(f"{self.text}: {self.arrived} threads arrived, {expected} expected")
        if self.arrived == expected:
            self.votes.pop(self.generation, None)  # those who wait have the list
            self.generation += 1
            self.arrived = 0
            self.completed_clock, self.clock = self.clock, None
            self.condition = self._new_condition()
            condition.signal()
        return condition


class Synchronisation:
    """What `Machine` knows of barriers."""

    mbarriers: dict[tuple[int, int], MBarrier]
    races: Races | None
    shared: SharedMemory
    clustered: bool
    cluster_size: int
    waits: dict[str, int]

    # --- CTA and cluster barriers

    def bar_sync(self, g: Gang, mask: Any, number: Any, threads: Any, wait: bool) -> bool:
        """``bar.sync`` and ``bar.arrive``."""

        def arrive() -> list[Condition | None]:
            conditions: list[Condition | None] = [None] * len(g.warps)
            for w in g.active_warps(mask):
                warp = g.warps[w]
                which = number if isinstance(number, int) else int(number[w * LANES])
                expected = threads if isinstance(threads, int) else int(threads[w * LANES])
                if not 0 <= which < 16 or expected % LANES or expected < 0:
                    raise EmulatorError(f"barrier {which} with {expected} threads: barriers 0 to 15, whole warps")
                barrier = warp.cta.barrier(which)
                lanes = int(warp.threads.sum())
                total = expected or warp.cta.threads
                if self.races is not None:
                    self.races.barrier_arrive(barrier, warp, True)
                conditions[w] = barrier.arrive(LANES if expected else lanes, total)
            self.waits["bar.sync"] += len(g.warps)
            return conditions

        if not wait:
            arrive()
            return True
        if not g.await_all(arrive):
            return False
        if self.races is not None:
            for w in g.active_warps(mask):
                which = number if isinstance(number, int) else int(number[w * LANES])
                self.races.barrier_leave(g.warps[w].cta.barrier(which), g.warps[w])
        return True

    def bar_red(self, g: Gang, mask: Any, number: int, threads: int, predicate: Any, operation: str) -> Any:
        """``bar.red``: None while it waits, else the result of each lane."""
        if g.wait is None:
            g.votes = [None] * len(g.warps)
            for w in g.active_warps(mask):
                warp = g.warps[w]
                barrier = warp.cta.barrier(number)
                votes = g.votes[w] = barrier.votes.setdefault(barrier.generation, [])
                votes += [bool(x) for x in predicate[w * LANES : w * LANES + LANES][warp.threads]]
        if not self.bar_sync(g, mask, number, threads, True):
            return None
        count: Any = {"popc": sum, "and": all, "or": any}[operation]
        results = [count(votes or ()) for votes in g.votes]
        return np.repeat(np.array(results, np.uint32 if operation == "popc" else np.bool_), LANES)

    def cluster_arrive(self, g: Gang, mask: Any, release: bool) -> None:
        """``barrier.cluster.arrive``."""
        for w in g.active_warps(mask):
            warp = g.warps[w]
            cluster = warp.cta.cluster
            if warp in cluster.arrivals:
                raise EmulatorError("barrier.cluster.arrive twice without a wait between")
            if self.races is not None:
                self.races.barrier_arrive(cluster.barrier, warp, release)
            cluster.arrivals[warp] = cluster.barrier.condition
            cluster.barrier.arrive(int(warp.threads.sum()), cluster.threads)

    def cluster_wait(self, g: Gang, mask: Any) -> bool:
        """``barrier.cluster.wait``."""

        def conditions() -> list[Condition | None]:
            found: list[Condition | None] = [None] * len(g.warps)
            for w in g.active_warps(mask):
                warp = g.warps[w]
                if warp not in warp.cta.cluster.arrivals:
                    raise EmulatorError("barrier.cluster.wait without an arrive")
                found[w] = warp.cta.cluster.arrivals.pop(warp)
            self.waits["barrier.cluster"] += len(g.warps)
            return found

        if not g.await_all(conditions):
            return False
        if self.races is not None:
            for w in g.active_warps(mask):
                self.races.barrier_leave(g.warps[w].cta.cluster.barrier, g.warps[w])
        return True

    # --- mbarriers

    def check_alive(self, slot: int) -> None:
        """Raises where the CTA of a slot has ended."""
        raise NotImplementedError

    def barrier_place(self, warp: Warp, address: int, own: bool = False) -> tuple[int, int]:
        """Slot and window offset of an mbarrier's shared address."""
        slot = warp.cta.slot
        if self.clustered:
            rank = address >> RANK_SHIFT
            if rank >= self.cluster_size or (own and rank != warp.cta.rank):
                raise EmulatorError(f"mbarrier address {address:#x}: CTA rank {rank}, this is rank {warp.cta.rank} of {self.cluster_size}")
            slot += rank - warp.cta.rank
            address &= _OFFSET
            self.check_alive(slot)
        if address % 8 or not self.shared.start <= address <= self.shared.end - 8:
            raise EmulatorError(f"mbarrier address {address:#x}: 8-byte aligned, in shared memory")
        return slot, address

    def mbarrier_at(self, place: tuple[int, int]) -> MBarrier:
        """The mbarrier of a slot and offset."""
        found = self.mbarriers.get(place)
        if found is None:
            raise EmulatorError(f"mbarrier at shared address {place[1]:#x} was not initialised")
        return found

    def _each(self, g: Gang, address: Any, mask: Any, own: bool = False) -> list[tuple[Warp, int, tuple[int, int]]]:
        """(warp, lane, place) of every active lane."""
        found = []
        for lane in g.active_lanes(mask):
            warp = g.warps[lane // LANES]
            where = address if isinstance(address, int) else int(address[lane])
            found.append((warp, lane, self.barrier_place(warp, where, own)))
        return found

    def mbarrier_init(self, g: Gang, address: Any, mask: Any, count: Any) -> None:
        """``mbarrier.init``."""
        for warp, lane, place in self._each(g, address, mask, True):
            n = count if isinstance(count, int) else int(count[lane])
            if not 1 <= n <= _LARGEST_COUNT:
                raise EmulatorError(f"mbarrier count {n}: 1 to 2^20 - 1")
            if place in self.mbarriers:
                raise EmulatorError(f"mbarrier at shared address {place[1]:#x} is initialised twice")
            barrier = MBarrier(n, f"mbarrier at shared address {place[1]:#x} of CTA {warp.cta.ctaid}")
            self.mbarriers[place] = barrier
            if self.races is not None:
                self.races.mbarrier_init(barrier, warp, lane % LANES)
                self.races.guard(*place, True)

    def mbarrier_inval(self, g: Gang, address: Any, mask: Any) -> None:
        """``mbarrier.inval``."""
        for _, _, place in self._each(g, address, mask, True):
            barrier = self.mbarrier_at(place)
            if barrier.condition.waiters:
                raise EmulatorError(f"{barrier.slot_text} is invalidated while warps wait for it")
            del self.mbarriers[place]
            if self.races is not None:
                self.races.guard(*place, False)

    def mbarrier_arrive(self, g: Gang, address: Any, mask: Any, count: Any, nbytes: Any, drop: bool = False, relaxed: bool = False) -> Any:
        """``mbarrier.arrive`` and ``.arrive.expect_tx``: the state before (phase and pending count) of each lane."""
        states = np.zeros(g.lanes, np.uint64)
        for warp, lane, place in self._each(g, address, mask):
            barrier = self.mbarrier_at(place)
            if self.races is not None:
                self.races.mbarrier_arrive(barrier, warp, lane % LANES, relaxed)
            states[lane] = barrier.phase << 20 | barrier.pending
            if nbytes is not None:
                barrier.expect(nbytes if isinstance(nbytes, int) else int(nbytes[lane]))
            if drop:
                barrier.count -= 1
            barrier.arrive(count if isinstance(count, int) else int(count[lane]))
        return states

    def mbarrier_expect(self, g: Gang, address: Any, mask: Any, nbytes: Any, complete: bool) -> None:
        """``mbarrier.expect_tx`` and ``.complete_tx``."""
        for _, lane, place in self._each(g, address, mask):
            n = nbytes if isinstance(nbytes, int) else int(nbytes[lane])
            barrier = self.mbarrier_at(place)
            if complete:
                barrier.complete_bytes(n)
            else:
                barrier.expect(n)

    def _wait_places(self, g: Gang, address: Any, mask: Any, value: Any) -> list[tuple[int, MBarrier, int]]:
        """(warp index, barrier, phase or parity) of what each active warp looks at."""
        found = []
        for w in g.active_warps(mask):
            lane = w * LANES
            if not isinstance(address, int) or not isinstance(value, int):
                part = slice(lane, lane + LANES)
                for array in (address, value):
                    if not isinstance(array, int):
                        values = array[part] if mask is None else array[part][mask[part]]
                        if (values != values[0]).any():
                            raise EmulatorError("lanes of a warp wait for different mbarriers or phases: not modelled")
                lane = lane if mask is None else lane + int(mask[part].argmax())
            where = address if isinstance(address, int) else int(address[lane])
            barrier = self.mbarrier_at(self.barrier_place(g.warps[w], where, True))
            found.append((w, barrier, value if isinstance(value, int) else int(value[lane])))
        return found

    def mbarrier_wait(self, g: Gang, address: Any, mask: Any, value: Any, parity: bool, relaxed: bool = False) -> bool:
        """``mbarrier.try_wait``: waits until the phase is complete. False: not yet."""
        if g.wait is None and mask is not None and not mask.any():
            return True
        places = self._wait_places(g, address, mask, value)

        def conditions() -> list[Condition | None]:
            found: list[Condition | None] = [None] * len(g.warps)
            for w, barrier, phase in places:
                if not _completed(barrier, phase, parity):
                    found[w] = barrier.condition
                    self.waits["mbarrier blocked"] += 1
            self.waits["mbarrier"] += len(places)
            return found

        if not g.await_all(conditions):
            return False
        if self.races is not None:
            for w, barrier, _ in places:
                self.races.mbarrier_observe(barrier, g.warps[w], _only_lane(mask, w), relaxed)
        return True

    def mbarrier_test(self, g: Gang, address: Any, mask: Any, value: Any, parity: bool, relaxed: bool = False) -> Any:
        """``mbarrier.test_wait``: whether the phase is complete, of each lane."""
        result = np.zeros(g.lanes, np.bool_)
        for w, barrier, phase in self._wait_places(g, address, mask, value):
            if _completed(barrier, phase, parity):
                result[w * LANES : (w + 1) * LANES] = True
                if self.races is not None:
                    self.races.mbarrier_observe(barrier, g.warps[w], _only_lane(mask, w), relaxed)
        return result

    # --- lanes of a warp

    def _members(self, g: Gang, members: Any, mask: Any, text: str) -> Any:
        """Bool ``[lanes]`` of the member mask; inactive members would wait forever."""
        bits = np.arange(LANES, dtype=np.uint32)
        if isinstance(members, int):
            member = np.tile((np.uint32(members) >> bits & np.uint32(1)).astype(np.bool_), len(g.warps))
        else:
            member = (members >> np.tile(bits, len(g.warps)) & np.uint32(1)).astype(np.bool_)
        if mask is not None:
            rows = mask.reshape(-1, LANES).any(axis=1).repeat(LANES)
            missing = member & ~mask & rows
            if missing.any():
                raise EmulatorError(f"{text}: lane {int(missing.argmax()) % LANES} is in the member mask and inactive")
            return member & mask
        return member

    def shuffle(self, g: Gang, mode: str, a: Any, b: Any, c: Any, members: Any, mask: Any, defined: Any) -> Any:
        """``shfl.sync``: values and whether the source lane was in range."""
        self._converged(g, mask)
        if not (isinstance(members, int) and members == 0xFFFFFFFF and mask is None):
            member = self._members(g, members, mask, "shfl.sync")
        else:
            member = None
        lane = np.tile(np.arange(LANES, dtype=np.int64), len(g.warps))
        b = (np.asarray(b, np.int64)) & 31
        c = np.asarray(c, np.int64)
        clamp, segment = c & 31, c >> 8 & 31
        low = lane & segment
        high = low | (clamp & ~segment)
        source = {"idx": low | (b & ~segment), "bfly": lane ^ b, "up": lane - b, "down": lane + b}[mode]
        inside = source >= high if mode == "up" else source <= high
        source = np.where(inside, source, lane)
        index = source + np.arange(0, g.lanes, LANES).repeat(LANES)
        if member is not None and not member[index][member].all():
            raise EmulatorError("shfl.sync reads a lane that is not active or not in the member mask")
        if defined is not None:
            bad = ~defined[index] if member is None else ~defined[index] & member
            if bad.any():
                raise EmulatorError("shfl.sync reads a lane in which the source register was never written")
        return a[index], np.broadcast_to(inside, (g.lanes,))

    def vote(self, g: Gang, mode: str, p: Any, members: Any, mask: Any) -> Any:
        """``vote.sync``."""
        self._converged(g, mask)
        member = self._members(g, members, mask, "vote.sync").reshape(-1, LANES)
        p = p.reshape(-1, LANES)
        if mode == "ballot":
            words = ((p & member) * (np.uint32(1) << np.arange(LANES, dtype=np.uint32))).sum(axis=1, dtype=np.uint32)
            return words.repeat(LANES)
        everyone, someone = (p | ~member).all(axis=1), (p & member).any(axis=1)
        return {"all": everyone, "any": someone, "uni": everyone | ~someone}[mode].repeat(LANES)

    def redux(self, g: Gang, operation: str, kind: str, a: Any, members: Any, mask: Any, absolute: bool, nan: bool) -> Any:
        """``redux.sync``."""
        member = self._members(g, members, mask, "redux.sync").reshape(-1, LANES)
        values = a.view({"u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32}[kind]).reshape(-1, LANES)
        results = np.zeros(len(g.warps), np.uint32)
        for w in range(len(g.warps)):
            chosen = values[w][member[w]]
            if not chosen.size:
                continue
            if kind == "f32":
                chosen = np.abs(chosen) if absolute else chosen
                bad = np.isnan(chosen)
                reduce = np.fmin if operation == "min" else np.fmax
                value = np.float32(reduce.reduce(chosen))
                results[w] = 0x7FFFFFFF if np.isnan(value) or (nan and bad.any()) else value.view(np.uint32)
                continue
            functions: dict[str, Any] = {
                "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            }  # fmt: skip
            results[w] = np.asarray(functions[operation].reduce(chosen, dtype=chosen.dtype)).view(np.uint32)
        return results.repeat(LANES)

    def match(self, g: Gang, mode: str, a: Any, members: Any, mask: Any) -> Any:
        """``match.sync``: lane masks and, of ``all``, whether all are equal."""
        member = self._members(g, members, mask, "match.sync").reshape(-1, LANES)
        rows = a.reshape(-1, LANES)
        equal = (rows[:, :, None] == rows[:, None, :]) & member[:, None, :]
        weights = np.uint32(1) << np.arange(LANES, dtype=np.uint32)
        words = (equal * weights).sum(axis=2, dtype=np.uint32)
        if mode == "any":
            return words.reshape(-1), None
        everyone = (equal | ~member[:, None, :]).all(axis=2)
        return np.where(everyone, words, np.uint32(0)).reshape(-1), everyone.reshape(-1)

    def activemask(self, g: Gang, mask: Any) -> Any:
        """``activemask``."""
        return self.vote(g, "ballot", np.ones(g.lanes, np.bool_), 0xFFFFFFFF, mask) if mask is None else self.vote_active(g, mask)

    def vote_active(self, g: Gang, mask: Any) -> Any:
        """Lane masks of the active lanes."""
        rows = mask.reshape(-1, LANES)
        return (rows * (np.uint32(1) << np.arange(LANES, dtype=np.uint32))).sum(axis=1, dtype=np.uint32).repeat(LANES)

    def elect(self, g: Gang, members: Any, mask: Any) -> Any:
        """``elect.sync``: the lowest member of each warp."""
        self._converged(g, mask)
        if isinstance(members, int) and members == 0xFFFFFFFF and mask is None:
            return _first_of_each(len(g.warps))
        member = self._members(g, members, mask, "elect.sync").reshape(-1, LANES)
        leader = member.argmax(axis=1)
        chosen = np.zeros((len(g.warps), LANES), np.bool_)
        chosen[np.arange(len(g.warps)), leader] = member.any(axis=1)
        return leader.astype(np.uint32).repeat(LANES), chosen.reshape(-1)

    def warp_sync(self, g: Gang, members: Any, mask: Any) -> None:
        """``bar.warp.sync``: the lanes of a gang's warp run together, so there is nothing to wait for."""
        self._members(g, members, mask, "bar.warp.sync")
        self._converged(g, mask, True)

    def _converged(self, g: Gang, mask: Any, ordered: bool = False) -> None:
        """Tells race detection that lanes of each warp waited for each other, and whether that orders their memory accesses."""
        if self.races is not None:
            for w in g.active_warps(mask):
                self.races.warp_converged(g.warps[w], ordered)

    # --- asynchronous completion, called by copies and MMA units

    def signal_bytes(self, place: tuple[int, int], nbytes: int, clock: Any) -> None:
        """``complete_tx`` of an asynchronous copy."""
        barrier = self.mbarrier_at(place)
        if self.races is not None and clock is not None:
            self.races.mbarrier_join(barrier, clock)
        barrier.complete_bytes(nbytes)

    def signal_arrival(self, place: tuple[int, int], count: int, clock: Any) -> None:
        """An arrival by an asynchronous unit (``tcgen05.commit``, ``cp.async.mbarrier.arrive``)."""
        barrier = self.mbarrier_at(place)
        if self.races is not None and clock is not None:
            self.races.mbarrier_join(barrier, clock)
        barrier.arrive(count)


@cache
def _first_of_each(warps: int) -> tuple[Any, Any]:
    """What ``elect.sync`` gives where all lanes of some warps are members: the leader of each lane, and who it is."""
    leader, chosen = np.zeros(warps * LANES, np.uint32), np.arange(warps * LANES) % LANES == 0
    for each in (leader, chosen):
        each.setflags(write=False)
    return leader, chosen


def _only_lane(mask: Any, w: int) -> int:
    """The active lane of a warp where it is the only one, else -1."""
    if mask is None:
        return -1
    lanes = np.flatnonzero(mask[w * LANES : (w + 1) * LANES])
    return int(lanes[0]) if lanes.size == 1 else -1


def _completed(barrier: MBarrier, value: int, parity: bool) -> bool:
    if parity:
        if value not in (0, 1):
            raise EmulatorError(f"phase parity {value}: 0 or 1")
        return (barrier.phase & 1) != value
    return barrier.phase > value >> 20
