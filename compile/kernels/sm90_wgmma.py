"""What the sm_90a kernels of 256 weight rows a CTA share: weights decoded in registers, tokens in shared memory, ``wgmma`` or ``mma.sync``.

    tokens   global ──cp.async (or through registers), sm90_wgmma_tokens──────────────► stage ──────────────── B ┐
    weights  global ──cp.async.bulk──► ring ──ld.shared──► codes, scales ──and/shift, mul.bf16x2──► registers ── A ┴─► wgmma m64nNk16, or mma.sync

A CTA multiplies 256 weight rows, four superblock rows, by up to ``tile_m`` tokens of one expert; weights are decoded once for all of them. Warp w
of a warpgroup owns superblock row w: its m16 block b is rows 16w … 16w + 15 of the m64 of one ``wgmma``, so a lane ends with the accumulators that
``mma.sync`` m16n8k16 gives it, and superblocks, decoding and epilogues are those of ``sm90_common``. Up to 64 tokens one warpgroup takes all four
m16 blocks; beyond, two warpgroups take two each, since accumulators are 160 registers a lane at most.

Up to 16 tokens each warp multiplies by itself: a ``wgmma`` takes as long for 8 tokens as for 24, makes four warps wait for one another eight times a
K 128, and wants its tokens permuted by words, which costs a copy of four bytes each (docs/tried.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_workspace as workspace
from densemoe.compile.kernels.sm90_wgmma_config import ROW_BYTES, TABLE_SLOTS, TOKEN_STRIDE, WARPGROUP_WARPS, Config
from densemoe.compile.kernels.sm90_wgmma_tokens import CHUNK, LANE_BYTES, SWIZZLE_ROWS

K16_BYTES: Final = 32
SPAN_WORDS: Final = 4  # what FC2 keeps of its span for the end, in sixteen bytes
DESCRIPTOR_UNIT: Final = 16  # bytes that a descriptor's fields count
SWIZZLE_128B: Final = 1 << 30  # in a descriptor's high word
STRIDE: Final = ROW_BYTES * SWIZZLE_ROWS // DESCRIPTOR_UNIT  # between groups of eight rows, in the high word
LEADING: Final = 1 << 16  # in the low word, unused under a swizzle
ADDRESS_MASK: Final = 0x3FFF


# ---- instructions


@dsl_user_op
def wgmma(accumulators: list[Any], a: list[Any], descriptor: Any, *, loc: Any = None, ip: Any = None) -> list[Any]:
    """One m64nNk16 step, A from registers; gives the accumulators, which stay in their registers (N / 2 a lane).

    The inputs are tied to the outputs: an accumulator that moved while the tensor core still adds to it would be lost.
    """
    count = len(accumulators)
    n = 2 * count
    d_names = ",".join(f"${i}" for i in range(count))
    a_names = ",".join(f"${count + i}" for i in range(4))
    text = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{d_names}}}, {{{a_names}}}, ${count + 4}, 1, 1, 1, 0;"
    constraints = ",".join(["=f"] * count + ["r"] * 4 + ["l"] + [str(i) for i in range(count)])
    operands = [x.ir_value(loc=loc, ip=ip) for x in (*a, descriptor, *accumulators)]
    return _tied(text, constraints, operands, count, loc, ip)


@dsl_user_op
def wait_for_products(accumulators: list[Any], *, loc: Any = None, ip: Any = None) -> list[Any]:
    """Waits for every ``wgmma`` and gives the accumulators as they are then: nothing that reads them can move before the wait."""
    count = len(accumulators)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    operands = [x.ir_value(loc=loc, ip=ip) for x in accumulators]
    return _tied("wgmma.wait_group.sync.aligned 0;", constraints, operands, count, loc, ip)


def _tied(text: str, constraints: str, operands: list[Any], count: int, loc: Any, ip: Any) -> list[Any]:
    """Inline PTX with ``count`` float32 results."""
    f32 = ir.F32Type.get()
    results = ir.Type.parse(f"!llvm.struct<({', '.join(['f32'] * count)})>")
    found = llvm.inline_asm(
        results, operands, text, constraints, has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip
    )
    return [Float32(llvm.extractvalue(f32, found, [i], loc=loc, ip=ip)) for i in range(count)]


def fence_to_async_proxy() -> None:
    """Makes this thread's stores to shared memory visible to the tensor core, once others have passed a barrier behind it."""
    pr.inline_ptx_hl("fence.proxy.async.shared::cta;")


# ---- tokens


def descriptor_low(address: Any) -> Any:
    """The low word of the ``wgmma`` descriptor of a K-major operand under the 128-byte swizzle, at a shared-memory address that is a multiple of
    1,024 and the same in every lane."""
    return cute.arch.make_warp_uniform(((address >> 4) & Int32(ADDRESS_MASK)) | Int32(LEADING))


def descriptor(low: Any) -> Any:
    """The descriptor of a low word."""
    return pr.inline_ptx_hl("mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Int64], read_only_args=[low, Int32(SWIZZLE_128B | STRIDE)])


def operand(config: Config, at: Any, lane: Any) -> Any:
    """What ``multiply_half`` reads the tokens of a stage at ``at`` by: ``descriptor_low``, or the address of the lane's first sixteen bytes."""
    return at + lane // 4 * TOKEN_STRIDE + lane % 4 * LANE_BYTES if config.warp_products else descriptor_low(at)


# ---- one superblock


def multiply_half(config: Config, accumulators: list[Any], stage: Any, first_block: Any, tokens: Any, n: int, half: int) -> list[Any]:
    """``accumulators`` with one K 64 half of a K 128 added; the last group of ``wgmma`` is still in flight then.

    Args:
        accumulators: float32 ``[m16 block][token block][4]``, flattened; for ``mma.sync`` ``[token block][m16 block][4]``, as in ``sm90_common``.
        stage: pointer to the lane's 16 bytes of the superblock's first chunk.
        first_block: m16 block that is the warp's first: 0, or 2 of the second warpgroup.
        tokens: ``operand`` of their stage.
        n: tokens that are multiplied.
    """
    accumulators = list(accumulators)
    if config.warp_products:
        return _multiply_half_alone(accumulators, stage, tokens, n, half)
    own = n // common.MMA_TOKENS * common.ACCUMULATORS  # registers of one m16 block
    scales = _scale_words(config, stage, first_block)
    offsets = [(half * config.half_bytes + step * K16_BYTES) // DESCRIPTOR_UNIT for step in range(common.K16_STEPS)]
    codes_at = stage + first_block * (common.K64_HALVES * common.CHUNK_BYTES)

    def codes_of(block: int) -> list[Any]:
        return common.shared_words(codes_at + (block * common.K64_HALVES + half) * common.CHUNK_BYTES)

    ahead = config.shape.warpgroups == 1  # two warpgroups have no registers for it
    if ahead:
        descriptors = [descriptor(tokens + offset) for offset in offsets]
        following = codes_of(0)
    for block in range(config.blocks):
        codes = following if ahead else codes_of(block)
        if ahead and block + 1 < config.blocks:
            following = codes_of(block + 1)  # under way while this block is decoded
        of_row, of_lower_row = (common.weight_scale(scales[block], 2 * half + row) for row in range(2))
        operands = []
        for first in range(0, common.K16_STEPS, 2):
            for decoded in common.decode_weights(*codes[first : first + 2]):
                operands.append([common.mul_bf16x2(decoded[i], of_lower_row if i % 2 else of_row) for i in range(4)])
        sums = accumulators[block * own : (block + 1) * own]
        pr.wgmma_fence_aligned()
        for step, a in enumerate(operands):
            sums = wgmma(sums, a, descriptors[step] if ahead else descriptor(tokens + offsets[step]))
        pr.wgmma_commit_group_sync_aligned()
        pr.wgmma_wait_group_sync_aligned(1)
        accumulators[block * own : (block + 1) * own] = sums
    return accumulators


def _multiply_half_alone(accumulators: list[Any], stage: Any, tokens: Any, n: int, half: int) -> list[Any]:
    """``multiply_half`` by ``mma.sync``."""
    codes = [common.shared_words(stage + (block * common.K64_HALVES + half) * common.CHUNK_BYTES) for block in range(common.M16_BLOCKS)]
    places = [tokens + column * common.MMA_TOKENS * TOKEN_STRIDE + half * ROW_BYTES for column in range(n // common.MMA_TOKENS)]
    fragments = [common.load_shared_v4(place) + common.load_shared_v4(place + CHUNK) for place in places]
    return common.multiply_half(accumulators, codes, common.superblock_scales(stage), half, fragments)


def _scale_words(config: Config, stage: Any, first_block: Any) -> list[Any]:
    """The scale word of each of the warp's m16 blocks."""
    at = stage + common.CODE_CHUNKS * common.CHUNK_BYTES
    if config.blocks == common.M16_BLOCKS:
        return common.shared_words(at)
    loaded = pr.load_ext(at + first_block * 4, dtype=Uint32, count=config.blocks)
    return [loaded[i] for i in range(config.blocks)]


def widened(config: Config, accumulators: list[Any], n: int) -> list[Any]:
    """Accumulators of ``n`` tokens as those of the whole tile, zeros beyond."""
    if config.warp_products:
        return [*accumulators, *common.zero_accumulators(config.accumulators - len(accumulators))]
    own, whole = (width // common.MMA_TOKENS * common.ACCUMULATORS for width in (n, config.tile_m))
    zeros = common.zero_accumulators(whole - own)
    return [each for block in range(config.blocks) for each in (*accumulators[block * own : (block + 1) * own], *zeros)]


def by_token_block(config: Config, accumulators: list[Any], n: int) -> list[Any]:
    """The accumulators as the epilogues of ``sm90_epilogue`` take them: ``[token block][m16 block][4]``."""
    if config.warp_products:
        return accumulators
    token_blocks = n // common.MMA_TOKENS
    return [
        accumulators[(block * token_blocks + column) * common.ACCUMULATORS + i]
        for column in range(token_blocks)
        for block in range(config.blocks)
        for i in range(common.ACCUMULATORS)
    ]


# ---- shared memory


@dataclass(frozen=True)
class Shared:
    """A CTA's shared arrays."""

    activations: Any
    ring: Any
    barriers: Any
    table: Any
    staged: Any
    peaks: Any
    span: Any


def shared_memory(config: Config) -> Shared:
    """Allocates the stages of tokens, the rings, their mbarriers, the table of rows, FC2's rows on their way, the peaks of ``fc1_pairs``, what
    FC2's ``hand_over`` says at the end, and what makes up ``shared_memory_bytes``."""
    space = cutlass.AddressSpace.smem
    stages = config.shape.weight_stages
    shared = Shared(
        cutlass.Array(cutlass.Uint8, activation_bytes(config), space=space, alignment=1024),
        cutlass.Array(cutlass.Uint8, WARPGROUP_WARPS * stages * common.SUPERBLOCK_BYTES, space=space, alignment=128),
        cutlass.Array(Int64, WARPGROUP_WARPS * stages, space=space, alignment=8),
        cutlass.Array(Int32, TABLE_SLOTS * config.table_words * config.tile_m, space=space, alignment=16),
        workspace.staged_rows(config.staged_rows, WARPGROUP_WARPS) if config.staged_rows else None,
        cutlass.Array(cutlass.Uint8, WARPGROUP_WARPS * peak_bytes(config), space=space, alignment=16) if peak_bytes(config) else None,
        cutlass.Array(Int32, SPAN_WORDS, space=space, alignment=16).data_ptr().toint(Int32) if config.op == "groupedfc2" else None,
    )
    unused = shared_memory_bytes(config) - used_bytes(config)
    if unused:
        cutlass.Array(cutlass.Uint8, unused, space=space, alignment=16)
    return shared


def activation_bytes(config: Config) -> int:
    """Bytes of the stages of tokens."""
    return config.activation_stages * config.stage_bytes


def peak_bytes(config: Config) -> int:
    """Bytes in which two warpgroups tell one another the largest magnitudes of FC1's outputs, of a superblock row."""
    return 2 * config.tile_m * 2 * 4 if config.op == "groupedfc1" and config.shape.warpgroups > 1 else 0


def shared_memory_bytes(config: Config) -> int:
    """Bytes that ``shared_memory`` allocates: those that are used, and for FC1 no fewer than for FC2 over the same tiles, whose CTAs take the places
    of FC1's one by one: a hole that is too small for them stays empty until its neighbour ends (up to 15 % of FC2, docs/tried.md)."""
    return max(used_bytes(config), used_bytes(replace(config, op="groupedfc2")))


def used_bytes(config: Config) -> int:
    """Bytes of ``shared_memory`` that a kernel uses."""
    rings = WARPGROUP_WARPS * config.shape.weight_stages * (common.SUPERBLOCK_BYTES + 8)
    table = TABLE_SLOTS * config.table_words * config.tile_m * 4
    warps = WARPGROUP_WARPS * (peak_bytes(config) + workspace.staged_bytes(config.staged_rows))
    span = SPAN_WORDS * 4 if config.op == "groupedfc2" else 0
    return activation_bytes(config) + rings + table + warps + span  # all are multiples of 16
