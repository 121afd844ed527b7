"""Builds artifact sets: an executor's workers, incremental by content, every file written whole, the manifest last.

A cubin is first staged under the digest of everything that decides its bytes; when all variants of an architecture are there, the staged files
are renamed into place, then the manifest, then the index. A build that is killed leaves the old set (or files that its manifest's hashes refuse),
and the next build takes up what was staged. A variant that fails or times out is named with its error, the rest still builds, and the old
manifest stays.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Final

from densemoe.compile import kernels, toolchain
from densemoe.compile.audit import Allowance, audit
from densemoe.compile.executor import Executor, open_executor
from densemoe.compile.matrix import Matrix, Planned
from densemoe.runtime.canonical import read_file, write_atomically
from densemoe.runtime.errors import ArtifactError, BuildError, MatrixError
from densemoe.runtime.folder import Busy, alone, plain_folder
from densemoe.runtime.lock import Lock
from densemoe.runtime.manifest import (
    INDEX_NAME,
    LARGEST_CUBIN,
    LARGEST_INDEX,
    LARGEST_MANIFEST,
    MANIFEST_NAME,
    Index,
    IndexEntry,
    Manifest,
    ManifestVariant,
)
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.variant import Variant

__all__ = ["BuildResult", "Failure", "build", "kernel_digest", "source_digest", "version"]

_SOURCES: Final = Path(__file__).resolve().parent
STAGING: Final = ".staging"
LOG_NAME: Final = "build_log.json"
#: CUDA 12.8 is the first whose driver loads sm_100 family cubins; sm_90a cubins of ptxas 13.4 are ELF ABI 8, which the 13.x drivers read.
MINIMUM_DRIVER: Final = 13000
#: Raised when an entry says more of equal bytes than before, so that an incremental build gives the manifest that a fresh one gives.
ENTRY_FORMAT: Final = 2
DEFAULT_TIMEOUT: Final = 120.0  # seconds a variant; one kernel of 30 lines once took two minutes (docs/facts.md)


@dataclass(frozen=True)
class Failure:
    """A variant that did not build, and why."""

    key: str
    error: str


@dataclass
class BuildResult:
    """What a build did. ``built`` and ``reused`` are keys; ``removed`` are orphaned files; ``seconds`` is compile time by key."""

    built: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


Progress = Callable[[str, str], None]  # (key, "built" | "reused" | "failed")


@cache
def _imports_of(name: str) -> tuple[Path, ...]:
    """Files under compile/kernels that the kernel module ``name`` is made of, itself first."""
    pending, found = [name], []
    while pending:
        path = _SOURCES / "kernels" / f"{pending.pop()}.py"
        if path in found or not path.exists():
            continue
        found.append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("densemoe.compile.kernels"):
                tail = node.module.removeprefix("densemoe.compile.kernels").lstrip(".")
                pending += [tail] if tail else [alias.name for alias in node.names]
    return tuple(found)


@cache
def kernel_digest(name: str) -> str:
    """sha256 over the sources of the kernel module ``name``: its file and those of compile/kernels that it imports."""
    digest = hashlib.sha256()
    for path in sorted(_imports_of(name)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def source_digest(planned: Planned) -> str:
    """sha256 over what decides a variant's bytes and its manifest entry: key, kernel sources, options, toolchain."""
    parts: tuple[object, ...] = (
        ENTRY_FORMAT,
        planned.variant.key,
        planned.kernel,
        kernel_digest(planned.kernel),
        planned.compiler_options,
        toolchain.identity(),
    )
    if planned.allowance != Allowance():  # an allowance that is lowered or taken back has its variant audited again
        parts += (planned.allowance.stack_bytes, planned.allowance.reason)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def ptx_head(digest: str) -> str:
    """The first line of a PTX file: of which ``source_digest`` it is."""
    return f"// densemoe: sources and toolchain {digest}"


# ---- worker


def _compile_one(task: tuple[Planned, str]) -> tuple[bytes, dict[str, Any]]:
    """One variant's cubin, and what its manifest entry needs, with its PTX besides.

    Args:
        task: (the variant, its source digest as the build sees it).

    Raises:
        BuildError: this machine's sources or toolchain are not those of the build.
    """
    started = time.monotonic()
    planned, digest = task
    if source_digest(planned) != digest:
        raise BuildError("this worker has other kernel sources or another toolchain than the build: give every worker the same")
    compiled = toolchain.compile_variant(planned.variant, planned.kernel, options=planned.compiler_options)
    module = kernels.load(planned.kernel)
    numbers = audit(planned.variant, module, compiled, planned.allowance)
    return compiled.cubin, {
        "sha256": hashlib.sha256(compiled.cubin).hexdigest(),
        "size": len(compiled.cubin),
        "layout": module.WEIGHT_LAYOUT,
        "recipe": module.recipe(planned.variant).to_json(),
        "static_smem": compiled.facts.static_smem,
        "registers": compiled.facts.registers,
        "stack": compiled.facts.stack,
        "parameters": [list(pair) for pair in compiled.facts.parameters],
        "parameter_bytes": compiled.facts.parameter_bytes,
        "audit": numbers,
        "source_digest": digest,
        "flavour": toolchain.loaded_flavour(),
        "ptxas": compiled.facts.ptxas,
        "seconds": round(time.monotonic() - started, 3),
        "ptx": compiled.ptx,
    }


# ---- the build


def build(
    matrix: Matrix,
    out: Path,
    *,
    profile: str = "full",
    arch: str | None = None,
    key_filter: str | None = None,
    jobs: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    progress: Progress = lambda key, state: None,
    started: Callable[[int], None] = lambda total: None,
    where: str = "local",
    ptx: Path | None = None,
) -> BuildResult:
    """Builds a profile's variants into ``out``.

    Args:
        arch: only this architecture; the sets of others stay. Without it and a filter, sets of architectures that the matrix has in no profile go.
        key_filter: shell pattern over keys; the set then holds what matches and what it held before.
        jobs: processes of the local executor, by default the cores that this process may use.
        timeout: seconds a variant; on a cluster there is no limit.
        progress: called with each key and what became of it.
        started: called once with the number of variants.
        where: the executor, ``local`` or a cluster's address (``executor.open_executor``).
        ptx: a folder for the PTX of what is compiled now, ``KEY.ptx`` each, behind a line that says of which sources (``ptx_head``).

    Returns:
        What was built, reused and removed, and every failure.

    Raises:
        MatrixError: the profile, architecture or filter names nothing.
        BuildError: another build works in ``out``, it cannot be written, or the cluster is lost.
        ToolchainError: there is no such executor.
    """
    executor = open_executor(where, jobs, timeout)
    chosen = [each for each in matrix.profile(profile) if arch in (None, each.variant.arch)]
    if not chosen:
        known = sorted({each.variant.arch for each in matrix.profile(profile)})
        raise MatrixError(f"architecture {arch!r} gives no variant of profile {profile!r}: use one of {', '.join(known)}")
    kept = chosen
    if key_filter is not None:
        chosen = [each for each in chosen if fnmatchcase(each.variant.key, key_filter)]
        if not chosen:
            raise MatrixError(f"filter {key_filter!r} matches none of the {len(kept)} variants: `densemoe list --profile {profile}` shows the keys")
    started(len(chosen))
    result = BuildResult()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if ptx is not None:
            ptx.mkdir(parents=True, exist_ok=True)
        with alone(out):
            for name in sorted({each.variant.arch for each in chosen}):
                mine = [each for each in chosen if each.variant.arch == name]
                partial = key_filter is not None
                _build_set(out, name, mine, partial, executor, progress, result, ptx)
            if arch is None and key_filter is None and not result.failures:
                _remove_sets(out, {each.variant.arch for planned in matrix.profiles.values() for each in planned}, result)
    except Busy:
        raise BuildError(f"another build works in {out}: wait for it, or give another --out") from None
    except OSError as error:
        raise BuildError(f"{out} cannot be written: {error.strerror or error}; the old set is unchanged, free space and build again") from error
    return result


def _remove_sets(out: Path, known: set[str], result: BuildResult) -> None:
    """Removes the sets of architectures that the matrix has in no profile: first from the index, then their files."""
    path = out / INDEX_NAME
    index = Index.from_bytes(read_file(path, LARGEST_INDEX), str(path))
    gone = sorted(set(index.sets) - known)
    if not gone:
        return
    write_atomically(path, Index({name: entry for name, entry in index.sets.items() if name in known}).to_bytes())
    for name in gone:
        folder = out / name
        if folder.is_symlink():
            raise BuildError(f"{folder} is a symbolic link: a build removes and replaces files there; remove the link")
        for file in sorted((*folder.glob("*.cubin"), folder / MANIFEST_NAME, folder / LOG_NAME)):
            file.unlink(missing_ok=True)
            result.removed.append(f"{name}/{file.name}")
        with suppress(OSError):  # somebody's own file lies there
            folder.rmdir()


def _existing(folder: Path) -> dict[str, ManifestVariant]:
    """Entries of the set that stands in ``folder`` whose cubins are whole; none where there is no readable set."""
    try:
        manifest = Manifest.from_bytes(read_file(folder / MANIFEST_NAME, LARGEST_MANIFEST), str(folder / MANIFEST_NAME))
    except ArtifactError:
        return {}
    whole = {}
    for key, entry in manifest.variants.items():
        with suppress(ArtifactError):
            if hashlib.sha256(read_file(folder / entry.file, LARGEST_CUBIN)).hexdigest() == entry.sha256:
                whole[key] = entry
    return whole


def _build_set(
    out: Path, arch: str, chosen: list[Planned], partial: bool, executor: Executor, progress: Progress, result: BuildResult, ptx: Path | None
) -> None:
    folder = out / arch
    staging = folder / STAGING
    for place in (folder, staging):
        if not plain_folder(place):
            raise BuildError(f"{place} is a symbolic link: a build removes and replaces files there; name the folder itself with --out")
    before = _existing(folder)
    entries: dict[str, ManifestVariant] = dict(before) if partial else {}
    tasks = []
    for planned in chosen:
        key, digest = planned.variant.key, source_digest(planned)
        old = before.get(key)
        if old is not None and old.source_digest == digest:
            entries[key] = old
            result.reused.append(key)
            progress(key, "reused")
        else:
            tasks.append((planned, digest))
    failures: list[Failure] = []
    staged: list[tuple[Planned, str, Mapping[str, Any]]] = []

    def take(planned: Planned, digest: str) -> bool:
        facts = _staged(staging, digest)
        if facts is None:
            return False
        staged.append((planned, digest, facts))
        result.built.append(planned.variant.key)
        result.seconds[planned.variant.key] = facts["seconds"]
        progress(planned.variant.key, "built")
        return True

    def done(number: int, made: Any, error: str | None) -> None:
        planned, digest = remaining[number]
        if error is None:
            cubin, facts = made
            text = facts.pop("ptx", None)
            if ptx is not None and text is not None:
                write_atomically(ptx / f"{planned.variant.key}.ptx", f"{ptx_head(digest)}\n{text}".encode())
            write_atomically(staging / f"{digest}.cubin", cubin)
            write_atomically(staging / f"{digest}.json", json.dumps(facts, sort_keys=True).encode())
            if not take(planned, digest):
                error = "what was staged cannot be read back"
        if error is not None:
            failures.append(Failure(planned.variant.key, error))
            progress(planned.variant.key, "failed")

    remaining = [(planned, digest) for planned, digest in tasks if not take(planned, digest)]
    executor.run(_compile_one, remaining, done)
    result.failures += failures
    if failures:
        return  # the old manifest stays; what was staged waits for the next build
    for planned, digest, facts in staged:
        entry = _entry(planned.variant, planned.kernel, facts)
        entries[entry.key] = entry
        os.replace(staging / f"{digest}.cubin", folder / entry.file)
    document = _manifest(arch, entries).to_bytes()
    current = folder / MANIFEST_NAME
    if not current.exists() or current.read_bytes() != document:
        write_atomically(current, document)
        log = {**_logged(folder), **result.seconds}  # what was reused keeps what it took
        seconds = {key: log[key] for key in sorted(entries) if key in log}
        write_atomically(folder / LOG_NAME, (json.dumps({"compile_seconds": seconds}, indent=2) + "\n").encode())
    _update_index(out, arch, document, len(entries))
    shutil.rmtree(staging)
    for path in sorted(folder.glob("*.cubin")):
        if path.stem not in entries:
            path.unlink()
            result.removed.append(f"{arch}/{path.name}")
    for place in (out, folder):  # what a killed build had begun to write
        for path in place.glob(".*.partial"):
            path.unlink()


def _logged(folder: Path) -> dict[str, float]:
    """Compile seconds by key of the log that stands in ``folder``; none where it cannot be read."""
    try:
        return dict(json.loads((folder / LOG_NAME).read_text())["compile_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _staged(staging: Path, digest: str) -> Mapping[str, Any] | None:
    """Facts of a staged variant, None where it is not whole."""
    try:
        facts: dict[str, Any] = json.loads((staging / f"{digest}.json").read_text())
        if hashlib.sha256((staging / f"{digest}.cubin").read_bytes()).hexdigest() == facts["sha256"]:
            return facts
    except (OSError, ValueError, KeyError):
        pass
    return None


def _entry(variant: Variant, kernel: str, facts: Mapping[str, Any]) -> ManifestVariant:
    recipe = Recipe.from_json(facts["recipe"])
    return ManifestVariant(
        variant=variant,
        kernel=kernel,
        sha256=facts["sha256"],
        size=facts["size"],
        layout=facts["layout"],
        recipe=recipe,
        static_smem=facts["static_smem"],
        dynamic_smem=recipe.dynamic_smem,
        smem_carveout=recipe.smem_carveout,
        registers=facts["registers"],
        stack=facts["stack"],
        parameters=tuple((offset, size) for offset, size in facts["parameters"]),
        parameter_bytes=facts["parameter_bytes"],
        source_digest=facts["source_digest"],
        audit=facts["audit"],
    )


def _manifest(arch: str, entries: Mapping[str, ManifestVariant]) -> Manifest:
    installed = [{"name": d.name, "version": d.version, "sha256": d.sha256} for d in toolchain.distributions()]
    return Manifest(
        arch=arch,
        builder=_builder(entries),
        toolchain={"distributions": installed, "flavour": toolchain.PINNED_FLAVOUR, "ptxas": toolchain.PINNED_PTXAS},
        minimum_driver=MINIMUM_DRIVER,
        variants=entries,
    )


def _builder(entries: Mapping[str, ManifestVariant]) -> dict[str, Any]:
    """Version of densemoe, and whether a cubin is not the one that the committed lock states: the same in a checkout and in an sdist."""
    try:
        locked = Lock.read().cubins
    except ArtifactError:
        locked = {}
    dirty = any(key not in locked or locked[key].sha256 != entry.sha256 for key, entry in entries.items())
    return {"version": version(), "dirty": dirty}


@cache
def version() -> str:
    """Version of densemoe: of the source tree where this is one, which need not be installed, else of the installed package."""
    project = _SOURCES.parent / "pyproject.toml"
    stated = re.search(r'^version = "([^"]+)"$', project.read_text(), re.MULTILINE) if project.is_file() else None
    return stated[1] if stated else importlib.metadata.version("densemoe")


def _update_index(out: Path, arch: str, manifest: bytes, variants: int) -> None:
    path = out / INDEX_NAME
    try:
        index = Index.from_bytes(read_file(path, LARGEST_MANIFEST), str(path))
        sets = {name: entry for name, entry in index.sets.items() if (out / entry.manifest).exists()}
    except ArtifactError:
        sets = {}
    sets[arch] = IndexEntry.of(arch, manifest, variants)
    document = Index(sets).to_bytes()
    if not path.exists() or path.read_bytes() != document:
        write_atomically(path, document)
