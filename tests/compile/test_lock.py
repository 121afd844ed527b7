"""The lock: what stands in it is what is built, and one other byte is found, named and explained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from densemoe.compile import build, environment, locking, matrix, reproduction
from densemoe.runtime import cli
from densemoe.runtime.errors import ManifestError, ToolchainError, VariantError
from densemoe.runtime.lock import Lock, LockedWheel
from densemoe.runtime.manifest import Index, IndexEntry, Manifest
from densemoe.runtime.variant import Variant

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "artifacts" / "schema" / "lock.schema.json"
KEY = "fc1.sm90a.t8x64.c1x1.bf16-bf16"


@pytest.fixture(scope="module")
def lock() -> Lock:
    return Lock.read()


def write_cubin(root: Path, key: str, image: bytes) -> None:
    """Puts ``image`` into a set as a build would have: manifest and index name it."""
    folder = root / "sm_90a"
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m")
    entry = dataclasses.replace(manifest.variants[key], sha256=hashlib.sha256(image).hexdigest(), size=len(image))
    changed = dataclasses.replace(manifest, variants={**manifest.variants, key: entry}).to_bytes()
    (folder / f"{key}.cubin").write_bytes(image)
    (folder / "manifest.json").write_bytes(changed)
    (root / "index.json").write_bytes(Index({"sm_90a": IndexEntry.of("sm_90a", changed, len(manifest.variants))}).to_bytes())


def test_what_is_built_is_what_is_locked(lock: Lock, artifacts: Path) -> None:
    """The quick profile, compiled in this run: both ops, both activation dtypes."""
    assert locking.compare(lock, matrix.load(), "quick", artifacts) == []


def test_a_spread_over_the_whole_profile_is_what_is_locked(lock: Lock, tmp_path: Path) -> None:
    """Every architecture and every op among them, compiled now; one differing byte fails, with its section and likely cause."""
    by_kernel: dict[str, list[str]] = {}
    for key in sorted(lock.cubins):
        variant = Variant.parse(key)
        by_kernel.setdefault(f"{variant.arch} {variant.op}", []).append(key)
    keys = [found[len(found) // 2] for found in by_kernel.values()]
    variation = reproduction.Variation("spread", Path(sys.executable))
    facts = reproduction.rebuild(ROOT, variation, keys, lock.profile, tmp_path / "out")
    outcome = reproduction.judge(reproduction.reference(None, lock), variation, keys, facts, tmp_path / "out")
    assert (outcome.different, outcome.errors) == ([], {})
    assert sorted(outcome.equal) == sorted(keys)


@pytest.mark.full
def test_the_whole_profile_is_what_is_locked(lock: Lock, tmp_path: Path) -> None:
    assert not build.build(matrix.load(), tmp_path).failures
    assert locking.compare(lock, matrix.load(), "full", tmp_path) == []


def test_the_lock_covers_the_full_profile_and_this_toolchain(lock: Lock) -> None:
    assert sorted(lock.cubins) == sorted(each.variant.key for each in matrix.load().profile("full"))
    locking.check_toolchain(lock)


def test_the_lock_states_the_sources_as_they_are(lock: Lock) -> None:
    """Equal cubins from changed sources count too: every later difference would be blamed on those sources."""
    stale = locking.stale_sources(lock, matrix.load())
    assert not stale, f"compile/kernels/{{{','.join(stale)}}}.py or what they import changed: run `densemoe lock`"
    aged = dataclasses.replace(lock, kernels={**lock.kernels, "sm90_fc1": "0" * 16})
    assert locking.stale_sources(aged, matrix.load()) == ["sm90_fc1"]


def test_the_lock_is_canonical_small_and_follows_its_schema(lock: Lock) -> None:
    data = lock.to_bytes()
    assert Lock.from_bytes(data, "lock") == lock
    jsonschema.validate(json.loads(data), json.loads(SCHEMA.read_text()))
    lines = [line for line in data.decode().splitlines() if line.startswith(f'"{KEY}"')]
    assert len(lines) == 1  # a changed cubin is one changed line
    assert len(data) < 400 * (len(lock.cubins) + len(lock.wheels))


@pytest.mark.parametrize(
    ("section", "said"),
    [(".text", "machine code differs"), (".note.nv.tkinfo", "machine code is equal, other sections differ")],
)
def test_one_differing_byte_is_found_and_named(lock: Lock, artifacts_copy: Path, section: str, said: str) -> None:
    image = bytearray((artifacts_copy / "sm_90a" / f"{KEY}.cubin").read_bytes())
    from densemoe.compile.elf import read_sections

    content = next(data for name, data in read_sections(bytes(image)).items() if name.startswith(section))
    image[image.index(content) + len(content) // 2] ^= 1
    write_cubin(artifacts_copy, KEY, bytes(image))
    (found,) = locking.compare(lock, matrix.load(), "quick", artifacts_copy)
    assert found.key == KEY
    assert said in found.what
    assert lock.cubins[KEY].sha256[:12] in found.what


def edited(lock: Lock, **changes: object) -> Lock:
    return dataclasses.replace(lock, cubins={**lock.cubins, KEY: dataclasses.replace(lock.cubins[KEY], **changes)})  # type: ignore[arg-type]


def test_the_likely_cause_is_named(lock: Lock, artifacts: Path) -> None:
    """Each cause alone, from a lock that was edited so that only it can be meant."""
    other = "0" * 64

    def cause(changed: Lock) -> str:
        (found,) = locking.compare(changed, matrix.load(), "quick", artifacts)
        return found.cause

    assert cause(edited(lock, sha256=other)).startswith("symbol or flags")
    assert cause(edited(lock, sha256=other, text="0" * 16)).startswith("flags")
    assert cause(edited(lock, sha256=other, text="0" * 16, ptx="0" * 16)).startswith("code generation")
    source = dataclasses.replace(edited(lock, sha256=other), kernels={**lock.kernels, "sm90_fc1": "0" * 16})
    assert "compile/kernels/sm90_fc1.py" in cause(source)
    toolchain = dataclasses.replace(edited(lock, sha256=other), distributions={**lock.distributions, "nvidia-cutlass-dsl": "4.8.0"})
    assert "nvidia-cutlass-dsl 4.8.0 is locked" in cause(toolchain)


def test_new_and_vanished_variants_are_named(lock: Lock, artifacts: Path) -> None:
    without = dataclasses.replace(lock, cubins={key: each for key, each in lock.cubins.items() if key != KEY})
    assert "does not name it" in locking.compare(without, matrix.load(), "quick", artifacts)[0].what
    plan = matrix.load()
    smaller = dataclasses.replace(plan, profiles={"full": plan.profile("quick")})
    gone = locking.compare(lock, smaller, "full", artifacts)
    assert len(gone) == len(lock.cubins) - len(plan.profile("quick"))
    assert all("left the matrix" in each.cause for each in gone)


@pytest.mark.parametrize("left", ["groupedfc1.sm90a.t8x64.c1x1.nvfp4-nvfp4", "fc9.sm80.t8x64.c1x1.bf16-bf16.fast2"])
def test_a_lock_that_names_what_densemoe_no_longer_has_is_read_and_renewed(lock: Lock, artifacts: Path, left: str) -> None:
    """Keys that this version would refuse, of another version's variants: the difference is said, and the lock that is made is without them."""
    with pytest.raises(VariantError):
        Variant.parse(left)
    plan = matrix.load()
    older = Lock.from_bytes(dataclasses.replace(lock, cubins={**lock.cubins, left: next(iter(lock.cubins.values()))}).to_bytes(), "lock")
    smaller = dataclasses.replace(plan, profiles={"full": plan.profile("quick")})
    assert [each.what for each in locking.compare(older, smaller, "full", artifacts) if each.key == left] == ["only the lock names it"]
    assert left not in locking.make(plan, "quick", artifacts, older.wheels).cubins


def test_another_toolchain_is_refused_before_anything_compiles(lock: Lock) -> None:
    newer = dataclasses.replace(lock, distributions={**lock.distributions, "nvidia-cutlass-dsl-libs-cu13": "4.9.0"})
    with pytest.raises(ToolchainError, match=r"libs-cu13 4\.9\.0 is locked, 4\.8\.1 is installed"):
        locking.check_toolchain(newer)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema 2"),
        ({"cubins": {"../evil": {}}}, "does not parse"),
        ({"wheels": {"../x.whl": {"sha256": "0" * 64, "pythons": ["3.11"]}}}, "no file name of a wheel"),
        ({"wheels": {"x.whl": {"sha256": "0", "pythons": ["3.11"]}}}, "hexadecimal"),
        ({"profile": None}, "str belongs"),
        ({"more": 1}, "canonical form"),
    ],
)
def test_a_faulty_lock_is_refused(lock: Lock, change: dict[str, object], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        Lock.from_bytes(json.dumps({**json.loads(lock.to_bytes()), **change}).encode(), "lock")


def test_build_locked_fails_on_a_differing_lock(tmp_path: Path, artifacts: Path, lock: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        return cli.main(["build", "--profile", "quick", "--locked", "--out", str(artifacts)])

    assert run() == cli.OK
    path = tmp_path / "manifest.lock"
    path.write_bytes(edited(lock, sha256="0" * 64).to_bytes())
    monkeypatch.setattr("densemoe.runtime.lock.default_lock", lambda: path)
    assert run() == cli.FAILED


def test_lock_writes_what_it_builds_and_check_compares(tmp_path: Path, artifacts_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the quick profile with its own lock file, from one that stands: the wheels are kept, nothing asks the package index."""
    path = tmp_path / "manifest.lock"
    wheels = {"x-1-py3-none-any.whl": LockedWheel("0" * 64, ("3.11",))}
    made = locking.make(matrix.load(), "quick", artifacts_copy, wheels)
    path.write_bytes(edited(made, sha256="0" * 64).to_bytes())
    command = ["lock", "--profile", "quick", "--lock", str(path), "--out", str(artifacts_copy)]
    assert cli.main([*command, "--check"]) == cli.FAILED
    assert KEY in capsys.readouterr().out
    assert cli.main(command) == cli.OK
    assert Lock.read(path) == made
    capsys.readouterr()
    assert cli.main([*command, "--check"]) == cli.OK
    assert "other sources" not in capsys.readouterr().err
    path.write_bytes(dataclasses.replace(made, kernels={**made.kernels, "sm90_fc1": "0" * 16}).to_bytes())
    assert cli.main([*command, "--check"]) == cli.OK
    assert "other sources of sm90_fc1" in capsys.readouterr().err


# ---- the environment that a lock describes


def test_requirements_are_hashed_and_of_one_python_and_machine(lock: Lock) -> None:
    text = environment.hashed_requirements(lock, "3.11", "aarch64")
    names = [line.split("==")[0] for line in text.splitlines()]
    assert len(names) == len(set(names))
    assert {"nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu12", "nvidia-cutlass-dsl-libs-cu13", "numpy"} <= set(names)
    assert all("--hash=sha256:" in line for line in text.splitlines())
    for wheel, each in lock.wheels.items():
        if "x86_64" in wheel:
            assert each.sha256 not in text


def test_a_python_that_the_lock_lacks_is_named(lock: Lock) -> None:
    with pytest.raises(ToolchainError, match=r"Python 3\.9 on x86_64: it has Python 3\.10"):
        environment.hashed_requirements(lock, "3.9", "x86_64")


def test_interpreters_are_those_that_start() -> None:
    found = environment.interpreters()
    assert f"3.{sys.version_info[1]}" in found
    for version, path in found.items():
        said = subprocess.run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True)
        assert said.stdout.strip() == version
