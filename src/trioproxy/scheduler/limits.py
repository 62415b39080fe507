"""How many requests may run at once, and how fast slots come free. No trio, no clock: `now` is an argument."""

from __future__ import annotations

from typing import Final, Protocol

from trioproxy.errors import Ending


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
