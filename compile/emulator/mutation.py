"""Mutants of a kernel: its PTX with one synchronisation, fence, phase or address step deleted or altered.

A trustworthy emulator notices that such a kernel is wrong. Which steps there are is read from the text and the PTX ISA alone (9.7.13 barriers,
mbarriers and fences, 9.7.9.25 and 9.7.9.27 asynchronous copies, 9.7.15 ``wgmma``, 9.7.16 ``tcgen05``); nothing is known of the kernel.

Left alone is what changes speed and nothing else: ``griddepcontrol.launch_dependents`` (the next launch may begin at the latest when this one
ends), ``tcgen05.relinquish_alloc_permit`` (another CTA may allocate at the latest after ``dealloc``), prefetches, ``setmaxnreg``, cache hints;
and the tests for a negative index in signed divisions, since no index is.

A mutant's name stays the same when lines move or registers are renumbered: ``kind``, the statement with registers as ``%``, and its number among
the equal ones from the top.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["FAMILIES", "KINDS", "Mutant", "Statement", "mutants", "statements"]

#: What a kind does to a step.
KINDS: Final = {
    "delete": "the statement is left out",
    "no-wait": "a wait for an mbarrier succeeds at once",
    "twice": "the statement is executed twice",
    "every-lane": "every lane does what one elected lane should",
    "count": "an mbarrier awaits one arrival more",
    "bytes": "an mbarrier expects 16 bytes more",
    "parity": "a wait is for the other phase",
    "parity-stuck": "a wait is always for phase 0",
    "phase": "one constant on the way to a wait's parity is another",
    "barrier-address": "the neighbouring mbarrier is used",
    "relaxed": "release or acquire semantics are taken away",
    "scope": "release or acquire semantics are for the CTA alone",
    "threads": "a barrier awaits one warp less",
    "group": "a wait leaves one group more in flight",
    "columns": "half the tensor memory is allocated, or given back",
    "address": "an operand's address is 16 bytes, or one tensor memory column, further",
    "coordinate": "one coordinate of a tensor copy is one further",
    "size": "a bulk copy moves 16 bytes less",
    "multicast": "a copy or commit reaches one CTA less",
    "step": "one constant on the way to an address is another",
    "descriptor": "a matrix descriptor points 16 bytes further",
    "accumulate": "an MMA accumulates where it should start anew, and the reverse",
}
#: Kinds by what they attack.
FAMILIES: Final = {
    "synchronisation": (
        "delete", "no-wait", "twice", "every-lane", "count", "bytes", "barrier-address", "relaxed", "scope", "threads", "group", "multicast",
    ),
    "phase": ("parity", "parity-stuck", "phase"),
    "address": ("address", "coordinate", "size", "step", "descriptor", "columns", "accumulate"),
}  # fmt: skip

_DELETED: Final = (
    "mbarrier.init", "mbarrier.arrive", "mbarrier.expect_tx", "mbarrier.inval", "mbarrier.complete_tx", "fence.", "membar.",
    "tcgen05.fence::", "tcgen05.commit", "tcgen05.wait::", "tcgen05.alloc", "tcgen05.dealloc", "tcgen05.cp.",
    "tcgen05.mma.", "barrier.cluster.", "barrier.sync", "barrier.arrive", "barrier.red", "bar.", "cp.async.commit_group", "cp.async.wait_group",
    "cp.async.wait_all", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "cp.async.mbarrier.arrive", "cp.async.bulk.tensor",
    "cp.async.bulk.shared", "cp.async.bulk.global", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "wgmma.mma_async",
    "griddepcontrol.wait", "atom.", "red.",
)  # fmt: skip
_TWICE: Final = (
    "mbarrier.init", "mbarrier.arrive", "tcgen05.commit", "tcgen05.alloc", "tcgen05.dealloc", "barrier.cluster.arrive", "cp.async.bulk.tensor",
)  # fmt: skip
_SCOPED: Final = ("atom.", "red.", "ld.", "st.", "fence.acq_rel.", "fence.sc.", "fence.acquire.", "fence.release.")
_REGISTER: Final = re.compile(r"%[a-zA-Z_]\w*(?:\.[xyz])?|(?<![\w.$%])[pqb]\d*(?![\w.(])")
_LABEL: Final = re.compile(r"^\s*[$\w]+:")
_STATEMENT: Final = re.compile(r"[^;{}]*(?:\{[^{};]*\}[^;{}]*)*;")
_NUMBER: Final = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)")
_MEMORY: Final = re.compile(r"\[([^\[\]]*)\]")
#: Integer arithmetic through which an address, a descriptor or a phase is followed back.
_ARITHMETIC: Final = ("add.", "sub.", "mul.", "mad.", "shl.", "shr.", "and.", "or.", "xor.", "not.", "bfi.", "bfe.", "selp.", "mov.", "cvt.", "cvta.")
_ARITHMETIC_PREDICATES: Final = ("setp.",)
_SLICE: Final = 24  # statements that a value is followed back over
_SHARED: Final = ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "atom.shared", "red.shared", "st.async", "cp.async.ca", "cp.async.cg")


@dataclass(frozen=True)
class Statement:
    """One statement of a PTX text.

    Attributes:
        start, end: its characters, with its semicolon.
        line: from 1.
        guard: ``@%p`` or nothing.
        opcode: with all modifiers.
        operands: at the top level.
    """

    start: int
    end: int
    line: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def shape(self) -> str:
        """The statement with its registers as ``%``."""
        return _REGISTER.sub("%", f"{self.opcode} {', '.join(self.operands)}").strip()

    @property
    def written(self) -> list[str]:
        """Registers that it writes."""
        stores = self.opcode.startswith(("st.", "red.", "bra", "cp.", "bar", "fence", "mbarrier.init", "tcgen05.mma", "tcgen05.cp", "tcgen05.st"))
        return [] if stores or not self.operands else self.registers(self.operands[0]) if not self.operands[0].startswith("[") else []

    @property
    def read(self) -> list[str]:
        """Registers that it reads."""
        own = self.operands[1:] if self.written else self.operands
        return [name for operand in own for name in self.registers(operand)]

    def registers(self, operand: str) -> list[str]:
        """Registers of an operand; those of inline assembly, without %, with the line that they belong to."""
        return [name if name[0] == "%" else f"{name}@{self.line}" for name in _REGISTER.findall(operand)]


@dataclass(frozen=True)
class Mutant:
    """One altered kernel.

    Attributes:
        kind: of `KINDS`, with which operand where a statement has several, as in ``coordinate y``.
        site: the statement's `Statement.shape` and its number, as in ``fence.proxy.async #2``.
        line: of the original PTX text.
        text: of the original statement.
        edits: (start, end, replacement) of the original text.
    """

    kind: str
    site: str
    line: int
    text: str
    edits: tuple[tuple[int, int, str], ...]

    @property
    def name(self) -> str:
        """Unique in a kernel."""
        return f"{self.kind}: {self.site}"

    @property
    def family(self) -> str:
        """Of `FAMILIES`."""
        return next(family for family, kinds in FAMILIES.items() if self.kind.split()[0] in kinds)

    def apply(self, ptx: str) -> str:
        """The altered text; it has as many lines."""
        for start, end, replacement in sorted(self.edits, reverse=True):
            ptx = ptx[:start] + replacement + ptx[end:]
        return ptx


def _split(text: str) -> tuple[str, ...]:
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return tuple(part for part in parts if part)


def statements(ptx: str) -> list[Statement]:
    """Every instruction of the kernels in a PTX text, in order; directives are left out."""
    found = []
    body = ptx.find("\n{")
    position = 0
    for number, whole in enumerate(ptx.split("\n"), 1):
        code = whole.split("//")[0]
        for match in _STATEMENT.finditer(code) if position > body else ():
            text = match[0]
            begin = match.start() + len(text) - len(text.lstrip())
            text = text.strip()[:-1].strip()
            label = _LABEL.match(text)
            if label:
                begin += label.end()
                text = text[label.end() :].strip()
            guard = ""
            if text.startswith("@"):
                guard, _, text = text.partition(" ")
                text = text.strip()
            if not text or text.startswith("."):
                continue
            opcode, _, rest = text.replace("\t", " ").partition(" ")
            found.append(Statement(position + begin, position + match.end(), number, guard, opcode, _split(rest)))
        position += len(whole) + 1
    return found


def mutants(ptx: str) -> list[Mutant]:
    """Every mutant of a PTX text, in the order of its lines."""
    every = statements(ptx)
    seen: dict[str, int] = {}
    numbers = []
    for each in every:
        seen[each.shape] = seen.get(each.shape, 0) + 1
        numbers.append(seen[each.shape])
    found: dict[tuple[int, int, str], Mutant] = {}
    for index, kind, replacement, prefix in _changes(every):
        each = every[index]
        original = ptx[each.start : each.end]
        edits = ((each.start, each.end, _statement(each, kind, replacement, prefix)),)
        mutant = Mutant(kind, f"{each.shape} #{numbers[index]}", each.line, " ".join(original.split()), edits)
        found.setdefault(edits[0], mutant)  # a constant on the way to a parity and to an address is one step
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.kind))


def _statement(each: Statement, kind: str, replacement: tuple[str, ...] | None, prefix: str) -> str:
    guard = f"{each.guard} " if each.guard else ""
    if replacement is None:
        return ""
    opcode, *operands = replacement
    whole = f"{guard}{opcode} {', '.join(operands)};"
    if kind == "twice":
        return f"{whole} {whole}"
    return f"{{ {prefix} {whole} }}" if prefix else whole


Change = tuple[int, str, "tuple[str, ...] | None", str]


def _changes(every: list[Statement]) -> Iterator[Change]:
    """(number of the statement, kind, opcode and operands or None for nothing, statements before it)."""
    for i, each in enumerate(every):
        opcode, operands = each.opcode, each.operands
        if opcode.startswith("cp.async.bulk.prefetch"):
            continue  # a hint
        if opcode.startswith(_DELETED):
            yield i, "delete", None, ""
        if opcode.startswith(_TWICE):
            yield i, "twice", (opcode, *operands), ""
        if opcode.startswith(("mbarrier.try_wait", "mbarrier.test_wait")):
            yield i, "no-wait", ("setp.eq.b32", operands[0], "0", "0"), ""
        if opcode == "elect.sync":
            yield i, "every-lane", ("setp.eq.b32", operands[0].partition("|")[2], "0", "0"), ""
        for change in (*_mbarriers(each), *_semantics(each), *_copies(each), *_tensors(each)):
            yield (i, *change)
    yield from _slices(every)


Altered = tuple[str, "tuple[str, ...] | None", str]


def _further(operand: str, step: int) -> str:
    """A memory operand ``[base + offset]`` further by ``step`` bytes."""
    match = re.fullmatch(r"\[([^+,\]]+?)(?:\+(-?\d+))?\]", operand)
    return operand if match is None else f"[{match[1].strip()}+{int(match[2] or 0) + step}]"


def _replaced(each: Statement, position: int, operand: str) -> tuple[str, ...]:
    return (each.opcode, *each.operands[:position], operand, *each.operands[position + 1 :])


def _temporary(value: str, operation: str, width: int = 32) -> tuple[str, str]:
    """(name, statements) of a changed copy of a value; the name is in a scope of its own."""
    return "mutated", f".reg .b{width} mutated; {operation.format(value)};"


def _mbarriers(each: Statement) -> Iterator[Altered]:
    opcode, operands = each.opcode, each.operands
    if not opcode.startswith(("mbarrier.", "cp.async.mbarrier")):
        return
    at = next((n for n, operand in enumerate(operands) if operand.startswith("[")), None)
    if at is not None:
        yield "barrier-address", _replaced(each, at, _further(operands[at], 8)), ""
    if opcode.startswith("mbarrier.init"):
        name, before = _temporary(operands[1], "add.s32 mutated, {}, 1")
        yield "count", _replaced(each, 1, name), before
    if "expect_tx" in opcode:
        name, before = _temporary(operands[-1], "add.s32 mutated, {}, 16")
        yield "bytes", _replaced(each, len(operands) - 1, name), before
    if "wait.parity" in opcode and at is not None:
        name, before = _temporary(operands[at + 1], "xor.b32 mutated, {}, 1")
        yield "parity", _replaced(each, at + 1, name), before
        yield "parity-stuck", _replaced(each, at + 1, "0"), ""


def _semantics(each: Statement) -> Iterator[Altered]:
    opcode, operands = each.opcode, each.operands
    if opcode.startswith("barrier.cluster.arrive") and ".relaxed" not in opcode:
        yield "relaxed", (opcode.replace(".arrive.release", ".arrive").replace(".arrive", ".arrive.relaxed"), *operands), ""
    elif opcode.startswith(("mbarrier.arrive", "mbarrier.try_wait", "mbarrier.test_wait")) and (".release" in opcode or ".acquire" in opcode):
        yield "relaxed", (opcode.replace(".release", ".relaxed").replace(".acquire", ".relaxed"), *operands), ""
    elif opcode.startswith("atom.acq_rel"):
        yield "relaxed", (opcode.replace(".acq_rel", ".relaxed"), *operands), ""
    if opcode.startswith(_SCOPED) and any(f".{order}." in opcode for order in ("acquire", "release", "acq_rel", "sc")):
        narrow = re.sub(r"\.(gpu|sys|cluster)\b", ".cta", opcode, count=1)
        if narrow != opcode:
            yield "scope", (narrow, *operands), ""
    if opcode.startswith(("barrier.sync", "bar.sync")) and len(operands) == 2 and operands[1].isdecimal() and int(operands[1]) > 32:
        yield "threads", (opcode, operands[0], str(int(operands[1]) - 32)), ""
    if opcode.startswith(("cp.async.wait_group", "cp.async.bulk.wait_group", "wgmma.wait_group")) and operands and operands[0].isdecimal():
        yield "group", (opcode, str(int(operands[0]) + 1)), ""


def _copies(each: Statement) -> Iterator[Altered]:
    opcode, operands = each.opcode, each.operands
    if not opcode.startswith("cp.async.bulk.") or not operands:
        return
    memories = [n for n, operand in enumerate(operands) if operand.startswith("[")]
    tensor = next((n for n in memories if "{" in operands[n]), None)
    for n in memories:
        if n == tensor:
            inner = _split(operands[n][1:-1])
            coordinates = _split(inner[1].strip("{}"))
            for axis, coordinate in enumerate(coordinates):
                name, before = _temporary(coordinate, "add.s32 mutated, {}, 1")
                changed = ", ".join((*coordinates[:axis], name, *coordinates[axis + 1 :]))
                if not axis:  # in bytes or elements: 16 keep the alignment that the copy needs
                    before = before.replace(", 1;", ", 16;")
                yield f"coordinate {'xyzuv'[axis]}", _replaced(each, n, f"[{inner[0]}, {{{changed}}}]"), before
        elif n == memories[-1] and "mbarrier" in opcode:
            yield "barrier-address", _replaced(each, n, _further(operands[n], 8)), ""
        elif n == (0 if opcode.startswith("cp.async.bulk.tensor") else n):
            yield f"address {'from' if n else 'to'}", _replaced(each, n, _further(operands[n], 128 if "tensor" in opcode else 16)), ""
    if tensor is None and len(operands) > 2 and not opcode.startswith("cp.async.bulk.wait"):
        name, before = _temporary(operands[2], "add.s32 mutated, {}, -16")
        yield "size", _replaced(each, 2, name), before
    if "multicast" in opcode:
        yield from _multicast(each)


def _multicast(each: Statement) -> Iterator[Altered]:
    """The mask without its lowest CTA, and without its highest."""
    last = len(each.operands) - 1
    mask = each.operands[last] if not each.operands[last].startswith("[") else ""
    if mask:
        before = f".reg .b16 mutated, rest; sub.s16 rest, {mask}, 1; and.b16 mutated, {mask}, rest;"
        yield "multicast", _replaced(each, last, "mutated"), before


def _tensors(each: Statement) -> Iterator[Altered]:
    opcode, operands = each.opcode, each.operands
    if opcode.startswith("tcgen05.commit"):
        yield "barrier-address", _replaced(each, 0, _further(operands[0], 8)), ""
        if "multicast" in opcode:
            yield from _multicast(each)
    elif opcode.startswith(("tcgen05.alloc", "tcgen05.dealloc")):
        name, before = _temporary(operands[1], "shr.u32 mutated, {}, 1")
        yield "columns", _replaced(each, 1, name), before
        if operands[0].startswith("["):
            yield "address", _replaced(each, 0, _further(operands[0], 16)), ""
    elif opcode.startswith("tcgen05.ld"):
        yield "address", _replaced(each, 1, _further(operands[1], 1)), ""
    elif opcode.startswith("tcgen05.cp"):
        yield "address", _replaced(each, 0, _further(operands[0], 4)), ""
        yield "descriptor", _replaced(each, 1, "mutated"), _temporary(operands[1], "add.s64 mutated, {}, 1", 64)[1]
    elif opcode.startswith("tcgen05.mma"):
        yield "address", _replaced(each, 0, _further(operands[0], 8)), ""
        for n in (1, 2):
            if not operands[n].startswith("["):
                yield f"descriptor {'_ab'[n]}", _replaced(each, n, "mutated"), _temporary(operands[n], "add.s64 mutated, {}, 2", 64)[1]
        for n in range(4, len(operands)):
            if operands[n].startswith("["):
                yield f"address {'scale a' if n == 4 else 'scale b'}", _replaced(each, n, _further(operands[n], 4)), ""
            else:
                flipped = f".reg .pred mutated; not.pred mutated, {operands[n]};"
                yield "accumulate", _replaced(each, n, "mutated"), flipped
    elif opcode.startswith("wgmma.mma_async"):
        for n, operand in enumerate(operands):
            if n and operand.startswith("%rd"):
                yield f"descriptor {n}", _replaced(each, n, "mutated"), _temporary(operand, "add.s64 mutated, {}, 2", 64)[1]
    elif opcode.startswith(_SHARED):
        n = 0 if opcode.startswith(("st", "cp", "red")) else 1
        yield "address", _replaced(each, n, _further(operands[n], 16)), ""


# ---- the arithmetic before


def _slices(every: list[Statement]) -> Iterator[Change]:
    """Constants on the way to the addresses, descriptors and parities that the steps above use."""
    writers: dict[str, list[int]] = {}
    for i, each in enumerate(every):
        for name in each.written:
            writers.setdefault(name, []).append(i)
    for kind, registers in _roots(every):
        for i in _backwards(every, writers, registers):
            each = every[i]
            if _rounds_negatives(each, every, writers):
                continue
            for altered in _constants(each):
                yield i, kind, altered, ""


def _rounds_negatives(each: Statement, every: list[Statement], writers: dict[str, list[int]]) -> bool:
    """A shift of sign bits: what a signed division adds to a negative dividend, and no index is negative."""
    if not each.opcode.startswith("shr.u"):
        return False
    sources = [every[i] for i in writers.get(each.operands[1], ())]
    return bool(sources) and all(source.opcode.startswith("shr.s") and source.operands[-1] in ("31", "63") for source in sources)


def _roots(every: list[Statement]) -> Iterator[tuple[str, list[str]]]:
    for each in every:
        opcode, operands = each.opcode, each.operands
        if opcode.startswith("cp.async.bulk.prefetch"):
            continue
        parity = "wait.parity" in opcode
        if parity:
            yield "phase", each.registers(operands[2])
        if opcode.startswith(("mbarrier.", "tcgen05.", "cp.async.", "wgmma.mma_async", "mapa", *_SHARED)):
            memory = [name for operand in operands for inside in _MEMORY.findall(operand) for name in each.registers(inside)]
            wide = [operand for operand in operands if re.fullmatch(r"%rd\d+", operand)]
            yield "step", memory + (wide if opcode.startswith(("tcgen05.", "wgmma.")) else [])


def _backwards(every: list[Statement], writers: dict[str, list[int]], registers: list[str]) -> list[int]:
    found: list[int] = []
    waiting, seen = list(registers), set(registers)
    while waiting and len(found) < _SLICE:
        name = waiting.pop(0)
        for i in writers.get(name, ()):
            each = every[i]
            if not each.opcode.startswith((*_ARITHMETIC, *_ARITHMETIC_PREDICATES)) or i in found:
                continue
            found.append(i)
            for source in each.read:
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
    return found


def _constants(each: Statement) -> Iterator[tuple[str, ...]]:
    """The statement with its constant altered: a shift by one more, a mask without one of its bits, another number by its own lowest bit.

    The bits that ``or`` sets in a matrix descriptor change by their second lowest: the lowest is that of a leading dimension, for which operands of
    one core matrix and swizzled layouts have no use (9.7.16.5).
    """
    opcode, operands = each.opcode, each.operands
    if opcode.startswith(("mov.", "cvt.", "cvta.", "not.")) and not (opcode.startswith("mov.b") and _NUMBER.fullmatch(operands[1])):
        return
    if opcode.startswith(("mov.pred", "mov.b16")):
        return
    if operands[-1] in ("31", "63") if opcode.startswith("shr.") else operands[-1] == "0" and opcode.startswith(("setp.lt.s", "setp.ge.s")):
        return  # the sign of an index, in a division: no index is negative
    for n in range(len(operands) - 1, 0, -1):
        if _NUMBER.fullmatch(operands[n]):
            value = int(operands[n], 0)
            if opcode.startswith(("shl.", "shr.")):
                changed = value + 1
            elif opcode.startswith("mul.hi."):  # a division: its lowest bits are spare
                changed = value % 2**32 // 2
            elif opcode.startswith("and."):
                changed = value & (value - 1)
            elif opcode.startswith("or.b64") and value.bit_count() > 1:
                rest = value & (value - 1)
                changed = value + (rest & -rest)
            else:
                changed = value + ((value & -value) or 1)
            yield _replaced(each, n, str(changed))
            return
