"""What the sources say, by dotted key (``scheduler.concurrency``), each value with its origin, and what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from pydantic import BaseModel

from trioproxy.config.settings import KeySettings, Settings


def _dotted(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


KEYS: Final = "keys"
"""The one section that is a list: its entries are `keys.0`, `keys.1`, …, and what is in them `keys.0.name`, …"""

DOTTED: Final = tuple(dotted for dotted in _dotted(Settings()) if dotted != KEYS)
INNER_SECTIONS: Final = {key.rpartition(".")[0] for key in DOTTED} - set(Settings.model_fields)
ONLY_IN_FILE: Final = frozenset({"scheduler.routes", "scheduler.model_priorities"})


class Given(NamedTuple):
    value: object
    origin: str


class Gathered:
    """What the sources say, by dotted key, and what is wrong with what they say."""

    def __init__(self) -> None:
        self.given: dict[str, Given] = {}
        self.problems: list[str] = []

    def complain(self, subject: str, text: str, origin: str) -> None:
        subject = re.sub(rf"^{KEYS}\.([0-9]+)", rf"{KEYS}[\1]", subject)
        self.problems.append(f"{subject}: {text} ({origin})")

    def complain_unknown(self, key: str, origin: str) -> None:
        section, _, name = key.rpartition(".")
        # By the last part alone, a misplaced key is found too; where two sections share one, its own section wins.
        # What is in an inner section can only be meant near it.
        near = f"{section}."
        if section.startswith(f"{KEYS}."):
            close = difflib.get_close_matches(name, KeySettings.model_fields, n=1)
            self.complain(key, f"unknown key{did_you_mean(close)}", origin)
            return
        keys = [each for each in (*INNER_SECTIONS, *DOTTED) if each.count(".") == 1 or each.startswith(near)]
        known = {each.rpartition(".")[2]: each for each in sorted(keys, key=lambda each: each.startswith(section))}
        known |= {} if section else {each: each for each in Settings.model_fields}
        close = [known[each] for each in difflib.get_close_matches(name, known, n=1)]
        self.complain(key, f"unknown key{did_you_mean(close)}", origin)


def did_you_mean(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""


def value_of(settings: Settings, dotted: str) -> object:
    """The value of one setting."""
    found: object = settings
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


def _ordered(value: object) -> object:
    return tuple(value.items()) if isinstance(value, dict) else value  # the first pattern that fits counts


def changes(before: Settings, after: Settings) -> Iterator[str]:
    """The dotted keys of the settings in which two configurations differ; client keys go as ``keys.NAME``."""
    yield from (dotted for dotted in DOTTED if _ordered(value_of(before, dotted)) != _ordered(value_of(after, dotted)))
    known, wanted = ({key.name: key for key in settings.keys} for settings in (before, after))
    yield from (f"{KEYS}.{name}" for name in sorted(known | wanted) if known.get(name) != wanted.get(name))


def with_values_of(before: Settings, dotted_keys: Iterable[str], after: Settings) -> Settings:
    """`after`, but with the values that `before` has for these settings."""
    settings = after
    for dotted in dotted_keys:
        *path, name = dotted.split(".")
        replaced: object = value_of(before, dotted)
        for depth in range(len(path), -1, -1):
            model = value_of(settings, ".".join(path[:depth])) if depth else settings
            assert isinstance(model, BaseModel)
            replaced = model.model_copy(update={[*path, name][depth]: replaced})
        assert isinstance(replaced, Settings)
        settings = replaced
    return settings
