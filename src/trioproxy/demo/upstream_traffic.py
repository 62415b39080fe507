"""The simulated upstream's books: what arrived, what is under way and how it ended.

An ASGI middleware keeps them, because only there does a request have one beginning and one end whatever happens to it:
Quart sends a body after its handler has returned, and a body that is never begun is never closed either. This module
must not know OpenAI's API.
"""

import math
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import trio
from hypercorn.typing import (
    ASGIFramework,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    HTTPResponseStartEvent,
    HTTPScope,
    Scope,
)

from trioproxy.demo.upstream_options import Controls

LOG_LENGTH = 1000

Outcome = Literal["open", "completed", "aborted", "broken"]


class BrokenOffError(Exception):
    """Raised while a body is being sent: leave it unfinished, so that the server closes the connection."""


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request and what became of it; filled in as it goes on."""

    method: str
    target: str
    """Path and query as they were sent, not decoded."""
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, repeated ones in their order."""
    arrived: float
    """`trio.current_time()` at arrival."""
    body_size: int = 0
    """Bytes of body received."""
    model: str | None = None
    """The model that a generation's body names."""
    generating: bool = False
    """Whether it is counted in `Traffic.running` now."""
    status: int | None = None
    """HTTP status, once sent."""
    outcome: Outcome = "open"
    """`completed`: answered whole, with whatever status; `aborted`: cut off before that by the client (or by the
    server's end); `broken`: broken off on the client's own demand by `x-sim-break`."""
    controls: Controls = field(default_factory=Controls)
    """What its `x-sim-*` headers ask for."""


current_exchange: ContextVar[Exchange] = ContextVar("current_exchange")


class Traffic:
    """Live counters. At any instant `received` = `completed` + `aborted` + `broken` + requests still open."""

    def __init__(self) -> None:
        self.running = 0
        """Generations under way now."""
        self.peak = 0
        """Most generations that were ever under way at once."""
        self.received = 0
        """Requests that arrived, of every kind."""
        self.completed = 0
        """Requests answered whole, whatever the status."""
        self.aborted = 0
        """Requests whose client went away before the end."""
        self.broken = 0
        """Requests broken off on demand."""
        self.log: deque[Exchange] = deque(maxlen=LOG_LENGTH)
        """The last 1000 requests, oldest first."""

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} running={self.running} peak={self.peak} received={self.received} "
            f"completed={self.completed} aborted={self.aborted} broken={self.broken}>"
        )

    def arrive(self, exchange: Exchange) -> None:
        """Counts a request in."""
        self.received += 1
        self.log.append(exchange)

    def start_generation(self, exchange: Exchange) -> None:
        """Counts the exchange as a generation under way, until one of the two methods below."""
        exchange.generating = True
        self.running += 1
        self.peak = max(self.peak, self.running)

    def end_generation(self, exchange: Exchange) -> None:
        """The model is done with it, if it was at work at all.

        To be told before a stream's last event leaves: a client that has it may be back for the slot at once.
        """
        if exchange.generating:
            exchange.generating = False
            self.running -= 1

    def end(self, exchange: Exchange, outcome: Literal["completed", "aborted", "broken"]) -> None:
        """Counts a request out; the first call for it decides, later ones change nothing."""
        self.end_generation(exchange)
        if exchange.outcome != "open":
            return
        exchange.outcome = outcome
        if outcome == "completed":
            self.completed += 1
        elif outcome == "aborted":
            self.aborted += 1
        else:
            self.broken += 1


class TrafficMiddleware:
    """Keeps `traffic` for the ASGI application `app`, which finds its request in `current_exchange`."""

    def __init__(self, app: ASGIFramework, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _exchange(scope)
        current_exchange.set(exchange)
        self._traffic.arrive(exchange)
        try:
            await self._app(scope, _counting_receive(exchange, receive), self._watching_send(exchange, send))
        except* BrokenOffError:
            self._traffic.end(exchange, "broken")
        finally:
            self._traffic.end(exchange, "aborted")

    def _watching_send(self, exchange: Exchange, send: ASGISendCallable) -> ASGISendCallable:
        missing: float = math.inf

        async def watching_send(message: ASGISendEvent) -> None:
            nonlocal missing
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                missing = _content_length(message)
            elif message["type"] == "http.response.body":
                missing -= len(message["body"])
                # Counted before the last bytes leave (Quart's very last message is empty): a client that has its answer
                # finds it in the books.
                if missing <= 0 or not message["more_body"]:
                    self._traffic.end(exchange, "completed")
            await send(message)

        return watching_send


def _exchange(scope: HTTPScope) -> Exchange:
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    return Exchange(
        method=scope["method"],
        target=target.decode("latin1"),
        headers=tuple((name.decode("latin1").lower(), value.decode("latin1")) for name, value in scope["headers"]),
        arrived=trio.current_time(),
    )


def _counting_receive(exchange: Exchange, receive: ASGIReceiveCallable) -> ASGIReceiveCallable:
    async def counting_receive() -> ASGIReceiveEvent:
        message = await receive()
        if message["type"] == "http.request":
            exchange.body_size += len(message["body"])
        elif exchange.outcome == "completed":
            # Hypercorn says "disconnect" at every response's end, from inside the sending of its last message. Told of
            # it, quart-trio would cancel that very call, before Hypercorn has made the connection ready for the next
            # request or closed it. quart-trio ends this wait by itself once the call has returned.
            await trio.sleep_forever()
        return message

    return counting_receive


def _content_length(message: HTTPResponseStartEvent) -> float:
    return next((int(value) for name, value in message["headers"] if name == b"content-length"), math.inf)
