"""Commands of releases and of machines: what is locked, what differs, what fits this machine, what a model needs.

``densemoe.runtime.cli`` adds them to its parser and runs them; what needs the compiler is found lazily in ``densemoe.compile.release_cli``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from densemoe.runtime.arguments import positive
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.fields import plain

if TYPE_CHECKING:
    from densemoe.runtime.coverage import Cell

__all__ = ["add_commands", "check", "coverage", "fetch"]

_BUILD: Final = "densemoe.compile.release_cli"

#: (name, summary, example, function) → the command's parser
Add = Callable[[str, str, str, str], argparse.ArgumentParser]


def _artifacts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifacts", help="artifact root (default: DENSEMOE_ARTIFACTS, else the installed package's)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_commands(add: Add) -> None:
    """Adds this module's commands to the parser of the ``densemoe`` command."""
    lock = add(
        "lock",
        "build the whole profile and write what it gave, and with which toolchain, into artifacts/manifest.lock",
        "densemoe lock --check",
        f"{_BUILD}:lock",
    )
    lock.add_argument("--matrix", help="the matrix file (default: the project's build_matrix.yaml)")
    lock.add_argument("--profile", default="full", help="profile that the lock covers (default: full)")
    lock.add_argument("--lock", help="the lock file (default: artifacts/manifest.lock)")
    lock.add_argument("--out", help="artifact root to build in (default: artifacts/built)")
    lock.add_argument("--jobs", type=int, help="compiler processes (default: the cores this process may use)")
    lock.add_argument("--check", action="store_true", help="build, compare and write nothing; exit code 1 where something differs")
    lock.add_argument("--resolve", action="store_true", help="ask the package index for the wheels of the build environment anew")
    lock.add_argument("--json", action="store_true", help="print the result as JSON")

    fetch = add(
        "fetch",
        "an artifact root from a web server or a bucket into a folder, checked against the lock, resumable",
        "densemoe fetch https://example.org/densemoe/0.1.0 --out /opt/densemoe",
        "densemoe.runtime.release_cli:fetch",
    )
    fetch.add_argument("url", help="of the folder that holds index.json; any address that fsspec knows")
    fetch.add_argument("--out", required=True, help="artifact root to write; use it with DENSEMOE_ARTIFACTS afterwards")
    fetch.add_argument("--arch", action="append", default=[], help="only this architecture; may be repeated")
    fetch.add_argument("--unlocked", action="store_true", help="take cubins that artifacts/manifest.lock does not state")
    fetch.add_argument("--json", action="store_true", help="print JSON")

    reproduce = add(
        "reproduce",
        "build again from the lock: in a fresh environment, under another path, user, locale and driver, with other Pythons; compare bit for bit",
        "densemoe reproduce --sample 4",
        f"{_BUILD}:reproduce",
    )
    what = reproduce.add_mutually_exclusive_group()
    what.add_argument("--wheel", help="compare with the cubins of this wheel (default: with the lock)")
    what.add_argument("--artifacts", help="compare with the cubins of this artifact root")
    reproduce.add_argument("--sample", type=int, default=0, help="only so many variants, spread evenly (default: 0, all)")
    reproduce.add_argument("--python", action="append", metavar="VERSION", help="only these Python versions, as in 3.12; may be repeated")
    reproduce.add_argument("--no-environment", action="store_true", help="compile with the interpreters as they are, not in fresh environments")
    reproduce.add_argument("--json", action="store_true", help="print JSON")

    diff = add(
        "diff",
        "what two artifact roots or wheels differ in: variants, sizes, registers, symbols, toolchain, selection",
        "densemoe diff densemoe-0.1.0-py3-none-any.whl artifacts/built",
        "densemoe.compile.diff:main",
    )
    diff.add_argument("first", help="artifact root, or .whl file")
    diff.add_argument("second", help="artifact root, or .whl file")
    diff.add_argument("--json", action="store_true", help="print JSON")

    check = add(
        "check",
        "whether the artifacts are valid, run but not optimally, or are invalid on this machine, and what to do; loads no kernel",
        "densemoe check --device-profile h200 --device-profile b200 --driver 12.8",
        "densemoe.runtime.release_cli:check",
    )
    check.add_argument("--device-profile", action="append", default=[], metavar="NAME|FILE", help="judge for this device; may be repeated")
    check.add_argument("--driver", help="with profiles: CUDA version of the driver, as in 12.8 (default: the profile's)")
    check.add_argument("--strict", action="store_true", help="exit code 1 for 'runs but not optimal' too")
    _artifacts(check)

    coverage = add(
        "coverage",
        "which of a model's shapes and buckets of M have a variant, measured or modelled, and which have none",
        "densemoe coverage deepseek-v3 --tp 8",
        "densemoe.runtime.release_cli:coverage",
    )
    coverage.add_argument("model", help="config.json of a Hugging Face model, a folder with one, or a known model's name")
    coverage.add_argument("--tp", type=int, default=1, help="tensor parallelism: ranks that share each expert's I (default: 1)")
    coverage.add_argument("--ep", type=int, default=1, help="expert parallelism: ranks that share the experts (default: 1)")
    coverage.add_argument("--arch", action="append", default=[], help="only this architecture's set; may be repeated (default: all)")
    coverage.add_argument("--a-dtype", choices=("bf16", "nvfp4"), help="only these activations (default: both)")
    coverage.add_argument("--m", type=int, action="append", help="only these numbers of tokens; may be repeated")
    _artifacts(coverage)
    _add_proof_commands(add)
    _add_torch_commands(add)


def _add_proof_commands(add: Add) -> None:
    proof = add(
        "proof",
        "on a B200 or B300: the contract's grids by every variant, tuning, speed against the roofline, into one record; resumable",
        "densemoe proof --out b200.json",
        "densemoe.compile.proof:proof",
    )
    proof.add_argument("--out", default="blackwell-proof.json", help="record to write (default: blackwell-proof.json); work is kept beside it")
    proof.add_argument("--fresh", action="store_true", help="drop what an earlier run kept")
    proof.add_argument("--device", type=int, default=0, metavar="ORDINAL", help="device ordinal (default: 0)")
    proof.add_argument("--models", nargs="+", metavar="SHAPE", help="MODEL[:tpN][:epN] or ExKxHxI to tune (default: the five of the bars)")
    proof.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of tuning (default: no limit)")
    _artifacts(proof)

    merge = add(
        "merge-record",
        "a proof's record into the selection table: modelled choices of its device become measured ones",
        "densemoe merge-record b200.json",
        "densemoe.compile.proof:merge_record",
    )
    merge.add_argument("record", help="file that densemoe proof wrote")
    merge.add_argument("--table", help="selection table to change (default: artifacts/selection/sm_100f.json)")
    merge.add_argument("--json", action="store_true", help="print JSON")


def _add_torch_commands(add: Add) -> None:
    convert = add(
        "convert",
        "the experts of a checkpoint (NVFP4 or unquantised) as a packed checkpoint that loads by mmap",
        "densemoe convert Qwen3-30B-A3B-NVFP4 experts.safetensors",
        "densemoe.runtime.torch.cli:convert",
    )
    convert.add_argument("source", help="safetensors file or folder of them")
    convert.add_argument("target", help="file to write")
    convert.add_argument("--arch", default="sm_90a", choices=("sm_90a", "sm_100f"), help="whose weight layout (default: sm_90a)")
    convert.add_argument("--tp-size", type=int, default=1, help="ranks that I is split over (default: 1)")
    convert.add_argument("--tp-rank", type=int, default=0, help="which of them this file is for (default: 0)")
    convert.add_argument("--json", action="store_true", help="print JSON")

    numerics = add(
        "numerics",
        "error of a layer against its unquantised self, by form and number of tokens",
        "densemoe numerics --experts 8 --hidden 512 --intermediate 512",
        "densemoe.runtime.torch.cli:numerics",
    )
    numerics.add_argument("--experts", type=positive, default=8)
    numerics.add_argument("--top-k", type=positive, default=2)
    numerics.add_argument("--hidden", type=positive, default=512)
    numerics.add_argument("--intermediate", type=positive, default=512)
    numerics.add_argument("--m", type=positive, nargs="+", default=[1, 8, 64], help="tokens (default: 1 8 64)")
    numerics.add_argument("--device", default="cpu", help="cpu (the exact reference) or cuda (the kernels)")
    numerics.add_argument("--json", action="store_true", help="print JSON")


def fetch(args: argparse.Namespace) -> int:
    """``densemoe fetch``: 0 when the root is whole in its place."""
    from densemoe.runtime import fetch as fetching
    from densemoe.runtime.lock import Lock

    lock = None if args.unlocked else Lock.read()
    found = fetching.fetch(args.url, Path(args.out), architectures=args.arch, lock=lock)
    if args.json:
        print(json.dumps(vars(found), indent=2, sort_keys=True))
    else:
        print(f"{args.out}: {len(found.fetched)} fetched, {len(found.kept)} there already, {found.received} bytes received")
    return 0


def check(args: argparse.Namespace) -> int:
    """``densemoe check``; exit codes as ``densemoe.runtime.check`` says."""
    from densemoe.runtime import check as checking

    if args.driver is not None and not args.device_profile:
        raise ProblemError("--driver belongs to --device-profile: this machine's own driver is asked where none is given")
    driver = checking.parse_version(args.driver) if args.driver is not None else None
    devices = [checking.profile(name, driver) for name in args.device_profile] or checking.here()
    verdicts = [checking.check_device(device, args.artifacts) for device in devices]
    if args.json:
        print(json.dumps([each.to_json() for each in verdicts], indent=2, sort_keys=True))
    else:
        for each in verdicts:
            served = f", set {each.arch}" if each.arch else ""
            driver_text = checking.version_text(each.device.driver)
            print(f"{each.device.where}: {each.device.name}, driver for CUDA {driver_text}{served}: {each.state.upper()}")
            for finding in each.findings:
                print(f"  [{finding.state}] {plain(finding.reason)}\n      do: {plain(finding.remedy)}")
    states = {each.state for each in verdicts}
    return int(checking.INVALID in states or (args.strict and checking.NOT_OPTIMAL in states))


def coverage(args: argparse.Namespace) -> int:
    """``densemoe coverage``; exit codes as ``densemoe.runtime.coverage`` says."""
    from densemoe.runtime import coverage as covering
    from densemoe.runtime.model_config import read_config
    from densemoe.runtime.variant import architecture

    for name, values in (("--tp", [args.tp]), ("--ep", [args.ep]), ("--m", args.m or [])):
        if any(value < 1 for value in values):
            raise ProblemError(f"{name} {min(values)}: use a positive integer")
    layer = read_config(args.model)
    if layer.refused:
        if args.json:
            print(json.dumps({"layer": vars(layer), "cells": []}, indent=2, sort_keys=True))
        else:
            print(f"{layer.model} ({layer.model_type}) cannot run on densemoe:")
            for reason in layer.refused:
                print(f"  {reason}")
        return 1
    cells = covering.cover(
        layer,
        args.artifacts,
        tensor_parallel=args.tp,
        expert_parallel=args.ep,
        activations=[args.a_dtype] if args.a_dtype else ("bf16", "nvfp4"),
        tokens=args.m or covering.TOKENS,
        architectures=[architecture(name).name for name in args.arch],
    )
    missing = [cell for cell in cells if cell.state == covering.NONE]
    if args.json:
        print(json.dumps({"layer": vars(layer), "cells": [vars(cell) for cell in cells]}, indent=2, sort_keys=True))
        return int(bool(missing))
    experts, intermediate = layer.shard(args.tp, args.ep)
    shared = f", beside shared experts with I {layer.shared}" if layer.shared else ""
    sizes = f"E {experts}, H {layer.hidden}, I {intermediate}, k {layer.top_k} of {layer.experts}"
    print(f"{layer.model} ({layer.model_type}): on each rank {sizes}{shared}")
    for name, state, text in _runs(cells):
        print(f"  {name:24} {state:9} {text}")
    counts = {state: sum(cell.state == state for cell in cells) for state in ("measured", "modelled", covering.NONE)}
    print(f"{len(cells)} buckets: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return int(bool(missing))


def _runs(cells: Sequence[Cell]) -> Iterator[tuple[str, str, str]]:
    """Neighbouring buckets of one kernel with one outcome, as a row: name, state, M and variant or reason."""

    def outcome(cell: Cell) -> tuple[str, str, str]:
        return f"{cell.arch} {cell.activations} {cell.op}", cell.state, cell.key or cell.reason.replace(f" at M = {cell.m}", "")

    for (kernel, state, text), group in itertools.groupby(cells, outcome):
        m = [cell.m for cell in group]
        yield kernel, state, f"{f'M = {m[0]}' if len(m) == 1 else f'M = {m[0]} to {m[-1]}'}  {text}"
