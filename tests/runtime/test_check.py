"""Does this wheel fit that machine: three states, each with its reason and what to do, without a GPU and without loading a kernel."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from densemoe.compile import locking
from densemoe.runtime import check, cli, driver, loader
from densemoe.runtime.errors import DriverUnavailable, ProblemError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.lock import Lock
from densemoe.runtime.variant import Variant

ROOT = Path(__file__).resolve().parents[2] / "artifacts"


def states(verdict: check.Verdict) -> dict[str, str]:
    return {each.reason: each.state for each in verdict.findings}


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "gb200", "b300", "gb300"])
def test_profiles_of_the_shipped_devices_follow_their_schema(name: str) -> None:
    document = json.loads((ROOT / "devices" / f"{name}.json").read_text())
    jsonschema.validate(document, json.loads((ROOT / "schema" / "device.schema.json").read_text()))
    assert name in check.profile_names()
    device = check.profile(name)
    assert device.capability == tuple(document["compute_capability"])
    assert device.driver == document["driver"]


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_a_device_with_a_set_is_not_invalid(artifacts: Path, name: str) -> None:
    verdict = check.check_device(check.profile(name), artifacts)
    assert verdict.arch == "sm_90a"
    assert verdict.state != check.INVALID


def test_an_old_driver_is_invalid_and_says_which_is_needed(artifacts: Path) -> None:
    verdict = check.check_device(check.profile("h200", check.parse_version("12.8")), artifacts)
    assert verdict.state == check.INVALID
    (finding,) = [each for each in verdict.findings if each.state == check.INVALID]
    assert "supports CUDA 12.8" in finding.reason
    assert "update NVIDIA's driver to one for CUDA 13.0" in finding.remedy


def test_a_device_without_a_set_is_invalid_and_says_what_to_install(artifacts: Path) -> None:
    verdict = check.check_device(check.profile("b300"), artifacts)
    assert verdict.state == check.INVALID
    assert "compute capability 10.3" in verdict.findings[0].reason
    assert verdict.findings[0].remedy == "install a wheel with artifacts for sm_100f, or run `densemoe build --arch sm_100f`"


def test_a_device_that_no_architecture_serves(artifacts: Path, tmp_path: Path) -> None:
    path = tmp_path / "a100.json"
    path.write_text(json.dumps({"schema": 1, "name": "NVIDIA A100", "compute_capability": [8, 0], "driver": 13000}))
    verdict = check.check_device(check.profile(str(path)), artifacts)
    assert "no architecture for compute capability 8.0" in verdict.findings[0].remedy


@pytest.fixture
def released(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As if the quick set were a whole release, with a table of measurements on an H200; the table, to be changed."""
    found = ArtifactSet(artifacts)
    cubins = {key: locking.locked_cubin(entry, found.image(entry)) for key, entry in found.manifest("sm_90a").variants.items()}
    whole = dataclasses.replace(Lock.read(), cubins=cubins)
    monkeypatch.setattr(check.Lock, "read", lambda path=None: whole)
    rules = [{"op": op, "tile": [8, 64], "cluster": [1, 1], "provenance": "measured", "reason": "fastest"} for op in ("fc1", "fc2")]
    table = {"provenance": {"device": "NVIDIA H200"}, "rules": [{**rule, "m_from": 0, "m_to": 1 << 20} for rule in rules]}
    monkeypatch.setattr(check, "load_table", lambda arch, capability: table)
    return table


def test_a_whole_set_with_measured_choices_is_valid(released: dict[str, Any], artifacts: Path) -> None:
    verdict = check.check_device(check.profile("h200"), artifacts)
    assert (verdict.state, verdict.findings) == (check.VALID, [])
    assert verdict.to_json()["state"] == "valid"
    assert cli.main(["check", "--device-profile", "h200", "--strict", "--artifacts", str(artifacts)]) == 0


def test_choices_that_were_measured_on_another_device_are_not_optimal(released: dict[str, Any], artifacts: Path) -> None:
    """H100 and H200 run the same cubins and read memory at other speeds."""
    verdict = check.check_device(check.profile("h100"), artifacts)
    (finding,) = verdict.findings
    assert verdict.state == check.NOT_OPTIMAL
    assert "measured on NVIDIA H200; on NVIDIA H100 80GB HBM3 another may be faster" in finding.reason


def test_rules_that_say_where_they_were_measured_are_judged_each(released: dict[str, Any], artifacts: Path) -> None:
    """As the tables that ship have it: the device stands in the rule."""
    del released["provenance"]
    for rule in released["rules"]:
        rule["device"] = "NVIDIA H200"
    assert check.check_device(check.profile("h200"), artifacts).state == check.VALID
    verdict = check.check_device(check.profile("h100"), artifacts)
    assert verdict.state == check.NOT_OPTIMAL
    assert [each.reason.split(" choices of ")[1] for each in verdict.findings] == [
        f"the {op} kernel were measured on NVIDIA H200; on NVIDIA H100 80GB HBM3 another may be faster" for op in ("fc1", "fc2")
    ]


def test_a_family_set_is_the_best_where_no_exact_one_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """A remedy that nobody can follow is none: sm_100a is named only where the lock has cubins of it."""
    manifest: Any = types.SimpleNamespace(arch="sm_100f")
    assert check._exactness(check.profile("b200"), manifest) == []
    key = "fc1.sm100f.t128x128.c1x1.nvfp4-nvfp4"
    lock = Lock.read()
    exact = dataclasses.replace(Variant.parse(key), arch="sm_100a").key
    monkeypatch.setattr(check.Lock, "read", lambda path=None: dataclasses.replace(lock, cubins={key: lock.cubins[key], exact: lock.cubins[key]}))
    (finding,) = check._exactness(check.profile("b200"), manifest)
    assert finding.remedy == "install or build sm_100a"
    assert check._exactness(check.profile("b300"), manifest) == []


def test_no_driver_is_asked_and_no_kernel_loaded(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(driver.Driver, "__init__", refuse)
    monkeypatch.setattr(loader.Loader, "__init__", refuse)
    assert check.check_device(check.profile("h200"), artifacts).arch == "sm_90a"


def test_devices_of_this_machine(artifacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each device has its own verdict; without a driver the profiles are named, exit code 3."""

    class Two:
        def version(self) -> int:
            return 13000

        def device_count(self) -> int:
            return 2

        def device_name(self, ordinal: int) -> str:
            return ("NVIDIA H200", "NVIDIA B200")[ordinal]

        def capability(self, ordinal: int) -> tuple[int, int]:
            return ((9, 0), (10, 0))[ordinal]

    monkeypatch.setattr(driver, "Driver", Two)
    assert cli.main(["check", "--artifacts", str(artifacts), "--json"]) == 1
    one, two = json.loads(capsys.readouterr().out)
    assert (one["device"]["where"], one["state"]) == ("device 0", "runs but not optimal")
    assert (two["device"]["where"], two["state"]) == ("device 1", "invalid")

    def none() -> None:
        raise DriverUnavailable("no CUDA driver on this machine")

    monkeypatch.setattr(driver, "Driver", none)
    assert cli.main(["check", "--artifacts", str(artifacts)]) == 3
    assert "--device-profile, one of b200, b300, gb200, gb300, h100, h200" in capsys.readouterr().err


def test_a_quick_set_runs_but_not_optimally(artifacts: Path) -> None:
    verdict = check.check_device(check.profile("h200"), artifacts)
    assert verdict.state == check.NOT_OPTIMAL
    assert any("locked variants of sm_90a are not installed" in reason for reason in states(verdict))
    assert all(each.remedy for each in verdict.findings)


def test_damage_is_invalid(artifacts_copy: Path) -> None:
    cubin = next((artifacts_copy / "sm_90a").glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    verdict = check.check_device(check.profile("h200"), artifacts_copy)
    assert verdict.state == check.INVALID
    assert any(cubin.name in reason for reason in states(verdict))
    (artifacts_copy / "sm_90a" / "manifest.json").write_bytes(b"{}")
    assert check.check_device(check.profile("h200"), artifacts_copy).state == check.INVALID
    shutil.rmtree(artifacts_copy)
    verdict = check.check_device(check.profile("h200"), artifacts_copy)
    assert "install a wheel with artifacts" in verdict.findings[0].remedy


def test_exit_codes(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["check", "--artifacts", str(artifacts)]
    assert cli.main([*common, "--device-profile", "h200"]) == 0
    assert cli.main([*common, "--device-profile", "h200", "--strict"]) == 1
    assert cli.main([*common, "--device-profile", "h200", "--device-profile", "b200"]) == 1
    assert cli.main([*common, "--device-profile", "h900"]) == 2
    assert cli.main([*common, "--driver", "12.8"]) == 2
    capsys.readouterr()
    assert cli.main([*common, "--device-profile", "h200", "--driver", "0"]) == 1
    assert "the driver supports CUDA 0.0" in capsys.readouterr().out
    assert cli.main([*common, "--device-profile", "h200", "--driver", ""]) == 2
    capsys.readouterr()
    cli.main([*common, "--device-profile", "h200", "--driver", "12.8", "--json"])
    (document,) = json.loads(capsys.readouterr().out)
    assert document["state"] == "invalid"
    assert document["device"]["driver"] == 12080


@pytest.mark.parametrize("text", ["", "x", "12.10.1", "12.", ".8", "-1", "12.80"])
def test_bad_driver_versions(text: str) -> None:
    with pytest.raises(ProblemError, match=r"as in 12\.8"):
        check.parse_version(text)


@pytest.mark.parametrize(
    "change", [{"compute_capability": [9]}, {"compute_capability": [9, True]}, {"driver": 13.0}, {"driver": 12}, {"name": 3}, {"schema": 9}]
)
def test_faulty_profiles_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"schema": 1, "name": "x", "compute_capability": [9, 0], "driver": 13000, **change}))
    with pytest.raises(ProblemError, match="device profile"):
        check.profile(str(path))
