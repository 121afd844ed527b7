"""The grids of contract section 9 in the emulator: a sample that the commit chooses; with --full a covering array for every variant, and the whole.

The array is dealt out to the output dtypes of a tile and cluster, which share the main loop; every variant runs at least 12 cases of it, in random
schedules that follow from the cases. Every variant meets ragged M, and clusters that are padded.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import covering
import grid_cases
from grid_cases import SHIPPED

from densemoe.runtime.variant import C_DTYPES, Variant

SAMPLED = 12  # runs
DEAREST = 400  # cost of a sampled case: some two seconds


def cases_of(variant: Variant) -> list[covering.Case]:
    """A variant's share of the array, and one case off the grid: ragged, with one tile more than fills its clusters. The grid's sizes are powers of
    two but for 2I = 2816, so some clusters of two never meet a padded CTA there."""
    dtypes = C_DTYPES[variant.op]
    odd = (3, variant.tile_n, 129, 320, 1) if variant.op == "fc1" else (3, 256, 129, variant.tile_n * variant.cluster_n + 64)
    return [*covering.share(variant.op, dtypes.index(variant.c_dtype), len(dtypes)), odd]


def padded(variant: Variant, case: covering.Case) -> bool:
    """Whether some CTAs of a cluster have no tile."""
    columns = case[0] * case[1] if variant.op == "fc1" else case[3]
    m = case[2]
    row_tiles = -(-m // 128)
    return bool(-(-columns // variant.tile_n) % variant.cluster_n or row_tiles % variant.cluster_m)


@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_the_arrays_cover_every_pair(op: str) -> None:
    axes = covering.AXES[op]
    tiles: dict[tuple[int, ...], set[covering.Pair]] = {}
    for variant in SHIPPED:
        if variant.op != op:
            continue
        cases = cases_of(variant)
        assert len(set(cases)) == len(cases) > covering.LEAST
        assert any(case[2] % 128 for case in cases)
        assert variant.cluster_m * variant.cluster_n == 1 or any(padded(variant, case) for case in cases), variant.key
        tile = (variant.tile_m, variant.tile_n, variant.cluster_m, variant.cluster_n)
        tiles.setdefault(tile, set()).update(*(covering.pairs_of(case) for case in cases))
    for pairs in tiles.values():
        assert pairs >= covering.all_pairs(list(axes.values()))


@pytest.mark.parametrize(("op", "cases", "share"), [("fc1", 384, 0.66), ("fc2", 180, 0.66)])
def test_the_whole_grid_is_the_contract_s(op: str, cases: int, share: float) -> None:
    """Every case on one tile and cluster at least; the given share of them on all."""
    tasks = list(grid_cases.whole_grid(op))
    assert {case for _, case, _ in tasks} == set(itertools.product(*covering.AXES[op].values()))
    assert len(tasks) == cases
    geometries = {each.key for each in grid_cases.GEOMETRIES if each.op == op}
    assert len(geometries) == {"fc1": 8, "fc2": 10}[op]
    assert {key for keys, _, _ in tasks if len(keys) == 1 for key in keys} == geometries  # each meets dear cases too
    assert sum(set(keys) == geometries for keys, _, _ in tasks) > share * cases


@pytest.mark.parametrize("number", range(SAMPLED))
def test_a_sample_that_the_commit_chooses(number: int, sample_seed: str) -> None:
    """A fault names variant, case and schedule; `pytest --sample SEED` repeats the sample of a commit."""
    grid_cases.run_task(grid_cases.sample(sample_seed, SAMPLED, DEAREST)[number])


def test_a_sample_follows_from_its_seed() -> None:
    first = grid_cases.sample("a", 50, DEAREST)
    assert first == grid_cases.sample("a", 50, DEAREST)
    assert first[:SAMPLED] == grid_cases.sample("a", SAMPLED, DEAREST)
    assert first != grid_cases.sample("b", 50, DEAREST)
    assert len({keys for keys, _, _ in first}) > 25


@pytest.mark.full
@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_every_variant_runs_its_share_of_the_array(op: str) -> None:
    tasks = [((each.key,), case, "random") for each in SHIPPED if each.op == op for case in cases_of(each)]
    tasks.sort(key=lambda task: -covering.cost_of(op)(task[1]))  # dear ones first: the cores end together
    assert grid_cases.run_all(tasks) == len(tasks) >= covering.LEAST * sum(each.op == op for each in SHIPPED)


@pytest.mark.full
@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_the_whole_grid(op: str) -> None:
    tasks = list(grid_cases.whole_grid(op))
    assert grid_cases.run_all(tasks) == sum(len(keys) for keys, _, _ in tasks)
