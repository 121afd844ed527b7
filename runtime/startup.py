"""``densemoe bench startup``: what a cold start costs, each figure from a fresh interpreter or a first call, beside its bar (README.md)."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any, Final

from densemoe.runtime.driver import version_text
from densemoe.runtime.errors import DensemoeError

__all__ = ["measure"]

RUNS: Final = 7
BATCHES: Final = 60
LAUNCHES: Final = 200  # fewer than the device's queue holds

_FIRST_KERNEL: Final = """
import time, ctypes, sys
from cuda.bindings import driver as cuda
cuda.cuInit(0); device = cuda.cuDeviceGet(0)[1]; context = cuda.cuDevicePrimaryCtxRetain(device)[1]; cuda.cuCtxSetCurrent(context)
from densemoe.runtime.driver import Driver
from densemoe.runtime.loader import Loader
import densemoe.runtime.select
driver = Driver()
start = time.perf_counter()
loader = Loader(ARTIFACTS, driver)
key = KEY
loader.kernel(key, 0)
first = time.perf_counter()
loader.kernel(OTHER, 0)
second = time.perf_counter()
print((first - start) * 1e6, (second - first) * 1e6)
"""


def _interpreter(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DensemoeError(f"the measured interpreter failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return [float(part) for part in done.stdout.split()]


def _import_seconds() -> float:
    """What importing the runtime adds to a bare interpreter: the two in turn, so that a machine's drift cancels; median of the differences."""

    def wall(code: str) -> float:
        start = time.perf_counter()
        _interpreter(code)
        return time.perf_counter() - start

    pairs = [(wall("print(0)"), wall("from densemoe.runtime import Loader, Problem; print(0)")) for _ in range(RUNS)]
    return statistics.median(imported - bare for bare, imported in pairs)


def measure(artifacts: str | None = None) -> list[dict[str, Any]]:
    """Rows of ``what``, ``value``, ``bar``. The GPU's rows say so where there is none."""
    rows = [
        {"what": "import densemoe.runtime with its Loader, over a bare interpreter", "value": f"{_import_seconds() * 1e3:.1f} ms", "bar": "< 100 ms"},
    ]
    from densemoe.runtime.loader import ArtifactSet, Loader

    try:
        from densemoe.runtime.driver import Driver

        driver = Driver()
        loader = Loader(ArtifactSet(artifacts), driver)
        keys = sorted(loader.manifest(0).variants)
    except DensemoeError as error:
        rows.append({"what": "first kernel, launch", "value": f"not measured: {error}", "bar": "< 1 ms, <= 4 us"})
        return rows
    code = _FIRST_KERNEL.replace("ARTIFACTS", repr(str(loader.artifacts.root))).replace("KEY", repr(keys[0])).replace("OTHER", repr(keys[1]))
    pairs = [_interpreter(code) for _ in range(RUNS)]
    rows.append(
        {
            "what": "first kernel once a context exists, opening the artifact set included",
            "value": f"{statistics.median(pair[0] for pair in pairs):.0f} us",
            "bar": "< 1000 us",
        }
    )
    rows.append(
        {
            "what": "a later kernel, with hash and ABI check",
            "value": f"{statistics.median(pair[1] for pair in pairs):.0f} us",
            "bar": "<= 150 us",
        }
    )
    rows.append({"what": "launch of a prepared Plan from Python", "value": f"{_launch(loader):.2f} us", "bar": "<= 4 us"})
    rows.append({"what": "device", "value": f"{driver.device_name(0)}, driver for CUDA {version_text(driver.version())}", "bar": ""})
    return rows


def _launch(loader: Any) -> float:
    """Microseconds of host time a launch of a prepared Plan, in batches that the device keeps up with."""
    from densemoe.runtime.problem import Problem

    driver = loader.driver
    driver.use_device(0)
    problem = Problem("fc1", 1, 1, 64, 64, "bf16", "bf16")
    sizes = {role: spec.nbytes for role, spec in problem.tensors().items()}
    pointers = {role: driver.allocate(size) for role, size in {**sizes, "b": 2 * 4608}.items()}
    try:
        with loader.plan(problem, pointers, 0) as plan:
            stream = driver.stream()
            times = []
            for _ in range(BATCHES):
                driver.synchronize()
                start = time.perf_counter()
                for _ in range(LAUNCHES):
                    plan.launch(stream)
                times.append((time.perf_counter() - start) * 1e6 / LAUNCHES)
            driver.synchronize()
            return statistics.median(times[BATCHES // 2 :])  # the first half warms clocks and caches
    finally:
        for pointer in pointers.values():
            driver.free(pointer)
