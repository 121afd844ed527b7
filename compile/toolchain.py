"""One Variant → cubin and PTX. The only module that talks to CuTe DSL.

Traps that it guards against (docs/facts.md): the DSL dumps files under names that ignore constexpr values, so every compile has a folder of its
own; another flavour of the compiler is loaded without a word where the host's driver is old; for an architecture that it cannot do, the DSL
returns a path instead of bytes and raises nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from densemoe.compile import kernels
from densemoe.compile.elf import Cubin, read_cubin
from densemoe.runtime.errors import CompileError, DensemoeError, ToolchainError
from densemoe.runtime.variant import Variant

__all__ = ["PINNED_FLAVOUR", "PINNED_PTXAS", "Compiled", "Distribution", "compile_variant", "distributions", "identity", "loaded_flavour"]

#: The compiler that makes our bytes: nvidia-cutlass-dsl 4.8.1 with the cu13 libraries. Another flavour gives other, working, cubins.
PINNED_FLAVOUR: Final = "cu13"
PINNED_PTXAS: Final = "Cuda compilation tools, release 13.4, V13.4.59"
#: ptxas says so when it serialises WGMMA: correct, and a multiple slower.
_FATAL_WARNINGS: Final = re.compile(r"\b(C7510|C7512|C7520)\b")


@dataclass(frozen=True)
class Compiled:
    """What came out of the compiler.

    Attributes:
        cubin: the ELF image.
        ptx: the text that ptxas was given.
        facts: what the image says of itself.
    """

    cubin: bytes
    ptx: str
    facts: Cubin


@dataclass(frozen=True)
class Distribution:
    """An installed distribution of the toolchain: name, version, sha256 of its RECORD (which lists the hash of every file)."""

    name: str
    version: str
    sha256: str


@cache
def distributions() -> tuple[Distribution, ...]:
    """Every installed ``nvidia-cutlass-dsl*`` distribution, by name.

    Raises:
        ToolchainError: there is none.
    """
    found = {}
    for each in importlib.metadata.distributions():
        name = each.metadata["Name"] or ""
        if name.lower().startswith("nvidia-cutlass-dsl"):
            record = each.read_text("RECORD") or ""
            # rows of compiled bytecode, of the installer, and of scripts (whose first line names the environment) differ between machines; the
            # rest is the wheel's content
            rows = sorted(row for row in record.splitlines() if ".pyc" not in row and "dist-info/" not in row and not row.startswith("../"))
            found[name.lower()] = Distribution(name.lower(), each.version, hashlib.sha256("\n".join(rows).encode()).hexdigest())
    if not found:
        raise ToolchainError("nvidia-cutlass-dsl is not installed: install densemoe[build] to compile kernels")
    return tuple(found[name] for name in sorted(found))


def identity() -> str:
    """A digest of the toolchain: any change of it recompiles everything."""
    text = repr((distributions(), PINNED_FLAVOUR, PINNED_PTXAS))
    return hashlib.sha256(text.encode()).hexdigest()


def loaded_flavour() -> str:
    """``cu12`` or ``cu13``: whose compiler library the process has mapped, ``""`` before the DSL is imported."""
    maps = Path("/proc/self/maps")
    loaded = re.findall(r"_cutlass_ir\.(cu[0-9]+)\.", maps.read_text()) if maps.exists() else []
    return loaded[0] if loaded else ""


def compile_variant(variant: Variant, kernel: str, *, options: str = "") -> Compiled:
    """Compiles one variant.

    Args:
        kernel: name of its kernel module.
        options: further options of ``cute.compile``; they are part of the cubin's bytes.

    Raises:
        CompileError: the compiler failed, or gave something that is not this variant's cubin.
        ToolchainError: another flavour of the compiler was loaded than the pinned one.
    """
    module = kernels.load(kernel)
    kernels.check(kernel, variant)
    import cutlass.cute as cute

    host, arguments = module.compile_arguments(variant)
    with tempfile.TemporaryDirectory(prefix="densemoe-") as folder, _captured_stderr() as log:
        try:
            compiled = cute.compile(
                host, *arguments, options=f"--gpu-arch={variant.arch} --keep-cubin --keep-ptx --dump-dir={folder} {options}".rstrip()
            )
            cubin, ptx = compiled.__cubin__, compiled.__ptx__
        except DensemoeError:
            raise
        except Exception as error:
            raise CompileError(f"{variant.key}: {type(error).__name__}: {error}\n{log()}".rstrip()) from error
    flavour = loaded_flavour()
    if flavour != PINNED_FLAVOUR:
        raise ToolchainError(
            f"the compiler loaded its {flavour or 'unknown'} libraries, {PINNED_FLAVOUR} are pinned: something imported cutlass before"
            " densemoe.compile did, which hides the host's CUDA driver while it imports it, and the libraries follow that driver; import"
            " densemoe.compile first, or build where no driver or a 13.x one is"
        )
    if isinstance(ptx, bytes):
        ptx = ptx.decode()
    warning = _FATAL_WARNINGS.search(log())
    if warning:
        raise CompileError(f"{variant.key}: ptxas serialised WGMMA (warning {warning[1]}):\n{log()}")
    return Compiled(cubin, ptx, _check(variant, cubin, ptx))


def _check(variant: Variant, cubin: object, ptx: str) -> Cubin:
    """Facts of ``cubin`` where it is this variant's, else CompileError or ToolchainError."""
    if not isinstance(cubin, bytes):
        raise CompileError(f"{variant.key}: the compiler gave {type(cubin).__name__} instead of a cubin: it cannot build for {variant.arch}")
    facts = read_cubin(cubin)
    number = int(re.sub(r"\D", "", variant.arch))
    if facts.sm != number:
        raise CompileError(f"{variant.key}: the compiler built for sm_{facts.sm}, not for {variant.arch}")
    if facts.symbol != variant.symbol:
        raise CompileError(f"{variant.key}: the kernel is called {facts.symbol}, not {variant.symbol}: its host function must set the name prefix")
    if f".entry {variant.symbol}(" not in ptx:
        raise CompileError(f"{variant.key}: the PTX that came back belongs to another kernel")
    if facts.ptxas != PINNED_PTXAS:
        raise ToolchainError(f"{variant.key}: assembled by {facts.ptxas!r}, {PINNED_PTXAS!r} is pinned: install densemoe[build] as locked")
    return facts


class _captured_stderr:
    """File descriptor 2 into a temporary file while inside: ptxas's warnings come from native code. Gives a function that reads it."""

    def __enter__(self) -> _captured_stderr:
        self._file = tempfile.TemporaryFile()
        sys.stderr.flush()
        self._saved = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        self._text: str | None = None
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr.flush()
        os.dup2(self._saved, 2)
        os.close(self._saved)
        self._text = self()
        self._file.close()

    def __call__(self) -> str:
        if self._text is not None:
            return self._text
        sys.stderr.flush()
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), size, 0).decode("utf-8", "replace")
