"""``densemoe bench ops`` and ``layer``: our choice, the read-only floor and competitors side by side, in turn, in one run.

    point (shape, M) ── ours, checked ─┐
                     ── read-only over the same bytes, in as many launches ─┼─ CUDA graphs over cold weights, replayed in turn ──► row
                     ── each competitor ─┘

Rows are plain dictionaries, which is also the raw JSON. A competitor that is absent or fails is named with its reason and leaves its column empty.
Needs the extra [host].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from densemoe.runtime import bounds
from densemoe.runtime.bench_competitors import Competitor, Unavailable, Workload
from densemoe.runtime.bench_gathered import GatheredData
from densemoe.runtime.bench_read import ReadKernel
from densemoe.runtime.bench_timing import Launch, Sample, Timed
from densemoe.runtime.errors import DensemoeError
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem
from densemoe.runtime.tune import Tuner
from densemoe.runtime.tune_cases import PEAK_FLOPS, Case, Shape, flops, roofline
from densemoe.runtime.tune_data import DeviceMemory, OpData, PackedWeights

__all__ = ["OURS", "READ", "Bench"]

OURS: Final = "densemoe"
READ: Final = "read-only"
WITH_PREPARE: Final = "densemoe with prepare"
_ALIGNED: Final = 128


@dataclass
class _Point:
    """What is timed at one point: launches of one rotation by column, and the launches that make one unit."""

    columns: dict[str, tuple[list[Launch], int]] = field(default_factory=dict)
    ready: dict[str, Timed] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


class Bench:
    """Benchmarks on a Tuner's device.

    Args:
        read: the read-only kernel, None where it does not load: its column stays empty.
        competitors: others; those that are absent say so themselves.
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
    ) -> None:
        self.tuner, self.read, self.competitors = tuner, read, competitors
        self.sustained, self.sensors, self.bytes_per_second = sustained, sensors, bytes_per_second
        self.arch = tuner.loader.manifest(tuner.device).arch

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

    def _data(self, op: str, shape: Shape, a_dtype: str, c_dtype: str, largest_m: int, active: bool) -> OpData:
        tuner = self.tuner
        layout = next(entry.layout for entry in tuner.entries.values() if entry.variant.op == op)
        return OpData(tuner.driver, op, shape, a_dtype, c_dtype, layout, largest_m, active=active, l2=tuner.l2, seed=tuner.seed)

    def _op(self, case: Case, made: OpData) -> dict[str, Any]:
        tuner = self.tuner
        point, rotations = _Point(), made.bind(case.m)
        choice = tuner.loader.select(case.problem(), tuner.device)
        plan = tuner.loader.plan(case.problem(), rotations[0], tuner.device)
        try:
            made.poison(case.m)
            plan.launch(tuner.timer.stream)
            tuner.driver.synchronize()
            report = made.check(case.m, made.fetch(case.m))
            point.columns[OURS] = (tuner._launches(plan, rotations), 1)
            touched = made.touched_bytes(case.m)
            self._add_read(point, [[region] for region in _regions(made.weights, touched, len(rotations))])
            routings = [made.routing(case.m, rotation) for rotation in range(len(rotations))]
            self._add_competitors(point, Workload(case.op, case.shape, case.m, routings))
            gathered, grouped = self._add_gathered(point, case, made)
            try:
                row = self._timed(point, case, touched)
            finally:
                for each in grouped:
                    each.close()
        finally:
            plan.close()
        row.update(variant=choice.variant.key, settings=dict(choice.settings), provenance=choice.provenance, reason=choice.reason)
        report = bounds.combine([report, *gathered]) if gathered else report
        row.update(passed=report.passed, worst=float(report.worst), detail="" if report.passed else report.text)
        return row

    def _add_gathered(self, point: _Point, case: Case, made: OpData) -> tuple[list[bounds.Report], list[Plan | GatheredData]]:
        """A column for each tile of the grouped kernels of these dtypes; reports of their checks, and what is to be closed."""
        tuner, op = self.tuner, f"grouped{case.op}"
        reports: list[bounds.Report] = []
        opened: list[Plan | GatheredData] = []
        keys = sorted(
            (entry.variant.tile_m, key) for key, entry in tuner.entries.items()
            if (entry.variant.op, entry.variant.a_dtype, entry.variant.c_dtype) == (op, case.a_dtype, case.c_dtype)
        )  # fmt: skip
        if not case.active or "nvfp4" in (case.a_dtype, case.c_dtype):
            return reports, opened
        share = case.m * case.shape.top_k / case.shape.experts
        try:
            for tile, key in keys:
                if tile > 8 and share < tile / 8:
                    continue  # tiles that would stand almost empty
                data = GatheredData(made)
                opened.append(data)
                rotations = data.bind(case.m, tile)
                plan = tuner.loader.plan(data.problem(case.m, tile), rotations[0], tuner.device, key)
                opened.append(plan)
                data.poison(case.m)
                plan.launch(tuner.timer.stream)
                tuner.driver.synchronize()
                reports.append(data.check(case.m, tile))
                point.columns[f"gathered {key.split('.')[2]}"] = (tuner._launches(plan, rotations), 1)
        except BaseException:
            for each in opened:
                each.close()
            raise
        return reports, opened

    # ---- the layer

    def layer(self, shapes: Sequence[Shape], tokens: Sequence[int], active: bool, dtypes: tuple[str, str, str]) -> Iterator[dict[str, Any]]:
        """A row for each (shape, M): FC1 and FC2 in one graph, the same behind ``prepare``, reading their weights in two launches."""
        first, middle, last = dtypes
        for shape in shapes:
            one = self._data("fc1", shape, first, middle, max(tokens), active)
            try:
                two = self._data("fc2", shape, middle, last, max(tokens), active)
                try:
                    for m in tokens:
                        yield self._layer(one, two, m)
                finally:
                    two.close()
            finally:
                one.close()
                self._release()

    def _layer(self, one: OpData, two: OpData, m: int) -> dict[str, Any]:
        tuner, shape = self.tuner, one.shape
        count = max(one.rotation_count(m), two.rotation_count(m))
        first, second = _cycled(one.bind(m), count), _cycled(two.bind(m), count)
        into = {"c": "a", "c.codes": "a.codes", "c.scales": "a.scales"}
        second = [{**own, **{into[role]: before[role] for role in into if role in before}} for before, own in zip(first, second, strict=True)]
        memory = DeviceMemory(tuner.driver)
        plans: list[Plan] = []
        point = _Point()
        try:
            problems = (one.problem(m), two.problem(m))
            plans += [tuner.loader.plan(problem, own[0], tuner.device) for problem, own in zip(problems, (first, second), strict=True)]
            point.columns[OURS] = (_alternate([tuner._launches(plan, own) for plan, own in zip(plans, (first, second), strict=True)]), 2)
            self._add_prepare(point, plans, memory, one, m, (first, second))
            touched = one.touched_bytes(m), two.touched_bytes(m)
            regions = [_regions(made.weights, size, count) for made, size in zip((one, two), touched, strict=True)]
            self._add_read(point, [list(pair) for pair in zip(*regions, strict=True)])
            routings = [one.routing(m, rotation) for rotation in range(count)]
            self._add_competitors(point, Workload("layer", shape, m, routings))
            row = self._timed(point, Case("layer", shape, m, one.a_dtype, two.c_dtype, one.active), sum(touched))
            row.update(variant=[plan.key for plan in plans[:2]], passed=self._layer_passed(plans, first[0], second[0], one, two, m))
        finally:
            for plan in plans:
                plan.close()
            memory.close()
        return row

    def _layer_passed(
        self, plans: Sequence[Plan], first: Mapping[str, int], second: Mapping[str, int], one: OpData, two: OpData, m: int
    ) -> bool:
        """FC1's output against the reference; that FC2 read it is seen by FC2's output being finite and not what was poisoned."""
        one.poison(m)
        two.poison(m)
        for plan, own in zip(plans, (first, second), strict=False):
            plan.rebind(own)
            plan.launch(self.tuner.timer.stream)
        self.tuner.driver.synchronize()
        return one.check(m, one.fetch(m)).passed and two.written(m)

    def _add_prepare(
        self,
        point: _Point,
        plans: list[Plan],
        memory: DeviceMemory,
        one: OpData,
        m: int,
        pairs: tuple[Sequence[Mapping[str, int]], Sequence[Mapping[str, int]]],
    ) -> None:
        """The same two launches behind ``prepare``, which makes alpha and the list of active experts from the router's choice."""
        tuner, shape = self.tuner, one.shape
        problem = Problem("prepare", m, shape.experts, 0, 0, "i32", "f32", top_k=shape.top_k)
        if not any(entry.variant.op == "prepare" for entry in tuner.entries.values()):
            point.missing[WITH_PREPARE] = "the set has no prepare kernel"
            return
        made = {role: memory.empty(spec.nbytes) for role, spec in problem.tensors().items() if spec.output}
        common = {**made, "w2_alpha": memory.put(np.ones(shape.experts, np.float32)), "alpha_divisor": memory.put(np.ones(1, np.float32))}
        common["router"] = memory.put(np.full((m, shape.top_k), 1 / shape.top_k, np.float32))
        routed = [{**common, "ids": memory.put(np.array(one.routing(m, index), np.int32))} for index in range(len(pairs[0]))]
        listed = {"active_experts": made["active_list"]} if one.active else {}
        first = [{**own, **listed} for own in pairs[0]]
        second = [{**own, **listed, "alpha": made["alpha"]} for own in pairs[1]]
        prepare = tuner.loader.plan(problem, routed[0], tuner.device)
        plans.append(prepare)
        steps = [tuner._launches(plan, own) for plan, own in zip((prepare, *plans[:2]), (routed, first, second), strict=True)]
        point.columns[WITH_PREPARE] = (_alternate(steps), 3)

    # ---- columns

    def _add_read(self, point: _Point, launches: Sequence[Sequence[tuple[int, int]]]) -> None:
        if self.read is None:
            point.missing[READ] = "the read-only kernel does not load on this driver"
            return
        read = self.read
        point.columns[READ] = ([read.launch(pointer, size) for unit in launches for pointer, size in unit], len(launches[0]))

    def _add_competitors(self, point: _Point, work: Workload) -> None:
        for competitor in self.competitors:
            try:
                point.ready[competitor.name] = competitor.prepare(work)
            except Unavailable as error:
                point.missing[competitor.name] = str(error)
            except Exception as error:  # whatever another project's code raises: its column stays empty, with the reason
                point.missing[competitor.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"

    def _timed(self, point: _Point, case: Case, touched: int) -> dict[str, Any]:
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
        finally:
            for each in (*graphs.values(), *(each for name, each in point.ready.items() if name not in graphs)):
                each.close()
        row = self._row(case, touched, samples, sensors)
        row["missing"] = dict(point.missing)
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


def tuner_runs(samples: Mapping[str, Sample]) -> int:
    """Replays behind each median."""
    return min((each.runs for each in samples.values()), default=0)


def _line(row: Mapping[str, Any]) -> str:
    times = ", ".join(f"{name} {us:.2f} us" for name, us in row["us"].items())
    share = row.get("share_of_read", {}).get(OURS)
    return f"{row['op']} {row['shape']['name']} M = {row['m']}: {times}" + (f"; T_read / T {share:.3f}" if share is not None else "")


def _regions(weights: PackedWeights, size: int, count: int) -> list[tuple[int, int]]:
    """(address, bytes) of ``count`` regions of ``size`` bytes, one behind the other through the copies of the weights."""
    size = max(_ALIGNED, size // _ALIGNED * _ALIGNED)
    found = []
    per_copy = max(1, weights.nbytes // size)
    for index in range(count):
        found.append((weights.copy(index // per_copy) + index % per_copy * size, size))
    return found


def _cycled(rotations: Sequence[dict[str, int]], count: int) -> list[dict[str, int]]:
    return [rotations[index % len(rotations)] for index in range(count)]


def _alternate(steps: Sequence[Sequence[Launch]]) -> list[Launch]:
    """One launch of each step, rotation after rotation."""
    return [each for unit in zip(*steps, strict=True) for each in unit]


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
