"""``densemoe mutate``; ``densemoe.runtime.cli`` parses and calls it."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from densemoe.compile.emulate import mutation
from densemoe.compile.emulator.machine import Schedule
from densemoe.compile.executor import open_executor
from densemoe.runtime.errors import ProblemError

__all__ = ["mutate"]

#: Of a kernel's mutants: noticed, of those that are not equivalent, at least; equivalent, of all, at most.
GOAL, EQUIVALENT = 0.95, 0.05


def mutate(args: argparse.Namespace) -> int:
    """0 when every kernel reaches the goal; 1 when one does not, when too many are equivalent, or when a proof was not needed."""
    if args.schedule and not args.case:
        raise ProblemError("--schedule says how a --case is run: give one, as in --case m=9,e=2,h=384,i=64,kind=exact")
    for schedule in args.schedule or ():
        Schedule.parse(schedule)
    runs = tuple(itertools.product(args.case or (), args.schedule or ("lazy",)))
    only = args.only or ()
    console = Console(stderr=True)
    executor = open_executor(args.executor or "local", args.jobs, args.timeout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        subjects = [mutation.subject(key, runs) for key in args.keys or mutation.SUBJECTS]
        report = mutation.run(
            subjects,
            executor,
            only=only,
            count=args.count,
            seed=args.seed,
            journal=Path(args.journal) if args.journal else None,
            progress=lambda key, done, total: bar.update(task, description=key, completed=done, total=total),
        )
    if not report.findings:
        raise ProblemError(f"--only {' '.join(map(repr, only))} names no mutant: names are as in 'delete: fence.proxy.async #1'")
    if args.json:
        print(json.dumps(report.as_dict(), indent=2, sort_keys=True))
    else:
        _print(report)
    short = [key for key, each in report.by_kernel().items() if each.share < GOAL or each.equivalent_share > EQUIVALENT]
    if only or args.count is not None:  # a share of few says little: every survivor counts
        short = [key for key, each in report.by_kernel().items() if each.count("survived")]
    for key in short:
        print(f"{key}: mutants survived without a proof, or too many need one", file=sys.stderr)
    for each in report.unused:
        print(f"no survivor needs the proof of {each.name!r} for {each.kernels}: take it out", file=sys.stderr)
    return 1 if short or report.unused else 0


def _print(report: mutation.Report) -> None:
    for finding in report.findings:
        if not finding.noticed:
            proof = f": {finding.detail}" if finding.detail else ""
            print(f"{finding.outcome} {finding.key} line {finding.line}, {finding.name}\n    {finding.text}{proof}")
    for key, each in report.by_kernel().items():
        counts = ", ".join(f"{each.count(outcome)} {outcome}" for outcome in mutation.OUTCOMES if each.count(outcome))
        print(f"{key}: {len(each.findings)} mutants, {counts}; noticed {100 * each.share:.1f} % of those that are not equivalent")
