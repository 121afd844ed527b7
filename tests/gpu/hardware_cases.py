"""Fixed problems whose outputs on a GPU are kept as evidence, and their launch through a Loader; numpy alone, and the runtime.

The same functions run on a device (``hardware_evidence.py``) and on the emulator in the driver's place (``tests/emulator/test_hardware.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from densemoe.runtime import data, packing, reference
from densemoe.runtime.layout import k64_order
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import BRINGS, DETERMINISTIC, ROUNDED, ROUTES, Variant

Arrays = dict[str, np.ndarray[Any, Any]]

POISON = 0x5A
NUMPY: Mapping[str, Any] = {"u8": np.uint8, "bf16": np.uint16, "f16": np.float16, "f32": np.float32, "i32": np.int32, "i64": np.int64}
LARGEST = np.float32(448 * 6)  # of an NVFP4 value without its global scale


class Shape(NamedTuple):
    """A problem's sizes; ``seed`` is of its data."""

    m: int
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    seed: int

    @property
    def name(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self._asdict().items())


#: Ragged sizes over more than one tile, and even ones; few pairs. FC1 and FC2 on data of rule 1: bit for bit, whatever the order of additions.
EXACT = (Shape(21, 3, 320, 192, 2, 11), Shape(37, 5, 256, 128, 3, 12), Shape(11, 3, 320, 192, 2, 13))
#: Normal data: additions are rounded, FC1 goes through ex2.approx and rcp.approx.
GENERAL = (Shape(5, 2, 512, 192, 2, 21),)
#: By shape: dtype of the activations that ``prepare`` and ``route`` bring, and rows of a tile of ``route``: in natural order, and in K 64 order.
_BROUGHT = {EXACT[0].name: ("bf16", 16), EXACT[1].name: ("nvfp4", 32), EXACT[2].name: ("bf16", 16), GENERAL[0].name: ("bf16", 16)}
_EXACT_OPS = ("fc1", "fc2", "groupedfc1", "groupedfc2", "prepare", "route", "quantize")


@dataclass(frozen=True)
class Made:
    """A problem with its tensors.

    Attributes:
        arrays: inputs by role, packed weights as ``b``.
        rows: of the first output dimension that the contract defines; None: all.
    """

    problem: Problem
    arrays: Arrays
    rows: int | None = None


def _routing(rng: np.random.Generator, shape: Shape) -> tuple[Any, Any, Any]:
    ids = np.stack([rng.permutation(shape.experts)[: shape.top_k] for _ in range(shape.m)]).astype(np.int32)
    return ids, np.exp2(rng.integers(-2, 1, ids.shape)).astype(np.float32), np.exp2(rng.integers(-3, 3, shape.experts)).astype(np.float32)


def _brought(rng: np.random.Generator, problem: Problem) -> Arrays:
    """Activations that ``prepare`` and ``route`` bring as bf16: NVFP4, or bf16 of many magnitudes that are rounded to it."""
    m, hidden = problem.m, problem.hidden
    if not problem.x_dtype:
        return {}
    if problem.x_dtype == "nvfp4":
        first, scales, _ = data.activations(rng, m, hidden, "nvfp4", "normal")
        return {"x": first, "x.scales": scales}
    x = rng.standard_normal((m, hidden), np.float32)
    x[0, :16], x[-1, 20], x[m // 2, 32:48] = 0, 60000, 1e-6
    return {"x": data.bf16_bits(x), "x.multiplier": np.array([LARGEST / 4], np.float32)}


def make(variant: Variant, shape: Shape, kind: str) -> Made:
    """The problem of a variant at a shape, data of ``kind`` (``runtime.data``); the same bytes on every machine."""
    rng = np.random.default_rng([shape.seed, len(variant.op), shape.m])
    if variant.op == "quantize":
        x = rng.standard_normal((shape.m, shape.hidden), np.float32)
        x[0, :16], x[-1, 20] = 0, 60000
        stored = data.bf16_bits(x) if variant.a_dtype == "bf16" else x.astype(NUMPY[variant.a_dtype])
        problem = Problem("quantize", shape.m, 0, shape.hidden, 0, variant.a_dtype, variant.c_dtype)
        return Made(problem, {"a": stored, "output_multiplier": np.array([LARGEST / 4], np.float32)})
    if variant.op in ("prepare", "route"):
        ids, router, w2_alpha = _routing(rng, shape)
        x_dtype, group_tile = _BROUGHT[shape.name] if variant.option(BRINGS) else ("", 16)
        tile: dict[str, Any] = {"group_tile": group_tile, "deterministic": True} if variant.op == "route" else {}
        problem = Problem(
            variant.op, shape.m, shape.experts, shape.hidden if x_dtype else 0, 0, variant.a_dtype, variant.c_dtype,
            top_k=shape.top_k, x_dtype=x_dtype, x_rounded=x_dtype == "bf16", **tile,
        )  # fmt: skip
        given: Arrays = {"ids": ids.astype(NUMPY[variant.a_dtype]), "router": router, "w2_alpha": w2_alpha, **_brought(rng, problem)}
        if variant.op == "prepare":
            given["alpha_divisor"] = np.ones(1, np.float32)
        return Made(problem, given)
    return _gemm(variant, shape, kind, rng)


def _gemm(variant: Variant, shape: Shape, kind: str, rng: np.random.Generator) -> Made:
    m, experts, hidden, intermediate, top_k, _ = shape
    grouped, op = variant.op.startswith("grouped"), variant.op.removeprefix("grouped")
    ordered = bool(variant.option(DETERMINISTIC))
    fields: dict[str, Any] = {"alpha_post": op == "fc1", "rounded": bool(variant.option(ROUNDED))}
    if grouped:
        fields = {"top_k": top_k, "group_tile": variant.tile_m, "deterministic": ordered}
        if variant.option(ROUTES):
            fields.update(routes=True, id_dtype="i32")
    problem = Problem(variant.op, m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype, **fields)
    weights = (data.fc1_weights if op == "fc1" else data.fc2_weights)(rng, experts, hidden, intermediate, kind)
    packed = packing.pack_fc1(weights.codes, weights.scales) if op == "fc1" else packing.pack_fc2(weights.codes, weights.scales, experts)
    first, scales, a_scale = data.activations(rng, m * top_k if variant.op == "groupedfc2" else m, problem.k, variant.a_dtype, kind)
    plain: Arrays = {"a.k64": k64_order(first)} if problem.a_in_k64_order else {"a": first}
    arrays: Arrays = {"b": packed, **(plain if scales is None else {"a.codes": first, "a.scales": scales})}
    rows = None
    if grouped:
        chosen = _routing(rng, shape)
        routes = reference.route(*chosen, group_tile=variant.tile_m)
        choice = dict(zip(("ids", "router", "w2_alpha"), chosen, strict=True))
        arrays.update({role: array for role, array in choice.items() if role in problem.tensors()} if problem.routes else routes.given(problem))
        rows = len(routes.rows) if op == "fc1" else None
    if op == "fc1":
        arrays["alpha"] = data.fc1_alpha(weights, a_scale)
        if not grouped:
            arrays["alpha_post"] = data.alpha_post(rng, m, experts, kind)
        if variant.c_dtype == "nvfp4":
            arrays["output_multiplier"] = np.array([0.125], np.float32)  # the largest output is some 10,000
    elif not grouped:
        arrays["alpha"] = data.fc2_alpha(rng, m, weights, a_scale, kind=kind)
    return Made(problem, arrays, rows)


def cases(keys: Sequence[str], shapes: Sequence[Shape], kind: str) -> Iterator[tuple[str, Shape, Made]]:
    """(key, shape, problem) of every variant that can run a shape: exact data for what is exact, else FC1 and FC2 that hide nothing by rounding."""
    for key in sorted(keys):
        variant = Variant.parse(key)
        gemm = variant.op.endswith(("fc1", "fc2"))
        if kind == "exact":
            wanted = variant.op in _EXACT_OPS and not (gemm and variant.c_dtype == "nvfp4")
        else:
            wanted = gemm and variant.c_dtype in ("f32", "nvfp4")
        for shape in shapes if wanted else ():
            made = make(variant, shape, kind)
            if can_implement(variant, made.problem)[0]:
                yield key, shape, made


def launch(loader: Any, key: str, made: Made, times: int = 2) -> Arrays:
    """The defined part of every output, after ``times`` launches on the same workspaces, each over poisoned outputs.

    Raises:
        AssertionError: two launches gave different bytes on exact data, or something was written behind an output.
    """
    driver, pointers = loader.driver, []

    def allocate(nbytes: int) -> int:
        pointers.append(driver.allocate(nbytes))
        return int(pointers[-1])

    tensors = {}
    for role, array in made.arrays.items():
        tensors[role] = allocate(array.nbytes)
        driver.to_device(tensors[role], np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    specs = {role: spec for role, spec in made.problem.tensors().items() if spec.output}
    for role, spec in specs.items():
        tensors[role] = allocate(spec.nbytes + 256)
    found: Arrays = {}
    try:
        with loader.plan(made.problem, tensors, 0, key) as plan:
            for _ in range(times):
                for role, spec in specs.items():
                    # scales start as 0: their padding rows are the caller's (contract section 2)
                    driver.fill(tensors[role], 0 if role == "c.scales" else POISON, spec.nbytes)
                    driver.fill(tensors[role] + spec.nbytes, POISON, 256)
                plan.launch()
                driver.synchronize()
                found = _read(driver, made, specs, tensors)
    finally:
        for pointer in pointers:
            driver.free(pointer)
    return found


def _read(driver: Any, made: Made, specs: Mapping[str, Any], tensors: Mapping[str, int]) -> Arrays:
    found: Arrays = {}
    for role, spec in specs.items():
        raw = np.empty(spec.nbytes + 256, np.uint8)
        driver.to_host(raw, tensors[role])
        assert (raw[spec.nbytes :] == POISON).all(), f"{made.problem}: written behind {role}"
        found[role] = raw[: spec.nbytes].view(NUMPY[spec.dtype]).reshape(spec.shape)
    op = made.problem.op
    if op == "prepare":
        count = int(found["active_list"][0])
        found["active_list"] = found["active_list"][: 1 + count]
    elif op == "route":
        tiles, rows = map(int, found["tiles"][0, :2])
        defined = {"tiles": found["tiles"][: 1 + tiles, :3], "rows": found["rows"][:rows], "row_alpha": found["row_alpha"][:rows]}
        found = {**found, **defined}
    elif made.rows is not None:
        found = {role: (array[: made.rows] if role != "c.scales" else array) for role, array in found.items()}
    return found


def digest(outputs: Arrays) -> str:
    """sha256 of outputs, role by role."""
    state = hashlib.sha256()
    for role in sorted(outputs):
        state.update(f"{role} {outputs[role].dtype.str} {outputs[role].shape}\n".encode())
        state.update(np.ascontiguousarray(outputs[role]).tobytes())
    return state.hexdigest()
