"""Real parts for tests: an upstream that does exactly what a test says, and the proxy on real sockets."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import trio

from trioproxy.app import ProxyApp, create_app
from trioproxy.config import Settings
from trioproxy.events import Ended, Event, Listener, PassedThrough, Refused
from trioproxy.server import Server

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


@dataclass(eq=False)
class Call:
    """A request as the upstream received it, and its end of the connection."""

    stream: trio.abc.Stream
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    gone: trio.Event = field(default_factory=trio.Event)
    """Set when the proxy has closed the connection."""

    def header(self, name: str) -> str | None:
        """The value of a header that occurs once, None if it does not occur."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) <= 1, values
        return values[0] if values else None

    async def send(self, data: bytes) -> None:
        """Send any bytes."""
        await self.stream.send_all(data)

    async def answer(self, body: bytes = b"{}", status: int = 200, **headers: str) -> None:
        """Send a whole answer."""
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Content-Type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*lines, "", ""]).encode() + body)

    async def close(self) -> None:
        """Close the connection."""
        await self.stream.aclose()


class Upstream:
    """A scripted HTTP/1.1 server: every request is handed to the test, which answers it as it likes.

    With `tls` it is served over TLS.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.calls: list[Call] = []
        """Every request, in order of arrival."""
        self.connections = 0
        self.open_connections = 0
        self._sender, self._receiver = trio.open_memory_channel[Call](10_000)
        self.url = ""

    async def call(self) -> Call:
        """The next request that has not been taken yet."""
        with trio.fail_after(20):
            return await self._receiver.receive()

    async def behave(self, behaviour: Callable[[Call], Awaitable[object]]) -> None:
        """Treat every request in the same way, until cancelled; that the proxy hangs up is no error."""

        async def treat(call: Call) -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await behaviour(call)

        async with trio.open_nursery() as nursery:
            async for call in self._receiver:
                nursery.start_soon(treat, call)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on a free port of the loopback interface."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        task_status.started()
        await trio.serve_listeners(self._connection if self._tls is None else self._tls_connection, listeners)

    async def _tls_connection(self, stream: trio.SocketStream) -> None:
        assert self._tls is not None
        await self._connection(trio.SSLStream(stream, self._tls, server_side=True))

    async def _connection(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        self.open_connections += 1
        buffer = b""
        call: Call | None = None
        try:
            async with stream:
                while True:
                    data = await stream.receive_some()
                    if not data:
                        break
                    buffer += data
                    if (request := _parse(buffer)) is not None:
                        method, target, headers, body, buffer = request
                        call = Call(stream, method, target, headers, body)
                        self.calls.append(call)
                        self._sender.send_nowait(call)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.open_connections -= 1
            if call is not None:
                call.gone.set()


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until something in the outside world is so; TooSlowError if it does not come about."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - nobody tells us
            await trio.sleep(0.002)


def _parse(buffer: bytes) -> tuple[str, str, list[tuple[str, str]], bytes, bytes] | None:
    """A whole request at the beginning of `buffer`, and what follows it."""
    head, separator, rest = buffer.partition(b"\r\n\r\n")
    if not separator:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    values = {name.lower(): value for name, value in headers}
    if values.get("transfer-encoding") == "chunked":
        body = b""
        while True:
            size, separator, rest = rest.partition(b"\r\n")
            length = int(size, 16) if separator else 0
            if not separator or len(rest) < length + 2:
                return None
            body, rest = body + rest[:length], rest[length + 2 :]
            if not length:
                return method, target, headers, body, rest
    length = int(values.get("content-length", "0"))
    if len(rest) < length:
        return None
    return method, target, headers, rest[:length], rest[length:]


class Recorder:
    """A listener that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def ended(self) -> list[Ended]:
        """The closing events of scheduled requests."""
        return [event for event in self.events if isinstance(event, Ended)]

    @property
    def passed_through(self) -> list[PassedThrough]:
        """The closing events of the others."""
        return [event for event in self.events if isinstance(event, PassedThrough)]

    @property
    def refused(self) -> list[Refused]:
        """The refusals before scheduling."""
        return [event for event in self.events if isinstance(event, Refused)]

    def outcomes(self) -> list[str]:
        """How scheduled requests ended, in order."""
        return [str(event.ending.outcome) for event in self.ended]


@dataclass
class Proxy:
    """The proxy on a real socket, a client for it, and what its listeners were told."""

    app: ProxyApp
    server: Server
    url: str
    port: int
    client: httpx.AsyncClient
    recorder: Recorder
    _streams: list[trio.SocketStream] = field(default_factory=list)

    async def connect(self) -> trio.SocketStream:
        """A bare connection to it, closed at the test's end at the latest."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        self._streams.append(stream)
        return stream

    def close_connections(self) -> None:
        """Close what `connect` has opened."""
        for stream in self._streams:
            stream.socket.close()

    def assert_settled(self) -> None:
        """All slots are free, nothing is queued, and the metrics say so too."""
        snapshot = self.app.proxy.scheduler.snapshot()
        assert snapshot.running == ()
        assert snapshot.queued == ()
        sample = self.app.proxy.metrics.registry.get_sample_value
        assert sample("openai_proxy_available_permits", {"pool": "default"}) == snapshot.permits
        assert sample("openai_proxy_queue_size", {"pool": "default"}) == 0
        self.app.proxy.check_invariants()
        assert sample("openai_proxy_invariant_violations_total") == 0

    async def settled(self) -> None:
        """Wait for `assert_settled` to hold."""
        scheduler = self.app.proxy.scheduler
        await until(lambda: not scheduler.snapshot().running and not scheduler.snapshot().queued)
        self.assert_settled()


@asynccontextmanager
async def running_upstream(tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    """A scripted upstream on a free port."""
    upstream = Upstream(tls)
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        yield upstream
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running_proxy(
    upstream_url: str,
    listeners: tuple[Listener, ...] = (),
    trust: ssl.SSLContext | None = None,
    /,
    **settings: dict[str, Any] | list[dict[str, Any]],
) -> AsyncIterator[Proxy]:
    """The proxy, served as `trioproxy serve` does, on a free port; sections of the settings as keywords.

    `trust`: what its client accepts, if the proxy is served over TLS.
    """
    sections: dict[str, Any] = {
        "server": {"bind": "127.0.0.1:0", "shutdown_grace": 0.5},
        "upstream": {"base_url": upstream_url},
    }
    for name, values in settings.items():
        sections[name] = sections.get(name, {}) | values if isinstance(values, dict) else values
    recorder = Recorder()
    parsed = Settings.model_validate(sections)
    app = create_app(parsed, (*listeners, recorder))
    server = Server(app, parsed)
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(lambda task_status: server.run(task_status=task_status))
        verify = trust or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        async with httpx.AsyncClient(base_url=address, timeout=10, trust_env=False, verify=verify) as client:
            proxy = Proxy(app, server, address, int(address.rpartition(":")[2]), client, recorder)
            try:
                yield proxy
            finally:
                proxy.close_connections()
        server.shut_down()
        server.shut_down()
