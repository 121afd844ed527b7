"""Shortcuts to what a call launches: what they lead, what they hand over, and what is not done again."""

from __future__ import annotations

import threading
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
    for position, change in ((2, lambda t: t.t_()), (0, lambda t: t.resize_(8, HIDDEN // 2)), (4, lambda t: t.resize_(EXPERTS - 1))):
        bad = list(a)
        bad[position] = a[position].clone()
        device.moe(*bad)
        fake.launches()
        change(bad[position])
        with pytest.raises(ProblemError):
            device.moe(*bad)
        assert not fake.launches()
    other = [a[0], a[1].to(torch.int64), *a[2:]]
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
    moved = [each.clone() if i in (0, 1, 2, 4, 6, 11, 12, 14) and each is not None else each for i, each in enumerate(a)]
    fake.launches()
    kept = device.moe(*moved)
    prepare, fc1, fc2 = fake.launches()
    assert [prepare[0], fc1[0], fc2[0]] == [each[0] for each in first]
    assert (prepare[2]["x"], prepare[2]["x.multiplier"]) == (moved[0].data_ptr(), moved[11].data_ptr())
    assert (prepare[2]["ids"], prepare[2]["router"], prepare[2]["w2_alpha"]) == tuple(moved[i].data_ptr() for i in (1, 2, 6))
    assert (fc1[2]["alpha"], fc1[2]["output_multiplier"], fc2[2]["c"]) == (moved[4].data_ptr(), moved[12].data_ptr(), kept.data_ptr())
    if fused:
        assert prepare[2]["alpha_divisor"] == fc2[2]["alpha"] == moved[14].data_ptr()


def test_single_ops_by_their_shortcuts(fake: Fake) -> None:
    a = arguments()
    for _ in range(2):
        codes, scales = device.quantize_nvfp4(a[0], a[4][:1])
        c, _ = device.fc1_swiglu(a[0], a[3], a[4], INTERMEDIATE, packing.LAYOUT)
        alpha = torch.ones(4, EXPERTS)
        out = device.fc2(c, a[5], alpha, EXPERTS, HIDDEN, packing.LAYOUT)
        quantise, fc1, fc2 = fake.launches()
        assert [quantise[2][role] for role in ("a", "c.codes", "c.scales")] == [each.data_ptr() for each in (a[0], codes, scales)]
        assert [fc1[2][role] for role in ("a", "b", "alpha", "c")] == [each.data_ptr() for each in (a[0], a[3], a[4], c)]
        assert [fc2[2][role] for role in ("a", "b", "alpha", "c")] == [each.data_ptr() for each in (c, a[5], alpha, out)]
        assert len(fake.runtime.shortcuts) == 3
    with pytest.raises(ProblemError, match="contiguous"):
        device.fc2(c, a[5], torch.ones(EXPERTS, 4).t(), EXPERTS, HIDDEN, packing.LAYOUT)
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
            device.quantize_nvfp4(a[0], a[4][:1])
            c, _ = device.fc1_swiglu(a[0], a[3], a[4], INTERMEDIATE, packing.LAYOUT)
            device.fc2_out(c, a[5], torch.ones(4, EXPERTS), EXPERTS, HIDDEN, packing.LAYOUT, c=torch.empty_like(a[0]))
            device.moe(*a)
    assert len(fake.launches()) == 2 * 2 * 6
    assert {*asked} == {77}


def test_plain_outputs_share_one_tensor_for_the_scales_that_they_have_not(fake: Fake) -> None:
    a = arguments()
    plain = [device.fc1_swiglu(a[0], a[3], a[4], INTERMEDIATE, packing.LAYOUT) for _ in range(3)]
    assert [(scales.shape, scales.dtype) for _, scales in plain] == [((0, 0), torch.uint8)] * 3
    assert plain[1][1] is plain[2][1]
    assert len({c.data_ptr() for c, _ in plain}) == 3
    codes, scales = device.quantize_nvfp4(a[0], one := torch.ones(1))
    quantised = [device.fc1_swiglu(codes, a[3], a[4], INTERMEDIATE, packing.LAYOUT, "nvfp4", one, scales) for _ in range(3)]
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
        return make and (lambda: (used.append(make), make())[1])

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
    a[6] = a[4]
    device.moe(*a)
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    device.moe(*arguments())
    assert not fake.runtime.shortcuts
    device.moe(*a)
    assert len(fake.launches()) == 9


def calls(a: list[Any]) -> dict[str, Any]:
    """Each op, called on a layer's arguments."""
    one, alpha, middle = torch.ones(1), torch.ones(len(a[0]), EXPERTS), torch.zeros(len(a[0]), EXPERTS * INTERMEDIATE, dtype=torch.bfloat16)
    codes, scales = device.quantize_nvfp4(a[0], one)
    return {
        "quantize": partial(device.quantize_nvfp4, a[0], one),
        "fc1": partial(device.fc1_swiglu, a[0], a[3], a[4], INTERMEDIATE, packing.LAYOUT),
        "fc1 of nvfp4": partial(device.fc1_swiglu, codes, a[3], a[4], INTERMEDIATE, packing.LAYOUT, "nvfp4", one, scales),
        "fc2": partial(device.fc2, middle, a[5], alpha, EXPERTS, HIDDEN, packing.LAYOUT),
        "moe": partial(device.moe, *a),
    }


OPS = ["quantize", "fc1", "fc1 of nvfp4", "fc2", "moe"]


def last_used(fake: Fake) -> list[launching.Shortcut]:
    rt = fake.runtime
    return [short for last in (rt.last_quantize, rt.last_fc1, rt.last_fc2, rt.last_moe) for short in last.values()]


@pytest.mark.parametrize("op", OPS)
def test_a_call_like_the_last_one_with_its_weights_asks_for_no_short_key(fake: Fake, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens and other weights do; what they find is the last one's from then on, for these weights."""
    few, many = arguments(2), arguments(4)
    many[3:7] = few[3:7]
    here, more, elsewhere = (calls(each)[op] for each in (few, many, arguments(2)))
    if op == "quantize":
        more.args[1].set_(here.args[1])  # its weights are the multiplier
    for call in (here, more, elsewhere):
        call()
    asked: list[int] = []
    found = fake.runtime.shortcut
    monkeypatch.setattr(fake.runtime, "shortcut", lambda *given: asked.append(given[1]) or found(*given))
    entries = dict(fake.runtime.entries)
    address = {"quantize": 1, "moe": 3}.get(op, 1)
    own, other = here.args[address].data_ptr(), elsewhere.args[address].data_ptr()
    for call, wanted in ((here, [own]), (here, []), (elsewhere, []), (here, []), (more, [own]), (more, []), (elsewhere, []), (here, [own])):
        asked.clear()
        fake.launches()
        call()
        assert asked == wanted
        assert len(fake.launches()) == (3 if op == "moe" else 1)
    assert own != other
    assert fake.runtime.entries == entries


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("moe", "first_expert", 1),
        ("moe", "elsewhere", True),
        ("moe", "deterministic", True),
        ("moe", "alpha_max", torch.ones(1)),
        ("moe", "multipliers", None),
        ("moe", "w2", None),
        ("fc1", "alpha_post", torch.ones(4, EXPERTS)),
        ("fc2", "stream", 78),
        ("fc1", "stream", 0),
        ("moe", "stream", 78),
        ("quantize", "stream", 78),
    ],
)
def test_a_call_that_differs_from_the_last_one_in_anything_has_an_entry_of_its_own(fake: Fake, op: str, name: str, value: Any) -> None:
    a = arguments()
    same = calls(a)[op]
    if name == "w2":
        value = torch.empty(a[5].numel() + 128, dtype=torch.uint8)
        value = value[-value.data_ptr() % 128 :][: a[5].numel()]
    changed = {
        "stream": same,
        "w2": partial(device.moe, *a[:5], value, *a[6:]),
        "multipliers": partial(device.moe, *a[:11], torch.ones(1), torch.ones(1)),
    }.get(name, partial(same.func, *same.args[:10], **{name: value}))
    changed = partial(changed)  # not the same object as ``same``

    def used(call: Any) -> launching.Entry:
        fake.stream = value if name == "stream" and call is changed else 77
        fake.runtime.made += 1
        call()
        assert {stream for _, stream, _ in fake.launches()} == {fake.stream}
        (entry,) = (each for each in fake.runtime.entries.values() if each.used == fake.runtime.made)
        return entry

    first, second = used(same), used(changed)
    assert first is not second
    for _ in range(2):
        assert [used(same), used(changed), used(changed), used(same)] == [first, second, second, first]


@pytest.mark.parametrize(
    ("op", "position", "value", "error", "said"),
    [
        ("fc1", 3, 128, ProblemError, "packed weights of"),
        ("fc1", 4, packing.INTERCHANGE_LAYOUT, PlanError, "pack them for this device"),
        ("fc1", 5, "nvfp4", ProblemError, "give it exactly for nvfp4"),
        ("fc1", 5, "f64", ProblemError, "c_dtype"),
        ("fc1 of nvfp4", 5, "bf16", ProblemError, "give it exactly for nvfp4"),
        ("fc1 of nvfp4", 7, None, ProblemError, "use torch.bfloat16"),
        ("fc2", 3, 2, ProblemError, "has shape"),
        ("fc2", 4, 64, ProblemError, "packed weights of"),
        ("fc2", 5, packing.INTERCHANGE_LAYOUT, PlanError, "pack them for this device"),
        ("fc2", 6, "f64", ProblemError, "c_dtype"),
        ("moe", 7, 64, ProblemError, "hidden = 64"),
        ("moe", 8, 128, ProblemError, "packed weights of"),
        ("moe", 9, packing.INTERCHANGE_LAYOUT, PlanError, "pack them for this device"),
        ("moe", 10, "f64", ProblemError, "c_dtype"),
        ("moe", 11, torch.ones(2), ProblemError, "has shape"),
    ],
)
def test_a_wrong_argument_after_a_good_call_launches_nothing(
    fake: Fake, op: str, position: int, value: Any, error: type[Exception], said: str
) -> None:
    good = calls(arguments())[op]
    given = [*good.args, *["bf16"] * (position == len(good.args))]
    given[position] = value
    good(), good()
    fake.launches()
    for _ in range(2):
        with pytest.raises(error, match=said):
            good.func(*given)
        assert fake.launches() == []
    good()
    assert fake.launches()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("how", ["clear", "drop", "overflow"])
def test_what_is_dropped_is_not_the_last_one_of_anything(fake: Fake, op: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = calls(arguments())[op]
    call()
    call()
    assert any(short.entry.plans for short in last_used(fake))
    fake.launches()
    if how == "clear":
        fake.runtime.clear()
        assert not last_used(fake)
    else:
        monkeypatch.setattr(launching, "KEPT_ENTRIES", len(fake.runtime.entries if how == "drop" else fake.runtime.shortcuts))
        device.quantize_nvfp4(torch.zeros(7, HIDDEN, dtype=torch.bfloat16), torch.ones(1))
        assert len(last_used(fake)) == len(fake.runtime.shortcuts) == 1
        fake.launches()
    call()  # a closed entry would refuse
    assert len(fake.launches()) == (3 if op == "moe" else 1)
    entries = fake.runtime.entries.values()
    assert all(short.entry in entries for short in (*last_used(fake), *fake.runtime.shortcuts.values()))


def test_an_entry_that_is_dropped_while_a_call_looks_for_it_does_not_become_the_last_one(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """``clear`` of another thread comes between the call's finding it and remembering it."""
    a, b = arguments(2), arguments(4)
    b[3:7] = a[3:7]
    device.moe(*a)
    device.moe(*b)
    (short,) = (each for each in fake.runtime.shortcuts.values() if each is not fake.runtime.last_moe[a[3].data_ptr()])
    clearing: list[threading.Thread] = []
    check = short.check

    def slow(*tensors: Any) -> bool:
        if not clearing:
            clearing.append(threading.Thread(target=fake.runtime.clear))
            clearing[0].start()
            clearing[0].join(20)
        return check(*tensors)

    monkeypatch.setattr(short, "check", slow)
    assert fake.runtime.shortcut(fake.runtime.last_moe, a[3].data_ptr(), short.facts, a[:7]) is short
    assert clearing
    assert not clearing[0].is_alive()
    assert not fake.runtime.shortcuts
    assert not last_used(fake)


def test_multipliers_that_change_from_call_to_call_are_not_remembered_without_end(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "KEPT_ENTRIES", 3)
    x, multipliers = torch.zeros(4, HIDDEN, dtype=torch.bfloat16), [torch.ones(1) for _ in range(8)]
    for multiplier in multipliers * 2:
        device.quantize_nvfp4(x, multiplier)
        assert fake.launches()[-1][2]["output_multiplier"] == multiplier.data_ptr()
        assert 1 <= len(fake.runtime.last_quantize) <= 3
    assert len(fake.runtime.entries) == len(fake.runtime.shortcuts) == 1


def test_where_torch_sees_one_device_nobody_asks_which_is_current(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    a = arguments()
    for devices, times in ((1, 0), (2, 1)):
        runtime = device.Runtime(fake.loader, lambda ordinal: 77, lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        monkeypatch.setattr(runtime, "current_device", lambda: asked.append(0) or 0)
        device.use_runtime(runtime)
        for call in calls(a).values():
            call()
            asked.clear()
            call()
            assert len(asked) == times
