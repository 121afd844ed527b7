"""The ops on a CPU: equal to the contract's reference, registered as PyTorch asks, compiled whole, and refusing what the contract refuses."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from densemoe.runtime import bounds, data, marks, packing, reference
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layer_data import LayerData
from densemoe.runtime.nvfp4 import quantise
from densemoe.runtime.problem import Problem
from densemoe.runtime.torch import cpu, device, ops

LAYOUT = packing.LAYOUT


def tensor(array: Any) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)


def fc1_case(a_dtype: str, c_dtype: str, post: bool, m: int = 5, experts: int = 3, hidden: int = 128, intermediate: int = 64) -> Any:
    rng = np.random.default_rng(0)
    weights = data.fc1_weights(rng, experts, hidden, intermediate, "normal")
    first, scales, scale = data.activations(rng, m, hidden, a_dtype, "normal")
    alpha_post = tensor(data.alpha_post(rng, m, experts, zeros=0.3)) if post else None
    multiplier = torch.tensor([2688.0 / 30]) if c_dtype == "nvfp4" else None
    a, a_scales = tensor(first), None if a_dtype == "bf16" else tensor(scales)
    b = tensor(packing.pack_fc1(weights.codes, weights.scales))
    arguments = (a, b, tensor(data.fc1_alpha(weights, scale)), intermediate, LAYOUT, c_dtype, multiplier, a_scales, alpha_post)
    values = a.double() if a_scales is None else reference.activation_values(a, a_scales)
    exact = reference.fc1(
        values,
        reference.Weights("fc1", tensor(weights.codes), tensor(weights.scales), experts),
        arguments[2].double(),
        range(experts),
        None if alpha_post is None else alpha_post.double(),
    )
    return arguments, exact, Problem("fc1", m, experts, hidden, intermediate, a_dtype, c_dtype, alpha_post=post)


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
@pytest.mark.parametrize("c_dtype", ["nvfp4", "bf16", "f32", "e4m3", "e5m2"])
@pytest.mark.parametrize("post", [False, True])
def test_fc1_lies_within_the_contract(a_dtype: str, c_dtype: str, post: bool) -> None:
    arguments, exact, problem = fc1_case(a_dtype, c_dtype, post)
    c, c_scales = ops.fc1_swiglu(*arguments)
    got = {"c.codes": c, "c.scales": c_scales} if c_dtype == "nvfp4" else {"c": c}
    multiplier = None if arguments[6] is None else float(arguments[6])
    assert bounds.compare_fc1(got, exact, problem, output_multiplier=multiplier).passed


def fc2_case(a_dtype: str, scalar: bool, m: int = 5, experts: int = 3, hidden: int = 128, intermediate: int = 64) -> Any:
    rng = np.random.default_rng(1)
    weights = data.fc2_weights(rng, experts, hidden, intermediate, "normal")
    first, scales, scale = data.activations(rng, m, experts * intermediate, a_dtype, "normal")
    a, a_scales = tensor(first), None if a_dtype == "bf16" else tensor(scales)
    alpha = tensor(data.fc2_alpha(rng, m, weights, scale, scalar=scalar, zeros=0.4))
    values = a.double() if a_scales is None else reference.activation_values(a, a_scales)
    read = reference.Weights("fc2", tensor(weights.codes), tensor(weights.scales), experts)
    exact = reference.fc2(values, read, alpha.double(), experts, intermediate)
    return (a, a_scales, weights, alpha), exact


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("layout", [packing.LAYOUT, packing.INTERCHANGE_LAYOUT])
def test_fc2_lies_within_the_contract_in_both_layouts(a_dtype: str, scalar: bool, layout: str) -> None:
    (a, a_scales, weights, alpha), exact = fc2_case(a_dtype, scalar)
    pack = packing.pack_fc2 if layout == packing.LAYOUT else lambda *args: packing.pack_interchange("fc2", *args)
    b = tensor(pack(weights.codes, weights.scales, 3))
    for c_dtype in ("bf16", "f16", "f32"):
        c = ops.fc2(a, b, alpha, 3, 128, layout, c_dtype, a_scales)
        problem = Problem("fc2", 5, 3, 128, 64, a_dtype, c_dtype, scalar_alpha=scalar)
        assert bounds.compare_fc2({"c": c}, exact, problem).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [0, 1, 130])
def test_quantising_is_the_contract_s(dtype: Any, m: int) -> None:
    x = torch.randn(m, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    multiplier = torch.tensor([448 * 6 / 4.0])
    codes, scales = ops.quantize_nvfp4(x, multiplier)
    ours = quantise(x.float().numpy(), 4.0 / (448 * 6))
    assert np.array_equal(codes.numpy(), ours.codes)
    assert scales.shape == (-(-m // 128) * 128, 8)
    assert m == 0 or np.array_equal(scales.numpy(), ours.scales)


class Layer:
    """A small layer's arguments for ``densemoe::moe``, and what the reference says."""

    def __init__(self, m: int = 6, experts: int = 8, top_k: int = 3, hidden: int = 128, intermediate: int = 64) -> None:
        self.data = LayerData(data.LayerCase(experts, top_k, hidden, intermediate, m))
        made = [self.data.expert(e) for e in range(experts)]
        self.x, (ids, router) = tensor(self.data.x), self.data.routing()
        self.ids, self.router = tensor(ids), tensor(router)
        self.w1, self.w2 = (tensor(np.concatenate([getattr(each, f"fc{op}_packed") for each in made])) for op in (1, 2))
        self.alpha1, self.scale2 = (torch.tensor([getattr(each, f"fc{op}_scale") for each in made]) for op in (1, 2))
        self.made = made
        self.hidden, self.intermediate, self.experts, self.m = hidden, intermediate, experts, m

    def arguments(self, nvfp4: bool = False, fused: bool = False, c_dtype: str = "f32") -> tuple[Any, ...]:
        multiplier = torch.tensor([float(self.data.output_multiplier)]) if nvfp4 else None
        w2_alpha = self.scale2 / multiplier if nvfp4 else self.scale2.clone()
        return (
            self.x,
            self.ids,
            self.router,
            self.w1,
            self.alpha1,
            self.w2,
            w2_alpha,
            self.hidden,
            self.intermediate,
            LAYOUT,
            c_dtype,
            None,
            multiplier,
            None,
            w2_alpha.max().reshape(1).clone() if fused else None,
        )


def dense(layer: Layer, nvfp4: bool, fused: bool) -> torch.Tensor:
    """The layer as the contract's section 5 composes it: alpha by the reference, then FC1 and FC2 over all experts."""
    a = layer.arguments(nvfp4, fused)
    alpha2 = reference.build_alpha(layer.ids.numpy(), layer.router.numpy(), a[6].numpy(), experts=layer.experts)
    post, alpha = None, tensor(alpha2)
    if fused:
        both = reference.fused_alpha(alpha2, a[6].numpy())
        post, alpha = tensor(both[0]), torch.tensor([both[1]])
    c, scales = ops.fc1_swiglu(layer.x, a[3], a[4], layer.intermediate, LAYOUT, "nvfp4" if nvfp4 else "bf16", a[12], alpha_post=post)
    return ops.fc2(c, a[5], alpha, layer.experts, layer.hidden, LAYOUT, "f32", scales if nvfp4 else None)


@pytest.mark.parametrize("nvfp4", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_layer_is_its_parts(nvfp4: bool, fused: bool) -> None:
    layer = Layer()
    whole = ops.moe(*layer.arguments(nvfp4, fused))
    torch.testing.assert_close(whole, dense(layer, nvfp4, fused), rtol=1e-6, atol=1e-6)

    def unquantised(expert: int) -> Any:
        return tuple(map(torch.from_numpy, layer.data.unquantised(expert)))

    exact = reference.layer(layer.x.double(), unquantised, layer.ids.numpy(), layer.router.numpy())
    assert marks.layer_mark(whole.double(), exact).passed


def test_ids_of_other_ranks_contribute_nothing_and_repeated_ids_add() -> None:
    layer = Layer()
    whole = ops.moe(*layer.arguments())
    half = layer.experts // 2
    parts = []
    for first in (0, half):
        a = list(layer.arguments())
        size1, size2 = layer.w1.numel() // 2, layer.w2.numel() // 2
        own = slice(first, first + half)
        a[3], a[5] = layer.w1[first // half * size1 :][:size1].clone(), layer.w2[first // half * size2 :][:size2].clone()
        a[4], a[6] = a[4][own].clone(), a[6][own].clone()
        with pytest.raises(ProblemError, match="other ranks hold the rest"):
            ops.moe(*a, first)
        parts.append(ops.moe(*a, first, True))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-6, atol=1e-6)
    a = list(layer.arguments())
    a[1], a[2] = torch.full_like(layer.ids, 2), torch.full_like(layer.router, 0.25)
    one = list(a)
    one[1], one[2] = a[1][:, :1].contiguous(), torch.full_like(layer.router[:, :1], 0.75)
    torch.testing.assert_close(ops.moe(*a), ops.moe(*one), rtol=1e-6, atol=1e-6)


def cases() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    (a, a_scales, weights, alpha), _ = fc2_case("nvfp4", False)
    b = tensor(packing.pack_fc2(weights.codes, weights.scales, 3))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    return {
        "quantize_nvfp4": (
            ops.quantize_nvfp4,
            (x, torch.tensor([600.0])),
            {"codes": torch.empty(5, 64, dtype=torch.uint8), "scales": torch.empty(128, 8, dtype=torch.uint8)},
        ),
        "fc1_swiglu": (
            ops.fc1_swiglu,
            fc1_case("bf16", "bf16", True)[0],
            {"c": torch.empty(5, 192, dtype=torch.bfloat16), "c_scales": torch.empty(0, 0, dtype=torch.uint8)},
        ),
        "fc1_swiglu nvfp4": (
            ops.fc1_swiglu,
            fc1_case("nvfp4", "nvfp4", False)[0],
            {"c": torch.empty(5, 96, dtype=torch.uint8), "c_scales": torch.empty(128, 12, dtype=torch.uint8)},
        ),
        "fc2": (ops.fc2, (a, b, alpha, 3, 128, LAYOUT, "bf16", a_scales), {"c": torch.empty(5, 128, dtype=torch.bfloat16)}),
        "moe": (ops.moe, Layer(m=4).arguments(True), {"c": torch.empty(4, 128)}),
    }


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS))
def test_functions_behind_an_op_have_the_names_the_order_and_the_defaults_of_its_schema(name: str) -> None:
    """PyTorch leaves out of a call what its schema has as a default, and may give the rest by place or by name."""
    schema = getattr(torch.ops.densemoe, name).default._schema
    wanted = [(each.name, each.default_value if each.has_default_value() else inspect.Parameter.empty) for each in schema.arguments]
    fake = getattr(ops, f"_fake_{name.split('_')[0]}")
    for function in (getattr(cpu, name), getattr(device, name), getattr(device, f"{name}_out"), fake):
        own = inspect.signature(function).parameters.values()
        assert [(each.name, each.default) for each in own if each.kind is each.POSITIONAL_OR_KEYWORD] == wanted
        assert [each.name for each in own if each.kind is each.KEYWORD_ONLY] == list(ops.SCHEMAS[name][1]) * function.__name__.endswith("_out")
    optional = [default is not inspect.Parameter.empty for _, default in wanted]
    assert optional == sorted(optional)


def test_what_is_left_out_is_the_default() -> None:
    layer = Layer()
    given = layer.arguments(c_dtype="bf16")
    assert torch.equal(ops.moe(*given[:10]), ops.moe(*given, 0, False))
    a = fc1_case("bf16", "bf16", False)[0]
    assert torch.equal(ops.fc1_swiglu(*a[:5])[0], ops.fc1_swiglu(*a)[0])
    cases_of_fc2 = cases()["fc2"][1]
    bf16 = torch.zeros(5, 192, dtype=torch.bfloat16)
    assert torch.equal(ops.fc2(bf16, *cases_of_fc2[1:6]), ops.fc2(bf16, *cases_of_fc2[1:7], None))


@pytest.mark.parametrize("name", ["quantize_nvfp4", "fc1_swiglu", "fc1_swiglu nvfp4", "fc2", "moe"])
def test_opcheck(name: str) -> None:
    op, arguments, outputs = cases()[name]
    torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(op.out, arguments, outputs)


@pytest.mark.parametrize("name", ["quantize_nvfp4", "fc1_swiglu", "fc1_swiglu nvfp4", "fc2", "moe"])
def test_the_out_variant_writes_what_the_op_returns(name: str) -> None:
    op, arguments, outputs = cases()[name]
    results = op(*arguments)
    assert op.out(*arguments, **outputs) is None
    for ours, theirs in zip(results if isinstance(results, tuple) else (results,), outputs.values(), strict=True):
        assert torch.equal(ours, theirs)
    wrong = {role: torch.empty((*each.shape, 2), dtype=each.dtype) for role, each in outputs.items()}
    with pytest.raises(ProblemError, match="has shape"):
        op.out(*arguments, **wrong)


def test_a_whole_layer_compiles_into_one_graph_with_any_number_of_tokens() -> None:
    layer = Layer()

    def step(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.softmax(logits, dim=1).topk(3, dim=1)
        a = layer.arguments(True, c_dtype="bf16")
        y = ops.moe(x * 2, ids, weights.contiguous(), *a[3:])
        return y + x

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (6, 3):
        logits = torch.randn(m, layer.experts, generator=torch.Generator().manual_seed(m))
        torch.testing.assert_close(compiled(layer.x[:m], logits), step(layer.x[:m], logits))


def replaced(arguments: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:position], value, *arguments[position + 1 :])


@pytest.mark.parametrize(
    ("position", "change", "said"),
    [
        (0, lambda x: x.t().contiguous().t(), "contiguous"),
        (0, lambda x: x.float(), "use torch.bfloat16"),
        (0, lambda x: x[:, :64].contiguous(), "hidden = 128"),
        (1, lambda ids: ids.float(), "int32 or int64"),
        (1, lambda ids: ids[:2], "int32 or int64"),
        (2, lambda router: router.double(), "torch.float32"),
        (4, lambda alpha: alpha[:, None], "has shape"),
        (6, lambda alpha: alpha[:3].contiguous(), "has shape"),
        (3, lambda w: w[:-4608], "bytes"),
        (7, lambda hidden: 96, "hidden = 96"),
        (8, lambda intermediate: 96, "multiple of 64"),
        (9, lambda layout: "sm80/1", "layout"),
        (10, lambda c_dtype: "f64", "c_dtype"),
    ],
)
def test_wrong_inputs_raise_before_anything_is_computed(position: int, change: Any, said: str) -> None:
    arguments = Layer().arguments()
    with pytest.raises(ProblemError, match=said):
        ops.moe(*replaced(arguments, position, change(arguments[position])))


def test_no_tokens_give_an_empty_result() -> None:
    layer = Layer()
    a = layer.arguments(True, c_dtype="f16")
    c = ops.moe(layer.x[:0], layer.ids[:0], layer.router[:0], *a[3:])
    assert c.shape == (0, 128)
    assert c.dtype == torch.float16
