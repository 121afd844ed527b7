"""The WGMMA kernels over gathered tokens on the emulator: every tile and dtype, ragged tiles, units shared by many CTAs, every schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grouped_cases import launch, reads_lists_early_only_where_told, run

from densemoe.runtime import packing, reference
from densemoe.runtime.layout import k64_order
from densemoe.runtime.nvfp4 import bf16_values
from densemoe.runtime.problem import Problem

TILES = (16, 32, 48, 64, 96, 128, 160)


def ids_of(counts: list[int]) -> Any:
    """[tokens, 1] ids such that expert e is chosen ``counts[e]`` times, dealt round."""
    ids = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(1).permutation(ids)[:, None]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
def test_exact_data_is_exact(op: str, tile: int) -> None:
    """Rule 1, with experts of 0, 1, tile − 1, tile and tile + 1 tokens, K of 2.5 blocks and output columns that fill no whole unit."""
    counts = [0, 1, tile - 1, tile, tile + 1]
    c_dtype = "bf16" if op == "groupedfc1" else "f32"
    key = f"{op}.sm90a.t{tile}x256.c1x1.bf16-{c_dtype}"
    comparison, report = run(key, sum(counts), 5, 1, 320, 192, "exact", ids=ids_of(counts), sm_count=2)
    assert comparison.passed, comparison.detail
    assert report.products["mma.sync" if tile == 16 else "wgmma"] > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("op", "c_dtype"), [("groupedfc1", "nvfp4"), ("groupedfc2", "f16")])
def test_general_data_lies_within_the_bounds(op: str, c_dtype: str, tile: int) -> None:
    """Rules 2 and 3."""
    comparison, _ = run(f"{op}.sm90a.t{tile}x256.c1x1.bf16-{c_dtype}", tile + 5, 3, 2, 256, 320, "integers", sm_count=2)
    assert comparison.passed, comparison.detail


@pytest.mark.sampled(2)
@pytest.mark.parametrize("schedule", ["lazy", "random:1", "random:2", "pct:3:4"])
@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize(("op", "c_dtype"), [("groupedfc1", "bf16"), ("groupedfc2", "f32")])
def test_every_schedule_gives_the_same_exact_result(op: str, c_dtype: str, tile: int, schedule: str) -> None:
    comparison, _ = run(f"{op}.sm90a.t{tile}x256.c1x1.bf16-{c_dtype}", tile + 3, 3, 2, 448, 64, "exact", schedule=schedule, sm_count=3, launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize(
    ("op", "tile", "widths"),
    [
        ("groupedfc1", 16, (8, 16)),
        ("groupedfc1", 32, (24, 32)),
        ("groupedfc2", 48, (32, 40, 48)),
        ("groupedfc1", 64, (48, 64)),
        ("groupedfc2", 64, (40, 64)),
        ("groupedfc1", 96, (80, 96)),
        ("groupedfc2", 128, (112, 128)),
        ("groupedfc1", 160, (144, 160)),
    ],
)
def test_a_tile_takes_the_narrowest_width_that_holds_its_rows(op: str, tile: int, widths: tuple[int, ...]) -> None:
    """An expert for each width and one of a row more than the narrower: every loop has products, and all are right."""
    counts = sorted({1, *widths, *(width + 1 for width in widths[:-1])})
    key = f"{op}.sm90a.t{tile}x256.c1x1.bf16-bf16"
    comparison, _ = run(key, sum(counts), len(counts), 1, 192, 128, "exact", ids=ids_of(counts), sm_count=2, schedule="random:2")
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("early_list", [0, 1])
@pytest.mark.parametrize(("op", "c_dtype"), [("groupedfc1", "bf16"), ("groupedfc2", "f32")])
def test_weights_are_read_before_the_launch_before_ends_only_where_the_lists_are_early(op: str, c_dtype: str, early_list: int) -> None:
    reads_lists_early_only_where_told(f"{op}.sm90a.t32x256.c1x1.bf16-{c_dtype}", (10, 3, 2, 256, 64, "exact"), early_list)


@pytest.mark.parametrize("sm_count", [1, 2, 5, 132])
def test_fc1_units_may_lie_in_any_number_of_spans(sm_count: int) -> None:
    """One unit of 18 K blocks a tile: whole, halved, and cut into pieces of the smallest span."""
    comparison, _ = run("groupedfc1.sm90a.t16x256.c1x1.bf16-bf16", 40, 2, 1, 2304, 128, "exact", sm_count=sm_count, launches=2)
    assert comparison.passed, comparison.detail


def test_fc1_has_the_same_bits_whichever_cta_comes_last() -> None:
    """Sums over CTAs have one order."""
    rng = np.random.default_rng(3)
    m, experts, hidden, intermediate = 20, 2, 1152, 128
    problem = Problem("groupedfc1", m, experts, hidden, intermediate, "bf16", "bf16", top_k=1, group_tile=16)
    routes = reference.route(rng.integers(0, experts, (m, 1)), np.ones((m, 1)), np.ones(experts), group_tile=16)
    given = routes.packed(m)
    weights = packing.pack_fc1(
        rng.integers(0, 256, (experts, 2 * intermediate, hidden // 2), dtype=np.uint8),
        rng.integers(40, 80, (experts * 2 * intermediate, hidden // 16), dtype=np.uint8),
    )
    a = (rng.standard_normal((m, hidden)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    tensors = {"a": a, "b": weights, "alpha": np.full(experts, 1e-3, np.float32), "tiles": given["tiles"], "rows": given["rows"]}
    key = "groupedfc1.sm90a.t16x256.c1x1.bf16-bf16"
    schedules = ("eager", "lazy", "random:4", "random:7", "pct:2:3")
    results = [launch(key, problem, tensors, schedule=schedule, sm_count=2)[0]["c"] for schedule in schedules]
    assert all(np.array_equal(results[0], each) for each in results[1:])


@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize(("op", "c_dtype", "hidden", "intermediate"), [("groupedfc1", "bf16", 64, 128), ("groupedfc2", "bf16", 256, 64)])
def test_units_of_a_single_k_block(op: str, c_dtype: str, hidden: int, intermediate: int, tile: int) -> None:
    """Every block begins another unit: rows are known early enough."""
    comparison, _ = run(
        f"{op}.sm90a.t{tile}x256.c1x1.bf16-{c_dtype}", tile + 7, 6, 3, hidden, intermediate, "exact", schedule="random:5", sm_count=1
    )  # fmt: skip
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
def test_weights_of_an_expert_are_read_once_a_tile(op: str) -> None:
    """Forty tokens on one of four experts: two tiles of 32 rows at most; the other experts cost nothing."""
    _, report = run(f"{op}.sm90a.t32x256.c1x1.bf16-bf16", 40, 4, 1, 256, 256, "exact", ids=np.full((40, 1), 2))
    expert = packing.expert_stride("fc1" if op == "groupedfc1" else "fc2", 256, 256)
    assert report.bytes["bulk global to shared"] == 2 * expert


def test_repeated_ids_of_a_token_add() -> None:
    comparison, _ = run("groupedfc2.sm90a.t16x256.c1x1.bf16-f32", 3, 4, 3, 128, 128, "exact", ids=[[1, 1, 2], [3, 3, 3], [0, 1, 2]], sm_count=1)
    assert comparison.passed, comparison.detail


def test_fc2_without_any_row_is_zero() -> None:
    """Other ranks hold every chosen expert: the list has one tile of no rows, and the output is written."""
    problem = Problem("groupedfc2", 5, 4, 128, 128, "bf16", "bf16", top_k=2, group_tile=16)
    routes = reference.route(np.full((5, 2), 9), np.ones((5, 2)), np.ones(4), group_tile=16, elsewhere=True)
    tensors = {**routes.packed(10), "a": np.full((10, 128), 0x7FC0, np.uint16), "b": np.zeros(packing.packed_bytes("fc2", 4, 128, 128), np.uint8)}
    outputs, _ = launch("groupedfc2.sm90a.t16x256.c1x1.bf16-bf16", problem, tensors, sm_count=1)
    assert not outputs["c"].any()


def test_a_row_whose_alpha_is_zero_adds_nothing_whatever_it_holds() -> None:
    """Selected away, not multiplied: contract section 5."""
    problem = Problem("groupedfc2", 2, 2, 128, 128, "bf16", "f32", top_k=1, group_tile=16)
    routes = reference.route(np.array([[0], [1]]), np.array([[0.0], [1.0]], np.float32), np.ones(2), group_tile=16)
    a = np.full((2, 128), 0x3F80, np.uint16)
    a[0] = 0x7FC0  # NaN, in the row of expert 0, whose weight is 0
    tensors = {**routes.packed(2), "a": a, "b": np.zeros(packing.packed_bytes("fc2", 2, 128, 128), np.uint8)}
    outputs, _ = launch("groupedfc2.sm90a.t16x256.c1x1.bf16-f32", problem, tensors, sm_count=1)
    assert np.array_equal(outputs["c"], np.zeros((2, 128), np.float32))


@pytest.mark.parametrize("tile", [16, 32, 64, 96])
def test_rows_that_a_tile_does_not_have_may_hold_anything(tile: int) -> None:
    """In their places kernels may bring token 0, or rows of other tiles: NaN there stays there, in a unit that CTAs share too."""
    m, hidden, intermediate = 5, 1152, 128
    ids, ones = np.array([[0], [1], [1], [2], [2]]), np.full((m, 1), 1.0)
    routes = reference.route(ids, ones, np.ones(3), group_tile=tile)
    packed = routes.packed(m)
    for op, width in (("groupedfc1", hidden), ("groupedfc2", intermediate)):
        a = np.full((m, width), 0x3F80, np.uint16)
        a[0] = 0x7FC0  # token 0, which is also the first compact row: expert 0's alone
        weights = np.zeros(packing.packed_bytes(op.removeprefix("grouped"), 3, hidden, intermediate), np.uint8)
        problem = Problem(op, m, 3, hidden, intermediate, "bf16", "f32" if op == "groupedfc2" else "bf16", top_k=1, group_tile=tile)
        given = {**packed, "a": a, "a.k64": k64_order(a), "alpha": np.ones(3, np.float32)}
        tensors = {"b": weights, **{role: given[role] for role in problem.tensors() if role in given}}
        outputs, _ = launch(f"{op}.sm90a.t{tile}x256.c1x1.bf16-{problem.c_dtype}", problem, tensors, sm_count=2)
        c = outputs["c"] if op == "groupedfc2" else bf16_values(outputs["c.k64" if problem.c_in_k64_order else "c"])
        assert np.isnan(c[0]).all()
        assert not c[1:].any()  # weights are 0
