"""What an op costs on the host beyond its driver launches, without a GPU: the ops on a driver that exists only in Python and launches nothing.

    python tests/torch/overhead.py [ARTIFACTS]

Prints, in microseconds of CPU time (the least of 200 batches): the op's own code, and PyTorch's dispatcher for the same schema. A GPU adds what
its allocator takes for the outputs (tests/gpu/test_torch_ops.py measures the whole).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "runtime")]

from fake_driver import FakeDriver  # noqa: E402
from test_device import EXPERTS, HIDDEN, INTERMEDIATE, arguments  # noqa: E402

from densemoe.runtime import packing  # noqa: E402
from densemoe.runtime.loader import Loader  # noqa: E402
from densemoe.runtime.torch import device, ops  # noqa: E402


class Idle(FakeDriver):
    """Launches nothing, at once."""

    def launcher(self, prepared: Any) -> Callable[[int], None]:
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


def dispatched(name: str, given: tuple[Any, ...], result: Any) -> Callable[[], Any]:
    """The same schema with a function that does nothing."""
    library = torch.library.Library("densemoe_overhead", "FRAGMENT")
    count = len(result) if isinstance(result, tuple) else 1
    library.define(f"{name}({ops.SCHEMAS[name][0]}) -> {'Tensor' if count == 1 else '(Tensor, Tensor)'}")
    library.impl(name, lambda *arguments: result, "CPU")
    op = getattr(torch.ops.densemoe_overhead, name)
    return lambda: (op(*given), library)


def main(artifacts: str | None = None) -> None:
    """Prints the table."""
    loader = Loader(artifacts, Idle())  # type: ignore[arg-type]
    device.use_runtime(device.Runtime(loader, lambda ordinal: 77, lambda: False, lambda: 0))
    bf16, nvfp4, one = arguments(4), arguments(4, quantise=True), torch.ones(1)
    x, fc1 = bf16[0], (bf16[0], None, bf16[4], bf16[5], None, None, INTERMEDIATE, packing.LAYOUT, "bf16")
    y = device.fc1_swiglu(*fc1)[0]
    fc2 = (y, None, bf16[6], torch.ones(4, EXPERTS), EXPERTS, HIDDEN, packing.LAYOUT, "bf16")
    print(f"{'op':<24}  {'own code':>8}  {'dispatcher':>10}  {'together':>8}")
    for what, name, op, given, result in (
        ("quantize_nvfp4", "quantize_nvfp4", device.quantize_nvfp4, (x, one), (x, x)),
        ("fc1_swiglu", "fc1_swiglu", device.fc1_swiglu, fc1, (x, x)),
        ("fc2", "fc2", device.fc2, fc2, x),
        ("moe, bf16", "moe", device.moe, tuple(bf16), x),
        ("moe, NVFP4", "moe", device.moe, tuple(nvfp4), x),
    ):
        own, rest = microseconds(lambda op=op, given=given: op(*given)), microseconds(dispatched(name, given, result))  # type: ignore[misc]
        print(f"{what:<24}  {own:>8.2f}  {rest:>10.2f}  {own + rest:>8.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
