"""``densemoe run`` and the quick start's layer on a driver whose memory is the host's: the reference stands in for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from densemoe.runtime import packing, reference, runner
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import bf16_values, convert, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import Choice
from densemoe.runtime.variant import Variant

NUMPY = {"u8": np.uint8, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}
Fault = Callable[[Problem, Mapping[str, np.ndarray]], None]


class HostDriver:
    """Memory at made-up addresses; streams, events and graphs that do nothing."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.next = 1 << 20

    def at(self, pointer: int) -> np.ndarray:
        base = max(each for each in self.blocks if each <= pointer)
        return self.blocks[base][pointer - base :]

    def allocate(self, nbytes: int) -> int:
        pointer, self.next = self.next, self.next + nbytes + 4096
        self.blocks[pointer] = np.zeros(nbytes, dtype=np.uint8)
        return pointer

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    def fill(self, pointer: int, value: int, nbytes: int) -> None:
        self.at(pointer)[:nbytes] = value

    def to_device(self, pointer: int, data: np.ndarray) -> None:
        self.at(pointer)[: data.nbytes] = data

    def to_host(self, data: np.ndarray, pointer: int) -> None:
        data[:] = self.at(pointer)[: data.nbytes]

    def device_name(self, device: int) -> str:
        return "Host"

    def version(self) -> int:
        return 13000

    def attribute(self, name: str, device: int) -> int:
        assert name == "L2_CACHE_SIZE"
        return 1 << 20

    def elapsed(self, start: Any, end: Any) -> float:
        return 0.5

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in ("use_device", "synchronize", "stream", "event", "record", "begin_capture", "end_capture", "launch_graph"):
            raise AttributeError(name)
        return lambda *arguments: 0


class HostPlan:
    """Reads what the addresses hold, computes the contract, writes the outputs."""

    def __init__(self, driver: HostDriver, problem: Problem, tensors: Mapping[str, int], fault: Fault | None) -> None:
        self.driver, self.problem, self.tensors, self.fault, self.key = driver, problem, tensors, fault, f"{problem.op}.host"
        self.closed = False

    def array(self, role: str) -> np.ndarray:
        spec = self.problem.tensors()[role]
        return self.driver.at(self.tensors[role])[: spec.nbytes].view(NUMPY[spec.dtype]).reshape(spec.shape)

    def launch(self, stream: int = 0) -> None:
        problem = self.problem
        size = packing.packed_bytes(problem.op, problem.experts, problem.hidden, problem.intermediate)
        unpack = packing.unpack_fc1 if problem.op == "fc1" else packing.unpack_fc2
        codes, scales = unpack(self.driver.at(self.tensors["b"])[:size], problem.experts, problem.hidden, problem.intermediate)
        weights = reference.Weights(problem.op, codes, tile_scales(scales.reshape(-1, scales.shape[-1])), problem.experts)
        if problem.a_dtype == "bf16":
            a = bf16_values(self.array("a")).astype(np.float64)
        else:
            a = reference.activation_values(self.array("a.codes"), self.array("a.scales"))
        alpha = self.array("alpha").astype(np.float64)
        outputs = {role: self.array(role) for role, spec in problem.tensors().items() if spec.output}
        if problem.op == "fc2":
            c = reference.fc2(a, weights, alpha, problem.experts, problem.intermediate).c
            outputs["c"][:] = convert(c.astype(np.float32), problem.c_dtype)
        else:
            post = self.array("alpha_post").astype(np.float64) if problem.alpha_post else None
            y = reference.fc1(a, weights, alpha, range(problem.experts), post).y.astype(np.float32)
            if problem.c_dtype == "nvfp4":
                plain, own_scales = quantise_rows(y, self.array("output_multiplier")[0])
                outputs["c.codes"][:], outputs["c.scales"][:] = pack_codes(plain), tile_scales(own_scales)
            else:
                outputs["c"][:] = convert(y, problem.c_dtype)
        if self.fault is not None:
            self.fault(problem, outputs)

    def close(self) -> None:
        self.closed = True


class HostLoader:
    """Plans over HostDriver."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.driver, self.fault = HostDriver(), fault
        self.plans: list[HostPlan] = []

    def select(self, problem: Problem, device: int, variant: str | None = None) -> Choice:
        chosen = Variant.parse(f"{problem.op}.sm90a.t8x64.c1x1.{problem.a_dtype}-{problem.c_dtype}")
        return Choice(chosen, 8, "the only one", "modelled", ())

    def plan(self, problem: Problem, tensors: Mapping[str, int], device: int, variant: str | None = None) -> HostPlan:
        assert set(tensors) == {*problem.tensors(), "b"}
        self.plans.append(HostPlan(self.driver, problem, tensors, self.fault))
        return self.plans[-1]


def run(problem: Problem, fault: Fault | None = None, **options: Any) -> tuple[runner.RunReport, HostLoader]:
    loader = HostLoader(fault)
    report = runner.run_single(loader, problem, **{"iterations": 0, **options})  # type: ignore[arg-type]
    return report, loader


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
@pytest.mark.parametrize("c_dtype", ["nvfp4", "bf16", "f16", "f32"])
def test_fc1_passes_with_the_contract_as_kernel(a_dtype: str, c_dtype: str) -> None:
    report, loader = run(Problem("fc1", 5, 3, 128, 64, a_dtype, c_dtype, alpha_post=True))
    assert report.passed
    assert (report.checked_columns, report.columns) == (192, 192)
    assert loader.driver.blocks == {}
    assert all(plan.closed for plan in loader.plans)


@pytest.mark.parametrize("scalar", [False, True])
def test_fc2_passes_with_the_contract_as_kernel(scalar: bool) -> None:
    for a_dtype, c_dtype in (("bf16", "bf16"), ("nvfp4", "f16"), ("bf16", "f32")):
        report, _ = run(Problem("fc2", 5, 3, 128, 64, a_dtype, c_dtype, scalar_alpha=scalar))
        assert report.passed, c_dtype
        assert report.checked_columns == 128


def wrong(problem: Problem, outputs: Mapping[str, np.ndarray]) -> None:
    first = next(iter(outputs.values())).reshape(-1)
    first[0] = first[0] ^ 0x1000 if first.dtype == np.uint16 else first[0] + 1


@pytest.mark.parametrize(
    "problem", [Problem("fc1", 5, 3, 128, 64, "bf16", "bf16"), Problem("fc1", 5, 3, 128, 64, "bf16", "f32"), Problem("fc2", 5, 3, 128, 64)]
)
def test_one_wrong_element_fails(problem: Problem) -> None:
    report, _ = run(problem, wrong)
    assert report.passed is False
    assert report.mismatches == 1


def test_columns_are_sampled_where_the_reference_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LARGEST_CHECK", 5 * 128 * 2 * 16 * 3)
    report, _ = run(Problem("fc1", 5, 3, 128, 64, "bf16", "nvfp4"))
    assert report.passed
    assert report.checked_columns == 48
    monkeypatch.setattr(runner, "LARGEST_CHECK", 1)
    report, _ = run(Problem("fc2", 5, 3, 128, 64))
    assert report.passed
    assert report.checked_columns == 16


def test_m_zero_passes_with_nothing_compared_or_timed() -> None:
    report, _ = run(Problem("fc1", 0, 2, 128, 64), iterations=4)
    assert report.passed
    assert report.microseconds is None


def test_copies_of_cold_weights_exceed_the_l2_twice() -> None:
    problem = Problem("fc1", 5, 3, 128, 64)
    report, loader = run(problem, iterations=4)
    assert (report.copies - 1) * report.weight_bytes >= 2 << 20
    assert len({plan.tensors["b"] for plan in loader.plans}) == report.copies
    assert report.microseconds == pytest.approx(125.0)
    assert run(problem, iterations=4, cold=False)[0].copies == 1


def test_without_the_check_nothing_is_claimed() -> None:
    report, _ = run(Problem("fc1", 5, 3, 128, 64), wrong, check=False)
    assert report.passed is None


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
def test_a_layer_passes_with_the_contract_as_kernels(a_dtype: str) -> None:
    report = runner.run_layer(HostLoader(), m=6, experts=7, top_k=2, hidden=256, intermediate=512, a_dtype=a_dtype)  # type: ignore[arg-type]
    assert report.passed, report
    assert report.mark >= 0.97


def test_a_layer_whose_fc2_is_wrong_fails() -> None:
    def scaled(problem: Problem, outputs: Mapping[str, np.ndarray]) -> None:
        if problem.op == "fc2":
            outputs["c"][:] = convert(bf16_values(outputs["c"]) * np.float32(1.02), "bf16")

    report = runner.run_layer(HostLoader(scaled), m=6, experts=7, top_k=2, hidden=256, intermediate=512)  # type: ignore[arg-type]
    assert not report.passed
    assert report.fc2_worst > 1
