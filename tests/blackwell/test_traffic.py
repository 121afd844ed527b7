"""What the kernels read, by the emulator's byte counters: a weight byte once a wave of token tiles, idle experts none, shared ones once a cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import emulated

from densemoe.runtime.variant import Variant

COPIED = "tensor global to shared"
K_TILE = 256
ROW_TILE = 128


def expected_bytes(key: str, m: int, hidden: int, intermediate: int, listed: int) -> int:
    """Codes and scales that TMA moves when every weight is read once a row of tiles, and activations once a tile column of a cluster."""
    variant = Variant.parse(key)
    rows, k = (2 * intermediate * listed, hidden) if variant.op == "fc1" else (hidden, intermediate * listed)
    waves = -(-m // variant.tile_m)
    weights = rows * (k // 2 + k // 16)
    columns = -(-rows // (variant.tile_n * variant.cluster_n))
    activations = variant.tile_m * (k // 2 + k // 16) * columns
    return waves * (weights + activations)


@pytest.mark.parametrize("active", [None, [1], [0, 2, 3]])
@pytest.mark.parametrize("shape", ["t128x128.c1x1.nvfp4-nvfp4", "t128x128.c1x2.nvfp4-nvfp4", "t128x256.c1x1.nvfp4-bf16"])
@pytest.mark.parametrize("m", [8, 130])
def test_fc1_reads_each_weight_once_a_wave(shape: str, m: int, active: list[int] | None) -> None:
    key = f"fc1.sm100f.{shape}"
    outcome = emulated.fc1(key, m, 4, 512, 128, active=active)
    outcome.check()
    assert outcome.run.bytes[COPIED] == expected_bytes(key, m, 512, 128, 4 if active is None else len(active))


@pytest.mark.parametrize("active", [None, [2], [0, 3]])
@pytest.mark.parametrize("shape", ["t128x128.c1x1", "t128x128.c1x4", "t128x256.c1x2"])
@pytest.mark.parametrize("splits", [1, 2])
def test_fc2_reads_each_weight_once_a_wave(shape: str, splits: int, active: list[int] | None) -> None:
    key = f"fc2.sm100f.{shape}.nvfp4-bf16"
    outcome = emulated.fc2(key, 130, 4, 512, 256, active=active, splits=splits)
    outcome.check()
    assert outcome.run.bytes[COPIED] == expected_bytes(key, 130, 512, 256, 4 if active is None else len(active))


def test_a_pair_reads_half_of_the_weights_of_two_single_tiles() -> None:
    """256 tokens: one wave instead of two. Each CTA of a pair holds half of B, and all of B's scales."""
    rows, k = 256, 512
    single = emulated.fc1("fc1.sm100f.t128x128.c1x1.nvfp4-nvfp4", 256, 1, k, rows // 2).run.bytes[COPIED]
    pair = emulated.fc1("fc1.sm100f.t256x128.c2x1.nvfp4-nvfp4", 256, 1, k, rows // 2).run.bytes[COPIED]
    activations = 256 * (k // 2 + k // 16) * 2
    assert single == activations + 2 * rows * (k // 2 + k // 16)
    assert pair == activations + rows * (k // 2 + 2 * (k // 16))


def test_nothing_is_copied_for_an_empty_list() -> None:
    outcome = emulated.fc2("fc2.sm100f.t128x64.c1x1.nvfp4-bf16", 5, 4, 192, 256, active=[])
    assert outcome.run.bytes.get(COPIED, 0) == 0
    assert not outcome.tensors["c"].any()
