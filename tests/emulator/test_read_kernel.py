"""The read-only kernel of the benchmarks on the emulator: every byte once, nothing beyond, whatever the size and grid."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from densemoe.compile.emulator import GlobalMemory, Launch, run
from densemoe.runtime.bench_read import BATCH, PTX, SYMBOL, WORD

MAGIC = 0x5A17B01D


def launch(words: np.ndarray, grid: int, threads: int) -> np.ndarray:
    memory = GlobalMemory()
    out = np.zeros(4, np.uint32)
    at = memory.add("base", words, writable=False)
    parameters = struct.pack("<QQQ", at, words.nbytes // WORD, memory.add("out", out, written=False))
    run(PTX, Launch(SYMBOL, (grid, 1, 1), (threads, 1, 1), (1, 1, 1), 0, parameters), memory)
    return out


@pytest.mark.parametrize("vectors", [1, 31, 64, 64 * BATCH, 64 * BATCH + 1, 1000])
def test_every_word_is_read_by_one_thread(vectors: int) -> None:
    """One thread's words sum to the magic number exactly where one planted word is read: all places are found, and only there is written."""
    for place in {0, vectors // 2, vectors * 4 - 1}:
        words = np.zeros(4 * vectors, np.uint32)
        words[place] = MAGIC
        assert launch(words, 2, 32)[0] == MAGIC, place
    assert launch(np.zeros(4 * vectors, np.uint32), 2, 32)[0] == 0


def test_nothing_beyond_the_end_is_read() -> None:
    """The emulator's memory ends with the array: a read behind it fails the run."""
    for vectors in (3, 65, 129):
        launch(np.ones(4 * vectors, np.uint32), 4, 32)
