"""A layer over several ranks, a process each: what every rank computes, how the processes are started and ended, and what their results must be.

``tests/gpu/test_torch_parallel.py`` runs it on GPUs through gloo and NCCL, ``tests/torch/test_parallel.py`` on the CPU through gloo.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from densemoe.runtime import data, marks, reference
from densemoe.runtime.layer_data import LayerData
from densemoe.runtime.torch import DenseGemmMoE, MoEConfig
from densemoe.runtime.torch.weights import MoEWeights, Projection, WeightStore, quantize_projection

SECONDS = 150.0  # until ranks that still run are ended: importing torch and opening NCCL take some twenty
SPLITS = ("tp", "ep")
FORMS = {"bf16": {}, "nvfp4": {"activations": "nvfp4", "between": "nvfp4"}}
INPUT_SCALE = 6 / 2688  # of the data's activations, whose largest is below 6
#: bf16 output of one rank: half an ulp of each side, and FC1's output that may round either way where sums differ in their order
PART_TOLERANCE = {"rtol": 2**-6, "atol": 2**-6}
SUM_TOLERANCE = {"rtol": 2**-5, "atol": 2**-5}  # parts in bf16, and their sum rounded again


@dataclass(frozen=True)
class Task:
    """What the ranks do.

    Attributes:
        folder: for their rendezvous and results.
        backend: of torch.distributed, ``gloo`` or ``nccl``.
        device: ``cpu`` or ``cuda``.
        devices: GPUs that the ranks are spread over.
        form: of FORMS.
        graph: capture the layer, its sum over ranks included, and replay it with every round's inputs.
        case: (E, k, H, I, M) of the layer.
    """

    folder: str
    backend: str
    device: str
    devices: int = 1
    ranks: int = 2
    form: str = "bf16"
    graph: bool = False
    case: tuple[int, int, int, int, int] = (8, 2, 512, 512, 8)

    def config(self, **own: Any) -> MoEConfig:
        experts, top_k, hidden, intermediate, _ = self.case
        return MoEConfig(experts, top_k, hidden, intermediate, **FORMS[self.form], **own)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Whole:
    """A layer, quantised once, of which each rank takes its part."""

    def __init__(self, task: Task) -> None:
        self.task, self.data = task, LayerData(data.LayerCase(*task.case))
        self.between_scale = 1 / float(self.data.output_multiplier)
        self.experts = [self._expert(e) for e in range(task.case[0])]

    def _expert(self, expert: int) -> dict[str, Projection]:
        gate, up, down = (torch.from_numpy(self.data.projection(name, expert)) for name in ("gate", "up", "down"))
        both = quantize_projection(torch.cat([gate, up]))  # one global scale, so that a part's is the whole's
        rows = gate.shape[0]
        halves = [Projection(both.codes[part], both.scales[part], both.global_scale, INPUT_SCALE) for part in (slice(0, rows), slice(rows, None))]
        last = quantize_projection(down)
        return {"gate": halves[0], "up": halves[1], "down": Projection(last.codes, last.scales, last.global_scale, self.between_scale)}

    def part(self, split: str, rank: int, device: Any = "cpu") -> MoEWeights:
        """A rank's weights: a part of every expert's I (``tp``) or a part of the experts (``ep``); all of them for ``all``."""
        experts, _, hidden, intermediate, _ = self.task.case
        ranks = 1 if split == "all" else self.task.ranks
        width, count = (intermediate // ranks, experts) if split == "tp" else (intermediate, experts // ranks)
        first, own = (0, slice(width * rank, width * rank + width)) if split == "tp" else (count * rank, slice(0, width))
        store = WeightStore(count, hidden, width, device=device)
        for slot in range(count):
            gate, up, down = (self.experts[first + slot][name] for name in ("gate", "up", "down"))
            halves = [Projection(each.codes[own], each.scales[own], each.global_scale, each.input_scale) for each in (gate, up)]
            codes, scales = down.codes[:, own.start // 2 : own.stop // 2], down.scales[:, own.start // 16 : own.stop // 16]
            store.put(slot, gate=halves[0], up=halves[1], down=Projection(codes.copy(), scales.copy(), down.global_scale, down.input_scale))
        return store.finish()

    def module(self, split: str, rank: int, device: Any = "cpu", *, reduce: bool = False) -> DenseGemmMoE:
        """A rank's layer."""
        own = {} if split == "all" else {f"{split}_size": self.task.ranks, f"{split}_rank": rank}
        return DenseGemmMoE(self.task.config(reduce=reduce, **own), self.part(split, rank, device))

    def rounds(self) -> list[Inputs]:
        """(x, ids, router weights) of three calls: the data's; other tokens and experts; the first experts alone, so that the last rank has none."""
        x = torch.from_numpy(self.data.x.view("int16")).view(torch.bfloat16)
        ids, router = (torch.from_numpy(each) for each in self.data.routing())
        first = torch.arange(ids.shape[1], dtype=ids.dtype).expand_as(ids).contiguous()
        return [(x, ids, router), (x.roll(1, 0), (ids + 3) % self.task.case[0], router.roll(1, 0)), (x, first, router)]


def work(rank: int, task: Task) -> None:
    """A rank's process: its part, the sum over ranks and, where asked for, replays of both, saved in the task's folder."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    device = torch.device(task.device, rank % task.devices) if task.device == "cuda" else torch.device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rendezvous = f"file://{task.folder}/rendezvous"
    torch.distributed.init_process_group(
        task.backend, init_method=rendezvous, rank=rank, world_size=task.ranks, timeout=timedelta(seconds=SECONDS)
    )
    whole, results = Whole(task), {}
    for split in SPLITS:
        alone, summed = whole.module(split, rank, device), whole.module(split, rank, device, reduce=True)
        for number, given in enumerate(whole.rounds()):
            x, ids, router = (each.to(device) for each in given)
            results[f"{split} part {number}"] = alone(x, ids=ids, weights=router).cpu()
            results[f"{split} sum {number}"] = summed(x, ids=ids, weights=router).cpu()
        if task.graph:
            for number, out in enumerate(_replays(summed, whole.rounds(), device)):
                results[f"{split} replay {number}"] = out
    torch.save(results, f"{task.folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _replays(layer: DenseGemmMoE, rounds: list[Inputs], device: Any) -> list[torch.Tensor]:
    """What a graph of one call of the layer gives with each round's inputs."""
    x, ids, router = (each.to(device) for each in rounds[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x, ids=ids, weights=router)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events meanwhile, from a thread of its own
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = layer(x, ids=ids, weights=router)
    results = []
    for given in rounds:
        for target, source in zip((x, ids, router), given, strict=True):
            target.copy_(source)
        graph.replay()
        results.append(out.cpu())
    torch.cuda.synchronize()
    graph.reset()  # a communicator is not closed while a graph holds its kernels
    return results


def start(function: Callable[..., None], arguments: tuple[Any, ...], ranks: int, seconds: float = SECONDS) -> None:
    """Runs ``function(rank, *arguments)`` in a fresh process a rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException, ProcessExitedException: a rank failed; the others were ended.
        TimeoutError: they still ran after ``seconds``, and were ended.
    """
    context = torch.multiprocessing.spawn(function, arguments, nprocs=ranks, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=max(0.0, min(1.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                left = [rank for rank, each in enumerate(context.processes) if each.is_alive()]
                raise TimeoutError(f"ranks {left} of {ranks} still ran after {seconds:g} s and were ended")
    finally:
        for each in context.processes:
            if each.is_alive():
                each.kill()
            each.join()


def run(task: Task, seconds: float = SECONDS) -> list[dict[str, torch.Tensor]]:
    """Every rank's results by name. Raises what ``start`` does."""
    start(work, (task,), task.ranks, seconds)
    return [torch.load(Path(task.folder) / f"{rank}.pt") for rank in range(task.ranks)]


def check(task: Task, found: list[dict[str, torch.Tensor]]) -> None:
    """Compares the ranks' results: each part with the same rank's on the CPU; sums with the whole layer on the CPU and, by the contract's mark, with
    the unquantised layer in float64; replays with the calls that they repeat."""
    whole = Whole(task)
    one = whole.module("all", 0)
    for number, (x, ids, router) in enumerate(whole.rounds()):
        expected = one(x, ids=ids, weights=router)
        exact = reference.layer(
            x.double(), lambda e: tuple(map(torch.from_numpy, whole.data.unquantised(e))), ids.numpy(), router.numpy()
        )
        for split in SPLITS:
            name = f"{split} sum {number}"
            for rank, results in enumerate(found):
                part = results[f"{split} part {number}"]
                torch.testing.assert_close(part, whole.module(split, rank)(x, ids=ids, weights=router), **PART_TOLERANCE)
                if split == "ep":
                    count = task.case[0] // task.ranks
                    elsewhere = ((ids < count * rank) | (ids >= count * (rank + 1))).all(dim=1)
                    assert not part[elsewhere].any(), f"{split} {number}: rank {rank} adds to tokens that have no expert there"
                assert torch.equal(results[name], found[0][name])
                torch.testing.assert_close(results[name], expected, **SUM_TOLERANCE)
                assert marks.layer_mark(results[name].double(), exact).passed, name
                if task.graph:
                    torch.testing.assert_close(results[f"{split} replay {number}"], results[name], **PART_TOLERANCE)
            if split == "ep" and number == 2:
                assert not found[-1][f"ep part {number}"].any()
