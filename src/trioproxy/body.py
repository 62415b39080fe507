"""What the scheduler reads from a JSON body, and taking the field `priority` out of it untouched otherwise.

Knows nothing of HTTP. Bodies are never re-serialised: what is not cut out stays byte for byte what it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

import msgspec

PRIORITY_KEY: Final = "priority"
_BLANKS: Final = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Reading:
    """A body as it goes on to the upstream, and the top-level fields that matter here."""

    forwarded: bytes
    model: str | None = None
    """None where it is missing or not a string."""
    stream: bool | None = None
    """None where it is missing or not a boolean."""
    priorities: tuple[str, ...] = ()
    """The values of the fields `priority`, each as its JSON text; they are not in `forwarded` any more."""


class TooDeepError(ValueError):
    """A body with a priority whose nesting is beyond reading."""


class _Fields(msgspec.Struct):
    model: object = None
    stream: object = None
    priority: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_FIELDS: Final = msgspec.json.Decoder(_Fields)


def read(body: bytes) -> Reading:
    """Read a body of any kind. One that is not a JSON object (multipart, text, broken JSON) has no fields."""
    if not body.lstrip(b" \t\r\n").startswith(b"{"):
        return Reading(body)
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Reading(body)
    forwarded = body
    priorities: tuple[str, ...] = ()
    if fields.priority is not msgspec.UNSET:
        try:
            forwarded, priorities = _take_out_priority(body)
        except RecursionError:
            raise TooDeepError("The JSON body is nested too deeply to be read.") from None
        except ValueError:  # broken where the first reader did not look
            return Reading(body)
    return Reading(
        forwarded,
        fields.model if isinstance(fields.model, str) else None,
        fields.stream if isinstance(fields.stream, bool) else None,
        priorities,
    )


def _as_text(number: str) -> str:
    return number


# Numbers stay text: nothing is lost of them, and a long one costs nothing.
_SCANNER: Final = json.JSONDecoder(parse_int=_as_text, parse_float=_as_text, strict=False)


def _skip_blanks(text: str, at: int) -> int:
    while text[at] in _BLANKS:
        at += 1
    return at


def _take_out_priority(body: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Cut out each top-level field `priority`, however its key is escaped, with its value and one comma."""
    text = body.decode()
    priorities: list[str] = []
    kept: list[str] = []
    kept_to = 0
    at = member_from = _skip_blanks(text, _skip_blanks(text, 0) + 1)
    while text[at] != "}":
        key, at = _SCANNER.raw_decode(text, at)
        value_from = _skip_blanks(text, _skip_blanks(text, at) + 1)
        _, value_to = _SCANNER.raw_decode(text, value_from)
        at = _skip_blanks(text, value_to)
        is_last = text[at] == "}"
        if key == PRIORITY_KEY:
            priorities.append(text[value_from:value_to])
            kept.append(text[kept_to:member_from])
            kept_to = value_to if is_last else _skip_blanks(text, at + 1)
            if is_last:
                kept = [_without_trailing_comma("".join(kept))]
        if not is_last:
            at = member_from = _skip_blanks(text, at + 1)
    return "".join([*kept, text[kept_to:]]).encode(), tuple(priorities)


def _without_trailing_comma(members: str) -> str:
    """The members before the last one end with a comma, unless there are none."""
    stripped = members.rstrip(_BLANKS)
    return stripped[:-1] if stripped.endswith(",") else members
