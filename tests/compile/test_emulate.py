"""``densemoe verify --emulate``: what is run, what is recorded, what a fault says; partial results are kept and do not outlive their causes."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_executor import Cluster

from densemoe.compile import emulate_cli, executor, kernels, matrix
from densemoe.compile.emulate import cases, verify
from densemoe.compile.emulate import journal as journals
from densemoe.compile.emulate.cases import Case
from densemoe.compile.executor import open_executor
from densemoe.runtime import cli
from densemoe.runtime.errors import BuildError, ProblemError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import Variant

PLANNED = {each.variant.key: each for each in matrix.load().profile("full")}
PREPARE = "prepare.sm90a.t32x4096.c1x1.i32-f32"
PLAIN = r"^prepare\..*-f32$"
FC1, FC2 = "fc1.sm90a.t8x64.c1x1.bf16-bf16", "fc2.sm90a.t8x64.c1x1.bf16-bf16"
SCHEMA = json.loads((Path(verify.__file__).parents[2] / "artifacts" / "schema" / "manifest.schema.json").read_text())


def recipe_of(key: str) -> Any:
    planned = PLANNED[key]
    return kernels.load(planned.kernel).recipe(planned.variant)


# ---- cases


@pytest.mark.parametrize("key", list(PLANNED)[::7])
def test_a_variant_s_cases_cover_every_pair_a_ragged_m_and_a_padded_cluster(key: str) -> None:
    variant, recipe = PLANNED[key].variant, recipe_of(key)
    found = cases.cases_of(variant, recipe)
    axes = cases.AXES[cases.axes_of(variant)]
    pairs = set().union(*(cases.pairs_of(tuple(getattr(case, name) for name in axes)) for case in found))
    assert cases.all_pairs(list(axes.values())) <= pairs
    assert len({case.text for case in found}) == len(found) >= 12
    assert all(can_implement(variant, case.problem(variant))[0] for case in found)
    assert variant.tile_m == 1 or any(case.m % variant.tile_m for case in found)
    for name, allowed in recipe.settings:
        assert {dict(case.settings).get(name, allowed[0]) for case in found} == set(allowed)
    if variant.op in ("fc1", "fc2"):
        assert {case.kind for case in found} >= {"integers", "exact", "normal"}
        assert {case.active_list for case in found} == {0, 1}
        tiles = [-(-(2 * c.problem(variant).n_out if variant.op == "fc1" else c.hidden) // variant.tile_n) for c in found]
        assert variant.cluster_n == 1 or any(count % variant.cluster_n for count in tiles)


def test_cases_are_the_same_every_time_and_a_number_takes_more_of_the_grid() -> None:
    variant, recipe = Variant.parse(FC2), recipe_of(FC2)
    array = cases.cases_of(variant, recipe)
    assert cases.cases_of(variant, recipe) == array
    assert cases.cases_of(variant, recipe, 3) == array[:3]
    more = cases.cases_of(variant, recipe, 100)
    assert len({case.text for case in more}) == len(more) == 100
    whole = cases.cases_of(variant, recipe, full=True)
    grid = {(case.m, case.experts, case.hidden, case.intermediate) for case in whole}
    assert len(whole) == 180 + 2
    assert {(case.m, case.experts, case.hidden, case.intermediate) for case in cases.grid("fc2")} <= grid
    assert len(cases.grid("fc1")) == 384


def test_a_case_and_its_text_are_two_spellings_of_one_thing() -> None:
    for key in (FC1, FC2, PREPARE):
        for case in cases.cases_of(Variant.parse(key), recipe_of(key)):
            assert Case.parse(case.text) == case


@pytest.mark.parametrize(
    ("text", "said"),
    [("m=1,m=2", "each name once"), ("e=8", "give m"), ("m=x", "not name=number"), ("m=1,kind=odd", "kind is one of"), ("", "not name=number")],
)
def test_what_is_no_case_is_refused(text: str, said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        Case.parse(text)


def test_schedules_follow_from_case_and_seed() -> None:
    case = Case(1, 1, 256, 256)
    one = cases.schedule_of("random", case, 0)
    assert re.fullmatch(r"random:\d+", one)
    assert cases.schedule_of("random", case, 0) == one != cases.schedule_of("random", case, 1)
    assert re.fullmatch(r"pct:\d+:3", cases.schedule_of("pct", case, 0))
    assert [cases.schedule_of(name, case, 0) for name in ("eager", "lazy", "random:7")] == ["eager", "lazy", "random:7"]
    with pytest.raises(ProblemError, match="use one of eager"):
        cases.schedule_of("fair", case, 0)


# ---- the command


class Here:
    """Runs tasks in this process: quicker than a pool, and tasks see what a test changed."""

    def run(self, function: Any, tasks: Any, done: Any) -> None:
        for number in range(len(tasks)):
            done(number, *executor._outcome(function, tasks[number]))


@pytest.fixture
def run(
    artifacts_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """``densemoe verify --emulate --json`` on a copy: exit code, result, what it said beside."""
    monkeypatch.setattr(emulate_cli, "open_executor", lambda *_: Here())

    def call(*arguments: object) -> tuple[int, dict[str, Any], str]:
        code = cli.main(["verify", "--emulate", "--artifacts", str(artifacts_copy), "--json", "--jobs", "1", *map(str, arguments)])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else {}, said.err

    return call


def records(root: Path) -> dict[str, list[dict[str, Any]]]:
    manifest = ArtifactSet(root).manifest("sm_90a")
    return {key: [dict(each) for each in entry.verification] for key, entry in manifest.variants.items()}


def test_a_record_is_written_kept_and_shown(run: Any, artifacts_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, _ = run("--filter", "fc?.*bf16-bf16", "--cases", 2, "--seeds", 0, 3, "--schedules", "random", "eager")
    assert code == 0
    assert sorted(result["recorded"]) == [FC1, FC2]
    assert result["runs"] == 16
    document = json.loads((artifacts_copy / "sm_90a" / "manifest.json").read_text())
    jsonschema.validate(document, SCHEMA)
    (record,) = records(artifacts_copy)[FC1]
    stated = {name: record[name] for name in ("kind", "cases", "seeds", "schedules", "runs")}
    assert stated == {"kind": "emulated", "cases": 2, "seeds": [0, 3], "schedules": ["random", "eager"], "runs": 8}
    assert record["emulator"] == verify.emulator_digest()[:16]
    assert 0 < record["worst"] <= 1
    assert record["counters"]["products"]["mma.sync"] > 0
    assert cli.main(["verify", "--artifacts", str(artifacts_copy)]) == 0
    assert cli.main(["list", "--artifacts", str(artifacts_copy)]) == 0
    assert re.search(rf"{re.escape(FC1)} .* emulated \(2 cases, worst 0\.\d+\)", capsys.readouterr().out)
    assert cli.main(["show", FC1, "--artifacts", str(artifacts_copy)]) == 0
    shown = capsys.readouterr().out
    assert "emulated: cases 2" in shown
    assert "times the problem's" in shown
    # again: nothing to do; fewer cases do not replace the record
    code, result, _ = run("--filter", "fc?.*bf16-bf16", "--cases", 2, "--seeds", 0, 3, "--schedules", "random", "eager")
    assert (code, result["current"], result["runs"]) == (0, [FC1, FC2], 0)
    code, result, _ = run("--filter", FC1, "--cases", 1)
    assert (code, result["runs"], result["journaled"]) == (0, 0, 1)
    assert records(artifacts_copy)[FC1] == [record]
    # and one more seed runs that seed alone
    code, result, _ = run("--filter", FC1, "--cases", 2, "--seeds", 0, 3, 4, "--schedules", "random", "eager")
    assert (code, result["runs"], result["journaled"]) == (0, 4, 8)
    assert records(artifacts_copy)[FC1][0]["runs"] == 12


def test_a_wrong_output_names_variant_case_seed_schedule_and_the_command_that_repeats_it(
    run: Any, artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The PTX is changed where it is kept: FC1 multiplies by alpha twice."""
    monkeypatch.setattr(verify, "regenerate", _wrong)
    code, result, said = run("--filter", FC1, "--cases", 2, "--seeds", 5)
    assert code == 1
    assert result["recorded"] == {}
    assert records(artifacts_copy)[FC1] == []
    failure = result["failures"][0]
    assert (failure["key"], failure["seed"]) == (FC1, 5)
    assert failure["schedule"].startswith("random:")
    assert f"FAILED {FC1}, case {failure['case']}, seed 5, schedule {failure['schedule']}" in said
    assert "of its bound" in failure["error"]
    assert f"repeat: {failure['command']}" in said
    # the command repeats it, on the changed PTX that the first run kept
    command = shlex.split(failure["command"])
    assert command[0] == "densemoe"
    assert cli.main(command[1:]) == 1
    assert failure["case"] in capsys.readouterr().err


def _wrong(work: Any) -> str:
    """PTX whose last conversion to bf16 adds one to the value."""
    planned, _ = work
    ptx = verify.toolchain.compile_variant(planned.variant, planned.kernel).ptx
    line = next(each for each in reversed(ptx.split("\n")) if re.match(r"\s*cvt\.rn\.bf16x2?\.f32 ", each))
    found = re.match(r"(\s*)(cvt\.rn\.bf16x?2?\.f32) (\S+), (\S+?)(, (\S+))?;", line)
    assert found, line
    register = found[4]
    return ptx.replace(line, f"{found[1]}add.f32 {register}, {register}, 0f44800000;\n{line}")


def test_a_fault_of_the_emulator_is_a_failure_and_the_others_go_on(run: Any, artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "regenerate", _without_waits)
    code, result, _ = run("--filter", "*.t8x64.*bf16-bf16", "--cases", 1)
    assert code == 1
    assert list(result["recorded"]) == [FC2]
    assert re.search("read before it was written|that an asynchronous operation wrote, without synchronisation", result["failures"][0]["error"])


def _without_waits(work: Any) -> str:
    planned, _ = work
    ptx = verify.toolchain.compile_variant(planned.variant, planned.kernel).ptx
    if planned.variant.op != "fc1":
        return ptx
    return re.sub(r"mbarrier\.try_wait\S* (%p\d+), [^;]*;", r"mov.pred \1, -1;", ptx)


def test_sources_that_give_another_cubin_are_a_failure(run: Any, artifacts_copy: Path) -> None:
    """The record must be of the cubin that the set holds."""
    from densemoe.compile.build import _update_index
    from densemoe.runtime.manifest import Manifest

    folder = artifacts_copy / "sm_90a"
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes(), "m")
    entries = dict(manifest.variants)
    old = entries[PREPARE]
    values = {name: getattr(old, name) for name in type(old).__dataclass_fields__}
    entries[PREPARE] = type(old)(**{**values, "sha256": "0" * 64})
    data = replace(manifest, variants=entries).to_bytes()
    (folder / "manifest.json").write_bytes(data)
    _update_index(artifacts_copy, "sm_90a", data, len(entries))
    code, result, _ = run("--filter", "prepare*", "--cases", 1)
    assert code == 1
    (failure,) = result["failures"]
    assert failure["key"] == PREPARE
    assert "the set holds 000000000000" in failure["error"]
    assert list(result["recorded"]) == [key for key in PLANNED if key.startswith("prepare.sm90a") and key != PREPARE]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--emulate", "--filter", "fc9*"], 2, "matches no variant"),
        (["--emulate", "--arch", "sm_100f"], 2, "has no set for 'sm_100f': it has sm_90a"),
        (["--emulate", "--schedules", "fair"], 2, "use one of eager"),
        (["--emulate", "--case", "m=x"], 2, "not name=number"),
        (["--emulate", "--executor", "grid"], 3, "use local, or the address"),
        (["--cases", "3"], 2, "--cases belongs to --emulate"),
    ],
)
def test_wrong_usage(artifacts: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--artifacts", str(artifacts), *arguments]) == code
    assert said in capsys.readouterr().err


# ---- equal PTX


def subjects_of(root: Path, pattern: str) -> list[verify.Subject]:
    entries = ArtifactSet(root).manifest("sm_90a").variants.values()
    return [verify.Subject(entry, PLANNED[entry.key]) for entry in entries if re.search(pattern, entry.key)]


def test_equal_ptx_runs_once_and_both_records_point_to_it(artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two subjects that differ in their key alone: the digest leaves out the target, comments and the kernel's name."""
    (one,) = subjects_of(artifacts_copy, re.escape(PREPARE) + "$")
    ptx = verify.regenerate((one.planned, one.entry.sha256))
    other = ptx.replace(".target sm_90a", ".target sm_100f").replace(one.entry.symbol, "another_0")
    assert other != ptx
    assert verify.ptx_digest(other, "another_0") == verify.ptx_digest(ptx, one.entry.symbol)
    assert verify.ptx_digest(ptx.replace("add.s32", "sub.s32"), one.entry.symbol) != verify.ptx_digest(ptx, one.entry.symbol)
    (two,) = subjects_of(artifacts_copy, r"prepare.*i64-f32$")
    values = {name: getattr(one.entry, name) for name in type(one.entry).__dataclass_fields__}
    twin = verify.Subject(type(one.entry)(**{**values, "variant": replace(one.entry.variant, tile_n=8192)}), one.planned)
    texts = {one.entry.key: ptx, twin.entry.key: ptx.replace(one.entry.symbol, twin.entry.symbol), two.entry.key: ptx}
    result = verify.Result()
    units = verify._units([one, two, twin], texts, verify.Request(cases=2), result)
    assert [[each.entry.key for each in unit.subjects] for unit in units] == [[PREPARE, twin.entry.key], [two.entry.key]]
    assert result.shared == {twin.entry.key: PREPARE}
    units[0].outcomes = {run: {"worst": 0.5, "exemptions": 0, "needed_bytes": 1, "counters": {}} for run in units[0].runs()}
    assert "same_ptx_as" not in units[0].record(one)
    assert units[0].record(twin) == {**units[0].record(one), "same_ptx_as": PREPARE}


# ---- the journal


class Stop(verify.Progress):
    """Interrupts a verification after some runs."""

    def __init__(self, after: int) -> None:
        self.left = after

    def stage(self, what: str, total: int) -> None:
        self.counting = what == "emulating"

    def advance(self, what: str) -> None:
        self.left -= self.counting
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_verification_is_continued(artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects, request = subjects_of(artifacts_copy, PLAIN), verify.Request(cases=4)
    with pytest.raises(KeyboardInterrupt):
        verify.verify(artifacts_copy, subjects, request, open_executor(jobs=1), Stop(5))
    # what was finished is recorded, the rest is journaled
    assert [len(found) for key, found in records(artifacts_copy).items() if re.search(PLAIN, key)] == [1, 0]
    monkeypatch.setattr(verify, "regenerate", None)  # the PTX was kept
    subjects = subjects_of(artifacts_copy, PLAIN)
    result = verify.verify(artifacts_copy, subjects, request, open_executor(jobs=1))
    assert (result.runs, result.journaled, len(result.current)) == (3, 1, 1)
    # a torn line, as of a machine that lost power, is one run to do again; a changed one too
    for other in subjects:
        cli_record = records(artifacts_copy)[other.entry.key]
        assert cli_record[0]["cases"] == 4
    path = artifacts_copy / "sm_90a" / journals.FOLDER / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0].replace(b'"worst": 0', b'"worst": 9'), *lines[1:-1], lines[-1][:40]]))
    result = verify.verify(artifacts_copy, subjects_of(artifacts_copy, PLAIN), verify.Request(cases=4, seeds=(0, 1)), open_executor(jobs=1))
    assert (result.runs, result.journaled) == (10, 6)


@pytest.mark.parametrize("changed", ["emulator_digest", "judge_digest", "ptx"])
def test_what_a_run_depends_on_invalidates_it(artifacts_copy: Path, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(request: verify.Request) -> tuple[int, int, int]:
        result = verify.verify(artifacts_copy, subjects_of(artifacts_copy, re.escape(PREPARE) + "$"), request, Here())
        return result.runs, result.journaled, len(result.current)

    assert again(verify.Request(cases=2)) == (2, 0, 0)
    assert again(verify.Request(cases=2)) == (0, 0, 1)
    assert again(verify.Request(cases=3)) == (1, 2, 0)
    if changed == "ptx":
        real = verify.ptx_digest
        monkeypatch.setattr(verify, "ptx_digest", lambda ptx, symbol: real(ptx + ".", symbol))
        assert again(verify.Request(cases=4)) == (4, 0, 0)
        return
    from densemoe.compile.emulate import running

    for module in (verify, running):
        monkeypatch.setattr(module, changed, lambda: "1" * 64)
    assert again(verify.Request(cases=3)) == (3, 0, 0)


def test_a_worker_with_other_sources_ends_the_verification(artifacts_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from densemoe.compile.emulate import running

    monkeypatch.setattr(running, "emulator_digest", lambda: "0" * 64)
    with pytest.raises(BuildError, match="other sources of densemoe"):
        verify.verify(artifacts_copy, subjects_of(artifacts_copy, re.escape(PREPARE) + "$"), verify.Request(cases=2), Here())


def test_two_verifications_of_one_set_exclude_each_other(artifacts_copy: Path) -> None:
    with (
        journals.Journal(artifacts_copy / "sm_90a", ("a", "b")),
        pytest.raises(BuildError, match="another verification"),
        journals.Journal(artifacts_copy / "sm_90a", ("a", "b")),
    ):
        pass


def test_a_later_build_leaves_records_and_drops_those_of_changed_variants(run: Any, artifacts_copy: Path) -> None:
    from densemoe.compile import build

    run("--filter", "prepare*", "--cases", 1)
    before = records(artifacts_copy)
    assert build.build(matrix.load(), artifacts_copy, profile="quick").built == []
    assert records(artifacts_copy) == before
    (artifacts_copy / "sm_90a" / f"{PREPARE}.cubin").write_bytes(b"damaged")
    assert build.build(matrix.load(), artifacts_copy, profile="quick").built == [PREPARE]
    assert records(artifacts_copy)[PREPARE] == []


# ---- a cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "dask"
    folder.mkdir()
    started = Cluster(folder)
    yield started
    started.close()


class Kill(verify.Progress):
    """Kills a worker when some runs are done."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.done = cluster, 0

    def stage(self, what: str, total: int) -> None:
        self.counting = what == "emulating"

    def advance(self, what: str) -> None:
        self.done += self.counting
        if self.done == 2:
            self.cluster.workers[0].send_signal(signal.SIGKILL)


def test_a_cluster_that_loses_a_worker_gives_the_records_of_the_local_pool(artifacts_copy: Path, tmp_path: Path, cluster: Cluster) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(artifacts_copy, other)
    request = verify.Request(cases=4)
    here = verify.verify(other, subjects_of(other, PLAIN), request, open_executor(jobs=1))
    there = verify.verify(artifacts_copy, subjects_of(artifacts_copy, PLAIN), request, open_executor(cluster.address), Kill(cluster))
    assert cluster.workers[0].wait() == -signal.SIGKILL
    assert (there.runs, there.failures) == (here.runs, []) == (8, [])
    assert records(artifacts_copy) == records(other)
    assert len(records(other)[PREPARE]) == 1


def test_a_build_on_a_cluster_gives_the_same_set(artifacts: Path, tmp_path: Path, cluster: Cluster) -> None:
    out = tmp_path / "out"
    command = ["build", "--profile", "quick", "--filter", "prepare*", "--out", str(out), "--executor", cluster.address]
    assert cli.main(command) == 0
    assert {path.name: path.read_bytes() for path in (out / "sm_90a").glob("*.cubin")} == {
        path.name: path.read_bytes() for path in (artifacts / "sm_90a").glob("prepare*.cubin")
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--timeout", "nan"), "nan: use a positive number of seconds"),
        (("--timeout", "0"), "0: use a positive number of seconds"),
        (("--cases", "0"), "0: use a positive integer"),
        (("--seeds", "-1"), "-1: use an integer of at least 0"),
        (("--full", "--cases", "3"), "--full is the whole grid, --cases 3 a part of it: give one of them"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["verify", "--emulate", *options])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err
