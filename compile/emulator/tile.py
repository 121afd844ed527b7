"""Tiles of tensor maps: the copies and reductions of ``cp.async.bulk.tensor`` and ``cp.reduce.async.bulk.tensor``.

Sources: PTX ISA 9.x, 5.5.3–5.5.7 (tiled mode, bounding box, out-of-bound access, swizzling), 9.7.9.27 (bulk tensor copies and reductions).

A load is `Tile.load_shared`, or `Tile.load` once and `Tile.scatter` per destination CTA (multicast). A store is ``tile.store(memory,
origin, tile.gather(shared, address))``, a reduction the same with `Tile.reduce`. `Tile.rows` and `TensorMap.shared_granules` name the
bytes touched, for checkers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.formats import FORMATS, decode, encode
from densemoe.compile.emulator.tensor_map import GRANULE, KINDS, UNPACKED, DataType, Interleave, OobFill, TensorMap
from densemoe.runtime.errors import EmulatorError

__all__ = ["Tile", "reduce_elements"]

Bytes = NDArray[np.uint8]


class Tile:
    """One tile of a tensor map: what a bulk tensor copy, store, reduction or prefetch touches.

    Attributes:
        map: the tensor map.
        coordinates: of the box's first element.
        inside: per shared-memory dimension (outermost first, the innermost in bytes) the half-open range of the tile that lies in the
            tensor.
        offset: byte offset from ``map.address`` of the first element inside.
        strides: bytes between neighbours in global memory, outermost dimension first, the innermost 1.
        empty: True where no element lies in the tensor.
    """

    __slots__ = ("_kind", "coordinates", "empty", "inside", "map", "offset", "strides")

    def __init__(self, tensor_map: TensorMap, coordinates: Sequence[int]) -> None:
        """The box at `coordinates` (elements, innermost first, may be negative or beyond the tensor).

        Raises:
            EmulatorError: a wrong number of coordinates, a map with interleave, or a packed tile that starts inside a byte or a group of
                16.
        """
        if len(coordinates) != tensor_map.rank:
            raise EmulatorError(f"{len(coordinates)} coordinates for a tensor map of rank {tensor_map.rank}")
        if tensor_map.interleave is not Interleave.NONE:
            raise EmulatorError("copies with an interleaved tensor map are not modelled: use interleave none")
        granule = 16 if tensor_map.dtype in UNPACKED else max(8 // tensor_map.bits, 1)
        if coordinates[0] % granule:
            raise EmulatorError(f"coordinate {coordinates[0]} of dimension 0 must be a multiple of {granule} for {tensor_map.dtype.name}")
        self.map, self.coordinates = tensor_map, tuple(coordinates)
        self._kind = KINDS[tensor_map.dtype]
        bits = self._kind.bits
        first, end = max(0, -coordinates[0]), min(tensor_map.box[0], tensor_map.sizes[0] - coordinates[0])
        inside = [(first * bits // 8, max(first, end) * bits // 8)]
        offset = (coordinates[0] + first) * bits // 8
        strides = [1]
        self.empty = end <= first
        for i, stride in enumerate(tensor_map.strides, start=1):
            start, size, step = coordinates[i], tensor_map.sizes[i], tensor_map.element_strides[i]
            count = -(-tensor_map.box[i] // step)
            first, end = max(0, -(start // step)), min(count, -(-(size - start) // step))
            self.empty = self.empty or end <= first
            inside.append((first, max(first, end)))
            offset += (start + first * step) * stride
            strides.append(stride * step)
        self.inside = tuple(reversed(inside))
        self.strides = tuple(reversed(strides))
        self.offset = offset

    @property
    def complete(self) -> bool:
        """True where the whole box lies in the tensor."""
        shape = (*self.map.tile_shape[:-1], self.map.box[0] * self._kind.bits // 8)
        return all(low == 0 and high == n for (low, high), n in zip(self.inside, shape, strict=True))

    @property
    def extent(self) -> tuple[int, int]:
        """Half-open range of byte offsets from ``map.address`` that covers everything touched; (0, 0) of an empty tile."""
        if self.empty:
            return 0, 0
        return self.offset, self.offset + 1 + sum(
            (high - low - 1) * stride for (low, high), stride in zip(self.inside, self.strides, strict=True)
        )

    def rows(self) -> tuple[NDArray[np.int64], int]:
        """Contiguous runs of global memory that the tile touches: byte offsets from ``map.address`` ``[runs]`` and bytes of each."""
        if self.empty:
            return np.zeros(0, np.int64), 0
        starts = np.array(self.offset, np.int64)
        for (low, high), stride in zip(self.inside[:-1], self.strides[:-1], strict=True):
            starts = starts[..., None] + stride * np.arange(high - low, dtype=np.int64)
        return starts.ravel(), self.inside[-1][1] - self.inside[-1][0]

    def view(self, memory: Bytes, origin: int, dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
        """The part inside the tensor as a strided view of global memory (no copy), outermost dimension first.

        Args:
            memory: contiguous uint8 array that holds the tensor; writable if the view is to be written.
            origin: global address of ``memory[0]``.
            dtype: element type of the view; the innermost dimension counts its elements.

        Raises:
            EmulatorError: the tile leaves `memory`.
        """
        start = self.map.address + self.offset - origin
        low, high = self.extent
        if not self.empty and not 0 <= start <= start + high - low <= memory.size:
            raise EmulatorError(
                f"tile at {self.coordinates} touches global addresses {self.map.address + low:#x} to {self.map.address + high:#x}, "
                f"outside of its buffer {origin:#x} to {origin + memory.size:#x}"
            )
        size = np.dtype(dtype).itemsize
        shape = [high - low for low, high in self.inside]
        if self.empty:
            return np.empty([0] * len(shape), dtype)
        return np.ndarray((*shape[:-1], shape[-1] // size), dtype, memory.data, start, (*self.strides[:-1], size))

    def load(self, memory: Bytes, origin: int) -> Bytes:
        """The tile as it goes to shared memory, before the swizzle: uint8 ``map.tile_shape``, elements outside filled with zero or NaN.

        Gaps of the unpacked 4- and 6-bit types are zero. NaN is the canonical one (an assumption: the driver documents only "a special
        NaN").

        Raises:
            EmulatorError: the tile leaves `memory`, or a tf32 or flush-to-zero type meets a value that it would change.
        """
        kind = self._kind
        if self.empty:
            return self._fill()
        inside = self.view(memory, origin)
        if kind.bits != kind.shared_bits:
            return self._unpack(inside)
        if self.complete:
            data = np.ascontiguousarray(inside)
        else:
            data = self._fill()
            data[tuple(slice(low, high) for low, high in self.inside)] = inside
        if kind.tf32 or kind.code == KINDS[DataType.FLOAT32_FTZ].code:
            self._check_conversion(data)
        return data.reshape(self.map.tile_shape)

    def _fill(self) -> Bytes:
        if self.map.oob_fill is OobFill.ZERO or self._kind.nan is None or self._kind.numpy is None:
            return np.zeros(self.map.tile_shape, np.uint8)
        itemsize = self._kind.bits // 8
        shape = self.map.tile_shape
        filled: Bytes = np.full((*shape[:-1], shape[-1] // itemsize), self._kind.nan, self._kind.numpy).view(np.uint8)
        return filled

    def _unpack(self, inside: Bytes) -> Bytes:
        """16 elements of 4 or 6 bits, 8 or 12 bytes, at the start of every 16."""
        packed = 2 * self._kind.bits  # bytes of 16 elements
        data = np.zeros((*self.map.tile_shape[:-1], self.map.tile_shape[-1] // GRANULE, GRANULE), np.uint8)
        low, high = self.inside[-1]
        ranges = tuple(slice(first, end) for first, end in self.inside[:-1])
        chunks = (slice(low // packed, high // packed), slice(0, packed))
        data[ranges + chunks] = inside.reshape(*inside.shape[:-1], -1, packed)
        return data.reshape(self.map.tile_shape)

    def _check_conversion(self, data: Bytes) -> None:
        words = data.view(np.uint32)
        magnitude = words & np.uint32(0x7FFFFFFF)
        changed = (words & np.uint32(0x1FFF)) != 0 if self._kind.tf32 else np.zeros(words.shape, np.bool_)
        if self._kind.code == KINDS[DataType.FLOAT32_FTZ].code:
            changed = changed | ((magnitude < 0x00800000) & (magnitude != 0))
        if changed.any():
            raise EmulatorError(
                f"a load with type {self.map.dtype.name} meets {int(words[changed][0]):#010x}, which it would round or flush; "
                "that conversion is not modelled: give values that tf32 holds, or use FLOAT32"
            )

    def load_shared(self, memory: Bytes, origin: int, shared: Bytes, shared_address: int) -> None:
        """A whole load: `load`, then the swizzled scatter into ``shared`` (uint8, index = shared address).

        Raises:
            EmulatorError: as `load` and `TensorMap.shared_granules`; or the tile does not fit `shared`.
        """
        self.scatter(self.load(memory, origin), shared, shared_address)

    def scatter(self, data: Bytes, shared: Bytes, shared_address: int) -> None:
        """Puts the bytes of a tile (from `load`) into shared memory, swizzled; for multicast once per destination CTA."""
        granules = self.map.shared_granules(shared_address)
        target = _granule_view(self._window(shared, shared_address))
        target[granules] = _granule_view(np.ascontiguousarray(data).reshape(-1))

    def gather(self, shared: Bytes, shared_address: int) -> Bytes:
        """The bytes of a tile from swizzled shared memory: uint8 ``map.tile_shape`` (the inverse of `scatter`)."""
        granules = self.map.shared_granules(shared_address)
        source = _granule_view(self._window(shared, shared_address))
        return source[granules].view(np.uint8).reshape(self.map.tile_shape)

    def _window(self, shared: Bytes, shared_address: int) -> Bytes:
        end = shared_address + self.map.tile_bytes
        if not 0 <= shared_address <= end <= shared.size:
            raise EmulatorError(
                f"a tile of {self.map.tile_bytes} bytes at shared address {shared_address:#x} leaves shared memory of {shared.size} bytes"
            )
        return shared[shared_address:end]

    def store(self, memory: Bytes, origin: int, data: Bytes) -> None:
        """Writes a tile (uint8 ``map.tile_shape``, from `gather`) to global memory; elements outside the tensor are dropped."""
        self._check_writable()
        if not self.empty:
            self.view(memory, origin)[...] = data[tuple(slice(low, high) for low, high in self.inside)]

    def reduce(self, memory: Bytes, origin: int, data: Bytes, operation: str) -> None:
        """``cp.reduce.async.bulk.tensor``: combines a tile with global memory element by element, clipped as `store`.

        Args:
            operation: ``add min max inc dec and or xor``.
        """
        self._check_writable()
        if self.empty:
            return
        name = _REDUCTION_TYPES.get(self.map.dtype)
        if name is None:
            raise EmulatorError(f"a reduction with tensor map type {self.map.dtype.name} is not modelled")
        container = self._kind.numpy
        assert container is not None
        target = self.view(memory, origin, container)
        values = np.ascontiguousarray(data[tuple(slice(low, high) for low, high in self.inside)]).view(container)
        target[...] = reduce_elements(operation, name, target, values)

    def _check_writable(self) -> None:
        if self._kind.bits != self._kind.shared_bits:
            raise EmulatorError(f"stores with tensor map type {self.map.dtype.name} are not modelled")


def _granule_view(data: Bytes) -> NDArray[np.complex128]:
    """Bytes as 16-byte items; complex128 is the numpy type of that size that copies fastest, and copies keep every bit."""
    return data.view(np.complex128)


_REDUCTION_TYPES: dict[DataType, str] = {
    DataType.UINT32: "u32",
    DataType.INT32: "s32",
    DataType.UINT64: "u64",
    DataType.INT64: "s64",
    DataType.FLOAT16: "f16",
    DataType.BFLOAT16: "bf16",
    DataType.FLOAT32: "f32",
    DataType.FLOAT64: "f64",
}
_INTEGERS: dict[str, type[np.integer[Any]]] = {
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "b32": np.uint32,
    "b64": np.uint64,
}


def reduce_elements(operation: str, type_name: str, old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
    """Element by element reduction of bulk copies (PTX ISA ``cp.reduce.async.bulk``), without duplicates to order.

    Args:
        operation: ``add min max inc dec and or xor``.
        type_name: ``u32 s32 u64 s64 b32 b64 f16 bf16 f32 f64``.
        old, new: memory and incoming elements, arrays of the type's bits (any dtype of its width).

    Returns:
        The combined elements in the dtype of `old`. Integers wrap. f16 and bf16 keep subnormals (``.noftz``), f32 addition flushes them,
        as the ISA says of its implementation; every sum is rounded to nearest even, NaN of min and max gives way to the other operand.

    Raises:
        EmulatorError: a combination that the ISA does not have.
    """

    def refuse() -> EmulatorError:
        return EmulatorError(f"reduction .{operation}.{type_name} does not exist")

    if type_name in _INTEGERS:
        kind = _INTEGERS[type_name]
        a, b = old.view(kind), new.view(kind)
        functions: dict[str, Any] = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        if operation in ("inc", "dec") and type_name == "u32":
            one = np.uint32(1)
            combined = np.where(a >= b, np.uint32(0), a + one) if operation == "inc" else np.where((a == 0) | (a > b), b, a - one)
        elif operation in functions and not (type_name in ("b32", "b64") and operation in ("add", "min", "max")):
            combined = functions[operation](a, b)
        else:
            raise refuse()
        return combined.view(old.dtype)
    if type_name not in ("f16", "bf16", "f32", "f64"):
        raise refuse()
    container = FORMATS[type_name].container
    x, y = decode(old.view(container), type_name), decode(new.view(container), type_name)
    with np.errstate(over="ignore", invalid="ignore"):
        if operation == "add":
            if type_name == "f32":
                total = _flush(_flush(x) + _flush(y))
                return encode(total, "f32").view(old.dtype)
            # exact in float64, or so far apart that the smaller operand only decides on which side of a tie the sum lies
            return encode(x.astype(np.float64) + y.astype(np.float64), type_name).view(old.dtype)
        if operation in ("min", "max") and type_name in ("f16", "bf16"):
            return encode(np.fmin(x, y) if operation == "min" else np.fmax(x, y), type_name).view(old.dtype)
    raise refuse()


def _flush(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)
