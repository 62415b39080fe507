"""The proxy without sockets: ASGI messages on one side, memory streams under the real HTTP client on the other.

Everything runs on one clock that a test can let jump (`autojump_clock`), and the sequence of steps is the same each
time.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, HTTPScope

from support import Recorder, Upstream
from trioproxy import upstream as real
from trioproxy.app import ProxyApp, create_app
from trioproxy.config import Settings

BASE_URL = "http://upstream.test/v1"


class MemoryUpstream(Upstream):
    """A scripted upstream on memory streams."""

    def __init__(self) -> None:
        super().__init__()
        self.accept: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint
        """Awaited for each connection; may raise or take long."""
        self.deaf = False
        """Whether connections are accepted, and nothing read from them."""
        self.new_pair: Callable[[], tuple[trio.StapledStream[Any, Any], trio.StapledStream[Any, Any]]]
        self.new_pair = trio.testing.memory_stream_pair

    async def serve_stream(self, stream: trio.StapledStream[Any, Any]) -> None:
        """Serve one connection."""
        if self.deaf:
            await trio.sleep_forever()
        await self._connection(stream)

    def dial(self, nursery: trio.Nursery) -> Callable[[str, int], Awaitable[trio.abc.Stream]]:
        """What connects to this upstream."""

        async def connect(host: str, port: int) -> trio.abc.Stream:
            await self.accept()
            ours, theirs = self.new_pair()
            nursery.start_soon(self.serve_stream, theirs)
            return ours

        return connect


@dataclass
class Answer:
    """What the client of one exchange has received so far."""

    messages: list[ASGISendEvent] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    """The application has returned."""

    @property
    def status(self) -> int | None:
        """The status of the head, None before it has come."""
        return next((m["status"] for m in self.messages if m["type"] == "http.response.start"), None)

    @property
    def headers(self) -> dict[str, str]:
        """The head's fields, names in lower case."""
        heads = [m for m in self.messages if m["type"] == "http.response.start"]
        return {name.decode().lower(): value.decode() for head in heads for name, value in head["headers"]}

    @property
    def body(self) -> bytes:
        """What has come of the body."""
        return b"".join(m["body"] for m in self.messages if m["type"] == "http.response.body")

    @property
    def whole(self) -> bool:
        """Whether the answer has been ended properly."""
        return any(m["type"] == "http.response.body" and not m.get("more_body", False) for m in self.messages)

    @property
    def code(self) -> str:
        """The code of one of our own errors."""
        return str(json.loads(self.body)["error"]["code"])


class Client:
    """One client of the application: sends one request, may leave, may stop reading."""

    def __init__(self, app: ProxyApp) -> None:
        self._app = app
        self.answer = Answer()
        self.cancel_scope = trio.CancelScope()
        self.reads: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint
        """Awaited whenever the application sends; may take long."""
        self._to_app, self._receive = trio.open_memory_channel[ASGIReceiveEvent](10)

    def leave(self) -> None:
        """Disconnect."""
        with suppress(trio.WouldBlock):
            self._to_app.send_nowait({"type": "http.disconnect"})

    def send_body(self, piece: bytes, *, more: bool = True) -> None:
        """Send a piece of the request's body."""
        self._to_app.send_nowait({"type": "http.request", "body": piece, "more_body": more})

    async def post(
        self,
        path: str = "/v1/chat/completions",
        body: bytes | None = b'{"model": "m"}',
        method: str = "POST",
        headers: Iterable[tuple[str, str]] = (),
    ) -> Answer:
        """Send a request and wait until the application is done with it; `body` None: none is sent yet."""
        fields = [(name.lower().encode(), value.encode()) for name, value in headers]
        if body is not None:
            fields.append((b"content-length", b"%d" % len(body)))
            self._to_app.send_nowait({"type": "http.request", "body": body, "more_body": False})
        scope: HTTPScope = {
            "type": "http",
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": fields,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},  # type: ignore[typeddict-item]
            "extensions": {},
        }
        with self.cancel_scope:
            await self._app(scope, self._receive.receive, self._send)
        self.answer.done.set()
        return self.answer

    async def _send(self, message: ASGISendEvent) -> None:
        await self.reads()
        self.answer.messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.leave()  # as Hypercorn does at the end of every exchange


class House:
    """The application on a scripted upstream in memory, and everything its listeners were told."""

    def __init__(self, nursery: trio.Nursery, **settings: dict[str, Any]) -> None:
        parsed = Settings.model_validate({"upstream": {}} | settings)
        self.nursery = nursery
        self.upstream = MemoryUpstream()
        self.recorder = Recorder()
        calls = real.Upstream(
            parsed.upstream.model_copy(update={"base_url": BASE_URL}),
            dial=self.upstream.dial(nursery),
        )
        self.app = create_app(parsed, (self.recorder,), calls)
        self.proxy = self.app.proxy

    def client(self) -> Client:
        """A new client."""
        return Client(self.app)

    def send(self, **request: Any) -> Client:
        """Begin a request in the background."""
        client = self.client()
        self.nursery.start_soon(lambda: client.post(**request))
        return client

    def assert_settled(self) -> None:
        """No slot is taken, nothing waits, metrics and events agree."""
        snapshot = self.proxy.scheduler.snapshot()
        assert snapshot.running == ()
        assert snapshot.queued == ()
        sample = self.proxy.metrics.registry.get_sample_value
        assert sample("openai_proxy_available_permits", {"pool": "default"}) == snapshot.permits
        assert sample("openai_proxy_queue_size", {"pool": "default"}) == 0
        self.proxy.check_invariants()
        assert sample("openai_proxy_invariant_violations_total") == 0
        assert self.upstream.open_connections == self.proxy.upstream.idle
