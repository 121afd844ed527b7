"""``DenseGemmMoE``: a MoE layer as a torch module, over ``densemoe::moe``.

    logits ─ route ─► ids, weights ┐
    hidden states, or codes+scales ┴► densemoe::moe ─► (+ shared experts) ─► (all-reduce) ─► hidden states

Its weights are buffers, filled by ``load`` once or again: what they point to does not move, so a captured CUDA graph sees new ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import padded_rows
from densemoe.runtime.routing import refusal
from densemoe.runtime.torch import ops
from densemoe.runtime.torch.config import MoEConfig, can_implement
from densemoe.runtime.torch.routing import route
from densemoe.runtime.torch.weights import MoEWeights, Projection, WeightStore

__all__ = ["DenseGemmMoE", "create_moe", "tile_scales", "untile_scales"]

Tensor = Any
_log = logging.getLogger("densemoe")

_DTYPES: Final = {"bf16": torch.bfloat16, "f16": torch.float16}
_SCALES: Final = ("w1_alpha", "w2_alpha", "input_multiplier", "output_multiplier", "alpha_max")
_BUFFERS: Final = ("w1", "w2", *_SCALES)


def tile_scales(scales: Tensor) -> Tensor:
    """Row-major scale bytes ``[M, C]`` in the 128x4 tiled order, ``[⌈M/128⌉·128, C]``; padding is 0 (contract section 2).

    Raises:
        ProblemError: not uint8 or fp8, not two-dimensional, or C % 4.
    """
    plain = scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales
    if plain.dtype != torch.uint8 or plain.dim() != 2 or plain.shape[1] % 4:
        raise ProblemError(f"scales are {scales.dtype} {list(scales.shape)}: use uint8 or float8_e4m3fn [M, K/16], K % 64 == 0")
    rows, columns = plain.shape
    padded = torch.nn.functional.pad(plain, (0, 0, 0, padded_rows(rows) - rows))
    return padded.reshape(-1, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).reshape(padded.shape).contiguous()


def untile_scales(scales: Tensor, rows: int) -> Tensor:
    """Row-major scale bytes ``[rows, C]`` of tiled ones: what ``tile_scales`` undoes."""
    columns = scales.shape[1]
    return scales.reshape(-1, columns // 4, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(-1, columns)[:rows].contiguous()


@dataclass(frozen=True)
class _Given:
    """Global scales that weights came with, float32 ``[E]`` on the CPU, and those of their activations."""

    w1_scale: Tensor
    w2_scale: Tensor
    input_scale: float | None
    between_scale: float | None


def _kept(scale: Tensor) -> Tensor:
    return scale.detach().to("cpu", copy=True)


class DenseGemmMoE(torch.nn.Module):  # type: ignore[misc]
    """A MoE layer on one rank. It moves with its model (``to``, ``cuda``); ``half`` and ``to(dtype)`` leave its weights and scales as they are.

    Args:
        config: what the layer is.
        weights: this rank's; may come later with ``load``.
        bias: float32 ``[E]`` that DeepSeekV3 and MiniMaxM2 routing add for the choice.
        shared_experts: a module whose output is added. It is added after the sum over ranks, so it must be whole on every rank.
        group: the process group of the sum over ranks; the default one where absent.

    Raises:
        ProblemError: the layer is not supported (``can_implement`` says why), a bias that its routing does not add, or weights that are not its own.
    """

    def __init__(
        self,
        config: MoEConfig,
        weights: MoEWeights | None = None,
        *,
        bias: Tensor | None = None,
        shared_experts: Any = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        accepted, reason = can_implement(config)
        if not accepted:
            raise ProblemError(f"densemoe cannot run this layer: {reason}")
        if bias is not None:
            if tuple(bias.shape) != (config.experts,):
                raise ProblemError(f"bias {list(bias.shape)}: use [E], {[config.experts]}, of all ranks")
            wrong = refusal(config.routing, config.experts, config.top_k, config.groups, config.best_groups, config.scaling, biased=True)
            if wrong:
                raise ProblemError(wrong)
        self.config = config
        self.shared_experts = shared_experts
        self._group = group
        self._given: _Given | None = None
        for name in _BUFFERS:
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        if weights is not None:
            self.load(weights)

    def load(self, weights: MoEWeights) -> None:
        """Takes weights; those of the same sizes go where the old ones lie.

        Raises:
            ProblemError: sizes or layout are not the layer's, a scale that its form needs is missing, or the fused form is not legal.
        """
        c = self.config
        expected = (c.layout, c.rank_experts, c.hidden, c.rank_intermediate)
        found = (weights.layout, weights.experts, weights.hidden, weights.intermediate)
        if found != expected:
            raise ProblemError(f"weights are (layout, E, H, I) {found}: this rank's layer is {expected}")
        given = _Given(_kept(weights.w1_scale), _kept(weights.w2_scale), weights.input_scale, weights.between_scale)
        self._put({"w1": weights.w1, "w2": weights.w2, **self._scales(given, weights.w1.device)})
        self._given = given

    def _put(self, values: Mapping[str, Tensor | None]) -> None:
        """Buffers: in place where the old one has the same size, wherever that lies."""
        for name, value in values.items():
            old = getattr(self, name)
            if old is None or value is None or old.device.type == "meta" or (old.shape, old.dtype) != (value.shape, value.dtype):
                setattr(self, name, value)
            elif old.data_ptr() != value.data_ptr():
                old.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DenseGemmMoE:
        """As every module, but for the scales and the router's bias, which stay float32 when a model is converted to another dtype."""
        before = {name: self._buffers[name] for name in (*_SCALES, "bias")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _scales(self, given: _Given, device: Any) -> dict[str, Tensor | None]:
        c = self.config

        def one(value: float) -> Tensor:
            return torch.tensor([value], dtype=torch.float32, device=device)

        w1_alpha, w2_alpha = given.w1_scale.to(device, copy=True), given.w2_scale.to(device, copy=True)
        multipliers: dict[str, Tensor | None] = {"input_multiplier": None, "output_multiplier": None, "alpha_max": None}
        for name, form, scale, alpha in (
            ("input_multiplier", c.activations, given.input_scale, w1_alpha),
            ("output_multiplier", c.between, given.between_scale, w2_alpha),
        ):
            if form != "nvfp4":
                continue
            if scale is None or not 0 < scale < math.inf:
                which = "activations" if name == "input_multiplier" else "between"
                raise ProblemError(f"{which}='nvfp4' needs the checkpoint's input scales, {scale} is there: calibrate, or use {which}='bf16'")
            multipliers[name] = 1 / one(scale)
            alpha.mul_(one(scale))
        if c.fused_alpha:
            largest = w2_alpha.max().reshape(1).clone()
            if not bool(torch.isfinite(largest)) or float(largest) <= 0:
                raise ProblemError(f"max(w2_alpha) = {float(largest)}: the fused form needs a finite positive one; set fused_alpha=False")
            multipliers["alpha_max"] = largest
        return {"w1_alpha": w1_alpha, "w2_alpha": w2_alpha, **multipliers}

    def update_expert(self, slot: int, gate: Projection, up: Projection, down: Projection) -> None:
        """Replaces the expert in ``slot`` of this rank, in place: for load balancing by swapped experts. The caller makes sure that nothing runs.

        Raises:
            ProblemError: no weights yet, or no such slot. CheckpointError: parts that do not fit. Nothing is written then.
        """
        c = self.config
        if self._given is None:
            raise ProblemError("update_expert before load: load the layer's weights first")
        if "superblock" not in c.layout:
            raise ProblemError(f"update_expert with {c.layout}: an expert does not lie in one piece there; load the layer again")
        if not 0 <= slot < c.rank_experts:
            raise ProblemError(f"update_expert of slot {slot}: use 0 to {c.rank_experts - 1}, the slots of this rank")
        store = WeightStore(1, c.hidden, c.rank_intermediate, c.layout, self.w1.device)
        store.put(0, gate=gate, up=up, down=down)
        new = store.finish()
        given = replace(self._given, w1_scale=self._given.w1_scale.clone(), w2_scale=self._given.w2_scale.clone())
        given.w1_scale[slot], given.w2_scale[slot] = new.w1_scale[0].cpu(), new.w2_scale[0].cpu()
        scales = self._scales(given, self.w1.device)
        for name in ("w1", "w2"):
            stride = getattr(self, name).numel() // c.rank_experts
            getattr(self, name)[slot * stride : (slot + 1) * stride].copy_(getattr(new, name))
        self._put(scales)
        self._given = given

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(ids int32, weights float32), each ``[M, k]``, of router logits ``[M, E]`` by the layer's method."""
        c = self.config
        return route(c.routing, logits, c.top_k, bias=self.bias, groups=c.groups, best_groups=c.best_groups, scaling=c.scaling)

    def forward(
        self,
        x: Tensor,
        router_logits: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[…, H]`` of hidden states.

        Args:
            x: ``[…, H]`` of the layer's dtype, or uint8 NVFP4 codes ``[M, H/2]`` with ``scales``.
            router_logits: ``[M, E]``, or ``ids`` and ``weights`` ``[M, k]`` instead.
            scales: of codes: row-major (not swizzled) ``[M, H/16]``, uint8 or float8_e4m3fn; the global scale is the checkpoint's input scale.

        Raises:
            ProblemError: no weights were loaded, or inputs that do not fit; nothing was launched.
        """
        c, held = self.config, self._buffers  # as an attribute a buffer takes nn.Module 1 us (torch 2.13, a build machine), here 0.06
        if held["w1"] is None:
            raise ProblemError("the layer has no weights: call load, or give them to the constructor")
        if (router_logits is None) == (ids is None) or (ids is None) != (weights is None):
            raise ProblemError("give router_logits, or ids and weights")
        if router_logits is not None:
            if router_logits.shape[-1] != c.experts:
                raise ProblemError(f"router_logits {list(router_logits.shape)}: use [M, E] with E = {c.experts}, of all ranks")
            ids, weights = self.route(router_logits.reshape(-1, router_logits.shape[-1]))
        assert ids is not None
        assert weights is not None
        shape, multiplier, between, alpha_max = x.shape, held["input_multiplier"], held["output_multiplier"], held["alpha_max"]
        if scales is not None:
            if c.activations != "nvfp4":
                raise ProblemError("quantised input for activations='bf16': give hidden states, or set activations='nvfp4'")
            rows, tiled, multiplier = x, tile_scales(scales), None
            shape = (*x.shape[:-1], c.hidden)
        else:
            if x.dtype != _DTYPES[c.dtype]:
                raise ProblemError(f"x is {x.dtype}: this layer has dtype {c.dtype}")
            rows, tiled = x.reshape(-1, x.shape[-1]), None
            if c.activations == "bf16":
                rows = rows.to(torch.bfloat16)
        optional = (multiplier, between, tiled, alpha_max, c.first_expert, c.ep_size > 1, c.deterministic)
        quantises = multiplier is not None or between is not None
        given = 7 if c.deterministic else 6 if c.ep_size > 1 else 4 if alpha_max is not None else 3 if tiled is not None else 2 if quantises else 0
        out = ops.moe(
            rows,
            ids,
            weights.to(torch.float32).contiguous(),
            held["w1"],
            held["w1_alpha"],
            held["w2"],
            held["w2_alpha"],
            c.hidden,
            c.rank_intermediate,
            c.layout,
            c.dtype,
            *optional[:given],  # an argument takes an op 0.15 us, one by name twice that
        ).reshape(shape)
        if c.reduce and c.ranks > 1:
            if not torch.distributed.is_initialized():
                raise ProblemError("reduce=True before torch.distributed.init_process_group: start the process group, or sum over ranks yourself")
            torch.distributed.all_reduce(out, group=self._group)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out

    def extra_repr(self) -> str:
        """What print shows."""
        c = self.config
        forms = "".join(f", {name}" for name, on in (("fused alpha", c.fused_alpha), ("deterministic", c.deterministic)) if on)
        return (
            f"E={c.rank_experts} of {c.experts}, k={c.top_k}, H={c.hidden}, I={c.rank_intermediate} of {c.intermediate}, {c.dtype},"
            f" activations={c.activations}, between={c.between}, {c.routing}{forms}"
        )


def create_moe(
    config: MoEConfig, weights: MoEWeights | None = None, *, fallback: Callable[[MoEConfig], Any] | None = None, **options: Any
) -> Any:
    """A DenseGemmMoE where densemoe can run the layer, else what ``fallback`` makes of the config; the log says which and why.

    Args:
        options: of DenseGemmMoE.

    Raises:
        ProblemError: densemoe cannot run it and no fallback is named.
    """
    accepted, reason = can_implement(config)
    if accepted:
        _log.info("MoE layer (E %d, I %d): densemoe", config.rank_experts, config.rank_intermediate)
        return DenseGemmMoE(config, weights, **options)
    if fallback is None:
        raise ProblemError(f"densemoe cannot run this layer: {reason}; name a fallback to run it otherwise")
    _log.warning("MoE layer (E %d, I %d): fallback %s, because %s", config.experts, config.intermediate, _name(fallback), reason)
    return fallback(config)


def _name(fallback: Callable[..., Any]) -> str:
    return str(getattr(fallback, "__qualname__", type(fallback).__name__))
