"""The float64 reference of the contract's sections 3–5, with what the error bounds need.

Every function takes numpy arrays or torch tensors (one kind throughout) and uses only what both spell alike, so that the reference on a GPU
is the same text as the one on a CPU. Values are float64; ``a`` and ``b`` are the exact ``e2m1 · e4m3`` or bf16 values without global scales.

Memory: weights are asked for one expert at a time, and of an expert only the columns that are wanted; ``rows`` and ``columns`` restrict the
work to a sample, which is how weights beyond 4 GiB are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.arrays import Array, Indices, constants, indices, long, namespace, sigmoid
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import GROUP, gate_row, scale_offsets, tile_scales, up_row
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, bf16_bits, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem

__all__ = [
    "Fc1Result",
    "Fc2Result",
    "Routes",
    "Weights",
    "activation_values",
    "build_alpha",
    "fc1",
    "fc1_columns",
    "fc2",
    "fused_alpha",
    "grouped_fc1",
    "grouped_fc2",
    "layer",
    "namespace",
    "rounded_bf16",
    "route",
]

LARGEST_F32: Final = float(np.finfo(np.float32).max)


# ---- values of interchange tensors


def _values(codes: Array, scales: Array) -> Array:
    """float64 ``[R, K]`` of code bytes ``[R, K/2]`` and row-major scale bytes ``[R, K/16]``."""
    xp = namespace(codes)
    both = xp.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1, GROUP)
    with np.errstate(invalid="ignore"):
        values = constants(codes, E2M1_VALUES)[long(both)] * constants(codes, E4M3_VALUES)[long(scales)][:, :, None]
    return values.reshape(codes.shape[0], -1)


def _gather_scales(tiled: Array, rows: npt.NDArray[np.int64], first: int, count: int) -> Array:
    """Row-major scales ``[len(rows), count]`` from scale column ``first`` on, out of tiled scales ``[…, C]``."""
    offsets = scale_offsets(rows[:, None], np.arange(first, first + count)[None, :], int(tiled.shape[1]))
    return tiled.reshape(-1)[indices(tiled, offsets)]


def activation_values(codes: Array, scales: Array, rows: Indices | None = None) -> Array:
    """float64 values ``[rows, K]`` of NVFP4 activations in the interchange layout, without the global scale.

    Args:
        codes: uint8 ``[M, K/2]``.
        scales: uint8 tiled ``[⌈M/128⌉·128, K/16]``.
        rows: tokens wanted; all where absent.
    """
    chosen = np.arange(codes.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
    return _values(codes[indices(codes, chosen)], _gather_scales(scales, chosen, 0, int(scales.shape[1])))


def decoded_bf16(codes: Array, scales: Array) -> Array:
    """The bf16 bits of ``activation_values``, which bf16 holds exactly: a code and a scale have 6 significant bits together."""
    return bf16_bits(activation_values(codes, scales))


def rounded_bf16(values: Array, multiplier: np.float32) -> npt.NDArray[np.uint16]:
    """The bf16 bits of what ``values`` ``[M, K]`` rounded to NVFP4 (``nvfp4.quantise_rows``) stand for, without the global scale."""
    codes, scales = quantise_rows(values, multiplier)
    return decoded_bf16(pack_codes(codes), tile_scales(scales))


@dataclass(frozen=True)
class Weights:
    """Weights in the interchange layout, read by the reference one expert at a time.

    Attributes:
        op: ``fc1`` or ``fc2``.
        codes, scales: uint8, ``layout.weight_shapes``; tiled scales.
        experts: E.
    """

    op: str
    codes: Array
    scales: Array
    experts: int

    def __call__(self, expert: int, columns: Indices | None = None) -> Any:
        """float64 values of one expert without its global scale.

        Args:
            columns: FC1: output columns of this expert, 0 … I-1; FC2: output columns, 0 … H-1. All where absent.

        Returns:
            FC1: (up, gate), each ``[columns, H]``; FC2: ``[columns, I]``.
        """
        if self.op == "fc1":
            rows = int(self.codes.shape[1])
            chosen = np.arange(rows // 2) if columns is None else np.asarray(columns, dtype=np.int64)
            return tuple(self._rows(self.codes[expert], own, expert * rows, 0, self.scales.shape[1]) for own in (up_row(chosen), gate_row(chosen)))
        half, groups = int(self.codes.shape[1]) // self.experts, int(self.scales.shape[1]) // self.experts
        chosen = np.arange(self.codes.shape[0]) if columns is None else np.asarray(columns, dtype=np.int64)
        return self._rows(self.codes[:, expert * half : (expert + 1) * half], chosen, 0, expert * groups, groups)

    def _rows(self, codes: Array, rows: npt.NDArray[np.int64], first_row: int, first_scale: int, scales: int) -> Array:
        return _values(codes[indices(codes, rows)], _gather_scales(self.scales, first_row + rows, first_scale, int(scales)))


# ---- FC1


@dataclass(frozen=True)
class Fc1Result:
    """FC1 of some output columns, exact but for float64 rounding. All ``[rows, columns]``.

    Attributes:
        y: after SwiGLU and alpha_post, before conversion (section 3, step 4). Where float32 would overflow on the way it is Inf or NaN.
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
    """FC2 of some output columns: ``[rows, columns]``.

    Attributes:
        c: the exact output before conversion.
        magnitude: Σ_e |alpha[m, e]| · Σ|products|.
        active: experts whose alpha is not 0, per token: ``[rows, 1]``.
        scalar: one alpha for all, so that one accumulator may run through all experts.
    """

    c: Array
    magnitude: Array
    active: Array
    scalar: bool


def _overflow(xp: Any, x: Array) -> Array:
    """``x`` with what float32 cannot hold replaced by Inf."""
    return xp.where(xp.abs(x) > LARGEST_F32, xp.sign(x) * float("inf"), x)


def fc1_columns(columns: Indices, intermediate: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """(expert, its columns 0 … I-1) for ascending output columns 0 … E·I-1.

    Raises:
        ProblemError: the columns do not ascend.
    """
    chosen = np.asarray(columns, dtype=np.int64)
    if chosen.ndim != 1 or (np.diff(chosen) <= 0).any() or (chosen < 0).any():
        raise ProblemError("columns: give ascending output columns, each once")
    experts = chosen // intermediate
    return [(int(expert), chosen[experts == expert] - expert * intermediate) for expert in np.unique(experts)]


def fc1(
    a: Array,
    weights: Callable[..., tuple[Array, Array]],
    alpha: Array,
    experts: Sequence[int] | Sequence[tuple[int, npt.NDArray[np.int64]]],
    alpha_post: Array | None = None,
    *,
    rows: Indices | None = None,
) -> Fc1Result:
    """FC1 for the output columns of ``experts`` (contract section 3).

    Args:
        a: ``[M, H]``.
        weights: gives an expert's (up, gate) values, each ``[I, H]``: ``weights(expert)``, or ``weights(expert, columns)`` for a sample.
        alpha: ``[E]``.
        experts: experts, or ``fc1_columns`` of a sample.
        alpha_post: ``[M, E]`` or None; where it is exactly 0 the result is exactly 0, by selection.
        rows: tokens wanted; all where absent.
    """
    xp = namespace(a)
    if rows is not None:
        a = a[indices(a, rows)]
        alpha_post = None if alpha_post is None else alpha_post[indices(alpha_post, rows)]
    parts: list[tuple[Array, ...]] = []
    with np.errstate(all="ignore"):
        for chosen in experts:
            expert, columns = chosen if isinstance(chosen, tuple) else (chosen, None)
            up_weights, gate_weights = weights(expert) if columns is None else weights(expert, columns)
            scale = alpha[expert]
            up, gate = (_overflow(xp, a @ w.T * scale) for w in (up_weights, gate_weights))
            up_magnitude, gate_magnitude = (xp.abs(a) @ xp.abs(w).T * xp.abs(scale) for w in (up_weights, gate_weights))
            y = _overflow(xp, up * (gate * sigmoid(gate)))
            post = xp.ones_like(y)
            if alpha_post is not None:
                post = post * alpha_post[:, expert : expert + 1]
                y = xp.where(post == 0, xp.zeros_like(y), _overflow(xp, y * post))
            parts.append((y, up, gate, up_magnitude, gate_magnitude, post))
    return Fc1Result(*(xp.concatenate(column, 1) for column in zip(*parts, strict=True)))


# ---- FC2


def fc2(
    a: Array,
    weights: Callable[..., Array],
    alpha: Array,
    experts: int,
    intermediate: int,
    *,
    rows: Indices | None = None,
    columns: Indices | None = None,
) -> Fc2Result:
    """FC2 for the output columns whose weights are given (contract section 4).

    Args:
        a: ``[M, E·I]``.
        weights: gives an expert's values ``[columns, I]``: ``weights(expert)``, or ``weights(expert, columns)`` for a sample.
        alpha: ``[M, E]``, or a scalar ``[1]``. A term whose alpha is exactly 0 is selected away, NaN or not.
        rows, columns: tokens and output columns wanted; all where absent.
    """
    xp = namespace(a)
    scalar = alpha.ndim == 1
    if rows is not None:
        a = a[indices(a, rows)]
        alpha = alpha if scalar else alpha[indices(alpha, rows)]
    total = magnitude = active = None
    with np.errstate(all="ignore"):
        for expert in range(experts):
            w = weights(expert) if columns is None else weights(expert, columns)
            part = a[:, expert * intermediate : (expert + 1) * intermediate]
            scale = (alpha.reshape(1, 1) if scalar else alpha[:, expert : expert + 1]) + xp.zeros_like(part[:, :1])
            term, size = part @ w.T * scale, xp.abs(part) @ xp.abs(w).T * xp.abs(scale)
            used = scale != 0
            term, size = xp.where(used, term, xp.zeros_like(term)), xp.where(used, size, xp.zeros_like(size))
            count = xp.where(used, xp.ones_like(scale), xp.zeros_like(scale))
            if total is None:
                total, magnitude, active = term, size, count
            else:
                total, magnitude, active = total + term, magnitude + size, active + count
    return Fc2Result(total, magnitude, active, scalar)


# ---- section 5


def build_alpha(
    ids: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    w2_alpha: npt.NDArray[Any],
    *,
    experts: int,
    elsewhere_allowed: bool = False,
) -> npt.NDArray[np.float32]:
    """alpha2 ``[M, E]`` of contract section 5 in float32: ``topk_weight[m, j] · w2_alpha[e]``, repeated ids adding in the order of j.

    Args:
        ids: integer ``[M, k]`` expert ids.
        weights: ``[M, k]`` float32 router weights.
        w2_alpha: ``[E]`` float32, fc2_input_dequant · w2.global_scale.
        experts: E, always given: it is never inferred from the ids.
        elsewhere_allowed: ids outside ``[0, E)`` belong to other ranks; otherwise they are an error.

    Raises:
        ProblemError: shapes or dtypes that do not agree, or ids outside ``[0, E)``.
    """
    if ids.ndim != 2 or ids.shape != weights.shape or w2_alpha.shape != (experts,):
        raise ProblemError(
            f"ids {list(ids.shape)}, weights {list(weights.shape)}, w2_alpha {list(w2_alpha.shape)}: use [M, k], [M, k], [{experts}]"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise ProblemError(f"ids are {ids.dtype}: use integers")
    here = (ids >= 0) & (ids < experts)
    if not elsewhere_allowed and not here.all():
        m, j = np.argwhere(~here)[0]
        raise ProblemError(f"expert id {ids[m, j]} of token {m}: use 0 to {experts - 1}, or say that other ranks hold the rest")
    alpha = np.zeros((ids.shape[0], experts), dtype=np.float32)
    token, _ = np.nonzero(here)
    chosen = ids[here]
    np.add.at(alpha, (token, chosen), weights[here].astype(np.float32) * w2_alpha[chosen].astype(np.float32))
    return alpha


def fused_alpha(alpha2: npt.NDArray[Any], w2_alpha: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], np.float32]:
    """(FC1's alpha_post ``[M, E]``, FC2's scalar alpha) of the fused form (contract section 5).

    Raises:
        ProblemError: ``max(w2_alpha)`` is not finite and positive, where the form is not legal.
    """
    largest = np.float32(np.max(w2_alpha))
    if not np.isfinite(largest) or largest <= 0:
        raise ProblemError(f"max(w2_alpha) = {largest}: the fused form needs a finite positive one; use the default form")
    return (alpha2 / largest).astype(np.float32), largest


# ---- gathered tokens


@dataclass(frozen=True)
class Routes:
    """The router's choice sorted by expert, one row a (token, expert) pair, in the order of pairs inside an expert.

    Attributes:
        tiles: int32 ``[tiles, 3]``: expert, first row, rows.
        experts: int32 ``[rows]``: whose weights a row meets.
        rows: int32 ``[rows]``: a row's token.
        row_alpha: float32 ``[rows]``: its scale in FC2, router weight · w2_alpha; NaN where the id is bad.
        pairs: int32 ``[rows]``: a row's place in the router's choice, token · k + which of its experts.
    """

    tiles: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    row_alpha: npt.NDArray[np.float32]
    pairs: npt.NDArray[np.int32]

    def in_one_order(self, row_alpha: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """``row_alpha`` ``[rows]``, a kernel's or this one's, for comparison: where a token names an expert twice, those rows stand in any order."""
        return row_alpha[np.lexsort((row_alpha, self.rows, self.experts))]

    def packed(self, capacity: int) -> dict[str, npt.NDArray[Any]]:
        """The tensors ``tiles``, ``rows`` and ``row_alpha`` as the kernels read them, with room for ``capacity`` pairs."""
        tiles = np.zeros((1 + capacity, 4), dtype=np.int32)
        tiles[0, :2] = len(self.tiles), len(self.rows)
        tiles[1 : 1 + len(self.tiles), :3] = self.tiles
        rows, row_alpha = np.zeros(capacity, dtype=np.int32), np.zeros(capacity, dtype=np.float32)
        rows[: len(self.rows)], row_alpha[: len(self.rows)] = self.rows, self.row_alpha
        return {"tiles": tiles, "rows": rows, "row_alpha": row_alpha}

    def places(self, m: int, top_k: int) -> npt.NDArray[np.int32]:
        """int32 ``[M, k]``: the row of each pair, -1 where it has none."""
        places = np.full(m * top_k, -1, dtype=np.int32)
        places[self.pairs] = np.arange(len(self.pairs), dtype=np.int32)
        return places.reshape(m, top_k)

    def given(self, problem: Problem) -> dict[str, npt.NDArray[Any]]:
        """What a grouped op of ``problem`` reads of them, by role."""
        every = {**self.packed(problem.m * problem.top_k), "places": self.places(problem.m, problem.top_k)}
        roles = problem.tensors()
        return {role: array for role, array in every.items() if role in roles}

    def misplaced(self, places: npt.NDArray[np.int32], rows: npt.NDArray[np.int32], row_alpha: npt.NDArray[np.float32]) -> int:
        """How many of a kernel's ``places`` ``[M, k]`` are wrong, given its ``rows`` and ``row_alpha``: a pair's row has its token and its scale, and
        is no other's; where a token names an expert twice, those rows may stand in either order."""
        flat, expected = places.reshape(-1).astype(np.int64), self.places(*places.shape).reshape(-1)
        here = expected >= 0
        wrong = np.where(here, (flat < 0) | (flat >= len(self.rows)), flat != -1)
        sound = here & ~wrong
        at, pairs = flat[sound], np.flatnonzero(sound)
        given, wanted = row_alpha[at], self.row_alpha[expected[pairs]]
        same = (given == wanted) | (np.isnan(given) & np.isnan(wanted))
        own = (rows[at] == pairs // places.shape[1]) & (self.experts[at] == self.experts[expected[pairs]]) & same
        wrong[pairs] = ~own
        return int(wrong.sum()) + len(at) - len(np.unique(at))


def route(
    ids: npt.NDArray[Any],
    router: npt.NDArray[Any],
    w2_alpha: npt.NDArray[Any],
    *,
    group_tile: int,
    first_expert: int = 0,
    elsewhere: bool = False,
) -> Routes:
    """What the op ``route`` computes.

    Args:
        ids: integer ``[M, k]``.
        router: float32 ``[M, k]``.
        w2_alpha: float32 ``[E]``.
        group_tile: most rows of a tile.
        first_expert: id of this rank's first expert.
        elsewhere: ids outside the rank's experts belong to other ranks; else they are bad: a row of expert 0 whose scale is NaN.
    """
    experts, top_k = len(w2_alpha), ids.shape[1]
    local = ids.reshape(-1).astype(np.int64) - first_expert
    here = (local >= 0) & (local < experts)
    kept = np.flatnonzero(here | (not elsewhere))
    chosen = np.where(here, local, 0)[kept]
    order = np.argsort(chosen, kind="stable")
    pairs, sorted_experts = kept[order], chosen[order]
    alpha = router.reshape(-1)[pairs].astype(np.float32) * w2_alpha[sorted_experts].astype(np.float32)
    alpha = np.where(here[pairs], alpha, np.float32("nan")).astype(np.float32)
    tiles = []
    for expert in np.unique(sorted_experts):
        first, end = np.searchsorted(sorted_experts, [expert, expert + 1])
        tiles += [(int(expert), at, min(group_tile, int(end) - at)) for at in range(int(first), int(end), group_tile)]
    listed = np.array(tiles or [(0, 0, 0)], dtype=np.int32)
    return Routes(listed, sorted_experts.astype(np.int32), (pairs // top_k).astype(np.int32), alpha, pairs.astype(np.int32))


def grouped_fc1(a: Array, weights: Callable[..., tuple[Array, Array]], alpha: Array, routes: Routes) -> Fc1Result:
    """FC1 of every row: ``[rows, I]``; arguments as ``fc1``."""
    xp = namespace(a)
    parts = [fc1(a, weights, alpha, [int(e)], rows=routes.rows[routes.experts == e]) for e in np.unique(routes.experts)]
    names = ("y", "up", "gate", "up_magnitude", "gate_magnitude", "post")
    return Fc1Result(*(xp.concatenate([getattr(part, name) for part in parts], 0) for name in names))


def grouped_fc2(a: Array, weights: Callable[..., Array], row_alpha: Array, routes: Routes, m: int) -> Fc2Result:
    """FC2 from rows: ``[M, H]``, each token the sum of its rows.

    Args:
        a: ``[rows, I]``.
        weights: as for ``fc2``.
        row_alpha: ``[rows]``.
    """
    sums: list[Array] = []
    for expert in (int(e) for e in np.unique(routes.experts)):
        at = np.flatnonzero(routes.experts == expert)
        own = indices(a, at)
        part = fc2(a[own], partial(_same, weights(expert)), row_alpha[own].reshape(-1, 1), 1, int(a.shape[1]))
        parts = (part.c, part.magnitude, part.active)
        sums = sums or [constants(a, np.zeros((m, int(each.shape[1])))) for each in parts]
        for total, each in zip(sums, parts, strict=True):
            _add_rows(total, routes.rows[at], each)
    total, magnitude, active = sums
    return Fc2Result(total, magnitude, active, False)


def _same(values: Array, _: int) -> Array:
    return values


def _add_rows(total: Array, rows: npt.NDArray[Any], parts: Array) -> None:
    """``total[rows] += parts``, a row as often as it is named."""
    if isinstance(total, np.ndarray):
        np.add.at(total, rows, parts)
    else:
        total.index_add_(0, long(indices(total, rows)), parts)


def layer(x: Array, expert_weights: Callable[[int], tuple[Array, Array, Array]], ids: npt.NDArray[Any], router: npt.NDArray[Any]) -> Array:
    """The unquantised layer that section 9's 97 % mark compares with: ``Σ_j router[m, j] · down_e · (up_e · silu(gate_e))``, ``[M, H]``.

    Args:
        x: ``[M, H]``.
        expert_weights: gives (up ``[I, H]``, gate ``[I, H]``, down ``[H, I]``), asked once for each routed expert.
        ids: integer ``[M, k]``; ids below 0 or of experts that are not here must have been removed.
        router: ``[M, k]`` router weights.
    """
    xp = namespace(x)
    result = xp.zeros_like(x)
    for expert in (int(e) for e in np.unique(ids)):
        share = np.where(ids == expert, router.astype(np.float64), 0.0).sum(axis=1)
        tokens = np.flatnonzero((ids == expert).any(axis=1))
        at = indices(x, tokens)
        up_weights, gate_weights, down = expert_weights(expert)
        own = x[at]
        gate = own @ gate_weights.T
        y = (own @ up_weights.T) * gate * sigmoid(gate)
        result[at] = result[at] + (y @ down.T) * constants(x, share[tokens])[:, None]
    return result
