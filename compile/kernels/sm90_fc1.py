"""FC1 for sm_90a: GEMM over all experts, SwiGLU, optional alpha_post, conversion (contract sections 3 and 6).

A unit of work is 32 output columns of one expert (one superblock row: 32 up and 32 gate rows) x ``tile_m`` tokens over the whole K. Warps take
units with a fixed stride; token blocks of the same weights are neighbours, so that the weights come from L2 after the first. Each m16 block
holds 8 up rows (g) and their 8 gate rows (g + 8): up and gate of one output meet in one lane, without a shuffle.

    per unit:  for each K 128:  activations of the next K 128 ─ load │ ring ─ wait ─ decode ─ 32·(tile_m / 8) mma.sync ─ refill
               epilogue: x alpha ─ SwiGLU ─ x alpha_post ─ quantise (amax over four lanes) or convert ─ store

The ring runs ahead over unit borders, so that an epilogue does not drain it.

Run-time switches: ``alpha_post`` null; ``active_experts`` null (every expert) or ``[count, expert, expert, …]``: units are then those of listed
experts alone, the columns of the others stay unwritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import Expected
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import store_fc1_outputs
from densemoe.runtime.recipe import Parameter, Recipe, pointer_or_null
from densemoe.runtime.variant import Variant

OP = "fc1"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
#: By tile_m. At 8 tokens 16 warps an SM keep enough weight bytes in flight (measured on an H200); more tokens need more registers.
RESIDENT_CTAS = {8: 4, 16: 3, 32: 2}
PREFETCH_UP_TO = 16  # largest tile_m whose activations are loaded one superblock ahead
OUTPUT_COLUMNS = common.SUPERBLOCK_ROWS // 2  # of one superblock row: half its rows are gates


@cute.jit
def wait(barrier, phase):
    while not pr.mbarrier_try_wait_parity(barrier, phase, time_limit=10_000_000):
        pass


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
    active_experts: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    hidden: Int32,
    intermediate: Int32,
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
    k_blocks = (hidden + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    row_blocks = intermediate // OUTPUT_COLUMNS  # of one expert
    listed = Int32(active_experts.toint() != 0)
    if waits_first != 0:
        pr.griddepcontrol("wait")  # the list may come from the launch before
    rows_total = common.load_global_s32_or(active_experts, listed, experts) * row_blocks
    row_bytes = Int64(k_blocks) * common.SUPERBLOCK_BYTES

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * common.SUPERBLOCK_BYTES))
    barriers = all_barriers.subview(warp * stages)

    # units of this warp: (row, token tile), the token tile fastest, advancing by all warps of the grid; rows of listed experts are counted
    # one after another, `weight_row` says which they are
    worker = bid * common.WARPS + warp
    workers = ctas * common.WARPS
    step_rows = workers // token_tiles
    step_tiles = workers % token_tiles
    row = worker // token_tiles
    tile = worker % token_tiles

    # what the ring fetches next, `stages` superblocks ahead
    next_row = row
    next_tile = tile
    next_k = Int32(0)
    next_source = b + Int64(weight_row(active_experts, listed, next_row, rows_total, row_blocks)) * row_bytes

    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()
    for i in cutlass.range_constexpr(stages):
        if next_row < rows_total:
            if lane == 0:
                common.start_copy(ring, barriers, i, next_source)
            next_source = next_source + common.SUPERBLOCK_BYTES
            next_k += 1
            if next_k == k_blocks:
                next_k = Int32(0)
                next_row += step_rows
                next_tile += step_tiles
                if next_tile >= token_tiles:
                    next_tile -= token_tiles
                    next_row += 1
                next_source = b + Int64(weight_row(active_experts, listed, next_row, rows_total, row_blocks)) * row_bytes

    pr.griddepcontrol("wait")  # weights do not depend on the launch before; activations do
    pr.griddepcontrol("launch_dependents")

    stage = Int32(0)
    phase = Int32(0)
    while row < rows_total:
        tokens, exists = common.lane_tokens(config, tile * config.tile_m, g, tokens_total)
        accumulators = common.zero_accumulators(config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS)
        if cutlass.const_expr(config.prefetch):
            ahead = common.load_superblock_activations(config, a, a_scales, tokens, exists, Int32(0), Int32(0), hidden, hidden, t)
        for k in cutlass.range(k_blocks, unroll=1):
            if cutlass.const_expr(config.prefetch):
                loaded = ahead
                ahead = common.load_superblock_activations(config, a, a_scales, tokens, exists, k + 1, Int32(0), hidden, hidden, t)
            else:
                loaded = common.load_superblock_activations(config, a, a_scales, tokens, exists, k, Int32(0), hidden, hidden, t)
            wait(barriers.subview(stage), phase)
            accumulators = common.multiply_superblock(
                config, accumulators, ring.subview(stage * common.SUPERBLOCK_BYTES + lane * 16).data_ptr(), loaded
            )
            cute.arch.sync_warp()  # every lane has read the stage
            if next_row < rows_total:
                if lane == 0:
                    common.start_copy(ring, barriers, stage, next_source)
                next_source = next_source + common.SUPERBLOCK_BYTES
                next_k += 1
                if next_k == k_blocks:
                    next_k = Int32(0)
                    next_row += step_rows
                    next_tile += step_tiles
                    if next_tile >= token_tiles:
                        next_tile -= token_tiles
                        next_row += 1
                    next_source = b + Int64(weight_row(active_experts, listed, next_row, rows_total, row_blocks)) * row_bytes
            stage += 1
            if stage == stages:
                stage = Int32(0)
                phase = phase ^ 1

        expert = common.listed_expert(active_experts, listed, row // row_blocks)
        store_fc1_outputs(
            config,
            accumulators,
            alpha,
            alpha_post,
            output_multiplier,
            c,
            c_scales,
            tile * config.tile_m,
            tokens_total,
            expert,
            experts,
            expert * intermediate + (row % row_blocks) * OUTPUT_COLUMNS,
            experts * intermediate,
            g,
            t,
        )
        row += step_rows
        tile += step_tiles
        if tile >= token_tiles:
            tile -= token_tiles
            row += 1


def weight_row(active_experts: Any, listed: Any, row: Any, rows_total: Any, row_blocks: Any) -> Any:
    """The superblock row of the packed weights that stands at ``row`` of the listed experts' rows; any where there is none."""
    exists = listed & Int32(row < rows_total)
    place = row // row_blocks
    return common.listed_expert(active_experts, exists, place) * row_blocks + row % row_blocks


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
    tokens_total: Int32,
    experts: Int32,
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
    units = experts * (intermediate // OUTPUT_COLUMNS) * token_tiles
    ctas = min((units + (common.WARPS - 1)) // common.WARPS, sm_count * config.resident_ctas)
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
        tokens_total,
        experts,
        hidden,
        intermediate,
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
    nvfp4_output = config.c_dtype == "nvfp4"
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a.codes" if config.nvfp4_activations else "a"),
            pointer_or_null("a_scales", "a.scales", config.nvfp4_activations),
            Parameter("b", "pointer", "b"),
            Parameter("alpha", "pointer", "alpha"),
            Parameter("alpha_post", "pointer", "alpha_post"),
            pointer_or_null("output_multiplier", "output_multiplier", nvfp4_output),
            Parameter("c", "pointer", "c.codes" if nvfp4_output else "c"),
            pointer_or_null("c_scales", "c.scales", nvfp4_output),
            Parameter("active_experts", "pointer", "active_experts"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
            Parameter("token_tiles", "u32", "token_tiles"),
            Parameter("waits_first", "u32", "has_active_list * (1 - early_list)"),
        ),
        let=(
            ("token_tiles", f"ceil_div(M, {config.tile_m})"),
            ("units", f"E * (I // {OUTPUT_COLUMNS}) * token_tiles"),
        ),
        grid=(f"min(ceil_div(units, {common.WARPS}), sm_count * {config.resident_ctas})", 1, 1),
        block=(common.WARPS * 32, 1, 1),
        dynamic_smem=common.shared_memory_bytes(config),
        settings=(("early_list", (0, 1)),),
        programmatic_launch=True,
        smem_carveout=100,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 0, 132))
    symbol = variant.symbol.removesuffix("_0")
    pointers = (
        *(pointer(Uint8, 16) for _ in range(3)),
        *(pointer(Uint8, 4) for _ in range(3)),  # float32, addressed in bytes as the rest
        *(pointer(Uint8, 16) for _ in range(2)),
        pointer(Uint8, 4),
    )
    return fc1_host, (*pointers, *words, symbol, config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: nine pointers and six words (without the stream)."""
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in recipe(variant).parameters[:9]]
    return [*pointers, *(names[name] for name in ("M", "E", "H", "I", "early_list", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    config = config_of(variant)
    steps = common.K64_HALVES * common.K16_STEPS * common.M16_BLOCKS * config.token_blocks
    return Expected(
        ptx_counts={
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": steps,
            # one per ring stage before the loop, one to refill inside it
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": config.stages + 1,
        },
        max_registers=65536 // (common.WARPS * 32 * config.resident_ctas),
    )
