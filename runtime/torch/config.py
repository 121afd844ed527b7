"""What a MoE layer is, and whether densemoe can run it: every refusal has its reason, before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.packing import INTERCHANGE_LAYOUT, LAYOUT
from densemoe.runtime.problem import LARGEST_TOP_K, Problem
from densemoe.runtime.routing import METHODS, refusal
from densemoe.runtime.rules import TCGEN05_K_TILE

__all__ = ["FUSED_ALPHA", "MoEConfig", "can_implement", "fused_by_default"]

FUSED_ALPHA: Final = "DENSEMOE_FUSED_FC2_ALPHA"  # environment variable, read once

ACTIVATIONS: Final = ("silu", "swiglu")  # two names of up · silu(gate)
FORMS: Final = ("bf16", "nvfp4")
DTYPES: Final = ("bf16", "f16")


@cache
def fused_by_default() -> bool:
    """Whether ``DENSEMOE_FUSED_FC2_ALPHA`` asks for the fused form; read on the first call of this process.

    Raises:
        ProblemError: another value than 0 and 1.
    """
    given = os.environ.get(FUSED_ALPHA, "") or "0"
    if given not in ("0", "1"):
        raise ProblemError(f"{FUSED_ALPHA}={given!r}: use 1 (the fused alpha form) or 0 (the default form)")
    return given == "1"


@dataclass(frozen=True)
class MoEConfig:
    """A MoE layer.

    Attributes:
        experts, top_k, hidden, intermediate: E, k, H, I of the whole layer, over all ranks.
        dtype: ``bf16`` or ``f16``: of the input where it is not quantised, and of the output.
        activations: how FC1 reads its input: ``bf16`` (f16 input is rounded to bf16), or ``nvfp4``, quantised by the layer or before it.
        between: dtype between FC1 and FC2: ``bf16``, or ``nvfp4`` as in the reference backend.
        routing: method that turns logits into (ids, weights), see ``routing``; groups, best_groups, scaling: DeepSeekV3's.
        fused_alpha: the router's weights are applied before FC1's output is rounded (contract section 5). Off unless asked for, here or by
            ``DENSEMOE_FUSED_FC2_ALPHA=1``.
        tp_size, tp_rank: tensor parallelism: I split. ep_size, ep_rank: expert parallelism: blocks of experts.
        reduce: the module sums over ranks itself; otherwise the caller does.
        deterministic: the same bits every time on a device, whatever else runs; also where ``torch.use_deterministic_algorithms`` asks for it.
        layout: of the packed weights; it belongs to an architecture.
        activation, gated_limit, gated_beta, bias, router_weight_on_input, quantisation, all_to_all, load_balancing: what other models have.
            Only their defaults are supported; the rest is refused with its reason.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    dtype: str = "bf16"
    activations: str = "bf16"
    between: str = "bf16"
    routing: str = "Renormalize"
    groups: int = 1
    best_groups: int = 1
    scaling: float = 1.0
    fused_alpha: bool = field(default_factory=fused_by_default)
    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    reduce: bool = False
    deterministic: bool = False
    layout: str = LAYOUT
    activation: str = "swiglu"
    gated_limit: float | None = None
    gated_beta: float | None = None
    bias: bool = False
    router_weight_on_input: bool = False
    quantisation: str = "nvfp4"
    all_to_all: bool = False
    load_balancing: bool = False

    @property
    def rank_intermediate(self) -> int:
        """I of this rank."""
        return self.intermediate // self.tp_size

    @property
    def rank_experts(self) -> int:
        """E of this rank."""
        return self.experts // self.ep_size

    @property
    def first_expert(self) -> int:
        """Id of this rank's first expert."""
        return self.ep_rank * self.rank_experts

    @property
    def ranks(self) -> int:
        """Ranks whose outputs add up to the layer's."""
        return self.tp_size * self.ep_size


def can_implement(config: MoEConfig) -> tuple[bool, str]:
    """Whether densemoe runs this layer, and why not.

    Returns:
        (True, "") or (False, what it has that is not supported, and what to do).
    """
    reason = _reason(config)
    return (not reason, reason)


def _reason(c: MoEConfig) -> str:
    if c.gated_limit is not None or c.gated_beta is not None:
        return "gpt-oss's SwiGLU (alpha, beta, limit) is not the contract's: use the model's own experts"
    if c.activation not in ACTIVATIONS:
        return f"activation {c.activation!r}: only SwiGLU (silu) is supported"
    if c.bias:
        return "expert projections with biases: the kernels add none"
    if c.router_weight_on_input:
        return "the router's weight is multiplied into the input: the kernels apply it to the output"
    if c.quantisation != "nvfp4":
        return f"quantisation {c.quantisation!r}: only nvfp4 weights are supported; densemoe convert quantises bf16 ones"
    if c.all_to_all:
        return "all-to-all dispatch: every rank must see every token; use expert parallelism with an all-reduce"
    if c.load_balancing:
        return (
            "expert load balancing by replicated experts needs a map from id to slot, which the op does not take; slots can be replaced with"
            " DenseGemmMoE.update_expert"
        )
    layouts = (LAYOUT, INTERCHANGE_LAYOUT)
    for name, allowed in (("dtype", DTYPES), ("activations", FORMS), ("between", FORMS), ("routing", METHODS), ("layout", layouts)):
        if getattr(c, name) not in allowed:
            return f"{name}={getattr(c, name)!r}: use one of {', '.join(allowed)}"
    for size, rank, name, whole in ((c.tp_size, c.tp_rank, "tp", c.intermediate), (c.ep_size, c.ep_rank, "ep", c.experts)):
        if not 0 <= rank < size:
            return f"{name}_rank={rank} of {name}_size={size}: use 0 to {size - 1}"
        if whole % size:
            return f"{'I' if name == 'tp' else 'E'} = {whole} is not a multiple of {name}_size={size}"
    if not 1 <= c.top_k <= min(c.experts, LARGEST_TOP_K):
        return f"top_k={c.top_k} of {c.experts} experts: use 1 to {min(c.experts, LARGEST_TOP_K)}"
    return refusal(c.routing, c.experts, c.top_k, c.groups, c.best_groups, c.scaling) or _shape_reason(c)


def _shape_reason(c: MoEConfig) -> str:
    own = c.rank_intermediate
    try:
        Problem("fc1", 1, c.rank_experts, c.hidden, own, c.activations, c.between)
        Problem("fc2", 1, c.rank_experts, c.hidden, own, c.between, c.dtype)
    except ProblemError as error:
        return f"{error} (I on this rank is {own})"
    if c.layout != INTERCHANGE_LAYOUT:
        return ""
    if (c.activations, c.between) != ("nvfp4", "nvfp4"):
        return f"activations={c.activations!r}, between={c.between!r} with {c.layout}: the tcgen05 kernels read nvfp4 in both places"
    if own % TCGEN05_K_TILE:
        return f"I = {own} on this rank is not a multiple of {TCGEN05_K_TILE}, the K tile of the tcgen05 kernels: use fewer ranks"
    return ""
