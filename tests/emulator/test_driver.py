"""The emulator in the driver's place: the runtime's Loader, Plans and runner, unchanged."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from densemoe.compile.emulate.driver import EmulatedDriver, texts_of
from densemoe.runtime import data, packing, runner
from densemoe.runtime.errors import ArchitectureMismatch, ArtifactError, DriverError, EmulatorError, PlanError, ProblemError
from densemoe.runtime.loader import ArtifactSet, Loader
from densemoe.runtime.problem import Problem
from densemoe.runtime.runner import run_layer, run_single

FC2 = "fc2.sm90a.t8x64.c1x1.bf16-bf16"


@cache
def texts(root: Path):  # type: ignore[no-untyped-def]
    return texts_of(ArtifactSet(root))


@pytest.fixture
def driver(artifacts: Path) -> EmulatedDriver:
    return EmulatedDriver(texts(artifacts))


@pytest.fixture
def loader(artifacts: Path, driver: EmulatedDriver) -> Loader:
    return Loader(artifacts, driver=driver)  # type: ignore[arg-type]


def put(driver: EmulatedDriver, array: np.ndarray) -> int:
    pointer = driver.allocate(array.nbytes)
    driver.to_device(pointer, array.reshape(-1).view(np.uint8))
    return pointer


@pytest.mark.parametrize("schedule", ["eager", "random:3"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem("fc1", 7, 3, 256, 64, "nvfp4", "nvfp4", alpha_post=True),
        Problem("fc2", 7, 3, 256, 64, "bf16", "bf16"),
    ],
)
def test_densemoe_run_judges_a_plan_on_the_emulator(loader: Loader, driver: EmulatedDriver, problem: Problem, schedule: str) -> None:
    driver.schedule = schedule
    report = run_single(loader, problem, iterations=0)
    assert report.passed, report.detail
    assert report.device.startswith("PTX emulator")
    assert [each.schedule for each in driver.reports] == [schedule]
    assert driver.reports[0].products["mma.sync"] > 0


def test_a_layer_of_two_plans(loader: Loader, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what measures time is left out."""
    monkeypatch.setattr(runner, "_time_layer", lambda *_: float("nan"))
    report = run_layer(loader, m=3, experts=4, top_k=2, hidden=256, intermediate=64)
    assert report.passed
    assert len(driver.reports) == 2


def fc2_plan(loader: Loader, driver: EmulatedDriver, a: np.ndarray):  # type: ignore[no-untyped-def]
    made = data.fc2_weights(np.random.default_rng(0), 1, 64, 128, "exact")
    problem = Problem("fc2", 1, 1, 64, 128, "bf16", "bf16")
    tensors = {"a": put(driver, a), "b": put(driver, packing.pack_fc2(made.codes, made.scales, 1)), "alpha": put(driver, np.ones((1, 1), np.float32))}
    output = driver.allocate(128)
    return loader.plan(problem, {**tensors, "c": output}, 0, FC2), tensors, output


def read(driver: EmulatedDriver, pointer: int) -> np.ndarray:
    array = np.empty(64, np.uint16)
    driver.to_host(array, pointer)
    return array


def test_a_plan_may_be_launched_again_rebound_and_closed(loader: Loader, driver: EmulatedDriver) -> None:
    a = np.full((1, 128), 0x3F80, np.uint16)
    plan, tensors, output = fc2_plan(loader, driver, a)
    plan.launch()
    first = read(driver, output)
    plan.launch(7)
    assert np.array_equal(read(driver, output), first)
    plan.rebind({"a": put(driver, np.zeros_like(a))})
    plan.launch()
    assert not read(driver, output).any()
    plan.update("a", tensors["a"])
    plan.launch()
    assert np.array_equal(read(driver, output), first)
    plan.close()
    with pytest.raises(PlanError, match="closed"):
        plan.launch()


def test_memory_that_is_free_or_was_never_written_is_an_error_of_the_launch(loader: Loader, driver: EmulatedDriver) -> None:
    plan, tensors, _ = fc2_plan(loader, driver, np.zeros((1, 128), np.uint16))
    driver.free(tensors["a"])
    with pytest.raises(EmulatorError, match=r"PTX line \d+ .* out of bounds"):
        plan.launch()
    with pytest.raises(DriverError, match="free already"):
        driver.free(tensors["a"])
    plan.update("a", driver.allocate(256))
    with pytest.raises(EmulatorError, match="is read before it was written"):
        plan.launch()


def test_copies_stay_inside_of_one_allocation(driver: EmulatedDriver) -> None:
    pointer = driver.allocate(16)
    driver.fill(pointer, 7, 16)
    target = driver.allocate(16)
    driver.copy(target, pointer, 16)
    assert driver.pointer_device(target + 15) == 0
    assert driver.pointer_device(1) is None
    with pytest.raises(EmulatorError, match="out of bounds"):
        driver.to_device(pointer, np.zeros(17, np.uint8))


def test_what_the_emulated_device_is_not(artifacts: Path, loader: Loader, driver: EmulatedDriver) -> None:
    with pytest.raises(DriverError, match="device 0 alone"):
        driver.use_device(1)
    with pytest.raises(DriverError, match="CLOCK_RATE"):
        driver.attribute("CLOCK_RATE", 0)
    with pytest.raises(ArtifactError, match="build again"):
        texts(artifacts)("0" * 64)
    with pytest.raises(ProblemError):
        loader.plan(Problem("fc2", 1, 1, 64, 128, "bf16", "bf16"), {}, 0, FC2)
    blackwell = EmulatedDriver(texts(artifacts), capability=(10, 0))
    entry = loader.manifest(0).variants[FC2]
    with pytest.raises(ArchitectureMismatch, match="PTX emulator"):
        blackwell.load(loader.artifacts.image(entry), file=entry.file, arch=entry.arch, ordinal=0)
