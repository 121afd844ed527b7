"""Gangs that stand at one place become one."""

from __future__ import annotations

from typing import Any

import numpy as np

from densemoe.compile.emulator.gang import Gang
from densemoe.compile.emulator.warps import Frame

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
    merged = Gang(first.run, first.program, [warp for each in gangs for warp in each.warps], [])

    ranges: list[slice] = []
    for each in gangs:
        start = ranges[-1].stop if ranges else 0
        ranges.append(slice(start, start + each.lanes))
    lanes = ranges[-1].stop

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
        together = np.empty(lanes, _CONTAINER[bits[number]])
        missing = False
        for where, value in zip(ranges, values, strict=True):
            missing = missing or value is None
            together[where] = 0 if value is None else value
        registers[number] = together
        if missing or (some_defined and any(number in each.defined for each in gangs)):
            masks = [
                each.defined.get(number, np.full(each.lanes, value is not None, np.bool_)) for value, each in zip(values, gangs, strict=True)
            ]
            merged.defined[number] = np.concatenate(masks)
    merged.registers = registers
    masks = [np.ones(each.lanes, np.bool_) if each.mask is None else each.mask for each in gangs]
    mask = np.concatenate(masks)
    merged.mask = None if mask.all() else mask
    for i, frame in enumerate(first.frames):
        pending = [
            (place, np.concatenate([each.frames[i].pending[j][1] for each in gangs])) for j, (place, _) in enumerate(frame.pending)
        ]
        merged.frames.append(Frame(frame.join, np.concatenate([each.frames[i].mask for each in gangs]), pending, frame.skipped))
    if any(each.local_data is not None for each in gangs):
        parts = [each.local() for each in gangs]
        merged.local_data = np.concatenate([data for data, _ in parts])
        merged.local_written = np.concatenate([written for _, written in parts])
    merged.meetings = list(first.meetings)
    order = sorted(range(len(merged.warps)), key=lambda i: (merged.warps[i].cta.slot, merged.warps[i].index))
    return merged if order == list(range(len(order))) else merged.take(order, (block,))
