"""The shipped sm_90a kernels on the emulator, through the runtime's recipes, packers, reference and bounds (contract sections 9.1 and 9.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from densemoe.compile import kernels
from densemoe.compile.emulator.device import launch_recipe
from densemoe.compile.emulator.execution import Report
from densemoe.compile.toolchain import compile_variant
from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.nvfp4 import bf16_values
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

NUMPY: dict[str, Any] = {"u8": np.uint8, "bf16": np.uint16, "f16": np.float16, "f32": np.float32}
LARGEST = 448.0 * 6.0  # of a scale and a code


@cache
def ptx_of(key: str) -> str:
    variant = Variant.parse(key)
    return compile_variant(variant, f"sm90_{variant.op}").ptx


def run_case(
    key: str,
    m: int,
    experts: int,
    hidden: int,
    intermediate: int,
    kind: str,
    *,
    post: bool = False,
    scalar: bool = False,
    schedule: str = "eager",
    edit: Callable[[str], str] = str,
    active: Sequence[int] | None = None,
    settings: Mapping[str, int] = MappingProxyType({}),
    sm_count: int = 132,
) -> tuple[bounds.Report, Report]:
    """One problem on the emulator: the comparison and the emulator's report.

    Args:
        active: the listed experts. Weights and FC1 outputs of the others are then NaN or poison, and must stay without effect.
    """
    variant = Variant.parse(key)
    problem = Problem(
        variant.op, m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype,
        alpha_post=post, scalar_alpha=scalar, active_list=active is not None,
    )  # fmt: skip
    rng = np.random.default_rng([m, experts, hidden, intermediate])
    fc1 = variant.op == "fc1"
    weights = (data.fc1_weights if fc1 else data.fc2_weights)(rng, experts, hidden, intermediate, kind)
    packed = packing.pack_fc1(weights.codes, weights.scales) if fc1 else packing.pack_fc2(weights.codes, weights.scales, experts)
    read = reference.Weights(variant.op, weights.codes, weights.scales, experts)
    listed = list(range(experts)) if active is None else list(active)
    idle = [e for e in range(experts) if e not in listed]
    packed.reshape(experts, -1)[idle] = 0xFF  # codes and scales that decode to large numbers
    columns = np.concatenate([np.arange(e * intermediate, (e + 1) * intermediate) for e in listed] or [np.arange(0)])
    first, scales, a_scale = data.activations(rng, m, problem.k, variant.a_dtype, kind)
    if variant.a_dtype == "bf16":
        arrays, a = {"a": first}, bf16_values(first).astype(np.float64)
    else:
        arrays, a = {"a.codes": first, "a.scales": scales}, reference.activation_values(first, scales)
    multiplier = None
    if active is not None:
        # what lies behind the count is nobody's: an expert that does not exist
        arrays["active_experts"] = np.array([len(active), *active, *[2**30] * len(idle)], np.int32)
    if fc1:
        arrays["alpha"] = data.fc1_alpha(weights, a_scale)
        if post:
            arrays["alpha_post"] = data.alpha_post(rng, m, experts, kind, 0.25)
        factors = arrays["alpha_post"].astype(np.float64) if post else None
        exact: Any = reference.fc1(a, read, arrays["alpha"].astype(np.float64), listed, factors)
        if variant.c_dtype == "nvfp4":
            multiplier = np.float32(LARGEST / max(float(np.abs(exact.y).max()), 1e-30))
            arrays["output_multiplier"] = np.array([multiplier], np.float32)
    else:
        arrays["alpha"] = data.fc2_alpha(rng, m, weights, a_scale, scalar=scalar, kind=kind)
        if not scalar:
            arrays["alpha"][:, idle] = 0
        scales_of = arrays["alpha"].astype(np.float64)
        if listed:
            used = scales_of if scalar else scales_of[:, listed]
            exact = reference.fc2(a[:, columns], lambda i: read(listed[i]), used, len(listed), intermediate)
        else:  # no term at all: as of one expert under alpha 0
            exact = reference.fc2(a[:, :intermediate], read, np.zeros((m, 1)), 1, intermediate)
        if idle and variant.a_dtype == "bf16":
            arrays["a"][:, np.setdiff1d(np.arange(experts * intermediate), columns)] = 0x7FC0  # NaN where FC1 wrote nothing
    outputs = {role: np.full(spec.shape, 0x5A, NUMPY[spec.dtype]) for role, spec in problem.tensors().items() if spec.output}
    recipe = kernels.load(f"sm90_{variant.op}").recipe(variant)
    tensors = {**arrays, "b": packed, **outputs}
    report = launch_recipe(edit(ptx_of(key)), recipe, {**problem.names(), **settings}, tensors, outputs, schedule=schedule, sm_count=sm_count)
    is_exact = kind == "exact"
    if fc1:
        given = None if multiplier is None else float(multiplier)
        return bounds.compare_fc1(outputs, exact, problem, output_multiplier=given, columns=columns, exact=is_exact), report
    return bounds.compare_fc2(outputs, exact, problem, exact=is_exact), report


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
@pytest.mark.parametrize("key", ["fc1.sm90a.t8x64.c1x1.{}-f32", "fc1.sm90a.t16x64.c1x1.{}-bf16", "fc2.sm90a.t8x64.c1x1.{}-f32"])
def test_exact_data_is_exact(key: str, a_dtype: str) -> None:
    """Rule 1: bit for bit."""
    key = key.format(a_dtype)
    comparison, report = run_case(key, 21, 3, 320, 192, "exact", post=key.startswith("fc1"))
    assert comparison.passed, comparison.detail
    assert report.products["mma.sync"] > 0


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
@pytest.mark.parametrize("key", ["fc1.sm90a.t8x64.c1x1.{}-nvfp4", "fc1.sm90a.t32x64.c1x1.{}-f16", "fc2.sm90a.t16x64.c1x1.{}-bf16"])
def test_general_data_lies_within_the_bounds(key: str, a_dtype: str) -> None:
    """Rules 2 and 3."""
    comparison, _ = run_case(key.format(a_dtype), 13, 2, 256, 128, "integers", post=key.startswith("fc1"), scalar=key.startswith("fc2"))
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("schedule", ["lazy", "random:1", "random:2", "pct:3:4"])
@pytest.mark.parametrize("key", ["fc1.sm90a.t8x64.c1x1.bf16-f32", "fc2.sm90a.t8x64.c1x1.bf16-f32"])
def test_every_schedule_gives_the_same_exact_result(key: str, schedule: str) -> None:
    comparison, _ = run_case(key, 3, 2, 256, 64, "exact", post=key.startswith("fc1"), schedule=schedule)
    assert comparison.passed, comparison.detail


def weight_bytes(report: Report) -> int:
    return report.bytes["bulk global to shared"]


@pytest.mark.parametrize("settings", [{}, {"early_list": 1}])
@pytest.mark.parametrize("active", [[1], [0, 2, 4], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("key", ["fc1.sm90a.t8x64.c1x1.bf16-f32", "fc1.sm90a.t16x64.c1x1.nvfp4-nvfp4", "fc2.sm90a.t8x64.c1x1.bf16-f32"])
def test_experts_that_are_not_listed_cost_nothing_and_change_nothing(key: str, active: list[int], settings: dict[str, int]) -> None:
    """Contract section 5. Few CTAs, so that a warp meets several experts."""
    kind = "exact" if key.endswith("f32") else "integers"
    case = {"kind": kind, "post": key.startswith("fc1"), "sm_count": 2, "settings": settings}
    comparison, report = run_case(key, 9, 5, 256, 128, active=active, **case)
    assert comparison.passed, comparison.detail
    _, dense = run_case(key, 9, 5, 256, 128, active=range(5), **case)
    assert weight_bytes(report) * 5 == weight_bytes(dense) * len(active)


@pytest.mark.parametrize("schedule", ["lazy", "random:1", "pct:3:4"])
@pytest.mark.parametrize("key", ["fc1.sm90a.t8x64.c1x1.bf16-f32", "fc2.sm90a.t32x64.c1x1.nvfp4-f32"])
def test_a_list_gives_the_same_in_every_schedule(key: str, schedule: str) -> None:
    comparison, _ = run_case(key, 11, 4, 256, 64, "exact", scalar=key.startswith("fc2"), schedule=schedule, active=[3, 1], sm_count=1)
    assert comparison.passed, comparison.detail


@pytest.mark.parametrize("scalar", [False, True])
def test_fc2_of_an_empty_list_is_zero(scalar: bool) -> None:
    comparison, _ = run_case("fc2.sm90a.t8x64.c1x1.bf16-bf16", 9, 3, 256, 128, "integers", scalar=scalar, active=[])
    assert comparison.passed, comparison.detail


def test_a_kernel_that_forgets_to_wait_for_its_copy_reads_shared_memory_before_it_is_written() -> None:
    def without_wait(ptx: str) -> str:
        lines = ptx.split("\n")
        waits = [i for i, line in enumerate(lines) if "mbarrier.try_wait" in line]
        for i in waits:
            predicate = lines[i].split()[1].rstrip(",")
            lines[i] = f"\tmov.pred {predicate}, -1;"
        return "\n".join(lines)

    with pytest.raises(Exception, match="read before it was written"):
        run_case("fc1.sm90a.t8x64.c1x1.bf16-f32", 3, 1, 256, 64, "exact", post=True, schedule="lazy", edit=without_wait)


def test_refilling_a_stage_that_other_lanes_may_still_read_is_a_race() -> None:
    """Without bar.warp.sync lane 0 starts a copy over what the other lanes of its warp read."""

    def without_warp_sync(ptx: str) -> str:
        return "\n".join(line for line in ptx.split("\n") if "bar.warp.sync" not in line)

    with pytest.raises(Exception, match=r"race: overwrites shared memory .* may still read"):
        run_case("fc1.sm90a.t8x64.c1x1.bf16-f32", 3, 1, 512, 64, "exact", post=True, edit=without_warp_sync)
