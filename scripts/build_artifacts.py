"""The artifact target of CMake: runs densemoe.compile.package on this source tree, which need not be installed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# compiler processes import this file too, so that they compile the same tree, even where another one is installed
runpy.run_path(str(ROOT / "compile" / "rebuild.py"))["use_this_tree"]()

if __name__ == "__main__":
    from densemoe.compile.package import main

    sys.exit(main())
