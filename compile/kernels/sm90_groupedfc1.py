"""FC1 for sm_90a over gathered tokens: each expert multiplies the tokens that chose it, and no others (contract section 5, compact form).

The kernel is that of ``sm90_fc1``, with units of 32 output columns x one tile of ``route``: up to ``tile_m`` rows of one expert, whose tokens
``rows`` names. The output is compact: one row a (token, expert) pair, ``[M·k, I]``. Weights are read once a tile, so once an expert up to
``tile_m`` tokens of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint8

from densemoe.compile.kernels import Expected, sm90_fc1
from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_lists as lists
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_epilogue import OUTPUT_COLUMNS
from densemoe.compile.kernels.sm90_fc1 import fc1_kernel
from densemoe.runtime.recipe import Parameter, Recipe, pointer_or_null
from densemoe.runtime.variant import ROUTES, Variant

OP = "groupedfc1"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT


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
    slots: cute.Pointer,
    ids: cute.Pointer,
    pairs: Int32,
    hidden: Int32,
    intermediate: Int32,
    early_list: Int32,
    experts: Int32,
    id_bytes: Int32,
    first_expert: Int32,
    elsewhere: Int32,
    top_k: Int32,
    sm_count: Int32,
    symbol: cutlass.Constexpr[str],
    config: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    fc1_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    k_blocks = (hidden + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    blocks = pairs * (intermediate // OUTPUT_COLUMNS) * k_blocks
    ctas = min((blocks + (sm90_fc1.SMALLEST_SPAN - 1)) // sm90_fc1.SMALLEST_SPAN, sm_count * config.resident_ctas)
    fc1_kernel(
        a.raw_ptr(),
        a_scales.raw_ptr(),
        b.raw_ptr(),
        alpha.raw_ptr(),
        alpha.raw_ptr(),
        output_multiplier.raw_ptr(),
        c.raw_ptr(),
        c_scales.raw_ptr(),
        None if config.routes else tiles.raw_ptr(),
        None if config.routes else rows.raw_ptr(),
        slots.raw_ptr(),
        pairs,
        experts if config.routes else Int32(0),
        hidden,
        intermediate,
        Int32(1),
        1 - early_list,
        ids.raw_ptr() if config.routes else None,
        id_bytes if config.routes else None,
        first_expert if config.routes else None,
        elsewhere if config.routes else None,
        top_k if config.routes else None,
        True,
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
    """The compile-time parameters of ``variant``: those of the dense kernel, which writes NVFP4 decoded."""
    return replace(sm90_fc1.config_of(variant), rounded=variant.c_dtype == "nvfp4")


def check(variant: Variant) -> None:
    """Raises VariantError where this kernel cannot be ``variant``."""
    common.check_tile(variant, common.GROUPED_TILES_M, options=(ROUTES,))
    if variant.option(ROUTES):
        lists.check(variant)


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    config = config_of(variant)
    listed: tuple[Parameter, ...] = (Parameter("chosen", "pointer", "tiles"), Parameter("rows", "pointer", "rows"))
    choice: tuple[Parameter, ...] = ()
    if config.routes:
        listed, choice = (), (*lists.CHOICE, Parameter("top_k", "u32", "top_k"))
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a"),
            pointer_or_null("a_scales", "a.scales", False),
            Parameter("b", "pointer", "b"),
            Parameter("alpha", "pointer", "alpha"),
            Parameter("alpha_post", "pointer", "alpha"),
            pointer_or_null("output_multiplier", "output_multiplier", config.rounded),
            Parameter("c", "pointer", "c"),
            pointer_or_null("c_scales", "c.scales", False),
            *listed,
            Parameter("slots", "pointer", "workspace.slots"),
            Parameter("tokens_total", "u32", "M * top_k"),  # rows of all tiles: how long the lists may be
            Parameter("experts", "u32", "E" if config.routes else "0"),
            Parameter("hidden", "u32", "H"),
            Parameter("intermediate", "u32", "I"),
            Parameter("token_tiles", "u32", "1"),
            Parameter("waits_first", "u32", "1 - early_list"),
            *choice,
        ),
        let=(
            ("blocks", f"M * top_k * (I // {OUTPUT_COLUMNS}) * ceil_div(H, {common.SUPERBLOCK_K})"),
            ("ctas", f"min(ceil_div(blocks, {sm90_fc1.SMALLEST_SPAN}), sm_count * {config.resident_ctas})"),
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
    pointers = (
        *(pointer(Uint8, 16) for _ in range(3)),
        *(pointer(Uint8, 4) for _ in range(2)),  # float32, addressed in bytes as the rest
        *(pointer(Uint8, 16) for _ in range(3)),
        pointer(Uint8, 4),
        pointer(Uint8, 16),
        pointer(Uint8, 4),
    )
    words = tuple(Int32(value) for value in (16, 256, 128, 0, 8, 4, 0, 0, 2, 132))
    return groupedfc1_host, (*pointers, *words, variant.symbol.removesuffix("_0"), config_of(variant), cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: eleven pointers and ten words (without the stream)."""
    roles = {each.name: addresses[each.value] for each in recipe(variant).parameters if each.kind == "pointer"}
    wanted = ("a", "a_scales", "b", "alpha", "output_multiplier", "c", "c_scales", "chosen", "rows", "slots", "ids")
    pairs = names["M"] * names["top_k"]
    words = ("H", "I", "early_list", "E", "id_bytes", "first_expert", "elsewhere", "top_k", "sm_count")
    return [*(roles.get(name, 0) for name in wanted), pairs, *(names[name] for name in words)]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``: the dense kernel's."""
    return sm90_fc1.expected(variant)
