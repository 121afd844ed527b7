"""Tensors of a measured op on the device, and the float64 reference of a sample of its outputs. Needs the extra [host].

Weights of a model's size are made of few distinct experts, repeated: seconds instead of minutes, the same bytes to read, the same decoding to
do. Activations are made once at the largest M; fewer tokens are their first rows. Rotations read other weights each: copies of them where a
launch reads all experts, other experts where it reads the active ones, so that what is read has left the L2.

    OpData(op, shape)                  weights, activations, alpha on the device
      .bind(m, rotation)               addresses by role for one launch
      .check(m, outputs)               sampled rows and columns against the reference, by the contract's bounds
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.bench_timing import COLD_FACTOR, rotations
from densemoe.runtime.layout import padded_rows, scale_offsets, tile_scales, untile_scales
from densemoe.runtime.nvfp4 import GROUP, LARGEST_E2M1, LARGEST_E4M3, bf16_values, global_scale_of, unpack_codes, widen
from densemoe.runtime.plan import packed_weight_bytes
from densemoe.runtime.problem import Problem
from densemoe.runtime.tune_cases import Shape, route_tokens

if TYPE_CHECKING:
    from densemoe.runtime.driver import Driver

__all__ = ["DeviceMemory", "OpData", "rotated_routing"]

Bytes = npt.NDArray[np.uint8]

DISTINCT_EXPERTS: Final = 5  # made; the others repeat them. No power of two, so that an expert index off by one of those shows
SAMPLED_EXPERTS: Final = 6  # of FC1's output
SAMPLED_COLUMNS: Final = 64  # neighbouring ones of each of them
SAMPLED_GROUPS: Final = 3  # of 16 columns of FC2's output
SAMPLED_ROWS: Final = 8
_NUMPY: Final = {"u8": np.uint8, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


class DeviceMemory:
    """Device allocations, freed together."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._pointers: list[int] = []

    def empty(self, nbytes: int) -> int:
        """Uninitialised memory."""
        pointer = self.driver.allocate(nbytes)
        self._pointers.append(pointer)
        return pointer

    def put(self, array: npt.NDArray[Any]) -> int:
        """A copy of an array."""
        pointer = self.empty(array.nbytes)
        self.write(pointer, array)
        return pointer

    def write(self, pointer: int, array: npt.NDArray[Any]) -> None:
        """Overwrites what lies at ``pointer``."""
        self.driver.to_device(pointer, np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def get(self, pointer: int, shape: Sequence[int], dtype: Any) -> npt.NDArray[Any]:
        """A copy on the host."""
        array = np.empty(shape, dtype=dtype)
        self.driver.to_host(array.reshape(-1).view(np.uint8), pointer)
        return array

    def close(self) -> None:
        """Frees everything."""
        while self._pointers:
            self.driver.free(self._pointers.pop())


def rotated_routing(base: Sequence[Sequence[int]], experts: int, rotation: int, seed: int = 0) -> list[list[int]]:
    """The routing of one rotation: the base's, its active experts moved so that neighbouring rotations share none where E allows.

    Args:
        base: ids by token.
    """
    order = [int(each) for each in np.random.default_rng([seed, experts]).permutation(experts)]
    used = sorted({expert for row in base for expert in row})
    first = rotation * len(used)
    moved = {expert: order[(first + place) % experts] for place, expert in enumerate(used)}
    return [sorted(moved[expert] for expert in row) for row in base]


class _Expected(NamedTuple):
    """Reference of some rows and columns."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    result: Any


class OpData:
    """One op at one shape: tensors on the device and what to compare with.

    Args:
        layout: weight layout of the set.
        largest_m: most tokens that ``bind`` is asked for.
        active: launches get a list of active experts.
        l2: bytes of the device's L2; 0 does not rotate.
        weights: those of another OpData of the same op, shape and layout, shared.
        decoded: NVFP4 is as the GEMMs of a layer have it on sm_90a: the bf16 values that codes and scales stand for. Of FC1 there is besides what a
            layer rounds to them: ``x`` and ``x.multiplier`` among ``rounded_from``.
    """

    def __init__(
        self,
        driver: Driver,
        op: str,
        shape: Shape,
        a_dtype: str,
        c_dtype: str,
        layout: str,
        largest_m: int,
        *,
        active: bool = False,
        l2: int = 0,
        seed: int = 0,
        weights: PackedWeights | None = None,
        decoded: bool = False,
    ) -> None:
        self.driver, self.op, self.shape, self.a_dtype, self.c_dtype = driver, op, shape, a_dtype, c_dtype
        self.layout, self.largest_m, self.active, self.l2, self.seed = layout, largest_m, active, l2, seed
        self.decoded = decoded and a_dtype == "nvfp4"
        self.rounded_from: dict[str, int] = {}
        self._memory = DeviceMemory(driver)
        self._own = None if weights is not None else PackedWeights(driver, op, shape, layout, l2, seed)
        self.weights: PackedWeights = weights or self._own  # type: ignore[assignment]
        self._base = route_tokens(shape, largest_m, seed)
        rng = np.random.default_rng([seed, 3])
        weights_of_router = rng.uniform(0.5, 1.5, (largest_m, shape.top_k)) / shape.top_k
        self._router: npt.NDArray[np.float32] = weights_of_router.astype(np.float32)
        try:
            self._make_activations(rng)
            self._outputs = {
                role: self._memory.empty(spec.nbytes) for role, spec in self.problem(largest_m).tensors().items() if spec.output
            }
            if c_dtype == "nvfp4":
                self._multiplier = np.float32(LARGEST_E4M3 * LARGEST_E2M1 / max(self._largest_output(), 1e-30))
                self._multiplier_at = self._memory.put(np.array([self._multiplier], dtype=np.float32))
        except BaseException:
            self.close()
            raise
        self._bound_m = -1
        self._per_rotation: list[dict[str, int]] = []
        self._routing_memory = DeviceMemory(driver)

    @property
    def inputs(self) -> Mapping[str, int]:
        """Addresses by role of what every launch reads alike."""
        return self._inputs

    @property
    def stored_activations(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
        """Activations as they are stored: bf16 bits and None, or codes and tiled scales."""
        return self._a, None if self._a_scales is None else tile_scales(self._a_scales)

    @property
    def output_multiplier(self) -> float:
        """Of an NVFP4 output."""
        return float(self._multiplier)

    @property
    def router(self) -> npt.NDArray[np.float32]:
        """The router's weights ``[largest M, k]``."""
        return self._router

    @property
    def w2_alpha(self) -> npt.NDArray[np.float32]:
        """FC2's dequantisation factors ``[E]``."""
        return self._w2_alpha

    def problem(self, m: int) -> Problem:
        """The Problem at ``m`` tokens."""
        shape = self.shape
        return Problem(
            self.op, m, shape.experts, shape.hidden, shape.intermediate, "bf16" if self.decoded else self.a_dtype, self.c_dtype,
            active_list=self.active, top_k=shape.top_k * self.active, rounded=self.decoded and self.op == "fc1" and self.c_dtype == "nvfp4",
        )  # fmt: skip

    # ---- tensors

    def _make_activations(self, rng: np.random.Generator) -> None:
        """Activations at the largest M: FC2's K = E·I repeats those of the distinct experts."""
        shape, m = self.shape, self.largest_m
        width = shape.hidden if self.op == "fc1" else min(shape.experts, DISTINCT_EXPERTS) * shape.intermediate
        first, tiled, self._a_scale = data.activations(rng, m, width, "bf16" if self.decoded else self.a_dtype, "normal")
        k = self.problem(m).k
        self._a_scales: Bytes | None = None
        if self.decoded:
            first = self._rounded(first)
        if self.decoded or self.a_dtype == "bf16":
            self._a: npt.NDArray[Any] = _widened(first, k)
            self._inputs = {"a": self._memory.put(self._a)}
        else:
            self._a = _widened(first, k // 2)
            self._a_scales = _widened(untile_scales(tiled, m), k // GROUP)
            self._inputs = {"a.codes": self._memory.put(self._a), "a.scales": self._memory.empty(padded_rows(m) * k // GROUP)}
        # gates of about 1 and outputs of about 1, so that fp16 holds them: weights and activations are some units large
        size = np.float32(2.0 ** -round(np.log2(np.sqrt(shape.hidden if self.op == "fc1" else shape.intermediate) * 4)))
        self._alpha1: npt.NDArray[np.float32] = np.full(shape.experts, self._a_scale * size, dtype=np.float32)
        self._w2_alpha = self._alpha1
        if self.op == "fc1":
            self._inputs["alpha"] = self._memory.put(self._alpha1)

    def _rounded(self, x: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
        """bf16 activations as a layer rounds them; of FC1 they and the multiplier go to the device too."""
        values = bf16_values(x)
        self._a_scale = global_scale_of(np.abs(values).max(initial=0))
        multiplier = np.float32(1) / self._a_scale
        if self.op == "fc1":
            self.rounded_from = {"x": self._memory.put(x), "x.multiplier": self._memory.put(np.array([multiplier]))}
        return reference.rounded_bf16(values, multiplier)

    def _alpha2(self, routing: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        ids = np.array(routing, dtype=np.int64)
        return reference.build_alpha(ids, self._router[: len(routing)], self._w2_alpha, experts=self.shape.experts)

    def rotation_count(self, m: int) -> int:
        """Launches after which the same weights may be read again and be cold."""
        if not self.l2:
            return 1
        return rotations(self.touched_bytes(m), self.l2)

    def touched_bytes(self, m: int) -> int:
        """Bytes of weights that one launch reads once."""
        if not self.active:
            return self.weights.nbytes
        return self.weights.nbytes * len(self.active_of(m, 0)) // self.shape.experts

    def active_of(self, m: int, rotation: int) -> list[int]:
        """Active experts of a rotation, ascending."""
        return sorted({expert for row in self.routing(m, rotation) for expert in row})

    def routing(self, m: int, rotation: int) -> list[list[int]]:
        """Experts of each token in a rotation."""
        return rotated_routing(self._base[:m], self.shape.experts, rotation, self.seed) if self.active else self._base[:m]

    def bind(self, m: int) -> list[dict[str, int]]:
        """Addresses by role (``b`` and outputs too) of each rotation at ``m`` tokens; valid until the next call."""
        if m == self._bound_m:
            return self._per_rotation
        if self._a_scales is not None:
            self._memory.write(self._inputs["a.scales"], tile_scales(self._a_scales[:m]))
        self._routing_memory.close()
        shared = {**self._inputs, **self._outputs}
        if self.c_dtype == "nvfp4":
            shared["output_multiplier"] = self._multiplier_at
        self._per_rotation = []
        experts = self.shape.experts
        alpha = None
        for rotation in range(self.rotation_count(m)):
            own = dict(shared)
            routing = self.routing(m, rotation)
            used = len({expert for row in routing for expert in row}) if self.active else experts
            own["b"] = self.weights.copy(rotation * used // experts)
            if self.op == "fc2":
                if alpha is None or self.active:
                    alpha = self._routing_memory.put(self._alpha2(routing))
                own["alpha"] = alpha
            if self.active:
                ids = sorted({expert for row in routing for expert in row})
                listed = np.zeros(1 + experts, dtype=np.int32)
                listed[0], listed[1 : 1 + len(ids)] = len(ids), ids
                own["active_experts"] = self._routing_memory.put(listed)
            self._per_rotation.append(own)
        self._bound_m = m
        return self._per_rotation

    # ---- comparison

    def poison(self, m: int) -> None:
        """Makes every byte of the outputs wrong, so that a launch that writes nothing is seen."""
        for role, spec in self.problem(m).tensors().items():
            if spec.output:
                self.driver.fill(self._outputs[role], 0xA5, spec.nbytes)

    def fetch(self, m: int) -> dict[str, npt.NDArray[Any]]:
        """The outputs, by role."""
        return {
            role: self._memory.get(self._outputs[role], spec.shape, _NUMPY[spec.dtype])
            for role, spec in self.problem(m).tensors().items()
            if spec.output
        }

    def written(self, m: int) -> bool:
        """Whether a launch overwrote every poisoned byte pattern of a plain output with finite values."""
        role, dtype = next((role, spec.dtype) for role, spec in self.problem(m).tensors().items() if spec.output)
        got = self.fetch(m)[role]
        poison = np.full(got.itemsize, 0xA5, dtype=np.uint8).view(got.dtype)[0]
        values = widen(got, dtype) if dtype != "u8" else got
        return bool((got != poison).any(axis=1).all() and np.isfinite(values).all())

    def check(self, m: int, got: Mapping[str, npt.NDArray[Any]]) -> bounds.Report:
        """Sampled rows and columns of the outputs of rotation 0 against the reference, by the contract's bounds."""
        problem, reports = self.problem(m), []
        for expected in self._expected(m):
            rows, columns, result = expected
            if self.op == "fc2":
                bound = bounds.fc2_bound(result, problem.experts, problem.intermediate)
                values = widen(got["c"][np.ix_(rows, columns)], self.c_dtype)
                reports.append(bounds.compare_plain(values, result.c, bound, self.c_dtype))
                continue
            if problem.c_decoded:
                report = bounds.compare_fc1(got, result, problem, output_multiplier=self.output_multiplier, rows=rows, columns=columns)
                reports.append(report)
                continue
            bound = bounds.fc1_bound(result, problem.hidden)
            if self.c_dtype != "nvfp4":
                values = widen(got["c"][np.ix_(rows, columns)], self.c_dtype)
                reports.append(bounds.compare_plain(values, result.y, bound, self.c_dtype))
                continue
            codes = unpack_codes(np.ascontiguousarray(got["c.codes"][np.ix_(rows, columns[::2] // 2)]))
            offsets = scale_offsets(rows[:, None], (columns[::GROUP] // GROUP)[None, :], problem.n_out // GROUP)
            scales = got["c.scales"].reshape(-1)[offsets]
            reports.append(bounds.compare_nvfp4(codes, scales, result.y, bound, float(self._multiplier)))
        return bounds.combine(reports)

    def _rows_values(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        if self._a_scales is None:
            return bf16_values(self._a[rows]).astype(np.float64)
        return reference.activation_values(self._a[rows], tile_scales(self._a_scales[rows]))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the data; every variant at one M is compared with it
    def _expected(self, m: int) -> tuple[_Expected, ...]:
        routing = self.routing(m, 0)
        if self.op == "fc2":
            rows = _spread(m, SAMPLED_ROWS)
            columns = _groups(self.shape.hidden, SAMPLED_GROUPS)
            alpha = self._alpha2(routing)[rows].astype(np.float64)
            return (_Expected(rows, columns, self._fc2(rows, columns, alpha)),)
        experts = self.active_of(m, 0) if self.active else list(range(self.shape.experts))
        found = []
        for place in _spread(len(experts), SAMPLED_EXPERTS):
            expert = experts[place]
            tokens = [token for token, row in enumerate(routing) if expert in row] if self.active else range(m)
            rows = np.asarray(tokens, dtype=np.int64)[_spread(len(tokens), SAMPLED_ROWS)]
            # other columns of each expert, so that all of I is met
            block = (int(place) * 7) % (self.shape.intermediate // SAMPLED_COLUMNS)
            own = np.arange(block * SAMPLED_COLUMNS, (block + 1) * SAMPLED_COLUMNS)
            found.append(_Expected(rows, expert * self.shape.intermediate + own, self.fc1_reference(rows, expert, own)))
        return tuple(found)

    def fc1_reference(self, rows: npt.NDArray[np.int64], expert: int, columns: npt.NDArray[np.int64]) -> Any:
        """FC1 of some tokens and columns of an expert, in float64."""
        return reference.fc1(self._rows_values(rows), self.weights.values, self._alpha1.astype(np.float64), [(expert, columns)])

    def _fc2(self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], alpha: npt.NDArray[np.float64]) -> Any:
        """Experts without a sampled token add exactly nothing and are left out."""
        used = np.flatnonzero((alpha != 0).any(axis=0))
        width = self.shape.intermediate
        own = (used[:, None] * width + np.arange(width)).reshape(-1)
        a = self._rows_values(rows)[:, own]
        return reference.fc2(a, lambda place, at: self.weights.values(int(used[place]), at), alpha[:, used], len(used), width, columns=columns)

    def _largest_output(self) -> float:
        """Largest FC1 output of a sample, for ``output_multiplier``."""
        rows = _spread(self.largest_m, SAMPLED_ROWS)
        result = self.fc1_reference(rows, 0, np.arange(SAMPLED_COLUMNS))
        return float(np.max(np.abs(result.y), initial=0.0))

    def close(self) -> None:
        """Frees the device's memory."""
        if hasattr(self, "_routing_memory"):
            self._routing_memory.close()
        self._memory.close()
        if self._own is not None:
            self._own.close()


class PackedWeights:
    """Packed weights of an op and shape on the device, in as many copies as rotations need.

    Attributes:
        nbytes: of one copy.
    """

    def __init__(self, driver: Driver, op: str, shape: Shape, layout: str, l2: int = 0, seed: int = 0) -> None:
        self.op, self.shape, self.layout = op, shape, layout
        distinct = min(shape.experts, DISTINCT_EXPERTS)
        make = data.fc1_weights if op == "fc1" else data.fc2_weights
        made = make(np.random.default_rng([seed, 1]), distinct, shape.hidden, shape.intermediate, "codes")
        self._few = reference.Weights(op, made.codes, made.scales, distinct)
        packed = self._pack(made.codes, made.scales, distinct)
        self.nbytes = packed.nbytes
        problem = Problem(op, 1, shape.experts, shape.hidden, shape.intermediate)
        assert self.nbytes == packed_weight_bytes(layout, problem), (self.nbytes, layout, shape)
        self._memory = DeviceMemory(driver)
        count = max(1, -(-COLD_FACTOR * l2 // self.nbytes)) + 1 if l2 else 1
        try:
            self._copies = [self._memory.put(packed)]
            for _ in range(count - 1):
                self._copies.append(self._memory.empty(self.nbytes))
                driver.copy(self._copies[-1], self._copies[0], self.nbytes)
        except BaseException:
            self._memory.close()
            raise

    def values(self, expert: int, columns: Any = None) -> Any:
        """What the reference reads of an expert."""
        return self._few(expert % self._few.experts, columns)

    def copy(self, index: int) -> int:
        """Address of a copy, modulo their number."""
        return self._copies[index % len(self._copies)]

    @property
    def copies(self) -> int:
        """How many there are."""
        return len(self._copies)

    def _pack(self, codes: Bytes, scales: Bytes, distinct: int) -> Bytes:
        experts, hidden, width = self.shape.experts, self.shape.hidden, self.shape.intermediate
        chosen = np.arange(experts) % distinct
        if self.layout != "sm100-interchange/1":
            packed = packing.pack_fc1(codes, scales) if self.op == "fc1" else packing.pack_fc2(codes, scales, distinct)
            return packed.reshape(distinct, -1)[chosen].reshape(-1)
        if self.op == "fc1":
            # 2I rows of an expert are whole tiles of 128 scale rows
            own_scales = scales.reshape(distinct, -1)[chosen].reshape(-1, hidden // GROUP)
            return packing.pack_interchange("fc1", codes[chosen], own_scales, experts)
        own_codes = codes.reshape(hidden, distinct, width // 2)[:, chosen].reshape(hidden, -1)
        tiles = scales.reshape(padded_rows(hidden) // 128, distinct, -1)[:, chosen]
        return packing.pack_interchange("fc2", own_codes, tiles.reshape(padded_rows(hidden), -1), experts)

    def close(self) -> None:
        """Frees the device's memory."""
        self._memory.close()


def _widened(array: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Columns repeated up to ``width``."""
    times = -(-width // array.shape[1])
    return np.ascontiguousarray(np.tile(array, (1, times))[:, :width]) if times > 1 else array


def _spread(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """``wanted`` of 0 … count-1, evenly, both ends among them."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, wanted))).astype(np.int64))


def _groups(columns: int, wanted: int) -> npt.NDArray[np.int64]:
    """``wanted`` groups of 16 of some columns, evenly."""
    chosen = _spread(columns // GROUP, wanted)
    return (chosen[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
