"""Writes ``artifacts/manifest.lock``, and compares what was built with it: which variant differs, in what, and the likely cause."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from densemoe.compile import toolchain
from densemoe.compile.build import kernel_digest
from densemoe.compile.elf import read_sections
from densemoe.compile.matrix import Matrix
from densemoe.runtime.errors import AuditError, ToolchainError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.lock import SHORT_DIGEST, Lock, LockedCubin, LockedWheel
from densemoe.runtime.manifest import ManifestVariant

__all__ = ["Difference", "check_toolchain", "compare", "locked_cubin", "make", "stale_sources"]


@dataclass(frozen=True)
class Difference:
    """One variant that is not what the lock says: in what it differs, and the likely cause."""

    key: str
    what: str
    cause: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}\n  likely cause: {self.cause}"


def locked_cubin(entry: ManifestVariant, image: bytes) -> LockedCubin:
    """What a lock says of one built variant.

    Raises:
        AuditError: ``image`` is no cubin.
    """
    text = b"".join(data for name, data in read_sections(image).items() if name.startswith(".text"))
    return LockedCubin(
        kernel=entry.kernel,
        sha256=entry.sha256,
        size=entry.size,
        registers=entry.registers,
        stack=entry.stack,
        text=hashlib.sha256(text).hexdigest()[:SHORT_DIGEST],
        ptx=str(entry.audit.get("ptx_sha256", ""))[:SHORT_DIGEST],
    )


def _built(root: Path, keys: frozenset[str]) -> dict[str, LockedCubin]:
    artifacts = ArtifactSet(root)
    entries = (entry for arch in artifacts.architectures for entry in artifacts.manifest(arch).variants.values())
    return {entry.key: locked_cubin(entry, artifacts.image(entry)) for entry in entries if entry.key in keys}


def _kernels(matrix: Matrix, profile: str) -> dict[str, str]:
    return {name: kernel_digest(name)[:SHORT_DIGEST] for name in sorted({each.kernel for each in matrix.profile(profile)})}


def make(matrix: Matrix, profile: str, root: Path, wheels: Mapping[str, LockedWheel]) -> Lock:
    """The lock of what ``root`` holds of ``profile``.

    Args:
        root: an artifact root in which the whole profile is built.
        wheels: the build environment's, by file name.

    Raises:
        AuditError: a variant of the profile is not in the root.
        ArtifactError: the root cannot be read.
    """
    keys = frozenset(each.variant.key for each in matrix.profile(profile))
    cubins = _built(root, keys)
    if missing := keys - set(cubins):
        raise AuditError(f"{root} lacks {len(missing)} variants of profile {profile!r}, {min(missing)} among them: run `densemoe build` first")
    distributions = {each.name: each.version for each in toolchain.distributions()}
    return Lock(profile, distributions, toolchain.PINNED_FLAVOUR, toolchain.PINNED_PTXAS, _kernels(matrix, profile), wheels, cubins)


def toolchain_changes(lock: Lock) -> list[str]:
    """What of the installed toolchain is not as locked; empty where all is."""
    installed = {each.name: each.version for each in toolchain.distributions()}
    changes = [
        f"{name} {lock.distributions.get(name, 'absent')} is locked, {installed.get(name, 'absent')} is installed"
        for name in sorted({*lock.distributions, *installed})
        if lock.distributions.get(name) != installed.get(name)
    ]
    for name, locked, pinned in (("flavour", lock.flavour, toolchain.PINNED_FLAVOUR), ("ptxas", lock.ptxas, toolchain.PINNED_PTXAS)):
        if locked != pinned:
            changes.append(f"{name} {locked!r} is locked, {pinned!r} is pinned in compile/toolchain.py")
    return changes


def check_toolchain(lock: Lock) -> None:
    """Raises ToolchainError where another toolchain is installed than the locked one: its bytes would differ."""
    if changes := toolchain_changes(lock):
        raise ToolchainError(
            f"the installed toolchain is not the locked one: {'; '.join(changes)}. Install the locked one, or accept this one with `densemoe lock`"
        )


def compare(lock: Lock, matrix: Matrix, profile: str, root: Path, keys: frozenset[str] | None = None) -> list[Difference]:
    """Every variant of ``profile`` that ``root`` does not hold byte for byte as locked.

    Args:
        keys: only these variants; by default the whole profile, and, where it is the lock's, variants that only the lock names.

    Raises:
        ArtifactError: the root cannot be read.
    """
    planned = frozenset(each.variant.key for each in matrix.profile(profile))
    wanted = planned if keys is None else planned & keys
    built, kernels, changes = _built(root, wanted), _kernels(matrix, profile), toolchain_changes(lock)
    found = []
    for key in sorted(wanted):
        locked, actual = lock.cubins.get(key), built.get(key)
        if locked is None:
            found.append(Difference(key, "the lock does not name it", "it is new in the matrix: write the lock with `densemoe lock`"))
        elif actual is None:
            found.append(Difference(key, f"{root} does not hold it", "it was not built"))
        elif actual.sha256 != locked.sha256:
            found.append(Difference(key, _what(locked, actual), _cause(lock, locked, actual, kernels, changes)))
    if keys is None and profile == lock.profile:
        gone = sorted(set(lock.cubins) - planned)
        found += [Difference(key, "only the lock names it", "it left the matrix: write the lock with `densemoe lock`") for key in gone]
    return found


def stale_sources(lock: Lock, matrix: Matrix) -> list[str]:
    """Kernels whose sources have another digest than the lock states.

    Their cubins may be equal all the same, as after a change of comments; but a difference that comes later would be blamed on
    them, so ``densemoe lock`` is run again.
    """
    return [name for name, digest in _kernels(matrix, lock.profile).items() if lock.kernels.get(name) != digest]


def _what(locked: LockedCubin, actual: LockedCubin) -> str:
    parts = [
        f"{old} -> {new} {name}"
        for name, old, new in (
            ("bytes", locked.size, actual.size),
            ("registers", locked.registers, actual.registers),
            ("bytes of stack", locked.stack, actual.stack),
        )
        if old != new
    ]
    parts.append("machine code differs" if locked.text != actual.text else "machine code is equal, other sections differ")
    parts.append("PTX differs" if locked.ptx != actual.ptx else "PTX is equal")
    return f"sha256 {locked.sha256[:12]}… is locked, {actual.sha256[:12]}… was built: {', '.join(parts)}"


def _cause(lock: Lock, locked: LockedCubin, actual: LockedCubin, kernels: Mapping[str, str], changes: list[str]) -> str:
    if changes:
        return f"toolchain: {'; '.join(changes)}"
    if locked.kernel != actual.kernel:
        return f"source: it was compiled from {locked.kernel} and is from {actual.kernel}"
    if lock.kernels.get(actual.kernel) != kernels[actual.kernel]:
        return f"source: compile/kernels/{actual.kernel}.py or a module that it imports changed; if that is meant, run `densemoe lock`"
    if locked.ptx != actual.ptx:
        return "code generation: sources and toolchain are equal, the PTX is not; `densemoe reproduce` searches the environment for the reason"
    if locked.text != actual.text:
        return "flags: equal PTX was assembled to other machine code; compare compiler_options in the matrix"
    return "symbol or flags: only what surrounds the machine code differs; `densemoe diff` of two sets shows which section"
