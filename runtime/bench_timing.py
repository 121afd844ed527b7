"""Times of launches on a device: CUDA graphs, medians of interleaved candidates. Knows no architecture and no op; standard library only.

    launches ── capture ──► graph of many launches ── rest, replay, timed replay, all candidates in turn, round after round ──► Sample

Candidates that are compared are replayed in turn, so that a drift of clocks or temperature meets all of them alike. Whoever measures
rotates the tensors over more than the L2 in the launches that are captured (``rotations``): times are then those of cold weights.

A candidate that draws much power leaves the next one a lower clock: on an H200 a replay of 1.5 ms took up to 16 % longer behind one of 15 ms at the
power limit, and less than 3 % longer 10 ms later (docs/tried.md). So each replay waits as long as the one before took, up to that, and what a rest
slows down is replayed once before it is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import sleep
from typing import TYPE_CHECKING, Final

from densemoe.runtime.errors import ProblemError

if TYPE_CHECKING:
    from densemoe.runtime.driver import Driver

__all__ = ["COLD_FACTOR", "Launch", "Sample", "Timed", "Timer", "rotations"]

COLD_FACTOR: Final = 2  # what a rotation reads before it returns, in L2 caches
LARGEST_ROTATION: Final = 256
GRAPH_MICROSECONDS: Final = 1500.0  # of work in a graph: its own launch of some 5 µs is then below half a percent
LEAST_LAUNCHES: Final = 4
LARGEST_GRAPH: Final = 2048  # launches; a graph's nodes take some kilobytes each
LONGEST_REST: Final = 0.010  # seconds between replays, after which an H200's clock has recovered

#: Enqueues one launch on a stream; called at capture alone.
Launch = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """Times of one candidate, in microseconds a launch.

    Attributes:
        microseconds: the median over the replays.
        low, high: first and third quartile.
        runs: replays.
        launches: launches a replay.
    """

    microseconds: float
    low: float
    high: float
    runs: int
    launches: int

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.microseconds if self.microseconds else 0.0

    @classmethod
    def of(cls, times: Sequence[float], launches: int) -> Sample:
        """The Sample of some replays' times. Raises ProblemError where there are none."""
        if not times:
            raise ProblemError("no replay was timed: ask for at least one round")
        ordered = sorted(times)
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else (ordered[0],) * 3
        return cls(statistics.median(ordered), low, high, len(ordered), launches)


@dataclass(frozen=True)
class Timed:
    """Work that can be replayed on a stream as often as wanted.

    Attributes:
        replay: enqueues it.
        launches: what a replay's time is divided by.
        close: frees it.
    """

    replay: Callable[[int], None]
    launches: int
    close: Callable[[], None] = lambda: None


def rotations(touched: int, l2: int) -> int:
    """How many launches read ``COLD_FACTOR`` L2 caches, and one more: the rotation after which bytes may be read again and be cold.

    Args:
        touched: bytes that one launch reads; l2: bytes of the L2.
    """
    return min(LARGEST_ROTATION, -(-COLD_FACTOR * l2 // max(1, touched)) + 1)


class Timer:
    """A stream and two events of the context that is current on this thread."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.stream = driver.stream()
        self._start, self._end = driver.event(), driver.event()

    def once(self, work: Callable[[int], None]) -> float:
        """Microseconds between two events around ``work``, which enqueues on the given stream; waits for it."""
        self.driver.record(self._start, self.stream)
        work(self.stream)
        self.driver.record(self._end, self.stream)
        return self.driver.elapsed(self._start, self._end) * 1000

    def estimate(self, launches: Sequence[Launch]) -> float:
        """Microseconds a launch of one pass over ``launches``, not captured: host-bound below some 4 µs. The first pass warms up."""
        for each in launches:
            each(self.stream)
        self.driver.synchronize()

        def work(stream: int) -> None:
            for each in launches:
                each(stream)

        return self.once(work) / len(launches)

    def graph(self, launches: Sequence[Launch], microseconds: float = 0.0, divide_by: int = 1) -> Timed:
        """A graph that passes over ``launches`` as often as GRAPH_MICROSECONDS hold.

        Args:
            launches: one rotation.
            microseconds: what one launch is estimated to take; 0: one pass.
            divide_by: launches that make up one timed unit: 2 for FC1 and FC2 of a layer.

        Raises:
            DriverError: something of it may not be captured.
        """
        passes = 1
        if microseconds > 0:
            passes = max(1, round(GRAPH_MICROSECONDS / (microseconds * len(launches))), -(-LEAST_LAUNCHES // len(launches)))
            passes = max(1, min(passes, LARGEST_GRAPH // len(launches)))
        driver = self.driver
        driver.begin_capture(self.stream)
        for _ in range(passes):
            for each in launches:
                each(self.stream)
        graph = driver.end_capture(self.stream)

        def close() -> None:
            driver.destroy_graph(graph)

        return Timed(lambda stream: driver.launch_graph(graph, stream), passes * len(launches) // divide_by, close)

    def interleave(self, timed: Mapping[str, Timed], rounds: int) -> dict[str, Sample]:
        """Replays all of ``timed`` in turn, ``rounds`` times after one round that is not counted; each rested, and warm."""
        times: dict[str, list[float]] = {name: [] for name in timed}
        before = 0.0
        for turn in range(rounds + 1):
            for name, each in timed.items():
                sleep(min(before, LONGEST_REST))
                self.once(each.replay)
                taken = self.once(each.replay)
                before = taken / 1e6
                if turn:
                    times[name].append(taken / each.launches)
        return {name: Sample.of(taken, timed[name].launches) for name, taken in times.items()}

    def sustain(self, timed: Timed, seconds: float, clock: Callable[[], float]) -> Sample:
        """Replays ``timed`` without pause for ``seconds``; the Sample of the second half, when clocks have settled under the power limit.

        Args:
            clock: a monotonic clock in seconds.
        """
        start = clock()
        times: list[float] = []
        while clock() - start < seconds or len(times) < 2:
            times.append(self.once(timed.replay) / timed.launches)
        return Sample.of(times[len(times) // 2 :], timed.launches)
