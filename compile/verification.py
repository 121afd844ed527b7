"""Verification records: what ran a built variant, and with what result, written into its manifest entry.

The launch oracle's record is kept by later builds that leave the variant as it is; one of other packing code (see ``sources``) is made again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from densemoe.compile import build, oracle
from densemoe.compile.matrix import Planned
from densemoe.runtime.canonical import read_file, write_atomically
from densemoe.runtime.errors import ArtifactError, BuildError, DensemoeError
from densemoe.runtime.folder import Busy, alone
from densemoe.runtime.manifest import INDEX_NAME, LARGEST_MANIFEST, MANIFEST_NAME, Index, IndexEntry, Manifest

__all__ = ["oracle_record", "record_oracle", "sources", "write_records"]

_ROOT: Final = Path(__file__).resolve().parent.parent
#: What a record depends on beside the variant's own sources: who packs, and who observes.
_PACKING: Final = ("runtime/plan.py", "runtime/recipe.py", "runtime/problem.py", "compile/oracle.py")


@cache
def sources() -> str:
    """sha256 over the code that packs launches and compares them."""
    digest = hashlib.sha256()
    for name in _PACKING:
        digest.update(name.encode() + b"\0" + (_ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


Mask = tuple[tuple[int, int], ...]


def oracle_record(planned: Planned) -> tuple[dict[str, Any], Mask]:
    """Runs the launch oracle on one variant; its record, and the (offset, bytes) of the parameter block that were compared.

    Raises:
        BuildError: a launch that the recipe packs is not the compiler's own; or it could not be compared.
    """
    comparisons = oracle.compare(planned.variant, planned.kernel, options=planned.compiler_options)
    faults = [f"{each.problem}: {difference}" for each in comparisons for difference in each.differences]
    if faults:
        raise BuildError("the recipe's launch is not the compiler's: " + "; ".join(faults))
    mask = comparisons[0].mask
    record = {
        "kind": "oracle",
        "launches": len(comparisons),
        "parameters": len(mask),
        "compared_bytes": sum(size for _, size in mask),
        "sources": sources(),
    }
    return record, mask


def _work(planned: Planned) -> tuple[dict[str, Any] | None, Mask, str]:
    try:
        return *oracle_record(planned), ""
    except (DensemoeError, OSError) as error:
        return None, (), f"{type(error).__name__}: {error}"


def _recorded(out: Path, arch: str) -> Mapping[str, tuple[Mapping[str, Any], ...]]:
    path = out / arch / MANIFEST_NAME
    manifest = Manifest.from_bytes(read_file(path, LARGEST_MANIFEST), str(path))
    return {key: entry.verification for key, entry in manifest.variants.items()}


def record_oracle(
    out: Path, chosen: Iterable[Planned], jobs: int | None = None, progress: Callable[[str, str], None] = lambda key, state: None
) -> tuple[dict[str, Mask], list[build.Failure]]:
    """Runs the oracle for the built variants that have no record of it yet, and writes the records into the manifests.

    A variant that fails keeps no record; the set itself is unchanged.

    Returns:
        Masks of compared bytes by the keys that were recorded now, and every failure.

    Raises:
        ArtifactError: a set is not there.
        BuildError: another build works in ``out``.
    """
    records: dict[str, dict[str, dict[str, Any]]] = {}
    failures: list[build.Failure] = []
    planned = [each for each in chosen if not _has_record(_recorded(out, each.variant.arch)[each.variant.key])]
    masks: dict[str, Mask] = {}
    if not planned:
        return masks, []
    workers = min(jobs or len(os.sched_getaffinity(0)), len(planned))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for each, (record, mask, error) in zip(planned, pool.map(_work, planned), strict=True):
            if record is None:
                failures.append(build.Failure(each.variant.key, error))
            else:
                records.setdefault(each.variant.arch, {})[each.variant.key] = record
                masks[each.variant.key] = mask
            progress(each.variant.key, "failed" if record is None else "verified")
    write_records(out, records)
    return dict(sorted(masks.items())), failures


def write_records(out: Path, records: Mapping[str, Mapping[str, Mapping[str, Any]]], images: Mapping[str, str] | None = None) -> None:
    """Writes records into the manifests of an artifact root, each in the place of an earlier one of its kind.

    Args:
        records: record by architecture and key.
        images: sha256 of the cubin that a record is of; where the set holds another by now, its record is not written.

    Raises:
        ArtifactError: a set is not there.
        BuildError: another build works in ``out``, or it cannot be written.
    """
    try:
        with alone(out):
            for arch, found in records.items():
                _write(out, arch, found, images or {})
    except Busy:
        raise BuildError(f"another build works in {out}: wait for it, or give another --out") from None
    except ArtifactError:
        raise
    except OSError as error:
        raise BuildError(f"{out} cannot be written: {error.strerror or error}; no record was written") from error


def _has_record(verification: Iterable[Mapping[str, Any]]) -> bool:
    return any(record.get("kind") == "oracle" and record.get("sources") == sources() for record in verification)


def _write(out: Path, arch: str, records: Mapping[str, Mapping[str, Any]], images: Mapping[str, str]) -> None:
    path = out / arch / MANIFEST_NAME
    manifest = Manifest.from_bytes(read_file(path, LARGEST_MANIFEST), str(path))
    entries = {}
    for key, entry in manifest.variants.items():
        if key in records and images.get(key, entry.sha256) == entry.sha256:
            others = tuple(record for record in entry.verification if record.get("kind") != records[key]["kind"])
            values = {each.name: getattr(entry, each.name) for each in dataclasses.fields(entry)}
            entry = type(entry)(**{**values, "verification": (*others, records[key])})
        entries[key] = entry
    document = dataclasses.replace(manifest, variants=entries).to_bytes()
    index_path = out / INDEX_NAME
    index = Index.from_bytes(read_file(index_path, LARGEST_MANIFEST), str(index_path))
    if arch not in index.sets:
        raise ArtifactError(f"{index_path} has no set for {arch}: build again")
    stated = IndexEntry.of(arch, document, len(entries))
    write_atomically(path, document)
    write_atomically(index_path, Index({**index.sets, arch: stated}).to_bytes())
