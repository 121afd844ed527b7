"""Coefficients of ``cost_model`` from measurements, and what choosing by them costs on shapes that they have not seen. Needs numpy.

For fixed (decode / stream, slots, gathered) the formula is linear in launch, stream, move and token: least squares of relative errors with no
negative coefficient, exact by trying which of the four are 0. The fixed ones are tried on a grid. The best fit wins; the simplest of equals. Where
the device's read speed is known, no kernel reads much slower than that: at few tokens alone a launch's fixed part and its reading are hardly told
apart, and the times of more tokens that follow from a slow reading are wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.cost_model import Coefficients, KernelClass, predict, waves, work_of
from densemoe.runtime.tune import Candidate, Measurement
from densemoe.runtime.tune_cases import Case, geometric_mean
from densemoe.runtime.variant import Variant

__all__ = ["Fit", "Regret", "class_of", "fit", "fit_class", "held_out_regret", "regret"]

#: decode / stream: from decoding that is hidden behind reading to decoding that takes thirty times as long as reading.
RATIOS: Final = tuple(float(each) for each in np.geomspace(0.05, 30, 49))
SLOTS: Final = (0, 1, 2, 3, 4, 8, 12, 16)
LEAST_POINTS: Final = 5  # as many as there are coefficients
RIDGE: Final = 1e-12  # of unit columns: where two of them are the same
SLOWEST_READ: Final = 1.15  # a megabyte's time where reading is what limits, of that of the kernel that only reads
BETTER: Final = 0.98  # a more complicated form must lower the squared error by this factor


@dataclass(frozen=True)
class Fit:
    """Coefficients of a class, and how far they are off.

    Attributes:
        points: measurements behind them.
        error, worst: geometric mean and largest of max(T / T', T' / T) - 1 on those.
    """

    coefficients: Coefficients
    points: int
    error: float
    worst: float


@dataclass(frozen=True)
class Regret:
    """What choosing costs: time of the chosen over time of the fastest, minus 1.

    Attributes:
        cases: how many were judged.
        geomean, worst: over them.
        at: the worst case, in words.
    """

    cases: int
    geomean: float
    worst: float
    at: str = ""

    @classmethod
    def of(cls, found: Mapping[str, float]) -> Regret:
        """From time ratios by case."""
        if not found:
            return cls(0, 0.0, 0.0)
        at = max(found, key=lambda name: found[name])
        return cls(len(found), geometric_mean(found.values()) - 1, found[at] - 1, at)

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.cases} cases, geomean {self.geomean:.2%}, worst {self.worst:.2%}" + (f" ({self.at})" if self.cases else "")


def class_of(measured: Measurement) -> KernelClass:
    """The kernel class of a measurement."""
    return KernelClass.of(Variant.parse(measured.candidate.key), dict(measured.candidate.settings), measured.case.active)


def _least_squares(columns: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of each of some systems ``[systems, points, 4]``: (coefficients not negative that bring ``columns @ x`` nearest to 1, squared error)."""
    systems, points, count = columns.shape
    size = np.sqrt((columns**2).sum(axis=1, keepdims=True))
    scaled = columns / np.where(size > 0, size, 1)  # unit columns: the normal equations stay well conditioned
    gram, sums = scaled.transpose(0, 2, 1) @ scaled, scaled.sum(axis=1)
    best, lowest = np.zeros((systems, count)), np.full(systems, float(points))
    for width in range(1, count + 1):
        for used in itertools.combinations(range(count), width):
            own = gram[:, used][:, :, used] + RIDGE * np.eye(width)
            found = np.linalg.solve(own, sums[:, used, None])[:, :, 0]
            error = points - 2 * (found * sums[:, used]).sum(axis=1) + (found * (own @ found[:, :, None])[:, :, 0]).sum(axis=1)
            better = (found >= 0).all(axis=1) & (error < lowest)
            lowest = np.where(better, error, lowest)
            spread = np.zeros((systems, count))
            spread[:, used] = found
            best = np.where(better[:, None], spread, best)
    return best / np.where(size > 0, size, 1)[:, 0], lowest


def fit_class(kernel: KernelClass, measured: Sequence[Measurement], sm_count: int, read: float = math.inf) -> Fit | None:
    """Coefficients of one class from its measurements; None where there are too few of them.

    Args:
        read: microseconds a megabyte of the kernel that only reads.
    """
    points = [each for each in measured if each.sample is not None and each.passed]
    if len(points) < LEAST_POINTS:
        return None
    times = np.array([each.sample.microseconds for each in points if each.sample is not None])
    problems = [(each.case.problem(), each.case.shape.top_k) for each in points]
    tokens = np.array([float(problem.m) for problem, _ in problems])
    ratios = np.array(RATIOS)[:, None]
    best: tuple[float, Coefficients] | None = None
    for gathered in (False, True) if kernel.active else (False,):
        works = [work_of(problem, kernel.tile, gathered=gathered, top_k=top_k) for problem, top_k in problems]
        weights, decoded, moved = (np.array([getattr(each, name) for each in works]) for name in ("weights", "decoded", "moved"))
        for slots in SLOTS:
            idle = np.array([waves(each.tiles, slots * sm_count) for each in works])
            body = np.maximum(weights, ratios * (decoded * idle))
            columns = np.stack([np.ones_like(body), body, *(np.broadcast_to(each, body.shape) for each in (moved, tokens))], axis=2) / times[:, None]
            found, errors = _least_squares(columns)
            errors = errors + len(points) * (found[:, 1] > SLOWEST_READ * read)  # taken where nothing else is left
            at = int(np.argmin(errors))
            if best is None or errors[at] < best[0] * BETTER:
                launch, stream, move, token = (float(each) for each in found[at])
                best = float(errors[at]), Coefficients(launch, stream, stream * RATIOS[at], move, slots, gathered, token)
    assert best is not None
    coefficients = best[1]
    predicted = [predict(problem, kernel, coefficients, sm_count, top_k) for problem, top_k in problems]
    off = [float(max(a / b, b / a)) for a, b in zip(predicted, times, strict=True)]
    return Fit(coefficients, len(points), geometric_mean(off) - 1, max(off) - 1)


def fit(measured: Iterable[Measurement], sm_count: int, read: float = math.inf) -> dict[KernelClass, Fit]:
    """Coefficients of every class that has enough measurements; arguments as ``fit_class`` has them."""
    by_class: dict[KernelClass, list[Measurement]] = {}
    for each in measured:
        by_class.setdefault(class_of(each), []).append(each)
    fits = {kernel: fit_class(kernel, own, sm_count, read) for kernel, own in by_class.items()}
    return {kernel: found for kernel, found in fits.items() if found is not None}


def times_by_case(measured: Iterable[Measurement]) -> dict[Case, dict[Candidate, float]]:
    """Microseconds of everything that passed."""
    found: dict[Case, dict[Candidate, float]] = {}
    for each in measured:
        if each.sample is not None and each.passed:
            found.setdefault(each.case, {})[each.candidate] = each.sample.microseconds
    return found


def regret(cases: Mapping[Case, Mapping[Candidate, float]], choose: Callable[[Case, Mapping[Candidate, float]], Candidate | None]) -> Regret:
    """Regret of a way to choose.

    Args:
        cases: microseconds of every candidate, by case.
        choose: gives one of the case's candidates, or None where it does not choose (the case is not judged).
    """
    found = {}
    for case, times in cases.items():
        chosen = choose(case, times)
        if chosen is not None:
            found[f"{case.text}: {chosen.text}"] = times[chosen] / min(times.values())
    return Regret.of(found)


def by_model(fits: Mapping[KernelClass, Fit], sm_count: int) -> Callable[[Case, Mapping[Candidate, float]], Candidate | None]:
    """Chooses what the cost model says is fastest."""

    def choose(case: Case, times: Mapping[Candidate, float]) -> Candidate | None:
        problem, predicted = case.problem(), []
        for candidate in times:
            kernel = KernelClass.of(Variant.parse(candidate.key), dict(candidate.settings), case.active)
            if kernel in fits:
                # as at run time: what the router chooses is not known when a kernel is
                predicted.append((predict(problem, kernel, fits[kernel].coefficients, sm_count), candidate.text, candidate))
        return min(predicted, key=lambda each: each[:2])[2] if predicted else None

    return choose


def held_out_regret(measured: Sequence[Measurement], sm_count: int, read: float = math.inf) -> Regret:
    """Regret of the cost model on each shape, fitted without it: leave one (E, k, H, I) out."""
    found: dict[str, float] = {}
    shapes = {(each.case.shape.experts, each.case.shape.hidden, each.case.shape.intermediate) for each in measured}
    if len(shapes) < 2:
        return Regret.of({})

    def own(each: Measurement) -> Any:
        return (each.case.shape.experts, each.case.shape.hidden, each.case.shape.intermediate)

    for shape in sorted(shapes):
        choose = by_model(fit([each for each in measured if own(each) != shape], sm_count, read), sm_count)
        for case, times in times_by_case(each for each in measured if own(each) == shape).items():
            chosen = choose(case, times)
            if chosen is not None:
                found[f"{case.text}: {chosen.text}"] = times[chosen] / min(times.values())
    return Regret.of(found)
