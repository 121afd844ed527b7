"""``densemoe check``: whether the installed artifacts fit a machine, without loading a kernel.

Three states, each with its reasons and what to do: ``valid``, ``runs but not optimal``, ``invalid``. The machine is this one, or one that a device
profile describes (``artifacts/devices``), so a machine without a GPU can answer for the machines that it deploys to.

Exit codes: 0 valid, or runs but not optimal; 1 invalid, and with ``--strict`` not optimal too; 2 wrong usage or a profile that cannot be read;
3 there is no device here and no profile was given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.canonical import read_file
from densemoe.runtime.driver import version_text
from densemoe.runtime.errors import (
    ArchitectureMismatch,
    ArtifactError,
    ArtifactNotFound,
    DensemoeError,
    DriverUnavailable,
    ProblemError,
    SelectionError,
)
from densemoe.runtime.fields import parse_document
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.lock import Lock
from densemoe.runtime.manifest import Manifest
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import Choice, load_table, select
from densemoe.runtime.variant import ARCHITECTURES, OPS, Variant, arch_of_key, architecture

__all__ = [
    "INVALID",
    "NOT_OPTIMAL",
    "VALID",
    "Device",
    "Finding",
    "Verdict",
    "check_device",
    "here",
    "parse_version",
    "profile",
    "profile_names",
    "version_text",
]

VALID: Final = "valid"
NOT_OPTIMAL: Final = "runs but not optimal"
INVALID: Final = "invalid"

SCHEMA: Final = 1
_LARGEST_PROFILE: Final = 1 << 16
#: E, H and I at which the selection is tried, those of a Qwen3-30B layer, and the tokens, through decode to a small prefill.
REPRESENTATIVE: Final = (128, 2048, 768)
TOKENS: Final = (1, 8, 16, 24, 32, 64, 96, 128, 256, 512)
_FIRST_MAJOR: Final = 1000  # cuDriverGetVersion counts CUDA 1.0 as 1000


@dataclass(frozen=True)
class Device:
    """A device and its machine's driver.

    Attributes:
        name: as the driver, or the profile, calls it.
        capability: compute capability.
        driver: CUDA version that the driver supports, as ``cuDriverGetVersion`` counts.
        where: ``device 0`` of this machine, or the profile.
    """

    name: str
    capability: tuple[int, int]
    driver: int
    where: str


@dataclass(frozen=True)
class Finding:
    """One reason against, with the state that it alone would give and what to do."""

    state: str
    reason: str
    remedy: str


@dataclass
class Verdict:
    """What was found for one device.

    Attributes:
        arch: the set that serves it, empty where none does.
        findings: every reason against; none where it is valid.
    """

    device: Device
    arch: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def state(self) -> str:
        """``valid``, ``runs but not optimal`` or ``invalid``: the worst of the findings."""
        states = {each.state for each in self.findings}
        return next((state for state in (INVALID, NOT_OPTIMAL) if state in states), VALID)

    def to_json(self) -> dict[str, Any]:
        """For a program."""
        device = {**vars(self.device), "capability": list(self.device.capability)}
        return {"device": device, "arch": self.arch, "state": self.state, "findings": [vars(each) for each in self.findings]}


def parse_version(text: str) -> int:
    """13000 for ``13.0``. Raises ProblemError."""
    major, dot, minor = text.partition(".")
    if not (major.isdecimal() and (minor.isdecimal() or not dot)) or len(minor) > 1:
        raise ProblemError(f"driver {text!r}: write the CUDA version that the driver supports, as in 12.8")
    return int(major) * 1000 + int(minor or 0) * 10


def profile_names() -> tuple[str, ...]:
    """Names of the device profiles that densemoe brings."""
    folder = resources.files("densemoe.artifacts").joinpath("devices")
    return tuple(sorted(each.name.removesuffix(".json") for each in folder.iterdir() if each.name.endswith(".json")))


def profile(name: str, driver: int | None = None) -> Device:
    """The device that a profile describes.

    Args:
        name: of a profile that densemoe brings, or the path of a file.
        driver: CUDA version of the driver, instead of the profile's.

    Raises:
        ProblemError: there is no such profile, or it is not one.
    """
    if name.lower() in profile_names():
        path = Path(str(resources.files("densemoe.artifacts").joinpath("devices"))) / f"{name.lower()}.json"
    elif os.sep in name or name.endswith(".json"):
        path = Path(name)
    else:
        raise ProblemError(f"device profile {name!r}: use one of {', '.join(profile_names())}, or the path of a JSON file")
    try:
        fields = parse_document(read_file(path.resolve(), _LARGEST_PROFILE), str(path), SCHEMA, _LARGEST_PROFILE)
        pair = fields.get("compute_capability", list, _is_capability, "two integers from 0 to 99")
        stated = fields.get("driver", int, lambda v: v >= _FIRST_MAJOR, "a CUDA version as cuDriverGetVersion counts, as in 13000")
        return Device(fields.get("name", str), (pair[0], pair[1]), stated if driver is None else driver, f"profile {path.stem}")
    except ArtifactError as error:
        raise ProblemError(f"device profile: {error}") from None


def _is_capability(value: list[Any]) -> bool:
    return len(value) == 2 and all(type(each) is int and 0 <= each <= 99 for each in value)


def here() -> list[Device]:
    """The devices of this machine. Raises DriverUnavailable where there is no driver or device."""
    from densemoe.runtime.driver import Driver

    try:
        driver = Driver()
    except DriverUnavailable as error:
        raise DriverUnavailable(f"{error}; or judge for another machine with --device-profile, one of {', '.join(profile_names())}") from None
    version = driver.version()
    return [Device(driver.device_name(i), driver.capability(i), version, f"device {i}") for i in range(driver.device_count())]


def check_device(device: Device, artifacts: str | os.PathLike[str] | None = None) -> Verdict:
    """Whether an artifact root fits ``device``. Reads every file that the device's set lists; loads nothing. Raises nothing on purpose."""
    verdict = Verdict(device)
    try:
        found = ArtifactSet(artifacts)
        manifest = found.for_capability(device.capability)
        manifest.check()
    except ArtifactNotFound as error:
        verdict.findings.append(Finding(INVALID, str(error), "install a wheel with artifacts, or run `densemoe build`"))
        return verdict
    except ArchitectureMismatch as error:
        verdict.findings.append(Finding(INVALID, str(error), _build_for(device)))
        return verdict
    except DensemoeError as error:
        verdict.findings.append(Finding(INVALID, str(error), "install or build the artifacts again"))
        return verdict
    verdict.arch = manifest.arch
    verdict.findings += [
        *_driver(device, manifest),
        *_files(found, manifest),
        *_selection(device, manifest),
        *_exactness(device, manifest),
        *_bytes(manifest),
    ]
    return verdict


def _released(device: Device, kind: str = "") -> list[str]:
    """Architectures that serve a device and that the lock has cubins of, of one ``kind`` where it is given; without a lock, all that serve it."""
    serving = [each for each in ARCHITECTURES.values() if device.capability in each.capabilities and kind in ("", each.kind)]
    try:
        locked = {arch_of_key(key) for key in Lock.read().cubins}
    except ArtifactError:
        return [each.name for each in serving]
    return [each.name for each in serving if each.name in locked]


def _build_for(device: Device) -> str:
    names = _released(device)
    if not names:
        return f"densemoe has no architecture for compute capability {device.capability[0]}.{device.capability[1]}: use another device"
    return f"install a wheel with artifacts for {' or '.join(names)}, or run `densemoe build --arch {names[-1]}`"


def _driver(device: Device, manifest: Manifest) -> list[Finding]:
    if device.driver >= manifest.minimum_driver:
        return []
    needed, found = version_text(manifest.minimum_driver), version_text(device.driver)
    reason = f"the driver supports CUDA {found}; the {manifest.arch} artifacts need {needed}"
    return [Finding(INVALID, reason, f"update NVIDIA's driver to one for CUDA {needed}")]


def _files(artifacts: ArtifactSet, manifest: Manifest) -> list[Finding]:
    found = []
    for entry in manifest.variants.values():
        try:
            artifacts.image(entry)
        except ArtifactError as error:
            found.append(Finding(INVALID, str(error), "install or build the artifacts again"))
    return found


def _selection(device: Device, manifest: Manifest) -> list[Finding]:
    """What the selection gives at a representative shape: problems that nothing serves, and choices that were not measured."""
    variants = [Variant.parse(key) for key in manifest.variants]
    try:
        table = load_table(manifest.arch, device.capability)
    except DensemoeError as error:
        return [Finding(INVALID, str(error), "install densemoe again")]
    found = []
    remedy = f"results are right; `densemoe tune` on {device.name} chooses by its own times"
    measured_on = table.get("provenance", {}).get("device", device.name)
    if measured_on != device.name:
        reason = f"the {manifest.arch} choices were measured on {measured_on}; on {device.name} another may be faster"
        found.append(Finding(NOT_OPTIMAL, reason, remedy))
    for op in OPS:
        dtypes = sorted({(each.a_dtype, each.c_dtype) for each in variants if each.op == op})
        if not dtypes:
            found.append(Finding(INVALID, f"the {manifest.arch} set has no {op} kernel: no layer can run", "build or install the full profile"))
        choices: list[Choice] = []
        refused: dict[str, str] = {}
        for a_dtype, c_dtype in dtypes:
            for m in TOKENS:
                problem = Problem(op, m, *REPRESENTATIVE, a_dtype=a_dtype, c_dtype=c_dtype)
                try:
                    choices.append(select(problem, variants, table))
                except SelectionError as error:
                    refused.setdefault(f"{a_dtype}-{c_dtype}", str(error))
        for dtype, reason in refused.items():
            found.append(Finding(NOT_OPTIMAL, f"{op} {dtype} is refused at some M: {reason}", "build or install the full profile, or name a variant"))
        elsewhere = [each.device for each in choices if each.provenance == "measured" and each.device not in ("", device.name)]
        if elsewhere:
            where = ", ".join(sorted(set(elsewhere)))
            reason = f"{len(elsewhere)} of {len(choices)} choices of the {op} kernel were measured on {where}; on {device.name} another may be faster"
            found.append(Finding(NOT_OPTIMAL, reason, remedy))
        modelled = sum(each.provenance == "modelled" for each in choices)
        if modelled:
            reason = f"{modelled} of {len(choices)} choices of the {op} kernel are modelled, not measured (tried M = {TOKENS[0]} to {TOKENS[-1]})"
            found.append(Finding(NOT_OPTIMAL, reason, remedy))
    return found


def _exactness(device: Device, manifest: Manifest) -> list[Finding]:
    exact = _released(device, "exact")
    if not exact or architecture(manifest.arch).kind == "exact":
        return []  # where no exact set is released, the family's is the best there is
    reason = f"{device.name} is served by the family set {manifest.arch}; {exact[0]}, made for the exact device, is not installed"
    return [Finding(NOT_OPTIMAL, reason, f"install or build {exact[0]}")]


def _bytes(manifest: Manifest) -> list[Finding]:
    """Against the lock: other bytes than the released ones, and variants that are missing."""
    try:
        lock = Lock.read()
    except ArtifactError:
        return [Finding(NOT_OPTIMAL, "there is no lock to compare the cubins with", "install a released wheel")]
    found = []
    other = [key for key, entry in manifest.variants.items() if key not in lock.cubins or lock.cubins[key].sha256 != entry.sha256]
    if other:
        reason = f"{len(other)} cubins are not those of manifest.lock, {other[0]} among them: a build of changed sources or another toolchain"
        found.append(Finding(NOT_OPTIMAL, reason, "run `densemoe lock` where the change is meant, else install the released wheel"))
    locked = [key for key in lock.cubins if arch_of_key(key) == manifest.arch]
    missing = [key for key in locked if key not in manifest.variants]
    if missing:
        reason = f"{len(missing)} of {len(locked)} locked variants of {manifest.arch} are not installed, {missing[0]} among them"
        found.append(Finding(NOT_OPTIMAL, reason, "build or install the full profile"))
    return found
