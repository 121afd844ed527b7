"""``densemoe verify --emulate``: PTX of built variants → runs → records in the manifest.

Each variant's PTX is compiled again from the sources, and must come with the very cubin that the set holds. Variants whose PTX differs in nothing but
its ``.target`` line and the kernel's name are run once; all of them get the record. Runs that passed are journaled, failures never are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from densemoe.compile import toolchain, verification
from densemoe.compile.emulate.cases import Case, cases_of, digest, schedule_of
from densemoe.compile.emulate.journal import Journal
from densemoe.compile.emulate.running import RunTask, emulator_digest, judge_digest, run_task
from densemoe.compile.executor import Executor
from densemoe.compile.matrix import Planned
from densemoe.runtime.errors import BuildError, CompileError
from densemoe.runtime.lock import SHORT_DIGEST
from densemoe.runtime.manifest import ManifestVariant

__all__ = ["Failure", "Request", "Result", "Subject", "ptx_digest", "regenerate", "verify"]

_TARGET: Final = re.compile(r"^\.target [^\n]*$", re.MULTILINE)
_COMMENT: Final = re.compile(r"^\s*//[^\n]*\n", re.MULTILINE)
_DECODING_TOKENS: Final = 8  # counters are recorded at decoding: there a byte that is read twice shows


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        cases: that many a variant; None for the covering array and what lies off the grid.
        full: the whole grid.
        only: this case alone, by its text; no record is written.
    """

    cases: int | None = None
    full: bool = False
    seeds: tuple[int, ...] = (0,)
    schedules: tuple[str, ...] = ("random",)
    only: str | None = None

    def of(self, entry: ManifestVariant) -> list[Case]:
        """The cases of a variant."""
        if self.only is not None:
            return [Case.parse(self.only)]
        return cases_of(entry.variant, entry.recipe, self.cases, full=self.full)


@dataclass(frozen=True)
class Subject:
    """A built variant and how it was compiled."""

    entry: ManifestVariant
    planned: Planned


@dataclass(frozen=True)
class Failure:
    """A run that failed, or a variant that could not be run (then ``case`` is empty). ``command`` repeats it."""

    key: str
    error: str
    case: str = ""
    seed: int = 0
    schedule: str = ""
    command: str = ""


@dataclass
class Result:
    """What a verification did.

    Attributes:
        recorded: worst error over its bound by key, of the records that were written.
        current: keys whose record already says all that was asked for.
        runs, journaled: runs of this time; runs that an earlier time had done.
        shared: key → the key whose runs it shares, the PTX being the same.
    """

    recorded: dict[str, float] = field(default_factory=dict)
    current: list[str] = field(default_factory=list)
    runs: int = 0
    journaled: int = 0
    shared: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)


class Progress:
    """What a caller may watch; does nothing by itself."""

    def stage(self, what: str, total: int) -> None:
        """A stage begins: ``compiling``, then ``emulating``."""

    def advance(self, what: str) -> None:
        """One more is done."""

    def failed(self, failure: Failure) -> None:
        """A failure, when it is met."""


# ---- PTX


def ptx_digest(ptx: str, symbol: str) -> str:
    """sha256 of a PTX text without its ``.target`` line, whole-line comments and the kernel's name."""
    text = _COMMENT.sub("", _TARGET.sub("", ptx)).replace(symbol, "kernel")
    return hashlib.sha256(text.encode()).hexdigest()


def regenerate(work: tuple[Planned, str]) -> str:
    """PTX of a variant, compiled again.

    Args:
        work: (the variant, sha256 of the cubin that the set holds).

    Raises:
        CompileError: the sources give another cubin than the set holds.
    """
    planned, image = work
    compiled = toolchain.compile_variant(planned.variant, planned.kernel, options=planned.compiler_options)
    found = hashlib.sha256(compiled.cubin).hexdigest()
    if found != image:
        raise CompileError(f"the sources give a cubin {found[:12]}…, the set holds {image[:12]}…: its PTX is lost; build the set again")
    return compiled.ptx


# ---- the verification


@dataclass
class _Unit:
    """Variants that share their PTX and their cases, and the runs of the first of them."""

    subjects: list[Subject]
    ptx: str
    ptx_sha256: str
    request: Request
    cases: list[Case]
    outcomes: dict[tuple[str, int, str], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def first(self) -> ManifestVariant:
        return self.subjects[0].entry

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return self.first.recipe.to_json()

    def runs(self) -> list[tuple[str, int, str]]:
        """(case, seed, schedule) of every run."""
        asked = self.request
        return [(c.text, s, schedule_of(name, c, s)) for s in asked.seeds for name in asked.schedules for c in self.cases]

    def task(self, run: tuple[str, int, str]) -> RunTask:
        case, seed, schedule = run
        return RunTask(self.first.key, self.first.layout, self.ptx, self.recipe, case, seed, schedule, emulator_digest(), judge_digest())

    def identity(self, run: tuple[str, int, str]) -> str:
        """Digest of all that decides what a run gives."""
        facts = (self.ptx_sha256, self.recipe, self.first.layout, self.first.variant.op, self.first.variant.c_dtype, run)
        text = json.dumps([*facts, emulator_digest(), judge_digest()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def record(self, of: Subject) -> dict[str, Any]:
        """The verification record of one of the variants."""
        asked, every = self.request, list(self.outcomes.values())
        counted = _counted({Case.parse(case): outcome for (case, _, _), outcome in self.outcomes.items()})
        record: dict[str, Any] = {
            "kind": "emulated",
            "cases": len(self.cases),
            "seeds": list(asked.seeds),
            "schedules": list(asked.schedules),
            "runs": len(every),
            "list": digest(self.cases, asked.seeds, asked.schedules)[:SHORT_DIGEST],
            **_code(),
            "ptx": self.ptx_sha256[:SHORT_DIGEST],
            "worst": float(f"{max(each['worst'] for each in every):.3g}"),
            "exemptions": sum(each["exemptions"] for each in every),
            "counters": counted,
        }
        if of.entry.key != self.first.key:
            record["same_ptx_as"] = self.first.key
        return record


def _counted(outcomes: Mapping[Case, Mapping[str, Any]]) -> dict[str, Any]:
    """Counters of one case: few tokens, all experts, the most bytes to read."""
    plain = [case for case in outcomes if case.m <= _DECODING_TOKENS and not case.active_list] or list(outcomes)
    case = max(plain, key=lambda each: (outcomes[each]["needed_bytes"], each.text))
    outcome = outcomes[case]
    return {"case": case.text, "needed_bytes": outcome["needed_bytes"], **outcome["counters"]}


def _code() -> dict[str, str]:
    """What a record says of the code that ran and judged; short digests, since a cold start hashes the manifest."""
    return {"emulator": emulator_digest()[:SHORT_DIGEST], "sources": judge_digest()[:SHORT_DIGEST]}


def _is_current(entry: ManifestVariant, cases: Sequence[Case], request: Request) -> bool:
    """Whether a record of ``entry`` says all that ``request`` asks for."""
    wanted = {"kind": "emulated", "list": digest(cases, request.seeds, request.schedules)[:SHORT_DIGEST], **_code()}
    return any(all(record.get(name) == value for name, value in wanted.items()) for record in entry.verification)


def _command(root: Path, key: str, run: tuple[str, int, str]) -> str:
    case, seed, schedule = run
    parts = ["densemoe", "verify", "--emulate", "--artifacts", str(root), "--filter", key, "--case", case]
    return shlex.join([*parts, "--seeds", str(seed), "--schedules", schedule])


def verify(
    root: Path, subjects: Sequence[Subject], request: Request, executor: Executor, progress: Progress | None = None, keep: bool = True
) -> Result:
    """Runs variants on the emulator and writes their records.

    Args:
        root: artifact root whose sets hold the variants.
        keep: skip what is recorded or journaled.

    Raises:
        BuildError: the sets cannot be written, another verification runs, or the executor is lost; what was finished is journaled.
        ProblemError: a case, seed or schedule that is none.
    """
    progress, result = progress or Progress(), Result()
    pending: list[Subject] = []
    for subject in subjects:
        cases = request.of(subject.entry)
        for name in request.schedules:
            schedule_of(name, cases[0], 0)  # refused before anything is compiled
        if keep and request.only is None and _is_current(subject.entry, cases, request):
            result.current.append(subject.entry.key)
        else:
            pending.append(subject)
    with ExitStack() as stack:
        journals = {
            arch: stack.enter_context(Journal(root / arch, (emulator_digest(), judge_digest())))
            for arch in sorted({subject.entry.arch for subject in pending})
        }
        texts = _texts(root, pending, journals, executor, progress, result)
        units = _units(pending, texts, request, result)
        stack.callback(_write, root, units, request, result)  # finished variants keep their records if the rest is interrupted
        _run(root, units, journals, executor, progress, result, keep)
    return result


def _texts(
    root: Path, subjects: Sequence[Subject], journals: Mapping[str, Journal], executor: Executor, progress: Progress, result: Result
) -> dict[str, str]:
    """PTX by key."""
    texts: dict[str, str] = {}
    lacking: list[Subject] = []
    for subject in subjects:
        known = journals[subject.entry.arch].ptx(subject.entry.sha256)
        if known is None:
            lacking.append(subject)
        else:
            texts[subject.entry.key] = known
    progress.stage("compiling", len(lacking))

    def done(number: int, ptx: Any, error: str | None) -> None:
        entry = lacking[number].entry
        if error is None:
            texts[entry.key] = ptx
            journals[entry.arch].keep_ptx(entry.sha256, ptx)
        else:
            _fail(Failure(entry.key, error), progress, result)
        progress.advance(entry.key)

    executor.run(regenerate, [(subject.planned, subject.entry.sha256) for subject in lacking], done)
    return texts


def _fail(failure: Failure, progress: Progress, result: Result) -> None:
    result.failures.append(failure)
    progress.failed(failure)


def _units(subjects: Iterable[Subject], texts: Mapping[str, str], request: Request, result: Result) -> list[_Unit]:
    units: dict[Any, _Unit] = {}
    for subject in sorted(subjects, key=lambda each: each.entry.key):
        entry = subject.entry
        if entry.key not in texts:
            continue
        ptx, cases = texts[entry.key], request.of(entry)
        sha256 = ptx_digest(ptx, entry.symbol)
        variant = entry.variant
        same = (sha256, entry.recipe, entry.layout, variant.op, variant.a_dtype, variant.c_dtype, tuple(cases))
        if same in units:
            units[same].subjects.append(subject)
            result.shared[entry.key] = units[same].first.key
        else:
            units[same] = _Unit([subject], ptx, sha256, request, cases)
    return list(units.values())


def _run(
    root: Path, units: Sequence[_Unit], journals: Mapping[str, Journal], executor: Executor, progress: Progress, result: Result, keep: bool
) -> None:
    waiting: list[tuple[_Unit, tuple[str, int, str]]] = []
    for unit in units:
        for run in unit.runs():
            known = journals[unit.first.arch].find(unit.identity(run)) if keep and unit.request.only is None else None
            if known is None:
                waiting.append((unit, run))
            else:
                unit.outcomes[run] = known
                result.journaled += 1
    progress.stage("emulating", len(waiting))

    def done(number: int, outcome: Any, error: str | None) -> None:
        unit, run = waiting[number]
        key = unit.first.key
        if outcome == {}:
            raise BuildError("a worker has other sources of densemoe than this process: give all the same, run again; what was finished stays")
        result.runs += 1
        if error is None and not outcome["passed"]:
            error = outcome["detail"]
        if error is None:
            unit.outcomes[run] = outcome
            what = {"variant": key, "case": run[0], "seed": run[1], "schedule": run[2]}
            journals[unit.first.arch].add(unit.identity(run), what, outcome)
        else:
            _fail(Failure(key, error, *run, _command(root, key, run)), progress, result)
        progress.advance(f"{key} {run[0]}")

    executor.run(run_task, _Tasks(waiting), done)


class _Tasks(Sequence[RunTask]):
    """The tasks of runs, each made when it is asked for: a task carries a whole PTX text."""

    def __init__(self, waiting: Sequence[tuple[_Unit, tuple[str, int, str]]]) -> None:
        self._waiting = waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def __getitem__(self, number: Any) -> Any:
        unit, run = self._waiting[number]
        return unit.task(run)


def _says_more(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a standing record is of the same code and of more runs."""
    same = all(old.get(name) == new[name] for name in ("kind", "emulator", "sources", "ptx"))
    return same and int(old.get("runs", 0)) > int(new["runs"])


def _write(root: Path, units: Iterable[_Unit], request: Request, result: Result) -> None:
    """Writes the records of variants that passed every run."""
    if request.only is not None:
        return
    records: dict[str, dict[str, dict[str, Any]]] = {}
    images: dict[str, str] = {}
    for unit in units:
        if not unit.outcomes or len(unit.outcomes) < len(unit.runs()):
            continue
        for subject in unit.subjects:
            key, record = subject.entry.key, unit.record(subject)
            if any(_says_more(old, record) for old in subject.entry.verification):
                continue
            records.setdefault(subject.entry.arch, {})[key] = record
            images[key] = subject.entry.sha256
            result.recorded[key] = record["worst"]
    if records:
        verification.write_records(root, records, images)
