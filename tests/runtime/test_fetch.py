"""Artifacts over a network: checked against index, manifest and lock; resumed after a break; whole or not at all. The server is on this machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from disk_faults import changes_of, fault_at, killed_at
from local_trust import IDENTITY, ISSUER, LocalTrust

from densemoe.compile import package
from densemoe.runtime import cli, fetch
from densemoe.runtime.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound, ProblemError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.lock import Lock


class Handler(SimpleHTTPRequestHandler):
    """Serves byte ranges; ``breaks`` is how many answers may still be given before it cuts connections."""

    protocol_version = "HTTP/1.1"
    ranges = True
    answers_left: int | None = None
    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers.get("Range", "")))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        if type(self).answers_left is not None:
            if type(self).answers_left <= 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            type(self).answers_left -= 1
        data, status = path.read_bytes(), 200
        wanted = self.headers.get("Range")
        if wanted and self.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            data, status = data[start : end + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end}/*")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(artifacts_copy: Path) -> Iterator[tuple[str, type[Handler], Path]]:
    """Address, handler class and folder of a server on this machine."""
    handler = type("Served", (Handler,), {"asked": [], "ranges": True, "answers_left": None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(artifacts_copy)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler, artifacts_copy
    server.shutdown()
    server.server_close()


def variants(root: Path) -> int:
    return len(list(root.rglob("*.cubin")))


def contents(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix in (".cubin", ".json") and path.name != "build_log.json")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_root_is_fetched_whole_and_works_offline(served: tuple[str, type[Handler], Path], tmp_path: Path, ranges: bool) -> None:
    url, handler, root = served
    handler.ranges = ranges
    found = fetch.fetch(url, tmp_path / "out", lock=Lock.read())
    assert len(found.fetched) == 11
    assert contents(tmp_path / "out") == contents(root)
    assert not list((tmp_path / "out").rglob(".fetch"))
    shutil.rmtree(root)
    offline = ArtifactSet(tmp_path / "out")
    for entry in offline.manifest("sm_90a").variants.values():
        offline.image(entry)


def test_the_signature_comes_with_what_it_signs(served: tuple[str, type[Handler], Path], tmp_path: Path) -> None:
    """Verified afterwards, offline; never kept beside an index that it does not sign."""
    url, _, root = served
    trust, out = LocalTrust(), tmp_path / "out"
    bundle = root / "index.json.sigstore.json"
    bundle.write_text(json.dumps(trust.bundle((root / "index.json").read_bytes())))
    (tmp_path / "root.json").write_bytes(trust.trusted_root())
    fetch.fetch(url, out)
    assert contents(out) == contents(root)
    signer = ["--identity", IDENTITY, "--issuer", ISSUER, "--trusted-root", str(tmp_path / "root.json")]
    assert cli.main(["verify", "--signature", *signer, "--artifacts", str(out)]) == 0
    bundle.unlink()
    fetch.fetch(url, out)
    assert not (out / bundle.name).exists()
    bundle.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(ArtifactCorrupt, match=r"index\.json\.sigstore\.json has more than"):
        fetch.fetch(url, out)


def test_what_stands_is_kept(served: tuple[str, type[Handler], Path], tmp_path: Path) -> None:
    url, handler, root = served
    fetch.fetch(url, tmp_path / "out")
    handler.asked.clear()
    again = fetch.fetch(url + "/", tmp_path / "out")
    assert again.fetched == []
    assert len(again.kept) == variants(root)
    assert not [path for path, _ in handler.asked if path.endswith(".cubin")]


def test_a_broken_transfer_is_resumed(served: tuple[str, type[Handler], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server cuts every connection after some answers, at every point in turn; nothing is visible until all is there."""
    url, handler, root = served
    monkeypatch.setattr(fetch, "CHUNK", 8192)
    size = sum(path.stat().st_size for path in root.rglob("*.cubin"))
    received, attempts = 0, 0
    while True:
        attempts += 1
        handler.answers_left = 4
        try:
            fetch.fetch(url, tmp_path / "out")
            break
        except ArtifactError as error:
            assert not (tmp_path / "out" / "index.json").exists()
            assert "fetch again to go on" in str(error)  # noqa: PT017
        staged = sum(path.stat().st_size for path in (tmp_path / "out").rglob(".fetch/*"))
        assert staged > received
        received = staged
        assert attempts < 40
    assert attempts > 3
    pieces = [asked for path, asked in handler.asked if path.endswith(".cubin")]
    assert len(pieces) < 1.6 * size / 8192 + 40  # pieces were not fetched again and again
    assert contents(tmp_path / "out") == contents(root)


def test_other_bytes_than_the_locks_are_refused(served: tuple[str, type[Handler], Path], tmp_path: Path) -> None:
    import dataclasses

    url, _, _ = served
    lock = Lock.read()
    key = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
    other = dataclasses.replace(lock, cubins={**lock.cubins, key: dataclasses.replace(lock.cubins[key], sha256="0" * 64)})
    with pytest.raises(ArtifactCorrupt, match="the lock states 000000000000"):
        fetch.fetch(url, tmp_path / "out", lock=other)
    without = dataclasses.replace(lock, cubins={name: each for name, each in lock.cubins.items() if name != key})
    with pytest.raises(ArtifactCorrupt, match="does not name it"):
        fetch.fetch(url, tmp_path / "out", lock=without)
    assert not list((tmp_path / "out").rglob("*.cubin"))


@pytest.mark.parametrize("name", ["index.json", "sm_90a/manifest.json", "sm_90a/fc1.sm90a.t8x64.c1x1.bf16-bf16.cubin"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "longer"])
def test_a_damaged_root_leaves_nothing(served: tuple[str, type[Handler], Path], tmp_path: Path, name: str, damage: str) -> None:
    url, _, root = served
    path = root / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "changed": data[:-9] + b"x" + data[-8:], "longer": data + bytes(10)}[damage])
    if damage == "longer" and name.endswith(".cubin"):
        fetch.fetch(url, tmp_path / "out")  # only the stated bytes are asked for, and they are right
        return
    with pytest.raises(ArtifactError):
        fetch.fetch(url, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_newer_set_replaces_an_older_one(served: tuple[str, type[Handler], Path], tmp_path: Path) -> None:
    url, _, _ = served
    out = tmp_path / "out"
    (out / "sm_90a").mkdir(parents=True)
    (out / "sm_90a" / "fc1.sm90a.t8x64.c1x1.bf16-bf16.cubin").write_bytes(b"old")
    (out / "sm_90a" / "fc1.sm90a.t999x64.c1x1.bf16-bf16.cubin").write_bytes(b"of a removed variant")
    fetch.fetch(url, out)
    assert not (out / "sm_90a" / "fc1.sm90a.t999x64.c1x1.bf16-bf16.cubin").exists()
    for entry in ArtifactSet(out).manifest("sm_90a").variants.values():
        ArtifactSet(out).image(entry)


def test_an_answer_without_an_end_is_cut_off(served: tuple[str, type[Handler], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends on and on, whatever was asked for: the transfer ends at a size that no file of ours has."""
    url, handler, _ = served
    monkeypatch.setattr(fetch, "_LARGEST_ANSWER", 1 << 20)
    sent = []

    def endless(self: Handler) -> None:
        self.send_response(206)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            while len(sent) < 1 << 10:  # of 1 MB each
                self.wfile.write(bytes(1 << 20))
                sent.append(1)

    monkeypatch.setattr(handler, "do_GET", endless)
    with pytest.raises(ArtifactError, match="the answer has more than 1048576 bytes"):
        fetch.fetch(url, tmp_path / "out")
    assert len(sent) < 100


@pytest.fixture
def older(artifacts: Path, tmp_path: Path) -> Path:
    """A set of one variant, fetched before from somewhere else: whole by itself."""
    out = tmp_path / "older"
    found = ArtifactSet(artifacts)
    package.stage(artifacts, out, [min(found.manifest("sm_90a").variants)])
    return out


def assert_sound(out: Path) -> int:
    """Every cubin that a reader gets is the one that some whole manifest names; how many variants it lists, 0 where the root is refused."""
    try:
        found = ArtifactSet(out)
        entries = found.manifest("sm_90a").variants
    except ArtifactError:
        return 0
    for entry in entries.values():
        with contextlib.suppress(ArtifactError):
            assert hashlib.sha256(found.image(entry)).hexdigest() == entry.sha256
    return len(entries)


def changes_of_a_fetch(artifacts: Path, older: Path, tmp_path: Path) -> int:
    fetch.fetch(str(artifacts), tmp_path / "first")  # imports what it needs, which may write bytecode
    out = Path(shutil.copytree(older, tmp_path / "count"))
    return changes_of(lambda: fetch.fetch(str(artifacts), out))


def test_a_fetch_that_is_killed_at_any_change_of_the_disk(artifacts: Path, older: Path, tmp_path: Path) -> None:
    """The next fetch completes it and leaves nothing behind."""
    count = changes_of_a_fetch(artifacts, older, tmp_path)
    assert count > 20
    seen = set()
    for number in range(1, count + 1):
        out = Path(shutil.copytree(older, tmp_path / f"at-{number}"))
        assert killed_at(number, lambda out=out: fetch.fetch(str(artifacts), out))  # type: ignore[misc]
        seen.add(assert_sound(out))
        fetch.fetch(str(artifacts), out)
        assert contents(out) == contents(artifacts)
        assert not list(out.rglob(".fetch"))
        shutil.rmtree(out)
    assert seen == {0, 1, 11}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_any_change_of_a_fetch(artifacts: Path, older: Path, tmp_path: Path, code: int) -> None:
    count = changes_of_a_fetch(artifacts, older, tmp_path)
    failed = 0

    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    for number in range(1, count + 1):
        out = Path(shutil.copytree(older, tmp_path / f"at-{number}"))
        try:
            with fault_at(number, refuse):
                fetch.fetch(str(artifacts), out)
        except ArtifactError as error:
            assert os.strerror(code) in str(error)  # noqa: PT017
            failed += 1
        assert_sound(out)
        fetch.fetch(str(artifacts), out)
        assert contents(out) == contents(artifacts)
        shutil.rmtree(out)
    assert failed > count // 2  # what fails otherwise is the removal of leftovers


def test_fetches_and_builds_at_the_same_time(artifacts: Path, tmp_path: Path) -> None:
    """One works, the others say so; what is left is whole."""
    out = tmp_path / "out"
    outcomes: list[str] = []

    def one() -> None:
        try:
            fetch.fetch(str(artifacts), out)
            outcomes.append("")
        except ArtifactError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "" in outcomes
    assert all("a build or another fetch works in" in said for said in outcomes if said)
    assert contents(out) == contents(artifacts)


@pytest.mark.parametrize("name", [".build.lock", "sm_90a/.fetch", "sm_90a/.fetch/{sha256}"])
def test_links_in_the_place_of_a_fetchs_own_files(artifacts: Path, tmp_path: Path, name: str) -> None:
    entry = next(iter(ArtifactSet(artifacts).manifest("sm_90a").variants.values()))
    out, precious = tmp_path / "out", tmp_path / "precious"
    link = out / name.format(sha256=entry.sha256)
    link.parent.mkdir(parents=True)
    if name.endswith(".fetch"):
        precious.mkdir()
    (precious / "file" if name.endswith(".fetch") else precious).write_bytes(b"precious")
    link.symlink_to(precious)
    with pytest.raises(ArtifactError, match="symbolic link"):
        fetch.fetch(str(artifacts), out)
    assert (precious / "file" if precious.is_dir() else precious).read_bytes() == b"precious"


def test_addresses_and_options_that_cannot_be(served: tuple[str, type[Handler], Path], tmp_path: Path) -> None:
    url, _, _ = served
    with pytest.raises(ProblemError, match="nosuch"):
        fetch.fetch("nosuch://x", tmp_path / "out")
    with pytest.raises(ArtifactNotFound, match=r"no index\.json"):
        fetch.fetch(f"{url}/elsewhere", tmp_path / "out")
    with pytest.raises(ProblemError, match="has sm_90a"):
        fetch.fetch(url, tmp_path / "out", architectures=["sm_100f"])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot be written"):
        fetch.fetch(url, tmp_path / "file")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "sm_90a").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="symbolic link"):
        fetch.fetch(url, tmp_path / "out")


def test_a_local_folder_is_an_address_too(artifacts: Path, tmp_path: Path) -> None:
    assert len(fetch.fetch(str(artifacts), tmp_path / "out").fetched) == 11


def test_the_command(served: tuple[str, type[Handler], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, _, root = served
    out = tmp_path / "out"
    assert cli.main(["fetch", url, "--out", str(out)]) == 0
    assert f"{variants(root)} fetched" in capsys.readouterr().out
    assert cli.main(["verify", "--artifacts", str(out)]) == 0
    assert cli.main(["fetch", url, "--out", str(out), "--arch", "sm_1"]) == 2
    assert cli.main(["fetch", f"{url}/none", "--out", str(out)]) == 3
