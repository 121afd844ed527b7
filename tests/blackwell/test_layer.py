"""A whole layer on sm_100f, launch by launch on the emulator: quantize, prepare, an FC1 that skips idle experts, an FC2 with the same list, NVFP4
between them; alpha in both forms of contract section 5."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import emulated
from compiled import compiled_variant

from densemoe.compile import kernels
from densemoe.compile.emulate.running import REWRITTEN
from densemoe.compile.emulator.device import launch_recipe
from densemoe.runtime import bounds, data, reference
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import bf16_bits, bf16_values, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

NUMPY: dict[str, Any] = {"u8": np.uint8, "f32": np.float32, "i32": np.int32}


@cache
def ptx_of(key: str) -> str:
    return compiled_variant(key).ptx


def auxiliary(key: str, problem: Problem, arrays: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a prepare or quantize kernel by role, poisoned before."""
    variant = Variant.parse(key)
    outputs = {role: np.full(spec.shape, 0x5A, NUMPY[spec.dtype]) for role, spec in problem.tensors().items() if spec.output}
    recipe = kernels.load(f"sm90_{variant.op}").recipe(variant)
    launch_recipe(ptx_of(key), recipe, problem.names(), {**arrays, **outputs}, outputs, rewritten=REWRITTEN.get(variant.op, ()))
    return outputs


def quantized(m: int, k: int, dtype: str = "bf16") -> tuple[dict[str, Any], Any, np.float32]:
    """(codes and scales as the kernel gives them, the values it was given, its multiplier)."""
    x = np.random.default_rng(m).standard_normal((m, k)).astype(np.float32)
    x[0, :16] = 0
    stored = bf16_bits(x) if dtype == "bf16" else x.astype({"f16": np.float16, "f32": np.float32}[dtype])
    values = bf16_values(stored) if dtype == "bf16" else stored.astype(np.float32)
    multiplier = np.float32(2688 / float(np.abs(values).max()))
    problem = Problem("quantize", m, 0, k, 0, dtype, "nvfp4")
    arrays = {"a": stored, "output_multiplier": np.array([multiplier])}
    return auxiliary(f"quantize.sm100f.t1x2048.c1x1.{dtype}-nvfp4", problem, arrays), values, multiplier


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("m", "k"), [(3, 320), (130, 64)])
def test_quantize_is_the_reference_bit_for_bit(dtype: str, m: int, k: int) -> None:
    got, values, multiplier = quantized(m, k, dtype)
    codes, scales = quantise_rows(values, multiplier)
    assert np.array_equal(got["c.codes"], pack_codes(codes))
    assert np.array_equal(got["c.scales"], tile_scales(scales))


def routing(m: int, experts: int, top_k: int, idle: list[int], seed: int) -> tuple[Any, Any]:
    """Ids that leave the experts ``idle`` without a token, and router weights."""
    rng = np.random.default_rng(seed)
    busy = [e for e in range(experts) if e not in idle]
    ids = np.stack([rng.choice(busy, top_k, replace=False) for _ in range(m)]).astype(np.int32)
    ids[:, 0] = [busy[row % len(busy)] for row in range(m)]
    return ids, rng.random((m, top_k)).astype(np.float32) + np.float32(0.1)


@pytest.mark.parametrize("dtype", ["i32", "i64"])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(5, 7, 3), (33, 300, 8)])
def test_prepare_is_the_reference_bit_for_bit(dtype: str, m: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(m)
    ids = rng.integers(0, experts, (m, top_k)).astype({"i32": np.int32, "i64": np.int64}[dtype])  # with repeated ids
    router, w2_alpha = rng.random((m, top_k), np.float32), rng.random(experts, np.float32)
    problem = Problem("prepare", m, experts, 0, 0, dtype, "f32", top_k=top_k)
    arrays = {"ids": ids, "router": router, "w2_alpha": w2_alpha, "alpha_divisor": np.ones(1, np.float32)}
    got = auxiliary(f"prepare.sm100f.t32x4096.c1x1.{dtype}-f32", problem, arrays)
    assert np.array_equal(got["alpha"], reference.build_alpha(ids, router, w2_alpha, experts=experts))
    active = np.unique(ids)
    assert got["active_list"][: 1 + len(active)].tolist() == [len(active), *active]


@pytest.mark.parametrize(
    ("fc1", "fc2"),
    [("t128x128.c1x2", "t128x128.c1x2"), ("t256x256.c2x1", "t256x128.c2x1"), ("t128x256.c1x4", "t128x64.c1x4")],
)
@pytest.mark.parametrize(("m", "fused"), [(5, False), (130, False), (5, True), (130, True)])
def test_a_skipping_layer_is_right(fc1: str, fc2: str, m: int, fused: bool) -> None:
    """FC1 leaves idle experts' columns as they were, NaN here; FC2 with the same list never meets them."""
    experts, top_k, hidden, intermediate, idle = 5, 2, 320, 256, [1, 4]
    x, _, multiplier = quantized(m, hidden)
    rng = np.random.default_rng(7)
    one, two = data.fc1_weights(rng, experts, hidden, intermediate, "normal"), data.fc2_weights(rng, experts, hidden, intermediate, "normal")
    ids, router = routing(m, experts, top_k, idle, m)
    a = reference.activation_values(x["c.codes"], x["c.scales"])
    alpha1 = data.fc1_alpha(one, np.float32(1) / multiplier)
    active = [e for e in range(experts) if e not in idle]

    first = Problem("fc1", m, experts, hidden, intermediate, "nvfp4", "nvfp4", alpha_post=fused, active_list=True)
    lookup = reference.Weights("fc1", one.codes, one.scales, experts)
    plain = reference.fc1(a, lookup, alpha1.astype(np.float64), active)
    output_multiplier = np.float32(2688.0 / float(np.abs(plain.y).max()))  # alpha_post of the fused form is below 1.1 here
    w2_alpha = (two.global_scales / output_multiplier).astype(np.float32)
    divisor = w2_alpha.max(keepdims=True) if fused else np.ones(1, np.float32)
    arrays = {"ids": ids, "router": router, "w2_alpha": w2_alpha, "alpha_divisor": divisor}
    prepared = auxiliary("prepare.sm100f.t32x4096.c1x1.i32-f32", Problem("prepare", m, experts, 0, 0, "i32", "f32", top_k=top_k), arrays)
    assert prepared["active_list"][: 1 + len(active)].tolist() == [len(active), *active]
    posts = None
    if fused:
        post, scalar = reference.fused_alpha(reference.build_alpha(ids, router, w2_alpha, experts=experts), w2_alpha)
        assert np.array_equal(prepared["alpha"], post)
        assert scalar == divisor[0]
        posts = prepared["alpha"].astype(np.float64)
    exact1 = reference.fc1(a, lookup, alpha1.astype(np.float64), active, posts) if fused else plain

    middle = emulated.outputs_of(first)
    middle["c.scales"][...] = 0x7F  # NaN wherever nothing is written
    tensors = {"a.codes": x["c.codes"], "a.scales": x["c.scales"], "b.codes": one.codes, "b.scales": one.scales, "alpha": alpha1}
    tensors |= {"output_multiplier": np.array([output_multiplier]), "active_experts": prepared["active_list"], **middle}
    if fused:
        tensors["alpha_post"] = prepared["alpha"]
    emulated.launch(f"fc1.sm100f.{fc1}.nvfp4-nvfp4", first, tensors, schedule="random:1")
    columns = np.concatenate([e * intermediate + np.arange(intermediate) for e in active])
    judged = bounds.compare_fc1(middle, exact1, first, output_multiplier=float(output_multiplier), columns=columns)
    assert judged.passed, judged.text
    after = reference.activation_values(middle["c.codes"], middle["c.scales"])
    unwritten = np.setdiff1d(np.arange(experts * intermediate), columns)
    assert np.isnan(after[:, unwritten]).all()

    alpha2 = divisor if fused else prepared["alpha"]
    second = Problem("fc2", m, experts, hidden, intermediate, "nvfp4", "bf16", scalar_alpha=fused, active_list=True)
    tensors = {"a.codes": middle["c.codes"], "a.scales": middle["c.scales"], "b.codes": two.codes, "b.scales": two.scales}
    tensors |= {"alpha": alpha2, "active_experts": prepared["active_list"], **emulated.outputs_of(second)}
    emulated.launch(f"fc2.sm100f.{fc2}.nvfp4-bf16", second, tensors, schedule="random:2", splits=2)
    exact2 = reference.fc2(
        after[:, columns],
        lambda index: reference.Weights("fc2", two.codes, two.scales, experts)(active[index]),
        alpha2.astype(np.float64) if fused else alpha2[:, active].astype(np.float64),
        len(active),
        intermediate,
    )
    report = bounds.compare_fc2({"c": tensors["c"]}, exact2, second)
    assert report.passed, report.text
