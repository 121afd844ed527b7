"""The instruction table: every opcode that is modelled, spelled with all of its modifiers, and how it is translated.

A pattern such as ``add{.sat|}.s32`` stands for the opcodes it expands to; an instruction must equal one of them and have an allowed number
of operands. Nothing is matched by prefix. Groups of opcodes with many independent modifiers (``cvt``) are checked by a function instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from densemoe.compile.emulator.parser import Instruction, Kernel, Memory, Operand, Pair, Register, Vector
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.emitter import Emitter

__all__ = ["Operation", "check", "destinations", "expand", "look_up", "opcodes", "operation", "sources"]

Emit = Callable[["Emitter", Instruction], None]


@dataclass(frozen=True)
class Operation:
    """One opcode.

    Attributes:
        emit: writes its translation.
        counts: allowed numbers of operands.
        destinations: leading operands that are written.
        blocking: the instruction may have to wait, so it begins a block; its function is called again until it is done.
        reads_destination: the destination is a source too (accumulators of ``wgmma``).
    """

    emit: Emit
    counts: tuple[int, ...]
    destinations: int = 1
    blocking: bool = False
    reads_destination: bool = False


_TABLE: dict[str, Operation] = {}
#: opcode families that are checked by a function instead of a pattern
_FAMILIES: dict[str, tuple[Callable[[str], bool], Operation]] = {}


def expand(pattern: str) -> list[str]:
    """All opcodes of a pattern: ``{a|b|}`` stands for one of its alternatives; braces may nest."""
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, parts, last = 0, [], start + 1
    for i in range(start, len(pattern)):
        mark = pattern[i]
        if mark == "{":
            depth += 1
        elif mark == "}":
            depth -= 1
            if depth == 0:
                parts.append(pattern[last:i])
                rest = expand(pattern[i + 1 :])
                return [pattern[:start] + middle + end for part in parts for middle in expand(part) for end in rest]
        elif mark == "|" and depth == 1:
            parts.append(pattern[last:i])
            last = i + 1
    raise ValueError(f"unbalanced pattern {pattern!r}")


def operation(
    *patterns: str, operands: int | tuple[int, ...], destinations: int = 1, blocking: bool = False, reads_destination: bool = False
) -> Callable[[Emit], Emit]:
    """Registers the translation of every opcode that the patterns expand to."""
    counts = (operands,) if isinstance(operands, int) else operands

    def register(emit: Emit) -> Emit:
        each = Operation(emit, counts, destinations, blocking, reads_destination)
        for pattern in patterns:
            for opcode in expand(pattern):
                if opcode in _TABLE and _TABLE[opcode].emit is not emit:
                    raise ValueError(f"{opcode} is registered twice")
                _TABLE[opcode] = each
        return emit

    return register


def family(prefix: str, accepts: Callable[[str], bool], operands: tuple[int, ...]) -> Callable[[Emit], Emit]:
    """Registers opcodes that begin with ``prefix.`` and that `accepts` takes whole."""

    def register(emit: Emit) -> Emit:
        _FAMILIES[prefix] = (accepts, Operation(emit, operands))
        return emit

    return register


def look_up(opcode: str) -> Operation | None:
    """The operation of an opcode, or None."""
    found = _TABLE.get(opcode)
    if found is None:
        entry = _FAMILIES.get(opcode.split(".", 1)[0])
        if entry is not None and entry[0](opcode):
            found = entry[1]
    return found


def opcodes() -> list[str]:
    """Every opcode of the table, sorted (families checked by a function are not in it)."""
    return sorted(_TABLE)


def check(kernel: Kernel) -> list[Operation]:
    """The operation of each instruction of a kernel.

    Raises:
        EmulatorError: unknown opcodes or wrong operand counts, all of them, each with its line.
    """
    found, wrong = [], []
    for each in kernel.instructions:
        known = look_up(each.opcode)
        if known is None:
            wrong.append(f"PTX line {each.line}: the instruction {each.opcode!r} is not modelled")
        elif len(each.operands) not in known.counts:
            wanted = " or ".join(map(str, known.counts))
            wrong.append(f"PTX line {each.line}: {each.opcode!r} with {len(each.operands)} operands, {wanted} needed")
        else:
            found.append(known)
    if wrong:
        raise EmulatorError("\n".join(wrong[:20] + ([f"and {len(wrong) - 20} more"] if len(wrong) > 20 else [])))
    return found


def _registers(operand: Operand, out: list[str]) -> None:
    if isinstance(operand, Register):
        out.append(operand.name)
    elif isinstance(operand, Vector):
        for each in operand.items:
            _registers(each, out)
    elif isinstance(operand, Pair):
        _registers(operand.first, out)
        _registers(operand.second, out)
    elif isinstance(operand, Memory):
        _registers(operand.base, out)
        for each in operand.coordinates or ():
            _registers(each, out)


def destinations(instruction: Instruction, known: Operation) -> list[str]:
    """Registers that an instruction writes."""
    out: list[str] = []
    for each in instruction.operands[: known.destinations]:
        if not isinstance(each, Memory):
            _registers(each, out)
    return out


def sources(instruction: Instruction, known: Operation) -> list[str]:
    """Registers that an instruction reads, with its guard."""
    out: list[str] = [instruction.guard] if instruction.guard else []
    first = 0 if known.reads_destination else known.destinations
    for each in instruction.operands[first:]:
        _registers(each, out)
    for each in instruction.operands[:first]:
        if isinstance(each, Memory):
            _registers(each, out)
    return out
