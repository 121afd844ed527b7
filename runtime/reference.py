"""The float64 reference of the contract's sections 3–5, with what the error bounds need.

Every function takes numpy arrays or torch tensors (one kind throughout) and uses only what both spell alike, so that the reference on a GPU
is the same text as the one on a CPU. Values are float64; ``a`` and ``b`` are the exact ``e2m1 · e4m3`` or bf16 values without global scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from densemoe.runtime.errors import ProblemError

__all__ = ["Fc1Result", "Fc2Result", "build_alpha", "fc1", "fc2", "fused_alpha", "namespace"]

Array = Any  # numpy array or torch tensor, float64 unless said otherwise


def namespace(x: Array) -> Any:
    """numpy or torch, whichever made ``x``."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


@dataclass(frozen=True)
class Fc1Result:
    """FC1 of some experts' columns, exact but for float64 rounding. All ``[M, columns]``.

    Attributes:
        y: after SwiGLU and alpha_post, before conversion (section 3, step 4).
        up, gate: after alpha (step 2).
        up_magnitude, gate_magnitude: |alpha| · Σ|products| of each.
        post: alpha_post per element, or 1.
    """

    y: Array
    up: Array
    gate: Array
    up_magnitude: Array
    gate_magnitude: Array
    post: Array


@dataclass(frozen=True)
class Fc2Result:
    """FC2 of some output columns: ``[M, columns]``.

    Attributes:
        c: the exact output before conversion.
        magnitude: Σ_e |alpha[m, e]| · Σ|products|.
    """

    c: Array
    magnitude: Array


def _sigmoid(xp: Any, x: Array) -> Array:
    """1 / (1 + e^-x) without overflow on either side."""
    small = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1 / (1 + small), small / (1 + small))


def fc1(a: Array, weights: Callable[[int], tuple[Array, Array]], alpha: Array, experts: Sequence[int], alpha_post: Array | None = None) -> Fc1Result:
    """FC1 for the output columns of ``experts`` (contract section 3).

    Args:
        a: ``[M, H]``.
        weights: gives an expert's (up, gate) values, each ``[I, H]``: asked one expert at a time, which bounds the memory.
        alpha: ``[E]``.
        alpha_post: ``[M, E]`` or None; where it is exactly 0 the result is exactly 0, by selection.
    """
    xp = namespace(a)
    parts: dict[str, list[Array]] = {name: [] for name in ("y", "up", "gate", "up_magnitude", "gate_magnitude", "post")}
    for expert in experts:
        up_weights, gate_weights = weights(expert)
        scale = alpha[expert]
        up, gate = (a @ w.T * scale for w in (up_weights, gate_weights))
        up_magnitude, gate_magnitude = (xp.abs(a) @ xp.abs(w).T * xp.abs(scale) for w in (up_weights, gate_weights))
        y = up * (gate * _sigmoid(xp, gate))
        post = xp.ones_like(y)
        if alpha_post is not None:
            post = post * alpha_post[:, expert : expert + 1]
            y = xp.where(post == 0, xp.zeros_like(y), y * post)
        for name, value in (
            ("y", y),
            ("up", up),
            ("gate", gate),
            ("up_magnitude", up_magnitude),
            ("gate_magnitude", gate_magnitude),
            ("post", post),
        ):
            parts[name].append(value)
    join = xp.concatenate
    return Fc1Result(**{name: join(values, 1) for name, values in parts.items()})


def fc2(a: Array, weights: Callable[[int], Array], alpha: Array, experts: int, intermediate: int) -> Fc2Result:
    """FC2 for the output columns whose weights are given (contract section 4).

    Args:
        a: ``[M, E·I]``.
        weights: gives an expert's values ``[columns, I]``.
        alpha: ``[M, E]``, or a scalar ``[1]``. A term whose alpha is exactly 0 is selected away.
    """
    xp = namespace(a)
    total = magnitude = None
    for expert in range(experts):
        w = weights(expert)
        part = a[:, expert * intermediate : (expert + 1) * intermediate]
        scale = alpha.reshape(1, 1) if alpha.ndim == 1 else alpha[:, expert : expert + 1]
        part = xp.where(scale == 0, xp.zeros_like(part), part)
        term = part @ w.T * scale
        size = xp.abs(part) @ xp.abs(w).T * xp.abs(scale)
        total = term if total is None else total + term
        magnitude = size if magnitude is None else magnitude + size
    return Fc2Result(total, magnitude)


def build_alpha(
    ids: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], w2_alpha: np.ndarray[Any, Any], *, experts: int, elsewhere_allowed: bool = False
) -> np.ndarray[Any, Any]:
    """alpha2 ``[M, E]`` of contract section 5 in float32: ``topk_weight[m, j] · w2_alpha[e]``, repeated ids adding.

    Args:
        ids: ``[M, k]`` expert ids.
        weights: ``[M, k]`` float32 router weights.
        w2_alpha: ``[E]`` float32.
        elsewhere_allowed: ids outside ``[0, E)`` belong to other ranks; otherwise they are an error.

    Raises:
        ProblemError: shapes that do not agree, or ids outside ``[0, E)``.
    """
    if ids.ndim != 2 or ids.shape != weights.shape or w2_alpha.shape != (experts,):
        raise ProblemError(f"ids {ids.shape}, weights {weights.shape}, w2_alpha {w2_alpha.shape}: use [M, k], [M, k], [{experts}]")
    here = (ids >= 0) & (ids < experts)
    if not elsewhere_allowed and not here.all():
        m, j = np.argwhere(~here)[0]
        raise ProblemError(f"expert id {ids[m, j]} of token {m}: use 0 to {experts - 1}, or say that other ranks hold the rest")
    alpha = np.zeros((ids.shape[0], experts), dtype=np.float32)
    for m, j in np.argwhere(here):
        alpha[m, ids[m, j]] += np.float32(weights[m, j]) * np.float32(w2_alpha[ids[m, j]])
    return alpha


def fused_alpha(alpha2: np.ndarray[Any, Any], w2_alpha: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.float32]:
    """(FC1's alpha_post, FC2's scalar alpha) of the fused form (contract section 5).

    Raises:
        ProblemError: ``max(w2_alpha)`` is not finite and positive, where the form is not legal.
    """
    largest = np.float32(np.max(w2_alpha))
    if not np.isfinite(largest) or largest <= 0:
        raise ProblemError(f"max(w2_alpha) = {largest}: the fused form needs a finite positive one; use the default form")
    return (alpha2 / largest).astype(np.float32), largest


def router_cases() -> Mapping[str, str]:
    """Names and meanings of the routing methods of contract section 9, for listings."""
    return {
        "Default": "softmax, then top-k",
        "Renormalize": "top-k, then softmax over the chosen",
        "RenormalizeNaive": "softmax, top-k, divided by their sum",
        "Llama4Renormalize": "top-k, then sigmoid",
        "DeepSeekV3": "sigmoid plus bias in groups, top-k, renormalised and scaled",
        "MiniMaxM2": "sigmoid plus bias, top-k, renormalised",
    }
