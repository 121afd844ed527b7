"""A device for tests of measuring code: memory on the host, kernels that compute the contract's reference, and time that a formula gives.

Nothing here is a measurement. ``cost(candidate key, settings, problem)`` says how many microseconds a launch takes on the simulated clock.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from densemoe.runtime import packing, reference
from densemoe.runtime.errors import DriverError
from densemoe.runtime.layout import from_k64_order, k64_order, tile_scales
from densemoe.runtime.nvfp4 import bf16_values, convert, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.select import Choice, load_table, select
from densemoe.runtime.variant import Variant

READ_BYTES_PER_MICROSECOND = 4.0e6
NUMPY = {"u8": np.uint8, "f32": np.float32, "f16": np.float16, "bf16": np.uint16, "i32": np.int32}
Cost = Callable[[str, Mapping[str, int], Problem], float]
Fault = Callable[[str, Problem, Mapping[str, np.ndarray]], None]


class SimulatedDriver:
    """Memory at made-up addresses, one stream, events and graphs on a simulated clock in microseconds."""

    def __init__(self, l2: int = 1 << 16) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.next = 1 << 20
        self.now = 0.0
        self.captured: list[float] | None = None
        self.graphs = 0
        self.l2 = l2

    def at(self, pointer: int) -> np.ndarray:
        base = max(each for each in self.blocks if each <= pointer)
        return self.blocks[base][pointer - base :]

    def allocate(self, nbytes: int) -> int:
        pointer, self.next = self.next, self.next + -(-nbytes // 4096) * 4096 + 4096
        self.blocks[pointer] = np.zeros(max(nbytes, 1), dtype=np.uint8)
        return pointer

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    def fill(self, pointer: int, value: int, nbytes: int) -> None:
        self.at(pointer)[:nbytes] = value

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.at(target)[:nbytes] = self.at(source)[:nbytes]

    def to_device(self, pointer: int, data: np.ndarray) -> None:
        assert self.at(pointer).nbytes >= data.nbytes
        self.at(pointer)[: data.nbytes] = data

    def to_host(self, data: np.ndarray, pointer: int) -> None:
        data[:] = self.at(pointer)[: data.nbytes]

    def spend(self, microseconds: float) -> bool:
        """True where the time was captured and not spent."""
        if self.captured is not None:
            self.captured.append(microseconds)
            return True
        self.now += microseconds
        return False

    def device_name(self, device: int) -> str:
        return "Simulated"

    def device_count(self) -> int:
        return 1

    def capability(self, device: int) -> tuple[int, int]:
        return 9, 0

    def sm_count(self, device: int) -> int:
        return 132

    def version(self) -> int:
        return 13000

    def pci_bus_id(self, device: int) -> str:
        return "0000:00:00.0"

    def attribute(self, name: str, device: int) -> int:
        assert name == "L2_CACHE_SIZE"
        return self.l2

    def load(self, image: bytes, *, file: str, arch: str, ordinal: int) -> bytes:
        assert image.endswith(b"\0"), "a driver reads PTX up to its NUL"
        return image

    def kernel(self, library: bytes, symbol: str) -> str:
        assert symbol.encode() in library
        return symbol

    def unload(self, library: bytes) -> None:
        pass

    def launch_config(self, kernel: str, grid: Any, block: Any, cluster: Any, smem: int, parameters: bytearray, *rest: Any) -> Any:
        pointer, words, _ = struct.unpack("<QQQ", parameters)
        assert self.at(pointer).nbytes >= 16 * words, "the read-only kernel would leave its memory"
        return 16 * words

    def launcher(self, nbytes: int) -> Callable[[int], None]:
        def launch(stream: int) -> None:
            self.spend(2.0 + nbytes / READ_BYTES_PER_MICROSECOND)

        return launch

    def use_device(self, device: int) -> None:
        if device:
            raise DriverError(f"cuDeviceGet: there is no device {device}")

    def synchronize(self) -> None:
        assert self.captured is None, "a capture does not survive a synchronisation"

    def stream(self) -> int:
        return 7

    def event(self) -> list[float]:
        return [0.0]

    def record(self, event: list[float], stream: int) -> None:
        event[0] = self.now

    def elapsed(self, start: list[float], end: list[float]) -> float:
        return (end[0] - start[0]) / 1000

    def begin_capture(self, stream: int) -> None:
        assert self.captured is None
        self.captured = []

    def end_capture(self, stream: int) -> list[float]:
        graph, self.captured = self.captured, None
        assert graph is not None
        self.graphs += 1
        return graph

    def launch_graph(self, graph: list[float], stream: int) -> None:
        self.now += sum(graph)

    def destroy_graph(self, graph: list[float]) -> None:
        self.graphs -= 1


@lru_cache(maxsize=64)  # every launch of a rotation reads the same bytes again
def _weights(op: str, packed: bytes, experts: int, hidden: int, intermediate: int) -> reference.Weights:
    """What packed weights stand for."""
    unpack = packing.unpack_fc1 if op == "fc1" else packing.unpack_fc2
    codes, scales = unpack(np.frombuffer(packed, np.uint8), experts, hidden, intermediate)
    return reference.Weights(op, codes, tile_scales(scales.reshape(-1, scales.shape[-1])), experts)


class SimulatedPlan:
    """Reads what the addresses hold, computes the contract, writes the outputs, spends time."""

    def __init__(self, loader: SimulatedLoader, key: str, problem: Problem, tensors: Mapping[str, int], settings: Mapping[str, int]) -> None:
        self.loader, self.key, self.problem, self.tensors, self.settings = loader, key, problem, dict(tensors), dict(settings)
        loader.open_plans += 1

    def rebind(self, addresses: Mapping[str, int]) -> None:
        self.tensors.update(addresses)

    def array(self, role: str) -> np.ndarray:
        spec = self.problem.tensors()[role]
        return self.loader.driver.at(self.tensors[role])[: spec.nbytes].view(NUMPY[spec.dtype]).reshape(spec.shape)

    def launch(self, stream: int = 0) -> None:
        loader = self.loader
        loader.read.append((self.problem, self.tensors.get("b", 0)))
        if loader.driver.spend(loader.cost(self.key, self.settings, self.problem)) or self.key in loader.computed:
            return
        self.compute()

    def compute(self) -> None:
        problem, loader = self.problem, self.loader
        if problem.op == "prepare":
            ids = self.array("ids")
            self.array("alpha")[:] = reference.build_alpha(ids, self.array("router"), self.array("w2_alpha"), experts=problem.experts)
            listed = np.unique(ids)
            self.array("active_list")[: 1 + len(listed)] = [len(listed), *listed]
            self.bring()
            return
        if problem.op == "route":
            routes = reference.route(self.array("ids"), self.array("router"), self.array("w2_alpha"), group_tile=problem.group_tile)
            for role, values in routes.packed(problem.m * problem.top_k).items():
                self.array(role)[:] = values
            if problem.deterministic:
                self.array("places")[:] = routes.places(problem.m, problem.top_k)
            self.bring()
            return
        op = problem.op.removeprefix("grouped")
        size = packing.packed_bytes(op, problem.experts, problem.hidden, problem.intermediate)
        packed = loader.driver.at(self.tensors["b"])[:size].tobytes()
        weights = _weights(op, packed, problem.experts, problem.hidden, problem.intermediate)
        if problem.a_dtype == "bf16":
            stored = from_k64_order(self.array("a.k64"), problem.k) if problem.a_in_k64_order else self.array("a")
            a = bf16_values(stored).astype(np.float64)
        else:
            a = reference.activation_values(self.array("a.codes"), self.array("a.scales"))
        if op != problem.op:
            y = self.grouped(a, weights).astype(np.float32)
            written = self.decoded(y) if problem.c_decoded else convert(y, problem.c_dtype)
            if problem.c_in_k64_order:
                self.array("c.k64")[:] = k64_order(written)
            else:
                self.array("c")[:] = written
            return
        alpha = self.array("alpha").astype(np.float64)
        outputs = {role: self.array(role) for role, spec in problem.tensors().items() if spec.output}
        if problem.op == "fc2":
            c = reference.fc2(a, weights, alpha, problem.experts, problem.intermediate).c
            outputs["c"][:] = convert(c.astype(np.float32), problem.c_dtype)
        else:
            y = reference.fc1(a, weights, alpha, range(problem.experts)).y.astype(np.float32)
            if problem.active_list:
                listed = self.array("active_experts")
                idle = np.setdiff1d(np.arange(problem.experts), listed[1 : 1 + listed[0]])
                y.reshape(problem.m, problem.experts, -1)[:, idle] = 0  # not computed
            if problem.c_decoded:
                outputs["c"][:] = self.decoded(y)
            elif problem.c_dtype == "nvfp4":
                plain, own_scales = quantise_rows(y, self.array("output_multiplier")[0])
                outputs["c.codes"][:], outputs["c.scales"][:] = pack_codes(plain), tile_scales(own_scales)
            else:
                outputs["c"][:] = convert(y, problem.c_dtype)
        if loader.fault is not None:
            loader.fault(self.key, problem, outputs)

    def decoded(self, y: np.ndarray) -> np.ndarray:
        """The bf16 bits of what NVFP4 of ``y`` stands for."""
        return reference.rounded_bf16(y, self.array("output_multiplier")[0])

    def bring(self) -> None:
        """Activations as bf16, where ``prepare`` or ``route`` is to bring them."""
        problem = self.problem
        if not problem.x_dtype:
            return
        x = self.array("x")
        if problem.x_rounded:
            x = reference.rounded_bf16(bf16_values(x) if problem.x_dtype == "bf16" else x, self.array("x.multiplier")[0])
        elif problem.x_dtype == "nvfp4":
            x = reference.decoded_bf16(x, self.array("x.scales"))
        self.array(problem.brought)[:] = k64_order(x) if problem.brought == "x.k64" else x

    def grouped(self, a: np.ndarray, weights: reference.Weights) -> np.ndarray:
        """The output of a grouped op: rows of FC1 without a pair stay 0."""
        tiles, problem = self.array("tiles"), self.problem
        count, pairs = tiles[0, :2]
        experts = np.repeat(tiles[1 : 1 + count, 0], tiles[1 : 1 + count, 2])
        row_alpha = self.array("row_alpha")[:pairs] if problem.op == "groupedfc2" else np.zeros(pairs)
        if problem.deterministic:
            places = self.array("places").reshape(-1)
            chosen = np.argsort(np.where(places >= 0, places, len(places)), kind="stable")[:pairs]
            rows = chosen // problem.top_k
        else:
            rows = self.array("rows")[:pairs]
            chosen = np.arange(pairs)  # unused
        routes = reference.Routes(tiles[1 : 1 + count, :3], experts, rows, row_alpha, chosen)
        if problem.op == "groupedfc2":
            return reference.grouped_fc2(a[:pairs], weights, row_alpha.astype(np.float64), routes, problem.m).c
        y = np.zeros((problem.m * problem.top_k, problem.intermediate))
        y[:pairs] = reference.grouped_fc1(a, weights, self.array("alpha").astype(np.float64), routes).y
        return y

    def close(self) -> None:
        self.loader.open_plans -= 1

    def __enter__(self) -> SimulatedPlan:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def entry(key: str, settings: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> SimpleNamespace:
    """What tuning reads of a manifest's entry."""
    variant = Variant.parse(key)
    recipe = Recipe((), (1, 1, 1), (32, 1, 1), settings=settings)
    layout = "none" if variant.op in ("prepare", "route") else "sm90a-superblock/2"
    return SimpleNamespace(key=key, variant=variant, layout=layout, recipe=recipe, sha256="0" * 64)


class SimulatedLoader:
    """Plans over SimulatedDriver for the given keys."""

    def __init__(
        self, keys: Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]], cost: Cost, fault: Fault | None = None, l2: int = 1 << 16
    ) -> None:
        self.driver, self.cost, self.fault = SimulatedDriver(l2), cost, fault
        self.variants = {key: entry(key, settings) for key, settings in keys.items()}
        self.open_plans = 0
        self.read: list[tuple[Problem, int]] = []
        self.computed: set[str] = set()
        self.table: Mapping[str, Any] = load_table("sm_90a")

    def manifest(self, device: int) -> Any:
        return SimpleNamespace(arch="sm_90a", variants=self.variants, toolchain={"ptxas": "none"})

    def select(self, problem: Problem, device: int, variant: str | None = None) -> Choice:
        return select(problem, [each.variant for each in self.variants.values()], self.table, variant)

    def plan(
        self, problem: Problem, tensors: Mapping[str, int], device: int, variant: str | None = None, settings: Mapping[str, int] | None = None
    ) -> SimulatedPlan:
        assert set(tensors) >= set(problem.tensors())
        choice = self.select(problem, device, variant)
        return SimulatedPlan(self, choice.variant.key, problem, tensors, {**choice.settings, **(settings or {})})
