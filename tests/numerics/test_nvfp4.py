"""Number formats and quantisation of contract section 2, with ml_dtypes as an independent oracle."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densemoe.runtime import nvfp4
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import scale_offset

E2M1 = ml_dtypes.float4_e2m1fn
E4M3 = ml_dtypes.float8_e4m3fn


def test_every_e2m1_code_has_the_value_of_ml_dtypes() -> None:
    oracle = np.arange(16, dtype=np.uint8).view(E2M1).astype(np.float64)
    np.testing.assert_array_equal(nvfp4.E2M1_VALUES, oracle)
    assert np.signbit(nvfp4.E2M1_VALUES[8]), "code 8 is negative zero"


def test_every_e4m3_byte_has_the_value_of_ml_dtypes() -> None:
    oracle = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    np.testing.assert_array_equal(nvfp4.E4M3_VALUES, oracle)
    assert np.signbit(nvfp4.E4M3_VALUES[0x80])
    assert np.isnan(nvfp4.E4M3_VALUES[[0x7F, 0xFF]]).all()


def test_every_value_encodes_to_its_own_code() -> None:
    np.testing.assert_array_equal(nvfp4.encode_e2m1(nvfp4.E2M1_VALUES), np.arange(16))
    finite = np.delete(np.arange(256), [0x7F, 0xFF])
    np.testing.assert_array_equal(nvfp4.encode_e4m3(nvfp4.E4M3_VALUES[finite]), finite)


def neighbourhoods(values: np.ndarray) -> np.ndarray:
    """Every midpoint of consecutive ``values``, the values, and the float32 just beside each."""
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))])


def test_e2m1_rounds_like_ml_dtypes_at_every_boundary_and_saturates() -> None:
    x = neighbourhoods(np.sort(np.unique(nvfp4.E2M1_VALUES)))
    np.testing.assert_array_equal(nvfp4.encode_e2m1(x), x.astype(E2M1).view(np.uint8))
    np.testing.assert_array_equal(nvfp4.encode_e2m1(np.array([6.0001, 1e30, np.inf, -7, -np.inf])), [7, 7, 7, 15, 15])


def test_e4m3_rounds_like_ml_dtypes_at_every_boundary_and_saturates() -> None:
    x = neighbourhoods(nvfp4.E4M3_VALUES[:127])
    x = np.concatenate([x, -x])
    x = x[np.abs(x) <= 448]  # beyond, ml_dtypes gives NaN where the contract saturates
    np.testing.assert_array_equal(nvfp4.encode_e4m3(x), x.astype(E4M3).view(np.uint8))
    np.testing.assert_array_equal(nvfp4.encode_e4m3([448.1, 464, 465, 1e30, np.inf, -1e9]), [0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0xFE])
    assert nvfp4.encode_e4m3([np.nan])[0] & 0x7F == 0x7F


def test_bf16_round_trip_of_every_pattern() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = nvfp4.bf16_values(bits)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(nvfp4.bf16_bits(values)[numbers], bits[numbers])
    assert np.isnan(nvfp4.bf16_values(nvfp4.bf16_bits(values)))[~numbers].all()


@given(st.lists(st.floats(width=32), min_size=1, max_size=64))
def test_bf16_rounds_float32_like_ml_dtypes(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(nvfp4.bf16_values(nvfp4.bf16_bits(x)), expected)


def nearest_bf16(value: float) -> float:
    """The bf16 nearest to a float64 by exact rational arithmetic, ties to the even pattern."""
    low = int(nvfp4.bf16_bits([abs(value)])[0]) - 2
    candidates = range(max(low, 0), low + 5)
    exact = {bits: Fraction(float(nvfp4.bf16_values(np.array([bits], np.uint16))[0])) for bits in candidates}
    best = min(candidates, key=lambda bits: (abs(exact[bits] - Fraction(abs(value))), bits % 2))
    return float(np.copysign(float(exact[best]), value))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("base", [1.0, 1 + 2.0**-7, 3.0, 2.0**-120])
@pytest.mark.parametrize("beyond_the_tie", [2.0**-40, -(2.0**-40), 0.0, 2.0**-25, -(2.0**-25)])
def test_bf16_of_float64_is_rounded_once(base: float, beyond_the_tie: float, sign: float) -> None:
    ulp = 2.0 ** (np.floor(np.log2(base)) - 7)
    value = sign * (base + ulp / 2 + ulp * beyond_the_tie)
    assert nvfp4.bf16_values(nvfp4.bf16_bits(np.array([value])))[0] == nearest_bf16(value)


def test_all_pairs_of_codes_pack_and_unpack() -> None:
    low, high = (x.reshape(-1) for x in np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8)))
    codes = np.stack([low, high], axis=1)
    packed = nvfp4.pack_codes(codes)
    np.testing.assert_array_equal(packed[:, 0], low + 16 * high)  # the low nibble is the even k
    np.testing.assert_array_equal(nvfp4.unpack_codes(packed), codes)
    assert len(np.unique(packed)) == 256


def quantise_group_slowly(x: np.ndarray, multiplier: np.float32) -> tuple[int, list[int]]:
    """Contract section 2 spelled out for one group of 16, a scalar operation at a time, with ml_dtypes rounding."""
    amax = np.float32(0)
    for value in x:
        amax = max(amax, abs(np.float32(value)))
    ratio = np.float32(np.float32(amax * np.float32(1 / 6)) * multiplier)
    byte = int(np.float32(min(ratio, np.float32(448))).astype(E4M3).view(np.uint8))
    if byte == 0:
        return 0, [0] * 16
    scale = np.array(byte, np.uint8).view(E4M3).astype(np.float32)
    factor = np.float32(multiplier * np.float32(np.float32(1) / scale))
    codes = []
    for value in x:
        scaled = np.float32(np.float32(value) * factor)
        codes.append(int(np.float32(np.clip(scaled, -6, 6)).astype(E2M1).view(np.uint8)))
    return byte, codes


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(-20, 20), st.sampled_from(["normal", "integers", "mixed"]))
def test_quantise_follows_the_order_of_float32_operations(seed: int, exponent: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-5, 5, (4, 64)).astype(np.float32) if kind == "integers" else rng.standard_normal((4, 64)).astype(np.float32)
    if kind == "mixed":  # groups whose scale rounds to zero or to a subnormal beside groups near saturation
        x *= np.float32(2.0) ** rng.integers(-20, 1, (4, 4)).repeat(16, axis=1).astype(np.float32)
    x *= np.float32(2.0**exponent)
    tensor = nvfp4.quantise(x)
    multiplier = np.float32(1) / tensor.global_scale
    codes = nvfp4.unpack_codes(tensor.codes)
    for row in range(4):
        for group in range(4):
            byte, expected = quantise_group_slowly(x[row, 16 * group : 16 * group + 16], multiplier)
            assert tensor.scales.reshape(-1)[scale_offset(row, group, 4)] == byte
            assert codes[row, 16 * group : 16 * group + 16].tolist() == expected


def test_global_scale_is_amax_over_2688_in_float32_and_1_for_zeros() -> None:
    x = np.zeros((2, 64), dtype=np.float32)
    assert nvfp4.quantise(x).global_scale == 1
    assert not nvfp4.quantise(x).codes.any()
    assert not nvfp4.quantise(x).scales.any()
    x[1, 3] = -5
    assert nvfp4.quantise(x).global_scale == np.float32(5) / np.float32(2688)


def test_a_group_of_zero_scale_has_zero_codes() -> None:
    x = np.zeros((1, 64), dtype=np.float32)
    x[0, 0], x[0, 16] = 1.0, 1e-7  # the second group's scale underflows e4m3
    tensor = nvfp4.quantise(x)
    assert tensor.scales.reshape(-1)[scale_offset(0, 1, 4)] == 0
    assert not nvfp4.unpack_codes(tensor.codes)[0, 16:32].any()


def test_a_given_global_scale_is_used_and_saturates() -> None:
    x = np.full((1, 64), 100.0, dtype=np.float32)
    tensor = nvfp4.quantise(x, global_scale=0.01)
    assert tensor.global_scale == np.float32(0.01)
    assert set(tensor.scales[:1].reshape(-1)[:4].tolist()) == {0x7E}
    assert (nvfp4.unpack_codes(tensor.codes) == 7).all()


def test_nan_and_inf_stay_in_their_group() -> None:
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    clean = nvfp4.quantise(x, global_scale=0.001)
    x[0, 17], x[1, 40] = np.nan, np.inf
    dirty = nvfp4.quantise(x, global_scale=0.001)
    differs = nvfp4.unpack_codes(clean.codes) != nvfp4.unpack_codes(dirty.codes)
    assert not differs[0, [*range(16), *range(32, 64)]].any()
    assert not differs[1, [*range(32), *range(48, 64)]].any()
    for row in range(2):
        for group in range(4):
            if (row, group) not in ((0, 1), (1, 2)):
                at = scale_offset(row, group, 4)
                assert clean.scales.reshape(-1)[at] == dirty.scales.reshape(-1)[at]


def test_dequantised_values_are_code_times_scale_times_global_scale() -> None:
    rng = np.random.default_rng(1)
    tensor = nvfp4.Nvfp4Tensor(
        rng.integers(0, 256, (130, 32), dtype=np.uint8), rng.integers(0, 127, (256, 4), dtype=np.uint8), np.float32(0.3)
    )
    exact = tensor.dequantise()
    for row, column in ((0, 0), (3, 17), (129, 63), (128, 5)):
        byte = int(tensor.codes[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        scale = tensor.scales.reshape(-1)[scale_offset(row, column // 16, 4)]
        assert exact[row, column] == nvfp4.E2M1_VALUES[code] * nvfp4.E4M3_VALUES[scale] * float(np.float32(0.3))
    np.testing.assert_array_equal(tensor.dequantise("f32"), exact.astype(np.float32))
    np.testing.assert_array_equal(tensor.dequantise("f32", slice(128, 130)), exact[128:].astype(np.float32))
    bf16 = nvfp4.bf16_values(tensor.dequantise("bf16")).astype(np.float64)
    assert (np.abs(bf16 - exact) <= np.abs(exact) * 2.0**-8).all()
    with pytest.raises(ProblemError, match="use f64, f32 or bf16"):
        tensor.dequantise("f16")


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_quantising_what_was_dequantised_gives_the_same_values(seed: int) -> None:
    """Each group whose largest code is 6 keeps its scale: then every value is representable and comes back."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (3, 64), dtype=np.uint8)
    codes[:, ::16] = 7
    scales = np.zeros((128, 4), dtype=np.uint8)
    for row in range(3):
        for group in range(4):
            scales.reshape(-1)[scale_offset(row, group, 4)] = rng.integers(1, 127)
    tensor = nvfp4.Nvfp4Tensor(nvfp4.pack_codes(codes), scales, np.float32(0.25))
    again = nvfp4.quantise(tensor.dequantise("f32"), global_scale=0.25)
    np.testing.assert_array_equal(again.scales, tensor.scales)
    np.testing.assert_array_equal(again.values(), tensor.values())


@pytest.mark.parametrize(
    ("x", "global_scale", "message"),
    [
        (np.zeros((2, 60), np.float32), None, "multiple of 64"),
        (np.zeros((2, 0), np.float32), None, "multiple of 64"),
        (np.zeros(64, np.float32), None, "two dimensions"),
        (np.full((1, 64), np.nan, np.float32), None, "finite"),
        (np.full((1, 64), np.inf, np.float32), None, "finite"),
        (np.full((1, 64), 1e-40, np.float32), None, "overflows"),
        (np.zeros((1, 64), np.float32), 0.0, "positive float32"),
        (np.zeros((1, 64), np.float32), -1.0, "positive float32"),
        (np.zeros((1, 64), np.float32), float("nan"), "positive float32"),
    ],
)
def test_what_cannot_be_quantised_is_refused(x: np.ndarray, global_scale: float | None, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        nvfp4.quantise(x, global_scale)


def test_rows_are_quantised_alike_whatever_their_number() -> None:
    x = np.random.default_rng(2).standard_normal((700, 512)).astype(np.float32)  # several blocks
    codes, scales = nvfp4.quantise_rows(x, np.float32(100))
    part_codes, part_scales = nvfp4.quantise_rows(x[333:340], np.float32(100))
    np.testing.assert_array_equal(codes[333:340], part_codes)
    np.testing.assert_array_equal(scales[333:340], part_scales)


OUTPUTS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "f32": np.float32}


@pytest.mark.parametrize("dtype", sorted(OUTPUTS))
def test_plain_outputs_are_converted_once_like_ml_dtypes(dtype: str) -> None:
    largest = {"e4m3": 448.0, "e5m2": 57344.0}.get(dtype)
    kind = OUTPUTS[dtype]
    if dtype in ("e4m3", "e5m2"):
        values = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
        x = neighbourhoods(np.sort(np.unique(values[np.isfinite(values)])))
    else:
        rng = np.random.default_rng(0)
        x = (rng.standard_normal(4000) * 2.0 ** rng.integers(-150, 120, 4000)).astype(np.float32)
    x = np.concatenate([x, np.array([0, 1e9, -1e9, np.inf, -np.inf], dtype=np.float32)])
    with np.errstate(over="ignore"):
        expected = (np.clip(x, -largest, largest) if largest else x).astype(kind)
    converted = nvfp4.convert(x, dtype)
    np.testing.assert_array_equal(nvfp4.widen(converted, dtype), expected.astype(np.float64))
    np.testing.assert_array_equal(nvfp4.widen(expected, dtype), expected.astype(np.float64))
    assert np.isnan(nvfp4.widen(nvfp4.convert(np.array([np.nan], np.float32), dtype), dtype)).all()


def test_conversions_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ProblemError, match="use f32, f16"):
        nvfp4.convert(np.zeros(1, np.float32), "nvfp4")
    with pytest.raises(ProblemError, match="f16 as uint16"):
        nvfp4.widen(np.zeros(1, np.uint16), "f16")
    with pytest.raises(ProblemError, match="bf16 as uint8"):
        nvfp4.widen(np.zeros(1, np.uint8), "bf16")
