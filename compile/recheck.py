"""A built cubin against its manifest entry, from the file alone: the part of the static audit that needs no compiler. Standard library only."""

from __future__ import annotations

import re
from typing import Any

from densemoe.compile.elf import read_cubin
from densemoe.runtime.errors import AuditError
from densemoe.runtime.fields import plain
from densemoe.runtime.manifest import ManifestVariant

__all__ = ["recheck"]


def recheck(entry: ManifestVariant, image: bytes, ptxas: str) -> list[str]:
    """What the cubin says otherwise than its entry, in words; empty where all agrees.

    Compared are architecture, symbol, registers, stack, shared memory, code size, parameters (with the recipe's too) and the assembler.

    Args:
        image: the cubin.
        ptxas: the assembler that the manifest states.
    """
    try:
        facts = read_cubin(image)
    except AuditError as error:
        return [f"{entry.file}: {error}"]
    pairs: list[tuple[str, Any, Any]] = [
        ("architecture", facts.sm, int(re.sub(r"\D", "", entry.arch))),
        ("symbol", facts.symbol, entry.symbol),
        ("registers", facts.registers, entry.registers),
        ("stack", facts.stack, entry.stack),
        ("static shared memory", facts.static_smem, entry.static_smem),
        ("parameters", facts.parameters, entry.parameters),
        ("parameter bytes", facts.parameter_bytes, entry.parameter_bytes),
        ("parameters of the recipe", entry.recipe.offsets(), entry.parameters),
        ("code bytes", facts.text_bytes, entry.audit.get("text_bytes")),
        ("assembler", facts.ptxas, ptxas),
    ]
    return [f"{entry.file}: {name} {plain(found)}, the manifest says {plain(stated)}" for name, found, stated in pairs if found != stated]
