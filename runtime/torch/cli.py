"""``densemoe convert`` and ``densemoe numerics``: run by ``densemoe.runtime.cli``."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from densemoe.runtime.errors import DriverUnavailable, ProblemError
from densemoe.runtime.packing import INTERCHANGE_LAYOUT, LAYOUT

__all__ = ["convert", "numerics"]


def convert(args: argparse.Namespace) -> int:
    """Writes a packed checkpoint; 0, or an error."""
    from densemoe.runtime.torch import checkpoint

    layout = {"sm_90a": LAYOUT, "sm_100f": INTERCHANGE_LAYOUT}[args.arch]
    lines: list[str] = []
    layers = checkpoint.convert(
        args.source, args.target, layout=layout, tp_rank=args.tp_rank, tp_size=args.tp_size, report=lines.append if args.json else print
    )
    size = os.path.getsize(args.target)
    if args.json:
        print(json.dumps({"layers": [each.prefix for each in layers], "layout": layout, "bytes": size}, indent=2, sort_keys=True))
    else:
        print(f"{args.target}: {len(layers)} layers, {layout}, {size} bytes")
    return 0


def _device(name: str) -> Any:
    """The torch device of that name: a CPU, or a CUDA device that is there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ProblemError(f"--device {name!r}: use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DriverUnavailable(f"--device {name}: torch sees {count} CUDA devices here; use cpu")
    return device


def numerics(args: argparse.Namespace) -> int:
    """Prints the error of a layer against the unquantised one, by form and number of tokens; 0."""
    from densemoe.runtime.torch.numerics import report

    rows = report(args.experts, args.top_k, args.hidden, args.intermediate, tokens=args.m, device=_device(args.device))
    if args.json:
        print(json.dumps([row.__dict__ for row in rows], indent=2, sort_keys=True))
        return 0
    print(f"{'M':>5}  {'form':<18}  {'relative rms error':>18}  {'largest / rms':>13}  {'within 0.15 + 1 %':>17}")
    for row in rows:
        print(f"{row.tokens:>5}  {row.form:<18}  {row.relative_error:>18.4%}  {row.largest:>13.4f}  {row.share:>17.2%}")
    return 0
