"""FC2 for sm_90a: one GEMM over K = E·I with a scale per token and expert (contract sections 4 and 6), stream-K.

A unit is 64 columns x ``tile_m`` tokens; its reduction runs over every K 128 of every expert. All units' reductions are laid end to end and cut into
equal spans, one a CTA (stream-K): H is short and E·I very long, so whole units would leave most of the machine idle.

    per unit:  the CTA's four warps take its blocks in the span in turn:  ring ─ wait ─ decode ─ mma.sync ─ refill
                   sum += alpha[token, e] · accumulators of the block
               sums over warps (shared memory), and over CTAs where a unit lies in several spans (slots; the CTA whose span ends in it goes on)
               convert ─ store

An expert has few blocks (two of DeepSeek-V3's at TP 8), so a warp meets another with almost every block. What a block needs is therefore fetched
blocks ahead, over the borders of experts and units: three ahead its expert, two its weights and alphas, one its activations, of the tokens alone
whose alpha is not 0. A term whose alpha is exactly 0 is thus not read at all. Sums have one order (sm90_reduction): a launch gives the same bits
every time. Slots are zero between launches: each launch leaves them as it found them, so CUDA graphs may replay it.

Run-time setting ``early_list``: the list of active experts and alpha were complete before the launch that precedes this one began.
``active_experts`` null means every expert; ``[count, expert, expert, …]`` cuts the spans from listed experts' K blocks alone. An empty list still
gives zeros: the spans are then those of one expert whose scale is taken as 0.
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
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import multiply, store_row
from densemoe.runtime.recipe import Parameter, Recipe, pointer_or_null
from densemoe.runtime.variant import Variant

OP = "fc2"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
#: By tile_m. At 8 tokens 16 warps an SM keep enough weight bytes in flight; two sets of accumulators a warp need more registers beyond.
RESIDENT_CTAS = {8: 4, 16: 2, 32: 2}
PREFETCH_UP_TO = 16  # largest tile_m whose activations are loaded one superblock ahead
SMALLEST_SPAN = 2 * common.WARPS  # K 128 blocks of a CTA
LOOKED_UP = 3  # blocks of a warp whose experts are known before their use
OUTPUTS = 8  # consecutive output columns that one lane holds of a token


def add_scaled(config: common.Config, sums: list[Any], accumulators: list[Any], scales: list[Any], t: Any) -> list[Any]:
    """sums + scale · accumulators per token, fused; a token whose scale is 0 has accumulators of 0 (``activations_of``).

    Args:
        scales: of ``alphas_of``: lane 4j holds that of token j of a token block.
    """
    result = []
    of_pairs = [[common.shuffle_from(scale, (t * 2 + pair) * 4) for pair in range(2)] for scale in scales]
    for index, (total, accumulator) in enumerate(zip(sums, accumulators, strict=True)):
        scale = of_pairs[index // (common.M16_BLOCKS * common.ACCUMULATORS)][index % 2]
        value = multiply(accumulator, Float32(config.product_scale))
        result.append(
            pr.inline_ptx_hl("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[scale, value, total])
        )
    return result


def token_values(sums: list[Any], block: int, pair: int) -> list[Any]:
    """The lane's eight consecutive outputs of token ``2t + pair`` of a token block: two of each m16 block."""
    at = block * common.M16_BLOCKS * common.ACCUMULATORS + pair
    return [sums[at + m16 * common.ACCUMULATORS + 2 * row] for m16 in range(common.M16_BLOCKS) for row in range(2)]


def add_to_workspace(address: Any, valid: Any, values: list[Any]) -> None:
    """Adds four float32 to global memory, each atomically, where ``valid`` is not 0."""
    pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; @p red.relaxed.gpu.global.add.v4.f32 [{$r0}], {{$r2}, {$r3}, {$r4}, {$r5}}; }",
        read_only_args=[address, valid, *values],
    )


def load_workspace_if(address: Any, valid: Any) -> list[Any]:
    """Four float32 of global memory past the L1, where ``valid`` is not 0, else zeros."""
    return list(
        pr.inline_ptx_hl(
            "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
            " @p ld.relaxed.gpu.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }",
            write_only_types=[Float32] * 4,
            read_only_args=[address, valid],
        )
    )


def tile_of(unit: Any, token_tiles: Any, tile_m: int) -> tuple[Any, Any]:
    """Row block and first token of a unit."""
    row_block = Int32(Uint32(unit) // Uint32(token_tiles))
    return row_block, (unit - row_block * token_tiles) * tile_m


@cute.jit
def advanced(ahead, steps, count, k_blocks, token_tiles, tile_m: cutlass.Constexpr):
    """A place in the span moved on by what ``steps`` says: (units, places, K blocks) of the warps' stride.

    Args:
        ahead: unit, its row block and first token, the place of the expert in the list of ``count``, and the expert's K block.
    """
    unit, row_block, first_token, place, k = ahead
    before = unit
    step_units, step_places, step_k = steps
    k += step_k
    place += step_places
    unit += step_units
    if k >= k_blocks:
        k -= k_blocks
        place += 1
    if place >= count:
        place -= count
        unit += 1
    if unit != before:
        row_block, first_token = tile_of(unit, token_tiles, tile_m)
    return unit, row_block, first_token, place, k


@cute.kernel
def fc2_kernel(
    a: cutlass.Pointer,
    a_scales: cutlass.Pointer,
    b: cutlass.Pointer,
    alpha: cutlass.Pointer,
    c: cutlass.Pointer,
    slots: cutlass.Pointer,
    active_experts: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    hidden: Int32,
    intermediate: Int32,
    alpha_stride_m: Int32,
    alpha_stride_e: Int32,
    token_tiles: Int32,
    early_list: Int32,
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
    k_blocks = common.k_blocks_of(intermediate)  # of one expert
    row_blocks = Int32(Uint32(hidden) // common.SUPERBLOCK_ROWS)
    listed = Int32(active_experts.toint() != 0)
    if (listed & (early_list ^ 1)) != 0:
        pr.griddepcontrol("wait")  # the list may come from the launch before
    pr.griddepcontrol("launch_dependents")
    count = common.load_global_s32_or(active_experts, listed, experts)
    some = Int32(count != 0)
    listed = listed & some
    count += some ^ 1
    length = count * k_blocks  # blocks of a unit: those of the visited experts

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * superblock))
    barriers = all_barriers.subview(warp * stages)
    partials = reduction.shared_partials(config)
    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()

    # the CTA's span of all units' blocks, laid end to end
    span = reduction.span_of(Uint32(worker), Uint32(ctas), Uint32(row_blocks) * Uint32(token_tiles), Uint32(length), SMALLEST_SPAN)
    unit, inside, remaining = (Int32(each) for each in span[:3])
    quotient, longer = span[3:]

    # every fourth block of it is this warp's; three of them are looked up before their use: the one ahead of the others says where to go on
    steps = tuple(Int32(each) for each in divided(Uint32(common.WARPS), Uint32(length), Uint32(k_blocks)))
    first_unit, first_place, first_k = (Int32(each) for each in divided(Uint32(inside + warp), Uint32(length), Uint32(k_blocks)))
    first_unit += unit
    ahead = (first_unit, *tile_of(first_unit, token_tiles, config.tile_m), first_place, first_k)
    to_find = (remaining + (common.WARPS - 1 - warp)) // common.WARPS
    found = []
    for i in cutlass.range_constexpr(LOOKED_UP):
        found.append(block_at(active_experts, listed, ahead, Int32(to_find > i)))
        ahead = advanced(ahead, steps, count, k_blocks, token_tiles, config.tile_m)
    to_find -= LOOKED_UP
    for i in cutlass.range_constexpr(stages):
        fetch(config, ring, barriers, i, b, found[i], row_blocks, k_blocks, lane)

    if early_list == 0:
        pr.griddepcontrol("wait")  # weights do not depend on the launch before; activations and alpha do
    known = found[:2] if config.prefetch else found[:1]
    scales = [alphas_of(config, alpha, block, some, alpha_stride_m, alpha_stride_e, tokens_total, g) for block in known]
    if early_list != 0:
        pr.griddepcontrol("wait")
    a_columns = experts * intermediate
    now, after, behind = found
    halves: Any = []
    if cutlass.const_expr(config.prefetch):
        halves = activations_of(config, a, a_scales, now, scales[0], intermediate, a_columns, g, t)

    stage = Int32(0)
    phase = Int32(0)
    done = Int32(0)  # blocks of the span that lie behind, modulo 4
    side = Int32(0)  # which buffer of partial sums is next
    rows_of_warp = reduction.rows_of_warp(config)
    finishing = reduction.finishing_warps(config)
    while remaining > 0:
        # ---- the part of one unit that lies in this span, and of it this warp's blocks
        run = min(remaining, length - inside)
        remaining -= run
        skip = (warp - done) & (common.WARPS - 1)
        left = (run + (common.WARPS - 1 - skip)) // common.WARPS
        done = (done + run) & (common.WARPS - 1)
        row_block, first_token = tile_of(unit, token_tiles, config.tile_m)
        sums = common.zero_accumulators(config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS)
        while left > 0:
            for copy in cutlass.range_constexpr(unroll(config)):  # loaded activations need not move from one set of registers to the other
                if left > 0:
                    left -= 1
                    # ---- three blocks ahead the expert, two ahead its alphas, one ahead its activations
                    beyond = block_at(active_experts, listed, ahead, Int32(to_find > 0))
                    to_find -= 1
                    ahead = advanced(ahead, steps, count, k_blocks, token_tiles, config.tile_m)
                    scales_behind = alphas_of(
                        config, alpha, behind if config.prefetch else after, some, alpha_stride_m, alpha_stride_e, tokens_total, g
                    )
                    loaded = halves
                    if cutlass.const_expr(config.prefetch):
                        halves = activations_of(config, a, a_scales, after, scales[1], intermediate, a_columns, g, t)
                    else:
                        loaded = activations_of(config, a, a_scales, now, scales[0], intermediate, a_columns, g, t)
                    common.wait(barriers.subview(stage), phase)
                    accumulators = common.zero_accumulators(config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS)
                    accumulators = common.multiply_superblock(
                        config, accumulators, ring.subview(stage * superblock + lane * 16).data_ptr(), loaded
                    )
                    cute.arch.sync_warp()  # every lane has read the stage
                    fetch(config, ring, barriers, stage, b, behind if stages == 2 else beyond, row_blocks, k_blocks, lane)
                    sums = add_scaled(config, sums, accumulators, scales[0], t)
                    stage += 1
                    if stage == stages:
                        stage = Int32(0)
                        phase = phase ^ 1
                    now = after
                    after = behind
                    behind = beyond
                    scales = [*scales[1:], scales_behind]
                elif cutlass.const_expr(copy > 0):
                    halves = common.moved(halves)  # here, where few units end, and not before the branch

        # ---- over the warps, and over the CTAs that share the unit
        buffer = partials + side * reduction.partial_bytes(config)
        reduction.share_accumulators(config, buffer, warp, g, t, sums)
        pr.barrier_cta_sync(0)
        turn = (warp - side * finishing) & (common.WARPS - 1)  # where two warps finish, they and the other two take turns
        if turn < finishing:
            own_tokens = [first_token + reduction.place_of_row(turn, index, t, config) for index in range(rows_of_warp)]
            live = [Int32(token < tokens_total) for token in own_tokens]
            rows = reduction.shared_rows(config, buffer, turn, t, g)
            finish = Int32(1)
            if run != length:
                shared = reduction.sharing_workers(Uint32(unit), Uint32(inside), Uint32(length), quotient, longer, Uint32(worker))
                rows, finish = reduction.sum_over_workers(config, rows, live, slots, shared, worker, turn, lane)
            if finish != 0:
                for index in cutlass.range_constexpr(rows_of_warp):
                    even, odd = (rows[index * reduction.ROW + plane * 4 : index * reduction.ROW + plane * 4 + 4] for plane in range(2))
                    element = Int64(own_tokens[index]) * Int64(hidden) + Int64(row_block * common.SUPERBLOCK_ROWS + g * OUTPUTS)
                    store_row(config.c_dtype, c, element, live[index], [value for pair in zip(even, odd, strict=True) for value in pair])
        if cutlass.const_expr(reduction.buffers(config) == 2):
            side = side ^ 1
        else:
            pr.barrier_cta_sync(0)  # the partial sums have been read
        inside = Int32(0)
        unit += 1


def unroll(config: common.Config) -> int:
    """Steps of the main loop: two sets of activations take turns where there are two."""
    return common.UNROLL if config.prefetch else 1


def divided(blocks: Any, length: Any, k_blocks: Any) -> tuple[Any, Any, Any]:
    """A number of blocks as whole units of ``length``, whole experts of ``k_blocks`` of the rest, and what is left; unsigned."""
    units = blocks // length
    rest = blocks - units * length
    places = rest // k_blocks
    return units, places, rest - places * k_blocks


def block_at(active_experts: Any, listed: Any, ahead: tuple[Any, ...], exists: Any) -> list[Any]:
    """[exists, expert, row block, first token, K block of the expert] of a place in the span (``advanced``); some expert where ``exists`` is 0."""
    _, row_block, first_token, place, k = ahead
    return [exists, common.listed_expert(active_experts, listed & exists, place), row_block, first_token, k]


def fetch(config: common.Config, ring: Any, barriers: Any, stage: Any, b: Any, block: list[Any], row_blocks: Any, k_blocks: Any, lane: Any) -> None:
    """One lane starts the copy of a block's superblock, where the block exists.

    Args:
        block: of ``block_at``.
    """
    exists, expert, row_block, _, k = block
    start_copy_if(exists & Int32(lane == 0), config, ring, barriers, stage, b, (expert, row_block, k), (row_blocks, k_blocks))


@cute.jit
def start_copy_if(valid, config: cutlass.Constexpr, ring, barriers, stage, b, place, sizes):
    """The superblock of (expert, row block, K block) to ``stage``, where ``valid`` is not 0."""
    if valid != 0:
        expert, row_block, k = place
        row_blocks, k_blocks = sizes
        index = (Int64(expert) * Int64(row_blocks) + Int64(row_block)) * Int64(k_blocks) + Int64(k)
        common.start_copy(ring, barriers, stage, b + index * common.SUPERBLOCK_BYTES)


def alphas_of(
    config: common.Config, alpha: Any, block: list[Any], some: Any, stride_m: Any, stride_e: Any, tokens_total: Any, g: Any
) -> list[Any]:
    """The scales of a block's expert for the tokens whose activations a lane loads, one a token block; 0 where there is no such token or block."""
    exists, expert, _, first_token, _ = block
    tokens, inside = common.lane_tokens(config, first_token, g, tokens_total)
    at = [Int64(token) * Int64(stride_m) + Int64(expert) * Int64(stride_e) for token in tokens]
    return [common.load_global_f32_if(alpha + each * 4, live & exists & some) for each, live in zip(at, inside, strict=True)]


def activations_of(
    config: common.Config, a: Any, a_scales: Any, block: list[Any], scales: list[Any], intermediate: Any, a_columns: Any, g: Any, t: Any
) -> list[list[list[Any]]]:
    """A lane's activations of a block; zeros, and nothing is read, where the token's scale is 0."""
    _, expert, _, first_token, k = block
    tokens, _ = common.lane_tokens(config, first_token, g, first_token)
    sources = common.lane_sources(config, a, a_scales, tokens, expert * intermediate, a_columns, t)
    valid = [common.differs_from_zero(each) for each in scales]
    return [common.load_half(config, sources, valid, k, half, intermediate) for half in range(common.K64_HALVES)]


@cute.jit
def fc2_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    alpha: cute.Pointer,
    c: cute.Pointer,
    slots: cute.Pointer,
    active_experts: cute.Pointer,
    tokens_total: Int32,
    experts: Int32,
    hidden: Int32,
    intermediate: Int32,
    alpha_stride_m: Int32,
    alpha_stride_e: Int32,
    early_list: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    fc2_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    token_tiles = (tokens_total + (config.tile_m - 1)) // config.tile_m
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    blocks = experts * k_blocks * (hidden // common.SUPERBLOCK_ROWS) * token_tiles
    ctas = min((blocks + (SMALLEST_SPAN - 1)) // SMALLEST_SPAN, sm_count * config.resident_ctas)
    fc2_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        alpha.raw_ptr(),
        c.raw_ptr(),
        slots.raw_ptr(),
        active_experts.raw_ptr(),
        tokens_total,
        experts,
        hidden,
        intermediate,
        alpha_stride_m,
        alpha_stride_e,
        token_tiles,
        early_list,
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
    common.check_tile(variant)


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    config = config_of(variant)
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a.codes" if config.nvfp4_activations else "a"),
            pointer_or_null("a_scales", "a.scales", config.nvfp4_activations),
            Parameter("b", "pointer", "b"),
            Parameter("alpha", "pointer", "alpha"),
            Parameter("c", "pointer", "c"),
            Parameter("slots", "pointer", "workspace.slots"),
            Parameter("active_experts", "pointer", "active_experts"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
            Parameter("alpha_stride_m", "u32", "alpha_stride_m"),
            Parameter("alpha_stride_e", "u32", "alpha_stride_e"),
            Parameter("token_tiles", "u32", "token_tiles"),
            Parameter("early_list", "u32", "early_list"),
        ),
        let=(
            ("token_tiles", f"ceil_div(M, {config.tile_m})"),
            ("tiles", f"(H // {common.SUPERBLOCK_ROWS}) * token_tiles"),
            ("blocks", f"E * ceil_div(I, {common.SUPERBLOCK_K}) * tiles"),
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
    pointers = (*(pointer(Uint8, 16) for _ in range(3)), pointer(Uint8, 4), *(pointer(Uint8, 16) for _ in range(2)), pointer(Uint8, 4))
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 2, 1, 0, 132))
    return fc2_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: seven pointers and eight words (without the stream)."""
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in recipe(variant).parameters[:7]]
    return [*pointers, *(names[name] for name in ("M", "E", "H", "I", "alpha_stride_m", "alpha_stride_e", "early_list", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    config = config_of(variant)
    return common.expected(config, unroll(config))
