"""The contract's grids (section 9) for the tcgen05 kernels, as functions over a loader: on a device by test_blackwell.py, on the emulator by
tests/blackwell/test_proof.py. Every case runs every shipped variant that can run it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness

from densemoe.runtime import bounds, data
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import Variant

SPLITS = (1, 2, 4)
PREFETCH = (0, 3)


def fc1_parts() -> list[tuple[int, int]]:
    """(2I, H) of FC1's grid; each part has 32 cases over E, M and alpha_post."""
    return list(itertools.product((256, 512, 1024, 2816), (256, 512, 2048)))


def fc2_parts() -> list[tuple[int, int, int]]:
    """(E, I, H) of FC2's grid; each part has 4 cases over M."""
    return list(itertools.product((1, 4, 8, 32, 256), (256, 512, 1024), (256, 512, 2048)))


def keys_of(keys: Iterable[str], op: str) -> list[str]:
    """The variants of an op, a case's keys alone count."""
    return sorted(key for key in keys if Variant.parse(key).op == op)


def _fits(key: str, op: str, experts: int, hidden: int, intermediate: int) -> bool:
    variant = Variant.parse(key)
    return can_implement(variant, Problem(op, 8, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype))[0]


def run_fc1_part(
    loader: Any, keys: Sequence[str], rows: int, hidden: int, experts: Sequence[int] = (1, 4, 8, 32), tokens: Sequence[int] = (1, 8, 127, 256)
) -> Iterator[tuple[tuple[object, ...], bounds.Report]]:
    """(what, report) of every case and variant of one part: all variants at every case."""
    weights = harness.Weights("fc1", max(experts), hidden, rows // 2, "integers", rows + hidden, harness.INTERCHANGE)
    fitting = [key for key in keys_of(keys, "fc1") if _fits(key, "fc1", 1, hidden, rows // 2)]
    for number, m, post in itertools.product(experts, tokens, (True, False)):
        part = weights.prefix(number)
        for key, report in harness.run_fc1_variants(loader, part, m, post, fitting):
            yield ("fc1-grid", number, rows, m, hidden, post, key), report


def run_fc2_part(
    loader: Any, keys: Sequence[str], experts: int, intermediate: int, hidden: int, tokens: Sequence[int] = (1, 8, 127, 256)
) -> Iterator[tuple[tuple[object, ...], bounds.Report]]:
    """(what, report) of every case and variant of one part, numbers of splits and prefetch distances in turn, scalar alpha at every third M."""
    weights = harness.Weights("fc2", experts, hidden, intermediate, "integers", experts + intermediate + hidden, harness.INTERCHANGE)
    turn = itertools.cycle(itertools.product(SPLITS, PREFETCH))
    fitting = [key for key in keys_of(keys, "fc2") if _fits(key, "fc2", experts, hidden, intermediate)]
    for m in tokens:
        settings = [(key, dict(zip(("splits", "prefetch"), next(turn), strict=True))) for key in fitting]
        for key, report in harness.run_fc2_variants(loader, weights, m, False, settings):
            yield ("fc2-grid", experts, intermediate, m, hidden, key), report


def run_exact(
    loader: Any, keys: Sequence[str], m: int, experts: int, hidden: int, intermediate: int
) -> Iterator[tuple[tuple[object, ...], bounds.Report]]:
    """Rule 1 of section 9: exact data, plain outputs of FC1, FC2 with both alphas and every number of splits, bit for bit."""
    fc1 = harness.Weights("fc1", experts, hidden, intermediate, "exact", m, harness.INTERCHANGE)
    plain = [key for key in keys_of(keys, "fc1") if Variant.parse(key).c_dtype in ("f32", "bf16") and _fits(key, "fc1", 1, hidden, intermediate)]
    for key, report in harness.run_fc1_variants(loader, fc1, m, True, plain, kind="exact"):
        yield ("fc1-exact", m, experts, hidden, intermediate, key), report
    fc2 = harness.Weights("fc2", experts, hidden, intermediate, "exact", m, harness.INTERCHANGE)
    for scalar in (False, True):
        settings = [(key, {"splits": s}) for key in keys_of(keys, "fc2") if _fits(key, "fc2", 1, hidden, intermediate) for s in SPLITS]
        for key, report in harness.run_fc2_variants(loader, fc2, m, scalar, settings, kind="exact"):
            yield ("fc2-exact", m, experts, hidden, intermediate, scalar, key), report


def run_layer(loader: Any, case: data.LayerCase, listed: bool) -> Iterator[tuple[tuple[object, ...], bounds.Report]]:
    """(what, report) of FC1, FC2 and the mark of a layer by the selection's variants."""
    reports = harness.run_layer(loader, case, listed=listed, a_dtype="nvfp4", layout=harness.INTERCHANGE)
    for name, report in zip(("fc1", "fc2", "mark"), reports, strict=True):
        yield ("layer-listed" if listed else "layer", *case, name), report


def judge(results: Iterable[tuple[tuple[object, ...], bounds.Report]]) -> int:
    """Notes every result, then fails with the first that is out of its bound; how many there were.

    Each is a JSON line in the file that DENSEMOE_PROOF_RESULTS names: what ran, worst error over bound, exemptions, bytes compared, passed.
    """
    path, faults, count = os.environ.get("DENSEMOE_PROOF_RESULTS"), [], 0
    for what, report in results:
        count += 1
        if not report.passed:
            faults.append(f"{what}: {report}")
        if path:
            exempt = report.exemptions + sum(part.exemptions for part in report.parts)
            elements = report.elements + sum(part.elements for part in report.parts)
            line = {"what": list(what), "worst": float(report.worst), "exemptions": exempt, "elements": elements, "passed": bool(report.passed)}
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")
    assert not faults, f"{len(faults)} of {count}; first: {faults[0]}"
    return count
