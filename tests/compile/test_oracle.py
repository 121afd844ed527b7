"""Every variant's recipe against the compiler's own host code, on three shapes; and recipes with one fault, which the oracle must see."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from densemoe.compile import kernels, matrix, oracle
from densemoe.runtime.recipe import Parameter, Recipe
from densemoe.runtime.variant import DETERMINISTIC, GROUPED_OPS, Variant

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="the oracle links host code with a C compiler, and there is none")

PLANNED = matrix.load().profile("full")


def _case(planned: matrix.Planned) -> object:
    """On Blackwell an output dtype changes nothing that a recipe says but the c pointer's role, nor does it in grouped kernels: one dtype a tile, the
    others with --full. Of FC2 in one order one tile for each number of resident CTAs, which its recipe follows. A commit runs a third."""
    variant = planned.variant
    first_output = {"fc1": "nvfp4", "fc2": "bf16", "groupedfc1": "nvfp4", "groupedfc2": "bf16"}.get(variant.op, variant.c_dtype)
    usual = (variant.arch == "sm_90a" and variant.op not in GROUPED_OPS) or variant.c_dtype == first_output
    if variant.option(DETERMINISTIC):
        usual &= variant.a_dtype == "bf16" and (variant.tile_m, variant.tile_n) in ((8, 64), (16, 64), (16, 256), (32, 256), (48, 256), (96, 256))
    return pytest.param(planned, id=variant.key, marks=pytest.mark.sampled(3, planned.kernel) if usual else pytest.mark.full)


@pytest.mark.parametrize("planned", [_case(each) for each in PLANNED])
def test_the_recipe_is_what_the_compiler_launches(planned: matrix.Planned) -> None:
    comparisons = oracle.compare(planned.variant, planned.kernel, options=planned.compiler_options)
    assert len(comparisons) >= 3
    for comparison in comparisons:
        assert comparison.differences == [], (comparison.problem, comparison.mask)
        # nothing but padding is left out: the mask covers every byte of every parameter
        assert comparison.mask == kernels.load(planned.kernel).recipe(planned.variant).offsets()


def _faulty(recipe: Recipe) -> dict[str, Recipe]:
    parameters = list(recipe.parameters)
    swapped = [parameters[2], parameters[1], parameters[0], *parameters[3:]]
    word = next(i for i, each in enumerate(parameters) if each.kind == "u32")
    other = [*parameters[:word], Parameter("x", "u32", "M + 1"), *parameters[word + 1 :]]
    return {
        "grid": dataclasses.replace(recipe, grid=("1 + M", 1, 1)),
        "block": dataclasses.replace(recipe, block=(64, 1, 1)),
        "cluster": dataclasses.replace(recipe, cluster=(2, 1, 1)),
        "dynamic shared memory": dataclasses.replace(recipe, dynamic_smem=recipe.dynamic_smem + 16),
        "programmatic launch": dataclasses.replace(recipe, programmatic_launch=False),
        "parameter b": dataclasses.replace(recipe, parameters=tuple(swapped)),
        "parameter x": dataclasses.replace(recipe, parameters=tuple(other)),
    }


@pytest.mark.parametrize("fault", ["grid", "block", "cluster", "dynamic shared memory", "programmatic launch", "parameter b", "parameter x"])
def test_a_fault_in_a_recipe_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant.parse("fc2.sm90a.t8x64.c1x1.bf16-bf16")
    module = kernels.load("sm90_fc2")
    recipe = module.recipe(variant)
    broken = _faulty(recipe)[fault]
    names = {**oracle.shapes(variant)[1].names(), "early_list": 0, "sm_count": 132}
    addresses = oracle.addresses(recipe, oracle.shapes(variant)[1])
    with oracle.observe(variant, "sm90_fc2") as run:
        observed = run(module.oracle_arguments(variant, names, addresses), recipe, 132)
    assert oracle.differences(recipe, oracle.pack(recipe, names, addresses), observed) == []
    found = oracle.differences(broken, oracle.pack(broken, names, addresses), observed)
    assert any(each.startswith(fault) for each in found), found
