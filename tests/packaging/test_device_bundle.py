"""The bundle for a GPU machine without a registry: what is in it, and that it brings a bare Python exactly what that lacks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("device_bundle", ROOT / "scripts" / "device_bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A stand-in for densemoe's wheel: how one is laid out."""
    path = tmp_path / "densemoe-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("densemoe/__init__.py", "")
        archive.writestr("densemoe/artifacts/built/sm_90a/a.cubin", b"\x7fELF")
    return path


@pytest.fixture
def bundle(script: ModuleType, wheel: Path, tmp_path: Path) -> Path:
    """A bundle whose needs are stand-ins: wheels with one module each, which says that it came from the bundle."""
    needs = tmp_path / "needs"
    needs.mkdir()
    for module, names in script.NEEDS.items():
        for name in names:
            with zipfile.ZipFile(needs / f"{name.replace('-', '_')}-1-py3-none-any.whl", "w") as archive:
                archive.writestr(f"{module.replace('.', '/')}/__init__.py" if name == names[0] else f"{name}/data.txt", "FROM = 'bundle'\n")
    out = tmp_path / "device bundle"  # a space, as paths may have
    script.lay_out(out, wheel, needs)
    return out


def python(bundle: Path, code: str, interpreter: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` as ``run.sh`` would, with ``interpreter`` as the machine's python3."""
    path = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DENSEMOE"))}
    command = f'set -euo pipefail; source ./environment.sh; python3 -c "{code}"'
    return subprocess.run(["bash", "-c", command], cwd=bundle, env={**kept, "PATH": path}, capture_output=True, text=True, check=False)


def test_it_holds_the_wheel_its_needs_the_tests_and_a_script(bundle: Path, wheel: Path) -> None:
    assert (bundle / wheel.name).read_bytes() == wheel.read_bytes()
    assert (bundle / "site/densemoe/artifacts/built/sm_90a/a.cubin").read_bytes() == b"\x7fELF"
    for name in ("tests/gpu/harness.py", "tests/gpu/test_kernels.py", "tests/conftest.py", "pyproject.toml", "needs/numpy-1-py3-none-any.whl"):
        assert (bundle / name).is_file(), name
    assert os.access(bundle / "run.sh", os.X_OK)
    assert subprocess.run(["bash", "-n", bundle / "run.sh"], check=False).returncode == 0
    assert not list(bundle.rglob("__pycache__"))


def test_a_bare_python_gets_what_it_lacks(bundle: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    code = "import cuda.bindings, numpy, ml_dtypes, pytest; import densemoe; print(numpy.FROM, cuda.bindings.FROM, densemoe.__file__)"
    done = python(bundle, code, tmp_path / "bare" / "bin" / "python3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bundle bundle ")
    assert str(bundle / "site") in done.stdout


def test_what_a_python_has_is_left_alone(bundle: Path) -> None:
    done = python(bundle, "import numpy; print(numpy.__version__)", Path(sys.executable).parent / "python3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()[0].isdigit()
    assert not (bundle / "lacking").exists()


def test_a_need_for_another_python_is_named(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle / "needs" / "numpy-1-py3-none-any.whl", "w") as archive:
        archive.writestr("numpy/__init__.py", "raise ImportError('built for another Python')\n")
    venv.create(tmp_path / "bare", symlinks=True)
    done = python(bundle, "print('ran')", tmp_path / "bare" / "bin" / "python3")
    assert done.returncode != 0
    assert "numpy is missing, and the bundle's is for another Python" in done.stderr
    assert "ran" not in done.stdout


def test_without_a_wheel_nothing_is_written(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--dist", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "has no wheel: run `make wheel` first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
