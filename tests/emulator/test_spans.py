"""Spans of the sm_90a kernels: units that one CTA, two or many share, K shorter than a CTA has warps, the same bits whatever the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sm90_cases import run_case

from densemoe.runtime import bounds

KEY = "fc1.sm90a.t8x64.c1x1.bf16-f32"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("m", "experts", "hidden", "intermediate", "sm_count"), [
    (1, 1, 8192, 64, 132),  # 8 CTAs share a unit: more slots than one batch of loads
    (5, 3, 2176, 96 * 2, 132),  # spans begin and end anywhere inside of a unit of 17 blocks
    (9, 2, 64, 64, 132),  # one block a unit: fewer than a CTA has warps
    (3, 5, 320, 128, 1),  # three blocks a unit, many units a CTA
    (20, 2, 640, 64, 1),  # five blocks: a warp's share changes from unit to unit
])  # fmt: skip
@pytest.mark.parametrize("key", [KEY, "fc1.sm90a.t16x64.c1x1.nvfp4-bf16", "fc1.sm90a.t32x64.c1x1.bf16-nvfp4"])
def test_units_in_one_or_many_spans(key: str, m: int, experts: int, hidden: int, intermediate: int, sm_count: int) -> None:
    kind = "integers" if key.endswith("nvfp4") else "exact"
    comparison, report = run_case(key, m, experts, hidden, intermediate, kind, post=True, sm_count=sm_count, schedule="random:5")
    assert comparison.passed, comparison.detail
    blocks = experts * intermediate // 32 * -(-hidden // 128) * -(-m // int(key.split(".t")[1].split("x")[0]))
    assert report.bytes["bulk global to shared"] == blocks * 4608


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("m", "experts", "hidden", "intermediate", "sm_count"), [
    (1, 40, 64, 320, 132),  # one unit of 120 blocks: 15 CTAs share it
    (9, 3, 128, 64, 132),  # three blocks a unit: warps without one
    (5, 1, 320, 128, 1),  # one block a unit
    (20, 7, 192, 192, 1),  # experts of two blocks, the last one half empty, cut anywhere
])  # fmt: skip
@pytest.mark.parametrize("key", ["fc2.sm90a.t8x64.c1x1.bf16-f32", "fc2.sm90a.t16x64.c1x1.nvfp4-bf16", "fc2.sm90a.t32x64.c1x1.bf16-f16"])
def test_units_of_fc2_in_one_or_many_spans(key: str, m: int, experts: int, hidden: int, intermediate: int, sm_count: int) -> None:
    comparison, report = run_case(key, m, experts, hidden, intermediate, "exact", sm_count=sm_count, schedule="random:5")
    assert comparison.passed, comparison.detail
    blocks = experts * -(-intermediate // 128) * (hidden // 64) * -(-m // int(key.split(".t")[1].split("x")[0]))
    assert report.bytes["bulk global to shared"] == blocks * 4608


@pytest.mark.parametrize(("op", "shape"), [("fc1", (4, 2, 2176, 64)), ("fc2", (4, 9, 64, 192))])
def test_sums_of_shared_units_have_one_order(monkeypatch: pytest.MonkeyPatch, op: str, shape: tuple[int, int, int, int]) -> None:
    """Rounding data: another order of additions would give other bits."""
    seen: list[bytes] = []
    compare = getattr(bounds, f"compare_{op}")

    def kept(outputs: dict[str, np.ndarray], *rest: Any, **named: Any) -> bounds.Report:
        seen.append(outputs["c"].tobytes())
        return compare(outputs, *rest, **named)

    monkeypatch.setattr(bounds, f"compare_{op}", kept)
    for schedule in ("eager", "lazy", "random:1", "random:2", "pct:3:4"):
        comparison, _ = run_case(f"{op}.sm90a.t8x64.c1x1.bf16-f32", *shape, "normal", schedule=schedule)
        assert comparison.passed, comparison.detail
    assert len(set(seen)) == 1
