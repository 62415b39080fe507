"""How many requests may run at once, how fast slots come free, and when the refused are to come back.

No trio, no clock: `now` is an argument.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

from trioproxy.errors import RETRY_SECONDS_MAX, Ending


class Limit(Protocol):
    """How many may run now. It learns from every slot that is given back."""

    @property
    def permits(self) -> int:
        """The most that may run at this moment, at least 1."""
        ...

    def released(self, held_seconds: float, ending: Ending) -> None:
        """A slot was given back after `held_seconds`, for this reason."""
        ...


class FixedLimit:
    """As many as somebody has said."""

    def __init__(self, permits: int) -> None:
        self.permits = permits

    @property
    def permits(self) -> int:
        """The most that may run at this moment, at least 1. It may be set at any time."""
        return self._permits

    @permits.setter
    def permits(self, permits: int) -> None:
        if permits < 1:
            raise ValueError(f"{permits} permits: at least 1 is needed")
        self._permits = permits

    def released(self, held_seconds: float, ending: Ending) -> None:
        """Nothing to learn."""

    def __repr__(self) -> str:
        return f"<FixedLimit {self._permits}>"


class ReleaseRate:
    """How fast slots come free while all of them are busy, from how long each was held.

    With P permits and a mean holding time of S seconds, slots come free P / S times a second when all are busy
    (Little's law). The holding time does not depend on how busy the proxy was, so the estimate holds at once after
    an idle night, and it is a moving average, so it follows the upstream's mood within some dozen requests.
    """

    WEIGHT: Final = 1 / 16
    """The share of the newest holding time in the mean, once there have been 1 / WEIGHT of them."""

    UNMEASURED_SECONDS: Final = 1.0
    """The holding time supposed until one was seen."""

    def __init__(self) -> None:
        self._mean = self.UNMEASURED_SECONDS
        self._seen = 0

    def released(self, held_seconds: float) -> None:
        """A slot was given back after `held_seconds`."""
        self._seen += 1
        weight = max(1 / self._seen, self.WEIGHT)
        self._mean += weight * (held_seconds - self._mean)

    def seconds_until(self, releases: int, permits: int, oldest_held_seconds: float) -> float:
        """How long it takes until so many slots have come free, all `permits` being busy.

        `oldest_held_seconds` is how long the longest running request has held its slot: before anything has been
        measured it is the best evidence that requests here take long.
        """
        mean = self._mean if self._seen else max(self._mean, oldest_held_seconds)
        return releases * mean / permits


class ReturnLine:
    """When those who are refused are to come back: one of them for each slot that comes free.

    If each were told how long the queue takes, all of them would be back when there is room for one. So they form a
    line of their own behind the queue: everyone is told a time one release later than the one before. Refusals for
    each request served are then about one, however many clients there are, as long as the line fits into a minute.

    The line is made of promises to clients who may not keep them. That a slot is free although somebody has been told
    to stay away shows that it is too long, and it is forgotten (`dissolve`).
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def join(self, now: float, wait_seconds: float, release_seconds: float) -> None:
        """One more is refused: it returns a release after the one before it, and not before the queue is through.

        `wait_seconds` is how long the queue takes, `release_seconds` the time between two releases.
        """
        self._last = max(self._last + release_seconds, now + wait_seconds)
        self._last = min(self._last, now + RETRY_SECONDS_MAX)  # nobody can be told more

    def seconds(self, now: float) -> float:
        """In how many seconds the last of the line returns; less than 0 if it has returned."""
        return self._last - now

    def dissolve(self) -> None:
        """Forget who was told what."""
        self._last = -math.inf
