"""Tuning on a simulated device: what is measured, checked, kept and taken up again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from simulated_device import SimulatedLoader, SimulatedPlan

from densemoe.runtime import bench_timing
from densemoe.runtime.bench_timing import rotations
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.problem import Problem
from densemoe.runtime.tune import DTYPES, Candidate, Journal, Tuner, cases_of
from densemoe.runtime.tune_cases import Case, Shape

SHAPE = Shape("small", 7, 2, 128, 128)
PROVENANCE = {"device": "Simulated", "capability": [9, 0], "cuda_driver": "13.0", "arch": "sm_90a", "set_sha256": "1", "date": "2026-01-01"}
BF16 = {f"fc{op}.sm90a.t{tile}x64.c1x1.bf16-bf16": () for op in (1, 2) for tile in (8, 16, 32)}


@pytest.fixture(autouse=True)
def without_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device needs none between replays."""
    monkeypatch.setattr(bench_timing, "sleep", lambda seconds: None)


def by_tile(key: str, settings: Mapping[str, int], problem: Problem) -> float:
    """Tile 8 is best up to 8 tokens, 16 up to 16, 32 above; every pass over the weights costs 10 µs and two thirds of the tile."""
    tile = int(key.split(".t")[1].split("x")[0])
    passes = -(-problem.m // tile)
    return passes * (10 + tile * 2 / 3) * settings.get("slow", 1)


def tuner(keys: Mapping[str, tuple] = BF16, **options: object) -> tuple[Tuner, SimulatedLoader]:
    loader = SimulatedLoader(keys, by_tile, **options)  # type: ignore[arg-type]
    return Tuner(loader), loader  # type: ignore[arg-type]


def fastest(measured: list) -> str:
    return min((each for each in measured if each.sample), key=lambda each: each.sample.microseconds).candidate.key


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("op", ["fc1", "fc2"])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("nvfp4", "nvfp4")])
def test_every_variant_is_checked_and_timed(op: str, active: bool, dtypes: tuple[str, str]) -> None:
    a_dtype, c_dtype = dtypes[0], "bf16" if op == "fc2" else dtypes[1]
    keys = {f"{op}.sm90a.t{tile}x64.c1x1.{a_dtype}-{c_dtype}": () for tile in (8, 16, 32)}
    tuning, loader = tuner(keys)
    (measured,) = list(tuning.cases([Case(op, SHAPE, 12, a_dtype, c_dtype, active)]))
    assert [each.passed for each in measured] == [True] * 3, [each.detail for each in measured]
    assert fastest(measured) == f"{op}.sm90a.t16x64.c1x1.{a_dtype}-{c_dtype}"
    for each in measured:
        assert each.sample is not None
        assert each.sample.microseconds == pytest.approx(by_tile(each.candidate.key, {}, each.case.problem()))
        assert each.sample.spread == pytest.approx(0, abs=1e-9)
    assert loader.driver.blocks == {}
    assert loader.driver.graphs == 0
    assert loader.open_plans == 0


@pytest.mark.parametrize(("op", "c_dtype"), [("fc1", "bf16"), ("fc1", "nvfp4"), ("fc2", "bf16")])
def test_both_families_of_a_tile_are_checked_and_timed(op: str, c_dtype: str) -> None:
    dtypes = f"bf16-{c_dtype}"
    keys = {f"grouped{op}.sm90a.t{tile}.c1x1.{dtypes}": () for tile in ("8x64", "16x64", "16x256")}

    def fault(self: SimulatedPlan, a: np.ndarray, weights: object) -> np.ndarray:
        good = real(self, a, weights)  # type: ignore[arg-type]
        return good * 1.5 if self.key in broken else good

    tuning, loader = tuner({f"{op}.sm90a.t{tile}x64.c1x1.{dtypes}": () for tile in (8, 16, 32)} | keys)
    real, broken = SimulatedPlan.grouped, set()  # type: ignore[var-annotated]
    tiles = (Case(f"grouped{op}", SHAPE, 12, "bf16", c_dtype, False, tile) for tile in (8, 16))
    cases = [Case(op, SHAPE, 12, "bf16", c_dtype, True), *tiles]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedPlan, "grouped", fault)
        listed, eight, sixteen = list(tuning.cases(cases))
        assert [each.passed for each in (*listed, *eight, *sixteen)] == [True] * 6
        assert [each.candidate.key.split(".")[2] for each in (*eight, *sixteen)] == ["t8x64", "t16x256", "t16x64"]
        assert {each.weight_bytes for each in (*eight, *sixteen)} == {listed[0].weight_bytes}
        assert all(each.sample is not None and each.sample.microseconds > 0 for each in (*eight, *sixteen))
        broken.add(f"grouped{op}.sm90a.t16x64.c1x1.{dtypes}")
        wrong = [each for measured in tuning.cases(cases) for each in measured if not each.passed]
    assert [each.candidate.key for each in wrong] == sorted(broken)
    assert wrong[0].sample is None
    assert loader.driver.blocks == {}
    assert loader.open_plans == 0


def test_cases_of_grouped_kernels_are_tiles_that_fill_and_all_at_the_fewest_tokens() -> None:
    found = cases_of([SHAPE], (1, 8, 64), [True], DTYPES, {DTYPES[0]: {8, 16, 128}})
    for op in ("fc1", "fc2"):
        grouped = [(each.m, each.group_tile) for each in found[SHAPE, op] if each.group_tile]
        assert sorted(grouped) == [(1, 8), (1, 16), (1, 128), (8, 8), (8, 16), (64, 8), (64, 16), (64, 128)]  # 0.3, 2.3 and 18.3 rows an expert
        assert {(each.op, each.a_dtype) for each in found[SHAPE, op] if each.group_tile} == {(f"grouped{op}", "bf16")}
    assert not any(each.group_tile for each in cases_of([SHAPE], (64,), [False], DTYPES, {DTYPES[0]: {8}})[SHAPE, "fc1"])


@pytest.mark.parametrize("op", ["fc1", "fc2"])
def test_neighbouring_launches_read_other_bytes_until_two_l2_are_read(op: str) -> None:
    l2 = 5 << 16
    tuning, loader = tuner(l2=l2)
    (measured,) = list(tuning.cases([Case(op, SHAPE, 8, "bf16", "bf16")]))
    weights = measured[0].weight_bytes
    assert measured[0].rotations == rotations(weights, l2) >= 3
    graph = [address for _, address in loader.read[-measured[0].rotations :]]
    assert len(set(graph)) == measured[0].rotations
    assert (len(set(graph)) - 1) * weights >= 2 * l2


def test_a_wrong_variant_is_named_and_never_timed() -> None:
    def fault(key: str, problem: Problem, outputs: Mapping[str, np.ndarray]) -> None:
        if ".t16x64" in key:
            outputs["c"].reshape(-1)[...] ^= 0x1000

    tuning, _ = tuner(fault=fault)
    (measured,) = list(tuning.cases([Case("fc1", SHAPE, 12, "bf16", "bf16")]))
    wrong = [each for each in measured if not each.passed]
    assert [each.candidate.key for each in wrong] == ["fc1.sm90a.t16x64.c1x1.bf16-bf16"]
    assert wrong[0].sample is None
    assert "FAIL" in wrong[0].detail
    assert fastest(measured) != wrong[0].candidate.key


def test_a_kernel_that_writes_nothing_is_wrong() -> None:
    tuning, loader = tuner()
    loader.computed = set(loader.variants)
    for op in ("fc1", "fc2"):
        (measured,) = list(tuning.cases([Case(op, SHAPE, 3, "bf16", "bf16")]))
        assert not any(each.passed for each in measured)


def test_settings_are_tried_for_the_fastest_variants() -> None:
    keys = {**BF16, "fc2.sm90a.t8x64.c1x1.bf16-bf16": (("splits", (1, 2)), ("slow", (1, 2)))}
    tuning, _ = tuner(keys)
    (measured,) = list(tuning.cases([Case("fc2", SHAPE, 8, "bf16", "bf16")]))
    found = {each.candidate.settings: each.sample.microseconds for each in measured if ".t8x64" in each.candidate.key and each.sample}
    assert set(found) == {(), (("splits", 2),), (("slow", 2),), (("slow", 2), ("splits", 2))}
    assert found[("slow", 2),] == pytest.approx(2 * found[()])
    assert len(measured) == 3 + 3


@pytest.mark.parametrize(("op", "active", "stated"), [("fc1", True, {}), ("fc2", True, {"early_list": 1}), ("fc2", False, {})])
def test_fc2_is_measured_as_layers_launch_it(op: str, active: bool, stated: dict[str, int]) -> None:
    """Behind FC1, when the list was complete long before: it may fetch weights while FC1 ends. The list of FC1 is made by the launch before it."""
    seen = []

    def time_of(key: str, settings: Mapping[str, int], problem: Problem) -> float:
        seen.append(dict(settings))
        return by_tile(key, {}, problem)

    loader = SimulatedLoader(dict.fromkeys(BF16, (("early_list", (0, 1)),)), time_of)
    (measured,) = list(Tuner(loader).cases([Case(op, SHAPE, 8, "bf16", "bf16", active)]))  # type: ignore[arg-type]
    assert [each.candidate.settings for each in measured if each.sample] == [()] * 3
    assert seen
    assert all(each == stated for each in seen)


def groups(tokens: tuple[int, ...] = (8, 16)) -> dict:
    return cases_of([SHAPE], tokens, [False], DTYPES)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    tuning, loader = tuner()
    said: list[str] = []
    tuning.say = said.append
    ticks = iter(range(1000))
    tuning.clock = lambda: float(next(ticks))
    assert not tuning.run(groups(), Journal(path, PROVENANCE), budget=14)
    kept = len(Journal(path, PROVENANCE).measurements())
    assert 0 < kept < 12
    assert any("budget" in line for line in said)
    with path.open("a") as file:
        file.write('{"measurements": [{"cas')  # torn by a kill
    journal = Journal(path, PROVENANCE)
    assert len(journal.measurements()) == kept
    before = len(loader.read)
    assert tuning.run(groups(), journal)
    assert len(journal.measurements()) == 12  # two ops, two M, three tiles; the nvfp4 variants are not in the set
    again = len(loader.read)
    assert again > before
    assert tuning.run(groups(), Journal(path, PROVENANCE))
    assert len(loader.read) == again
    assert Journal(path, PROVENANCE).measurements() == journal.measurements()


def test_a_budget_reaches_every_shape(tmp_path: Path) -> None:
    tuning, _ = tuner()
    ticks = iter(range(10000))
    tuning.clock = lambda: float(next(ticks))
    others = [SHAPE, Shape("other", 3, 1, 256, 64), Shape("third", 4, 2, 64, 64)]
    journal = Journal(tmp_path / "journal", PROVENANCE)
    tuning.run(cases_of(others, (8, 16, 24, 32), [False]), journal, budget=60)
    assert {(each.case.shape.name, each.case.op) for each in journal.measurements()} == {(s.name, op) for s in others for op in ("fc1", "fc2")}


@pytest.mark.parametrize("name", ["device", "cuda_driver", "set_sha256"])
def test_a_journal_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "journal"
    Journal(path, PROVENANCE)
    with pytest.raises(ProblemError, match=f"of something else .*{name} .* there, other here.*--fresh"):
        Journal(path, {**PROVENANCE, name: "other"})
    assert Journal(path, {**PROVENANCE, name: "other"}, fresh=True).measurements() == []
    Journal(path, {**PROVENANCE, name: "other"})


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", '{"schema": 2}\n', '{"schema": 1, "provenance": {}}\n{"measurements": []}\n', "\0\0\n"])
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal"
    path.write_text(text)
    with pytest.raises(ProblemError, match=r"journal .*journal"):
        Journal(path, PROVENANCE)


def test_a_candidate_names_its_settings() -> None:
    assert Candidate("a", (("splits", 2),)).text == "a splits=2"
    assert json.dumps(dict(Candidate("a", (("splits", 2),)).settings)) == '{"splits": 2}'
