"""FC2 over a list of experts fetches what it needs blocks ahead: whatever the borders of experts, units and token tiles, and only what counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sm90_cases import ptx_of

from densemoe.compile import kernels
from densemoe.compile.emulator.device import EARLY, early_roles, launch_recipe
from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.errors import EmulatorError
from densemoe.runtime.layout import tile_scales, untile_scales
from densemoe.runtime.nvfp4 import bf16_values
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

NAN_BF16, NAN_E4M3 = 0x7FC0, 0x7F
LISTED = (*EARLY, "active_experts")


def run(
    key: str, m: int, experts: int, hidden: int, intermediate: int, share: float, *, early_list: int = 0, early: Any = EARLY, **options: Any
) -> bounds.Report:
    """Exact data with a list of all experts but the last; a token has chosen a ``share`` of them, and its activations for the others are NaN."""
    variant = Variant.parse(key)
    problem = Problem("fc2", m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype, active_list=True)
    rng = np.random.default_rng([m, experts, hidden, intermediate])
    weights = data.fc2_weights(rng, experts, hidden, intermediate, "exact")
    first, scales, a_scale = data.activations(rng, m, problem.k, variant.a_dtype, "exact")
    alpha = data.fc2_alpha(rng, m, weights, a_scale, kind="exact")
    alpha[rng.random(alpha.shape) >= share] = 0
    alpha[:, -1] = 0
    idle = np.repeat(alpha == 0, intermediate, axis=1)
    listed = np.array([experts - 1, *range(experts - 1), 2**30], np.int32)
    arrays: dict[str, Any] = {"alpha": alpha, "active_experts": listed}
    if variant.a_dtype == "bf16":
        values = bf16_values(first).astype(np.float64)
        arrays["a"] = np.where(idle, np.uint16(NAN_BF16), first)
    else:
        values = reference.activation_values(first, scales)
        bytes_of = untile_scales(scales, m)
        arrays |= {"a.codes": first, "a.scales": tile_scales(np.where(idle[:, ::16], np.uint8(NAN_E4M3), bytes_of))}
    read = reference.Weights("fc2", weights.codes, weights.scales, experts)
    exact = reference.fc2(values, read, alpha.astype(np.float64), experts, intermediate)
    outputs = {"c": np.full((m, hidden), 0x5A, np.float32)}
    tensors = {**arrays, **outputs, "b": packing.pack_fc2(weights.codes, weights.scales, experts)}
    recipe = kernels.load("sm90_fc2").recipe(variant)
    names = {**problem.names(), "early_list": early_list}
    workspaces: dict[str, Any] = {}
    for _ in range(2):
        launch_recipe(ptx_of(key), recipe, names, tensors, outputs, workspaces=workspaces, early=early, **options)
    assert all(not each.any() for each in workspaces.values())
    return bounds.compare_fc2(outputs, exact, problem, exact=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tile", [8, 16, 32])
@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
@pytest.mark.parametrize(
    ("m", "experts", "hidden", "intermediate", "sm_count"),
    [(3, 2, 128, 64, 1), (19, 6, 192, 128, 2), (41, 4, 64, 192, 1), (9, 7, 320, 384, 1), (5, 30, 64, 64, 2)],
)
def test_experts_units_and_token_tiles_of_any_length(
    tile: int, a_dtype: str, m: int, experts: int, hidden: int, intermediate: int, sm_count: int
) -> None:
    report = run(f"fc2.sm90a.t{tile}x64.c1x1.{a_dtype}-f32", m, experts, hidden, intermediate, 0.4, sm_count=sm_count)
    assert report.passed, report.text


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_tokens_that_chose_none_a_few_or_all(share: float) -> None:
    report = run("fc2.sm90a.t8x64.c1x1.bf16-f32", 8, 9, 128, 256, share, sm_count=1)
    assert report.passed, report.text


@pytest.mark.parametrize("schedule", ["lazy", "random:2", "pct:5:4"])
@pytest.mark.parametrize("early_list", [0, 1])
def test_every_schedule_gives_the_same(schedule: str, early_list: int) -> None:
    early = early_roles("fc2", "sm_90a", {"early_list": early_list})
    report = run("fc2.sm90a.t8x64.c1x1.bf16-f32", 7, 5, 192, 256, 0.5, early_list=early_list, early=early, schedule=schedule, sm_count=2)
    assert report.passed, report.text


def test_alpha_is_read_before_the_launch_before_ends_only_where_it_is_early() -> None:
    with pytest.raises(EmulatorError, match=r"reads alpha without griddepcontrol\.wait"):
        run("fc2.sm90a.t8x64.c1x1.bf16-f32", 4, 3, 64, 64, 1.0, early_list=1, early=LISTED, sm_count=1)
