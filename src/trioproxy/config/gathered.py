"""What the sources say, by dotted key (``scheduler.concurrency``), each value with its origin, and what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Final, NamedTuple

from pydantic import BaseModel

from trioproxy.config.settings import Settings


def _dotted(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


DOTTED: Final = tuple(_dotted(Settings()))
INNER_SECTIONS: Final = {key.rpartition(".")[0] for key in DOTTED} - set(Settings.model_fields)
ONLY_IN_FILE: Final = "scheduler.routes"


class Given(NamedTuple):
    value: object
    origin: str


class Gathered:
    """What the sources say, by dotted key, and what is wrong with what they say."""

    def __init__(self) -> None:
        self.given: dict[str, Given] = {}
        self.problems: list[str] = []

    def complain(self, subject: str, text: str, origin: str) -> None:
        self.problems.append(f"{subject}: {text} ({origin})")

    def complain_unknown(self, key: str, origin: str) -> None:
        section, _, name = key.rpartition(".")
        # By the last part alone, a misplaced key is found too; where two sections share one, its own section wins.
        # What is in an inner section can only be meant near it.
        near = f"{section}."
        keys = [each for each in (*INNER_SECTIONS, *DOTTED) if each.count(".") == 1 or each.startswith(near)]
        known = {each.rpartition(".")[2]: each for each in sorted(keys, key=lambda each: each.startswith(section))}
        known |= {} if section else {each: each for each in Settings.model_fields}
        close = [known[each] for each in difflib.get_close_matches(name, known, n=1)]
        self.complain(key, f"unknown key{did_you_mean(close)}", origin)


def did_you_mean(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""
