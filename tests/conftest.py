"""Options and fixtures of every test."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# the emulator multiplies tiles of 128 x 128: threads of a BLAS gain nothing there, and spin. Before numpy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if importlib.util.find_spec("hypothesis"):  # a GPU machine has none; no test depends on time
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")

for _folder in ("emulator", "gpu", "runtime"):
    sys.path.insert(0, str(Path(__file__).parent / _folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long grids too")
    parser.addoption("--cutlass-examples", help="examples/python/CuTeDSL of a checkout of NVIDIA's CUTLASS (or DENSEMOE_CUTLASS_EXAMPLES)")
    parser.addoption("--sample", metavar="SEED", help="seed of the sampled grids (default: the commit)")


def _sample_seed(config: pytest.Config) -> str:
    """What ``--sample`` gives, else the commit that is tested; ``none`` outside of a repository."""
    given = config.getoption("--sample")
    if given:
        return str(given)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


@pytest.fixture(scope="session")
def sample_seed(pytestconfig: pytest.Config) -> str:
    """Decides which cases sampled grids run."""
    return _sample_seed(pytestconfig)


@pytest.fixture(autouse=True)
def _variables_are_left_as_they_were() -> Iterator[None]:
    """A test that leaves one of densemoe's environment variables behind fails (contract section 10)."""
    before = {name: value for name, value in os.environ.items() if name.startswith("DENSEMOE_")}
    yield
    after = {name: value for name, value in os.environ.items() if name.startswith("DENSEMOE_")}
    assert after == before, "this test leaks environment variables: use monkeypatch"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(f"sampled grids: seed {_sample_seed(config)} (repeat with --sample {_sample_seed(config)})")


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
    if not config.getoption("--full"):
        for item in _left_out(items, _sample_seed(config)):
            item.add_marker(pytest.mark.skip(reason="long: the commit chooses a part of this grid, all of it runs with --full (make test-full)"))


def _left_out(items: list[pytest.Item], seed: str) -> list[pytest.Item]:
    """Cases of tests marked ``sampled(n, group)`` beyond one in n of each (test, group), at least one, which the seed chooses."""
    grids: dict[tuple[str, Any], list[tuple[str, pytest.Item]]] = {}
    parts: dict[tuple[str, Any], int] = {}
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None and "full" not in item.keywords:
            grid = item.nodeid.split("[")[0], mark.args[1:]
            parts[grid] = mark.args[0]
            grids.setdefault(grid, []).append((hashlib.sha256(f"{seed} {item.nodeid}".encode()).hexdigest(), item))
    left_out = []
    for grid, cases in grids.items():
        kept = -(-len(cases) // parts[grid])
        left_out += [item for _, item in sorted(cases, key=lambda each: each[0])[kept:]]
    return left_out


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact root with the quick profile, built once a session. Tests that change files copy it first."""
    from prebuilt import seed_with_built

    from densemoe.compile import build, matrix

    root = tmp_path_factory.mktemp("artifacts")
    seed_with_built(root, {each.variant.key for each in matrix.load().profile("quick")})
    result = build.build(matrix.load(), root, profile="quick")
    assert not result.failures, result.failures
    return root


@pytest.fixture
def artifacts_copy(artifacts: Path, tmp_path: Path) -> Path:
    """A private copy of ``artifacts``."""
    copy = tmp_path / "copy"
    shutil.copytree(artifacts, copy)
    return copy
