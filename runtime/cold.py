"""What one fresh process measures of its own cold start, for ``densemoe bench startup``; imports nothing that a server would not import."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Final

__all__ = ["main"]

BATCHES: Final = 40
LAUNCHES: Final = 200  # a batch: fewer than the device's queue holds, so that the host does not wait


def _microseconds(start: float) -> float:
    return (time.perf_counter() - start) * 1e6


def main(arguments: list[str]) -> int:
    """Prints the figures in microseconds as one JSON object.

    Args:
        arguments: one JSON object: ``artifacts``, a root or null for the default; ``device``; ``keys``, the variants to load, the
            first of them first; ``dtypes`` of FC1's activations and output.
    """
    task = json.loads(arguments[0])
    device = task["device"]
    start = time.perf_counter()
    from cuda.bindings import driver as cuda

    cuda.cuInit(0)
    _, context = cuda.cuDevicePrimaryCtxRetain(cuda.cuDeviceGet(device)[1])
    cuda.cuCtxSetCurrent(context)
    figures: dict[str, Any] = {"context": _microseconds(start)}
    from densemoe.runtime.driver import Driver
    from densemoe.runtime.loader import Loader
    from densemoe.runtime.problem import Problem

    loads: list[float] = []
    asked: list[float] = []  # what the driver's other calls take, a kernel

    class Timed(Driver):
        """Notes what ``cuLibraryLoadData`` takes, and what the driver is asked of a loaded kernel."""

        def load(self, image: bytes, *, file: str, arch: str, ordinal: int) -> Any:
            start = time.perf_counter()
            library = super().load(image, file=file, arch=arch, ordinal=ordinal)
            loads.append(_microseconds(start))
            asked.append(0.0)
            return library

        def kernel(self, library: Any, symbol: str) -> Any:
            start = time.perf_counter()
            handle = super().kernel(library, symbol)
            asked[-1] += _microseconds(start)
            return handle

        def parameters(self, kernel: Any) -> tuple[tuple[int, int], ...]:
            start = time.perf_counter()
            found = super().parameters(kernel)
            asked[-1] += _microseconds(start)
            return found

        def prepare(self, kernel: Any, ordinal: int, dynamic_smem: int, carveout: int) -> None:
            start = time.perf_counter()
            super().prepare(kernel, ordinal, dynamic_smem, carveout)
            asked[-1] += _microseconds(start)

    start = time.perf_counter()
    loader = Loader(task["artifacts"], Timed())
    loader.kernel(task["keys"][0], device)
    figures["first_kernel"] = _microseconds(start)
    later = figures["later_kernels"] = []
    for key in task["keys"][1:]:
        start = time.perf_counter()
        loader.kernel(key, device)
        later.append(_microseconds(start))
    figures["first_load"], figures["later_loads"], figures["later_asked"] = loads[0], loads[1:], asked[1:]
    figures.update(_plan(loader, Problem("fc1", 1, 1, 256, 256, *task["dtypes"]), device))
    print(json.dumps(figures))
    return 0


def _plan(loader: Any, problem: Any, device: int) -> dict[str, Any]:
    """Making the first Plan, its first launch, and launches in batches that the device keeps up with."""
    from densemoe.runtime.plan import packed_weight_bytes

    driver = loader.driver
    entry = loader.kernel(loader.select(problem, device).variant.key, device).entry
    sizes = {role: spec.nbytes for role, spec in problem.tensors().items()}
    pointers = {role: driver.allocate(size) for role, size in {**sizes, "b": packed_weight_bytes(entry.layout, problem)}.items()}
    stream = driver.stream()
    driver.synchronize()
    start = time.perf_counter()
    plan = loader.plan(problem, pointers, device)
    made = _microseconds(start)
    start = time.perf_counter()
    plan.launch(stream)
    first = _microseconds(start)
    launches = []
    for _ in range(BATCHES):
        driver.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            plan.launch(stream)
        launches.append(_microseconds(start) / LAUNCHES)
    driver.synchronize()
    return {"plan": made, "first_launch": first, "launches": launches[BATCHES // 2 :]}  # the first half warms clocks and caches


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
