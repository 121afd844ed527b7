"""FC1 by tcgen05 in the emulator: exact data bit for bit, general data within the bounds, and the places where kernels usually go wrong.

Red zones, uninitialised reads, races and deadlocks are the emulator's to find; every run has them on. Nothing here has run on hardware.
"""

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

VARIANTS = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_100f" and each.variant.op == "fc1"]
NVFP4 = [each.key for each in VARIANTS if each.c_dtype == "nvfp4"]
PLAIN = "fc1.sm100f.t128x128.c1x1.nvfp4-nvfp4"
PAIR = "fc1.sm100f.t256x128.c2x1.nvfp4-nvfp4"
WIDE = "fc1.sm100f.t128x256.c1x2.nvfp4-nvfp4"
QUAD = "fc1.sm100f.t128x128.c1x4.nvfp4-nvfp4"


@pytest.mark.parametrize("key", NVFP4)
@pytest.mark.parametrize("schedule", ["eager", "random:3"])
def test_exact_data_is_exact_with_ragged_m_and_padded_clusters(key: str, schedule: str) -> None:
    """K = 320 ends inside a K tile, M = 129 inside a row tile, and three tiles of weights pad every cluster of two or four."""
    columns = int(key.split(".")[2].split("x")[1]) // 2
    emulated.fc1(key, 129, 3, 320, columns, kind="exact", post=True, zeros=0.3, schedule=schedule).check()


@pytest.mark.parametrize("key", NVFP4)
def test_general_data_is_within_the_bound(key: str) -> None:
    columns = int(key.split(".")[2].split("x")[1]) // 2
    emulated.fc1(key, 40, 2, 512, columns, kind="normal", post=True).check()


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "e4m3", "e5m2"])
@pytest.mark.parametrize("shape", ["t128x256.c1x2", "t256x128.c2x1"])
@pytest.mark.parametrize("kind", ["exact", "integers"])
def test_plain_outputs_are_converted_once(shape: str, dtype: str, kind: str) -> None:
    """The reference returned block-normalised values here (contract section 10)."""
    emulated.fc1(f"fc1.sm100f.{shape}.nvfp4-{dtype}", 130, 1, 256, 128, kind=kind, post=True, zeros=0.2).check()


@pytest.mark.parametrize("m", [1, 7, 8, 9, 127, 128, 129, 255, 257, 511, 512])
@pytest.mark.parametrize("key", [PLAIN, PAIR])
def test_any_m_reads_and_writes_its_own_rows(key: str, m: int) -> None:
    """Buffers end at row M: a row too many is a fault. With 2-CTA tiles an odd number of 128-row tiles is among them."""
    emulated.fc1(key, m, 1, 64, 64, kind="exact", post=True).check()


@pytest.mark.parametrize(("experts", "intermediate"), [(1, 1408), (5, 1408), (2, 704)])
def test_padded_ctas_of_a_quad_write_and_read_nothing(experts: int, intermediate: int) -> None:
    """Tile 128, cluster (1, 4): 2I = 2816 has 22 tiles an expert, twice 1408 has 22. The reference wrote scales of the first and read alpha of the
    last out of bounds (contract section 8)."""
    emulated.fc1(QUAD, 1, experts, 64, intermediate, kind="exact" if experts == 1 else "integers", post=True).check()


@pytest.mark.parametrize("kind", ["raw", "extreme"])
def test_zero_subnormal_and_saturating_scales(kind: str) -> None:
    emulated.fc1(PLAIN, 33, 2, 256, 64, kind=kind).check()
    emulated.fc1("fc1.sm100f.t128x128.c1x1.nvfp4-f32", 33, 2, 256, 64, kind=kind, post=True).check()


@pytest.mark.parametrize("dtype", ["nvfp4", "f32", "bf16", "e4m3"])
def test_alpha_post_of_zero_selects_nan_away(dtype: str) -> None:
    """NaN activations in two tokens: under an alpha_post of exactly 0 their outputs are exactly 0, and no other token sees them."""

    def edit(tensors: dict[str, Any]) -> None:
        data.poison_activations(tensors, [3, 130])
        tensors["alpha_post"][[3, 130]] = 0

    key = f"fc1.sm100f.t128x128.c1x2.nvfp4-{dtype}"
    outcome = emulated.fc1(key, 131, 2, 128, 64, post=True, edit=edit)
    outcome.check()
    codes = outcome.tensors["c.codes" if dtype == "nvfp4" else "c"]
    assert not codes[[3, 130]].any()


def test_nan_stays_in_its_own_row() -> None:
    """NVFP4: values of a token with NaN are open (contract section 2); those of every other token are judged."""

    def edit(tensors: dict[str, Any]) -> None:
        data.poison_activations(tensors, [5])

    outcome = emulated.fc1(PLAIN, 20, 1, 128, 64, edit=edit)
    outcome.check()


def test_idle_experts_cost_no_bytes_and_are_not_written() -> None:
    key, experts, active = "fc1.sm100f.t128x128.c1x2.nvfp4-nvfp4", 6, [1, 4, 5]
    outcome = emulated.fc1(key, 20, experts, 256, 64, active=active)
    outcome.check()
    codes = outcome.tensors["c.codes"].reshape(20, experts, 32)
    idle = [e for e in range(experts) if e not in active]
    assert (codes[:, idle] == emulated.POISON).all()
    scales = outcome.tensors["c.scales"]
    assert scales.reshape(experts, 512)[active].any(axis=1).all()
    assert not scales.reshape(experts, 512)[idle].any()


def test_a_list_of_every_expert_gives_what_no_list_gives() -> None:
    dense = emulated.fc1(WIDE, 9, 3, 128, 128, post=True)
    listed = emulated.fc1(WIDE, 9, 3, 128, 128, post=True, active=[0, 1, 2])
    for role in ("c.codes", "c.scales"):
        assert np.array_equal(dense.tensors[role], listed.tensors[role])


def test_an_empty_list_ends_at_once() -> None:
    outcome = emulated.fc1(WIDE, 9, 3, 128, 128, active=[])
    assert (outcome.tensors["c.codes"] == emulated.POISON).all()
    assert not outcome.tensors["c.scales"].any()


@pytest.mark.parametrize("settings", [{"prefetch": 3}, {"prefetch": 3, "early_list": 1}])
def test_prefetch_changes_no_bit(settings: dict[str, int]) -> None:
    active = [0, 2] if "early_list" in settings else None
    plain = emulated.fc1(PLAIN, 9, 3, 2048, 64, active=active)
    other = emulated.fc1(PLAIN, 9, 3, 2048, 64, active=active, **settings)
    assert np.array_equal(plain.tensors["c.codes"], other.tensors["c.codes"])
    other.check()


def test_more_tiles_than_ctas_reuse_stages_and_accumulators() -> None:
    """Two CTAs take 12 tiles each of 5 K tiles: every stage and accumulator is used again, in many schedules."""
    for schedule in ("lazy", "random:1", "random:2", "pct:1:3"):
        emulated.fc1(PLAIN, 3, 24, 1088, 64, kind="exact", schedule=schedule, sm_count=2).check()


@pytest.mark.full
@pytest.mark.parametrize("key", [QUAD, PAIR])
def test_many_experts(key: str) -> None:
    emulated.fc1(key, 2, 384, 64, 64, kind="exact", post=True, zeros=0.5, sm_count=16).check()
