"""Priorities: an integer from 0 to 100, higher is more urgent, and the five names that stand for them.

Knows nothing of requests or settings: where a priority is looked for is told in `trioproxy.request`.
"""

from __future__ import annotations

import re
from typing import Final

LOWEST: Final = 0
HIGHEST: Final = 100

LEVELS: Final = ("very_low", "low", "normal", "high", "critical")
"""The levels, least urgent first. A level covers 20 numbers, the last one 21 (80 to 100)."""

BY_NAME: Final = {name: 20 * index + 10 for index, name in enumerate(LEVELS)}
"""What a name alone means: the middle of its level."""

ACCEPTED: Final = f"an integer from {LOWEST} to {HIGHEST} or one of {', '.join(LEVELS)}"

_LEVEL_OF: Final = tuple(LEVELS[min(number // 20, len(LEVELS) - 1)] for number in range(HIGHEST + 1))
_DIGITS: Final = re.compile(r"0*([0-9]{1,3})", re.ASCII)


def level(number: int) -> str:
    """The name of the level that a priority belongs to."""
    return _LEVEL_OF[number]


def parse(text: str) -> int | None:
    """The priority that `text` means, or None if it means none.

    Accepted: a level's name in any letter case, or an integer in ASCII digits; blanks around it are ignored.
    """
    text = text.strip(" \t\r\n")
    if (named := BY_NAME.get(text.lower())) is not None:
        return named
    if (digits := _DIGITS.fullmatch(text)) is None:
        return None
    number = int(digits[1])
    return number if number <= HIGHEST else None
