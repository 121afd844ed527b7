"""What an op costs on the host beyond its driver launches, without a GPU: the ops on a driver that exists only in Python and launches nothing.

    python tests/torch/overhead.py [ARTIFACTS]

Prints, in microseconds of CPU time (the least of 200 batches): the op's own code without its outputs, which are tensors made before, the same ones
at every call or two in turn (then the call writes addresses); the outputs, made by the CPU's allocator; PyTorch's dispatcher for the same schema;
and the first, third and fourth together. `densemoe bench launch` measures the whole on a GPU.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from fake_driver import FakeDriver
from fake_gpu import EXPERTS, HIDDEN, INTERMEDIATE, arguments

from densemoe.runtime import packing
from densemoe.runtime.bench_overhead import idle_op
from densemoe.runtime.loader import Loader
from densemoe.runtime.torch import device, ops


class Idle(FakeDriver):
    """Launches nothing, at once."""

    def launcher(self, *prepared: Any) -> Callable[[int], None]:
        return lambda stream: None


def microseconds(call: Callable[[], Any]) -> float:
    """Least CPU time of a call over 200 batches of 100."""
    best = float("inf")
    for _ in range(200):
        start = time.thread_time_ns()
        for _ in range(100):
            call()
        best = min(best, (time.thread_time_ns() - start) / 1e5)
    return best


def in_turn(tensors: list[Any]) -> Callable[[], Any]:
    """Gives the tensors one after the other, again and again."""
    return itertools.cycle(tensors).__next__


def main(artifacts: str | None = None) -> None:
    """Prints the table."""
    loader = Loader(artifacts, Idle())  # type: ignore[arg-type]
    runtime = device.Runtime(loader, lambda ordinal: 77, lambda: False, lambda: 0)
    device.use_runtime(runtime)
    bf16, nvfp4, one = arguments(4), arguments(4, quantise=True), torch.ones(1)
    x, fc1 = bf16[0], (bf16[0], bf16[3], bf16[4], INTERMEDIATE, packing.LAYOUT)
    y = device.fc1_swiglu(*fc1)[0]
    fc2 = (y, bf16[5], torch.ones(4, EXPERTS), EXPERTS, HIDDEN, packing.LAYOUT)
    print(f"{'op':<16}  {'own code':>8}  {'addresses move':>14}  {'outputs':>7}  {'dispatcher':>10}  {'together':>8}")
    for what, name, op, given, result in (
        ("quantize_nvfp4", "quantize_nvfp4", device.quantize_nvfp4, (x, one), (x, x)),
        ("fc1_swiglu", "fc1_swiglu", device.fc1_swiglu, fc1, (x, x)),
        ("fc2", "fc2", device.fc2, fc2, x),
        ("moe, bf16", "moe", device.moe, tuple(bf16[:10]), x),
        ("moe, NVFP4", "moe", device.moe, tuple(nvfp4[:13]), x),
    ):

        def call(op: Callable[..., Any] = op, given: tuple[Any, ...] = given) -> Any:
            return op(*given)

        runtime._forget_shortcuts()
        call()
        (short,) = runtime.shortcuts.values()
        makers = {which: getattr(short, f"{which}_elsewhere") for which in ("output", "second") if callable(getattr(short, which))}
        outputs = sum(microseconds(make) for make in makers.values())
        own = []
        for count in (1, 2):
            for which, make in makers.items():
                setattr(short, which, in_turn([make() for _ in range(count)]))
            own.append(microseconds(call))
        idle = idle_op(torch, what.translate({ord(","): None, ord(" "): "_"}), ops.SCHEMAS[name][0], result, "CPU")
        rest = microseconds(lambda idle=idle, given=given: idle(*given))  # type: ignore[misc]
        print(f"{what:<16}  {own[0]:>8.2f}  {own[1]:>14.2f}  {outputs:>7.2f}  {rest:>10.2f}  {own[0] + outputs + rest:>8.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
