"""Grouped GEMMs and route on the emulator: one launch of a kernel, and one on the reference's routes, judged. Both families of sm_90a."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from compiled import compiled_variant

from densemoe.compile import kernels
from densemoe.compile.emulator.device import early_roles, launch_recipe
from densemoe.compile.emulator.execution import Report
from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.errors import EmulatorError
from densemoe.runtime.layout import from_k64_order, k64_order
from densemoe.runtime.nvfp4 import bf16_values
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import DETERMINISTIC, ROUTES, Variant

NUMPY: dict[str, Any] = {"u8": np.uint8, "bf16": np.uint16, "f16": np.float16, "f32": np.float32, "i32": np.int32, "i64": np.int64}
LARGEST = 448.0 * 6.0  # of a scale and a code


def kernel_of(variant: Variant) -> str:
    """The module of a variant: tiles of 256 weight rows are WGMMA's."""
    return f"sm90_wgmma_{variant.op}" if variant.tile_n == 256 else f"sm90_{variant.op}"


@cache
def ptx_of(key: str) -> str:
    return compiled_variant(key).ptx


def launch(
    key: str, problem: Problem, tensors: dict[str, Any], settings: Mapping[str, int] = MappingProxyType({}), **options: Any
) -> tuple[dict[str, Any], Report]:
    """The kernel's outputs by role, poisoned before."""
    variant = Variant.parse(key)
    accepted, reason = can_implement(variant, problem)
    assert accepted, reason
    outputs = {role: np.full(spec.shape, 0x5A, NUMPY[spec.dtype]) for role, spec in problem.tensors().items() if spec.output}
    recipe = kernels.load(kernel_of(variant)).recipe(variant)
    report = launch_recipe(ptx_of(key), recipe, {**problem.names(), **settings}, {**tensors, **outputs}, outputs, **options)
    return outputs, report


def run(
    key: str, m: int, experts: int, top_k: int, hidden: int, intermediate: int, kind: str, *, ids: Any = None, launches: int = 1, **options: Any
) -> tuple[bounds.Report, Report]:
    """One grouped GEMM on the reference's routes, or on the router's choice, judged in every row that they have.

    Args:
        options: of ``launch``, but ``first_expert``, ``elsewhere`` and ``id_dtype`` of a problem that has the router's choice.
    """
    variant = Variant.parse(key)
    own = {name: options.pop(name, otherwise) for name, otherwise in (("first_expert", 0), ("elsewhere", False), ("id_dtype", "i32"))}
    choice = {**own, "routes": True} if variant.option(ROUTES) else {}
    problem = Problem(
        variant.op, m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype,
        top_k=top_k, group_tile=variant.tile_m, deterministic=bool(variant.option(DETERMINISTIC)), **choice,
    )  # fmt: skip
    rng = np.random.default_rng([m, experts, hidden, intermediate])
    fc1 = variant.op == "groupedfc1"
    weights = (data.fc1_weights if fc1 else data.fc2_weights)(rng, experts, hidden, intermediate, kind)
    pack = packing.pack_fc1(weights.codes, weights.scales) if fc1 else packing.pack_fc2(weights.codes, weights.scales, experts)
    read = reference.Weights("fc1" if fc1 else "fc2", weights.codes, weights.scales, experts)
    first, _, a_scale = data.activations(rng, problem.a_rows, problem.k, variant.a_dtype, kind)
    arrays = {"a.k64": k64_order(first)} if problem.a_in_k64_order else {"a": first}
    a = bf16_values(first).astype(np.float64)
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(m)]) if ids is None else np.asarray(ids)
    w2_alpha = np.exp2(rng.integers(-3, 3, experts)).astype(np.float32)
    router = np.exp2(rng.integers(-2, 1, chosen.shape)).astype(np.float32)
    routes = reference.route(
        chosen, router, w2_alpha, group_tile=variant.tile_m, first_expert=problem.first_expert, elsewhere=problem.elsewhere
    )  # fmt: skip
    routes_given = routes.given(problem)
    if problem.routes:
        every = {"ids": chosen.astype(NUMPY[problem.id_dtype]), "router": router, "w2_alpha": w2_alpha}
        routes_given = {role: array for role, array in every.items() if role in problem.tensors()}
    used = len(routes.rows)
    multiplier = None
    if fc1:
        arrays["alpha"] = data.fc1_alpha(weights, a_scale)
        exact: Any = reference.grouped_fc1(a, read, arrays["alpha"].astype(np.float64), routes)
        if variant.c_dtype == "nvfp4":
            multiplier = np.float32(LARGEST / max(float(np.abs(exact.y).max()), 1e-30))
            arrays["output_multiplier"] = np.array([multiplier], np.float32)
    else:
        exact = reference.grouped_fc2(a[:used], read, routes.row_alpha.astype(np.float64), routes, m)
    tensors = {**arrays, **routes_given, "b": pack}
    workspaces: dict[str, Any] = {}
    for _ in range(launches):
        outputs, report = launch(key, problem, tensors, workspaces=workspaces, **options)
    recipe = kernels.load(kernel_of(variant)).recipe(variant)
    assert all(not workspaces[each.role].any() for each in recipe.workspaces if each.zeroed)
    is_exact = kind == "exact"
    if problem.c_in_k64_order:  # FC2 reads whole K 128 blocks
        assert not from_k64_order(outputs["c.k64"], outputs["c.k64"].shape[1])[:used, intermediate:].any()
    if fc1:
        given = None if multiplier is None else float(multiplier)
        return bounds.compare_fc1(outputs, exact, problem, output_multiplier=given, rows=np.arange(used), exact=is_exact), report
    return bounds.compare_fc2(outputs, exact, problem, exact=is_exact), report


def reads_lists_early_only_where_told(key: str, case: tuple[Any, ...], early_list: int) -> None:
    """Asserts that the setting ``early_list`` is what lets a kernel read ``route``'s lists before ``griddepcontrol.wait``."""
    variant, settings = Variant.parse(key), {"early_list": early_list}
    early = early_roles(variant.op, variant.arch, settings)
    comparison, _ = run(key, *case, schedule="lazy", sm_count=1, settings=settings, early=early)
    assert comparison.passed, comparison.detail
    if early_list:
        with pytest.raises(EmulatorError, match=r"griddepcontrol\.wait"):
            run(key, *case, schedule="lazy", sm_count=1, settings={"early_list": 1})
