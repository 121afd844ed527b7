"""Selection: buckets, a pure function of its arguments, a variant for every shape that the rules allow, forcing, tables that are wrong."""

from __future__ import annotations

import copy
import itertools
import json
import random
from importlib import resources
from typing import Any

import pytest

from densemoe.compile import matrix
from densemoe.runtime.errors import SelectionError, VariantError
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.select import bucket, load_table, select
from densemoe.runtime.variant import ARCHITECTURES, Variant

VARIANTS = tuple(each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_90a")
TABLE = load_table("sm_90a")


def test_buckets_end_at_multiples_of_8_to_128_and_of_128_above() -> None:
    ends = sorted({bucket(m) for m in range(1025)})
    assert ends == [0, *range(8, 129, 8), *range(256, 1025, 128)]
    for m in range(1025):
        assert bucket(m) >= m
        assert bucket(m) - m < (8 if m <= 128 else 128)
        assert bucket(bucket(m)) == bucket(m)


@pytest.mark.parametrize(
    ("m", "end"), [(0, 0), (1, 8), (8, 8), (9, 16), (72, 72), (128, 128), (129, 256), (256, 256), (257, 384), (2**31 - 1, 2**31 - 1)]
)
def test_edges_of_buckets(m: int, end: int) -> None:
    assert bucket(m) == end


def problems() -> list[Problem]:
    rng = random.Random(5)
    found = []
    for op, a_dtype in itertools.product(("fc1", "fc2"), ("bf16", "nvfp4")):
        for c_dtype in ("nvfp4", "bf16", "f16", "f32")[op == "fc2" :]:
            for m in (0, 1, 8, 9, 24, 127, 128, 129, 600, 2**20):
                experts, hidden, intermediate = rng.choice((1, 3, 128, 257)), 64 * rng.randint(1, 120), 64 * rng.randint(1, 40)
                switch = bool(rng.getrandbits(1))
                switches = (switch and op == "fc1", switch and op == "fc2")
                found.append(Problem(op, m, experts, hidden, intermediate, a_dtype, c_dtype, *switches))
    return found


@pytest.mark.parametrize("problem", problems(), ids=lambda p: f"{p.op}-{p.a_dtype}-{p.c_dtype}-{p.m}")
def test_every_legal_shape_on_sm_90a_has_a_variant_that_can_run_it(problem: Problem) -> None:
    choice = select(problem, VARIANTS, TABLE)
    assert can_implement(choice.variant, problem) == (True, "")
    assert choice.bucket == bucket(problem.m)
    assert choice.provenance in ("measured", "modelled")
    assert sorted([choice.variant.key, *(each.variant.key for each in choice.rejected)]) == sorted(each.key for each in VARIANTS)
    assert all(each.reason for each in choice.rejected)


def test_every_m_of_a_bucket_gets_the_same_variant() -> None:
    chosen: dict[int, set[str]] = {}
    for m in range(1, 400):
        choice = select(Problem("fc1", m, 8, 256, 256), VARIANTS, TABLE)
        chosen.setdefault(choice.bucket, set()).add(choice.variant.key)
    assert all(len(keys) == 1 for keys in chosen.values())
    assert len({key for keys in chosen.values() for key in keys}) > 1


def test_selection_depends_on_nothing_but_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, table = Problem("fc2", 37, 8, 256, 256), copy.deepcopy(dict(TABLE))
    first = select(problem, VARIANTS, table)
    shuffled = list(VARIANTS)
    random.Random(1).shuffle(shuffled)
    monkeypatch.setenv("DENSEMOE_ARTIFACTS", "/nonexistent")
    assert select(problem, shuffled, table) == first
    assert select(problem, iter(VARIANTS), table) == first
    assert table == TABLE


def test_a_forced_variant_is_taken_or_refused_never_replaced() -> None:
    problem = Problem("fc1", 37, 8, 256, 256)
    key = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
    choice = select(problem, VARIANTS, TABLE, key)
    assert (choice.variant.key, choice.provenance) == (key, "forced")
    assert select(problem, VARIANTS, TABLE).variant.key != key
    with pytest.raises(SelectionError, match="it reads nvfp4 activations, the problem has bf16"):
        select(problem, VARIANTS, TABLE, "fc1.sm90a.t8x64.c1x1.nvfp4-bf16")
    with pytest.raises(SelectionError, match="not in the artifact set"):
        select(problem, VARIANTS, TABLE, "fc1.sm90a.t64x64.c1x1.bf16-bf16")


def test_what_no_variant_runs_says_why() -> None:
    only_fc2 = [each for each in VARIANTS if each.op == "fc2"]
    with pytest.raises(SelectionError, match=r"no variant runs fc1 with bf16 activations.*it is an fc2 kernel"):
        select(Problem("fc1", 1, 1, 64, 64), only_fc2, TABLE)
    with pytest.raises(SelectionError, match="the set is empty"):
        select(Problem("fc1", 1, 1, 64, 64), [], TABLE)


def changed(**changes: Any) -> dict[str, Any]:
    return {**TABLE, "rules": [{**rule, **changes} for rule in TABLE["rules"]]}


def test_a_table_without_a_rule_names_what_could_run() -> None:
    with pytest.raises(SelectionError, match=r"no rule for fc1 at M = 5: name one of fc1\.sm90a"):
        select(Problem("fc1", 5, 1, 64, 64), VARIANTS, changed(m_from=16, m_to=24))
    with pytest.raises(SelectionError, match=r"wants tile 64x64.*which no installed variant has"):
        select(Problem("fc1", 5, 1, 64, 64), VARIANTS, changed(tile=[64, 64]))


def test_the_first_rule_that_matches_decides() -> None:
    rules = [{**TABLE["rules"][0], "m_to": 2**31, "tile": [16, 64], "reason": "first"}, *TABLE["rules"]]
    choice = select(Problem("fc1", 5, 1, 64, 64), VARIANTS, {**TABLE, "rules": rules})
    assert (choice.variant.tile_m, choice.reason) == (16, "rule 0: first")


def test_a_rule_may_be_for_one_dtype_of_activations() -> None:
    rules = [{**TABLE["rules"][0], "m_to": 2**31, "tile": [16, 64], "reason": "nvfp4 alone", "a_dtype": "nvfp4"}, *TABLE["rules"]]
    table = {**TABLE, "rules": rules}
    assert select(Problem("fc1", 5, 1, 64, 64), VARIANTS, table).variant.tile_m == 8
    both = [*VARIANTS, Variant.parse("fc1.sm90a.t16x64.c1x1.nvfp4-bf16")]
    assert select(Problem("fc1", 5, 1, 64, 64, "nvfp4"), both, table).reason == "rule 0: nvfp4 alone"


@pytest.mark.parametrize("arch", ["sm_90a"])
def test_tables_cover_every_bucket_and_say_how_they_know(arch: str) -> None:
    table = load_table(arch)
    assert table["arch"] == arch
    for rule in table["rules"]:
        assert set(rule) >= {"op", "m_from", "m_to", "tile", "cluster", "provenance", "reason"}
        assert rule["provenance"] in ("measured", "modelled")
        if rule["provenance"] == "measured":
            assert {"device", "driver", "date"} <= set(rule), json.dumps(rule)
    for op, m in itertools.product(("fc1", "fc2", "groupedfc1", "groupedfc2"), (0, 1, 8, 120, 128, 256, 4096, 2**31 - 1)):
        assert any(rule["op"] == op and rule["m_from"] <= bucket(m) <= rule["m_to"] for rule in table["rules"])


def test_an_architecture_without_a_table_or_a_name_is_refused() -> None:
    with pytest.raises(VariantError, match="use one of"):
        load_table("sm_77")
    files = {path.name for path in resources.files("densemoe.artifacts").joinpath("selection").iterdir()}
    for name in ARCHITECTURES:
        if f"{name}.json" in files:
            assert load_table(name)["schema"] == 1
        else:
            with pytest.raises(SelectionError, match=rf"artifacts/selection/{name}\.json"):
                load_table(name)


def test_rules_reject_with_their_own_reason() -> None:
    variant = Variant.parse("fc1.sm90a.t8x64.c1x1.bf16-bf16")
    for problem, said in (
        (Problem("fc2", 1, 1, 64, 64), "it is an fc1 kernel, the problem is fc2"),
        (Problem("fc1", 1, 1, 64, 64, "nvfp4"), "it reads bf16 activations, the problem has nvfp4"),
        (Problem("fc1", 1, 1, 64, 64, "bf16", "f32"), "it writes bf16, the problem wants f32"),
        (Problem("fc1", 2**31 - 1, 1, 64, 2**29), "it counts them in 32 bits; split M"),
    ):
        accepted, reason = can_implement(variant, problem)
        assert not accepted
        assert said in reason
