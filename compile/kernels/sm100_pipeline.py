"""The tcgen05 kernels' pipeline, role by role: what the TMA warp copies, what the MMA warp multiplies, how epilogues read an accumulator.

Counterpart of ``sm100_common``, which has the picture, the geometry and the set-up. Everything here is inlined into a warp role of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels.sm100_common import (
    CODE_ROW_BYTES,
    CTA_ROWS,
    K_STEP_UNITS,
    K_STEPS,
    SCALE_ATOM_BYTES,
    SCALE_ATOM_UNITS,
    SCALE_ATOMS,
    SCALE_COLUMNS,
    SCALE_TILE_BYTES,
    SCALE_TILE_UNITS,
    TMEM_SPACE,
    WIDEST_MMA,
    Config,
    Place,
    Shared,
    a_mask,
    b_mask,
    published_of,
    release_mask,
    stage_of,
    wait,
)

# ---- the TMA warp


@dataclass(frozen=True)
class Maps:
    """Tensor maps of the operands."""

    a: Any
    b: Any
    a_scales: Any
    b_scales: Any


def _copy(config: Config, destination: Any, tensor_map: Any, coordinates: tuple[Any, ...], barrier: Any, mask: Any) -> None:
    """One TMA copy, multicast to the CTAs of ``mask`` where it is given."""
    options = {}
    if config.pair == 2:
        options["group"] = config.group
    if mask is not None:
        options["multicast_mask"] = mask
    pr.cp_async_bulk_tensor_shared_cluster_global(destination, tensor_map.get_ptr(), coordinates, barrier, [], **options)


def load_weights(config: Config, place: Place, shared: Shared, maps: Maps, stage: Any, k_tile: Any, n_tile: Any) -> None:
    """One thread: this CTA's part of B's codes and scales of one K tile."""
    barrier = shared.full.subview(stage)
    mask = b_mask(config, place) if config.pairs_m > 1 else None
    rows = config.b_rows // config.pairs_m
    atoms = SCALE_ATOMS // config.pairs_m
    for half in range(config.halves):
        codes = stage * config.b_bytes + half * config.b_half_bytes + place.m_pair * (rows * CODE_ROW_BYTES)
        row = n_tile * config.tile_n + half * config.columns + place.pair_rank * config.b_rows + place.m_pair * rows
        _copy(config, shared.b.subview(codes), maps.b, (k_tile * CODE_ROW_BYTES, row), barrier, mask)
        scales = stage * config.b_scale_bytes + half * SCALE_TILE_BYTES + place.m_pair * (atoms * SCALE_ATOM_BYTES)
        at = (0, k_tile * SCALE_ATOMS + place.m_pair * atoms, scale_tile(config, n_tile, half))
        _copy(config, shared.b_scales.subview(scales), maps.b_scales, at, barrier, mask)


def scale_tile(config: Config, n_tile: Any, half: int) -> Any:
    """Which 128 rows of B's scales an accumulator needs; two tiles of 64 columns share one."""
    return n_tile // (WIDEST_MMA // config.columns) if config.columns < WIDEST_MMA else n_tile * config.halves + half


def load_activations(config: Config, place: Place, shared: Shared, maps: Maps, stage: Any, k_tile: Any, row_tile: Any) -> None:
    """One thread: this CTA's part of A's codes and scales of one K tile of 128 rows."""
    barrier = shared.full.subview(stage)
    mask = a_mask(config, place) if config.cluster_n > 1 else None
    rows = CTA_ROWS // config.cluster_n
    atoms = SCALE_ATOMS // config.cluster_n
    codes = stage * config.a_bytes + place.n_rank * (rows * CODE_ROW_BYTES)
    _copy(config, shared.a.subview(codes), maps.a, (k_tile * CODE_ROW_BYTES, row_tile * CTA_ROWS + place.n_rank * rows), barrier, mask)
    scales = stage * SCALE_TILE_BYTES + place.n_rank * (atoms * SCALE_ATOM_BYTES)
    at = (0, k_tile * SCALE_ATOMS + place.n_rank * atoms, row_tile)
    _copy(config, shared.a_scales.subview(scales), maps.a_scales, at, barrier, mask)


def prefetch_weights(config: Config, place: Place, maps: Maps, k_tile: Any, n_tile: Any) -> None:
    """One thread: asks the L2 for this CTA's part of B's codes and scales of one K tile."""
    rows = config.b_rows // config.pairs_m
    atoms = SCALE_ATOMS // config.pairs_m
    for half in range(config.halves):
        row = n_tile * config.tile_n + half * config.columns + place.pair_rank * config.b_rows + place.m_pair * rows
        pr.cp_async_bulk_tensor_prefetch(maps.b.get_ptr(), (k_tile * CODE_ROW_BYTES, row), [])
        at = (0, k_tile * SCALE_ATOMS + place.m_pair * atoms, scale_tile(config, n_tile, half))
        pr.cp_async_bulk_tensor_prefetch(maps.b_scales.get_ptr(), at, [])


@cute.jit
def expect_stage(config: cutlass.Constexpr, shared: cutlass.Constexpr, stage, pair_rank):
    """One thread: announces the bytes of a stage, on the leader those of both CTAs."""
    barrier = shared.full.subview(stage)
    if cutlass.const_expr(config.pair == 2):
        if pair_rank == 0:
            pr.mbarrier_arrive_expect_tx(barrier, config.stage_bytes * config.pair)
    else:
        pr.mbarrier_arrive_expect_tx(barrier, config.stage_bytes)


@cute.jit
def drain(config: cutlass.Constexpr, shared: cutlass.Constexpr, used):
    """The TMA warp, last: until every release is in, so that none arrives at a CTA that has ended.

    Args:
        used: how often the ring was used.
    """
    for ahead in cutlass.range_constexpr(config.stages):
        stage, phase = stage_of(config, used + Uint32(ahead))
        wait(shared.empty.subview(stage), phase ^ Uint32(1))


# ---- the MMA warp


@dataclass(frozen=True)
class Descriptors:
    """Shared-memory descriptors of the ring's first stage, and the instruction descriptor."""

    a: Any
    b: Any
    a_scales: Any
    b_scales: Any
    instruction: Any


def descriptors(config: Config, shared: Shared) -> Descriptors:
    """Descriptors of K-major operands under the 128-byte swizzle, and of scale atoms: 8 rows of 16 bytes are 128 contiguous bytes."""

    def codes(array: Any) -> Any:
        return pr.Tcgen05SmemDesc.build(array, leading_byte_offset=16, stride_byte_offset=1024, layout=2)

    def scales(array: Any) -> Any:
        return pr.Tcgen05SmemDesc.build(array, leading_byte_offset=16, stride_byte_offset=128, layout=0)

    instruction = pr.Tcgen05MxOmmaInstrDesc.build(
        a_dtype=cutlass.Float4E2M1FN,
        b_dtype=cutlass.Float4E2M1FN,
        scale_format=0,  # UE4M3; the builder's default is E8M0
        n_dim=config.columns,
        m_dim=config.tile_m,
        sparsity_version=0,  # bit 12, which PTX reserves; the builder's default is 1
    )
    return Descriptors(codes(shared.a), codes(shared.b), scales(shared.a_scales), scales(shared.b_scales), instruction)


def accumulator_address(config: Config, tmem: Any, index: Any) -> Any:
    """First column of accumulator ``index``."""
    return tmem + Int32(index) * config.columns


def multiply(
    config: Config, tmem: Any, described: Descriptors, stage: Any, first: list[Any], accumulates: Any, n_tile: Any
) -> None:
    """One thread: the products of one stage, K 256, into the accumulators of a tile.

    Args:
        first: column addresses of the tile's accumulators.
        accumulates: false where the stage begins an accumulation.
        n_tile: decides which half of a scale atom a tile of 64 columns reads.
    """
    shape, multicast = pr.S2TCopyMode.S2T_32x128b_WARPX4
    a_columns = tmem + config.accumulators * config.columns
    b_columns = a_columns + SCALE_COLUMNS

    def pointer(column: Any, dtype: Any = Int32) -> Any:
        return cutlass.inttoptr(column, TMEM_SPACE, dtype)

    stage = Int32(stage)
    for step in range(K_STEPS):
        source = described.a_scales + stage * SCALE_TILE_UNITS + step * SCALE_ATOM_UNITS
        pr.tcgen05_cp(shape, pointer(a_columns + 4 * step), source, group=config.group, multicast=multicast)
        for half in range(config.halves):
            source = described.b_scales + stage * (config.b_scale_bytes // 16) + half * SCALE_TILE_UNITS + step * SCALE_ATOM_UNITS
            target = b_columns + half * SCALE_COLUMNS + 4 * step
            pr.tcgen05_cp(shape, pointer(target), source, group=config.group, multicast=multicast)
    # a scale column holds 32 rows: an odd tile of 64 columns starts two columns further
    b_first = b_columns + (n_tile % 2) * 2 if config.columns < WIDEST_MMA else b_columns
    for half in range(config.halves):
        for step in range(K_STEPS):
            pr.tcgen05_mma_block_scale(
                pr.MMABlockScaleKind.MXF4NVF4,
                config.group,
                pointer(first[half], Float32),
                described.a + stage * (config.a_bytes // 16) + step * K_STEP_UNITS,
                described.b + stage * (config.b_bytes // 16) + half * (config.b_half_bytes // 16) + step * K_STEP_UNITS,
                described.instruction,
                enable_input_d=True if step else accumulates,
                scale_a=pointer(a_columns + 4 * step),
                scale_b=pointer(b_first + half * SCALE_COLUMNS + 4 * step),
                scale_vec_size=pr.Tcgen05MMABlockScale.BLOCK16,
            )


def release_stage(config: Config, place: Place, shared: Shared, stage: Any) -> None:
    """One thread: tells every CTA that copies into this stage when the MMAs so far have read it."""
    barrier = shared.empty.subview(stage)
    if config.cluster_size > 1:
        pr.tcgen05_commit(barrier, multicast_mask=release_mask(config, place), group=config.group)
    else:
        pr.tcgen05_commit(barrier, group=config.group)


def publish_accumulators(config: Config, place: Place, shared: Shared, turn: Any) -> None:
    """One thread: tells the epilogues of the pair when the MMAs so far are done.

    Args:
        turn: count of uses of accumulators, at the tile's first.
    """
    barrier = shared.accumulator_full.subview(published_of(config, turn)[0])
    if config.pair == 2:
        mask = 3 if config.cluster_size == 2 else Int32(3) << place.leader
        pr.tcgen05_commit(barrier, multicast_mask=mask, group=config.group)
    else:
        pr.tcgen05_commit(barrier, group=config.group)


# ---- the epilogue warps


def load_columns(address: Any, count: int) -> list[Any]:
    """``count`` consecutive columns of this thread's lane of tensor memory; valid after ``loaded``."""
    values = pr.tcgen05_ld(pr.Tcgen05LdStShape.SHAPE_32X32B, cutlass.inttoptr(address, TMEM_SPACE, Float32), num=count)
    return [values[index] for index in range(count)]


def loaded() -> None:
    """Until this warp's loads from tensor memory have arrived."""
    pr.tcgen05_wait(kind=pr.Tcgen05Wait.LOAD)


@cute.jit
def release_accumulator(config: cutlass.Constexpr, shared: cutlass.Constexpr, index, leader):
    """One epilogue warp: has read an accumulator."""
    pr.tcgen05_fence(pr.Tcgen05Fence.BEFORE_THREAD_SYNC)
    if pr.elect_sync():
        barrier = shared.accumulator_empty.subview(index)
        if cutlass.const_expr(config.pair == 2):
            pr.mbarrier_arrive(pr.mapa(barrier, leader), scope=pr.MemScope.CLUSTER)
        else:
            pr.mbarrier_arrive(barrier)
