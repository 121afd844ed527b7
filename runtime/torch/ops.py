"""The ops, registered with ``torch.library``: define and impl (the fast path), fake implementations, out variants.

| op | what | section of the contract |
| --- | --- | --- |
| ``densemoe::quantize_nvfp4`` | bf16, f16 or f32 ``[M, K]`` → codes and tiled scales | 2 |
| ``densemoe::fc1_swiglu`` | GEMM over all experts, SwiGLU, optional scale, quantisation or conversion | 3 |
| ``densemoe::fc2`` | GEMM with a scale per token and expert | 4 |
| ``densemoe::moe`` | a whole layer: quantise, alpha, FC1, FC2; at most four launches | 5 |

Each has an overload ``out`` that writes to the caller's tensors and returns nothing, so that ``torch.compile`` may functionalise it. Weights
are packed (``layout`` names how), dtypes are spelled as in the contract (``nvfp4``, ``bf16``, ``f16``, ``f32``, ``e4m3``, ``e5m2``).
Nothing has a gradient: these are inference kernels. Wrong inputs raise ProblemError before anything is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from densemoe.runtime.problem import GROUP, SCALE_ROWS
from densemoe.runtime.torch import cpu, device
from densemoe.runtime.torch.checks import C_DTYPES, require

__all__ = ["SCHEMAS", "fc1_swiglu", "fc2", "moe", "quantize_nvfp4"]

Tensor = Any

_FC1: Final = (
    'Tensor a, Tensor b, Tensor alpha, int intermediate, str layout, str c_dtype="bf16", Tensor? output_multiplier=None, Tensor? a_scales=None,'
    " Tensor? alpha_post=None"
)
_FC2: Final = 'Tensor a, Tensor b, Tensor alpha, int experts, int hidden, str layout, str c_dtype="bf16", Tensor? a_scales=None'
_MOE: Final = (
    "Tensor x, Tensor ids, Tensor router, Tensor w1, Tensor w1_alpha, Tensor w2, Tensor w2_alpha, int hidden, int intermediate, str layout,"
    ' str c_dtype="bf16", Tensor? input_multiplier=None, Tensor? output_multiplier=None, Tensor? x_scales=None, Tensor? alpha_max=None,'
    " int first_expert=0, bool elsewhere=False, bool deterministic=False"
)

#: op → (arguments, outputs)
SCHEMAS: Final = {
    "quantize_nvfp4": ("Tensor x, Tensor multiplier", ("codes", "scales")),
    "fc1_swiglu": (_FC1, ("c", "c_scales")),
    "fc2": (_FC2, ("c",)),
    "moe": (_MOE, ("c",)),
}

_library: Final = torch.library.Library("densemoe", "DEF")


def _padded(rows: Any) -> Any:
    return (rows + SCALE_ROWS - 1) // SCALE_ROWS * SCALE_ROWS


def _fake_quantize(x: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    return x.new_empty((m, k // 2), dtype=torch.uint8), x.new_empty((_padded(m), k // GROUP), dtype=torch.uint8)


def _fake_fc1(
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
    m, n = a.shape[0], alpha.shape[0] * intermediate
    if c_dtype == "nvfp4":
        return a.new_empty((m, n // 2), dtype=torch.uint8), a.new_empty((_padded(m), n // GROUP), dtype=torch.uint8)
    return a.new_empty((m, n), dtype=C_DTYPES[c_dtype]), a.new_empty((0, 0), dtype=torch.uint8)


def _fake_fc2(
    a: Tensor, b: Tensor, alpha: Tensor, experts: int, hidden: int, layout: str, c_dtype: str = "bf16", a_scales: Tensor | None = None
) -> Tensor:
    return a.new_empty((a.shape[0], hidden), dtype=C_DTYPES[c_dtype])


def _fake_moe(
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
    return x.new_empty((x.shape[0], hidden), dtype=C_DTYPES[c_dtype])


def _copying(function: Callable[..., Any], outputs: tuple[str, ...]) -> Callable[..., None]:
    """The CPU's out variant: computes, then copies into tensors of the right shape and dtype."""

    def out(*arguments: Any, **named: Any) -> None:
        targets = [named.pop(name) for name in outputs]
        results = function(*arguments, **named)
        for name, target, result in zip(outputs, targets, results if isinstance(results, tuple) else (results,), strict=True):
            require(name, target, result.dtype, tuple(result.shape), result.device)
            target.copy_(result)

    return out


def _register() -> None:
    on_cpu: dict[str, Callable[..., Any]] = {
        "quantize_nvfp4": cpu.quantize_nvfp4,
        "fc1_swiglu": cpu.fc1_swiglu,
        "fc2": cpu.fc2,
        "moe": cpu.moe,
    }
    on_cuda: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
        "quantize_nvfp4": (device.quantize_nvfp4, device.quantize_nvfp4_out),
        "fc1_swiglu": (device.fc1_swiglu, device.fc1_swiglu_out),
        "fc2": (device.fc2, device.fc2_out),
        "moe": (device.moe, device.moe_out),
    }
    fakes: dict[str, Callable[..., Any]] = {"quantize_nvfp4": _fake_quantize, "fc1_swiglu": _fake_fc1, "fc2": _fake_fc2, "moe": _fake_moe}
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for name, (arguments, outputs) in SCHEMAS.items():
        result = "Tensor" if len(outputs) == 1 else f"({', '.join('Tensor' for _ in outputs)})"
        written = ", ".join(f"Tensor({chr(ord('a') + i)}!) {each}" for i, each in enumerate(outputs))
        _library.define(f"{name}({arguments}) -> {result}", tags=tags)
        _library.define(f"{name}.out({arguments}, *, {written}) -> ()", tags=tags)
        _library.impl(name, on_cpu[name], "CPU")
        _library.impl(f"{name}.out", _copying(on_cpu[name], outputs), "CPU")
        _library.impl(name, on_cuda[name][0], "CUDA")
        _library.impl(f"{name}.out", on_cuda[name][1], "CUDA")
        torch.library.register_fake(f"densemoe::{name}", fakes[name], lib=_library)
        torch.library.register_fake(f"densemoe::{name}.out", lambda *arguments, **named: None, lib=_library)


_register()

#: ``quantize_nvfp4(x, multiplier) -> (codes, scales)``: x bf16, f16 or f32 ``[M, K]``, K % 64 == 0; multiplier f32 ``[1]``, 1 / dequantisation
#: factor; codes uint8 ``[M, K/2]``, scales uint8 ``[⌈M/128⌉·128, K/16]`` in the tiled order.
quantize_nvfp4: Final = torch.ops.densemoe.quantize_nvfp4

#: ``fc1_swiglu(a, b, alpha, intermediate, layout, c_dtype="bf16", output_multiplier=None, a_scales=None, alpha_post=None) -> (c, c_scales)``:
#: a bf16 ``[M, H]``, or codes ``[M, H/2]`` with a_scales; alpha f32 ``[E]``; output_multiplier f32 ``[1]`` exactly for ``nvfp4``; alpha_post f32
#: ``[M, E]``; c ``[M, E·I]`` (codes ``[M, E·I/2]``), c_scales empty for plain outputs (on a GPU one tensor for many calls).
fc1_swiglu: Final = torch.ops.densemoe.fc1_swiglu

#: ``fc2(a, b, alpha, experts, hidden, layout, c_dtype="bf16", a_scales=None) -> c``: a bf16 ``[M, E·I]``, or codes with a_scales; alpha f32
#: ``[M, E]`` or ``[1]``; c ``[M, H]``.
fc2: Final = torch.ops.densemoe.fc2

#: ``moe(x, ids, router, w1, w1_alpha, w2, w2_alpha, hidden, intermediate, layout, c_dtype="bf16", input_multiplier=None, output_multiplier=None,
#: x_scales=None, alpha_max=None, first_expert=0, elsewhere=False, deterministic=False) -> c``: x bf16 ``[M, H]``, or codes ``[M, H/2]`` with
#: x_scales; ids int32 or int64 ``[M, k]``, router f32 ``[M, k]``; input_multiplier: quantise x first; output_multiplier: NVFP4 between FC1 and FC2,
#: else bf16; alpha_max: the fused form; this rank holds experts first_expert … first_expert + E - 1, and ids outside belong to other ranks where
#: ``elsewhere``, else they are an error (on a GPU: NaN in the token's row); ``deterministic``, or ``torch.use_deterministic_algorithms``: the same
#: bits every time on one device.
moe: Final = torch.ops.densemoe.moe
