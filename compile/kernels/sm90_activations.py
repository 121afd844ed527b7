"""A layer's activations as bf16, as the sm_90a GEMMs of a layer read them: what CTAs of ``route`` and ``prepare`` do while another one sorts, in
variants with the option ``brings``. The others are without this code, which at few tokens would cost a layer more than its bytes (docs/tried.md).

    one thread: a group of 16 of one token
      NVFP4           codes, scale ─ decode                                              ┐                        natural order ┐
      bf16, f16, f32  values ─ amax ─ e4m3 scale ─ e2m1 (contract section 2) ─ decode    ┼─ eight words of bf16 ─┤               ├─ store 32 bytes
      bf16            values                                                             ┘     K 64 order: trade words in fours ┘

bf16 holds an e2m1 code times an e4m3 scale exactly, so that products are those of codes and scales, and weights' decoding is all that a GEMM does
besides. What is rounded here has the bits of what ``quantize`` gives, decoded: the same float32 operations in the same order.

In K 64 order (``runtime.layout``) a K 64 block's word ``8 q + w``, word w of its group q, is word q of the block's sixteen-byte chunk w. Four lanes
have a block's four groups; they trade words until lane q has chunks 2q and 2q + 1, the q-th 32 bytes. Rows are then whole K 128 blocks, zeros
behind K.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_epilogue as epilogue
from densemoe.compile.kernels.host import pointer
from densemoe.compile.kernels.sm90_quantize import GROUP, load_group, scale_of_group
from densemoe.runtime.errors import VariantError
from densemoe.runtime.problem import X_FORMS
from densemoe.runtime.recipe import Parameter
from densemoe.runtime.variant import BRINGS, Variant

#: Of the kernels that bring activations: what they read, and what they write, of which one is null.
POINTERS: Final = ("x", "x.scales", "x.multiplier", "x.bf16", "x.k64")
PARAMETERS: Final = (
    *(Parameter(role.replace(".", "_"), "pointer", role) for role in POINTERS),
    Parameter("x_form", "u32", "x_form"),
    Parameter("hidden", "u32", "H"),
)
DECODED_FACTOR = 0x43804380  # 2**8, twice, in bf16: what decoded activations lack
WORDS: Final = GROUP // 2  # of bf16 pairs in a group
GROUP_BYTES: Final = 4 * WORDS
LANES: Final = 32
#: A CTA for so many groups, while there are SMs: rounding takes some 300 instructions a group, which four warps on one SM issue side by side.
GROUPS_A_CTA: Final = 4 * LANES
#: CTAs that bring activations, one fewer than SMs at most (of a single SM one), as a recipe's expression.
BRINGING: Final = f"min(ceil_div(M * ceil_div(H, {common.SUPERBLOCK_K}) * {common.SUPERBLOCK_K // GROUP}, {GROUPS_A_CTA}), max(sm_count - 1, 1))"


@cute.jit
def bringing_ctas(tokens, hidden, sm_count):
    """``BRINGING`` on the host."""
    groups = tokens * (common.k_blocks_of(hidden) * (common.SUPERBLOCK_K // GROUP))
    return min((groups + (GROUPS_A_CTA - 1)) // GROUPS_A_CTA, max(sm_count - 1, Int32(1)))


@cute.jit
def bring_activations(x, x_scales, x_multiplier, x_bf16, x_k64, x_form, tokens_total, hidden, worker, workers, threads: cutlass.Constexpr, tid):
    """Every activation as bf16, by ``workers`` CTAs of ``threads`` threads, of which this is number ``worker``.

    They let the next launch begin by their end alone: its CTAs then find an empty device, instead of taking their places one by one (docs/tried.md).

    Args:
        x: ``[M, H]`` bf16, f16 or f32, or codes ``[M, H/2]``; x_scales: their tiled scales.
        x_multiplier: what x is multiplied by to be rounded to NVFP4, or null: bf16 is then brought as it is.
        x_bf16: takes ``[M, H]``; x_k64: in its stead, takes ``[M, ⌈H / 128⌉ · 128]`` in K 64 order; null: not wanted.
        x_form: which of ``X_FORMS`` x is.
    """
    pr.griddepcontrol("wait")
    given = (x, x_scales, x_multiplier, x_bf16, x_k64, tokens_total, hidden, worker, workers, threads, tid)
    for form in cutlass.range_constexpr(len(X_FORMS)):
        if x_form == form:
            if cutlass.const_expr(X_FORMS[form] == "bf16"):
                if x_multiplier.toint() == 0:
                    bring("bf16", False, *given)
                else:
                    bring("bf16", True, *given)
            else:
                bring(X_FORMS[form], X_FORMS[form] != "nvfp4", *given)


@cute.jit
def bring(
    form: cutlass.Constexpr, rounds: cutlass.Constexpr, x, x_scales, x_multiplier, x_bf16, x_k64, tokens_total, hidden, worker, workers,
    threads: cutlass.Constexpr, tid,
):  # fmt: skip
    """``bring_activations`` of one form. ``rounds``: to NVFP4."""
    lane = tid % LANES
    ordered = Int32(x_k64.toint() != 0)
    columns = Int32(Uint32(hidden) // GROUP)  # groups of a row that there are
    width = epilogue.select(ordered, common.k_blocks_of(hidden) * (common.SUPERBLOCK_K // GROUP), columns)  # of a row that is written
    target = x_bf16.toint()
    if ordered != 0:
        target = x_k64.toint()
    multiplier = Float32(1.0)
    if cutlass.const_expr(rounds):
        multiplier = common.load_global_f32_if(x_multiplier, Int32(1))
    groups = tokens_total * width
    # a warp's groups are neighbours, neighbouring warps' on different SMs
    for base in cutlass.range((tid // LANES * workers + worker) * LANES, groups, workers * threads, unroll=1):
        index = base + lane
        token = Int32(Uint32(index) // Uint32(width))
        column = index - token * width
        exists = Int32(index < groups)
        words = words_of_group(form, rounds, x, x_scales, multiplier, token, column, columns, exists & Int32(column < columns))
        traded = in_k64_order(words, lane)
        words = [epilogue.select(ordered, new, old) for new, old in zip(traded, words, strict=True)]
        at = target + Int64(index) * GROUP_BYTES
        for first in cutlass.range_constexpr(0, WORDS, 4):
            epilogue.store_if("v4.b32", at + first * 4, exists, words[first : first + 4])


def words_of_group(
    form: str, rounds: bool, x: Any, x_scales: Any, multiplier: Any, token: Any, column: Any, columns: Any, exists: Any
) -> list[Any]:
    """Eight words of bf16 of a token's group ``column``, of ``columns``; zeros where ``exists`` is 0."""
    group = Int64(token) * Int64(columns) + Int64(column)
    if form == "nvfp4":
        codes = common.load_global_v2_if(x + group * (GROUP // 2), exists)
        byte = common.load_global_u8_if(x_scales + common.scale_offset(Uint32(token), Uint32(column), Uint32(columns)), exists)
        scale = common.expand_activation_scale(byte)
        factor = pr.inline_ptx_hl(f"mov.b32 {{$w0}}, {DECODED_FACTOR};", write_only_types=[Uint32])
        pairs = [pair for word in codes for pair in common.decode_activation_pairs(word)]
        return [common.mul_bf16x2(common.mul_bf16x2(pair, scale), factor) for pair in pairs]
    if not rounds:
        at = x + group * GROUP_BYTES
        return [word for half in range(2) for word in common.load_global_v4_if(at + half * 16, exists)]
    element_bytes = 4 if form == "f32" else 2
    values = load_group(form, x + group * (GROUP * element_bytes), exists)
    byte, scale, factor = scale_of_group(values, multiplier)
    values = [epilogue.multiply(epilogue.e2m1_value(epilogue.multiply(value, factor)), scale) for value in values]
    used = Uint32(byte != Uint32(0))  # codes under a scale of 0 are 0 (contract section 2)
    return [epilogue.pack_half("bf16", *values[2 * i : 2 * i + 2]) * used for i in range(WORDS)]


def in_k64_order(words: list[Any], lane: Any) -> list[Any]:
    """What a lane stores of its K 64 block in K 64 order: chunks 2q and 2q + 1, whose words are those of four lanes. The whole warp comes here."""
    even, odd = (transposed(words[first::2], lane) for first in range(2))
    return even + odd


def transposed(words: list[Any], lane: Any) -> list[Any]:
    """Of four words in each of four neighbouring lanes: word q of all four, where q is the lane's place among them."""
    for distance in (2, 1):
        far = lane & distance
        words = list(words)
        for low in (0, 1) if distance == 2 else (0, 2):
            high = low + distance
            sent = epilogue.select(far, words[low], words[high])
            got = epilogue.shuffle_xor(sent, distance)
            words[low], words[high] = epilogue.select(far, got, words[low]), epilogue.select(far, words[high], got)
    return words


# ---- what the host sides of ``prepare`` and ``route`` share


def check_options(variant: Variant) -> None:
    """Raises VariantError where a kernel has another option than bringing activations."""
    unknown = [name for name, value in variant.options if name != BRINGS or value != 1]
    if unknown:
        raise VariantError(f"options {unknown} of {variant.key}: this kernel has {BRINGS}: 1")


def example_arguments() -> tuple[Any, ...]:
    """For ``cute.compile``: a pointer each of POINTERS, the form, H."""
    return (*(pointer(Uint8, 16) for _ in POINTERS), Int32(0), Int32(128))


def example_constants(variant: Variant) -> tuple[str, int, bool]:
    """For ``cute.compile``: the symbol, bytes of an id, whether activations are brought."""
    return variant.symbol.removesuffix("_0"), 8 if variant.a_dtype == "i64" else 4, bool(variant.option(BRINGS))


def oracle_arguments(variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]:
    """What the exported host function is called with in the places of ``example_arguments``."""
    pointers = [addresses[role] if variant.option(BRINGS) else 0 for role in POINTERS]
    return [*pointers, names["x_form"], names["H"]]
