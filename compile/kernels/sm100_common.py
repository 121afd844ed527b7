"""What the tcgen05 kernels share: tile geometry, shared memory, tensor memory, loads, the block-scaled multiply.

A CTA is warp-specialised and persistent. One warp issues TMA copies, one issues tcgen05.mma, the rest are epilogues:

    global ──TMA──► ring of K 256 stages: A codes │ B codes │ A scales │ B scales        full[stage]: bytes arrived   empty[stage]: MMA has read
                        │                              │ tcgen05.cp
                        └────────► tcgen05.mma ◄───────┘ tensor memory: scale factors
                                       │
                          ring of accumulators in tensor memory      accumulator_full: MMA done   accumulator_empty[i]: epilogue has read
                                       │ tcgen05.ld
                                   epilogue warps ──► global

Activations are A, 128 rows (tokens) a CTA; weights are B. A tile of N = 256 is two MMAs of N = 128 into two accumulators, so that three
accumulators of 128 columns make a ring and MMA and epilogue overlap at every tile width. Operands are bytes to TMA: no 4-bit type is needed.

A tile of 256 tokens is a pair of CTAs (cta_group::2): each brings 128 rows of A, its half of the rows of B, the scales of its own A rows and all
of B's scales; the even CTA expects the bytes of both, multiplies for both and tells both. In a cluster the CTAs of one row of tiles share A and
those of one column share B: each loads its part and multicasts it. Tiles past the end of a tensor run the same loop on zeros that TMA fills in
and store nothing, so that a cluster never waits for an absent CTA.

Contract sections 2 (NVFP4 and scale order), 7 and 8. Emulated, never run on hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm100_device as device
from densemoe.runtime.errors import VariantError
from densemoe.runtime.variant import Variant

ARCHITECTURES: Final = ("sm_100a", "sm_100f", "sm_103a")
WEIGHT_LAYOUT: Final = "sm100-interchange/1"

CTA_ROWS: Final = 128  # tokens a CTA
K_TILE: Final = 256  # k of one stage: 128 bytes of codes, one row of the 128-byte swizzle
K_STEPS: Final = 4  # MMAs of K 64 in a K tile
CODE_ROW_BYTES: Final = K_TILE // 2
SCALE_ATOM_BYTES: Final = 512  # scales of 128 rows x K 64 (contract section 2)
SCALE_ATOM_WORDS: Final = SCALE_ATOM_BYTES // 2  # as TMA sees it: 16-bit elements, since a box has at most 256
SCALE_ATOMS: Final = K_STEPS  # of 128 rows in a K tile
SCALE_TILE_BYTES: Final = SCALE_ATOM_BYTES * SCALE_ATOMS
WIDEST_MMA: Final = 128  # columns of one accumulator
TMEM_COLUMNS: Final = device.TMEM_COLUMNS
SCALE_COLUMNS: Final = 16  # TMEM columns of the scales of 128 rows x K 256: 4 an atom
LARGEST_SMEM: Final = device.LARGEST_SMEM
BARRIER_BYTES: Final = 8
TMEM_SPACE: Final = 6  # the address space of tensor-memory pointers
LANES_SHIFT: Final = 16  # a tensor-memory address is lane << 16 | column
EPILOGUE_WARPS: Final = 4  # a group: warp w reads lanes 32w … 32w + 31
WARP: Final = 32
WAIT_HINT: Final = 10_000_000  # nanoseconds that one try_wait may suspend

#: Descriptor fields in units of 16 bytes. Operands are K-major under the 128-byte swizzle: 8 rows x 128 bytes are 1024 contiguous bytes.
K_STEP_UNITS: Final = K_TILE // 2 // K_STEPS // 16
SCALE_ATOM_UNITS: Final = SCALE_ATOM_BYTES // 16
SCALE_TILE_UNITS: Final = SCALE_TILE_BYTES // 16


@dataclass(frozen=True)
class Config:
    """Compile-time parameters of one tcgen05 kernel; every size that follows from them.

    Attributes:
        tile_m: tokens of a tile: 128, or 256 for a pair of CTAs.
        tile_n: weight rows of a tile.
        cluster_m, cluster_n: CTAs of a cluster along the tile axes.
        c_dtype: output dtype.
        epilogue_groups: groups of four epilogue warps.
    """

    tile_m: int
    tile_n: int
    cluster_m: int
    cluster_n: int
    c_dtype: str
    epilogue_groups: int

    @property
    def pair(self) -> int:
        """CTAs that work on one tile."""
        return self.tile_m // CTA_ROWS

    @property
    def pairs_m(self) -> int:
        """Tiles of a cluster along M."""
        return self.cluster_m // self.pair

    @property
    def cluster_size(self) -> int:
        """CTAs of a cluster."""
        return self.cluster_m * self.cluster_n

    @property
    def group(self) -> Any:
        """The cta_group of every tcgen05 instruction."""
        return pr.CTAGroup.CTA_2 if self.pair == 2 else pr.CTAGroup.CTA_1

    @property
    def columns(self) -> int:
        """Columns of one accumulator."""
        return min(self.tile_n, WIDEST_MMA)

    @property
    def halves(self) -> int:
        """Accumulators of one tile."""
        return self.tile_n // self.columns

    @property
    def b_rows(self) -> int:
        """Rows of B that a CTA holds for one accumulator."""
        return self.columns // self.pair

    @property
    def a_bytes(self) -> int:
        """A's codes in a stage of one CTA."""
        return CTA_ROWS * CODE_ROW_BYTES

    @property
    def b_half_bytes(self) -> int:
        """B's codes of one accumulator in a stage of one CTA."""
        return self.b_rows * CODE_ROW_BYTES

    @property
    def b_bytes(self) -> int:
        """B's codes in a stage of one CTA."""
        return self.halves * self.b_half_bytes

    @property
    def b_scale_bytes(self) -> int:
        """B's scales in a stage of one CTA: those of all tile_n rows."""
        return self.halves * SCALE_TILE_BYTES

    @property
    def stage_bytes(self) -> int:
        """Everything that one stage of one CTA holds."""
        return self.a_bytes + self.b_bytes + SCALE_TILE_BYTES + self.b_scale_bytes

    @property
    def weight_stage_bytes(self) -> int:
        """Bytes of weights, codes and scales, in a stage of one CTA."""
        return self.b_bytes + self.b_scale_bytes

    @property
    def accumulators(self) -> int:
        """Accumulators in the ring: as many as tensor memory holds beside the scales, at most four."""
        return min(4, (TMEM_COLUMNS - SCALE_COLUMNS * (1 + self.halves)) // self.columns)

    @property
    def stages(self) -> int:
        """Stages of the ring: what fits beside the barriers."""
        return (LARGEST_SMEM - self.fixed_bytes) // (self.stage_bytes + 2 * BARRIER_BYTES)

    @property
    def fixed_bytes(self) -> int:
        """Shared memory that does not grow with the stages: barriers of accumulators, and 16 bytes for the epilogues and TMEM's address."""
        return 2 * BARRIER_BYTES * self.accumulators + 16

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA."""
        return self.stages * (self.stage_bytes + 2 * BARRIER_BYTES) + self.fixed_bytes

    @property
    def tmem_columns_used(self) -> int:
        """Columns of tensor memory that hold something; all 512 are allocated."""
        return self.accumulators * self.columns + SCALE_COLUMNS * (1 + self.halves)

    @property
    def epilogue_warps(self) -> int:
        """Warps 0 … epilogue_warps - 1."""
        return self.epilogue_groups * EPILOGUE_WARPS

    @property
    def mma_warp(self) -> int:
        """The warp that issues tcgen05 instructions and owns the tensor memory."""
        return self.epilogue_warps

    @property
    def tma_warp(self) -> int:
        """The warp that issues copies."""
        return self.epilogue_warps + 1

    @property
    def moves_registers(self) -> bool:
        """Warps exchange registers: two epilogue groups need more than an equal share."""
        return self.epilogue_groups > 1

    @property
    def warps(self) -> int:
        """Warps of a CTA; whole groups of four where registers are exchanged, which is done by groups."""
        return self.epilogue_warps + (4 if self.moves_registers else 2)

    @property
    def releases(self) -> int:
        """Arrivals that empty a stage: every tile of the cluster that shares A or B with this one, itself included."""
        return self.cluster_n + self.pairs_m - 1


def check_tile(variant: Variant, tiles_n: tuple[int, ...]) -> None:
    """Raises VariantError where the tcgen05 kernels have no such tile or option.

    Args:
        tiles_n: the op's tile widths.
    """
    if variant.tile_m not in (CTA_ROWS, 2 * CTA_ROWS) or variant.tile_n not in tiles_n:
        allowed = ", ".join(f"{m}x{n}" for m in (CTA_ROWS, 2 * CTA_ROWS) for n in tiles_n)
        raise VariantError(f"tile {variant.tile_m}x{variant.tile_n} of {variant.key}: the tcgen05 {variant.op} kernel has {allowed}")
    if variant.options:
        raise VariantError(f"options {[name for name, _ in variant.options]} of {variant.key}: this kernel has none")


# ---- plain PTX where the primitives have no exact counterpart; outputs are write-only, which is the form that compiles right


def load_f32_if(address: Any, valid: Any) -> Any:
    """One float32 of global memory where ``valid`` is not 0, else 0."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, 0; @p ld.global.f32 {$w0}, [{$r0}]; }",
        write_only_types=[Float32],
        read_only_args=[address, valid],
    )


def load_i32_or(address: Any, valid: Any, otherwise: Any) -> Any:
    """One 32-bit word of global memory where ``valid`` is not 0, else ``otherwise``."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; mov.b32 {$w0}, {$r2}; @p ld.global.b32 {$w0}, [{$r0}]; }",
        write_only_types=[Int32],
        read_only_args=[address, valid, otherwise],
    )


def select(condition: Any, if_true: Any, if_false: Any) -> Any:
    """``if_true`` where ``condition`` is not 0, else ``if_false``, both 32-bit."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r0}, 0; selp.b32 {$w0}, {$r1}, {$r2}, p; }",
        write_only_types=[type(if_true)],
        read_only_args=[condition, if_true, if_false],
    )


def store_if(width: str, address: Any, valid: Any, words: list[Any]) -> None:
    """Stores ``words`` to global memory as one access of type ``width`` (``v8.b32``, ``b32`` …) where ``valid`` is not 0."""
    operands = ", ".join("{$r%d}" % (index + 2) for index in range(len(words)))
    value = "{%s}" % operands if len(words) > 1 else operands
    pr.inline_ptx_hl(
        "{ .reg .pred p; setp.ne.b32 p, {$r1}, 0; @p st.global." + width + " [{$r0}], " + value + "; }",
        read_only_args=[address, valid, *words],
    )


# ---- who a CTA is


@dataclass(frozen=True)
class Place:
    """Where a CTA stands in its cluster; ranks count from 0.

    Attributes:
        m_rank, n_rank: along M in CTAs, along N in tiles.
        pair_rank: in its pair; the even CTA leads.
        leader: cluster rank of its pair's leader.
        m_pair: its pair along M.
    """

    m_rank: Any
    n_rank: Any
    pair_rank: Any
    leader: Any
    m_pair: Any


def place_of(config: Config) -> Place:
    """This CTA's place. Ranks run along M first, so that a pair is two neighbours, as cta_group::2 has it."""
    if config.cluster_size == 1:
        zero = Int32(0)
        return Place(zero, zero, zero, zero, zero)
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    m_rank, n_rank = rank % config.cluster_m, rank // config.cluster_m
    pair_rank = m_rank % config.pair
    return Place(m_rank, n_rank, pair_rank, rank - pair_rank, m_rank // config.pair)


def _every(count: int, step: int, bits: int = 1) -> int:
    """``count`` copies of ``bits``, ``step`` bits apart."""
    return sum(bits << (step * index) for index in range(count))


def a_mask(config: Config, place: Place) -> Any:
    """CTAs that share this CTA's rows of A: its row of the cluster."""
    mask = _every(config.cluster_n, config.cluster_m)
    return mask if config.cluster_m == 1 else Int32(mask) << place.m_rank


def b_mask(config: Config, place: Place) -> Any:
    """CTAs that share this CTA's rows of B: those of equal pair rank in its column of the cluster."""
    return Int32(_every(config.pairs_m, config.pair)) << (place.n_rank * config.cluster_m + place.pair_rank)


def release_mask(config: Config, place: Place) -> Any:
    """CTAs that copy into this pair's stages: all of its row and column of the cluster."""
    whole = (1 << config.pair) - 1
    row = _every(config.cluster_n, config.cluster_m, whole)
    column = _every(config.pairs_m, config.pair, whole)
    if config.pairs_m == 1:
        return row  # one pair along M: the row is the cluster
    return (Int32(row) << (place.m_pair * config.pair)) | (Int32(column) << (place.n_rank * config.cluster_m))


# ---- shared and tensor memory


@dataclass(frozen=True)
class Shared:
    """A CTA's shared memory.

    Attributes:
        a, b, a_scales, b_scales: the ring's operands, each ``[stages][bytes]``.
        full, empty: mbarriers of the stages.
        accumulator_full: mbarriers of the tiles' accumulators, all of a tile by one.
        accumulator_empty: mbarriers of the accumulators.
        tmem: where tcgen05.alloc writes the base address.
        words: three words for the epilogues.
    """

    a: Any
    b: Any
    a_scales: Any
    b_scales: Any
    full: Any
    empty: Any
    accumulator_full: Any
    accumulator_empty: Any
    tmem: Any
    words: Any


def shared_memory(config: Config) -> Shared:
    """Allocates shared memory; operands first, each a multiple of the swizzle's 1024 bytes."""
    space = cutlass.AddressSpace.smem

    def operand(stage_bytes: int) -> Any:
        return cutlass.Array(Uint8, stage_bytes * config.stages, space=space, alignment=1024)

    def barriers(count: int) -> Any:
        return cutlass.Array(Int64, count, space=space, alignment=BARRIER_BYTES)

    return Shared(
        operand(config.a_bytes),
        operand(config.b_bytes),
        operand(SCALE_TILE_BYTES),
        operand(config.b_scale_bytes),
        barriers(config.stages),
        barriers(config.stages),
        barriers(config.accumulators),
        barriers(config.accumulators),
        cutlass.Array(Int32, 1, space=space, alignment=4),
        cutlass.Array(Int32, 3, space=space, alignment=4),
    )


def initialise_barriers(config: Config, shared: Shared) -> None:
    """One thread: gives every mbarrier its count of arrivals."""
    for stage in range(config.stages):
        pr.mbarrier_init(shared.full.subview(stage), 1)
        pr.mbarrier_init(shared.empty.subview(stage), config.releases)
    for index in range(config.accumulators):
        pr.mbarrier_init(shared.accumulator_full.subview(index), 1)
        pr.mbarrier_init(shared.accumulator_empty.subview(index), EPILOGUE_WARPS * config.pair)


def synchronise(config: Config) -> None:
    """All threads of the cluster, or of the CTA where it is alone."""
    if config.cluster_size > 1:
        pr.barrier_cluster_arrive()
        pr.barrier_cluster_wait()
    else:
        pr.barrier_cta_sync(0)


@cute.jit
def set_up(config: cutlass.Constexpr, shared: cutlass.Constexpr, warp):
    """Barriers and tensor memory; returns after the whole cluster has its barriers. Gives the base address of tensor memory."""
    if warp == 0:
        if pr.elect_sync():
            initialise_barriers(config, shared)
        pr.fence_mbarrier_init()
    if cutlass.const_expr(config.cluster_size > 1):
        # the fence above has released the barriers: an arrival that orders memory would cost a fence of the whole device
        pr.barrier_cluster_arrive_relaxed()
        pr.barrier_cluster_wait()
    if warp == config.mma_warp:
        pr.tcgen05_alloc(shared.tmem, TMEM_COLUMNS, group=config.group)
        pr.tcgen05_relinquish_alloc_permit(group=config.group)
    pr.tcgen05_fence(pr.Tcgen05Fence.BEFORE_THREAD_SYNC)
    pr.barrier_cta_sync(0)  # a pair allocates together: where one CTA is done, so is its peer
    pr.tcgen05_fence(pr.Tcgen05Fence.AFTER_THREAD_SYNC)
    return shared.tmem.load()


@cute.jit
def tear_down(config: cutlass.Constexpr, warp, tmem):
    """Frees tensor memory after every warp of the cluster is done with it and with its neighbours' shared memory."""
    synchronise(config)
    if warp == config.mma_warp:
        pr.tcgen05_dealloc(cutlass.inttoptr(tmem, TMEM_SPACE, Int32), TMEM_COLUMNS, group=config.group)


@cute.jit
def wait(barrier, phase):
    """Until ``barrier`` has left the phase of this parity."""
    while not pr.mbarrier_try_wait_parity(barrier, phase, time_limit=WAIT_HINT):
        pass


def stage_of(config: Config, count: Any) -> tuple[Any, Any]:
    """Stage and parity of the ring's ``count``-th use."""
    return count % Uint32(config.stages), (count // Uint32(config.stages)) & Uint32(1)


def accumulator_of(config: Config, count: Any) -> tuple[Any, Any]:
    """Accumulator and parity of its ring's ``count``-th use."""
    return count % Uint32(config.accumulators), (count // Uint32(config.accumulators)) & Uint32(1)


def published_of(config: Config, count: Any) -> tuple[Any, Any]:
    """Barrier and parity that tell of the accumulators' ``count``-th use. All accumulators of a tile are published by one commit on one barrier,
    so that every epilogue group meets every phase of it: a group that met only some could take an old phase for a later one of the same parity."""
    return accumulator_of(config, count // Uint32(config.halves))
