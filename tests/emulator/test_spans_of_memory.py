"""Spans stand for marks of every granule: with and without them the same accesses are races."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from densemoe.compile.emulator.clocks import Clock
from densemoe.compile.emulator.races import Races
from densemoe.compile.emulator.spans import Operand, Spans
from densemoe.runtime.errors import EmulatorError

PAGE = 1024  # bytes
WINDOW = 16 * PAGE
CTAS, WARPS = 2, 3


class Operation(SimpleNamespace):
    """What asks for an access; messages name it."""

    def __str__(self) -> str:
        return "an operation"


class NoSpans(Spans):
    """Covers nothing, so that every access is marked."""

    def read(self, *_: Any) -> bool:
        return False

    def write(self, *_: Any) -> bool:
        return False

    def put(self, *_: Any) -> None:
        pass


def races(spans: bool) -> Races:
    ctas = [SimpleNamespace(slot=slot) for slot in range(CTAS)]
    warps = [SimpleNamespace(cta=cta, unit=unit, row=unit) for unit, cta in enumerate(ctas * WARPS)]
    made = Races(warps, len(warps), WINDOW, CTAS, {})  # type: ignore[arg-type]
    made.warps = warps  # type: ignore[attr-defined]
    if not spans:
        made.spans = NoSpans(made.generic_pages.size)
        for slot in range(CTAS):
            made._marks(SimpleNamespace(slot=slot))  # type: ignore[arg-type]
            made.tmem[slot] = (made.tmem[slot][0], NoSpans(512))
    return made


def step(made: Races, draw: random.Random, clocks: list[Clock]) -> None:
    """One access of a random kind, by somebody who knows of some of those before."""
    warp = made.warps[draw.randrange(len(made.warps))]  # type: ignore[attr-defined]
    clock = made.fork(warp)
    for other in clocks[-12:]:
        if draw.random() < 0.97:
            clock.join(other)
            clock.parts[:, clock.unit] = clock.tick
    clocks.append(clock)
    operation: Any = Operation(clock=clock)
    slot, kind = draw.randrange(CTAS), draw.randrange(8)
    if kind < 3:
        pages = draw.choice([1, 2, 4])
        offset = draw.randrange(0, 16 // pages) * pages * PAGE
        made.async_shared(operation, slot, offset, pages * PAGE, draw.random() < 0.5)
    elif kind == 3:  # off the pages
        made.async_shared(operation, slot, 16 * draw.randrange(0, 900), 16 * draw.randrange(1, 100), draw.random() < 0.3)
    elif kind == 4:
        first = draw.randrange(0, 900)
        made.async_operand(operation, Operand(slot, np.arange(first, first + 96, draw.choice([1, 4])), WINDOW))
    elif kind == 5 and draw.random() < 0.1:
        gang: Any = SimpleNamespace(warps=[warp], lanes=32, race_rows=None)
        made.generic(gang, np.arange(32) + slot * WINDOW // 4 + 32 * draw.randrange(0, 120), None, 4, False)
    else:
        width = draw.choice([4, 8, 32])
        column = draw.randrange(0, 64 // width) * width
        cta: Any = SimpleNamespace(slot=slot)
        if kind == 6 and draw.random() < 0.2:
            made.order[warp.row] = np.maximum(made.order[warp.row], clock.order)
            made.tensor[warp.row] = np.maximum(made.tensor[warp.row], clock.tensor)
            made.tensor_access(warp, cta, slice(32, 64), column, width, False)
        else:
            made.tensor_async(operation, cta, column, width, draw.random() < 0.6)


def first_race(spans: bool, seed: int) -> tuple[int, str]:
    made, draw, clocks = races(spans), random.Random(seed), []  # type: ignore[var-annotated]
    for number in range(60):  # fewer than the units that operations share
        try:
            step(made, draw, clocks)
        except EmulatorError as error:
            return number, str(error)
    return -1, ""


def test_the_same_accesses_are_races() -> None:
    found = [(first_race(True, seed), first_race(False, seed)) for seed in range(400)]
    assert all(a == b for a, b in found), next((seed, a, b) for seed, (a, b) in enumerate(found) if a != b)
    kinds = {text.split(" that ")[0].rsplit(" at ", 1)[0].rsplit(" column ", 1)[0] for (_, text), _ in found if text}
    assert len(kinds) >= 5, kinds  # reads, writes and overwrites of shared memory; reads and writes of tensor memory
    assert any(number < 0 for (number, _), _ in found)


def test_wide_elements_are_checked_and_marked_as_their_granules() -> None:
    """Lanes that access 8 or 16 bytes, and the same lanes access them 4 bytes each."""
    texts = set()
    for seed in range(40):
        draw, both = random.Random(seed), (races(True), races(True))
        for _ in range(30):
            words, write, known = draw.choice([2, 4]), draw.random() < 0.5, draw.random() < 0.6
            chosen = draw.sample(range(CTAS * WARPS), 2)
            picked = np.array(sorted(draw.sample(range(64), draw.randrange(1, 64))))
            index = np.array(draw.sample(range(500), picked.size))
            granules = (index[:, None] * words + np.arange(words)).reshape(-1)
            found = []
            for made, arguments in zip(both, ((index, picked, 4 * words), (granules, picked.repeat(words), 4)), strict=True):
                warps = [made.warps[i] for i in chosen]  # type: ignore[attr-defined]
                if known:
                    made.order[:] = made.order.max(axis=0)
                try:
                    made.generic(SimpleNamespace(warps=warps, lanes=64, race_rows=None), *arguments, write)  # type: ignore[arg-type]
                    found.append("")
                except EmulatorError as error:
                    found.append(str(error))
                for warp in warps:
                    made._tick(warp)
            assert found[0] == found[1]
            texts.add(found[0].split(" shared")[0].rpartition(" ")[2])
            for name in ("write_unit", "write_tick", "read_unit", "read_tick"):
                np.testing.assert_array_equal(getattr(both[0].shared, name), getattr(both[1].shared, name))
            np.testing.assert_array_equal(both[0].write_lane, both[1].write_lane)
    assert texts == {"", "reads", "writes", "overwrites"}


def test_stages_of_a_ring_are_never_marked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What spans are for: after the first round a ring's accesses are compared span by span."""
    made = races(True)
    clock = made.fork(made.warps[0])  # type: ignore[attr-defined]
    operand = Operand(0, np.arange(64), WINDOW)

    def round_() -> None:
        nonlocal clock
        for write in (True, False):
            own = made.fork(made.warps[0])  # type: ignore[attr-defined]
            own.join(clock)
            own.parts[:, own.unit] = own.tick
            clock = own
            operation: Any = Operation(clock=clock)
            if write:
                made.async_shared(operation, 0, 0, 2 * PAGE, True)
            else:
                made.async_operand(operation, operand)

    round_()
    monkeypatch.setattr(made, "_check_async", None)
    for _ in range(100):
        round_()
