"""Does this wheel fit that machine: three states, each with its reason and what to do, without a GPU and without loading a kernel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from densemoe.runtime import check, cli
from densemoe.runtime.errors import ProblemError

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
    assert "sm_103a or sm_100f" in verdict.findings[0].remedy


def test_a_device_that_no_architecture_serves(artifacts: Path, tmp_path: Path) -> None:
    path = tmp_path / "a100.json"
    path.write_text(json.dumps({"schema": 1, "name": "NVIDIA A100", "compute_capability": [8, 0], "driver": 13000}))
    verdict = check.check_device(check.profile(str(path)), artifacts)
    assert "no architecture for compute capability 8.0" in verdict.findings[0].remedy


def test_a_quick_set_runs_but_not_optimally(artifacts: Path) -> None:
    verdict = check.check_device(check.profile("h200"), artifacts)
    assert verdict.state == check.NOT_OPTIMAL
    assert any("locked variants are not installed" in reason for reason in states(verdict))
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
