"""The quick start without a GPU: a layer on the emulator, said to be emulated; what did not run; and a fault that is not passed over."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import densemoe.runtime.driver
from densemoe.compile.emulate import quickstart as emulated
from densemoe.runtime import cli
from densemoe.runtime.errors import DriverUnavailable, EmulatorError

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command on a machine without a driver: exit code and output."""

    def refuse() -> Any:
        raise DriverUnavailable("no CUDA driver on this machine")

    monkeypatch.delenv("DENSEMOE_ARTIFACTS", raising=False)
    monkeypatch.setattr(densemoe.runtime.driver, "Driver", refuse)

    def call(*arguments: object) -> tuple[int, str]:
        code = cli.main(["quickstart", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that takes a second."""
    for name, value in (("EXPERTS", 3), ("HIDDEN", 256), ("INTERMEDIATE", 64)):
        monkeypatch.setattr(emulated, name, value)


def test_the_layer_runs_on_the_emulator_and_says_so(run: Run, artifacts: Path) -> None:
    code, out = run("--artifacts", artifacts)
    assert code == 0
    assert "EMULATED: no GPU here can run the artifacts" in out
    assert re.search(r"FC1 fc1\.sm90a\.t8x64\.c1x1\.bf16-bf16: worst error 0\.[0-9]+ of its bound", out)
    assert re.search(r"FC2 fc2\.sm90a\.t8x64\.c1x1\.bf16-bf16: worst error 0\.[0-9]+ of its bound", out)
    assert "NOT run: the machine code that ptxas made" in out
    assert "11 cubins are what their manifests say" in out
    assert out.endswith("PASS (emulated)\n")


@pytest.mark.usefixtures("small")
def test_json_says_the_same(run: Run, artifacts: Path) -> None:
    code, out = run("--artifacts", artifacts, "--a-dtype", "nvfp4", "--m", "1", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["passed"]
    assert document["layer"]["emulated"]
    assert document["layer"]["fc2"]["key"] == "fc2.sm90a.t8x64.c1x1.nvfp4-bf16"
    assert document["layer"]["fc1"]["products"]["mma.sync"] > 0
    assert 0 < document["layer"]["fc2"]["worst"] <= 1
    assert document["files"]["verified"] == 11


def test_without_the_build_side_it_says_that_nothing_ran(run: Run, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "densemoe.compile.emulate.quickstart", None)
    code, out = run("--artifacts", artifacts)
    assert code == 0
    assert "The layer was NOT run, and not emulated either: the emulator needs the extra [build]" in out
    assert "11 cubins are what their manifests say" in out
    assert "PASS" not in out


def test_what_no_built_variant_runs_is_said(run: Run, artifacts: Path) -> None:
    code, out = run("--artifacts", artifacts, "--m", "64")
    assert code == 0
    assert "The layer was NOT run, and not emulated either:" in out


def test_a_fault_of_a_kernel_fails(run: Run, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise EmulatorError("PTX line 7: race")

    monkeypatch.setattr(emulated, "launch_recipe", faulty)
    code, out = run("--artifacts", artifacts)
    assert code == 1
    assert "PTX line 7: race" in out
    assert "PASS" not in out


@pytest.mark.usefixtures("small")
def test_wrong_outputs_fail(run: Run, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = emulated.launch_recipe

    def wrong(ptx: str, recipe: Any, names: Any, tensors: Any, outputs: Any, **options: Any) -> Any:
        found = real(ptx, recipe, names, tensors, outputs, **options)
        if "c" in outputs and names["N_out"] == emulated.HIDDEN:
            outputs["c"][0, 0] ^= 0x4000
        return found

    monkeypatch.setattr(emulated, "launch_recipe", wrong)
    code, out = run("--artifacts", artifacts)
    assert code == 1
    assert out.endswith("FAIL\n")


def test_a_set_of_other_sources_is_not_emulated_in_its_place(run: Run, artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PTX must be the one of the very cubin in the set."""
    real = emulated.regenerate
    monkeypatch.setattr(emulated, "regenerate", lambda work: real((work[0], "0" * 64)))
    code, out = run("--artifacts", artifacts_copy)
    assert code == 1
    assert "the set holds 000000000000" in out
