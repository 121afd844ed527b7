"""FC1 for sm_90a: GEMM over all experts, SwiGLU, optional alpha_post, conversion (contract sections 3 and 6), stream-K.

A unit is 32 output columns of one expert (one superblock row: 32 up and 32 gate rows) x ``tile_m`` tokens over the whole K. All units' K 128 blocks
are laid end to end and cut into equal spans, one a CTA: few tokens choose few experts, whose units alone would leave most of the machine idle.
Token tiles of the same weights are neighbours, so that the weights come from L2 after the first. Each m16 block holds 8 up rows (g) and their
8 gate rows (g + 8): up and gate of one output meet in one lane, without a shuffle.

    per unit:  the CTA's four warps take its K 128 blocks in turn:  activations of the next block ─ load │ ring ─ wait ─ decode ─ mma.sync ─ refill
               sums over warps (shared memory), and over CTAs where a unit lies in several spans (slots; the CTA whose span ends in it goes on)
               x alpha ─ SwiGLU ─ x alpha_post ─ quantise (amax over four lanes) or convert ─ store

The ring runs ahead over unit borders, so that sums and epilogue do not drain it. Sums have one order (sm90_reduction): a launch gives the same bits
every time. Slots are zero between launches: each launch leaves them as it found them, so CUDA graphs may replay it.

Run-time switches: ``alpha_post`` null; ``active_experts`` null (every expert) or ``[count, expert, expert, …]``: units are then those of listed
experts alone, the columns of the others stay unwritten.

The kernel also serves ``sm90_groupedfc1``: its units are 32 output columns x a tile of ``route``, up to ``tile_m`` rows of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import Expected
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_lists as lists
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import OUTPUT_COLUMNS, store_fc1_row
from densemoe.runtime.errors import VariantError
from densemoe.runtime.recipe import Parameter, Recipe, pointer_or_null
from densemoe.runtime.variant import ROUNDED, Variant

OP = "fc1"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
#: By tile_m. At 8 tokens 16 warps an SM keep enough weight bytes in flight (measured on an H200); more tokens need more registers.
RESIDENT_CTAS = {8: 4, 16: 3, 32: 2}
PREFETCH_UP_TO = 16  # largest tile_m whose activations are loaded one superblock ahead
SMALLEST_SPAN = 2 * common.WARPS  # K 128 blocks of a CTA


@cute.kernel
def fc1_kernel(
    a: cutlass.Pointer,
    a_scales: cutlass.Pointer,
    b: cutlass.Pointer,
    alpha: cutlass.Pointer,
    alpha_post: cutlass.Pointer,
    output_multiplier: cutlass.Pointer,
    c: cutlass.Pointer,
    c_scales: cutlass.Pointer,
    chosen: cutlass.Pointer | None,
    rows: cutlass.Pointer | None,
    slots: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    hidden: Int32,
    intermediate: Int32,
    token_tiles: Int32,
    waits_first: Int32,
    ids: cutlass.Pointer | None,
    id_bytes: Int32 | None,
    first_expert: Int32 | None,
    elsewhere: Int32 | None,
    top_k: Int32 | None,
    grouped: cutlass.Constexpr,
    config: cutlass.Constexpr,
):
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    worker = reduction.worker_of(bid, ctas)
    warp = cute.arch.make_warp_uniform(tid // 32)
    lane = tid % 32
    g = lane // 4
    t = lane % 4
    stages = config.stages
    superblock = common.SUPERBLOCK_BYTES
    k_blocks = common.k_blocks_of(hidden)
    row_blocks = Int32(Uint32(intermediate) // OUTPUT_COLUMNS)  # of one expert
    row_bytes = Int64(k_blocks) * superblock
    listed = Int32(1) if cutlass.const_expr(config.routes) else Int32(chosen.toint() != 0)
    if waits_first != 0:
        pr.griddepcontrol("wait")  # the list may come from the launch before
    pr.griddepcontrol("launch_dependents")
    if cutlass.const_expr(grouped and not config.routes):
        common.prefetch_lines(chosen, tid, (tokens_total + 1) * 16)  # the lists lie in memory where nobody has made them just now
        common.prefetch_lines(rows, tid, tokens_total * 4)
    units = Int32(0)
    if cutlass.const_expr(not config.routes):
        units = common.load_global_s32_or(chosen, listed, experts) * row_blocks * token_tiles

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * superblock))
    barriers = all_barriers.subview(warp * stages)
    partials = reduction.shared_partials(config)
    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()
    if cutlass.const_expr(config.routes):
        choice = (ids, id_bytes, first_expert, elsewhere, None, None)
        tiles, chosen, rows = lists.sort_choice(config.tile_m, False, choice, tokens_total, top_k, experts, lane)[:3]
        units = tiles * row_blocks

    # the CTA's span of all units' K blocks, laid end to end
    span = reduction.span_of(Uint32(worker), Uint32(ctas), Uint32(units), Uint32(k_blocks), SMALLEST_SPAN)
    unit, k, remaining = (Int32(each) for each in span[:3])
    quotient, longer = span[3:]

    # what the warp's ring fetches next: every fourth block of the span, `stages` of them ahead
    to_fetch = (remaining + (common.WARPS - 1 - warp)) // common.WARPS
    next_unit = unit + Int32(Uint32(k + warp) // Uint32(k_blocks))
    next_k = Int32(Uint32(k + warp) % Uint32(k_blocks))
    step_units = Int32(common.WARPS // Uint32(k_blocks))
    step_k = Int32(common.WARPS % Uint32(k_blocks))
    next_row = b + Int64(weight_row(config, grouped, chosen, listed, Int32(to_fetch > 0), next_unit, row_blocks, token_tiles)) * row_bytes
    for i in cutlass.range_constexpr(stages):
        if to_fetch > 0:
            if lane == 0:
                common.start_copy(ring, barriers, i, next_row + Int64(next_k) * superblock)
            to_fetch -= 1
            before = next_unit
            next_unit += step_units
            next_k += step_k
            if next_k >= k_blocks:
                next_k -= k_blocks
                next_unit += 1
            if next_unit != before:
                next_row = b + Int64(weight_row(config, grouped, chosen, listed, Int32(to_fetch > 0), next_unit, row_blocks, token_tiles)) * row_bytes

    if (to_fetch > 0) & (lane == 0):
        common.prefetch_superblock(next_row + Int64(next_k) * superblock)  # the memory is idle until the launch before ends

    # the span's first unit and the one after: words of both, tokens of the first
    chosen_lane = chosen
    if cutlass.const_expr(config.tile_m < 32 and not config.routes):  # at 32 tokens registers end
        chosen_lane = chosen + common.lane_zero(lane)
    words = unit_words(config, grouped, chosen_lane, listed, Int32(remaining > 0), unit, row_blocks, token_tiles, tokens_total)
    after = unit_words(config, grouped, chosen_lane, listed, Int32(remaining > k_blocks - k), unit + 1, row_blocks, token_tiles, tokens_total)
    tokens, exists = tokens_of(config, grouped, rows, words, g)

    pr.griddepcontrol("wait")  # weights do not depend on the launch before; activations do
    multiplier = Float32(1.0)
    if cutlass.const_expr(config.c_dtype == "nvfp4"):
        multiplier = common.load_global_f32_if(output_multiplier, Int32(1))

    stage = Int32(0)
    phase = Int32(0)
    done = Int32(0)  # blocks of the span that lie behind, modulo 4
    cold = Int32(1)  # whether the activations of the warp's next block are still to be loaded
    side = Int32(0)  # which buffer of partial sums is next
    sources = common.lane_sources(config, a, a_scales, tokens, Int32(0), hidden, t)
    halves = [common.load_half(config, sources, [Int32(0)] * config.token_blocks, Int32(0), half, hidden) for half in range(common.K64_HALVES)]
    rows_of_warp = reduction.rows_of_warp(config)
    finishing = reduction.finishing_warps(config)
    while remaining > 0:
        # ---- the part of one unit that lies in this span, and of it this warp's blocks
        run = min(remaining, k_blocks - k)
        remaining -= run
        skip = (warp - done) & (common.WARPS - 1)
        steps = (run + (common.WARPS - 1 - skip)) // common.WARPS
        at = k + skip
        done = (done + run) & (common.WARPS - 1)
        # ---- of the units behind it: tokens of the next, words of the one after that, all used a unit later
        skip_after = (warp - done) & (common.WARPS - 1)
        has_after = Int32(skip_after < min(remaining, k_blocks))
        tokens_after, exists_after = tokens_of(config, grouped, rows, after, g)
        behind = unit_words(config, grouped, chosen_lane, listed, Int32(remaining > k_blocks), unit + 2, row_blocks, token_tiles, tokens_total)
        expert, first_row, row_end = words
        if cutlass.const_expr(grouped):
            row_end = first_row + row_end
        scale = common.load_global_f32_if(alpha + Int64(expert) * 4, Int32(1))
        valid = exists
        if (cold != 0) & (steps > 0):
            sources = common.lane_sources(config, a, a_scales, tokens, Int32(0), hidden, t)
            halves = [common.load_half(config, sources, valid, at, half, hidden) for half in range(common.K64_HALVES)]
        cold = Int32(steps == 0)
        accumulators = common.zero_accumulators(config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS)
        left = steps
        while left > 0:
            for copy in cutlass.range_constexpr(common.UNROLL):  # so that loaded activations need not move from one set of registers to the other
                if left > 0:
                    left -= 1
                    at += common.WARPS
                    if left == 0:  # the warp's next block is the next unit's
                        sources = common.lane_sources(config, a, a_scales, tokens_after, Int32(0), hidden, t)
                        valid = [each & has_after for each in exists_after]
                        at = skip_after
                    loaded = halves
                    halves = [common.load_half(config, sources, valid, at, half, hidden) for half in range(common.K64_HALVES)]
                    common.wait(barriers.subview(stage), phase)
                    superblock_at = ring.subview(stage * superblock + lane * 16).data_ptr()
                    accumulators = common.multiply_superblock(config, accumulators, superblock_at, loaded)
                    cute.arch.sync_warp()  # every lane has read the stage
                    if to_fetch > 0:
                        if lane == 0:
                            common.start_copy(ring, barriers, stage, next_row + Int64(next_k) * superblock)
                        to_fetch -= 1
                        before = next_unit
                        next_unit += step_units
                        next_k += step_k
                        if next_k >= k_blocks:
                            next_k -= k_blocks
                            next_unit += 1
                        if next_unit != before:
                            exists_next = Int32(to_fetch > 0)
                            weights = weight_row(config, grouped, chosen, listed, exists_next, next_unit, row_blocks, token_tiles)
                            next_row = b + Int64(weights) * row_bytes
                    stage += 1
                    if stage == stages:
                        stage = Int32(0)
                        phase = phase ^ 1
                elif cutlass.const_expr(copy > 0):
                    halves = common.moved(halves)  # here, where few units end, and not before the branch

        # ---- over the warps, and over the CTAs that share the unit
        buffer = partials + side * reduction.partial_bytes(config)
        reduction.share_accumulators(config, buffer, warp, g, t, accumulators)
        pr.barrier_cta_sync(0)
        turn = (warp - side * finishing) & (common.WARPS - 1)  # where two warps finish, they and the other two take turns
        if turn < finishing:
            own_tokens = [first_row + reduction.place_of_row(turn, index, t, config) for index in range(rows_of_warp)]
            live = [Int32(token < row_end) for token in own_tokens]
            sums = reduction.shared_rows(config, buffer, turn, t, g)
            finish = Int32(1)
            if run != k_blocks:
                shared = reduction.sharing_workers(Uint32(unit), Uint32(k), Uint32(k_blocks), quotient, longer, Uint32(worker))
                sums, finish = reduction.sum_over_workers(config, sums, live, slots, shared, worker, turn, lane)
            if finish != 0:
                column = Int32(Uint32(unit) % Uint32(row_blocks)) * OUTPUT_COLUMNS
                columns = intermediate
                if cutlass.const_expr(not grouped):
                    column = expert * intermediate + Int32(Uint32(unit) // Uint32(token_tiles) % Uint32(row_blocks)) * OUTPUT_COLUMNS
                    columns = experts * intermediate
                for index in cutlass.range_constexpr(rows_of_warp):
                    store_fc1_row(
                        config,
                        sums[index * reduction.ROW : (index + 1) * reduction.ROW],
                        scale,
                        multiplier,
                        None if grouped else alpha_post,
                        c,
                        c_scales,
                        own_tokens[index],
                        live[index],
                        expert,
                        experts,
                        column,
                        columns,
                        g,
                    )
        if cutlass.const_expr(reduction.buffers(config) == 2):
            side = side ^ 1
        else:
            pr.barrier_cta_sync(0)  # the partial sums have been read
        words = after
        after = behind
        tokens = tokens_after
        exists = exists_after
        k = Int32(0)
        unit += 1


def unit_words(
    config: common.Config, grouped: bool, chosen: Any, listed: Any, is_there: Any, unit: Any, row_blocks: Any, token_tiles: Any, tokens_total: Any
) -> list[Any]:
    """[expert, first row, end of its rows] of a unit; some where ``is_there`` is 0: nothing is read then."""
    if config.routes:
        return lists.tile_words(chosen, Int32(Uint32(unit) // Uint32(row_blocks)), is_there)
    if grouped:
        tile = chosen + (Int64(Uint32(unit) // Uint32(row_blocks)) + 1) * 16  # the head of the list is as long as a tile
        words = [Int32(each) for each in common.load_global_v4_if(tile, is_there)]
        return [words[0], words[1], words[2]]
    row = Int32(Uint32(unit) // Uint32(token_tiles))
    place = Int32(Uint32(row) // Uint32(row_blocks))
    return [common.listed_expert(chosen, listed & is_there, place), (unit - row * token_tiles) * config.tile_m, tokens_total]


def tokens_of(config: common.Config, grouped: bool, rows: Any, words: list[Any], g: Any) -> tuple[list[Any], list[Any]]:
    """The tokens whose activations a lane loads for a unit, one a token block, and 1 where there is one.

    Args:
        words: of ``unit_words``; of a tile of ``route`` the third is the number of its rows.
    """
    _, first_row, end = words
    if not grouped:
        return common.lane_tokens(config, first_row, g, end)
    places, exists = common.lane_tokens(config, Int32(0), g, end)
    if config.routes:
        return lists.tokens_of(rows, first_row, places, exists), exists
    return [common.load_global_s32_or(rows + Int64(first_row + p) * 4, e, Int32(0)) for p, e in zip(places, exists, strict=True)], exists


def weight_row(config: common.Config, grouped: bool, chosen: Any, listed: Any, exists: Any, unit: Any, row_blocks: Any, token_tiles: Any) -> Any:
    """The superblock row of the packed weights that a unit reads; some row where ``exists`` is 0.

    Args:
        chosen: tiles of ``route`` (``grouped``), or the list of active experts where ``listed`` is not 0.
    """
    if grouped:
        if config.routes:
            expert = lists.expert_of_tile(chosen, unit // row_blocks)
        else:
            expert = common.load_global_s32_or(chosen + (Int64(unit // row_blocks) + 1) * 16, exists, Int32(0))
        return expert * row_blocks + unit % row_blocks
    row = unit // token_tiles
    return common.listed_expert(chosen, listed & exists, row // row_blocks) * row_blocks + row % row_blocks


@cute.jit
def fc1_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    alpha: cute.Pointer,
    alpha_post: cute.Pointer,
    output_multiplier: cute.Pointer,
    c: cute.Pointer,
    c_scales: cute.Pointer,
    active_experts: cute.Pointer,
    slots: cute.Pointer,
    tokens_total: Int32,
    experts: Int32,
    most_experts: Int32,
    hidden: Int32,
    intermediate: Int32,
    early_list: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    fc1_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    listed = Int32(active_experts.toint() != 0)
    token_tiles = (tokens_total + (config.tile_m - 1)) // config.tile_m
    k_blocks = (hidden + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    blocks = most_experts * (intermediate // OUTPUT_COLUMNS) * token_tiles * k_blocks
    ctas = min((blocks + (SMALLEST_SPAN - 1)) // SMALLEST_SPAN, sm_count * config.resident_ctas)
    fc1_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        alpha.raw_ptr(),
        alpha_post.raw_ptr(),
        output_multiplier.raw_ptr(),
        c.raw_ptr(),
        c_scales.raw_ptr(),
        active_experts.raw_ptr(),
        active_experts.raw_ptr(),
        slots.raw_ptr(),
        tokens_total,
        experts,
        hidden,
        intermediate,
        token_tiles,
        listed * (1 - early_list),
        None,
        None,
        None,
        None,
        None,
        False,
        config,
    ).launch(
        grid=(ctas, 1, 1),
        block=[common.WARPS * 32, 1, 1],
        min_blocks_per_mp=config.resident_ctas,
        preferred_smem_carveout=100,
        stream=stream,
        use_pdl=True,
    )


def config_of(variant: Variant) -> common.Config:
    """The compile-time parameters of ``variant``."""
    return common.config_of(variant, RESIDENT_CTAS, PREFETCH_UP_TO)


def check(variant: Variant) -> None:
    """Raises VariantError where this kernel cannot be ``variant``."""
    common.check_tile(variant, options=(ROUNDED,))
    if variant.option(ROUNDED) and variant.c_dtype != "nvfp4":
        raise VariantError(f"option {ROUNDED} of {variant.key}: {variant.c_dtype} output is not rounded to NVFP4; use c_dtype nvfp4")


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    config = config_of(variant)
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a.codes" if config.nvfp4_activations else "a"),
            pointer_or_null("a_scales", "a.scales", config.nvfp4_activations),
            Parameter("b", "pointer", "b"),
            Parameter("alpha", "pointer", "alpha"),
            Parameter("alpha_post", "pointer", "alpha_post"),
            pointer_or_null("output_multiplier", "output_multiplier", config.c_dtype == "nvfp4"),
            Parameter("c", "pointer", "c.codes" if config.codes else "c"),
            pointer_or_null("c_scales", "c.scales", config.codes),
            Parameter("chosen", "pointer", "active_experts"),
            Parameter("rows", "pointer", "active_experts"),
            Parameter("slots", "pointer", "workspace.slots"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
            Parameter("token_tiles", "u32", "token_tiles"),
            Parameter("waits_first", "u32", "has_active_list * (1 - early_list)"),
        ),
        let=(
            ("token_tiles", f"ceil_div(M, {config.tile_m})"),
            # of experts that may be listed: CTAs without blocks would hold places that the next launch's begin in (docs/tried.md)
            ("blocks", f"most_experts * (I // {OUTPUT_COLUMNS}) * token_tiles * ceil_div(H, {common.SUPERBLOCK_K})"),
            ("ctas", f"min(ceil_div(blocks, {SMALLEST_SPAN}), sm_count * {config.resident_ctas})"),
        ),
        grid=("ctas", 1, 1),
        block=(common.WARPS * 32, 1, 1),
        dynamic_smem=reduction.shared_memory_bytes(config),
        workspaces=reduction.workspaces(config),
        settings=(("early_list", (0, 1)),),
        programmatic_launch=True,
        smem_carveout=100,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    words = tuple(Int32(value) for value in (8, 2, 2, 256, 128, 0, 132))
    symbol = variant.symbol.removesuffix("_0")
    pointers = (
        *(pointer(Uint8, 16) for _ in range(3)),
        *(pointer(Uint8, 4) for _ in range(3)),  # float32, addressed in bytes as the rest
        *(pointer(Uint8, 16) for _ in range(2)),
        pointer(Uint8, 4),
        pointer(Uint8, 16),
    )
    return fc1_host, (*pointers, *words, symbol, config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: ten pointers and seven words (without the stream)."""
    parameters = recipe(variant).parameters
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in (*parameters[:9], parameters[10])]
    return [*pointers, *(names[name] for name in ("M", "E", "most_experts", "H", "I", "early_list", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    return common.expected(config_of(variant), common.UNROLL)
