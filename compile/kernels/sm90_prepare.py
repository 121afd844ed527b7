"""The router's choice as the GEMMs read it (contract section 5), in one launch: alpha ``[M, E]`` and the list of active experts.

    CTAs 0 … n-1, a warp a token:  zero the row ─ lane j: id, weight x w2_alpha ─ add equal ids in the order of j ─ divide ─ store
    CTA n, all tokens:             set flags[expert] ─ count flags below (scan over lanes, over warps) ─ store count and ids, ascending
    CTAs behind, where asked for:  activations as bf16 (sm90_activations)

The divisor is 1, or alpha_max in the fused form, whose alpha_post this then is. Ids off this rank are skipped where other ranks hold the rest;
otherwise such an id turns its token's row into NaN, which reaches the output: a launch can raise no error; the list is then never empty.
Plain PTX of compute capability 9.0, which later ones compile as it is.
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
from densemoe.runtime.errors import VariantError
from densemoe.runtime.recipe import Parameter, Recipe
from densemoe.runtime.variant import BRINGS, Variant

OP = "prepare"
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_100f", "sm_103a")
WEIGHT_LAYOUT = "none"
WARPS = 32
THREADS = WARPS * 32
EXPERTS_A_THREAD = 4
LARGEST_EXPERTS = THREADS * EXPERTS_A_THREAD  # one flag each in shared memory
FLAG_BYTES = LARGEST_EXPERTS * 4
TOTALS_BYTES = WARPS * 4
SHARED_BYTES = FLAG_BYTES + TOTALS_BYTES
NAN_BITS = 0x7FC00000


def load_id(address: Any, valid: Any) -> Any:
    """The low word of an expert id where ``valid`` is not 0, else -1. Ids of 64 bits lie in 31: E is below that."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, -1; @p ld.global.b32 {$w0}, [{$r0}]; }",
        write_only_types=[Int32],
        read_only_args=[address, valid],
    )


def add_exact(a: Any, b: Any) -> Any:
    """add.rn.f32, never contracted into a fused multiply-add."""
    return pr.inline_ptx_hl("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def divide(a: Any, b: Any) -> Any:
    """div.rn.f32."""
    return pr.inline_ptx_hl("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def inclusive_scan(value: Any) -> Any:
    """Sum over this lane and those below it."""
    for distance in (1, 2, 4, 8, 16):
        value = pr.inline_ptx_hl(
            "{ .reg .pred p; .reg .b32 v; shfl.sync.up.b32 v|p, {$r0}, %d, 0x0, 0xffffffff; selp.b32 v, v, 0, p; add.s32 {$w0}, {$r0}, v; }"
            % distance,
            write_only_types=[Int32],
            read_only_args=[value],
        )
    return value


def any_lane(value: Any) -> Any:
    """1 where ``value`` is not 0 in any lane."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p, q; setp.ne.b32 p, {$r0}, 0; vote.sync.any.pred q, p, 0xffffffff; selp.b32 {$w0}, 1, 0, q; }",
        write_only_types=[Int32],
        read_only_args=[value],
    )


@cute.kernel
def prepare_kernel(
    ids: cutlass.Pointer,
    router: cutlass.Pointer,
    w2_alpha: cutlass.Pointer,
    alpha_divisor: cutlass.Pointer,
    alpha: cutlass.Pointer,
    active: cutlass.Pointer,
    tokens_total: Int32,
    experts: Int32,
    top_k: Int32,
    first_expert: Int32,
    elsewhere: Int32,
    x: cutlass.Pointer | None,
    x_scales: cutlass.Pointer | None,
    x_multiplier: cutlass.Pointer | None,
    x_bf16: cutlass.Pointer | None,
    x_k64: cutlass.Pointer | None,
    x_form: Int32 | None,
    hidden: Int32 | None,
    id_bytes: cutlass.Constexpr,
    brings: cutlass.Constexpr,
):
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    given = (ids, router, w2_alpha, alpha_divisor, alpha, active, tokens_total, experts, top_k, first_expert, elsewhere)
    if cutlass.const_expr(brings):
        own = (tokens_total + (WARPS - 1)) // WARPS + 1  # CTAs of alpha and the list
        if bid < own:
            make_alpha(*given, bid, own, tid, id_bytes)
        else:
            activations.bring_activations(x, x_scales, x_multiplier, x_bf16, x_k64, x_form, tokens_total, hidden, bid - own, ctas - own, THREADS, tid)
    else:
        make_alpha(*given, bid, ctas, tid, id_bytes)


@cute.jit
def make_alpha(
    ids, router, w2_alpha, alpha_divisor, alpha, active, tokens_total, experts, top_k, first_expert, elsewhere, bid, ctas, tid,
    id_bytes: cutlass.Constexpr,
):  # fmt: skip
    """The first ``ctas`` CTAs: ``alpha``, and the last of them ``active``."""
    warp = cute.arch.make_warp_uniform(tid // 32)
    lane = tid % 32
    flags = cutlass.Array(Int32, LARGEST_EXPERTS, space=cutlass.AddressSpace.smem, alignment=16)
    totals = cutlass.Array(Int32, WARPS, space=cutlass.AddressSpace.smem, alignment=16)
    pr.griddepcontrol("wait")
    pr.griddepcontrol("launch_dependents")

    if bid < ctas - 1:
        token = bid * WARPS + warp
        if token < tokens_total:
            at = Int64(token) * Int64(top_k) + Int64(lane)
            chosen = Int32(lane < top_k)
            local = load_id(ids + at * id_bytes, chosen) - first_expert
            here = chosen & Int32(local >= 0) & Int32(local < experts)
            weight = common.load_global_f32_if(router + at * 4, here)
            value = epilogue.multiply(weight, common.load_global_f32_if(w2_alpha + Int64(local) * 4, here))
            bad = any_lane(chosen & (here ^ 1) & Int32(elsewhere == 0))
            row = alpha + Int64(token) * Int64(experts) * 4
            fill = Uint32(bad) * Uint32(NAN_BITS)
            expert = lane
            while expert < experts:
                epilogue.store_if("b32", row + Int64(expert) * 4, Int32(1), [fill])
                expert += 32
            cute.arch.sync_warp()  # the row's zeros before its values
            total = Float32(0.0)
            for j in cutlass.range(top_k, unroll=1):
                same = Int32(common.shuffle_from(local, j) == local)
                part = common.shuffle_from(value, j)
                total = add_exact(total, epilogue.select(same, part, Float32(0.0)))
            result = divide(total, common.load_global_f32_if(alpha_divisor, Int32(1)))
            epilogue.store_if("f32", row + Int64(local) * 4, here & (bad ^ 1), [result])
    else:
        for i in cutlass.range_constexpr(EXPERTS_A_THREAD):
            flags[tid * EXPERTS_A_THREAD + i] = Int32(0)
        pr.barrier_cta_sync(0)
        index = tid
        count = tokens_total * top_k
        while index < count:
            local = load_id(ids + Int64(index) * id_bytes, Int32(1)) - first_expert
            if (local >= 0) & (local < experts):
                pr.red("max", "s32", flags.subview(local), Int32(1), mem_order="relaxed", mem_scope="cta")
            index += THREADS
        pr.barrier_cta_sync(0)
        mine = [flags[tid * EXPERTS_A_THREAD + i] for i in range(EXPERTS_A_THREAD)]
        own = mine[0] + mine[1] + mine[2] + mine[3]
        scanned = inclusive_scan(own)
        if lane == 31:
            totals[warp] = scanned
        pr.barrier_cta_sync(0)
        of_warps = inclusive_scan(totals[lane])
        before = common.shuffle_from(of_warps, Int32(warp)) - common.shuffle_from(totals[lane], Int32(warp))
        place = before + scanned - own
        for i in cutlass.range_constexpr(EXPERTS_A_THREAD):
            expert = tid * EXPERTS_A_THREAD + i
            epilogue.store_if("b32", active + (Int64(place) + 1) * 4, mine[i], [expert])
            place += mine[i]
        everything = common.shuffle_from(of_warps, Int32(31))
        # where this rank holds every expert an empty list means that every id is bad: one expert keeps the NaN of those tokens alive
        forced = Int32(everything == 0) & Int32(elsewhere == 0)
        epilogue.store_if("b32", active + 4, forced & Int32(tid == 0), [Int32(0)])
        epilogue.store_if("b32", active, Int32(tid == 0), [everything + forced])


@cute.jit
def prepare_host(
    ids: cute.Pointer,
    router: cute.Pointer,
    w2_alpha: cute.Pointer,
    alpha_divisor: cute.Pointer,
    alpha: cute.Pointer,
    active: cute.Pointer,
    tokens_total: Int32,
    experts: Int32,
    top_k: Int32,
    first_expert: Int32,
    elsewhere: Int32,
    x: cute.Pointer,
    x_scales: cute.Pointer,
    x_multiplier: cute.Pointer,
    x_bf16: cute.Pointer,
    x_k64: cute.Pointer,
    x_form: Int32,
    hidden: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    id_bytes: cutlass.Constexpr,
    brings: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    prepare_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    ctas = (tokens_total + (WARPS - 1)) // WARPS + 1
    if cutlass.const_expr(brings):
        ctas += activations.bringing_ctas(tokens_total, hidden, sm_count)
    prepare_kernel(
        ids.raw_ptr(),
        router.raw_ptr(),
        w2_alpha.raw_ptr(),
        alpha_divisor.raw_ptr(),
        alpha.raw_ptr(),
        active.raw_ptr(),
        tokens_total,
        experts,
        top_k,
        first_expert,
        elsewhere,
        x.raw_ptr() if brings else None,
        x_scales.raw_ptr() if brings else None,
        x_multiplier.raw_ptr() if brings else None,
        x_bf16.raw_ptr() if brings else None,
        x_k64.raw_ptr() if brings else None,
        x_form if brings else None,
        hidden if brings else None,
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
    if variant.option(BRINGS) and variant.arch != "sm_90a":
        raise VariantError(f"option {BRINGS} of {variant.key}: the GEMMs of {variant.arch} read codes and scales; leave it out")


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    brings = bool(variant.option(BRINGS))
    return Recipe(
        parameters=(
            Parameter("ids", "pointer", "ids"),
            Parameter("router", "pointer", "router"),
            Parameter("w2_alpha", "pointer", "w2_alpha"),
            Parameter("alpha_divisor", "pointer", "alpha_divisor"),
            Parameter("alpha", "pointer", "alpha"),
            # a role of its own: active_experts is the list that a GEMM may lack
            Parameter("active", "pointer", "active_list"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("experts", "u32", "E"),
            Parameter("top_k", "u32", "top_k"),
            Parameter("first_expert", "u32", "first_expert"),
            Parameter("elsewhere", "u32", "elsewhere"),
            *(activations.PARAMETERS if brings else ()),
        ),
        grid=(f"ceil_div(M, {WARPS}) + 1" + f" + {activations.BRINGING}" * brings, 1, 1),
        block=(THREADS, 1, 1),
        dynamic_smem=SHARED_BYTES,
        programmatic_launch=True,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = tuple(pointer(Uint8, 4) for _ in range(6))
    words = tuple(Int32(value) for value in (8, 64, 4, 0, 0))
    brought = (*activations.example_arguments(), Int32(132))
    return prepare_host, (*pointers, *words, *brought, *activations.example_constants(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: six pointers and five words, five and three (without the stream)."""
    pointers = [addresses[each.value] for each in recipe(variant).parameters[:6]]
    words = [names[name] for name in ("M", "E", "top_k", "first_expert", "elsewhere")]
    return [*pointers, *words, *activations.oracle_arguments(variant, names, addresses), names["sm_count"]]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    return Expected(ptx_counts={"div.rn.f32": 1, "shfl.sync.up.b32": 10}, max_registers=64)
