"""Translation of instructions on registers: integers, comparisons, predicates, moves (`float_arithmetic` has floats and conversions).

Sources: PTX ISA 9.x, 9.7.1 (integer), 9.7.2 (extended precision is not modelled), 9.7.6 (comparison), 9.7.8 (logic), 9.7.9 (movement),
9.7.12 (control flow: ``bra``, ``ret``).
"""

from __future__ import annotations

from collections.abc import Sequence

from densemoe.compile.emulator.emitter import Emitter, Value, literal
from densemoe.compile.emulator.operations import operation
from densemoe.compile.emulator.parser import Immediate, Instruction, Operand, Pair, Register, Vector
from densemoe.runtime.errors import EmulatorError

_DTYPE = {("u", 8): "u1", ("s", 8): "i1", ("u", 16): "u2", ("u", 32): "u4", ("u", 64): "u8", ("s", 16): "i2", ("s", 32): "i4", ("s", 64): "i8"}
_WIDE = {16: 32, 32: 64}


def width(name: str) -> int:
    return 1 if name == "pred" else int(name.lstrip("busf").removesuffix("x2").lstrip("f") or 0)


def low_mask(bits: int) -> int:
    return (1 << bits) - 1


def values_of(e: Emitter, operands: Sequence[Operand], bits: int) -> list[Value]:
    return [e.value(operand, bits) for operand in operands]


def uniform(values: Sequence[Value]) -> bool:
    return all(value.kind == "I" for value in values)


def binary(e: Emitter, values: Sequence[Value], bits: int, form: str, array: str, integer: str) -> Value:
    """A value from an array expression or, of ints, an integer one (which may leave the range)."""
    if uniform(values):
        return e.integer(bits, f"({integer.format(*(e.form(v, form) for v in values))}) & {low_mask(bits)}")
    return e.array(bits, form, array.format(*(e.form(v, form) for v in values)))


# --- integers ---------------------------------------------------------------------------------------------------------


@operation("{add|sub}.{u|s}{16|32|64}", operands=3)
def _add(e: Emitter, i: Instruction) -> None:
    bits, sign = width(i.parts[1]), "+" if i.parts[0] == "add" else "-"
    a, b = values_of(e, i.operands[1:], bits)
    for first, second in ((a, b), (b, a)):
        if second.literal == 0 and (sign == "+" or second is b):
            e.assign(i.operands[0], first)
            return
    e.assign(i.operands[0], binary(e, (a, b), bits, "u", f"{{}} {sign} {{}}", f"{{}} {sign} {{}}"))


@operation("add.sat.s32", operands=3)
def _add_saturated(e: Emitter, i: Instruction) -> None:
    a, b = values_of(e, i.operands[1:], 32)
    if uniform((a, b)):
        e.assign(i.operands[0], e.integer(32, f"max(min({e.s(a)} + {e.s(b)}, 0x7FFFFFFF), -0x80000000) & 0xFFFFFFFF"))
    else:
        e.assign(i.operands[0], e.array(32, "s", f"saturate_add({e.s(a)}, {e.s(b)})"))


def _product(e: Emitter, a: Value, b: Value, kind: str, bits: int, part: str) -> Value:
    """``.lo``, ``.hi`` or ``.wide`` of a product of `kind` (u or s)."""
    if uniform((a, b)):
        text = f"{e.form(a, kind)} * {e.form(b, kind)}"
        if part == "wide":
            return e.integer(2 * bits, f"{text} & {low_mask(2 * bits)}")
        return e.integer(bits, f"({text} >> {bits}) & {low_mask(bits)}" if part == "hi" else f"{text} & {low_mask(bits)}")
    if part == "lo":
        return e.array(bits, "u", f"{e.u(a)} * {e.u(b)}")
    if bits == 64:
        return e.array(64, "u", f"mul_hi_{kind}64({e.u(a)}, {e.u(b)})")
    if a.kind == "I":
        a, b = b, a
    wide = _DTYPE[kind, _WIDE[bits]]
    text = f"{e.form(a, kind)}.astype({wide}) * {e.form(b, kind)}"
    if part == "wide":
        return e.array(2 * bits, kind, text)
    return e.array(bits, kind, f"(({text}) >> {bits}).astype({_DTYPE[kind, bits]})")


@operation("mul.{lo|hi}.{u|s}{16|32|64}", "mul.wide.{u|s}{16|32}", operands=3)
def _mul(e: Emitter, i: Instruction) -> None:
    part, kind, bits = i.parts[1], i.parts[2][0], width(i.parts[2])
    a, b = values_of(e, i.operands[1:], bits)
    e.assign(i.operands[0], _product(e, a, b, kind, bits, part))


@operation("mad.{lo|hi}.{u|s}{16|32|64}", "mad.wide.{u|s}{16|32}", operands=4)
def _mad(e: Emitter, i: Instruction) -> None:
    part, kind, bits = i.parts[1], i.parts[2][0], width(i.parts[2])
    a, b = values_of(e, i.operands[1:3], bits)
    out = 2 * bits if part == "wide" else bits
    c = e.value(i.operands[3], out)
    e.assign(i.operands[0], binary(e, (_product(e, a, b, kind, bits, part), c), out, "u", "{} + {}", "{} + {}"))


@operation("{div|rem}.{u|s}{16|32|64}", operands=3)
def _div(e: Emitter, i: Instruction) -> None:
    kind, bits = i.parts[1][0], width(i.parts[1])
    a, b = values_of(e, i.operands[1:], bits)
    if uniform((a, b)):
        e.assign(i.operands[0], e.integer(bits, f"{i.parts[0]}_int({e.form(a, kind)}, {e.form(b, kind)}) & {low_mask(bits)}"))
        return
    remainder = i.parts[0] == "rem"
    e.assign(i.operands[0], e.array(bits, kind, f"div({e.form(a, kind)}, {e.form(b, kind)}, {remainder})"))


@operation("{min|max}.{u|s}{16|32|64}", operands=3)
def _min(e: Emitter, i: Instruction) -> None:
    kind, bits = i.parts[1][0], width(i.parts[1])
    values = values_of(e, i.operands[1:], bits)
    name = i.parts[0]
    e.assign(i.operands[0], binary(e, values, bits, kind, f"np.{name}imum({{}}, {{}})", f"{name}({{}}, {{}})"))


@operation("abs.s{16|32|64}", "neg.s{16|32|64}", operands=2)
def _abs(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    values = values_of(e, i.operands[1:], bits)
    text = "abs({})" if i.parts[0] == "abs" else "-{}"
    e.assign(i.operands[0], binary(e, values, bits, "s", text, text))


@operation("{and|or|xor}.{b16|b32|b64|pred}", operands=3)
def _logic(e: Emitter, i: Instruction) -> None:
    sign, bits = {"and": "&", "or": "|", "xor": "^"}[i.parts[0]], width(i.parts[1])
    values = values_of(e, i.operands[1:], bits)
    text = f"{{}} {sign} {{}}"
    if bits == 1 and uniform(values):
        e.assign(i.operands[0], e.integer(1, text.format(*(e.u(v) for v in values))))
        return
    e.assign(i.operands[0], binary(e, values, bits, "u", text, text))


@operation("not.{b16|b32|b64|pred}", operands=2)
def _not(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    value = e.value(i.operands[1], bits)
    if bits == 1 and value.kind == "I":
        e.assign(i.operands[0], e.integer(1, f"not {e.u(value)}"))
    else:
        e.assign(i.operands[0], binary(e, (value,), bits, "u", "~{}", "~{}"))


@operation("cnot.b{16|32|64}", operands=2)
def _cnot(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    value = e.value(i.operands[1], bits)
    if value.kind == "I":
        e.assign(i.operands[0], e.integer(bits, f"int({e.u(value)} == 0)"))
    else:
        e.assign(i.operands[0], e.array(bits, "u", f"({e.u(value)} == 0).astype({_DTYPE['u', bits]})"))


@operation("{shl}.b{16|32|64}", "shr.{b|u|s}{16|32|64}", operands=3)
def _shift(e: Emitter, i: Instruction) -> None:
    left, bits = i.parts[0] == "shl", width(i.parts[1])
    kind = "s" if i.parts[1][0] == "s" else "u"
    a, b = e.value(i.operands[1], bits), e.value(i.operands[2], 32)
    if b.literal is not None:
        amount = min(b.literal, bits - 1 if kind == "s" else bits)
        if amount == 0:
            e.assign(i.operands[0], a)
        elif amount == bits:
            e.assign(i.operands[0], literal(0, bits))
        else:
            sign = "<<" if left else ">>"
            e.assign(i.operands[0], binary(e, (a,), bits, kind, f"{{}} {sign} {amount}", f"{{}} {sign} {amount}"))
    elif uniform((a, b)):
        limit = bits if left or kind == "u" else bits - 1
        e.assign(i.operands[0], e.integer(bits, f"{e.form(a, kind)} {'<<' if left else '>>'} min({e.u(b)}, {limit}) & {low_mask(bits)}"))
    else:
        function = "shl" if left else "shr"
        e.assign(i.operands[0], e.array(bits, kind, f"{function}({e.form(a, kind)}, {e.u(b)}, {_DTYPE[kind, bits]})"))


def _call(e: Emitter, i: Instruction, values: Sequence[Value], bits: int, text: str, form: str = "u") -> None:
    """A function of `lanes` that takes arrays; of uniform operands its one-element result becomes an int."""
    if uniform(values):
        arrays = [f"A{v.bits}({e.u(v)})" if v.literal is None else e.u(v) for v in values]
        arrays[0] = f"A{values[0].bits}({e.u(values[0])})"
        e.assign(i.operands[0], e.integer(bits, f"int(np.atleast_1d({text.format(*arrays)})[0])"))
    else:
        e.assign(i.operands[0], e.array(bits, form, text.format(*[e.full(values[0]), *(e.u(v) for v in values[1:])])))


@operation("shf.{l|r}.{clamp|wrap}.b32", operands=4)
def _funnel(e: Emitter, i: Instruction) -> None:
    values = values_of(e, i.operands[1:], 32)
    _call(e, i, values, 32, f"shf({{}}, {{}}, {{}}, {i.parts[1] == 'l'}, {i.parts[2] == 'wrap'})")


@operation("bfe.{u|s}{32|64}", operands=4)
def _bfe(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    values = [e.value(i.operands[1], bits), *values_of(e, i.operands[2:], 32)]
    _call(e, i, values, bits, f"bfe({{}}, {{}}, {{}}, {bits}, {i.parts[1][0] == 's'})")


@operation("bfi.b{32|64}", operands=5)
def _bfi(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    values = [*values_of(e, i.operands[1:3], bits), *values_of(e, i.operands[3:], 32)]
    _call(e, i, values, bits, f"bfi({{}}, {{}}, {{}}, {{}}, {bits})")


@operation("prmt.b32", operands=4)
def _prmt(e: Emitter, i: Instruction) -> None:
    _call(e, i, values_of(e, i.operands[1:], 32), 32, "prmt({}, {}, {})")


@operation("lop3.b32", operands=5)
def _lop3(e: Emitter, i: Instruction) -> None:
    table = i.operands[4]
    if not isinstance(table, Immediate):
        raise EmulatorError("the table of lop3 is an immediate")
    _call(e, i, values_of(e, i.operands[1:4], 32), 32, f"lop3({{}}, {{}}, {{}}, {table.value})")


@operation("{popc|clz|brev}.b{32|64}", operands=2)
def _bits(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    name = i.parts[0]
    text = "popc({})" if name == "popc" else f"{name}({{}}, {bits})"
    _call(e, i, values_of(e, i.operands[1:], bits), bits if name == "brev" else 32, text)


@operation("bfind{.shiftamt|}.{u|s}{32|64}", operands=2)
def _bfind(e: Emitter, i: Instruction) -> None:
    bits, kind = width(i.parts[-1]), i.parts[-1][0]
    value = e.value(i.operands[1], bits)
    text = f"bfind({{}}, {bits}, {kind == 's'}, {'shiftamt' in i.parts})"
    if value.kind == "I":
        view = f".view(i{bits // 8})" if kind == "s" else ""
        e.assign(i.operands[0], e.integer(32, f"int({text.format(f'A{bits}({e.u(value)}){view}')}[0])"))
    else:
        e.assign(i.operands[0], e.array(32, "u", text.format(e.form(value, kind))))


@operation("dp4a.{u32|s32}.{u32|s32}", operands=4)
def _dp4a(e: Emitter, i: Instruction) -> None:
    _call(e, i, values_of(e, i.operands[1:], 32), 32, f"dp4a({{}}, {{}}, {{}}, {i.parts[1] == 's32'}, {i.parts[2] == 's32'})")


# --- comparison and selection -----------------------------------------------------------------------------------------

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def _comparison(e: Emitter, name: str, kind: str, a: Value, b: Value) -> Value:
    if kind != "f":
        form = "s" if kind == "s" and name not in ("eq", "ne") else "u"
        text = f"{e.form(a, form)} {_COMPARE[name]} {e.form(b, form)}"
        return e.integer(1, text) if uniform((a, b)) else e.array(1, "u", text)
    x, y = e.f(a), e.f(b)
    nan = f"(({x} != {x}) | ({y} != {y}))"
    if name in ("num", "nan"):
        text = f"~{nan}" if name == "num" else nan
    elif name.endswith("u") and name != "ltu"[:2]:
        text = f"({x} {_COMPARE[name[:2]]} {y}) | {nan}"
    elif name == "ne":
        text = f"({x} != {y}) & ~{nan}"
    else:
        text = f"{x} {_COMPARE[name]} {y}"
    return e.integer(1, f"bool({text})") if uniform((a, b)) else e.array(1, "u", text)


def _predicate_logic(e: Emitter, name: str, a: Value, b: Value) -> Value:
    text = f"{e.u(a)} {({'and': '&', 'or': '|', 'xor': '^'}[name])} {e.u(b)}"
    return e.integer(1, text) if uniform((a, b)) else e.array(1, "u", text)


def _inverse(e: Emitter, a: Value) -> Value:
    return e.integer(1, f"not {e.u(a)}") if a.kind == "I" else e.array(1, "u", f"~{e.u(a)}")


_INTEGER_COMPARE = (
    "{eq|ne}{.and|.or|.xor|}.{b|u|s}{16|32|64}",
    "{lt|le|gt|ge}{.and|.or|.xor|}.{u|s}{16|32|64}",
    "{lo|ls|hi|hs}{.and|.or|.xor|}.u{16|32|64}",
)
_FLOAT_COMPARE = "{eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan}{.and|.or|.xor|}.f{16|32|64}"


@operation(*(f"setp.{each}" for each in (*_INTEGER_COMPARE, _FLOAT_COMPARE)), operands=(3, 4))
def _setp(e: Emitter, i: Instruction) -> None:
    name, kind, bits = i.parts[1], i.parts[-1][0], width(i.parts[-1])
    combine = i.parts[2] if len(i.parts) == 4 else ""
    if len(i.operands) != (4 if combine else 3):
        raise EmulatorError("setp takes a third source with .and, .or, .xor only")
    a, b = values_of(e, i.operands[1:3], bits)
    result = _comparison(e, name, kind, a, b)
    target = i.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    other = e.value(i.operands[3], 1) if combine else None
    value = _predicate_logic(e, combine, result, other) if other else result
    inverse = None
    if second is not None:
        inverse = _inverse(e, result)
        if other:
            inverse = _predicate_logic(e, combine, inverse, other)
    e.assign(first, value)
    if second is not None and inverse is not None:
        e.assign(second, inverse)


@operation("selp.{b|u|s}{16|32|64}", "selp.f{32|64}", operands=4)
def _selp(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    a, b = values_of(e, i.operands[1:3], bits)
    p = e.value(i.operands[3], 1)
    if p.kind == "A":
        e.assign(i.operands[0], e.array(bits, "u", f"select({e.u(p)}, {e.u(a)}, {e.u(b)}, {_DTYPE['u', bits]})"))
    elif uniform((a, b)):
        e.assign(i.operands[0], e.integer(bits, f"{e.u(a)} if {e.u(p)} else {e.u(b)}"))
    else:
        e.assign(i.operands[0], e.array(bits, "u", f"{e.full(a)} if {e.u(p)} else {e.full(b)}"))


# --- moves ------------------------------------------------------------------------------------------------------------


@operation("mov.{b|u|s}{16|32|64}", "mov.f{16|32|64}", "mov.pred", operands=2)
def _mov(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    target, source = i.operands
    if isinstance(target, Vector):
        _unpack(e, target.items, e.value(source, bits), bits)
    elif isinstance(source, Vector):
        e.assign(target, _pack(e, source.items, bits))
    elif isinstance(source, Register) and not source.negated:
        e.assign(target, e.register(source.name, check=False), partial=True)  # copies of values that are not read later are common
    else:
        e.assign(target, e.value(source, bits))


def _pack(e: Emitter, items: Sequence[Operand], bits: int) -> Value:
    part = bits // len(items)
    values = values_of(e, items, part)
    if part == 32:
        return e.pair(values[0], values[1])
    if uniform(values):
        return e.integer(bits, " | ".join(f"{e.u(v)} << {part * n}" for n, v in enumerate(values)))
    dtype = _DTYPE["u", bits]
    terms = [f"{e.full(v)}.astype({dtype}) << {part * n}" if n else f"{e.full(v)}.astype({dtype})" for n, v in enumerate(values)]
    return e.array(bits, "u", " | ".join(f"({term})" for term in terms))


def _unpack(e: Emitter, items: Sequence[Operand], value: Value, bits: int) -> None:
    part = bits // len(items)
    if part == 32:
        results = list(e.halves(value))
    elif value.kind == "I":
        results = [e.integer(part, f"{e.u(value)} >> {part * n} & {low_mask(part)}") for n in range(len(items))]
    else:
        u = e.u(value)
        results = [e.array(part, "u", f"({u} >> {part * n}).astype({_DTYPE['u', part]})") for n in range(len(items))]
    for item, result in zip(items, results, strict=True):
        e.assign(item, result)


# --- control flow: the way out of a block is translated with the block ----------------------------------------------------


@operation("bra{.uni|}", operands=1, destinations=0)
@operation("ret", "exit", operands=0, destinations=0)
def _control(e: Emitter, i: Instruction) -> None:
    raise EmulatorError("a branch inside of a block")


@operation("trap", operands=0, destinations=0)
def _trap(e: Emitter, i: Instruction) -> None:
    e.emit("raise EmulatorError('the kernel trapped')")
