"""The choice of a layer's form and tile, and of a grouped op's variant: data of the selection table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from densemoe.compile import kernels
from densemoe.runtime.errors import ProblemError, SelectionError, VariantError
from densemoe.runtime.grouping import group_tile, sorts_itself
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.select import load_table, select
from densemoe.runtime.variant import Variant

TILES = (8, 16, 32, 48, 64, 96, 128, 160)
GROUPING: Any = load_table("sm_90a")["grouping"]


def variants(*keys: str) -> list[Variant]:
    return [Variant.parse(key) for key in keys]


@pytest.mark.parametrize(
    ("m", "top_k", "experts", "expected"),
    [(1, 8, 128, 0), (8, 8, 128, 0), (9, 8, 128, 8), (16, 2, 8, 8), (60, 8, 128, 8), (74, 8, 128, 8), (75, 8, 128, 16), (195, 8, 128, 16),
     (196, 8, 128, 32), (421, 8, 128, 32), (422, 8, 128, 48), (571, 8, 128, 48), (572, 8, 128, 64), (845, 8, 128, 64), (846, 8, 128, 96),
     (64, 2, 8, 32), (128, 2, 8, 48), (192, 2, 8, 64), (256, 2, 8, 96), (384, 2, 8, 128), (512, 2, 8, 160), (1024, 2, 8, 128)],
)  # fmt: skip
def test_tiles_follow_the_rows_of_an_expert(m: int, top_k: int, experts: int, expected: int) -> None:
    assert group_tile(GROUPING, TILES, m, top_k, experts) == expected


def test_a_set_without_the_tile_takes_the_nearest() -> None:
    assert group_tile(GROUPING, (8, 16), 4096, 8, 128) == 16
    assert group_tile(GROUPING, (32, 128), 96, 8, 128) == 32
    assert group_tile(GROUPING, (), 4096, 8, 128) == 0
    assert group_tile(None, TILES, 4096, 8, 128) == 0


@pytest.mark.parametrize(("m", "top_k", "expected"), [(1, 8, 8), (4, 8, 8), (5, 8, 0), (16, 2, 8), (17, 2, 0), (32, 1, 8), (0, 8, 8)])
def test_few_pairs_are_sorted_by_what_multiplies_them(m: int, top_k: int, expected: int) -> None:
    assert sorts_itself(GROUPING, (8,), m, top_k) == expected
    assert sorts_itself(GROUPING, (), m, top_k) == sorts_itself(None, (8,), m, top_k) == 0
    assert sorts_itself({name: value for name, value in GROUPING.items() if name != "sorts_to"}, (8,), m, top_k) == (8 if m == 0 else 0)


@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
def test_who_sorts_itself_is_chosen_by_problems_that_have_the_choice_alone(op: str) -> None:
    both = variants(*(f"{op}.sm90a.t8x64.c1x1.bf16-bf16{form}" for form in ("", ".routes")))
    problem = Problem(op, 4, 16, 256, 128, top_k=8, group_tile=8)
    sorting = replace(problem, routes=True, id_dtype="i64")
    assert select(problem, both, load_table("sm_90a")).variant.options == ()
    assert select(sorting, both, load_table("sm_90a")).variant.options == (("routes", 1),)
    with pytest.raises(SelectionError, match="it sorts the router's choice itself"):
        select(problem, both[1:], load_table("sm_90a"))
    with pytest.raises(SelectionError, match="it reads what `route` sorted, the problem has the router's choice"):
        select(sorting, both[:1], load_table("sm_90a"))
    with pytest.raises(SelectionError, match="33 pairs: it sorts up to 32 itself"):
        select(replace(sorting, m=33, top_k=1), both, load_table("sm_90a"))
    with pytest.raises(SelectionError, match="524289 experts: it sorts up to 524288 itself"):
        select(replace(sorting, experts=2**19 + 1), both, load_table("sm_90a"))


@pytest.mark.parametrize("id_dtype", ["i32", "i64"])
def test_a_problem_that_routes_has_the_router_s_choice_in_place_of_lists(id_dtype: str) -> None:
    first = Problem("groupedfc1", 3, 8, 256, 128, top_k=2, group_tile=8, routes=True, id_dtype=id_dtype)
    second = replace(first, op="groupedfc2")
    assert set(first.tensors()) == {"a", "ids", "alpha", "c"}
    assert set(second.tensors()) == {"a", "ids", "router", "w2_alpha", "c"}
    assert (first.tensors()["ids"].dtype, first.tensors()["ids"].shape) == (id_dtype, (3, 2))
    assert first.names()["id_bytes"] == (4 if id_dtype == "i32" else 8)


@pytest.mark.parametrize(("changes", "message"), [
    ({"op": "groupedfc2", "deterministic": True}, "where they may add in any order"),
    ({"group_tile": 32}, "the grouped ops of tiles below 32 rows"),
    ({"op": "fc1", "top_k": 0, "group_tile": 0}, "routes=True for fc1"),
    ({"id_dtype": ""}, "id_dtype='' with routes=True: i32 or i64 where True"),
    ({"routes": False}, "id_dtype='i32' with routes=False"),
])  # fmt: skip
def test_problems_that_cannot_route_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        replace(Problem("groupedfc1", 3, 8, 256, 128, top_k=2, group_tile=8, routes=True, id_dtype="i32"), **changes)


@pytest.mark.parametrize("key", ["groupedfc1.sm90a.t16x64.c1x1.bf16-bf16.routes", "groupedfc2.sm90a.t8x64.c1x1.bf16-bf16.deterministic.routes"])
def test_no_other_kernel_routes(key: str) -> None:
    variant = Variant.parse(key)
    with pytest.raises(VariantError, match=r"tiles of 8 rows|use one"):
        kernels.load(f"sm90_{variant.op}").check(variant)


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
def test_of_two_kernels_of_a_tile_the_one_that_was_faster_comes_first(op: str, tile: int) -> None:
    both = variants(*(f"{op}.sm90a.t{tile}x{n}.c1x1.bf16-bf16" for n in (64, 256)))
    choice = select(Problem(op, 64, 8, 256, 128, top_k=2, group_tile=tile), both, load_table("sm_90a"))
    assert (choice.variant.tile_n, choice.provenance) == (256, "measured")


@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
@pytest.mark.parametrize(("m", "first"), [(24, 64), (32, 64), (33, 256), (512, 256)])
def test_tiles_of_16_rows_have_256_weight_rows_from_40_tokens_on(op: str, m: int, first: int) -> None:
    both = variants(*(f"{op}.sm90a.t16x{n}.c1x1.bf16-bf16" for n in (64, 256)))
    assert select(Problem(op, m, 8, 256, 128, top_k=2, group_tile=16), both, load_table("sm_90a")).variant.tile_n == first


@pytest.mark.parametrize(("m", "rows"), [(32, 64), (64, 256)])
def test_the_form_in_one_order_is_chosen_as_the_other_by_problems_that_ask_for_it(m: int, rows: int) -> None:
    """By shape, bucket and width alike; nothing of it was measured for the table, and no variant serves both."""
    every = variants(*(f"groupedfc2.sm90a.t16x{n}.c1x1.bf16-bf16{form}" for n in (64, 256) for form in ("", ".deterministic")))
    problem = Problem("groupedfc2", m, 128, 2048, 768, top_k=8, group_tile=16)
    plain, ordered = (select(replace(problem, deterministic=each), every, load_table("sm_90a")) for each in (False, True))
    assert (plain.variant.tile_n, plain.variant.options) == (rows, ())
    assert (ordered.variant.tile_n, ordered.variant.options) == (rows, (("deterministic", 1),))
    assert (plain.provenance, ordered.provenance) == ("measured", "modelled")
    assert {no.reason for no in ordered.rejected if not no.variant.options} == {"it adds in any order, the problem wants one"}
    assert {no.reason for no in plain.rejected if no.variant.options} == {"it adds in one order, which the problem does not ask for"}
    with pytest.raises(SelectionError, match="the problem wants one"):
        select(replace(problem, deterministic=True), [plain.variant], load_table("sm_90a"))


@pytest.mark.parametrize("op", ["fc1", "fc2", "groupedfc1", "quantize", "prepare"])
def test_ops_that_have_one_order_anyway_are_asked_for_none(op: str) -> None:
    with pytest.raises(ProblemError, match="always give the same bits"):
        Problem(op, 4, 0 if op == "quantize" else 8, 256, 0 if op in ("quantize", "prepare") else 128, deterministic=True,
                a_dtype="i32" if op == "prepare" else "bf16", c_dtype={"prepare": "f32", "quantize": "nvfp4"}.get(op, "bf16"),
                top_k=2 if op in ("groupedfc1", "prepare") else 0, group_tile=16 if op == "groupedfc1" else 0)  # fmt: skip


def test_places_are_of_problems_in_one_order() -> None:
    problem = Problem("groupedfc2", 5, 8, 256, 128, top_k=3, group_tile=16)
    assert {"rows", "places"} & set(problem.tensors()) == {"rows"}
    assert {"rows", "places"} & set(replace(problem, deterministic=True).tensors()) == {"places"}
    route = Problem("route", 5, 8, 0, 0, "i32", "f32", top_k=3, group_tile=16, deterministic=True)
    assert route.tensors()["places"].shape == (5, 3)
    assert route.tensors()["places"].output


def test_the_other_kernel_of_a_tile_runs_where_the_first_lacks_the_dtypes() -> None:
    both = variants("groupedfc1.sm90a.t16x64.c1x1.bf16-bf16", "groupedfc1.sm90a.t16x256.c1x1.bf16-bf16", "groupedfc1.sm90a.t16x64.c1x1.bf16-f32")
    problem = Problem("groupedfc1", 64, 8, 256, 128, top_k=2, group_tile=16)
    plain = Problem("groupedfc1", 64, 8, 256, 128, "bf16", "f32", top_k=2, group_tile=16)
    assert select(plain, both, load_table("sm_90a")).variant.tile_n == 64
    assert select(problem, both[:1], load_table("sm_90a")).variant.tile_n == 64


@pytest.mark.parametrize("op", ["groupedfc1", "groupedfc2"])
def test_rows_in_k64_order_are_for_kernels_that_read_them(op: str) -> None:
    """Tiles of 32 rows and more: a kernel of 64 weight rows would read other columns than it believes."""
    both = variants(f"{op}.sm90a.t32x64.c1x1.bf16-bf16", f"{op}.sm90a.t32x256.c1x1.bf16-bf16")
    problem = Problem(op, 64, 8, 192, 320, top_k=2, group_tile=32)
    assert problem.tensors()["a.k64"].shape == ((64, 256) if op == "groupedfc1" else (128, 384))
    assert "a" not in problem.tensors()
    assert select(problem, both, load_table("sm_90a")).variant.tile_n == 256
    with pytest.raises(SelectionError, match="come in K 64 order, which kernels of 256 weight rows read"):
        select(problem, both[:1], load_table("sm_90a"))


@pytest.mark.parametrize("c_dtype", ["bf16", "nvfp4"])
def test_what_lies_between_the_ops_over_large_tiles_is_bf16_in_k64_order(c_dtype: str) -> None:
    sizes = (8, 4, 256, 192)
    first, second = Problem("groupedfc1", *sizes, "bf16", c_dtype, top_k=2, group_tile=32), Problem("groupedfc2", *sizes, top_k=2, group_tile=32)
    written, read = first.tensors()["c.k64"], second.tensors()["a.k64"]
    assert (written.shape, written.dtype) == (read.shape, read.dtype) == ((16, 256), "bf16")
    assert [role for role, spec in first.tensors().items() if spec.output] == ["c.k64"]


@pytest.mark.parametrize(("fields", "message"), [
    ({"op": "groupedfc1", "a_dtype": "nvfp4"}, r"a_dtype='nvfp4' for groupedfc1: use one of bf16"),
    ({"op": "groupedfc2", "a_dtype": "nvfp4"}, r"a_dtype='nvfp4' for groupedfc2: use one of bf16"),
    ({"op": "groupedfc1", "c_dtype": "f16"}, r"c_dtype='f16' for groupedfc1 over tiles of 48 rows: use bf16 or nvfp4, what FC2 reads"),
])  # fmt: skip
def test_other_dtypes_over_large_tiles_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Problem(m=8, experts=4, hidden=256, intermediate=192, top_k=2, group_tile=48, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["groupedfc1.sm90a.t32x256.c1x1.bf16-bf16", "groupedfc1.sm90a.t16x256.c1x1.bf16-bf16",
                                 "groupedfc1.sm90a.t48x256.c1x1.bf16-nvfp4", "groupedfc2.sm90a.t32x256.c1x1.bf16-bf16"])  # fmt: skip
def test_kernels_and_problems_agree_on_who_reads_and_writes_k64_order(key: str) -> None:
    (variant,) = variants(key)
    problem = Problem(variant.op, 8, 4, 256, 128, variant.a_dtype, variant.c_dtype, top_k=2, group_tile=variant.tile_m)
    roles = {each.value for each in kernels.load(f"sm90_wgmma_{variant.op}").recipe(variant).parameters if each.kind == "pointer"}
    assert ("a.k64" in roles) == problem.a_in_k64_order == ("a.k64" in problem.tensors())
    assert ("c.k64" in roles) == problem.c_in_k64_order == ("c.k64" in problem.tensors())


@pytest.mark.parametrize(("problem", "role"), [
    (Problem("groupedfc1", 8, 4, 256, 192, "bf16", "nvfp4", top_k=2, group_tile=16), "c"),
    (Problem("groupedfc1", 8, 4, 256, 192, "bf16", "nvfp4", top_k=2, group_tile=32), "c.k64"),
    (Problem("fc1", 8, 4, 256, 192, "bf16", "nvfp4", rounded=True), "c"),
    (Problem("fc1", 8, 4, 256, 192, "bf16", "nvfp4"), None),
])  # fmt: skip
def test_nvfp4_between_the_gemms_of_a_layer_is_bf16(problem: Problem, role: str | None) -> None:
    written = {name: spec.dtype for name, spec in problem.tensors().items() if spec.output}
    assert written == ({"c.codes": "u8", "c.scales": "u8"} if role is None else {role: "bf16"})
    assert problem.c_decoded == (role is not None)
    assert "output_multiplier" in problem.tensors()


def test_fc1_writes_what_its_problem_asks_for() -> None:
    both = variants("fc1.sm90a.t8x64.c1x1.bf16-nvfp4", "fc1.sm90a.t8x64.c1x1.bf16-nvfp4.rounded")
    codes = Problem("fc1", 8, 4, 256, 192, "bf16", "nvfp4")
    values = replace(codes, rounded=True)
    for problem, key, reason in (
        (codes, both[0].key, "it writes NVFP4 as bf16 values, the problem wants codes and scales"),
        (values, both[1].key, "it writes NVFP4 as codes and scales, the problem wants bf16 values"),
    ):
        found = select(problem, both, load_table("sm_90a"))
        assert found.variant.key == key
        assert [no.reason for no in found.rejected] == [reason]


@pytest.mark.parametrize("fields", [{"op": "fc1", "c_dtype": "bf16"}, {"op": "fc2"},
                                    {"op": "groupedfc1", "c_dtype": "nvfp4", "top_k": 2, "group_tile": 8}])  # fmt: skip
def test_only_nvfp4_of_fc1_is_asked_for_as_values(fields: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match="only FC1 with NVFP4 output has a choice"):
        Problem(m=8, experts=4, hidden=256, intermediate=192, rounded=True, **fields)


@pytest.mark.parametrize("op", ["prepare", "route"])
def test_activations_are_brought_by_kernels_that_do_so_alone(op: str) -> None:
    plain, brings = variants(f"{op}.sm90a.t32x4096.c1x1.i32-f32", f"{op}.sm90a.t32x4096.c1x1.i32-f32.brings")
    without = Problem(op, 4, 8, 0, 0, "i32", "f32", top_k=2, group_tile=8 if op == "route" else 0)
    some = replace(without, hidden=64, x_dtype="nvfp4")
    assert [can_implement(each, without)[1] for each in (plain, brings)] == ["", "it brings activations, the problem has none"]
    assert [can_implement(each, some)[1] for each in (plain, brings)] == ["it brings no activations, the problem has some", ""]


def test_a_tile_that_no_variant_has_is_refused() -> None:
    problem = Problem("groupedfc2", 64, 8, 256, 128, top_k=2, group_tile=48)
    with pytest.raises(SelectionError, match="its tiles have 16 rows, those of the problem 48"):
        select(problem, variants("groupedfc2.sm90a.t16x256.c1x1.bf16-bf16"), load_table("sm_90a"))


def test_activations_that_route_cannot_count_are_refused() -> None:
    (route,) = variants("route.sm90a.t32x4096.c1x1.i32-f32.brings")
    fits = Problem("route", 1 << 20, 16, 4096, 0, "i32", "f32", top_k=2, group_tile=32, x_dtype="bf16")
    assert can_implement(route, fits) == (True, "")
    accepted, reason = can_implement(route, replace(fits, hidden=1 << 17))
    assert not accepted
    assert "8589934592 groups of 16 activations: it counts up to 1073741823" in reason


@pytest.mark.parametrize(("op", "x_dtype", "rounded", "hidden"), [
    ("route", "f16", False, 64), ("prepare", "f32", False, 64), ("route", "bf16", False, 0), ("route", "nvfp4", False, 96),
    ("prepare", "nvfp4", True, 64), ("route", "", True, 0), ("prepare", "e4m3", False, 64),
])  # fmt: skip
def test_activations_that_cannot_be_brought_are_refused(op: str, x_dtype: str, rounded: bool, hidden: int) -> None:
    with pytest.raises(ProblemError, match=r"x_dtype|hidden"):
        Problem(op, 4, 8, hidden, 0, "i32", "f32", top_k=2, group_tile=32 if op == "route" else 0, x_dtype=x_dtype, x_rounded=rounded)


@pytest.mark.parametrize(("x_dtype", "rounded", "roles"), [("bf16", False, set()), ("nvfp4", False, {"x.scales"}), ("bf16", True, {"x.multiplier"}),
                                                           ("f16", True, {"x.multiplier"}), ("f32", True, {"x.multiplier"})])  # fmt: skip
@pytest.mark.parametrize(("op", "tile", "role", "width"), [("prepare", 0, "x.bf16", 320), ("route", 16, "x.bf16", 320), ("route", 32, "x.k64", 384)])
def test_what_is_brought_and_from_what(op: str, tile: int, role: str, width: int, x_dtype: str, rounded: bool, roles: set[str]) -> None:
    problem = Problem(op, 5, 8, 320, 0, "i32", "f32", top_k=2, group_tile=tile, x_dtype=x_dtype, x_rounded=rounded)
    own = {name: spec for name, spec in problem.tensors().items() if name.startswith("x")}
    assert own.keys() == {"x", role} | roles
    assert (own[role].dtype, own[role].shape, own[role].output) == ("bf16", (5, width), True)
