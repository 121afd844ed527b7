"""``densemoe run`` and the quick start's layer on a driver whose memory is the host's: the reference stands in for the kernels."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from densemoe.compile import kernels, matrix
from densemoe.runtime import cli, packing, reference, runner
from densemoe.runtime.errors import DriverError
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import bf16_values, convert, pack_codes, quantise_rows
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import Choice, load_table, select

NUMPY = {"u8": np.uint8, "e4m3": np.uint8, "e5m2": np.uint8, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}
Fault = Callable[[Problem, Mapping[str, np.ndarray]], None]


class HostDriver:
    """Memory at made-up addresses; streams, events and graphs that do nothing."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.next = 1 << 20

    def at(self, pointer: int) -> np.ndarray:
        base = max(each for each in self.blocks if each <= pointer)
        return self.blocks[base][pointer - base :]

    def allocate(self, nbytes: int) -> int:
        pointer, self.next = self.next, self.next + nbytes + 4096
        self.blocks[pointer] = np.zeros(nbytes, dtype=np.uint8)
        return pointer

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    def fill(self, pointer: int, value: int, nbytes: int) -> None:
        self.at(pointer)[:nbytes] = value

    def to_device(self, pointer: int, data: np.ndarray) -> None:
        self.at(pointer)[: data.nbytes] = data

    def to_host(self, data: np.ndarray, pointer: int) -> None:
        data[:] = self.at(pointer)[: data.nbytes]

    def device_name(self, device: int) -> str:
        return "Host"

    def version(self) -> int:
        return 13000

    def device_count(self) -> int:
        return 1

    def attribute(self, name: str, device: int) -> int:
        assert name == "L2_CACHE_SIZE"
        return 1 << 20

    def elapsed(self, start: Any, end: Any) -> float:
        return 0.5

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in ("use_device", "synchronize", "stream", "event", "record", "begin_capture", "end_capture", "launch_graph"):
            raise AttributeError(name)
        return lambda *arguments: 0


class HostPlan:
    """Reads what the addresses hold, computes the contract, writes the outputs."""

    def __init__(self, driver: HostDriver, problem: Problem, tensors: Mapping[str, int], fault: Fault | None, layout: str) -> None:
        self.driver, self.problem, self.tensors, self.fault, self.layout = driver, problem, tensors, fault, layout
        self.key = f"{problem.op}.host"
        self.closed = False

    def array(self, role: str) -> np.ndarray:
        spec = self.problem.tensors()[role]
        return self.driver.at(self.tensors[role])[: spec.nbytes].view(NUMPY[spec.dtype]).reshape(spec.shape)

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """(codes, tiled scales) of the contract, from the layout that the kernel reads."""
        problem = self.problem
        shape = (problem.experts, problem.hidden, problem.intermediate)
        memory = self.driver.at(self.tensors["b"])
        if self.layout == packing.INTERCHANGE_LAYOUT:
            return packing.interchange_parts(problem.op, memory[: packing.interchange_bytes(problem.op, *shape)], *shape)
        unpack = packing.unpack_fc1 if problem.op == "fc1" else packing.unpack_fc2
        codes, scales = unpack(memory[: packing.packed_bytes(problem.op, *shape)], *shape)
        return codes, tile_scales(scales.reshape(-1, scales.shape[-1]))

    def launch(self, stream: int = 0) -> None:
        problem = self.problem
        weights = reference.Weights(problem.op, *self.weights(), problem.experts)
        if problem.a_dtype == "bf16":
            a = bf16_values(self.array("a")).astype(np.float64)
        else:
            a = reference.activation_values(self.array("a.codes"), self.array("a.scales"))
        alpha = self.array("alpha").astype(np.float64)
        outputs = {role: self.array(role) for role, spec in problem.tensors().items() if spec.output}
        if problem.op == "fc2":
            c = reference.fc2(a, weights, alpha, problem.experts, problem.intermediate).c
            outputs["c"][:] = convert(c.astype(np.float32), problem.c_dtype)
        else:
            post = self.array("alpha_post").astype(np.float64) if problem.alpha_post else None
            y = reference.fc1(a, weights, alpha, range(problem.experts), post).y.astype(np.float32)
            if problem.c_dtype == "nvfp4":
                plain, own_scales = quantise_rows(y, self.array("output_multiplier")[0])
                outputs["c.codes"][:], outputs["c.scales"][:] = pack_codes(plain), tile_scales(own_scales)
            else:
                outputs["c"][:] = convert(y, problem.c_dtype)
        if self.fault is not None:
            self.fault(problem, outputs)

    def close(self) -> None:
        self.closed = True


@cache
def entries_of(arch: str) -> types.SimpleNamespace:
    """A manifest's entries, as far as a run looks at them."""
    entries = {}
    for each in matrix.load().profile("full"):
        if each.variant.arch == arch:
            module = kernels.load(each.kernel)
            facts = {"variant": each.variant, "layout": module.WEIGHT_LAYOUT, "recipe": module.recipe(each.variant)}
            entries[each.variant.key] = types.SimpleNamespace(key=each.variant.key, **facts)
    return types.SimpleNamespace(variants=entries)


class HostLoader:
    """Plans over HostDriver, for the sets' real variants."""

    def __init__(self, fault: Fault | None = None, arch: str = "sm_90a") -> None:
        self.driver, self.fault, self.arch = HostDriver(), fault, arch
        self.plans: list[HostPlan] = []
        self.settings: list[Mapping[str, int] | None] = []

    def manifest(self, device: int) -> types.SimpleNamespace:
        return entries_of(self.arch)

    def select(self, problem: Problem, device: int, variant: str | None = None) -> Choice:
        return select(problem, [entry.variant for entry in self.manifest(device).variants.values()], load_table(self.arch), variant)

    def plan(
        self,
        problem: Problem,
        tensors: Mapping[str, int],
        device: int,
        variant: str | None = None,
        settings: Mapping[str, int] | None = None,
    ) -> HostPlan:
        assert set(tensors) == {*problem.tensors(), "b"}
        layout = self.manifest(device).variants[self.select(problem, device, variant).variant.key].layout
        self.settings.append(settings)
        self.plans.append(HostPlan(self.driver, problem, tensors, self.fault, layout))
        return self.plans[-1]


def run(problem: Problem, fault: Fault | None = None, arch: str = "sm_90a", **options: Any) -> tuple[runner.RunReport, HostLoader]:
    loader = HostLoader(fault, arch)
    report = runner.run_single(loader, problem, **{"iterations": 0, **options})  # type: ignore[arg-type]
    return report, loader


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
@pytest.mark.parametrize("c_dtype", ["nvfp4", "bf16", "f16", "f32"])
def test_fc1_passes_with_the_contract_as_kernel(a_dtype: str, c_dtype: str) -> None:
    report, loader = run(Problem("fc1", 5, 3, 128, 64, a_dtype, c_dtype, alpha_post=True))
    assert report.passed
    assert (report.checked_columns, report.columns) == (192, 192)
    assert loader.driver.blocks == {}
    assert all(plan.closed for plan in loader.plans)


@pytest.mark.parametrize("scalar", [False, True])
def test_fc2_passes_with_the_contract_as_kernel(scalar: bool) -> None:
    for a_dtype, c_dtype in (("bf16", "bf16"), ("nvfp4", "f16"), ("bf16", "f32")):
        report, _ = run(Problem("fc2", 5, 3, 128, 64, a_dtype, c_dtype, scalar_alpha=scalar))
        assert report.passed, c_dtype
        assert report.checked_columns == 128


def wrong(problem: Problem, outputs: Mapping[str, np.ndarray]) -> None:
    first = next(iter(outputs.values())).reshape(-1)
    first[0] = first[0] ^ 0x1000 if first.dtype == np.uint16 else first[0] + 1


@pytest.mark.parametrize(
    "problem", [Problem("fc1", 5, 3, 128, 64, "bf16", "bf16"), Problem("fc1", 5, 3, 128, 64, "bf16", "f32"), Problem("fc2", 5, 3, 128, 64)]
)
def test_one_wrong_element_fails(problem: Problem) -> None:
    report, _ = run(problem, wrong)
    assert report.passed is False
    assert report.mismatches == 1


def test_columns_are_sampled_where_the_reference_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LARGEST_CHECK", 5 * 128 * 2 * 16 * 3)
    report, _ = run(Problem("fc1", 5, 3, 128, 64, "bf16", "nvfp4"))
    assert report.passed
    assert report.checked_columns == 48
    monkeypatch.setattr(runner, "LARGEST_CHECK", 1)
    report, _ = run(Problem("fc2", 5, 3, 128, 64))
    assert report.passed
    assert report.checked_columns == 16


def test_m_zero_passes_with_nothing_compared_or_timed() -> None:
    report, _ = run(Problem("fc1", 0, 2, 128, 64), iterations=4)
    assert report.passed
    assert report.microseconds is None


def test_copies_of_cold_weights_exceed_the_l2_twice() -> None:
    problem = Problem("fc1", 5, 3, 128, 64)
    report, loader = run(problem, iterations=4)
    assert (report.copies - 1) * report.weight_bytes >= 2 << 20
    assert len({plan.tensors["b"] for plan in loader.plans}) == report.copies
    assert report.microseconds == pytest.approx(125.0)
    assert run(problem, iterations=4, cold=False)[0].copies == 1


def test_without_the_check_nothing_is_claimed() -> None:
    report, _ = run(Problem("fc1", 5, 3, 128, 64), wrong, check=False)
    assert report.passed is None


@pytest.mark.parametrize("c_dtype", ["nvfp4", "bf16", "f16", "f32", "e4m3", "e5m2"])
def test_blackwells_layout_and_outputs_pass_too(c_dtype: str) -> None:
    """The weights are packed as the chosen kernel reads them, and fp8 outputs are read as such."""
    report, loader = run(Problem("fc1", 5, 3, 128, 64, "nvfp4", c_dtype), arch="sm_100f")
    assert report.passed
    assert {plan.layout for plan in loader.plans} == {packing.INTERCHANGE_LAYOUT}
    assert report.variant.startswith("fc1.sm100f.")
    if c_dtype in ("bf16", "f16", "f32"):
        assert run(Problem("fc2", 5, 3, 128, 256, "nvfp4", c_dtype), arch="sm_100f")[0].passed


# ---- the command: every option does what it says


SHAPE = ("--m", "5", "--experts", "3", "--hidden", "128", "--intermediate", "64")
Command = Callable[..., tuple[int, dict[str, Any], HostLoader]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``densemoe run`` on the host: (exit code, its JSON or {"error": …}, the loader)."""

    def called(op: str, *arguments: str, arch: str = "sm_90a", fault: Fault | None = None) -> tuple[int, dict[str, Any], HostLoader]:
        loader = HostLoader(fault, arch)
        monkeypatch.setattr("densemoe.runtime.loader.Loader", lambda artifacts: loader)
        code = cli.main(["run", op, *SHAPE, "--iterations", "0", "--json", *arguments])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else {"error": said.err}, loader

    return called


def test_tile_and_cluster_choose(command: Command) -> None:
    assert command("fc1")[1]["variant"].startswith("fc1.sm90a.t8x64.")
    assert command("fc1", "--tile", "32x64")[1]["variant"].startswith("fc1.sm90a.t32x64.")
    blackwell = ("--a-dtype", "nvfp4")
    assert command("fc1", *blackwell, "--tile", "128x128", "--cluster", "1x2", arch="sm_100f")[1]["variant"].startswith("fc1.sm100f.t128x128.c1x2.")
    code, said, _ = command("fc1", *blackwell, "--intermediate", "256", "--cluster", "1x2", arch="sm_100f")
    assert code == 2
    assert "--cluster 1x2 fits" in said["error"]


def test_a_forced_variant_is_taken_or_refused(command: Command) -> None:
    key = "fc1.sm90a.t16x64.c1x1.bf16-bf16"
    assert command("fc1", "--variant", key)[1]["variant"] == key
    assert command("fc1", "--variant", key, "--tile", "16x64")[1]["variant"] == key
    for arguments, said in (
        (("--variant", key, "--tile", "8x64"), f"--variant {key} --tile 8x64 fits no variant of this problem: use one of --tile 16x64 --cluster 1x1"),
        (("--variant", "fc2.sm90a.t8x64.c1x1.bf16-bf16"), "cannot run this problem: it is an fc2 kernel"),
        (("--tile", "7x7"), "--tile 7x7 fits no variant of this problem: use one of --tile 16x64 --cluster 1x1, --tile 32x64"),
    ):
        code, found, _ = command("fc1", *arguments)
        assert code == 2
        assert said in found["error"]


def test_prefetch_is_switched_on_and_off_where_a_kernel_has_it(command: Command) -> None:
    blackwell = ("--a-dtype", "nvfp4")
    for option, wanted in (("--prefetch", {"prefetch": 3}), ("--no-prefetch", {"prefetch": 0})):
        code, found, loader = command("fc1", *blackwell, option, arch="sm_100f")
        assert code == 0
        assert found["settings"].items() >= wanted.items()
        assert all((settings or {}).items() >= wanted.items() for settings in loader.settings)
    assert command("fc1", "--no-prefetch")[0] == 0  # it never does
    code, found, _ = command("fc1", "--prefetch")
    assert code == 2
    assert "has the L2 prefetch distances [0] alone" in found["error"]


def test_alpha_post_and_scalar_alpha_are_switched_on_and_off(command: Command) -> None:
    for option, wanted in (("--alpha-post", True), ("--no-alpha-post", False)):
        _, found, loader = command("fc1", option)
        assert found["problem"]["alpha_post"] is wanted
        assert ("alpha_post" in loader.plans[0].tensors) is wanted
    for option, wanted in (("--scalar-alpha", True), ("--no-scalar-alpha", False)):
        assert command("fc2", option)[1]["problem"]["scalar_alpha"] is wanted


def test_dtypes_seeds_and_the_check(command: Command) -> None:
    _, found, loader = command("fc1", "--a-dtype", "nvfp4", "--out-dtype", "f16")
    assert found["variant"].endswith("nvfp4-f16")
    data = {seed: command("fc1", "--seed", seed)[2] for seed in ("0", "1")}
    assert len(loader.plans) == 1
    assert len(data) == 2
    assert command("fc1", fault=wrong)[0] == 1
    code, found, _ = command("fc1", "--skip-check", fault=wrong)
    assert (code, found["passed"]) == (0, None)


def test_timing_options(command: Command) -> None:
    _, found, loader = command("fc1", "--iterations", "4", "--warmup", "3")
    assert found["copies"] > 1
    assert found["microseconds"] > 0
    assert len(loader.plans) == found["copies"]
    assert command("fc1", "--iterations", "4", "--no-cold-l2")[1]["copies"] == 1
    assert command("fc1", "--iterations", "4", "--cold-l2")[1]["copies"] > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--warmup", "-1"), "use an integer of at least 0"),
        (("--iterations", "many"), "many: use an integer of at least 0"),
        (("--seed", "-1"), "use an integer of at least 0"),
        (("--device", "-1"), "use an integer of at least 0"),
        (("--prefetch=3",), "ignored explicit argument"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "fc1", *SHAPE, *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--device", "1"), 3, "--device 1: there are 1 devices, 0 to 0"),
        (("--m", "-1"), 2, "m=-1"),
        (("--hidden", "100"), 2, "hidden=100: use a multiple of 64"),
        (("--a-dtype", "fp4"), 2, "use one of"),
        (("--out-dtype", "e4m3"), 2, "no variant runs fc1"),
        (("--scalar-alpha",), 2, "scalar_alpha"),
    ],
)
def test_what_cannot_run_says_why(command: Command, arguments: tuple[str, ...], code: int, said: str) -> None:
    found, answer, loader = command("fc1", *arguments)
    assert found == code
    assert said in answer["error"]
    assert loader.plans == []


def test_a_layer_for_another_layout_is_refused_in_words() -> None:
    with pytest.raises(DriverError, match=r"no kernel of Host reads: `densemoe run` runs one kernel there"):
        runner.run_layer(HostLoader(arch="sm_100f"), m=2, experts=4, top_k=2, hidden=256, intermediate=256)  # type: ignore[arg-type]


@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
def test_a_layer_passes_with_the_contract_as_kernels(a_dtype: str) -> None:
    report = runner.run_layer(HostLoader(), m=6, experts=7, top_k=2, hidden=256, intermediate=512, a_dtype=a_dtype)  # type: ignore[arg-type]
    assert report.passed, report
    assert report.mark >= 0.97


def test_a_layer_whose_fc2_is_wrong_fails() -> None:
    def scaled(problem: Problem, outputs: Mapping[str, np.ndarray]) -> None:
        if problem.op == "fc2":
            outputs["c"][:] = convert(bf16_values(outputs["c"]) * np.float32(1.02), "bf16")

    report = runner.run_layer(HostLoader(scaled), m=6, experts=7, top_k=2, hidden=256, intermediate=512)  # type: ignore[arg-type]
    assert not report.passed
    assert report.fc2_worst > 1
