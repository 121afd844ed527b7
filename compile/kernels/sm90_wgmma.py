"""What the sm_90a kernels for many tokens share: tokens in swizzled shared memory, weights decoded in registers, ``wgmma``.

    tokens   global ──cp.async, K permuted, 128-byte swizzle (or through registers)─────► stage ──────────────── B ┐
    weights  global ──cp.async.bulk──► ring ──ld.shared──► codes, scales ──and/shift, mul.bf16x2──► registers ── A ┴─► wgmma m64nNk16

A CTA multiplies 256 weight rows, four superblock rows, by up to ``tile_m`` tokens of one expert. Warp w of a warpgroup owns superblock row w: its
m16 block b is rows 16w … 16w + 15 of the m64 of one ``wgmma``, so a lane ends with the accumulators that ``mma.sync`` m16n8k16 would give it, and
superblocks, decoding and epilogues are those of ``sm90_common``. Up to 64 tokens one warpgroup takes all four m16 blocks; for 128, two warpgroups
take two each, since accumulators are 128 registers a lane at most.

bf16 tokens of up to 64 rows are copied by four-byte ``cp.async``, since K is permuted by words; NVFP4 ones are decoded in registers, and those of 128
rows go through them too.

Weights are decoded once for all tokens of the tile. The activations of a K 128 are two K 64 halves of ``tile_m`` rows of 128 bytes. Inside a half K
is permuted as in the weights' lanes: 16-byte chunk 2s + c of a row, word t, is logical word 8t + 2s + c, so that k16 step s reads chunks 2s, 2s + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from densemoe.runtime.errors import VariantError
from densemoe.runtime.variant import Variant

WARPGROUP_WARPS: Final = 4
GROUP_ROWS: Final = WARPGROUP_WARPS * common.SUPERBLOCK_ROWS  # weight rows of a CTA's unit
ROW_BYTES: Final = 128  # of a token in a K 64 half
SWIZZLE_ROWS: Final = 8  # the 128-byte swizzle repeats after so many rows
K16_BYTES: Final = 32
CHUNK: Final = 16  # bytes that the swizzle moves as one
DESCRIPTOR_UNIT: Final = 16  # bytes that a descriptor's fields count
SWIZZLE_128B: Final = 1 << 30  # in a descriptor's high word
STRIDE: Final = ROW_BYTES * SWIZZLE_ROWS // DESCRIPTOR_UNIT  # between groups of eight rows, in the high word
LEADING: Final = 1 << 16  # in the low word, unused under a swizzle
ADDRESS_MASK: Final = 0x3FFF
LARGEST_PORTION: Final = 4  # pieces of 16 bytes that a thread has on their way beside 128 accumulators
TABLE_SLOTS: Final = 3  # tiles whose rows stand in shared memory: the one that is multiplied, the one that is loaded, the next


@dataclass(frozen=True)
class Shape:
    """What was measured best for a tile (an H200, CUDA C++ trial), by tile_m.

    Attributes:
        warpgroups: of a CTA.
        weight_stages: superblocks in the ring of a superblock row.
        resident_ctas: CTAs meant to be resident on one SM.
        widths: columns of ``wgmma`` that the kernel has a loop for, ascending: a tile takes the smallest that holds its rows.
    """

    warpgroups: int
    weight_stages: int
    resident_ctas: int
    widths: tuple[int, ...]


SHAPES: Final = {
    16: Shape(1, 2, 4, (16,)),
    32: Shape(1, 2, 3, (24, 32)),
    64: Shape(1, 3, 2, (32, 48, 64)),
    128: Shape(2, 3, 1, (64, 128)),
}
#: (op, tile_m, activations, outputs, widths): kernels that would spill with those of the shape, or gain nothing by them; "" stands for each.
OTHER_WIDTHS: Final = (
    ("groupedfc1", 64, "", "nvfp4", (32, 64)),
    ("groupedfc1", 128, "", "nvfp4", (128,)),
    ("groupedfc2", 64, "", "", (40, 64)),
)
STAGED_ROWS: Final = {16: 4, 32: 8, 64: 8, 128: 0}  # two warpgroups have half of a row each
LARGEST_COPIED: Final = 64  # tile_m up to which bf16 tokens are copied past the registers; beyond, copies of four bytes cost more than they save
#: K 128 blocks of tokens in shared memory: a block is overwritten while one group of the block before may still be read.
ACTIVATION_STAGES: Final = 3


@dataclass(frozen=True)
class Config:
    """Compile-time parameters of one kernel.

    Attributes:
        op: ``groupedfc1`` or ``groupedfc2``.
        tile_m: tokens of a tile.
        nvfp4_activations: activations are NVFP4 codes and scales instead of bf16.
        c_dtype: output dtype.
    """

    op: str
    tile_m: int
    nvfp4_activations: bool
    c_dtype: str

    @property
    def shape(self) -> Shape:
        """Warpgroups, stages and residency."""
        return SHAPES[self.tile_m]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of ``wgmma`` that the kernel has a loop for: those of the shape, or of OTHER_WIDTHS."""
        for op, tile_m, activations, outputs, other in OTHER_WIDTHS:
            if (op, tile_m) == (self.op, self.tile_m) and activations in ("", self.activations) and outputs in ("", self.c_dtype):
                return other
        return self.shape.widths

    @property
    def staged_rows(self) -> int:
        """Rows that a warp of FC2 hands through shared memory at a time (``sm90_workspace``), as that has room; 0: adds them from its registers."""
        return STAGED_ROWS[self.tile_m] if self.op == "groupedfc2" else 0

    @property
    def activations(self) -> str:
        """Their dtype."""
        return "nvfp4" if self.nvfp4_activations else "bf16"

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.shape.warpgroups * WARPGROUP_WARPS

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warps * 32

    @property
    def blocks(self) -> int:
        """m16 blocks of a superblock that one warp multiplies."""
        return common.M16_BLOCKS // self.shape.warpgroups

    @property
    def token_blocks(self) -> int:
        """Columns of eight tokens."""
        return self.tile_m // common.MMA_TOKENS

    @property
    def accumulators(self) -> int:
        """float32 registers of a lane's accumulators: ``[m16 block][token block][4]``."""
        return self.blocks * self.token_blocks * common.ACCUMULATORS

    @property
    def product_scale(self) -> float:
        """What an accumulator is multiplied by to undo the factors of the decoded operands."""
        return float(2**16 if self.nvfp4_activations else 2**8)

    @property
    def half_bytes(self) -> int:
        """Shared memory of a K 64 half of the tile's tokens."""
        return self.tile_m * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a K 128 of the tile's tokens."""
        return self.half_bytes * common.K64_HALVES

    @property
    def rows_a_thread(self) -> int:
        """Rows of which a thread brings one piece: 16 bytes of bf16, or a group of 16 codes of one half."""
        pieces = self.tile_m * (8 if self.nvfp4_activations else 16)
        return pieces // self.threads

    @property
    def copies_tokens(self) -> bool:
        """Whether tokens go from global to shared memory past the registers."""
        return not self.nvfp4_activations and self.tile_m <= LARGEST_COPIED

    @property
    def rows_a_warp(self) -> int:
        """Rows that a warp copies."""
        return self.tile_m // self.warps

    @property
    def portions(self) -> int:
        """Parts in which a thread brings its rows of a K 128, one a K 64 half of the block before: what is on its way lies in registers."""
        return 2 if not self.nvfp4_activations and self.rows_a_thread > LARGEST_PORTION else 1

    @property
    def table_words(self) -> int:
        """Words of a row in the table of rows: its token, and for FC2 its alpha."""
        return 2 if self.op == "groupedfc2" else 1


def config_of(variant: Variant) -> Config:
    """The compile-time parameters of ``variant``."""
    return Config(variant.op, variant.tile_m, variant.a_dtype == "nvfp4", variant.c_dtype)


def check_tile(variant: Variant) -> None:
    """Raises VariantError where the family has no such tile, cluster or option."""
    if variant.tile_m not in SHAPES or variant.tile_n != GROUP_ROWS:
        allowed = ", ".join(f"{m}x{GROUP_ROWS}" for m in SHAPES)
        raise VariantError(f"tile {variant.tile_m}x{variant.tile_n} of {variant.key}: the sm_90a WGMMA kernels have {allowed}")
    if (variant.cluster_m, variant.cluster_n) != (1, 1):
        raise VariantError(f"cluster {variant.cluster_m}x{variant.cluster_n} of {variant.key}: the sm_90a kernels use no clusters; write 1x1")
    if variant.options:
        raise VariantError(f"options {[name for name, _ in variant.options]} of {variant.key}: this kernel has none")


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


# ---- activations


def thread_place(config: Config, tid: Any) -> tuple[Any, Any, Any]:
    """(first row, row step, piece) of a thread: it brings piece ``piece`` of ``rows_a_thread`` rows, which are ``row step`` apart.

    The row step is a multiple of 8, so that all of a thread's rows have the same swizzle. A piece of bf16 is the 16-byte chunk of the K 128; of
    NVFP4 it is 4·half + group, such that a warp's rows are eight and its half is one: no two lanes then store to one bank.
    """
    if config.nvfp4_activations:
        task = tid // 32
        return (task // 2) * 8 + (tid % 32) // 4, config.warps // 2 * 8, (task % 2) * 4 + tid % 4
    return tid // 16, config.threads // 16, tid % 16


def load_pieces(config: Config, a: Any, a_scales: Any, tokens: list[Any], k_block: Any, k_total: Any, piece: Any) -> list[Any]:
    """A thread's pieces of one K 128, as stored: loads only, so that they may fly while the block before is multiplied.

    Args:
        a: bf16 ``[rows, k_total]``, or codes ``[rows, k_total / 2]``; a_scales: tiled scales of the codes.
        tokens: the activation row of each piece, negative where there is none: it counts as 0 and is not read.
        piece: of the K 128 (``thread_place``).

    Returns:
        For each row four words, or two words of codes and a scale byte.
    """
    words: list[Any] = []
    column = k_block * common.SUPERBLOCK_K + piece * (16 if config.nvfp4_activations else 8)
    inside = Int32(column < k_total)
    if config.nvfp4_activations:
        codes = a + Int64(column) // 2
        for token in tokens:
            valid = Int32(token >= 0) & inside
            scale = a_scales + common.scale_offset(Uint32(token), Uint32(column // 16), Uint32(k_total // 16))
            words += [*common.load_global_v2_if(codes + Int64(token) * Int64(k_total // 2), valid), common.load_global_u8_if(scale, valid)]
    else:
        values = a + Int64(column) * 2
        for token in tokens:
            words += common.load_global_v4_if(values + Int64(token) * Int64(k_total * 2), Int32(token >= 0) & inside)
    return words


def rows_of_portion(config: Config, portion: int) -> range:
    """Which of a thread's rows a portion has."""
    count = config.rows_a_thread // config.portions
    return range(portion * count, (portion + 1) * count)


def store_pieces(config: Config, stage: Any, row: Any, step: int, piece: Any, words: list[Any], portion: int) -> None:
    """Stores what ``load_pieces`` gave for a portion at its permuted and swizzled place.

    Args:
        stage: shared-memory address of the K 128's first half.
        row, step, piece: of ``thread_place``.
    """
    swizzle = row % SWIZZLE_ROWS
    each = 3 if config.nvfp4_activations else 4
    for position, index in enumerate(rows_of_portion(config, portion)):
        own = words[position * each : (position + 1) * each]
        if config.nvfp4_activations:
            low, high, scale = own
            factor = common.expand_activation_scale(scale)
            decoded = [common.mul_bf16x2(pair, factor) for word in (low, high) for pair in common.decode_activation_pairs(word)]
            base = stage + (piece // 4) * config.half_bytes + row * ROW_BYTES + (piece % 4) * 4
            places = [(base + ((swizzle ^ chunk) * CHUNK), word) for chunk, word in enumerate(decoded)]
        else:
            inside = piece % 8  # 16-byte chunk of the half: words 8t + 4·(inside % 2) + w, t = inside // 2
            base = stage + (piece // 8) * config.half_bytes + row * ROW_BYTES + (inside // 2) * 4
            places = [(base + ((swizzle ^ ((inside % 2) * 4 + w)) * CHUNK), word) for w, word in enumerate(own)]
        for address, word in places:
            common.store_shared(address + index * step * ROW_BYTES, word)


def copy_tokens(config: Config, a: Any, tokens: list[Any], k_block: Any, k_total: Any, stage: Any, warp: Any, lane: Any) -> None:
    """Starts the copies of a K 128 of a warp's rows of bf16 activations: row ``warp``, and every ``config.warps``-th behind it.

    A lane copies words ``lane`` of both halves: neighbours in global memory, and in shared memory in 32 banks.

    Args:
        a: bf16 ``[rows, k_total]``; tokens: the activation row of each, negative where there is none: it becomes zeros, as what lies behind K does.
        stage: shared-memory address of the K 128's first half.
    """
    column = k_block * common.SUPERBLOCK_K + lane * 2
    values = a + Int64(column) * 2
    inside = [Int32(column + half * 64 < k_total) * 4 for half in range(common.K64_HALVES)]
    chunk = (lane % 8) ^ (warp % SWIZZLE_ROWS)
    place = stage + warp * ROW_BYTES + (lane // 8) * 4
    for index, token in enumerate(tokens):
        first = index * config.warps
        at = place + (chunk ^ (first % SWIZZLE_ROWS)) * CHUNK + first * ROW_BYTES
        exists = (token >> 31) ^ -1  # all bits, or none: then nothing is read, wherever the address points
        source = values + Int64(token) * Int64(k_total * 2)
        for half in range(common.K64_HALVES):
            pr.inline_ptx_hl(
                "cp.async.ca.shared.global [{$r0}], [{$r1}], 4, {$r2};",
                read_only_args=[at + half * config.half_bytes, source + half * ROW_BYTES, inside[half] & exists],
            )
    pr.inline_ptx_hl("cp.async.commit_group;")


def wait_for_tokens() -> None:
    """Waits for the thread's own copies of ``copy_tokens``; the fence and the barrier behind it make them known to the tensor core."""
    pr.inline_ptx_hl("cp.async.wait_group 0;")


def descriptor_low(address: Any) -> Any:
    """The low word of the ``wgmma`` descriptor of a K-major operand under the 128-byte swizzle, at a shared-memory address that is a multiple of
    1,024 and the same in every lane."""
    return cute.arch.make_warp_uniform(((address >> 4) & Int32(ADDRESS_MASK)) | Int32(LEADING))


def descriptor(low: Any) -> Any:
    """The descriptor of a low word."""
    return pr.inline_ptx_hl("mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Int64], read_only_args=[low, Int32(SWIZZLE_128B | STRIDE)])


# ---- one superblock


def multiply_half(config: Config, accumulators: list[Any], stage: Any, first_block: Any, low: Any, n: int, half: int) -> list[Any]:
    """``accumulators`` with one K 64 half of a K 128 added; the last group of ``wgmma`` is still in flight then.

    Args:
        accumulators: float32 ``[m16 block][token block][4]``, flattened.
        stage: pointer to the lane's 16 bytes of the superblock's first chunk.
        first_block: m16 block that is the warp's first: 0, or 2 of the second warpgroup.
        low: ``descriptor_low`` of the tokens' first half.
        n: tokens that are multiplied.
    """
    accumulators = list(accumulators)
    own = n // common.MMA_TOKENS * common.ACCUMULATORS  # registers of one m16 block
    scales = _scale_words(config, stage, first_block)
    codes_at = stage + first_block * (common.K64_HALVES * common.CHUNK_BYTES)
    for block in range(config.blocks):
        codes = common.shared_words(codes_at + (block * common.K64_HALVES + half) * common.CHUNK_BYTES)
        of_row, of_lower_row = (common.weight_scale(scales[block], 2 * half + row) for row in range(2))
        operands = []
        for first in range(0, common.K16_STEPS, 2):
            for decoded in common.decode_weights(*codes[first : first + 2]):
                operands.append([common.mul_bf16x2(decoded[i], of_lower_row if i % 2 else of_row) for i in range(4)])
        sums = accumulators[block * own : (block + 1) * own]
        pr.wgmma_fence_aligned()
        for step, a in enumerate(operands):
            offset = (half * config.half_bytes + step * K16_BYTES) // DESCRIPTOR_UNIT
            sums = wgmma(sums, a, descriptor(low + offset))
        pr.wgmma_commit_group_sync_aligned()
        pr.wgmma_wait_group_sync_aligned(1)
        accumulators[block * own : (block + 1) * own] = sums
    return accumulators


def _scale_words(config: Config, stage: Any, first_block: Any) -> list[Any]:
    """The scale word of each of the warp's m16 blocks."""
    at = stage + common.CODE_CHUNKS * common.CHUNK_BYTES
    if config.blocks == common.M16_BLOCKS:
        return common.shared_words(at)
    loaded = pr.load_ext(at + first_block * 4, dtype=Uint32, count=config.blocks)
    return [loaded[i] for i in range(config.blocks)]


def widened(config: Config, accumulators: list[Any], n: int) -> list[Any]:
    """Accumulators of ``n`` tokens as those of the whole tile, zeros beyond."""
    own, whole = (width // common.MMA_TOKENS * common.ACCUMULATORS for width in (n, config.tile_m))
    zeros = common.zero_accumulators(whole - own)
    return [each for block in range(config.blocks) for each in (*accumulators[block * own : (block + 1) * own], *zeros)]


def by_token_block(config: Config, accumulators: list[Any], n: int) -> list[Any]:
    """The accumulators as the epilogues of ``sm90_epilogue`` take them: ``[token block][m16 block][4]``."""
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


def shared_memory(config: Config) -> Shared:
    """Allocates the stages of tokens, the rings, their mbarriers, the table of rows, FC2's rows on their way, the peaks of ``fc1_pairs``."""
    space = cutlass.AddressSpace.smem
    stages = config.shape.weight_stages
    return Shared(
        cutlass.Array(cutlass.Uint8, activation_bytes(config), space=space, alignment=1024),
        cutlass.Array(cutlass.Uint8, WARPGROUP_WARPS * stages * common.SUPERBLOCK_BYTES, space=space, alignment=128),
        cutlass.Array(Int64, WARPGROUP_WARPS * stages, space=space, alignment=8),
        cutlass.Array(Int32, TABLE_SLOTS * config.table_words * config.tile_m, space=space, alignment=16),
        workspace.staged_rows(config.staged_rows, WARPGROUP_WARPS) if config.staged_rows else None,
        cutlass.Array(cutlass.Uint8, WARPGROUP_WARPS * peak_bytes(config), space=space, alignment=16) if peak_bytes(config) else None,
    )


def activation_bytes(config: Config) -> int:
    """Bytes of the stages of tokens."""
    return ACTIVATION_STAGES * config.stage_bytes


def peak_bytes(config: Config) -> int:
    """Bytes in which two warpgroups tell one another the largest magnitudes of FC1's outputs, of a superblock row."""
    return 2 * config.tile_m * 2 * 4 if config.op == "groupedfc1" and config.shape.warpgroups > 1 else 0


def shared_memory_bytes(config: Config) -> int:
    """Bytes that ``shared_memory`` allocates."""
    rings = WARPGROUP_WARPS * config.shape.weight_stages * (common.SUPERBLOCK_BYTES + 8)
    table = TABLE_SLOTS * config.table_words * config.tile_m * 4
    warps = WARPGROUP_WARPS * (peak_bytes(config) + workspace.staged_bytes(config.staged_rows))
    return activation_bytes(config) + rings + table + warps  # all but the last are multiples of 16
