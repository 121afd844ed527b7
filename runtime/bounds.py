"""The error bounds of the contract's section 9, in one place, by shape and never by variant; numpy arrays or torch tensors alike.

Rule 2: an accumulator lies within ``max(2**-14, n · 2**-23) · Σ|products|`` of the exact sum, n being the MMA instructions of the longest chain
times (1 + c) plus the float additions. n is taken for the shortest MMA in use (K 16), so that one bound serves every variant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, GROUP
from densemoe.runtime.reference import Fc1Result, Fc2Result, namespace

__all__ = ["TRUNCATION", "Report", "compare_exact", "compare_nvfp4", "compare_plain", "fc1_bound", "fc2_bound"]

Array = Any

#: The constant c of rule 2: what a tensor core's internal truncation adds per MMA, in units of 2**-23 of Σ|products|. See docs/numerics.md for
#: what was measured on an H200; for tcgen05 it is an assumption.
TRUNCATION: Final = 1.0
SHORTEST_MMA_K: Final = 16
UNIT: Final = 2.0**-23
LARGEST_EXEMPT_SHARE: Final = 50 / 10_000  # of bytes that may use rule 3's exemption
_HALF_ULP: Final = {"bf16": (2.0**-9, 2.0**-134), "f16": (2.0**-12, 2.0**-25), "f32": (2.0**-25, 2.0**-150)}
_LARGEST: Final = {"bf16": 3.3895313892515355e38, "f16": 65504.0, "f32": 3.4028234663852886e38}


@dataclass
class Report:
    """Result of a comparison.

    Attributes:
        elements: how many were compared.
        worst: the largest error divided by its bound, 0 where all were exact.
        mismatches: elements outside their bound.
        exemptions: bytes that differ from the reference's inside the bound (rule 3).
        detail: the worst element, in words.
    """

    elements: int
    worst: float = 0.0
    mismatches: int = 0
    exemptions: int = 0
    detail: str = ""
    parts: list[Report] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No element outside its bound, and the exemption not used too often."""
        few = self.exemptions <= max(1.0, LARGEST_EXEMPT_SHARE * self.elements)
        return self.mismatches == 0 and few and all(part.passed for part in self.parts)


def accumulator_bound(k: int, magnitude: Array) -> Array:
    """Rule 2 for one accumulator over ``k``."""
    chain = -(-k // SHORTEST_MMA_K) * (1 + TRUNCATION)
    return max(2.0**-14, chain * UNIT) * magnitude


def fc1_bound(result: Fc1Result, hidden: int) -> Array:
    """Bound of ``y`` before conversion: rule 2 carried through SwiGLU to first order, plus the approximate sigmoid's share."""
    xp = namespace(result.y)
    small = xp.exp(-xp.abs(result.gate))
    sigmoid = xp.where(result.gate >= 0, 1 / (1 + small), small / (1 + small))
    silu = result.gate * sigmoid
    slope = sigmoid * (1 + result.gate * (1 - sigmoid))
    carried = xp.abs(silu) * accumulator_bound(hidden, result.up_magnitude) + xp.abs(result.up * slope) * accumulator_bound(
        hidden, result.gate_magnitude
    )
    own = xp.abs(result.up * silu) * (2.0**-20 + xp.abs(result.gate) * 2.0**-22) + xp.abs(result.up * result.gate) * 2.0**-126
    bound = (carried + own) * xp.abs(result.post)
    return xp.where(result.post == 0, xp.zeros_like(bound), bound)


def fc2_bound(result: Fc2Result, experts: int, intermediate: int) -> Array:
    """Rule 2 for FC2's output before conversion."""
    chain = experts * -(-intermediate // SHORTEST_MMA_K) * (1 + TRUNCATION)
    return (chain + experts + 1) * UNIT * result.magnitude


def _worst(actual: Array, exact: Array, allowed: Array) -> Report:
    xp = namespace(exact)
    error = xp.abs(actual - exact)
    error = xp.where(xp.isnan(error), xp.full_like(error, float("inf")), error)
    ratio = xp.where(error == 0, xp.zeros_like(error), error / xp.where(allowed > 0, allowed, xp.full_like(allowed, 1e-300)))
    flat = ratio.reshape(-1)
    if flat.shape[0] == 0:
        return Report(0)
    at = int(flat.argmax())
    worst = float(flat[at])
    row, column = divmod(at, exact.shape[1])
    detail = (
        f"[{row}, {column}]: got {float(actual.reshape(-1)[at])!r}, exact {float(exact.reshape(-1)[at])!r},"
        f" allowed ±{float(allowed.reshape(-1)[at]):.3g}"
    )
    return Report(int(flat.shape[0]), worst, int((flat > 1).sum()), 0, detail)


def compare_plain(actual: Array, exact: Array, bound: Array, dtype: str) -> Report:
    """An output in bf16, f16 or f32 against the exact value: the bound plus half an ulp; beyond the largest value Inf is right.

    Args:
        actual: the kernel's output widened to float64, ``[M, N]``.
        exact, bound: float64 ``[M, N]``.
    """
    xp = namespace(exact)
    relative, absolute = _HALF_ULP[dtype]
    allowed = bound + (xp.abs(exact) + bound) * relative * 2 + absolute
    overflow = xp.isinf(actual) & (xp.abs(exact) + allowed >= _LARGEST[dtype]) & (actual * exact > 0)
    return _worst(xp.where(overflow, exact, actual), exact, allowed)


def compare_exact(actual: Array, exact: Array) -> Report:
    """Rule 1: equal bit for bit; ``exact`` is already rounded to the output dtype."""
    return _worst(actual, exact, actual * 0)


def _constant(like: Array, values: np.ndarray[Any, Any]) -> Array:
    xp = namespace(like)
    return values if xp is np else xp.tensor(values, dtype=xp.float64, device=like.device)


def _nearest(magnitude: Array, table: Array) -> Array:
    """Index of the value of ``table`` nearest to ``magnitude``, ties to even, saturating."""
    xp = namespace(magnitude)
    clipped = xp.where(magnitude > table[-1], xp.zeros_like(magnitude) + table[-1], magnitude)
    upper = xp.searchsorted(table, clipped)
    upper = xp.where(upper < 1, xp.ones_like(upper), upper)
    upper = xp.where(upper > len(table) - 1, xp.zeros_like(upper) + (len(table) - 1), upper)
    low, high = clipped - table[upper - 1], table[upper] - clipped
    return xp.where((high < low) | ((high == low) & (upper % 2 == 0)), upper, upper - 1)


def compare_nvfp4(codes: Array, scales: Array, exact: Array, bound: Array, multiplier: float) -> Report:
    """Rule 3: NVFP4 output against the exact values.

    Args:
        codes: one code a byte, ``[M, N]``.
        scales: row-major scale bytes ``[M, N/16]``.
        exact, bound: float64 ``[M, N]``.
        multiplier: ``output_multiplier``.
    """
    xp = namespace(exact)
    m, n = exact.shape
    e4m3, e2m1 = _constant(exact, E4M3_VALUES[:127]), _constant(exact, E2M1_VALUES[:8])
    groups, bounds = exact.reshape(m, n // GROUP, GROUP), bound.reshape(m, n // GROUP, GROUP)
    low = (xp.abs(groups) - bounds).max(2) if xp is np else (xp.abs(groups) - bounds).amax(2)
    high = (xp.abs(groups) + bounds).max(2) if xp is np else (xp.abs(groups) + bounds).amax(2)
    amax = xp.abs(groups).max(2) if xp is np else xp.abs(groups).amax(2)
    rounding = 2.0**-22  # two float32 products and f32(1/6)
    ideal = _nearest(amax / 6 * multiplier, e4m3)
    least = _nearest(xp.where(low > 0, low, low * 0) / 6 * multiplier * (1 - rounding), e4m3)
    most = _nearest(high / 6 * multiplier * (1 + rounding), e4m3)
    stored = scales.reshape(m, n // GROUP)
    stored = stored.astype(np.int64) if xp is np else stored.long()
    wrong = (stored < least) | (stored > most)
    report = Report(m * (n // GROUP), 0.0, int(wrong.sum()), int(((stored != ideal) & ~wrong).sum()))
    if report.mismatches:
        row, column = (int(i) for i in (np.argwhere(wrong)[0] if xp is np else wrong.nonzero()[0]))
        report.detail = f"scale [{row}, {column}]: got {int(stored[row, column])}, allowed {int(least[row, column])}–{int(most[row, column])}"
    # codes: against the scale byte actually stored
    safe = xp.where(stored > 126, stored * 0, stored)
    factor = xp.where(safe == 0, amax * 0, multiplier / xp.where(safe == 0, amax * 0 + 1, e4m3[safe]))
    scaled = groups * factor[:, :, None]
    slack = bounds * factor[:, :, None] + xp.abs(scaled) * 2.0**-20  # rcp.approx, two products
    got = codes.reshape(m, n // GROUP, GROUP)
    got = got.astype(np.int64) if xp is np else got.long()
    value = xp.where(got >= 8, -e2m1[got % 8], e2m1[got % 8])
    bottom, top = (_signed(_nearest(xp.abs(edge), e2m1), edge, e2m1) for edge in (scaled - slack, scaled + slack))
    nearest = _signed(_nearest(xp.abs(scaled), e2m1), scaled, e2m1)
    tie = _is_tie(xp, scaled, e2m1)
    outside = ((value < bottom) | (value > top)) & ~(tie & (xp.abs(value - scaled) <= xp.abs(nearest - scaled) * (1 + 1e-9)))
    codes_report = Report(m * n, 0.0, int(outside.sum()), int(((value != nearest) & ~outside).sum()))
    if codes_report.mismatches:
        row, group, column = (int(i) for i in (np.argwhere(outside)[0] if xp is np else outside.nonzero()[0]))
        codes_report.detail = (
            f"code [{row}, {group * GROUP + column}]: got {float(value[row, group, column])}, exact {float(scaled[row, group, column])!r}"
            f" ± {float(slack[row, group, column]):.3g} over scale byte {int(stored[row, group])}"
        )
    report.parts.append(codes_report)
    report.worst = float(max(report.mismatches, codes_report.mismatches) > 0)
    report.detail = report.detail or codes_report.detail
    return report


def _signed(index: Array, like: Array, table: Array) -> Array:
    xp = namespace(like)
    return xp.where(like < 0, -table[index], table[index])


def _is_tie(xp: Any, x: Array, table: Array) -> Array:
    magnitude = xp.abs(x)
    result = magnitude < 0
    for low, high in zip(table[:-1], table[1:], strict=True):
        result = result | (magnitude == (low + high) / 2)
    return result
