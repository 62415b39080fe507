"""The settings: read from file, environment and command line, checked completely before anything starts.

Values are first gathered from all sources by dotted key (``scheduler.concurrency``), each with its origin, the later
source winning; then the models below judge them in one go, and every problem becomes one line of one `ConfigError`.

This module knows what a setting may be, not what it is used for: it opens no socket, no file but the configuration file
and the certificates and keys that are named in it, and never puts a secret into a text.
"""

import difflib
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, cast
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr, ValidationError

from trioproxy.certificates import certificates_complaint, key_complaint

__all__ = [
    "ConfigError",
    "LoggingSettings",
    "SchedulerSettings",
    "ServerSettings",
    "Settings",
    "TlsSettings",
    "UpstreamSettings",
    "describe",
    "load",
]


class ConfigError(Exception):
    """The configuration cannot be used; the text has one line for each problem, fit to be shown to the operator."""


# What a value may be. Each parser returns the canonical value or raises ValueError; its text follows "KEY: " in a line.

_DURATION: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(ms|s|m|h|d|)")
_MILLISECONDS: Final = {"ms": 1, "s": 1_000, "": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SECONDS_MAX: Final = 10_000_000
_SIZE: Final = re.compile(r"([0-9]{1,18})\s*((?:[kmgt]i?)?b|)", re.IGNORECASE | re.ASCII)
_BYTES: Final = {
    unit.lower(): factor
    for power, prefix in enumerate(("", "K", "M", "G", "T"))
    for unit, factor in ((f"{prefix}B", 1000**power), (f"{prefix}iB", 1024**power))
}
_WHOLE_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,18}\Z")
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


_shown: Final = _Repr().repr


def _unlike(accepted: str, value: object) -> ValueError:
    return ValueError(f"must be {accepted}, not {_shown(value)}")


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


def _duration(value: object) -> float:
    seconds = _seconds(value)
    if seconds is None or not 0 < seconds <= _SECONDS_MAX:
        raise _unlike(f"a duration above 0 and up to {_SECONDS_MAX} (seconds, or like 250ms, 5m, 2h, 1d)", value)
    return seconds


def _duration_or_zero(value: object) -> float:
    seconds = _seconds(value)
    if seconds is None or not 0 <= seconds <= _SECONDS_MAX:
        raise _unlike(f"a duration from 0 to {_SECONDS_MAX} (seconds, or like 250ms, 5m, 2h, 1d)", value)
    return seconds


def _duration_or_off(value: object) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() == "off"):
        return None
    try:
        return _duration(value)
    except ValueError as error:
        raise ValueError(str(error).replace("must be ", "must be off or ", 1)) from None


def _size(value: object) -> int:
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())):
        size = int(found[1]) * _BYTES[found[2].lower() or "b"]
    if size <= 0:
        raise _unlike("a size above 0 (whole bytes, or like 512KiB, 64MiB, 10MB, 1GiB)", value)
    return size


def _whole(value: object) -> int | None:
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value.strip()):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _whole_number(low: int, high: int = 2**31 - 1) -> BeforeValidator:
    def parse(value: object) -> int:
        number = _whole(value)
        if number is None or not low <= number <= high:
            raise _unlike(f"a whole number from {low} to {high}", value)
        return number

    return BeforeValidator(parse)


def _priority(value: object) -> int:
    number = _PRIORITY_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    number = _whole(value) if number is None else number
    if number is None or not 0 <= number <= 100:
        raise _unlike(f"a whole number from 0 to 100 or one of {', '.join(_PRIORITY_NAMES)}", value)
    return number


def _level(value: object) -> str:
    if not isinstance(value, str) or value.lower() not in _LEVELS:
        raise _unlike(f"one of {', '.join(_LEVELS)}", value)
    return value.lower()


def _format(value: object) -> object:
    if value is not None and value not in _FORMATS:
        raise _unlike("json, console or null (console on a terminal, json elsewhere)", value)
    return value


def _file(value: object) -> Path | None:
    if value is None:
        return None
    text = str(value) if isinstance(value, str | Path) else ""
    if not Path(text).name or text.endswith("/") or not text.isprintable():
        raise _unlike("the path of a file, as text", value)
    return Path(text)


def _secret(value: object) -> object:
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


def _bind(value: object) -> tuple[object, ...]:
    accepted = "HOST:PORT, [IPV6]:PORT or unix:/PATH (every interface: 0.0.0.0:PORT)"
    addresses = tuple(value) if isinstance(value, list | tuple) else (value,)
    addresses = tuple(address.strip() if isinstance(address, str) else address for address in addresses)
    if not addresses:
        raise _unlike(f"{accepted}, or a list of at least one such", value)
    if wrong := [address for address in addresses if not _is_bind(address)]:
        raise ValueError(f"must be {accepted}, not {', '.join(map(_shown, wrong))}")
    return addresses


def _base_url(value: object) -> str:
    accepted = "like https://HOST/v1 or http://HOST:PORT/v1"
    if not isinstance(value, str):
        raise _unlike(accepted, value)
    if complaint := _url_complaint(value):
        # What stands before an @ or behind a ? is likely to be a password or a key.
        harmless = re.sub(r"^(\w+://)?.*@", r"\1**********@", value, flags=re.DOTALL)
        harmless = re.sub(r"\?.*", "?**********", harmless, flags=re.DOTALL)
        raise ValueError(f"must be {accepted}, not {_shown(harmless)}, which {complaint}")
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


def _routes(value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise _unlike("a mapping of path patterns under /v1/ to schedule or pass", value)
    routes: dict[str, object] = {}
    complaints = []
    for given, treatment in value.items():
        pattern = _V1_PREFIX.sub("", str(given), count=1)
        if complaint := _pattern_complaint(pattern):
            complaints.append(f"the pattern {_shown(given)} {complaint}")
        if pattern in routes:
            complaints.append(f"the pattern {_shown(given)} is there twice")
        if treatment not in _TREATMENTS:
            complaints.append(f"the pattern {_shown(given)} must be set to schedule or pass, not {_shown(treatment)}")
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


_Duration = Annotated[float, BeforeValidator(_duration)]


class _Section(BaseModel):
    # The input stays out of pydantic's own texts: it may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)


class TlsSettings(_Section):
    """``server.tls``: with both, clients are served over TLS, and HTTP/2 to those that ask for it; both or neither."""

    cert: Annotated[Path | None, BeforeValidator(_file)] = None
    """A PEM file: the server's certificate and those between it and a CA, in this order."""

    key: Annotated[Path | None, BeforeValidator(_file)] = None
    """A PEM file: the certificate's private key, without a passphrase."""


class ServerSettings(_Section):
    """``server``: where to listen, and how long and how much the proxy puts up with from its clients."""

    bind: Annotated[tuple[str, ...], BeforeValidator(_bind)] = ("127.0.0.1:8080",)
    """Addresses to listen on: ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:/PATH``; port 0 is any free one."""

    max_body_size: Annotated[int, BeforeValidator(_size)] = 64 * 2**20
    """Bytes, above 0: the biggest body of a scheduled request."""

    client_write_timeout: _Duration = 60.0
    """Seconds, above 0, that a client may go without reading anything."""

    shutdown_grace: Annotated[float, BeforeValidator(_duration_or_zero)] = 30.0
    """Seconds, 0 included, that requests may still take after SIGTERM."""

    backlog: Annotated[int, _whole_number(1)] = 2048
    """Connections that the kernel keeps waiting to be accepted, at least 1."""

    keep_alive_timeout: _Duration = 75.0
    """Seconds, above 0, that an idle client connection is kept open."""

    max_websockets: Annotated[int, _whole_number(0)] = 100
    """WebSocket sessions at once; 0: none."""

    websocket_idle_timeout: _Duration = 3600.0
    """Seconds, above 0, that a WebSocket session may go on without a message either way."""

    websocket_max_message_size: Annotated[int, BeforeValidator(_size)] = 16 * 2**20
    """Bytes (of a text: characters), above 0: the biggest WebSocket message."""

    tls: TlsSettings = TlsSettings()


class UpstreamSettings(_Section):
    """``upstream``: the server that requests are forwarded to, and how long it may take."""

    base_url: Annotated[str, BeforeValidator(_base_url)] = "https://api.openai.com/v1"
    """http or https, without a trailing slash, query, fragment, user or password."""

    api_key: Annotated[SecretStr | None, BeforeValidator(_secret)] = None
    """Sent instead of the client's ``Authorization``; None: the client's goes through."""

    connect_timeout: _Duration = 10.0
    """Seconds, above 0, for TCP and TLS."""

    first_byte_timeout: _Duration = 600.0
    """Seconds, above 0, from the request sent to the response's headers."""

    idle_timeout: _Duration = 600.0
    """Seconds, above 0, between two reads of the response's body."""

    request_timeout: Annotated[float | None, BeforeValidator(_duration_or_off)] = None
    """Seconds, above 0, for all of the upstream's part; None: no limit."""

    keep_alive_expiry: _Duration = 30.0
    """Seconds, above 0, that an idle upstream connection is kept open."""

    ca_file: Annotated[Path | None, BeforeValidator(_file)] = None
    """A PEM file of the CAs that the upstream's certificate may come from, instead of the public ones; None: those."""

    client_cert: Annotated[Path | None, BeforeValidator(_file)] = None
    """A PEM file: the certificate by which the upstream knows the proxy; None: it does not ask. Needs `client_key`."""

    client_key: Annotated[Path | None, BeforeValidator(_file)] = None
    """A PEM file: the client certificate's private key, without a passphrase."""


class SchedulerSettings(_Section):
    """``scheduler``: how much runs at once, what waits, and which requests are scheduled at all."""

    concurrency: Annotated[int, _whole_number(1)] = 10
    """Slots, at least 1."""

    max_queue: Annotated[int, _whole_number(0)] = 100
    """Requests that may wait; 0: a slot or a rejection."""

    queue_timeout: _Duration = 300.0
    """Seconds, above 0, that a request may wait for a slot."""

    default_priority: Annotated[int, BeforeValidator(_priority)] = 50
    """0 to 100, higher is more urgent; the names of the levels are accepted and stored as numbers."""

    routes: Annotated[dict[str, Literal["schedule", "pass"]], BeforeValidator(_routes)] = {}
    """By path pattern under ``/v1/``, without a leading slash, where ``*`` is one segment: what differs from the
    built-in table of routes."""


class LoggingSettings(_Section):
    """``logging``: what is logged, how, and where besides the standard error stream."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_level)] = "info"
    """The least severe level that is logged."""

    format: Annotated[Literal["json", "console"] | None, BeforeValidator(_format)] = None
    """None: console on a terminal, json elsewhere."""

    file: Annotated[Path | None, BeforeValidator(_file)] = None
    """Also log to this file, always as JSON; None: to none."""


class Settings(_Section):
    """All settings, immutable. ``Settings()`` is the defaults; anything else comes from `load`."""

    server: ServerSettings = ServerSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    logging: LoggingSettings = LoggingSettings()


def describe(settings: Settings) -> dict[str, object]:
    """The effective values by section and key, ready for JSON or YAML; a secret that is set reads ``**********``."""
    return settings.model_dump(mode="json")


# Where values come from.


def _dotted(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


_DOTTED: Final = tuple(_dotted(Settings()))
_INNER_SECTIONS: Final = {key.rpartition(".")[0] for key in _DOTTED} - set(Settings.model_fields)
_PREFIX: Final = "TRIOPROXY_"
_FILE_VARIABLE: Final = "TRIOPROXY_CONFIG"
_ONLY_IN_FILE: Final = "scheduler.routes"
_VARIABLES: Final = {_PREFIX + key.upper().replace(".", "__"): key for key in _DOTTED if key != _ONLY_IN_FILE}
# Kubernetes sets these in every pod beside a Service that is named trioproxy.
_SERVICE_LINK: Final = re.compile(r"TRIOPROXY_(?:SERVICE|PORT)(?:_|$)")
# Deeper than any setting; bounded, because aliases can make a YAML document contain itself.
_DEPTH_MAX: Final = 3
_REFERENCE: Final = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?")


class _Given(NamedTuple):
    value: object
    origin: str


class _Gathered:
    """What the sources say, by dotted key, and what is wrong with what they say."""

    def __init__(self) -> None:
        self.given: dict[str, _Given] = {}
        self.problems: list[str] = []

    def complain(self, subject: str, text: str, origin: str) -> None:
        self.problems.append(f"{subject}: {text} ({origin})")

    def complain_unknown(self, key: str, origin: str) -> None:
        section, _, name = key.rpartition(".")
        # By the last part alone, a misplaced key is found too; where two sections share one, its own section wins.
        # What is in an inner section can only be meant near it.
        near = f"{section}."
        keys = [each for each in (*_INNER_SECTIONS, *_DOTTED) if each.count(".") == 1 or each.startswith(near)]
        known = {each.rpartition(".")[2]: each for each in sorted(keys, key=lambda each: each.startswith(section))}
        known |= {} if section else {each: each for each in Settings.model_fields}
        close = [known[each] for each in difflib.get_close_matches(name, known, n=1)]
        self.complain(key, f"unknown key{_did_you_mean(close)}", origin)


def _did_you_mean(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""


# YAML 1.2's scalars: in PyYAML's YAML 1.1 `off` is false, 8:30 is 510 and 010 is 8.
_NULL: Final = "tag:yaml.org,2002:null"
_TEXT: Final = "tag:yaml.org,2002:str"
_SCALARS: Final[dict[str, tuple[re.Pattern[str], Callable[[str], object]]]] = {
    _NULL: (re.compile(r"(?:~|null|Null|NULL|)\Z"), lambda _: None),
    "tag:yaml.org,2002:bool": (
        re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
        lambda text: text.lower() == "true",
    ),
    "tag:yaml.org,2002:int": (_WHOLE_NUMBER, int),
    "tag:yaml.org,2002:float": (re.compile(r"[+-]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][+-]?[0-9]+)?\Z"), float),
}


class _Loader(yaml.BaseLoader):
    """Knows the scalars above and nothing else; only its node trees are used, so that every value has its line."""


for _tag, (_pattern, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, None)


def _document(path: Path) -> yaml.Node | None:
    """The node tree of a YAML file, None for an empty one. Raises ConfigError without a word of the file's content."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (at byte {error.start + 1})") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"cannot be read: {error}") from None
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"is not valid YAML: {_yaml_complaint(error, text)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"is not valid YAML: line {line}: has a character that is not allowed") from None
    except RecursionError:
        raise ConfigError("is not usable: nested too deeply") from None
    except (ValueError, OverflowError):
        # PyYAML lets these through for escapes such as "\UFFFFFFFF".
        raise ConfigError("is not valid YAML: has an impossible escape or number") from None


def _yaml_complaint(error: yaml.MarkedYAMLError, text: str) -> str:
    # PyYAML quotes these names, and an unquoted secret may look like one.
    problem = re.sub(r"(alias|anchor|tag handle) (['\"]).*?\2", r"\1", error.problem or "")
    mark = error.problem_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    hint = ""
    if "alias" in f"{error.context} {problem}":
        hint = "; text that begins with * needs quotes"
    elif mark and text[: mark.index + 1].endswith("${"):
        hint = "; between braces, text with ${NAME} needs quotes"
    return f"{place}{problem}{hint}"


class _File:
    """One configuration file on its way to `_Gathered`."""

    def __init__(self, path: Path, environ: Mapping[str, str], gathered: _Gathered) -> None:
        self._path = path
        self._environ = environ
        self._gathered = gathered

    def read(self) -> None:
        """Gather all that the file says. Raises ConfigError if it cannot be read as a mapping at all."""
        root = _document(self._path)
        if root is None or root.tag == _NULL:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"must be a mapping of the sections {', '.join(Settings.model_fields)}")
        for section, node, origin in self._entries(root, ""):
            if section not in Settings.model_fields:
                self._gathered.complain_unknown(section, origin)
            else:
                self._read_section(section, node, origin)

    def _read_section(self, section: str, node: yaml.Node, origin: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            if node.tag != _NULL:
                # Text in the place of upstream's keys may be its api_key.
                showable = isinstance(node, yaml.ScalarNode) and section != "upstream"
                shown = f", not {_shown(node.value)}" if showable else ""
                self._gathered.complain(section, f"must be a mapping of keys{shown}", origin)
            return
        for key, child, at in self._entries(node, f"{section}."):
            if key in _INNER_SECTIONS:
                self._read_section(key, child, at)
                continue
            if key not in _DOTTED:
                self._gathered.complain_unknown(key, at)
                continue
            problems_before = len(self._gathered.problems)
            value = self._value(child, key, at)
            if len(self._gathered.problems) == problems_before:
                self._gathered.given[key] = _Given(value, at)

    def _entries(self, node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node, str]]:
        """Each key with the prefix before it, its value, and where it stands; complains of keys given twice."""
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            origin = f"file {self._path}, line {line}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._gathered.complain(f"{prefix}?", "a key must be plain text", origin)
                continue
            key = prefix + str(key_node.value)
            if key in first_lines:
                self._gathered.complain(key, f"is given twice, first on line {first_lines[key]}", origin)
                continue
            first_lines[key] = line
            yield key, value_node, origin

    def _value(self, node: yaml.Node, key: str, origin: str, depth: int = 0) -> object:
        if depth == _DEPTH_MAX:
            return "…"
        if isinstance(node, yaml.MappingNode):
            prefix = f"{key}."
            entries = self._entries(node, prefix)
            return {name.removeprefix(prefix): self._value(child, name, at, depth + 1) for name, child, at in entries}
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, key, origin, depth + 1) for child in node.value]
        if node.tag == _TEXT:
            return self._expand(node.value, key, origin)
        pattern, convert = _SCALARS.get(node.tag, (None, str))
        if pattern is None or not pattern.match(node.value):
            self._gathered.complain(key, "has a YAML tag that is not supported; text with ! needs quotes", origin)
            return None
        return convert(node.value)

    def _expand(self, text: str, key: str, origin: str) -> str:
        def replace(found: re.Match[str]) -> str:
            if found[0] == "$${":
                return "${"
            name = found[1]
            if name is None:
                complaint = "has ${ without a NAME and } behind it; $${ stands for a literal ${"
                self._gathered.complain(key, complaint, origin)
            elif name not in self._environ:
                self._gathered.complain(key, f"needs the environment variable {name}, which is not set", origin)
            return self._environ.get(name or "", "")

        return _REFERENCE.sub(replace, text)


def _read_file(path: Path | str, environ: Mapping[str, str], gathered: _Gathered, subject: str) -> None:
    try:
        if not str(path):
            raise ConfigError("the name of the file is empty")
        _File(Path(path), environ, gathered).read()
    except ConfigError as error:
        gathered.problems.append(f"{subject.strip()}: {error}")


def _read_environment(environ: Mapping[str, str], gathered: _Gathered) -> None:
    for name in sorted(environ):
        if not name.startswith(_PREFIX) or name == _FILE_VARIABLE:
            continue
        key = _VARIABLES.get(name)
        if key is None:
            gathered.problems.append(f"{name}: unknown environment variable{_hint(name)}")
            continue
        value = environ[name].split(",") if key == "server.bind" else environ[name]
        gathered.given[key] = _Given(value, f"environment variable {name}")


def _hint(variable: str) -> str:
    if variable == _PREFIX + _ONLY_IN_FILE.upper().replace(".", "__"):
        return f"; {_ONLY_IN_FILE} can only be set in the file"
    if _SERVICE_LINK.match(variable):
        return "; if it comes from a Kubernetes Service of that name, set enableServiceLinks: false"
    # Without the common prefix, which would make everything look close.
    known = [name.removeprefix(_PREFIX) for name in (*_VARIABLES, _FILE_VARIABLE)]
    close = difflib.get_close_matches(variable.removeprefix(_PREFIX).upper(), known, n=1)
    return _did_you_mean([_PREFIX + name for name in close])


def _validated(gathered: _Gathered) -> Settings | None:
    """The settings, or None when some value is impossible, with each such value among the problems."""
    sections: dict[str, object] = {}
    for dotted, (value, _) in gathered.given.items():
        *path, key = dotted.split(".")
        section = sections
        for name in path:
            section = cast(dict[str, object], section.setdefault(name, {}))
        section[key] = value
    try:
        return Settings.model_validate(sections)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False, include_input=False):
            # Behind a setting's own name comes the place within its value.
            names = [".".join(map(str, error["loc"][:depth])) for depth in (2, 3)]
            dotted = next(name for name in names if name in gathered.given)
            text = error["msg"].removeprefix("Value error, ")
            gathered.complain(dotted, text, gathered.given[dotted].origin)
        return None


def _check_files(settings: Settings, gathered: _Gathered) -> None:
    """Complain of certificates and keys that cannot be used, alone or together."""

    def complain(key: str, text: str, because_of: str = "") -> None:
        gathered.complain(key, text, gathered.given[because_of or key].origin)

    def check(key: str, path: Path, complaint: str) -> bool:
        if complaint:
            complain(key, f"must be a PEM file, not {_shown(str(path))}, {complaint}")
        return not complaint

    tls, upstream = settings.server.tls, settings.upstream
    if upstream.ca_file is not None:
        check("upstream.ca_file", upstream.ca_file, certificates_complaint(upstream.ca_file))
    for cert_key, cert, key_key, key in (
        ("server.tls.cert", tls.cert, "server.tls.key", tls.key),
        ("upstream.client_cert", upstream.client_cert, "upstream.client_key", upstream.client_key),
    ):
        if cert is not None and key is not None:
            if check(cert_key, cert, certificates_complaint(cert)):
                check(key_key, key, key_complaint(key, cert))
        elif cert is not None:
            complain(key_key, f"is missing: {cert_key} needs it", cert_key)
        elif key is not None:
            complain(cert_key, f"is missing: {key_key} needs it", key_key)


def _printable(problem: str) -> str:
    # Keys, paths and names are the user's: a line break in one would look like another problem.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in problem)


def load(
    path: Path | str | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] | None = None,
) -> Settings:
    """The settings from the file, the environment and the command line, each winning over the one before.

    Without `path`, the file is what ``TRIOPROXY_CONFIG`` names, if anything. `overrides` go by dotted key. Raises
    ConfigError, with every problem of every source at once, and nothing else, whatever the sources contain.
    """
    gathered = _Gathered()
    if path is not None:
        _read_file(path, environ, gathered, str(path))
    elif _FILE_VARIABLE in environ:
        path = environ[_FILE_VARIABLE]
        _read_file(path, environ, gathered, f"{path} (named by {_FILE_VARIABLE})")
    _read_environment(environ, gathered)
    for key, value in (overrides or {}).items():
        if key in _DOTTED:
            gathered.given[key] = _Given(value, "the command line")
        else:
            gathered.complain_unknown(key, "the command line")
    settings = _validated(gathered)
    if settings is not None:
        _check_files(settings, gathered)
    if settings is None or gathered.problems:
        raise ConfigError("\n".join(map(_printable, gathered.problems)))
    return settings
