"""How grouped FC2 ends (sm90_conversion): the CTA that completes a row block, or CTAs behind all others; and rows on their way to the workspace."""

from __future__ import annotations

from typing import Any

import grouped_cases
import numpy as np
import pytest
from grouped_cases import kernel_of, run

from densemoe.compile import kernels
from densemoe.compile.kernels.sm90_conversion import LARGEST_FINISHED
from densemoe.runtime.errors import EmulatorError
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import evaluate
from densemoe.runtime.variant import Variant

KEYS = (
    "groupedfc2.sm90a.t8x64.c1x1.bf16-f32",
    "groupedfc2.sm90a.t16x64.c1x1.bf16-bf16",
    "groupedfc2.sm90a.t16x64.c1x1.bf16-f16",
    "groupedfc2.sm90a.t16x256.c1x1.bf16-f32",
    "groupedfc2.sm90a.t64x256.c1x1.bf16-bf16",
    "groupedfc2.sm90a.t128x256.c1x1.bf16-bf16",
)
MMA, WGMMA = KEYS[0], KEYS[3]


def grid(key: str, m: int, hidden: int, sm_count: int) -> tuple[int, int]:
    """CTAs of a launch: (those that add, those that convert)."""
    variant = Variant.parse(key)
    problem = Problem("groupedfc2", m, 4, hidden, 128, variant.a_dtype, variant.c_dtype, top_k=2, group_tile=variant.tile_m)
    recipe = kernels.load(kernel_of(variant)).recipe(variant)
    names = recipe.bind({**problem.names(), "early_list": 0, "sm_count": sm_count})
    adding = names["adding"]
    return adding, evaluate(recipe.grid[0], names) - adding


@pytest.mark.sampled(2)
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:3", "pct:3:7"])
@pytest.mark.parametrize("key", KEYS)
def test_ctas_behind_all_others_convert_every_piece(key: str, schedule: str) -> None:
    """100 tokens x 320 columns are 20 pieces of 32 x 64, the last of each row block four tokens; one SM's converting CTA takes turns at them."""
    comparison, _ = run(key, 100, 4, 2, 320, 64, "exact", sm_count=1, schedule=schedule, launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("key", KEYS)
def test_pieces_are_dealt_out_to_many_ctas(key: str) -> None:
    comparison, _ = run(key, 70, 3, 1, 448, 128, "exact", sm_count=5, schedule="random:1", launches=2)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("m", [LARGEST_FINISHED - 1, LARGEST_FINISHED, LARGEST_FINISHED + 1])
def test_both_ends_give_the_same_at_their_border(m: int) -> None:
    comparison, _ = run(MMA, m, 3, 1, 128, 192, "exact", sm_count=2, schedule="random:2", launches=2)
    assert comparison.passed, comparison.detail


def test_who_converts() -> None:
    """`mma.sync`: nobody else up to 64 tokens, then a warp a piece and no more CTAs than SMs; WGMMA: always others."""
    assert [grid(MMA, m, 1024, 132)[1] for m in (1, 64, 65, 128, 512)] == [0, 0, 12, 16, 64]
    assert grid(MMA, 512, 7168, 132)[1] == 132
    assert [grid(WGMMA, m, 1024, 132)[1] for m in (1, 64, 65)] == [4, 8, 12]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("sm_count", [2, 7, 132])
def test_those_that_convert_leave_room_for_those_that_add(key: str, sm_count: int) -> None:
    """At most half of the CTAs that an idle device holds, or they could wait for ever were they to begin first."""
    adding, converting = grid(key, 4096, 7168, sm_count)  # as many add as the device holds
    assert 0 < 2 * converting <= adding


@pytest.mark.parametrize("tile", ["8x64", "16x64", *(f"{rows}x256" for rows in (16, 32, 48, 64, 96, 128, 160))])
@pytest.mark.parametrize("middle", ["bf16", "nvfp4"])
def test_a_cta_of_fc2_fits_into_the_shared_memory_that_one_of_fc1_leaves(tile: str, middle: str) -> None:
    """They take each other's places while others still run: a smaller hole would stay empty until its neighbour ends (docs/h200.md)."""
    one, two = (Variant.parse(f"grouped{op}.sm90a.t{tile}.c1x1.bf16-{written}") for op, written in (("fc1", middle), ("fc2", "bf16")))
    left, needed = (kernels.load(kernel_of(each)).recipe(each).dynamic_smem for each in (one, two))
    assert needed <= left


# ---- what it rests on: taken away, the emulator notices


def edited(monkeypatch: pytest.MonkeyPatch, key: str, what: str, by: str, occurrence: int = 0) -> None:
    """Replaces one occurrence of a text in the PTX of ``key``."""
    ptx = grouped_cases.ptx_of(key)
    parts = ptx.split(what)
    assert len(parts) > occurrence + 1, f"{what!r} stands {len(parts) - 1} times in the PTX"
    changed = what.join(parts[: occurrence + 1]) + by + what.join(parts[occurrence + 1 :])
    monkeypatch.setattr(grouped_cases, "ptx_of", lambda _: changed)


def convert(key: str, **options: Any) -> None:
    comparison, _ = run(key, 70, 3, 1, 128, 64, "exact", sm_count=2, **options)
    assert comparison.passed, comparison.detail


def test_a_converting_cta_that_does_not_wait_races(monkeypatch: pytest.MonkeyPatch) -> None:
    """The poll reads what is wanted at once: sums are read that others have yet to add."""
    poll = "ld.acquire.gpu.global.b32"
    ptx = grouped_cases.ptx_of(WGMMA)
    line = next(line for line in ptx.split("\n") if poll in line)
    register = line.split(poll)[1].split(",")[0].strip()
    routed = np.array([[0]] * 40 + [[1]] * 20 + [[2]] * 10)
    tiles = 3 + 2 + 1  # of 16 rows; one K 128 block each
    edited(monkeypatch, WGMMA, line, f"mov.b32 {register}, {tiles};")
    with pytest.raises(EmulatorError, match="race"):
        convert(WGMMA, schedule="lazy", ids=routed)


def test_sums_that_are_counted_without_a_fence_race(monkeypatch: pytest.MonkeyPatch) -> None:
    edited(monkeypatch, WGMMA, "fence.acq_rel.gpu;", "")
    with pytest.raises(EmulatorError, match="race"):
        convert(WGMMA, schedule="random:1")


def test_counters_that_are_not_cleared_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = "st.relaxed.gpu.global.b32"
    line = next(line for line in grouped_cases.ptx_of(WGMMA).split("\n") if clear in line)
    edited(monkeypatch, WGMMA, line, "")
    with pytest.raises(AssertionError):
        convert(WGMMA)


# ---- rows on their way


@pytest.mark.parametrize("key", KEYS)
def test_rows_pass_through_shared_memory_without_bank_conflicts(key: str) -> None:
    """The swizzle spreads a warp's stores and loads over all banks, of tokens too; weights are read 512 bytes at a time. Of two warpgroups' scales a
    lane reads eight bytes of sixteen, which takes two cycles more: eight warps, two halves, two units."""
    _, report = run(key, 100, 2, 1, 256, 128, "exact", sm_count=1)
    assert report.bank_conflicts == (2 * 8 * 2 * 2 if "t128" in key else 0)


@pytest.mark.parametrize("key", KEYS)
def test_rows_of_a_token_that_chose_an_expert_twice_add(key: str) -> None:
    """Both rows lie in one tile, and in one step of the lanes that add them."""
    comparison, _ = run(key, 3, 2, 4, 128, 64, "exact", ids=np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]), sm_count=1)
    assert comparison.passed, comparison.detail
