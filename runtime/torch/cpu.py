"""The ops on a CPU: slow and exact. Products and sums in float64 (contract sections 2 to 5), one rounding to float32, one to the output dtype.

A layer computes each routed (token, expert) pair alone; what it gives is what the dense form gives, whose other terms are exactly 0.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from densemoe.runtime import nvfp4, packing, reference
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import gate_row, padded_rows, tile_scales, up_row
from densemoe.runtime.problem import GROUP, Problem
from densemoe.runtime.torch.checks import C_DTYPES, check_moe, check_quantize, fc1_problem, fc2_problem

__all__ = ["activation_values", "expert_values", "expert_weights", "fc1_swiglu", "fc2", "moe", "quantize_nvfp4"]

Tensor = Any

_E2M1: Final = torch.from_numpy(np.array(nvfp4.E2M1_VALUES))
_E4M3: Final = torch.from_numpy(np.array(nvfp4.E4M3_VALUES))


def expert_weights(op: str, layout: str, packed: Tensor, experts: int, hidden: int, intermediate: int, expert: int) -> tuple[Any, Any]:
    """One expert's codes and row-major scales (numpy) out of all experts' packed weights on the CPU.

    Raises:
        ProblemError: the layout is unknown, or the packed weights have another size than it gives.
    """
    if layout == packing.INTERCHANGE_LAYOUT:
        size = packing.interchange_bytes(op, experts, hidden, intermediate)
    elif layout == packing.LAYOUT:
        size = packing.packed_bytes(op, experts, hidden, intermediate)
    else:
        raise ProblemError(f"weight layout {layout!r}: use {packing.LAYOUT} or {packing.INTERCHANGE_LAYOUT}")
    if packed.numel() != size:
        raise ProblemError(f"{op}: packed weights of {packed.numel()} bytes: {layout} of E {experts}, H {hidden}, I {intermediate} has {size}")
    array = packed.reshape(-1).numpy()
    if layout == packing.INTERCHANGE_LAYOUT:
        codes, scales = packing.interchange_parts(op, array, experts, hidden, intermediate)
        return packing.fc1_expert(codes, scales, expert) if op == "fc1" else packing.fc2_expert(codes, scales, experts, expert)
    stride = size // experts
    rows, k = (2 * intermediate, hidden) if op == "fc1" else (hidden, intermediate)
    return packing.unpack_expert(op, array[expert * stride : (expert + 1) * stride], rows, k)


def _values(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 ``[R, K]`` of code bytes ``[R, K/2]`` and row-major scale bytes ``[R, K/16]``."""
    both = torch.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1, GROUP)
    return (_E2M1[both.long()] * _E4M3[scales.long()][:, :, None]).reshape(codes.shape[0], -1)


def expert_values(op: str, layout: str, packed: Tensor, experts: int, hidden: int, intermediate: int, expert: int) -> tuple[Tensor, ...]:
    """float64 values of one expert without its global scale: FC1 (up, gate), each ``[I, H]``; FC2 (down ``[H, I]``,)."""
    codes, scales = expert_weights(op, layout, packed, experts, hidden, intermediate, expert)
    values = _values(torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(np.ascontiguousarray(scales)))
    if op == "fc2":
        return (values,)
    columns = np.arange(intermediate)
    return values[torch.from_numpy(up_row(columns))], values[torch.from_numpy(gate_row(columns))]


def activation_values(a: Tensor, a_scales: Tensor | None) -> Tensor:
    """float64 values of activations without their global scale: bf16, or codes with tiled scales."""
    return a.double() if a_scales is None else reference.activation_values(a, a_scales)


def _quantise(x: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[M, K/2]`` and tiled scales of float32-exact ``x``."""
    codes, scales = nvfp4.quantise_rows(x.detach().float().numpy(), np.float32(multiplier.item()))
    return torch.from_numpy(nvfp4.pack_codes(codes)), torch.from_numpy(tile_scales(scales))


def quantize_nvfp4(x: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Contract section 2. See ``ops`` for the arguments."""
    check_quantize(x, multiplier)
    return _quantise(x, multiplier)


def _convert(y: Tensor, c_dtype: str) -> Tensor:
    """float32 values converted once; fp8 saturates (contract section 3, step 6)."""
    if c_dtype in ("e4m3", "e5m2"):
        return torch.from_numpy(nvfp4.convert(y.detach().numpy(), c_dtype)).view(C_DTYPES[c_dtype])
    return y.to(C_DTYPES[c_dtype])


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
    """Contract section 3, every expert."""
    problem = fc1_problem(a, b, alpha, intermediate, c_dtype, output_multiplier, a_scales, alpha_post)
    shape = (problem.experts, problem.hidden, intermediate)
    post = None if alpha_post is None else alpha_post.double()
    exact = reference.fc1(
        activation_values(a, a_scales),
        lambda expert: expert_values("fc1", layout, b, *shape, expert),
        alpha.double(),
        range(problem.experts),
        post,
    )
    return _fc1_output(exact.y.float(), output_multiplier, c_dtype)


def _fc1_output(y: Tensor, output_multiplier: Tensor | None, c_dtype: str) -> tuple[Tensor, Tensor]:
    if output_multiplier is not None:
        return _quantise(y, output_multiplier)
    return _convert(y, c_dtype), torch.empty((0, 0), dtype=torch.uint8)


def fc2(
    a: Tensor, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str = "bf16", a_scales: Tensor | None = None
) -> Tensor:
    """Contract section 4."""
    problem = fc2_problem(a, b, alpha, experts, hidden, c_dtype, a_scales)
    shape = (experts, hidden, problem.intermediate)
    exact = reference.fc2(
        activation_values(a, a_scales),
        lambda expert: expert_values("fc2", layout, b, *shape, expert)[0],
        alpha.double(),
        experts,
        problem.intermediate,
    )
    return _convert(exact.c.float(), c_dtype)


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
    """Contract section 5: quantise, alpha, FC1, FC2."""
    first, second = check_moe(
        x, ids, router, w1, w1_alpha, w2, w2_alpha, hidden, intermediate, c_dtype, input_multiplier, output_multiplier, x_scales, alpha_max
    )
    experts = first.experts
    alpha2 = torch.from_numpy(
        reference.build_alpha(
            ids.numpy() - first_expert, router.detach().numpy(), w2_alpha.detach().numpy(), experts=experts, elsewhere_allowed=elsewhere
        )
    )
    if x_scales is None and input_multiplier is not None:
        x, x_scales = _quantise(x, input_multiplier)
    values = activation_values(x, x_scales)
    total = torch.zeros((first.m, hidden), dtype=torch.float64)
    post, scale = _fused(alpha2, alpha_max)
    for expert in torch.unique(torch.nonzero(alpha2)[:, 1]).tolist():
        tokens = torch.nonzero(alpha2[:, expert])[:, 0]
        up, gate = expert_values("fc1", layout, w1, experts, hidden, intermediate, expert)
        own_post = None if post is None else post[tokens, expert : expert + 1].double()
        exact = reference.fc1(values[tokens], lambda _, both=(up, gate): both, w1_alpha[expert : expert + 1].double(), [0], own_post)
        between = activation_values(*_between(exact.y.float(), output_multiplier, second))
        (down,) = expert_values("fc2", layout, w2, experts, hidden, intermediate, expert)
        factor = scale.double() if scale is not None else alpha2[tokens, expert : expert + 1].double()
        total[tokens] += between @ down.T * factor
    return _convert(total.float(), c_dtype)


def _fused(alpha2: Tensor, alpha_max: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(alpha_post, FC2's scalar) of the fused form, or nothing for the default form."""
    if alpha_max is None:
        return None, None
    if not bool(torch.isfinite(alpha_max).all()) or float(alpha_max) <= 0:
        raise ProblemError(f"alpha_max = {float(alpha_max)}: the fused form needs a finite positive one; use the default form")
    return alpha2 / alpha_max, alpha_max


def _between(y: Tensor, output_multiplier: Tensor | None, second: Problem) -> tuple[Tensor, Tensor | None]:
    """FC1's output as FC2 reads it."""
    if output_multiplier is None:
        return _convert(y, second.a_dtype), None
    codes, scales = _quantise(y, output_multiplier)
    assert scales.shape[0] == padded_rows(int(codes.shape[0]))
    return codes, scales
