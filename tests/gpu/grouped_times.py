"""Times of every grouped GEMM variant on the device at hand, at the shapes of models: a table and JSON lines.

    python3 tests/gpu/grouped_times.py [--out FILE] [--models NAME …] [--tokens M …] [--seconds S]

Random distinct top-k routing, bf16 activations and outputs, weights cold: launches rotate over copies that together exceed the L2. One CUDA graph of
several launches a variant, variants interleaved, the median of the repeats. Bytes are those of the active experts' packed weights; the bound is the
larger of them at 4.3 TB/s and the routed FLOPs at 650 TFLOP/s. No correctness: tests/gpu/test_grouped.py has that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densemoe.runtime import packing, reference
from densemoe.runtime.loader import Loader
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

MODELS = {  # E, k, H, I of a rank
    "qwen3-30b": (128, 8, 2048, 768),
    "deepseek-v3 tp8": (256, 8, 7168, 256),
    "mixtral tp8": (8, 2, 4096, 1792),
    "qwen3-235b tp4": (128, 8, 4096, 384),
}
COLD = 192 << 20  # bytes that launches rotate over
READ, FLOPS = 4.3e12, 650e12
LINE = "{model:16} {op} M {m:4} {key:42} {us:8.2f} us  bound {bound_us:7.2f}  {of_bound:.3f}  {tflops:6.1f} TFLOP/s"
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32, "u8": torch.uint8}


def packed_weights(op: str, experts: int, hidden: int, intermediate: int) -> list[Any]:
    """Random packed weights with moderate scales, in as many copies as exceed the L2."""
    size = packing.packed_bytes(op, experts, hidden, intermediate)
    made = []
    for _ in range(max(1, -(-COLD // size))):
        superblocks = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda").view(-1, 4608)
        superblocks[:, 4096:] = (superblocks[:, 4096:] & 0x1F) + 0x40
        made.append(superblocks.view(-1))
    return made


class Timed:
    """One variant at one problem, captured in a graph."""

    def __init__(self, loader: Loader, key: str, problem: Problem, routes: dict[str, Any], weights: list[Any], launches: int) -> None:
        spec = problem.tensors()
        tensors: dict[str, Any] = {"a": torch.randn(spec["a"].shape, device="cuda", dtype=torch.bfloat16)}
        tensors["c"] = torch.empty(spec["c"].shape, device="cuda", dtype=DTYPES[problem.c_dtype])
        tensors |= {role: each for role, each in routes.items() if role in spec}
        if "alpha" in spec:
            tensors["alpha"] = torch.full(spec["alpha"].shape, 1e-3, device="cuda")
        self.key, self.launches = key, launches
        self.plans = [loader.plan(problem, {**tensors, "b": each}, 0, key) for each in weights]
        self.times: list[float] = []
        self.kept = tensors
        for plan in self.plans:
            plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for index in range(launches):
                self.plans[index % len(self.plans)].launch(torch.cuda.current_stream().cuda_stream)

    def measure(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.times.append(begin.elapsed_time(end) * 1000 / self.launches)

    def close(self) -> None:
        del self.graph
        for plan in self.plans:
            plan.close()


def measured(loader: Loader, name: str, op: str, m: int, weights: list[Any], keys: list[str]) -> list[dict[str, Any]]:
    """A record for each variant that suits the rows of an expert."""
    experts, top_k, hidden, intermediate = MODELS[name]
    rng = np.random.default_rng(m)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(m)]).astype(np.int32)
    share = m * top_k / experts
    active = len(np.unique(ids))
    nbytes = active * packing.expert_stride(op, hidden, intermediate)
    flops = 2.0 * m * top_k * hidden * intermediate * (2 if op == "fc1" else 1)
    timed = []
    for key in keys:
        tile = Variant.parse(key).tile_m
        if tile > 8 * share + 8 or tile * 6 < share:
            continue
        routes = reference.route(ids, np.ones(ids.shape, np.float32), np.ones(experts, np.float32), group_tile=tile).packed(m * top_k)
        problem = Problem(f"grouped{op}", m, experts, hidden, intermediate, "bf16", "bf16", top_k=top_k, group_tile=tile)
        given = {role: torch.from_numpy(each).cuda() for role, each in routes.items()}
        timed.append(Timed(loader, key, problem, given, weights, max(4, 2 * len(weights))))
    for _ in range(5):
        for each in timed:
            each.measure()
    records = []
    for each in timed:
        us = statistics.median(each.times[1:])
        bound = max(nbytes / READ, flops / FLOPS) * 1e6
        records.append(
            {"model": name, "op": op, "m": m, "share": share, "key": each.key, "us": round(us, 2), "bound_us": round(bound, 2),
             "of_bound": round(bound / us, 3), "tbps": round(nbytes / us * 1e-6, 2), "tflops": round(flops / us * 1e-6, 1)}
        )  # fmt: skip
        each.close()
    return sorted(records, key=lambda each: float(each["us"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 512, 128, 32])
    parser.add_argument("--seconds", type=float, default=20.0, help="no new case begins after so long")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    torch.zeros(1, device="cuda")
    loader = Loader()
    lines: list[str] = []
    for name, op in itertools.product(args.models, ("fc1", "fc2")):
        weights: list[Any] = []
        keys = [key for key in loader.manifest(0).variants if key.startswith(f"grouped{op}.") and key.endswith(".bf16-bf16")]
        for m in args.tokens:
            if time.monotonic() > end:
                break
            weights = weights or packed_weights(op, *(MODELS[name][i] for i in (0, 2, 3)))
            for record in measured(loader, name, op, m, weights, keys):
                lines.append(json.dumps(record))
                print(LINE.format(**record), flush=True)
        del weights
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
