"""What competitors with NVFP4 weights share: weights and routing on the device, search over their configurations, comparison with our reference.

    plain weights (checkpoint layout) ─► the competitor's own layout, in copies that exceed the L2 twice
    every configuration of an op ── a token compared with the reference ── timed by graphs over cold weights ──► the fastest, captured

Of every competitor FC1 is its GEMM with SwiGLU, FC2 its GEMM with the router's weights and the sum over a token's experts: what our ops compute.
Needs torch and numpy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime import reference
from densemoe.runtime.bench_competitors import TorchCompetitor, Unavailable, Workload
from densemoe.runtime.bench_timing import COLD_FACTOR, Timed
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, GROUP, unpack_codes
from densemoe.runtime.tune_cases import Shape

__all__ = ["Aligned", "Nvfp4Competitor", "Plain", "Rotation", "aligned"]

TOLERANCE: Final = 0.02  # of the largest output: intermediate results are rounded to bf16 on the way
COLUMNS: Final = 64  # compared
REPLAYS: Final = 3  # of a configuration's graph, the least counts
SLOW_SECONDS: Final = 5.0  # of a configuration, which is then said
LEAST_SCALE, MOST_SCALE = 0x28, 0x38  # e4m3 bytes of 0.25 up to below 1

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Aligned:
    """Pairs (token, expert) sorted by expert in whole blocks, as fused-MoE kernels read them.

    Attributes:
        ids: int32, pair ``token · k + j`` of each row; the number of pairs where a row is padding.
        experts: int32, of each block.
    """

    ids: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int32]


def aligned(routing: Sequence[Sequence[int]], experts: int, block: int) -> Aligned:
    """The routing ``[M][k]`` in blocks of ``block`` rows of one expert each."""
    flat = np.asarray(routing, dtype=np.int64).reshape(-1)
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=experts)
    blocks = -(-counts // block)
    padding = np.cumsum(blocks * block - counts) - (blocks * block - counts)  # before each expert's rows
    ids = np.full(int(blocks.sum()) * block, len(flat), dtype=np.int32)
    ids[np.arange(len(flat)) + padding[flat[order]]] = order
    return Aligned(ids, np.repeat(np.arange(experts), blocks).astype(np.int32))


@dataclass
class Plain:
    """NVFP4 weights of an op as checkpoints hold them, torch tensors; of FC1 the gate's rows first, then up's.

    Attributes:
        codes: uint8 ``[E, N, K/2]``, the even k in the low nibble.
        scales: e4m3 bytes, uint8 ``[E, N, K/16]``.
        alpha: float32 ``[E]``.
    """

    codes: Any
    scales: Any
    alpha: Any

    def values(self, expert: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 ``[rows, K]``, without alpha."""
        codes, scales = (each[expert][self._index(each, rows)].cpu().numpy() for each in (self.codes, self.scales))
        return np.asarray(E2M1_VALUES[unpack_codes(codes)] * np.repeat(E4M3_VALUES[scales], GROUP, axis=1), dtype=np.float64)

    @staticmethod
    def _index(tensor: Any, rows: npt.NDArray[np.int64]) -> Any:
        import torch

        return torch.from_numpy(rows).to(tensor.device)


@dataclass(frozen=True)
class Rotation:
    """Inputs of one rotation, torch tensors.

    Attributes:
        routing: experts of each token.
        copy: which copy of the weights.
        x: bf16 ``[M, H]``.
        middle: bf16 ``[M·k, I]``: what FC2 alone reads.
        router: float32 ``[M, k]``.
    """

    routing: Sequence[Sequence[int]]
    copy: int
    x: Any
    middle: Any
    router: Any


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        configuration: the fastest that agrees.
        tried, of: how many were tried, and how many there are.
    """

    configuration: Any
    tried: int
    of: int


class Nvfp4Competitor(TorchCompetitor):
    """A competitor whose ops have configurations to search.

    Attributes:
        say: is told of each search, and of each configuration that takes longer than SLOW_SECONDS: others' compilers may take minutes.
        seconds: of one search, after which no further configuration is tried once one agrees; 0: all are.
        clock: monotonic, in seconds.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__(device)
        self.say: Callable[[str], None] = lambda line: None
        self.seconds = 0.0
        self.clock: Callable[[], float] = time.monotonic
        self._shape: Shape | None = None
        self._plain: dict[str, Plain] = {}
        self._own: dict[str, list[Any]] = {}
        self._best: dict[tuple[Shape, str, int], Found] = {}

    # ---- what a competitor gives

    def configurations(self, op: str, shape: Shape, m: int) -> Sequence[Hashable]:
        """All that are tried, its own default first."""
        raise NotImplementedError

    def convert(self, op: str, shape: Shape, plain: Plain) -> Any:
        """Weights in its own layout."""
        raise NotImplementedError

    def copied(self, own: Any) -> Any:
        """The same in other memory."""
        raise NotImplementedError

    def bind(self, op: str, shape: Shape, own: Any, rotation: Rotation, configuration: Any) -> Callable[[Any], Any]:
        """The op with its configuration on one rotation: a call on activations, whose result is ``[M·k, I]`` of FC1, ``[M, H]`` of FC2."""
        raise NotImplementedError

    # ---- what they share

    def prepare(self, work: Workload) -> Timed:
        """The captured work with the best configuration of each op, compared with the reference beforehand."""
        self._take(work.shape)
        rotations = self._rotations(work)
        bound = {op: self._bound(op, work, rotations, self._searched(op, work, rotations)) for op in _ops(work)}
        if work.what == "layer":
            self._verify(work, rotations[0], {op: calls[0] for op, calls in bound.items()})
        return self.captured([self._chain(work.what, rotation, bound, at) for at, rotation in enumerate(rotations)])

    def _chain(self, what: str, rotation: Rotation, bound: dict[str, list[Callable[[Any], Any]]], at: int) -> Callable[[], Any]:
        if what == "layer":
            one, two = bound["fc1"][at], bound["fc2"][at]
            return lambda: two(one(rotation.x))
        call, given = bound[what][at], rotation.x if what == "fc1" else rotation.middle
        return lambda: call(given)

    def _take(self, shape: Shape) -> None:
        """Weights of a shape in as many copies as exceed the L2 twice."""
        if self._shape == shape:
            return
        self.release()
        self.say(f"{self.name}: weights of {shape.name}")
        self._shape = shape
        l2 = self.torch.cuda.get_device_properties(0).L2_cache_size if self.device == "cuda" else 0
        for op in ("fc1", "fc2"):
            plain = self._plain[op] = self._made(op, shape)
            nbytes = plain.codes.numel() + plain.scales.numel()
            self._own[op] = [self.convert(op, shape, plain)]
            self._own[op] += [self.copied(self._own[op][0]) for _ in range(-(-COLD_FACTOR * l2 // nbytes))]

    def _made(self, op: str, shape: Shape) -> Plain:
        torch = self.torch
        n, k = (2 * shape.intermediate, shape.hidden) if op == "fc1" else (shape.hidden, shape.intermediate)
        generator = torch.Generator(device=self.device).manual_seed(int(op[-1]))
        options = {"dtype": torch.uint8, "device": self.device, "generator": generator}
        codes = torch.randint(0, 256, (shape.experts, n, k // 2), **options)
        scales = torch.randint(LEAST_SCALE, MOST_SCALE, (shape.experts, n, k // GROUP), **options)
        alpha = torch.full((shape.experts,), 2.0 ** -round(math.log2(2 * math.sqrt(k))), dtype=torch.float32, device=self.device)
        return Plain(codes, scales, alpha)

    def _rotations(self, work: Workload) -> list[Rotation]:
        torch, shape, m = self.torch, work.shape, work.m
        generator = torch.Generator(device=self.device).manual_seed(7)
        options = {"device": self.device, "generator": generator}
        x = torch.randn(m, shape.hidden, **options).to(torch.bfloat16)
        middle = torch.randn(m * shape.top_k, shape.intermediate, **options).to(torch.bfloat16)
        router = (torch.rand(m, shape.top_k, **options) + 0.5) / shape.top_k
        found = []
        for index, routing in enumerate(work.routings):
            used = len({expert for row in routing for expert in row})
            found.append(Rotation(routing, index * used // shape.experts, x, middle, router))
        return found

    def _bound(self, op: str, work: Workload, rotations: Sequence[Rotation], configuration: Any) -> list[Callable[[Any], Any]]:
        own = self._own[op]
        return [self.bind(op, work.shape, own[each.copy % len(own)], each, configuration) for each in rotations]

    def _searched(self, op: str, work: Workload, rotations: Sequence[Rotation]) -> Any:
        """The fastest configuration of an op at this shape and M, found once."""
        name = (work.shape, op, work.m)
        if name not in self._best:
            times: list[tuple[float, int, Any]] = []
            failed, tried = "", 0
            configurations = self.configurations(op, work.shape, work.m)
            what, begun = f"{self.name} {op} {work.shape.name} M = {work.m}", self.clock()
            self.say(f"{what}: {len(configurations)} configurations")
            for index, configuration in enumerate(configurations):
                before = self.clock()
                if times and self.seconds and before - begun >= self.seconds:
                    break
                tried += 1
                try:
                    calls = {op: self._bound(op, work, rotations, configuration)}
                    self._verify(work, rotations[0], {op: calls[op][0]})
                    timed = self.captured([self._chain(op, each, calls, at) for at, each in enumerate(rotations)])
                except Exception as error:  # a configuration that does not compile, launch or agree at this shape: the others remain
                    failed = failed or f"{type(error).__name__}: {error}"
                    continue
                finally:
                    taken = self.clock() - before
                    if taken > SLOW_SECONDS:
                        self.say(f"{what}: configuration {index + 1} of {len(configurations)} took {taken:.0f} s to compile and check")
                try:
                    times.append((self.milliseconds(timed), index, configuration))
                finally:
                    timed.close()
            if not times:
                raise Unavailable(f"none of its configurations runs {op} at M = {work.m}: {failed or 'it has none'}")
            self._best[name] = Found(min(times, key=lambda each: each[:2])[2], tried, len(configurations))
        return self._best[name].configuration

    def searched(self, work: Workload) -> dict[str, tuple[int, int]]:
        """By op of work that was prepared: configurations that were tried, and those that there are."""
        found = {op: self._best[work.shape, op, work.m] for op in _ops(work)}
        return {op: (each.tried, each.of) for op, each in found.items()}

    def milliseconds(self, timed: Timed) -> float:
        """The least of a few replays."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        found = []
        for _ in range(1 + REPLAYS):
            begin.record(stream)
            timed.replay(stream.cuda_stream)
            end.record(stream)
            end.synchronize()
            found.append(float(begin.elapsed_time(end)))
        return min(found[1:])

    def _verify(self, work: Workload, rotation: Rotation, calls: dict[str, Callable[[Any], Any]]) -> None:
        """Raises Unavailable where a token's outputs are not the reference's."""
        middle = rotation.middle
        token = work.m - 1
        if "fc1" in calls:
            middle = calls["fc1"](rotation.x)
            self._compare("fc1", middle, self.fc1_reference(work.shape, rotation, token), token * work.shape.top_k)
        if "fc2" in calls:
            got = calls["fc2"](middle)
            self._compare("fc2", got, self.fc2_reference(work.shape, rotation, middle, token), token)

    def _compare(self, op: str, got: Any, wanted: npt.NDArray[np.float64], first: int) -> None:
        rows, columns = wanted.shape
        values = got[first : first + rows, :columns].float().cpu().numpy().astype(np.float64)
        error = float(np.abs(values - wanted).max() / np.abs(wanted).max())
        if not error <= TOLERANCE:
            raise Unavailable(f"its {op} is off our reference by {error:.1%} of the largest output: it does not compute the same layer")

    def fc1_reference(self, shape: Shape, rotation: Rotation, token: int) -> npt.NDArray[np.float64]:
        """FC1 of a token's experts, in the order of its routing: float64 ``[k, COLUMNS]``."""
        plain, columns = self._plain["fc1"], np.arange(min(COLUMNS, shape.intermediate))

        def weights(expert: int, chosen: npt.NDArray[np.int64]) -> tuple[Any, Any]:
            return plain.values(expert, chosen + shape.intermediate), plain.values(expert, chosen)

        a = rotation.x[token : token + 1].double().cpu().numpy()
        alpha = plain.alpha.double().cpu().numpy()
        return np.concatenate([reference.fc1(a, weights, alpha, [(expert, columns)]).y for expert in rotation.routing[token]])

    def fc2_reference(self, shape: Shape, rotation: Rotation, middle: Any, token: int) -> npt.NDArray[np.float64]:
        """FC2 of a token: float64 ``[1, COLUMNS]``."""
        plain, columns = self._plain["fc2"], np.arange(min(COLUMNS, shape.hidden))
        experts = list(rotation.routing[token])
        a = middle[token * shape.top_k : (token + 1) * shape.top_k].double().cpu().numpy().reshape(1, -1)
        alpha = rotation.router[token].double().cpu().numpy() * plain.alpha.double().cpu().numpy()[experts]
        found = reference.fc2(
            a, lambda place, at: plain.values(experts[place], at), alpha[None], len(experts), shape.intermediate, columns=columns
        )  # fmt: skip
        return np.asarray(found.c)

    def release(self) -> None:
        """Drops the weights; what was found to be fastest is kept."""
        self._shape = None
        self._plain, self._own = {}, {}
        super().release()


def _ops(work: Workload) -> tuple[str, ...]:
    """The ops that a work consists of."""
    return ("fc1", "fc2") if work.what == "layer" else (work.what,)
