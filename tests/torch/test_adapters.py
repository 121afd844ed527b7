"""Adapters, without their hosts: signatures and parameter names as published, results as those of the ops and the module."""

from __future__ import annotations

import abc
import collections
import dataclasses
import inspect
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


#: Interfaces as published, recorded from the hosts' sources: (positional parameters, keyword-only parameters) by name. TensorRT-LLM: the calls that
#: modules/fused_moe/fused_moe_densegemm.py makes, and its class; vLLM: model_executor/layers/fused_moe/fused_moe_method_base.py; SGLang:
#: srt/layers/quantization/base_config.py and srt/layers/moe/token_dispatcher/standard.py.
TRTLLM_FC1 = (7, ("expert_count", "weight_per_expert", "output_dtype", "scaling_vector_size"))
TRTLLM_FC2 = (5, ("expert_count", "weight_per_expert", "output_dtype", "scaling_vector_size"))
TRTLLM_BACKEND = {
    "can_implement": ("p", "d"),
    "quantize_input": ("x", "post_quant_comm"),
    "run_moe_nvfp4": ("x", "token_selected_experts", "token_final_scales", "x_sf", "enable_alltoall"),
    "run_moe": ("ctx", "workspace"),
}
VLLM = {
    "create_weights": ("layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype", "extra_weight_attrs"),
    "get_fused_moe_quant_config": ("layer",),
    "process_weights_after_loading": ("layer",),
    "apply": ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    "apply_monolithic": ("layer", "x", "router_logits", "input_ids"),
}
SGLANG = {
    "create_weights": ("layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype", "extra_weight_attrs"),
    "create_moe_runner": ("layer", "moe_runner_config"),
    "process_weights_after_loading": ("layer",),
    "apply": ("layer", "dispatch_output"),
}
ABSTRACT = {"vllm": ("create_weights", "get_fused_moe_quant_config"), "sglang": ("apply",)}


def parameters(function: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


def test_signatures_are_the_published_ones() -> None:
    for op, (positional, named) in (
        (tensorrt_llm.cute_dsl_nvfp4_dense_gemm_swiglu_blackwell, TRTLLM_FC1),
        (tensorrt_llm.cute_dsl_nvfp4_dense_gemm_swiglu_moe_blackwell, TRTLLM_FC1),
        (tensorrt_llm.cute_dsl_nvfp4_dense_gemm_fc2_blackwell, TRTLLM_FC2),
    ):
        kinds = [(each.name, each.kind) for each in inspect.signature(op).parameters.values()]
        assert [kind for _, kind in kinds[:positional]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * positional
        assert tuple(name for name, _ in kinds[positional:]) == named
    for owner, recorded in ((tensorrt_llm.DenseGemmBackend, TRTLLM_BACKEND), (vllm.DensemoeFusedMoEMethod, VLLM), (sglang.DensemoeMoEMethod, SGLANG)):
        for name, expected in recorded.items():
            assert parameters(getattr(owner, name)) == expected, (owner, name)


@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_a_host_s_abstract_class_is_filled(host: str) -> None:
    def absent(self: Any, *arguments: Any) -> Any:
        raise NotImplementedError

    base = abc.ABCMeta("FusedMoEMethodBase", (), {name: abc.abstractmethod(absent) for name in ABSTRACT[host]})
    with pytest.raises(TypeError, match="abstract"):
        base()
    method = (vllm.DensemoeFusedMoEMethod if host == "vllm" else sglang.DensemoeMoEMethod).derived(base)(CONFIG)
    assert isinstance(method, base)
    layer = torch.nn.Module()
    method.create_weights(layer, EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16, weight_loader=len)
    given, _ = stacked_layer()
    for name, parameter in layer.named_parameters():
        loaded = getattr(given, name)
        assert (parameter.shape, parameter.dtype, parameter.weight_loader) == (loaded.shape, loaded.dtype, len)
        parameter.data.copy_(loaded)
    assert {name for name, _ in layer.named_parameters()} == set(vars(given))
    assert (layer.w13_weight_scale.quant_method, layer.w2_input_scale.quant_method) == ("block", "tensor")
    with pytest.warns(UserWarning, match="global scales"):
        method.process_weights_after_loading(layer)
    assert [name for name, _ in layer.named_parameters() if name.endswith("weight")] == []
    with pytest.raises(ProblemError, match="the config says"):
        method.create_weights(layer, EXPERTS, HIDDEN, 2 * INTERMEDIATE, torch.bfloat16)


def test_vllm_routes_and_keeps_its_parameters_in_place() -> None:
    method = vllm.DensemoeFusedMoEMethod(CONFIG, moe="vllm's config")
    assert (method.moe, method.topk_indices_dtype, method.is_monolithic, method.supports_eplb) == ("vllm's config", None, False, False)
    assert method.uses_weight_scale_2_pattern()
    assert method.get_fused_moe_quant_config(None) is None
    with pytest.raises(ProblemError, match="call apply"):
        method.apply_monolithic(None, None, None)


def test_sglang_s_local_ids_are_those_of_its_rank() -> None:
    """Its dispatcher maps ids to the rank's own, -1 elsewhere: two ranks add up to the layer."""
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = []
    for rank in range(2):
        layer, whole = stacked_layer()
        ids, weights = whole.route(torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2)))
        own = slice(2 * rank, 2 * rank + 2)
        for name, each in vars(layer).items():
            setattr(layer, name, each[own].clone())
        method = sglang.DensemoeMoEMethod(dataclasses.replace(CONFIG, ep_size=2, ep_rank=rank))
        method.create_moe_runner(layer, "config")
        with pytest.warns(UserWarning, match="global scales"):
            method.process_weights_after_loading(layer)
        local = torch.where((ids >= own.start) & (ids < own.stop), ids - own.start, -1)
        choice = SimpleNamespace(topk_weights=weights, topk_ids=local)
        parts.append(method.apply(layer, SimpleNamespace(hidden_states=x, hidden_states_scale=None, topk_output=choice)).hidden_states)
    torch.testing.assert_close(parts[0] + parts[1], whole(x, ids=ids, weights=weights), rtol=2**-6, atol=2**-6)
    with pytest.raises(ProblemError, match="all-gather off"):
        method.apply(layer, SimpleNamespace(hidden_states=x, hidden_states_scale=x, topk_output=choice))


def test_sglang_s_own_combine_input_is_given_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    combine = collections.namedtuple("StandardCombineInput", ["hidden_states"])
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.moe.token_dispatcher.standard", SimpleNamespace(StandardCombineInput=combine))  # type: ignore[arg-type]
    layer, expected = stacked_layer()
    method = sglang.DensemoeMoEMethod(CONFIG)
    with pytest.warns(UserWarning, match="global scales"):
        method.process_weights_after_loading(layer)
    x, ids, weights = torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    found = method.apply(layer, SimpleNamespace(hidden_states=x, topk_output=SimpleNamespace(topk_weights=weights, topk_ids=ids)))
    assert isinstance(found, combine)
    (hidden_states,) = found
    assert torch.equal(hidden_states, expected(x, ids=ids, weights=weights))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"quant": "FP8"}, "only NVFP4"),
        ({"activation": "Gelu"}, "only SwiGLU"),
        ({"swiglu_gptoss_style": True}, "gpt-oss"),
        ({"intermediate_size": 100}, "multiple of 64"),
        ({"eplb_enabled": True}, "replicated experts"),
        ({"moe_lora_enabled": True}, "LoRA"),
        ({"tp_size": 4}, "multiple of 64"),
        ({"num_experts": None}, ""),
    ],
)
def test_tensorrt_llm_s_problems_are_judged(change: dict[str, Any], said: str) -> None:
    p: dict[str, Any] = {
        "quant": "NVFP4", "activation": "Swiglu", "swiglu_gptoss_style": None,
        "hidden_size": 128, "intermediate_size": 128, "num_experts": 8, "top_k": 2,
    }  # fmt: skip
    d: dict[str, Any] = {"tp_size": 1, "ep_size": 1, "eplb_enabled": False, "moe_lora_enabled": False}
    for name, value in change.items():
        (p if name in p else d)[name] = value
    accepted, reason = tensorrt_llm.DenseGemmBackend.can_implement(SimpleNamespace(**p), SimpleNamespace(**d))
    assert accepted == (not said)
    assert said in reason


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
    # some of the experts, at the same addresses, are other weights
    half = EXPERTS // 2
    own = (b.view(torch.uint8)[:half], a_sf, b_sf[: half * 2 * INTERMEDIATE], alpha[:half], None, multiplier)
    some, _ = tensorrt_llm.cute_dsl_nvfp4_dense_gemm_swiglu_blackwell(
        a, *own, expert_count=half, weight_per_expert=2 * INTERMEDIATE, output_dtype=torch.bfloat16
    )
    assert bounds.compare_fc1(
        {"c": some},
        reference.fc1(values, read, alpha.double(), range(half)),
        Problem("fc1", TOKENS, half, HIDDEN, INTERMEDIATE, "nvfp4", "bf16"),
    ).passed
    with pytest.raises(ProblemError, match="1024 scale bytes belong to a"):
        tensorrt_llm.cute_dsl_nvfp4_dense_gemm_swiglu_blackwell(
            a, own[0], a_sf[:64], *own[2:], expert_count=half, weight_per_expert=2 * INTERMEDIATE, output_dtype=torch.bfloat16
        )
    with pytest.raises(ProblemError, match="scale bytes belong to b of"):
        tensorrt_llm.cute_dsl_nvfp4_dense_gemm_fc2_blackwell(
            c, b2, c_sf, b2_sf[:64], alpha2, expert_count=EXPERTS, weight_per_expert=INTERMEDIATE
        )
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
        out = method.apply(layer, x, weights, ids.long(), None, None)
    else:
        choice = SimpleNamespace(topk_weights=weights, topk_ids=ids, router_logits=None)
        out = method.apply(layer, SimpleNamespace(hidden_states=x, topk_output=choice)).hidden_states
    assert torch.equal(out, expected(x, ids=ids, weights=weights))
    with pytest.raises(ProblemError, match="biases"):
        type(method)(dataclasses.replace(CONFIG, bias=True))


def test_a_backend_like_densegemm() -> None:
    layer, _ = stacked_layer()
    method = vllm.DensemoeFusedMoEMethod(dataclasses.replace(CONFIG, activations="nvfp4", between="nvfp4"))
    with pytest.warns(UserWarning, match="global scales"):
        method.process_weights_after_loading(layer)
    module = method._layer
    backend = tensorrt_llm.DenseGemmBackend(module)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, weights = module.route(torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(2)))
    codes, scales = ops.quantize_nvfp4(x, module.input_multiplier)
    plain = torch.from_numpy(layout.untile_scales(scales.numpy(), TOKENS).copy())
    assert torch.equal(backend.run_moe_nvfp4(codes, ids, weights, plain), module(x, ids=ids, weights=weights))
    given, given_scales = backend.quantize_input(x)
    assert torch.equal(given, codes)
    assert torch.equal(given_scales, plain)
    context = SimpleNamespace(x=codes, token_selected_experts=ids, token_final_scales=weights, x_sf=plain)
    assert torch.equal(backend.run_moe(context), module(x, ids=ids, weights=weights))
    with pytest.raises(ProblemError, match="are needed"):
        backend.run_moe_nvfp4(codes, ids, weights)
    with pytest.raises(ProblemError, match="all-to-all"):
        backend.run_moe_nvfp4(codes, ids, weights, plain, enable_alltoall=True)
    with pytest.raises(ProblemError, match="activations='nvfp4'"):
        tensorrt_llm.DenseGemmBackend(DenseGemmMoE(CONFIG))
