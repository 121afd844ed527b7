"""The ops on a GPU: the whole layer here, those of one launch in ``single``. How a call finds its Plans: ``launching``.

``_moe`` is what a layer costs beyond its launches, so it is written out: no loops, no dictionaries, no allocations but the output and one piece of
scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.plan import WEIGHT_ALIGNMENT
from densemoe.runtime.problem import CODES_ALIGNMENT, K64_ORDER_FROM, Problem
from densemoe.runtime.torch import launching
from densemoe.runtime.torch.checks import C_DTYPES, check_moe, check_quantize
from densemoe.runtime.torch.launching import Entry, Launch, Owner, Runtime, Source, check_aligned, runtime, use_runtime
from densemoe.runtime.torch.single import (
    check_given,
    fc1_swiglu,
    fc1_swiglu_out,
    fc2,
    fc2_out,
    quantize_nvfp4,
    quantize_nvfp4_out,
    signature,
)

__all__ = [
    "Runtime",
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
Tensors = Any  # those of `moe` in order, some of them None

PIECE_ALIGNMENT: Final = 256  # of the tensors in a call's scratch
_U8: Final = torch.uint8
_empty: Final = torch.empty
#: Whether ``torch.use_deterministic_algorithms`` asks every op to give the same bits every time.
_always_deterministic: Final = torch._C._get_deterministic_algorithms


def moe(
    x: Tensor,
    ids: Tensor,
    router: Tensor,
    w1: Tensor,
    w1_alpha: Tensor,
    w2: Tensor,
    w2_alpha: Tensor,
    hidden: int,
    intermediate: int,
    layout: str,
    c_dtype: str = "bf16",
    input_multiplier: Tensor | None = None,
    output_multiplier: Tensor | None = None,
    x_scales: Tensor | None = None,
    alpha_max: Tensor | None = None,
    first_expert: int = 0,
    elsewhere: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """See ``ops``."""
    rt, w1_pointer, w2_pointer = launching.current, w1.data_ptr(), w2.data_ptr()
    deterministic = deterministic or _always_deterministic()
    given: Any = input_multiplier is None
    if x_scales is None and alpha_max is None and given is (output_multiplier is None):
        if given:
            like: tuple[Tensor, ...] = (x, ids, router, w1, w1_alpha, w2, w2_alpha)
        else:
            like = (x, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier)
    else:
        optional = (input_multiplier, output_multiplier, x_scales, alpha_max)
        given = tuple([each is None for each in optional])
        like = (x, ids, router, w1, w1_alpha, w2, w2_alpha, *[each for each in optional if each is not None])
    facts = ("moe", w1_pointer, w2_pointer, given, hidden, intermediate, layout, c_dtype, first_expert, elsewhere, deterministic)
    short = rt.last_moe.get(w1_pointer)
    if short is None or short.stream != rt.stream(short.ordinal) or short.facts != facts or not short.check(*like):
        short = rt.shortcut(rt.last_moe, w1_pointer, facts, like)
    if short is not None and not (short.stream and rt.capturing()):
        here = short.alone or rt.current_device() == short.ordinal
        c, scratch = short.output() if here else short.output_elsewhere(), None
        if short.second is not None:
            scratch = short.second() if here else short.second_elsewhere()
        pointers = (
            x.data_ptr(),
            ids.data_ptr(),
            router.data_ptr(),
            w1_pointer,
            w1_alpha.data_ptr(),
            w2_pointer,
            w2_alpha.data_ptr(),
            0 if input_multiplier is None else input_multiplier.data_ptr(),
            0 if output_multiplier is None else output_multiplier.data_ptr(),
            0 if x_scales is None else x_scales.data_ptr(),
            0 if alpha_max is None else alpha_max.data_ptr(),
            c.data_ptr(),
            0 if scratch is None else scratch.data_ptr(),
        )
        short.entry.launch(pointers, short.stream, here)
        return c
    dtype = C_DTYPES.get(c_dtype)
    if dtype is None:
        raise ProblemError(f"c_dtype={c_dtype!r} for moe: use bf16, f16 or f32")
    try:
        make = partial(_empty, x.shape[0], hidden, dtype=dtype, device=x.device)
        c = make()
    except (IndexError, RuntimeError):  # what the checks refuse, or no memory
        check_moe(
            x, ids, router, w1, w1_alpha, w2, w2_alpha, hidden, intermediate, c_dtype, input_multiplier, output_multiplier, x_scales, alpha_max
        )
        raise
    entry = _moe(
        x, ids, router, w1, w1_alpha, w2, w2_alpha, hidden, intermediate, layout, c_dtype,
        input_multiplier, output_multiplier, x_scales, alpha_max, first_expert, elsewhere, deterministic, c, True,
    )  # fmt: skip
    make_scratch = partial(_empty, entry.scratch, dtype=_U8, device=x.device) if entry.scratch else None
    rt.shorten(rt.last_moe, w1_pointer, facts, entry, like, make, make_scratch)
    return c


def moe_out(
    x: Tensor,
    ids: Tensor,
    router: Tensor,
    w1: Tensor,
    w1_alpha: Tensor,
    w2: Tensor,
    w2_alpha: Tensor,
    hidden: int,
    intermediate: int,
    layout: str,
    c_dtype: str = "bf16",
    input_multiplier: Tensor | None = None,
    output_multiplier: Tensor | None = None,
    x_scales: Tensor | None = None,
    alpha_max: Tensor | None = None,
    first_expert: int = 0,
    elsewhere: bool = False,
    deterministic: bool = False,
    *,
    c: Tensor,
) -> None:
    """See ``ops``."""
    _moe(
        x, ids, router, w1, w1_alpha, w2, w2_alpha, hidden, intermediate, layout, c_dtype,
        input_multiplier, output_multiplier, x_scales, alpha_max, first_expert, elsewhere, deterministic or _always_deterministic(), c, False,
    )  # fmt: skip


def _moe(
    x: Tensor,
    ids: Tensor,
    router: Tensor,
    w1: Tensor,
    w1_alpha: Tensor,
    w2: Tensor,
    w2_alpha: Tensor,
    hidden: int,
    intermediate: int,
    layout: str,
    c_dtype: str,
    input_multiplier: Tensor | None,
    output_multiplier: Tensor | None,
    x_scales: Tensor | None,
    alpha_max: Tensor | None,
    first_expert: int,
    elsewhere: bool,
    deterministic: bool,
    c: Tensor,
    own: bool,
) -> Entry:
    rt, ordinal = launching.current, x.get_device()
    stream, w1_pointer, w2_pointer = rt.stream(ordinal), w1.data_ptr(), w2.data_ptr()
    key = (
        "moe", stream, ordinal, hidden, intermediate, layout, c_dtype, first_expert, elsewhere, deterministic, w1_pointer, w2_pointer,
        x.shape, x.dtype, x.is_contiguous(), ids.shape, ids.dtype, ids.is_contiguous(), ids.get_device(),
        router.shape, router.dtype, router.is_contiguous(), router.get_device(),
        w1.shape, w1.dtype, w1.is_contiguous(), w1.get_device(), w2.shape, w2.dtype, w2.is_contiguous(), w2.get_device(),
        w1_alpha.shape, w1_alpha.dtype, w1_alpha.is_contiguous(), w1_alpha.get_device(),
        w2_alpha.shape, w2_alpha.dtype, w2_alpha.is_contiguous(), w2_alpha.get_device(),
        None if input_multiplier is None else signature(input_multiplier),
        None if output_multiplier is None else signature(output_multiplier),
        None if x_scales is None else signature(x_scales),
        None if alpha_max is None else signature(alpha_max),
    )  # fmt: skip
    entry = None if stream and rt.capturing() else rt.entries.get(key)
    if entry is None:
        tensors = (x, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier, x_scales, alpha_max)
        settings = (hidden, intermediate, layout, c_dtype, first_expert, elsewhere, deterministic)
        entry = _entry(rt, key, max(ordinal, 0), stream, tensors, c, settings)
    scratch = _empty(entry.scratch, dtype=_U8, device=x.device) if entry.scratch else None
    pointers = (
        x.data_ptr(),
        ids.data_ptr(),
        router.data_ptr(),
        w1_pointer,
        w1_alpha.data_ptr(),
        w2_pointer,
        w2_alpha.data_ptr(),
        0 if input_multiplier is None else input_multiplier.data_ptr(),
        0 if output_multiplier is None else output_multiplier.data_ptr(),
        0 if x_scales is None else x_scales.data_ptr(),
        0 if alpha_max is None else alpha_max.data_ptr(),
        c.data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
    )
    if not own:
        check_given("c", c, C_DTYPES[c_dtype], (x.shape[0], hidden), x)
        entry.check_apart(pointers, _OUTPUT)
    entry.launch(pointers, stream)
    return entry


_NAMES: Final = (
    "x", "ids", "router weights", "w1", "w1_alpha", "w2", "w2_alpha",
    "input_multiplier", "output_multiplier", "x_scales", "alpha_max", "c", "scratch",
)  # fmt: skip
_OUTPUT: Final = _NAMES.index("c")


def _moe_problems(
    rt: Runtime,
    ordinal: int,
    tensors: Tensors,
    hidden: int,
    intermediate: int,
    c_dtype: str,
    first_expert: int,
    elsewhere: bool,
    deterministic: bool,
) -> tuple[Problem, ...]:
    """[quantise], prepare or route, FC1, FC2 of checked arguments; FC1 and FC2 alone where they sort the router's choice themselves. Where GEMMs read
    NVFP4 decoded, prepare or route quantises."""
    x, ids, router, w1, w1_alpha, w2, w2_alpha, input_multiplier, output_multiplier, x_scales, alpha_max = tensors
    first, second = check_moe(
        x, ids, router, w1, w1_alpha, w2, w2_alpha, hidden, intermediate, c_dtype, input_multiplier, output_multiplier, x_scales, alpha_max
    )
    m, experts = first.m, first.experts
    id_dtype, top_k = "i32" if ids.dtype == torch.int32 else "i64", int(ids.shape[1])
    plain = first.a_dtype == first.c_dtype == "bf16" and input_multiplier is None and alpha_max is None
    if plain and not deterministic:
        tile = rt.sorting_tile(ordinal, first, second, top_k)
        if tile:
            sorting: dict[str, Any] = {
                "top_k": top_k, "group_tile": tile, "routes": True, "id_dtype": id_dtype, "first_expert": first_expert, "elsewhere": elsewhere,
            }  # fmt: skip
            return tuple(replace(each, op=f"grouped{each.op}", **sorting) for each in (first, second))
    tile = rt.group_tile(ordinal, first, second, top_k, deterministic) if alpha_max is None else 0
    ordered = deterministic and tile > 0  # the form over all tokens always gives the same bits
    decoded = tile > 0 or rt.reads_decoded(ordinal)
    x_dtype = ""  # of what route or prepare brings as bf16
    quantise: tuple[Problem, ...] = ()
    if first.a_dtype == "nvfp4" and decoded:
        x_dtype = "nvfp4" if input_multiplier is None else check_quantize(x, input_multiplier)
    elif input_multiplier is not None:
        quantise = (Problem("quantize", m, 0, hidden, 0, check_quantize(x, input_multiplier), "nvfp4"),)
    elif tile >= K64_ORDER_FROM:
        x_dtype = "bf16"
    choice = Problem(
        "route" if tile else "prepare", m, experts, hidden if x_dtype else 0, 0, id_dtype, "f32",
        top_k=top_k, first_expert=first_expert, elsewhere=elsewhere, group_tile=tile, deterministic=ordered,
        x_dtype=x_dtype, x_rounded=bool(x_dtype) and input_multiplier is not None,
    )  # fmt: skip
    if decoded:
        first, second = replace(first, a_dtype="bf16", rounded=not tile and first.c_dtype == "nvfp4"), replace(second, a_dtype="bf16")
    if tile:
        gemms = tuple(replace(each, op=f"grouped{each.op}", top_k=top_k, group_tile=tile) for each in (first, second))
        gemms = (gemms[0], replace(gemms[1], deterministic=ordered))
    else:
        gemms = tuple(replace(each, active_list=True, top_k=top_k) for each in (first, second))
    return (*quantise, choice, *gemms)


def _entry(
    rt: Runtime, key: Any, ordinal: int, stream: int, tensors: Tensors, c: Tensor, settings: tuple[int, int, str, str, int, bool, bool]
) -> Entry:
    """Outside ``_moe``, whose variables would be slower to reach were they shared with a function inside."""
    return rt.entry(key, ordinal, stream, lambda owner: _make_moe(rt, owner, tensors, c, *settings))


def _make_moe(
    rt: Runtime,
    owner: Owner,
    tensors: Tensors,
    c: Tensor,
    hidden: int,
    intermediate: int,
    layout: str,
    c_dtype: str,
    first_expert: int,
    elsewhere: bool,
    deterministic: bool,
) -> Entry:
    ordinal = owner[1]
    problems = _moe_problems(rt, ordinal, tensors, hidden, intermediate, c_dtype, first_expert, elsewhere, deterministic)
    if not problems[-1].m:
        return Entry(rt, owner, (), [Source(name) for name in _NAMES])
    given = [each is not None for each in tensors]
    uses, size = _moe_uses(problems, given)
    _, _, _, w1, _, w2, *_ = tensors
    launches = [
        *(Launch(each, fixed={"alpha_divisor": rt.one(ordinal)} if each.op == "prepare" and not given[10] else None) for each in problems[:-2]),
        Launch(problems[-2], layout, w1.numel()),
        # FC1 begins its dependents only after it has waited for what came before, so FC2 may read the list or the choice before it waits for FC1
        Launch(problems[-1], layout, w2.numel(), {"early_list": 1}),
    ]
    sources = [_source(name, uses[name], problems, {"w1": w1.numel(), "w2": w2.numel()}.get(name, 0)) for name in _NAMES]
    kept = rt.kept_scratch(owner, size)
    memory = None if kept else _empty(size, dtype=_U8, device=c.device)
    pointers = [*(0 if each is None else each.data_ptr() for each in tensors), c.data_ptr(), kept if memory is None else memory.data_ptr()]
    addresses: list[dict[str, int]] = [{} for _ in problems]
    for source, pointer in zip(sources, pointers, strict=True):
        check_aligned(source, pointer)
        for launch, role, offset in source.uses:
            addresses[launch][role] = pointer + offset
    if kept:
        sources[-1] = Source("scratch")  # no call changes it
    return Entry(rt, owner, rt.plans(launches, addresses, owner), sources, 0 if kept else size)


def _source(name: str, uses: list[tuple[int, str, int]], problems: tuple[Problem, ...], weight_bytes: int) -> Source:
    if weight_bytes or name == "scratch":
        return Source(name, WEIGHT_ALIGNMENT if weight_bytes else CODES_ALIGNMENT, weight_bytes, tuple(uses), fixed=bool(weight_bytes))
    specs = [problems[launch].tensors()[role] for launch, role, _ in uses]
    return Source(name, max((each.alignment for each in specs), default=1), max((each.nbytes for each in specs), default=0), tuple(uses))


def _moe_uses(problems: tuple[Problem, ...], given: list[bool]) -> tuple[Mapping[str, list[tuple[int, str, int]]], int]:
    """(launch, role, offset) of each kernel that reads or writes a tensor of the layer, and the bytes of scratch."""
    quantises, quantised_between, quantised_outside, fused = given[7:]
    first, second = (len(problems) - back for back in (2, 1))
    uses: dict[str, list[tuple[int, str, int]]] = {name: [] for name in _NAMES}
    end = 0

    def scratch(position: int, role: str, *readers: tuple[int, str]) -> None:
        """A piece that launch ``position`` writes as ``role``."""
        nonlocal end
        uses["scratch"] += [(launch, as_role, end) for launch, as_role in ((position, role), *readers)]
        end += -(-problems[position].tensors()[role].nbytes // PIECE_ALIGNMENT) * PIECE_ALIGNMENT

    def use(name: str, *at: tuple[int, str]) -> None:
        uses[name] += [(launch, role, 0) for launch, role in at]

    use("w1", (first, "b"))
    use("w1_alpha", (first, "alpha"))
    use("w2", (second, "b"))
    use("c", (second, "c"))
    choice = second if problems[second].routes else first - 1  # the launch that is told the router's weights
    use("router weights", (choice, "router"))
    use("w2_alpha", (choice, "w2_alpha"))
    if problems[second].routes:
        use("ids", (first, "ids"), (second, "ids"))
        use("x", (first, "a"))
        scratch(first, "c", (second, "a"))
        return uses, end
    use("ids", (choice, "ids"))
    if problems[choice].op == "route":
        scratch(choice, "tiles", (first, "tiles"), (second, "tiles"))
        if problems[choice].deterministic:
            scratch(choice, "rows", (first, "rows"))
            scratch(choice, "places", (second, "places"))
        else:
            scratch(choice, "rows", (first, "rows"), (second, "rows"))
        scratch(choice, "row_alpha", (second, "row_alpha"))
    else:
        scratch(choice, "alpha", (first, "alpha_post") if fused else (second, "alpha"))
        scratch(choice, "active_list", (first, "active_experts"), (second, "active_experts"))
        if fused:
            use("alpha_max", (choice, "alpha_divisor"), (second, "alpha"))
    x, codes, scales = (first, "a"), (first, "a.codes"), (first, "a.scales")
    if problems[choice].x_dtype:
        x, codes, scales = (choice, "x"), (choice, "x"), (choice, "x.scales")
        scratch(choice, problems[choice].brought, (first, "a.k64" if problems[first].a_in_k64_order else "a"))
    if quantises and problems[choice].x_rounded:
        use("x", x)
        use("input_multiplier", (choice, "x.multiplier"))
    elif quantises:
        use("x", (0, "a"))
        use("input_multiplier", (0, "output_multiplier"))
        scratch(0, "c.codes", codes)
        scratch(0, "c.scales", scales)
    elif quantised_outside:
        use("x", codes)
        use("x_scales", scales)
    else:
        use("x", x)
    if quantised_between:
        use("output_multiplier", (first, "output_multiplier"))
    if problems[first].c_in_k64_order:
        scratch(first, "c.k64", (second, "a.k64"))
    elif quantised_between and not problems[first].c_decoded:
        scratch(first, "c.codes", (second, "a.codes"))
        scratch(first, "c.scales", (second, "a.scales"))
    else:
        scratch(first, "c", (second, "a"))
    return uses, end
