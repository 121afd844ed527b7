"""The kernels beside the GEMMs, ``prepare`` and ``quantize``, on the emulator: bit for bit what the contract's reference gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from compiled import compiled_variant

from densemoe.compile import kernels
from densemoe.compile.emulate.running import REWRITTEN
from densemoe.compile.emulator.device import launch_recipe
from densemoe.runtime import reference
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import bf16_bits, bf16_values, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

NUMPY: dict[str, Any] = {"u8": np.uint8, "f32": np.float32, "i32": np.int32}


@cache
def ptx_of(key: str) -> str:
    return compiled_variant(key).ptx


def launch(key: str, problem: Problem, arrays: dict[str, Any]) -> dict[str, Any]:
    """The kernel's outputs by role, poisoned before."""
    variant = Variant.parse(key)
    outputs = {role: np.full(spec.shape, 0x5A, NUMPY[spec.dtype]) for role, spec in problem.tensors().items() if spec.output}
    recipe = kernels.load(f"sm90_{variant.op}").recipe(variant)
    launch_recipe(ptx_of(key), recipe, problem.names(), {**arrays, **outputs}, outputs, rewritten=REWRITTEN.get(variant.op, ()))
    return outputs


def values(dtype: str, m: int, k: int) -> tuple[Any, Any]:
    """(the array as stored, its values in float32): normals, a row of zeros, a group of one large value, subnormal sizes."""
    x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
    x[0, :16] = 0
    x[-1, 16:32] = 0
    x[-1, 20] = 60000
    x[m // 2, 32:48] *= np.float32(1e-6)
    if dtype == "bf16":
        bits = bf16_bits(x)
        return bits, bf16_values(bits)
    stored = x.astype({"f16": np.float16, "f32": np.float32}[dtype])
    return stored, stored.astype(np.float32)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (3, 2112), (130, 64)])
def test_quantize_is_the_reference_bit_for_bit(dtype: str, m: int, k: int) -> None:
    stored, x = values(dtype, m, k)
    multiplier = np.float32(448 * 6 / 4)
    got = launch(
        f"quantize.sm90a.t1x2048.c1x1.{dtype}-nvfp4",
        Problem("quantize", m, 0, k, 0, dtype, "nvfp4"),
        {"a": stored, "output_multiplier": np.array([multiplier])},
    )
    codes, scales = quantise_rows(x, multiplier)
    assert np.array_equal(got["c.codes"], pack_codes(codes))
    assert np.array_equal(got["c.scales"], tile_scales(scales))


def prepared(problem: Problem, ids: Any, router: Any, w2_alpha: Any, divisor: float) -> dict[str, Any]:
    arrays = {"ids": ids, "router": router, "w2_alpha": w2_alpha, "alpha_divisor": np.array([divisor], np.float32)}
    return launch(f"prepare.sm90a.t32x4096.c1x1.{problem.a_dtype}-f32", problem, arrays)


@pytest.mark.parametrize("dtype", ["i32", "i64"])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(1, 8, 1), (5, 7, 3), (33, 300, 8)])
def test_prepare_is_the_reference_bit_for_bit(dtype: str, m: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(m)
    ids = rng.integers(0, experts, (m, top_k)).astype({"i32": np.int32, "i64": np.int64}[dtype])  # with repeated ids
    router, w2_alpha = rng.random((m, top_k), np.float32), rng.random(experts, np.float32)
    problem = Problem("prepare", m, experts, 0, 0, dtype, "f32", top_k=top_k)
    got = prepared(problem, ids, router, w2_alpha, 1.0)
    alpha2 = reference.build_alpha(ids, router, w2_alpha, experts=experts)
    assert np.array_equal(got["alpha"], alpha2)
    active = np.unique(ids)
    assert got["active_list"][0] == len(active)
    assert np.array_equal(got["active_list"][1 : 1 + len(active)], active)
    post, largest = reference.fused_alpha(alpha2, w2_alpha)
    assert np.array_equal(prepared(problem, ids, router, w2_alpha, float(largest))["alpha"], post)


def test_ids_of_other_ranks_are_skipped_or_poison_their_token() -> None:
    ids = np.array([[9, 4, 11], [5, 6, 7], [4, 4, -1]], np.int32)
    router, w2_alpha = np.full((3, 3), 0.5, np.float32), np.arange(1, 5, dtype=np.float32)
    for elsewhere in (True, False):
        problem = Problem("prepare", 3, 4, 0, 0, "i32", "f32", top_k=3, first_expert=4, elsewhere=elsewhere)
        got = prepared(problem, ids, router, w2_alpha, 1.0)
        expected = reference.build_alpha(ids - 4, router, w2_alpha, experts=4, elsewhere_allowed=True)
        if not elsewhere:
            expected[[0, 2]] = np.nan
        np.testing.assert_array_equal(got["alpha"], expected)
        assert got["active_list"][:5].tolist() == [4, 0, 1, 2, 3]


@pytest.mark.parametrize(("elsewhere", "listed"), [(True, []), (False, [0])])
def test_a_list_is_empty_only_where_other_ranks_hold_the_experts(elsewhere: bool, listed: list[int]) -> None:
    """FC2 of an empty list is zero, so bad ids alone keep one expert listed: their NaN must reach the output."""
    problem = Problem("prepare", 2, 4, 0, 0, "i32", "f32", top_k=2, elsewhere=elsewhere)
    got = prepared(problem, np.array([[9, 4], [-1, 7]], np.int32), np.ones((2, 2), np.float32), np.ones(4, np.float32), 1.0)
    assert got["active_list"][: 1 + len(listed)].tolist() == [len(listed), *listed]
    assert np.isnan(got["alpha"]).all() == (not elsewhere)
