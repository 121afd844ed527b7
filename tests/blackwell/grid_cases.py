"""One case of the contract's section 9 grids on one tcgen05 variant; importable by worker processes."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import covering
import emulated

from densemoe.compile import matrix
from densemoe.runtime.variant import Variant

SHIPPED = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_100f" and each.variant.op in ("fc1", "fc2")]
#: One variant of each tile and cluster: the output dtype that a layer has there.
GEOMETRIES = [each for each in SHIPPED if each.c_dtype == {"fc1": "nvfp4", "fc2": "bf16"}[each.op]]
SM_COUNT = 16  # CTAs take several tiles in most cases
#: Cases up to this cost run on every tile and cluster, dearer ones on one each: two thirds of the cases have a seventh and a twentieth of the cost.
COST_OF_ALL = 600

Task = tuple[tuple[str, ...], covering.Case, str]


def run(key: str, case: covering.Case, schedule: str = "random") -> None:
    """One case; a fault names all that it takes to repeat it.

    Args:
        schedule: ``random`` gets a number that follows from the case.
    """
    variant = Variant.parse(key)
    number = sum(value * 31**i for i, value in enumerate(case)) % 1000
    schedule = f"random:{number}" if schedule == "random" else schedule
    try:
        if variant.op == "fc1":
            experts, rows, m, hidden, post = case
            outcome = emulated.fc1(
                key, m, experts, hidden, rows // 2, post=bool(post), prefetch=3 * (number % 2), seed=number, sm_count=SM_COUNT, schedule=schedule
            )
        else:
            experts, intermediate, m, hidden = case
            outcome = emulated.fc2(
                key,
                m,
                experts,
                hidden,
                intermediate,
                scalar=number % 3 == 0,
                splits=(1, 2, 4)[number % 3],
                seed=number,
                sm_count=SM_COUNT,
                schedule=schedule,
            )
        outcome.check()
        assert outcome.run.lints == []
    except Exception as error:
        raise AssertionError(f"{key} {dict(zip(covering.AXES[variant.op], case, strict=True))} {schedule}: {error}") from error


def run_task(task: Task) -> int:
    """One case on several variants, which share its data and its reference; how many runs that were."""
    keys, case, schedule = task
    for key in keys:
        run(key, case, schedule)
    return len(keys)


def whole_grid(op: str) -> Iterator[Task]:
    """Every case of the grid: on every tile and cluster up to ``COST_OF_ALL``, dearer ones dealt out; copies and MMAs complete as late as may be."""
    keys = [each.key for each in GEOMETRIES if each.op == op]
    cost = covering.cost_of(op)
    every = sorted(itertools.product(*covering.AXES[op].values()), key=lambda case: (-cost(case), case))
    for number, case in enumerate(every):
        yield (tuple(keys) if cost(case) <= COST_OF_ALL else (keys[number % len(keys)],)), case, "lazy"


def sample(seed: str, count: int, dearest: float) -> list[Task]:
    """``count`` runs of the grids: variants, cases and schedules follow from ``seed``; cases that cost more than ``dearest`` are left out."""
    draw = random.Random(seed)
    found: list[Task] = []
    while len(found) < count:
        variant = draw.choice(SHIPPED)
        case = tuple(draw.choice(values) for values in covering.AXES[variant.op].values())
        schedule = draw.choice(("lazy", f"random:{draw.randrange(1000)}", f"pct:{draw.randrange(1000)}:3"))
        if covering.cost_of(variant.op)(case) <= dearest:
            found.append(((variant.key,), case, schedule))
    return found


def run_all(tasks: Iterable[Task]) -> int:
    """Runs tasks on every core this process may use; how many runs that were. Fails with the first fault."""
    listed: Sequence[Task] = list(tasks)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        futures = [pool.submit(run_task, task) for task in listed]
        try:
            return sum(future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
