"""How grouped FC2 adds to its float32 workspace ``[row block][M][64]``: rows in the order of memory, and counters that tell when a row block is done.

``mma.sync`` leaves a lane eight sums of each of two tokens: added from there, an instruction would touch half of every 32-byte sector that it meets,
and each sector twice. With more than 8 tokens a tile a warp therefore hands its sums through shared memory and adds whole rows. At 8 tokens most
tiles have a row or two, and that would cost more than it saves (docs/tried.md).

    accumulators ──st.shared──► eight rows of 256 bytes ──ld.shared──► x scale of the row ──red.v4──► two rows an instruction, four whole lines
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels.sm90_epilogue import multiply
from densemoe.compile.kernels.sm90_fc2 import OUTPUTS, add_to_workspace, token_values

ROW_BYTES = common.SUPERBLOCK_ROWS * 4  # of a token's sums
STAGED_ROW = ROW_BYTES + 16  # 16 bytes apart from the next, so that few lanes meet in a bank
STEPS = 2  # red.v4 of a lane whose loads are in flight together
ROWS_A_STEP = 2  # 16 lanes hold a row


def add_item(
    config: common.Config, partials: Any, row_block: Any, tokens_total: Any, staged: Any, accumulators: Any, scales: Any, tokens: Any, count: Any,
    lane: Any,
) -> None:  # fmt: skip
    """Adds a warp's sums of one item, scaled, to the workspace; a row whose scale is 0 adds nothing.

    Args:
        staged: shared memory of the warp, ``staged_bytes``; accumulators: as ``mma.sync`` leaves them.
        scales, tokens: of ``rows_of``; count: rows of the tile.
    """
    columns = partials + Int64(row_block) * Int64(tokens_total) * ROW_BYTES
    if staged_bytes(config):
        add_rows(config, columns, staged, accumulators, scales[0], tokens[0], count, lane)
        return
    for pair in range(2):
        address = columns + Int64(tokens[pair]) * ROW_BYTES + Int64((lane // 4) * (OUTPUTS * 4))
        live = Int32(tokens[pair] >= 0) & common.differs_from_zero(scales[pair])
        sums = [multiply(multiply(each, Float32(config.product_scale)), scales[pair]) for each in token_values(accumulators, 0, pair)]
        add_to_workspace(address, live, sums[:4])
        add_to_workspace(address + 16, live, sums[4:])


def rows_of(config: common.Config, rows: Any, row_alpha: Any, words: list[Any], lane: Any) -> tuple[list[Any], list[Any]]:
    """(scales, tokens) of the rows of a tile that a lane needs; 0 and -1 where there is none.

    At 8 tokens they are those of the lane's own sums, else those of row ``lane``, which the lanes that add it ask for.
    """
    _, first_row, count = words
    places = [lane] if staged_bytes(config) else [(lane % 4) * 2 + pair for pair in range(2)]
    exists = [Int32(place < count) for place in places]
    at = [Int64(first_row + place) * 4 for place in places]
    scales = [common.load_global_f32_if(row_alpha + each, live) for each, live in zip(at, exists, strict=True)]
    return scales, [common.load_global_s32_or(rows + each, live, Int32(-1)) for each, live in zip(at, exists, strict=True)]


@cute.jit
def add_rows(config: cutlass.Constexpr, columns, staged, accumulators, scale, token, count, lane):
    """``add_item`` through shared memory.

    Args:
        columns: the row block's sums of token 0; staged: free since the warp's last sync; scale, token: of row ``lane`` of the tile.
    """
    g = lane // 4
    t = lane % 4
    column = (lane % 16) * 16
    for block in cutlass.range_constexpr(config.token_blocks):
        first = block * common.MMA_TOKENS
        if first < count:
            for pair in cutlass.range_constexpr(2):
                values = token_values(accumulators, block, pair)
                place = staged + (t * 2 + pair) * STAGED_ROW + g * (OUTPUTS * 4)
                reduction.store_shared_v4(place, values[:4])
                reduction.store_shared_v4(place + 16, values[4:])
            cute.arch.sync_warp()
            for start in cutlass.range_constexpr(0, common.MMA_TOKENS, STEPS * ROWS_A_STEP):
                if first + start < count:
                    rows = [start + step * ROWS_A_STEP + lane // 16 for step in range(STEPS)]
                    tokens = [common.shuffle_from(token, first + row) for row in rows]
                    scales = [common.shuffle_from(scale, first + row) for row in rows]
                    loaded = [reduction.load_shared_v4(staged + row * STAGED_ROW + column) for row in rows]
                    for step in cutlass.range_constexpr(STEPS):
                        sums = [multiply(multiply(each, Float32(config.product_scale)), scales[step]) for each in loaded[step]]
                        live = Int32(tokens[step] >= 0) & common.differs_from_zero(scales[step])
                        add_to_workspace(columns + Int64(tokens[step]) * ROW_BYTES + Int64(column), live, sums)
            if cutlass.const_expr(block + 1 < config.token_blocks):
                cute.arch.sync_warp()  # the rows have been read


def cleared(count: int) -> list[Any]:
    """``count`` float32 zeros, made exactly here: the compiler would select between them and the sums in every step of the loop."""
    return [pr.inline_ptx_hl("mov.b32 {$w0}, 0;", write_only_types=[Float32], read_only_args=[]) for _ in range(count)]


def staged_bytes(config: common.Config) -> int:
    """Shared memory of a warp for rows on their way."""
    return common.MMA_TOKENS * STAGED_ROW if config.token_blocks > 1 else 0


def staged_rows(config: common.Config) -> Any:
    """Shared-memory address of the rows of all warps, ``staged_bytes`` each; 0 where there are none."""
    if not staged_bytes(config):
        return Int32(0)
    space = cutlass.AddressSpace.smem
    return cutlass.Array(Uint8, common.WARPS * staged_bytes(config), space=space, alignment=16).data_ptr().toint(Int32)


def add_if(address: Any, value: Any) -> Any:
    """Adds a value that is not 0 to a counter at device scope, relaxed; gives the one before."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; @p atom.relaxed.gpu.global.add.u32 {$w0}, [{$r0}], {$r1}; }",
        write_only_types=[Int32],
        read_only_args=[address, value],
    )


def ballot(flag: Any) -> Any:
    """A bit for each lane of the warp whose ``flag`` is not 0."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r0}, 0; vote.sync.ballot.b32 {$w0}, p, 0xffffffff; }", write_only_types=[Uint32], read_only_args=[flag]
    )


def lowest_bit(mask: Any) -> Any:
    """The place of the lowest bit that is set."""
    return pr.inline_ptx_hl(
        "{ .reg .b32 r; brev.b32 r, {$r0}; clz.b32 {$w0}, r; }", write_only_types=[Int32], read_only_args=[mask]
    )
