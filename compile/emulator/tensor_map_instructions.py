"""``tensormap.replace`` and ``tensormap.cp_fenceproxy``: tensor maps that a kernel makes itself.

Sources: PTX ISA 9.x, 9.7.9.28 (``tensormap.replace``), 9.7.13.? (``tensormap.cp_fenceproxy``); places and encodings of the fields as `tensor_map`
has them, from the code that ptxas makes for every field. A copy of a map is done when the instruction is; that copies see it only after
``fence.proxy.tensormap`` is not checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from densemoe.compile.emulator.emitter import Emitter
from densemoe.compile.emulator.operations import operation
from densemoe.compile.emulator.parser import Immediate, Instruction, Memory
from densemoe.runtime.errors import EmulatorError

if TYPE_CHECKING:
    from densemoe.compile.emulator.gang import Gang

__all__ = ["TensorMapUpdates"]

_LANES: Final = 32
_SPACES: Final = {"shared::cta": "shared::cta", "global": "global"}
_FLAGS: Final = 8  # byte of the word that holds most fields
_BOX: Final = (0x37, 0x38, 0x39, 0x3A, 0x3B)
_STEPS: Final = 0x34
_HIGH_STRIDES: Final = 0x1C
_IMMEDIATES: Final = {  # bits of the flags, their width, how many values the ISA names and the map takes as they are
    "elemtype": (7, 4, 11),
    "interleave_layout": (11, 2, 3),
    "swizzle_mode": (13, 2, 4),
    "fill_mode": (15, 1, 2),
    "swizzle_atomicity": (19, 2, 4),
}
#: (byte, bytes of the word, shift in it, width in bits, shift of the value to the right, what is subtracted)
_Piece = tuple[int, int, int, int, int, int]


def _pieces(field: str, ordinal: int) -> list[_Piece]:
    """Where a field lies."""
    if field == "global_address":
        return [(0, 8, 0, 64, 0, 0)]
    if field == "rank":  # given as one less already
        return [(_FLAGS, 4, 4, 3, 0, 0)]
    if field == "box_dim":
        return [(_BOX[ordinal], 1, 0, 8, 0, 1)]
    if field == "global_dim":
        return [(0x20 + 4 * ordinal, 4, 0, 32, 0, 1)]
    if field == "global_stride":
        return [(0xC + 4 * ordinal, 4, 0, 32, 4, 0), (_HIGH_STRIDES, 4, 4 * ordinal, 4, 36, 0)]
    if field == "element_stride":
        return [(_STEPS, 4, 3 * ordinal, 3, 0, 1)]
    shift, width, _ = _IMMEDIATES[field]
    return [(_FLAGS, 4, shift, width, 0, 0)]


@operation(
    "tensormap.replace.tile.{global_address|global_stride}{.global|.shared::cta|}.b1024.b64",
    "tensormap.replace.tile.{rank|box_dim|global_dim|element_stride|elemtype|interleave_layout|swizzle_mode|fill_mode|swizzle_atomicity}"
    "{.global|.shared::cta|}.b1024.b32",
    operands=(2, 3),
    destinations=0,
)
def _replace(e: Emitter, i: Instruction) -> None:
    field, ordinal = i.parts[3], 0
    if field in ("box_dim", "global_dim", "global_stride", "element_stride"):
        if len(i.operands) != 3 or not isinstance(i.operands[1], Immediate) or not 0 <= i.operands[1].value < 5 - (field == "global_stride"):
            raise EmulatorError(f"{field} needs an ordinal, an immediate from 0 to {4 - (field == 'global_stride')}")
        ordinal = i.operands[1].value
    elif len(i.operands) != 2:
        raise EmulatorError(f"{field} has no ordinal")
    value = e.value(i.operands[-1], 64 if i.parts[-1] == "b64" else 32)
    if field in _IMMEDIATES and (value.literal is None or value.literal >= _IMMEDIATES[field][2]):
        raise EmulatorError(f"{field} {value.literal}: an immediate below {_IMMEDIATES[field][2]} is modelled")
    if not isinstance(i.operands[0], Memory):
        raise EmulatorError("an address in brackets needed")
    space = next((each for each in i.parts if each in _SPACES), "")
    e.emit(f"H.replace_in_tensor_map(g, {e.mask}, {space!r}, {e.u(e.address(i.operands[0]))}, {e.u(value)}, {_pieces(field, ordinal)!r})")


@operation(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.{cta|cluster|gpu|sys}.sync.aligned",
    "tensormap.cp_fenceproxy.global.shared::cta.proxy.tensormap::generic.release.{cta|cluster|gpu|sys}.sync.aligned",
    operands=3,
    destinations=0,
)
def _copy(e: Emitter, i: Instruction) -> None:
    if not isinstance(i.operands[2], Immediate) or i.operands[2].value != 128:
        raise EmulatorError("tensormap.cp_fenceproxy copies 128 bytes")
    target, source = (e.u(e.address(each)) for each in i.operands[:2] if isinstance(each, Memory))
    e.emit(f"H.copy_tensor_map(g, {e.mask}, {target}, {source})")


class TensorMapUpdates:
    """What `Machine` knows of maps that change."""

    def load(self, g: Gang, space: str, address: Any, mask: Any, size: int, count: int, order: str = "") -> Any:
        raise NotImplementedError

    def store(self, g: Gang, space: str, address: Any, mask: Any, size: int, values: tuple[Any, ...], order: str = "") -> None:
        raise NotImplementedError

    def replace_in_tensor_map(self, g: Gang, mask: Any, space: str, address: Any, value: Any, pieces: list[_Piece]) -> None:
        """Puts a field's value into the maps that the lanes name, one lane after another."""
        for lane in g.active_lanes(mask):
            one = np.zeros(g.lanes, np.bool_)
            one[lane] = True
            where = address if isinstance(address, int) else int(address[lane])
            given = value if isinstance(value, int) else int(value[lane])
            if where % 64:
                raise EmulatorError(f"a tensor map at address {where:#x}: 64-byte alignment needed")
            for byte, size, shift, width, right, less in pieces:
                at = np.full(g.lanes, where + byte, np.uint64)
                field = ((given >> right) - less & (1 << width) - 1) << shift
                if width < 8 * size:
                    old = int(self.load(g, space, at, one, size, 1)[lane])
                    field |= old & ~((1 << width) - 1 << shift)
                self.store(g, space, at, one, size, (field,))

    def copy_tensor_map(self, g: Gang, mask: Any, target: Any, source: Any) -> None:
        """A map from shared to global memory, once a warp; its second half has no fields, and may never have been written."""
        first = np.zeros(g.lanes, np.bool_)
        for lane in g.active_lanes(mask):
            first[lane] = not first[lane // _LANES * _LANES : lane].any()
        for byte in range(0, 64, 16):
            at = (np.full(g.lanes, 0, np.uint64) + np.asarray(each, np.uint64) + np.uint64(byte) for each in (target, source))
            to, where = at
            self.store(g, "global", to, first, 8, tuple(self.load(g, "shared::cta", where, first, 8, 2)))
