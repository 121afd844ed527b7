"""Translation of floating-point arithmetic, halves and conversions.

Sources: PTX ISA 9.x, 9.7.3 (float), 9.7.4 and 9.7.5 (half), 9.7.9 (``cvt``).

``mul``, ``add`` and ``sub`` without a rounding modifier are rounded on their own here; ptxas may contract them (`lints`).
"""

from __future__ import annotations

from collections.abc import Sequence

from densemoe.compile.emulator.arithmetic import binary, low_mask, uniform, values_of, width
from densemoe.compile.emulator.conversions import make_converter
from densemoe.compile.emulator.emitter import Emitter, Value
from densemoe.compile.emulator.operations import family, operation
from densemoe.compile.emulator.parser import Instruction, Register
from densemoe.runtime.errors import EmulatorError

# --- floats -----------------------------------------------------------------------------------------------------------


def _float(e: Emitter, values: Sequence[Value], bits: int, text: str) -> Value:
    """A float result: of uniform operands computed on one-element arrays."""
    if uniform(values):
        arrays = [f"A{bits}({e.u(v)}).view(f{bits // 8})" for v in values]
        return e.integer(bits, f"int(np.atleast_1d({text.format(*arrays)}).view(u{bits // 8})[0])")
    return e.array(bits, "f", text.format(*(e.f(v) for v in values)))


_SIGNS = {"add": "+", "sub": "-", "mul": "*"}


@operation("{add|sub|mul}{.rn|}{.ftz|}.f32", "{add|sub|mul}{.rn|}.f64", "{add|sub|mul}{.rn|}.f16", operands=3)
def _float_binary(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[-1])
    values = values_of(e, i.operands[1:], bits)
    text = f"{{}} {_SIGNS[i.parts[0]]} {{}}"
    if "ftz" in i.parts:
        text = f"ftz(ftz({{}}) {_SIGNS[i.parts[0]]} ftz({{}}))"
    e.assign(i.operands[0], _float(e, values, bits, text))


@operation("{add|sub|mul}{.rn|}{.ftz|}.f32x2", operands=3)
def _packed_binary(e: Emitter, i: Instruction) -> None:
    (al, ah), (bl, bh) = (e.halves(v) for v in values_of(e, i.operands[1:], 64))
    text = f"{{}} {_SIGNS[i.parts[0]]} {{}}" if "ftz" not in i.parts else f"ftz(ftz({{}}) {_SIGNS[i.parts[0]]} ftz({{}}))"
    e.assign(i.operands[0], e.pair(_float(e, (al, bl), 32, text), _float(e, (ah, bh), 32, text)))


@operation("fma.rn{.ftz|}.f32", operands=4)
def _fma(e: Emitter, i: Instruction) -> None:
    text = "ftz(fma32(ftz({}), ftz({}), ftz({})))" if "ftz" in i.parts else "fma32({}, {}, {})"
    e.assign(i.operands[0], _float(e, values_of(e, i.operands[1:], 32), 32, text))


@operation("fma.rn{.ftz|}.f32x2", operands=4)
def _packed_fma(e: Emitter, i: Instruction) -> None:
    text = "ftz(fma32(ftz({}), ftz({}), ftz({})))" if "ftz" in i.parts else "fma32({}, {}, {})"
    halves = [e.halves(v) for v in values_of(e, i.operands[1:], 64)]
    e.assign(i.operands[0], e.pair(_float(e, [h[0] for h in halves], 32, text), _float(e, [h[1] for h in halves], 32, text)))


@operation("{min|max}{.ftz|}{.NaN|}{.xorsign.abs|}.f32", operands=(3, 4))
def _float_min(e: Emitter, i: Instruction) -> None:
    xorsign = "xorsign" in i.parts
    values = values_of(e, i.operands[1:], 32)
    if len(values) == 3 and xorsign:
        raise EmulatorError(".xorsign.abs has two sources")
    items = ", ".join("ftz({})" if "ftz" in i.parts else "{}" for _ in values)
    if len(values) == 2 and not xorsign and "NaN" not in i.parts and "ftz" not in i.parts:
        e.assign(i.operands[0], _float(e, values, 32, f"{i.parts[0]}32({{}}, {{}})"))
        return
    text = f"extremum(({items},), {i.parts[0] == 'max'}, {'NaN' in i.parts}, {xorsign})"
    e.assign(i.operands[0], _float(e, values, 32, text))


@operation("{abs|neg}{.ftz|}.f32", "{abs|neg}.f64", operands=2)
def _float_sign(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[-1])
    value = e.value(i.operands[1], bits)
    if "ftz" in i.parts:
        value = _float(e, (value,), 32, "ftz({})")
    sign = 1 << (bits - 1)
    text = f"{{}} & {sign - 1}" if i.parts[0] == "abs" else f"{{}} ^ {sign}"
    if i.parts[0] == "abs" and value.kind == "A" and "f" in value.forms:
        e.assign(i.operands[0], e.array(bits, "f", f"np.abs({value.forms['f']})"))
    else:
        e.assign(i.operands[0], binary(e, (value,), bits, "u", text, text))


@operation("{ex2|lg2|sin|cos|rsqrt|sqrt|rcp}.approx{.ftz|}.f32", "tanh.approx.f32", "{rcp|sqrt}.rn{.ftz|}.f32", operands=2)
def _unary(e: Emitter, i: Instruction) -> None:
    text = f"unary('{i.parts[0]}', {{}}, {'ftz' in i.parts})"
    e.assign(i.operands[0], _float(e, values_of(e, i.operands[1:], 32), 32, text))


@operation("div.{rn|approx|full}{.ftz|}.f32", operands=3)
def _float_div(e: Emitter, i: Instruction) -> None:
    text = f"divide32({{}}, {{}}, {'ftz' in i.parts})"
    e.assign(i.operands[0], _float(e, values_of(e, i.operands[1:], 32), 32, text))


@operation("copysign.f{32|64}", operands=3)
def _copysign(e: Emitter, i: Instruction) -> None:
    bits = width(i.parts[1])
    sign = 1 << (bits - 1)
    text = f"({{0}} & {sign}) | ({{1}} & {sign - 1})"
    e.assign(i.operands[0], binary(e, values_of(e, i.operands[1:], bits), bits, "u", text, text))


# --- halves -----------------------------------------------------------------------------------------------------------


def _half(e: Emitter, i: Instruction, text: str, bits: int) -> None:
    values = values_of(e, i.operands[1:], bits)
    if uniform(values):
        arrays = [f"A{bits}({e.u(v)})" for v in values]
        e.assign(i.operands[0], e.integer(bits, f"int({text.format(*arrays)}.view(u{bits // 8})[0])"))
    else:
        e.assign(i.operands[0], e.array(bits, "u", text.format(*(e.u(v) if v.kind == "A" else f"A{bits}({e.u(v)})" for v in values))))


@operation("{add|sub|mul}{.rn|}.bf16{x2|}", "fma.rn.bf16{x2|}", operands=(3, 4))
def _bf16(e: Emitter, i: Instruction) -> None:
    if len(i.operands) != (4 if i.parts[0] == "fma" else 3):
        raise EmulatorError(f"{i.opcode} with {len(i.operands)} operands")
    packed = i.parts[-1] == "bf16x2"
    marks = ", ".join("{}" for _ in i.operands[1:])
    name = {"sub": "add"}.get(i.parts[0], i.parts[0])
    text = f"{name}_bf16({marks}, {packed}{', True' if i.parts[0] == 'sub' else ''})"
    _half(e, i, text, 32 if packed else 16)


@operation("{add|sub|mul}{.rn|}.f16x2", operands=3)
def _f16x2(e: Emitter, i: Instruction) -> None:
    values = values_of(e, i.operands[1:], 32)
    text = f"({{}}.view(f2) {_SIGNS[i.parts[0]]} {{}}.view(f2)).view(u4)"
    if uniform(values):
        e.assign(i.operands[0], e.integer(32, f"int({text.format(*(f'A32({e.u(v)})' for v in values))}[0])"))
    else:
        e.assign(i.operands[0], e.array(32, "u", text.format(*(e.full(v) for v in values))))


@operation("fma.rn.f16{x2|}", operands=4)
def _fma_f16(e: Emitter, i: Instruction) -> None:
    bits = 32 if i.parts[-1] == "f16x2" else 16
    values = values_of(e, i.operands[1:], bits)
    text = f"fma16({{}}.view(f2), {{}}.view(f2), {{}}.view(f2)).view(u{bits // 8})"
    if uniform(values):
        e.assign(i.operands[0], e.integer(bits, f"int({text.format(*(f'A{bits}({e.u(v)})' for v in values))}[0])"))
    else:
        e.assign(i.operands[0], e.array(bits, "u", text.format(*(e.full(v) for v in values))))


@operation("{min|max}{.NaN|}{.xorsign.abs|}.{f16|bf16}{x2|}", operands=3)
def _half_min(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    bits = 32 if kind.endswith("x2") else 16
    values = values_of(e, i.operands[1:], bits)
    convert = "bf16_values({})" if kind.startswith("bf16") else "{}.view(f2)"
    back = f"(v.view(u4) >> 16).astype(u2).view(u{bits // 8})" if kind.startswith("bf16") else f"v.view(u{bits // 8})"
    arrays = [f"A{bits}({e.u(v)})" for v in values] if uniform(values) else [e.full(v) for v in values]
    local = e.let(f"extremum(({', '.join(convert.format(a) for a in arrays)}), {i.parts[0] == 'max'}, {'NaN' in i.parts}, {'xorsign' in i.parts})")
    text = back.replace("v.view", f"{local}.view")
    e.assign(i.operands[0], e.integer(bits, f"int({text}[0])") if uniform(values) else e.array(bits, "u", text))


@operation("{abs|neg}.{f16|bf16}{x2|}", operands=2)
def _half_sign(e: Emitter, i: Instruction) -> None:
    bits = 32 if i.parts[1].endswith("x2") else 16
    keep, flip = (0x7FFF7FFF, 0x80008000) if bits == 32 else (0x7FFF, 0x8000)
    text = f"{{}} & {keep}" if i.parts[0] == "abs" else f"{{}} ^ {flip}"
    e.assign(i.operands[0], binary(e, values_of(e, i.operands[1:], bits), bits, "u", text, text))


# --- conversions ------------------------------------------------------------------------------------------------------

_MODIFIERS = {"ftz": "ftz", "sat": "saturate", "satfinite": "satfinite", "relu": "relu"}
_ROUNDINGS = ("rn", "rna", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")
_SOURCE_BITS = {"f16x2": 32, "bf16x2": 32, "e4m3x2": 16, "e5m2x2": 16, "e2m3x2": 16, "e3m2x2": 16, "e2m1x2": 8, "ue8m0x2": 16, "tf32": 32, "bf16": 16}


def _bits_of(name: str) -> int:
    return _SOURCE_BITS.get(name) or width(name)


def _cvt_arguments(opcode: str) -> tuple[str, str, dict[str, object]]:
    parts = opcode.split(".")
    destination, source, modifiers = parts[-2], parts[-1], parts[1:-2]
    arguments: dict[str, object] = {}
    for each in modifiers:
        if each in _ROUNDINGS and "rounding" not in arguments:
            arguments["rounding"] = each
        elif each in _MODIFIERS and _MODIFIERS[each] not in arguments:
            arguments[_MODIFIERS[each]] = True
        else:
            raise EmulatorError(f"{opcode}: .{each} is not known here")
    return destination, source, arguments


def _accepts_cvt(opcode: str) -> bool:
    try:
        destination, source, arguments = _cvt_arguments(opcode)
        make_converter(destination, source, **arguments)  # type: ignore[arg-type]
    except (EmulatorError, KeyError, IndexError):
        return False
    return True


@family("cvt", _accepts_cvt, operands=(2, 3))
def _cvt(e: Emitter, i: Instruction) -> None:
    destination, source, arguments = _cvt_arguments(i.opcode)
    pair = destination.endswith("x2") and source == "f32"
    if len(i.operands) != (3 if pair else 2):
        raise EmulatorError(f"{i.opcode} with {len(i.operands)} operands")
    target = i.operands[0]
    if not isinstance(target, Register):
        raise EmulatorError("the destination of cvt is a register")
    out = e.program.bits[target.name]
    values = values_of(e, i.operands[1:], _bits_of(source))
    signed = destination[0] == "s"
    if destination[0] in "us" and source[0] in "us" and not arguments and destination[1:].isdigit() and source[1:].isdigit():
        _cvt_integer(e, target, values[0], destination, source, out)
        return
    function = e.constant(make_converter(destination, source, **arguments))  # type: ignore[arg-type]
    bits = 8 if destination == "e2m1x2" else _bits_of(destination)
    text = f"{function}({', '.join('{}' for _ in values)})"
    if uniform(values):
        local = e.let(f"int({text.format(*(f'A{v.bits}({e.u(v)})' for v in values))}[0])")
        if signed and bits < out:
            local = f"extend_int({local}, {out}, {bits}, True)"
        e.assign(target, e.integer(out, local))
        return
    text = text.format(*(e.full(v) for v in values))
    if bits < out:
        text = f"extend({text}, {out}, {bits}, {signed})"
    e.assign(target, e.array(max(bits, out), "u", text))


def _cvt_integer(e: Emitter, target: Register, value: Value, destination: str, source: str, out: int) -> None:
    """Integer to integer: extension from the narrower type, by the signs of source and destination."""
    to, of = int(destination[1:]), int(source[1:])
    first_signed, then_signed = source[0] == "s", destination[0] == "s"
    if value.kind == "I":
        text = f"extend_int(extend_int({e.u(value)}, {to}, {min(of, value.bits)}, {first_signed}), {out}, {to}, {then_signed})"
        if not first_signed and of >= value.bits and to >= of and out == to:
            text = e.u(value)
        elif not first_signed and not then_signed:
            text = f"{e.u(value)} & {low_mask(min(to, of))}"
        e.assign(target, e.integer(out, text))
        return
    text = e.u(value)
    if min(to, of) < value.bits and of < to:
        text = f"extend({text}, {to}, {of}, {first_signed})"
    elif of < to:
        kinds = {8: ("u1", "i1"), 32: ("u4", "i4"), 16: ("u2", "i2"), 64: ("u8", "i8")}
        text = f"{e.s(value)}.astype({kinds[to][1]}).view({kinds[to][0]})" if first_signed else f"{text}.astype({kinds[to][0]})"
    elif to < value.bits:
        text = f"extend({text}, {out}, {to}, {then_signed})"
        e.assign(target, e.array(out, "u", text))
        return
    if to < out:
        text = f"extend({text}, {out}, {to}, {then_signed})"
    e.assign(target, e.array(out, "u", text))
