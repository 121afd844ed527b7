"""A launch recipe: how a bare cubin is launched, as data, so that one generic launcher serves every kernel.

A cubin says nothing of grids, tensor maps or what its parameters mean; the compiler's host code knows, and is not shipped. The recipe says
it instead: each kernel parameter in order, the grid and workspace as expressions of the problem. ``compile/oracle.py`` proves a recipe
against the compiler's own host code.

Expressions are strings over integers: names (``M``, ``E``, ``H``, ``I``, ``K``, ``N_out``, ``sm_count``, ``resident_clusters`` (how many of its
clusters the device holds at once, as a Plan asks the driver; ``sm_count`` // cluster size where nobody did), the recipe's own ``let`` names),
``+ - * // %``, comparisons, ``a if condition else b``, ``min``, ``max``, ``ceil_div``. Nothing else parses: hostile text runs no code.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from densemoe.runtime.errors import RecipeError

__all__ = ["Parameter", "Recipe", "TensorMapSpec", "Workspace", "evaluate", "pointer_or_null"]

_BINARY: Final[Mapping[type, Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: Final[Mapping[type, Callable[[int, int], bool]]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Final[Mapping[str, Callable[..., int]]] = {"min": min, "max": max, "ceil_div": lambda a, b: -(-a // b)}
_LONGEST_EXPRESSION: Final = 1000  # characters; bounds the parser's work on a hostile manifest
_Compiled = Callable[[Mapping[str, int]], int]


def _build(node: ast.expr, text: str) -> _Compiled:
    """A closure that evaluates ``node``; RecipeError for anything outside the grammar."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        constant = node.value
        return lambda names: constant
    if isinstance(node, ast.Name):
        name = node.id

        def look_up(names: Mapping[str, int]) -> int:
            try:
                return names[name]
            except KeyError:
                known = ", ".join(sorted(names))
                raise RecipeError(f"expression {text!r} uses {name!r}, which is not defined: the names are {known}") from None

        return look_up
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        apply, left, right = _BINARY[type(node.op)], _build(node.left, text), _build(node.right, text)

        def binary(names: Mapping[str, int]) -> int:
            try:
                return apply(left(names), right(names))
            except ZeroDivisionError:
                raise RecipeError(f"expression {text!r} divides by zero") from None

        return binary
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _build(node.operand, text)
        return lambda names: -inner(names)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        test, a, b = _COMPARE[type(node.ops[0])], _build(node.left, text), _build(node.comparators[0], text)
        return lambda names: int(test(a(names), b(names)))
    if isinstance(node, ast.IfExp):
        condition, then, other = (_build(part, text) for part in (node.test, node.body, node.orelse))
        return lambda names: then(names) if condition(names) else other(names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords and node.args:
        function, arguments = _FUNCTIONS[node.func.id], [_build(argument, text) for argument in node.args]
        exactly_two = node.func.id == "ceil_div"
        if len(arguments) < 2 or (exactly_two and len(arguments) > 2):
            raise RecipeError(f"expression {text!r}: {node.func.id} takes {'two' if exactly_two else 'at least two'} values")

        def call(names: Mapping[str, int]) -> int:
            try:
                return function(*(argument(names) for argument in arguments))
            except ZeroDivisionError:
                raise RecipeError(f"expression {text!r} divides by zero") from None

        return call
    raise RecipeError(
        f"expression {text!r} has {ast.unparse(node)!r}: use integers, names, + - * // %, comparisons, 'a if b else c', min, max, ceil_div"
    )


@lru_cache(maxsize=4096)
def _compile(text: str) -> _Compiled:
    if len(text) > _LONGEST_EXPRESSION:
        raise RecipeError(f"expression of {len(text)} characters: at most {_LONGEST_EXPRESSION} are allowed")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RecipeError(f"expression {text!r} does not parse: {error}") from None
    return _build(tree.body, text)


def evaluate(expression: int | str, names: Mapping[str, int]) -> int:
    """The value of ``expression`` under ``names``; an integer stands for itself.

    Raises:
        RecipeError: the text does not follow the grammar, uses an unknown name, or divides by zero.
    """
    if isinstance(expression, int):
        return expression
    return _compile(expression)(names)


@dataclass(frozen=True)
class TensorMapSpec:
    """What ``cuTensorMapEncodeTiled`` is given for one tensor map. Innermost dimension first, as in the driver's API.

    Attributes:
        dtype: element type: ``u8``, ``u16``, ``u32``, ``bf16``, ``f16``, ``f32``.
        sizes: of the tensor, in elements.
        strides: of dimensions 1…rank−1, in bytes (dimension 0 is contiguous).
        box: of one copy, in elements, at most 256 each.
        swizzle: ``none``, ``32B``, ``64B`` or ``128B``.
        l2_promotion: ``none``, ``64B``, ``128B`` or ``256B``.
    """

    dtype: str
    sizes: tuple[int | str, ...]
    strides: tuple[int | str, ...]
    box: tuple[int | str, ...]
    swizzle: str = "none"
    l2_promotion: str = "none"


#: kind → size and alignment in the parameter block, in bytes
PARAMETER_SIZES: Final = {"pointer": (8, 8), "u32": (4, 4), "u64": (8, 8), "tensor_map": (128, 64)}


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter, in the kernel's order.

    Attributes:
        name: as the kernel calls it; for messages.
        kind: ``pointer`` (to the tensor or workspace whose role is ``value``; 0 where an optional role is absent), ``u32`` or ``u64`` (the
            value of the expression ``value``, two's complement), or ``tensor_map`` (over the tensor whose role is ``value``).
        tensor_map: for kind ``tensor_map``.
    """

    name: str
    kind: str
    value: str
    tensor_map: TensorMapSpec | None = None

    def __post_init__(self) -> None:
        if self.kind not in PARAMETER_SIZES:
            raise RecipeError(f"parameter {self.name!r} has kind {self.kind!r}: use one of {', '.join(PARAMETER_SIZES)}")
        if (self.kind == "tensor_map") != (self.tensor_map is not None):
            raise RecipeError(f"parameter {self.name!r} of kind {self.kind!r}: a tensor_map is described exactly for kind tensor_map")


def pointer_or_null(name: str, role: str, present: bool) -> Parameter:
    """A pointer to ``role``, or a parameter that is always 0 where the variant has no such tensor."""
    return Parameter(name, "pointer", role) if present else Parameter(name, "u64", "0")


@dataclass(frozen=True)
class Workspace:
    """Device memory that a Plan owns for its kernel.

    Attributes:
        role: what a pointer parameter calls it, for example ``workspace.partials``.
        nbytes: expression, in bytes; 0 means that this problem needs none.
        zeroed: it must be zero before the first launch; the kernel leaves it zero after every launch.
    """

    role: str
    nbytes: int | str
    zeroed: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to launch one kernel.

    Attributes:
        parameters: in the kernel's order.
        grid: CTAs along x, y, z: expressions.
        block: threads along x, y, z.
        cluster: CTAs of a cluster along x, y, z.
        dynamic_smem: bytes of dynamic shared memory.
        let: (name, expression) pairs, evaluated in order before everything else.
        workspaces: device memory that the Plan owns.
        programmatic_launch: the kernel calls griddepcontrol and may be launched with programmatic stream serialisation.
        smem_carveout: percent of the L1 to prefer as shared memory (the driver attribute of that name); -1 leaves it to the
            driver, which may then give fewer CTAs an SM than the shared memory allows.
        settings: (name, allowed values) of the kernel's run-time tuning switches, the default first; expressions use them as names.
    """

    parameters: tuple[Parameter, ...]
    grid: tuple[int | str, int | str, int | str]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_smem: int = 0
    let: tuple[tuple[str, str], ...] = ()
    workspaces: tuple[Workspace, ...] = ()
    programmatic_launch: bool = False
    smem_carveout: int = -1
    settings: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def bind(self, names: Mapping[str, int]) -> dict[str, int]:
        """``names`` with the defaults of absent settings and the recipe's ``let`` names added.

        Raises:
            RecipeError: a setting has a value that is not allowed, or an expression is wrong.
        """
        bound = {**{name: allowed[0] for name, allowed in self.settings}, **names}
        if "sm_count" in bound and "resident_clusters" not in bound:
            bound["resident_clusters"] = bound["sm_count"] // math.prod(self.cluster)
        for name, allowed in self.settings:
            if bound[name] not in allowed:
                raise RecipeError(f"setting {name}={bound[name]}: use one of {', '.join(map(str, allowed))}")
        for name, expression in self.let:
            bound[name] = evaluate(expression, bound)
        return bound

    def offsets(self) -> tuple[tuple[int, int], ...]:
        """(offset, size) in bytes of every parameter: each aligned to its own size, as the PTX parameter space lays them out."""
        result: list[tuple[int, int]] = []
        end = 0
        for parameter in self.parameters:
            size, alignment = PARAMETER_SIZES[parameter.kind]
            start = -(-end // alignment) * alignment
            result.append((start, size))
            end = start + size
        return tuple(result)

    def check(self) -> None:
        """Parses every expression, so that a bad one is found when a manifest is read and not at a launch.

        Raises:
            RecipeError: the first expression that does not parse, or a field of a wrong type.
        """
        expressions: list[object] = [*self.grid, *(text for _, text in self.let), *(each.nbytes for each in self.workspaces)]
        for parameter in self.parameters:
            if parameter.kind in ("u32", "u64"):
                expressions.append(parameter.value)
            elif parameter.tensor_map is not None:
                expressions += [*parameter.tensor_map.sizes, *parameter.tensor_map.strides, *parameter.tensor_map.box]
        for expression in expressions:
            if isinstance(expression, str):
                _compile(expression)
            elif type(expression) is not int:
                raise RecipeError(f"expression {expression!r}: use an integer or a string")
        sizes = (*self.block, *self.cluster, self.dynamic_smem, self.smem_carveout)
        if len(self.block) != 3 or len(self.cluster) != 3 or any(type(size) is not int for size in sizes):
            raise RecipeError("block and cluster are three integers each, dynamic_smem and smem_carveout one")
        for name, allowed in self.settings:
            if type(name) is not str or not allowed or any(type(value) is not int for value in allowed):
                raise RecipeError(f"setting {name!r} with the values {allowed!r}: use a name and at least one integer")

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values, defaults left out."""
        document: dict[str, Any] = {"parameters": [_parameter_to_json(each) for each in self.parameters], "grid": list(self.grid)}
        document["block"] = list(self.block)
        if self.cluster != (1, 1, 1):
            document["cluster"] = list(self.cluster)
        if self.dynamic_smem:
            document["dynamic_smem"] = self.dynamic_smem
        if self.let:
            document["let"] = [list(pair) for pair in self.let]
        if self.workspaces:
            document["workspaces"] = [{"role": w.role, "nbytes": w.nbytes, "zeroed": w.zeroed} for w in self.workspaces]
        if self.programmatic_launch:
            document["programmatic_launch"] = True
        if self.smem_carveout != -1:
            document["smem_carveout"] = self.smem_carveout
        if self.settings:
            document["settings"] = [[name, list(allowed)] for name, allowed in self.settings]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_json`` wrote.

        Raises:
            RecipeError: a missing or wrong field; the manifest's schema check reports these with their path first.
        """
        try:
            return cls(
                parameters=tuple(_parameter_from_json(each) for each in document["parameters"]),
                grid=tuple(document["grid"]),
                block=tuple(document["block"]),
                cluster=tuple(document.get("cluster", (1, 1, 1))),
                dynamic_smem=document.get("dynamic_smem", 0),
                let=tuple((name, expression) for name, expression in document.get("let", ())),
                workspaces=tuple(Workspace(w["role"], w["nbytes"], w["zeroed"]) for w in document.get("workspaces", ())),
                programmatic_launch=document.get("programmatic_launch", False),
                smem_carveout=document.get("smem_carveout", -1),
                settings=tuple((name, tuple(allowed)) for name, allowed in document.get("settings", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"recipe is malformed: {error!r}") from None


def _parameter_to_json(parameter: Parameter) -> dict[str, Any]:
    document: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind, "value": parameter.value}
    spec = parameter.tensor_map
    if spec is not None:
        document["tensor_map"] = {
            "dtype": spec.dtype,
            "sizes": list(spec.sizes),
            "strides": list(spec.strides),
            "box": list(spec.box),
            "swizzle": spec.swizzle,
            "l2_promotion": spec.l2_promotion,
        }
    return document


def _parameter_from_json(document: Mapping[str, Any]) -> Parameter:
    spec = document.get("tensor_map")
    tensor_map = None
    if spec is not None:
        tensor_map = TensorMapSpec(
            spec["dtype"], tuple(spec["sizes"]), tuple(spec["strides"]), tuple(spec["box"]), spec["swizzle"], spec["l2_promotion"]
        )
    return Parameter(document["name"], document["kind"], document["value"], tensor_map)
