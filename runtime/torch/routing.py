"""Router methods in torch, on any device: the same as ``densemoe.runtime.routing``, which documents them. Equal scores go to the smaller id."""

from __future__ import annotations

from typing import Any

import torch

from densemoe.runtime.routing import METHODS, check

__all__ = ["METHODS", "route"]

Tensor = Any
_LEAST_SUM = 1e-20


def _largest(scores: Tensor, count: int) -> Tensor:
    """int64 ids of the ``count`` largest scores of each row, descending; torch.topk does not say which of two equals it takes."""
    return torch.sort(scores, dim=1, descending=True, stable=True)[1][:, :count]


def _in_best_groups(scores: Tensor, groups: int, best: int) -> Tensor:
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, groups, experts // groups)
    group_scores = grouped.topk(min(2, experts // groups), dim=2)[0].sum(dim=2)
    chosen = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, _largest(group_scores, best), True)
    return torch.where(chosen.repeat_interleave(experts // groups, dim=1), scores, torch.full_like(scores, float("-inf")))


def route(
    method: str,
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    groups: int = 1,
    best_groups: int = 1,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token.

    Args:
        method: one of ``METHODS``.
        logits: ``[M, E]``, any float dtype; computed in float32.
        top_k: experts a token.
        bias: ``[E]``, added for the choice alone; DeepSeekV3 and MiniMaxM2.
        groups, best_groups, scaling: DeepSeekV3's.

    Returns:
        ids int32 ``[M, k]``, weights float32 ``[M, k]``, contiguous.

    Raises:
        ProblemError: an unknown method, or sizes that do not fit.
    """
    check(method, tuple(logits.shape), top_k, None if bias is None else tuple(bias.shape), groups, best_groups, scaling)
    scores = logits.float()
    if method in ("Renormalize", "Llama4Renormalize"):
        ids = _largest(scores, top_k)
        chosen = scores.gather(1, ids)
        weights = torch.softmax(chosen, dim=1) if method == "Renormalize" else torch.sigmoid(chosen)
    elif method in ("Default", "RenormalizeNaive"):
        probabilities = torch.softmax(scores, dim=1)
        ids = _largest(probabilities, top_k)
        weights = probabilities.gather(1, ids)
        if method == "RenormalizeNaive":
            weights = weights / weights.sum(dim=1, keepdim=True)
    else:
        probabilities = torch.sigmoid(scores)
        choice = probabilities if bias is None else probabilities + bias.float()
        if groups > 1:
            choice = _in_best_groups(choice, groups, best_groups)
        ids = _largest(choice, top_k)
        weights = probabilities.gather(1, ids)
        weights = weights / (weights.sum(dim=1, keepdim=True) + _LEAST_SUM) * scaling
    return ids.to(torch.int32).contiguous(), weights.float().contiguous()
