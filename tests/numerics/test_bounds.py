"""The bounds of contract section 9: outputs just inside pass, errors planted just outside fail."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densemoe.runtime import bounds, data, marks, reference
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, bf16_bits, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem

PLAIN = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 of values converted by ml_dtypes or numpy; fp8 saturates."""
    _, _, largest, saturating = bounds._FORMATS[dtype]
    with np.errstate(over="ignore"):
        clipped = np.clip(values, -largest, largest) if saturating else values
        return clipped.astype(np.float32).astype(PLAIN[dtype]).astype(np.float64)


# ---- half an ulp and plain outputs


@pytest.mark.parametrize("dtype", sorted(PLAIN))
def test_half_ulp_is_half_the_distance_to_the_next_value(dtype: str) -> None:
    bits, least, largest, _ = bounds._FORMATS[dtype]
    for exponent in range(least - 3, min(int(np.log2(largest)), least + 60)):
        for fraction in (1.0, 1.5, 1.999):
            x = 2.0**exponent * fraction
            ulp = 2.0 ** (max(exponent, least) - bits + 1)
            assert bounds.half_ulp(np.array([x]), dtype)[0] == ulp / 2
    assert bounds.half_ulp(np.array([0.0]), dtype)[0] == 2.0 ** (least - bits)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ProblemError, match="use one of bf16"):
        bounds.half_ulp(np.ones(1), "f64")


@pytest.mark.parametrize("dtype", sorted(PLAIN))
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_values_within_the_bound_converted_once_pass(dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal((8, 32)) * 2.0 ** rng.integers(-30, 20, (8, 32))
    bound = np.abs(exact) * 2.0 ** rng.integers(-20, -6, (8, 32))
    actual = rounded(exact + bound * rng.uniform(-1, 1, exact.shape) * 0.999, dtype)
    report = bounds.compare_plain(actual, exact, bound, dtype)
    assert report.passed, report.text
    assert report.worst <= 1


@pytest.mark.parametrize(("factor", "passes"), [(0.999, True), (1.001, False)])
@pytest.mark.parametrize("dtype", sorted(PLAIN))
def test_an_error_planted_around_the_limit_decides(dtype: str, factor: float, passes: bool) -> None:
    exact = np.full((4, 16), 1.3)
    bound = np.full((4, 16), 1e-3)
    limit = 1e-3 + float(bounds.half_ulp(np.array([1.301]), dtype)[0])
    actual = exact.copy()
    actual[2, 5] = 1.3 - factor * limit
    report = bounds.compare_plain(actual, exact, bound, dtype)
    assert report.passed is passes
    assert report.worst == pytest.approx(factor)
    assert report.mismatches == (not passes)
    assert report.detail.startswith(f"[2, 5]: got {float(actual[2, 5])!r}")
    assert ("FAIL" in report.text) is not passes


def test_nan_where_a_number_is_due_fails() -> None:
    actual = np.array([[1.0, np.nan]])
    report = bounds.compare_plain(actual, np.ones((1, 2)), np.ones((1, 2)), "f32")
    assert report.mismatches == 1
    assert report.worst == np.inf


def test_nan_and_inf_of_the_reference_are_left_open_and_counted() -> None:
    exact = np.array([[1.0, np.nan, np.inf]])
    report = bounds.compare_plain(np.array([[1.0, 5.0, -3.0]]), exact, np.array([[0.0, np.nan, np.inf]]), "bf16")
    assert report.passed
    assert (report.elements, report.unspecified) == (1, 2)


def test_an_exact_zero_allows_nothing_but_zero_of_a_plain_output_beyond_half_the_least_value() -> None:
    zero = np.zeros((1, 1))
    assert bounds.compare_plain(zero, zero, zero, "f32").passed
    assert not bounds.compare_plain(np.array([[1e-30]]), zero, zero, "f32").passed


@pytest.mark.parametrize(
    ("dtype", "value", "actual", "passes"),
    [
        ("f16", 65519.0, 65504.0, True),
        ("f16", 65519.9, np.inf, True),  # within the bound of the rounding boundary 65520
        ("f16", 65505.0, np.inf, False),
        ("f16", 1e6, np.inf, True),
        ("f16", 1e6, -np.inf, False),
        ("f16", 1e6, 65504.0, False),
        ("f16", -1e6, -np.inf, True),
        ("bf16", 1e39, np.inf, True),
        ("e4m3", 1e6, 448.0, True),
        ("e4m3", 1e6, np.nan, False),
        ("e4m3", -1e6, -448.0, True),
        ("e4m3", 1e6, 416.0, False),
        ("e5m2", 1e6, 57344.0, True),
        ("e5m2", 1e6, np.inf, False),
    ],
)
def test_overflow_gives_inf_and_fp8_saturates(dtype: str, value: float, actual: float, passes: bool) -> None:
    report = bounds.compare_plain(np.array([[actual]]), np.array([[value]]), np.array([[1.0]]), dtype)
    assert report.passed is passes, report.text


# ---- rule 2


def test_the_accumulator_bound_is_that_of_the_contract() -> None:
    one = np.ones(1)
    assert bounds.accumulator_bound(64, one, 1.0)[0] == 2.0**-14  # the floor
    n = 16384 / 16 * (1 + 3.0) + 16384 / 128
    assert bounds.accumulator_bound(16384, one, 3.0)[0] == n * 2.0**-23
    assert bounds.accumulator_bound(16384, one)[0] == (1024 * (1 + bounds.TRUNCATION) + 128) * 2.0**-23


def test_the_truncation_constant_follows_from_the_bits_kept() -> None:
    assert bounds.truncation_constant(0) == 17
    assert bounds.truncation_constant(2) == bounds.TRUNCATION == 4.25
    assert bounds.truncation_constant(3, addends=9) == 9 / 8


def tensor_core_sum(products: np.ndarray, kept_bits: int) -> float:
    """A chain of MMA steps as the bound assumes them: 16 products and the accumulator cut off below the largest, then one cut to float32."""
    total = 0.0
    for step in products.reshape(-1, 16):
        addends = np.append(step, total)
        quantum = 2.0 ** (np.frexp(np.abs(addends).max())[1] - 1 - 23 - kept_bits)
        total = float((np.trunc(addends / quantum) * quantum).sum())
        place = 2.0 ** (np.frexp(total)[1] - 24)
        total = float(np.trunc(total / place) * place)
    return total


@pytest.mark.parametrize("kept_bits", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["first largest", "positive", "mixed"])
def test_a_chain_of_truncating_mma_steps_stays_inside_its_bound(kept_bits: int, kind: str) -> None:
    """Chains so long that the floor of 2**-14 does not hide the term in n; the worst data are one large product before many small ones."""
    rng = np.random.default_rng(kept_bits)
    k = 16 * 2048
    products = rng.uniform(0.5, 1, k)
    if kind == "first largest":
        products = np.full(k, 2.0 ** -(23 + kept_bits) * 0.999)  # each is cut off entirely
        products[0] = 1.0
    elif kind == "mixed":
        products *= rng.choice([-1.0, 1.0], k)
    error = abs(tensor_core_sum(products, kept_bits) - float(np.sum(products)))
    magnitude = np.array([np.abs(products).sum()])
    n_term = (k / 16 * (1 + bounds.truncation_constant(kept_bits)) + k / 128) * 2.0**-23 * magnitude[0]
    assert bounds.accumulator_bound(k, magnitude, bounds.truncation_constant(kept_bits))[0] == pytest.approx(n_term)
    assert 0 < error < n_term
    if kind == "first largest":
        assert error > 0.1 * n_term, "the bound is not far from what can happen"


def fc2_result(alpha: np.ndarray, experts: int = 4, intermediate: int = 256) -> reference.Fc2Result:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((len(alpha) if alpha.ndim == 2 else 2, experts * intermediate))
    w = rng.standard_normal((experts, 3, intermediate))
    return reference.fc2(a, lambda e: w[e], alpha, experts, intermediate)


def test_the_fc2_bound_counts_the_active_experts_of_each_token() -> None:
    result = fc2_result(np.array([[1.0, 1, 1, 1], [1, 0, 0, 0]]))
    share = bounds.fc2_bound(result, 4, 256, 1.0) / result.magnitude / 2.0**-23
    np.testing.assert_allclose(share[0], 16 * 2 + 4 * 2 + 4 + 1)  # MMA steps of one expert, K 128 partial sums, experts, conversion
    np.testing.assert_allclose(share[1], 16 * 2 + 1 * 2 + 1 + 1)


def test_a_scalar_alpha_lets_one_accumulator_run_through_all_experts() -> None:
    result = fc2_result(np.array([0.5]))
    share = bounds.fc2_bound(result, 4, 256, 1.0) / result.magnitude / 2.0**-23
    np.testing.assert_allclose(share, 4 * 16 * 2 + 4 * 2 + 4 + 1)


def fc1_case(seed: int = 0, m: int = 9, post: bool = True) -> tuple[Problem, reference.Fc1Result, np.ndarray]:
    """A problem, its reference and y as a float32 kernel with its own order of additions gives it."""
    rng = np.random.default_rng(seed)
    problem = Problem("fc1", m, 2, 192, 64, "nvfp4", "nvfp4", alpha_post=post)
    weights = data.fc1_weights(rng, 2, 192, 64, "normal")
    codes, scales, a_scale = data.activations(rng, m, 192, "nvfp4", "normal")
    a = reference.activation_values(codes, scales)
    values = reference.Weights("fc1", weights.codes, weights.scales, 2)
    alpha = data.fc1_alpha(weights, a_scale)
    scale = data.alpha_post(rng, m, 2, zeros=0.2) if post else None
    result = reference.fc1(a, values, alpha.astype(np.float64), range(2), None if scale is None else scale.astype(np.float64))
    parts = []
    for expert in range(2):
        up_weights, gate_weights = values(expert)
        up, gate = ((a.astype(np.float32) @ w.astype(np.float32).T) * alpha[expert] for w in (up_weights, gate_weights))
        y = up * (gate * (np.float32(1) / (np.float32(1) + np.exp2(gate * np.float32(-1.4426950408889634)))))
        parts.append(y if scale is None else np.where(scale[:, expert : expert + 1] == 0, np.float32(0), y * scale[:, expert : expert + 1]))
    return problem, result, np.concatenate(parts, axis=1)


def test_a_float32_computation_lies_well_inside_the_fc1_bound() -> None:
    problem, result, y = fc1_case()
    report = bounds.compare_plain(y.astype(np.float64), result.y, bounds.fc1_bound(result, problem.hidden), "f32")
    assert report.passed, report.text
    assert report.worst < 0.05


def test_the_fc1_bound_carries_the_accumulators_bounds_to_first_order() -> None:
    """Against numerical derivatives of up · silu(gate) · post."""
    _, result, _ = fc1_case()
    up, gate, step = result.up, result.gate, 1e-6

    def y(u: np.ndarray, g: np.ndarray) -> np.ndarray:
        return u * g / (1 + np.exp(-g)) * result.post

    by_up = np.abs(y(up + step, gate) - y(up - step, gate)) / (2 * step)
    by_gate = np.abs(y(up, gate + step) - y(up, gate - step)) / (2 * step)
    unit = 2.0**-14
    carried = by_up * result.up_magnitude * unit + by_gate * result.gate_magnitude * unit
    own = np.abs(y(up, gate)) * (2.0**-20 + np.abs(gate) * 2.0**-22) + np.abs(up * gate * result.post) * 2.0**-126
    np.testing.assert_allclose(bounds.fc1_bound(result, 192), carried + own, rtol=1e-5, atol=1e-14)
    assert (bounds.fc1_bound(result, 192)[result.post == 0] == 0).all(), "where alpha_post is exactly 0 the output is exactly 0"


# ---- rule 3


def nvfp4_case(seed: int = 0) -> tuple[reference.Fc1Result, np.ndarray, np.ndarray, np.ndarray, np.float32]:
    problem, result, y = fc1_case(seed, m=40)
    bound = bounds.fc1_bound(result, problem.hidden)
    multiplier = np.float32(2688 / np.abs(y).max())
    codes, scales = quantise_rows(y, multiplier)
    return result, bound, codes, scales, multiplier


def test_nvfp4_of_a_float32_computation_passes_and_counts_its_exemptions() -> None:
    for seed in range(4):
        result, bound, codes, scales, multiplier = nvfp4_case(seed)
        report = bounds.compare_nvfp4(codes, scales, result.y, bound, float(multiplier))
        assert report.passed, report.text
        _, ideal_scales = quantise_rows(result.y.astype(np.float32), multiplier)
        assert report.exemptions == (scales != ideal_scales).sum()
        assert report.elements == scales.size
        assert report.parts[0].elements == codes.size
        assert report.nbytes + report.parts[0].nbytes == scales.size + codes.size / 2


def one_group(values: np.ndarray) -> np.ndarray:
    """[1, 16] with a largest value of 6, so that at multiplier 1 the scale byte is 0x38 (1.0)."""
    row = np.zeros((1, 16))
    row[0, 0] = 6.0
    row[0, 1 : 1 + len(values)] = values
    return row


@pytest.mark.parametrize(("distance", "passes", "exempt"), [(0.5, True, 1), (0.99, True, 1), (1.01, False, 0), (3.0, False, 0)])
def test_a_code_may_differ_only_where_the_bound_reaches_the_boundary(distance: float, passes: bool, exempt: int) -> None:
    """The boundary between codes 0.5 and 1 is 0.75: an exact value ``distance`` bounds below it may be stored as 1 while distance < 1."""
    bound = 1e-3
    exact = one_group(np.array([0.75 - distance * bound]))
    codes, scales = quantise_rows(exact.astype(np.float32), np.float32(1))
    assert scales[0, 0] == 0x38
    assert codes[0, 1] == 1
    codes[0, 1] = 2
    report = bounds.compare_nvfp4(codes, scales, exact, np.full((1, 16), bound), 1.0)
    part = report.parts[0]
    assert part.worst == pytest.approx(distance, rel=2e-3)  # the conversion's own arithmetic widens the bound a little
    assert (part.mismatches == 0) is passes
    assert part.exemptions == exempt
    assert report.passed is passes
    assert "code [0, 1]" in part.detail


def test_a_code_on_an_exact_tie_may_fall_either_way() -> None:
    exact, zero = one_group(np.array([0.75, -2.5, 0.25])), np.zeros((1, 16))
    codes, scales = quantise_rows(exact.astype(np.float32), np.float32(1))
    assert codes[0, 1:4].tolist() == [2, 12, 0]  # ties to even
    assert bounds.compare_nvfp4(codes, scales, exact, zero, 1.0).parts[0].exemptions == 0
    for column, other in ((1, 1), (2, 13), (3, 1)):
        flipped = codes.copy()
        flipped[0, column] = other
        part = bounds.compare_nvfp4(flipped, scales, exact, zero, 1.0).parts[0]
        assert (part.mismatches, part.exemptions) == (0, 1)


@pytest.mark.parametrize("column", [1, 2])
@pytest.mark.parametrize("wrong", range(16))
def test_a_code_far_from_its_value_fails(column: int, wrong: int) -> None:
    exact = one_group(np.array([1.9, -3.2]))
    codes, scales = quantise_rows(exact.astype(np.float32), np.float32(1))
    right = codes[0, column]
    codes[0, column] = wrong
    assert (bounds.compare_nvfp4(codes, scales, exact, np.full((1, 16), 1e-3), 1.0).parts[0].mismatches == 0) == (wrong == right)


@pytest.mark.parametrize(("distance", "passes", "exempt"), [(0.5, True, 1), (0.98, True, 1), (1.02, False, 0)])
@pytest.mark.parametrize("side", [1, -1])
def test_a_scale_byte_may_differ_only_where_the_bound_reaches_the_boundary(distance: float, passes: bool, exempt: int, side: int) -> None:
    """Between bytes 0x38 (1.0) and 0x39 (1.125) lies 1.0625: amax/6 there is a tie."""
    bound = 1e-3
    exact = one_group(np.zeros(0))
    exact[0, 0] = 6 * 1.0625 - side * distance * bound
    codes, scales = quantise_rows(exact.astype(np.float32), np.float32(1))
    assert scales[0, 0] == (0x38 if side > 0 else 0x39)
    other = np.array([[0x39 if side > 0 else 0x38]], dtype=np.uint8)
    codes[0, 0] = 7
    report = bounds.compare_nvfp4(codes, other, exact, np.full((1, 16), bound), 1.0)
    assert report.worst == pytest.approx(distance, rel=5e-3)
    assert (report.mismatches == 0) is passes
    assert report.exemptions == exempt
    assert "scale [0, 0]" in report.detail


def test_codes_are_judged_against_the_scale_byte_actually_stored() -> None:
    exact = one_group(np.array([1.0, 3.0, -4.4]))
    stored = np.array([[0x39]], dtype=np.uint8)  # 1.125 instead of 1.0: a fault of the scale, not of the codes
    codes = np.zeros((1, 16), dtype=np.uint8)
    scaled = exact[0] / E4M3_VALUES[0x39]
    for column in range(16):
        magnitude = int(np.argmin(np.abs(E2M1_VALUES[:8] - abs(scaled[column]))))
        codes[0, column] = magnitude + (8 if scaled[column] < 0 else 0)
    report = bounds.compare_nvfp4(codes, stored, exact, np.zeros((1, 16)), 1.0)
    assert report.mismatches == 1
    assert report.parts[0].mismatches == 0
    assert not report.passed


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xB8, 0xFF])
def test_a_nan_or_negative_scale_byte_fails(byte: int) -> None:
    exact = one_group(np.zeros(0))
    codes, scales = quantise_rows(exact.astype(np.float32), np.float32(1))
    scales[0, 0] = byte
    assert bounds.compare_nvfp4(codes, scales, exact, np.full((1, 16), 1e-3), 1.0).mismatches == 1


def test_under_a_scale_of_zero_the_codes_are_zero() -> None:
    exact, bound = np.full((1, 16), 1e-9), np.zeros((1, 16))
    codes, scales = quantise_rows(exact.astype(np.float32), np.float32(1))
    assert scales[0, 0] == 0
    assert bounds.compare_nvfp4(codes, scales, exact, bound, 1.0).passed
    codes[0, 3] = 8  # minus zero is a code that is not 0
    assert not bounds.compare_nvfp4(codes, scales, exact, bound, 1.0).passed


def test_a_group_with_nan_is_left_open_and_its_neighbours_are_not() -> None:
    exact = np.concatenate([one_group(np.array([np.nan])), one_group(np.array([1.9]))], axis=1)
    codes, scales = quantise_rows(np.nan_to_num(exact).astype(np.float32), np.float32(1))
    codes[0, :16], scales[0, 0] = 5, 0x7F
    report = bounds.compare_nvfp4(codes, scales, exact, np.zeros((1, 32)), 1.0)
    assert report.passed
    assert (report.unspecified, report.parts[0].unspecified) == (1, 16)
    codes[0, 17] = 7
    assert not bounds.compare_nvfp4(codes, scales, exact, np.zeros((1, 32)), 1.0).passed


def test_the_exemption_may_be_used_for_50_in_10000_bytes() -> None:
    few = bounds.Report(1000, exemptions=5, nbytes=1000.0)
    many = bounds.Report(1000, exemptions=6, nbytes=1000.0)
    assert few.passed
    assert not many.passed
    assert bounds.Report(10, exemptions=1, nbytes=10.0).passed, "one use in a tiny output"
    assert not bounds.Report(10, exemptions=2, nbytes=10.0).passed
    assert not bounds.combine([bounds.Report(10, exemptions=1, nbytes=10.0)] * 20).passed, "but not in every tiny output"
    assert bounds.combine([few, few]).passed
    assert bounds.Report(1000, exemptions=3, nbytes=1000.0, parts=[bounds.Report(1000, exemptions=3, nbytes=500.0)]).passed
    assert not bounds.Report(1000, exemptions=4, nbytes=1000.0, parts=[bounds.Report(1000, exemptions=4, nbytes=500.0)]).passed


def test_combining_keeps_the_worst() -> None:
    reports = [bounds.Report(4, 0.5, 0, 0, "half"), bounds.Report(6, 2.0, 1, 0, "twice"), bounds.Report(1, unspecified=3)]
    together = bounds.combine(reports, "all")
    assert (together.elements, together.worst, together.mismatches, together.detail, together.unspecified) == (11, 2.0, 1, "twice", 3)
    assert not together.passed
    assert bounds.combine([], "nothing").elements == 0
    assert "outside" in together.text


# ---- whole outputs by role


@pytest.mark.parametrize("dtype", ["nvfp4", *sorted(PLAIN)])
@pytest.mark.parametrize("sampled", [False, True])
def test_compare_fc1_takes_outputs_as_they_lie_in_memory(dtype: str, sampled: bool) -> None:
    problem, result, y = fc1_case(m=130)
    problem = Problem("fc1", 130, 2, 192, 64, "nvfp4", dtype, alpha_post=True)
    multiplier = float(np.float32(2688 / np.abs(y).max()))
    rows, columns = ([0, 127, 129], np.concatenate([np.arange(16, 32), np.arange(112, 128)])) if sampled else (None, None)
    if sampled:
        part = np.ix_(rows, columns)
        fields = ("y", "up", "gate", "up_magnitude", "gate_magnitude", "post")
        result = reference.Fc1Result(*(getattr(result, name)[part] for name in fields))
    if dtype == "nvfp4":
        codes, scales = quantise_rows(y, np.float32(multiplier))
        actual = {"c.codes": pack_codes(codes), "c.scales": tile_scales(scales)}
    else:
        converted = np.clip(y, -bounds._FORMATS[dtype][2], bounds._FORMATS[dtype][2]).astype(PLAIN[dtype])
        actual = {"c": converted.view(np.uint16) if dtype == "bf16" else converted.view(np.uint8) if dtype[0] == "e" else converted}
    arguments = {"output_multiplier": multiplier, "rows": rows, "columns": columns}
    report = bounds.compare_fc1(actual, result, problem, **arguments)
    assert report.passed, report.text
    assert dtype == "nvfp4" or report.worst > 0
    assert report.name.startswith(f"fc1 {dtype}")
    first = next(iter(actual))
    actual[first].view(np.uint8).reshape(130, -1)[129, -1 if dtype == "nvfp4" else slice(-64, None)] ^= 0x44
    assert not bounds.compare_fc1(actual, result, problem, **arguments).passed


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_compare_fc2_takes_outputs_as_they_lie_in_memory(dtype: str) -> None:
    problem = Problem("fc2", 2, 4, 64, 256, "nvfp4", dtype)
    result = fc2_result(np.array([[1.0, 1, 1, 1], [1, 0, 0, 0]]))
    c = result.c.astype(PLAIN[dtype])
    actual = {"c": c.view(np.uint16) if dtype == "bf16" else c}
    assert bounds.compare_fc2(actual, result, problem).passed
    assert bounds.compare_fc2({"c": np.tile(actual["c"], (1, 2))}, result, problem, columns=[3, 4, 5]).passed
    c[1, 2] = c[1, 2] * 1.01
    report = bounds.compare_fc2(actual, result, problem)
    assert (report.mismatches, report.detail[:6]) == (1, "[1, 2]")


def test_missing_pieces_of_a_comparison_are_named() -> None:
    problem, result, y = fc1_case()
    codes, scales = quantise_rows(y, np.float32(1))
    actual = {"c.codes": pack_codes(codes), "c.scales": tile_scales(scales)}
    with pytest.raises(ProblemError, match="output_multiplier is missing"):
        bounds.compare_fc1(actual, result, problem)
    with pytest.raises(ProblemError, match="cut a group"):
        bounds.compare_fc1(actual, result, problem, output_multiplier=1.0, columns=np.arange(8, 24))
    with pytest.raises(ProblemError, match="at least 32"):
        bounds.compare_fc1({"c": y}, result, Problem("fc1", 9, 2, 192, 64, "nvfp4", "f32"), exact=True)


# ---- rule 1


@pytest.mark.parametrize("a_dtype", ["nvfp4", "bf16"])
@pytest.mark.parametrize("c_dtype", ["f32", "bf16", "f16", "e4m3", "e5m2", "nvfp4"])
def test_exact_fc1_data_gives_the_same_bits_in_any_order_of_additions(a_dtype: str, c_dtype: str) -> None:
    rng = np.random.default_rng(11)
    m, experts, hidden, intermediate = 5, 2, 320, 64
    weights = data.fc1_weights(rng, experts, hidden, intermediate, "exact")
    first, scales, a_scale = data.activations(rng, m, hidden, a_dtype, "exact")
    a = (first.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if a_dtype == "bf16" else reference.activation_values(first, scales)
    post = data.alpha_post(rng, m, experts, "exact", zeros=0.3)
    alpha = data.fc1_alpha(weights, a_scale)
    values = reference.Weights("fc1", weights.codes, weights.scales, experts)
    result = reference.fc1(a, values, alpha.astype(np.float64), range(experts), post.astype(np.float64))
    order = rng.permutation(hidden)
    parts = []
    for expert in range(experts):
        sums = []
        for w in values(expert):
            total = np.zeros((m, intermediate), dtype=np.float32)
            for k in order:  # one rounding after each addition: none may show
                total = total + a[:, k : k + 1].astype(np.float32) * w[:, k].astype(np.float32)
            sums.append(total * alpha[expert])
        up, gate = sums
        y = up * (gate * (np.float32(1) / (np.float32(1) + np.exp2(gate * np.float32(-1.4426950408889634)))))
        parts.append(np.where(post[:, expert : expert + 1] == 0, np.float32(0), y * post[:, expert : expert + 1]))
    y = np.concatenate(parts, axis=1)
    problem = Problem("fc1", m, experts, hidden, intermediate, a_dtype, c_dtype, alpha_post=True)
    multiplier = np.float32(2688 / np.abs(y).max())
    if c_dtype == "nvfp4":
        codes, byte = quantise_rows(y, multiplier)
        actual = {"c.codes": pack_codes(codes), "c.scales": tile_scales(byte)}
    elif c_dtype == "bf16":
        actual = {"c": bf16_bits(y)}
    else:
        with np.errstate(over="ignore"):
            saturated = np.clip(y, -bounds._FORMATS[c_dtype][2], bounds._FORMATS[c_dtype][2]) if c_dtype[0] == "e" else y
            actual = {"c": saturated.astype(PLAIN[c_dtype])}
    report = bounds.compare_fc1(actual, result, problem, output_multiplier=float(multiplier), exact=True)
    assert report.passed, report.text
    assert report.worst == 0
    if c_dtype in ("f32", "bf16"):
        actual["c"].view(np.uint16).reshape(m, -1)[3, 0] ^= 1  # the last place
        assert bounds.compare_fc1(actual, result, problem, exact=True).mismatches == 1


@pytest.mark.parametrize("c_dtype", ["f32", "bf16", "f16"])
def test_exact_fc2_data_gives_the_same_bits_in_any_order_of_additions(c_dtype: str) -> None:
    rng = np.random.default_rng(12)
    m, experts, hidden, intermediate = 5, 3, 64, 192
    weights = data.fc2_weights(rng, experts, hidden, intermediate, "exact")
    codes, scales, a_scale = data.activations(rng, m, experts * intermediate, "nvfp4", "exact")
    a = reference.activation_values(codes, scales)
    alpha = data.fc2_alpha(rng, m, weights, a_scale, kind="exact", zeros=0.2)
    values = reference.Weights("fc2", weights.codes, weights.scales, experts)
    result = reference.fc2(a, values, alpha.astype(np.float64), experts, intermediate)
    total = np.zeros((m, hidden), dtype=np.float32)
    for k in rng.permutation(experts * intermediate):
        e = k // intermediate
        product = a[:, k : k + 1].astype(np.float32) * values(e)[:, k % intermediate].astype(np.float32)
        total = total + product * alpha[:, e : e + 1]
    problem = Problem("fc2", m, experts, hidden, intermediate, "nvfp4", c_dtype)
    with np.errstate(over="ignore"):
        actual = {"c": bf16_bits(total) if c_dtype == "bf16" else total.astype(PLAIN[c_dtype])}
    report = bounds.compare_fc2(actual, result, problem, exact=True)
    assert report.passed, report.text
    assert report.worst == 0
    actual["c"].view(np.uint16).reshape(m, -1)[1, 0] ^= 1
    assert bounds.compare_fc2(actual, result, problem, exact=True).mismatches == 1


# ---- the reference implementation's marks


def test_the_fc1_mark_asks_for_95_percent_within_one() -> None:
    result, _, codes, scales, multiplier = nvfp4_case()
    assert all(each.passed for each in marks.fc1_mark(codes, scales, result.y, float(multiplier)))
    rng = np.random.default_rng(0)
    noisy = np.where(rng.random(codes.shape) < 0.10, rng.integers(0, 16, codes.shape), codes).astype(np.uint8)
    assert not marks.fc1_mark(noisy, scales, result.y, float(multiplier))[0].passed
    assert not marks.fc1_mark(codes, (scales + 2).astype(np.uint8), result.y, float(multiplier))[1].passed
    assert marks.fc1_mark(codes, (scales + 1).astype(np.uint8), result.y, float(multiplier))[1].passed


def test_minus_zero_and_zero_are_neighbours_of_the_same_codes() -> None:
    exact = one_group(np.array([0.0, 0.5, -0.5]))
    codes, scales = quantise_rows(exact.astype(np.float32), np.float32(1))
    codes[0, 1:4] = [8, 9, 1]  # -0, -0.5 for 0.5 (two places away), 0.5 for -0.5
    report = marks.fc1_mark(codes, scales, exact, 1.0)[0]
    assert report.detail == f"{14 / 16:.4%} within"


@pytest.mark.parametrize(("mark", "error", "share", "least"), [(marks.fc2_mark, 0.2, 0.90, 0.90), (marks.layer_mark, 0.2, 0.97, 0.97)])
def test_the_other_marks_count_what_is_close(mark: object, error: float, share: float, least: float) -> None:
    expected = np.ones((10, 100))
    for missing, passes in ((round(1000 * (1 - share)), True), (round(1000 * (1 - share)) + 1, False)):
        actual = expected.copy().reshape(-1)
        actual[:missing] += error
        report = mark(actual.reshape(10, 100), expected)  # type: ignore[operator]
        assert report.passed is passes
        assert report.worst == pytest.approx(missing / 1000 / (1 - least))
