"""Packing NVFP4 weights into the layouts that kernels read (docs/weight_layouts.md). numpy only.

``sm100-interchange/1`` is the contract's own layout in one buffer: the codes, then the tiled scales. Packing it is checking it; nothing moves
inside an expert. The rest of this module is ``sm90a-superblock/2``.

A superblock is 64 weight rows x K 128 in 4,608 bytes: eight 512-byte chunks of codes, chunk c holding m16 block ``c // 2`` of K 64 half
``c % 2``, and a chunk of scales. Lane (g, t) = (lane // 4, lane % 4) owns bytes 16·lane … 16·lane + 15 of a chunk. Packed weights are
``[E][row blocks][K blocks][4608]``; K is padded per expert to a multiple of 128 with zero codes and zero scales.

Memory: beside the caller's arrays packing takes a few megabytes and one expert's scales in row-major order; with ``out`` nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import SCALE_TILE_BYTES, TILE_ROWS, padded_rows, scale_offsets, untile_scales, weight_shapes
from densemoe.runtime.nvfp4 import E4M3_VALUES, GROUP, pack_codes

__all__ = [
    "INTERCHANGE_LAYOUT",
    "LAYOUT",
    "SUPERBLOCK_BYTES",
    "expert_bytes",
    "expert_stride",
    "fc1_expert",
    "fc2_expert",
    "interchange_bytes",
    "interchange_parts",
    "pack",
    "pack_expert",
    "pack_fc1",
    "pack_fc2",
    "pack_interchange",
    "packed_bytes",
    "row_order",
    "unpack_expert",
    "unpack_fc1",
    "unpack_fc2",
]

Bytes = npt.NDArray[np.uint8]

LAYOUT: Final = "sm90a-superblock/2"
INTERCHANGE_LAYOUT: Final = "sm100-interchange/1"
ROWS: Final = 64
K: Final = 128
CODE_BYTES: Final = ROWS * K // 2
SCALE_BYTES: Final = ROWS * K // GROUP
SUPERBLOCK_BYTES: Final = CODE_BYTES + SCALE_BYTES

#: Rotations to the left after which a lane's pair of code words spells values as bf16 times 2**-126 at bits 15, 8, 7 and 6 of each half-word, of the
#: first word, then of the second: (row g, k 0/1), (row g + 8, k 0/1) and (row g, k 2/3). For (row g + 8, k 2/3) of either word the bits that these
#: leave over are joined, and rotated by LAST_ROTATIONS.
ROTATIONS: Final = (0, 4, 10)
LEFT_OVER: Final = 0x06030603  # bits of the first word; the second word's stand 2 bits further left in the joined word
BESIDE: Final = 2
LAST_ROTATIONS: Final = (6, 12)
VALUE_BITS: Final = (15, 8, 7, 6)  # of sign, exponent high, exponent low, mantissa
SCALE_BIAS: Final = 10  # of S0E5M3: 2**-9, the least e4m3 value, is exponent 1
FIRST_REFUSED_SCALE: Final = 0x7F  # NaN; the negative bytes follow
_ROWS_AT_ONCE_BYTES: Final = 2**20  # of codes: their temporaries stay in a core's cache


def _scale_table() -> Bytes:
    """S0E5M3 of every e4m3 byte that a weight may have; subnormals are normalised, 0 stays 0."""
    table = np.zeros(256, dtype=np.uint8)
    for byte in range(1, FIRST_REFUSED_SCALE):
        mantissa, exponent = np.frexp(E4M3_VALUES[byte])  # value = mantissa · 2**exponent, mantissa in [0.5, 1)
        table[byte] = ((int(exponent) - 1 + SCALE_BIAS) << 3) | int((mantissa * 2 - 1) * 8)
    return table


def _code_bits() -> npt.NDArray[np.int64]:
    """Where the bits of a pair of code words' sixteen values lie: ``[word, value a0 … a3, odd k, bit]`` of 64, the first word low."""
    places = np.empty((2, 4, 2, 4), dtype=np.int64)
    joined = [bit if LEFT_OVER >> bit & 1 else 32 + bit - BESIDE for bit in range(32)]  # what a bit of the joined word is
    for word in range(2):
        for odd in range(2):
            for place, target in enumerate(VALUE_BITS):
                for value, rotation in enumerate(ROTATIONS):
                    places[word, value, odd, place] = 32 * word + (target + 16 * odd - rotation) % 32
                places[word, 3, odd, place] = joined[(target + 16 * odd - LAST_ROTATIONS[word]) % 32]
    return places


def _spread_tables() -> npt.NDArray[np.uint64]:
    """``[lower row, word, two bytes of codes]`` → the bits of a pair of words that these four codes (k 0, 1, 2, 3 from the low nibble up) fill."""
    four = np.arange(2**16, dtype=np.uint64)
    tables = np.zeros((2, 2, 2**16), dtype=np.uint64)
    for lower, word, k in itertools.product(range(2), range(2), range(4)):
        code = (four >> np.uint64(4 * k)) & np.uint64(15)
        for bit, target in zip((3, 2, 1, 0), CODE_BITS[word, 2 * (k // 2) + lower, k % 2], strict=True):
            tables[lower, word] |= ((code >> np.uint64(bit)) & np.uint64(1)) << np.uint64(target)
    return tables


CODE_BITS: Final = _code_bits()
_SCALES: Final = _scale_table()
_SCALES_BACK: Final = np.zeros(256, dtype=np.uint8)
_SCALES_BACK[_SCALES[1:FIRST_REFUSED_SCALE]] = np.arange(1, FIRST_REFUSED_SCALE)
_SPREAD: Final = _spread_tables()


def row_order(op: str) -> npt.NDArray[np.int64]:
    """Row of the 64-row block that stands at physical row ``16·block + row`` of a superblock: int64 ``[64]``.

    FC2: (block b, g) and (b, g + 8) are rows 8g + 2b and 8g + 2b + 1, so that a lane ends with eight consecutive outputs. FC1: a block is
    32 up rows (0–31) and their 32 gate rows (32–63); (b, g) is up row 4g + b and (b, g + 8) its gate row.

    Raises:
        ProblemError: ``op`` is neither ``fc1`` nor ``fc2``.
    """
    block, row = np.divmod(np.arange(ROWS), 16)
    g, lower = row % 8, row // 8
    if op == "fc2":
        return 8 * g + 2 * block + lower
    if op == "fc1":
        return 32 * lower + 4 * g + block
    raise ProblemError(f"op={op!r}: use fc1 or fc2")


def _interchange_rows(op: str, rows: int) -> npt.NDArray[np.int64]:
    """Row of an expert in the interchange layout that stands at physical row 16b + 8u + g of superblock R: int64 ``[R, b, u, g]``."""
    first = np.arange(rows // ROWS)[:, None]
    order = row_order(op)[None, :]
    if op == "fc2":
        table = first * ROWS + order
    else:  # superblock R holds output columns 32R … 32R + 31; column j is up row (j // 64)·128 + j % 64, its gate row stands 64 below
        column = first * 32 + order % 32
        table = column // 64 * 128 + column % 64 + order // 32 * 64
    return table.reshape(-1, 4, 2, 8)


def expert_bytes(rows: int, k: int) -> int:
    """Packed bytes of one expert of ``rows`` weight rows and reduction length ``k`` (padded to a multiple of 128).

    Raises:
        ProblemError: rows or k is not a positive multiple of 64.
    """
    if rows <= 0 or rows % ROWS or k <= 0 or k % 64:
        raise ProblemError(f"weights of {rows} rows x K {k}: use positive multiples of 64 (contract section 8)")
    return (rows // ROWS) * -(-k // K) * SUPERBLOCK_BYTES


def expert_stride(op: str, hidden: int, intermediate: int) -> int:
    """Bytes from one expert's packed weights to the next's.

    Raises:
        ProblemError: H or I is not a positive multiple of 64, or ``op`` is unknown.
    """
    row_order(op)
    for name, value in (("hidden", hidden), ("intermediate", intermediate)):
        if value <= 0 or value % 64:
            raise ProblemError(f"{name}={value}: use a positive multiple of 64 (contract section 8)")
    return expert_bytes(2 * intermediate, hidden) if op == "fc1" else expert_bytes(hidden, intermediate)


def packed_bytes(op: str, experts: int, hidden: int, intermediate: int) -> int:
    """Bytes of all experts' packed weights.

    Raises:
        ProblemError: as ``expert_stride``, or E is not positive.
    """
    if experts <= 0:
        raise ProblemError(f"experts={experts}: use a positive number")
    return experts * expert_stride(op, hidden, intermediate)


def _check_bytes(name: str, array: Any, shape: tuple[int | None, ...]) -> None:
    """ProblemError unless ``array`` is uint8 of this shape (None: any size) with a contiguous last dimension."""
    spelled = ", ".join("any" if size is None else str(size) for size in shape)
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        raise ProblemError(f"{name} is {getattr(array, 'dtype', type(array).__name__)}: use a numpy array of uint8 [{spelled}]")
    if array.ndim != len(shape) or any(want is not None and have != want for have, want in zip(array.shape, shape, strict=True)):
        raise ProblemError(f"{name} has shape {list(array.shape)}: use [{spelled}]")
    if array.size and array.shape[-1] > 1 and array.strides[-1] != 1:
        raise ProblemError(f"{name} has strides {array.strides}: its last dimension must be contiguous; use numpy.ascontiguousarray")


def _check_out(out: Bytes | None, size: int) -> Bytes:
    """``out``, or a new buffer where there is none."""
    if out is None:
        return np.empty(size, dtype=np.uint8)
    _check_bytes("out", out, (size,))
    if not out.flags.writeable:
        raise ProblemError("out is read-only: give a writable buffer")
    return out


def pack_expert(op: str, codes: Bytes, scales: Bytes, out: Bytes | None = None) -> Bytes:
    """Packs one expert: the streaming form, for callers that read a checkpoint expert by expert.

    Args:
        op: ``fc1`` (2I rows, interleaved up/gate in groups of 64, K = H) or ``fc2`` (H rows, K = I).
        codes: uint8 ``[rows, K/2]``, the even k in the low nibble; rows may be strided.
        scales: uint8 row-major ``[rows, K/16]``, e4m3, not negative and not NaN.
        out: where to write, uint8 ``[expert_bytes(rows, K)]``; made where absent.

    Returns:
        ``out``.

    Raises:
        ProblemError: shapes, dtypes, strides or scales that the layout does not hold. Nothing is written then.
    """
    _check_bytes("codes", codes, (None, None))
    rows, k = codes.shape[0], codes.shape[1] * 2
    size = expert_bytes(rows, k)
    if op == "fc1" and rows % (2 * ROWS):
        raise ProblemError(f"{rows} up and gate rows: use a multiple of {2 * ROWS} (I % 64 == 0, contract section 8)")
    _check_bytes("scales", scales, (rows, k // GROUP))
    table = _interchange_rows(op, rows)
    if scales.max() >= FIRST_REFUSED_SCALE:
        row, column = (int(i) for i in np.argwhere(scales >= FIRST_REFUSED_SCALE)[0])
        raise ProblemError(
            f"weight scale 0x{int(scales[row, column]):02X} at row {row}, K group {column} is NaN or negative: e4m3 bytes 0x00 to 0x7E are"
            " allowed; the checkpoint is damaged or its scales are not e4m3"
        )
    out = _check_out(out, size)
    k_blocks = -(-k // K)
    blocks = out.reshape(-1, k_blocks, SUPERBLOCK_BYTES)
    at_once = max(1, _ROWS_AT_ONCE_BYTES // (ROWS * codes.shape[1]))
    for first in range(0, len(table), at_once):
        _pack_blocks(codes, scales, table[first : first + at_once], blocks[first : first + at_once])
    return out


def _pack_blocks(codes: Bytes, scales: Bytes, table: npt.NDArray[np.int64], blocks: Bytes) -> None:
    """Packs the superblocks whose interchange rows ``table`` lists as ``[R, b, u, g]`` into ``blocks`` ``[R, K blocks, 4608]``."""
    count, k_blocks = blocks.shape[:2]
    padded = k_blocks * K
    upper_lower = table.transpose(2, 0, 1, 3)  # u, R, b, g
    pairs = np.zeros((count, 4, 8, padded // 8), dtype="<u8")  # of words: the low four bytes are the first
    for rows, spread in zip(upper_lower, _SPREAD, strict=True):
        fours = codes[rows].view("<u2")  # four codes each: R, b, g, K/4
        group_scales = scales[rows]
        if not group_scales.all():
            fours = fours * np.repeat(group_scales != 0, 4, axis=3)
        for word in range(2):
            pairs[..., : fours.shape[3] // 2] |= spread[word][fours[..., word::2]]
    # R, b, g, K block, half, (t, pair of steps) → R, K block, b, half, g, (t, pair of steps)
    chunks = pairs.reshape(count, 4, 8, k_blocks, 2, 8).transpose(0, 3, 1, 4, 2, 5)
    blocks[:, :, :CODE_BYTES] = np.ascontiguousarray(chunks).view(np.uint8).reshape(count, k_blocks, CODE_BYTES)
    spelled = np.zeros((count, 4, 2, 8, padded // GROUP), dtype=np.uint8)
    spelled[..., : scales.shape[1]] = _SCALES[scales[table]]
    # R, b, u, g, K block, half, t → R, K block, (g, t), [b, half, u]
    lanes = spelled.reshape(count, 4, 2, 8, k_blocks, 2, 4).transpose(0, 4, 3, 6, 1, 5, 2)
    blocks[:, :, CODE_BYTES:] = lanes.reshape(count, k_blocks, SCALE_BYTES)


def unpack_expert(op: str, packed: Bytes, rows: int, k: int) -> tuple[Bytes, Bytes]:
    """What ``pack_expert`` was given: codes ``[rows, K/2]`` and row-major e4m3 scales ``[rows, K/16]``.

    Codes of groups whose scale is 0 come back as 0.

    Raises:
        ProblemError: ``packed`` is not uint8 ``[expert_bytes(rows, k)]``.
    """
    _check_bytes("packed", packed, (expert_bytes(rows, k),))
    table = _interchange_rows(op, rows)
    count, k_blocks = len(table), -(-k // K)
    blocks = packed.reshape(count, k_blocks, SUPERBLOCK_BYTES)
    pairs = np.ascontiguousarray(blocks[:, :, :CODE_BYTES]).view("<u8").reshape(count, k_blocks, 4, 2, 8, 4, 2)
    codes = np.empty((count, 4, 2, 8, k_blocks, 2, 4, 2, 2, 2, 2), dtype=np.uint8)  # R, b, u, g, K block, half, t, pair of steps, step, pair, odd
    for word, value, odd in itertools.product(range(2), range(4), range(2)):
        code: npt.NDArray[Any] = np.zeros(pairs.shape, dtype=np.uint8)
        for bit in CODE_BITS[word, value, odd]:
            code = (code << 1) | ((pairs >> np.uint64(bit)) & np.uint64(1)).astype(np.uint8)
        codes[:, :, value % 2, :, :, :, :, :, word, value // 2, odd] = code.transpose(0, 2, 4, 1, 3, 5, 6)
    lanes = blocks[:, :, CODE_BYTES:].reshape(count, k_blocks, 8, 4, 4, 2, 2)
    spelled = lanes.transpose(0, 4, 6, 2, 1, 5, 3).reshape(rows, k_blocks * K // GROUP)
    plain_codes, plain_scales = np.empty((rows, k // 2), dtype=np.uint8), np.empty((rows, k // GROUP), dtype=np.uint8)
    plain_codes[table.reshape(-1)] = pack_codes(codes.reshape(rows, k_blocks * K)[:, :k])
    plain_scales[table.reshape(-1)] = _SCALES_BACK[spelled[:, : k // GROUP]]
    return plain_codes, plain_scales


def fc1_expert(codes: Bytes, scales: Bytes, expert: int) -> tuple[Bytes, Bytes]:
    """One expert of FC1's interchange tensors: codes ``[2I, H/2]`` (a view) and row-major scales ``[2I, H/16]``."""
    rows = codes.shape[1]  # a multiple of 128 since I % 64 == 0: an expert is whole scale tiles
    return codes[expert], untile_scales(scales[expert * rows : (expert + 1) * rows], rows)


def fc2_expert(codes: Bytes, scales: Bytes, experts: int, expert: int) -> tuple[Bytes, Bytes]:
    """One expert of FC2's interchange tensors: codes ``[H, I/2]`` (a view) and row-major scales ``[H, I/16]``."""
    rows, half = codes.shape[0], codes.shape[1] // experts
    groups = half // 8
    # a tile of the tiled order holds 4 scale columns, and I % 64 == 0: an expert is whole column tiles
    tiles = scales.reshape(-1, scales.shape[1] // 4, SCALE_TILE_BYTES)[:, expert * groups // 4 : (expert + 1) * groups // 4]
    own = np.ascontiguousarray(tiles).reshape(padded_rows(rows), groups)
    return codes[:, expert * half : (expert + 1) * half], untile_scales(own, rows)


def _check_fc1(codes: Bytes, scales: Bytes) -> tuple[int, int, int]:
    """(E, 2I, H) of FC1's interchange tensors."""
    _check_bytes("codes", codes, (None, None, None))
    experts, rows, k = codes.shape[0], codes.shape[1], codes.shape[2] * 2
    if rows % (2 * ROWS):
        raise ProblemError(f"codes of shape {list(codes.shape)} have 2I = {rows}: use I % 64 == 0 (contract section 8)")
    packed_bytes("fc1", experts, k, rows // 2)
    _check_bytes("scales", scales, (experts * rows, k // GROUP))
    if not scales.flags.c_contiguous:
        raise ProblemError(f"scales have strides {scales.strides}: tiled scales must be contiguous; use numpy.ascontiguousarray")
    return experts, rows, k


def _check_fc2(codes: Bytes, scales: Bytes, experts: int) -> tuple[int, int]:
    """(H, I) of FC2's interchange tensors."""
    _check_bytes("codes", codes, (None, None))
    if experts < 1 or codes.shape[1] * 2 % (64 * experts):
        raise ProblemError(f"codes {list(codes.shape)} for {experts} experts: use [H, E·I/2] with I % 64 == 0 (contract section 8)")
    rows, intermediate = codes.shape[0], codes.shape[1] * 2 // experts
    packed_bytes("fc2", experts, rows, intermediate)
    _check_bytes("scales", scales, (padded_rows(rows), experts * intermediate // GROUP))
    if not scales.flags.c_contiguous:
        raise ProblemError(f"scales have strides {scales.strides}: tiled scales must be contiguous; use numpy.ascontiguousarray")
    return rows, intermediate


def _slots(out: Bytes, experts: int) -> Iterator[tuple[int, Bytes]]:
    """(expert, its part of ``out``)."""
    size = out.shape[0] // experts
    for expert in range(experts):
        yield expert, out[expert * size : (expert + 1) * size]


def pack_fc1(codes: Bytes, scales: Bytes, out: Bytes | None = None) -> Bytes:
    """Packs FC1's weights expert by expert.

    Args:
        codes: uint8 ``[E, 2I, H/2]``, rows of an expert interleaved up/gate in groups of 64.
        scales: uint8, tiled over all rows: ``[E·2I, H/16]``.
        out: uint8 ``[packed_bytes("fc1", E, H, I)]``; made where absent.

    Returns:
        ``out``.

    Raises:
        ProblemError: shapes, dtypes, strides or scales that the layout does not hold.
    """
    experts, rows, k = _check_fc1(codes, scales)
    out = _check_out(out, packed_bytes("fc1", experts, k, rows // 2))
    for expert, slot in _slots(out, experts):
        pack_expert("fc1", *fc1_expert(codes, scales, expert), slot)
    return out


def pack_fc2(codes: Bytes, scales: Bytes, experts: int, out: Bytes | None = None) -> Bytes:
    """Packs FC2's weights expert by expert.

    Args:
        codes: uint8 ``[H, E·I/2]``, columns concatenated expert by expert.
        scales: uint8 tiled ``[⌈H/128⌉·128, E·I/16]``.
        experts: E, always given explicitly (contract section 5).
        out: uint8 ``[packed_bytes("fc2", E, H, I)]``; made where absent.

    Returns:
        ``out``.

    Raises:
        ProblemError: shapes, dtypes, strides or scales that the layout does not hold.
    """
    rows, intermediate = _check_fc2(codes, scales, experts)
    out = _check_out(out, packed_bytes("fc2", experts, rows, intermediate))
    for expert, slot in _slots(out, experts):
        pack_expert("fc2", *fc2_expert(codes, scales, experts, expert), slot)
    return out


def pack(layout: str, op: str, codes: Bytes, scales: Bytes, experts: int) -> Bytes:
    """Weights of an op, in the interchange layout, as kernels whose manifest entry names ``layout`` read them.

    Raises:
        ProblemError: a layout that is none, or weights that it does not hold.
    """
    if layout == INTERCHANGE_LAYOUT:
        return pack_interchange(op, codes, scales, experts)
    if layout != LAYOUT:
        raise ProblemError(f"weight layout {layout!r}: use {LAYOUT} or {INTERCHANGE_LAYOUT}")
    return pack_fc1(codes, scales) if op == "fc1" else pack_fc2(codes, scales, experts)


def unpack_fc1(packed: Bytes, experts: int, hidden: int, intermediate: int) -> tuple[Bytes, Bytes]:
    """FC1's interchange tensors of packed weights: codes ``[E, 2I, H/2]`` and row-major scales ``[E, 2I, H/16]``."""
    _check_bytes("packed", packed, (packed_bytes("fc1", experts, hidden, intermediate),))
    parts = [unpack_expert("fc1", slot, 2 * intermediate, hidden) for _, slot in _slots(packed, experts)]
    return np.stack([codes for codes, _ in parts]), np.stack([scales for _, scales in parts])


def unpack_fc2(packed: Bytes, experts: int, hidden: int, intermediate: int) -> tuple[Bytes, Bytes]:
    """FC2's interchange tensors of packed weights: codes ``[H, E·I/2]`` and row-major scales ``[H, E·I/16]``."""
    _check_bytes("packed", packed, (packed_bytes("fc2", experts, hidden, intermediate),))
    parts = [unpack_expert("fc2", slot, hidden, intermediate) for _, slot in _slots(packed, experts)]
    return np.concatenate([codes for codes, _ in parts], axis=1), np.concatenate([scales for _, scales in parts], axis=1)


# ---- sm100-interchange/1


def interchange_bytes(op: str, experts: int, hidden: int, intermediate: int) -> int:
    """Bytes of one op's weights in ``sm100-interchange/1``: codes, then tiled scales.

    Raises:
        ProblemError: a size that the contract refuses.
    """
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in weight_shapes(op, experts, hidden, intermediate).values())


def interchange_parts(op: str, packed: Bytes, experts: int, hidden: int, intermediate: int) -> tuple[Bytes, Bytes]:
    """Views of the codes and of the tiled scales in a buffer of ``sm100-interchange/1``, in the shapes of ``layout.weight_shapes``.

    A caller that fills them itself, expert by expert, needs no second copy of the weights; ``pack_interchange`` with its own buffer as ``out``
    then checks them in place.

    Raises:
        ProblemError: ``packed`` is not uint8 ``[interchange_bytes(…)]``.
    """
    _check_bytes("packed", packed, (interchange_bytes(op, experts, hidden, intermediate),))
    shapes = weight_shapes(op, experts, hidden, intermediate)
    end = int(np.prod(shapes["b.codes"], dtype=np.int64))
    return packed[:end].reshape(shapes["b.codes"]), packed[end:].reshape(shapes["b.scales"])


def pack_interchange(op: str, codes: Bytes, scales: Bytes, experts: int, out: Bytes | None = None) -> Bytes:
    """Checks weights and lays them out as ``sm100-interchange/1``.

    Args:
        codes: uint8 ``[E, 2I, H/2]`` for fc1, ``[H, E·I/2]`` for fc2.
        scales: uint8, tiled: ``[E·2I, H/16]`` or ``[⌈H/128⌉·128, E·I/16]``. Padding rows are written as 0.
        experts: E, always given explicitly (contract section 5).
        out: uint8 ``[interchange_bytes(op, E, H, I)]``, made where absent. Codes and scales may be its own parts: then nothing is copied.

    Returns:
        ``out``. Its base address on the device is a multiple of 128 bytes, as a Plan checks; its scales then are at one of 16.

    Raises:
        ProblemError: shapes, dtypes or strides that the layout does not hold, or a scale that is NaN or negative. Nothing is written then.
    """
    if op == "fc1":
        found, rows, hidden = _check_fc1(codes, scales)
        if found != experts:
            raise ProblemError(f"codes {list(codes.shape)} hold {found} experts, {experts} are given: use [E, 2I, H/2]")
        intermediate, weight_rows = rows // 2, experts * rows
    elif op == "fc2":
        hidden, intermediate = _check_fc2(codes, scales, experts)
        weight_rows = hidden
    else:
        raise ProblemError(f"op={op!r}: use fc1 or fc2")
    _check_tiled_scales(scales, weight_rows)
    out = _check_out(out, interchange_bytes(op, experts, hidden, intermediate))
    packed_codes, packed_scales = interchange_parts(op, out, experts, hidden, intermediate)
    for target, source in ((packed_codes, codes), (packed_scales, scales)):
        if target.__array_interface__["data"][0] != source.__array_interface__["data"][0]:
            target[...] = source
    padding = np.arange(weight_rows, padded_rows(weight_rows))
    if padding.size:
        columns = np.arange(scales.shape[1])
        packed_scales.reshape(-1)[scale_offsets(padding[:, None], columns[None, :], scales.shape[1])] = 0
    return out


def _check_tiled_scales(scales: Bytes, rows: int) -> None:
    """ProblemError where a scale of ``rows`` rows is NaN or negative; padding rows may hold anything. Works a row of tiles at a time."""
    for tile, block in enumerate(scales.reshape(-1, TILE_ROWS, scales.shape[1])):
        if block.max(initial=0) < FIRST_REFUSED_SCALE:
            continue
        valid = min(rows - tile * TILE_ROWS, TILE_ROWS)
        bad = np.argwhere(untile_scales(np.ascontiguousarray(block), TILE_ROWS)[:valid] >= FIRST_REFUSED_SCALE)
        if len(bad):
            row, column = int(bad[0, 0]) + tile * TILE_ROWS, int(bad[0, 1])
            byte = int(block.reshape(-1)[scale_offsets(row % TILE_ROWS, column, scales.shape[1])])
            raise ProblemError(
                f"weight scale 0x{byte:02X} at row {row}, K group {column} is NaN or negative: e4m3 bytes 0x00 to 0x7E are allowed; the"
                " checkpoint is damaged or its scales are not e4m3"
            )
