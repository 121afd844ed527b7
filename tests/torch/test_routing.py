"""Router methods against formulas written out token by token, and against transformers' own routers of the models that use them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama4 import modeling_llama4
from transformers.models.minimax_m2 import modeling_minimax_m2
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from densemoe.runtime import routing
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.torch.routing import METHODS, route

TOKENS, EXPERTS, TOP_K, HIDDEN = 40, 32, 5, 24
GROUPED = {"groups": 4, "best_groups": 2, "scaling": 2.5}


def logits(seed: int = 3) -> torch.Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)) * 2


def bias_of(method: str) -> torch.Tensor | None:
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(4)) * 0.2 if method in ("DeepSeekV3", "MiniMaxM2") else None


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(method: str, row: list[float], bias: list[float], options: dict[str, Any]) -> dict[int, float]:
    """{expert: weight} of one token, in Python's own floats."""
    experts = range(len(row))
    total = sum(math.exp(x) for x in row)

    def best(scores: dict[int, float], count: int) -> list[int]:
        return sorted(scores, key=lambda e: (-scores[e], e))[:count]

    by_logit = best(dict(enumerate(row)), TOP_K)
    if method == "Default":
        return {e: math.exp(row[e]) / total for e in by_logit}
    if method in ("Renormalize", "RenormalizeNaive"):  # two roads to one number
        chosen = sum(math.exp(row[e]) for e in by_logit)
        return {e: math.exp(row[e]) / chosen for e in by_logit}
    if method == "Llama4Renormalize":
        return {e: sigmoid(row[e]) for e in by_logit}
    choice = {e: sigmoid(row[e]) + bias[e] for e in experts}
    groups, best_groups = options.get("groups", 1), options.get("best_groups", 1)
    size = len(row) // groups
    scores = {g: sum(sorted((choice[e] for e in range(g * size, (g + 1) * size)), reverse=True)[:2]) for g in range(groups)}
    allowed = set(best(scores, best_groups))
    chosen_ids = best({e: choice[e] for e in experts if e // size in allowed}, TOP_K)
    chosen_sum = sum(sigmoid(row[e]) for e in chosen_ids)
    return {e: sigmoid(row[e]) / chosen_sum * options.get("scaling", 1.0) for e in chosen_ids}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_method_is_its_formula(method: str, library: str) -> None:
    given, bias = logits(), bias_of(method)
    options: dict[str, Any] = GROUPED if method == "DeepSeekV3" else {}
    if library == "torch":
        ids, weights = (each.numpy() for each in route(method, given, TOP_K, bias=bias, **options))
    else:
        ids, weights = routing.route(method, given.numpy(), TOP_K, bias=None if bias is None else bias.numpy(), **options)
    for token in range(TOKENS):
        expected = by_hand(method, given[token].tolist(), [0.0] * EXPERTS if bias is None else bias.tolist(), options)
        assert ids[token].tolist() == list(expected)
        np.testing.assert_allclose(weights[token], list(expected.values()), rtol=3e-6)


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_go_to_the_smaller_ids(method: str) -> None:
    ids, weights = route(method, torch.full((2, EXPERTS), 0.5), TOP_K)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (weights == weights[0, 0]).all()


def hosts() -> dict[str, tuple[str, Any, dict[str, Any]]]:
    """Model family → (method, its router in transformers, the method's options)."""
    common = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "num_attention_heads": 4}
    qwen = transformers.Qwen3MoeConfig
    deepseek = transformers.DeepseekV3Config(
        **common, n_routed_experts=EXPERTS, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True
    )
    return {
        "Qwen3-MoE": (
            "RenormalizeNaive", modeling_qwen3_moe.Qwen3MoeTopKRouter(qwen(**common, num_experts=EXPERTS, norm_topk_prob=True)), {},
        ),
        "Qwen3-MoE, weights as they are": (
            "Default", modeling_qwen3_moe.Qwen3MoeTopKRouter(qwen(**common, num_experts=EXPERTS, norm_topk_prob=False)), {},
        ),
        "Mixtral": ("Renormalize", modeling_mixtral.MixtralTopKRouter(transformers.MixtralConfig(**common, num_local_experts=EXPERTS)), {}),
        "DeepSeek-V3": ("DeepSeekV3", modeling_deepseek_v3.DeepseekV3TopkRouter(deepseek), GROUPED),
        "MiniMax-M2": (
            "MiniMaxM2", modeling_minimax_m2.MiniMaxM2TopKRouter(transformers.MiniMaxM2Config(**common, num_local_experts=EXPERTS)), {},
        ),
        "Llama4": (
            "Llama4Renormalize", modeling_llama4.Llama4Router(transformers.Llama4TextConfig(**common, num_local_experts=EXPERTS)), {},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("family", sorted(hosts()))
def test_a_method_is_what_its_model_does_in_transformers(family: str) -> None:
    method, router, options = hosts()[family]
    generator, bias = torch.Generator().manual_seed(6), bias_of(method)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.3)
        if method == "DeepSeekV3":
            router.e_score_correction_bias.copy_(bias)
        found = router(x, bias) if method == "MiniMaxM2" else router(x)
        theirs = torch.zeros(TOKENS, EXPERTS)
        if family == "Llama4":
            theirs, given = found  # scores of all experts, 0 where not chosen
        else:
            given, weights, ids = found
            theirs.scatter_(1, ids, weights.float())
        ids, weights = route(method, given, TOP_K, bias=bias, **options)
    ours = torch.zeros(TOKENS, EXPERTS).scatter_(1, ids.long(), weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert int((theirs != 0).sum()) == TOKENS * TOP_K


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("Sinkhorn", {}, "use one of Default"),
        ("Default", {"top_k": 33}, "use 1 to E"),
        ("Default", {"bias": torch.zeros(EXPERTS)}, "DeepSeekV3 or MiniMaxM2"),
        ("MiniMaxM2", {"bias": torch.zeros(3)}, r"use \[E\]"),
        ("Renormalize", {"groups": 4}, "only DeepSeekV3"),
        ("DeepSeekV3", {"groups": 5}, "groups divide E"),
        ("DeepSeekV3", {"groups": 16, "best_groups": 2}, "hold top_k"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        route(method, logits(), **{"top_k": TOP_K, **options})
