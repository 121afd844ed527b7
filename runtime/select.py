"""Selection: a pure function of architecture, op, shape bucket and dtypes, over a table that is data.

Buckets of M end at every multiple of 8 up to 128 and of 128 above: where optima change on the hardware measured so far, unlike powers of two.
The table lies in ``artifacts/selection/<arch>.json``; each rule is marked ``measured`` (with device, driver and date) or ``modelled``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Final

from densemoe.runtime.errors import ManifestError, SelectionError
from densemoe.runtime.problem import LARGEST_DIMENSION, Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import Variant, architecture

__all__ = ["Choice", "Rejected", "bucket", "load_table", "select"]

SMALL_STEP: Final = 8
SMALL_LIMIT: Final = 128
LARGE_STEP: Final = 128
SCHEMA: Final = 1


def bucket(m: int) -> int:
    """The largest M of ``m``'s bucket: the next multiple of 8 up to 128, of 128 above; 0 for 0, at most the largest M that there is."""
    step = SMALL_STEP if m <= SMALL_LIMIT else LARGE_STEP
    return min(-(-m // step) * step, LARGEST_DIMENSION)


@dataclass(frozen=True)
class Rejected:
    """A variant that was not chosen, and why."""

    variant: Variant
    reason: str


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        bucket: largest M of the bucket.
        reason: which rule decided.
        provenance: ``measured`` or ``modelled``, or ``forced`` by the caller.
        rejected: every other variant with its reason.
        settings: run-time switches of its kernel that the rule names; the kernel's defaults otherwise.
    """

    variant: Variant
    bucket: int
    reason: str
    provenance: str
    rejected: tuple[Rejected, ...]
    settings: Mapping[str, int] = field(default_factory=dict)


@cache
def load_table(arch: str) -> Mapping[str, Any]:
    """The selection table of an architecture.

    Raises:
        SelectionError: densemoe has none for it.
        ManifestError: it is not a table of this schema.
    """
    path = resources.files("densemoe.artifacts").joinpath("selection").joinpath(f"{architecture(arch).name}.json")
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise SelectionError(f"there is no selection table for {arch}: name a variant, or add artifacts/selection/{arch}.json") from None
    except ValueError as error:
        raise ManifestError(f"selection table of {arch}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or not isinstance(document.get("rules"), list):
        raise ManifestError(f"selection table of {arch}: schema {SCHEMA} with a list of rules is expected")
    return document


def select(problem: Problem, variants: Iterable[Variant], table: Mapping[str, Any], forced: str | None = None) -> Choice:
    """Chooses a variant.

    Args:
        variants: those of the device's set.
        table: of ``load_table``: the first rule that matches the op and the bucket decides the tile, unless its variant is there and this problem's
            shape does not fit it: then the next one that matches.
        forced: a key that the caller wants; it is checked, not replaced.

    Raises:
        SelectionError: nothing can run the problem, the forced key is not there or cannot, or the table has no rule for it.
    """
    size = bucket(problem.m)
    runnable: list[Variant] = []
    rejected: list[Rejected] = []
    for variant in sorted(variants, key=lambda each: each.key):
        accepted, reason = can_implement(variant, problem)
        if accepted:
            runnable.append(variant)
        else:
            rejected.append(Rejected(variant, reason))
    if forced is not None:
        return _forced(forced, size, runnable, rejected)
    if not runnable:
        reasons = "; ".join(sorted({f"{each.variant.key}: {each.reason}" for each in rejected})[:4]) or "the set is empty"
        raise SelectionError(
            f"no variant runs {problem.op} with {problem.a_dtype} activations and {problem.c_dtype} output at M = {problem.m}: {reasons}"
        )
    for position, rule in enumerate(table["rules"]):
        if rule["op"] != problem.op or not rule["m_from"] <= size <= rule["m_to"]:
            continue
        tile = tuple(rule["tile"])
        chosen = [each for each in runnable if (each.tile_m, each.tile_n) == tile and (each.cluster_m, each.cluster_n) == tuple(rule["cluster"])]
        if not chosen:
            if any(_is_ruled(no.variant, problem, tile, tuple(rule["cluster"])) for no in rejected):
                continue  # installed, and this problem's shape is not for it: its reason stands in ``rejected``
            raise SelectionError(
                f"rule {position} of the selection table wants tile {tile[0]}x{tile[1]} for {problem.op} at M = {problem.m}, which no installed"
                f" variant has: build it, or name one of {', '.join(each.key for each in runnable)}"
            )
        others = tuple(Rejected(each, f"rule {position} prefers tile {tile[0]}x{tile[1]} in this bucket") for each in runnable if each != chosen[0])
        settings = rule.get("settings", {})
        return Choice(chosen[0], size, f"rule {position}: {rule['reason']}", rule["provenance"], (*others, *rejected), settings)
    raise SelectionError(f"the selection table has no rule for {problem.op} at M = {problem.m}: name one of {', '.join(e.key for e in runnable)}")


def _is_ruled(variant: Variant, problem: Problem, tile: tuple[int, ...], cluster: tuple[int, ...]) -> bool:
    """Whether ``variant`` is what a rule wants for the op and dtypes of ``problem``, whatever its shape."""
    kind = (variant.op, variant.a_dtype, variant.c_dtype) == (problem.op, problem.a_dtype, problem.c_dtype)
    return kind and (variant.tile_m, variant.tile_n) == tile and (variant.cluster_m, variant.cluster_n) == cluster


def _forced(key: str, size: int, runnable: list[Variant], rejected: list[Rejected]) -> Choice:
    for each in runnable:
        if each.key == key:
            others = tuple(Rejected(other, "another variant was forced") for other in runnable if other != each)
            return Choice(each, size, "the caller named it", "forced", (*others, *rejected))
    for no in rejected:
        if no.variant.key == key:
            raise SelectionError(f"{key} cannot run this problem: {no.reason}")
    raise SelectionError(f"{key} is not in the artifact set: `densemoe list` shows what is")
