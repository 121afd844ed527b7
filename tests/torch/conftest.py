"""Fixtures of several modules: the ops on a driver that exists only in Python."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import Fake
from prebuilt import seed_with_built

from densemoe.runtime.torch import device


def _artifacts(root: Path, *others: str) -> Path:
    """The quick profile, and what layers of 24 and 60 tokens take besides."""
    from densemoe.compile import build, matrix

    patterns = (*others, "route.sm90a.*", "grouped*.t16x64.c1x1.bf16-bf16", "groupedfc1.*.t16x64.c1x1.bf16-nvfp4",
                "grouped*.t32x256.c1x1.bf16-bf16", "groupedfc1.*.t32x256.c1x1.bf16-nvfp4",
                "fc1.sm90a.t32x64.c1x1.bf16-nvfp4.rounded", "fc2.sm90a.t32x64.c1x1.bf16-bf16",
                "groupedfc2.*.t16x64.c1x1.bf16-bf16.deterministic", "groupedfc2.*.t32x256.c1x1.bf16-bf16.deterministic")  # fmt: skip
    planned = matrix.load()
    wanted = {each.variant.key for each in planned.profile("quick")}
    wanted |= {each.variant.key for each in planned.profile("full") if any(fnmatchcase(each.variant.key, pattern) for pattern in patterns)}
    seed_with_built(root, wanted)
    for pattern in sorted(wanted):
        assert not build.build(planned, root, key_filter=pattern).failures
    return root


@pytest.fixture(scope="session")
def layer_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set without kernels that sort the router's choice themselves."""
    return _artifacts(tmp_path_factory.mktemp("layer"))


@pytest.fixture(scope="session")
def sorting_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with them."""
    return _artifacts(tmp_path_factory.mktemp("sorting"), "grouped*.t8x64.c1x1.bf16-bf16.routes")


@pytest.fixture
def fake(layer_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    yield from _installed(Fake(layer_artifacts), monkeypatch)


@pytest.fixture
def sorting(sorting_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    yield from _installed(Fake(sorting_artifacts), monkeypatch)


def _installed(made: Fake, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The Runtime of the ops while a test runs."""

    def launcher(*prepared: Any) -> Any:
        return lambda stream: made.driver.launches.extend(((each.function, each.config), stream, bytes(each.keep[0])) for each in prepared)

    monkeypatch.setattr(made.driver, "launcher", launcher)
    before = device.use_runtime(made.runtime)
    yield made
    device.use_runtime(before)
