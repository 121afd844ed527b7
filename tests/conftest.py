"""Options and fixtures of every test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = _gpu_missing() if any("gpu" in item.keywords for item in items) else ""
    for item in items:
        if missing and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=missing))
        if "full" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="long: run with --full (make test-full)"))
