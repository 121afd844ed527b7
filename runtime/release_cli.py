"""Commands of releases and of machines: what is locked, what differs, what fits this machine, what a model needs.

``densemoe.runtime.cli`` adds them to its parser and runs them; what needs the compiler is found lazily in ``densemoe.compile.release_cli``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

__all__ = ["add_commands"]

_BUILD: Final = "densemoe.compile.release_cli"

#: (name, summary, example, function) → the command's parser
Add = Callable[[str, str, str, str], argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """Adds this module's commands to the parser of the ``densemoe`` command."""
    lock = add(
        "lock",
        "build the whole profile and write what it gave, and with which toolchain, into artifacts/manifest.lock",
        "densemoe lock --check",
        f"{_BUILD}:lock",
    )
    lock.add_argument("--matrix", help="the matrix file (default: the project's build_matrix.yaml)")
    lock.add_argument("--profile", default="full", help="profile that the lock covers (default: full)")
    lock.add_argument("--lock", help="the lock file (default: artifacts/manifest.lock)")
    lock.add_argument("--out", help="artifact root to build in (default: artifacts/built)")
    lock.add_argument("--jobs", type=int, help="compiler processes (default: the cores this process may use)")
    lock.add_argument("--check", action="store_true", help="build, compare and write nothing; exit code 1 where something differs")
    lock.add_argument("--resolve", action="store_true", help="ask the package index for the wheels of the build environment anew")
    lock.add_argument("--json", action="store_true", help="print the result as JSON")
