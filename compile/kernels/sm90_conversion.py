"""How grouped FC2 ends: sums of the float32 workspace ``[row block][M][64]`` become the output, and the workspace is zero again.

Two ways, by the number of tokens:

    M <= 64   the CTA that completes a row block (64 columns of all tokens) converts it: a ticket for each row block       ``finish_rows``
    beyond    CTAs behind all that add wait for a group of row blocks, then convert it: a ticket for each group            ``hand_over``, ``convert``

A ticket counts K 128 blocks that have been added. The second way takes 1 us more from the last sum to the first conversion; but since most row blocks
are complete at about the same time, the first leaves the conversion to few CTAs, which at 512 tokens took a quarter of the launch (docs/tried.md).
Groups are complete in about their order, since CTAs that begin first have the first ones and end first: those that convert begin with them while the
last are added. Accesses cover whole rows: the L2 would merge half sectors one by one.

No deadlock: CTAs that convert wait for those with a lower index alone, which have begun when they begin (``sm90_reduction``); and in whatever order
CTAs begin, those that convert are at most half of what an idle device holds, so that those that add find a place.
"""

from __future__ import annotations

from typing import Any, Final

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.sm90_epilogue import store_if, store_row
from densemoe.compile.kernels.sm90_fc2 import load_workspace_if
from densemoe.runtime.recipe import Workspace

LARGEST_FINISHED: Final = 64  # tokens up to which whoever completes a row block converts it
PIECE_TOKENS: Final = 32  # tokens of a row block that a warp converts: sixteen loads a lane
VECTOR: Final = 4  # columns of a lane
LANES_A_ROW: Final = common.SUPERBLOCK_ROWS // VECTOR
ROWS_AT_ONCE: Final = 32 // LANES_A_ROW  # of one access
ROW_BYTES: Final = common.SUPERBLOCK_ROWS * 4  # of a token's sums
COUNTERS: Final = 1  # warps that convert and have seen all tickets that they wait for
TICKETS_AT: Final = COUNTERS * 4  # bytes; K blocks that have been added, of each row block or group of row blocks
POLL_NANOSECONDS: Final = 20


def workspaces() -> tuple[Workspace, ...]:
    """The sums, and the counters of a launch. A recipe says what ``row_blocks`` is."""
    return Workspace("workspace.partials", "M * H * 4", zeroed=True), Workspace("workspace.counters", f"(row_blocks + {COUNTERS}) * 4", zeroed=True)


def converting(warps: int, resident_ctas: int, beyond: int = 0) -> str:
    """How many CTAs of ``warps`` warps convert, as a recipe has it: a warp a piece, but no more CTAs than SMs, nor than half of what the device holds
    at ``resident_ctas`` an SM; none up to ``beyond`` tokens."""
    most = "sm_count" if resident_ctas > 1 else "sm_count // 2"
    return f"(M > {beyond}) * min(ceil_div(row_blocks * ceil_div(M, {PIECE_TOKENS}), {warps}), max({most}, 1))"


@cute.jit
def converting_ctas(
    tokens_total, row_blocks, sm_count, warps: cutlass.Constexpr, resident_ctas: cutlass.Constexpr, beyond: cutlass.Constexpr = 0
):
    """``converting`` on the compiler's own host side."""
    pieces = row_blocks * pieces_of(tokens_total)
    most = sm_count if cutlass.const_expr(resident_ctas > 1) else sm_count // 2
    return min((pieces + (warps - 1)) // warps, max(most, Int32(1))) * Int32(tokens_total > beyond)


# ---- CTAs that convert


@cute.jit
def hand_over(counters, group, inside, blocks, of_group, tid):
    """The last step of a CTA that adds: tells each group how many blocks it has added to the workspace.

    Args:
        group, inside: the group that the CTA's span begins in, and that many blocks in it; blocks: of the span.
        of_group: blocks of a group.
    """
    pr.barrier_cta_sync(0)  # every warp has added
    if tid == 0:
        cute.arch.fence_acq_rel_gpu()
        ticket = counters + TICKETS_AT + Int64(group) * 4
        room = of_group - inside
        while blocks > 0:
            added = min(room, blocks)
            add_if(ticket, added)
            blocks -= added
            room = of_group
            ticket = ticket + 4


@cute.jit
def convert(
    at_once: cutlass.Constexpr, warps: cutlass.Constexpr, c_dtype: cutlass.Constexpr, c, partials, counters, of_group, group_rows, converter,
    converters, tokens_total, row_blocks, tid,
):  # fmt: skip
    """A CTA that adds nothing: its warps take pieces of the sums, wait until all has been added to these and convert them.

    Args:
        at_once: pieces whose loads a warp has in flight; warps: of the CTA.
        of_group: K blocks of a group of ``group_rows`` row blocks.
        converter: which of the ``converters`` CTAs this one is.
    """
    lane = tid % 32
    pieces_a_row = pieces_of(tokens_total)
    pieces = row_blocks * pieces_a_row
    own = converter * warps + cute.arch.make_warp_uniform(tid // 32)
    step = converters * warps
    before = add_if(counters, Int32(own >= pieces) & Int32(lane == 0))  # a warp without pieces waits for nothing
    for piece in cutlass.range(own, pieces, step * at_once, unroll=1):
        seen = piece + lane % at_once * step
        group = Int32(Uint32(seen if seen < pieces else piece) // Uint32(pieces_a_row * group_rows))
        ticket = counters + TICKETS_AT + Int64(group) * 4
        while ballot(Int32(load_ticket(ticket) != of_group)) != 0:
            pr.inline_ptx_hl(f"nanosleep.u32 {POLL_NANOSECONDS};", read_only_args=[])
        cute.arch.sync_warp()  # a lane converts what another has polled for
        if piece + step * at_once >= pieces:
            before = add_if(counters, Int32(lane == 0))
        chosen = []
        for turn in cutlass.range_constexpr(at_once):
            place = piece + turn * step
            row_block = Int32(Uint32(place) // Uint32(pieces_a_row))
            first = (place - row_block * pieces_a_row) * PIECE_TOKENS
            chosen.append((row_block, first, (tokens_total - first) * Int32(place < pieces)))
        convert_pieces(c_dtype, c, partials, chosen, tokens_total, row_blocks, lane)
    clear_tickets_if_last(counters, before, step, row_blocks, lane)


@cute.jit
def clear_tickets_if_last(counters, before, step, row_blocks, lane):
    """Who counts last clears the tickets for the next launch: a warp counts when its last poll has ended, so that nobody polls what is cleared.

    Args:
        before: in lane 0, how many warps had counted; step: of how many.
    """
    if ballot(Int32(lane == 0) & Int32(before == step - 1)) != 0:
        cute.arch.fence_acq_rel_gpu()
        for place in cutlass.range(lane, row_blocks + COUNTERS, 32, unroll=1):
            pr.inline_ptx_hl("st.relaxed.gpu.global.b32 [{$r0}], {$r1};", read_only_args=[counters + Int64(place) * 4, Uint32(0)])


# ---- the CTA that completes a row block


@cute.jit
def finish_rows(
    c_dtype: cutlass.Constexpr, c, partials, tickets, shared_mask, span, tile_count, row_blocks, k_blocks, group_rows, tokens_total, tid
):
    """The last step of a CTA that adds, where no others convert: tells each row block how many blocks it has added, and converts what is complete.

    Args:
        tickets: int32 ``[row_blocks]``, zero before the launch and after it; shared_mask: a word of shared memory.
        span: of all blocks those that the CTA has added, (first, end).
    """
    warp = cute.arch.make_warp_uniform(tid // 32)
    lane = tid % 32
    begin, end = span
    of_group = tile_count * group_rows * k_blocks
    first_group = Int32(Uint32(begin) // Uint32(of_group))
    first_row = first_group * group_rows
    touched = (Int32(Uint32(end + (of_group - 1)) // Uint32(of_group)) - first_group) * group_rows * Int32(end > begin)
    pr.barrier_cta_sync(0)  # every warp has added
    for base in cutlass.range(0, touched, 32, unroll=1):
        if warp == 0:
            own_row = first_row + base + lane
            added = before_in_row(end, own_row, group_rows, k_blocks, of_group) - before_in_row(begin, own_row, group_rows, k_blocks, of_group)
            added = added * Int32(base + lane < touched)
            cute.arch.fence_acq_rel_gpu()
            before = add_if(tickets + Int64(own_row) * 4, added)
            last = Int32(added > 0) & Int32(before + added == tile_count * k_blocks)
            store_if("b32", tickets + Int64(own_row) * 4, last, [Uint32(0)])
            mask = ballot(last)
            if mask != 0:
                cute.arch.fence_acq_rel_gpu()
            if lane == 0:
                shared_mask[0] = mask
        pr.barrier_cta_sync(0)
        mask = Uint32(shared_mask[0])
        turn = Int32(0)
        while mask != 0:
            row_block = first_row + base + lowest_bit(mask)
            mask = mask & (mask - 1)
            start = ((warp + turn) & (common.WARPS - 1)) * PIECE_TOKENS
            turn += pieces_of(tokens_total)
            if start < tokens_total:
                convert_pieces(c_dtype, c, partials, [(row_block, start, tokens_total - start)], tokens_total, row_blocks, lane)
        pr.barrier_cta_sync(0)


@cute.jit
def span_start(worker, quotient, longer, workers, total):
    """Where a worker's span of ``reduction.span_of`` begins, in blocks; behind the last one's end, the end."""
    return min(min(worker, workers) * quotient + min(worker, longer), total)


@cute.jit
def before_in_row(block, row, group_rows, k_blocks, of_group):
    """How many blocks of a row block lie before ``block`` of all."""
    group = row // group_rows
    place = min(max(block - group * of_group, Int32(0)), of_group)
    of_tile = group_rows * k_blocks
    tiles = Int32(Uint32(place) // Uint32(of_tile))
    return tiles * k_blocks + min(max(place - tiles * of_tile - (row - group * group_rows) * k_blocks, Int32(0)), k_blocks)


# ---- what both do


def pieces_of(tokens_total: Any) -> Any:
    """Pieces of one row block."""
    return (tokens_total + (PIECE_TOKENS - 1)) // PIECE_TOKENS


def convert_pieces(c_dtype: str, c: Any, partials: Any, chosen: list[Any], tokens_total: Any, row_blocks: Any, lane: Any) -> None:
    """One warp converts, stores and clears some pieces, ``PIECE_TOKENS`` tokens x 64 columns each; all its loads are in flight together.

    Args:
        chosen: (row block, first token, tokens from it on) of each.
    """
    column = (lane % LANES_A_ROW) * VECTOR
    row = lane // LANES_A_ROW
    hidden = Int64(row_blocks) * common.SUPERBLOCK_ROWS
    done = []
    for row_block, start, left in chosen:
        first = start + row
        sums = partials + (Int64(row_block) * Int64(tokens_total) + Int64(first)) * ROW_BYTES + Int64(column * 4)
        element = Int64(first) * hidden + Int64(row_block * common.SUPERBLOCK_ROWS + column)
        for place in range(0, PIECE_TOKENS, ROWS_AT_ONCE):
            exists = Int32(place + row < left)
            where = sums + place * ROW_BYTES
            done.append((where, exists, element + hidden * place, load_workspace_if(where, exists)))
    zeros = [Float32(0.0) for _ in range(VECTOR)]
    for where, exists, element, values in done:
        store_if("v4.f32", where, exists, zeros)
        store_row(c_dtype, c, element, exists, values)


def shared_word() -> Any:
    """A word of shared memory, in which one warp tells the others what is complete."""
    return cutlass.Array(Int32, 1, space=cutlass.AddressSpace.smem, alignment=4)


def add_if(address: Any, value: Any) -> Any:
    """Adds a value that is not 0 to a counter at device scope, relaxed; gives the one before."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; @p atom.relaxed.gpu.global.add.u32 {$w0}, [{$r0}], {$r1}; }",
        write_only_types=[Int32],
        read_only_args=[address, value],
    )


def load_ticket(address: Any) -> Any:
    """A ticket at device scope; what was written before it was last added to is seen behind it."""
    return pr.inline_ptx_hl("ld.acquire.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


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
