"""The upstream's end of a WebSocket session: messages, made of an upgraded connection's bytes by wsproto.

Knows nothing of clients and of HTTP beyond the handshake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, cast

import trio
from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping, TextMessage
from wsproto.utilities import LocalProtocolError, generate_accept_token, generate_nonce

from trioproxy import errors
from trioproxy.errors import Headers, ProxyError
from trioproxy.upstream import Switched

NORMAL: Final = 1000
NO_STATUS: Final = 1005
"""What stands for a close frame without a code (RFC 6455 section 7.4.1)."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Somebody closes a session (RFC 6455 section 7.1.5)."""

    code: int | None
    """None if none was said."""
    reason: str = ""


class TooLargeError(Exception):
    """A message is larger than may be."""


def new_key() -> bytes:
    """A value for `Sec-WebSocket-Key`."""
    return bytes(generate_nonce())


def check_accepted(headers: Headers, key: bytes, offered: Iterable[str], upstream: str) -> str | None:
    """The subprotocol of an answer 101, None without one. Raises `ProxyError` if it does not accept this handshake.

    RFC 6455 section 4.1, the client's requirements on the server's handshake.
    """
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        fields[name.lower()] = value.strip()
    subprotocol = fields.get(b"sec-websocket-protocol", b"").decode("latin-1") or None
    complaint = ""
    if fields.get(b"upgrade", b"").lower() != b"websocket":
        complaint = "its answer 101 switches to something else than a WebSocket."
    elif fields.get(b"sec-websocket-accept") != generate_accept_token(key):
        complaint = "its answer 101 has the wrong Sec-WebSocket-Accept."
    elif subprotocol is not None and subprotocol not in offered:
        complaint = "its answer 101 has a subprotocol that was not offered."
    elif b"sec-websocket-extensions" in fields:
        complaint = "its answer 101 has an extension that was not offered."
    if complaint:
        raise ProxyError(errors.UPSTREAM_PROTOCOL_ERROR, upstream=upstream, reason=complaint)
    return subprotocol


class UpstreamSocket:
    """An open WebSocket. Pings are answered while messages are being received."""

    def __init__(self, connection: Switched, max_message_size: int) -> None:
        self._connection = connection
        self._max_message_size = max_message_size
        self._protocol = Connection(ConnectionType.CLIENT)
        self._events: Iterator[Event] = iter(())
        self._writing: Final = trio.Lock()
        self._torn = False
        """Whether a frame has been sent in part."""

    async def send(self, message: str | bytes) -> None:
        """Send a message; returns when there is room for more, never if the upstream has closed: `receive` tells that.

        Raises `ProxyError` if the upstream has gone.
        """
        if isinstance(message, str):
            await self._write(TextMessage(data=message))
        else:
            await self._write(BytesMessage(data=cast(bytearray, message)))

    async def receive(self) -> str | bytes | Closed:
        """The next message, or that the upstream closes.

        Raises `ProxyError` if it breaks off or sends nonsense, `TooLargeError`.
        """
        pieces: list[str | bytes] = []
        size = 0
        while True:
            event = await self._next_event()
            if isinstance(event, Message):
                size += len(event.data)
                if size > self._max_message_size:
                    raise TooLargeError
                pieces.append(event.data)
                if event.message_finished:
                    if isinstance(event, TextMessage):
                        return "".join(cast(list[str], pieces))
                    return b"".join(cast(list[bytes], pieces))
            elif isinstance(event, Ping):
                await self._write(event.response())
            elif isinstance(event, CloseConnection):
                if self._protocol.state is ConnectionState.OPEN:
                    reason = f"what it sent is not the WebSocket protocol: {event.reason}."
                    raise ProxyError(errors.UPSTREAM_BROKE_OFF, reason=reason)
                return Closed(event.code if event.code != NO_STATUS else None, event.reason or "")

    async def close(self, closed: Closed) -> None:
        """Say, or answer, that the session is over, and wait until the upstream has answered or gone."""
        if self._torn:
            return
        try:
            await self._write(CloseConnection(code=closed.code or NORMAL, reason=closed.reason or None))
            while self._protocol.state is not ConnectionState.CLOSED:
                await self._next_event()
        except (ProxyError, LocalProtocolError):
            pass  # it has gone meanwhile

    async def _next_event(self) -> Event:
        while (event := next(self._events, None)) is None:
            data = await self._connection.read()
            if not data:
                reason = "it closed the connection without closing the WebSocket."
                raise ProxyError(errors.UPSTREAM_BROKE_OFF, reason=reason)
            self._protocol.receive_data(data)
            self._events = self._protocol.events()
        return event

    async def _write(self, event: Event) -> None:
        async with self._writing:
            if isinstance(event, Message) and self._protocol.state is not ConnectionState.OPEN:
                await trio.sleep_forever()
            data = self._protocol.send(event)
            self._torn = True
            await self._connection.write(bytes(data))
            self._torn = False
