"""``densemoe bench``: arguments, exit codes and what is printed of the benchmarks that need a device; plain text, no rich.

Exit codes: 0 measured; 1 a result disagreed with the reference, or the regret of ``selection`` is above its bars; 2 wrong usage; 3 no device, driver
or numpy.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.errors import ProblemError

if TYPE_CHECKING:
    from densemoe.runtime.loader import Loader
    from densemoe.runtime.tune import Tuner

__all__ = ["SUBJECTS", "add_options", "bench"]

SUBJECTS: Final = ("startup", "launch", "layer", "ops", "selection")
SELECTION_TOKENS: Final = (4, 12, 40, 72, 200)  # none of them one that tuning measures
OUT: Final = "docs/benchmarks"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench`` beside its subject, ``--artifacts`` and ``--json``."""
    from densemoe.runtime.tune_cli import measuring

    measuring(parser)
    parser.add_argument("--sustained", type=float, default=0.0, metavar="SECONDS", help="ops, layer: replay each column so long without pause too")
    parser.add_argument("--competitors", action=argparse.BooleanOptionalAction, default=True, help="ops, layer: measure what else is installed")
    parser.add_argument(
        "--search", type=float, default=0.0, metavar="SECONDS", help="ops, layer: end a competitor's search after so long (default: try everything)"
    )
    parser.add_argument(
        "--beside", action="append", default=[], metavar="[NAME=]ROOT", help="ops, layer: measure another artifact root's kernels in the same rounds"
    )
    parser.add_argument("--from", dest="source", metavar="JSON", help="draw the tables and plots of an earlier run; needs no device")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"folder for JSON, Markdown and SVG (default: {OUT})")


def refuse_foreign(args: argparse.Namespace) -> None:
    """Raises ProblemError for an option that ``startup`` has no use for: it would be ignored in silence."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    for action in parser._actions:
        if action.dest not in ("help", "device") and getattr(args, action.dest) != action.default:
            raise ProblemError(f"bench startup has no {action.option_strings[0]}: leave it out, or name another benchmark")


def bench(args: argparse.Namespace) -> int:
    """Every subject but ``startup``; exit codes as the module's docstring says."""
    from densemoe.runtime import bench_report

    if args.source is not None:
        earlier = bench_report.read(args.source)
        return _show(args, earlier, bench_report.write(earlier, args.out))
    from densemoe.runtime.tune_cases import BENCH_TOKENS, HELD_OUT, MODELS, parse_shapes
    from densemoe.runtime.tune_cli import FORMS, judge, open_tuner, provenance_of

    if args.beside and args.what not in ("ops", "layer"):
        raise ProblemError(f"bench {args.what} has no --beside: leave it out, or name ops or layer")
    for name in ("sustained", "search"):
        if getattr(args, name) < 0:
            raise ProblemError(f"--{name} {getattr(args, name)}: use 0 or a number of seconds")
    shapes = parse_shapes(args.models or (HELD_OUT if args.what == "selection" else MODELS))
    tuner = open_tuner(args)
    if args.what == "selection":
        from densemoe.runtime.select import load_table
        from densemoe.runtime.tune import cases_of

        groups = cases_of(shapes, args.tokens or SELECTION_TOKENS, FORMS[args.form], _dtypes(args), tuner.tiles)
        table = load_table(tuner.loader.manifest(tuner.device).arch)
        return judge(args, tuner, table, [case for cases in groups.values() for case in cases], "selection")
    from densemoe.runtime.bench import launch_costs, open_read
    from densemoe.runtime.bench_competitors import Absent, competitors
    from densemoe.runtime.bench_device import Sensors, set_digest
    from densemoe.runtime.bench_layer import LayerBench
    from densemoe.runtime.bench_nvfp4 import Nvfp4Competitor

    provenance = provenance_of(tuner)
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {"schema": bench_report.SCHEMA, "what": args.what, "provenance": provenance, "absent": {}, "rows": rows}
    if args.what == "launch":
        from densemoe.runtime.bench_overhead import op_overheads

        rows += launch_costs(tuner) + op_overheads()
        return _show(args, document, bench_report.write(document, args.out))
    others = competitors() if args.competitors else []
    document["absent"] = {each.name: each.reason for each in others if isinstance(each, Absent)}
    for each in others:
        if isinstance(each, Nvfp4Competitor):
            each.say, each.seconds = tuner.say, args.search
    for name, reason in document["absent"].items():
        tuner.say(f"absent, its column stays empty: {name}: {reason}")
    beside = open_beside(args.beside, tuner)
    document["beside"] = {name: set_digest(loader.manifest(tuner.device)) for name, loader in beside.items()}
    read = open_read(tuner)
    own = LayerBench(
        tuner,
        read,
        others,
        sustained=args.sustained,
        sensors=Sensors(tuner.driver, tuner.device).read,
        bytes_per_second=provenance["read_bytes_per_second"],
        beside=beside,
    )
    run = own.ops if args.what == "ops" else own.layer
    try:
        with _terminated():
            for dtypes in _dtypes(args):
                for active in FORMS[args.form]:
                    for row in run(shapes, sorted(set(args.tokens or BENCH_TOKENS)), active, dtypes):
                        rows.append(row)
                        bench_report.keep(document, args.out)
    finally:
        if read is not None:
            read.close()
        if rows:  # also of a run that was interrupted
            paths = bench_report.write(document, args.out)
    return _show(args, document, paths)


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, so that what was measured is written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, to which signals do not come
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def open_beside(given: Sequence[str], tuner: Tuner) -> dict[str, Loader]:
    """Loaders of ``--beside`` by name; a root without a name is called as its folder.

    Raises:
        ProblemError: two of one name; ArtifactNotFound and the like: a root that cannot be opened, or has nothing for the device.
    """
    found: dict[str, Loader] = {}
    for each in given:
        name, _, root = each.rpartition("=")
        name = name or Path(root).resolve().name
        if name in found:
            raise ProblemError(f"--beside {each}: another root is called {name} already; give it a name, as in --beside new={root}")
        found[name] = open_loader(root)
        found[name].manifest(tuner.device)
    return found


def open_loader(root: str) -> Loader:
    """A Loader of one artifact root."""
    from densemoe.runtime.loader import Loader

    return Loader(root)


def _dtypes(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    from densemoe.runtime.tune import DTYPES

    return [each for each in DTYPES if args.a_dtype in (None, each[0])]


def _show(args: argparse.Namespace, document: Mapping[str, Any], paths: Any) -> int:
    from densemoe.runtime.bench_report import markdown

    if args.json:
        print(json.dumps(document, indent=2, sort_keys=True))
    else:
        print(markdown(document))
    for path in paths:
        print(f"{path} written", file=sys.stderr)
    if document["what"] in ("ops", "layer") and not any(path.suffix == ".svg" for path in paths):
        print(f"no plots: matplotlib is not installed; `densemoe bench {document['what']} --from {paths[0]}` draws them anywhere", file=sys.stderr)
    return int(any(row.get("passed") is False for row in document["rows"]))
