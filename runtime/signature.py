"""``densemoe verify --signature``: who signed an artifact root or a wheel, by sigstore bundles, without a network (extra ``signing``).

One file is signed. Of an artifact root it is ``index.json``: it states the sha256 of every manifest, as a manifest does of every cubin, so one
signature covers all. Of a release it is the wheel. The bundle lies beside the file as ``<file>.sigstore.json``, where the sigstore tool writes it.

A signature without a signer says nothing, so the caller names whom he expects: the identity in the certificate and who vouched for it. Trust comes
from a trusted root: a file, or the public one that the installed sigstore brings. The log's promise and proof of inclusion are in the bundle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.canonical import read_file
from densemoe.runtime.errors import ArtifactError, SignatureError, ToolchainError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from sigstore.models import Bundle, TrustedRoot

__all__ = ["BUNDLE_SUFFIX", "LARGEST_BUNDLE", "Signed", "Signer", "verify"]

BUNDLE_SUFFIX: Final = ".sigstore.json"
#: Bytes of a bundle or of a trusted root that are read: both have some ten kilobytes.
LARGEST_BUNDLE: Final = 1 << 20
#: Extensions of a signing certificate that hold the issuer of the identity: a DER UTF8String, and in older certificates plain text.
_ISSUER: Final = "1.3.6.1.4.1.57264.1.8"
_OLD_ISSUER: Final = "1.3.6.1.4.1.57264.1.1"


@dataclass(frozen=True)
class Signer:
    """Who must have signed.

    Attributes:
        identity: subject of the certificate: an e-mail address, or the URI of a workflow with its ref.
        issuer: OpenID Connect issuer that vouched for it.
    """

    identity: str
    issuer: str

    def __str__(self) -> str:
        return f"{self.identity} (vouched for by {self.issuer})"


@dataclass(frozen=True)
class Signed:
    """A signature that was verified.

    Attributes:
        file: what is signed.
        sha256: of its bytes.
        bundle: file that holds the signature.
        identity, issuer: of the signer.
        after, before: validity of the signing certificate, in which the log, or a time-stamping authority, saw the signature; ISO 8601.
    """

    file: str
    sha256: str
    bundle: str
    identity: str
    issuer: str
    after: str
    before: str

    def __str__(self) -> str:
        return f"{self.file}: signed by {self.identity} (vouched for by {self.issuer}) between {self.after} and {self.before}"


def verify(data: bytes, file: str, bundle: Path, signer: Signer, trusted_root: Path | None = None) -> Signed:
    """Verifies a bundle over ``data``; asks no network.

    Args:
        data: the bytes of ``file``, as the caller goes on to use them.
        bundle: file of the sigstore bundle.
        signer: who must have signed.
        trusted_root: file of a sigstore trusted root; by default the public one, as the installed sigstore has it.

    Raises:
        SignatureError: there is no bundle or it is none; it signs other bytes; another signed; the certificate is not of an authority of the trusted
            root, or had expired; the log entry is not one of its log.
        ToolchainError: sigstore is not installed.
    """
    try:
        from sigstore.errors import CertValidationError
        from sigstore.models import Bundle
        from sigstore.verify import Verifier, policy
    except ImportError as error:
        raise ToolchainError(f"signatures need {error.name}: install densemoe[signing]") from None
    text = _read(bundle, "bundle", f"{file} has no signature: {bundle} does not exist; name the bundle with --bundle, or fetch it from the release")
    with _refusing(f"{bundle} is no sigstore bundle of one signature"):
        found = Bundle.from_json(text)
        certificate = found.signing_certificate
    sha256 = hashlib.sha256(data)
    stated = _stated_digest(found)
    if stated is None:
        raise SignatureError(f"{bundle} holds an attestation, not a signature of {file}: sign the file itself, with `sigstore sign`")
    if stated not in (b"", sha256.digest()):
        raise SignatureError(f"{file} is not the file that was signed: its sha256 is {sha256.hexdigest()}, {bundle} signs {stated.hex()}")
    root = _trusted_root(trusted_root)
    expected = _Expected(policy.Identity(identity=signer.identity, issuer=signer.issuer))
    said = "; the signature cannot be trusted"
    try:
        with _quiet():
            Verifier(trusted_root=root).verify_artifact(data, found, expected)
    except CertValidationError as error:
        raise SignatureError(f"{file}: {_certificate_fault(certificate, root, trusted_root)} ({error}){said}") from None
    except Exception as error:  # sigstore's own, and those of the parsers below it
        if expected.refused:
            raise SignatureError(f"{file} was signed by {_signer(certificate)}, not by {signer}{said}") from None
        raise SignatureError(f"{file}: {bundle} does not hold: {type(error).__name__}: {error}{said}") from None
    after, before = (time.strftime("%Y-%m-%dT%H:%M:%SZ") for time in (certificate.not_valid_before_utc, certificate.not_valid_after_utc))
    return Signed(file, sha256.hexdigest(), str(bundle), signer.identity, signer.issuer, after, before)


class _Expected:
    """A policy that notes whether it was what refused a certificate."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.refused = policy, False

    def verify(self, cert: Certificate) -> None:
        try:
            self.policy.verify(cert)
        except Exception:
            self.refused = True
            raise


def _read(path: Path, what: str, absent: str) -> bytes:
    """Bytes of a file that the caller named, or that lies beside what he named; a link is followed, as he could have named its target."""
    if not path.exists():
        raise SignatureError(absent)
    try:
        return read_file(path.resolve(), LARGEST_BUNDLE)
    except ArtifactError as error:
        raise SignatureError(f"{what}: {error}") from None


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Any error inside as a SignatureError: a document from outside runs through parsers with errors of their own."""
    try:
        with _quiet():
            yield
    except Exception as error:
        raise SignatureError(f"{what}: {type(error).__name__}: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without sigstore's log lines, among them a warning that it does not go to the network, which is meant."""
    logger = logging.getLogger("sigstore")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _trusted_root(path: Path | None) -> TrustedRoot:
    from sigstore.models import ClientTrustConfig, TrustedRoot

    if path is None:
        with _refusing("the public trusted root cannot be read; name a file with --trusted-root"):
            return ClientTrustConfig.production(offline=True).trusted_root
    _read(path, "trusted root", f"{path} does not exist: --trusted-root names a sigstore trusted root, a JSON file")
    with _refusing(f"{path} is no sigstore trusted root"):
        root = TrustedRoot.from_file(str(path))
        root.get_fulcio_certs()
        return root


def _stated_digest(bundle: Bundle) -> bytes | None:
    """The sha256 that a bundle says it signs, empty where it says none; None where it holds an attestation instead."""
    signature = json.loads(bundle.to_json()).get("messageSignature")
    if signature is None:
        return None
    return base64.b64decode((signature.get("messageDigest") or {}).get("digest", ""))


def _certificate_fault(certificate: Certificate, root: TrustedRoot, path: Path | None) -> str:
    """Why a certificate does not chain: none of the root's authorities issued it, or it was not valid when the signature was seen."""
    from cryptography.exceptions import InvalidSignature

    for authority in root.get_fulcio_certs():
        try:
            certificate.verify_directly_issued_by(authority)
        except (InvalidSignature, TypeError, ValueError):
            continue
        return (
            "its signing certificate had expired, or was not valid yet, when the signature was made: it holds from"
            f" {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}"
        )
    try:
        issuer = certificate.issuer.rfc4514_string() or "nobody"
    except ValueError:  # names are parsed when they are asked for
        issuer = "someone whose name cannot be read"
    return (
        f"its signing certificate was issued by {issuer}, which is no authority of"
        f" {path or 'the public trusted root'}: name the trusted root of its sigstore instance with --trusted-root"
    )


def _signer(certificate: Certificate) -> Signer:
    """Whom a certificate names, as far as it does."""
    from cryptography import x509

    names, issuer = [], "nobody"
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names += [str(name.value) for name in extension.value]
        elif isinstance(extension.value, x509.UnrecognizedExtension):
            value = extension.value.value
            if extension.oid.dotted_string == _ISSUER:
                issuer = value[2:].decode("utf-8", "replace")  # tag and length of a short UTF8String stand first
            elif extension.oid.dotted_string == _OLD_ISSUER and issuer == "nobody":
                issuer = value.decode("utf-8", "replace")
    return Signer(", ".join(names) or "nobody", issuer)
