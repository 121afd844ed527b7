"""FC2 for sm_90a over gathered tokens: the layer's output from FC1's compact rows, stream-K over the tiles of ``route`` (contract section 5).

An item is 64 columns of a tile (up to ``tile_m`` rows of one expert) over the expert's K. Items lie in the order of the packed weights within groups
of row blocks: all tiles of one group, then those of the next; of a tile the group's row blocks one behind the other, so that a warp reads its weights
in a row and its activations from the L1. All items' K 128 blocks are cut into equal spans, one a warp, wherever that is:

    per item:  ring ─ wait ─ decode ─ mma.sync ─ refill;  workspace[token] += row_alpha · accumulators (sm90_workspace: whole rows)
    per CTA:   when it has added all, it says so; then the sums are converted, by the CTA that completes a row block or by CTAs behind all that add,
               and are zero again (sm90_conversion)

Up to 64 tokens a group has as few row blocks as leaves little to convert for the CTA that completes it; beyond, four: an expert's next tile still
finds the weights in the L2. Words, rows and scales of a tile are loaded a tile ahead of their use, the expert whose weights the ring fetches too, and
at 8 tokens activations a block ahead.

Run-time setting ``early_list``: what ``route`` wrote was complete before the launch that precedes this one began, so that weights are fetched before
it ends. The workspace and the counters are zero between launches: each launch leaves them as it found them, so CUDA graphs may replay it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import Expected, sm90_fc2
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_conversion as conversion
from densemoe.compile.kernels import sm90_lists as lists
from densemoe.compile.kernels import sm90_ordered as ordered
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels import sm90_workspace as workspace
from densemoe.compile.kernels.host import pointer
from densemoe.runtime.errors import VariantError
from densemoe.runtime.recipe import Parameter, Recipe, pointer_or_null
from densemoe.runtime.variant import DETERMINISTIC, ROUTES, Variant

OP = "groupedfc2"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
RESIDENT_CTAS = {8: 4, 16: 3}
SMALLEST_SPAN = 1  # K 128 blocks of a warp
LARGEST_GROUP = 4  # row blocks
ORDERED_AT_ONCE = 16  # rows that a lane of a converting warp loads together, where they are added in order
CONVERTED_AT_ONCE = {8: 1, 16: 2}  # pieces whose loads a converting warp has in flight, as registers allow


@cute.kernel
def groupedfc2_kernel(
    a: cutlass.Pointer,
    a_scales: cutlass.Pointer,
    b: cutlass.Pointer,
    row_alpha: cutlass.Pointer | None,
    c: cutlass.Pointer,
    partials: cutlass.Pointer,
    counters: cutlass.Pointer,
    tiles: cutlass.Pointer | None,
    rows: cutlass.Pointer | None,
    places: cutlass.Pointer | None,
    slots: cutlass.Pointer | None,
    tokens_total: Int32,
    top_k: Int32 | None,
    hidden: Int32,
    intermediate: Int32,
    group_rows: Int32,
    adding: Int32,
    waits_first: Int32,
    ids: cutlass.Pointer | None,
    id_bytes: Int32 | None,
    first_expert: Int32 | None,
    elsewhere: Int32 | None,
    router: cutlass.Pointer | None,
    w2_alpha: cutlass.Pointer | None,
    experts: Int32 | None,
    config: cutlass.Constexpr,
):
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    row_blocks = Int32(Uint32(hidden) // common.SUPERBLOCK_ROWS)
    choice = (ids, id_bytes, first_expert, elsewhere, router, w2_alpha)
    if bid < adding:
        tile_count, span, of_group = add_items(
            config, a, a_scales, b, row_alpha, partials, tiles, rows, slots, tokens_total, top_k, hidden, intermediate, group_rows, adding,
            waits_first, choice, experts, tid, bid,
        )  # fmt: skip
        if cutlass.const_expr(config.ordered):  # noqa: SIM114 - as one condition both branches would be compiled
            group = Int32(Uint32(span[0]) // Uint32(of_group))
            conversion.hand_over(counters, group, span[0] - group * of_group, span[1] - span[0], of_group, tid)
        elif ctas != adding:
            group = Int32(Uint32(span[0]) // Uint32(of_group))
            conversion.hand_over(counters, group, span[0] - group * of_group, span[1] - span[0], of_group, tid)
        else:
            tickets = counters + conversion.TICKETS_AT
            k_blocks = common.k_blocks_of(intermediate)
            conversion.finish_rows(
                config.c_dtype, c, partials, tickets, conversion.shared_word(), span, tile_count, row_blocks, k_blocks, group_rows, tokens_total, tid
            )  # fmt: skip
    else:
        if cutlass.const_expr(not config.routes):  # of so few tokens whoever completes a row block converts it
            pr.griddepcontrol("launch_dependents")
            pr.griddepcontrol("wait")
            k_blocks = common.k_blocks_of(intermediate)
            tile_count = common.load_global_s32_or(tiles, Int32(1), Int32(0))
            of_group = tile_count * group_rows * k_blocks
            if cutlass.const_expr(config.ordered):
                ordered.convert(
                    ORDERED_AT_ONCE, common.WARPS, config.c_dtype, c, partials, places, counters, of_group, group_rows,
                    bid - adding, ctas - adding, tokens_total, top_k, row_blocks, tid,
                )  # fmt: skip
            else:
                at_once = CONVERTED_AT_ONCE[config.tile_m]
                conversion.convert(
                    at_once, common.WARPS, config.c_dtype, c, partials, counters, of_group, group_rows, bid - adding, ctas - adding, tokens_total,
                    row_blocks, tid,
                )  # fmt: skip


@cute.jit
def add_items(
    config: cutlass.Constexpr, a, a_scales, b, row_alpha, partials, tiles, rows, slots, tokens_total, top_k, hidden, intermediate, group_rows, adding,
    waits_first, choice, experts, tid, bid,
):  # fmt: skip
    """A CTA's spans of all items, added to the workspace, or stored there; arguments as the kernel's.

    Returns:
        How many tiles there are; of all blocks those that were added, (first, end); blocks of a group of row blocks.
    """
    warp = cute.arch.make_warp_uniform(tid // 32)
    lane = tid % 32
    g = lane // 4
    t = lane % 4
    stages = config.stages
    superblock = common.SUPERBLOCK_BYTES
    k_blocks = common.k_blocks_of(intermediate)  # of an item
    row_blocks = Int32(Uint32(hidden) // common.SUPERBLOCK_ROWS)
    expert_bytes = Int64(row_blocks * k_blocks) * superblock

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * superblock))
    barriers = all_barriers.subview(warp * stages)
    staged = workspace.staged_rows(workspace.MMA_ROWS, common.WARPS) + warp * workspace.staged_bytes(workspace.MMA_ROWS)
    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()

    if waits_first != 0:
        pr.griddepcontrol("wait")  # the lists, which say what weights are read, may come from the launch before
    pr.griddepcontrol("launch_dependents")
    if cutlass.const_expr(config.routes):
        cutlass.Array(Uint8, filling(config), space=cutlass.AddressSpace.smem, alignment=4)
        tile_count, tiles, rows, *row_alpha = lists.sort_choice(config.tile_m, True, choice, tokens_total * top_k, top_k, experts, lane)
    else:
        tile_count = common.load_global_s32_or(tiles, Int32(1), Int32(0))

    # the warp's span of all items' blocks, laid end to end: neighbours in the packed weights but where the tile changes
    workers = Uint32(adding) * common.WARPS  # CTAs behind them have no blocks
    worker = Uint32(bid * common.WARPS + warp)
    if cutlass.const_expr(config.ordered):
        worker = workers - 1 - worker  # who waits for others' sums waits for earlier CTAs
    span = reduction.span_of(worker, workers, Uint32(tile_count * row_blocks), Uint32(k_blocks), SMALLEST_SPAN)
    item, k, left = (Int32(each) for each in span[:3])
    begun = Int32(k != 0)  # the first item begins in the span before
    quotient, longer = span[3:]
    group = Int32(Uint32(item) // Uint32(tile_count * group_rows))
    tile = Int32(Uint32(item - group * tile_count * group_rows) // Uint32(group_rows))
    row = item - (group * tile_count + tile) * group_rows  # in its group
    of_tile = group_rows * k_blocks  # blocks of a tile in a group
    to_fetch = left
    lane_tiles = tiles
    if cutlass.const_expr(not config.routes):
        lane_tiles = tiles + common.lane_zero(lane)  # what is loaded by it stays in lanes' registers
    words = tile_words(config, lane_tiles, tile, Int32(left > 0))
    fetch_left = of_tile - row * k_blocks - k  # blocks of the span that this tile has at most
    words_after = tile_words(config, lane_tiles, tile_behind(tile, tile_count), Int32(left > fetch_left))

    # what the ring fetches next, and the expert of the tile behind it
    fetch_tile = tile
    fetch_group = group
    expert_ahead = words_after[0]
    source = b + Int64(words[0]) * expert_bytes + Int64((group * group_rows + row) * k_blocks + k) * superblock
    for i in cutlass.range_constexpr(stages):
        if to_fetch > 0:
            if lane == 0:
                common.start_copy(ring, barriers, i, source)
            to_fetch -= 1
            source = source + superblock
            fetch_left -= 1
            if (fetch_left == 0) & (to_fetch > 0):
                fetch_left = of_tile
                fetch_tile = tile_behind(fetch_tile, tile_count)
                fetch_group += Int32(fetch_tile == 0)
                source = b + Int64(expert_ahead) * expert_bytes + Int64(fetch_group * of_tile) * superblock
                expert_ahead = tile_words(config, lane_tiles, tile_behind(fetch_tile, tile_count), Int32(to_fetch > of_tile))[0]
    scale, token = row_of(config, rows, row_alpha, words, lane)
    first_row = words[1]
    count = words[2]
    sources, exists = sources_of(config, a, a_scales, words, intermediate, g, t)

    pr.griddepcontrol("wait")  # weights do not depend on the launch before; activations and the workspace do
    stage = Int32(0)
    phase = Int32(0)
    first = Int32(left > 0)
    valid = [each & first for each in exists]
    if cutlass.const_expr(unroll(config) == 1):
        valid = exists
    halves: Any = []
    if cutlass.const_expr(unroll(config) > 1):
        halves = [common.load_half(config, sources, valid, k, half, intermediate) for half in range(common.K64_HALVES)]
    accumulated = config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS
    accumulators = common.zero_accumulators(accumulated)
    while left > 0:
        # ---- a tile: up to its last row block in the group, or the span's end
        in_tile = min(left, of_tile - row * k_blocks - k)
        left -= in_tile
        own_group = group
        tile = tile_behind(tile, tile_count)
        group += Int32(tile == 0)
        words_next = tile_words(config, lane_tiles, tile_behind(tile, tile_count), Int32(left > of_tile))
        scale_after, token_after = row_of(config, rows, row_alpha, words_after, lane)
        while in_tile > 0:
            for copy in cutlass.range_constexpr(unroll(config)):  # loaded activations need not move from one set of registers to the other
                if in_tile > 0:
                    in_tile -= 1
                    loaded = halves
                    if cutlass.const_expr(unroll(config) == 1):
                        loaded = [common.load_half(config, sources, valid, k, half, intermediate) for half in range(common.K64_HALVES)]
                    k += 1
                    ends = Int32(k == k_blocks)
                    at = k * (ends ^ 1)
                    if in_tile == 0:  # the warp's next block is the next tile's, if it has one
                        sources, exists = sources_of(config, a, a_scales, words_after, intermediate, g, t)
                        more = Int32(left > 0)
                        valid = [each & more for each in exists]
                        at = Int32(0)
                    if cutlass.const_expr(unroll(config) > 1):
                        halves = [common.load_half(config, sources, valid, at, half, intermediate) for half in range(common.K64_HALVES)]
                    common.wait(barriers.subview(stage), phase)
                    accumulators = common.multiply_superblock(
                        config, accumulators, ring.subview(stage * superblock + lane * 16).data_ptr(), loaded
                    )
                    cute.arch.sync_warp()  # every lane has read the stage
                    if to_fetch > 0:
                        if lane == 0:
                            common.start_copy(ring, barriers, stage, source)
                        to_fetch -= 1
                        source = source + superblock
                        fetch_left -= 1
                        if (fetch_left == 0) & (to_fetch > 0):
                            fetch_left = of_tile
                            fetch_tile = tile_behind(fetch_tile, tile_count)
                            fetch_group += Int32(fetch_tile == 0)
                            source = b + Int64(expert_ahead) * expert_bytes + Int64(fetch_group * of_tile) * superblock
                            expert_ahead = tile_words(config, lane_tiles, tile_behind(fetch_tile, tile_count), Int32(to_fetch > of_tile))[0]
                    stage += 1
                    if stage == stages:
                        stage = Int32(0)
                        phase = phase ^ 1
                    if (ends != 0) | (in_tile == 0):  # the item's part of this span is done
                        row_block = own_group * group_rows + row
                        if cutlass.const_expr(config.ordered):
                            if begun != 0:
                                ordered.store_slot(config, slots, worker, accumulators, lane)
                            else:
                                if ends == 0:
                                    total = Uint32(tile_count * row_blocks * k_blocks)
                                    sharing = ordered.workers_sharing(worker, Uint32(k_blocks), quotient, longer, workers, total)
                                    accumulators = ordered.add_slots(config, accumulators, slots, Int32(worker), sharing, lane)
                                own_rows = partials + (Int64(row_block) * Int64(tokens_total * top_k) + Int64(first_row)) * conversion.ROW_BYTES
                                ordered.store_rows(config, workspace.MMA_ROWS, own_rows, staged, accumulators, [scale], count, lane)
                            begun = Int32(0)
                        else:
                            workspace.add_item(config, partials, row_block, tokens_total, staged, accumulators, scale, token, count, lane)
                        accumulators = workspace.cleared(accumulated)
                        row += ends
                        k = k * (ends ^ 1)
                elif cutlass.const_expr(copy > 0):
                    halves = common.moved(halves)  # here, where few tiles end, and not before the branch
        row = Int32(0)
        scale = scale_after
        token = token_after
        first_row = words_after[1]
        count = words_after[2]
        words_after = words_next
    total = Uint32(tile_count * row_blocks * k_blocks)
    own = Uint32(bid * common.WARPS)
    if cutlass.const_expr(config.ordered):
        own = workers - common.WARPS - own
    borders = [Int32(conversion.span_start(own + i * common.WARPS, quotient, longer, workers, total)) for i in range(2)]
    return tile_count, borders, tile_count * of_tile


def unroll(config: common.Config) -> int:
    """Steps of the main loop: two sets of activations take turns; beyond 8 tokens they would take the registers of a resident CTA, and activations
    are loaded where they are used."""
    return common.UNROLL if config.tile_m < 16 else 1


def row_of(config: common.Config, rows: Any, row_alpha: Any, words: list[Any], lane: Any) -> tuple[Any, Any]:
    """(scale, token) of row ``lane`` of a tile; a row that is stored as its own needs no token."""
    if config.ordered:
        return common.load_global_f32_if(row_alpha + Int64(words[1] + lane) * 4, Int32(lane < words[2])), Int32(0)
    if config.routes:
        return lists.row_of(rows, *row_alpha, words, lane)
    return workspace.row_of(rows, row_alpha, words, lane)


def tile_words(config: common.Config, tiles: Any, index: Any, exists: Any) -> list[Any]:
    """[expert, first row, rows] of a tile of ``route``, zeros where there is none; the head of the list is as long as a tile."""
    if config.routes:
        return lists.tile_words(tiles, index, exists)
    return [Int32(each) for each in common.load_global_v4_if(tiles + (Int64(index) + 1) * 16, exists)[:3]]


def sources_of(
    config: common.Config, a: Any, a_scales: Any, words: list[Any], intermediate: Any, g: Any, t: Any
) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """Where a lane's activations of a tile lie, and whether there are some, by token block."""
    _, first_row, count = words
    places, exists = common.lane_tokens(config, first_row, g, first_row + count)
    return common.lane_sources(config, a, a_scales, places, Int32(0), intermediate, t), exists


def tile_behind(tile: Any, tile_count: Any) -> Any:
    """The tile after another, the first one behind the last."""
    return (tile + 1) * Int32(tile + 1 < tile_count)


POWERS = tuple(1 << power for power in range(1, LARGEST_GROUP.bit_length()))


def group_rows_of(finished_up_to: int) -> str:
    """Row blocks of a group, as a recipe has it: a power of two that divides them all, up to some tokens as large as leaves little to convert for the
    CTA that completes a group."""
    rows = "1"
    for each in POWERS:
        fits = f"((M <= {finished_up_to // each}) + (M > {finished_up_to}))"
        rows = f"{each} if (row_blocks % {each} == 0) * {fits} else ({rows})"
    return rows


@cute.jit
def rows_of_group(tokens, row_blocks, at_most: cutlass.Constexpr):
    """``group_rows`` on the compiler's own host side."""
    rows = Int32(1)
    for power in cutlass.range_constexpr(len(POWERS)):
        fits = Int32(tokens <= at_most // POWERS[power]) | Int32(tokens > at_most)
        if (row_blocks % POWERS[power] == 0) & (fits != 0):
            rows = Int32(POWERS[power])
    return rows


@cute.jit
def groupedfc2_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    row_alpha: cute.Pointer,
    c: cute.Pointer,
    partials: cute.Pointer,
    counters: cute.Pointer,
    tiles: cute.Pointer,
    rows: cute.Pointer,
    slots: cute.Pointer,
    ids: cute.Pointer,
    router: cute.Pointer,
    w2_alpha: cute.Pointer,
    tokens_total: Int32,
    top_k: Int32,
    hidden: Int32,
    intermediate: Int32,
    early_list: Int32,
    experts: Int32,
    id_bytes: Int32,
    first_expert: Int32,
    elsewhere: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    groupedfc2_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    row_blocks = hidden // common.SUPERBLOCK_ROWS
    adding = min((tokens_total * top_k * k_blocks * row_blocks + (common.WARPS - 1)) // common.WARPS, sm_count * config.resident_ctas)
    beyond = finished_up_to(config)
    converting = conversion.converting_ctas(tokens_total, row_blocks, sm_count, common.WARPS, config.resident_ctas, beyond)
    ordered_form = cutlass.const_expr(config.ordered)
    if ordered_form:
        converting = ordered.converting_ctas(tokens_total, top_k, row_blocks, sm_count, ORDERED_AT_ONCE, common.WARPS, config.resident_ctas)
    groupedfc2_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        None if config.routes else row_alpha.raw_ptr(),
        c.raw_ptr(),
        partials.raw_ptr(),
        counters.raw_ptr(),
        None if config.routes else tiles.raw_ptr(),
        None if ordered_form or config.routes else rows.raw_ptr(),
        rows.raw_ptr() if ordered_form else None,
        slots.raw_ptr() if ordered_form else None,
        tokens_total,
        top_k if ordered_form or config.routes else None,
        hidden,
        intermediate,
        rows_of_group(tokens_total, row_blocks, beyond),
        adding,
        1 - early_list,
        ids.raw_ptr() if config.routes else None,
        id_bytes if config.routes else None,
        first_expert if config.routes else None,
        elsewhere if config.routes else None,
        router.raw_ptr() if config.routes else None,
        w2_alpha.raw_ptr() if config.routes else None,
        experts if config.routes else None,
        config,
    ).launch(
        grid=(adding + converting, 1, 1),
        block=[common.WARPS * 32, 1, 1],
        min_blocks_per_mp=config.resident_ctas,
        preferred_smem_carveout=100,
        stream=stream,
        use_pdl=True,
    )


def config_of(variant: Variant) -> common.Config:
    """The compile-time parameters of ``variant``: those of the dense kernel, with more CTAs an SM where sums of one expert alone are held."""
    return common.config_of(variant, RESIDENT_CTAS, sm90_fc2.PREFETCH_UP_TO)


def finished_up_to(config: common.Config) -> int:
    """Tokens up to which the CTA that completes a row block converts it; where rows are added in order, CTAs behind all others always do."""
    return 0 if config.ordered else conversion.LARGEST_FINISHED


def used_smem(config: common.Config) -> int:
    """Bytes of shared memory: the rings, rows on their way, the mask of ``finish_rows``."""
    return common.shared_memory_bytes(config) + common.WARPS * workspace.staged_bytes(workspace.MMA_ROWS) + (0 if config.ordered else 4)


def filling(config: common.Config) -> int:
    """Bytes of shared memory that nobody uses, where the next layer's FC1 comes behind this launch: CTAs as large as its own leave places that they
    fit into; smaller ones leave holes, with which an SM held three of four (docs/tried.md)."""
    return reduction.shared_memory_bytes(config) - used_smem(config)


def check(variant: Variant) -> None:
    """Raises VariantError where this kernel cannot be ``variant``."""
    common.check_tile(variant, common.GROUPED_TILES_M, options=(DETERMINISTIC, ROUTES))
    if variant.option(DETERMINISTIC) and variant.option(ROUTES):
        raise VariantError(f"options {DETERMINISTIC} and {ROUTES} of {variant.key}: what adds in one order reads the places of `route`; use one")
    if variant.option(ROUTES):
        lists.check(variant)


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    config = config_of(variant)
    workspaces = conversion.workspaces()
    converting = conversion.converting(common.WARPS, config.resident_ctas, finished_up_to(config))
    own: tuple[Parameter, ...] = (Parameter("rows", "pointer", "rows"), Parameter("tokens_total", "u32", "M"))
    if config.ordered:
        workspaces = ordered.workspaces(f"adding * {common.WARPS * ordered.slot_bytes(config)}")
        converting = ordered.converting(ORDERED_AT_ONCE, common.WARPS, config.resident_ctas)
        own = (*ordered.POINTERS, Parameter("tokens_total", "u32", "M"), Parameter("top_k", "u32", "top_k"))
    listed: tuple[Parameter, ...] = (Parameter("tiles", "pointer", "tiles"),)
    choice: tuple[Parameter, ...] = ()
    scales: tuple[Parameter, ...] = (Parameter("row_alpha", "pointer", "row_alpha"),)
    smem = used_smem(config)
    if config.routes:
        own, listed, scales = (Parameter("tokens_total", "u32", "M"), Parameter("top_k", "u32", "top_k")), (), ()
        choice = (*lists.CHOICE, *lists.SCALES, Parameter("experts", "u32", "E"))
        smem = smem + filling(config)
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a"),
            pointer_or_null("a_scales", "a.scales", False),
            Parameter("b", "pointer", "b"),
            *scales,
            Parameter("c", "pointer", "c"),
            Parameter("partials", "pointer", workspaces[0].role),
            Parameter("counters", "pointer", "workspace.counters"),
            *listed,
            *own,
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
            Parameter("group_rows", "u32", group_rows_of(finished_up_to(config))),
            Parameter("adding", "u32", "adding"),
            Parameter("waits_first", "u32", "1 - early_list"),
            *choice,
        ),
        let=(
            ("row_blocks", f"H // {common.SUPERBLOCK_ROWS}"),
            ("blocks", f"M * top_k * ceil_div(I, {common.SUPERBLOCK_K}) * row_blocks"),
            ("adding", f"min(ceil_div(blocks, {common.WARPS}), sm_count * {config.resident_ctas})"),
        ),
        grid=(f"adding + {converting}", 1, 1),
        block=(common.WARPS * 32, 1, 1),
        dynamic_smem=smem,
        workspaces=workspaces,
        settings=(("early_list", (0, 1)),),
        programmatic_launch=True,
        smem_carveout=100,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = (
        *(pointer(Uint8, 16) for _ in range(3)),
        pointer(Uint8, 4),
        *(pointer(Uint8, 16) for _ in range(4)),
        pointer(Uint8, 4),
        pointer(Uint8, 16),
        *(pointer(Uint8, 4) for _ in range(3)),
    )
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 0, 8, 4, 0, 0, 132))
    return groupedfc2_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: thirteen pointers and ten words (without the stream)."""
    roles = {each.name: addresses[each.value] for each in recipe(variant).parameters if each.kind == "pointer"}
    rows = "places" if config_of(variant).ordered else "rows"
    wanted = ("a", "a_scales", "b", "row_alpha", "c", "partials", "counters", "tiles", rows, "slots", "ids", "router", "w2_alpha")
    words = ("M", "top_k", "H", "I", "early_list", "E", "id_bytes", "first_expert", "elsewhere", "sm_count")
    return [*(roles.get(name, 0) for name in wanted), *(names[name] for name in words)]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``: a main loop, and four vectors added or stored a token block in each step of it."""
    config = config_of(variant)
    loop = common.expected(config, unroll(config))
    vectors = 4 * config.token_blocks * unroll(config)
    counts = {"red.relaxed.gpu.global.add.v4.f32": vectors}
    if config.ordered:
        counts = {"st.global.v4.f32": vectors + ordered.vectors_stored(config.c_dtype, ORDERED_AT_ONCE)}
    return replace(loop, ptx_counts={**loop.ptx_counts, **counts})
