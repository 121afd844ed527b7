"""What one fresh process measures of its own cold start, for ``densemoe bench startup``; imports nothing that a server would not import."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["PARTS", "Parts", "main"]

BATCHES: Final = 40
LAUNCHES: Final = 200  # a batch: fewer than the device's queue holds, so that the host does not wait

#: Parts of loading a kernel, in their order: short name → what it is.
PARTS: Final = {
    "open": "the driver opened and asked for the device's capability",
    "read": "files read: index and manifest with the first kernel, the cubin",
    "hash": "sha256 of them, but for the index",
    "parse": "index, manifest and the kernel's entry parsed and checked",
    "load": "cuLibraryLoadData",
    "symbol": "cuLibraryGetKernel",
    "parameters": "cuKernelGetParamInfo, once a parameter and once more",
    "memory": "cuKernelSetAttribute: shared memory and carveout",
    "rest": "everything else: Python, and taking these times",
}


def _microseconds(start: float) -> float:
    return (time.perf_counter() - start) * 1e6


class Parts:
    """Microseconds by part of what is done between two calls of ``take``."""

    def __init__(self) -> None:
        self._taken: dict[str, float] = {}
        self._inner = 0.0  # of calls within the one that is timed

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Times every call of ``owner.name``, a function of a module or a method of a class, as ``part`` from now on, without the watched calls
        within it, which are parts of their own."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                whole = _microseconds(start)
                self._taken[part] = self._taken.get(part, 0.0) + whole - self._inner
                self._inner = outer + whole

        setattr(owner, name, timed)

    def take(self, whole: float) -> dict[str, float]:
        """The parts of ``whole`` microseconds, ``rest`` among them, by the names of PARTS; 0 for what was not done."""
        found = {part: self._taken.get(part, 0.0) for part in PARTS}
        found["rest"] = whole - sum(found.values())
        self._taken.clear()
        return found


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
    from densemoe.runtime import loader as loading
    from densemoe.runtime import manifest, proof
    from densemoe.runtime.driver import Driver
    from densemoe.runtime.problem import Problem

    parts = Parts()
    for part, owner, names in (
        ("open", Driver, ("__init__", "capability")),
        ("read", loading, ("read_file",)),
        ("hash", loading, ("sha256_hex",)),
        ("hash", proof.Proof, ("part",)),
        ("parse", manifest.Index, ("from_bytes",)),
        ("parse", manifest.Manifest, ("from_bytes",)),
        ("parse", manifest._Entries, ("__getitem__",)),
        ("load", Driver, ("load",)),
        ("symbol", Driver, ("kernel",)),
        ("parameters", Driver, ("parameters",)),
        ("memory", Driver, ("prepare",)),
    ):
        for name in names:
            parts.watch(part, owner, name)

    start = time.perf_counter()
    loader = loading.Loader(task["artifacts"])
    loader.kernel(task["keys"][0], device)
    figures["first_kernel"] = _microseconds(start)
    figures["first_parts"] = parts.take(figures["first_kernel"])
    later = figures["later_kernels"] = []
    later_parts = figures["later_parts"] = []
    for key in task["keys"][1:]:
        start = time.perf_counter()
        loader.kernel(key, device)
        later.append(_microseconds(start))
        later_parts.append(parts.take(later[-1]))
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
