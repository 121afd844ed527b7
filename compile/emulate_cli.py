"""``densemoe verify --emulate``; ``densemoe.runtime.cli`` parses and calls it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from densemoe.compile import matrix
from densemoe.compile.emulate import verify as verifying
from densemoe.compile.executor import open_executor
from densemoe.runtime.errors import ArtifactError, ArtifactNotFound, SelectionError
from densemoe.runtime.loader import ArtifactSet

__all__ = ["verify"]

_ERROR_LINES = 12  # of one failure; a deadlock names every stuck warp


class _Watched(verifying.Progress):
    """Progress on a terminal; failures at once."""

    def __init__(self, bar: Bar, console: Console) -> None:
        self._bar, self._console = bar, console
        self._task: TaskID = bar.add_task("reading", total=None)

    def stage(self, what: str, total: int) -> None:
        self._bar.update(self._task, total=total, completed=0, description=what)
        self._what = what

    def advance(self, what: str) -> None:
        self._bar.update(self._task, advance=1, description=f"{self._what} {what}")

    def failed(self, failure: verifying.Failure) -> None:
        self._console.print(_described(failure), markup=False, highlight=False, soft_wrap=True)


def _described(failure: verifying.Failure) -> str:
    lines = failure.error.splitlines()
    if len(lines) > _ERROR_LINES:
        lines[_ERROR_LINES:] = [f"and {len(lines) - _ERROR_LINES} more lines: the command below shows them"]
    where = f", case {failure.case}, seed {failure.seed}, schedule {failure.schedule}" if failure.case else ""
    return "\n  ".join([f"FAILED {failure.key}{where}", *lines, *([f"repeat: {failure.command}"] if failure.command else [])])


def _subjects(args: argparse.Namespace) -> tuple[Path, list[verifying.Subject]]:
    """The artifact root, and the built variants that are asked for."""
    artifacts = ArtifactSet(args.artifacts)
    if args.arch is not None and args.arch not in artifacts.architectures:
        raise SelectionError(f"{artifacts.root} has no set for {args.arch!r}: it has {', '.join(artifacts.architectures)}")
    planned = {each.variant.key: each for each in matrix.load(Path(args.matrix) if args.matrix else matrix.DEFAULT_MATRIX).profile("full")}
    entries = [
        entry
        for arch in artifacts.architectures
        if args.arch in (None, arch)
        for entry in artifacts.manifest(arch).variants.values()
        if args.filter is None or fnmatchcase(entry.key, args.filter)
    ]
    if not entries:
        raise SelectionError(f"filter {args.filter!r} matches no variant of {artifacts.root}: `densemoe list` shows the keys")
    unknown = [entry.key for entry in entries if entry.key not in planned]
    if unknown:
        raise ArtifactError(f"{unknown[0]} is built but not in the matrix, which says how it was compiled: build again, or give --matrix")
    roots = {artifacts.root / entry.arch for entry in entries}
    for folder in roots:
        if not folder.is_dir():
            raise ArtifactNotFound(f"{folder} is no folder: records are written into a built artifact root; name one with --artifacts")
    return artifacts.root, [verifying.Subject(entry, planned[entry.key]) for entry in entries]


def verify(args: argparse.Namespace) -> int:
    """0 when every run passed, 1 when one failed; interrupted, what was finished stays and the next call goes on."""
    root, subjects = _subjects(args)
    request = verifying.Request(args.cases, args.full, tuple(args.seeds or (0,)), tuple(args.schedules or ("random",)), args.case)
    console = Console(stderr=True)
    executor = open_executor(args.executor or "local", args.jobs, args.timeout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        result = verifying.verify(root, subjects, request, executor, _Watched(bar, console))
    if args.json:
        print(json.dumps({"root": str(root), **dataclasses.asdict(result)}, indent=2, sort_keys=True))
    else:
        for key, worst in sorted(result.recorded.items()):
            same = f" (same PTX as {result.shared[key]})" if key in result.shared else ""
            print(f"{key}: emulated, worst error {worst:.3g} of its bound{same}")
        if request.only is not None and not result.failures:
            print(f"{result.runs} runs passed; --case writes no record")
        print(
            f"{root}: {len(result.recorded)} variants recorded, {len(result.current)} recorded before,"
            f" {result.runs} runs emulated now, {result.journaled} taken from the journal, {len(result.failures)} failed"
        )
    if result.failures:
        print(f"{len(result.failures)} failed; their variants got no record", file=sys.stderr)
    return 1 if result.failures else 0
