"""``densemoe bench ops``, and what it shares with ``layer`` (bench_layer.py): our forms, the read-only floor and competitors side by side, in turn.

    point (shape, M) ── ours, checked ─┐
                     ── those of other artifact sets, checked ─┤
                     ── read-only over the same bytes, in as many launches ─┼─ CUDA graphs over cold weights, replayed in turn ──► row
                     ── each competitor ─┘

Rows are plain dictionaries, which is also the raw JSON. A competitor that is absent or fails is named with its reason and leaves its column empty.
Needs the extra [host].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from densemoe.runtime import bounds
from densemoe.runtime.bench_competitors import Competitor, Unavailable, Workload
from densemoe.runtime.bench_gathered import GatheredData
from densemoe.runtime.bench_nvfp4 import Nvfp4Competitor
from densemoe.runtime.bench_read import ReadKernel
from densemoe.runtime.bench_report import CHOSEN, GATHERED, ORDERED, OURS, READ
from densemoe.runtime.bench_timing import Launch, Sample, Timed
from densemoe.runtime.errors import DensemoeError, ProblemError, SelectionError
from densemoe.runtime.grouping import group_tile
from densemoe.runtime.loader import Loader
from densemoe.runtime.manifest import ManifestVariant
from densemoe.runtime.plan import Plan
from densemoe.runtime.select import Choice, load_table
from densemoe.runtime.tune import Tuner, grouped_keys, grouped_tiles, stated
from densemoe.runtime.tune_cases import PEAK_FLOPS, Case, Shape, flops, roofline, worth_a_tile
from densemoe.runtime.tune_data import OpData, PackedWeights

__all__ = ["ArtifactSet", "Bench", "Point", "launch_costs", "open_read", "regions"]

_ALIGNED: Final = 128


@dataclass
class Point:
    """What is timed at one point.

    Attributes:
        columns: launches of one rotation by column, and how many of them make one unit.
        ready: what others have captured.
        missing: why a column stays empty here.
        same: columns that are another one of this point, by the name of that.
        searched: by competitor and op: configurations that were tried, and those that there are.
    """

    columns: dict[str, tuple[list[Launch], int]] = field(default_factory=dict)
    ready: dict[str, Timed] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    searched: dict[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)


class Bench:
    """Benchmarks on a Tuner's device.

    Args:
        read: the read-only kernel, None where it does not load: its column stays empty.
        competitors: others; those that are absent say so themselves.
        beside: other artifact sets by name: their kernels are measured in the same rounds, in columns that begin with the name.
        sustained: seconds that each column is replayed without pause besides, 0 for bursts alone.
        sensors: clocks and power, read after each point.
    """

    def __init__(
        self,
        tuner: Tuner,
        read: ReadKernel | None,
        competitors: Sequence[Competitor] = (),
        *,
        sustained: float = 0.0,
        sensors: Callable[[], Mapping[str, Any]] = dict,
        bytes_per_second: float = 0.0,
        beside: Mapping[str, Loader] = MappingProxyType({}),
    ) -> None:
        self.tuner, self.read, self.competitors = tuner, read, competitors
        self.sustained, self.sensors, self.bytes_per_second = sustained, sensors, bytes_per_second
        self.arch = tuner.loader.manifest(tuner.device).arch
        self.sets = [ArtifactSet("", tuner.loader, tuner.entries)]
        for name, loader in beside.items():
            entries = loader.manifest(tuner.device).variants
            check_layouts(name, tuner.entries, entries)
            self.sets.append(ArtifactSet(f"{name}: ", loader, entries))

    # ---- FC1 and FC2 alone

    def ops(self, shapes: Sequence[Shape], tokens: Sequence[int], active: bool, dtypes: tuple[str, str, str]) -> Iterator[dict[str, Any]]:
        """A row for each (shape, op, M)."""
        for shape in shapes:
            for op in ("fc1", "fc2"):
                a_dtype, c_dtype = dtypes[:2] if op == "fc1" else dtypes[1:]
                made = self._data(op, shape, a_dtype, c_dtype, max(tokens), active)
                try:
                    for m in tokens:
                        yield self._op(Case(op, shape, m, a_dtype, c_dtype, active), made)
                finally:
                    made.close()
                    self._release()

    def _data(self, op: str, shape: Shape, a_dtype: str, c_dtype: str, largest_m: int, active: bool, decoded: bool = False) -> OpData:
        tuner = self.tuner
        layout = next(entry.layout for entry in tuner.entries.values() if entry.variant.op == op)
        return OpData(tuner.driver, op, shape, a_dtype, c_dtype, layout, largest_m, active=active, l2=tuner.l2, seed=tuner.seed, decoded=decoded)

    def _op(self, case: Case, made: OpData) -> dict[str, Any]:
        point, rotations = Point(), made.bind(case.m)
        opened: list[Plan | GatheredData] = []
        try:
            added = [self._add_set(point, each, case, made, rotations, opened) for each in self.sets]
            touched = made.touched_bytes(case.m)
            self._add_read(point, [[region] for region in regions(made.weights, touched, len(rotations))])
            routings = [made.routing(case.m, rotation) for rotation in range(len(rotations))]
            self._add_competitors(point, Workload(case.op, case.shape, case.m, routings))
            row = self._timed(point, case, touched)
        finally:
            for one in opened:
                one.close()
        choice, report = added[0][0], bounds.combine([report for _, reports in added for report in reports])
        assert choice is not None  # of the first set, which has to have one
        row.update(variant=choice.variant.key, settings=dict(choice.settings), provenance=choice.provenance, reason=choice.reason)
        row.update(passed=report.passed, worst=float(report.worst), detail="" if report.passed else report.text)
        return row

    def _add_set(
        self,
        point: Point,
        of: ArtifactSet,
        case: Case,
        made: OpData,
        rotations: Sequence[Mapping[str, int]],
        opened: list[Plan | GatheredData],
    ) -> tuple[Choice | None, list[bounds.Report]]:
        """Columns of one artifact set: the selection's choice, None where another set has none, and reports of their checks.

        Args:
            opened: what is to be closed is appended.
        """
        tuner, problem = self.tuner, case.problem()
        choice: Choice | None = None
        reports: list[bounds.Report] = []
        try:
            choice = of.loader.select(problem, tuner.device)
        except SelectionError as error:
            if not of.name:
                raise
            point.missing[of.name + OURS] = str(error)
        else:
            plan = of.loader.plan(problem, rotations[0], tuner.device, settings=of.stated(choice.variant.key) if case.active else None)
            opened.append(plan)
            made.poison(case.m)
            plan.launch(tuner.timer.stream)
            tuner.driver.synchronize()
            reports.append(made.check(case.m, made.fetch(case.m)))
            point.columns[of.name + OURS] = (tuner._launches(plan, rotations), 1)
            if not of.name:
                point.same[CHOSEN] = OURS
        if case.active:
            reports += self._add_gathered(point, of, case, made, opened)
        return choice, reports

    def _add_gathered(self, point: Point, of: ArtifactSet, case: Case, made: OpData, opened: list[Plan | GatheredData]) -> list[bounds.Report]:
        """A column for each tile of a set's grouped kernels of these dtypes; reports of their checks."""
        tuner, op = self.tuner, f"grouped{case.op}"
        reports: list[bounds.Report] = []
        tiles = grouped_tiles(of.entries.values(), {op: case.c_dtype})
        wanted = group_tile(load_table(self.arch).get("grouping"), tiles, case.m, case.shape.top_k, case.shape.experts)
        if tiles:
            data = GatheredData(made)
            opened.append(data)
        for tile, key in grouped_keys(of.entries.values(), op, case.c_dtype):
            if tile != wanted and not worth_a_tile(case.shape, case.m, tile):
                continue
            column = f"{GATHERED} {key.split('.')[2]}"
            name = of.name + column
            reports.append(self._add_one_gathered(point, of, case.m, data, opened, tile, key, column))
            if not of.name and tile == wanted and of.loader.select(data.problem(case.m, tile), tuner.device).variant.key == key:
                point.same[CHOSEN] = name
        ordered = grouped_keys(of.entries.values(), op, case.c_dtype, deterministic=True) if case.op == "fc2" else []
        if wanted in dict(ordered):
            key = of.loader.select(data.problem(case.m, wanted, True), tuner.device).variant.key
            reports.append(self._add_one_gathered(point, of, case.m, data, opened, wanted, key, f"{GATHERED}, {ORDERED}", True))
        return reports

    def _add_one_gathered(
        self,
        point: Point,
        of: ArtifactSet,
        m: int,
        data: GatheredData,
        opened: list[Plan | GatheredData],
        tile: int,
        key: str,
        column: str,
        deterministic: bool = False,
    ) -> bounds.Report:
        """A column of one variant over gathered tokens; the report of its check."""
        tuner, problem, rotations = self.tuner, data.problem(m, tile, deterministic), data.bind(m, tile, deterministic=deterministic)
        plan = of.loader.plan(problem, rotations[0], tuner.device, key, settings=of.stated(key))
        opened.append(plan)
        data.poison(m, tile)
        plan.launch(tuner.timer.stream)
        tuner.driver.synchronize()
        report = data.check(m, tile)
        point.columns[of.name + column] = (tuner._launches(plan, rotations), 1)
        return report

    # ---- columns

    def _add_read(self, point: Point, launches: Sequence[Sequence[tuple[int, int]]]) -> None:
        if self.read is None:
            point.missing[READ] = "the read-only kernel does not load on this driver"
            return
        read = self.read
        point.columns[READ] = ([read.launch(pointer, size) for unit in launches for pointer, size in unit], len(launches[0]))

    def _add_competitors(self, point: Point, work: Workload) -> None:
        for competitor in self.competitors:
            try:
                point.ready[competitor.name] = competitor.prepare(work)
                if isinstance(competitor, Nvfp4Competitor):
                    point.searched[competitor.name] = competitor.searched(work)
            except Unavailable as error:
                point.missing[competitor.name] = str(error)
            except Exception as error:  # whatever another project's code raises: its column stays empty, with the reason
                point.missing[competitor.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"

    def _timed(self, point: Point, case: Case, touched: int) -> dict[str, Any]:
        tuner = self.tuner
        graphs: dict[str, Timed] = {}
        try:
            for name, (launches, unit) in point.columns.items():
                graphs[name] = tuner.timer.graph(launches, tuner.timer.estimate(launches), unit)
            graphs.update(point.ready)
            samples = tuner.timer.interleave(graphs, tuner.rounds)
            sensors = dict(self.sensors())
            sustained: dict[str, Sample] = {}
            if self.sustained > 0:
                sustained = {name: tuner.timer.sustain(each, self.sustained, tuner.clock) for name, each in graphs.items()}
            for times in (samples, sustained):
                times.update({name: times[other] for name, other in point.same.items() if other in times})
        finally:
            for each in (*graphs.values(), *(each for name, each in point.ready.items() if name not in graphs)):
                each.close()
        row = self._row(case, touched, samples, sensors)
        row["missing"] = dict(point.missing)
        row["same"] = dict(point.same)
        if point.searched:
            row["searched"] = {name: {op: list(tried) for op, tried in ops.items()} for name, ops in point.searched.items()}
        if sustained:
            row["sustained_us"] = {name: round(each.microseconds, 3) for name, each in sustained.items()}
            row["sustained_sensors"] = dict(self.sensors())
        tuner.say(_line(row))
        return row

    def _row(self, case: Case, touched: int, samples: Mapping[str, Sample], sensors: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "op": case.op,
            "shape": vars(case.shape),
            "m": case.m,
            "a_dtype": case.a_dtype,
            "c_dtype": case.c_dtype,
            "active": case.active,
            "weight_bytes": touched,
            "us": {name: round(each.microseconds, 3) for name, each in samples.items()},
            "spread": {name: round(each.spread, 4) for name, each in samples.items()},
            "runs": tuner_runs(samples),
            "flops": flops(case),
            "sensors": dict(sensors),
        }
        if READ in samples:
            row["share_of_read"] = {name: round(samples[READ].microseconds / each.microseconds, 4) for name, each in samples.items()}
        if self.bytes_per_second:
            row["roofline_us"] = round(roofline(touched, flops(case), self.bytes_per_second, PEAK_FLOPS[self.arch]), 3)
        return row

    def _release(self) -> None:
        """What competitors keep of a shape."""
        for competitor in self.competitors:
            competitor.release()


@dataclass(frozen=True)
class ArtifactSet:
    """Kernels that are measured.

    Attributes:
        name: what the set's columns begin with; empty for the set that the others are compared with.
    """

    name: str
    loader: Loader
    entries: Mapping[str, ManifestVariant]

    def stated(self, key: str) -> dict[str, int]:
        """What is true of the launches of ``ops``: no list that they read comes from the launch before."""
        return stated(self.entries[key])


def check_layouts(name: str, ours: Mapping[str, ManifestVariant], theirs: Mapping[str, ManifestVariant]) -> None:
    """Raises ProblemError where another set reads weights packed in another layout: one copy of the weights serves both."""
    known, other = ({(entry.variant.op, entry.layout) for entry in entries.values()} for entries in (ours, theirs))
    for op, layout in sorted(other - known):
        of_op = sorted(each for which, each in known if which == op)
        if of_op:
            packed = ", ".join(of_op)
            raise ProblemError(f"--beside {name}: its {op} reads weights packed as {layout}, ours as {packed}: measure the two in runs of their own")


def tuner_runs(samples: Mapping[str, Sample]) -> int:
    """Replays behind each median."""
    return min((each.runs for each in samples.values()), default=0)


def _line(row: Mapping[str, Any]) -> str:
    times = ", ".join(f"{name} {us:.2f} us" for name, us in row["us"].items())
    share = row.get("share_of_read", {}).get(OURS)
    return f"{row['op']} {row['shape']['name']} M = {row['m']}: {times}" + (f"; T_read / T {share:.3f}" if share is not None else "")


def regions(weights: PackedWeights, size: int, count: int) -> list[tuple[int, int]]:
    """(address, bytes) of ``count`` regions of ``size`` bytes, one behind the other through the copies of the weights."""
    size = max(_ALIGNED, size // _ALIGNED * _ALIGNED)
    found = []
    per_copy = max(1, weights.nbytes // size)
    for index in range(count):
        found.append((weights.copy(index // per_copy) + index % per_copy * size, size))
    return found


def launch_costs(tuner: Tuner) -> list[dict[str, Any]]:
    """Host and device microseconds of launches of a tiny problem, by way of launching."""
    driver, timer = tuner.driver, tuner.timer
    shape = Shape("tiny", 1, 1, 64, 64)
    layout = next(entry.layout for entry in tuner.entries.values() if entry.variant.op == "fc1")
    a_dtype = "bf16" if any(entry.variant.a_dtype == "bf16" and entry.variant.op == "fc1" for entry in tuner.entries.values()) else "nvfp4"
    made = OpData(driver, "fc1", shape, a_dtype, a_dtype, layout, 1)
    try:
        with tuner.loader.plan(made.problem(1), made.bind(1)[0], tuner.device) as plan:
            rows = []
            addresses = made.bind(1)[0]

            def rebound(stream: int) -> None:
                plan.rebind(addresses)
                plan.launch(stream)

            for what, each, bar in (("Plan.launch", plan.launch, "<= 4 us"), ("Plan.rebind and launch", rebound, "")):
                rows.append({"what": f"{what}, host", "us": _host_microseconds(tuner, each), "bar": bar})
            graph = timer.graph([plan.launch] * 200)
            try:
                sample = timer.interleave({"graph": graph}, tuner.rounds)["graph"]
                rows.append({"what": "one launch inside a CUDA graph, device", "us": sample.microseconds, "bar": ""})
                rows.append({"what": "graph of 200 launches, host", "us": _host_microseconds(tuner, graph.replay, 20), "bar": ""})
            finally:
                graph.close()
            return rows
    finally:
        made.close()


def _host_microseconds(tuner: Tuner, call: Callable[[int], None], count: int = 200) -> float:
    """Median host time of a call over batches that the device keeps up with."""
    times = []
    for _ in range(tuner.rounds * 4):
        tuner.driver.synchronize()
        start = tuner.clock()
        for _ in range(count):
            call(tuner.timer.stream)
        times.append((tuner.clock() - start) * 1e6 / count)
    tuner.driver.synchronize()
    settled = sorted(times[len(times) // 2 :])  # the first half warms clocks and caches
    return settled[len(settled) // 2]


def open_read(tuner: Tuner) -> ReadKernel | None:
    """The read-only kernel, or None where the driver does not take it, which is said."""
    try:
        return ReadKernel(tuner.driver, tuner.device, tuner.loader.manifest(tuner.device).arch)
    except DensemoeError as error:
        tuner.say(f"the read-only kernel does not load, its column stays empty: {error}")
        return None
