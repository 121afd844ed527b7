"""A roofline model of the tcgen05 kernels: microseconds of a launch on a B200 or B300 that nobody here has seen. Everything it says is modelled.

A launch is as long as its slowest resource, plus what does not overlap:

    memory    weights, activations and output at the sustained bandwidth, or at what the bytes in flight draw through the latency (Little's law)
    l2        bytes that an SM asks the L2 for, after multicast, at the L2's share of an SM
    mma       MMAs at the sustained rate, or at the rate at which shared memory feeds them; a tile is computed whole, padded rows too
    epilogue  SwiGLU's ex2 and rcp (FC1), the sum over experts (FC2)
    launch    a fixed time; split  partial sums, tickets, the last part's ordered reduction

``l2``, ``mma`` and ``epilogue`` are counted for the SM that has most to do: whole waves of clusters. Resources overlap imperfectly: a part of each
that is not the slowest is added. Constants are published numbers, or assumptions that are named so, chosen so that the published times and orders
come out: tests/blackwell/test_roofline.py holds the model to every one that this project knows (docs/blackwell.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from densemoe.compile.kernels import sm100_device
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import Variant

__all__ = ["B200", "B300", "DEVICES", "Device", "Estimate", "Tile", "estimate", "rank", "settings_of"]

SUSTAINED_BANDWIDTH: Final = 0.92  # of the published: what an H200 sustains (4.3 to 4.6 of 4.8 TB/s measured)
SUSTAINED_MMA: Final = 0.75  # of the published rate: power and issue; an assumption
L2_BYTES_PER_CLOCK: Final = 77  # an SM: about 21 TB/s over 148 SMs; an assumption
SMEM_BYTES_PER_CLOCK: Final = 128
OPERAND_SHARE: Final = 0.64  # of shared memory's bandwidth that MMAs get, beside TMA's writes; an assumption
IMPERFECT_OVERLAP: Final = 0.08  # of each resource that is not the slowest; an assumption
COUPLING: Final = 0.02  # of the slowest resource: clusters of four, beyond the two SMs of a TPC, wait for their slowest CTA; an assumption
LAUNCH_US: Final = 2.2  # a launch in a graph with its first bytes' latency: measured on an H200 for a kernel that only reads
SPLIT_US: Final = 1.3  # storing partial sums, fence, ticket: two latencies; an assumption
SPLIT_PART_US: Final = 0.8  # reading one part back: a latency; an assumption
EX2_RCP_A_COLUMN_PAIR: Final = 135 / 64  # MUFU operations a thread and output column of FC1's epilogue, counted in its code (docs/blackwell.md)
THREADS_OF_A_TILE: Final = 128
FMA_PER_CLOCK: Final = 128  # float32 lanes of an SM
TMEM_BYTES_PER_CLOCK: Final = 512  # tensor memory to registers; an assumption
K_TILE: Final = 256
MMA_K: Final = 64
CTA_ROWS: Final = 128
CODES_PER_BYTE: Final = 2
GROUP: Final = 16
WEIGHT_BYTES: Final = 1 / CODES_PER_BYTE + 1 / GROUP  # of one NVFP4 value with its share of a scale
OUTPUT_BYTES: Final = {"nvfp4": WEIGHT_BYTES, "bf16": 2.0, "f16": 2.0, "f32": 4.0, "e4m3": 1.0, "e5m2": 1.0}


@dataclass(frozen=True)
class Device:
    """A device as the model sees it.

    Attributes:
        bandwidth: bytes a second of device memory, as published.
        clock: Hz under load; an assumption.
        mma_rate: dense NVFP4 FLOP/s, as published.
        mufu_per_clock: ex2 or rcp an SM and clock.
        fours: clusters of four CTAs that it holds at once: an assumption of GPCs with 18 or 20 SMs.
    """

    name: str
    capability: tuple[int, int]
    sm_count: int
    bandwidth: float
    clock: float
    mma_rate: float
    mufu_per_clock: int
    fours: int

    def resident(self, cluster_size: int) -> int:
        """Clusters that it holds at once."""
        return min(self.fours, self.sm_count // 4) * 4 // cluster_size if cluster_size >= 4 else self.sm_count // cluster_size

    @property
    def macs_per_clock(self) -> float:
        """Multiply-adds an SM and clock at the published rate."""
        return self.mma_rate / 2 / self.sm_count / self.clock

    def ridge(self) -> float:
        """Tokens above which a dense GEMM over all experts is bound by arithmetic: 2·M FLOP a weight at the published rates."""
        return WEIGHT_BYTES / 2 * self.mma_rate / self.bandwidth


B200: Final = Device("B200", (10, 0), sm100_device.B200_SM_COUNT, sm100_device.B200_BANDWIDTH, 1.85e9, 9e15, 16, 34)
#: Public documents give 148 or 160 SMs; the choice of variants is the same under both (tested). ex2 at twice the rate is published.
B300: Final = Device("B300", (10, 3), 148, 8e12, 1.85e9, 13.5e15, 32, 34)
DEVICES: Final[Mapping[str, Device]] = {each.name.lower(): each for each in (B200, B300)}


@dataclass(frozen=True)
class Tile:
    """Sizes of one CTA that follow from tile and cluster; the kernels' ``Config`` says the same (tested)."""

    tile_m: int
    tile_n: int
    cluster_m: int
    cluster_n: int

    @classmethod
    def of(cls, variant: Variant) -> Tile:
        """Of a variant."""
        return cls(variant.tile_m, variant.tile_n, variant.cluster_m, variant.cluster_n)

    @property
    def pair(self) -> int:
        """CTAs of one tile."""
        return self.tile_m // CTA_ROWS

    @property
    def halves(self) -> int:
        """Accumulators, so MMAs a K 64, of one tile."""
        return max(1, self.tile_n // 128)

    @property
    def scale_bytes(self) -> int:
        """Scales of 128 rows in a stage."""
        return CTA_ROWS * K_TILE // GROUP

    @property
    def weight_stage_bytes(self) -> int:
        """Weights, codes and scales, in a stage of one CTA: its half of a pair's rows, all of their scales."""
        return self.tile_n // self.pair * K_TILE // CODES_PER_BYTE + self.halves * self.scale_bytes

    @property
    def stage_bytes(self) -> int:
        """A stage of one CTA."""
        return CTA_ROWS * K_TILE // CODES_PER_BYTE + self.scale_bytes + self.weight_stage_bytes

    @property
    def stages(self) -> int:
        """Stages of the ring in shared memory, two barriers of 8 bytes each, beside a few fixed words."""
        fixed = 16 * min(4, (sm100_device.TMEM_COLUMNS - 16 * (1 + self.halves)) // min(self.tile_n, 128)) + 16
        return (sm100_device.LARGEST_SMEM - fixed) // (self.stage_bytes + 16)

    def requested_bytes(self, rows: int) -> float:
        """What a CTA asks the L2 for in a stage: its share of what its cluster multicasts; rows past M are not read."""
        activations = min(rows, CTA_ROWS) * K_TILE / CODES_PER_BYTE + self.scale_bytes
        return activations / self.cluster_n + self.weight_stage_bytes / (self.cluster_m // self.pair)

    def mma_clocks(self, device: Device) -> float:
        """Clocks of the MMAs of one K tile, an SM: by arithmetic, or by what they read from shared memory; a pair shares its weights."""
        columns = min(self.tile_n, 128)
        arithmetic = CTA_ROWS * columns * MMA_K / device.macs_per_clock / SUSTAINED_MMA
        operands = (CTA_ROWS + columns / self.pair) * MMA_K / CODES_PER_BYTE / SMEM_BYTES_PER_CLOCK / OPERAND_SHARE
        return max(arithmetic, operands) * self.halves * (K_TILE // MMA_K)


@dataclass(frozen=True)
class Estimate:
    """Modelled microseconds of one launch, and of its parts.

    Attributes:
        waves: work items of the SM that has most.
        bound: the slowest resource.
    """

    key: str
    settings: Mapping[str, int]
    total: float
    memory: float
    l2: float
    mma: float
    epilogue: float
    launch: float
    split: float
    waves: int
    bound: str


def settings_of(op: str) -> tuple[dict[str, int], ...]:
    """Settings that the model tells apart: the L2 prefetch distance is not among them."""
    return tuple({"splits": splits} for splits in (1, 2, 4)) if op == "fc2" else ({},)


def estimate(device: Device, variant: Variant, problem: Problem, *, splits: int = 1, active: int | None = None) -> Estimate:
    """A launch of a tcgen05 variant.

    Args:
        active: experts that are computed; all where absent.

    Raises:
        ProblemError: the variant cannot run the problem, so it has no time.
    """
    accepted, reason = can_implement(variant, problem)
    if not accepted:
        raise ProblemError(f"{variant.key} has no time for this problem: {reason}")
    tile, experts = Tile.of(variant), problem.experts if active is None else active
    fc1 = problem.op == "fc1"
    rows, k = (2 * problem.intermediate * experts, problem.hidden) if fc1 else (problem.hidden, problem.intermediate * experts)
    steps = -(-k // K_TILE)
    columns = -(-rows // (tile.tile_n * tile.cluster_n))
    clusters = -(-problem.m // (CTA_ROWS * tile.cluster_m)) * columns * splits
    size = tile.cluster_m * tile.cluster_n
    resident = device.resident(size)
    waves = -(-clusters // resident)

    def us(clocks: float) -> float:
        return clocks / device.clock * 1e6

    per_item = steps / splits
    ctas = min(clusters, resident) * size
    drawn = ctas * tile.stages * tile.weight_stage_bytes / (sm100_device.MEMORY_LATENCY_NS * 1e-9)
    outputs = problem.m * (problem.intermediate * experts if fc1 else problem.hidden) * OUTPUT_BYTES[problem.c_dtype]
    moved = (rows + problem.m) * k * WEIGHT_BYTES + outputs
    memory = moved / min(device.bandwidth * SUSTAINED_BANDWIDTH, drawn) * 1e6
    l2 = us(waves * per_item * tile.requested_bytes(problem.m) / L2_BYTES_PER_CLOCK)
    mma = us(waves * per_item * tile.mma_clocks(device))
    if fc1:
        one = tile.tile_n / 2 * EX2_RCP_A_COLUMN_PAIR * THREADS_OF_A_TILE / device.mufu_per_clock
        epilogue, exposed = us(waves * one), us(one / tile.halves)
    else:
        # an accumulator an expert; a scalar alpha has one a part
        accumulators = 1.0 if problem.scalar_alpha else max(1.0, experts / splits)
        one = tile.tile_n * THREADS_OF_A_TILE * (1 / FMA_PER_CLOCK + 4 / TMEM_BYTES_PER_CLOCK)
        epilogue, exposed = us(waves * accumulators * one), us(one)
    split = 0.0
    if splits > 1:
        part = min(problem.m, CTA_ROWS) * tile.tile_n * 4 * (splits + 1)
        split = SPLIT_US + splits * SPLIT_PART_US + us(part / L2_BYTES_PER_CLOCK)
    parts = {"memory": memory, "l2": l2, "mma": mma, "epilogue": epilogue}
    bound = max(parts, key=lambda name: parts[name])
    coupling = COUPLING if size >= 4 else 0.0
    overlapped = parts[bound] * (1 + coupling) + IMPERFECT_OVERLAP * (sum(parts.values()) - parts[bound])
    settings = {"splits": splits} if not fc1 else {}
    return Estimate(variant.key, settings, overlapped + exposed + LAUNCH_US + split, **parts, launch=LAUNCH_US, split=split, waves=waves, bound=bound)


def rank(device: Device, problem: Problem, variants: Iterable[Variant], active: int | None = None) -> list[Estimate]:
    """Every variant and setting that runs ``problem``, fastest first; of equal times the smaller cluster, then the fewer splits."""
    found = []
    for variant in variants:
        if can_implement(variant, problem)[0]:
            order = (variant.cluster_m * variant.cluster_n, variant.tile_n)
            for settings in settings_of(problem.op):
                each = estimate(device, variant, problem, splits=settings.get("splits", 1), active=active)
                found.append((round(each.total, 4), order, settings.get("splits", 1), each))
    return [each for *_, each in sorted(found, key=lambda entry: entry[:3])]
