"""Grouped FC2 that adds in one order (sm90_ordered): the same bits under every schedule, units that several spans share, and who is absent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grouped_cases import NUMPY, launch, run

from densemoe.runtime import data, packing, reference
from densemoe.runtime.layout import k64_order
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

KEYS = (
    "groupedfc2.sm90a.t8x64.c1x1.bf16-f32.deterministic",
    "groupedfc2.sm90a.t16x64.c1x1.bf16-bf16.deterministic",
    "groupedfc2.sm90a.t16x256.c1x1.bf16-f16.deterministic",
    "groupedfc2.sm90a.t48x256.c1x1.bf16-bf16.deterministic",
    "groupedfc2.sm90a.t96x256.c1x1.bf16-f32.deterministic",
)
ONE, LARGE = KEYS[0], KEYS[4]
SCHEDULES = ("eager", "lazy", "random:1", "random:2", "pct:5:4")


def outputs_under(key: str, schedules: tuple[str, ...]) -> list[Any]:
    """FC2 of twelve tokens whose six experts each have one unit in more than one span, of values whose sum depends on the order of additions."""
    m, experts, top_k, hidden, intermediate = 12, 6, 6, 128, 640
    variant, rng = Variant.parse(key), np.random.default_rng(11)
    ordered = bool(variant.options)
    problem = Problem(
        "groupedfc2", m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype,
        top_k=top_k, group_tile=variant.tile_m, deterministic=ordered,
    )  # fmt: skip
    weights = data.fc2_weights(rng, experts, hidden, intermediate, "normal")
    a, _, _ = data.activations(rng, problem.a_rows, intermediate, variant.a_dtype, "normal")
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(m)])
    routes = reference.route(ids, rng.random(ids.shape, np.float32), rng.random(experts, np.float32), group_tile=variant.tile_m)
    tensors: dict[str, Any] = {**routes.given(problem), **({"a.k64": k64_order(a)} if problem.a_in_k64_order else {"a": a})}
    tensors["b"] = packing.pack_fc2(weights.codes, weights.scales, experts)
    workspaces: dict[str, Any] = {}
    return [launch(key, problem, tensors, schedule=each, sm_count=1, workspaces=workspaces)[0]["c"] for each in schedules]


@pytest.mark.parametrize("key", [ONE, LARGE])
def test_every_schedule_gives_the_same_bits(key: str) -> None:
    first, *others = outputs_under(key, SCHEDULES)
    assert all(np.array_equal(each.view(np.uint32), first.view(np.uint32)) for each in others)


def test_the_other_form_does_not() -> None:
    """What the test above would see, were rows added as they come."""
    first, *others = outputs_under(ONE.removesuffix(".deterministic"), SCHEDULES)
    assert not all(np.array_equal(each.view(np.uint32), first.view(np.uint32)) for each in others)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:3"])
@pytest.mark.parametrize("key", KEYS)
def test_exact_data_is_exact(key: str, schedule: str) -> None:
    """Rule 1, over ragged tiles, row blocks and K blocks, twice on the same workspace, whose slots are zero again."""
    comparison, _ = run(key, 37, 5, 3, 320, 192, "exact", sm_count=1, schedule=schedule, launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("m", "experts", "top_k", "hidden", "intermediate", "sm_count"), [
    (1, 3, 2, 512, 64, 132),  # a block a worker
    (9, 2, 1, 192, 320, 2),  # one expert a token; three row blocks, which no larger group divides
    (20, 3, 2, 128, 1792, 2),  # units longer than spans: up to fourteen workers share one
    (70, 4, 4, 128, 128, 1),  # pieces of eight tokens, the last of two
    (3, 40, 20, 64, 64, 1),  # more rows a token than are loaded together
    (2, 33, 32, 64, 64, 1),
])  # fmt: skip
@pytest.mark.parametrize("key", [ONE, LARGE])
def test_spans_are_cut_anywhere(key: str, m: int, experts: int, top_k: int, hidden: int, intermediate: int, sm_count: int) -> None:
    comparison, _ = run(key, m, experts, top_k, hidden, intermediate, "exact", sm_count=sm_count, schedule="random:5", launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("key", [KEYS[1], KEYS[3]])
def test_general_data_lies_within_the_bounds(key: str) -> None:
    """Rule 2."""
    comparison, _ = run(key, 50, 4, 3, 256, 384, "normal", sm_count=2)
    assert comparison.passed, comparison.detail


def test_repeated_ids_of_a_token_add() -> None:
    comparison, _ = run(ONE, 3, 4, 3, 128, 128, "exact", ids=[[1, 1, 2], [3, 3, 3], [0, 1, 2]], sm_count=1)
    assert comparison.passed, comparison.detail


def made(key: str, m: int, experts: int, ids: Any, router: Any, a: Any, elsewhere: bool = False) -> Any:
    """FC2 of zero weights on given activations; the output."""
    variant = Variant.parse(key)
    problem = Problem(
        "groupedfc2", m, experts, 64, 128, "bf16", variant.c_dtype, top_k=ids.shape[1], group_tile=variant.tile_m, deterministic=True
    )  # fmt: skip
    routes = reference.route(ids, router, np.ones(experts, np.float32), group_tile=variant.tile_m, elsewhere=elsewhere)
    tensors: dict[str, Any] = {**routes.given(problem), **({"a.k64": k64_order(a)} if problem.a_in_k64_order else {"a": a})}
    tensors["b"] = np.zeros(packing.packed_bytes("fc2", experts, 64, 128), np.uint8)
    c = launch(key, problem, tensors, sm_count=1)[0]["c"]
    assert c.dtype == NUMPY[variant.c_dtype]
    return c


@pytest.mark.parametrize("key", [ONE, LARGE])
def test_a_scale_of_zero_selects_away_and_nan_stays(key: str) -> None:
    """Three tokens of one expert: weights 0 over NaN activations, NaN, and 1 over zeros."""
    activations = np.zeros((3, 128), np.uint16)
    activations[0] = 0x7FC0
    c = made(key, 3, 1, np.zeros((3, 1), np.int32), np.array([[0.0], [np.nan], [1.0]], np.float32), activations)
    assert not c[0].any()
    assert np.isnan(c[1]).all()
    assert not c[2].any()


@pytest.mark.parametrize("key", [ONE, LARGE])
def test_pairs_of_other_ranks_add_nothing(key: str) -> None:
    """Their rows do not exist; a token of none at all is zero, and where no token has one the output is written all the same."""
    finite, nan = np.zeros((10, 128), np.uint16), np.full((10, 128), 0x7FC0, np.uint16)
    some = np.array([[0, 9], [9, 9], [9, 1], [0, 1], [9, 9]], np.int32)
    assert not made(key, 5, 4, some, np.ones((5, 2), np.float32), finite, elsewhere=True).any()
    assert not made(key, 5, 4, np.full((5, 2), 9, np.int32), np.ones((5, 2), np.float32), nan, elsewhere=True).any()
