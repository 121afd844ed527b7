"""Typed access to JSON documents that come from outside; every fault names its place in the document, what stands there and what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from densemoe.runtime.errors import ManifestError

__all__ = ["Fields", "check_schema", "is_sha256", "parse_document", "plain", "shown"]

_LONGEST_SHOWN = 60  # characters of a value that an error message repeats


_MISSING: Final = object()


class Fields:
    """One JSON object.

    Args:
        value: what stands there; anything but an object is a fault.
        path: where, for messages.

    Raises:
        ManifestError: in every method, where the value is not what is asked for.
    """

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, Mapping):
            raise ManifestError(f"{path}: {shown(value)} stands where an object belongs")
        self.value, self.path = value, path

    def get(self, name: str, kind: type, check: Callable[[Any], bool] | None = None, allowed: str = "") -> Any:
        """The member ``name``, which must be a ``kind`` that passes ``check``; ``allowed`` says in words what does."""
        found = self.value.get(name, _MISSING)
        if type(found) is not kind and not (kind is dict and isinstance(found, Mapping)):  # so a bool is no int
            if found is _MISSING:
                raise ManifestError(f"{self.path}.{name} is missing")
            raise ManifestError(f"{self.path}.{name}: {shown(found)} stands where a {kind.__name__} belongs")
        if check is not None and not check(found):
            raise ManifestError(f"{self.path}.{name}: {shown(found)} is not allowed{': ' + allowed if allowed else ''}")
        return found

    def object(self, name: str) -> Fields:
        """The member ``name``, an object."""
        return Fields(self.get(name, dict), f"{self.path}.{name}")

    def objects(self) -> Iterator[tuple[str, Fields]]:
        """Every member by name, each an object."""
        for name, value in self.value.items():
            yield name, Fields(value, f"{self.path}.{name}")

    def items(self, name: str) -> Iterator[Fields]:
        """The items of the list ``name``, each an object."""
        for position, value in enumerate(self.get(name, list)):
            yield Fields(value, f"{self.path}.{name}[{position}]")

    def size(self, name: str, largest: int = 2**63 - 1) -> int:
        """The member ``name``, an integer from 0 to ``largest``."""
        return int(self.get(name, int, lambda value: 0 <= value <= largest, f"0 to {largest}"))

    def triple(self, name: str) -> tuple[int, int, int]:
        """The member ``name``, a list of three positive integers."""
        found = self.get(name, list, lambda v: len(v) == 3 and all(type(i) is int and 1 <= i <= 2**31 for i in v), "three positive integers")
        return (found[0], found[1], found[2])

    def sha256(self, name: str) -> str:
        """The member ``name``, a sha256 in lower-case hexadecimal digits."""
        return str(self.get(name, str, is_sha256, "64 lower-case hexadecimal digits"))


_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    """Whether ``text`` spells a sha256 in lower-case hexadecimal digits."""
    return _SHA256.fullmatch(text) is not None


def shown(value: Any) -> str:
    """``value`` as a message repeats it: its first characters."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "…"


class _StandsTwice(Exception):
    """A name that stands twice in one object."""


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _StandsTwice(next(name for name in names if names.count(name) > 1))
    return result


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique)


def plain(value: Any) -> str:
    """``value`` as text that a terminal may be given: what would move its cursor, or is no text, is spelled out."""
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def parse_document(data: bytes, source: str, schema: int, largest: int) -> Fields:
    """A document's top level.

    Args:
        source: where the bytes came from, for messages.
        schema: the schema number that it must state.
        largest: bytes of a document that is parsed at all.

    Raises:
        ManifestError: it is too large, no JSON, holds a name twice in one object, or states another schema.
    """
    if len(data) > largest:
        raise ManifestError(f"{source}: {len(data)} bytes; at most {largest} are read")
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except _StandsTwice as error:
        raise ManifestError(f"{source}: the name {error.args[0]!r} stands twice in one object") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source}: not JSON: {error}; build or install it again") from None
    fields = Fields(value, source)
    check_schema(fields, schema)
    return fields


def check_schema(fields: Fields, schema: int) -> None:
    """Raises ManifestError unless the document states this schema number."""
    found = fields.get("schema", int)
    if found != schema:
        raise ManifestError(
            f"{fields.path}: schema {found}; this densemoe reads schema {schema}: install the densemoe that made it, or make it again"
        )
