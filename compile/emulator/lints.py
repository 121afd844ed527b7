"""Remarks on a kernel's text that are no errors: what an emulator cannot see in values.

Sources: PTX ISA 9.x, 9.7.3.3–5 (``add``, ``sub``, ``mul`` without a rounding modifier may be contracted into ``fma``), 9.7.16.8.3
(``tcgen05.wait::ld``: registers of ``tcgen05.ld`` hold their values only then), 9.7.16.5 (one ``.cta_group`` for all of a kernel).
"""

from __future__ import annotations

from densemoe.compile.emulator.operations import Operation, destinations, sources
from densemoe.compile.emulator.parser import Kernel

__all__ = ["lint"]

_CONTRACTABLE = {f"{name}.{kind}" for name in ("mul", "add", "sub") for kind in ("f32", "f32x2", "f64", "ftz.f32")}


def lint(kernel: Kernel, operations: list[Operation]) -> list[str]:
    """Remarks, each with its PTX line."""
    found: list[str] = []
    groups = {part for each in kernel.instructions if each.opcode.startswith("tcgen05.") for part in each.parts if part.startswith("cta_group")}
    if len(groups) > 1:
        found.append("cta_group::1 and cta_group::2 are mixed in one kernel")
    labels = set(kernel.labels.values())
    products: dict[str, int] = {}  # register: line of the bare product that it holds
    loads: dict[str, int] = {}  # register: line of the tcgen05.ld that has not been waited for
    for i, (each, known) in enumerate(zip(kernel.instructions, operations, strict=True)):
        if i in labels:
            products.clear()
            loads.clear()
        read, written = sources(each, known), destinations(each, known)
        if each.opcode in _CONTRACTABLE and not each.opcode.startswith("mul"):
            for name in read:
                if name in products:
                    found.append(
                        f"PTX line {each.line}: {each.opcode} of the bare product of line {products[name]} may be contracted by ptxas: "
                        "write .rn or fma"
                    )
        moves = each.opcode.startswith("mov.")
        for name in read:
            if name in loads and not moves:
                found.append(f"PTX line {each.line}: {name} is read before tcgen05.wait::ld of its load at line {loads[name]}")
                del loads[name]
        carried = next((loads[name] for name in read if name in loads), 0) if moves else 0
        for name in written:
            products.pop(name, None)
            loads.pop(name, None)
        if each.opcode in _CONTRACTABLE and each.opcode.startswith("mul"):
            products.update(dict.fromkeys(written, each.line))
        if each.opcode.startswith("tcgen05.ld."):
            loads.update(dict.fromkeys(written, each.line))
        elif carried:
            loads.update(dict.fromkeys(written, carried))
        elif each.opcode.startswith("tcgen05.wait::ld"):
            loads.clear()
    return found
