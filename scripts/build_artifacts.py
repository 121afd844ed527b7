"""The artifact target of CMake: runs densemoe.compile.package on this source tree, which need not be installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class _ThisTree(MetaPathFinder):
    """Finds densemoe's modules in this tree, before the finder of an editable install of another one."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, path, target) if fullname.startswith("densemoe.") else None


# compile/, runtime/ and artifacts/ are densemoe's subpackages. Compiler processes import this file too, so that they compile the same tree.
_package = types.ModuleType("densemoe")
_package.__path__ = [str(ROOT)]
sys.modules["densemoe"] = _package
sys.meta_path.insert(0, _ThisTree())

if __name__ == "__main__":
    from densemoe.compile.package import main

    sys.exit(main())
