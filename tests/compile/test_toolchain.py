"""The compiler's flavour follows the host's driver where cutlass was imported without our guard: a build says so instead of giving other cubins.

That an old driver alone changes no byte is tested with the reproduction (test_reproduce.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from densemoe.compile import reproduction

KEY = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
CU12_DRIVER = 12090


@pytest.fixture
def old_driver(tmp_path: Path) -> dict[str, str]:
    """An environment whose libcuda.so.1 says that it supports CUDA 12.9, and where every Python imports cutlass as it starts."""
    folder = reproduction.fake_driver(tmp_path / "driver", CU12_DRIVER)
    if folder is None:
        pytest.skip("a driver that says another version is compiled, and there is no C compiler")
    early = tmp_path / "early"
    early.mkdir()
    (early / "sitecustomize.py").write_text("import cutlass.cute\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUTE_DSL", "DENSEMOE"))}
    return {**kept, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(early), "CUTE_DSL_ARCH": "sm_90a"}


def test_libraries_for_another_driver_fail_the_build(old_driver: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "densemoe.runtime.cli", "build", "--profile", "quick", "--filter", KEY, "--out", str(out)]
    done = subprocess.run(command, env=old_driver, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert f"FAILED {KEY}" in done.stderr
    assert "ToolchainError: the compiler loaded its cu12 libraries, cu13 are pinned" in done.stderr
    assert "import densemoe.compile first, or build where no driver or a 13.x one is" in done.stderr
    assert not list(out.rglob("*.cubin"))
    assert not list(out.rglob("manifest.json"))
