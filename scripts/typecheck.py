"""mypy --strict over the packages under their installed names.

The sources lie in compile/ and runtime/, and install as densemoe.compile and densemoe.runtime. A folder of links under build/ gives mypy the
installed layout. Device code is left out: its types are the tracer's, not Python's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICE_CODE = r"densemoe/compile/kernels/(?!__init__).*\.py"


def main() -> int:
    """Runs mypy; its exit code."""
    layout = ROOT / "build" / "typecheck"
    shutil.rmtree(layout, ignore_errors=True)
    package = layout / "densemoe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from densemoe.runtime import *\n")
    for name in ("compile", "runtime", "artifacts"):
        (package / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), "--exclude", DEVICE_CODE, "-p", "densemoe"]
    return subprocess.run(command, cwd=layout, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
