"""Files in the safetensors format, mapped into memory: tensors as numpy views of the file, so that reading a part reads no more than that part.

A file is 8 bytes of header length (little endian), a JSON header (name → dtype, shape, [begin, end) in the data), the data. fp8 and bf16 come as
uint8 and uint16 bit patterns. Nothing but numpy is needed. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.canonical import replacing
from densemoe.runtime.errors import CheckpointError

__all__ = ["Checkpoint", "Stored", "writing"]

Array = npt.NDArray[Any]

LARGEST_HEADER: Final = 100_000_000  # bytes, as the format's own library has it
DATA_ALIGNMENT: Final = 256  # of files that we write: their weights go to the device as they lie
INDEX: Final = "model.safetensors.index.json"
_NUMPY: Final[Mapping[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "U8": "u1",
    "I8": "i1",
    "BOOL": "u1",
    "I32": "<i4",
    "I64": "<i8",
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        dtype: as the format spells it, ``BF16``.
        begin, end: bytes in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _stored(path: Path, start: int, each: Any) -> Stored:
    """One tensor of a header whose data begin at ``start``; TypeError or ValueError for what is none."""
    dtype, shape, offsets = each["dtype"], each["shape"], each["data_offsets"]
    if type(dtype) is not str or any(type(size) is not int or size < 0 for size in (*shape, *offsets)):
        raise TypeError(f"dtype {dtype!r}, shape {shape!r}, data_offsets {offsets!r}")
    begin, end = offsets
    return Stored(path, dtype, tuple(shape), start + begin, start + end)


def _files_of(index: Path) -> list[str]:
    """Names of the files that an index lists."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
            raise ValueError("weight_map names files outside of the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: it cannot be read ({error!r}): download it again") from None
    return names


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{path} is no safetensors file: its header would have {length} bytes of {size}")
        try:
            document = json.loads(file.read(length))
            metadata = document.pop("__metadata__", {})
            if not isinstance(metadata, dict):
                raise TypeError(f"__metadata__ {metadata!r}")
            stored = {name: _stored(path, 8 + length, each) for name, each in document.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: its header cannot be read ({error!r}): download it again") from None
    for name, each in stored.items():
        known = _NUMPY.get(each.dtype)
        wanted = np.dtype(known).itemsize * math.prod(each.shape) if known else each.end - each.begin
        if not 8 + length <= each.begin <= each.end <= size or each.end - each.begin != wanted:
            raise CheckpointError(f"{path}: tensor {name!r} of {each.dtype} {list(each.shape)} does not lie inside the file: download it again")
    return stored, metadata


class Checkpoint:
    """One file, or a folder of them with or without an index.

    Attributes:
        tensors: name → where it lies.
        metadata: of a single file.

    Raises:
        CheckpointError: no such file, a header that cannot be read, or a name in two files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        if given.is_dir():
            index = given / INDEX
            if index.is_file():
                files = [given / name for name in _files_of(index)]
            else:
                files = sorted(given.glob("*.safetensors"))
        else:
            files = [given]
        if not files or not all(file.is_file() for file in files):
            raise CheckpointError(f"{given} has no safetensors files, or its index names some that are missing: give a file or a folder of them")
        self.path = given
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            stored, self.metadata = _read_header(file)
            twice = self.tensors.keys() & stored.keys()
            if twice:
                raise CheckpointError(f"{given}: tensor {min(twice)!r} stands in two files: remove one")
            self.tensors.update(stored)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def stored(self, name: str) -> Stored:
        """Where a tensor lies.

        Raises:
            CheckpointError: it is not there.
        """
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return found

    def array(self, name: str) -> Array:
        """A tensor, mapped: copy-on-write, so that a view of it may be handed to torch.

        Raises:
            CheckpointError: it is not there, or of a dtype that is not read.
        """
        each = self.stored(name)
        if each.dtype not in _NUMPY:
            raise CheckpointError(f"{each.path}: tensor {name!r} is {each.dtype}: densemoe reads {', '.join(_NUMPY)}")
        if each.begin == each.end:
            return np.empty(each.shape, dtype=_NUMPY[each.dtype])
        return np.memmap(each.path, dtype=_NUMPY[each.dtype], mode="c", offset=each.begin, shape=each.shape)

    def scalar(self, name: str) -> np.float32:
        """A float32 tensor of one element.

        Raises:
            CheckpointError: it is not there, or is not one float32.
        """
        each = self.stored(name)
        if each.dtype != "F32" or int(np.prod(each.shape, dtype=np.int64)) != 1:
            raise CheckpointError(f"{each.path}: tensor {name!r} is {each.dtype} {list(each.shape)}: one float32 belongs there")
        return np.float32(self.array(name).reshape(-1)[0])


@contextmanager
def writing(
    path: str | os.PathLike[str], tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Iterator[dict[str, Array]]:
    """Maps the tensors of a new file for writing: what is written there is in the file, never twice in memory. ``path`` gets the file once the block
    ends; where it raises, what stood there stays.

    Args:
        tensors: name → (dtype as the format spells it, shape), in the order of the data.

    Raises:
        CheckpointError: the file cannot be made there, or the disk is full.
    """
    target = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + np.dtype(_NUMPY[dtype]).itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    start = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    text += b" " * (start - 8 - len(text))
    if target.is_dir():
        raise CheckpointError(f"{target} cannot be written: it is a folder: name a file")
    with ExitStack() as stack:
        try:
            handle, partial = stack.enter_context(replacing(target))
            with os.fdopen(handle, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                _reserve(file.fileno(), start + end)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}; {start + end} bytes are needed") from None
        arrays: dict[str, Array] = {}
        for name, (dtype, shape) in tensors.items():
            begin = start + header[name]["data_offsets"][0]
            arrays[name] = np.memmap(partial, dtype=_NUMPY[dtype], mode="r+", offset=begin, shape=shape)
        yield arrays
        for each in arrays.values():
            assert isinstance(each, np.memmap)
            each.flush()


def _reserve(handle: int, size: int) -> None:
    """Makes a file as long as that, with its space: a mapped page that finds none on the disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)
