"""The client's end of a WebSocket session: ASGI messages in both directions, and running a `Session`.

Hypercorn does the framing, answers pings, and hides what the client closes with; that is overheard where the server
has a guard. This module knows nothing of the upstream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, cast

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGIReceiveEvent, ASGISendCallable, WebsocketScope
from quart.utils import encode_headers
from quart.wrappers import Response as QuartResponse
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioWebsocket
from werkzeug.datastructures import Headers as WerkzeugHeaders
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import CloseConnection

from trioproxy import request
from trioproxy.connection import GUARD, Guard
from trioproxy.errors import Headers
from trioproxy.websocket import MESSAGE_TOO_BIG, Session
from trioproxy.websocket_upstream import NO_STATUS, NORMAL, Closed

CLOSING_SECONDS: Final = 2.0
"""How long a client may take to answer that the session is over."""

STEPS_TO_REFUSE: Final = 10
"""How many steps Hypercorn, run without a guard, may take to see that a message came in one piece with the handshake
and refuse both: more than it takes. To answer the handshake meanwhile would end its worker."""

_CLOSE_FRAME: Final = b"\x88"


class Handshake:
    """One WebSocket from its handshake on; the `Client` that a session talks to."""

    def __init__(self, scope: WebsocketScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        self.arrived: Final = trio.current_time()
        # Over HTTP/2 it came as a CONNECT (RFC 8441), which is the GET of HTTP/1.1 in all that concerns us.
        self.head: Final = request.read_head(cast(request.Scope, {**scope, "method": "GET", "state": {}}))
        self.subprotocols: Final = list(scope["subprotocols"])
        self.key_name: str | None = None
        """Whose key it came with, once that is known; None where there are none."""
        self.cancel_scope: Final = trio.CancelScope()
        self.started = False
        self._accepted = False
        self._heard: trio.MemoryReceiveChannel[ASGIReceiveEvent] | None = None
        self._too_large = trio.Event()
        self._receive = receive
        self._send = send
        self._guard: Guard | None = cast("dict[str, Guard]", scope.get("state") or {}).get(GUARD)
        self._closing: trio.CancelScope | None = None
        """Around the end of a session that the client did not end: its going away belongs to that."""
        # Without a guard, or over HTTP/2, nobody can tell how it closes.
        overhears = self._guard is not None and self.head.http_version != "2"
        self._closed = None if overhears else Closed(None)

    async def let_refuse(self) -> None:
        """Let a server that refuses messages in one piece with the handshake do so first."""
        if self._guard is None:
            for _ in range(STEPS_TO_REFUSE):
                await trio.lowlevel.checkpoint()

    def hand_over(self) -> None:
        """From here on a session counts it."""
        if self._guard is not None and self._guard.has_left:  # seen before this was there to be told
            self.leave()

    async def accept(self, subprotocol: str | None, headers: Headers) -> None:
        """Open the WebSocket."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.started = self._accepted = True
        with trio.CancelScope(shield=True):
            await self._send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": headers})

    async def refuse(self, status: int, headers: Headers, read: Callable[[], Awaitable[bytes]]) -> None:
        """Answer the handshake with something else; `read` gives the body's pieces, and b"" at its end.

        If that raises, the answer does not look whole.
        """
        if self.head.http_version != "2":
            headers = [*headers, (b"connection", b"close")]  # as Hypercorn does, without saying so
        self.started = True
        await self._send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        while piece := await read():
            await self._send({"type": "websocket.http.response.body", "body": piece, "more_body": True})
        await self._send({"type": "websocket.http.response.body", "body": b"", "more_body": False})

    async def receive(self) -> str | bytes | Closed:
        """The next message, or that the client closes. If it is gone without a word, all of this is cancelled."""
        while True:
            message = await self._next()
            if message["type"] == "websocket.disconnect":
                if self._closed is None:
                    self.leave()
                    await trio.sleep_forever()
                return self._closed
            if message["type"] == "websocket.receive":
                data = message.get("bytes")
                return cast(str, message.get("text")) if data is None else bytes(data)

    async def listen(self) -> None:
        """Without a guard that watches this client alone: notice that it goes before anybody receives from it."""
        sender, self._heard = trio.open_memory_channel[ASGIReceiveEvent](0)
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect" and not self.started:
                self.leave()
            if message["type"] != "websocket.connect":
                await sender.send(message)

    async def _next(self) -> ASGIReceiveEvent:
        return await (self._receive() if self._heard is None else self._heard.receive())

    async def send(self, message: str | bytes) -> None:
        """Send a message; returns when there is room for more."""
        is_text = isinstance(message, str)
        data, text = (None, message) if is_text else (message, None)
        await self._send({"type": "websocket.send", "bytes": cast(bytes, data), "text": cast(str, text)})

    async def wait_too_large(self) -> None:
        """Return when a message was larger than may be, and the client has been told."""
        await self._too_large.wait()

    async def close(self, closed: Closed) -> None:
        """Say that the session is over, and wait a while for the client's answer to that.

        To close the connection at once could make the client's kernel throw away what it has not read.
        """
        with trio.move_on_after(CLOSING_SECONDS) as self._closing:
            await self._send({"type": "websocket.close", "code": closed.code or NORMAL, "reason": closed.reason})
            while not isinstance(await self.receive(), Closed):
                pass

    def leave(self) -> None:
        """The client has gone: stop working for it."""
        scope = self.cancel_scope if self._closing is None else self._closing
        scope.cancel(reason="the client has gone")

    def __enter__(self) -> None:
        if self._guard is not None:
            self._guard.watch(self.leave)
            if self.head.http_version != "2":
                self._guard.overhear(self._overhear)

    def __exit__(self, *_: object) -> None:
        if self._guard is not None:
            self._guard.unwatch(self.leave)

    def _overhear(self, sent: bytes) -> None:
        """What Hypercorn says on its own: the answer to the client's closing."""
        if self._accepted and sent.startswith(_CLOSE_FRAME) and self._closing is None:
            reader = Connection(ConnectionType.CLIENT)
            reader.receive_data(sent)
            frame = next(reader.events(), None)
            assert isinstance(frame, CloseConnection)
            self._closed = Closed(frame.code if frame.code != NO_STATUS else None, frame.reason or "")
            if frame.code == MESSAGE_TOO_BIG:
                # Hypercorn would go on collecting the message.
                assert self._guard is not None
                self._guard.throw_away()
                self._too_large.set()


class WebSocket(TrioWebsocket):
    """Quart's view of the handshake, with the one that it is."""

    handshake: Handshake


class WebSocketConnection:
    """Runs the handler, and then what it returned, in the task that Hypercorn made for the WebSocket."""

    def __init__(self, app: QuartTrio, scope: WebsocketScope) -> None:
        self._app = app
        self._scope = scope

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        handshake = Handshake(self._scope, receive, send)
        with handshake, handshake.cancel_scope:
            await handshake.let_refuse()
            async with trio.open_nursery() as nursery:
                if handshake.head.http_version == "2":
                    nursery.start_soon(handshake.listen)
                await self._run(handshake)
                nursery.cancel_scope.cancel()

    async def _run(self, handshake: Handshake) -> None:
        response = await self._app.handle_websocket(self._websocket(handshake))
        if isinstance(response, Session):
            handshake.hand_over()
            await response.run(handshake)
            return
        assert isinstance(response, QuartResponse)
        pieces = [b"", await response.get_data(as_text=False)]

        async def read() -> bytes:
            return pieces.pop()

        await handshake.refuse(response.status_code, encode_headers(response.headers), read)

    def _websocket(self, handshake: Handshake) -> WebSocket:
        """Enough to find the handler, which reads the rest from the handshake."""

        async def not_so(*_: object) -> None:
            raise RuntimeError("messages go through the handshake")

        websocket = WebSocket(
            handshake.head.path.decode("latin-1"),
            handshake.head.query,
            self._scope["scheme"],
            WerkzeugHeaders(),
            "",
            handshake.head.http_version,
            handshake.subprotocols,
            not_so,
            not_so,
            not_so,
            not_so,
            scope=self._scope,
        )
        websocket.handshake = handshake
        return websocket
