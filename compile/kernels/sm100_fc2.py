"""FC2 by tcgen05: one NVFP4 GEMM over K = E·I with a scale per token and expert (contract section 4).

The reduction of an output tile is a row of steps, K 256 each, over all experts or the listed ones. One accumulator holds one expert; its epilogue
adds alpha times it to float32 sums in registers, while the MMA warp fills the next accumulator. A scalar alpha needs no such border: the whole
row is one accumulation. Split-K cuts the row into equal parts, anywhere, also inside an expert:

    TMA warp    weights of the first stages ─ griddepcontrol.wait ─ activations ─ then stage by stage, over tile borders
    MMA warp    per expert of a part: wait for an accumulator ─ per K 256: wait ─ scales to tensor memory ─ 4·halves MMAs ─ release
    epilogues   per expert of a part: read ─ release ─ sums += alpha · accumulator, where alpha is not 0
                per part, not split: convert ─ store
                split: store the sums in the workspace ─ take a ticket; the last of a tile adds the parts in order, converts, stores and clears
                the ticket. The order is fixed, so the result does not depend on who came last, and a CUDA graph may replay the launch.

A CTA's last tile leaves by TMA: the ring is drained by then, and each epilogue warp stages its 32 rows in it, so that the store costs no stage. The
ring holds the next tile's operands while an earlier tile ends: such tiles (many tokens) leave from registers.

Run-time switches: strides of alpha (0 for a scalar); ``active_experts`` null or ``[count, expert, …]``; splits; L2 prefetch; programmatic launch.
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
from densemoe.runtime.recipe import Parameter, Recipe, Workspace
from densemoe.runtime.variant import Variant

OP = "fc2"
ARCHITECTURES = common.ARCHITECTURES
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
TILES_N = (64, 128, 256)
SPLITS = (1, 2, 4)
BLOCK = 32  # columns that an epilogue thread reads at once
BOX_WORDS = launch.STORE_ROW_BYTES // 4  # of a row of one TMA store
BOX_BYTES = launch.STORE_ROWS * launch.STORE_ROW_BYTES
SCALE_ROWS_GRANULE = 64  # H is a multiple of it (contract section 8): 64 columns are stored or none


@cute.kernel
def fc2_kernel(
    map_a: cutlass.GridConstant[cuda_types.TensorMap],
    map_b: cutlass.GridConstant[cuda_types.TensorMap],
    map_a_scales: cutlass.GridConstant[cuda_types.TensorMap],
    map_b_scales: cutlass.GridConstant[cuda_types.TensorMap],
    map_c: cutlass.GridConstant[cuda_types.TensorMap],
    alpha: cutlass.Pointer,
    c: cutlass.Pointer,
    active_experts: cutlass.Pointer,
    partials: cutlass.Pointer,
    tickets: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    hidden: Int32,
    steps_per_expert: Int32,
    cluster_rows: Int32,
    cluster_columns: Int32,
    splits: Int32,
    alpha_stride_m: Int32,
    alpha_stride_e: Int32,
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
    work = cluster_rows * cluster_columns * splits
    listed = Int32(active_experts.toint() != 0)
    if waits_first != 0:
        pr.griddepcontrol("wait")  # the list may come from the launch before
    if warp < config.epilogue_warps:
        if cutlass.const_expr(config.moves_registers):
            pr.setmaxregister(launch.EPILOGUE_REGISTERS, pr.SetMaxRegisterAction.INCREASE)
        pr.griddepcontrol("wait")
        steps = common.load_i32_or(active_experts, listed, experts) * steps_per_expert
        span = accumulated_steps(alpha_stride_e, steps, steps_per_expert)
        half = warp // common.EPILOGUE_WARPS
        thread = tid % common.CTA_ROWS
        lane_base = tmem + (((warp % common.EPILOGUE_WARPS) * common.WARP) << common.LANES_SHIFT)
        n_tiles = (hidden + (config.tile_n - 1)) // config.tile_n
        turn = Uint32(half)
        for item in cutlass.range(first, work, stride, unroll=1):
            row_tile, n_tile, begin, end = part_of(config, place, item, cluster_rows, splits, steps)
            row = row_tile * common.CTA_ROWS + thread
            exists = Int32(n_tile < n_tiles)
            writes = exists & Int32(row < tokens_total)
            sums = [Float32(0.0) for _ in range(config.columns)]
            for group in cutlass.range(begin // span, groups_end(begin, end, span), unroll=1):
                expert = common.load_i32_or(active_experts + Int64(group + 1) * 4, listed, group)
                at = Int64(row) * Int64(alpha_stride_m) + Int64(expert) * Int64(alpha_stride_e)
                scale = common.load_f32_if(alpha + at * 4, writes)
                index, _ = common.accumulator_of(config, turn)
                full, phase = common.published_of(config, turn)
                common.wait(shared.accumulator_full.subview(full), phase)
                pr.tcgen05_fence(pr.Tcgen05Fence.AFTER_THREAD_SYNC)
                first_column = pipeline.accumulator_address(config, lane_base, index)
                for block in cutlass.range_constexpr(config.columns // BLOCK):
                    values = pipeline.load_columns(first_column + block * BLOCK, BLOCK)
                    pipeline.loaded()
                    if cutlass.const_expr(block == config.columns // BLOCK - 1):
                        pipeline.release_accumulator(config, shared, index, place.leader)
                    part = sums[block * BLOCK : (block + 1) * BLOCK]
                    if scale != 0.0:
                        part = epilogue.add_scaled(part, scale, values)
                    sums = [*sums[: block * BLOCK], *part, *sums[(block + 1) * BLOCK :]]
                turn = turn + Uint32(config.halves)

            finishes = Int32(1)
            if (splits > 1) & (exists != 0):
                tile = (Int64(row_tile) * Int64(n_tiles) + Int64(n_tile)) * config.halves + Int64(half)
                split = (item // cluster_rows) % splits
                own = partials + partial_offset(config, tile * Int64(splits) + Int64(split), thread)
                for quad in cutlass.range_constexpr(config.columns // 4):
                    common.store_if("v4.f32", own + quad * (common.CTA_ROWS * 16), writes, sums[4 * quad : 4 * quad + 4])
                # the ticket's release covers what the barrier has ordered before it, and its acquire what the next barrier orders behind it
                pr.barrier_cta_sync(1 + half, thread_count=common.CTA_ROWS)
                if thread == 0:
                    shared.words[half] = take_ticket(tickets + tile * 4)
                pr.barrier_cta_sync(1 + half, thread_count=common.CTA_ROWS)
                finishes = Int32(shared.words[half] == splits - 1)
                if finishes != 0:
                    sums = load_partials(config, partials + partial_offset(config, tile * Int64(splits), thread), writes)
                    for other in cutlass.range(1, splits, unroll=1):
                        at = partial_offset(config, tile * Int64(splits) + Int64(other), thread)
                        sums = epilogue.add_lists(sums, load_partials(config, partials + at, writes))
                    if thread == 0:
                        common.store_if("b32", tickets + tile * 4, Int32(1), [Uint32(0)])
            if finishes != 0:
                column = n_tile * config.tile_n + half * config.columns
                bits = epilogue.OUTPUT_BITS[config.c_dtype]
                address = c + (Int64(row) * Int64(hidden) + Int64(column)) * bits // 8
                words = epilogue.convert(config.c_dtype, sums)
                if (Int32(staging_bytes(config) != 0) & Int32(item + stride >= work)) != 0:
                    first_row = row - thread % common.WARP
                    if (exists & Int32(first_row < tokens_total)) != 0:
                        store_tile(config, shared, map_c, warp, thread % common.WARP, words, column, first_row)
                else:
                    for chunk in cutlass.range_constexpr(0, len(words), 4):
                        inside = chunk * 32 // bits // SCALE_ROWS_GRANULE * SCALE_ROWS_GRANULE
                        stored = writes & Int32(column + inside < hidden)
                        common.store_if("v4.b32", address + chunk * 4, stored, words[chunk : chunk + 4])
    else:
        if cutlass.const_expr(config.moves_registers):
            pr.setmaxregister(launch.ISSUE_REGISTERS, pr.SetMaxRegisterAction.DECREASE)
        if warp == config.tma_warp:
            steps = common.load_i32_or(active_experts, listed, experts) * steps_per_expert
            # weights of the first stages: they do not depend on the launch before
            _, n_tile, begin, end = part_of(config, place, first, cluster_rows, splits, steps)
            early = Int32(0)
            if first < work:
                early = min(end - begin, Int32(config.stages))
            at, k_tile, left = walk_from(active_experts, listed, begin, Int32(early > 0), steps_per_expert)
            for ahead in cutlass.range(early, unroll=1):
                if pr.elect_sync():
                    pipeline.expect_stage(config, shared, ahead, place.pair_rank)
                    pipeline.load_weights(config, place, shared, maps, ahead, k_tile, n_tile)
                at, k_tile, left = walk_on(active_experts, listed, at, k_tile, left, Int32(ahead + 1 < early), steps_per_expert)
            pr.griddepcontrol("wait")
            pr.griddepcontrol("launch_dependents")
            used = Uint32(0)
            for item in cutlass.range(first, work, stride, unroll=1):
                row_tile, n_tile, begin, end = part_of(config, place, item, cluster_rows, splits, steps)
                at, k_tile, left = walk_from(active_experts, listed, begin, Int32(begin < end), steps_per_expert)
                for step in cutlass.range(begin, end, unroll=1):
                    stage, phase = common.stage_of(config, used)
                    if used >= Uint32(early):
                        common.wait(shared.empty.subview(stage), phase ^ Uint32(1))
                    if pr.elect_sync():
                        if used >= Uint32(early):
                            pipeline.expect_stage(config, shared, stage, place.pair_rank)
                            pipeline.load_weights(config, place, shared, maps, stage, k_tile, n_tile)
                        pipeline.load_activations(config, place, shared, maps, stage, k_tile, row_tile)
                        if (prefetch != 0) & (step + prefetch < end):
                            ahead_tile = k_tile_of(active_experts, listed, step + prefetch, steps_per_expert)
                            pipeline.prefetch_weights(config, place, maps, ahead_tile, n_tile)
                    used = used + Uint32(1)
                    at, k_tile, left = walk_on(active_experts, listed, at, k_tile, left, Int32(step + 1 < end), steps_per_expert)
            pipeline.drain(config, shared, used)

        if (warp == config.mma_warp) & (place.pair_rank == 0):
            steps = common.load_i32_or(active_experts, listed, experts) * steps_per_expert
            span = accumulated_steps(alpha_stride_e, steps, steps_per_expert)
            described = pipeline.descriptors(config, shared)
            used = Uint32(0)
            turn = Uint32(0)
            for item in cutlass.range(first, work, stride, unroll=1):
                _, n_tile, begin, end = part_of(config, place, item, cluster_rows, splits, steps)
                for group in cutlass.range(begin // span, groups_end(begin, end, span), unroll=1):
                    accumulators = [common.accumulator_of(config, turn + Uint32(half)) for half in range(config.halves)]
                    for half in cutlass.range_constexpr(config.halves):
                        index, phase = accumulators[half]
                        common.wait(shared.accumulator_empty.subview(index), phase ^ Uint32(1))
                    pr.tcgen05_fence(pr.Tcgen05Fence.AFTER_THREAD_SYNC)
                    columns = [pipeline.accumulator_address(config, tmem, index) for index, _ in accumulators]
                    group_begin = max(begin, group * span)
                    group_end = min(end, (group + 1) * span)
                    for step in cutlass.range(group_begin, group_end, unroll=1):
                        stage, phase = common.stage_of(config, used)
                        common.wait(shared.full.subview(stage), phase)
                        if pr.elect_sync():
                            pipeline.multiply(config, tmem, described, stage, columns, step != group_begin, n_tile)
                            pipeline.release_stage(config, place, shared, stage)
                        used = used + Uint32(1)
                    if pr.elect_sync():
                        pipeline.publish_accumulators(config, place, shared, turn)
                    turn = turn + Uint32(config.halves)

    common.tear_down(config, warp, tmem)


def part_of(config: common.Config, place: common.Place, item: Any, cluster_rows: Any, splits: Any, steps: Any) -> tuple[Any, Any, Any, Any]:
    """What this CTA does of work item ``item``: its 128-row tile, its tile of weight rows, and the steps [begin, end). Items that share weights
    are neighbours: rows of the tile fastest, then splits."""
    row_tile = (item % cluster_rows) * config.cluster_m + place.m_rank
    rest = item // cluster_rows
    split = rest % splits
    return row_tile, (rest // splits) * config.cluster_n + place.n_rank, steps * split // splits, steps * (split + 1) // splits


def k_tile_of(active_experts: Any, listed: Any, step: Any, steps_per_expert: Any) -> Any:
    """The K tile of all experts' columns that step ``step`` of the row multiplies."""
    place = step // steps_per_expert
    expert = common.load_i32_or(active_experts + Int64(place + 1) * 4, listed, place)
    return expert * steps_per_expert + step % steps_per_expert


def walk_from(active_experts: Any, listed: Any, step: Any, exists: Any, steps_per_expert: Any) -> tuple[Any, Any, Any]:
    """Begins a walk along the row at ``step``: the expert's place, the K tile, and the steps up to the next expert. ``walk_on`` goes on without
    a division. Nothing is read unless the step ``exists``."""
    at = step // steps_per_expert
    expert = common.load_i32_or(active_experts + Int64(at + 1) * 4, listed & exists, at)
    inside = step - at * steps_per_expert
    return at, expert * steps_per_expert + inside, steps_per_expert - inside


@cute.jit
def walk_on(active_experts, listed, at, k_tile, left, exists, steps_per_expert):
    """The next step of a walk. The list's next entry is asked for here, behind this step's copies and before the wait for the next stage."""
    k_tile = k_tile + 1
    left = left - 1
    if left == 0:
        at = at + 1
        k_tile = common.load_i32_or(active_experts + Int64(at + 1) * 4, listed & exists, at) * steps_per_expert
        left = steps_per_expert
    return at, k_tile, left


def accumulated_steps(alpha_stride_e: Any, steps: Any, steps_per_expert: Any) -> Any:
    """Steps that one accumulator holds: an expert's, or all of them under a scalar alpha; at least 1, as a divisor."""
    return common.select(Int32(alpha_stride_e != 0), steps_per_expert, common.select(Int32(steps > 0), steps, Int32(1)))


def groups_end(begin: Any, end: Any, span: Any) -> Any:
    """One past the last group of ``span`` steps that [begin, end) touches; ``begin // span`` where it is empty."""
    return common.select(Int32(end > begin), (end + (span - 1)) // span, begin // span)


def staging_bytes(config: common.Config) -> int:
    """Bytes of the ring that a tile's output is staged in; 0 where no operand's stages hold it (256 x 256 x float32, which is not shipped)."""
    size = common.CTA_ROWS * config.tile_n * epilogue.OUTPUT_BITS[config.c_dtype] // 8
    return size if size <= max(config.a_bytes, config.b_bytes) * config.stages else 0


@cute.jit
def store_tile(config: cutlass.Constexpr, shared: cutlass.Constexpr, map_c, warp, lane, words: cutlass.Constexpr, column, first_row):
    """One epilogue warp: its 32 rows of a CTA's last tile by TMA, which clips rows past M and columns past H.

    The accumulator that was waited for was published after every MMA of this CTA, so the ring is read and nothing more is copied into it. A box is
    32 rows of 128 bytes under the 128-byte swizzle: lanes store 16 bytes each without a bank conflict.
    """
    boxes = len(words) // BOX_WORDS
    operand = shared.a if common.CTA_ROWS * config.tile_n * epilogue.OUTPUT_BITS[config.c_dtype] // 8 <= config.a_bytes * config.stages else shared.b
    own = warp * (boxes * BOX_BYTES)
    row = operand.data_ptr().toint(Int32) + own + lane * launch.STORE_ROW_BYTES
    for chunk in cutlass.range_constexpr(0, len(words), 4):
        inside = chunk % BOX_WORDS // 4
        place = row + chunk // BOX_WORDS * BOX_BYTES + ((lane % 8) ^ inside) * 16
        pr.inline_ptx_hl("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[place, *words[chunk : chunk + 4]])
    pr.fence_proxy("async_shared", space=pr.SharedSpace.shared_cta)
    cute.arch.sync_warp()
    if pr.elect_sync():
        for box in cutlass.range_constexpr(boxes):
            at = (column + box * (launch.STORE_ROW_BYTES * 8 // epilogue.OUTPUT_BITS[config.c_dtype]), first_row)
            pr.cp_async_bulk_tensor_global_shared_cta(map_c.get_ptr(), operand.subview(own + box * BOX_BYTES), list(at))
        pr.cp_async_bulk_commit_group()
        pr.cp_async_bulk_wait_group(0, read=True)  # shared memory outlasts the copy


def partial_offset(config: common.Config, part: Any, thread: Any) -> Any:
    """Byte offset of a thread's first four sums of part ``part``: ``[part][columns / 4][128 rows][4]``, so that a warp's access is contiguous."""
    return part * (config.columns * common.CTA_ROWS * 4) + Int64(thread) * 16


def load_partials(config: common.Config, address: Any, valid: Any) -> list[Any]:
    """A thread's sums of one part, read past the L1; zeros where not ``valid``."""
    values: list[Any] = []
    for quad in range(config.columns // 4):
        values += pr.inline_ptx_hl(
            "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
            " @p ld.relaxed.gpu.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }",
            write_only_types=[Float32] * 4,
            read_only_args=[address + quad * (common.CTA_ROWS * 16), valid],
        )
    return values


def take_ticket(address: Any) -> Any:
    """Adds 1 to a counter, with acquire and release at device scope; gives the value before."""
    return pr.inline_ptx_hl("atom.acq_rel.gpu.global.add.u32 {$w0}, [{$r0}], 1;", write_only_types=[Int32], read_only_args=[address])


@cute.jit
def fc2_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    b_scales: cute.Pointer,
    alpha: cute.Pointer,
    c: cute.Pointer,
    active_experts: cute.Pointer,
    partials: cute.Pointer,
    tickets: cute.Pointer,
    tokens_total: Int32,
    experts: Int32,
    hidden: Int32,
    intermediate: Int32,
    alpha_stride_m: Int32,
    alpha_stride_e: Int32,
    splits: Int32,
    prefetch: Int32,
    early_list: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    fc2_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    maps = launch.encode_maps(config, a, a_scales, b, b_scales, tokens_total, hidden, experts * intermediate)
    map_c = launch.encode_output_map(config, c, tokens_total, hidden)
    cluster_rows = (tokens_total + (common.CTA_ROWS * config.cluster_m - 1)) // (common.CTA_ROWS * config.cluster_m)
    cluster_columns = (hidden + (config.tile_n * config.cluster_n - 1)) // (config.tile_n * config.cluster_n)
    clusters = cluster_rows * cluster_columns * splits
    listed = Int32(active_experts.toint() != 0)
    fc2_kernel(
        *maps,
        map_c,
        alpha.raw_ptr(),
        c.raw_ptr(),
        active_experts.raw_ptr(),
        partials.raw_ptr(),
        tickets.raw_ptr(),
        tokens_total,
        experts,
        hidden,
        intermediate // common.K_TILE,
        cluster_rows,
        cluster_columns,
        splits,
        alpha_stride_m,
        alpha_stride_e,
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
    """The compile-time parameters of ``variant``: an epilogue group for each accumulator of a tile, since a thread's sums fill its registers."""
    groups = max(1, variant.tile_n // common.WIDEST_MMA)
    return common.Config(variant.tile_m, variant.tile_n, variant.cluster_m, variant.cluster_n, variant.c_dtype, epilogue_groups=groups)


def check(variant: Variant) -> None:
    """Raises VariantError where this kernel cannot be ``variant``."""
    common.check_tile(variant, TILES_N)


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    config = config_of(variant)
    return Recipe(
        parameters=(
            *launch.map_parameters(config, "H"),
            launch.output_map_parameter(config),
            Parameter("alpha", "pointer", "alpha"),
            Parameter("c", "pointer", "c"),
            Parameter("active_experts", "pointer", "active_experts"),
            Parameter("partials", "pointer", "workspace.partials"),
            Parameter("tickets", "pointer", "workspace.tickets"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("hidden", "u32", "H"),
            Parameter("steps_per_expert", "u32", f"I // {common.K_TILE}"),
            Parameter("cluster_rows", "u32", "cluster_rows"),
            Parameter("cluster_columns", "u32", "cluster_columns"),
            Parameter("splits", "u32", "splits"),
            Parameter("alpha_stride_m", "u32", "alpha_stride_m"),
            Parameter("alpha_stride_e", "u32", "alpha_stride_e"),
            Parameter("prefetch", "u32", "prefetch"),
            Parameter("waits_first", "u32", "has_active_list * (1 - early_list)"),
        ),
        let=(
            ("cluster_rows", f"ceil_div(M, {common.CTA_ROWS * config.cluster_m})"),
            ("cluster_columns", f"ceil_div(H, {config.tile_n * config.cluster_n})"),
            ("split_tiles", f"cluster_rows * {config.cluster_m} * ceil_div(H, {config.tile_n}) if splits > 1 else 0"),
        ),
        grid=(f"min(cluster_rows * cluster_columns * splits, resident_clusters) * {config.cluster_size}", 1, 1),
        block=(config.warps * common.WARP, 1, 1),
        cluster=(config.cluster_size, 1, 1),
        dynamic_smem=config.smem_bytes,
        workspaces=(
            Workspace("workspace.partials", f"split_tiles * splits * {config.tile_n * common.CTA_ROWS * 4}"),
            Workspace("workspace.tickets", f"split_tiles * {config.halves * 4}", zeroed=True),
        ),
        programmatic_launch=True,
        settings=(("splits", SPLITS), ("prefetch", launch.PREFETCH_DISTANCES), ("early_list", (0, 1))),
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = tuple(pointer(Uint8, alignment) for alignment in (32, 16, 32, 16, 4, 16, 4, 16, 16))
    words = tuple(Int32(value) for value in (8, 2, 256, 256, 2, 1, 1, 0, 0, 148))
    return fc2_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: nine pointers and ten words (without the stream)."""
    parameters = recipe(variant).parameters
    operands = [addresses[role] for role in launch.OPERANDS]
    pointers = [addresses[each.value] for each in parameters[5:10]]
    words = ("M", "E", "H", "I", "alpha_stride_m", "alpha_stride_e", "splits", "prefetch", "early_list", "sm_count")
    return [*operands, *pointers, *(names[name] for name in words)]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    config = config_of(variant)
    counts = launch.expected_counts(config, activation_loads=1, weight_loads=2)
    counts["fma.rn.f32x2"] = config.columns // 2
    counts["tcgen05.ld.sync.aligned.32x32b.x32.b32"] = config.columns // BLOCK
    counts["atom.acq_rel.gpu.global.add.u32"] = 1
    if staging_bytes(config):
        words = config.columns * epilogue.OUTPUT_BITS[config.c_dtype] // 32
        counts[launch.TENSOR_STORE] = words // BOX_WORDS
        counts["st.shared.v4.b32"] = words // 4
    return Expected(ptx_counts=counts, max_registers=launch.registers(config), design=launch.design(config))
