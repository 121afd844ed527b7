"""Tensor and expert parallelism on GPUs, a process a rank, the sum by the module: NCCL over two GPUs, eager and in a CUDA graph; gloo on one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")

from moe_ranks import FORMS, Task, check, run  # noqa: E402

two_gpus = pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two CUDA devices")


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_on_one_gpu_give_what_one_gives(tmp_path: Path, form: str) -> None:
    task = Task(str(tmp_path), "gloo", "cuda", form=form)
    check(task, run(task))


@two_gpus
@pytest.mark.parametrize("form", FORMS)
def test_two_gpus_give_what_one_gives_through_nccl(tmp_path: Path, form: str) -> None:
    task = Task(str(tmp_path), "nccl", "cuda", devices=2, form=form)
    check(task, run(task))


@two_gpus
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_and_its_sum_over_two_gpus_are_captured_and_replayed(tmp_path: Path, form: str) -> None:
    task = Task(str(tmp_path), "nccl", "cuda", devices=2, form=form, graph=True)
    check(task, run(task))
