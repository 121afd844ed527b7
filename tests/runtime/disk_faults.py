"""Faults at any change of the disk: the process gone at once, or the disk refusing. What is tested must survive each of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

#: What builds and fetches do to the disk; each is a moment to be killed, or refused, at.
CALLS = ("mkdir", "open", "fsync", "chmod", "replace", "unlink", "rmdir")


@contextlib.contextmanager
def fault_at(number: int, fault: Callable[[], None]) -> Iterator[list[str]]:
    """Calls ``fault`` instead of the ``number``-th change of the disk; the list says which there were."""
    done: list[str] = []
    originals = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            writes = name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR)
            if writes:
                done.append(name)
                if len(done) == number:
                    fault()
            return originals[name](*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield done
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def changes_of(action: Callable[[], object]) -> int:
    """How many changes of the disk ``action`` makes."""
    with fault_at(0, lambda: None) as done:
        action()
    assert {"open", "fsync", "replace"} <= set(done)
    return len(done)


def in_child(action: Callable[[], object]) -> int:
    """Exit code of ``action`` in a forked process, which ends without any clean-up; 3 for an exception."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Runs ``action`` in a forked process that is gone at its ``number``-th change of the disk, as by SIGKILL; whether it got that far."""

    def die() -> None:
        with fault_at(number, lambda: os._exit(9)):
            action()

    return in_child(die) == 9
