"""The emulated tests can fail: each fault that is put into a kernel or its launch is found, by the emulator or by the comparison."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import emulated

from densemoe.runtime.errors import EmulatorError
from densemoe.runtime.recipe import Recipe

FC1 = "fc1.sm100f.t128x128.c1x2.nvfp4-nvfp4"
FC2 = "fc2.sm100f.t128x128.c1x1.nvfp4-f32"
PAIR = "fc2.sm100f.t256x128.c2x1.nvfp4-f32"

Fault = Callable[[str, Recipe], tuple[str, Recipe]]


def word(name: str, value: str) -> Fault:
    """Another value of a kernel parameter."""

    def apply(ptx: str, recipe: Recipe) -> tuple[str, Recipe]:
        parameters = [dataclasses.replace(each, value=value) if each.name == name else each for each in recipe.parameters]
        assert tuple(parameters) != recipe.parameters
        return ptx, dataclasses.replace(recipe, parameters=tuple(parameters))

    return apply


def tensor_map(name: str, **fields: object) -> Fault:
    """Another field of a tensor map."""

    def apply(ptx: str, recipe: Recipe) -> tuple[str, Recipe]:
        parameters = []
        for each in recipe.parameters:
            if each.name == name and each.tensor_map is not None:
                each = dataclasses.replace(each, tensor_map=dataclasses.replace(each.tensor_map, **fields))
            parameters.append(each)
        return ptx, dataclasses.replace(recipe, parameters=tuple(parameters))

    return apply


def without(pattern: str, which: int = 0) -> Fault:
    """The kernel without one statement."""

    def apply(ptx: str, recipe: Recipe) -> tuple[str, Recipe]:
        found = list(re.finditer(pattern, ptx))
        assert len(found) > which, pattern
        match = found[which]
        return ptx[: match.start()] + ptx[match.end() :], recipe

    return apply


def instead(pattern: str, replacement: str) -> Fault:
    """The kernel with every statement of a kind replaced."""

    def apply(ptx: str, recipe: Recipe) -> tuple[str, Recipe]:
        changed = re.sub(pattern, replacement, ptx)
        assert changed != ptx
        return changed, recipe

    return apply


FAULTS: dict[str, tuple[str, Fault]] = {
    "a row past M is stored": (FC1, word("tokens_total", "M + 1")),
    "alpha is read past M": (FC2, word("tokens_total", "M + 1")),
    "a tile past the last expert": (FC1, word("experts", "E + 1")),
    "a K tile too few": (FC1, word("k_tiles", "ceil_div(H, 256) - 1")),
    "one token's alpha serves all": (FC2, word("alpha_stride_m", "0")),
    "weights without their swizzle": (FC1, tensor_map("map_b", swizzle="none")),
    "activations without their swizzle": (FC2, tensor_map("map_a", swizzle="none")),
    "a weight row too far": (FC2, tensor_map("map_b", strides=("K // 2 + 32",))),
    "a box of half the rows": (FC1, tensor_map("map_b", box=(128, 64))),
    "a scale copy is missing": (FC1, without(r"\ttcgen05\.cp\.[^;]*;", 3)),
    "an MMA is missing": (FC2, without(r"\ttcgen05\.mma\.[^;]*;", 0)),
    "a stage is never released": (FC1, without(r"\ttcgen05\.commit\.[^;]*multicast[^;]*;")),
    "an accumulator is never published": (FC2, without(r"\ttcgen05\.commit\.[^;]*;", 1)),
    "the pair's follower waits in vain": (PAIR, instead(r"mov\.b16 (\t?)(%rs\d+), 3;", r"mov.b16 \1\2, 1;")),
    "tensor memory is not given back": (FC2, without(r"\ttcgen05\.dealloc\.[^;]*;")),
    "codes in another order": (FC1, instead(r"mov\.b32 (%r\d+), \{b0, b1, b2, b3\}", r"mov.b32 \1, {b1, b0, b2, b3}")),
    "amax is divided by 8, not 6": (FC1, instead(str(0x3E2AAAAB), str(0x3E000000))),
    "up and gate at the same columns": (FC1, instead(r"add\.s32 (\t?)(%r\d+), (%r\d+), 64;", r"add.s32 \1\2, \3, 0;")),
    "alpha_post of 0 is multiplied": (FC1, instead(r"selp\.b32 (%r\d+), 0xFFFFFFFF, 0, p", r"mov.b32 \1, 0xFFFFFFFF")),
    "the ticket is not cleared": (FC2, instead(r"@p st\.global\.b32 \[(%rd\d+)\], 0;", "")),
    "rows that are staged for a TMA store are not fenced": (FC2, without(r"\tfence\.proxy\.async\.shared::cta;")),
    "shared memory is left before a TMA store has read it": (FC2, without(r"\tcp\.async\.bulk\.wait_group\.read[^;]*;")),
    "output is staged without its swizzle": (FC2, tensor_map("map_c", swizzle="none")),
    "output is stored by TMA past M": (FC2, tensor_map("map_c", sizes=("H", "M + 32"))),
    "a part of the split is lost": (FC2, instead(r"@p st\.global\.v4\.f32 \[%rd\d+\], \{[^}]*\};", "")),
}


#: Faults that show only where asynchronous operations end late.
LATE = {"shared memory is left before a TMA store has read it"}


def run(key: str, schedule: str = "eager") -> None:
    """The case that each fault is put into; raises where something is wrong."""
    if key.startswith("fc1"):

        def poison(tensors: dict[str, object]) -> None:
            from densemoe.runtime import data

            data.poison_activations(tensors, [4])
            tensors["alpha_post"][4] = 0  # type: ignore[index]

        emulated.fc1(key, 129, 3, 320, 64, post=True, edit=poison, schedule=schedule).check()
        return
    outcome = emulated.fc2(key, 129, 2, 192, 512, zeros=0.2, splits=2, launches=2, schedule=schedule)
    outcome.check()
    assert not outcome.workspaces["workspace.tickets"].any()


@pytest.mark.parametrize("schedule", ["eager", "lazy"])
@pytest.mark.parametrize("key", [FC1, FC2, PAIR])
def test_the_case_passes_without_a_fault(key: str, schedule: str) -> None:
    run(key, schedule)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, apply = FAULTS[fault]
    ptx, recipe = emulated.compiled(key)
    broken = apply(ptx, recipe)
    assert broken != (ptx, recipe)
    monkeypatch.setattr(emulated, "compiled", lambda _: broken)
    with pytest.raises((EmulatorError, AssertionError)):
        run(key, "lazy" if fault in LATE else "eager")


def test_a_load_from_tensor_memory_that_is_not_waited_for_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator delivers such loads at once, so the output is right: it is a remark. The kernels give rise to none."""
    ptx, recipe = emulated.compiled(FC2)
    assert emulated.fc2(FC2, 5, 1, 64, 256).run.lints == []
    monkeypatch.setattr(emulated, "compiled", lambda _: (ptx.replace("\ttcgen05.wait::ld.sync.aligned;", ""), recipe))
    assert any("wait::ld" in lint for lint in emulated.fc2(FC2, 5, 1, 64, 256).run.lints)
