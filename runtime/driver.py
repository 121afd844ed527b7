"""The CUDA driver API, thin: what the loader, Plans and the runner call, and nothing else.

Every failure becomes a DriverError (or a subclass) that names the call, the code and what to do. cuda-bindings is imported when a Driver is
made, so that importing densemoe.runtime needs neither a driver nor the package's 39 ms. Handles are plain integers at this interface.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

from densemoe.runtime.errors import ArchitectureMismatch, DriverError, DriverTooOld, DriverUnavailable

__all__ = ["Driver", "LaunchConfig", "version_text"]

#: What to do, by CUresult name.
_REMEDIES: Final = {
    "CUDA_ERROR_OUT_OF_MEMORY": "the device has no memory left: free some, or lower M",
    "CUDA_ERROR_NOT_INITIALIZED": "call after the driver was initialised; after a fork start processes with 'spawn' instead",
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "that device does not exist: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_CONTEXT": "no context is current on this thread: make one current, or use Device context helpers",
    "CUDA_ERROR_INVALID_HANDLE": "a handle of another context or an ended one was given",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel touched memory that is not allocated: check the tensors; the context cannot be used any more",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel failed: the context cannot be used any more; run compute-sanitizer",
    "CUDA_ERROR_INVALID_VALUE": "an argument is out of range: this is a fault in densemoe or in its caller, not of the machine",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "that call may not be captured: preload kernels before the capture",
}
_OLD: Final = ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")


def version_text(version: int) -> str:
    """``13.0`` for 13000, ``12.8`` for 12080: a CUDA version as ``cuDriverGetVersion`` counts."""
    return f"{version // 1000}.{version % 1000 // 10}"


#: Grows in a child of a fork: what was prepared before it cannot be launched there.
_FORKS: Final[list[int]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKS.append(os.getpid()))
_PARAMETER_INFO_SINCE: Final = 12040
_LIBRARIES_SINCE: Final = 12000
_POINTER: Final = ctypes.c_void_p
_UNIFIED_SINCE: Final = 4000
_DEVICE_ORDINAL: Final = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_POINTER_ATTRIBUTE: Final = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int, ctypes.c_uint64)
#: ``CU_LIBRARY_BINARY_IS_PRESERVED`` and that it is so: without it the driver copies a cubin, a third of what loading one takes (docs/loading.md).
_KEPT: Final = (ctypes.c_int * 1)(1), (ctypes.c_void_p * 1)(1)
#: Bytes that the driver reads where they are, by library: for as long as it is loaded, which is to the process's end unless it is unloaded.
_IMAGES: Final[dict[int, bytes]] = {}
_LOAD_DATA: Final = ctypes.CFUNCTYPE(
    ctypes.c_int, _POINTER, ctypes.c_char_p, _POINTER, _POINTER, ctypes.c_uint, _POINTER, _POINTER, ctypes.c_uint
)


class LaunchConfig:
    """A prepared launch: the driver's structure, made once, of which a launch only changes the stream.

    Attributes:
        function: kernel handle.
        config: ``CUlaunchConfig``.
        arguments: address of the array of parameter addresses; ``keep`` holds the memory behind it.
        stream: that ``config`` names; setting it costs more than comparing.
    """

    __slots__ = ("arguments", "config", "function", "keep", "stream")

    def __init__(self, function: Any, config: Any, arguments: int, keep: tuple[object, ...]) -> None:
        self.function, self.config, self.arguments, self.keep, self.stream = function, config, arguments, keep, 0


class Driver:
    """The driver of this process.

    Raises:
        DriverUnavailable: no cuda-bindings, no libcuda, or no device.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DriverUnavailable(f"cuda-bindings is not installed ({error}): install densemoe with its requirements") from None
        self._cuda = driver
        self._resident: dict[tuple[object, ...], int] = {}
        self._devices: dict[int, Any] = {}
        self.process = os.getpid()
        try:
            result = driver.cuInit(0)
        except RuntimeError as error:
            raise DriverUnavailable(f"no CUDA driver on this machine ({error}): install NVIDIA's driver, or run where a GPU is") from None
        code = result[0]
        if int(code) != 0:
            raise DriverUnavailable(f"cuInit: {self._name(code)} ({int(code)}): {self._remedy(self._name(code))}", call="cuInit", code=int(code))
        if self.version() >= _LIBRARIES_SINCE:
            self._load_data  # noqa: B018 - looked up here, and not while the first kernel loads

    # ---- errors

    def _name(self, code: Any) -> str:
        return str(getattr(code, "name", code))

    def _remedy(self, name: str) -> str:
        return _REMEDIES.get(name, "see the CUDA driver API's documentation of this code")

    def _error(self, call: str, code: Any) -> DriverError:
        text = self._name(code)
        kind = DriverTooOld if text in _OLD else DriverError
        return kind(f"{call}: {text} ({int(code)}): {self._remedy(text)}", call=call, code=int(code))

    def _call(self, name: str, *arguments: Any) -> Any:
        result = getattr(self._cuda, name)(*arguments)
        code = result[0]
        if int(code) != 0:
            raise self._error(name, code)
        values = result[1:]
        return values[0] if len(values) == 1 else values or None

    def check_process(self) -> None:
        """Raises DriverError in a child of the process that made this Driver: CUDA does not survive a fork."""
        if os.getpid() != self.process:
            raise DriverError(
                f"CUDA was initialised in process {self.process}, this is its fork {os.getpid()}: start processes with the 'spawn' method"
            )

    # ---- devices and contexts

    def version(self) -> int:
        """CUDA version that the driver supports: 13000 is 13.0."""
        return self._version

    @cached_property
    def _version(self) -> int:
        return int(self._call("cuDriverGetVersion"))

    def device_count(self) -> int:
        """Visible devices."""
        return int(self._call("cuDeviceGetCount"))

    def device_name(self, ordinal: int) -> str:
        """Marketing name."""
        return bytes(self._call("cuDeviceGetName", 96, self._device(ordinal))).split(b"\0")[0].decode()

    def pci_bus_id(self, ordinal: int) -> str:
        """PCI address as NVML and nvidia-smi spell it, ``0000:3b:00.0``."""
        return bytes(self._call("cuDeviceGetPCIBusId", 32, self._device(ordinal))).split(b"\0")[0].decode()

    def _device(self, ordinal: int) -> Any:
        found = self._devices.get(ordinal)
        if found is None:
            found = self._devices[ordinal] = self._call("cuDeviceGet", ordinal)
        return found

    def attribute(self, name: str, ordinal: int) -> int:
        """A ``CU_DEVICE_ATTRIBUTE_…`` of a device, by the part of its name after the prefix."""
        attribute = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", attribute, self._device(ordinal)))

    def capability(self, ordinal: int) -> tuple[int, int]:
        """Compute capability (major, minor)."""
        return self.attribute("COMPUTE_CAPABILITY_MAJOR", ordinal), self.attribute("COMPUTE_CAPABILITY_MINOR", ordinal)

    def sm_count(self, ordinal: int) -> int:
        """Streaming multiprocessors."""
        return self.attribute("MULTIPROCESSOR_COUNT", ordinal)

    def use_device(self, ordinal: int) -> None:
        """Makes the device's primary context current on this thread; it is the one that torch and the CUDA runtime use."""
        self.check_process()
        context = self._call("cuDevicePrimaryCtxRetain", self._device(ordinal))
        self._call("cuCtxSetCurrent", context)

    def current_device(self) -> int | None:
        """Ordinal of the device whose context is current on this thread, None where there is none."""
        self.check_process()
        if int(self._call("cuCtxGetCurrent")) == 0:
            return None
        return int(self._call("cuCtxGetDevice"))

    # ---- code

    def load(self, image: bytes, *, file: str, arch: str, ordinal: int) -> Any:
        """Loads a cubin. Its bytes are kept until it is unloaded: the driver goes on reading them.

        Args:
            file, arch: what is loaded and what it was built for; ordinal: the device it is for; for messages.

        Raises:
            ArchitectureMismatch: the cubin is for another device.
            DriverTooOld: the driver does not know the format.
        """
        library = ctypes.c_void_p()
        code = self._load_data(ctypes.byref(library), image, None, None, 0, *_KEPT, len(_KEPT[0]))
        if code == 0:
            _IMAGES[library.value or 0] = image
            return self._cuda.CUlibrary(library.value or 0)
        error = self._error("cuLibraryLoadData", self._cuda.CUresult(code))
        capability = self.capability(ordinal)
        device = f"{self.device_name(ordinal)} (compute capability {capability[0]}.{capability[1]})"
        if "NO_BINARY_FOR_GPU" in str(error):
            raise ArchitectureMismatch(f"{file} was built for {arch}, the device is {device}: install or build artifacts for the device") from error
        if isinstance(error, DriverTooOld):
            raise DriverTooOld(
                f"{file} (built for {arch}) is not understood by this driver, which supports CUDA {version_text(self.version())}, on {device}:"
                " update NVIDIA's driver",
                call=error.call,
                code=error.code,
            ) from error
        raise error

    def kernel(self, library: Any, symbol: str) -> Any:
        """The kernel called ``symbol``."""
        return self._call("cuLibraryGetKernel", library, symbol.encode())

    def unload(self, library: Any) -> None:
        """Unloads a library."""
        self._call("cuLibraryUnload", library)
        _IMAGES.pop(int(library), None)

    def parameters(self, kernel: Any) -> tuple[tuple[int, int], ...]:
        """(offset, size) of every parameter, in order. Needs a 12.4 driver."""
        if self.version() < _PARAMETER_INFO_SINCE:
            raise DriverTooOld(
                f"the driver supports CUDA {version_text(self.version())} and has no cuKernelGetParamInfo: a kernel's parameters cannot be compared"
                " with the manifest's; update NVIDIA's driver to one for CUDA 12.4 or later"
            )
        # a kernel has a dozen parameters: a third of the time that ctypes takes
        query, success = self._cuda.cuKernelGetParamInfo, self._cuda.CUresult.CUDA_SUCCESS
        found: list[tuple[int, int]] = []
        code, offset, size = query(kernel, 0)
        while code == success:
            found.append((offset, size))
            code, offset, size = query(kernel, len(found))
        if code != self._cuda.CUresult.CUDA_ERROR_INVALID_VALUE:  # one past the last
            raise self._error("cuKernelGetParamInfo", code)
        return tuple(found)

    @cached_property
    def _load_data(self) -> Callable[..., int]:
        """``cuLibraryLoadData`` of the driver that cuda-bindings loaded, as a C function: the binding's own first call of it takes 0.1 ms."""
        return self._function("cuLibraryLoadData", _LIBRARIES_SINCE, _LOAD_DATA)

    @cached_property
    def _pointer_attribute(self) -> Callable[..., int]:
        """``cuPointerGetAttribute``, likewise: the binding (13.3.1) gives ordinal 0 for memory of every device."""
        return self._function("cuPointerGetAttribute", _UNIFIED_SINCE, _POINTER_ATTRIBUTE)

    def _function(self, name: str, since: int, kind: Any) -> Callable[..., int]:
        address, _ = self._call("cuGetProcAddress", name.encode(), since, 0)
        function: Callable[..., int] = kind(int(address))
        return function

    def prepare(self, kernel: Any, ordinal: int, dynamic_smem: int, carveout: int) -> None:
        """Allows a kernel its dynamic shared memory on a device, and states the preferred carveout (percent, -1: the driver's choice)."""
        attributes = self._cuda.CUfunction_attribute
        device = self._device(ordinal)
        if dynamic_smem > 0:
            self._call("cuKernelSetAttribute", attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic_smem, kernel, device)
        if carveout >= 0:
            self._call("cuKernelSetAttribute", attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, carveout, kernel, device)

    def resident_clusters(self, kernel: Any, block: tuple[int, int, int], cluster: tuple[int, int, int], dynamic_smem: int) -> int:
        """Clusters of a kernel that the current device holds at once: fewer than SMs // cluster size where its GPCs do not divide evenly. Asked
        once a kernel, after ``prepare``."""
        asked = (int(kernel), block, cluster, dynamic_smem)
        if asked not in self._resident:
            attribute = self._cuda.CUlaunchAttribute()
            attribute.id = self._cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster
            config = self._cuda.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = cluster
            config.blockDimX, config.blockDimY, config.blockDimZ = block
            config.sharedMemBytes = dynamic_smem
            config.attrs, config.numAttrs = [attribute], 1
            self._resident[asked] = int(self._call("cuOccupancyMaxActiveClusters", self._cuda.CUfunction(int(kernel)), config))
        return self._resident[asked]

    def launch_config(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        dynamic_smem: int,
        block_of_parameters: bytearray,
        offsets: tuple[tuple[int, int], ...],
        programmatic: bool,
    ) -> LaunchConfig:
        """Prepares a launch. ``block_of_parameters`` is read at every launch, so changing it changes the launches that follow."""
        cuda = self._cuda
        attributes = []
        if cluster != (1, 1, 1):
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster
            attributes.append(attribute)
        if programmatic:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = dynamic_smem
        config.attrs = attributes
        config.numAttrs = len(attributes)
        memory = (ctypes.c_char * len(block_of_parameters)).from_buffer(block_of_parameters)
        base = ctypes.addressof(memory)
        pointers = (ctypes.c_void_p * len(offsets))(*(base + offset for offset, _ in offsets))
        function = cuda.CUfunction(int(kernel))
        return LaunchConfig(function, config, ctypes.addressof(pointers), (memory, pointers, attributes, block_of_parameters))

    def launcher(self, *prepared: LaunchConfig) -> Callable[[int], None]:
        """A function that launches each of ``prepared`` in turn on a stream (0: the legacy default stream): one driver call a kernel, everything
        else done before."""
        call, success = self._cuda.cuLaunchKernelEx, self._cuda.CUresult.CUDA_SUCCESS
        forks, generation = _FORKS, len(_FORKS)

        def launch(stream: int) -> None:
            if len(forks) != generation:
                self.check_process()
            for each in prepared:
                if each.stream != stream:
                    each.config.hStream = stream
                    each.stream = stream
                code = call(each.config, each.function, each.arguments, 0)[0]
                if code is not success and code != success:
                    raise self._error("cuLaunchKernelEx", code)

        return launch

    # ---- memory

    def allocate(self, nbytes: int) -> int:
        """Device memory on the current context's device, aligned to 256 bytes."""
        return int(self._call("cuMemAlloc", max(nbytes, 1)))

    def allocate_apart(self, nbytes: int, content: bytes = b"") -> int:
        """Device memory that begins with ``content`` and is zero otherwise, ready for every stream when this returns. Works while a stream is
        captured, of whose graph it is no part."""
        mode = self._call("cuThreadExchangeStreamCaptureMode", self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            pointer, stream = self.allocate(nbytes), self.stream()
            self._call("cuMemsetD8Async", pointer, 0, max(nbytes, 1), stream)
            if content:
                self._call("cuMemcpyHtoDAsync", pointer, _address(memoryview(content)), len(content), stream)
            self._call("cuStreamSynchronize", stream)
            self._call("cuStreamDestroy", stream)
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", mode)
        return pointer

    def free(self, pointer: int) -> None:
        """Frees what ``allocate`` or ``allocate_apart`` gave."""
        self._call("cuMemFree", pointer)

    def zero(self, pointer: int, nbytes: int) -> None:
        """Sets bytes to 0, and waits."""
        if nbytes:
            self._call("cuMemsetD8", pointer, 0, nbytes)
            self.synchronize()

    def fill(self, pointer: int, value: int, nbytes: int) -> None:
        """Sets bytes to ``value``."""
        if nbytes:
            self._call("cuMemsetD8", pointer, value, nbytes)

    def to_device(self, pointer: int, data: Any) -> None:
        """Copies a contiguous buffer to the device, and waits."""
        view = memoryview(data).cast("B")
        if view.nbytes:
            self._call("cuMemcpyHtoD", pointer, _address(view), view.nbytes)

    def to_host(self, data: Any, pointer: int) -> None:
        """Copies device memory into a writable contiguous buffer, and waits."""
        view = memoryview(data).cast("B")
        if view.nbytes:
            self._call("cuMemcpyDtoH", _address(view), pointer, view.nbytes)

    def pointer_device(self, pointer: int) -> int | None:
        """Ordinal of the device that owns an address, None where it is no device memory."""
        ordinal = ctypes.c_int()
        code = self._pointer_attribute(ctypes.byref(ordinal), _DEVICE_ORDINAL, pointer)
        return ordinal.value if code == 0 else None

    # ---- streams, events, graphs

    def synchronize(self) -> None:
        """Waits for everything on the current context."""
        self._call("cuCtxSynchronize")

    def stream(self) -> int:
        """A new non-blocking stream."""
        return int(self._call("cuStreamCreate", self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copies device memory to device memory, in the order of the legacy default stream."""
        self._call("cuMemcpyDtoD", target, source, nbytes)

    def event(self) -> Any:
        """A new event that takes times."""
        return self._call("cuEventCreate", 0)

    def record(self, event: Any, stream: int) -> None:
        """Records an event on a stream."""
        self._call("cuEventRecord", event, stream)

    def elapsed(self, start: Any, end: Any) -> float:
        """Milliseconds between two recorded events, after waiting for the second."""
        self._call("cuEventSynchronize", end)
        return float(self._call("cuEventElapsedTime", start, end))

    def begin_capture(self, stream: int) -> None:
        """Starts capturing a stream into a graph."""
        self._call("cuStreamBeginCapture", stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def capture_id(self, stream: int) -> int:
        """Number of the capture that a stream is part of, unlike that of every other capture of this process.

        Raises:
            DriverError: it is not being captured.
        """
        status, number = self._call("cuStreamGetCaptureInfo", stream)[:2]
        if int(status) != int(self._cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE):
            raise DriverError(f"cuStreamGetCaptureInfo: stream {stream:#x} is not being captured (status {int(status)})")
        return int(number)

    def end_capture(self, stream: int) -> Any:
        """Ends a capture; the instantiated graph."""
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: Any, stream: int) -> None:
        """Launches an instantiated graph."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Frees an instantiated graph."""
        self._call("cuGraphExecDestroy", graph)

    # ---- tensor maps

    def encode_tensor_map(
        self,
        address: int,
        dtype: str,
        sizes: tuple[int, ...],
        strides: tuple[int, ...],
        box: tuple[int, ...],
        swizzle: str,
        l2_promotion: str,
    ) -> bytes:
        """The 128 bytes that ``cuTensorMapEncodeTiled`` makes; innermost dimension first, strides in bytes from dimension 1 on."""
        cuda = self._cuda
        types = {"u8": "UINT8", "u16": "UINT16", "u32": "UINT32", "bf16": "BFLOAT16", "f16": "FLOAT16", "f32": "FLOAT32"}
        result = self._call(
            "cuTensorMapEncodeTiled",
            getattr(cuda.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{types[dtype]}"),
            len(sizes),
            address,
            [cuda.cuuint64_t(size) for size in sizes],
            [cuda.cuuint64_t(stride) for stride in strides],
            [cuda.cuuint32_t(size) for size in box],
            [cuda.cuuint32_t(1)] * len(sizes),
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(cuda.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle.upper()}"),
            getattr(cuda.CUtensorMapL2promotion, f"CU_TENSOR_MAP_L2_PROMOTION_{'L2_' if l2_promotion != 'none' else ''}{l2_promotion.upper()}"),
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return ctypes.string_at(result.getPtr(), 128)


def _address(view: memoryview) -> int:
    """Address of a contiguous buffer, read-only ones included."""
    if view.readonly:
        return ctypes.cast(ctypes.c_char_p(view.obj), ctypes.c_void_p).value or 0 if isinstance(view.obj, bytes) else _array_address(view)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _array_address(view: memoryview) -> int:
    interface = getattr(view.obj, "__array_interface__", None)
    if interface is None:
        raise DriverError(f"a read-only buffer of {type(view.obj).__name__} cannot be copied: give bytes or a numpy array")
    return int(interface["data"][0])
