"""How grouped FC2 adds to its float32 workspace ``[row block][M][64]``: rows in the order of memory.

``mma.sync`` and ``wgmma`` leave a lane eight sums of each of two tokens: added from there, an instruction would touch half of every 32-byte sector
that it meets, and each sector twice. A warp therefore hands its sums through shared memory and adds whole rows (docs/tried.md).

    accumulators ──st.shared──► eight rows of 256 bytes ──ld.shared──► x scale of the row ──red.v4──► two rows an instruction, four whole lines
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.sm90_conversion import LANES_A_ROW, ROW_BYTES, ROWS_AT_ONCE
from densemoe.compile.kernels.sm90_epilogue import multiply
from densemoe.compile.kernels.sm90_fc2 import add_to_workspace, token_values

CHUNK = 16  # bytes of one access to shared memory
MMA_ROWS = common.MMA_TOKENS  # rows that a warp of the ``mma.sync`` kernels hands through shared memory at a time
STEPS = 2  # red.v4 of a lane whose loads are in flight together


def add_item(
    config: common.Config, partials: Any, row_block: Any, tokens_total: Any, staged: Any, accumulators: Any, scale: Any, token: Any, count: Any,
    lane: Any,
) -> None:  # fmt: skip
    """Adds a warp's sums of one item, scaled, to the workspace; a row whose scale is 0 adds nothing.

    Args:
        staged: shared memory of the warp, ``staged_bytes``; accumulators: as ``mma.sync`` leaves them.
        scale, token: of ``row_of``; count: rows of the tile.
    """
    columns = partials + Int64(row_block) * Int64(tokens_total) * ROW_BYTES
    add_rows(config, MMA_ROWS, columns, staged, accumulators, [scale], [token], count, lane)


def row_of(rows: Any, row_alpha: Any, words: list[Any], lane: Any) -> tuple[Any, Any]:
    """(scale, token) of row ``lane`` of a tile; 0 and -1 where there is none."""
    _, first_row, count = words
    exists = Int32(lane < count)
    at = Int64(first_row + lane) * 4
    return common.load_global_f32_if(row_alpha + at, exists), common.load_global_s32_or(rows + at, exists, Int32(-1))


@cute.jit
def add_rows(config: cutlass.Constexpr, staged_rows: cutlass.Constexpr, columns, staged, accumulators, scales, tokens, count, lane):
    """``add_item`` through shared memory, ``staged_rows`` rows at a time: 4 or 8.

    Args:
        columns: the row block's sums of token 0; staged: free since the warp's last sync.
        scales, tokens: of row ``lane`` of the tile, of row ``lane + 32`` …
    """
    t = lane % 4
    own = ((lane // 4 * 2) ^ swizzle(t)) * CHUNK  # of the lane's two chunks the first, the other beside it
    for block in cutlass.range_constexpr(config.token_blocks):
        for part in cutlass.range_constexpr(common.MMA_TOKENS // staged_rows):
            first = block * common.MMA_TOKENS + part * staged_rows
            if first < count:
                if t * 2 // staged_rows == part:
                    for pair in cutlass.range_constexpr(2):
                        values = token_values(accumulators, block, pair)
                        row = staged + (t * 2 + pair - part * staged_rows) * ROW_BYTES
                        common.store_shared_v4(row + own, values[:4])
                        common.store_shared_v4(row + (own ^ CHUNK), values[4:])
                cute.arch.sync_warp()
                for start in cutlass.range_constexpr(0, staged_rows, STEPS * ROWS_AT_ONCE):
                    if first + start < count:
                        rows = [start + step * ROWS_AT_ONCE + lane // LANES_A_ROW for step in range(STEPS)]
                        swizzles = [swizzle((part * staged_rows + start) // 2 + step) for step in range(STEPS)]
                        own_tokens = [common.shuffle_from(tokens[first // 32], first % 32 + row) for row in rows]
                        own_scales = [common.shuffle_from(scales[first // 32], first % 32 + row) for row in rows]
                        places = [row * ROW_BYTES + ((lane % LANES_A_ROW) ^ bits) * CHUNK for row, bits in zip(rows, swizzles, strict=True)]
                        loaded = [common.load_shared_v4(staged + place, Float32) for place in places]
                        for step in cutlass.range_constexpr(STEPS):
                            sums = scaled(config, loaded[step], own_scales[step])
                            live = Int32(own_tokens[step] >= 0) & common.differs_from_zero(own_scales[step])
                            address = columns + Int64(own_tokens[step]) * ROW_BYTES + Int64((lane % LANES_A_ROW) * CHUNK)
                            add_to_workspace(address, live, sums)
                if cutlass.const_expr(first + staged_rows < config.tile_m):
                    cute.arch.sync_warp()  # the rows have been read


def swizzle(t: Any) -> Any:
    """What the chunks of rows 2t and 2t + 1 are exchanged by: neither lanes that store together nor those that load together meet in a bank."""
    return (t & 1) | ((t & 2) << 1)


def scaled(config: Any, sums: list[Any], scale: Any) -> list[Any]:
    """Accumulators times what undoes the factors of their operands, times a row's scale."""
    return [multiply(multiply(each, Float32(config.product_scale)), scale) for each in sums]


def cleared(count: int) -> list[Any]:
    """``count`` float32 zeros, made exactly here: the compiler would select between them and the sums in every step of the loop."""
    return [pr.inline_ptx_hl("mov.b32 {$w0}, 0;", write_only_types=[Float32], read_only_args=[]) for _ in range(count)]


def staged_bytes(rows: int) -> int:
    """Shared memory of a warp for so many rows on their way."""
    return rows * ROW_BYTES


def staged_rows(rows: int, warps: int) -> Any:
    """Shared-memory address of the rows of all warps, ``staged_bytes`` each."""
    space = cutlass.AddressSpace.smem
    return cutlass.Array(Uint8, warps * staged_bytes(rows), space=space, alignment=16).data_ptr().toint(Int32)
