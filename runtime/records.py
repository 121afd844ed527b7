"""Verification records of a manifest in words, for ``densemoe list`` and ``show``. A record comes from outside: what it lacks is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["lines", "summary"]

_DIGEST: Final = 12  # digits of a sha256 that are shown
_DIGESTS: Final = ("emulator", "sources", "ptx", "list")


def summary(records: Iterable[Mapping[str, Any]]) -> str:
    """All records of a variant in one cell, as in ``emulated (33 cases, worst 0.98); oracle``; ``-`` for none."""
    return "; ".join(sorted(_short(record) for record in records)) or "-"


def _short(record: Mapping[str, Any]) -> str:
    kind = str(record.get("kind"))
    facts = []
    if "cases" in record:
        facts.append(f"{record['cases']} cases")
    if "worst" in record:
        facts.append(f"worst {record['worst']:g}" if isinstance(record["worst"], (int, float)) else f"worst {record['worst']}")
    return f"{kind} ({', '.join(facts)})" if facts else kind


def lines(record: Mapping[str, Any]) -> list[str]:
    """A record line by line: what ran, by which code, and what it counted."""
    plain = {name: value for name, value in record.items() if name not in (*_DIGESTS, "kind", "counters")}
    found = [f"{record.get('kind')}: " + ", ".join(f"{name} {_value(value)}" for name, value in plain.items())]
    digests = [f"{name} {str(record[name])[:_DIGEST]}" for name in _DIGESTS if name in record]
    if digests:
        found.append("of " + ", ".join(digests))
    counters = record.get("counters")
    return found + (_counted(counters) if isinstance(counters, Mapping) else [])


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _counted(counters: Mapping[str, Any]) -> list[str]:
    """Counters of one case. Global traffic beside the size of the problem's tensors says whether a kernel moves more than it must."""
    moved = counters.get("bytes", {})
    traffic = sum(count for path, count in moved.items() if "global" in path)
    needed = counters.get("needed_bytes", 0)
    times = f", {traffic / needed:.2f} times the problem's {needed}" if needed else ""
    products = ", ".join(f"{count} {name}" for name, count in counters.get("products", {}).items()) or "no matrix instructions"
    waits = sum(counters.get("waits", {}).values())
    return [
        f"counted on the emulator for {counters.get('case')}:",
        f"  {products}, {counters.get('instructions')} warp instructions, {waits} waits, {counters.get('bank_conflicts')} cycles of bank conflicts",
        f"  {traffic} bytes to and from global memory{times}",
        *(f"  {count:>12} bytes {path}" for path, count in moved.items()),
    ]
