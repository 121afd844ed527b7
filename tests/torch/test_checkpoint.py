"""Checkpoints written by the public tools: read exactly, expert by expert, whole or in parts, in any order; packed ones load by mmap."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import FAMILIES, tiny
from safetensors.torch import load_file, save_file

from densemoe.runtime import packing
from densemoe.runtime.errors import CheckpointError, ProblemError
from densemoe.runtime.torch import DenseGemmMoE, MoEConfig, cpu
from densemoe.runtime.torch import checkpoint as reading
from densemoe.runtime.torch.safetensors_file import Checkpoint
from densemoe.runtime.torch.weights import PROJECTIONS, MoEWeights, Projection, WeightStore, quantize_projection

PREFIX = "model.layers.{}.mlp.experts"
SHAPES = {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}
QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def random_weight(layer: int, expert: int, projection: str) -> torch.Tensor:
    seed = torch.Generator().manual_seed(layer * 1000 + expert * 10 + PROJECTIONS.index(projection))
    return (torch.randn(SHAPES[projection], generator=seed) * 0.1).bfloat16()


def modelopt(weight: torch.Tensor, name: str, scale_2: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A projection by NVIDIA's Model Optimizer, and its dequantised values in its own arithmetic."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    quantised, scale, scale_2 = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale_2)
    tensors = {"weight": quantised._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2, "input_scale": torch.tensor(0.01)}
    values = quantised.dequantize(dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    return {f"{name}.{suffix}": each for suffix, each in tensors.items()}, values


def compressed(weight: torch.Tensor, name: str, scale_2: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A projection by compressed-tensors."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    multiplier = (448 * 6 / weight.float().abs().max() if scale_2 is None else 1 / scale_2).reshape(1)
    scale = (weight.float().view(weight.shape[0], -1, 16).abs().amax(-1) / 6 * multiplier).to(torch.float8_e4m3fn)
    tensors = NVFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale.float(), "weight_global_scale": multiplier}, scheme)
    values = NVFP4PackedCompressor.decompress(tensors, scheme)["weight"]
    tensors["input_global_scale"] = torch.tensor([100.0])
    return {f"{name}.{suffix}": each for suffix, each in tensors.items()}, values


def write(
    folder: Path, tool: Any, names: dict[str, str] = QWEN, layers: int = 2, experts: int = 3, up_scale: float | None = None
) -> tuple[Path, dict[tuple[int, int, str], torch.Tensor]]:
    """A checkpoint in two files; and what each projection is worth by the tool's own account. Gate and up share a scale unless told otherwise."""
    tensors: list[dict[str, torch.Tensor]] = [{}, {}]
    values = {}
    for layer in range(layers):
        for expert in range(experts):
            shared = torch.stack([random_weight(layer, expert, each).abs().max() for each in ("gate", "up")]).max().float() / (448 * 6)
            for projection in PROJECTIONS:
                scale = {"gate": shared, "up": shared if up_scale is None else shared * up_scale, "down": None}[projection]
                name = f"{PREFIX.format(layer)}.{expert}.{names[projection]}"
                made, values[layer, expert, projection] = tool(random_weight(layer, expert, projection), name, scale)
                tensors[layer % 2].update({key: each.contiguous().clone() for key, each in made.items()})
    for index, part in enumerate(tensors):
        part[f"model.layers.{index}.self_attn.q_proj.weight"] = torch.zeros(4, 4)
        save_file(part, folder / f"model-{index}.safetensors")
    return folder, values


def worth(weights: MoEWeights, expert: int, projection: str) -> torch.Tensor:
    """A packed projection dequantised; up and down together carry the ratio of gate's scale and up's."""
    shape = (weights.experts, weights.hidden, weights.intermediate, expert)
    if projection == "down":
        return cpu.expert_values("fc2", weights.layout, weights.w2, *shape)[0] * weights.w2_scale[expert].double()
    pair = cpu.expert_values("fc1", weights.layout, weights.w1, *shape)
    return pair[0 if projection == "up" else 1] * weights.w1_scale[expert].double()


@pytest.mark.parametrize("layout", [packing.LAYOUT, packing.INTERCHANGE_LAYOUT])
@pytest.mark.parametrize(("tool", "names"), [(modelopt, QWEN), (modelopt, MIXTRAL), (compressed, QWEN), (compressed, MIXTRAL)])
def test_a_checkpoint_is_worth_what_its_tool_says(tmp_path: Path, tool: Any, names: dict[str, str], layout: str) -> None:
    folder, values = write(tmp_path, tool, names)
    checkpoint = Checkpoint(folder)
    layers = reading.find_layers(checkpoint)
    assert [each.prefix for each in layers] == [PREFIX.format(0), PREFIX.format(1)]
    assert [(each.experts, each.hidden, each.intermediate) for each in layers] == [(3, 64, 128)] * 2
    for number, layer in enumerate(layers):
        weights = reading.load_layer(checkpoint, layer, layout=layout)
        assert weights.input_scale == pytest.approx(0.01)
        assert weights.between_scale == pytest.approx(0.01)
        for expert in range(3):
            for projection in PROJECTIONS:
                expected = values[number, expert, projection].double()
                torch.testing.assert_close(worth(weights, expert, projection), expected, rtol=2**-7, atol=1e-9)  # the tools work in bf16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_modelopt_exports_is_worth_what_modelopt_says(tmp_path: Path, family: str) -> None:
    """Quantised, calibrated and exported whole by the public tool, in the names of the family's checkpoints."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    model, ids = tiny(family), torch.arange(24).reshape(2, 12) * 7 % 97
    model.config.architectures = [type(model).__name__]
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda quantised: quantised(ids))
    export_hf_checkpoint(model, export_dir=str(tmp_path))
    stored = {}
    for file in tmp_path.glob("*.safetensors"):
        stored.update(load_file(file))
    checkpoint = Checkpoint(tmp_path)
    layers = reading.find_layers(checkpoint)
    assert len(layers) == 2
    for layer in layers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gate and up may have been given a scale each
            weights = reading.load_layer(checkpoint, layer)
        gate_scales, inputs = [], {projection: [] for projection in PROJECTIONS}
        for expert in range(layer.experts):
            for projection in PROJECTIONS:
                base = layer.name(expert, projection, "weight")
                codes, scale, scale_2 = stored[base], stored[f"{base}_scale"], stored[f"{base}_scale_2"]
                shape = torch.Size((codes.shape[0], codes.shape[1] * 2))
                values = NVFP4QTensor(shape, torch.float32, codes).dequantize(
                    dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16}
                )
                ratio = 1.0 if projection != "down" else float(stored[layer.name(expert, "up", "weight_scale_2")]) / gate_scales[-1]
                if projection == "gate":
                    gate_scales.append(float(scale_2))
                if projection == "up":
                    ratio = gate_scales[-1] / float(scale_2)  # moved into FC2's alpha
                torch.testing.assert_close(worth(weights, expert, projection), values.double() * ratio, rtol=1e-5, atol=1e-12)
                inputs[projection].append(float(stored[layer.name(expert, projection, "input_scale")]))
        assert weights.input_scale == pytest.approx(max(inputs["gate"] + inputs["up"]))
        assert weights.between_scale == pytest.approx(max(inputs["down"]))
        config = MoEConfig(layer.experts, 2, layer.hidden, layer.intermediate, activations="nvfp4", between="nvfp4")
        out = DenseGemmMoE(config, weights)(torch.randn(3, layer.hidden).bfloat16(), torch.randn(3, layer.experts))
        assert torch.isfinite(out).all()


def test_a_model_that_llm_compressor_wrote_is_worth_what_compressed_tensors_says() -> None:
    """Written by data/write_llmcompressor.py: llm-compressor does not install beside the versions that are pinned here."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    path = Path(__file__).parent / "data" / "llmcompressor_qwen3.safetensors"
    stored, checkpoint = load_file(path), Checkpoint(path)
    (layer,) = reading.find_layers(checkpoint)
    assert (layer.experts, layer.hidden, layer.intermediate) == (2, 64, 64)
    weights, scheme = reading.load_layer(checkpoint, layer), preset_name_to_scheme("NVFP4", ["Linear"])
    for expert in range(2):
        for projection in PROJECTIONS:
            base = layer.name(expert, projection, "")
            tensors = {name.removeprefix(base): each for name, each in stored.items() if name.startswith(base)}
            values = NVFP4PackedCompressor.decompress(dict(tensors), scheme)["weight"]
            torch.testing.assert_close(worth(weights, expert, projection), values.double(), rtol=2**-7, atol=1e-9)  # the tool works in bf16
    scales = {suffix: [1 / float(each) for name, each in stored.items() if name.endswith(f"{suffix}.input_global_scale")] for suffix in QWEN.values()}
    assert weights.input_scale == pytest.approx(max(scales["gate_proj"] + scales["up_proj"]))
    assert weights.between_scale == pytest.approx(max(scales["down_proj"]))


def test_unquantised_experts_are_quantised_as_the_contract_says(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, lambda weight, name, scale: ({f"{name}.weight": weight}, weight))
    checkpoint = Checkpoint(folder)
    layer = reading.find_layers(checkpoint)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gate and up have each a scale of their own
        weights = reading.load_layer(checkpoint, layer)
    ours = quantize_projection(random_weight(1, 2, "gate"))
    codes, scales = cpu.expert_weights("fc1", weights.layout, weights.w1, 3, 64, 128, 2)
    gate = np.concatenate([np.arange(64, 128), np.arange(192, 256)])
    assert np.array_equal(codes[gate], ours.codes)
    assert np.array_equal(scales[gate], ours.scales)
    torch.testing.assert_close(worth(weights, 2, "gate"), random_weight(1, 2, "gate").double(), rtol=0.25, atol=0.03)


def test_different_gate_and_up_scales_warn_and_change_nothing(tmp_path: Path) -> None:
    folder, values = write(tmp_path, modelopt, up_scale=1.5)
    checkpoint = Checkpoint(folder)
    with pytest.warns(UserWarning, match="3 of 3 experts"):
        weights = reading.load_layer(checkpoint, reading.find_layers(checkpoint)[0])
    x = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for expert in range(3):
        gate, up, down = (values[0, expert, each].double() for each in PROJECTIONS)
        exact = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        gate, up, down = (worth(weights, expert, each) for each in PROJECTIONS)
        ours = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        torch.testing.assert_close(ours, exact, rtol=0.03, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("layout", [packing.LAYOUT, packing.INTERCHANGE_LAYOUT])
def test_projections_may_arrive_in_any_order_and_again(layout: str) -> None:
    parts = {(e, p): quantize_projection(random_weight(0, e, p)) for e in range(3) for p in PROJECTIONS}
    whole, late = (WeightStore(3, 64, 128, layout) for _ in range(2))
    for expert in range(3):
        whole.put(expert, **{p: parts[expert, p] for p in PROJECTIONS})
    order = np.random.default_rng(0).permutation(len(parts))
    keys = list(parts)
    late.put(1, up=quantize_projection(random_weight(5, 5, "up")))  # replaced below
    for position in order[:-2]:
        expert, projection = keys[position]
        late.put(expert, **{projection: parts[expert, projection]})
    last = sorted(f"expert {keys[i][0]}: {keys[i][1]}" for i in order[-2:])
    assert sorted(each for each in late.missing() if each in last) == last
    with pytest.raises(CheckpointError, match="have not been loaded"):
        late.finish()
    for position in [*order[-2:], keys.index((1, "up"))]:
        expert, projection = keys[position]
        late.put(expert, **{projection: parts[expert, projection]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = late.finish(), whole.finish()
    for name in ("w1", "w2", "w1_scale", "w2_scale"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("layout", [packing.LAYOUT, packing.INTERCHANGE_LAYOUT])
def test_a_refused_expert_writes_nothing(layout: str) -> None:
    first, second = ({each: quantize_projection(random_weight(0, e, each).float().numpy()) for each in PROJECTIONS} for e in (0, 1))
    store = WeightStore(1, 64, 128, layout)
    store.put(0, **first)
    before = [each.clone() for each in store._packed]
    scales = second["down"].scales.copy()
    scales[3, 2] = 0x7F
    with pytest.raises(CheckpointError, match="expert 0, down: a weight scale is NaN or negative"):
        store.put(0, **{**second, "down": dataclasses.replace(second["down"], scales=scales)})
    assert all(torch.equal(*pair) for pair in zip(store._packed, before, strict=True))


def test_a_rank_s_part_is_that_part_of_the_whole(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, modelopt)
    checkpoint = Checkpoint(folder)
    layer = reading.find_layers(checkpoint)[0]
    whole = reading.load_layer(checkpoint, layer)
    for rank in range(2):
        part = reading.load_layer(checkpoint, layer, tp_rank=rank, tp_size=2, experts=[2, 0])
        own = slice(64 * rank, 64 * (rank + 1))
        for slot, expert in enumerate((2, 0)):
            assert torch.equal(worth(part, slot, "gate"), worth(whole, expert, "gate")[own])
            assert torch.equal(worth(part, slot, "up"), worth(whole, expert, "up")[own])
            assert torch.equal(worth(part, slot, "down"), worth(whole, expert, "down")[:, own])
    with pytest.raises(ProblemError, match="32 on each"):
        reading.load_layer(checkpoint, layer, tp_rank=0, tp_size=4)


@pytest.mark.parametrize("layout", [packing.LAYOUT, packing.INTERCHANGE_LAYOUT])
def test_a_packed_checkpoint_is_mapped_and_equal(tmp_path: Path, layout: str) -> None:
    (tmp_path / "from").mkdir()
    folder, _ = write(tmp_path / "from", compressed)
    packed = tmp_path / "packed.safetensors"
    said: list[str] = []
    reading.convert(folder, packed, layout=layout, report=said.append)
    assert len(said) == 2
    checkpoint, source = Checkpoint(packed), Checkpoint(folder)
    assert reading.packed_layers(checkpoint) == [PREFIX.format(0), PREFIX.format(1)]
    assert all(each.begin % 128 == 0 for name, each in checkpoint.tensors.items() if name.endswith((".w1", ".w2")))
    for layer in reading.find_layers(source):
        ours, theirs = reading.load_packed(checkpoint, layer.prefix), reading.load_layer(source, layer, layout=layout)
        assert (ours.layout, ours.experts, ours.hidden, ours.intermediate, ours.input_scale) == (layout, 3, 64, 128, theirs.input_scale)
        for name in ("w1", "w2", "w1_scale", "w2_scale"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    # what is read is the file: a byte changed in it is seen without loading again
    mapped = reading.load_packed(checkpoint, PREFIX.format(0))
    with packed.open("r+b") as file:
        file.seek(checkpoint.tensors[f"{PREFIX.format(0)}.w1"].begin)
        file.write(b"\x77")
    assert mapped.w1[0] == 0x77
    with pytest.raises(CheckpointError, match="has no layer"):
        reading.load_packed(checkpoint, "elsewhere")
    with pytest.raises(CheckpointError, match="densemoe convert"):
        reading.packed_layers(Checkpoint(folder / "model-0.safetensors"))


def test_loading_holds_one_expert_beside_the_packed_weights(tmp_path: Path) -> None:
    experts, hidden, intermediate = 12, 1024, 1024
    one = Projection(np.full((intermediate, hidden // 2), 0x21, np.uint8), np.full((intermediate, hidden // 16), 0x38, np.uint8), np.float32(1))
    names = {"weight": one.codes, "weight_scale": one.scales}
    tensors: dict[str, torch.Tensor] = {}
    for expert in range(experts):
        for projection in QWEN.values():
            base = f"{PREFIX.format(0)}.{expert}.{projection}"
            tensors.update({f"{base}.{suffix}": torch.from_numpy(array.copy()) for suffix, array in names.items()})
            tensors[f"{base}.weight_scale"] = tensors[f"{base}.weight_scale"].view(torch.float8_e4m3fn)
            tensors[f"{base}.weight_scale_2"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    (layer,) = reading.find_layers(checkpoint)
    expert_bytes = sum(packing.packed_bytes(op, 1, hidden, intermediate) for op in ("fc1", "fc2"))
    stage = 9 * 2**20  # what packing a part of an expert takes, whatever the expert's size (see packing)
    for load in (lambda: reading.load_layer(checkpoint, layer), lambda: reading.convert(tmp_path, tmp_path / "packed.bin")):
        tracemalloc.start()
        load()  # the packed weights are torch's or a file's: only what numpy holds besides is counted
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= expert_bytes + stage < experts * expert_bytes


def changed(suffix: str, change: Any) -> Any:
    """What replaces a file's tensors of that name."""
    return lambda t: t.update({name: change(each) for name, each in t.items() if name.endswith(suffix)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(next(n for n in t if n.endswith("1.up_proj.weight_scale_2"))), "has no tensor"),
        (lambda t: t.update({n: v.view(torch.uint8) for n, v in t.items() if n.endswith("0.gate_proj.weight_scale")}), "F8_E4M3"),
        (lambda t: t.update({n: v * float("nan") for n, v in t.items() if n.endswith("scale_2")}), "positive finite"),
        (changed("2.up_proj.weight", lambda v: v[:64].contiguous()), r"2\.up_proj\.weight has shape \[64, 32\]: \[128, 32\]"),
        (changed("1.up_proj.weight", lambda v: v.repeat(2, 1)), r"1\.up_proj\.weight has shape \[256, 32\]"),
        (changed("1.down_proj.weight_scale", lambda v: v.repeat(1, 2)), r"\[64, 16\]: \[64, 8\] belongs"),
        (changed("0.gate_proj.weight", lambda v: v.reshape(-1)), "two dimensions belong there"),
        (lambda t: [t.pop(n) for n in list(t) if ".experts.1." in n], "a file is missing"),
    ],
)
def test_a_damaged_checkpoint_says_what_is_wrong(tmp_path: Path, change: Any, said: str) -> None:
    folder, _ = write(tmp_path, modelopt, layers=1)
    tensors = load_file(folder / "model-0.safetensors")
    change(tensors)
    save_file(tensors, folder / "model-0.safetensors")

    def load() -> MoEWeights:
        checkpoint = Checkpoint(folder)
        return reading.load_layer(checkpoint, reading.find_layers(checkpoint)[0])

    with pytest.raises(CheckpointError, match=said):
        load()


def test_a_file_that_is_cut_or_foreign_is_refused(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, modelopt, layers=1)
    path = folder / "model-0.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="does not lie inside"):
        Checkpoint(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        Checkpoint(path)
    with pytest.raises(CheckpointError, match="no safetensors files"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "value"), [("shape", ["x"]), ("dtype", ["F"]), ("shape", [2**40, 2**40]), ("shape", [-1]), ("data_offsets", [0]), ("data_offsets", "ab")]
)
def test_a_header_of_anything_else_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    header = {"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], name: value}}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match="download it again"):
        Checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{broken", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 4}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_of_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read .*: download it again"):
        Checkpoint(tmp_path)


def test_what_stood_at_the_target_stays_until_the_new_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "from").mkdir()
    folder, _ = write(tmp_path / "from", modelopt)
    target = tmp_path / "packed.safetensors"
    reading.convert(folder, target)
    before = target.read_bytes()
    broken = load_file(folder / "model-1.safetensors")
    del broken[next(name for name in broken if name.endswith("2.down_proj.weight_scale"))]
    save_file(broken, folder / "model-1.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor"):
        reading.convert(folder, target)

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; [0-9]+ bytes are needed"):
        reading.convert(folder, target)
    assert target.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["from", "packed.safetensors"]


def test_a_target_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    folder, _ = write(tmp_path / "from", modelopt)
    source = folder / "model-0.safetensors"
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for target, said in (
        (source, "is read: name another"),
        (tmp_path / "link", "is read: name another"),
        (folder, "it is a folder"),
        (tmp_path / "nowhere" / "x", "No such file"),
    ):
        with pytest.raises(CheckpointError, match=said):
            reading.convert(folder, target)
    assert source.read_bytes() == before


def test_the_command_converts_for_each_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from densemoe.runtime import cli

    (tmp_path / "from").mkdir()
    folder, _ = write(tmp_path / "from", modelopt)
    target = tmp_path / "rank1.safetensors"
    assert cli.main(["convert", str(folder), str(target), "--tp-size", "2", "--tp-rank", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == target.stat().st_size
    assert reading.load_packed(Checkpoint(target), PREFIX.format(1)).intermediate == 64
    assert cli.main(["convert", str(tmp_path / "nothing"), str(target)]) == 2
    assert "no safetensors files" in capsys.readouterr().err
    for option, value, code in (("--device", "foo", 2), ("--device", "cuda:99", 3), ("--top-k", "9", 2)):
        assert cli.main(["numerics", option, value]) == code
    for option in ("--m", "--experts", "--hidden"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["numerics", option, "0"])
    capsys.readouterr()
    assert cli.main(["numerics", "--experts", "2", "--hidden", "64", "--intermediate", "64", "--m", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["form"] for row in rows] == ["bf16", "nvfp4 between", "nvfp4", "nvfp4 fused alpha"]
    assert rows[0]["relative_error"] < rows[2]["relative_error"] < 0.5
