"""Number formats of the tensor cores and the conversions between them, bit for bit.

Sources: PTX ISA 9.x, sections 5.2.3 (alternate floating-point formats), 9.7.9 ``cvt`` (rounding, ``.relu``, ``.sat``, ``.satfinite``,
    NaN), and the OCP FP8 and Microscaling (MX) specifications for e4m3, e5m2, e2m3, e3m2, e2m1 and e8m0.

A value in a register is its bits in an unsigned numpy array of the container's width (uint8, 16, 32 or 64); every function here is
elementwise and keeps the shape of its operands. Rounding is done once, from the exact source value: float64 holds every float32, float16
and bfloat16 value, and integers beyond 2^53 carry a sticky bit.

For the executor: `decode` gives float values of operands of an MMA, `encode` rounds float values into a format; `conversions` has ``cvt``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from densemoe.runtime.errors import EmulatorError

__all__ = [
    "E2M1_PAIRS",
    "FORMATS",
    "FloatFormat",
    "decode",
    "decode_bytes",
    "decode_table",
    "decode_table64",
    "encode",
    "encode_integer",
    "float_to_integer",
]

Bits = NDArray[np.unsignedinteger]
Values = NDArray[np.floating]

UNSIGNED: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, type[np.signedinteger]] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    Attributes:
        name: PTX type name without a vector suffix.
        exponent_bits, mantissa_bits, bias: as in IEEE 754; the mantissa excludes the implicit bit.
        infinity: code of +Inf (sign bit 0), or None where the format has none.
        nan: canonical NaN code as ``cvt`` produces it, or None where the format has none.
        largest: code of the largest finite magnitude.
        signed: False for ue8m0 and ue4m3.
        container_bits: width of the register or memory element that holds one value.
        shift: position of the code's lowest bit in the container (13 for tf32, which occupies the upper bits of 32).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    infinity: int | None
    nan: int | None
    largest: int
    signed: bool
    container_bits: int
    shift: int = 0

    @property
    def sign(self) -> int:
        """Mask of the sign bit in an unshifted code, 0 for unsigned formats."""
        return 1 << (self.exponent_bits + self.mantissa_bits) if self.signed else 0

    @property
    def container(self) -> type[np.unsignedinteger]:
        """numpy type of the container."""
        return UNSIGNED[self.container_bits]


FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat("e2m1", 2, 1, 1, None, None, 0x7, True, 8),
        FloatFormat("e2m3", 2, 3, 1, None, None, 0x1F, True, 8),
        FloatFormat("e3m2", 3, 2, 3, None, None, 0x1F, True, 8),
        FloatFormat("e4m3", 4, 3, 7, None, 0x7F, 0x7E, True, 8),
        FloatFormat("ue4m3", 4, 3, 7, None, 0x7F, 0x7E, False, 8),
        FloatFormat("e5m2", 5, 2, 15, 0x7C, 0x7F, 0x7B, True, 8),
        FloatFormat("ue8m0", 8, 0, 127, None, 0xFF, 0xFE, False, 8),
        FloatFormat("f16", 5, 10, 15, 0x7C00, 0x7FFF, 0x7BFF, True, 16),
        FloatFormat("bf16", 8, 7, 127, 0x7F80, 0x7FFF, 0x7F7F, True, 16),
        FloatFormat("tf32", 8, 10, 127, 0x3FC00, 0x3FFFF, 0x3FBFF, True, 32, 13),
        FloatFormat("f32", 8, 23, 127, 0x7F800000, 0x7FFFFFFF, 0x7F7FFFFF, True, 32),
        FloatFormat("f64", 11, 52, 1023, 0x7FF << 52, (0x7FF << 52) | (1 << 51), (0x7FF << 52) - 1, True, 64),
    )
}


def _format(name: str) -> FloatFormat:
    try:
        return FORMATS[name]
    except KeyError:
        raise EmulatorError(f"number format {name!r} is unknown: use one of {', '.join(FORMATS)}") from None


@cache
def decode_table(name: str) -> NDArray[np.float32]:
    """float32 values of all codes of a format with at most 16 bits (shape ``[2^bits]``; 16 for e2m1, 64 for the 6-bit formats, 256 for
    8-bit ones).

    NaN codes give the canonical float32 NaN. The sign bit of an unsigned e4m3 scale is ignored, as bit 7 is padding there. Read-only.
    """
    fmt = _format(name)
    if fmt.container_bits > 16:
        raise EmulatorError(f"no decode table for {name}: it has {fmt.container_bits} bits, a table needs at most 16")
    bits = fmt.container_bits if not fmt.signed else fmt.exponent_bits + fmt.mantissa_bits + 1
    codes = np.arange(1 << bits, dtype=np.int64)
    magnitude = codes & ((1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1)
    exponent, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    implicit = np.where(exponent > 0, 1 << fmt.mantissa_bits, 0)
    if name == "ue8m0":  # no mantissa and no subnormals: code 0 is 2^-127
        values = np.ldexp(1.0, codes - fmt.bias)
    else:
        values = np.ldexp((mantissa + implicit).astype(np.float64), np.maximum(exponent, 1) - fmt.bias - fmt.mantissa_bits)
    if fmt.infinity is not None:
        values = np.where(magnitude == fmt.infinity, np.inf, values)
    if fmt.nan is not None:
        values = np.where(magnitude > (fmt.infinity if fmt.infinity is not None else fmt.largest), np.nan, values)
    values = np.where((codes & fmt.sign) != 0, -values, values).astype(np.float32)
    values[np.isnan(values)] = np.uint32(0x7FFFFFFF).view(np.float32)
    values.setflags(write=False)
    return values


def _pairs() -> NDArray[np.float32]:
    codes = np.arange(256)
    table = np.stack([decode_table("e2m1")[codes & 15], decode_table("e2m1")[codes >> 4]], axis=1)
    table.setflags(write=False)
    return table


E2M1_PAIRS: NDArray[np.float32] = _pairs()
"""float32 values of the two e2m1 codes of a byte, ``[256, 2]``: the low nibble first (the even k)."""


def decode(bits: Bits, name: str) -> Values:
    """Values of codes: float32, and float64 for f64.

    Args:
        bits: unsigned codes in any container at least as wide as the format; upper bits of 4- and 6-bit codes are ignored.
        name: a key of `FORMATS`. For tf32 the lower 13 bits are ignored, as the tensor core does.
    """
    fmt = _format(name)
    values: Values
    if name == "f64":
        values = np.asarray(bits, np.uint64).view(np.float64)
        return values
    if name in ("f32", "tf32", "bf16"):
        wide = np.asarray(bits).astype(np.uint32)
        if name == "tf32":
            wide &= np.uint32(0xFFFFE000)
        elif name == "bf16":
            wide <<= np.uint32(16)
        values = wide.view(np.float32)
        return values
    table = decode_table(name)
    if fmt.container_bits == 8 and table.size < 256:
        values = table[np.asarray(bits) & (table.size - 1)]
        return values
    return table[bits]


@cache
def decode_table64(name: str) -> NDArray[np.float64]:
    """`decode_table` as float64, the type in which products are summed."""
    table = decode_table(name).astype(np.float64)
    table.setflags(write=False)
    return table


def decode_bytes(data: NDArray[np.uint8], name: str) -> NDArray[np.float64]:
    """Operand bytes to float64, exactly.

    Args:
        data: uint8, its last axis contiguous and whole elements.
        name: ``e4m3 e5m2 s8 u8 f16 bf16 tf32``.

    Returns:
        float64 with the last axis counted in elements.
    """
    values: NDArray[np.float64]
    if name in ("e4m3", "e5m2"):
        values = decode_table64(name).take(data)
    elif name in ("s8", "u8"):
        values = data.view(np.int8 if name == "s8" else np.uint8).astype(np.float64)
    elif name == "f16":
        values = data.view(np.float16).astype(np.float64)
    elif name in ("bf16", "tf32"):
        values = decode(data.view(np.uint16 if name == "bf16" else np.uint32), name).astype(np.float64)
    else:
        raise EmulatorError(f"operand format {name!r}: use e4m3, e5m2, s8, u8, f16, bf16 or tf32")
    return values


# --- rounding ---------------------------------------------------------------------------------------------------------

ROUND: dict[str, Callable[[NDArray[np.float64], NDArray[np.bool_]], NDArray[np.float64]]] = {
    "rn": lambda x, negative: np.rint(x),
    "rz": lambda x, negative: np.floor(x),
    "rm": lambda x, negative: np.where(negative, np.ceil(x), np.floor(x)),
    "rp": lambda x, negative: np.where(negative, np.floor(x), np.ceil(x)),
    "rna": lambda x, negative: np.floor(x) + (x - np.floor(x) >= 0.5),
}


def encode(values: Values, name: str, rounding: str = "rn", satfinite: bool = False, relu: bool = False) -> Bits:
    """Rounds values into a format.

    Args:
        values: float32 or float64 array (any shape), taken as exact.
        name: destination, a key of `FORMATS`.
        rounding: ``rn`` (ties to even), ``rna`` (ties away), ``rz``, ``rm`` or ``rp``.
        satfinite: finite overflow and Inf become the largest finite value; formats without Inf and NaN behave so always.
        relu: negative results (and -0) become +0.

    Returns:
        Codes in the format's container type. NaN becomes the canonical NaN, or the positive largest value where the format has no NaN
        (PTX ISA, ``cvt`` ``.satfinite``). Overflow without satfinite: Inf as IEEE 754 says for the rounding mode, NaN in e4m3 and ue8m0.
        ue8m0 ignores the sign, and its smallest value, 2^-127, stands for everything below.
    """
    fmt = _format(name)
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = np.asarray(values, np.float64)
    nan = np.isnan(x)
    if name == "f64":
        if relu:
            x = np.where(x > 0, x, 0.0)
        return np.where(nan, np.uint64(fmt.nan or 0), x.view(np.uint64))
    negative = np.signbit(x)
    magnitude = np.where(nan | (negative & relu), 0.0, np.abs(x))
    if relu:
        negative = np.zeros_like(negative)
    infinite = np.isinf(magnitude)
    magnitude = np.where(infinite, 0.0, magnitude)
    smallest = 1 - fmt.bias if fmt.mantissa_bits else -fmt.bias  # exponent of the smallest normal value
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, smallest), smallest)
    scaled = np.ldexp(magnitude, fmt.mantissa_bits - exponent)
    direction = negative if fmt.signed else np.zeros_like(negative)
    code = ROUND[rounding](scaled, direction).astype(np.int64) + ((exponent - smallest).astype(np.int64) << fmt.mantissa_bits)
    if name == "ue8m0":  # `code` counts from 0 at value 0 and 1 at 2^-127: no code for zero
        code = np.maximum(code - 1, 0)
    over = infinite | (code > fmt.largest)
    if satfinite or fmt.nan is None:
        code = np.where(over, fmt.largest, code)
    elif fmt.infinity is None:
        code = np.where(over, fmt.nan, code)
        negative = negative & ~over
    else:
        towards_zero = {"rz": np.ones_like(negative), "rm": ~negative, "rp": negative}.get(rounding, np.zeros_like(negative))
        code = np.where(over, np.where(towards_zero & ~infinite, fmt.largest, fmt.infinity), code)
    if fmt.signed:
        code = code | np.where(negative, fmt.sign, 0)
    code = np.where(nan, fmt.largest if fmt.nan is None else fmt.nan, code)
    bits = code << fmt.shift
    if name == "tf32":  # the canonical NaN is that of f32
        bits = np.where(nan, 0x7FFFFFFF, bits)
    return bits.astype(fmt.container)


def encode_integer(values: NDArray[np.integer], name: str, rounding: str = "rn") -> Bits:
    """Rounds integers into f16, bf16, f32 or f64 (``cvt.frnd.float.int``), exactly for all 64-bit values.

    Args:
        values: int64 or uint64 array (narrower ones are widened).
    """
    fmt = _format(name)
    wide = np.asarray(values)
    wide = wide.astype(np.int64 if np.issubdtype(wide.dtype, np.signedinteger) else np.uint64)
    negative = wide < 0
    magnitude = (
        np.where(negative, (~wide).astype(np.uint64) + np.uint64(1), wide.astype(np.uint64)) if negative.any() else wide.astype(np.uint64)
    )
    small = magnitude < np.uint64(1 << 53)
    if name == "f64" and not small.all():
        nearest = wide.astype(np.float64)
        if rounding == "rn":
            return nearest.view(np.uint64)
        pairs = zip(wide.ravel(), nearest.ravel(), strict=True)
        directed = np.array([_directed(int(value), float(near), rounding) for value, near in pairs])
        out: Bits = directed.reshape(wide.shape).view(np.uint64)
        return out
    sticky = (magnitude >> np.uint64(11)) | ((magnitude & np.uint64(0x7FF)) != 0)
    exact = np.where(small, magnitude.astype(np.float64), sticky.astype(np.float64) * 2048.0)
    return encode(np.where(negative, -exact, exact), fmt.name, rounding)


def _directed(value: int, nearest: float, rounding: str) -> float:
    """The float64 beside `nearest` that `rounding` asks for."""
    toward = {"rm": -np.inf, "rp": np.inf, "rz": -np.inf if value > 0 else np.inf}[rounding]
    wrong_side = int(nearest) > value if toward < 0 else int(nearest) < value
    return float(np.nextafter(nearest, toward)) if wrong_side else nearest


INTEGER_ROUND: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def float_to_integer(values: Values, bits: int, signed: bool, rounding: str = "rzi", source_is_f64: bool = False) -> Bits:
    """``cvt.irnd.int.float``: rounds to an integer and clamps it to the destination's range.

    NaN gives 0, or ``1 << (bits - 1)`` where the source is f64 or the destination has 64 bits (PTX ISA ``cvt``, integer notes).

    Returns:
        Two's complement bits in an unsigned container of `bits` bits.
    """
    x = np.asarray(values, np.float64)
    nan = np.isnan(x)
    rounded = INTEGER_ROUND[rounding](np.where(nan, 0.0, x))
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    inside = np.where((rounded >= float(low)) & (rounded < float(high + 1)), rounded, 0.0)
    if bits == 64 and not signed:
        upper = inside >= 2.0**63
        result = np.where(upper, inside - 2.0**63, inside).astype(np.int64).astype(np.uint64) | (upper.astype(np.uint64) << np.uint64(63))
    else:
        result = inside.astype(np.int64).astype(np.uint64)
    result = np.where(rounded >= float(high + 1), np.uint64(high), result)
    result = np.where(rounded < float(low), np.uint64(low & 0xFFFFFFFFFFFFFFFF), result)
    result = np.where(nan, np.uint64(1 << (bits - 1) if source_is_f64 or bits == 64 else 0), result)
    out: Bits = result.astype(UNSIGNED[bits])
    return out
