"""Selection: a pure function of architecture, op, shape, bucket of M and dtypes, over a table that is data.

Buckets of M end at every multiple of 8 up to 128 and of 128 above: where optima change on the hardware measured so far, unlike powers of two.
The table lies in ``artifacts/selection/<arch>.json``. It is asked in this order:

    shapes   what ``densemoe tune`` measured at this (op, E, H, I, dtypes, form): a row a bucket, ``measured``, or ``modelled`` between two such rows
    model    the cost model (cost_model.py) with coefficients from the same measurements: ``modelled``
    rules    by op and bucket alone, for what was never measured; of the grouped ops those whose tile is not the problem's are passed over

Its part ``grouping`` says from which M on a layer gathers tokens by expert, and into tiles of how many rows (grouping.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

from densemoe.runtime.canonical import installed_file, read_file
from densemoe.runtime.errors import ArtifactNotFound, ManifestError, SelectionError
from densemoe.runtime.problem import LARGEST_DIMENSION, Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import GROUPED_OPS, Variant, architecture

__all__ = ["Choice", "Rejected", "bucket", "load_table", "select", "shape_name"]

SMALL_STEP: Final = 8
SMALL_LIMIT: Final = 128
LARGE_STEP: Final = 128
SCHEMA: Final = 1
LARGEST_TABLE: Final = 16 << 20  # bytes; a table of some hundred shapes is a thousandth of it
_COEFFICIENTS: Final = ("launch", "stream", "decode", "move", "slots_per_sm", "gathered", "token")


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
        device: on which a rule says that it was measured; empty where it does not.
    """

    variant: Variant
    bucket: int
    reason: str
    provenance: str
    rejected: tuple[Rejected, ...]
    settings: Mapping[str, int] = field(default_factory=dict)
    device: str = ""


@cache
def load_table(arch: str, capability: tuple[int, int] | None = None) -> Mapping[str, Any]:
    """The selection table of an architecture as a device sees it: its rules, and what was measured, without those of other devices.

    Args:
        capability: the device's compute capability; the architecture's first where no device is at hand.

    Raises:
        SelectionError: densemoe has none for it.
        ManifestError: it is not a table of this schema.
    """
    wanted = capability or architecture(arch).capabilities[0]
    document = _read_table(arch)
    rules = [rule for rule in document["rules"] if tuple(rule.get("capability", wanted)) == wanted]
    own = document.get("devices", {}).get(f"{wanted[0]}.{wanted[1]}", {})
    return {**{name: part for name, part in document.items() if name != "devices"}, **own, "rules": rules}


def _read_table(arch: str) -> Mapping[str, Any]:
    """The file."""
    path = installed_file("selection", f"{architecture(arch).name}.json")
    try:
        document = json.loads(read_file(path, LARGEST_TABLE))
    except ArtifactNotFound:
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
        table: of ``load_table``: the first part of it that speaks of the problem decides, unless its variant is there and this problem's shape
            does not fit it: then the next one.
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
        own = [no for no in rejected if no.variant.op == problem.op]
        nearest = [no for no in own if _same_dtypes(no.variant, problem)] or own or rejected
        first = {no.reason: no.variant.key for no in reversed(nearest)}  # one key for each reason
        reasons = "; ".join([f"{key}: {reason}" for reason, key in sorted(first.items())][:4]) or "the set is empty"
        raise SelectionError(
            f"no variant runs {problem.op} with {problem.a_dtype} activations and {problem.c_dtype} output at M = {problem.m}: {reasons}"
        )
    for wanted in _wanted(problem, size, table):
        chosen = [each for each in runnable if wanted.is_met_by(each)]
        if not chosen:
            if problem.op in GROUPED_OPS or any(_same_dtypes(no.variant, problem) and wanted.is_met_by(no.variant) for no in rejected):
                continue  # installed, and this problem's shape or tile is not for it: its reason stands in ``rejected``
            raise SelectionError(
                f"{wanted.source} of the selection table wants {wanted.text} for {problem.op} at M = {problem.m}, which no installed"
                f" variant has: build it, or name one of {', '.join(each.key for each in runnable)}"
            )
        others = tuple(Rejected(each, f"{wanted.source} prefers {wanted.text} in this bucket") for each in runnable if each != chosen[0])
        reason, provenance = f"{wanted.source}: {wanted.reason}", wanted.provenance
        if problem.deterministic and problem.op in GROUPED_OPS:
            reason, provenance = f"{reason}, of the form that adds in any order", "modelled"
        return Choice(chosen[0], size, reason, provenance, (*others, *rejected), wanted.settings, wanted.device)
    raise SelectionError(f"the selection table has no rule for {problem.op} at M = {problem.m}: name one of {', '.join(e.key for e in runnable)}")


def shape_name(op: str, experts: int, hidden: int, intermediate: int, a_dtype: str, c_dtype: str, active: bool, group_tile: int = 0) -> str:
    """What a table calls a measured shape; of a grouped op one for each tile."""
    form = f"t{group_tile}" if group_tile else "active" if active else "dense"
    return f"{op} {experts}x{hidden}x{intermediate} {a_dtype}-{c_dtype} {form}"


@dataclass(frozen=True)
class _Wanted:
    """What a part of the table asks for. ``options`` None: any."""

    source: str
    tile: Sequence[int]
    cluster: Sequence[int]
    options: tuple[tuple[str, int], ...] | None
    reason: str
    provenance: str
    settings: Mapping[str, int]
    device: str = ""

    @property
    def text(self) -> str:
        options = "".join(f".{name}{value}" for name, value in self.options or ())
        return f"tile {self.tile[0]}x{self.tile[1]}{options}"

    def is_met_by(self, variant: Variant) -> bool:
        """Whether it has the tile, cluster and options; ``deterministic`` is the problem's to decide, and its tiles are chosen alike."""
        own = (variant.tile_m, variant.tile_n, variant.cluster_m, variant.cluster_n)
        return own == (*self.tile, *self.cluster) and self.options in (None, variant.with_options(deterministic=0).options)


def _wanted(problem: Problem, size: int, table: Mapping[str, Any]) -> Iterator[_Wanted]:
    """What the table asks for, the best first."""
    name = shape_name(
        problem.op,
        problem.experts,
        problem.hidden,
        problem.intermediate,
        problem.a_dtype,
        problem.c_dtype,
        problem.active_list,
        problem.group_tile,
    )
    for row in table.get("shapes", {}).get(name, ()):
        if size <= row[0]:
            yield _of_row(row, table["keys"][row[1]], size)
            break
    yield from _of_model(problem, table.get("model"))
    for position, rule in enumerate(table["rules"]):
        if rule["op"] != problem.op or not rule.get("hidden_from", 0) <= problem.hidden <= rule.get("hidden_to", LARGEST_DIMENSION):
            continue
        if rule["m_from"] <= size <= rule["m_to"] and rule.get("a_dtype", problem.a_dtype) == problem.a_dtype:
            source = f"rule {position}"
            settings, device = rule.get("settings", {}), rule.get("device", "")
            yield _Wanted(source, rule["tile"], rule["cluster"], None, rule["reason"], rule["provenance"], settings, device)


def _of_row(row: Sequence[Any], key: Sequence[Any], size: int) -> _Wanted:
    variant = Variant.parse(key[0])
    measured = len(row) > 2 and size == row[0]
    reason = f"the fastest there, {row[2]} us" if measured else "the fastest by the times measured around this bucket"
    tile, cluster = (variant.tile_m, variant.tile_n), (variant.cluster_m, variant.cluster_n)
    return _Wanted("the shape's row", tile, cluster, variant.options, reason, "measured" if measured else "modelled", key[1])


def _of_model(problem: Problem, model: Mapping[str, Any] | None) -> Iterator[_Wanted]:
    """Kernel classes that the cost model knows, the fastest first."""
    if not model or not problem.m:
        return
    from densemoe.runtime.cost_model import Coefficients, KernelClass, predict

    whole = replace(problem, m=bucket(problem.m))  # all of a bucket gets the same
    predicted = []
    for document in model["classes"]:
        if (document["op"], document["a_dtype"], document["active"]) != (problem.op, problem.a_dtype, problem.active_list):
            continue
        kernel = KernelClass.from_json(document)
        coefficients = Coefficients(*(document[name] for name in _COEFFICIENTS))
        predicted.append((predict(whole, kernel, coefficients, model["sm_count"]), repr(kernel), kernel))
    for microseconds, _, kernel in sorted(predicted, key=lambda each: each[:2]):
        reason = f"the fastest by the cost model, {microseconds:.1f} us"
        yield _Wanted("the cost model", kernel.tile, kernel.cluster, kernel.options, reason, "modelled", dict(kernel.settings))


def _same_dtypes(variant: Variant, problem: Problem) -> bool:
    return (variant.op, variant.a_dtype, variant.c_dtype) == (problem.op, problem.a_dtype, problem.c_dtype)


def _forced(key: str, size: int, runnable: list[Variant], rejected: list[Rejected]) -> Choice:
    for each in runnable:
        if each.key == key:
            others = tuple(Rejected(other, "another variant was forced") for other in runnable if other != each)
            return Choice(each, size, "the caller named it", "forced", (*others, *rejected))
    for no in rejected:
        if no.variant.key == key:
            raise SelectionError(f"{key} cannot run this problem: {no.reason}")
    raise SelectionError(f"{key} is not in the artifact set: `densemoe list` shows what is")
