"""What the ops are given, checked before anything is computed or launched: tensors → ``Problem``, or a ProblemError that says what to do."""

from __future__ import annotations

from typing import Any, Final

import torch

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import padded_rows
from densemoe.runtime.problem import CODES_ALIGNMENT, GROUP, OTHER_ALIGNMENT, Problem

__all__ = ["C_DTYPES", "LARGEST_TOP_K", "check_moe", "check_quantize", "fc1_problem", "fc2_problem", "moe_problems", "require"]

Tensor = Any  # torch.Tensor; torch is not seen by the type checker

#: Output dtypes as the contract spells them; ``nvfp4`` is codes and scales.
C_DTYPES: Final = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
QUANTIZABLE: Final = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
LARGEST_TOP_K: Final = 32  # a token's experts lie one a lane in the kernel that builds alpha
ID_DTYPES: Final = (torch.int32, torch.int64)


def require(name: str, tensor: Tensor, dtype: Any, shape: tuple[int, ...] | None, device: Any, alignment: int = 4) -> None:
    """ProblemError unless ``tensor`` is contiguous, of this dtype, shape, device and, on a GPU, alignment in bytes.

    Args:
        shape: None where any shape may come.
    """
    if tensor.dtype != dtype:
        raise ProblemError(f"{name} is {tensor.dtype}: use {dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ProblemError(f"{name} has shape {list(tensor.shape)}: use {list(shape)}")
    if not tensor.is_contiguous():
        raise ProblemError(f"{name} has strides {tuple(tensor.stride())} for shape {list(tensor.shape)}: give a contiguous tensor")
    if tensor.device != device:
        raise ProblemError(f"{name} lies on {tensor.device}, the activations on {device}: put every tensor on one device")
    if device.type == "cuda" and tensor.data_ptr() % alignment:
        raise ProblemError(f"{name} begins at {tensor.data_ptr():#x}: align it to {alignment} bytes")


def _activations(a: Tensor, a_scales: Tensor | None, name: str) -> tuple[str, int]:
    """(dtype, K) of activations ``[M, K]``."""
    if a.dim() != 2:
        raise ProblemError(f"{name} has shape {list(a.shape)}: use two dimensions")
    if a_scales is None:
        require(name, a, torch.bfloat16, None, a.device, OTHER_ALIGNMENT)
        return "bf16", int(a.shape[1])
    require(f"{name} (codes)", a, torch.uint8, None, a.device, CODES_ALIGNMENT)
    k = int(a.shape[1]) * 2
    require(f"{name}_scales", a_scales, torch.uint8, (padded_rows(int(a.shape[0])), k // GROUP), a.device, OTHER_ALIGNMENT)
    return "nvfp4", k


def _c_dtype(op: str, c_dtype: str) -> str:
    if c_dtype != "nvfp4" and c_dtype not in C_DTYPES:
        raise ProblemError(f"c_dtype={c_dtype!r} for {op}: use nvfp4, {', '.join(C_DTYPES)}")
    return c_dtype


def fc1_problem(
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    intermediate: int,
    c_dtype: str,
    output_multiplier: Tensor | None,
    a_scales: Tensor | None,
    alpha_post: Tensor | None,
) -> Problem:
    """The Problem of ``densemoe::fc1_swiglu``'s arguments.

    Raises:
        ProblemError: what the contract's sections 3 and 8 refuse.
    """
    dtype, hidden = _activations(a, a_scales, "a")
    m, experts = int(a.shape[0]), int(alpha.numel())
    problem = Problem("fc1", m, experts, hidden, intermediate, dtype, _c_dtype("fc1", c_dtype), alpha_post=alpha_post is not None)
    require("alpha", alpha, torch.float32, (experts,), a.device)
    require("b", b, torch.uint8, None, a.device)
    if alpha_post is not None:
        require("alpha_post", alpha_post, torch.float32, (m, experts), a.device)
    if (c_dtype == "nvfp4") != (output_multiplier is not None):
        raise ProblemError(f"output_multiplier with c_dtype={c_dtype!r}: give it exactly for nvfp4")
    if output_multiplier is not None:
        require("output_multiplier", output_multiplier, torch.float32, (1,), a.device)
    return problem


def fc2_problem(a: Tensor, b: Tensor, alpha: Tensor, experts: int, hidden: int, c_dtype: str, a_scales: Tensor | None) -> Problem:
    """The Problem of ``densemoe::fc2``'s arguments.

    Raises:
        ProblemError: what the contract's sections 4 and 8 refuse.
    """
    dtype, k = _activations(a, a_scales, "a")
    m = int(a.shape[0])
    if experts < 1 or k % experts:
        raise ProblemError(f"a has K = {k} for {experts} experts: K = E·I, give E (it is never inferred)")
    scalar = alpha.dim() == 1
    problem = Problem("fc2", m, experts, hidden, k // experts, dtype, _c_dtype("fc2", c_dtype), scalar_alpha=scalar)
    require("alpha", alpha, torch.float32, (1,) if scalar else (m, experts), a.device)
    require("b", b, torch.uint8, None, a.device)
    return problem


def check_quantize(x: Tensor, multiplier: Tensor) -> str:
    """The dtype of ``densemoe::quantize_nvfp4``'s input ``[M, K]``.

    Raises:
        ProblemError: another dtype than bf16, f16 or f32, or K is not a positive multiple of 64.
    """
    if x.dtype not in QUANTIZABLE:
        raise ProblemError(f"x is {x.dtype}: use {', '.join(map(str, QUANTIZABLE))}")
    if x.dim() != 2 or x.shape[1] % 64 or x.shape[1] == 0:
        raise ProblemError(f"x has shape {list(x.shape)}: use [M, K] with K a positive multiple of 64 (contract section 8)")
    require("x", x, x.dtype, None, x.device, OTHER_ALIGNMENT)
    require("multiplier", multiplier, torch.float32, (1,), x.device)
    return QUANTIZABLE[x.dtype]


def moe_problems(
    x: Tensor, experts: int, hidden: int, intermediate: int, *, quantised_input: bool, between: str, fused: bool, c_dtype: str
) -> tuple[Problem, Problem]:
    """The Problems of a layer's FC1 and FC2 (contract section 5)."""
    m, a_dtype = int(x.shape[0]), "nvfp4" if quantised_input else "bf16"
    first = Problem("fc1", m, experts, hidden, intermediate, a_dtype, between, alpha_post=fused)
    return first, Problem("fc2", m, experts, hidden, intermediate, between, c_dtype, scalar_alpha=fused)


def check_moe(
    x: Tensor,
    ids: Tensor,
    router: Tensor,
    w1: Tensor,
    w1_alpha: Tensor,
    w2: Tensor,
    w2_alpha: Tensor,
    hidden: int,
    intermediate: int,
    c_dtype: str,
    input_multiplier: Tensor | None,
    output_multiplier: Tensor | None,
    x_scales: Tensor | None,
    alpha_max: Tensor | None,
) -> tuple[Problem, Problem]:
    """The Problems of ``densemoe::moe``'s arguments.

    Raises:
        ProblemError: what the contract's sections 2 to 5 and 8 refuse.
    """
    device = x.device
    if x_scales is not None or input_multiplier is None:
        _, k = _activations(x, x_scales, "x")
        if x_scales is not None and input_multiplier is not None:
            raise ProblemError("input_multiplier with quantised activations: their codes and scales are taken as they are; leave it out")
    else:
        check_quantize(x, input_multiplier)
        k = int(x.shape[1])
    if k != hidden:
        raise ProblemError(f"x has K = {k}: the layer has hidden = {hidden}")
    m, experts = int(x.shape[0]), int(w1_alpha.numel())
    if ids.dtype not in ID_DTYPES or ids.dim() != 2 or ids.shape[0] != m or not 1 <= ids.shape[1] <= LARGEST_TOP_K:
        raise ProblemError(f"ids are {ids.dtype} {list(ids.shape)}: use int32 or int64 [{m}, k], k from 1 to {LARGEST_TOP_K}")
    require("ids", ids, ids.dtype, None, device)
    require("router weights", router, torch.float32, tuple(ids.shape), device)
    for name, tensor in (("w1_alpha", w1_alpha), ("w2_alpha", w2_alpha)):
        require(name, tensor, torch.float32, (experts,), device)
    for name, tensor in (("w1", w1), ("w2", w2)):
        require(name, tensor, torch.uint8, None, device)
    for name, optional in (("output_multiplier", output_multiplier), ("alpha_max", alpha_max)):
        if optional is not None:
            require(name, optional, torch.float32, (1,), device)
    return moe_problems(
        x,
        experts,
        hidden,
        intermediate,
        quantised_input=x_scales is not None or input_multiplier is not None,
        between="bf16" if output_multiplier is None else "nvfp4",
        fused=alpha_max is not None,
        c_dtype=_c_dtype("moe", c_dtype),
    )
