"""Grouped GEMMs that sort the router's choice themselves, on the emulator: within the contract's bounds whatever was chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from grouped_cases import launch, ptx_of, reads_lists_early_only_where_told, run

from densemoe.runtime import packing
from densemoe.runtime.problem import Problem

FC1, FC2 = "groupedfc1.sm90a.t8x64.c1x1.bf16-bf16.routes", "groupedfc2.sm90a.t8x64.c1x1.bf16-f32.routes"
OTHERS = ("groupedfc2.sm90a.t8x64.c1x1.bf16-bf16.routes", "groupedfc2.sm90a.t8x64.c1x1.bf16-f16.routes")

#: [M, k] of experts: what a sort has to get right.
CHOICES: dict[str, Any] = {
    "one pair": [[2]],
    "one expert, tiles of 8, 8, 8 and 8 rows": [[0]] * 32,
    "one expert, its last tile of one row": [[1]] * 25,
    "eight pairs, descending": [[7, 6, 5, 4, 3, 2, 1, 0]],
    "nine pairs": [[2, 0, 1], [1, 2, 0], [0, 2, 1]],
    "sixteen pairs": [[3, 1], [1, 3], [0, 2], [2, 0], [3, 2], [1, 0], [3, 0], [1, 2]],
    "seventeen pairs": [[each % 5] for each in range(17)],
    "thirty-two experts": [[31 - each] for each in range(32)],
    "an expert twice in a token": [[4, 4, 1], [1, 4, 4]],
    "tiles that end in the middle": [[0]] * 9 + [[2]] * 17 + [[5]] * 6,
}


@pytest.mark.parametrize("ids", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("key", [FC1, FC2])
def test_every_choice_is_sorted(key: str, ids: Any) -> None:
    """Rule 1: bit for bit; as ``route`` would have sorted it."""
    m, top_k = np.shape(ids)
    comparison, _ = run(key, m, max(map(max, ids)) + 1, top_k, 192, 192, "exact", ids=ids, sm_count=2, launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("key", [FC1, FC2])
def test_random_choices_are_sorted(key: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    m, experts = int(rng.integers(1, 33)), int(rng.integers(1, 40))
    top_k = int(rng.integers(1, 32 // m + 1))
    ids = rng.integers(0, experts, (m, top_k))
    comparison, _ = run(key, m, experts, top_k, 128, 128, "exact", ids=ids, sm_count=int(rng.integers(1, 4)), schedule=f"random:{seed}")
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("key", [FC1, *OTHERS])
def test_general_data_lies_within_the_bounds(key: str) -> None:
    """Rules 2 and 3."""
    comparison, report = run(key, 8, 5, 3, 256, 128, "integers", sm_count=2)
    assert comparison.passed, comparison.detail
    assert report.products["mma.sync"] > 0


@pytest.mark.parametrize("id_dtype", ["i32", "i64"])
@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("key", [FC1, FC2])
def test_ids_of_other_ranks_are_skipped_or_become_nan(key: str, elsewhere: bool, id_dtype: str) -> None:
    ids = [[9, 4, 11], [5, 6, 7], [4, 4, -1], [8, 3, 5]]
    comparison, _ = run(key, 4, 4, 3, 64, 64, "normal", ids=ids, sm_count=1, first_expert=4, elsewhere=elsewhere, id_dtype=id_dtype)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("key", [FC1, FC2])
def test_a_rank_that_nobody_chose_reads_no_token_and_writes_zeros(key: str) -> None:
    """Activations are NaN: none may reach the output."""
    op = key.split(".")[0]
    problem = Problem(op, 3, 4, 64, 64, "bf16", key.split("-")[1].split(".")[0], top_k=2, group_tile=8, routes=True, id_dtype="i32", elsewhere=True)
    tensors: dict[str, Any] = {
        "a": np.full((problem.a_rows, problem.k), 0x7FC0, np.uint16),
        "b": np.zeros(packing.packed_bytes(op.removeprefix("grouped"), 4, 64, 64), np.uint8),
        "ids": np.full((3, 2), 9, np.int32),
        "router": np.ones((3, 2), np.float32),
        "w2_alpha": np.ones(4, np.float32),
        "alpha": np.ones(4, np.float32),
    }
    outputs, _ = launch(key, problem, {role: each for role, each in tensors.items() if role in ("b", *problem.tensors())}, sm_count=1)
    if op == "groupedfc2":
        assert not outputs["c"].any()
    else:
        assert (outputs["c"] == 0x5A).all(), "rows that no tile has are not written"


@pytest.mark.parametrize("schedule", ["lazy", "random:1", "pct:3:4"])
@pytest.mark.parametrize("key", [FC1, FC2])
def test_every_schedule_gives_the_same_exact_result(key: str, schedule: str) -> None:
    comparison, _ = run(key, 10, 3, 2, 256, 64, "exact", schedule=schedule, sm_count=1, launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("early_list", [0, 1])
@pytest.mark.parametrize("key", [FC1, FC2])
def test_weights_are_read_before_the_launch_before_ends_only_where_the_choice_is_early(key: str, early_list: int) -> None:
    reads_lists_early_only_where_told(key, (10, 3, 2, 256, 64, "exact"), early_list)


@pytest.mark.parametrize("key", [FC1, FC2])
def test_no_warp_waits_for_another_to_sort(key: str) -> None:
    """The lists are in registers: before the first weights are fetched there is no barrier of the CTA."""
    assert "bar.sync" not in ptx_of(key).split("cp.async.bulk")[0]
