"""Every family of register instructions against numpy and Python integers, on arrays and on uniform values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from snippets import PREFIX, UNSIGNED, lanes

SPECIAL = {
    16: [0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 5],
    32: [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 37],
    64: [0, 1, 2, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, (1 << 64) - 1, 70],
}
FLOATS = [0.0, -0.0, 1.0, -1.5, 3.25e-40, np.inf, -np.inf, np.nan, 1e30, -3e-5]


def integers(bits: int, seed: int, count: int = 64) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << bits, count, dtype=np.uint64, endpoint=False) if bits < 64 else rng.integers(0, 1 << 63, count, dtype=np.uint64) * 2
    values[: len(SPECIAL[bits])] = np.roll(np.array(SPECIAL[bits], np.uint64), seed)
    return values.astype(UNSIGNED[bits])


def floats(seed: int, count: int = 64) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=count) * 2.0 ** rng.integers(-20, 20, count)).astype(np.float32)
    values[: len(FLOATS)] = np.roll(np.array(FLOATS, np.float32), seed)
    return values


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def check(instructions: str, inputs: list[NDArray[Any]], bits: int, expected: Callable[..., int]) -> None:
    """One output register against a function of Python ints, as arrays and as uniform values."""
    want = np.array([expected(*(int(each[i]) for each in inputs)) & ((1 << bits) - 1) for i in range(64)], UNSIGNED[bits])
    got = lanes(instructions, inputs, [bits])[0]
    np.testing.assert_array_equal(got, want)
    for i in (0, 5, 33):
        one = [np.roll(each, -i) for each in inputs]
        assert int(lanes(instructions, one, [bits], uniform=True)[0][0]) == int(want[i])


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_integer_arithmetic(bits: int, kind: str) -> None:
    a, b = integers(bits, 1), integers(bits, 2)
    r = PREFIX[bits]
    view = (lambda x: signed(x, bits)) if kind == "s" else (lambda x: x)
    t = f"{kind}{bits}"
    check(f"add.{t} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: x + y)
    check(f"sub.{t} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: x - y)
    check(f"mul.lo.{t} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: x * y)
    check(f"mul.hi.{t} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: view(x) * view(y) >> bits)
    check(f"mad.lo.{t} {r}20, {r}0, {r}1, {r}1;", [a, b], bits, lambda x, y: x * y + y)
    check(f"min.{t} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: min(view(x), view(y)))
    check(f"max.{t} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: max(view(x), view(y)))
    check(f"shr.{t} {r}20, {r}0, 3;", [a], bits, lambda x: view(x) >> 3)
    check(f"shl.b{bits} {r}20, {r}0, 5;", [a], bits, lambda x: x << 5)
    check(f"add.{t} {r}20, {r}0, -7;", [a], bits, lambda x: x - 7)
    nonzero = np.where(b == 0, b.dtype.type(3), b)

    def quotient(x: int, y: int) -> int:
        x, y = view(x), view(y)
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    check(f"div.{t} {r}20, {r}0, {r}1;", [a, nonzero], bits, quotient)
    check(f"rem.{t} {r}20, {r}0, {r}1;", [a, nonzero], bits, lambda x, y: view(x) - view(y) * quotient(x, y))
    if bits < 64:
        wide = {16: 32, 32: 64}[bits]
        w = PREFIX[wide]
        check(f"mul.wide.{t} {w}20, {r}0, {r}1;", [a, b], wide, lambda x, y: view(x) * view(y))
        check(f"mad.wide.{t} {w}20, {r}0, {r}1, {w}2;", [a, b, integers(wide, 3)], wide, lambda x, y, z: view(x) * view(y) + z)
    if kind == "s":
        check(f"neg.{t} {r}20, {r}0;", [a], bits, lambda x: -x)
        check(f"abs.{t} {r}20, {r}0;", [a], bits, lambda x: abs(view(x)))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_registers_clamp(bits: int) -> None:
    a, b = integers(bits, 1), np.random.default_rng(3).integers(0, 140, 64).astype(np.uint32)
    r = PREFIX[bits]
    check(f"shl.b{bits} {r}20, {r}0, %r1;", [a, b], bits, lambda x, n: x << n if n < bits else 0)
    check(f"shr.u{bits} {r}20, {r}0, %r1;", [a, b], bits, lambda x, n: x >> n)
    check(f"shr.s{bits} {r}20, {r}0, %r1;", [a, b], bits, lambda x, n: signed(x, bits) >> min(n, bits - 1))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    a, b, r = integers(bits, 4), integers(bits, 5), PREFIX[bits]
    check(f"and.b{bits} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: x & y)
    check(f"or.b{bits} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: x | y)
    check(f"xor.b{bits} {r}20, {r}0, {r}1;", [a, b], bits, lambda x, y: x ^ y)
    check(f"not.b{bits} {r}20, {r}0;", [a], bits, lambda x: ~x)
    check(f"cnot.b{bits} {r}20, {r}0;", [a], bits, lambda x: int(x == 0))


def test_bit_fields() -> None:
    a, b, c = integers(32, 6), integers(32, 7), integers(32, 8)
    position, length = (np.random.default_rng(i).integers(0, 34, 64).astype(np.uint32) for i in (1, 2))
    check("lop3.b32 %r20, %r0, %r1, %r2, 0x6A;", [a, b, c], 32, lambda x, y, z: sum(
        ((0x6A >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1))) & 1) << i for i in range(32)))
    check("popc.b32 %r20, %r0;", [a], 32, lambda x: x.bit_count())
    check("clz.b32 %r20, %r0;", [a], 32, lambda x: 32 - x.bit_length())
    check("brev.b32 %r20, %r0;", [a], 32, lambda x: int(f"{x:032b}"[::-1], 2))
    check("popc.b64 %r20, %d0;", [integers(64, 3)], 32, lambda x: x.bit_count())
    check("clz.b64 %r20, %d0;", [integers(64, 3)], 32, lambda x: 64 - x.bit_length())
    check("bfind.u32 %r20, %r0;", [a], 32, lambda x: x.bit_length() - 1)
    check("shf.l.wrap.b32 %r20, %r0, %r1, %r2;", [a, b, c], 32, lambda x, y, n: ((y << 32 | x) << (n & 31)) >> 32)
    check("shf.r.clamp.b32 %r20, %r0, %r1, %r2;", [a, b, c], 32, lambda x, y, n: (y << 32 | x) >> min(n, 32))

    def prmt(x: int, y: int, s: int) -> int:
        both, out = y << 32 | x, 0
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = both >> 8 * (nibble & 7) & 255
            out |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
        return out

    check("prmt.b32 %r20, %r0, %r1, %r2;", [a, b, c], 32, prmt)

    def bfe(x: int, p: int, n: int) -> int:
        return (x >> p) & ((1 << min(n, 32 - min(p, 32))) - 1) if p < 32 else 0

    check("bfe.u32 %r20, %r0, %r1, %r2;", [a, position, length], 32, bfe)

    def bfe_signed(x: int, p: int, n: int) -> int:
        if n == 0:
            return 0
        sign = x >> min(p + n - 1, 31) & 1
        return sum(((x >> p + i & 1) if i < n and p + i < 32 else sign) << i for i in range(32))

    check("bfe.s32 %r20, %r0, %r1, %r2;", [a, position, length], 32, bfe_signed)

    def bfi(x: int, y: int, p: int, n: int) -> int:
        for i in range(n):
            if p + i < 32:
                y = y & ~(1 << p + i) | (x >> i & 1) << p + i
        return y

    check("bfi.b32 %r20, %r0, %r1, %r2, %r3;", [a, b, position, length], 32, bfi)
    check("dp4a.s32.s32 %r20, %r0, %r1, %r2;", [a, b, c], 32, lambda x, y, z: z + sum(
        signed(x >> 8 * i & 255, 8) * signed(y >> 8 * i & 255, 8) for i in range(4)))


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_and_selection(compare: str) -> None:
    a, b = integers(32, 9), integers(32, 10)
    b[::3] = a[::3]
    functions: dict[str, Callable[[Any, Any], bool]] = {
        "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    }  # fmt: skip
    holds = functions[compare]
    text = "setp.{}.{} %p1, %r0, %r1; selp.b32 %r20, 11, 22, %p1;"
    check(text.format(compare, "u32"), [a, b], 32, lambda x, y: 11 if holds(x, y) else 22)
    check(text.format(compare, "s32"), [a, b], 32, lambda x, y: 11 if holds(signed(x, 32), signed(y, 32)) else 22)
    x, y = floats(1), floats(2)
    y[::3] = x[::3]
    inputs = [x.view(np.uint32), y.view(np.uint32)]

    def value(bits: int) -> float:
        return float(np.uint32(bits).view(np.float32))

    def ordered(p: int, q: int) -> int:
        nan = np.isnan(value(p)) or np.isnan(value(q))
        return 11 if not nan and holds(value(p), value(q)) else 22

    check(text.format(compare, "f32"), inputs, 32, ordered)
    check(text.format(compare + "u", "f32"), inputs, 32, lambda p, q: 11 if np.isnan(value(p)) or np.isnan(value(q)) else ordered(p, q))
    check(
        f"setp.ne.u32 %p3, %r1, 0; setp.{compare}.and.s32 %p1|%p2, %r0, %r1, %p3; selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2;"
        "add.u32 %r20, %r1, %r2;",
        [a, b],
        32,
        lambda p, q: 0 if not q else 1 if holds(signed(p, 32), signed(q, 32)) else 2,
    )


def same_floats(got: NDArray[np.uint32], want: NDArray[np.float32]) -> None:
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got.view(np.float32)), nan)
    np.testing.assert_array_equal(got[~nan], want.view(np.uint32)[~nan])


def check_float(instructions: str, inputs: list[NDArray[np.float32]], want: NDArray[Any]) -> None:
    given = [each.view(np.uint32) for each in inputs]
    want = np.asarray(want, np.float32)
    same_floats(lanes(instructions, given, [32])[0], want)
    for i in range(0, 64, 9):
        same_floats(lanes(instructions, [np.roll(each, -i) for each in given], [32], uniform=True)[0], want[i : i + 1])


@np.errstate(all="ignore")
def test_float_arithmetic() -> None:
    a, b, c = floats(3), floats(4), floats(5)
    check_float("add.rn.f32 %r20, %r0, %r1;", [a, b], a + b)
    check_float("sub.f32 %r20, %r0, %r1;", [a, b], a - b)
    check_float("mul.rn.f32 %r20, %r0, %r1;", [a, b], a * b)
    check_float("div.rn.f32 %r20, %r0, %r1;", [a, b], a / b)
    check_float("abs.f32 %r20, %r0;", [a], np.abs(a))
    check_float("neg.f32 %r20, %r0;", [a], -a)
    check_float("sqrt.rn.f32 %r20, %r0;", [a], np.sqrt(a))
    check_float("ex2.approx.f32 %r20, %r0;", [a], np.exp2(a.astype(np.float64)))
    exact = np.array([float(np.float32(x)) for x in a], np.float64)
    import fractions

    def fused(x: np.float32, y: np.float32, z: np.float32) -> float:
        if not all(np.isfinite(v) for v in (x, y, z)):
            return float(np.float64(x) * np.float64(y) + np.float64(z))
        total = fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(float(z))
        if total == 0:
            return float(np.float64(x) * np.float64(y) + np.float64(z))
        return nearest_float32(total)

    assert np.isnan(exact).any()
    check_float("fma.rn.f32 %r20, %r0, %r1, %r2;", [a, b, c], np.array([fused(*each) for each in zip(a, b, c, strict=True)]))
    near = (-(a * b)).astype(np.float32)  # cancellation shows a product that was rounded first
    check_float("fma.rn.f32 %r20, %r0, %r1, %r2;", [a, b, near], np.array([fused(*each) for each in zip(a, b, near, strict=True)]))


def nearest_float32(total: Any) -> float:
    """A rational rounded to float32, ties to even."""
    sign, total = (-1, -total) if total < 0 else (1, total)
    exponent = max((total.numerator.bit_length() - total.denominator.bit_length()) - 24, -149)
    while total / 2**exponent >= 2**24 if exponent >= 0 else total * 2**-exponent >= 2**24:
        exponent += 1
    scaled = total / 2**exponent if exponent >= 0 else total * 2**-exponent
    if scaled < 2**23 and exponent > -149:
        exponent -= 1
        scaled *= 2
    rounded = round(scaled)  # Python rounds rationals to even
    value = sign * float(rounded) * 2.0**exponent if exponent < 900 else sign * np.inf
    return float(np.float32(value))


@np.errstate(all="ignore")
def test_minimum_and_maximum_with_nan_zeros_and_three_sources() -> None:
    a, b, c = floats(6), floats(7), floats(8)
    a[20], b[20], a[21], b[21] = 0.0, -0.0, -0.0, 0.0

    def pick(x: np.float32, y: np.float32, nan: bool) -> float:
        if np.isnan(x) or np.isnan(y):
            return np.nan if nan or (np.isnan(x) and np.isnan(y)) else float(y if np.isnan(x) else x)
        if x == 0 and y == 0:
            return -0.0 if np.signbit(x) and np.signbit(y) else 0.0
        return float(max(x, y))

    for nan in (False, True):
        name = "max.NaN.f32" if nan else "max.f32"
        want = np.array([pick(x, y, nan) for x, y in zip(a, b, strict=True)], np.float32)
        check_float(f"{name} %r20, %r0, %r1;", [a, b], want)
        three = np.array([pick(np.float32(pick(x, y, nan)), z, nan) for x, y, z in zip(a, b, c, strict=True)], np.float32)
        check_float(f"{name} %r20, %r0, %r1, %r2;", [a, b, c], three)


@np.errstate(all="ignore")
def test_packed_float32() -> None:
    a, b, c, d = floats(11), floats(12), floats(13), floats(14)
    given = [each.view(np.uint32) for each in (a, b, c, d)]
    text = "mov.b64 %d0, {{%r0, %r1}}; mov.b64 %d1, {{%r2, %r3}}; {} mov.b64 {{%r20, %r21}}, %d2;"
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        low, high = lanes(text.format(f"{name}.rn.f32x2 %d2, %d0, %d1;"), given, [32, 32])
        same_floats(low, function(a, c))
        same_floats(high, function(b, d))
    one = lanes(text.format("fma.rn.f32x2 %d2, %d0, %d1, %d1;"), given, [32, 32])
    two = lanes("fma.rn.f32 %r20, %r0, %r2, %r2; fma.rn.f32 %r21, %r1, %r3, %r3;", given, [32, 32])
    np.testing.assert_array_equal(one, two)


@np.errstate(all="ignore")
@pytest.mark.parametrize("kind", ["bf16x2", "f16x2"])
def test_packed_halves(kind: str) -> None:
    import ml_dtypes

    dtype: Any = ml_dtypes.bfloat16 if kind == "bf16x2" else np.float16
    a, b, c = (floats(i, 128).astype(dtype) for i in (15, 16, 17))
    given = [each.view(np.uint32) for each in (a, b, c)]
    wide = [each.astype(np.float64) for each in (a, b, c)]
    wants = {
        f"mul.rn.{kind} %r20, %r0, %r1;": wide[0] * wide[1],
        f"add.rn.{kind} %r20, %r0, %r1;": wide[0] + wide[1],
        f"sub.rn.{kind} %r20, %r0, %r1;": wide[0] - wide[1],
    }
    for text, want in wants.items():
        got = lanes(text, given, [32])[0].view(dtype)
        rounded = want.astype(np.float32).astype(dtype) if kind == "f16x2" else np.array([_to(dtype, x) for x in want], dtype)
        nan = np.isnan(want)
        np.testing.assert_array_equal(got[~nan].view(np.uint16), rounded[~nan].view(np.uint16))
        assert np.isnan(got[nan].astype(np.float32)).all()
        first = lanes(text, given, [32], uniform=True)[0].view(dtype)
        np.testing.assert_array_equal(first.astype(np.float32), got[:2].astype(np.float32))


def _to(dtype: Any, value: float) -> Any:
    """float64 to bf16 in one rounding: ml_dtypes goes over float32, so the float32 is rounded to odd first."""
    near = np.float32(value)
    if np.isfinite(near) and float(near) != value:
        bits = int(near.view(np.uint32))
        if abs(float(near)) > abs(value):
            bits -= 1
        near = np.uint32(bits | 1).view(np.float32)
    return near.astype(dtype)


@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("of", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_conversions(to: str, of: str) -> None:
    to_bits, of_bits = int(to[1:]), int(of[1:])
    source = max(of_bits, 16)
    a = integers(source, 18)

    def convert(x: int) -> int:
        x &= (1 << of_bits) - 1
        return signed(x, of_bits) if of[0] == "s" else x

    check(f"cvt.{to}.{of} {PREFIX[to_bits]}20, {PREFIX[source]}0;", [a], to_bits, convert)


def test_conversions_narrower_than_their_register() -> None:
    a = integers(32, 19)
    check("cvt.s8.s32 %h20, %r0;", [a], 16, lambda x: signed(x & 255, 8))
    check("cvt.u8.u32 %r20, %r0;", [a], 32, lambda x: x & 255)
    check("cvt.s16.s32 %r20, %r0;", [a], 32, lambda x: signed(x & 0xFFFF, 16))


@np.errstate(all="ignore")
def test_float_conversions() -> None:
    a = floats(20)
    halves = a.astype(np.float16).view(np.uint16)
    nan = np.isnan(a)
    np.testing.assert_array_equal(lanes("cvt.rn.f16.f32 %h20, %r0;", [a.view(np.uint32)], [16])[0][~nan], halves[~nan])
    same_floats(lanes("cvt.f32.f16 %r20, %h0;", [halves], [32])[0], halves.view(np.float16).astype(np.float32))
    numbers = integers(32, 21)
    same_floats(lanes("cvt.rn.f32.s32 %r20, %r0;", [numbers], [32])[0], numbers.view(np.int32).astype(np.float32))
    pair = lanes("cvt.rn.bf16x2.f32 %r20, %r0, %r1;", [a.view(np.uint32), floats(22).view(np.uint32)], [32])[0]
    one = lanes("cvt.rn.bf16.f32 %h20, %r0;", [a.view(np.uint32)], [16])[0]
    np.testing.assert_array_equal(pair >> 16, one)


def test_moves_pack_and_unpack() -> None:
    a, b = integers(32, 23), integers(32, 24)
    low, high = lanes("mov.b64 %d5, {%r0, %r1}; add.s64 %d5, %d5, 0; mov.b64 {%r20, %r21}, %d5;", [a, b], [32, 32])
    np.testing.assert_array_equal(low, a)
    np.testing.assert_array_equal(high, b)
    check("mov.b32 {%h1, %h2}, %r0; mov.b32 %r20, {%h2, %h1};", [a], 32, lambda x: (x >> 16) | (x << 16))
    check("mov.b64 %d5, {%r0, %r1}; shr.u64 %d20, %d5, 4;", [a, b], 64, lambda x, y: (y << 32 | x) >> 4)


def test_predicated_instructions_keep_what_other_lanes_had() -> None:
    a, b = integers(32, 25), integers(32, 26)
    check("setp.lt.s32 %p1, %r0, %r1; mov.b32 %r20, 7; @%p1 add.u32 %r20, %r0, 1;", [a, b], 32,
          lambda x, y: x + 1 if signed(x, 32) < signed(y, 32) else 7)
    check("setp.lt.s32 %p1, %r0, %r1; mov.b32 %r20, %r0; @!%p1 mov.b32 %r20, %r1;", [a, b], 32,
          lambda x, y: x if signed(x, 32) < signed(y, 32) else y)


def test_divergence_runs_both_ways_and_loops_as_often_as_each_lane_asks() -> None:
    a = np.random.default_rng(1).integers(0, 9, 64).astype(np.uint32)
    text = """
        mov.b32 %r20, 0; mov.b32 %r5, %r0; setp.eq.u32 %p1, %r5, 0; @%p1 bra DONE;
    LOOP: add.u32 %r20, %r20, %r5; sub.u32 %r5, %r5, 1; setp.ne.u32 %p2, %r5, 0; @%p2 bra LOOP;
        and.b32 %r6, %r0, 1; setp.ne.u32 %p3, %r6, 0; @%p3 bra ODD;
        add.u32 %r20, %r20, 100; bra.uni DONE;
    ODD: add.u32 %r20, %r20, 1000;
    DONE:
    """
    check(text, [a], 32, lambda n: 0 if n == 0 else n * (n + 1) // 2 + (1000 if n & 1 else 100))


@pytest.mark.parametrize("rounds", [((0, 1, 2, 3), (1,), (1, 2), (2,)), ((0, 1, 2, 3), (1, 2), (1,), (2, 3))], ids=str)
def test_parts_of_a_gang_skip_a_block_with_registers_of_their_own(rounds: tuple[tuple[int, ...], ...]) -> None:
    """In each round the even lanes of these warps, and all of the last one, add their warp's number, an int in a part of one warp."""
    threads, text = 128, f"""  // {rounds}
        shr.u32 %r6, %t0, 5; mov.b32 %r20, 0; mov.b32 %r5, 0;
    LOOP: shr.u32 %r7, %r0, %r5; and.b32 %r7, %r7, 1; setp.eq.u32 %p1, %r7, 0; @%p1 bra SKIP;
        max.s32 %r8, %r6, -1; add.u32 %r20, %r20, %r8;
    SKIP: add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, {len(rounds)}; @%p2 bra LOOP;
    """
    lane = np.arange(threads, dtype=np.uint32)
    adds = np.array([np.isin(lane // 32, warps) & (lane % 2 == 0) | (lane // 32 == 3) for warps in rounds], np.uint32)
    codes = (adds << np.arange(len(rounds), dtype=np.uint32)[:, None]).sum(axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(lanes(text, [codes], [32], threads=threads)[0], adds.sum(axis=0) * (lane // 32))


def test_lanes_that_return_early_leave_the_others_running() -> None:
    a = np.arange(64, dtype=np.uint32)
    text = """
        mov.b32 %r20, 5; st.global.b32 [%x4], %r20; setp.lt.u32 %p1, %r0, 40; @%p1 ret; mov.b32 %r20, 9;
    """
    got = lanes(text, [a], [32])[0]
    np.testing.assert_array_equal(got, np.where(a < 40, 5, 9))
