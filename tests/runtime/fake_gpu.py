"""A Runtime of the torch ops on a driver that exists only in Python, and arguments for the ops; its fixtures stand in tests/torch/conftest.py."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fake_driver import FakeDriver

from densemoe.runtime import packing
from densemoe.runtime.loader import Loader
from densemoe.runtime.torch import device

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 128, 64, 2


class Fake:
    """A Runtime over the fake driver; ``stream``, ``capturing`` and ``device`` may be changed."""

    def __init__(self, root: Path) -> None:
        self.driver, self.stream, self.capturing, self.device = FakeDriver(), 77, False, 0
        self.loader = Loader(root, self.driver)  # type: ignore[arg-type]
        self.runtime = device.Runtime(self.loader, lambda ordinal: self.stream, lambda: self.capturing, lambda: self.device, self.guard)
        self.guarded: list[int] = []

    @contextmanager
    def guard(self, ordinal: int) -> Iterator[None]:
        self.guarded.append(ordinal)
        before, self.device = self.device, ordinal
        yield
        self.device = before

    def launches(self) -> list[tuple[str, int, dict[str, int]]]:
        """(op, stream, addresses by role) of every launch since the last call."""
        found = []
        by_symbol = {entry.symbol: entry for entry in self.loader.manifest(0).variants.values()}
        for config, stream, block in self.driver.launches:
            kernel, _ = config if len(config) == 2 else (config[0], config[1:])
            entry = by_symbol[getattr(kernel, "symbol", "")] if hasattr(kernel, "symbol") else None
            assert entry is not None
            recipe = entry.recipe
            pointers = {
                each.value: struct.unpack_from("<Q", block, offset)[0]
                for each, (offset, _) in zip(recipe.parameters, recipe.offsets(), strict=True)
                if each.kind == "pointer"
            }
            found.append((entry.key.split(".")[0], stream, pointers))
        self.driver.launches.clear()
        return found


def arguments(m: int = 4, *, quantise: bool = False, fused: bool = False, layout: str = packing.LAYOUT, ids: Any = torch.int32) -> list[Any]:
    one = torch.ones(1)
    sizes = [packing.packed_bytes(op, EXPERTS, HIDDEN, INTERMEDIATE) for op in ("fc1", "fc2")]
    w1, w2 = (torch.zeros(size + 128, dtype=torch.uint8) for size in sizes)
    # torch aligns to 64 on a CPU, weights need 128
    w1, w2 = (w[-w.data_ptr() % 128 :][:size] for w, size in zip((w1, w2), sizes, strict=True))
    return [
        torch.zeros(m, HIDDEN, dtype=torch.bfloat16),
        torch.zeros(m, TOP_K, dtype=ids),
        torch.ones(m, TOP_K),
        w1,
        torch.ones(EXPERTS),
        w2,
        torch.ones(EXPERTS),
        HIDDEN,
        INTERMEDIATE,
        layout,
        "bf16",
        one if quantise else None,
        one.clone() if quantise else None,
        None,
        one.clone() if fused else None,
    ]


def workspaces(launch: tuple[str, int, dict[str, int]]) -> dict[str, int]:
    """A launch's workspaces by role."""
    return {role: value for role, value in launch[2].items() if role.startswith("workspace")}
