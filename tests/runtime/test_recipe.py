"""Launch recipes: expressions, parameter layout, packing."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densemoe.runtime.errors import RecipeError
from densemoe.runtime.plan import pack
from densemoe.runtime.recipe import Parameter, Recipe, TensorMapSpec, Workspace, evaluate, pointer_or_null


@given(st.integers(-(2**40), 2**40), st.integers(1, 2**20))
def test_expressions_agree_with_python(a: int, b: int) -> None:
    names = {"a": a, "b": b}
    assert evaluate("a + b * 2 - a // b", names) == a + b * 2 - a // b
    assert evaluate("ceil_div(a, b)", names) == -(-a // b)
    assert evaluate("min(a, b, 7) if a > b else max(a, b)", names) == (min(a, b, 7) if a > b else max(a, b))
    assert evaluate("a % b == 0", names) == int(a % b == 0)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "a.b",
        "a[0]",
        "'x' * 9",
        "a ** 9",
        "a << 99",
        "lambda: 1",
        "[1 for _ in a]",
        "1.5",
        "True",
        "min(1)",
        "ceil_div(1, 2, 3)",
        "a and b",
        "(" * 500 + "1" + ")" * 500,
        "1 +",
        "a" * 2000,
    ],
)
def test_nothing_else_parses(text: str) -> None:
    with pytest.raises(RecipeError):
        evaluate(text, {"a": 1, "b": 2})


def test_unknown_names_and_zero_division_say_so() -> None:
    with pytest.raises(RecipeError, match="the names are M"):
        evaluate("N", {"M": 1})
    with pytest.raises(RecipeError, match="divides by zero"):
        evaluate("1 // M", {"M": 0})


RECIPE = Recipe(
    parameters=(
        Parameter("a", "pointer", "a"),
        Parameter("m", "u32", "M"),
        Parameter("map", "tensor_map", "b", TensorMapSpec("u8", ("K", "M"), ("K",), (128, 8), "128B")),
        Parameter("big", "u64", "M * K"),
        pointer_or_null("none", "x", False),
    ),
    grid=("ceil_div(M, tile)", 2, 1),
    block=(128, 1, 1),
    cluster=(2, 1, 1),
    dynamic_smem=1024,
    let=(("tile", "8"),),
    workspaces=(Workspace("workspace.w", "M * 4", True),),
    programmatic_launch=True,
    smem_carveout=100,
)


def test_offsets_follow_natural_alignment() -> None:
    assert RECIPE.offsets() == ((0, 8), (8, 4), (64, 128), (192, 8), (200, 8))


def test_json_round_trips() -> None:
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE


def test_pack_fills_every_parameter() -> None:
    seen = []

    def encode(*arguments: object) -> bytes:
        seen.append(arguments)
        return b"\xaa" * 128

    packed = pack(RECIPE, {"M": 9, "K": 256}, {"a": 0x1122334455667788, "b": 4096}, encode)
    assert packed.grid == (2, 2, 1)
    assert seen == [(4096, "u8", (256, 9), (256,), (128, 8), "128B", "none")]
    assert struct.unpack_from("<QI", packed.parameters, 0) == (0x1122334455667788, 9)
    assert packed.parameters[64:192] == b"\xaa" * 128
    assert struct.unpack_from("<QQ", packed.parameters, 192) == (9 * 256, 0)


def test_pack_refuses_what_does_not_fit() -> None:
    def one(expression: str, grid: int | str = 1) -> Recipe:
        return Recipe((Parameter("m", "u32", expression),), (grid, 1, 1), (32, 1, 1))

    with pytest.raises(RecipeError, match="4 bytes"):
        pack(one("M"), {"M": 1 << 32}, {})
    assert pack(one("M"), {"M": -1}, {}).parameters == b"\xff" * 4
    with pytest.raises(RecipeError, match="grid"):
        pack(one("M", "M - 1"), {"M": 1}, {})
    with pytest.raises(RecipeError, match="needs the tensor 'a'"):
        pack(RECIPE, {"M": 1, "K": 1}, {"b": 1})
    with pytest.raises(RecipeError, match="encoder"):
        pack(RECIPE, {"M": 1, "K": 1}, {"a": 1, "b": 1})
