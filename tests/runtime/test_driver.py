"""``runtime.driver`` over a CUDA binding that exists only here: each failure names the call, the code and what to do."""

from __future__ import annotations

import ctypes
import enum
import gc
import os
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import cuda.bindings
import pytest

from densemoe.runtime.driver import _IMAGES, Driver, LaunchConfig
from densemoe.runtime.errors import ArchitectureMismatch, DriverError, DriverTooOld, DriverUnavailable


class Result(enum.IntEnum):
    """CUresult, by NVIDIA's numbers."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_UNKNOWN = 999


class Attribute(enum.Enum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16


OK = Result.CUDA_SUCCESS
VALUES = {Attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9, Attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0}


class Binding(types.SimpleNamespace):
    """What ``cuda.bindings.driver`` offers of what is called here; ``answers`` replaces calls by name, ``calls`` lists them."""

    def __init__(self, **answers: Callable[..., tuple[Any, ...]]) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        plain: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cuInit": lambda flags: (OK,),
            "cuDriverGetVersion": lambda: (OK, 13000),
            "cuGetProcAddress": lambda name, version, flags: (OK, 1, 0),  # an address that no test here calls, unless it gives its own
            "cuDeviceGetCount": lambda: (OK, 1),
            "cuDeviceGet": lambda ordinal: (OK, ordinal),
            "cuDeviceGetName": lambda size, device: (OK, b"NVIDIA Test\0\0"),
            "cuDeviceGetAttribute": lambda attribute, device: (OK, VALUES.get(attribute, 132)),
            "cuDevicePrimaryCtxRetain": lambda device: (OK, 77),
            "cuCtxSetCurrent": lambda context: (OK,),
            "cuCtxGetCurrent": lambda: (OK, 0),
            "cuCtxGetDevice": lambda: (OK, 3),
            "cuMemAlloc": lambda size: (OK, 4096),
            "cuMemcpyHtoD": lambda *arguments: (OK,),
            "cuMemsetD8": lambda *arguments: (OK,),
            "cuCtxSynchronize": lambda: (OK,),
            "cuLaunchKernelEx": lambda *arguments: (OK,),
        }
        for name, answer in {**plain, **answers}.items():
            setattr(self, name, self._recorded(name, answer))
        self.CUlibrary = int
        self.CUresult, self.CUdevice_attribute = Result, Attribute

    def _recorded(self, name: str, answer: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            return answer(*arguments)

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Driver, Binding]]:
    def made(**answers: Callable[..., tuple[Any, ...]]) -> tuple[Driver, Binding]:
        binding = Binding(**answers)
        monkeypatch.setattr(cuda.bindings, "driver", binding, raising=False)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", binding)  # type: ignore[arg-type]
        return Driver(), binding

    return made


Make = Callable[..., tuple[Driver, Binding]]


def fails(code: Result) -> Callable[..., tuple[Any, ...]]:
    return lambda *arguments: (code, None)


def test_no_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # type: ignore[arg-type]
    with pytest.raises(DriverUnavailable, match=r"cuda-bindings is not installed.*install densemoe with its requirements"):
        Driver()


def test_no_libcuda(make: Make) -> None:
    def missing(flags: int) -> tuple[Any, ...]:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(DriverUnavailable, match=r"no CUDA driver on this machine.*libcuda.*run where a GPU is"):
        make(cuInit=missing)


def test_no_device(make: Make) -> None:
    with pytest.raises(DriverUnavailable, match=r"cuInit: CUDA_ERROR_NO_DEVICE \(100\): no GPU is visible: check nvidia-smi") as caught:
        make(cuInit=fails(Result.CUDA_ERROR_NO_DEVICE))
    assert (caught.value.call, caught.value.code) == ("cuInit", 100)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (Result.CUDA_ERROR_OUT_OF_MEMORY, "the device has no memory left"),
        (Result.CUDA_ERROR_INVALID_CONTEXT, "no context is current on this thread"),
        (Result.CUDA_ERROR_ILLEGAL_ADDRESS, "the context cannot be used any more"),
        (Result.CUDA_ERROR_UNKNOWN, "see the CUDA driver API's documentation"),
    ],
)
def test_a_failed_call_names_call_code_and_remedy(make: Make, code: Result, remedy: str) -> None:
    driver, _ = make(cuMemAlloc=fails(code))
    with pytest.raises(DriverError, match=remedy) as caught:
        driver.allocate(16)
    assert str(caught.value).startswith(f"cuMemAlloc: {code.name} ({code.value}): ")
    assert (caught.value.call, caught.value.code) == ("cuMemAlloc", code.value)


def test_facts_of_a_device(make: Make) -> None:
    driver, _ = make()
    assert (driver.version(), driver.device_count(), driver.device_name(0), driver.capability(0), driver.sm_count(0)) == (
        13000,
        1,
        "NVIDIA Test",
        (9, 0),
        132,
    )


# ---- loading

_LOAD = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
    *(ctypes.c_void_p,) * 3,
    ctypes.c_uint,
    *(ctypes.c_void_p,) * 2,
    ctypes.c_uint,
)


def loading(code: Result, seen: list[bytes] | None = None) -> tuple[Callable[..., tuple[Any, ...]], Any]:
    """(``cuGetProcAddress`` that gives a ``cuLibraryLoadData`` which ends with ``code``, what keeps it alive)."""

    @_LOAD
    def load(library: Any, image: int, *_: Any) -> int:
        if seen is not None:
            seen.append(ctypes.string_at(image))
        library[0] = 5
        return int(code)

    return lambda *arguments: (OK, ctypes.cast(load, ctypes.c_void_p).value, 0), load


def test_an_image_is_given_to_the_driver_as_it_is(make: Make) -> None:
    seen: list[bytes] = []
    address, _kept = loading(OK, seen)
    driver, binding = make(cuGetProcAddress=address)
    assert driver.load(b"\x7fELF", file="a.cubin", arch="sm_90a", ordinal=0) == 5
    assert seen == [b"\x7fELF"]
    assert (b"cuLibraryLoadData", 12000, 0) in binding.named("cuGetProcAddress")


def test_an_image_stays_where_it_is_until_its_library_goes(make: Make) -> None:
    """The driver is told that it need not copy it (CU_LIBRARY_BINARY_IS_PRESERVED), so nobody may free it, whoever forgets the Driver."""
    told: list[tuple[list[int], list[int]]] = []
    places: list[int] = []

    @_LOAD
    def load(library: Any, image: int, jit: Any, values: Any, count: int, options: int, settings: int, number: int) -> int:
        assert (jit, values, count) == (None, None, 0)
        told.append((list((ctypes.c_int * number).from_address(options)), list((ctypes.c_void_p * number).from_address(settings))))
        places.append(image)
        library[0] = 0xD0
        return 0

    driver, binding = make(cuGetProcAddress=lambda *_: (OK, ctypes.cast(load, ctypes.c_void_p).value, 0), cuLibraryUnload=lambda library: (OK,))
    image = bytes(range(1, 255)) * 40
    wanted = bytearray(image)
    library = driver.load(image, file="a.cubin", arch="sm_90a", ordinal=0)
    assert told == [([1], [1])]
    assert _IMAGES[0xD0] is image
    del image, driver.__dict__["_load_data"]
    gc.collect()
    assert ctypes.string_at(places[0], len(wanted)) == wanted
    driver.unload(library)
    assert binding.named("cuLibraryUnload") == [(library,)]
    assert 0xD0 not in _IMAGES


def test_a_binary_for_another_device_says_which_is_which(make: Make) -> None:
    address, _kept = loading(Result.CUDA_ERROR_NO_BINARY_FOR_GPU)
    driver, _ = make(cuGetProcAddress=address)
    with pytest.raises(ArchitectureMismatch, match=r"a\.cubin was built for sm_100f, the device is NVIDIA Test \(compute capability 9\.0\)"):
        driver.load(b"", file="a.cubin", arch="sm_100f", ordinal=0)


def test_a_format_that_the_driver_does_not_know_asks_for_a_newer_one(make: Make) -> None:
    address, _kept = loading(Result.CUDA_ERROR_INVALID_IMAGE)
    driver, _ = make(cuGetProcAddress=address, cuDriverGetVersion=lambda: (OK, 12040))
    with pytest.raises(DriverTooOld, match=r"a\.cubin \(built for sm_90a\).*supports CUDA 12\.4, on NVIDIA Test.*update NVIDIA's driver") as caught:
        driver.load(b"", file="a.cubin", arch="sm_90a", ordinal=0)
    assert caught.value.call == "cuLibraryLoadData"


def test_other_failures_of_loading_stay_what_they_are(make: Make) -> None:
    address, _kept = loading(Result.CUDA_ERROR_OUT_OF_MEMORY)
    driver, _ = make(cuGetProcAddress=address)
    with pytest.raises(DriverError, match="cuLibraryLoadData: CUDA_ERROR_OUT_OF_MEMORY") as caught:
        driver.load(b"", file="a.cubin", arch="sm_90a", ordinal=0)
    assert type(caught.value) is DriverError


def test_parameters_need_a_driver_that_tells_them(make: Make) -> None:
    driver, _ = make(cuDriverGetVersion=lambda: (OK, 12030))
    with pytest.raises(DriverTooOld, match=r"has no cuKernelGetParamInfo.*12\.4 or later"):
        driver.parameters(1)


@pytest.mark.parametrize("end", [Result.CUDA_ERROR_INVALID_VALUE, Result.CUDA_ERROR_INVALID_CONTEXT])
def test_parameters_end_where_the_driver_says_so(make: Make, end: Result) -> None:
    """One past the last is an invalid value; anything else is a failure, not an end."""
    layout = ((0, 8), (8, 8), (16, 4))

    driver, binding = make(cuKernelGetParamInfo=lambda kernel, index: (OK, *layout[index]) if index < len(layout) else (end, None, None))
    if end is Result.CUDA_ERROR_INVALID_VALUE:
        assert driver.parameters(1) == layout
    else:
        with pytest.raises(DriverError, match="cuKernelGetParamInfo: CUDA_ERROR_INVALID_CONTEXT"):
            driver.parameters(1)
    assert binding.named("cuKernelGetParamInfo") == [(1, index) for index in range(4)]


def test_what_does_not_change_is_asked_once(make: Make) -> None:
    """The driver's version and a device's handle: each question is part of what a first kernel takes."""
    driver, binding = make()
    for _ in range(3):
        assert (driver.version(), driver.capability(0), driver.sm_count(1)) == (13000, (9, 0), 132)
    assert binding.named("cuDriverGetVersion") == [()]
    assert binding.named("cuDeviceGet") == [(0,), (1,)]


# ---- launching, contexts, memory


def launch_config() -> LaunchConfig:
    return LaunchConfig("function", types.SimpleNamespace(hStream=0), 64, ())


def test_a_launch_is_one_call_on_the_stream_that_is_given(make: Make) -> None:
    driver, binding = make()
    prepared = launch_config()
    launch = driver.launcher(prepared)
    streams = []
    for stream in (0, 7, 7, 0):
        launch(stream)
        streams.append(prepared.config.hStream)
    assert streams == [0, 7, 7, 0]
    assert len(binding.named("cuLaunchKernelEx")) == 4


def test_launches_that_belong_together_are_one_call_each_in_their_order(make: Make) -> None:
    driver, binding = make()
    first, second = launch_config(), launch_config()
    first.function, second.function = "first", "second"
    driver.launcher(first, second)(7)
    assert [arguments[1] for arguments in binding.named("cuLaunchKernelEx")] == ["first", "second"]
    assert [each.config.hStream for each in (first, second)] == [7, 7]
    driver.launcher(second)(8)  # the stream belongs to the structure, not to whoever launches it
    driver.launcher(first, second)(7)
    assert second.config.hStream == 7


def test_the_driver_is_asked_once_how_many_clusters_it_holds(make: Make) -> None:
    def asked(function: int, config: Any) -> tuple[Any, ...]:
        shape = config.attrs[0].value.clusterDim
        assert (config.attrs[0].id, shape.x, shape.y, shape.z, config.numAttrs) == ("cluster", 4, 1, 1, 1)
        assert ((config.gridDimX, config.gridDimY, config.gridDimZ), config.blockDimX, config.sharedMemBytes) == ((4, 1, 1), 192, 1000)
        return (OK, 29)

    driver, binding = make(cuOccupancyMaxActiveClusters=asked)
    binding.CUlaunchAttribute = lambda: types.SimpleNamespace(value=types.SimpleNamespace(clusterDim=types.SimpleNamespace()))
    binding.CUlaunchAttributeID = types.SimpleNamespace(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster")
    binding.CUlaunchConfig, binding.CUfunction = types.SimpleNamespace, int
    assert [driver.resident_clusters(9, (192, 1, 1), (4, 1, 1), 1000) for _ in range(3)] == [29] * 3
    assert len(binding.named("cuOccupancyMaxActiveClusters")) == 1


def test_a_launcher_keeps_the_memory_that_its_launches_read(make: Make) -> None:
    """A launcher whose LaunchConfig nobody else holds crashed the process on an H200: the driver read freed parameters."""

    class Memory:
        pass

    memory = Memory()
    alive = weakref.ref(memory)
    driver, _ = make()
    launch = driver.launcher(LaunchConfig("function", types.SimpleNamespace(hStream=0), 64, (memory,)))
    del memory
    gc.collect()
    launch(7)
    assert alive() is not None
    del launch
    gc.collect()
    assert alive() is None


def test_a_failed_launch_names_itself(make: Make) -> None:
    driver, _ = make(cuLaunchKernelEx=fails(Result.CUDA_ERROR_ILLEGAL_ADDRESS))
    with pytest.raises(DriverError, match=r"cuLaunchKernelEx: CUDA_ERROR_ILLEGAL_ADDRESS \(700\).*check the tensors") as caught:
        driver.launcher(launch_config())(0)
    assert caught.value.call == "cuLaunchKernelEx"


def test_a_forked_process_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, binding = make()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    before = len(binding.calls)
    for call in (driver.check_process, driver.current_device, lambda: driver.use_device(0)):
        with pytest.raises(DriverError, match=rf"process {parent}, this is its fork {parent + 1}.*'spawn'"):
            call()
    assert len(binding.calls) == before


def test_a_prepared_launch_is_refused_in_a_forked_child(make: Make) -> None:
    driver, binding = make()
    launch = driver.launcher(launch_config())
    launch(0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            launch(0)
            said = "launched"
        except DriverError as error:
            said = f"{error} after {len(binding.named('cuLaunchKernelEx'))}"
        os.write(writing, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert f"its fork {child}: start processes with the 'spawn' method after 1" in os.read(reading, 4096).decode()
    launch(0)
    assert len(binding.named("cuLaunchKernelEx")) == 2


def test_contexts(make: Make) -> None:
    driver, binding = make()
    assert driver.current_device() is None
    driver.use_device(2)
    assert binding.named("cuDevicePrimaryCtxRetain") == [(2,)]
    assert binding.named("cuCtxSetCurrent") == [(77,)]
    driver, _ = make(cuCtxGetCurrent=lambda: (OK, 77))
    assert driver.current_device() == 3


_POINTER_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_uint64)


def test_an_address_belongs_to_its_device_or_to_none(make: Make) -> None:
    """The driver's own function is asked: the binding's gave 0 for memory of every device."""

    @_POINTER_ATTRIBUTE
    def attribute(ordinal: Any, which: int, pointer: int) -> int:
        if which != 9 or pointer not in (4096, 1 << 40):
            return int(Result.CUDA_ERROR_INVALID_VALUE)
        ordinal[0] = int(pointer == 1 << 40)
        return 0

    driver, binding = make(cuGetProcAddress=lambda *arguments: (OK, ctypes.cast(attribute, ctypes.c_void_p).value, 0))
    assert [driver.pointer_device(each) for each in (4096, 1 << 40, 64)] == [0, 1, None]
    assert (b"cuPointerGetAttribute", 4000, 0) in binding.named("cuGetProcAddress")


def test_nothing_is_copied_or_set_where_there_are_no_bytes(make: Make) -> None:
    driver, binding = make()
    driver.to_device(4096, b"")
    driver.zero(4096, 0)
    driver.fill(4096, 1, 0)
    assert not binding.named("cuMemcpyHtoD")
    assert not binding.named("cuMemsetD8")
    driver.to_device(4096, bytearray(b"abc"))
    ((pointer, source, size),) = binding.named("cuMemcpyHtoD")
    assert (pointer, size, source != 0) == (4096, 3, True)


def test_memory_apart_is_set_on_a_stream_of_its_own_while_captures_are_let_be(make: Make) -> None:
    """A capture in "global" mode forbids allocations to every thread that has not relaxed its own."""
    modes = ["global"]

    def exchange(mode: str) -> tuple[Any, ...]:
        modes.append(mode)
        return OK, modes[-2]

    done = {name: (lambda *arguments: (OK,)) for name in ("cuMemsetD8Async", "cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuStreamDestroy")}
    driver, binding = make(cuThreadExchangeStreamCaptureMode=exchange, cuStreamCreate=lambda flags: (OK, 55), **done)
    binding.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
    binding.CUstream_flags = types.SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    before = len(binding.calls)
    assert driver.allocate_apart(100, b"abcd") == 4096
    assert binding.named("cuMemsetD8Async") == [(4096, 0, 100, 55)]
    ((pointer, _, size, stream),) = binding.named("cuMemcpyHtoDAsync")
    assert (pointer, size, stream) == (4096, 4, 55)
    order = [name for name, _ in binding.calls[before:]]
    assert order[0] == order[-1] == "cuThreadExchangeStreamCaptureMode"
    assert order[-3:-1] == ["cuStreamSynchronize", "cuStreamDestroy"]
    assert modes == ["global", "relaxed", "global"]
    binding.cuMemAlloc = fails(Result.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(DriverError, match="cuMemAlloc") as caught:
        driver.allocate_apart(100)
    assert caught.value.code == Result.CUDA_ERROR_OUT_OF_MEMORY
    assert modes[-1] == "global"


def test_a_capture_has_a_number(make: Make) -> None:
    status = types.SimpleNamespace(CU_STREAM_CAPTURE_STATUS_ACTIVE=1)
    driver, binding = make(cuStreamGetCaptureInfo=lambda stream: (OK, int(stream == 7), 42, "graph", [], [], 0))
    binding.CUstreamCaptureStatus = status
    assert driver.capture_id(7) == 42
    with pytest.raises(DriverError, match="0x8 is not being captured"):
        driver.capture_id(8)
