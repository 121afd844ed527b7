"""Runs one problem on the GPU through the loader, and its float64 reference in torch on the same GPU.

Data come from ``runtime.data`` and ``runtime.layer_data``, packed weights from ``runtime.packing``, expected values from ``runtime.reference``,
limits from ``runtime.bounds``: this file only moves them to the device. ``tests/numerics/test_gpu_harness.py`` runs it on a CPU, against a
stand-in for the kernels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from densemoe.runtime import bounds, data, marks, packing, reference
from densemoe.runtime.layer_data import LayerData, LayerExpert
from densemoe.runtime.loader import Loader
from densemoe.runtime.problem import Problem

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "u8": torch.uint8}
GUARD = 4096  # poisoned bytes behind every output
KEPT_VALUES = 8 << 30  # bytes of decoded weights that are kept from case to case
ZEROS = 0.25  # share of exact alphas that are 0
THREADS = 8  # experts made at once; numpy releases the interpreter's lock


def device_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A numpy array on the device; uint16 holds bf16 bits."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).to(DEVICE).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def launch(plan: Any) -> None:
    """Launches on torch's stream and waits."""
    if DEVICE == "cuda":
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    else:
        plan.launch(0)


class Guarded:
    """An output with poisoned bytes behind it; ``check`` says whether they are untouched."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
        self.raw = torch.full((count + GUARD,), 0xA5, dtype=torch.uint8, device=DEVICE)
        self.tensor = self.raw[:count].view(dtype).reshape(shape)
        self.count = count

    def poison(self) -> None:
        """Makes every byte of the output wrong, so that a launch that writes nothing is seen."""
        self.raw[: self.count] = 0xA5

    def check(self) -> bool:
        return bool((self.raw[self.count :] == 0xA5).all())


def outputs_of(problem: Problem) -> dict[str, Guarded]:
    """A guarded buffer for every output of a problem, by role."""
    return {role: Guarded(spec.shape, DTYPES[spec.dtype]) for role, spec in problem.tensors().items() if spec.output}


def lifted(weights: reference.Weights) -> reference.Weights:
    """The same weights on the device."""
    return reference.Weights(weights.op, device_tensor(weights.codes), device_tensor(weights.scales), weights.experts)


class Weights:
    """Weights of ``data`` on the device: packed for the kernel, interchange tensors for the reference."""

    def __init__(self, op: str, experts: int, hidden: int, intermediate: int, kind: str, seed: int) -> None:
        self.op, self.experts, self.hidden, self.intermediate = op, experts, hidden, intermediate
        make = data.fc1_weights if op == "fc1" else data.fc2_weights
        self.plain = make(np.random.default_rng(seed), experts, hidden, intermediate, kind)
        codes, scales = self.plain.codes, self.plain.scales
        self.packed = device_tensor(packing.pack_fc1(codes, scales) if op == "fc1" else packing.pack_fc2(codes, scales, experts))
        self.reference = lifted(reference.Weights(op, codes, scales, experts))
        per_expert = (2 if op == "fc1" else 1) * hidden * intermediate * 8
        self._values: dict[int, Any] | None = {} if experts * per_expert <= KEPT_VALUES else None

    def expert(self, index: int) -> Any:
        """The reference's values of one expert, decoded once where there is room to keep them."""
        if self._values is None:
            return self.reference(index)
        if index not in self._values:
            self._values[index] = self.reference(index)
        return self._values[index]

    def prefix(self, experts: int) -> Weights:
        """The same weights with the first experts only; FC1, whose experts are contiguous."""
        other = object.__new__(Weights)
        other.__dict__.update(self.__dict__)
        other.experts = experts
        other.packed = self.packed[: self.packed.numel() // self.experts * experts]
        other.plain = self.plain._replace(global_scales=self.plain.global_scales[:experts])
        return other


def activations(m: int, k: int, a_dtype: str, kind: str, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, np.float32]:
    """(tensors by role, float64 values without the global scale, global scale)."""
    first, scales, scale = data.activations(np.random.default_rng(seed), m, k, a_dtype, kind)
    if a_dtype == "bf16":
        a = device_tensor(first)
        return {"a": a}, a.double(), scale
    codes, tiled = device_tensor(first), device_tensor(scales)
    return {"a.codes": codes, "a.scales": tiled}, reference.activation_values(codes, tiled), scale


def run_fc1(
    loader: Loader,
    weights: Weights,
    m: int,
    a_dtype: str,
    c_dtype: str,
    post: bool,
    *,
    kind: str = "integers",
    seed: int = 1,
    variant: str | None = None,
    edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> list[bounds.Report]:
    """Runs FC1 and compares all of its output; reports, failed ones included."""
    experts = weights.experts
    problem = Problem("fc1", m, experts, weights.hidden, weights.intermediate, a_dtype, c_dtype, alpha_post=post)
    tensors, a, a_scale = activations(m, weights.hidden, a_dtype, kind, seed)
    tensors["alpha"] = device_tensor(data.fc1_alpha(weights.plain, a_scale))
    if post:
        rng = np.random.default_rng([seed, m])
        tensors["alpha_post"] = device_tensor(data.alpha_post(rng, m, experts, kind, ZEROS if kind == "exact" else 0.0))
    if edit is not None:
        edit(tensors)
    post_values = tensors["alpha_post"].double() if post else None
    exact = reference.fc1(a, weights.expert, tensors["alpha"].double(), range(experts), post_values)
    multiplier = np.float32(2688.0 / max(float(exact.y.abs().max()), 1e-30))
    if c_dtype == "nvfp4":
        tensors["output_multiplier"] = device_tensor(np.array([multiplier]))
    outputs = outputs_of(problem)
    into = {role: output.tensor for role, output in outputs.items()}
    with loader.plan(problem, {**tensors, "b": weights.packed, **into}, 0, variant) as plan:
        launch(plan)
    assert all(output.check() for output in outputs.values()), f"{plan.key} wrote behind its output"
    return [bounds.compare_fc1(into, exact, problem, output_multiplier=float(multiplier), exact=kind == "exact")]


def run_fc2(
    loader: Loader,
    weights: Weights,
    m: int,
    a_dtype: str,
    c_dtype: str,
    scalar: bool,
    *,
    kind: str = "integers",
    seed: int = 1,
    variant: str | None = None,
    repeat: int = 2,
    alpha: torch.Tensor | None = None,
) -> list[bounds.Report]:
    """Runs FC2 (``repeat`` times, which shows that the workspaces are left clean) and compares all of its output."""
    experts, intermediate = weights.experts, weights.intermediate
    problem = Problem("fc2", m, experts, weights.hidden, intermediate, a_dtype, c_dtype, scalar_alpha=scalar)
    tensors, a, a_scale = activations(m, experts * intermediate, a_dtype, kind, seed)
    if alpha is None:
        rng = np.random.default_rng([seed, m])
        zeros = ZEROS if kind == "exact" else 0.0
        alpha = device_tensor(data.fc2_alpha(rng, m, weights.plain, a_scale, scalar=scalar, kind=kind, zeros=zeros))
    tensors["alpha"] = alpha
    exact = reference.fc2(a, weights.expert, alpha.double(), experts, intermediate)
    output = outputs_of(problem)["c"]
    reports = []
    with loader.plan(problem, {**tensors, "b": weights.packed, "c": output.tensor}, 0, variant) as plan:
        for _ in range(repeat):
            output.poison()
            launch(plan)
            assert output.check(), f"{plan.key} wrote behind its output"
            reports.append(bounds.compare_fc2({"c": output.tensor}, exact, problem, exact=kind == "exact"))
    return reports


def collect() -> None:
    """Gives cached device memory back between large cases."""
    gc.collect()
    torch.cuda.empty_cache()


class LayerWeights:
    """A layer's routed experts on the device. The experts that no token is routed to repeat a routed one: nothing of them may reach the output."""

    def __init__(self, layer: LayerData, routed: Sequence[int]) -> None:
        case = layer.case
        sizes = [packing.expert_stride(op, case.hidden, case.intermediate) for op in ("fc1", "fc2")]
        self.packed = [torch.empty(case.experts * size, dtype=torch.uint8, device=DEVICE) for size in sizes]
        self.scales = np.ones((2, case.experts), dtype=np.float32)
        self.fc1: dict[int, reference.Weights] = {}
        self.fc2: dict[int, reference.Weights] = {}
        self._unquantised: dict[int, list[torch.Tensor]] = {}
        self._layer = layer
        with ThreadPoolExecutor(THREADS) as pool:
            for expert, made in zip(routed, pool.map(self._make, routed), strict=True):
                self._put(expert, made, [expert, *(e for e in range(case.experts) if expert == routed[0] and e not in routed)])

    def _make(self, expert: int) -> LayerExpert:
        # bf16 holds the unquantised weights exactly
        self._unquantised[expert] = [device_tensor(self._layer.projection(name, expert)).bfloat16() for name in ("up", "gate", "down")]
        return self._layer.expert(expert)

    def _put(self, expert: int, made: LayerExpert, slots: Sequence[int]) -> None:
        for index, packed in enumerate((made.fc1_packed, made.fc2_packed)):
            one = device_tensor(packed)
            for slot in slots:
                self.packed[index][slot * one.numel() : (slot + 1) * one.numel()] = one
                self.scales[index, slot] = (made.fc1_scale, made.fc2_scale)[index]
        self.fc1[expert], self.fc2[expert] = lifted(made.fc1), lifted(made.fc2)

    def unquantised(self, expert: int) -> tuple[torch.Tensor, ...]:
        """(up, gate, down) in float64, for ``reference.layer``."""
        return tuple(each.double() for each in self._unquantised[expert])


def run_layer(loader: Loader, case: data.LayerCase, *, listed: bool = False) -> list[bounds.Report]:
    """A bf16 layer with NVFP4 between FC1 and FC2: reports of FC1, of FC2 on FC1's actual output, and of the mark against the unquantised layer.

    Args:
        listed: both kernels get the list of active experts; the weights of the others are then spoiled.
    """
    experts, _, hidden, intermediate, m = case
    layer = LayerData(case)
    ids, router = layer.routing()
    routed = [int(e) for e in np.unique(ids)]
    weights = LayerWeights(layer, routed)
    first = Problem("fc1", m, experts, hidden, intermediate, "bf16", "nvfp4", active_list=listed)
    second = Problem("fc2", m, experts, hidden, intermediate, "nvfp4", "bf16", active_list=listed)
    active = {}
    if listed:
        idle = [e for e in range(experts) if e not in routed]
        for packed in weights.packed:
            packed.reshape(experts, -1)[idle] = 0xFF
        # behind the count and the ids stands an expert that does not exist: nobody may read it
        active["active_experts"] = device_tensor(np.array([len(routed), *routed, *[2**30] * len(idle)], dtype=np.int32))
    a, multiplier = device_tensor(layer.x), layer.output_multiplier
    alpha1 = device_tensor(weights.scales[0])
    alpha2 = device_tensor(reference.build_alpha(ids, router, weights.scales[1] / multiplier, experts=experts))
    middle, last = outputs_of(first), outputs_of(second)["c"]
    between = {role: output.tensor for role, output in middle.items()}
    inputs = {**active, "a": a, "alpha": alpha1, "output_multiplier": device_tensor(np.array([multiplier]))}
    plan1 = loader.plan(first, {**inputs, "b": weights.packed[0], **between}, 0)
    moved = {**active, "a.codes": between["c.codes"], "a.scales": between["c.scales"]}
    plan2 = loader.plan(second, {**moved, "b": weights.packed[1], "alpha": alpha2, "c": last.tensor}, 0)
    with plan1, plan2:
        launch(plan1)
        launch(plan2)
    assert all(output.check() for output in (*middle.values(), last))
    exact1 = reference.fc1(a.double(), lambda e: weights.fc1[e](0), alpha1.double(), routed)
    columns = np.concatenate([np.arange(e * intermediate, (e + 1) * intermediate) for e in routed])
    one = bounds.compare_fc1(between, exact1, first, output_multiplier=float(multiplier), columns=columns)
    # experts without a token have alpha 0 for all of them: the reference leaves them out
    values = reference.activation_values(between["c.codes"], between["c.scales"])[:, torch.from_numpy(columns).to(DEVICE)]
    exact2 = reference.fc2(values, lambda i: weights.fc2[routed[i]](0), alpha2[:, routed].double(), len(routed), intermediate)
    two = bounds.compare_fc2({"c": last.tensor}, exact2, second)
    mark = marks.layer_mark(last.tensor.double(), reference.layer(a.double(), weights.unquantised, ids, router))
    return [one, two, mark]
