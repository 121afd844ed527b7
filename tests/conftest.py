"""Options and fixtures of every test."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

# the emulator multiplies tiles of 128 x 128: threads of a BLAS gain nothing there, and spin. Before numpy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

for _folder in ("emulator", "gpu", "runtime"):
    sys.path.insert(0, str(Path(__file__).parent / _folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long grids too")


def _gpu_missing() -> str:
    """Why no GPU test can run here, or nothing."""
    from densemoe.runtime.driver import Driver
    from densemoe.runtime.errors import DriverError

    try:
        driver = Driver()
        return "" if driver.device_count() else "needs a CUDA device"
    except DriverError:
        return "needs a CUDA device"


def _major() -> int:
    """Major compute capability of device 0."""
    from densemoe.runtime.driver import Driver

    return Driver().capability(0)[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = _gpu_missing() if any("gpu" in item.keywords for item in items) else ""
    bound = [item for item in items if item.get_closest_marker("capability") is not None]
    major = _major() if bound and not missing else 0
    for item in bound:
        wanted = item.get_closest_marker("capability")
        if major and wanted is not None and wanted.args[0] != major:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device of compute capability {wanted.args[0]}"))
    for item in items:
        if missing and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=missing))
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="long: run with --full (make test-full)"))


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact root with the quick profile, built once a session. Tests that change files copy it first."""
    from densemoe.compile import build, matrix

    root = tmp_path_factory.mktemp("artifacts")
    result = build.build(matrix.load(), root, profile="quick")
    assert not result.failures, result.failures
    return root


@pytest.fixture
def artifacts_copy(artifacts: Path, tmp_path: Path) -> Path:
    """A private copy of ``artifacts``."""
    copy = tmp_path / "copy"
    shutil.copytree(artifacts, copy)
    return copy
