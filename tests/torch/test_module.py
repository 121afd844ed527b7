"""DenseGemmMoE: routing, forms, inputs, shared experts, refusals; shards on gloo; transformers models with replaced experts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import FAMILIES, Decoder, dequantise_experts, tiny

from densemoe.runtime import data, layout, marks, packing, reference, routing
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layer_data import LayerData
from densemoe.runtime.loader import ENVIRONMENT
from densemoe.runtime.torch import DenseGemmMoE, MoEConfig, MoEWeights, can_implement, create_moe, ops, replace_moe
from densemoe.runtime.torch.config import FUSED_ALPHA, fused_by_default
from densemoe.runtime.torch.module import tile_scales
from densemoe.runtime.torch.replace import quantize_experts
from densemoe.runtime.torch.weights import WeightStore, quantize_projection

CASE = data.LayerCase(8, 3, 128, 128, 6)
CONFIG = MoEConfig(8, 3, 128, 128)
ATOMS = LayerData(CASE)


def stacked() -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up ``[E, 2I, H]``, down ``[E, H, I]``) of the layer's data."""
    parts = [[torch.from_numpy(ATOMS.projection(name, e)) for name in ("gate", "up", "down")] for e in range(8)]
    return torch.stack([torch.cat(each[:2]) for each in parts]), torch.stack([each[2] for each in parts])


def weights_of(intermediate: slice = slice(0, 128), experts: slice = slice(0, 8), **scales: float) -> MoEWeights:
    gate_up, down = stacked()
    gate, up = gate_up[experts, :128][:, intermediate], gate_up[experts, 128:][:, intermediate]
    return quantize_experts(torch.cat([gate, up], 1), down[experts][:, :, intermediate], **scales)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """(bf16 hidden states, router logits)."""
    x = torch.from_numpy(ATOMS.x.view(np.int16)).view(torch.bfloat16)
    return x, torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


def exact(ids: torch.Tensor, weights: torch.Tensor) -> Any:
    x, _ = tokens()
    return reference.layer(x.double(), lambda e: tuple(map(torch.from_numpy, ATOMS.unquantised(e))), ids.numpy(), weights.numpy())


@pytest.mark.parametrize("method", routing.METHODS)
@pytest.mark.parametrize("form", ["bf16", "nvfp4", "fused"])
def test_the_layer_is_close_to_the_unquantised_one(method: str, form: str) -> None:
    x, logits = tokens()
    between = "bf16" if form == "bf16" else "nvfp4"
    config = dataclasses.replace(CONFIG, routing=method, between=between, fused_alpha=form == "fused")
    layer = DenseGemmMoE(config, weights_of(between_scale=16 / 2688))
    out = layer(x, logits)
    assert out.dtype == torch.bfloat16
    assert marks.layer_mark(out.double(), exact(*layer.route(logits))).passed
    torch.testing.assert_close(out.reshape(2, 3, 128), layer(x.reshape(2, 3, 128), logits), rtol=0, atol=0)


def test_quantised_input_equals_quantising_inside_and_f16_is_f16() -> None:
    x, logits = tokens()
    weights = weights_of(input_scale=4 / 2688)
    layer = DenseGemmMoE(dataclasses.replace(CONFIG, activations="nvfp4"), weights)
    codes, scales = ops.quantize_nvfp4(x, layer.input_multiplier)
    plain = torch.from_numpy(layout.untile_scales(scales.numpy(), 6).copy())
    assert torch.equal(tile_scales(plain), scales)
    assert torch.equal(tile_scales(plain.view(torch.float8_e4m3fn)), scales)
    assert torch.equal(layer(codes, logits, scales=plain), layer(x, logits))
    half = DenseGemmMoE(dataclasses.replace(CONFIG, dtype="f16"), weights)
    out = half(x.half(), logits)
    assert out.dtype == torch.float16
    assert marks.layer_mark(out.double(), exact(*half.route(logits))).passed
    with pytest.raises(ProblemError, match="dtype f16"):
        half(x, logits)
    with pytest.raises(ProblemError, match="activations='bf16'"):
        half(codes, logits, scales=plain)


def test_shared_experts_are_added() -> None:
    x, logits = tokens()
    shared = torch.nn.Linear(128, 128, dtype=torch.bfloat16)
    alone, both = DenseGemmMoE(CONFIG, weights_of()), DenseGemmMoE(CONFIG, weights_of(), shared_experts=shared)
    assert torch.equal(both(x, logits), alone(x, logits) + shared(x))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_config_asks_the_op_for_the_same_bits(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so when it is printed; on a CPU the result is the same."""
    asked: list[bool] = []
    real = ops.moe.default

    def moe(*arguments: Any) -> torch.Tensor:
        given = dict(zip((each.name for each in real._schema.arguments), arguments, strict=False))
        asked.append(bool(given.get("deterministic", False)))
        return real(*arguments)

    monkeypatch.setattr(ops, "moe", moe)
    x, logits = tokens()
    layer = DenseGemmMoE(dataclasses.replace(CONFIG, deterministic=deterministic), weights_of())
    assert torch.equal(layer(x, logits), DenseGemmMoE(CONFIG, weights_of())(x, logits))
    assert asked == [deterministic, False]
    assert ("deterministic" in repr(layer)) == deterministic


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    x, logits = tokens()
    layer = DenseGemmMoE(CONFIG)
    with pytest.raises(ProblemError, match="no weights"):
        layer(x, logits)
    layer.load(weights_of())
    ids, weights = layer.route(logits)
    for wrong in ({}, {"ids": ids}, {"router_logits": logits, "ids": ids, "weights": weights}):
        with pytest.raises(ProblemError, match="router_logits, or ids and weights"):
            layer(x, **wrong)
    with pytest.raises(ProblemError, match="this rank's layer is"):
        layer.load(weights_of(slice(0, 64)))
    with pytest.raises(ProblemError, match="input scales"):
        DenseGemmMoE(dataclasses.replace(CONFIG, between="nvfp4"), weights_of())


def test_new_weights_go_where_the_old_ones_lie_and_a_slot_can_be_replaced() -> None:
    x, logits = tokens()
    layer = DenseGemmMoE(CONFIG, weights_of())
    before, address = layer(x, logits), layer.w1.data_ptr()
    other = weights_of(slice(0, 128), slice(0, 8))
    other.w2_scale.mul_(2)
    layer.load(other)
    assert layer.w1.data_ptr() == address
    torch.testing.assert_close(layer(x, logits), 2 * before, rtol=2**-7, atol=0)
    parts = [{n: quantize_projection(ATOMS.projection(n, e)) for n in ("gate", "up", "down")} for e in range(8)]
    stores = [WeightStore(8, 128, 128) for _ in range(2)]
    for expert in range(8):
        stores[0].put(expert, **parts[expert])
        stores[1].put(expert, **parts[2 if expert == 5 else expert])
    layer.load(stores[0].finish())
    layer.update_expert(5, **parts[2])
    assert layer.w1.data_ptr() == address
    assert torch.equal(layer(x, logits), DenseGemmMoE(CONFIG, stores[1].finish())(x, logits))


def moved(layer: DenseGemmMoE) -> DenseGemmMoE:
    """As ``to(device)`` does it: every buffer is another tensor."""
    return layer._apply(lambda each: each.clone())


def test_a_layer_that_was_moved_takes_new_weights_where_it_is() -> None:
    x, logits = tokens()
    store, parts = WeightStore(8, 128, 128), {}
    for expert in range(8):
        parts[expert] = {each: quantize_projection(ATOMS.projection(each, expert)) for each in ("gate", "up", "down")}
        store.put(expert, **parts[expert])
    weights = store.finish()
    layer = moved(DenseGemmMoE(CONFIG, weights))
    address, given = layer.w1.data_ptr(), [each.clone() for each in (weights.w1, weights.w2, weights.w1_scale, weights.w2_scale)]
    layer.update_expert(5, **parts[2])
    assert layer.w1.data_ptr() == address
    store.put(5, **parts[2])  # the caller's own weights are only now others
    assert all(torch.equal(*pair) for pair in zip((weights.w1_scale, weights.w2_scale), given[2:], strict=True))
    assert torch.equal(layer(x, logits), DenseGemmMoE(CONFIG, store.finish())(x, logits))
    layer.load(weights_of())
    assert layer.w1.data_ptr() == address
    for slot in (-1, 8):
        with pytest.raises(ProblemError, match="use 0 to 7"):
            layer.update_expert(slot, **parts[2])


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_a_model_s_dtype_leaves_scales_and_weights_as_they_are(convert: Any) -> None:
    x, logits = tokens()
    config = MoEConfig(8, 3, 128, 128, between="nvfp4", routing="MiniMaxM2")
    layer = DenseGemmMoE(config, weights_of(between_scale=16 / 2688), bias=torch.linspace(-1, 1, 8))
    before = layer(x, logits)
    layer.shared_experts = torch.nn.Linear(2, 2)
    convert(layer)
    assert layer.shared_experts.weight.dtype != torch.float32
    layer.shared_experts = None
    assert {each.dtype for name, each in layer.named_buffers() if name not in ("w1", "w2")} == {torch.float32}
    assert torch.equal(layer(x, logits), before)


def test_a_gradient_through_the_router_is_no_error_on_a_cpu() -> None:
    x, logits = tokens()
    layer = DenseGemmMoE(CONFIG, weights_of())
    wanted = layer(x, logits)
    assert torch.equal(layer(x, logits.requires_grad_()).detach(), wanted)
    codes, _ = ops.quantize_nvfp4(x.clone().requires_grad_(), torch.ones(1))
    assert torch.equal(codes, ops.quantize_nvfp4(x, torch.ones(1))[0])


def test_logits_of_another_number_of_experts_are_refused() -> None:
    x, _ = tokens()
    layer = DenseGemmMoE(dataclasses.replace(CONFIG, experts=16, ep_size=2), weights_of())
    for experts in (8, 32):
        with pytest.raises(ProblemError, match="use \\[M, E\\] with E = 16"):
            layer(x, torch.zeros(6, experts))


@pytest.mark.parametrize(("bias", "said"), [(torch.zeros(8), "only DeepSeekV3 or MiniMaxM2 adds one"), (torch.zeros(4), r"bias \[4\]: use \[E\]")])
def test_a_bias_that_the_routing_does_not_add_is_refused_at_construction(bias: torch.Tensor, said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        DenseGemmMoE(CONFIG, weights_of(), bias=bias)


def test_the_environment_asks_for_the_fused_form_once_and_an_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(value: str | None) -> bool:
        fused_by_default.cache_clear()
        monkeypatch.delenv(FUSED_ALPHA, raising=False)
        if value is not None:
            monkeypatch.setenv(FUSED_ALPHA, value)
        return MoEConfig(8, 3, 128, 128).fused_alpha

    try:
        assert [asked(value) for value in (None, "", "0", "1")] == [False, False, False, True]
        monkeypatch.setenv(FUSED_ALPHA, "0")
        assert MoEConfig(8, 3, 128, 128).fused_alpha  # read once
        assert not MoEConfig(8, 3, 128, 128, fused_alpha=False).fused_alpha
        with pytest.raises(ProblemError, match="FUSED_FC2_ALPHA='yes': use 1"):
            asked("yes")
        assert FUSED_ALPHA in ENVIRONMENT
    finally:
        fused_by_default.cache_clear()


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 0.0, -1.0])
def test_the_fused_form_is_refused_where_it_is_not_legal(scale: float) -> None:
    weights = weights_of(between_scale=16 / 2688)
    weights.w2_scale.fill_(scale)
    with pytest.raises(ProblemError, match="finite positive one; set fused_alpha=False"):
        DenseGemmMoE(dataclasses.replace(CONFIG, between="nvfp4", fused_alpha=True), weights)
    DenseGemmMoE(dataclasses.replace(CONFIG, between="nvfp4"), weights)
    x, _ = tokens()
    with pytest.raises(ProblemError, match="alpha_max"):
        ops.moe(x, torch.zeros(6, 1, dtype=torch.int32), torch.ones(6, 1), weights.w1, weights.w1_scale, weights.w2, torch.ones(8),
                128, 128, packing.LAYOUT, alpha_max=torch.tensor([scale]))  # fmt: skip


def _family(name: str, **changes: Any) -> Any:
    import transformers

    common = {
        "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 64, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    text = "Text" if name == "Llama4" else ""
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}{text}Config")(**{**common, **changes}))


#: Family → (why it is refused, its model); those of FAMILIES apart.
OTHER_FAMILIES: dict[str, tuple[str, Any]] = {
    "DeepSeek-V3, Kimi-K2": ("", lambda: _family(
        "DeepseekV3", num_key_value_heads=4, head_dim=16, n_routed_experts=8, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    )),
    "GLM-4.5": ("", lambda: _family("Glm4Moe", n_routed_experts=8, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)),
    "MiniMax-M2": ("", lambda: _family("MiniMaxM2", num_local_experts=8)),
    "Qwen2-MoE": ("", lambda: _family("Qwen2Moe", shared_expert_intermediate_size=64, num_experts=8)),
    "gpt-oss": ("biases", lambda: _family("GptOss", num_local_experts=8)),
    "Llama4": ("belong together", lambda: _family("Llama4", intermediate_size_mlp=64, num_local_experts=8, num_experts_per_tok=1)),
}  # fmt: skip


REFUSED = [
    ({"activation": "gelu"}, "only SwiGLU"),
    ({"gated_limit": 7.0}, "gpt-oss"),
    ({"bias": True}, "biases"),
    ({"router_weight_on_input": True}, "multiplied into the input"),
    ({"quantisation": "mxfp4"}, "only nvfp4"),
    ({"all_to_all": True}, "all-to-all"),
    ({"load_balancing": True}, "update_expert"),
    ({"tp_size": 4}, "I on this rank is 32"),
    ({"tp_size": 3}, "not a multiple of tp_size=3"),
    ({"ep_size": 3}, "not a multiple of ep_size=3"),
    ({"tp_size": 2, "tp_rank": 2}, "use 0 to 1"),
    ({"top_k": 9}, "use 1 to 8"),
    ({"dtype": "f32"}, "bf16, f16"),
    ({"routing": "Sinkhorn"}, "use one of Default"),
    ({"routing": "DeepSeekV3", "groups": 3}, "groups divide E"),
    ({"routing": "DeepSeekV3", "groups": 4, "best_groups": 1}, "hold top_k"),
    ({"groups": 2}, "only DeepSeekV3 has them"),
    ({"scaling": 2.5}, "only DeepSeekV3 has them"),
    ({"hidden": 100}, "multiple of 64"),
    ({"layout": packing.INTERCHANGE_LAYOUT}, "nvfp4 in both places"),
    ({"layout": packing.INTERCHANGE_LAYOUT, "activations": "nvfp4", "between": "nvfp4", "intermediate": 512, "tp_size": 4}, "I = 128 on this rank"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_what_cannot_run_is_refused_at_construction_and_goes_to_the_named_fallback(
    change: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(CONFIG, **change)
    accepted, reason = can_implement(config)
    assert not accepted
    assert said in reason
    for make in (DenseGemmMoE, create_moe):
        with pytest.raises(ProblemError, match="cannot run this layer"):
            make(config)

    def grouped_gemm(given: MoEConfig) -> str:
        return f"fallback for {given.experts} experts"

    with caplog.at_level(logging.INFO, "densemoe"):
        assert create_moe(config, fallback=grouped_gemm) == "fallback for 8 experts"
        assert isinstance(create_moe(CONFIG, weights_of(), fallback=grouped_gemm), DenseGemmMoE)
    assert said in caplog.messages[0]
    assert "grouped_gemm" in caplog.messages[0]
    assert caplog.messages[1].endswith("densemoe")


def _rank(rank: int, folder: str, config: MoEConfig) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, logits = tokens()
    results = {}
    for name, own in (("tp", {"tp_size": 2, "tp_rank": rank}), ("ep", {"ep_size": 2, "ep_rank": rank})):
        mine = dataclasses.replace(config, reduce=True, **own)
        part = weights_of(
            slice(64 * rank, 64 * rank + 64) if name == "tp" else slice(0, 128), slice(4 * rank, 4 * rank + 4) if name == "ep" else slice(0, 8)
        )
        results[name] = DenseGemmMoE(mine, part)(x, logits)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_tensor_and_expert_parallelism_together_add_up() -> None:
    x, logits = tokens()
    total = torch.zeros(6, 128)
    for tp_rank, ep_rank in itertools.product(range(2), range(2)):
        own = dataclasses.replace(CONFIG, tp_size=2, tp_rank=tp_rank, ep_size=2, ep_rank=ep_rank)
        part = weights_of(slice(64 * tp_rank, 64 * tp_rank + 64), slice(4 * ep_rank, 4 * ep_rank + 4))
        total += DenseGemmMoE(own, part)(x, logits).float()
    assert marks.layer_mark(total.double(), exact(*DenseGemmMoE(CONFIG).route(logits))).passed


def test_a_sum_over_ranks_without_a_process_group_is_refused() -> None:
    own = dataclasses.replace(CONFIG, ep_size=2, reduce=True)
    with pytest.raises(ProblemError, match="init_process_group"):
        DenseGemmMoE(own, weights_of(slice(0, 128), slice(0, 4)))(*tokens())


def test_the_module_compiles_into_one_graph() -> None:
    x, logits = tokens()
    for method in ("Renormalize", "DeepSeekV3"):
        layer = DenseGemmMoE(dataclasses.replace(CONFIG, routing=method, between="nvfp4"), weights_of(between_scale=16 / 2688))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, logits), layer(x, logits))


def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path), CONFIG), nprocs=2)
    x, logits = tokens()
    layer = DenseGemmMoE(CONFIG, weights_of())
    mark = exact(*layer.route(logits))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("tp", "ep"):
        assert torch.equal(first[name], second[name])
        assert marks.layer_mark(first[name].double(), mark).passed
    # experts are quantised alike on either side: only bf16's rounding of the two parts differs
    torch.testing.assert_close(first["ep"], layer(x, logits), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_with_replaced_experts_gives_the_logits_of_its_dequantised_self(kind: str) -> None:
    model, twin = tiny(kind), dequantise_experts(tiny(kind))
    ids = torch.arange(24).reshape(2, 12) * 7 % 97
    names = replace_moe(model)
    assert len(names) == 2
    with torch.no_grad():
        ours, theirs, plain = model(ids).logits.float(), twin(ids).logits.float(), tiny(kind)(ids).logits.float()
    scale = float(theirs.std())
    assert float((ours - theirs).abs().max()) < 0.05 * scale  # both work in bf16 in between
    assert float((ours - plain).abs().mean()) < 0.2 * scale


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_decoding_step_is_one_graph_and_gives_what_generate_gives(kind: str) -> None:
    """What a CUDA graph asks for, as far as a CPU can tell: no step looks at a value, and every step is the same work."""
    model = tiny(kind)
    replace_moe(model)
    prompt = torch.arange(8).reshape(1, 8) * 5 % 97
    expected = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 8:].tolist()
    decoder = Decoder(model, prompt)
    assert decoder.decode(8) == expected
    compiled = torch.compile(decoder.step, fullgraph=True, backend="eager", dynamic=False)
    torch._dynamo.utils.counters.clear()
    assert decoder.decode(8, compiled) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("family", sorted(OTHER_FAMILIES))
def test_other_families_run_or_say_why_not(family: str) -> None:
    said, make = OTHER_FAMILIES[family]
    torch.manual_seed(0)
    plain = make().to(torch.bfloat16).eval()
    model, ids = copy.deepcopy(plain), torch.arange(16).reshape(2, 8) * 7 % 64
    if said:
        with pytest.raises(ProblemError, match=said):
            replace_moe(model)
        return
    assert replace_moe(model)
    dequantise_experts(plain)
    choices: list[Any] = []
    for router in routers(model):
        router.register_forward_hook(lambda module, given, chosen: choices.append(chosen))
    with torch.no_grad():
        ours = model(ids).logits.float()
        replayed = iter(choices)
        for router in routers(plain):  # else a token whose experts are nearly equal takes others on some machines
            router.register_forward_hook(lambda module, given, chosen: next(replayed))
        theirs = plain(ids).logits.float()
    assert choices
    assert next(replayed, None) is None
    assert float((ours - theirs).abs().max()) < 0.05 * float(theirs.std())


def routers(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in ("gate", "router")]


def test_marks_of_other_experts_are_seen() -> None:
    marks = {"is_concatenated": (False, "interleaved"), "is_transposed": (True, "transposed"), "has_gate": (False, "no gate"),
             "has_post_expert_norm": (True, "normalises"), "has_bias": (True, "biases")}  # fmt: skip
    for name, (value, said) in marks.items():
        model = tiny("qwen3")
        setattr(model.model.layers[1].mlp.experts, name, value)
        with pytest.raises(ProblemError, match=said):
            replace_moe(model)
        assert hasattr(model.model.layers[0].mlp.experts, "gate_up_proj")


def test_a_model_without_experts_or_with_another_activation_is_refused_untouched() -> None:
    with pytest.raises(ProblemError, match="no experts module"):
        replace_moe(torch.nn.Linear(2, 2))
    model = tiny("mixtral")
    model.model.layers[1].mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ProblemError, match="GELU"):
        replace_moe(model)
    assert hasattr(model.model.layers[0].mlp.experts, "gate_up_proj")
