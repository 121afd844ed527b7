"""The shipped sm_90a kernels on the emulator, through the runtime's recipes, packers, reference and bounds (contract sections 9.1 and 9.2)."""

from __future__ import annotations

import pytest
from sm90_cases import run_case

from densemoe.compile import kernels
from densemoe.compile.emulator.execution import Report
from densemoe.runtime.errors import EmulatorError
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant


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


@pytest.mark.parametrize("key", ["fc1.sm90a.t8x64.c1x1.bf16-bf16", "fc2.sm90a.t8x64.c1x1.bf16-bf16"])
def test_a_list_of_known_length_is_computed_by_as_many_ctas_as_it_can_need(key: str) -> None:
    """One token that chose two experts of 40: every listed expert is computed, and none of FC1's CTAs is there for others."""
    comparison, _ = run_case(key, 1, 40, 384, 128, "exact", active=[7, 33], top_k=2, schedule="random:1")
    assert comparison.passed, comparison.detail
    recipe = kernels.load("sm90_fc1").recipe(Variant.parse("fc1.sm90a.t8x64.c1x1.bf16-bf16"))
    known, unknown = (
        recipe.bind({**Problem("fc1", 1, 40, 384, 128, active_list=True, top_k=top_k).names(), "sm_count": 132}) for top_k in (2, 0)
    )
    assert (known["ctas"], unknown["ctas"]) == (3, 60)  # 2 or 40 experts of 4 units of 3 K blocks, eight a CTA


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
    """Without bar.warp.sync lane 0 starts a copy over what the other lanes of its warp read; the first one makes the mbarriers known."""

    def without_warp_sync(ptx: str) -> str:
        lines = ptx.split("\n")
        first = next(i for i, line in enumerate(lines) if "bar.warp.sync" in line)
        return "\n".join(line for i, line in enumerate(lines) if i <= first or "bar.warp.sync" not in line)

    with pytest.raises(Exception, match=r"race: overwrites shared memory .* may still read"):
        run_case("fc1.sm90a.t8x64.c1x1.bf16-f32", 3, 3, 1024, 64, "exact", post=True, edit=without_warp_sync, sm_count=1)


def test_an_output_byte_is_written_once() -> None:
    def stored_twice(ptx: str) -> str:
        stores = [line for line in ptx.split("\n") if "st.global.v4.f32" in line]
        return ptx.replace(stores[-1], 2 * f"{stores[-1]}\n")

    with pytest.raises(EmulatorError, match=r"c\[byte \d+\] is written twice"):
        run_case("fc1.sm90a.t8x64.c1x1.bf16-f32", 3, 1, 256, 64, "exact", post=True, edit=stored_twice)
