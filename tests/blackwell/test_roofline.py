"""The roofline model against every published number of a Blackwell device that this project knows, and the selection table that is made of it.

Published for DeepSeek-V3 TP8 on a B200 (of another implementation of the same contract; whole module): 144, 141, 145, 173, 242 µs at M = 32, 64, 128,
256, 272; by a grouped kernel 117, 142, 162, 172, 176 µs; FC2 53 µs with two splits, where a heuristic predicted one split and 75 µs; the
tactics that won. Modelled times are of other kernels, launches alone: they must lie below, near, and in the published order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from densemoe.compile import kernels, matrix, roofline, roofline_table
from densemoe.compile.roofline import B200, B300, Device, Estimate
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import bucket
from densemoe.runtime.variant import Variant

WHOLE_MODULE = {32: 144.0, 64: 141.0, 128: 145.0, 256: 173.0, 272: 242.0}
GROUPED = {32: 117.0, 64: 142.0, 128: 162.0, 256: 172.0, 272: 176.0}
DEEPSEEK = (256, 7168, 256)
TOP_K = 8
SHIPPED = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_100f" and each.variant.op in ("fc1", "fc2")]


def problem(op: str, m: int, shape: tuple[int, int, int] = DEEPSEEK) -> Problem:
    return Problem(op, m, *shape, a_dtype="nvfp4", c_dtype=roofline_table.OUTPUT[op])


def ranked(device: Device, op: str, m: int, active: int | None = None) -> list[Estimate]:
    return roofline.rank(device, problem(op, m), roofline_table.shipped(op), active)


def tactic(each: Estimate) -> tuple[str, int]:
    variant = Variant.parse(each.key)
    return f"{variant.tile_m}x{variant.tile_n}/{variant.cluster_m}x{variant.cluster_n}", each.settings.get("splits", 1)


def layer(m: int) -> float:
    return sum(ranked(B200, op, m)[0].total for op in ("fc1", "fc2"))


# ---- the model's sizes are the kernels'


@pytest.mark.parametrize("variant", [v for v in SHIPPED if v.c_dtype == "bf16"], ids=lambda v: v.key)
def test_sizes_are_those_of_the_kernels(variant: Variant) -> None:
    config = kernels.load(f"sm100_{variant.op}").config_of(variant)  # type: ignore[attr-defined]
    tile = roofline.Tile.of(variant)
    own = (tile.stages, tile.stage_bytes, tile.weight_stage_bytes, tile.pair, tile.halves)
    assert own == (config.stages, config.stage_bytes, config.weight_stage_bytes, config.pair, config.halves)
    assert tile.requested_bytes(128) * config.cluster_n == config.a_bytes + 2048 + config.weight_stage_bytes * config.cluster_n


# ---- published times


def test_the_module_s_published_times_lie_above_the_model_and_near_it() -> None:
    for m, published in WHOLE_MODULE.items():
        assert 0.85 * published < layer(m) < published, (m, layer(m))


def test_published_order_over_m_is_the_model_s() -> None:
    """144 ≈ 141 ≈ 145 < 173 < 242: flat while weights stream, then dearer with a second and, a cliff, with a third tile of tokens."""
    times = {m: layer(m) for m in WHOLE_MODULE}
    assert max(times[m] for m in (32, 64, 128)) < 1.05 * min(times[m] for m in (32, 64, 128))
    assert times[128] < times[256] < times[272]
    assert times[256] / times[128] == pytest.approx(173 / 145, rel=0.1)
    assert times[272] / times[256] == pytest.approx(242 / 173, rel=0.15)


def test_a_tactic_kept_past_its_bucket_is_a_cliff() -> None:
    """The winners of M = 256 at 272: a pair of tiles more, nearly all padding."""
    kept = 0.0
    for op in ("fc1", "fc2"):
        best = ranked(B200, op, 256)[0]
        kept += roofline.estimate(B200, Variant.parse(best.key), problem(op, 272), splits=best.settings.get("splits", 1)).total
    assert kept > 1.1 * layer(272) > 1.1 * 1.3 * layer(256)


def test_the_grouped_kernel_s_published_times_lie_above_the_model_s_active_experts() -> None:
    """Uniform routing, idle experts skipped: rising and saturating as published. Its tiles hold one expert's tokens, at most one tile up to 272."""
    modelled = {}
    for m in GROUPED:
        active = round(DEEPSEEK[0] * (1 - (1 - TOP_K / DEEPSEEK[0]) ** m))
        modelled[m] = sum(ranked(B200, op, min(m, 128), active)[0].total for op in ("fc1", "fc2"))
        assert 0.6 * GROUPED[m] < modelled[m] < GROUPED[m], m
    assert sorted(modelled, key=lambda m: modelled[m]) == sorted(GROUPED, key=lambda m: GROUPED[m]) == sorted(GROUPED)
    steps = [modelled[b] - modelled[a] for a, b in itertools.pairwise(sorted(GROUPED))]
    assert steps == sorted(steps, reverse=True)  # 25, 20, 10, 4 published


def test_fc2_wants_two_splits_below_128_tokens_and_not_one() -> None:
    for m in (1, 8, 16, 32, 64, 96, 128):
        times = {each.settings["splits"]: each.total for each in reversed(ranked(B200, "fc2", m)) if tactic(each)[0] == "128x128/1x2"}
        assert times[2] < min(times[1], times[4]), m
        assert times[2] < 53.0 < 1.15 * times[2]  # measured with two splits, by the other implementation
        assert times[1] > 1.2 * times[2]


# ---- published tactics


@pytest.mark.parametrize(
    ("op", "tokens", "tile", "splits"),
    [
        ("fc1", (144, 160, 192, 224, 256), "256x256/2x1", 1),
        ("fc1", (400, 448, 512), "256x256/2x1", 1),
        ("fc2", (8, 16, 32, 64, 96, 128), "128x128/1x2", 2),
        ("fc2", (160, 192, 224), "256x128/2x1", 1),
    ],
)
def test_published_winners_are_the_model_s(op: str, tokens: tuple[int, ...], tile: str, splits: int) -> None:
    for m in tokens:
        assert tactic(ranked(B200, op, m)[0]) == (tile, splits), m


@pytest.mark.parametrize("device", [B200], ids=lambda d: d.name)
def test_fc1_s_tactic_changes_at_144_272_and_400(device: Device) -> None:
    """On the published grid of tokens, steps of 16; in our buckets: above 128, above 256, above 384."""
    winners = {m: tactic(ranked(device, "fc1", m)[0])[0] for m in range(16, 513, 16)}
    changes = [m for before, m in itertools.pairwise(winners) if winners[before] != winners[m]]
    assert changes == [144, 272, 400]
    assert {winners[m][:4] for m in (272, 384)} == {"128x"}
    assert {bucket(m - 1) for m in changes} == {256, 384, 512}


# ---- published rates


def test_ridges() -> None:
    """Dense over all experts: bound by arithmetic above about 300 tokens on a B200; 42 to 52 on an H200, by its measured rates."""
    assert B200.ridge() == pytest.approx(300, rel=0.12)
    h200 = dataclasses.replace(B200, sm_count=132, bandwidth=4.3e12, mma_rate=645e12)
    assert 42 <= h200.ridge() <= 52


@pytest.mark.parametrize(("megabytes", "microseconds"), [(132, 31.6), (528, 117.0)])
def test_the_launch_and_stream_terms_are_the_read_only_floor_of_an_h200(megabytes: int, microseconds: float) -> None:
    """Measured there: cold, in a graph. 4.8 TB/s are its published rate."""
    bandwidth = 4.8e12 * roofline.SUSTAINED_BANDWIDTH
    assert roofline.LAUNCH_US + megabytes * 1e6 / bandwidth * 1e6 == pytest.approx(microseconds, rel=0.06)


def test_every_ring_covers_latency_times_bandwidth() -> None:
    for variant in SHIPPED:
        design = kernels.load(f"sm100_{variant.op}").expected(variant).design
        assert design["weight_bytes_in_flight"] > 1.5 * design["latency_bandwidth_bytes"], variant.key
        assert design["latency_bandwidth_bytes"] == 52027  # 1 µs x 7.7 TB/s / 148


# ---- terms of the model, each by the case that it decides


def one(key: str, m: int, *, device: Device = B200, shape: tuple[int, int, int] = DEEPSEEK, **options: Any) -> Estimate:
    variant = Variant.parse(key)
    return roofline.estimate(device, variant, problem(variant.op, m, shape), **options)


NARROW, WIDE = "fc1.sm100f.t128x128.c1x1.nvfp4-nvfp4", "fc2.sm100f.t128x128.c1x2.nvfp4-bf16"


@pytest.mark.parametrize(
    ("part", "less", "more"),
    [
        ("memory", lambda: one(NARROW, 8, active=8), lambda: one(NARROW, 8)),
        ("mma", lambda: one(NARROW, 128), lambda: one(NARROW, 129)),
        ("l2", lambda: one(NARROW.replace("c1x1", "c1x2"), 128), lambda: one(NARROW, 128)),
        ("l2", lambda: one(NARROW, 8), lambda: one(NARROW, 128)),
        ("epilogue", lambda: one(NARROW, 128, device=B300), lambda: one(NARROW, 128)),
        ("split", lambda: one(WIDE, 64, splits=2), lambda: one(WIDE, 64, splits=4)),
        ("split", lambda: one(WIDE, 8, splits=2), lambda: one(WIDE, 128, splits=2)),
        ("waves", lambda: one(WIDE, 128, splits=2), lambda: one(WIDE, 128, splits=4)),
    ],
)
def test_each_term_grows_with_what_it_stands_for(part: str, less: Callable[[], Estimate], more: Callable[[], Estimate]) -> None:
    assert getattr(less(), part) < getattr(more(), part)


def test_a_tile_computes_its_padding() -> None:
    assert one(NARROW, 1).mma == one(NARROW, 128).mma


def test_few_ctas_draw_less_than_the_bandwidth() -> None:
    """One expert of 128 rows is one CTA: latency, not bandwidth, says how long its weights take."""
    alone = one(NARROW, 8, shape=(1, 7168, 64))
    nbytes = 128 * 7168 * roofline.WEIGHT_BYTES
    assert alone.memory > nbytes / (6 * 18432 / 1e-6) * 1e6
    assert alone.memory > 50 * nbytes / B200.bandwidth * 1e6


def test_what_cannot_run_has_no_time() -> None:
    with pytest.raises(ProblemError, match=r"has no time for this problem: 2I = 384 is not a multiple of its tile_n 256"):
        one("fc1.sm100f.t128x256.c1x1.nvfp4-nvfp4", 8, shape=(2, 512, 192))


# ---- the selection table


def test_the_table_is_the_model_s() -> None:
    """``python -m densemoe.compile.roofline_table --write`` after a change of the model."""
    text = roofline_table.TABLE.read_text()
    assert text == roofline_table.render(roofline_table.document(json.loads(text)))
    assert all(rule["provenance"] == "modelled" for rule in json.loads(text)["rules"])


@functools.cache
def modelled_rules() -> list[dict[str, Any]]:
    """Every modelled rule; the model takes some seconds for them."""
    return roofline_table.modelled_rules()


@pytest.mark.parametrize("device", roofline.DEVICES.values(), ids=lambda d: d.name)
def test_ranges_of_a_device_cover_every_m_once(device: Device) -> None:
    for op, hidden in itertools.product(("fc1", "fc2"), roofline_table.HIDDEN):
        for m in (0, 1, 8, 128, 256, 384, 512, 640, 768, 896, 1024, 2**31 - 1):
            matching = [
                rule
                for rule in modelled_rules()
                if rule["op"] == op
                and rule["m_from"] <= m <= rule["m_to"]
                and rule.get("hidden_from", 0) <= hidden[1] <= rule.get("hidden_to", 2**31)
                and rule.get("capability", list(device.capability)) == list(device.capability)
                and "not a multiple" not in rule["reason"]
                and (m in roofline_table.BUCKETS or m in (0, 1, 2**31 - 1))
            ]
            assert len({tuple(rule["tile"]) for rule in matching}) == 1, (op, m, matching)


def test_a_b300_of_160_sms_gets_the_same_choices_where_weights_stream() -> None:
    larger = dataclasses.replace(B300, sm_count=160, fours=36)
    for op, m in itertools.product(("fc1", "fc2"), (8, 32, 64, 128)):
        assert tactic(ranked(larger, op, m)[0]) == tactic(ranked(B300, op, m)[0])


def test_devices_differ_in_the_table() -> None:
    capabilities = {tuple(rule["capability"]) for rule in modelled_rules() if "capability" in rule}
    assert capabilities == {B200.capability, B300.capability}
