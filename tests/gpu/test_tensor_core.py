"""What the tensor core of the GPU at hand does inside one step, seen through a shipped kernel: the constant c of the contract's rule 2."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")

from densemoe.runtime import bounds, packing  # noqa: E402
from densemoe.runtime.layout import tile_scales  # noqa: E402
from densemoe.runtime.loader import Loader  # noqa: E402
from densemoe.runtime.nvfp4 import pack_codes  # noqa: E402
from densemoe.runtime.problem import Problem  # noqa: E402

ONE_CODE, ONE_SCALE = 2, 0x38  # e2m1 1.0, e4m3 1.0
K = 128


def _step(step: int) -> list[int]:
    """Logical k of MMA step ``step`` of the first K 64 in the layout sm90a-superblock/2."""
    return [16 * quarter + 4 * step + i for quarter in range(4) for i in range(4)]


def _sum_after(loader: Loader, first: float, others: float) -> float:
    """``first`` accumulated by one step, then sixteen products of ``others`` by the next: what FC2 with weights of 1 gives."""
    torch.zeros(1, device="cuda")
    weights = packing.pack_fc2(
        pack_codes(np.full((64, K), ONE_CODE, dtype=np.uint8)), tile_scales(np.full((64, K // 16), ONE_SCALE, dtype=np.uint8)), 1
    )
    a = torch.zeros((1, K), dtype=torch.bfloat16, device="cuda")
    a[0, _step(0)[0]] = first
    a[0, _step(1)] = others
    c = torch.empty((1, 64), device="cuda")
    tensors = {"a": a, "b": torch.from_numpy(weights).cuda(), "alpha": torch.ones((1, 1), device="cuda"), "c": c}
    with loader.plan(Problem("fc2", 1, 1, 64, K, "bf16", "f32"), tensors, 0) as plan:
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    assert (c == c[0, 0]).all()
    return float(c[0, 0])


def test_internal_truncation_is_within_what_the_bounds_assume() -> None:
    """Sixteen products of 2**-(23+j) beside an accumulator of 1: kept while j is at most the bits that a step keeps below float32's last place."""
    loader = Loader()
    kept = -1
    for j in range(5):
        result = _sum_after(loader, 1.0, 2.0 ** -(23 + j))
        assert result in (1.0, 1.0 + 2.0 ** -(19 + j)), (j, result)
        if result > 1.0:
            kept = j
    assert kept >= 0
    measured = bounds.truncation_constant(kept)
    print(f"bits kept below the last place: {kept}; c = {measured}")
    path = os.environ.get("DENSEMOE_TEST_RECORD")
    if path:
        with Path(path).open("a") as file:
            file.write(f"truncation\t{kept}\t{measured}\n")
    assert measured <= bounds.TRUNCATION
