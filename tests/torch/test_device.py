"""The GPU path of the ops on a driver that exists only in Python: what is launched, with which addresses, and what is made only once."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver
from fake_gpu import EXPERTS, HIDDEN, INTERMEDIATE, Fake, arguments, workspaces

from densemoe.runtime import packing
from densemoe.runtime.errors import DriverError, PlanError, ProblemError
from densemoe.runtime.loader import Loader
from densemoe.runtime.torch import device, launching


def test_a_bf16_layer_is_three_launches_that_hand_memory_on(fake: Fake) -> None:
    a = arguments()
    out = device.moe(*a)
    (prepare, fc1, fc2) = fake.launches()
    assert [each[0] for each in (prepare, fc1, fc2)] == ["prepare", "fc1", "fc2"]
    assert {each[1] for each in (prepare, fc1, fc2)} == {77}
    assert (prepare[2]["ids"], prepare[2]["router"], prepare[2]["w2_alpha"]) == tuple(a[i].data_ptr() for i in (1, 2, 6))
    assert (fc1[2]["a"], fc1[2]["b"], fc1[2]["alpha"], fc1[2]["alpha_post"]) == (a[0].data_ptr(), a[3].data_ptr(), a[4].data_ptr(), 0)
    assert (fc2[2]["a"], fc2[2]["b"], fc2[2]["alpha"]) == (fc1[2]["c"], a[5].data_ptr(), prepare[2]["alpha"])
    assert fc2[2]["c"] == out.data_ptr()
    assert fc1[2]["active_experts"] == fc2[2]["active_experts"] == prepare[2]["active_list"]
    pieces = [prepare[2]["alpha"], prepare[2]["active_list"], fc1[2]["c"]]
    assert len(set(pieces)) == 3


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_a_bf16_layer_of_few_pairs_is_two_launches(sorting: Fake, ids: Any) -> None:
    """Both are given the router's choice; the second call finds its entry and points it to its own tensors."""
    for _ in range(2):
        a = arguments(16, ids=ids)
        out = device.moe(*a)
        fc1, fc2 = sorting.launches()
        assert [each[0] for each in (fc1, fc2)] == ["groupedfc1", "groupedfc2"]
        assert {each[1] for each in (fc1, fc2)} == {77}
        x, chosen, router, w1, w1_alpha, w2, w2_alpha = (each.data_ptr() for each in a[:7])
        assert {role: fc1[2][role] for role in ("a", "ids", "b", "alpha")} == {"a": x, "ids": chosen, "b": w1, "alpha": w1_alpha}
        assert {role: fc2[2][role] for role in ("ids", "router", "w2_alpha", "b")} == {"ids": chosen, "router": router, "w2_alpha": w2_alpha, "b": w2}
        assert fc2[2]["a"] == fc1[2]["c"] != 0
        assert fc2[2]["c"] == out.data_ptr()
    entries = list(sorting.runtime.entries.values())
    assert [plan.problem.id_dtype for plan in entries[0].plans] == ["i32" if ids == torch.int32 else "i64"] * 2
    assert [plan._names.get("early_list", 0) for plan in entries[0].plans] == [0, 1]


def test_a_rank_s_experts_are_told_to_both_launches(sorting: Fake) -> None:
    device.moe(*arguments(4), first_expert=8, elsewhere=True)
    (entry,) = sorting.runtime.entries.values()
    assert [(plan.problem.first_expert, plan.problem.elsewhere) for plan in entry.plans] == [(8, True)] * 2


def test_other_layers_of_few_pairs_are_three_launches(sorting: Fake) -> None:
    """NVFP4 is rounded on the way, the fused form moves alpha, one order is a matter of places; and 33 pairs are too many."""
    for a, options in (
        (arguments(4, quantise=True), {}),
        (arguments(4, quantise=True, fused=True), {}),
        (arguments(4), {"deterministic": True}),
        (arguments(17), {}),
    ):
        device.moe(*a, **options)
        assert len(sorting.launches()) == 3


def test_the_first_call_may_open_the_loader(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making an entry opens the loader of the process, under the lock that making an entry holds."""
    lazy = device.Runtime(None, lambda ordinal: 77, lambda: False, lambda: 0)
    monkeypatch.setattr(launching, "Loader", lambda: fake.loader)
    device.use_runtime(lazy)
    call = threading.Thread(target=device.moe, args=arguments(), daemon=True)
    call.start()
    call.join(20)
    assert not call.is_alive(), "deadlock"
    assert len(fake.launches()) == 3


def test_prepare_quantises_and_the_fused_form_moves_alpha(fake: Fake) -> None:
    """What lies between the launches is bf16, decoded; a layer that is quantised before it differs in what prepare reads."""
    a = arguments(quantise=True, fused=True, ids=torch.int64)
    device.moe(*a)
    prepare, fc1, fc2 = fake.launches()
    assert [each[0] for each in (prepare, fc1, fc2)] == ["prepare", "fc1", "fc2"]
    assert (prepare[2]["x"], prepare[2]["x.multiplier"]) == (a[0].data_ptr(), a[11].data_ptr())
    assert fc1[2]["a"] == prepare[2]["x.bf16"] != 0
    assert fc2[2]["a"] == fc1[2]["c"] != 0
    assert {"x.scales", "x.k64", "a.codes", "c.codes"}.isdisjoint(role for each in (prepare, fc1, fc2) for role, value in each[2].items() if value)
    (entry,) = fake.runtime.entries.values()
    assert [plan.problem.a_dtype for plan in entry.plans[1:]] == ["bf16", "bf16"]
    assert (entry.plans[1].problem.c_dtype, entry.plans[1].problem.rounded) == ("nvfp4", True)
    assert (entry.plans[0].problem.x_dtype, entry.plans[0].problem.x_rounded) == ("bf16", True)
    assert prepare[2]["alpha_divisor"] == fc2[2]["alpha"] == a[14].data_ptr()
    assert fc1[2]["alpha_post"] == prepare[2]["alpha"]


@pytest.mark.parametrize("quantise", [False, True])
def test_many_tokens_are_gathered_by_expert(fake: Fake, quantise: bool) -> None:
    """24 tokens on 2 of 4 experts: twelve rows an expert, so tiles of 16."""
    a = arguments(24, quantise=quantise)
    out = device.moe(*a)
    route, fc1, fc2 = fake.launches()
    assert [each[0] for each in (route, fc1, fc2)] == ["route", "groupedfc1", "groupedfc2"]
    assert (route[2]["ids"], route[2]["router"], route[2]["w2_alpha"]) == tuple(a[i].data_ptr() for i in (1, 2, 6))
    for role in ("tiles", "rows"):
        assert route[2][role] == fc1[2][role] == fc2[2][role]
    assert fc2[2]["row_alpha"] == route[2]["row_alpha"]
    assert fc1[2]["a"] == (route[2]["x.bf16"] if quantise else a[0].data_ptr()) != 0
    assert (route[2].get("x"), route[2].get("x.multiplier")) == ((a[0].data_ptr(), a[11].data_ptr()) if quantise else (None, None))
    assert fc2[2]["a"] == fc1[2]["c"] != 0
    assert fc2[2]["c"] == out.data_ptr()
    assert {plan.problem.group_tile for entry in fake.runtime.entries.values() for plan in entry.plans[-3:]} == {16}


@pytest.mark.parametrize("quantise", [False, True])
def test_what_large_tiles_multiply_is_bf16_in_k64_order(fake: Fake, quantise: bool) -> None:
    """60 tokens on 2 of 4 experts: thirty rows an expert; activations are rounded to NVFP4 on the way, by route and by FC1."""
    a = arguments(60, quantise=quantise)
    device.moe(*a)
    route, fc1, fc2 = fake.launches()
    assert [each[0] for each in (route, fc1, fc2)] == ["route", "groupedfc1", "groupedfc2"]
    assert (route[2]["x"], route[2]["x.scales"]) == (a[0].data_ptr(), 0)
    assert route[2]["x.multiplier"] == (a[11].data_ptr() if quantise else 0)
    assert fc1[2]["a.k64"] == route[2]["x.k64"] != 0
    assert fc2[2]["a.k64"] == fc1[2]["c.k64"] != 0
    assert not {"a", "a.codes", "c", "c.codes"} & set(fc1[2])
    assert not {"a", "a.codes"} & set(fc2[2])
    (plans,) = (entry.plans[-3:] for entry in fake.runtime.entries.values())
    assert [(plan.problem.op, plan.problem.group_tile) for plan in plans] == [("route", 32), ("groupedfc1", 32), ("groupedfc2", 32)]
    form = "nvfp4" if quantise else "bf16"
    assert [plan.problem.a_dtype for plan in plans[1:]] == ["bf16", "bf16"]
    assert (plans[0].problem.x_dtype, plans[0].problem.x_rounded, plans[1].problem.c_dtype) == ("bf16", quantise, form)


@pytest.mark.parametrize(("m", "role"), [(4, "x.bf16"), (24, "x.bf16"), (60, "x.k64")])
def test_activations_that_come_quantised_are_decoded_on_the_way(fake: Fake, m: int, role: str) -> None:
    a = arguments(m, quantise=True)
    a[0], a[11], a[13] = torch.zeros(m, HIDDEN // 2, dtype=torch.uint8), None, torch.zeros(128, HIDDEN // 16, dtype=torch.uint8)
    device.moe(*a)
    choice, fc1, _ = fake.launches()
    assert (choice[2]["x"], choice[2]["x.scales"], choice[2]["x.multiplier"]) == (a[0].data_ptr(), a[13].data_ptr(), 0)
    assert choice[2][role] == fc1[2]["a.k64" if role == "x.k64" else "a"] != 0
    (plans,) = (entry.plans for entry in fake.runtime.entries.values())
    assert (plans[0].problem.x_dtype, plans[0].problem.x_rounded) == ("nvfp4", False)


@pytest.mark.parametrize("asked", ["argument", "torch"])
@pytest.mark.parametrize(("m", "key"), [(24, "groupedfc2.sm90a.t16x64.c1x1.bf16-bf16"), (60, "groupedfc2.sm90a.t32x256.c1x1.bf16-bf16")])
def test_where_the_same_bits_are_asked_for_fc2_adds_in_one_order(fake: Fake, m: int, key: str, asked: str) -> None:
    """By the argument, or by torch's switch, which may be thrown between two calls."""
    a = arguments(m)
    device.moe(*a)
    fake.launches()
    if asked == "torch":
        torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):  # the second by its shortcut
            device.moe(*a, deterministic=asked == "argument")
            route, fc1, fc2 = fake.launches()
            assert route[2]["rows"] == fc1[2]["rows"] != 0
            assert route[2]["places"] == fc2[2]["places"] != 0
            assert "rows" not in fc2[2]
    finally:
        torch.use_deterministic_algorithms(False)
    device.moe(*a)
    route, _, fc2 = fake.launches()
    assert fc2[2]["rows"] == route[2]["rows"]
    assert "places" not in fc2[2]
    assert [entry.plans[-1].key for entry in fake.runtime.entries.values()] == [key, f"{key}.deterministic"]


def test_few_tokens_have_one_order_in_any_case(fake: Fake) -> None:
    """And where the set has no such kernel for a layer's tile, the nearest tile that it has one for is taken."""
    device.moe(*arguments(4), deterministic=True)
    assert [each[0] for each in fake.launches()] == ["prepare", "fc1", "fc2"]
    for m, tile in ((24, "16x64"), (180, "32x256")):  # 90 rows an expert: tiles of 96 where there were any
        device.moe(*arguments(m, quantise=True), deterministic=True)
        assert [each[0] for each in fake.launches()] == ["route", "groupedfc1", "groupedfc2"]
        newest = list(fake.runtime.entries.values())[-1]
        assert newest.plans[-1].key == f"groupedfc2.sm90a.t{tile}.c1x1.bf16-bf16.deterministic"


def test_the_fused_form_is_not_gathered(fake: Fake) -> None:
    device.moe(*arguments(24, quantise=True, fused=True))
    assert [each[0] for each in fake.launches()] == ["prepare", "fc1", "fc2"]


def test_a_second_call_makes_nothing_and_uses_the_new_tensors(fake: Fake) -> None:
    a = arguments()
    device.moe(*a)
    fake.launches()
    loaded, allocated = list(fake.driver.loads), dict(fake.driver.memory)
    a[0], a[1] = a[0].clone(), a[1].clone()
    out = device.moe(*a)
    prepare, fc1, fc2 = fake.launches()
    assert (prepare[2]["ids"], fc1[2]["a"], fc2[2]["c"]) == (a[1].data_ptr(), a[0].data_ptr(), out.data_ptr())
    assert (fake.driver.loads, fake.driver.memory) == (loaded, allocated)


def shared(launch: tuple[str, int, dict[str, int]]) -> dict[str, int]:
    """What a launch of FC2 does not share with other streams: workspaces, and what was written before it."""
    return {**workspaces(launch), **{role: launch[2][role] for role in ("a", "alpha", "active_experts")}}


def test_no_two_streams_share_scratch_and_layers_of_one_stream_do(fake: Fake) -> None:
    first, second = arguments(), arguments()
    device.moe(*first)
    device.moe(*second)
    fake.stream = 78
    device.moe(*first)
    device.moe(*second)
    seen = fake.launches()
    assert [each[1] for each in seen] == [77] * 6 + [78] * 6
    scratch = [shared(each) for each in seen if each[0] == "fc2"]
    assert len(scratch[0]) > 3
    assert scratch[0] == scratch[1] != scratch[2] == scratch[3]
    assert not set(scratch[0].values()) & set(scratch[2].values())
    assert len(fake.runtime.entries) == 4


def test_a_longer_call_grows_what_the_stream_keeps_and_earlier_plans_keep_theirs(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "SMALLEST_WORKSPACE", 1)
    device.moe(*(short := arguments(1)))
    device.moe(*arguments(8))
    device.moe(*short)
    sizes = fake.driver.memory
    for launch in (each for each in fake.launches() if each[0] == "fc2"):
        assert workspaces(launch)
        assert set(workspaces(launch).values()) <= sizes.keys()
    assert all(content in (b"", struct.pack("<f", 1)) for content in fake.driver.contents.values())
    fake.runtime.clear()
    assert list(sizes.values()) == [4]  # the divisor 1.0
    device.moe(*short)
    assert len(fake.launches()) == 3


def test_what_is_too_large_to_be_kept_is_torch_s_for_one_call(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "KEPT_SCRATCH", 0)
    made: list[torch.Tensor] = []

    def empty(*shape: Any, **named: Any) -> torch.Tensor:
        made.append(torch.empty(*shape, **named))
        return made[-1]

    monkeypatch.setattr(device, "_empty", empty)
    a = arguments()
    for _ in range(2):
        made.clear()
        out = device.moe(*a)
        assert made[0] is out
        (scratch,) = made[-1:]
        prepare, fc1, fc2 = fake.launches()
        for pointer in (prepare[2]["alpha"], prepare[2]["active_list"], fc1[2]["c"], fc2[2]["a"]):
            assert scratch.data_ptr() <= pointer < scratch.data_ptr() + scratch.numel()


def test_each_capture_has_plans_and_workspaces_of_its_own_which_are_kept(fake: Fake) -> None:
    a = arguments()
    device.moe(*a)
    (eager,) = [each for each in fake.launches() if each[0] == "fc2"]
    fake.capturing = True
    for capture in (5, 5, 6):
        fake.driver.capture = capture
        device.moe(*a)
    first, again, second = (each for each in fake.launches() if each[0] == "fc2")
    assert workspaces(first) == workspaces(again)
    for one, other in ((eager, first), (eager, second), (first, second)):
        assert not {*workspaces(one).values()} & {*workspaces(other).values()}
    # what lies between the launches is torch's, in the graph's pool
    assert not {first[2]["a"], second[2]["a"]} & fake.driver.memory.keys()
    fake.capturing = False
    fake.runtime.clear()
    assert len(fake.runtime.entries) == 0
    assert {*workspaces(first).values(), *workspaces(second).values()} <= fake.driver.memory.keys()
    device.moe(*a)
    assert len(fake.launches()) == 3


def test_old_entries_are_dropped_but_not_those_in_use(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "KEPT_ENTRIES", 3)
    used, one = arguments(1), torch.ones(1)
    device.moe(*used)
    (kept,) = fake.runtime.entries.values()
    held = []  # as by a thread that has found an entry and not launched it yet
    for m in range(1, 6):
        device.moe(*used)
        device.quantize_nvfp4(torch.zeros(m, HIDDEN, dtype=torch.bfloat16), one)
        held += [each for each in fake.runtime.entries.values() if each not in held]
    assert len(fake.runtime.entries) == 3
    assert kept in fake.runtime.entries.values()
    assert len(held) == 6
    for entry in held:
        for plan in entry.plans:
            plan.launch(fake.stream)
    fake.launches()
    device.moe(*used)
    assert len(fake.launches()) == 3


def test_another_device_than_the_current_one_is_made_current_for_the_launches(fake: Fake) -> None:
    a = arguments()
    device.moe(*a)
    assert fake.guarded == []
    fake.device = 1
    device.moe(*a)
    assert (fake.guarded, fake.device) == ([0], 1)
    assert len(fake.launches()) == 6


def test_a_thread_without_a_context_gets_the_device_s(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = fake.driver.launches

    def launcher(*prepared: Any) -> Any:
        def launch(stream: int) -> None:
            for each in prepared:
                if fake.driver.context is None:
                    raise DriverError("cuLaunchKernelEx: CUDA_ERROR_INVALID_CONTEXT", call="cuLaunchKernelEx", code=201)
                launches.append(((each.function, each.config), stream, bytes(each.keep[0])))  # type: ignore[arg-type]

        return launch

    monkeypatch.setattr(fake.driver, "launcher", launcher)
    a = arguments()
    for _ in range(2):  # one that makes its Plans, one that finds them
        fake.driver.context = None
        device.moe(*a)
        assert fake.driver.context == 0
        assert [each[0] for each in fake.launches()] == ["prepare", "fc1", "fc2"]


def test_calls_of_several_threads_on_one_stream_do_not_mix(fake: Fake) -> None:
    layers = [arguments(m) for m in (1, 2, 3, 4)]
    for each in layers:
        device.moe(*each)
    fake.launches()
    threads = [threading.Thread(target=lambda each=each: [device.moe(*each) for _ in range(30)]) for each in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = fake.launches()
    assert len(seen) == 4 * 30 * 3
    inputs = {each[0].data_ptr(): each[1].data_ptr() for each in layers}
    for prepare, fc1, fc2 in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert (prepare[0], fc1[0], fc2[0]) == ("prepare", "fc1", "fc2")
        assert prepare[2]["ids"] == inputs[fc1[2]["a"]]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), ProblemError, "torch.bfloat16"),
        (lambda a: a.__setitem__(0, a[0].t().contiguous().t()), ProblemError, "contiguous"),
        (lambda a: a.__setitem__(2, a[2][:2]), ProblemError, "has shape"),
        (lambda a: a.__setitem__(3, a[3].float()), ProblemError, "torch.uint8"),
        (lambda a: a.__setitem__(9, packing.INTERCHANGE_LAYOUT), PlanError, "pack them for this device"),
        (lambda a: a.__setitem__(3, a[3][:-128]), ProblemError, "packed weights of"),
        (lambda a: a.__setitem__(8, 100), ProblemError, "multiple of 64"),
        (lambda a: a.__setitem__(10, "f64"), ProblemError, "c_dtype"),
        (lambda a: a.__setitem__(7, -1), ProblemError, "hidden"),
        (lambda a: a.__setitem__(0, a[0][0, 0]), ProblemError, "two dimensions"),
        (lambda a: a.__setitem__(0, torch.zeros(4 * HIDDEN + 1, dtype=torch.bfloat16)[1:].reshape(4, HIDDEN)), ProblemError, "align it to 16"),
        (lambda a: a.__setitem__(14, torch.ones(2)), ProblemError, "has shape"),
    ],
)
def test_wrong_inputs_launch_nothing_even_after_a_good_call(fake: Fake, change: Any, error: type[Exception], said: str) -> None:
    a = arguments()
    device.moe(*a)
    fake.launches()
    change(a)
    for _ in range(2):
        with pytest.raises(error, match=said):
            device.moe(*a)
        assert fake.launches() == []


@pytest.fixture(scope="module")
def blackwell_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a layer of four tokens takes on compute capability 10.0."""
    from densemoe.compile import build, matrix

    root = tmp_path_factory.mktemp("blackwell")
    for pattern in ("quantize.sm100f.*.bf16-nvfp4", "prepare.sm100f.*.i32-f32", "fc1.sm100f.t128x128.c1x2.nvfp4-nvfp4",
                    "fc2.sm100f.t128x64.c1x2.nvfp4-bf16"):  # fmt: skip
        assert not build.build(matrix.load(), root, key_filter=pattern).failures
    return root


def test_tensor_maps_are_encoded_once_an_address(blackwell_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Blackwell addresses stand in tensor maps: a call encodes those of addresses that it has not seen, and no others."""
    encoded: list[int] = []

    class Driver(FakeDriver):
        def encode_tensor_map(self, address: int, *rest: Any) -> bytes:
            encoded.append(address)
            return struct.pack("<16Q", address, *range(15))

    driver, launched = Driver(((10, 0),)), []

    def launcher(*prepared: Any) -> Any:
        return lambda stream: launched.extend((each.function.symbol, bytes(each.keep[0])) for each in prepared)

    monkeypatch.setattr(driver, "launcher", launcher)
    runtime = device.Runtime(Loader(blackwell_artifacts, driver), lambda ordinal: 77, lambda: False, lambda: 0)  # type: ignore[arg-type]
    before = device.use_runtime(runtime)
    try:
        a = arguments(4, quantise=True, layout=packing.INTERCHANGE_LAYOUT, ids=torch.int32)
        sizes = [packing.interchange_bytes(op, EXPERTS, 256, 256) for op in ("fc1", "fc2")]
        a[0], a[7], a[8] = torch.zeros(4, 256, dtype=torch.bfloat16), 256, 256
        for position, size in zip((3, 5), sizes, strict=True):
            memory = torch.zeros(size + 128, dtype=torch.uint8)
            a[position] = memory[-memory.data_ptr() % 128 :][:size]
        kept = torch.zeros(4, 256, dtype=torch.bfloat16)
        outputs = [torch.empty_like(kept) for _ in range(2)]
        device.moe_out(*a, c=outputs[0])
        assert encoded
        seen: dict[int, list[Any]] = {0: list(launched)}
        encoded.clear()
        launched.clear()
        device.moe_out(*a, c=outputs[1])
        assert set(encoded) <= {outputs[1].data_ptr()}  # weights and what lies between stay where they are
        seen[1] = list(launched)
        encoded.clear()
        for index in (0, 1, 0):
            launched.clear()
            device.moe_out(*a, c=outputs[index])
            assert launched == seen[index]
        assert encoded == []
        assert seen[0][-1] != seen[1][-1]
        assert any(struct.pack("<Q", outputs[1].data_ptr()) in block for _, block in seen[1])
    finally:
        device.use_runtime(before)


def test_after_an_address_was_refused_every_address_is_written_again(fake: Fake) -> None:
    """The refused call has written those before it."""
    a = arguments()
    given = (torch.zeros(4, EXPERTS * INTERMEDIATE, dtype=torch.bfloat16), a[5], torch.ones(4, EXPERTS))
    rest, c = (EXPERTS, HIDDEN, packing.LAYOUT), torch.zeros(4, HIDDEN, dtype=torch.bfloat16)
    unaligned = torch.zeros(4 * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(4, HIDDEN)
    device.fc2_out(*given, *rest, c=c)
    for _ in range(2):
        with pytest.raises(ProblemError, match="align it to 16"):
            device.fc2_out(given[0].clone(), a[5], given[2].clone(), *rest, c=unaligned)
    fake.launches()
    device.fc2_out(*given, *rest, c=c)
    ((_, _, fc2),) = fake.launches()
    assert [fc2[role] for role in ("a", "b", "alpha", "c")] == [each.data_ptr() for each in (*given, c)]


def test_a_launch_that_failed_leaves_the_stream_to_the_next(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    failing: list[int] = []
    launcher = fake.driver.launcher

    def made(*prepared: Any) -> Any:
        launch = launcher(*prepared)

        def call(stream: int) -> None:
            if failing:
                raise DriverError("cuLaunchKernelEx: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", call="cuLaunchKernelEx", code=failing.pop())
            launch(stream)

        return call

    monkeypatch.setattr(fake.driver, "launcher", made)
    a = arguments()
    device.moe(*a)
    fake.launches()
    failing.append(701)
    with pytest.raises(DriverError, match="OUT_OF_RESOURCES"):
        device.moe(*a)
    assert not fake.launches()
    (entry,) = fake.runtime.entries.values()
    assert entry._turn.qsize() == 1  # a call would wait for ever
    device.moe(*a)
    assert len(fake.launches()) == 3


def test_no_tokens_launch_nothing(fake: Fake) -> None:
    assert device.moe(*arguments(0)).shape == (0, HIDDEN)
    codes, scales = device.quantize_nvfp4(torch.zeros(0, HIDDEN, dtype=torch.bfloat16), torch.ones(1))
    assert (codes.shape, scales.shape) == ((0, HIDDEN // 2), (0, HIDDEN // 16))
    assert fake.launches() == []


def test_single_ops_launch_one_kernel_each(fake: Fake) -> None:
    a = arguments(3)
    x = a[0]
    c, _ = device.fc1_swiglu(x, a[3], a[4], INTERMEDIATE, packing.LAYOUT)
    alpha = torch.ones(3, EXPERTS)
    y = torch.empty(3, HIDDEN, dtype=torch.bfloat16)
    device.fc2_out(c, a[5], alpha, EXPERTS, HIDDEN, packing.LAYOUT, c=y)
    fc1, fc2 = fake.launches()
    assert (fc1[2]["a"], fc1[2]["c"]) == (x.data_ptr(), c.data_ptr())
    assert (fc2[2]["a"], fc2[2]["alpha"], fc2[2]["c"]) == (c.data_ptr(), alpha.data_ptr(), y.data_ptr())
    over = torch.empty(3 * HIDDEN * 2, dtype=torch.bfloat16)
    overlapping = {"c": over[: 3 * HIDDEN].view(3, HIDDEN), "x": over[HIDDEN : 4 * HIDDEN].view(3, HIDDEN)}
    for _ in range(2):  # after a call that was good, too
        with pytest.raises(ProblemError, match="has shape"):
            device.fc2_out(c, a[5], alpha, EXPERTS, HIDDEN, packing.LAYOUT, c=y[:2])
        with pytest.raises(ProblemError, match=r"c \(output\) overlaps x"):
            device.moe_out(overlapping["x"], *a[1:], c=overlapping["c"])
        assert fake.launches() == []
        device.moe_out(y, *a[1:], c=overlapping["c"])
        assert len(fake.launches()) == 3
