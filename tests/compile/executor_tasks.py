"""Functions that tests give to executors: they must be importable where they run."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from densemoe.runtime.errors import EmulatorError


def double(x: int) -> int:
    return 2 * x


def fails(what: str) -> Any:
    if what == "ours":
        raise EmulatorError("PTX line 7: a fault")
    if what == "bug":
        raise KeyError("gone")
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(60)
    return what


def threads(size: int) -> int:
    """Threads of this process after a matrix product."""
    import numpy as np

    a = np.ones((size, size))
    (a @ a).sum()
    return len(os.listdir("/proc/self/task"))


def slowly(x: int) -> tuple[int, int]:
    """(twice x, who did it)."""
    time.sleep(0.05)
    return 2 * x, os.getpid()
