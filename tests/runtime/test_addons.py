"""Add-on wheels bring architectures that the installed root lacks; they fit by schema and content, and none of their code runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import densemoe.artifacts
from densemoe.runtime import addons
from densemoe.runtime.errors import ArchitectureMismatch, ArtifactCorrupt, ArtifactNotFound, ManifestError
from densemoe.runtime.loader import ArtifactSet

CODE = "raise SystemExit('code of an add-on ran')\n"


def install(site: Path, package: str, root: Path | None, version: str = "9.9", value: str = "") -> Path:
    """An add-on as pip would lay it out; its folder."""
    folder = site / package
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(CODE)
    if root is not None:
        shutil.copytree(root, folder / "built")
    info = site / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{addons.GROUP}]\n{package} = {value or package + ':built'}\n")
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder on the path, and an installed densemoe without artifacts."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.delenv("DENSEMOE_ARTIFACTS", raising=False)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    installed_at(tmp_path / "nowhere", monkeypatch)
    return folder


def installed_at(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed package's artifacts lie in ``package``/built."""
    monkeypatch.setattr(densemoe.artifacts, "__path__", [str(package)])


def test_an_addon_serves_what_the_installed_root_lacks(site: Path, artifacts: Path) -> None:
    folder = install(site, "densemoe_hopper", artifacts, version="0.0.1")
    found = ArtifactSet()
    assert found.root == folder / "built"
    manifest = found.for_capability((9, 0))
    for entry in manifest.variants.values():
        assert found.image(entry)


def test_the_installed_root_and_an_addon_together(site: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed root has no set for the device: the add-on's serves, and both are listed."""
    empty = tmp_path / "installed" / "built"
    empty.mkdir(parents=True)
    (empty / "index.json").write_bytes(b'{\n"schema":1,\n"sets":[]\n}\n')
    installed_at(empty.parent, monkeypatch)
    install(site, "densemoe_hopper", artifacts)
    found = ArtifactSet()
    assert found.root == empty
    assert found.architectures == ("sm_90a",)
    for entry in found.for_capability((9, 0)).variants.values():
        assert found.image(entry)
    with pytest.raises(ArchitectureMismatch, match=r"10\.0"):
        found.for_capability((10, 0))


def test_a_given_root_has_no_addons(site: Path, artifacts: Path) -> None:
    install(site, "densemoe_broken", None)
    assert ArtifactSet(artifacts).addons == ()


def test_none_is_looked_for_where_the_installed_root_serves(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DENSEMOE_ARTIFACTS", raising=False)
    (tmp_path / "built").symlink_to(artifacts)
    installed_at(tmp_path, monkeypatch)

    def never() -> list[addons.AddOn]:
        raise AssertionError("installed packages were searched")

    monkeypatch.setattr(addons, "find", never)
    found = ArtifactSet()
    for entry in found.for_capability((9, 0)).variants.values():
        assert found.image(entry)


def test_another_schema_is_refused_and_another_version_is_not(site: Path, artifacts: Path) -> None:
    folder = install(site, "densemoe_hopper", artifacts, version="77.0")
    assert ArtifactSet().architectures == ("sm_90a",)
    index = folder / "built" / "index.json"
    index.write_text(index.read_text().replace('"schema":1', '"schema":9'))
    with pytest.raises(ManifestError, match="schema 9"):
        ArtifactSet()


def test_two_addons_for_one_architecture(site: Path, artifacts: Path) -> None:
    install(site, "densemoe_one", artifacts)
    folder = install(site, "densemoe_two", artifacts)
    assert ArtifactSet().architectures == ("sm_90a",)  # equal content is no conflict
    index = json.loads((folder / "built" / "index.json").read_text())
    index["sets"][0]["sha256"] = "0" * 64
    (folder / "built" / "index.json").write_text(json.dumps(index))
    with pytest.raises((ArtifactCorrupt, ManifestError), match=r"different sets for sm_90a|canonical"):
        ArtifactSet()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("densemoe_addon:..", "has no"),
        ("densemoe_addon:nothing", "has no nothing/index.json"),
        ("a.b:built", "inside a package"),
        ("none_such", "none_such"),
    ],
)
def test_a_faulty_addon_is_named(site: Path, artifacts: Path, value: str, said: str) -> None:
    install(site, "densemoe_addon", artifacts, value=value)
    (site / "index.json").write_bytes(b"{}")
    with pytest.raises(ArtifactNotFound, match=said):
        ArtifactSet()
