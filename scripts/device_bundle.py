"""One folder that takes densemoe to a GPU machine without a registry or a compiler: ``make device-bundle``.

It holds the wheel, laid out so that nothing need be installed; its few needs as wheels, of which only those that the machine lacks are used; the GPU
tests; and ``run.sh``, which runs the start-up benchmark and those tests. The compiler is not in it, and is not needed; torch, which the GPU
tests compare with, is too large and must be there. Packages are chosen for x86-64 or aarch64, as here, and for the Python that ``--python`` names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
LARGEST: Final = 60 << 20  # bytes; what a bundle may weigh to travel easily
#: What densemoe and its GPU tests need: module → distributions that bring it, themselves and what they need.
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "cuda.bindings": ("cuda-bindings", "cuda-pathfinder"),
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "pytest": ("pytest", "iniconfig", "pluggy", "packaging", "pygments"),
}
PLATFORMS: Final = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")

ENVIRONMENT = """# Sourced by run.sh: densemoe, and those of its needs that this machine's python3 lacks, on PYTHONPATH.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}"
need() {  # MODULE WHEEL...: unpacks the wheels where the module cannot be imported
    local module="$1" wheel
    shift
    python3 -c "import $module" 2>/dev/null && return
    for wheel in "$@"; do python3 -m zipfile -e "$wheel" "$here/lacking"; done
    export PYTHONPATH="$here/site:$here/lacking${PYTHONPATH#"$here/site"}"
    python3 -c "import $module" && return
    echo "$module is missing, and the bundle's is for another Python than $(python3 -V): make the bundle with --python" >&2
    return 1
}
"""

RUN = """#!/usr/bin/env bash
# Runs the start-up benchmark and the GPU tests of this bundle; needs a GPU, its driver, python3, and torch for the tests.
set -euo pipefail
cd "$(dirname "$0")"
source ./environment.sh
python3 -m densemoe.runtime.cli doctor
python3 -m densemoe.runtime.cli quickstart
python3 -m densemoe.runtime.cli bench startup
python3 -m pytest tests/gpu -p no:cacheprovider "$@"
"""


def download(needs: Path, python: str) -> None:
    """Wheels of every need into ``needs``, in the versions that are installed here.

    Raises:
        CalledProcessError: pip found none for that Python.
    """
    names = [f"{name}=={importlib.metadata.version(name)}" for each in NEEDS.values() for name in each]
    machine = platform.machine()
    places = [part for each in PLATFORMS for part in ("--platform", f"{each}_{machine}")]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *places, "--dest", str(needs), *names], check=True)


def lay_out(bundle: Path, wheel: Path, needs: Path) -> None:
    """Writes a bundle of ``wheel`` and of the wheels in ``needs``."""
    shutil.rmtree(bundle, ignore_errors=True)
    (bundle / "tests").mkdir(parents=True)
    shutil.copy(wheel, bundle)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(bundle / "site")
    shutil.copytree(needs, bundle / "needs")
    lines = []
    for module, names in NEEDS.items():
        stems = [name.replace("-", "_") for name in names]
        lines.append(f"need {module} " + " ".join(f'"$here"/needs/{stem}-*.whl' for stem in stems))
    (bundle / "environment.sh").write_text(ENVIRONMENT + "\n".join(lines) + "\n")
    shutil.copytree(ROOT / "tests" / "gpu", bundle / "tests" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "conftest.py", bundle / "tests")
    shutil.copy(ROOT / "pyproject.toml", bundle)
    script = bundle / "run.sh"
    script.write_text(RUN)
    script.chmod(0o755)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the bundle; 1 where there is no wheel, a need is not to be had, or the bundle is too large."""
    parser = argparse.ArgumentParser(description="One folder for a GPU machine without registry or compiler.")
    own = ".".join(platform.python_version_tuple()[:2])
    parser.add_argument("--python", default=own, metavar="X.Y", help=f"that machine's Python (default: this one's, {own})")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the wheel (default: dist)")
    parser.add_argument("--out", type=Path, default=ROOT / "device-bundle", help="folder to write (default: device-bundle)")
    args = parser.parse_args(arguments)
    wheels = sorted(args.dist.glob("densemoe-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        print(f"{args.dist} has no wheel: run `make wheel` first", file=sys.stderr)
        return 1
    needs = args.out.with_name(f"{args.out.name}.needs")
    shutil.rmtree(needs, ignore_errors=True)
    try:
        download(needs, args.python)
        lay_out(args.out, wheels[-1], needs)
    except subprocess.CalledProcessError:
        print(f"pip found no wheels of the bundle's needs for Python {args.python}: see its message above", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(needs, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB with {wheels[-1].name}, for Python {args.python}; copy it to the GPU machine and run ./run.sh there")
    if size > LARGEST:
        print(f"{size} bytes are more than the {LARGEST} that a bundle may weigh", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
