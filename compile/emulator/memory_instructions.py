"""Translation of loads, stores, atomics, matrix loads, address conversion and shuffles.

Sources: PTX ISA 9.x, 9.7.9 (data movement: ``ld``, ``st``, ``prefetch``, ``cvta``, ``mapa``, ``shfl``), 9.7.13 (``atom``, ``red``, ``vote``,
``match``, ``redux``, ``activemask``, ``elect``), 9.7.14.5 (``ldmatrix``, ``stmatrix``, ``mma``). Cache operators, eviction hints, scopes and
memory orders have no effect on values here; race detection uses orders and scopes.
"""

from __future__ import annotations

from densemoe.compile.emulator.emitter import Emitter, Value, literal
from densemoe.compile.emulator.memory import PARAMETER_WINDOW, SHARED_WINDOW
from densemoe.compile.emulator.mma import make_mma
from densemoe.compile.emulator.operations import operation
from densemoe.compile.emulator.parser import TYPE_BYTES, Instruction, Operand, Pair, Register, Sink, Vector
from densemoe.runtime.errors import EmulatorError

_TYPES = "{{b|u|s}{8|16|32|64}|f16|f32|f64}"
_VECTORS = "{.v2|.v4|}"
_ORDER = "{.weak|.volatile|{.relaxed|.acquire}{.cta|.cluster|.gpu|.sys}|}"
_HINTS = "{.L1::{no_allocate|evict_first|evict_last|evict_normal|evict_unchanged}|}{.L2::{evict_first|evict_last|evict_normal|cache_hint}|}"
_SPACES = ("shared", "shared::cta", "shared::cluster", "global", "local", "param", "const")


def _space(parts: list[str]) -> str:
    return next((each for each in parts if each in _SPACES), "")


def _count(parts: list[str]) -> int:
    return next((int(each[1:]) for each in parts if each in ("v2", "v4", "v8")), 1)


def _order(parts: list[str]) -> str:
    """The argument for a strong access's memory order and scope: ``volatile`` is ``.relaxed.sys``, atomics without a scope are ``.gpu``."""
    order = next((each for each in parts if each in ("relaxed", "acquire", "release", "acq_rel")), "relaxed" if "volatile" in parts else "")
    scope = next((each for each in parts if each in ("cta", "cluster", "gpu", "sys")), "sys" if "volatile" in parts else "gpu")
    return f", '{order}.{scope}'" if order else ""


def _items(operand: Operand, count: int) -> list[Operand]:
    if count == 1:
        return [operand]
    if not isinstance(operand, Vector) or len(operand.items) != count:
        raise EmulatorError(f"a vector of {count} registers needed")
    return list(operand.items)


def _assign_loaded(e: Emitter, target: Operand, local: str, kind: str, bits: int, signed: bool) -> None:
    if not isinstance(target, Register):
        if isinstance(target, Sink):
            return
        raise EmulatorError("the destination of a load is a register")
    out = e.program.bits[target.name]
    if bits < out:
        text = f"extend_int({local}, {out}, {bits}, {signed})" if kind == "I" else f"extend({local}, {out}, {bits}, {signed})"
        e.assign(target, Value(out, kind, {"u": e.let(text)}))
    else:
        e.assign(target, Value(bits, kind, {"u": local}))


@operation(
    f"ld{_ORDER}{{.shared|.shared::cta|.shared::cluster|.local|}}{_VECTORS}.{_TYPES}",
    f"ld{{.weak|}}{{.param|.const}}{_VECTORS}.{_TYPES}",
    f"ld{_ORDER}.global{_HINTS}{{.L2::{{64|128|256}}B|}}{_VECTORS}.{_TYPES}",
    f"ld{{.weak|}}.global{{.ca|.cg|.cs|.lu|.cv|.nc|.ca.nc|.cg.nc|.cs.nc}}{_HINTS}{{.L2::{{64|128|256}}B|}}{_VECTORS}.{_TYPES}",
    f"ld{_ORDER}.global{{.nc|}}{_HINTS}{{.L2::256B|}}.{{v8.{{b|u|s|f}}32|v4.{{b|u|s|f}}64}}",
    operands=(2, 3),
)
def _ld(e: Emitter, i: Instruction) -> None:
    parts = i.parts
    kind, count, space = parts[-1], _count(parts), _space(parts)
    size = TYPE_BYTES[kind]
    address = e.address(i.operands[1])
    items = _items(i.operands[0], count)
    uniform = address.kind == "I" and (space in ("global", "param", "const") or e.key.single_cta) and space != "local"
    if space == "local":
        local = e.let(f"H.load_local(g, {e.u(address)}, {e.mask}, {size}, {count})")
    else:
        target = {"const": "global"}.get(space, space)
        local = e.let(f"H.load(g, {target!r}, {e.u(address)}, {e.mask}, {size}, {count}{_order(parts)})")
    for n, item in enumerate(items):
        each = local if count == 1 else e.let(f"{local}[{n}]")
        _assign_loaded(e, item, each, "I" if uniform else "A", 8 * size, kind[0] == "s")


_STORE_ORDER = "{.weak|.volatile|{.relaxed|.release}{.cta|.cluster|.gpu|.sys}|}"


@operation(
    f"st{_STORE_ORDER}{{.shared|.shared::cta|.shared::cluster|.local|}}{_VECTORS}.{_TYPES}",
    f"st{_STORE_ORDER}.global{_HINTS}{_VECTORS}.{_TYPES}",
    f"st{{.weak|}}.global{{.wb|.cg|.cs|.wt}}{_HINTS}{_VECTORS}.{_TYPES}",
    f"st{_STORE_ORDER}.global{_HINTS}.v8.{{b|u|s|f}}32",
    operands=(2, 3),
    destinations=0,
)
def _st(e: Emitter, i: Instruction) -> None:
    parts = i.parts
    kind, count, space = parts[-1], _count(parts), _space(parts)
    size = TYPE_BYTES[kind]
    address = e.address(i.operands[0])
    values = [e.value(item, 8 * size) for item in _items(i.operands[1], count)]
    texts = ", ".join(e.u(v) for v in values)
    if space == "local":
        e.emit(f"H.store_local(g, {e.u(address)}, {e.mask}, {size}, ({texts},))")
    else:
        e.emit(f"H.store(g, {space!r}, {e.u(address)}, {e.mask}, {size}, ({texts},){_order(parts)})")


@operation("prefetch{.global|.local|}.{L1|L2}{::evict_last|::evict_normal|}", "prefetchu.L1", operands=1, destinations=0)
@operation("prefetch{.const|.param|}.tensormap", "applypriority.global.L2::evict_normal", operands=(1, 2), destinations=0)
def _prefetch(e: Emitter, i: Instruction) -> None:
    e.address(i.operands[0])


@operation("discard.global.L2", operands=2, destinations=0)
def _discard(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.discard(g, {e.u(e.address(i.operands[0]))}, {e.mask})")  # the size is 128, whatever is written


@operation(
    "createpolicy.fractional.L2::{evict_first|evict_last|evict_normal|evict_unchanged}{.L2::{evict_first|evict_unchanged}|}.b64",
    operands=(1, 2),
)
def _createpolicy(e: Emitter, i: Instruction) -> None:
    e.assign(i.operands[0], literal(0, 64))  # policies have no effect here


# --- atom and red -----------------------------------------------------------------------------------------------------

_ATOMIC = "{.relaxed|.acquire|.release|.acq_rel|}{.cta|.cluster|.gpu|.sys|}{.global|.shared|.shared::cta|.shared::cluster|}"
_INTEGER = "{.add.{u32|s32|u64}|.{min|max}.{u32|s32|u64|s64}|.{and|or|xor}.{b32|b64}|.{inc|dec}.u32}"
_FLOAT = ".add{.noftz.{f16x2|bf16x2}|.{f32|f64}}"


# ptxas also takes the operation before order, scope and space
@operation(f"atom.add{_ATOMIC}.{{u32|s32|u64|f32}}", operands=3)
@operation(f"atom{_ATOMIC}{_INTEGER}", f"atom{_ATOMIC}{_FLOAT}", f"atom{_ATOMIC}.exch.{{b32|b64}}", operands=3)
@operation(f"atom{_ATOMIC}.cas.{{b32|b64}}", operands=4)
def _atom(e: Emitter, i: Instruction) -> None:
    kind = i.parts[-1]
    name = next(each for each in i.parts[1:] if each in ("add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas"))
    bits = 8 * TYPE_BYTES[kind]
    address = e.address(i.operands[1])
    values = [e.value(each, bits) for each in i.operands[2:]]
    texts = ", ".join(e.u(v) for v in values)
    local = e.let(f"H.atomic(g, {_space(i.parts)!r}, {e.u(address)}, {e.mask}, {name!r}, {kind!r}, ({texts},){_order(i.parts)})")
    e.assign(i.operands[0], Value(bits, "A", {"u": local}))


@operation(f"red{_ATOMIC}{_INTEGER}", f"red{_ATOMIC}{_FLOAT}", operands=2, destinations=0)
@operation("red{.relaxed|.release|}{.cta|.cluster|.gpu|.sys|}{.global|}.add{.v2|.v4}.f32", operands=2, destinations=0)
def _red(e: Emitter, i: Instruction) -> None:
    kind, count = i.parts[-1], _count(i.parts)
    name = next(each for each in i.parts[1:] if each in ("add", "min", "max", "and", "or", "xor", "inc", "dec"))
    address = e.address(i.operands[0])
    values = [e.value(item, 8 * TYPE_BYTES[kind]) for item in _items(i.operands[1], count)]
    texts = ", ".join(e.u(v) for v in values)
    e.emit(f"H.reduce(g, {_space(i.parts)!r}, {e.u(address)}, {e.mask}, {name!r}, {kind!r}, ({texts},){_order(i.parts)})")


# --- addresses --------------------------------------------------------------------------------------------------------

_WINDOWS = {"shared": SHARED_WINDOW, "param": PARAMETER_WINDOW, "global": 0, "const": 0}


@operation("cvta{.to|}.{shared|shared::cta|shared::cluster|global|param|const}.{u32|u64}", operands=2)
def _cvta(e: Emitter, i: Instruction) -> None:
    space, bits = i.parts[-2].split("::")[0], int(i.parts[-1][1:])
    window = _WINDOWS[space]
    value = e.value(i.operands[1], bits)
    if not window:
        e.assign(i.operands[0], value)
        return
    sign = "-" if i.parts[1] == "to" else "+"
    if bits == 32:
        raise EmulatorError("32-bit generic addresses are not modelled")
    if value.kind == "I":
        e.assign(i.operands[0], e.integer(64, f"{e.u(value)} {sign} {window} & 0xFFFFFFFFFFFFFFFF"))
    else:
        e.assign(i.operands[0], e.array(64, "u", f"{e.u(value)} {sign} {window}"))


@operation("mapa{.shared::cluster|}.{u32|u64}", operands=3)
def _mapa(e: Emitter, i: Instruction) -> None:
    bits = int(i.parts[-1][1:])
    a, rank = e.value(i.operands[1], bits), e.value(i.operands[2], 32)
    text = f"{{}} & {~0xFF000000 & ((1 << bits) - 1)} | {{}} << 24"
    if a.kind == "I" and rank.kind == "I":
        e.assign(i.operands[0], e.integer(bits, text.format(e.u(a), e.u(rank))))
    else:
        wide = f"{e.full(rank)}.astype(u{bits // 8})"
        e.assign(i.operands[0], e.array(bits, "u", f"({e.full(a)} & {~0xFF000000 & ((1 << bits) - 1)}) | ({wide} << 24)"))


@operation("getctarank{.shared::cluster|}.{u32|u64}", operands=2)
def _getctarank(e: Emitter, i: Instruction) -> None:
    bits = int(i.parts[-1][1:])
    a = e.value(i.operands[1], bits)
    text = "{} >> 24 & 255"
    if a.kind == "I":
        e.assign(i.operands[0], e.integer(32, text.format(e.u(a))))
    else:
        e.assign(i.operands[0], e.array(32, "u", f"({text.format(e.u(a))}).astype(u4)"))


@operation("isspacep.{global|shared|shared::cta|shared::cluster|param}", operands=2)
def _isspacep(e: Emitter, i: Instruction) -> None:
    space = i.parts[1].split("::")[0]
    a = e.value(i.operands[1], 64)
    low = _WINDOWS[space]
    high = 2 * low or SHARED_WINDOW
    if a.kind == "I":
        e.assign(i.operands[0], e.integer(1, f"{low} <= {e.u(a)} < {high}"))
    else:
        e.assign(i.operands[0], e.array(1, "u", f"({e.u(a)} >= {low}) & ({e.u(a)} < {high})"))


# --- across lanes -----------------------------------------------------------------------------------------------------


@operation("shfl.sync.{idx|bfly|up|down}.b32", operands=5)
def _shfl(e: Emitter, i: Instruction) -> None:
    source = i.operands[1]
    a = e.register(source.name, check=False) if isinstance(source, Register) else e.value(source, 32)
    b, c, members = (e.value(each, 32) for each in i.operands[2:])
    mode = i.parts[2]
    target = i.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    if a.kind == "I" and second is None and b.kind == "I" and c.kind == "I":
        e.assign(first, a)  # every lane reads the same value
        return
    text = f"H.shuffle(g, {mode!r}, {e.full(a)}, {e.u(b)}, {e.u(c)}, {e.u(members)}, {e.mask}, {a.defined or None})"
    value, inside = e.let(text), ""
    if mode == "idx" and b.kind == "I" and c.literal == 31 and e.key.single_warp:
        e.assign(first, e.integer(32, f"int({value}[0][0])"))
    else:
        e.assign(first, e.array(32, "u", f"{value}[0]"))
    if second is not None:
        inside = e.let(f"{value}[1]")
        e.assign(second, Value(1, "A", {"u": inside}))


@operation("vote.sync.{all|any|uni}.pred", "vote.sync.ballot.b32", operands=3)
def _vote(e: Emitter, i: Instruction) -> None:
    p, members = e.value(i.operands[1], 1), e.value(i.operands[2], 32)
    local = e.let(f"H.vote(g, {i.parts[2]!r}, {e.full(p)}, {e.u(members)}, {e.mask})")
    bits = 32 if i.parts[2] == "ballot" else 1
    if e.key.single_warp:
        e.assign(i.operands[0], e.integer(bits, f"{local}[0].item()"))
    else:
        e.assign(i.operands[0], Value(bits, "A", {"u": local}))


@operation("redux.sync.{add|min|max}.{u32|s32}", "redux.sync.{and|or|xor}.b32", "redux.sync.{min|max}{.abs|}{.NaN|}.f32", operands=3)
def _redux(e: Emitter, i: Instruction) -> None:
    a, members = e.value(i.operands[1], 32), e.value(i.operands[2], 32)
    local = e.let(f"H.redux(g, {i.parts[2]!r}, {i.parts[-1]!r}, {e.full(a)}, {e.u(members)}, {e.mask}, {'abs' in i.parts}, {'NaN' in i.parts})")
    if e.key.single_warp:
        e.assign(i.operands[0], e.integer(32, f"int({local}[0])"))
    else:
        e.assign(i.operands[0], Value(32, "A", {"u": local}))


@operation("match.{any|all}.sync.{b32|b64}", operands=3)
def _match(e: Emitter, i: Instruction) -> None:
    a, members = e.value(i.operands[1], int(i.parts[3][1:])), e.value(i.operands[2], 32)
    target = i.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    if second is not None and i.parts[1] == "any":
        raise EmulatorError("match.any has no predicate")
    local = e.let(f"H.match(g, {i.parts[1]!r}, {e.full(a)}, {e.u(members)}, {e.mask})")
    e.assign(first, e.array(32, "u", f"{local}[0]"))
    if second is not None:
        e.assign(second, e.array(1, "u", f"{local}[1]"))


@operation("activemask.b32", operands=1)
def _activemask(e: Emitter, i: Instruction) -> None:
    e.assign(i.operands[0], e.array(32, "u", f"H.activemask(g, {e.mask})"))


@operation("elect.sync", operands=2)
def _elect(e: Emitter, i: Instruction) -> None:
    members = e.value(i.operands[1], 32)
    target = i.operands[0]
    if not isinstance(target, Pair):
        raise EmulatorError("elect.sync writes d|p")
    local = e.let(f"H.elect(g, {e.u(members)}, {e.mask})")
    e.assign(target.first, e.array(32, "u", f"{local}[0]"))
    e.assign(target.second, e.array(1, "u", f"{local}[1]"))


# --- matrices ---------------------------------------------------------------------------------------------------------


@operation("ldmatrix.sync.aligned.m8n8.{x1|x2|x4}{.trans|}{.shared|.shared::cta|}.b16", operands=2)
@operation("ldmatrix.sync.aligned.m16n16.{x1|x2}.trans{.shared|.shared::cta|}.b8", operands=2)
def _ldmatrix(e: Emitter, i: Instruction) -> None:
    count = int(next(each for each in i.parts if each in ("x1", "x2", "x4"))[1:])
    element = i.parts[-1]
    items = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    registers = count * (2 if element == "b8" else 1)
    if len(items) != registers:
        raise EmulatorError(f"{len(items)} registers, {registers} needed")
    address = e.address(i.operands[1])
    local = e.let(f"H.ldmatrix(g, {e.u(address)}, {e.mask}, {count}, {'trans' in i.parts}, {element!r})")
    for n, item in enumerate(items):
        e.assign(item, e.array(32, "u", f"{local}[{n}]"))


@operation("stmatrix.sync.aligned.m8n8.{x1|x2|x4}{.trans|}{.shared|.shared::cta|}.b16", operands=2, destinations=0)
@operation("stmatrix.sync.aligned.m16n8.{x1|x2|x4}.trans{.shared|.shared::cta|}.b8", operands=2, destinations=0)
def _stmatrix(e: Emitter, i: Instruction) -> None:
    count = int(next(each for each in i.parts if each in ("x1", "x2", "x4"))[1:])
    items = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    if len(items) != count:
        raise EmulatorError(f"{len(items)} registers, {count} needed")
    address = e.address(i.operands[0])
    texts = ", ".join(e.u(e.value(item, 32)) for item in items)
    e.emit(f"H.stmatrix(g, {e.u(address)}, {e.mask}, {count}, {'trans' in i.parts}, {i.parts[-1]!r}, ({texts},))")


_MMA = "mma.sync.aligned.m16n8k"


@operation(
    f"{_MMA}{{8|16}}.row.col.f32.f16.f16.f32",
    f"{_MMA}{{8|16}}.row.col.f16.f16.f16.f16",
    f"{_MMA}{{8|16}}.row.col.f32.bf16.bf16.f32",
    f"{_MMA}{{4|8}}.row.col.f32.tf32.tf32.f32",
    f"{_MMA}{{16|32}}.row.col.f32.{{e4m3|e5m2}}.{{e4m3|e5m2}}.f32",
    f"{_MMA}{{16|32}}.row.col{{.satfinite|}}.s32.{{s8|u8}}.{{s8|u8}}.s32",
    operands=4,
)
def _mma(e: Emitter, i: Instruction) -> None:
    d_type, a_type, b_type, c_type = i.parts[-4:]
    unit = make_mma(int(i.parts[3].split("k")[1]), a_type, b_type, c_type, d_type, "satfinite" in i.parts)
    vectors = [each.items if isinstance(each, Vector) else (each,) for each in i.operands]
    wanted = (unit.c_registers, unit.a_registers, unit.b_registers, unit.c_registers)
    if tuple(map(len, vectors)) != wanted:
        raise EmulatorError(f"{tuple(map(len, vectors))} registers, {wanted} needed")
    texts = ", ".join(e.u(e.value(item, 32)) for vector in vectors[1:] for item in vector)
    local = e.let(f"H.mma(g, {e.constant(unit)}, {e.mask}, ({texts}))")
    names = [e.name() for _ in vectors[0]]
    e.emit(f"{', '.join(names)} = {local}")
    for name, item in zip(names, vectors[0], strict=True):
        e.assign(item, Value(32, "A", {"u": name}))
