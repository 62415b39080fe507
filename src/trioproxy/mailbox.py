"""What a connection has for the application, in Hypercorn's task group: messages by way of a mailbox.

Hypercorn's own channel costs each request two steps for each message, and 2 KB while it waits; and when it is full and
nobody takes anything out any more, the connection's end waits behind it for ever. This module knows nothing of HTTP but
that a body can be in several messages.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, Scope

MAILBOX: Final = "trioproxy.mailbox"
"""The key in an ASGI scope's `state` under which a request's mailbox is found."""


class Mailbox:
    """Messages from a connection to the application, in order; one reader. Waits only where there is need to."""

    __slots__ = ("_changed", "_gone", "_messages", "_size", "on_disconnect")

    def __init__(self, size: int) -> None:
        self.on_disconnect: Callable[[], None] | None = None
        """Called at once when a disconnect is left: what lies before it may be what nobody is going to take."""
        self._size: Final = size
        self._messages: list[ASGIReceiveEvent] = []
        self._changed: trio.Event | None = None
        self._gone = False

    async def put(self, message: ASGIReceiveEvent) -> None:
        """Leave a message, waiting until fewer than `size` are there. A disconnect does not wait.

        The end of a body joins the piece before, if that is still there. Nobody waits behind a disconnect.
        """
        if message["type"].endswith(".disconnect"):
            self._gone = True
            self._messages.append(message)
            self._tell()
            if self.on_disconnect is not None:
                self.on_disconnect()
            return
        if message["type"] == "http.request" and not message["body"] and self._messages:
            last = self._messages[-1]
            if last["type"] == "http.request":
                last["more_body"] = message["more_body"]
                return
        while len(self._messages) >= self._size:
            if self._gone:
                return
            await self._change()
        self._messages.append(message)
        self._tell()

    async def receive(self) -> ASGIReceiveEvent:
        """The next message, waiting for it."""
        while not self._messages:
            await self._change()
        message = self._messages.pop(0)
        self._tell()
        return message

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = trio.Event()
        await self._changed.wait()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


class Tasks(TaskGroup):
    """Hypercorn's task group of one connection, but for how the application gets its messages."""

    def __init__(self, theirs: TaskGroup) -> None:
        self._nursery = theirs._nursery

    async def spawn_app(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        """Start the application for one request or WebSocket; what the returned function is given reaches it."""
        mailbox = Mailbox(config.max_app_queue_size)
        cast("dict[str, object]", scope["state"])[MAILBOX] = mailbox
        assert self._nursery is not None
        threads = trio.to_thread.run_sync, trio.from_thread.run
        self._nursery.start_soon(_handle, app, config, scope, mailbox.receive, send, *threads)
        return mailbox.put
