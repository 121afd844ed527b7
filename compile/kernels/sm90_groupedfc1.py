"""FC1 for sm_90a over gathered tokens: each expert multiplies the tokens that chose it, and no others (contract section 5, compact form).

As ``sm90_fc1``, with units of 32 output columns x one tile of ``route``: up to ``tile_m`` rows of one expert, whose tokens ``rows`` names. The output
is compact: one row a (token, expert) pair, ``[M·k, I]``. Weights are read once a tile, so once an expert up to ``tile_m`` tokens of it.

    per unit:  tile ─ tokens ─ for each K 128:  gathered activations ─ load │ ring ─ wait ─ decode ─ mma.sync ─ refill
               epilogue: x alpha ─ SwiGLU ─ quantise or convert ─ store
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import Expected, sm90_fc1
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import store_fc1_outputs
from densemoe.compile.kernels.sm90_fc1 import OUTPUT_COLUMNS, wait
from densemoe.runtime.recipe import Parameter, Recipe, pointer_or_null
from densemoe.runtime.variant import Variant

OP = "groupedfc1"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT


@cute.kernel
def groupedfc1_kernel(
    a: cutlass.Pointer,
    a_scales: cutlass.Pointer,
    b: cutlass.Pointer,
    alpha: cutlass.Pointer,
    output_multiplier: cutlass.Pointer,
    c: cutlass.Pointer,
    c_scales: cutlass.Pointer,
    tiles: cutlass.Pointer,
    rows: cutlass.Pointer,
    hidden: Int32,
    intermediate: Int32,
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
    row_bytes = Int64(k_blocks) * common.SUPERBLOCK_BYTES

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * common.SUPERBLOCK_BYTES))
    barriers = all_barriers.subview(warp * stages)
    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()

    pr.griddepcontrol("wait")  # the tiles say which weights are read
    pr.griddepcontrol("launch_dependents")
    units = common.load_global_s32_or(tiles, Int32(1), Int32(0)) * row_blocks
    unit = bid * common.WARPS + warp
    workers = ctas * common.WARPS

    # what the ring fetches next, `stages` superblocks ahead
    next_unit = unit
    next_k = Int32(0)
    next_source = b + Int64(weight_row(tiles, next_unit, units, row_blocks)) * row_bytes
    for i in cutlass.range_constexpr(stages):
        if next_unit < units:
            if lane == 0:
                common.start_copy(ring, barriers, i, next_source)
            next_source = next_source + common.SUPERBLOCK_BYTES
            next_k += 1
            if next_k == k_blocks:
                next_k = Int32(0)
                next_unit += workers
                next_source = b + Int64(weight_row(tiles, next_unit, units, row_blocks)) * row_bytes

    stage = Int32(0)
    phase = Int32(0)
    while unit < units:
        expert, first, count = tile_of(tiles, unit // row_blocks)
        places, exists = common.lane_tokens(config, Int32(0), g, count)
        tokens = [common.load_global_s32_or(rows + Int64(first + p) * 4, e, Int32(0)) for p, e in zip(places, exists, strict=True)]
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
            if next_unit < units:
                if lane == 0:
                    common.start_copy(ring, barriers, stage, next_source)
                next_source = next_source + common.SUPERBLOCK_BYTES
                next_k += 1
                if next_k == k_blocks:
                    next_k = Int32(0)
                    next_unit += workers
                    next_source = b + Int64(weight_row(tiles, next_unit, units, row_blocks)) * row_bytes
            stage += 1
            if stage == stages:
                stage = Int32(0)
                phase = phase ^ 1

        store_fc1_outputs(
            config,
            accumulators,
            alpha,
            None,
            output_multiplier,
            c,
            c_scales,
            first,
            first + count,
            expert,
            Int32(0),
            (unit % row_blocks) * OUTPUT_COLUMNS,
            intermediate,
            g,
            t,
        )
        unit += workers


def tile_of(tiles: Any, index: Any) -> tuple[Any, Any, Any]:
    """(expert, first row, rows) of a tile of ``route``; the head of the list is as long as a tile."""
    words = common.load_global_v4_if(tiles + (Int64(index) + 1) * 16, Int32(1))
    return Int32(words[0]), Int32(words[1]), Int32(words[2])


def weight_row(tiles: Any, unit: Any, units: Any, row_blocks: Any) -> Any:
    """The superblock row of the packed weights that a unit reads; 0 where there is no such unit."""
    exists = Int32(unit < units)
    expert = common.load_global_s32_or(tiles + (Int64(unit // row_blocks) + 1) * 16, exists, Int32(0))
    return expert * row_blocks + unit % row_blocks


@cute.jit
def groupedfc1_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    alpha: cute.Pointer,
    output_multiplier: cute.Pointer,
    c: cute.Pointer,
    c_scales: cute.Pointer,
    tiles: cute.Pointer,
    rows: cute.Pointer,
    pairs: Int32,
    hidden: Int32,
    intermediate: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    groupedfc1_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    units = pairs * (intermediate // OUTPUT_COLUMNS)
    ctas = min((units + (common.WARPS - 1)) // common.WARPS, sm_count * config.resident_ctas)
    groupedfc1_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        alpha.raw_ptr(),
        output_multiplier.raw_ptr(),
        c.raw_ptr(),
        c_scales.raw_ptr(),
        tiles.raw_ptr(),
        rows.raw_ptr(),
        hidden,
        intermediate,
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
    """The compile-time parameters of ``variant``: those of the dense kernel."""
    return sm90_fc1.config_of(variant)


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
            pointer_or_null("output_multiplier", "output_multiplier", nvfp4_output),
            Parameter("c", "pointer", "c.codes" if nvfp4_output else "c"),
            pointer_or_null("c_scales", "c.scales", nvfp4_output),
            Parameter("tiles", "pointer", "tiles"),
            Parameter("rows", "pointer", "rows"),
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
        ),
        let=(("units", f"M * top_k * (I // {OUTPUT_COLUMNS})"),),
        grid=(f"min(ceil_div(units, {common.WARPS}), sm_count * {config.resident_ctas})", 1, 1),
        block=(common.WARPS * 32, 1, 1),
        dynamic_smem=common.shared_memory_bytes(config),
        programmatic_launch=True,
        smem_carveout=100,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = (
        *(pointer(Uint8, 16) for _ in range(3)),
        *(pointer(Uint8, 4) for _ in range(2)),  # float32, addressed in bytes as the rest
        *(pointer(Uint8, 16) for _ in range(3)),
        pointer(Uint8, 4),
    )
    words = tuple(Int32(value) for value in (16, 256, 128, 132))
    return groupedfc1_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: nine pointers and four words (without the stream)."""
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in recipe(variant).parameters[:9]]
    return [*pointers, names["M"] * names["top_k"], *(names[name] for name in ("H", "I", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``: the dense kernel's."""
    return sm90_fc1.expected(variant)
