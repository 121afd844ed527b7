"""FC1's epilogue for sm_90a: alpha, SwiGLU, alpha_post, conversion or NVFP4 quantisation, stores (contract sections 2 and 3)."""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common

LOG2_E = 1.4426950408889634
ONE_SIXTH = 1.0 / 6.0
OUTPUTS = 4  # consecutive output columns that one lane holds of a token
OUTPUT_COLUMNS = common.SUPERBLOCK_ROWS // 2  # of one superblock row: half its rows are gates
K64_BYTES = 128  # of a row's K 64 block of bf16
CHUNK = 16  # bytes of a chunk of K 64 order
ZERO_LANES = 4  # that store half of one together


def exp2_approximate(x: Any) -> Any:
    """ex2.approx.f32: allowed by contract section 3, step 3."""
    return pr.inline_ptx_hl("ex2.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def reciprocal_approximate(x: Any) -> Any:
    """rcp.approx.f32: allowed by contract section 3, step 3."""
    return pr.inline_ptx_hl("rcp.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def multiply(a: Any, b: Any) -> Any:
    """mul.rn.f32, which ptxas may not contract into a fused multiply-add."""
    return pr.inline_ptx_hl("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def swiglu(up: Any, gate: Any) -> Any:
    """up · (gate · sigmoid(gate))."""
    exponential = exp2_approximate(multiply(gate, Float32(-LOG2_E)))
    return multiply(up, multiply(gate, reciprocal_approximate(Float32(1.0) + exponential)))


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


def e2m1_magnitude(x: Any) -> Any:
    """The magnitude that a float32 has as e2m1, as float32: nearest even, saturating. sm_90a has no conversion to e2m1.

    The spacing of e2m1 is half the value's power of two, at least 0.5: adding 1.5·2**22 of that power rounds to it, ties to even.
    """
    return pr.inline_ptx_hl(
        "{ .reg .f32 v, m, q; .reg .b32 b; abs.f32 v, {$r0}; min.f32 v, v, 0f40C00000; mov.b32 b, v; and.b32 b, b, 0x7F800000;"
        " mov.b32 m, b; max.f32 m, m, 0f3F800000; mul.rn.f32 m, m, 0f4AC00000; add.rn.f32 q, v, m; sub.rn.f32 {$w0}, q, m; }",
        write_only_types=[Float32],
        read_only_args=[x],
    )


def e2m1_of(x: Any) -> Any:
    """The e2m1 code (sign in bit 3) of a float32: nearest even, saturating."""
    return pr.inline_ptx_hl(
        "{ .reg .f32 q; .reg .b32 b, s; mul.rn.f32 q, {$r0}, 0f00800000; mov.b32 b, q; shr.u32 b, b, 22;"
        " mov.b32 s, {$r1}; shr.u32 s, s, 28; and.b32 s, s, 8; or.b32 {$w0}, b, s; }",
        write_only_types=[Uint32],
        read_only_args=[e2m1_magnitude(x), x],
    )


def e2m1_value(x: Any) -> Any:
    """The value of the e2m1 code of a float32, as float32."""
    return pr.inline_ptx_hl("copysign.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Float32], read_only_args=[e2m1_magnitude(x), x])


def shuffle_xor(value: Any, distance: int) -> Any:
    """The value of the lane whose number differs by ``distance`` (exclusive or), over the whole warp."""
    return pr.inline_ptx_hl(
        "shfl.sync.bfly.b32 {$w0}, {$r0}, %d, 0x1f, 0xffffffff;" % distance, write_only_types=[type(value)], read_only_args=[value]
    )


def store_if(width: str, address: Any, valid: Any, words: list[Any]) -> None:
    """Stores ``words`` as one access of type ``width`` (``v2.b32``, ``b32``, ``u8`` …) where ``valid`` is not 0."""
    operands = ", ".join("{$r%d}" % (index + 2) for index in range(len(words)))
    value = "{%s}" % operands if len(words) > 1 else operands
    pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; @p st.global." + width + " [{$r0}], " + value + "; }",
        read_only_args=[address, valid, *words],
    )


def pack_half(dtype: str, low: Any, high: Any) -> Any:
    """Two float32 as one word of two f16 or bf16, nearest even, the first in the low half. f16 overflows to Inf."""
    return pr.inline_ptx_hl(
        "cvt.rn.%sx2.f32 {$w0}, {$r1}, {$r0};" % dtype, write_only_types=[Uint32], read_only_args=[low, high]
    )


def store_row(dtype: str, c: Any, element: Any, valid: Any, values: list[Any]) -> None:
    """Stores consecutive float32 ``values`` (a multiple of 4) as ``dtype`` from element ``element`` of ``c`` on."""
    for first in range(0, len(values), 4):
        four = values[first : first + 4]
        if dtype == "f32":
            store_if("v4.f32", c + (element + first) * 4, valid, four)
        else:
            words = [pack_half(dtype, four[0], four[1]), pack_half(dtype, four[2], four[3])]
            store_if("v2.b32", c + (element + first) * 2, valid, words)


def largest_of_group(values: list[Any]) -> Any:
    """The largest magnitude of a 16-group whose values lie in the lanes 4 and 8 away too."""
    largest = Float32(0.0)
    for value in values:
        largest = cute.arch.fmax(largest, cute.arch.fmax(value, -value))
    largest = cute.arch.fmax(largest, shuffle_xor(largest, 4))
    return cute.arch.fmax(largest, shuffle_xor(largest, 8))


def group_scale(largest: Any, multiplier: Any) -> tuple[Any, Any, Any]:
    """(e4m3 byte, its value, what the values of a 16-group are multiplied by before they are rounded to e2m1), by its largest magnitude (contract
    section 2)."""
    byte = e4m3_of(multiply(multiply(largest, Float32(ONE_SIXTH)), multiplier))
    scale = float32_of_e4m3(byte)
    return byte, scale, multiply(multiplier, reciprocal_approximate(scale))


def quantise_group(values: list[Any], multiplier: Any) -> tuple[Any, Any]:
    """Quantises a lane's four values with the 16-group that it shares with the lanes 4 and 8 away (contract section 2).

    Returns:
        The group's e4m3 byte, and the lane's four codes in the low 16 bits.
    """
    byte, _, factor = group_scale(largest_of_group(values), multiplier)
    codes = Uint32(0)
    for index, value in enumerate(values):
        codes = codes | (e2m1_of(multiply(value, factor)) << (4 * index))
    return byte, codes * Uint32(byte != Uint32(0))


def rounded_group(values: list[Any], largest: Any, multiplier: Any) -> list[Any]:
    """What the codes and the scale of a 16-group's values stand for, without the global scale: float32 that bf16 holds exactly."""
    _, scale, factor = group_scale(largest, multiplier)
    return [multiply(e2m1_value(multiply(value, factor)), scale) for value in values]


def store_fc1_outputs(
    config: Any,
    accumulators: list[Any],
    scale: Any,
    output_multiplier: Any,
    c: Any,
    first_row: Any,
    end: Any,
    place: Any,
    intermediate: Any,
    g: Any,
    t: Any,
) -> None:
    """Turns one superblock row's accumulators into 32 output columns of ``tile_m`` rows.

    Args:
        config: of a kernel of 256 weight rows.
        accumulators: ``[token block][m16 block][up token 2t, up 2t+1, gate 2t, gate 2t+1]``.
        scale: alpha of the expert.
        first_row, end: rows of the output; place: of the superblock row in the expert. This lane owns columns ``32 place + 4g`` … ``+ 4g + 3`` of
            ``intermediate``.
    """
    multiplier = Float32(1.0)
    if cutlass.const_expr(config.c_dtype == "nvfp4"):
        multiplier = common.load_global_f32_if(output_multiplier, Int32(1))
    column, offset = place * OUTPUT_COLUMNS, word_offset(place, 0, g)
    for block in range(config.token_blocks):
        rows: list[tuple[Any, Any, list[Any]]] = []
        for pair in range(2):
            row = first_row + (block * common.MMA_TOKENS + t * 2 + pair)
            values = []
            for m16 in range(common.M16_BLOCKS):
                at = (block * common.M16_BLOCKS + m16) * common.ACCUMULATORS + pair
                up, gate = (multiply(multiply(accumulators[at + i], Float32(config.product_scale)), scale) for i in (0, 2))
                values.append(swiglu(up, gate))
            rows.append((row, Int32(row < end), values))
        for row, exists, values in rows:
            if config.c_dtype == "nvfp4":
                values = rounded_group(values, largest_of_group(values), multiplier)
            if config.k64_order:
                at = k64_address(c, row, offset, intermediate)
                for i in range(2):  # words are no neighbours; by eight bytes, after a shuffle, as many parts of sectors are written
                    store_if("b32", at + i * CHUNK, exists, [pack_half("bf16", *values[2 * i : 2 * i + 2])])
            else:
                store_row("bf16", c, Int64(row) * Int64(intermediate) + Int64(column + g * OUTPUTS), exists, values)


def k64_address(c: Any, row: Any, offset: Any, intermediate: Any) -> Any:
    """Address of bytes of a row of FC1's output in K 64 order (``runtime.layout``), whole K 128 blocks; ``offset`` is 32-bit: registers are short."""
    return c + (Int64(row) * Int64(common.k_blocks_of(intermediate) * (common.SUPERBLOCK_K * 2)) + Int64(offset))


def word_offset(place: Any, i: Any, g: Any) -> Any:
    """Where columns ``4g + 2i`` and the next of a superblock row's 32 stand in a row in K 64 order: in the K 64 block's sixteen-byte chunk
    ``2 (g mod 4) + i``, as word ``2 (place mod 2) + ⌊g / 4⌋``.

    Args:
        place: of the superblock row in the expert.
    """
    return place // 2 * K64_BYTES + g % 4 * (2 * CHUNK) + i * CHUNK + place % 2 * 8 + g // 4 * 4


def store_k64_zeros(config: Any, c: Any, first_row: Any, end: Any, place: Any, intermediate: Any, lane: Any) -> None:
    """Stores zeros in place of a superblock row's columns, sixteen bytes a lane."""
    offset = place * (K64_BYTES // 2) + lane % ZERO_LANES * CHUNK
    for step in range(0, config.tile_m, 32 // ZERO_LANES):
        row = first_row + (step + lane // ZERO_LANES)
        store_if("v4.b32", k64_address(c, row, offset, intermediate), Int32(row < end), [Uint32(0)] * 4)


def fc1_pairs(config: Any, accumulators: list[Any], scale: Any, peaks: Any, half: Any, g: Any, t: Any) -> list[Any]:
    """FC1's outputs of a lane that holds two of a superblock's four m16 blocks: two consecutive outputs of each row, ``[token block][pair][2]``.

    For NVFP4 the largest magnitude of this warp's half of each 16-group is stored, so that the warp with the other half finds it.

    Args:
        accumulators: ``[m16 block][token block][up token 2t, up 2t+1, gate 2t, gate 2t+1]``.
        scale: alpha of the expert.
        peaks: shared-memory address of float32 ``[half][tile_m][2 groups]``; half: 0 or 1, which m16 blocks the warp has.
    """
    values = []
    at = peaks + ((half * config.tile_m + t * 2) * 2 + g // 4) * 4
    for block in range(config.token_blocks):
        for pair in range(2):
            own = []
            for m16 in range(2):
                first = (m16 * config.token_blocks + block) * common.ACCUMULATORS + pair
                up, gate = (multiply(multiply(accumulators[first + i], Float32(config.product_scale)), scale) for i in (0, 2))
                own.append(swiglu(up, gate))
            values += own
            if config.c_dtype == "nvfp4":
                address = at + (block * common.MMA_TOKENS + pair) * 8
                pr.inline_ptx_hl(
                    "{ .reg .pred p; setp.eq.b32 p, {$r1}, 0; @p st.shared.f32 [{$r0}], {$r2}; }",
                    read_only_args=[address, g % 4, largest_of_group(own)],
                )
    return values


def store_fc1_pairs(
    config: Any,
    values: list[Any],
    peaks: Any,
    output_multiplier: Any,
    c: Any,
    first_row: Any,
    end: Any,
    place: Any,
    intermediate: Any,
    half: Any,
    g: Any,
    t: Any,
) -> None:
    """Stores what ``fc1_pairs`` gave, in K 64 order; for NVFP4 behind a barrier.

    Args:
        first_row, end: rows of the output; place: of the superblock row in the expert. This lane owns column ``32 place + 4g + 2 half`` and the one
            after.
    """
    multiplier = Float32(1.0)
    if cutlass.const_expr(config.c_dtype == "nvfp4"):
        multiplier = common.load_global_f32_if(output_multiplier, Int32(1))
    mine, theirs = (peaks + ((which * config.tile_m + t * 2) * 2 + g // 4) * 4 for which in (half, 1 - half))
    offset = word_offset(place, half, g)
    for index in range(config.token_blocks * 2):
        pair = values[2 * index : 2 * index + 2]
        token = index // 2 * common.MMA_TOKENS + index % 2
        if config.c_dtype == "nvfp4":
            largest = cute.arch.fmax(*(load_shared_f32(side + token * 8) for side in (mine, theirs)))
            pair = rounded_group(pair, largest, multiplier)
        row = first_row + (token + t * 2)
        store_if("b32", k64_address(c, row, offset, intermediate), Int32(row < end), [pack_half("bf16", *pair)])


def load_shared_f32(address: Any) -> Any:
    """Four bytes of shared memory."""
    return pr.inline_ptx_hl("ld.shared.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address])


def store_fc1_row(
    config: common.Config,
    sums: list[Any],
    scale: Any,
    multiplier: Any,
    alpha_post: Any,
    c: Any,
    c_scales: Any,
    token: Any,
    exists: Any,
    expert: Any,
    experts: Any,
    column: Any,
    columns: Any,
    g: Any,
) -> None:
    """Turns eight sums of one token, up 4g … 4g + 3 and gate 4g … 4g + 3 of a unit, into four outputs. All lanes of a warp come here together.

    Args:
        scale: alpha of the expert; multiplier: of the output where it is NVFP4, else unused.
        alpha_post: float32 ``[M, E]``, or null; None where the kernel has no such parameter.
        column: first output column of the unit, of ``columns``.
    """
    has_post = None if alpha_post is None else Int32(alpha_post.toint() != 0)
    post = None
    if has_post is not None:
        post = common.load_global_f32_if(alpha_post + (Int64(token) * Int64(experts) + Int64(expert)) * 4, exists & has_post)
    values = []
    for output in range(OUTPUTS):
        up, gate = (multiply(multiply(sums[output + i], Float32(config.product_scale)), scale) for i in (0, OUTPUTS))
        y = swiglu(up, gate)
        values.append(y if has_post is None else apply_alpha_post(y, post, has_post))
    if not config.codes:
        if config.rounded:
            values = rounded_group(values, largest_of_group(values), multiplier)
        dtype = "bf16" if config.rounded else config.c_dtype
        store_row(dtype, c, Int64(token) * Int64(columns) + Int64(column + g * OUTPUTS), exists, values)
        return
    byte, codes = quantise_group(values, multiplier)
    word = codes | (shuffle_xor(codes, 4) << 16)  # an even lane stores its neighbour's codes too
    store_if("b32", c + (Int64(token) * Int64(columns) + Int64(column + g * OUTPUTS)) // 2, exists & Int32(g % 2 == 0), [word])
    offset = common.scale_offset(Uint32(token), Uint32(column // 16 + g // 4), Uint32(columns // 16))
    store_if("u8", c_scales + offset, exists & Int32(g % 4 == 0), [byte])


def apply_alpha_post(y: Any, post: Any, has_post: Any) -> Any:
    """y · post where alpha_post is given, exactly 0 where it is exactly 0, y where there is none."""
    return pr.inline_ptx_hl(
        "{ .reg .pred h, z; .reg .f32 m; setp.ne.b32 h, {$r2}, 0; setp.eq.f32 z, {$r1}, 0f00000000; mul.rn.f32 m, {$r0}, {$r1};"
        " selp.f32 m, 0f00000000, m, z; selp.f32 {$w0}, m, {$r0}, h; }",
        write_only_types=[Float32],
        read_only_args=[y, post, has_post],
    )


def select(condition: Any, if_true: Any, if_false: Any) -> Any:
    """``if_true`` where ``condition`` is not 0, else ``if_false``, both 32-bit."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r0}, 0; selp.b32 {$w0}, {$r1}, {$r2}, p; }",
        write_only_types=[type(if_true)],
        read_only_args=[condition, if_true, if_false],
    )
