"""``densemoe fetch``: an artifact root from a web server or a bucket into a local folder, checked against the lock, resumable, offline afterwards.

Through fsspec (extra ``remote``), so any address that it knows will do. Everything that arrives is measured against the index, the manifest and the
lock before it takes its place: cubins are staged under their sha256, then renamed, then the manifest, then the index, as a build does. What a
broken transfer left is taken up where it ended.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.canonical import read_file, write_atomically
from densemoe.runtime.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound, ProblemError, ToolchainError
from densemoe.runtime.folder import Busy, alone, plain_folder
from densemoe.runtime.lock import Lock
from densemoe.runtime.manifest import INDEX_NAME, LARGEST_CUBIN, LARGEST_INDEX, LARGEST_MANIFEST, Index, Manifest, ManifestVariant
from densemoe.runtime.signature import BUNDLE_SUFFIX, LARGEST_BUNDLE

__all__ = ["Fetched", "fetch"]

#: Bytes asked for at once: a cubin of usual size in one request, and little to repeat after a break.
CHUNK: Final = 256 << 10
_STAGING: Final = ".fetch"
#: Bytes of one answer, unpacked. A server that ignores ranges sends whole files.
_LARGEST_ANSWER: Final = max(LARGEST_MANIFEST, LARGEST_CUBIN) + 1


@dataclass
class Fetched:
    """What a fetch did: keys by what became of them, and the bytes that came over the wire."""

    fetched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    received: int = 0


class _Remote:
    """Files below one address, read in bounded pieces."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        try:
            import fsspec
        except ImportError:
            raise ToolchainError("this command needs fsspec: install densemoe[remote]") from None
        try:
            bounded = {"get_client": _bounded_client} if url.startswith(("http://", "https://")) else {}
            self.files, base = fsspec.core.url_to_fs(url, **{**bounded, **(options or {})})
        except (ValueError, ImportError) as error:
            raise ProblemError(f"address {url!r}: {error}") from None
        self.url, self.base, self.received = url, base.rstrip("/"), 0

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` of the file ``name``, fewer where it is shorter.

        Raises:
            ArtifactNotFound: there is no such file.
            ArtifactError: it cannot be read; asking again later resumes.
        """
        try:
            data: bytes = self.files.cat_file(f"{self.base}/{name}", start=start, end=end)
        except FileNotFoundError:
            raise ArtifactNotFound(f"{self.url} has no {name}: give the address of an artifact root, the folder with {INDEX_NAME}") from None
        except Exception as error:  # each of fsspec's back ends has errors of its own
            raise ArtifactError(f"{self.url}: {name} cannot be read: {type(error).__name__}: {error}; fetch again to go on") from None
        if len(data) > end - start:  # a server that ignores ranges sends the whole file
            data = data[start:end]
        self.received += len(data)
        return data

    def whole(self, name: str, largest: int) -> bytes:
        """All of a file of at most ``largest`` bytes. Raises as ``read``, and ArtifactCorrupt where it is larger."""
        data = self.read(name, 0, largest + 1)
        if len(data) > largest:
            raise ArtifactCorrupt(f"{self.url}: {name} has more than {largest} bytes")
        return data


def fetch(
    url: str,
    out: Path,
    *,
    architectures: Sequence[str] = (),
    lock: Lock | None = None,
    options: dict[str, Any] | None = None,
    progress: Callable[[str, str], None] = lambda key, state: None,
) -> Fetched:
    """Fetches the sets of an artifact root into ``out``; files that are there already, whole, are kept.

    Args:
        url: of the folder that holds ``index.json``.
        architectures: only these; all that the root has where empty.
        lock: every cubin must be one of its; None takes what the address gives.
        options: of the fsspec file system.
        progress: called with each key and what became of it.

    Raises:
        ArtifactError: something cannot be read, or is not what the index, a manifest or the lock says. The sets in ``out`` are then as before.
        ProblemError: the address or an architecture is not known.
        ToolchainError: fsspec is not installed.
    """
    remote = _Remote(url, options)
    document = remote.whole(INDEX_NAME, LARGEST_INDEX)
    index = Index.from_bytes(document, f"{url}/{INDEX_NAME}")
    names = list(architectures) or sorted(index.sets)
    if unknown := [name for name in names if name not in index.sets]:
        raise ProblemError(f"architecture {unknown[0]!r}: {url} has {', '.join(sorted(index.sets)) or 'none'}")
    result = Fetched()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            for name in names:
                _fetch_set(remote, index, name, out, lock, result, progress)
            _fetch_signature(remote, document, out)
    except Busy:
        raise ArtifactError(f"a build or another fetch works in {out}: wait for it, or give another --out") from None
    except OSError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{out} cannot be written: {error.strerror or error}; what stood there is unchanged") from error
    result.received = remote.received
    return result


async def _bounded_client(**options: Any) -> Any:
    """An HTTP session whose answers end at a size that none of ours has: fsspec reads an answer whole, however long a server makes it."""
    import aiohttp

    class Bounded(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                parts, left = [], _LARGEST_ANSWER
                async for part in self.content.iter_chunked(CHUNK):
                    left -= len(part)
                    if left < 0:
                        self.close()
                        raise aiohttp.ClientPayloadError(f"the answer has more than {_LARGEST_ANSWER} bytes")
                    parts.append(part)
                self._body = b"".join(parts)
            return self._body

    return aiohttp.ClientSession(response_class=Bounded, **options)


def _fetch_set(
    remote: _Remote, index: Index, arch: str, out: Path, lock: Lock | None, result: Fetched, progress: Callable[[str, str], None]
) -> None:
    entry = index.sets[arch]
    data = remote.whole(entry.manifest, LARGEST_MANIFEST)
    if not entry.is_of(data):
        raise ArtifactCorrupt(f"{remote.url}: {entry.manifest} is not the manifest that {INDEX_NAME} names: it is being replaced, or was changed")
    manifest = Manifest.from_bytes(data, f"{remote.url}/{entry.manifest}")
    if manifest.arch != arch:
        raise ArtifactCorrupt(f"{remote.url}: {entry.manifest} is for {manifest.arch}, the index says {arch}")
    if lock is not None:
        _compare(manifest, lock, remote.url)
    folder = out / arch
    staging = folder / _STAGING
    for place in (folder, staging):
        if not plain_folder(place):
            raise ArtifactError(f"{place} is a symbolic link: name the folder itself with --out")
    staged: list[tuple[Path, Path]] = []
    for key, variant in manifest.variants.items():
        if _stands(folder / variant.file, variant):
            result.kept.append(key)
            progress(key, "kept")
            continue
        staged.append((_stage(remote, arch, variant, staging), folder / variant.file))
        result.fetched.append(key)
        progress(key, "fetched")
    for source, target in staged:
        os.replace(source, target)
    write_atomically(out / entry.manifest, data)
    _name_in_index(out, index, arch)
    shutil.rmtree(staging)
    for path in folder.glob("*.cubin"):
        if path.stem not in manifest.variants:
            path.unlink()


def _fetch_signature(remote: _Remote, index: bytes, out: Path) -> None:
    """The bundle that signs the index (signature.py), where the address has one and ``out`` holds just what it signs; an older one goes."""
    path = out / f"{INDEX_NAME}{BUNDLE_SUFFIX}"
    data = b""
    if read_file(out / INDEX_NAME, LARGEST_INDEX) == index:
        with suppress(ArtifactNotFound):
            data = remote.whole(path.name, LARGEST_BUNDLE)
    if data:
        write_atomically(path, data)
    else:
        path.unlink(missing_ok=True)


def _compare(manifest: Manifest, lock: Lock, url: str) -> None:
    for key, variant in manifest.variants.items():
        locked = lock.cubins.get(key)
        if locked is None or locked.sha256 != variant.sha256:
            stated = f"the lock states {locked.sha256[:12]}…" if locked else "the lock does not name it"
            raise ArtifactCorrupt(
                f"{url}: {key} has sha256 {variant.sha256[:12]}…, {stated}: it is not of this densemoe's release; install that release, or take it"
                " all the same with --unlocked"
            )


def _stands(path: Path, variant: ManifestVariant) -> bool:
    """Whether ``path`` is the cubin already."""
    try:
        return hashlib.sha256(read_file(path, variant.size)).hexdigest() == variant.sha256
    except ArtifactError:
        return False


def _stage(remote: _Remote, arch: str, variant: ManifestVariant, staging: Path) -> Path:
    """The staged file of a cubin, taken up where an earlier transfer ended. Raises ArtifactCorrupt where it is not what the manifest says."""
    path = staging / variant.sha256
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o644), "ab") as file:
        if file.tell() > variant.size:
            file.truncate(0)
        while (at := file.tell()) < variant.size:
            data = remote.read(f"{arch}/{variant.file}", at, min(at + CHUNK, variant.size))
            if not data:
                break
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if hashlib.sha256(path.read_bytes()).hexdigest() != variant.sha256:
        path.unlink()  # a second try starts afresh
        raise ArtifactCorrupt(f"{remote.url}: {arch}/{variant.file} is not the file that its manifest names: damaged on the way, or changed there")
    return path


def _name_in_index(out: Path, index: Index, arch: str) -> None:
    path = out / INDEX_NAME
    try:
        standing = dict(Index.from_bytes(read_file(path, LARGEST_MANIFEST), str(path)).sets)
    except ArtifactError:
        standing = {}
    standing[arch] = index.sets[arch]
    write_atomically(path, Index(standing).to_bytes())
