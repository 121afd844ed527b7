"""The record of a Blackwell proof, and what merging it makes of the selection table.

A record is one JSON file (artifacts/schema/proof.schema.json): the device, the set of kernels, what every grid found, every measured time, and how
near the fastest came to the roofline. Merging computes the table from the measurements anew; nothing of a conclusion is taken from the record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from densemoe.compile import roofline, roofline_table
from densemoe.runtime import tune_table
from densemoe.runtime.canonical import write_atomically
from densemoe.runtime.errors import ProofError
from densemoe.runtime.lock import Lock
from densemoe.runtime.select import SCHEMA as TABLE_SCHEMA
from densemoe.runtime.tune import Measurement

__all__ = ["GRIDS", "KIND", "SCHEMA", "Grid", "Record", "locked_digest", "merge", "merge_file"]

KIND: Final = "densemoe-blackwell-proof"
SCHEMA: Final = 1
#: Cases that a whole proof has of each grid: the contract's section 9.
GRIDS: Final = {"fc1-grid": 384, "fc2-grid": 180, "fc1-exact": 3, "fc2-exact": 6, "layer": 14, "layer-listed": 14}
#: What of a table is one device's.
DEVICE_PARTS: Final = ("provenance", "quality", "columns", "keys", "shapes", "model")


@dataclass(frozen=True)
class Grid:
    """What one grid found.

    Attributes:
        cases: problems; runs: problems times variants and settings.
        failed: runs out of their bound.
        worst: largest error divided by its bound.
        exemptions, elements: uses of the contract's exemption, and what was compared.
    """

    name: str
    cases: int
    runs: int
    failed: int
    worst: float
    exemptions: int
    elements: int


@dataclass(frozen=True)
class Record:
    """A proof.

    Attributes:
        provenance: ``bench_device.describe`` with ``read_bytes_per_second``.
        measurements: every timed candidate.
        speed: of each case the fastest, beside the modelled time: case, key, settings, microseconds, modelled, share.
        complete: every grid ran whole and passed, and no case was left out of the tuning.
    """

    provenance: Mapping[str, Any]
    grids: tuple[Grid, ...]
    measurements: tuple[Measurement, ...]
    speed: tuple[Mapping[str, Any], ...]
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "provenance": dict(self.provenance),
            "complete": self.complete,
            "grids": [vars(grid) for grid in self.grids],
            "speed": [dict(each) for each in self.speed],
            "measurements": [each.to_json() for each in self.measurements],
        }

    @classmethod
    def from_json(cls, document: Any, source: str) -> Record:
        """Reads and checks a record.

        Raises:
            ProofError: it is none, or one of another schema.
        """
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise ProofError(f"{source} is no record of `densemoe proof`: its kind is not {KIND!r}")
        if document.get("schema") != SCHEMA:
            raise ProofError(f"{source} has schema {document.get('schema')!r}, this densemoe reads {SCHEMA}: use the densemoe that wrote it")
        try:
            return cls(
                document["provenance"],
                tuple(Grid(**grid) for grid in document["grids"]),
                tuple(Measurement.from_json(each) for each in document["measurements"]),
                tuple(document["speed"]),
                document["complete"] is True,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProofError(f"{source} is damaged ({type(error).__name__}: {error}): copy it again from the machine that wrote it") from None

    @classmethod
    def read(cls, path: Path) -> Record:
        """Reads a file. Raises ProofError where there is none or it is no record."""
        try:
            return cls.from_json(json.loads(path.read_text()), str(path))
        except OSError as error:
            raise ProofError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ProofError(f"{path} is not JSON ({error}): copy it again from the machine that wrote it") from None


def locked_digest(lock: Lock, arch: str) -> str:
    """``bench_device.set_digest`` of the cubins that the lock states for an architecture."""
    part = arch.replace("_", "")
    lines = "".join(f"{key} {lock.cubins[key].sha256}\n" for key in sorted(lock.cubins) if key.split(".")[1] == part)
    return hashlib.sha256(lines.encode()).hexdigest()


def faults_of(record: Record, lock: Lock) -> list[str]:
    """Why a record must not be merged; empty where it may."""
    faults = []
    said = record.provenance
    capabilities = {device.capability: device.name for device in roofline.DEVICES.values()}
    capability = tuple(said.get("capability", ()))
    if capability not in capabilities:
        allowed = ", ".join(f"{major}.{minor} ({name})" for (major, minor), name in capabilities.items())
        faults.append(f"it is of {said.get('device')} with compute capability {'.'.join(map(str, capability))}: use one of {allowed}")
    if said.get("arch") != roofline_table.ARCH:
        faults.append(f"it is of the {said.get('arch')} set: {roofline_table.ARCH} is proved")
    elif said.get("set_sha256") != locked_digest(lock, roofline_table.ARCH):
        faults.append("it is of other cubins than artifacts/manifest.lock states: check out the commit that it was made at, or prove again")
    if "read_bytes_per_second" not in said or "sm_count" not in said:
        faults.append("it does not say the device's bandwidth or number of SMs")
    found = {grid.name: grid for grid in record.grids}
    for name, cases in GRIDS.items():
        if name not in found or found[name].cases < cases:
            faults.append(f"its grid {name} has {found[name].cases if name in found else 0} of {cases} cases: let `densemoe proof` finish")
    faults += [f"{grid.failed} of {grid.runs} runs of its grid {grid.name} failed: report them, do not merge" for grid in record.grids if grid.failed]
    bad = [each for each in record.measurements if not each.passed]
    faults += [f"{each.candidate.text} gave wrong results at {each.case.text} ({each.detail}): report it, do not merge" for each in bad]
    if not any(each.sample for each in record.measurements):
        faults.append("it has no measured time")
    if not record.complete:
        faults.append("it says itself that it is not complete: run the same command again, it goes on where it stopped")
    return faults


def merge(record: Record, table: Mapping[str, Any], lock: Lock) -> dict[str, Any]:
    """The table with the record's device measured: its parts replace what an earlier record of that compute capability gave.

    Raises:
        ProofError: every reason why the record must not be merged.
    """
    faults = faults_of(record, lock)
    if faults:
        raise ProofError("the record is not merged:\n" + "\n".join(f"  {fault}" for fault in faults))
    made = tune_table.build(record.measurements, record.provenance, {"schema": TABLE_SCHEMA, "rules": []})
    capability = ".".join(map(str, record.provenance["capability"]))
    devices = {**table.get("devices", {}), capability: {name: made[name] for name in DEVICE_PARTS}}
    return {**{name: part for name, part in table.items() if name != "rules"}, "devices": dict(sorted(devices.items())), "rules": table["rules"]}


def merge_file(path: Path, table: Path = roofline_table.TABLE, lock: Lock | None = None) -> dict[str, Any]:
    """Merges a record's file into a table's file.

    Returns:
        device, capability, shapes and rows that are measured now.

    Raises:
        ProofError: as ``merge``; nothing is written then.
    """
    record = Record.read(path)
    merged = merge(record, json.loads(table.read_text()), lock or Lock.read())
    write_atomically(table, roofline_table.render(merged).encode())
    capability = ".".join(map(str, record.provenance["capability"]))
    shapes = merged["devices"][capability]["shapes"]
    rows = sum(len(row) > 2 for own in shapes.values() for row in own)
    return {"device": record.provenance["device"], "capability": capability, "shapes": len(shapes), "measured_rows": rows, "table": str(table)}


def speeds(measurements: Sequence[Measurement], device: roofline.Device) -> tuple[dict[str, Any], ...]:
    """Of each case the fastest candidate beside the model's time for it."""
    from densemoe.runtime.tune_cases import active_experts
    from densemoe.runtime.variant import Variant

    by_case: dict[Any, list[Measurement]] = {}
    for each in measurements:
        if each.passed and each.sample is not None:
            by_case.setdefault(each.case, []).append(each)
    found = []
    for case, own in by_case.items():
        best = min(own, key=lambda each: each.sample.microseconds if each.sample else float("inf"))
        assert best.sample is not None
        active = round(active_experts(case.shape.experts, case.shape.top_k, case.m)) if case.active else None
        splits = dict(best.candidate.settings).get("splits", 1)
        modelled = roofline.estimate(device, Variant.parse(best.candidate.key), case.problem(), splits=splits, active=active).total
        found.append(
            {
                "case": case.text,
                "key": best.candidate.key,
                "settings": dict(best.candidate.settings),
                "microseconds": round(best.sample.microseconds, 3),
                "modelled": round(modelled, 3),
                "share": round(modelled / best.sample.microseconds, 4),
            }
        )
    return tuple(found)
