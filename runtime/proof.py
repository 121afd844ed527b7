"""sha256 of files, whole and by blocks: a reader that wants one line of a long file compares the blocks that hold it.

An index states the digest of each block of a manifest beside the digest of the whole (manifest.py). A first kernel then hashes three blocks
instead of a quarter of a megabyte, and still nothing of a manifest is used before it has been compared.
"""

from __future__ import annotations

import hashlib
from typing import Final

from densemoe.runtime.errors import ArtifactCorrupt

__all__ = ["BLOCK", "DIGITS", "Proof", "block_digests", "sha256_hex"]

#: Bytes of a block; the last may be shorter.
BLOCK: Final = 8192
#: Hexadecimal digits of a sha256.
DIGITS: Final = 64

#: Copied for each digest: looking the algorithm up takes longer than hashing a cubin.
_SHA256: Final = hashlib.sha256()


def sha256_hex(data: bytes | memoryview) -> str:
    """sha256 of ``data`` in lower-case hexadecimal digits."""
    digest = _SHA256.copy()
    digest.update(data)
    return digest.hexdigest()


def block_digests(data: bytes) -> str:
    """sha256 of each block of ``data``, one behind the other, in lower-case hexadecimal digits."""
    view = memoryview(data)
    return "".join(sha256_hex(view[start : start + BLOCK]) for start in range(0, len(data), BLOCK))


class Proof:
    """Compares a file's blocks with their digests, each when it is first asked for.

    Args:
        data: the file's bytes.
        size: bytes that it must have.
        digests: of its blocks (``block_digests``), from a source that is trusted.
        fault: what a message says of other bytes.

    Raises:
        ArtifactCorrupt: here where the size differs, and in every method where a block does.
    """

    def __init__(self, data: bytes, size: int, digests: str, fault: str) -> None:
        self._data, self._digests, self._fault = memoryview(data), digests, fault
        self._missing = set(range(len(digests) // DIGITS))
        if len(data) != size:
            raise ArtifactCorrupt(fault)

    def part(self, start: int, end: int) -> None:
        """Bytes ``start`` to ``end`` are what they should be."""
        for block in range(start // BLOCK, (end - 1) // BLOCK + 1):
            if block in self._missing:
                if sha256_hex(self._data[block * BLOCK : (block + 1) * BLOCK]) != self._digests[block * DIGITS : (block + 1) * DIGITS]:
                    raise ArtifactCorrupt(self._fault)
                self._missing.discard(block)

    def whole(self) -> None:
        """All of them are."""
        self.part(0, len(self._data))
