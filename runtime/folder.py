"""Folders that one process at a time writes to: builds and fetches exclude each other, and neither follows a link that somebody left in one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["LOCK_NAME", "Busy", "alone", "plain_folder"]

LOCK_NAME: Final = ".build.lock"


class Busy(Exception):
    """Another build or fetch works in the folder."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process while inside. The lock goes with the process, however it ends.

    Raises:
        Busy: another process holds it.
        OSError: it cannot be written, or a link lies in the lock's place: opening that would create, or empty, a file elsewhere.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(folder / LOCK_NAME, flags, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy from None
        yield
    finally:
        os.close(handle)


def plain_folder(path: Path) -> bool:
    """Makes ``path`` a folder where there is none; False where it is a link, which a writer would follow to files that are not his."""
    if path.is_symlink():
        return False
    path.mkdir(parents=True, exist_ok=True)
    return True
