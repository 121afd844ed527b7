"""``densemoe tune`` and ``bench`` as commands, on a simulated device: files, exit codes, absent competitors, sums that can be checked by hand."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from simulated_device import READ_BYTES_PER_MICROSECOND, SimulatedLoader, SimulatedPlan

from densemoe.runtime import bench, bench_cli, bench_competitors, bench_layer, bench_report, bench_timing, cli, select, tune_cli
from densemoe.runtime.bench_competitors import Absent, Unavailable, Workload
from densemoe.runtime.bench_device import Sensors
from densemoe.runtime.bench_timing import Sample, Timed, Timer, rotations
from densemoe.runtime.errors import DriverError, ProblemError
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import load_table
from densemoe.runtime.tune import Tuner
from densemoe.runtime.tune_cases import parse_shapes, worth_a_tile
from densemoe.runtime.variant import Variant

SHAPES = ["7x2x128x128", "5x1x256x64", "6x3x128x64"]
KEYS: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    f"fc{op}.sm90a.t{tile}x64.c1x1.{a}-{c}": ()
    for tile in (8, 16, 32)
    for op, a, c in ((1, "bf16", "bf16"), (2, "bf16", "bf16"), (1, "nvfp4", "nvfp4"), (2, "nvfp4", "bf16"))
}
KEYS |= {f"{op}.sm90a.t32x4096.c1x1.i32-f32{brings}": () for op in ("prepare", "route") for brings in ("", ".brings")}
KEYS |= {f"grouped{op}.sm90a.t{tile}.c1x1.bf16-bf16": () for op in ("fc1", "fc2") for tile in ("8x64", "16x64", "16x256", "32x256")}
KEYS |= {"groupedfc1.sm90a.t8x64.c1x1.bf16-nvfp4": (), "groupedfc2.sm90a.t8x64.c1x1.bf16-bf16": ()}
KEYS |= {f"fc1.sm90a.t{tile}x64.c1x1.bf16-nvfp4.rounded": () for tile in (8, 16, 32)}


SHIPPED: Any = load_table("sm_90a")
#: The shipped table's rules of the other ops, and forms and families that no measurement changes: WGMMA where it has the tile.
TABLE: Any = {
    **SHIPPED,
    "grouping": {
        "provenance": "modelled",
        "reason": "for these tests",
        "dense_to": 16,
        "tiles": [{"share_to": 6, "tile_m": 8}, {"share_to": 12, "tile_m": 16}, {"tile_m": 32}],
    },
    "rules": [rule for rule in SHIPPED["rules"] if not rule["op"].startswith("grouped")]
    + [
        {"op": f"grouped{op}", "m_from": 0, "m_to": 2**31 - 1, "tile": tile, "cluster": [1, 1], "provenance": "modelled", "reason": "for these tests"}
        for op in ("fc1", "fc2")
        for tile in ([16, 256], [32, 256], [8, 64])
    ],
}


def cost(key: str, settings: Mapping[str, int], problem: Problem) -> float:
    if problem.op == "prepare":
        return 1.5
    if problem.op == "route":
        return 2.5
    tile, width = (int(size) for size in key.split(".")[2].removeprefix("t").split("x"))
    if problem.group_tile:  # WGMMA is a tenth faster; both are slower than the other form while that needs one pass
        share = problem.m * problem.top_k / problem.experts
        return 6 + -(-share // tile) * (14 + tile * 2 / 3) * (0.9 if width == 256 else 1)
    return 3 + -(-problem.m // tile) * (10 + tile * 2 / 3)


Run = Callable[..., int]


@pytest.fixture(autouse=True)
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the device is left alone between replays: a simulated one needs none."""
    found: list[float] = []
    monkeypatch.setattr(bench_timing, "sleep", found.append)
    return found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line on the simulated device, in a folder of its own, without nvidia-smi."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    for module in (bench, bench_layer, select):
        monkeypatch.setattr(module, "load_table", lambda arch: TABLE)

    def run(
        *arguments: str,
        fault: Any = None,
        others: Sequence[Any] = (),
        table: Any = None,
        beside: Mapping[str, SimulatedLoader] = MappingProxyType({}),
    ) -> int:
        def opened(args: argparse.Namespace) -> Tuner:
            loader = SimulatedLoader(KEYS, cost, fault)
            loader.table = table or TABLE
            for other in (*others, *beside.values()):
                other.driver = loader.driver

            def say(line: str) -> None:
                print(line, file=sys.stderr)

            return Tuner(loader, args.device, rounds=args.rounds, say=say, clock=lambda: loader.driver.now / 1e6)  # type: ignore[arg-type]

        monkeypatch.setattr(tune_cli, "open_tuner", opened)
        monkeypatch.setattr(bench_competitors, "competitors", lambda: list(others))
        monkeypatch.setattr(bench_cli, "open_loader", lambda root: beside[root])
        return cli.main(list(arguments))

    return run


def wrong(key: str, problem: Problem, outputs: Mapping[str, np.ndarray]) -> None:
    if ".t8x64" in key:
        next(iter(outputs.values())).reshape(-1).view(np.uint8)[:] = 0x42


def test_tune_writes_a_table_that_check_agrees_with(command: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--models", *SHAPES, "--tokens", "1", "8", "16", "32")
    assert command("tune", *small, "--out", "table.json") == 0
    said = capsys.readouterr()
    assert "regret of the cost model on shapes held out: " in said.out
    assert "every case asked for" in said.out
    assert "regret of the form and tile of a layer: 12 cases, geomean 0.00%, worst 0.00%" in said.out
    shapes = parse_shapes(SHAPES)
    worth = [tile for shape in shapes for m in (1, 8, 16, 32) for tile in (8, 16, 32) if m == 1 or worth_a_tile(shape, m, tile)]
    nvfp4 = 3 * 4  # shapes and M of the one tile of FC1 with NVFP4 output; FC2 is that of bf16 layers
    assert f"[1/{96 + 2 * len(worth) + nvfp4}]" in said.err
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["provenance"]["whole"] is True
    assert table["provenance"]["read_bytes_per_second"] == pytest.approx(READ_BYTES_PER_MICROSECOND * 1e6, rel=0.02)
    both = 2 * sum(2 if tile == 16 else 1 for tile in worth)  # tiles of 16 are of both families
    assert table["provenance"]["measurements"] == 96 * 3 + both + nvfp4
    assert len(table["shapes"]) == 3 * 4 * 2 + 3 * 3 * 2 + 3
    rows = table["shapes"]["groupedfc1 7x128x128 bf16-bf16 t16"]
    assert {table["keys"][row[1]][0] for row in rows} == {"groupedfc1.sm90a.t16x256.c1x1.bf16-bf16"}
    # 16 tokens in one tile are faster than gathered, 32 are not; rows of an expert at M = 32: 6.4, 9.1 and 16; tiles of 8 and 16 are as fast at 6.8
    # tiles of 32 were measured at one token, and are for what lies beyond
    grouping = {"dense_to": 16, "tiles": [{"share_to": 6.846, "tile_m": 8}, {"share_to": 16.0, "tile_m": 16}, {"tile_m": 32}]}
    assert {name: table["grouping"][name] for name in grouping} == grouping
    assert table["grouping"]["provenance"] == "measured"
    assert "12 points of 3 shapes: regret geomean 0.00%" in table["grouping"]["reason"]
    assert command("tune", "--check", "--table", "table.json", *small, "--sample", "10") == 0
    said = capsys.readouterr()
    count = re.search(r"PASS: (\d+) cases, regret geomean 0.00%", said.out)
    assert count is not None
    assert int(count[1]) > 10
    assert "form and tile of a layer: regret of 1 cases, geomean 0.00%" in said.out
    assert "groupedfc1 " in said.out
    few = ("--models", *SHAPES, "--tokens", "32", "--form", "active", "--a-dtype", "bf16", "--sample", "1")
    late = {**table, "grouping": {**table["grouping"], "dense_to": 32}}
    (tmp_path / "late.json").write_text(json.dumps(late))
    assert command("tune", "--check", "--table", "late.json", *few) == 1
    said = capsys.readouterr()
    assert "M = 32: active experts)" in said.out
    slow = {**table, "keys": [[key.replace("t16x", "t8x").replace("t32x", "t8x"), own] for key, own in table["keys"]]}
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    assert command("tune", "--check", "--table", "slow.json", *small, "--sample", "10", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert found["worst"] > 0.1
    assert found["provenance"]["device"] == "Simulated"


def test_tune_says_what_failed(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("tune", "--models", SHAPES[0], "--tokens", "8", "--form", "dense", "--a-dtype", "bf16", "--fresh")
    assert command(*options, "--json", fault=wrong) == 1
    found = json.loads(capsys.readouterr().out)
    assert {each["candidate"] for each in found["failures"]} == {"fc1.sm90a.t8x64.c1x1.bf16-bf16", "fc2.sm90a.t8x64.c1x1.bf16-bf16"}
    assert command("tune", "--check", "--models", SHAPES[0], "--tokens", "8", fault=wrong) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tune", "--budget", "0"), "--budget 0.0: use a positive"),
        (("tune", "--models", "nosuch"), "no known model"),
        (("tune", "--device", "1"), "there is no device 1"),
        (("bench", "ops", "--sustained", "-1"), "--sustained -1.0"),
        (("bench", "startup", "--tokens", "8"), "bench startup has no --tokens"),
        (("bench", "startup", "--no-competitors"), "bench startup has no --competitors"),
        (("bench", "ops", "--from", "missing.json"), "no benchmark document"),
        (("bench", "launch", "--beside", "older"), "bench launch has no --beside"),
        (("bench", "startup", "--beside", "older"), "bench startup has no --beside"),
    ],
)
def test_what_cannot_be_is_refused(command: Run, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*arguments) in (2, 3)
    assert said in capsys.readouterr().err


def test_options_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("tune", "--rounds", "0"), ("tune", "--tokens", "0"), ("tune", "--check", "--sample", "0")):
        assert cli.main(list(arguments)) == 2
        assert "positive integer" in capsys.readouterr().err


def test_without_a_device_nothing_is_claimed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise DriverError("no CUDA driver on this machine")

    monkeypatch.setattr("densemoe.runtime.driver.Driver.__init__", lambda self: none())
    for arguments in (["tune"], ["bench", "ops"], ["bench", "launch"], ["bench", "selection"]):
        assert cli.main(arguments) == 3
        assert "no CUDA driver" in capsys.readouterr().err


class Fixed:
    """A competitor that takes ten microseconds."""

    def __init__(self, name: str) -> None:
        self.name, self.works, self.driver = name, [], None  # type: ignore[var-annotated]

    def prepare(self, work: Workload) -> Timed:
        self.works.append(work)
        if work.what == "fc2":
            raise RuntimeError("it has no FC2\nsecond line")

        def launch(stream: int) -> None:
            self.driver.spend(10.0)

        return Timed(launch, 1)

    def release(self) -> None:
        self.works.clear()


class Ending(Fixed):
    """At the third point the process is asked to end; what stood in the folder until then."""

    def __init__(self, folder: Path) -> None:
        super().__init__("other")
        self.folder, self.kept = folder, []  # type: ignore[var-annotated]

    def prepare(self, work: Workload) -> Timed:
        if len(self.works) == 2:
            self.kept += [each["m"] for each in bench_report.read(self.folder / "layer-simulated.partial.json")["rows"]]
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(work)


def test_a_bench_that_is_ended_has_written_what_it_measured(command: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM, which `timeout` sends, as Ctrl-C; and rows are kept as they come, for what cannot be caught."""
    before = signal.getsignal(signal.SIGTERM)
    ending = Ending(tmp_path / "out")
    options = ("--models", SHAPES[0], "--tokens", "1", "8", "16", "--form", "active", "--a-dtype", "bf16", "--out", "out")
    assert command("bench", "layer", *options, others=[ending]) == 130
    assert ending.kept == [1, 8]
    assert signal.getsignal(signal.SIGTERM) is before
    assert [row["m"] for row in json.loads((tmp_path / "out" / "layer-simulated.json").read_text())["rows"]] == [1, 8]
    assert not (tmp_path / "out" / "layer-simulated.partial.json").exists()
    assert "interrupted" in capsys.readouterr().err


def test_the_report_says_how_much_of_a_search_was_made() -> None:
    rows = [
        {"searched": {"Humming": {"fc1": [17, 17], "fc2": [17, 17]}, "Triton NVFP4": {"fc1": [12, 12]}}},
        {"searched": {"Triton NVFP4": {"fc1": [3, 24]}}},
    ]
    found = bench_report._searched({"rows": rows})
    assert found == {"Humming": "all 17", "Triton NVFP4": "those tried within the time given, 3 of 24 where fewest,"}


@pytest.mark.parametrize("what", ["ops", "layer"])
def test_bench_puts_everything_side_by_side(command: Run, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [Fixed("other"), Absent("Humming", "humming-kernels is not installed")]
    options = ("--models", *SHAPES[:2], "--tokens", "8", "1", "--a-dtype", "bf16")
    assert command("bench", what, *options, "--out", "out", others=others) == 0
    said = capsys.readouterr()
    assert "Absent: Humming: humming-kernels is not installed." in said.out
    assert "absent, its column stays empty: Humming" in said.err
    document = json.loads((tmp_path / "out" / f"{what}-simulated.json").read_text())
    rows = document["rows"]
    assert [row["m"] for row in rows[:2]] == [1, 8]
    assert len(rows) == 2 * 2 * 2 * (2 if what == "ops" else 1)
    for row in rows:
        assert row["passed"], row
        launches = 1 if what == "ops" else 2
        keys = [row["variant"]] if what == "ops" else row["variant"]
        tiles = [Variant.parse(key).tile_m for key in keys]
        assert row["us"]["densemoe"] == pytest.approx(sum(13 + tile * 2 / 3 for tile in tiles), rel=1e-3)
        aligned = row["weight_bytes"] // 128 * 128
        assert row["us"]["read-only"] == pytest.approx(launches * 2 + aligned / READ_BYTES_PER_MICROSECOND, abs=0.01)
        assert row["share_of_read"]["densemoe"] == pytest.approx(row["us"]["read-only"] / row["us"]["densemoe"], rel=1e-3)
        if what == "layer":
            assert row["us"]["densemoe with prepare"] == pytest.approx(row["us"]["densemoe"] + 1.5, rel=1e-3)
        assert ("other" in row["us"]) == (row["op"] != "fc2")
        if row["op"] == "fc2":
            assert row["missing"]["other"] == "RuntimeError: it has no FC2"
        assert row["missing"]["Humming"] == "humming-kernels is not installed"
        gathered = {name for name in row["us"] if name.startswith("gathered")}
        share = row["m"] * row["shape"]["top_k"] / row["shape"]["experts"]
        tiles = [tile for tile in ("8x64", "16x64", "16x256", "32x256") if share >= int(tile.split("x")[0]) / 8 or tile == "8x64"]
        wanted = {f"gathered t{tile}" for tile in tiles} if what == "ops" else {f"gathered t{tile.split('x')[0]} with route" for tile in tiles}
        assert gathered == (wanted if row["active"] else set())
        # up to 16 tokens the layer op lists active experts
        if what == "ops":
            assert row["same"] == {"densemoe chosen form": "densemoe"}
            assert row["us"]["densemoe chosen form"] == row["us"]["densemoe"]
        elif row["active"]:
            assert row["us"]["densemoe whole layer"] == row["us"]["densemoe with prepare"]
            assert row["us"]["gathered t8 with route"] == pytest.approx(2.5 + 2 * (6 + 14 + 16 / 3), rel=1e-3)
        else:
            assert "densemoe whole layer" not in row["us"]
    active = [row for row in rows if row["active"] and row["m"] == 1]
    dense = [row for row in rows if not row["active"] and row["m"] == 1]
    assert active[0]["weight_bytes"] < dense[0]["weight_bytes"]
    text = (tmp_path / "out" / f"{what}-simulated.md").read_text()
    assert "| shape | M | densemoe |" in text
    assert "Humming" in text.split("| --- |")[0].splitlines()[-1]
    names = {path.name for path in (tmp_path / "out").glob("*.svg")}
    drawn = [f"{op}-{form}" for op in (("fc1", "fc2") if what == "ops" else ("layer",)) for form in ("active", "dense")]
    assert names == {f"{what}-simulated-{each}{kind}.svg" for each in drawn for kind in ("", "-roofline")}
    heads = [line.split(":")[0].split(", ") for line in text.splitlines() if line.startswith("## ")]
    forms = {"active": "active experts", "dense": "dense over all experts"}
    assert sorted(heads) == sorted([f"## {op}", "bf16 to bf16", forms[form]] for op, form in (each.split("-") for each in drawn))


@pytest.mark.parametrize("what", ["ops", "layer"])
def test_beyond_16_tokens_the_chosen_form_gathers(command: Run, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--models", SHAPES[1], "--tokens", "16", "32", "64", "--form", "active", "--a-dtype", "bf16", "--out", "out")
    assert command("bench", what, *options) == 0
    rows = json.loads((tmp_path / "out" / f"{what}-simulated.json").read_text())["rows"]
    name = "densemoe chosen form" if what == "ops" else "densemoe whole layer"
    listed, tile = ("densemoe", "16x256") if what == "ops" else ("densemoe with prepare", "16 with route")
    for row in rows:
        # 5 experts of one a token: 6.4 rows at M = 32, which the table gives tiles of 16; 12.8 at M = 64, tiles of 32
        gathered = f"gathered t{tile if row['m'] == 32 else tile.replace('16', '32', 1)}"
        assert row["same"] == {name: listed if row["m"] == 16 else gathered}
        assert row["us"][name] == row["us"][row["same"][name]]
        assert row["share_of_read"][name] == row["share_of_read"][row["same"][name]]
    one = next(row for row in rows if row["m"] == 32)["us"][name]
    gemm = 6 + (14 + 16 * 2 / 3) * 0.9
    assert one == pytest.approx(gemm if what == "ops" else 2.5 + 2 * gemm, rel=1e-3)
    head = next(line for line in (tmp_path / "out" / f"{what}-simulated.md").read_text().splitlines() if line.startswith("| shape"))
    named = [cell.strip() for cell in head.split("|")[3:-1]]
    ours = ["densemoe", name] if what == "ops" else ["densemoe", name, "densemoe with prepare"]
    assert named[: len(ours)] == ours
    gathered_columns = [each for each in named if each.startswith("gathered")]
    assert gathered_columns == sorted(gathered_columns, key=lambda each: [int(part) for part in re.findall(r"\d+", each)])
    assert named.index("read-only") == len(ours) + len(gathered_columns)
    assert named[-4:] == ["T_read / T", "T_roofline / T", f"T_read / T {name}", f"T_roofline / T {name}"]
    assert cli.main(["bench", what, "--from", f"out/{what}-simulated.json", "--out", "again"]) == 0
    assert (tmp_path / "again" / f"{what}-simulated.md").read_text() == (tmp_path / "out" / f"{what}-simulated.md").read_text()


@pytest.mark.parametrize("what", ["ops", "layer"])
def test_nvfp4_layers_gather_too(command: Run, what: str, tmp_path: Path) -> None:
    options = ("--models", SHAPES[0], "--tokens", "9", "20", "--form", "active", "--a-dtype", "nvfp4", "--out", "out")
    assert command("bench", what, *options) == 0
    rows = json.loads((tmp_path / "out" / f"{what}-simulated.json").read_text())["rows"]
    name, gathered = ("densemoe chosen form", "gathered t8x64") if what == "ops" else ("densemoe whole layer", "gathered t8 with route")
    for row in rows:
        assert row["passed"], row
        assert gathered in row["us"]
        assert (row["same"][name] == gathered) == (row["m"] == 20)


def half(key: str, settings: Mapping[str, int], problem: Problem) -> float:
    return cost(key, settings, problem) / 2


BESIDE = ("--models", SHAPES[0], "--tokens", "8", "--form", "active", "--a-dtype", "bf16", "--no-competitors", "--json")


def older(fault: Any = None, keys: Any = KEYS) -> SimulatedLoader:
    loader = SimulatedLoader(keys, half, fault)
    loader.table = TABLE
    return loader


@pytest.mark.parametrize("what", ["ops", "layer"])
def test_another_artifact_root_stands_beside_ours(command: Run, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"set/older": older()}
    assert command("bench", what, *BESIDE, "--beside", "set/older", "--out", "out", beside=sets) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["beside"].keys() == {"older"}
    for row in found["rows"]:
        ours = [name for name in row["us"] if f"older: {name}" in row["us"]]
        assert {"densemoe", *(["densemoe with prepare"] if what == "layer" else [])} < set(ours)
        assert any(name.startswith("gathered") for name in ours)
        for name in ours:
            assert row["us"][f"older: {name}"] == pytest.approx(row["us"][name] / 2, rel=0.01)
    (text,) = (tmp_path / "out").glob("*.md")
    assert "Columns that begin with older: set " in text.read_text()
    assert "| densemoe | older: densemoe | " in text.read_text().replace("densemoe chosen form | ", "").replace("densemoe whole layer | ", "")
    assert sets["set/older"].open_plans == 0


def test_a_root_without_a_kernel_leaves_the_column_empty(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """It has grouped kernels, but sorts only a router's choice of 64-bit numbers."""
    sets = {"set/older": older(keys={key.replace("4096.c1x1.i32", "4096.c1x1.i64") if key.startswith("route") else key: KEYS[key] for key in KEYS})}
    assert command("bench", "layer", *BESIDE, "--beside", "set/older", beside=sets) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert "older: densemoe" in row["us"]
    assert not any(name.startswith("older: gathered") for name in row["us"])
    assert "no variant runs route" in row["missing"]["older: gathered t8 with route"]
    assert sets["set/older"].open_plans == 0


def test_a_root_of_grouped_kernels_alone_is_measured_in_their_columns(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A change of one kernel is judged without building the others."""
    sets = {"set/older": older(keys={key: KEYS[key] for key in KEYS if key.startswith("grouped")})}
    assert command("bench", "ops", *BESIDE, "--beside", "set/older", beside=sets) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        gathered = [name for name in row["us"] if name.startswith("gathered")]
        assert gathered
        assert {f"older: {name}" for name in gathered} <= set(row["us"])
        assert "older: densemoe" not in row["us"]
        assert "no variant runs fc" in row["missing"]["older: densemoe"]
    assert sets["set/older"].open_plans == 0


def test_a_name_is_given_to_a_root(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"a/set": older(), "b/set": older()}
    assert command("bench", "ops", *BESIDE, "--beside", "one=a/set", "--beside", "b/set", beside=sets) == 0
    assert json.loads(capsys.readouterr().out)["beside"].keys() == {"one", "set"}
    assert command("bench", "ops", *BESIDE, "--beside", "a/set", "--beside", "b/set", beside=sets) == 2
    assert "another root is called set already; give it a name, as in --beside new=b/set" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["ops", "layer"])
def test_a_wrong_kernel_of_another_root_fails_the_run(command: Run, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("bench", what, *BESIDE, "--beside", "older", beside={"older": older(wrong)}) == 1
    assert any(row["passed"] is False for row in json.loads(capsys.readouterr().out)["rows"])


@pytest.mark.parametrize("what", ["ops", "layer"])
def test_what_another_root_lacks_leaves_its_column_empty(command: Run, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = {key: own for key, own in KEYS.items() if not key.startswith("fc2")}
    assert command("bench", what, *BESIDE, "--beside", "older", beside={"older": older(keys=few)}) == 0
    row = json.loads(capsys.readouterr().out)["rows"][-1]
    assert "older: densemoe" not in row["us"]
    assert "fc2" in row["missing"]["older: densemoe"]


def test_weights_of_another_layout_cannot_be_shared(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    other = older()
    for each in other.variants.values():
        each.layout = "sm90a-superblock/1"
    assert command("bench", "ops", *BESIDE, "--beside", "older", beside={"older": other}) == 2
    assert "--beside older: its fc1 reads weights packed as sm90a-superblock/1, ours as sm90a-superblock/2" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["ops", "layer"])
def test_bench_finds_a_wrong_grouped_kernel(command: Run, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedPlan, "grouped", lambda self, a, weights: np.full(self.array("c").shape, 3.0))
    assert command("bench", what, "--models", SHAPES[0], "--tokens", "8", "--form", "active", "--a-dtype", "bf16") == 1
    assert "FAILED" in capsys.readouterr().out


def test_bench_layer_finds_a_wrong_route(command: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = SimulatedPlan.compute

    def wrong_scales(self: SimulatedPlan) -> None:
        real(self)
        if self.problem.op == "route":
            self.array("row_alpha")[:2] = self.array("row_alpha")[1::-1] * 1.001

    monkeypatch.setattr(SimulatedPlan, "compute", wrong_scales)
    assert command("bench", "layer", "--models", SHAPES[0], "--tokens", "8", "--form", "active", "--a-dtype", "bf16") == 1
    assert "gathered t8 with route: route over tiles of 8: its tiles, rows or scales are not the reference's" in capsys.readouterr().out


def test_bench_finds_a_wrong_kernel(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("ops", "layer"):
        assert command("bench", what, "--models", SHAPES[0], "--tokens", "1", "--form", "dense", "--a-dtype", "bf16", fault=wrong) == 1
        assert "FAILED" in capsys.readouterr().out


def test_bench_draws_an_earlier_run_anywhere(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--models", SHAPES[0], "--tokens", "1", "8", "--form", "dense", "--a-dtype", "bf16")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    assert command("bench", "ops", *options, "--out", "first") == 0
    assert "no plots: matplotlib is not installed; `densemoe bench ops --from first/ops-simulated.json`" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", real)
    monkeypatch.setattr(tune_cli, "open_tuner", lambda args: pytest.fail("no device is needed"))
    assert cli.main(["bench", "ops", "--from", "first/ops-simulated.json", "--out", "second"]) == 0
    svg = (tmp_path / "second" / "ops-simulated-fc1.svg").read_bytes()
    assert cli.main(["bench", "ops", "--from", "first/ops-simulated.json", "--out", "third"]) == 0
    assert (tmp_path / "third" / "ops-simulated-fc1.svg").read_bytes() == svg
    for name in ("json", "md"):
        assert (tmp_path / "second" / f"ops-simulated.{name}").read_bytes() == (tmp_path / "first" / f"ops-simulated.{name}").read_bytes()


def test_bench_selection_measures_other_shapes(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--models", SHAPES[0], "--tokens", "4", "12", "--form", "dense", "--a-dtype", "bf16", "--json")
    assert command("bench", "selection", *options) == 0
    assert json.loads(capsys.readouterr().out)["what"] == "selection"


def test_bench_selection_judges_forms_and_tiles(command: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--models", SHAPES[2], "--tokens", "12", "40", "--form", "active", "--a-dtype", "bf16", "--json")
    assert command("bench", "selection", *options) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    cases = [row["case"] for row in found["rows"]]
    assert sum("gathered, tile" in case for case in cases) == 2 * 2 * 3  # 6 and 20 rows an expert fill an eighth of every tile
    assert {row["chosen"].split(".")[2] for row in found["rows"] if "tile 16" in row["case"]} == {"t16x256"}
    forms = {row["case"]: row["chosen"] for row in found["forms"]["rows"]}
    assert forms == {f"{SHAPES[2]} M = 12": "active experts", f"{SHAPES[2]} M = 40": "gathered, tile 32"}
    assert found["forms"]["cases"] == 2


def test_bench_launch_has_its_bar(command: Run, tmp_path: Path) -> None:
    assert command("bench", "launch", "--out", "out") == 0
    rows = json.loads((tmp_path / "out" / "launch-simulated.json").read_text())["rows"]
    assert rows[0]["bar"] == "<= 4 us"
    assert rows[0]["us"] == pytest.approx(13 + 16 / 3)


def test_replays_are_rested_and_warm_before_they_are_timed(rests: list[float]) -> None:
    """A long replay leaves the next one alone as long as it took, up to 10 ms; what comes behind a rest is replayed once and not counted."""
    loader = SimulatedLoader(KEYS, cost)
    timer, driver = Timer(loader.driver), loader.driver  # type: ignore[arg-type]
    order: list[str] = []

    def lasting(name: str, microseconds: float) -> Timed:
        def replay(stream: int) -> None:
            driver.now += microseconds * (1 if order[-1:] == [name] else 3)  # slow where another one was before
            order.append(name)

        return Timed(replay, 10)

    found = timer.interleave({"long": lasting("long", 40_000), "short": lasting("short", 1_000)}, 2)
    assert order == ["long", "long", "short", "short"] * 3
    assert (found["long"].microseconds, found["short"].microseconds) == (4_000, 100)
    assert found["long"].runs == 2
    assert rests == pytest.approx([0, 0.01, *[0.001, 0.01] * 2])


def test_sustained_times_are_those_of_the_second_half() -> None:
    loader = SimulatedLoader(KEYS, cost)
    timer, driver = Timer(loader.driver), loader.driver  # type: ignore[arg-type]

    def slower(stream: int) -> None:
        driver.now += 10.0 if driver.now < 500 else 20.0

    sample = timer.sustain(Timed(slower, 2), 1.5e-3, lambda: driver.now / 1e6)
    assert sample.microseconds == pytest.approx(10)
    assert sample.runs == 50


def test_rotations_read_two_caches_and_one_more() -> None:
    assert rotations(100, 60) == 3
    assert rotations(10, 60) == 13
    assert rotations(0, 10**6) == 256


def test_a_sample_needs_a_time_and_has_quartiles() -> None:
    with pytest.raises(ProblemError, match="at least one round"):
        Sample.of([], 1)
    sample = Sample.of([5, 1, 2, 4, 3], 8)
    assert (sample.low, sample.microseconds, sample.high, sample.runs) == (2, 3, 4, 5)
    assert sample.spread == pytest.approx(2 / 3)
    assert Sample.of([2.0], 1).spread == 0


def test_every_competitor_has_a_column_where_torch_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench_competitors.competitors()
    assert tuple(each.name for each in found) == bench_competitors.NAMES
    assert all(isinstance(each, Absent) and each.reason for each in found)
    with pytest.raises(Unavailable):
        found[0].prepare(Workload("fc1", None, 1, []))  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert all("not installed" in each.reason for each in bench_competitors.competitors())  # type: ignore[attr-defined]


def test_sensors_never_guess(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    driver: Any = SimulatedLoader(KEYS, cost).driver
    assert set(Sensors(driver, 0).read().values()) == {None}
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '1980, 3201, 412.50, 700.00, 41, 580.159.01'\n")
    smi.chmod(0o755)
    found = Sensors(driver, 0).read()
    assert (found["sm_mhz"], found["power_w"], found["nvidia_driver"], found["source"]) == (1980, 412.5, "580.159.01", "nvidia-smi")
    smi.write_text("#!/bin/sh\necho '1980, [N/A], [N/A], 700.00, 41, 580.1'\n")
    assert Sensors(driver, 0).read()["power_w"] is None


def test_a_document_that_is_none_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"schema": 2, "rows": []}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ProblemError, match="no benchmark document"):
            bench_report.read(tmp_path / "x.json")
