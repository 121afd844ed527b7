"""Router methods of the contract's section 9 in float32 numpy: (ids, weights) from logits, for tests and the reference of layers.

| method | meaning |
| --- | --- |
| Default | softmax over all experts, then the k largest |
| Renormalize | the k largest logits, then softmax over them |
| RenormalizeNaive | softmax over all, the k largest, divided by their sum |
| Llama4Renormalize | the k largest logits, each through a sigmoid |
| DeepSeekV3 | sigmoid; the best groups, then the k largest in them, chosen with a bias added; weights without it, normalised, scaled |
| MiniMaxM2 | sigmoid; the k largest, chosen with a bias added; weights without it, normalised |

A group's score is the sum of its two largest. Equal scores go to the smaller expert id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError

__all__ = ["METHODS", "check", "refusal", "route"]

METHODS: Final = ("Default", "Renormalize", "RenormalizeNaive", "Llama4Renormalize", "DeepSeekV3", "MiniMaxM2")
_BIASED: Final = ("DeepSeekV3", "MiniMaxM2")
_LEAST_SUM: Final = np.float32(1e-20)

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


def _softmax(x: Floats) -> Floats:
    shifted = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float32)


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(np.float32(1) / (np.float32(1) + np.exp(-x)), dtype=np.float32)


def _largest(scores: Floats, count: int) -> Ids:
    """Ids of the ``count`` largest scores of each row, descending."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int32)


def _at(values: Floats, ids: Ids) -> Floats:
    return np.asarray(np.take_along_axis(values, ids.astype(np.int64), axis=1), dtype=np.float32)


def _in_best_groups(scores: Floats, groups: int, best: int) -> Floats:
    """Scores with those outside the ``best`` groups set to -Inf."""
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, groups, experts // groups)
    group_scores = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    chosen = np.zeros((tokens, groups), dtype=bool)
    np.put_along_axis(chosen, _largest(group_scores, best).astype(np.int64), True, axis=1)
    return np.where(np.repeat(chosen, experts // groups, axis=1), scores, np.float32(-np.inf)).astype(np.float32)


def refusal(method: str, experts: int, top_k: int, groups: int = 1, best_groups: int = 1, scaling: float = 1.0, biased: bool = False) -> str:
    """Why a router cannot be of this kind, or nothing; ``biased``: something is added to its scores for the choice."""
    if method not in METHODS:
        return f"routing method {method!r}: use one of {', '.join(METHODS)}"
    if not 1 <= top_k <= experts:
        return f"top_k={top_k} of {experts} experts: use 1 to E"
    if biased and method not in _BIASED:
        return f"a bias for {method}: only {' or '.join(_BIASED)} adds one"
    if method != "DeepSeekV3" and (groups, best_groups, scaling) != (1, 1, 1.0):
        return f"groups={groups}, best_groups={best_groups}, scaling={scaling} for {method}: only DeepSeekV3 has them"
    if groups < 1 or experts % groups or not 1 <= best_groups <= groups or top_k > best_groups * (experts // groups):
        return f"{groups} groups, the best {best_groups}, of {experts} experts for top_k={top_k}: groups divide E and hold top_k"
    return ""


def check(
    method: str, logits: Sequence[int], top_k: int, bias: Sequence[int] | None, groups: int = 1, best_groups: int = 1, scaling: float = 1.0
) -> None:
    """Raises ProblemError where ``route`` cannot be asked so; ``logits`` and ``bias`` by their shapes."""
    if len(logits) != 2:
        raise ProblemError(f"logits {list(logits)}: use [M, E]")
    reason = refusal(method, logits[1], top_k, groups, best_groups, scaling, bias is not None)
    if reason:
        raise ProblemError(reason)
    if bias is not None and tuple(bias) != (logits[1],):
        raise ProblemError(f"bias {list(bias)}: use [E], {[logits[1]]}")


def route(
    method: str,
    logits: npt.NDArray[Any],
    top_k: int,
    *,
    bias: npt.NDArray[Any] | None = None,
    groups: int = 1,
    best_groups: int = 1,
    scaling: float = 1.0,
) -> tuple[Ids, Floats]:
    """Experts and weights of each token.

    Args:
        method: one of ``METHODS``.
        logits: ``[M, E]``.
        top_k: experts a token, 1 to E.
        bias: ``[E]``, added for the choice alone; DeepSeekV3 and MiniMaxM2.
        groups, best_groups, scaling: DeepSeekV3's expert groups, how many of them a token may use, and the factor of its weights.

    Returns:
        ids int32 ``[M, k]``, weights float32 ``[M, k]``.

    Raises:
        ProblemError: an unknown method, or sizes that do not fit.
    """
    scores = np.asarray(logits, dtype=np.float32)
    check(method, scores.shape, top_k, None if bias is None else np.shape(bias), groups, best_groups, scaling)
    if method == "Renormalize":
        ids = _largest(scores, top_k)
        return ids, _softmax(_at(scores, ids))
    if method == "Llama4Renormalize":
        ids = _largest(scores, top_k)
        return ids, _sigmoid(_at(scores, ids))
    if method in ("Default", "RenormalizeNaive"):
        probabilities = _softmax(scores)
        ids = _largest(probabilities, top_k)
        weights = _at(probabilities, ids)
        return ids, weights if method == "Default" else np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
    probabilities = _sigmoid(scores)
    choice = probabilities if bias is None else (probabilities + np.asarray(bias, dtype=np.float32)).astype(np.float32)
    if groups > 1:
        choice = _in_best_groups(choice, groups, best_groups)
    ids = _largest(choice, top_k)
    weights = _at(probabilities, ids)
    weights = weights / (weights.sum(axis=1, keepdims=True) + _LEAST_SUM) * np.float32(scaling)
    return ids, np.asarray(weights, dtype=np.float32)
