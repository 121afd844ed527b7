"""Measurements → the part ``grouping`` of a selection table: which form a layer takes at M tokens, and tiles of how many rows.

    FC1 + FC2 over the list of active experts ─┐
    grouped FC1 + FC2, a time a tile          ─┴─ by (shape, M) ──► dense_to, and tile by an expert's share of rows, of least regret

``prepare`` and ``route``, one launch either way, are not in the times. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from densemoe.runtime.grouping import group_tile
from densemoe.runtime.select import SMALL_STEP
from densemoe.runtime.tune import DTYPES, Measurement
from densemoe.runtime.tune_cases import Case, Shape, flops
from densemoe.runtime.tune_fit import Regret

__all__ = ["LayerPoint", "chosen", "grouping_of", "held_out_forms", "in_layer", "layer_points", "layer_regret", "layer_series"]

DEVIATIONS: Final = 2.0  # by which an expert's rows may exceed their mean in a tile that is taken: measured borders lie at 1.6 to 2.1 (docs/tried.md)
UNMEASURED: Final = math.log(100.0)  # what a tile that was not measured at a point counts: never taken where another was
_DTYPES: Final = DTYPES[0]


@dataclass
class LayerPoint:
    """FC1 + FC2 of one shape at M tokens, in bf16.

    Attributes:
        listed: microseconds over the list of active experts.
        tiles: microseconds of the grouped form, by the rows of a tile.
        weight_bytes: of both ops' active experts.
    """

    shape: Shape
    m: int
    listed: float
    tiles: dict[int, float] = field(default_factory=dict)
    weight_bytes: int = 0

    @property
    def share(self) -> float:
        """Rows of an expert, were all chosen alike."""
        return self.m * self.shape.top_k / self.shape.experts

    @property
    def best(self) -> float:
        """The least of all."""
        return min(self.listed, *self.tiles.values())

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.shape.name} M = {self.m}"


def in_layer(case: Case) -> bool:
    """Whether a case is part of what a layer's form is chosen by."""
    wanted = _DTYPES[:2] if case.plain_op == "fc1" else _DTYPES[1:]
    return (case.a_dtype, case.c_dtype) == wanted and (case.active or case.group_tile > 0)


def layer_points(measured: Iterable[Measurement]) -> list[LayerPoint]:
    """Of every shape and M at which both forms were measured, the fastest of each that passed; by shape and M."""
    fastest: dict[tuple[Shape, int, int, str], Measurement] = {}
    for each in measured:
        case = each.case
        if each.sample is None or not each.passed or not in_layer(case):
            continue
        name = (case.shape, case.m, case.group_tile, case.plain_op)
        before = fastest.get(name)
        if before is None or before.sample is None or each.sample.microseconds < before.sample.microseconds:
            fastest[name] = each

    def together(shape: Shape, m: int, tile: int) -> tuple[float, int] | None:
        found = [fastest.get((shape, m, tile, op)) for op in ("fc1", "fc2")]
        samples = [(each.sample.microseconds, each.weight_bytes) for each in found if each is not None and each.sample is not None]
        return (samples[0][0] + samples[1][0], samples[0][1] + samples[1][1]) if len(samples) == 2 else None

    points = []
    for shape, m in sorted({name[:2] for name in fastest}, key=lambda each: (each[0].name, each[1])):
        listed = together(shape, m, 0)
        tiles = {tile: own[0] for tile in sorted({name[2] for name in fastest} - {0}) if (own := together(shape, m, tile)) is not None}
        if listed is not None and tiles:
            points.append(LayerPoint(shape, m, listed[0], tiles, listed[1]))
    return points


def chosen(point: LayerPoint, grouping: Mapping[str, Any] | None) -> tuple[str, float]:
    """The form that a table takes at a point, and its microseconds."""
    tile = group_tile(grouping, point.tiles, point.m, point.shape.top_k, point.shape.experts)
    return (f"gathered, tile {tile}", point.tiles[tile]) if tile else ("active experts", point.listed)


def layer_regret(points: Iterable[LayerPoint], grouping: Mapping[str, Any] | None) -> Regret:
    """Regret of a table's forms and tiles against the fastest measured."""
    return Regret.of({f"{each.text}: {chosen(each, grouping)[0]}": chosen(each, grouping)[1] / each.best for each in points})


def layer_series(points: Iterable[LayerPoint], grouping: Mapping[str, Any] | None) -> dict[str, dict[int, tuple[float, int, float]]]:
    """By shape's name and M: microseconds of FC1 + FC2 in the form that a table takes, bytes of weights, floating-point operations."""
    found: dict[str, dict[int, tuple[float, int, float]]] = {}
    for each in points:
        operations = flops(Case("layer", each.shape, each.m, *_DTYPES[:2], active=True))
        found.setdefault(each.shape.name, {})[each.m] = (chosen(each, grouping)[1], each.weight_bytes, operations)
    return found


def grouping_of(points: Sequence[LayerPoint]) -> dict[str, Any] | None:
    """``dense_to`` and ``tiles`` of least regret, in the geometric mean, and larger tiles for shares beyond; None where there is no point."""
    if not points:
        return None
    tokens = sorted({each.m for each in points})
    best: tuple[float, int, list[tuple[float, int]]] | None = None
    for dense_to in (0, *tokens):
        cost = sum(math.log(each.listed / each.best) for each in points if each.m <= dense_to)
        own, segments = _segments([each for each in points if each.m > dense_to])
        if best is None or cost + own < best[0] - 1e-9:
            best = cost + own, dense_to, segments
    assert best is not None
    _, dense_to, segments = best
    if not segments:  # every measured M in the first form: tiles for what lies beyond, by all points
        segments = _segments(points)[1]
    segments = _beyond(points, segments)
    tiles = [{"share_to": share, "tile_m": tile} for share, tile in segments[:-1]]
    found: dict[str, Any] = {"dense_to": _end_of(dense_to, tokens), "tiles": [*tiles, {"tile_m": segments[-1][1]}]}
    regret = layer_regret(points, found)
    shapes = len({each.shape for each in points})
    reason = f"least FC1 + FC2 time at {len(points)} points of {shapes} shapes: regret geomean {regret.geomean:.2%}, worst {regret.worst:.2%}"
    return {"provenance": "measured", "reason": reason, **found}


def held_out_forms(points: Sequence[LayerPoint]) -> Regret:
    """Regret of the forms and tiles on each shape, chosen without it."""
    found: dict[str, float] = {}
    for shape in sorted({each.shape for each in points}, key=lambda each: each.name):
        grouping = grouping_of([each for each in points if each.shape != shape])
        if grouping is not None:
            found |= {f"{each.text}: {chosen(each, grouping)[0]}": chosen(each, grouping)[1] / each.best for each in points if each.shape == shape}
    return Regret.of(found)


def _end_of(dense_to: int, tokens: Sequence[int]) -> int:
    """The end of a bucket between the last M of the first form and the next one: their geometric mean, rounded down."""
    after = next((m for m in tokens if m > dense_to), None)
    if not dense_to or after is None:
        return dense_to
    return max(dense_to, math.floor(math.sqrt(dense_to * after) / SMALL_STEP) * SMALL_STEP)


def _segments(points: Sequence[LayerPoint]) -> tuple[float, list[tuple[float, int]]]:
    """(sum of log regret, (largest share, tile) ascending in both): tiles that never get smaller as the share grows, by dynamic programming."""
    tiles = sorted({tile for each in points for tile in each.tiles})
    shares = sorted({each.share for each in points})
    if not shares:
        return 0.0, []
    cost = {share: [0.0] * len(tiles) for share in shares}
    for each in points:
        for at, tile in enumerate(tiles):
            cost[each.share][at] += math.log(each.tiles[tile] / each.best) if tile in each.tiles else UNMEASURED
    # least[t]: sum up to this share whose tile is the t-th, and the tiles taken
    least: list[tuple[float, list[int]]] = [(0.0, [])] * len(tiles)
    for share in shares:
        paths = []
        for at in range(len(tiles)):
            before = min(least[: at + 1], key=lambda each: each[0])
            paths.append((before[0] + cost[share][at], [*before[1], at]))
        least = paths
    total, path = min(least, key=lambda each: each[0])
    segments = []
    for place, at in enumerate(path):
        if place + 1 == len(path) or path[place + 1] != at:
            behind = min(place + 1, len(path) - 1)
            segments.append((round(_border(points, (shares[place], shares[behind]), (tiles[at], tiles[path[behind]])), 3), tiles[at]))
    return total, segments


def _beyond(points: Sequence[LayerPoint], segments: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """``segments`` with what lies beyond the largest share measured, modelled: an expert's rows vary about their mean by its square root, and a tile
    is taken while it holds DEVIATIONS of that more."""
    largest_share, last = max(each.share for each in points), segments[-1][1]
    found = [*segments[:-1]]
    for tile in sorted({tile for each in points for tile in each.tiles if tile >= last}):
        share = round((math.sqrt(tile + DEVIATIONS**2 / 4) - DEVIATIONS / 2) ** 2, 3)
        if share > largest_share or tile == last:
            found.append((max(share, largest_share), tile))
    return found


def _border(points: Sequence[LayerPoint], shares: tuple[float, float], tiles: tuple[int, int]) -> float:
    """The share between two measured ones up to which the smaller of two tiles is taken: where both would be as fast, were the logarithm of their
    times' ratio linear in that of the share. Their geometric mean where one was not measured at both, or each is not the faster at its own share."""
    tilts = []
    for share in shares:
        both = [each.tiles for each in points if each.share == share and all(tile in each.tiles for tile in tiles)]
        tilts.append(sum(math.log(times[tiles[0]] / times[tiles[1]]) for times in both) / len(both) if both else 0.0)
    below, above = shares
    place = tilts[0] / (tilts[0] - tilts[1]) if tilts[0] < 0 < tilts[1] else 0.5
    return below * (above / below) ** place
