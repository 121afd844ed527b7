"""``wgmma`` at run time.

Sources: PTX ISA 9.x, 9.7.15 (``wgmma.mma_async``, ``commit_group``, ``wait_group``).

A product is computed when it is issued; when its group is waited for, the shared memory that it read must not have changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from densemoe.compile.emulator.asynchronous import AsyncOperation
from densemoe.compile.emulator.gang import Gang
from densemoe.compile.emulator.smem_descriptor import decode_sm90, operand_granules
from densemoe.compile.emulator.spans import Operand
from densemoe.compile.emulator.tensor_units import TensorUnits
from densemoe.compile.emulator.warps import LANES, Condition, Groups, Warp
from densemoe.runtime.errors import EmulatorError

__all__ = ["WarpgroupUnits"]

_WARPGROUP = 4


def _whole_warpgroups(warps: list[Warp]) -> bool:
    for w in range(0, len(warps), _WARPGROUP):
        group = warps[w : w + _WARPGROUP]
        first = group[0]
        if len(group) < _WARPGROUP or first.index % _WARPGROUP:
            return False
        if any(each.cta is not first.cta or each.index != first.index + n for n, each in enumerate(group)):
            return False
    return True


def _warpgroups(g: Gang) -> set[tuple[int, int]]:
    return {(warp.cta.slot, warp.index // _WARPGROUP) for warp in g.warps}


def _with_the_rest(g: Gang, waiting: list[Gang]) -> list[Gang]:
    """A gang and those that hold other warps of its warpgroups, or of theirs."""
    parts, groups = [g], _warpgroups(g)
    while True:
        found = [each for each in waiting if each not in parts and groups & _warpgroups(each)]
        if not found:
            return parts
        parts += found
        groups.update(*map(_warpgroups, found))


class WarpgroupUnits(TensorUnits):
    """What `Machine` knows of ``wgmma``."""

    #: by block: gangs that stand at its ``wgmma.fence`` without the rest of their warpgroups
    gathering: dict[int, list[Gang]]

    def adopt(self, gang: Gang, state: str) -> None:
        """Takes a gang in hand after it was made or moved."""
        raise NotImplementedError

    def merge(self, gangs: list[Gang], block: int) -> Gang | None:
        """One gang of several, which end; None where their divergences differ."""
        raise NotImplementedError

    def unite_meetings(self, gangs: list[Gang]) -> bool:
        """Makes the meetings ahead of gangs the same; False where they are not at the same places."""
        raise NotImplementedError

    def warpgroup_gathered(self, g: Gang) -> bool:
        """``wgmma.fence`` (.sync.aligned): all warps of a warpgroup execute it together.

        Warps that parted at a branch and did not meet where it ends, because one had to wait, go on as one gang from here.
        """
        if _whole_warpgroups(g.warps):
            return True
        block = g.version.block.index
        waiting = self.gathering.setdefault(block, [])
        parts = _with_the_rest(g, waiting)
        warps = sorted((warp for each in parts for warp in each.warps), key=lambda warp: (warp.cta.slot, warp.index))
        if not _whole_warpgroups(warps):
            waiting.append(g)
            missing = Condition(lambda: "the other warps of its warpgroup")
            g.wait = [missing] * len(g.warps)
            return False
        for each in parts:
            each.wait = None
        together = self.merge(parts, block) if self.unite_meetings(parts) else None
        if together is None:
            raise EmulatorError("wgmma.fence by warps of a warpgroup that came on different ways")
        self.gathering[block] = [each for each in waiting if each not in parts]
        together.stand(block)
        self.adopt(together, "")
        return False

    def wgmma(
        self, g: Gang, mask: Any, unit: Any, d: tuple[Any, ...], a: Any, b: Any, add: Any, signs: tuple[int, int], transpose: tuple[bool, bool]
    ) -> Any:
        """``wgmma.mma_async``: registers of D, ``[registers, lanes]``."""
        if mask is not None and not mask.all():
            raise EmulatorError("wgmma with inactive lanes")
        warps = g.warps
        if not _whole_warpgroups(warps):
            raise EmulatorError("wgmma by warps that are not a whole warpgroup at one instruction")
        result = np.empty((len(d), g.lanes), np.uint32)
        old = [np.full(g.lanes, v, np.uint32) if isinstance(v, int) else v for v in d]
        for w in range(0, len(warps), _WARPGROUP):
            warp = warps[w]
            window = self.shared.window(warp.cta.slot)
            lanes = slice(w * LANES, (w + _WARPGROUP) * LANES)
            b_bits = b if isinstance(b, int) else int(b[w * LANES])
            b_matrix = unit.b_from_shared(window, b_bits, transpose[1])
            a_bits = None
            if isinstance(a, tuple):
                a_matrix = unit.a_from_registers(np.stack([np.full(128, v, np.uint32) if isinstance(v, int) else v[lanes] for v in a]))
            else:
                a_bits = a if isinstance(a, int) else int(a[w * LANES])
                a_matrix = unit.a_from_shared(window, a_bits, transpose[0])
            accumulate = add if isinstance(add, bool) else bool(add[w * LANES])
            previous = np.stack([each[lanes] for each in old]) if accumulate else None
            result[:, lanes] = unit.multiply(a_matrix, b_matrix, previous, *signs)

            def action(
                operation: AsyncOperation,
                window: Any = window,
                b_bits: int = b_bits,
                b_matrix: Any = b_matrix,
                a_bits: int | None = a_bits,
                a_matrix: Any = a_matrix,
            ) -> None:
                same = np.array_equal(unit.b_from_shared(window, b_bits, transpose[1]), b_matrix, equal_nan=True)
                if a_bits is not None:
                    same = same and np.array_equal(unit.a_from_shared(window, a_bits, transpose[0]), a_matrix, equal_nan=True)
                if not same:
                    raise EmulatorError("shared memory was overwritten while a wgmma still read it")

            self.issued_by = None
            operation = self.new_operation(g, warp, action, "wgmma")
            rows = [(b_bits, unit.n, unit.element_bytes("b") if transpose[1] else 0)]
            if a_bits is not None:
                rows.append((a_bits, 64, unit.element_bytes("a") if transpose[0] else 0))
            for bits, count, element in rows:
                granules = operand_granules(decode_sm90(bits), count, 32, element).reshape(-1)
                self.check_granules(warp.cta.slot, granules)
                if self.races is not None:
                    self.races.async_operand(operation, Operand(warp.cta.slot, granules, self.shared.stride))
            if warp.wgmma is None:
                warp.wgmma = Groups()
            warp.wgmma.open.append(operation)
            self.products["wgmma"] = self.products.get("wgmma", 0) + 1
            self.submit(operation)
        return result

    def wgmma_commit(self, g: Gang, mask: Any) -> None:
        """``wgmma.commit_group``."""
        for warp in g.warps:
            if warp.wgmma is not None:
                warp.wgmma.commit()

    def wgmma_wait(self, g: Gang, mask: Any, newest: int) -> bool:
        """``wgmma.wait_group``: reads of shared memory end here at the latest."""
        for w, warp in enumerate(g.warps):
            groups = warp.wgmma
            if groups is None:
                continue
            if self.races is not None:
                done = [each for group in groups.committed[: len(groups.committed) - newest] for each in group]
                for member in g.warps[w : w + _WARPGROUP]:
                    self.races.waited(member, done)
            for each in groups.older_than(newest):
                self.finish_now(each)
        return True

    def finish_now(self, operation: AsyncOperation) -> None:
        """Executes a pending operation because its completion is waited for."""
        raise NotImplementedError
