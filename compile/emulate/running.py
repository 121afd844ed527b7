"""One case of one variant on the emulator: data, launch and judgement, all of them the project's own.

Data come from ``runtime.data``, parameters and tensor maps from the runtime's packer, the exact result from ``runtime.reference`` and the verdict
from ``runtime.bounds``. Outputs are poisoned before every launch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.compile.emulate.cases import Case
from densemoe.compile.emulator.device import early_roles, launch_recipe
from densemoe.compile.emulator.execution import Report as Run
from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.errors import DensemoeError
from densemoe.runtime.layout import k64_order, tile_scales
from densemoe.runtime.nvfp4 import bf16_bits, bf16_values, pack_codes, quantise_rows
from densemoe.runtime.plan import weight_parts
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import Variant

__all__ = ["REWRITTEN", "Outcome", "RunTask", "emulator_digest", "judge_digest", "poisoned", "run_case", "run_task"]

POISON: Final = 0xA5
#: By op: outputs that are filled first and written again where there is something to say. Every other output byte is written once a launch.
REWRITTEN: Final[Mapping[str, Sequence[str]]] = {"prepare": ("alpha",)}
ZERO_SHARE: Final = 0.25  # of alphas where a case has zeros
_LARGEST: Final = 448.0 * 6.0  # of an NVFP4 value without its global scale
_NUMPY: Final[Mapping[str, Any]] = {
    "u8": np.uint8,
    "bf16": np.uint16,
    "f16": np.float16,
    "f32": np.float32,
    "e4m3": np.uint8,
    "e5m2": np.uint8,
    "i32": np.int32,
    "i64": np.int64,
}
_ROOT: Final = Path(__file__).resolve().parents[2]
#: Who packs, makes data and judges: a record depends on these beside the emulator.
_JUDGING: Final = ("arrays", "bounds", "data", "layout", "nvfp4", "packing", "plan", "problem", "recipe", "reference", "rules")
_JUDGES: Final = (
    *(f"runtime/{name}.py" for name in _JUDGING),
    "compile/emulate/cases.py",
    "compile/emulate/running.py",
)

Arrays = dict[str, npt.NDArray[Any]]
_Compared = tuple[str, npt.NDArray[Any], npt.NDArray[Any]]


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def emulator_digest() -> str:
    """sha256 of the emulator's sources."""
    return _digest(sorted((_ROOT / "compile" / "emulator").rglob("*.py")))


@cache
def judge_digest() -> str:
    """sha256 of the sources that make data, pack launches and judge outputs."""
    return _digest([_ROOT / name for name in _JUDGES])


@dataclass
class Outcome:
    """What a case gave; JSON by ``vars``.

    Attributes:
        passed: every element within its bound, and rule 3's exemption used for at most 50 in 10,000 bytes.
        worst: largest error over its bound.
        elements, mismatches, exemptions: counts over all parts of the output.
        detail: one line a part, with the worst element.
        counters: of the emulator, of the last launch.
        needed_bytes: of the inputs, each read once, and of the outputs.
        seconds: of the emulator.
    """

    passed: bool
    worst: float
    elements: int
    mismatches: int
    exemptions: int
    detail: str = ""
    counters: Mapping[str, Any] = field(default_factory=dict)
    needed_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RunTask:
    """One run for an executor. ``emulator`` and ``judge`` are the digests that the caller has: a process with other sources runs nothing.

    Attributes:
        recipe: JSON of the launch recipe.
        schedule: of the emulator, as in ``random:7``.
    """

    key: str
    layout: str
    ptx: str
    recipe: Mapping[str, Any]
    case: str
    seed: int
    schedule: str
    emulator: str
    judge: str


def run_task(task: RunTask) -> dict[str, Any]:
    """Runs a task; its Outcome as a dictionary, which is empty where this process has other sources than the caller.

    Raises:
        EmulatorError: a fault of the kernel.
        DensemoeError: the case cannot be made.
    """
    if (emulator_digest(), judge_digest()) != (task.emulator, task.judge):
        return {}
    recipe = Recipe.from_json(task.recipe)
    return vars(run_case(Variant.parse(task.key), task.layout, task.ptx, recipe, Case.parse(task.case), task.seed, task.schedule))


def run_case(variant: Variant, layout: str, ptx: str, recipe: Recipe, case: Case, seed: int, schedule: str) -> Outcome:
    """Runs one case.

    Args:
        layout: of the packed weights that the variant reads.
        seed: of the data.
        schedule: of the emulator.

    Raises:
        EmulatorError: the first fault that the emulator meets.
        DensemoeError: the variant cannot run the case.
    """
    problem = case.problem(variant)
    accepted, reason = can_implement(variant, problem)
    if not accepted:
        raise DensemoeError(f"{variant.key} cannot run {case.text}: {reason}")
    make = {"fc1": _fc1, "fc2": _fc2, "groupedfc1": _grouped, "groupedfc2": _grouped}.get(variant.op)
    make = make or {"prepare": _prepare, "route": _route, "quantize": _quantize}[variant.op]
    tensors, judge = make(problem, layout, case, seed)
    specs = problem.tensors()
    workspaces: dict[str, npt.NDArray[np.uint8]] = {}
    outputs: Arrays = {}
    # the setting says that the list was complete before the launch before began
    early = early_roles(variant.op, variant.arch, dict(case.settings))
    run = Run()
    for _ in range(case.launches):
        outputs = {role: poisoned(role, spec.shape, spec.dtype) for role, spec in specs.items() if spec.output}
        names = {**problem.names(), **dict(case.settings)}
        run = launch_recipe(
            ptx, recipe, names, {**tensors, **outputs}, outputs,
            workspaces=workspaces, schedule=schedule, sm_count=case.sm_count, early=early,
            rewritten=REWRITTEN.get(variant.op, ()),
        )  # fmt: skip
    report: bounds.Report = judge(outputs)
    every = [report, *report.parts]
    return Outcome(
        report.passed,
        max(each.worst for each in every),
        sum(each.elements for each in every),
        sum(each.mismatches for each in every),
        sum(each.exemptions for each in every),
        report.text,
        {
            "instructions": sum(run.instructions.values()),
            "products": dict(sorted(run.products.items())),
            "bytes": {path: int(count) for path, count in sorted(run.bytes.items())},
            "waits": dict(sorted(run.waits.items())),
            "bank_conflicts": int(run.bank_conflicts),
            "lints": len(run.lints),
        },
        sum(array.nbytes for array in (*tensors.values(), *outputs.values())),
        run.seconds,
    )


def poisoned(role: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """An output before a launch. Scales start as 0: their padding rows are the caller's (contract section 2)."""
    array = np.zeros(shape, _NUMPY[dtype])
    if role != "c.scales":
        array.view(np.uint8)[...] = POISON
    return array


# ---- FC1 and FC2


@lru_cache(maxsize=2)  # cases of one shape come one after another, and weights are the largest part of a case's data
def _weights(op: str, layout: str, experts: int, hidden: int, intermediate: int, kind: str, seed: int) -> tuple[data.Weights, Arrays]:
    """Weights in the interchange layout, and by the roles that kernels of ``layout`` point to."""
    rng = np.random.default_rng([seed, experts, hidden, intermediate])
    made = (data.fc1_weights if op == "fc1" else data.fc2_weights)(rng, experts, hidden, intermediate, kind)
    parts = weight_parts(layout, Problem(op, 1, experts, hidden, intermediate, "nvfp4", "bf16"))
    if "b.codes" in parts:
        return made, {"b.codes": made.codes, "b.scales": made.scales}
    packed = packing.pack_fc1(made.codes, made.scales) if op == "fc1" else packing.pack_fc2(made.codes, made.scales, experts)
    return made, {"b": packed}


def _activations(problem: Problem, kind: str, rng: np.random.Generator) -> tuple[Arrays, npt.NDArray[Any], np.float32]:
    """(by role, float64 values without the global scale, global scale)."""
    rows = problem.m * problem.top_k if problem.op == "groupedfc2" else problem.m
    first, scales, scale = data.activations(rng, rows, problem.k, problem.a_dtype, kind)
    if problem.a_dtype == "bf16":
        given = {"a.k64": k64_order(first)} if problem.a_in_k64_order else {"a": first}
        return given, bf16_values(first).astype(np.float64), scale
    return {"a.codes": first, "a.scales": scales}, reference.activation_values(first, scales), scale


def _listed(case: Case, rng: np.random.Generator) -> list[int]:
    """Experts that count, ascending: all, or half of them where the case has a list."""
    if not case.active_list:
        return list(range(case.experts))
    return sorted(int(e) for e in rng.choice(case.experts, max(1, case.experts // 2), replace=False))


def _active_experts(listed: Sequence[int], experts: int) -> npt.NDArray[np.int32]:
    """The list as a device builds it: a count, ids, and room that nobody may read, here an id that does not exist."""
    return np.array([len(listed), *listed, *[2**30] * (experts - len(listed))], np.int32)


def _rng(case: Case, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, case.m, case.experts, case.hidden, case.intermediate, case.top_k])


def _fc1(problem: Problem, layout: str, case: Case, seed: int) -> tuple[Arrays, Any]:
    made, packed = _weights("fc1", layout, case.experts, case.hidden, case.intermediate, case.kind, seed)
    rng, read = _rng(case, seed), reference.Weights("fc1", made.codes, made.scales, case.experts)
    arrays, a, a_scale = _activations(problem, case.kind, rng)
    arrays.update(packed, alpha=data.fc1_alpha(made, a_scale))
    listed = _listed(case, rng)
    if case.alpha_post:
        arrays["alpha_post"] = data.alpha_post(rng, case.m, case.experts, case.kind, ZERO_SHARE if case.zeros else 0.0)
    post = arrays["alpha_post"].astype(np.float64) if case.alpha_post else None
    exact = reference.fc1(a, read, arrays["alpha"].astype(np.float64), listed, post)
    columns = None
    if case.active_list:
        arrays["active_experts"] = _active_experts(listed, case.experts)
        columns = np.concatenate([e * case.intermediate + np.arange(case.intermediate) for e in listed])
    given = _multiplier(problem, exact, arrays)
    return arrays, lambda outputs: bounds.compare_fc1(
        outputs, exact, problem, output_multiplier=given, columns=columns, exact=case.kind == "exact"
    )


def _multiplier(problem: Problem, exact: reference.Fc1Result, arrays: Arrays) -> float | None:
    """``output_multiplier`` of NVFP4 output by the largest exact value; it is added to ``arrays``."""
    if problem.c_dtype != "nvfp4":
        return None
    finite = np.abs(exact.y[np.isfinite(exact.y)])
    arrays["output_multiplier"] = np.array([_LARGEST / max(float(finite.max(initial=0.0)), 1e-30)], np.float32)
    return float(arrays["output_multiplier"][0])


def _fc2(problem: Problem, layout: str, case: Case, seed: int) -> tuple[Arrays, Any]:
    made, packed = _weights("fc2", layout, case.experts, case.hidden, case.intermediate, case.kind, seed)
    rng, read = _rng(case, seed), reference.Weights("fc2", made.codes, made.scales, case.experts)
    arrays, a, a_scale = _activations(problem, case.kind, rng)
    zeros = ZERO_SHARE if case.zeros else 0.0
    alpha = data.fc2_alpha(rng, case.m, made, a_scale, scalar=bool(case.scalar_alpha), kind=case.kind, zeros=zeros)
    arrays.update(packed, alpha=alpha)
    if case.active_list:
        listed = _listed(case, rng)
        arrays["active_experts"] = _active_experts(listed, case.experts)
        alpha[:, [e for e in range(case.experts) if e not in listed]] = 0  # contract section 5
    exact = reference.fc2(a, read, alpha.astype(np.float64), case.experts, case.intermediate)
    return arrays, lambda outputs: bounds.compare_fc2(outputs, exact, problem, exact=case.kind == "exact")


# ---- FC1 and FC2 over gathered tokens


def _grouped(problem: Problem, layout: str, case: Case, seed: int) -> tuple[Arrays, Any]:
    """On the reference's routes, which may name an expert twice for a token; judged in every row that they have."""
    op = problem.op.removeprefix("grouped")
    made, packed = _weights(op, layout, case.experts, case.hidden, case.intermediate, case.kind, seed)
    rng, read = _rng(case, seed), reference.Weights(op, made.codes, made.scales, case.experts)
    arrays, a, a_scale = _activations(problem, case.kind, rng)
    first, shape = problem.first_expert, (case.m, case.top_k)
    ids = rng.integers(first, first + case.experts, shape)
    if case.zeros:
        ids = _with_strangers(rng, ids, first, case.experts)
    router = np.exp2(rng.integers(-1, 1, ids.shape)).astype(np.float32)  # powers of two: rule 1 holds after them
    w2_alpha = np.exp2(rng.integers(0, 2, case.experts)).astype(np.float32)
    routes = reference.route(ids, router, w2_alpha, group_tile=problem.group_tile, first_expert=first, elsewhere=problem.elsewhere)
    used = len(routes.rows)
    arrays.update(packed)
    if problem.routes:
        choice = {"ids": ids.astype(_NUMPY[problem.id_dtype]), "router": router, "w2_alpha": w2_alpha}
        arrays.update({role: array for role, array in choice.items() if role in problem.tensors()})
    else:
        arrays.update(routes.given(problem))
    exactly = case.kind == "exact"
    if op == "fc2":
        exact2 = reference.grouped_fc2(a[:used], read, routes.row_alpha.astype(np.float64), routes, case.m)
        return arrays, lambda outputs: bounds.compare_fc2(outputs, exact2, problem, exact=exactly)
    arrays["alpha"] = data.fc1_alpha(made, a_scale)
    exact1 = reference.grouped_fc1(a, read, arrays["alpha"].astype(np.float64), routes)
    given = _multiplier(problem, exact1, arrays)
    return arrays, lambda outputs: bounds.compare_fc1(
        outputs, exact1, problem, output_multiplier=given, rows=np.arange(used), exact=exactly
    )


# ---- prepare, route and quantize: bit for bit


def _equal(pairs: Sequence[_Compared]) -> bounds.Report:
    """Every element equal, NaN to NaN."""
    parts = []
    for name, got, expected in pairs:
        differs = ~((got == expected) | ((got != got) & (expected != expected)))
        where = np.argwhere(differs)
        detail = f"{list(map(int, where[0]))}: got {got[tuple(where[0])]!r}, exact {expected[tuple(where[0])]!r}" if len(where) else ""
        parts.append(bounds.Report(int(got.size), float("inf") if len(where) else 0.0, len(where), detail=detail, name=name))
    parts[0].parts = parts[1:]
    return parts[0]


def _routing(problem: Problem, case: Case, seed: int) -> tuple[Arrays, npt.NDArray[Any]]:
    """(ids, router weights and w2_alpha by role, ids). Where a case has zeros, some ids are not this rank's."""
    rng = _rng(case, seed)
    first, experts, shape = problem.first_expert, case.experts, (case.m, case.top_k)
    ids = rng.integers(first, first + experts, shape)
    if case.zeros:
        ids = _with_strangers(rng, ids, first, experts)
    arrays: Arrays = {
        "ids": ids.astype(_NUMPY[problem.a_dtype]),
        "router": rng.random(shape, np.float32),
        "w2_alpha": rng.random(experts, np.float32),
    }
    return arrays, ids


def _with_strangers(rng: np.random.Generator, ids: npt.NDArray[Any], first: int, experts: int) -> npt.NDArray[Any]:
    """``ids``, of which some are not this rank's."""
    outside = rng.random(ids.shape) < ZERO_SHARE
    strangers = rng.choice(np.array([-1, first - 1, first + experts, first + experts + 1000]), int(outside.sum()))
    found = ids.copy()
    found[outside] = strangers
    return found


def _brought(problem: Problem, case: Case, seed: int, arrays: Arrays) -> Callable[[Arrays], list[_Compared]]:
    """Puts activations that are to be brought as bf16 among ``arrays``; what compares what became of them."""
    role = problem.brought
    if not role:
        return lambda outputs: []
    rng = _rng(case, seed + 1)
    if problem.x_rounded:
        arrays["x"], values, multiplier = _unrounded(rng, case.m, problem.hidden, problem.x_dtype)
        arrays["x.multiplier"] = np.array([multiplier], np.float32)
        expected = reference.rounded_bf16(values, multiplier)
    else:
        expected, tiled, _ = data.activations(rng, case.m, problem.hidden, problem.x_dtype, "normal")
        arrays["x"] = expected
        if tiled is not None:
            arrays["x.scales"] = tiled
            expected = reference.decoded_bf16(expected, tiled)
    wanted = k64_order(expected) if role == "x.k64" else expected
    return lambda outputs: [(role, outputs[role], wanted)]


def _prepare(problem: Problem, layout: str, case: Case, seed: int) -> tuple[Arrays, Any]:
    arrays, ids = _routing(problem, case, seed)
    first, experts = problem.first_expert, case.experts
    divisor = np.float32(1.0 if seed % 2 else 0.75)
    arrays["alpha_divisor"] = np.array([divisor])
    alpha = reference.build_alpha(ids - first, arrays["router"], arrays["w2_alpha"], experts=experts, elsewhere_allowed=True)
    expected = (alpha / divisor).astype(np.float32)
    here = (ids >= first) & (ids < first + experts)
    active = np.unique(ids[here]) - first
    if not problem.elsewhere:
        expected[~here.all(axis=1)] = np.nan
        active = active if len(active) else np.array([0])  # one stays listed, so that the NaN reaches the output

    brought = _brought(problem, case, seed, arrays)

    def judge(outputs: Arrays) -> bounds.Report:
        listed = outputs["active_list"]
        stated = np.array([len(active), *active])
        return _equal([("alpha", outputs["alpha"], expected), ("active_list", listed[: len(stated)].astype(np.int64), stated), *brought(outputs)])

    return arrays, judge


def _route(problem: Problem, layout: str, case: Case, seed: int) -> tuple[Arrays, Any]:
    arrays, ids = _routing(problem, case, seed)
    routes = reference.route(
        ids,
        arrays["router"],
        arrays["w2_alpha"],
        group_tile=problem.group_tile,
        first_expert=problem.first_expert,
        elsewhere=problem.elsewhere,
    )
    tiles, rows = len(routes.tiles), len(routes.rows)
    brought = _brought(problem, case, seed, arrays)

    def judge(outputs: Arrays) -> bounds.Report:
        head = ("head", outputs["tiles"][0], np.array([tiles, rows, 0, 0], np.int32))
        listed = ("tiles", outputs["tiles"][1 : 1 + tiles, :3], routes.tiles)
        alphas = ("row_alpha", routes.in_one_order(outputs["row_alpha"][:rows]), routes.in_one_order(routes.row_alpha))
        parts = [head, listed, ("rows", outputs["rows"][:rows], routes.rows), alphas]
        if problem.deterministic:
            misplaced = routes.misplaced(outputs["places"], outputs["rows"], outputs["row_alpha"])
            parts.append(("misplaced pairs", np.array([misplaced]), np.array([0])))
        return _equal([*parts, *brought(outputs)])

    return arrays, judge


def _unrounded(rng: np.random.Generator, m: int, k: int, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], np.float32]:
    """Activations that are to be rounded to NVFP4 as they are stored, as float32, and their multiplier."""
    x = rng.standard_normal((m, k), np.float32)
    x[0, :16] = 0
    x[-1, 16:32] = 0
    x[-1, 20] = 60000  # one large value in its group
    x[m // 2, 32:48] *= np.float32(1e-6)
    stored: npt.NDArray[Any] = bf16_bits(x) if dtype == "bf16" else x.astype(_NUMPY[dtype])
    return stored, bf16_values(stored) if dtype == "bf16" else stored.astype(np.float32), np.float32(_LARGEST / 4)


def _quantize(problem: Problem, layout: str, case: Case, seed: int) -> tuple[Arrays, Any]:
    stored, values, multiplier = _unrounded(_rng(case, seed), case.m, case.hidden, problem.a_dtype)
    codes, scales = quantise_rows(values, multiplier)

    def judge(outputs: Arrays) -> bounds.Report:
        tiled = tile_scales(scales)
        return _equal([("c.codes", outputs["c.codes"], pack_codes(codes)), ("c.scales", outputs["c.scales"], tiled)])

    return {"a": stored, "output_multiplier": np.array([multiplier], np.float32)}, judge
