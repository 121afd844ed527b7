"""FC1's spans on sm_90a: units that one CTA, two or many share, K shorter than a CTA has warps, the same bits whatever the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sm90_cases import run_case

from densemoe.runtime import bounds

KEY = "fc1.sm90a.t8x64.c1x1.bf16-f32"


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


def test_sums_of_shared_units_have_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding data: another order of additions would give other bits."""
    seen: list[bytes] = []
    compare = bounds.compare_fc1

    def kept(outputs: dict[str, np.ndarray], *rest: Any, **named: Any) -> bounds.Report:
        seen.append(outputs["c"].tobytes())
        return compare(outputs, *rest, **named)

    monkeypatch.setattr(bounds, "compare_fc1", kept)
    for schedule in ("eager", "lazy", "random:1", "random:2", "pct:3:4"):
        comparison, _ = run_case(KEY, 4, 2, 2176, 64, "normal", schedule=schedule)
        assert comparison.passed, comparison.detail
    assert len(set(seen)) == 1
