"""``densemoe verify``: every file of an artifact root or wheel against its manifest, and, where asked, the signature over all of them.

Exit codes: 0 all is as stated (and signed); 1 something is not, a signature that is missing or does not hold among it; 2 wrong usage; 3 there are no
artifacts, or the extra ``signing`` is missing. With ``--emulate`` as ``densemoe.compile.emulate_cli`` says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.arguments import natural, positive, seconds
from densemoe.runtime.errors import ArtifactCorrupt, ArtifactError, ArtifactNotFound, ManifestError, ProblemError
from densemoe.runtime.fields import plain

if TYPE_CHECKING:
    from densemoe.runtime.loader import ArtifactSet
    from densemoe.runtime.signature import Signed

__all__ = ["add_command", "check_files", "refuse_idle_options", "verify"]

#: Options that say how to emulate, and those that say whose signature; without --emulate, or --signature, they would be ignored in silence.
_EMULATION: Final = ("arch", "filter", "matrix", "cases", "full", "case", "seeds", "schedules", "executor", "jobs", "timeout")
_SIGNING: Final = ("identity", "issuer", "bundle", "trusted_root")

Add = Callable[[str, str, str, str], argparse.ArgumentParser]


def add_command(add: Add, executor: Callable[[argparse.ArgumentParser], None], common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds ``verify`` to the parser of the ``densemoe`` command; ``executor`` and ``common`` add the options that other commands have too."""
    parser = add(
        "verify",
        "check every manifest, file size, hash and what each cubin says of itself; with --signature who signed them; with --emulate run every"
        " variant's PTX on the emulator",
        "densemoe verify --signature --identity release@example.org --issuer https://accounts.example.org",
        "verify",
    )
    parser.add_argument("--wheel", help="check the artifacts inside this wheel, which need not be installed")
    parser.add_argument("--signature", action="store_true", help="verify a sigstore bundle first: of the wheel, or of the root's index.json")
    parser.add_argument("--identity", help="with --signature: who must have signed, an e-mail address or a workflow's URI; required")
    parser.add_argument("--issuer", metavar="URL", help="with --signature: OpenID Connect issuer that vouches for the identity; required")
    parser.add_argument("--bundle", metavar="FILE", help="with --signature: the bundle (default: <file>.sigstore.json, beside the signed file)")
    parser.add_argument("--trusted-root", metavar="FILE", help="with --signature: sigstore trusted root (default: sigstore's public one)")
    parser.add_argument("--emulate", action="store_true", help="run the variants and write verification records; needs the extra [build]")
    parser.add_argument("--arch", help="with --emulate: only this architecture")
    parser.add_argument("--filter", help="with --emulate: shell pattern over variant keys")
    parser.add_argument("--matrix", help="with --emulate: the matrix that the set was built from (default: the project's)")
    parser.add_argument("--cases", type=positive, help="with --emulate: cases a variant (default: a covering array of the contract's grid)")
    parser.add_argument("--full", action="store_true", help="with --emulate: the whole grid")
    parser.add_argument("--case", help="with --emulate: this case alone, as a failure names it; writes no record")
    parser.add_argument("--seeds", type=natural, nargs="+", help="with --emulate: seeds of the data (default: 0)")
    parser.add_argument("--schedules", nargs="+", help="with --emulate: eager, lazy, random, pct, or random:SEED, pct:SEED:DEPTH (default: random)")
    executor(parser)
    parser.add_argument("--timeout", type=seconds, help="with --emulate: seconds a run may take in the local pool (default: no limit)")
    common(parser)


def verify(args: argparse.Namespace) -> int:
    """``densemoe verify`` of files; exit codes as the module's docstring says."""
    if args.wheel:
        found = _check_wheel(args)
    else:
        from densemoe.runtime.loader import ArtifactSet

        artifacts = ArtifactSet(args.artifacts)
        signed = [_signed_root(args, each) for each in _roots(artifacts)] if args.signature else []
        found = {**check_files(artifacts), "signatures": signed}
    if args.json:
        print(json.dumps({**found, "signatures": [vars(each) for each in found["signatures"]]}, indent=2, sort_keys=True))
    else:
        for each in found["signatures"]:
            print(each)
        print(f"{found['root']}: {found['verified']} cubins are what their manifests say")
        for fault in found["faults"]:
            print(f"  FAULT {plain(fault)}")
    return int(bool(found["faults"]))


def refuse_idle_options(args: argparse.Namespace) -> None:
    """Raises ProblemError for options that would be ignored in silence, or that do not go together."""

    def given(names: tuple[str, ...]) -> list[str]:
        return [name.replace("_", "-") for name in names if getattr(args, name)]

    if args.emulate and (idle := given(("wheel", "signature", *_SIGNING))):
        raise ProblemError(f"--{idle[0]} does not go with --emulate: check the files in a run of its own")
    if args.full and args.cases:
        raise ProblemError(f"--full is the whole grid, --cases {args.cases} a part of it: give one of them")
    if not args.emulate and (idle := given(_EMULATION)):
        raise ProblemError(f"--{idle[0]} belongs to --emulate: add it, or leave the option out")
    if not args.signature and (idle := given(_SIGNING)):
        raise ProblemError(f"--{idle[0]} belongs to --signature: add it, or leave the option out")
    if args.signature and not (args.identity and args.issuer):
        raise ProblemError("--signature needs --identity and --issuer: a signature by anybody says nothing; the release notes state both")
    if args.wheel and args.artifacts:
        raise ProblemError("--wheel and --artifacts: use one of them")


def _signature(args: argparse.Namespace, data: bytes, file: Path) -> Signed:
    from densemoe.runtime.signature import BUNDLE_SUFFIX, Signer, verify

    bundle = Path(args.bundle) if args.bundle else file.with_name(file.name + BUNDLE_SUFFIX)
    root = Path(args.trusted_root) if args.trusted_root else None
    return verify(data, str(file), bundle, Signer(args.identity, args.issuer), root)


def _signed_root(args: argparse.Namespace, artifacts: ArtifactSet) -> Signed:
    """The signature over a root's index, which is the index that ``artifacts`` uses."""
    from densemoe.runtime.canonical import read_file
    from densemoe.runtime.manifest import INDEX_NAME, LARGEST_MANIFEST, Index

    if args.bundle and artifacts.addons:
        raise ProblemError("--bundle belongs to one artifact root, and add-ons bring more: name a root with --artifacts")
    path = artifacts.root / INDEX_NAME
    data = read_file(path, LARGEST_MANIFEST)
    signed = _signature(args, data, path)
    if Index.from_bytes(data, str(path)) != artifacts.index:
        raise ArtifactCorrupt(f"{path} changed while it was read: a build or a fetch works there; verify again")
    return signed


def _check_wheel(args: argparse.Namespace) -> dict[str, Any]:
    """The signature over a wheel where it is asked for, then the files in it, from the same bytes."""
    from densemoe.runtime.canonical import read_file
    from densemoe.runtime.loader import ArtifactSet
    from densemoe.runtime.wheels import LARGEST_WHEEL, extract

    wheel = Path(args.wheel)
    if not wheel.is_file():
        raise ArtifactNotFound(f"{wheel} does not exist: give a .whl file")
    data = read_file(wheel.resolve(), LARGEST_WHEEL)
    signed = [_signature(args, data, wheel)] if args.signature else []
    with tempfile.TemporaryDirectory(prefix="densemoe-verify-") as folder:
        found = check_files(ArtifactSet(extract(wheel, Path(folder) / "wheel", data)))
    return {**found, "root": str(wheel), "signatures": signed}


def _roots(artifacts: ArtifactSet) -> list[ArtifactSet]:
    """A root and those of add-ons, each once: without an installed root, the first add-on's stands in its place."""
    return [artifacts, *(each for each in artifacts.addons if each.root != artifacts.root)]


def check_files(artifacts: ArtifactSet) -> dict[str, Any]:
    """Every file against its manifest, add-ons' too: ``root``, the number ``verified``, ``faults`` in words.

    Raises:
        ArtifactError: an index or a manifest cannot be read, or is not the one that is named.
    """
    recheck = importlib.import_module("densemoe.compile.recheck").recheck  # needs the standard library only
    good, faults = 0, []
    for each in _roots(artifacts):
        listed = set()
        for arch in sorted(each.index.sets):
            manifest = _manifest(each, arch)
            for entry in manifest.variants.values():
                listed.add(each.root / arch / entry.file)
                try:
                    found = recheck(entry, each.image(entry), manifest.toolchain["ptxas"])
                except ArtifactError as error:
                    found = [str(error)]
                faults += found
                good += not found
        for cubin in sorted(each.root.glob("*/*.cubin")):
            if cubin not in listed:
                faults.append(f"{cubin} is in no manifest: a stale file; build or install again")
    return {"root": str(artifacts.root), "verified": good, "faults": faults}


def _manifest(artifacts: ArtifactSet, arch: str) -> Any:
    """A manifest, read once, compared with the index and parsed in full."""
    from densemoe.runtime.canonical import read_file
    from densemoe.runtime.manifest import LARGEST_MANIFEST, Manifest

    entry = artifacts.index.sets[arch]
    path = artifacts.root / entry.manifest
    data = read_file(path, LARGEST_MANIFEST)
    if not entry.is_of(data):
        raise ArtifactCorrupt(f"{path} is not the manifest that the index names: an interrupted build or a changed file; build or install again")
    manifest = Manifest.from_bytes(data, str(path))
    if (manifest.arch, len(manifest.variants)) != (arch, entry.variants):
        stated = f"{entry.variants} variants for {arch}"
        raise ManifestError(f"{path} has {len(manifest.variants)} variants for {manifest.arch}, the index says {stated}: build or install again")
    return manifest
