"""Why two cubins of one variant differ: which sections, and the likely cause. The causes are those that docs/reproduction.md lists, each tested."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from densemoe.compile.diff import differing_sections
from densemoe.compile.elf import Cubin, read_cubin, read_sections
from densemoe.runtime.errors import AuditError
from densemoe.runtime.lock import SHORT_DIGEST

__all__ = ["Side", "explain", "ptxas_flags"]

_NOTE: Final = ".note.nv.tkinfo"
_FLAGS: Final = re.compile(rb"(-O ?\d[^\0]*)\0")


@dataclass(frozen=True)
class Side:
    """What is known of one build of a variant.

    Attributes:
        sha256: of its cubin.
        image: the cubin, None where only a lock names it.
        ptx: first digits of its PTX's sha256, empty where it is not known.
        toolchain: version of each distribution that made it.
        kernels: first digits of each kernel module's source digest, empty where they are not known.
        options: the matrix's compiler options, None where they are not known.
    """

    sha256: str
    image: bytes | None = None
    ptx: str = ""
    toolchain: Mapping[str, str] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)
    options: str | None = None


def ptxas_flags(image: bytes) -> str:
    """The command line that ptxas notes in a cubin, empty where it notes none."""
    found = _FLAGS.search(read_sections(image).get(_NOTE, b"") + b"\0")
    return found[1].decode("ascii", "replace").strip() if found else ""


def explain(expected: Side, found: Side) -> tuple[list[str], str]:
    """Sections that differ, and the likely cause.

    Returns:
        Names of the sections, empty where one image is missing; and the cause, which starts with ``toolchain``, ``source``, ``symbol``, ``flags``
        or ``environment``.
    """
    sections: list[str] = []
    cubins: tuple[Cubin, Cubin] | None = None
    if expected.image is not None and found.image is not None:
        try:
            cubins = (read_cubin(expected.image), read_cubin(found.image))
            sections = differing_sections(expected.image, found.image)
        except AuditError as error:
            return [], f"file: {error}"
    return sections, _cause(expected, found, cubins)


def _cause(expected: Side, found: Side, cubins: tuple[Cubin, Cubin] | None) -> str:
    if expected.toolchain and found.toolchain and expected.toolchain != found.toolchain:
        changed = [name for name in sorted({*expected.toolchain, *found.toolchain}) if expected.toolchain.get(name) != found.toolchain.get(name)]
        pairs = [f"{name} {expected.toolchain.get(name, 'absent')} -> {found.toolchain.get(name, 'absent')}" for name in changed]
        return f"toolchain: {', '.join(pairs)}"
    if cubins and cubins[0].ptxas != cubins[1].ptxas:
        names = [each.ptxas or "a ptxas that does not name itself (CUDA 12)" for each in cubins]
        return f"toolchain: assembled by {names[0]} and by {names[1]}"
    if cubins and cubins[0].symbol != cubins[1].symbol:
        return f"symbol: {cubins[0].symbol} and {cubins[1].symbol}; a kernel's name is an input of ptxas, and 'cutlass' in it changes its heuristics"
    if expected.image is not None and found.image is not None:
        flags = ptxas_flags(expected.image), ptxas_flags(found.image)
        if flags[0] != flags[1]:
            return f"flags: ptxas was called with {flags[0]!r} and with {flags[1]!r}"
    if None not in (expected.options, found.options) and expected.options != found.options:
        return f"flags: compiler options {expected.options!r} and {found.options!r}"
    changed = [name for name, digest in expected.kernels.items() if found.kernels.get(name, digest)[:SHORT_DIGEST] != digest[:SHORT_DIGEST]]
    if changed:
        return f"source: {', '.join(f'compile/kernels/{name}.py' for name in changed)} or what it imports changed"
    if expected.ptx and found.ptx and expected.ptx != found.ptx:
        return "environment: equal sources, flags and toolchain gave other PTX: the DSL read something of this machine, such as a CUTE_DSL_ variable"
    if expected.ptx and found.ptx:
        return "environment: equal PTX, flags and version gave other machine code: another build of ptxas, or a fault of memory or disk"
    return "environment: sources, flags and toolchain are equal as far as they are known"


def short_digest(data: bytes) -> str:
    """First digits of a sha256, as a lock holds them."""
    return hashlib.sha256(data).hexdigest()[:SHORT_DIGEST]
