"""Warps, what they wait for, and where they part and meet: the parts of ``gang``.

Sources: PTX ISA 9.x, 3.1 (SIMT execution), 9.7.9.25 (groups of asynchronous operations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from densemoe.compile.emulator.masks import Mask

if TYPE_CHECKING:
    from densemoe.compile.emulator.gang import Gang
    from densemoe.compile.emulator.machine import Cta

__all__ = ["LANES", "Condition", "Frame", "Groups", "Meeting", "Warp"]

LANES: Final = 32


class Condition:
    """Something to wait for, once.

    Attributes:
        ready: it has happened.
        waiters: gangs that are told.
        text: function that describes it, for reports.
    """

    __slots__ = ("ready", "text", "waiters")

    def __init__(self, text: Callable[[], str], ready: bool = False) -> None:
        self.ready, self.text = ready, text
        self.waiters: list[Gang] = []

    def signal(self) -> None:
        """It has happened."""
        if self.ready:
            return
        self.ready = True
        waiters, self.waiters = self.waiters, []
        for gang in waiters:
            gang.missing -= 1
            if gang.missing == 0:
                gang.run.wake(gang)


@dataclass(eq=False)
class Groups:
    """Asynchronous operations of one thread: those not committed yet, and committed groups, oldest first."""

    open: list[Any] = field(default_factory=list)
    committed: list[list[Any]] = field(default_factory=list)

    def commit(self) -> None:
        """Closes a group."""
        self.committed.append(self.open)
        self.open = []

    def older_than(self, newest: int) -> list[Any]:
        """Operations of all groups but the `newest` last ones that are not done."""
        self.committed = [group for group in self.committed[:-newest or None] if any(not each.done for each in group)] + (
            self.committed[-newest:] if newest else []
        )
        return [each for group in (self.committed[:-newest] if newest else self.committed) for each in group if not each.done]


@dataclass(eq=False)
class Warp:
    """One warp of a resident CTA.

    Attributes:
        index: in its CTA.
        threads: bool ``[32]``: which lanes exist.
        unit: its number in its cluster, for race detection; `row` its number among all resident warps.
    """

    cta: Cta
    index: int
    threads: Mask
    unit: int = 0
    bulk: dict[int, Groups] = field(default_factory=dict)
    copies: dict[int, Groups] = field(default_factory=dict)
    wgmma: Groups | None = None
    row: int = 0
    copies_waited: list[Any] = field(default_factory=list)
    bulk_waited: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        return f"CTA {self.cta.ctaid} warp {self.index}"


@dataclass(eq=False, slots=True)
class Frame:
    """An open divergence inside of warps.

    Attributes:
        join: block at which the lanes meet again.
        mask: lanes that go on there.
        pending: ways not taken yet: (block, lanes).
        skipped: the other lanes skip a block, and have nothing to run before they meet.
    """

    join: int
    mask: Mask
    pending: list[tuple[int, Mask]]
    skipped: bool = False


@dataclass(eq=False)
class Meeting:
    """Where the parts of a gang wait for each other.

    Attributes:
        depth: frames that were open when the gang parted.
        outstanding: parts that have not ended.
        closed: the others went on without the late ones.
    """

    join: int
    depth: int
    outstanding: int
    arrived: list[Gang] = field(default_factory=list)
    closed: bool = False
