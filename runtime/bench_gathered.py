"""The grouped form of a benchmarked op or layer: each expert over the tokens that chose it, on the weights and activations of OpData.

    OpData (fc1 or fc2, listed) ─► GatheredData ─ route on the host, a rotation ─► tiles, rows, row_alpha on the device
        .bind(m, tile)           addresses by role for each rotation
        .check(m, tile)          sampled rows against the float64 reference, by the contract's bounds
        .tiled(tile)             the same of one tile, as OpData gives it

    two OpData ─► GatheredLayer ─ route on the device ─► groupedfc1 ─► groupedfc2

Needs the extra [host].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime import bounds, data, reference
from densemoe.runtime.layout import from_k64_order, k64_order
from densemoe.runtime.nvfp4 import bf16_values, widen
from densemoe.runtime.problem import K64_ORDER_FROM, Problem, TensorSpec, k64_width
from densemoe.runtime.tune_data import DeviceMemory, OpData

__all__ = ["GatheredData", "GatheredLayer", "TiledData"]

SAMPLED: Final = 6  # rows of FC1's output, tokens of FC2's
COLUMNS: Final = 64
_NUMPY: Final = {"u8": np.uint8, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


class GatheredData:
    """Tensors of ``groupedfc1`` or ``groupedfc2`` for the shape and dtypes of an OpData with a list of active experts.

    Args:
        made: whose weights, activations and routing are used; it must outlive this.
        before: of FC2 in a layer: grouped FC1, whose output it reads; its own random activations where None.
    """

    def __init__(self, made: OpData, before: GatheredData | None = None) -> None:
        self.made, self.op, self._before = made, f"grouped{made.op}", before
        self._memory = DeviceMemory(made.driver)
        self._routed = DeviceMemory(made.driver)
        self._routes: dict[int, reference.Routes] = {}
        self._bound: tuple[int, dict[tuple[int, bool, bool], list[dict[str, int]]]] = (0, {})
        shape, pairs = made.shape, made.largest_m * made.shape.top_k
        self._a: dict[str, npt.NDArray[Any]] = {}
        try:
            if before is not None:
                self._inputs = {role.replace("c", "a", 1): pointer for role, pointer in before.outputs.items()}
            elif made.op == "fc2":
                rng = np.random.default_rng([made.seed, 4])
                stored, tiled, _ = data.activations(rng, pairs, shape.intermediate, made.a_dtype, "normal")
                self._a = _decoded(stored, tiled)
                self._inputs = {role: self._memory.put(array) for role, array in self._a.items()}
            else:
                self._inputs = {"alpha": made.inputs["alpha"]}
                self._inputs.update({role: self._memory.put(array) for role, array in _decoded(*made.stored_activations).items()})
            outputs = {role: spec.nbytes for tile in (1, K64_ORDER_FROM) for role, spec in self._written(made.largest_m, tile).items()}
            self._outputs = {role: self._memory.empty(nbytes) for role, nbytes in outputs.items()}
        except BaseException:
            self.close()
            raise

    def problem(self, m: int, tile: int, deterministic: bool = False, routes: bool = False) -> Problem:
        """The Problem at ``m`` tokens, over tiles of up to ``tile`` rows; of FC2 in one order where ``deterministic``; of the router's choice itself
        where it ``routes``."""
        made, shape = self.made, self.made.shape
        return Problem(
            self.op, m, shape.experts, shape.hidden, shape.intermediate, "bf16", made.c_dtype,
            top_k=shape.top_k, group_tile=tile, deterministic=deterministic and self.op == "groupedfc2", routes=routes, id_dtype="i32" * routes,
        )  # fmt: skip

    def _written(self, m: int, tile: int) -> dict[str, TensorSpec]:
        """What a launch at ``m`` tokens over tiles of ``tile`` rows writes."""
        return {role: spec for role, spec in self.problem(m, tile).tensors().items() if spec.output}

    @property
    def outputs(self) -> Mapping[str, int]:
        """Addresses by role of what a launch writes."""
        return self._outputs

    def tiled(self, tile: int) -> TiledData:
        """This over tiles of up to ``tile`` rows."""
        return TiledData(self, tile)

    def bind(
        self, m: int, tile: int, count: int = 0, routed: Mapping[str, int] | None = None, deterministic: bool = False, routes: bool = False
    ) -> list[dict[str, int]]:
        """Addresses by role of each rotation; valid until another M is bound.

        Args:
            count: rotations; as many as this op needs to read cold weights where 0.
            routed: addresses of what ``route`` writes on the device, in place of the host's; with ``a`` or ``a.k64`` where it brings activations.
                Where the op ``routes``, the router's choice of every rotation but its ids.
        """
        made, shape = self.made, self.made.shape
        if self._bound[0] != m:
            self._routed.close()
            self._bound, self._routes = (m, {}), {}
        if (tile, deterministic, routes) in self._bound[1]:
            return self._bound[1][tile, deterministic, routes]
        bound = self._bound[1].setdefault((tile, deterministic, routes), [])
        listed = made.bind(m)[0]  # scales of M rows of activations
        shared = {**self._inputs, **self._outputs, **{role: listed[role] for role in ("output_multiplier",) if role in listed}}
        problem = self.problem(m, tile, deterministic, routes)
        roles = problem.tensors()
        shared = {role: pointer for role, pointer in shared.items() if role in roles}  # activations are there in more than one form
        for rotation in range(count or made.rotation_count(m)):
            made_of = self.routes(m, tile, rotation)
            if not rotation:
                self._routes[tile] = made_of
            used = len(np.unique(made_of.experts))
            if routed is None:
                own = {role: self._routed.put(array) for role, array in made_of.given(problem).items()}
            else:
                own = {role: pointer for role, pointer in routed.items() if role in roles}
            bound.append({**shared, **own, "b": made.weights.copy(rotation * used // shape.experts)})
        return bound

    def routes(self, m: int, tile: int, rotation: int) -> reference.Routes:
        """What ``route`` makes of a rotation's routing."""
        routing = np.array(self.made.routing(m, rotation), dtype=np.int64)
        return reference.route(routing, self.made.router[:m], self.made.w2_alpha, group_tile=tile)

    def fetch(self, m: int, tile: int) -> dict[str, npt.NDArray[Any]]:
        """The outputs as they are stored, by role."""
        return {role: self._memory.get(self._outputs[role], spec.shape, _NUMPY[spec.dtype]) for role, spec in self._written(m, tile).items()}

    def poison(self, m: int, tile: int) -> None:
        """Makes every byte of the outputs wrong."""
        for role, spec in self._written(m, tile).items():
            self.made.driver.fill(self._outputs[role], 0xA5, spec.nbytes)

    def check(self, m: int, tile: int) -> bounds.Report:
        """Sampled outputs of rotation 0 against the reference; in a layer, of what FC1 did write."""
        made, shape = self.made, self.made.shape
        got = self.fetch(m, tile)
        routes = self._routes[tile]
        if self._before is not None:
            self._a = {role.replace("c", "a", 1): array for role, array in self._before.fetch(m, tile).items()}
        reports = []
        chosen = np.unique(np.round(np.linspace(0, (len(routes.rows) if self.op == "groupedfc1" else m) - 1, SAMPLED)).astype(np.int64))
        for place in chosen:
            if self.op == "groupedfc1":
                expert, token = int(routes.experts[place]), int(routes.rows[place])
                columns = _columns(shape.intermediate, int(place))
                one = made.fc1_reference(np.array([token]), expert, columns)
                multiplier = made.output_multiplier if made.c_dtype == "nvfp4" else None
                problem = self.problem(m, tile)
                reports.append(bounds.compare_fc1(got, one, problem, output_multiplier=multiplier, rows=[int(place)], columns=columns))
                continue
            rows = np.flatnonzero(routes.rows == place)
            columns = _columns(shape.hidden, int(place))
            two = self._fc2(rows, routes, columns)
            bound = bounds.fc2_bound(two, len(rows), shape.intermediate)
            reports.append(bounds.compare_plain(widen(got["c"][[place]][:, columns], made.c_dtype), two.c, bound, made.c_dtype))
        return bounds.combine(reports)

    def _rows_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """FC2's activations of some rows, exact."""
        if "a.k64" in self._a:
            return bf16_values(from_k64_order(self._a["a.k64"][rows], self.made.shape.intermediate)).astype(np.float64)
        return bf16_values(self._a["a"][rows]).astype(np.float64)

    def _fc2(self, rows: npt.NDArray[np.int64], routes: reference.Routes, columns: npt.NDArray[np.int64]) -> Any:
        """A token's experts side by side, as dense FC2 of these alone."""
        made = self.made
        experts: Sequence[int] = [int(each) for each in routes.experts[rows]]
        a = self._rows_of(rows).reshape(1, -1)
        alpha = routes.row_alpha[rows].astype(np.float64)[None]
        return reference.fc2(
            a, lambda place, at: made.weights.values(experts[place], at), alpha, len(rows), made.shape.intermediate, columns=columns
        )

    def close(self) -> None:
        """Frees the device's memory."""
        self._routed.close()
        self._memory.close()


class TiledData:
    """A GatheredData over one tile, with what Tuner asks of an OpData."""

    def __init__(self, data: GatheredData, tile: int) -> None:
        self._data, self.tile = data, tile

    def problem(self, m: int) -> Problem:
        """The Problem at ``m`` tokens."""
        return self._data.problem(m, self.tile)

    def bind(self, m: int) -> list[dict[str, int]]:
        """Addresses by role of each rotation; valid until another M is bound."""
        return self._data.bind(m, self.tile)

    def touched_bytes(self, m: int) -> int:
        """Bytes of weights that one launch reads once."""
        return self._data.made.touched_bytes(m)

    def poison(self, m: int) -> None:
        """Makes every byte of the output wrong."""
        self._data.poison(m, self.tile)

    def fetch(self, m: int) -> Mapping[str, npt.NDArray[Any]]:
        """The outputs, by role."""
        return self._data.fetch(m, self.tile)

    def check(self, m: int, got: Mapping[str, npt.NDArray[Any]]) -> bounds.Report:
        """Sampled outputs against the reference."""
        return self._data.check(m, self.tile)


class GatheredLayer:
    """``route``, grouped FC1 and grouped FC2 as the layer op launches them, one behind the other.

    Args:
        one, two: FC1 and FC2 with a list of active experts; they must outlive this.
    """

    def __init__(self, one: OpData, two: OpData) -> None:
        self._one, self._memory = one, DeviceMemory(one.driver)
        self._ids: tuple[int, list[int]] = (0, [])
        self._ids_memory = DeviceMemory(one.driver)
        self._fc1 = GatheredData(one)
        try:
            self._fc2 = GatheredData(two, self._fc1)
            route = self.problems(one.largest_m, 8, True)[0]
            written = {role: spec for role, spec in route.tensors().items() if spec.output and role != route.brought}
            self._routed = {role: self._memory.empty(spec.nbytes) for role, spec in written.items()}
            self._brought = self._memory.empty(one.largest_m * k64_width(one.shape.hidden) * 2)
            self._given = {"router": self._memory.put(two.router), "w2_alpha": self._memory.put(two.w2_alpha)}
        except BaseException:
            self.close()
            raise

    def problems(self, m: int, tile: int, deterministic: bool = False, routes: bool = False) -> tuple[Problem, ...]:
        """``route``, grouped FC1, grouped FC2; FC2 in one order where ``deterministic``; without ``route`` where FC1 and FC2 route themselves."""
        if routes:
            return self._fc1.problem(m, tile, routes=True), self._fc2.problem(m, tile, routes=True)
        shape, first = self._one.shape, self._fc1.problem(m, tile)
        x_dtype = "bf16" if first.a_in_k64_order or self._one.decoded else ""
        route = Problem(
            "route", m, shape.experts, shape.hidden if x_dtype else 0, 0, "i32", "f32", top_k=shape.top_k, group_tile=tile, x_dtype=x_dtype,
            x_rounded=self._one.decoded, deterministic=deterministic,
        )  # fmt: skip
        return route, first, self._fc2.problem(m, tile, deterministic)

    def bind(self, m: int, tile: int, count: int, deterministic: bool = False, routes: bool = False) -> tuple[list[dict[str, int]], ...]:
        """Addresses by role of ``count`` rotations of each launch of ``problems``; valid until another M is bound."""
        if self._ids[0] != m:
            self._ids_memory.close()
            self._ids = m, [self._ids_memory.put(np.array(self._one.routing(m, index), np.int32)) for index in range(count)]
        if routes:
            bound = [each.bind(m, tile, count, self._given, routes=True) for each in (self._fc1, self._fc2)]
            return tuple([{**own, "ids": ids} for own, ids in zip(each, self._ids[1], strict=True)] for each in bound)
        route, first, _ = self.problems(m, tile, deterministic)
        brought = {"a.k64" if first.a_in_k64_order else "a": self._brought} if route.x_dtype else {}
        fc1 = self._fc1.bind(m, tile, count, {**self._routed, **brought})
        given = {"x": self._one.inputs["a"], **self._one.rounded_from, **self._given, route.brought: self._brought}
        specs = route.tensors()
        routed = [{role: each for role, each in {**given, **self._routed, "ids": ids}.items() if role in specs} for ids in self._ids[1]]
        return routed, fc1, self._fc2.bind(m, tile, count, self._routed, deterministic)

    def poison(self, m: int, tile: int) -> None:
        """Makes every byte of every output wrong."""
        route = self.problems(m, tile)[0]
        for role, spec in route.tensors().items():
            if spec.output:
                self._one.driver.fill({**self._routed, route.brought: self._brought}[role], 0xA5, spec.nbytes)
        self._fc1.poison(m, tile)
        self._fc2.poison(m, tile)

    def check(self, m: int, tile: int, routes: bool = False) -> tuple[bool, str]:
        """Whether rotation 0's tiles and rows are the reference's, where ``route`` made them, and FC1 and FC2 within their bounds; and what was
        wrong."""
        if routes:
            return self._gemms_passed(m, tile)
        wanted = self._fc2.routes(m, tile, 0)
        specs = self.problems(m, tile)[0].tensors()
        got = {
            role: self._memory.get(pointer, specs[role].shape, np.float32 if role == "row_alpha" else np.int32)
            for role, pointer in self._routed.items()
            if role in specs
        }
        tiles, rows = len(wanted.tiles), len(wanted.rows)
        same = (
            got["tiles"][0, :2].tolist() == [tiles, rows]
            and np.array_equal(got["tiles"][1 : 1 + tiles, :3], wanted.tiles)
            and np.array_equal(got["rows"][:rows], wanted.rows)
            and np.array_equal(got["row_alpha"][:rows], wanted.row_alpha)
        )
        if not same:
            return False, f"route over tiles of {tile}: its tiles, rows or scales are not the reference's"
        return self._gemms_passed(m, tile)

    def _gemms_passed(self, m: int, tile: int) -> tuple[bool, str]:
        report = bounds.combine([self._fc1.check(m, tile), self._fc2.check(m, tile)])
        return report.passed, "" if report.passed else report.text

    def close(self) -> None:
        """Frees the device's memory."""
        self._ids_memory.close()
        self._memory.close()
        if hasattr(self, "_fc2"):
            self._fc2.close()
        self._fc1.close()


def _decoded(stored: npt.NDArray[Any], tiled: npt.NDArray[np.uint8] | None) -> dict[str, npt.NDArray[Any]]:
    """Activations as grouped kernels read them, by role: bf16 as it is and in K 64 order."""
    plain = stored if tiled is None else reference.decoded_bf16(stored, tiled)
    return {"a": plain, "a.k64": k64_order(plain)}


def _columns(width: int, place: int) -> npt.NDArray[np.int64]:
    """Neighbouring columns, others for each place, so that all of a row are met."""
    block = place * 7 % (width // COLUMNS)
    return np.arange(block * COLUMNS, (block + 1) * COLUMNS)
