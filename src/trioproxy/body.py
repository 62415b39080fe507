"""What the scheduler reads from a JSON body, and taking the field `priority` out of it untouched otherwise.

Knows nothing of HTTP. JSON bodies are never re-serialised: what is not cut out stays byte for byte what it was.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final

import msgspec
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

PRIORITY_KEY: Final = "priority"
_MODEL_KEY: Final = re.compile(rb'"model"', re.IGNORECASE)
_BLANKS: Final = " \t\r\n"
_BLANK_RUN: Final = re.compile(r"[ \t\r\n]*")
_CANDIDATES_MAX: Final = 16
_PARTS_MAX: Final = 1000
_PIECE: Final = 65536
_PART_HEAD_MAX: Final = 2 * _PIECE
_PARAMETER: Final = r';[ \t]*([a-z]+\*?)=("(?:[^"\\]|\\.)*"|[^\s";,=\\]+)'
_PARAMETERS: Final = re.compile(_PARAMETER, re.IGNORECASE)
_DISPOSITION: Final = re.compile(f"form-data(?:{_PARAMETER})*;?", re.IGNORECASE)

MODEL_LENGTH_MAX: Final = 200
"""Characters of a model's name that are kept."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A body as it goes on to the upstream, and the top-level fields that matter here."""

    forwarded: bytes
    model: str | None = None
    """None where it is missing or not a string."""
    stream: bool | None = None
    """None where it is missing or not a boolean."""
    service_tier: str | None = None
    """None where it is missing or not a string."""
    priorities: tuple[str, ...] = ()
    """The values of the fields `priority`, each as its JSON text; they are not in `forwarded` any more."""


class TooDeepError(ValueError):
    """A body that may have a priority, but is nested too deeply to be read."""


class _Fields(msgspec.Struct):
    model: object = None
    stream: object = None
    service_tier: object = None
    priority: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_FIELDS: Final = msgspec.json.Decoder(_Fields)


def read(body: bytes) -> Reading:
    """Read a body of any kind. One that is not a JSON object (multipart, text, broken JSON) has no fields.

    Raises `TooDeepError`.
    """
    if not body.lstrip(b" \t\r\n").startswith(b"{"):
        return Reading(body)
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return Reading(body)
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return _read_thoroughly(body, text)  # it is stricter than those who write JSON
    if fields.priority is msgspec.UNSET:
        return _reading(body, fields.model, fields.stream, fields.service_tier)
    value = bytes(fields.priority)
    if (forwarded := _cut_out_once(body, value)) is None:
        return _read_thoroughly(body, text)
    return _reading(forwarded, fields.model, fields.stream, fields.service_tier, (value.decode(),))


def read_form(body: bytes, boundary: bytes) -> str | None:
    """The field `model` of a form (multipart/form-data, RFC 7578), None where it is missing, given twice or unreadable.

    Unreadable is also a part whose name others may read differently; and what takes long to read: more than 1000 parts,
    or a part with a head of 128 KiB. Otherwise it takes about 5 ms for each MB.
    """
    decoder = MultipartDecoder(boundary, max_form_memory_size=_PART_HEAD_MAX, max_parts=_PARTS_MAX)
    models: list[bytes] = []
    is_model = False
    pieces = (body[at : at + _PIECE] for at in range(0, len(body), _PIECE))
    try:
        for piece in (*pieces, None):
            decoder.receive_data(piece)
            while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
                if isinstance(event, Field | File):
                    if not _is_plainly_named(event):
                        return None
                    is_model = event.name == "model"
                    models += [b""] * is_model
                elif isinstance(event, Data) and is_model:
                    models[-1] += event.data
                    if len(models[-1]) > _PIECE:
                        return None
        (model,) = models
        return model.decode()[:MODEL_LENGTH_MAX]
    except (ValueError, RequestEntityTooLarge):
        return None


def _is_plainly_named(part: Field | File) -> bool:
    """Whether every reader finds the same name: it is said once, without escapes and without blanks around `=`."""
    dispositions = part.headers.getlist("content-disposition")
    if len(dispositions) != 1 or not _DISPOSITION.fullmatch(dispositions[0]):
        return False
    names = [said for said in _PARAMETERS.findall(dispositions[0]) if said[0].lower().startswith("name")]
    return names in ([("name", part.name)], [("name", f'"{part.name}"')])


def names_one_model(body: bytes) -> bool:
    """Whether every reader finds the same `model` in a JSON object: the key is there once, in whatever letter case.

    Of two equal keys some take the first and some the last (RFC 8259 section 4), and Go's decoder ignores case.
    """
    if len(_MODEL_KEY.findall(body)) == 1 and b"\\u00" not in body:
        return True
    try:
        members: list[tuple[str, object]] = json.loads(body, object_pairs_hook=list, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        return False
    return sum(key.lower() == "model" for key, _ in members) == 1


def _reading(
    forwarded: bytes, model: object, stream: object, service_tier: object, priorities: tuple[str, ...] = ()
) -> Reading:
    return Reading(
        forwarded,
        model[:MODEL_LENGTH_MAX] if type(model) is str else None,
        stream if isinstance(stream, bool) else None,
        service_tier if type(service_tier) is str else None,
        priorities,
    )


def _cut_out_once(body: bytes, value: bytes) -> bytes | None:
    """Cut out the only top-level field `priority`, plainly written with this value; None if it is not that simple.

    Each place that looks like it is tried. The right one is where, once it is cut out, a JSON object without a
    priority is left: nothing else can be.
    """
    member = rb'"priority"[ \t\r\n]*:[ \t\r\n]*' + re.escape(value)
    looks_like_it = re.compile(member + rb"[ \t\r\n]*,[ \t\r\n]*|[ \t\r\n]*,[ \t\r\n]*" + member + rb"|" + member)
    for count, found in enumerate(looks_like_it.finditer(body)):
        if count == _CANDIDATES_MAX:
            break
        rest = body[: found.start()] + body[found.end() :]
        try:
            if _FIELDS.decode(rest).priority is msgspec.UNSET:
                return rest
        except (msgspec.DecodeError, RecursionError):
            pass
    return None


def _read_thoroughly(body: bytes, text: str) -> Reading:
    try:
        return _walk(body, text)
    except RecursionError:
        if PRIORITY_KEY in text or "\\u" in text:
            raise TooDeepError("The JSON body is nested too deeply to be read.") from None
    except (ValueError, IndexError):
        pass
    return Reading(body)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# The value of a number does not matter, and reading a long one would take long: its length will do.
_SCANNER: Final = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=_refuse)


def _skip_blanks(text: str, at: int) -> int:
    match = _BLANK_RUN.match(text, at)
    assert match is not None
    return match.end()


def _expect(text: str, at: int, wanted: str) -> int:
    """Returns where the next thing begins, behind one of the wanted characters and blanks."""
    if text[at] not in wanted:
        raise ValueError(f"{text[at]!r} instead of one of {wanted!r}")
    return _skip_blanks(text, at + 1)


def _walk(body: bytes, text: str) -> Reading:
    """Go through the top-level members, and cut out each `priority`, however its key is escaped, with one comma.

    ValueError or IndexError if it is not a JSON object.
    """
    values: dict[str, object] = {}
    priorities: list[str] = []
    kept: list[str] = []
    kept_to = 0
    at = member_from = _expect(text, _skip_blanks(text, 0), "{")
    while text[at] != "}":
        key, at = _SCANNER.raw_decode(text, at)
        value_from = _expect(text, _skip_blanks(text, at), ":")
        value, value_to = _SCANNER.raw_decode(text, value_from)
        if type(key) is not str:
            raise ValueError(f"{key!r} is not a key")
        if key in ("model", "stream", "service_tier"):
            values[key] = value
        at = _skip_blanks(text, value_to)
        is_last = text[at] == "}"
        if key == PRIORITY_KEY:
            priorities.append(text[value_from:value_to])
            kept.append(text[kept_to:member_from])
            kept_to = value_to if is_last else _skip_blanks(text, at + 1)
            if is_last:
                kept = [_without_trailing_comma("".join(kept))]
        if not is_last:
            at = member_from = _expect(text, at, ",")
            if text[at] == "}":
                raise ValueError("a comma before the end")
    if text[at + 1 :].strip(_BLANKS):
        raise ValueError("something behind the object")
    forwarded = "".join([*kept, text[kept_to:]]).encode() if priorities else body
    return _reading(forwarded, values.get("model"), values.get("stream"), values.get("service_tier"), tuple(priorities))


def _without_trailing_comma(members: str) -> str:
    """The members before the last one end with a comma, unless there are none."""
    stripped = members.rstrip(_BLANKS)
    return stripped[:-1] if stripped.endswith(",") else members
