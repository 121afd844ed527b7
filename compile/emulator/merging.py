"""Gangs that stand at one place become one."""

from __future__ import annotations

from typing import Any

import numpy as np

from densemoe.compile.emulator.gang import Gang
from densemoe.compile.emulator.masks import every
from densemoe.compile.emulator.warps import LANES, Frame

__all__ = ["merge_gangs"]

_CONTAINER = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def merge_gangs(gangs: list[Gang], block: int) -> Gang | None:
    """One gang from several that stand before the same block; None where their divergences differ."""
    first = gangs[0]
    shape = [(frame.join, [place for place, _ in frame.pending]) for frame in first.frames]
    for each in gangs[1:]:
        if [(frame.join, [place for place, _ in frame.pending]) for frame in each.frames] != shape:
            return None
        if each.meetings != first.meetings:
            return None
    warps = [warp for each in gangs for warp in each.warps]
    order = sorted(range(len(warps)), key=lambda i: (warps[i].cta.slot, warps[i].index))
    merged = Gang(first.run, first.program, [warps[i] for i in order], [])
    ranks = [0] * len(warps)
    for rank, i in enumerate(order):
        ranks[i] = rank
    ranges: list[Any] = []  # of each gang's warps in the merged one
    at = 0
    for each in gangs:
        own = ranks[at : at + len(each.warps)]
        at += len(own)
        ranges.append(slice(own[0], own[-1] + 1) if own == list(range(own[0], own[-1] + 1)) else np.array(own))

    def join(values: list[Any], dtype: Any, *shape: int) -> Any:
        """What each gang has, of a value or one of each lane, for all lanes."""
        together = np.empty((len(warps), LANES, *shape), dtype)
        for where, value in zip(ranges, values, strict=True):
            together[where] = value.reshape(-1, LANES, *shape) if isinstance(value, np.ndarray) else value
        return together.reshape(-1, *shape)

    registers: list[Any] = [None] * len(first.registers)
    places = [block]
    for frame in first.frames:  # what other ways and joins will read
        places += [frame.join, *(place for place, _ in frame.pending)]
    given = [each.registers for each in gangs]
    some_defined = any(each.defined for each in gangs)
    bits = first.program.bits_of_number
    for number in first.program.live_numbers(tuple(places)):
        values = [each[number] for each in given]
        if not any(isinstance(value, np.ndarray) for value in values) and values.count(values[0]) == len(values):
            registers[number] = values[0]
            continue
        missing = any(value is None for value in values)
        registers[number] = join([0 if value is None else value for value in values], _CONTAINER[bits[number]])
        if missing or (some_defined and any(number in each.defined for each in gangs)):
            masks = [each.defined.get(number, value is not None) for value, each in zip(values, gangs, strict=True)]
            merged.defined[number] = join(masks, np.bool_)
    merged.registers = registers
    mask = join([True if each.mask is None else each.mask for each in gangs], np.bool_)
    merged.mask = None if every(mask) else mask
    for i, frame in enumerate(first.frames):
        pending = [(place, join([each.frames[i].pending[j][1] for each in gangs], np.bool_)) for j, (place, _) in enumerate(frame.pending)]
        merged.frames.append(Frame(frame.join, join([each.frames[i].mask for each in gangs], np.bool_), pending, frame.skipped))
    if any(each.local_data is not None for each in gangs):
        parts = [each.local() for each in gangs]
        merged.local_data, merged.local_written = (join(list(each), each[0].dtype, each[0].shape[1]) for each in zip(*parts, strict=True))
    merged.meetings = list(first.meetings)
    return merged
