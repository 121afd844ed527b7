"""NVFP4 tensors on the host: number formats, quantisation and dequantisation (contract section 2). numpy only.

A tensor ``X[R, K]`` is ``codes`` (uint8 ``[R, K/2]``, two e2m1 values a byte, the low nibble the even k), ``scales`` (e4m3 bytes, one per
16 consecutive k, in the 128x4 tiled order of ``layout``) and ``global_scale`` (float32): ``x = e2m1(code) · e4m3(scale) · global_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import GROUP, tile_scales, untile_scales

__all__ = [
    "E2M1_VALUES",
    "E4M3_VALUES",
    "GROUP",
    "Nvfp4Tensor",
    "bf16_bits",
    "bf16_values",
    "convert",
    "encode_e2m1",
    "encode_e4m3",
    "global_scale_of",
    "pack_codes",
    "quantise",
    "quantise_expert",
    "quantise_rows",
    "unpack_codes",
    "widen",
]

Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

LARGEST_E2M1: Final = 6.0
LARGEST_E4M3: Final = 448.0
ONE_SIXTH: Final = np.float32(1 / 6)
_ELEMENTS_AT_ONCE: Final = 2**17  # quantised at once: their temporaries stay in a core's cache

_MAGNITUDES: Final = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
#: Value of each 4-bit code, sign in bit 3.
E2M1_VALUES: Final = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def _e4m3_table() -> npt.NDArray[np.float64]:
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7))
    value = np.where((byte & 127) == 127, np.nan, value)
    return np.where(byte >= 128, -value, value)


#: Value of each e4m3 (fn) byte: bias 7, no infinities, NaN at 0x7F and 0xFF.
E4M3_VALUES: Final = _e4m3_table()


def _encode(x: npt.NDArray[np.float64], table: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Index of the value of ``table`` (ascending magnitudes) nearest to ``|x|``, ties to the even index, saturating."""
    magnitude = np.minimum(np.abs(x), table[-1])
    upper = np.clip(np.searchsorted(table, magnitude), 1, len(table) - 1)
    low, high = magnitude - table[upper - 1], table[upper] - magnitude
    return np.where((high < low) | ((high == low) & (upper % 2 == 0)), upper, upper - 1)


def encode_e2m1(x: npt.ArrayLike) -> Bytes:
    """e2m1 codes of ``x``: nearest, ties to even, saturating at 6; the sign of zero is kept. NaN becomes 0."""
    values = np.asarray(x)
    magnitude = np.abs(values)
    # a midpoint goes to the even code: up from 0.75, 1.75 and 3.5, down from 0.25, 1.25, 2.5 and 5
    code = (magnitude > 0.25).astype(np.uint8)
    for midpoint, up in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        code += (magnitude >= midpoint) if up else (magnitude > midpoint)
    return code | (np.signbit(values).astype(np.uint8) << 3)


def encode_e4m3(x: npt.ArrayLike) -> Bytes:
    """e4m3 bytes of ``x``: nearest, ties to even, saturating at 448; NaN stays NaN."""
    values = np.asarray(x, dtype=np.float64)
    finite = np.nan_to_num(values, nan=0.0, posinf=LARGEST_E4M3, neginf=-LARGEST_E4M3)
    byte = _encode(finite, E4M3_VALUES[:127]) | (np.signbit(finite).astype(np.int64) << 7)
    return np.where(np.isnan(values), 127, byte).astype(np.uint8)


def bf16_bits(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """bf16 bit patterns of float32 or float64 values: rounded once, to nearest, ties to even; overflow gives Inf; NaN stays NaN."""
    values = np.asarray(x)
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32).astype(np.int64)
    if values.dtype == np.float64:
        # round to odd on the way through float32, so that the second rounding sees on which side of a tie the value lies
        with np.errstate(invalid="ignore"):
            error = np.abs(values) - np.abs(single.astype(np.float64))
        odd = bits & 1
        bits = np.where((error < 0) & (odd == 0), bits - 1, np.where((error > 0) & (odd == 0), bits + 1, bits))
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded).astype(np.uint16)


def bf16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """float32 values of bf16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


_E5M2_VALUES: Final = (np.arange(256, dtype="<u2") << 8).view(np.float16).astype(np.float64)  # the upper byte of an f16
LARGEST_E5M2: Final = 57344.0


def convert(y: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 values converted once to a plain output dtype (contract section 3, step 6): nearest, ties to even.

    Returns:
        ``f32``: float32; ``f16``: float16, overflow to Inf; ``bf16``: uint16 bit patterns, overflow to Inf; ``e4m3``, ``e5m2``: uint8 bit
        patterns, saturating.

    Raises:
        ProblemError: another dtype.
    """
    if dtype == "f32":
        return y
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return y.astype(np.float16)
    if dtype == "bf16":
        return bf16_bits(y)
    if dtype == "e4m3":
        return encode_e4m3(y)
    if dtype == "e5m2":
        finite = np.nan_to_num(y.astype(np.float64), nan=0.0, posinf=LARGEST_E5M2, neginf=-LARGEST_E5M2)
        byte = _encode(finite, _E5M2_VALUES[:124]) | (np.signbit(finite).astype(np.int64) << 7)
        return np.where(np.isnan(y), 0x7F, byte).astype(np.uint8)
    raise ProblemError(f"dtype={dtype!r}: use f32, f16, bf16, e4m3 or e5m2")


def widen(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """float64 of what ``convert`` gives, or of the same values in ml_dtypes' types.

    Raises:
        ProblemError: uint8 or uint16 of a dtype that is not spelled so.
    """
    tables = {"e4m3": E4M3_VALUES, "e5m2": _E5M2_VALUES}
    if array.dtype == np.uint16 and dtype == "bf16":
        return bf16_values(array).astype(np.float64)
    if array.dtype == np.uint8 and dtype in tables:
        return np.asarray(tables[dtype][array], dtype=np.float64)
    if array.dtype.kind in "ui":
        raise ProblemError(f"{dtype} as {array.dtype}: use the dtype itself, uint16 bits for bf16 or uint8 bits for e4m3 and e5m2")
    return array.astype(np.float64)


def pack_codes(codes: Bytes) -> Bytes:
    """Bytes ``[…, K/2]`` of codes ``[…, K]``, the even k in the low nibble."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def unpack_codes(packed: Bytes) -> Bytes:
    """Codes ``[…, K]`` of bytes ``[…, K/2]``."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes


@dataclass(frozen=True)
class Nvfp4Tensor:
    """A two-dimensional NVFP4 tensor in the interchange layout.

    Attributes:
        codes: uint8 ``[R, K/2]``.
        scales: uint8 ``[⌈R/128⌉·128, K/16]`` in the tiled order; padding is 0.
        global_scale: float32 dequantisation factor.
    """

    codes: Bytes
    scales: Bytes
    global_scale: np.float32

    @property
    def rows(self) -> int:
        """R."""
        return int(self.codes.shape[0])

    @property
    def columns(self) -> int:
        """K."""
        return int(self.codes.shape[1]) * 2

    def values(self, rows: slice = slice(None)) -> npt.NDArray[np.float64]:
        """``e2m1(code) · e4m3(scale)`` of these rows, without the global scale: float64 ``[rows, K]``, exact."""
        scales = E4M3_VALUES[untile_scales(self.scales, self.rows)[rows]]
        with np.errstate(invalid="ignore"):
            return E2M1_VALUES[unpack_codes(self.codes[rows])] * np.repeat(scales, GROUP, axis=1)

    def dequantise(self, dtype: str = "f64", rows: slice = slice(None)) -> npt.NDArray[Any]:
        """``e2m1(code) · e4m3(scale) · global_scale``: ``f64`` (exact), or ``f32`` or ``bf16`` (uint16 bit patterns), each rounded once.

        Raises:
            ProblemError: another dtype.
        """
        exact = self.values(rows) * np.float64(self.global_scale)
        if dtype == "f64":
            return exact
        if dtype == "f32":
            return exact.astype(np.float32)
        if dtype == "bf16":
            return bf16_bits(exact)
        raise ProblemError(f"dtype={dtype!r}: use f64, f32 or bf16")


def _group_amax(groups: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Largest magnitude along a last dimension of 16; NaN stays NaN."""
    largest = np.abs(groups)
    while largest.shape[-1] > 1:
        half = largest.shape[-1] // 2
        largest = np.maximum(largest[..., :half], largest[..., half:])
    return largest[..., 0]


def _quantise_block(values: npt.NDArray[np.float32], multiplier: np.float32) -> tuple[Bytes, Bytes]:
    groups = values.reshape(values.shape[0], -1, GROUP)
    with np.errstate(all="ignore"):
        scales = encode_e4m3((_group_amax(groups) * ONE_SIXTH) * multiplier)
        factor = multiplier * (np.float32(1) / E4M3_VALUES[scales].astype(np.float32))
        codes = encode_e2m1(groups * factor[:, :, None])
    codes[scales == 0] = 0
    return codes.reshape(values.shape), scales


def quantise_rows(x: npt.ArrayLike, multiplier: np.float32) -> tuple[Bytes, Bytes]:
    """Codes and scales of ``x[R, K]`` in the contract's order of float32 operations (section 2).

    Args:
        x: anything that float32 holds exactly, else it is rounded to float32 first.
        multiplier: float32, 1 / global_scale.

    Returns:
        uint8 codes ``[R, K]`` (one a byte) and e4m3 scales ``[R, K/16]`` (row-major).

    Raises:
        ProblemError: not two-dimensional, or K is not a multiple of 16.
    """
    values = np.asarray(x)
    if values.ndim != 2 or values.shape[1] % GROUP:
        raise ProblemError(f"cannot quantise shape {list(values.shape)}: give two dimensions, the last a multiple of {GROUP}")
    rows, k = values.shape
    codes, scales = np.empty((rows, k), dtype=np.uint8), np.empty((rows, k // GROUP), dtype=np.uint8)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(k, 1))
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        block = np.ascontiguousarray(values[part], dtype=np.float32)
        codes[part], scales[part] = _quantise_block(block, np.float32(multiplier))
    return codes, scales


def global_scale_of(amax: float | np.floating[Any]) -> np.float32:
    """``amax / (448 · 6)`` in float32, and 1 where amax is 0 (contract section 2).

    Raises:
        ProblemError: amax is not finite, or so small that the multiplier 1 / global_scale overflows float32.
    """
    largest = np.float32(amax)
    if not np.isfinite(largest):
        raise ProblemError(f"amax = {largest}: a global scale needs finite values; remove NaN and Inf, or give global_scale")
    if largest == 0:
        return np.float32(1)
    scale = np.float32(largest / np.float32(LARGEST_E4M3 * LARGEST_E2M1))
    with np.errstate(divide="ignore", over="ignore"):
        if not np.isfinite(np.float32(1) / scale):
            raise ProblemError(f"amax = {largest}: 1 / (amax / 2688) overflows float32; scale the tensor up, or give global_scale")
    return scale


def _checked_scale(global_scale: float | np.floating[Any]) -> np.float32:
    scale = np.float32(global_scale)
    with np.errstate(all="ignore"):
        usable = np.isfinite(scale) and scale > 0 and np.isfinite(np.float32(1) / scale)
    if not usable:
        raise ProblemError(f"global_scale={global_scale}: use a positive float32 whose reciprocal is finite")
    return scale


def _amax(values: npt.NDArray[Any]) -> np.float32:
    return np.float32(max(np.max(values, initial=0), -np.min(values, initial=0)))


def quantise_expert(x: npt.ArrayLike, global_scale: float | None = None) -> tuple[Bytes, Bytes, np.float32]:
    """As ``quantise`` for one expert of a weight tensor, whose scales are tiled later, together with the other experts'.

    Returns:
        Packed codes ``[R, K/2]``, row-major scales ``[R, K/16]`` and the expert's global scale.

    Raises:
        ProblemError: as ``quantise``.
    """
    values = np.asarray(x)
    if values.ndim != 2 or values.shape[1] % 64 or values.shape[1] == 0:
        raise ProblemError(f"cannot quantise shape {list(values.shape)}: give two dimensions, the last a positive multiple of 64")
    scale = global_scale_of(_amax(values)) if global_scale is None else _checked_scale(global_scale)
    codes, scales = quantise_rows(values, np.float32(1) / scale)
    return pack_codes(codes), scales, scale


def quantise(x: npt.ArrayLike, global_scale: float | None = None) -> Nvfp4Tensor:
    """The NVFP4 tensor of ``x[R, K]``.

    Args:
        global_scale: the dequantisation factor; without one it is ``amax / (448 · 6)``, and 1 where amax is 0.

    Raises:
        ProblemError: not two-dimensional, K is not a multiple of 64, or no usable global scale.
    """
    codes, scales, scale = quantise_expert(x, global_scale)
    return Nvfp4Tensor(codes, tile_scales(scales), scale)
