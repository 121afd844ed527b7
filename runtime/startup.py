"""``densemoe bench startup``: what a cold start costs, every figure the median over fresh processes, beside its bar (README.md)."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.cold import PARTS
from densemoe.runtime.driver import version_text
from densemoe.runtime.errors import ArtifactError, DensemoeError
from densemoe.runtime.first_layer import ABSENT
from densemoe.runtime.loader import ArtifactSet

__all__ = ["lines", "measure"]

SCHEMA: Final = 1
PROCESSES: Final = 7
LATER: Final = 12  # kernels that each process loads after its first
FEW: Final = 3  # processes that import torch, or Humming with a warm cache: each takes some five or ten seconds
FIRST: Final = "process start to first layer result"
MICRO, MILLI = "us", "ms"
_IMPORT: Final = "import time; start = time.perf_counter(); from densemoe.runtime import Loader, Problem; print(time.perf_counter() - start)"


class _Absent(Exception):
    """Why a fresh process measured nothing."""


def _run(arguments: Sequence[str], bytecode: str, more: Mapping[str, str] | None = None) -> str:
    """Output of a fresh interpreter, whose bytecode lies cached in the folder ``bytecode``, as it does where pip installed densemoe.

    Raises:
        _Absent: it says that it cannot run here (exit code 3); DensemoeError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | dict(more or {})
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode == ABSENT and done.stdout.strip():
        raise _Absent(done.stdout.strip())
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise DensemoeError(f"a measured process failed: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout


def _row(what: str, values: Iterable[float], unit: str, bar: float | None = None) -> dict[str, Any]:
    """One figure: median, least and most of ``values``; ``met`` is None where there is no bar."""
    measured = sorted(values)
    median = statistics.median(measured)
    return {
        "what": what,
        "median": round(median, 3),
        "least": round(measured[0], 3),
        "most": round(measured[-1], 3),
        "values": len(measured),
        "unit": unit,
        "bar": bar,
        "met": None if bar is None else median <= bar,
    }


def measure(artifacts: str | None = None, device: int = 0, processes: int = PROCESSES) -> dict[str, Any]:
    """The figures, as ``--json`` prints them.

    Args:
        artifacts: an artifact root; None for the default one, whose look-up is then measured too.
        device: ordinal.
        processes: fresh processes behind each median.

    Returns:
        ``processes``, ``device``, ``driver``, ``rows``, ``absent``: rows by name that cannot be measured here, with the reason; ``against``:
        Humming's first layer over ours; and ``not_measured``: why the GPU's rows are absent, None where they are there.
    """
    with tempfile.TemporaryDirectory() as bytecode:
        return _measure(artifacts, device, processes, bytecode)


def _measure(artifacts: str | None, device: int, processes: int, bytecode: str) -> dict[str, Any]:
    imports = [float(_run(["-c", _IMPORT], bytecode)) * 1e3 for _ in range(processes + 1)][1:]  # the first one writes the bytecode
    rows = [_row("import densemoe.runtime with its Loader", imports, MILLI, 100.0)]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "what": "startup",
        "processes": processes,
        "python": platform.python_version(),
        "device": None,
        "driver": None,
        "not_measured": None,
        "rows": rows,
        "absent": {},
        "against": [],
    }
    try:
        from densemoe.runtime.driver import Driver

        driver = Driver()
        root = ArtifactSet(artifacts)
        manifest = root.for_capability(driver.capability(device))
    except DensemoeError as error:
        document["not_measured"] = str(error)
        return document
    document["device"], document["driver"] = driver.device_name(device), version_text(driver.version())
    keys = sorted(manifest.variants)
    chosen = keys[:: max(1, len(keys) // (LATER + 1))][: LATER + 1]
    fc1 = next((entry.variant for entry in manifest.variants.values() if entry.variant.op == "fc1"), None)
    if fc1 is None or len(chosen) < 2:
        document["not_measured"] = f"the {manifest.arch} set of {root.root} has no FC1 kernel, or one kernel alone: build a profile"
        return document
    task = json.dumps({"artifacts": artifacts, "device": device, "keys": chosen, "dtypes": (fc1.a_dtype, fc1.c_dtype)})
    runs = [json.loads(_run(["-m", "densemoe.runtime.cold", task], bytecode)) for _ in range(processes + 1)][1:]  # likewise

    def each(name: str, scale: float = 1.0) -> list[float]:
        return [run[name] / scale for run in runs]

    def medians(name: str) -> list[float]:
        return [statistics.median(run[name]) for run in runs]

    def first_parts() -> list[dict[str, Any]]:
        return [_row(f"  of it {what}", (run["first_parts"][part] for run in runs), MICRO) for part, what in PARTS.items()]

    def later_parts() -> list[dict[str, Any]]:
        found = []
        for part, what in PARTS.items():
            values = [statistics.median(each[part] for each in run["later_parts"]) for run in runs]
            if any(values):
                found.append(_row(f"  of it {what}", values, MICRO, 50.0 if part == "load" else None))
        return found

    rows += [
        _row("cuda-bindings, cuInit and a context: before densemoe", each("context", 1e3), MILLI),
        _row("first kernel once a context exists, opening the artifact set included", each("first_kernel"), MICRO, 1000.0),
        *first_parts(),
        _row("a later kernel, with hash and ABI check", medians("later_kernels"), MICRO, 150.0),
        *later_parts(),
        _row("the first Plan, with the selection's table", each("plan"), MICRO),
        _row("its first launch", each("first_launch"), MICRO),
        _row("launch of a prepared Plan from Python", medians("launches"), MICRO, 4.0),
    ]
    seconds = _compile_seconds(root.root / manifest.arch, chosen)
    if seconds:
        rows.append(_row("beside it: compiling one of these kernels, on the machine that built them", (s * 1e3 for s in seconds), MILLI, 1000.0))
    _first_layers(document, json.dumps({"artifacts": artifacts, "device": device}), processes, bytecode)
    return document


def _first_layers(document: dict[str, Any], task: str, processes: int, bytecode: str) -> None:
    """Rows of process start to first layer result, ours and Humming's, what is absent, and how many times ours Humming's are."""
    absent: dict[str, str] = document["absent"]
    medians: dict[str, float] = {}

    def measured(which: str, count: int, more: Mapping[str, str] | None = None) -> list[float]:
        found = []
        for _ in range(count):
            start = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            found.append((int(_run(["-m", "densemoe.runtime.first_layer", which, task], bytecode, more).split()[-1]) - start) / 1e6)
        return found

    def add(name: str, what: str, values: Sequence[float]) -> None:
        document["rows"].append(_row(f"{FIRST}, {what}", values, MILLI))
        medians[name] = document["rows"][-1]["median"]

    for name, what in (("runtime", "runtime alone"), ("torch", "with torch")):
        try:
            count = processes if name == "runtime" else min(processes, FEW)
            add(name, what, measured(name, count + 1)[1:])
        except (_Absent, DensemoeError) as error:
            absent[f"{FIRST}, {what}"] = str(error)
    with tempfile.TemporaryDirectory() as cache:
        own = {"HUMMING_CACHE_DIR": str(Path(cache) / "cache"), "HUMMING_TMP_DIR": str(Path(cache) / "tmp")}
        try:
            Path(own["HUMMING_TMP_DIR"]).mkdir()
            add("empty", "Humming, empty cache", measured("humming", 1, own))
            add("warm", "Humming, warm cache", measured("humming", FEW, own))
        except (_Absent, DensemoeError) as error:
            absent[f"{FIRST}, Humming"] = str(error)
    for ours, bar in (("runtime", 10.0), ("torch", 3.0)):
        for other, least in (("empty", bar), ("warm", 1.0)):
            if ours in medians and other in medians:
                times = round(medians[other] / medians[ours], 2)
                what = f"Humming, {other} cache, over {'runtime alone' if ours == 'runtime' else 'densemoe with torch'}"
                document["against"].append({"what": what, "times": times, "bar": least, "met": times > least if least == 1 else times >= least})


def _compile_seconds(folder: Path, keys: Sequence[str]) -> list[float]:
    """Compile seconds of ``keys`` by the build's log, which wheels leave out."""
    from densemoe.runtime.canonical import read_file
    from densemoe.runtime.manifest import LARGEST_MANIFEST

    try:
        log = json.loads(read_file(folder / "build_log.json", LARGEST_MANIFEST))
        return [float(log["compile_seconds"][key]) for key in keys if key in log["compile_seconds"]]
    except (ArtifactError, ValueError, KeyError, TypeError):
        return []


def lines(document: dict[str, Any]) -> list[list[str]]:
    """The document as rows of a table, its header first."""
    table = [["what", "median", "least..most", "bar", "met"]]
    for row in document["rows"]:
        digits = 2 if row["median"] < 10 else 1 if row["unit"] == MILLI else 0
        median, least, most = (f"{row[name]:.{digits}f}" for name in ("median", "least", "most"))
        bar = "" if row["bar"] is None else f"<= {row['bar']:g} {row['unit']}"
        table.append([row["what"], f"{median} {row['unit']}", f"{least}..{most}", bar, {None: "", True: "yes", False: "NO"}[row["met"]]])
    for each in document.get("against", ()):
        bar = f"{'>' if each['bar'] == 1 else '>='} {each['bar']:g} x"
        table.append([each["what"], f"{each['times']} x", "", bar, "yes" if each["met"] else "NO"])
    table += [[what, f"absent: {reason}", "", "", ""] for what, reason in document.get("absent", {}).items()]
    if document["not_measured"] is not None:
        table.append(["first kernel, later kernel, launch", f"not measured: {document['not_measured']}", "", "", ""])
    return table
