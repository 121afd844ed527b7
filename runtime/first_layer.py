"""What one fresh process does up to its first layer result, for ``densemoe bench startup``: our runtime alone, with torch, or Humming.

    python -m densemoe.runtime.first_layer runtime|torch|humming '{"artifacts": null, "device": 0}'

A layer of Qwen3-30B's shape at M = 8, weights of zeros that are made on the device: what reading them from disk takes is nobody's cold start. Prints
the monotonic clock when the result has arrived. Exit code 3 and the reason where this cannot run here.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Final

__all__ = ["EXPERTS", "HIDDEN", "INTERMEDIATE", "TOKENS", "TOP_K", "main"]

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 128, 8, 2048, 768, 8
ABSENT: Final = 3


class Absent(Exception):
    """Why it cannot run here."""


def _ids() -> list[list[int]]:
    return [[(token * 16 + 2 * place) % EXPERTS for place in range(TOP_K)] for token in range(TOKENS)]


def _dtypes(entries: Any) -> tuple[str, str, str]:
    """Activations, between and output of a layer that the set has kernels for, bf16 first."""
    pairs = {op: sorted((each.variant.a_dtype, each.variant.c_dtype) for each in entries if each.variant.op == op) for op in ("fc1", "fc2")}
    for a_dtype, between in pairs["fc1"]:
        for first, c_dtype in pairs["fc2"]:
            if first == between:
                return a_dtype, between, c_dtype
    raise Absent("the set has no FC1 and FC2 of matching dtypes")


def _name(role: str, place: int) -> str:
    """Of the memory behind a role of the first or second op: FC1's output is FC2's input, the list of experts is both's."""
    kind, _, part = role.partition(".")
    if (place, kind) in ((1, "c"), (2, "a")):
        return f"between.{part}"
    return role if role == "active_experts" else f"{role} {place}"


def _runtime(task: dict[str, Any]) -> None:
    """cuda-bindings and the standard library alone."""
    import struct

    from densemoe.runtime.driver import Driver
    from densemoe.runtime.loader import Loader
    from densemoe.runtime.plan import packed_weight_bytes
    from densemoe.runtime.problem import Problem

    loader = Loader(task["artifacts"], Driver())
    driver, device = loader.driver, task["device"]
    driver.use_device(device)
    entries = list(loader.manifest(device).variants.values())
    a_dtype, between, c_dtype = _dtypes(entries)
    listed = any(each.variant.op == "prepare" for each in entries)
    problems = [
        Problem("fc1", TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, a_dtype, between, active_list=listed),
        Problem("fc2", TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, between, c_dtype, active_list=listed),
    ]
    memory: dict[str, int] = {}

    def made(name: str, nbytes: int) -> int:
        if name not in memory:
            memory[name] = driver.allocate(nbytes)
            driver.fill(memory[name], 0, nbytes)
        return memory[name]

    stream, plans = driver.stream(), []
    if listed:
        prepare = Problem("prepare", TOKENS, EXPERTS, 0, 0, "i32", "f32", top_k=TOP_K)
        shared = {role: made({"active_list": "active_experts"}.get(role, f"{role} 2"), spec.nbytes) for role, spec in prepare.tensors().items()}
        driver.to_device(shared["ids"], bytearray(struct.pack(f"<{TOKENS * TOP_K}i", *(expert for row in _ids() for expert in row))))
        driver.synchronize()
        plans.append(loader.plan(prepare, shared, device))
    for place, problem in enumerate(problems, 1):
        layout = loader.kernel(loader.select(problem, device).variant.key, device).entry.layout
        tensors = {"b": made(f"b {place}", packed_weight_bytes(layout, problem))}
        for role, spec in problem.tensors().items():
            tensors[role] = made(_name(role, place), spec.nbytes)
        plans.append(loader.plan(problem, tensors, device))
    for plan in plans:
        plan.launch(stream)
    driver.synchronize()
    result = bytearray(problems[1].tensors()["c"].nbytes)
    driver.to_host(memoryview(result), memory["c 2"])


def _cuda_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise Absent("torch is not installed: install densemoe[torch]") from None
    if not torch.cuda.is_available():
        raise Absent("this torch has no CUDA device")
    return torch


def _torch(task: dict[str, Any]) -> None:
    """The layer op."""
    torch = _cuda_torch()
    import densemoe.runtime.torch  # noqa: F401 - registers the ops
    from densemoe.runtime.loader import Loader
    from densemoe.runtime.plan import packed_weight_bytes
    from densemoe.runtime.problem import Problem

    entries = list(Loader(task["artifacts"]).manifest(task["device"]).variants.values())
    layout = next(each.layout for each in entries if each.variant.op == "fc1")
    sizes = [packed_weight_bytes(layout, Problem(op, TOKENS, EXPERTS, HIDDEN, INTERMEDIATE)) for op in ("fc1", "fc2")]
    with torch.device(f"cuda:{task['device']}"):
        one, two = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        ids = torch.tensor(_ids(), dtype=torch.int32)
        router = torch.full((TOKENS, TOP_K), 1 / TOP_K)
        alpha = torch.ones(EXPERTS)
    found = torch.ops.densemoe.moe(x, ids, router, one, alpha, two, alpha, HIDDEN, INTERMEDIATE, layout)
    found.cpu()


def _humming(task: dict[str, Any]) -> None:
    """Its own choice of configuration, compiled where its cache lacks it."""
    import importlib.util

    if importlib.util.find_spec("humming") is None:
        raise Absent("humming-kernels is not installed: install densemoe[bench]")
    torch = _cuda_torch()
    from densemoe.runtime.bench_humming import Humming
    from densemoe.runtime.bench_nvfp4 import Plain, Rotation
    from densemoe.runtime.tune_cases import Shape

    torch.cuda.set_device(task["device"])
    moe, shape = Humming(), Shape("", EXPERTS, TOP_K, HIDDEN, INTERMEDIATE)
    with torch.device("cuda"):
        x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        rotation = Rotation(_ids(), 0, x, None, torch.full((TOKENS, TOP_K), 1 / TOP_K))
        for op, n, k in (("fc1", 2 * INTERMEDIATE, HIDDEN), ("fc2", HIDDEN, INTERMEDIATE)):
            sizes = (EXPERTS, n, k // 2), (EXPERTS, n, k // 16)
            codes, scales = (torch.zeros(size, dtype=torch.uint8) for size in sizes)
            own = moe.convert(op, shape, Plain(codes, scales, torch.ones(EXPERTS)))
            x = moe.bind(op, shape, own, rotation, moe.own_choice(own, TOKENS * TOP_K))(x)
    x.cpu()


def main(arguments: list[str]) -> int:
    """Runs one of them; the exit code."""
    which, task = arguments[0], json.loads(arguments[1])
    try:
        {"runtime": _runtime, "torch": _torch, "humming": _humming}[which](task)
    except Absent as error:
        print(error)
        return ABSENT
    print(time.clock_gettime_ns(time.CLOCK_MONOTONIC))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
