"""What race detection keeps of ranges that are written and read whole, in place of marks of every granule.

A stage of a pipeline is written by one copy, read by a few instructions, and written again by a copy of the same range: three comparisons instead
of thousands. Where an access does not fit, the ranges it meets are dissolved: their marks are what they would have been without spans.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

from densemoe.compile.emulator.clocks import Marks, Vector
from densemoe.compile.emulator.smem_descriptor import decode_sm100, operand_granules

__all__ = ["GRANULE", "PAGE", "Operand", "Span", "Spans", "dissolve_columns", "operand_of"]

GRANULE: Final = 4  # bytes of shared memory that a mark stands for
PAGE: Final = 256  # granules of a page that remembers whether lanes accessed it, and of a cell of spans

_READS: Final = 32  # of a span; more dissolve it


class Span:
    """A range that one asynchronous operation wrote whole.

    Attributes:
        first, end: cells of its `Spans`.
        unit, tick: who wrote it, and when.
        reads: since then: unit, tick, and what of it, as an index of its marks.
    """

    __slots__ = ("end", "first", "reads", "tick", "unit")

    def __init__(self, first: int, end: int, unit: int, tick: int) -> None:
        self.first, self.end, self.unit, self.tick = first, end, unit, tick
        self.reads: list[tuple[int, int, Any]] = []


class Spans:
    """The spans of a memory, in cells of equal size.

    Args:
        cells: of the memory.

    Attributes:
        at: the span over each cell, or None.
    """

    def __init__(self, cells: int) -> None:
        self.at: list[Span | None] = [None] * cells

    def over(self, first: int, end: int) -> list[Span] | None:
        """The spans that cover cells ``[first, end)``, in order; None where some are not covered."""
        span = self.at[first]
        if span is None:
            return None
        found = [span]
        while span.end < end:
            span = self.at[span.end] if span.end < len(self.at) else None
            if span is None:
                return None
            found.append(span)
        return found

    def read(self, first: int, end: int, unit: int, tick: int, what: Any, known: Vector) -> bool:
        """Notes a read of cells; False, and nothing noted, where spans do not cover them or their writes are not all `known`."""
        found = self.over(first, end)
        if found is None:
            return False
        for span in found:
            if known[span.unit] < span.tick or len(span.reads) >= _READS:
                return False
        for span in found:
            span.reads.append((unit, tick, what))
        return True

    def write(self, first: int, end: int, unit: int, tick: int, known: Vector) -> bool:
        """Notes a write of just the cells of one or several spans; False, and nothing noted, where they are others or not all is `known`."""
        found = self.over(first, end)
        if found is None or found[0].first != first or found[-1].end != end:
            return False
        for span in found:
            if known[span.unit] < span.tick:
                return False
            for reader, when, _ in span.reads:
                if known[reader] < when:
                    return False
        if len(found) == 1:
            span = found[0]
            span.unit, span.tick = unit, tick
            span.reads.clear()
        else:
            self.put(first, end, unit, tick)
        return True

    def put(self, first: int, end: int, unit: int, tick: int) -> None:
        """A new span, over cells that have none."""
        self.at[first:end] = [Span(first, end, unit, tick)] * (end - first)

    def take(self, first: int, end: int) -> list[Span]:
        """Removes the spans that meet cells ``[first, end)``."""
        found: list[Span] = []
        for span in self.at[first:end]:
            if span is not None and (not found or found[-1] is not span):
                found.append(span)
        for span in found:
            self.at[span.first : span.end] = [None] * (span.end - span.first)
        return found


def dissolve_columns(marks: Marks, spans: Spans, first: int, end: int) -> None:
    """Marks what spans say of columns of tensor memory."""
    every = slice(None)
    for span in spans.take(first, end):
        marks.forget((every, slice(span.first, span.end)), span.unit, span.tick)
        for unit, tick, what in span.reads:
            marks.read((every, slice(max(what.start, span.first), min(what.stop, span.end))), unit, tick)


class Operand:
    """16-byte granules of shared memory that asynchronous operations read more than once.

    Args:
        slot: of the CTA.
        granules: numbers of them in its window, in any shape.
        window: bytes of a CTA's shared window.

    Attributes:
        own: of its granules, in one dimension.
        index: of them among those of all windows, in that shape.
        rows: the same in one dimension.
        starts: of its marks.
    """

    __slots__ = ("index", "own", "pages", "rows", "starts")

    def __init__(self, slot: int, granules: Any, window: int) -> None:
        self.own = granules.reshape(-1)
        self.index = granules + slot * (window // 16)
        self.rows = self.index.reshape(-1)
        self.starts = self.rows * 4
        self.pages = slice(int(self.starts.min()) // PAGE, int(self.starts.max()) // PAGE + 1)


@lru_cache(maxsize=1024)  # launches of one kernel have the same
def operand_of(window: int, slot: int, bits: int, rows: int, k_bytes: int, element_bytes: int) -> Operand:
    """The operand of a ``tcgen05`` descriptor, as `operand_granules`.

    Raises:
        EmulatorError: as `decode_sm100` and `operand_granules`.
    """
    return Operand(slot, operand_granules(decode_sm100(bits), rows, k_bytes, element_bytes), window)
