"""The router's choice sorted by expert, as the grouped GEMMs read it (docs/h200.md), in one launch: of one CTA, and of others that meanwhile bring
activations as grouped FC1 reads them (``sm90_activations``).

    a warp a chunk of pairs:   count[chunk][expert]
    a thread an expert:        counts of the chunks below ─ scan pairs and tiles of experts below (over lanes, over warps) ─ store its tiles
    a warp a chunk of pairs:   place = first row of the expert + those in chunks below + those before it in the chunk ─ token and scale there
    a thread a place:          store token and scale (of up to 4,096 pairs, sorted in shared memory; of more each where it belongs)

A pair is one token's choice of one expert. ``rows`` and ``row_alpha`` hold the pairs, those of one expert together, in the order of pairs (a token
that names an expert twice has those two in any order); a tile is up to ``group_tile`` neighbouring rows of one expert. Ids off this rank are
skipped where other ranks hold the rest; otherwise such an id becomes a row of expert 0 whose scale is NaN, which reaches the token's output: a
launch can raise no error. Where there is no pair at all one tile of no rows stands, so that FC2 still writes its zeros.
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
from densemoe.compile.kernels import sm90_activations as activations
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_epilogue as epilogue
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_prepare import (
    EXPERTS_A_THREAD,
    FLAG_BYTES,
    LARGEST_EXPERTS,
    NAN_BITS,
    THREADS,
    TOTALS_BYTES,
    WARPS,
    inclusive_scan,
    load_id,
)
from densemoe.runtime.errors import VariantError
from densemoe.runtime.recipe import Parameter, Recipe
from densemoe.runtime.variant import BRINGS, Variant

OP = "route"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = "none"
PLACES = "places"  # where each pair's row stands, where the layer is to give the same bits every time
TILE_WORDS = 4  # expert, first row, rows, unused
CHUNK_COUNTS = 16384  # of a chunk and an expert: 32 chunks of up to 512 experts, fewer chunks of more
CHUNKS_AHEAD = 8  # whose counts are loaded together
BY_TOKEN_FROM = 6  # pairs of a token: fewer are compared lane by lane (docs/tried.md)
TOKENS_AHEAD = 4  # of a warp's pairs, whose places are taken one token behind the other: 32 pairs of 8 a token
STAGED_PAIRS = 4096  # that are sorted in shared memory: stored where they belong, each would be a write of its own
# counts, first rows, totals, counts of chunks, sorted tokens and scales
SHARED_BYTES = 2 * FLAG_BYTES + 2 * TOTALS_BYTES + CHUNK_COUNTS * 4 + 2 * STAGED_PAIRS * 4


def equal_lanes(value: Any, lane: Any) -> tuple[Any, Any]:
    """How many lanes below this one hold the same ``value``, and how many of all."""
    same = pr.inline_ptx_hl("match.any.sync.b32 {$w0}, {$r0}, 0xffffffff;", write_only_types=[Uint32], read_only_args=[value])
    return population(same & ((Uint32(1) << Uint32(lane)) - 1)), population(same)


def next_place(address: Any, valid: Any) -> Any:
    """Adds 1 to a word of shared memory where ``valid`` is not 0, and gives what it was; 0 elsewhere."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; @p atom.relaxed.cta.shared::cta.add.u32 {$w0}, [{$r0}], 1; }",
        write_only_types=[Int32],
        read_only_args=[address, valid],
    )


def population(mask: Any) -> Any:
    """Bits that are set."""
    return pr.inline_ptx_hl("popc.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[mask])


def expert_of(ids: Any, pair: Any, pairs: Any, id_bytes: Any, first_expert: Any, experts: Any, elsewhere: Any) -> tuple[Any, Any]:
    """(row's expert or -1, whether its id is bad) of a pair."""
    exists = Int32(pair < pairs)
    local = load_id(ids + Int64(pair) * id_bytes, exists) - first_expert
    here = exists & Int32(local >= 0) & Int32(local < experts)
    bad = exists & (here ^ 1) & Int32(elsewhere == 0)
    chosen = epilogue.select(here, local, epilogue.select(bad, Int32(0), Int32(-1)))
    return chosen, bad


def pair_of(
    ids: Any, router: Any, w2_alpha: Any, pair: Any, pairs: Any, id_bytes: Any, first_expert: Any, experts: Any, elsewhere: Any
) -> tuple[Any, Any, Any, Any]:
    """(row's expert or -1, whether its id is bad, the router's weight, the expert's scale) of a pair: loads alone, used later."""
    chosen, bad = expert_of(ids, pair, pairs, id_bytes, first_expert, experts, elsewhere)
    hit = Int32(chosen >= 0)
    weight = common.load_global_f32_if(router + Int64(pair) * 4, hit)
    return chosen, bad, weight, common.load_global_f32_if(w2_alpha + Int64(chosen * hit) * 4, hit)


@cute.kernel
def route_kernel(
    ids: cutlass.Pointer,
    router: cutlass.Pointer,
    w2_alpha: cutlass.Pointer,
    tiles: cutlass.Pointer,
    rows: cutlass.Pointer,
    row_alpha: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    top_k: Int32,
    first_expert: Int32,
    elsewhere: Int32,
    group_tile: Int32,
    x: cutlass.Pointer | None,
    x_scales: cutlass.Pointer | None,
    x_multiplier: cutlass.Pointer | None,
    x_bf16: cutlass.Pointer | None,
    x_k64: cutlass.Pointer | None,
    x_form: Int32 | None,
    hidden: Int32 | None,
    places: cutlass.Pointer,
    id_bytes: cutlass.Constexpr,
    brings: cutlass.Constexpr,
):
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    shared = (
        cutlass.Array(Int32, LARGEST_EXPERTS, space=cutlass.AddressSpace.smem, alignment=16),
        cutlass.Array(Int32, LARGEST_EXPERTS, space=cutlass.AddressSpace.smem, alignment=16),
        cutlass.Array(Int32, CHUNK_COUNTS, space=cutlass.AddressSpace.smem, alignment=16),
        cutlass.Array(Int32, 2 * WARPS, space=cutlass.AddressSpace.smem, alignment=16),
        cutlass.Array(Int32, 2 * STAGED_PAIRS, space=cutlass.AddressSpace.smem, alignment=16).data_ptr().toint(Int32),
    )
    if bid == 0:
        sort_pairs(
            ids, router, w2_alpha, tiles, rows, row_alpha, places, tokens_total, experts, top_k, first_expert, elsewhere, group_tile, shared, tid,
            id_bytes,
        )  # fmt: skip
    if cutlass.const_expr(brings):  # noqa: SIM102 - decided while compiling
        if bid > 0:
            activations.bring_activations(x, x_scales, x_multiplier, x_bf16, x_k64, x_form, tokens_total, hidden, bid - 1, ctas - 1, THREADS, tid)


@cute.jit
def sort_pairs(
    ids, router, w2_alpha, tiles, rows, row_alpha, places, tokens_total, experts, top_k, first_expert, elsewhere, group_tile, shared, tid,
    id_bytes: cutlass.Constexpr,
):  # fmt: skip
    """The first CTA: ``tiles``, ``rows`` and ``row_alpha``, and ``places`` where that is not null.

    Args:
        shared: counts, first rows, counts of chunks, totals, sorted pairs.
    """
    counts, first_rows, chunk_counts, totals, sorted_pairs = shared
    warp = cute.arch.make_warp_uniform(tid // 32)
    lane = tid % 32
    pairs = tokens_total * top_k
    # chunks of pairs, each a multiple of 32 long: no more than there are pairs for or the table has room for
    chunks = min(min(Int32(WARPS), CHUNK_COUNTS // experts), (pairs + 31) // 32)
    steps = (pairs + (32 * chunks - 1)) // (32 * chunks)
    begin = warp * steps * 32
    end = min(begin + steps * 32, pairs)
    if warp >= chunks:
        end = begin
    at = tid * 4
    while at < chunks * experts:
        common.store_shared_v4(chunk_counts.data_ptr().toint(Int32) + at * 4, [Float32(0.0) for _ in range(4)])
        at += THREADS * 4
    pr.griddepcontrol("wait")
    pr.griddepcontrol("launch_dependents")  # not before: CTAs of FC1 that take their places one by one as the launch before ends cost 5 to 8 us
    # a warp's first pairs stay in registers
    first_pairs = pair_of(ids, router, w2_alpha, begin + lane, end, id_bytes, first_expert, experts, elsewhere)
    pr.barrier_cta_sync(0)
    own = warp * experts
    if first_pairs[0] >= 0:
        pr.red("add", "s32", chunk_counts.subview(own + first_pairs[0]), Int32(1), mem_order="relaxed", mem_scope="cta")
    pair = begin + 32 + lane
    while pair < end:
        counted, _ = expert_of(ids, pair, end, id_bytes, first_expert, experts, elsewhere)
        if counted >= 0:
            pr.red("add", "s32", chunk_counts.subview(own + counted), Int32(1), mem_order="relaxed", mem_scope="cta")
        pair += 32
    pr.barrier_cta_sync(0)
    expert = tid
    while expert < LARGEST_EXPERTS:
        below = Int32(0)
        if expert < experts:
            for batch in cutlass.range(0, chunks, CHUNKS_AHEAD, unroll=1):
                counters = [min(batch + i, chunks - 1) * experts + expert for i in range(CHUNKS_AHEAD)]
                loaded = [Int32(chunk_counts[each]) * Int32(batch + i < chunks) for i, each in enumerate(counters)]
                for i in cutlass.range_constexpr(CHUNKS_AHEAD):
                    if batch + i < chunks:
                        chunk_counts[counters[i]] = below
                    below += loaded[i]
        counts[expert] = below
        expert += THREADS
    pr.barrier_cta_sync(0)

    mine = [counts[tid * EXPERTS_A_THREAD + i] for i in range(EXPERTS_A_THREAD)]
    mine_tiles = [(count + group_tile - 1) // group_tile for count in mine]
    own_rows = mine[0] + mine[1] + mine[2] + mine[3]
    own_tiles = mine_tiles[0] + mine_tiles[1] + mine_tiles[2] + mine_tiles[3]
    scanned = inclusive_scan(own_rows)
    scanned_tiles = inclusive_scan(own_tiles)
    if lane == 31:
        totals[warp] = scanned
        totals[WARPS + warp] = scanned_tiles
    pr.barrier_cta_sync(0)
    of_warps = inclusive_scan(totals[lane])
    of_warps_tiles = inclusive_scan(totals[WARPS + lane])
    row = common.shuffle_from(of_warps, Int32(warp)) - common.shuffle_from(totals[lane], Int32(warp)) + scanned - own_rows
    tile = common.shuffle_from(of_warps_tiles, Int32(warp)) - common.shuffle_from(totals[WARPS + lane], Int32(warp)) + scanned_tiles - own_tiles
    for i in cutlass.range_constexpr(EXPERTS_A_THREAD):
        expert = tid * EXPERTS_A_THREAD + i
        first_rows[expert] = row
        left = mine[i]
        while left > 0:
            held = min(left, group_tile)
            epilogue.store_if("v4.b32", tiles + (Int64(tile) + 1) * (TILE_WORDS * 4), Int32(1), [expert, row, held, Int32(0)])
            row += held
            tile += 1
            left -= held
    listed = common.shuffle_from(of_warps_tiles, Int32(31))
    every_row = common.shuffle_from(of_warps, Int32(31))
    none = Int32(listed == 0)
    epilogue.store_if("v4.b32", tiles + TILE_WORDS * 4, none & Int32(tid == 0), [Int32(0), Int32(0), Int32(0), Int32(0)])
    epilogue.store_if("v4.b32", tiles, Int32(tid == 0), [listed + none, every_row, Int32(0), Int32(0)])
    pr.barrier_cta_sync(0)

    staged = Int32(pairs <= STAGED_PAIRS)
    if begin < end:
        place_pairs(first_pairs, chunk_counts, first_rows, rows, row_alpha, places, sorted_pairs, staged, own, begin + lane, end, top_k, lane)
    for base in cutlass.range(begin + 32, end, 32, unroll=1):
        later = pair_of(ids, router, w2_alpha, base + lane, end, id_bytes, first_expert, experts, elsewhere)
        place_pairs(later, chunk_counts, first_rows, rows, row_alpha, places, sorted_pairs, staged, own, base + lane, end, top_k, lane)
    if staged != 0:
        pr.barrier_cta_sync(0)
        for at in cutlass.range(tid, every_row, THREADS, unroll=1):
            epilogue.store_if("b32", rows + Int64(at) * 4, Int32(1), [common.load_shared(sorted_pairs + at * 4)])
            epilogue.store_if("b32", row_alpha + Int64(at) * 4, Int32(1), [common.load_shared(sorted_pairs + (STAGED_PAIRS + at) * 4)])


@cute.jit
def place_pairs(pairs, chunk_counts, first_rows, rows, row_alpha, places, sorted_pairs, staged, own, pair, end, top_k, lane):
    """Stores token and scale of a warp's 32 pairs, behind those of the same experts that came before.

    Where a token has many pairs, each takes its place by an atomic addition, one token behind the other: a token's experts are distinct, and where
    they are not its pairs may stand in any order. Where it has few, lanes compare theirs, which takes the SM about 90 cycles for each warp.

    Args:
        pairs: what ``pair_of`` gave, of ``pair`` of each lane; end: of the warp's; own: the chunk's first count.
        places: takes each pair's row, -1 where it has none; null: nothing.
        sorted_pairs: shared memory for tokens and scales, used where ``staged`` is not 0 instead of ``rows`` and ``row_alpha``.
    """
    chosen, bad, weight, expert_scale = pairs
    hit = Int32(chosen >= 0)
    found = chosen * hit
    token = pair // top_k
    place = own + found
    earlier = Int32(0)
    if top_k >= BY_TOKEN_FROM:
        address = chunk_counts.data_ptr().toint(Int32) + place * 4
        newest = common.shuffle_from(token, Int32(31))
        for oldest in cutlass.range(common.shuffle_from(token, Int32(0)), newest + 1, TOKENS_AHEAD, unroll=1):
            ranks = [Int32(0) for _ in range(TOKENS_AHEAD)]
            for i in cutlass.range_constexpr(TOKENS_AHEAD):
                ranks[i] = next_place(address, hit & Int32(token == oldest + i))
                cute.arch.sync_warp()
            for i in cutlass.range_constexpr(TOKENS_AHEAD):
                earlier += ranks[i]
    else:
        before, every = equal_lanes(chosen, lane)
        first = Int32(chunk_counts[place])
        cute.arch.sync_warp()
        if (hit & Int32(before == every - 1)) != 0:
            chunk_counts[place] = first + every
        earlier = first + before
    scale = epilogue.multiply(weight, expert_scale)
    target = Int32(first_rows[found]) + earlier
    bits = Int32(epilogue.select(bad, Uint32(NAN_BITS), scale.bitcast(Uint32)))
    if staged != 0:
        common.store_shared_if(sorted_pairs + target * 4, hit, token)
        common.store_shared_if(sorted_pairs + (STAGED_PAIRS + target) * 4, hit, bits)
    else:
        epilogue.store_if("b32", rows + Int64(target) * 4, hit, [token])
        epilogue.store_if("b32", row_alpha + Int64(target) * 4, hit, [bits])
    if places.toint() != 0:
        epilogue.store_if("b32", places + Int64(pair) * 4, Int32(pair < end), [epilogue.select(hit, target, Int32(-1))])
    cute.arch.sync_warp()


@cute.jit
def route_host(
    ids: cute.Pointer,
    router: cute.Pointer,
    w2_alpha: cute.Pointer,
    tiles: cute.Pointer,
    rows: cute.Pointer,
    row_alpha: cute.Pointer,
    tokens_total: Int32,
    experts: Int32,
    top_k: Int32,
    first_expert: Int32,
    elsewhere: Int32,
    group_tile: Int32,
    x: cute.Pointer,
    x_scales: cute.Pointer,
    x_multiplier: cute.Pointer,
    x_bf16: cute.Pointer,
    x_k64: cute.Pointer,
    x_form: Int32,
    hidden: Int32,
    places: cute.Pointer,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    id_bytes: cutlass.Constexpr,
    brings: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    ctas = Int32(1)
    if cutlass.const_expr(brings):
        ctas += activations.bringing_ctas(tokens_total, hidden, sm_count)
    route_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    route_kernel(
        ids.raw_ptr(),
        router.raw_ptr(),
        w2_alpha.raw_ptr(),
        tiles.raw_ptr(),
        rows.raw_ptr(),
        row_alpha.raw_ptr(),
        tokens_total,
        experts,
        top_k,
        first_expert,
        elsewhere,
        group_tile,
        x.raw_ptr() if brings else None,
        x_scales.raw_ptr() if brings else None,
        x_multiplier.raw_ptr() if brings else None,
        x_bf16.raw_ptr() if brings else None,
        x_k64.raw_ptr() if brings else None,
        x_form if brings else None,
        hidden if brings else None,
        places.raw_ptr(),
        id_bytes,
        brings,
    ).launch(grid=(ctas, 1, 1), block=[THREADS, 1, 1], stream=stream, use_pdl=True)


def check(variant: Variant) -> None:
    """Raises VariantError where this kernel cannot be ``variant``."""
    if (variant.tile_m, variant.tile_n) != (WARPS, LARGEST_EXPERTS):
        raise VariantError(f"tile {variant.tile_m}x{variant.tile_n} of {variant.key}: this kernel has {WARPS}x{LARGEST_EXPERTS}")
    if (variant.cluster_m, variant.cluster_n) != (1, 1):
        raise VariantError(f"cluster {variant.cluster_m}x{variant.cluster_n} of {variant.key}: this kernel uses none; write 1x1")
    activations.check_options(variant)


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    brings = bool(variant.option(BRINGS))
    return Recipe(
        parameters=(
            *(Parameter(role, "pointer", role) for role in ("ids", "router", "w2_alpha", "tiles", "rows", "row_alpha")),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("top_k", "u32", "top_k"),
            Parameter("first_expert", "u32", "first_expert"),
            Parameter("elsewhere", "u32", "elsewhere"),
            Parameter("group_tile", "u32", "group_tile"),
            *(activations.PARAMETERS if brings else ()),
            Parameter(PLACES, "pointer", PLACES),
        ),
        grid=(f"1 + {activations.BRINGING}" if brings else 1, 1, 1),
        block=(THREADS, 1, 1),
        dynamic_smem=SHARED_BYTES,
        programmatic_launch=True,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = (*(pointer(Uint8, 4) for _ in range(3)), pointer(Uint8, 16), *(pointer(Uint8, 4) for _ in range(2)))
    words = tuple(Int32(value) for value in (8, 64, 4, 0, 0, 8))
    brought = (*activations.example_arguments(), pointer(Uint8, 4), Int32(132))
    return route_host, (*pointers, *words, *brought, *activations.example_constants(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with, without the stream: six pointers and six words, five and two, one and a word."""
    pointers = [addresses[each.value] for each in recipe(variant).parameters[:6]]
    words = [names[name] for name in ("M", "E", "top_k", "first_expert", "elsewhere", "group_tile")]
    return [*pointers, *words, *activations.oracle_arguments(variant, names, addresses), addresses[PLACES], names["sm_count"]]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    counts = {
        "shfl.sync.idx.b32": 12,
        "shfl.sync.up.b32": 20,
        "match.any.sync.b32": 2,
        "atom.relaxed.cta.shared::cta.add.u32": 2 * TOKENS_AHEAD,
    }
    return Expected(ptx_counts=counts, max_registers=64)
