"""The grouped kernels on the emulator: route bit for bit, FC1 and FC2 over its rows within the contract's bounds, and a whole layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grouped_cases import launch, reads_lists_early_only_where_told, run
from routes import same_routes

from densemoe.runtime import packing, reference
from densemoe.runtime.layout import from_k64_order, k64_order
from densemoe.runtime.nvfp4 import bf16_bits, bf16_values
from densemoe.runtime.problem import Problem

# ---- route


def routed(problem: Problem, ids: Any, router: Any, w2_alpha: Any) -> tuple[dict[str, Any], reference.Routes]:
    got, _ = launch(f"route.sm90a.t32x4096.c1x1.{problem.a_dtype}-f32", problem, {"ids": ids, "router": router, "w2_alpha": w2_alpha})
    expected = reference.route(
        ids, router, w2_alpha, group_tile=problem.group_tile, first_expert=problem.first_expert, elsewhere=problem.elsewhere
    )
    return got, expected


def same(got: dict[str, Any], expected: reference.Routes) -> None:
    same_routes(got["tiles"], got["rows"], got["row_alpha"], expected, got.get("places"))


@pytest.mark.parametrize("dtype", ["i32", "i64"])
@pytest.mark.parametrize(
    ("m", "experts", "top_k", "group_tile"),
    [(1, 8, 1, 8), (5, 7, 3, 8), (70, 5, 4, 16), (45, 30, 6, 8), (33, 300, 8, 32), (200, 900, 8, 8), (600, 64, 8, 16), (400, 9, 7, 16)],
)
def test_route_is_the_reference_bit_for_bit(dtype: str, m: int, experts: int, top_k: int, group_tile: int) -> None:
    rng = np.random.default_rng(m)
    ids = rng.integers(0, experts, (m, top_k)).astype({"i32": np.int32, "i64": np.int64}[dtype])  # with repeated ids
    problem = Problem("route", m, experts, 0, 0, dtype, "f32", top_k=top_k, group_tile=group_tile, deterministic=bool(m % 2 or m == 600))
    same(*routed(problem, ids, rng.random((m, top_k), np.float32), rng.random(experts, np.float32)))


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("ids", [[[9, 4, 11], [5, 6, 7], [4, 4, -1]], [[0, 1, 2], [8, 9, 10], [3, 3, 3]]])
def test_ids_of_other_ranks_are_skipped_or_become_nan(ids: Any, elsewhere: bool) -> None:
    problem = Problem("route", 3, 4, 0, 0, "i32", "f32", top_k=3, first_expert=4, elsewhere=elsewhere, group_tile=8, deterministic=True)
    same(*routed(problem, np.array(ids, np.int32), np.full((3, 3), 0.5, np.float32), np.arange(1, 5, dtype=np.float32)))


@pytest.mark.parametrize("sm_count", [1, 2, 3, 9])
@pytest.mark.parametrize(("x_dtype", "rounded", "m", "hidden"), [
    ("bf16", False, 9, 320), ("nvfp4", False, 9, 320), ("nvfp4", False, 130, 64), ("bf16", False, 3, 4096),
    ("bf16", True, 9, 320), ("f16", True, 70, 64), ("f32", True, 3, 1600),
])  # fmt: skip
@pytest.mark.parametrize("group_tile", [16, 32])
def test_other_ctas_bring_activations(x_dtype: str, rounded: bool, m: int, hidden: int, group_tile: int, sm_count: int) -> None:
    """Bit for bit, signs of zeros and NaN scales included, while the first CTA sorts."""
    rng = np.random.default_rng(m)
    ids, router, w2_alpha = rng.integers(0, 7, (m, 2)).astype(np.int32), rng.random((m, 2), np.float32), rng.random(7, np.float32)
    given: dict[str, Any] = {"ids": ids, "router": router, "w2_alpha": w2_alpha}
    problem = Problem("route", m, 7, hidden, 0, "i32", "f32", top_k=2, group_tile=group_tile, x_dtype=x_dtype, x_rounded=rounded)
    own, expected = brought(rng, m, hidden, x_dtype, rounded)
    got, _ = launch("route.sm90a.t32x4096.c1x1.i32-f32.brings", problem, {**given, **own}, sm_count=sm_count)
    same(got, reference.route(ids, router, w2_alpha, group_tile=group_tile))
    found = got[problem.brought]
    stored = from_k64_order(found, hidden) if group_tile == 32 else found
    assert np.array_equal(stored, expected)
    assert not from_k64_order(found, found.shape[1])[:, hidden:].any()


def brought(rng: np.random.Generator, m: int, hidden: int, x_dtype: str, rounded: bool) -> tuple[dict[str, Any], Any]:
    """(activations by role, the bf16 bits that become of them): any bits, or values of many magnitudes that are rounded."""
    if rounded:
        values = rng.standard_normal((m, hidden)) * np.exp2(rng.integers(-12, 6, (m, hidden // 16))).repeat(16, axis=1)
        values[0, :16], values[-1, 16:32] = 0, 0
        x = {"bf16": bf16_bits, "f16": lambda each: each.astype(np.float16), "f32": lambda each: each.astype(np.float32)}[x_dtype](values)
        multiplier = np.float32(64)
        return {"x": x, "x.multiplier": np.array([multiplier])}, reference.rounded_bf16(bf16_values(x) if x_dtype == "bf16" else x, multiplier)
    if x_dtype == "bf16":
        x = rng.integers(0, 1 << 16, (m, hidden)).astype(np.uint16)
        return {"x": x}, x
    x = rng.integers(0, 256, (m, hidden // 2)).astype(np.uint8)
    scales = rng.integers(0, 0x7F, (-(-m // 128) * 128, hidden // 16)).astype(np.uint8)
    return {"x": x, "x.scales": scales}, reference.decoded_bf16(x, scales)


# ---- FC1 and FC2


@pytest.mark.parametrize(
    "key", ["groupedfc1.sm90a.t8x64.c1x1.bf16-f32", "groupedfc1.sm90a.t16x64.c1x1.bf16-bf16", "groupedfc2.sm90a.t8x64.c1x1.bf16-f32"]
)
def test_exact_data_is_exact(key: str) -> None:
    """Rule 1: bit for bit."""
    comparison, report = run(key, 21, 5, 2, 320, 192, "exact", sm_count=3)
    assert comparison.passed, comparison.detail
    assert report.products["mma.sync"] > 0


@pytest.mark.parametrize(
    "key", ["groupedfc1.sm90a.t8x64.c1x1.bf16-nvfp4", "groupedfc1.sm90a.t16x64.c1x1.bf16-f16", "groupedfc2.sm90a.t16x64.c1x1.bf16-bf16"]
)
def test_general_data_lies_within_the_bounds(key: str) -> None:
    """Rules 2 and 3."""
    comparison, _ = run(key, 13, 4, 3, 256, 128, "integers", sm_count=2)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("schedule", ["lazy", "random:1", "random:2", "pct:3:4"])
@pytest.mark.parametrize("key", ["groupedfc1.sm90a.t8x64.c1x1.bf16-f32", "groupedfc2.sm90a.t8x64.c1x1.bf16-f32"])
def test_every_schedule_gives_the_same_exact_result(key: str, schedule: str) -> None:
    comparison, _ = run(key, 10, 3, 2, 256, 64, "exact", schedule=schedule, sm_count=1, launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("early_list", [0, 1])
@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
def test_weights_are_read_before_the_launch_before_ends_only_where_the_lists_are_early(op: str, early_list: int) -> None:
    reads_lists_early_only_where_told(f"{op}.sm90a.t8x64.c1x1.bf16-f32", (10, 3, 2, 256, 64, "exact"), early_list)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("m", "experts", "top_k", "hidden", "intermediate", "sm_count"), [
    (1, 3, 2, 512, 64, 132),  # four row blocks a group, a warp a block
    (9, 2, 1, 192, 320, 2),  # three row blocks, which no larger group divides; three K blocks, cut anywhere
    (20, 7, 3, 256, 64, 1),  # items of one block: a tile's end in every step of some warps
    (16, 3, 2, 512, 192, 1),  # as many groups as converting allows; tiles of one row to all; the last K block half empty
    (70, 2, 1, 128, 128, 1),  # more tokens than one warp converts
])  # fmt: skip
@pytest.mark.parametrize(
    "key", ["groupedfc2.sm90a.t8x64.c1x1.bf16-f32", "groupedfc2.sm90a.t16x64.c1x1.bf16-bf16", "groupedfc2.sm90a.t16x64.c1x1.bf16-f16"]
)
def test_spans_of_fc2_are_cut_anywhere(key: str, m: int, experts: int, top_k: int, hidden: int, intermediate: int, sm_count: int) -> None:
    comparison, report = run(key, m, experts, top_k, hidden, intermediate, "exact", sm_count=sm_count, schedule="random:5", launches=2)
    assert comparison.passed, comparison.detail
    assert report.bytes["bulk global to shared"] % packing.expert_stride("fc2", hidden, intermediate) == 0


@pytest.mark.parametrize(("tile", "weight_rows"), [(8, 64), (16, 64), (32, 256)])
def test_a_scale_of_zero_selects_away_and_nan_stays(tile: int, weight_rows: int) -> None:
    """Three tokens of one expert: weights 0 over NaN activations, NaN, and 1 over zeros."""
    problem = Problem("groupedfc2", 3, 1, 64, 128, "bf16", "f32", top_k=1, group_tile=tile)
    routes = reference.route(np.zeros((3, 1), np.int32), np.array([[0.0], [np.nan], [1.0]], np.float32), np.ones(1, np.float32), group_tile=tile)
    activations = np.zeros((3, 128), np.uint16)
    activations[0] = 0x7FC0
    given = {"a.k64": k64_order(activations)} if problem.a_in_k64_order else {"a": activations}
    tensors = {**routes.packed(3), **given, "b": np.zeros(packing.packed_bytes("fc2", 1, 64, 128), np.uint8)}
    outputs, _ = launch(f"groupedfc2.sm90a.t{tile}x{weight_rows}.c1x1.bf16-f32", problem, tensors, sm_count=1)
    assert not outputs["c"][0].any()
    assert np.isnan(outputs["c"][1]).all()
    assert not outputs["c"][2].any()


def test_repeated_ids_of_a_token_add() -> None:
    comparison, _ = run("groupedfc2.sm90a.t8x64.c1x1.bf16-f32", 3, 4, 3, 128, 128, "exact", ids=[[1, 1, 2], [3, 3, 3], [0, 1, 2]], sm_count=1)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
def test_weights_of_an_expert_are_read_once_a_tile(op: str) -> None:
    """Ten tokens on one of four experts: two tiles of eight rows; the other experts cost nothing."""
    _, report = run(f"{op}.sm90a.t8x64.c1x1.bf16-f32", 10, 4, 1, 256, 128, "exact", ids=np.full((10, 1), 2))
    expert = packing.expert_stride("fc1" if op == "groupedfc1" else "fc2", 256, 128)
    assert report.bytes["bulk global to shared"] == 2 * expert


def test_fc2_without_any_row_is_zero() -> None:
    """Other ranks hold every chosen expert: the list has one tile of no rows, and the output is written."""
    problem = Problem("groupedfc2", 5, 4, 128, 128, "bf16", "bf16", top_k=2, group_tile=8)
    routes = reference.route(np.full((5, 2), 9), np.ones((5, 2)), np.ones(4), group_tile=8, elsewhere=True)
    tensors = {**routes.packed(10), "a": np.full((10, 128), 0x7FC0, np.uint16), "b": np.zeros(packing.packed_bytes("fc2", 4, 128, 128), np.uint8)}
    outputs, _ = launch("groupedfc2.sm90a.t8x64.c1x1.bf16-bf16", problem, tensors, sm_count=1)
    assert not outputs["c"].any()
