"""Times single launches on the emulator, on one core, with every check on: NVIDIA's block-scaled GEMM and a layer's two kernels.

    python tests/emulator/speed.py [--cutlass-examples FOLDER] [NAME ...]

Each launch is judged against float64 in the run that is timed. Times are of ``emulator.run`` alone: PTX is translated and data made before.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "blackwell"))

import emulated
import numpy as np
import nvidia_examples as nvidia
import test_nvidia_examples as examples
from nvidia_examples import GlobalMemory

Launcher = Callable[[], float]  # runs once; seconds


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        name: to choose it by.
        repeats: after one that is not counted.
        prepare: gives a context that gives the launcher, or None where NVIDIA's sources are absent.
    """

    name: str
    repeats: int
    prepare: Callable[[argparse.Namespace], Any]


@contextmanager
def _gemm(folder: Path, tile: tuple[int, int], cluster: tuple[int, int], shape: tuple[int, int, int], sm_count: int) -> Iterator[Launcher]:
    """NVIDIA's persistent NVFP4 GEMM, float32 out."""
    import nvidia_hosts as hosts

    configuration = examples.Configuration("", examples.SCALED, (*examples.FP4, "f32"), tile, cluster, scale=examples.NVFP4)
    kernel = examples.kernel_of(folder, configuration)
    host, arguments = hosts.block_scaled(kernel, *(nvidia.FORMATS["e2m1"].name,) * 2, examples.NVFP4[0], nvidia.FORMATS["f32"].name)
    m, n, k = shape
    rng, memory, exact = np.random.default_rng(1), GlobalMemory(), []
    buffers = []
    for name, rows in (("a", m), ("b", n)):
        values, codes = nvidia.operand(rng, "e2m1", (1, rows, k))
        factors, tiled = nvidia.scale_factors(rng, 1, rows, k, examples.NVFP4[1], False)
        exact.append(values[0] * factors[0])
        buffers.append(((name, codes), (f"sf{name}", tiled)))
    c = np.zeros((1, m, n), np.float32)
    addresses = [memory.add(name, data, writable=False) for part in zip(*buffers, strict=True) for name, data in part]
    given = [*map(ctypes.c_int64, (*addresses, memory.add("c", c))), *map(ctypes.c_int32, (m, n, k, 1))]
    with nvidia.compiled(host, arguments, configuration.arch) as program:

        def once() -> float:
            c[...] = np.nan
            seconds = program.launch(given, memory, sm_count=sm_count).seconds
            np.testing.assert_array_equal(c[0], (exact[0] @ exact[1].T).astype(np.float32))
            return seconds

        yield once


@contextmanager
def _layer(op: str, key: str, shape: tuple[int, int, int, int], sm_count: int) -> Iterator[Launcher]:
    """FC1 or FC2 of (M, E, H, I)."""

    def once() -> float:
        outcome = getattr(emulated, op)(key, *shape, sm_count=sm_count)
        outcome.check()
        return float(outcome.run.seconds)

    yield once


def _of_nvidia(*options: Any) -> Callable[[argparse.Namespace], Any]:
    def prepare(args: argparse.Namespace) -> Any:
        folder = nvidia.root(args.cutlass_examples)
        return None if folder is None else _gemm(folder, *options)

    return prepare


CASES = [
    Case("gemm 128x128, K 256", 9, _of_nvidia((128, 128), (1, 1), (128, 128, 256), 4)),
    Case("gemm 128x128, K 7168", 9, _of_nvidia((128, 128), (1, 1), (128, 128, 7168), 4)),
    Case("gemm 256x256 of 2 CTAs, K 7168", 9, _of_nvidia((256, 256), (2, 1), (256, 256, 7168), 4)),
    Case("gemm M 512, N 8192, K 7168", 1, _of_nvidia((256, 256), (2, 1), (512, 8192, 7168), 148)),
    Case("fc1 128x128, K 7168", 9, lambda _: _layer("fc1", "fc1.sm100f.t128x128.c1x1.nvfp4-bf16", (128, 1, 7168, 64), 4)),
    Case("fc1 256x256 of 2 CTAs, K 7168", 9, lambda _: _layer("fc1", "fc1.sm100f.t256x256.c2x1.nvfp4-bf16", (256, 1, 7168, 128), 4)),
    Case("fc2 M 256, E 32, H 2048, I 256", 3, lambda _: _layer("fc2", "fc2.sm100f.t128x128.c1x1.nvfp4-bf16", (256, 32, 2048, 256), 4)),
]


def main() -> int:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases whose name contains it (default: all)")
    parser.add_argument("--cutlass-examples", help="examples/python/CuTeDSL of a checkout of NVIDIA's CUTLASS")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}; one core; median (least)")
    for case in CASES:
        if args.names and not any(name in case.name for name in args.names):
            continue
        made = case.prepare(args)
        if made is None:
            print(f"{case.name:34}  not run: {nvidia.ABSENT}")
            continue
        with made as once:
            once()
            times = [once() for _ in range(case.repeats)]
        print(f"{case.name:34}  {statistics.median(times) * 1e3:8.1f} ms  ({min(times) * 1e3:.1f})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
