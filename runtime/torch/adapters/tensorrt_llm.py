"""TensorRT-LLM, the reference's home: functions with the signatures of its dense-GEMM FC1 and FC2 ops, and a backend like its DENSEGEMM.

FC1's op was called ``cute_dsl_nvfp4_dense_gemm_swiglu_blackwell`` when it was merged, and ``…_swiglu_moe_blackwell`` since that name went to the op
of shared experts: both names stand here for the one of the MoE layer.

Operands are the interchange layout: codes as uint8 or float4_e2m1fn_x2, scales tiled. FC1's and FC2's weights are packed on first use of a pair of
tensors, for the layout that the device's kernels read, and kept as long as the process; ``forget`` drops them.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from densemoe.runtime import packing
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import padded_rows
from densemoe.runtime.problem import GROUP
from densemoe.runtime.torch import ops
from densemoe.runtime.torch.config import MoEConfig, can_implement
from densemoe.runtime.torch.module import untile_scales

__all__ = [
    "DenseGemmBackend",
    "cute_dsl_nvfp4_dense_gemm_fc2_blackwell",
    "cute_dsl_nvfp4_dense_gemm_swiglu_blackwell",
    "cute_dsl_nvfp4_dense_gemm_swiglu_moe_blackwell",
    "forget",
]

Tensor = Any
_FP4: Final = torch.float4_e2m1fn_x2
_OUTPUTS: Final = {_FP4: "nvfp4", torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_packed: dict[tuple[Any, ...], tuple[Tensor, str, tuple[Tensor, Tensor]]] = {}


def forget() -> None:
    """Drops every packed weight."""
    _packed.clear()


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def _layout(device: Any) -> str:
    """What the device's kernels read; on a CPU the interchange layout, which nothing has to be moved for."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return packing.LAYOUT if hopper else packing.INTERCHANGE_LAYOUT


def _pack(op: str, b: Tensor, b_sf: Tensor, experts: int) -> tuple[Tensor, str]:
    key = (op, experts, *((each.data_ptr(), tuple(each.shape), each.stride()) for each in (b, b_sf)))
    if key not in _packed:
        layout = _layout(b.device)
        codes, scales = (_plain(each).cpu().numpy() for each in (b, b_sf))
        if layout == packing.INTERCHANGE_LAYOUT:
            made = packing.pack_interchange(op, codes, scales, experts)
        else:
            made = packing.pack_fc1(codes, scales) if op == "fc1" else packing.pack_fc2(codes, scales, experts)
        _packed[key] = (torch.from_numpy(made).to(b.device), layout, (b, b_sf))  # the originals kept, so that an address means one tensor
    return _packed[key][:2]


def _check(scaling_vector_size: int, output_dtype: Any, allowed: tuple[Any, ...]) -> str:
    if scaling_vector_size != GROUP:
        raise ProblemError(f"scaling_vector_size={scaling_vector_size}: NVFP4 has {GROUP}")
    if output_dtype not in allowed:
        raise ProblemError(f"output_dtype={output_dtype}: use one of {', '.join(map(str, allowed))}")
    return _OUTPUTS[output_dtype]


def _tiled(name: str, scales: Tensor, rows: int, k: int) -> Tensor:
    """Scales of ``rows`` rows of ``k`` values, as bytes in tiles of 128 rows."""
    shape = (padded_rows(rows), k // GROUP)
    if scales.numel() != shape[0] * shape[1]:
        raise ProblemError(f"{name}_sf {list(scales.shape)}: {shape[0] * shape[1]} scale bytes belong to {name} of {rows} rows, in tiles of 128")
    return _plain(scales).reshape(shape)


def cute_dsl_nvfp4_dense_gemm_swiglu_blackwell(
    a: Tensor,
    b: Tensor,
    a_sf: Tensor,
    b_sf: Tensor,
    alpha: Tensor,
    alpha_post: Tensor | None,
    norm_const: Tensor | None,
    *,
    expert_count: int,
    weight_per_expert: int,
    output_dtype: Any = _FP4,
    scaling_vector_size: int = GROUP,
) -> tuple[Tensor, Tensor]:
    """FC1. ``b`` ``[E, 2I, H/2]`` or ``[E·2I, H/2]``, ``weight_per_expert`` 2I; ``norm_const`` is the output multiplier, for FP4 output alone.

    Raises:
        ProblemError: shapes, dtypes or sizes that the contract does not allow.
    """
    c_dtype = _check(scaling_vector_size, output_dtype, tuple(_OUTPUTS))
    hidden, rows = int(a.shape[1]) * 2, expert_count * weight_per_expert
    if b.numel() != rows * hidden // 2 or b_sf.numel() != rows * hidden // GROUP:
        raise ProblemError(f"b {list(b.shape)} with {expert_count} experts of {weight_per_expert} rows, H = {hidden}: the sizes do not agree")
    codes, scales = _plain(b).reshape(expert_count, weight_per_expert, hidden // 2), _plain(b_sf).reshape(rows, hidden // GROUP)
    packed, layout = _pack("fc1", codes, scales, expert_count)
    a_scales = _tiled("a", a_sf, int(a.shape[0]), hidden)
    multiplier = norm_const if c_dtype == "nvfp4" else None
    c, c_sf = ops.fc1_swiglu(_plain(a), packed, alpha, weight_per_expert // 2, layout, c_dtype, multiplier, a_scales, alpha_post)
    return (c.view(_FP4) if c_dtype == "nvfp4" else c), c_sf


cute_dsl_nvfp4_dense_gemm_swiglu_moe_blackwell = cute_dsl_nvfp4_dense_gemm_swiglu_blackwell


def cute_dsl_nvfp4_dense_gemm_fc2_blackwell(
    a: Tensor,
    b: Tensor,
    a_sf: Tensor,
    b_sf: Tensor,
    alpha_scale: Tensor,
    *,
    expert_count: int,
    weight_per_expert: int,
    output_dtype: Any = torch.bfloat16,
    scaling_vector_size: int = GROUP,
) -> Tensor:
    """FC2. ``b`` ``[H, E·I/2]``, ``weight_per_expert`` I, ``alpha_scale`` ``[M, E]``.

    Raises:
        ProblemError: shapes, dtypes or sizes that the contract does not allow.
    """
    c_dtype = _check(scaling_vector_size, output_dtype, (torch.bfloat16, torch.float16, torch.float32))
    k, hidden = expert_count * weight_per_expert, int(b.shape[0])
    if int(a.shape[1]) * 2 != k or int(b.shape[1]) * 2 != k:
        raise ProblemError(f"a {list(a.shape)}, b {list(b.shape)}: K = E·I = {k} belongs to both")
    scales = _tiled("b", b_sf, hidden, k)
    a_scales = _tiled("a", a_sf, int(a.shape[0]), k)
    packed, layout = _pack("fc2", _plain(b), scales, expert_count)
    return ops.fc2(_plain(a), packed, alpha_scale.contiguous(), expert_count, hidden, layout, c_dtype, a_scales)


class DenseGemmBackend:
    """A backend like TensorRT-LLM's DENSEGEMM: quantised hidden states and the router's choice in, hidden states out.

    Args:
        moe: a DenseGemmMoE with ``activations="nvfp4"``.

    Raises:
        ProblemError: its activations are not NVFP4.
    """

    def __init__(self, moe: Any) -> None:
        if moe.config.activations != "nvfp4":
            raise ProblemError(f"activations={moe.config.activations!r}: this backend is given NVFP4 activations; set activations='nvfp4'")
        self.moe = moe

    @staticmethod
    def can_implement(p: Any, d: Any) -> tuple[bool, str]:
        """Whether densemoe runs TensorRT-LLM's ``MoEProblem`` under its ``MoEDeployment``, and why not: by their attributes' names, on any device."""
        if str(p.quant) != "NVFP4":
            return False, f"quantisation {p.quant}: only NVFP4 weights are supported"
        if d.eplb_enabled or d.moe_lora_enabled:
            return False, "replicated experts and LoRA are not supported"
        if None in (p.num_experts, p.top_k, p.hidden_size, p.intermediate_size):
            return True, ""  # unknown sizes are judged when the layer is made
        ranks = {"tp_size": max(1, d.tp_size // d.ep_size), "ep_size": d.ep_size}
        gated = 1.0 if p.swiglu_gptoss_style else None
        return can_implement(
            MoEConfig(p.num_experts, p.top_k, p.hidden_size, p.intermediate_size, **ranks, activation=p.activation.lower(), gated_limit=gated)
        )

    def quantize_input(self, x: Tensor, post_quant_comm: bool = True) -> tuple[Tensor, Tensor]:
        """Codes ``[M, H/2]`` and row-major (not swizzled) scales ``[M, H/16]`` of hidden states ``[M, H]``, by the layer's input scale."""
        codes, scales = ops.quantize_nvfp4(x, self.moe.input_multiplier)
        return codes, untile_scales(scales, int(x.shape[0]))

    def run_moe(self, ctx: Any, *, workspace: Any = None) -> Tensor:
        """``run_moe_nvfp4`` of a run context: its ``x``, ``token_selected_experts``, ``token_final_scales`` and ``x_sf``.

        Raises:
            ProblemError: its communication plan, where it has one, asks for all-to-all.
        """
        plan = getattr(ctx, "comm_plan", None)
        return self.run_moe_nvfp4(
            ctx.x, ctx.token_selected_experts, ctx.token_final_scales, ctx.x_sf, bool(getattr(plan, "enable_alltoall", False))
        )

    def run_moe_nvfp4(
        self,
        x: Tensor,
        token_selected_experts: Tensor,
        token_final_scales: Tensor | None,
        x_sf: Tensor | None = None,
        enable_alltoall: bool = False,
    ) -> Tensor:
        """``x`` codes ``[M, H/2]``, ``x_sf`` row-major scales ``[M, H/16]``, ids and router weights ``[M, k]`` → ``[M, H]``.

        Raises:
            ProblemError: all-to-all is asked for, or scales are missing.
        """
        if enable_alltoall:
            raise ProblemError("all-to-all dispatch is not supported: every rank must see every token")
        if token_final_scales is None or x_sf is None:
            raise ProblemError("token_final_scales and x_sf are needed: router weights, and scales of the quantised hidden states")
        return self.moe(_plain(x), ids=token_selected_experts.contiguous(), weights=token_final_scales, scales=_plain(x_sf))
