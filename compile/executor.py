"""Where the build's and the emulator's tasks run: processes of this machine, or the workers of a ``dask.distributed`` cluster.

A task is one call of a module-level function with one picklable argument. Results come back in any order; a task that fails is named with its
error and the others go on. Standard library only, so that a worker can limit its BLAS threads before numpy is imported.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from densemoe.runtime.errors import BuildError, DensemoeError, ToolchainError

__all__ = ["DaskCluster", "Executor", "LocalPool", "open_executor"]

#: Every BLAS that numpy may be linked with reads one of these once, when it is loaded: a pool of many processes with many threads each is slower.
BLAS_THREADS: Final = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_ADDRESS: Final = re.compile(r"(tcp|tls|ucx|ws|wss|inproc)://\S+")
CONNECT_SECONDS: Final = 15.0
#: A cluster without a worker for so long is given up: whoever started the run would wait for ever.
IDLE_SECONDS: Final = 120.0
POLL_SECONDS: Final = 5.0
#: Tasks in flight a worker thread: enough that none waits for the next, few enough that a scheduler never holds thousands of PTX texts.
IN_FLIGHT: Final = 3

Function = Callable[[Any], Any]
Done = Callable[[int, Any, "str | None"], None]  # (number of the task, its result or None, its error or None)


class Executor(Protocol):
    """Runs tasks."""

    def run(self, function: Function, tasks: Sequence[Any], done: Done) -> None:
        """Runs ``function`` on every task; ``done`` is called in this thread with each task's number and its result or its error.

        Raises:
            BuildError: the executor itself is lost; tasks that ``done`` has seen are finished.
        """


def open_executor(where: str = "local", jobs: int | None = None, timeout: float | None = None) -> Executor:
    """The executor that ``where`` names.

    Args:
        where: ``local``, or the address of a ``dask.distributed`` scheduler, as in ``tcp://host:8786``.
        jobs: processes of the local pool, by default the cores that this process may use.
        timeout: seconds a task of the local pool may take before its process is killed.

    Raises:
        ToolchainError: ``where`` is neither, or the extra [cluster] is missing.
    """
    if where == "local":
        return LocalPool(jobs or len(os.sched_getaffinity(0)), timeout)
    if not _ADDRESS.fullmatch(where):
        raise ToolchainError(f"executor {where!r}: use local, or the address of a dask.distributed scheduler, for example tcp://127.0.0.1:8786")
    return DaskCluster(where)


def _outcome(function: Function, task: Any) -> tuple[Any, str | None]:
    try:
        return function(task), None
    except (DensemoeError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"
    except Exception as error:  # a bug in one task must not end the others
        return None, f"unexpected {type(error).__name__}: {error}"


# ---- this machine


def _serve(connection: multiprocessing.connection.Connection) -> None:
    """A worker process: answers every (function, task) with (result, error); ends at None."""
    for name in BLAS_THREADS:
        os.environ[name] = "1"  # before the first task is unpickled, which imports numpy
    try:
        while (work := connection.recv()) is not None:
            connection.send(_outcome(*work))
    except (EOFError, KeyboardInterrupt):
        return  # the parent is gone, or is being interrupted too


class LocalPool:
    """Processes that can be killed one by one: a task that hangs or crashes costs its own process only."""

    def __init__(self, jobs: int, timeout: float | None = None) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.jobs, self.timeout = jobs, timeout

    def run(self, function: Function, tasks: Sequence[Any], done: Done) -> None:
        """See ``Executor.run``."""
        waiting = list(range(len(tasks)))[::-1]
        idle: list[tuple[Any, Any]] = []
        busy: dict[Any, tuple[Any, int, float]] = {}
        limit = float("inf") if self.timeout is None else self.timeout
        try:
            while waiting or busy:
                while waiting and (idle or len(busy) < self.jobs):
                    connection, process = idle.pop() if idle else self._start()
                    number = waiting.pop()
                    connection.send((function, tasks[number]))
                    busy[connection] = (process, number, time.monotonic() + limit)
                deadline = min(each for _, _, each in busy.values())
                wait = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
                ready: list[Any] = list(multiprocessing.connection.wait(list(busy), wait))
                for connection in ready:
                    process, number, _ = busy.pop(connection)
                    try:
                        result, error = connection.recv()
                    except (EOFError, ConnectionResetError):
                        process.join()
                        done(number, None, f"its process ended with exit code {process.exitcode}: out of memory, or a crash")
                    else:
                        idle.append((connection, process))
                        done(number, result, error)
                for connection in [c for c, (_, _, until) in busy.items() if until <= time.monotonic()]:
                    process, number, _ = busy.pop(connection)
                    process.kill()
                    process.join()
                    done(number, None, f"not done after {self.timeout:g} s: raise --timeout")
        finally:
            for connection, process in idle:
                connection.send(None)
                process.join(5)
            for process, _, _ in busy.values():
                process.kill()
                process.join()

    def _start(self) -> tuple[Any, Any]:
        here, there = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        return here, process


# ---- a cluster

_ONE_AT_A_TIME = threading.Lock()  # the compiler is not thread-safe, and a worker may have several threads


def _on_worker(function: Function, task: Any) -> tuple[Any, str | None]:
    with _ONE_AT_A_TIME:
        return _outcome(function, task)


class DaskCluster:
    """A ``dask.distributed`` cluster. What a lost worker had begun, others do; workers may come and go."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self.distributed = importlib.import_module("distributed")
        except ImportError:
            raise ToolchainError(f"executor {address} needs dask.distributed: install densemoe[cluster]") from None

    def run(self, function: Function, tasks: Sequence[Any], done: Done) -> None:
        """See ``Executor.run``. Tasks have no time limit of their own here."""
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # a lost worker is no error of ours
        try:
            client = self.distributed.Client(self.address, timeout=CONNECT_SECONDS)
        except (OSError, TimeoutError) as error:
            raise ToolchainError(f"no dask.distributed scheduler answers at {self.address}: {error or 'no answer'}") from None
        with client:
            self._run(client, function, tasks, done)

    def _run(self, client: Any, function: Function, tasks: Sequence[Any], done: Done) -> None:
        waiting = list(range(len(tasks)))[::-1]
        pending: dict[Any, int] = {}
        last_seen = time.monotonic()
        while waiting or pending:
            threads = sum(self._ask(client.nthreads).values())
            if threads:
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > IDLE_SECONDS:
                raise BuildError(f"{self.address} has had no worker for {IDLE_SECONDS:g} s: what was finished stays; start workers, run again")
            while waiting and len(pending) < max(1, threads) * IN_FLIGHT:
                number = waiting.pop()
                pending[client.submit(_on_worker, function, tasks[number], pure=False)] = number
            for future in self._ask(self._finished, list(pending)):
                number = pending.pop(future)
                if future.status == "finished":
                    done(number, *self._ask(future.result))
                elif future.status == "error":
                    # the function's own errors come back as results: this is KilledWorker, or a worker without the same densemoe
                    error = future.exception()
                    done(number, None, f"the cluster could not run it: {type(error).__name__}: {error}")
                else:
                    raise self._lost(future.status)

    def _finished(self, futures: list[Any]) -> Any:
        """Those that are done, after at most ``POLL_SECONDS``."""
        try:
            return self.distributed.wait(futures, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED").done
        except (TimeoutError, self.distributed.TimeoutError):
            return ()

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The scheduler's answer."""
        try:
            return question(*arguments)
        except (OSError, self.distributed.CancelledError) as error:
            raise self._lost(f"{type(error).__name__}: {error}") from None

    def _lost(self, why: str) -> BuildError:
        return BuildError(f"the scheduler at {self.address} was lost ({why}): what was finished stays, run the command again")
