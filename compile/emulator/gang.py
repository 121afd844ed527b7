"""Gangs: warps that stand at the same instruction and are executed as one register set, and how they part and meet.

Sources: PTX ISA 9.x, 3.1 and 9.7.12 (SIMT execution, divergence), 10 (special registers).

A branch on which lanes of one warp differ runs both ways one after the other under masks and goes on with all lanes at the branch's immediate
post-dominator (`Frame`). One on which whole warps differ parts the gang; the parts wait for each other at the post-dominator (`Meeting`)
unless nothing else can run, so that specialised warps make progress and others stay together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.clocks import ALL_LANES
from densemoe.compile.emulator.control_flow import EXIT, Block
from densemoe.compile.emulator.emitter import Key
from densemoe.compile.emulator.masks import Mask, every, some
from densemoe.compile.emulator.translation import DIVERGED, WAIT, Program, Version
from densemoe.compile.emulator.warps import LANES, Condition, Frame, Meeting, Warp
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.machine import Cta, Machine

__all__ = ["Gang"]

#: Warps of a gang, and how often they part at a branch, from which on it costs less to let them go on apart.
_FEW, _OFTEN = 2, 2


@cache
def _all_of(lanes: int) -> Mask:
    """A mask of all lanes, read-only."""
    mask = np.ones(lanes, np.bool_)
    mask.setflags(write=False)
    return mask


class Gang:
    """Warps at one instruction.

    Attributes:
        warps: in lane order; lane l belongs to warp l // 32.
        mask: active lanes, or None for all.
        registers: by number: int or array, None where never written.
        defined: for registers that only some lanes wrote: which.
        frames, meetings: open divergences, innermost last.
        branch: condition of the last diverging branch.
        wait: what the gang waits for, for the instruction that blocks it; None where it does not.
        missing: signals it still waits for.
        waiting_for: for reports: function that describes it.
    """

    def __init__(self, run: Machine, program: Program, warps: list[Warp], registers: list[Any]) -> None:
        self.run, self.program = run, program
        self.warps = warps
        self.lanes = LANES * len(warps)
        self.registers = registers
        self.defined: dict[int, Mask] = {}
        self.frames: list[Frame] = []
        self.meetings: list[Meeting] = []
        self.branch: Any = None
        self.wait: list[Condition | None] | None = None
        self.votes: list[list[bool] | None] = []
        self.ended = False
        self.sleeps = False  # it executed `nanosleep`, or read the same words again and again, so it is polling: its turn ends
        self.polled: set[int] = set()  # addresses of strong loads in this turn
        self.polls = 0  # how often one of them was read again
        self.race_rows: Any = None
        self.local_data: Any = None
        self.local_written: Any = None
        self.target = 0
        self.meeting: Meeting | None = None
        self.missing = 0
        self.lingering = False
        self.priority = 0.0
        self.mask: Mask | None = None
        self.version: Version
        self._specials: dict[str, Any] = {}
        self._configure()

    def _configure(self) -> None:
        first = self.warps[0].cta
        self.single_warp = len(self.warps) == 1
        self.single_cta = all(warp.cta is first for warp in self.warps)
        self.cta = first
        #: slot of the shared window: an int, or one of each lane
        self.slots: Any = (
            first.slot if self.single_cta else np.repeat(np.array([warp.cta.slot for warp in self.warps], np.int64), LANES)
        )
        self._specials.clear()

    # --- what instructions ask for

    def rank_base(self) -> int:
        """Upper bits of the CTA's shared addresses in a cluster."""
        return self.cta.rank << 24

    def rank_bases(self) -> Any:
        """`rank_base` of each lane."""
        return self._per_warp("rank_bases", lambda warp: warp.cta.rank << 24)

    def _per_warp(self, name: str, value: Any, dtype: Any = np.uint32) -> Any:
        found = self._specials.get(name)
        if found is None:
            found = self._specials[name] = np.repeat(np.array([value(warp) for warp in self.warps], dtype), LANES)
        return found

    def special(self, name: str) -> Any:
        """The value of a special register: an int or an array as `Program.special_kind` says."""
        found = self._specials.get(name)
        if found is None:
            found = self._special(name)
            if not name.startswith(("%clock", "%globaltimer")):
                self._specials[name] = found
        return found

    def _special(self, name: str) -> Any:
        base, _, axis = name.partition(".")
        which = "xyz".index(axis) if axis else 0
        grid, block, cluster = self.run.grid, self.run.block, self.run.cluster
        if base == "%tid":
            if block[which] == 1:
                return 0
            linear = np.concatenate([np.arange(LANES, dtype=np.uint32) + np.uint32(LANES * warp.index) for warp in self.warps])
            return linear // np.uint32(int(np.prod(block[:which]))) % np.uint32(block[which])
        uniform: dict[str, Callable[[], int]] = {
            "%ntid": lambda: block[which],
            "%nctaid": lambda: grid[which],
            "%nclusterid": lambda: grid[which] // cluster[which],
            "%cluster_nctaid": lambda: cluster[which],
            "%cluster_nctarank": lambda: int(np.prod(cluster)),
            "%is_explicit_cluster": lambda: int(self.run.clustered),
            "%nwarpid": lambda: 64,
            "%smid": lambda: 0,
            "%nsmid": lambda: self.run.sm_count,
            "%gridid": lambda: 0,
            "%dynamic_smem_size": lambda: self.run.dynamic_smem,
            "%total_smem_size": lambda: self.run.dynamic_smem + self.program.static_bytes,
        }
        if base in uniform:
            return uniform[base]()
        per_cta: dict[str, Callable[[Cta], int]] = {
            "%ctaid": lambda cta: cta.ctaid[which],
            "%clusterid": lambda cta: cta.ctaid[which] // cluster[which],
            "%cluster_ctaid": lambda cta: cta.ctaid[which] % cluster[which],
            "%cluster_ctarank": lambda cta: cta.rank,
        }
        if base in per_cta:
            get = per_cta[base]
            if self.single_cta:
                return int(get(self.cta))
            return np.repeat(np.array([get(warp.cta) for warp in self.warps], np.uint32), LANES)
        if base == "%warpid":
            return self.warps[0].index if self.single_warp else self._per_warp("%warpid", lambda warp: warp.index)
        lane = np.tile(np.arange(LANES, dtype=np.uint32), len(self.warps))
        one = np.uint32(1)
        masks = {"eq": one << lane, "lt": (one << lane) - one, "le": (one << lane) * np.uint32(2) - one}
        masks["ge"], masks["gt"] = ~masks["lt"], ~masks["le"]
        if base == "%laneid":
            return lane
        if base.startswith("%lanemask_"):
            return masks[base[-2:]]
        return self.run.clock(base)

    def active_warps(self, mask: Mask | None) -> list[int]:
        """Indices of warps with an active lane."""
        if mask is None:
            return list(range(len(self.warps)))
        return [int(i) for i in np.flatnonzero(mask.reshape(-1, LANES).any(axis=1))]

    def active_lanes(self, mask: Mask | None) -> Any:
        """Indices of active lanes."""
        return range(self.lanes) if mask is None else mask.nonzero()[0].tolist()

    def lane_bits(self, mask: Mask | None, w: int) -> int:
        """Active lanes of a warp, a bit each."""
        if mask is None:
            return ALL_LANES
        return sum(1 << lane for lane in np.flatnonzero(mask[w * LANES : (w + 1) * LANES]).tolist())

    def local(self) -> tuple[Any, Any]:
        """Local memory of the lanes, uint8 ``[lanes, bytes]``, and which bytes were written."""
        if self.local_data is None:
            size = self.program.local_bytes
            self.local_data = np.zeros((self.lanes, size), np.uint8)
            self.local_written = np.zeros((self.lanes, size), np.bool_)
        return self.local_data, self.local_written

    def await_all(self, conditions: Callable[[], list[Condition | None]]) -> bool:
        """Whether every warp may go on; if not, the gang is woken when the last condition is met.

        Args:
            conditions: one of each warp, called when the instruction is reached first, not when it is tried again.
        """
        wait = self.wait
        if wait is None:
            wait = self.wait = conditions()
        open_conditions = {id(each): each for each in wait if each is not None and not each.ready}
        if not open_conditions:
            self.wait = None
            return True
        self.missing = len(open_conditions)
        for each in open_conditions.values():
            each.waiters.append(self)
        return False

    # --- running

    def start(self) -> None:
        """Stands before the first block."""
        exists = np.concatenate([warp.threads for warp in self.warps])
        self.mask = None if exists.all() else exists
        self.version = self.program.version(Key(0, self.mask is not None, self.single_warp, self.single_cta, ()))

    def advance(self, budget: int) -> str:
        """Runs up to `budget` blocks. Returns ``yield``, ``wait``, ``linger`` or ``end``."""
        executed = self.run.executed
        try:
            self.sleeps = False
            self.polled.clear()
            self.polls = 0
            while budget > 0 and not self.sleeps:
                budget -= 1
                version = self.version
                way = version.run(self, self.registers)
                if way == WAIT:
                    return "wait"
                executed[version] += len(self.warps)
                if way == DIVERGED:
                    state = self._diverge(version.block, version)
                else:
                    target = version.block.taken if way == 0 else version.block.next
                    assert target is not None
                    link = version.links.get(way)
                    if (
                        link is not None
                        and not (self.frames and self.frames[-1].join == target)
                        and not (self.meetings and self.meetings[-1].join == target)
                    ):
                        self.version = link
                        continue
                    state = self._enter(target, version, way)
                if state:
                    return state
        except EmulatorError as error:
            raise self._located(error) from None
        except (ArithmeticError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            located = self._located(EmulatorError(f"internal error of the emulator: {type(error).__name__}: {error}"))
            raise located from error
        return "yield"

    def _located(self, error: EmulatorError) -> EmulatorError:
        if str(error).startswith("PTX line"):
            return error
        line, trace = 0, error.__traceback__ or (error.__context__.__traceback__ if error.__context__ else None)
        trace = sys.exc_info()[2] or trace
        while trace is not None:
            if trace.tb_frame.f_code.co_filename.startswith("<PTX block"):
                line = self.version.lines[trace.tb_lineno - 1]
            trace = trace.tb_next
        where = str(self.warps[0]) + (f" and {len(self.warps) - 1} more warps" if len(self.warps) > 1 else "")
        text = self.program.text_of(line)
        return EmulatorError(f"PTX line {line} ({text}), {where}: {error}")

    def current_line(self) -> int:
        """PTX line of the instruction that runs now, found on the call stack."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<PTX block"):
                return self.version.lines[frame.f_lineno - 1]
            if frame.f_back is None:
                break
            frame = frame.f_back
        return 0

    @property
    def line(self) -> int:
        """PTX line at which the gang stands."""
        return self.program.kernel.instructions[self.version.block.start].line

    def _kinds(self, block: int) -> tuple[tuple[str, str], ...]:
        """Kinds of the live registers, from what they hold."""
        kinds = []
        numbers, registers, defined = self.program.numbers, self.registers, self.defined
        for name in self.program.live_in(block):
            number = numbers[name]
            value = registers[number]
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                mask = defined.get(number)
                if mask is not None and (mask.all() or (self.mask is not None and (mask | ~self.mask).all() and not self.frames)):
                    del defined[number]
                    mask = None
                kinds.append((name, "A" if mask is None else "P"))
            else:
                kinds.append((name, "I"))
        return tuple(kinds)

    def stand(self, block: int) -> None:
        """Stands before a block, with its registers as they are."""
        program = self.program
        if self.defined and not self.defined.keys().isdisjoint(program.live_numbers((block,))):
            self.version = program.version(Key(block, self.mask is not None, self.single_warp, self.single_cta, self._kinds(block)))
            return
        types = tuple(map(type, program.live_values(block)(self.registers)))
        short = (block, self.mask is not None, self.single_warp, self.single_cta, types)
        version = program.standing.get(short)
        if version is None:
            version = program.standing[short] = program.version(Key(*short[:4], self._kinds(block)))
        self.version = version

    def _enter(self, target: int, version: Version | None, way: int) -> str:
        """Goes to a block; at a join it goes on with other lanes or waits for other warps."""
        direct, left = True, 0
        while True:
            if self.meetings and target == self.meetings[-1].join and len(self.frames) == self.meetings[-1].depth and target != EXIT:
                meeting = self.meetings.pop()
                direct = False
                if not meeting.closed:
                    meeting.arrived.append(self)
                    self.lingering, self.meeting, self.target = True, meeting, target
                    return "linger"
                meeting.outstanding -= 1
                continue
            if target == EXIT:
                mask = self.mask
                if not self.frames:
                    return "end"
                for frame in self.frames:
                    if mask is not None:
                        frame.mask = frame.mask & ~mask
            elif not (self.frames and target == self.frames[-1].join):
                break
            frame = self.frames[-1]
            direct = direct and frame.skipped and target != EXIT
            if frame.pending:
                target, self.mask = frame.pending.pop()
                continue
            self.frames.pop()
            left += 1
            if frame.mask is _all_of(self.lanes):
                self.mask, target = None, frame.join
            elif some(frame.mask):
                self.mask = None if every(frame.mask) else frame.mask
                target = frame.join
            else:
                self.mask = frame.mask
                target = EXIT
        if not direct or version is None or self.defined:
            self.stand(target)
            return ""
        # nothing else ran since `version`, so what it left is what the next block finds
        behind = (way, left, self.mask is not None)
        found = version.behind.get(behind)
        if found is None:
            live = set(self.program.live_in(target))
            kinds = tuple((name, kind) for name, kind in version.kinds.items() if name in live)
            found = self.program.version(Key(target, self.mask is not None, self.single_warp, self.single_cta, kinds))
            version.behind[behind] = found
            if not left:
                version.links[way] = found
        self.version = found
        return ""

    def resume(self) -> str:
        """Goes on behind a meeting."""
        self.lingering = False
        return self._enter(self.target, None, 0)

    def _diverge(self, block: Block, version: Version | None) -> str:
        """Acts on the branch at a block's end that lanes take differently.

        Args:
            block: that ends with it.
            version: that this gang ran; None for a part of the gang that did, whose registers may be of other kinds.
        """
        taken = self.branch
        everything = _all_of(self.lanes) if self.mask is None else self.mask
        other = everything & ~taken
        assert block.taken is not None
        assert block.next is not None
        if not self.single_warp:
            goes = taken.reshape(-1, LANES).any(axis=1)
            stays = other.reshape(-1, LANES).any(axis=1)
            groups = [np.flatnonzero(goes & ~stays), np.flatnonzero(stays & ~goes), np.flatnonzero(goes & stays)]
            idle = np.flatnonzero(~goes & ~stays)
            if sum(1 for group in groups if group.size) > 1:
                first = next(i for i, group in enumerate(groups) if group.size)
                groups[first] = np.sort(np.concatenate([groups[first], idle]))
                return self._part(block, groups)
        if block.taken == block.join and block.next not in (block.join, EXIT):  # lanes that skip the next block wait behind it at once
            self.frames.append(Frame(block.join, everything, [], True))
            self.mask = other
            if version is None or self.defined:
                self.stand(block.next)
                return ""
            link = version.links.get(DIVERGED)
            if link is None:
                self.stand(block.next)
                link = version.links[DIVERGED] = self.version
            self.version = link
            return ""
        self.frames.append(Frame(block.join, everything, [(block.next, other)]))
        self.mask = taken
        return self._enter(block.taken, None, 0)

    def _part(self, block: Block, groups: list[NDArray[np.intp]]) -> str:
        """Becomes several gangs behind a block; this one ends."""
        parts = []
        branch = self.branch
        for which, group in enumerate(groups):
            if group.size:
                part = self.take(group.tolist(), block.successors)
                part.branch = branch.reshape(-1, LANES)[group].reshape(-1)
                parts.append((which, part))
        times = self.run.partings[block.index] = self.run.partings.get(block.index, 0) + 1
        apart = len(self.warps) <= _FEW and times > _OFTEN
        self._meet(EXIT if apart else block.join, [part for _, part in parts])
        for which, part in parts:
            part.version = self.version
            if which == 2:
                state = part._diverge(block, None)
            else:
                target = block.taken if which == 0 else block.next
                assert target is not None
                state = part._enter(target, None, 0)
            self.run.adopt(part, state)
        return "gone"

    def _meet(self, join: int, parts: list[Gang]) -> None:
        for meeting in self.meetings:
            meeting.outstanding += len(parts) - 1
        if join != EXIT and self.run.merging:
            meeting = Meeting(join, len(self.frames), len(parts))
            for part in parts:
                part.meetings.append(meeting)

    def take(self, indices: list[int], places: tuple[int, ...]) -> Gang:
        """A new gang of some warps, with what their lanes will read from blocks ``places`` on; the caller decides what becomes of this one."""
        for frame in self.frames:
            places += (frame.join, *(block for block, _ in frame.pending))
        part = Gang(self.run, self.program, [self.warps[i] for i in indices], [])
        rows = np.array(indices)
        first, last = indices[0], indices[-1] + 1
        together = indices == list(range(first, last))
        low, high = first * LANES, last * LANES

        def lanes(array: Any) -> Any:
            if together:
                return array[low:high]  # registers are never changed in place
            return array.reshape(-1, LANES)[rows].reshape(-1)

        registers: list[Any] = [None] * len(self.registers)
        for number in self.program.live_numbers(places):
            value = self.registers[number]
            if isinstance(value, np.ndarray):
                value = lanes(value)
                if number in self.defined:
                    part.defined[number] = lanes(self.defined[number])
                elif part.single_warp and value[0] == value[-1] and value.tobytes() == value[:1].tobytes() * LANES:
                    value = value[0].item()
            registers[number] = value
        part.registers = registers
        part.mask = None if self.mask is None else lanes(self.mask)
        if self.local_data is not None:
            wide = (rows[:, None] * LANES + np.arange(LANES)).reshape(-1)
            part.local_data, part.local_written = self.local_data[wide], self.local_written[wide]
        part.frames = [
            Frame(frame.join, lanes(frame.mask), [(block, lanes(mask)) for block, mask in frame.pending], frame.skipped)
            for frame in self.frames
        ]
        part.meetings = list(self.meetings)
        part.priority = self.priority
        if self.wait is not None:
            part.wait = [self.wait[i] for i in indices]
            part.votes = [self.votes[i] for i in indices] if self.votes else []
        return part

    def split(self, ready: list[int]) -> None:
        """Becomes two gangs at the same instruction: some warps, and the rest."""
        chosen = set(ready)
        groups = [ready, [i for i in range(len(self.warps)) if i not in chosen]]
        here = self.version.block.index
        parts = [self.take(group, (here,)) for group in groups]
        self._meet(EXIT, parts)
        for part in parts:
            part.stand(here)
            self.run.adopt(part, "")
