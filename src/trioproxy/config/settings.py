"""The settings themselves: which there are, what each may be, what each means."""

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SecretStr

from trioproxy.config import values

_Duration = Annotated[float, BeforeValidator(values.duration)]


class _Section(BaseModel):
    # The input stays out of pydantic's own texts: it may be a secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)


class TlsSettings(_Section):
    """``server.tls``: with both, clients are served over TLS, and HTTP/2 to those that ask for it; both or neither."""

    cert: Annotated[Path | None, BeforeValidator(values.file_path)] = None
    """A PEM file: the server's certificate and those between it and a CA, in this order."""

    key: Annotated[Path | None, BeforeValidator(values.file_path)] = None
    """A PEM file: the certificate's private key, without a passphrase."""


class ServerSettings(_Section):
    """``server``: where to listen, and how long and how much the proxy puts up with from its clients."""

    bind: Annotated[tuple[str, ...], BeforeValidator(values.bind)] = ("127.0.0.1:8080",)
    """Addresses to listen on: ``HOST:PORT``, ``[IPV6]:PORT`` or ``unix:/PATH``; port 0 is any free one."""

    max_body_size: Annotated[int, BeforeValidator(values.size)] = 64 * 2**20
    """Bytes, above 0: the biggest body of a scheduled request."""

    client_write_timeout: _Duration = 60.0
    """Seconds, above 0, that a client may go without reading anything."""

    shutdown_grace: Annotated[float, BeforeValidator(values.duration_or_zero)] = 30.0
    """Seconds, 0 included, that requests may still take after SIGTERM."""

    backlog: Annotated[int, values.whole_number(1)] = 2048
    """Connections that the kernel keeps waiting to be accepted, at least 1."""

    keep_alive_timeout: _Duration = 75.0
    """Seconds, above 0, that an idle client connection is kept open."""

    max_websockets: Annotated[int, values.whole_number(0)] = 100
    """WebSocket sessions at once; 0: none."""

    websocket_idle_timeout: _Duration = 3600.0
    """Seconds, above 0, that a WebSocket session may go on without a message either way."""

    websocket_max_message_size: Annotated[int, BeforeValidator(values.size)] = 16 * 2**20
    """Bytes (of a text: characters), above 0: the biggest WebSocket message."""

    control_socket: Annotated[Path | None, BeforeValidator(values.file_path)] = None
    """A Unix socket, made at the start with mode 0600, for ``trioproxy reload``; None: none."""

    tls: TlsSettings = TlsSettings()


class UpstreamSettings(_Section):
    """``upstream``: the server that requests are forwarded to, and how long it may take."""

    base_url: Annotated[str, BeforeValidator(values.base_url)] = "https://api.openai.com/v1"
    """http or https, without a trailing slash, query, fragment, user or password."""

    api_key: Annotated[SecretStr | None, BeforeValidator(values.secret)] = None
    """Sent instead of the client's ``Authorization``; None: the client's goes through."""

    connect_timeout: _Duration = 10.0
    """Seconds, above 0, for TCP and TLS."""

    first_byte_timeout: _Duration = 600.0
    """Seconds, above 0, from the request sent to the response's headers."""

    idle_timeout: _Duration = 600.0
    """Seconds, above 0, between two reads of the response's body."""

    request_timeout: Annotated[float | None, BeforeValidator(values.duration_or_off)] = None
    """Seconds, above 0, for all of the upstream's part; None: no limit."""

    keep_alive_expiry: _Duration = 30.0
    """Seconds, above 0, that an idle upstream connection is kept open."""

    ca_file: Annotated[Path | None, BeforeValidator(values.file_path)] = None
    """A PEM file of the CAs that the upstream's certificate may come from, instead of the public ones; None: those."""

    client_cert: Annotated[Path | None, BeforeValidator(values.file_path)] = None
    """A PEM file: the certificate by which the upstream knows the proxy; None: it does not ask. Needs `client_key`."""

    client_key: Annotated[Path | None, BeforeValidator(values.file_path)] = None
    """A PEM file: the client certificate's private key, without a passphrase."""


class SchedulerSettings(_Section):
    """``scheduler``: how much runs at once, what waits, and which requests are scheduled at all."""

    concurrency: Annotated[int, values.whole_number(1)] = 10
    """Slots, at least 1."""

    max_queue: Annotated[int, values.whole_number(0)] = 100
    """Requests that may wait; 0: a slot or a rejection."""

    queue_timeout: _Duration = 300.0
    """Seconds, above 0, that a request may wait for a slot."""

    default_priority: Annotated[int, BeforeValidator(values.priority_number)] = 50
    """0 to 100, higher is more urgent; the names of the levels are accepted and stored as numbers."""

    model_priorities: Annotated[dict[str, int], BeforeValidator(values.model_priorities)] = {}
    """By model, ``*`` stands for anything, the first that fits counts: the priority of requests that say none and whose
    key says none."""

    honor_service_tier: Annotated[bool, BeforeValidator(values.flag)] = False
    """Whether a body's ``service_tier`` is a priority: ``flex`` is ``low``, ``priority`` is ``high``."""

    routes: Annotated[dict[str, Literal["schedule", "pass"]], BeforeValidator(values.routes)] = {}
    """By path pattern under ``/v1/``, without a leading slash, where ``*`` is one segment: what differs from the
    built-in table of routes."""


class KeySettings(_Section):
    """One of ``keys``: a client key, and what may be asked for with it. Either `key` or `key_sha256`."""

    name: Annotated[str, BeforeValidator(values.key_name)]
    """1 to 64 letters, digits and ``.``, ``_``, ``-``: what logs and metrics call the key."""

    key: Annotated[SecretStr | None, BeforeValidator(values.client_key)] = None
    """The key itself; better ``${NAME}``, or its SHA-256 instead."""

    key_sha256: Annotated[str | None, BeforeValidator(values.sha256)] = None
    """The key's SHA-256, 64 hexadecimal digits: ``trioproxy keys new NAME`` prints it."""

    default_priority: Annotated[int | None, BeforeValidator(values.priority_or_none)] = None
    """0 to 100, or a level's name: of requests that say none; None: as if there were no key."""

    max_priority: Annotated[int, BeforeValidator(values.priority_number)] = 100
    """0 to 100, or a level's name: the highest that requests may say. A higher one gets a 403, unless `clamp`."""

    clamp: Annotated[bool, BeforeValidator(values.flag)] = False
    """Whether a priority above `max_priority` is lowered to it instead of refused."""

    models: Annotated[tuple[str, ...] | None, BeforeValidator(values.globs)] = None
    """The models that scheduled requests and WebSocket sessions may name, ``*`` stands for anything; None: all."""

    max_concurrency: Annotated[int | None, BeforeValidator(values.count_from_one)] = None
    """Slots, at least 1, that its requests may have at once; None: no limit of its own. Others overtake what waits, but
    without `max_queue` what waits may fill the queue."""

    max_queue: Annotated[int | None, BeforeValidator(values.count_from_zero)] = None
    """Requests of it that may wait; beyond that they get a 429; None: no limit of its own."""

    expires: Annotated[datetime | None, BeforeValidator(values.expiry)] = None
    """A date (to its end, UTC), or a date and time, from which on the key is not accepted; None: never."""

    @property
    def sha256(self) -> str:
        """The key's SHA-256, 64 hexadecimal digits, whichever way it was given."""
        if self.key_sha256 is not None:
            return self.key_sha256
        assert self.key is not None
        return hashlib.sha256(self.key.get_secret_value().encode()).hexdigest()


class LoggingSettings(_Section):
    """``logging``: what is logged, how, and where besides standard output."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(values.level)] = "info"
    """The least severe level that is logged."""

    format: Annotated[Literal["json", "console"] | None, BeforeValidator(values.log_format)] = None
    """None: console on a terminal, json elsewhere."""

    file: Annotated[Path | None, BeforeValidator(values.file_path)] = None
    """Also log to this file, always as JSON; None: to none."""


class Settings(_Section):
    """All settings, immutable. ``Settings()`` is the defaults; anything else comes from `load`."""

    server: ServerSettings = ServerSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    keys: tuple[KeySettings, ...] = ()
    logging: LoggingSettings = LoggingSettings()


def describe(settings: Settings) -> dict[str, object]:
    """The effective values by section and key, ready for JSON or YAML; a secret that is set reads ``**********``."""
    described = settings.model_dump(mode="json")
    if not settings.keys:
        del described["keys"]  # an empty list in a file is refused
    return described
