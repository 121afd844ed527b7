"""No partial set is ever taken as complete: builds are killed at, and refused, every write; disks are full, folders foreign or read-only.

Nothing is compiled here: the compiler pool is replaced by one that stages cubins built before, through the same writes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from disk_faults import changes_of, fault_at, in_child, killed_at

from densemoe.compile import build, matrix
from densemoe.runtime.errors import ArtifactError, BuildError, DensemoeError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.manifest import Index, IndexEntry, Manifest

KEYS = [each.variant.key for each in matrix.load().profile("quick")]


@pytest.fixture(scope="module")
def staged(artifacts: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Cubin and facts by key, as a compiler process hands them on."""
    manifest = Manifest.from_bytes((artifacts / "sm_90a" / "manifest.json").read_bytes(), "m")
    found = {}
    for key, entry in manifest.variants.items():
        document = entry.to_json("")
        facts = {name: document[name] for name in ("sha256", "size", "layout", "static_smem", "registers", "stack", "parameters", "parameter_bytes")}
        facts |= {"recipe": entry.recipe.to_json(), "audit": document["audit"], "source_digest": entry.source_digest, "seconds": 0.1}
        found[key] = ((artifacts / "sm_90a" / entry.file).read_bytes(), facts)
    return found


@pytest.fixture(autouse=True)
def no_compiler(staged: dict[str, tuple[bytes, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        def run(self, function: Any, tasks: Any, done: Callable[..., None]) -> None:
            for number, (planned, _) in enumerate(tasks):
                done(number, staged[planned.variant.key], None)

    monkeypatch.setattr(build, "open_executor", lambda *_: Local())


@cache
def shipped() -> matrix.Matrix:
    return matrix.load()


def quick(out: Path) -> build.BuildResult:
    return build.build(shipped(), out, profile="quick")


def refusal(out: Path) -> str:
    """What a build into ``out`` says where it is refused, nothing where it works."""
    try:
        quick(out)
    except BuildError as error:
        return str(error)
    return ""


def read_all(out: Path) -> None:
    found = ArtifactSet(out)
    for entry in found.manifest("sm_90a").variants.values():
        found.image(entry)


def old_set(out: Path) -> Path:
    """A set of two variants, one of which has other bytes than the next build will give."""
    quick(out)
    folder = out / "sm_90a"
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m")
    image = (folder / f"{KEYS[0]}.cubin").read_bytes() + b"\0"
    import dataclasses

    entry = dataclasses.replace(manifest.variants[KEYS[0]], sha256=hashlib.sha256(image).hexdigest(), size=len(image), source_digest="0" * 64)
    data = dataclasses.replace(manifest, variants={KEYS[0]: entry, KEYS[1]: manifest.variants[KEYS[1]]}).to_bytes()
    (folder / f"{KEYS[0]}.cubin").write_bytes(image)
    for key in KEYS[2:]:
        (folder / f"{key}.cubin").unlink()
    (folder / "manifest.json").write_bytes(data)
    (out / "index.json").write_bytes(Index({"sm_90a": IndexEntry.of("sm_90a", data, 2)}).to_bytes())
    assert_sound(out)
    return out


def assert_sound(out: Path) -> str:
    """Whatever a reader gets is what some whole manifest says: old, new, or a refusal."""
    try:
        found = ArtifactSet(out)
        manifest = found.manifest("sm_90a")
        manifest.check()
    except ArtifactError:
        return "refused"
    assert len(manifest.variants) in (2, len(KEYS))
    for entry in manifest.variants.values():
        with contextlib.suppress(ArtifactError):
            assert hashlib.sha256(found.image(entry)).hexdigest() == entry.sha256
    return "old" if len(manifest.variants) == 2 else "new"


def assert_whole(out: Path) -> None:
    found = ArtifactSet(out)
    manifest = found.manifest("sm_90a")
    assert sorted(manifest.variants) == KEYS
    for entry in manifest.variants.values():
        found.image(entry)
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    expected = [".build.lock", "index.json", *(f"sm_90a/{name}" for name in ("build_log.json", "manifest.json", *(f"{key}.cubin" for key in KEYS)))]
    assert left == sorted(expected)


def changes_of_a_build(out: Path) -> int:
    return changes_of(lambda: quick(out))


def test_a_build_that_is_killed_at_any_change_of_the_disk(tmp_path: Path) -> None:
    """SIGKILL's effect: the process is gone at once, no handler runs. The next build completes, and leaves nothing behind."""
    start = old_set(tmp_path / "start")
    count = changes_of_a_build(Path(shutil.copytree(start, tmp_path / "count")))
    assert count > 30
    seen = set()
    for number in range(1, count + 1):
        out = Path(shutil.copytree(start, tmp_path / f"at-{number}"))
        assert killed_at(number, lambda out=out: quick(out))
        seen.add(assert_sound(out))
        assert not quick(out).failures
        assert_whole(out)
        shutil.rmtree(out)
    assert {"old", "new"} <= seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_any_change(tmp_path: Path, code: int) -> None:
    """A full or failing disk: a BuildError that says so, a sound set, and the next build completes."""
    start = old_set(tmp_path / "start")
    count = changes_of_a_build(Path(shutil.copytree(start, tmp_path / "count")))

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    failed = 0
    for number in range(1, count + 1):
        out = Path(shutil.copytree(start, tmp_path / f"at-{number}"))
        with fault_at(number, refuse):
            said = refusal(out)
        failed += bool(said)
        assert not said or os.strerror(code) in said
        assert_sound(out)
        quick(out)
        assert_whole(out)
        shutil.rmtree(out)
    assert failed > count // 2  # what fails otherwise is the removal of leftovers


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real file system of 96 KB where this process may make one; everywhere, a limit on the size of files."""
    script = "import os, resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    script += "from pathlib import Path\nfrom densemoe.runtime.canonical import write_atomically\n"
    script += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "try:\n    write_atomically(Path(sys.argv[1]) / 'x', bytes(30_000))\nexcept OSError as error:\n    print(error.strerror)\n"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
    assert list(tmp_path.iterdir()) == []
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(mount)], capture_output=True, check=False).returncode:
        return
    try:
        with pytest.raises(BuildError, match="No space left on device"):
            quick(mount / "out")
        with pytest.raises(ArtifactError):
            ArtifactSet(mount / "out")
        subprocess.run(["mount", "-o", "remount,size=1m", str(mount)], check=True)
        quick(mount / "out")
        assert_whole(mount / "out")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """In a process without root's rights: the build says so, and what stands there is read as before."""
    out = tmp_path / "out"
    quick(out)
    (out / "index.json").unlink()  # so that there is something to write
    for path in (out, *out.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for folder in (out, *list(out.parents)[:3]):
        folder.chmod(0o555 if folder == out else 0o755)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            quick(out)
        except BuildError as error:
            os._exit(7 if "Permission denied" in str(error) else 8)

    assert in_child(as_nobody) == 7
    for path in (out, *out.rglob("*")):
        path.chmod(0o755)


def test_builds_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two builds into one folder one works and the other says so; a hundred of them leave a whole set."""
    out = tmp_path / "out"
    outcomes: list[str] = []

    def one() -> None:
        outcomes.append(refusal(out))

    for _ in range(10):
        threads = [threading.Thread(target=one) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_whole(out)
        shutil.rmtree(out / "sm_90a")
    assert outcomes.count("") >= 10
    assert len(outcomes) == 100
    assert all("another build works" in said for said in outcomes if said)


def test_a_reader_beside_a_writer_never_sees_other_bytes(tmp_path: Path) -> None:
    """A build switches between two profiles again and again while a reader opens the set: old, new or refused, never mixed."""
    out = tmp_path / "out"
    quick(out)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            while True:
                build.build(matrix.load(), out, profile="quick", key_filter="fc1.*")
                shutil.rmtree(out / "sm_90a")
                quick(out)
        os._exit(0)
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with contextlib.suppress(ArtifactError):
                found = ArtifactSet(out)
                for entry in found.manifest("sm_90a").variants.values():
                    assert hashlib.sha256(found.image(entry)).hexdigest() == entry.sha256
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


# ---- folders that lead elsewhere


def test_a_set_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    """A link in place of the set's folder: a build would write, and remove, files somewhere else."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.cubin").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "sm_90a").symlink_to(elsewhere)
    with pytest.raises(BuildError, match="symbolic link"):
        quick(out)
    assert [path.name for path in elsewhere.iterdir()] == ["precious.cubin"]


@pytest.mark.parametrize("name", [".build.lock", "sm_90a/.staging"])
def test_links_in_the_place_of_a_builds_own_files(tmp_path: Path, name: str) -> None:
    """In a folder that others may write to: the lock is not opened through a link, which would empty its target, nor is anything staged there."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    (out / name).parent.mkdir(parents=True)
    if name == ".build.lock":
        precious.write_bytes(b"precious")
    else:
        precious.mkdir()
        (precious / "file").write_bytes(b"precious")
    (out / name).symlink_to(precious)
    with pytest.raises(BuildError, match=r"symbolic link"):
        quick(out)
    assert (precious if precious.is_file() else precious / "file").read_bytes() == b"precious"
    assert precious.is_file() or len(list(precious.iterdir())) == 1


@pytest.mark.parametrize("name", ["index.json", "sm_90a/manifest.json", f"sm_90a/{KEYS[0]}.cubin"])
def test_files_that_are_links_pipes_or_folders_are_refused(tmp_path: Path, name: str) -> None:
    for kind in ("link", "pipe", "folder", "device"):
        out = tmp_path / kind
        quick(out)
        path = out / name
        data = path.read_bytes()
        path.unlink()
        if kind == "link":
            (tmp_path / f"{kind}.data").write_bytes(data)  # the right bytes, but elsewhere
            path.symlink_to(tmp_path / f"{kind}.data")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(ArtifactError):
            read_all(out)


def test_a_build_replaces_a_linked_cubin_not_its_target(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick(out)
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    path = out / "sm_90a" / f"{KEYS[0]}.cubin"
    path.unlink()
    path.symlink_to(precious)
    quick(out)
    assert_whole(out)
    assert not path.is_symlink()
    assert precious.read_bytes() == b"precious"


# ---- files that change between a check and a use


def test_a_cubin_swapped_after_verification_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick(out)
    found = ArtifactSet(out)
    entries = list(found.manifest("sm_90a").variants.values())
    for entry in entries:
        found.image(entry)
    other = found.image(entries[1])
    path = out / "sm_90a" / entries[0].file
    for data in (other, other[:10], b"", os.urandom(entries[0].size)):
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            found.image(entries[0])


def test_the_bytes_that_are_hashed_are_the_bytes_that_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is swapped right after it was read: it is read once, hashed and returned, never opened again."""
    out = tmp_path / "out"
    quick(out)
    found = ArtifactSet(out)
    entry = next(iter(found.manifest("sm_90a").variants.values()))
    path = out / "sm_90a" / entry.file
    read, opened = os.read, []

    def read_then_swap(handle: int, count: int) -> bytes:
        data = read(handle, count)
        opened.append(handle)
        path.write_bytes(b"swapped")
        return data

    monkeypatch.setattr(os, "read", read_then_swap)
    image = found.image(entry)
    assert hashlib.sha256(image).hexdigest() == entry.sha256
    assert len(opened) == 1


def test_a_manifest_swapped_after_the_index_was_read_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick(out)
    found = ArtifactSet(out)
    path = out / "sm_90a" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"minimum_driver":13000', b'"minimum_driver":10000'))
    with pytest.raises(DensemoeError, match="not the manifest that"):
        found.manifest("sm_90a")
