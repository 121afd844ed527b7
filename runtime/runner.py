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

from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.layout import deinterleave_up_gate, untile_scales
from densemoe.runtime.loader import Loader
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, bf16_values, unpack_codes
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import Choice

__all__ = ["LayerReport", "RunReport", "run_layer", "run_single"]

COLD_FACTOR: Final = 2  # weight copies fill this many L2 caches
LARGEST_CHECK: Final = 2**31  # multiply-adds of the numpy reference before experts are sampled; about ten seconds
REPLAYS: Final = 5
_NUMPY: Final = {"u8": np.uint8, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


@dataclass
class RunReport:
    """Result of a run.

    Attributes:
        microseconds: median time of a launch, None where it was not timed.
        checked_columns, columns: how many output columns the reference covered, of how many.
        worst: largest error divided by its bound.
    """

    device: str
    driver: int
    variant: str
    choice: str
    problem: Mapping[str, Any]
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

    def get(self, pointer: int, shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
        array = np.empty(shape, dtype=dtype)
        self.driver.to_host(array.reshape(-1).view(np.uint8), pointer)
        return array

    def close(self) -> None:
        while self.pointers:
            self.driver.free(self.pointers.pop())


@dataclass
class _Weights:
    """Host weights of one op, with what the reference needs."""

    op: str
    experts: int
    hidden: int
    intermediate: int
    codes: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    global_scales: np.ndarray[Any, Any]
    packed: np.ndarray[Any, Any] = field(repr=False, default_factory=lambda: np.empty(0, np.uint8))

    @classmethod
    def make(cls, op: str, experts: int, hidden: int, intermediate: int, kind: str, seed: int) -> _Weights:
        rng = np.random.default_rng(seed)
        if op == "fc1":
            one = data.fc1_weights(rng, experts, hidden, intermediate, kind)
            packed = packing.pack_fc1(one.codes, one.scales)
            plain = untile_scales(one.scales, experts * 2 * intermediate)
            return cls(op, experts, hidden, intermediate, one.codes, plain, one.global_scales, packed)
        two = data.fc2_weights(rng, experts, hidden, intermediate, kind)
        plain = untile_scales(two.scales, hidden)
        return cls(op, experts, hidden, intermediate, two.codes, plain, two.global_scales, packing.pack_fc2(two.codes, two.scales, experts))

    def expert(self, index: int) -> Any:
        """float64 values of one expert: (up, gate), or ``[H, I]``."""
        if self.op == "fc1":
            rows = 2 * self.intermediate
            return deinterleave_up_gate(_values(self.codes[index], self.scales[index * rows : (index + 1) * rows]))
        half, groups = self.intermediate // 2, self.intermediate // 16
        part = slice(index * half, (index + 1) * half)
        return _values(self.codes[:, part], self.scales[:, index * groups : (index + 1) * groups])


def _values(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return E2M1_VALUES[unpack_codes(codes)] * np.repeat(E4M3_VALUES[scales], 16, axis=1)


def _activations(problem: Problem, kind: str, seed: int) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any], np.float32]:
    """(arrays by role, float64 values, global scale)."""
    first, scales, scale = data.activations(np.random.default_rng(seed), problem.m, problem.k, problem.a_dtype, kind)
    if problem.a_dtype == "bf16":
        return {"a": first}, bf16_values(first).astype(np.float64), np.float32(1)
    return {"a.codes": first, "a.scales": scales}, _values(first, untile_scales(scales, problem.m)), scale


def _widened(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    return bf16_values(array).astype(np.float64) if dtype == "bf16" else array.astype(np.float64)


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
) -> RunReport:
    """Runs one problem.

    Args:
        iterations: timed launches a graph; 0 does not time.
        cold: rotate over weight copies that exceed the L2.
        check: compare with the float64 reference.
        kind: of the data, see ``data.fc1_weights``.

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
    report = RunReport(driver.device_name(device), driver.version(), choice.variant.key, _describe(choice), shown, columns=problem.n_out)
    weights = _Weights.make(problem.op, problem.experts, problem.hidden, problem.intermediate, kind, seed)
    report.weight_bytes = int(weights.packed.nbytes)
    rng = np.random.default_rng(seed + 1)
    arrays, a, a_scale = _activations(problem, kind, seed + 2)
    if problem.op == "fc1":
        arrays["alpha"] = (weights.global_scales * a_scale).astype(np.float32)
        if problem.alpha_post:
            arrays["alpha_post"] = rng.uniform(0.8, 1.2, (problem.m, problem.experts)).astype(np.float32)
        if problem.c_dtype == "nvfp4":
            arrays["output_multiplier"] = np.array([_multiplier(problem, arrays, a, weights)], dtype=np.float32)
    else:
        shape = (1,) if problem.scalar_alpha else (problem.m, problem.experts)
        arrays["alpha"] = rng.uniform(0, 2, shape).astype(np.float32)
    memory = _Memory(driver)
    plans: list[Plan] = []
    try:
        tensors: dict[str, Any] = {role: memory.put(array) for role, array in arrays.items()}
        outputs = {role: spec for role, spec in problem.tensors().items() if spec.output}
        for role, spec in outputs.items():
            tensors[role] = memory.empty(spec.nbytes, poison=0xA5)
        l2 = driver.attribute("L2_CACHE_SIZE", device)
        report.copies = max(1, -(-COLD_FACTOR * l2 // max(1, report.weight_bytes)) + 1) if cold and iterations else 1
        copies = [memory.put(weights.packed) for _ in range(report.copies)]
        plans = [loader.plan(problem, {**tensors, "b": copy}, device, choice.variant.key) for copy in copies]
        plans[0].launch()
        driver.synchronize()
        got = {role: memory.get(tensors[role], spec.shape, _NUMPY[spec.dtype]) for role, spec in outputs.items()}
        if check:
            _check(report, problem, weights, arrays, a, got)
        if iterations and problem.m:
            report.microseconds = _time(loader, plans, warmup, iterations)
    finally:
        for plan in plans:
            plan.close()
        memory.close()
    return report


def _sampled(problem: Problem) -> list[int]:
    """Experts that the numpy reference covers: all, or as many as it does in seconds."""
    cost = problem.m * 4 * problem.intermediate * problem.hidden * problem.experts
    count = problem.experts if cost <= LARGEST_CHECK else max(1, problem.experts * LARGEST_CHECK // cost)
    return sorted({round(i * (problem.experts - 1) / max(1, count - 1)) for i in range(count)})


def _multiplier(problem: Problem, arrays: Mapping[str, Any], a: Any, weights: _Weights) -> float:
    first = reference.fc1(a, weights.expert, arrays["alpha"].astype(np.float64), [0])
    return 448.0 * 6.0 / max(float(np.max(np.abs(first.y), initial=0.0)), 1e-30)


def _check(report: RunReport, problem: Problem, weights: _Weights, arrays: Mapping[str, Any], a: Any, got: Mapping[str, Any]) -> None:
    """Fills in the comparison."""
    if problem.m == 0:
        report.passed = True
        return
    alpha = arrays["alpha"].astype(np.float64)
    if problem.op == "fc2":
        exact2 = reference.fc2(a, weights.expert, alpha, problem.experts, problem.intermediate)
        bound = bounds.fc2_bound(exact2, problem.experts, problem.intermediate)
        result = bounds.compare_plain(_widened(got["c"], problem.c_dtype), exact2.c, bound, problem.c_dtype)
        report.checked_columns = problem.n_out
    else:
        chosen = _sampled(problem)
        post = arrays["alpha_post"].astype(np.float64) if problem.alpha_post else None
        exact = reference.fc1(a, weights.expert, alpha, chosen, post)
        bound = bounds.fc1_bound(exact, problem.hidden)
        width = problem.intermediate
        columns = np.concatenate([np.arange(e * width, (e + 1) * width) for e in chosen])
        report.checked_columns = len(columns)
        if problem.c_dtype == "nvfp4":
            scales = untile_scales(got["c.scales"], problem.m)[:, columns[::16] // 16]
            codes = unpack_codes(got["c.codes"])[:, columns]
            result = bounds.compare_nvfp4(codes, scales, exact.y, bound, float(arrays["output_multiplier"][0]))
        else:
            result = bounds.compare_plain(_widened(got["c"][:, columns], problem.c_dtype), exact.y, bound, problem.c_dtype)
    report.worst, report.mismatches = result.worst, result.mismatches + sum(part.mismatches for part in result.parts)
    report.exemptions = result.exemptions + sum(part.exemptions for part in result.parts)
    report.passed, report.detail = result.passed, result.detail


@dataclass
class LayerReport:
    """Result of a whole layer: FC1 and FC2 in the default form (contract section 5), dense."""

    device: str
    driver: int
    shape: Mapping[str, int]
    fc1: str
    fc2: str
    microseconds: float | None
    fc1_worst: float
    fc2_worst: float
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
) -> LayerReport:
    """Runs a MoE layer of random NVFP4 weights: router weights → alpha, FC1, FC2; each checked on the other's actual values."""
    driver = loader.driver
    driver.use_device(device)
    middle = "nvfp4" if a_dtype == "nvfp4" else "bf16"
    first = Problem("fc1", m, experts, hidden, intermediate, a_dtype, middle)
    second = Problem("fc2", m, experts, hidden, intermediate, middle, "bf16")
    w1 = _Weights.make("fc1", experts, hidden, intermediate, "codes", seed)
    w2 = _Weights.make("fc2", experts, hidden, intermediate, "codes", seed + 1)
    rng = np.random.default_rng(seed + 2)
    ids = np.argsort(rng.random((m, experts)), axis=1)[:, :top_k]
    router = rng.dirichlet(np.ones(top_k), m).astype(np.float32)
    arrays, a, a_scale = _activations(first, "normal", seed + 3)
    spread = np.float32(1 / (2.7 * np.sqrt(hidden)))  # brings up and gate to a standard deviation of about 1
    alpha1 = np.full(experts, spread * a_scale, dtype=np.float32)
    # FC1's output y has |y| of a few units: its NVFP4 form gets a global scale of 16 / 2688
    multiplier = np.float32(2688 / 16)
    dequant = np.float32(1) / multiplier if middle == "nvfp4" else np.float32(1)
    w2_alpha = np.full(experts, dequant / np.float32(2.7 * np.sqrt(intermediate)), dtype=np.float32)
    alpha2 = reference.build_alpha(ids, router, w2_alpha, experts=experts)
    memory = _Memory(driver)
    plans: list[Plan] = []
    try:
        tensors: dict[str, Any] = {role: memory.put(array) for role, array in arrays.items()}
        tensors.update(alpha=memory.put(alpha1), b=memory.put(w1.packed))
        if middle == "nvfp4":
            tensors["output_multiplier"] = memory.put(np.array([multiplier]))
        outputs = {role: spec for role, spec in first.tensors().items() if spec.output}
        for role, spec in outputs.items():
            tensors[role] = memory.empty(spec.nbytes, poison=0xA5)
        c = memory.empty(m * hidden * 2, poison=0xA5)
        into = {"c": "a", "c.codes": "a.codes", "c.scales": "a.scales"}
        between = {into[role]: tensors[role] for role in outputs}
        plans = [
            loader.plan(first, tensors, device),
            loader.plan(second, {**between, "b": memory.put(w2.packed), "alpha": memory.put(alpha2), "c": c}, device),
        ]
        for plan in plans:
            plan.launch()
        driver.synchronize()
        got = {role: memory.get(tensors[role], spec.shape, _NUMPY[spec.dtype]) for role, spec in outputs.items()}
        result = memory.get(c, (m, hidden), np.uint16)
        routed = sorted({int(e) for e in ids.reshape(-1)})
        exact = reference.fc1(a, w1.expert, alpha1.astype(np.float64), routed)
        columns = np.concatenate([np.arange(e * intermediate, (e + 1) * intermediate) for e in routed])
        bound1 = bounds.fc1_bound(exact, hidden)
        if middle == "nvfp4":
            plain = untile_scales(got["c.scales"], m)
            codes = unpack_codes(got["c.codes"])
            one = bounds.compare_nvfp4(codes[:, columns], plain[:, columns[::16] // 16], exact.y, bound1, float(multiplier))
            values = E2M1_VALUES[codes] * np.repeat(E4M3_VALUES[plain], 16, axis=1)
        else:
            one = bounds.compare_plain(_widened(got["c"][:, columns], middle), exact.y, bound1, middle)
            values = _widened(got["c"], middle)
        # unrouted experts have alpha 0 for every token: the reference leaves them out
        packed_values = np.concatenate([values[:, e * intermediate : (e + 1) * intermediate] for e in routed], axis=1)
        exact2 = reference.fc2(
            packed_values, lambda i: w2.expert(routed[i]), alpha2[:, routed].astype(np.float64), len(routed), intermediate
        )
        two = bounds.compare_plain(_widened(result, "bf16"), exact2.c, bounds.fc2_bound(exact2, experts, intermediate), "bf16")
        microseconds = _time_layer(loader, plans)
    finally:
        for plan in plans:
            plan.close()
        memory.close()
    return LayerReport(
        driver.device_name(device),
        driver.version(),
        {"m": m, "experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate},
        plans[0].key,
        plans[1].key,
        microseconds,
        one.worst,
        two.worst,
        f"{len(routed)} routed experts of FC1 (of {experts}), all of FC2",
        one.passed and two.passed,
    )


def _time_layer(loader: Loader, plans: Sequence[Plan], repeats: int = 20) -> float:
    """Median microseconds of FC1 and FC2 in one graph; the weights of a model-sized layer exceed the L2 by themselves."""
    return _time(loader, plans, 2, repeats * len(plans)) * len(plans)
