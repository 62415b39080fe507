"""The waiting line: most urgent first, first come first served within a priority. No time, no limits, no policy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from trioproxy import priority
from trioproxy.events import ScheduledRequest


class WaitingLine:
    """Requests in the order in which they are to start. Every operation takes constant time.

    One ordered set for each of the 101 priorities, and an integer whose bits tell which of them are not empty.
    """

    __slots__ = ("_by_priority", "_occupied", "_since")

    def __init__(self) -> None:
        self._by_priority = tuple(OrderedDict[ScheduledRequest, None]() for _ in range(priority.HIGHEST + 1))
        self._occupied = 0
        self._since: dict[ScheduledRequest, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, request: ScheduledRequest) -> bool:
        return request in self._since

    def __iter__(self) -> Iterator[tuple[ScheduledRequest, float]]:
        """Every request with the time of its joining, in starting order."""
        for line in reversed(self._by_priority):
            for request in line:
                yield request, self._since[request]

    def join(self, request: ScheduledRequest, now: float) -> None:
        """Join behind everything of the same priority."""
        self._by_priority[request.priority][request] = None
        self._occupied |= 1 << request.priority
        self._since[request] = now

    def leave(self, request: ScheduledRequest) -> float:
        """Leave from wherever it stands; returns when it joined. KeyError if it does not wait."""
        since = self._since.pop(request)
        line = self._by_priority[request.priority]
        del line[request]
        if not line:
            self._occupied &= ~(1 << request.priority)
        return since

    def first(self) -> ScheduledRequest:
        """The one to start next. The line must not be empty."""
        return next(iter(self._by_priority[self._occupied.bit_length() - 1]))

    def lowest_priority(self) -> int:
        """The least urgent priority that waits. The line must not be empty."""
        return (self._occupied & -self._occupied).bit_length() - 1

    def youngest_of_lowest(self) -> ScheduledRequest:
        """The last to have come among the least urgent. The line must not be empty."""
        return next(reversed(self._by_priority[self.lowest_priority()]))
