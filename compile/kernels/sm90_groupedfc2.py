"""FC2 for sm_90a over gathered tokens: the layer's output from FC1's compact rows, stream-K over the tiles of ``route`` (contract section 5).

A unit is 64 columns of all tokens. Its work is every K 128 of every tile (up to ``tile_m`` rows of one expert); all units' work is laid end to end
and cut into equal spans, one a CTA. Each tile has tokens of its own, so its part is scaled and added to the float32 workspace:

    per unit:  each of the CTA's four warps takes a quarter of the unit's blocks in the span:  ring ─ wait ─ decode ─ mma.sync ─ refill
                   until a tile ends:  workspace[token] += row_alpha · accumulators (red.v4)
               take a ticket; the last of a unit's CTAs converts, stores, and clears workspace and ticket

Run-time setting ``early_list``: the tiles were complete before the launch that precedes this one began, so that weights are fetched before it ends.
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
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import store_if, store_row
from densemoe.compile.kernels.sm90_fc1 import tile_of
from densemoe.compile.kernels.sm90_fc2 import OUTPUTS, add_scaled, add_to_workspace, load_workspace_if, next_part, token_values, wait
from densemoe.runtime.recipe import Parameter, Recipe, Workspace, pointer_or_null
from densemoe.runtime.variant import Variant

OP = "groupedfc2"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
LANES_A_TOKEN = 8  # of a warp that converts: they hold its 64 columns
FINISHED_TOKENS = 32  # tokens that a warp converts at a time: sixteen loads a lane in flight


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
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K  # of one tile
    row_blocks = hidden // common.SUPERBLOCK_ROWS

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * superblock))
    barriers = all_barriers.subview(warp * stages)
    shared_ticket = reduction.shared_word()
    if lane == 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()
    cute.arch.sync_warp()

    if waits_first != 0:
        pr.griddepcontrol("wait")  # the tiles, which say what weights are read, may come from the launch before
    length = common.load_global_s32_or(tiles, Int32(1), Int32(0)) * k_blocks  # blocks of a unit
    total = Int64(length) * Int64(row_blocks)
    workers = min(Int64(ctas), (total + (sm90_fc2.SMALLEST_SPAN - 1)) // sm90_fc2.SMALLEST_SPAN)
    first = total
    last = total
    if Int64(bid) < workers:
        first = Int64(bid) * total // workers
        last = (Int64(bid) + 1) * total // workers
    remaining = Int32(last - first)
    unit = Int32(first // Int64(length))
    inside = Int32(first - Int64(unit) * Int64(length))

    # what the warp's ring fetches next
    fetch_rest, fetch_unit, fetch_inside, fetch_of, fetch_at, to_fetch = next_part(remaining, unit, inside, length, warp)
    fetch_tile = fetch_at // k_blocks
    fetch_k = fetch_at - fetch_tile * k_blocks
    next_source = weights_of(b, tiles, Int32(to_fetch > 0), fetch_tile, fetch_of, row_blocks, k_blocks) + Int64(fetch_k) * superblock
    for i in cutlass.range_constexpr(stages):
        if to_fetch > 0:
            if lane == 0:
                common.start_copy(ring, barriers, i, next_source)
            to_fetch -= 1
            next_source = next_source + superblock
            fetch_k += 1
            if (fetch_k == k_blocks) | (to_fetch == 0):
                fetch_tile += 1
                fetch_k = Int32(0)
                if to_fetch == 0:
                    fetch_rest, fetch_unit, fetch_inside, fetch_of, fetch_at, to_fetch = next_part(
                        fetch_rest, fetch_unit, fetch_inside, length, warp
                    )
                    fetch_tile = fetch_at // k_blocks
                    fetch_k = fetch_at - fetch_tile * k_blocks
                next_source = weights_of(b, tiles, Int32(to_fetch > 0), fetch_tile, fetch_of, row_blocks, k_blocks)
                next_source = next_source + Int64(fetch_k) * superblock

    pr.griddepcontrol("wait")  # weights do not depend on the launch before; activations and the workspace do
    pr.griddepcontrol("launch_dependents")

    stage = Int32(0)
    phase = Int32(0)
    accumulated = config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS
    while remaining > 0:
        # ---- the part of one unit that lies in this span, and of it this warp's quarter
        run = min(remaining, length - inside)
        remaining -= run
        begin = warp * run // common.WARPS
        part = (warp + 1) * run // common.WARPS - begin
        tile = (inside + begin) // k_blocks
        k = inside + begin - tile * k_blocks
        unit_at = Int64(unit) * Int64(tokens_total)
        while part > 0:
            # ---- the part of one tile
            steps = min(part, k_blocks - k)
            part -= steps
            _, first_row, count = tile_of(tiles, tile)
            places, exists = common.lane_tokens(config, first_row, g, first_row + count)
            scales = []
            addresses = []
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    place = block * common.MMA_TOKENS + t * 2 + pair
                    live = Int32(place < count)
                    at = Int64(first_row + place) * 4
                    scales.append(common.load_global_f32_if(row_alpha + at, live))
                    token = common.load_global_s32_or(rows + at, live, Int32(0))
                    addresses.append((token, live))
            accumulators = common.zero_accumulators(accumulated)
            if cutlass.const_expr(config.prefetch):
                ahead = common.load_superblock_activations(config, a, a_scales, places, exists, k, Int32(0), intermediate, intermediate, t)
            for step in cutlass.range(steps, unroll=1):
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
                    fetch_k += 1
                    if (fetch_k == k_blocks) | (to_fetch == 0):
                        fetch_tile += 1
                        fetch_k = Int32(0)
                        if to_fetch == 0:
                            fetch_rest, fetch_unit, fetch_inside, fetch_of, fetch_at, to_fetch = next_part(
                                fetch_rest, fetch_unit, fetch_inside, length, warp
                            )
                            fetch_tile = fetch_at // k_blocks
                            fetch_k = fetch_at - fetch_tile * k_blocks
                        next_source = weights_of(b, tiles, Int32(to_fetch > 0), fetch_tile, fetch_of, row_blocks, k_blocks)
                        next_source = next_source + Int64(fetch_k) * superblock
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            sums = add_scaled(common.zero_accumulators(accumulated), accumulators, config, scales)
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    token, live = addresses[2 * block + pair]
                    address = partials + ((unit_at + Int64(token)) * common.SUPERBLOCK_ROWS + Int64(g * OUTPUTS)) * 4
                    values = token_values(sums, block, pair)
                    add_to_workspace(address, live, values[:4])
                    add_to_workspace(address + 16, live, values[4:])
            k += steps
            if k == k_blocks:
                k = Int32(0)
                tile += 1

        # ---- hand the unit on
        unit_begin = Int64(unit) * Int64(length)
        # block i belongs to CTA ((i + 1) * workers - 1) // total
        sharing = Int32(((unit_begin + Int64(length)) * workers - 1) // total - ((unit_begin + 1) * workers - 1) // total) + 1
        cute.arch.fence_acq_rel_gpu()
        pr.barrier_cta_sync(0)
        if tid == 0:
            shared_ticket[0] = reduction.take_ticket(tickets + Int64(unit) * 4)
        pr.barrier_cta_sync(0)
        if shared_ticket[0] == sharing - 1:
            cute.arch.fence_acq_rel_gpu()
            for start in cutlass.range(warp * FINISHED_TOKENS, tokens_total, common.WARPS * FINISHED_TOKENS, unroll=1):
                finish_tokens(config.c_dtype, c, partials, start, tokens_total, unit, hidden, lane)
            if tid == 0:
                store_if("b32", tickets + Int64(unit) * 4, Int32(1), [Uint32(0)])
        inside = Int32(0)
        unit += 1


def finish_tokens(
    c_dtype: str, c: Any, partials: Any, start: Any, tokens_total: Any, row_block: Any, hidden: Any, lane: Any, count: int = FINISHED_TOKENS
) -> None:
    """One warp converts, stores and clears 64 columns of ``count`` tokens from ``start`` on; all its loads are in flight together.

    Args:
        partials: float32 ``[row block][M][64]``.
        count: a multiple of 4; four tokens take eight registers.
    """
    column = (lane % LANES_A_TOKEN) * OUTPUTS
    done = []
    for batch in range(count * LANES_A_TOKEN // 32):
        token = start + batch * (32 // LANES_A_TOKEN) + lane // LANES_A_TOKEN
        exists = Int32(token < tokens_total)
        where = partials + ((Int64(row_block) * Int64(tokens_total) + Int64(token)) * common.SUPERBLOCK_ROWS + Int64(column)) * 4
        done.append((token, exists, where, load_workspace_if(where, exists) + load_workspace_if(where + 16, exists)))
    zeros = [Float32(0.0) for _ in range(4)]
    for token, exists, where, values in done:
        store_if("v4.f32", where, exists, zeros)
        store_if("v4.f32", where + 16, exists, zeros)
        element = Int64(token) * Int64(hidden) + Int64(row_block * common.SUPERBLOCK_ROWS + column)
        store_row(c_dtype, c, element, exists, values)


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
    early_list: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    groupedfc2_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    k_blocks = (intermediate + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    blocks = tokens_total * top_k * k_blocks * (hidden // common.SUPERBLOCK_ROWS)
    ctas = min((blocks + (sm90_fc2.SMALLEST_SPAN - 1)) // sm90_fc2.SMALLEST_SPAN, sm_count * config.resident_ctas)
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
        1 - early_list,
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
            Parameter("waits_first", "u32", "1 - early_list"),
        ),
        let=(
            ("row_blocks", f"H // {common.SUPERBLOCK_ROWS}"),
            ("blocks", f"M * top_k * ceil_div(I, {common.SUPERBLOCK_K}) * row_blocks"),
        ),
        grid=(f"min(ceil_div(blocks, {sm90_fc2.SMALLEST_SPAN}), sm_count * {config.resident_ctas})", 1, 1),
        block=(common.WARPS * 32, 1, 1),
        dynamic_smem=common.shared_memory_bytes(config) + 4,  # the rings, the ticket
        workspaces=(
            Workspace("workspace.partials", "M * H * 4", zeroed=True),
            Workspace("workspace.tickets", "row_blocks * 4", zeroed=True),
        ),
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
    )
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 0, 132))
    return groupedfc2_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: nine pointers and six words (without the stream)."""
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in recipe(variant).parameters[:9]]
    return [*pointers, *(names[name] for name in ("M", "top_k", "H", "I", "early_list", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``: the dense kernel's, and two vectors of four added for each token of a lane."""
    dense = sm90_fc2.expected(variant)
    return replace(dense, ptx_counts={**dense.ptx_counts, "red.relaxed.gpu.global.add.v4.f32": 4 * config_of(variant).token_blocks})
