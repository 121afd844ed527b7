"""NVFP4 tensors on the host: number formats and quantisation (contract section 2). numpy only.

A tensor ``X[R, K]`` is ``codes`` (uint8 ``[R, K/2]``, two e2m1 values a byte, the low nibble the even k), ``scales`` (e4m3 bytes, one per 16
consecutive k, in the 128x4 tiled order of ``layout``) and ``global_scale`` (float32): ``x = e2m1(code) · e4m3(scale) · global_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import tile_scales, untile_scales

__all__ = [
    "E2M1_VALUES",
    "E4M3_VALUES",
    "GROUP",
    "Nvfp4Tensor",
    "bf16_bits",
    "bf16_values",
    "encode_e2m1",
    "encode_e4m3",
    "pack_codes",
    "quantise",
    "quantise_rows",
    "unpack_codes",
]

Floats = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

GROUP: Final = 16
LARGEST_E2M1: Final = 6.0
LARGEST_E4M3: Final = 448.0

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
    """e2m1 codes of ``x``: nearest, ties to even, saturating at 6; the sign of zero is kept. NaN saturates."""
    values = np.nan_to_num(np.asarray(x, dtype=np.float64), nan=LARGEST_E2M1, posinf=LARGEST_E2M1, neginf=-LARGEST_E2M1)
    return (_encode(values, _MAGNITUDES) | (np.signbit(values).astype(np.int64) << 3)).astype(np.uint8)


def encode_e4m3(x: npt.ArrayLike) -> Bytes:
    """e4m3 bytes of ``x``: nearest, ties to even, saturating at 448; NaN stays NaN."""
    values = np.asarray(x, dtype=np.float64)
    finite = np.nan_to_num(values, nan=0.0, posinf=LARGEST_E4M3, neginf=-LARGEST_E4M3)
    byte = _encode(finite, E4M3_VALUES[:127]) | (np.signbit(finite).astype(np.int64) << 7)
    return np.where(np.isnan(values), 127, byte).astype(np.uint8)


def bf16_bits(x: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """bf16 bit patterns of float32 values: nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(x, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def bf16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """float32 values of bf16 bit patterns."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


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
        """``e2m1(code) · e4m3(scale)`` of these rows, without the global scale: float64, exact."""
        scales = E4M3_VALUES[untile_scales(self.scales, self.rows)[rows]]
        with np.errstate(invalid="ignore"):
            return E2M1_VALUES[unpack_codes(self.codes[rows])] * np.repeat(scales, GROUP, axis=1)


def quantise_rows(x: npt.ArrayLike, multiplier: np.float32) -> tuple[Bytes, Bytes]:
    """Codes and scales of ``x[R, K]`` in the contract's order of float32 operations (section 2).

    Returns:
        codes ``[R, K]`` (one a byte) and scales ``[R, K/16]`` (row-major).
    """
    values = np.asarray(x, dtype=np.float32)
    groups = values.reshape(values.shape[0], -1, GROUP)
    with np.errstate(all="ignore"):
        amax = np.max(np.abs(groups), axis=2)
        scales = encode_e4m3((amax * np.float32(1 / 6)) * multiplier)
        factor = multiplier * (np.float32(1) / E4M3_VALUES[scales].astype(np.float32))
        codes = encode_e2m1(groups * factor[:, :, None])
    codes[scales == 0] = 0
    return codes.reshape(values.shape), scales


def quantise(x: npt.ArrayLike, global_scale: float | None = None) -> Nvfp4Tensor:
    """The NVFP4 tensor of ``x[R, K]``.

    Args:
        global_scale: the dequantisation factor; without one it is ``amax / (448 · 6)``, and 1 where amax is 0.

    Raises:
        ProblemError: not two-dimensional, or K is not a multiple of 64.
    """
    values = np.asarray(x, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] % 64:
        raise ProblemError(f"cannot quantise shape {values.shape}: give two dimensions, the last a multiple of 64")
    if global_scale is None:
        amax = np.float32(np.max(np.abs(values), initial=0.0))
        scale = np.float32(1) if amax == 0 else amax / np.float32(LARGEST_E4M3 * LARGEST_E2M1)
    else:
        scale = np.float32(global_scale)
    codes, scales = quantise_rows(values, np.float32(1) / scale)
    return Nvfp4Tensor(pack_codes(codes), tile_scales(scales), scale)
