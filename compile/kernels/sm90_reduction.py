"""Sums of one unit's accumulators: over a CTA's warps through shared memory, over CTAs through slots in global memory, always in the same order.

Every warp of a CTA multiplies other K 128 blocks of the same unit (64 weight rows x ``tile_m`` tokens), so a unit ends with four partial sums:

    accumulators of a warp ──st.shared──► partials[warp] ──barrier──► row of a lane: eight sums of one token, added in the order of warps
    a unit that several CTAs share:  rows ──st.global──► slot of the CTA ─ ticket ─ the last one adds all slots in the order of CTAs

Behind the barrier no warp waits for another: each warp that finishes rows has a ticket of its own, and two buffers of partial sums take turns, so
that the barrier of the next unit is what tells that a buffer has been read.

Both orders are fixed by the shape and the grid, so that a launch gives the same bits every time. A CTA has two slots: 0 for the unit that its span
begins inside of, 1 for the one that its span ends inside of.

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
from densemoe.compile.kernels.sm90_epilogue import OUTPUTS, store_if
from densemoe.runtime.recipe import Workspace

PLANES: Final = 2  # rows g and g + 8
LANES_G: Final = 8
ROW_BYTES: Final = LANES_G * OUTPUTS * 4 + 16  # a token's 32 sums of a plane; 16 bytes apart from the next, so that no two lanes meet in a bank
SLOTS: Final = 2  # of a CTA
ROW: Final = PLANES * OUTPUTS  # sums of a row
BATCH: Final = 8  # slots whose loads are in flight together
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


def shared_word() -> Any:
    """A word of shared memory, in which one thread tells the others of a ticket."""
    return cutlass.Array(Int32, 1, space=cutlass.AddressSpace.smem, alignment=4)


def workspaces(config: common.Config) -> tuple[Workspace, ...]:
    """Slots for the sums of units that several of the recipe's ``ctas`` share, and tickets: of each warp for the units that a CTA begins."""
    return (
        Workspace("workspace.slots", f"ctas * {SLOTS * slot_bytes(config)}"),
        Workspace("workspace.tickets", f"ctas * {common.WARPS * 4}", zeroed=True),
    )


def slot_bytes(config: common.Config) -> int:
    """Bytes of one slot."""
    return config.tile_m * common.SUPERBLOCK_ROWS * 4


def store_shared_v4(address: Any, values: list[Any]) -> None:
    """Sixteen bytes to shared memory."""
    pr.inline_ptx_hl("st.shared.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *values])


def load_shared_v4(address: Any) -> list[Any]:
    """Sixteen bytes of shared memory as four float32."""
    return list(pr.inline_ptx_hl("ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Float32] * 4, read_only_args=[address]))


def load_global_v4_f32_if(address: Any, valid: Any) -> list[Any]:
    """Four float32 of global memory past the L1, where ``valid`` is not 0, else zeros."""
    return list(
        pr.inline_ptx_hl(
            "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
            " @p ld.relaxed.gpu.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }",
            write_only_types=[Float32] * 4,
            read_only_args=[address, valid],
        )
    )


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
                store_shared_v4(row + plane * (config.tile_m * ROW_BYTES), values)


def shared_rows(config: common.Config, partials: Any, warp: Any, t: Any, g: Any) -> list[Any]:
    """A lane's rows, each the eight sums of a token over the CTA's warps."""
    rows: list[Any] = []
    for index in range(rows_of_warp(config)):
        place = place_of_row(warp, index, t, config) * ROW_BYTES + g * (OUTPUTS * 4)
        total: list[Any] = []
        for other in range(common.WARPS):
            address = partials + other * (PLANES * config.tile_m * ROW_BYTES) + place
            values = load_shared_v4(address) + load_shared_v4(address + config.tile_m * ROW_BYTES)
            total = add(total, values) if total else values
        rows += total
    return rows


def slot_address(config: common.Config, slots: Any, cta: Any, which: Any, warp: Any, index: int, lane: Any) -> Any:
    """Where a lane's row ``index`` lies in a slot: 16 bytes a lane, its gates 512 bytes behind its ups."""
    slot = Int64(cta * SLOTS + which) * slot_bytes(config)
    return slots + slot + Int64((warp + index * common.WARPS) * (PLANES * common.CHUNK_BYTES) + lane * 16)


def store_row_to_slot(address: Any, live: Any, row: list[Any]) -> None:
    """Stores a lane's eight sums where ``live`` is not 0."""
    store_if("v4.f32", address, live, row[:OUTPUTS])
    store_if("v4.f32", address + common.CHUNK_BYTES, live, row[OUTPUTS:])


def add_slots(
    config: common.Config, sums: list[Any], slots: Any, first_cta: Any, start: Any, sharing: Any, warp: Any, lane: Any, live: list[Any]
) -> list[Any]:
    """``sums`` (a lane's rows) with those in the slots of ``BATCH`` CTAs added, one CTA after the other.

    Args:
        first_cta: the first of the ``sharing`` CTAs of the unit; ``start``: which of them is the first to be added.
        live: for each row whether it exists; where it does not, nothing is read.
    """
    result = []
    for index in range(rows_of_warp(config)):
        loaded = []
        for i in range(BATCH):
            which = Int32(start + i == 0)  # the first one's span ends inside of the unit, the others' begin inside of it
            address = slot_address(config, slots, first_cta + start + i, which, warp, index, lane)
            valid = live[index] & Int32(start + i < sharing)
            loaded.append(load_global_v4_f32_if(address, valid) + load_global_v4_f32_if(address + common.CHUNK_BYTES, valid))
        row = sums[index * ROW : (index + 1) * ROW]
        for values in loaded:
            row = add(row, values)
        result += row
    return result


def finishing_warps(config: common.Config) -> int:
    """Warps that have rows to finish; at 8 tokens two of the four."""
    return min(common.WARPS, config.token_blocks * 2)


@cute.jit
def span_of(cta, ctas, units, length, smallest):
    """A CTA's share of the blocks of all units, ``length`` each, laid end to end: (unit, block in it, blocks, quotient, longer).

    The first ``longer`` of the CTAs that work have ``quotient`` + 1 blocks, the others ``quotient``. A CTA takes at least ``smallest`` blocks, to
    hide latency, so with few blocks not all CTAs work. Unsigned 32-bit throughout, divisions too: only the number of all blocks may be larger.
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
def sharing_ctas(unit, inside, length, quotient, longer, cta):
    """(first CTA, number of CTAs) of a unit that several spans share; ``inside``: its first block in this CTA's span."""
    first = cta - Uint32(inside != 0)
    sharing = Uint32(2)  # spans at least as long as a unit
    if quotient < length:  # all blocks together are then fewer than 2**32
        begin = unit * length
        first = owner(begin, quotient, longer)
        sharing = owner(begin + (length - 1), quotient, longer) - first + 1
    return first, sharing


@cute.jit
def owner(block, quotient, longer):
    """The CTA whose span has a block."""
    border = longer * (quotient + 1)
    beyond = Uint32(block >= border)
    return longer * beyond + (block - border * beyond) // max(quotient + 1 - beyond, Uint32(1))


@cute.jit
def sum_over_ctas(config: cutlass.Constexpr, sums, live, slots, tickets, shared, cta, turn, lane):
    """A lane's rows summed over the CTAs that share a unit, for the warp of them that comes last.

    Args:
        sums: the lane's rows over the CTA's warps; live: for each row whether it exists.
        shared: of ``sharing_ctas``; turn: which of the finishing warps this one is.

    Returns:
        The sums, and 1 in the warp that comes last, else 0: the sums are then its own alone.
    """
    first_cta, sharing = Int32(shared[0]), Int32(shared[1])
    for index in cutlass.range_constexpr(rows_of_warp(config)):
        address = slot_address(config, slots, cta, Int32(cta == first_cta), turn, index, lane)
        store_row_to_slot(address, live[index], sums[index * ROW : (index + 1) * ROW])
    cute.arch.sync_warp()  # every lane has stored; the release that follows makes it known to the device
    counter = tickets + (Int64(first_cta) * common.WARPS + Int64(turn)) * 4
    taken = Int32(0)
    if lane == 0:
        taken = release_ticket(counter)
    finish = Int32(shuffle_first(taken) == sharing - 1)
    if finish != 0:
        if lane == 0:
            cute.arch.fence_acq_rel_gpu()
            store_if("b32", counter, Int32(1), [Uint32(0)])
        cute.arch.sync_warp()
        sums = common.zero_accumulators(rows_of_warp(config) * ROW)
        for start in cutlass.range(0, sharing, BATCH, unroll=1):
            sums = add_slots(config, sums, slots, first_cta, start, sharing, turn, lane, live)
    return sums, finish


def shuffle_first(value: Any) -> Any:
    """Lane 0's value, in every lane."""
    return pr.inline_ptx_hl("shfl.sync.idx.b32 {$w0}, {$r0}, 0, 0x1f, 0xffffffff;", write_only_types=[type(value)], read_only_args=[value])


def release_ticket(address: Any) -> Any:
    """Adds 1 to a counter, with release at device scope; gives the value before. Who comes last fences before it reads what others stored."""
    return pr.inline_ptx_hl("atom.release.gpu.global.add.u32 {$w0}, [{$r0}], 1;", write_only_types=[Int32], read_only_args=[address])


def take_ticket(address: Any) -> Any:
    """Adds 1 to a counter, with acquire and release at device scope; gives the value before."""
    return pr.inline_ptx_hl("atom.acq_rel.gpu.global.add.u32 {$w0}, [{$r0}], 1;", write_only_types=[Int32], read_only_args=[address])
