"""Types of the command line's numbers: each refuses what is out of range, and says what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Final

__all__ = ["natural", "positive", "seconds"]


def _number(kind: type[int] | type[float], allowed: str, check: Callable[[float], bool]) -> Callable[[str], float]:
    """A type for argparse: a number that ``check`` allows; ``allowed`` says so in words."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not check(value):
            raise argparse.ArgumentTypeError(f"{text}: use {allowed}")
        return value

    return parse


positive: Final = _number(int, "a positive integer", lambda value: value >= 1)
natural: Final = _number(int, "an integer of at least 0", lambda value: value >= 0)
seconds: Final = _number(float, "a positive number of seconds", lambda value: 0 < value < math.inf)
