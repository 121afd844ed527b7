"""Sums of one unit's accumulators: over a CTA's warps through shared memory, over CTAs through slots in global memory, always in the same order.

Every warp of a CTA multiplies other K 128 blocks of the same unit (64 weight rows x ``tile_m`` tokens), so a unit ends with four partial sums:

    accumulators of a warp ──st.shared──► partials[warp] ──barrier──► row of a lane: eight sums of one token, added in the order of warps
    a unit that several workers share:  rows ──st.global──► slot of the worker ──► the first worker waits for them and adds them in order

Behind the barrier no warp waits for another of its CTA: two buffers of partial sums take turns, so that the barrier of the next unit is what tells
that a buffer has been read. Both orders are fixed by the shape and the grid, so that a launch gives the same bits every time.

Workers are CTAs counted from the last (``worker_of``). The unit that a worker's span begins inside of is the first thing that it multiplies, so its
part is in its slot long before the worker whose span ends there, which finishes the unit, has got so far: no ticket, no fence, and nobody waits but
the one that needs the sums. A slot's word is a sum with all bits inverted, and 0 where there is none yet: the word is its own flag (no sum has all
bits set, since arithmetic gives one NaN only, 0x7FFFFFFF). Who has read a slot leaves zeros, for the next launch.

No deadlock, whatever else runs on the device: a worker waits only for workers behind it, which are CTAs with a lower index, and CTAs begin in the
order of their indices; those that it waits for have begun, and wait in turn for earlier ones alone.

A row is two planes of four sums: rows g and g + 8 of the four m16 blocks. For FC1 these are up 4g … 4g + 3 and gate 4g … 4g + 3, for FC2 the even and
the odd ones of outputs 8g … 8g + 7 (docs/weight_layouts.md).
"""

from __future__ import annotations

from typing import Any, Final

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.sm90_epilogue import OUTPUTS
from densemoe.runtime.recipe import Workspace

PLANES: Final = 2  # rows g and g + 8
LANES_G: Final = 8
ROW_BYTES: Final = LANES_G * OUTPUTS * 4 + 16  # a token's 32 sums of a plane; 16 bytes apart from the next, so that no two lanes meet in a bank
ROW: Final = PLANES * OUTPUTS  # sums of a row
BATCH: Final = 4  # slots whose loads are in flight together
LARGEST_DOUBLE_TILE: Final = 16  # tile_m up to which two buffers of partial sums fit beside the rings of all resident CTAs


def rows_of_warp(config: common.Config) -> int:
    """Rows (of a token and four outputs) that each lane of a warp finishes; at 8 tokens two warps have none."""
    return max(1, config.token_blocks * 2 // common.WARPS)


def partial_bytes(config: common.Config) -> int:
    """Shared memory of one CTA's partial sums."""
    return common.WARPS * PLANES * config.tile_m * ROW_BYTES


def buffers(config: common.Config) -> int:
    """Buffers of partial sums that take turns: two, or one where shared memory has no room for more, which costs a barrier a unit."""
    return 2 if config.tile_m <= LARGEST_DOUBLE_TILE else 1


def shared_memory_bytes(config: common.Config) -> int:
    """Bytes of shared memory of a CTA: the rings and the partial sums."""
    return common.shared_memory_bytes(config) + buffers(config) * partial_bytes(config)


def shared_partials(config: common.Config) -> Any:
    """Shared-memory address of a CTA's partial sums."""
    return cutlass.Array(Uint8, buffers(config) * partial_bytes(config), space=cutlass.AddressSpace.smem, alignment=16).data_ptr().toint(Int32)


def workspaces(config: common.Config) -> tuple[Workspace, ...]:
    """A slot for each of the recipe's ``ctas``: its sums of the unit that its span begins inside of."""
    return (Workspace("workspace.slots", f"ctas * {slot_bytes(config)}", zeroed=True),)


def slot_bytes(config: common.Config) -> int:
    """Bytes of one slot."""
    return config.tile_m * common.SUPERBLOCK_ROWS * 4


def add(a: list[Any], b: list[Any]) -> list[Any]:
    """Element by element, each rounded once; never fused with what made an operand."""
    return [
        pr.inline_ptx_hl("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y]) for x, y in zip(a, b, strict=True)
    ]


def place_of_row(warp: Any, index: int, t: Any, config: common.Config) -> Any:
    """The token (of the tile) of a lane's row ``index``: token blocks and the two tokens of a lane are dealt out to the warps."""
    combination = warp + index * common.WARPS
    return (combination // 2) * common.MMA_TOKENS + t * 2 + combination % 2


def share_accumulators(config: common.Config, partials: Any, warp: Any, g: Any, t: Any, accumulators: list[Any]) -> None:
    """Stores a warp's accumulators ``[token block][m16 block][row g: 2t, 2t+1, row g + 8: 2t, 2t+1]`` where every warp finds them.

    Args:
        partials: shared-memory address of the CTA's partial sums.
    """
    own = partials + warp * (PLANES * config.tile_m * ROW_BYTES)
    for block in range(config.token_blocks):
        for pair in range(2):
            row = own + (block * common.MMA_TOKENS + t * 2 + pair) * ROW_BYTES + g * (OUTPUTS * 4)
            for plane in range(PLANES):
                at = block * common.M16_BLOCKS * common.ACCUMULATORS + 2 * plane + pair
                values = [accumulators[at + m16 * common.ACCUMULATORS] for m16 in range(common.M16_BLOCKS)]
                common.store_shared_v4(row + plane * (config.tile_m * ROW_BYTES), values)


def shared_rows(config: common.Config, partials: Any, warp: Any, t: Any, g: Any) -> list[Any]:
    """A lane's rows, each the eight sums of a token over the CTA's warps."""
    rows: list[Any] = []
    for index in range(rows_of_warp(config)):
        place = place_of_row(warp, index, t, config) * ROW_BYTES + g * (OUTPUTS * 4)
        total: list[Any] = []
        for other in range(common.WARPS):
            address = partials + other * (PLANES * config.tile_m * ROW_BYTES) + place
            values = [each for at in (address, address + config.tile_m * ROW_BYTES) for each in common.load_shared_v4(at, Float32)]
            total = add(total, values) if total else values
        rows += total
    return rows


def worker_of(bid: Any, ctas: Any) -> Any:
    """A CTA's place among all spans: the last CTA has the first, so that who waits for others (``sum_over_workers``) waits for earlier CTAs."""
    return ctas - 1 - bid


def slot_address(config: common.Config, slots: Any, worker: Any, warp: Any, index: int, lane: Any) -> Any:
    """Where a lane's row ``index`` lies in a worker's slot: 16 bytes a lane, its gates 512 bytes behind its ups."""
    return slots + Int64(worker) * slot_bytes(config) + Int64((warp + index * common.WARPS) * (PLANES * common.CHUNK_BYTES) + lane * 16)


def put_slot_words_if(address: Any, valid: Any, words: list[Any]) -> None:
    """Sixteen bytes of a slot where ``valid`` is not 0, each word on its own visible to other CTAs at some time."""
    pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; @p st.relaxed.gpu.global.v4.b32 [{$r0}], {{$r2}, {$r3}, {$r4}, {$r5}}; }",
        read_only_args=[address, valid, *words],
    )


def get_slot_words_if(address: Any, valid: Any) -> list[Any]:
    """Sixteen bytes of a slot as four words; where ``valid`` is 0 nothing is read, and they are those of sums that are 0."""
    return list(
        pr.inline_ptx_hl(
            "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, -1; mov.b32 {$w1}, -1; mov.b32 {$w2}, -1; mov.b32 {$w3}, -1;"
            " @p ld.relaxed.gpu.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }",
            write_only_types=[Uint32] * 4,
            read_only_args=[address, valid],
        )
    )


def inverted(value: Any, dtype: Any) -> Any:
    """All bits of a 32-bit value inverted, as ``dtype``."""
    return pr.inline_ptx_hl(
        "{ .reg .b32 t; mov.b32 t, {$r0}; not.b32 t, t; mov.b32 {$w0}, t; }", write_only_types=[dtype], read_only_args=[value]
    )


def store_row_to_slot(address: Any, live: Any, row: list[Any]) -> None:
    """Stores a lane's eight sums where ``live`` is not 0."""
    words = [inverted(each, Uint32) for each in row]
    put_slot_words_if(address, live, words[:OUTPUTS])
    put_slot_words_if(address + common.CHUNK_BYTES, live, words[OUTPUTS:])


def finishing_warps(config: common.Config) -> int:
    """Warps that have rows to finish; at 8 tokens two of the four."""
    return min(common.WARPS, config.token_blocks * 2)


@cute.jit
def span_of(cta, ctas, units, length, smallest):
    """A worker's share of the blocks of all units, ``length`` each, laid end to end: (unit, block in it, blocks, quotient, longer).

    The first ``longer`` of the workers that have work have ``quotient`` + 1 blocks, the others ``quotient``. A worker takes at least ``smallest``
    blocks, to hide latency, so with few blocks not all CTAs work. Unsigned 32-bit throughout, divisions too: only the number of all blocks may be
    larger.
    """
    most = (Int64(units) * Int64(length) + (smallest - 1)) // smallest
    workers = ctas
    if most < Int64(ctas):
        workers = max(Uint32(most), Uint32(1))
    whole = units // workers  # units a CTA, then blocks of the rest
    rest = (units - whole * workers) * length
    share = rest // workers
    longer = rest - share * workers
    unit = units
    inside = Uint32(0)
    blocks = Uint32(0)
    if cta < workers:
        start = cta * share + min(cta, longer)
        skipped = start // length
        unit = cta * whole + skipped
        inside = start - skipped * length
        blocks = whole * length + share + Uint32(cta < longer)
    return unit, inside, blocks, whole * length + share, longer


@cute.jit
def sharing_workers(unit, inside, length, quotient, longer, worker):
    """(first worker, number of workers) of a unit that several spans share; ``inside``: its first block in this worker's span."""
    first = worker - Uint32(inside != 0)
    sharing = Uint32(2)  # spans at least as long as a unit
    if quotient < length:  # all blocks together are then fewer than 2**32
        begin = unit * length
        first = owner(begin, quotient, longer)
        sharing = owner(begin + (length - 1), quotient, longer) - first + 1
    return first, sharing


@cute.jit
def owner(block, quotient, longer):
    """The worker whose span has a block."""
    border = longer * (quotient + 1)
    beyond = Uint32(block >= border)
    return longer * beyond + (block - border * beyond) // max(quotient + 1 - beyond, Uint32(1))


@cute.jit
def sum_over_workers(config: cutlass.Constexpr, sums, live, slots, shared, worker, turn, lane):
    """A lane's rows summed over the workers that share a unit, in the first of them; the others leave theirs in their slots.

    Args:
        sums: the lane's rows over the CTA's warps; live: for each row whether it exists.
        shared: of ``sharing_workers``; turn: which of the finishing warps this one is.

    Returns:
        The sums, and 1 in the first worker, else 0: the sums are then its own alone.
    """
    first, sharing = Int32(shared[0]), Int32(shared[1])
    finish = Int32(worker == first)
    if finish == 0:
        for index in cutlass.range_constexpr(rows_of_warp(config)):
            address = slot_address(config, slots, worker, turn, index, lane)
            store_row_to_slot(address, live[index], sums[index * ROW : (index + 1) * ROW])
    else:
        for start in cutlass.range(1, sharing, BATCH, unroll=1):
            sums = add_slots(config, sums, live, slots, first + start, sharing - start, turn, lane)
    return sums, finish


@cute.jit
def add_slots(config: cutlass.Constexpr, sums, live, slots, worker, count, turn, lane):
    """``sums`` with those in the slots of up to ``BATCH`` workers added, one worker after the other; waits until they are there, and clears them.

    Args:
        worker: the first of the ``count`` workers.
    """
    for index in cutlass.range_constexpr(rows_of_warp(config)):
        addresses = [slot_address(config, slots, worker + i, turn, index, lane) for i in range(BATCH)]
        valid = [live[index] & Int32(i < count) for i in range(BATCH)]
        planes = [address + plane * common.CHUNK_BYTES for address in addresses for plane in range(PLANES)]
        words = words_when_there(planes, [each for each in valid for _ in range(PLANES)])
        row = sums[index * ROW : (index + 1) * ROW]
        for i in cutlass.range_constexpr(BATCH):
            row = add_words(row, words[i * ROW : (i + 1) * ROW])
            for plane in planes[i * PLANES : (i + 1) * PLANES]:
                put_slot_words_if(plane, valid[i], [Uint32(0)] * OUTPUTS)
        sums = sums[: index * ROW] + row + sums[(index + 1) * ROW :]
    return sums


@cute.jit
def words_when_there(addresses, valid):
    """The words of slots at some addresses, four each, once none of any lane is missing."""
    words = get_words(addresses, valid)
    while not all_there(words):
        words = get_words(addresses, valid)
    return words


def get_words(addresses: list[Any], valid: list[Any]) -> list[Any]:
    """The words of slots at some addresses, four each, missing ones among them."""
    return [word for address, each in zip(addresses, valid, strict=True) for word in get_slot_words_if(address, each)]


def add_words(sums: list[Any], words: list[Any]) -> list[Any]:
    """``sums`` with those that a slot's words stand for added."""
    return add(sums, [inverted(word, Float32) for word in words])


def all_there(words: list[Any]) -> Any:
    """Whether none of the words of any lane is 0."""
    least = words[0]
    for word in words[1:]:
        least = pr.inline_ptx_hl("min.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[least, word])
    return Int32(ballot_zero(least)) == 0


def ballot_zero(word: Any) -> Any:
    """A bit for each lane whose word is 0."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.eq.u32 p, {$r0}, 0; vote.sync.ballot.b32 {$w0}, p, 0xffffffff; }", write_only_types=[Uint32], read_only_args=[word]
    )
