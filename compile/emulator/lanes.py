"""Arithmetic on lane arrays: what generated code calls where one numpy expression does not do.

Sources: PTX ISA 9.x, 9.7.1 (integer), 9.7.3 and 9.7.4 (float and half), 9.7.8 (logic and shift), 9.7.9 (``prmt``, ``shf``).

A register is an unsigned array ``[lanes]`` of its width (uint16, uint32, uint64), a predicate a bool array. Functions ending in ``_int`` take
and give Python ints. Approximate functions (``ex2``, ``rcp``, ``rsqrt``, ``sqrt``, ``lg2``, ``sin``, ``cos``, ``tanh``) are modelled as the
float64 result rounded to nearest, ``.ftz`` as in the ISA: hardware differs in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.conversions import make_converter
from densemoe.compile.emulator.masks import some

Lanes = NDArray[Any]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

CONTAINERS: dict[int, type[np.unsignedinteger[Any]]] = {8: u1, 16: u2, 32: u4, 64: u8}
_NAN32 = np.uint32(0x7FFFFFFF)


# --- single values ----------------------------------------------------------------------------------------------------


def S16(v: int) -> int:
    return (v ^ 0x8000) - 0x8000


def S32(v: int) -> int:
    return (v ^ 0x80000000) - 0x80000000


def S64(v: int) -> int:
    return (v ^ 0x8000000000000000) - 0x8000000000000000


def F16(v: int) -> Any:
    return u2(v).view(f2)


def F32(v: int) -> Any:
    return u4(v).view(f4)


def F64(v: int) -> Any:
    return u8(v).view(f8)


def A8(v: int) -> Lanes:
    return np.array([v], u1)


def A16(v: int) -> Lanes:
    return np.array([v], u2)


def A32(v: int) -> Lanes:
    return np.array([v], u4)


def A64(v: int) -> Lanes:
    return np.array([v], u8)


# --- integers ---------------------------------------------------------------------------------------------------------


def _quotient(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


_BY_ZERO = 0x5A5A  # "an unspecified, machine-specific value": one that compilers' speculative divisions never use, and an address never is


def div_int(a: int, b: int) -> int:
    """Quotient towards zero."""
    return _quotient(a, b) if b else _BY_ZERO


def rem_int(a: int, b: int) -> int:
    """Remainder with the sign of the dividend."""
    return a - b * _quotient(a, b) if b else _BY_ZERO


def div(a: Any, b: Any, remainder: bool) -> Lanes:
    """Quotient or remainder of arrays (one of them may be an int)."""
    a, b = np.broadcast_arrays(*(np.asarray(x, (a if isinstance(a, np.ndarray) else b).dtype) for x in (a, b)))
    zero = b == 0
    by_zero = bool(zero.any())
    if by_zero:
        b = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        result = np.remainder(a, b) if remainder else np.floor_divide(a, b)
    else:
        result = np.fmod(a, b) if remainder else (a - np.fmod(a, b)) // b
    return np.where(zero, b.dtype.type(_BY_ZERO), result) if by_zero else result


def mul_hi_u64(a: Any, b: Any) -> Lanes:
    a, b = np.asarray(a, u8), np.asarray(b, u8)
    low = u8(0xFFFFFFFF)
    s = u8(32)
    al, ah, bl, bh = a & low, a >> s, b & low, b >> s
    middle = ah * bl + (al * bl >> s)
    other = al * bh + (middle & low)
    return ah * bh + (middle >> s) + (other >> s)


def mul_hi_s64(a: Any, b: Any) -> Lanes:
    a, b = np.asarray(a, u8), np.asarray(b, u8)
    high = mul_hi_u64(a, b)
    zero = u8(0)
    return high - np.where(a >> u8(63) != 0, b, zero) - np.where(b >> u8(63) != 0, a, zero)


def shl(a: Any, b: Any, dtype: Any) -> Lanes:
    """Shift amounts of the width and more give 0."""
    wide = np.minimum(np.asarray(b, u4), u4(64)).astype(u8)
    return np.left_shift(np.asarray(a, u8), wide).astype(dtype)


def shr(a: Any, b: Any, dtype: Any) -> Lanes:
    """Logical or, for a signed dtype, arithmetic; `a` in that dtype."""
    bits = np.dtype(dtype).itemsize * 8
    amount = np.minimum(np.asarray(b, u4), u4(bits if np.dtype(dtype).kind == "u" else bits - 1))
    return np.right_shift(np.asarray(a, dtype), amount.astype(dtype))


def shf(low: Any, high: Any, amount: Any, left: bool, wrap: bool) -> Lanes:
    """Funnel shift: 32 bits of ``high:low`` (``.clamp`` or ``.wrap``)."""
    count = np.asarray(amount, u4)
    count = (count & u4(31) if wrap else np.minimum(count, u4(32))).astype(u8)
    both = np.asarray(high, u8) << u8(32) | np.asarray(low, u8)
    moved = (both << count) >> u8(32) if left else both >> count
    return moved.astype(u4)


def bfe(a: Any, position: Any, length: Any, bits: int, signed: bool) -> Lanes:
    a = np.asarray(a, u8)
    p, n = (np.asarray(x, u8) & u8(0xFF) for x in (position, length))
    p, n = np.broadcast_arrays(p, n)
    field = np.where(p >= bits, u8(0), a >> np.minimum(p, u8(63)))
    keep = np.minimum(n, np.where(p >= bits, u8(0), u8(bits) - np.minimum(p, u8(bits))))
    value = field & ~(~u8(0) << np.minimum(keep, u8(63)))
    value = np.where(keep >= 64, field, value)
    if signed:
        top = np.minimum(p + n - u8(1), u8(bits - 1))
        sign = np.where(n == 0, u8(0), (a >> top) & u8(1))
        fill = np.where(sign != 0, ~u8(0) << np.minimum(keep, u8(63)), u8(0))
        value = np.where(keep >= 64, value, value | fill)
    return value.astype(CONTAINERS[bits])


def bfi(a: Any, b: Any, position: Any, length: Any, bits: int) -> Lanes:
    a, b = np.asarray(a, u8), np.asarray(b, u8)
    p, n = (np.asarray(x, u8) & u8(0xFF) for x in (position, length))
    full = u8((1 << bits) - 1)
    ones = np.where(n >= bits, full, ~(~u8(0) << np.minimum(n, u8(63))))
    moved_mask = np.where(p >= bits, u8(0), (ones << np.minimum(p, u8(63))) & full)
    moved = np.where(p >= bits, u8(0), a << np.minimum(p, u8(63)))
    return ((moved & moved_mask) | (b & ~moved_mask & full)).astype(CONTAINERS[bits])


#: ``immLut`` of what compilers write most, of A = 0xF0, B = 0xCC, C = 0xAA
_LOP3: dict[int, Callable[[Lanes, Lanes, Lanes], Lanes]] = {
    0xF0 & 0xCC: lambda a, b, c: a & b,
    0xF0 | 0xCC: lambda a, b, c: a | b,
    0xF0 ^ 0xCC: lambda a, b, c: a ^ b,
    0xF0 & 0xCC & 0xAA: lambda a, b, c: a & b & c,
    (0xF0 & 0xCC) | 0xAA: lambda a, b, c: a & b | c,
    (0xF0 | 0xCC) & 0xAA: lambda a, b, c: (a | b) & c,
    0xF0 | (0xCC & 0xAA): lambda a, b, c: a | b & c,
    0xF0 & (0xCC | 0xAA): lambda a, b, c: a & (b | c),
    (0xF0 & 0xCC) ^ 0xAA: lambda a, b, c: a & b ^ c,
    0xCA: lambda a, b, c: a & b | ~a & c,
    0xE4: lambda a, b, c: a & c | b & ~c,
}


def lop3(a: Any, b: Any, c: Any, table: int) -> Lanes:
    a, b, c = (np.asarray(x, u4) for x in (a, b, c))
    usual = _LOP3.get(table)
    if usual is not None and (a.ndim or b.ndim):
        return usual(a, b, c)
    a, b, c = np.broadcast_arrays(a, b, c)
    result = np.zeros(a.shape, u4)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def prmt(a: Any, b: Any, selector: Any) -> Lanes:
    """Byte permute, default mode."""
    lanes = max(np.size(a), np.size(b))
    if isinstance(selector, int) and lanes > 1:  # bytes picked by columns: all lanes have the same
        both = np.empty((lanes, 2), np.dtype("<u4"))
        both[:, 0], both[:, 1] = a, b
        nibbles = [selector >> 4 * i & 0xF for i in range(4)]
        picked = both.view(u1).take([nibble & 7 for nibble in nibbles], axis=1)
        for i, nibble in enumerate(nibbles):
            if nibble & 8:
                picked[:, i] = np.where(picked[:, i] & 0x80, u1(0xFF), u1(0))
        return picked.view("<u4").reshape(-1)
    a, b, s = np.broadcast_arrays(*(np.asarray(x, u4) for x in (a, b, selector)))
    both = a.astype(u8) | b.astype(u8) << u8(32)
    result = np.zeros(a.shape, u4)
    for i in range(4):
        nibble = (s >> u4(4 * i)) & u4(0xF)
        byte = (both >> ((nibble & u4(7)).astype(u8) * u8(8))).astype(u4) & u4(0xFF)
        sign = np.where(byte & u4(0x80), u4(0xFF), u4(0))
        result |= np.where(nibble & u4(8), sign, byte) << u4(8 * i)
    return result


def popc(a: Any) -> Lanes:
    a = np.atleast_1d(a)
    return np.unpackbits(np.ascontiguousarray(a).view(u1).reshape(a.size, -1), axis=1).sum(axis=1).astype(u4)


def _bit_length(a: Any) -> Lanes:
    a = np.atleast_1d(a).astype(u8)
    length = np.zeros(a.shape, u4)
    for step in (32, 16, 8, 4, 2, 1):
        upper = a >> u8(step)
        more = upper != 0
        length += np.where(more, u4(step), u4(0))
        a = np.where(more, upper, a)
    return length + (a != 0).astype(u4)


def clz(a: Any, bits: int) -> Lanes:
    return u4(bits) - _bit_length(a)


def bfind(a: Any, bits: int, signed: bool, shift_amount: bool) -> Lanes:
    a = np.atleast_1d(a)
    if signed:
        a = np.where(a >> (bits - 1), ~a, a)
    length = _bit_length(a)
    position = length - u4(1)
    return np.where(length == 0, u4(0xFFFFFFFF), u4(bits - 1) - position if shift_amount else position).astype(u4)


def brev(a: Any, bits: int) -> Lanes:
    a = np.atleast_1d(a)
    bytes_reversed = np.ascontiguousarray(np.ascontiguousarray(a).view(u1).reshape(a.size, bits // 8)[:, ::-1])
    flipped = np.packbits(np.unpackbits(bytes_reversed, bitorder="little"), bitorder="big")
    return flipped.view(CONTAINERS[bits])


def dp4a(a: Any, b: Any, c: Any, a_signed: bool, b_signed: bool) -> Lanes:
    a, b, c = np.broadcast_arrays(*(np.asarray(x, u4) for x in (a, b, c)))
    x = np.ascontiguousarray(a).view(i1 if a_signed else u1).reshape(-1, 4).astype(i4)
    y = np.ascontiguousarray(b).view(i1 if b_signed else u1).reshape(-1, 4).astype(i4)
    return (x * y).sum(axis=1, dtype=i4).view(u4) + c


def extend(a: Lanes, bits: int, source: int, signed: bool) -> Lanes:
    """The low `source` bits of an array, extended to a container of `bits` bits."""
    narrow = a.astype(CONTAINERS[source])
    if signed:
        narrow = narrow.view({1: i1, 2: i2, 4: i4, 8: i8}[narrow.itemsize])
        return narrow.astype({8: i1, 16: i2, 32: i4, 64: i8}[bits]).view(CONTAINERS[bits])
    return narrow.astype(CONTAINERS[bits])


def extend_int(a: int, bits: int, source: int, signed: bool) -> int:
    a &= (1 << source) - 1
    if signed and a >> (source - 1):
        a -= 1 << source
    return a & ((1 << bits) - 1)


def saturate_add(a: Any, b: Any) -> Lanes:
    """``add.sat.s32``."""
    return np.clip(np.asarray(a, i8) + np.asarray(b, i8), -(2**31), 2**31 - 1).astype(i4)


# --- floats -----------------------------------------------------------------------------------------------------------


_LEAST_NORMAL, _ZERO32 = f4(2.0**-126), f4(0)


def ftz(x: Lanes) -> Lanes:
    """float32 with subnormals replaced by a zero of their sign."""
    x = np.asarray(x, f4)
    small = np.abs(x) < _LEAST_NORMAL
    return np.where(small, np.copysign(_ZERO32, x), x) if some(small) else x


_ONE: Final = u8(1)
_LOW: Final = u8((1 << 29) - 1)  # bits of a float64 that float32 has not, and what they are halfway between two float32 numbers
_HALF: Final = u8(1 << 28)
_TINY: Final = u8(2 * 0x3810000000000000 - 1)  # twice the bits of 2^-126, less one


def fma32(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a·b + c in float32, rounded once.

    The product is exact in float64. Rounding the sum to float64 and then to float32 differs from rounding it once only where float64 holds a number
    halfway between two of float32: there, and among subnormals, where halves lie elsewhere, it is rounded to odd first.
    """
    product = np.multiply(a, b, dtype=f8)
    c = np.asarray(c, f8)
    total = product + c
    bits = np.atleast_1d(total).view(u8)
    if not some(((bits & _LOW) == _HALF) | ((bits << _ONE) - _ONE < _TINY)):
        return total.astype(f4)
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    inexact = (error != 0) & np.isfinite(total)
    if inexact.any():
        even = inexact & ((bits & _ONE) == 0)
        step = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(even, bits.view(i8) + step, bits.view(i8)).view(f8)
    return total.astype(f4)


def fma16(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a·b + c in float16, rounded once: the product is exact in float32, the sum of it and c in float64 up to a sticky bit."""
    return _odd_sum(np.multiply(a, b, dtype=f8), np.asarray(c, f8)).astype(f2)


def _odd_sum(x: Lanes, y: Lanes) -> Lanes:
    total = x + y
    rest = total - x
    error = (x - (total - rest)) + (y - rest)
    bits = np.atleast_1d(total).view(i8)
    odd = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    if not odd.any():
        return total
    return np.where(odd, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(f8)


_TO_BF16: Callable[..., Lanes] = make_converter("bf16", "f32", rounding="rn")


def bf16_values(bits: Any) -> Lanes:
    """float32 values of bf16 halves, ``[2 · lanes]`` from packed uint32 or ``[lanes]`` from uint16."""
    wide = np.atleast_1d(np.asarray(bits)).view(u2).astype(u4)
    wide <<= u4(16)
    return wide.view(f4)


def _bf16_round(values: Lanes, packed: bool) -> Lanes:
    if values.dtype == f8:  # to float32 by rounding to odd, so that the second rounding sees a sticky bit
        nearest = values.astype(f4)
        back = nearest.astype(f8)
        bits = nearest.view(u4)
        away = np.abs(back) > np.abs(values)
        toward = np.where(away, bits - u4(1), bits)
        inexact = (back != values) & np.isfinite(back)
        nearest = np.where(inexact, toward | u4(1), bits).view(f4)
        values = nearest
    rounded = _TO_BF16(values.view(u4))
    return rounded.view(u4) if packed else rounded


def mul_bf16(a: Any, b: Any, packed: bool) -> Lanes:
    x, y = bf16_values(a), bf16_values(b)
    product = _times(x, y, packed)
    return _bf16_round(product, packed)


def _times(x: Lanes, y: Lanes, packed: bool) -> Lanes:
    if packed and (x.size == 2) != (y.size == 2):  # a constant pair against lanes
        if x.size == 2:
            x, y = y, x
        if y[0] == y[1]:
            product = x * y[0]
        else:
            product = (x.reshape(-1, 2) * y).reshape(-1)
    else:
        product = x * y
    exponent = product.view(u4) & u4(0x7F800000)
    if not exponent.all():
        tiny = (exponent == 0) & (x != 0)
        if tiny.any():  # subnormal products are not exact in float32
            return np.multiply(x.reshape(-1, y.size) if y.size < x.size else x, y, dtype=f8).reshape(-1)
    return product


def _pairs(x: Lanes, n: int) -> Lanes:
    return x if x.size == n else np.resize(x, n)


def fma_bf16(a: Any, b: Any, c: Any, packed: bool) -> Lanes:
    x, y, z = bf16_values(a), bf16_values(b), bf16_values(c)
    n = max(x.size, y.size, z.size)
    x, y, z = _pairs(x, n), _pairs(y, n), _pairs(z, n)
    return _bf16_round(_odd_sum(np.multiply(x, y, dtype=f8), z.astype(f8)), packed)


def add_bf16(a: Any, b: Any, packed: bool, subtract: bool = False) -> Lanes:
    x, y = bf16_values(a), bf16_values(b)
    n = max(x.size, y.size)
    x, y = _pairs(x, n).astype(f8), _pairs(y, n).astype(f8)
    return _bf16_round(_odd_sum(x, -y if subtract else y), packed)


def canonical(values: Lanes) -> Lanes:
    """float32 with every NaN made canonical, as arithmetic instructions return it."""
    nan = values != values
    if some(nan):
        values = values.copy()
        values[nan] = _NAN32.view(f4)
    return values


def max32(x: Lanes, y: Lanes) -> Lanes:
    """``max.f32``: the common case of `extremum`, without zeros and NaN, by one ufunc."""
    result = np.fmax(x, y)
    return result if result.all() and not np.isnan(result.dot(result)) else extremum((x, y), True, False)


def min32(x: Lanes, y: Lanes) -> Lanes:
    """``min.f32``, as `max32`."""
    result = np.fmin(x, y)
    return result if result.all() and not np.isnan(result.dot(result)) else extremum((x, y), False, False)


def extremum(values: tuple[Any, ...], largest: bool, nan: bool, xorsign: bool = False) -> Lanes:
    """min or max of float arrays: a NaN gives way, or with ``.NaN`` wins; +0 counts above -0; ``.xorsign.abs``."""
    x, y = values[0], values[1]
    if xorsign:
        sign = np.signbit(x) ^ np.signbit(y)
        x, y = np.abs(x), np.abs(y)
    result = np.fmax(x, y) if largest else np.fmin(x, y)
    same = (x == y) & (np.signbit(x) != np.signbit(y))
    if same.any():
        result = np.where(same, result.dtype.type(0.0) if largest else result.dtype.type(-0.0), result)
    if nan:
        result = np.where((x != x) | (y != y), result.dtype.type(np.nan), result)
    bad = result != result
    if bad.any():
        result = np.where(bad, _canonical_of(result.dtype), result)
    if xorsign:
        result = np.where(sign, -result, result)
    return extremum((result, *values[2:]), largest, nan) if len(values) > 2 else result


def _canonical_of(dtype: Any) -> Any:
    if dtype == f4:
        return _NAN32.view(f4)
    return u2(0x7FFF).view(f2) if dtype == f2 else dtype.type(np.nan)


_APPROXIMATE: dict[str, Callable[[Lanes], Lanes]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def unary(name: str, x: Lanes, flush: bool) -> Lanes:
    """A transcendental or reciprocal function of float32 lanes: float64, rounded once."""
    if flush:
        x = ftz(x)
    result = _APPROXIMATE[name](np.asarray(x, f8)).astype(f4)
    return canonical(ftz(result) if flush else result)


def divide32(x: Lanes, y: Lanes, flush: bool) -> Lanes:
    """float32 quotient, rounded once (float64 holds enough bits for it)."""
    if flush:
        x, y = ftz(x), ftz(y)
    result = np.divide(x, y, dtype=f8).astype(f4)
    return canonical(ftz(result) if flush else result)


# --- registers of mixed kind ------------------------------------------------------------------------------------------


def merge(mask: Lanes, new: Any, old: Any, dtype: Any) -> Lanes:
    """`new` where the mask is set, else `old`; either may be an int."""
    if not isinstance(new, np.ndarray):
        new = dtype(new)
    if not isinstance(old, np.ndarray):
        old = dtype(old)
    return np.where(mask, new, old)


def select(mask: Any, a: Any, b: Any, dtype: Any) -> Lanes:
    """``selp`` on arrays and ints."""
    return merge(mask, a, b, dtype)
