"""FC2 by tcgen05 in the emulator: exact data bit for bit in every split, general data within the bounds, lists, selection, determinism."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import emulated

from densemoe.compile import matrix
from densemoe.runtime import data

VARIANTS = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_100f" and each.variant.op == "fc2"]
BF16 = [each.key for each in VARIANTS if each.c_dtype == "bf16"]
PLAIN = "fc2.sm100f.t128x128.c1x1.nvfp4-f32"
NARROW = "fc2.sm100f.t128x64.c1x2.nvfp4-f32"
WIDE = "fc2.sm100f.t128x256.c1x1.nvfp4-f32"
PAIR = "fc2.sm100f.t256x128.c2x1.nvfp4-f32"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("key", BF16)
@pytest.mark.parametrize(("splits", "schedule"), [(1, "eager"), (2, "random:5"), (4, "lazy")])
def test_exact_data_is_exact_with_ragged_m_and_h(key: str, splits: int, schedule: str) -> None:
    """H = 192 ends inside a tile of every width; clusters are padded; a third of the alphas is 0; splits end inside an expert."""
    emulated.fc2(key, 129, 3, 192, 512, kind="exact", zeros=0.3, splits=splits, schedule=schedule).check()


@pytest.mark.parametrize("key", BF16)
def test_general_data_is_within_the_bound(key: str) -> None:
    emulated.fc2(key, 40, 2, 256, 256, kind="normal").check()


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("shape", ["t128x64.c1x1", "t128x256.c1x2", "t256x128.c2x1"])
def test_other_outputs(shape: str, dtype: str) -> None:
    emulated.fc2(f"fc2.sm100f.{shape}.nvfp4-{dtype}", 5, 2, 320, 256, kind="integers", splits=2).check()


@pytest.mark.parametrize("m", [1, 7, 8, 9, 127, 128, 129, 255, 257, 511, 512])
@pytest.mark.parametrize("key", [PLAIN, PAIR])
def test_any_m_reads_and_writes_its_own_rows(key: str, m: int) -> None:
    """Alpha ends at row M: the reference read past it when M > 128 was ragged, and with 2-CTA tiles (contract section 10)."""
    emulated.fc2(key, m, 1, 64, 256, kind="exact", splits=2 if m > 128 else 1).check()


@pytest.mark.parametrize("key", [PLAIN, NARROW, WIDE, PAIR])
@pytest.mark.parametrize("splits", [1, 4])
def test_a_scalar_alpha_runs_through_all_experts(key: str, splits: int) -> None:
    emulated.fc2(key, 20, 5, 192, 256, kind="exact", scalar=True, splits=splits).check()


def test_a_scalar_alpha_of_zero_gives_zero() -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["alpha"][:] = 0
        data.poison_activations(tensors, [2])

    outcome = emulated.fc2(PLAIN, 4, 2, 64, 256, scalar=True, edit=edit)
    assert not outcome.tensors["c"].any()


@pytest.mark.parametrize("key", [PLAIN, NARROW, WIDE, PAIR])
@pytest.mark.parametrize("active", [[], [2], [0, 3, 4]])
@pytest.mark.parametrize("splits", [1, 4])
def test_only_listed_experts_are_read(key: str, active: list[int], splits: int) -> None:
    """Activations of experts that are not listed are NaN, as FC1 leaves them unwritten: nothing of them may be used."""

    def edit(tensors: dict[str, Any]) -> None:
        for expert in range(5):
            if expert not in active:
                data.poison_activations(tensors, np.arange(20), slice(expert * 256, (expert + 1) * 256))

    outcome = emulated.fc2(key, 20, 5, 192, 256, kind="exact", active=active, splits=splits, edit=edit)
    outcome.check()
    if not active:
        assert not outcome.tensors["c"].any()


def test_alpha_of_zero_selects_nan_away() -> None:
    """Dense: NaN activations of one expert in two tokens whose alpha there is exactly 0."""

    def edit(tensors: dict[str, Any]) -> None:
        data.poison_activations(tensors, [1, 129], slice(256, 512))
        tensors["alpha"][[1, 129], 1] = 0

    emulated.fc2("fc2.sm100f.t128x128.c1x2.nvfp4-bf16", 130, 3, 192, 256, edit=edit).check()


@pytest.mark.parametrize("kind", ["raw", "extreme"])
def test_zero_subnormal_and_saturating_scales(kind: str) -> None:
    emulated.fc2(WIDE, 33, 2, 256, 256, kind=kind).check()


@pytest.mark.parametrize("key", [PLAIN, NARROW, WIDE, PAIR])
def test_split_k_gives_equal_bits_in_every_schedule_and_leaves_its_tickets_clear(key: str) -> None:
    """Three launches on one workspace, as a CUDA graph replays them; the order of the parts is fixed, so the last arriver does not matter."""
    found = []
    for schedule in ("eager", "random:1", "random:2"):
        outcome = emulated.fc2(key, 20, 3, 192, 512, kind="normal", splits=4, schedule=schedule, launches=3)
        outcome.check()
        assert not outcome.workspaces["workspace.tickets"].any()
        found.append(outcome.tensors["c"])
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_one_expert_splits_inside_its_k() -> None:
    emulated.fc2(PLAIN, 3, 1, 64, 1280, kind="exact", splits=4).check()


def test_more_splits_than_steps() -> None:
    """One K tile in four parts: three are empty, write zeros and take their tickets."""
    emulated.fc2(PLAIN, 3, 1, 64, 256, kind="exact", splits=4, launches=2).check()


@pytest.mark.parametrize("settings", [{"prefetch": 3}, {"prefetch": 3, "early_list": 1}])
def test_prefetch_changes_no_bit(settings: dict[str, int]) -> None:
    active = [0, 1, 3, 4, 6, 7] if "early_list" in settings else None
    plain = emulated.fc2(NARROW, 9, 8, 192, 512, active=active)
    other = emulated.fc2(NARROW, 9, 8, 192, 512, active=active, **settings)
    assert np.array_equal(plain.tensors["c"], other.tensors["c"])
    other.check()


def test_more_tiles_than_ctas_reuse_stages_and_accumulators() -> None:
    for schedule in ("lazy", "random:1", "random:2", "pct:1:3"):
        emulated.fc2(WIDE, 3, 4, 512, 512, kind="exact", schedule=schedule, sm_count=1).check()


@pytest.mark.parametrize("seed", range(8))
def test_two_epilogue_groups_never_take_an_accumulator_before_its_time(seed: int) -> None:
    """Tiles of 256 columns have two epilogue groups on a ring of three accumulators. With a barrier an accumulator, a group met every other use of it
    and could take the arrival before last for its own, where commits arrive in another order than they were issued."""
    key = "fc2.sm100f.t128x256.c1x2.nvfp4-bf16"
    emulated.fc2(key, 129, 3, 192, 512, kind="exact", zeros=0.3, splits=2, schedule=f"random:{100 + seed}").check()


STORED = "tensor shared to global"


@pytest.mark.parametrize("key", [PLAIN, NARROW, WIDE, PAIR, "fc2.sm100f.t128x256.c1x4.nvfp4-f16", "fc2.sm100f.t128x128.c1x4.nvfp4-bf16"])
def test_a_cta_s_only_tile_leaves_by_tma(key: str) -> None:
    """In boxes of 32 rows of 128 bytes, of warps that have a row; nothing leaves from registers, and nothing past M or H is written."""
    bits = {"f32": 32, "f16": 16, "bf16": 16}[key.rsplit("-", 1)[1]]
    tile_n, m, hidden = int(key.split(".")[2].split("x")[1]), 40, 192
    outcome = emulated.fc2(key, m, 2, hidden, 256, kind="exact", sm_count=64)
    outcome.check()
    tiles = -(-hidden // tile_n)
    assert outcome.run.bytes[STORED] == 64 * tiles * tile_n * bits // 8  # as asked for: TMA clips what lies outside
    assert outcome.run.bytes.get("global stores", 0) == 0
    assert outcome.run.bank_conflicts == 0


def test_earlier_tiles_of_a_cta_leave_from_registers() -> None:
    """The ring holds the next tile's operands then. One SM, two tiles of 128 columns: the first by 16-byte stores, the last by TMA."""
    outcome = emulated.fc2(PLAIN, 40, 2, 256, 256, kind="exact", sm_count=1)
    outcome.check()
    assert outcome.run.bytes[STORED] == 64 * 128 * 4
    assert outcome.run.bytes["global stores"] == 40 * 128 * 4


def test_a_split_tile_leaves_by_tma_from_its_last_part() -> None:
    outcome = emulated.fc2(PLAIN, 40, 2, 128, 512, kind="exact", splits=4, launches=2, sm_count=4, schedule="random:2")
    outcome.check()
    assert outcome.run.bytes[STORED] == 64 * 128 * 4


@pytest.mark.full
@pytest.mark.parametrize(("experts", "intermediate"), [(384, 256), (1, 32768)])
@pytest.mark.parametrize("splits", [1, 4])
def test_many_experts_and_wide_ones(experts: int, intermediate: int, splits: int) -> None:
    """K = 384 · 256 is DeepSeek-V3's and Kimi-K2's at eight ranks; I = 32768 is the largest of the contract's layers."""
    emulated.fc2(NARROW, 2, experts, 64, intermediate, kind="exact", zeros=0.5, splits=splits).check()
