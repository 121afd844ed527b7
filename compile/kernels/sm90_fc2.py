"""FC2 for sm_90a: one GEMM over K = E·I with a scale per token and expert (contract sections 4 and 6), stream-K.

An output tile is 64 columns x ``tile_m`` tokens; its reduction runs over every K 128 of every expert. All tiles' reductions are laid end to
end and cut into equal spans, one a warp (stream-K): H is short and E·I very long, so whole tiles would leave most of the machine idle.

    per span:  ring ─ wait ─ decode ─ mma.sync ─ refill      until an expert ends:  sum += alpha[token, e] · accumulators
               until a tile or the span ends: the only contributor converts and stores;
                   of several, each adds to the float32 workspace (red.v4), takes a ticket, and the last one converts, stores, and clears both

The workspace and the tickets are zero between launches: each launch leaves them as it found them, so CUDA graphs may replay it.
``active_experts`` null means every expert; ``[count, expert, expert, …]`` cuts the spans from listed experts' K blocks alone. An empty list still
gives zeros: the spans are then those of one expert whose scale is taken as 0.

One accumulation per expert, scaled once. A term whose alpha is exactly 0 is selected away, not multiplied.
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
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import multiply, store_if, store_row
from densemoe.compile.kernels.sm90_reduction import take_ticket
from densemoe.runtime.recipe import Parameter, Recipe, Workspace, pointer_or_null
from densemoe.runtime.variant import Variant

OP = "fc2"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
#: By tile_m. At 8 tokens 16 warps an SM keep enough weight bytes in flight; two sets of accumulators a warp need more registers beyond.
RESIDENT_CTAS = {8: 4, 16: 2, 32: 2}
PREFETCH_UP_TO = 16  # largest tile_m whose activations are loaded one superblock ahead
OUTPUTS = 8  # consecutive output columns that one lane holds of a token


@cute.jit
def wait(barrier, phase):
    while not pr.mbarrier_try_wait_parity(barrier, phase, time_limit=10_000_000):
        pass


def add_scaled(sums: list[Any], accumulators: list[Any], config: common.Config, scales: list[Any]) -> list[Any]:
    """sums + scale · accumulators per token, fused, with scale 0 selected away."""
    result = []
    for index, (total, accumulator) in enumerate(zip(sums, accumulators, strict=True)):
        block = index // (common.M16_BLOCKS * common.ACCUMULATORS)
        scale = scales[2 * block + index % 2]
        value = multiply(accumulator, Float32(config.product_scale))
        result.append(
            pr.inline_ptx_hl(
                "{ .reg .pred z; .reg .f32 s; setp.eq.f32 z, {$r0}, 0f00000000; fma.rn.f32 s, {$r0}, {$r1}, {$r2};"
                " selp.f32 {$w0}, {$r2}, s, z; }",
                write_only_types=[Float32],
                read_only_args=[scale, value, total],
            )
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


def broadcast(value: Any) -> Any:
    """Lane 0's value in every lane."""
    return pr.inline_ptx_hl("shfl.sync.idx.b32 {$w0}, {$r0}, 0, 0x1f, 0xffffffff;", write_only_types=[Int32], read_only_args=[value])


@cute.kernel
def fc2_kernel(
    a: cutlass.Pointer,
    a_scales: cutlass.Pointer,
    b: cutlass.Pointer,
    alpha: cutlass.Pointer,
    c: cutlass.Pointer,
    partials: cutlass.Pointer,
    tickets: cutlass.Pointer,
    active_experts: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    hidden: Int32,
    intermediate: Int32,
    alpha_stride_m: Int32,
    alpha_stride_e: Int32,
    token_tiles: Int32,
    waits_first: Int32,
    config: cutlass.Constexpr,
):
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    warp = cute.arch.make_warp_uniform(tid // 32)
    lane = tid % 32
    g = lane // 4
    t = lane % 4
    stages = config.stages
    superblock = common.SUPERBLOCK_BYTES
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K  # of one expert
    row_blocks = hidden // common.SUPERBLOCK_ROWS
    listed = Int32(active_experts.toint() != 0)
    if waits_first != 0:
        pr.griddepcontrol("wait")  # the list may come from the launch before
    count_listed = common.load_global_s32_or(active_experts, listed, experts)
    none = Int32(count_listed == 0)
    listed = listed & (none ^ 1)
    visited = count_listed + none  # experts whose K blocks are laid end to end
    tile_length = Int64(visited) * Int64(k_blocks)
    total = tile_length * Int64(row_blocks) * Int64(token_tiles)

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * superblock))
    barriers = all_barriers.subview(warp * stages)

    workers = min(Int64(ctas * common.WARPS), total)
    worker = Int64(bid * common.WARPS + warp)
    first = total
    last = total
    if worker < workers:
        first = worker * total // workers
        last = (worker + 1) * total // workers
    remaining = Int32(last - first)

    # position of the span's start: tile (64 columns, token tile), place of the expert in the list, K block
    tile_index = first // tile_length
    inside = first - tile_index * tile_length
    row_block = Int32(tile_index // Int64(token_tiles))
    tile = Int32(tile_index - Int64(row_block) * Int64(token_tiles))
    place = Int32(inside // Int64(k_blocks))
    k = Int32(inside - Int64(place) * Int64(k_blocks))

    # what the ring fetches next
    to_fetch = remaining
    next_row_block = row_block
    next_tile = tile
    next_place = place
    next_k = k
    any_work = listed & Int32(remaining > 0)
    next_source = weights_of(b, active_experts, any_work, place, row_block, row_blocks, k_blocks) + Int64(k) * superblock

    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()
    for i in cutlass.range_constexpr(stages):
        if to_fetch > 0:
            if lane == 0:
                common.start_copy(ring, barriers, i, next_source)
            to_fetch -= 1
            next_source = next_source + superblock
            next_k += 1
            if next_k == k_blocks:
                next_k = Int32(0)
                next_place += 1
                if next_place == visited:
                    next_place = Int32(0)
                    next_tile += 1
                    if next_tile == token_tiles:
                        next_tile = Int32(0)
                        next_row_block += 1
                if to_fetch > 0:
                    next_source = weights_of(b, active_experts, listed, next_place, next_row_block, row_blocks, k_blocks)

    pr.griddepcontrol("wait")  # weights do not depend on the launch before; activations, alpha and the workspace do
    pr.griddepcontrol("launch_dependents")

    stage = Int32(0)
    phase = Int32(0)
    a_columns = experts * intermediate
    count = config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS
    while remaining > 0:
        # ---- the part of one tile that lies in this span
        tokens, exists = common.lane_tokens(config, tile * config.tile_m, g, tokens_total)
        sums = common.zero_accumulators(count)
        part = Int32(min(Int64(remaining), (Int64(visited - place) * Int64(k_blocks)) - Int64(k)))
        remaining -= part
        while part > 0:
            # ---- the part of one expert
            run = min(part, k_blocks - k)
            part -= run
            accumulators = common.zero_accumulators(count)
            expert = common.listed_expert(active_experts, listed, place)
            base = expert * intermediate
            if cutlass.const_expr(config.prefetch):
                ahead = common.load_superblock_activations(config, a, a_scales, tokens, exists, k, base, intermediate, a_columns, t)
            for step in cutlass.range(run, unroll=1):
                if cutlass.const_expr(config.prefetch):
                    loaded = ahead
                    ahead = common.load_superblock_activations(
                        config, a, a_scales, tokens, exists, k + step + 1, base, intermediate, a_columns, t
                    )
                else:
                    loaded = common.load_superblock_activations(
                        config, a, a_scales, tokens, exists, k + step, base, intermediate, a_columns, t
                    )
                wait(barriers.subview(stage), phase)
                accumulators = common.multiply_superblock(
                    config, accumulators, ring.subview(stage * superblock + lane * 16).data_ptr(), loaded
                )
                cute.arch.sync_warp()  # every lane has read the stage
                if to_fetch > 0:
                    if lane == 0:
                        common.start_copy(ring, barriers, stage, next_source)
                    to_fetch -= 1
                    next_source = next_source + superblock
                    next_k += 1
                    if next_k == k_blocks:
                        next_k = Int32(0)
                        next_place += 1
                        if next_place == visited:
                            next_place = Int32(0)
                            next_tile += 1
                            if next_tile == token_tiles:
                                next_tile = Int32(0)
                                next_row_block += 1
                        if to_fetch > 0:
                            next_source = weights_of(b, active_experts, listed, next_place, next_row_block, row_blocks, k_blocks)
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            scales = []
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    token = tile * config.tile_m + block * common.MMA_TOKENS + t * 2 + pair
                    at = Int64(token) * Int64(alpha_stride_m) + Int64(expert) * Int64(alpha_stride_e)
                    scales.append(common.load_global_f32_if(alpha + at * 4, Int32(token < tokens_total) & (none ^ 1)))
            sums = add_scaled(sums, accumulators, config, scales)
            k += run
            if k == k_blocks:
                k = Int32(0)
                place += 1

        # ---- hand the tile on
        current = Int64(row_block) * Int64(token_tiles) + Int64(tile)
        begin = current * tile_length
        end = begin + tile_length
        # iteration i belongs to worker ((i + 1) * workers - 1) // total
        contributors = Int32(((end * workers - 1) // total) - (((begin + 1) * workers - 1) // total)) + 1
        column = Int64(row_block * common.SUPERBLOCK_ROWS + g * OUTPUTS)
        finish = Int32(1)
        if contributors > 1:
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    index = block * common.MMA_TOKENS + t * 2 + pair
                    live = Int32(tile * config.tile_m + index < tokens_total)
                    values = token_values(sums, block, pair)
                    address = partials + ((current * config.tile_m + Int64(index)) * common.SUPERBLOCK_ROWS + Int64(g * OUTPUTS)) * 4
                    add_to_workspace(address, live, values[:4])
                    add_to_workspace(address + 16, live, values[4:])
            cute.arch.fence_acq_rel_gpu()
            cute.arch.sync_warp()
            ticket = Int32(0)
            if lane == 0:
                ticket = take_ticket(tickets + current * 4)
            ticket = broadcast(ticket)
            finish = Int32(ticket == contributors - 1)
            if finish != 0:
                cute.arch.fence_acq_rel_gpu()
                for block in cutlass.range_constexpr(config.token_blocks):
                    for pair in cutlass.range_constexpr(2):
                        index = block * common.MMA_TOKENS + t * 2 + pair
                        token = tile * config.tile_m + index
                        live = Int32(token < tokens_total)
                        address = partials + ((current * config.tile_m + Int64(index)) * common.SUPERBLOCK_ROWS + Int64(g * OUTPUTS)) * 4
                        values = load_workspace_if(address, live) + load_workspace_if(address + 16, live)
                        zeros = [Float32(0.0) for _ in range(4)]
                        store_if("v4.f32", address, live, zeros)
                        store_if("v4.f32", address + 16, live, zeros)
                        store_row(config.c_dtype, c, Int64(token) * Int64(hidden) + column, live, values)
                if lane == 0:
                    store_if("b32", tickets + current * 4, Int32(1), [Uint32(0)])
        else:
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    token = tile * config.tile_m + block * common.MMA_TOKENS + t * 2 + pair
                    live = Int32(token < tokens_total)
                    store_row(config.c_dtype, c, Int64(token) * Int64(hidden) + column, live, token_values(sums, block, pair))
        if place == visited:
            place = Int32(0)
            tile += 1
            if tile == token_tiles:
                tile = Int32(0)
                row_block += 1


def weights_of(b: Any, active_experts: Any, listed: Any, place: Any, row_block: Any, row_blocks: Any, k_blocks: Any) -> Any:
    """Address of the first superblock of a row block of the expert at a place of the list."""
    expert = common.listed_expert(active_experts, listed, place)
    return b + (Int64(expert) * Int64(row_blocks) + Int64(row_block)) * Int64(k_blocks) * common.SUPERBLOCK_BYTES


@cute.jit
def fc2_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    alpha: cute.Pointer,
    c: cute.Pointer,
    partials: cute.Pointer,
    tickets: cute.Pointer,
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
    listed = Int32(active_experts.toint() != 0)
    token_tiles = (tokens_total + (config.tile_m - 1)) // config.tile_m
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    blocks = experts * k_blocks * (hidden // common.SUPERBLOCK_ROWS) * token_tiles
    ctas = min((blocks + (common.WARPS - 1)) // common.WARPS, sm_count * config.resident_ctas)
    fc2_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        alpha.raw_ptr(),
        c.raw_ptr(),
        partials.raw_ptr(),
        tickets.raw_ptr(),
        active_experts.raw_ptr(),
        tokens_total,
        experts,
        hidden,
        intermediate,
        alpha_stride_m,
        alpha_stride_e,
        token_tiles,
        listed * (1 - early_list),
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
    tile_bytes = config.tile_m * common.SUPERBLOCK_ROWS * 4
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a.codes" if config.nvfp4_activations else "a"),
            pointer_or_null("a_scales", "a.scales", config.nvfp4_activations),
            Parameter("b", "pointer", "b"),
            Parameter("alpha", "pointer", "alpha"),
            Parameter("c", "pointer", "c"),
            Parameter("partials", "pointer", "workspace.partials"),
            Parameter("tickets", "pointer", "workspace.tickets"),
            Parameter("active_experts", "pointer", "active_experts"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
            Parameter("alpha_stride_m", "u32", "alpha_stride_m"),
            Parameter("alpha_stride_e", "u32", "alpha_stride_e"),
            Parameter("token_tiles", "u32", "token_tiles"),
            Parameter("waits_first", "u32", "has_active_list * (1 - early_list)"),
        ),
        let=(
            ("token_tiles", f"ceil_div(M, {config.tile_m})"),
            ("tiles", f"(H // {common.SUPERBLOCK_ROWS}) * token_tiles"),
            ("superblocks", f"E * ceil_div(I, {common.SUPERBLOCK_K}) * tiles"),
        ),
        grid=(f"min(ceil_div(superblocks, {common.WARPS}), sm_count * {config.resident_ctas})", 1, 1),
        block=(common.WARPS * 32, 1, 1),
        dynamic_smem=common.shared_memory_bytes(config),
        workspaces=(
            Workspace("workspace.partials", f"tiles * {tile_bytes}", zeroed=True),
            Workspace("workspace.tickets", "tiles * 4", zeroed=True),
        ),
        settings=(("early_list", (0, 1)),),
        programmatic_launch=True,
        smem_carveout=100,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = (*(pointer(Uint8, 16) for _ in range(3)), pointer(Uint8, 4), *(pointer(Uint8, 16) for _ in range(3)), pointer(Uint8, 4))
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 2, 1, 0, 132))
    return fc2_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: eight pointers and eight words (without the stream)."""
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in recipe(variant).parameters[:8]]
    return [*pointers, *(names[name] for name in ("M", "E", "H", "I", "alpha_stride_m", "alpha_stride_e", "early_list", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    config = config_of(variant)
    steps = common.K64_HALVES * common.K16_STEPS * common.M16_BLOCKS * config.token_blocks
    return Expected(
        ptx_counts={
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": steps,
            # one per ring stage before the loop, one to refill inside it
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": config.stages + 1,
            # two vectors of four for each of a lane's two tokens in a token block
            "red.relaxed.gpu.global.add.v4.f32": 4 * config.token_blocks,
        },
        max_registers=65536 // (common.WARPS * 32 * config.resident_ctas),
    )
