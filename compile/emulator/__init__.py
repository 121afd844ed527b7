"""A PTX emulator: kernels executed on any CPU, with checks that no GPU makes. `run` is all that most callers need.

``import densemoe.compile.emulator`` needs numpy alone; what is named here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densemoe.compile.emulator.execution import Launch, Report, run
    from densemoe.compile.emulator.memory import GlobalMemory

__all__ = ["GlobalMemory", "Launch", "Report", "run"]

_HOMES = {"GlobalMemory": "memory", "Launch": "execution", "Report": "execution", "run": "execution"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
