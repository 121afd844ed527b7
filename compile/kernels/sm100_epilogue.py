"""Epilogue arithmetic of the tcgen05 kernels: SwiGLU, NVFP4 quantisation, conversions (contract sections 2–4).

A thread owns one row (token), so a group of 16 columns is never shared and its amax needs no shuffle. float32 arithmetic is packed in pairs where
the hardware has it; every product and sum is rounded once, in the contract's order (``.rn`` everywhere, so ptxas contracts nothing).
"""

from __future__ import annotations

from typing import Any, Final

import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass.experimental import primitives as pr

LOG2_E: Final = 1.4426950408889634
ONE_SIXTH: Final = 1.0 / 6.0
GROUP: Final = 16  # columns that share one scale
ALL_BITS: Final = 0xFFFFFFFF

Pair = tuple[Any, Any]


def multiply2(a: Pair, b: Pair) -> Pair:
    """Two products."""
    result = pr.mul_packed_f32x2(a, b, rnd=pr.FPRoundingMode.RN)
    return result[0], result[1]


def add2(a: Pair, b: Pair) -> Pair:
    """Two sums."""
    result = pr.add_packed_f32x2(a, b, rnd=pr.FPRoundingMode.RN)
    return result[0], result[1]


def fused2(a: Pair, b: Pair, c: Pair) -> Pair:
    """Two a·b + c, each rounded once."""
    result = pr.fma_packed_f32x2(a, b, c, rnd=pr.FPRoundingMode.RN)
    return result[0], result[1]


def add_scaled(sums: list[Any], scale: Any, values: list[Any]) -> list[Any]:
    """sums + scale · values, each rounded once."""
    result: list[Any] = []
    for index in range(0, len(sums), 2):
        result += fused2((scale, scale), (values[index], values[index + 1]), (sums[index], sums[index + 1]))
    return result


def add_lists(a: list[Any], b: list[Any]) -> list[Any]:
    """a + b by element."""
    result: list[Any] = []
    for index in range(0, len(a), 2):
        result += add2((a[index], a[index + 1]), (b[index], b[index + 1]))
    return result


def exp2_approximate(x: Any) -> Any:
    """ex2.approx.ftz.f32: allowed by contract section 3, step 3. What is flushed vanishes beside the 1 that is added."""
    return pr.inline_ptx_hl("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def reciprocal_approximate(x: Any) -> Any:
    """rcp.approx.ftz.f32: allowed by contract section 3, step 3. A flushed sigmoid is below 2**-126 (contract section 9, rule 2)."""
    return pr.inline_ptx_hl("rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def multiply(a: Any, b: Any) -> Any:
    """mul.rn.f32, which ptxas may not contract into a fused multiply-add."""
    return pr.inline_ptx_hl("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def swiglu2(up: Pair, gate: Pair) -> Pair:
    """up · (gate · sigmoid(gate)), twice."""
    exponents = multiply2(gate, (Float32(-LOG2_E), Float32(-LOG2_E)))
    denominators = add2((exp2_approximate(exponents[0]), exp2_approximate(exponents[1])), (Float32(1.0), Float32(1.0)))
    sigmoids = (reciprocal_approximate(denominators[0]), reciprocal_approximate(denominators[1]))
    return multiply2(up, multiply2(gate, sigmoids))


def activated(up: list[Any], gate: list[Any], alpha: Any, post: Any) -> list[Any]:
    """SwiGLU of accumulators: y = u · (g · sigmoid(g)) · post with u, g times alpha (contract section 3, steps 2–4 without the selection)."""
    values: list[Any] = []
    for index in range(0, len(up), 2):
        u = multiply2((up[index], up[index + 1]), (alpha, alpha))
        g = multiply2((gate[index], gate[index + 1]), (alpha, alpha))
        values += multiply2(swiglu2(u, g), (post, post))
    return values


def keep_mask(kept: Any) -> Any:
    """All bits where ``kept`` is not 0, else none: selects an output away, whatever it is."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r0}, 0; selp.b32 {$w0}, 0xFFFFFFFF, 0, p; }", write_only_types=[Uint32], read_only_args=[kept]
    )


def quantise_group(values: list[Any], multiplier: Any) -> tuple[Any, list[Any]]:
    """Quantises 16 columns (contract section 2).

    Returns:
        The e4m3 byte of the scale, and the codes as two words, the first column in the lowest nibble.
    """
    largest = Float32(0.0)
    for value in values:
        largest = cute.arch.fmax(largest, absolute(value))
    byte = e4m3_of(multiply(multiply(largest, Float32(ONE_SIXTH)), multiplier))
    factor = multiply(multiplier, reciprocal_approximate(float32_of_e4m3(byte)))
    kept = keep_mask(byte)  # a scale of 0 has codes of 0
    words = []
    for first in range(0, len(values), 8):
        scaled: list[Any] = []
        for index in range(first, first + 8, 2):
            scaled += multiply2((values[index], values[index + 1]), (factor, factor))
        words.append(e2m1_of(scaled) & kept)
    return byte, words


def absolute(x: Any) -> Any:
    """abs.f32."""
    return pr.inline_ptx_hl("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def e4m3_of(x: Any) -> Any:
    """The e4m3 byte of a float32: nearest even, saturating."""
    return pr.inline_ptx_hl(
        "{ .reg .b16 s; cvt.rn.satfinite.e4m3x2.f32 s, 0f00000000, {$r0}; cvt.u32.u16 {$w0}, s; }",
        write_only_types=[Uint32],
        read_only_args=[x],
    )


def float32_of_e4m3(byte: Any) -> Any:
    """The value of an e4m3 byte."""
    return pr.inline_ptx_hl(
        "{ .reg .b16 s, l, h; .reg .b32 d; cvt.u16.u32 s, {$r0}; cvt.rn.f16x2.e4m3x2 d, s; mov.b32 {l, h}, d; cvt.f32.f16 {$w0}, l; }",
        write_only_types=[Float32],
        read_only_args=[byte],
    )


def e2m1_of(values: list[Any]) -> Any:
    """Eight e2m1 codes as one word, the first value in the lowest nibble: nearest even, saturating."""
    return pr.inline_ptx_hl(
        "{ .reg .b8 b0, b1, b2, b3; cvt.rn.satfinite.e2m1x2.f32 b0, {$r1}, {$r0}; cvt.rn.satfinite.e2m1x2.f32 b1, {$r3}, {$r2};"
        " cvt.rn.satfinite.e2m1x2.f32 b2, {$r5}, {$r4}; cvt.rn.satfinite.e2m1x2.f32 b3, {$r7}, {$r6}; mov.b32 {$w0}, {b0, b1, b2, b3}; }",
        write_only_types=[Uint32],
        read_only_args=values,
    )


def convert(dtype: str, values: list[Any]) -> list[Any]:
    """Consecutive float32 as words of ``dtype``, each converted once: nearest even, fp8 saturating, f16 overflowing to Inf."""
    if dtype == "f32":
        return values
    if dtype in ("bf16", "f16"):
        text = "cvt.rn.%sx2.f32 {$w0}, {$r1}, {$r0};" % dtype
        return [
            pr.inline_ptx_hl(text, write_only_types=[Uint32], read_only_args=values[index : index + 2]) for index in range(0, len(values), 2)
        ]
    text = (
        "{ .reg .b16 l, h; cvt.rn.satfinite.%sx2.f32 l, {$r1}, {$r0}; cvt.rn.satfinite.%sx2.f32 h, {$r3}, {$r2}; mov.b32 {$w0}, {l, h}; }"
        % (dtype, dtype)
    )
    return [pr.inline_ptx_hl(text, write_only_types=[Uint32], read_only_args=values[index : index + 4]) for index in range(0, len(values), 4)]


#: Bits of one element of a plain output.
OUTPUT_BITS: Final = {"f32": 32, "f16": 16, "bf16": 16, "e4m3": 8, "e5m2": 8}


def masked(words: list[Any], mask: Any) -> list[Any]:
    """``words`` with the bits outside ``mask`` cleared; float32 words too."""
    return [
        pr.inline_ptx_hl("and.b32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[word, mask])
        if isinstance(word, Uint32)
        else pr.inline_ptx_hl(
            "{ .reg .b32 x; mov.b32 x, {$r0}; and.b32 {$w0}, x, {$r1}; }", write_only_types=[Uint32], read_only_args=[word, mask]
        )
        for word in words
    ]
