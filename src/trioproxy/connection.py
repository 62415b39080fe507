"""One HTTP exchange on a connection: ASGI messages in both directions, disconnects, running a `Relay`.

The Quart handler runs first and reads what it needs of the body; if it returns a `Relay`, that is run here, in the
task that owns `receive` and `send`. This module knows nothing of scheduling or of the upstream.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, ClassVar, Final, Protocol, cast

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPResponseStartEvent, HTTPScope
from quart.utils import encode_headers
from quart.wrappers import Response as QuartResponse
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from werkzeug.datastructures import Headers as WerkzeugHeaders

from trioproxy import errors, request
from trioproxy.errors import Headers, ProxyError
from trioproxy.flag import Flag
from trioproxy.mailbox import MAILBOX, Mailbox
from trioproxy.relay import Relay

GUARD: Final = "trioproxy.guard"
"""The key in an ASGI scope's `state` under which the server puts the connection's guard."""

DRAIN_SECONDS: Final = 2.0
"""How long a client that has been answered early may go on sending its body: closing at once would make its kernel
throw the answer away (RFC 9112 section 9.6)."""


UNTAKEN_SECONDS: Final = 1.0
"""After so long in which nobody took a piece of an upload, some of it is read ahead."""

PIECE_SIZE: Final = 64 * 1024

AHEAD_SIZE_MAX: Final = 8 * 1024 * 1024
"""How much: more than a client's kernel holds back by default."""

ALL_AHEAD_SIZE_MAX: Final = 64 * 1024 * 1024
"""How much of all uploads together."""


class Guard(Protocol):
    """What the server can do for an exchange that ASGI cannot. Under other servers there is none."""

    relaying: bool
    """Whether the exchange is going to be counted as a request, however it ends."""
    more_follows: bool
    """Whether what is being sent can wait for what is sent next."""

    @property
    def has_left(self) -> bool:
        """Whether the client has been seen to have gone."""
        ...

    def watch(self, leave: Callable[[], None]) -> None:
        """Call `leave` as soon as the client is seen to have gone, also while nobody reads from it."""
        ...

    def unwatch(self, leave: Callable[[], None]) -> None:
        """The exchange is over."""
        ...

    def limit_writes(self, until: float) -> None:
        """No write of this exchange goes on beyond that time."""
        ...

    def linger_on_close(self) -> None:
        """Closing the connection, go on taking what the client sends for a while."""
        ...

    def reset_on_close(self) -> None:
        """Close the connection with a reset, so that an end that is told by closing alone does not look clean."""
        ...

    def leave(self) -> None:
        """The client has gone, or is to be taken for gone: soon the connection is closed."""
        ...

    def overhear(self, told: Callable[[bytes], None]) -> None:
        """Call `told` with the beginning of whatever is sent, before it is, as it was before encryption."""
        ...

    def throw_away(self) -> None:
        """From now on, throw away what comes from the client."""
        ...


class Incoming:
    """The request's body, as an iterator over its pieces. A piece is asked for only when the last one was taken.

    Where nobody takes any for a while, some more is read all the same: a client's FIN comes behind what it has sent.
    """

    __slots__ = ("_ahead", "_leave", "_receive", "_taking", "_wanted", "abandoned", "complete")

    ahead_size: ClassVar[int] = 0
    """Bytes that all uploads together have been read ahead."""

    def __init__(self, receive: ASGIReceiveCallable, leave: Callable[[], None]) -> None:
        self._receive = receive
        self._leave = leave
        self.complete: Final = Flag()
        """The last piece has arrived."""
        self.abandoned: Final = Flag()
        """Nobody is going to take another piece."""
        self._ahead = bytearray()
        self._taking: trio.Lock | None = None
        """There once two tasks may ask for pieces."""
        self._wanted = math.inf

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def is_empty(self) -> bool:
        """Whether there is no body, which HTTP/2 does not announce: known once something has come."""
        while not self._ahead and not self.complete.is_set():
            self._keep(await self.next())
        return not self._ahead

    async def __anext__(self) -> bytes:
        self._wanted = math.inf
        try:
            if not self._ahead and (piece := await self._take()):
                return piece
        finally:
            self._wanted = trio.current_time()
        if not self._ahead:
            raise StopAsyncIteration
        piece = bytes(self._ahead[:PIECE_SIZE])
        del self._ahead[:PIECE_SIZE]
        Incoming.ahead_size -= len(piece)
        return piece

    async def _take(self) -> bytes:
        """The next piece, unless it was read ahead meanwhile, or there is none."""
        if self._taking is None:
            return await self._next_there()
        async with self._taking:
            return await self._next_there()

    async def _next_there(self) -> bytes:
        while not self._ahead and not self.complete.is_set():
            if piece := await self.next():
                return piece
        return b""

    def forget(self) -> None:
        """The exchange is over: what was read ahead is not kept."""
        Incoming.ahead_size -= len(self._ahead)
        self._ahead.clear()

    def _keep(self, piece: bytes) -> None:
        self._ahead += piece
        Incoming.ahead_size += len(piece)

    def share(self) -> None:
        """From now on pieces are also asked for by `look_after`, in a task of its own."""
        self._taking = trio.Lock()
        self._wanted = trio.current_time()

    async def look_after(self) -> None:
        """Read ahead where nobody takes anything; once nobody is going to, throw away what still comes.

        Ends with the body's end, or never: a client that has gone is left to `leave`.
        """
        assert self._taking is not None
        while not self.abandoned.is_set():
            with trio.move_on_after(UNTAKEN_SECONDS):
                await self.abandoned.wait()
            if trio.current_time() - self._wanted >= UNTAKEN_SECONDS:
                async with self._taking:
                    await self._read_ahead()
        while True:
            await self.next()

    async def _read_ahead(self) -> None:
        while self._may_read_ahead() and not self.complete.is_set():
            self._keep(await self.next())

    def _may_read_ahead(self) -> bool:
        unwanted = self._wanted != math.inf
        return unwanted and len(self._ahead) < AHEAD_SIZE_MAX and Incoming.ahead_size < ALL_AHEAD_SIZE_MAX

    async def next(self) -> bytes:
        """The next piece, which may be empty, for whoever is the only one that asks."""
        message = await self._receive()
        if message["type"] != "http.request":
            self._leave()
            await trio.sleep_forever()
        if not message.get("more_body", False):
            self.complete.set()
            self.abandoned.set()
        return message.get("body", b"")


class Exchange:
    """One request and its answer; the `Client` that a relay talks to."""

    __slots__ = (
        "_closing",
        "_ends",
        "_finishing",
        "_guard",
        "_mailbox",
        "_relayed",
        "_send",
        "arrived",
        "cancel_scope",
        "head",
        "incoming",
        "key_name",
        "started",
    )

    def __init__(self, scope: HTTPScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        self.arrived: Final = trio.current_time()
        self.head = request.read_head(cast(request.Scope, scope))
        self.incoming: Final = Incoming(receive, self.leave)
        self.key_name: str | None = None
        """Whose key it came with, once that is known; None where there are none."""
        self.cancel_scope: Final = trio.CancelScope()
        self.started = False
        self._send = send
        state = cast("dict[str, object]", scope.get("state") or {})
        self._guard = cast("Guard | None", state.get(GUARD))
        self._mailbox = cast("Mailbox | None", state.get(MAILBOX))
        self._finishing = False
        self._relayed = self._closing = False
        self._ends = math.inf

    async def read_body(self, limit: int, deadline: float) -> bytes | None:
        """The whole body; None if it is not there by then. Raises `ProxyError` if it is larger than `limit` bytes."""
        if deadline == math.inf:
            return await self._read_body(limit)
        with trio.CancelScope(deadline=deadline):
            return await self._read_body(limit)
        return None

    async def _read_body(self, limit: int) -> bytes:
        if self.head.content_length is not None and self.head.content_length > limit:
            raise ProxyError(errors.REQUEST_TOO_LARGE, limit=limit)
        pieces: list[bytes] = []
        size = 0
        while not self.incoming.complete.is_set():
            piece = await self.incoming.next()
            size += len(piece)
            if size > limit:
                raise ProxyError(errors.REQUEST_TOO_LARGE, limit=limit)
            pieces.append(piece)
        return b"".join(pieces)

    async def learn_of_body(self) -> None:
        """Find out whether there is a body, which HTTP/2 does not announce (RFC 9113 section 8.1)."""
        if not await self.incoming.is_empty():
            self.head = replace(self.head, chunked=True)

    def body(self) -> AsyncIterator[bytes]:
        """The pieces of the request's body, as they arrive and are taken."""
        return self.incoming

    @property
    def is_watched(self) -> bool:
        """Whether the client's leaving is seen without asking for it, now that its request has been read."""
        return self._guard is not None and self.incoming.complete.is_set() and self.head.http_version != "2"

    async def start(self, status: int, headers: Headers, *, more_follows: bool = False) -> None:
        """Send the answer's head, all of it or nothing: cut off in between, Hypercorn would not know that it began.

        `more_follows`: it can wait for the next piece, which is there already.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self.started = True
        if self._relayed and self._guard is not None and self._is_early:
            # The client is not done with its request: it learns that it need not be (RFC 9112 section 9.6).
            self._guard.linger_on_close()
            self._closing = True
            headers = [*headers, (b"Connection", b"close")]
        self.incoming.abandoned.set()
        self._hold_back(more_follows)
        head: HTTPResponseStartEvent = {"type": "http.response.start", "status": status, "headers": headers}
        if self._guard is not None:  # which shields it
            await self._send(head)
        else:
            with trio.CancelScope(shield=True):
                await self._send(head)

    async def send(self, piece: bytes) -> None:
        """Send a piece of the answer's body; returns when there is room for more."""
        self._hold_back(False)
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def finish(self, last: bytes = b"") -> None:
        """Send the last piece, and that it was the last. Once that is under way a disconnect changes nothing."""
        if not self.incoming.complete.is_set() and not self._closing and self.head.http_version != "2":
            await self.send(last)
            last = b""
            with trio.move_on_after(DRAIN_SECONDS):
                await self.incoming.complete.wait()
        # From here on Hypercorn recycles or closes the connection, and must not be cut off while it does.
        self._finishing = True
        self._hold_back(True)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})
        if self._guard is not None and self.head.http_version != "2":
            # What is read from now on is another request, also if this exchange has not quite been left.
            self._guard.more_follows = self._guard.relaying = False

    def _hold_back(self, more_follows: bool) -> None:
        """What is sent next need not leave before what is sent after it; or it has to."""
        if self._guard is not None:
            self._guard.more_follows = more_follows

    def abort(self) -> None:
        """Make sure that the client sees that the answer is not whole: what was begun is never finished."""
        if self._guard is None:
            return
        if self.head.http_version == "1.0":
            self._guard.reset_on_close()

    def hand_over(self) -> None:
        """From here on a relay counts the request."""
        self._relayed = True
        if self._guard is not None and self.head.http_version != "2":
            self._guard.relaying = True
            if self._guard.has_left:  # seen before this exchange was there to be told
                self.leave()

    @property
    def _is_early(self) -> bool:
        has_body = self.head.chunked or bool(self.head.content_length)
        return has_body and not self.incoming.complete.is_set() and self.head.http_version != "2"

    def limit_writes(self, until: float) -> None:
        """No write goes on beyond that time, also if the client does not read."""
        self._ends = until
        if self._guard is not None and self.head.http_version != "2":
            self._guard.limit_writes(until)

    def leave(self) -> None:
        """The client has gone: stop working for it. After the limit for writes it was cut off, not gone."""
        if not self._finishing and trio.current_time() < self._ends:
            self.cancel_scope.cancel(reason="the client has gone")

    def __enter__(self) -> None:
        if self._guard is not None:
            self._guard.watch(self.leave)
        if self._mailbox is not None:
            self._mailbox.on_disconnect = self.leave

    def __exit__(self, *_: object) -> None:
        if self._mailbox is not None:
            self._mailbox.on_disconnect = None
        self.incoming.forget()
        if self._guard is not None:
            self._guard.unwatch(self.leave)


class NoHeaders(WerkzeugHeaders):
    """What Quart's request has of the fields: none, since handlers read the exchange's. It looks for several."""

    def get(self, key: str, default: Any = None, *_: object, **__: object) -> Any:  # type: ignore[override]
        """There is none."""
        return default


_NO_HEADERS: Final = NoHeaders()


class Request(TrioRequest):
    """Quart's request, with the exchange that it came in."""

    exchange: Exchange


class Connection(TrioASGIHTTPConnection):
    """Runs the handler, and then what it returned, in the task that Hypercorn made for the request."""

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        exchange = Exchange(self.scope, receive, send)
        with exchange, exchange.cancel_scope:
            response = await self.app.handle_request(self._request(exchange, send))
            if exchange.is_watched:
                await self._answer(exchange, response)
                return
            exchange.incoming.share()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(exchange.incoming.look_after)
                await self._answer(exchange, response)
                nursery.cancel_scope.cancel()

    async def _answer(self, exchange: Exchange, response: object) -> None:
        if isinstance(response, Relay):
            exchange.hand_over()
            await response.run(exchange)
        else:
            assert isinstance(response, QuartResponse)
            headers = _identified(response, exchange.head.request_id)
            await exchange.start(response.status_code, headers, more_follows=True)
            await exchange.finish(await response.get_data(as_text=False))

    def _request(self, exchange: Exchange, send: ASGISendCallable) -> Request:
        """Quart's view of the request: enough to find the handler, which reads the rest from the exchange."""
        head = exchange.head

        async def no_push(path: str, headers: WerkzeugHeaders) -> None:
            return

        quart_request = Request(
            head.method,
            self.scope["scheme"],
            head.path.decode("latin-1"),
            head.query,
            _NO_HEADERS,
            "",
            head.http_version,
            self.scope,
            send_push_promise=no_push,
        )
        quart_request.exchange = exchange
        return quart_request


def _identified(response: QuartResponse, request_id: str) -> Headers:
    headers = encode_headers(response.headers)
    if "x-trioproxy-request-id" in response.headers:
        return headers
    return [*headers, (b"x-request-id", request_id.encode()), *request.identification(request_id, None)]
