"""Partial results of a verification, beside the set that they are of: a killed run is continued by the next.

``<set>/.emulation/journal.jsonl`` has one line a finished run, under the digest of all that it depends on: PTX, recipe, case, seed, schedule,
emulator, judges. What depends on anything else is simply not found. A line is appended with one write; a torn last line is dropped.
``<sha256 of a cubin>.ptx`` beside it is the text that the cubin was assembled from. The folder is never shipped and may be removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Final

from densemoe.runtime.canonical import write_atomically
from densemoe.runtime.errors import BuildError

__all__ = ["FOLDER", "Journal"]

FOLDER: Final = ".emulation"
_NAME: Final = "journal.jsonl"
_LOCK: Final = "lock"


class Journal:
    """Opened for one verification; a second one of the same set is refused.

    Args:
        folder: of the set.
        current: digests (emulator, judge) whose runs are kept; others are dropped when the journal is opened.

    Raises:
        BuildError: another verification has it open, or the folder cannot be written.
    """

    def __init__(self, folder: Path, current: tuple[str, str]) -> None:
        self.folder, self._current = folder / FOLDER, list(current)
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock: IO[str] = (self.folder / _LOCK).open("w")
        except OSError as error:
            raise BuildError(f"{self.folder} cannot be written: {error.strerror or error}; copy the artifact root and name the copy") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise BuildError(f"another verification of {folder} runs: wait for it, or verify a copy") from None
        path = self.folder / _NAME
        kept: list[bytes] = []
        self._runs: dict[str, Mapping[str, Any]] = {}
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            entry = self._read(line)
            if entry is not None and entry["digests"] == self._current:
                kept.append(line)
                self._runs[entry["run"]] = entry["outcome"]
        write_atomically(path, b"".join(line + b"\n" for line in kept))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @staticmethod
    def _read(line: bytes) -> dict[str, Any] | None:
        try:
            entry = json.loads(line)
            check = entry.pop("check")
        except (ValueError, KeyError, AttributeError):
            return None  # torn, or empty
        return entry if check == _check(entry) else None

    def find(self, run: str) -> Mapping[str, Any] | None:
        """The outcome of a run that passed before."""
        return self._runs.get(run)

    def add(self, run: str, what: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
        """Appends a run that passed; ``what`` says which, for a reader."""
        entry = {"run": run, "digests": self._current, **what, "outcome": dict(outcome)}
        line = json.dumps({**entry, "check": _check(entry)}, sort_keys=True).encode() + b"\n"
        os.write(self._file, line)
        self._runs[run] = outcome

    def ptx(self, image: str) -> str | None:
        """The PTX of the cubin with this sha256, where an earlier run kept it."""
        path = self.folder / f"{image}.ptx"
        return path.read_text() if path.exists() else None

    def keep_ptx(self, image: str, ptx: str) -> None:
        """Keeps the PTX of a cubin."""
        write_atomically(self.folder / f"{image}.ptx", ptx.encode())

    def drop_ptx_but(self, images: Iterable[str]) -> None:
        """Removes the PTX of cubins that the set no longer has."""
        wanted = set(images)
        for path in self.folder.glob("*.ptx"):
            if path.stem not in wanted:
                path.unlink()

    def close(self) -> None:
        """Closes the journal; another verification may run."""
        os.close(self._file)
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]
