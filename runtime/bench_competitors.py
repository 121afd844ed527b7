"""What else runs a mixture of experts on the device: measured beside densemoe where it is installed, named with the reason where it is not.

    cuBLAS dense bf16      torch.mm over all experts' bf16 weights: "MoE as dense GEMM" without quantisation
    torch._grouped_mm      bf16, tokens gathered by expert beforehand
    Humming                humming-kernels (JIT), NVFP4 weights (bench_humming.py)
    Triton NVFP4           a fused kernel in Triton, NVFP4 weights (bench_triton.py)

Their weights are random; results of the last two are compared with our reference (bench_nvfp4.py). Everything is captured into CUDA graphs with cold
weights, as ours is. torch is imported when the first of them is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from densemoe.runtime.bench_timing import Timed
from densemoe.runtime.tune_cases import Shape

__all__ = ["NAMES", "Competitor", "TorchCompetitor", "Unavailable", "Workload", "competitors"]

PASSES: Final = 2  # over the rotations in one graph


class Unavailable(Exception):
    """Why a competitor leaves its column empty."""


@dataclass(frozen=True)
class Workload:
    """What is to be timed.

    Attributes:
        what: ``fc1``, ``fc2`` or ``layer``.
        routings: experts of each token, one routing a rotation.
    """

    what: str
    shape: Shape
    m: int
    routings: Sequence[Sequence[Sequence[int]]]


class Competitor(Protocol):
    """Something to compare with."""

    name: str

    def prepare(self, work: Workload) -> Timed:
        """A captured graph of the work. Raises Unavailable, or whatever the other project's code raises."""

    def release(self) -> None:
        """Drops what is kept of the last shape."""


class TorchCompetitor:
    """What competitors in torch share: weights of the last shape, capture."""

    name = ""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        if importlib.util.find_spec("torch") is None:
            raise Unavailable("torch is not installed: install densemoe[bench]")
        self.torch: Any = importlib.import_module("torch")
        if device == "cuda" and not self.torch.cuda.is_available():
            raise Unavailable("this torch has no CUDA device")
        self._kept: tuple[Any, dict[str, Any]] | None = None

    def weights(self, shape: Shape) -> dict[str, Any]:
        """bf16 weights of all experts: ``one`` [E, H, 2I], ``two`` [E, I, H], and dense views of them."""
        if self._kept is None or self._kept[0] != shape:
            self.release()
            torch = self.torch

            def made(*sizes: int) -> Any:
                return torch.empty(sizes, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)

            # K is contiguous, as checkpoints hold it
            one = made(shape.experts, 2 * shape.intermediate, shape.hidden)
            two = made(shape.hidden, shape.experts * shape.intermediate)
            per_expert = made(shape.experts, shape.hidden, shape.intermediate)
            self._kept = shape, {"one": one, "two": two, "per_expert": per_expert}
        return self._kept[1]

    def release(self) -> None:
        self._kept = None
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def captured(self, calls: Sequence[Callable[[], Any]]) -> Timed:
        """The calls, PASSES times over, in a graph that is replayed on the caller's stream."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:3]:  # warms up libraries, workspaces and JIT
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept: list[Any] = list(calls)  # and with them the tensors that the graph reads, which nobody else may hold
        with torch.cuda.graph(graph):
            for _ in range(PASSES):
                kept += [call() for call in calls]

        def replay(stream: int) -> None:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                graph.replay()

        def close() -> None:
            kept.clear()
            graph.reset()

        return Timed(replay, PASSES * len(calls), close)


class CublasDense(TorchCompetitor):
    """bf16 matrix products over all experts; of the layer with SwiGLU and the routing scale between them."""

    name = "cuBLAS dense bf16"

    def prepare(self, work: Workload) -> Timed:
        torch, shape, weights = self.torch, work.shape, self.weights(work.shape)
        x = torch.randn(work.m, shape.hidden, dtype=torch.bfloat16, device="cuda")
        y = torch.randn(work.m, shape.experts * shape.intermediate, dtype=torch.bfloat16, device="cuda")
        scale = torch.rand(work.m, shape.experts, 1, dtype=torch.bfloat16, device="cuda")
        one = weights["one"].reshape(-1, shape.hidden).t()
        two = weights["two"].t()

        def layer() -> Any:
            both = torch.mm(x, one).view(work.m, shape.experts, 2, shape.intermediate)
            middle = torch.nn.functional.silu(both[:, :, 1]) * both[:, :, 0] * scale
            return torch.mm(middle.view(work.m, -1), two)

        call = {"fc1": lambda: torch.mm(x, one), "fc2": lambda: torch.mm(y, two), "layer": layer}[work.what]
        return self.captured([call] * len(work.routings))


class GroupedMm(TorchCompetitor):
    """torch._grouped_mm over routed tokens only, gathered by expert; of the layer with SwiGLU and the sum over a token's experts."""

    name = "torch._grouped_mm bf16"

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(self.torch, "_grouped_mm"):
            raise Unavailable(f"torch {self.torch.__version__} has no _grouped_mm")

    def prepare(self, work: Workload) -> Timed:
        torch, shape, weights = self.torch, work.shape, self.weights(work.shape)
        one, two = weights["one"].transpose(1, 2), weights["per_expert"].transpose(1, 2)
        x = torch.randn(work.m, shape.hidden, dtype=torch.bfloat16, device="cuda")
        calls = []
        for routing in work.routings:
            pairs = sorted((expert, token) for token, row in enumerate(routing) for expert in row)
            counts = torch.zeros(shape.experts, dtype=torch.int32)
            for expert, _ in pairs:
                counts[expert] += 1
            ends = counts.cumsum(0).to(torch.int32).cuda()
            tokens = torch.tensor([token for _, token in pairs], device="cuda")
            gathered = x[tokens].contiguous()
            middle = torch.randn(len(pairs), shape.intermediate, dtype=torch.bfloat16, device="cuda")
            scale = torch.rand(len(pairs), 1, dtype=torch.bfloat16, device="cuda")
            calls.append(self._call(work, gathered, middle, ends, tokens, scale, one, two))
        return self.captured(calls)

    def _call(self, work: Workload, gathered: Any, middle: Any, ends: Any, tokens: Any, scale: Any, one: Any, two: Any) -> Callable[[], Any]:
        torch, shape = self.torch, work.shape

        def fc1() -> Any:
            return torch._grouped_mm(gathered, one, offs=ends)

        def fc2() -> Any:
            return torch._grouped_mm(middle, two, offs=ends)

        def layer() -> Any:
            both = fc1()
            half = shape.intermediate
            own = torch._grouped_mm(torch.nn.functional.silu(both[:, half:]) * both[:, :half], two, offs=ends) * scale
            return torch.zeros(work.m, shape.hidden, dtype=torch.bfloat16, device="cuda").index_add_(0, tokens, own)

        return {"fc1": fc1, "fc2": fc2, "layer": layer}[work.what]


class Absent:
    """A competitor that cannot be measured here, and why."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def prepare(self, work: Workload) -> Timed:
        raise Unavailable(self.reason)

    def release(self) -> None:
        """Nothing is kept."""


def _humming() -> Competitor:
    if importlib.util.find_spec("humming") is None:
        raise Unavailable("humming-kernels is not installed: install densemoe[bench]")
    return _imported("densemoe.runtime.bench_humming", "Humming")


def _triton() -> Competitor:
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed: install densemoe[bench]")
    return _imported("densemoe.runtime.bench_triton", "TritonMoe")


def _imported(module: str, name: str) -> Competitor:
    try:
        return getattr(importlib.import_module(module), name)()
    except Unavailable:
        raise
    except Exception as error:  # whatever another project's import raises
        raise Unavailable(f"it does not import here: {type(error).__name__}: {error}") from None


_MAKERS: Final[dict[str, Callable[[], Competitor]]] = {
    CublasDense.name: CublasDense,
    GroupedMm.name: GroupedMm,
    "Humming": _humming,
    "Triton NVFP4": _triton,
}
#: Every competitor that a table has a column for, installed or not.
NAMES: Final = tuple(_MAKERS)


def competitors() -> list[Competitor]:
    """All of them; those that cannot run here as Absent."""
    found: list[Competitor] = []
    for name, make in _MAKERS.items():
        try:
            found.append(make())
        except Unavailable as error:
            found.append(Absent(name, str(error)))
    return found
