"""FC2 for sm_90a: one GEMM over K = E·I with a scale per token and expert (contract sections 4 and 6), stream-K.

A unit is 64 columns x ``tile_m`` tokens; its reduction runs over every K 128 of every expert. All units' reductions are laid end to end and cut into
equal spans, one a CTA (stream-K): H is short and E·I very long, so whole units would leave most of the machine idle.

    per unit:  each of the CTA's four warps takes a quarter of the unit's blocks in the span:  ring ─ wait ─ decode ─ mma.sync ─ refill
                   until an expert ends:  sum += alpha[token, e] · accumulators
               sums over warps (shared memory), and over CTAs where a unit lies in several spans (slots; the CTA whose span ends in it goes on)
               convert ─ store

One accumulation per expert, scaled once. A term whose alpha is exactly 0 is selected away, not multiplied. Sums have one order (sm90_reduction):
a launch gives the same bits every time. Slots are zero between launches: each launch leaves them as it found them, so CUDA graphs may replay it.

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


@cute.jit
def next_part(rest, unit, inside, length, warp):
    """The warp's blocks in the next unit that has some, of the ``rest`` blocks of a span that go on at block ``inside`` of ``unit``.

    Returns:
        rest, unit and inside behind it; the unit, and the warp's first block in it and number of blocks, 0 where none are left.
    """
    of = unit
    at = Int32(0)
    blocks = Int32(0)
    while (blocks == 0) & (rest > 0):
        run = min(rest, length - inside)
        begin = warp * run // common.WARPS
        blocks = (warp + 1) * run // common.WARPS - begin
        at = inside + begin
        of = unit
        rest -= run
        unit += 1
        inside = Int32(0)
    return rest, unit, inside, of, at, blocks


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
    waits_first: Int32,
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
    k_blocks = Int32((Uint32(intermediate) + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K)  # of one expert
    row_blocks = Int32(Uint32(hidden) // common.SUPERBLOCK_ROWS)
    listed = Int32(active_experts.toint() != 0)
    if waits_first != 0:
        pr.griddepcontrol("wait")  # the list may come from the launch before
    pr.griddepcontrol("launch_dependents")
    count_listed = common.load_global_s32_or(active_experts, listed, experts)
    none = Int32(count_listed == 0)
    listed = listed & (none ^ 1)
    length = (count_listed + none) * k_blocks  # blocks of a unit: those of the visited experts

    all_rings, all_barriers = common.shared_memory(config)
    ring = all_rings.subview(warp * (stages * superblock))
    barriers = all_barriers.subview(warp * stages)
    partials = reduction.shared_partials(config)

    # the CTA's span of all units' blocks, laid end to end
    span = reduction.span_of(Uint32(worker), Uint32(ctas), Uint32(row_blocks) * Uint32(token_tiles), Uint32(length), SMALLEST_SPAN)
    unit, inside, remaining = (Int32(each) for each in span[:3])
    quotient, longer = span[3:]

    # what the warp's ring fetches next
    fetch_rest, fetch_unit, fetch_inside, fetch_of, fetch_at, to_fetch = next_part(remaining, unit, inside, length, warp)
    fetch_place = fetch_at // k_blocks
    fetch_k = fetch_at - fetch_place * k_blocks
    exists = Int32(to_fetch > 0)
    next_source = weights_of(b, active_experts, listed & exists, fetch_place, fetch_of // token_tiles, row_blocks, k_blocks)
    next_source = next_source + Int64(fetch_k) * superblock

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
            fetch_k += 1
            if (fetch_k == k_blocks) | (to_fetch == 0):
                fetch_place += 1
                fetch_k = Int32(0)
                if to_fetch == 0:
                    fetch_rest, fetch_unit, fetch_inside, fetch_of, fetch_at, to_fetch = next_part(
                        fetch_rest, fetch_unit, fetch_inside, length, warp
                    )
                    fetch_place = fetch_at // k_blocks
                    fetch_k = fetch_at - fetch_place * k_blocks
                exists = Int32(to_fetch > 0)
                next_source = weights_of(b, active_experts, listed & exists, fetch_place, fetch_of // token_tiles, row_blocks, k_blocks)
                next_source = next_source + Int64(fetch_k) * superblock

    pr.griddepcontrol("wait")  # weights do not depend on the launch before; activations and alpha do

    stage = Int32(0)
    phase = Int32(0)
    side = Int32(0)  # which buffer of partial sums is next
    a_columns = experts * intermediate
    count = config.token_blocks * common.M16_BLOCKS * common.ACCUMULATORS
    rows_of_warp = reduction.rows_of_warp(config)
    finishing = reduction.finishing_warps(config)
    while remaining > 0:
        # ---- the part of one unit that lies in this span, and of it this warp's quarter
        run = min(remaining, length - inside)
        remaining -= run
        begin = warp * run // common.WARPS
        part = (warp + 1) * run // common.WARPS - begin
        place = (inside + begin) // k_blocks
        k = inside + begin - place * k_blocks
        row_block = unit // token_tiles
        first_token = (unit - row_block * token_tiles) * config.tile_m
        tokens, exist = common.lane_tokens(config, first_token, g, tokens_total)
        sums = common.zero_accumulators(count)
        while part > 0:
            # ---- the part of one expert
            steps = min(part, k_blocks - k)
            part -= steps
            accumulators = common.zero_accumulators(count)
            expert = common.listed_expert(active_experts, listed, place)
            base = expert * intermediate
            scales = []
            for block in cutlass.range_constexpr(config.token_blocks):
                for pair in cutlass.range_constexpr(2):
                    token = first_token + (block * common.MMA_TOKENS + t * 2 + pair)
                    at = Int64(token) * Int64(alpha_stride_m) + Int64(expert) * Int64(alpha_stride_e)
                    scales.append(common.load_global_f32_if(alpha + at * 4, Int32(token < tokens_total) & (none ^ 1)))
            if cutlass.const_expr(config.prefetch):
                ahead = common.load_superblock_activations(config, a, a_scales, tokens, exist, k, base, intermediate, a_columns, t)
            for step in cutlass.range(steps, unroll=1):
                if cutlass.const_expr(config.prefetch):
                    loaded = ahead
                    ahead = common.load_superblock_activations(
                        config, a, a_scales, tokens, exist, k + step + 1, base, intermediate, a_columns, t
                    )
                else:
                    loaded = common.load_superblock_activations(
                        config, a, a_scales, tokens, exist, k + step, base, intermediate, a_columns, t
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
                        fetch_place += 1
                        fetch_k = Int32(0)
                        if to_fetch == 0:
                            fetch_rest, fetch_unit, fetch_inside, fetch_of, fetch_at, to_fetch = next_part(
                                fetch_rest, fetch_unit, fetch_inside, length, warp
                            )
                            fetch_place = fetch_at // k_blocks
                            fetch_k = fetch_at - fetch_place * k_blocks
                        exists = Int32(to_fetch > 0)
                        next_source = weights_of(
                            b, active_experts, listed & exists, fetch_place, fetch_of // token_tiles, row_blocks, k_blocks
                        )
                        next_source = next_source + Int64(fetch_k) * superblock
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            sums = add_scaled(sums, accumulators, config, scales)
            k += steps
            if k == k_blocks:
                k = Int32(0)
                place += 1

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
    listed = Int32(active_experts.toint() != 0)
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
            Parameter("waits_first", "u32", "has_active_list * (1 - early_list)"),
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
    steps = common.K64_HALVES * common.K16_STEPS * common.M16_BLOCKS * config.token_blocks
    return Expected(
        ptx_counts={
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": steps,
            # one per ring stage before the loop, one to refill inside it
            common.COPY: config.stages + 1,
        },
        max_registers=65536 // (common.WARPS * 32 * config.resident_ctas),
    )
