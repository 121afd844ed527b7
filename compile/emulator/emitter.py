"""Translation of one block to the source of one Python function.

A register is a Python int (a bool for predicates) where it is the same in all lanes of the gang that runs the block, else an array of one
element a lane. Which of the two is known when the block is translated: a block has one translation for every combination of kinds that
arrives (`Key`), so generated code has no tests of kind. Inside a block a value is kept in the form in which it was computed (unsigned,
signed or float view, or a pair of halves) and converted once where another form is needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from densemoe.compile.emulator import lanes
from densemoe.compile.emulator.parser import Immediate, Instruction, Memory, Operand, Register, Sink, Special, Symbol
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.translation import Program

__all__ = ["Emitter", "Key", "Value"]

_UNSIGNED = {1: "bool_", 8: "u1", 16: "u2", 32: "u4", 64: "u8"}
_SIGNED = {8: "i1", 16: "i2", 32: "i4", 64: "i8"}
_FLOAT = {16: "f2", 32: "f4", 64: "f8"}


@dataclass(frozen=True)
class Key:
    """What a translation of a block depends on besides its text.

    Attributes:
        block: index of the block.
        masked: some lanes of the gang are inactive.
        single_warp, single_cta: the gang is one warp, or warps of one CTA.
        kinds: register to ``I`` (int), ``A`` (array) or ``P`` (array, undefined in some lanes), for those live at the block's start.
    """

    block: int
    masked: bool
    single_warp: bool
    single_cta: bool
    kinds: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class Value:
    """A value in generated code.

    Attributes:
        bits: width, 1 for predicates.
        kind: ``I`` or ``A``.
        forms: local name or literal by form: ``u`` unsigned, ``s`` signed, ``f`` float.
        pair: low and high half of a 64-bit value that was not packed yet.
        defined: local name of the mask of lanes in which the value is defined, "" for all.
        literal: the int where it is a constant.
    """

    bits: int
    kind: str
    forms: dict[str, str] = field(default_factory=dict)
    pair: tuple[Value, Value] | None = None
    defined: str = ""
    literal: int | None = None


def literal(value: int, bits: int) -> Value:
    """A constant."""
    value &= (1 << bits) - 1
    text = str(bool(value)) if bits == 1 else str(value)
    return Value(bits, "I", {"u": text}, literal=value)


class Emitter:
    """State of the translation of one block; the functions of the instruction table write through it."""

    def __init__(self, program: Program, key: Key) -> None:
        self.program, self.key = program, key
        self.block = program.blocks[key.block]
        self.kinds = dict(key.kinds)
        self.values: dict[str, Value] = {}
        self.dirty: set[str] = set()
        self.lines: list[str] = []
        self.origin: list[int] = []
        self.names = 0
        self.constants: dict[str, Any] = {}
        self.mask = "M" if key.masked else "None"
        self.guarded = False
        self.indent = 1
        self.line = 0

    # --- output

    def emit(self, text: str) -> None:
        """A line of code."""
        self.lines.append("    " * self.indent + text)
        self.origin.append(self.line)

    def name(self) -> str:
        self.names += 1
        return f"v{self.names}"

    def let(self, expression: str) -> str:
        """A new local with the value of an expression."""
        name = self.name()
        self.emit(f"{name} = {expression}")
        return name

    def constant(self, value: Any) -> str:
        """A global name for an object."""
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    # --- values

    def register(self, name: str, check: bool = True) -> Value:
        """The value of a register; reading an undefined one is an error where it is read, unless the caller looks at ``defined``."""
        value = self.values.get(name)
        if value is None:
            kind = self.kinds.get(name)
            if kind is None:
                self.emit(f"undefined({name!r})")
                return literal(0, self.program.bits[name])
            index = self.program.numbers[name]
            local = self.let(f"R[{index}]")
            value = Value(self.program.bits[name], "I" if kind == "I" else "A", {"u": local})
            if kind == "P":
                value.defined = self.let(f"g.defined[{index}]")
            self.values[name] = value
        if value.defined and check:
            self.emit(f"check_defined({value.defined}, {self.mask}, {name!r})")
        return value

    def value(self, operand: Operand, bits: int) -> Value:
        """The value of a source operand of an instruction that reads `bits` bits."""
        if isinstance(operand, Register):
            value = self.register(operand.name)
            if operand.negated:
                return self.array(1, "u", f"~{self.u(value)}") if value.kind == "A" else self.integer(1, f"not {self.u(value)}")
            return value
        if isinstance(operand, Immediate):
            if operand.float_bits and operand.float_bits != bits:
                if (operand.float_bits, bits) == (64, 32):
                    number = struct.unpack("<d", operand.value.to_bytes(8, "little"))[0]
                    return literal(struct.unpack("<I", struct.pack("<f", number))[0], 32)
                raise EmulatorError(f"a {operand.float_bits}-bit floating-point literal for a {bits}-bit operand")
            return literal(operand.value, bits)
        if isinstance(operand, Symbol):
            return self.symbol(operand, bits)
        if isinstance(operand, Special):
            return self.special(operand.name, bits)
        raise EmulatorError(f"operand {operand} is not a value")

    def symbol(self, symbol: Symbol, bits: int) -> Value:
        """The address of a variable; in a cluster that of shared memory carries the CTA's rank."""
        address = self.program.address(symbol)
        if not (self.program.clustered and self.program.is_shared(symbol.name)):
            return literal(address, bits)
        if self.key.single_cta:
            return self.integer(bits, f"g.rank_base() + {address}")
        return self.array(bits, "u", f"g.rank_bases().astype({_UNSIGNED[bits]}) + {address}")

    def special(self, name: str, bits: int) -> Value:
        kind = self.program.special_kind(name, self.key)
        local = self.let(f"g.special({name!r})")
        own = 64 if name in ("%clock64", "%globaltimer", "%gridid") else 32
        value = Value(own, kind, {"u": local})
        if bits > own:
            return self.array(bits, "u", f"{local}.astype({_UNSIGNED[bits]})") if kind == "A" else self.integer(bits, local)
        return value

    def integer(self, bits: int, expression: str) -> Value:
        """A new uniform value."""
        return Value(bits, "I", {"u": self.let(expression)})

    def array(self, bits: int, form: str, expression: str) -> Value:
        """A new value of one element a lane, in the given form."""
        return Value(bits, "A", {form: self.let(expression)})

    def pair(self, low: Value, high: Value) -> Value:
        """A 64-bit value as its halves; ints are packed at once."""
        if low.kind == "I" and high.kind == "I":
            if low.literal is not None and high.literal is not None:
                packed = literal(low.literal | high.literal << 32, 64)
            else:
                packed = self.integer(64, f"{self.u(low)} | {self.u(high)} << 32")
            packed.pair = (low, high)
            return packed
        return Value(64, "A", pair=(low, high))

    def halves(self, value: Value) -> tuple[Value, Value]:
        """The 32-bit halves of a 64-bit value."""
        if value.pair is None:
            if value.kind == "I":
                u = self.u(value)
                value.pair = (self.integer(32, f"{u} & 0xFFFFFFFF"), self.integer(32, f"{u} >> 32"))
            else:
                both = self.let(f"{self.u(value)}.view(u4)")
                value.pair = (self.array(32, "u", f"{both}[0::2]"), self.array(32, "u", f"{both}[1::2]"))
        return value.pair

    def u(self, value: Value) -> str:
        """Expression of the unsigned form."""
        forms = value.forms
        if "u" not in forms:
            if value.pair is not None:
                low, high = value.pair
                forms["u"] = self.let(f"pack64(L, {self.u(low)}, {self.u(high)})")
            else:
                source = forms.get("f") or forms["s"]
                forms["u"] = self.let(f"{source}.view({_UNSIGNED[value.bits]})")
        return forms["u"]

    def s(self, value: Value) -> str:
        """Expression of the signed form."""
        forms = value.forms
        if "s" not in forms:
            if value.kind == "A":
                forms["s"] = self.let(f"{self.u(value)}.view({_SIGNED[value.bits]})")
            elif value.literal is not None:
                sign = 1 << (value.bits - 1)
                forms["s"] = f"({(value.literal ^ sign) - sign})"
            else:
                flip = hex(1 << (value.bits - 1))
                forms["s"] = self.let(f"({self.u(value)} ^ {flip}) - {flip}")
        return forms["s"]

    def f(self, value: Value) -> str:
        """Expression of the float form: an array, or a numpy scalar of a uniform value."""
        forms = value.forms
        if "f" not in forms:
            if value.kind == "A":
                forms["f"] = self.let(f"{self.u(value)}.view({_FLOAT[value.bits]})")
            elif value.literal is not None:
                unsigned = {16: np.uint16, 32: np.uint32, 64: np.uint64}[value.bits]
                kind = {16: np.float16, 32: np.float32, 64: np.float64}[value.bits]
                forms["f"] = self.constant(unsigned(value.literal).view(kind))
            else:
                forms["f"] = self.let(f"F{value.bits}({self.u(value)})")
        return forms["f"]

    def form(self, value: Value, form: str) -> str:
        """Expression in form ``u``, ``s`` or ``f``."""
        if form == "u":
            return self.u(value)
        return self.s(value) if form == "s" else self.f(value)

    def full(self, value: Value) -> str:
        """An unsigned array of all lanes, also of a uniform value."""
        if value.kind == "A":
            return self.u(value)
        return self.let(f"full(L, {self.u(value)}, {_UNSIGNED[value.bits]})")

    # --- results

    def assign(self, target: Operand, value: Value, partial: bool = False) -> None:
        """Writes a destination register; lanes that do not execute keep what they had. With `partial` it is as defined as the value."""
        if isinstance(target, Sink):
            return
        if not isinstance(target, Register):
            raise EmulatorError(f"destination {target} is not a register")
        name, bits = target.name, self.program.bits[target.name]
        if value.bits != bits:
            value = self.resize(value, bits)
        if self.guarded or (self.key.masked and name in self.program.crossing):
            value = self.merged(name, value, bits, value.defined if partial else "")
        elif value.defined and not partial:
            value = Value(value.bits, value.kind, value.forms, value.pair, "", value.literal)
        self.values[name] = value
        self.dirty.add(name)

    def merged(self, name: str, value: Value, bits: int, defined: str = "") -> Value:
        old = self.values.get(name)
        if old is None and name in self.kinds:
            index, kind = self.program.numbers[name], self.kinds[name]
            old = Value(bits, "I" if kind == "I" else "A", {"u": self.let(f"R[{index}]")})
            if kind == "P":
                old.defined = self.let(f"g.defined[{index}]")
        dtype = _UNSIGNED[bits]
        if old is None and self.key.masked and name in self.program.crossing:
            # not live on this way, but other lanes may need what the register holds
            local, mask = self.name(), self.name()
            number = self.program.numbers[name]
            self.emit(f"{local}, {mask} = merge_other(g, {number}, {self.mask}, {self.u(value)}, {dtype}, {defined or None})")
            return Value(bits, "A", {"u": local}, defined=mask)
        result = self.array(bits, "u", f"merge({self.mask}, {self.u(value)}, {self.u(old) if old else 0}, {dtype})")
        new = f"({self.mask} & {defined})" if defined else self.mask
        if old is None:
            result.defined = self.let(new)
        elif old.defined:
            result.defined = self.let(f"({old.defined} & ~{self.mask}) | {new}" if defined else f"{old.defined} | {new}")
        elif defined:
            result.defined = self.let(f"~{self.mask} | {new}")
        return result

    def resize(self, value: Value, bits: int) -> Value:
        """A value in a register of another width: zero-extended or cut."""
        if bits == 1 or value.bits == 1:
            raise EmulatorError(f"a {value.bits}-bit value in a {bits}-bit register")
        if value.kind == "I":
            return self.integer(bits, f"{self.u(value)} & {(1 << bits) - 1}") if bits < value.bits else self.integer(bits, self.u(value))
        return self.array(bits, "u", f"{self.u(value)}.astype({_UNSIGNED[bits]})")

    # --- addresses

    def address(self, operand: Operand, bits: int = 0) -> Value:
        """Base plus offset of a memory operand, as wide as its base register."""
        assert isinstance(operand, Memory)
        if isinstance(operand.base, Symbol):
            return self.symbol(Symbol(operand.base.name, operand.base.offset + operand.offset), bits or 64)
        base = self.value(operand.base, bits or 64)
        if not operand.offset:
            return base
        size = base.bits
        if base.kind == "I":
            return self.integer(size, f"{self.u(base)} + {operand.offset} & {(1 << size) - 1}")
        if operand.offset < 0:
            return self.array(size, "u", f"{self.u(base)} - {-operand.offset}")
        return self.array(size, "u", f"{self.u(base)} + {operand.offset}")

    # --- instructions

    def instruction(self, each: Instruction, emit: Any) -> None:
        """Translates one instruction that is not a branch, with its guard."""
        self.line = each.line
        if each.guard is None:
            emit(self, each)
            return
        guard = self.register(each.guard)
        if guard.kind == "A":
            condition = f"~{self.u(guard)}" if each.negated else self.u(guard)
            outer = self.mask
            self.mask = self.let(f"{condition} & M" if outer == "M" else condition)
            self.guarded = True
            emit(self, each)
            self.mask, self.guarded = outer, False
            return
        self.guarded_uniform(each, emit, self.u(guard))

    def guarded_uniform(self, each: Instruction, emit: Any, guard: str) -> None:
        """An instruction under a guard that is the same in all lanes: an ``if`` statement."""
        known = self.program.operations[self.program.position]
        before = {}
        for name in self.program.destinations_of(each, known):
            if name in self.values or name in self.kinds:
                value = self.values.get(name)
                if value is None:
                    index, kind = self.program.numbers[name], self.kinds[name]
                    value = Value(self.program.bits[name], "I" if kind == "I" else "A", {"u": self.let(f"R[{index}]")})
                    if kind == "P":
                        value.defined = self.let(f"g.defined[{index}]")
                    self.values[name] = value
                self.u(value)
            before[name] = self.values.get(name)
        snapshot = {name: (value, dict(value.forms), value.pair) for name, value in self.values.items()}
        self.emit(f"if {'not ' if each.negated else ''}{guard}:")
        self.indent += 1
        self.emit("pass")
        emit(self, each)
        after = {name: self.values[name] for name in before}
        joined: dict[str, tuple[str, str, Value]] = {}
        for name, new in after.items():
            old = before[name]
            uniform = new.kind == "I" and (old is None or old.kind == "I")
            expression = self.u(new) if uniform else self.full(new)
            joined[name] = (self.let(expression), "I" if uniform else "A", new)
        for _, (value, forms, pair) in snapshot.items():
            value.forms, value.pair = forms, pair
        defined = {name: self.name() for name, old in before.items() if old is None or old.defined or after[name].defined}
        for name, mask_name in defined.items():
            self.emit(f"{mask_name} = {after[name].defined or 'ones(L)'}")
        self.indent -= 1
        self.emit("else:")
        self.indent += 1
        self.emit("pass")
        for name, (local, kind, _) in joined.items():
            old = before[name]
            if old is None:
                zero = literal(0, self.program.bits[name])
                self.emit(f"{local} = {self.u(zero) if kind == 'I' else self.full(zero)}")
            else:
                self.emit(f"{local} = {self.u(old) if kind == 'I' else self.full(old)}")
            if name in defined:
                self.emit(f"{defined[name]} = {old.defined or 'ones(L)' if old else 'zeros(L)'}")
        self.indent -= 1
        self.values = {name: value for name, (value, _, _) in snapshot.items()}
        for name, (local, kind, _) in joined.items():
            value = Value(self.program.bits[name], kind, {"u": local})
            if name in defined:
                # an int that is undefined in all lanes must not pass for a uniform value
                if kind == "I":
                    value = Value(value.bits, "A", {"u": self.full(value)})
                value.defined = defined[name]
            self.values[name] = value
            self.dirty.add(name)

    # --- the end of the block

    def finish(self) -> dict[str, str]:
        """Stores what is live behind the block; returns the kinds of registers there."""
        kinds = {}
        whole = []
        for name in sorted(self.block.live_out, key=self.program.numbers.__getitem__):
            index = self.program.numbers[name]
            if name in self.dirty:
                value = self.values[name]
                self.emit(f"R[{index}] = {self.u(value)}")
                kinds[name] = value.kind
                if value.defined:
                    self.emit(f"g.defined[{index}] = {value.defined}")
                    kinds[name] = "P"
                else:
                    whole.append(index)
            elif name in self.kinds:
                kinds[name] = self.kinds[name]
        if whole:
            self.emit(f"if g.defined: forget(g.defined, {tuple(whole)})")
        return kinds


NAMESPACE: dict[str, Any] = {name: value for name, value in vars(lanes).items() if not name.startswith("_")}
