"""NVIDIA's public CuTe DSL examples on the emulator: their own sources, compiled as they are, launched by their own host code.

The sources are not part of this repository. `root` says where a caller has them: ``examples/python/CuTeDSL`` of a checkout of NVIDIA's CUTLASS.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from densemoe.compile.emulator import GlobalMemory, Launch, Report, run
from densemoe.compile.emulator.parser import parse
from densemoe.compile.oracle import HostCode, host_code
from densemoe.runtime.layout import tile_scales

VARIABLE = "DENSEMOE_CUTLASS_EXAMPLES"
ABSENT = (
    f"NVIDIA's examples are not here: set {VARIABLE} (or --cutlass-examples) to examples/python/CuTeDSL of a checkout of github.com/NVIDIA/cutlass"
)
BLACKWELL, HOPPER = "cute/blackwell/kernel", "cute/hopper/kernel"


def root(option: str | None) -> Path | None:
    """The folder of the examples, None where nobody named one."""
    given = option or os.environ.get(VARIABLE)
    if not given:
        return None
    path = Path(given).expanduser()
    if not (path / BLACKWELL).is_dir():
        raise FileNotFoundError(f"{path} has no {BLACKWELL}: give examples/python/CuTeDSL of a checkout of github.com/NVIDIA/cutlass")
    return path


def load(folder: Path, file: str) -> Any:
    """A module of the examples."""
    name = "nvidia_" + file.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        before = sys.path[:]
        sys.path.insert(0, str((folder / file).parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path[:] = before
    return sys.modules[name]


@dataclass
class Program:
    """A compiled example.

    Attributes:
        code: its host code.
        seconds: of compiling.
    """

    code: HostCode
    ptx: str
    seconds: float

    def launch(
        self, values: Sequence[Any], memory: GlobalMemory, schedule: str = "eager", *, sm_count: int = 4, races: bool = True
    ) -> Report:
        """Launches once: what the host code gives the driver, the emulator executes."""
        (kernel,) = parse(self.ptx).kernels.values()
        wanted = list(kernel.parameters.values())
        seen = self.code.run(values, [each.size for each in wanted], sm_count)
        block = bytearray(kernel.parameter_bytes)
        for each, data in zip(wanted, seen.parameters, strict=True):
            block[each.offset : each.offset + each.size] = data
        given = Launch(kernel.name, seen.grid, seen.block, seen.cluster, seen.dynamic_smem, bytes(block))  # type: ignore[arg-type]
        return run(self.ptx, given, memory, schedule, sm_count=sm_count, races=races, tensor_fences=False)


@contextmanager
def compiled(host: Any, arguments: Sequence[Any], arch: str) -> Iterator[Program]:
    """Compiles a host function with its kernel."""
    started = time.perf_counter()
    with host_code(host, arguments, arch) as code:
        ptx = code.compiled.__ptx__
        text = ptx.decode() if isinstance(ptx, bytes) else ptx
        yield Program(code, text, time.perf_counter() - started)


# ---- data: integers so small that every sum is exact in float32, and scales that are powers of two where the format has no others


@dataclass(frozen=True)
class Format:
    """An operand's element format: codes, and the values that they stand for."""

    name: str
    dtype: Any
    values: tuple[float, ...]
    bits: int = 8


FORMATS = {
    "f16": Format("Float16", np.float16, (-2, -1, 0, 1, 2, 0.5), 16),
    "bf16": Format("BFloat16", ml_dtypes.bfloat16, (-2, -1, 0, 1, 2, 0.5), 16),
    "e4m3": Format("Float8E4M3FN", ml_dtypes.float8_e4m3fn, (-2, -1, 0, 1, 2, 0.5, 3)),
    "e5m2": Format("Float8E5M2", ml_dtypes.float8_e5m2, (-2, -1, 0, 1, 2, 0.5, 3)),
    "e2m1": Format("Float4E2M1FN", ml_dtypes.float4_e2m1fn, (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6), 4),
    "f32": Format("Float32", np.float32, (), 32),
}


def operand(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(float64 values ``[L, rows, K]``, the bytes that hold them)."""
    form = FORMATS[name]
    values = rng.choice(np.array(form.values), shape)
    stored = values.astype(form.dtype)
    codes = stored.view(np.uint8)
    if form.bits == 4:
        codes = codes[..., 0::2] & 15 | codes[..., 1::2] << 4
    return values, np.ascontiguousarray(codes)


def scale_factors(rng: np.random.Generator, batch: int, rows: int, k: int, size: int, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """(float64 scale of each element ``[L, rows, K]``, scale bytes in the 128 x 4 tiles that the MMA reads)."""
    exponents = rng.integers(-1, 2, (batch, rows, -(-k // size)))
    plain = (exponents + 127).astype(np.uint8) if ue8m0 else ((exponents + 7) << 3).astype(np.uint8)
    factors = np.repeat(np.exp2(exponents), size, axis=2)[:, :, :k]
    columns = -(-plain.shape[2] // 4) * 4
    padded = np.zeros((batch, rows, columns), np.uint8)
    padded[:, :, : plain.shape[2]] = plain
    return factors, np.concatenate([tile_scales(each).reshape(-1) for each in padded])


def output(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A poisoned output."""
    array = np.empty(shape, FORMATS[name].dtype)
    array.view(np.uint8)[...] = 0xA5
    return array
