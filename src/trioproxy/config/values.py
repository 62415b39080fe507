"""What a value may be. Each parser returns the canonical value or raises ValueError; its text follows ``KEY: ``.

Knows no setting: which one takes which parser is told in `trioproxy.config.settings`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator, SecretStr


class ConfigError(Exception):
    """The configuration cannot be used; the text has one line for each problem, fit to be shown to the operator."""


_DURATION: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(ms|s|m|h|d|)")
_MILLISECONDS: Final = {"ms": 1, "s": 1_000, "": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SECONDS_MAX: Final = 10_000_000
_SIZE: Final = re.compile(r"([0-9]{1,18})\s*((?:[kmgt]i?)?b|)", re.IGNORECASE | re.ASCII)
_BYTES: Final = {
    unit.lower(): factor
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    for unit, factor in ((f"{prefix}B", 1000**power), (f"{prefix}iB", 1024**power))
}
WHOLE_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,18}\Z")
_PRIORITY_NAMES: Final = {"very_low": 10, "low": 30, "normal": 50, "high": 70, "critical": 90}
_LEVELS: Final = ("debug", "info", "warning", "error")
_FORMATS: Final = ("json", "console")
_TREATMENTS: Final = ("schedule", "pass")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_BIND: Final = re.compile(r"unix:/.+|(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^\[\]:]+)):(?P<port>[0-9]{1,5})")
_PRINTABLE: Final = re.compile(r"[!-~]+")
_V1_PREFIX: Final = re.compile(r"/?(?:v1(?:/|$))?")


class _Repr(reprlib.Repr):
    """Short on one line however big the value is: a broken setting may be a whole file pasted by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200

    def repr1(self, x: object, level: int) -> str:
        in_yaml = {None: "null", True: "true", False: "false"}
        return in_yaml[x] if x is None or isinstance(x, bool) else super().repr1(x, level)


shown: Final = _Repr().repr


def unlike(accepted: str, value: object) -> ValueError:
    return ValueError(f"must be {accepted}, not {shown(value)}")


def _seconds(value: object) -> float | None:
    match value:
        case bool():
            return None
        case int() | float():
            # Compared before converted: a huge int has no float, and NaN is never inside a range.
            return float(value) if abs(value) <= _SECONDS_MAX else None
        case str() if found := _DURATION.fullmatch(value.strip()):
            number, unit = found.groups()
            return float(Fraction(number) * _MILLISECONDS[unit] / 1_000)
    return None


def duration(value: object) -> float:
    seconds = _seconds(value)
    if seconds is None or not 0 < seconds <= _SECONDS_MAX:
        raise unlike(f"a duration above 0 and up to {_SECONDS_MAX} (seconds, or like 250ms, 5m, 2h, 1d)", value)
    return seconds


def duration_or_zero(value: object) -> float:
    seconds = _seconds(value)
    if seconds is None or not 0 <= seconds <= _SECONDS_MAX:
        raise unlike(f"a duration from 0 to {_SECONDS_MAX} (seconds, or like 250ms, 5m, 2h, 1d)", value)
    return seconds


def duration_or_off(value: object) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() == "off"):
        return None
    try:
        return duration(value)
    except ValueError as error:
        raise ValueError(str(error).replace("must be ", "must be off or ", 1)) from None


def size(value: object) -> int:
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())):
        size = int(found[1]) * _BYTES[found[2].lower() or "b"]
    if size <= 0:
        raise unlike("a size above 0 (whole bytes, or like 512KiB, 64MiB, 10MB, 1GiB)", value)
    return size


def _whole(value: object) -> int | None:
    if isinstance(value, str) and WHOLE_NUMBER.fullmatch(value.strip()):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _count_or_none(value: object, low: int) -> int | None:
    if value is None:
        return None
    number = _whole(value)
    if number is None or number < low:
        raise unlike(f"a whole number from {low} on", value)
    return number


def count_from_one(value: object) -> int | None:
    return _count_or_none(value, 1)


def count_from_zero(value: object) -> int | None:
    return _count_or_none(value, 0)


def whole_number(low: int, high: int = 2**31 - 1) -> BeforeValidator:
    def parse(value: object) -> int:
        number = _whole(value)
        if number is None or not low <= number <= high:
            raise unlike(f"a whole number from {low} to {high}", value)
        return number

    return BeforeValidator(parse)


def priority_number(value: object) -> int:
    number = _PRIORITY_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    number = _whole(value) if number is None else number
    if number is None or not 0 <= number <= 100:
        raise unlike(f"a whole number from 0 to 100 or one of {', '.join(_PRIORITY_NAMES)}", value)
    return number


def priority_or_none(value: object) -> int | None:
    return None if value is None else priority_number(value)


def level(value: object) -> str:
    if not isinstance(value, str) or value.lower() not in _LEVELS:
        raise unlike(f"one of {', '.join(_LEVELS)}", value)
    return value.lower()


def log_format(value: object) -> object:
    if value is not None and value not in _FORMATS:
        raise unlike("json, console or null (console on a terminal, json elsewhere)", value)
    return value


def file_path(value: object) -> Path | None:
    if value is None:
        return None
    text = str(value) if isinstance(value, str | Path) else ""
    if not Path(text).name or text.endswith("/") or not text.isprintable():
        raise unlike("the path of a file, as text", value)
    return Path(text)


def secret(value: object) -> object:
    if value is None:
        return None
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str):
        raise ValueError("must be text (put it in quotes); what was given is not shown")
    if not text:
        raise ValueError("must not be empty; leave it out to let the client's own Authorization go through")
    if not _PRINTABLE.fullmatch(text):
        raise ValueError("must be ASCII without blanks, line breaks or control characters; what was given is not shown")
    return text


def client_key(value: object) -> object:
    if value == "":
        raise ValueError("must not be empty")
    return secret(value)


def _is_host(host: str) -> bool:
    """Whether this can name a host: an IPv4 address, an IPv6 address without brackets, or a DNS name."""
    try:
        if ":" in host:
            IPv6Address(host)
        elif "." in host and host.replace(".", "").isdecimal():
            IPv4Address(host)
    except ValueError:
        return False
    return ":" in host or bool(_HOST_NAME.fullmatch(host))


def _is_bind(address: object) -> bool:
    found = _BIND.fullmatch(address) if isinstance(address, str) and address.isprintable() else None
    if found is None or found["port"] is None:
        return found is not None
    host = found["host"] or found["v6"]
    return (":" in host) == bool(found["v6"]) and _is_host(host) and int(found["port"]) <= 65_535


def bind(value: object) -> tuple[object, ...]:
    accepted = "HOST:PORT, [IPV6]:PORT or unix:/PATH (every interface: 0.0.0.0:PORT)"
    addresses = tuple(value) if isinstance(value, list | tuple) else (value,)
    addresses = tuple(address.strip() if isinstance(address, str) else address for address in addresses)
    if not addresses:
        raise unlike(f"{accepted}, or a list of at least one such", value)
    if wrong := [address for address in addresses if not _is_bind(address)]:
        raise ValueError(f"must be {accepted}, not {', '.join(map(shown, wrong))}")
    return addresses


def base_url(value: object) -> str:
    accepted = "like https://HOST/v1 or http://HOST:PORT/v1"
    if not isinstance(value, str):
        raise unlike(accepted, value)
    if complaint := _url_complaint(value):
        # What stands before an @ or behind a ? is likely to be a password or a key.
        harmless = re.sub(r"^(\w+://)?.*@", r"\1**********@", value, flags=re.DOTALL)
        harmless = re.sub(r"\?.*", "?**********", harmless, flags=re.DOTALL)
        raise ValueError(f"must be {accepted}, not {shown(harmless)}, which {complaint}")
    return value.rstrip("/")


def _url_complaint(url: str) -> str:
    """What is wrong with this base URL; empty when nothing is."""
    if not _PRINTABLE.fullmatch(url):
        return "is empty or not ASCII without blanks"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "has an impossible host or port"
    complaints = {
        "does not begin with http:// or https://": parts.scheme not in {"http", "https"},
        "has a user or password (use upstream.api_key)": "@" in parts.netloc,
        "has a query or a fragment": "?" in url or "#" in url,
        "has an impossible host or port": port == 0 or not _is_host(parts.hostname or ""),
    }
    return next((complaint for complaint, applies in complaints.items() if applies), "")


def routes(value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise unlike("a mapping of path patterns under /v1/ to schedule or pass", value)
    routes: dict[str, object] = {}
    complaints = []
    for given, treatment in value.items():
        pattern = _V1_PREFIX.sub("", str(given), count=1)
        if complaint := _pattern_complaint(pattern):
            complaints.append(f"the pattern {shown(given)} {complaint}")
        if pattern in routes:
            complaints.append(f"the pattern {shown(given)} is there twice")
        if treatment not in _TREATMENTS:
            complaints.append(f"the pattern {shown(given)} must be set to schedule or pass, not {shown(treatment)}")
        routes[pattern] = treatment
    if complaints:
        raise ValueError("; ".join(complaints))
    return routes


def _pattern_complaint(pattern: str) -> str:
    """What is wrong with this path pattern under /v1/; empty when nothing is."""
    segments = pattern.lower().replace("%2e", ".").split("/")
    if not pattern:
        return "is empty: name a path under /v1/"
    if not _PRINTABLE.fullmatch(pattern):
        return "must be ASCII without blanks, as it stands in a request"
    if "?" in pattern or "#" in pattern:
        return "must not have a query or a fragment: paths match without"
    if "." in segments or ".." in segments:
        return "must not have dot segments"
    if any("*" in segment and segment != "*" for segment in segments):
        return "must have * only as a whole segment"
    return ""


_KEY_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")


def key_name(value: object) -> str:
    if not isinstance(value, str) or not _KEY_NAME.fullmatch(value):
        raise unlike("a name of 1 to 64 letters, digits and . _ -", value)
    return value


def sha256(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("must be a SHA-256 as 64 hexadecimal digits, in quotes; what was given is not shown")
    return value.lower()


def flag(value: object) -> bool:
    text = value.strip().lower() if isinstance(value, str) else value
    if text not in (True, False, "true", "false") or (isinstance(value, int | float) and not isinstance(value, bool)):
        raise unlike("true or false", value)
    return text in (True, "true")


def _glob_complaint(glob: object) -> str:
    return "" if isinstance(glob, str) and _PRINTABLE.fullmatch(glob) else "is not text without blanks"


def globs(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    given = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not given or any(map(_glob_complaint, given)):
        accepted = "a list of models' names without blanks, in which * stands for anything (leave it out to allow all)"
        raise unlike(accepted, value)
    return tuple(map(str, given))


def model_priorities(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise unlike("a mapping of models' names, in which * stands for anything, to priorities", value)
    complaints = []
    priorities: dict[str, int] = {}
    for glob, urgency in value.items():
        complaint = _glob_complaint(glob)
        if not complaint:
            try:
                priorities[str(glob)] = priority_number(urgency)
            except ValueError as error:
                complaint = str(error)
        if complaint:
            complaints.append(f"{shown(glob)} {complaint}")
    if complaints:
        raise ValueError("; ".join(complaints))
    return priorities


def expiry(value: object) -> datetime | None:
    """The moment from which on a key is not accepted any more."""
    if value is None or isinstance(value, datetime):
        return value
    text = value.strip() if isinstance(value, str) else ""
    try:
        moment = datetime.fromisoformat(text)
        # A date alone is its last day.
        moment += timedelta(days=1) if re.fullmatch(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}", text) else timedelta()
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise unlike("a date (2027-01-31: to the end of that day, UTC) or a date and time", value) from None
