"""The one generator of test data: cases of the contract's section 9 and seeded tensors for them. numpy only.

Everything follows from a seed through ``numpy.random.Generator``, the same on every machine. Kinds of data:

    integers   integers in [-5, 5) as bf16, quantised with amax / 2688 (per expert for weights): section 9
    normal     standard normal, quantised likewise
    exact      rule 1: every product a multiple of one g, Σ|products| < 2**24 · g, also after alpha; activations and gates not negative
    raw        random codes under all scales that a tensor may have, subnormal, largest and zero ones included
    extreme    groups of scale zero, least, largest (448) and 1 side by side, codes at both ends
    codes      random codes under scales from 0.5 to 1.875: quick to make at the size of a model
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import GROUP, interleave_up_gate, scale_offsets, tile_scales, weight_shapes
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, bf16_bits, encode_e4m3, pack_codes, quantise_expert
from densemoe.runtime.problem import Problem

__all__ = [
    "KINDS",
    "LAYERS",
    "Fc1Case",
    "Fc2Case",
    "LayerCase",
    "Weights",
    "activations",
    "alpha_post",
    "fc1_alpha",
    "fc1_grid",
    "fc1_weights",
    "fc2_alpha",
    "fc2_grid",
    "fc2_weights",
    "integers",
    "layers",
    "poison_activations",
    "ragged",
]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

KINDS: Final = ("integers", "normal", "exact", "raw", "extreme", "codes")
_CODED: Final = ("exact", "raw", "extreme", "codes")  # kinds that are codes and scales from the start
#: (E, k, H, I) of contract section 9.
LAYERS: Final = (
    (8, 1, 512, 512),
    (4, 4, 512, 512),
    (7, 2, 256, 512),
    (13, 3, 256, 512),
    (8, 2, 4096, 14336),
    (256, 8, 7168, 2048),
    (8, 2, 6144, 32768),
)


# ---- cases


class Fc1Case(NamedTuple):
    """One of section 9's FC1 cases; ``rows`` is 2I."""

    experts: int
    rows: int
    m: int
    hidden: int
    alpha_post: bool

    def problem(self, a_dtype: str = "nvfp4", c_dtype: str = "nvfp4") -> Problem:
        """The case as a Problem."""
        return Problem("fc1", self.m, self.experts, self.hidden, self.rows // 2, a_dtype, c_dtype, alpha_post=self.alpha_post)


class Fc2Case(NamedTuple):
    """One of section 9's FC2 cases."""

    experts: int
    intermediate: int
    m: int
    hidden: int

    def problem(self, a_dtype: str = "nvfp4", c_dtype: str = "bf16", scalar_alpha: bool = False) -> Problem:
        """The case as a Problem."""
        return Problem("fc2", self.m, self.experts, self.hidden, self.intermediate, a_dtype, c_dtype, scalar_alpha=scalar_alpha)


class LayerCase(NamedTuple):
    """One of section 9's layers."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    m: int


def fc1_grid() -> Iterator[Fc1Case]:
    """The 384 FC1 cases, weights changing slowest."""
    for experts, rows, hidden in itertools.product((1, 4, 8, 32), (256, 512, 1024, 2816), (256, 512, 2048)):
        for m, post in itertools.product((1, 8, 127, 256), (True, False)):
            yield Fc1Case(experts, rows, m, hidden, post)


def fc2_grid() -> Iterator[Fc2Case]:
    """The 180 FC2 cases, weights changing slowest."""
    for experts, intermediate, hidden in itertools.product((1, 4, 8, 32, 256), (256, 512, 1024), (256, 512, 2048)):
        for m in (1, 8, 127, 256):
            yield Fc2Case(experts, intermediate, m, hidden)


def layers() -> Iterator[LayerCase]:
    """The layer cases."""
    for shape in LAYERS:
        for m in (1, 8):
            yield LayerCase(*shape, m)


def ragged(op: str, count: int, seed: int, **fields: Any) -> Iterator[Problem]:
    """``count`` random shapes off the grid: M from 1 to 600, E odd, H and I multiples of 64 with I not a multiple of 256.

    Args:
        fields: further fields of the Problems, for example ``a_dtype``.
    """
    rng = np.random.default_rng([seed, count])
    off_grid = [i for i in range(1, 12) if i % 4]
    for _ in range(count):
        m, experts = int(rng.integers(1, 601)), int(rng.choice([1, 3, 5, 7, 13]))
        yield Problem(op, m, experts, 64 * int(rng.integers(1, 12)), 64 * int(rng.choice(off_grid)), **fields)


# ---- weights


class Weights(NamedTuple):
    """Weights in the interchange layout (``layout.weight_shapes``).

    Attributes:
        codes: uint8 ``[E, 2I, H/2]`` or ``[H, E·I/2]``.
        scales: uint8, tiled: ``[E·2I, H/16]`` or ``[⌈H/128⌉·128, E·I/16]``.
        global_scales: float32 ``[E]``.
    """

    codes: Bytes
    scales: Bytes
    global_scales: Floats


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """Integers in [-5, 5), the data of section 9."""
    return rng.integers(-5, 5, shape, dtype=np.int8)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ProblemError(f"kind={kind!r}: use one of {', '.join(KINDS)}")


def _exact_limits(k: int) -> tuple[int, int]:
    """(largest code magnitude index, largest integer scale) of exact data whose sum runs over ``k`` products.

    In units of 1/2 per operand and with alphas from 1/2 to 2, Σ|products|·alpha < 2**24 · g needs k · 4 · units**2 < 2**24.

    Raises:
        ProblemError: k is so large that not even values of 1/2 fit.
    """
    units = math.isqrt((2**24 - 1) // (4 * k))
    if units < 1:
        raise ProblemError(f"K = {k} products cannot be exact in float32 after alpha: use K < 2**22")
    halves = [int(2 * value) for value in E2M1_VALUES[:8]]
    if units >= halves[7]:
        return 7, min(units // halves[7], 16)  # integers up to 16 are e4m3 values
    return max(index for index in range(8) if halves[index] <= units), 1


def _coded(rng: np.random.Generator, shape: tuple[int, int], kind: str, k: int, *, positive: bool = False) -> tuple[Bytes, Bytes]:
    """(codes one a byte ``[R, K]``, row-major scale bytes ``[R, K/16]``) of a kind that fixes them."""
    rows, columns = shape
    groups = (rows, columns // GROUP)
    if kind == "exact":
        largest, scale = _exact_limits(k)
        codes = rng.integers(0, largest + 1, shape, dtype=np.uint8)
        if positive:
            codes[:, :GROUP] = largest  # one group that lifts every sum of a positive operand
        else:
            codes |= rng.integers(0, 2, shape, dtype=np.uint8) << 3
        return codes, encode_e4m3(rng.integers(1, scale + 1, groups))
    if kind == "extreme":
        # zero, least subnormal, largest subnormal, least normal, 1, largest
        scales = rng.choice(np.array([0x00, 0x01, 0x07, 0x08, 0x38, 0x7E], dtype=np.uint8), groups)
        return rng.choice(np.array([0, 1, 7, 8, 9, 15], dtype=np.uint8), shape), scales
    if kind == "raw":
        scales = rng.integers(0, 127, groups, dtype=np.uint8)
        scales[rng.random(groups) < 0.1] = 0
    else:
        scales = rng.integers(0x30, 0x40, groups, dtype=np.uint8)
    return rng.integers(0, 16, shape, dtype=np.uint8), scales


def _plain(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> npt.NDArray[Any]:
    """Values of a kind that is quantised: integers or normal."""
    return integers(rng, shape) if kind == "integers" else rng.standard_normal(shape, dtype=np.float32)


def _exact_global_scale(rng: np.random.Generator) -> np.float32:
    return np.float32(2.0 ** int(rng.integers(-1, 2)))


def fc1_weights(rng: np.random.Generator, experts: int, hidden: int, intermediate: int, kind: str = "integers") -> Weights:
    """FC1's weights of ``kind``, one expert after another; see the module's docstring for the kinds.

    Raises:
        ProblemError: a shape that the contract refuses, or an unknown kind.
    """
    _check_kind(kind)
    shapes = weight_shapes("fc1", experts, hidden, intermediate)
    codes = np.empty(shapes["b.codes"], dtype=np.uint8)
    scales = np.empty((experts, 2 * intermediate, hidden // GROUP), dtype=np.uint8)
    global_scales = np.ones(experts, dtype=np.float32)
    for expert in range(experts):
        if kind in _CODED:
            up = _coded(rng, (intermediate, hidden), kind, hidden)
            gate = _coded(rng, (intermediate, hidden), kind, hidden, positive=kind == "exact")
            codes[expert] = pack_codes(interleave_up_gate(up[0], gate[0]))
            scales[expert] = interleave_up_gate(up[1], gate[1])
            if kind == "exact":
                global_scales[expert] = _exact_global_scale(rng)
        else:
            values = _plain(rng, (2 * intermediate, hidden), kind)
            codes[expert], scales[expert], global_scales[expert] = quantise_expert(values)
    return Weights(codes, tile_scales(scales.reshape(-1, hidden // GROUP)), global_scales)


def fc2_weights(rng: np.random.Generator, experts: int, hidden: int, intermediate: int, kind: str = "integers") -> Weights:
    """FC2's weights of ``kind``, one expert after another.

    Raises:
        ProblemError: as ``fc1_weights``.
    """
    _check_kind(kind)
    shapes = weight_shapes("fc2", experts, hidden, intermediate)
    codes = np.empty(shapes["b.codes"], dtype=np.uint8)
    scales = np.empty((hidden, experts * intermediate // GROUP), dtype=np.uint8)
    global_scales = np.ones(experts, dtype=np.float32)
    for expert in range(experts):
        own_codes = codes[:, expert * intermediate // 2 : (expert + 1) * intermediate // 2]
        own_scales = scales[:, expert * intermediate // GROUP : (expert + 1) * intermediate // GROUP]
        if kind in _CODED:
            plain, own_scales[:] = _coded(rng, (hidden, intermediate), kind, experts * intermediate)
            own_codes[:] = pack_codes(plain)
        else:
            own_codes[:], own_scales[:], global_scales[expert] = quantise_expert(_plain(rng, (hidden, intermediate), kind))
    return Weights(codes, tile_scales(scales), global_scales)


# ---- activations and alphas


def activations(rng: np.random.Generator, m: int, k: int, a_dtype: str, kind: str = "integers") -> tuple[Any, Any, np.float32]:
    """Activations of ``kind``: ``(bf16 bits uint16 [M, K], None, 1)``, or ``(codes [M, K/2], tiled scales, global scale)``.

    Kinds ``codes`` of bf16 are ``normal``; ``raw`` and ``extreme`` of bf16 are spread over 2**-20 … 2**20, zeros among them.

    Raises:
        ProblemError: an unknown kind or dtype.
    """
    _check_kind(kind)
    if a_dtype not in ("bf16", "nvfp4"):
        raise ProblemError(f"a_dtype={a_dtype!r}: use bf16 or nvfp4")
    one = np.float32(1)
    if kind == "exact" or (a_dtype == "nvfp4" and kind in ("raw", "extreme")):
        codes, scales = _coded(rng, (m, k), kind, k, positive=True)
        if a_dtype == "nvfp4":
            return pack_codes(codes), tile_scales(scales), one
        return bf16_bits(E2M1_VALUES[codes] * np.repeat(E4M3_VALUES[scales], GROUP, axis=1)), None, one
    values = _plain(rng, (m, k), "integers" if kind == "integers" else "normal")
    if a_dtype == "nvfp4":
        plain, scales, scale = quantise_expert(values)
        return plain, tile_scales(scales), scale
    if kind in ("raw", "extreme"):
        values = np.ldexp(values, rng.integers(-20, 21, (m, k))) * (rng.random((m, k)) >= 0.1)
    return bf16_bits(values.astype(np.float32)), None, one


def fc1_alpha(weights: Weights, a_scale: np.float32) -> Floats:
    """``alpha`` ``[E]``: a.global_scale · b.global_scale[e] in float32 (contract section 3)."""
    return (weights.global_scales * np.float32(a_scale)).astype(np.float32)


def alpha_post(rng: np.random.Generator, m: int, experts: int, kind: str = "integers", zeros: float = 0.0) -> Floats:
    """``alpha_post`` ``[M, E]``: uniform in [0.8, 1.2); a share ``zeros`` of it exactly 0.

    For exact data it is 2**-14, 2**-13 or 2**-12, which brings the large gates' outputs into the range of f16.
    """
    if kind == "exact":
        values = rng.choice(np.array([2.0**-14, 2.0**-13, 2.0**-12], dtype=np.float32), (m, experts))
    else:
        values = rng.uniform(0.8, 1.2, (m, experts)).astype(np.float32)
    values[rng.random((m, experts)) < zeros] = 0
    return values


def fc2_alpha(
    rng: np.random.Generator, m: int, weights: Weights, a_scale: np.float32, *, scalar: bool = False, kind: str = "integers", zeros: float = 0.0
) -> Floats:
    """FC2's ``alpha``: uniform in [0, 2) times a.global_scale · b.global_scale[e], as section 5's alpha2 is; ``[M, E]``, or ``[1]``.

    For exact data it is 1/2, 1 or 2. A share ``zeros`` of ``[M, E]`` is exactly 0.
    """
    experts = len(weights.global_scales)
    shape = (1,) if scalar else (m, experts)
    if kind == "exact":
        values = rng.choice(np.array([0.5, 1, 2], dtype=np.float32), shape)
    else:
        scales = weights.global_scales.max() if scalar else weights.global_scales
        values = (rng.uniform(0, 2, shape).astype(np.float32) * (scales * np.float32(a_scale))).astype(np.float32)
    if not scalar:
        values[rng.random(shape) < zeros] = 0
    return values


def poison_activations(arrays: dict[str, Any], rows: npt.ArrayLike, columns: slice = slice(None)) -> None:
    """Puts NaN into activations in place: all of ``columns`` of these tokens, through the scale bytes for NVFP4.

    Under an alpha of exactly 0 nothing of it may reach the output (contract sections 3 and 4).

    Args:
        arrays: by role: ``a`` (bf16 bits), or ``a.scales`` (tiled).
        columns: of K; NVFP4 takes whole groups of 16.
    """
    tokens = np.asarray(rows, dtype=np.int64)
    if "a" in arrays:
        arrays["a"][tokens, columns] = 0x7FC0
        return
    scales = arrays["a.scales"]
    start, stop, _ = columns.indices(scales.shape[1] * GROUP)
    if start % GROUP or stop % GROUP:
        raise ProblemError(f"columns {start} to {stop} cut a group: use multiples of {GROUP}")
    offsets = scale_offsets(tokens[:, None], np.arange(start // GROUP, stop // GROUP)[None, :], scales.shape[1])
    scales.reshape(-1)[offsets] = 0x7F
