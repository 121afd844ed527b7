"""Runs a tcgen05 variant in the emulator on data of the project's one generator and judges all of its output by the project's one set of bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from compiled import compiled_variant

from densemoe.compile import kernels
from densemoe.compile.emulator.device import early_roles, launch_recipe
from densemoe.compile.emulator.execution import Report
from densemoe.runtime import bounds, data, reference
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import Variant

POISON = 0xA5  # of outputs before a launch
_NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "u8": np.uint8, "e4m3": np.uint8, "e5m2": np.uint8}

Edit = Callable[[dict[str, Any]], None]
Tensors = dict[str, np.ndarray[Any, Any]]


@cache
def compiled(key: str) -> tuple[str, Recipe]:
    """PTX and recipe of a variant."""
    variant = Variant.parse(key)
    name = f"sm100_{variant.op}"
    return compiled_variant(key, name).ptx, kernels.load(name).recipe(variant)


@dataclass
class Outcome:
    """What a launch gave.

    Attributes:
        judged: its output against the reference; None where it was not compared.
        tensors: by role, outputs as the kernel left them.
        run: the emulator's report.
        workspaces: by role, as the launch left them.
    """

    judged: bounds.Report | None
    tensors: Tensors
    run: Report
    workspaces: Tensors

    def check(self) -> None:
        """Fails where the output is out of bounds."""
        assert self.judged is not None
        assert self.judged.passed, self.judged.text


def outputs_of(problem: Problem) -> Tensors:
    """Poisoned outputs. Scales start as 0: their padding rows are the caller's (contract section 2)."""
    found = {}
    for role, spec in problem.tensors().items():
        if spec.output:
            array = np.zeros(spec.shape, dtype=_NUMPY[spec.dtype])
            if role != "c.scales":
                array.view(np.uint8)[...] = POISON
            found[role] = array
    return found


def active_list(experts: Sequence[int], total: int) -> np.ndarray[Any, Any]:
    """The list as the device builds it: a count, ids, and room that nobody may read, here an id that does not exist."""
    return np.array([len(experts), *experts, *[2**30] * (total - len(experts))], dtype=np.int32)


def launch(
    key: str,
    problem: Problem,
    tensors: Tensors,
    *,
    schedule: str = "eager",
    sm_count: int = 4,
    workspaces: Tensors | None = None,
    races: bool = True,
    **settings: int,
) -> Report:
    """One launch; outputs are written in place."""
    variant = Variant.parse(key)
    accepted, reason = can_implement(variant, problem)
    assert accepted, reason
    ptx, recipe = compiled(key)
    outputs = [role for role, spec in problem.tensors().items() if spec.output]
    names = {**problem.names(), **settings}
    early = early_roles(variant.op, variant.arch, settings)
    options = {"schedule": schedule, "sm_count": sm_count, "workspaces": workspaces, "races": races, "early": early}
    return launch_recipe(ptx, recipe, names, tensors, outputs, **options)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def fc1_problem(
    m: int,
    experts: int,
    hidden: int,
    intermediate: int,
    kind: str,
    post: bool,
    zeros: float,
    seed: int,
    active: Sequence[int] | None = None,
    edit: Edit | None = None,
    compare: bool = True,
) -> tuple[Tensors, reference.Fc1Result | None, float]:
    """Inputs of FC1, the exact result where it is compared, and the output multiplier."""
    rng = np.random.default_rng([seed, m, experts])
    weights = data.fc1_weights(rng, experts, hidden, intermediate, kind)
    codes, scales, a_scale = data.activations(rng, m, hidden, "nvfp4", kind)
    tensors: Tensors = {"a.codes": codes, "a.scales": scales, "b.codes": weights.codes, "b.scales": weights.scales}
    tensors["alpha"] = data.fc1_alpha(weights, a_scale)
    if post:
        tensors["alpha_post"] = data.alpha_post(rng, m, experts, kind, zeros)
    if active is not None:
        tensors["active_experts"] = active_list(active, experts)
    if edit is not None:
        edit(tensors)
    listed = range(experts) if active is None else active
    if not compare or not listed:
        return tensors, None, 1.0
    values = reference.activation_values(tensors["a.codes"], tensors["a.scales"])
    posts = tensors["alpha_post"].astype(np.float64) if post else None
    lookup = reference.Weights("fc1", tensors["b.codes"], tensors["b.scales"], experts)
    exact = reference.fc1(values, lookup, tensors["alpha"].astype(np.float64), listed, posts)
    largest = float(np.abs(exact.y[np.isfinite(exact.y)]).max(initial=0.0))
    return tensors, exact, float(np.float32(2688.0 / max(largest, 1e-30)))


def fc1(
    key: str,
    m: int,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    kind: str = "integers",
    post: bool = False,
    zeros: float = 0.0,
    active: Sequence[int] | None = None,
    seed: int = 1,
    edit: Edit | None = None,
    compare: bool = True,
    **options: Any,
) -> Outcome:
    """FC1 of a seeded problem; only columns of active experts are judged where a list is given.

    Args:
        zeros: share of alpha_post that is exactly 0.
        edit: changes tensors before the reference is computed.
    """
    variant = Variant.parse(key)
    problem = Problem("fc1", m, experts, hidden, intermediate, "nvfp4", variant.c_dtype, alpha_post=post, active_list=active is not None)
    whole = edit is None and active is None and compare  # then several variants may run the same problem in turn
    given = (m, experts, hidden, intermediate, kind, post, zeros, seed)
    tensors, exact, multiplier = fc1_problem(*given) if whole else fc1_problem.__wrapped__(*given, active, edit, compare)
    tensors, listed = dict(tensors), range(experts) if active is None else active
    if variant.c_dtype == "nvfp4":
        tensors["output_multiplier"] = np.array([multiplier], dtype=np.float32)
    tensors.update(outputs_of(problem))
    run = launch(key, problem, tensors, **options)
    judged = None
    if exact is not None:
        columns = None if active is None else np.concatenate([e * intermediate + np.arange(intermediate) for e in listed])
        outputs = {role: tensors[role] for role, spec in problem.tensors().items() if spec.output}
        judged = bounds.compare_fc1(outputs, exact, problem, output_multiplier=multiplier, columns=columns, exact=kind == "exact")
    return Outcome(judged, tensors, run, {})


@lru_cache(maxsize=1)
def fc2_problem(
    m: int,
    experts: int,
    hidden: int,
    intermediate: int,
    kind: str,
    scalar: bool,
    zeros: float,
    seed: int,
    active: Sequence[int] | None = None,
    edit: Edit | None = None,
) -> tuple[Tensors, reference.Fc2Result]:
    """Inputs of FC2 and the exact result."""
    rng = np.random.default_rng([seed, m, experts])
    weights = data.fc2_weights(rng, experts, hidden, intermediate, kind)
    codes, scales, a_scale = data.activations(rng, m, experts * intermediate, "nvfp4", kind)
    tensors: Tensors = {"a.codes": codes, "a.scales": scales, "b.codes": weights.codes, "b.scales": weights.scales}
    tensors["alpha"] = data.fc2_alpha(rng, m, weights, a_scale, scalar=scalar, kind=kind, zeros=zeros)
    if active is not None:
        tensors["active_experts"] = active_list(active, experts)
        if not scalar:
            tensors["alpha"][:, [e for e in range(experts) if e not in active]] = 0
    if edit is not None:
        edit(tensors)
    values = reference.activation_values(tensors["a.codes"], tensors["a.scales"])
    lookup = reference.Weights("fc2", tensors["b.codes"], tensors["b.scales"], experts)
    return tensors, reference.fc2(values, lookup, tensors["alpha"].astype(np.float64), experts, intermediate)


def fc2(
    key: str,
    m: int,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    kind: str = "integers",
    scalar: bool = False,
    zeros: float = 0.0,
    active: Sequence[int] | None = None,
    seed: int = 1,
    edit: Edit | None = None,
    launches: int = 1,
    **options: Any,
) -> Outcome:
    """FC2 of a seeded problem. Where a list is given, alpha of the experts that are not on it is 0, as section 5 says.

    Args:
        launches: on the same workspaces, with the output poisoned before each; the last is judged.
    """
    variant = Variant.parse(key)
    problem = Problem("fc2", m, experts, hidden, intermediate, "nvfp4", variant.c_dtype, scalar_alpha=scalar, active_list=active is not None)
    given = (m, experts, hidden, intermediate, kind, scalar, zeros, seed)
    whole = edit is None and active is None
    tensors, exact = fc2_problem(*given) if whole else fc2_problem.__wrapped__(*given, active, edit)
    tensors = dict(tensors)
    workspaces: Tensors = {}
    for _ in range(launches):
        tensors.update(outputs_of(problem))
        run = launch(key, problem, tensors, workspaces=workspaces, **options)
    judged = bounds.compare_fc2({"c": tensors["c"]}, exact, problem, exact=kind == "exact")
    return Outcome(judged, tensors, run, workspaces)


