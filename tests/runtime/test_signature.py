"""Who signed an artifact root or a wheel: against a sigstore instance of the tests' own, without a network, every way of being wrong named."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import sys
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from local_trust import AT, IDENTITY, ISSUER, LocalTrust

import densemoe.artifacts
from densemoe.runtime import addons, cli, signature, verify_cli
from densemoe.runtime.canonical import canonical
from densemoe.runtime.errors import ArtifactCorrupt, SignatureError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.manifest import Index, IndexEntry
from densemoe.runtime.signature import Signed, Signer

FIXED = Path(__file__).parent / "signed"
DATA = b"what is signed\n"
SIGNER = Signer(IDENTITY, ISSUER)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing here may open a connection; what sigstore caches goes into a folder of the test."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a connection was opened: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def trust() -> LocalTrust:
    return LocalTrust()


@pytest.fixture(scope="module")
def root_file(trust: LocalTrust, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trust") / "trusted_root.json"
    path.write_bytes(trust.trusted_root())
    return path


def check(document: dict[str, Any] | bytes, folder: Path, root: Path | None, data: bytes = DATA, signer: Signer = SIGNER) -> Signed:
    bundle = folder / "file.sigstore.json"
    bundle.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return signature.verify(data, "file", bundle, signer, root)


def test_the_fixed_bundle_holds() -> None:
    """Made once by a key that is gone, its certificate long expired: it was valid when the log saw the signature."""
    file = FIXED / "file.txt"
    found = signature.verify(file.read_bytes(), str(file), FIXED / "file.txt.sigstore.json", SIGNER, FIXED / "trusted_root.json")
    assert (found.identity, found.issuer) == (IDENTITY, ISSUER)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (found.after, found.before) == ("2026-01-02T03:04:05Z", "2026-01-02T03:14:05Z")


@pytest.mark.parametrize("identity", ["release@example.org", IDENTITY])
def test_a_person_or_a_workflow_signs(trust: LocalTrust, root_file: Path, tmp_path: Path, identity: str) -> None:
    found = check(trust.bundle(DATA, identity), tmp_path, root_file, signer=Signer(identity, ISSUER))
    assert found.identity == identity


# ---- what is wrong is named


@pytest.mark.parametrize(
    ("signer", "said"),
    [
        (Signer("somebody@example.org", ISSUER), f"was signed by {IDENTITY}"),
        (Signer(IDENTITY[:-1], ISSUER), f"was signed by {IDENTITY}"),
        (Signer(IDENTITY, "https://token.example.com"), f"vouched for by {ISSUER}"),
        (Signer("", ISSUER), f"was signed by {IDENTITY}"),
    ],
)
def test_another_signer(trust: LocalTrust, root_file: Path, tmp_path: Path, signer: Signer, said: str) -> None:
    with pytest.raises(SignatureError) as error:
        check(trust.bundle(DATA), tmp_path, root_file, signer=signer)
    assert said in str(error.value)
    assert f"not by {signer}" in str(error.value)


def test_other_bytes(trust: LocalTrust, root_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match=r"file is not the file that was signed: its sha256 is [0-9a-f]{64}, .* signs [0-9a-f]{64}"):
        check(trust.bundle(DATA), tmp_path, root_file, data=DATA + b"x")


def test_other_bytes_whose_digest_the_bundle_leaves_out(trust: LocalTrust, root_file: Path, tmp_path: Path) -> None:
    document = trust.bundle(DATA)
    del document["messageSignature"]["messageDigest"]
    assert check(document, tmp_path, root_file).identity == IDENTITY
    with pytest.raises(SignatureError, match="Signature is invalid for input"):
        check(document, tmp_path, root_file, data=DATA + b"x")


@pytest.mark.parametrize("late", [timedelta(hours=1), timedelta(minutes=-1)])
def test_a_certificate_that_was_not_valid_when_the_log_saw_it(trust: LocalTrust, root_file: Path, tmp_path: Path, late: timedelta) -> None:
    with pytest.raises(SignatureError, match="had expired, or was not valid yet, when the signature was made"):
        check(trust.bundle(DATA, logged=AT + late), tmp_path, root_file)


def test_an_authority_that_the_trusted_root_does_not_name(root_file: Path, tmp_path: Path) -> None:
    stranger = LocalTrust("strangers")
    with pytest.raises(SignatureError, match=r"issued by CN=strangers authority,O=strangers, which is no authority of .*trusted_root.json"):
        check(stranger.bundle(DATA), tmp_path, root_file)
    impostor = LocalTrust()  # the same names, other keys
    with pytest.raises(SignatureError, match=r"no authority of"):
        check(impostor.bundle(DATA), tmp_path, root_file)


def test_the_public_trusted_root_is_the_default(trust: LocalTrust, tmp_path: Path) -> None:
    """As the installed sigstore brings it, without a connection."""
    with pytest.raises(SignatureError, match="no authority of the public trusted root: name the trusted root"):
        check(trust.bundle(DATA), tmp_path, None)


@pytest.mark.parametrize(("log", "said"), [("log", "invalid log entry"), ("certificate_log", "SCT")])
def test_logs_that_the_trusted_root_does_not_name(tmp_path: Path, log: str, said: str) -> None:
    trust = LocalTrust()
    document = trust.bundle(DATA)
    setattr(trust, log, getattr(LocalTrust(), log))
    (tmp_path / "root.json").write_bytes(trust.trusted_root())
    with pytest.raises(SignatureError, match=said):
        check(document, tmp_path, tmp_path / "root.json")


def entry(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["verificationMaterial"]["tlogEntries"][0]
    return found


def flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(bytes(data)).decode()


def swap_body(document: dict[str, Any], other: dict[str, Any]) -> None:
    document["verificationMaterial"]["tlogEntries"] = other["verificationMaterial"]["tlogEntries"]


EDITS: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "the log entry of another signature": swap_body,
    "a signature by another key": lambda d, o: d["messageSignature"].update(signature=o["messageSignature"]["signature"]),
    "the certificate of another signature": lambda d, o: d["verificationMaterial"].update(certificate=o["verificationMaterial"]["certificate"]),
    "an earlier time": lambda d, _: entry(d).update(integratedTime=str(int(entry(d)["integratedTime"]) - 1)),
    "a changed promise": lambda d, _: entry(d)["inclusionPromise"].update(
        signedEntryTimestamp=flipped(entry(d)["inclusionPromise"]["signedEntryTimestamp"])
    ),
    "a changed proof": lambda d, _: entry(d)["inclusionProof"]["hashes"].reverse(),
    "a short proof": lambda d, _: entry(d)["inclusionProof"]["hashes"].pop(),
    "another root hash": lambda d, _: entry(d)["inclusionProof"].update(rootHash=flipped(entry(d)["inclusionProof"]["rootHash"])),
    "no proof": lambda d, _: entry(d).pop("inclusionProof"),
    "no promise, so no time": lambda d, _: entry(d).pop("inclusionPromise"),
    "no log entry": lambda d, _: d["verificationMaterial"].update(tlogEntries=[]),
    "two log entries": lambda d, _: d["verificationMaterial"]["tlogEntries"].append(entry(d)),
    "no certificate": lambda d, _: d["verificationMaterial"].pop("certificate"),
    "no signature": lambda d, _: d.pop("messageSignature"),
    "another format": lambda d, _: d.update(mediaType="application/vnd.dev.sigstore.bundle.v9+json"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_bundle_of_parts_that_do_not_belong_together(trust: LocalTrust, root_file: Path, tmp_path: Path, name: str) -> None:
    document = trust.bundle(DATA)
    EDITS[name](document, trust.bundle(DATA))
    with pytest.raises(SignatureError, match=r"file\.sigstore\.json"):
        check(document, tmp_path, root_file)


def test_an_attestation_is_not_a_signature(trust: LocalTrust, root_file: Path, tmp_path: Path) -> None:
    document = trust.bundle(DATA)
    del document["messageSignature"]
    payload = {"payload": base64.b64encode(DATA).decode(), "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": "AAAA"}]}
    with pytest.raises(SignatureError, match="holds an attestation, not a signature"):
        check({**document, "dsseEnvelope": payload}, tmp_path, root_file)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"mediaType": 1}', b" " * ((1 << 20) + 1)])
def test_what_is_no_bundle(root_file: Path, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SignatureError, match=r"file\.sigstore\.json"):
        check(data, tmp_path, root_file)


def test_no_bundle(tmp_path: Path, root_file: Path) -> None:
    with pytest.raises(SignatureError, match=r"file has no signature: .* does not exist; name the bundle with --bundle"):
        signature.verify(DATA, "file", tmp_path / "none", SIGNER, root_file)


@pytest.mark.parametrize("data", [None, b"", b"{}", b"\xff", b"[]"])
def test_what_is_no_trusted_root(trust: LocalTrust, tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "root.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SignatureError, match=r"root\.json"):
        check(trust.bundle(DATA), tmp_path, path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=3))
@example([(276, 1, b"\x00G"), (276, 1, b"")])  # the issuer's name is no name
def test_a_damaged_bundle_is_refused_or_means_the_same(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    """Whatever happens to its bytes: one kind of error, or the same statement about the same data; never other data."""
    file, bundle = FIXED / "file.txt", (FIXED / "file.txt.sigstore.json").read_bytes()
    for place, dropped, text in edits:
        at = place % (len(bundle) + 1)
        bundle = bundle[:at] + text + bundle[at + dropped :]
    for data in (file.read_bytes(), b"other"):
        try:
            found = check(bundle, tmp_path, FIXED / "trusted_root.json", data)
        except SignatureError:
            continue
        assert data == file.read_bytes()
        assert found.after == "2026-01-02T03:04:05Z"


# ---- the command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], root_file: Path) -> Run:
    """Exit code, output and errors of ``densemoe verify --signature`` by the tests' signer, with further arguments."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        who = ["--signature", "--identity", IDENTITY, "--issuer", ISSUER, "--trusted-root", str(root_file)]
        code = cli.main(["verify", *who, *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def sign(trust: LocalTrust, file: Path) -> Path:
    path = file.with_name(file.name + signature.BUNDLE_SUFFIX)
    path.write_text(json.dumps(trust.bundle(file.read_bytes())))
    return path


def test_a_signed_root(run: Run, trust: LocalTrust, artifacts_copy: Path) -> None:
    sign(trust, artifacts_copy / "index.json")
    code, out, error = run("--artifacts", artifacts_copy)
    assert (code, error) == (0, "")
    assert f"index.json: signed by {IDENTITY} (vouched for by {ISSUER})" in out
    assert "11 cubins are what their manifests say" in out
    (signed,) = json.loads(run("--artifacts", artifacts_copy, "--json")[1])["signatures"]
    assert signed["identity"] == IDENTITY


def test_one_signature_covers_every_byte(run: Run, trust: LocalTrust, artifacts_copy: Path) -> None:
    """A cubin, a manifest and the index in turn: changed with everything above it kept consistent, as someone with write access would."""
    sign(trust, artifacts_copy / "index.json")
    cubin = next((artifacts_copy / "sm_90a").glob("*.cubin"))
    before = cubin.read_bytes()
    cubin.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert run("--artifacts", artifacts_copy)[0] == 1
    manifest = artifacts_copy / "sm_90a" / "manifest.json"
    text = manifest.read_text().replace(hashlib.sha256(before).hexdigest(), hashlib.sha256(cubin.read_bytes()).hexdigest())
    manifest.write_text(text)
    assert run("--artifacts", artifacts_copy)[0] == 1
    index = artifacts_copy / "index.json"
    variants = Index.from_bytes(index.read_bytes(), "index.json").sets["sm_90a"].variants
    index.write_bytes(Index({"sm_90a": IndexEntry.of("sm_90a", text.encode(), variants)}).to_bytes())
    assert ArtifactSet(artifacts_copy).manifest("sm_90a")  # all hashes agree: only the signature tells
    code, out, error = run("--artifacts", artifacts_copy)
    assert (code, out) == (1, "")
    assert "index.json is not the file that was signed" in error


def test_an_unsigned_root_fails_where_a_signature_is_asked_for(run: Run, artifacts: Path) -> None:
    code, out, error = run("--artifacts", artifacts)
    assert (code, out) == (1, "")
    assert "has no signature" in error


def test_a_bundle_elsewhere(run: Run, trust: LocalTrust, artifacts: Path, tmp_path: Path) -> None:
    """An installed package's folder is not written: the bundle of its index comes with the release."""
    bundle = tmp_path / "densemoe-0.1.0.index.sigstore.json"
    bundle.write_text(json.dumps(trust.bundle((artifacts / "index.json").read_bytes())))
    assert run("--artifacts", artifacts, "--bundle", bundle)[0] == 0
    link = tmp_path / "link"
    link.symlink_to(bundle)
    assert run("--artifacts", artifacts, "--bundle", link)[0] == 0


def test_an_index_that_changes_while_it_is_verified(
    run: Run, trust: LocalTrust, artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used was read before: were the signed bytes others, the signature would say nothing of it."""
    index = artifacts_copy / "index.json"
    sign(trust, index)
    good, opened = index.read_bytes(), ArtifactSet.__init__

    def open_then_restore(self: ArtifactSet, path: Any = None) -> None:
        index.write_bytes(canonical({"schema": 1, "sets": []}))
        opened(self, path)
        index.write_bytes(good)

    monkeypatch.setattr(ArtifactSet, "__init__", open_then_restore)
    code, _, error = run("--artifacts", artifacts_copy)
    assert code == 1
    assert "changed while it was read" in error


def pack(root: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, f"densemoe/artifacts/built/{file.relative_to(root)}")
    return path


def test_a_signed_wheel(run: Run, trust: LocalTrust, artifacts: Path, tmp_path: Path) -> None:
    wheel = pack(artifacts, tmp_path / "densemoe-0.1.0-py3-none-any.whl")
    assert run("--wheel", wheel)[0] == 1  # not signed yet
    sign(trust, wheel)
    code, out, _ = run("--wheel", wheel)
    assert code == 0
    assert f"{wheel.name}: signed by" in out
    assert f"{wheel}: 11 cubins are what their manifests say" in out
    wheel.write_bytes(wheel.read_bytes() + b"x")
    code, out, error = run("--wheel", wheel)
    assert (code, out) == (1, "")
    assert "is not the file that was signed" in error


def test_a_wheel_needs_no_signature_to_be_checked(artifacts_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--wheel", str(pack(artifacts_copy, tmp_path / "good.whl")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == 11
    cubin = next((artifacts_copy / "sm_90a").glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    assert cli.main(["verify", "--wheel", str(pack(artifacts_copy, tmp_path / "bad.whl"))]) == 1
    assert cubin.name in capsys.readouterr().out
    assert cli.main(["verify", "--wheel", str(tmp_path / "none.whl")]) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--signature"],
        ["--signature", "--identity", "a@b.c"],
        ["--signature", "--issuer", "https://x"],
        ["--identity", "a@b.c"],
        ["--issuer", "https://x"],
        ["--bundle", "x"],
        ["--trusted-root", "x"],
        ["--wheel", "x", "--artifacts", "y"],
        ["--emulate", "--signature", "--identity", "a@b.c", "--issuer", "https://x"],
        ["--emulate", "--wheel", "x"],
    ],
)
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    assert cli.main(["verify", *arguments]) == 2


def test_without_sigstore_the_extra_is_named(run: Run, trust: LocalTrust, artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(trust, artifacts_copy / "index.json")
    for name in [name for name in sys.modules if name.split(".")[0] == "sigstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sigstore", None)
    code, _, error = run("--artifacts", artifacts_copy)
    assert code == 3
    assert "install densemoe[signing]" in error


# ---- add-ons


@pytest.fixture
def with_addon(artifacts_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An installed root without a set, and an add-on's root."""
    installed = tmp_path / "installed" / "built"
    installed.mkdir(parents=True)
    (installed / "index.json").write_bytes(canonical({"schema": 1, "sets": []}))
    monkeypatch.delenv("DENSEMOE_ARTIFACTS", raising=False)
    monkeypatch.setattr(densemoe.artifacts, "__path__", [str(installed.parent)])
    monkeypatch.setattr(addons, "find", lambda: [addons.AddOn("hopper", artifacts_copy)])
    return installed, artifacts_copy


def test_the_files_of_an_addon_are_verified_too(with_addon: tuple[Path, Path]) -> None:
    _, addon = with_addon
    found = verify_cli.check_files(ArtifactSet())
    assert (found["verified"], found["faults"]) == (11, [])
    cubin = next((addon / "sm_90a").glob("*.cubin"))
    cubin.write_bytes(b"")
    (addon / "sm_90a" / "stale.cubin").write_bytes(b"")
    found = verify_cli.check_files(ArtifactSet())
    assert found["verified"] == 10
    assert {Path(fault.split()[0]).name for fault in found["faults"]} == {cubin.name, "stale.cubin"}


def test_every_root_must_be_signed(run: Run, trust: LocalTrust, with_addon: tuple[Path, Path]) -> None:
    installed, addon = with_addon
    bundle = sign(trust, installed / "index.json")
    code, _, error = run()
    assert code == 1
    assert str(addon) in error
    sign(trust, addon / "index.json")
    assert run()[0] == 0
    assert run("--bundle", bundle)[0] == 2  # it could belong to one of them only


def test_the_numbers_of_the_index_are_compared(artifacts_copy: Path) -> None:
    index = artifacts_copy / "index.json"
    document = json.loads(index.read_text())
    document["sets"][0]["variants"] = 12
    index.write_bytes(canonical(document))
    with pytest.raises(ValueError, match="has 11 variants for sm_90a, the index says 12"):
        verify_cli.check_files(ArtifactSet(artifacts_copy))


def test_a_manifest_that_is_swapped_is_refused(artifacts_copy: Path) -> None:
    """It is read once: what was hashed is what is checked."""
    artifacts = ArtifactSet(artifacts_copy)
    manifest = artifacts_copy / "sm_90a" / "manifest.json"
    artifacts.manifest("sm_90a")
    manifest.write_bytes(manifest.read_bytes().replace(b'"minimum_driver":13000', b'"minimum_driver":10000'))
    with pytest.raises(ArtifactCorrupt, match="not the manifest that the index names"):
        verify_cli.check_files(artifacts)
