"""Activations to NVFP4 (contract section 2), codes row-major and scales in the tiled order, in one launch.

    one thread: a group of 16 ─ load ─ amax ─ e4m3 scale ─ 16 codes ─ store 8 bytes of codes, 1 byte of scale

A CTA is one row (of those padded to whole scale tiles) x 128 groups; rows behind the last token get scale 0 and no codes. The order of float32
operations is the contract's, with an exact reciprocal: the result is the reference's, bit for bit. Plain PTX of compute capability 9.0,
which later ones compile as it is.
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
from densemoe.compile.kernels import sm90_epilogue as epilogue
from densemoe.compile.kernels.host import pointer
from densemoe.runtime.errors import VariantError
from densemoe.runtime.recipe import Parameter, Recipe
from densemoe.runtime.variant import Variant

OP = "quantize"
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_100f", "sm_103a")
WEIGHT_LAYOUT = "none"
GROUP = 16
THREADS = 128
SCALE_ROWS = 128  # rows of one scale tile


def reciprocal(x: Any) -> Any:
    """1 / x, rounded to nearest."""
    return pr.inline_ptx_hl("rcp.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def float32_of_bits(word: Any) -> Any:
    """The float32 of a word."""
    return pr.inline_ptx_hl("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[word])


def halves_of_f16x2(word: Any) -> list[Any]:
    """Two f16 as float32, the low one first."""
    return list(
        pr.inline_ptx_hl(
            "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, l; cvt.f32.f16 {$w1}, h; }",
            write_only_types=[Float32] * 2,
            read_only_args=[word],
        )
    )


def load_group(dtype: str, address: Any, exists: Any) -> list[Any]:
    """Sixteen values as float32; zeros where ``exists`` is 0."""
    loads = 4 if dtype == "f32" else 2
    words = [word for i in range(loads) for word in common.load_global_v4_if(address + i * 16, exists)]
    if dtype == "f32":
        return [float32_of_bits(word) for word in words]
    if dtype == "f16":
        return [value for word in words for value in halves_of_f16x2(word)]
    return [float32_of_bits(half) for word in words for half in (word << 16, word & Uint32(0xFFFF0000))]


def scale_of_group(values: list[Any], multiplier: Any) -> tuple[Any, Any, Any]:
    """(e4m3 byte of sixteen values, its value, what they are multiplied by before they are rounded to e2m1)."""
    largest = Float32(0.0)
    for value in values:
        largest = cute.arch.fmax(largest, cute.arch.fmax(value, -value))
    byte = epilogue.e4m3_of(epilogue.multiply(epilogue.multiply(largest, Float32(epilogue.ONE_SIXTH)), multiplier))
    scale = epilogue.float32_of_e4m3(byte)
    return byte, scale, epilogue.multiply(multiplier, reciprocal(scale))


def quantise(values: list[Any], multiplier: Any) -> tuple[Any, list[Any]]:
    """The e4m3 byte of sixteen values, and their codes as two words."""
    byte, _, scaled = scale_of_group(values, multiplier)
    used = Uint32(byte != Uint32(0))
    words = []
    for half in (values[:8], values[8:]):
        word = Uint32(0)
        for index, value in enumerate(half):
            word = word | (epilogue.e2m1_of(epilogue.multiply(value, scaled)) << (4 * index))
        words.append(word * used)
    return byte, words


@cute.kernel
def quantize_kernel(
    a: cutlass.Pointer,
    multiplier: cutlass.Pointer,
    codes: cutlass.Pointer,
    scales: cutlass.Pointer,
    tokens_total: Int32,
    groups: Int32,
    dtype: cutlass.Constexpr,
):
    tid, _, _ = cute.arch.thread_idx()
    row, part, _ = cute.arch.block_idx()
    column = part * THREADS + tid
    pr.griddepcontrol("wait")
    pr.griddepcontrol("launch_dependents")
    inside = Int32(column < groups)
    exists = inside & Int32(row < tokens_total)
    group = Int64(row) * Int64(groups) + Int64(column)
    element_bytes = 4 if cutlass.const_expr(dtype == "f32") else 2
    values = load_group(dtype, a + group * (GROUP * element_bytes), exists)
    factor = common.load_global_f32_if(multiplier, Int32(1))
    byte, words = quantise(values, factor)
    epilogue.store_if("v2.b32", codes + group * (GROUP // 2), exists, words)
    epilogue.store_if("u8", scales + common.scale_offset(Uint32(row), Uint32(column), Uint32(groups)), inside, [byte])


@cute.jit
def quantize_host(
    a: cute.Pointer,
    multiplier: cute.Pointer,
    codes: cute.Pointer,
    scales: cute.Pointer,
    tokens_total: Int32,
    k: Int32,
    symbol: cutlass.Constexpr[str],
    dtype: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    quantize_kernel.set_name_prefix(symbol, remove_cutlass_symbol=True, keep_mangled_name=False)
    groups = k // GROUP
    rows = (tokens_total + (SCALE_ROWS - 1)) // SCALE_ROWS * SCALE_ROWS
    quantize_kernel(a.raw_ptr(), multiplier.raw_ptr(), codes.raw_ptr(), scales.raw_ptr(), tokens_total, groups, dtype).launch(
        grid=(rows, (groups + (THREADS - 1)) // THREADS, 1), block=[THREADS, 1, 1], stream=stream, use_pdl=True
    )


def check(variant: Variant) -> None:
    """Raises VariantError where this kernel cannot be ``variant``."""
    if (variant.tile_m, variant.tile_n) != (1, THREADS * GROUP):
        raise VariantError(f"tile {variant.tile_m}x{variant.tile_n} of {variant.key}: this kernel has 1x{THREADS * GROUP}")
    if (variant.cluster_m, variant.cluster_n) != (1, 1):
        raise VariantError(f"cluster {variant.cluster_m}x{variant.cluster_n} of {variant.key}: this kernel uses none; write 1x1")
    if variant.options:
        raise VariantError(f"options {[name for name, _ in variant.options]} of {variant.key}: this kernel has none")


def recipe(variant: Variant) -> Recipe:
    """How the kernel of ``variant`` is launched."""
    return Recipe(
        parameters=(
            Parameter("a", "pointer", "a"),
            Parameter("multiplier", "pointer", "output_multiplier"),
            Parameter("codes", "pointer", "c.codes"),
            Parameter("scales", "pointer", "c.scales"),
            Parameter("tokens_total", "u32", "M"),
            Parameter("groups", "u32", f"K // {GROUP}"),
        ),
        grid=(f"ceil_div(M, {SCALE_ROWS}) * {SCALE_ROWS}", f"ceil_div(K // {GROUP}, {THREADS})", 1),
        block=(THREADS, 1, 1),
        programmatic_launch=True,
    )


def compile_arguments(variant: Variant) -> tuple[Any, tuple[Any, ...]]:
    """The host function and example arguments for ``cute.compile``."""
    pointers = (pointer(Uint8, 16), pointer(Uint8, 4), pointer(Uint8, 16), pointer(Uint8, 16))
    symbol = variant.symbol.removesuffix("_0")
    return quantize_host, (*pointers, Int32(8), Int32(256), symbol, variant.a_dtype, cuda.CUstream(0))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with: four pointers and two words (without the stream)."""
    return [*(addresses[each.value] for each in recipe(variant).parameters[:4]), names["M"], names["K"]]


def expected(variant: Variant) -> Expected:
    """What the audit must find in the PTX of ``variant``."""
    return Expected(ptx_counts={"rcp.rn.f32": 1, "cvt.rn.satfinite.e4m3x2.f32": 1}, max_registers=128)
