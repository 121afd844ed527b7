"""How grouped FC2 adds in one order (variants with the option ``deterministic``): the same bits every time, whatever runs when.

The other form adds each row to its token's sums by ``red.add``, in the order in which CTAs come to it. Here each row of ``route`` has sums of its own,
which are stored once, and are added per token by whoever converts it, in the order of the token's choice:

    accumulators of a unit ─► float32 [row block][row][64], x row_alpha ─► CTAs behind all that add: a token's rows, found by ``places``, in order
    a unit that several workers share: the parts of those behind the first go through their slots (``sm90_reduction``), as in FC1

What it costs is reading k rows a token at the end instead of one. Nothing has to be zero but slots and tickets. A row whose alpha is 0 is 0.

No deadlock, as in ``sm90_reduction``: workers are counted from the last CTA, so that who waits for a slot waits for earlier CTAs; CTAs that convert come
behind all of them, and begin with the last row blocks, which the first CTAs have.
"""

from __future__ import annotations

from typing import Any, Final

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels import sm90_workspace as workspace
from densemoe.compile.kernels.sm90_conversion import (
    LANES_A_ROW,
    POLL_NANOSECONDS,
    ROW_BYTES,
    ROWS_AT_ONCE,
    TICKETS_AT,
    VECTOR,
    add_if,
    ballot,
    clear_tickets_if_last,
    load_ticket,
    span_start,
)
from densemoe.compile.kernels.sm90_conversion import workspaces as of_any_order
from densemoe.compile.kernels.sm90_epilogue import select, store_if, store_row
from densemoe.compile.kernels.sm90_fc2 import load_workspace_if, token_values
from densemoe.runtime.recipe import Parameter, Workspace

POINTERS: Final = (Parameter("places", "pointer", "places"), Parameter("slots", "pointer", "workspace.slots"))  # in place of ``rows``
AT_ONCE: Final = 16  # rows of its tokens that a lane loads together
BATCH: Final = 4  # vectors of a slot that a lane loads together


def workspaces(slots: str) -> tuple[Workspace, ...]:
    """A row's sums, which need not be zero; the slots of the workers, so many bytes; the counters of a launch."""
    counters = of_any_order()[1]
    return Workspace("workspace.rows", "M * top_k * H * 4"), Workspace("workspace.slots", slots, zeroed=True), counters


def vectors_stored(c_dtype: str) -> int:
    """``st.global.v4.f32`` in the code that converts."""
    return AT_ONCE if c_dtype == "f32" else 0


def converting(warps: int, resident_ctas: int) -> str:
    """How many CTAs convert, as a recipe has it: see ``sm90_conversion.converting``; a piece is tokens of up to ``AT_ONCE`` rows for each
    half of a warp."""
    most = "sm_count" if resident_ctas > 1 else "sm_count // 2"
    return f"min(ceil_div(row_blocks * ceil_div(M, 2 * max({AT_ONCE} // top_k, 1)), {warps}), max({most}, 1))"


@cute.jit
def converting_ctas(tokens_total, top_k, row_blocks, sm_count, warps: cutlass.Constexpr, resident_ctas: cutlass.Constexpr):
    """``converting`` on the compiler's own host side."""
    of_piece = 2 * max(AT_ONCE // top_k, Int32(1))
    pieces = row_blocks * ((tokens_total + (of_piece - 1)) // of_piece)
    most = sm_count if cutlass.const_expr(resident_ctas > 1) else sm_count // 2
    return min((pieces + (warps - 1)) // warps, max(most, Int32(1)))


# ---- a unit's sums


@cute.jit
def workers_sharing(worker, k_blocks, quotient, longer, workers, total):
    """How many workers share the unit that a worker's span ends inside of, this one, which is the first, among them."""
    end = span_start(worker + 1, quotient, longer, workers, total)
    last = (end - 1) // k_blocks * k_blocks + (k_blocks - 1)
    return Int32(reduction.owner(last, quotient, longer) - worker) + 1


def slot_bytes(config: common.Config) -> int:
    """Bytes of the slot of a warp of the kernels of 64 weight rows."""
    return config.tile_m * common.SUPERBLOCK_ROWS * 4


def store_slot(config: common.Config, slots: Any, worker: Any, accumulators: list[Any], lane: Any) -> None:
    """Stores a warp's sums in its slot; added to 0, which makes every NaN the one that is not taken for no sum."""
    own = slots + Int64(worker) * slot_bytes(config) + Int64(lane * 16)
    for first in range(0, len(accumulators), VECTOR):
        sums = reduction.add(accumulators[first : first + VECTOR], [Float32(0.0)] * VECTOR)
        words = [reduction.inverted(each, Uint32) for each in sums]
        reduction.put_slot_words_if(own + first // VECTOR * common.CHUNK_BYTES, Int32(1), words)


@cute.jit
def add_slots(config: cutlass.Constexpr, accumulators, slots, worker, sharing, lane):
    """A warp's sums with those in the slots of the ``sharing - 1`` workers behind it added, one after the other; waits for them, and clears them."""
    for other in cutlass.range(1, sharing, unroll=1):
        own = slots + Int64(worker + other) * slot_bytes(config) + Int64(lane * 16)
        for first in cutlass.range_constexpr(0, len(accumulators), BATCH * VECTOR):
            addresses = [own + (first // VECTOR + i) * common.CHUNK_BYTES for i in range(BATCH)]
            words = reduction.words_when_there(addresses, [Int32(1)] * BATCH)
            end = first + BATCH * VECTOR
            accumulators = accumulators[:first] + reduction.add_words(accumulators[first:end], words) + accumulators[end:]
            for each in addresses:
                reduction.put_slot_words_if(each, Int32(1), [Uint32(0)] * VECTOR)
    return accumulators


@cute.jit
def store_rows(config: cutlass.Constexpr, staged_rows: cutlass.Constexpr, rows, staged, accumulators, scales, count, lane):
    """Stores a warp's sums of one unit, scaled, a row of the tile each, through shared memory as ``sm90_workspace.add_rows`` has it.

    Args:
        rows: the row block's sums of the tile's first row; staged: free since the warp's last sync.
        accumulators: as ``mma.sync`` leaves them; scales: of row ``lane`` of the tile, of row ``lane + 32`` …; count: rows of the tile.
    """
    t = lane % 4
    own = ((lane // 4 * 2) ^ workspace.swizzle(t)) * workspace.CHUNK
    for block in cutlass.range_constexpr(config.token_blocks):
        for part in cutlass.range_constexpr(common.MMA_TOKENS // staged_rows):
            first = block * common.MMA_TOKENS + part * staged_rows
            if first < count:
                if t * 2 // staged_rows == part:
                    for pair in cutlass.range_constexpr(2):
                        values = token_values(accumulators, block, pair)
                        row = staged + (t * 2 + pair - part * staged_rows) * ROW_BYTES
                        common.store_shared_v4(row + own, values[:4])
                        common.store_shared_v4(row + (own ^ workspace.CHUNK), values[4:])
                cute.arch.sync_warp()
                for start in cutlass.range_constexpr(0, staged_rows, ROWS_AT_ONCE):
                    row = start + lane // LANES_A_ROW
                    chunk = (lane % LANES_A_ROW) ^ workspace.swizzle((part * staged_rows + start) // 2)
                    scale = common.shuffle_from(scales[first // 32], first % 32 + row)
                    sums = common.load_shared_v4(staged + row * ROW_BYTES + chunk * workspace.CHUNK, Float32)
                    address = rows + Int64((first + row) * ROW_BYTES + (lane % LANES_A_ROW) * workspace.CHUNK)
                    store_if("v4.f32", address, Int32(first + row < count), scaled(config, sums, scale))
                if cutlass.const_expr(first + staged_rows < config.tile_m):
                    cute.arch.sync_warp()  # the rows have been read


def scaled(config: Any, sums: list[Any], scale: Any) -> list[Any]:
    """``sm90_workspace.scaled``, and 0 where the scale is 0, whatever the sums are."""
    live = common.differs_from_zero(scale)
    return [select(live, each, Float32(0.0)) for each in workspace.scaled(config, sums, scale)]


# ---- CTAs that convert


@cute.jit
def convert(
    warps: cutlass.Constexpr, c_dtype: cutlass.Constexpr, c, rows, places, counters, of_group, group_rows, converter, converters, tokens_total, top_k,
    row_blocks, tid,
):  # fmt: skip
    """A CTA that adds nothing: its warps take pieces of the output, wait until all rows of these are there, and add them per token.

    A piece is 64 columns of some tokens, half of them for each half of the warp, of up to ``AT_ONCE`` rows together. Arguments as of
    ``sm90_conversion.convert``.
    """
    lane = tid % 32
    own_tokens = max(AT_ONCE // top_k, Int32(1))  # of half a warp
    pieces_a_row = (tokens_total + (2 * own_tokens - 1)) // (2 * own_tokens)
    pieces = row_blocks * pieces_a_row
    own = converter * warps + cute.arch.make_warp_uniform(tid // 32)
    step = converters * warps
    before = add_if(counters, Int32(own >= pieces) & Int32(lane == 0))  # a warp without pieces waits for nothing
    for index in cutlass.range(own, pieces, step, unroll=1):
        piece = pieces - 1 - index
        row_block = Int32(Uint32(piece) // Uint32(pieces_a_row))
        token = ((piece - row_block * pieces_a_row) * 2 + lane // LANES_A_ROW) * own_tokens
        ticket = counters + TICKETS_AT + Int64(Int32(Uint32(row_block) // Uint32(group_rows))) * 4
        while ballot(Int32(load_ticket(ticket) != of_group)) != 0:
            pr.inline_ptx_hl(f"nanosleep.u32 {POLL_NANOSECONDS};", read_only_args=[])
        cute.arch.sync_warp()
        if index + step >= pieces:
            before = add_if(counters, Int32(lane == 0))
        convert_tokens(c_dtype, c, rows, places, row_block, token, own_tokens, tokens_total, top_k, row_blocks, lane)
    clear_tickets_if_last(counters, before, step, row_blocks, lane)


@cute.jit
def convert_tokens(c_dtype: cutlass.Constexpr, c, rows, places, row_block, token, own_tokens, tokens_total, top_k, row_blocks, lane):
    """Each half of a warp adds the rows of its tokens, ``own_tokens`` from ``token`` on, in the order of their choice, and stores 64 columns of each."""
    column = (lane % LANES_A_ROW) * VECTOR
    every = tokens_total * top_k
    sums = rows + Int64(row_block) * Int64(every) * ROW_BYTES + Int64(column * 4)
    hidden = Int64(row_blocks) * common.SUPERBLOCK_ROWS
    element = Int64(token) * hidden + Int64(row_block * common.SUPERBLOCK_ROWS + column)
    first = token * top_k
    length = own_tokens * top_k
    left = top_k
    totals = [Float32(0.0) for _ in range(VECTOR)]
    for base in cutlass.range(0, length, AT_ONCE, unroll=1):
        pair = base + lane % LANES_A_ROW
        exists = Int32(pair < length) & Int32(first + pair < every)
        place = common.load_global_s32_or(places + Int64(first + pair) * 4, exists, Int32(-1))
        loaded = []
        for i in cutlass.range_constexpr(AT_ONCE):
            own = common.shuffle_from(place, lane // LANES_A_ROW * LANES_A_ROW + i)
            loaded.append(load_workspace_if(sums + Int64(own) * ROW_BYTES, Int32(own >= 0)))
        for i in cutlass.range_constexpr(AT_ONCE):
            totals = reduction.add(totals, loaded[i])
            left -= 1
            if left == 0:
                store_row(c_dtype, c, element, Int32(token < tokens_total), totals)
                totals = workspace.cleared(VECTOR)
                left = top_k
                token += 1
                element = element + hidden
