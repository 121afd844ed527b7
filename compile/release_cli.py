"""Command-line functions of releases that need the compiler; ``densemoe.runtime.release_cli`` parses and calls them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from densemoe.compile import build as building
from densemoe.compile import environment, locking, matrix, reproduction
from densemoe.compile.cli import DEFAULT_OUT
from densemoe.runtime.canonical import write_atomically
from densemoe.runtime.errors import ArtifactNotFound, BuildError, ProblemError
from densemoe.runtime.lock import Lock, LockedWheel, default_lock
from densemoe.runtime.wheels import extract

__all__ = ["lock", "report_differences", "reproduce"]


def _built(args: argparse.Namespace, plan: matrix.Matrix, out: Path) -> building.BuildResult:
    result = building.build(plan, out, profile=args.profile, jobs=args.jobs)
    if result.failures:
        raise BuildError("\n".join(f"{failure.key}: {failure.error}" for failure in result.failures))
    return result


def _wheels(path: Path, resolve: bool) -> Mapping[str, LockedWheel]:
    """Wheels of the lock that stands, or, where there is none or it is asked for, what the package index states."""
    if not resolve:
        try:
            return Lock.read(path).wheels
        except ArtifactNotFound:
            pass
    return environment.resolve(environment.interpreters())


def lock(args: argparse.Namespace) -> int:
    """``densemoe lock``: 0 when the lock is written, or with --check says what was built; 1 where it does not."""
    path = Path(args.lock) if args.lock else default_lock()
    plan = matrix.load(Path(args.matrix) if args.matrix else matrix.DEFAULT_MATRIX)
    out = Path(args.out) if args.out else DEFAULT_OUT
    if args.check:
        standing = Lock.read(path)
        locking.check_toolchain(standing)
        _built(args, plan, out)
        if stale := locking.stale_sources(standing, plan):
            print(f"the lock states other sources of {', '.join(stale)}: if their cubins are equal, `densemoe lock` renews it", file=sys.stderr)
        return report_differences(locking.compare(standing, plan, args.profile, out), args.json)
    _built(args, plan, out)
    made = locking.make(plan, args.profile, out, _wheels(path, args.resolve))
    data = made.to_bytes()
    changed = not path.exists() or path.read_bytes() != data
    if changed:
        write_atomically(path, data)
        if path == default_lock():
            _built(args, plan, out)  # manifests say whether their cubins are the locked ones
    if args.json:
        print(json.dumps({"lock": str(path), "changed": changed, "cubins": len(made.cubins), "wheels": len(made.wheels)}, indent=2, sort_keys=True))
    else:
        print(f"{path}: {len(made.cubins)} cubins, {len(made.wheels)} wheels of the toolchain; {'written' if changed else 'unchanged'}")
    return 0


def report_differences(differences: list[locking.Difference], as_json: bool) -> int:
    """Prints differences from the lock; the exit code."""
    if as_json:
        print(json.dumps({"differences": [dataclasses.asdict(each) for each in differences]}, indent=2, sort_keys=True))
    else:
        for each in differences:
            print(each)
        print(f"{len(differences)} variants are not as locked" if differences else "every cubin is the locked one, byte for byte")
    return 1 if differences else 0


def reproduce(args: argparse.Namespace) -> int:
    """``densemoe reproduce``: 0 when every rebuild gave the expected bytes, 1 where one did not."""
    if args.sample < 0:
        raise ProblemError(f"--sample {args.sample}: use a positive number, or 0 for all")
    pythons = environment.interpreters()
    if args.python:
        if unknown := [version for version in args.python if version not in pythons]:
            raise ProblemError(f"--python {unknown[0]}: this machine has {', '.join(pythons)}")
        pythons = {version: pythons[version] for version in args.python}
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="densemoe-wheel-") as folder:
        lock = Lock.read()
        if args.wheel or args.artifacts:
            root = extract(Path(args.wheel), Path(folder)) if args.wheel else Path(args.artifacts)
            expected = reproduction.reference(root, lock, args.wheel or args.artifacts)
        else:
            expected = reproduction.default_reference(lock)
        keys = reproduction.sample(list(expected.sides), args.sample)
        print(f"{len(keys)} of {len(expected.sides)} variants, expected as in {expected.source}", file=sys.stderr)

        def note(text: str) -> None:
            print(f"  {text}", file=sys.stderr, flush=True)

        for outcome in reproduction.reproduce(expected, keys, fresh=not args.no_environment, pythons=pythons, note=note):
            outcomes.append(outcome)
            if not args.json:
                _print_outcome(outcome)
    if args.json:
        print(json.dumps([dataclasses.asdict(each) for each in outcomes], indent=2, sort_keys=True))
    return 0 if outcomes and all(not each.different and not each.errors for each in outcomes) else 1


def _print_outcome(outcome: reproduction.Outcome) -> None:
    state = "DIFFERENT" if outcome.different else "FAILED" if outcome.errors else "equal"
    print(f"{outcome.name}: {state}, {len(outcome.equal)} cubins byte for byte", flush=True)
    for key, sections, cause in outcome.different:
        print(f"  {key}: {', '.join(sections) or 'sha256'} differ\n    likely cause: {cause}")
    for key, error in outcome.errors.items():
        print(f"  {key or 'the whole rebuild'}: {error}")
