"""The quick start's layer on the emulator: FC1 and FC2 from the PTX of the built cubins, where no GPU can run them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.compile import matrix
from densemoe.compile.emulate.running import REWRITTEN, poisoned
from densemoe.compile.emulate.verify import regenerate
from densemoe.compile.emulator.device import launch_recipe
from densemoe.runtime import bounds
from densemoe.runtime.errors import ArtifactError, SelectionError
from densemoe.runtime.layer_run import INTO, LayerRun
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.manifest import ManifestVariant
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import load_table, select

__all__ = ["ARCH", "EmulatedKernel", "EmulatedLayer", "run_layer"]

ARCH: Final = "sm_90a"  # what the quick profile is built for
#: A layer that takes seconds; the GPU's quick start has E 128, k 8, H 2048, I 768.
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 512, 256
SCHEDULE: Final = "random:1"

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class EmulatedKernel:
    """One launch.

    Attributes:
        reason: why the selection took the variant.
        worst: largest error over its bound; filled in when the layer is judged.
        instructions: of warps.
    """

    key: str
    reason: str
    worst: float
    instructions: int
    products: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class EmulatedLayer:
    """Result of an emulated layer; nothing of it was measured.

    Attributes:
        mark: share of outputs within 0.15 + 1 % of the unquantised layer; 0.97 passes (contract section 9).
        seconds: of all of it, with data, compiling and judging.
    """

    shape: Mapping[str, int]
    a_dtype: str
    schedule: str
    fc1: EmulatedKernel
    fc2: EmulatedKernel
    mark: float
    checked: str
    passed: bool
    seconds: float
    emulated: bool = field(default=True)


def run_layer(artifacts: ArtifactSet, *, m: int, a_dtype: str, seed: int = 0) -> EmulatedLayer:
    """Runs FC1 and FC2 of a small MoE layer on the emulator and judges them as the GPU's quick start does.

    Args:
        artifacts: a root with an ``sm_90a`` set.
        a_dtype: of the layer's input.

    Raises:
        SelectionError: no built variant runs the layer.
        CompileError: the sources do not give the cubins that the set holds.
        EmulatorError: a fault of a kernel.
    """
    started = time.perf_counter()
    layer = LayerRun(m, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, a_dtype, seed)
    one, got = _launch(artifacts, layer.first, {**layer.fc1_inputs(), "b": np.concatenate(layer.fc1_weights, axis=None)})
    between = {INTO[role]: array for role, array in got.items()}
    two, result = _launch(artifacts, layer.second, {**between, **layer.fc2_inputs(), "b": np.concatenate(layer.fc2_weights, axis=None)})
    verdict = layer.judge(got, result["c"])
    return EmulatedLayer(
        layer.shape,
        a_dtype,
        SCHEDULE,
        replace(one, worst=_worst(verdict.fc1)),
        replace(two, worst=_worst(verdict.fc2)),
        verdict.mark,
        verdict.checked,
        verdict.passed,
        time.perf_counter() - started,
    )


def _worst(report: bounds.Report) -> float:
    return max(each.worst for each in (report, *report.parts))


def _entry(artifacts: ArtifactSet, problem: Problem) -> tuple[ManifestVariant, str]:
    """The variant that the selection takes, and why."""
    if ARCH not in artifacts.architectures:
        raise SelectionError(f"{artifacts.root} has no set for {ARCH}, which the quick start emulates: run `densemoe build --profile quick`")
    variants = artifacts.manifest(ARCH).variants
    choice = select(problem, [entry.variant for entry in variants.values()], load_table(ARCH))
    return variants[choice.variant.key], f"{choice.reason} ({choice.provenance})"


def _launch(artifacts: ArtifactSet, problem: Problem, inputs: Arrays) -> tuple[EmulatedKernel, Arrays]:
    """(the launch, not judged yet; outputs by role)."""
    entry, reason = _entry(artifacts, problem)
    planned = [each for each in matrix.load().profile("full") if each.variant.key == entry.key]
    if not planned:
        raise ArtifactError(f"{entry.key} is built but not in the matrix, which says how it was compiled: build again")
    ptx = regenerate((planned[0], entry.sha256))
    outputs = {role: poisoned(role, spec.shape, spec.dtype) for role, spec in problem.tensors().items() if spec.output}
    again = REWRITTEN.get(problem.op, ())
    run = launch_recipe(ptx, entry.recipe, problem.names(), {**inputs, **outputs}, outputs, schedule=SCHEDULE, rewritten=again)
    return EmulatedKernel(entry.key, reason, float("nan"), sum(run.instructions.values()), dict(run.products), run.seconds), outputs
