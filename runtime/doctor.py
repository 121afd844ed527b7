"""What densemoe finds on this machine, and what it would use: ``densemoe doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass, field
from typing import Any

from densemoe.runtime.driver import version_text
from densemoe.runtime.errors import ArtifactError, DensemoeError
from densemoe.runtime.fields import Fields, plain
from densemoe.runtime.loader import ENVIRONMENT, ArtifactSet, Loader
from densemoe.runtime.select import load_table
from densemoe.runtime.variant import Architecture, architecture

__all__ = ["Report", "diagnose"]


@dataclass
class Report:
    """What was found.

    Attributes:
        facts: (name, value) pairs to print in order.
        artifacts_found: an artifact root can be read.
        usable: at least one device is served by it.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    artifacts_found: bool = False
    usable: bool = False

    def lines(self) -> list[str]:
        """For a terminal."""
        width = max(len(name) for name, _ in self.facts)
        return [f"{name.ljust(width)}  {plain(value)}" for name, value in self.facts]

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        return {"facts": [list(pair) for pair in self.facts], "artifacts_found": self.artifacts_found, "usable": self.usable}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _why(artifacts: str | None) -> str:
    if artifacts is not None:
        return "the path that was given"
    if os.environ.get("DENSEMOE_ARTIFACTS"):
        return "DENSEMOE_ARTIFACTS names it"
    return "of the installed package, or an add-on where that has none"


def _capabilities(kind: Architecture) -> str:
    return " and ".join(f"{major}.{minor}" for major, minor in kind.capabilities)


def _selection(arch: str, capability: tuple[int, int]) -> str:
    """What variants are chosen by."""
    table = load_table(arch, capability)
    parts = [f"{len(table['shapes'])} measured shapes"] if table.get("shapes") else []
    parts += ["a cost model"] if table.get("model") else []
    kinds = sorted({rule["provenance"] for rule in table["rules"]})
    parts.append(f"{len(table['rules'])} rules ({', '.join(kinds)})")
    return f"{', then '.join(parts)}; `densemoe explain` says which decides"


def diagnose(artifacts: str | None = None) -> Report:
    """Looks at versions, environment, artifacts, driver and devices. Raises nothing that densemoe raises on purpose."""
    report = Report()
    report.facts.append(("densemoe", f"{_version('densemoe')} on Python {sys.version.split()[0]}, cuda-bindings {_version('cuda-bindings')}"))
    for name in ENVIRONMENT:
        report.facts.append((name, os.environ.get(name, "not set")))
    found: ArtifactSet | None = None
    try:
        found = ArtifactSet(artifacts)
        report.facts.append(("artifact root", f"{found.root}: {_why(artifacts)}"))
        for arch in found.architectures:
            manifest = found.manifest(arch)
            needed = version_text(manifest.minimum_driver)
            ptxas = Fields(manifest.toolchain, f"{manifest.source}.toolchain").get("ptxas", str)
            stated = f"{len(manifest.variants)} variants, {plain(ptxas)}, needs a driver for CUDA {needed}"
            report.facts.append((f"artifacts {arch}", stated))
        report.artifacts_found = True
    except ArtifactError as error:
        report.facts.append(("artifacts", str(error)))
    try:
        from densemoe.runtime.driver import Driver

        driver = Driver()
        version = driver.version()
        report.facts.append(("driver", f"supports CUDA {version_text(version)}"))
        for ordinal in range(driver.device_count()):
            capability = driver.capability(ordinal)
            text = f"{driver.device_name(ordinal)}, compute capability {capability[0]}.{capability[1]}, {driver.sm_count(ordinal)} SMs"
            if found is not None and report.artifacts_found:
                try:
                    served = Loader(found, driver).manifest(ordinal)
                    kind = architecture(served.arch)
                    fit = "built for exactly this" if kind.kind == "exact" else f"a family's, for {_capabilities(kind)}; no exact set is there"
                    text += f": served by the {served.arch} set ({fit})"
                    report.usable = True
                    report.facts.append((f"selection {served.arch}", _selection(served.arch, capability)))
                except DensemoeError as error:
                    text += f": NOT served: {error}"
            report.facts.append((f"device {ordinal}", text))
    except DensemoeError as error:
        report.facts.append(("driver", str(error)))
    return report
