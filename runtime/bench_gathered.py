"""The grouped form of a benchmarked op: each expert over the tokens that chose it, on the weights and activations of an OpData.

    OpData (fc1 or fc2, listed) ─► GatheredData ─ route on the host, a rotation ─► tiles, rows, row_alpha on the device
        .bind(m, tile)           addresses by role for each rotation
        .check(m, tile)          sampled rows against the float64 reference, by the contract's bounds

``route`` itself is timed in the layer, where it runs on the device. Needs the extra [host].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime import bounds, data, reference
from densemoe.runtime.nvfp4 import bf16_values, widen
from densemoe.runtime.problem import Problem
from densemoe.runtime.tune_data import DeviceMemory, OpData

__all__ = ["GatheredData"]

SAMPLED: Final = 6  # rows of FC1's output, tokens of FC2's
COLUMNS: Final = 64
_NUMPY: Final = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


class GatheredData:
    """Tensors of ``groupedfc1`` or ``groupedfc2`` for the shape of an OpData with a list of active experts; plain activations and outputs alone.

    Args:
        made: whose weights, activations and routing are used; it must outlive this.
    """

    def __init__(self, made: OpData) -> None:
        self.made, self.op = made, f"grouped{made.op}"
        self._memory = DeviceMemory(made.driver)
        self._routed = DeviceMemory(made.driver)
        self._routes: list[reference.Routes] = []
        shape, pairs = made.shape, made.largest_m * made.shape.top_k
        try:
            if made.op == "fc2":
                rng = np.random.default_rng([made.seed, 4])
                self._a = data.activations(rng, pairs, shape.intermediate, "bf16", "normal")[0]
                self._inputs = {"a": self._memory.put(self._a)}
                self._output = self._memory.empty(made.largest_m * shape.hidden * 4)
            else:
                self._a = made.stored_activations
                self._inputs = {role: made.inputs[role] for role in ("a", "alpha")}
                self._output = self._memory.empty(pairs * shape.intermediate * 4)
        except BaseException:
            self.close()
            raise

    def problem(self, m: int, tile: int) -> Problem:
        """The Problem at ``m`` tokens, over tiles of up to ``tile`` rows."""
        made, shape = self.made, self.made.shape
        return Problem(
            self.op, m, shape.experts, shape.hidden, shape.intermediate, made.a_dtype, made.c_dtype, top_k=shape.top_k, group_tile=tile
        )  # fmt: skip

    def bind(self, m: int, tile: int) -> list[dict[str, int]]:
        """Addresses by role of each rotation; valid until the next call."""
        made, shape = self.made, self.made.shape
        self._routed.close()
        self._routes = []
        bound = []
        for rotation in range(made.rotation_count(m)):
            routing = np.array(made.routing(m, rotation), dtype=np.int64)
            routes = reference.route(routing, made.router[:m], made.w2_alpha, group_tile=tile)
            self._routes.append(routes)
            arrays = routes.packed(m * shape.top_k)
            wanted = ("tiles", "rows") if self.op == "groupedfc1" else ("tiles", "rows", "row_alpha")
            used = len(np.unique(routes.experts))
            own = {role: self._routed.put(arrays[role]) for role in wanted}
            bound.append({**self._inputs, **own, "b": made.weights.copy(rotation * used // shape.experts), "c": self._output})
        return bound

    def poison(self, m: int) -> None:
        """Makes every byte of the output wrong."""
        problem = self.problem(m, 8)
        self.made.driver.fill(self._output, 0xA5, problem.tensors()["c"].nbytes)

    def check(self, m: int, tile: int) -> bounds.Report:
        """Sampled outputs of rotation 0 against the reference."""
        problem, made = self.problem(m, tile), self.made
        spec = problem.tensors()["c"]
        got = self._memory.get(self._output, spec.shape, _NUMPY[spec.dtype])
        routes = self._routes[0]
        shape = made.shape
        reports = []
        chosen = np.unique(np.round(np.linspace(0, (len(routes.rows) if self.op == "groupedfc1" else m) - 1, SAMPLED)).astype(np.int64))
        for place in chosen:
            if self.op == "groupedfc1":
                expert, token = int(routes.experts[place]), int(routes.rows[place])
                columns = _columns(shape.intermediate, int(place))
                one = made.fc1_reference(np.array([token]), expert, columns)
                bound = bounds.fc1_bound(one, shape.hidden)
                reports.append(bounds.compare_plain(widen(got[[place]][:, columns], made.c_dtype), one.y, bound, made.c_dtype))
                continue
            rows = np.flatnonzero(routes.rows == place)
            columns = _columns(shape.hidden, int(place))
            two = self._fc2(rows, routes, columns)
            bound = bounds.fc2_bound(two, len(rows), shape.intermediate)
            reports.append(bounds.compare_plain(widen(got[[place]][:, columns], made.c_dtype), two.c, bound, made.c_dtype))
        return bounds.combine(reports)

    def _fc2(self, rows: npt.NDArray[np.int64], routes: reference.Routes, columns: npt.NDArray[np.int64]) -> Any:
        """A token's experts side by side, as dense FC2 of these alone."""
        made = self.made
        experts: Sequence[int] = [int(each) for each in routes.experts[rows]]
        a = bf16_values(self._a[rows]).astype(np.float64).reshape(1, -1)
        alpha = routes.row_alpha[rows].astype(np.float64)[None]
        return reference.fc2(
            a, lambda place, at: made.weights.values(experts[place], at), alpha, len(rows), made.shape.intermediate, columns=columns
        )

    def close(self) -> None:
        """Frees the device's memory."""
        self._routed.close()
        self._memory.close()


def _columns(width: int, place: int) -> npt.NDArray[np.int64]:
    """Neighbouring columns, others for each place, so that all of a row are met."""
    block = place * 7 % (width // COLUMNS)
    return np.arange(block * COLUMNS, (block + 1) * COLUMNS)
