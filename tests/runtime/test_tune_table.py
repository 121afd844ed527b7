"""Cost model, fit, selection table and their quality, on synthetic times: formulas stand in for a device, nothing here is a measurement."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from densemoe.runtime.bench_timing import Sample
from densemoe.runtime.cost_model import Coefficients, KernelClass, predict, tiles_of_an_expert, waves, work_of
from densemoe.runtime.errors import SelectionError
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import load_table, select
from densemoe.runtime.tune import Candidate, Measurement
from densemoe.runtime.tune_cases import (
    HELD_OUT,
    MODELS,
    TUNE_TOKENS,
    Case,
    Shape,
    active_experts,
    cliffs,
    falls,
    flops,
    in_order,
    parse_shapes,
    roofline,
    route_tokens,
    worth_a_tile,
)
from densemoe.runtime.tune_fit import fit, fit_class, held_out_regret
from densemoe.runtime.tune_grouping import LayerPoint, grouping_of, held_out_forms, layer_points, layer_regret
from densemoe.runtime.tune_table import between_regret, build, choose, interpolated, write
from densemoe.runtime.variant import Variant

SMS = 132
#: Made up: a small tile that decodes for every 8 tokens, a large one with a long tail and waves.
TRUE = {
    8: Coefficients(3.0, 0.24, 0.13, 0.3),
    16: Coefficients(3.0, 0.24, 0.17, 0.3),
    32: Coefficients(3.5, 0.25, 0.24, 0.3, 8),
}
PROVENANCE = {
    "arch": "sm_90a",
    "sm_count": SMS,
    "read_bytes_per_second": 4.3e12,
    "device": "Simulated",
    "cuda_driver": "13.0",
    "date": "2026-01-01",
    "set_sha256": "0" * 64,
}


def key_of(op: str, tile: int, a_dtype: str = "bf16", c_dtype: str = "bf16") -> str:
    return f"{op}.sm90a.t{tile}x64.c1x1.{a_dtype}-{c_dtype}"


def measured(case: Case, tile: int, microseconds: float) -> Measurement:
    sample = Sample(microseconds, microseconds * 0.995, microseconds * 1.005, 9, 8)
    return Measurement(case, Candidate(key_of(case.op, tile, case.a_dtype, case.c_dtype)), sample, True, 0.1, 1 << 27, 2)


def synthetic(noise: float = 0.005, shapes: tuple[Shape, ...] = parse_shapes(MODELS), active: bool = False) -> list[Measurement]:
    rng, found = random.Random(3), []
    for shape in shapes:
        for op in ("fc1", "fc2"):
            for m in TUNE_TOKENS:
                case = Case(op, shape, m, "bf16", "bf16", active)
                for tile, true in TRUE.items():
                    kernel = KernelClass.of(Variant.parse(key_of(op, tile)), {}, active)
                    found.append(measured(case, tile, predict(case.problem(), kernel, true, SMS, shape.top_k) * rng.gauss(1, noise)))
    return found


# ---- cases


def test_models_are_what_a_rank_holds() -> None:
    found = {each.name: (each.experts, each.top_k, each.hidden, each.intermediate) for each in parse_shapes([*MODELS, "8x2x512x128"])}
    assert found["deepseek-v3:tp8"] == (256, 8, 7168, 256)
    assert found["mixtral-8x7b:tp8"] == (8, 2, 4096, 1792)
    assert found["8x2x512x128"] == (8, 2, 512, 128)
    assert parse_shapes(["deepseek-v3:ep8"])[0].top_k == 1
    assert {each.name for each in parse_shapes(MODELS)}.isdisjoint(each.name for each in parse_shapes(HELD_OUT))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nosuch", "no known model"),
        ("deepseek-v3:tp7", "over tensor parallelism 7"),
        ("deepseek-v3:xx", "ExKxHxI"),
        ("8x9x512x128", "top_k 9 of 8 experts"),
        ("8x2x500x128", "multiple of 64"),
        ("gpt-oss-120b", "cannot run"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        parse_shapes([text])


def test_coarse_token_counts_come_first() -> None:
    ordered = in_order(TUNE_TOKENS)
    assert sorted(ordered) == list(TUNE_TOKENS)
    assert ordered[:3] == [1, 512, 64]
    assert in_order([8]) == [8]


def test_routing_is_distinct_a_prefix_and_uniform_enough() -> None:
    shape = Shape("", 32, 4, 64, 64)
    many = route_tokens(shape, 400)
    assert route_tokens(shape, 5) == many[:5]
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 32 for row in many)
    counts = [sum(expert in row for row in many) for expert in range(32)]
    assert 20 < min(counts) <= max(counts) < 90
    found = sum(len({expert for row in route_tokens(shape, 8, seed) for expert in row}) for seed in range(200)) / 200
    assert found == pytest.approx(active_experts(32, 4, 8), rel=0.03)


def test_the_roofline_is_the_larger_of_bytes_and_operations() -> None:
    case = Case("fc1", Shape("", 8, 2, 4096, 1792), 64, "bf16", "bf16")
    assert flops(case) == 2 * 64 * 8 * 2 * 4096 * 1792
    assert flops(replace(case, active=True)) == flops(case) / 4
    assert roofline(4.3e6, 0, 4.3e12, 650e12) == pytest.approx(1)
    assert roofline(0, 650e6, 4.3e12, 650e12) == pytest.approx(1)


def test_cliffs_and_falls_are_found() -> None:
    line = {8: 10.0, 16: 10.0, 24: 10.0}
    assert cliffs({8: 11.0, 16: 12.6, 24: 12.6}, line) == []
    (cliff,) = cliffs({8: 11.0, 16: 12.7, 24: 12.6}, line)
    assert (cliff.m, cliff.next_m, round(cliff.change, 3)) == (8, 16, 0.155)
    assert cliffs({8: 11.0, 16: 22.0}, {8: 10.0, 16: 20.0}) == []
    assert falls({8: 10.0, 16: 9.85, 24: 12.0}) == []
    (fall,) = falls({8: 10.0, 16: 9.7, 24: 12.0})
    assert (fall.m, fall.next_m) == (8, 16)
    assert falls({8: 10.0, 16: 9.7}, {8: 0.0, 16: 0.08}) == []
    assert falls({8: 10.0}) == []


# ---- cost model


def test_work_counts_passes_waves_and_active_experts() -> None:
    dense = Problem("fc1", 24, 256, 7168, 256)
    work = work_of(dense, (16, 64))
    assert work.weights == pytest.approx(256 * 512 * 7168 * 4.5 / 8 / 1e6)
    assert work.decoded == pytest.approx(2 * work.weights)
    assert work.tiles == 256 * 512 / 64 * 2
    few = work_of(replace(dense, m=1, active_list=True), (16, 64), top_k=8)
    assert few.weights == pytest.approx(work.weights * 8 / 256)
    gathered = work_of(replace(dense, active_list=True), (8, 64), gathered=True, top_k=8)
    assert gathered.decoded == pytest.approx(gathered.weights)
    assert waves(100, 0) == 1
    assert waves(100, 64) == pytest.approx(1.28)
    assert waves(128, 64) == 1


def test_a_fit_finds_the_coefficients_that_made_the_times() -> None:
    found = fit(synthetic(noise=0.0), SMS)
    for tile, true in TRUE.items():
        own = found[KernelClass.of(Variant.parse(key_of("fc1", tile)), {}, False)]
        assert own.points == len(MODELS) * len(TUNE_TOKENS)
        assert own.worst < 0.03, own
        assert own.coefficients.slots_per_sm == true.slots_per_sm
        assert own.coefficients.launch == pytest.approx(true.launch, rel=0.2)


def test_a_fit_finds_what_each_token_costs() -> None:
    true = replace(TRUE[8], token=0.05)
    kernel = KernelClass.of(Variant.parse(key_of("fc2", 8)), {}, False)
    cases = [Case("fc2", shape, m, "bf16", "bf16", False) for shape in parse_shapes(MODELS) for m in TUNE_TOKENS]
    own = fit_class(kernel, [measured(case, 8, predict(case.problem(), kernel, true, SMS, case.shape.top_k)) for case in cases], SMS)
    assert own is not None
    assert own.worst < 0.03, own
    assert own.coefficients.token == pytest.approx(0.05, rel=0.2)


def test_no_kernel_reads_much_slower_than_the_one_that_only_reads() -> None:
    """One shape at 1 to 7 tokens tells nothing of a launch's fixed part and its reading but their sum: all of it might be reading."""
    kernel = KernelClass.of(Variant.parse(key_of("fc1", 8)), {}, False)
    shape = Shape("", 8, 2, 2048, 896)
    cases = [Case("fc1", shape, m, "bf16", "bf16", False) for m in range(1, 8)]
    megabytes = work_of(cases[0].problem(), (8, 64)).weights
    points = [measured(case, 8, 8 + 0.22 * megabytes) for case in cases]
    unbounded, bounded = fit_class(kernel, points, SMS), fit_class(kernel, points, SMS, 0.22)
    assert unbounded is not None
    assert unbounded.coefficients.stream > 1.15 * 0.22
    assert bounded is not None
    assert bounded.coefficients.stream <= 1.15 * 0.22
    assert bounded.worst < 0.01
    impossible = fit_class(kernel, [measured(case, 8, 100 * megabytes) for case in cases], SMS, 1e-9)
    assert impossible is not None  # nothing is as fast: the best there is


def test_a_fit_has_no_negative_coefficient_and_needs_points() -> None:
    few = [each for each in synthetic() if each.case.m <= 16 and ".t8x" in each.candidate.key and each.case.op == "fc1"]
    kernel = KernelClass.of(Variant.parse(key_of("fc1", 8)), {}, False)
    assert fit_class(kernel, few[:4], SMS) is None
    falling = [measured(each.case, 8, 100 / each.case.m) for each in few]
    found = fit_class(kernel, falling, SMS)
    assert found is not None
    own = found.coefficients
    assert min(own.launch, own.stream, own.decode, own.move, own.token) >= 0


def test_what_failed_is_not_fitted_or_chosen() -> None:
    every = synthetic()
    lied = [replace(each, passed=False, sample=Sample(0.1, 0.1, 0.1, 9, 8)) if ".t8x" in each.candidate.key else each for each in every]
    assert not any(kernel.tile[0] == 8 for kernel in fit(lied, SMS))
    table = build(lied, PROVENANCE, load_table("sm_90a"))
    assert not any(".t8x" in key for key, _ in table["keys"])


@pytest.mark.parametrize("active", [False, True])
def test_held_out_shapes_are_chosen_for_within_the_bar(active: bool) -> None:
    found = held_out_regret(synthetic(noise=0.01, shapes=parse_shapes([*MODELS, *HELD_OUT]), active=active), SMS)
    assert found.cases == 10 * 2 * len(TUNE_TOKENS)
    assert found.geomean <= 0.03, found
    assert found.worst <= 0.10, found


def test_regret_is_seen_where_the_times_follow_no_formula() -> None:
    rng = random.Random(1)
    chaos = [replace(each, sample=Sample(*[rng.uniform(10, 100)] * 3, 9, 8)) for each in synthetic()]
    assert held_out_regret(chaos, SMS).geomean > 0.1
    assert between_regret(chaos, SMS).geomean > 0.1
    assert held_out_regret([each for each in chaos if each.case.shape.name == MODELS[0]], SMS).cases == 0


def test_tiles_of_an_expert_are_the_mean_over_poisson() -> None:
    rng = np.random.default_rng(5)
    for mean, tile in ((0.3, 8), (6.0, 8), (30.0, 16), (700.0, 32)):
        drawn = np.ceil(rng.poisson(mean, 40000) / tile).mean()
        assert tiles_of_an_expert(mean, tile) == pytest.approx(drawn, rel=0.03)
    assert tiles_of_an_expert(0.0, 8) == 0


def test_work_of_a_grouped_op_follows_its_tokens() -> None:
    one = Problem("groupedfc1", 64, 256, 7168, 256, top_k=8, group_tile=8)
    work = work_of(one, (8, 64))
    listed = work_of(Problem("fc1", 64, 256, 7168, 256, active_list=True), (8, 64), top_k=8)
    assert work.weights == pytest.approx(listed.weights)
    per_expert = 2 * 256 * 7168 * 4.5 / 8 / 1e6
    assert work.decoded == pytest.approx(256 * per_expert * tiles_of_an_expert(2.0, 8))
    assert work.decoded < 1.01 * work.weights < listed.decoded
    two = work_of(replace(one, op="groupedfc2"), (8, 64))
    assert two.weights == pytest.approx(work.weights / 2)
    assert two.moved == pytest.approx((64 * 8 * 256 + 64 * 7168) * 2 / 1e6)


def grouped_synthetic() -> list[Measurement]:
    """Listed forms as TRUE says, grouped ones with a launch more, by tiles of an expert."""
    found = synthetic(active=True)
    for shape in parse_shapes(MODELS):
        for op in ("fc1", "fc2"):
            for m in TUNE_TOKENS:
                for tile in (8, 16, 32, 64, 128):
                    case = Case(f"grouped{op}", shape, m, "bf16", "bf16", False, tile)
                    if worth_a_tile(shape, m, tile):
                        work = work_of(case.problem(), (tile, 64))
                        found.append(measured(case, tile, 4.5 + max(0.24 * work.weights, (0.1 + 0.004 * tile) * work.decoded)))
    return found


def test_form_and_tile_of_least_regret_are_found() -> None:
    points = layer_points(grouped_synthetic())
    assert len(points) == len(MODELS) * len(TUNE_TOKENS)
    found = grouping_of(points)
    assert found is not None
    tiles = [each["tile_m"] for each in found["tiles"]]
    assert tiles == sorted(set(tiles))
    assert len(tiles) >= 3
    shares = [each["share_to"] for each in found["tiles"][:-1]]
    assert shares == sorted(shares)
    assert "share_to" not in found["tiles"][-1]
    best = layer_regret(points, found)
    assert best.geomean <= 0.03, best
    for other in (
        {**found, "dense_to": 10**6},
        {**found, "dense_to": 0},
        {**found, "tiles": [{"tile_m": 128}]},
        {**found, "tiles": found["tiles"][:-2] + found["tiles"][-1:]},
    ):
        assert layer_regret(points, other).geomean >= best.geomean
    assert held_out_forms(points).geomean <= 0.05
    assert grouping_of([]) is None


def test_a_form_that_is_never_faster_is_not_taken() -> None:
    shape = Shape("", 8, 2, 512, 256)
    slow = [LayerPoint(shape, m, 10.0, {8: 20.0, 16: 18.0 if m > 8 else 30.0}) for m in (8, 64, 512)]
    found = grouping_of(slow)
    assert found is not None
    assert found["dense_to"] == 512
    assert layer_regret(slow, found).worst == 0
    fast = [replace(each, listed=100.0) for each in slow]
    found = grouping_of(fast)
    assert found is not None
    border = 2 * 8 ** (math.log(30 / 20) / (math.log(30 / 20) + math.log(20 / 18)))  # between shares of 2 and 16
    assert (found["dense_to"], found["tiles"]) == (0, [{"share_to": round(border, 3), "tile_m": 8}, {"tile_m": 16}])


def test_a_border_lies_where_both_tiles_would_be_as_fast() -> None:
    """Measured at shares of 4 and 16: 8 rows a tenth faster at 4, three times as far behind at 16, as logarithms go; so a quarter of the way."""
    shape = Shape("", 8, 2, 512, 256)
    slope = 1.1
    points = [LayerPoint(shape, 16, 99.0, {8: 1.0, 16: slope}), LayerPoint(shape, 64, 99.0, {8: slope**3, 16: 1.0})]
    found = grouping_of(points)
    assert found is not None
    assert found["tiles"] == [{"share_to": round(4 * 4 ** (1 / 4), 3), "tile_m": 8}, {"tile_m": 16}]
    alone = [LayerPoint(shape, 16, 99.0, {8: 1.0}), LayerPoint(shape, 64, 99.0, {16: 1.0})]
    found = grouping_of(alone)
    assert found is not None
    assert found["tiles"][0]["share_to"] == 8.0  # nothing to compare: half-way


def test_beyond_the_shares_that_were_measured_a_tile_holds_two_deviations_more_than_the_mean() -> None:
    """Tiles of 16 were fastest at a share of 16; larger ones were measured at one token alone. 32 rows hold 22.5 + 2 · 22.5 ** 0.5."""
    shape = Shape("", 8, 2, 512, 256)
    points = [LayerPoint(shape, 4, 99.0, {16: 1.0, 32: 2.0, 64: 3.0}), LayerPoint(shape, 64, 99.0, {16: 1.0, 32: 2.0})]
    found = grouping_of(points)
    assert found is not None
    shares = [each.get("share_to") for each in found["tiles"]]
    assert [each["tile_m"] for each in found["tiles"]] == [16, 32, 64]
    assert shares[0] == 16.0
    assert shares[1] + 2 * math.sqrt(shares[1]) == pytest.approx(32, abs=0.01)
    assert shares[2] is None


def test_the_table_takes_the_measured_form_and_family() -> None:
    every = grouped_synthetic()
    wide = []
    for each in every:
        if each.case.group_tile >= 16 and each.case.m >= 64 and each.sample is not None:
            candidate = Candidate(each.candidate.key.replace("x64.", "x256."))
            wide.append(replace(each, candidate=candidate, sample=Sample(*[each.sample.microseconds * 0.8] * 3, 9, 8)))
    table = build([*every, *wide], PROVENANCE, load_table("sm_90a"))
    jsonschema.validate(json.loads(json.dumps(table)), SCHEMA)
    assert table["grouping"]["provenance"] == "measured"
    assert table["grouping"]["sorts_to"] == load_table("sm_90a")["grouping"]["sorts_to"]
    assert table["quality"]["forms"]["cases"] == len(MODELS) * len(TUNE_TOKENS)
    assert table["quality"]["forms_other_shapes"]["cases"] == len(MODELS) * len(TUNE_TOKENS)
    variants = [Variant.parse(key) for key, _ in table["keys"] if key.startswith("groupedfc1")]
    shape = parse_shapes(MODELS)[1]
    for m, width in ((32, 64), (512, 256)):
        problem = Problem("groupedfc1", m, shape.experts, shape.hidden, shape.intermediate, top_k=shape.top_k, group_tile=16)
        choice = select(problem, variants, table)
        assert (choice.variant.tile_n, choice.provenance) == (width, "measured")
    other = Problem("groupedfc2", 100, 64, 1024, 320, top_k=4, group_tile=8)
    assert "the cost model" in select(other, [Variant.parse(key_of("groupedfc2", 8))], table).reason
    assert build(synthetic(), PROVENANCE, load_table("sm_90a"))["grouping"] == load_table("sm_90a")["grouping"]


# ---- table


def test_between_measured_buckets_times_are_interpolated() -> None:
    a, b, c = (Candidate(key_of("fc1", tile)) for tile in (8, 16, 32))
    times = {8: {a: 10.0, b: 20.0, c: 30.0}, 128: {a: 160.0, b: 40.0}}  # c was not measured at 128
    assert interpolated(times, 32)[a] == pytest.approx(40)
    assert interpolated(times, 32)[b] == pytest.approx(20 * 2**0.5)
    assert c not in interpolated(times, 32)
    assert interpolated(times, 128) == times[128]
    rows = choose(times)
    assert [end for end, _, _ in rows] == [*range(8, 129, 8)]
    assert [each for _, each, _ in rows][:2] == [a, a]
    assert {each for end, each, _ in rows if end >= 32} == {b}
    assert [measured for _, _, measured in rows] == [True, *[False] * 14, True]


def test_interpolation_follows_the_steps_that_the_cost_model_knows() -> None:
    a = Candidate(key_of("fc1", 8))

    def steps(candidate: Candidate, m: int) -> float | None:
        return 10.0 * -(-m // 8)

    assert interpolated({8: {a: 11.0}, 24: {a: 36.0}}, 16, steps)[a] == pytest.approx(20 * 1.1 * (1.2 / 1.1) ** (1 - 0.36907), rel=1e-4)
    assert interpolated({8: {a: 11.0}, 24: {a: 36.0}}, 16, lambda candidate, m: None)[a] == interpolated({8: {a: 11.0}, 24: {a: 36.0}}, 16)[a]


def test_buckets_held_out_are_chosen_for_within_the_bar() -> None:
    found = between_regret(synthetic(noise=0.01), SMS)
    assert found.cases == len(MODELS) * 2 * (len(TUNE_TOKENS) - 2)
    assert found.geomean <= 0.03, found
    assert found.worst <= 0.10, found


def test_a_variant_stays_while_it_is_as_fast() -> None:
    a, b = (Candidate(key_of("fc1", tile)) for tile in (8, 16))
    assert {each for _, each, _ in choose({8: {a: 10, b: 11}, 16: {a: 10.05, b: 10.0}})} == {a}
    assert choose({8: {a: 10, b: 11}, 16: {a: 10.2, b: 10.0}})[-1][1] == b


def test_all_of_the_first_bucket_is_judged_together() -> None:
    a, b = (Candidate(key_of("fc1", tile)) for tile in (8, 16))
    assert choose({1: {a: 10, b: 11}, 8: {a: 20, b: 19.9}})[0][1] == a


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return build([*synthetic(), *synthetic(active=True)], PROVENANCE, load_table("sm_90a"))


VARIANTS = tuple(Variant.parse(key_of(op, tile, a, c)) for op in ("fc1", "fc2") for tile in TRUE for a, c in (("bf16", "bf16"), ("bf16", "f16")))


def true_times(problem: Problem) -> dict[str, float]:
    found = {}
    for tile, true in TRUE.items():
        variant = Variant.parse(key_of(problem.op, tile, problem.a_dtype, problem.c_dtype))
        found[variant.key] = predict(problem, KernelClass.of(variant, {}, problem.active_list), true, SMS)
    return found


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_a_measured_shape_gets_its_own_row(table: Mapping[str, Any], op: str, active: bool) -> None:
    for m in (8, 16, 32, 64, 512):
        problem = Problem(op, m, 256, 7168, 256, active_list=active)
        choice = select(problem, VARIANTS, table)
        times = true_times(problem)
        assert times[choice.variant.key] <= min(times.values()) * 1.03
        assert choice.provenance == "measured"
        assert "the shape's row: the fastest there" in choice.reason
    for m in (40, 100, 1000):
        assert select(Problem(op, m, 256, 7168, 256, active_list=active), VARIANTS, table).provenance == "modelled"


def test_other_shapes_and_dtypes_get_what_the_model_says(table: Mapping[str, Any]) -> None:
    for op, m, c_dtype, shape in (("fc1", 24, "bf16", (64, 2048, 1408)), ("fc2", 70, "bf16", (33, 1024, 320)), ("fc1", 16, "f16", (256, 7168, 256))):
        problem = Problem(op, m, *shape, "bf16", c_dtype)
        choice = select(problem, VARIANTS, table)
        assert choice.provenance == "modelled"
        assert "the cost model: the fastest by the cost model" in choice.reason
        times = true_times(problem)
        assert times[choice.variant.key] <= min(times.values()) * 1.1


def test_what_was_never_measured_follows_the_rules(table: Mapping[str, Any]) -> None:
    variants = [Variant.parse(key_of("fc1", tile, "nvfp4", "nvfp4")) for tile in TRUE]
    assert select(Problem("fc1", 5, 256, 7168, 256, "nvfp4", "nvfp4"), variants, table).reason.startswith("rule 0")


def test_a_row_whose_variant_is_not_installed_is_an_error_and_no_fallback(table: Mapping[str, Any]) -> None:
    few = [each for each in VARIANTS if each.tile_m == 8]
    for shape in ((256, 7168, 256), (64, 2048, 1408)):
        with pytest.raises(SelectionError, match=r"wants tile (16|32)x64 for fc1 at M = 512, which no installed variant has"):
            select(Problem("fc1", 512, *shape), few, table)


def test_all_of_a_bucket_gets_the_same(table: Mapping[str, Any]) -> None:
    for shape in ((256, 7168, 256), (64, 2048, 1408)):
        for first in (1, 9, 65, 129, 257):
            keys = {select(Problem("fc1", m, *shape), VARIANTS, table).variant.key for m in range(first, first + 8)}
            assert len(keys) == 1


def test_settings_of_a_row_reach_the_choice() -> None:
    shape = Shape("", 8, 2, 512, 256)
    case = Case("fc2", shape, 8, "bf16", "bf16")
    slow, fast = measured(case, 8, 20.0), measured(case, 8, 10.0)
    fast = replace(fast, candidate=Candidate(fast.candidate.key, (("splits", 2),)))
    found = build([slow, fast], PROVENANCE, load_table("sm_90a"))
    assert select(case.problem(), VARIANTS, found).settings == {"splits": 2}


def test_a_table_says_how_good_it_is(table: Mapping[str, Any], tmp_path: Path) -> None:
    quality = table["quality"]
    assert quality["other_shapes"]["cases"] > 0
    assert quality["other_shapes"]["worst"] <= 0.10
    assert quality["between_buckets"]["cases"] > 0
    assert quality["cliffs"]["count"] > 0  # 16 to 24 tokens: a second pass, where the roofline does not rise
    assert quality["cliffs"]["worst"]["change"] > 0.15
    assert quality["falls"] == {"count": 0, "worst": None}
    write(tmp_path / "sm_90a.json", table)
    text = (tmp_path / "sm_90a.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(table))
    assert max(len(line) for line in text.splitlines()) < 4000


SCHEMA = json.loads(resources.files("densemoe.artifacts").joinpath("schema").joinpath("selection.schema.json").read_text())


def test_tables_follow_their_schema(table: Mapping[str, Any]) -> None:
    jsonschema.validate(json.loads(json.dumps(table)), SCHEMA)
    for path in resources.files("densemoe.artifacts").joinpath("selection").iterdir():
        jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    for broken in ({"rules": 3}, {"shapes": {"fc1": [[8]]}}, {"model": {"classes": []}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**json.loads(json.dumps(table)), **broken}, SCHEMA)
