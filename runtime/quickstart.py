"""``densemoe quickstart``: a layer on the GPU; without one, a small layer on the emulator where the build side is installed, and what did not run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.errors import DensemoeError

if TYPE_CHECKING:
    from densemoe.runtime.doctor import Report

__all__ = ["quickstart"]

#: Top-level modules of the extra [build]: where one is missing, there is no emulated run.
_BUILD_MODULES: Final = ("densemoe", "yaml", "cutlass", "cuda", "numpy", "ml_dtypes", "rich")
Files = Callable[[argparse.Namespace], "dict[str, Any]"]


def quickstart(args: argparse.Namespace, check_files: Files) -> int:
    """0 where what ran passed, 1 where it did not, 3 where there are no artifacts.

    Args:
        check_files: what ``densemoe verify`` finds: ``root``, ``verified``, ``faults``.
    """
    from densemoe.runtime.doctor import diagnose

    report = diagnose(args.artifacts)
    return _on_gpu(args) if report.usable else _without_gpu(args, report, check_files)


def _on_gpu(args: argparse.Namespace) -> int:
    from densemoe.runtime import runner
    from densemoe.runtime.loader import Loader

    layer = runner.run_layer(
        Loader(args.artifacts), m=args.m, experts=128, top_k=8, hidden=2048, intermediate=768, a_dtype=args.a_dtype
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(layer), indent=2, sort_keys=True))
        return 0 if layer.passed else 1
    print(f"{layer.device}: MoE layer E 128, k 8, H 2048, I 768 (Qwen3-30B), M = {args.m}, NVFP4 weights, {args.a_dtype} activations")
    print(f"  FC1 {layer.fc1}: worst error {layer.fc1_worst:.3f} of its bound")
    print(f"  FC2 {layer.fc2}: worst error {layer.fc2_worst:.3f} of its bound")
    print(f"  layer: {layer.mark:.2%} within 0.15 + 1 % of the unquantised layer (97 % pass)")
    print(f"  checked: {layer.checked}; {layer.microseconds:.1f} us for both launches in a graph (all experts, dense)")
    print("PASS" if layer.passed else "FAIL")
    return 0 if layer.passed else 1


def _without_gpu(args: argparse.Namespace, report: Report, check_files: Files) -> int:
    if not args.json:
        for line in report.lines():
            print(line)
    if not report.artifacts_found:
        if args.json:
            print(json.dumps({"emulated": None, "reason": "no artifacts"}))
        return 3
    layer, reason = _emulated(args)
    files = check_files(args)
    passed = not files["faults"] and (layer is None or layer["passed"])
    if args.json:
        print(json.dumps({"layer": layer, "not_run": reason or NOT_RUN, "files": files, "passed": passed}, indent=2, sort_keys=True))
        return 0 if passed else 1
    print()
    if layer is None:
        print(f"The layer was NOT run, and not emulated either: {reason}. What could be checked here was: artifacts, manifests, hashes.")
    else:
        for line in _lines(layer, args):
            print(line)
    print(f"{files['root']}: {files['verified']} cubins are what their manifests say")
    for fault in files["faults"]:
        print(f"  FAULT {fault}")
    if layer is not None:
        print("PASS (emulated)" if passed else "FAIL")
    return 0 if passed else 1


#: What an emulated run leaves open.
NOT_RUN: Final = (
    "the machine code that ptxas made of the PTX, the CUDA driver, the loader, and anything timed: no speed is stated;"
    " nor did a model-sized layer (E 128, k 8, H 2048, I 768) run"
)


def _emulated(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """(the emulated layer, "") or (None, why there is none)."""
    try:
        module = importlib.import_module("densemoe.compile.emulate.quickstart")
    except ImportError as error:
        if (error.name or "").split(".")[0] in _BUILD_MODULES:
            return None, f"the emulator needs the extra [build] ({error.name} is missing)"
        raise
    from densemoe.runtime.loader import ArtifactSet

    try:
        return dataclasses.asdict(module.run_layer(ArtifactSet(args.artifacts), m=args.m, a_dtype=args.a_dtype)), ""
    except ImportError as error:  # the compiler is imported when it is first used
        return None, f"the emulator runs PTX, which the extra [build] compiles ({error.name} is missing)"
    except DensemoeError as error:
        if type(error).__name__ in ("SelectionError", "ToolchainError"):
            return None, str(error)
        raise


def _lines(layer: Mapping[str, Any], args: argparse.Namespace) -> list[str]:
    shape = layer["shape"]
    text = f"E {shape['experts']}, k {shape['top_k']}, H {shape['hidden']}, I {shape['intermediate']}"
    lines = [
        "EMULATED: no GPU here can run the artifacts, so this CPU executed the PTX that the sm_90a cubins were assembled from.",
        f"MoE layer {text}, M = {args.m}, NVFP4 weights, {args.a_dtype} activations, schedule {layer['schedule']}, {layer['seconds']:.1f} s in all",
    ]
    for name in ("fc1", "fc2"):
        each = layer[name]
        products = ", ".join(f"{count} {kind}" for kind, count in each["products"].items())
        lines.append(f"  {name.upper()} {each['key']}: worst error {each['worst']:.3f} of its bound")
        lines.append(f"      {each['reason']}; {each['instructions']} warp instructions, {products}, {each['seconds']:.1f} s of emulation")
    return [
        *lines,
        f"  layer: {layer['mark']:.2%} within 0.15 + 1 % of the unquantised layer (97 % pass)",
        f"  checked: {layer['checked']}; no access out of bounds, no read of unwritten memory, no race in shared memory, no deadlock",
        f"NOT run: {NOT_RUN}.",
    ]
