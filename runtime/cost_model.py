"""A launch's time by formula, for shapes that no table was measured at. Standard library only; ``tune_fit`` finds the coefficients.

    T = launch + max(stream · W, decode · P · q) + move · A + token · M                                                    (microseconds)

    W   megabytes of packed weights that are read from memory, once: of the experts that are computed
    P   megabytes that are decoded and multiplied: W times the passes, one for each tile_m tokens (of an expert, where they are gathered)
    q   what the last wave leaves idle: ⌈tiles / slots⌉ · slots / tiles, slots = slots_per_sm · SMs; 1 for slots_per_sm 0: work is cut evenly
    A   megabytes of activations read and outputs written
    M   tokens: of what a few CTAs do for each of them at the end, as where the last one converts what all have added

``launch``, ``stream``, ``decode``, ``move`` and ``token`` are a kernel class's own: one op, tile, cluster, activation dtype, options and settings.
The maximum is the overlap of reading and computing in a pipelined kernel. Everything is a pure function of the problem and the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from densemoe.runtime.problem import ELEMENT_BITS, Problem
from densemoe.runtime.variant import GROUPED_OPS, Variant

__all__ = ["Coefficients", "KernelClass", "Work", "predict", "typical_top_k", "work_of"]

MEGA: Final = 1e-6
WEIGHT_BITS: Final = 4.5  # a code, and a sixteenth of a scale byte
LARGEST_TYPICAL_TOP_K: Final = 8
EXPERTS_A_CHOICE: Final = 4
MANY_TILES: Final = 16  # of an expert: beyond, the last one is half full on average


@dataclass(frozen=True)
class KernelClass:
    """Kernels that share coefficients: a variant without its output dtype, some settings, with or without a list of active experts.

    Attributes:
        settings: (name, value) of run-time switches that are not the defaults, in alphabetical order.
    """

    op: str
    tile: tuple[int, int]
    cluster: tuple[int, int]
    a_dtype: str
    options: tuple[tuple[str, int], ...] = ()
    settings: tuple[tuple[str, int], ...] = ()
    active: bool = False

    @classmethod
    def of(cls, variant: Variant, settings: Mapping[str, int], active: bool) -> KernelClass:
        """The class of a variant."""
        tile, cluster = (variant.tile_m, variant.tile_n), (variant.cluster_m, variant.cluster_n)
        return cls(variant.op, tile, cluster, variant.a_dtype, variant.options, tuple(sorted(settings.items())), active)

    def holds(self, variant: Variant) -> bool:
        """Whether ``variant`` is of this class, whatever its output dtype."""
        return KernelClass.of(variant, dict(self.settings), self.active) == self

    def to_json(self) -> dict[str, Any]:
        """As it stands in a table."""
        lists = {"tile": list(self.tile), "cluster": list(self.cluster)}
        return {**vars(self), **lists, "options": dict(self.options), "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> KernelClass:
        """Raises KeyError or TypeError for what is not one."""
        options, settings = (tuple(sorted(document[name].items())) for name in ("options", "settings"))
        tile, cluster = document["tile"], document["cluster"]
        return cls(document["op"], (tile[0], tile[1]), (cluster[0], cluster[1]), document["a_dtype"], options, settings, document["active"])


@dataclass(frozen=True)
class Coefficients:
    """Of one kernel class.

    Attributes:
        launch: µs.
        stream, decode, move: µs a megabyte.
        slots_per_sm: tiles that an SM works on at once; 0: no waves.
        gathered: with a list: an expert's own tokens fill its tiles, instead of all of M.
        token: µs a token.
    """

    launch: float
    stream: float
    decode: float
    move: float
    slots_per_sm: int = 0
    gathered: bool = False
    token: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a launch does, in megabytes, and how many tiles it is cut into."""

    weights: float
    decoded: float
    tiles: float
    moved: float


def typical_top_k(experts: int) -> int:
    """Experts a token where a problem does not say: 8, fewer of few experts (2 of 8)."""
    return max(1, min(LARGEST_TYPICAL_TOP_K, experts // EXPERTS_A_CHOICE))


def work_of(problem: Problem, tile: tuple[int, int], *, gathered: bool = False, top_k: int | None = None) -> Work:
    """The work of a problem cut into ``tile``: all experts, or those that uniform routing of ``top_k`` makes active on average.

    Args:
        gathered: with a list: passes over an expert's weights follow its own tokens.
        top_k: ``typical_top_k`` where None; a grouped op's problem says it itself.
    """
    if problem.op in GROUPED_OPS:
        return _gathered_work(problem, tile)
    rows = 2 * problem.n_out if problem.op == "fc1" else problem.n_out
    share, tokens = 1.0, float(problem.m)
    if problem.active_list:
        chosen = top_k or typical_top_k(problem.experts)
        active = problem.experts * (1 - (1 - min(1.0, chosen / problem.experts)) ** problem.m)
        share = active / problem.experts
        if gathered:
            tokens = problem.m * chosen / active
    passes = max(1.0, -(-tokens // tile[0]))
    weights = rows * problem.k * WEIGHT_BITS / 8 * MEGA * share
    tiles = max(1.0, rows / tile[1] * passes * (share if problem.op == "fc1" else 1.0))
    moved = (problem.m * problem.k * ELEMENT_BITS[problem.a_dtype] + problem.m * problem.n_out * ELEMENT_BITS[problem.c_dtype]) / 8 * MEGA * share
    return Work(weights, weights * passes, tiles, moved)


def _gathered_work(problem: Problem, tile: tuple[int, int]) -> Work:
    """Of a grouped op: every expert's own tokens in tiles of its own, as many as uniform routing gives it."""
    rows = 2 * problem.n_out if problem.op == "groupedfc1" else problem.n_out
    chosen = min(1.0, problem.top_k / problem.experts)
    own = rows * problem.k * WEIGHT_BITS / 8 * MEGA
    tiles = max(1.0, problem.experts * tiles_of_an_expert(problem.m * chosen, tile[0]))
    active = problem.experts * (1 - (1 - chosen) ** problem.m)
    a_bits, c_bits = (ELEMENT_BITS[dtype] for dtype in (problem.a_dtype, problem.c_dtype))
    moved = (problem.m * problem.top_k * problem.k * a_bits + problem.c_rows * problem.n_out * c_bits) / 8 * MEGA
    return Work(own * active, own * tiles, max(1.0, rows / tile[1] * tiles), moved)


@lru_cache(maxsize=4096)
def tiles_of_an_expert(mean: float, tile: int) -> float:
    """Expected tiles of an expert whose tokens are Poisson with some mean: the mean of ⌈N / tile⌉."""
    if mean > MANY_TILES * tile:
        return mean / tile + 0.5
    last = int(mean + 10 * math.sqrt(mean) + 10)
    return sum(math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) * -(-count // tile) for count in range(1, last + 1)) if mean else 0.0


def waves(tiles: float, slots: int) -> float:
    """q of the module's formula."""
    if not slots:
        return 1.0
    return -(-tiles // slots) * slots / tiles


def predict(problem: Problem, kernel: KernelClass, coefficients: Coefficients, sm_count: int, top_k: int | None = None) -> float:
    """Microseconds of a launch."""
    work = work_of(problem, kernel.tile, gathered=coefficients.gathered, top_k=top_k)
    idle = waves(work.tiles, coefficients.slots_per_sm * sm_count)
    body = max(coefficients.stream * work.weights, coefficients.decode * work.decoded * idle)
    return coefficients.launch + body + coefficients.move * work.moved + coefficients.token * problem.m
