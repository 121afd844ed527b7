"""The float64 reference against slow loops written from the contract's text (sections 3–5)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from densemoe.runtime import data, reference
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import scale_offset
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES


def element(codes: np.ndarray, scales: np.ndarray, row: int, k: int, scale_row: int, scale_column: int) -> float:
    """e2m1 · e4m3 of one element, by contract section 2's formulas."""
    byte = int(codes[row, k // 2])
    code = byte >> 4 if k % 2 else byte & 15
    return float(E2M1_VALUES[code] * E4M3_VALUES[scales.reshape(-1)[scale_offset(scale_row, scale_column, scales.shape[1])]])


def fc1_slowly(a: tuple, weights: data.Weights, alpha: np.ndarray, post: np.ndarray | None, m: int, hidden: int, intermediate: int) -> dict:
    experts = len(alpha)
    shape = (m, experts * intermediate)
    result = {name: np.zeros(shape) for name in ("y", "up", "gate", "up_magnitude", "gate_magnitude")}
    for token in range(m):
        for e in range(experts):
            for j in range(intermediate):
                for name, row in (("up", (j // 64) * 128 + j % 64), ("gate", (j // 64) * 128 + 64 + j % 64)):
                    products = [
                        element(a[0], a[1], token, k, token, k // 16)
                        * element(weights.codes[e], weights.scales, row, k, e * 2 * intermediate + row, k // 16)
                        for k in range(hidden)
                    ]
                    result[name][token, e * intermediate + j] = math.fsum(products) * float(alpha[e])
                    result[f"{name}_magnitude"][token, e * intermediate + j] = math.fsum(map(abs, products)) * abs(float(alpha[e]))
                u, g = (result[name][token, e * intermediate + j] for name in ("up", "gate"))
                y = u * (g / (1 + math.exp(-g)))
                if post is not None:
                    y = 0.0 if post[token, e] == 0 else y * float(post[token, e])
                result["y"][token, e * intermediate + j] = y
    return result


@pytest.mark.parametrize("with_post", [True, False])
def test_fc1_equals_the_slow_loop(with_post: bool) -> None:
    rng = np.random.default_rng(1)
    m, experts, hidden, intermediate = 2, 2, 64, 64
    weights = data.fc1_weights(rng, experts, hidden, intermediate, "raw")
    codes, scales, _ = data.activations(rng, m, hidden, "nvfp4", "integers")
    alpha = np.array([3e-6, -2e-6])
    post = np.array([[0.5, 0.0], [1.25, 2.0]]) if with_post else None
    slow = fc1_slowly((codes, scales), weights, alpha, post, m, hidden, intermediate)
    fast = reference.fc1(
        reference.activation_values(codes, scales), reference.Weights("fc1", weights.codes, weights.scales, experts), alpha, range(experts), post
    )
    for name, expected in slow.items():
        np.testing.assert_allclose(getattr(fast, name), expected, rtol=1e-10, atol=1e-13, err_msg=name)
    if with_post:
        assert (fast.y[0, intermediate:] == 0).all()


@pytest.mark.parametrize("scalar", [True, False])
def test_fc2_equals_the_slow_loop(scalar: bool) -> None:
    rng = np.random.default_rng(2)
    m, experts, hidden, intermediate = 2, 3, 64, 64
    weights = data.fc2_weights(rng, experts, hidden, intermediate, "raw")
    codes, scales, _ = data.activations(rng, m, experts * intermediate, "nvfp4", "normal")
    alpha = np.array([0.75]) if scalar else np.array([[1.0, 0.0, -2.0], [0.5, 0.25, 0.0]])
    expected, magnitude = np.zeros((2, m, hidden))
    for token in range(m):
        for n in range(hidden):
            for e in range(experts):
                scale = float(alpha[0] if scalar else alpha[token, e])
                if scale == 0:
                    continue
                products = [
                    element(codes, scales, token, k, token, k // 16) * element(weights.codes, weights.scales, n, k, n, k // 16)
                    for k in range(e * intermediate, (e + 1) * intermediate)
                ]
                expected[token, n] += scale * math.fsum(products)
                magnitude[token, n] += abs(scale) * math.fsum(map(abs, products))
    fast = reference.fc2(
        reference.activation_values(codes, scales), reference.Weights("fc2", weights.codes, weights.scales, experts), alpha, experts, intermediate
    )
    np.testing.assert_allclose(fast.c, expected, rtol=1e-10, atol=1e-9 * magnitude.max())
    np.testing.assert_allclose(fast.magnitude, magnitude, rtol=1e-10)
    assert fast.active[:, 0].tolist() == ([3, 3] if scalar else [2, 2])
    assert fast.scalar == scalar


def problem_of(op: str) -> tuple[data.Weights, reference.Weights, np.ndarray]:
    rng = np.random.default_rng(3)
    make = data.fc1_weights if op == "fc1" else data.fc2_weights
    weights = make(rng, 3, 192, 128, "integers")
    k = 192 if op == "fc1" else 3 * 128
    a = reference.activation_values(*data.activations(rng, 150, k, "nvfp4")[:2])
    return weights, reference.Weights(op, weights.codes, weights.scales, 3), a


def test_a_sample_of_fc1_equals_the_whole() -> None:
    weights, values, a = problem_of("fc1")
    rng = np.random.default_rng(4)
    alpha, post = data.fc1_alpha(weights, np.float32(0.01)).astype(np.float64), rng.uniform(0.5, 1, (150, 3))
    whole = reference.fc1(a, values, alpha, range(3), post)
    rows, columns = [0, 31, 128, 149], np.array([0, 63, 64, 127, 130, 300, 383])
    part = reference.fc1(a, values, alpha, reference.fc1_columns(columns, 128), post, rows=rows)
    for name in ("y", "up", "gate", "up_magnitude", "gate_magnitude", "post"):
        np.testing.assert_allclose(getattr(part, name), getattr(whole, name)[np.ix_(rows, columns)], rtol=1e-12, atol=1e-9)


def test_a_sample_of_fc2_equals_the_whole() -> None:
    _, values, a = problem_of("fc2")
    alpha = np.random.default_rng(5).uniform(0, 2, (150, 3))
    whole = reference.fc2(a, values, alpha, 3, 128)
    rows, columns = [1, 127, 128], np.array([0, 7, 128, 191])
    part = reference.fc2(a, values, alpha, 3, 128, rows=rows, columns=columns)
    np.testing.assert_allclose(part.c, whole.c[np.ix_(rows, columns)], rtol=1e-12, atol=1e-6)
    np.testing.assert_allclose(part.magnitude, whole.magnitude[np.ix_(rows, columns)], rtol=1e-12)


def test_activation_values_of_some_rows() -> None:
    rng = np.random.default_rng(6)
    codes, scales, _ = data.activations(rng, 200, 128, "nvfp4", "raw")
    whole = reference.activation_values(codes, scales)
    np.testing.assert_array_equal(reference.activation_values(codes, scales, [0, 130, 199]), whole[[0, 130, 199]])


def test_weights_are_asked_for_one_expert_at_a_time_and_only_where_wanted() -> None:
    weights, values, a = problem_of("fc1")
    asked = []

    def watched(expert: int, columns: np.ndarray) -> object:
        asked.append((expert, len(columns)))
        return values(expert, columns)

    alpha = data.fc1_alpha(weights, np.float32(1)).astype(np.float64)
    reference.fc1(a, watched, alpha, reference.fc1_columns([3, 4, 260], 128))  # type: ignore[arg-type]
    assert asked == [(0, 2), (2, 1)]


@pytest.mark.parametrize("columns", [[3, 2], [1, 1], [-1, 2], [[1]]])
def test_columns_of_a_sample_ascend(columns: list) -> None:
    with pytest.raises(ProblemError, match="ascending"):
        reference.fc1_columns(columns, 64)


# ---- exact zeros select


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
def test_alpha_post_of_exactly_zero_selects_nan_and_inf_away(a_dtype: str) -> None:
    rng = np.random.default_rng(7)
    weights = data.fc1_weights(rng, 2, 64, 64, "integers")
    first, scales, _ = data.activations(rng, 3, 64, a_dtype)
    arrays = {"a": first} if a_dtype == "bf16" else {"a.codes": first, "a.scales": scales}
    data.poison_activations(arrays, [1])
    if a_dtype == "bf16":
        a = (first.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        a = reference.activation_values(first, scales)
    post = np.ones((3, 2))
    values = reference.Weights("fc1", weights.codes, weights.scales, 2)
    dirty = reference.fc1(a, values, np.ones(2), range(2), post)
    assert np.isnan(dirty.y[1]).all()
    post[1] = 0
    clean = reference.fc1(a, values, np.ones(2), range(2), post)
    assert (clean.y[1] == 0).all()
    assert np.isfinite(clean.y).all()
    huge = np.array([[1e30], [1.0]]) * np.ones((1, 64))
    overflow = reference.fc1(huge, values, np.full(2, 1e30), range(2), np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert (overflow.y[0] == 0).all()


def test_an_alpha_of_exactly_zero_selects_an_experts_nan_away() -> None:
    rng = np.random.default_rng(8)
    weights = data.fc2_weights(rng, 3, 64, 64, "integers")
    codes, scales, _ = data.activations(rng, 4, 3 * 64, "nvfp4")
    values = reference.Weights("fc2", weights.codes, weights.scales, 3)
    alpha = np.ones((4, 3))
    alpha[2, 1] = 0
    expected = reference.fc2(reference.activation_values(codes, scales), values, alpha, 3, 64)
    data.poison_activations({"a.codes": codes, "a.scales": scales}, [2], slice(64, 128))
    poisoned = reference.fc2(reference.activation_values(codes, scales), values, alpha, 3, 64)
    np.testing.assert_array_equal(poisoned.c, expected.c)
    np.testing.assert_array_equal(poisoned.magnitude, expected.magnitude)
    assert poisoned.active[:, 0].tolist() == [3, 3, 2, 3]
    alpha[2, 1] = 1e-30
    assert np.isnan(reference.fc2(reference.activation_values(codes, scales), values, alpha, 3, 64).c[2]).all()


def test_what_float32_cannot_hold_is_left_open() -> None:
    a, w = np.full((1, 64), 1e10), np.full((64, 64), 1e10)
    result = reference.fc1(a, lambda _: (w, w), np.ones(1), [0])
    assert np.isinf(result.y).all(), "u · g is 4e43"


# ---- section 5


def test_alpha_is_router_weight_times_w2_alpha_and_repeated_ids_add() -> None:
    ids = np.array([[2, 0], [1, 1], [0, 2]])
    router = np.array([[0.5, 0.25], [0.1, 0.2], [1.0, 0.0]], dtype=np.float32)
    w2_alpha = np.array([2.0, 3.0, 0.7], dtype=np.float32)
    alpha = reference.build_alpha(ids, router, w2_alpha, experts=3)
    expected = np.zeros((3, 3), dtype=np.float32)
    for m in range(3):
        for j in range(2):
            expected[m, ids[m, j]] += router[m, j] * w2_alpha[ids[m, j]]
    np.testing.assert_array_equal(alpha, expected)
    assert alpha.dtype == np.float32
    assert alpha[1, 1] == np.float32(router[1, 0] * w2_alpha[1]) + np.float32(router[1, 1] * w2_alpha[1])
    assert alpha[0, 1] == 0


@pytest.mark.parametrize("outside", [-1, 3, 100])
def test_ids_outside_are_an_error_unless_other_ranks_hold_them(outside: int) -> None:
    ids = np.array([[0, outside]])
    router, w2_alpha = np.array([[0.5, 0.5]], dtype=np.float32), np.ones(3, dtype=np.float32)
    with pytest.raises(ProblemError, match=f"expert id {outside} of token 0: use 0 to 2"):
        reference.build_alpha(ids, router, w2_alpha, experts=3)
    elsewhere = reference.build_alpha(ids, router, w2_alpha, experts=3, elsewhere_allowed=True)
    np.testing.assert_array_equal(elsewhere, np.array([[0.5, 0, 0]], dtype=np.float32))


@pytest.mark.parametrize(
    ("ids", "router", "w2_alpha", "message"),
    [
        (np.zeros(2, int), np.zeros(2), np.ones(3), r"use \[M, k\]"),
        (np.zeros((1, 2), int), np.zeros((1, 3)), np.ones(3), r"use \[M, k\]"),
        (np.zeros((1, 2), int), np.zeros((1, 2)), np.ones(4), r"\[3\]"),
        (np.zeros((1, 2)), np.zeros((1, 2)), np.ones(3), "integers"),
    ],
)
def test_router_tensors_that_do_not_agree_are_refused(ids: np.ndarray, router: np.ndarray, w2_alpha: np.ndarray, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        reference.build_alpha(ids, router, w2_alpha, experts=3)


def test_the_fused_form_splits_alpha_into_a_post_scale_and_a_scalar() -> None:
    w2_alpha = np.array([0.5, 2.0, 1.0], dtype=np.float32)
    alpha2 = reference.build_alpha(np.array([[0, 1]]), np.array([[0.25, 0.75]], dtype=np.float32), w2_alpha, experts=3)
    post, scalar = reference.fused_alpha(alpha2, w2_alpha)
    assert scalar == np.float32(2)
    np.testing.assert_array_equal(post, np.array([[0.0625, 0.75, 0]], dtype=np.float32))


@pytest.mark.parametrize("largest", [0.0, -1.0, np.inf, np.nan])
def test_the_fused_form_needs_a_finite_positive_maximum(largest: float) -> None:
    with pytest.raises(ProblemError, match="finite positive"):
        reference.fused_alpha(np.zeros((1, 2), np.float32), np.array([largest, -1.0], dtype=np.float32))


def test_both_forms_are_the_same_layer_before_quantisation() -> None:
    """FC2(alpha2) of FC1 equals FC2(alpha_max) of FC1 with alpha_post: section 5's fused form only moves the quantisation."""
    rng = np.random.default_rng(9)
    w1, w2 = data.fc1_weights(rng, 3, 64, 64), data.fc2_weights(rng, 3, 64, 64)
    v1, v2 = reference.Weights("fc1", w1.codes, w1.scales, 3), reference.Weights("fc2", w2.codes, w2.scales, 3)
    a = reference.activation_values(*data.activations(rng, 5, 64, "nvfp4")[:2])
    alpha1 = data.fc1_alpha(w1, np.float32(1e-3)).astype(np.float64)
    ids = np.argsort(rng.random((5, 3)), axis=1)[:, :2]
    w2_alpha = w2.global_scales
    alpha2 = reference.build_alpha(ids, rng.random((5, 2)).astype(np.float32), w2_alpha, experts=3)
    post, scalar = reference.fused_alpha(alpha2, w2_alpha)
    default = reference.fc2(reference.fc1(a, v1, alpha1, range(3)).y, v2, alpha2.astype(np.float64), 3, 64).c
    fused = reference.fc2(reference.fc1(a, v1, alpha1, range(3), post.astype(np.float64)).y, v2, np.array([float(scalar)]), 3, 64).c
    np.testing.assert_allclose(fused, default, rtol=1e-6, atol=1e-6 * np.abs(default).max())


def test_the_unquantised_layer_equals_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(10)
    experts, hidden, intermediate = 4, 8, 6
    up, gate = rng.standard_normal((2, experts, intermediate, hidden))
    down = rng.standard_normal((experts, hidden, intermediate))
    x = rng.standard_normal((5, hidden))
    ids = np.array([[0, 1], [2, 2], [3, 0], [1, 3], [0, 2]])
    router = rng.random((5, 2)).astype(np.float32)
    expected = np.zeros_like(x)
    for m in range(5):
        for j in range(2):
            e = ids[m, j]
            g = gate[e] @ x[m]
            expected[m] += float(router[m, j]) * (down[e] @ ((up[e] @ x[m]) * g / (1 + np.exp(-g))))
    np.testing.assert_allclose(reference.layer(x, lambda e: (up[e], gate[e], down[e]), ids, router), expected, rtol=1e-12)
