"""A request's way through the house, top to bottom: slot, deadline, upstream, sending, each nested in the one before.

A Quart handler returns a `Relay` instead of an answer; the connection that the request came on runs it in its own
task once the handler is done, so that slot and scopes are lexical. What the connection has to offer is `Client`.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, Protocol

import structlog
import trio

from trioproxy import errors, request
from trioproxy.errors import Headers, ProxyError
from trioproxy.events import PassedThrough, Progress, Publisher, RequestFacts, ScheduledRequest
from trioproxy.scheduler import Scheduler
from trioproxy.upload import Body
from trioproxy.upstream import Upstream

log = structlog.get_logger()


class Client(Protocol):
    """The other end of the exchange, as the connection offers it."""

    started: bool
    """Whether an answer's head has been sent."""

    async def start(self, status: int, headers: Headers, *, more_follows: bool = False) -> None:
        """Send the answer's head; `more_follows`: it can wait for the next piece, which is there already."""
        ...

    async def send(self, piece: bytes) -> None:
        """Send a piece of the answer's body; returns when there is room for more."""
        ...

    async def finish(self, last: bytes = b"") -> None:
        """Send the last piece, and that it was the last."""
        ...

    def limit_writes(self, until: float) -> None:
        """No write goes on beyond that time, also if the client does not read."""
        ...

    def abort(self) -> None:
        """Make sure that the client sees that the answer is not whole."""
        ...

    def body(self) -> AsyncIterator[bytes]:
        """The pieces of the request's body, as they arrive and are taken."""
        ...


class Relay:
    """A request that a handler has handed over: what to run, and with what. It takes the place of a response.

    `body` is the request's body as it goes on upstream; None to pass it on while it arrives.
    """

    __slots__ = ("_body", "_facts", "_head", "_publisher", "_scheduler", "_upstream")

    def __init__(
        self,
        *,
        head: request.Head,
        facts: RequestFacts,
        body: bytes | None,
        scheduler: Scheduler,
        upstream: Upstream,
        publisher: Publisher,
    ) -> None:
        self._head = head
        self._facts = facts
        self._body = body
        self._scheduler = scheduler
        self._upstream = upstream
        self._publisher = publisher

    async def run(self, client: Client) -> None:
        """Serve the request to its end, whatever end that is."""
        try:
            if isinstance(self._facts, ScheduledRequest):
                await self._scheduled(client, self._facts)
            else:
                await self._passed_through(client)
        except ProxyError as error:
            await self._refuse(client, error)
        except Exception as error:
            log.exception("internal error", request_id=self._facts.request_id, error=repr(error))
            await self._refuse(client, ProxyError(errors.INTERNAL_ERROR, request_id=self._facts.request_id))

    async def _scheduled(self, client: Client, facts: ScheduledRequest) -> None:
        async with self._scheduler.slot(facts) as slot:
            client.limit_writes(min(facts.deadline, self._upstream.latest_end))
            try:
                with _deadline(facts):
                    last = await self._forward(client, slot.progress, slot.queue_seconds)
            except Exception as error:
                _note_failure(error, client, slot.progress, slot.queue_seconds)
                raise
            assert slot.progress.upstream_status is not None
            slot.ending = errors.of_upstream_status(slot.progress.upstream_status)
        await client.finish(last)

    async def _passed_through(self, client: Client) -> None:
        progress = Progress()
        ending = errors.CANCELLED
        try:
            if self._scheduler.closed:
                raise ProxyError(errors.SHUTTING_DOWN)
            client.limit_writes(self._upstream.latest_end)
            last = await self._forward(client, progress, None)
            assert progress.upstream_status is not None
            ending = errors.of_upstream_status(progress.upstream_status)
        except Exception as error:
            ending = _note_failure(error, client, progress, None)
            raise
        finally:
            self._publisher.publish(PassedThrough(self._facts, trio.current_time(), ending, progress))
        await client.finish(last)

    async def _forward(self, client: Client, progress: Progress, queue_seconds: float | None) -> bytes:
        """Call the upstream and pass its answer on, all but the last piece: that is returned."""
        head = self._head
        headers = request.upstream_headers(
            head,
            host=self._upstream.host,
            authorization=self._upstream.authorization,
            body_size=head.content_length if self._body is None else len(self._body),
            has_key=self._facts.key is not None,
        )
        has_none = self._body is None and not head.content_length and not head.chunked
        body = Body(b"" if has_none else client.body() if self._body is None else self._body)
        async with self._upstream.open(head.method, head.target, headers, body, progress) as response:
            progress.http_status = response.status
            headers = request.client_headers(response.status, response.headers, head.request_id, queue_seconds)
            await client.start(response.status, headers, more_follows=response.at_hand)
            progress.first_byte_at = trio.current_time()
            while True:
                piece = await response.read()
                progress.bytes_out += len(piece)
                if response.whole:
                    return piece
                await client.send(piece)

    async def _refuse(self, client: Client, error: ProxyError) -> None:
        if client.started:
            client.abort()
            return
        client.limit_writes(math.inf)  # what had a limit is over
        status, headers, body = request.refusal(error, self._facts.request_id, random.random())
        await client.start(status, headers, more_follows=True)
        await client.finish(body)


def _deadline(facts: ScheduledRequest) -> AbstractContextManager[None]:
    """The client's own deadline, once the request has a slot."""
    return _NO_DEADLINE if facts.deadline == math.inf else _kept(facts)


_NO_DEADLINE: Final = nullcontext()


@contextmanager
def _kept(facts: ScheduledRequest) -> Iterator[None]:
    with trio.CancelScope(deadline=facts.deadline) as scope:
        yield
    if scope.cancelled_caught:
        raise ProxyError(errors.DEADLINE_EXCEEDED, limit=facts.deadline - facts.arrived)


def _note_failure(error: Exception, client: Client, progress: Progress, queue_seconds: float | None) -> errors.Ending:
    """Write down what went wrong, and what the client is going to be told of it; the ending that it makes."""
    ending = error.ending if isinstance(error, ProxyError) else errors.INTERNAL_ERROR
    progress.error = str(error) or repr(error)
    if not client.started:
        progress.http_status = ending.http_status
    if isinstance(error, ProxyError):
        error.queue_seconds = queue_seconds
    return ending
