"""The machine: resident CTAs, the schedule, counters, and what happens when nothing can run.

Sources: PTX ISA 9.x, 2 and 3 (CTAs, clusters, warps), 8 (memory consistency: asynchronous operations are ordered by their completion only).

Gangs and asynchronous operations are what a schedule chooses from. A gang runs until it waits, ends, or its turn is over.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from densemoe.compile.emulator.asynchronous import AsyncOperation
from densemoe.compile.emulator.bank_conflicts import BankConflicts
from densemoe.compile.emulator.gang import Gang
from densemoe.compile.emulator.global_races import GlobalRaces
from densemoe.compile.emulator.memory import GlobalMemory, SharedMemory
from densemoe.compile.emulator.merging import merge_gangs
from densemoe.compile.emulator.races import Races
from densemoe.compile.emulator.synchronisation import CtaBarrier, MBarrier, Synchronisation
from densemoe.compile.emulator.tensor_map_instructions import TensorMapUpdates
from densemoe.compile.emulator.translation import SHARED_START, Program, Version
from densemoe.compile.emulator.warpgroup_units import WarpgroupUnits
from densemoe.compile.emulator.warps import LANES, Meeting, Warp
from densemoe.compile.emulator.watched import WatchedAccesses
from densemoe.runtime.errors import EmulatorError

__all__ = ["Cluster", "Cta", "Machine", "Schedule"]

_GANG_LANES: Final = 8192  # lanes of one gang at most: larger arrays leave the cache
_RESIDENT_BYTES: Final = 192 << 20  # of shared memory at a time
_IDLE_TURNS: Final = 1000  # turns in a row that gangs may use up before a livelock is reported
_TURN: Final = 4096  # blocks a gang runs before others have their turn (it may be polling)


@dataclass(frozen=True)
class Schedule:
    """How gangs and asynchronous operations are interleaved.

    Attributes:
        kind: ``eager`` (operations complete at once, warps run together), ``lazy`` (operations complete when nothing else can run),
            ``random`` (single warps, everything in random order) or ``pct`` (priorities that change at random points).
        seed: of ``random`` and ``pct``.
        depth: of ``pct``: one more than the number of priority changes.
    """

    kind: str = "eager"
    seed: int = 0
    depth: int = 3

    @staticmethod
    def parse(text: str) -> Schedule:
        """``eager``, ``lazy``, ``random:SEED`` or ``pct:SEED:DEPTH``.

        Raises:
            EmulatorError: another text.
        """
        kind, *numbers = text.split(":")
        if kind not in ("eager", "lazy", "random", "pct") or len(numbers) > {"random": 1, "pct": 2}.get(kind, 0):
            raise EmulatorError(f"schedule {text!r}: use eager, lazy, random:SEED or pct:SEED:DEPTH")
        try:
            return Schedule(kind, *(int(number) for number in numbers))
        except ValueError:
            raise EmulatorError(f"schedule {text!r}: seed and depth are integers") from None


@dataclass(eq=False)
class Cluster:
    """The CTAs of a cluster.

    Attributes:
        first_slot: shared window of its rank 0.
        threads: of all CTAs.
        arrivals: warps that arrived at the cluster barrier and have not waited yet.
    """

    first_slot: int
    threads: int
    barrier: CtaBarrier
    ctas: list[Cta] = field(default_factory=list)
    arrivals: dict[Warp, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Cta:
    """A resident CTA.

    Attributes:
        slot: of its shared window.
        rank: in its cluster.
        tensor_memory: state of its tensor memory, made when it is first used.
    """

    slot: int
    ctaid: tuple[int, int, int]
    rank: int
    cluster: Cluster
    threads: int
    warps: list[Warp] = field(default_factory=list)
    barriers: dict[int, CtaBarrier] = field(default_factory=dict)
    pair_barriers: dict[str, CtaBarrier] = field(default_factory=dict)
    tensor_memory: Any = None
    alive: int = 0

    def barrier(self, number: int) -> CtaBarrier:
        """A named barrier."""
        found = self.barriers.get(number)
        if found is None:
            found = self.barriers[number] = CtaBarrier(f"barrier {number} of CTA {self.ctaid}")
        return found


class Machine(WatchedAccesses, Synchronisation, WarpgroupUnits, TensorMapUpdates):
    """One launch in progress."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        dynamic_smem: int,
        parameters: bytes,
        memory: GlobalMemory,
        schedule: Schedule,
        races: bool,
        sm_count: int,
        tensor_fences: bool = True,
        programmatic: bool = False,
    ) -> None:
        self.programmatic = programmatic
        self.program, self.memory, self.schedule = program, memory, schedule
        self.grid, self.block, self.cluster = grid, block, cluster
        self.dynamic_smem, self.parameters, self.sm_count = dynamic_smem, parameters, sm_count
        self.cluster_size = int(np.prod(cluster))
        self.clustered = self.cluster_size > 1
        self.together = schedule.kind in ("eager", "lazy")
        #: by block: how often gangs parted at its end
        self.partings: dict[int, int] = {}
        self.warpgroups = any(each.opcode.startswith("wgmma.mma_async") for each in program.kernel.instructions)
        # warps that read a quarter of tensor memory each do the same: in three of four random runs they go together until they part
        self.quarters = any(each.opcode.startswith("tcgen05.ld") for each in program.kernel.instructions) and schedule.seed % 4 != 0
        self.merging = self.together or self.warpgroups or self.quarters
        self.executed: dict[Version, int] = defaultdict(int)
        self.moved: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.lints: dict[str, None] = dict.fromkeys(program.lints)
        self.conflicts = BankConflicts()
        self.mbarriers: dict[tuple[int, int], MBarrier] = {}
        self.resident: dict[int, Cta] = {}
        self.runnable: deque[Gang] = deque()
        self.gangs: set[Gang] = set()
        self.gathering: dict[int, list[Gang]] = {}
        self.pending: list[AsyncOperation] = []
        self.meetings: list[Meeting] = []
        self.random = random.Random(schedule.seed)
        self.lane_order = random.Random(schedule.seed) if schedule.kind in ("random", "pct") else None
        self.steps = 0
        self.want_races = races
        self.tensor_fences = tensor_fences
        self.races: Races | None = None
        self.checked_operands: dict[tuple[int, ...], Any] = {}
        self.ticks = 0
        self.idle_turns = 0
        end = program.dynamic_start + dynamic_smem
        clusters = int(np.prod(grid)) // self.cluster_size
        window = -(-end // 1024) * 1024
        at_once = max(1, min(clusters, _RESIDENT_BYTES // ((16 if races else 2) * window * self.cluster_size)))
        self.clusters, self.clusters_at_once = clusters, at_once
        self.shared = SharedMemory(at_once * self.cluster_size, SHARED_START, end)
        if schedule.kind == "pct":
            self.change_points = sorted(self.random.randrange(1, 20000) for _ in range(max(schedule.depth - 1, 0)))

    # --- CTAs

    def run(self) -> None:
        """Runs the launch."""
        for first in range(0, self.clusters, self.clusters_at_once):
            self._wave(range(first, min(first + self.clusters_at_once, self.clusters)))

    def _cluster_position(self, index: int) -> tuple[int, int, int]:
        nx, ny = self.grid[0] // self.cluster[0], self.grid[1] // self.cluster[1]
        return index % nx, index // nx % ny, index // (nx * ny)

    def _wave(self, indices: range) -> None:
        self.mbarriers.clear()
        self.checked_operands.clear()
        ctas = []
        threads = int(np.prod(self.block))
        warps_per_cta = -(-threads // LANES)
        warps: list[Warp] = []
        for n, index in enumerate(indices):
            position = self._cluster_position(index)
            cluster = Cluster(n * self.cluster_size, threads * self.cluster_size, CtaBarrier(f"barrier of cluster {position}"))
            for rank in range(self.cluster_size):
                cx, cy = self.cluster[0], self.cluster[1]
                inner = (rank % cx, rank // cx % cy, rank // (cx * cy))
                ctaid = tuple(position[i] * self.cluster[i] + inner[i] for i in range(3))
                cta = Cta(cluster.first_slot + rank, (ctaid[0], ctaid[1], ctaid[2]), rank, cluster, threads)
                for w in range(warps_per_cta):
                    exists = np.arange(LANES) + w * LANES < threads
                    cta.warps.append(Warp(cta, w, exists, rank * warps_per_cta + w, row=len(warps)))
                    warps.append(cta.warps[-1])
                cta.alive = warps_per_cta
                cluster.ctas.append(cta)
                self.shared.clear(cta.slot)
                ctas.append(cta)
        self.resident = {cta.slot: cta for cta in ctas}
        self.races = None
        if self.want_races:
            window = self.shared.stride
            self.races = Races(warps, warps_per_cta * self.cluster_size, window, self.shared.ctas, self.lints, self.tensor_fences)
            if GlobalRaces.wanted(len(warps), self.program.kernel):
                self.races.everywhere = GlobalRaces(len(warps), self.memory)
        self._start(ctas)
        self._schedule()
        for cta in ctas:
            self.end_cta(cta)

    def _start(self, ctas: list[Cta]) -> None:
        registers = len(self.program.names)
        if self.together:
            per_gang = max(1, _GANG_LANES // (LANES * len(ctas[0].warps)))
            groups = [[warp for cta in ctas[i : i + per_gang] for warp in cta.warps] for i in range(0, len(ctas), per_gang)]
        else:
            size = 4 if self.warpgroups or self.quarters else 1
            groups = [cta.warps[i : i + size] for cta in ctas for i in range(0, len(cta.warps), size)]
        for group in groups:
            gang = Gang(self, self.program, group, [None] * registers)
            gang.priority = self.random.random()
            gang.start()
            self.adopt(gang, "")

    def end_cta(self, cta: Cta) -> None:
        """Checks what a CTA must have given back."""
        state = cta.tensor_memory
        if state is not None and (state.owner >= 0).any():
            raise EmulatorError(f"CTA {cta.ctaid} ended with {int((state.owner >= 0).sum())} columns of tensor memory allocated")

    def finish_now(self, operation: AsyncOperation) -> None:
        if not operation.done:
            self.pending.remove(operation)
            operation.execute()

    # --- schedule

    def adopt(self, gang: Gang, state: str) -> None:
        """Takes a gang in hand after it was made or moved."""
        if state == "gone":
            return
        if state == "end":
            self._end(gang)
            return
        self.gangs.add(gang)
        if state == "linger":
            self._arrived(gang)
            return
        if state == "wait":
            return
        self.runnable.append(gang)

    def wake(self, gang: Gang) -> None:
        """A waiting gang may try again."""
        if not gang.ended and gang in self.gangs:
            self.runnable.append(gang)

    def _end(self, gang: Gang) -> None:
        gang.ended = True
        self.gangs.discard(gang)
        for warp in gang.warps:
            warp.cta.alive -= 1
            if not warp.cta.alive:
                self._ended(warp.cta)
        for meeting in gang.meetings:
            meeting.outstanding -= 1
            if meeting.arrived and len(meeting.arrived) >= meeting.outstanding:
                self._release(meeting)

    def _ended(self, cta: Cta) -> None:
        """The last warp of a CTA ended: nothing may be under way that needs its memory.

        An arrival of a ``tcgen05.commit`` of its own is a remark: kernels with one CTA a cluster are seen to leave it behind.
        """
        for each in self.pending:
            if not each.needs(cta.slot):
                continue
            if self.cluster_size == 1 and each.what == "arrival":
                self.lints["a CTA ends before the arrival of a tcgen05.commit on its mbarrier"] = None
            else:
                raise EmulatorError(f"CTA {cta.ctaid} ended before the {each} (PTX line {each.line}), which needs its memory")

    def check_alive(self, slot: int) -> None:
        cta = self.resident[slot]
        if not cta.alive:
            raise EmulatorError(f"shared memory of CTA {cta.ctaid}, which has ended")

    def _arrived(self, gang: Gang) -> None:
        meeting = gang.meeting
        assert meeting is not None
        if meeting not in self.meetings:
            self.meetings.append(meeting)
        if len(meeting.arrived) >= meeting.outstanding:
            self._release(meeting)

    def _release(self, meeting: Meeting) -> None:
        """The gangs that arrived go on, together where they can."""
        if meeting in self.meetings:
            self.meetings.remove(meeting)
        arrived, meeting.arrived = meeting.arrived, []
        meeting.outstanding -= len(arrived)
        if meeting.outstanding > 0:
            meeting.closed = True
        for each in arrived:
            each.lingering = False
        lanes = 0
        batch: list[Gang] = []
        batches = [batch]
        for each in arrived:
            if batch and lanes + each.lanes > _GANG_LANES:
                batch, lanes = [], 0
                batches.append(batch)
            batch.append(each)
            lanes += each.lanes
        for batch in batches:
            together = self.merge(batch, batch[0].target) if len(batch) > 1 else None
            if together is None:
                for each in batch:
                    self.gangs.discard(each)
                    self.adopt(each, each.resume())
                continue
            together.target = batch[0].target
            self.adopt(together, together.resume())

    def merge(self, gangs: list[Gang], block: int) -> Gang | None:
        """`merge_gangs`; the parts end, and count as one at the meetings ahead."""
        together = merge_gangs(gangs, block)
        if together is not None:
            for outer in together.meetings:
                outer.outstanding -= len(gangs) - 1
            for each in gangs:
                each.ended = True
                self.gangs.discard(each)
        return together

    def unite_meetings(self, gangs: list[Gang]) -> bool:
        """Makes the meetings ahead of gangs the same, as parts that parted again each on its own have several for one place; False where the places
        differ."""
        first, *others = gangs
        places = [(each.join, each.depth) for each in first.meetings]
        if any([(each.join, each.depth) for each in other.meetings] != places for other in others):
            return False
        for i, kept in enumerate(first.meetings):
            for other in others:
                if other.meetings[i] is not kept:
                    self._unite(kept, other.meetings[i])
        return True

    def _unite(self, kept: Meeting, other: Meeting) -> None:
        kept.arrived += other.arrived
        kept.outstanding += other.outstanding
        for gang in self.gangs:
            gang.meetings = [kept if each is other else each for each in gang.meetings]
            if gang.meeting is other:
                gang.meeting = kept
        if other in self.meetings:
            self.meetings.remove(other)
            if kept not in self.meetings:
                self.meetings.append(kept)
        if kept.closed or other.closed:
            kept.closed = True
            if kept.arrived:
                self._release(kept)

    def submit(self, operation: AsyncOperation) -> None:
        if self.schedule.kind == "eager" and operation.eligible:
            operation.execute()
            return
        operation.priority = self.random.random()
        self.pending.append(operation)

    def _schedule(self) -> None:
        kind = self.schedule.kind
        while True:
            if kind in ("random", "pct"):
                if self._explore(kind):
                    continue
            elif self.runnable:
                self._turn(self.runnable.popleft(), _TURN)
                continue
            if self.meetings:
                self._release(self.meetings[0])
                continue
            if self._execute_one():
                continue
            if not self.gangs:
                return
            if self._split_ready():
                continue
            raise EmulatorError(self._deadlock())

    def _execute_one(self) -> bool:
        """Executes the oldest operation that somebody may be waiting for; one that arrives on mbarriers without waiters stays as long as it can."""
        spare, find = None, self.mbarriers.get
        for i, operation in enumerate(self.pending):
            after = operation.after
            if after is not None and not after.done:  # `eligible`, in an inner loop
                continue
            for place in operation.signals:
                barrier = find(place)
                if barrier is None or barrier.condition.waiters:
                    break
            else:
                if operation.signals:
                    spare = i if spare is None else spare
                    continue
            spare = i
            break
        if spare is None:
            return False
        self.pending.pop(spare).execute()
        return True

    def _explore(self, kind: str) -> bool:
        """One step of a random or priority schedule; False where nothing can run."""
        eligible = [each for each in self.pending if each.after is None or each.after.done]  # `eligible`, in the innermost loop
        total = len(self.runnable) + len(eligible)
        if not total:
            return False
        self.steps += 1
        if kind == "random":
            chosen = self.random.randrange(total)
            if chosen < len(self.runnable):
                gang = self.runnable[chosen]
                del self.runnable[chosen]
                self._turn(gang, 1 + int(self.random.random() < 0.5) * self.random.randrange(8))
                return True
            operation = eligible[chosen - len(self.runnable)]
        else:
            candidates: list[Any] = [*self.runnable, *eligible]
            best = max(candidates, key=lambda each: each.priority)
            if self.change_points and self.steps >= self.change_points[0]:
                self.change_points.pop(0)
                best.priority = -self.random.random()
            if isinstance(best, Gang):
                self.runnable.remove(best)
                self._turn(best, 1)
                if self.steps % 64 == 0:  # a polling warp must not starve the others
                    best.priority -= 0.05
                return True
            operation = best
        self.pending.remove(operation)
        operation.execute()
        return True

    def _turn(self, gang: Gang, budget: int) -> None:
        if gang.ended:
            return
        state = gang.advance(budget)
        if state == "yield":
            self.runnable.append(gang)
            if self.together:
                self._polling(gang)
            return
        self.idle_turns = 0
        if state == "wait":
            return
        if state == "gone":
            gang.ended = True
            self.gangs.discard(gang)
        elif state == "end":
            self._end(gang)
        elif state == "linger":
            self._arrived(gang)

    def _polling(self, gang: Gang) -> None:
        """A gang used up its turn, so it may be polling: what it polls for must get its chance."""
        self.idle_turns += 1
        if self.idle_turns > _IDLE_TURNS:
            raise EmulatorError(f"livelock: {gang.warps[0]} runs for ever near PTX line {gang.line} ({self.program.text_of(gang.line)})")
        if self.idle_turns < len(self.runnable):
            return  # the others may have what it polls for, or be what others wait for at a meeting
        if self.meetings:
            self._release(self.meetings[0])
        else:
            self._execute_one()

    def _split_ready(self) -> bool:
        """Lets those warps of a waiting gang go on whose condition is met."""
        for gang in list(self.gangs):
            wait = gang.wait
            if wait is None:
                continue
            ready = [i for i, each in enumerate(wait) if each is None or each.ready]
            if ready and len(ready) < len(wait):
                gang.ended = True
                self.gangs.discard(gang)
                gang.split(ready)
                return True
        return False

    def _deadlock(self) -> str:
        lines = ["deadlock: no warp can run"]
        for gang in sorted(self.gangs, key=lambda each: (each.warps[0].cta.slot, each.warps[0].index)):
            for warp, condition in zip(gang.warps, gang.wait or [None] * len(gang.warps), strict=True):
                if condition is not None and not condition.ready:
                    lines.append(f"{warp} at PTX line {gang.line} ({self.program.text_of(gang.line)}) waits for {condition.text()}")
        if len(lines) > 41:
            lines[41:] = [f"and {len(lines) - 41} more warps"]
        return "\n".join(lines)

    # --- small things

    def clock(self, name: str) -> int:
        """A counter that advances with every reading."""
        self.ticks += 100
        return self.ticks if name.endswith("64") or name == "%globaltimer" else self.ticks & 0xFFFFFFFF

    def mma(self, g: Gang, unit: Any, mask: Any, operands: tuple[Any, ...]) -> Any:
        """``mma.sync`` of all warps: registers of D, ``[registers, lanes]``."""
        if mask is not None and not mask.all():
            rows = mask.reshape(-1, LANES)
            if (rows.any(axis=1) != rows.all(axis=1)).any():
                raise EmulatorError("mma.sync with inactive lanes")
        lanes = g.lanes
        stacked = np.empty((len(operands), lanes), np.uint32)
        for i, each in enumerate(operands):
            stacked[i] = each
        self.products["mma.sync"] += len(g.warps)
        return unit.multiply(stacked.reshape(len(operands), -1, LANES)).reshape(-1, lanes)
