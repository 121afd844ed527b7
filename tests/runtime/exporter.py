"""A tensor on a device that does not exist, which is lent by DLPack."""

from __future__ import annotations

import ctypes
from typing import Any

from densemoe.runtime import dlpack

__all__ = ["ADDRESS", "Exporter"]

ADDRESS = 0x7F0000000000

_NEW = ctypes.pythonapi.PyCapsule_New
_NEW.restype, _NEW.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Exporter:
    """A tensor on a device that does not exist, lent by DLPack; counts how often it is given back."""

    def __init__(self, **changes: Any) -> None:
        self.settings: dict[str, Any] = {
            "data": ADDRESS,
            "device": (2, 0),
            "format": (4, 16, 1),
            "shape": (4, 64),
            "strides": (64, 1),
            "byte_offset": 0,
            "versioned": True,
            "major": 1,
            "flags": 0,
            "knows_versions": True,
            "in_capsule": None,
            **changes,
        }
        self.released = 0
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.settings["device"]  # type: ignore[no-any-return]

    def __dlpack__(self, **arguments: Any) -> Any:
        self.asked.append(arguments)
        if "max_version" in arguments and not self.settings["knows_versions"]:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        given = self.settings
        ndim = len(given["shape"])
        self.shape = (ctypes.c_int64 * ndim)(*given["shape"])
        self.strides = (ctypes.c_int64 * ndim)(*given["strides"]) if given["strides"] is not None else None
        versioned = given["versioned"] and given["knows_versions"]
        self.managed: Any = dlpack._ManagedVersioned() if versioned else dlpack._Managed()
        if versioned:
            self.managed.major, self.managed.flags = given["major"], given["flags"]
        tensor = self.managed.tensor
        tensor.data, tensor.byte_offset, tensor.ndim = given["data"], given["byte_offset"], ndim
        tensor.device_type, tensor.device_id = given["in_capsule"] or given["device"]
        tensor.code, tensor.bits, tensor.lanes = given["format"]
        tensor.shape = ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64))
        if self.strides is not None:
            tensor.strides = ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64))

        def release(address: int) -> None:
            assert address == ctypes.addressof(self.managed)
            self.released += 1

        self.deleter = _DELETER(release)
        self.managed.deleter = ctypes.cast(self.deleter, ctypes.c_void_p).value
        self.name = b"dltensor_versioned" if versioned else b"dltensor"
        return _NEW(ctypes.addressof(self.managed), self.name, None)
