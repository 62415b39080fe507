"""A request's body on its way upstream: whole, or in pieces that arrive while it is being sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import trio

PIECE_SIZE: Final = 64 * 1024


class Body:
    """What is sent. Can be stopped, and sometimes be sent again.

    Not a generator, which would be left to the garbage collector whenever a call is cut off.
    """

    def __init__(self, content: bytes | AsyncIterator[bytes]) -> None:
        self._content = content
        self._at = 0
        self._taken = 0
        self._first = self._again = b""
        self._waiting: trio.CancelScope | None = None
        self.stopped = False
        """Nothing more of it is wanted."""

    @property
    def small(self) -> bytes | None:
        """All of it, if sending it takes no time in which the upstream could answer; else None."""
        return self._content if isinstance(self._content, bytes) and len(self._content) <= PIECE_SIZE else None

    async def piece(self) -> bytes:
        """The next piece, waiting for it; b"" at the end, and once it is stopped."""
        if isinstance(self._content, bytes):
            await trio.lowlevel.checkpoint()  # sending may need none
            piece = self._content[self._at : self._at + PIECE_SIZE]
            self._at += len(piece)
            return b"" if self.stopped else piece
        if self._again:
            piece, self._again = self._again, b""
            return piece
        with trio.CancelScope() as self._waiting:
            if not self.stopped:
                if piece := await anext(self._content, b""):
                    self._taken += 1
                    self._first = piece if self._taken == 1 else b""
                return piece
        return b""

    def stop(self) -> None:
        """Ask for nothing more of it: the upstream has answered."""
        self.stopped = True
        if self._waiting is not None:
            self._waiting.cancel(reason="the upstream has answered")

    def rewind(self) -> bool:
        """Make ready for being sent again, if that is possible: of pieces that arrive only the first is kept."""
        self._at, self._again, self.stopped = 0, self._first, False
        return self._taken <= 1
