"""Packing NVFP4 weights into the sm_90a layout ``sm90a-superblock/1`` (docs/weight_layouts.md). numpy only, one expert at a time.

A superblock is 64 weight rows x K 128 in 4,608 bytes: eight 512-byte chunks of codes, chunk c holding m16 block ``c // 2`` of K 64 half
``c % 2``, and a chunk of scales. Lane (g, t) owns bytes 16·(4g + t) … of a chunk. Packed weights are ``[E][row blocks][K blocks][4608]``.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import deinterleave_up_gate, padded_rows, untile_scales
from densemoe.runtime.nvfp4 import E4M3_VALUES, unpack_codes

__all__ = ["LAYOUT", "expert_bytes", "pack_expert", "pack_fc1", "pack_fc2", "unpack_expert"]

Bytes = npt.NDArray[np.uint8]

LAYOUT: Final = "sm90a-superblock/1"
ROWS: Final = 64
K: Final = 128
SUPERBLOCK_BYTES: Final = 4608
CODE_BYTES: Final = 4096

#: Bit of (sign, exponent high, exponent low, mantissa) of each of a half-word's four values: after shifts by 0, 3, 6 and a three-piece gather
#: each lands in bits 15, 8, 7, 6, which spell the value times 2**-126 as bf16.
_CODE_BITS: Final = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 11, 10, 13))


def _scale_table() -> Bytes:
    """S0E5M3 with bias 10 of every e4m3 byte that a weight may have; subnormals are normalised, 0 stays 0."""
    table = np.zeros(256, dtype=np.uint8)
    for byte in range(1, 127):
        mantissa, exponent = np.frexp(E4M3_VALUES[byte])  # value = mantissa · 2**exponent, mantissa in [0.5, 1)
        table[byte] = ((int(exponent) - 1 + 10) << 3) | int((mantissa * 2 - 1) * 8)
    return table


_SCALES: Final = _scale_table()
_SCALES_BACK: Final = {int(packed): byte for byte, packed in enumerate(_SCALES) if packed}


def _spread_table() -> npt.NDArray[np.uint16]:
    """``[value index, code]`` → the half-word's bits of that code."""
    table = np.zeros((4, 16), dtype=np.uint16)
    for index, (sign, high, low, mantissa) in enumerate(_CODE_BITS):
        for code in range(16):
            bits = ((code >> 3) << sign) | (((code >> 2) & 1) << high) | (((code >> 1) & 1) << low) | ((code & 1) << mantissa)
            table[index, code] = bits
    return table


_SPREAD: Final = _spread_table()


def row_order(op: str) -> npt.NDArray[np.int64]:
    """Row of the 64-row block that stands at physical row ``16·block + row`` of a superblock.

    FC2: (block b, g) and (b, g + 8) are rows 8g + 2b and 8g + 2b + 1, so that a lane ends with eight consecutive outputs. FC1: a block is 32 up
    rows (0–31) and their 32 gate rows (32–63); (b, g) is up row 4g + b and (b, g + 8) its gate row.
    """
    block, row = np.divmod(np.arange(ROWS), 16)
    g, lower = row % 8, row // 8
    if op == "fc2":
        return 8 * g + 2 * block + lower
    return 32 * lower + 4 * g + block


def expert_bytes(rows: int, k: int) -> int:
    """Packed bytes of one expert of ``rows`` weight rows and reduction length ``k`` (padded to a multiple of 128).

    Raises:
        ProblemError: rows or k is not a multiple of 64.
    """
    if rows <= 0 or rows % ROWS or k <= 0 or k % 64:
        raise ProblemError(f"weights of {rows} rows x {k}: use positive multiples of 64")
    return (rows // ROWS) * -(-k // K) * SUPERBLOCK_BYTES


def pack_expert(op: str, codes: Bytes, scales: Bytes, out: Bytes | None = None) -> Bytes:
    """Packs one expert.

    Args:
        op: ``fc1`` (rows interleaved up/gate in groups of 64) or ``fc2``.
        codes: uint8 ``[rows, K/2]``.
        scales: uint8 row-major ``[rows, K/16]``, e4m3, not negative and not NaN.
        out: where to write, uint8 ``[expert_bytes]``; made where absent.

    Returns:
        ``out``.

    Raises:
        ProblemError: shapes, dtypes or scales that the layout does not hold.
    """
    if codes.dtype != np.uint8 or scales.dtype != np.uint8 or codes.ndim != 2 or scales.ndim != 2:
        raise ProblemError(f"codes {codes.dtype}{list(codes.shape)}, scales {scales.dtype}{list(scales.shape)}: use two-dimensional uint8")
    rows, k = codes.shape[0], codes.shape[1] * 2
    if scales.shape != (rows, k // 16):
        raise ProblemError(f"scales of shape {scales.shape} beside codes of shape {codes.shape}: use ({rows}, {k // 16})")
    size = expert_bytes(rows, k)
    if np.any(scales >= 127):
        raise ProblemError("a weight scale is NaN or negative: e4m3 bytes 0x00 to 0x7E are allowed; the checkpoint is damaged")
    if out is None:
        out = np.empty(size, dtype=np.uint8)
    if out.shape != (size,) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ProblemError(f"out is {out.dtype}{list(out.shape)}: use contiguous uint8 [{size}]")
    values = unpack_codes(codes)
    if op == "fc1":
        values, scales = (np.concatenate([p.reshape(-1, 32, p.shape[1]) for p in deinterleave_up_gate(x)], axis=1) for x in (values, scales))
    else:
        values, scales = (x.reshape(-1, ROWS, x.shape[1]) for x in (values, scales))
    k_blocks = -(-k // K)
    order = row_order(op)
    padded_codes = np.zeros((values.shape[0], ROWS, k_blocks * K), dtype=np.uint8)
    padded_codes[:, :, :k] = np.where(np.repeat(scales, 16, axis=2) == 0, 0, values)[:, order]
    padded_scales = np.zeros((values.shape[0], ROWS, k_blocks * 8), dtype=np.uint8)
    padded_scales[:, :, : k // 16] = _SCALES[scales][:, order]
    blocks = out.reshape(values.shape[0], k_blocks, SUPERBLOCK_BYTES)
    # axes: row block R, m16 block b, lower half u, g; K block, half h, lane quarter t, step s, pair p (k 0/1 or 2/3), odd o
    split = padded_codes.reshape(-1, 4, 2, 8, k_blocks, 2, 4, 4, 2, 2)
    words = np.zeros((values.shape[0], k_blocks, 4, 2, 8, 4, 4, 2), dtype=np.uint16)  # R, K block, b, h, g, t, s, odd half
    for pair in range(2):
        for lower in range(2):
            part = split[:, :, lower, :, :, :, :, :, pair, :]  # R, b, g, K, h, t, s, o
            words |= _SPREAD[2 * pair + lower][part.transpose(0, 3, 1, 4, 2, 5, 6, 7)]
    blocks[:, :, :CODE_BYTES] = words.astype("<u2").reshape(values.shape[0], k_blocks, -1).view(np.uint8)
    # lane (g, t): [m16 block][half][row g, row g + 8], its scale group of a half is t
    grouped = padded_scales.reshape(-1, 4, 2, 8, k_blocks, 2, 4)  # R, b, u, g, K, h, t
    blocks[:, :, CODE_BYTES:] = grouped.transpose(0, 4, 3, 6, 1, 5, 2).reshape(values.shape[0], k_blocks, -1)
    return out


def unpack_expert(op: str, packed: Bytes, rows: int, k: int) -> tuple[Bytes, Bytes]:
    """(codes ``[rows, K]`` one a byte, row-major e4m3 scales ``[rows, K/16]``) of one packed expert: what ``pack_expert`` was given."""
    k_blocks, row_blocks = -(-k // K), rows // ROWS
    blocks = packed.reshape(row_blocks, k_blocks, SUPERBLOCK_BYTES)
    words = np.ascontiguousarray(blocks[:, :, :CODE_BYTES]).view("<u2").reshape(row_blocks, k_blocks, 4, 2, 8, 4, 4, 2)
    split = np.zeros((row_blocks, 4, 2, 8, k_blocks, 2, 4, 4, 2, 2), dtype=np.uint8)
    for pair in range(2):
        for lower in range(2):
            sign, high, low, mantissa = _CODE_BITS[2 * pair + lower]
            code = ((words >> sign) & 1) << 3 | ((words >> high) & 1) << 2 | ((words >> low) & 1) << 1 | ((words >> mantissa) & 1)
            split[:, :, lower, :, :, :, :, :, pair, :] = code.transpose(0, 2, 4, 1, 3, 5, 6, 7)
    back = np.zeros(256, dtype=np.uint8)
    for spelled, byte in _SCALES_BACK.items():
        back[spelled] = byte
    grouped = np.ascontiguousarray(blocks[:, :, CODE_BYTES:]).reshape(row_blocks, k_blocks, 8, 4, 4, 2, 2)
    scales = back[grouped.transpose(0, 4, 6, 2, 1, 5, 3).reshape(row_blocks, ROWS, k_blocks * 8)]
    codes = split.reshape(row_blocks, ROWS, k_blocks * K)
    inverse = np.argsort(row_order(op))
    codes, scales = codes[:, inverse, :k], scales[:, inverse, : k // 16]
    if op == "fc1":
        return tuple(_interleave_block(x) for x in (codes, scales))  # type: ignore[return-value]
    return codes.reshape(rows, k), scales.reshape(rows, k // 16)


def _interleave_block(x: Bytes) -> Bytes:
    """``[blocks, 32 up + 32 gate, C]`` as rows interleaved up/gate in groups of 64."""
    up, gate = (x[:, part].reshape(-1, 64, x.shape[2]) for part in (slice(0, 32), slice(32, 64)))
    return np.stack([up, gate], axis=1).reshape(-1, x.shape[2])


def pack_fc1(codes: Bytes, scales: Bytes, out: Bytes | None = None) -> Bytes:
    """Packs FC1's weights expert by expert.

    Args:
        codes: uint8 ``[E, 2I, H/2]``, rows of an expert interleaved up/gate in groups of 64.
        scales: uint8, tiled over all ``E·2I`` rows: ``[⌈E·2I/128⌉·128, H/16]``.
        out: uint8 ``[E · expert_bytes]``.
    """
    if codes.ndim != 3:
        raise ProblemError(f"codes of shape {codes.shape}: use [E, 2I, H/2]")
    experts, rows, k = codes.shape[0], codes.shape[1], codes.shape[2] * 2
    size = expert_bytes(rows, k)
    if scales.shape != (padded_rows(experts * rows), k // 16):
        raise ProblemError(f"scales of shape {scales.shape}: use ({padded_rows(experts * rows)}, {k // 16})")
    if out is None:
        out = np.empty(experts * size, dtype=np.uint8)
    for expert in range(experts):  # rows are a multiple of 128 (I % 64 == 0), so an expert is whole scale tiles
        plain = untile_scales(scales[expert * rows : (expert + 1) * rows], rows)
        pack_expert("fc1", codes[expert], plain, out[expert * size : (expert + 1) * size])
    return out


def pack_fc2(codes: Bytes, scales: Bytes, experts: int, out: Bytes | None = None) -> Bytes:
    """Packs FC2's weights expert by expert.

    Args:
        codes: uint8 ``[H, E·I/2]``, columns concatenated expert by expert.
        scales: uint8 tiled ``[⌈H/128⌉·128, E·I/16]``.
        experts: E.
        out: uint8 ``[E · expert_bytes]``.
    """
    if codes.ndim != 2 or experts < 1 or codes.shape[1] * 2 % (64 * experts):
        raise ProblemError(f"codes of shape {codes.shape} for {experts} experts: use [H, E·I/2] with I a multiple of 64")
    rows, intermediate = codes.shape[0], codes.shape[1] * 2 // experts
    size = expert_bytes(rows, intermediate)
    if scales.shape != (padded_rows(rows), experts * intermediate // 16):
        raise ProblemError(f"scales of shape {scales.shape}: use ({padded_rows(rows)}, {experts * intermediate // 16})")
    if out is None:
        out = np.empty(experts * size, dtype=np.uint8)
    half, groups = intermediate // 2, intermediate // 16
    # a column tile of the tiled order is 4 scale columns: 512 contiguous bytes a row tile, so an expert is a slice of column tiles
    tiles = scales.reshape(padded_rows(rows) // 128, -1, 512)
    for expert in range(experts):
        own = np.ascontiguousarray(tiles[:, expert * groups // 4 : (expert + 1) * groups // 4]).reshape(padded_rows(rows), groups)
        plain = untile_scales(own, rows)
        pack_expert("fc2", np.ascontiguousarray(codes[:, expert * half : (expert + 1) * half]), plain, out[expert * size : (expert + 1) * size])
    return out
