"""Canonical JSON and the files that hold it: one spelling, written atomically, read without following links, and readable line by line.

In canonical form names are sorted and each member of the document, and each member of its objects and lists, stands on a line of its own.
Equal documents have equal bytes; a change shows as one line in a diff; and a reader that wants one kernel of three hundred parses one line.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import densemoe.artifacts
from densemoe.runtime.errors import ArtifactNotFound, ManifestError
from densemoe.runtime.proof import Proof

__all__ = ["Lines", "canonical", "installed_file", "parse_line", "read_file", "replacing", "split_lines", "write_atomically"]


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one spelling of a JSON document: sorted names, no spaces, a line for each member and for each of its members or items."""

    def one_line(value: Any) -> str:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    members = []
    for name in sorted(document):
        value = document[name]
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(one_line(item) for item in value) + "\n]"
        elif isinstance(value, dict) and value:
            text = "{\n" + ",\n".join(f"{json.dumps(key)}:{one_line(value[key])}" for key in sorted(value)) + "\n}"
        else:
            text = one_line(value)
        members.append(f"{json.dumps(name)}:{text}")
    return ("{\n" + ",\n".join(members) + "\n}\n").encode()


class Lines(Mapping[str, memoryview]):
    """An object of a canonical document, unparsed: its members' text by name, each found, and proven, when it is asked for. Which names there are,
    and that one is not there, is known when the whole document is proven."""

    def __init__(self, data: bytes, start: int, end: int, proof: Proof | None = None) -> None:
        self._data, self._start, self._end, self._proof = data, start, end, proof

    def _prove(self) -> None:
        if self._proof is not None:
            self._proof.whole()

    def __getitem__(self, name: str) -> memoryview:
        mark = b'\n"%s":' % name.encode()
        data, low, high = self._data, self._start, self._end
        while high - low > _NEAR:  # names are sorted; where they are not, all of it is searched below
            middle = data.find(b'\n"', (low + high) // 2, high)
            if middle < 0:
                break
            if data[middle : middle + len(mark)] <= mark:
                low = middle
            else:
                high = middle + 1
        at = data.find(mark, low, min(high + len(mark), self._end))
        if at < 0:
            at = data.find(mark, self._start, self._end)
        if at < 0 or '"' in name or "\n" in name:
            self._prove()
            raise KeyError(name)
        end = self._data.index(b"\n", at + 1)
        if self._proof is not None:
            self._proof.part(at, end + 1)
        return memoryview(self._data)[at + len(mark) : end - (self._data[end - 1 : end] == b",")]

    def __iter__(self) -> Iterator[str]:
        self._prove()
        try:
            return iter([name.decode() for name in _NAMES.findall(self._data, self._start, self._end)])
        except UnicodeDecodeError as error:
            raise ManifestError(f"a name in a manifest is not UTF-8: {error}; build or install the set again") from None

    def __len__(self) -> int:
        self._prove()
        return self._data.count(b'\n"', self._start, self._end)


_NEAR: Final = 8192  # bytes that are searched as they are
_NAMES: Final = re.compile(rb'\n"([^"\n]*)":')


def _closing(data: bytes, bracket: bytes, start: int, last: int) -> int:
    """Where the line break before the first line that is ``bracket`` and a comma stands, from the one at ``start`` on; -1 where there is none before
    ``last``. Lines are long: going from break to break takes a third of a search for the bracket's."""
    first = bracket[0]
    while start >= 0:
        if data[start + 1] == first and data[start + 1 : start + 4] == bracket and start + 3 < last:
            return start
        start = data.find(b"\n", start + 1, last)
    return -1


def split_lines(data: bytes, source: str, lazy: Collection[str], proof: Proof | None = None) -> dict[str, Any]:
    """Members of a canonical document: parsed, but for the objects named in ``lazy``, which become `Lines`.

    A line that is used must hold one complete JSON value (`parse_line`), so what is read is what any JSON reader would read.

    The object of ``lazy`` whose name sorts last must be the document's last member.

    Args:
        proof: compares what is parsed, now or later, before it is.

    Raises:
        ArtifactCorrupt: it is not what ``proof`` says.
        ManifestError: the document is not in canonical form, or a member that is parsed is not JSON. ``source`` names it.
    """
    members: dict[str, Any] = {}
    view, final = memoryview(data), max(lazy) if lazy else None
    try:
        if not data.startswith(b"{\n") or not data.endswith(b"\n}\n"):
            raise ValueError
        position, last = 2, len(data) - 2  # the line of the closing brace
        while position < last:
            end = data.index(b"\n", position)
            colon = data.index(b'":', position, end)
            name = str(view[position + 1 : colon], "utf-8")
            if name in members or data[position : position + 1] != b'"':
                raise ValueError
            opening = data[colon + 2 : end]
            start = end
            if opening in (b"{", b"["):
                close = b"\n}" if opening == b"{" else b"\n]"
                # searching a whole object for its end takes as long as the rest of a cold start's reading: the last lazy one stands last
                end = -1 if name == final else _closing(data, close[1:] + b",\n", end, last)
                if end < 0:
                    end = last - len(close) - 1  # the last member's bracket, alone on its line
                    if data[end:last] != close + b"\n":
                        raise ValueError
                end += len(close) + (end + len(close) + 1 < last)
            if (data[end - 1 : end] == b",") == (end + 1 == last):
                raise ValueError
            if name in lazy and opening == b"{":
                members[name] = Lines(data, start, end - 2, proof)
            else:
                if proof is not None:
                    proof.part(position, end + 1)
                members[name] = parse_line(view[colon + 2 : end - (end + 1 < last)], f"{source}.{name}")
            position = end + 1
    except ValueError:
        if proof is not None:
            proof.whole()
        raise ManifestError(f"{source} is not in canonical form: cut off, or edited by hand; build or install the set again") from None
    return members


def parse_line(text: memoryview, path: str) -> Any:
    """The JSON value of one line, or of any other complete text.

    Raises:
        ManifestError: it is none.
    """
    try:
        line = str(text, "utf-8")
        with suppress(ValueError):
            value, end = _DECODE(line)
            if end == len(line):
                return value
        return json.loads(line)  # space around it, or more than one value: what json.loads says
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON: {error}; build or install the set again") from None


#: What json.loads calls, without its passes over the space around a value.
_DECODE: Final = json.JSONDecoder().raw_decode


@contextmanager
def replacing(path: Path) -> Iterator[tuple[int, str]]:
    """The handle, which the caller closes, and the name of a new file beside ``path``, which takes its place when the block ends; where that raises
    the old file stays and the new one goes.

    Raises:
        OSError: the folder cannot be written.
    """
    import tempfile  # not needed to load a kernel

    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        yield handle, name
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` so that a reader, or a machine that loses power, sees the old bytes or the new ones, never a part.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the old file stays.
    """
    with replacing(path) as (handle, _), os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_file(path: str | os.PathLike[str], largest: int, size: int | None = None) -> bytes:
    """Bytes of a regular file of at most ``largest`` bytes; symbolic links are not followed.

    Args:
        size: how many bytes the caller expects: one more is read at most, and he compares; this saves a cold start a question.

    Raises:
        ArtifactNotFound: there is none.
        ManifestError: it is a link, no regular file, or too large.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise ArtifactNotFound(f"{path} does not exist: run `densemoe build`, install a wheel with artifacts, or set DENSEMOE_ARTIFACTS") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be opened: {error.strerror}; symbolic links are not followed") from None
    try:
        if size is not None:
            return os.read(handle, min(size, largest) + 1)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ManifestError(f"{path} is no regular file")
        if status.st_size > largest:
            raise ManifestError(f"{path}: {status.st_size} bytes; at most {largest} are read")
        parts, left = [], status.st_size
        while left:
            part = os.read(handle, left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)


def installed_file(*parts: str) -> str:
    """Path of a file of the package densemoe.artifacts, in the first of its directories that has it: an editable install may join several. Without
    importlib.resources, whose first call alone takes six times as long as loading a kernel."""
    paths = [os.path.join(folder, *parts) for folder in densemoe.artifacts.__path__]
    return next((path for path in paths if os.path.isfile(path)), paths[0]) if len(paths) > 1 else paths[0]
