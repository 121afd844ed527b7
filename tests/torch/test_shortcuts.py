"""Shortcuts to what a call launches: what they lead, what they hand over, and what is not done again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from fake_gpu import EXPERTS, HIDDEN, INTERMEDIATE, Fake, arguments, workspaces

from densemoe.runtime import packing
from densemoe.runtime.errors import PlanError, ProblemError
from densemoe.runtime.torch import device, launching


def test_a_shortcut_leads_only_tensors_like_the_first_call_s(fake: Fake) -> None:
    """What was changed in place since, under the same address, is checked as on a first call."""
    a = arguments()
    device.moe(*a)
    assert len(fake.runtime.shortcuts) == 1
    fake.launches()
    device.moe(*a)
    assert len(fake.launches()) == 3
    for position, change in ((3, lambda t: t.t_()), (0, lambda t: t.resize_(8, HIDDEN // 2)), (5, lambda t: t.resize_(EXPERTS - 1))):
        bad = list(a)
        bad[position] = a[position].clone()
        device.moe(*bad)
        fake.launches()
        change(bad[position])
        with pytest.raises(ProblemError):
            device.moe(*bad)
        assert not fake.launches()
    other = [*a[:2], a[2].to(torch.int64), *a[3:]]
    device.moe(*other)
    assert len(fake.runtime.entries) == 2
    assert len(fake.launches()) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_shortcut_hands_over_every_tensor(fake: Fake, fused: bool) -> None:
    a = arguments(quantise=True, fused=fused)
    device.moe(*a)
    first = fake.launches()
    device.moe(*a)
    assert len(fake.runtime.shortcuts) == 1
    moved = [each.clone() if i in (0, 2, 3, 5, 7, 8, 9, 10) and each is not None else each for i, each in enumerate(a)]
    fake.launches()
    kept = device.moe(*moved)
    quantise, prepare, fc1, fc2 = fake.launches()
    assert [quantise[0], prepare[0], fc1[0], fc2[0]] == [each[0] for each in first]
    assert (quantise[2]["a"], quantise[2]["output_multiplier"]) == (moved[0].data_ptr(), moved[8].data_ptr())
    assert (prepare[2]["ids"], prepare[2]["router"], prepare[2]["w2_alpha"]) == tuple(moved[i].data_ptr() for i in (2, 3, 7))
    assert (fc1[2]["alpha"], fc1[2]["output_multiplier"], fc2[2]["c"]) == (moved[5].data_ptr(), moved[9].data_ptr(), kept.data_ptr())
    if fused:
        assert prepare[2]["alpha_divisor"] == fc2[2]["alpha"] == moved[10].data_ptr()


def test_single_ops_by_their_shortcuts(fake: Fake) -> None:
    a = arguments()
    for _ in range(2):
        codes, scales = device.quantize_nvfp4(a[0], a[5][:1])
        c, _ = device.fc1_swiglu(a[0], None, a[4], a[5], None, None, INTERMEDIATE, packing.LAYOUT, "bf16")
        alpha = torch.ones(4, EXPERTS)
        out = device.fc2(c, None, a[6], alpha, EXPERTS, HIDDEN, packing.LAYOUT, "bf16")
        quantise, fc1, fc2 = fake.launches()
        assert [quantise[2][role] for role in ("a", "c.codes", "c.scales")] == [each.data_ptr() for each in (a[0], codes, scales)]
        assert [fc1[2][role] for role in ("a", "b", "alpha", "c")] == [each.data_ptr() for each in (a[0], a[4], a[5], c)]
        assert [fc2[2][role] for role in ("a", "b", "alpha", "c")] == [each.data_ptr() for each in (c, a[6], alpha, out)]
        assert len(fake.runtime.shortcuts) == 3
    with pytest.raises(ProblemError, match="contiguous"):
        device.fc2(c, None, a[6], torch.ones(EXPERTS, 4).t(), EXPERTS, HIDDEN, packing.LAYOUT, "bf16")
    assert not fake.launches()


def test_a_shortcut_is_not_taken_while_a_graph_is_captured_and_goes_with_its_entry(fake: Fake) -> None:
    a = arguments()
    device.moe(*a)
    (eager,) = [each for each in fake.launches() if each[0] == "fc2"]
    fake.capturing = True
    device.moe(*a)
    (captured,) = [each for each in fake.launches() if each[0] == "fc2"]
    assert not {*workspaces(eager).values()} & {*workspaces(captured).values()}
    fake.capturing = False
    fake.runtime.clear()
    assert not fake.runtime.shortcuts


def test_nobody_asks_whether_the_default_stream_is_captured(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses to capture it."""
    asked: list[int] = []
    monkeypatch.setattr(fake.runtime, "capturing", lambda: asked.append(fake.stream) or fake.capturing)
    a = arguments()
    for fake.stream in (0, 77):
        for _ in range(2):
            device.quantize_nvfp4(a[0], a[5][:1])
            c, _ = device.fc1_swiglu(a[0], None, a[4], a[5], None, None, INTERMEDIATE, packing.LAYOUT, "bf16")
            device.fc2_out(c, None, a[6], torch.ones(4, EXPERTS), EXPERTS, HIDDEN, packing.LAYOUT, "bf16", c=torch.empty_like(a[0]))
            device.moe(*a)
    assert len(fake.launches()) == 2 * 2 * 6
    assert {*asked} == {77}


def test_plain_outputs_share_one_tensor_for_the_scales_that_they_have_not(fake: Fake) -> None:
    a = arguments()
    plain = [device.fc1_swiglu(a[0], None, a[4], a[5], None, None, INTERMEDIATE, packing.LAYOUT, "bf16") for _ in range(3)]
    assert [(scales.shape, scales.dtype) for _, scales in plain] == [((0, 0), torch.uint8)] * 3
    assert plain[1][1] is plain[2][1]
    assert len({c.data_ptr() for c, _ in plain}) == 3
    given = device.quantize_nvfp4(a[0], one := torch.ones(1))
    quantised = [device.fc1_swiglu(*given, a[4], a[5], None, one, INTERMEDIATE, packing.LAYOUT, "nvfp4") for _ in range(3)]
    assert len({scales.data_ptr() for _, scales in quantised}) == 3


def test_an_entry_that_was_closed_launches_nothing(fake: Fake) -> None:
    a = arguments()
    device.moe(*a)
    (entry,) = fake.runtime.entries.values()
    fake.launches()
    fake.runtime.clear()
    with pytest.raises(PlanError, match="is closed"):
        entry.launch(entry._bound, 77)
    with pytest.raises(PlanError, match="is closed"):
        entry.plans[0].prepared  # noqa: B018
    assert fake.launches() == []


def test_a_shortcut_allocates_by_torch_empty_while_another_device_is_current(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def allocation(make: Any) -> Any:
        return lambda: (used.append(make), make())[1]

    monkeypatch.setattr(launching, "_allocation", allocation)
    a = arguments()
    for _ in range(2):
        device.moe(*a)
    assert len(used) == 1
    fake.launches()
    fake.device = 1
    c = device.moe(*a)
    assert (len(used), fake.guarded[-1], fake.device) == (1, 0, 1)
    assert fake.launches()[-1][2]["c"] == c.data_ptr()


def test_the_function_of_compiled_code_allocates_on_gpus_alone() -> None:
    make = partial(torch.empty, 2, 3, dtype=torch.uint8, device=torch.device("cpu"))
    assert launching._allocation(make) is make


def test_without_a_comparison_of_torch_s_or_with_a_tensor_given_twice_the_full_key_decides(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments()
    a[7] = a[5]
    device.moe(*a)
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    device.moe(*arguments())
    assert not fake.runtime.shortcuts
    device.moe(*a)
    assert len(fake.launches()) == 9
