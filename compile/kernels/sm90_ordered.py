"""How grouped FC2 adds in one order (variants with the option ``deterministic``): the same bits every time, whatever runs when.

The other form adds each row to its token's sums by ``red.add``, in the order in which CTAs come to it. Here each row of ``route`` has sums of its
own, which are stored once, and are added per token by whoever converts it, in the order of the token's choice:

    accumulators of a unit ─► float32 [row block][row][64], x row_alpha ─► CTAs behind all that add: a token's rows, found by ``places``, in order
    a unit that several workers share: the parts of those behind the first go through their slots (``sm90_reduction``), as in FC1

What it costs is reading k rows a token at the end instead of one. Nothing has to be zero but slots and tickets. A row whose alpha is 0 is 0.

Rows are read once, and their lines of the L2 are then discarded, so that they need not be written to memory.

No deadlock, as in ``sm90_reduction``: workers are counted from the last CTA, so that who waits for a slot waits for earlier CTAs; CTAs that convert
come behind all of them, and begin with the last row blocks, which the first CTAs have.
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
MANY_PIECES: Final = 4  # of a warp, from which more CTAs convert than one an SM
#: By resident CTAs: CTAs that convert at most, and whether twice as many may where pieces are many.
MOST_CONVERTING: Final = {4: ("sm_count", True), 3: ("sm_count", True), 2: ("sm_count", False), 1: ("max(sm_count // 2, 1)", False)}
LINE: Final = 128  # bytes of one of the L2
HALF: Final = LANES_A_ROW  # lanes that convert the same tokens: half a warp
BATCH: Final = 4  # vectors of a slot that a lane loads together


def workspaces(slots: str) -> tuple[Workspace, ...]:
    """A row's sums, which need not be zero; the slots of the workers, so many bytes; the counters of a launch."""
    counters = of_any_order()[1]
    return Workspace("workspace.rows", "M * top_k * H * 4"), Workspace("workspace.slots", slots, zeroed=True), counters


def vectors_stored(c_dtype: str, at_once: int) -> int:
    """``st.global.v4.f32`` in the code that converts ``at_once`` rows at a time."""
    return at_once if c_dtype == "f32" else 0


def converting(at_once: int, warps: int, resident_ctas: int) -> str:
    """How many CTAs of ``warps`` warps convert, as a recipe has it. A piece is the tokens of ``at_once`` rows for each half of a warp.

    One an SM, or fewer where a warp would have none: CTAs that poll take places. More where each warp has ``MANY_PIECES``, up to what leaves those
    that add a place on an idle device, which holds ``resident_ctas`` an SM.
    """
    pieces = f"row_blocks * ceil_div(M, 2 * max({at_once} // top_k, 1))"
    most, doubled = MOST_CONVERTING[resident_ctas]
    few = f"min(ceil_div({pieces}, {warps}), {most})"
    return few if not doubled else f"max({few}, min(ceil_div({pieces}, {warps * MANY_PIECES}), {most} * 2))"


@cute.jit
def converting_ctas(
    tokens_total, top_k, row_blocks, sm_count, at_once: cutlass.Constexpr, warps: cutlass.Constexpr, resident_ctas: cutlass.Constexpr
):
    """``converting`` on the compiler's own host side."""
    of_piece = 2 * max(at_once // top_k, Int32(1))
    pieces = row_blocks * ((tokens_total + (of_piece - 1)) // of_piece)
    most = sm_count if cutlass.const_expr(resident_ctas > 1) else max(sm_count // 2, Int32(1))
    ctas = min((pieces + (warps - 1)) // warps, most)
    if cutlass.const_expr(MOST_CONVERTING[resident_ctas][1]):
        ctas = max(ctas, min((pieces + (warps * MANY_PIECES - 1)) // (warps * MANY_PIECES), most * 2))
    return ctas


# ---- a unit's sums


def smallest_span(smallest: int) -> str:
    """The fewest K blocks of a worker, as a recipe has it, at least ``smallest``: half of a unit's, so that few workers share one, whose parts the
    first of them adds one after the other."""
    return f"max({smallest}, (ceil_div(I, {common.SUPERBLOCK_K}) + 1) // 2)"


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
    at_once: cutlass.Constexpr, warps: cutlass.Constexpr, c_dtype: cutlass.Constexpr, c, rows, places, counters, of_group, group_rows, converter,
    converters, tokens_total, top_k, row_blocks, tid,
):  # fmt: skip
    """A CTA that adds nothing: its warps take pieces of the output, wait until all rows of these are there, and add them per token.

    A piece is 64 columns of some tokens, half of them for each half of the warp, of up to ``at_once`` rows, which a lane loads together. Where these
    stand is loaded a piece ahead, and a group of row blocks that was complete is not asked again. Arguments as of ``sm90_conversion.convert``.
    """
    lane = tid % 32
    own_tokens = max(at_once // top_k, Int32(1))  # of half a warp
    pieces_a_row = (tokens_total + (2 * own_tokens - 1)) // (2 * own_tokens)
    pieces = row_blocks * pieces_a_row
    own = converter * warps + cute.arch.make_warp_uniform(tid // 32)
    step = converters * warps
    before = add_if(counters, Int32(own >= pieces) & Int32(lane == 0))  # a warp without pieces waits for nothing
    token = first_token(pieces - 1 - own, pieces_a_row, own_tokens, lane)
    found = places_from(at_once, places, token * top_k, Int32(0), own_tokens * top_k * Int32(own < pieces), tokens_total * top_k, lane)
    complete = Int32(-1)
    for index in cutlass.range(own, pieces, step, unroll=1):
        piece = pieces - 1 - index
        row_block = Int32(Uint32(piece) // Uint32(pieces_a_row))
        group = Int32(Uint32(row_block) // Uint32(group_rows))
        if group != complete:
            ticket = counters + TICKETS_AT + Int64(group) * 4
            while ballot(Int32(load_ticket(ticket) != of_group)) != 0:
                pr.inline_ptx_hl(f"nanosleep.u32 {POLL_NANOSECONDS};", read_only_args=[])
            cute.arch.sync_warp()
            complete = group
        more = Int32(index + step < pieces)
        if more == 0:
            before = add_if(counters, Int32(lane == 0))
        here, own_found = token, found
        token = first_token(piece - step, pieces_a_row, own_tokens, lane)
        found = places_from(at_once, places, token * top_k, Int32(0), own_tokens * top_k * more, tokens_total * top_k, lane)
        convert_tokens(at_once, c_dtype, c, rows, places, own_found, row_block, here, own_tokens, tokens_total, top_k, row_blocks, lane)
    clear_tickets_if_last(counters, before, step, row_blocks, lane)


@cute.jit
def first_token(piece, pieces_a_row, own_tokens, lane):
    """The first token of a lane's half of a piece."""
    whole = max(piece, Int32(0))
    return ((whole - Int32(Uint32(whole) // Uint32(pieces_a_row)) * pieces_a_row) * 2 + lane // HALF) * own_tokens


def places_from(at_once: int, places: Any, first: Any, base: Any, length: Any, every: Any, lane: Any) -> list[Any]:
    """The rows of ``at_once`` pairs from ``first + base`` on, one a lane of each half and word: −1 for what has none, from ``first + length`` or from
    ``every`` on."""
    found = []
    for word in range(-(-at_once // HALF)):
        pair = base + word * HALF + lane % HALF
        inside = Int32(word * HALF + lane % HALF < at_once) if (word + 1) * HALF > at_once else Int32(1)
        exists = inside & Int32(pair < length) & Int32(first + pair < every)
        found.append(common.load_global_s32_or(places + Int64(first + pair) * 4, exists, Int32(-1)))
    return found


@cute.jit
def convert_tokens(
    at_once: cutlass.Constexpr, c_dtype: cutlass.Constexpr, c, rows, places, found, row_block, token, own_tokens, tokens_total, top_k, row_blocks,
    lane,
):  # fmt: skip
    """Each half of a warp adds the rows of its tokens, ``own_tokens`` from ``token`` on, in the order of their choice, and stores 64 columns of each.

    Args:
        found: ``places_from`` the first of them.
    """
    column = (lane % LANES_A_ROW) * VECTOR
    every = tokens_total * top_k
    of_row_block = rows + Int64(row_block) * Int64(every) * ROW_BYTES
    sums = of_row_block + Int64(column * 4)
    hidden = Int64(row_blocks) * common.SUPERBLOCK_ROWS
    element = Int64(token) * hidden + Int64(row_block * common.SUPERBLOCK_ROWS + column)
    first = token * top_k
    length = own_tokens * top_k
    left = top_k
    totals = [Float32(0.0) for _ in range(VECTOR)]
    for base in cutlass.range(0, length, at_once, unroll=1):
        loaded = []
        for i in cutlass.range_constexpr(at_once):
            own = common.shuffle_from(found[i // HALF], lane // HALF * HALF + i % HALF)
            loaded.append(load_workspace_if(sums + Int64(own) * ROW_BYTES, Int32(own >= 0)))
        spent = found
        if base + at_once < length:  # a token of more rows
            found = places_from(at_once, places, first, base + at_once, length, every, lane)
        for i in cutlass.range_constexpr(at_once):
            totals = reduction.add(totals, loaded[i])
            left -= 1
            if left == 0:
                store_row(c_dtype, c, element, Int32(token < tokens_total), totals)
                totals = workspace.cleared(VECTOR)
                left = top_k
                token += 1
                element = element + hidden
        cute.arch.sync_warp()  # every lane has its sums
        for word in cutlass.range_constexpr(len(spent)):
            for line in cutlass.range_constexpr(ROW_BYTES // LINE):
                discard_if(of_row_block + Int64(spent[word]) * ROW_BYTES + line * LINE, Int32(spent[word] >= 0))


def discard_if(address: Any, valid: Any) -> None:
    """Says that a line of the L2 is not needed any more, where ``valid`` is not 0: it need not be written to memory."""
    pr.inline_ptx_hl(
        f"{{ .reg .pred p; setp.ne.b32 p, {{$r1}}, 0; @p discard.global.L2 [{{$r0}}], {LINE}; }}", read_only_args=[address, valid]
    )
