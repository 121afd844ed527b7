"""The wheel: the same bytes from two trees and from an sdist, exactly its manifests' files, an SBOM, and a load path that needs nothing else.

The quick profile is built; two wheels and an sdist take about half a minute.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from densemoe.compile import matrix, package
from densemoe.runtime.errors import BuildError, ManifestError, MatrixError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.lock import Lock

ROOT = Path(__file__).resolve().parents[2]
QUICK = "cmake.define.DENSEMOE_PROFILE=quick"
Build = Callable[..., "subprocess.CompletedProcess[str]"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_sdist_in_another_tree_builds_the_same_wheel(wheel: Path, tree: Path, tmp_path: Path, build: Build) -> None:
    """Another folder, other file times, another umask and job count; out of the sdist of the first tree."""
    done = build(tree, tmp_path, what="--sdist", SOURCE_DATE_EPOCH="1700000000")
    assert not done.returncode, done.stdout + done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "elsewhere", filter="data")
    assert not [name for name in names if name.endswith(".cubin")]
    (unpacked,) = (tmp_path / "elsewhere").iterdir()
    os.utime(unpacked / "runtime" / "loader.py", (1, 1))
    done = build(unpacked, tmp_path / "second", QUICK, "cmake.define.DENSEMOE_ARCHITECTURES=sm_90a", SOURCE_DATE_EPOCH="1700000000", TZ="Asia/Tokyo")
    assert not done.returncode, done.stdout + done.stderr
    (second,) = (tmp_path / "second").glob("*.whl")
    assert second.name == wheel.name
    if digest(second) != digest(wheel):
        with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(second) as b:
            assert {i.filename: (i.CRC, i.date_time, i.external_attr) for i in a.infolist()} == {
                i.filename: (i.CRC, i.date_time, i.external_attr) for i in b.infolist()
            }
    assert digest(second) == digest(wheel)


def test_building_again_compiles_nothing(tree: Path, wheel: Path, built: Path, tmp_path: Path, build: Build) -> None:
    cubin = next((built / "sm_90a").glob("*.cubin"))
    before = cubin.stat().st_mtime_ns
    done = build(tree, tmp_path, QUICK, f"cmake.define.DENSEMOE_ARTIFACTS={built}", SOURCE_DATE_EPOCH="1700000000")
    assert not done.returncode, done.stdout + done.stderr
    assert cubin.stat().st_mtime_ns == before
    assert digest(next(tmp_path.glob("*.whl"))) == digest(wheel)


def test_the_tag_says_any_machine(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        tags = [line for line in archive.read(_info(archive) + "/WHEEL").decode().splitlines() if line.startswith(("Tag", "Root"))]
    assert tags == ["Root-Is-Purelib: true", "Tag: py3-none-any"]


def _info(archive: zipfile.ZipFile) -> str:
    return next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)


def test_the_wheel_holds_its_manifests_files_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        base = "densemoe/artifacts/built/"
        names = {name.removeprefix(base) for name in archive.namelist() if name.startswith(base)}
        manifest = json.loads(archive.read(base + "sm_90a/manifest.json"))
        listed = {f"sm_90a/{entry['file']}" for entry in manifest["variants"].values()}
        assert names == {"index.json", "sm_90a/manifest.json", *listed}
        for entry in manifest["variants"].values():
            assert hashlib.sha256(archive.read(f"{base}sm_90a/{entry['file']}")).hexdigest() == entry["sha256"]
        assert sorted(manifest["variants"]) == [each.variant.key for each in matrix.load().profile("quick")]
        assert manifest["builder"]["dirty"] is False
        assert Lock.from_bytes(archive.read("densemoe/artifacts/manifest.lock"), "lock") == Lock.read()
        sources = {name for name in archive.namelist() if name.endswith(".py")}
    assert {"densemoe/__init__.py", "densemoe/runtime/loader.py", "densemoe/compile/kernels/sm90_fc1.py"} <= sources


def test_its_record_names_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        record = _info(archive) + "/RECORD"
        rows = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(record).decode()))}
        assert set(rows) == set(archive.namelist())
        for name, stated in rows.items():
            if name != record:
                found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
                assert stated == f"sha256={found}"


def test_licence_and_sbom_lie_in_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = _info(archive)
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        text = archive.read(f"{info}/sboms/{package.SBOM_NAME}").decode()
        bom = json.loads(text)
        manifest = json.loads(archive.read("densemoe/artifacts/built/sm_90a/manifest.json"))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None  # by the schema that CycloneDX publishes
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"SHA-256"', '"sha256"')) is not None
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    assert bom["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bom["serialNumber"])
    tools = {each["name"]: each["version"] for each in bom["metadata"]["tools"]["components"]}
    assert tools["nvidia-cutlass-dsl"] == "4.8.1"
    assert tools["ptxas"] == manifest["toolchain"]["ptxas"]
    hashes = {each["name"].rsplit("/", 1)[-1]: each["hashes"][0]["content"] for each in bom["components"]}
    assert hashes == {entry["file"]: entry["sha256"] for entry in manifest["variants"].values()}
    for each in bom["components"]:
        properties = {item["name"]: item["value"] for item in each["properties"]}
        assert "nvidia-cutlass-dsl 4.8.1" in properties["densemoe:compiler"]
        assert properties["densemoe:assembler"] == manifest["toolchain"]["ptxas"]


# ---- builds that must fail


@pytest.mark.parametrize(
    ("edit", "option", "said"),
    [
        ("", "cmake.define.DENSEMOE_ARCHITECTURES=sm_100f,sm_90", "'sm_90' has no variant|'sm_100f' has no variant"),
        ("budget", QUICK, r"tile 8x64: [0-9,]+ bytes deflated in [0-9]+ cubins, 1,000 are allowed"),
        ("lock", QUICK, r"sha256 000000000000… is locked"),
    ],
)
def test_a_build_that_cannot_be_whole_fails(
    tree: Path, tmp_path: Path, wheel: Path, built: Path, build: Build, edit: str, option: str, said: str
) -> None:
    """A wrong architecture, a budget that is passed and other bytes than the locked ones: no wheel, and the reason in the output."""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy)
    shutil.copytree(built, tmp_path / "artifacts")  # what is built already, so that nothing compiles
    if edit == "budget":
        path = copy / "artifacts" / "size_budget.json"
        budget = json.loads(path.read_text())
        budget["axes"]["tile"] = 1000
        path.write_text(json.dumps(budget))
    if edit == "lock":
        path = copy / "artifacts" / "manifest.lock"
        path.write_text(path.read_text().replace(Lock.read().cubins["fc1.sm90a.t8x64.c1x1.bf16-bf16"].sha256, "0" * 64))
    done = build(copy, tmp_path / "out", option, f"cmake.define.DENSEMOE_ARTIFACTS={tmp_path / 'artifacts'}")
    assert done.returncode
    assert re.search(said, done.stdout + done.stderr)
    assert not list((tmp_path / "out").glob("*.whl"))


def test_staging_takes_what_is_asked_and_refuses_less(artifacts: Path, tmp_path: Path) -> None:
    keys = [each.variant.key for each in matrix.load().profile("quick")]
    package.stage(artifacts, tmp_path / "built", keys[:1])
    assert list(ArtifactSet(tmp_path / "built").manifest("sm_90a").variants) == keys[:1]
    with pytest.raises(BuildError, match="lacks 1 of the 2"):
        package.stage(artifacts, tmp_path / "built", [keys[0], "fc1.sm100f.t128x256.c1x1.nvfp4-nvfp4"])
    with pytest.raises(BuildError, match="lacks 0 of the 0"):
        package.stage(artifacts, tmp_path / "built", [])
    with pytest.raises(MatrixError, match="'sm_90' has no variant"):
        package._keys(matrix.load(), "quick", ["sm_90"])


def test_costs_add_up(artifacts: Path) -> None:
    rows = package.costs(artifacts)
    assert rows[0].axis == "total"
    for axis in ("arch", "op", "tile", "c_dtype", "options"):
        mine = [row for row in rows if row.axis == axis]
        for name in ("count", "size", "deflated"):
            assert sum(getattr(row, name) for row in mine) == getattr(rows[0], name)
    assert rows[0].size == sum(path.stat().st_size for path in artifacts.rglob("*.cubin"))
    assert package.check_budget(rows) == []
    assert package.table(rows).count("\n") == len(rows)


def test_a_budget_that_is_passed_names_the_value(artifacts: Path, tmp_path: Path) -> None:
    budget = json.loads(package.BUDGET.read_text())
    path = tmp_path / "size_budget.json"
    rows = package.costs(artifacts)
    first, *others = [row for row in rows if row.axis == "op"]  # the dearest first
    limit = first.deflated - 1
    path.write_text(json.dumps({**budget, "total": 10, "axes": {**budget["axes"], "op": limit}}))
    total, *over = package.check_budget(rows, path)
    assert total.startswith("total:")
    assert [line.split(":")[0] for line in over] == [f"op {first.value}", *(f"op {row.value}" for row in others if row.deflated > limit)]
    assert f"{limit:,} are allowed" in over[0]
    path.write_text("{}")
    with pytest.raises(ManifestError, match="schema is missing"):
        package.check_budget(package.costs(artifacts), path)
