"""The ``densemoe`` command. Exit codes: 0 done; 1 a check, a variant or a comparison failed; 2 wrong usage or input; 3 this machine cannot do it
(no driver, device, artifacts or extra).

Commands of the build side live in densemoe.compile and are imported only when called; without the extra [build] they name it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime import bench_cli, mutate_cli, records, release_cli, tune_cli, verify_cli
from densemoe.runtime.arguments import natural, positive, seconds
from densemoe.runtime.errors import (
    ArtifactError,
    BuildError,
    CheckpointError,
    DensemoeError,
    DriverError,
    MatrixError,
    ProblemError,
    SelectionError,
    ToolchainError,
    VariantError,
)
from densemoe.runtime.fields import plain

if TYPE_CHECKING:
    from densemoe.runtime.loader import Loader
    from densemoe.runtime.problem import Problem

__all__ = ["main"]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNAVAILABLE: Final = 3

_EXIT_CODES: Final = "exit codes: 0 done, 1 something failed, 2 wrong usage or input, 3 this machine cannot do it, 130 interrupted"
_BUILD: Final = "densemoe.compile.cli"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="densemoe",
        description="Ahead-of-time compiled MoE-as-dense-GEMM kernels: build, inspect and run them.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str, run: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    build = add("build", "compile a profile of the matrix into an artifact root", "densemoe build --profile quick", f"{_BUILD}:build")
    build.add_argument("--matrix", help="the matrix file (default: the project's build_matrix.yaml)")
    build.add_argument("--out", help="artifact root to write (default: artifacts/built)")
    build.add_argument("--profile", default="full", help="which profile (default: full)")
    build.add_argument("--arch", help="only this architecture")
    _executor(build)
    build.add_argument("--filter", help="shell pattern over variant keys; other variants of the set stay")
    build.add_argument("--ptx", metavar="DIR", help="a folder for the PTX of each variant that is compiled now")
    build.add_argument("--timeout", type=seconds, default=120.0, help="seconds a variant may take in the local executor (default: 120)")
    build.add_argument("--locked", action="store_true", help="compare every cubin with artifacts/manifest.lock; one differing byte fails")
    build.add_argument("--oracle", action="store_true", help="compare every launch with the compiler's own host code; needs a C compiler")
    build.add_argument("--json", action="store_true", help="print the result as JSON")

    listing = add("list", "variants of an artifact root, or of a profile before any build", "densemoe list --profile quick --json", "list")
    listing.add_argument("--profile", help="list a matrix profile instead of what is built; needs the extra [build]")
    listing.add_argument("--matrix", help="the matrix file for --profile")
    _common(listing)

    show = add("show", "everything the manifest says of one variant", "densemoe show fc1.sm90a.t8x64.c1x1.bf16-bf16", "show")
    show.add_argument("key")
    _common(show)

    verify_cli.add_command(add, _executor, _common)
    mutate_cli.add_command(add, _executor)

    explain = add(
        "explain",
        "which variant a problem gets, and why not the others",
        "densemoe explain fc1 --m 37 --experts 128 --hidden 2048 --intermediate 768",
        "explain",
    )
    _problem(explain)
    explain.add_argument("--arch", default="sm_90a", help="explain for this architecture (default: sm_90a)")
    _common(explain)

    run = add(
        "run",
        "run one kernel on the GPU, time it with cold weights, check it against the float64 reference",
        "densemoe run fc2 --m 8 --experts 128 --hidden 2048 --intermediate 768",
        "run",
    )
    _problem(run)
    run.add_argument("--tile", help="only variants of this tile, as in 8x64")
    run.add_argument("--cluster", help="only variants of this cluster, as in 1x2")
    run.add_argument("--device", type=natural, default=0, help="device ordinal (default: 0)")
    run.add_argument("--warmup", type=natural, default=10, help="launches before the timed ones (default: 10)")
    run.add_argument("--iterations", type=natural, default=100, help="timed launches a graph; 0 does not time (default: 100)")
    run.add_argument("--cold-l2", action=argparse.BooleanOptionalAction, default=True, help="rotate over weights that exceed the L2")
    run.add_argument("--prefetch", action=argparse.BooleanOptionalAction, default=None, help="L2 prefetch (default: the selection's choice)")
    run.add_argument("--skip-check", action="store_true", help="do not compare with the reference")
    run.add_argument("--seed", type=natural, default=0, help="of the data (default: 0)")
    _common(run)

    doctor = add("doctor", "driver, devices, artifacts: what will be used and why", "densemoe doctor", "doctor")
    _common(doctor)

    quick = add(
        "quickstart",
        "run a Qwen3-30B-shaped layer where a GPU is present; a small one on the emulator where none is, and say what did not run",
        "densemoe quickstart",
        "quickstart",
    )
    quick.add_argument("--m", type=positive, default=4, help="tokens (default: 4)")
    quick.add_argument("--a-dtype", default="bf16", choices=("bf16", "nvfp4"))
    _common(quick)

    bench = add("bench", "measure on this machine", "densemoe bench startup", "bench")
    bench.add_argument("what", choices=bench_cli.SUBJECTS)
    bench_cli.add_options(bench)
    _common(bench)
    tune_cli.add_command(add)
    release_cli.add_commands(add)
    return parser


def _executor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--executor", help="local, or the address of a dask.distributed scheduler, which needs [cluster] (default: local)")
    parser.add_argument("--jobs", type=positive, help="processes of the local executor (default: the cores this process may use)")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifacts", help="artifact root (default: DENSEMOE_ARTIFACTS, else the installed package's)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=("fc1", "fc2"))
    parser.add_argument("--m", type=int, required=True, help="tokens")
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--intermediate", type=int, required=True, help="I held by this rank")
    parser.add_argument("--a-dtype", default="bf16", help="activations: bf16 or nvfp4")
    parser.add_argument("--out-dtype", default="bf16", help="output dtype")
    parser.add_argument("--alpha-post", action=argparse.BooleanOptionalAction, default=False, help="FC1's scale per token and expert")
    parser.add_argument("--scalar-alpha", action=argparse.BooleanOptionalAction, default=False, help="FC2's fused form")
    parser.add_argument("--variant", help="use this key instead of the selection")


def _problem_of(args: argparse.Namespace) -> Problem:
    from densemoe.runtime.problem import Problem

    return Problem(
        args.op, args.m, args.experts, args.hidden, args.intermediate, args.a_dtype, args.out_dtype, args.alpha_post, args.scalar_alpha
    )


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# ---- commands


def _list(args: argparse.Namespace) -> int:
    if args.profile is not None:
        if args.artifacts is not None:
            raise ProblemError("--artifacts lists what is built, --profile what a matrix plans: give one of them")
        return _build_side("list_profile")(args)
    if args.matrix is not None:
        raise ProblemError("--matrix belongs to --profile: name one, or leave the option out")
    from densemoe.runtime.loader import ArtifactSet

    artifacts = ArtifactSet(args.artifacts)
    entries = [entry for arch in artifacts.architectures for entry in artifacts.manifest(arch).variants.values()]
    if args.json:
        _print_json([_listed(entry) for entry in entries])
        return OK
    rows = [["key", "bytes", "registers", "stack", "verified"]]
    for entry in entries:
        rows.append([entry.key, str(entry.size), str(entry.registers), str(entry.stack), records.summary(entry.verification)])
    _table(rows)
    return OK


def _listed(entry: Any) -> dict[str, Any]:
    variant = entry.variant
    return {
        "key": entry.key,
        "op": variant.op,
        "arch": variant.arch,
        "tile": [variant.tile_m, variant.tile_n],
        "cluster": [variant.cluster_m, variant.cluster_n],
        "a_dtype": variant.a_dtype,
        "c_dtype": variant.c_dtype,
        "size": entry.size,
        "registers": entry.registers,
        "stack": entry.stack,
        "sha256": entry.sha256,
        "verification": [dict(record) for record in entry.verification],
    }


def _show(args: argparse.Namespace) -> int:
    from densemoe.runtime.loader import ArtifactSet
    from densemoe.runtime.variant import Variant

    variant = Variant.parse(args.key)
    artifacts = ArtifactSet(args.artifacts)
    entry = artifacts.manifest(variant.arch).variants.get(args.key)
    if entry is None:
        raise SelectionError(f"{args.key} is not in {artifacts.root}: `densemoe list` shows what is")
    document = {"key": entry.key, **entry.to_json("")}
    document["recipe"] = entry.recipe.to_json()
    if args.json:
        _print_json(document)
        return OK
    for line in _shown_lines(entry, document):
        print(plain(line))
    return OK


def _shown_lines(entry: Any, document: dict[str, Any]) -> Iterator[str]:
    for name in ("key", "kernel", "symbol", "file", "size", "sha256", "layout", "registers", "stack", "static_smem", "parameter_bytes"):
        yield f"{name:16} {document[name]}"
    recipe = entry.recipe
    yield f"{'block':16} {recipe.block}   cluster {recipe.cluster}   dynamic smem {recipe.dynamic_smem}"
    yield f"{'grid':16} {recipe.grid}"
    for parameter, (offset, size) in zip(recipe.parameters, entry.parameters, strict=True):
        yield f"  +{offset:<4} {size:>3} B  {parameter.kind:10} {parameter.name} = {parameter.value}"
    for workspace in recipe.workspaces:
        yield f"  {workspace.role}: {workspace.nbytes} bytes{', zeroed' if workspace.zeroed else ''}"
    for setting, allowed in recipe.settings:
        yield f"  setting {setting}: {', '.join(map(str, allowed))}"
    yield from _design_lines(entry.audit.get("design", {}))
    for name, value in entry.audit.items():
        if name != "design":
            yield f"{name:16} {value}"
    for record in entry.verification:
        for number, line in enumerate(records.lines(record)):
            yield f"{'' if number else 'verified':16} {line}"


_DESIGN: Final = (
    *("accumulators", "latency_bandwidth_bytes", "smem_bytes", "smem_limit", "stage_bytes", "stages"),
    *("tma_bytes_in_flight", "tmem_columns", "tmem_limit", "weight_bytes_in_flight"),
)


def _design_lines(design: Any) -> list[str]:
    """The audit's sizes of a tcgen05 kernel, as sentences; as they are where a kernel, or whoever wrote the manifest, states others."""
    stated = design if isinstance(design, dict) else {}
    if not all(type(stated.get(name)) is int for name in _DESIGN) or not stated["latency_bandwidth_bytes"]:
        return [f"{'design':16} {design}"] if design else []
    weights, needed = design["weight_bytes_in_flight"], design["latency_bandwidth_bytes"]
    return [
        f"{'in flight':16} {design['tma_bytes_in_flight']} bytes of TMA a CTA ({design['stages']} stages of {design['stage_bytes']}),"
        f" {weights} of them weights",
        f"{'needed':16} {needed} bytes an SM: latency x bandwidth of a B200 (modelled); the ring holds {weights / needed:.1f} times that",
        f"{'shared memory':16} {design['smem_bytes']} of {design['smem_limit']} bytes",
        f"{'tensor memory':16} {design['tmem_columns']} of {design['tmem_limit']} columns, {design['accumulators']} accumulators",
    ]


def _verify(args: argparse.Namespace) -> int:
    verify_cli.refuse_idle_options(args)
    return _build_side("densemoe.compile.emulate_cli:verify")(args) if args.emulate else verify_cli.verify(args)


def _explain(args: argparse.Namespace) -> int:
    from densemoe.runtime.loader import ArtifactSet
    from densemoe.runtime.select import load_table, select
    from densemoe.runtime.variant import architecture

    problem, arch = _problem_of(args), architecture(args.arch).name
    manifest = ArtifactSet(args.artifacts).manifest(arch)
    choice = select(problem, [entry.variant for entry in manifest.variants.values()], load_table(arch), args.variant)
    rejected = [{"key": each.variant.key, "reason": each.reason} for each in choice.rejected]
    if args.json:
        document = {"key": choice.variant.key, "bucket": choice.bucket, "reason": choice.reason, "provenance": choice.provenance}
        _print_json({**document, "rejected": rejected})
        return OK
    print(f"{choice.variant.key}\n  M = {problem.m} lies in the bucket that ends at {choice.bucket}; {choice.reason} [{choice.provenance}]")
    print(f"not chosen ({len(rejected)}):")
    for each in rejected:
        print(f"  {each['key']}: {each['reason']}")
    return OK


def _run(args: argparse.Namespace) -> int:
    runner = _host_side("densemoe.runtime.runner")
    from densemoe.runtime.loader import Loader

    problem = _problem_of(args)
    loader = Loader(args.artifacts)
    if args.device >= (count := loader.driver.device_count()):
        raise DriverError(f"--device {args.device}: there are {count} devices, 0 to {count - 1}")
    forced = _by_tile(args, loader, problem)
    report = runner.run_single(
        loader,
        problem,
        device=args.device,
        variant=forced,
        warmup=args.warmup,
        iterations=args.iterations,
        cold=args.cold_l2,
        check=not args.skip_check,
        seed=args.seed,
        settings=_prefetch(args, loader, loader.select(problem, args.device, forced).variant.key),
    )
    if args.json:
        _print_json(dataclasses.asdict(report))
    else:
        print(f"{report.device}, driver for CUDA {report.driver // 1000}.{report.driver % 1000 // 10}")
        settings = "".join(f", {name} {value}" for name, value in report.settings.items())
        print(f"{report.variant}{settings}   {report.choice}")
        if report.microseconds is not None:
            rate = report.weight_bytes / report.microseconds / 1e6
            cold = f"cold, {report.copies} copies" if report.copies > 1 else "warm"
            print(f"{report.microseconds:.2f} us a launch, weights {report.weight_bytes / 1e6:.1f} MB ({cold}): {rate:.2f} TB/s")
        if report.passed is not None:
            print(
                f"{'PASS' if report.passed else 'FAIL'}: worst error {report.worst:.3f} of its bound, {report.mismatches} outside,"
                f" {report.exemptions} exemptions, {report.checked_columns} of {report.columns} columns checked   {report.detail}"
            )
    return FAILED if report.passed is False else OK


def _by_tile(args: argparse.Namespace, loader: Loader, problem: Problem) -> str | None:
    """The key that --variant, --tile and --cluster name, None where none is given: the selection's choice."""
    from densemoe.runtime.rules import can_implement

    if args.tile is args.cluster is None:
        return str(args.variant) if args.variant else None
    variants = [entry.variant for entry in loader.manifest(args.device).variants.values()]
    fitting = [each for each in variants if can_implement(each, problem)[0] and args.variant in (None, each.key)]
    shapes = {each.key: (f"{each.tile_m}x{each.tile_n}", f"{each.cluster_m}x{each.cluster_n}") for each in fitting}
    chosen = [key for key, (tile, cluster) in shapes.items() if args.tile in (None, tile) and args.cluster in (None, cluster)]
    if len(chosen) != 1:
        given = " ".join(f"--{name} {getattr(args, name)}" for name in ("variant", "tile", "cluster") if getattr(args, name) is not None)
        known = ", ".join(sorted({f"--tile {tile} --cluster {cluster}" for tile, cluster in shapes.values()})) or "none: no variant runs this problem"
        which = f"several variants: use --variant with one of {', '.join(chosen)}" if chosen else f"no variant of this problem: use one of {known}"
        raise SelectionError(f"{given} fits {which}")
    return str(chosen[0])


def _prefetch(args: argparse.Namespace, loader: Loader, key: str) -> dict[str, int]:
    """The kernel's setting that --[no-]prefetch names; empty where the option is left out, or where off is all that there is."""
    distances = dict(loader.manifest(args.device).variants[key].recipe.settings).get("prefetch", (0,))
    if args.prefetch is None or (not args.prefetch and distances == (0,)):
        return {}
    wanted = [each for each in distances if bool(each) == args.prefetch]
    if not wanted:
        raise SelectionError(f"--{'' if args.prefetch else 'no-'}prefetch: {key} has the L2 prefetch distances {list(distances)} alone; leave it out")
    return {"prefetch": wanted[-1]}


def _doctor(args: argparse.Namespace) -> int:
    from densemoe.runtime.doctor import diagnose

    report = diagnose(args.artifacts)
    if args.json:
        _print_json(report.to_json())
    else:
        for line in report.lines():
            print(line)
    return OK if report.usable else UNAVAILABLE


def _quickstart(args: argparse.Namespace) -> int:
    from densemoe.runtime.loader import ArtifactSet

    return int(_host_side("densemoe.runtime.quickstart").quickstart(args, lambda args: verify_cli.check_files(ArtifactSet(args.artifacts))))


def _bench(args: argparse.Namespace) -> int:
    if args.what != "startup":
        return bench_cli.bench(args)
    from densemoe.runtime import startup

    bench_cli.refuse_foreign(args)
    document = startup.measure(args.artifacts, args.device)
    if args.json:
        _print_json(document)
    else:
        _table(startup.lines(document))
        machine = f"{document['device']}, driver for CUDA {document['driver']}, " if document["device"] else ""
        print(f"{machine}Python {document['python']}; medians over {document['processes']} fresh processes")
    return OK


def _host_side(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name in ("numpy", "ml_dtypes"):
            raise DriverError(f"this command needs {error.name}: install densemoe[host]") from None
        raise


def _build_side(function: str) -> Callable[[argparse.Namespace], int]:
    """The function that ``module:name`` names, or a name in the build side's main module."""
    name, _, attribute = function.rpartition(":")
    try:
        module = importlib.import_module(name or _BUILD)
    except ImportError as error:
        if (error.name or "") == "torch":
            raise ToolchainError("this command needs torch: install densemoe[torch]") from None
        if (error.name or "").split(".")[0] in ("yaml", "rich", "cutlass", "numpy", "cuda"):
            raise ToolchainError(f"this command needs {error.name}: install densemoe[build]") from None
        raise
    found: Callable[[argparse.Namespace], int] = getattr(module, attribute)
    return found


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "explain": _explain,
    "run": _run,
    "doctor": _doctor,
    "quickstart": _quickstart,
    "bench": _bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; its exit code. Errors go to standard error, results to standard output."""
    args = _parser().parse_args(arguments)
    try:
        if ":" in args.run:
            return _build_side(args.run)(args)
        return _COMMANDS[args.run](args)
    except DensemoeError as error:
        lines = (plain(line) for line in str(error).splitlines())
        print(f"densemoe {args.command}:", "\n".join(lines), file=sys.stderr)
        return _exit_code(error)
    except BrokenPipeError:
        return OK
    except KeyboardInterrupt:
        print(f"densemoe {args.command}: interrupted; what was finished stays", file=sys.stderr)
        return 130


def _exit_code(error: DensemoeError) -> int:
    if isinstance(error, (CheckpointError, MatrixError, ProblemError, SelectionError, VariantError)):
        return USAGE
    if isinstance(error, (DriverError, ToolchainError)) or type(error).__name__ in ("ArtifactNotFound", "ArchitectureMismatch"):
        return UNAVAILABLE
    if isinstance(error, (ArtifactError, BuildError)):
        return FAILED
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
