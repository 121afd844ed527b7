"""densemoe.runtime: open artifact sets, choose a variant, load it, launch it. Needs cuda-bindings and the standard library only.

The public names are imported when they are first used: importing this package imports nothing else. ``densemoe`` itself has them too. The function
``select`` is not among them, since ``densemoe.runtime.select`` is the module that it lies in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densemoe.runtime.driver import Driver
    from densemoe.runtime.errors import (
        AbiMismatch,
        ArchitectureMismatch,
        ArtifactCorrupt,
        ArtifactError,
        ArtifactNotFound,
        AuditError,
        BuildError,
        CheckpointError,
        CompileError,
        DensemoeError,
        DriverError,
        DriverTooOld,
        DriverUnavailable,
        EmulatorError,
        ManifestError,
        MatrixError,
        PlanError,
        ProblemError,
        ProofError,
        RecipeError,
        SelectionError,
        SignatureError,
        ToolchainError,
        VariantError,
    )
    from densemoe.runtime.loader import ArtifactSet, LoadedKernel, Loader
    from densemoe.runtime.manifest import Manifest, ManifestVariant
    from densemoe.runtime.memory import DeviceTensor
    from densemoe.runtime.plan import Plan
    from densemoe.runtime.problem import Problem, TensorSpec
    from densemoe.runtime.rules import can_implement, check_legal
    from densemoe.runtime.select import Choice, Rejected, bucket, load_table
    from densemoe.runtime.variant import Variant, architecture

__all__ = [
    "AbiMismatch",
    "ArchitectureMismatch",
    "ArtifactCorrupt",
    "ArtifactError",
    "ArtifactNotFound",
    "ArtifactSet",
    "AuditError",
    "BuildError",
    "CheckpointError",
    "Choice",
    "CompileError",
    "DensemoeError",
    "DeviceTensor",
    "Driver",
    "DriverError",
    "DriverTooOld",
    "DriverUnavailable",
    "EmulatorError",
    "LoadedKernel",
    "Loader",
    "Manifest",
    "ManifestError",
    "ManifestVariant",
    "MatrixError",
    "Plan",
    "PlanError",
    "Problem",
    "ProblemError",
    "ProofError",
    "RecipeError",
    "Rejected",
    "SelectionError",
    "SignatureError",
    "TensorSpec",
    "ToolchainError",
    "Variant",
    "VariantError",
    "architecture",
    "bucket",
    "can_implement",
    "check_legal",
    "load_table",
]

_MODULES = {
    "driver": ("Driver",),
    "errors": (
        "AbiMismatch",
        "ArchitectureMismatch",
        "ArtifactCorrupt",
        "ArtifactError",
        "ArtifactNotFound",
        "AuditError",
        "BuildError",
        "CheckpointError",
        "CompileError",
        "DensemoeError",
        "DriverError",
        "DriverTooOld",
        "DriverUnavailable",
        "EmulatorError",
        "ManifestError",
        "MatrixError",
        "PlanError",
        "ProblemError",
        "ProofError",
        "RecipeError",
        "SelectionError",
        "SignatureError",
        "ToolchainError",
        "VariantError",
    ),
    "loader": ("ArtifactSet", "LoadedKernel", "Loader"),
    "manifest": ("Manifest", "ManifestVariant"),
    "memory": ("DeviceTensor",),
    "plan": ("Plan",),
    "problem": ("Problem", "TensorSpec"),
    "rules": ("can_implement", "check_legal"),
    "select": ("Choice", "Rejected", "bucket", "load_table"),
    "variant": ("Variant", "architecture"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, and keeps it."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: its public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
