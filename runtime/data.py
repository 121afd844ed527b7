"""The one generator of test data: cases of the contract's section 9 and seeded tensors for them. numpy only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.layout import interleave_up_gate, tile_scales
from densemoe.runtime.nvfp4 import GROUP, bf16_bits, pack_codes, quantise_rows

__all__ = ["LAYERS", "Fc1Weights", "Fc2Weights", "fc1_grid", "fc1_weights", "fc2_grid", "fc2_weights", "integers", "layers"]

Bytes = npt.NDArray[np.uint8]

LARGEST: Final = 448.0 * 6.0
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


_CODED: Final = ("exact", "raw", "codes")  # kinds that are codes and scales from the start, under a global scale of 1


def fc1_grid() -> Iterator[tuple[int, int, int, int, bool]]:
    """(E, 2I, M, H, alpha_post) of the 384 FC1 cases, weights changing slowest."""
    for experts, rows, hidden in itertools.product((1, 4, 8, 32), (256, 512, 1024, 2816), (256, 512, 2048)):
        for m, post in itertools.product((1, 8, 127, 256), (True, False)):
            yield experts, rows, m, hidden, post


def fc2_grid() -> Iterator[tuple[int, int, int, int]]:
    """(E, I, M, H) of the 180 FC2 cases, weights changing slowest."""
    for experts, intermediate, hidden in itertools.product((1, 4, 8, 32, 256), (256, 512, 1024), (256, 512, 2048)):
        for m in (1, 8, 127, 256):
            yield experts, intermediate, m, hidden


def layers() -> Iterator[tuple[int, int, int, int, int]]:
    """(E, k, H, I, M) of the layer cases."""
    for shape in LAYERS:
        for m in (1, 8):
            yield (*shape, m)


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Integers in [-5, 5), the data of section 9."""
    return rng.integers(-5, 5, shape).astype(np.float32)


@dataclass(frozen=True)
class Fc1Weights:
    """FC1's weights in the interchange layout.

    Attributes:
        codes: uint8 ``[E, 2I, H/2]``; scales: uint8 tiled ``[E·2I, H/16]``; global_scales: float32 ``[E]``.
    """

    codes: Bytes
    scales: Bytes
    global_scales: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fc2Weights:
    """FC2's weights in the interchange layout.

    Attributes:
        codes: uint8 ``[H, E·I/2]``; scales: uint8 tiled ``[⌈H/128⌉·128, E·I/16]``; global_scales: float32 ``[E]``.
    """

    codes: Bytes
    scales: Bytes
    global_scales: npt.NDArray[np.float32]


def _quantised(values: npt.NDArray[np.float32]) -> tuple[Bytes, Bytes, np.float32]:
    amax = np.float32(np.max(np.abs(values), initial=0.0))
    scale = np.float32(1) if amax == 0 else amax / np.float32(LARGEST)
    codes, scales = quantise_rows(values, np.float32(1) / scale)
    return pack_codes(codes), scales, scale


def fc1_weights(rng: np.random.Generator, experts: int, hidden: int, intermediate: int, kind: str = "integers") -> Fc1Weights:
    """Weights of ``kind``: ``integers`` (section 9), ``normal``, ``exact`` (rule 1: products are multiples of 1/4, gates not negative), ``raw``
    (random codes under random scales, subnormal and zero ones included), ``codes`` (random codes under scales from 0.5 to 1.875: quick to
    make at the size of a model)."""
    codes, scales, globals_ = [], [], []
    for _ in range(experts):
        parts = []
        for gate in (False, True):
            parts.append(_expert(rng, intermediate, hidden, kind, positive=gate))
        if kind in _CODED:
            codes.append(pack_codes(interleave_up_gate(parts[0][0], parts[1][0])))
            scales.append(interleave_up_gate(parts[0][1], parts[1][1]))
            globals_.append(np.float32(1))
        else:
            c, s, g = _quantised(interleave_up_gate(parts[0][0], parts[1][0]))
            codes.append(c)
            scales.append(s)
            globals_.append(g)
    return Fc1Weights(np.stack(codes), tile_scales(np.concatenate(scales)), np.array(globals_, dtype=np.float32))


def fc2_weights(rng: np.random.Generator, experts: int, hidden: int, intermediate: int, kind: str = "integers") -> Fc2Weights:
    """As ``fc1_weights``; an expert is ``[H, I]``."""
    codes, scales, globals_ = [], [], []
    for _ in range(experts):
        part = _expert(rng, hidden, intermediate, kind, positive=False)
        if kind in _CODED:
            c, s, g = pack_codes(part[0]), part[1], np.float32(1)
        else:
            c, s, g = _quantised(part[0])
        codes.append(c)
        scales.append(s)
        globals_.append(g)
    return Fc2Weights(np.concatenate(codes, axis=1), tile_scales(np.concatenate(scales, axis=1)), np.array(globals_, dtype=np.float32))


def _expert(rng: np.random.Generator, rows: int, columns: int, kind: str, *, positive: bool) -> tuple[Any, Any]:
    """(values, None), or (codes one a byte, row-major scale bytes) for kinds that fix them."""
    if kind == "integers":
        return integers(rng, (rows, columns)), None
    if kind == "normal":
        return rng.standard_normal((rows, columns), dtype=np.float32), None
    if kind == "exact":
        codes = rng.integers(0, 3, (rows, columns), dtype=np.uint8)  # 0, 0.5, 1
        if not positive:
            codes |= rng.integers(0, 2, (rows, columns), dtype=np.uint8) << 3
        return codes, np.full((rows, columns // GROUP), 0x38, dtype=np.uint8)  # e4m3 1.0
    if kind == "raw":
        scales = rng.integers(0, 127, (rows, columns // GROUP), dtype=np.uint8)
        scales[rng.random(scales.shape) < 0.1] = 0
        return rng.integers(0, 16, (rows, columns), dtype=np.uint8), scales
    if kind == "codes":
        scales = rng.integers(0x30, 0x40, (rows, columns // GROUP), dtype=np.uint8)
        return rng.integers(0, 16, (rows, columns), dtype=np.uint8), scales
    raise ValueError(f"kind {kind!r}: use integers, normal, exact, raw or codes")


def activations(rng: np.random.Generator, m: int, k: int, a_dtype: str, kind: str = "integers") -> tuple[Any, Any, np.float32]:
    """``(bf16 bits [M, K], None, 1)``, or ``(codes [M, K/2], tiled scales, global scale)``; kind ``exact`` is positive halves up to 1."""
    if kind == "exact":
        values = rng.integers(0, 3, (m, k)).astype(np.float32) / 2
        if a_dtype == "nvfp4":
            return pack_codes((values * 2).astype(np.uint8)), tile_scales(np.full((m, k // GROUP), 0x38, dtype=np.uint8)), np.float32(1)
    elif kind in ("normal", "codes"):
        values = rng.standard_normal((m, k), dtype=np.float32)
    else:
        values = integers(rng, (m, k))
    if a_dtype == "bf16":
        return bf16_bits(values), None, np.float32(1)
    codes, scales, scale = _quantised(values)
    return codes, tile_scales(scales), scale
