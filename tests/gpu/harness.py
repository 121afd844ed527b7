"""Runs one problem on the GPU through the loader, and its float64 reference in torch on the same GPU.

Data come from ``runtime.data`` and ``runtime.layer_data``, packed weights from ``runtime.packing``, expected values from ``runtime.reference``,
limits from ``runtime.bounds``: this file only moves them to the device. ``tests/numerics/test_gpu_harness.py`` runs it on a CPU, against a
stand-in for the kernels.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from densemoe.runtime import bounds, data, marks, packing, reference
from densemoe.runtime.layer_data import LayerData, LayerExpert
from densemoe.runtime.layout import k64_order, tile_scales
from densemoe.runtime.loader import Loader
from densemoe.runtime.nvfp4 import bf16_values, quantise_expert
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "u8": torch.uint8}
GUARD = 4096  # poisoned bytes behind every output
KEPT_VALUES = 8 << 30  # bytes of decoded weights that are kept from case to case
ZEROS = 0.25  # share of exact alphas that are 0
THREADS = 8  # experts made at once; numpy releases the interpreter's lock
SUPERBLOCK, INTERCHANGE = "sm90a-superblock/2", packing.INTERCHANGE_LAYOUT


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


def pack(layout: str, op: str, codes: Any, scales: Any, experts: int) -> np.ndarray[Any, Any]:
    """Weights as the kernels of an architecture read them."""
    if layout == INTERCHANGE:
        return packing.pack_interchange(op, codes, scales, experts)
    return packing.pack_fc1(codes, scales) if op == "fc1" else packing.pack_fc2(codes, scales, experts)


class Weights:
    """Weights of ``data`` on the device: packed for the kernel, interchange tensors for the reference."""

    def __init__(self, op: str, experts: int, hidden: int, intermediate: int, kind: str, seed: int, layout: str = SUPERBLOCK) -> None:
        self.op, self.experts, self.hidden, self.intermediate, self.layout = op, experts, hidden, intermediate, layout
        make = data.fc1_weights if op == "fc1" else data.fc2_weights
        self.plain = make(np.random.default_rng(seed), experts, hidden, intermediate, kind)
        codes, scales = self.plain.codes, self.plain.scales
        self.packed = device_tensor(pack(layout, op, codes, scales, experts))
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
        if self.layout == INTERCHANGE:  # codes of all experts, then their scales
            rows = 2 * self.intermediate * experts
            other.packed = device_tensor(pack(INTERCHANGE, "fc1", self.plain.codes[:experts], self.plain.scales[:rows], experts))
        else:
            other.packed = self.packed[: self.packed.numel() // self.experts * experts]
        other.plain = self.plain._replace(global_scales=self.plain.global_scales[:experts])
        return other


def activations(
    m: int, k: int, a_dtype: str, kind: str, seed: int, ordered: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor, np.float32]:
    """(tensors by role, float64 values without the global scale, global scale). ``ordered``: bf16 in K 64 order."""
    first, scales, scale = data.activations(np.random.default_rng(seed), m, k, a_dtype, kind)
    if a_dtype == "bf16":
        a = device_tensor(first)
        return {"a.k64": device_tensor(k64_order(first))} if ordered else {"a": a}, a.double(), scale
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
    rounded: bool = False,
    edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> list[bounds.Report]:
    """Runs FC1 and compares all of its output; reports, failed ones included."""
    experts = weights.experts
    problem = Problem("fc1", m, experts, weights.hidden, weights.intermediate, a_dtype, c_dtype, alpha_post=post, rounded=rounded)
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


def run_fc1_variants(
    loader: Loader, weights: Weights, m: int, post: bool, keys: Sequence[str], *, kind: str = "integers", seed: int = 1
) -> Iterator[tuple[str, bounds.Report]]:
    """FC1 by each of ``keys``, which read one activation dtype: one reference, all of every output."""
    experts = weights.experts
    parsed = [Variant.parse(key) for key in keys]
    a_dtype = parsed[0].a_dtype
    tensors, a, a_scale = activations(m, weights.hidden, a_dtype, kind, seed)
    tensors["alpha"] = device_tensor(data.fc1_alpha(weights.plain, a_scale))
    if post:
        zeros = ZEROS if kind == "exact" else 0.0
        tensors["alpha_post"] = device_tensor(data.alpha_post(np.random.default_rng([seed, m]), m, experts, kind, zeros))
    exact = reference.fc1(a, weights.expert, tensors["alpha"].double(), range(experts), tensors["alpha_post"].double() if post else None)
    multiplier = np.float32(2688.0 / max(float(exact.y.abs().max()), 1e-30))
    for variant in parsed:
        problem = Problem("fc1", m, experts, weights.hidden, weights.intermediate, a_dtype, variant.c_dtype, alpha_post=post)
        outputs = outputs_of(problem)
        into = {role: output.tensor for role, output in outputs.items()}
        given = {"output_multiplier": device_tensor(np.array([multiplier]))} if variant.c_dtype == "nvfp4" else {}
        with loader.plan(problem, {**tensors, **given, "b": weights.packed, **into}, 0, variant.key) as plan:
            launch(plan)
        assert all(output.check() for output in outputs.values()), f"{variant.key} wrote behind its output"
        yield variant.key, bounds.compare_fc1(into, exact, problem, output_multiplier=float(multiplier), exact=kind == "exact")


def run_fc2_variants(
    loader: Loader, weights: Weights, m: int, scalar: bool, keys: Sequence[tuple[str, Mapping[str, int]]], *, kind: str = "integers", seed: int = 1
) -> Iterator[tuple[str, bounds.Report]]:
    """FC2 by each of ``keys`` with its settings, twice each, which shows that workspaces are left clean: one reference, all of every output."""
    experts, intermediate = weights.experts, weights.intermediate
    a_dtype = Variant.parse(keys[0][0]).a_dtype
    tensors, a, a_scale = activations(m, experts * intermediate, a_dtype, kind, seed)
    zeros = ZEROS if kind == "exact" else 0.0
    rng = np.random.default_rng([seed, m])
    tensors["alpha"] = device_tensor(data.fc2_alpha(rng, m, weights.plain, a_scale, scalar=scalar, kind=kind, zeros=zeros))
    exact = reference.fc2(a, weights.expert, tensors["alpha"].double(), experts, intermediate)
    for key, settings in keys:
        problem = Problem("fc2", m, experts, weights.hidden, intermediate, a_dtype, Variant.parse(key).c_dtype, scalar_alpha=scalar)
        output = outputs_of(problem)["c"]
        with loader.plan(problem, {**tensors, "b": weights.packed, "c": output.tensor}, 0, key, settings=settings) as plan:
            for _ in range(2):
                output.poison()
                launch(plan)
        assert output.check(), f"{key} wrote behind its output"
        yield key, bounds.compare_fc2({"c": output.tensor}, exact, problem, exact=kind == "exact")


def collect() -> None:
    """Gives cached device memory back between large cases."""
    gc.collect()
    torch.cuda.empty_cache()


class LayerWeights:
    """A layer's routed experts on the device. The experts that no token is routed to repeat a routed one: nothing of them may reach the output."""

    def __init__(self, layer: LayerData, routed: Sequence[int], layout: str = SUPERBLOCK) -> None:
        case = layer.case
        self._layout = layout
        size = packing.interchange_bytes if layout == INTERCHANGE else packing.packed_bytes
        sizes = [size(op, case.experts, case.hidden, case.intermediate) for op in ("fc1", "fc2")]
        self.packed = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in sizes]
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
        self.fc1[expert], self.fc2[expert] = lifted(made.fc1), lifted(made.fc2)
        for index, op in enumerate(("fc1", "fc2")):
            weights = (self.fc1, self.fc2)[index][expert]
            packed = device_tensor((made.fc1_packed, made.fc2_packed)[index])
            own = [weights.codes, weights.scales] if self._layout == INTERCHANGE else [packed]
            for slot in slots:
                for whole, part in zip(self.parts(op, slot), own, strict=True):
                    whole.copy_(part.reshape(whole.shape))
                self.scales[index, slot] = (made.fc1_scale, made.fc2_scale)[index]

    def parts(self, op: str, expert: int) -> list[torch.Tensor]:
        """Views of everything that the packed weights hold of an expert."""
        case, packed = self._layer.case, self.packed[("fc1", "fc2").index(op)]
        if self._layout != INTERCHANGE:
            return [packed.reshape(case.experts, -1)[expert]]
        if op == "fc1":
            codes = case.experts * case.intermediate * case.hidden
            return [part.reshape(case.experts, -1)[expert] for part in (packed[:codes], packed[codes:])]
        codes = case.hidden * case.experts * case.intermediate // 2
        # columns of an expert: of every row of codes, of every row of scale tiles
        tiles = -(-case.hidden // 128)
        return [packed[:codes].reshape(case.hidden, case.experts, -1)[:, expert], packed[codes:].reshape(tiles, case.experts, -1)[:, expert]]

    def unquantised(self, expert: int) -> tuple[torch.Tensor, ...]:
        """(up, gate, down) in float64, for ``reference.layer``."""
        return tuple(each.double() for each in self._unquantised[expert])


def layer_input(layer: LayerData, a_dtype: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, np.float32]:
    """The layer's input as FC1 takes it: (tensors by role, float64 values without the global scale, global scale)."""
    if a_dtype == "bf16":
        a = device_tensor(layer.x)
        return {"a": a}, a.double(), np.float32(1)
    codes, scales, scale = quantise_expert(bf16_values(layer.x))
    codes_there, scales_there = device_tensor(codes), device_tensor(tile_scales(scales))
    return {"a.codes": codes_there, "a.scales": scales_there}, reference.activation_values(codes_there, scales_there), scale


def run_layer(
    loader: Loader, case: data.LayerCase, *, listed: bool = False, a_dtype: str = "bf16", layout: str = SUPERBLOCK
) -> list[bounds.Report]:
    """A bf16 layer with NVFP4 between FC1 and FC2: reports of FC1, of FC2 on FC1's actual output, and of the mark against the unquantised layer.

    Args:
        listed: both kernels get the list of active experts; the weights of the others are then spoiled.
        a_dtype: of FC1's activations: nvfp4 quantises the layer's bf16 input.
        layout: of packed weights.
    """
    experts, _, hidden, intermediate, m = case
    layer = LayerData(case)
    ids, router = layer.routing()
    routed = [int(e) for e in np.unique(ids)]
    weights = LayerWeights(layer, routed, layout)
    first = Problem("fc1", m, experts, hidden, intermediate, a_dtype, "nvfp4", active_list=listed)
    second = Problem("fc2", m, experts, hidden, intermediate, "nvfp4", "bf16", active_list=listed)
    active = {}
    if listed:
        idle = [e for e in range(experts) if e not in routed]
        for op, expert in itertools.product(("fc1", "fc2"), idle):
            for part in weights.parts(op, expert):
                part[...] = 0xFF
        # behind the count and the ids stands an expert that does not exist: nobody may read it
        active["active_experts"] = device_tensor(np.array([len(routed), *routed, *[2**30] * len(idle)], dtype=np.int32))
    a, values1, a_scale = layer_input(layer, a_dtype)
    multiplier = layer.output_multiplier
    alpha1 = device_tensor(weights.scales[0] * a_scale)
    alpha2 = device_tensor(reference.build_alpha(ids, router, weights.scales[1] / multiplier, experts=experts))
    middle, last = outputs_of(first), outputs_of(second)["c"]
    between = {role: output.tensor for role, output in middle.items()}
    inputs = {**active, **a, "alpha": alpha1, "output_multiplier": device_tensor(np.array([multiplier]))}
    plan1 = loader.plan(first, {**inputs, "b": weights.packed[0], **between}, 0)
    moved = {**active, "a.codes": between["c.codes"], "a.scales": between["c.scales"]}
    plan2 = loader.plan(second, {**moved, "b": weights.packed[1], "alpha": alpha2, "c": last.tensor}, 0)
    plan1.feeds(plan2)
    with plan1, plan2:
        launch(plan1)
        launch(plan2)
    assert all(output.check() for output in (*middle.values(), last))
    exact1 = reference.fc1(values1, lambda e: weights.fc1[e](0), alpha1.double(), routed)
    columns = np.concatenate([np.arange(e * intermediate, (e + 1) * intermediate) for e in routed])
    one = bounds.compare_fc1(between, exact1, first, output_multiplier=float(multiplier), columns=columns)
    # experts without a token have alpha 0 for all of them: the reference leaves them out
    values = reference.activation_values(between["c.codes"], between["c.scales"])[:, torch.from_numpy(columns).to(DEVICE)]
    exact2 = reference.fc2(values, lambda i: weights.fc2[routed[i]](0), alpha2[:, routed].double(), len(routed), intermediate)
    two = bounds.compare_fc2({"c": last.tensor}, exact2, second)
    mark = marks.layer_mark(last.tensor.double(), reference.layer(device_tensor(layer.x).double(), weights.unquantised, ids, router))
    return [one, two, mark]
