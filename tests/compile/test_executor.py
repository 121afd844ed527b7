"""Executors: every task has one answer, whatever becomes of the process or the worker that had it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import executor_tasks

from densemoe.compile import executor
from densemoe.runtime.errors import ToolchainError


def run_all(where: executor.Executor, function: Callable[[Any], Any], tasks: list[Any]) -> dict[int, tuple[Any, str | None]]:
    found: dict[int, tuple[Any, str | None]] = {}

    def done(number: int, result: Any, error: str | None) -> None:
        assert number not in found
        found[number] = (result, error)

    where.run(function, tasks, done)
    assert sorted(found) == list(range(len(tasks)))
    return found


def test_every_task_has_its_own_answer() -> None:
    found = run_all(executor.LocalPool(2), executor_tasks.double, list(range(20)))
    assert found == {i: (2 * i, None) for i in range(20)}


def test_a_failure_costs_its_own_task_only() -> None:
    found = run_all(executor.LocalPool(1, timeout=8), executor_tasks.fails, ["fine", "ours", "bug", "crash", "fine"])
    assert found[0] == found[4] == ("fine", None)
    assert found[1] == (None, "EmulatorError: PTX line 7: a fault")
    assert found[2] == (None, "unexpected KeyError: 'gone'")
    assert "exit code -9" in str(found[3][1])


def test_a_task_that_hangs_is_killed() -> None:
    found = run_all(executor.LocalPool(2, timeout=3), executor_tasks.fails, ["hang", "fine"])
    assert found[0][1] == "not done after 3 s: raise --timeout"
    assert found[1] == ("fine", None)


def test_a_worker_has_one_blas_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in executor.BLAS_THREADS:
        monkeypatch.setenv(name, "4")
    assert run_all(executor.LocalPool(1), executor_tasks.threads, [600]) == {0: (1, None)}


def test_what_is_no_executor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolchainError, match="use local, or the address"):
        executor.open_executor("remote")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ToolchainError, match=r"install densemoe\[cluster\]"):
        executor.open_executor("tcp://127.0.0.1:1")


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "CONNECT_SECONDS", 1.0)
    with pytest.raises(ToolchainError, match=r"no dask.distributed scheduler answers at tcp://127.0.0.1:9"):
        executor.open_executor("tcp://127.0.0.1:9").run(executor_tasks.double, [1], lambda *_: None)


# ---- a cluster of two workers


class Cluster:
    """A scheduler and two worker processes of this machine; the workers do not come back when they are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        address_file = folder / "scheduler.json"
        common = ["--scheduler-file", str(address_file)]
        self.scheduler = self._start("scheduler", "distributed.cli.dask_scheduler", ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", *common])
        self._wait(address_file.exists, "a scheduler")
        import json

        self.address = json.loads(address_file.read_text())["address"]
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1", "--local-directory", str(folder)]
        self.workers = [self._start(f"worker{i}", "distributed.cli.dask_worker", [self.address, *options]) for i in range(2)]

    def _start(self, name: str, module: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}, cwd=self.folder
            )

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < until, f"{what} did not start: {[path.read_text()[-500:] for path in self.folder.glob('*.log')]}"
            time.sleep(0.05)

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    started = Cluster(tmp_path)
    yield started
    started.close()


def test_a_killed_worker_s_tasks_are_done_by_the_other(cluster: Cluster) -> None:
    """Both answer, then one is killed in the middle of a task: every task still has one answer, and the last ones are the survivor's."""
    found: dict[int, tuple[int, int]] = {}
    seen: set[int] = set()
    killed = 0

    def done(number: int, result: Any, error: str | None) -> None:
        nonlocal killed
        assert error is None
        assert number not in found
        found[number] = result
        seen.add(result[1])
        if len(seen) == 2 and not killed:
            killed = cluster.workers[0].pid
            cluster.workers[0].send_signal(signal.SIGKILL)

    tasks = list(range(60))
    executor.open_executor(cluster.address).run(executor_tasks.slowly, tasks, done)
    assert {number: result for number, (result, _) in found.items()} == {i: 2 * i for i in tasks}
    assert killed in seen
    assert cluster.workers[0].wait() == -signal.SIGKILL
    assert found[len(tasks) - 1][1] == cluster.workers[1].pid


def test_errors_come_back_from_a_cluster(cluster: Cluster) -> None:
    found = run_all(executor.open_executor(cluster.address), executor_tasks.fails, ["fine", "ours", "bug"])
    assert found == {0: ("fine", None), 1: (None, "EmulatorError: PTX line 7: a fault"), 2: (None, "unexpected KeyError: 'gone'")}
