"""The ``densemoe`` command: what it prints, as text and as JSON, and its exit codes, on an artifact root with the quick profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver

import densemoe.runtime.driver
from densemoe.compile import matrix
from densemoe.runtime import cli
from densemoe.runtime.errors import DriverUnavailable

TIMEOUTS = [["build", "--timeout", value] for value in ("0", "-1", "nan", "inf", "soon")]
FC1 = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
SHAPE = ["--m", "5", "--experts", "128", "--hidden", "2048", "--intermediate", "768"]
QUICK = sorted(each.variant.key for each in matrix.load().profile("quick"))


class Run:
    """Calls the command; keeps its exit code, output and errors."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(each) for each in arguments])
        said = self.capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("DENSEMOE_ARTIFACTS", raising=False)
    return Run(capsys)


def use_driver(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(densemoe.runtime.driver, "Driver", lambda: FakeDriver(**options))


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> FakeDriver:
        raise DriverUnavailable("no CUDA driver on this machine: install NVIDIA's driver, or run where a GPU is")

    monkeypatch.setattr(densemoe.runtime.driver, "Driver", refuse)


# ---- listings


def test_a_profile_is_listed_before_any_build(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEMOE_ARTIFACTS", str(tmp_path / "none"))
    code, out, _ = run("list", "--profile", "quick", "--json")
    assert code == 0
    rows = json.loads(out)
    assert sorted(row["key"] for row in rows) == QUICK
    assert {"op", "arch", "tile_m", "tile_n", "a_dtype", "c_dtype", "kernel"} <= set(rows[0])
    code, out, _ = run("list", "--profile", "quick")
    assert code == 0
    assert sorted(line.split()[0] for line in out.splitlines()) == QUICK


def test_list_as_text_and_json_say_the_same(run: Run, artifacts: Path) -> None:
    code, out, _ = run("list", "--artifacts", artifacts, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["key"] for row in rows] == QUICK
    _, out, _ = run("list", "--artifacts", artifacts)
    header, *lines = (line.split() for line in out.splitlines())
    assert header == ["key", "bytes", "registers", "stack", "verified"]
    assert lines == [[row["key"], str(row["size"]), str(row["registers"]), str(row["stack"]), "-"] for row in rows]


def test_show_as_text_and_json_say_the_same(run: Run, artifacts: Path) -> None:
    code, out, _ = run("show", FC1, "--artifacts", artifacts, "--json")
    document = json.loads(out)
    assert code == 0
    _, out, _ = run("show", FC1, "--artifacts", artifacts)
    facts = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if not line.startswith(" ")}
    for name in ("symbol", "file", "size", "sha256", "layout", "registers", "stack", "parameter_bytes"):
        assert facts[name] == str(document[name]), name
    assert facts["key"] == FC1
    offsets = [int(line.split()[0][1:]) for line in out.splitlines() if line.startswith("  +")]
    assert offsets == [offset for offset, _ in document["parameters"]]


def test_verify_as_text_and_json_say_the_same(run: Run, artifacts_copy: Path) -> None:
    assert run("verify", "--artifacts", artifacts_copy)[:2] == (0, f"{artifacts_copy}: 11 cubins are what their manifests say\n")
    (artifacts_copy / "sm_90a" / "left.cubin").write_bytes(b"x")
    cubin = artifacts_copy / "sm_90a" / f"{FC1}.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1])
    code, out, _ = run("verify", "--artifacts", artifacts_copy, "--json")
    document = json.loads(out)
    assert code == 1
    assert document["verified"] == 10
    assert len(document["faults"]) == 2
    code, out, _ = run("verify", "--artifacts", artifacts_copy)
    assert code == 1
    assert [line for line in out.splitlines() if "FAULT" in line] == [f"  FAULT {fault}" for fault in document["faults"]]
    assert "left.cubin is in no manifest" in out
    assert "truncated" in out


def test_explain_names_every_variant_once_with_a_reason(run: Run, artifacts: Path) -> None:
    code, out, _ = run("explain", "fc1", *SHAPE, "--artifacts", artifacts, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["key"] == FC1
    assert (document["bucket"], document["provenance"]) == (8, "measured")
    assert sorted([FC1, *(each["key"] for each in document["rejected"])]) == QUICK
    assert all(each["reason"] for each in document["rejected"])
    code, out, _ = run("explain", "fc1", *SHAPE, "--artifacts", artifacts)
    assert out.splitlines()[0] == FC1
    for each in document["rejected"]:
        assert f"  {each['key']}: {each['reason']}" in out.splitlines()


def test_explain_of_a_forced_variant(run: Run, artifacts: Path) -> None:
    _, out, _ = run("explain", "fc1", *SHAPE, "--variant", FC1, "--artifacts", artifacts, "--json")
    assert json.loads(out)["provenance"] == "forced"
    code, _, error = run("explain", "fc2", *SHAPE, "--variant", FC1, "--artifacts", artifacts)
    assert code == 2
    assert "it is an fc1 kernel, the problem is fc2" in error


# ---- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "nonsense"], 2, "does not parse: write <op>"),
        (["show", "fc1.sm90a.t16x64.c1x1.bf16-bf16"], 2, "`densemoe list` shows what is"),
        (["explain", "fc1", *SHAPE, "--arch", "sm_77"], 2, "architecture 'sm_77' is not known: use one of sm_90a"),
        (["explain", "fc1", *SHAPE, "--a-dtype", "fp32"], 2, "use one of"),
        (["explain", "fc1", *SHAPE, "--out-dtype", "f64"], 2, "use one of"),
        (["explain", "fc1", "--m", "5", "--experts", "2", "--hidden", "100", "--intermediate", "64"], 2, "hidden=100: use a multiple of 64"),
        (["explain", "fc1", "--m", "37", "--experts", "2", "--hidden", "256", "--intermediate", "64"], 2, "which no installed variant has"),
        (["list", "--matrix", "x.yaml"], 2, "--matrix belongs to --profile"),
        (["list", "--profile", "quick"], 2, "--artifacts lists what is built, --profile what a matrix plans"),
    ],
)
def test_wrong_input_is_2_and_says_what_is_allowed(run: Run, artifacts: Path, arguments: list[str], code: int, said: str) -> None:
    found, out, error = run(*arguments, "--artifacts", artifacts)
    assert (found, out) == (code, "")
    assert error.startswith(f"densemoe {arguments[0]}: ")
    assert said in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sm_77"], "architecture 'sm_77' gives no variant of profile 'quick': use one of sm_90a"),
        (["--filter", "nothing*"], "matches none of the 11 variants: `densemoe list --profile quick` shows the keys"),
        (["--matrix", "none.yaml"], "none.yaml"),
    ],
)
def test_a_build_of_nothing_is_2(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    code, _, error = run("build", "--profile", "quick", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert said in error
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["explain", "fc3", *SHAPE], ["build", "--jobs", "0"], ["list", "--colour"], *TIMEOUTS])
def test_a_wrong_command_line_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: densemoe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["list"], ["show", FC1], ["verify"], ["explain", "fc1", *SHAPE], ["run", "fc1", *SHAPE], ["quickstart"], ["doctor"]]
)
@pytest.mark.usefixtures("no_driver")
def test_no_artifacts_is_3(run: Run, tmp_path: Path, command: list[str]) -> None:
    code, out, error = run(*command, "--artifacts", tmp_path / "none")
    assert code == 3
    assert "has no artifacts" in out + error


@pytest.mark.usefixtures("no_driver")
def test_no_driver_is_3(run: Run, artifacts: Path) -> None:
    code, out, error = run("run", "fc1", *SHAPE, "--artifacts", artifacts)
    assert (code, out) == (3, "")
    assert "no CUDA driver on this machine" in error


def test_a_corrupt_root_is_1(run: Run, artifacts_copy: Path) -> None:
    (artifacts_copy / "index.json").write_text("{")
    code, out, error = run("list", "--artifacts", artifacts_copy)
    assert (code, out) == (1, "")
    assert "index.json" in error


def test_an_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "list", interrupted)
    code, _, error = run("list")
    assert code == 130
    assert "interrupted" in error


# ---- doctor


def facts(run: Run, *arguments: str | Path) -> tuple[int, dict[str, str]]:
    code, out, _ = run("doctor", *arguments, "--json")
    document = json.loads(out)
    assert code == (0 if document["usable"] else 3)
    text = run("doctor", *arguments)[1]
    for name, value in document["facts"]:
        assert name in text
        assert value in text
    return code, dict(document["facts"])


@pytest.mark.usefixtures("no_driver")
def test_doctor_without_a_driver(run: Run, artifacts: Path) -> None:
    code, found = facts(run, "--artifacts", artifacts)
    assert code == 3
    assert found["artifacts sm_90a"].startswith("11 variants")
    assert "install NVIDIA's driver" in found["driver"]


def test_doctor_with_a_driver_that_is_too_old(run: Run, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, version=12080)
    code, found = facts(run, "--artifacts", artifacts)
    assert code == 3
    assert found["driver"] == "supports CUDA 12.8"
    assert "NOT served" in found["device 0"]
    assert "need 13.0: update NVIDIA's driver" in found["device 0"]


def test_doctor_without_artifacts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch)
    code, found = facts(run, "--artifacts", tmp_path)
    assert code == 3
    assert "densemoe build" in found["artifacts"]
    assert "compute capability 9.0" in found["device 0"]


def test_doctor_with_one_device_served_and_one_not(run: Run, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, capabilities=((9, 0), (10, 3)))
    code, found = facts(run, "--artifacts", artifacts)
    assert code == 0
    assert found["device 0"].endswith("served by the sm_90a set (built for exactly this)")
    assert "NOT served" in found["device 1"]
    assert " rules (" in found["selection sm_90a"]


def test_doctor_says_why_this_root_and_this_set(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "{kernel: sm90_quantize, op: quantize, arch: sm_100f, tile: 1x2048, cluster: 1x1, a_dtype: bf16, b_dtype: nvfp4, c_dtype: nvfp4}"
    (tmp_path / "m.yaml").write_text(f"schema: 1\nentries:\n  - {entry}\nprofiles:\n  full: {{variants: 1}}\n")
    root = tmp_path / "root"
    assert run("build", "--matrix", tmp_path / "m.yaml", "--out", root)[0] == 0
    use_driver(monkeypatch, capabilities=((10, 3),))
    _, found = facts(run, "--artifacts", root)
    assert found["artifact root"] == f"{root}: the path that was given"
    assert found["device 0"].endswith("served by the sm_100f set (a family's, for 10.0 and 10.3; no exact set is there)")
    monkeypatch.setenv("DENSEMOE_ARTIFACTS", str(root))
    assert facts(run)[1]["artifact root"] == f"{root}: DENSEMOE_ARTIFACTS names it"
