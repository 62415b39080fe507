"""Calls to the one upstream: a context manager per call. Errors of the HTTP clients become `ProxyError` here alone.

Admission already decides how many calls there are, so connections never queue: an idle one is taken from a
last-in-first-out stack, or a new one is made. They are `http1_client`'s, or `httpcore_client`'s where the environment
names a forward proxy.
"""

from __future__ import annotations

import math
import os
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx
import trio

from trioproxy import errors, http1_client, httpcore_client
from trioproxy.config import ConfigError, UpstreamSettings
from trioproxy.errors import Headers, ProxyError
from trioproxy.events import Progress
from trioproxy.http1 import Head, ProtocolError, UnsendableError
from trioproxy.http1_client import Origin, Timing
from trioproxy.network import READ_SIZE, Dial
from trioproxy.upload import Body

_CLOSE_SECONDS_MAX: Final = 1.0

KNOWN_OUT_SECONDS: Final = 10.0
"""How long a failed attempt to connect counts as knowledge that the upstream is out."""


COARSE_SECONDS_MIN: Final = 100.0
"""Limits from here on are kept by a look at all calls now and then: to set a scope's deadline for each piece of a
stream, and to take it back while the client is written to, costs as much as reading the piece."""


class _Phases:
    """The time limits of one call, on one cancel scope: one phase is under way at a time, the whole goes on beside."""

    def __init__(self, settings: UpstreamSettings, request_timeout: float | None) -> None:
        self.write_timeout: Final = settings.idle_timeout
        self.began = trio.current_time()
        self.sent_at: float | None = None
        self._settings = settings
        self._request_timeout = request_timeout
        self._ends = math.inf if request_timeout is None else self.began + request_timeout
        self.scope: Final = trio.CancelScope()
        self._due = math.inf
        self._setting = ""
        self._limit = math.inf

    def enter(self, setting: str, limit: float) -> None:
        """From now on at most `limit` seconds, by the setting of that name."""
        self._setting, self._limit = setting, limit
        self._due = trio.current_time() + limit
        deadline = min(self._due, self._ends) if limit < COARSE_SECONDS_MIN else self._ends
        if self.scope.deadline != deadline:
            self.scope.deadline = deadline

    def end_overdue(self, now: float) -> None:
        """End the call if its limit has passed; for limits that the scope does not keep."""
        if now >= self._due:
            self.scope.cancel(reason=self._setting)

    def leave(self) -> None:
        """Wait for nothing in particular."""
        self._due = math.inf
        if self.scope.deadline != self._ends:
            self.scope.deadline = self._ends

    @property
    def seconds(self) -> float:
        """Since the request was sent; since the call began if it never was."""
        return trio.current_time() - (self.began if self.sent_at is None else self.sent_at)

    def error(self, upstream: str) -> ProxyError:
        """What it means that the scope's deadline has passed."""
        if self._request_timeout is not None and trio.current_time() >= self._ends:
            setting, limit = "upstream.request_timeout", self._request_timeout
        else:
            setting, limit = self._setting, self._limit
        if setting == "upstream.connect_timeout":
            reason = f"no connection within {limit:g} s ({setting})."
            return ProxyError(errors.UPSTREAM_UNREACHABLE, upstream=upstream, reason=reason)
        return ProxyError(errors.UPSTREAM_TIMEOUT, limit=limit, setting=setting)

    def connecting(self) -> None:
        """A new connection is made."""
        self.enter("upstream.connect_timeout", self._settings.connect_timeout)

    def sending(self) -> None:
        """There is a connection, and the request is sent on it."""
        self.sent_at = trio.current_time()
        self.leave()

    def sent(self) -> None:
        """All of the request has been sent, or all that the upstream takes."""
        self.enter("upstream.first_byte_timeout", self._settings.first_byte_timeout)


class Connection(Protocol):
    """What a call goes through: one request at a time, on one connection that is opened as needed."""

    @property
    def whole(self) -> bool:
        """Whether the answer has been read to its end."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether another request can be made on this connection, now that the answer is whole."""
        ...

    @property
    def at_hand(self) -> bool:
        """Whether the next piece of the body is there already, or its end."""
        ...

    async def ask(self, method: str, target: bytes, headers: Headers, body: Body, timing: Timing) -> Head:
        """Send a request and wait for the head of its answer."""
        ...

    async def read(self) -> bytes:
        """What has come of the body; waits until there is something. b"" at the end."""
        ...

    def switch(self) -> tuple[httpcore.AsyncNetworkStream, bytes]:
        """The connection of an answer 101, and what has come of the new protocol together with the head."""
        ...

    async def aclose(self) -> None:
        """Close the connection."""
        ...


class Response:
    """The upstream's answer: its head, and its body piece by piece as it arrives."""

    def __init__(self, head: Head, connection: Connection, phases: _Phases, idle_timeout: float) -> None:
        self.status: Final = head.status
        self.headers: Final[Headers] = head.headers
        self._connection = connection
        self._phases = phases
        self._idle_timeout = idle_timeout

    @property
    def whole(self) -> bool:
        """Whether the body has been read to its end."""
        return self._connection.whole

    @property
    def at_hand(self) -> bool:
        """Whether the next piece is there already, or the end."""
        return self._connection.at_hand

    async def read(self) -> bytes:
        """What has arrived, joined, 64 KiB or so at most; waits until there is something. b"" at the end.

        With the last piece `whole` may be true already. Raises `ProxyError` if the upstream breaks off: not before
        everything that came until then has been returned.
        """
        if not self._connection.at_hand:
            self._phases.enter("upstream.idle_timeout", self._idle_timeout)
        try:
            return await self._connection.read()
        except (httpcore.NetworkError, httpcore.ProtocolError, ProtocolError) as error:
            raise ProxyError(errors.UPSTREAM_BROKE_OFF, reason=_reason(error)) from error
        finally:
            self._phases.leave()

    def switch(self) -> Switched:
        """The connection of an answer 101, in its new protocol."""
        return Switched(*self._connection.switch(), self._idle_timeout)


class Switched:
    """What the connection has become by an answer 101: bytes in both directions, as long as the call is open."""

    def __init__(self, network: httpcore.AsyncNetworkStream, first: bytes, write_timeout: float) -> None:
        self._network = network
        self._first = first
        self._write_timeout = write_timeout

    async def read(self) -> bytes:
        """What has come; b"" at the end. Raises `ProxyError` if the upstream breaks off."""
        if self._first:
            data, self._first = self._first, b""
            return data
        try:
            return await self._network.read(READ_SIZE)
        except httpcore.NetworkError as error:
            reason = _reason(error) if str(error) else "the connection was reset."
            raise ProxyError(errors.UPSTREAM_BROKE_OFF, reason=reason) from error

    async def write(self, data: bytes) -> None:
        """Send everything. Raises `ProxyError` if the upstream has gone or does not take it in time."""
        try:
            await self._network.write(data, self._write_timeout)
        except httpcore.WriteTimeout as error:
            limit = self._write_timeout
            raise ProxyError(errors.UPSTREAM_TIMEOUT, limit=limit, setting="upstream.idle_timeout") from error
        except httpcore.NetworkError as error:
            raise ProxyError(errors.UPSTREAM_BROKE_OFF, reason="it does not take what is sent any more.") from error


class Upstream:
    """The server that calls go to, and the idle connections to it.

    `trust_env`: whether connections go through the forward proxy that the environment names, if any; raises
    `ConfigError` if that cannot be used. `dial` connects in another way than by TCP.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        trust_env: bool = True,
        dial: Dial = trio.open_tcp_stream,
    ) -> None:
        self._settings = settings
        self._url = httpx.URL(settings.base_url)
        self._path: Final = self._url.raw_path.rstrip(b"/")
        self.host: Final = self._url.netloc
        """The value of the header `Host` for this upstream."""
        self._forward_proxy: Final = _environment_proxy(self._url) if trust_env else None
        self.tls: Final = _tls_context(self._url, settings)
        """What the upstream's certificate is checked against, and which one is shown to it."""
        self._new_connection: Final = _connections(self._url, self.tls, settings, self._forward_proxy, dial)
        self._idle: deque[tuple[Connection, float]] = deque()
        self._calls: set[_Phases] = set()
        self._unreachable_at = -math.inf

    def reconfigure(self, settings: UpstreamSettings) -> None:
        """Use another key and other timeouts from the next call on. The URL and what belongs to TLS stay."""
        self._settings = settings

    @property
    def authorization(self) -> bytes | None:
        """The value of the header `Authorization` that replaces the client's; None if the client's goes through."""
        api_key = self._settings.api_key
        return None if api_key is None else b"Bearer " + api_key.get_secret_value().encode()

    @asynccontextmanager
    async def open(
        self, method: str, target: bytes, headers: Headers, body: Body, progress: Progress, *, switches: bool = False
    ) -> AsyncIterator[Response]:
        """One call. The answer's head has arrived when the block is entered; when it is left, the call is over.

        `target` is what follows the base URL's path: a raw path and query. The connection is kept for a later call if
        the answer was read to its end and closed otherwise, so that the upstream notices. What the call came to is
        written into `progress`. `switches`: it asks for another protocol, which the answer 101 grants for as long as
        the block lasts. Raises `ProxyError`: UPSTREAM_UNREACHABLE, UPSTREAM_PROTOCOL_ERROR, UPSTREAM_TIMEOUT.
        """
        settings = self._settings
        phases = _Phases(settings, None if switches else settings.request_timeout)
        self._calls.add(phases)
        connection = self._take()
        try:
            with phases.scope:
                try:
                    head = await connection.ask(method, self._path + target, headers, body, phases)
                except _CLIENT_ERRORS as error:
                    raise self._noted(self._translated(error)) from error
                phases.leave()
                self._unreachable_at = -math.inf
                progress.upstream_status = head.status
                if head.status == 101 and not switches:
                    reason = "it switched protocols (101), which was not asked for."
                    raise ProxyError(errors.UPSTREAM_PROTOCOL_ERROR, upstream=self.url, reason=reason)
                yield Response(head, connection, phases, settings.idle_timeout)
            if phases.scope.cancelled_caught:
                raise self._noted(phases.error(self.url))
        finally:
            self._calls.discard(phases)
            progress.upstream_seconds = phases.seconds
            progress.upstream_whole = connection.whole
            await self._give_back(connection)

    def end_overdue(self) -> None:
        """End the calls whose limit has passed, where it is a long one: to be called every few seconds."""
        now = trio.current_time()
        for phases in list(self._calls):
            phases.end_overdue(now)

    async def close_expired(self) -> None:
        """Close the connections that have been idle for longer than `upstream.keep_alive_expiry`."""
        oldest = trio.current_time() - self._settings.keep_alive_expiry
        while self._idle and self._idle[0][1] < oldest:
            await self._idle.popleft()[0].aclose()

    async def aclose(self) -> None:
        """Close all idle connections."""
        while self._idle:
            await self._idle.popleft()[0].aclose()

    @property
    def latest_end(self) -> float:
        """When a call that begins now is over at the latest, by `upstream.request_timeout`."""
        timeout = self._settings.request_timeout
        return math.inf if timeout is None else trio.current_time() + timeout

    @property
    def url(self) -> str:
        """The base URL."""
        return str(self._url)

    @property
    def has_path(self) -> bool:
        """Whether the base URL has a path, as nearly every API's has."""
        return bool(self._path)

    @property
    def forward_proxy(self) -> str | None:
        """Where the forward proxy is that calls go through, without its credentials."""
        return None if self._forward_proxy is None else str(self._forward_proxy.url)

    @property
    def known_out(self) -> bool:
        """Whether the last attempt to connect failed, a short while ago: after that nothing is known any more."""
        return trio.current_time() - self._unreachable_at < KNOWN_OUT_SECONDS

    @property
    def idle(self) -> int:
        """How many idle connections are kept."""
        return len(self._idle)

    def __repr__(self) -> str:
        return f"<Upstream {self._url}: {len(self._calls)} calls, {len(self._idle)} idle connections>"

    def _take(self) -> Connection:
        """The connection that was used last, or a new one. It opens itself anew if the upstream has closed it."""
        if self._idle:
            connection, since = self._idle.pop()
            if trio.current_time() - since <= self._settings.keep_alive_expiry:
                return connection
            self._idle.append((connection, since))  # `close_expired` is going to close it
        return self._new_connection()

    async def _give_back(self, connection: Connection) -> None:
        """Keep the connection or close it, also while being cancelled: nothing here waits for the upstream."""
        if connection.is_kept:
            self._idle.append((connection, trio.current_time()))
            return
        with trio.move_on_after(_CLOSE_SECONDS_MAX, shield=True):
            await connection.aclose()

    def _noted(self, error: ProxyError) -> ProxyError:
        """The error, once it is known whether it means that the upstream is out."""
        if error.ending is errors.UPSTREAM_UNREACHABLE:
            self._unreachable_at = trio.current_time()
        return error

    def _translated(self, error: Exception) -> ProxyError:
        """An error of the clients, before the answer's head has arrived, as ours."""
        upstream = self.url
        match error:
            case httpcore.ConnectError() | httpcore.ProxyError() | httpcore.UnsupportedProtocol():
                return ProxyError(errors.UPSTREAM_UNREACHABLE, upstream=upstream, reason=_reason(error))
            case httpcore.WriteTimeout():
                limit = self._settings.idle_timeout
                return ProxyError(errors.UPSTREAM_TIMEOUT, limit=limit, setting="upstream.idle_timeout")
            case httpcore.LocalProtocolError() | UnsendableError():
                # Its message may quote what cannot be sent, which may be a key.
                reason = "the request has a field that cannot be sent."
                return ProxyError(errors.UPSTREAM_PROTOCOL_ERROR, upstream=upstream, reason=reason)
            case _:
                return ProxyError(errors.UPSTREAM_PROTOCOL_ERROR, upstream=upstream, reason=_reason(error))


_CLIENT_ERRORS: Final = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    httpcore.WriteTimeout,
    ProtocolError,
    UnsendableError,
)
"""What the clients raise for an upstream that cannot be spoken to."""

_WITHOUT_MESSAGE: Final[dict[type[BaseException], str]] = {
    httpcore.ReadError: "the connection was reset",
    httpcore.WriteError: "the connection was reset",
    httpcore.ConnectError: "no connection",
}


def _reason(error: BaseException) -> str:
    """The message of the error that was at the root of it."""
    root = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause
    if isinstance(root, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {root.verify_message.rstrip('.')}."
    if isinstance(root, OSError) and not isinstance(root, ssl.SSLError) and (root.errno or 0) > 0:
        return f"{os.strerror(root.errno or 0)}."  # trio says the address too, as a tuple
    message = str(root) or str(error) or _WITHOUT_MESSAGE.get(type(error), type(error).__name__)
    return errors.without_quotes(message).rstrip(".") + "."


def _tls_context(url: httpx.URL, settings: UpstreamSettings) -> ssl.SSLContext:
    """What certificates are accepted, and which one is shown. Raises OSError if the files have gone meanwhile."""
    if url.scheme != "https":
        # httpx wants a context for plain HTTP too; loading the CA certificates for it would only take time.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca_file = settings.ca_file
    context = httpx.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if settings.client_cert is not None:
        context.load_cert_chain(settings.client_cert, settings.client_key, password="")
    return context


def _connections(
    url: httpx.URL, context: ssl.SSLContext, settings: UpstreamSettings, proxy: httpx.Proxy | None, dial: Dial
) -> Callable[[], Connection]:
    """What makes connections to this URL."""
    host, port = url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)
    if proxy is None:
        origin = Origin(host, port, context if url.scheme == "https" else None)
        return lambda: http1_client.Connection(origin, dial)
    base = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=b"/")
    address = httpcore.URL(scheme=proxy.url.raw_scheme, host=proxy.url.raw_host, port=proxy.url.port, target=b"/")
    through = httpcore.Proxy(address, proxy.raw_auth, proxy.headers.raw)
    return lambda: httpcore_client.Connection(base, context, through, settings.keep_alive_expiry)


def _environment_proxy(url: httpx.URL) -> httpx.Proxy | None:
    """The forward proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say to use for this URL."""
    proxies = getproxies()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.netloc.decode()):
        return None
    variable = f"{url.scheme.upper()}_PROXY or ALL_PROXY"
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
        httpx.AsyncHTTPTransport(proxy=proxy, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError(f"{variable} in the environment: it cannot be used as a forward proxy: {error}") from error
    return proxy
