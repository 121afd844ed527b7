"""One folder that takes densemoe to a GPU machine without a registry or a compiler: ``make device-bundle``.

It holds the wheel, the GPU tests, and ``run.sh``, which puts the wheel on the path of that machine's Python (with cuda-bindings, numpy, ml_dtypes,
pytest and torch there already) and runs the tests and the start-up benchmark. The compiler is not in it, and is not needed.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 60 << 20  # bytes; what a bundle may weigh to travel easily

RUN = """#!/usr/bin/env bash
# Runs the GPU tests and the start-up benchmark of this bundle; needs a GPU and a Python with cuda-bindings, numpy, ml_dtypes, pytest and torch.
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH="$PWD/site${PYTHONPATH:+:$PYTHONPATH}"
python3 -m densemoe.runtime.cli doctor
python3 -m densemoe.runtime.cli quickstart
python3 -m densemoe.runtime.cli bench startup
python3 -m pytest tests/gpu -p no:cacheprovider "$@"
"""


def main() -> int:
    """Writes device-bundle/; 1 where there is no wheel or the bundle is too large."""
    wheels = sorted((ROOT / "dist").glob("densemoe-*.whl"))
    if not wheels:
        print("dist/ has no wheel: run `make wheel` first", file=sys.stderr)
        return 1
    bundle = ROOT / "device-bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "tests").mkdir(parents=True)
    shutil.copy(wheels[-1], bundle)
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(bundle / "site")
    shutil.copytree(ROOT / "tests" / "gpu", bundle / "tests" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "conftest.py", bundle / "tests")
    shutil.copy(ROOT / "pyproject.toml", bundle)
    script = bundle / "run.sh"
    script.write_text(RUN)
    script.chmod(0o755)
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    print(f"{bundle}: {size / 1e6:.1f} MB with {wheels[-1].name}; copy it to the GPU machine and run ./run.sh there")
    if size > LARGEST:
        print(f"{size} bytes are more than the {LARGEST} that a bundle may weigh", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
