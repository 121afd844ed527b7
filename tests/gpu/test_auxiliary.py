"""``prepare`` and ``quantize`` on a GPU: bit for bit what the contract's reference gives, as on the emulator; larger shapes besides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")

from densemoe.runtime import reference  # noqa: E402
from densemoe.runtime.layout import tile_scales  # noqa: E402
from densemoe.runtime.loader import Loader  # noqa: E402
from densemoe.runtime.nvfp4 import pack_codes, quantise_rows  # noqa: E402
from densemoe.runtime.problem import Problem  # noqa: E402


@pytest.fixture(scope="module")
def loader() -> Loader:
    torch.zeros(1, device="cuda")  # torch's primary context is current from here on
    return Loader()


def run(loader: Loader, problem: Problem, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The outputs by role, poisoned before."""
    import harness

    dtypes = {**harness.DTYPES, "i32": torch.int32}
    shaped = {}
    for role, spec in problem.tensors().items():
        if spec.output:
            poisoned = torch.full((spec.nbytes,), 0x5A, dtype=torch.uint8, device="cuda")
            shaped[role] = poisoned.view(dtypes[spec.dtype]).reshape(spec.shape)
    with loader.plan(problem, {**inputs, **shaped}, 0) as plan:
        harness.launch(plan)
    return {role: each.cpu().numpy() for role, each in shaped.items()}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (8, 7168), (129, 4096), (512, 2048)])
def test_quantize_is_the_reference_bit_for_bit(loader: Loader, dtype: str, m: int, k: int) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    x[0, :16], x[-1, 20] = 0, 60000
    x[m // 2, 32:48] *= 1e-6
    stored = x.to({"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype])
    multiplier = np.float32(448 * 6 / 4)
    inputs = {"a": stored.cuda(), "output_multiplier": torch.tensor([float(multiplier)], device="cuda")}
    got = run(loader, Problem("quantize", m, 0, k, 0, dtype, "nvfp4"), inputs)
    codes, scales = quantise_rows(stored.float().numpy(), multiplier)
    assert np.array_equal(got["c.codes"], pack_codes(codes))
    assert np.array_equal(got["c.scales"], tile_scales(scales))


@pytest.mark.parametrize("dtype", ["i32", "i64"])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(1, 8, 1), (8, 256, 8), (37, 13, 3), (512, 512, 10), (600, 4096, 32)])
def test_prepare_is_the_reference_bit_for_bit(loader: Loader, dtype: str, m: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(m)
    ids = rng.integers(-experts // 2, experts + experts // 2, (m, top_k)).astype({"i32": np.int32, "i64": np.int64}[dtype])
    router, w2_alpha = rng.random((m, top_k), np.float32), rng.random(experts, np.float32)
    for elsewhere, divisor in ((True, 1.0), (True, float(w2_alpha.max())), (False, 1.0)):
        problem = Problem("prepare", m, experts, 0, 0, dtype, "f32", top_k=top_k, elsewhere=elsewhere)
        arrays = {"ids": ids, "router": router, "w2_alpha": w2_alpha, "alpha_divisor": np.array([divisor], np.float32)}
        got = run(loader, problem, {role: torch.from_numpy(each).cuda() for role, each in arrays.items()})
        expected = reference.build_alpha(ids, router, w2_alpha, experts=experts, elsewhere_allowed=True) / np.float32(divisor)
        if not elsewhere:
            expected[((ids < 0) | (ids >= experts)).any(axis=1)] = np.nan
        np.testing.assert_array_equal(got["alpha"], expected)
        active = np.unique(ids[(ids >= 0) & (ids < experts)])
        if not elsewhere and not len(active):
            active = np.array([0])  # bad ids alone keep one expert listed
        assert got["active_list"][0] == len(active)
        assert np.array_equal(got["active_list"][1 : 1 + len(active)], active)
