"""Tokens of a tile on their way to shared memory, for the sm_90a kernels of 256 weight rows a CTA (``sm90_wgmma``).

    mma.sync  rows as they are, 16 bytes apart
    wgmma     rows that come in K 64 order, under the 128-byte swizzle

Both are bf16, copied by cp.async of sixteen bytes.

For ``wgmma`` the activations of a K 128 are two K 64 halves of ``tile_m`` rows of 128 bytes. Inside a half K is permuted as in the weights' lanes
(K 64 order, ``runtime.layout``): 16-byte chunk 2s + c of a row, word t, is logical word 8t + 2s + c, so that k16 step s reads chunks 2s, 2s + 1. The
tensor core takes both operands' K from there; ``mma.sync`` takes each lane's from registers, which need no permutation: a lane loads the 32 bytes
that it owns.

Where a tile has fewer rows than there is room for, zeros are brought in their places, or, in tiles of 32 to 64, any other rows: what a column of the
product is made of concerns no other column, and columns without a row are stored nowhere. Zeros take instructions, other rows traffic, which the L1
has where copies go through it (docs/tried.md).
"""

from __future__ import annotations

from typing import Any, Final

from cutlass import Int32, Int64
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.sm90_wgmma_config import ROW_BYTES, TOKEN_STRIDE, Config

SWIZZLE_ROWS: Final = 8  # the 128-byte swizzle repeats after so many rows
CHUNK: Final = 16  # bytes that the swizzle moves as one
HALF_WARP: Final = 16  # lanes that copy a row for ``mma.sync`` together, sixteen bytes each
LANE_BYTES: Final = 32  # of a token in a K 64 half that one lane multiplies by ``mma.sync``


def copied_rows(config: Config, warp: Any, lane: Any) -> tuple[Any, int, range]:
    """(first row, row step, indices) of the rows that a lane copies parts of: a warp copies two at a time, sixteen bytes a lane."""
    step = 2 * config.warps
    return warp * 2 + lane // HALF_WARP, step, range(config.tile_m // step)


def copy_tokens(config: Config, a: Any, tokens: list[Any], k_block: Any, k_blocks: Any, k_total: Any, stage: Any, warp: Any, lane: Any) -> None:
    """Starts the copies of a K 128 of a warp's rows of bf16 activations: ``copied_rows``.

    Args:
        a: bf16 ``[rows, k_total]``, or ``[rows, k_blocks · 128]`` in K 64 order, of which something is copied behind the span too.
        tokens: the activation row of each, negative where there is none and nothing else is brought in its place: it becomes zeros, as what lies
            behind K does.
        stage: shared-memory address of the K 128.
    """
    if config.k64_order:
        _copy_ordered(config, a, tokens, k_block, k_blocks, stage, warp, lane)
    else:
        _copy_whole(config, a, tokens, k_block, k_total, stage, warp, lane)
    pr.inline_ptx_hl("cp.async.commit_group;")


def _copy_whole(config: Config, a: Any, tokens: list[Any], k_block: Any, k_total: Any, stage: Any, warp: Any, lane: Any) -> None:
    """``copy_tokens`` for ``mma.sync``: half a warp copies a row as it is, sixteen bytes a lane."""
    column = k_block * common.SUPERBLOCK_K + lane % HALF_WARP * 8
    values = a + Int64(column) * 2
    inside = Int32(column < k_total) * CHUNK
    first, step, _ = copied_rows(config, warp, lane)
    place = stage + first * TOKEN_STRIDE + lane % HALF_WARP * CHUNK
    for index, token in enumerate(tokens):
        source = values + Int64(token) * Int64(k_total * 2)
        pr.inline_ptx_hl(
            "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};",
            read_only_args=[place + index * step * TOKEN_STRIDE, source, inside & ((token >> 31) ^ -1)],
        )


def _copy_ordered(config: Config, a: Any, tokens: list[Any], k_block: Any, k_blocks: Any, stage: Any, warp: Any, lane: Any) -> None:
    """``copy_tokens`` of rows in K 64 order, which are ``k_blocks`` whole K 128 blocks long: half a warp copies a row, sixteen bytes a lane."""
    piece = lane % HALF_WARP
    values = a + Int64(k_block * common.SUPERBLOCK_K + piece * 8) * 2
    first, step, _ = copied_rows(config, warp, lane)
    swizzled = (piece % 8) ^ (first % SWIZZLE_ROWS)
    place = stage + piece // 8 * config.half_bytes + first * ROW_BYTES + swizzled * CHUNK
    for index, token in enumerate(tokens):
        at, source = place + index * step * ROW_BYTES, values + Int64(token) * Int64(k_blocks * (common.SUPERBLOCK_K * 2))
        if config.fills_with_others:  # the L1 has the row that stands for many
            pr.inline_ptx_hl("cp.async.ca.shared.global [{$r0}], [{$r1}], 16;", read_only_args=[at, source])
        else:
            size = ((token >> 31) ^ -1) & Int32(CHUNK)
            pr.inline_ptx_hl("cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[at, source, size])


def wait_for_tokens() -> None:
    """Waits for the thread's own copies of ``copy_tokens``; the fence and the barrier behind it make them known to the tensor core."""
    pr.inline_ptx_hl("cp.async.wait_group 0;")
