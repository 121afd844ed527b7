"""Number formats and cvt: all codes, all boundaries, against ml_dtypes and exact rational arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densemoe.compile.emulator import formats
from densemoe.compile.emulator.conversions import make_converter
from densemoe.runtime.errors import EmulatorError

ORACLE = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "ue8m0": ml_dtypes.float8_e8m0fnu,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
}
SMALL = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
f32_bits = st.integers(0, 2**32 - 1)


def f32(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


@cache
def magnitudes(name: str) -> list[Fraction]:
    fmt = formats.FORMATS[name]
    return [Fraction(float(v)) for v in formats.decode(np.arange(fmt.largest + 1, dtype=fmt.container), name)]


def exact_code(value: Fraction, name: str, rounding: str) -> int:
    """Magnitude code of |value| by exact arithmetic over the list of all representable values (independent of the module's algorithm)."""
    fmt = formats.FORMATS[name]
    table = magnitudes(name)
    magnitude = abs(value)
    below = bisect_right(table, magnitude) - 1
    if below == fmt.largest:
        step = table[-1] - table[-2]
        half = table[-1] + step / 2
        if rounding == "rn" and magnitude >= half:
            return below + 1
        return below
    low, high = table[below], table[below + 1]
    if low == magnitude:
        return below
    up = {"rz": False, "rm": value < 0, "rp": value > 0}.get(rounding)
    if up is None:
        distance = magnitude - low - (high - magnitude)
        up = distance > 0 or (distance == 0 and below % 2 == 1)
    return below + up


@pytest.mark.parametrize("name", sorted(ORACLE))
def test_every_code_decodes_as_ml_dtypes_does(name: str) -> None:
    fmt = formats.FORMATS[name]
    codes = np.arange(1 << (fmt.exponent_bits + fmt.mantissa_bits + fmt.signed), dtype=fmt.container)
    expected = codes.view(ORACLE[name]).astype(np.float32)
    actual = formats.decode(codes, name)
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual)[numbers], np.signbit(expected)[numbers])


def test_an_unsigned_e4m3_scale_ignores_its_top_bit() -> None:
    codes = np.arange(128, dtype=np.uint8)
    np.testing.assert_array_equal(formats.decode(codes, "ue4m3"), formats.decode(codes, "e4m3"))
    np.testing.assert_array_equal(formats.decode(codes | np.uint8(128), "ue4m3"), formats.decode(codes, "e4m3"))


def test_e2m1_pairs_hold_the_even_element_in_the_low_nibble() -> None:
    assert formats.E2M1_PAIRS.shape == (256, 2)
    assert formats.E2M1_PAIRS[0x72].tolist() == [1.0, 6.0]
    assert formats.E2M1_PAIRS[0x9F].tolist() == [-6.0, -0.5]


@pytest.mark.parametrize("name", [n for n in sorted(formats.FORMATS) if n not in ("f32", "f64", "tf32")])
def test_every_finite_code_survives_decode_and_encode(name: str) -> None:
    fmt = formats.FORMATS[name]
    codes = np.arange(fmt.largest + 1, dtype=fmt.container)
    if fmt.signed:
        codes = np.concatenate([codes, codes | fmt.container(fmt.sign)])
    for rounding in ("rn", "rz", "rm", "rp", "rna"):
        np.testing.assert_array_equal(formats.encode(formats.decode(codes, name), name, rounding), codes)


def boundaries(name: str) -> np.ndarray:
    """All values of a format, their midpoints, and the float32 neighbours of both, with both signs."""
    fmt = formats.FORMATS[name]
    values = np.sort(formats.decode(np.arange(fmt.largest + 1, dtype=fmt.container), name)).astype(np.float64)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, [values[-1] * 1.01, values[-1] * 2, values[0] / 2]]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])
    return np.concatenate([points, -points, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45], np.float32)])


@pytest.mark.parametrize("name", SMALL)
def test_small_formats_round_as_ml_dtypes_does_at_every_boundary(name: str) -> None:
    fmt = formats.FORMATS[name]
    points = boundaries(name)
    largest = float(formats.decode(np.uint8(fmt.largest), name))
    expected = np.clip(points, -largest, largest).astype(ORACLE[name]).view(np.uint8)  # satfinite: ml_dtypes has overflow to Inf or NaN
    nan = np.isnan(points)
    expected[nan] = fmt.largest if fmt.nan is None else fmt.nan
    convert = make_converter(f"{name}x2", "f32", rounding="rn", satfinite=True)
    bits = points.view(np.uint32)
    width = 4 if name == "e2m1" else 8
    packed = convert(bits, bits[::-1])
    assert packed.dtype == (np.uint8 if name == "e2m1" else np.uint16)
    np.testing.assert_array_equal(packed >> width, expected)
    np.testing.assert_array_equal(packed & ((1 << width) - 1), expected[::-1])
    np.testing.assert_array_equal(formats.encode(points, name, satfinite=True), expected)


@pytest.mark.parametrize("name", SMALL)
def test_relu_gives_positive_zero_for_negative_values_and_keeps_nan(name: str) -> None:
    fmt = formats.FORMATS[name]
    points = boundaries(name)
    convert = make_converter(f"{name}x2", "f32", rounding="rn", satfinite=True, relu=True)
    plain = formats.encode(points, name, satfinite=True)
    expected = np.where(np.signbit(points) & ~np.isnan(points), 0, plain)
    width = 4 if name == "e2m1" else 8
    np.testing.assert_array_equal(convert(points.view(np.uint32), np.zeros(points.size, np.uint32)) >> width, expected)
    assert (expected[np.isnan(points)] == (fmt.largest if fmt.nan is None else fmt.nan)).all()


@pytest.mark.parametrize("source", ["f16", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_packed_half_sources_round_once(name: str, source: str) -> None:
    all_bits = np.arange(1 << 16, dtype=np.uint32)
    values = formats.decode(all_bits.astype(np.uint16), source)
    convert = make_converter(f"{name}x2", f"{source}x2", rounding="rn", satfinite=True)
    width = 4 if name == "e2m1" else 8
    packed = convert((all_bits << np.uint32(16)) | all_bits[::-1])
    expected = formats.encode(values, name, satfinite=True)
    np.testing.assert_array_equal(packed >> width, expected)
    np.testing.assert_array_equal(packed & ((1 << width) - 1), expected[::-1])


@pytest.mark.parametrize("name", SMALL)
def test_widening_a_pair_to_f16x2_is_exact(name: str) -> None:
    width = 4 if name == "e2m1" else 8
    codes = np.arange(1 << (2 * width), dtype=np.uint16)
    out = make_converter("f16x2", f"{name}x2", rounding="rn")(codes)
    assert out.dtype == np.uint32
    halves = np.ascontiguousarray(out).view(np.float16).reshape(-1, 2).astype(np.float32)
    mask = (1 << width) - 1
    np.testing.assert_array_equal(halves[:, 0], formats.decode(codes & mask, name))
    np.testing.assert_array_equal(halves[:, 1], formats.decode(codes >> width, name))


def test_widening_with_relu_drops_the_sign() -> None:
    out = make_converter("f16x2", "e2m1x2", rounding="rn", relu=True)(np.array([0x9F, 0x72], np.uint8))
    assert out.tolist() == [0, 0x4600_3C00]


def test_scale_exponents_follow_the_cuda_header() -> None:
    """ue8m0: exponent of |x|; .rp rounds up when the mantissa is not zero and |x| > 2^-127; satfinite keeps Inf at 2^127 (cuda_fp8.hpp)."""
    bits = np.array(
        [
            0,
            1,
            0x00400000,
            0x00400001,
            0x007FFFFF,
            0x00800000,
            0x3F800000,
            0x3F800001,
            0x7F000000,
            0x7F000001,
            0x7F7FFFFF,
            0x7F800000,
            0x7FC00000,
        ],
        np.uint32,
    )
    zeros = np.zeros_like(bits)

    def low(rounding: str, satfinite: bool, a: np.ndarray) -> list[int]:
        packed = make_converter("ue8m0x2", "f32", rounding=rounding, satfinite=satfinite)(zeros, a)
        assert (packed >> 8).tolist() == [0] * a.size
        return (packed & 255).tolist()

    truncated = [0, 0, 0, 0, 0, 1, 127, 127, 254, 254, 254, 254, 255]
    upward = [0, 0, 0, 1, 1, 1, 127, 128, 254, 254, 254, 254, 255]
    assert low("rz", True, bits) == truncated
    assert low("rp", True, bits) == upward
    assert low("rz", False, bits) == [*truncated[:-2], 255, 255]
    assert low("rp", False, bits) == [*upward[:-4], 255, 255, 255, 255]
    assert low("rp", True, bits | np.uint32(0x80000000)) == upward
    assert make_converter("bf16x2", "ue8m0x2", rounding="rn")(np.array([0x00FF, 0x7F80], np.uint16)).tolist() == [
        0x0040_7FFF,
        0x3F80_4000,
    ]


@pytest.mark.parametrize("source", ["f32", "bf16x2"])
def test_scale_exponents_bracket_the_value(source: str) -> None:
    values = np.geomspace(1e-37, 3e38, 4000).astype(ml_dtypes.bfloat16)
    bits = values.view(np.uint16).astype(np.uint32)
    down, up = (make_converter("ue8m0x2", source, rounding=r, satfinite=True) for r in ("rz", "rp"))
    operands = (bits << 16, bits << 16) if source == "f32" else ((bits << 16) | bits,)
    exact = values.astype(np.float64)
    for out, ok in ((down(*operands), np.less_equal), (up(*operands), np.greater_equal)):
        code = (out & 255).astype(np.uint8)
        np.testing.assert_array_equal(out >> 8, code)
        value = formats.decode(code, "ue8m0").astype(np.float64)
        keep = code < 254
        assert ok(value, exact)[keep].all()
        assert (np.maximum(value / exact, exact / value)[keep] < 2).all()


@pytest.mark.parametrize("name", ["f16", "bf16", "e4m3", "e5m2", "e2m1"])
@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
@given(bits=f32_bits)
def test_rounding_equals_exact_rational_arithmetic(name: str, rounding: str, bits: int) -> None:
    value = f32(bits)
    if not math.isfinite(value):
        return
    fmt = formats.FORMATS[name]
    code = exact_code(Fraction(value), name, rounding)
    if code > fmt.largest or abs(Fraction(value)) > Fraction(float(formats.decode(fmt.container(fmt.largest), name))):
        away = {"rn": code > fmt.largest, "rz": False, "rm": value < 0, "rp": value > 0}[rounding]
        code = fmt.infinity if away and fmt.infinity is not None else fmt.nan if away and fmt.nan is not None else fmt.largest
        if not away and fmt.infinity is None and fmt.nan is not None:
            return  # e4m3 without satfinite does not exist as an instruction
    expected = code | (fmt.sign if math.copysign(1, value) < 0 else 0)
    if code == fmt.nan:
        expected = fmt.nan
    assert int(formats.encode(np.float32(value), name, rounding)) == expected


@given(bits=st.integers(0, 2**64 - 1), rounding=st.sampled_from(["rn", "rz", "rm", "rp"]), name=st.sampled_from(["f16", "bf16", "f32"]))
def test_f64_sources_are_rounded_once(bits: int, rounding: str, name: str) -> None:
    value = float(np.uint64(bits).view(np.float64))
    if not math.isfinite(value) or abs(value) > 60000:
        value = math.ldexp(1 + (bits % 2**52) / 2**52, bits % 40 - 20)
    converted = make_converter(name, "f64", rounding=rounding)(np.float64(value).view(np.uint64))
    result = Fraction(float(formats.decode(converted, name)))
    below, above = (float(formats.decode(formats.encode(np.float64(value), name, r), name)) for r in ("rm", "rp"))
    exact = Fraction(value)
    assert Fraction(below) <= exact <= Fraction(above)
    if rounding == "rn":
        assert abs(result - exact) == min(exact - Fraction(below), Fraction(above) - exact)
    else:
        assert result == Fraction({"rm": below, "rp": above, "rz": below if value > 0 else above}[rounding])


def test_double_rounding_through_f32_would_be_seen() -> None:
    """1 + 2^-11 + 2^-40 rounds up in f16, yet f32 first drops the last bit and leaves a tie."""
    value = np.float64(1 + 2.0**-11 + 2.0**-40).view(np.uint64)
    assert int(make_converter("f16", "f64", rounding="rn")(value)) == 0x3C01
    assert int(formats.encode_integer(np.int64(2**53 + 2**29 + 1), "f32")) == int(np.float32(2**53 + 2**30).view(np.uint32))


@given(values=st.lists(f32_bits, min_size=1, max_size=20))
def test_fast_half_conversions_equal_the_general_ones(values: list[int]) -> None:
    bits = np.array(values, np.uint32)
    for name in ("f16", "bf16"):
        for rounding in ("rn", "rz"):
            for relu in (False, True):
                for satfinite in (False, True):
                    convert = make_converter(name, "f32", rounding=rounding, relu=relu, satfinite=satfinite)
                    expected = formats.encode(bits.view(np.float32), name, rounding, satfinite, relu)
                    np.testing.assert_array_equal(convert(bits), expected)
                    pair = make_converter(f"{name}x2", "f32", rounding=rounding, relu=relu, satfinite=satfinite)(bits, bits[::-1])
                    assert pair.dtype == np.uint32
                    np.testing.assert_array_equal(pair, expected.astype(np.uint32) << 16 | expected[::-1])


def test_all_halves_widen_exactly_and_nan_is_canonical() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for name, oracle in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        for wide, kind in (("f32", np.float32), ("f64", np.float64)):
            out = make_converter(wide, name)(bits)
            with np.errstate(invalid="ignore"):  # signalling NaN
                expected = bits.view(oracle).astype(kind)
            np.testing.assert_array_equal(out.view(kind), expected)
            nan = np.isnan(expected)
            np.testing.assert_array_equal(np.signbit(out.view(kind))[~nan], np.signbit(expected)[~nan])
            assert (out[nan] == formats.FORMATS[wide].nan).all()


@given(bits=f32_bits)
def test_tf32_roundings(bits: int) -> None:
    operand = np.uint32(bits)
    nearest_away, nearest_even, towards_zero = (int(make_converter("tf32", "f32", rounding=r)(operand)) for r in ("rna", "rn", "rz"))
    value = f32(bits)
    if math.isnan(value):
        assert nearest_away == nearest_even == towards_zero == 0x7FFFFFFF
        return
    assert nearest_away == (bits if math.isinf(value) else (bits + 0x1000) & 0xFFFFE000)
    assert towards_zero == bits & 0xFFFFE000
    assert nearest_even == (bits if math.isinf(value) else (bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000)
    if abs(value) > f32(0x7F7FE000):
        assert int(make_converter("tf32", "f32", rounding="rna", satfinite=True)(operand)) & 0x7FFFFFFF == 0x7F7FE000


@pytest.mark.parametrize(("rounding", "function"), [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)])
@pytest.mark.parametrize("integer", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@given(value=st.floats(width=32) | st.floats(-300, 300, width=32) | st.floats(-(2.0**65), 2.0**65, width=32))
def test_float_to_integer_rounds_and_clamps(rounding: str, function: Callable[[float], int], integer: str, value: float) -> None:
    width, signed = int(integer[1:]), integer[0] == "s"
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    if math.isnan(value):
        expected = 1 << 63 if width == 64 else 0
    elif math.isinf(value):
        expected = high if value > 0 else low
    else:
        expected = min(max(function(value), low), high)
    out = make_converter(integer, "f32", rounding=rounding)(np.float32(value).view(np.uint32))
    assert out.dtype.itemsize * 8 == width
    assert int(out) == expected % 2**width


def test_nan_from_f64_gives_the_indefinite_integer() -> None:
    nan = np.float64(np.nan).view(np.uint64)
    assert int(make_converter("s32", "f64", rounding="rzi")(nan)) == 0x80000000
    assert int(make_converter("u16", "f64", rounding="rzi")(nan)) == 0x8000
    assert int(make_converter("s32", "f32", rounding="rzi")(np.uint32(0x7FC00000))) == 0


@given(
    value=st.integers(-(2**63), 2**64 - 1),
    rounding=st.sampled_from(["rn", "rz", "rm", "rp"]),
    name=st.sampled_from(["f16", "bf16", "f32", "f64"]),
)
def test_integers_round_exactly(value: int, rounding: str, name: str) -> None:
    source = "s64" if value < 2**63 else "u64"
    bits = make_converter(name, source, rounding=rounding)(np.uint64(value % 2**64))
    result = float(formats.decode(bits, name))
    fmt = formats.FORMATS[name]
    largest = int(formats.decode(fmt.container(fmt.largest), name))
    if abs(value) > largest:
        half_ulp = 2 ** (largest.bit_length() - fmt.mantissa_bits - 2)
        away = {"rn": abs(value) >= largest + half_ulp, "rz": False, "rm": value < 0, "rp": value > 0}[rounding]
        assert result == math.copysign(math.inf if away else largest, value)
        return
    shift = max(abs(value).bit_length() - fmt.mantissa_bits - 1, 0)
    quotient, remainder = divmod(abs(value), 1 << shift)
    up = {"rz": False, "rm": value < 0, "rp": value > 0}.get(rounding)
    if up is None:
        up = 2 * remainder > 1 << shift or (2 * remainder == 1 << shift and quotient % 2 == 1)
    expected = (quotient + (up and remainder > 0)) << shift
    assert int(result) == (expected if value >= 0 else -expected)


@given(
    value=st.integers(0, 2**64 - 1),
    source=st.sampled_from(["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]),
    destination=st.sampled_from(["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]),
)
def test_integer_to_integer(value: int, source: str, destination: str) -> None:
    width = int(source[1:])
    number = value % 2**width
    if source[0] == "s" and number >= 2 ** (width - 1):
        number -= 2**width
    out_width, signed = int(destination[1:]), destination[0] == "s"
    low, high = (-(2 ** (out_width - 1)), 2 ** (out_width - 1) - 1) if signed else (0, 2**out_width - 1)
    register = np.array([value], np.uint64)
    assert int(make_converter(destination, source)(register)[0]) == number % 2**out_width
    assert int(make_converter(destination, source, saturate=True)(register)[0]) == min(max(number, low), high) % 2**out_width


def test_flush_saturate_and_integer_rounding_in_f32() -> None:
    bits = np.array([0x00000001, 0x807FFFFF, 0x3F000000, 0x40200000, 0xBFC00000, 0x7FC00000], np.uint32)
    assert make_converter("f32", "f32", ftz=True)(bits).tolist() == [0, 0x80000000, 0x3F000000, 0x40200000, 0xBFC00000, 0x7FFFFFFF]
    assert make_converter("f32", "f32", saturate=True)(bits).view(np.float32).tolist() == [f32(1), 0.0, 0.5, 1.0, 0.0, 0.0]
    rounded = make_converter("f32", "f32", rounding="rni")(bits)
    assert rounded[:5].view(np.float32).tolist() == [0.0, -0.0, 0.0, 2.0, -2.0]
    assert rounded[1] == 0x80000000
    flushed = make_converter("f32", "f64", rounding="rn", ftz=True)(np.float64(-1e-40).view(np.uint64))
    assert int(flushed) == 0x80000000


@pytest.mark.parametrize(
    ("destination", "source", "options"),
    [
        ("e4m3x2", "f32", {"rounding": "rn"}),
        ("e4m3x2", "f32", {"rounding": "rz", "satfinite": True}),
        ("ue8m0x2", "f32", {"rounding": "rn"}),
        ("f32", "f16", {"rounding": "rn"}),
        ("f16", "f32", {}),
        ("s32", "f32", {}),
        ("f32", "s32", {}),
        ("f16x2", "f32", {"rounding": "rs"}),
        ("f16", "f16", {"ftz": True}),
        ("e4m3x2", "e5m2x2", {"rounding": "rn", "satfinite": True}),
        ("f32", "e4m3", {}),
        ("f32", "f32", {"rounding": "rn"}),
        ("f16x2", "f32", {"rounding": "rn", "ftz": True}),
        ("tf32", "f32", {"rounding": "rna", "ftz": True}),
        ("bf16", "f32", {"rounding": "rn", "saturate": True}),
        ("bf16", "s32", {"rounding": "rn", "saturate": True}),
        ("f16", "f32", {"rounding": "rn", "relu": True, "ftz": True}),
    ],
)
def test_combinations_outside_the_isa_are_errors_that_name_the_instruction(
    destination: str, source: str, options: dict[str, object]
) -> None:
    with pytest.raises(EmulatorError, match=rf"cvt.*{destination}\.{source}"):
        make_converter(destination, source, **options)  # type: ignore[arg-type]


def test_uniform_operands_and_lanes_mix() -> None:
    convert = make_converter("bf16x2", "f32", rounding="rn")
    lanes = np.arange(32, dtype=np.float32).view(np.uint32)
    assert convert(lanes, 0x3F800000).tolist() == [(int(ml_dtypes.bfloat16(i).view(np.uint16)) << 16) | 0x3F80 for i in range(32)]
