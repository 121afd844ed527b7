"""The proof of a B200 or B300, as far as no such device is needed: its grids on the emulator, its tuning on a simulated device, its record, merging.

Nothing here was measured; every record below says so.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import emulated
from simulated_device import SimulatedDriver, SimulatedLoader, SimulatedPlan, entry

from densemoe.compile import proof, proof_record, roofline, roofline_table
from densemoe.compile.kernels import load
from densemoe.compile.proof_record import GRIDS, Record
from densemoe.runtime import cli, packing, reference, select
from densemoe.runtime.bench_device import set_digest
from densemoe.runtime.errors import ArchitectureMismatch, ProblemError, ProofError
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.lock import Lock
from densemoe.runtime.nvfp4 import convert, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem
from densemoe.runtime.tune import Tuner, cases_of
from densemoe.runtime.tune_cases import Shape
from densemoe.runtime.variant import Variant

SCHEMA = json.loads((roofline_table.TABLE.parent.parent / "schema" / "proof.schema.json").read_text())
TABLE_SCHEMA = json.loads((roofline_table.TABLE.parent.parent / "schema" / "selection.schema.json").read_text())
SHAPE = Shape("small", 2, 1, 256, 256)
TOKENS = (8, 16, 32, 64, 128)
KEYS = [
    *(f"fc1.sm100f.{shape}.nvfp4-nvfp4" for shape in ("t128x128.c1x2", "t128x256.c1x1", "t256x256.c2x1")),
    *(f"fc2.sm100f.{shape}.nvfp4-bf16" for shape in ("t128x128.c1x2", "t128x64.c1x4", "t256x128.c2x1")),
]


# ---- a device that does not exist


def cost(key: str, settings: Mapping[str, int], problem: Problem) -> float:
    """Made up, and unlike the model: FC1's 128x256 tile is fastest, FC2's 128x64 with four splits."""
    fast = ".t128x256." in key or ".t128x64." in key
    return (10 if fast else 20) / settings.get("splits", 1) ** 0.5 + (1 if settings.get("prefetch") else 0) + problem.m / 100


class BlackwellDriver(SimulatedDriver):
    def capability(self, device: int) -> tuple[int, int]:
        return 10, 0

    def sm_count(self, device: int) -> int:
        return 148

    def device_name(self, device: int) -> str:
        return "Simulated B200"


class BlackwellPlan(SimulatedPlan):
    """Weights in the interchange layout."""

    def compute(self) -> None:
        problem, driver = self.problem, self.loader.driver
        shape = (problem.experts, problem.hidden, problem.intermediate)
        packed = driver.at(self.tensors["b"])[: packing.interchange_bytes(problem.op, *shape)]
        weights = reference.Weights(problem.op, *packing.interchange_parts(problem.op, packed, *shape), problem.experts)
        a = reference.activation_values(self.array("a.codes"), self.array("a.scales"))
        alpha = self.array("alpha").astype(np.float64)
        outputs = {role: self.array(role) for role, spec in problem.tensors().items() if spec.output}
        if problem.op == "fc2":
            outputs["c"][:] = convert(reference.fc2(a, weights, alpha, problem.experts, problem.intermediate).c.astype(np.float32), "bf16")
        else:
            y = reference.fc1(a, weights, alpha, range(problem.experts)).y.astype(np.float32)
            codes, scales = quantise_rows(y, self.array("output_multiplier")[0])
            outputs["c.codes"][:], outputs["c.scales"][:] = pack_codes(codes), tile_scales(scales)
        if self.loader.fault is not None:
            self.loader.fault(self.key, problem, outputs)


class BlackwellLoader(SimulatedLoader):
    """The locked set, of which ``keys`` are measured."""

    def __init__(self, keys: list[str], **options: Any) -> None:
        super().__init__({}, cost, **options)
        self.driver = BlackwellDriver(1 << 12)
        lock = Lock.read()
        recipes = {key: load(f"sm100_{Variant.parse(key).op}").recipe(Variant.parse(key)) for key in keys}
        for key in keys:
            made = entry(key, recipes[key].settings)
            self.variants[key] = SimpleNamespace(**{**vars(made), "layout": packing.INTERCHANGE_LAYOUT, "sha256": lock.cubins[key].sha256})

    def manifest(self, device: int) -> Any:
        return SimpleNamespace(arch="sm_100f", variants=self.variants, toolchain={"ptxas": "none"})

    def plan(self, problem: Problem, tensors: Any, device: int, variant: str, settings: Mapping[str, int] | None = None) -> BlackwellPlan:
        assert set(tensors) == {*problem.tensors(), "b"}
        return BlackwellPlan(self, variant, problem, tensors, settings or {})


def provenance(**changed: object) -> dict[str, Any]:
    known = {"device": "Simulated B200", "capability": [10, 0], "sm_count": 148, "cuda_driver": "13.0", "arch": "sm_100f"}
    digest = proof_record.locked_digest(Lock.read(), "sm_100f")
    return {**known, "set_sha256": digest, "date": "2026-01-01T00:00:00Z", "read_bytes_per_second": 7e12, **changed}


def result(what: list[object], **changed: object) -> str:
    return json.dumps({"what": what, "worst": 0.5, "exemptions": 1, "elements": 100, "passed": True, **changed})


def whole_grids(results: Path) -> bool:
    """Lines as every grid writes them when it ran whole."""
    lines = [result([name, number, "key"]) for name, cases in GRIDS.items() for number in range(cases)]
    results.write_text("\n".join(lines) + "\n")
    return True


def groups() -> Any:
    return cases_of([SHAPE], TOKENS, (False, True), proof.DTYPES)


def made(tmp_path: Path, keys: list[str] = KEYS, grids: proof.Grids = whole_grids, **options: Any) -> Record:
    tuner = Tuner(BlackwellLoader(keys, **options), rounds=2)  # type: ignore[arg-type]
    return proof.prove(tuner, tmp_path / "work", groups(), provenance(), grids)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return made(tmp_path_factory.mktemp("proof"))


@pytest.fixture
def document(record: Record) -> dict[str, Any]:
    return json.loads(json.dumps(record.to_json()))  # type: ignore[no-any-return]


# ---- proving


def test_another_device_is_refused_before_anything_runs(tmp_path: Path) -> None:
    tuner = Tuner(SimulatedLoader({}, cost))  # type: ignore[arg-type]
    expected = r"device 0 is Simulated with compute capability 9\.0; this proves .* 10\.0 \(B200\) or 10\.3 \(B300\): run it there"
    with pytest.raises(ArchitectureMismatch, match=expected):
        proof.prove(tuner, tmp_path / "work", groups(), provenance(), whole_grids)
    assert not (tmp_path / "work").exists()


def test_the_command_needs_a_driver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from densemoe.runtime import driver

    class Other:
        def capability(self, ordinal: int) -> tuple[int, int]:
            return 9, 0

        def device_name(self, ordinal: int) -> str:
            return "NVIDIA H200"

    monkeypatch.setattr(driver, "Driver", Other)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["proof"]) == 3
    assert "device 0 is NVIDIA H200 with compute capability 9.0; this proves the sm_100f kernels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_whole_proof_is_complete_and_of_the_schema(record: Record, document: dict[str, Any]) -> None:
    jsonschema.validate(document, SCHEMA)
    assert record.complete
    assert {grid.name: grid.cases for grid in record.grids} == GRIDS
    assert Record.from_json(document, "here") == record
    assert all(each.passed for each in record.measurements)
    assert len(record.speed) == len(TOKENS) * 2 * 2
    assert {each["key"].split(".")[2] for each in record.speed if each["key"].startswith("fc1")} == {"t128x256"}
    for each in record.speed:
        assert each["share"] == pytest.approx(each["modelled"] / each["microseconds"], rel=1e-2)


def test_facts_of_the_caller_s_launches_are_not_tuned(record: Record) -> None:
    settings = {name for each in record.measurements for name, _ in each.candidate.settings}
    assert settings == {"splits", "prefetch"}  # and not early_list


def test_a_stopped_proof_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls = []

    def half(results: Path) -> bool:
        calls.append("grids")
        return len(calls) > 1 and whole_grids(results)

    first = made(tmp_path, grids=half)
    assert not first.complete
    loader = BlackwellLoader(KEYS)
    second = proof.prove(Tuner(loader), tmp_path / "work", groups(), provenance(), half)  # type: ignore[arg-type]
    assert second.complete
    assert loader.read == []  # every time was kept
    third = proof.prove(Tuner(loader), tmp_path / "work", groups(), provenance(), half)  # type: ignore[arg-type]
    assert third == second
    assert calls == ["grids", "grids"]  # whole ones are not run again
    with pytest.raises(ProblemError, match=r"is of something else \(set_sha256"):
        proof.prove(Tuner(loader), tmp_path / "work", groups(), provenance(set_sha256="0"), half)  # type: ignore[arg-type]


def test_a_wrong_kernel_is_in_the_record_and_not_merged(tmp_path: Path) -> None:
    def wrong(key: str, problem: Problem, outputs: Mapping[str, np.ndarray]) -> None:
        if ".t128x64." in key:
            outputs["c"][...] ^= 0x8000

    broken = made(tmp_path, fault=wrong)
    assert not broken.complete
    with pytest.raises(ProofError, match=r"fc2\.sm100f\.t128x64\.c1x4.* gave wrong results at fc2 small"):
        proof_record.merge(broken, json.loads(roofline_table.TABLE.read_text()), Lock.read())


@pytest.mark.parametrize(("visible", "device", "seen"), [(None, 0, "0"), (None, 3, "3"), ("5,7", 1, "7"), ("", 2, "2")])
def test_grids_run_on_the_device_and_the_root_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, device: int, seen: str
) -> None:
    runs = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str], check: bool) -> Any:
        runs.append(env)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(proof.subprocess, "run", run)
    monkeypatch.delenv("DENSEMOE_ARTIFACTS", raising=False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert proof.run_grids(tmp_path / "results", device, str(tmp_path))
    assert proof.run_grids(tmp_path / "results", device)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in runs] == [seen, seen]
    assert [each.get("DENSEMOE_ARTIFACTS") for each in runs] == [str(tmp_path), None]


def test_results_of_grids_are_counted_by_case() -> None:
    lines = [
        result(["fc1-grid", 1, 256, 8, 512, True, "one"]),
        result(["fc1-grid", 1, 256, 8, 512, True, "two"], worst=0.9),
        result(["fc1-grid", 1, 256, 9, 512, True, "one"], passed=False, worst=3.0),
        result(["fc1-grid", 1, 256, 9, 512, True, "one"], worst=0.7),  # run again
        result(["layer", 8, 1, 512, 512, 1, "mark"]),
    ]
    grids = {grid.name: grid for grid in proof.grids_of(lines)}
    fc1 = grids["fc1-grid"]
    assert (fc1.cases, fc1.runs, fc1.failed, fc1.worst, fc1.exemptions, fc1.elements) == (2, 3, 0, 0.9, 3, 300)
    assert (grids["layer"].cases, grids["fc2-grid"].cases) == (1, 0)
    with pytest.raises(ProofError, match="line 2 of the grids' results is damaged"):
        proof.grids_of([lines[0], lines[1][:20]])


def test_the_grids_of_the_gpu_tests_are_the_contract_s() -> None:
    import blackwell_grid

    from densemoe.runtime import data

    assert {(case.rows, case.hidden) for case in data.fc1_grid()} == set(blackwell_grid.fc1_parts())
    assert {(case.experts, case.intermediate, case.hidden) for case in data.fc2_grid()} == set(blackwell_grid.fc2_parts())
    assert len(list(data.fc1_grid())) == GRIDS["fc1-grid"] == 32 * len(blackwell_grid.fc1_parts())
    assert len(list(data.fc2_grid())) == GRIDS["fc2-grid"] == 4 * len(blackwell_grid.fc2_parts())
    assert len(list(data.layers())) == GRIDS["layer"] == GRIDS["layer-listed"]


# ---- merging


def choice(table: Mapping[str, Any], op: str, m: int, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Any:
    monkeypatch.setattr(select, "_read_table", lambda arch: table)
    problem = Problem(op, m, SHAPE.experts, SHAPE.hidden, SHAPE.intermediate, "nvfp4", roofline_table.OUTPUT[op])
    variants = [*roofline_table.shipped("fc1"), *roofline_table.shipped("fc2")]
    return select.select(problem, variants, select.load_table.__wrapped__("sm_100f", capability))


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_a_merged_record_turns_modelled_choices_of_its_device_into_measured_ones(
    record: Record, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    before = json.loads(roofline_table.TABLE.read_text())
    merged = proof_record.merge(record, before, Lock.read())
    jsonschema.validate(merged, TABLE_SCHEMA)
    assert merged["rules"] == before["rules"]
    for op, tile, settings in (("fc1", (128, 256), {}), ("fc2", (128, 64), {"splits": 4})):
        old, new = (choice(table, op, 64, monkeypatch, capability) for table in (before, merged))
        assert old.provenance == "modelled"
        if capability == (10, 0):
            assert new.provenance == "measured"
            assert (new.variant.tile_m, new.variant.tile_n) == tile != (old.variant.tile_m, old.variant.tile_n) or op == "fc2"
            assert dict(new.settings) == settings
        else:
            assert new == old  # the other device of the family keeps its model


def test_merging_writes_the_file_and_a_second_record_replaces_the_first(
    document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, path = tmp_path / "table.json", tmp_path / "record.json"
    table.write_text(roofline_table.TABLE.read_text())
    path.write_text(json.dumps(document))
    assert cli.main(["merge-record", str(path), "--table", str(table)]) == 0
    assert "are measured on Simulated B200 (10.0)" in capsys.readouterr().out
    once = table.read_text()
    assert cli.main(["merge-record", str(path), "--table", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["capability"] == "10.0"
    assert table.read_text() == once == roofline_table.render(roofline_table.document(json.loads(once)))


FAULTS: dict[str, tuple[Any, str]] = {
    "another kind": (lambda d: d.update(kind="other"), "is no record of `densemoe proof`"),
    "another schema": (lambda d: d.update(schema=2), "has schema 2, this densemoe reads 1"),
    "a part is missing": (lambda d: d.pop("grids"), r"is damaged \(KeyError"),
    "a measurement is damaged": (lambda d: d["measurements"][0].pop("case"), "is damaged"),
    "another device": (lambda d: d["provenance"].update(capability=[9, 0]), r"compute capability 9\.0: use one of 10\.0 \(B200\), 10\.3 \(B300\)"),
    "another architecture": (lambda d: d["provenance"].update(arch="sm_90a"), "of the sm_90a set"),
    "other cubins": (lambda d: d["provenance"].update(set_sha256="0" * 64), "of other cubins than artifacts/manifest.lock states"),
    "no bandwidth": (lambda d: d["provenance"].pop("read_bytes_per_second"), "does not say the device's bandwidth"),
    "a grid is short": (lambda d: d["grids"][0].update(cases=383), "its grid fc1-grid has 383 of 384 cases"),
    "a grid is missing": (lambda d: d["grids"].pop(1), "its grid fc2-grid has 0 of 180 cases"),
    "a run failed": (lambda d: d["grids"][1].update(failed=1), "1 of 180 runs of its grid fc2-grid failed"),
    "a result was wrong": (lambda d: d["measurements"][0].update(passed=False), "gave wrong results"),
    "nothing was timed": (lambda d: d.update(measurements=[]), "has no measured time"),
    "it was interrupted": (lambda d: d.update(complete=False), "says itself that it is not complete"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_that_must_not_be_merged_changes_nothing(
    fault: str, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = FAULTS[fault]
    changed = copy.deepcopy(document)
    spoil(changed)
    table, path = tmp_path / "table.json", tmp_path / "record.json"
    table.write_text(roofline_table.TABLE.read_text())
    path.write_text(json.dumps(changed))
    with pytest.raises(ProofError, match=message):
        proof_record.merge_file(path, table)
    assert cli.main(["merge-record", str(path), "--table", str(table)]) == 1
    assert capsys.readouterr().err.startswith("densemoe merge-record: ")
    assert table.read_text() == roofline_table.TABLE.read_text()


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProofError, match="cannot be read: No such file"):
        Record.read(tmp_path / "absent.json")
    (tmp_path / "torn.json").write_text('{"kind": ')
    with pytest.raises(ProofError, match="is not JSON"):
        Record.read(tmp_path / "torn.json")


def test_the_set_s_digest_is_the_lock_s() -> None:
    lock = Lock.read()
    entries = {key: SimpleNamespace(sha256=cubin.sha256) for key, cubin in lock.cubins.items() if ".sm100f." in key}
    assert set_digest(SimpleNamespace(variants=entries)) == proof_record.locked_digest(lock, "sm_100f")  # type: ignore[arg-type]


def test_speed_stands_beside_the_model_s_time(record: Record) -> None:
    for each, case in zip(record.speed, dict.fromkeys(m.case for m in record.measurements), strict=True):
        variant = Variant.parse(each["key"])
        if not case.active:
            modelled = roofline.estimate(roofline.B200, variant, case.problem(), splits=each["settings"].get("splits", 1)).total
            assert each["modelled"] == pytest.approx(modelled, abs=1e-3)


# ---- the grids' code, on the emulator


class EmulatedPlan:
    """A Plan whose launch is the emulator's."""

    def __init__(self, problem: Problem, tensors: Mapping[str, Any], key: str, settings: Mapping[str, int]) -> None:
        self.key, self.problem, self.tensors, self.settings = key, problem, tensors, settings

    def __enter__(self) -> EmulatedPlan:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def feeds(self, second: EmulatedPlan) -> None:
        assert second.tensors["a.codes"].data_ptr() == self.tensors["c.codes"].data_ptr()

    def launch(self, stream: int) -> None:
        import torch

        problem, arrays = self.problem, {}
        for role, tensor in self.tensors.items():
            arrays[role] = (tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy())
        shape = (problem.experts, problem.hidden, problem.intermediate)
        arrays["b.codes"], arrays["b.scales"] = packing.interchange_parts(problem.op, arrays.pop("b"), *shape)
        emulated.launch(self.key, problem, arrays, races=False, **self.settings)


class EmulatedLoader:
    def plan(
        self, problem: Problem, tensors: Mapping[str, Any], device: int, variant: str | None = None, settings: Mapping[str, int] | None = None
    ) -> EmulatedPlan:
        keys = {"fc1": "fc1.sm100f.t128x128.c1x2.nvfp4-nvfp4", "fc2": "fc2.sm100f.t128x128.c1x2.nvfp4-bf16"}
        return EmulatedPlan(problem, tensors, variant or keys[problem.op], settings or {})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import harness

    monkeypatch.setattr(harness, "DEVICE", "cpu")
    monkeypatch.setenv(proof.RESULTS_VARIABLE, str(tmp_path / "results.jsonl"))
    return tmp_path / "results.jsonl"


def test_parts_of_the_grids_run_every_variant_and_note_it(results: Path) -> None:
    import blackwell_grid

    keys = [*KEYS, "fc1.sm100f.t128x128.c1x1.nvfp4-f32"]
    assert blackwell_grid.judge(blackwell_grid.run_fc1_part(EmulatedLoader(), keys, 256, 256, (2,), (8,))) == 4 * 2
    assert blackwell_grid.judge(blackwell_grid.run_fc2_part(EmulatedLoader(), keys, 2, 256, 256, (8,))) == 3
    grids = {grid.name: grid for grid in proof.grids_of(results.read_text().splitlines())}
    assert (grids["fc1-grid"].cases, grids["fc1-grid"].runs, grids["fc2-grid"].cases) == (2, 8, 1)
    assert not any(grid.failed for grid in grids.values())


def test_exact_data_and_layers_run_too(results: Path) -> None:
    import blackwell_grid

    from densemoe.runtime import data

    keys = ["fc1.sm100f.t128x256.c1x1.nvfp4-f32", "fc2.sm100f.t128x64.c1x1.nvfp4-f32"]
    assert blackwell_grid.judge(blackwell_grid.run_exact(EmulatedLoader(), keys, 3, 2, 256, 256)) == 1 + 2 * 3
    for listed in (False, True):
        assert blackwell_grid.judge(blackwell_grid.run_layer(EmulatedLoader(), data.LayerCase(4, 2, 256, 256, 2), listed)) == 3
    grids = {grid.name: grid.cases for grid in proof.grids_of(results.read_text().splitlines())}
    assert grids == {"fc1-grid": 0, "fc2-grid": 0, "fc1-exact": 1, "fc2-exact": 2, "layer": 1, "layer-listed": 1}


def test_a_case_out_of_its_bound_is_noted_and_fails(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import blackwell_grid

    original = EmulatedPlan.launch

    def spoiled(self: EmulatedPlan, stream: int) -> None:
        original(self, stream)
        self.tensors["c"].neg_()

    monkeypatch.setattr(EmulatedPlan, "launch", spoiled)
    with pytest.raises(AssertionError, match=r"1 of 1; first: \('fc2-grid'"):
        blackwell_grid.judge(blackwell_grid.run_fc2_part(EmulatedLoader(), [KEYS[3]], 2, 256, 256, (8,)))
    assert [grid.failed for grid in proof.grids_of(results.read_text().splitlines())] == [0, 1, 0, 0, 0, 0]
