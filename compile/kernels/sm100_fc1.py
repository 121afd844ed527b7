"""FC1 by tcgen05: NVFP4 GEMM over all experts, SwiGLU, optional alpha_post, NVFP4 quantisation or conversion (contract section 3).

A CTA takes tiles with a fixed stride, tiles of the same weights side by side, so that the weights come from L2 after the first. Rows of an
expert are interleaved up and gate in groups of 64: the 128 columns of an accumulator are 64 up and their 64 gate columns, one epilogue unit, in
which a thread holds up and gate of its row, 64 outputs: 32 bytes of codes and one word of scales.

    TMA warp    weights of the first stages ─ griddepcontrol.wait ─ activations ─ then stage by stage, over tile borders
    MMA warp    per tile: wait for its accumulators ─ per K 256: wait ─ scales to tensor memory ─ 4·halves MMAs ─ release
    epilogues   per accumulator: read ─ release ─ x alpha ─ SwiGLU ─ x alpha_post ─ quantise or convert ─ store

Run-time switches: ``alpha_post`` null; ``active_experts`` null (every expert) or ``[count, expert, expert, …]``, of which only tiles of listed
experts are computed and written; L2 prefetch distance; programmatic launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.experimental.cuda as cuda_types
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import Expected
from densemoe.compile.kernels import sm100_common as common
from densemoe.compile.kernels import sm100_epilogue as epilogue
from densemoe.compile.kernels import sm100_launch as launch
from densemoe.compile.kernels import sm100_pipeline as pipeline
from densemoe.compile.kernels.host import pointer
from densemoe.runtime.recipe import Parameter, Recipe, pointer_or_null
from densemoe.runtime.variant import Variant

OP = "fc1"
ARCHITECTURES = common.ARCHITECTURES
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
TILES_N = (128, 256)
UNIT = 64  # output columns of one accumulator


@cute.kernel
def fc1_kernel(
    map_a: cutlass.GridConstant[cuda_types.TensorMap],
    map_b: cutlass.GridConstant[cuda_types.TensorMap],
    map_a_scales: cutlass.GridConstant[cuda_types.TensorMap],
    map_b_scales: cutlass.GridConstant[cuda_types.TensorMap],
    alpha: cutlass.Pointer,
    alpha_post: cutlass.Pointer,
    output_multiplier: cutlass.Pointer,
    c: cutlass.Pointer,
    c_scales: cutlass.Pointer,
    active_experts: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    tiles_per_expert: Int32,
    cluster_rows: Int32,
    k_tiles: Int32,
    prefetch: Int32,
    waits_first: Int32,
    config: cutlass.Constexpr,
):
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    place = common.place_of(config)
    shared = common.shared_memory(config)
    maps = pipeline.Maps(map_a, map_b, map_a_scales, map_b_scales)
    tmem = common.set_up(config, shared, warp)

    first = bid // config.cluster_size
    stride = ctas // config.cluster_size
    n_tiles = experts * tiles_per_expert
    listed = Int32(active_experts.toint() != 0)
    if waits_first != 0:
        pr.griddepcontrol("wait")  # the list may come from the launch before

    if warp == config.tma_warp:
        count = common.load_i32_or(active_experts, listed, experts) * tiles_per_expert
        tiles = cluster_rows * ((count + (config.cluster_n - 1)) // config.cluster_n)
        # weights of the first stages: they do not depend on the launch before
        early = Int32(0)
        if first < tiles:
            early = min(k_tiles, Int32(config.stages))
        slot = (first // cluster_rows) * config.cluster_n + place.n_rank
        n_tile = weight_tile(active_experts, listed, slot, count, tiles_per_expert, n_tiles)
        for step in cutlass.range(early, unroll=1):
            if pr.elect_sync():
                pipeline.expect_stage(config, shared, step, place.pair_rank)
                pipeline.load_weights(config, place, shared, maps, step, step, n_tile)
        pr.griddepcontrol("wait")
        pr.griddepcontrol("launch_dependents")
        used = Uint32(0)
        for tile in cutlass.range(first, tiles, stride, unroll=1):
            row_tile = (tile % cluster_rows) * config.cluster_m + place.m_rank
            slot = (tile // cluster_rows) * config.cluster_n + place.n_rank
            n_tile = weight_tile(active_experts, listed, slot, count, tiles_per_expert, n_tiles)
            for step in cutlass.range(k_tiles, unroll=1):
                stage, phase = common.stage_of(config, used)
                if used >= Uint32(early):
                    common.wait(shared.empty.subview(stage), phase ^ Uint32(1))
                if pr.elect_sync():
                    if used >= Uint32(early):
                        pipeline.expect_stage(config, shared, stage, place.pair_rank)
                        pipeline.load_weights(config, place, shared, maps, stage, step, n_tile)
                    pipeline.load_activations(config, place, shared, maps, stage, step, row_tile)
                    if (prefetch != 0) & (step + prefetch < k_tiles):
                        pipeline.prefetch_weights(config, place, maps, step + prefetch, n_tile)
                used = used + Uint32(1)
        pipeline.drain(config, shared, used)

    if (warp == config.mma_warp) & (place.pair_rank == 0):
        count = common.load_i32_or(active_experts, listed, experts) * tiles_per_expert
        tiles = cluster_rows * ((count + (config.cluster_n - 1)) // config.cluster_n)
        described = pipeline.descriptors(config, shared)
        used = Uint32(0)
        turn = Uint32(0)
        for _tile in cutlass.range(first, tiles, stride, unroll=1):
            accumulators = [common.accumulator_of(config, turn + Uint32(half)) for half in range(config.halves)]
            for half in cutlass.range_constexpr(config.halves):
                index, phase = accumulators[half]
                common.wait(shared.accumulator_empty.subview(index), phase ^ Uint32(1))
            pr.tcgen05_fence(pr.Tcgen05Fence.AFTER_THREAD_SYNC)
            columns = [pipeline.accumulator_address(config, tmem, index) for index, _ in accumulators]
            for step in cutlass.range(k_tiles, unroll=1):
                stage, phase = common.stage_of(config, used)
                common.wait(shared.full.subview(stage), phase)
                if pr.elect_sync():
                    pipeline.multiply(config, tmem, described, stage, columns, step != 0, Int32(0))
                    pipeline.release_stage(config, place, shared, stage)
                used = used + Uint32(1)
            if pr.elect_sync():
                pipeline.publish_accumulators(config, place, shared, turn)
            turn = turn + Uint32(config.halves)

    if warp < config.epilogue_warps:
        pr.griddepcontrol("wait")
        count = common.load_i32_or(active_experts, listed, experts) * tiles_per_expert
        tiles = cluster_rows * ((count + (config.cluster_n - 1)) // config.cluster_n)
        has_post = Int32(alpha_post.toint() != 0)
        multiplier = Float32(1.0)
        if cutlass.const_expr(config.c_dtype == "nvfp4"):
            multiplier = common.load_f32_if(output_multiplier, Int32(1))
        lane_base = tmem + ((warp * common.WARP) << common.LANES_SHIFT)
        turn = Uint32(0)
        for tile in cutlass.range(first, tiles, stride, unroll=1):
            row = ((tile % cluster_rows) * config.cluster_m + place.m_rank) * common.CTA_ROWS + tid
            slot = (tile // cluster_rows) * config.cluster_n + place.n_rank
            exists = Int32(slot < count)
            n_tile = weight_tile(active_experts, listed, slot, count, tiles_per_expert, n_tiles)
            expert = n_tile // tiles_per_expert
            writes = exists & Int32(row < tokens_total)
            scale = common.load_f32_if(alpha + Int64(expert) * 4, exists)
            post = common.load_f32_if(alpha_post + (Int64(row) * Int64(experts) + Int64(expert)) * 4, writes & has_post)
            kept = epilogue.keep_mask(Int32(1) - (has_post & Int32(post == 0.0)))
            if has_post == 0:
                post = Float32(1.0)
            for half in cutlass.range(config.halves, unroll=1):
                index, _ = common.accumulator_of(config, turn)
                full, phase = common.published_of(config, turn)
                common.wait(shared.accumulator_full.subview(full), phase)
                pr.tcgen05_fence(pr.Tcgen05Fence.AFTER_THREAD_SYNC)
                first_column = pipeline.accumulator_address(config, lane_base, index)
                unit = n_tile * config.halves + half  # of 64 output columns
                codes = []
                scales = Uint32(0)
                for group in cutlass.range_constexpr(UNIT // epilogue.GROUP):
                    up = pipeline.load_columns(first_column + group * epilogue.GROUP, epilogue.GROUP)
                    gate = pipeline.load_columns(first_column + UNIT + group * epilogue.GROUP, epilogue.GROUP)
                    pipeline.loaded()
                    if cutlass.const_expr(group == UNIT // epilogue.GROUP - 1):
                        pipeline.release_accumulator(config, shared, index, place.leader)
                    values = epilogue.activated(up, gate, scale, post)
                    if cutlass.const_expr(config.c_dtype == "nvfp4"):
                        byte, words = epilogue.quantise_group(values, multiplier)
                        codes += words
                        scales = scales | (byte << (8 * group))
                    else:
                        element = (Int64(row) * Int64(n_tiles * config.halves) + Int64(unit)) * UNIT + group * epilogue.GROUP
                        address = c + element * epilogue.OUTPUT_BITS[config.c_dtype] // 8
                        words = epilogue.masked(epilogue.convert(config.c_dtype, values), kept)
                        for chunk in cutlass.range_constexpr(0, len(words), 4):
                            common.store_if("v4.b32", address + chunk * 4, writes, words[chunk : chunk + 4])
                if cutlass.const_expr(config.c_dtype == "nvfp4"):
                    units = n_tiles * config.halves
                    address = c + (Int64(row) * Int64(units) + Int64(unit)) * (UNIT // 2)
                    common.store_if("v8.b32", address, writes, epilogue.masked(codes, kept))
                    inside = (row % 32) * 16 + ((row % common.CTA_ROWS) // 32) * 4
                    tile_index = Int64(row // common.CTA_ROWS) * Int64(units) + Int64(unit)
                    address = c_scales + tile_index * common.SCALE_ATOM_BYTES + Int64(inside)
                    common.store_if("b32", address, writes, epilogue.masked([scales], kept))
                turn = turn + Uint32(1)

    common.tear_down(config, warp, tmem)


def weight_tile(active_experts: Any, listed: Any, slot: Any, count: Any, tiles_per_expert: Any, n_tiles: Any) -> Any:
    """The tile of weight rows that stands at place ``slot`` of ``count``; for a padded place ``n_tiles``, past the end, where TMA reads zeros."""
    exists = Int32(slot < count)
    place = slot // tiles_per_expert
    expert = common.load_i32_or(active_experts + Int64(place + 1) * 4, listed & exists, place)
    return common.select(exists, expert * tiles_per_expert + slot % tiles_per_expert, n_tiles)


@cute.jit
def fc1_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    b_scales: cute.Pointer,
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
    prefetch: Int32,
    early_list: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    fc1_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    maps = launch.encode_maps(config, a, a_scales, b, b_scales, tokens_total, experts * intermediate * 2, hidden)
    cluster_rows = (tokens_total + (common.CTA_ROWS * config.cluster_m - 1)) // (common.CTA_ROWS * config.cluster_m)
    tiles_per_expert = intermediate * 2 // config.tile_n
    clusters = cluster_rows * ((experts * tiles_per_expert + (config.cluster_n - 1)) // config.cluster_n)
    listed = Int32(active_experts.toint() != 0)
    fc1_kernel(
        *maps,
        alpha.raw_ptr(),
        alpha_post.raw_ptr(),
        output_multiplier.raw_ptr(),
        c.raw_ptr(),
        c_scales.raw_ptr(),
        active_experts.raw_ptr(),
        tokens_total,
        experts,
        tiles_per_expert,
        cluster_rows,
        (hidden + (common.K_TILE - 1)) // common.K_TILE,
        prefetch,
        listed * (1 - early_list),
        config,
    ).launch(
        grid=(min(clusters, sm_count // config.cluster_size) * config.cluster_size, 1, 1),
        block=[config.warps * common.WARP, 1, 1],
        min_blocks_per_mp=1,
        stream=stream,
        use_pdl=True,
        **launch.cluster_option(config),
    )


def config_of(variant: Variant) -> common.Config:
    """The compile-time parameters of ``variant``."""
    return common.Config(variant.tile_m, variant.tile_n, variant.cluster_m, variant.cluster_n, variant.c_dtype, epilogue_groups=1)


def check(variant: Variant) -> None:
    """Raises VariantError where this kernel cannot be ``variant``."""
    common.check_tile(variant, TILES_N)


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    config = config_of(variant)
    nvfp4_output = config.c_dtype == "nvfp4"
    return Recipe(
        parameters=(
            *launch.map_parameters(config, "E * 2 * I"),
            Parameter("alpha", "pointer", "alpha"),
            Parameter("alpha_post", "pointer", "alpha_post"),
            pointer_or_null("output_multiplier", "output_multiplier", nvfp4_output),
            Parameter("c", "pointer", "c.codes" if nvfp4_output else "c"),
            pointer_or_null("c_scales", "c.scales", nvfp4_output),
            Parameter("active_experts", "pointer", "active_experts"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("tiles_per_expert", "u32", "tiles_per_expert"),
            Parameter("cluster_rows", "u32", "cluster_rows"),
            Parameter("k_tiles", "u32", f"ceil_div(H, {common.K_TILE})"),
            Parameter("prefetch", "u32", "prefetch"),
            Parameter("waits_first", "u32", "has_active_list * (1 - early_list)"),
        ),
        let=(
            ("cluster_rows", f"ceil_div(M, {common.CTA_ROWS * config.cluster_m})"),
            ("tiles_per_expert", f"I * 2 // {config.tile_n}"),
            ("clusters", f"cluster_rows * ceil_div(E * tiles_per_expert, {config.cluster_n})"),
        ),
        grid=(f"min(clusters, resident_clusters) * {config.cluster_size}", 1, 1),
        block=(config.warps * common.WARP, 1, 1),
        cluster=(config.cluster_size, 1, 1),
        dynamic_smem=config.smem_bytes,
        programmatic_launch=True,
        settings=(("prefetch", launch.PREFETCH_DISTANCES), ("early_list", (0, 1))),
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = (
        *(pointer(Uint8, alignment) for alignment in (32, 16, 32, 16)),
        *(pointer(Uint8, 4) for _ in range(3)),  # float32, addressed in bytes as the rest
        pointer(Uint8, 32 if variant.c_dtype == "nvfp4" else 16),
        pointer(Uint8, 16),
        pointer(Uint8, 4),
    )
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 0, 0, 148))
    return fc1_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: ten pointers and seven words (without the stream)."""
    parameters = recipe(variant).parameters
    operands = [addresses[role] for role in launch.OPERANDS]
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in parameters[4:10]]
    return [*operands, *pointers, *(names[name] for name in ("M", "E", "H", "I", "prefetch", "early_list", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    config = config_of(variant)
    counts = launch.expected_counts(config, activation_loads=1, weight_loads=2)
    if config.c_dtype == "nvfp4":
        counts["cvt.rn.satfinite.e2m1x2.f32"] = UNIT // 2
        counts["st.global.v8.b32"] = 1
    counts["ex2.approx.ftz.f32"] = UNIT
    return Expected(ptx_counts=counts, max_registers=launch.registers(config), design=launch.design(config))
