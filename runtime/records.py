"""Verification records of a manifest in words, for ``densemoe list`` and ``show``. A record comes from outside: what it lacks is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from densemoe.runtime.fields import plain

__all__ = ["lines", "summary"]

LARGEST_COUNT: Final = 1 << 63
_DIGEST: Final = 12  # digits of a sha256 that are shown
_DIGESTS: Final = ("emulator", "sources", "ptx", "list")


def summary(records: Iterable[Mapping[str, Any]]) -> str:
    """All records of a variant in one cell, as in ``emulated (33 cases, worst 0.98); oracle``; ``-`` for none."""
    return "; ".join(sorted(_short(record) for record in records)) or "-"


def _short(record: Mapping[str, Any]) -> str:
    kind = plain(record.get("kind"))
    facts = []
    if "cases" in record:
        facts.append(f"{plain(record['cases'])} cases")
    if "worst" in record:
        worst = record["worst"]
        facts.append(f"worst {worst:g}" if isinstance(worst, float) else f"worst {plain(worst)}")
    return f"{kind} ({', '.join(facts)})" if facts else kind


def lines(record: Mapping[str, Any]) -> list[str]:
    """A record line by line: what ran, by which code, and what it counted."""
    stated = {name: value for name, value in record.items() if name not in (*_DIGESTS, "kind", "counters")}
    found = [f"{plain(record.get('kind'))}: " + ", ".join(f"{plain(name)} {_value(value)}" for name, value in stated.items())]
    digests = [f"{name} {plain(record[name])[:_DIGEST]}" for name in _DIGESTS if name in record]
    if digests:
        found.append("of " + ", ".join(digests))
    counters = record.get("counters")
    return found + (_counted(counters) if isinstance(counters, Mapping) else [])


def _value(value: Any) -> str:
    return " ".join(map(plain, value)) if isinstance(value, list) else plain(value)


def _counts(value: Any) -> dict[str, int]:
    """Counts by name; what is none is left out, as is what no run counts to."""
    counts = value.items() if isinstance(value, Mapping) else ()
    return {plain(name): count for name, count in counts if type(count) is int and abs(count) < LARGEST_COUNT}


def _counted(counters: Mapping[str, Any]) -> list[str]:
    """Counters of one case. Global traffic beside the size of the problem's tensors says whether a kernel moves more than it must."""
    moved, plain_counts = _counts(counters.get("bytes")), _counts(counters)
    traffic = sum(count for path, count in moved.items() if "global" in path)
    needed = plain_counts.get("needed_bytes", 0)
    times = f", {traffic / needed:.2f} times the problem's {needed}" if needed else ""
    products = ", ".join(f"{count} {name}" for name, count in _counts(counters.get("products")).items()) or "no matrix instructions"
    waits = sum(_counts(counters.get("waits")).values())
    instructions, conflicts = (plain_counts.get(name, 0) for name in ("instructions", "bank_conflicts"))
    return [
        f"counted on the emulator for {plain(counters.get('case'))}:",
        f"  {products}, {instructions} warp instructions, {waits} waits, {conflicts} cycles of bank conflicts",
        f"  {traffic} bytes to and from global memory{times}",
        *(f"  {count:>12} bytes {path}" for path, count in moved.items()),
    ]
