"""Sums over CTAs through slots whose words are their own flags (sm90_reduction): NaN, repeated launches, and kernels that break the protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sm90_cases import ptx_of

from densemoe.compile import kernels
from densemoe.compile.emulator.device import launch_recipe
from densemoe.runtime import data, packing
from densemoe.runtime.errors import EmulatorError
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

FC1 = "fc1.sm90a.t8x64.c1x1.bf16-f32"
EXPERTS, HIDDEN, INTERMEDIATE, M = 1, 2048, 64, 3
SMS = 1  # 4 CTAs for 2 units of 16 K blocks: every unit is shared
PUT = "st.relaxed.gpu.global.v4.b32"
NAN = 0xFFFF  # a bf16 NaN with every bit set, as near to an inverted empty word as an activation can be


class Launches:
    """FC1 of one expert, launched again and again on one workspace."""

    def __init__(self, edit: Callable[[str], str] = str) -> None:
        variant = Variant.parse(FC1)
        rng = np.random.default_rng(7)
        self.problem = Problem("fc1", M, EXPERTS, HIDDEN, INTERMEDIATE, "bf16", "f32")
        weights = data.fc1_weights(rng, EXPERTS, HIDDEN, INTERMEDIATE, "integers")
        self.a, _, scale = data.activations(rng, M, HIDDEN, "bf16", "integers")
        self.tensors = {"b": packing.pack_fc1(weights.codes, weights.scales), "alpha": data.fc1_alpha(weights, scale)}
        self.recipe = kernels.load("sm90_fc1").recipe(variant)
        self.ptx = edit(ptx_of(FC1))
        self.workspaces: dict[str, Any] = {}

    def run(self, a: np.ndarray, schedule: str = "eager") -> np.ndarray:
        c = np.full((M, EXPERTS * INTERMEDIATE), np.nan, np.float32)
        tensors = {**self.tensors, "a": a, "c": c}
        launch_recipe(
            self.ptx, self.recipe, self.problem.names(), tensors, ["c"], workspaces=self.workspaces, schedule=schedule, sm_count=SMS
        )
        return c


def edited(pattern: Callable[[int], bool]) -> Callable[[str], str]:
    """Deletes the stores to slots whose number (from 0, in the order of the text) ``pattern`` says."""

    def edit(ptx: str) -> str:
        lines, number = ptx.split("\n"), 0
        for index, line in enumerate(lines):
            if PUT in line:
                if pattern(number):
                    lines[index] = re.sub(r"@p st\.relaxed[^;]*;", "", line)
                number += 1
        assert number > 2
        return "\n".join(lines)

    return edit


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:1", "pct:3:4"])
def test_launches_on_one_workspace_give_the_same_bits_and_leave_it_zero(schedule: str) -> None:
    launches = Launches()
    first = launches.run(launches.a, schedule)
    assert np.isfinite(first).all()
    assert not launches.workspaces["workspace.slots"].any()
    np.testing.assert_array_equal(launches.run(launches.a, schedule), first)
    assert not launches.workspaces["workspace.slots"].any()


@pytest.mark.parametrize("schedule", ["eager", "random:1"])
def test_a_nan_is_no_empty_slot_and_stays_in_its_row(schedule: str) -> None:
    launches = Launches()
    clean = launches.run(launches.a, schedule)
    a = launches.a.copy()
    a[1] = NAN
    spoilt = launches.run(a, schedule)
    assert np.isnan(spoilt[1]).all()
    np.testing.assert_array_equal(spoilt[[0, 2]], clean[[0, 2]])
    assert not launches.workspaces["workspace.slots"].any()


def test_a_part_that_never_comes_is_waited_for_and_reported() -> None:
    with pytest.raises(EmulatorError, match=r"livelock|deadlock"):
        Launches(edited(lambda number: number < 2)).run(Launches().a)


def test_slots_that_are_not_cleared_spoil_the_next_launch() -> None:
    launches = Launches(edited(lambda number: number >= 2))
    first = launches.run(launches.a)
    assert launches.workspaces["workspace.slots"].any()
    nothing = np.zeros_like(launches.a)
    assert not Launches().run(nothing).any()
    assert launches.run(nothing).any(), "the sums of the launch before were taken for this one's"
    assert np.isfinite(first).all()
