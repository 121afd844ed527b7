"""Device code: one module a kernel, named after its architecture and op; docs/adding_a_kernel.md lists the names that each must have."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from densemoe.runtime.errors import VariantError
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.variant import ALL_OPS, Variant

__all__ = ["Expected", "KernelModule", "load", "names"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Expected:
    """What the audit must find.

    Attributes:
        ptx_counts: how often an opcode, with all its modifiers, stands in the PTX.
        max_registers: registers a thread may use for the residency that the kernel is designed for.
        design: sizes that follow from the tile, for the record: bytes of memory in use and in flight, by name.
    """

    ptx_counts: Mapping[str, int] = field(default_factory=dict)
    max_registers: int = 255
    design: Mapping[str, int] = field(default_factory=dict)


class KernelModule(Protocol):
    """The names of a kernel module."""

    __name__: str
    OP: str
    ARCHITECTURES: tuple[str, ...]
    WEIGHT_LAYOUT: str

    def check(self, variant: Variant) -> None: ...
    def recipe(self, variant: Variant) -> Recipe: ...
    def compile_arguments(self, variant: Variant) -> tuple[Any, tuple[Any, ...]]: ...
    def oracle_arguments(self, variant: Variant, names: Mapping[str, int], addresses: Mapping[str, int]) -> list[int]: ...
    def expected(self, variant: Variant) -> Expected: ...


def names() -> tuple[str, ...]:
    """Names of the kernel modules: those of this folder that are called ``sm<number>_<op>…``."""
    return tuple(sorted(path.stem for op in ALL_OPS for path in _FOLDER.glob(f"sm*_{op}*.py")))


@contextmanager
def _no_driver() -> Iterator[None]:
    """Hides the host's CUDA driver from CuTe DSL's import, which would otherwise take the compiler that the driver's age suggests: then the build
    host's driver would decide the bytes of every cubin. Without one, the newest installed compiler is taken, the pinned one."""
    original = ctypes.CDLL

    class Hidden(original):  # type: ignore[valid-type,misc]
        def __init__(self, name: Any, *arguments: Any, **options: Any) -> None:
            if name == "libcuda.so.1":
                raise OSError(f"{name} is hidden while the compiler is imported")
            super().__init__(name, *arguments, **options)

    if "cutlass" in sys.modules:
        yield
        return
    ctypes.CDLL = Hidden  # type: ignore[misc]
    try:
        yield
    finally:
        ctypes.CDLL = original  # type: ignore[misc]


def _own_settings() -> None:
    """Drops the caller's settings of CuTe DSL, which it reads once, at import: some of them (CUTE_DSL_LINEINFO, CUTE_DSL_COMPILER_OPT) would change
    the bytes of every cubin without a word. The architecture stays ours: without one the DSL asks a driver, and then lacks its host runtime; each
    compile names its own with --gpu-arch."""
    if "cutlass" not in sys.modules:
        for name in [name for name in os.environ if name.startswith("CUTE_DSL_")]:
            del os.environ[name]
    os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")


def load(name: str) -> KernelModule:
    """The kernel module called ``name``. Imports CuTe DSL.

    Raises:
        VariantError: there is no such module.
    """
    if name not in names():
        raise VariantError(f"kernel {name!r}: use one of {', '.join(names())}, or add {name}.py to compile/kernels")
    _own_settings()
    with _no_driver():
        module: Any = importlib.import_module(f"{__name__}.{name}")
    found: KernelModule = module
    return found


def check(name: str, variant: Variant) -> None:
    """Raises VariantError where the kernel called ``name`` cannot be ``variant``."""
    kernel = load(name)
    if variant.op != kernel.OP or variant.arch not in kernel.ARCHITECTURES:
        raise VariantError(f"kernel {name} is {kernel.OP} for {', '.join(kernel.ARCHITECTURES)}, not {variant.op} for {variant.arch}")
    kernel.check(variant)
