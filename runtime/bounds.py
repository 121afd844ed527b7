"""The error bounds of the contract's section 9, in one place, by shape and never by variant; numpy arrays or torch tensors alike.

Rule 1 (exact data): ``exact=True``, bit for bit. Rule 2 (general data): an accumulator lies within ``max(2**-14, n · 2**-23) · Σ|products|`` of
the exact sum; SwiGLU carries that to first order. Rule 3 (NVFP4 output): scale bytes and codes may differ from the exact ones only where a
rounding boundary lies within the bound, and such uses are counted. docs/numerics.md derives every constant.

n is taken for the longest chain that a shape allows: MMA steps of K 16, the shortest in use, and float32 additions of partial sums over
K 128, the smallest that any kernel adds. A variant with longer steps or fewer partial sums is held to the same bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from densemoe.runtime.arrays import Array, Indices, constants, indices, long, namespace, power_of_two, sigmoid, to_host, unpack, untile
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import k64_positions
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, GROUP, convert, widen
from densemoe.runtime.problem import Problem
from densemoe.runtime.reference import Fc1Result, Fc2Result

__all__ = [
    "TRUNCATION",
    "Report",
    "accumulator_bound",
    "combine",
    "compare_exact",
    "compare_fc1",
    "compare_fc2",
    "compare_nvfp4",
    "compare_plain",
    "fc1_bound",
    "fc2_bound",
    "half_ulp",
    "truncation_constant",
]

UNIT: Final = 2.0**-23
LEAST_ACCUMULATOR_BOUND: Final = 2.0**-14
SHORTEST_MMA_K: Final = 16  # mma.sync m16n8k16 and wgmma on sm_90a; tcgen05 has 64
SHORTEST_PARTIAL_K: Final = 128  # a superblock of sm_90a, where stream-K spans are cut; tcgen05 tiles have 256
SIGMOID_RELATIVE: Final = 2.0**-20
SIGMOID_PER_GATE: Final = 2.0**-22
SIGMOID_UNDERFLOW: Final = 2.0**-126
#: Relative error of what NVFP4 conversion computes in float32 after y: f32(1/6) and two products for a scale; rcp.approx (2**-23) and two
#: products (2**-24 each) for a code.
SCALE_ARITHMETIC: Final = 2.0**-22
CODE_ARITHMETIC: Final = 2.0**-22
LARGEST_EXEMPT_SHARE: Final = 50 / 10_000  # of compared bytes that may use rule 3's exemption
SATURATED_GATE: Final = 32.0  # e**-32 is below half an ulp of 1: any ex2.approx and rcp.approx give a sigmoid of exactly 1


def truncation_constant(kept_bits: int, addends: int = 17) -> float:
    """c of rule 2: error of one tensor-core step in units of 2**-23 of Σ|products|, beyond the rounding of its result.

    A step aligns its addends (16 products and the accumulator) to the largest and cuts each off ``kept_bits`` below float32's last place, so
    that each loses less than 2**-kept_bits units.
    """
    return addends * 2.0**-kept_bits


#: Two bits are kept below float32's last place: measured on an H200 (docs/numerics.md); for tcgen05 an assumption.
TRUNCATION: Final = truncation_constant(2)

#: dtype → (significand bits, exponent of the least normal value, largest value, saturating).
_FORMATS: Final[Mapping[str, tuple[int, int, float, bool]]] = {
    "bf16": (8, -126, float.fromhex("0x1.fep127"), False),
    "f16": (11, -14, 65504.0, False),
    "f32": (24, -126, float.fromhex("0x1.fffffep127"), False),
    "e4m3": (4, -6, 448.0, True),
    "e5m2": (3, -14, 57344.0, True),
}


@dataclass
class Report:
    """Result of a comparison.

    Attributes:
        elements: how many were compared.
        worst: the largest error divided by its bound, 0 where all were exact. At most 1 where nothing mismatches.
        mismatches: elements outside their bound.
        exemptions: bytes or codes that differ from the exact ones inside the bound (rule 3).
        detail: the worst element, in words with its values.
        parts: further reports that belong to it, for example of codes beside scales.
        name: what was compared.
        unspecified: elements that the contract leaves open (NaN or Inf reached them), not compared.
        nbytes: bytes that ``elements`` take in memory; the exemption's share is counted in bytes. 0 where rule 3 does not apply.
    """

    elements: int
    worst: float = 0.0
    mismatches: int = 0
    exemptions: int = 0
    detail: str = ""
    parts: list[Report] = field(default_factory=list)
    name: str = ""
    unspecified: int = 0
    nbytes: float = 0.0

    def _all(self) -> list[Report]:
        return [self, *(each for part in self.parts for each in part._all())]

    @property
    def passed(self) -> bool:
        """No element outside its bound, and the exemption used for at most 50 in 10,000 bytes (once where there are fewer than 200)."""
        every = self._all()
        allowed = max(1.0, LARGEST_EXEMPT_SHARE * sum(each.nbytes for each in every))
        return not any(each.mismatches for each in every) and sum(each.exemptions for each in every) <= allowed

    @property
    def text(self) -> str:
        """One line a part: PASS or FAIL, counts, the worst element with its values."""
        lines = []
        for each in self._all():
            line = f"{each.name or 'compared'}: {each.elements} elements, worst error {each.worst:.3g} of its bound"
            for count, what in ((each.mismatches, "outside"), (each.exemptions, "exempt"), (each.unspecified, "left open")):
                line += f", {count} {what}" if count else ""
            lines.append(line + (f"; {each.detail}" if each.detail else ""))
        return f"{'PASS' if self.passed else 'FAIL'} " + "\n  ".join(lines)


def combine(reports: Iterable[Report], name: str = "") -> Report:
    """One Report of many cases: sums, and the detail of the worst. The exemption's share is then that of all cases together."""
    every = [each for report in reports for each in report._all()]
    if not every:
        return Report(0, name=name)
    worst = max(every, key=lambda each: each.worst)
    return Report(
        sum(each.elements for each in every),
        worst.worst,
        sum(each.mismatches for each in every),
        sum(each.exemptions for each in every),
        worst.detail,
        name=name,
        unspecified=sum(each.unspecified for each in every),
        nbytes=sum(each.nbytes for each in every),
    )


# ---- bounds


def _ceil_div(value: int, unit: int) -> int:
    return -(-value // unit)


def accumulator_bound(k: int, magnitude: Array, truncation: float = TRUNCATION) -> Array:
    """Rule 2 for one accumulator over ``k``.

    Args:
        magnitude: Σ|products|.
        truncation: c.
    """
    n = _ceil_div(k, SHORTEST_MMA_K) * (1 + truncation) + _ceil_div(k, SHORTEST_PARTIAL_K)
    return max(LEAST_ACCUMULATOR_BOUND, n * UNIT) * magnitude


def fc1_bound(result: Fc1Result, hidden: int, truncation: float = TRUNCATION) -> Array:
    """Bound of ``y`` before conversion: rule 2 carried through SwiGLU to first order, plus the approximate sigmoid's share."""
    xp = namespace(result.y)
    with np.errstate(all="ignore"):
        sigma = sigmoid(result.gate)
        silu, slope = result.gate * sigma, sigma * (1 + result.gate * (1 - sigma))
        up, gate = (accumulator_bound(hidden, each, truncation) for each in (result.up_magnitude, result.gate_magnitude))
        carried = xp.abs(silu) * up + xp.abs(result.up * slope) * gate
        own = xp.abs(result.up * silu) * (SIGMOID_RELATIVE + xp.abs(result.gate) * SIGMOID_PER_GATE)
        own = own + xp.abs(result.up * result.gate) * SIGMOID_UNDERFLOW
        bound = (carried + own) * xp.abs(result.post)
    return xp.where(result.post == 0, xp.zeros_like(bound), bound)


def fc2_bound(result: Fc2Result, experts: int, intermediate: int, truncation: float = TRUNCATION) -> Array:
    """Rule 2 for FC2's output before conversion: ``(n + active experts + 1) · 2**-23 · Σ_e |alpha|·Σ|products|``.

    With an alpha per expert an accumulator holds one expert's terms; under a scalar alpha it may run through all of them.
    """
    steps = _ceil_div(intermediate, SHORTEST_MMA_K) * (experts if result.scalar else 1)
    n = steps * (1 + truncation) + result.active * _ceil_div(intermediate, SHORTEST_PARTIAL_K)
    return (n + result.active + 1) * UNIT * result.magnitude


def half_ulp(magnitude: Array, dtype: str) -> Array:
    """Half a unit in the last place of ``dtype`` at ``magnitude`` (>= 0), subnormals included.

    Raises:
        ProblemError: an unknown dtype.
    """
    bits, least, _, _ = _format(dtype)
    xp = namespace(magnitude)
    _, exponent = xp.frexp(magnitude)  # magnitude in [2**(exponent - 1), 2**exponent)
    place = exponent - 1
    place = xp.where((place < least) | (magnitude == 0), xp.zeros_like(place) + least, place)
    return power_of_two(place - bits)


def _format(dtype: str) -> tuple[int, int, float, bool]:
    if dtype not in _FORMATS:
        raise ProblemError(f"dtype={dtype!r}: use one of {', '.join(_FORMATS)}")
    return _FORMATS[dtype]


# ---- plain outputs


def _worst(actual: Array, exact: Array, allowed: Array, specified: Array, name: str) -> Report:
    xp = namespace(exact)
    with np.errstate(all="ignore"):
        error = xp.abs(actual - exact)
        error = xp.where(xp.isnan(error), xp.full_like(error, float("inf")), error)
        error = xp.where(actual == exact, xp.zeros_like(error), error)  # Inf equals Inf
        error = xp.where(specified, error, xp.zeros_like(error))
        floor = xp.full_like(allowed, 1e-300)  # an exact 0 allows nothing but 0
        ratio = xp.where(error == 0, xp.zeros_like(error), error / xp.where(allowed > 0, allowed, floor))
    flat = ratio.reshape(-1)
    count, compared = int(flat.shape[0]), int(specified.sum())
    if compared == 0:
        return Report(0, name=name, unspecified=count)
    at = int(flat.argmax())
    row, column = divmod(at, int(exact.shape[1]))
    values = [float(each.reshape(-1)[at]) for each in (actual, exact, allowed)]
    detail = f"[{row}, {column}]: got {values[0]!r}, exact {values[1]!r}, allowed ±{values[2]:.3g}"
    return Report(compared, float(flat[at]), int((flat > 1).sum()), 0, detail, name=name, unspecified=count - compared)


def compare_plain(actual: Array, exact: Array, bound: Array, dtype: str, *, name: str = "c") -> Report:
    """A plain output against the exact value: the bound plus half an ulp. Beyond the largest value f32, f16 and bf16 give Inf, fp8 saturates.

    Where ``exact`` is NaN or Inf the contract leaves the value open (section 2): counted, not compared.

    Args:
        actual: the kernel's output widened to float64, ``[M, N]``.
        exact, bound: float64 ``[M, N]``.
        dtype: of the output.
    """
    _, _, largest, saturating = _format(dtype)
    xp = namespace(exact)
    specified = xp.isfinite(exact)
    with np.errstate(all="ignore"):
        target = exact
        if saturating:
            target = xp.where(xp.abs(exact) > largest, xp.sign(exact) * largest, exact)
        reach = xp.where(specified, xp.abs(exact) + bound, xp.zeros_like(exact))
        capped = xp.where(reach > largest, xp.zeros_like(reach) + largest, reach)
        allowed = bound + half_ulp(capped, dtype)
        if not saturating:
            # rounding to nearest gives Inf from half an ulp beyond the largest value on
            infinite = xp.isinf(actual) & (reach >= largest + float(half_ulp(np.array([largest]), dtype)[0])) & (actual * exact > 0)
            actual = xp.where(infinite, exact, actual)
    return _worst(actual, target, allowed, specified, name)


def compare_exact(actual: Array, exact: Array, *, name: str = "c") -> Report:
    """Rule 1: equal bit for bit; ``exact`` is already rounded to the output dtype. Zeros of either sign are equal."""
    xp = namespace(exact)
    return _worst(actual, exact, xp.zeros_like(exact), ~xp.isnan(exact), name)


# ---- NVFP4 outputs


def _nearest(magnitude: Array, table: Array) -> Array:
    """Index of the value of ``table`` nearest to ``magnitude``, ties to even, saturating; int64."""
    xp = namespace(magnitude)
    clipped = xp.where(magnitude > table[-1], xp.zeros_like(magnitude) + table[-1], magnitude)
    upper = xp.searchsorted(table, clipped)
    upper = xp.where(upper < 1, xp.ones_like(upper), upper)
    upper = xp.where(upper > len(table) - 1, xp.zeros_like(upper) + (len(table) - 1), upper)
    low, high = clipped - table[upper - 1], table[upper] - clipped
    return xp.where((high < low) | ((high == low) & (upper % 2 == 0)), upper, upper - 1)


def _amax(x: Array) -> Array:
    return x.max(2) if isinstance(x, np.ndarray) else x.amax(2)


def _needed(xp: Any, value: Array, low: Array, high: Array, below: Array, above: Array) -> Array:
    """Share of its slack that ``value`` needs to come into [low, high]: it may move down by ``below``, up by ``above``."""
    up = xp.where(value < low, (low - value) / xp.where(above > 0, above, xp.full_like(above, 1e-300)), xp.zeros_like(value))
    down = xp.where(value > high, (value - high) / xp.where(below > 0, below, xp.full_like(below, 1e-300)), xp.zeros_like(value))
    return xp.where(up > down, up, down)


def compare_nvfp4(codes: Array, scales: Array, exact: Array, bound: Array, multiplier: float, *, name: str = "c") -> Report:
    """Rule 3: NVFP4 output against the exact values. The Report is of the scale bytes, its part of the codes.

    A group of 16 into which NaN or Inf came is left open (section 2): counted, not compared.

    Args:
        codes: one code a byte, ``[M, N]``.
        scales: row-major scale bytes ``[M, N/16]``.
        exact, bound: float64 ``[M, N]``; a bound of 0 leaves only the conversion's own arithmetic.
        multiplier: ``output_multiplier``.
    """
    xp = namespace(exact)
    m, n = (int(size) for size in exact.shape)
    groups, bounds = exact.reshape(m, n // GROUP, GROUP), bound.reshape(m, n // GROUP, GROUP)
    finite = xp.isfinite(groups) & xp.isfinite(bounds)
    specified = finite.all(2)
    groups, bounds = (xp.where(specified[:, :, None], each, xp.zeros_like(each)) for each in (groups, bounds))
    stored = long(scales).reshape(m, n // GROUP)
    with np.errstate(all="ignore"):
        scale_report = _compare_scales(xp, stored, groups, bounds, specified, multiplier)
        got = long(codes).reshape(m, n // GROUP, GROUP)
        scale_report.parts.append(_compare_codes(xp, got, stored, groups, bounds, specified, multiplier))
    scale_report.name, scale_report.parts[0].name = f"{name}.scales", f"{name}.codes"
    return scale_report


def _coded(values: Array, exact: Array, multiplier: float) -> tuple[Array, Array]:
    """(codes, one a byte, ``[M, N]``; scale bytes ``[M, N/16]``) that decoded NVFP4 output stands for: under the scale of the exact group, else under
    one of its neighbours. A group of which no such scale makes codes has the scale byte −1, which no rule allows.

    Args:
        values, exact: float64 ``[M, N]``.
    """
    xp = namespace(exact)
    m, n = (int(size) for size in exact.shape)
    got, groups = (each.reshape(m, n // GROUP, GROUP) for each in (values, exact))
    table, of_code = constants(exact, E4M3_VALUES[:127]), constants(exact, E2M1_VALUES[:8])
    ideal = _nearest(_amax(xp.abs(xp.where(xp.isfinite(groups), groups, xp.zeros_like(groups)))) / 6 * multiplier, table)
    codes, scales = long(xp.zeros_like(got)), xp.zeros_like(ideal) - 1
    for step in (0, -1, 1):
        byte = ideal + step
        byte = xp.where((byte < 0) | (byte > 126), ideal, byte)
        scale = table[byte][:, :, None]
        magnitude = _nearest(xp.abs(got) / xp.where(scale > 0, scale, xp.ones_like(scale)), of_code)
        fits = (of_code[magnitude] * scale == xp.abs(got)).all(2) & (scales < 0)
        scales = xp.where(fits, byte, scales)
        codes = xp.where(fits[:, :, None], magnitude + 8 * long((got < 0) & (magnitude > 0)), codes)
    return codes.reshape(m, n), scales


def _compare_scales(xp: Any, stored: Array, groups: Array, bounds: Array, specified: Array, multiplier: float) -> Report:
    table = constants(groups, E4M3_VALUES[:127])
    middle = (table[1:] + table[:-1]) / 2
    edges = constants(groups, np.array([-np.inf])), constants(groups, np.array([np.inf]))
    lowest, highest = xp.concatenate([edges[0], middle]), xp.concatenate([middle, edges[1]])
    amax = _amax(xp.abs(groups)) / 6 * multiplier
    least = _amax(xp.abs(groups) - bounds)
    least = xp.where(least > 0, least, xp.zeros_like(least)) / 6 * multiplier * (1 - SCALE_ARITHMETIC)
    most = _amax(xp.abs(groups) + bounds) / 6 * multiplier * (1 + SCALE_ARITHMETIC)
    valid = (stored >= 0) & (stored <= 126)
    byte = xp.where(valid, stored, xp.zeros_like(stored))
    needed = _needed(xp, amax, lowest[byte], highest[byte], amax - least, most - amax)
    needed = xp.where(valid, needed, xp.full_like(needed, float("inf")))  # NaN or negative
    needed = xp.where(specified, needed, xp.zeros_like(needed))
    ideal = _nearest(amax, table)
    wrong = needed > 1
    report = _rule3_report(xp, needed, wrong, specified & ~wrong & (stored != ideal), specified, 1.0)
    if report.elements:
        row, column = divmod(int(needed.reshape(-1).argmax()), int(needed.shape[1]))
        report.detail = (
            f"scale [{row}, {column}]: byte {int(stored[row, column])}, exact {int(ideal[row, column])}"
            f" (amax/6·multiplier {float(amax[row, column])!r}, within {float(least[row, column])!r} … {float(most[row, column])!r})"
        )
    return report


def _compare_codes(xp: Any, got: Array, stored: Array, groups: Array, bounds: Array, specified: Array, multiplier: float) -> Report:
    """Codes against the scale byte actually stored; under a scale of 0 they are 0."""
    table = constants(groups, E2M1_VALUES[:8])
    middle = (table[1:] + table[:-1]) / 2
    lowest = xp.concatenate([-middle[:1], middle])  # code 0 spans both signs
    highest = xp.concatenate([middle, constants(groups, np.array([np.inf]))])
    usable = (stored > 0) & (stored <= 126)
    scale = constants(groups, E4M3_VALUES[:127])[xp.where(usable, stored, xp.ones_like(stored))]
    factor = (multiplier / scale)[:, :, None]
    scaled = groups * factor
    slack = bounds * factor + xp.abs(scaled) * CODE_ARITHMETIC
    valid = (got >= 0) & (got <= 15)
    magnitude = xp.where(valid, got % 8, xp.zeros_like(got))
    negative = (got >= 8) & (magnitude > 0)
    along = xp.where(negative, -scaled, scaled)  # mirrored, so that the code's interval is the positive one
    needed = _needed(xp, along, lowest[magnitude], highest[magnitude], slack, slack)
    ideal = _nearest(xp.abs(scaled), table)
    ideal_negative = (scaled < 0) & (ideal > 0)
    differs = (magnitude != ideal) | (negative != ideal_negative)
    dead = (stored == 0)[:, :, None] & (groups == groups)
    needed = xp.where(dead, xp.where(got == 0, xp.zeros_like(needed), xp.full_like(needed, float("inf"))), needed)
    differs = differs & ~dead
    judged = (specified & (stored <= 126))[:, :, None] & (groups == groups)  # under a NaN or negative scale byte the byte itself is the fault
    needed = xp.where(valid, needed, xp.full_like(needed, float("inf")))
    needed = xp.where(judged, needed, xp.zeros_like(needed))
    wrong = needed > 1
    report = _rule3_report(xp, needed, wrong, judged & ~wrong & differs, judged, 0.5)
    if report.elements:
        at = int(needed.reshape(-1).argmax())
        row, rest = divmod(at, int(needed.shape[1]) * GROUP)
        group, column = divmod(rest, GROUP)
        report.detail = (
            f"code [{row}, {rest}]: {int(got[row, group, column])}, exact {float(scaled[row, group, column])!r}"
            f" ± {float(slack[row, group, column]):.3g} over scale byte {int(stored[row, group])}"
        )
    return report


def _rule3_report(xp: Any, needed: Array, wrong: Array, exempt: Array, judged: Array, nbytes: float) -> Report:
    count = int(judged.sum())
    if count == 0:
        return Report(0, unspecified=int(needed.reshape(-1).shape[0]))
    return Report(
        count,
        float(needed.max()),
        int(wrong.sum()),
        int(exempt.sum()),
        unspecified=int(needed.reshape(-1).shape[0]) - count,
        nbytes=count * nbytes,
    )


# ---- whole outputs by role


def _widened(array: Array, dtype: str) -> Array:
    """float64 of an output tensor."""
    return widen(array, dtype) if isinstance(array, np.ndarray) else array.double()


def _part(array: Array, rows: Indices | None, columns: Indices | None) -> Array:
    array = array if rows is None else array[indices(array, np.asarray(rows))]
    return array if columns is None else array[:, indices(array, np.asarray(columns))]


def _exact_y(result: Fc1Result) -> np.ndarray[Any, Any]:
    """y in float32 of exact data whose gates are so large that their sigmoid is exactly 1.

    Raises:
        ProblemError: a gate below 32, where the approximate sigmoid would show.
    """
    up, gate, post = (to_host(each) for each in (result.up, result.gate, result.post))
    if gate.size and (~(gate >= SATURATED_GATE)).any():
        raise ProblemError(f"exact comparison with a gate of {gate.min()}: use data whose gates are at least {SATURATED_GATE} (kind exact)")
    with np.errstate(over="ignore"):
        y = up.astype(np.float32) * gate.astype(np.float32)
        return np.where(post == 0, np.float32(0), y * post.astype(np.float32))


def compare_fc1(
    actual: Mapping[str, Array],
    result: Fc1Result,
    problem: Problem,
    *,
    output_multiplier: float | None = None,
    rows: Indices | None = None,
    columns: Indices | None = None,
    exact: bool = False,
    truncation: float = TRUNCATION,
) -> Report:
    """FC1's output against the reference, by the rule that its dtype and data call for.

    Args:
        actual: the whole output by role: ``c`` ``[M, E·I]``, or ``c.codes`` ``[M, E·I/2]`` and tiled ``c.scales``, or ``c.k64`` in K 64 order.
            Decoded NVFP4 is judged by the codes and scales that it stands for.
        result: ``reference.fc1`` of the same rows and columns.
        output_multiplier: of NVFP4 output.
        rows, columns: the sample that ``result`` covers; columns of NVFP4 output are whole groups of 16.
        exact: rule 1; numpy or torch, compared on the host.

    Raises:
        ProblemError: an output or the multiplier is missing, or a column sample cuts a group.
    """
    xp = namespace(result.y)
    y, bound = result.y, None if exact else fc1_bound(result, problem.hidden, truncation)
    name = f"fc1 {problem.c_dtype}"
    if exact:
        y = _exact_y(result)
        bound = np.zeros(y.shape)
        xp = np
    if problem.c_in_k64_order:
        positions = k64_positions(problem.n_out)
        got = _widened(_part(actual["c.k64"], rows, positions if columns is None else positions[np.asarray(columns)]), "bf16")
    elif problem.c_decoded:
        got = _widened(_part(actual["c"], rows, columns), "bf16")
    elif problem.c_dtype != "nvfp4":
        got = _widened(_part(actual["c"], rows, columns), problem.c_dtype)
    if problem.c_dtype != "nvfp4":
        if exact:
            return compare_exact(to_host(got), widen(convert(y, problem.c_dtype), problem.c_dtype), name=name)
        return compare_plain(got, y, bound, problem.c_dtype, name=name)
    if output_multiplier is None:
        raise ProblemError("output_multiplier is missing: NVFP4 output is judged with the multiplier that the kernel was given")
    groups = None
    if columns is not None:
        chosen = np.asarray(columns, dtype=np.int64)
        if len(chosen) % GROUP or (chosen.reshape(-1, GROUP) != chosen[::GROUP, None] // GROUP * GROUP + np.arange(GROUP)).any():
            raise ProblemError("columns cut a group of 16: sample whole groups of NVFP4 output")
        groups = chosen[::GROUP] // GROUP
    y = y.astype(np.float64) if exact else y
    if problem.c_decoded:
        codes, scales = _coded(to_host(got) if xp is np else got, y, output_multiplier)
    else:
        codes = _part(unpack(_part(actual["c.codes"], rows, None)), None, columns)
        scales = _part(untile(actual["c.scales"], problem.c_rows), rows, groups)
        if xp is np:
            codes, scales = to_host(codes), to_host(scales)
    return compare_nvfp4(codes, scales, y, bound, output_multiplier, name=name)


def compare_fc2(
    actual: Mapping[str, Array],
    result: Fc2Result,
    problem: Problem,
    *,
    rows: Indices | None = None,
    columns: Indices | None = None,
    exact: bool = False,
    truncation: float = TRUNCATION,
) -> Report:
    """FC2's output ``c`` ``[M, H]`` against the reference; arguments as ``compare_fc1``."""
    got, name = _part(_widened(actual["c"], problem.c_dtype), rows, columns), f"fc2 {problem.c_dtype}"
    if exact:
        with np.errstate(over="ignore"):
            expected = convert(to_host(result.c).astype(np.float32), problem.c_dtype)
        return compare_exact(to_host(got), widen(expected, problem.c_dtype), name=name)
    return compare_plain(got, result.c, fc2_bound(result, problem.experts, problem.intermediate, truncation), problem.c_dtype, name=name)
