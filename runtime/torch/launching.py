"""How the ops launch: Plans made once for everything that their checks depend on, then pointed to each call's tensors.

A call whose key is known writes the addresses that moved into the parameter blocks and launches; nothing else is done twice. A call like the one
before with the same weights finds its Plans by their address.

Memory. Workspaces (zero between launches) belong to one stream, or to one capture of a CUDA graph: no two streams and no two graphs share any.
Layers of one stream run one after another, each kernel after all before it has ended (``griddepcontrol.wait``), and a lock keeps the launches of
a call together: they share theirs. So they do with what lies between the launches of a call, up to 16 MB; more, and what a graph captures, is
an allocation of torch's for that call alone. What is shared comes from the driver, not from torch's allocator: a graph's private pool stays what
torch believes it to be.

Plans and workspaces that a graph captured are kept for the life of the process, since nothing says when the graph ends. The other Plans are
dropped when there are many: those first that have not been used for the longest time.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

import torch

from densemoe.runtime.errors import DriverError, PlanError, ProblemError
from densemoe.runtime.grouping import group_tile, sorts_itself
from densemoe.runtime.loader import Loader
from densemoe.runtime.plan import Plan, packed_weight_bytes
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import evaluate
from densemoe.runtime.select import load_table
from densemoe.runtime.variant import DETERMINISTIC, GROUPED_OPS, ROUNDED, ROUTES

__all__ = ["Entry", "Launch", "Runtime", "Shortcut", "Source", "check_aligned", "runtime", "use_runtime"]

Tensor = Any
Owner = tuple[str, int, int]  # (stream or capture, device, which)
Facts = tuple[Any, ...]  # what decides beside tensors and stream what is launched

KEPT_ENTRIES: Final = 4096  # some 10 KB of host memory each; a served model has layers x token counts of them
KEPT_SCRATCH: Final = 16 << 20  # bytes between the launches of a call that a stream keeps
SMALLEST_WORKSPACE: Final = 1 << 16  # bytes; a larger one is made where a call needs more
_OUT_OF_MEMORY: Final = 2  # CUresult
_INVALID_CONTEXT: Final = 201
_ONE: Final = b"\x00\x00\x80\x3f"  # float32 1.0


@dataclass(frozen=True)
class Source:
    """A tensor of a call, or its scratch.

    Attributes:
        name: in messages.
        alignment: of its address, in bytes.
        nbytes: its size.
        uses: (launch, role there, offset in bytes) of each kernel that is pointed to it.
        fixed: whether its address belongs to the entry's key, so that no call of the entry has another.
    """

    name: str
    alignment: int = 1
    nbytes: int = 0
    uses: tuple[tuple[int, str, int], ...] = ()
    fixed: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch of a call, before there is a Plan.

    Attributes:
        layout, weight_bytes: of the packed weights, where the op has some.
        facts: settings that state something of the call's launches; a kernel that has no use for one has no such setting.
        fixed: addresses by role that no call changes.
    """

    problem: Problem
    layout: str | None = None
    weight_bytes: int = 0
    facts: Mapping[str, int] | None = None
    fixed: Mapping[str, int] | None = None


def check_aligned(source: Source, pointer: int) -> None:
    """ProblemError where an address is not aligned."""
    if pointer % source.alignment:
        raise ProblemError(f"{source.name} begins at {pointer:#x}: align it to {source.alignment} bytes")


class Entry:
    """The Plans of one key, and where in their parameter blocks each address of a call belongs.

    Attributes:
        plans: in launch order; none for M = 0.
        scratch: bytes that a call allocates for what lies between its launches; 0 where the stream keeps them.
        used: how many entries had been made when it was launched last.
        key: of the Runtime's ``entries``; None where a capture owns it.
        ordinal, stream: the device and the stream that it is for; of a capture's entry the capture.
    """

    def __init__(self, runtime: Runtime, owner: Owner, plans: tuple[Plan, ...], sources: Sequence[Source], scratch: int = 0) -> None:
        self.plans, self.sources, self.scratch, self.used = plans, tuple(sources), scratch, runtime.made
        self.key: Any = None
        self._runtime, (_, self.ordinal, self.stream) = runtime, owner
        self._turn = runtime.turn(owner)
        self._launch = runtime.loader.driver.launcher(*[plan.prepared for plan in plans]) if plans else None
        self._bound: tuple[int, ...] = (-1,) * len(self.sources)
        self._nowhere = self._bound
        words = [plan.words() for plan in plans]
        #: (source's position, its alignment, parameter block as 64-bit words, index, offset) of each word that holds an address which calls change
        self._slots: list[tuple[int, int, memoryview, int, int]] = []
        #: (source's position, its alignment, Plan, role, offset) of each such address that stands in tensor maps
        self._encoded: list[tuple[int, int, Plan, str, int]] = []
        for position, source in enumerate(self.sources):
            for launch, role, offset in source.uses if plans and not source.fixed else ():
                found = words[launch]
                if found is None:
                    self._encoded.append((position, source.alignment, plans[launch], role, offset))
                else:
                    places = found[1].get(role, ())
                    self._slots += [(position, source.alignment, found[0], index, offset + inner) for index, inner in places]

    def launch(self, pointers: tuple[int, ...], stream: int, here: bool | None = None) -> None:
        """Launches every Plan on ``stream``, pointed to ``pointers``: an address for each source, 0 for an absent one.

        Args:
            here: whether the entry's device is the current one, where the caller knows.

        Raises:
            ProblemError: an address is not aligned; nothing was launched.
        """
        self.used = self._runtime.made
        launch, turn = self._launch, self._turn
        if launch is None:
            return
        turn.get()
        try:
            if pointers != self._bound:
                self._point(pointers)
            if self._runtime.current_device() == self.ordinal if here is None else here:
                try:
                    launch(stream)
                except DriverError as error:
                    if error.code != _INVALID_CONTEXT:
                        raise
                    self._launch_guarded(launch, stream)  # the thread had no context, so the first launch failed
            else:
                self._launch_guarded(launch, stream)
        finally:
            turn.put(None)

    def _launch_guarded(self, launch: Callable[[int], None], stream: int) -> None:
        with self._runtime.on_device(self.ordinal):
            launch(stream)

    def _point(self, pointers: tuple[int, ...]) -> None:
        before, self._bound = self._bound, self._nowhere  # until everything is written
        for position, alignment, block, index, offset in self._slots:
            pointer = pointers[position]
            if pointer != before[position]:
                if pointer % alignment:
                    check_aligned(self.sources[position], pointer)
                block[index] = pointer + offset
        if self._encoded:
            self._encode(pointers, before)
        self._bound = pointers

    def _encode(self, pointers: tuple[int, ...], before: tuple[int, ...]) -> None:
        again: dict[Plan, dict[str, int]] = {}
        for position, alignment, plan, role, offset in self._encoded:
            pointer = pointers[position]
            if pointer != before[position]:
                if pointer % alignment:
                    check_aligned(self.sources[position], pointer)
                again.setdefault(plan, {})[role] = pointer + offset
        for plan, addresses in again.items():
            plan.rebind(addresses)

    def check_apart(self, pointers: tuple[int, ...], output: int) -> None:
        """ProblemError where the caller's output at position ``output`` lies over another tensor of the call."""
        start = pointers[output]
        end = start + self.sources[output].nbytes
        for position, (pointer, source) in enumerate(zip(pointers, self.sources, strict=True)):
            if position != output and pointer < end and start < pointer + source.nbytes:
                raise ProblemError(f"{self.sources[output].name} (output) overlaps {source.name}: give each memory of its own")

    def close(self) -> None:
        """Closes the Plans; a launch that follows raises their PlanError."""
        for plan in self.plans:
            plan.close()
            self._launch = plan.launch


class Shortcut:
    """An entry found by a short key. ``check`` says in one call of PyTorch's whether tensors are of the types, dtypes, devices, shapes and strides of
    those that the entry was found for with its full key; where they are not, or one of them is given twice, the full key decides.

    Attributes:
        facts: what decides beside the tensors and the stream what is launched.
        ordinal, stream: the entry's.
        alone: whether no other device than the entry's can be the current one.
        output, second: make the op's outputs while that device is the current one; output_elsewhere, second_elsewhere: while another is.
            ``second`` is the output itself where all calls give the same one.
    """

    __slots__ = ("alone", "check", "entry", "facts", "ordinal", "output", "output_elsewhere", "second", "second_elsewhere", "stream")

    def __init__(self, check: Callable[..., bool], facts: Facts, entry: Entry, alone: bool, output: Callable[[], Tensor], second: Any) -> None:
        self.check, self.facts, self.entry, self.alone, self.ordinal, self.stream = check, facts, entry, alone, entry.ordinal, entry.stream
        self.output, self.output_elsewhere = _allocation(output), output
        self.second, self.second_elsewhere = _allocation(second), second


def _allocation(make: Any) -> Any:
    """``make``, a prepared ``torch.empty`` of a shape, by the function that compiled code of torch allocates with, on the current device: less of the
    host's time. ``make`` itself where this torch lacks it or it gives something else, or where it is anything else."""
    if not isinstance(make, partial):
        return make
    device, dtype = make.keywords["device"], make.keywords["dtype"]
    allocate = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)
    if device.type != "cuda" or allocate is None:
        return make
    shape: tuple[int, ...] = make.args
    strides = tuple(math.prod(max(1, each) for each in shape[place + 1 :]) for place in range(len(shape)))
    found = partial(allocate, shape, strides, dtype)
    try:
        with torch.cuda.device(device):
            one, other = found(), make()
    except (TypeError, RuntimeError):
        return make
    return found if (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, other.device) else make


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """What compares tensors with ``tensors``: the function that torch.compile's guards use. None where this torch has none, or it refuses these."""
    try:
        check: Callable[..., bool] = torch._C._dynamo.guards.TensorGuards(
            *tensors, dynamic_dims_sizes=[list(each.shape) for each in tensors], dynamic_dims_strides=[list(each.stride()) for each in tensors]
        ).check
        return check if check(*tensors) is True else None
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


Last = dict[int, Shortcut]  # the one used last, by the address of a tensor that stays where it is: the weights


@dataclass(frozen=True)
class _Layers:
    """What a device's set has for layers.

    Attributes:
        grouping: the part of the selection's table; None where it has none.
        grouped: of the grouped kernels op, output dtype, whether FC2 adds in one order and rows of a tile; none where the set cannot sort.
        sorting: those that sort the router's choice themselves: op, output dtype and rows of a tile.
        decoded: ``Runtime.reads_decoded``.
    """

    grouping: Mapping[str, Any] | None
    grouped: frozenset[tuple[str, str, bool, int]]
    sorting: frozenset[tuple[str, str, int]]
    decoded: bool


class Runtime:
    """What the ops launch through. One serves a process; tests give their own loader and callables.

    Args:
        loader: made on first use where absent.
        stream: current stream of a device as an address.
        capturing: whether that stream is being captured. Nobody asks it of stream 0, the legacy default one, which CUDA does not capture: the answer
            takes torch three calls of the driver.
        current_device: of this thread.
        guard: makes a device current, a context manager.
    """

    def __init__(
        self,
        loader: Loader | None = None,
        stream: Callable[[int], int] | None = None,
        capturing: Callable[[], bool] | None = None,
        current_device: Callable[[], int] | None = None,
        guard: Callable[[int], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._loader = loader
        # torch's own functions behind torch.cuda.current_stream (which makes an object at 2 us) and their like
        self.stream: Callable[[int], int] = stream or _torch("_cuda_getCurrentRawStream", lambda ordinal: 0)
        self.capturing: Callable[[], bool] = capturing or _torch("_cuda_isCurrentStreamCapturing", lambda: False)
        self.current_device: Callable[[], int] = current_device or _torch("_cuda_getDevice", lambda: 0)
        self._asks_torch = current_device is None
        self._guard = guard or torch.cuda.device
        self._lock = threading.RLock()  # making an entry may make the loader
        self.entries: dict[Any, Entry] = {}
        self.shortcuts: dict[Any, Shortcut] = {}
        self.last_quantize: Last = {}
        self.last_fc1: Last = {}
        self.last_fc2: Last = {}
        self.last_moe: Last = {}
        self.made = 0  # entries, so far
        self._captured: dict[Any, Entry] = {}
        self._workspaces: dict[tuple[Owner, str, bool], tuple[int, int]] = {}  # → (address, bytes)
        self._outgrown: list[int] = []
        self._turns: dict[Owner, SimpleQueue[None]] = {}
        self._ones: dict[int, int] = {}
        self._of_layers: dict[int, _Layers] = {}

    @property
    def loader(self) -> Loader:
        """The loader of this process.

        Raises:
            ArtifactError, DriverUnavailable: there are no kernels, or no driver.
        """
        if self._loader is None:
            with self._lock:
                if self._loader is None:
                    self._loader = Loader()
        return self._loader

    def on_device(self, ordinal: int) -> AbstractContextManager[Any]:
        """Makes a device current, its context too: a thread that never called CUDA has none."""
        guard = nullcontext() if self.current_device() == ordinal else self._guard(ordinal)
        return _WithContext(guard, self.loader, ordinal)

    def clear(self) -> None:
        """Forgets every Plan and workspace that no captured graph uses. The caller makes sure that none of them still runs."""
        with self._lock:
            for entry in self.entries.values():
                entry.close()
            self.entries.clear()
            self._forget_shortcuts()
            free = [key for key in self._workspaces if key[0][0] == "stream"]
            for pointer in (*self._outgrown, *(self._workspaces.pop(key)[0] for key in free)):
                self.loader.driver.free(pointer)
            self._outgrown.clear()

    def entry(self, key: Any, ordinal: int, stream: int, make: Callable[[Owner], Entry]) -> Entry:
        """The entry of ``key``, made where it is not there yet. While a graph is captured, the one of that capture.

        Args:
            make: is told whose workspaces the entry uses.
        """
        with self._lock, self.on_device(ordinal):
            if stream and self.capturing():
                capture = self.loader.driver.capture_id(stream)
                found = self._captured.get((capture, key))
                if found is None:
                    found = self._captured[capture, key] = make(("capture", ordinal, capture))
                return found
            found = self.entries.get(key)
            if found is None:
                if len(self.entries) >= KEPT_ENTRIES:
                    self._drop()
                self.made += 1
                found = self.entries[key] = make(("stream", ordinal, stream))
                found.key = key
            return found

    def shortcut(self, last: Last, address: int, facts: Facts, tensors: Sequence[Tensor]) -> Shortcut | None:
        """The shortcut of a call that the last one's does not fit; it is the last one's from now on.

        Args:
            last: of the op; address: there.
            facts: as for ``shorten``.
        """
        first = tensors[0]
        key = (self.stream(first.get_device()), first.numel(), first.dtype, facts)
        found = self.shortcuts.get(key)
        if found is None or not found.check(*tensors):
            return None
        if self._lock.acquire(blocking=False):  # another thread may be making an entry, which takes long, or dropping some
            try:
                if self.shortcuts.get(key) is found:
                    if len(last) >= KEPT_ENTRIES:
                        last.clear()
                    last[address] = found
            finally:
                self._lock.release()
        return found

    def shorten(
        self,
        last: Last,
        address: int,
        facts: Facts,
        entry: Entry,
        tensors: Sequence[Tensor],
        output: Callable[[], Tensor],
        second: Any = None,
    ) -> None:
        """Lets calls with these ``facts`` and tensors like these find ``entry``, unless it is a capture's or has been dropped.

        Args:
            last, address: as for ``shortcut``.
            facts: what decides beside the tensors and the stream what is launched: the op, which optional tensors there are, its other arguments.
            tensors: of the call, those with which a served model's calls differ first.
            output, second: make what the call gives: ``torch.empty`` with its shape as integers, its dtype and its device, or any other function;
                ``second`` may be the output itself.
        """
        check = _guards(tensors)
        with self._lock:
            if check is not None and self.entries.get(entry.key) is entry:
                if len(self.shortcuts) >= KEPT_ENTRIES:
                    self._forget_shortcuts()
                made = Shortcut(check, facts, entry, self._alone(), output, second)
                last[address] = self.shortcuts[entry.stream, tensors[0].numel(), tensors[0].dtype, facts] = made

    def _alone(self) -> bool:
        """Whether torch sees one device, which then is the current one of every thread."""
        return self._asks_torch and torch.cuda.device_count() == 1

    def _forget_shortcuts(self) -> None:
        for each in (self.shortcuts, self.last_quantize, self.last_fc1, self.last_fc2, self.last_moe):
            each.clear()

    def _drop(self) -> None:
        self._forget_shortcuts()
        # not closed: another thread may hold one and be about to launch it, and its Plans own no memory
        for key, _ in heapq.nsmallest(max(1, KEPT_ENTRIES // 64), self.entries.items(), key=lambda each: each[1].used):
            del self.entries[key]

    def plans(self, launches: Sequence[Launch], addresses: Sequence[Mapping[str, int]], owner: Owner) -> tuple[Plan, ...]:
        """The Plans of a call's launches.

        Raises:
            PlanError: weights in another layout than the kernel's.
            ProblemError: weights of another size than the layout gives.
        """
        return tuple(self._plan(launch, own, owner) for launch, own in zip(launches, addresses, strict=True))

    def _plan(self, launch: Launch, addresses: Mapping[str, int], owner: Owner) -> Plan:
        problem, ordinal = launch.problem, owner[1]
        choice = self.loader.select(problem, ordinal)
        entry = self.loader.kernel(choice.variant.key, ordinal).entry
        if launch.layout is not None and entry.layout != launch.layout:
            raise PlanError(f"the weights are packed as {launch.layout}, {entry.key} reads {entry.layout}: pack them for this device")
        needed = packed_weight_bytes(entry.layout, problem)
        if launch.weight_bytes != needed:
            raise ProblemError(f"{problem.op}: packed weights of {launch.weight_bytes} bytes: {entry.layout} of this problem has {needed}")
        names = entry.recipe.bind({**problem.names(), "sm_count": self.loader.driver.sm_count(ordinal)})
        workspace = {
            each.role: self._workspace(owner, each.role, each.zeroed, evaluate(each.nbytes, names), ordinal) for each in entry.recipe.workspaces
        }
        given = {**dict.fromkeys(problem.tensors(), 0), **addresses, **(launch.fixed or {})}
        known = dict(entry.recipe.settings)
        facts = {name: value for name, value in (launch.facts or {}).items() if name in known}
        return self.loader.plan(problem, given, ordinal, choice.variant.key, workspace, facts)

    def _workspace(self, owner: Owner, role: str, zeroed: bool, nbytes: int, ordinal: int) -> int:
        """Memory of ``owner``; kernels leave a zeroed one zero, so one that is large enough serves every size."""
        pointer, size = self._workspaces.get((owner, role, zeroed), (0, 0))
        if size < nbytes or not pointer:
            if pointer:
                self._outgrown.append(pointer)  # earlier Plans use it
            size = max(SMALLEST_WORKSPACE, 1 << (nbytes - 1).bit_length())
            pointer = self._allocate(size, b"", ordinal)
            self._workspaces[owner, role, zeroed] = (pointer, size)
        return pointer

    def kept_scratch(self, owner: Owner, nbytes: int) -> int:
        """Address of what lies between the launches of a stream's calls, or 0 where a call allocates it."""
        return 0 if owner[0] == "capture" or nbytes > KEPT_SCRATCH else self._workspace(owner, "scratch", False, nbytes, owner[1])

    def turn(self, owner: Owner) -> SimpleQueue[None]:
        """What keeps the launches of a call together on their stream: a lock that is taken with ``get`` and given back with ``put``, in two thirds of
        the time that a ``threading.Lock`` takes."""
        with self._lock:
            turn = self._turns.get(owner)
            if turn is None:
                turn = self._turns[owner] = SimpleQueue()
                turn.put(None)
            return turn

    def _allocate(self, nbytes: int, content: bytes, ordinal: int) -> int:
        try:
            return self.loader.driver.allocate_apart(nbytes, content)
        except DriverError as error:
            if error.code != _OUT_OF_MEMORY or self.capturing():
                raise
            torch.cuda.empty_cache()  # torch may hold memory that it does not use
            return self.loader.driver.allocate_apart(nbytes, content)

    def one(self, ordinal: int) -> int:
        """Address of a float32 1 on a device: the default form's divisor of alpha."""
        if ordinal not in self._ones:
            self._ones[ordinal] = self._allocate(len(_ONE), _ONE, ordinal)
        return self._ones[ordinal]

    def group_tile(self, ordinal: int, first: Problem, second: Problem, top_k: int, deterministic: bool = False) -> int:
        """Rows of a tile of the grouped form of a layer (``grouping.group_tile``), 0 where its form is the other.

        Args:
            first, second: FC1 and FC2 of the other form.
            deterministic: FC2 in one order.
        """
        tiles = [self._tiles(ordinal, each.op, each.c_dtype, deterministic) for each in (first, second)]
        return group_tile(self._layers(ordinal).grouping, tiles[0] & tiles[1], first.m, top_k, first.experts)

    def sorting_tile(self, ordinal: int, first: Problem, second: Problem, top_k: int) -> int:
        """Rows of a tile of the grouped form of a bf16 layer whose GEMMs sort the router's choice themselves (``grouping.sorts_itself``), 0 where its
        form is another.

        Args:
            first, second: FC1 and FC2 of the form over all tokens.
        """
        layers = self._layers(ordinal)
        tiles = [{tile for op, c_dtype, tile in layers.sorting if (op, c_dtype) == (f"grouped{each.op}", each.c_dtype)} for each in (first, second)]
        return sorts_itself(layers.grouping, tiles[0] & tiles[1], first.m, top_k)

    def reads_decoded(self, ordinal: int) -> bool:
        """Whether a layer's GEMMs over all tokens read NVFP4 activations as bf16: where the set has an FC1 that writes what FC2 then reads."""
        return self._layers(ordinal).decoded

    def _tiles(self, ordinal: int, op: str, c_dtype: str, deterministic: bool) -> set[int]:
        """Rows of the tiles that the device's set has grouped kernels of an op for, in a layer of this dtype."""
        wanted = (f"grouped{op}", c_dtype, deterministic and op == "fc2")
        return {tile for op, written, ordered, tile in self._layers(ordinal).grouped if (op, written, ordered) == wanted}

    def _layers(self, ordinal: int) -> _Layers:
        found = self._of_layers.get(ordinal)
        if found is None:
            variants = [each.variant for each in self.loader.manifest(ordinal).variants.values()]
            routes = any(each.op == "route" for each in variants)
            grouped = {
                (each.op, each.c_dtype, bool(each.option(DETERMINISTIC)), each.tile_m)
                for each in variants
                if each.op in GROUPED_OPS and routes and not each.option(ROUTES)
            }
            sorting = frozenset((each.op, each.c_dtype, each.tile_m) for each in variants if each.option(ROUTES))
            table = load_table(self.loader.manifest(ordinal).arch)
            decoded = any(each.option(ROUNDED) for each in variants)
            found = self._of_layers[ordinal] = _Layers(table.get("grouping"), frozenset(grouped), sorting, decoded)
        return found


class _WithContext(AbstractContextManager[None]):
    def __init__(self, guard: AbstractContextManager[Any], loader: Loader, ordinal: int) -> None:
        self._guard, self._loader, self._ordinal = guard, loader, ordinal

    def __enter__(self) -> None:
        self._guard.__enter__()
        if self._loader.driver.current_device() != self._ordinal:
            self._loader.driver.use_device(self._ordinal)

    def __exit__(self, *error: Any) -> None:
        self._guard.__exit__(*error)


def _torch(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch's that builds without CUDA lack."""
    return getattr(torch._C, name, otherwise)


#: The Runtime that the ops use; ``use_runtime`` changes it.
current: Runtime = Runtime()


def runtime() -> Runtime:
    """The Runtime that the ops use."""
    return current


def use_runtime(given: Runtime) -> Runtime:
    """Makes the ops use ``given``: another artifact root, or a test's driver. Returns the one used until now."""
    global current
    before, current = current, given
    return before
