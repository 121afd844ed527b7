"""``densemoe run``: one kernel on the GPU, timed and checked against the float64 reference; and the layer of the quick start.

Needs the extra [host] (numpy). Weights are kept in as many copies as exceed twice the L2, and launches rotate over them, so that times are
those of cold weights; ``--no-cold-l2`` uses one copy.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.errors import DriverError
from densemoe.runtime.layer_run import INTO, LayerRun
from densemoe.runtime.loader import Loader
from densemoe.runtime.nvfp4 import GROUP, LARGEST_E2M1, LARGEST_E4M3, bf16_values
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import Choice

__all__ = ["LayerReport", "RunReport", "run_layer", "run_single"]

COLD_FACTOR: Final = 2  # weight copies fill this many L2 caches
LARGEST_CHECK: Final = 2**31  # multiply-adds of the numpy reference before output columns are sampled; about ten seconds
DECODING_TOKENS: Final = 4  # decoding a weight in numpy costs about as much as using it for so many tokens
REPLAYS: Final = 5
_NUMPY: Final = {"u8": np.uint8, "e4m3": np.uint8, "e5m2": np.uint8, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


@dataclass
class RunReport:
    """Result of a run.

    Attributes:
        microseconds: median time of a launch, None where it was not timed.
        checked_columns, columns: how many output columns the reference covered, of how many.
        worst: largest error divided by its bound.
        settings: run-time switches of the kernel that the launches had; its defaults where empty.
    """

    device: str
    driver: int
    variant: str
    choice: str
    problem: Mapping[str, Any]
    settings: Mapping[str, int] = field(default_factory=dict)
    microseconds: float | None = None
    weight_bytes: int = 0
    copies: int = 1
    worst: float = 0.0
    mismatches: int = 0
    exemptions: int = 0
    checked_columns: int = 0
    columns: int = 0
    passed: bool | None = None
    detail: str = ""


class _Memory:
    """Device allocations of one run, freed together."""

    def __init__(self, driver: Any) -> None:
        self.driver, self.pointers = driver, []  # type: ignore[var-annotated]

    def put(self, array: np.ndarray[Any, Any]) -> int:
        pointer = self.empty(array.nbytes)
        self.driver.to_device(pointer, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return pointer

    def empty(self, nbytes: int, poison: int | None = None) -> int:
        pointer: int = self.driver.allocate(nbytes)
        self.pointers.append(pointer)
        if poison is not None:
            self.driver.fill(pointer, poison, nbytes)
        return pointer

    def put_all(self, arrays: Sequence[np.ndarray[Any, Any]]) -> int:
        """One allocation that holds the arrays end to end."""
        pointer = self.empty(sum(array.nbytes for array in arrays))
        at = pointer
        for array in arrays:
            self.driver.to_device(at, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            at += array.nbytes
        return pointer

    def get(self, pointer: int, shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
        array = np.empty(shape, dtype=dtype)
        self.driver.to_host(array.reshape(-1).view(np.uint8), pointer)
        return array

    def close(self) -> None:
        while self.pointers:
            self.driver.free(self.pointers.pop())


def _make_weights(problem: Problem, kind: str, seed: int) -> data.Weights:
    make = data.fc1_weights if problem.op == "fc1" else data.fc2_weights
    return make(np.random.default_rng(seed), problem.experts, problem.hidden, problem.intermediate, kind)


def _activations(problem: Problem, kind: str, seed: int) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any], np.float32]:
    """(arrays by role, float64 values without the global scale, global scale)."""
    first, scales, scale = data.activations(np.random.default_rng(seed), problem.m, problem.k, problem.a_dtype, kind)
    if problem.a_dtype == "bf16":
        return {"a": first}, bf16_values(first).astype(np.float64), scale
    return {"a.codes": first, "a.scales": scales}, reference.activation_values(first, scales), scale


def _describe(choice: Choice) -> str:
    return f"{choice.reason} ({choice.provenance})"


def _time(loader: Loader, plans: Sequence[Plan], warmup: int, iterations: int) -> float:
    """Median microseconds of a launch: graphs of ``iterations`` launches that rotate over ``plans``."""
    driver = loader.driver
    stream = driver.stream()
    for index in range(max(warmup, len(plans))):
        plans[index % len(plans)].launch(stream)
    driver.synchronize()
    driver.begin_capture(stream)
    for index in range(iterations):
        plans[index % len(plans)].launch(stream)
    graph = driver.end_capture(stream)
    start, end = driver.event(), driver.event()
    times = []
    for _ in range(REPLAYS + 1):
        driver.record(start, stream)
        driver.launch_graph(graph, stream)
        driver.record(end, stream)
        times.append(driver.elapsed(start, end) * 1000 / iterations)
    return statistics.median(times[1:])


def run_single(
    loader: Loader,
    problem: Problem,
    *,
    device: int = 0,
    variant: str | None = None,
    warmup: int = 10,
    iterations: int = 100,
    cold: bool = True,
    check: bool = True,
    seed: int = 0,
    kind: str = "integers",
    settings: Mapping[str, int] | None = None,
) -> RunReport:
    """Runs one problem.

    Args:
        iterations: timed launches a graph; 0 does not time.
        cold: rotate over weight copies that exceed the L2.
        check: compare with the float64 reference.
        kind: of the data, see ``data.fc1_weights``.
        settings: run-time switches of the kernel, instead of the selection's.

    Raises:
        DensemoeError: whatever makes the launch impossible.
    """
    driver = loader.driver
    driver.use_device(device)
    choice = loader.select(problem, device, variant)
    shown = {
        name: getattr(problem, name)
        for name in ("op", "m", "experts", "hidden", "intermediate", "a_dtype", "c_dtype", "alpha_post", "scalar_alpha")
    }
    own = {**choice.settings, **(settings or {})}
    report = RunReport(driver.device_name(device), driver.version(), choice.variant.key, _describe(choice), shown, own, columns=problem.n_out)
    weights, layout = _make_weights(problem, kind, seed), loader.manifest(device).variants[choice.variant.key].layout
    packed = packing.pack(layout, problem.op, weights.codes, weights.scales, problem.experts)
    read = reference.Weights(problem.op, weights.codes, weights.scales, problem.experts)
    report.weight_bytes = int(packed.nbytes)
    rng = np.random.default_rng(seed + 1)
    arrays, a, a_scale = _activations(problem, kind, seed + 2)
    if problem.op == "fc1":
        arrays["alpha"] = data.fc1_alpha(weights, a_scale)
        if problem.alpha_post:
            arrays["alpha_post"] = data.alpha_post(rng, problem.m, problem.experts, kind)
        if problem.c_dtype == "nvfp4":
            arrays["output_multiplier"] = np.array([_multiplier(arrays, a, read)], dtype=np.float32)
    else:
        arrays["alpha"] = data.fc2_alpha(rng, problem.m, weights, a_scale, scalar=problem.scalar_alpha, kind=kind)
    memory = _Memory(driver)
    plans: list[Plan] = []
    try:
        tensors: dict[str, Any] = {role: memory.put(array) for role, array in arrays.items()}
        outputs = {role: spec for role, spec in problem.tensors().items() if spec.output}
        for role, spec in outputs.items():
            tensors[role] = memory.empty(spec.nbytes, poison=0xA5)
        l2 = driver.attribute("L2_CACHE_SIZE", device)
        report.copies = max(1, -(-COLD_FACTOR * l2 // max(1, report.weight_bytes)) + 1) if cold and iterations else 1
        copies = [memory.put(packed) for _ in range(report.copies)]
        plans = [loader.plan(problem, {**tensors, "b": copy}, device, choice.variant.key, settings=own) for copy in copies]
        plans[0].launch()
        driver.synchronize()
        got = {role: memory.get(tensors[role], spec.shape, _NUMPY[spec.dtype]) for role, spec in outputs.items()}
        if check:
            _check(report, problem, read, arrays, a, got)
        if iterations and problem.m:
            report.microseconds = _time(loader, plans, warmup, iterations)
    finally:
        for plan in plans:
            plan.close()
        memory.close()
    return report


def _sampled(problem: Problem) -> npt.NDArray[np.int64]:
    """Output columns that the numpy reference covers: all, or as many whole groups of 16 as it does in seconds, evenly spread."""
    per_column = max(problem.m, DECODING_TOKENS) * problem.k * (2 if problem.op == "fc1" else 1)
    groups = problem.n_out // GROUP
    count = min(groups, max(1, LARGEST_CHECK // (per_column * GROUP)))
    chosen = np.unique(np.round(np.linspace(0, groups - 1, count)).astype(np.int64))
    return (chosen[:, None] * GROUP + np.arange(GROUP)).reshape(-1)


def _multiplier(arrays: Mapping[str, Any], a: npt.NDArray[Any], weights: reference.Weights) -> float:
    """``output_multiplier`` by the largest output of the first expert's first columns."""
    first = reference.fc1(a, weights, arrays["alpha"].astype(np.float64), [(0, np.arange(64))])
    return LARGEST_E4M3 * LARGEST_E2M1 / max(float(np.max(np.abs(first.y), initial=0.0)), 1e-30)


def _check(
    report: RunReport, problem: Problem, weights: reference.Weights, arrays: Mapping[str, Any], a: npt.NDArray[Any], got: Mapping[str, Any]
) -> None:
    """Fills in the comparison."""
    if problem.m == 0:
        report.passed = True
        return
    alpha, columns = arrays["alpha"].astype(np.float64), _sampled(problem)
    report.checked_columns = len(columns)
    if problem.op == "fc2":
        exact2 = reference.fc2(a, weights, alpha, problem.experts, problem.intermediate, columns=columns)
        result = bounds.compare_fc2(got, exact2, problem, columns=columns)
    else:
        post = arrays["alpha_post"].astype(np.float64) if problem.alpha_post else None
        exact = reference.fc1(a, weights, alpha, reference.fc1_columns(columns, problem.intermediate), post)
        multiplier = float(arrays["output_multiplier"][0]) if problem.c_dtype == "nvfp4" else None
        result = bounds.compare_fc1(got, exact, problem, output_multiplier=multiplier, columns=columns)
    report.worst, report.mismatches = result.worst, result.mismatches + sum(part.mismatches for part in result.parts)
    report.exemptions = result.exemptions + sum(part.exemptions for part in result.parts)
    report.passed, report.detail = result.passed, result.detail


@dataclass
class LayerReport:
    """Result of a whole layer: FC1 and FC2 in the default form (contract section 5), dense.

    Attributes:
        fc1_worst, fc2_worst: largest error divided by its bound; FC2 on FC1's actual output.
        mark: share of outputs within 0.15 + 1 % of the unquantised layer; 0.97 passes (contract section 9).
    """

    device: str
    driver: int
    shape: Mapping[str, int]
    fc1: str
    fc2: str
    microseconds: float | None
    fc1_worst: float
    fc2_worst: float
    mark: float
    checked: str
    passed: bool


def run_layer(
    loader: Loader,
    *,
    m: int,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    a_dtype: str = "bf16",
    device: int = 0,
    seed: int = 0,
    listed: bool = False,
) -> LayerReport:
    """Runs a MoE layer: router weights → alpha, FC1, FC2; FC1 and FC2 within their bounds, the layer by its mark.

    Only the routed experts' weights are made; the others' memory holds a routed expert's, of which nothing may reach the output.

    Args:
        listed: the kernels get the list of active experts and skip the others.
    """
    driver = loader.driver
    driver.use_device(device)
    entries = loader.manifest(device).variants.values()
    if not any(entry.layout == packing.LAYOUT for entry in entries):
        raise DriverError(
            f"this layer is packed for {packing.LAYOUT}, which no kernel of {driver.device_name(device)} reads: `densemoe run` runs one kernel there,"
            " `densemoe proof` every grid and layer"
        )
    layer = LayerRun(m, experts, top_k, hidden, intermediate, a_dtype, seed, listed)
    memory = _Memory(driver)
    plans: list[Plan] = []
    try:
        tensors: dict[str, Any] = {role: memory.put(array) for role, array in layer.fc1_inputs().items()}
        tensors["b"] = memory.put_all(layer.fc1_weights)
        outputs = {role: spec for role, spec in layer.first.tensors().items() if spec.output}
        for role, spec in outputs.items():
            tensors[role] = memory.empty(spec.nbytes, poison=0xA5)
        c = memory.empty(m * hidden * 2, poison=0xA5)
        rest: dict[str, Any] = {INTO[role]: tensors[role] for role in outputs}
        rest.update({role: memory.put(array) for role, array in layer.fc2_inputs().items()}, b=memory.put_all(layer.fc2_weights), c=c)
        if listed:
            rest["active_experts"] = tensors["active_experts"]  # a Plan that skipped feeds one with the same list
        plans = [loader.plan(layer.first, tensors, device), loader.plan(layer.second, rest, device)]
        for plan in plans:
            plan.launch()
        driver.synchronize()
        got = {role: memory.get(tensors[role], spec.shape, _NUMPY[spec.dtype]) for role, spec in outputs.items()}
        result = memory.get(c, (m, hidden), np.uint16)
        microseconds = _time_layer(loader, plans)
    finally:
        for plan in plans:
            plan.close()
        memory.close()
    verdict = layer.judge(got, result)
    return LayerReport(
        driver.device_name(device),
        driver.version(),
        layer.shape,
        plans[0].key,
        plans[1].key,
        microseconds,
        verdict.fc1.worst,
        verdict.fc2.worst,
        verdict.mark,
        verdict.checked,
        verdict.passed,
    )


def _time_layer(loader: Loader, plans: Sequence[Plan], repeats: int = 20) -> float:
    """Median microseconds of FC1 and FC2 in one graph; the weights of a model-sized layer exceed the L2 by themselves."""
    return _time(loader, plans, 2, repeats * len(plans)) * len(plans)
