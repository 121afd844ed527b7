"""The data generator: the grids' sizes, reproducibility, what each kind promises; routing and layers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from densemoe.runtime import data, marks, reference
from densemoe.runtime.data import LayerCase
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layer_data import LayerData
from densemoe.runtime.layout import tile_scales, untile_scales, weight_shapes
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, bf16_bits, bf16_values, quantise, quantise_rows, unpack_codes
from densemoe.runtime.routing import METHODS, route

PINNED = "25d56f218b1bf809d9471a5444d64a5a3461b9adf3dce35b8255fa32e5a45fbc"


def test_the_grids_have_the_contracts_cases() -> None:
    fc1, fc2, layers = list(data.fc1_grid()), list(data.fc2_grid()), list(data.layers())
    assert (len(fc1), len(set(fc1))) == (384, 384)
    assert (len(fc2), len(set(fc2))) == (180, 180)
    assert len(layers) == 14
    assert {case.experts for case in fc1} == {1, 4, 8, 32}
    assert {case.rows for case in fc1} == {256, 512, 1024, 2816}
    assert {case.m for case in fc1} == {case.m for case in fc2} == {1, 8, 127, 256}
    assert {case.hidden for case in fc1} == {case.hidden for case in fc2} == {256, 512, 2048}
    assert {case.experts for case in fc2} == {1, 4, 8, 32, 256}
    assert {case.intermediate for case in fc2} == {256, 512, 1024}
    assert (256, 8, 7168, 2048, 1) in layers


def test_cases_are_problems() -> None:
    problem = data.Fc1Case(8, 2816, 127, 512, True).problem("bf16", "f32")
    assert (problem.op, problem.intermediate, problem.alpha_post, problem.a_dtype) == ("fc1", 1408, True, "bf16")
    assert data.Fc2Case(8, 256, 1, 512).problem(scalar_alpha=True).scalar_alpha


@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_ragged_shapes_are_off_the_grid_and_reproducible(op: str) -> None:
    problems = list(data.ragged(op, 50, 7, a_dtype="nvfp4"))
    assert problems == list(data.ragged(op, 50, 7, a_dtype="nvfp4"))
    assert all(p.experts % 2 and p.intermediate % 256 and 1 <= p.m <= 600 and p.a_dtype == "nvfp4" for p in problems)
    assert len(set(problems)) > 40


@pytest.mark.parametrize("kind", data.KINDS)
@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_weights_have_the_contracts_shapes_and_follow_from_the_seed(op: str, kind: str) -> None:
    make = data.fc1_weights if op == "fc1" else data.fc2_weights
    weights = make(np.random.default_rng(1), 3, 192, 128, kind)
    shapes = weight_shapes(op, 3, 192, 128)
    assert (weights.codes.shape, weights.scales.shape) == (shapes["b.codes"], shapes["b.scales"])
    assert weights.global_scales.shape == (3,)
    assert weights.codes.dtype == weights.scales.dtype == np.uint8
    again, other = make(np.random.default_rng(1), 3, 192, 128, kind), make(np.random.default_rng(2), 3, 192, 128, kind)
    assert all((x == y).all() for x, y in zip(weights, again, strict=True))
    assert (weights.codes != other.codes).any()
    assert weights.scales.max() <= 0x7E, "weights have no NaN and no negative scales"


def test_the_stream_of_integers_is_pinned() -> None:
    """The same bytes on every machine: a change here changes every recorded result."""
    weights = data.fc1_weights(np.random.default_rng(0), 2, 64, 64, "integers")
    digest = hashlib.sha256(weights.codes.tobytes() + weights.scales.tobytes() + weights.global_scales.tobytes()).hexdigest()
    assert digest == PINNED


def test_integers_are_those_of_the_contract() -> None:
    drawn = data.integers(np.random.default_rng(0), (1000, 100))
    assert sorted(np.unique(drawn)) == list(range(-5, 5))


def test_fc1_weights_are_quantised_per_expert() -> None:
    weights = data.fc1_weights(np.random.default_rng(3), 2, 64, 64, "normal")
    rng = np.random.default_rng(3)
    plain = untile_scales(weights.scales, 256)
    for expert in range(2):
        tensor = quantise(rng.standard_normal((128, 64), dtype=np.float32))
        np.testing.assert_array_equal(weights.codes[expert], tensor.codes)
        np.testing.assert_array_equal(plain[128 * expert : 128 * expert + 128], untile_scales(tensor.scales, 128))
        assert weights.global_scales[expert] == tensor.global_scale


def test_fc2_weights_are_quantised_per_expert() -> None:
    weights = data.fc2_weights(np.random.default_rng(3), 2, 64, 128, "normal")
    rng = np.random.default_rng(3)
    plain = untile_scales(weights.scales, 64)
    for expert in range(2):
        tensor = quantise(rng.standard_normal((64, 128), dtype=np.float32))
        np.testing.assert_array_equal(weights.codes[:, 64 * expert : 64 * expert + 64], tensor.codes)
        np.testing.assert_array_equal(plain[:, 8 * expert : 8 * expert + 8], untile_scales(tensor.scales, 64))


@pytest.mark.parametrize("k", [64, 1024, 7168, 65536, 262144, 2**20, 2**22 - 1])
def test_exact_data_keeps_its_promise_at_every_length(k: int) -> None:
    code, scale = data._exact_limits(k)
    largest = E2M1_VALUES[code] * scale  # of one operand; alphas are 1/2, 1 or 2
    unit = 0.5 * 0.5 * 0.5
    assert k * largest**2 * 2 < 2**24 * unit
    if k <= 7168:
        assert code == 7, "all codes occur where there is room"


def test_exact_data_that_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ProblemError, match="cannot be exact"):
        data._exact_limits(2**22)


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
def test_exact_products_are_multiples_of_one_unit(a_dtype: str) -> None:
    rng = np.random.default_rng(4)
    weights = data.fc1_weights(rng, 2, 320, 64, "exact")
    first, scales, scale = data.activations(rng, 3, 320, a_dtype, "exact")
    a = bf16_values(first).astype(np.float64) if a_dtype == "bf16" else reference.activation_values(first, scales)
    assert scale == 1
    assert (a >= 0).all()
    values = reference.Weights("fc1", weights.codes, weights.scales, 2)
    for expert in range(2):
        for w in values(expert):
            products = a[:, None, :] * w[None, :, :]
            assert (products * 4 == np.rint(products * 4)).all()
            assert (np.abs(products).sum(axis=2) * 4 < 2**24).all()
    result = reference.fc1(a, values, data.fc1_alpha(weights, scale).astype(np.float64), range(2))
    assert (result.gate >= 64).all()
    assert (result.up < 0).any()
    assert len(np.unique(weights.scales[weights.scales > 0])) > 1


def test_raw_and_extreme_scales_hold_zero_subnormal_and_largest() -> None:
    raw = data.fc1_weights(np.random.default_rng(5), 1, 1024, 256, "raw").scales
    assert set(range(127)) <= set(np.unique(raw))
    extreme = data.fc1_weights(np.random.default_rng(5), 1, 256, 64, "extreme")
    assert {0x00, 0x01, 0x07, 0x08, 0x38, 0x7E} == set(np.unique(extreme.scales))
    assert {0, 7, 15} <= set(np.unique(unpack_codes(extreme.codes)))


@pytest.mark.parametrize("kind", data.KINDS)
def test_activations_of_every_kind(kind: str) -> None:
    bits, none, one = data.activations(np.random.default_rng(6), 5, 128, "bf16", kind)
    assert (bits.shape, bits.dtype, none, one) == ((5, 128), np.uint16, None, 1)
    assert np.isfinite(bf16_values(bits)).all()
    codes, scales, scale = data.activations(np.random.default_rng(6), 5, 128, "nvfp4", kind)
    assert (codes.shape, scales.shape) == ((5, 64), (128, 8))
    assert scale > 0
    if kind == "extreme":
        values = np.abs(bf16_values(bits))
        assert (values == 0).any()
        assert values.max() > 2**15
        assert values[values > 0].min() < 2**-15


def test_unknown_kinds_and_dtypes_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ProblemError, match="use one of integers"):
        data.fc1_weights(rng, 1, 64, 64, "gaussian")
    with pytest.raises(ProblemError, match="use one of integers"):
        data.activations(rng, 1, 64, "bf16", "gaussian")
    with pytest.raises(ProblemError, match="bf16 or nvfp4"):
        data.activations(rng, 1, 64, "f32")
    with pytest.raises(ProblemError, match="hidden=96"):
        data.fc2_weights(rng, 1, 96, 64)


def test_fc2_alpha_is_uniform_times_the_global_scales() -> None:
    weights = data.fc2_weights(np.random.default_rng(7), 4, 64, 64)
    alpha = data.fc2_alpha(np.random.default_rng(8), 500, weights, np.float32(0.5), zeros=0.25)
    ratio = alpha / (weights.global_scales * np.float32(0.5))
    assert alpha.dtype == np.float32
    assert 0 <= ratio.min() < ratio.max() < 2
    assert 0.2 < (alpha == 0).mean() < 0.3
    assert data.fc2_alpha(np.random.default_rng(8), 500, weights, np.float32(0.5), scalar=True).shape == (1,)
    post = data.alpha_post(np.random.default_rng(9), 500, 4)
    assert 0.8 <= post.min() < post.max() < 1.2
    assert set(np.unique(data.alpha_post(np.random.default_rng(9), 500, 4, "exact"))) == {2.0**-14, 2.0**-13, 2.0**-12}


def test_poison_reaches_its_tokens_and_columns_only() -> None:
    rng = np.random.default_rng(10)
    codes, scales, _ = data.activations(rng, 140, 192, "nvfp4")
    data.poison_activations({"a.codes": codes, "a.scales": scales}, [3, 130], slice(64, 128))
    values = np.isnan(reference.activation_values(codes, scales))
    assert values[[3, 130], 64:128].all()
    assert values.sum() == 2 * 64
    bits, _, _ = data.activations(rng, 4, 192, "bf16")
    data.poison_activations({"a": bits}, [1], slice(0, 64))
    assert np.isnan(bf16_values(bits)).sum() == 64
    with pytest.raises(ProblemError, match="cut a group"):
        data.poison_activations({"a.codes": codes, "a.scales": scales}, [0], slice(8, 24))


# ---- routing


def loop_route(method: str, logits: np.ndarray, k: int, bias: np.ndarray, groups: int, best: int, scaling: float) -> tuple[list, list]:
    """One token in plain Python, from the table in the module's docstring."""
    experts = len(logits)

    def top(scores: list, among: list) -> list:
        return sorted(among, key=lambda e: (-scores[e], e))[:k]

    every = list(range(experts))
    if method in ("Default", "RenormalizeNaive"):
        total = sum(np.exp(x) for x in logits)
        scores = [np.exp(x) / total for x in logits]
        ids = top(scores, every)
        weights = [scores[e] for e in ids]
        return ids, weights if method == "Default" else [w / sum(weights) for w in weights]
    if method in ("Renormalize", "Llama4Renormalize"):
        ids = top(list(logits), every)
        if method == "Llama4Renormalize":
            return ids, [1 / (1 + np.exp(-logits[e])) for e in ids]
        total = sum(np.exp(logits[e]) for e in ids)
        return ids, [np.exp(logits[e]) / total for e in ids]
    scores = [1 / (1 + np.exp(-x)) for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    among = every
    if method == "DeepSeekV3":
        size = experts // groups
        members = [every[g * size : (g + 1) * size] for g in range(groups)]
        order = sorted(range(groups), key=lambda g: (-sum(sorted((choice[e] for e in members[g]), reverse=True)[:2]), g))
        among = [e for g in order[:best] for e in members[g]]
    ids = top(choice, among)
    total = sum(scores[e] for e in ids)
    return ids, [scores[e] / total * (scaling if method == "DeepSeekV3" else 1) for e in ids]


@pytest.mark.parametrize("method", METHODS)
def test_routing_methods_equal_a_loop(method: str) -> None:
    rng = np.random.default_rng(11)
    logits = rng.standard_normal((40, 16)).astype(np.float32)
    bias = (rng.standard_normal(16) * 0.3).astype(np.float32)
    arguments: dict = {"bias": bias} if method in ("DeepSeekV3", "MiniMaxM2") else {}
    if method == "DeepSeekV3":
        arguments |= {"groups": 4, "best_groups": 2, "scaling": 2.5}
    ids, weights = route(method, logits, 3, **arguments)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    for token in range(40):
        expected_ids, expected = loop_route(method, logits[token].astype(float), 3, bias.astype(float), 4, 2, 2.5)
        assert ids[token].tolist() == expected_ids
        np.testing.assert_allclose(weights[token], expected, rtol=1e-5)


def test_equal_scores_go_to_the_smaller_id() -> None:
    assert route("Renormalize", np.zeros((1, 5)), 3)[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("method", "top_k", "arguments", "message"),
    [
        ("Softmax", 1, {}, "use one of Default"),
        ("Default", 0, {}, "1 to E"),
        ("Default", 9, {}, "1 to E"),
        ("Default", 1, {"bias": np.zeros(8)}, "DeepSeekV3 or MiniMaxM2"),
        ("MiniMaxM2", 1, {"bias": np.zeros(7)}, r"use \[E\]"),
        ("Default", 1, {"groups": 2}, "only DeepSeekV3"),
        ("DeepSeekV3", 1, {"groups": 3}, "divide E"),
        ("DeepSeekV3", 5, {"groups": 2, "best_groups": 1}, "hold top_k"),
    ],
)
def test_routing_that_does_not_fit_is_refused(method: str, top_k: int, arguments: dict, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        route(method, np.zeros((2, 8)), top_k, **arguments)


# ---- layers


def test_layer_weights_are_bf16_and_come_again() -> None:
    layer = LayerData(LayerCase(3, 2, 128, 192, 4))
    for name, shape in (("up", (192, 128)), ("gate", (192, 128)), ("down", (128, 192))):
        w = layer.projection(name, 1)
        assert w.shape == shape
        np.testing.assert_array_equal(bf16_values(bf16_bits(w)), w)
        np.testing.assert_array_equal(layer.projection(name, 1), w)
        assert (layer.projection(name, 2) != w).any()
    with pytest.raises(ProblemError, match="use 0 to 2"):
        layer.projection("up", 3)


def test_layer_weights_quantised_by_the_expert_equal_quantising_their_values() -> None:
    layer = LayerData(LayerCase(2, 1, 128, 64, 1))
    codes, scales, scale = layer.fc2_expert(1)
    whole = quantise(layer.projection("down", 1))
    np.testing.assert_array_equal(codes, whole.codes)
    np.testing.assert_array_equal(tile_scales(scales), whole.scales)
    assert scale == whole.global_scale
    codes, scales, scale = layer.fc1_expert(0)
    up_gate = np.concatenate([layer.projection("up", 0), layer.projection("gate", 0)])
    whole = quantise(up_gate)
    np.testing.assert_array_equal(codes, whole.codes)
    assert scale == whole.global_scale


@pytest.mark.parametrize(("experts", "top_k", "hidden", "intermediate"), data.LAYERS[:4])
@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
def test_small_layers_quantised_by_the_contract_reach_the_97_percent_mark(
    experts: int, top_k: int, hidden: int, intermediate: int, a_dtype: str
) -> None:
    """The whole chain of sections 2–5 on the reference: quantised weights, FC1, NVFP4 in between, FC2, against the unquantised layer."""
    for m in (1, 8):
        layer = LayerData(LayerCase(experts, top_k, hidden, intermediate, m), seed=experts)
        ids, router = layer.routing()
        x = bf16_values(layer.x).astype(np.float64)
        w1 = [layer.fc1_expert(e) for e in range(experts)]
        w2 = [layer.fc2_expert(e) for e in range(experts)]
        first = reference.Weights("fc1", np.stack([c for c, _, _ in w1]), tile_scales(np.concatenate([s for _, s, _ in w1])), experts)
        second = reference.Weights(
            "fc2", np.concatenate([c for c, _, _ in w2], axis=1), tile_scales(np.concatenate([s for _, s, _ in w2], axis=1)), experts
        )
        a, a_scale = x, np.float32(1)
        if a_dtype == "nvfp4":
            tensor = quantise(x)
            a, a_scale = tensor.values(), tensor.global_scale
        alpha = np.array([g for _, _, g in w1]) * a_scale
        y = reference.fc1(a, first, alpha.astype(np.float64), range(experts)).y
        codes, scales = quantise_rows(y.astype(np.float32), layer.output_multiplier)
        middle = E2M1_VALUES[codes] * np.repeat(E4M3_VALUES[scales], 16, axis=1)
        w2_alpha = (np.float32(1) / layer.output_multiplier * np.array([g for _, _, g in w2])).astype(np.float32)
        alpha2 = reference.build_alpha(ids, router, w2_alpha, experts=experts)
        c = reference.fc2(middle, second, alpha2.astype(np.float64), experts, intermediate).c
        actual = bf16_values(bf16_bits(c)).astype(np.float64)
        unquantised = reference.layer(x, layer.unquantised, ids, router)
        report = marks.layer_mark(actual, unquantised)
        assert report.passed, report.text
        assert not marks.layer_mark(np.zeros_like(actual), unquantised).passed, "the outputs are not small beside the mark"
        assert not marks.layer_mark(actual + 0.4, unquantised).passed
