"""Translation of tensor copies, ``wgmma`` and ``tcgen05``.

Sources: PTX ISA 9.x, 9.7.9.27 (``cp.async.bulk.tensor``), 9.7.15 (``wgmma``), 9.7.16 (``tcgen05``).
"""

from __future__ import annotations

from densemoe.compile.emulator.emitter import Emitter
from densemoe.compile.emulator.operations import operation
from densemoe.compile.emulator.parser import Immediate, Instruction, Memory, Operand, Register, Vector
from densemoe.compile.emulator.tensor_memory import copy_shape, register_map
from densemoe.compile.emulator.wgmma import make_wgmma
from densemoe.runtime.errors import EmulatorError

_WAIT = 3  # translation.WAIT


def _text(e: Emitter, operand: Operand, bits: int = 32) -> str:
    return e.u(e.value(operand, bits))


def _address(e: Emitter, operand: Operand) -> str:
    if not isinstance(operand, Memory):
        raise EmulatorError("an address in brackets needed")
    return e.u(e.address(operand))


def _group(i: Instruction) -> int:
    return 2 if "cta_group::2" in i.parts else 1


# --- tensor copies ----------------------------------------------------------------------------------------------------

_DIMENSIONS = "{1d|2d|3d|4d|5d}"


def _tensor(e: Emitter, operand: Operand, i: Instruction) -> tuple[str, str]:
    """Expressions of the map's address and of the coordinates."""
    if not isinstance(operand, Memory) or operand.coordinates is None:
        raise EmulatorError("a tensor operand [map, {coordinates}] needed")
    rank = int(next(each for each in i.parts if len(each) == 2 and each[1] == "d")[0])
    if len(operand.coordinates) != rank:
        raise EmulatorError(f"{len(operand.coordinates)} coordinates, {rank} needed")
    texts = ", ".join(_text(e, each) for each in operand.coordinates)
    return e.u(e.address(Memory(operand.base, operand.offset))), f"({texts},)"


def _without_hint(i: Instruction) -> tuple[Operand, ...]:
    return i.operands[:-1] if "L2::cache_hint" in i.opcode else i.operands


@operation(
    f"cp.async.bulk.tensor.{_DIMENSIONS}.shared::{{cluster|cta}}.global{{.tile|}}.mbarrier::complete_tx::bytes"
    "{.multicast::cluster|}{{.cta_group::{1|2}|}{.L2::cache_hint|}|.L2::cache_hint.cta_group::{1|2}}",  # compilers print both orders
    operands=(3, 4, 5),
    destinations=0,
)
def _tensor_load(e: Emitter, i: Instruction) -> None:
    operands = _without_hint(i)
    multicast = "multicast::cluster" in i.parts
    if len(operands) != (4 if multicast else 3):
        raise EmulatorError(f"{len(i.operands)} operands")
    tensor_map, coordinates = _tensor(e, operands[1], i)
    ctas = _text(e, operands[3], 16) if multicast else "None"
    target, barrier = _address(e, operands[0]), _address(e, operands[2])
    e.emit(f"H.tensor_load(g, {e.mask}, {target}, {tensor_map}, {coordinates}, {barrier}, {ctas}, {_group(i)})")


@operation(
    f"cp.async.bulk.tensor.{_DIMENSIONS}.global.shared::cta{{.tile|}}.bulk_group{{.L2::cache_hint|}}",
    f"cp.reduce.async.bulk.tensor.{_DIMENSIONS}.global.shared::cta.{{add|min|max|inc|dec|and|or|xor}}{{.tile|}}.bulk_group{{.L2::cache_hint|}}",
    operands=(2, 3),
    destinations=0,
)
def _tensor_store(e: Emitter, i: Instruction) -> None:
    operands = _without_hint(i)
    tensor_map, coordinates = _tensor(e, operands[0], i)
    reduction = next((each for each in i.parts if each in ("add", "min", "max", "inc", "dec", "and", "or", "xor")), "")
    e.emit(f"H.tensor_store(g, {e.mask}, {tensor_map}, {coordinates}, {_address(e, operands[1])}, {reduction!r})")


@operation(f"cp.async.bulk.prefetch.tensor.{_DIMENSIONS}.L2.global{{.tile|}}{{.L2::cache_hint|}}", operands=(1, 2), destinations=0)
def _tensor_prefetch(e: Emitter, i: Instruction) -> None:
    tensor_map, coordinates = _tensor(e, i.operands[0], i)
    e.emit(f"H.tensor_prefetch(g, {e.mask}, {tensor_map}, {coordinates})")


# --- tensor memory ----------------------------------------------------------------------------------------------------


@operation("tcgen05.alloc.cta_group::{1|2}.sync.aligned{.shared::cta|}.b32", operands=2, destinations=0, blocking=True)
def _alloc(e: Emitter, i: Instruction) -> None:
    address = _address(e, i.operands[0])
    if "shared::cta" not in i.parts:
        address = f"H.generic_shared({address})"
    e.emit(f"if not H.tmem_alloc(g, {e.mask}, {address}, {_text(e, i.operands[1])}, {_group(i)}): return {_WAIT}")


@operation("tcgen05.dealloc.cta_group::{1|2}.sync.aligned.b32", operands=2, destinations=0, blocking=True)
def _dealloc(e: Emitter, i: Instruction) -> None:
    e.emit(f"if not H.tmem_dealloc(g, {e.mask}, {_text(e, i.operands[0])}, {_text(e, i.operands[1])}, {_group(i)}): return {_WAIT}")


@operation("tcgen05.relinquish_alloc_permit.cta_group::{1|2}.sync.aligned", operands=0, destinations=0)
def _relinquish(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.tmem_relinquish(g, {e.mask})")


_SHAPES = "{32x32b|16x64b|16x128b|16x256b|16x32bx2}"
_COUNTS = "{x1|x2|x4|x8|x16|x32|x64|x128}"


def _shape(i: Instruction) -> tuple[str, int, bool]:
    shape = next(each for each in i.parts if each in ("32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2"))
    count = int(next(each for each in i.parts if each[0] == "x" and each[1:].isdigit())[1:])
    return shape, count, "pack::16b" in i.parts or "unpack::16b" in i.parts


def _split(i: Instruction, shape: str, place: int) -> int:
    if (shape == "16x32bx2") != (len(i.operands) == 3):
        raise EmulatorError("immHalfSplitoff belongs to .16x32bx2 alone")
    if shape != "16x32bx2":
        return 0
    split = i.operands[place]
    if not isinstance(split, Immediate):
        raise EmulatorError("immHalfSplitoff is an immediate")
    return split.value


def _vector(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


@operation(f"tcgen05.ld.sync.aligned.{_SHAPES}.{_COUNTS}{{.pack::16b|}}.b32", operands=(2, 3))
def _ld(e: Emitter, i: Instruction) -> None:
    shape, count, packed = _shape(i)
    split = _split(i, shape, 2)
    registers = register_map(shape, count)[0].shape[0]
    items = _vector(i.operands[0])
    if len(items) != registers:
        raise EmulatorError(f"{len(items)} registers, {registers} needed")
    local = e.let(f"H.tmem_load(g, {e.mask}, {_address(e, i.operands[1])}, {shape!r}, {count}, {packed}, {split}, {registers})")
    for n, item in enumerate(items):
        e.assign(item, e.array(32, "u", f"{local}[{n}]"))


@operation(f"tcgen05.st.sync.aligned.{_SHAPES}.{_COUNTS}{{.unpack::16b|}}.b32", operands=(2, 3), destinations=0)
def _st(e: Emitter, i: Instruction) -> None:
    shape, count, packed = _shape(i)
    split = _split(i, shape, 1)
    items = _vector(i.operands[-1])
    registers = register_map(shape, count)[0].shape[0]
    if len(items) != registers:
        raise EmulatorError(f"{len(items)} registers, {registers} needed")
    texts = ", ".join(_text(e, item) for item in items)
    e.emit(f"H.tmem_store(g, {e.mask}, {_address(e, i.operands[0])}, {shape!r}, {count}, {packed}, {split}, ({texts},))")


@operation("tcgen05.wait::{ld|st}.sync.aligned", "tcgen05.fence::{before|after}_thread_sync", operands=0, destinations=0)
def _order(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.tmem_order(g, {e.mask}, {i.parts[1]!r})")


_CP_SHAPES = "{128x256b|4x256b|128x128b|64x128b.warpx2::{02_13|01_23}|32x128b.warpx4}"


@operation(f"tcgen05.cp.cta_group::{{1|2}}.{_CP_SHAPES}", operands=2, destinations=0)
def _cp(e: Emitter, i: Instruction) -> None:
    shape = copy_shape(i.parts[3], i.parts[4] if len(i.parts) > 4 else "")
    e.emit(f"H.tmem_copy(g, {e.mask}, {_address(e, i.operands[0])}, {_text(e, i.operands[1], 64)}, {e.constant(shape)}, {_group(i)})")


_COLLECTOR = "{.collector::a::{fill|use|lastuse|discard}|}"


@operation(
    "tcgen05.mma.cta_group::{1|2}.kind::mxf8f6f4.block_scale{.scale_vec::1X|.block32|}" + _COLLECTOR,
    "tcgen05.mma.cta_group::{1|2}.kind::mxf4.block_scale{.scale_vec::2X|.block32|}" + _COLLECTOR,
    "tcgen05.mma.cta_group::{1|2}.kind::mxf4nvf4.block_scale{.scale_vec::{2X|4X}|.block16|.block32}" + _COLLECTOR,
    operands=7,
    destinations=0,
)
def _mma_scaled(e: Emitter, i: Instruction) -> None:
    vector = next((each for each in i.parts if each.startswith("scale_vec::") or each in ("block16", "block32")), "")
    scale_a, scale_b = _address(e, i.operands[4]), _address(e, i.operands[5])
    _emit_mma(e, i, i.operands[6], f"({scale_a}, {scale_b}, {vector!r})", "()", 0)


@operation(f"tcgen05.mma.cta_group::{{1|2}}.kind::{{f16|tf32|f8f6f4|i8}}{_COLLECTOR}", operands=(5, 6, 7), destinations=0)
@operation("tcgen05.mma.ws.cta_group::1.kind::{f16|tf32|f8f6f4|i8}{.collector::b{0|1|2|3}::{fill|use|lastuse|discard}|}", operands=5, destinations=0)
def _mma(e: Emitter, i: Instruction) -> None:
    rest = list(i.operands[4:])
    disabled, scale_input_d = "()", 0
    if isinstance(rest[0], Vector):
        words = _vector(rest.pop(0))
        if len(words) != 4 * _group(i):
            raise EmulatorError(f"disable-output-lane has {4 * _group(i)} words")
        disabled = f"({', '.join(_text(e, word) for word in words)},)"
    if len(rest) == 2:
        scale = rest.pop()
        if not isinstance(scale, Immediate):
            raise EmulatorError("scale-input-d is an immediate")
        scale_input_d = scale.value
    if len(rest) != 1:
        raise EmulatorError(f"{len(i.operands)} operands")
    _emit_mma(e, i, rest[0], "None", disabled, scale_input_d)


def _emit_mma(e: Emitter, i: Instruction, enable: Operand, scales: str, disabled: str, scale_input_d: int) -> None:
    kind = next(each for each in i.parts if each.startswith("kind::"))[6:]
    a = i.operands[1]
    a_in_tmem = isinstance(a, Memory)
    left = _address(e, a) if a_in_tmem else _text(e, a, 64)
    arguments = ", ".join(
        [
            f"g, {e.mask}, {_group(i)}, {kind!r}, {'ws' in i.parts}",
            _address(e, i.operands[0]),
            left,
            str(a_in_tmem),
            _text(e, i.operands[2], 64),
            _text(e, i.operands[3]),
            _text(e, enable, 1),
            scales,
            disabled,
            str(scale_input_d),
        ]
    )
    e.emit(f"H.tmem_mma({arguments})")


@operation("tcgen05.commit.cta_group::{1|2}.mbarrier::arrive::one{.shared::cluster|}{.multicast::cluster|}.b64", operands=(1, 2), destinations=0)
def _commit(e: Emitter, i: Instruction) -> None:
    multicast = "multicast::cluster" in i.parts
    if len(i.operands) != (2 if multicast else 1):
        raise EmulatorError(f"{len(i.operands)} operands")
    address = _address(e, i.operands[0])
    if "shared::cluster" not in i.parts:
        address = f"H.generic_shared({address})"
    ctas = _text(e, i.operands[1], 16) if multicast else "None"
    e.emit(f"H.tmem_commit(g, {e.mask}, {_group(i)}, {address}, {ctas})")


# --- wgmma ------------------------------------------------------------------------------------------------------------


@operation("wgmma.fence.sync.aligned", operands=0, destinations=0, blocking=True)
def _wgmma_fence(e: Emitter, i: Instruction) -> None:
    """Registers are written at once here, so there is nothing to order; but here the warps of a warpgroup that parted wait for each other."""
    e.emit(f"if not H.warpgroup_gathered(g): return {_WAIT}")


@operation("wgmma.commit_group.sync.aligned", operands=0, destinations=0)
def _wgmma_commit(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.wgmma_commit(g, {e.mask})")


@operation("wgmma.wait_group.sync.aligned", operands=1, destinations=0)
def _wgmma_wait(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.wgmma_wait(g, {e.mask}, {_text(e, i.operands[0])})")


def _accumulator(e: Emitter, item: Operand, add: str) -> str:
    """The old value of a register of D, which may be undefined unless it is added to."""
    if not isinstance(item, Register):
        raise EmulatorError(f"{item} of D is not a register")
    if item.name not in e.values and item.name not in e.kinds:
        e.emit(f"if np.any({add}): undefined({item.name!r})")
        return "0"
    value = e.register(item.name, check=False)
    if value.defined:
        e.emit(f"if np.any({add}): check_defined({value.defined}, {e.mask}, {item.name!r})")
    return e.u(value)


_N = "{" + "|".join(str(n) for n in range(8, 257, 8)) + "}"


@operation(
    f"wgmma.mma_async.sync.aligned.m64n{_N}k16.f32.f16.f16",
    f"wgmma.mma_async.sync.aligned.m64n{_N}k16.f16.f16.f16",
    f"wgmma.mma_async.sync.aligned.m64n{_N}k16.f32.bf16.bf16",
    f"wgmma.mma_async.sync.aligned.m64n{_N}k8.f32.tf32.tf32",
    f"wgmma.mma_async.sync.aligned.m64n{_N}k32.{{f32|f16}}.{{e4m3|e5m2}}.{{e4m3|e5m2}}",
    f"wgmma.mma_async.sync.aligned.m64n{_N}k32.s32.{{s8|u8}}.{{s8|u8}}{{.satfinite|}}",
    operands=(4, 6, 7, 8),
    reads_destination=True,
)
def _wgmma(e: Emitter, i: Instruction) -> None:
    """D is read only where scale-d is true."""
    shape, d_type, a_type, b_type = i.parts[4:8]
    n, k = (int(x) for x in shape[4:].split("k"))
    unit = make_wgmma(n, d_type, a_type, b_type, k, "satfinite" in i.parts)
    items = _vector(i.operands[0])
    if len(items) != unit.d_registers:
        raise EmulatorError(f"{len(items)} registers of D, {unit.d_registers} needed")
    a = i.operands[1]
    if isinstance(a, Vector):
        if len(a.items) != unit.a_registers:
            raise EmulatorError(f"{len(a.items)} registers of A, {unit.a_registers} needed")
        left = f"({', '.join(_text(e, item) for item in a.items)},)"
    else:
        left = _text(e, a, 64)
    immediates = []
    for each in i.operands[4:]:
        if not isinstance(each, Immediate):
            raise EmulatorError("scales and transpositions of wgmma are immediates")
        immediates.append(each.value)
    scale_a, scale_b = immediates[:2] if immediates else (1, 1)
    transposed = [bool(value) for value in immediates[2:]]
    pair = (False, transposed[0]) if len(transposed) == 1 else tuple(transposed) or (False, False)
    scale_d = e.value(i.operands[3], 1)
    add = str(bool(scale_d.literal)) if scale_d.literal is not None else e.u(scale_d)
    old = ", ".join(_accumulator(e, item, add) for item in items)
    right = _text(e, i.operands[2], 64)
    local = e.let(f"H.wgmma(g, {e.mask}, {e.constant(unit)}, ({old},), {left}, {right}, {add}, ({scale_a}, {scale_b}), {pair})")
    for number, item in enumerate(items):
        e.assign(item, e.array(32, "u", f"{local}[{number}]"))
