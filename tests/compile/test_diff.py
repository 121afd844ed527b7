"""What two sets differ in: keys, sizes, sections of a cubin, toolchain, selection; from folders and from wheels."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densemoe.compile import diff, package
from densemoe.compile.elf import read_sections
from densemoe.runtime import cli
from densemoe.runtime.errors import ArtifactError, ArtifactNotFound, ManifestError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.manifest import Index, IndexEntry, Manifest
from densemoe.runtime.wheels import extract

KEY = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
OTHER = "fc2.sm90a.t8x64.c1x1.bf16-bf16"


def rewrite(root: Path, manifest: Manifest) -> None:
    data = manifest.to_bytes()
    (root / "sm_90a" / "manifest.json").write_bytes(data)
    (root / "index.json").write_bytes(Index({"sm_90a": IndexEntry.of("sm_90a", data, len(manifest.variants))}).to_bytes())


def load(root: Path) -> Manifest:
    return Manifest.from_bytes((root / "sm_90a" / "manifest.json").read_bytes(), "m")


def pack(root: Path, path: Path, selection: dict[str, object] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, f"densemoe/artifacts/built/{file.relative_to(root)}")
        if selection is not None:
            archive.writestr("densemoe/artifacts/selection/sm_90a.json", json.dumps(selection))
    return path


def test_a_set_equals_itself_and_its_wheel(artifacts: Path, tmp_path: Path) -> None:
    wheel = pack(artifacts, tmp_path / "x-1-py3-none-any.whl")
    for first, second in ((artifacts, artifacts), (artifacts, wheel), (wheel, wheel)):
        found = diff.compare(first, second)
        assert not found.different
        assert found.equal == len(load(artifacts).variants) >= 4


def test_every_kind_of_change_is_listed(artifacts: Path, artifacts_copy: Path) -> None:
    manifest = load(artifacts_copy)
    image = bytearray((artifacts_copy / "sm_90a" / f"{KEY}.cubin").read_bytes())
    code = next(data for name, data in read_sections(bytes(image)).items() if name.startswith(".text"))
    image[image.index(code) + 8] ^= 1
    (artifacts_copy / "sm_90a" / f"{KEY}.cubin").write_bytes(image)
    entries = dict(manifest.variants)
    entries[KEY] = dataclasses.replace(entries[KEY], sha256=hashlib.sha256(image).hexdigest(), registers=200, stack=16)
    del entries[OTHER]
    toolchain = {**manifest.toolchain, "ptxas": "another"}
    rewrite(artifacts_copy, dataclasses.replace(manifest, variants=entries, toolchain=toolchain, minimum_driver=13010))
    found = diff.compare(artifacts, artifacts_copy)
    assert found.removed == [OTHER]
    assert found.added == []
    assert list(found.changed) == [KEY]
    assert found.changed[KEY]["registers"] == (load(artifacts).variants[KEY].registers, 200)
    assert found.changed[KEY]["stack"] == (0, 16)
    assert found.changed[KEY]["sections"] == [".text.<kernel>"]
    assert found.sets["sm_90a"]["ptxas"] == (manifest.toolchain["ptxas"], "another")
    assert found.sets["sm_90a"]["minimum driver"] == (13000, 13010)
    assert diff.compare(artifacts_copy, artifacts).added == [OTHER]


def test_selection_rules_are_compared(artifacts: Path, tmp_path: Path) -> None:
    table = json.loads((Path(__file__).resolve().parents[2] / "artifacts" / "selection" / "sm_90a.json").read_text())
    one = pack(artifacts, tmp_path / "a.whl", table)
    two = pack(artifacts, tmp_path / "b.whl", {**table, "rules": table["rules"][1:]})
    found = diff.compare(one, two)
    assert found.selection == {"sm_90a": {"added": [], "removed": [json.dumps(table["rules"][0], sort_keys=True)]}}


def test_exit_codes_and_json(artifacts: Path, artifacts_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", str(artifacts), str(artifacts)]) == 0
    manifest = load(artifacts_copy)
    rewrite(artifacts_copy, dataclasses.replace(manifest, variants={KEY: manifest.variants[KEY]}))
    capsys.readouterr()
    assert cli.main(["diff", str(artifacts), str(artifacts_copy), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 10
    assert cli.main(["diff", str(artifacts), str(tmp_path / "none")]) == 2
    assert cli.main(["diff", str(artifacts), str(tmp_path / "none.whl")]) == 2


def test_a_cubin_that_is_not_its_manifests_is_not_compared(artifacts: Path, artifacts_copy: Path) -> None:
    manifest = load(artifacts_copy)
    changed = dataclasses.replace(manifest.variants[KEY], sha256="0" * 64)
    rewrite(artifacts_copy, dataclasses.replace(manifest, variants={**manifest.variants, KEY: changed}))
    assert cli.main(["diff", str(artifacts), str(artifacts_copy)]) == 2


# ---- wheels are not trusted


@pytest.mark.parametrize("name", ["densemoe/artifacts/built/../../evil", "densemoe/artifacts/built/..\\evil"])
def test_members_that_escape_are_refused(artifacts: Path, tmp_path: Path, name: str) -> None:
    wheel = pack(artifacts, tmp_path / "x.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ManifestError, match="leaves its folder"):
        extract(wheel, tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_links_doubles_bombs_and_garbage_are_refused(artifacts: Path, tmp_path: Path) -> None:
    wheel = pack(artifacts, tmp_path / "link.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        link = zipfile.ZipInfo("densemoe/artifacts/built/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ManifestError, match="no regular file"):
        extract(wheel, tmp_path / "out")
    wheel = pack(artifacts, tmp_path / "double.whl")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("densemoe/artifacts/built/index.json", b"{}")
    with pytest.raises((ManifestError, ArtifactNotFound), match=r"artifact roots|stands twice"):
        extract(wheel, tmp_path / "out2")
    wheel = pack(artifacts, tmp_path / "bomb.whl")
    with zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("densemoe/artifacts/built/sm_90a/x.cubin", bytes((16 << 20) + 1))
    with pytest.raises(ManifestError, match="at most"):
        extract(wheel, tmp_path / "out3")
    wheel = tmp_path / "packed.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("densemoe/artifacts/built/index.json", b"{}" * 1000)
    with pytest.raises(ManifestError, match="wheels store or deflate"):
        extract(wheel, tmp_path / "out5")
    wheel = pack(artifacts, tmp_path / "both.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("densemoe/artifacts/built/index.json/inside", b"x")
    with pytest.raises(ManifestError, match=r"index\.json stands for a file and for a folder"):
        extract(wheel, tmp_path / "out6")
    (tmp_path / "garbage.whl").write_bytes(b"PK garbage")
    with pytest.raises(ManifestError, match="not a wheel"):
        extract(tmp_path / "garbage.whl", tmp_path / "out4")


@pytest.mark.parametrize(
    "table",
    ["[]", "1", '{"rules": 1}', '{"shapes": {"x": [[1, 5]]}, "keys": []}', '{"shapes": []}', '{"model": 1}', "[" * 100_000],
    ids=lambda table: table[:12],
)
def test_a_wheel_with_a_faulty_selection_table(artifacts: Path, tmp_path: Path, table: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = pack(artifacts, tmp_path / "a.whl", {"rules": []})
    bad = pack(artifacts, tmp_path / "b.whl")
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("densemoe/artifacts/selection/sm_90a.json", table)
    assert cli.main(["diff", str(good), str(bad)]) == 2
    assert "is no selection table" in capsys.readouterr().err


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4))
def test_a_damaged_wheel_is_read_or_refused(small_wheel: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    """Whatever happened to its bytes: one kind of error, nothing outside the folder, and what comes out is what a manifest names or is refused."""
    for place, dropped, text in edits:
        at = len(small_wheel) - 1 - place % min(len(small_wheel), 1500)  # most often where the archive's directory lies
        small_wheel = small_wheel[:at] + text + small_wheel[at + dropped :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "inside"
        with contextlib.suppress(ArtifactError):
            root = extract(Path("x.whl"), folder, small_wheel)
            found = ArtifactSet(root)
            for arch in found.architectures:
                for entry in found.manifest(arch).variants.values():
                    found.image(entry)
        assert {path.name for path in Path(name).iterdir()} <= {"inside"}


@pytest.fixture(scope="module")
def small_wheel(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A wheel of one variant."""
    folder = tmp_path_factory.mktemp("small")
    package.stage(artifacts, folder / "built", [KEY])
    return pack(folder / "built", folder / "x.whl", {"rules": []}).read_bytes()
