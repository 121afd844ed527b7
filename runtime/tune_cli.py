"""``densemoe tune``: arguments, exit codes and what is printed. Needs the extra [host] for measuring; plain text, so that it runs where rich is not.

Exit codes: 0 measured and written, or the check within its bars; 1 a variant disagreed with the reference, or the check's regret is above its bars;
2 wrong usage, or a journal of something else; 3 no device, driver or numpy. An interrupted run keeps every whole case in its journal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.errors import DensemoeError, DriverError, ProblemError

if TYPE_CHECKING:
    from densemoe.runtime.tune import Journal, Measurement, Tuner

__all__ = ["GEOMEAN_BAR", "WORST_BAR", "add_command", "judge", "now", "open_tuner", "tune"]

GEOMEAN_BAR: Final = 0.03
WORST_BAR: Final = 0.10
SAMPLE: Final = 24
CASES_A_LAYER: Final = 12  # sampled, for each whole layer that is measured besides
FORMS: Final[Mapping[str, tuple[bool, ...]]] = {"dense": (False,), "active": (True,), "both": (True, False)}

#: (name, summary, example, function) → the command's parser
Add = Callable[[str, str, str, str], argparse.ArgumentParser]


def add_command(add: Add) -> None:
    """Adds ``tune`` to the parser of the ``densemoe`` command."""
    tune = add(
        "tune",
        "measure every variant on the device at hand and write the selection table; resumable",
        "densemoe tune --models deepseek-v3:tp8 qwen3-30b-a3b --budget 120 --out sm_90a.json",
        "densemoe.runtime.tune_cli:tune",
    )
    measuring(tune)
    tune.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="stop measuring after so long (default: no limit)")
    tune.add_argument("--journal", metavar="FILE", help="measurements kept as they come, taken up again (default: tune-<arch>.jsonl)")
    tune.add_argument("--fresh", action="store_true", help="drop what the journal holds")
    tune.add_argument("--out", metavar="TABLE", help="selection table to write (default: selection-<arch>.json)")
    tune.add_argument("--check", action="store_true", help="measure a sample again and report the regret of the table; writes nothing")
    tune.add_argument("--table", metavar="FILE", help="with --check: the table to judge (default: the installed one)")
    tune.add_argument("--sample", type=int, default=SAMPLE, help=f"with --check: cases to measure (default: {SAMPLE})")
    tune.add_argument("--artifacts", help="artifact root (default: DENSEMOE_ARTIFACTS, else the installed package's)")
    tune.add_argument("--json", action="store_true", help="print JSON")


def measuring(parser: argparse.ArgumentParser) -> None:
    """Options of every command that measures shapes of models."""
    parser.add_argument("--device", type=int, default=0, metavar="ORDINAL", help="device ordinal (default: 0)")
    parser.add_argument("--models", nargs="+", metavar="SHAPE", help="MODEL[:tpN][:epN] or ExKxHxI; several (default: the five of the bars)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="numbers of tokens (default: see docs/tune.md)")
    parser.add_argument("--form", choices=sorted(FORMS), default="both", help="dense, with a list of active experts, or both (default: both)")
    parser.add_argument("--a-dtype", choices=("bf16", "nvfp4"), help="only these activations (default: both)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved replays of each candidate (default: 9)")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def open_tuner(args: argparse.Namespace) -> Tuner:
    """A Tuner on the device that the arguments name, progress to standard error.

    Raises:
        ProblemError: an option that is out of range; DriverError: no numpy, driver or device.
    """
    for name in ("rounds", "sample"):
        if getattr(args, name, 1) < 1:
            raise ProblemError(f"--{name} {getattr(args, name)}: use a positive integer")
    for m in args.tokens or ():
        if m < 1:
            raise ProblemError(f"--tokens {m}: use positive integers")
    try:
        from densemoe.runtime.loader import Loader
        from densemoe.runtime.tune import Tuner
    except ImportError as error:
        if error.name in ("numpy", "ml_dtypes"):
            raise DriverError(f"measuring needs {error.name}: install densemoe[host]") from None
        raise
    return Tuner(Loader(args.artifacts), args.device, rounds=args.rounds, say=lambda line: print(line, file=sys.stderr, flush=True))


def provenance_of(tuner: Tuner) -> dict[str, Any]:
    """What stands in journals and tables: device, driver, versions, set, date, read bandwidth (with its way of measuring), sensors."""
    from densemoe.runtime.bench_device import Sensors, describe

    found = describe(tuner.driver, tuner.device, tuner.loader.manifest(tuner.device), now())
    rate, how = read_rate(tuner)
    found.update(read_bytes_per_second=rate, read_by=how, sensors=Sensors(tuner.driver, tuner.device).read())
    return found


def read_rate(tuner: Tuner) -> tuple[float, str]:
    """(bytes per second that the device reads, by what it was measured)."""
    from densemoe.runtime.bench_read import BANDWIDTH_BYTES, ReadKernel, bandwidth

    try:
        kernel = ReadKernel(tuner.driver, tuner.device, tuner.loader.manifest(tuner.device).arch)
    except DensemoeError as error:
        tuner.say(f"the read-only kernel does not load ({error}): a copy between device buffers stands in, both directions counted")
        driver = tuner.driver
        pointers = [driver.allocate(BANDWIDTH_BYTES) for _ in range(2)]
        try:
            times = []
            for _ in range(tuner.rounds):
                start = tuner.clock()
                driver.copy(pointers[1], pointers[0], BANDWIDTH_BYTES)
                driver.synchronize()
                times.append(tuner.clock() - start)
            return 2 * BANDWIDTH_BYTES / sorted(times)[len(times) // 2], "copy"
        finally:
            for pointer in pointers:
                driver.free(pointer)
    try:
        return bandwidth(tuner.timer, kernel, tuner.l2), "read-only kernel"
    finally:
        kernel.close()


def _dtypes(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    from densemoe.runtime.tune import DTYPES

    return [each for each in DTYPES if args.a_dtype in (None, each[0])]


def tune(args: argparse.Namespace) -> int:
    """``densemoe tune``; exit codes as the module's docstring says."""
    from densemoe.runtime.tune_cases import MODELS, TUNE_TOKENS, parse_shapes

    if args.budget <= 0:
        raise ProblemError(f"--budget {args.budget}: use a positive number of seconds")
    shapes = parse_shapes(args.models or MODELS)
    tuner = open_tuner(args)
    if args.check:
        return _check(args, tuner)
    from densemoe.runtime.bench_device import Sensors
    from densemoe.runtime.tune import Journal, cases_of

    arch = tuner.loader.manifest(tuner.device).arch
    journal = Journal(args.journal or f"tune-{arch}.jsonl", provenance_of(tuner), fresh=args.fresh)
    groups = cases_of(shapes, args.tokens or TUNE_TOKENS, FORMS[args.form], _dtypes(args), tuner.tiles)
    try:
        whole = tuner.run(groups, journal, budget=args.budget, sensors=Sensors(tuner.driver, tuner.device).read)
    except KeyboardInterrupt:
        print(f"interrupted: {journal.path} holds what was measured; the same command goes on", file=sys.stderr)
        raise
    return _finish(args, tuner, journal, whole)


def _finish(args: argparse.Namespace, tuner: Tuner, journal: Journal, whole: bool) -> int:
    from densemoe.runtime.select import load_table
    from densemoe.runtime.tune_table import build, quality, write

    measured = journal.measurements()
    good = [each for each in measured if each.passed and each.sample is not None]
    failed = [each for each in measured if not each.passed]
    if not good:
        raise ProblemError(f"{journal.path} holds no measurement that passed: nothing to select from; give a larger --budget, or see its details")
    arch = tuner.loader.manifest(tuner.device).arch
    provenance = {**journal.provenance, "measurements": len(good), "whole": whole}
    table = build(measured, provenance, load_table(arch))
    out = Path(args.out or f"selection-{arch}.json")
    write(out, table)
    found = quality(measured, provenance)
    failures = [{"case": each.case.text, "candidate": each.candidate.text, "detail": each.detail} for each in failed]
    if args.json:
        document = {"table": str(out), "journal": str(journal.path), "whole": whole, "measurements": len(good), "failures": failures}
        print(json.dumps({**document, "provenance": provenance, "quality": found}, indent=2, sort_keys=True))
        return int(bool(failed))
    rate = provenance["read_bytes_per_second"] / 1e12
    print(f"{provenance['device']}, driver for CUDA {provenance['cuda_driver']}, {provenance['arch']}, {provenance['date']}: reads {rate:.2f} TB/s")
    print(f"{len(good)} measurements, {len(failed)} failed; {'every case asked for' if whole else 'the budget ended first: run again to go on'}")
    _print_series(measured, rate)
    for name, text in (
        ("other_shapes", "cost model on shapes held out"),
        ("between_buckets", "interpolation on buckets held out"),
        ("forms", "form and tile of a layer"),
        ("forms_other_shapes", "form and tile of a layer on shapes held out"),
    ):
        if name not in found:
            continue
        each = found[name]
        print(f"regret of the {text}: {each['cases']} cases, geomean {each['geomean']:.2%}, worst {each['worst']:.2%} {each['at']}")
    for name, text in (("cliffs", "time / roofline rises by more than 15 %"), ("falls", "time falls as M grows")):
        print(f"{text}: {len(found[name])} places")
        for each in found[name][:10]:
            print(f"  {each['group']}: M {each['m']} to {each['next_m']}, {each['change']:+.1%}")
    for each in failures:
        print(f"FAILED {each['case']}: {each['candidate']}: {each['detail']}")
    print(f"{out} written; put it at artifacts/selection/{arch}.json to ship it")
    return int(bool(failed))


def _print_series(measured: Sequence[Measurement], terabytes: float) -> None:
    """A line a group: microseconds of the chosen, and its share of read speed, by M."""
    from densemoe.runtime.tune_table import group_text, series

    for group, (times, _, nbytes) in sorted(series(measured).items()):
        parts = [f"{m}: {us:.1f} ({nbytes[m] / us / 1e6 / terabytes:.0%})" for m, us in times.items()]
        print(f"{group_text(group)}: us by M (share of read speed): {'  '.join(parts)}")


def _check(args: argparse.Namespace, tuner: Tuner) -> int:
    """Measures a sample of what the table speaks of, all candidates, and reports what its choices cost."""
    from densemoe.runtime.select import load_table
    from densemoe.runtime.tune import cases_of
    from densemoe.runtime.tune_cases import MODELS, TUNE_TOKENS, parse_shapes
    from densemoe.runtime.tune_grouping import in_layer

    arch = tuner.loader.manifest(tuner.device).arch
    table = json.loads(Path(args.table).read_text()) if args.table else load_table(arch)
    groups = cases_of(parse_shapes(args.models or MODELS), args.tokens or TUNE_TOKENS, FORMS[args.form], _dtypes(args), tuner.tiles)
    every = [case for cases in groups.values() for case in cases]
    rng = random.Random(0)
    chosen = set(rng.sample(range(len(every)), min(args.sample, len(every))))
    # the choice of a layer's form is judged where everything that it chooses among is measured
    layers = sorted({(case.shape.name, case.m) for case in every if case.group_tile})
    whole = set(rng.sample(layers, min(-(-args.sample // CASES_A_LAYER), len(layers))))
    chosen |= {place for place, case in enumerate(every) if (case.shape.name, case.m) in whole and in_layer(case)}
    return judge(args, tuner, table, [every[place] for place in sorted(chosen)], "check")  # in order: data are made once a shape


def judge(args: argparse.Namespace, tuner: Tuner, table: Mapping[str, Any], cases: Sequence[Any], what: str) -> int:
    """Exhaustive search on ``cases`` against the table's choice; prints, and gives the exit code."""
    from densemoe.runtime.select import select
    from densemoe.runtime.tune import Candidate
    from densemoe.runtime.tune_cases import geometric_mean
    from densemoe.runtime.tune_grouping import chosen, layer_points, layer_regret

    variants = [entry.variant for entry in tuner.entries.values()]
    rows: list[dict[str, Any]] = []
    every: list[Measurement] = []
    failed = 0
    for measured in tuner.cases(cases):
        if not measured:
            continue
        every += measured
        failed += sum(not each.passed for each in measured)
        times = {each.candidate: each.sample.microseconds for each in measured if each.sample is not None and each.passed}
        case = measured[0].case
        if not times:
            continue
        choice = select(case.problem(), variants, table)
        wanted = Candidate(choice.variant.key, tuple(sorted((name, value) for name, value in choice.settings.items())))
        own = times.get(wanted) or times.get(_without_defaults(tuner, wanted))
        best = min(times, key=lambda each: times[each])
        row = {"case": case.text, "chosen": wanted.text, "provenance": choice.provenance, "best": best.text, "best_us": round(times[best], 3)}
        rows.append({**row, "chosen_us": None if own is None else round(own, 3), "regret": None if own is None else own / times[best] - 1})
    regrets = [row["regret"] for row in rows if row["regret"] is not None]
    geomean = geometric_mean(1 + each for each in regrets) - 1
    worst = max(regrets, default=0.0)
    points, grouping = layer_points(every), table.get("grouping")
    forms = layer_regret(points, grouping)
    passed = bool(rows) and len(regrets) == len(rows) and geomean <= GEOMEAN_BAR and worst <= WORST_BAR and not failed
    passed = passed and forms.geomean <= GEOMEAN_BAR and forms.worst <= WORST_BAR
    if args.json:
        document = {"what": what, "rows": rows, "geomean": geomean, "worst": worst, "failed": failed, "passed": passed}
        document["forms"] = {
            **vars(forms),
            "rows": [{"case": each.text, "chosen": chosen(each, grouping)[0], "listed_us": each.listed, "tiles_us": each.tiles} for each in points],
        }
        print(json.dumps({**document, "provenance": provenance_of(tuner)}, indent=2, sort_keys=True))
        return int(not passed)
    for row in rows:
        cost = "the table's choice was not among the candidates" if row["regret"] is None else f"regret {row['regret']:.1%}"
        print(f"{row['case']}: {row['chosen']} [{row['provenance']}] {row['chosen_us']} us; best {row['best']} {row['best_us']} us; {cost}")
    bars = f"bars {GEOMEAN_BAR:.0%} and {WORST_BAR:.0%}"
    for each in points:
        gathered = ", ".join(f"tile {tile} {us:.2f}" for tile, us in each.tiles.items())
        print(f"FC1 + FC2 {each.text}: {chosen(each, grouping)[0]}; active experts {each.listed:.2f} us, gathered: {gathered} us")
    if points:
        print(f"form and tile of a layer: regret of {forms.text}")
    print(f"{'PASS' if passed else 'FAIL'}: {len(rows)} cases, regret geomean {geomean:.2%}, worst {worst:.2%} ({bars}); {failed} variants failed")
    return int(not passed)


def _without_defaults(tuner: Tuner, candidate: Any) -> Any:
    """The candidate with settings that are its kernel's defaults left out, as measurements name it."""
    from densemoe.runtime.tune import Candidate

    defaults = {name: allowed[0] for name, allowed in tuner.entries[candidate.key].recipe.settings}
    return Candidate(candidate.key, tuple((name, value) for name, value in candidate.settings if defaults.get(name) != value))
