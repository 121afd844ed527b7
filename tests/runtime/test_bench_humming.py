"""The Humming adapter against a stand-in with its interface (0.1.19), which computes what its documentation says of the arguments that it gets.

Humming itself runs on a GPU alone.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from densemoe.runtime import bench_competitors  # noqa: E402
from densemoe.runtime.bench_competitors import Unavailable, Workload  # noqa: E402
from densemoe.runtime.bench_nvfp4 import Plain, aligned  # noqa: E402
from densemoe.runtime.bench_timing import Timed  # noqa: E402
from densemoe.runtime.tune_cases import Shape, route_tokens  # noqa: E402

SHAPE = Shape("small", 5, 2, 128, 64)
DEFAULT = {"block_shape": [8, 64, 64], "warp_shape": [8, 32, 32], "mma_type": "mma", "num_sms": 132}
SAMPLED = [{**DEFAULT, "num_stages": 3}, {**DEFAULT, "block_shape": [16, 64, 64]}, {**DEFAULT, "broken": True}, {**DEFAULT, "uncompilable": True}]


class StandIn:
    """Modules by name, and the kernels that were prepared and launched."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []
        self.launched: list[dict[str, Any]] = []
        self.gate_first = True
        self.choose: Callable[[int], dict[str, Any]] = lambda rows: dict(DEFAULT)
        self.together: list[tuple[str, list[int]]] = []
        gemm = enum.Enum("GemmType", {"INDEXED": "indexed"})
        scale = enum.Enum("WeightScaleType", {"GROUP": "group"})
        second = enum.Enum("WeightScale2Type", {"TENSOR": "tensor"})

        @dataclasses.dataclass(kw_only=True)
        class ComputeConfig:
            gemm_type: Any

            def to_str(self) -> str:
                return "indexed"

        def prepare(tensors: dict[str, Any], **options: Any) -> Any:
            schema = options["weight_schema"]
            assert (schema.b_dtype, schema.bs_dtype, schema.weight_scale_group_size) == ("e2m1", "e4m3", 16)
            assert (schema.weight_scale_type, schema.weight_scale_2_type) == (scale.GROUP, second.TENSOR)
            experts, n, k = options["num_experts"], options["shape_n"], options["shape_k"]
            assert options["torch_dtype"] == torch.bfloat16
            assert (tensors["weight"].dtype, tuple(tensors["weight"].shape)) == (torch.int32, (experts, n, k // 8))
            assert (tensors["weight_scale"].dtype, tuple(tensors["weight_scale"].shape)) == (torch.float8_e4m3fn, (experts, n, k // 16))
            assert (tensors["weight_scale_2"].dtype, tuple(tensors["weight_scale_2"].shape)) == (torch.float32, (experts,))
            return SimpleNamespace(to_str=lambda: f"{n}x{k}", n=n, k=k), dict(tensors)

        def prepare_kernels(layer: str, compute: str, rows: Any, device: Any = None) -> Any:
            if any(values.get("uncompilable") for _, _, values in rows):
                raise RuntimeError("nvcc failed")
            if len(rows) != 1:
                self.together.append((layer, [values["block_shape"][0] for _, _, values in rows]))
                return None
            ((first, last, values),) = rows
            assert (first, last, compute) == (0, 1 << 30, "indexed")
            self.kernels.append(values)
            return torch.tensor([first, last, len(self.kernels) - 1, values["num_sms"]], dtype=torch.int64)

        self.modules = {
            "humming.ops": SimpleNamespace(launch_kernel=self.launch, process_input=self.process_input),
            "humming.config": SimpleNamespace(GemmType=gemm, WeightScaleType=scale, WeightScale2Type=second, ComputeConfig=ComputeConfig),
            "humming.schema": SimpleNamespace(HummingWeightSchema=SimpleNamespace),
            "humming.transform": SimpleNamespace(prepare_and_transform_humming_tensors=prepare),
            "humming.dtypes": SimpleNamespace(float4e2m1="e2m1", float8e4m3="e4m3"),
            "humming.tune": SimpleNamespace(get_heuristics_config=self.heuristic),
            "humming.kernel.humming": SimpleNamespace(HummingKernel=SimpleNamespace(prepare_kernels=prepare_kernels)),
            "humming.testing.tuning": SimpleNamespace(sample_test_tuning_configs=lambda config, compute, sample_size: SAMPLED[:sample_size]),
        }

    def heuristic(self, config: Any, shape_m: int | None = None, gemm_type: Any = None) -> Any:
        """The choice for so many rows; without them that of every interval of rows."""
        return [[0, 24, self.choose(1)], [25, 1 << 30, self.choose(1 << 30)]] if shape_m is None else self.choose(shape_m)

    def launch(self, *, configs: Any, inputs: Any, weight: Any, weight_scale: Any, weight_scale_2: Any, outputs: Any, sorted_ids: Any,
               expert_ids: Any, num_tokens_padded: Any, locks: Any, top_k: int) -> Any:  # fmt: skip
        """An indexed GEMM: row ``id`` of the output is row ``id // top_k`` of the input times the block's expert."""
        values = self.kernels[int(configs[2])]
        self.launched.append({"values": values, "top_k": top_k})
        block = values["block_shape"][0]
        assert locks.dtype == torch.int32
        assert not locks.any()
        assert int(num_tokens_padded) == len(sorted_ids) == block * len(expert_ids)
        plain = Plain(weight.view(torch.uint8), weight_scale.view(torch.uint8), weight_scale_2)
        for at, expert in enumerate(expert_ids.tolist()):
            ids = sorted_ids[at * block : (at + 1) * block]
            ids = ids[ids < len(outputs)].long()
            w = torch.from_numpy(plain.values(expert, np.arange(weight.shape[1]))) * weight_scale_2[expert]
            outputs[ids] = (inputs[ids // top_k].double() @ w.T * (1.5 if values.get("broken") else 1)).to(outputs.dtype)
        return outputs

    def process_input(self, inputs: Any, *, outputs: Any, activation_type: str, activation_impl: str) -> Any:
        """``activation_impl`` of both halves of a row, a CUDA expression."""
        assert activation_type == "binary_split"
        a, b = inputs.float().chunk(2, 1)
        expression = activation_impl.replace("1.f", "1.0").replace("__expf", "torch.exp")
        halves = {"a": a, "b": b} if self.gate_first else {"a": b, "b": a}
        outputs.copy_(eval(expression, {"torch": torch}, halves))
        return outputs, None, None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    for name, own in made.modules.items():
        module = ModuleType(name)
        module.__dict__.update(vars(own))
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("humming", "humming.kernel", "humming.testing"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return made


def adapter(stand_in: StandIn, cost: Callable[[dict[str, Any]], float]) -> Any:
    from densemoe.runtime.bench_humming import Humming

    moe: Any = Humming("cpu")

    def captured(calls: list[Callable[[], Any]]) -> Timed:
        stand_in.launched.clear()
        for call in calls:
            call()
        used = stand_in.launched[-1]["values"]
        return Timed(lambda stream: None, int(1000 * cost(used)), lambda: None)

    moe.captured = captured
    moe.milliseconds = lambda timed: timed.launches
    return moe


def work(what: str) -> Workload:
    return Workload(what, SHAPE, 6, [route_tokens(SHAPE, 6), route_tokens(SHAPE, 6, 1)])


def test_it_computes_our_layer_with_the_fastest_configuration_that_agrees(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEMOE_BENCH_HUMMING_CONFIGURATIONS", "16")
    moe = adapter(stand_in, lambda values: 0.1 if values.get("broken") else 1.0 / values["block_shape"][0])
    timed = moe.prepare(work("layer"))
    assert timed.launches > 0
    assert [each["top_k"] for each in stand_in.launched] == [2, 1, 2, 1]
    assert {each["values"]["block_shape"][0] for each in stand_in.launched} == {16}
    assert not any(each["values"].get("broken") for each in stand_in.launched)
    prepared = len(stand_in.kernels)
    moe.prepare(work("fc1"))
    assert len(stand_in.kernels) == prepared + 2  # found before: bound to two rotations, not searched again


def test_what_its_heuristic_takes_for_fewer_and_more_rows_is_tried_too(stand_in: StandIn) -> None:
    """Six tokens of two experts are twelve rows: an eighth are two, eight times are 96."""
    asked: list[int] = []

    def choose(rows: int) -> dict[str, Any]:
        asked.append(rows)
        return {**DEFAULT, "block_shape": [8 if rows <= 24 else 32, 64, 64]}

    stand_in.choose = choose
    moe = adapter(stand_in, lambda values: 1.0 / values["block_shape"][0])
    moe.prepare(work("fc1"))
    assert asked == [1, 1 << 30, 12, 2, 3, 6, 24, 48, 96]
    moe.prepare(Workload("fc1", SHAPE, 2, [route_tokens(SHAPE, 2)]))
    assert stand_in.together == [("128x128", [8, 32])]  # compiled together, once
    assert {each["values"]["block_shape"][0] for each in stand_in.launched} == {32}
    assert moe.searched(work("fc1")) == {"fc1": (2, 2)}


def test_what_does_not_compile_together_is_said_and_left_out(stand_in: StandIn) -> None:
    stand_in.choose = lambda rows: {**DEFAULT, "block_shape": [8, 64, 64]} if rows <= 24 else {**DEFAULT, "uncompilable": True}
    moe, said = adapter(stand_in, lambda values: 1.0), []
    moe.say = said.append
    moe.prepare(work("fc1"))
    assert f"Humming fc1 {SHAPE.name}: RuntimeError: nvcc failed" in said
    assert moe.searched(work("fc1")) == {"fc1": (2, 2)}
    assert not any(each["values"].get("uncompilable") for each in stand_in.launched)


def test_its_own_choice_alone(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEMOE_BENCH_HUMMING_CONFIGURATIONS", "0")
    moe = adapter(stand_in, lambda values: 1.0)
    moe.prepare(work("fc2"))
    assert {each["values"]["block_shape"] for each in stand_in.launched} == {(8, 64, 64)}
    monkeypatch.setenv("DENSEMOE_BENCH_HUMMING_CONFIGURATIONS", "many")
    moe.release()
    with pytest.raises(Unavailable, match="use a number"):
        moe.prepare(Workload("fc2", SHAPE, 2, [route_tokens(SHAPE, 2)]))


def test_a_search_says_what_takes_long_and_ends_in_time(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration takes ten seconds; the first that agrees is tried whatever the time."""
    monkeypatch.setenv("DENSEMOE_BENCH_HUMMING_CONFIGURATIONS", "16")
    now, said = [0.0], []
    compiled = stand_in.modules["humming.kernel.humming"].HummingKernel

    def prepare_kernels(*arguments: Any, **named: Any) -> Any:
        now[0] += 10 / 2  # each is bound to two rotations
        return real(*arguments, **named)

    real = compiled.prepare_kernels
    monkeypatch.setattr(compiled, "prepare_kernels", prepare_kernels)
    moe = adapter(stand_in, lambda values: 1.0)
    moe.say, moe.clock = said.append, lambda: now[0]
    moe.prepare(work("layer"))
    whole = moe.searched(work("layer"))
    every = whole["fc1"][1]
    assert whole == {"fc1": (every, every), "fc2": (every, every)}
    assert every > 3
    assert said[:3] == [
        f"Humming: weights of {SHAPE.name}",
        f"Humming fc1 {SHAPE.name}: compiles what its heuristic takes for any number of rows",
        f"Humming fc1 {SHAPE.name} M = 6: {every} configurations",
    ]
    assert f"Humming fc1 {SHAPE.name} M = 6: configuration 1 of {every} took 10 s to compile and check" in said
    hurried = adapter(stand_in, lambda values: 1.0)
    hurried.clock, hurried.seconds = (lambda: now[0]), 15.0
    hurried.prepare(work("fc1"))
    assert hurried.searched(work("fc1")) == {"fc1": (2, every)}


def test_another_layer_is_not_measured(stand_in: StandIn) -> None:
    stand_in.gate_first = False
    with pytest.raises(Unavailable, match=r"none of its configurations runs fc1 at M = 6: .*it does not compute the same layer"):
        adapter(stand_in, lambda values: 1.0).prepare(work("fc1"))


def test_rows_are_aligned_to_blocks_of_one_expert() -> None:
    found = aligned([[3, 0], [0, 1], [0, 3]], 4, 2)
    assert found.ids.tolist() == [1, 2, 4, 6, 3, 6, 0, 5]
    assert found.experts.tolist() == [0, 0, 1, 3]


def test_an_import_that_fails_leaves_the_column_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_competitors.importlib.util.find_spec
    monkeypatch.setattr(bench_competitors.importlib.util, "find_spec", lambda name: True if name in ("humming", "triton") else real(name))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    by_name = {each.name: each for each in bench_competitors.competitors()}
    assert "does not import here" in by_name["Humming"].reason  # type: ignore[attr-defined]
    assert "does not import here" in by_name["Triton NVFP4"].reason  # type: ignore[attr-defined]
