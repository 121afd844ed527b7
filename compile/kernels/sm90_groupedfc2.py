"""FC2 for sm_90a over gathered tokens: the layer's output from FC1's compact rows, stream-K over the tiles of ``route`` (contract section 5).

An output block is 64 columns of all tokens. Its work is every K 128 of every tile (up to ``tile_m`` rows of one expert); all blocks' work is laid
end to end and cut into equal spans, one a warp. Each tile has tokens of its own, so its part is scaled and added to the float32 workspace:

    per span:  ring ─ wait ─ decode ─ mma.sync ─ refill      until a tile ends:  workspace[token] += row_alpha · accumulators (red.v4)
               until a block or the span ends: take a ticket; the last of a block's contributors converts, stores, and clears workspace and ticket

The workspace and the tickets are zero between launches: each launch leaves them as it found them, so CUDA graphs may replay it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import Expected, sm90_fc2
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import store_if, store_row
from densemoe.compile.kernels.sm90_fc1 import tile_of
from densemoe.compile.kernels.sm90_fc2 import OUTPUTS, add_scaled, add_to_workspace, broadcast, load_workspace_if, token_values, wait
from densemoe.compile.kernels.sm90_reduction import take_ticket
from densemoe.runtime.recipe import Parameter, Recipe, Workspace, pointer_or_null
from densemoe.runtime.variant import Variant

OP = "groupedfc2"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
FINISHED_TOKENS = 4  # tokens that a warp converts at a time: eight lanes hold the 64 columns of one


@cute.kernel
def groupedfc2_kernel(
    a: cutlass.Pointer,
    a_scales: cutlass.Pointer,
    b: cutlass.Pointer,
    row_alpha: cutlass.Pointer,
    c: cutlass.Pointer,
    partials: cutlass.Pointer,
    tickets: cutlass.Pointer,
    tiles: cutlass.Pointer,
    rows: cutlass.Pointer,
    tokens_total: Int32,
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
    superblock = common.SUPERBLOCK_BYTES
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K  # of one expert
    row_blocks = hidden // common.SUPERBLOCK_ROWS

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * superblock))
    barriers = all_barriers.subview(warp * stages)
    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()

    pr.griddepcontrol("wait")  # the tiles say which weights are read
    pr.griddepcontrol("launch_dependents")
    tile_count = common.load_global_s32_or(tiles, Int32(1), Int32(0))
    block_length = Int64(tile_count) * Int64(k_blocks)
    total = block_length * Int64(row_blocks)
    workers = min(Int64(ctas * common.WARPS), total)
    worker = Int64(bid * common.WARPS + warp)
    first = total
    last = total
    if worker < workers:
        first = worker * total // workers
        last = (worker + 1) * total // workers
    remaining = Int32(last - first)

    # position of the span's start: block of 64 columns, tile, K block
    row_block = Int32(first // block_length)
    inside = first - Int64(row_block) * block_length
    tile = Int32(inside // Int64(k_blocks))
    k = Int32(inside - Int64(tile) * Int64(k_blocks))

    # what the ring fetches next
    to_fetch = remaining
    next_row_block = row_block
    next_tile = tile
    next_k = k
    next_source = weights_of(b, tiles, Int32(to_fetch > 0), next_tile, next_row_block, row_blocks, k_blocks) + Int64(k) * superblock
    for i in cutlass.range_constexpr(stages):
        if to_fetch > 0:
            if lane == 0:
                common.start_copy(ring, barriers, i, next_source)
            to_fetch -= 1
            next_source = next_source + superblock
            next_k += 1
            if next_k == k_blocks:
                next_k = Int32(0)
                next_tile += 1
                if next_tile == tile_count:
                    next_tile = Int32(0)
                    next_row_block += 1
                next_source = weights_of(b, tiles, Int32(to_fetch > 0), next_tile, next_row_block, row_blocks, k_blocks)

    stage = Int32(0)
    phase = Int32(0)
    accumulated = config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS
    while remaining > 0:
        # ---- the part of one block that lies in this span
        part = Int32(min(Int64(remaining), (Int64(tile_count - tile) * Int64(k_blocks)) - Int64(k)))
        remaining -= part
        block_at = Int64(row_block) * Int64(tokens_total)
        while part > 0:
            # ---- the part of one tile
            run = min(part, k_blocks - k)
            part -= run
            _, first_row, count = tile_of(tiles, tile)
            places, exists = common.lane_tokens(config, first_row, g, first_row + count)
            accumulators = common.zero_accumulators(accumulated)
            if cutlass.const_expr(config.prefetch):
                ahead = common.load_superblock_activations(config, a, a_scales, places, exists, k, Int32(0), intermediate, intermediate, t)
            for step in cutlass.range(run, unroll=1):
                if cutlass.const_expr(config.prefetch):
                    loaded = ahead
                    ahead = common.load_superblock_activations(
                        config, a, a_scales, places, exists, k + step + 1, Int32(0), intermediate, intermediate, t
                    )
                else:
                    loaded = common.load_superblock_activations(
                        config, a, a_scales, places, exists, k + step, Int32(0), intermediate, intermediate, t
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
                        next_tile += 1
                        if next_tile == tile_count:
                            next_tile = Int32(0)
                            next_row_block += 1
                        next_source = weights_of(b, tiles, Int32(to_fetch > 0), next_tile, next_row_block, row_blocks, k_blocks)
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            scales = []
            addresses = []
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    place = block * common.MMA_TOKENS + t * 2 + pair
                    live = Int32(place < count)
                    at = Int64(first_row + place) * 4
                    scales.append(common.load_global_f32_if(row_alpha + at, live))
                    token = common.load_global_s32_or(rows + at, live, Int32(0))
                    addresses.append((partials + ((block_at + Int64(token)) * common.SUPERBLOCK_ROWS + Int64(g * OUTPUTS)) * 4, live))
            sums = add_scaled(common.zero_accumulators(accumulated), accumulators, config, scales)
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    address, live = addresses[2 * block + pair]
                    values = token_values(sums, block, pair)
                    add_to_workspace(address, live, values[:4])
                    add_to_workspace(address + 16, live, values[4:])
            k += run
            if k == k_blocks:
                k = Int32(0)
                tile += 1

        # ---- hand the block on
        begin = Int64(row_block) * block_length
        end = begin + block_length
        # iteration i belongs to worker ((i + 1) * workers - 1) // total
        contributors = Int32(((end * workers - 1) // total) - (((begin + 1) * workers - 1) // total)) + 1
        cute.arch.fence_acq_rel_gpu()
        cute.arch.sync_warp()
        ticket = Int32(0)
        if lane == 0:
            ticket = take_ticket(tickets + Int64(row_block) * 4)
        ticket = broadcast(ticket)
        if ticket == contributors - 1:
            cute.arch.fence_acq_rel_gpu()
            column = (lane % 8) * OUTPUTS
            for start in cutlass.range(0, tokens_total, FINISHED_TOKENS, unroll=1):
                done = start + lane // 8
                finished = Int32(done < tokens_total)
                where = partials + ((block_at + Int64(done)) * common.SUPERBLOCK_ROWS + Int64(column)) * 4
                results = load_workspace_if(where, finished) + load_workspace_if(where + 16, finished)
                zeros = [Float32(0.0) for _ in range(4)]
                store_if("v4.f32", where, finished, zeros)
                store_if("v4.f32", where + 16, finished, zeros)
                element = Int64(done) * Int64(hidden) + Int64(row_block * common.SUPERBLOCK_ROWS + column)
                store_row(config.c_dtype, c, element, finished, results)
            if lane == 0:
                store_if("b32", tickets + Int64(row_block) * 4, Int32(1), [Uint32(0)])
        if tile == tile_count:
            tile = Int32(0)
            row_block += 1


def weights_of(b: Any, tiles: Any, exists: Any, tile: Any, row_block: Any, row_blocks: Any, k_blocks: Any) -> Any:
    """Address of the first superblock of a row block of a tile's expert; of expert 0 where there is no such tile."""
    expert = common.load_global_s32_or(tiles + (Int64(tile) + 1) * 16, exists, Int32(0))
    return b + (Int64(expert) * Int64(row_blocks) + Int64(row_block)) * Int64(k_blocks) * common.SUPERBLOCK_BYTES


@cute.jit
def groupedfc2_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    row_alpha: cute.Pointer,
    c: cute.Pointer,
    partials: cute.Pointer,
    tickets: cute.Pointer,
    tiles: cute.Pointer,
    rows: cute.Pointer,
    tokens_total: Int32,
    top_k: Int32,
    hidden: Int32,
    intermediate: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    groupedfc2_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    blocks = tokens_total * top_k * k_blocks * (hidden // common.SUPERBLOCK_ROWS)
    ctas = min((blocks + (common.WARPS - 1)) // common.WARPS, sm_count * config.resident_ctas)
    groupedfc2_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        row_alpha.raw_ptr(),
        c.raw_ptr(),
        partials.raw_ptr(),
        tickets.raw_ptr(),
        tiles.raw_ptr(),
        rows.raw_ptr(),
        tokens_total,
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
    return sm90_fc2.config_of(variant)


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
            Parameter("row_alpha", "pointer", "row_alpha"),
            Parameter("c", "pointer", "c"),
            Parameter("partials", "pointer", "workspace.partials"),
            Parameter("tickets", "pointer", "workspace.tickets"),
            Parameter("tiles", "pointer", "tiles"),
            Parameter("rows", "pointer", "rows"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
        ),
        let=(
            ("row_blocks", f"H // {common.SUPERBLOCK_ROWS}"),
            ("superblocks", f"M * top_k * ceil_div(I, {common.SUPERBLOCK_K}) * row_blocks"),
        ),
        grid=(f"min(ceil_div(superblocks, {common.WARPS}), sm_count * {config.resident_ctas})", 1, 1),
        block=(common.WARPS * 32, 1, 1),
        dynamic_smem=common.shared_memory_bytes(config),
        workspaces=(
            Workspace("workspace.partials", "M * H * 4", zeroed=True),
            Workspace("workspace.tickets", "row_blocks * 4", zeroed=True),
        ),
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
    )
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 132))
    return groupedfc2_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: nine pointers and five words (without the stream)."""
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in recipe(variant).parameters[:9]]
    return [*pointers, *(names[name] for name in ("M", "top_k", "H", "I", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``: the dense kernel's, and two vectors of four added for each token of a lane."""
    dense = sm90_fc2.expected(variant)
    return replace(dense, ptx_counts={**dense.ptx_counts, "red.relaxed.gpu.global.add.v4.f32": 4 * config_of(variant).token_blocks})
