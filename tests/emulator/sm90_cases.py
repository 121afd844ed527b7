"""One problem of FC1 or FC2 for sm_90a on the emulator, through the runtime's recipes, packers, reference and bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from compiled import compiled_variant

from densemoe.compile import kernels
from densemoe.compile.emulator.device import early_roles, launch_recipe
from densemoe.compile.emulator.execution import Report
from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.nvfp4 import bf16_values
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

NUMPY: dict[str, Any] = {"u8": np.uint8, "bf16": np.uint16, "f16": np.float16, "f32": np.float32}
LARGEST = 448.0 * 6.0  # of a scale and a code


@cache
def ptx_of(key: str) -> str:
    return compiled_variant(key).ptx


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
    top_k: int = 0,
    settings: Mapping[str, int] = MappingProxyType({}),
    sm_count: int = 132,
) -> tuple[bounds.Report, Report]:
    """One problem on the emulator: the comparison and the emulator's report.

    Args:
        active: the listed experts. Weights and FC1 outputs of the others are then NaN or poison, and must stay without effect.
        top_k: of such a list, where it is known.
    """
    variant = Variant.parse(key)
    problem = Problem(
        variant.op, m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype,
        alpha_post=post, scalar_alpha=scalar, active_list=active is not None, top_k=top_k,
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
    names = {**problem.names(), **settings}
    early = early_roles(variant.op, variant.arch, settings)
    report = launch_recipe(edit(ptx_of(key)), recipe, names, tensors, outputs, schedule=schedule, sm_count=sm_count, early=early)
    is_exact = kind == "exact"
    if fc1:
        given = None if multiplier is None else float(multiplier)
        return bounds.compare_fc1(outputs, exact, problem, output_multiplier=given, columns=columns, exact=is_exact), report
    return bounds.compare_fc2(outputs, exact, problem, exact=is_exact), report
