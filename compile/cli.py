"""Command-line functions of the build side; ``densemoe.runtime.cli`` parses and calls them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from densemoe.compile import build as building
from densemoe.compile import locking, matrix, verification
from densemoe.runtime.lock import Lock

__all__ = ["build", "list_profile"]

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "artifacts" / "built"


def _matrix(path: str | None) -> matrix.Matrix:
    return matrix.load(Path(path) if path else matrix.DEFAULT_MATRIX)


def build(args: argparse.Namespace) -> int:
    """``densemoe build``: 0 when every variant stands, 1 when one failed."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    out = Path(args.out) if args.out else DEFAULT_OUT
    lock = Lock.read() if args.locked else None
    if lock is not None:
        locking.check_toolchain(lock)
    verified: dict[str, verification.Mask] = {}
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("building", total=None)
        result = building.build(
            _matrix(args.matrix),
            out,
            profile=args.profile,
            arch=args.arch,
            key_filter=args.filter,
            jobs=args.jobs,
            timeout=args.timeout,
            where=args.executor or "local",
            ptx=Path(args.ptx) if args.ptx else None,
            started=lambda total: bar.update(task, total=total),
            progress=lambda key, state: bar.update(task, advance=1, description=f"{state} {key}"),
        )
        if args.oracle and not result.failures:
            keys = frozenset((*result.built, *result.reused))
            chosen = [each for each in _matrix(args.matrix).profile(args.profile) if each.variant.key in keys]
            bar.update(task, total=len(chosen), completed=0, description="oracle")
            verified, unequal = verification.record_oracle(
                out, chosen, args.jobs, lambda key, state: bar.update(task, advance=1, description=f"{state} {key}")
            )
            result.failures += unequal
    if args.json:
        print(json.dumps({**dataclasses.asdict(result), "verified": sorted(verified), "masks": verified}, indent=2, sort_keys=True))
    else:
        seconds = sum(result.seconds.values())
        print(f"{out}: {len(result.built)} built ({seconds:.1f} s of compiling), {len(result.reused)} unchanged, {len(result.removed)} removed")
        for name in result.removed:
            print(f"  removed {name}: its variant is no longer in the matrix")
        if args.oracle:
            print(f"  {len(verified)} compared with the compiler's own launches now; earlier records stay")
            for line in _masks(verified):
                print(line)
    for failure in result.failures:
        print(f"FAILED {failure.key}\n  {failure.error}", file=sys.stderr)
    if result.failures:
        unchanged = "" if result.built and args.oracle else "; the set that stood before is unchanged"
        print(f"{len(result.failures)} variants failed{unchanged}", file=sys.stderr)
    differing = 0
    if lock is not None and not result.failures:
        differences = locking.compare(lock, _matrix(args.matrix), args.profile, out, frozenset((*result.built, *result.reused)))
        differing = len(differences)
        for each in differences:
            print(f"NOT AS LOCKED {each}", file=sys.stderr)
        of = len(result.built) + len(result.reused)
        if differing:
            print(f"{differing} of {of} cubins are not as locked", file=sys.stderr)
        elif not args.json:
            print(f"  all {of} cubins are the locked ones, byte for byte")
    return 1 if result.failures or differing else 0


def _masks(verified: Mapping[str, verification.Mask]) -> list[str]:
    """The bytes of the parameter block that were compared, and for which variants."""
    keys: dict[verification.Mask, list[str]] = {}
    for key, mask in verified.items():
        keys.setdefault(mask, []).append(key)
    lines = []
    for mask, named in keys.items():
        bytes_ = " ".join(f"{offset}+{size}" for offset, size in mask)
        lines.append(f"  mask of {named[0]}{f' and {len(named) - 1} more' if len(named) > 1 else ''} (offset+bytes): {bytes_}")
    return lines


def list_profile(args: argparse.Namespace) -> int:
    """``densemoe list --profile``: the variants of a matrix profile, before any build."""
    planned = _matrix(args.matrix).profile(args.profile)
    if args.json:
        rows = [{**dataclasses.asdict(each.variant), "key": each.variant.key, "kernel": each.kernel} for each in planned]
        print(json.dumps(rows, indent=2, sort_keys=True))
    else:
        for each in planned:
            print(f"{each.variant.key}  ({each.kernel})")
        print(f"{len(planned)} variants", file=sys.stderr)
    return 0
