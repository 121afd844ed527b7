"""``densemoe bench launch``: what an op of ``densemoe.runtime.torch`` costs the host beyond the driver launches that it makes. Needs torch and numpy.

A layer so small that the device keeps up with the host. ``single`` is a call after the queue was emptied, ``batch`` one of a hundred calls in a
row; of both the launches alone, through the same prepared Plans, are taken away.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["op_overheads"]

EXPERTS, TOP_K, WIDTH, TOKENS = 8, 2, 512, 8  # of the layer; H = I
SINGLES: Final = 200
BATCHES: Final = 20
BATCH: Final = 100
BARS: Final = {"op": "<= 8 us", "layer": "<= 12 us"}


def op_overheads() -> list[dict[str, Any]]:
    """Rows of host microseconds of each op over its launches; one row that says why where torch or its GPU is absent."""
    try:
        import torch
    except ImportError:
        return [{"what": "ops of densemoe.runtime.torch over their launches: absent, torch is not installed", "us": None, "bar": ""}]
    if not torch.cuda.is_available():
        return [{"what": "ops of densemoe.runtime.torch over their launches: absent, this torch has no CUDA device", "us": None, "bar": ""}]
    from densemoe.runtime.torch import device, ops

    calls = _calls(torch, ops)
    rows = []
    for name, call in calls.items():
        launches = _launches(torch, device, call)
        for how, measured in (("single", _single), ("batch", _batch)):
            over = measured(torch, call) - measured(torch, launches)
            bar = BARS["layer" if name.startswith("moe") else "op"]
            rows.append({"what": f"densemoe::{name} over its launches, host, {how}", "us": over, "bar": bar})
    return rows


def _calls(torch: Any, ops: Any) -> dict[str, Callable[[], Any]]:
    """A call of each op on random weights: any bytes are NVFP4."""
    from densemoe.runtime import packing

    generator = torch.Generator(device="cuda").manual_seed(0)

    def weights(op: str) -> Any:
        nbytes = packing.packed_bytes(op, EXPERTS, WIDTH, WIDTH)
        return torch.randint(0, 64, (nbytes,), dtype=torch.uint8, device="cuda", generator=generator)

    x = torch.randn(TOKENS, WIDTH, device="cuda", generator=generator).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS, device="cuda")[:TOP_K] for _ in range(TOKENS)]).to(torch.int32)
    router = torch.full((TOKENS, TOP_K), 1 / TOP_K, device="cuda")
    one, two, ones, multiplier = weights("fc1"), weights("fc2"), torch.ones(EXPERTS, device="cuda"), torch.ones(1, device="cuda")
    second = multiplier.clone()  # a layer's tensors are its own
    alpha, fc2_alpha = ones / 64, torch.ones(TOKENS, EXPERTS, device="cuda")
    middle = ops.fc1_swiglu(x, None, one, alpha, None, None, WIDTH, packing.LAYOUT, "bf16")[0]
    layer = (x, None, ids, router, one, alpha, two, alpha.clone())
    last = (None, WIDTH, WIDTH, packing.LAYOUT, "bf16")
    return {
        "quantize_nvfp4": lambda: ops.quantize_nvfp4(x, multiplier),
        "fc1_swiglu": lambda: ops.fc1_swiglu(x, None, one, alpha, None, None, WIDTH, packing.LAYOUT, "bf16"),
        "fc2": lambda: ops.fc2(middle, None, two, fc2_alpha, EXPERTS, WIDTH, packing.LAYOUT, "bf16"),
        "moe of bf16": lambda: ops.moe(*layer, None, None, *last),
        "moe of nvfp4": lambda: ops.moe(*layer, multiplier, second, *last),
    }


def _launches(torch: Any, device: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """The launches that ``call`` makes, and nothing else."""
    call()
    runtime = device.runtime()
    before = {id(each): each.used for each in runtime.entries.values()}
    runtime.made += 1  # so that the entry which the next call uses is seen
    call()
    (entry,) = (each for each in runtime.entries.values() if each.used != before[id(each)])
    stream, plans = torch.cuda.current_stream().cuda_stream, entry.plans

    def launch() -> None:
        for plan in plans:
            plan.launch(stream)

    return launch


def _single(torch: Any, call: Callable[[], Any]) -> float:
    times = []
    for _ in range(SINGLES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[SINGLES // 10 :])


def _batch(torch: Any, call: Callable[[], Any]) -> float:
    times = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        times.append((time.perf_counter() - start) * 1e6 / BATCH)
    torch.cuda.synchronize()
    return statistics.median(times[BATCHES // 10 :])
