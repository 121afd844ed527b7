"""What is tuned and benchmarked: shapes of models, token counts, routing, roofline, and what a good series of times looks like.

Standard library only; ``tune_data`` makes the tensors.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.model_config import read_config
from densemoe.runtime.plan import packed_weight_bytes
from densemoe.runtime.problem import ELEMENT_BITS, Problem
from densemoe.runtime.select import bucket

__all__ = [
    "BENCH_TOKENS",
    "HELD_OUT",
    "MODELS",
    "TUNE_TOKENS",
    "Case",
    "Cliff",
    "Shape",
    "active_experts",
    "cliffs",
    "falls",
    "in_order",
    "parse_shapes",
    "roofline",
    "route_tokens",
    "worth_a_tile",
]

#: The models whose bars the project states, as one rank of them sees a layer.
MODELS: Final = ("deepseek-v3:tp8", "qwen3-30b-a3b", "qwen3-235b-a22b:tp4", "mixtral-8x7b:tp8", "kimi-k2:tp8")
#: Shapes that no table is made of, for regret: models of other sizes, odd expert counts, an I that is no multiple of 256.
HELD_OUT: Final = ("glm-4.5:tp4", "glm-4.5-air:tp2", "64x6x2048x1408", "512x10x2048x128", "8x2x6144x2048")
TUNE_TOKENS: Final = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
BENCH_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FEWEST_ROWS: Final = 8  # of a tile, which is measured however few rows an expert has
LEAST_FILLED: Final = 8  # a tile is measured where an expert's rows fill an eighth of it
MOST_TILES: Final = 32  # of an expert, on average
LARGEST_RISE: Final = 0.15  # of time / roofline between neighbouring buckets
LEAST_NOISE: Final = 0.02  # of a time; more where the quartiles lie further apart
#: FLOP/s of dense bf16 (Hopper) or NVFP4 (Blackwell) matrix products that the rooflines count with: measured by cuBLAS on an H200, and what
#: NVIDIA states for a B200 and a B300.
PEAK_FLOPS: Final[Mapping[str, float]] = {"sm_90a": 650e12, "sm_100f": 9e15, "sm_100a": 9e15, "sm_103a": 13.5e15}

_MODEL: Final = re.compile(r"(?P<name>[^:]+)(?::tp(?P<tp>[1-9][0-9]*))?(?::ep(?P<ep>[1-9][0-9]*))?")
_PLAIN: Final = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)x([1-9][0-9]*)x([1-9][0-9]*)")


@dataclass(frozen=True)
class Shape:
    """A layer as one rank sees it.

    Attributes:
        name: as it was asked for.
        experts, top_k: E here, and experts that a token chooses among them (under expert parallelism the mean, rounded, at least 1).
        hidden, intermediate: H, and I of this rank.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ProblemError(f"{self.name}: top_k {self.top_k} of {self.experts} experts: use 1 to {self.experts}")
        Problem("fc1", 1, self.experts, self.hidden, self.intermediate)  # raises for what the contract refuses


def parse_shapes(texts: Iterable[str]) -> tuple[Shape, ...]:
    """Shapes of ``NAME[:tpN][:epN]`` (a known model or a ``config.json``) or ``ExKxHxI``.

    Raises:
        ProblemError: a text is neither, or the model cannot run or does not divide so.
    """
    shapes = []
    for text in texts:
        plain = _PLAIN.fullmatch(text)
        if plain:
            experts, top_k, hidden, intermediate = (int(part) for part in plain.groups())
            shapes.append(Shape(text, experts, top_k, hidden, intermediate))
            continue
        match = _MODEL.fullmatch(text)
        if match is None:
            raise ProblemError(f"shape {text!r}: write MODEL, MODEL:tp8, MODEL:tp8:ep2 or ExKxHxI, as in 256x8x7168x256")
        layer = read_config(match["name"])
        if layer.refused:
            raise ProblemError(f"{text} cannot run on densemoe: {'; '.join(layer.refused)}")
        expert_parallel = int(match["ep"] or 1)
        experts, intermediate = layer.shard(int(match["tp"] or 1), expert_parallel)
        shapes.append(Shape(text, experts, max(1, round(layer.top_k / expert_parallel)), layer.hidden, intermediate))
    if not shapes:
        raise ProblemError("no shape is given: name at least one model or ExKxHxI")
    return tuple(shapes)


@dataclass(frozen=True)
class Case:
    """One problem to measure.

    Attributes:
        active: with a list of active experts, of a random routing of ``shape.top_k`` distinct experts a token; else dense over all experts.
        group_tile: of ``groupedfc1`` and ``groupedfc2``: rows of a tile, of tokens that the same routing gathers by expert; else 0.
    """

    op: str
    shape: Shape
    m: int
    a_dtype: str
    c_dtype: str
    active: bool = False
    group_tile: int = 0

    @property
    def plain_op(self) -> str:
        """``fc1`` or ``fc2``, whose weights it reads."""
        return self.op.removeprefix("grouped")

    def problem(self) -> Problem:
        """As the loader takes it."""
        shape = self.shape
        if self.group_tile:
            sizes = (self.m, shape.experts, shape.hidden, shape.intermediate)
            return Problem(self.op, *sizes, self.a_dtype, self.c_dtype, top_k=shape.top_k, group_tile=self.group_tile)
        return Problem(
            self.op, self.m, shape.experts, shape.hidden, shape.intermediate, self.a_dtype, self.c_dtype,
            active_list=self.active, top_k=shape.top_k * self.active,
        )  # fmt: skip

    @property
    def text(self) -> str:
        """For messages."""
        form = f"gathered, tile {self.group_tile}" if self.group_tile else "active experts" if self.active else "dense"
        return f"{self.op} {self.shape.name} M = {self.m} {self.a_dtype}-{self.c_dtype}, {form}"


def in_order(tokens: Sequence[int]) -> list[int]:
    """Token counts coarse first, so that a budget that ends early leaves a whole range thinly covered: ends, middle, quarters, …"""
    ordered: list[int] = []
    rest = sorted(set(tokens))
    chosen: set[int] = set()
    step = len(rest)
    while len(ordered) < len(rest):
        positions = [*range(0, len(rest), max(1, step)), len(rest) - 1]
        for position in positions:
            if position not in chosen:
                chosen.add(position)
                ordered.append(rest[position])
        step //= 2
    return ordered


# ---- routing


def route_tokens(shape: Shape, m: int, seed: int = 0) -> list[list[int]]:
    """``top_k`` distinct experts for each of ``m`` tokens, uniformly at random. Fewer tokens of one seed are a prefix of more."""
    rng = random.Random(f"{seed} {shape.experts} {shape.top_k}")
    return [sorted(rng.sample(range(shape.experts), shape.top_k)) for _ in range(m)]


def active_experts(experts: float, top_k: float, m: int) -> float:
    """Expected number of experts with a token under uniform routing."""
    return experts * (1 - (1 - min(1.0, top_k / experts)) ** m)


def worth_a_tile(shape: Shape, m: int, tile: int) -> bool:
    """Whether tiles of so many rows stand neither almost empty nor in dozens an expert: what is measured of the grouped kernels' tiles."""
    share = m * shape.top_k / shape.experts
    return (tile <= FEWEST_ROWS or share >= tile / LEAST_FILLED) and share <= tile * MOST_TILES


# ---- roofline


def weight_bytes(problem: Problem, layout: str, active: float | None = None) -> int:
    """Bytes of packed weights that a launch reads once: of ``active`` experts, of all where None."""
    whole = packed_weight_bytes(layout, problem)
    return whole if active is None else round(whole * active / problem.experts)


def flops(case: Case) -> float:
    """Floating-point operations of a launch: of routed tokens with a list or gathered, of all experts else; 2 a multiply-add."""
    shape = case.shape
    depth = 3 if case.op == "layer" else 2 if case.plain_op == "fc1" else 1
    pairs = case.m * (shape.top_k if case.active or case.group_tile else shape.experts)
    return 2.0 * pairs * depth * shape.hidden * shape.intermediate


def roofline(weights: float, operations: float, bytes_per_second: float, flops_per_second: float) -> float:
    """Microseconds below which no kernel can be: reading ``weights`` bytes, or ``operations``, whichever takes longer."""
    return max(weights / bytes_per_second, operations / flops_per_second) * 1e6


def moved_bytes(problem: Problem) -> int:
    """Bytes of activations and output that a dense launch reads and writes once."""
    outputs = sum(spec.nbytes for spec in problem.tensors().values() if spec.output)
    return outputs + problem.m * problem.k * ELEMENT_BITS[problem.a_dtype] // 8


# ---- what a series of times over M should look like


@dataclass(frozen=True)
class Cliff:
    """Two neighbouring M between which a rule is broken.

    Attributes:
        change: of the ratio time / roofline (``cliffs``), or of the time (``falls``), as a share of the first.
    """

    m: int
    next_m: int
    change: float


def cliffs(times: Mapping[int, float], rooflines: Mapping[int, float], largest_rise: float = LARGEST_RISE) -> list[Cliff]:
    """Neighbouring M where time / roofline rises by more than ``largest_rise``.

    Args:
        times, rooflines: microseconds by M.
    """
    found = []
    for m, after in _neighbours(times):
        before = times[m] / rooflines[m]
        change = times[after] / rooflines[after] / before - 1
        if change > largest_rise:
            found.append(Cliff(m, after, change))
    return found


def falls(times: Mapping[int, float], spreads: Mapping[int, float] | None = None) -> list[Cliff]:
    """Neighbouring M where the time falls by more than noise: LEAST_NOISE, or half of either's spread where that is more.

    Args:
        times: microseconds by M; spreads: distance of the quartiles as a share of the time, by M.
    """
    found = []
    for m, after in _neighbours(times):
        noise = max([LEAST_NOISE, *((spreads[m] / 2, spreads[after] / 2) if spreads else ())])
        change = times[after] / times[m] - 1
        if change < -noise:
            found.append(Cliff(m, after, change))
    return found


def _neighbours(times: Mapping[int, Any]) -> list[tuple[int, int]]:
    ordered = sorted(times)
    return list(itertools.pairwise(ordered))


def by_bucket(times: Mapping[int, float]) -> dict[int, float]:
    """The time of each bucket's largest M."""
    return {bucket(m): times[m] for m in sorted(times)}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; 1 of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0
