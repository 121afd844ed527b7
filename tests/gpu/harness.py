"""Runs one problem on the GPU through the loader, and its float64 reference in torch on the same GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.layout import untile_scales
from densemoe.runtime.loader import Loader
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES
from densemoe.runtime.problem import Problem

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "u8": torch.uint8}
GUARD = 4096  # poisoned bytes behind every output


def device_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A numpy array's bytes on the GPU, as uint8 unless float32 or integers."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array)).cuda()


def table(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cuda")


def values_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 values of code bytes ``[R, K/2]`` and row-major scale bytes ``[R, K/16]``."""
    e2m1, e4m3 = table(E2M1_VALUES), table(E4M3_VALUES)
    split = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(codes.shape[0], -1)
    return e2m1[split.long()] * e4m3[scales.long()].repeat_interleave(16, dim=1)


class Guarded:
    """An output with poisoned bytes behind it; ``check`` says whether they are untouched."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
        self.raw = torch.full((count + GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
        self.tensor = self.raw[:count].view(dtype).reshape(shape)
        self.count = count

    def check(self) -> bool:
        return bool((self.raw[self.count :] == 0xA5).all())


class Weights:
    """Packed weights on the GPU, and their values per expert for the reference."""

    def __init__(self, op: str, experts: int, hidden: int, intermediate: int, kind: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.op, self.experts, self.hidden, self.intermediate, self.kind = op, experts, hidden, intermediate, kind
        if op == "fc1":
            w1 = data.fc1_weights(rng, experts, hidden, intermediate, kind)
            self.packed = device_tensor(packing.pack_fc1(w1.codes, w1.scales))
            self.codes = device_tensor(w1.codes)
            self.scales = device_tensor(untile_scales(w1.scales, experts * 2 * intermediate))
            self.global_scales = w1.global_scales
        else:
            w2 = data.fc2_weights(rng, experts, hidden, intermediate, kind)
            self.packed = device_tensor(packing.pack_fc2(w2.codes, w2.scales, experts))
            self.codes = device_tensor(w2.codes)
            self.scales = device_tensor(untile_scales(w2.scales, hidden))
            self.global_scales = w2.global_scales

    def expert(self, index: int) -> Any:
        """(up, gate) for FC1, ``[H, I]`` for FC2: float64 values without the global scale."""
        if self.op == "fc1":
            rows = 2 * self.intermediate
            value = values_of(self.codes[index], self.scales[index * rows : (index + 1) * rows])
            blocks = value.reshape(-1, 2, 64, self.hidden)
            return blocks[:, 0].reshape(-1, self.hidden), blocks[:, 1].reshape(-1, self.hidden)
        half, groups = self.intermediate // 2, self.intermediate // 16
        codes = self.codes[:, index * half : (index + 1) * half]
        return values_of(codes, self.scales[:, index * groups : (index + 1) * groups])

    def prefix(self, experts: int) -> Weights:
        """The same weights with the first experts only; FC1, whose experts are contiguous."""
        other = object.__new__(Weights)
        other.__dict__.update(self.__dict__)
        other.experts = experts
        other.packed = self.packed[: self.packed.numel() // self.experts * experts]
        other.global_scales = self.global_scales[:experts]
        return other


def activations(m: int, k: int, a_dtype: str, kind: str, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """(tensors by role, float64 values without the global scale, global scale)."""
    first, scales, scale = data.activations(np.random.default_rng(seed), m, k, a_dtype, kind)
    if a_dtype == "bf16":
        a = device_tensor(first)
        return {"a": a}, a.double(), 1.0
    codes, tiled = device_tensor(first), device_tensor(scales)
    values = values_of(codes, device_tensor(untile_scales(scales, m)))
    return {"a.codes": codes, "a.scales": tiled}, values, float(scale)


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
    experts, hidden, intermediate = weights.experts, weights.hidden, weights.intermediate
    problem = Problem("fc1", m, experts, hidden, intermediate, a_dtype, c_dtype, alpha_post=post)
    tensors, a, a_scale = activations(m, hidden, a_dtype, kind, seed)
    alpha = torch.tensor(weights.global_scales * np.float32(a_scale), device="cuda")
    tensors["alpha"] = alpha
    generator = torch.Generator(device="cuda").manual_seed(seed)
    post_values = None
    if post:
        post_values = torch.rand((m, experts), generator=generator, device="cuda") * 0.4 + 0.8
        if kind == "exact":
            post_values = torch.randint(0, 3, (m, experts), generator=generator, device="cuda").float()
        tensors["alpha_post"] = post_values
    if edit is not None:
        edit(tensors)
    exact = reference.fc1(a, weights.expert, alpha.double(), range(experts), post_values.double() if post_values is not None else None)
    bound = bounds.fc1_bound(exact, hidden)
    multiplier = torch.tensor([2688.0 / max(float(exact.y.abs().max()), 1e-30)], dtype=torch.float32, device="cuda")
    outputs = {}
    for role, spec in problem.tensors().items():
        if spec.output:
            outputs[role] = Guarded(spec.shape, DTYPES[spec.dtype])
            tensors[role] = outputs[role].tensor
    if c_dtype == "nvfp4":
        tensors["output_multiplier"] = multiplier
    with loader.plan(problem, {**tensors, "b": weights.packed}, 0, variant) as plan:
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    assert all(output.check() for output in outputs.values()), f"{plan.key} wrote behind its output"
    if c_dtype == "nvfp4":
        codes, scales = outputs["c.codes"].tensor, outputs["c.scales"].tensor
        plain = untile_torch(scales, m)
        split = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(m, -1)
        return [bounds.compare_nvfp4(split, plain, exact.y, bound, float(multiplier))]
    return [bounds.compare_fc1({"c": outputs["c"].tensor}, exact, problem, exact=kind == "exact")]


def untile_torch(tiled: torch.Tensor, rows: int) -> torch.Tensor:
    """Row-major scales of tiled ones, on the GPU."""
    columns = tiled.shape[1]
    return tiled.reshape(-1, columns // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(tiled.shape)[:rows]


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
    experts, hidden, intermediate = weights.experts, weights.hidden, weights.intermediate
    problem = Problem("fc2", m, experts, hidden, intermediate, a_dtype, c_dtype, scalar_alpha=scalar)
    tensors, a, _ = activations(m, experts * intermediate, a_dtype, kind, seed)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (1,) if scalar else (m, experts)
    if alpha is None:
        alpha = torch.rand(shape, generator=generator, device="cuda") * 2
        if kind == "exact":
            alpha = torch.randint(0, 3, shape, generator=generator, device="cuda").float()
    tensors["alpha"] = alpha
    exact = reference.fc2(a, weights.expert, alpha.double(), experts, intermediate)
    bound = bounds.fc2_bound(exact, experts, intermediate)
    output = Guarded((m, hidden), DTYPES[c_dtype])
    reports = []
    with loader.plan(problem, {**tensors, "b": weights.packed, "c": output.tensor}, 0, variant) as plan:
        for _ in range(repeat):
            output.tensor.view(torch.uint8).fill_(0xA5)
            plan.launch(torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            assert output.check(), f"{plan.key} wrote behind its output"
            actual = output.tensor.double()
            if kind == "exact":
                reports.append(bounds.compare_exact(actual, exact.c.to(DTYPES[c_dtype]).double()))
            else:
                reports.append(bounds.compare_plain(actual, exact.c, bound, c_dtype))
    return reports


def collect() -> None:
    """Gives cached device memory back between large cases."""
    gc.collect()
    torch.cuda.empty_cache()


def run_layer(loader: Loader, experts: int, top_k: int, hidden: int, intermediate: int, m: int) -> list[bounds.Report]:
    """A bf16 layer with NVFP4 between FC1 and FC2: reports of FC1, FC2, and the share within the reference's own mark of the unquantised layer."""
    rng = np.random.default_rng(m)
    w1 = Weights("fc1", experts, hidden, intermediate, "codes", 1)
    w2 = Weights("fc2", experts, hidden, intermediate, "codes", 2)
    ids = np.argsort(rng.random((m, experts)), axis=1)[:, :top_k]
    router = rng.dirichlet(np.ones(top_k), m).astype(np.float32)
    a = torch.randn((m, hidden), device="cuda").bfloat16()
    alpha1 = torch.full((experts,), 1 / (2.7 * hidden**0.5), device="cuda")
    first = Problem("fc1", m, experts, hidden, intermediate, "bf16", "nvfp4")
    second = Problem("fc2", m, experts, hidden, intermediate, "nvfp4", "bf16")
    multiplier = 2688 / 16
    w2_alpha = np.full(experts, 1 / multiplier / (2.7 * intermediate**0.5), dtype=np.float32)
    alpha2 = torch.from_numpy(reference.build_alpha(ids, router, w2_alpha, experts=experts)).cuda()
    specs = first.tensors()
    codes = Guarded(specs["c.codes"].shape, torch.uint8)
    scales = Guarded(specs["c.scales"].shape, torch.uint8)
    c = Guarded((m, hidden), torch.bfloat16)
    plan1 = loader.plan(
        first,
        {
            "a": a,
            "b": w1.packed,
            "alpha": alpha1,
            "output_multiplier": torch.tensor([multiplier], device="cuda"),
            "c.codes": codes.tensor,
            "c.scales": scales.tensor,
        },
        0,
    )
    plan2 = loader.plan(
        second, {"a.codes": codes.tensor, "a.scales": scales.tensor, "b": w2.packed, "alpha": alpha2, "c": c.tensor}, 0
    )
    with plan1, plan2:
        plan1.launch(torch.cuda.current_stream().cuda_stream)
        plan2.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    assert codes.check()
    assert scales.check()
    assert c.check()
    routed = sorted({int(e) for e in ids.reshape(-1)})
    exact = reference.fc1(a.double(), w1.expert, alpha1.double(), routed)
    columns = torch.cat([torch.arange(e * intermediate, (e + 1) * intermediate) for e in routed]).cuda()
    plain = untile_torch(scales.tensor, m)
    split = torch.stack([codes.tensor & 15, codes.tensor >> 4], dim=-1).reshape(m, -1)
    one = bounds.compare_nvfp4(split[:, columns], plain[:, columns[::16] // 16], exact.y, bounds.fc1_bound(exact, hidden), multiplier)
    values = values_of(codes.tensor, plain)[:, columns]
    routed_alpha = alpha2[:, routed].double()
    exact2 = reference.fc2(values, lambda i: w2.expert(routed[i]), routed_alpha, len(routed), intermediate)
    bound = bounds.fc2_bound(exact2, experts, intermediate)
    two = bounds.compare_plain(c.tensor.double(), exact2.c, bound, "bf16")
    # the reference's own mark: 97 % within 0.15 + 1 % of the layer whose middle is not quantised
    unquantised = reference.fc2(exact.y * multiplier, lambda i: w2.expert(routed[i]), routed_alpha, len(routed), intermediate).c
    close = (c.tensor.double() - unquantised).abs() <= 0.15 + 0.01 * unquantised.abs()
    share = float(close.double().mean())
    return [one, two, bounds.Report(int(close.numel()), 1 - share, 0 if share >= 0.97 else int((~close).sum()), 0, f"{share:.4f} within the mark")]
