"""The generic Plan on tcgen05 recipes, over a driver that exists only in Python: parts of the weights, settings, workspaces, tensor maps."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver

from densemoe.compile import build, kernels, matrix
from densemoe.compile.oracle import recorded_tensor_map
from densemoe.runtime import packing
from densemoe.runtime.errors import PlanError, ProblemError, RecipeError, SelectionError
from densemoe.runtime.loader import Loader
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.select import Choice, load_table, select
from densemoe.runtime.variant import Variant

FC1 = "fc1.sm100f.t128x128.c1x2.nvfp4-nvfp4"
FC2 = "fc2.sm100f.t128x128.c1x2.nvfp4-bf16"
FOURS = "fc2.sm100f.t128x64.c1x4.nvfp4-bf16"


class Driver(FakeDriver):
    """Compute capability 10.0; tensor maps hold their arguments."""

    def __init__(self) -> None:
        super().__init__(capabilities=((10, 0),))

    def encode_tensor_map(self, *arguments: Any) -> bytes:
        return recorded_tensor_map(*arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact root with an FC1 variant and two of FC2, one in clusters of four."""
    out = tmp_path_factory.mktemp("blackwell")
    for key in (FC1, FC2, FOURS):
        result = build.build(matrix.load(), out, arch="sm_100f", key_filter=key)
        assert not result.failures
    return out


def plan_of(root: Path, problem: Problem, key: str | None, **options: Any) -> tuple[Plan, dict[str, int], Driver]:
    driver = Driver()
    tensors = {role: driver.allocate(spec.nbytes) for role, spec in problem.tensors().items()}
    tensors["b"] = driver.allocate(packing.interchange_bytes(problem.op, problem.experts, problem.hidden, problem.intermediate))
    return Loader(root, driver).plan(problem, tensors, 0, key, **options), tensors, driver  # type: ignore[arg-type]


def parameter(plan: Plan, name: str) -> bytes:
    """A parameter's bytes as the Plan packed them."""
    recipe = plan.entry.recipe
    index = next(i for i, each in enumerate(recipe.parameters) if each.name == name)
    offset, size = recipe.offsets()[index]
    return bytes(plan._packed.parameters[offset : offset + size])


def address(plan: Plan, name: str) -> int:
    """The address in a pointer or in a tensor map."""
    return int(struct.unpack("<Q", parameter(plan, name)[:8])[0])


def test_weights_are_one_buffer_of_codes_then_scales(root: Path) -> None:
    problem = Problem("fc1", 5, 3, 320, 128, "nvfp4", "nvfp4", alpha_post=True, active_list=True)
    plan, tensors, driver = plan_of(root, problem, FC1)
    assert plan.entry.layout == packing.INTERCHANGE_LAYOUT == kernels.load("sm100_fc1").WEIGHT_LAYOUT
    codes = 3 * 256 * 320 // 2
    assert (address(plan, "map_b"), address(plan, "map_b_scales")) == (tensors["b"], tensors["b"] + codes)
    assert (address(plan, "map_a"), address(plan, "c_scales")) == (tensors["a.codes"], tensors["c.scales"])
    assert address(plan, "alpha_post") == tensors["alpha_post"]
    other = driver.allocate(packing.interchange_bytes("fc1", 3, 320, 128))
    plan.update("b", other)
    assert (address(plan, "map_b"), address(plan, "map_b_scales")) == (other, other + codes)
    plan.launch()


def test_absent_optional_tensors_are_null(root: Path) -> None:
    plan, _, _ = plan_of(root, Problem("fc1", 5, 3, 320, 128, "nvfp4", "nvfp4"), FC1)
    assert (address(plan, "alpha_post"), address(plan, "active_experts")) == (0, 0)
    assert parameter(plan, "waits_first") == bytes(4)


def test_settings_reach_the_kernel_and_unknown_ones_are_refused(root: Path) -> None:
    problem = Problem("fc2", 130, 3, 320, 256, "nvfp4", "bf16", active_list=True)
    plan, _, _ = plan_of(root, problem, FC2, settings={"splits": 4, "prefetch": 3})
    words = {name: int.from_bytes(parameter(plan, name), "little") for name in ("splits", "prefetch", "waits_first", "cluster_columns")}
    assert words == {"splits": 4, "prefetch": 3, "waits_first": 1, "cluster_columns": 2}
    assert plan._packed.grid == (2 * 2 * 4 * 2, 1, 1)  # row tiles x clusters of columns x splits, two CTAs each
    with pytest.raises(RecipeError, match=r"setting splits=3: use one of 1, 2, 4"):
        plan_of(root, problem, FC2, settings={"splits": 3})
    with pytest.raises(RecipeError, match=r"settings \['stages'\] are not those of .*: it has splits, prefetch, early_list"):
        plan_of(root, problem, FC2, settings={"stages": 3})


def test_a_scalar_alpha_has_strides_of_zero(root: Path) -> None:
    strides = {}
    for scalar in (False, True):
        plan, _, _ = plan_of(root, Problem("fc2", 5, 3, 320, 256, "nvfp4", "bf16", scalar_alpha=scalar), FC2)
        strides[scalar] = [int.from_bytes(parameter(plan, f"alpha_stride_{axis}"), "little") for axis in "me"]
    assert strides == {False: [3, 1], True: [0, 0]}


def test_a_list_of_active_experts_is_part_of_the_problem(root: Path) -> None:
    problem = Problem("fc2", 5, 3, 320, 256, "nvfp4", "bf16", active_list=True)
    plan, tensors, driver = plan_of(root, problem, FC2)
    assert address(plan, "active_experts") == tensors["active_experts"]
    missing = {role: pointer for role, pointer in tensors.items() if role != "active_experts"}
    with pytest.raises(ProblemError, match=r"active_experts.*missing"):
        Loader(root, driver).plan(problem, missing, 0, FC2)  # type: ignore[arg-type]


def test_fc2_s_output_is_moved_in_its_pointer_and_in_its_tensor_map(root: Path) -> None:
    """A CTA's last tile leaves by the map, earlier ones by the pointer."""
    plan, tensors, driver = plan_of(root, Problem("fc2", 130, 3, 320, 256, "nvfp4", "bf16"), FC2)
    assert address(plan, "map_c") == address(plan, "c") == tensors["c"]
    first = parameter(plan, "map_c")
    for move in (lambda other: plan.update("c", other), lambda other: plan.rebind({"c": other})):
        other = driver.allocate(130 * 320 * 2)
        move(other)
        assert address(plan, "map_c") == address(plan, "c") == other
        assert parameter(plan, "map_c")[8:] == first[8:]


def test_what_is_refused_is_refused_before_any_launch(root: Path) -> None:
    """Random problems: a Plan is made exactly where ``can_implement`` says so; else nothing is allocated or launched."""
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(60):
        key = (FC1, FC2, FOURS)[rng.integers(3)]
        op = str(rng.choice(["fc1", "fc2"]))
        dtype = str(rng.choice(["nvfp4", "bf16"] if op == "fc1" else ["bf16", "f32"]))
        m, experts, hidden, intermediate = (int(rng.integers(low, high)) for low, high in ((0, 300), (1, 5), (1, 9), (1, 9)))
        problem = Problem(op, m, experts, 64 * hidden, 64 * intermediate, "nvfp4", dtype)
        driver = Driver()
        tensors = {role: driver.allocate(spec.nbytes) for role, spec in problem.tensors().items()}
        tensors["b"] = driver.allocate(packing.interchange_bytes(problem.op, problem.experts, problem.hidden, problem.intermediate))
        before = dict(driver.memory)
        accepted, reason = can_implement(Variant.parse(key), problem)
        if accepted:
            Loader(root, driver).plan(problem, tensors, 0, key).launch()  # type: ignore[arg-type]
            assert len(driver.launches) == (problem.m > 0)
            continue
        refused += 1
        with pytest.raises(SelectionError, match=re.escape(reason)):
            Loader(root, driver).plan(problem, tensors, 0, key)  # type: ignore[arg-type]
        assert driver.launches == []
        assert driver.memory == before
    assert 10 < refused < 55


class Interface:
    """Device memory that says its shape."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": typestr, "data": (address, False), "version": 3}


def test_alpha_post_has_a_row_for_each_token_and_is_refused_otherwise(root: Path) -> None:
    problem = Problem("fc1", 5, 3, 320, 128, "nvfp4", "nvfp4", alpha_post=True)
    driver = Driver()
    tensors: dict[str, Any] = {role: driver.allocate(spec.nbytes) for role, spec in problem.tensors().items()}
    tensors["b"] = driver.allocate(packing.interchange_bytes("fc1", 3, 320, 128))
    for shape in ((5, 3), (4, 3), (8, 3), (5, 4), (15,)):
        tensors["alpha_post"] = Interface(4096, shape, "<f4")
        if shape == (5, 3):
            Loader(root, driver).plan(problem, tensors, 0, FC1)  # type: ignore[arg-type]
            continue
        with pytest.raises(ProblemError, match=r"alpha_post.*use \(5, 3\)"):
            Loader(root, driver).plan(problem, tensors, 0, FC1)  # type: ignore[arg-type]


def test_no_tokens_launch_nothing(root: Path) -> None:
    plan, _, _ = plan_of(root, Problem("fc2", 0, 3, 320, 256, "nvfp4", "bf16"), FC2)
    plan.launch()


def test_the_grid_is_capped_by_the_clusters_that_the_device_holds(root: Path) -> None:
    """132 SMs in GPCs of 18 hold 29 clusters of four, not 33 (the driver says so); a persistent grid of more would run its rest afterwards."""
    problem = Problem("fc2", 130, 3, 8192, 256, "nvfp4", "bf16")
    plan, _, driver = plan_of(root, problem, FOURS)
    assert driver.resident_clusters(None, None, (4, 1, 1), 0) == 29 < driver.sm_count(0) // 4
    assert plan._packed.grid == (29 * 4, 1, 1)  # of 64 clusters of work
    assert plan_of(root, problem, FC2)[0]._packed.grid == (32 * 2 * 2, 1, 1)  # 64 clusters of two: all are held


def test_a_device_without_room_for_a_cluster_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "resident_clusters", lambda *_: 0)
    with pytest.raises(PlanError, match=r"clusters of 4 CTAs, and the device has room for none.*force a variant with a smaller cluster"):
        plan_of(root, Problem("fc2", 5, 3, 320, 256, "nvfp4", "bf16"), FOURS)


def chain(root: Path, first_listed: bool, second_listed: bool, *, same_list: bool = True, same_memory: bool = True) -> tuple[Plan, Plan]:
    """An FC1 Plan and an FC2 Plan on its output."""
    first, tensors, driver = plan_of(root, Problem("fc1", 5, 3, 320, 256, "nvfp4", "nvfp4", active_list=first_listed), FC1)
    problem = Problem("fc2", 5, 3, 320, 256, "nvfp4", "bf16", active_list=second_listed)
    given = {role: driver.allocate(spec.nbytes) for role, spec in problem.tensors().items()}
    given["b"] = driver.allocate(packing.interchange_bytes("fc2", 3, 320, 256))
    if same_memory:
        given.update({"a.codes": tensors["c.codes"], "a.scales": tensors["c.scales"]})
    if second_listed and first_listed and same_list:
        given["active_experts"] = tensors["active_experts"]
    return first, Loader(root, driver).plan(problem, given, 0, FC2)  # type: ignore[arg-type]


def test_a_plan_that_skips_feeds_only_a_plan_with_the_same_list(root: Path) -> None:
    for listed in ((False, False), (True, True), (False, True)):
        first, second = chain(root, *listed)
        first.feeds(second)
    first, second = chain(root, True, False)
    with pytest.raises(PlanError, match=r"leaves their columns unwritten: give .* the same list"):
        first.feeds(second)
    first, second = chain(root, True, True, same_list=False)
    with pytest.raises(PlanError, match="different lists of active experts"):
        first.feeds(second)
    first, second = chain(root, True, True, same_memory=False)
    with pytest.raises(PlanError, match="does not read the output"):
        first.feeds(second)
    with pytest.raises(PlanError, match="an FC1 Plan feeds an FC2 Plan"):
        second.feeds(first)


# ---- the modelled table


def chosen(problem: Problem, capability: tuple[int, int] = (10, 0)) -> Choice:
    variants = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_100f"]
    return select(problem, variants, load_table("sm_100f", capability))


@pytest.mark.parametrize(
    ("op", "m", "hidden", "intermediate", "tile", "settings"),
    [
        ("fc1", 8, 7168, 256, (128, 128), {}),
        ("fc1", 200, 7168, 256, (256, 256), {}),
        ("fc1", 300, 7168, 256, (128, 128), {}),
        ("fc1", 500, 7168, 256, (256, 256), {}),
        ("fc1", 200, 7168, 192, (256, 128), {}),  # 2I = 384: the pair of 256 columns is installed and does not fit
        ("fc2", 100, 7168, 256, (128, 128), {"splits": 2}),
        ("fc2", 200, 7168, 256, (256, 128), {}),
        ("fc2", 100, 2048, 768, (128, 64), {"splits": 4}),  # 16 tiles of 128 rows are few for 148 SMs
    ],
)
def test_the_table_says_what_is_published(
    op: str, m: int, hidden: int, intermediate: int, tile: tuple[int, int], settings: dict[str, int]
) -> None:
    for capability in ((10, 0), (10, 3)):
        choice = chosen(Problem(op, m, 8, hidden, intermediate, "nvfp4", "bf16"), capability)
        assert (choice.variant.tile_m, choice.variant.tile_n) == tile
        assert choice.settings == settings
        assert choice.provenance == "modelled"


def test_a_device_of_the_family_may_have_rules_of_its_own() -> None:
    problem = Problem("fc1", 640, 256, 7168, 256, "nvfp4", "nvfp4")
    assert {c: chosen(problem, c).variant.tile_m for c in ((10, 0), (10, 3))} == {(10, 0): 128, (10, 3): 256}
    assert load_table("sm_100f") == load_table("sm_100f", (10, 0))  # no device at hand: the architecture's first


@pytest.mark.parametrize("m", [0, 1, 128, 129, 256, 384, 385, 512, 4096])
@pytest.mark.parametrize("intermediate", [64, 128, 192, 1408, 2048])
def test_every_problem_that_some_variant_runs_is_ruled(m: int, intermediate: int) -> None:
    assert chosen(Problem("fc1", m, 3, 512, intermediate, "nvfp4", "nvfp4")).variant.op == "fc1"
    if intermediate % 256 == 0:
        assert chosen(Problem("fc2", m, 3, 512, intermediate, "nvfp4", "f32")).variant.op == "fc2"


def test_a_rule_s_settings_reach_the_kernel_and_the_caller_s_win(root: Path) -> None:
    problem = Problem("fc2", 5, 3, 7168, 256, "nvfp4", "bf16")
    for given, expected in ((None, 2), ({"splits": 4}, 4)):
        plan, _, _ = plan_of(root, problem, None, settings=given)
        assert plan.key == FC2
        assert int.from_bytes(parameter(plan, "splits"), "little") == expected
