"""How ``densemoe bench launch`` measures what an op costs over its launches, on a clock that is told what things take."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest
import torch

from densemoe.runtime import bench_overhead
from densemoe.runtime.torch import ops


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, 0

    def passes(self, microseconds: Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.now += microseconds() * 1e-6

        return call

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(bench_overhead.time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize("count", [1, 100])
def test_what_a_launch_takes_may_change_from_series_to_series(clock: Clock, count: int) -> None:
    """Launches take 4 us for a while, then 14; the op takes 9 more throughout."""

    def launches() -> float:
        return 4.0 if clock.waits % 400 < 130 else 14.0

    took = bench_overhead.over(clock.passes(lambda: launches() + 9.0), clock.passes(launches), clock.synchronize, count, 200)
    assert took == pytest.approx(9.0)


def test_rounds_begin_with_either_in_turn_and_those_that_warm_do_not_count(clock: Clock) -> None:
    order: list[str] = []
    counted = itertools.count()

    def call() -> None:
        order.append("call")
        clock.now += (100.0 if next(counted) < 4 else 5.0) * 1e-6

    took = bench_overhead.over(call, lambda: order.append("without"), clock.synchronize, 2, 20)
    assert took == pytest.approx(5.0)
    assert order[:12] == ["without"] * 2 + ["call"] * 4 + ["without"] * 4 + ["call"] * 2
    assert clock.waits == 2 * 22 + 1  # two rounds that warm, twenty, and a last wait


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_meanwhile_and_the_collector_is_left_as_it_was(clock: Clock, enabled: bool) -> None:
    seen: list[bool] = []
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        bench_overhead.over(lambda: seen.append(gc.isenabled()), lambda: None, clock.synchronize, 1, 10)
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError):
            bench_overhead.over(lambda: 1 // 0, lambda: None, clock.synchronize, 1, 10)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert set(seen) == {False}


def test_an_idle_op_takes_the_arguments_of_ours_and_does_nothing() -> None:
    x, one = torch.zeros(4, 64), torch.ones(1)
    idle = bench_overhead.idle_op(torch, "quantize_of_a_test", ops.SCHEMAS["quantize_nvfp4"][0], (x, one), "CPU")
    assert all(given is wanted for given, wanted in zip(idle(x, one), (x, one), strict=True))
    idle = bench_overhead.idle_op(torch, "fc2_of_a_test", ops.SCHEMAS["fc2"][0], x, "CPU")
    assert idle(x, x, one, 1, 64, "none") is x


def test_without_a_gpu_one_row_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: densemoe bench launch measures it")
    (row,) = bench_overhead.op_overheads()
    assert row["us"] is None
    assert "no CUDA device" in row["what"]
