"""The grids of contract section 9 in the emulator: a covering array for every tile and cluster (--full), a few of its cases otherwise.

The array is dealt out to the output dtypes of a tile and cluster, which share the main loop; every variant runs at least 12 cases of it.

A case's schedule follows from its numbers: random, and the same on every machine. Every variant meets ragged M, and clusters that are padded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import covering
import emulated

from densemoe.compile import matrix
from densemoe.runtime.variant import C_DTYPES, Variant

SHIPPED = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_100f" and each.variant.op in ("fc1", "fc2")]
SM_COUNT = 16  # CTAs take several tiles in most cases


def run(variant: Variant, case: covering.Case) -> None:
    """One case in a random schedule; a fault names both."""
    number = sum(value * 31**i for i, value in enumerate(case)) % 1000
    options = {"schedule": f"random:{number}", "sm_count": SM_COUNT, "seed": number}
    try:
        if variant.op == "fc1":
            experts, rows, m, hidden, post = case
            outcome = emulated.fc1(variant.key, m, experts, hidden, rows // 2, post=bool(post), prefetch=3 * (number % 2), **options)
        else:
            experts, intermediate, m, hidden = case
            outcome = emulated.fc2(
                variant.key, m, experts, hidden, intermediate, scalar=number % 3 == 0, splits=(1, 2, 4)[number % 3], **options
            )
        outcome.check()
        assert outcome.run.lints == []
    except Exception as error:
        raise AssertionError(f"{variant.key} {dict(zip(covering.AXES[variant.op], case, strict=True))} {options}: {error}") from error


def cases_of(variant: Variant) -> list[covering.Case]:
    """A variant's share of the array."""
    dtypes = C_DTYPES[variant.op]
    return covering.share(variant.op, dtypes.index(variant.c_dtype), len(dtypes))


@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_the_arrays_cover_every_pair(op: str) -> None:
    axes = covering.AXES[op]
    tiles: dict[tuple[int, ...], set[covering.Pair]] = {}
    for variant in SHIPPED:
        if variant.op != op:
            continue
        cases = cases_of(variant)
        assert len(set(cases)) == len(cases) >= covering.LEAST
        assert any(case[list(axes).index("m")] % 128 for case in cases)
        tile = (variant.tile_m, variant.tile_n, variant.cluster_m, variant.cluster_n)
        tiles.setdefault(tile, set()).update(*(covering.pairs_of(case) for case in cases))
    for pairs in tiles.values():
        assert pairs == covering.all_pairs(list(axes.values()))


@pytest.mark.parametrize("variant", [each for each in SHIPPED if each.c_dtype in ("nvfp4", "bf16")][::5], ids=lambda each: each.key)
def test_a_few_cases(variant: Variant) -> None:
    for case in sorted(cases_of(variant), key=covering.cost_of(variant.op))[1:4]:
        run(variant, case)


@pytest.mark.full
@pytest.mark.parametrize("variant", SHIPPED, ids=lambda each: each.key)
def test_a_variant_s_share_of_the_array(variant: Variant) -> None:
    for case in cases_of(variant):
        run(variant, case)
