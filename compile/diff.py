"""``densemoe diff A B``: what two artifact roots or wheels have in common and what not. Needs no compiler.

Exit codes: 0 they are equal, 1 they differ, 2 one of them cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from densemoe.compile.elf import read_sections
from densemoe.runtime.canonical import read_file
from densemoe.runtime.errors import ArtifactError, AuditError, ManifestError
from densemoe.runtime.fields import plain
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.manifest import LARGEST_CUBIN, ManifestVariant
from densemoe.runtime.wheels import extract

__all__ = ["Comparison", "compare", "differing_sections", "main"]

EQUAL: Final = 0
DIFFERENT: Final = 1
UNREADABLE: Final = 2

#: What is compared of a variant, with the name that is printed.
FIELDS: Final[Mapping[str, str]] = {
    "sha256": "sha256",
    "size": "bytes",
    "registers": "registers",
    "stack": "bytes of stack (spills)",
    "static_smem": "bytes of static smem",
    "dynamic_smem": "bytes of dynamic smem",
    "symbol": "symbol",
    "kernel": "kernel module",
    "layout": "weight layout",
    "parameter_bytes": "bytes of parameters",
    "recipe": "launch recipe",
    "verification": "verification records",
    "source_digest": "source digest",
}

Pair = tuple[Any, Any]


@dataclass
class Comparison:
    """What two roots differ in; (first, second) pairs.

    Attributes:
        added, removed: keys that only the second, or only the first, has.
        changed: field name → pair, by key; ``sections`` lists differing sections of the cubin.
        sets: of the architectures that both have: toolchain, minimum driver, builder.
        selection: rules that only the second (``added``) or the first (``removed``) has, by architecture.
        equal: number of variants that are the same.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, dict[str, Any]] = field(default_factory=dict)
    sets: dict[str, dict[str, Pair]] = field(default_factory=dict)
    selection: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    equal: int = 0

    @property
    def different(self) -> bool:
        """Whether anything differs."""
        return bool(self.added or self.removed or self.changed or self.sets or self.selection)


def _root(path: Path, folder: Path) -> Path:
    return extract(path, folder) if path.suffix == ".whl" else path


def _entries(artifacts: ArtifactSet) -> dict[str, ManifestVariant]:
    for arch in artifacts.architectures:
        artifacts.manifest(arch).check()
    return {entry.key: entry for arch in artifacts.architectures for entry in artifacts.manifest(arch).variants.values()}


def _plain(value: Any) -> Any:
    return value.to_json() if hasattr(value, "to_json") else list(value) if isinstance(value, tuple) else value


def differing_sections(first: bytes, second: bytes) -> list[str]:
    """Names of the cubin sections whose bytes differ or that only one cubin has; the kernel's own symbol in a name reads ``<kernel>``.

    Raises:
        AuditError: one of them is no cubin.
    """
    one, two = _by_role(read_sections(first)), _by_role(read_sections(second))
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


def _by_role(sections: Mapping[str, bytes]) -> dict[str, bytes]:
    symbol = next((name[len(".text.") :] for name in sections if name.startswith(".text.")), "")
    return {name.replace(f".{symbol}", ".<kernel>") if symbol else name: data for name, data in sections.items()}


def _changes(one: ArtifactSet, a: ManifestVariant, two: ArtifactSet, b: ManifestVariant) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in FIELDS:
        pair = (_plain(getattr(a, name)), _plain(getattr(b, name)))
        if pair[0] != pair[1]:
            found[name] = pair
    if "sha256" in found:
        try:
            found["sections"] = differing_sections(one.image(a), two.image(b))
        except AuditError as error:
            found["sections"] = [str(error)]
    return found


def compare(first: Path, second: Path) -> Comparison:
    """Compares two artifact roots or wheels.

    Raises:
        ArtifactError: one cannot be read, or holds a file that is not what its manifest says.
    """
    with tempfile.TemporaryDirectory(prefix="densemoe-diff-") as folder:
        roots = [_root(path, Path(folder) / name) for path, name in ((first, "first"), (second, "second"))]
        one, two = (ArtifactSet(root) for root in roots)
        a, b = _entries(one), _entries(two)
        result = Comparison(added=sorted(set(b) - set(a)), removed=sorted(set(a) - set(b)))
        for key in sorted(set(a) & set(b)):
            if found := _changes(one, a[key], two, b[key]):
                result.changed[key] = found
            else:
                result.equal += 1
        for arch in sorted(set(one.architectures) & set(two.architectures)):
            if found := _set_changes(one, two, arch):
                result.sets[arch] = found
        tables = [_tables(root.parent / "selection") for root in roots]
        if all(tables):  # a bare root has none beside it
            _compare_tables(tables[0], tables[1], result)
    return result


def _set_changes(one: ArtifactSet, two: ArtifactSet, arch: str) -> dict[str, Pair]:
    a, b = one.manifest(arch), two.manifest(arch)
    stated = []
    for manifest in (a, b):
        toolchain = {f"{each['name']} version": each["version"] for each in manifest.toolchain["distributions"]}
        toolchain |= {f"{each['name']} content": each["sha256"] for each in manifest.toolchain["distributions"]}
        toolchain |= {"flavour": manifest.toolchain["flavour"], "ptxas": manifest.toolchain["ptxas"]}
        stated.append({**toolchain, "minimum driver": manifest.minimum_driver, "builder": dict(manifest.builder)})
    names = sorted({*stated[0], *stated[1]})
    return {name: (stated[0].get(name), stated[1].get(name)) for name in names if stated[0].get(name) != stated[1].get(name)}


def _tables(folder: Path) -> dict[str, list[str]]:
    """Rules, rows of measured shapes and coefficients of every selection table in ``folder``, one text each.

    Raises:
        ManifestError: one is no table.
    """
    found = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            table = json.loads(read_file(path, LARGEST_CUBIN))
            keys = table.get("keys", [])
            rows = [{shape: [[row[0], keys[row[1]], *row[2:]] for row in own]} for shape, own in table.get("shapes", {}).items()]
            parts = [*table.get("rules", []), *rows, *table.get("model", {}).get("classes", [])]
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ManifestError(f"{path} is no selection table: {type(error).__name__}: {error}") from None
        found[path.stem] = [json.dumps(part, sort_keys=True) for part in parts]
    return found


def _compare_tables(one: Mapping[str, list[str]], two: Mapping[str, list[str]], result: Comparison) -> None:
    for arch in sorted({*one, *two}):
        a, b = one.get(arch, []), two.get(arch, [])
        if a != b:
            result.selection[arch] = {"added": [rule for rule in b if rule not in a], "removed": [rule for rule in a if rule not in b]}


def main(args: argparse.Namespace) -> int:
    """``densemoe diff``; exit codes as the module's docstring says."""
    try:
        found = compare(Path(args.first), Path(args.second))
    except (ArtifactError, OSError, ValueError) as error:
        print(f"densemoe diff: {plain(error)}", file=sys.stderr)
        return UNREADABLE
    if args.json:
        print(json.dumps({**vars(found), "different": found.different}, indent=2, sort_keys=True))
    else:
        _print(found)
    return DIFFERENT if found.different else EQUAL


def _print(found: Comparison) -> None:
    def say(line: str) -> None:
        print(plain(line))

    for arch, pairs in found.sets.items():
        for name, (a, b) in pairs.items():
            say(f"{arch}: {name}: {_short(a)} -> {_short(b)}")
    for key in found.removed:
        say(f"- {key}")
    for key in found.added:
        say(f"+ {key}")
    for key, changes in found.changed.items():
        say(f"~ {key}")
        for name, value in changes.items():
            if name == "sections":
                say(f"    sections that differ: {', '.join(value)}")
            elif name in ("recipe", "verification"):
                say(f"    {FIELDS[name]} changed")
            else:
                say(f"    {FIELDS[name]}: {_short(value[0])} -> {_short(value[1])}")
    for arch, rules in found.selection.items():
        for sign, name in (("-", "removed"), ("+", "added")):
            for rule in rules[name]:
                say(f"{sign} selection {arch}: {rule}")
        if not rules["added"] and not rules["removed"]:
            say(f"~ selection {arch}: the order of its rules")
    counts = f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed, {found.equal} equal"
    print(f"{counts}; selection of {len(found.selection)} architectures changed")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:16]}…" if len(text) == 64 and " " not in text else text
