"""What ``tests/gpu/moe_ranks.py`` does of ranks on GPUs, on the CPU through gloo; and that ranks which fail or hang end, with a reason."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import moe_ranks
import pytest
import torch
from moe_ranks import FORMS, Task, check, run, start

CASE = (8, 3, 128, 128, 6)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, list[dict[str, torch.Tensor]]]:
    task = Task(str(tmp_path_factory.mktemp("ranks")), "gloo", "cpu", form="nvfp4", case=CASE)
    return task, run(task)


def test_two_ranks_give_what_one_gives(given: tuple[Task, list[dict[str, torch.Tensor]]]) -> None:
    check(*given)
    task, found = given
    for rank, results in enumerate(found):  # on the CPU a part is the same to the bit
        module = moe_ranks.Whole(task).module("ep", rank)
        for number, (x, ids, router) in enumerate(moe_ranks.Whole(task).rounds()):
            assert torch.equal(results[f"ep part {number}"], module(x, ids=ids, weights=router))


def test_four_ranks_of_plain_activations(tmp_path: Path) -> None:
    task = Task(str(tmp_path), "gloo", "cpu", ranks=4, case=(8, 2, 64, 256, 3))
    check(task, run(task))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tp sum 1", lambda t: t + 1, None),
        ("ep sum 0", lambda t: torch.zeros_like(t), None),
        ("ep part 2", lambda t: t + 2**-7, "no expert there"),
        ("tp part 0", lambda t: t.roll(1, 0), "not close"),
    ],
)
def test_wrong_results_are_seen(given: tuple[Task, list[dict[str, torch.Tensor]]], name: str, change: Any, said: str | None) -> None:
    task, found = given
    wrong = [dict(each) for each in found]
    wrong[1][name] = change(wrong[1][name])
    with pytest.raises(AssertionError, match=said):
        check(task, wrong)


def test_replays_are_compared(given: tuple[Task, list[dict[str, torch.Tensor]]]) -> None:
    task, found = given
    replayed = Task(**{**task.__dict__, "graph": True})
    again = [{**each, **{name.replace("sum", "replay"): value for name, value in each.items() if "sum" in name}} for each in found]
    check(replayed, again)
    again[0]["tp replay 1"] = again[0]["tp replay 0"]
    with pytest.raises(AssertionError, match="not close"):
        check(replayed, again)


def _hang(rank: int, folder: str) -> None:
    if rank == 0:
        return
    Path(folder, "hangs").touch()
    time.sleep(600)


def _fail(rank: int, folder: str) -> None:
    if rank == 0:
        time.sleep(600)
    raise ValueError(f"rank {rank} has no part")


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 still ran after 20 s and were ended"):
        start(_hang, (str(tmp_path),), 2, 20)
    assert time.monotonic() - begun < 60
    assert (tmp_path / "hangs").exists()


def test_a_rank_that_fails_ends_the_others_and_says_why(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 has no part"):
        start(_fail, (str(tmp_path),), 2)
    assert time.monotonic() - begun < 60


def test_every_form_has_a_name() -> None:
    assert set(FORMS) == {"bf16", "nvfp4"}
