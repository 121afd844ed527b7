"""One rank's packed weights of a layer, filled expert by expert and projection by projection, in any order.

``MoEWeights`` is what the ops read; ``WeightStore`` fills it. Beside the packed weights a store holds one expert at most: a projection that
arrives alone is packed beside zeros, and the packed expert is opened again when the other one arrives (packing loses nothing).

Scales. An expert's gate and up projections share one FC1 alpha, taken from the gate. Where a checkpoint's two global scales differ, the up
projection enters the output linearly, so the ratio up / gate moves into the expert's FC2 alpha: exact up to the point where FC1's output is
rounded, which sees values smaller by that ratio. It is warned about.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from densemoe.runtime import packing
from densemoe.runtime.errors import CheckpointError, ProblemError
from densemoe.runtime.layout import deinterleave_up_gate, interleave_up_gate, scale_offsets
from densemoe.runtime.nvfp4 import GROUP, quantise_expert

__all__ = ["PROJECTIONS", "MoEWeights", "Projection", "WeightStore", "quantize_projection"]

Bytes = npt.NDArray[np.uint8]
Tensor = Any

PROJECTIONS: Final = ("gate", "up", "down")


@dataclass(frozen=True)
class Projection:
    """One projection of one expert in NVFP4.

    Attributes:
        codes: uint8 ``[R, K/2]``, low nibble first; R, K = I, H for gate and up, H, I for down.
        scales: e4m3 bytes, row-major ``[R, K/16]``.
        global_scale: dequantisation factor of the weights.
        input_scale: dequantisation factor of the activations that a calibration gave, or None.
    """

    codes: Bytes
    scales: Bytes
    global_scale: np.float32
    input_scale: np.float32 | None = None


def quantize_projection(weight: Any) -> Projection:
    """NVFP4 of an unquantised projection ``[R, K]``: a torch tensor or numpy array of bf16, f16 or f32 (contract section 2).

    Raises:
        ProblemError: not two-dimensional, K % 64, or values that are not finite.
    """
    array = weight.detach().float().cpu().numpy() if isinstance(weight, torch.Tensor) else np.asarray(weight, dtype=np.float32)
    return Projection(*quantise_expert(array))


@dataclass(frozen=True)
class MoEWeights:
    """Packed weights and scales of one layer on one rank.

    Attributes:
        layout: of the packed weights.
        experts, hidden, intermediate: E and I of this rank, H.
        w1, w2: uint8 packed weights.
        w1_scale, w2_scale: float32 ``[E]`` global scales; w2's holds the up/gate ratio too.
        input_scale: float32 dequantisation factor of the layer's NVFP4 input: the largest of all experts', or None.
        between_scale: the same for FC2's NVFP4 input.
    """

    layout: str
    experts: int
    hidden: int
    intermediate: int
    w1: Tensor
    w2: Tensor
    w1_scale: Tensor
    w2_scale: Tensor
    input_scale: float | None = None
    between_scale: float | None = None

    def to(self, device: Any) -> MoEWeights:
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("w1", "w2", "w1_scale", "w2_scale")})


class WeightStore:
    """Fills a layer's packed weights.

    Args:
        experts, hidden, intermediate: E and I of this rank, H.
        layout: ``packing.LAYOUT`` or ``packing.INTERCHANGE_LAYOUT``.
        device: where the packed weights lie.
        out: packed weights to fill, (w1, w2) numpy uint8 arrays of zeros, for example of a mapped file; on the CPU.

    Raises:
        ProblemError: H, or this rank's I, is not a multiple of 64, or the layout is not known.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        layout: str = packing.LAYOUT,
        device: Any = "cpu",
        out: tuple[Bytes, Bytes] | None = None,
    ) -> None:
        if layout not in (packing.LAYOUT, packing.INTERCHANGE_LAYOUT):
            raise ProblemError(f"weight layout {layout!r}: use {packing.LAYOUT} or {packing.INTERCHANGE_LAYOUT}")
        size = packing.packed_bytes if layout == packing.LAYOUT else packing.interchange_bytes
        sizes = [size(op, experts, hidden, intermediate) for op in ("fc1", "fc2")]
        self.layout, self.experts, self.hidden, self.intermediate = layout, experts, hidden, intermediate
        if out is None:
            self._packed = [torch.zeros(each, dtype=torch.uint8, device=device) for each in sizes]
        else:
            self._packed = [torch.from_numpy(each.reshape(-1)) for each in out]
            if [each.numel() for each in self._packed] != sizes:
                raise ProblemError(f"out has {[each.numel() for each in self._packed]} bytes: {layout} needs {sizes}")
        self._scales = np.full((3, experts), np.nan, dtype=np.float32)
        self._inputs = np.full((3, experts), np.nan, dtype=np.float32)

    def _shape(self, projection: str) -> tuple[int, int]:
        return (self.hidden, self.intermediate) if projection == "down" else (self.intermediate, self.hidden)

    def _check(self, expert: int, name: str, given: Projection) -> None:
        if name not in PROJECTIONS or not 0 <= expert < self.experts:
            raise CheckpointError(f"projection {name!r} of expert {expert}: use {', '.join(PROJECTIONS)} and 0 to {self.experts - 1}")
        rows, k = self._shape(name)
        for what, array, shape in (("codes", given.codes, (rows, k // 2)), ("scales", given.scales, (rows, k // GROUP))):
            if array.shape != shape or array.dtype != np.uint8:
                raise CheckpointError(f"expert {expert}, {name}: {what} are {array.dtype} {list(array.shape)}: use uint8 {list(shape)}")
        if given.scales.max(initial=0) >= packing.FIRST_REFUSED_SCALE:
            raise CheckpointError(f"expert {expert}, {name}: a weight scale is NaN or negative: the checkpoint is damaged, or has no e4m3")
        scale = given.global_scale
        if not np.isfinite(scale) or scale <= 0:
            raise CheckpointError(f"expert {expert}, {name}: global scale {scale}: a positive finite number belongs there")

    def put(self, expert: int, **projections: Projection) -> None:
        """Packs one or more projections (``gate``, ``up``, ``down``) of an expert; one that was there is replaced.

        Raises:
            CheckpointError: names, shapes or scales that do not fit. Nothing is written then.
        """
        for name, given in projections.items():
            self._check(expert, name, given)
        halves = {name: given for name, given in projections.items() if name != "down"}
        if halves:
            self._put_halves(expert, halves)
        if "down" in projections:
            self._write("fc2", expert, projections["down"].codes, projections["down"].scales)
        for name, given in projections.items():
            row = PROJECTIONS.index(name)
            self._scales[row, expert] = given.global_scale
            self._inputs[row, expert] = np.nan if given.input_scale is None else given.input_scale

    def _put_halves(self, expert: int, halves: dict[str, Projection]) -> None:
        codes, scales = {n: p.codes for n, p in halves.items()}, {n: p.scales for n, p in halves.items()}
        if len(halves) == 1:
            (absent,) = {"up", "gate"} - halves.keys()
            index = 0 if absent == "up" else 1
            old_codes, old_scales = self._read_fc1(expert)
            codes[absent], scales[absent] = deinterleave_up_gate(old_codes)[index], deinterleave_up_gate(old_scales)[index]
        both = (interleave_up_gate(codes["up"], codes["gate"]), interleave_up_gate(scales["up"], scales["gate"]))
        self._write("fc1", expert, *both)

    def _interchange(self, op: str) -> tuple[Tensor, Tensor]:
        """Views of codes and tiled scales (flat)."""
        packed = self._packed[0 if op == "fc1" else 1]
        per_code = self.experts * self.hidden * self.intermediate // (1 if op == "fc1" else 2)
        return packed[:per_code], packed[per_code:]

    def _write(self, op: str, expert: int, codes: Bytes, scales: Bytes) -> None:
        packed = self._packed[0 if op == "fc1" else 1]
        if self.layout == packing.LAYOUT:
            stride = packed.numel() // self.experts
            slot = packed[expert * stride : (expert + 1) * stride]
            if slot.device.type == "cpu":
                packing.pack_expert(op, codes, scales, slot.numpy())
            else:
                slot.copy_(torch.from_numpy(packing.pack_expert(op, codes, scales)))
            return
        all_codes, all_scales = self._interchange(op)
        offsets, target = self._places(op, expert, all_codes)
        target.copy_(torch.from_numpy(np.ascontiguousarray(codes)))
        all_scales[torch.from_numpy(offsets).to(all_scales.device)] = torch.from_numpy(np.ascontiguousarray(scales)).to(all_scales.device)

    def _places(self, op: str, expert: int, all_codes: Tensor) -> tuple[npt.NDArray[np.int64], Tensor]:
        """Offsets of an expert's scales among the tiled ones, and the view of its codes."""
        if op == "fc1":
            rows = 2 * self.intermediate
            offsets = scale_offsets(np.arange(expert * rows, (expert + 1) * rows)[:, None], np.arange(self.hidden // GROUP), self.hidden // GROUP)
            return offsets, all_codes.view(self.experts, rows, self.hidden // 2)[expert]
        half, groups = self.intermediate // 2, self.intermediate // GROUP
        columns = np.arange(expert * groups, (expert + 1) * groups)
        offsets = scale_offsets(np.arange(self.hidden)[:, None], columns, self.experts * groups)
        return offsets, all_codes.view(self.hidden, -1)[:, expert * half : (expert + 1) * half]

    def _read_fc1(self, expert: int) -> tuple[Bytes, Bytes]:
        """What is packed of an expert's FC1: codes and row-major scales, interleaved."""
        if self.layout == packing.LAYOUT:
            stride = self._packed[0].numel() // self.experts
            slot = self._packed[0][expert * stride : (expert + 1) * stride].cpu().numpy()
            return packing.unpack_expert("fc1", slot, 2 * self.intermediate, self.hidden)
        all_codes, all_scales = self._interchange("fc1")
        offsets, codes = self._places("fc1", expert, all_codes)
        return codes.cpu().numpy(), all_scales[torch.from_numpy(offsets).to(all_scales.device)].cpu().numpy()

    def missing(self) -> list[str]:
        """What has not arrived, as ``expert 3: up``."""
        return [f"expert {e}: {PROJECTIONS[p]}" for p, e in zip(*np.nonzero(np.isnan(self._scales)), strict=True)]

    def finish(self) -> MoEWeights:
        """The weights, complete. More may be put afterwards, and ``finish`` called again: the packed memory is the same.

        Raises:
            CheckpointError: a projection is missing.
        """
        missing = self.missing()
        if missing:
            raise CheckpointError(f"{len(missing)} projections have not been loaded ({', '.join(missing[:4])}{' …' * (len(missing) > 4)})")
        gate, up, down = self._scales
        different = np.flatnonzero(gate != up)
        if different.size:
            e = int(different[0])
            warnings.warn(
                f"gate (w1) and up (w3) have different global scales in {different.size} of {self.experts} experts (expert {e}: {gate[e]}, {up[e]}):"
                " the ratio is moved into FC2's alpha, exactly",
                stacklevel=2,
            )
        w2_scale = (down.astype(np.float64) * up / gate).astype(np.float32)
        device = self._packed[0].device
        return MoEWeights(
            self.layout,
            self.experts,
            self.hidden,
            self.intermediate,
            self._packed[0],
            self._packed[1],
            torch.from_numpy(gate.copy()).to(device),
            torch.from_numpy(w2_scale).to(device),
            _largest(self._inputs[:2]),
            _largest(self._inputs[2:]),
        )


def _largest(scales: npt.NDArray[np.float32]) -> float | None:
    """One activation scale for all experts: the largest, which no expert's calibrated range exceeds. None where one is missing."""
    return None if np.isnan(scales).any() else float(scales.max())
