"""A sigstore instance of the tests' own: certificate authority, certificate log and transparency log, whose keys never leave this process.

It makes what the public services would: bundles of a signing certificate with its embedded log promise, the log entry with promise, proof of
inclusion and signed checkpoint, and the trusted root that vouches for them. As a program it writes the fixed bundle of tests/runtime/signed::

    python tests/runtime/local_trust.py tests/runtime/signed
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

IDENTITY = "https://example.org/densemoe/.github/workflows/release.yml@refs/tags/v0.1.0"
ISSUER = "https://token.example.org"
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
_SCT_LIST = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_OLD_ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")  # the same as plain text; the public authority writes both
_ORIGIN = "log.example.org - 1"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def der(tag: int, data: bytes) -> bytes:
    length = len(data)
    return bytes([tag, length] if length < 128 else [tag, 0x82, *divmod(length, 256)]) + data


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


class Tree:
    """Merkle tree of RFC 6962."""

    def __init__(self) -> None:
        self.leaves: list[bytes] = []

    def add(self, entry: bytes) -> int:
        self.leaves.append(hashlib.sha256(b"\0" + entry).digest())
        return len(self.leaves) - 1

    def root(self, leaves: list[bytes] | None = None) -> bytes:
        leaves = self.leaves if leaves is None else leaves
        if len(leaves) == 1:
            return leaves[0]
        half = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\1" + self.root(leaves[:half]) + self.root(leaves[half:])).digest()

    def proof(self, index: int, leaves: list[bytes] | None = None) -> list[bytes]:
        leaves = self.leaves if leaves is None else leaves
        if len(leaves) == 1:
            return []
        half = 1 << (len(leaves) - 1).bit_length() - 1
        if index < half:
            return [*self.proof(index, leaves[:half]), self.root(leaves[half:])]
        return [*self.proof(index - half, leaves[half:]), self.root(leaves[:half])]


class LocalTrust:
    """One instance; two of them do not trust each other."""

    def __init__(self, name: str = "densemoe tests") -> None:
        self.ca, self.certificate_log, self.log, self.tree = (*(ec.generate_private_key(ec.SECP256R1()) for _ in range(3)), Tree())
        for number in range(5):
            self.tree.add(b"somebody else's entry %d" % number)
        self.subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name), x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
        self.authority = (
            x509.CertificateBuilder(self.subject, self.subject, self.ca.public_key(), x509.random_serial_number())
            .not_valid_before(AT - timedelta(days=365))
            .not_valid_after(AT + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.ca.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca.public_key()), critical=False)
            .sign(self.ca, hashes.SHA256())
        )

    def trusted_root(self) -> bytes:
        """The document that ``--trusted-root`` names."""
        start = {"start": (AT - timedelta(days=365)).strftime("%Y-%m-%dT%H:%M:%SZ")}

        def log(key: ec.EllipticCurvePrivateKey, url: str) -> dict[str, Any]:
            return {
                "baseUrl": url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": {"rawBytes": b64(public(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": start},
                "logId": {"keyId": b64(hashlib.sha256(public(key)).digest())},
            }

        document = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.log, "https://log.example.org")],
            "ctlogs": [log(self.certificate_log, "https://certificates.example.org")],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "densemoe tests", "commonName": "authority"},
                    "uri": "https://authority.example.org",
                    "certChain": {"certificates": [{"rawBytes": b64(self.authority.public_bytes(serialization.Encoding.DER))}]},
                    "validFor": start,
                }
            ],
            "timestampAuthorities": [],
        }
        return (json.dumps(document, indent=2) + "\n").encode()

    def certificate(self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str, start: datetime) -> x509.Certificate:
        """A code-signing certificate of ten minutes, with the certificate log's promise inside."""
        name = x509.RFC822Name(identity) if "://" not in identity else x509.UniformResourceIdentifier(identity)
        builder = (
            x509.CertificateBuilder(self.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(minutes=10))
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca.public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_OLD_ISSUER, issuer.encode()), critical=False)
            .add_extension(x509.UnrecognizedExtension(_ISSUER, der(0x0C, issuer.encode())), critical=False)
        )
        before = builder.sign(self.ca, hashes.SHA256()).tbs_certificate_bytes
        stamp = int(start.timestamp() * 1000)
        issuer_key = hashlib.sha256(public(self.ca)).digest()
        promise = sign(self.certificate_log, struct.pack("!BBQH", 0, 0, stamp, 1) + issuer_key + len(before).to_bytes(3, "big") + before + b"\0\0")
        log_id = hashlib.sha256(public(self.certificate_log)).digest()
        sct = b"\0" + log_id + struct.pack("!QH", stamp, 0) + b"\4\3" + struct.pack("!H", len(promise)) + promise
        value = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        return builder.add_extension(x509.UnrecognizedExtension(_SCT_LIST, der(0x04, value)), critical=False).sign(self.ca, hashes.SHA256())

    def bundle(
        self, data: bytes, identity: str = IDENTITY, issuer: str = ISSUER, *, at: datetime = AT, logged: datetime | None = None
    ) -> dict[str, Any]:
        """A signature over ``data``, its certificate valid from ``at``, its log entry of ``logged`` (by default a minute later)."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.certificate(key, identity, issuer, at)
        signature, digest = sign(key, data), hashlib.sha256(data)
        body = {
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": {"hash": {"algorithm": "sha256", "value": digest.hexdigest()}},
                "signature": {"content": b64(signature), "publicKey": {"content": b64(certificate.public_bytes(serialization.Encoding.PEM))}},
            },
        }
        entry = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        index = self.tree.add(entry)
        self.tree.add(b"a later entry")
        log_id = hashlib.sha256(public(self.log)).digest()
        seconds = int((logged or at + timedelta(minutes=1)).timestamp())
        promised = {"body": b64(entry), "integratedTime": seconds, "logID": log_id.hex(), "logIndex": index}
        promise = sign(self.log, json.dumps(promised, sort_keys=True, separators=(",", ":")).encode())
        note = f"{_ORIGIN}\n{len(self.tree.leaves)}\n{b64(self.tree.root())}\n"
        checkpoint = f"{note}\n\N{EM DASH} log.example.org {b64(log_id[:4] + sign(self.log, note.encode()))}\n"
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": b64(certificate.public_bytes(serialization.Encoding.DER))},
                "tlogEntries": [
                    {
                        "logIndex": str(index),
                        "logId": {"keyId": b64(log_id)},
                        "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
                        "integratedTime": str(seconds),
                        "inclusionPromise": {"signedEntryTimestamp": b64(promise)},
                        "inclusionProof": {
                            "logIndex": str(index),
                            "rootHash": b64(self.tree.root()),
                            "treeSize": str(len(self.tree.leaves)),
                            "hashes": [b64(each) for each in self.tree.proof(index)],
                            "checkpoint": {"envelope": checkpoint},
                        },
                        "canonicalizedBody": b64(entry),
                    }
                ],
            },
            "messageSignature": {"messageDigest": {"algorithm": "SHA2_256", "digest": b64(digest.digest())}, "signature": b64(signature)},
        }


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def main(folder: Path) -> None:
    """Writes a signed file, its bundle and the trusted root."""
    trust, data = LocalTrust(), b"signed once; the keys are gone\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file.txt").write_bytes(data)
    (folder / "file.txt.sigstore.json").write_text(json.dumps(trust.bundle(data), indent=2) + "\n")
    (folder / "trusted_root.json").write_bytes(trust.trusted_root())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
