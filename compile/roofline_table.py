"""The modelled rules of artifacts/selection/sm_100f.json: the roofline's choice for each bucket of M, over the shapes of public models.

    python -m densemoe.compile.roofline_table            print the table
    python -m densemoe.compile.roofline_table --write    replace the file's rules; what ``densemoe merge-record`` put there stays

A bucket's choice is the variant whose time over the best is least in the geometric mean over the shapes; the one of the bucket before stays while it
is within KEEP of that. FC2 has as many tiles as H gives, and fewer of them want more splits: it has rules for three ranges of H. Rules that hold
on every modelled device name none; others name a compute capability.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from densemoe.compile import matrix, roofline
from densemoe.runtime.problem import LARGEST_DIMENSION, Problem
from densemoe.runtime.select import bucket
from densemoe.runtime.variant import Variant

__all__ = ["ARCH", "BUCKETS", "HIDDEN", "SHAPES", "TABLE", "choose", "document", "modelled_rules", "render"]

ARCH: Final = "sm_100f"
TABLE: Final = Path(__file__).resolve().parent.parent / "artifacts" / "selection" / f"{ARCH}.json"
SCHEMA: Final = 1
#: Experts, H and I of a rank: DeepSeek-V3 TP8, Qwen3-30B, Qwen3-235B TP4, Mixtral TP8, Kimi-K2 TP8.
SHAPES: Final = {
    "deepseek-v3-tp8": (256, 7168, 256),
    "qwen3-30b": (128, 2048, 768),
    "qwen3-235b-tp4": (128, 4096, 384),
    "qwen3-235b-tp2": (128, 4096, 768),
    "mixtral-8x7b-tp8": (8, 4096, 1792),
    "kimi-k2-tp8": (384, 7168, 256),
}
#: Every bucket up to 1024 tokens; the largest stands for all above.
BUCKETS: Final = tuple(sorted({bucket(m) for m in range(1, 1025)}))
#: Ranges of H that FC2's rules tell apart: up to 24, 48 and more tiles of 128.
HIDDEN: Final = ((0, 3072), (3073, 6144), (6145, LARGEST_DIMENSION))
ANY_HIDDEN: Final = (0, LARGEST_DIMENSION)
KEEP: Final = 0.01
OUTPUT: Final = {"fc1": "nvfp4", "fc2": "bf16"}
AUXILIARY_TILES: Final = {"prepare": (32, 4096), "quantize": (1, 2048)}

#: tile_m, tile_n, cluster_m, cluster_n and, for FC2, splits
Chosen = tuple[int, int, int, int, int]


def shipped(op: str) -> tuple[Variant, ...]:
    """The matrix's variants of an op, one of each tile and cluster."""
    planned = [each.variant for each in matrix.load().profile("full")]
    return tuple(v for v in planned if v.arch == ARCH and v.op == op and v.c_dtype == OUTPUT[op])


def problems(op: str, m: int, divisor: int, hidden: tuple[int, int] = ANY_HIDDEN) -> Iterator[Problem]:
    """The shapes of a range of H with ``m`` tokens that some variant runs; of FC1 those where 2I is a multiple of ``divisor`` alone."""
    for experts, h, intermediate in SHAPES.values():
        fits = (2 * intermediate) % divisor == 0 if op == "fc1" else intermediate % roofline.K_TILE == 0
        if fits and hidden[0] <= h <= hidden[1]:
            yield Problem(op, m, experts, h, intermediate, "nvfp4", OUTPUT[op])


def regrets(device: roofline.Device, given: Iterable[Problem], variants: Iterable[Variant]) -> dict[Chosen, float]:
    """Time over the best, geometric mean over the problems, by choice."""
    fitting = {v.key: v for v in variants}
    found: dict[Chosen, list[float]] = {}
    for problem in given:
        ranked = roofline.rank(device, problem, fitting.values())
        for each in ranked:
            v = fitting[each.key]
            name = (v.tile_m, v.tile_n, v.cluster_m, v.cluster_n, each.settings.get("splits", 1))
            found.setdefault(name, []).append(each.total / ranked[0].total)
    return {name: math.exp(sum(map(math.log, ratios)) / len(ratios)) for name, ratios in found.items()}


def choose(device: roofline.Device, op: str, widest: int = 256, hidden: tuple[int, int] = ANY_HIDDEN) -> list[tuple[int, int, Chosen]]:
    """(first bucket, last bucket, choice) among variants with tiles of at most ``widest`` weight rows; every M is in one range."""
    variants = [v for v in shipped(op) if v.tile_n <= widest]
    joined: list[tuple[int, int, Chosen]] = []
    for size in BUCKETS:
        found = regrets(device, problems(op, size, widest if op == "fc1" else 1, hidden), variants)
        best = min(found, key=lambda name: (round(found[name], 4), name[2] * name[3], name))
        if joined and found[joined[-1][2]] <= found[best] * (1 + KEEP):
            best = joined[-1][2]
        if joined and joined[-1][2] == best:
            joined[-1] = (joined[-1][0], size, best)
        else:
            joined.append((size if joined else 0, size, best))
    joined[-1] = (joined[-1][0], LARGEST_DIMENSION, joined[-1][2])
    return joined


def modelled_rules() -> list[dict[str, Any]]:
    """Every modelled rule, in the order of the table: each op by H and M, FC1's for 2I that 256 does not divide last."""
    rules = []
    parts = [("fc1", 256, ANY_HIDDEN), ("fc1", 128, ANY_HIDDEN), *(("fc2", 256, hidden) for hidden in HIDDEN)]
    for op, widest, hidden in parts:
        tables = {device: choose(device, op, widest, hidden) for device in roofline.DEVICES.values()}
        common = set.intersection(*(set(table) for table in tables.values()))
        listed = [(entry, None, " and ".join(device.name for device in tables)) for entry in common]
        for device, table in tables.items():
            listed += [(entry, device.capability, device.name) for entry in table if entry not in common]  # type: ignore[misc]
        for (start, end, chosen), capability, devices in sorted(listed, key=lambda each: (each[0][0], each[1] or (0, 0))):
            rule: dict[str, Any] = {"op": op, "m_from": start, "m_to": end}
            if hidden != ANY_HIDDEN:
                rule |= {"hidden_from": hidden[0], "hidden_to": hidden[1]}
            if capability is not None:
                rule["capability"] = list(capability)
            note = "2I is not a multiple of 256; " if widest == 128 else ""
            reason = f"{note}least modelled time on {devices}, mean over models' shapes"
            rule |= {"tile": list(chosen[:2]), "cluster": list(chosen[2:4]), "provenance": "modelled", "reason": reason}
            if chosen[4] > 1:
                rule["settings"] = {"splits": chosen[4]}
            rules.append(rule)
    for op, tile in AUXILIARY_TILES.items():
        rule = {"op": op, "m_from": 0, "m_to": LARGEST_DIMENSION, "tile": list(tile), "cluster": [1, 1]}
        rules.append({**rule, "provenance": "modelled", "reason": "the only kernel"})
    return rules


def document(existing: Mapping[str, Any]) -> dict[str, Any]:
    """The table with fresh rules; every other part of ``existing`` stays."""
    return {**existing, "schema": SCHEMA, "arch": ARCH, "rules": modelled_rules()}


def render(table: Mapping[str, Any]) -> str:
    """The file's text: a rule a line, the parts of other names a line each."""
    rules = ",\n".join(f"    {json.dumps(rule)}" for rule in table["rules"])
    others = "".join(f"  {json.dumps(name)}: {json.dumps(part)},\n" for name, part in table.items() if name != "rules")
    return f'{{\n{others}  "rules": [\n{rules}\n  ]\n}}\n'


def main() -> int:
    """``--write`` replaces the file's modelled rules; without it the table is printed."""
    text = render(document(json.loads(TABLE.read_text())))
    if "--write" in sys.argv[1:]:
        TABLE.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
