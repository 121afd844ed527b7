"""The static audit: a compiled variant against what its kernel, its recipe and the matrix say of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from densemoe.compile.elf import warpgroup_products_and_waits
from densemoe.compile.kernels import KernelModule
from densemoe.compile.toolchain import Compiled
from densemoe.runtime.errors import AuditError
from densemoe.runtime.variant import Variant, architecture

__all__ = ["Allowance", "audit"]

_SYSTEM_SMEM = 1024  # bytes of shared memory that the system reserves for each CTA, counted in the cubin


@dataclass(frozen=True)
class Allowance:
    """Spilling that the matrix allows one variant: bytes of stack, and why."""

    stack_bytes: int = 0
    reason: str = ""


def audit(variant: Variant, kernel: KernelModule, compiled: Compiled, allowance: Allowance = Allowance()) -> dict[str, Any]:
    """Checks one compiled variant.

    Returns:
        What was found, for the manifest.

    Raises:
        AuditError: every fault that was found, one a line.
    """
    facts, recipe, expected = compiled.facts, kernel.recipe(variant), kernel.expected(variant)
    faults: list[str] = []
    if facts.stack > allowance.stack_bytes:
        faults.append(
            f"{facts.stack} bytes of stack a thread: registers spill; {allowance.stack_bytes} are allowed."
            " Lower the tile, or allow it in the matrix with a reason"
        )
    if not 0 < facts.registers <= expected.max_registers:
        faults.append(f"{facts.registers} registers a thread: at most {expected.max_registers} keep the residency that the kernel is made for")
    if facts.parameters != recipe.offsets():
        faults.append(f"parameters (offset, size) {list(facts.parameters)} in the cubin, {list(recipe.offsets())} in the recipe")
    smem = recipe.dynamic_smem + facts.static_smem
    if smem - _SYSTEM_SMEM > architecture(variant.arch).largest_smem:
        faults.append(f"{smem} bytes of shared memory: at most {architecture(variant.arch).largest_smem} exist")
    counts = count_opcodes(compiled.ptx)
    for opcode, count in expected.ptx_counts.items():
        if counts.get(opcode, 0) != count:
            faults.append(f"{counts.get(opcode, 0)} {opcode} in the PTX: the tile implies {count}")
    for opcode in counts:
        if opcode.startswith(("ld.local", "st.local")):
            faults.append(f"{counts[opcode]} {opcode} in the PTX: an array with a run-time index went to local memory")
    faults += serialised(counts, compiled.cubin)
    block = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", compiled.ptx)
    threads = tuple(int(part or 1) for part in block.groups()) if block else None
    if threads != recipe.block:
        faults.append(f"block {threads} in the PTX, {recipe.block} in the recipe")
    if faults:
        raise AuditError("\n".join(f"{variant.key}: {fault}" for fault in faults))
    found: dict[str, Any] = {
        "text_bytes": facts.text_bytes,
        "ptx_instructions": sum(counts.values()),
        "ptx_sha256": hashlib.sha256(compiled.ptx.encode()).hexdigest(),
        "expected": dict(sorted(expected.ptx_counts.items())),
    }
    if expected.design:
        found["design"] = dict(expected.design)
    if facts.stack:
        found["allowance"] = {"stack_bytes": allowance.stack_bytes, "reason": allowance.reason}
    return found


def serialised(counts: Mapping[str, int], cubin: bytes) -> list[str]:
    """Faults of a kernel whose WGMMA ptxas serialised: correct, and a multiple slower. ptxas warns of it (C7510 and others), but CuTe DSL drops
    its warnings; what shows in the machine code is a wait after every product.

    Args:
        counts: opcodes of the PTX.
    """
    asked = sum(count for opcode, count in counts.items() if opcode.startswith("wgmma.mma_async"))
    if not asked:
        return []
    waited = sum(count for opcode, count in counts.items() if opcode.startswith("wgmma.wait_group"))
    products, waits = warpgroup_products_and_waits(cubin)
    faults = []
    if products < asked:
        faults.append(f"{products} HGMMA in the machine code, {asked} wgmma.mma_async in the PTX: products are missing")
    if waits * asked > waited * products:
        faults.append(
            f"{waits} waits for {products} products in the machine code, {waited} for {asked} in the PTX: ptxas serialised WGMMA. Keep accumulators"
            " in place: nothing may touch them, and no branch may part lanes, between wgmma.fence and wgmma.wait_group"
        )
    return faults


_INSTRUCTION = re.compile(r"(?:@!?%?\w+\s+)?([a-z][\w.:]*)\b")


def count_opcodes(ptx: str) -> Mapping[str, int]:
    """How often each opcode, with its modifiers, stands in the kernel's body; several statements on one line are counted each."""
    counts: dict[str, int] = {}
    body = ptx[ptx.index("{", ptx.index(".entry")) :]
    for line in body.splitlines():
        for statement in line.split("//")[0].split(";"):
            match = _INSTRUCTION.match(statement.strip().lstrip("{").strip())
            if match and not statement.strip().startswith("."):
                counts[match[1]] = counts.get(match[1], 0) + 1
    return counts
