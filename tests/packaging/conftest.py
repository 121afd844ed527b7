"""A wheel of the quick profile, built once a session from a copy of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What a checkout holds, less what never decides a wheel.
TREE = ("CMakeLists.txt", "LICENSE", "README.md", "artifacts", "build_matrix.yaml", "compile", "pyproject.toml", "runtime", "scripts", ".gitignore")


def copy_tree(folder: Path) -> Path:
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "built"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_build(tree: Path, out: Path, *options: str, what: str = "--wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", what, "--no-isolation", "--outdir", str(out), *(part for each in options for part in ("-C", each))]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def build() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Builds a wheel, or ``what``, of a tree into a folder, with config settings and environment variables."""
    return run_build


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree") / "one")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cubins of ``wheel`` are built."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="session")
def wheel(tree: Path, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    options = ("cmake.define.DENSEMOE_PROFILE=quick", "cmake.define.DENSEMOE_ARCHITECTURES=sm_90a", f"cmake.define.DENSEMOE_ARTIFACTS={built}")
    done = run_build(tree, out, *options, SOURCE_DATE_EPOCH="1700000000")
    assert not done.returncode, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found
