"""What the sm_90a kernels share: the weight ring, decoding NVFP4 to bf16, activation fragments, the tensor-core step.

One warp is a worker of its own. It streams its weights through a private ring of superblocks in shared memory, each superblock one bulk copy
that completes on an mbarrier, and keeps activations and accumulators in registers; warps never wait for one another.

    global ──cp.async.bulk──► ring[stage] ──ld.shared──► codes, scales ──and/shift, mul.bf16x2──► A fragment ┐
    global ──ld.global (predicated)──► activations ─────────────────────────────────────────► B fragment ┴─► mma.sync m16n8k16

Weights are the 16-row operand, tokens the 8 columns. A superblock is 64 weight rows x K 128 in the layout ``sm90a-superblock/2``
(docs/weight_layouts.md): lane (g, t) = (lane // 4, lane % 4) owns 16 consecutive bytes of each 512-byte chunk, so every access is one
128-bit load and K is permuted so that the lane's 16 values of a row share one scale.

Scaling: a decoded operand is its value times 2**-8 (contract section 6 makes the bf16 exact; the factor keeps e2m1's exponent trick in
range), so a product of NVFP4 weights and bf16 activations is 2**-8 of the true one, of NVFP4 and NVFP4 2**-16. Epilogues multiply back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import Expected
from densemoe.runtime.errors import VariantError
from densemoe.runtime.variant import DETERMINISTIC, ROUNDED, ROUTES, Variant

WEIGHT_LAYOUT = "sm90a-superblock/2"
SUPERBLOCK_ROWS = 64
SUPERBLOCK_K = 128
CHUNK_BYTES = 512  # 32 lanes x 16 bytes
CODE_CHUNKS = 8  # (m16 block, K 64 half) pairs, the half fastest
SUPERBLOCK_BYTES = (CODE_CHUNKS + 1) * CHUNK_BYTES  # the last chunk holds the scales
M16_BLOCKS = SUPERBLOCK_ROWS // 16
K64_HALVES = SUPERBLOCK_K // 64
K16_STEPS = 4  # MMA steps in a K 64 half
SCALE_TILE_BYTES = 512  # 128 rows x 4 scales of contract section 2: K 64 of a token further
MMA_TOKENS = 8  # columns of one m16n8k16
ACCUMULATORS = 4  # float32 registers a lane holds of one m16n8 tile
WARPS = 4
UNROLL = 2  # steps of a main loop in which two sets of activations take turns, so that loaded ones need not move from one to the other
TILES_M = (8, 16, 32)
GROUPED_TILES_M = (8, 16)  # rows of larger tiles come in K 64 order, which the kernels of 256 weight rows read
#: Superblocks in a warp's ring, by tile_m: where fewer warps are resident each keeps more bytes in flight.
STAGES = {8: 2, 16: 2, 32: 3}

EVICT_FIRST = 0x12F0000000000000  # L2 policy of weights: they are read once, and would drive out activations, lists and sums
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"  # of a superblock, as PTX spells it

SIGN_AND_MAGNITUDE = 0x81C081C0  # bits 15, 8, 7, 6 of both halves: an e2m1 value times 2**-126 as bf16
#: How a pair of code words is taken apart (docs/weight_layouts.md): rotated left by 0, 4 and 10 each word spells three of its four pairs of values.
MIDDLE, HIGH = 4, 10
LEFT_OVER = 0x06030603  # bits of the first word that none of them uses; the second word's, shifted left by 2, fit beside them
BESIDE = 2
LAST = (6, 12)  # and what both have left over spells, rotated left by these, the fourth pair of the first and of the second word
SCALE_BASE = 0x75807580  # with S0E5M3 of bias 10: the scale times 2**118 as bf16


@dataclass(frozen=True)
class Config:
    """Compile-time parameters of one sm_90a kernel.

    Attributes:
        tile_m: tokens of a tile.
        nvfp4_activations: activations are NVFP4 codes and scales instead of bf16.
        c_dtype: output dtype.
        prefetch: activations are loaded one superblock ahead, where registers allow.
        resident_ctas: CTAs meant to be resident on one SM.
        ordered: grouped FC2 adds in one order.
        rounded: FC1 writes NVFP4 output as the bf16 values that codes and scales stand for.
        routes: a grouped kernel sorts the router's choice itself (``sm90_lists``).
    """

    tile_m: int
    nvfp4_activations: bool
    c_dtype: str
    prefetch: bool
    resident_ctas: int
    ordered: bool = False
    rounded: bool = False
    routes: bool = False

    @property
    def token_blocks(self) -> int:
        """MMA column blocks of a tile."""
        return self.tile_m // MMA_TOKENS

    @property
    def codes(self) -> bool:
        """Whether FC1 writes codes and scales."""
        return self.c_dtype == "nvfp4" and not self.rounded

    @property
    def stages(self) -> int:
        """Superblocks in a warp's ring."""
        return STAGES[self.tile_m]

    @property
    def product_scale(self) -> float:
        """What an accumulator is multiplied by to undo the factors of the decoded operands."""
        return float(2**16 if self.nvfp4_activations else 2**8)


def config_of(variant: Variant, resident_ctas: Mapping[int, int], prefetch_up_to: int) -> Config:
    """The compile-time parameters of ``variant``, given a kernel's residency by tile_m and the largest tile_m that prefetches activations."""
    tile_m = variant.tile_m
    options = (bool(variant.option(name)) for name in (DETERMINISTIC, ROUNDED, ROUTES))
    return Config(tile_m, variant.a_dtype == "nvfp4", variant.c_dtype, tile_m <= prefetch_up_to, resident_ctas[tile_m], *options)


def check_tile(variant: Variant, tiles_m: Collection[int] = TILES_M, tile_n: int = SUPERBLOCK_ROWS, options: Collection[str] = ()) -> None:
    """Raises VariantError where the kernels of these tiles have no such tile, cluster or option; ``options``: switches that they have."""
    if variant.tile_m not in tiles_m or variant.tile_n != tile_n:
        allowed = ", ".join(f"{m}x{tile_n}" for m in tiles_m)
        raise VariantError(f"tile {variant.tile_m}x{variant.tile_n} of {variant.key}: the sm_90a kernels have {allowed}")
    if (variant.cluster_m, variant.cluster_n) != (1, 1):
        raise VariantError(f"cluster {variant.cluster_m}x{variant.cluster_n} of {variant.key}: the sm_90a kernels use no clusters; write 1x1")
    unknown = [name for name, value in variant.options if name not in options or value != 1]
    if unknown:
        raise VariantError(f"options {unknown} of {variant.key}: this kernel has {' and '.join(f'{each}: 1' for each in options) or 'none'}")


# ---- plain PTX where the primitives have no exact counterpart; outputs are write-only, which is the form that compiles right


def load_global_v4_if(address: Any, valid: Any) -> list[Any]:
    """Sixteen bytes as four words where ``valid`` is not 0, else zeros."""
    return list(
        pr.inline_ptx_hl(
            "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
            " @p ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}]; }",
            write_only_types=[Uint32] * 4,
            read_only_args=[address, valid],
        )
    )


def load_global_v2_if(address: Any, valid: Any) -> list[Any]:
    """Eight bytes as two words where ``valid`` is not 0, else zeros."""
    return list(
        pr.inline_ptx_hl(
            "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0;"
            " @p ld.global.v2.b32 {{$w0}, {$w1}}, [{$r0}]; }",
            write_only_types=[Uint32] * 2,
            read_only_args=[address, valid],
        )
    )


def load_global_u8_if(address: Any, valid: Any) -> Any:
    """One byte, zero-extended, where ``valid`` is not 0, else 0."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; @p ld.global.u8 {$w0}, [{$r0}]; }",
        write_only_types=[Uint32],
        read_only_args=[address, valid],
    )


def load_global_f32_if(address: Any, valid: Any) -> Any:
    """One float32 where ``valid`` is not 0, else 0."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; @p ld.global.f32 {$w0}, [{$r0}]; }",
        write_only_types=[Float32],
        read_only_args=[address, valid],
    )


def load_global_s32_or(address: Any, valid: Any, otherwise: Any) -> Any:
    """One 32-bit integer where ``valid`` is not 0, else ``otherwise``."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, {$r2}; @p ld.global.b32 {$w0}, [{$r0}]; }",
        write_only_types=[Int32],
        read_only_args=[address, valid, otherwise],
    )


def shuffle_from(value: Any, lane: Any) -> Any:
    """The value of a lane, whole warp."""
    return pr.inline_ptx_hl(
        "shfl.sync.idx.b32 {$w0}, {$r0}, {$r1}, 0x1f, 0xffffffff;", write_only_types=[type(value)], read_only_args=[value, lane]
    )


def differs_from_zero(value: Any) -> Any:
    """1 where a float32 is not 0, NaN included."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.neu.f32 p, {$r0}, 0f00000000; selp.b32 {$w0}, 1, 0, p; }", write_only_types=[Int32], read_only_args=[value]
    )


def store_shared_v4(address: Any, words: list[Any]) -> None:
    """Sixteen bytes to shared memory."""
    pr.inline_ptx_hl("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words])


def load_shared_v4(address: Any, dtype: Any = Uint32) -> list[Any]:
    """Sixteen bytes of shared memory as four values."""
    return list(pr.inline_ptx_hl("ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[dtype] * 4, read_only_args=[address]))


def store_shared_if(address: Any, valid: Any, word: Any) -> None:
    """Four bytes to shared memory where ``valid`` is not 0."""
    pr.inline_ptx_hl("{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; @p st.shared.b32 [{$r0}], {$r2}; }", read_only_args=[address, valid, word])


def load_shared(address: Any, dtype: Any = Int32) -> Any:
    """Four bytes of shared memory."""
    return pr.inline_ptx_hl("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[dtype], read_only_args=[address])


def k_blocks_of(length: Any) -> Any:
    """K 128 blocks of a K of so many elements, the last of which may be filled in part; unsigned, so that the division is a shift."""
    return Int32((Uint32(length) + (SUPERBLOCK_K - 1)) // SUPERBLOCK_K)


def listed_expert(active_experts: Any, listed: Any, place: Any) -> Any:
    """The expert at a place of ``[count, expert, expert, …]`` where ``listed`` is not 0, else ``place`` itself (contract section 5)."""
    return load_global_s32_or(active_experts + Int64(place + 1) * 4, listed, place)


def mul_bf16x2(a: Any, b: Any) -> Any:
    """Packed product, rounded once; exact for every operand pair decoded here."""
    return pr.inline_ptx_hl("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def mma_m16n8k16(accumulators: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
    """One tensor-core step: 16 weight rows x 8 tokens x K 16, bf16 operands, float32 accumulators."""
    return list(
        pr.inline_ptx_hl(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}},"
            " {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
            write_only_types=[Float32] * 4,
            read_only_args=[*a, *b, *accumulators],
        )
    )


# ---- decoding


def rotate_left(word: Any, count: int) -> Any:
    """``word`` rotated left."""
    return pr.inline_ptx_hl("shf.l.wrap.b32 {$w0}, {$r0}, {$r0}, %d;" % count, write_only_types=[Uint32], read_only_args=[word])


def select_bits(mask: int, a: Any, b: Any) -> Any:
    """Bits of ``a`` where ``mask`` has ones, of ``b`` where it has zeros."""
    return pr.inline_ptx_hl("lop3.b32 {$w0}, {$r0}, {$r1}, 0x%x, 0xe4;" % mask, write_only_types=[Uint32], read_only_args=[a, b])


def decode_weights(first: Any, second: Any) -> list[list[Any]]:
    """The four bf16x2 words that each of two neighbouring 32-bit words of a superblock's codes spells, every value times 2**-126."""
    mask = Uint32(SIGN_AND_MAGNITUDE)
    left_over = select_bits(LEFT_OVER, first, second << BESIDE)
    lasts = (left_over << LAST[0], rotate_left(left_over, LAST[1]))
    return [
        [word & mask, (word << MIDDLE) & mask, rotate_left(word, HIGH) & mask, last & mask]
        for word, last in zip((first, second), lasts, strict=True)
    ]


def weight_scale(word: Any, index: int) -> Any:
    """Byte ``index`` of a word of S0E5M3 scales as bf16x2, times 2**118: the byte in both halves, then 16 times it on top of the exponent's base."""
    halves = pr.inline_ptx_hl("prmt.b32 {$w0}, {$r0}, 0, 0x4%d4%d;" % (index, index), write_only_types=[Uint32], read_only_args=[word])
    return halves * Uint32(16) + Uint32(SCALE_BASE)


def decode_activation_pairs(word: Any) -> list[Any]:
    """Eight e2m1 codes of one word, low nibble first, as four bf16x2 words, each value times 2**-126."""
    pairs = []
    for index in range(4):
        byte = (word >> (8 * index)) & Uint32(0xFF) if index < 3 else word >> 24
        halves = byte | (byte << 12)  # low nibble in the low half, high nibble in the high half
        pairs.append(((halves << 12) & Uint32(0x80008000)) | ((halves << 6) & Uint32(0x01C001C0)))
    return pairs


def expand_activation_scale(byte: Any) -> Any:
    """An e4m3 scale byte as bf16x2, times 2**118: exact, and NaN stays NaN."""
    return pr.inline_ptx_hl(
        "{ .reg .b16 s, l, h; .reg .b32 d; .reg .f32 f; cvt.u16.u32 s, {$r0}; cvt.rn.f16x2.e4m3x2 d, s; mov.b32 {l, h}, d;"
        " cvt.f32.f16 f, l; mul.rn.f32 f, f, 0f7A800000; cvt.rn.bf16x2.f32 {$w0}, f, f; }",
        write_only_types=[Uint32],
        read_only_args=[byte],
    )


# ---- activations


def scale_offset(row: Any, column: Any, columns: Any) -> Any:
    """Byte offset of scale (row, column) in the 128x4 tiled order of contract section 2; ``columns`` is C, a multiple of 4."""
    inside = (row % Uint32(32)) * 16 + ((row // Uint32(32)) % Uint32(4)) * 4 + column % Uint32(4)
    tile = Int64(row // Uint32(128)) * Int64(columns // Uint32(4)) + Int64(column // Uint32(4))
    return tile * 512 + Int64(inside)


def lane_sources(config: Config, a: Any, a_scales: Any, tokens: list[Any], base: Any, k_total: Any, t: Any) -> list[tuple[Any, Any]]:
    """For each token block the addresses that ``load_half`` counts from: of the lane's first activations of K block 0, and of their scale.

    Args:
        tokens: this lane's token in each token block; base: first k of the range that K blocks are counted in, a multiple of 64.
    """
    sources = []
    for token in tokens:
        first = Int64(token) * Int64(k_total) + Int64(base + t * 16)
        if config.nvfp4_activations:
            scale = a_scales + scale_offset(Uint32(token), Uint32(base // 16 + t), Uint32(k_total // 16))
            sources.append((a + (first >> 1), scale))
        else:
            sources.append((a + first * 2, a))
    return sources


def load_half(config: Config, sources: list[tuple[Any, Any]], exists: list[Any], k_block: Any, half: int, k_end: Any) -> list[list[Any]]:
    """What one lane needs of the activations of one K 64 half of a K block, as stored: loads only, so that they may fly while others are used.

    Args:
        sources: of ``lane_sources``.
        exists: 1 where the lane's token of a block exists and the K block lies inside; what does not is not read and counts as 0, nor is the
            second half of a K block that ends behind ``k_end``.

    Returns:
        For each token block eight bf16x2 words, or two words of codes and a scale byte: the lane owns k 16t … 16t+15 of the half.
    """
    inside = Int32(k_block * SUPERBLOCK_K + 64 < k_end) if half else None
    loaded = []
    for (address, scale), each in zip(sources, exists, strict=True):
        valid = each if inside is None else each & inside
        if config.nvfp4_activations:
            codes = address + (Int64(k_block) * (SUPERBLOCK_K // 2) + half * 32)
            byte = scale + (Int64(k_block) * (2 * SCALE_TILE_BYTES) + half * SCALE_TILE_BYTES)
            loaded.append([*load_global_v2_if(codes, valid), load_global_u8_if(byte, valid)])
        else:
            words = address + (Int64(k_block) * (SUPERBLOCK_K * 2) + half * 128)
            loaded.append(load_global_v4_if(words, valid) + load_global_v4_if(words + 16, valid))
    return loaded


def activation_fragments(config: Config, loaded: list[list[Any]]) -> list[list[Any]]:
    """B fragments of what ``load_half`` loaded: for each token block eight bf16x2 words; step s uses words 2s and 2s+1."""
    if not config.nvfp4_activations:
        return loaded
    fragments = []
    for low, high, scale in loaded:
        factor = expand_activation_scale(scale)
        fragments.append([mul_bf16x2(pair, factor) for word in (low, high) for pair in decode_activation_pairs(word)])
    return fragments


# ---- one superblock


def multiply_half(accumulators: list[Any], codes: list[Any], scales: Any, half: int, fragments: list[list[Any]]) -> list[Any]:
    """``accumulators`` with one K 64 half of a superblock added: a new list, since the tracer does not see changes inside a caller's.

    Args:
        accumulators: float32 ``[token block][m16 block][4]``, flattened.
        codes: for each m16 block the lane's four code words of this half.
        scales: the lane's four scale words: word b holds (half 0: row g, row g+8; half 1: row g, row g+8) of m16 block b.
        fragments: ``activation_fragments`` of this half.
    """
    accumulators = list(accumulators)
    row_scales = [tuple(weight_scale(scales[block], 2 * half + row) for row in range(2)) for block in range(M16_BLOCKS)]
    for first in range(0, K16_STEPS, 2):
        for block in range(M16_BLOCKS):
            upper, lower = row_scales[block]
            for step, decoded in enumerate(decode_weights(*codes[block][first : first + 2]), first):
                a = [mul_bf16x2(decoded[i], lower if i % 2 else upper) for i in range(4)]
                for column, fragment in enumerate(fragments):
                    at = (column * M16_BLOCKS + block) * ACCUMULATORS
                    accumulators[at : at + ACCUMULATORS] = mma_m16n8k16(
                        accumulators[at : at + ACCUMULATORS], a, fragment[2 * step : 2 * step + 2]
                    )
    return accumulators


def shared_words(pointer: Any) -> list[Any]:
    """Sixteen bytes of shared memory as four words."""
    loaded = pr.load_ext(pointer, dtype=Uint32, count=4)
    return [loaded[i] for i in range(4)]


def superblock_scales(stage: Any) -> list[Any]:
    """The lane's four scale words of a superblock in shared memory; ``stage`` as in ``multiply_superblock``."""
    return shared_words(stage + CODE_CHUNKS * CHUNK_BYTES)


def multiply_stage_half(config: Config, accumulators: list[Any], stage: Any, scales: list[Any], half: int, loaded: list[list[Any]]) -> list[Any]:
    """``accumulators`` with one K 64 half of a superblock in shared memory added; ``loaded``: what ``load_half`` gave of it."""
    codes = [shared_words(stage + (block * K64_HALVES + half) * CHUNK_BYTES) for block in range(M16_BLOCKS)]
    return multiply_half(accumulators, codes, scales, half, activation_fragments(config, loaded))


def multiply_superblock(config: Config, accumulators: list[Any], stage: Any, loaded: list[list[list[Any]]]) -> list[Any]:
    """``accumulators`` with one superblock in shared memory added.

    Args:
        stage: pointer to the lane's 16 bytes of the superblock's first chunk.
        loaded: for each K 64 half what ``load_half`` gave.
    """
    scales = superblock_scales(stage)
    for half in range(K64_HALVES):
        accumulators = multiply_stage_half(config, accumulators, stage, scales, half, loaded[half])
    return accumulators


@cute.jit
def wait(barrier, phase):
    """Until a stage's copy is there."""
    while not pr.mbarrier_try_wait_parity(barrier, phase, time_limit=10_000_000):
        pass


def start_copy(ring: Any, barriers: Any, stage: Any, source: Any) -> None:
    """One lane: expects a superblock on the stage's mbarrier and starts its bulk copy."""
    barrier = barriers.subview(stage)
    pr.mbarrier_arrive_expect_tx(barrier, SUPERBLOCK_BYTES)
    pr.cp_async_bulk_shared_cluster_global(
        ring.subview(stage * SUPERBLOCK_BYTES), source, barrier, SUPERBLOCK_BYTES, l2_cache_hint=EVICT_FIRST
    )  # fmt: skip


def prefetch_superblock(source: Any) -> None:
    """Brings a superblock to the L2: one lane."""
    pr.cp_async_bulk_prefetch(source, SUPERBLOCK_BYTES)


def moved(halves: list[list[list[Any]]]) -> list[list[list[Any]]]:
    """The same words in other registers, moved exactly here: the compiler would move them before a branch, where most paths have no use for it."""
    move = lambda word: pr.inline_ptx_hl("mov.b32 {$w0}, {$r0};", write_only_types=[type(word)], read_only_args=[word])  # noqa: E731
    return [[[move(word) for word in block] for block in half] for half in halves]


def prefetch_lines(address: Any, index: Any, nbytes: Any) -> None:
    """Brings the ``index``-th 128-byte line of ``nbytes`` bytes to the L2, where there is one."""
    pr.inline_ptx_hl(
        "{ .reg .pred p; setp.lt.s32 p, {$r1}, {$r2}; @p prefetch.global.L2 [{$r0}]; }",
        read_only_args=[address + Int64(index) * 128, index * 128, nbytes],
    )


def lane_zero(lane: Any) -> Any:
    """0, which the compiler takes for another number in every lane: what is loaded from an address with it added stays in registers of the lanes,
    where a load is waited for at its first use; it would be waited for at once to be moved to a uniform register."""
    return Int64(lane - cute.arch.lane_idx())


def zero_accumulators(count: int) -> list[Any]:
    """``count`` float32 zeros."""
    return [Float32(0.0) for _ in range(count)]


def lane_tokens(config: Config, first: Any, row: Any, limit: Any) -> tuple[list[Any], list[Any]]:
    """For each token block the token whose activations this lane loads, and 1 where it is below ``limit`` (else 0)."""
    tokens = [first + (block * MMA_TOKENS + row) for block in range(config.token_blocks)]
    return tokens, [Int32(token < limit) for token in tokens]


def shared_memory(config: Config) -> tuple[Any, Any]:
    """Every warp's ring and mbarriers, as two shared arrays."""
    ring = cutlass.Array(cutlass.Uint8, WARPS * config.stages * SUPERBLOCK_BYTES, space=cutlass.AddressSpace.smem, alignment=128)
    barriers = cutlass.Array(Int64, WARPS * config.stages, space=cutlass.AddressSpace.smem, alignment=8)
    return ring, barriers


def shared_memory_bytes(config: Config) -> int:
    """Bytes that ``shared_memory`` allocates."""
    return WARPS * config.stages * (SUPERBLOCK_BYTES + 8)


def expected(config: Config, unroll: int) -> Expected:
    """What the audit must find in the PTX of a kernel whose main loop has ``unroll`` steps, a superblock each."""
    products = K64_HALVES * K16_STEPS * M16_BLOCKS * config.token_blocks
    return Expected(
        ptx_counts={
            MMA: products * unroll,
            COPY: config.stages + unroll,  # one per ring stage before the loop, one to refill in each step of it
        },
        max_registers=65536 // (WARPS * 32 * config.resident_ctas),
    )
