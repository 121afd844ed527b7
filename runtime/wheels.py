"""Artifact roots inside wheels, taken out into a folder: a wheel is read without installing it, and nothing in it is trusted."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Final

from densemoe.runtime.errors import ArtifactNotFound, ManifestError
from densemoe.runtime.manifest import INDEX_NAME, LARGEST_CUBIN

__all__ = ["LARGEST_WHEEL", "extract"]

#: Bytes of a wheel that is read into memory; ours has a budget of 15 MB (artifacts/size_budget.json).
LARGEST_WHEEL: Final = 256 << 20
#: Files of one wheel; a full set has some hundred.
_MOST_FILES: Final = 20_000
#: Bytes of all of them, unpacked: some hundred cubins of some 40 KB each, with room; a zip bomb has more.
_MOST_BYTES: Final = 1 << 30


def extract(wheel: Path, folder: Path, data: bytes | None = None) -> Path:
    """Takes artifacts, selection tables and lock out of ``wheel`` into ``folder``, which is created.

    Args:
        data: bytes of the wheel where the caller has read, and checked, them; ``wheel`` then only names it.

    Returns:
        The artifact root in ``folder``: ``built``, with ``selection`` and ``manifest.lock`` beside it where the wheel has them.

    Raises:
        ArtifactNotFound: the wheel does not exist, or carries no artifacts.
        ManifestError: it is no wheel, or has a member that escapes, is a link, stands twice or is too large.
    """
    if data is None and not wheel.is_file():
        raise ArtifactNotFound(f"{wheel} does not exist: give a .whl file")
    try:
        with zipfile.ZipFile(wheel if data is None else io.BytesIO(data)) as archive:
            members = archive.infolist()
            base = _base(wheel, members)
            chosen = [each for each in members if _wanted(PurePosixPath(each.filename), base) and not each.is_dir()]
            names = [each.filename for each in chosen]
            if len(names) != len(set(names)):
                raise ManifestError(f"{wheel}: {next(name for name in names if names.count(name) > 1)} stands twice")
            if len(chosen) > _MOST_FILES or sum(each.file_size for each in chosen) > _MOST_BYTES:
                raise ManifestError(f"{wheel}: {len(chosen)} artifact files of {sum(each.file_size for each in chosen)} bytes: too large to be ours")
            for each in chosen:
                _take(wheel, archive, each, folder / PurePosixPath(each.filename).relative_to(base))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{wheel}: not a wheel that can be read: {error}") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ManifestError(f"{wheel}: {Path(str(error.filename)).name} stands for a file and for a folder") from None
    return folder / "built"


def _base(wheel: Path, members: list[zipfile.ZipInfo]) -> PurePosixPath:
    """The folder of the wheel that holds ``built/index.json``."""
    found = [PurePosixPath(each.filename).parent.parent for each in members if PurePosixPath(each.filename).parts[-2:] == ("built", INDEX_NAME)]
    if len(found) != 1:
        raise ArtifactNotFound(f"{wheel} carries {len(found)} artifact roots (built/{INDEX_NAME}); one is expected")
    return found[0]


def _wanted(name: PurePosixPath, base: PurePosixPath) -> bool:
    if base not in name.parents:
        return False
    inner = name.relative_to(base).parts
    return inner[0] in ("built", "selection") or inner == ("manifest.lock",)


def _take(wheel: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    kind = member.external_attr >> 28  # the upper four bits of a Unix mode: 8 a regular file, 10 a link; 0 where the packer wrote none
    if ".." in PurePosixPath(member.filename).parts or "\\" in member.filename or kind not in (0, 8):
        raise ManifestError(f"{wheel}: {member.filename} leaves its folder, or is no regular file")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ManifestError(f"{wheel}: {member.filename} is packed by method {member.compress_type}; wheels store or deflate")
    if member.file_size > LARGEST_CUBIN:
        raise ManifestError(f"{wheel}: {member.filename} has {member.file_size} bytes; at most {LARGEST_CUBIN} are read")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(archive.read(member))
