"""Adapters, without their hosts: signatures and parameter names as published, results as those of the ops and the module."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from densemoe.runtime import bounds, data, layout, reference
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.problem import Problem
from densemoe.runtime.torch import DenseGemmMoE, MoEConfig, ops
from densemoe.runtime.torch.adapters import sglang, tensorrt_llm, vllm
from densemoe.runtime.torch.weights import PROJECTIONS, WeightStore, quantize_projection

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K = 4, 128, 64, 5, 2
CONFIG = MoEConfig(EXPERTS, TOP_K, HIDDEN, INTERMEDIATE)


def tensors(*arrays: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(each)) for each in arrays]


def test_no_host_is_imported() -> None:
    assert not {"vllm", "sglang", "tensorrt_llm"} & sys.modules.keys()


@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_tensorrt_llm_s_fc1_and_fc2(fp4: bool, post: bool) -> None:
    rng = np.random.default_rng(0)
    weights = data.fc1_weights(rng, EXPERTS, HIDDEN, INTERMEDIATE)
    codes, scales, scale = data.activations(rng, TOKENS, HIDDEN, "nvfp4")
    b, b_sf, a, a_sf, alpha, given = tensors(
        weights.codes, weights.scales, codes, scales, data.fc1_alpha(weights, scale), data.alpha_post(rng, TOKENS, EXPERTS)
    )
    if fp4:
        a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2)
    alpha_post, multiplier = given if post else None, torch.tensor([0.5])
    c, c_sf = tensorrt_llm.cute_dsl_nvfp4_dense_gemm_swiglu_blackwell(
        a,
        b,
        a_sf,
        b_sf,
        alpha,
        alpha_post,
        multiplier,
        expert_count=EXPERTS,
        weight_per_expert=2 * INTERMEDIATE,
        output_dtype=torch.float4_e2m1fn_x2,
        scaling_vector_size=16,
    )
    assert c.dtype == torch.float4_e2m1fn_x2
    read = reference.Weights("fc1", *tensors(weights.codes, weights.scales), EXPERTS)
    values = reference.activation_values(a.view(torch.uint8), a_sf)
    exact = reference.fc1(values, read, alpha.double(), range(EXPERTS), None if alpha_post is None else alpha_post.double())
    got = {"c.codes": c.view(torch.uint8), "c.scales": c_sf}
    problem = Problem("fc1", TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, "nvfp4", "nvfp4", alpha_post=post)
    assert bounds.compare_fc1(got, exact, problem, output_multiplier=0.5).passed

    down = data.fc2_weights(rng, EXPERTS, HIDDEN, INTERMEDIATE)
    b2, b2_sf, alpha2 = tensors(down.codes, down.scales, data.fc2_alpha(rng, TOKENS, down, np.float32(2)))
    out = tensorrt_llm.cute_dsl_nvfp4_dense_gemm_fc2_blackwell(
        c, b2, c_sf.reshape(-1), b2_sf, alpha2, expert_count=EXPERTS, weight_per_expert=INTERMEDIATE
    )
    read2 = reference.Weights("fc2", b2, b2_sf, EXPERTS)
    exact2 = reference.fc2(reference.activation_values(got["c.codes"], c_sf), read2, alpha2.double(), EXPERTS, INTERMEDIATE)
    assert bounds.compare_fc2({"c": out}, exact2, Problem("fc2", TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, "nvfp4", "bf16")).passed
    with pytest.raises(ProblemError, match="NVFP4 has 16"):
        tensorrt_llm.cute_dsl_nvfp4_dense_gemm_fc2_blackwell(
            c, b2, c_sf, b2_sf, alpha2, expert_count=EXPERTS, weight_per_expert=INTERMEDIATE, scaling_vector_size=32
        )
    with pytest.raises(ProblemError, match="belongs to both"):
        tensorrt_llm.cute_dsl_nvfp4_dense_gemm_fc2_blackwell(c, b2, c_sf, b2_sf, alpha2, expert_count=EXPERTS + 1, weight_per_expert=INTERMEDIATE)
    tensorrt_llm.forget()


def stacked_layer() -> tuple[SimpleNamespace, DenseGemmMoE]:
    """A layer with vLLM's and SGLang's parameters, and a DenseGemmMoE with the same weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
    parts = [{n: quantize_projection(torch.randn(shapes[n], generator=generator) * 0.1) for n in PROJECTIONS} for _ in range(EXPERTS)]
    store = WeightStore(EXPERTS, HIDDEN, INTERMEDIATE)
    for expert, part in enumerate(parts):
        store.put(expert, **part)

    def stack(name: str, *projections: str) -> torch.Tensor:
        return torch.stack([torch.cat([torch.from_numpy(getattr(part[p], name)) for p in projections]) for part in parts])

    layer = SimpleNamespace(
        w13_weight=stack("codes", "gate", "up"),
        w13_weight_scale=stack("scales", "gate", "up").view(torch.float8_e4m3fn),
        w13_weight_scale_2=torch.tensor([[float(part[p].global_scale) for p in ("gate", "up")] for part in parts]),
        w2_weight=stack("codes", "down"),
        w2_weight_scale=stack("scales", "down").view(torch.float8_e4m3fn),
        w2_weight_scale_2=torch.tensor([float(part["down"].global_scale) for part in parts]),
        w13_input_scale=torch.full((EXPERTS, 2), 0.002),
        w2_input_scale=torch.full((EXPERTS,), 0.003),
    )
    with pytest.warns(UserWarning, match="global scales"):
        return layer, DenseGemmMoE(CONFIG, store.finish())


@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_hosts_with_stacked_experts(host: str) -> None:
    layer, expected = stacked_layer()
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, weights = expected.route(torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2)))
    method: Any = vllm.DensemoeFusedMoEMethod(CONFIG) if host == "vllm" else sglang.DensemoeMoEMethod(CONFIG)
    with pytest.warns(UserWarning, match="global scales"):
        method.process_weights_after_loading(layer)
    assert layer.w13_weight is None
    if host == "vllm":
        out = method.apply(layer, x, weights, ids.long())
    else:
        choice = SimpleNamespace(topk_weights=weights, topk_ids=ids, router_logits=None)
        out = method.apply(layer, SimpleNamespace(hidden_states=x, topk_output=choice))
    assert torch.equal(out, expected(x, ids=ids, weights=weights))
    with pytest.raises(ProblemError, match="biases"):
        type(method)(dataclasses.replace(CONFIG, bias=True))


def test_a_backend_like_densegemm() -> None:
    layer, _ = stacked_layer()
    method = vllm.DensemoeFusedMoEMethod(dataclasses.replace(CONFIG, activations="nvfp4", between="nvfp4"))
    with pytest.warns(UserWarning, match="global scales"):
        method.process_weights_after_loading(layer)
    backend = tensorrt_llm.DenseGemmBackend(method.moe)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, weights = method.moe.route(torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2)))
    codes, scales = ops.quantize_nvfp4(x, method.moe.input_multiplier)
    plain = torch.from_numpy(layout.untile_scales(scales.numpy(), TOKENS).copy())
    assert torch.equal(backend.run_moe_nvfp4(codes, ids, weights, plain), method.moe(x, ids=ids, weights=weights))
    with pytest.raises(ProblemError, match="all-to-all"):
        backend.run_moe_nvfp4(codes, ids, weights, plain, enable_alltoall=True)
    with pytest.raises(ProblemError, match="activations='nvfp4'"):
        tensorrt_llm.DenseGemmBackend(DenseGemmMoE(CONFIG))
