"""`http1_client` behind httpx's transport interface: `httpx.AsyncClient(transport=Transport())`.

The proxy's own calls go without httpx's request and response objects, which cost as much as reading an answer does.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

import httpcore
import httpx
import trio

from trioproxy.http1 import ProtocolError, UnsendableError
from trioproxy.http1_client import Connection, Origin
from trioproxy.upload import Body


class Transport(httpx.AsyncBaseTransport):
    """Requests over HTTP/1.1, each on a connection of its own; idle ones are kept, last in, first out."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls: Final = tls or httpx.create_ssl_context()
        self._idle: dict[Origin, list[Connection]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and wait for its answer's head. Raises httpx's `TransportError`s."""
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        origin = Origin(url.raw_host.decode("ascii"), port, self._tls if url.scheme == "https" else None)
        idle = self._idle.setdefault(origin, [])
        connection = idle.pop() if idle else Connection(origin)
        limits = _Limits(request.extensions.get("timeout", {}))
        answer = _Answer(connection, idle, limits)
        try:
            with _as_httpx(), limits.kept():
                body = Body(_content(request))
                head = await connection.ask(request.method, url.raw_path, request.headers.raw, body, limits)
        except BaseException:
            await answer.aclose()
            raise
        return httpx.Response(head.status, headers=head.headers, stream=answer)

    async def aclose(self) -> None:
        """Close the idle connections."""
        for idle in self._idle.values():
            while idle:
                await idle.pop().aclose()


class _Limits:
    """httpx's timeouts, each as the limit of one phase."""

    def __init__(self, timeouts: dict[str, float | None]) -> None:
        self.write_timeout: Final = _seconds(timeouts.get("write"))
        self._connect_timeout = _seconds(timeouts.get("connect"))
        self._read_timeout = _seconds(timeouts.get("read"))
        self._scope = trio.CancelScope()
        self._error: type[httpx.TimeoutException] = httpx.ReadTimeout

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep to them. Raises httpx's timeouts."""
        with trio.CancelScope() as self._scope:
            yield
        if self._scope.cancelled_caught:
            raise self._error("")

    def connecting(self) -> None:
        """A new connection is made."""
        self._limit(httpx.ConnectTimeout, self._connect_timeout)

    def sending(self) -> None:
        """The request is sent, each piece within `write_timeout`."""
        self._limit(httpx.WriteTimeout, math.inf)

    def sent(self) -> None:
        """Something is to come."""
        self._limit(httpx.ReadTimeout, self._read_timeout)

    def _limit(self, error: type[httpx.TimeoutException], seconds: float) -> None:
        self._error = error
        self._scope.deadline = trio.current_time() + seconds


class _Answer(httpx.AsyncByteStream):
    """An answer's body."""

    def __init__(self, connection: Connection, idle: list[Connection], limits: _Limits) -> None:
        self._connection = connection
        self._idle = idle
        self._limits = limits

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            with _as_httpx(), self._limits.kept():
                self._limits.sent()
                piece = await self._connection.read()
            if piece:
                yield piece
            else:
                return

    async def aclose(self) -> None:
        """Keep the connection for another request, or close it."""
        if self._connection.is_kept:
            self._idle.append(self._connection)
            return
        with trio.CancelScope(shield=True):
            await self._connection.aclose()


@contextmanager
def _as_httpx() -> Iterator[None]:
    try:
        yield
    except ProtocolError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
    except UnsendableError as error:
        raise httpx.LocalProtocolError("the request would not arrive as it is meant") from error
    except httpcore.WriteTimeout as error:
        raise httpx.WriteTimeout(str(error)) from error
    except httpcore.ConnectError as error:
        raise httpx.ConnectError(str(error)) from error
    except httpcore.NetworkError as error:
        raise httpx.ReadError(str(error)) from error


def _content(request: httpx.Request) -> bytes | AsyncIterator[bytes]:
    try:
        return request.content
    except httpx.RequestNotRead:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        return aiter(request.stream)


def _seconds(timeout: float | None) -> float:
    return math.inf if timeout is None else timeout
