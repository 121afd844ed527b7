"""Memories of an emulated launch: global buffers with red zones, and the shared windows of the resident CTAs.

Sources: PTX ISA 9.x, 5.1 (state spaces), 5.1.7 and 9.7.9.26 ``mapa`` (shared::cluster: CTA rank in bits 24 and above), 9.7.9 (``ld``, ``st``,
alignment). Every access must lie in one buffer, be aligned to its size and, for loads, read bytes that were written before.

Addresses are ints or arrays of one address a lane; with a mask only its lanes access. Values are unsigned integers of 1, 2, 4 or 8 bytes.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.masks import every
from densemoe.runtime.errors import EmulatorError

__all__ = ["LOCAL_WINDOW", "PARAMETER_WINDOW", "SHARED_WINDOW", "Buffer", "GlobalMemory", "SharedMemory"]

SHARED_WINDOW: Final = 1 << 56  # generic addresses of shared memory, of parameters and of local memory; no buffer lies there
PARAMETER_WINDOW: Final = 1 << 57
LOCAL_WINDOW: Final = 1 << 58
RANK_SHIFT: Final = 24
_FIRST_ADDRESS: Final = 0x7_0000_0000  # beyond 32 bits, so that a truncated pointer is noticed
_RED_ZONE: Final = 4096
_ALIGNMENT: Final = 256
_UNSIGNED: Final[dict[int, Any]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WRITTEN: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF}

Array = NDArray[Any]


@dataclass(eq=False)
class Buffer:
    """A global buffer.

    Attributes:
        name: for messages.
        address: of its first byte.
        data: uint8, a view of the caller's array.
        written: 0xFF for each byte that holds data, or None where all do from the start.
        once: for each byte whether a kernel wrote it, where it may be written only once a launch; else None.
        writable: kernels may write it.
        early: no launch that may still run writes it, so it may be read before ``griddepcontrol.wait``.
    """

    name: str
    address: int
    data: Array
    written: Array | None = None
    once: Array | None = None
    writable: bool = True
    early: bool = False
    views: dict[tuple[int, int], Array] = field(default_factory=dict)

    def view(self, size: int, count: int) -> Array:
        """The bytes as ``[n, count]`` elements of `size` bytes (``[n]`` for one)."""
        found = self.views.get((size, count))
        if found is None:
            found = self.views[size, count] = _elements(self.data, size, count)
        return found


def _elements(data: Array, size: int, count: int) -> Array:
    whole = data.size // (size * count) * (size * count)
    elements = data[:whole].view(_UNSIGNED[size])
    return elements.reshape(-1, count) if count > 1 else elements


class GlobalMemory:
    """Named numpy arrays at global addresses. What lies between them is red: any access there is an error."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._starts: list[int] = []
        self._by_name: dict[str, Buffer] = {}
        self._next = _FIRST_ADDRESS
        self._last: Buffer | None = None

    def add(
        self,
        name: str,
        array: Array,
        *,
        address: int | None = None,
        written: bool = True,
        once: bool = False,
        writable: bool = True,
        early: bool = False,
    ) -> int:
        """Adds a buffer and returns its address.

        Args:
            name: unique.
            array: C-contiguous; the kernel reads and writes it in place.
            address: a multiple of 16; by default the next free one, after a red zone.
            written: False where its content is undefined: reading a byte before it was written is an error.
            once: writing a byte twice in a launch is an error.
            writable: False makes any write an error.
            early: it may be read before ``griddepcontrol.wait`` in a programmatic launch.

        Raises:
            EmulatorError: not contiguous, an address that is taken or misaligned, or a name that is.
        """
        if not array.flags.c_contiguous:
            raise EmulatorError(f"buffer {name!r} is not C-contiguous")
        data = array.reshape(-1).view(np.uint8)
        if address is None:
            address = self._next
        if address % 16 or address <= 0:
            raise EmulatorError(f"buffer {name!r} at {address:#x}: a positive multiple of 16 needed")
        if name in self._by_name:
            raise EmulatorError(f"buffer {name!r} exists already")
        place = bisect.bisect_right(self._starts, address)
        before = self.buffers[place - 1] if place else None
        after = self.buffers[place] if place < len(self.buffers) else None
        if (before and before.address + before.data.size > address) or (after and address + data.size > after.address):
            raise EmulatorError(f"buffer {name!r} at {address:#x} overlaps another one")
        buffer = Buffer(
            name,
            address,
            data,
            None if written else np.zeros(data.size, np.uint8),
            np.zeros(data.size, np.uint8) if once else None,
            writable,
            early,
        )
        self.buffers.insert(place, buffer)
        self._starts.insert(place, address)
        self._by_name[name] = buffer
        end = max(self._next, address + data.size)
        self._next = -(-(end + _RED_ZONE) // _ALIGNMENT) * _ALIGNMENT
        return address

    def remove(self, name: str) -> None:
        """Takes a buffer away: any access to it is an error from here on."""
        place = self.buffers.index(self._by_name.pop(name))
        del self.buffers[place], self._starts[place]
        self._last = None

    def __getitem__(self, name: str) -> Buffer:
        return self._by_name[name]

    def address(self, name: str) -> int:
        """Address of a buffer."""
        return self._by_name[name].address

    def begin_launch(self) -> None:
        """Forgets which bytes the launch before wrote."""
        for buffer in self.buffers:
            if buffer.once is not None:
                buffer.once[:] = 0

    def describe(self, address: int) -> str:
        """Where an address lies, for messages."""
        place = bisect.bisect_right(self._starts, address) - 1
        if place >= 0 and address < self.buffers[place].address + self.buffers[place].data.size:
            buffer = self.buffers[place]
            return f"{buffer.name}[byte {address - buffer.address} of {buffer.data.size}]"
        near = []
        if place >= 0:
            buffer = self.buffers[place]
            near.append(f"{address - buffer.address - buffer.data.size} bytes behind {buffer.name} ({buffer.data.size} bytes)")
        if place + 1 < len(self.buffers):
            buffer = self.buffers[place + 1]
            near.append(f"{buffer.address - address} bytes before {buffer.name}")
        return f"in no buffer: {' and '.join(near) or 'there are none'}"

    def find(self, address: int, size: int) -> Buffer:
        """The buffer that holds ``[address, address + size)``.

        Raises:
            EmulatorError: there is none.
        """
        last = self._last
        if last is not None and last.address <= address and address + size <= last.address + last.data.size:
            return last
        place = bisect.bisect_right(self._starts, address) - 1
        if place >= 0:
            buffer = self.buffers[place]
            if address + size <= buffer.address + buffer.data.size:
                self._last = buffer
                return buffer
        raise EmulatorError(f"{size} bytes at global address {address:#x} are out of bounds, {self.describe(address)}")

    def parts(self, addresses: Array, size: int) -> list[tuple[Buffer, Array | None, Array]]:
        """Buffers of an array of addresses: (buffer, positions in the array or None for all, offsets)."""
        last = self._last
        if last is not None and last.data.size >= size:
            offsets = addresses - np.uint64(last.address)
            if int(offsets.max()) <= last.data.size - size:
                return [(last, None, offsets)]
        parts = []
        left = np.arange(addresses.size)
        while left.size:
            buffer = self.find(int(addresses[left[0]]), size)
            offsets = addresses[left] - np.uint64(buffer.address)
            inside = offsets <= np.uint64(buffer.data.size - size)
            parts.append((buffer, left[inside], offsets[inside]))
            left = left[~inside]
        if len(parts) == 1:
            return [(parts[0][0], None, parts[0][2])]
        return parts

    def load(self, addresses: Array, size: int, count: int) -> Array:
        """Elements ``[addresses, count]`` (``[addresses]`` for one) of `size` bytes.

        Raises:
            EmulatorError: out of bounds, misaligned, or bytes that were never written.
        """
        nbytes = size * count
        parts = self.parts(addresses, nbytes)
        result = None
        for buffer, where, offsets in parts:
            index = self._index(buffer, offsets, nbytes)
            if buffer.written is not None:
                self._check_written(buffer, offsets, index, size, count)
            picked = buffer.view(size, count).take(index, axis=0)
            if where is None:
                return picked
            if result is None:
                result = np.empty((addresses.size, count) if count > 1 else addresses.size, _UNSIGNED[size])
            result[where] = picked
        assert result is not None
        return result

    def _index(self, buffer: Buffer, offsets: Array, nbytes: int) -> Array:
        if nbytes > 1:
            wrong = offsets & np.uint64(nbytes - 1)
            if wrong.any():
                bad = int(offsets[wrong != 0][0])
                raise EmulatorError(f"{nbytes}-byte access at {buffer.name}[byte {bad}] is misaligned")
            return (offsets // np.uint64(nbytes)).astype(np.intp)
        return offsets.astype(np.intp)

    def _check_written(self, buffer: Buffer, offsets: Array, index: Array, size: int, count: int) -> None:
        assert buffer.written is not None
        good = _elements(buffer.written, size, count)[index] == _UNSIGNED[size](_WRITTEN[size])
        if not every(good):
            bad = ~(good.all(axis=1) if count > 1 else good)
            raise EmulatorError(f"{buffer.name}[byte {int(offsets[bad][0])}] is read before it was written")

    def store(self, addresses: Array, size: int, values: Array) -> None:
        """Writes elements ``[addresses, count]`` or ``[addresses]``; of several lanes at one address the last wins."""
        count = values.shape[1] if values.ndim > 1 else 1
        nbytes = size * count
        for buffer, where, offsets in self.parts(addresses, nbytes):
            index = self._index(buffer, offsets, nbytes)
            self._mark(buffer, index, nbytes)
            buffer.view(size, count)[index] = values if where is None else values[where]

    def discard(self, addresses: Array, nbytes: int) -> None:
        """Leaves `nbytes` bytes at each address undefined: reading them before they are written again is an error.

        Raises:
            EmulatorError: out of bounds, misaligned, or read-only.
        """
        for buffer, _, offsets in self.parts(addresses, nbytes):
            index = self._index(buffer, offsets, nbytes)
            if not buffer.writable:
                raise EmulatorError(f"a discard of {buffer.name}, which is read-only")
            if buffer.written is None:
                buffer.written = np.full(buffer.data.size, 0xFF, np.uint8)
            buffer.written[: buffer.written.size // nbytes * nbytes].reshape(-1, nbytes)[index] = 0

    def _mark(self, buffer: Buffer, index: Array, nbytes: int) -> None:
        if not buffer.writable:
            raise EmulatorError(f"a write to {buffer.name}, which is read-only")
        if buffer.once is not None:
            rows = buffer.once[: buffer.once.size // nbytes * nbytes].reshape(-1, nbytes)
            if rows[index].any() or np.unique(index).size != index.size:
                first = int(index[rows[index].any(axis=1)][0]) if rows[index].any() else int(index[0])
                raise EmulatorError(f"{buffer.name}[byte {first * nbytes}] is written twice")
            rows[index] = 1
        if buffer.written is not None:
            buffer.written[: buffer.written.size // nbytes * nbytes].reshape(-1, nbytes)[index] = 0xFF

    def bytes_at(self, address: int, size: int, write: bool = False) -> Array:
        """A run of bytes as a view: for bulk copies.

        Raises:
            EmulatorError: as `load` and `store`.
        """
        if size == 0:
            return np.zeros(0, np.uint8)
        buffer = self.find(address, size)
        start = address - buffer.address
        if write:
            if not buffer.writable:
                raise EmulatorError(f"a write to {buffer.name}, which is read-only")
            if buffer.once is not None:
                if buffer.once[start : start + size].any():
                    raise EmulatorError(f"{buffer.name}[byte {start + int(buffer.once[start : start + size].argmax())}] is written twice")
                buffer.once[start : start + size] = 1
            if buffer.written is not None:
                buffer.written[start : start + size] = 0xFF
        elif buffer.written is not None and not (buffer.written[start : start + size] == 0xFF).all():
            bad = int((buffer.written[start : start + size] != 0xFF).argmax())
            raise EmulatorError(f"{buffer.name}[byte {start + bad}] is read before it was written")
        return buffer.data[start : start + size]


class SharedMemory:
    """The shared windows of all resident CTAs in one array, a window of `stride` bytes a CTA (index = shared address).

    Attributes:
        data, written: uint8 ``[ctas · stride]``; `written` is 0xFF for bytes that hold data.
    """

    def __init__(self, ctas: int, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.stride = -(-end // 1024) * 1024
        self.ctas = ctas
        self.data = np.zeros(ctas * self.stride, np.uint8)
        self.written = np.zeros(ctas * self.stride, np.uint8)
        #: the data in pieces of 16 bytes
        self.granules = self.data.view(np.complex128)
        self._views: dict[tuple[int, int, bool], Array] = {}

    def window(self, slot: int) -> Array:
        """The window of one CTA."""
        return self.data[slot * self.stride : (slot + 1) * self.stride]

    def written_window(self, slot: int) -> Array:
        """Which bytes of a window hold data."""
        return self.written[slot * self.stride : (slot + 1) * self.stride]

    def clear(self, slot: int) -> None:
        """A new CTA: nothing is written."""
        self.written_window(slot)[:] = 0

    def view(self, size: int, count: int, written: bool = False) -> Array:
        """All windows as elements."""
        key = (size, count, written)
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = _elements(self.written if written else self.data, size, count)
        return found

    def index(self, offsets: Any, slots: Any, nbytes: int) -> Any:
        """Element numbers of accesses of `nbytes` bytes at window offsets, in the windows `slots` (ints or arrays).

        Raises:
            EmulatorError: outside of the CTA's shared memory, or misaligned.
        """
        if isinstance(offsets, int):
            if not self.start <= offsets <= self.end - nbytes:
                raise EmulatorError(self._outside(offsets, nbytes))
            if offsets % nbytes:
                raise EmulatorError(f"{nbytes}-byte access at shared address {offsets:#x} is misaligned")
            return (offsets + slots * self.stride) // nbytes
        wide = offsets.astype(np.int64)
        relative = (wide - self.start).view(np.uint64)
        if int(relative.max()) > self.end - nbytes - self.start:
            bad = relative > np.uint64(max(self.end - nbytes - self.start, 0))
            raise EmulatorError(self._outside(int(wide[bad][0]), nbytes))
        if nbytes > 1:
            low = wide & (nbytes - 1)
            if low.any():
                raise EmulatorError(f"{nbytes}-byte access at shared address {int(wide[low != 0][0]):#x} is misaligned")
        if isinstance(slots, int):
            return (wide + slots * self.stride) // nbytes if slots or nbytes > 1 else wide
        return (wide + slots * self.stride) // nbytes

    def _outside(self, offset: int, nbytes: int) -> str:
        return (
            f"{nbytes} bytes at shared address {offset:#x} are out of bounds: the CTA has {self.end - self.start} bytes "
            f"from {self.start:#x} to {self.end:#x}"
        )

    def check(self, index: Any, size: int, count: int) -> None:
        """Raises where an element was never written."""
        good = self.view(size, count, True)[index] == _UNSIGNED[size](_WRITTEN[size])
        if isinstance(good, np.bool_):
            ok = bool(good)
        else:
            ok = every(good)
        if not ok:
            flat = np.atleast_1d(index)
            good = self.view(size, count, True)[flat] == _UNSIGNED[size](_WRITTEN[size])
            bad = ~(good.reshape(flat.size, -1).all(axis=1))
            offset = int(flat[bad][0]) * size * count % self.stride
            raise EmulatorError(f"shared memory at {offset:#x} is read before it was written")

    def check_range(self, slot: int, start: int, end: int) -> None:
        """Raises where a byte of ``[start, end)`` was never written."""
        part = self.written[slot * self.stride + start : slot * self.stride + end]
        if part.size and part.min() != 0xFF:
            raise EmulatorError(f"shared memory at {start + int((part != 0xFF).argmax()):#x} is read before it was written")
