"""Calls to the one upstream: a context manager per call. The only module that knows httpx.

Admission already decides how many calls there are, so connections never queue: an idle one is taken from a
last-in-first-out stack, or a new one is made. Errors of httpx become `ProxyError` here and nowhere else.
"""

from __future__ import annotations

import math
import os
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, cast
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx
import trio

from trioproxy import errors
from trioproxy.config import ConfigError, UpstreamSettings
from trioproxy.errors import Headers, ProxyError
from trioproxy.events import Progress
from trioproxy.network import READ_SIZE, Connection, Stream, step

_BODILESS_STATUS: Final = frozenset({204, 304})
_CLOSE_SECONDS_MAX: Final = 1.0

KNOWN_OUT_SECONDS: Final = 10.0
"""How long a failed attempt to connect counts as knowledge that the upstream is out."""


class Body(httpx.AsyncByteStream):
    """A request's body: whole, or in pieces that arrive while it is being sent.

    Not a generator, which would be left to the garbage collector whenever a call is cut off.
    """

    def __init__(self, content: bytes | AsyncIterator[bytes]) -> None:
        self._content = content
        self._rest = content
        self._waiting: trio.CancelScope | None = None
        self._stopped = False
        self._taken = 0
        self._first = self._again = b""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if isinstance(self._rest, bytes):
            if not self._rest:
                raise StopAsyncIteration
            whole, self._rest = self._rest, b""
            return whole
        if self._again:
            piece, self._again = self._again, b""
            return piece
        with trio.CancelScope() as self._waiting:
            if not self._stopped:
                piece = await anext(self._rest)
                self._taken += 1
                self._first = piece if self._taken == 1 else b""
                return piece
        raise httpcore.WriteError("the upstream has answered before it has been sent everything")

    @property
    def is_long(self) -> bool:
        """Whether sending it may take time, in which the upstream may answer."""
        return not isinstance(self._content, bytes) or len(self._content) > READ_SIZE

    def stop(self) -> None:
        """Ask for nothing more of it: the upstream does not want it. httpcore reads the answer then."""
        self._stopped = True
        if self._waiting is not None:
            self._waiting.cancel(reason="the upstream has answered")

    def rewind(self) -> bool:
        """Make ready for being sent again, if that is possible: of pieces that arrive only the first is kept."""
        self._rest, self._again, self._stopped = self._content, self._first, False
        return self._taken <= 1


class _Phases:
    """The time limits of one call, on one cancel scope: one phase is under way at a time, the whole goes on beside."""

    def __init__(self, request_timeout: float | None) -> None:
        self.scope = trio.CancelScope()
        self.began = trio.current_time()
        self.sent_at: float | None = None
        self._request_timeout = request_timeout
        self._ends = math.inf if request_timeout is None else self.began + request_timeout
        self._setting = ""
        self._limit = math.inf

    def enter(self, setting: str, limit: float) -> None:
        """From now on at most `limit` seconds, by the setting of that name."""
        self._setting, self._limit = setting, limit
        self.scope.deadline = min(trio.current_time() + limit, self._ends)

    def leave(self) -> None:
        """Wait for nothing in particular."""
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

    async def trace(self, name: str, info: dict[str, object]) -> None:
        """Told by httpcore how far it is: https://www.encode.io/httpcore/extensions/#trace."""
        if getattr(info.get("request"), "method", None) == b"CONNECT":
            return  # a tunnel through a forward proxy belongs to connecting
        if name == "http11.send_request_headers.started":
            self.sent_at = trio.current_time()
            self.leave()


def _cut_off(network: Stream | None) -> bool:
    """Whether a TLS connection that is at its end was closed without a close_notify: trio passes over that."""
    tls = network and network.get_extra_info("ssl_object")
    if not isinstance(tls, ssl.SSLObject):
        return False
    try:
        return bool(tls.read(1))
    except ssl.SSLError:  # SSLEOFError: it has read the TCP connection's end
        return True


class _Call:
    """Sending one request and waiting for the head of its answer."""

    def __init__(self, connection: Connection, body: Body) -> None:
        self._connection = connection
        self._body = body
        self._nursery: trio.Nursery | None = None
        self._looking: tuple[trio.CancelScope, trio.Event] | None = None

    async def make(self, request: httpx.Request) -> httpx.Response:
        """Send it, once more if the connection was an old one and nothing of the request has arrived.

        That is known only of a connection that failed before a byte of an answer, with nothing of the request
        acknowledged: whatever has reached the upstream's kernel may have been acted on (RFC 9110 section 9.2.2).
        """
        kept = self._connection.stream is not None
        try:
            return await self._attempt(request)
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            stream = self._connection.last_stream
            if not kept or stream is None or not stream.untouched or not self._body.rewind():
                raise
        return await self._attempt(request)

    async def _attempt(self, request: httpx.Request) -> httpx.Response:
        if not self._body.is_long:
            return await self._connection.handle_async_request(request)
        answer: httpx.Response | httpx.HTTPError
        async with trio.open_nursery() as self._nursery:
            try:
                answer = await self._connection.handle_async_request(request)
            except httpx.HTTPError as error:
                answer = error
            self._nursery.cancel_scope.cancel()
        if isinstance(answer, httpx.HTTPError):
            raise answer
        return answer

    async def trace(self, name: str) -> None:
        """Told by httpcore how far it is."""
        stream = self._connection.stream
        match name:
            case "http11.send_request_headers.started" if stream is not None:
                stream.begin()
            case "http11.send_request_body.started" if stream is not None and self._nursery is not None:
                self._looking = trio.CancelScope(), trio.Event()
                self._nursery.start_soon(self._look, stream, *self._looking)
            case "http11.receive_response_headers.started" if self._looking is not None:
                scope, over = self._looking
                scope.cancel()
                await over.wait()
            case _:
                pass

    async def _look(self, stream: Stream, scope: trio.CancelScope, over: trio.Event) -> None:
        try:
            with scope:
                await stream.look_for_early_answer()
                self._body.stop()
        finally:
            over.set()


class Response:
    """The upstream's answer: its head, and its body piece by piece as it arrives."""

    def __init__(
        self, response: httpx.Response, network: Stream | None, method: str, phases: _Phases, idle_timeout: float
    ) -> None:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self.status: Final = response.status_code
        self.headers: Final[Headers] = response.headers.raw
        self.whole = False
        """Whether the body has been read to its end."""
        self._stream = response.stream
        self._network = network
        # With what has come of the new protocol together with the head.
        self._switched: httpcore.AsyncNetworkStream = response.extensions["network_stream"]
        self._pieces = response.stream.__aiter__()
        self._begun: Coroutine[Any, Any, bytes] | None = None
        self._broken: httpx.HTTPError | ProxyError | None = None
        self._phases = phases
        self._idle_timeout = idle_timeout
        self._left = math.inf
        self._ends_by_closing = not {"transfer-encoding", "content-length"} & response.headers.keys()
        if method == "HEAD" or self.status in _BODILESS_STATUS:
            self._left = 0
        elif "transfer-encoding" not in response.headers and "content-length" in response.headers:
            self._left = int(response.headers["content-length"])

    async def read(self) -> bytes:
        """What has arrived, joined, 64 KiB or so at most; waits until there is something. b"" at the end.

        With the last piece `whole` may be true already. Raises `ProxyError` if the upstream breaks off: not before
        everything that came until then has been returned.
        """
        piece = await self._next() if self._left else b""
        self._left -= len(piece)
        pieces = [piece]
        while self._left and not self.whole and (more := await self._at_hand()):
            pieces.append(more)
            self._left -= len(more)
        if not self._left and not self.whole:
            await self._next()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _at_hand(self) -> bytes:
        """The next piece if it can be had without waiting, else b""."""
        if self._network is None or self._broken is not None:
            return b""
        self._network.stepping = True
        try:
            return await self._step() or b""
        except StopAsyncIteration:
            self._broken = self._end()
            return b""
        except httpx.HTTPError as error:
            self._broken = error
            return b""
        finally:
            self._network.stepping = False

    def _end(self) -> ProxyError | None:
        """The body is at its end: whether it is whole, or why not."""
        if self._left and self._ends_by_closing and _cut_off(self._network):
            # RFC 9112 section 9.8: anyone on the way can close a TCP connection.
            reason = "the TLS connection was closed without notice (close_notify), maybe not by the upstream."
            return ProxyError(errors.UPSTREAM_BROKE_OFF, reason=reason)
        self.whole = True
        return None

    async def _step(self) -> bytes | None:
        """Go on with the read that has been begun; None if it is about to wait."""
        reading = self._begun or cast("Coroutine[Any, Any, bytes]", anext(self._pieces))
        self._begun = None
        if (piece := await step(reading)) is None:
            self._begun = reading
        return piece

    async def _next(self) -> bytes:
        self._phases.enter("upstream.idle_timeout", self._idle_timeout)
        try:
            if self._broken is not None:
                raise self._broken
            while (piece := await self._step()) is None:
                pass
        except StopAsyncIteration:
            if (broken := self._end()) is not None:
                raise broken from None
            return b""
        except httpx.HTTPError as error:
            raise ProxyError(errors.UPSTREAM_BROKE_OFF, reason=_reason(error)) from error
        else:
            return piece
        finally:
            self._phases.leave()

    async def release(self) -> None:
        """Free the connection, once `whole`."""
        await self._stream.aclose()

    def switch(self) -> Switched:
        """The connection of an answer 101, in its new protocol."""
        return Switched(self._switched, self._idle_timeout)

    async def run_out(self) -> None:
        """Read on until the closed connection says so.

        httpcore's nested generators end themselves then; dropped half-way they are left to the garbage collector.
        """
        with suppress(httpx.HTTPError, StopAsyncIteration):
            while True:
                await self._step()


class Switched:
    """What the connection has become by an answer 101: bytes in both directions, as long as the call is open."""

    def __init__(self, network: httpcore.AsyncNetworkStream, write_timeout: float) -> None:
        self._network = network
        self._write_timeout = write_timeout

    async def read(self) -> bytes:
        """What has come; b"" at the end. Raises `ProxyError` if the upstream breaks off."""
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
    `ConfigError` if that cannot be used. `new_connection` makes something else that carries one call at a time.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        trust_env: bool = True,
        new_connection: Callable[[], Connection] | None = None,
    ) -> None:
        self._settings = settings
        self._url = httpx.URL(settings.base_url)
        self._path: Final = self._url.raw_path.rstrip(b"/")
        self.host: Final = self._url.netloc
        """The value of the header `Host` for this upstream."""
        self._forward_proxy: Final = _environment_proxy(self._url) if trust_env else None
        self.tls: Final = _tls_context(self._url, settings)
        """What the upstream's certificate is checked against, and which one is shown to it."""
        self._new_connection: Final = new_connection or _connections(
            self.tls, settings.keep_alive_expiry, self._forward_proxy
        )
        self._idle: deque[tuple[Connection, float]] = deque()
        self._busy = 0
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
        phases = _Phases(None if switches else self._settings.request_timeout)
        response: Response | None = None
        self._busy += 1
        # It opens itself anew if it has expired or the upstream has closed it meanwhile.
        connection = self._idle.pop()[0] if self._idle else self._new_connection()
        try:
            with phases.scope:
                phases.enter("upstream.connect_timeout", self._settings.connect_timeout)
                with self._translated():
                    call = _Call(connection, body)
                    request = self._request(method, target, headers, body, phases, call)
                    answer = await call.make(request)
                phases.leave()
                self._unreachable_at = -math.inf
                progress.upstream_status = answer.status_code
                response = Response(answer, connection.stream, method, phases, self._settings.idle_timeout)
                if answer.status_code == 101 and not switches:
                    reason = "it switched protocols (101), which was not asked for."
                    raise ProxyError(errors.UPSTREAM_PROTOCOL_ERROR, upstream=str(self._url), reason=reason)
                yield response
            if phases.scope.cancelled_caught:
                raise phases.error(str(self._url))
        finally:
            self._busy -= 1
            progress.upstream_seconds = phases.seconds
            progress.upstream_whole = response is not None and response.whole
            await self._give_back(connection, response)

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
        return f"<Upstream {self._url}: {self._busy} calls, {len(self._idle)} idle connections>"

    async def _give_back(self, connection: Connection, response: Response | None) -> None:
        """Keep the connection or close it, also while being cancelled: nothing here waits for the upstream."""
        with trio.move_on_after(_CLOSE_SECONDS_MAX, shield=True):
            if response is not None and response.whole:
                await response.release()
                if connection.stream is None:
                    return
                if not connection.has_rest:
                    self._idle.append((connection, trio.current_time()))
                    return
            await connection.aclose()
            if response is not None and not response.whole:
                await response.run_out()
            elif connection.stream is not None:
                # httpcore forgets it when it is cut off while it agrees on TLS.
                await connection.stream.aclose()

    def _request(
        self, method: str, target: bytes, headers: Headers, body: Body, phases: _Phases, call: _Call
    ) -> httpx.Request:
        async def trace(name: str, info: dict[str, object]) -> None:
            await phases.trace(name, info)
            await call.trace(name)
            if name == "http11.receive_response_headers.started" and phases.sent_at is not None:
                phases.enter("upstream.first_byte_timeout", self._settings.first_byte_timeout)

        raw_target = self._path + target
        extensions = {"timeout": {"write": self._settings.idle_timeout}, "trace": trace}
        if self._forward_proxy is None:
            # Sent as it is: httpx would decode and encode it again.
            url, extensions = self._url, extensions | {"target": raw_target}
        else:
            # What a forward proxy is asked for is another target, which httpcore makes of the URL.
            url = self._url.copy_with(raw_path=raw_target)
        request = httpx.Request(method, url, headers=headers, stream=body, extensions=extensions)
        request.method = method  # httpx writes it in capitals
        return request

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of httpx, before the answer's head has arrived, as ours."""
        upstream = str(self._url)
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
            self._unreachable_at = trio.current_time()
            raise ProxyError(errors.UPSTREAM_UNREACHABLE, upstream=upstream, reason=_reason(error)) from error
        except httpx.WriteTimeout as error:
            limit = self._settings.idle_timeout
            raise ProxyError(errors.UPSTREAM_TIMEOUT, limit=limit, setting="upstream.idle_timeout") from error
        except httpx.LocalProtocolError as error:
            # Its message quotes what cannot be sent, which may be a key.
            reason = "the request has a field that cannot be sent."
            raise ProxyError(errors.UPSTREAM_PROTOCOL_ERROR, upstream=upstream, reason=reason) from error
        except (httpx.NetworkError, httpx.ProtocolError) as error:
            raise ProxyError(errors.UPSTREAM_PROTOCOL_ERROR, upstream=upstream, reason=_reason(error)) from error


_WITHOUT_MESSAGE: Final[dict[type[BaseException], str]] = {
    httpx.ReadError: "the connection was reset",
    httpx.WriteError: "the connection was reset",
    httpx.ConnectError: "no connection",
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
    return message.rstrip(".") + "."


def _tls_context(url: httpx.URL, settings: UpstreamSettings) -> ssl.SSLContext:
    """What certificates are accepted, and which one is shown. Raises OSError if the files have gone meanwhile."""
    if url.scheme != "https":
        # httpx wants a context for plain HTTP too; loading the CA certificates for it would only take time.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca_file = settings.ca_file
    context = httpx.create_ssl_context() if ca_file is None else ssl.create_default_context(cafile=ca_file)
    if settings.client_cert is not None:
        context.load_cert_chain(settings.client_cert, settings.client_key, password="")
    return context


def _connections(context: ssl.SSLContext, expiry: float, proxy: httpx.Proxy | None) -> Callable[[], Connection]:
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=expiry)
    return lambda: Connection(verify=context, proxy=proxy, limits=limits)


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
