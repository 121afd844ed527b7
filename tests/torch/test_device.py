"""The GPU path of the ops on a driver that exists only in Python: what is launched, with which addresses, and what is made only once."""

from __future__ import annotations

import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver

from densemoe.runtime import packing
from densemoe.runtime.errors import PlanError, ProblemError
from densemoe.runtime.loader import Loader
from densemoe.runtime.torch import device

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 128, 64, 2


class Fake:
    """A Runtime over the fake driver; ``stream`` and ``capturing`` may be changed."""

    def __init__(self, root: Path) -> None:
        self.driver, self.stream, self.capturing = FakeDriver(), 77, False
        self.loader = Loader(root, self.driver)  # type: ignore[arg-type]
        self.runtime = device.Runtime(self.loader, lambda ordinal: self.stream, lambda: self.capturing, lambda ordinal: nullcontext())

    def launches(self) -> list[tuple[str, int, dict[str, int]]]:
        """(op, stream, addresses by role) of every launch since the last call."""
        found = []
        by_symbol = {entry.symbol: entry for entry in self.loader.manifest(0).variants.values()}
        for config, stream, block in self.driver.launches:
            kernel, _ = config if len(config) == 2 else (config[0], config[1:])
            entry = by_symbol[getattr(kernel, "symbol", "")] if hasattr(kernel, "symbol") else None
            assert entry is not None
            recipe = entry.recipe
            pointers = {
                each.value: struct.unpack_from("<Q", block, offset)[0]
                for each, (offset, _) in zip(recipe.parameters, recipe.offsets(), strict=True)
                if each.kind == "pointer"
            }
            found.append((entry.key.split(".")[0], stream, pointers))
        self.driver.launches.clear()
        return found


@pytest.fixture(scope="module")
def layer_artifacts(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quick profile, and what layers of 24 tokens take besides."""
    from densemoe.compile import build, matrix

    root = tmp_path_factory.mktemp("layer") / "root"
    shutil.copytree(artifacts, root)
    for pattern in ("route.sm90a.*", "grouped*.t16x64.c1x1.bf16-bf16", "groupedfc1.*.t16x64.c1x1.nvfp4-nvfp4", "groupedfc2.*.t16x64.c1x1.nvfp4-bf16",
                    "fc1.sm90a.t32x64.c1x1.nvfp4-nvfp4", "fc2.sm90a.t32x64.c1x1.nvfp4-bf16"):  # fmt: skip
        assert not build.build(matrix.load(), root, key_filter=pattern).failures
    return root


@pytest.fixture
def fake(layer_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    made = Fake(layer_artifacts)

    def launcher(prepared: Any) -> Any:
        return lambda stream: made.driver.launches.append(((prepared.function, prepared.config), stream, bytes(prepared.keep[0])))  # type: ignore[arg-type]

    monkeypatch.setattr(made.driver, "launcher", launcher)
    before = device.use_runtime(made.runtime)
    yield made
    device.use_runtime(before)


def arguments(m: int = 5, *, quantise: bool = False, fused: bool = False, layout: str = packing.LAYOUT, ids: Any = torch.int32) -> list[Any]:
    one = torch.ones(1)
    sizes = [packing.packed_bytes(op, EXPERTS, HIDDEN, INTERMEDIATE) for op in ("fc1", "fc2")]
    w1, w2 = (torch.zeros(size + 128, dtype=torch.uint8) for size in sizes)
    # torch aligns to 64 on a CPU, weights need 128
    w1, w2 = (w[-w.data_ptr() % 128 :][:size] for w, size in zip((w1, w2), sizes, strict=True))
    return [
        torch.zeros(m, HIDDEN, dtype=torch.bfloat16),
        None,
        torch.zeros(m, TOP_K, dtype=ids),
        torch.ones(m, TOP_K),
        w1,
        torch.ones(EXPERTS),
        w2,
        torch.ones(EXPERTS),
        one if quantise else None,
        one.clone() if quantise else None,
        one.clone() if fused else None,
        HIDDEN,
        INTERMEDIATE,
        layout,
        "bf16",
    ]


def test_a_bf16_layer_is_three_launches_that_hand_memory_on(fake: Fake) -> None:
    a = arguments()
    out = device.moe(*a)
    (prepare, fc1, fc2) = fake.launches()
    assert [each[0] for each in (prepare, fc1, fc2)] == ["prepare", "fc1", "fc2"]
    assert {each[1] for each in (prepare, fc1, fc2)} == {77}
    assert (prepare[2]["ids"], prepare[2]["router"], prepare[2]["w2_alpha"]) == tuple(a[i].data_ptr() for i in (2, 3, 7))
    assert (fc1[2]["a"], fc1[2]["b"], fc1[2]["alpha"], fc1[2]["alpha_post"]) == (a[0].data_ptr(), a[4].data_ptr(), a[5].data_ptr(), 0)
    assert (fc2[2]["a"], fc2[2]["b"], fc2[2]["alpha"]) == (fc1[2]["c"], a[6].data_ptr(), prepare[2]["alpha"])
    assert fc2[2]["c"] == out.data_ptr()
    assert fc1[2]["active_experts"] == fc2[2]["active_experts"] == prepare[2]["active_list"]
    pieces = [prepare[2]["alpha"], prepare[2]["active_list"], fc1[2]["c"]]
    assert len(set(pieces)) == 3


def test_the_first_call_may_open_the_loader(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making an entry opens the loader of the process, under the lock that making an entry holds."""
    lazy = device.Runtime(None, lambda ordinal: 77, lambda: False, lambda ordinal: nullcontext())
    monkeypatch.setattr(device, "Loader", lambda: fake.loader)
    device.use_runtime(lazy)
    call = threading.Thread(target=device.moe, args=arguments(), daemon=True)
    call.start()
    call.join(20)
    assert not call.is_alive(), "deadlock"
    assert len(fake.launches()) == 3


def test_quantising_adds_one_launch_and_the_fused_form_moves_alpha(fake: Fake) -> None:
    a = arguments(quantise=True, fused=True, ids=torch.int64)
    device.moe(*a)
    quantise, prepare, fc1, fc2 = fake.launches()
    assert quantise[0] == "quantize"
    assert quantise[2]["a"] == a[0].data_ptr()
    assert (fc1[2]["a.codes"], fc1[2]["a.scales"]) == (quantise[2]["c.codes"], quantise[2]["c.scales"])
    assert (fc2[2]["a.codes"], fc2[2]["a.scales"]) == (fc1[2]["c.codes"], fc1[2]["c.scales"])
    assert prepare[2]["alpha_divisor"] == fc2[2]["alpha"] == a[10].data_ptr()
    assert fc1[2]["alpha_post"] == prepare[2]["alpha"]


@pytest.mark.parametrize("quantise", [False, True])
def test_many_tokens_are_gathered_by_expert(fake: Fake, quantise: bool) -> None:
    """24 tokens on 2 of 4 experts: twelve rows an expert, so tiles of 16."""
    a = arguments(24, quantise=quantise)
    out = device.moe(*a)
    *quantised, route, fc1, fc2 = fake.launches()
    assert [each[0] for each in (*quantised, route, fc1, fc2)] == ["quantize"] * quantise + ["route", "groupedfc1", "groupedfc2"]
    assert (route[2]["ids"], route[2]["router"], route[2]["w2_alpha"]) == tuple(a[i].data_ptr() for i in (2, 3, 7))
    for role in ("tiles", "rows"):
        assert route[2][role] == fc1[2][role] == fc2[2][role]
    assert fc2[2]["row_alpha"] == route[2]["row_alpha"]
    codes = "codes" if quantise else ""
    given, between, end = (f"{name}.{codes}".rstrip(".") for name in ("a", "c", "a"))
    assert fc1[2][given] == (quantised[0][2]["c.codes"] if quantise else a[0].data_ptr())
    assert fc2[2][end] == fc1[2][between]
    assert fc2[2]["c"] == out.data_ptr()
    assert {plan.problem.group_tile for entry in fake.runtime._entries.values() for plan in entry.plans[-3:]} == {16}


def test_the_fused_form_is_not_gathered(fake: Fake) -> None:
    device.moe(*arguments(24, quantise=True, fused=True))
    assert [each[0] for each in fake.launches()] == ["quantize", "prepare", "fc1", "fc2"]


def test_a_second_call_makes_nothing_and_uses_the_new_tensors(fake: Fake) -> None:
    a = arguments()
    device.moe(*a)
    fake.launches()
    loaded, allocated = list(fake.driver.loads), dict(fake.driver.memory)
    a[0], a[2] = a[0].clone(), a[2].clone()
    out = device.moe(*a)
    prepare, fc1, fc2 = fake.launches()
    assert (prepare[2]["ids"], fc1[2]["a"], fc2[2]["c"]) == (a[2].data_ptr(), a[0].data_ptr(), out.data_ptr())
    assert (fake.driver.loads, fake.driver.memory) == (loaded, allocated)
    assert allocated == {}  # workspaces are torch's


def test_streams_and_layers_share_no_plan(fake: Fake) -> None:
    first, second = arguments(), arguments()
    device.moe(*first)
    fake.stream = 78
    device.moe(*first)
    device.moe(*second)
    seen = fake.launches()
    assert [each[1] for each in seen] == [77] * 3 + [78] * 6
    workspaces = [tuple(v for k, v in each[2].items() if k.startswith("workspace")) for each in seen if each[0] == "fc2"]
    assert len(set(workspaces)) == 3 or workspaces[0] == ()
    assert len(fake.runtime._entries) == 3


def test_plans_of_a_captured_graph_are_kept(fake: Fake) -> None:
    a = arguments()
    device.moe(*a)
    fake.runtime.clear()
    assert len(fake.runtime._entries) == 0
    fake.capturing = True
    device.moe(*a)
    assert len(fake.runtime._entries) == 0  # made during the capture: the graph's alone
    fake.capturing = False
    device.moe(*a)
    fake.capturing = True
    device.moe(*a)
    fake.capturing = False
    fake.runtime.clear()
    assert len(fake.runtime._entries) == 1
    fake.launches()
    device.moe(*a)
    assert len(fake.launches()) == 3


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda a: a.__setitem__(0, a[0].float()), ProblemError, "torch.bfloat16"),
        (lambda a: a.__setitem__(0, a[0].t().contiguous().t()), ProblemError, "contiguous"),
        (lambda a: a.__setitem__(3, a[3][:2]), ProblemError, "has shape"),
        (lambda a: a.__setitem__(4, a[4].float()), ProblemError, "torch.uint8"),
        (lambda a: a.__setitem__(13, packing.INTERCHANGE_LAYOUT), PlanError, "pack them for this device"),
        (lambda a: a.__setitem__(4, a[4][:-128]), ProblemError, "packed weights of"),
        (lambda a: a.__setitem__(12, 100), ProblemError, "multiple of 64"),
        (lambda a: a.__setitem__(14, "f64"), ProblemError, "c_dtype"),
    ],
)
def test_wrong_inputs_launch_nothing_even_after_a_good_call(fake: Fake, change: Any, error: type[Exception], said: str) -> None:
    device.moe(*arguments())
    fake.launches()
    a = arguments()
    change(a)
    with pytest.raises(error, match=said):
        device.moe(*a)
    assert fake.launches() == []


def test_no_tokens_launch_nothing(fake: Fake) -> None:
    assert device.moe(*arguments(0)).shape == (0, HIDDEN)
    codes, scales = device.quantize_nvfp4(torch.zeros(0, HIDDEN, dtype=torch.bfloat16), torch.ones(1))
    assert (codes.shape, scales.shape) == ((0, HIDDEN // 2), (0, HIDDEN // 16))
    assert fake.launches() == []


def test_single_ops_launch_one_kernel_each(fake: Fake) -> None:
    a = arguments(3)
    x = a[0]
    c, _ = device.fc1_swiglu(x, None, a[4], a[5], None, None, INTERMEDIATE, packing.LAYOUT, "bf16")
    alpha = torch.ones(3, EXPERTS)
    y = torch.empty(3, HIDDEN, dtype=torch.bfloat16)
    device.fc2_out(c, None, a[6], alpha, EXPERTS, HIDDEN, packing.LAYOUT, "bf16", c=y)
    fc1, fc2 = fake.launches()
    assert (fc1[2]["a"], fc1[2]["c"]) == (x.data_ptr(), c.data_ptr())
    assert (fc2[2]["a"], fc2[2]["alpha"], fc2[2]["c"]) == (c.data_ptr(), alpha.data_ptr(), y.data_ptr())
    with pytest.raises(ProblemError, match="has shape"):
        device.fc2_out(c, None, a[6], alpha, EXPERTS, HIDDEN, packing.LAYOUT, "bf16", c=y[:2])
    assert fake.launches() == []
