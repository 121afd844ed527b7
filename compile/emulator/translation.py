"""A kernel as a program: blocks that are translated when control first reaches them.

A `Version` is the Python function of one block for one `Key`. It returns `TAKEN` or `NEXT`, the way out of the block, `DIVERGED` when lanes
differ (the gang then decides, by ``gang.branch``), or `WAIT` when the block's first instruction has to be tried again later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, Final

import numpy as np

from densemoe.compile.emulator import (  # the last ones fill the instruction table
    arithmetic,
    float_arithmetic,
    lanes,
    memory_instructions,
    synchronisation_instructions,
    tensor_instructions,
    tensor_map_instructions,
)
from densemoe.compile.emulator.control_flow import EXIT, Block, build_blocks
from densemoe.compile.emulator.emitter import NAMESPACE, Emitter, Key
from densemoe.compile.emulator.lints import lint
from densemoe.compile.emulator.masks import every, some
from densemoe.compile.emulator.operations import Operation, check, destinations
from densemoe.compile.emulator.parser import Instruction, Kernel, Module, Symbol, parse
from densemoe.runtime.errors import EmulatorError

__all__ = ["DIVERGED", "NEXT", "SHARED_START", "TAKEN", "WAIT", "Program", "Version", "load_program"]

TAKEN, NEXT, DIVERGED, WAIT = 0, 1, 2, 3
SHARED_START: Final = 1024  # the system's own part of the shared window comes first, as on the devices; touching it is an error
_PER_CTA: Final = ("%ctaid", "%clusterid", "%cluster_ctaid", "%cluster_ctarank")
_FILLED = (arithmetic, float_arithmetic, memory_instructions, synchronisation_instructions, tensor_instructions, tensor_map_instructions)


def _undefined(name: str) -> None:
    raise EmulatorError(f"register {name} is read before it was written")


def _check_defined(defined: Any, mask: Any, name: str) -> None:
    missing = ~defined if mask is None else ~defined & mask
    if missing.any():
        raise EmulatorError(f"register {name} is read by lane {int(missing.argmax()) % 32}, in which it was never written")


def _merge_other(gang: Any, number: int, mask: Any, new: Any, dtype: Any, defined: Any) -> tuple[Any, Any]:
    """`merge` with what the register holds, whatever that is, and the mask of lanes in which the result is defined."""
    old = gang.registers[number]
    fresh = mask if defined is None else mask & defined
    if old is None:
        return lanes.merge(mask, new, 0, dtype), fresh
    before = gang.defined.get(number)
    known = ~mask if before is None else before & ~mask
    return lanes.merge(mask, new, old, dtype), known | fresh


def _branch(gang: Any, condition: Any, mask: Any) -> int:
    """The way of an unguarded path: TAKEN, NEXT or DIVERGED."""
    if mask is not None:
        condition = condition & mask
        if not some(condition):
            return NEXT
        if condition.tobytes() == mask.tobytes():
            return TAKEN
    else:
        if every(condition):
            return TAKEN
        if not some(condition):
            return NEXT
    gang.branch = condition
    return DIVERGED


def _forget(defined: dict[int, Any], numbers: tuple[int, ...]) -> None:
    for number in numbers:
        defined.pop(number, None)


_RUNTIME: Mapping[str, Any] = {
    **NAMESPACE,
    "undefined": _undefined,
    "check_defined": _check_defined,
    "branch": _branch,
    "merge_other": _merge_other,
    "forget": _forget,
    "EmulatorError": EmulatorError,
    "np": np,
    "where": np.where,
    "full": np.full,
    "bool_": np.bool_,
    "ones": lambda n: np.ones(n, np.bool_),
    "zeros": lambda n: np.zeros(n, np.bool_),
    "pack64": lambda n, low, high: _pack64(n, low, high),
}


def _pack64(n: int, low: Any, high: Any) -> Any:
    both = np.empty((n, 2), np.uint32)
    both[:, 0] = low
    both[:, 1] = high
    return both.view(np.uint64)[:, 0]


@dataclass(eq=False)
class Version:
    """A translated block.

    Attributes:
        run: the function of (gang, registers).
        lines: PTX line of each line of the generated source.
        kinds: kinds of the registers live behind the block.
        counts: instructions by opcode family, for the counters.
        links: successor versions by way out, where no divergence ends on the way, filled as they are met.
        behind: successor versions by (way out, divergences that end on the way, masked), the same.
    """

    key: Key
    block: Block
    run: Callable[[Any, list[Any]], int]
    lines: list[int]
    kinds: dict[str, str]
    counts: tuple[tuple[str, int], ...]
    source: str
    executed: int = 0
    links: dict[int, Version] = field(default_factory=dict)
    behind: dict[tuple[int, int, bool], Version] = field(default_factory=dict)


class Program:
    """One kernel, ready to be translated block by block.

    Args:
        module: the parsed PTX.
        name: of the kernel; "" where there is only one.
        block: threads of a CTA.
        clustered: launched with more than one CTA a cluster (shared addresses then carry the CTA's rank).

    Raises:
        EmulatorError: no such kernel, an instruction that is not modelled, or a block shape other than the kernel demands.
    """

    def __init__(self, module: Module, name: str, block: tuple[int, int, int], clustered: bool) -> None:
        if not name and len(module.kernels) == 1:
            name = next(iter(module.kernels))
        if name not in module.kernels:
            raise EmulatorError(f"kernel {name!r} is not in the PTX: it has {', '.join(module.kernels) or 'none'}")
        self.module, self.kernel, self.clustered = module, module.kernels[name], clustered
        kernel: Kernel = self.kernel
        if kernel.block is not None and tuple(kernel.block) != tuple(block):
            raise EmulatorError(f"a block of {block} threads: {kernel.name} demands {kernel.block} (.reqntid)")
        self.block = block
        self.operations: list[Operation] = check(kernel)
        self.blocks = build_blocks(kernel, self.operations)
        self.numbers = {register: i for i, register in enumerate(kernel.registers)}
        self.names = list(kernel.registers)
        self.bits = kernel.registers
        self.bits_of_number = list(kernel.registers.values())
        self.crossing = frozenset().union(*(each.live_in for each in self.blocks)) if self.blocks else frozenset()
        self.position = 0
        self._live: dict[int, tuple[str, ...]] = {}
        self._live_numbers: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._live_values: dict[int, Callable[[list[Any]], tuple[Any, ...]]] = {}
        #: versions by block, whether masked, of one warp, of one CTA, and the types of the live registers
        self.standing: dict[tuple[Any, ...], Version] = {}
        self.versions: dict[Key, Version] = {}
        self._layout()

    def _layout(self) -> None:
        """Shared window: the system's kilobyte, static variables, dynamic memory. Local variables likewise from 0."""
        self.shared: dict[str, int] = {}
        self.local: dict[str, int] = {}
        at, local = SHARED_START, 0
        variables = {**self.module.variables, **self.kernel.variables}
        dynamic = []
        for name, each in variables.items():
            if each.space == "shared" and each.size:
                at = -(-at // each.alignment) * each.alignment
                self.shared[name] = at
                at += each.size
            elif each.space == "shared":
                dynamic.append(name)
            elif each.space == "local":
                local = -(-local // each.alignment) * each.alignment
                self.local[name] = local
                local += each.size
            else:
                raise EmulatorError(f"variable {name} in .{each.space} memory is not modelled")
        self.static_bytes = at - SHARED_START
        alignment = max((variables[name].alignment for name in dynamic), default=16)
        self.dynamic_start = -(-at // alignment) * alignment
        for name in dynamic:
            self.shared[name] = self.dynamic_start
        self.local_bytes = local

    def is_shared(self, name: str) -> bool:
        """Whether a symbol lies in shared memory."""
        return name in self.shared

    def address(self, symbol: Symbol) -> int:
        """Address of a variable or parameter in its own state space (shared: without the CTA's rank)."""
        for table in (self.shared, self.local):
            if symbol.name in table:
                return table[symbol.name] + symbol.offset
        if symbol.name in self.kernel.parameters:
            return self.kernel.parameters[symbol.name].offset + symbol.offset
        raise EmulatorError(f"symbol {symbol.name} has no address")

    def special_kind(self, name: str, key: Key) -> str:
        """``I`` or ``A``: whether a special register is the same in the whole gang."""
        base, _, axis = name.partition(".")
        if base == "%tid":
            return "I" if self.block["xyz".index(axis)] == 1 else "A"
        if base in ("%laneid",) or base.startswith("%lanemask"):
            return "A"
        if base == "%warpid":
            return "I" if key.single_warp else "A"
        return "A" if base in _PER_CTA and not key.single_cta else "I"

    def live_in(self, block: int) -> tuple[str, ...]:
        """Registers live at a block's start, in the order of their declaration."""
        found = self._live.get(block)
        if found is None:
            found = self._live[block] = tuple(sorted(self.blocks[block].live_in, key=self.numbers.__getitem__))
        return found

    def live_numbers(self, places: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers of the registers that are live at the start of any of these blocks."""
        found = self._live_numbers.get(places)
        if found is None:
            names = {name for place in places if place != EXIT for name in self.blocks[place].live_in}
            found = self._live_numbers[places] = tuple(sorted(self.numbers[name] for name in names))
        return found

    def live_values(self, block: int) -> Callable[[list[Any]], tuple[Any, ...]]:
        """A function that picks the registers that are live at a block's start."""
        found = self._live_values.get(block)
        if found is None:
            numbers = self.live_numbers((block,))
            pick: Callable[[list[Any]], Any] = itemgetter(*numbers) if numbers else lambda _: ()
            found = self._live_values[block] = pick if len(numbers) != 1 else lambda registers: (registers[numbers[0]],)
        return found

    def text_of(self, line: int) -> str:
        """The opcode of the instruction at a line, for messages."""
        return next((each.opcode for each in self.kernel.instructions if each.line == line), "?")

    def destinations_of(self, each: Instruction, known: Operation) -> list[str]:
        """Registers that an instruction writes, each once."""
        return list(dict.fromkeys(destinations(each, known)))

    def version(self, key: Key) -> Version:
        """The translation of a block for a key."""
        found = self.versions.get(key)
        if found is None:
            found = self.versions[key] = self._translate(key)
        return found

    def _translate(self, key: Key) -> Version:
        emitter = Emitter(self, key)
        block = emitter.block
        counts: dict[str, int] = {}
        way = ""
        kinds: dict[str, str] = {}
        for i in range(block.start, block.end):
            each = self.kernel.instructions[i]
            self.position = i
            family = each.opcode.split(".", 1)[0]
            counts[family] = counts.get(family, 0) + 1
            try:
                if i == block.end - 1 and (block.taken is not None or block.next == EXIT):
                    way = self._way_out(emitter, each)
                else:
                    emitter.instruction(each, self.operations[i].emit)
            except EmulatorError as error:
                raise EmulatorError(f"PTX line {each.line}: {each.opcode}: {error}") from None
        kinds = emitter.finish()
        emitter.emit(way or f"return {NEXT}")
        header = ["def run(g, R):", "    L = g.lanes", "    M = g.mask", "    H = g.run"]
        source = "\n".join(header + emitter.lines) + "\n"
        namespace = {**_RUNTIME, **emitter.constants}
        exec(compile(source, f"<PTX block {block.index}>", "exec"), namespace)
        lines = [0] * len(header) + emitter.origin
        return Version(key, block, namespace["run"], lines, kinds, tuple(counts.items()), source)

    def _way_out(self, emitter: Emitter, each: Instruction) -> str:
        emitter.line = each.line
        if each.guard is None:
            return f"return {TAKEN if each.opcode in ('bra', 'bra.uni') else NEXT}"
        value = emitter.register(each.guard)
        condition = emitter.u(value)
        if value.kind == "I":
            return f"return {NEXT} if {condition} else {TAKEN}" if each.negated else f"return {TAKEN} if {condition} else {NEXT}"
        return f"return branch(g, {'~' if each.negated else ''}{condition}, {emitter.mask})"

    @cached_property
    def lints(self) -> list[str]:
        """Remarks on the text."""
        return lint(self.kernel, self.operations)

    @cached_property
    def digest(self) -> str:
        """sha256 of the kernel's name and instructions, without comments, line numbers and target."""
        text = repr([(each.opcode, each.operands, each.guard, each.negated) for each in self.kernel.instructions])
        return hashlib.sha256(text.encode()).hexdigest()


_MODULES: dict[str, Module] = {}
_PROGRAMS: dict[tuple[str, str, tuple[int, int, int], bool], Program] = {}
_CACHED: Final = 64  # programs kept; a test run meets a few dozen variants


def load_program(ptx: str, name: str, block: tuple[int, int, int], clustered: bool) -> Program:
    """A program from PTX text; equal texts share one, with its translations."""
    digest = hashlib.sha256(ptx.encode()).hexdigest()
    key = (digest, name, block, clustered)
    found = _PROGRAMS.get(key)
    if found is None:
        if len(_PROGRAMS) >= _CACHED:
            _PROGRAMS.clear()
            _MODULES.clear()
        module = _MODULES.get(digest)
        if module is None:
            module = _MODULES[digest] = parse(ptx)
        found = _PROGRAMS[key] = Program(module, name, block, clustered)
    return found


