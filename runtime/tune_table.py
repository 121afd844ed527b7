"""Measurements → a selection table: which variant in every bucket of the measured shapes, the cost model for the others, how good both are.

    measured bucket   the fastest that passed; the one before it stays where it is as fast within KEEP
    between two       times interpolated along the cost model: modelled
    form and tile     of a layer, by M and an expert's rows: tune_grouping
    beyond the last   the last one's: modelled
    other shapes      the cost model (tune_fit), then the rules of the table that stood before

Quality stands in the table and is computed on what was measured: regret of the cost model on shapes held out of its fit, of the interpolation on
buckets held out of it, cliffs and falls over M. Needs numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.canonical import write_atomically
from densemoe.runtime.cost_model import KernelClass, predict
from densemoe.runtime.problem import LARGEST_DIMENSION
from densemoe.runtime.select import bucket, shape_name
from densemoe.runtime.tune import Candidate, Measurement
from densemoe.runtime.tune_cases import PEAK_FLOPS, Case, Cliff, Shape, cliffs, falls, flops, geometric_mean, roofline
from densemoe.runtime.tune_fit import Fit, Regret, fit, held_out_regret, regret, times_by_case
from densemoe.runtime.tune_grouping import grouping_of, held_out_forms, layer_points, layer_regret, layer_series
from densemoe.runtime.variant import Variant

__all__ = ["KEEP", "between_regret", "build", "interpolated", "quality", "series", "write"]

KEEP: Final = 0.01  # a variant stays from bucket to bucket while it is within this of the fastest
BETWEEN: Final = tuple(bucket(m) for m in (*range(8, 129, 8), *range(256, 1025, 128)))

#: (op, E, H, I, k, a_dtype, c_dtype, active, group_tile)
Group = tuple[str, int, int, int, int, str, str, bool, int]


def group_of(case: Case) -> Group:
    """What one row of a table is for."""
    shape = case.shape
    return (case.op, shape.experts, shape.hidden, shape.intermediate, shape.top_k, case.a_dtype, case.c_dtype, case.active, case.group_tile)


def _case_of(group: Group, m: int) -> Case:
    """A case of a group."""
    op, experts, hidden, intermediate, top_k, a_dtype, c_dtype, active, tile = group
    return Case(op, Shape("", experts, top_k, hidden, intermediate), m, a_dtype, c_dtype, active, tile)


def _times(measured: Iterable[Measurement]) -> dict[Group, dict[int, dict[Candidate, float]]]:
    """Microseconds by group, M and candidate."""
    found: dict[Group, dict[int, dict[Candidate, float]]] = {}
    for case, times in times_by_case(measured).items():
        found.setdefault(group_of(case), {})[case.m] = dict(times)
    return found


def _by_bucket(times: Mapping[int, Mapping[Candidate, float]]) -> dict[int, dict[Candidate, float]]:
    """Over each bucket, how far a candidate is from the fastest: geometric mean over the M that were measured in it, of those measured at all."""
    grouped: dict[int, list[Mapping[Candidate, float]]] = {}
    for m, own in sorted(times.items()):
        grouped.setdefault(bucket(m), []).append(own)
    found = {}
    for end, parts in grouped.items():
        everywhere = set.intersection(*(set(part) for part in parts))
        found[end] = {each: geometric_mean(part[each] / min(part.values()) for part in parts) for each in everywhere}
    return found


#: Microseconds of a candidate at an M by the cost model, None where it does not know the candidate
Predicted = Callable[[Candidate, int], "float | None"]


def interpolated(times: Mapping[int, Mapping[Candidate, float]], m: int, predicted: Predicted = lambda candidate, m: None) -> dict[Candidate, float]:
    """Microseconds at an M between two measured ones, of candidates measured at both.

    The ratio of measured to predicted time is interpolated, its logarithm linearly in log M, so that the steps that the cost model knows (a pass
    more over the weights) stay steps; the times themselves for what it does not know.
    """
    below, above = max(each for each in times if each <= m), min(each for each in times if each >= m)
    if below == above:
        return dict(times[below])
    share = math.log(m / below) / math.log(above / below)
    found = {}
    for each in times[below]:
        if each in times[above]:
            here, low, high = predicted(each, m), predicted(each, below), predicted(each, above)
            if here is None or low is None or high is None:
                here = low = high = 1.0
            found[each] = here * (times[below][each] / low) ** (1 - share) * (times[above][each] / high) ** share
    return found


def _prediction(fits: Mapping[KernelClass, Fit], sm_count: int, group: Group) -> Predicted:
    active, example = group[7], _case_of(group, 1)

    def predicted(candidate: Candidate, m: int) -> float | None:
        kernel = KernelClass.of(Variant.parse(candidate.key), dict(candidate.settings), active)
        if kernel not in fits:
            return None
        return predict(replace(example, m=m).problem(), kernel, fits[kernel].coefficients, sm_count, example.shape.top_k) or None

    return predicted


def choose(
    times: Mapping[int, Mapping[Candidate, float]], predicted: Predicted = lambda candidate, m: None
) -> list[tuple[int, Candidate, bool]]:
    """(last bucket, candidate, measured) in ascending order, to the last measured bucket."""
    scores = _by_bucket(times)
    chosen: list[tuple[int, Candidate, bool]] = []
    before: Candidate | None = None
    for end in sorted({*scores, *(each for each in BETWEEN if min(scores) < each < max(scores))}):
        measured = end in scores
        own = scores[end] if measured else interpolated(times, end, predicted)
        if not own:
            continue
        fastest = min(sorted(own, key=lambda each: each.text), key=lambda each: own[each])
        if before is None or before not in own or own[before] > own[fastest] * (1 + KEEP):
            before = fastest
        chosen.append((end, before, measured))
    return chosen


def between_regret(measured: Sequence[Measurement], sm_count: int, read: float = math.inf) -> Regret:
    """Regret of the interpolation: each M but the first and last, chosen for from the others, which the cost model was fitted to alone."""
    by_group = _times(measured)
    fits = {m: fit([each for each in measured if each.case.m != m], sm_count, read) for m in {each.case.m for each in measured}}

    def pick(case: Case, times: Mapping[Candidate, float]) -> Candidate | None:
        group = group_of(case)
        others = {m: own for m, own in by_group[group].items() if m != case.m}
        if not (others and min(others) < case.m < max(others)):
            return None
        guessed = interpolated(others, case.m, _prediction(fits[case.m], sm_count, group))
        guessed = {each: us for each, us in guessed.items() if each in times}
        return min(sorted(guessed, key=lambda each: each.text), key=lambda each: guessed[each]) if guessed else None

    return regret(times_by_case(measured), pick)


def series(measured: Sequence[Measurement]) -> dict[Group, tuple[dict[int, float], dict[int, float], dict[int, int]]]:
    """Of each group, by M: microseconds of what the table chooses, its spread, and the bytes of weights read."""
    samples = {(group_of(each.case), each.case.m, each.candidate): each for each in measured if each.sample is not None and each.passed}
    found: dict[Group, tuple[dict[int, float], dict[int, float], dict[int, int]]] = {}
    for group, times in _times(measured).items():
        chosen = {end: candidate for end, candidate, _ in choose(times)}
        own: tuple[dict[int, float], dict[int, float], dict[int, int]] = ({}, {}, {})
        for m in sorted(times):
            each = samples.get((group, m, chosen[bucket(m)]))
            if each is not None and each.sample is not None:
                own[0][m], own[1][m], own[2][m] = each.sample.microseconds, each.sample.spread, each.weight_bytes
        found[group] = own
    return found


def _roofline_of(group: Group, m: int, nbytes: int, arch: str, bandwidth: float) -> float:
    return roofline(nbytes, flops(_case_of(group, m)), bandwidth, PEAK_FLOPS[arch])


def _read(provenance: Mapping[str, Any]) -> float:
    """Microseconds a megabyte of the kernel that only reads."""
    return 1e12 / float(provenance["read_bytes_per_second"])


def quality(measured: Sequence[Measurement], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Regrets, cliffs and falls of what ``build`` makes of the same measurements.

    A tile of the grouped kernels is judged where the layer takes it: cliffs and falls are those of FC1 and FC2 in the form that the table takes.
    """
    found: dict[str, Any] = {}
    points = layer_points(measured)
    grouping = grouping_of(points)
    regrets = [
        ("other_shapes", held_out_regret(measured, provenance["sm_count"], _read(provenance))),
        ("between_buckets", between_regret(measured, provenance["sm_count"], _read(provenance))),
    ]
    if grouping is not None:
        regrets += [("forms", layer_regret(points, grouping)), ("forms_other_shapes", held_out_forms(points))]
    for name, each in regrets:
        found[name] = {"cases": each.cases, "geomean": round(each.geomean, 5), "worst": round(each.worst, 5), "at": each.at}
    steep: list[tuple[str, Cliff]] = []
    fell: list[tuple[str, Cliff]] = []
    arch, bandwidth = provenance["arch"], provenance["read_bytes_per_second"]
    for group, (times, spreads, nbytes) in series(measured).items():
        if group[-1]:
            continue
        rooflines = {m: _roofline_of(group, m, nbytes[m], arch, bandwidth) for m in times}
        steep += [(group_text(group), each) for each in cliffs(times, rooflines)]
        fell += [(group_text(group), each) for each in falls(times, spreads)]
    for shape, own in layer_series(points, grouping).items():
        times = {m: us for m, (us, _, _) in own.items()}
        rooflines = {m: roofline(size, operations, bandwidth, PEAK_FLOPS[arch]) for m, (_, size, operations) in own.items()}
        steep += [(f"FC1 + FC2 {shape}", each) for each in cliffs(times, rooflines)]
        fell += [(f"FC1 + FC2 {shape}", each) for each in falls(times)]
    for name, pairs in (("cliffs", steep), ("falls", fell)):
        found[name] = [{"group": text, "m": each.m, "next_m": each.next_m, "change": round(each.change, 4)} for text, each in pairs]
    return found


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``quality`` stands in the table: of cliffs and falls how many, and the worst."""
    short = dict(found)
    for name in ("cliffs", "falls"):
        worst = max(found[name], key=lambda each: abs(each["change"]), default=None)
        short[name] = {"count": len(found[name]), "worst": worst}
    return short


def group_text(group: Group) -> str:
    return f"{_name_of(group)} k {group[4]}"


def _name_of(group: Group) -> str:
    """What a table calls it."""
    op, experts, hidden, intermediate, _, a_dtype, c_dtype, active, tile = group
    return shape_name(op, experts, hidden, intermediate, a_dtype, c_dtype, active, tile)


def build(measured: Sequence[Measurement], provenance: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The table.

    Args:
        provenance: ``bench_device.describe`` with ``read_bytes_per_second``.
        before: the table that stands: its rules serve ops and dtypes that were not measured, its ``grouping`` where either form was not, and
            what of it is chosen by whole layers (``sorts_to``).
    """
    keys: list[list[Any]] = []
    index: dict[Candidate, int] = {}

    def number(candidate: Candidate) -> int:
        if candidate not in index:
            index[candidate] = len(keys)
            keys.append([candidate.key, dict(candidate.settings)])
        return index[candidate]

    samples = {(group_of(each.case), each.case.m, each.candidate): each.sample for each in measured}
    stands = before.get("grouping")
    grouping = grouping_of(layer_points(measured)) or stands
    if grouping is not None and stands is not None:
        grouping = {**{name: value for name, value in stands.items() if name == "sorts_to"}, **grouping}
    fits = fit(measured, provenance["sm_count"], _read(provenance))
    shapes: dict[str, list[list[Any]]] = {}
    for group, times in sorted(_times(measured).items()):
        rows: list[list[Any]] = []
        for end, candidate, was_measured in choose(times, _prediction(fits, provenance["sm_count"], group)):
            if not was_measured:
                if rows and len(rows[-1]) == 2 and rows[-1][1] == number(candidate):
                    rows[-1][0] = end
                else:
                    rows.append([end, number(candidate)])
                continue
            sample = samples[group, max(m for m in times if bucket(m) == end), candidate]
            assert sample is not None
            rows.append([end, number(candidate), round(sample.microseconds, 3), round(sample.spread, 4), sample.runs])
        rows.append([LARGEST_DIMENSION, rows[-1][1]])
        shapes[_name_of(group)] = rows
    classes = [
        {
            **kernel.to_json(),
            **{name: round(value, 6) if isinstance(value, float) else value for name, value in vars(found.coefficients).items()},
            "points": found.points,
            "error": round(found.error, 4),
            "worst": round(found.worst, 4),
        }
        for kernel, found in sorted(fits.items(), key=lambda each: repr(each[0]))
    ]
    return {
        "schema": before["schema"],
        "arch": provenance["arch"],
        "provenance": dict(provenance),
        "quality": _short(quality(measured, provenance)),
        "columns": ["m_to", "key", "microseconds", "spread", "runs"],
        "keys": keys,
        "shapes": shapes,
        "model": {"sm_count": provenance["sm_count"], "classes": classes},
        **({"grouping": grouping} if grouping is not None else {}),
        "rules": list(before["rules"]),
    }


def write(path: str | Path, table: Mapping[str, Any]) -> None:
    """Writes a table, one row a line, whole or not at all."""
    lines = ["{"]
    for name, value in table.items():
        last = name == list(table)[-1]
        if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
            body = ",\n".join(f"    {json.dumps(each)}" for each in value)
            lines.append(f"  {json.dumps(name)}: [\n{body}\n  ]{'' if last else ','}")
        elif name == "shapes":
            body = ",\n".join(f"    {json.dumps(each)}: {json.dumps(rows)}" for each, rows in value.items())
            lines.append(f"  {json.dumps(name)}: {{\n{body}\n  }}{'' if last else ','}")
        elif name == "model":
            body = ",\n".join(f"    {json.dumps(each)}" for each in value["classes"])
            lines.append(f'  "model": {{"sm_count": {value["sm_count"]}, "classes": [\n{body}\n  ]}}{"" if last else ","}')
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}{'' if last else ','}")
    lines.append("}\n")
    write_atomically(Path(path), "\n".join(lines).encode())
