"""A WebSocket session's way through the house: place, upstream's handshake, messages both ways, the closing of both.

A session needs no slot: it lasts for minutes or hours, and what it costs the upstream nobody here knows. How many there
are at once is limited on its own. A Quart handler returns a `Session`; the connection runs it in its own task.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog
import trio
from quart.wrappers import Response as QuartResponse

from trioproxy import errors, request
from trioproxy.errors import Headers, ProxyError
from trioproxy.events import (
    Progress,
    Publisher,
    RequestFacts,
    WebSocketClosed,
    WebSocketOpening,
    WebSocketOutcome,
    WebSocketProgress,
)
from trioproxy.scheduler import Scheduler
from trioproxy.upload import Body
from trioproxy.upstream import Upstream
from trioproxy.websocket_upstream import Closed, TooLargeError, UpstreamSocket, check_accepted, new_key

log = structlog.get_logger()

RETRY_SECONDS = 5.0
"""When to come back if there are too many sessions: nobody knows how long they last."""

UPSTREAM_CLOSING_SECONDS = 0.5
"""How long an upstream may take to answer that the session is over."""

GOING_AWAY = 1001
MESSAGE_TOO_BIG = 1009
INTERNAL_ERROR = 1011
"""RFC 6455 section 7.4.1."""


class Client(Protocol):
    """The other end of the session, as the connection offers it."""

    started: bool
    """Whether the handshake has been answered."""

    async def accept(self, subprotocol: str | None, headers: Headers) -> None:
        """Open the WebSocket."""
        ...

    async def refuse(self, status: int, headers: Headers, read: Callable[[], Awaitable[bytes]]) -> None:
        """Answer the handshake with something else; `read` gives the body's pieces, and b"" at its end."""
        ...

    async def receive(self) -> str | bytes | Closed:
        """The next message, or that the client closes."""
        ...

    async def send(self, message: str | bytes) -> None:
        """Send a message; returns when there is room for more."""
        ...

    async def wait_too_large(self) -> None:
        """Return when a message was larger than may be, and the client has been told."""
        ...

    async def close(self, closed: Closed) -> None:
        """Say that the session is over, and wait a while for the client's answer to that."""
        ...


class Places:
    """How many sessions there may be at once, and telling all of them to end."""

    def __init__(self, limit: int) -> None:
        self.taken = 0
        self.goodbye = trio.Event()
        """Every session is to be closed by the proxy."""
        self.limit = limit
        """It may be set at any time; who has a place keeps it."""
        self._one_was_left = trio.Event()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Take a place for as long as the block lasts. Raises `ProxyError` if all of them are taken."""
        if self.taken >= self.limit:
            raise ProxyError(errors.TOO_MANY_WEBSOCKETS, limit=self.limit, retry_after=RETRY_SECONDS)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._one_was_left.set()

    async def say_goodbye(self) -> None:
        """Let every session be closed by the proxy, and wait until there are none."""
        self.goodbye.set()
        while self.taken:
            self._one_was_left = trio.Event()
            await self._one_was_left.wait()


class Session(QuartResponse):
    """A WebSocket handshake that a handler has handed over: what to run, and with what."""

    def __init__(
        self,
        *,
        head: request.Head,
        facts: RequestFacts,
        subprotocols: list[str],
        places: Places,
        scheduler: Scheduler,
        upstream: Upstream,
        publisher: Publisher,
        idle_timeout: float,
        max_message_size: int,
    ) -> None:
        super().__init__()
        self._head = head
        self._facts = facts
        self._subprotocols = subprotocols
        self._places = places
        self._scheduler = scheduler
        self._upstream = upstream
        self._publisher = publisher
        self._idle_timeout = idle_timeout
        self._max_message_size = max_message_size
        self._progress = WebSocketProgress()
        self._opened = False

    async def run(self, client: Client) -> None:
        """Serve the session to its end, whatever end that is."""
        try:
            await self._relay(client)
        except ProxyError as error:
            await self._fail(client, error)
        except Exception as error:
            log.exception("internal error", request_id=self._facts.request_id, error=repr(error))
            await self._fail(client, ProxyError(errors.INTERNAL_ERROR, request_id=self._facts.request_id))
        finally:
            self._publisher.publish(WebSocketClosed(self._facts, trio.current_time(), self._opened, self._progress))

    async def _relay(self, client: Client) -> None:
        if self._scheduler.closed:
            raise ProxyError(errors.SHUTTING_DOWN)
        with self._places.one():
            self._opened = True
            self._publisher.publish(WebSocketOpening(self._facts, trio.current_time()))
            await self._open(client)

    async def _open(self, client: Client) -> None:
        """Pass the handshake on, and then the messages, as long as the upstream's connection lasts."""
        head, upstream = self._head, self._upstream
        offered = self._subprotocols
        if upstream.authorization is not None:
            offered = request.without_credentials(offered)
        key = new_key()
        headers = request.websocket_headers(
            head,
            host=upstream.host,
            authorization=upstream.authorization,
            key=key,
            subprotocols=offered,
            has_key=self._facts.key is not None,
        )
        async with upstream.open("GET", head.target, headers, Body(b""), Progress(), switches=True) as response:
            if response.status != 101:
                self._progress.outcome = WebSocketOutcome.UPSTREAM_REFUSED
                self._progress.http_status = response.status
                fields = request.client_headers(response.status, response.headers, head.request_id, None)
                await client.refuse(response.status, fields, response.read)
                return
            subprotocol = check_accepted(response.headers, key, offered, upstream.url)
            self._progress.http_status = 101
            await client.accept(subprotocol, request.accepted_headers(response.headers, head.request_id))
            socket = UpstreamSocket(response.switch(), self._max_message_size)
            await _Conversation(client, socket, self._progress, self._idle_timeout, self._places.goodbye).run()

    async def _fail(self, client: Client, error: ProxyError) -> None:
        match error.ending.outcome:
            case errors.Outcome.REJECTED:
                self._progress.outcome = WebSocketOutcome.REJECTED
            case errors.Outcome.PROXY_ERROR:
                self._progress.outcome = WebSocketOutcome.PROXY_ERROR
            case _:
                self._progress.outcome = WebSocketOutcome.UPSTREAM_ERROR
        if self._progress.outcome is not WebSocketOutcome.REJECTED:
            self._progress.error = str(error)
        if client.started:
            return  # what was begun is never finished
        status, headers, body = request.refusal(error, self._facts.request_id, random.random())
        self._progress.http_status = status
        await client.refuse(status, headers, _Once(body).read)


class _Once:
    """A body that is there already."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body


class _Conversation:
    """Messages both ways, until one side or the proxy ends it."""

    def __init__(
        self,
        client: Client,
        upstream: UpstreamSocket,
        progress: WebSocketProgress,
        idle_timeout: float,
        goodbye: trio.Event,
    ) -> None:
        self._client = client
        self._upstream = upstream
        self._progress = progress
        self._idle_timeout = idle_timeout
        self._goodbye = goodbye
        self._idle = trio.CancelScope()
        self._talking = trio.CancelScope()
        self._closed: Closed | None = None

    async def run(self) -> None:
        """Until it is over, and both sides have been told, or have gone."""
        self._stay()
        with self._talking:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_to_upstream)
                nursery.start_soon(self._pass_to_client)
                nursery.start_soon(self._end_when_idle)
                nursery.start_soon(self._end_with_the_proxy)
                nursery.start_soon(self._end_when_too_large)
        assert self._closed is not None
        async with trio.open_nursery() as nursery:
            if self._progress.outcome is not WebSocketOutcome.CLIENT_CLOSED:
                nursery.start_soon(self._client.close, self._closed)
            if self._progress.outcome is not WebSocketOutcome.UPSTREAM_ERROR:
                nursery.start_soon(self._close_upstream, self._closed)

    def _end(self, outcome: WebSocketOutcome, closed: Closed, error: str | None = None) -> None:
        if self._closed is None:
            self._closed = closed
            self._progress.outcome = outcome
            self._progress.close_code = closed.code
            self._progress.error = error
            self._talking.cancel(reason=f"the session is over: {outcome}")

    async def _pass_to_upstream(self) -> None:
        while not isinstance(message := await self._client.receive(), Closed):
            self._stay()
            try:
                await self._upstream.send(message)
            except ProxyError as error:
                self._break_off(error)
                return
            self._progress.messages_in += 1
            self._progress.bytes_in += len(message)
        self._end(WebSocketOutcome.CLIENT_CLOSED, message)

    async def _pass_to_client(self) -> None:
        try:
            while not isinstance(message := await self._upstream.receive(), Closed):
                self._stay()
                await self._client.send(message)
                self._progress.messages_out += 1
                self._progress.bytes_out += len(message)
        except ProxyError as error:
            self._break_off(error)
        except TooLargeError:
            self._end(WebSocketOutcome.TOO_LARGE, Closed(MESSAGE_TOO_BIG, "a message is too large"))
        else:
            self._end(WebSocketOutcome.UPSTREAM_CLOSED, message)

    def _break_off(self, error: ProxyError) -> None:
        self._end(WebSocketOutcome.UPSTREAM_ERROR, Closed(INTERNAL_ERROR, "the upstream broke off"), str(error))

    def _stay(self) -> None:
        self._idle.deadline = trio.current_time() + self._idle_timeout

    async def _end_when_idle(self) -> None:
        with self._idle:
            await trio.sleep_forever()
        self._end(WebSocketOutcome.IDLE, Closed(GOING_AWAY, f"no message for {self._idle_timeout:g} s"))

    async def _end_with_the_proxy(self) -> None:
        await self._goodbye.wait()
        self._end(WebSocketOutcome.SHUTDOWN, Closed(GOING_AWAY, "the proxy is shutting down"))

    async def _end_when_too_large(self) -> None:
        await self._client.wait_too_large()
        self._end(WebSocketOutcome.TOO_LARGE, Closed(MESSAGE_TOO_BIG, "a message is too large"))

    async def _close_upstream(self, closed: Closed) -> None:
        with trio.move_on_after(UPSTREAM_CLOSING_SECONDS):
            await self._upstream.close(closed)
