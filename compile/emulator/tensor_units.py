"""Tensor copies and ``tcgen05`` at run time.

Sources: PTX ISA 9.x, 9.7.9.27 (``cp.async.bulk.tensor``, multicast, ``.cta_group``), 9.7.16 (``tcgen05``: 6 ordering, 7 allocation,
8 ld and st, 9 cp, 10 mma, 12 commit).

``tcgen05.cp``, ``mma`` and ``commit`` run in order in one pipe of each CTA pair. Every CTA has tensor memory of its own (CTAs that share a
multiprocessor, and would wait for each other's columns, are not modelled).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from densemoe.compile.emulator import tcgen05
from densemoe.compile.emulator.asynchronous import AsyncOperation, Copies
from densemoe.compile.emulator.gang import Gang
from densemoe.compile.emulator.memory import PARAMETER_WINDOW, RANK_SHIFT
from densemoe.compile.emulator.spans import Operand, operand_of
from densemoe.compile.emulator.synchronisation import CtaBarrier
from densemoe.compile.emulator.tensor_map import TensorMap
from densemoe.compile.emulator.tensor_memory import (
    COLUMNS,
    AccumulatorLayout,
    CopyShape,
    load_registers,
    split_address,
    store_registers,
    write_rows,
)
from densemoe.compile.emulator.tile import Tile
from densemoe.compile.emulator.warps import LANES, Condition, Groups, Warp
from densemoe.runtime.errors import EmulatorError

__all__ = ["TensorMemoryState", "TensorUnits"]

_WARPGROUP = 4
_LANES = 128  # of tensor memory
_OFFSET = (1 << RANK_SHIFT) - 1
_MAP_BYTES = 128
_MAP_FIELDS = 64  # of these bytes carry fields


class TensorMemoryState:
    """The tensor memory of one CTA.

    Attributes:
        words: uint32 ``[128, 512]``.
        written: bool, cells that hold data.
        owner: for each column the first column of its allocation, or -1.
        last: the newest operation of the pipe.
    """

    def __init__(self) -> None:
        self.words = np.zeros((128, COLUMNS), np.uint32)
        self.written = np.zeros((128, COLUMNS), np.bool_)
        #: checks that passed and pass until an allocation changes: columns, and lanes with columns that were written
        self.allocated: set[tuple[int, int]] = set()
        self.complete: set[tuple[int, int, int, int]] = set()
        self.owner = np.full(COLUMNS, -1, np.int32)
        self.relinquished = False
        self.last: AsyncOperation | None = None
        self.clock: Any = None
        self.group = 0

    def changed(self) -> None:
        """Columns were allocated or freed."""
        self.allocated.clear()
        self.complete.clear()

    def check_columns(self, column: int, count: int, text: str) -> None:
        """Raises where columns are not allocated."""
        if (column, count) in self.allocated:
            return
        if column + count > COLUMNS or (self.owner[column : column + count] < 0).any():
            raise EmulatorError(f"{text}: columns {column} to {column + count - 1} of tensor memory are not allocated")
        self.allocated.add((column, count))

    def check_written(self, lanes: slice, column: int, count: int, text: str) -> None:
        """Raises where a cell was never written."""
        key = (lanes.start, lanes.stop, column, count)
        if key in self.complete:
            return
        part = self.written[lanes, column : column + count]
        if not part.all():
            lane, offset = (int(x) for x in np.argwhere(~part)[0])
            raise EmulatorError(f"{text}: tensor memory at lane {lane + lanes.start}, column {column + offset} is read before it was written")
        self.complete.add(key)

    def write_whole(self, column: int, count: int) -> None:
        """All lanes of columns hold data."""
        key = (0, _LANES, column, count)
        if key not in self.complete:
            self.written[:, column : column + count] = True
            self.complete.add(key)


class TensorUnits(Copies):
    """What `Machine` knows of tensor copies and tensor cores."""

    products: dict[str, int]
    lints: dict[str, None]
    parameters: bytes
    checked_operands: dict[tuple[int, ...], Any]

    # --- tensor copies

    def _tensor_map(self, address: int) -> TensorMap:
        if PARAMETER_WINDOW <= address < 2 * PARAMETER_WINDOW:
            start = address - PARAMETER_WINDOW
            if start + _MAP_BYTES > len(self.parameters):
                raise EmulatorError(f"a tensor map at parameter offset {start} of {len(self.parameters)} bytes")
            data = self.parameters[start : start + _MAP_BYTES]
        else:
            self.memory.find(address, _MAP_BYTES)
            data = self.memory.bytes_at(address, _MAP_FIELDS).tobytes()
        if address % 64:
            raise EmulatorError(f"a tensor map at address {address:#x}: 64-byte alignment needed")
        return TensorMap.decode(data)

    def _tile(self, warp: Warp, address: int, coordinates: list[int]) -> Tile:
        tensor_map = self._tensor_map(address)
        return Tile(tensor_map, [(c ^ 0x80000000) - 0x80000000 for c in coordinates])

    def _tile_memory(self, tile: Tile, write: bool) -> Any:
        """The buffer that holds what a tile touches."""
        low, high = tile.extent
        if tile.empty:
            return None
        start = tile.map.address + low
        buffer = self.memory.find(start, high - low)
        if write and not buffer.writable:
            raise EmulatorError(f"a write to {buffer.name}, which is read-only")
        marks = buffer.once if write else buffer.written
        if marks is not None or (write and buffer.written is not None):
            starts, width = tile.rows()
            starts = starts + (tile.map.address - buffer.address)
            for first in starts.tolist():
                if not write:
                    assert marks is not None
                    part = marks[first : first + width]
                    if not (part == 0xFF).all():
                        raise EmulatorError(f"{buffer.name}[byte {first + int((part != 0xFF).argmax())}] is read before it was written")
                    continue
                if marks is not None:
                    if marks[first : first + width].any():
                        raise EmulatorError(f"{buffer.name}[byte {first}] is written twice")
                    marks[first : first + width] = 1
                if buffer.written is not None:
                    buffer.written[first : first + width] = 0xFF
        return buffer

    def tensor_load(
        self, g: Gang, mask: Any, target: Any, tensor_map: Any, coordinates: tuple[Any, ...], barrier: Any, ctas: Any, group: int
    ) -> None:
        """``cp.async.bulk.tensor`` to shared memory."""
        for warp, _, (to, where, bar, chosen, *at) in self.lanes_of(g, mask, target, tensor_map, barrier, ctas, *coordinates):
            tile = self._tile(warp, where, at)
            nbytes = tile.map.tile_bytes
            slot, offset = self.window_range(warp, to, nbytes, 128)
            bar_slot, bar_offset = self.barrier_place(warp, bar)
            first = warp.cta.slot - warp.cta.rank
            slots = self.destinations(warp, slot, chosen)
            signals = []
            for each in slots:
                rank = each - first
                if group == 2:
                    rank = rank & ~1 | (bar_slot - first) & 1
                elif chosen is None and bar_slot != each:
                    raise EmulatorError("a tensor copy's destination and mbarrier lie in different CTAs (.cta_group::2 allows it in a pair)")
                signals.append((first + rank, bar_offset))

            def action(
                operation: AsyncOperation, tile: Tile = tile, slots: list[int] = slots, signals: list[tuple[int, int]] = signals, offset: int = offset
            ) -> None:
                buffer = self._tile_memory(tile, False)
                if buffer is not None:
                    self.check_waited(buffer, operation.clock, False)
                data = tile.load(buffer.data, buffer.address) if buffer is not None else tile.load(np.zeros(0, np.uint8), tile.map.address)
                size = tile.map.tile_bytes
                for each, place in zip(slots, signals, strict=True):
                    if self.races is not None:
                        self.races.async_shared(operation, each, offset, size, True)
                    tile.scatter(data, self.shared.window(each), offset)
                    self.shared.written_window(each)[offset : offset + size] = 0xFF
                    self.signal_bytes(place, tile.map.transaction_bytes, operation.clock)

            self.moved["tensor global to shared"] += nbytes
            self.submit(self.new_operation(g, warp, action, f"tensor copy of {nbytes} bytes", touches=slots, signals=signals))

    def tensor_store(self, g: Gang, mask: Any, tensor_map: Any, coordinates: tuple[Any, ...], source: Any, reduction: str) -> None:
        """``cp.async.bulk.tensor`` and ``cp.reduce.async.bulk.tensor`` from shared to global memory.

        All lanes of a warp with the same operands count once, as on the devices.
        """
        lanes = self.lanes_of(g, mask, tensor_map, source, *coordinates)
        active: dict[Any, list[Any]] = {}
        for warp, _, values in lanes:
            active.setdefault(warp, []).append(values)
        issued = self.issued_by
        whole = {warp for warp, given in active.items() if len(given) == np.count_nonzero(warp.threads) and all(each == given[0] for each in given)}
        seen: set[Any] = set()
        for warp, lane, (where, of, *at) in lanes:
            if warp in seen:
                continue
            self.issued_by = None if warp in whole else issued
            if warp in whole:
                seen.add(warp)
            tile = self._tile(warp, where, at)
            nbytes = tile.map.tile_bytes
            slot, offset = self.window_range(warp, of, nbytes, 128)

            def action(operation: AsyncOperation, tile: Tile = tile, slot: int = slot, offset: int = offset) -> None:
                size = tile.map.tile_bytes
                self.shared.check_range(slot, offset, offset + size)
                if self.races is not None:
                    self.races.async_shared(operation, slot, offset, size, False)
                data = tile.gather(self.shared.window(slot), offset)
                buffer = self._tile_memory(tile, not reduction)
                if buffer is None:
                    return
                self.check_waited(buffer, operation.clock, True)
                if reduction:
                    tile.reduce(buffer.data, buffer.address, data, reduction)
                else:
                    tile.store(buffer.data, buffer.address, data)

            self.moved["tensor shared to global"] += nbytes
            operation = self.new_operation(g, warp, action, f"tensor store of {nbytes} bytes", touches=(slot,))
            warp.bulk.setdefault(lane, Groups()).open.append(operation)
            self.submit(operation)

    def tensor_prefetch(self, g: Gang, mask: Any, tensor_map: Any, coordinates: tuple[Any, ...]) -> None:
        """``cp.async.bulk.prefetch.tensor``: checked."""
        for warp, _, (where, *at) in self.lanes_of(g, mask, tensor_map, *coordinates):
            self._tile(warp, where, at)

    # --- tensor memory

    def _state(self, cta: Any) -> TensorMemoryState:
        if cta.tensor_memory is None:
            cta.tensor_memory = TensorMemoryState()
        state: TensorMemoryState = cta.tensor_memory
        return state

    def _pair(self, cta: Any, group: int) -> list[Any]:
        """The CTA, or both of its pair, even rank first."""
        if group == 1:
            return [cta]
        if self.cluster_size % 2:
            raise EmulatorError("cta_group::2 in a cluster without CTA pairs")
        even = cta.rank & ~1
        return [cta.cluster.ctas[even], cta.cluster.ctas[even + 1]]

    def _rendezvous(self, g: Gang, mask: Any, group: int, what: str) -> bool:
        """Waits until a warp of each CTA of a pair is here."""

        def conditions() -> list[Condition | None]:
            found: list[Condition | None] = [None] * len(g.warps)
            for w in g.active_warps(mask):
                cta = g.warps[w].cta
                if group == 2:
                    leader = self._pair(cta, 2)[0]
                    barrier = leader.pair_barriers.setdefault(what, CtaBarrier(f"{what}.cta_group::2 of CTA pair {leader.ctaid}"))
                    if self.races is not None:
                        self.races.barrier_arrive(barrier, g.warps[w], True)
                    found[w] = barrier.arrive(LANES, 2 * LANES)
            return found

        return g.await_all(conditions)

    def tmem_alloc(self, g: Gang, mask: Any, address: Any, columns: Any, group: int) -> bool:
        """``tcgen05.alloc``."""
        if not self._rendezvous(g, mask, group, "tcgen05.alloc"):
            return False
        for w in g.active_warps(mask):
            warp = g.warps[w]
            count = columns if isinstance(columns, int) else int(columns[w * LANES])
            where = address if isinstance(address, int) else int(address[w * LANES])
            if count not in (32, 64, 128, 256, 512):
                raise EmulatorError(f"tcgen05.alloc of {count} columns: 32, 64, 128, 256 or 512")
            state = self._state(warp.cta)
            if state.relinquished:
                raise EmulatorError("tcgen05.alloc after tcgen05.relinquish_alloc_permit")
            if state.group not in (0, group):
                raise EmulatorError("cta_group::1 and cta_group::2 mixed in one kernel")
            state.group = group
            free = state.owner.reshape(-1, count) < 0
            fits = np.flatnonzero(free.all(axis=1))
            if not fits.size:
                raise EmulatorError(f"tcgen05.alloc of {count} columns waits for ever: {int((state.owner < 0).sum())} are free")
            start = int(fits[0]) * count
            state.owner[start : start + count] = start
            state.written[:, start : start + count] = False
            state.changed()
            slot, offset = self.window_range(warp, where, 4, 4)
            at = slot * self.shared.stride + offset
            self.shared.data[at : at + 4] = np.frombuffer(start.to_bytes(4, "little"), np.uint8)
            self.shared.written[at : at + 4] = 0xFF
            if self.races is not None:
                self.races.plain_shared(warp, at, 4)
        return True

    def tmem_dealloc(self, g: Gang, mask: Any, address: Any, columns: Any, group: int) -> bool:
        """``tcgen05.dealloc``."""
        if not self._rendezvous(g, mask, group, "tcgen05.dealloc"):
            return False
        for w in g.active_warps(mask):
            count = columns if isinstance(columns, int) else int(columns[w * LANES])
            where = address if isinstance(address, int) else int(address[w * LANES])
            state = self._state(g.warps[w].cta)
            _, column = split_address(where)
            owned = state.owner == column
            if int(owned.sum()) != count:
                raise EmulatorError(f"tcgen05.dealloc of {count} columns at {column}: allocated are {int(owned.sum())}")
            state.owner[owned] = -1
            state.changed()
        return True

    def tmem_relinquish(self, g: Gang, mask: Any) -> None:
        """``tcgen05.relinquish_alloc_permit``."""
        for w in g.active_warps(mask):
            self._state(g.warps[w].cta).relinquished = True

    def _warp_value(self, g: Gang, w: int, value: Any, mask: Any, text: str) -> int:
        if isinstance(value, int):
            return value
        lanes = value[w * LANES : w * LANES + LANES]
        if (lanes != lanes[0]).any():
            raise EmulatorError(f"{text}: the address differs between lanes of a warp")
        return int(lanes[0])

    def _whole_warps(self, g: Gang, mask: Any, text: str) -> list[int]:
        warps = g.active_warps(mask)
        if mask is not None and not mask.reshape(-1, LANES)[warps].all():
            raise EmulatorError(f"{text} (.sync.aligned) with inactive lanes")
        return warps

    def tmem_load(self, g: Gang, mask: Any, address: Any, shape: str, count: int, packed: bool, split: int, registers: int) -> Any:
        """``tcgen05.ld``: registers ``[registers, lanes]``."""
        result = np.zeros((registers, g.lanes), np.uint32)
        for w in self._whole_warps(g, mask, "tcgen05.ld"):
            warp = g.warps[w]
            state = self._state(warp.cta)
            where = self._warp_value(g, w, address, mask, "tcgen05.ld")
            column = where & 0xFFFF
            width = registers * (2 if packed else 1) if shape == "32x32b" else _columns(shape, count, packed, split)
            state.check_columns(column, width, "tcgen05.ld")
            first = LANES * (warp.index % _WARPGROUP)
            words = load_registers(state.words, where, shape, count, warp.index, packed, split)
            rows = slice(first, first + LANES) if shape == "32x32b" else slice(where >> 16, (where >> 16) + 16)
            if shape != "16x32bx2":
                state.check_written(rows, column, width, "tcgen05.ld")
            if self.races is not None:
                self.races.tensor_access(warp, warp.cta, rows, column, width, False)
            result[:, w * LANES : (w + 1) * LANES] = words
            self.moved["tensor memory loads"] += 4 * words.size
        return result

    def tmem_store(
        self, g: Gang, mask: Any, address: Any, shape: str, count: int, packed: bool, split: int, values: tuple[Any, ...]
    ) -> None:
        """``tcgen05.st``."""
        words = np.stack([np.full(g.lanes, v, np.uint32) if isinstance(v, int) else v for v in values])
        for w in self._whole_warps(g, mask, "tcgen05.st"):
            warp = g.warps[w]
            state = self._state(warp.cta)
            where = self._warp_value(g, w, address, mask, "tcgen05.st")
            column = where & 0xFFFF
            width = _columns(shape, count, packed, split)
            state.check_columns(column, width, "tcgen05.st")
            own = np.ascontiguousarray(words[:, w * LANES : (w + 1) * LANES])
            store_registers(state.words, where, shape, count, warp.index, own, packed, split)
            first = LANES * (warp.index % _WARPGROUP)
            rows = slice(first, first + LANES) if shape == "32x32b" else slice(where >> 16, (where >> 16) + 16)
            state.written[rows, column : column + width] = True
            if self.races is not None:
                self.races.tensor_access(warp, warp.cta, rows, column, width, True)
            self.moved["tensor memory stores"] += 4 * own.size

    # --- the pipe

    def _to_pipe(self, g: Gang, warp: Warp, ctas: list[Any], action: Any, text: str) -> None:
        state = self._state(ctas[0])
        before = state.last if state.last is not None and not state.last.done else None
        slots = (ctas[0].slot,) if len(ctas) == 1 else (ctas[0].slot, ctas[1].slot)
        operation = self.new_operation(g, warp, action, text, before, slots)
        if self.races is not None:
            self.races.in_pipe(operation, state)
        state.last = operation
        self.submit(operation)

    def check_operand(self, slot: int, bits: int, rows: int, k_bytes: int, element_bytes: int, operation: AsyncOperation) -> Operand:
        """Where an operand lies; raises where its bytes were never written, or are raced for."""
        key = (slot, bits, rows, k_bytes, element_bytes)
        operand = self.checked_operands.get(key)
        if operand is None:  # bytes stay written, so an operand is looked at once
            operand = operand_of(self.shared.stride, *key)
            self.check_granules(slot, operand.own)
            self.checked_operands[key] = operand
        if self.races is not None:
            self.races.async_operand(operation, operand)
        return operand

    def check_granules(self, slot: int, flat: Any) -> None:
        """Raises where 16-byte granules of a window were never written."""
        written = self.shared.written_window(slot).view(np.complex128)
        highest = int(flat.max())
        if highest >= written.size:
            raise EmulatorError(f"a matrix descriptor reaches shared address {16 * highest:#x}, outside of shared memory")
        found = written.take(flat)
        if found.tobytes() != b"\xff" * (16 * flat.size):
            bad = int(flat[(found.view(np.uint8).reshape(-1, 16) != 0xFF).any(axis=1)][0]) * 16
            raise EmulatorError(f"shared memory at {bad:#x} is read before it was written")

    def tmem_copy(self, g: Gang, mask: Any, address: Any, descriptor: Any, shape: CopyShape, group: int) -> None:
        """``tcgen05.cp``."""
        for warp, _, (where, bits) in self.lanes_of(g, mask, address, descriptor):
            ctas = self._pair(warp.cta, group)

            def action(operation: AsyncOperation, ctas: list[Any] = ctas, where: int = where, bits: int = bits) -> None:
                lane, column = split_address(where)
                width = shape.row_bytes // 4
                for cta in ctas:
                    state = self._state(cta)
                    state.check_columns(column, width, "tcgen05.cp")
                    operand = self.check_operand(cta.slot, bits, shape.rows, shape.row_bytes, 0, operation)
                    write_rows(state.words, where, self.shared.granules.take(operand.index).view(np.uint32), shape)
                    if shape.row_of_lane is not None:
                        state.write_whole(column, width)
                    else:
                        state.written[shape.lanes[:, 0] + lane, column : column + width] = True
                    if self.races is not None:
                        self.races.tensor_async(operation, cta, column, width, True)

            self.moved["shared to tensor memory"] += shape.rows * shape.row_bytes * len(ctas)
            self._to_pipe(g, warp, ctas, action, "tcgen05.cp")

    def tmem_mma(
        self,
        g: Gang,
        mask: Any,
        group: int,
        kind: str,
        stationary: bool,
        d: Any,
        a: Any,
        a_in_tmem: bool,
        b: Any,
        idesc: Any,
        enable: Any,
        scales: tuple[Any, Any, str] | None,
        disabled: tuple[Any, ...],
        scale_input_d: int,
    ) -> None:
        """``tcgen05.mma``."""
        scale_a, scale_b, vector = scales or (0, 0, "")
        lanes_off = None
        for warp, lane, (to, left, right, code, sa, sb, *off) in self.lanes_of(g, mask, d, a, b, idesc, scale_a, scale_b, *disabled):
            where = g.warps.index(warp) * LANES + lane
            add = enable if isinstance(enable, bool) else bool(enable[where])
            descriptor = tcgen05.decode_instruction(code, kind, group, stationary)
            if off:
                words = np.array(off, np.uint32)
                lanes_off = (words[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.bool_).reshape(-1) if words.any() else None
            ctas = self._pair(warp.cta, group)
            if group == 2 and warp.cta is not ctas[0]:
                self.lints["tcgen05.mma.cta_group::2 issued by the odd CTA of a pair"] = None
            job = _Product(to, left, a_in_tmem, right, descriptor, add, scales is not None, sa, sb, vector, lanes_off, scale_input_d)

            def action(operation: AsyncOperation, job: _Product = job, ctas: list[Any] = ctas) -> None:
                self._multiply(operation, job, ctas)

            self.products[f"tcgen05.mma.{kind}"] = self.products.get(f"tcgen05.mma.{kind}", 0) + 1
            self._to_pipe(g, warp, ctas, action, f"tcgen05.mma.kind::{kind}")

    def _operand(self, operation: AsyncOperation, cta: Any, job: _Product, name: str) -> Any:
        descriptor = job.descriptor
        bits, rows, form = (job.a, descriptor.a_rows, descriptor.a_format) if name == "a" else (job.b, descriptor.b_rows, descriptor.b_format)
        transposed = descriptor.transpose_a if name == "a" else descriptor.transpose_b
        element = tcgen05.element_bytes(form) if transposed else 0
        operand = self.check_operand(cta.slot, bits, rows, 32, element, operation)
        if not element:
            return self.shared.granules.take(operand.index).view(np.uint8)
        return tcgen05.operand_bytes(self.shared.window(cta.slot), bits, descriptor, name)

    def _scales(self, operation: AsyncOperation, cta: Any, job: _Product) -> tuple[Any, Any]:
        """Scale factors of A and B in a CTA's tensor memory, uint8 ``[rows, length]``."""
        descriptor, state = job.descriptor, self._state(cta)
        length = tcgen05.scale_vector_length(descriptor, job.vector)
        for address, rows, name in ((job.scale_a, 128, "scale A"), (job.scale_b, descriptor.n, "scale B")):
            first, columns = address & 0xFFFF, -(-rows // 32)
            state.check_columns(first, columns, f"tcgen05.mma ({name})")
            state.check_written(slice(0, 128), first, columns, f"tcgen05.mma ({name})")
            if self.races is not None:
                self.races.tensor_async(operation, cta, first, columns, False)
        return (
            tcgen05.read_scales(state.words, job.scale_a, descriptor.a_rows, length, descriptor.a_scale_id),
            tcgen05.read_scales(state.words, job.scale_b, descriptor.n, length, descriptor.b_scale_id),
        )

    def _rows_of_a(self, operation: AsyncOperation, cta: Any, job: _Product) -> Any:
        if not job.a_in_tmem:
            return self._operand(operation, cta, job, "a")
        state, (_, column) = self._state(cta), split_address(job.a)
        state.check_columns(column, 8, "tcgen05.mma (A)")
        data = tcgen05.operand_in_tensor_memory(state.words, job.a, job.descriptor)
        state.check_written(slice(0, 128), column, 8, "tcgen05.mma (A)")
        return data

    def _multiply(self, operation: AsyncOperation, job: _Product, ctas: list[Any]) -> None:
        descriptor = job.descriptor
        kind = descriptor.kind
        scales = [self._scales(operation, cta, job) for cta in ctas] if job.scaled else []
        exact = bool(scales) and all(tcgen05.exact_in_float32(*each, descriptor) for each in scales)
        dtype: Any = np.float32 if exact else np.float64
        b = tcgen05.decode_operand(_joined([self._operand(operation, cta, job, "b") for cta in ctas]), descriptor.b_format, kind, dtype)
        a = tcgen05.decode_operand(_joined([self._rows_of_a(operation, cta, job) for cta in ctas]), descriptor.a_format, kind, dtype)
        own_b, scaled_by = b, b""
        if scales:
            a = tcgen05.scale_operand(a, _joined([each for each, _ in scales]), descriptor.scale_format)
        _, column = split_address(job.d)
        width, rows = descriptor.layout.columns(descriptor.n), len(a) // len(ctas)
        for number, cta in enumerate(ctas):
            state = self._state(cta)
            disabled = None if job.disabled is None else job.disabled[_LANES * number : _LANES * (number + 1)]
            state.check_columns(column, width, "tcgen05.mma (D)")
            if scales and scaled_by != (by := scales[number][1].tobytes()):  # the CTAs of a pair have the same
                own_b, scaled_by = tcgen05.scale_operand(b, scales[number][1], descriptor.scale_format), by
            own_a = a[rows * number : rows * (number + 1)]
            lanes = _lanes_of(descriptor.layout)
            whole = lanes.size == _LANES
            if job.add and whole:
                state.check_written(slice(0, _LANES), column, width, "tcgen05.mma (D, which it adds to)")
            elif job.add and not state.written[lanes, column : column + width].all():
                raise EmulatorError("tcgen05.mma adds to tensor memory that was never written")
            if self.races is not None:
                self.races.tensor_async(operation, cta, column, width, True)
            tcgen05.accumulate(state.words, job.d, descriptor, own_a, own_b, job.add, job.scale_input_d, disabled)
            if whole and disabled is None:
                state.write_whole(column, width)
            elif disabled is None:
                state.written[lanes, column : column + width] = True
            else:
                state.written[lanes[~disabled[lanes]], column : column + width] = True

    def tmem_commit(self, g: Gang, mask: Any, group: int, barrier: Any, ctas: Any) -> None:
        """``tcgen05.commit``: an arrival when everything before it in the pipe is done.

        The arrival is no part of the pipe: those of different commits come in any order.
        """
        for warp, _, (where, chosen) in self.lanes_of(g, mask, barrier, ctas):
            slot, offset = self.barrier_place(warp, where)
            slots = self.destinations(warp, slot, chosen)

            def action(operation: AsyncOperation, slots: list[int] = slots, offset: int = offset) -> None:
                def arrive(arrival: AsyncOperation) -> None:
                    self.signal_arrival(arrival.signals[0], 1, operation.clock)

                for each in slots:
                    self.submit(AsyncOperation(arrive, "arrival", operation, operation.line, signals=((each, offset),)))

            self._to_pipe(g, warp, self._pair(warp.cta, group), action, "tcgen05.commit")

    def tmem_order(self, g: Gang, mask: Any, what: str) -> None:
        """``tcgen05.wait`` and ``tcgen05.fence``: for race detection."""
        if self.races is not None:
            for w in g.active_warps(mask):
                self.races.tensor_order(g.warps[w], what)


class _Product(NamedTuple):
    """Operands of one ``tcgen05.mma``."""

    d: int
    a: int
    a_in_tmem: bool
    b: int
    descriptor: tcgen05.InstructionDescriptor
    add: bool
    scaled: bool
    scale_a: int
    scale_b: int
    vector: str
    disabled: Any
    scale_input_d: int


def _joined(pieces: list[Any]) -> Any:
    """Rows of all CTAs."""
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@lru_cache(maxsize=64)
def _lanes_of(layout: AccumulatorLayout) -> Any:
    """Tensor memory lanes that a layout's D takes."""
    lanes = np.array(layout.lanes)
    return np.concatenate([lanes + part * layout.part_lanes for part in range(layout.parts)])


def _columns(shape: str, count: int, packed: bool, split: int) -> int:
    """Columns that a shape of ld or st touches."""
    per = {"32x32b": 1, "16x64b": 2, "16x128b": 4, "16x256b": 8, "16x32bx2": 1}[shape]
    return per * count * (2 if packed else 1) + (split if shape == "16x32bx2" else 0)
