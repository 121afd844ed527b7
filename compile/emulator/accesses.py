"""``ld``, ``st``, ``atom``, ``red`` and matrix loads at run time: lanes of a gang against the memories.

Sources: PTX ISA 9.x, 9.7.9.8 ``ld``, 9.7.9.11 ``st``, 9.7.13.6 ``atom``, 9.7.13.7 ``red``, 9.7.14.5.15 ``ldmatrix``, 9.7.14.5.16 ``stmatrix``.

Lanes of one instruction act in lane order, those of an ``atom`` under random schedules in any; float additions of ``red`` and ``atom`` on global
memory flush subnormals, as the ISA says.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np

from densemoe.compile.emulator import lanes
from densemoe.compile.emulator.masks import some
from densemoe.compile.emulator.memory import LOCAL_WINDOW, PARAMETER_WINDOW, RANK_SHIFT, SHARED_WINDOW, GlobalMemory, SharedMemory
from densemoe.compile.emulator.mma import ldmatrix_addresses, stmatrix_addresses
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.gang import Gang

_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_OFFSET = (1 << RANK_SHIFT) - 1
POLLS_A_TURN = 32  # strong loads of words that a gang has read in the same turn, after which others have theirs
DISCARDED = 128  # bytes of ``discard.global.L2``


class Accesses:
    """What `Machine` knows of memory."""

    memory: GlobalMemory
    shared: SharedMemory
    parameters: bytes
    clustered: bool
    cluster_size: int
    moved: dict[str, int]
    lane_order: random.Random | None

    # --- addresses

    def shared_place(self, g: Gang, address: Any, own: bool, picked: Any = None) -> tuple[Any, Any]:
        """Window offset and slot of shared addresses.

        Args:
            own: ``shared::cta``: the CTA's own memory only.
            picked: lanes that the addresses belong to, where not all.
        """
        slots = g.slots if picked is None or isinstance(g.slots, int) else g.slots[picked]
        if not self.clustered:
            return address, slots
        ranks = address >> RANK_SHIFT
        if isinstance(address, int):
            if isinstance(slots, int):
                self._check_rank(ranks, g.cta.rank, own)
                return address & _OFFSET, slots - g.cta.rank + ranks
            own_ranks = slots % self.cluster_size
            if own and (own_ranks != ranks).any():
                self._check_rank(ranks, int(own_ranks[own_ranks != ranks][0]), own)
            self._check_rank(ranks, 0, False)
            return address & _OFFSET, slots - own_ranks + ranks
        ranks = ranks.astype(np.int64)
        own_ranks = slots % self.cluster_size
        wrong = ranks >= self.cluster_size
        if own:
            wrong = wrong | (ranks != own_ranks)
        if some(wrong):
            at = int(np.argmax(wrong))
            self._check_rank(int(ranks[at]), int(np.broadcast_to(own_ranks, ranks.shape)[at]), own)
        return address & _OFFSET, slots - own_ranks + ranks

    def _check_rank(self, rank: int, own_rank: int, own: bool) -> None:
        if rank >= self.cluster_size:
            raise EmulatorError(f"shared address of CTA rank {rank}: the cluster has {self.cluster_size} CTAs")
        if own and rank != own_rank:
            raise EmulatorError(f"a shared::cta access of CTA rank {own_rank} to the memory of rank {rank}")

    def generic_space(self, address: Any) -> tuple[str, Any]:
        """State space and address in it of generic addresses."""
        highest = address if isinstance(address, int) else int(address.max())
        if highest < SHARED_WINDOW:
            return "global", address
        lowest = address if isinstance(address, int) else int(address.min())
        for window, space in ((LOCAL_WINDOW, "local"), (PARAMETER_WINDOW, "param"), (SHARED_WINDOW, "shared")):
            if lowest >= window and highest < 2 * window:
                relative = address - window if isinstance(address, int) else address - np.uint64(window)
                if space == "local":
                    raise EmulatorError("generic addresses of local memory are not modelled")
                return space, relative
        raise EmulatorError(f"generic addresses {lowest:#x} to {highest:#x} lie in different state spaces")

    # --- ld

    def load(self, g: Gang, space: str, address: Any, mask: Any, size: int, count: int, order: str = "") -> Any:
        """Elements of each lane: ``[count, lanes]`` (``[lanes]`` for one), or ints where the address is uniform and the space allows.

        Args:
            order: ``relaxed`` or ``acquire`` and a scope, as in ``acquire.gpu``; empty for a weak access.
        """
        if space == "":
            space, address = self.generic_space(self._active(address, mask))
            if mask is not None and not isinstance(address, int):
                return self._spread(g, mask, self._load(g, space, address, np.flatnonzero(mask), size, count, order), size, count)
            return self._load(g, space, address, None, size, count, order, None if mask is None else np.flatnonzero(mask))
        if mask is not None:
            picked = np.flatnonzero(mask)
            if isinstance(address, int):
                if not picked.size:
                    zero = 0 if isinstance(g.slots, int) or space != "shared" else np.zeros(g.lanes, _UNSIGNED[size])
                    return zero if count == 1 else [zero] * count
                return self._load(g, space, address, None, size, count, order, picked)
            if not picked.size:
                zeros = np.zeros(g.lanes, _UNSIGNED[size])
                return zeros if count == 1 else [zeros] * count
            return self._spread(g, mask, self._load(g, space, address[picked], picked, size, count, order), size, count)
        return self._load(g, space, address, None, size, count, order)

    def _active(self, address: Any, mask: Any) -> Any:
        return address if mask is None or isinstance(address, int) else address[mask]

    def _spread(self, g: Gang, mask: Any, values: Any, size: int, count: int) -> Any:
        if count == 1:
            full = np.zeros(g.lanes, _UNSIGNED[size])
            full[mask] = values
            return full
        full = np.zeros((count, g.lanes), _UNSIGNED[size])
        full[:, mask] = values
        return full

    def _load(self, g: Gang, space: str, address: Any, picked: Any, size: int, count: int, order: str, active: Any = None) -> Any:
        nbytes = size * count
        if space == "global":
            if order:
                self._notice_polls(g, address if isinstance(address, int) else int(address[0]))
            if isinstance(address, int):
                self.moved["global loads"] += nbytes
                if address % nbytes:
                    raise EmulatorError(f"{nbytes}-byte access at global address {address:#x} is misaligned")
                self.note_global(g, address, active, size, count, False, order)
                return self._integers(self.memory.bytes_at(address, nbytes), size, count)
            self.moved["global loads"] += nbytes * address.size
            self.note_global(g, address, picked, size, count, False, order)
            return self._columns(self.memory.load(address, size, count), count)
        if space == "param":
            if not isinstance(address, int):
                raise EmulatorError("parameters at addresses that differ between lanes are not modelled")
            if not 0 <= address <= len(self.parameters) - nbytes:
                raise EmulatorError(f"{nbytes} bytes at parameter offset {address} of {len(self.parameters)}")
            return self._integers(np.frombuffer(self.parameters, np.uint8, nbytes, address), size, count)
        offset, slots = self.shared_place(g, address, space == "shared::cta", picked)
        index = self.shared.index(offset, slots, nbytes)
        self.shared.check(index, size, count)
        if active is None:
            self.note_shared(g, index, picked, nbytes, False)
        elif active.size:  # one address, which some lanes read
            self.note_shared(g, index if isinstance(index, int) else index[active], active, nbytes, False)
        values = self.shared.view(size, count)[index]
        if isinstance(index, int):
            self.moved["shared loads"] += nbytes
            return int(values) if count == 1 else [int(value) for value in values]
        self.moved["shared loads"] += nbytes * index.size
        if index.size != g.lanes and picked is None:  # one address in every CTA: slots of lanes
            raise EmulatorError("internal: shared index of another size")
        return self._columns(values, count)

    @staticmethod
    def _notice_polls(g: Gang, address: int) -> None:
        """Ends the turn of a gang whose strong loads come to the same words again and again: somebody else is to write them."""
        if address not in g.polled:
            g.polled.add(address)
            return
        g.polls += 1
        if g.polls >= POLLS_A_TURN:
            g.sleeps = True

    def _integers(self, data: Any, size: int, count: int) -> Any:
        raw = data.tobytes()
        if count == 1:
            return int.from_bytes(raw, "little")
        return [int.from_bytes(raw[i * size : i * size + size], "little") for i in range(count)]

    def _columns(self, values: Any, count: int) -> Any:
        return values if count == 1 else np.ascontiguousarray(values.T)

    # --- st

    def store(self, g: Gang, space: str, address: Any, mask: Any, size: int, values: tuple[Any, ...], order: str = "") -> None:
        """Stores one or several elements a lane; values are ints or arrays as wide as their registers."""
        picked, several = None, False
        if mask is not None:
            picked = np.flatnonzero(mask)
            if not picked.size:
                return
        if isinstance(address, int) and not (space in ("shared", "shared::cta", "shared::cluster", "") and not isinstance(g.slots, int)):
            last = int(picked[-1]) if picked is not None else -1
            low = (1 << (8 * size)) - 1
            values = tuple(np.array([(v if isinstance(v, int) else int(v[last])) & low], _UNSIGNED[size]) for v in values)
            several = picked is None or picked.size > 1
            address, picked = np.array([address], np.uint64), np.array([last % g.lanes])
        else:
            if isinstance(address, int):
                address = np.full(g.lanes, address, np.uint64)
            if picked is not None:
                address = address[picked]
            values = tuple(self._elements(v, picked, address.size, size) for v in values)
        if space == "":
            space, address = self.generic_space(address)
        data = values[0] if len(values) == 1 else np.stack(values, axis=1)
        nbytes = size * len(values)
        if space == "global":
            self.moved["global stores"] += nbytes * address.size
            self.note_global(g, address, picked, size, len(values), True, order)
            self.memory.store(address.astype(np.uint64, copy=False), size, data)
            return
        if space == "param":
            raise EmulatorError("a store to kernel parameters")
        offset, slots = self.shared_place(g, address, space == "shared::cta", picked)
        index = self.shared.index(offset, slots, nbytes)
        self.moved["shared stores"] += nbytes * address.size
        self.note_shared(g, index, picked, nbytes, True, several)
        self.shared.view(size, len(values))[index] = data
        self.shared.view(size, len(values), True)[index] = _UNSIGNED[size]((1 << (8 * size)) - 1)

    def _elements(self, value: Any, picked: Any, n: int, size: int) -> Any:
        if isinstance(value, int):
            return np.full(n, value & ((1 << (8 * size)) - 1), _UNSIGNED[size])
        if picked is not None:
            value = value[picked]
        return value.astype(_UNSIGNED[size], copy=False)

    # --- local memory: a window of each lane

    def load_local(self, g: Gang, address: Any, mask: Any, size: int, count: int) -> Any:
        """``ld.local``."""
        data, written, rows, offsets = self._local(g, address, mask, size * count)
        span = offsets[:, None] + np.arange(size * count)
        if not written[rows[:, None], span].all():
            raise EmulatorError("local memory is read before it was written")
        values = np.zeros((g.lanes, count), _UNSIGNED[size])
        values[rows] = np.ascontiguousarray(data[rows[:, None], span]).view(_UNSIGNED[size])
        return values[:, 0].copy() if count == 1 else np.ascontiguousarray(values.T)

    def discard(self, g: Gang, address: Any, mask: Any) -> None:
        """``discard.global.L2``: a weak write of 128 bytes that leaves them undefined (9.7.9, ``discard``)."""
        picked = None if mask is None else np.flatnonzero(mask)
        if picked is not None and not picked.size:
            return
        lanes = np.arange(g.lanes) if picked is None else picked
        addresses = np.full(lanes.size, address, np.uint64) if isinstance(address, int) else address.astype(np.uint64, copy=False)
        if picked is not None and addresses.size != lanes.size:
            addresses = addresses[picked]
        self.note_global(g, addresses, picked, 4, DISCARDED // 4, True, "")
        self.memory.discard(addresses, DISCARDED)

    def store_local(self, g: Gang, address: Any, mask: Any, size: int, values: tuple[Any, ...]) -> None:
        """``st.local``."""
        data, written, rows, offsets = self._local(g, address, mask, size * len(values))
        for i, value in enumerate(values):
            part = self._elements(value, None if isinstance(value, int) else rows, rows.size, size)
            span = offsets[:, None] + i * size + np.arange(size)
            data[rows[:, None], span] = np.ascontiguousarray(part).view(np.uint8).reshape(-1, size)
            written[rows[:, None], span] = True

    def _local(self, g: Gang, address: Any, mask: Any, nbytes: int) -> tuple[Any, Any, Any, Any]:
        rows = np.arange(g.lanes) if mask is None else np.flatnonzero(mask)
        offsets = np.full(rows.size, address, np.int64) if isinstance(address, int) else address[rows].astype(np.int64)
        limit = g.program.local_bytes
        if rows.size and (int(offsets.min()) < 0 or int(offsets.max()) + nbytes > limit or (offsets % nbytes).any()):
            raise EmulatorError(f"{nbytes} bytes of local memory, out of its {limit} bytes or misaligned")
        data, written = g.local()
        return data, written, rows, offsets

    # --- atom and red

    def atomic(
        self, g: Gang, space: str, address: Any, mask: Any, operation: str, kind: str, operands: tuple[Any, ...], order: str = "", reads: bool = True
    ) -> Any:
        """``atom``: the old values, ``[lanes]``. Which lane comes first where several meet in a word the ISA does not say: random schedules have them
        come in any order.

        Args:
            order: ``acquire``, ``release`` or ``acq_rel`` and a scope, as in ``acq_rel.gpu``.
            reads: False for ``red``.
        """
        size = {"b16": 2, "f16": 2, "bf16": 2}.get(kind) or (8 if kind.endswith("64") else 4)
        old_values = np.zeros(g.lanes, _UNSIGNED[size])
        low = (1 << (8 * size)) - 1
        coming = list(g.active_lanes(mask))
        if reads and self.lane_order is not None:
            self.lane_order.shuffle(coming)
        for lane in coming:
            where = address if isinstance(address, int) else int(address[lane])
            arguments = [v if isinstance(v, int) else int(v[lane]) for v in operands]
            cell = self._cell(g, space, where, lane, size)
            old = int(cell[0])
            old_values[lane] = old
            cell[0] = _combine(operation, kind, old, [x & low for x in arguments]) & low
        self.note_atomic(g, space, address, mask, size, 1, order, reads)
        return old_values

    def _cell(self, g: Gang, space: str, address: int, lane: int, size: int) -> Any:
        if space == "":
            space, address = self.generic_space(address)
        if address % size:
            raise EmulatorError(f"{size}-byte atomic at address {address:#x} is misaligned")
        if space == "global":
            self.memory.bytes_at(address, size)  # an atomic reads, so the bytes must be written
            buffer = self.memory.find(address, size)
            if not buffer.writable:
                raise EmulatorError(f"an atomic on {buffer.name}, which is read-only")
            start = address - buffer.address
            return buffer.data[start : start + size].view(_UNSIGNED[size])
        warp = g.warps[lane // 32]
        slot = warp.cta.slot
        if self.clustered:
            self._check_rank(address >> RANK_SHIFT, warp.cta.rank, space == "shared::cta")
            slot += (address >> RANK_SHIFT) - warp.cta.rank
            address &= _OFFSET
        index = self.shared.index(address, slot, size)
        self.shared.check(index, size, 1)
        return self.shared.view(size, 1)[index : index + 1]

    def reduce(self, g: Gang, space: str, address: Any, mask: Any, operation: str, kind: str, values: tuple[Any, ...], order: str = "") -> None:
        """``red``: one element a lane, or a vector of f32."""
        if kind != "f32" or operation != "add" or space not in ("", "global"):
            if len(values) > 1:
                raise EmulatorError(f"red.{operation} of a vector of {kind} is not modelled")
            self.atomic(g, space, address, mask, operation, kind, values, order, False)
            return
        picked = np.arange(g.lanes) if mask is None else np.flatnonzero(mask)
        if not picked.size:
            return
        where = np.full(picked.size, address, np.uint64) if isinstance(address, int) else address[picked].astype(np.uint64, copy=False)
        if space == "" and self.generic_space(where)[0] != "global":
            self.atomic(g, space, address, mask, operation, kind, values, order, False)
            return
        count = len(values)
        added = np.stack([self._elements(v, picked if not isinstance(v, int) else None, picked.size, 4) for v in values], axis=1)
        self.moved["global reductions"] += 4 * count * picked.size
        nbytes = 4 * count
        if (where & np.uint64(nbytes - 1)).any():
            raise EmulatorError(f"a red of {nbytes} bytes at a misaligned address")
        self.memory.load(where, 4, count)  # bounds, and that the memory was written
        self.note_atomic(g, "global", where, mask, 4, count, order, False)
        for buffer, chosen, offsets in self.memory.parts(where, nbytes):
            if not buffer.writable:
                raise EmulatorError(f"a red to {buffer.name}, which is read-only")
            index = (offsets // np.uint64(4)).astype(np.intp)[:, None] + np.arange(count)
            target = buffer.view(4, 1).view(np.float32)
            target[index] = lanes.ftz(target[index])
            np.add.at(target, index, lanes.ftz(np.ascontiguousarray(added if chosen is None else added[chosen]).view(np.float32)))
            target[index] = lanes.ftz(target[index])

    # --- matrices

    def ldmatrix(self, g: Gang, address: Any, mask: Any, count: int, transpose: bool, element: str) -> Any:
        """``ldmatrix``: registers ``[registers, lanes]``."""
        addresses, unit, slots = self._matrix(g, address, mask, count, transpose, element, ldmatrix_addresses)
        index = self.shared.index(addresses.reshape(-1), slots, unit)
        self.shared.check(index, unit, 1)
        self.note_shared(g, index, self._matrix_lanes(addresses), unit, False)
        self.moved["shared loads"] += unit * index.size
        values = self.shared.view(unit, 1)[index].reshape(addresses.shape)
        return np.ascontiguousarray(values).view(np.uint32).reshape(addresses.shape[0], -1)

    def stmatrix(self, g: Gang, address: Any, mask: Any, count: int, transpose: bool, element: str, values: tuple[Any, ...]) -> None:
        """``stmatrix``."""
        addresses, unit, slots = self._matrix(g, address, mask, count, transpose, element, stmatrix_addresses)
        index = self.shared.index(addresses.reshape(-1), slots, unit)
        words = np.stack([np.full(g.lanes, v, np.uint32) if isinstance(v, int) else v for v in values])
        self.note_shared(g, index, self._matrix_lanes(addresses), unit, True)
        self.moved["shared stores"] += unit * index.size
        self.shared.view(unit, 1)[index] = np.ascontiguousarray(words).view(_UNSIGNED[unit]).reshape(-1)
        self.shared.view(unit, 1, True)[index] = _UNSIGNED[unit]((1 << (8 * unit)) - 1)

    @staticmethod
    def _matrix_lanes(addresses: Any) -> Any:
        """The lane of each address of a matrix instruction ``[registers, warps, 32, units]``."""
        lane = np.arange(addresses.shape[1] * 32).reshape(1, -1, 32, 1)
        return np.broadcast_to(lane, addresses.shape).reshape(-1)

    def _matrix(self, g: Gang, address: Any, mask: Any, count: int, transpose: bool, element: str, resolve: Any) -> tuple[Any, int, Any]:
        if mask is not None and not mask.all():
            raise EmulatorError("a matrix instruction (.sync.aligned) with inactive lanes")
        if isinstance(address, int):
            address = np.full(g.lanes, address, np.uint32)
        offset, slots = self.shared_place(g, address, True)
        addresses, unit = resolve(offset.reshape(-1, 32), count, transpose, element)
        if addresses.ndim == 3:
            addresses = addresses[:, None]
        if not isinstance(slots, int):
            slots = np.broadcast_to(slots.reshape(1, -1, 32, 1), addresses.shape).reshape(-1)
        return addresses, unit, slots

    # --- hooks of race detection, filled by `Machine`

    def note_shared(self, g: Gang, index: Any, picked: Any, nbytes: int, write: bool, several: bool = False) -> None:
        """A generic-proxy access to shared memory."""

    def note_global(self, g: Gang, address: Any, picked: Any, size: int, count: int, write: bool, order: str) -> None:
        """A generic-proxy access to global memory."""

    def note_atomic(self, g: Gang, space: str, address: Any, mask: Any, size: int, count: int, order: str, reads: bool) -> None:
        """An atomic operation; addresses are those of all lanes, or of the active ones where `count` elements are added."""


_SIGNED_BITS = {"s32": 32, "s64": 64}


def _combine(operation: str, kind: str, old: int, arguments: list[int]) -> int:
    """New content of a memory cell, as bits."""
    if operation == "exch":
        return arguments[0]
    if operation == "cas":
        return arguments[1] if old == arguments[0] else old
    if operation == "inc":
        return 0 if old >= arguments[0] else old + 1
    if operation == "dec":
        return arguments[0] if old == 0 or old > arguments[0] else old - 1
    if kind in ("f32", "f64"):
        dtype, container = (np.float32, np.uint32) if kind == "f32" else (np.float64, np.uint64)
        total = np.array([old], container).view(dtype) + np.array([arguments[0]], container).view(dtype)
        return int(total.view(container)[0])
    if kind in ("f16x2", "bf16x2"):
        pair = np.array([old, arguments[0]], np.uint32)
        if kind == "bf16x2":
            return int(lanes.add_bf16(pair[:1], pair[1:], True)[0])
        halves = pair.view(np.float16).reshape(2, 2)
        return int((halves[0] + halves[1]).view(np.uint32)[0])
    a, b = old, arguments[0]
    if operation in ("min", "max"):
        if kind in _SIGNED_BITS:
            sign = 1 << (_SIGNED_BITS[kind] - 1)
            a, b = (a ^ sign) - sign, (b ^ sign) - sign
        return min(a, b) if operation == "min" else max(a, b)
    return {"add": a + b, "and": a & b, "or": a | b, "xor": a ^ b}[operation]
