"""What goes into a wheel: the requested variants built, compared with the lock, weighed against the size budget, and listed in an SBOM.

CMake runs ``main`` as its artifact target, through scripts/build_artifacts.py. The staged folder holds exactly the requested variants, whatever
else lies where they are built: nothing stale, no build log, no file that a manifest does not name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from densemoe.compile import build as building
from densemoe.compile import locking, matrix
from densemoe.runtime.canonical import read_file
from densemoe.runtime.errors import BuildError, DensemoeError, MatrixError
from densemoe.runtime.fields import parse_document
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.lock import Lock
from densemoe.runtime.manifest import INDEX_NAME, MANIFEST_NAME, Index, IndexEntry, Manifest
from densemoe.runtime.variant import Variant

__all__ = ["Cost", "check_budget", "costs", "main", "sbom", "stage", "table"]

BUDGET: Final = Path(__file__).resolve().parent.parent / "artifacts" / "size_budget.json"
_BUDGET_SCHEMA: Final = 1
_LARGEST_BUDGET: Final = 1 << 16
_DEFLATE_LEVEL: Final = 6  # what wheel builders use
#: Names of the SBOM, below ``.dist-info/sboms`` (PEP 770).
SBOM_NAME: Final = "densemoe.cdx.json"


def stage(root: Path, out: Path, keys: Iterable[str]) -> dict[str, Manifest]:
    """Copies the variants ``keys`` of an artifact root to ``out``, each compared with its manifest, with manifests and index of just those.

    Returns:
        The manifests by architecture.

    Raises:
        ArtifactError: a file is not what its manifest says.
        BuildError: the root lacks a variant.
    """
    shutil.rmtree(out, ignore_errors=True)
    found, wanted = ArtifactSet(root), set(keys)
    manifests: dict[str, Manifest] = {}
    sets: dict[str, IndexEntry] = {}
    for arch in found.architectures:
        whole = found.manifest(arch)
        chosen = {key: entry for key, entry in whole.variants.items() if key in wanted}
        if not chosen:
            continue
        manifests[arch] = dataclasses.replace(whole, variants=chosen)
        data = manifests[arch].to_bytes()
        (out / arch).mkdir(parents=True)
        for entry in chosen.values():
            (out / arch / entry.file).write_bytes(found.image(entry))
        (out / arch / MANIFEST_NAME).write_bytes(data)
        sets[arch] = IndexEntry.of(arch, data, len(chosen))
    missing = wanted - {key for each in manifests.values() for key in each.variants}
    if missing or not wanted:
        raise BuildError(f"{root} lacks {len(missing)} of the {len(wanted)} requested variants, {min(missing, default='none')} among them")
    (out / INDEX_NAME).write_bytes(Index(sets).to_bytes())
    return manifests


# ---- what costs what


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cubins of one value of an axis: how many, their bytes, and their bytes deflated, as in a wheel."""

    axis: str
    value: str
    count: int
    size: int
    deflated: int


def _values(variant: Variant) -> dict[str, str]:
    return {
        "arch": variant.arch,
        "op": variant.op,
        "tile": f"{variant.tile_m}x{variant.tile_n}",
        "cluster": f"{variant.cluster_m}x{variant.cluster_n}",
        "a_dtype": variant.a_dtype,
        "c_dtype": variant.c_dtype,
        "options": ".".join(name if value == 1 else f"{name}{value}" for name, value in variant.options) or "none",
    }


def costs(root: Path) -> list[Cost]:
    """What each value of each axis costs in an artifact root; the first is the total.

    Raises:
        ArtifactError: the root cannot be read.
    """
    found = ArtifactSet(root)
    sums: dict[tuple[str, str], list[int]] = {}
    for arch in found.architectures:
        for entry in found.manifest(arch).variants.values():
            image = found.image(entry)
            compressor = zlib.compressobj(_DEFLATE_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
            deflated = len(compressor.compress(image)) + len(compressor.flush())
            for pair in (("total", ""), *_values(entry.variant).items()):
                total = sums.setdefault(pair, [0, 0, 0])
                total[0], total[1], total[2] = total[0] + 1, total[1] + len(image), total[2] + deflated
    order = ["total", *_values(Variant.parse("fc1.sm90a.t8x64.c1x1.bf16-bf16"))]
    rows = [Cost(axis, value, *numbers) for (axis, value), numbers in sums.items()]
    return sorted(rows, key=lambda row: (order.index(row.axis), -row.deflated, row.value))


def table(rows: Sequence[Cost]) -> str:
    """``rows`` as text."""
    lines = [f"{'axis':8} {'value':24} {'cubins':>6} {'bytes':>10} {'deflated':>10}"]
    lines += [f"{row.axis:8} {row.value:24} {row.count:6} {row.size:10,} {row.deflated:10,}" for row in rows]
    return "\n".join(lines)


def check_budget(rows: Sequence[Cost], path: Path = BUDGET) -> list[str]:
    """What exceeds the budget; empty where nothing does.

    Raises:
        ManifestError: the budget cannot be read.
    """
    fields = parse_document(read_file(path, _LARGEST_BUDGET), str(path), _BUDGET_SCHEMA, _LARGEST_BUDGET)
    axes = fields.object("axes")
    over = []
    for row in rows:
        allowed = fields.size("total") if row.axis == "total" else axes.size(row.axis)
        if row.deflated > allowed:
            name = row.axis if row.axis == "total" else f"{row.axis} {row.value}"
            over.append(f"{name}: {row.deflated:,} bytes deflated in {row.count} cubins, {allowed:,} are allowed by {path.name}")
    return over


# ---- what is in it


def sbom(manifests: Mapping[str, Manifest], version: str) -> bytes:
    """A CycloneDX 1.6 document: every cubin with its sha256, and the DSL and ptxas that made it. Equal inputs give equal bytes."""
    components, tools = [], {}
    for arch, manifest in sorted(manifests.items()):
        made_by = ", ".join(f"{each['name']} {each['version']}" for each in manifest.toolchain["distributions"])
        for each in manifest.toolchain["distributions"]:
            tools[each["name"]] = _tool(each["name"], each["version"])
        tools[f"ptxas {manifest.toolchain['ptxas']}"] = {
            "type": "application",
            "name": "ptxas",
            "version": manifest.toolchain["ptxas"],
            "supplier": {"name": "NVIDIA Corporation"},
        }
        for key, entry in sorted(manifest.variants.items()):
            components.append(
                {
                    "type": "file",
                    "bom-ref": f"cubin:{key}",
                    "name": f"densemoe/artifacts/built/{arch}/{entry.file}",
                    "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
                    "licenses": [{"license": {"id": "Apache-2.0"}}],
                    "properties": [
                        {"name": "densemoe:compiler", "value": f"{made_by} ({manifest.toolchain['flavour']})"},
                        {"name": "densemoe:assembler", "value": manifest.toolchain["ptxas"]},
                        {"name": "densemoe:source", "value": f"densemoe/compile/kernels/{entry.kernel}.py"},
                        {"name": "densemoe:source_digest", "value": entry.source_digest},
                    ],
                }
            )
    subject = {"type": "library", "bom-ref": "densemoe", "name": "densemoe", "version": version, "purl": f"pkg:pypi/densemoe@{version}"}
    metadata: dict[str, Any] = {
        "component": {**subject, "licenses": [{"license": {"id": "Apache-2.0"}}]},
        "tools": {"components": [tools[name] for name in sorted(tools)]},
    }
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        metadata["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(epoch)))
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        "components": components,
        "dependencies": [{"ref": "densemoe", "dependsOn": [each["bom-ref"] for each in components]}],
    }
    # a serial number names the document: derived from its content, so that equal builds give equal files
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))}"
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _tool(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "application",
        "name": name,
        "version": version,
        "supplier": {"name": "NVIDIA Corporation"},
        "licenses": [{"license": {"name": "NVIDIA Software License Agreement"}}],
        "purl": f"pkg:pypi/{name}@{version}",
    }


# ---- the target


def _keys(plan: matrix.Matrix, profile: str, architectures: Sequence[str]) -> list[str]:
    """Keys of a profile on the requested architectures. Raises MatrixError where one of them has none: a wheel without it would be half a wheel."""
    planned = plan.profile(profile)
    known = sorted({each.variant.arch for each in planned})
    for arch in architectures:
        if arch not in known:
            raise MatrixError(f"architecture {arch!r} has no variant in profile {profile!r}: use {', '.join(known)}")
    return [each.variant.key for each in planned if not architectures or each.variant.arch in architectures]


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds, compares, weighs and stages; 0 when the staged folder is complete, 1 otherwise, with the reason on standard error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--profile", default="full")
    parser.add_argument("--architectures", default="", help="separated by commas, semicolons or spaces; all of the profile's where empty")
    parser.add_argument("--out", type=Path, required=True, help="artifact root to build in, incrementally")
    parser.add_argument("--stage", type=Path, required=True, help="folder to stage in: built/ and sboms/")
    parser.add_argument("--locked", action=argparse.BooleanOptionalAction, default=True, help="refuse bytes that are not the lock's")
    parser.add_argument("--budget", type=Path, default=BUDGET)
    args = parser.parse_args(arguments)
    try:
        return _run(args)
    except (DensemoeError, OSError) as error:
        print(f"build_artifacts: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    plan = matrix.load()
    architectures = [name for name in re.split(r"[,;\s]+", args.architectures) if name]
    keys = _keys(plan, args.profile, architectures)
    lock = Lock.read() if args.locked else None
    if lock is not None:
        locking.check_toolchain(lock)
    failures: list[building.Failure] = []
    for arch in architectures or [None]:
        failures += building.build(plan, args.out, profile=args.profile, arch=arch).failures
    faults = [f"{failure.key}: {failure.error}" for failure in failures]
    if lock is not None and not faults:
        faults += [str(each) for each in locking.compare(lock, plan, args.profile, args.out, frozenset(keys))]
    manifests = {} if faults else stage(args.out, args.stage / "built", keys)
    if not faults:
        rows = costs(args.stage / "built")
        print(table(rows), flush=True)
        faults += check_budget(rows, args.budget)
    if faults:
        shutil.rmtree(args.stage, ignore_errors=True)  # nothing half-made is installed by a later, careless install step
        for fault in faults:
            print(f"build_artifacts: {fault}", file=sys.stderr)
        return 1
    (args.stage / "sboms").mkdir(exist_ok=True)
    (args.stage / "sboms" / SBOM_NAME).write_bytes(sbom(manifests, building.version()))
    return 0
