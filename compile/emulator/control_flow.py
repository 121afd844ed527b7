"""Control flow of a kernel: blocks, what is live at their borders, where branches meet again.

Sources: PTX ISA 9.x, 9.7.12 (control flow). A block is a run of instructions that is entered at its first and left at its last; an
instruction that may have to wait begins a block of its own. Reconvergence is at the immediate post-dominator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from densemoe.compile.emulator.operations import Operation, destinations, sources
from densemoe.compile.emulator.parser import Kernel, Symbol
from densemoe.runtime.errors import EmulatorError

__all__ = ["EXIT", "Block", "build_blocks"]

EXIT = -1
"""Index of the virtual block behind every ``ret``."""
_BRANCHES = ("bra", "bra.uni")
_ENDS = ("ret", "exit", "trap")


@dataclass
class Block:
    """Instructions ``[start, end)``.

    Attributes:
        taken: block that a branch at the end jumps to, or None.
        next: block that follows where it does not, or None after an unconditional branch; `EXIT` after ``ret``.
        live_in, live_out: registers whose value may still be read.
        join: immediate post-dominator, `EXIT` where paths meet nowhere.
    """

    index: int
    start: int
    end: int
    taken: int | None = None
    next: int | None = None
    live_in: frozenset[str] = frozenset()
    live_out: frozenset[str] = frozenset()
    join: int = EXIT
    successors: tuple[int, ...] = field(default=())


def build_blocks(kernel: Kernel, operations: list[Operation]) -> list[Block]:
    """Blocks in the order of the text.

    Raises:
        EmulatorError: control runs off the end of the kernel.
    """
    code = kernel.instructions
    leaders = {0} | {index for index in kernel.labels.values() if index < len(code)}
    for i, each in enumerate(code):
        if each.opcode in _BRANCHES or each.opcode in _ENDS:
            leaders.add(i + 1)
        if operations[i].blocking:
            leaders.add(i)
    starts = sorted(index for index in leaders if index < len(code))
    number = {start: i for i, start in enumerate(starts)}
    blocks = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(code)
        block = Block(i, start, end)
        last = code[end - 1]
        following: int | None = i + 1 if i + 1 < len(starts) else None
        if last.opcode in _BRANCHES:
            target = last.operands[0]
            assert isinstance(target, Symbol)
            place = kernel.labels[target.name]
            block.taken = number[place] if place < len(code) else EXIT
            block.next = following if last.guard else None
            if last.guard and following is None:
                raise EmulatorError(f"PTX line {last.line}: control runs off the end of {kernel.name}")
        elif last.opcode in _ENDS:
            block.next = following if last.guard else EXIT
            block.taken = EXIT if last.guard else None
        elif following is None:
            raise EmulatorError(f"PTX line {last.line}: control runs off the end of {kernel.name}")
        else:
            block.next = following
        block.successors = tuple(dict.fromkeys(x for x in (block.taken, block.next) if x is not None))
        blocks.append(block)
    _liveness(kernel, operations, blocks)
    _joins(blocks)
    return blocks


def _liveness(kernel: Kernel, operations: list[Operation], blocks: list[Block]) -> None:
    reads, kills = [], []
    for block in blocks:
        read: set[str] = set()
        kill: set[str] = set()
        for i in range(block.start, block.end):
            each, known = kernel.instructions[i], operations[i]
            read |= set(sources(each, known)) - kill
            if each.guard is None:
                kill |= set(destinations(each, known))
        reads.append(read)
        kills.append(kill)
    live = [frozenset(read) for read in reads]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            out: set[str] = set()
            for successor in block.successors:
                if successor != EXIT:
                    out |= live[successor]
            block.live_out = frozenset(out)
            into = frozenset(reads[block.index] | (out - kills[block.index]))
            if into != live[block.index]:
                live[block.index] = into
                changed = True
    for block in blocks:
        block.live_in = live[block.index]


def _joins(blocks: list[Block]) -> None:
    """Immediate post-dominators, by sets as bit masks (kernels have hundreds of blocks at most)."""
    count = len(blocks)
    everything = (1 << (count + 1)) - 1  # bit `count` is the exit
    after = [everything] * count
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            common = everything
            for successor in block.successors:
                common &= 1 << count if successor == EXIT else after[successor]
            value = common | 1 << block.index
            if value != after[block.index]:
                after[block.index] = value
                changed = True
    for block in blocks:
        strict = after[block.index] & ~(1 << block.index)
        candidates = [i for i in range(count) if strict >> i & 1]
        # the nearest one has all other strict post-dominators among its own
        for i in candidates:
            if strict & ~after[i] == 0:
                block.join = i
                break
