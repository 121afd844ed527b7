"""Options of ``densemoe mutate``, which the build side runs: ``densemoe.compile.mutate_cli``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from densemoe.runtime.arguments import natural, seconds

__all__ = ["add_command"]


def add_command(add: Callable[[str, str, str, str], argparse.ArgumentParser], executor: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds ``mutate`` to the parser of the ``densemoe`` command; ``executor`` adds the options that other commands have too."""
    parser = add(
        "mutate",
        "delete or alter each synchronisation, fence, phase and address step of kernels, one at a time: does the emulator notice?",
        "densemoe mutate fc1.sm90a.t8x64.c1x1.bf16-bf16 --count 20 --seed 1",
        "densemoe.compile.mutate_cli:mutate",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="variants (default: those of the suite, see docs/mutation.md)")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="pattern over names of mutants, as in 'delete: fence*'; may be repeated")
    parser.add_argument("--count", type=natural, metavar="N", help="a sample of N mutants a kernel, every kind as often as it can be (default: all)")
    parser.add_argument("--seed", type=natural, default=0, help="of the sample (default: 0)")
    parser.add_argument("--case", action="append", metavar="CASE", help="run this case, as in m=9,e=2,h=384,i=64,kind=exact; may be repeated")
    parser.add_argument("--schedule", action="append", metavar="NAME", help="for --case: lazy, eager, random:SEED, pct:SEED:DEPTH (default: lazy)")
    executor(parser)
    parser.add_argument("--timeout", type=seconds, help="seconds a mutant may take in the local pool; later it is an error (default: no limit)")
    parser.add_argument("--journal", metavar="FILE", help="finished mutants: read first and appended to, so that an interrupted run goes on")
    parser.add_argument("--json", action="store_true", help="print every mutant and what became of it as JSON")
