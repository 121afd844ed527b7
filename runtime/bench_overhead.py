"""``densemoe bench launch``: what an op of ``densemoe.runtime.torch`` costs the host beyond the driver launches that it makes. Needs torch and numpy.

A layer so small that the device keeps up with the host. ``single`` is a call after the queue was emptied, ``batch`` one of a hundred calls in a
row; of both the launches alone, through the same prepared Plans, are taken away. The two are timed in turn and the median is of their differences:
what a launch behind a wait takes changes by some 10 us for longer than a series lasts, so medians of two series, one behind the other, said 18 us
of an op that takes 9, and 6 of one that takes 13.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["idle_op", "op_overheads", "over"]

EXPERTS, TOP_K, WIDTH, TOKENS = 8, 2, 512, 8  # of the layer; H = I
SINGLES: Final = 1000
BATCHES: Final = 40
BATCH: Final = 100
BARS: Final = {"op": "<= 8 us", "layer": "<= 12 us"}
_LIBRARIES: Final[list[Any]] = []  # an op goes with its library


def op_overheads() -> list[dict[str, Any]]:
    """Rows of host microseconds of each op over its launches, and of what lies in them whatever an op does; one row that says why where torch or its
    GPU is absent."""
    try:
        import torch
    except ImportError:
        return [{"what": "ops of densemoe.runtime.torch over their launches: absent, torch is not installed", "us": None, "bar": ""}]
    if not torch.cuda.is_available():
        return [{"what": "ops of densemoe.runtime.torch over their launches: absent, this torch has no CUDA device", "us": None, "bar": ""}]
    from densemoe.runtime.torch import device, ops

    synchronize = torch.cuda.synchronize
    rows = []

    def add(what: str, call: Callable[[], Any], without: Callable[[], Any], bar: str = "", singles: bool = True) -> None:
        if singles:
            rows.append({"what": f"{what}, single", "us": over(call, without, synchronize, 1, SINGLES), "bar": bar})
        rows.append({"what": f"{what}, batch" if singles else what, "us": over(call, without, synchronize, BATCH, BATCHES), "bar": bar})

    for name, (op, given) in _calls(torch, ops).items():
        call = _bound(op, given)
        launches = _launches(torch, device, call)
        add(f"densemoe::{name} over its launches, host", call, launches, BARS["layer" if name.startswith("moe") else "op"])
        plain = name.split()[0]
        idle = idle_op(torch, name.replace(" ", "_"), ops.SCHEMAS[plain][0], op(*given), "CUDA")
        add("  of it PyTorch's dispatcher: an op of these arguments that does nothing", _bound(idle, given), _nothing, singles=False)
    runtime = device.runtime()
    for what, asked in (
        ("an output of an op, made and freed", next(iter(runtime.shortcuts.values())).output),
        ("the current stream's address", lambda: runtime.stream(0)),
        ("the current device", runtime.current_device),
        ("whether the current stream is captured, which nobody asks of the default stream", runtime.capturing),
    ):
        add(f"torch: {what}, host", asked, _nothing, singles=False)
    return rows


def idle_op(torch: Any, name: str, arguments: str, result: Any, key: str) -> Callable[..., Any]:
    """An op of these arguments that gives ``result`` and does nothing: what PyTorch's dispatcher takes.

    Args:
        name: of the op, which lives as long as the process does.
        arguments: as a schema has them.
        result: a tensor, or a tuple of two.
        key: dispatch key, ``CPU`` or ``CUDA``.
    """
    library = torch.library.Library("densemoe_idle", "FRAGMENT")
    library.define(f"{name}({arguments}) -> {'(Tensor, Tensor)' if isinstance(result, tuple) else 'Tensor'}")
    library.impl(name, lambda *given: result, key)
    _LIBRARIES.append(library)
    op: Callable[..., Any] = getattr(torch.ops.densemoe_idle, name)
    return op


def over(call: Callable[[], Any], without: Callable[[], Any], synchronize: Callable[[], None], count: int, rounds: int) -> float:
    """Microseconds that ``call`` takes the host beyond ``without``: the median over rounds, in each of which ``count`` of both are timed, one behind
    the other and each behind ``synchronize``; which comes first changes from round to round. A tenth of the rounds goes before those that count."""
    differences = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-(rounds // 10), rounds):
            taken = {}
            for timed in (call, without) if turn % 2 else (without, call):
                synchronize()
                start = time.perf_counter()
                for _ in range(count):
                    timed()
                taken[timed is call] = time.perf_counter() - start
            if turn >= 0:
                differences.append((taken[True] - taken[False]) * 1e6 / count)
    finally:
        if collecting:
            gc.enable()
    synchronize()
    return statistics.median(differences)


def _nothing() -> None:
    """What a call is compared with whose launches are none."""


def _bound(op: Callable[..., Any], given: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: op(*given)


def _calls(torch: Any, ops: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Each op with arguments for it, on random weights: any bytes are NVFP4."""
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
    middle = ops.fc1_swiglu(x, one, alpha, WIDTH, packing.LAYOUT)[0]
    layer = (x, ids, router, one, alpha, two, alpha.clone(), WIDTH, WIDTH, packing.LAYOUT)
    return {
        "quantize_nvfp4": (ops.quantize_nvfp4, (x, multiplier)),
        "fc1_swiglu": (ops.fc1_swiglu, (x, one, alpha, WIDTH, packing.LAYOUT)),
        "fc2": (ops.fc2, (middle, two, fc2_alpha, EXPERTS, WIDTH, packing.LAYOUT)),
        "moe of bf16": (ops.moe, layer),
        "moe of nvfp4": (ops.moe, (*layer, "bf16", multiplier, second)),
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
