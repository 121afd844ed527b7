"""The GPU tests' harness and the runner of ``densemoe run``, on a CPU: float32 sums in torch stand in for the kernels, faults for broken ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import harness
import numpy as np
import pytest
import torch

from densemoe.runtime import bounds, data, packing, reference
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import pack_codes, quantise_rows
from densemoe.runtime.problem import Problem

Fault = Callable[[dict[str, torch.Tensor]], None]


def weights_of(problem: Problem, packed: torch.Tensor, layout: str) -> reference.Weights:
    """What the packed bytes say, read back through the layout."""
    shape = (problem.experts, problem.hidden, problem.intermediate)
    if layout == harness.INTERCHANGE:
        parts = packing.interchange_parts(problem.op, packed.numpy(), *shape)
        return harness.lifted(reference.Weights(problem.op, *parts, problem.experts))
    unpack = packing.unpack_fc1 if problem.op == "fc1" else packing.unpack_fc2
    codes, scales = unpack(packed.numpy(), problem.experts, problem.hidden, problem.intermediate)
    return harness.lifted(reference.Weights(problem.op, codes, tile_scales(scales.reshape(-1, scales.shape[-1])), problem.experts))


class StandIn:
    """A Plan whose kernel is the reference, rounded to the output's dtype, and then ``fault``."""

    def __init__(self, problem: Problem, tensors: Mapping[str, torch.Tensor], fault: Fault | None, layout: str) -> None:
        self.key, self.problem, self.tensors, self.fault, self.layout = "stand-in", problem, dict(tensors), fault, layout

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def feeds(self, second: StandIn) -> None:
        """As a Plan: the second reads what this one writes."""
        assert second.tensors["a.codes"].data_ptr() == self.tensors["c.codes"].data_ptr()

    def launch(self, stream: int) -> None:
        problem, tensors = self.problem, self.tensors
        weights = weights_of(problem, tensors["b"], self.layout)
        a = tensors["a"].double() if "a" in tensors else reference.activation_values(tensors["a.codes"], tensors["a.scales"])
        alpha = tensors["alpha"].double()
        if problem.op == "fc2":
            tensors["c"].copy_(reference.fc2(a, weights, alpha, problem.experts, problem.intermediate).c)
        else:
            post = tensors["alpha_post"].double() if problem.alpha_post else None
            y = reference.fc1(a, weights, alpha, range(problem.experts), post).y
            if problem.c_dtype == "nvfp4":
                codes, scales = quantise_rows(y.numpy().astype(np.float32), tensors["output_multiplier"].numpy()[0])
                tensors["c.codes"].copy_(torch.from_numpy(pack_codes(codes)))
                tensors["c.scales"].copy_(torch.from_numpy(tile_scales(scales)))
            else:
                tensors["c"].copy_(y)
        if self.fault is not None:
            self.fault(tensors)


class StandInLoader:
    """Makes StandIns; checks roles and shapes as a Plan does."""

    def __init__(self, fault: Fault | None = None, layout: str = harness.SUPERBLOCK) -> None:
        self.fault, self.layout = fault, layout

    def plan(self, problem: Problem, tensors: Mapping[str, Any], device: int, variant: str | None = None) -> StandIn:
        specs = problem.tensors()
        assert set(tensors) == {*specs, "b"}
        for role, spec in specs.items():
            assert tuple(tensors[role].shape) == spec.shape, role
            assert tensors[role].dtype == harness.DTYPES[spec.dtype], role
        return StandIn(problem, tensors, self.fault, self.layout)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "DEVICE", "cpu")


def passed(reports: list[bounds.Report]) -> bool:
    return all(report.passed for report in reports)


@pytest.mark.parametrize("kind", ["integers", "normal", "exact", "codes"])
@pytest.mark.parametrize("a_dtype", ["bf16", "nvfp4"])
def test_fc1_data_and_reference_agree_with_what_was_packed(kind: str, a_dtype: str) -> None:
    weights = harness.Weights("fc1", 3, 128, 64, kind, seed=1)
    for c_dtype in ("f32", "bf16") if kind == "exact" else ("nvfp4", "bf16", "f16", "f32"):
        assert passed(harness.run_fc1(StandInLoader(), weights, 9, a_dtype, c_dtype, True, kind=kind)), c_dtype
    assert passed(harness.run_fc1(StandInLoader(), weights.prefix(2), 9, a_dtype, "f32", False, kind=kind))


@pytest.mark.parametrize("kind", ["integers", "normal", "exact", "codes"])
@pytest.mark.parametrize("scalar", [False, True])
def test_fc2_data_and_reference_agree_with_what_was_packed(kind: str, scalar: bool) -> None:
    weights = harness.Weights("fc2", 3, 192, 64, kind, seed=1)
    for a_dtype, c_dtype in (("bf16", "bf16"), ("nvfp4", "f16"), ("nvfp4", "f32")):
        assert passed(harness.run_fc2(StandInLoader(), weights, 9, a_dtype, c_dtype, scalar, kind=kind)), c_dtype


def test_raw_scales_pass_through_the_layout() -> None:
    for op, run in (("fc1", harness.run_fc1), ("fc2", harness.run_fc2)):
        weights = harness.Weights(op, 3, 256, 128, "raw", seed=2)
        assert passed(run(StandInLoader(), weights, 3, "nvfp4", "f32", False, kind="normal")), op


def test_a_layer_stands_by_the_contract_and_the_mark() -> None:
    case = data.LayerCase(7, 2, 256, 512, 8)
    reports = harness.run_layer(StandInLoader(), case)
    assert len(reports) == 3
    assert passed(reports), [report.text for report in reports]


@pytest.mark.parametrize(("op", "run"), [("fc1", harness.run_fc1), ("fc2", harness.run_fc2)])
def test_blackwell_s_weights_are_the_interchange_layout(op: str, run: Callable[..., list[bounds.Report]]) -> None:
    weights = harness.Weights(op, 3, 192, 256, "integers", 1, harness.INTERCHANGE)
    loader = StandInLoader(layout=harness.INTERCHANGE)
    assert passed(run(loader, weights, 9, "nvfp4", "f32", True))
    if op == "fc1":
        assert passed(run(loader, weights.prefix(2), 9, "nvfp4", "nvfp4", False))


def test_a_blackwell_layer_stands_by_the_contract_and_the_mark() -> None:
    case = data.LayerCase(7, 2, 256, 512, 3)
    reports = harness.run_layer(StandInLoader(layout=harness.INTERCHANGE), case, a_dtype="nvfp4", layout=harness.INTERCHANGE)
    assert passed(reports), [report.text for report in reports]


def one_element(tensors: dict[str, torch.Tensor]) -> None:
    """A wrong value in the last output element."""
    out = tensors["c"] if "c" in tensors else tensors["c.scales"]
    flat = out.reshape(-1)
    flat[0 if "c.scales" in tensors else -1] = 1 if "c.scales" in tensors else float(flat[-1]) * 1.1 + 0.1


def behind(tensors: dict[str, torch.Tensor]) -> None:
    """A byte written behind the output."""
    torch.as_strided(tensors["c"], (1,), (1,), tensors["c"].storage_offset() + tensors["c"].numel()).zero_()


@pytest.mark.parametrize("c_dtype", ["nvfp4", "f32", "bf16"])
def test_one_wrong_element_fails_fc1(c_dtype: str) -> None:
    weights = harness.Weights("fc1", 2, 128, 64, "integers", seed=1)
    assert not passed(harness.run_fc1(StandInLoader(one_element), weights, 5, "bf16", c_dtype, False))


@pytest.mark.parametrize("kind", ["integers", "exact"])
def test_one_wrong_element_fails_fc2(kind: str) -> None:
    weights = harness.Weights("fc2", 2, 128, 64, kind, seed=1)
    assert not passed(harness.run_fc2(StandInLoader(one_element), weights, 5, "bf16", "f32", False, kind=kind))


def test_a_write_behind_the_output_is_seen() -> None:
    weights = harness.Weights("fc2", 2, 128, 64, "integers", seed=1)
    with pytest.raises(AssertionError, match="behind its output"):
        harness.run_fc2(StandInLoader(behind), weights, 5, "bf16", "f32", False)


def test_a_kernel_that_writes_nothing_fails() -> None:
    weights = harness.Weights("fc2", 2, 128, 64, "integers", seed=1)
    assert not passed(harness.run_fc2(StandInLoader(lambda tensors: tensors["c"].view(torch.uint8).fill_(0xA5)), weights, 5, "bf16", "f32", False))


def test_unrouted_experts_of_a_layer_carry_weights() -> None:
    """Their slots are not zeros, which would hide a kernel that adds them."""
    from densemoe.runtime.layer_data import LayerData

    layer = LayerData(data.LayerCase(8, 1, 128, 64, 1))
    routed = [int(e) for e in np.unique(layer.routing()[0])]
    made = harness.LayerWeights(layer, routed)
    for packed in made.packed:
        assert bool((packed.reshape(8, -1).long().sum(1) > 0).all())
