"""One connection of a client: Hypercorn's server of it, and which protocol is spoken on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import TrioSingleTask
from hypercorn.typing import TaskGroup as AnyTaskGroup

from trioproxy.mailbox import Tasks
from trioproxy.protocols.http1 import Http1
from trioproxy.protocols.http2 import Http2
from trioproxy.protocols.parser import PARSER, Below


class NoTask:
    """In place of Hypercorn's task for each pause between two requests: the stream below knows what rests."""

    def __init__(self, below: Below) -> None:
        self._below = below

    async def restart(self, task_group: AnyTaskGroup, action: Callable[[], Awaitable[None]]) -> None:
        """The connection is idle from now on."""
        self._below.settle()

    async def stop(self) -> None:
        """It is not."""
        self._below.stir()


class HttpServer(TCPServer):
    """Hypercorn's server of one connection, with protocols of ours."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.idle_task = cast(TrioSingleTask, NoTask(self.state[PARSER].below))

    async def _read_data(self) -> None:
        """As Hypercorn's, but that nothing is kept of what has been read while more is waited for."""
        more = True
        while more:
            try:
                data = await self.stream.receive_some(MAX_RECV)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                break
            more = bool(data)
            await self.protocol.handle(RawData(bytes(data)))
            del data
        await self.protocol.handle(Closed())

    async def protocol_send(self, event: Event) -> None:
        """As Hypercorn's, but that waiting for its lock is shielded too, or without both where nobody is waited for."""
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        if not self.state[PARSER].below.sends_alone or self.send_lock.locked():
            with trio.CancelScope(shield=True):
                await super().protocol_send(event)
            return
        self.send_lock.acquire_nowait()
        try:
            await self.stream.send_all(event.data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())
        finally:
            self.send_lock.release()

    @property
    def protocol(self) -> Protocols:
        """What it has put together, replaced."""
        return self._protocol

    @protocol.setter
    def protocol(self, theirs: ProtocolWrapper) -> None:
        self._protocol = Protocols(theirs)


class Protocols(ProtocolWrapper):
    """Chooses the protocol of a connection, as Hypercorn's does."""

    def __init__(self, theirs: ProtocolWrapper) -> None:
        self.__dict__.update(theirs.__dict__)
        self.task_group = Tasks(cast(TaskGroup, theirs.task_group))
        self.protocol = self._begin(Http2 if isinstance(theirs.protocol, H2Protocol) else Http1)

    async def handle(self, event: Event) -> None:
        """What has come from the client."""
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as error:
            await self._switch(error.data)
        except H2CProtocolRequiredError as error:
            await self._switch(error.data, error.headers, error.settings)

    async def _switch(self, data: bytes, *request: object) -> None:
        self.protocol = self._begin(Http2)
        await self.protocol.initiate(*request)  # type: ignore[arg-type]
        if data:
            await self.protocol.handle(RawData(data=data))
        self.state[PARSER].below.settle()

    def _begin(self, kind: type[Http1] | type[Http2]) -> Http1 | Http2:
        return kind(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            self.ssl,
            self.client,
            self.server,
            self.send,
        )
