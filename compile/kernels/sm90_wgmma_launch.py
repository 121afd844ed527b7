"""Host side of the sm_90a WGMMA kernels: recipe, host function and example arguments that both ops share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint8

from densemoe.compile.kernels import Expected
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_conversion as conversion
from densemoe.compile.kernels import sm90_ordered as ordered
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_wgmma import shared_memory_bytes
from densemoe.compile.kernels.sm90_wgmma_config import GROUP_ROWS, config_of
from densemoe.compile.kernels.sm90_wgmma_kernel import ORDERED_AT_ONCE, SMALLEST_SPAN, slot_bytes, wgmma_kernel
from densemoe.runtime.recipe import Parameter, Recipe, Workspace, pointer_or_null
from densemoe.runtime.variant import Variant

POINTERS = 12  # of the host function, the last for what adds in one order alone


@cute.jit
def wgmma_host(
    a: cute.Pointer,
    a_scales: cute.Pointer,
    b: cute.Pointer,
    scales: cute.Pointer,
    output_multiplier: cute.Pointer,
    c: cute.Pointer,
    c_scales: cute.Pointer,
    partials: cute.Pointer,
    counters: cute.Pointer,
    tiles: cute.Pointer,
    rows: cute.Pointer,
    slots: cute.Pointer,
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
    wgmma_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    weight_rows, k_length = 2 * intermediate, hidden
    if cutlass.const_expr(config.op == "groupedfc2"):
        weight_rows, k_length = hidden, intermediate
    groups = (weight_rows + (GROUP_ROWS - 1)) // GROUP_ROWS
    blocks = tokens_total * top_k * groups * ((k_length + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K)
    adding = min((blocks + (SMALLEST_SPAN - 1)) // SMALLEST_SPAN, sm_count * config.shape.resident_ctas)
    ctas = adding
    if cutlass.const_expr(config.op == "groupedfc2"):
        row_blocks = hidden // common.SUPERBLOCK_ROWS
        if cutlass.const_expr(config.ordered):
            ctas += ordered.converting_ctas(
                tokens_total, top_k, row_blocks, sm_count, ORDERED_AT_ONCE[config.shape.resident_ctas], config.warps, config.shape.resident_ctas
            )  # fmt: skip
        else:
            ctas += conversion.converting_ctas(tokens_total, row_blocks, sm_count, config.warps, config.shape.resident_ctas)
    wgmma_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        scales.raw_ptr(),
        output_multiplier.raw_ptr(),
        c.raw_ptr(),
        c_scales.raw_ptr(),
        partials.raw_ptr(),
        counters.raw_ptr(),
        tiles.raw_ptr(),
        None if config.ordered else rows.raw_ptr(),
        rows.raw_ptr() if config.ordered else None,
        slots.raw_ptr() if config.ordered else None,
        tokens_total,
        top_k if config.ordered else None,
        max(Int32(SMALLEST_SPAN), ((k_length + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K + 1) // 2) if config.ordered else None,
        hidden,
        intermediate,
        adding,
        1 - early_list,
        config,
    ).launch(
        grid=(ctas, 1, 1),
        block=[config.threads, 1, 1],
        min_blocks_per_mp=config.shape.resident_ctas,
        preferred_smem_carveout=100,
        stream=stream,
        use_pdl=True,
    )


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    config = config_of(variant)
    fc2 = variant.op == "groupedfc2"
    if fc2:
        weight_rows, k_length, scales = "H", "I", "row_alpha"
        workspaces = conversion.workspaces()
        grid = f"adding + {conversion.converting(config.warps, config.shape.resident_ctas)}"
        if config.ordered:
            workspaces = ordered.workspaces(f"adding * {slot_bytes(config)}")
            grid = f"adding + {ordered.converting(ORDERED_AT_ONCE[config.shape.resident_ctas], config.warps, config.shape.resident_ctas)}"
    else:
        weight_rows, k_length, scales = "2 * I", "H", "alpha"
        workspaces = (Workspace("workspace.partials", f"adding * {slot_bytes(config)}", zeroed=True),)
        grid = "adding"
    own: tuple[Parameter, ...] = (Parameter("rows", "pointer", "rows"), Parameter("tokens_total", "u32", "M"))
    if config.ordered:
        own = (*ordered.POINTERS, Parameter("tokens_total", "u32", "M"), Parameter("top_k", "u32", "top_k"))
        own = (*own, Parameter("smallest", "u32", ordered.smallest_span(SMALLEST_SPAN)))
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a.k64" if config.k64_order else "a"),
            pointer_or_null("a_scales", "a.scales", False),
            Parameter("b", "pointer", "b"),
            Parameter("scales", "pointer", scales),
            pointer_or_null("output_multiplier", "output_multiplier", config.c_dtype == "nvfp4"),
            Parameter("c", "pointer", "c.k64" if config.k64_order and not fc2 else "c"),
            pointer_or_null("c_scales", "c.scales", False),
            Parameter("partials", "pointer", workspaces[0].role),
            pointer_or_null("counters", "workspace.counters", fc2),
            Parameter("tiles", "pointer", "tiles"),
            *own,
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
            Parameter("adding", "u32", "adding"),
            Parameter("waits_first", "u32", "1 - early_list"),
        ),
        let=(
            ("row_blocks", f"H // {common.SUPERBLOCK_ROWS}"),
            ("groups", f"ceil_div({weight_rows}, {GROUP_ROWS})"),
            ("blocks", f"M * top_k * groups * ceil_div({k_length}, {common.SUPERBLOCK_K})"),
            ("adding", f"min(ceil_div(blocks, {SMALLEST_SPAN}), sm_count * {config.shape.resident_ctas})"),
        ),
        grid=(grid, 1, 1),
        block=(config.threads, 1, 1),
        dynamic_smem=shared_memory_bytes(config),
        workspaces=workspaces,
        settings=(("early_list", (0, 1)),),
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
        pointer(Uint8, 16),
        pointer(Uint8, 4),
        pointer(Uint8, 16),
    )
    words = tuple(Int32(value) for value in (8, 2, 256, 128, 0, 132))
    return wgmma_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: twelve pointers and six words (without the stream)."""
    pointers = [addresses[each.value] if each.kind == "pointer" else 0 for each in recipe(variant).parameters[:POINTERS]]
    if not config_of(variant).ordered:
        pointers[-1] = 0  # slots
    return [*pointers, *(names[name] for name in ("M", "top_k", "H", "I", "early_list", "sm_count"))]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    config = config_of(variant)
    steps = common.K64_HALVES * common.K16_STEPS * config.blocks
    widths = config.widths
    if config.warp_products:
        counts = {common.MMA: steps * sum(width // common.MMA_TOKENS for width in widths)}
    else:
        counts = {f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16": steps for width in widths}
    # one per ring stage before the loops, one to refill inside each
    counts[common.COPY] = config.shape.weight_stages + len(widths)
    if config.ordered:
        counts["st.global.v4.f32"] = config.accumulators // 4 + ordered.vectors_stored(config.c_dtype, ORDERED_AT_ONCE[config.shape.resident_ctas])
    elif variant.op == "groupedfc2":
        counts["red.relaxed.gpu.global.add.v4.f32"] = config.accumulators // 4
    return Expected(ptx_counts=counts, max_registers=min(255, 65536 // (config.threads * config.shape.resident_ctas)))
