"""``densemoe bench layer``: FC1 and FC2 in one graph, alone and behind what the layer op launches before them, in both of its forms.

    listed     [prepare ─►] FC1 ─► FC2                    over the list of active experts, all tokens; or dense
    gathered   route ─► grouped FC1 ─► grouped FC2        each expert over the tokens that chose it, a column a tile

The column of the whole layer is whichever of them the layer op takes at that M (grouping.py). Needs the extra [host].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from densemoe.runtime.bench import ArtifactSet, Bench, Point, regions
from densemoe.runtime.bench_competitors import Workload
from densemoe.runtime.bench_gathered import GatheredLayer
from densemoe.runtime.bench_report import GATHERED, ORDERED, OURS, WHOLE, WITH_PREPARE
from densemoe.runtime.bench_timing import Launch
from densemoe.runtime.errors import SelectionError
from densemoe.runtime.grouping import group_tile, sorts_itself
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import LARGEST_ROUTED
from densemoe.runtime.select import load_table
from densemoe.runtime.tune import grouped_tiles, stated_of_layer
from densemoe.runtime.tune_cases import Case, Shape, worth_a_tile
from densemoe.runtime.tune_data import DeviceMemory, OpData
from densemoe.runtime.variant import GROUPED_OPS, ROUNDED

__all__ = ["LayerBench"]


class LayerBench(Bench):
    """Benchmarks of whole layers on a Tuner's device; arguments as Bench."""

    def layer(self, shapes: Sequence[Shape], tokens: Sequence[int], active: bool, dtypes: tuple[str, str, str]) -> Iterator[dict[str, Any]]:
        """A row for each (shape, M)."""
        first, middle, last = dtypes
        for shape in shapes:
            one = self._data("fc1", shape, first, middle, max(tokens), active, self._decoded)
            try:
                two = self._data("fc2", shape, middle, last, max(tokens), active, self._decoded)
                gathered = None
                try:
                    if active and any(self._tiles(each, dtypes) for each in self.sets):
                        gathered = GatheredLayer(one, two)
                    for m in tokens:
                        yield self._layer(one, two, m, gathered)
                finally:
                    if gathered is not None:
                        gathered.close()
                    two.close()
            finally:
                one.close()
                self._release()

    @property
    def _decoded(self) -> bool:
        """Whether the GEMMs of a layer read NVFP4 activations as bf16, which ``prepare`` and ``route`` then round."""
        return any(entry.variant.option(ROUNDED) or entry.variant.op in GROUPED_OPS for each in self.sets for entry in each.entries.values())

    def _layer(self, one: OpData, two: OpData, m: int, gathered: GatheredLayer | None) -> dict[str, Any]:
        tuner, shape = self.tuner, one.shape
        count = max(one.rotation_count(m), two.rotation_count(m))
        first, second = _cycled(one.bind(m), count), _cycled(two.bind(m), count)
        into = {"c": "a", "c.codes": "a.codes", "c.scales": "a.scales"}  # codes and scales where the set's layers read them
        second = [{**own, **{into[role]: before[role] for role in into if role in before}} for before, own in zip(first, second, strict=True)]
        memory = DeviceMemory(tuner.driver)
        plans: list[Plan] = []
        point = Point()
        try:
            own: list[Plan] = []
            found: list[str] = []
            for each in self.sets:
                made_plans, wrong = self._add_set_of_layer(point, each, (one, two), m, (first, second), memory, plans, gathered)
                own = own or made_plans
                found += wrong
            touched = one.touched_bytes(m), two.touched_bytes(m)
            read = [regions(made.weights, size, count) for made, size in zip((one, two), touched, strict=True)]
            self._add_read(point, [list(pair) for pair in zip(*read, strict=True)])
            routings = [one.routing(m, rotation) for rotation in range(count)]
            self._add_competitors(point, Workload("layer", shape, m, routings))
            row = self._timed(point, Case("layer", shape, m, one.a_dtype, two.c_dtype, one.active), sum(touched))
            row.update(variant=[plan.key for plan in own], passed=not found, detail="; ".join(found))
        finally:
            for plan in plans:
                plan.close()
            memory.close()
        return row

    def _add_set_of_layer(
        self,
        point: Point,
        of: ArtifactSet,
        data: tuple[OpData, OpData],
        m: int,
        pairs: tuple[Sequence[Mapping[str, int]], Sequence[Mapping[str, int]]],
        memory: DeviceMemory,
        plans: list[Plan],
        gathered: GatheredLayer | None,
    ) -> tuple[list[Plan], list[str]]:
        """Columns of one artifact set. Its FC1 and FC2, and which of its forms disagreed with the reference; ``plans`` are to be closed."""
        tuner, (one, two) = self.tuner, data
        try:
            own = []
            for made, bound in zip(data, pairs, strict=True):
                own.append(self._planned(of, made.problem(m), bound[0]))
                plans.append(own[-1])
        except SelectionError as error:
            if not of.name:
                raise
            point.missing[of.name + OURS] = str(error)
            return [], []
        point.columns[of.name + OURS] = (_alternate([tuner._launches(plan, bound) for plan, bound in zip(own, pairs, strict=True)]), 2)
        self._add_prepare(point, of, own, plans, memory, one, m, pairs)
        passed = self._layer_passed(own, pairs[0][0], pairs[1][0], one, two, m)
        found = [] if passed else [f"{of.name}FC1 and FC2 with a list of active experts, or dense"]
        return own, found + self._add_gathered_layer(point, of, plans, one, two, m, len(pairs[0]), gathered)

    def _tiles(self, of: ArtifactSet, dtypes: Sequence[str], deterministic: bool = False) -> set[int]:
        """Rows of the tiles that a layer of these dtypes may be gathered into; ``deterministic``: with FC2 in one order."""
        if not any(entry.variant.op == "route" for entry in of.entries.values()):
            return set()
        return grouped_tiles(of.entries.values(), {"groupedfc1": dtypes[1], "groupedfc2": dtypes[2]}, deterministic)

    def _routing_tiles(self, of: ArtifactSet, one: OpData, dtypes: Sequence[str], m: int) -> set[int]:
        """Rows of the tiles of grouped ops that route themselves at ``m`` tokens, in a layer of these dtypes."""
        if one.decoded or m * one.shape.top_k > LARGEST_ROUTED:
            return set()
        return grouped_tiles(of.entries.values(), {"groupedfc1": dtypes[1], "groupedfc2": dtypes[2]}, routes=True)

    def _planned(self, of: ArtifactSet, problem: Problem, addresses: Mapping[str, int]) -> Plan:
        """The selection's variant; FC2 fetches weights before FC1 ends where its kernel can, as the layer op tells it to."""
        key = of.loader.select(problem, self.tuner.device).variant.key
        return of.loader.plan(problem, addresses, self.tuner.device, settings=stated_of_layer(of.entries[key], problem))

    def _add_gathered_layer(
        self, point: Point, of: ArtifactSet, plans: list[Plan], one: OpData, two: OpData, m: int, count: int, gathered: GatheredLayer | None
    ) -> list[str]:
        """Columns of the gathered form behind ``route``, and of the tile that the layer op takes with FC2 in one order too; which form the layer op
        takes. What was wrong."""
        tuner, shape = self.tuner, one.shape
        dtypes = (one.a_dtype, one.c_dtype, two.c_dtype)
        if not one.active:  # the layer op always skips idle experts
            return []
        if not of.name:
            point.same[WHOLE] = WITH_PREPARE
        if gathered is None:
            return []
        tiles, ordered = self._tiles(of, dtypes), self._tiles(of, dtypes, True)
        grouping, sorting = load_table(self.arch).get("grouping"), self._routing_tiles(of, one, dtypes, m)
        wanted = group_tile(grouping, tiles, m, shape.top_k, shape.experts)
        chosen = (wanted, False, False)
        if sorts_itself(grouping, sorting, m, shape.top_k):
            chosen = (sorts_itself(grouping, sorting, m, shape.top_k), False, True)
        found = []
        forms = [(tile, False, False) for tile in sorted(tiles) if tile == wanted or worth_a_tile(shape, m, tile)]
        forms += [(tile, False, True) for tile in sorted(sorting) if worth_a_tile(shape, m, tile)]
        for tile, deterministic, routes in (*forms, *((each, True, False) for each in ordered & {wanted})):
            own = gathered.bind(m, tile, count, deterministic, routes)
            steps: list[Plan] = []
            name = f"{of.name}{GATHERED} t{tile} {'in two launches' if routes else 'with route'}"
            if deterministic:
                name = f"{of.name}{WHOLE}, {ORDERED}"
            try:
                for problem, each in zip(gathered.problems(m, tile, deterministic, routes), own, strict=True):
                    steps.append(self._planned(of, problem, each[0]))
            except SelectionError as error:
                if not of.name:
                    raise
                point.missing[name] = str(error)
                continue
            finally:
                plans += steps
            gathered.poison(m, tile)
            for plan in steps:
                plan.launch(tuner.timer.stream)
            tuner.driver.synchronize()
            passed, detail = gathered.check(m, tile, routes)
            if not passed:
                found.append(f"{name}: {detail}")
                point.missing[name] = "it disagrees with the reference"
                continue
            launches = [tuner._launches(plan, each) for plan, each in zip(steps, own, strict=True)]
            point.columns[name] = (_alternate(launches), len(launches))
            if (tile, deterministic, routes) == chosen and not of.name:
                point.same[WHOLE] = name
        return found

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
        point: Point,
        of: ArtifactSet,
        own: Sequence[Plan],
        plans: list[Plan],
        memory: DeviceMemory,
        one: OpData,
        m: int,
        pairs: tuple[Sequence[Mapping[str, int]], Sequence[Mapping[str, int]]],
    ) -> None:
        """The same two launches behind ``prepare``, which makes alpha and the list of active experts from the router's choice."""
        tuner, shape = self.tuner, one.shape
        x = {"hidden": shape.hidden, "x_dtype": "bf16", "x_rounded": True} if one.decoded else {"hidden": 0}
        problem = Problem("prepare", m, shape.experts, intermediate=0, a_dtype="i32", c_dtype="f32", top_k=shape.top_k, **x)
        if not any(entry.variant.op == "prepare" for entry in of.entries.values()):
            point.missing[of.name + WITH_PREPARE] = "the set has no prepare kernel"
            return
        made = {role: memory.empty(spec.nbytes) for role, spec in problem.tensors().items() if spec.output}
        common = {**made, "w2_alpha": memory.put(np.ones(shape.experts, np.float32)), "alpha_divisor": memory.put(np.ones(1, np.float32))}
        common.update(one.rounded_from)
        common["router"] = memory.put(np.full((m, shape.top_k), 1 / shape.top_k, np.float32))
        routed = [{**common, "ids": memory.put(np.array(one.routing(m, index), np.int32))} for index in range(len(pairs[0]))]
        listed = {"active_experts": made["active_list"]} if one.active else {}
        if problem.x_dtype:
            listed["a"] = made[problem.brought]
        first = [{**own, **listed} for own in pairs[0]]
        second = [{**own, **listed, "a": own["a"], "alpha": made["alpha"]} for own in pairs[1]]
        prepare = of.loader.plan(problem, routed[0], tuner.device)
        plans.append(prepare)
        steps = [tuner._launches(plan, bound) for plan, bound in zip((prepare, *own), (routed, first, second), strict=True)]
        point.columns[of.name + WITH_PREPARE] = (_alternate(steps), 3)


def _cycled(rotations: Sequence[dict[str, int]], count: int) -> list[dict[str, int]]:
    return [rotations[index % len(rotations)] for index in range(count)]


def _alternate(steps: Sequence[Sequence[Launch]]) -> list[Launch]:
    """One launch of each step, rotation after rotation."""
    return [each for unit in zip(*steps, strict=True) for each in unit]
