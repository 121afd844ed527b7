"""``densemoe tune``: times of every variant on the device at hand, case by case, checked in the same run, kept in a journal.

    case (op, E, H, I, k, M, dtypes) ── every variant that can run it ── one launch, compared with the reference
                                     ── CUDA graphs over cold weights, all variants in turn ──► Measurement ──► journal ──► tune_table

The journal is a file of JSON lines, its first line the provenance. A line is written when its case is whole, so that an interrupted run goes on
where it stopped; a torn last line is dropped. A journal of another device, driver or set is refused, never mixed. Needs the extra [host].
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.bench_gathered import GatheredData, TiledData
from densemoe.runtime.bench_timing import Launch, Sample, Timed, Timer
from densemoe.runtime.errors import DensemoeError, ProblemError
from densemoe.runtime.loader import Loader
from densemoe.runtime.manifest import ManifestVariant
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.tune_cases import Case, Shape, in_order, worth_a_tile
from densemoe.runtime.tune_data import OpData, PackedWeights
from densemoe.runtime.variant import DETERMINISTIC, ROUTES

__all__ = [
    "DTYPES",
    "Candidate",
    "Journal",
    "Measurement",
    "Tuner",
    "candidates",
    "cases_of",
    "grouped_keys",
    "grouped_tiles",
    "stated",
    "stated_of_layer",
]

SCHEMA: Final = 1
ROUNDS: Final = 9
FEW_ROUNDS: Final = 3  # for what is not near the fastest
NEAR: Final = 1.25  # times the fastest estimate
FAR: Final = 6.0  # not timed beyond its estimate
SETTLED: Final = 3  # variants whose settings are tried beyond the defaults
#: Settings that state a fact of the caller's launches (when the list of active experts was complete): true or false, never a choice.
STATED: Final = ("early_list",)
#: (FC1's activations, FC1's output = FC2's activations, FC2's output): what a layer of each form runs.
DTYPES: Final = (("bf16", "bf16", "bf16"), ("nvfp4", "nvfp4", "bf16"))


@dataclass(frozen=True)
class Candidate:
    """A variant with values of its run-time settings; only those that differ from the defaults stand here."""

    key: str
    settings: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        """For tables: the key, and the settings behind it."""
        return " ".join([self.key, *(f"{name}={value}" for name, value in self.settings)])


@dataclass(frozen=True)
class Measurement:
    """One candidate in one case.

    Attributes:
        case: what was run.
        candidate: by what.
        sample: its times; None where it failed.
        passed: it agreed with the reference in this run.
        worst: largest error divided by its bound.
        weight_bytes: bytes of weights that a launch reads once.
        rotations: launches before the same weights are read again.
        detail: why it failed.
    """

    case: Case
    candidate: Candidate
    sample: Sample | None
    passed: bool
    worst: float
    weight_bytes: int
    rotations: int
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the journal."""
        case = {**vars(self.case), "shape": vars(self.case.shape)}
        sample = None if self.sample is None else vars(self.sample)
        own = {name: getattr(self, name) for name in ("passed", "worst", "weight_bytes", "rotations", "detail")}
        return {"case": case, "key": self.candidate.key, "settings": dict(self.candidate.settings), "sample": sample, **own}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measurement:
        """Raises KeyError or TypeError for what is not one."""
        case = Case(**{**document["case"], "shape": Shape(**document["case"]["shape"])})
        candidate = Candidate(document["key"], tuple(sorted(document["settings"].items())))
        sample = None if document["sample"] is None else Sample(**document["sample"])
        own = {name: document[name] for name in ("passed", "worst", "weight_bytes", "rotations", "detail")}
        return cls(case, candidate, sample, **own)


class Journal:
    """Measurements of one device, driver and set, kept as they come.

    Args:
        path: file; made where absent.
        provenance: of this run, ``bench_device.describe``.
        fresh: drop what stands there.

    Raises:
        ProblemError: it is no journal, or one of another device, driver or set.
    """

    SAME: Final = ("device", "capability", "cuda_driver", "arch", "set_sha256")

    def __init__(self, path: str | os.PathLike[str], provenance: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = Path(path)
        self.provenance: Mapping[str, Any] = provenance
        self._by_case: dict[Case, list[Measurement]] = {}
        if self.path.exists() and not fresh:
            self._read()
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write("w", {"schema": SCHEMA, "provenance": dict(provenance)})

    def _write(self, mode: str, document: Mapping[str, Any]) -> None:
        with self.path.open(mode) as file:
            file.write(json.dumps(document, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        text = self.path.read_text()
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            self.path.write_text("".join(lines[:-1]))  # the line that an interruption tore
            lines = lines[:-1]
        try:
            head = json.loads(lines[0])
            if head["schema"] != SCHEMA:
                raise ProblemError(f"journal {self.path}: schema {head['schema']}, this densemoe writes {SCHEMA}: use --fresh or another file")
            kept = head["provenance"]
            for line in lines[1:]:
                document = json.loads(line)
                measured = [Measurement.from_json(each) for each in document["measurements"]]
                self._by_case[measured[0].case] = measured
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ProblemError(f"journal {self.path} cannot be read ({type(error).__name__}: {error}): use --fresh or another file") from None
        differing = [name for name in self.SAME if kept.get(name) != self.provenance.get(name)]
        if differing:
            said = "; ".join(f"{name} {kept.get(name)} there, {self.provenance.get(name)} here" for name in differing)
            raise ProblemError(f"journal {self.path} is of something else ({said}): use --fresh or another file")
        self.provenance = kept

    def add(self, measured: Sequence[Measurement], sensors: Mapping[str, Any]) -> None:
        """Keeps one whole case."""
        if measured:
            self._by_case[measured[0].case] = list(measured)
            self._write("a", {"measurements": [each.to_json() for each in measured], "sensors": dict(sensors)})

    def __contains__(self, case: Case) -> bool:
        return case in self._by_case

    def measurements(self) -> list[Measurement]:
        """Everything kept."""
        return [each for measured in self._by_case.values() for each in measured]


def candidates(entries: Iterable[ManifestVariant], case: Case) -> list[Candidate]:
    """Every variant that can run the case, with its default settings, by key."""
    problem = case.problem()
    return [Candidate(entry.key) for entry in sorted(entries, key=lambda each: each.key) if can_implement(entry.variant, problem)[0]]


def stated(entry: ManifestVariant) -> dict[str, int]:
    """What is said of launches whose lists were complete before the launch before them began."""
    return {name: 1 for name, _ in entry.recipe.settings if name in STATED}


def stated_of_layer(entry: ManifestVariant, problem: Problem) -> dict[str, int]:
    """What a layer states of its launches: FC1 stands between FC2 and what wrote the lists, so that FC2 may fetch weights before FC1 ends."""
    if not problem.op.endswith("fc2") or not (problem.active_list or problem.group_tile):
        return {}
    return stated(entry)


def _with_settings(entry: ManifestVariant) -> list[Candidate]:
    """All combinations of a variant's settings but the defaults."""
    free = [(name, allowed) for name, allowed in entry.recipe.settings if name not in STATED]
    found = []
    for values in itertools.product(*(allowed for _, allowed in free)):
        own = [(name, value) for value, (name, allowed) in zip(values, free, strict=True) if value != allowed[0]]
        if own:
            found.append(Candidate(entry.key, tuple(sorted(own))))
    return found


def cases_of(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    forms: Sequence[bool],
    dtypes: Sequence[tuple[str, str, str]] = DTYPES,
    tiles: Mapping[tuple[str, str, str], Collection[int]] | None = None,
) -> dict[tuple[Shape, str], list[Case]]:
    """Cases by (shape, op), each list with the coarse token counts first.

    Args:
        forms: with a list of active experts, or dense.
        tiles: by dtypes, the tiles of the grouped kernels that are measured beside the form with a list; each is a case of its own where it is worth
            one, and at the fewest tokens: what a launch costs by itself is hardly to be told from long ones.
    """
    found: dict[tuple[Shape, str], list[Case]] = {}
    for shape in shapes:
        for op in ("fc1", "fc2"):
            by_pair: dict[tuple[str, str], Collection[int]] = {}
            for first, middle, last in dtypes:
                own = (tiles or {}).get((first, middle, last), ()) if True in forms else ()
                by_pair.setdefault((first, middle) if op == "fc1" else (middle, last), own)
            cases = found[shape, op] = []
            for m in in_order(tokens):
                cases += [Case(op, shape, m, a, c, active) for active in forms for a, c in by_pair]
                worth = [(pair, tile) for pair, own in by_pair.items() for tile in sorted(own) if m == min(tokens) or worth_a_tile(shape, m, tile)]
                # FC2 of both activations' layers is one case, since NVFP4 comes decoded
                gathered = dict.fromkeys(Case(f"grouped{op}", shape, m, "bf16", c, False, tile) for (_, c), tile in worth)
                cases += gathered
    return found


def grouped_keys(
    entries: Iterable[ManifestVariant], op: str, c_dtype: str, deterministic: bool = False, routes: bool = False
) -> list[tuple[int, str]]:
    """(rows of a tile, key) of a grouped op's variants that write a dtype, ascending. Of FC2 those that add in any order, or in one; those that
    ``route`` goes before, or that sort the router's choice themselves."""
    wanted = (op, c_dtype, deterministic and op == "groupedfc2", routes)
    variants = [each.variant for each in entries]
    own = [each for each in variants if (each.op, each.c_dtype, bool(each.option(DETERMINISTIC)), bool(each.option(ROUTES))) == wanted]
    return sorted((each.tile_m, each.key) for each in own)


def grouped_tiles(
    entries: Collection[ManifestVariant], c_dtypes: Mapping[str, str], deterministic: bool = False, routes: bool = False
) -> set[int]:
    """Rows of the tiles that every one of a layer's grouped ops has a variant for.

    Args:
        c_dtypes: output dtype of each op.
        deterministic: FC2 in one order.
        routes: of those that sort the router's choice themselves.
    """
    keys = (grouped_keys(entries, op, c_dtype, deterministic, routes) for op, c_dtype in c_dtypes.items())
    return set.intersection(*({tile for tile, _ in each} for each in keys))


@dataclass
class _Group:
    """Data of one shape and op, by (dtypes, form), made when a case first needs it."""

    weights: PackedWeights | None = None
    data: dict[tuple[str, str, bool], OpData] = field(default_factory=dict)
    gathered: dict[tuple[str, str], GatheredData] = field(default_factory=dict)

    def close(self) -> None:
        for gathered in self.gathered.values():
            gathered.close()
        for each in self.data.values():
            each.close()
        if self.weights is not None:
            self.weights.close()


class Tuner:
    """Measures cases on one device.

    Args:
        rounds: interleaved replays of each candidate near the fastest.
        say: gets a line of progress a case.
        clock: monotonic seconds.
        l2: bytes of the L2 to rotate over; the device's where None, 0 does not rotate.
    """

    def __init__(
        self,
        loader: Loader,
        device: int = 0,
        *,
        rounds: int = ROUNDS,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
        l2: int | None = None,
        seed: int = 0,
    ) -> None:
        self.loader, self.device, self.rounds, self.say, self.clock, self.seed = loader, device, rounds, say, clock, seed
        self.driver = loader.driver
        self.driver.use_device(device)
        self.entries = loader.manifest(device).variants
        self.l2 = self.driver.attribute("L2_CACHE_SIZE", device) if l2 is None else l2
        self.timer = Timer(self.driver)

    @property
    def tiles(self) -> dict[tuple[str, str, str], set[int]]:
        """By dtypes of a layer, the tiles of grouped kernels that both ops have."""
        every = list(self.entries.values())
        return {each: grouped_tiles(every, {"groupedfc1": each[1], "groupedfc2": each[2]}) for each in DTYPES}

    def run(
        self,
        groups: Mapping[tuple[Shape, str], Sequence[Case]],
        journal: Journal,
        *,
        budget: float = float("inf"),
        sensors: Callable[[], Mapping[str, Any]] = dict,
    ) -> bool:
        """Measures what the journal lacks; True where nothing is left.

        Args:
            budget: seconds; each (shape, op) gets an equal part of what is left, what one does not use goes to the next.
        """
        end = self.clock() + budget
        whole = True
        waiting = {key: [case for case in cases if case not in journal and candidates(self.entries.values(), case)] for key, cases in groups.items()}
        waiting = {key: cases for key, cases in waiting.items() if cases}
        total, done = sum(len(cases) for cases in waiting.values()), 0
        for position, ((shape, op), cases) in enumerate(waiting.items()):
            until = self.clock() + (end - self.clock()) / (len(waiting) - position)
            with_data = _Group()
            try:
                for case in cases:
                    if self.clock() >= until:
                        whole = False
                        self.say(f"budget of {op} {shape.name} used; its remaining cases wait for the next run")
                        break
                    start = self.clock()
                    measured = self.measure(case, self._data(with_data, case, max(each.m for each in cases)))
                    journal.add(measured, sensors())
                    done += 1
                    self.say(f"[{done}/{total}] {case.text}: {summary(measured)} ({self.clock() - start:.1f} s)")
            finally:
                with_data.close()
        return whole

    def cases(self, cases: Iterable[Case]) -> Iterator[list[Measurement]]:
        """Measures cases in the order given, making and freeing their data; for samples of a table."""
        for _, grouped in itertools.groupby(cases, lambda case: (case.shape, case.plain_op)):
            own, group = list(grouped), _Group()
            try:
                for case in own:
                    measured = self.measure(case, self._data(group, case, max(each.m for each in own)))
                    self.say(f"{case.text}: {summary(measured)}")
                    yield measured
            finally:
                group.close()

    def _data(self, group: _Group, case: Case, largest_m: int) -> OpData | TiledData:
        if not case.group_tile:
            return self._listed(group, case, largest_m)
        name = (case.a_dtype, case.c_dtype)
        if name not in group.gathered:
            group.gathered[name] = GatheredData(self._listed(group, replace(case, active=True), largest_m))
        return group.gathered[name].tiled(case.group_tile)

    def _listed(self, group: _Group, case: Case, largest_m: int) -> OpData:
        layout = next(entry.layout for entry in self.entries.values() if can_implement(entry.variant, case.problem())[0])
        if group.weights is None:
            group.weights = PackedWeights(self.driver, case.plain_op, case.shape, layout, self.l2, self.seed)
        name = (case.a_dtype, case.c_dtype, case.active)
        if name not in group.data:
            group.data[name] = OpData(
                self.driver,
                case.plain_op,
                case.shape,
                case.a_dtype,
                case.c_dtype,
                layout,
                largest_m,
                active=case.active,
                l2=self.l2,
                seed=self.seed,
                weights=group.weights,
            )
        return group.data[name]

    def measure(self, case: Case, made: OpData | TiledData) -> list[Measurement]:
        """Every candidate of a case: checked, then timed in turn. Settings beyond the defaults are tried for the fastest variants."""
        first = self._measure(case, made, candidates(self.entries.values(), case))
        fastest = sorted((each for each in first if each.sample is not None), key=lambda each: each.sample.microseconds)  # type: ignore[union-attr]
        more = [candidate for each in fastest[:SETTLED] for candidate in _with_settings(self.entries[each.candidate.key])]
        if not more:
            return first
        # what is compared is timed in turn: the defaults again beside their settings
        again = self._measure(case, made, [*(each.candidate for each in fastest[:SETTLED]), *more])
        renewed = {each.candidate for each in again}
        return [*(each for each in first if each.candidate not in renewed), *again]

    def _measure(self, case: Case, made: OpData | TiledData, wanted: Sequence[Candidate]) -> list[Measurement]:
        rotations = made.bind(case.m)
        results: dict[Candidate, Measurement] = {}
        plans: dict[Candidate, Plan] = {}
        timed: dict[str, Timed] = {}
        near: dict[str, Timed] = {}
        try:
            estimates: dict[Candidate, float] = {}
            for candidate in wanted:
                results[candidate] = self._checked(case, made, candidate, plans)
                if results[candidate].passed:
                    estimates[candidate] = self.timer.estimate(self._launches(plans[candidate], rotations))
            best = min(estimates.values(), default=0.0)
            by_text = {candidate.text: candidate for candidate in wanted}
            for candidate, estimate in estimates.items():
                if estimate > FAR * best:
                    sample = Sample(estimate, estimate, estimate, 1, len(rotations))
                    results[candidate] = replace(results[candidate], sample=sample)
                    continue
                graph = self.timer.graph(self._launches(plans[candidate], rotations), estimate if estimate < NEAR * best else 0.0)
                (near if estimate < NEAR * best else timed)[candidate.text] = graph
            for group, rounds in ((near, self.rounds), (timed, FEW_ROUNDS)):
                for text, sample in (self.timer.interleave(group, rounds) if group else {}).items():
                    results[by_text[text]] = replace(results[by_text[text]], sample=sample)
        finally:
            for graph in (*near.values(), *timed.values()):
                graph.close()
            for plan in plans.values():
                plan.close()
        return list(results.values())

    @staticmethod
    def _launches(plan: Plan, rotations: Sequence[Mapping[str, int]]) -> list[Launch]:
        def launch(addresses: Mapping[str, int]) -> Launch:
            def go(stream: int) -> None:
                plan.rebind(addresses)
                plan.launch(stream)

            return go

        return [launch(each) for each in rotations]

    def _checked(self, case: Case, made: OpData | TiledData, candidate: Candidate, plans: dict[Candidate, Plan]) -> Measurement:
        addresses = made.bind(case.m)
        failed = Measurement(case, candidate, None, False, 0.0, made.touched_bytes(case.m), len(addresses))
        try:
            problem = made.problem(case.m)
            settings = {**stated_of_layer(self.entries[candidate.key], problem), **dict(candidate.settings)}
            plan = self.loader.plan(problem, addresses[0], self.device, candidate.key, settings=settings)
        except DensemoeError as error:
            return replace(failed, detail=str(error))
        plans[candidate] = plan
        made.poison(case.m)
        plan.launch(self.timer.stream)
        self.driver.synchronize()
        report = made.check(case.m, made.fetch(case.m))
        return replace(failed, passed=report.passed, worst=float(report.worst), detail="" if report.passed else report.text)


def summary(measured: Sequence[Measurement]) -> str:
    """A case in words: the fastest, how far the next is, what failed."""
    timed = sorted((each for each in measured if each.sample is not None), key=lambda each: each.sample.microseconds)  # type: ignore[union-attr]
    failed = [each for each in measured if not each.passed]
    parts = []
    if timed:
        sample = timed[0].sample
        assert sample is not None
        rate = timed[0].weight_bytes / sample.microseconds / 1e6
        parts.append(f"{timed[0].candidate.text} {sample.microseconds:.2f} us, {rate:.2f} TB/s, spread {sample.spread:.1%}")
        if len(timed) > 1:
            other = timed[1].sample
            assert other is not None
            parts.append(f"next {other.microseconds / sample.microseconds:.2f} x")
    parts += [f"FAILED {each.candidate.text}: {each.detail.splitlines()[0] if each.detail else 'no reason'}" for each in failed]
    return "; ".join(parts) or "no candidate"
