"""Verification records: written by the launch oracle, kept by later builds, remade where packing changed; and the check of a cubin by itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from densemoe.compile import build, matrix, oracle, recheck, verification
from densemoe.runtime import cli
from densemoe.runtime.errors import BuildError
from densemoe.runtime.folder import LOCK_NAME
from densemoe.runtime.loader import ArtifactSet

KEY = "fc2.sm90a.t8x64.c1x1.bf16-bf16"
PLANNED = {each.variant.key: each for each in matrix.load().profile("quick")}

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="the oracle links host code with a C compiler, and there is none")


def records(root: Path) -> dict[str, list[dict[str, Any]]]:
    manifest = ArtifactSet(root).manifest("sm_90a")
    return {key: [dict(each) for each in entry.verification] for key, entry in manifest.variants.items()}


@needs_cc
def test_records_are_written_once_and_kept(artifacts_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in (artifacts_copy / "sm_90a").glob("*.cubin")}
    done, failures = verification.record_oracle(artifacts_copy, [PLANNED[KEY]], jobs=1)
    assert (list(done), failures) == ([KEY], [])
    (record,) = records(artifacts_copy)[KEY]
    parameters = ArtifactSet(artifacts_copy).manifest("sm_90a").variants[KEY].parameters
    assert done[KEY] == parameters  # the mask: every byte of every parameter, padding alone is left out
    compared = sum(size for _, size in parameters)
    counts = {"launches": 3, "parameters": len(parameters), "compared_bytes": compared}
    assert record == {"kind": "oracle", "sources": verification.sources(), **counts}
    assert {path.name: path.read_bytes() for path in (artifacts_copy / "sm_90a").glob("*.cubin")} == before
    assert cli.main(["verify", "--artifacts", str(artifacts_copy)]) == 0
    assert verification.record_oracle(artifacts_copy, [PLANNED[KEY]]) == ({}, [])
    assert build.build(matrix.load(), artifacts_copy, profile="quick").built == []
    assert records(artifacts_copy)[KEY] == [record]
    capsys.readouterr()
    assert cli.main(["list", "--artifacts", str(artifacts_copy), "--json"]) == 0
    listed = {row["key"]: row["verification"] for row in json.loads(capsys.readouterr().out)}
    assert listed == {key: [record] if key == KEY else [] for key in PLANNED}


@needs_cc
def test_the_command_prints_the_mask_of_compared_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", "--profile", "quick", "--filter", KEY, "--oracle", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    parameters = ArtifactSet(tmp_path).manifest("sm_90a").variants[KEY].parameters
    said = capsys.readouterr().out
    assert f"mask of {KEY} (offset+bytes): " + " ".join(f"{offset}+{size}" for offset, size in parameters) + "\n" in said
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] == {}  # recorded before: not compared again


@needs_cc
def test_a_record_of_other_packing_is_made_again(artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verification.write_records(artifacts_copy, {"sm_90a": {KEY: {"kind": "oracle", "sources": "0" * 64}}})
    assert verification.record_oracle(artifacts_copy, [PLANNED[KEY]], jobs=1)[0].keys() == {KEY}
    (record,) = records(artifacts_copy)[KEY]
    assert record["sources"] == verification.sources()


def test_other_kinds_of_records_stay(artifacts_copy: Path) -> None:
    emulated = {"kind": "emulated", "cases": 4}
    verification.write_records(artifacts_copy, {"sm_90a": {KEY: emulated}})
    verification.write_records(artifacts_copy, {"sm_90a": {KEY: {"kind": "oracle", "launches": 3}}})
    assert records(artifacts_copy)[KEY] == [emulated, {"kind": "oracle", "launches": 3}]
    document = json.loads((artifacts_copy / "sm_90a" / "manifest.json").read_text())
    schema = json.loads((Path(verification.__file__).parents[1] / "artifacts" / "schema" / "manifest.schema.json").read_text())
    jsonschema.validate(document, schema)


def test_a_launch_that_differs_gives_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = PLANNED[KEY]
    problem = oracle.shapes(planned.variant)[0]
    comparison = oracle.Comparison(KEY, problem, ((0, 8),), ["grid: recipe (1, 1, 1), compiler (2, 1, 1)"])
    monkeypatch.setattr(oracle, "compare", lambda *a, **k: [comparison])
    with pytest.raises(BuildError, match=r"not the compiler's: .*grid: recipe \(1, 1, 1\), compiler \(2, 1, 1\)"):
        verification.oracle_record(planned)


def test_a_second_writer_is_kept_out(artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    class Pool:
        def __init__(self, *arguments: Any, **options: Any) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None: ...
        def map(self, function: Any, items: list[Any]) -> list[tuple[dict[str, Any], verification.Mask, str]]:
            return [({"kind": "oracle"}, (), "") for _ in items]

    monkeypatch.setattr(verification.concurrent.futures, "ProcessPoolExecutor", Pool)
    with (artifacts_copy / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match="another build works"):
            verification.record_oracle(artifacts_copy, [PLANNED[KEY]])
    assert records(artifacts_copy)[KEY] == []


# ---- the cubin by itself


def entry_and_image(root: Path) -> tuple[Any, bytes, str]:
    artifacts = ArtifactSet(root)
    manifest = artifacts.manifest("sm_90a")
    entry = manifest.variants[KEY]
    _ = entry.variant, entry.recipe
    fields = {name: getattr(entry, name) for name in type(entry).__dataclass_fields__}
    return type(entry)(**fields), artifacts.image(entry), manifest.toolchain["ptxas"]


def test_a_built_cubin_agrees_with_its_entry(artifacts: Path) -> None:
    assert recheck.recheck(*entry_and_image(artifacts)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 255}, "registers"),
        ({"stack": 8}, "stack 0, the manifest says 8"),
        ({"static_smem": 0}, "static shared memory"),
        ({"parameter_bytes": 4}, "parameter bytes"),
        ({"audit": {}}, "code bytes"),
    ],
)
def test_an_entry_that_says_otherwise_is_a_fault(artifacts: Path, change: dict[str, Any], said: str) -> None:
    entry, image, ptxas = entry_and_image(artifacts)
    (fault,) = recheck.recheck(replace(entry, **change), image, ptxas)
    assert said in fault


def test_another_kernels_cubin_and_another_assembler_are_faults(artifacts: Path) -> None:
    entry, image, ptxas = entry_and_image(artifacts)
    other = ArtifactSet(artifacts)
    faults = recheck.recheck(entry, other.image(other.manifest("sm_90a").variants["fc1.sm90a.t8x64.c1x1.nvfp4-nvfp4"]), ptxas)
    assert any("symbol" in fault for fault in faults)
    assert recheck.recheck(entry, image, "another") == [f"{KEY}.cubin: assembler {ptxas}, the manifest says another"]
    assert "not a cubin that can be read" in recheck.recheck(entry, b"text", ptxas)[0]
