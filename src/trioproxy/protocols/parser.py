"""What the protocols of a connection need of the server, and what both of them ask of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from trioproxy.errors import Headers

PARSER: Final = "trioproxy.parser"
"""The key in a connection's state under which the server puts what the protocols need."""


class Refusing(Protocol):
    """Says what to answer to what cannot be read, and counts it."""

    def __call__(self, reason: str, method: str, path: str) -> tuple[int, Headers, bytes]:
        """Status, headers and body of the answer."""
        ...


class Below(Protocol):
    """The stream below the protocols, as far as it concerns them."""

    more_follows: bool
    """Whether what is being sent can wait for what is sent next."""

    def stir(self) -> None:
        """A request has been read: the connection does not rest any more."""
        ...

    def settle(self) -> None:
        """Nothing is going to come of what has been read, or it is over."""
        ...

    @property
    def sends_alone(self) -> bool:
        """Whether sending needs nobody's shield from cancellation."""
        ...


@dataclass(frozen=True, slots=True)
class Parser:
    """What the protocols of one connection need of the server."""

    refuse: Refusing
    write_timeout: float
    below: Below


READ_AS_TEXT: Final = frozenset({b"connection", b"upgrade", b"sec-websocket-protocol", b"sec-websocket-extensions"})
"""Fields that Hypercorn reads as ASCII, and fails on if they are not."""


def unusable_version(fields: dict[bytes, bytes]) -> str:
    """Why the version of a WebSocket cannot be had (RFC 6455 section 4.1); or empty."""
    is_known = fields.get(b"sec-websocket-version") == b"13"
    return "" if is_known else "the WebSocket's handshake has no Sec-WebSocket-Version of 13"
