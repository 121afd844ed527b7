"""The mutation suite: shipped kernels with one step deleted or altered, run on the emulator, which must notice.

A mutant is noticed when one of its runs ends with an error of the emulator, with a wrong output (contract section 9), with a remark that the
kernel itself does not give rise to, or not at all. What survives every run is listed. Survivors that behave as the kernel does are named, each
with its proof, in ``equivalent_mutants.json`` beside this file.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Final

from densemoe.compile.emulate.cases import Case
from densemoe.compile.emulate.running import emulator_digest, judge_digest, run_case
from densemoe.compile.emulator.mutation import Mutant, mutants
from densemoe.compile.executor import Executor
from densemoe.runtime.errors import DensemoeError, EmulatorError, ProblemError
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.variant import Variant

__all__ = [
    "EQUIVALENTS", "OUTCOMES", "SUBJECTS", "Equivalent", "Finding", "Report", "Subject", "Task",
    "equivalents", "run", "run_mutant", "sample", "subject",
]  # fmt: skip

EQUIVALENTS: Final = Path(__file__).with_name("equivalent_mutants.json")
Runs = tuple[tuple[str, str], ...]


def _runs(many: str, listed: str, *small: str) -> Runs:
    """(case, schedule), first those that notice most for their time: two cases under several schedules, small ones under one."""
    lazy = [(case, "lazy") for case in (*small, many, listed)]
    return (*lazy, (many, "eager"), (listed, "random:2"), (many, "pct:1:3"), (listed, "pct:2:3"), (many, "random:1"))


#: ``many``: one cluster takes so many tiles that every ring wraps more than once; its list of experts is waited for. ``listed``: more clusters than
#: tiles, a list that is read early, alphas of 0, CTAs that share a unit (FC2: two launches on one workspace). ``small``: one tile; no list; an empty
#: split; an odd number of steps; more steps than a ring has (sm_90a); rings that wrap where ``listed`` has too many CTAs for it.
SUBJECTS: Final[Mapping[str, Runs]] = {
    "fc1.sm100f.t128x128.c1x1.nvfp4-nvfp4": _runs(
        "m=129,e=4,h=320,i=128,kind=exact,post=1,list=1,sms=1",
        "m=261,e=5,h=1088,i=64,kind=exact,post=1,list=1,zeros=1,sms=8,early_list=1",
        "m=1,e=2,h=256,i=64,kind=exact,sms=1",
    ),
    "fc1.sm100f.t128x128.c1x2.nvfp4-nvfp4": _runs(
        "m=129,e=4,h=320,i=192,kind=exact,post=1,list=1,sms=2",
        "m=261,e=5,h=1088,i=64,kind=exact,post=1,list=1,zeros=1,sms=10,early_list=1",
        "m=1,e=2,h=256,i=64,kind=exact,sms=2",
        "m=1,e=5,h=256,i=64,kind=exact,sms=6",
        "m=129,e=1,h=1280,i=128,kind=exact,sms=2",
    ),
    "fc1.sm100f.t256x128.c2x1.nvfp4-nvfp4": _runs(
        "m=257,e=4,h=320,i=128,kind=exact,post=1,list=1,sms=2",
        "m=389,e=5,h=1088,i=64,kind=exact,post=1,list=1,zeros=1,sms=12,early_list=1",
        "m=1,e=2,h=256,i=64,kind=exact,sms=2",
        "m=513,e=2,h=576,i=64,kind=exact,list=1,sms=2",
    ),
    "fc2.sm100f.t128x128.c1x1.nvfp4-f32": _runs(
        "m=129,e=6,h=192,i=512,kind=exact,list=1,sms=1,splits=2",
        "m=133,e=4,h=192,i=512,kind=exact,list=1,zeros=1,sms=4,launches=2,splits=2,early_list=1",
        "m=1,e=2,h=128,i=256,kind=exact,list=1,sms=4,splits=2",
        "m=1,e=3,h=128,i=256,kind=exact,scalar=1,sms=1",
        "m=229,e=5,h=256,i=256,kind=exact,sms=1",
        "m=100,e=3,h=768,i=256,kind=exact,sms=2",
    ),
    "fc2.sm100f.t256x128.c2x1.nvfp4-f32": _runs(
        "m=257,e=6,h=192,i=512,kind=exact,list=1,sms=2,splits=2",
        "m=261,e=4,h=192,i=512,kind=exact,list=1,zeros=1,sms=8,launches=2,splits=2,early_list=1",
        "m=1,e=2,h=128,i=256,kind=exact,list=1,sms=8,splits=2",
        "m=1,e=3,h=128,i=256,kind=exact,scalar=1,sms=2",
        "m=485,e=5,h=256,i=256,kind=exact,sms=2",
        "m=200,e=3,h=768,i=256,kind=exact,sms=4",
    ),
    "fc1.sm90a.t8x64.c1x1.bf16-bf16": _runs(
        "m=9,e=3,h=384,i=64,kind=exact,post=1,list=1,sms=1",
        "m=9,e=4,h=640,i=64,kind=exact,post=1,list=1,zeros=1,sms=3,early_list=1",
        "m=1,e=1,h=256,i=64,kind=exact,sms=1",
        "m=9,e=2,h=640,i=128,kind=exact,sms=1",
        "m=21,e=6,h=320,i=128,kind=exact,post=1,list=1,zeros=1,sms=1,early_list=1",
    ),
    "fc2.sm90a.t8x64.c1x1.bf16-bf16": _runs(
        "m=9,e=3,h=192,i=384,kind=exact,list=1,sms=1",
        "m=9,e=4,h=192,i=384,kind=exact,list=1,zeros=1,sms=4,launches=2,early_list=1",
        "m=1,e=1,h=128,i=256,kind=exact,scalar=1,sms=1",
        "m=21,e=6,h=128,i=320,kind=exact,list=1,zeros=1,sms=1,launches=2,early_list=1",
    ),
    # Gathered tokens. ``many``: spans that begin inside of a unit; ``listed``: warps that have nothing to convert. ``small``: many row blocks of
    # one tile; more tiles a CTA than the table of rows has slots; tiles of both widths, K of four blocks.
    "groupedfc2.sm90a.t16x256.c1x1.bf16-bf16": _runs(
        "m=70,e=3,k=2,h=448,i=448,kind=exact,sms=2,launches=2",
        "m=9,e=4,k=2,h=192,i=320,kind=exact,zeros=1,sms=2,early_list=1,launches=2",
        "m=1,e=1,k=1,h=2112,i=64,kind=exact,sms=1,launches=2",
        "m=48,e=12,k=1,h=448,i=64,kind=exact,sms=1",
        "m=40,e=5,k=3,h=320,i=448,kind=exact,sms=1",
    ),
    # ``many``: pairs by token, several steps a warp, bad ids; ``listed``: pairs compared, ids of other ranks. ``small``: one pair; more pairs than
    # are staged; as many as are staged, and in several steps; more experts than threads.
    "route.sm90a.t32x4096.c1x1.i32-f32": _runs(
        "m=300,e=9,k=7,group=16,zeros=1,sms=3",
        "m=90,e=40,k=2,group=8,zeros=1,elsewhere=1,sms=2",
        "m=1,e=1,k=1,group=8,sms=1",
        "m=550,e=5,k=8,group=32,sms=1",
        "m=512,e=40,k=8,group=32,sms=1",
        "m=33,e=1500,k=3,group=8,zeros=1,sms=1",
        "m=2048,e=40,k=2,group=8,zeros=1,elsewhere=1,sms=1",
    ),
    # Activations of every form, by several CTAs and by one in several steps.
    "prepare.sm90a.t32x4096.c1x1.i32-f32.brings": _runs(
        "m=40,e=3,k=2,zeros=1,x=3,sms=4",
        "m=70,e=40,k=2,elsewhere=1,x=2,sms=3",
        "m=1,e=1,k=1,x=1,sms=2",
        "m=55,e=5,k=1,x=4,sms=2",
        "m=55,e=5,k=1,x=5,sms=2",
    ),
}
#: What can become of a mutant.
OUTCOMES: Final = ("error", "output", "remark", "hangs", "equivalent", "survived")
#: A run that takes as much processor time, and as many times that of all runs of the kernel as it is, never ends.
_HANG_SECONDS, _HANG_TIMES = 30.0, 10.0
_ERROR: Final = 300  # characters of a message that are kept


@dataclass(frozen=True)
class Subject:
    """A kernel whose mutants are run.

    Attributes:
        layout: of the packed weights that it reads.
        runs: (case, schedule), those first that find most for their time.
    """

    key: str
    layout: str
    ptx: str
    recipe: Mapping[str, Any]
    runs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Task:
    """One mutant for an executor.

    Attributes:
        name: empty for the kernel as it is.
        lints: remarks that the kernel gives rise to.
        processor_seconds: after so many it hangs; 0 is no limit.
    """

    subject: Subject
    name: str
    ptx: str
    lints: int = 0
    processor_seconds: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What became of a mutant.

    Attributes:
        outcome: ``error``, ``output``, ``remark`` or ``hangs``: noticed; ``survived``; ``equivalent``: survived, and was proven to
            behave as the kernel.
        detail: the error's first line, or the proof.
        run: case and schedule that noticed.
        seconds: of processor time, of all its runs.
    """

    key: str
    name: str
    kind: str
    family: str
    line: int
    text: str
    outcome: str
    detail: str = ""
    run: str = ""
    seconds: float = 0.0

    @property
    def noticed(self) -> bool:
        """Whether the emulator told it from the kernel."""
        return self.outcome not in ("survived", "equivalent")


@dataclass(frozen=True)
class Equivalent:
    """A proof for survivors.

    Attributes:
        kernels, name: shell patterns over keys of variants and names of mutants, in which ``[[]`` is a bracket.
        proof: why they behave as the kernel does, or the test that shows it.
    """

    kernels: str
    name: str
    proof: str

    def covers(self, key: str, name: str) -> bool:
        """Whether it speaks of this mutant."""
        return fnmatchcase(key, self.kernels) and fnmatchcase(name, self.name)


@dataclass
class Report:
    """Of one kernel or of all.

    Attributes:
        findings: of every mutant that was run.
        unused: proofs that no survivor needed: they are out of date.
    """

    findings: list[Finding] = field(default_factory=list)
    unused: list[Equivalent] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        """Findings with that outcome."""
        return sum(each.outcome == outcome for each in self.findings)

    @property
    def share(self) -> float:
        """Noticed, of those that are not equivalent."""
        others = [each for each in self.findings if each.outcome != "equivalent"]
        return sum(each.noticed for each in others) / max(len(others), 1)

    @property
    def equivalent_share(self) -> float:
        """Counted as equivalent, of all."""
        return self.count("equivalent") / max(len(self.findings), 1)

    def by_kernel(self) -> dict[str, Report]:
        """Of each kernel."""
        keys = dict.fromkeys(each.key for each in self.findings)
        return {key: Report([each for each in self.findings if each.key == key]) for key in keys}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kernels": {key: each._summary() for key, each in self.by_kernel().items()},
            "all": self._summary(),
            "findings": [asdict(each) for each in self.findings],
            "unused_proofs": [asdict(each) for each in self.unused],
        }

    def _summary(self) -> dict[str, Any]:
        by_family = {
            family: {"mutants": count, "noticed": sum(each.noticed for each in self.findings if each.family == family)}
            for family, count in sorted(Counter(each.family for each in self.findings).items())
        }
        outcomes = dict(sorted(Counter(each.outcome for each in self.findings).items()))
        return {
            "mutants": len(self.findings),
            "outcomes": outcomes,
            "noticed_share": round(self.share, 4),
            "equivalent_share": round(self.equivalent_share, 4),
            "families": by_family,
            "seconds": round(sum(each.seconds for each in self.findings), 1),
        }


def subject(key: str, runs: Sequence[tuple[str, str]] = ()) -> Subject:
    """Compiles a variant.

    Args:
        runs: (case, schedule); by default those of `SUBJECTS`.

    Raises:
        VariantError, ToolchainError: no such variant, or it does not compile.
        ProblemError: the suite has no runs for it and none are given.
    """
    from densemoe.compile import kernels, matrix, toolchain

    planned = {each.variant.key: each for each in matrix.load().profile("full")}.get(key)
    if planned is None:
        raise ProblemError(f"{key} is not in the matrix: `densemoe list --profile full` shows what is")
    chosen = tuple(runs) or SUBJECTS.get(key, ())
    if not chosen:
        raise ProblemError(f"the suite has no cases for {key}: give --case, as in --case m=9,e=2,h=384,i=64,kind=exact")
    compiled = toolchain.compile_variant(planned.variant, planned.kernel, options=planned.compiler_options)
    module = kernels.load(planned.kernel)
    return Subject(key, module.WEIGHT_LAYOUT, compiled.ptx, module.recipe(planned.variant).to_json(), chosen)


@cache
def equivalents() -> tuple[Equivalent, ...]:
    """The proofs."""
    return tuple(Equivalent(**each) for each in json.loads(EQUIVALENTS.read_text())["equivalent"])


def sample(found: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """``count`` of the mutants, of every kind as nearly as many as of the others; the same for a seed."""
    chooser = random.Random(seed)
    by_kind: dict[str, list[Mutant]] = {}
    for each in chooser.sample(list(found), len(found)):
        by_kind.setdefault(each.kind, []).append(each)
    queues = list(by_kind.values())
    chosen: list[Mutant] = []
    while queues and len(chosen) < count:
        for queue in list(queues):
            if len(chosen) < count:
                chosen.append(queue.pop())
            if not queue:
                queues.remove(queue)
    return sorted(chosen, key=lambda each: (each.line, each.kind))


class _HangError(Exception):
    """A run used up its processor time."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Ends what runs within after so much processor time; how busy the machine is does not matter. Only a main thread can be limited."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _HangError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_mutant(task: Task) -> dict[str, Any]:
    """Runs one mutant until it is noticed: outcome, detail, run, processor seconds, and the number of remarks.

    Raises:
        DensemoeError: a case cannot be made.
    """
    given, started = task.subject, time.process_time()
    recipe, variant = Recipe.from_json(given.recipe), Variant.parse(given.key)
    lints = 0

    def result(outcome: str, detail: str = "", where: str = "") -> dict[str, Any]:
        seconds = round(time.process_time() - started, 3)
        return {"outcome": outcome, "detail": detail[:_ERROR], "run": where, "seconds": seconds, "lints": lints}

    for case, schedule in given.runs:
        where = f"{case} {schedule}"
        try:
            with _limit(task.processor_seconds):
                outcome = run_case(variant, given.layout, task.ptx, recipe, Case.parse(case), 0, schedule)
        except EmulatorError as error:
            return result("error", str(error).splitlines()[0], where)
        except _HangError:
            return result("hangs", f"not done after {task.processor_seconds:.0f} s of processor time", where)
        if not outcome.passed:
            return result("output", next((line for line in outcome.detail.splitlines() if line), "differs"), where)
        lints = max(lints, int(outcome.counters["lints"]))
        if task.name and lints > task.lints:
            return result("remark", "a remark in the report", where)
    return result("survived")


def run(
    subjects: Iterable[Subject],
    executor: Executor,
    *,
    only: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    journal: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Report:
    """Runs the mutants of kernels.

    Args:
        only: shell patterns over names of mutants, of which one must match; by default all.
        count: of every kernel that many, a sample that ``seed`` decides; by default all.
        journal: a file of finished mutants, read first and appended to: a run that was interrupted goes on.
        progress: (what, done, of all) after every mutant.

    Raises:
        EmulatorError, DensemoeError: a kernel fails as it is.
    """
    report = Report()
    used: set[Equivalent] = set()
    for each in subjects:
        chosen = mutants(each.ptx)
        if only:
            chosen = [mutant for mutant in chosen if any(fnmatchcase(mutant.name, name.replace("[", "[[]")) for name in only)]
        if count is not None:
            chosen = sample(chosen, count, seed)
        plain = run_mutant(Task(each, "", each.ptx))
        if plain["outcome"] != "survived":
            raise EmulatorError(f"{each.key} fails as it is ({plain['run']}): {plain['detail']}")
        limit = max(_HANG_SECONDS, _HANG_TIMES * float(plain["seconds"]))
        for finding in _findings(each, chosen, int(plain["lints"]), limit, executor, journal, progress):
            proof = next((proof for proof in equivalents() if proof.covers(finding.key, finding.name)), None)
            if proof is not None and finding.outcome == "survived":
                used.add(proof)
                finding = replace(finding, outcome="equivalent", detail=proof.proof)
            report.findings.append(finding)
    if count is None and not only:
        keys = {each.key for each in report.findings}
        report.unused = [proof for proof in equivalents() if proof not in used and any(fnmatchcase(key, proof.kernels) for key in keys)]
    return report


def _findings(
    given: Subject,
    chosen: Sequence[Mutant],
    lints: int,
    limit: float,
    executor: Executor,
    journal: Path | None,
    progress: Callable[[str, int, int], None],
) -> list[Finding]:
    known = _read(journal)
    results: dict[int, Mapping[str, Any]] = {}
    labels = [_label(given, mutant) for mutant in chosen]
    results.update((i, known[label]) for i, label in enumerate(labels) if label in known)
    missing = [i for i in range(len(chosen)) if i not in results]
    tasks = [Task(given, chosen[i].name, chosen[i].apply(given.ptx), lints, limit) for i in missing]

    def done(number: int, result: Any, error: str | None) -> None:
        i = missing[number]
        if error is not None:
            result = {"outcome": "crash", "detail": error, "run": "", "seconds": 0.0}
        results[i] = result
        if journal is not None and result["outcome"] != "crash":
            with journal.open("a") as file:
                file.write(json.dumps({"label": labels[i], "name": chosen[i].name, "result": result}) + "\n")
        progress(given.key, len(results), len(chosen))

    progress(given.key, len(results), len(chosen))
    executor.run(run_mutant, tasks, done)
    crashed = [f"{chosen[i].name}: {result['detail']}" for i, result in results.items() if result["outcome"] == "crash"]
    if crashed:
        raise DensemoeError(f"{given.key}: {len(crashed)} mutants could not be judged: {crashed[0]}")
    return [
        Finding(
            given.key, mutant.name, mutant.kind, mutant.family, mutant.line, mutant.text,
            results[i]["outcome"], results[i]["detail"], results[i]["run"], results[i]["seconds"],
        )
        for i, mutant in enumerate(chosen)
    ]  # fmt: skip


def _label(given: Subject, mutant: Mutant) -> str:
    """Of all that a finding depends on."""
    text = repr((mutant.apply(given.ptx), given.recipe, given.layout, given.runs, emulator_digest(), judge_digest()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(journal: Path | None) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    if journal is None or not journal.exists():
        return found
    for line in journal.read_text().splitlines():
        try:
            entry = json.loads(line)
            found[entry["label"]] = entry["result"]
        except (ValueError, KeyError, TypeError):
            continue  # a torn last line
    return found
