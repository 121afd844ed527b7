"""Translation of barriers, fences, bulk copies' bookkeeping and other control instructions.

Sources: PTX ISA 9.x, 9.7.13 (``bar``, ``barrier``, ``membar``, ``fence``, ``mbarrier``, ``griddepcontrol``), 9.7.9.27 (bulk copies), 9.7.19
(``nanosleep``, ``setmaxnreg``). Fences have no effect on values here; race detection uses them.
"""

from __future__ import annotations

from densemoe.compile.emulator.emitter import Emitter, Value
from densemoe.compile.emulator.operations import operation
from densemoe.compile.emulator.parser import Instruction, Operand, Register, Sink, Vector
from densemoe.runtime.errors import EmulatorError

_WAIT = 3  # translation.WAIT


def _text(e: Emitter, operand: Operand, bits: int = 32) -> str:
    return e.u(e.value(operand, bits))


# --- CTA, warp and cluster barriers -----------------------------------------------------------------------------------


@operation("bar.sync", "bar{.cta|}.sync.aligned", "barrier{.cta|}.sync{.aligned|}", "bar.cta.sync", operands=(1, 2), destinations=0, blocking=True)
def _bar_sync(e: Emitter, i: Instruction) -> None:
    threads = _text(e, i.operands[1]) if len(i.operands) > 1 else "0"
    e.emit(f"if not H.bar_sync(g, {e.mask}, {_text(e, i.operands[0])}, {threads}, True): return {_WAIT}")


@operation("bar{.cta|}.arrive", "barrier{.cta|}.arrive{.aligned|}", operands=2, destinations=0)
def _bar_arrive(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.bar_sync(g, {e.mask}, {_text(e, i.operands[0])}, {_text(e, i.operands[1])}, False)")


@operation("bar{.cta|}.red.popc.u32", "barrier{.cta|}.red.popc{.aligned|}.u32", operands=(3, 4), blocking=True)
@operation("bar{.cta|}.red.{and|or}.pred", "barrier{.cta|}.red.{and|or}{.aligned|}.pred", operands=(3, 4), blocking=True)
def _bar_red(e: Emitter, i: Instruction) -> None:
    name = next(each for each in i.parts if each in ("popc", "and", "or"))
    number = e.value(i.operands[1], 32)
    threads = e.value(i.operands[2], 32) if len(i.operands) == 4 else None
    if number.kind == "A" or (threads is not None and threads.kind == "A"):
        raise EmulatorError("bar.red with a barrier that differs between lanes is not modelled")
    predicate = e.value(i.operands[-1], 1)
    local = e.let(f"H.bar_red(g, {e.mask}, {e.u(number)}, {e.u(threads) if threads else 0}, {e.full(predicate)}, {name!r})")
    e.emit(f"if {local} is None: return {_WAIT}")
    e.assign(i.operands[0], Value(32 if name == "popc" else 1, "A", {"u": local}))


@operation("bar.warp.sync", operands=1, destinations=0)
def _warp_sync(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.warp_sync(g, {_text(e, i.operands[0])}, {e.mask})")


@operation("barrier.cluster.arrive{.release|.relaxed|}{.aligned|}", operands=0, destinations=0)
def _cluster_arrive(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.cluster_arrive(g, {e.mask}, {'relaxed' not in i.parts})")


@operation("barrier.cluster.wait{.acquire|}{.aligned|}", operands=0, destinations=0, blocking=True)
def _cluster_wait(e: Emitter, i: Instruction) -> None:
    e.emit(f"if not H.cluster_wait(g, {e.mask}): return {_WAIT}")


# --- fences and control -----------------------------------------------------------------------------------------------


@operation(
    "membar.{cta|gl|sys}",
    "fence{.sc|.acq_rel|.acquire|.release}.{cta|cluster|gpu|sys}",
    "fence.mbarrier_init.release.cluster",
    "fence.{acquire|release}.sync_restrict::shared::{cluster|cta}.cluster",
    "fence.proxy.alias",
    "fence.proxy.tensormap::generic.release.{cta|cluster|gpu|sys}",
    operands=0,
    destinations=0,
)
def _fence(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.fence(g, {e.mask}, {i.opcode!r})")


@operation("fence.proxy.async{.global|.shared::{cta|cluster}|}", "membar.proxy.async{.global|.shared::{cta|cluster}|}", operands=0, destinations=0)
def _proxy_fence(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.proxy_fence(g, {e.mask})")


@operation("fence.proxy.tensormap::generic.acquire.{cta|cluster|gpu|sys}", operands=2, destinations=0)
@operation("setmaxnreg.{inc|dec}.sync.aligned.u32", operands=1, destinations=0)
@operation("griddepcontrol.launch_dependents", "pmevent", operands=(0, 1), destinations=0)
def _harmless(e: Emitter, i: Instruction) -> None:
    if i.opcode.startswith("setmaxnreg"):
        registers = e.value(i.operands[0], 32).literal
        if registers is None or not 24 <= registers <= 256 or registers % 8:
            raise EmulatorError(f"setmaxnreg {registers}: 24 to 256, a multiple of 8")


@operation("nanosleep.u32", operands=1, destinations=0)
def _sleep(e: Emitter, i: Instruction) -> None:
    e.emit("g.sleeps = True")  # a polling warp: its turn is over


@operation("griddepcontrol.wait", operands=0, destinations=0)
def _wait_for_launches(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.wait_for_launches(g, {e.mask})")


# --- mbarriers --------------------------------------------------------------------------------------------------------

_SHARED = "{.shared|.shared::cta|}"
_SCOPES = "{.release|.relaxed|}{.cta|.cluster|}"


@operation(f"mbarrier.init{_SHARED}.b64", operands=2, destinations=0)
def _mbarrier_init(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.mbarrier_init(g, {_barrier(e, i.operands[0], i)}, {e.mask}, {_text(e, i.operands[1])})")


@operation(f"mbarrier.inval{_SHARED}.b64", operands=1, destinations=0)
def _mbarrier_inval(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.mbarrier_inval(g, {_barrier(e, i.operands[0], i)}, {e.mask})")


def _barrier(e: Emitter, operand: Operand, i: Instruction) -> str:
    """Shared address of an mbarrier operand; generic ones lose their window."""
    value = e.address(operand)
    if any(each.startswith("shared") for each in i.parts):
        return e.u(value)
    return f"H.generic_shared({e.u(value)})"


def _arrive(e: Emitter, i: Instruction, target: Operand | None, address: Operand, count: str, nbytes: str, drop: bool) -> None:
    text = f"H.mbarrier_arrive(g, {_barrier(e, address, i)}, {e.mask}, {count}, {nbytes}, {drop}, {'relaxed' in i.parts})"
    if isinstance(target, Register):
        e.assign(target, Value(64, "A", {"u": e.let(text)}))
    else:
        e.emit(text)


@operation(f"mbarrier.{{arrive|arrive_drop}}{_SCOPES}{_SHARED}.b64", operands=(1, 2, 3))
def _mbarrier_arrive(e: Emitter, i: Instruction) -> None:
    first = i.operands[0]
    has_target = isinstance(first, Register | Sink)
    rest = i.operands[1:] if has_target else i.operands
    count = _text(e, rest[1]) if len(rest) > 1 else "1"
    _arrive(e, i, first if has_target else None, rest[0], count, "None", "arrive_drop" in i.parts)


@operation(f"mbarrier.arrive{_SCOPES}.shared::cluster.b64", operands=(1, 2, 3))
def _mbarrier_arrive_cluster(e: Emitter, i: Instruction) -> None:
    rest = i.operands[1:] if isinstance(i.operands[0], Sink) else i.operands
    if isinstance(rest[0], Register):
        raise EmulatorError("an arrive on shared::cluster returns no state")
    _arrive(e, i, None, rest[0], _text(e, rest[1]) if len(rest) > 1 else "1", "None", False)


@operation(f"mbarrier.arrive.expect_tx{_SCOPES}{{.shared|.shared::cta|.shared::cluster|}}.b64", operands=(2, 3))
def _mbarrier_arrive_expect(e: Emitter, i: Instruction) -> None:
    rest = i.operands[1:] if len(i.operands) == 3 else i.operands
    target = i.operands[0] if len(i.operands) == 3 else None
    _arrive(e, i, target, rest[0], "1", _text(e, rest[1]), False)


@operation("mbarrier.{expect_tx|complete_tx}{.relaxed|}{.cta|.cluster|}{.shared|.shared::cta|.shared::cluster|}.b64", operands=2, destinations=0)
def _mbarrier_expect(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.mbarrier_expect(g, {_barrier(e, i.operands[0], i)}, {e.mask}, {_text(e, i.operands[1])}, {i.parts[1] == 'complete_tx'})")


@operation(f"mbarrier.try_wait{{.parity|}}{{.acquire|.relaxed|}}{{.cta|.cluster|}}{_SHARED}.b64", operands=(3, 4), blocking=True)
def _mbarrier_try_wait(e: Emitter, i: Instruction) -> None:
    parity = "parity" in i.parts
    value = _text(e, i.operands[2], 32 if parity else 64)
    address = _barrier(e, i.operands[1], i)
    e.emit(f"if not H.mbarrier_wait(g, {address}, {e.mask}, {value}, {parity}, {'relaxed' in i.parts}): return {_WAIT}")
    e.assign(i.operands[0], Value(1, "I", {"u": "True"}))


@operation(f"mbarrier.test_wait{{.parity|}}{{.acquire|.relaxed|}}{{.cta|.cluster|}}{_SHARED}.b64", operands=3)
def _mbarrier_test_wait(e: Emitter, i: Instruction) -> None:
    parity = "parity" in i.parts
    value = _text(e, i.operands[2], 32 if parity else 64)
    seen = f"H.mbarrier_test(g, {_barrier(e, i.operands[1], i)}, {e.mask}, {value}, {parity}, {'relaxed' in i.parts})"
    e.assign(i.operands[0], e.array(1, "u", seen))


@operation("mbarrier.pending_count.b64", operands=2)
def _mbarrier_pending(e: Emitter, i: Instruction) -> None:
    state = e.value(i.operands[1], 64)
    e.assign(i.operands[0], e.array(32, "u", f"({e.full(state)} & 0xFFFFF).astype(u4)"))


# --- bulk copies ------------------------------------------------------------------------------------------------------


def _hint(e: Emitter, i: Instruction, operands: tuple[Operand, ...]) -> tuple[Operand, ...]:
    """The operands without the cache policy."""
    if "L2::cache_hint" in i.opcode:
        e.value(operands[-1], 64)
        return operands[:-1]
    return operands


_LOAD = "cp.async.bulk.shared::{cluster|cta}.global.mbarrier::complete_tx::bytes"


@operation(f"{_LOAD}{{.L2::cache_hint|}}", "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes", operands=(4, 5), destinations=0)
@operation("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster{.L2::cache_hint|}", operands=(5, 6), destinations=0)
def _bulk_load(e: Emitter, i: Instruction) -> None:
    multicast = "multicast" in i.opcode
    operands = _hint(e, i, i.operands)
    if len(operands) != (5 if multicast else 4):
        raise EmulatorError(f"{len(i.operands)} operands")
    target, barrier = e.u(e.address(operands[0])), e.u(e.address(operands[3]))
    source, size = e.u(e.address(operands[1])), _text(e, operands[2])
    ctas = _text(e, operands[4], 16) if multicast else "None"
    shared = ".shared::cluster.shared::cta." in i.opcode
    e.emit(f"H.bulk_load(g, {e.mask}, {target}, {source}, {size}, {barrier}, {ctas}, {shared})")


@operation("cp.async.bulk.global.shared::cta.bulk_group{.L2::cache_hint|}{.cp_mask|}", operands=(3, 4, 5), destinations=0)
def _bulk_store(e: Emitter, i: Instruction) -> None:
    if "cp_mask" in i.opcode:
        raise EmulatorError(".cp_mask is not modelled")
    operands = _hint(e, i, i.operands)
    target, source, size = e.u(e.address(operands[0])), e.u(e.address(operands[1])), _text(e, operands[2])
    e.emit(f"H.bulk_store(g, {e.mask}, {target}, {source}, {size}, '', '')")


_REDUCE = "{.add.noftz.{f16|bf16}|.{add|min|max}.{u32|s32|u64|s64}|.add.{f32|f64}|.{inc|dec}.u32|.{and|or|xor}.{b32|b64}|.{min|max}.{f16|bf16}}"


@operation(f"cp.reduce.async.bulk.global.shared::cta.bulk_group{{.L2::cache_hint|}}{_REDUCE}", operands=(3, 4), destinations=0)
def _bulk_reduce(e: Emitter, i: Instruction) -> None:
    operands = _hint(e, i, i.operands)
    target, source, size = e.u(e.address(operands[0])), e.u(e.address(operands[1])), _text(e, operands[2])
    names = [each for each in i.parts if each in ("add", "min", "max", "inc", "dec", "and", "or", "xor")]
    e.emit(f"H.bulk_store(g, {e.mask}, {target}, {source}, {size}, {names[0]!r}, {i.parts[-1]!r})")


@operation("cp.async.bulk.prefetch.L2.global{.L2::cache_hint|}", operands=(2, 3), destinations=0)
def _bulk_prefetch(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.bulk_prefetch(g, {e.mask}, {e.u(e.address(i.operands[0]))}, {_text(e, i.operands[1])})")


@operation("cp.async.bulk.commit_group", operands=0, destinations=0)
def _bulk_commit(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.bulk_commit(g, {e.mask})")


@operation("cp.async.bulk.wait_group{.read|}", operands=1, destinations=0, blocking=True)
def _bulk_wait(e: Emitter, i: Instruction) -> None:
    e.emit(f"if not H.bulk_wait(g, {e.mask}, {_text(e, i.operands[0])}, {'read' in i.parts}): return {_WAIT}")


@operation(
    "st.async{.weak|}{.shared::cluster|}.mbarrier::complete_tx::bytes{.v2|.v4|}.{b32|u32|s32|f32|b64|u64|s64|f64}", operands=3, destinations=0
)
def _st_async(e: Emitter, i: Instruction) -> None:
    size = int(i.parts[-1][1:]) // 8
    items = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    if len(items) != next((int(each[1]) for each in i.parts if each in ("v2", "v4")), 1):
        raise EmulatorError(f"{len(items)} registers")
    values = ", ".join(_text(e, item, 8 * size) for item in items)
    target, barrier = e.u(e.address(i.operands[0])), e.u(e.address(i.operands[2]))
    e.emit(f"H.st_async(g, {e.mask}, {target}, {barrier}, {size}, ({values},))")


# --- cp.async ---------------------------------------------------------------------------------------------------------


@operation(
    "cp.async.ca{.shared|.shared::cta}.global{.L2::cache_hint|}{.L2::{64|128|256}B|}",
    "cp.async.cg{.shared|.shared::cta}.global{.L2::cache_hint|}{.L2::{64|128|256}B|}",
    operands=(3, 4, 5),
    destinations=0,
)
def _cp_async(e: Emitter, i: Instruction) -> None:
    operands = _hint(e, i, i.operands)
    size = e.value(operands[2], 32).literal
    if size not in (4, 8, 16) or (i.parts[2] == "cg" and size != 16):
        raise EmulatorError(f"cp.async of {size} bytes: 4, 8 or 16, with .cg 16")
    target, source = e.u(e.address(operands[0])), e.u(e.address(operands[1]))
    valid = "None"
    if len(operands) == 4:
        given = e.value(operands[3], 32)
        if given.bits == 1:
            raise EmulatorError("cp.async with ignore-src is not modelled")
        valid = e.u(given)
    e.emit(f"H.cp_async(g, {e.mask}, {target}, {source}, {size}, {valid})")


@operation("cp.async.commit_group", operands=0, destinations=0)
def _cp_commit(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.cp_commit(g, {e.mask})")


@operation("cp.async.wait_group", operands=1, destinations=0, blocking=True)
@operation("cp.async.wait_all", operands=0, destinations=0, blocking=True)
def _cp_wait(e: Emitter, i: Instruction) -> None:
    groups = _text(e, i.operands[0]) if i.operands else "None"
    e.emit(f"if not H.cp_wait(g, {e.mask}, {groups}): return {_WAIT}")


@operation("cp.async.mbarrier.arrive{.noinc|}{.shared|.shared::cta|}.b64", operands=1, destinations=0)
def _cp_mbarrier(e: Emitter, i: Instruction) -> None:
    e.emit(f"H.cp_mbarrier_arrive(g, {e.mask}, {_barrier(e, i.operands[0], i)}, {'noinc' in i.parts})")
