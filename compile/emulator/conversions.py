"""``cvt``: one instruction, one function of register arrays.

Source: PTX ISA 9.x, 9.7.9 ``cvt`` (types, rounding, ``.ftz``, ``.sat``, ``.satfinite``, ``.relu``, NaN). Every result is rounded once
    from the exact source value. Conversions from 16-bit or smaller sources are tables over all their codes; those from f32 to 8 bits or
    fewer are a binary search among the float32 values at which the result changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.formats import (
    FORMATS,
    INTEGER_ROUND,
    ROUND,
    SIGNED,
    UNSIGNED,
    Bits,
    Values,
    decode,
    encode,
    encode_integer,
    float_to_integer,
)
from densemoe.runtime.errors import EmulatorError

__all__ = ["Converter", "make_converter"]

Converter = Callable[..., NDArray[np.unsignedinteger]]

_SMALL = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
_SCALAR_FLOATS = ("f16", "bf16", "f32", "f64")
_PACKED_BITS = {"e2m1": 4}  # bits per element of a packed pair; 8 for the other small formats, 16 for f16 and bf16


def make_converter(
    destination: str,
    source: str,
    *,
    rounding: str | None = None,
    ftz: bool = False,
    saturate: bool = False,
    satfinite: bool = False,
    relu: bool = False,
) -> Converter:
    """The function that one ``cvt`` instruction computes (PTX ISA 9.7.9, ``cvt``).

    Args:
        destination, source: PTX types without the dot: ``u8 … s64``, ``f16 bf16 f32 f64 tf32``, ``f16x2 bf16x2 e4m3x2 e5m2x2 e2m3x2 e3m2x2
            e2m1x2 ue8m0x2``.
        rounding: ``rn rna rz rm rp`` or ``rni rzi rmi rpi``, without the dot; None where the instruction has none.
        ftz, saturate, satfinite, relu: the modifiers ``.ftz``, ``.sat``, ``.satfinite``, ``.relu``.

    Returns:
        ``f(a)`` or, for a packed destination from f32, ``f(a, b)`` with `a` in the upper half. Operands are unsigned arrays of bits at
        least as wide as the type (upper bits are ignored); the result is unsigned bits: uint8 for e2m1x2 and 8-bit integers, uint16 for
        16-bit integers, f16, bf16 and pairs of 8-bit values, uint32 for f16x2, bf16x2, f32, tf32, u32, s32, uint64 for 64-bit types.

    Raises:
        EmulatorError: a combination that the ISA does not have, or ``.rs`` (stochastic rounding), which is not modelled.
    """
    return _make_converter(destination, source, rounding, ftz, saturate, satfinite, relu)


@cache
def _make_converter(
    destination: str, source: str, rounding: str | None, ftz: bool, saturate: bool, satfinite: bool, relu: bool
) -> Converter:
    text = "cvt" + "".join(
        f".{word}"
        for word, on in ((rounding, rounding), ("relu", relu), ("ftz", ftz), ("sat", saturate), ("satfinite", satfinite))
        if on and word is not None
    )
    text += f".{destination}.{source}"

    def illegal(reason: str) -> EmulatorError:
        return EmulatorError(f"{text}: {reason}")

    if rounding == "rs":
        raise illegal("stochastic rounding is not modelled")
    if ftz and ("f32" not in (destination, source) or destination == "tf32" or destination.endswith("x2")):
        raise illegal(".ftz needs f32 as source or destination of a scalar conversion")
    if destination.endswith("x2"):
        return _packed_converter(destination[:-2], source, rounding, satfinite, relu, saturate, illegal)
    if destination == "tf32":
        if source != "f32" or rounding not in ("rna", "rn", "rz") or saturate or (relu and rounding == "rna"):
            raise illegal("allowed is cvt.rna{.satfinite}.tf32.f32 and cvt.{rn,rz}{.satfinite}{.relu}.tf32.f32")
        return lambda a: encode(decode(a, "f32"), "tf32", rounding, satfinite, relu)
    if destination in _SCALAR_FLOATS:
        if source in _SCALAR_FLOATS:
            return _float_to_float(destination, source, rounding, ftz, saturate, satfinite, relu, illegal)
        if _is_integer(source):
            if rounding not in ("rn", "rz", "rm", "rp") or relu or satfinite:
                raise illegal("an integer source needs one of .rn .rz .rm .rp and no .relu or .satfinite")
            return _integer_to_float(destination, source, rounding, saturate)
    if _is_integer(destination):
        if source in _SCALAR_FLOATS:
            if rounding not in INTEGER_ROUND or relu or satfinite:
                raise illegal("a float source needs one of .rni .rzi .rmi .rpi and no .relu or .satfinite")
            return _float_to_integer_converter(destination, source, rounding, ftz)
        if _is_integer(source):
            if rounding is not None or ftz or relu or satfinite:
                raise illegal("integer to integer takes no modifier but .sat")
            return _integer_to_integer(destination, source, saturate)
    raise illegal("unknown pair of types")


def _is_integer(name: str) -> bool:
    return name[:1] in ("u", "s") and name[1:].isdigit() and int(name[1:]) in UNSIGNED


def _integer_values(bits: Bits, name: str) -> NDArray[np.integer]:
    """Integers of a PTX type from the low bits of a register."""
    width = int(name[1:])
    low = np.asarray(bits).astype(UNSIGNED[width])
    return low.view(SIGNED[width]) if name[0] == "s" else low


def _integer_to_integer(destination: str, source: str, saturate: bool) -> Converter:
    width, signed = int(destination[1:]), destination[0] == "s"
    if not saturate:
        signed_type, unsigned_type = SIGNED[width], UNSIGNED[width]
        return lambda a: _integer_values(a, source).astype(signed_type if signed else unsigned_type).view(unsigned_type)
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if signed else (0, (1 << width) - 1)

    def clamp(a: Bits) -> Bits:
        values = _integer_values(a, source)
        limits = np.iinfo(values.dtype)
        clamped = np.clip(values, max(low, int(limits.min)), min(high, int(limits.max)))
        out: Bits = clamped.astype(SIGNED[width] if signed else UNSIGNED[width]).view(UNSIGNED[width])
        return out

    return clamp


def _integer_to_float(destination: str, source: str, rounding: str, saturate: bool) -> Converter:
    if saturate and destination == "bf16":
        raise EmulatorError(f"cvt.sat.bf16.{source}: .sat does not belong to bf16 results")

    def convert(a: Bits) -> Bits:
        values = _integer_values(a, source)
        if saturate:
            values = np.clip(values, 0, 1)
        return encode_integer(values, destination, rounding)

    if destination == "f32" and rounding == "rn" and not saturate and int(source[1:]) <= 32:
        return lambda a: _integer_values(a, source).astype(np.float64).astype(np.float32).view(np.uint32)
    return convert


def _flush(values: Values, on: bool) -> Values:
    """float32 values with subnormals replaced by a zero of their sign."""
    if not on or values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def _float_to_integer_converter(destination: str, source: str, rounding: str, ftz: bool) -> Converter:
    width, signed = int(destination[1:]), destination[0] == "s"

    def convert(a: Bits) -> Bits:
        return float_to_integer(_flush(decode(_narrow(a, source), source), ftz), width, signed, rounding, source == "f64")

    if width == 64 or source == "f64" or ftz:
        return convert
    low, high = (-(2.0 ** (width - 1)), 2.0 ** (width - 1) - 1) if signed else (0.0, 2.0**width - 1)
    round_to_integer, container = INTEGER_ROUND[rounding], UNSIGNED[width]

    def convert_narrow(a: Bits) -> Bits:
        """Clamps first, which changes nothing as the limits are integers that float64 holds."""
        values = decode(_narrow(a, source), source)
        clamped = np.fmin(np.fmax(values, np.float64(low)), np.float64(high))
        clamped = np.where(values == values, clamped, 0.0)  # NaN gives 0
        return round_to_integer(clamped).astype(np.int64).astype(container)

    return convert_narrow


def _narrow(bits: Bits, name: str) -> Bits:
    """The low bits of a wider register."""
    container = FORMATS[name].container
    array = np.asarray(bits)
    return array if array.dtype == container else array.astype(container)


def _float_to_float(
    destination: str,
    source: str,
    rounding: str | None,
    ftz: bool,
    saturate: bool,
    satfinite: bool,
    relu: bool,
    illegal: Callable[[str], EmulatorError],
) -> Converter:
    to, of = FORMATS[destination], FORMATS[source]
    narrowing = to.mantissa_bits < of.mantissa_bits or to.exponent_bits < of.exponent_bits
    directed = ("rn", "rz", "rm", "rp")
    allowed: tuple[str | None, ...] = directed if narrowing else (None, *INTEGER_ROUND) if destination == source else (None,)
    if source == "bf16" and not narrowing and destination != "bf16":
        allowed = (None, *directed)  # ptxas takes a rounding here; it has nothing to round
    if rounding not in allowed:
        raise illegal(f"the rounding here is one of {', '.join(str(word) for word in allowed)}")
    if satfinite or relu:
        if destination not in ("f16", "bf16") or source != "f32" or rounding not in ("rn", "rz") or saturate or ftz:
            raise illegal(".relu and .satfinite belong to cvt.{rn,rz}.{f16,bf16}.f32 without .sat and .ftz")
    elif saturate and destination == "bf16":
        raise illegal(".sat does not belong to bf16 results")

    def general(a: Bits) -> Bits:
        values = _flush(decode(_narrow(a, source), source), ftz)
        if rounding in INTEGER_ROUND:
            with np.errstate(invalid="ignore"):  # signalling NaN
                values = np.copysign(INTEGER_ROUND[rounding](values.astype(np.float64)), values)
        if saturate:
            values = np.where(values > 0, np.minimum(values, 1), 0)
        bits = encode(values, destination, rounding if rounding in ROUND else "rn", satfinite, relu)
        if ftz and destination == "f32":
            bits = np.where((bits & np.uint32(0x7F800000)) == 0, bits & np.uint32(0x80000000), bits).astype(np.uint32)
        return bits

    plain = not (ftz or saturate or satfinite or relu)
    if of.container_bits == 16:
        table = general(np.arange(1 << 16, dtype=np.uint16))
        return lambda a: table[_narrow(a, source)]
    if plain and source == "f32" and destination == "f16" and rounding == "rn":
        return _f32_to_f16
    if source == "f32" and destination == "bf16" and rounding == "rn" and not (ftz or saturate or satfinite):
        return _f32_to_bf16_relu if relu else _f32_to_bf16
    return general


def _f32_to_f16(a: Bits) -> Bits:
    """``cvt.rn.f16.f32``: numpy rounds to nearest even."""
    values = np.asarray(a, np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        bits: Bits = values.astype(np.float16).view(np.uint16)
    nan = values != values
    return np.where(nan, np.uint16(0x7FFF), bits) if nan.any() else bits


def _f32_to_bf16(a: Bits) -> Bits:
    """``cvt.rn.bf16.f32`` by integer arithmetic: half an ulp, less one where the kept part is even, carries into it."""
    bits = np.asarray(a, np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    values = bits.view(np.float32)
    nan = values != values
    if nan.any():
        rounded = np.where(nan, np.uint32(0x7FFF), rounded)
    out: Bits = rounded.astype(np.uint16)
    return out


def _f32_to_bf16_relu(a: Bits) -> Bits:
    bits = np.asarray(a, np.uint32)
    rounded = _f32_to_bf16(bits)
    return np.where((rounded & np.uint16(0x8000)) != 0, np.uint16(0), rounded)


@cache
def _thresholds(name: str, rounding: str) -> NDArray[np.uint32]:
    """Smallest float32 magnitudes (as bits) that round to code 1, 2, … of a small format, then the first NaN."""
    fmt = FORMATS[name]
    codes = np.arange(fmt.largest + 1)
    low, high = np.zeros(fmt.largest, np.int64), np.full(fmt.largest, 0x7F7FFFFF, np.int64)
    while (low < high).any():  # binary search of each boundary: the rounding is monotone in the magnitude
        middle = (low + high) // 2
        reached = encode(middle.astype(np.uint32).view(np.float32), name, rounding, satfinite=True) >= codes[1:]
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return np.append(low, 0x7F800001).astype(np.uint32)


@cache
def _small_encoder(name: str, rounding: str, satfinite: bool, relu: bool) -> Converter:
    """f32 bits to codes of an 8-bit or smaller format."""
    fmt = FORMATS[name]
    thresholds = _thresholds(name, rounding)
    by_rank = np.arange(fmt.largest + 2, dtype=np.uint8)
    by_rank[-1] = fmt.largest if fmt.nan is None else fmt.nan
    shift, sign = np.uint32(32 - fmt.exponent_bits - fmt.mantissa_bits - 1), np.uint32(fmt.sign)

    def convert(a: Bits) -> NDArray[np.uint8]:
        bits = np.asarray(a, np.uint32)
        magnitude = bits & np.uint32(0x7FFFFFFF)
        code: NDArray[np.uint8] = by_rank[np.searchsorted(thresholds, magnitude, side="right")]
        if fmt.signed:
            negative = ((bits >> shift) & sign) * (magnitude <= 0x7F800000)
            code = code | negative.astype(np.uint8)
            if relu:
                code = np.where(negative != 0, np.uint8(0), code)
        return code

    if satfinite:
        return convert
    return lambda a: encode(np.asarray(a, np.uint32).view(np.float32), name, rounding, False, relu).astype(np.uint8)


def _packed_converter(
    name: str, source: str, rounding: str | None, satfinite: bool, relu: bool, saturate: bool, illegal: Callable[[str], EmulatorError]
) -> Converter:
    """Converters whose destination is a pair."""
    if saturate:
        raise illegal(".sat does not belong to packed conversions")
    if name in ("f16", "bf16") and source == "f32":
        if rounding not in ("rn", "rz"):
            raise illegal("needs .rn or .rz")
        return _pack(_make_converter(name, "f32", rounding, False, False, satfinite, relu), np.uint32, 16)
    if name in ("f16", "bf16") and source.endswith("x2"):
        element = source[:-2]
        if rounding != "rn" or satfinite or element not in ({"f16": _SMALL, "bf16": (*_SMALL, "ue8m0")}[name]):
            raise illegal("allowed is cvt.rn{.relu}.f16x2.{e4m3x2,e5m2x2,e2m3x2,e3m2x2,e2m1x2} and cvt.rn.bf16x2.ue8m0x2")
        return _widen_pair(name, element, relu)
    if name in _SMALL:
        if rounding != "rn" or not satfinite:
            raise illegal("needs .rn.satfinite")
    elif name == "ue8m0":
        if rounding not in ("rz", "rp") or relu or source not in ("f32", "bf16x2"):
            raise illegal("needs .rz or .rp, no .relu, and f32 or bf16x2")
    else:
        raise illegal("unknown pair of types")
    element_bits = _PACKED_BITS.get(name, 8)
    container = np.uint8 if element_bits == 4 else np.uint16
    encoder = _small_encoder(name, rounding, satfinite, relu)
    if source == "f32":
        return _pack(encoder, container, element_bits)
    if source in ("f16x2", "bf16x2"):
        table = encoder(np.ascontiguousarray(decode(np.arange(1 << 16, dtype=np.uint16), source[:-2])).view(np.uint32))

        def convert(a: Bits) -> Bits:
            pair = np.asarray(a, np.uint32)
            high, low = table[pair >> np.uint32(16)], table[pair & np.uint32(0xFFFF)]
            out: Bits = (high.astype(container) << container(element_bits)) | low.astype(container)
            return out

        return convert
    raise illegal("the source of a packed conversion is f32, f16x2 or bf16x2")


def _pack(element: Converter, container: type[np.unsignedinteger], bits: int) -> Converter:
    """Both operands through one call of the elementwise converter, interleaved so that a pair is one little-endian word."""

    def convert(a: Bits, b: Bits) -> Bits:
        both = np.empty((*(np.shape(a) or np.shape(b)), 2), np.uint32)
        both[..., 0], both[..., 1] = b, a
        codes = element(both)
        pair: Bits = codes[..., 0] | (codes[..., 1] << container(4)) if bits == 4 else codes.view(container)[..., 0]
        return pair

    return convert


@cache
def _widen_pair(name: str, element: str, relu: bool) -> Converter:
    """A table over all packed pairs: uint32 [256] for e2m1x2, [65536] for pairs of bytes."""
    bits = _PACKED_BITS.get(element, 8)
    codes = np.arange(1 << (2 * bits), dtype=np.uint32)
    mask = np.uint32((1 << bits) - 1)
    low = encode(decode(codes & mask, element), name, "rn", False, relu).astype(np.uint32)
    high = encode(decode(codes >> np.uint32(bits), element), name, "rn", False, relu).astype(np.uint32)
    table = low | (high << np.uint32(16))
    keep = np.uint32((1 << (2 * bits)) - 1)
    return lambda a: table[np.asarray(a) & keep]
