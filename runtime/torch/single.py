"""Single ops on a GPU: one launch each. A call computes its key (everything that its checks depend on: shapes, dtypes, contiguity and devices of
all tensors, the stream, the weights' address), and launches the entry of that key (``launching``); one that is new is checked and planned first.
Where a shortcut leads to the entry (``launching.Shortcut``), the key is not computed: the one used last for the same weights, found by their address,
or one by a short key.

These functions are what a call costs beyond its launch, so they are written out: no loops, no dictionaries, no allocations but the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final

import torch

from densemoe.runtime.plan import WEIGHT_ALIGNMENT
from densemoe.runtime.problem import GROUP, Problem
from densemoe.runtime.torch import launching
from densemoe.runtime.torch.checks import C_DTYPES, check_quantize, fc1_problem, fc2_problem, require
from densemoe.runtime.torch.launching import Entry, Launch, Owner, Runtime, Source, check_aligned

__all__ = ["check_given", "fc1_swiglu", "fc1_swiglu_out", "fc2", "fc2_out", "quantize_nvfp4", "quantize_nvfp4_out", "signature"]

Tensor = Any

_U8: Final = torch.uint8
_empty: Final = torch.empty


def signature(tensor: Tensor | None) -> Any:
    """Everything that a tensor's checks depend on, its address apart."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor.get_device())


def _entry(rt: Runtime, key: Any, ordinal: int, stream: int, launch: Launch, roles: Iterable[str], pointers: tuple[int, ...]) -> Entry:
    """The entry of a single kernel; ``roles`` stand in the order of ``pointers``. Outside the ops, whose variables would be slower to reach were they
    shared with a function inside."""
    ordinal = max(ordinal, 0)  # a CPU tensor stands for device 0 where tests have no GPU
    return rt.entry(key, ordinal, stream, lambda owner: _make(rt, owner, launch, roles, pointers))


def _make(rt: Runtime, owner: Owner, launch: Launch, roles: Iterable[str], pointers: tuple[int, ...]) -> Entry:
    problem = launch.problem
    specs = problem.tensors()
    sources = []
    for role in roles:
        spec = specs.get(role)
        if spec is not None:
            sources.append(Source(role, spec.alignment, spec.nbytes, ((0, role, 0),)))
        else:
            sources.append(Source("b", WEIGHT_ALIGNMENT, launch.weight_bytes, ((0, "b", 0),), fixed=True) if role == "b" else Source(role))
    addresses = {source.name: pointer for source, pointer in zip(sources, pointers, strict=True) if source.uses}
    for source, pointer in zip(sources, pointers, strict=True):
        check_aligned(source, pointer)
    plans = rt.plans([launch], [addresses], owner) if problem.m else ()
    return Entry(rt, owner, plans, sources)


# ---- quantize_nvfp4

_QUANTIZE: Final = ("a", "output_multiplier", "c.codes", "c.scales")
_QUANTIZE_FACTS: Final = ("quantize",)


def quantize_nvfp4(x: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """See ``ops``."""
    rt = launching.current
    tensors, address = (x, multiplier), multiplier.data_ptr()
    short = rt.last_quantize.get(address)
    if short is None or short.stream != rt.stream(short.ordinal) or not short.check(*tensors):
        short = rt.shortcut(rt.last_quantize, address, _QUANTIZE_FACTS, tensors)
    if short is not None and not (short.stream and rt.capturing()):
        here = short.alone or rt.current_device() == short.ordinal
        codes, scales = (short.output(), short.second()) if here else (short.output_elsewhere(), short.second_elsewhere())
        short.entry.launch((x.data_ptr(), address, codes.data_ptr(), scales.data_ptr()), short.stream, here)
        return codes, scales
    device = x.device
    try:
        m, k = x.shape
        make_codes = partial(_empty, m, k // 2, dtype=_U8, device=device)
        make_scales = partial(_empty, (m + 127) // 128 * 128, k // GROUP, dtype=_U8, device=device)
        codes, scales = make_codes(), make_scales()
    except (ValueError, RuntimeError):  # what the checks refuse, or no memory
        check_quantize(x, multiplier)
        raise
    entry = _quantize(x, multiplier, codes, scales)
    rt.shorten(rt.last_quantize, address, _QUANTIZE_FACTS, entry, tensors, make_codes, make_scales)
    return codes, scales


def quantize_nvfp4_out(x: Tensor, multiplier: Tensor, *, codes: Tensor, scales: Tensor) -> None:
    """See ``ops``."""
    _quantize(x, multiplier, codes, scales, own=False)


def _quantize(x: Tensor, multiplier: Tensor, codes: Tensor, scales: Tensor, own: bool = True) -> Entry:
    rt, ordinal = launching.current, x.get_device()
    stream = rt.stream(ordinal)
    key = (
        "quantize", stream, ordinal, x.shape, x.dtype, x.is_contiguous(),
        multiplier.shape, multiplier.dtype, multiplier.is_contiguous(), multiplier.get_device(),
    )  # fmt: skip
    pointers = (x.data_ptr(), multiplier.data_ptr(), codes.data_ptr(), scales.data_ptr())
    entry = None if stream and rt.capturing() else rt.entries.get(key)
    if entry is None:
        problem = Problem("quantize", int(x.shape[0]), 0, int(x.shape[1]), 0, check_quantize(x, multiplier), "nvfp4")
        entry = _entry(rt, key, ordinal, stream, Launch(problem), _QUANTIZE, pointers)
    if not own:
        m, k = x.shape
        check_given("codes", codes, _U8, (m, k // 2), x)
        check_given("scales", scales, _U8, ((m + 127) // 128 * 128, k // GROUP), x)
        entry.check_apart(pointers, 2)
        entry.check_apart(pointers, 3)
    entry.launch(pointers, stream)
    return entry


def check_given(name: str, target: Tensor, dtype: Any, shape: tuple[int, ...], beside: Tensor) -> None:
    """ProblemError unless an output that the caller gave is what the op would make beside its input; alignment is looked at when it is launched."""
    if target.shape != shape or target.dtype is not dtype or target.get_device() != beside.get_device() or not target.is_contiguous():
        require(name, target, dtype, shape, beside.device)


# ---- fc1_swiglu


_FC1_BF16: Final = ("a", "b", "alpha", "output_multiplier", "-", "alpha_post")
_FC1_NVFP4: Final = ("a.codes", "b", "alpha", "output_multiplier", "a.scales", "alpha_post")


def fc1_swiglu(
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    intermediate: int,
    layout: str,
    c_dtype: str = "bf16",
    output_multiplier: Tensor | None = None,
    a_scales: Tensor | None = None,
    alpha_post: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``ops``."""
    rt, b_pointer = launching.current, b.data_ptr()
    given: Any = output_multiplier is None and a_scales is None and alpha_post is None
    if given:
        tensors = (a, b, alpha)
    else:
        given = (output_multiplier is None, a_scales is None, alpha_post is None)
        tensors = tuple([each for each in (a, b, alpha, output_multiplier, a_scales, alpha_post) if each is not None])
    facts = ("fc1", b_pointer, given, intermediate, layout, c_dtype)
    short = rt.last_fc1.get(b_pointer)
    if short is None or short.stream != rt.stream(short.ordinal) or short.facts != facts or not short.check(*tensors):
        short = rt.shortcut(rt.last_fc1, b_pointer, facts, tensors)
    if short is not None and not (short.stream and rt.capturing()):
        here = short.alone or rt.current_device() == short.ordinal
        c = short.output() if here else short.output_elsewhere()
        if output_multiplier is None:  # so c_dtype is not nvfp4
            c_scales, c_scales_pointer = short.second, 0
        else:
            c_scales = short.second() if here else short.second_elsewhere()
            c_scales_pointer = c_scales.data_ptr()
        pointers = (
            a.data_ptr(),
            b_pointer,
            alpha.data_ptr(),
            0 if output_multiplier is None else output_multiplier.data_ptr(),
            0 if a_scales is None else a_scales.data_ptr(),
            0 if alpha_post is None else alpha_post.data_ptr(),
            c.data_ptr(),
            c_scales_pointer,
        )
        short.entry.launch(pointers, short.stream, here)
        return c, c_scales
    device = a.device
    try:
        m, n = a.shape[0], alpha.shape[0] * intermediate
        if c_dtype == "nvfp4":
            make_c = partial(_empty, m, n // 2, dtype=_U8, device=device)
            second: Any = partial(_empty, (m + 127) // 128 * 128, n // GROUP, dtype=_U8, device=device)
            c, c_scales = make_c(), second()
        else:
            make_c = partial(_empty, m, n, dtype=C_DTYPES[c_dtype], device=device)
            # one tensor for every call: plain outputs have no scales, and an empty tensor takes as long to make as any other
            second = c_scales = _empty(0, 0, dtype=_U8, device=device)
            c = make_c()
    except (IndexError, KeyError, RuntimeError):  # what the checks refuse, or no memory
        fc1_problem(a, b, alpha, intermediate, c_dtype, output_multiplier, a_scales, alpha_post)
        raise
    entry = _fc1(a, b, alpha, intermediate, layout, c_dtype, output_multiplier, a_scales, alpha_post, c, c_scales)
    rt.shorten(rt.last_fc1, b_pointer, facts, entry, tensors, make_c, second)
    return c, c_scales


def fc1_swiglu_out(
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    intermediate: int,
    layout: str,
    c_dtype: str = "bf16",
    output_multiplier: Tensor | None = None,
    a_scales: Tensor | None = None,
    alpha_post: Tensor | None = None,
    *,
    c: Tensor,
    c_scales: Tensor,
) -> None:
    """See ``ops``."""
    _fc1(a, b, alpha, intermediate, layout, c_dtype, output_multiplier, a_scales, alpha_post, c, c_scales, own=False)


def _fc1(
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    intermediate: int,
    layout: str,
    c_dtype: str,
    output_multiplier: Tensor | None,
    a_scales: Tensor | None,
    alpha_post: Tensor | None,
    c: Tensor,
    c_scales: Tensor,
    own: bool = True,
) -> Entry:
    rt, ordinal = launching.current, a.get_device()
    stream, b_pointer = rt.stream(ordinal), b.data_ptr()
    key = (
        "fc1", stream, ordinal, intermediate, layout, c_dtype, b_pointer, a.shape, a.dtype, a.is_contiguous(),
        b.shape, b.dtype, b.is_contiguous(), b.get_device(), alpha.shape, alpha.dtype, alpha.is_contiguous(), alpha.get_device(),
        None if output_multiplier is None else signature(output_multiplier),
        None if a_scales is None else signature(a_scales),
        None if alpha_post is None else signature(alpha_post),
    )  # fmt: skip
    quantised = c_dtype == "nvfp4"
    pointers = (
        a.data_ptr(),
        b_pointer,
        alpha.data_ptr(),
        0 if output_multiplier is None else output_multiplier.data_ptr(),
        0 if a_scales is None else a_scales.data_ptr(),
        0 if alpha_post is None else alpha_post.data_ptr(),
        c.data_ptr(),
        c_scales.data_ptr() if quantised else 0,
    )
    entry = None if stream and rt.capturing() else rt.entries.get(key)
    if entry is None:
        problem = fc1_problem(a, b, alpha, intermediate, c_dtype, output_multiplier, a_scales, alpha_post)
        roles = (*(_FC1_BF16 if a_scales is None else _FC1_NVFP4), *(("c.codes", "c.scales") if quantised else ("c", "-")))
        entry = _entry(rt, key, ordinal, stream, Launch(problem, layout, b.numel()), roles, pointers)
    if not own:
        m, n = a.shape[0], alpha.shape[0] * intermediate
        check_given("c", c, _U8 if quantised else C_DTYPES[c_dtype], (m, n // 2 if quantised else n), a)
        check_given("c_scales", c_scales, _U8, ((m + 127) // 128 * 128, n // GROUP) if quantised else (0, 0), a)
        entry.check_apart(pointers, 6)
        if quantised:
            entry.check_apart(pointers, 7)
    entry.launch(pointers, stream)
    return entry


# ---- fc2


def fc2(
    a: Tensor, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str = "bf16", a_scales: Tensor | None = None
) -> Tensor:
    """See ``ops``."""
    rt, b_pointer = launching.current, b.data_ptr()
    tensors = (a, b, alpha) if a_scales is None else (a, b, alpha, a_scales)
    facts = ("fc2", b_pointer, a_scales is None, experts, hidden, layout, c_dtype)
    short = rt.last_fc2.get(b_pointer)
    if short is None or short.stream != rt.stream(short.ordinal) or short.facts != facts or not short.check(*tensors):
        short = rt.shortcut(rt.last_fc2, b_pointer, facts, tensors)
    if short is not None and not (short.stream and rt.capturing()):
        here = short.alone or rt.current_device() == short.ordinal
        c = short.output() if here else short.output_elsewhere()
        scales = 0 if a_scales is None else a_scales.data_ptr()
        short.entry.launch((a.data_ptr(), b_pointer, alpha.data_ptr(), scales, c.data_ptr()), short.stream, here)
        return c
    try:
        make = partial(_empty, a.shape[0], hidden, dtype=C_DTYPES[c_dtype], device=a.device)
        c = make()
    except (IndexError, KeyError, RuntimeError):  # what the checks refuse, or no memory
        fc2_problem(a, b, alpha, experts, hidden, c_dtype, a_scales)
        raise
    entry = _fc2(a, b, alpha, experts, hidden, layout, c_dtype, a_scales, c)
    rt.shorten(rt.last_fc2, b_pointer, facts, entry, tensors, make)
    return c


def fc2_out(
    a: Tensor, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str = "bf16", a_scales: Tensor | None = None, *, c: Tensor
) -> None:
    """See ``ops``."""
    _fc2(a, b, alpha, experts, hidden, layout, c_dtype, a_scales, c, own=False)


def _fc2(
    a: Tensor, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str, a_scales: Tensor | None, c: Tensor, own: bool = True
) -> Entry:
    rt, ordinal = launching.current, a.get_device()
    stream, b_pointer = rt.stream(ordinal), b.data_ptr()
    key = (
        "fc2", stream, ordinal, experts, hidden, layout, c_dtype, b_pointer, a.shape, a.dtype, a.is_contiguous(),
        b.shape, b.dtype, b.is_contiguous(), b.get_device(), alpha.shape, alpha.dtype, alpha.is_contiguous(), alpha.get_device(),
        None if a_scales is None else signature(a_scales),
    )  # fmt: skip
    pointers = (a.data_ptr(), b_pointer, alpha.data_ptr(), 0 if a_scales is None else a_scales.data_ptr(), c.data_ptr())
    entry = None if stream and rt.capturing() else rt.entries.get(key)
    if entry is None:
        problem = fc2_problem(a, b, alpha, experts, hidden, c_dtype, a_scales)
        roles = ("a", "b", "alpha", "-", "c") if a_scales is None else ("a.codes", "b", "alpha", "a.scales", "c")
        entry = _entry(rt, key, ordinal, stream, Launch(problem, layout, b.numel()), roles, pointers)
    if not own:
        check_given("c", c, C_DTYPES[c_dtype], (a.shape[0], hidden), a)
        entry.check_apart(pointers, 4)
    entry.launch(pointers, stream)
    return entry
