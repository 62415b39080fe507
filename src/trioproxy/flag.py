"""An event that hardly costs anything before somebody waits for it. Knows nothing of the house."""

from __future__ import annotations

import trio


class Flag:
    """A `trio.Event` that is made only when somebody waits for it: most requests have several, and wait for none."""

    __slots__ = ("_event", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._event: trio.Event | None = None

    def is_set(self) -> bool:
        """Whether it has been set."""
        return self._is_set

    def set(self) -> None:
        """Wake whoever waits, now and later."""
        self._is_set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Return once it is set."""
        if self._event is None:
            self._event = trio.Event()
            if self._is_set:
                self._event.set()
        await self._event.wait()
