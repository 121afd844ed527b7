"""``densemoe bench startup`` on a libcuda that answers and does nothing: every figure is there, beside its bar, from fresh processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from densemoe.runtime import cold, startup
from densemoe.runtime.cold import PARTS, Parts
from densemoe.runtime.errors import DensemoeError

BARS = {100.0: "import densemoe.runtime", 1000.0: "first kernel", 150.0: "a later kernel", 50.0: "cuLibraryLoadData", 4.0: "launch of a"}


@pytest.fixture(scope="session")
def stub_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stub's ``libcuda.so.1``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the stub driver is compiled, and there is no C compiler")
    folder = tmp_path_factory.mktemp("stub")
    source = Path(__file__).parent / "stub_driver.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", source], check=True)
    return folder


def bench(root: Path | None, libraries: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DENSEMOE")}
    command = [sys.executable, "-m", "densemoe.runtime.cli", "bench", "startup", *(["--artifacts", str(root)] if root else []), *arguments]
    return subprocess.run(
        command, env={**kept, "LD_LIBRARY_PATH": str(libraries), **environment}, capture_output=True, text=True, check=False, timeout=120
    )


def test_each_bar_has_its_own_figure(artifacts: Path, stub_driver: Path) -> None:
    done = bench(artifacts, stub_driver, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["device"], found["driver"], found["processes"], found["not_measured"]) == ("Stub", "13.0", 7, None)
    rows: list[dict[str, Any]] = found["rows"]
    for bar, said in BARS.items():
        (row,) = [each for each in rows if each["bar"] == bar and each["what"].strip().removeprefix("of it ").startswith(said)]
        assert 0 < row["least"] <= row["median"] <= row["most"]
        assert (row["values"], row["met"]) == (7, row["median"] <= bar)
    names = [row["what"] for row in rows]
    for whole, parts in (("first kernel", list(PARTS.values())), ("a later kernel", [what for part, what in PARTS.items() if part != "open"])):
        place = next(i for i, name in enumerate(names) if name.startswith(whole))
        split = rows[place + 1 : place + 1 + len(parts)]
        assert [row["what"] for row in split] == [f"  of it {what}" for what in parts]
        assert all(0 < row["least"] < rows[place]["median"] for row in split)
        assert rows[place]["median"] / 2 < sum(row["median"] for row in split) < rows[place]["median"] * 2
    assert any(row["what"].startswith("beside it: compiling") for row in rows)
    (alone,) = [row for row in rows if row["what"] == "process start to first layer result, runtime alone"]
    assert alone["values"] == 7
    assert alone["median"] > next(row for row in rows if row["what"].startswith("cuda-bindings"))["median"]
    assert set(found["absent"]) == {"process start to first layer result, with torch", "process start to first layer result, Humming"}
    assert "humming-kernels is not installed" in found["absent"]["process start to first layer result, Humming"]
    assert found["against"] == []


def test_parts_are_summed_and_what_is_left_is_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cold.time, "perf_counter", lambda: now[0])

    class Reader:
        def read(self, seconds: float, *, fail: bool = False) -> float:
            now[0] += seconds
            if fail:
                raise OSError
            return seconds

    parts = Parts()
    parts.watch("read", Reader, "read")
    reader = Reader()
    assert reader.read(1e-6) == 1e-6
    with pytest.raises(OSError):  # noqa: PT011 - what it says does not matter
        reader.read(2e-6, fail=True)
    found = parts.take(10.0)
    assert list(found) == list(PARTS)
    assert (found["read"], found["rest"], found["load"]) == (pytest.approx(3.0), pytest.approx(7.0), 0.0)
    assert parts.take(1.0) == {**dict.fromkeys(PARTS, 0.0), "rest": 1.0}


def test_the_table_says_the_same(artifacts: Path, stub_driver: Path) -> None:
    done = bench(None, stub_driver, DENSEMOE_ARTIFACTS=str(artifacts))
    assert done.returncode == 0, done.stderr
    for bar in ("<= 100 ms", "<= 1000 us", "<= 150 us", "<= 50 us", "<= 4 us"):
        assert bar in done.stdout
    assert "medians over 7 fresh processes" in done.stdout
    assert "Stub, driver for CUDA 13.0" in done.stdout


def test_without_a_driver_only_the_import_is_measured(artifacts: Path, tmp_path: Path) -> None:
    done = bench(artifacts, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["bar"] for row in found["rows"]] == [100.0]
    assert "no CUDA driver on this machine" in found["not_measured"]


def test_a_process_that_fails_says_why(artifacts_copy: Path, stub_driver: Path) -> None:
    for path in (artifacts_copy / "sm_90a").glob("*.cubin"):
        path.write_bytes(path.read_bytes()[:-1])
    done = bench(artifacts_copy, stub_driver)
    assert done.returncode == 1
    assert "a measured process failed: densemoe.runtime.errors.ArtifactCorrupt" in done.stderr


def test_figures_are_medians_and_bars_are_met_or_not() -> None:
    row = startup._row("x", [3.0, 1.0, 2.0, 100.0, 2.5], "us", 2.4)
    assert (row["median"], row["least"], row["most"], row["values"], row["met"]) == (2.5, 1.0, 100.0, 5, False)
    assert startup._row("x", [1.0], "us")["met"] is None
    table = startup.lines({"rows": [row], "not_measured": "why"})
    assert table[1][-1] == "NO"
    assert table[-1][1] == "not measured: why"
    assert {len(line) for line in table} == {5}


def test_humming_is_measured_with_an_empty_and_a_warm_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[str] = []
    slept = {"runtime": 1.0, "torch": 3.0, "humming": 20.0}

    def run(arguments: list[str], bytecode: str, more: dict[str, str] | None = None) -> str:
        which = arguments[2]
        clock = startup.time.clock_gettime_ns(startup.time.CLOCK_MONOTONIC)
        seconds = slept[which]
        if which == "humming":
            assert more is not None
            caches.append(more["HUMMING_CACHE_DIR"])
            seconds /= 1 if len(caches) == 1 else 10
        return f"a line of somebody's\n{clock + int(seconds * 1e9)}\n"

    monkeypatch.setattr(startup, "_run", run)
    document: dict[str, Any] = {"rows": [], "absent": {}, "against": [], "not_measured": None}
    startup._first_layers(document, "{}", 2, "")
    assert document["absent"] == {}
    assert [round(row["median"] / 1e3, 1) for row in document["rows"]] == [1.0, 3.0, 20.0, 2.0]
    assert len(caches) == 4
    assert len(set(caches)) == 1
    found = {each["what"]: (round(each["times"], 1), each["bar"], each["met"]) for each in document["against"]}
    assert found == {
        "Humming, empty cache, over runtime alone": (20.0, 10.0, True),
        "Humming, warm cache, over runtime alone": (2.0, 1.0, True),
        "Humming, empty cache, over densemoe with torch": (6.7, 3.0, True),
        "Humming, warm cache, over densemoe with torch": (0.7, 1.0, False),
    }
    table = startup.lines(document)
    assert [line[-1] for line in table[-4:]] == ["yes", "yes", "yes", "NO"]
    assert {len(line) for line in table} == {5}


def test_a_measured_process_is_a_fresh_one(tmp_path: Path) -> None:
    said = startup._run(["-c", "import os, sys; print(os.getpid(), sys.pycache_prefix, sys.dont_write_bytecode)"], str(tmp_path)).split()
    assert int(said[0]) != os.getpid()
    assert said[1:] == [str(tmp_path), "False"]
    with pytest.raises(DensemoeError, match="exit code 3"):
        startup._run(["-c", "raise SystemExit(3)"], str(tmp_path))
