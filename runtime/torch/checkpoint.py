"""Checkpoints: NVFP4 experts in ModelOpt's and compressed-tensors' layouts, or unquantised ones, from safetensors, streamed expert by expert.

| layout | tensors of a projection | global scales |
| --- | --- | --- |
| ModelOpt | ``weight`` u8, ``weight_scale`` e4m3, ``weight_scale_2``, ``input_scale`` | dequantisation factors |
| compressed-tensors | ``weight_packed`` u8, ``weight_scale`` e4m3, ``weight_global_scale``, ``input_global_scale`` | their reciprocals |
| unquantised | ``weight`` bf16, f16 or f32 | quantised here (contract section 2) |

Projections are called ``gate_proj``, ``up_proj``, ``down_proj`` or ``w1``, ``w3``, ``w2``; an expert is ``<prefix>.<number>.``. Files are mapped:
beside the packed weights no more than one expert is in memory. ``convert`` writes a packed checkpoint, which ``load_packed`` maps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from densemoe.runtime import packing
from densemoe.runtime.errors import CheckpointError, ProblemError
from densemoe.runtime.nvfp4 import GROUP, bf16_values
from densemoe.runtime.torch.safetensors_file import Checkpoint, writing
from densemoe.runtime.torch.weights import MoEWeights, Projection, WeightStore, quantize_projection

__all__ = ["FORMAT", "Layer", "convert", "find_layers", "load_layer", "load_packed", "packed_layers", "read_projection"]

Array = npt.NDArray[Any]

FORMAT: Final = "densemoe-packed/1"
_NAMES: Final = ({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, {"gate": "w1", "up": "w3", "down": "w2"})
_FIRST = re.compile(r"(?P<prefix>.+)\.(?P<expert>\d+)\.(?P<gate>gate_proj|w1)\.weight(?:_packed)?")
_UNQUANTISED: Final = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Layer:
    """One MoE layer of a checkpoint, whole.

    Attributes:
        prefix: of its experts, for example ``model.layers.0.mlp.experts``.
        names: of the projections.
    """

    prefix: str
    names: dict[str, str]
    experts: int
    hidden: int
    intermediate: int

    def name(self, expert: int, projection: str, suffix: str) -> str:
        """A tensor's full name."""
        return f"{self.prefix}.{expert}.{self.names[projection]}.{suffix}"


def find_layers(checkpoint: Checkpoint) -> list[Layer]:
    """The MoE layers of a checkpoint, in the order of their numbers.

    Raises:
        CheckpointError: expert numbers with gaps, or a projection that is no matrix.
    """
    experts: dict[tuple[str, str], set[int]] = {}
    for name in checkpoint:
        match = _FIRST.fullmatch(name)
        if match:
            experts.setdefault((match["prefix"], match["gate"]), set()).add(int(match["expert"]))
    layers = []
    for (prefix, gate), numbers in experts.items():
        if numbers != set(range(len(numbers))):
            raise CheckpointError(f"{checkpoint.path}: {prefix} has experts {sorted(numbers)[:8]} …: 0 to E-1 belong there; a file is missing")
        names = next(each for each in _NAMES if each["gate"] == gate)
        base = f"{prefix}.0.{gate}."
        packed = "weight_packed" if base + "weight_packed" in checkpoint else "weight"
        stored = checkpoint.stored(base + packed)
        if len(stored.shape) != 2:
            raise CheckpointError(f"{checkpoint.path}: {base}{packed} has shape {list(stored.shape)}: two dimensions belong there")
        rows, columns = stored.shape
        layers.append(Layer(prefix, names, len(numbers), columns * (1 if stored.dtype in _UNQUANTISED else 2), rows))
    return sorted(layers, key=lambda each: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", each.prefix)])


def read_projection(checkpoint: Checkpoint, layer: Layer, expert: int, projection: str, rows: slice, columns: slice) -> Projection:
    """One projection, or the part of it that a rank holds. Views of the file where it is quantised.

    Args:
        rows, columns: in weights; columns in whole groups of 64.

    Raises:
        CheckpointError: a tensor is missing, or of another dtype or shape than the layer's first expert says.
    """
    whole = (layer.hidden, layer.intermediate) if projection == "down" else (layer.intermediate, layer.hidden)

    def name(suffix: str) -> str:
        return layer.name(expert, projection, suffix)

    def array(suffix: str, divisor: int) -> Array:
        wanted, found = (whole[0], whole[1] // divisor), checkpoint.stored(name(suffix)).shape
        if found != wanted:
            raise CheckpointError(f"{checkpoint.path}: {name(suffix)} has shape {list(found)}: {list(wanted)} belongs there, by expert 0")
        return checkpoint.array(name(suffix))

    bytes_, groups = slice(columns.start // 2, columns.stop // 2), slice(columns.start // GROUP, columns.stop // GROUP)

    def quantised(suffix: str) -> tuple[Array, Array]:
        for part, dtype in ((suffix, "U8"), ("weight_scale", "F8_E4M3")):
            found = checkpoint.stored(name(part)).dtype
            if found != dtype:
                raise CheckpointError(f"{checkpoint.path}: {name(part)} is {found}: NVFP4 has {dtype} there")
        return array(suffix, 2)[rows, bytes_], array("weight_scale", GROUP)[rows, groups]

    def optional(suffix: str, invert: bool) -> np.float32 | None:
        if name(suffix) not in checkpoint:
            return None
        return _inverted(checkpoint, name(suffix)) if invert else checkpoint.scalar(name(suffix))

    if name("weight_packed") in checkpoint:
        codes, scales = quantised("weight_packed")
        return Projection(codes, scales, _inverted(checkpoint, name("weight_global_scale")), optional("input_global_scale", True))
    stored = checkpoint.stored(name("weight"))
    if stored.dtype == "U8":
        codes, scales = quantised("weight")
        return Projection(codes, scales, checkpoint.scalar(name("weight_scale_2")), optional("input_scale", False))
    if stored.dtype not in _UNQUANTISED:
        raise CheckpointError(f"{checkpoint.path}: {name('weight')} is {stored.dtype}: use NVFP4 (U8), or {', '.join(_UNQUANTISED)}")
    part = array("weight", 1)[rows, columns]
    return quantize_projection(bf16_values(part) if stored.dtype == "BF16" else part)


def _inverted(checkpoint: Checkpoint, name: str) -> np.float32:
    value = checkpoint.scalar(name)
    if not np.isfinite(value) or value <= 0:
        raise CheckpointError(f"{checkpoint.path}: {name} = {value}: a positive finite number belongs there")
    return np.float32(np.float32(1) / value)


def _parts(layer: Layer, tp_rank: int, tp_size: int) -> slice:
    """The columns of I that a rank holds.

    Raises:
        ProblemError: the rank's own I is not a multiple of 64.
    """
    if not 0 <= tp_rank < tp_size:
        raise ProblemError(f"tp_rank={tp_rank} of {tp_size}: use 0 to {tp_size - 1}")
    own = layer.intermediate // tp_size
    if own * tp_size != layer.intermediate or own % 64:
        raise ProblemError(
            f"{layer.prefix}: I = {layer.intermediate} over {tp_size} ranks is {layer.intermediate / tp_size:g} on each: a multiple of 64 is needed"
            " on every rank; use fewer ranks, or expert parallelism"
        )
    return slice(tp_rank * own, (tp_rank + 1) * own)


def fill(store: WeightStore, checkpoint: Checkpoint, layer: Layer, experts: Iterable[int], own: slice) -> None:
    """Streams ``experts`` of a layer into a store, whose expert 0 is the first of them."""
    everything = slice(0, layer.hidden)
    for slot, expert in enumerate(experts):
        store.put(
            slot,
            gate=read_projection(checkpoint, layer, expert, "gate", own, everything),
            up=read_projection(checkpoint, layer, expert, "up", own, everything),
        )
        store.put(slot, down=read_projection(checkpoint, layer, expert, "down", everything, own))


def load_layer(
    checkpoint: Checkpoint,
    layer: Layer,
    *,
    layout: str = packing.LAYOUT,
    device: Any = "cpu",
    tp_rank: int = 0,
    tp_size: int = 1,
    experts: Sequence[int] | None = None,
) -> MoEWeights:
    """One rank's part of a layer, packed.

    Args:
        experts: those of this rank (expert parallelism); all where absent.
        tp_rank, tp_size: which part of I (tensor parallelism).

    Raises:
        CheckpointError, ProblemError: the checkpoint lacks something, or the rank's I does not fit.
    """
    own = _parts(layer, tp_rank, tp_size)
    chosen = range(layer.experts) if experts is None else experts
    store = WeightStore(len(chosen), layer.hidden, own.stop - own.start, layout, device)
    fill(store, checkpoint, layer, chosen, own)
    return store.finish()


# ---- packed checkpoints


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str = packing.LAYOUT,
    tp_rank: int = 0,
    tp_size: int = 1,
    experts: Sequence[int] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Layer]:
    """Writes one rank's experts of every MoE layer as a packed checkpoint; nothing else of the model is copied. Memory: one expert. The target gets
    the file when it is whole: what stood there stays until then, and after an error.

    Raises:
        CheckpointError, ProblemError: as ``load_layer``; there is no MoE layer; or the target is read, or cannot be written.
    """
    checkpoint = Checkpoint(source)
    layers = find_layers(checkpoint)
    if not layers:
        raise CheckpointError(f"{source} has no experts called <prefix>.<number>.gate_proj or .w1: it has no MoE layer that densemoe knows")
    size = packing.packed_bytes if layout == packing.LAYOUT else packing.interchange_bytes
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    shapes = {}
    for layer in layers:
        own = _parts(layer, tp_rank, tp_size)
        chosen = range(layer.experts) if experts is None else experts
        shape = (len(chosen), layer.hidden, own.stop - own.start)
        shapes[layer.prefix] = (own, chosen, shape)
        for name, op in (("w1", "fc1"), ("w2", "fc2")):
            tensors[f"{layer.prefix}.{name}"] = ("U8", (size(op, *shape),))
    for layer in layers:
        count = len(shapes[layer.prefix][1])
        tensors[f"{layer.prefix}.w1_scale"] = tensors[f"{layer.prefix}.w2_scale"] = ("F32", (count,))
        tensors[f"{layer.prefix}.activation_scales"] = ("F32", (2,))
        tensors[f"{layer.prefix}.shape"] = ("I64", (3,))
    inputs = {each.path for each in checkpoint.tensors.values()}
    if os.path.exists(target) and any(os.path.samefile(target, each) for each in inputs):
        raise CheckpointError(f"{target} is read: name another file to write")
    with writing(target, tensors, {"format": FORMAT, "layout": layout, "tp_rank": str(tp_rank), "tp_size": str(tp_size)}) as written:
        for layer in layers:
            own, chosen, shape = shapes[layer.prefix]
            store = WeightStore(*shape, layout, out=(written[f"{layer.prefix}.w1"], written[f"{layer.prefix}.w2"]))
            fill(store, checkpoint, layer, chosen, own)
            done = store.finish()
            written[f"{layer.prefix}.w1_scale"][:] = done.w1_scale.numpy()
            written[f"{layer.prefix}.w2_scale"][:] = done.w2_scale.numpy()
            written[f"{layer.prefix}.activation_scales"][:] = [np.nan if each is None else each for each in (done.input_scale, done.between_scale)]
            written[f"{layer.prefix}.shape"][:] = shape
            for name in ("w1", "w2", "w1_scale", "w2_scale", "activation_scales", "shape"):
                array = written.pop(f"{layer.prefix}.{name}")
                assert isinstance(array, np.memmap)
                array.flush()
            report(f"{layer.prefix}: E {shape[0]}, H {shape[1]}, I {shape[2]}, {done.w1.numel() + done.w2.numel()} bytes")
    return layers


def packed_layers(checkpoint: Checkpoint) -> list[str]:
    """Prefixes of a packed checkpoint's layers.

    Raises:
        CheckpointError: it is no packed checkpoint of a version that is known.
    """
    found = checkpoint.metadata.get("format")
    if found != FORMAT:
        raise CheckpointError(f"{checkpoint.path} has format {found!r}, {FORMAT} is read here: run densemoe convert on the original checkpoint")
    return [name.removesuffix(".w1") for name in checkpoint if name.endswith(".w1")]


def load_packed(checkpoint: Checkpoint, prefix: str, device: Any = "cpu") -> MoEWeights:
    """A layer of a packed checkpoint. On the CPU its weights are the mapped file: nothing is read until it is used.

    Raises:
        CheckpointError: no such layer, or another format.
    """
    if prefix not in packed_layers(checkpoint):
        raise CheckpointError(f"{checkpoint.path} has no layer {prefix!r}: it has {', '.join(packed_layers(checkpoint))}")

    def tensor(name: str) -> Any:
        return torch.from_numpy(checkpoint.array(f"{prefix}.{name}"))

    experts, hidden, intermediate = (int(each) for each in checkpoint.array(f"{prefix}.shape"))
    scales = [None if np.isnan(each) else float(each) for each in checkpoint.array(f"{prefix}.activation_scales")]
    weights = MoEWeights(
        checkpoint.metadata["layout"], experts, hidden, intermediate, tensor("w1"), tensor("w2"), tensor("w1_scale"), tensor("w2_scale"), *scales
    )
    return weights if str(device) == "cpu" else weights.to(device)
