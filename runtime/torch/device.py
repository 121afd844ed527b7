"""The ops on a GPU: Plans made once per problem, stream and weights, then re-pointed and launched; inputs are checked before a launch.

A Plan is kept under everything that its checks depend on: shapes, dtypes, contiguity and devices of all tensors, the stream, the weights'
address. A call that finds its Plan only writes new addresses into the parameter block. Memory between launches is one allocation of torch's
per call; workspaces are torch's too and belong to one stream's Plan: layers and streams share no scratch.

Plans that a CUDA graph captures are kept for the life of the process, since the graph goes on using their workspaces; the others are dropped,
oldest first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from densemoe.runtime.errors import PlanError, ProblemError
from densemoe.runtime.grouping import group_tile
from densemoe.runtime.layout import padded_rows
from densemoe.runtime.loader import Loader
from densemoe.runtime.plan import WORKSPACE_ALIGNMENT, Plan, packed_weight_bytes
from densemoe.runtime.problem import GROUP, OTHER_ALIGNMENT, Problem
from densemoe.runtime.recipe import evaluate
from densemoe.runtime.torch.checks import C_DTYPES, check_moe, check_quantize, fc1_problem, fc2_problem, require
from densemoe.runtime.variant import GROUPED_OPS

__all__ = [
    "Runtime",
    "check_output",
    "fc1_swiglu",
    "fc1_swiglu_out",
    "fc2",
    "fc2_out",
    "moe",
    "moe_out",
    "quantize_nvfp4",
    "quantize_nvfp4_out",
    "runtime",
    "use_runtime",
]

Tensor = Any
Addresses = dict[str, int]

KEPT_PLANS: Final = 512  # entries; a served model has layers x token counts of them
SCRATCH_ALIGNMENT: Final = 256
_UNALIGNED: Final = OTHER_ALIGNMENT - 1


def check_output(name: str, target: Tensor, like: Tensor) -> None:
    """ProblemError unless ``target`` has the dtype, shape and device of the result ``like`` and is contiguous."""
    require(name, target, like.dtype, tuple(like.shape), like.device)


def _signature(tensor: Tensor | None) -> Any:
    """Everything that a tensor's checks depend on, its address apart."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())


@dataclass
class _Entry:
    """Plans of one call and what they own.

    Attributes:
        plans: in launch order.
        scratch: bytes between the launches, and where each piece begins.
        owned: workspaces.
        pinned: a captured graph uses it.
    """

    plans: tuple[Plan, ...]
    scratch: int = 0
    at: dict[str, int] = field(default_factory=dict)
    owned: list[Tensor] = field(default_factory=list)
    pinned: bool = False
    lock: Any = field(default_factory=threading.Lock)


class Runtime:
    """What the ops launch through. One serves a process; tests give their own loader.

    Args:
        loader: made on first use where absent.
        stream: current stream of a device as an address.
        capturing: whether that stream is being captured.
        guard: makes a device current, a context manager.
    """

    def __init__(
        self,
        loader: Loader | None = None,
        stream: Callable[[int], int] | None = None,
        capturing: Callable[[], bool] | None = None,
        guard: Callable[[int], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._loader = loader
        # the raw stream: torch.cuda.current_stream makes an object at 2 us
        self._stream: Callable[[int], int] = stream or torch._C._cuda_getCurrentRawStream
        self._capturing: Callable[[], bool] = capturing or torch.cuda.is_current_stream_capturing
        self._guard = guard or _device_guard
        self._lock = threading.RLock()  # making an entry may make the loader
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._groups: dict[int, bool] = {}

    @property
    def loader(self) -> Loader:
        """The loader of this process.

        Raises:
            ArtifactError, DriverUnavailable: there are no kernels, or no driver.
        """
        if self._loader is None:
            with self._lock:
                if self._loader is None:
                    self._loader = Loader()
        return self._loader

    def clear(self) -> None:
        """Forgets every Plan that no captured graph uses. The caller makes sure that none of them still runs."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if not entry.pinned]:
                self._drop(self._entries.pop(key))

    def _drop(self, entry: _Entry) -> None:
        for plan in entry.plans:
            plan.close()

    def entry(self, key: Any, make: Callable[[], _Entry]) -> _Entry:
        """The entry of ``key``, made where it is not there yet.

        One that is made while a graph is captured serves that capture alone: its workspaces belong to the graph, which clears them on replay.
        """
        found, capturing = self._entries.get(key), self._capturing()
        if found is None and capturing:
            return make()
        if found is None:
            with self._lock:
                found = self._entries.get(key)
                if found is None:
                    found = self._entries[key] = make()
                    unpinned = [old for old, each in self._entries.items() if not each.pinned]
                    if len(unpinned) > KEPT_PLANS:
                        self._drop(self._entries.pop(unpinned[0]))
        found.pinned = found.pinned or capturing
        return found

    def capturing(self) -> bool:
        """Whether the current stream is being captured."""
        return self._capturing()

    def plan(
        self,
        problem: Problem,
        addresses: Mapping[str, int],
        ordinal: int,
        device: Any,
        owned: list[Tensor],
        layout: str | None = None,
        weight_bytes: int = 0,
        settings: Mapping[str, int] | None = None,
    ) -> Plan:
        """A Plan whose workspaces are torch's.

        Args:
            layout, weight_bytes: of the packed weights, where the op has some.
            settings: run-time switches besides the selection's.

        Raises:
            PlanError: the weights' layout is not the kernel's.
            ProblemError: they have another size than the layout gives.
        """
        choice = self.loader.select(problem, ordinal)
        entry = self.loader.kernel(choice.variant.key, ordinal).entry
        if layout is not None and entry.layout != layout:
            raise PlanError(f"the weights are packed as {layout}, {entry.key} reads {entry.layout}: pack them for this device")
        needed = packed_weight_bytes(entry.layout, problem)
        if weight_bytes != needed:
            raise ProblemError(f"{problem.op}: packed weights of {weight_bytes} bytes: {entry.layout} of this problem has {needed}")
        names = entry.recipe.bind({**problem.names(), "sm_count": self.loader.driver.sm_count(ordinal)}) if problem.m else {}
        workspace: dict[str, int] = {}
        for each in entry.recipe.workspaces if problem.m else ():
            make = torch.zeros if each.zeroed else torch.empty
            memory = make(evaluate(each.nbytes, names) + WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device)
            owned.append(memory)
            workspace[each.role] = -(-memory.data_ptr() // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
        return self.loader.plan(problem, addresses, ordinal, choice.variant.key, workspace, settings)

    def groups(self, ordinal: int) -> bool:
        """Whether the device's set has the kernels over gathered tokens."""
        found = self._groups.get(ordinal)
        if found is None:
            ops = {key.split(".", 1)[0] for key in self.loader.manifest(ordinal).variants}
            found = self._groups[ordinal] = {"route", *GROUPED_OPS} <= ops
        return found

    def launch(self, entry: _Entry, addresses: tuple[Addresses, ...], ordinal: int, stream: int) -> None:
        """Points each Plan to this call's tensors and launches it. M = 0 launches nothing."""
        with self._guard(ordinal), entry.lock:
            for plan, own in zip(entry.plans, addresses, strict=True):
                if plan.problem.m:
                    plan.rebind(own)
                    plan.launch(stream)

    def stream(self, ordinal: int) -> int:
        """The current stream of a device."""
        return self._stream(ordinal)


_NO_GUARD: Final = nullcontext()


def _device_guard(ordinal: int) -> AbstractContextManager[Any]:
    return _NO_GUARD if torch.cuda.current_device() == ordinal else torch.cuda.device(ordinal)


_runtime = Runtime(stream=lambda ordinal: torch._C._cuda_getCurrentRawStream(ordinal))


def runtime() -> Runtime:
    """The Runtime that the ops use."""
    return _runtime


def use_runtime(given: Runtime) -> Runtime:
    """Makes the ops use ``given``: another artifact root, or a test's driver. Returns the one used until now."""
    global _runtime
    before, _runtime = _runtime, given
    return before


def _ordinal(tensor: Tensor) -> int:
    index = tensor.device.index
    return 0 if index is None else int(index)


def _run(
    key: Any,
    tensors: Mapping[str, Tensor | None],
    outputs: Mapping[str, Tensor],
    check: Callable[[], Problem],
    layout: str | None,
) -> None:
    """Launches one kernel. ``tensors`` and ``outputs`` by role."""
    first = next(iter(tensors.values()))
    assert first is not None
    ordinal = _ordinal(first)
    stream = _runtime.stream(ordinal)
    addresses = {role: tensor.data_ptr() for role, tensor in (*tensors.items(), *outputs.items()) if tensor is not None and tensor.numel()}
    unaligned = 0
    for address in addresses.values():
        unaligned |= address & _UNALIGNED
    if unaligned:
        check()

    def make() -> _Entry:
        problem = check()
        owned: list[Tensor] = []
        given = {**dict.fromkeys(problem.tensors(), 0), **addresses}
        if layout is not None:
            given["b"] = addresses.get("b", 0)
        weights = tensors.get("b")
        weight_bytes = 0 if weights is None else weights.numel()
        return _Entry((_runtime.plan(problem, given, ordinal, first.device, owned, layout, weight_bytes),), owned=owned)

    entry = _runtime.entry((key, stream, addresses.get("b"), *(_signature(each) for each in tensors.values())), make)
    _runtime.launch(entry, (addresses,), ordinal, stream)


# ---- quantize_nvfp4


def quantize_nvfp4(x: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """See ``ops``."""
    check_quantize(x, multiplier)
    m, k = x.shape
    codes = torch.empty((m, k // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((padded_rows(m), k // GROUP), dtype=torch.uint8, device=x.device)
    _quantize(x, multiplier, codes, scales)
    return codes, scales


def quantize_nvfp4_out(x: Tensor, multiplier: Tensor, *, codes: Tensor, scales: Tensor) -> None:
    """See ``ops``."""
    check_quantize(x, multiplier)
    m, k = x.shape
    require("codes", codes, torch.uint8, (m, k // 2), x.device, 32)
    require("scales", scales, torch.uint8, (padded_rows(m), k // GROUP), x.device, OTHER_ALIGNMENT)
    _quantize(x, multiplier, codes, scales)


def _quantize(x: Tensor, multiplier: Tensor, codes: Tensor, scales: Tensor) -> None:
    def check() -> Problem:
        return Problem("quantize", int(x.shape[0]), 0, int(x.shape[1]), 0, check_quantize(x, multiplier), "nvfp4")

    _run("quantize", {"a": x, "output_multiplier": multiplier}, {"c.codes": codes, "c.scales": scales}, check, None)


# ---- fc1_swiglu


def fc1_swiglu(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    alpha: Tensor,
    alpha_post: Tensor | None,
    output_multiplier: Tensor | None,
    intermediate: int,
    layout: str,
    c_dtype: str,
) -> tuple[Tensor, Tensor]:
    """See ``ops``."""
    c, c_scales = _fc1_outputs(a, alpha, intermediate, c_dtype)
    _fc1(a, a_scales, b, alpha, alpha_post, output_multiplier, intermediate, layout, c_dtype, c, c_scales)
    return c, c_scales


def fc1_swiglu_out(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    alpha: Tensor,
    alpha_post: Tensor | None,
    output_multiplier: Tensor | None,
    intermediate: int,
    layout: str,
    c_dtype: str,
    *,
    c: Tensor,
    c_scales: Tensor,
) -> None:
    """See ``ops``."""
    fc1_problem(a, a_scales, b, alpha, alpha_post, output_multiplier, intermediate, c_dtype)
    m, n = int(a.shape[0]), int(alpha.shape[0]) * intermediate
    if c_dtype == "nvfp4":
        require("c", c, torch.uint8, (m, n // 2), a.device, 32)
        require("c_scales", c_scales, torch.uint8, (padded_rows(m), n // GROUP), a.device, OTHER_ALIGNMENT)
    else:
        require("c", c, C_DTYPES[c_dtype], (m, n), a.device, OTHER_ALIGNMENT)
    _fc1(a, a_scales, b, alpha, alpha_post, output_multiplier, intermediate, layout, c_dtype, c, c_scales)


def _fc1_outputs(a: Tensor, alpha: Tensor, intermediate: int, c_dtype: str) -> tuple[Tensor, Tensor]:
    m, n = a.shape[0], alpha.shape[0] * intermediate
    if c_dtype == "nvfp4":
        codes = torch.empty((m, n // 2), dtype=torch.uint8, device=a.device)
        return codes, torch.empty((padded_rows(m), n // GROUP), dtype=torch.uint8, device=a.device)
    if c_dtype not in C_DTYPES:
        raise ProblemError(f"c_dtype={c_dtype!r}: use nvfp4, {', '.join(C_DTYPES)}")
    return torch.empty((m, n), dtype=C_DTYPES[c_dtype], device=a.device), torch.empty((0, 0), dtype=torch.uint8, device=a.device)


def _fc1(
    a: Tensor,
    a_scales: Tensor | None,
    b: Tensor,
    alpha: Tensor,
    alpha_post: Tensor | None,
    output_multiplier: Tensor | None,
    intermediate: int,
    layout: str,
    c_dtype: str,
    c: Tensor,
    c_scales: Tensor,
) -> None:
    tensors = {
        **_activation_roles(a, a_scales),
        "alpha": alpha,
        "alpha_post": alpha_post,
        "output_multiplier": output_multiplier,
        "b": b,
    }
    outputs = {"c.codes": c, "c.scales": c_scales} if c_dtype == "nvfp4" else {"c": c}
    _run(
        ("fc1", intermediate, layout, c_dtype),
        tensors,
        outputs,
        lambda: fc1_problem(a, a_scales, b, alpha, alpha_post, output_multiplier, intermediate, c_dtype),
        layout,
    )


def _activation_roles(a: Tensor, a_scales: Tensor | None) -> dict[str, Tensor | None]:
    return {"a": a} if a_scales is None else {"a.codes": a, "a.scales": a_scales}


# ---- fc2


def fc2(a: Tensor, a_scales: Tensor | None, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str) -> Tensor:
    """See ``ops``."""
    fc2_problem(a, a_scales, b, alpha, experts, hidden, c_dtype) if c_dtype not in C_DTYPES else None
    c = torch.empty((a.shape[0], hidden), dtype=C_DTYPES[c_dtype], device=a.device)
    _fc2(a, a_scales, b, alpha, experts, hidden, layout, c_dtype, c)
    return c


def fc2_out(
    a: Tensor, a_scales: Tensor | None, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str, *, c: Tensor
) -> None:
    """See ``ops``."""
    fc2_problem(a, a_scales, b, alpha, experts, hidden, c_dtype)
    require("c", c, C_DTYPES[c_dtype], (int(a.shape[0]), hidden), a.device, OTHER_ALIGNMENT)
    _fc2(a, a_scales, b, alpha, experts, hidden, layout, c_dtype, c)


def _fc2(
    a: Tensor, a_scales: Tensor | None, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str, c: Tensor
) -> None:
    _run(
        ("fc2", experts, hidden, layout, c_dtype),
        {**_activation_roles(a, a_scales), "alpha": alpha, "b": b},
        {"c": c},
        lambda: fc2_problem(a, a_scales, b, alpha, experts, hidden, c_dtype),
        layout,
    )


# ---- moe


def moe(
    x: Tensor,
    x_scales: Tensor | None,
    ids: Tensor,
    router: Tensor,
    w1: Tensor,
    w1_alpha: Tensor,
    w2: Tensor,
    w2_alpha: Tensor,
    input_multiplier: Tensor | None,
    output_multiplier: Tensor | None,
    alpha_max: Tensor | None,
    hidden: int,
    intermediate: int,
    layout: str,
    c_dtype: str,
    first_expert: int = 0,
    elsewhere: bool = False,
) -> Tensor:
    """See ``ops``."""
    if c_dtype not in C_DTYPES:
        raise ProblemError(f"c_dtype={c_dtype!r} for moe: use bf16, f16 or f32")
    c = torch.empty((x.shape[0], hidden), dtype=C_DTYPES[c_dtype], device=x.device)
    arguments = (x, x_scales, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier, alpha_max)
    _moe(arguments, hidden, intermediate, layout, c_dtype, first_expert, elsewhere, c)
    return c


def moe_out(
    x: Tensor,
    x_scales: Tensor | None,
    ids: Tensor,
    router: Tensor,
    w1: Tensor,
    w1_alpha: Tensor,
    w2: Tensor,
    w2_alpha: Tensor,
    input_multiplier: Tensor | None,
    output_multiplier: Tensor | None,
    alpha_max: Tensor | None,
    hidden: int,
    intermediate: int,
    layout: str,
    c_dtype: str,
    first_expert: int = 0,
    elsewhere: bool = False,
    *,
    c: Tensor,
) -> None:
    """See ``ops``."""
    arguments = (x, x_scales, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier, alpha_max)
    check_moe(*arguments, hidden, intermediate, c_dtype)
    require("c", c, C_DTYPES[c_dtype], (int(x.shape[0]), hidden), x.device, OTHER_ALIGNMENT)
    _moe(arguments, hidden, intermediate, layout, c_dtype, first_expert, elsewhere, c)


def _scratch(problems: tuple[Problem, ...], roles: Mapping[str, tuple[int, str]]) -> tuple[int, dict[str, int]]:
    """(bytes, offset by name) of the tensors between launches; ``roles`` says whose tensor each is."""
    at: dict[str, int] = {}
    end = 0
    for name, (position, role) in roles.items():
        at[name] = end
        end += -(-problems[position].tensors()[role].nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
    return end, at


def _moe(
    arguments: tuple[Tensor | None, ...], hidden: int, intermediate: int, layout: str, c_dtype: str, first_expert: int, elsewhere: bool, c: Tensor
) -> None:
    x, x_scales, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier, alpha_max = arguments
    assert x is not None
    assert ids is not None
    assert router is not None
    assert w1 is not None
    assert w1_alpha is not None
    assert w2 is not None
    assert w2_alpha is not None
    ordinal = _ordinal(x)
    stream = _runtime.stream(ordinal)

    def check() -> tuple[Problem, ...]:
        first, second = check_moe(
            x, x_scales, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier, alpha_max, hidden, intermediate, c_dtype
        )
        m, experts = first.m, first.experts
        id_dtype, top_k = "i32" if ids.dtype == torch.int32 else "i64", int(ids.shape[1])
        quantise = (Problem("quantize", m, 0, hidden, 0, check_quantize(x, input_multiplier), "nvfp4"),) if input_multiplier is not None else ()
        tile = group_tile(m, top_k, experts) if alpha_max is None and _runtime.groups(ordinal) else 0
        choice = Problem(
            "route" if tile else "prepare", m, experts, 0, 0, id_dtype, "f32",
            top_k=top_k, first_expert=first_expert, elsewhere=elsewhere, group_tile=tile,
        )  # fmt: skip
        if tile:
            gemms = tuple(replace(each, op=f"grouped{each.op}", top_k=top_k, group_tile=tile) for each in (first, second))
        else:
            gemms = tuple(replace(each, active_list=True) for each in (first, second))
        return (*quantise, choice, *gemms)

    if (x.data_ptr() | c.data_ptr()) & _UNALIGNED:
        check()

    def make() -> _Entry:
        problems = check()
        last = len(problems) - 1
        roles = {role: (last - 2, role) for role, spec in problems[last - 2].tensors().items() if spec.output}
        if input_multiplier is not None:
            roles.update({"x.codes": (0, "c.codes"), "x.scales": (0, "c.scales")})
        if output_multiplier is not None:
            roles.update({"y.codes": (last - 1, "c.codes"), "y.scales": (last - 1, "c.scales")})
        else:
            roles["y"] = (last - 1, "c")
        size, at = _scratch(problems, roles)
        entry = _Entry((), size, at)
        memory = torch.empty(max(size, 1), dtype=torch.uint8, device=x.device)
        # FC1 begins its dependents only after it has waited for prepare, so FC2 may read the list before it waits for FC1
        early = {"early_list": 1} if problems[last].active_list else {}
        weights: list[tuple[str | None, int, dict[str, int]]] = [(None, 0, {})] * (len(problems) - 2)
        weights += [(layout, w1.numel(), {}), (layout, w2.numel(), early)]
        addresses = _moe_addresses(entry, arguments, c, memory.data_ptr())
        if not problems[last].m:
            return entry
        entry.plans = tuple(
            _runtime.plan(problem, own, ordinal, x.device, entry.owned, *each)
            for problem, own, each in zip(problems, addresses, weights, strict=True)
        )
        return entry

    key = ("moe", hidden, intermediate, layout, c_dtype, first_expert, elsewhere, stream, w1.data_ptr(), w2.data_ptr())
    entry = _runtime.entry((*key, *(_signature(each) for each in arguments)), make)
    if not entry.plans:
        return
    memory = torch.empty(entry.scratch, dtype=torch.uint8, device=x.device)
    _runtime.launch(entry, _moe_addresses(entry, arguments, c, memory.data_ptr()), ordinal, stream)


def _moe_addresses(entry: _Entry, arguments: tuple[Tensor | None, ...], c: Tensor, base: int) -> tuple[Addresses, ...]:
    """Addresses by role of each launch: [quantise], prepare or route, FC1, FC2."""
    x, x_scales, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier, alpha_max = (
        0 if each is None else each.data_ptr() for each in arguments
    )
    at = entry.at
    quantise: tuple[Addresses, ...] = ()
    first: Addresses = {"alpha": w1_alpha, "b": w1}
    second: Addresses = {"b": w2, "c": c.data_ptr()}
    choice: Addresses = {"ids": ids, "router": router, "w2_alpha": w2_alpha}
    if "tiles" in at:
        tiles, rows = base + at["tiles"], base + at["rows"]
        choice["tiles"] = first["tiles"] = second["tiles"] = tiles
        choice["rows"] = first["rows"] = second["rows"] = rows
        choice["row_alpha"] = second["row_alpha"] = base + at["row_alpha"]
    else:
        alpha = choice["alpha"] = base + at["alpha"]
        choice["active_list"] = first["active_experts"] = second["active_experts"] = base + at["active_list"]
        choice["alpha_divisor"] = alpha_max or _one(entry, c.device).data_ptr()
        second["alpha"] = alpha_max or alpha
        if alpha_max:
            first["alpha_post"] = alpha
    if input_multiplier:
        codes, scales = base + at["x.codes"], base + at["x.scales"]
        quantise = ({"a": x, "output_multiplier": input_multiplier, "c.codes": codes, "c.scales": scales},)
        first["a.codes"], first["a.scales"] = codes, scales
    elif x_scales:
        first["a.codes"], first["a.scales"] = x, x_scales
    else:
        first["a"] = x
    if output_multiplier:
        codes, scales = base + at["y.codes"], base + at["y.scales"]
        first.update({"output_multiplier": output_multiplier, "c.codes": codes, "c.scales": scales})
        second.update({"a.codes": codes, "a.scales": scales})
    else:
        first["c"] = second["a"] = base + at["y"]
    return (*quantise, choice, first, second)


_ones: dict[Any, Tensor] = {}


def _one(entry: _Entry, device: Any) -> Tensor:
    """A float32 1 on ``device``: the default form's divisor."""
    found = _ones.get(device)
    if found is None and _runtime.capturing():
        found = torch.ones(1, dtype=torch.float32, device=device)
        entry.owned.append(found)
    elif found is None:
        # copied from the host, which waits for it: other streams may read it at once
        found = _ones[device] = torch.tensor([1.0], dtype=torch.float32, device=device)
    return found
