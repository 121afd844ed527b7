"""Which of a model's shapes have a variant: configurations as they are published, sharded, refused where the layer is another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from densemoe.compile import matrix
from densemoe.runtime import cli, coverage
from densemoe.runtime.errors import ProblemError, SelectionError
from densemoe.runtime.model_config import MoeLayer, model_names, read_config
from densemoe.runtime.problem import Problem
from densemoe.runtime.select import bucket, load_table, select
from densemoe.runtime.variant import Variant

#: (experts, k, H, I) as published.
SHAPES = {
    "deepseek-v3": (256, 8, 7168, 2048),
    "kimi-k2": (384, 8, 7168, 2048),
    "glm-4.5": (160, 8, 5120, 1536),
    "glm-4.5-air": (128, 8, 4096, 1408),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "mixtral-8x22b": (8, 2, 6144, 16384),
    "gpt-oss-120b": (128, 4, 2880, 2880),
}


def test_every_shipped_model_is_in_this_table() -> None:
    assert sorted(SHAPES) == sorted(model_names())


@pytest.mark.parametrize("name", SHAPES)
def test_published_configurations_are_read(name: str) -> None:
    layer = read_config(name)
    assert (layer.experts, layer.top_k, layer.hidden, layer.intermediate) == SHAPES[name]
    assert bool(layer.refused) == (name == "gpt-oss-120b")


def test_gpt_oss_says_why_not(capsys: pytest.CaptureFixture[str], artifacts: Path) -> None:
    assert cli.main(["coverage", "gpt-oss-120b", "--artifacts", str(artifacts)]) == 1
    said = capsys.readouterr().out
    assert "swiglu_limit" in said
    assert "biases" in said


def config(tmp_path: Path, **changes: object) -> str:
    document = {"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in {**document, **changes}.items() if value is not None}))
    return str(tmp_path)


def test_folders_files_and_multimodal_configurations(tmp_path: Path) -> None:
    folder = config(tmp_path)
    assert read_config(folder).hidden == read_config(str(tmp_path / "config.json")).hidden == 2048
    inner = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_vl", "text_config": inner}))
    assert read_config(folder).experts == 128


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "'llama' is not known"),
        ({"model_type": ["x"]}, "is not known"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "2048"}, "integer from 1"),
        ({"num_experts": True}, "integer from 1"),
        ({"moe_intermediate_size": 2**40}, "integer from 1"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        read_config(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hidden_act": "gelu"}, "'gelu'"), ({"hidden_size": 2000}, "hidden_size = 2000"), ({"moe_intermediate_size": 100}, "= 100")]
)
def test_layers_that_are_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    (reason,) = read_config(config(tmp_path, **changes)).refused
    assert said in reason


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff", b'{"model_type": 1e999}'])
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ProblemError):
        read_config(str(tmp_path))


def test_sharding() -> None:
    layer = MoeLayer("m", "t", 128, 8, 4096, 1408)
    assert layer.shard(2, 4) == (32, 704)
    with pytest.raises(ProblemError, match=r"gives 352, which is no multiple of 64: use one of 1, 2, 11, 22"):
        layer.shard(4, 1)
    with pytest.raises(ProblemError, match="do not divide by expert parallelism 3"):
        layer.shard(1, 3)


def test_every_bucket_is_measured_modelled_or_none(artifacts: Path) -> None:
    """The quick profile has tiles of 8 tokens alone: larger M have none where the table wants more."""
    cells = coverage.cover(read_config("qwen3-30b-a3b"), artifacts, tokens=(1, 8, 9, 512))
    assert {(cell.op, cell.activations) for cell in cells} == {(op, dtype) for op in ("fc1", "fc2") for dtype in ("bf16", "nvfp4")}
    assert sorted({cell.m for cell in cells}) == [8, 16, 512]
    for cell in cells:
        assert cell.state in ("measured", "modelled", "none")
        assert bool(cell.key) == (cell.state != coverage.NONE)
        if cell.m == 8:
            assert ".t8x64." in cell.key


def test_every_listed_model_has_every_bucket_on_an_h200(artifacts: Path) -> None:
    """With the tiles of the full profile, as they are named before any build; whole models and a rank of eight."""
    variants = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_90a"]
    for name in SHAPES:
        layer = read_config(name)
        for ranks in (1, 8):
            if layer.refused or layer.intermediate % (64 * ranks):
                continue
            experts, intermediate = layer.shard(ranks, 1)
            for op in ("fc1", "fc2"):
                for m in coverage.TOKENS:
                    problem = Problem(op, bucket(m), experts, layer.hidden, intermediate, "bf16", "bf16")
                    assert coverage._cell(problem, "sm_90a", variants).state in ("measured", "modelled"), (name, ranks, op, m)


def test_why_none_is_said_in_words_that_help(artifacts: Path) -> None:
    """The reason of the kernels that come nearest, once for all M: not that of some kernel of another op."""
    layer = MoeLayer("m", "t", 8, 2, 4096, 1408)
    variants = [Variant.parse("fc2.sm100f.t128x128.c1x1.nvfp4-bf16"), Variant.parse("fc1.sm100f.t128x128.c1x1.nvfp4-nvfp4")]

    def reasons(dtype: str, c_dtype: str) -> set[str]:
        problems = [Problem("fc2", m, layer.experts, layer.hidden, layer.intermediate, dtype, c_dtype) for m in (8, 512)]
        return {coverage._cell(each, "sm_100f", variants).reason for each in problems}

    assert reasons("nvfp4", "bf16") == {"I = 1408 on this rank is not a multiple of its K tile 256"}
    assert reasons("bf16", "bf16") == {"no fc2 kernel of the set takes bf16 to bf16; it has nvfp4 to bf16"}
    with pytest.raises(SelectionError, match=r"at M = 8: fc2\.sm100f\.t128x128\.c1x1\.nvfp4-bf16: I = 1408"):
        select(Problem("fc2", 8, 8, 4096, 1408, "nvfp4", "bf16"), variants, load_table("sm_100f"))


def test_one_architecture_alone(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["coverage", "qwen3-30b-a3b", "--m", "1", "--artifacts", str(artifacts)]
    assert cli.main([*command, "--arch", "sm_90a"]) == 0
    assert cli.main([*command, "--arch", "sm_9"]) == 2
    assert cli.main([*command, "--arch", "sm_100f"]) == 3
    capsys.readouterr()
    assert cli.main(["coverage", "qwen3-30b-a3b", "--artifacts", str(artifacts), "--a-dtype", "bf16"]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if " fc1 " in line]
    assert len(rows) == 3  # M = 8; 16, whose tile is not in the quick profile; and all above, whose tile is another
    assert "M = 24 to 512  rule" in rows[2]


def test_exit_codes_and_json(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--artifacts", str(artifacts)]
    assert cli.main(["coverage", "deepseek-v3", "--tp", "8", "--m", "4", *common]) == 0
    capsys.readouterr()
    assert cli.main(["coverage", "deepseek-v3", "--tp", "8", "--m", "4", "--json", *common]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["layer"]["experts"] == 256
    assert all(cell["state"] != "none" for cell in document["cells"])
    assert cli.main(["coverage", "deepseek-v3", "--tp", "3", *common]) == 2
    assert cli.main(["coverage", "deepseek-v3", "--tp", "0", *common]) == 2
    assert cli.main(["coverage", "no-such-model", *common]) == 2
    assert cli.main(["coverage", "deepseek-v3", "--artifacts", str(artifacts / "none")]) == 3
