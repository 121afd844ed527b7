"""``densemoe proof``: everything that an owner of a B200 or B300 can say of the tcgen05 kernels, in one command and one file.

    refuse another device ─► grids of the contract's section 9, every variant (tests/gpu/test_blackwell.py)
                          ─► tuning: every variant in every bucket, cold weights, checked in the same run
                          ─► the fastest against the roofline ─► record ─► ``densemoe merge-record``

Grids and tuning go on where they stopped: results and times are kept in a folder beside the record. Nobody has run it on such a device yet; what can
be tested without one is (tests/blackwell/test_proof.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densemoe.compile import proof_record, roofline
from densemoe.compile.proof_record import Grid, Record
from densemoe.runtime.canonical import write_atomically
from densemoe.runtime.errors import ArchitectureMismatch, ArtifactNotFound, ProofError

if TYPE_CHECKING:
    from densemoe.runtime.driver import Driver
    from densemoe.runtime.tune import Tuner

__all__ = ["DTYPES", "TOKENS", "device_of", "grids_of", "merge_record", "proof", "prove", "run_grids"]

_TESTS: Final = Path(__file__).resolve().parent.parent / "tests" / "gpu" / "test_blackwell.py"
RESULTS_VARIABLE: Final = "DENSEMOE_PROOF_RESULTS"  # read by tests/gpu/blackwell_grid.py
RESULTS, JOURNAL = "grids.jsonl", "tuning.jsonl"
#: The buckets where decoding is spent, and both sides of the published changes of tactic (144, 272, 400).
TOKENS: Final = (1, 8, 16, 24, 32, 48, 64, 96, 128, 144, 256, 272, 384, 400, 512)
#: What a layer runs on these devices: (FC1's activations, FC1's output, FC2's output).
DTYPES: Final = (("nvfp4", "nvfp4", "bf16"),)

#: Runs the grids, notes each result in the given file; True where all passed.
Grids = Callable[[Path], bool]


def device_of(driver: Driver, ordinal: int) -> roofline.Device:
    """The modelled device that an ordinal is.

    Raises:
        ArchitectureMismatch: it is no Blackwell data-centre device.
    """
    capability = driver.capability(ordinal)
    for device in roofline.DEVICES.values():
        if device.capability == capability:
            return device
    capabilities = ((*each.capability, each.name) for each in roofline.DEVICES.values())
    wanted = " or ".join(f"{major}.{minor} ({name})" for major, minor, name in capabilities)
    raise ArchitectureMismatch(
        f"device {ordinal} is {driver.device_name(ordinal)} with compute capability {capability[0]}.{capability[1]}; this proves the sm_100f"
        f" kernels on one of {wanted}: run it there, or name such a device with --device; `densemoe tune` measures on any device"
    )


def run_grids(results: Path, device: int = 0, artifacts: str | None = None) -> bool:
    """Runs the GPU tests in a process of their own, which sees one device.

    Args:
        device: ordinal of the device, as this process counts them.
        artifacts: root whose kernels are run; what a process finds by itself where absent.

    Raises:
        ArtifactNotFound: this is no checkout.
    """
    if not _TESTS.exists():
        raise ArtifactNotFound(f"{_TESTS} is missing: run the proof from a checkout of the repository (make blackwell-proof), not from a wheel")
    command = [sys.executable, "-m", "pytest", str(_TESTS), "-q", "-rs"]
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    environment = {**os.environ, RESULTS_VARIABLE: str(results.resolve()), "CUDA_VISIBLE_DEVICES": visible[device] if visible else str(device)}
    if artifacts is not None:
        environment["DENSEMOE_ARTIFACTS"] = str(Path(artifacts).resolve())
    return subprocess.run(command, cwd=_TESTS.parent.parent.parent, env=environment, check=False).returncode == 0


def grids_of(lines: Iterable[str]) -> tuple[Grid, ...]:
    """Counts results: JSON lines of tests/gpu/blackwell_grid.py. A run that stands twice counts once, as it went last.

    Raises:
        ProofError: a line is none.
    """
    runs: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            runs[tuple(result["what"])] = result
        except (ValueError, KeyError, TypeError) as error:
            raise ProofError(f"line {number} of the grids' results is damaged ({error}): delete the folder and run again") from None
    found = []
    for name in proof_record.GRIDS:
        own = {what: result for what, result in runs.items() if what[0] == name}
        found.append(
            Grid(
                name,
                len({what[1:-1] for what in own}),
                len(own),
                sum(not result["passed"] for result in own.values()),
                max((float(result["worst"]) for result in own.values()), default=0.0),
                sum(int(result["exemptions"]) for result in own.values()),
                sum(int(result["elements"]) for result in own.values()),
            )
        )
    return tuple(found)


def prove(
    tuner: Tuner,
    folder: Path,
    groups: Mapping[Any, Any],
    provenance: Mapping[str, Any],
    grids: Grids = run_grids,
    *,
    budget: float = float("inf"),
    sensors: Callable[[], Mapping[str, Any]] = dict,
) -> Record:
    """The record of a device.

    Args:
        tuner: on the device, with the set that is proved.
        folder: where results and times are kept from run to run.
        groups: cases to tune, of ``tune.cases_of``.
        provenance: of this run, with ``read_bytes_per_second``.
        budget: seconds of tuning.

    Raises:
        ArchitectureMismatch: another device; nothing was run.
        ProblemError: the folder is of another device, driver or set.
    """
    from densemoe.runtime.tune import Journal

    device = device_of(tuner.driver, tuner.device)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / JOURNAL, provenance)  # refuses a folder of another device, driver or set before anything runs
    results = folder / RESULTS
    tuner.say(f"grids of the contract's section 9 on {tuner.driver.device_name(tuner.device)}")
    known = {grid.name: grid for grid in grids_of(results.read_text().splitlines() if results.exists() else [])}
    passed = all(known[name].cases >= cases and not known[name].failed for name, cases in proof_record.GRIDS.items()) or grids(results)
    counted = grids_of(results.read_text().splitlines() if results.exists() else [])
    whole = tuner.run(groups, journal, budget=budget, sensors=sensors)
    measured = journal.measurements()
    complete = passed and whole and all(each.passed for each in measured)
    return Record(journal.provenance, counted, tuple(measured), proof_record.speeds(measured, device), complete)


def _report(record: Record, out: Path) -> list[str]:
    lines = [f"{record.provenance['device']}, driver for CUDA {record.provenance['cuda_driver']}, {record.provenance['date']}"]
    lines += [
        f"  {grid.name}: {grid.cases} of {proof_record.GRIDS[grid.name]} cases, {grid.runs} runs, {grid.failed} failed,"
        f" worst {grid.worst:.3f} of its bound"
        for grid in record.grids
    ]
    shares = sorted(float(each["share"]) for each in record.speed)
    if shares:
        middle = shares[len(shares) // 2]
        lines.append(f"  {len(shares)} cases tuned; modelled time over measured: median {middle:.0%}, {shares[0]:.0%} to {shares[-1]:.0%}")
    failed = [each for each in record.measurements if not each.passed]
    lines += [f"  FAILED {each.case.text}: {each.candidate.text}: {each.detail}" for each in failed]
    state = "complete: merge it with `densemoe merge-record`" if record.complete else "NOT complete: run the same command again; report what failed"
    return [*lines, f"{out}: {state}"]


def proof(args: argparse.Namespace) -> int:
    """``densemoe proof``: 0 where everything passed and the record is complete, 1 where not, 3 on another device."""
    from densemoe.runtime.driver import Driver

    device_of(Driver(), args.device)  # before anything is loaded
    from densemoe.runtime import tune_cli
    from densemoe.runtime.bench_device import Sensors
    from densemoe.runtime.loader import Loader
    from densemoe.runtime.tune import Tuner, cases_of
    from densemoe.runtime.tune_cases import MODELS, parse_shapes

    out = Path(args.out)
    folder = out.with_suffix(".work")
    if args.fresh:
        for name in (RESULTS, JOURNAL):
            (folder / name).unlink(missing_ok=True)
    tuner = Tuner(Loader(args.artifacts), args.device, say=lambda line: print(line, file=sys.stderr, flush=True))
    groups = cases_of(parse_shapes(args.models or MODELS), TOKENS, (True, False), DTYPES)
    sensors = Sensors(tuner.driver, args.device).read

    def grids(results: Path) -> bool:
        return run_grids(results, args.device, args.artifacts)

    record = prove(tuner, folder, groups, tune_cli.provenance_of(tuner), grids, budget=args.budget, sensors=sensors)
    document = record.to_json()
    write_atomically(out, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    if args.json:
        print(json.dumps({name: part for name, part in document.items() if name != "measurements"}, indent=2, sort_keys=True))
    else:
        print("\n".join(_report(record, out)))
    return 0 if record.complete else 1


def merge_record(args: argparse.Namespace) -> int:
    """``densemoe merge-record``: 0 where the table was written, 1 where the record must not be merged."""
    from densemoe.compile import roofline_table

    table = Path(args.table) if args.table else roofline_table.TABLE
    found = proof_record.merge_file(Path(args.record), table)
    if args.json:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        where = f"{found['device']} ({found['capability']})"
        print(f"{found['table']}: {found['measured_rows']} rows of {found['shapes']} shapes are measured on {where}")
        print("commit it; other devices of the family keep their modelled rules")
    return 0
