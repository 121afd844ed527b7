"""``artifacts/manifest.lock``: the bytes that the sources give, and with which toolchain; committed, so that a change of either is seen in review.

Canonical JSON with one line a wheel, a kernel and a cubin (canonical.py). The runtime reads it to say whether an artifact root holds the locked
bytes; ``densemoe.compile.locking`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.canonical import canonical, read_file
from densemoe.runtime.errors import ManifestError, VariantError
from densemoe.runtime.fields import Fields, parse_document
from densemoe.runtime.manifest import LARGEST_CUBIN, LARGEST_MANIFEST
from densemoe.runtime.variant import arch_of_key

__all__ = ["LOCK_NAME", "SCHEMA", "Lock", "LockedCubin", "LockedWheel", "default_lock"]

SCHEMA: Final = 1
LOCK_NAME: Final = "manifest.lock"
#: Hexadecimal digits of the digests that only serve to find a cause; the sha256 that decides is whole.
SHORT_DIGEST: Final = 16


def default_lock() -> Path:
    """Where the project's, or the installed package's, lock lies."""
    # an editable install may join several directories; joinpath gives the one that has the entry
    return Path(str(resources.files("densemoe.artifacts").joinpath(LOCK_NAME)))


@dataclass(frozen=True)
class LockedWheel:
    """One wheel of the toolchain.

    Attributes:
        sha256: of the file, as the registry states it.
        pythons: Python versions whose environment it belongs to, for example ``("3.10", "3.11")``.
    """

    sha256: str
    pythons: tuple[str, ...]


@dataclass(frozen=True)
class LockedCubin:
    """What the sources and the toolchain must give for one variant.

    Attributes:
        kernel: its kernel module.
        sha256: of the cubin.
        size: in bytes.
        registers, stack: a thread's registers, and its stack in bytes.
        text: first digits of the sha256 of its machine code.
        ptx: first digits of the sha256 of the PTX that ptxas was given.
    """

    kernel: str
    sha256: str
    size: int
    registers: int
    stack: int
    text: str
    ptx: str


@dataclass(frozen=True)
class Lock:
    """The lock.

    Attributes:
        profile: the matrix profile that it covers.
        distributions: version of every distribution that decides the bytes of a cubin, by name.
        flavour, ptxas: of the compiler that was loaded.
        kernels: first digits of the digest of each kernel module's sources.
        wheels: every wheel of the build environment by file name.
        cubins: by variant key.
    """

    profile: str
    distributions: Mapping[str, str]
    flavour: str
    ptxas: str
    kernels: Mapping[str, str]
    wheels: Mapping[str, LockedWheel]
    cubins: Mapping[str, LockedCubin]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical(
            {
                "schema": SCHEMA,
                "profile": self.profile,
                "toolchain": {"distributions": dict(self.distributions), "flavour": self.flavour, "ptxas": self.ptxas},
                "kernels": dict(self.kernels),
                "wheels": {name: {"sha256": each.sha256, "pythons": list(each.pythons)} for name, each in self.wheels.items()},
                "cubins": {key: vars(each) for key, each in self.cubins.items()},
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Lock:
        """Checks and reads a lock.

        Raises:
            ManifestError: it is no lock of this schema, or not in canonical form.
        """
        fields = parse_document(data, source, SCHEMA, LARGEST_MANIFEST)
        toolchain = fields.object("toolchain")
        lock = cls(
            profile=fields.get("profile", str),
            distributions=_texts(toolchain.object("distributions")),
            flavour=toolchain.get("flavour", str),
            ptxas=toolchain.get("ptxas", str),
            kernels=_texts(fields.object("kernels")),
            wheels={name: _wheel(name, each) for name, each in fields.object("wheels").objects()},
            cubins={key: _cubin(key, each) for key, each in fields.object("cubins").objects()},
        )
        if lock.to_bytes() != data:
            raise ManifestError(f"{source} is not in canonical form, or holds names that do not belong there: write it with `densemoe lock`")
        return lock

    @classmethod
    def read(cls, path: Path | None = None) -> Lock:
        """The lock at ``path``, by default the project's.

        Raises:
            ArtifactNotFound: there is none.
            ManifestError: it cannot be read.
        """
        path = path or default_lock()
        return cls.from_bytes(read_file(path, LARGEST_MANIFEST), str(path))


def _texts(fields: Fields) -> dict[str, str]:
    return {name: fields.get(name, str) for name in fields.value}


def _wheel(name: str, fields: Fields) -> LockedWheel:
    if not name.endswith(".whl") or "/" in name or name.startswith("."):
        raise ManifestError(f"{fields.path}: {name!r} is no file name of a wheel")
    pythons = fields.get("pythons", list, lambda v: bool(v) and all(isinstance(p, str) for p in v), "Python versions")
    return LockedWheel(fields.sha256("sha256"), tuple(pythons))


def _cubin(key: str, fields: Fields) -> LockedCubin:
    try:
        arch_of_key(key)  # a variant that left densemoe stays in the lock until that is renewed
    except VariantError as error:
        raise ManifestError(f"{fields.path}: {error}") from None
    values: dict[str, Any] = {name: fields.get(name, str) for name in ("kernel", "text", "ptx")}
    return LockedCubin(
        sha256=fields.sha256("sha256"),
        size=fields.size("size", LARGEST_CUBIN),
        registers=fields.size("registers", 255),
        stack=fields.size("stack", 1 << 20),
        **values,
    )
