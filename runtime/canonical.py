"""Canonical JSON and the files that hold it: one spelling, written atomically, read without following links, and readable line by line.

In canonical form names are sorted and each member of the document, and each member of its objects and lists, stands on a line of its own.
Equal documents have equal bytes; a change shows as one line in a diff; and a reader that wants one kernel of three hundred parses one line.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densemoe.runtime.errors import ArtifactNotFound, ManifestError

__all__ = ["canonical", "parse_line", "read_file", "split_lines", "write_atomically"]


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


def split_lines(data: bytes, source: str) -> dict[str, bytes | dict[str, bytes]]:
    """Members of a canonical document, unparsed: an object as a mapping of its members' lines, anything else as its text.

    A line that is used must hold one complete JSON value (`parse_line`), so what is read is what any JSON reader would read.

    Raises:
        ManifestError: the document is not in canonical form. ``source`` names it.
    """
    lines = data.split(b"\n")
    members: dict[str, bytes | dict[str, bytes]] = {}
    try:
        if lines[0] != b"{" or lines[-2:] != [b"}", b""]:
            raise ValueError
        position, last = 1, len(lines) - 2
        while position < last:
            line = lines[position]
            end = b"" if position == last - 1 else b","
            if line.endswith((b'":{', b'":[')):
                close = b"}" if line.endswith(b"{") else b"]"
                stop = lines.index(close + b",", position) if close + b"," in lines[position:last] else last - 1
                if lines[stop].removesuffix(b",") != close:
                    raise ValueError
                inside = lines[position + 1 : stop]
                if close == b"}":
                    content = {item[1 : item.index(b'":')].decode(): item[item.index(b'":') + 2 :].removesuffix(b",") for item in inside}
                    if len(content) != len(inside):
                        raise ValueError
                    members[line[1:-3].decode()] = content
                else:
                    members[line[1:-3].decode()] = b"[" + b"".join(inside) + b"]"
                position = stop + 1
                continue
            name = line[1 : line.index(b'":')].decode()
            if not line.endswith(end) or name in members:
                raise ValueError
            members[name] = line[len(name) + 3 :].removesuffix(b",")
            position += 1
    except (ValueError, IndexError):
        raise ManifestError(f"{source} is not in canonical form: cut off, or edited by hand; build or install the set again") from None
    return members


def parse_line(text: bytes, path: str) -> Any:
    """The JSON value of one line.

    Raises:
        ManifestError: it is none.
    """
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON: {error}; build or install the set again") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` so that a reader, or a machine that loses power, sees the old bytes or the new ones, never a part.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the old file stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_file(path: str | os.PathLike[str], largest: int) -> bytes:
    """Bytes of a regular file of at most ``largest`` bytes; symbolic links are not followed.

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
