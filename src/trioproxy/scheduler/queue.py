"""Who waits: most urgent first, first come first served within a priority. No time, no policy.

Whose client key has limits of its own waits in a line of its own, so that those who may not start for now are passed
over as a whole, however many they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Final

from trioproxy import priority
from trioproxy.events import ScheduledRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareLimits:
    """What the requests of one client key may have of a pool at once."""

    max_concurrency: int | None = None
    """Slots, at least 1; None: as many as there are."""
    max_queue: int | None = None
    """Places in the queue, at least 0; None: as many as there are."""


class WaitingLine:
    """Requests in the order in which they are to start. Every operation takes constant time.

    One ordered set for each of the 101 priorities, and an integer whose bits tell which of them are not empty.
    """

    __slots__ = ("_by_priority", "_joined", "_occupied")

    def __init__(self) -> None:
        self._by_priority = tuple(OrderedDict[ScheduledRequest, None]() for _ in range(priority.HIGHEST + 1))
        self._occupied = 0
        self._joined: dict[ScheduledRequest, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._joined)

    def __contains__(self, request: ScheduledRequest) -> bool:
        return request in self._joined

    def __iter__(self) -> Iterator[tuple[ScheduledRequest, float, int]]:
        """Every request with the time and the number of its joining, in starting order."""
        for line in reversed(self._by_priority):
            for request in line:
                yield request, *self._joined[request]

    def join(self, request: ScheduledRequest, now: float, number: int) -> None:
        """Join behind everything of the same priority. `number` is higher than that of everybody before."""
        self._by_priority[request.priority][request] = None
        self._occupied |= 1 << request.priority
        self._joined[request] = now, number

    def leave(self, request: ScheduledRequest) -> float:
        """Leave from wherever it stands; returns when it joined. KeyError if it does not wait."""
        since, _ = self._joined.pop(request)
        line = self._by_priority[request.priority]
        del line[request]
        if not line:
            self._occupied &= ~(1 << request.priority)
        return since

    def number(self, request: ScheduledRequest) -> int:
        """The number that it joined with."""
        return self._joined[request][1]

    def first(self) -> ScheduledRequest:
        """The one to start next. The line must not be empty."""
        return next(iter(self._by_priority[self._occupied.bit_length() - 1]))

    def lowest_priority(self) -> int:
        """The least urgent priority that waits. The line must not be empty."""
        return (self._occupied & -self._occupied).bit_length() - 1

    def youngest_of_lowest(self) -> ScheduledRequest:
        """The last to have come among the least urgent. The line must not be empty."""
        return next(reversed(self._by_priority[self.lowest_priority()]))


class Share:
    """What the requests of one client key have of a pool; or those of everybody whose key has no limits."""

    __slots__ = ("limits", "line", "running")

    def __init__(self, limits: ShareLimits) -> None:
        self.limits: Final = limits
        self.running = 0
        """Slots taken."""
        self.line: Final = WaitingLine()

    @property
    def may_start(self) -> bool:
        """Whether the limits allow one more to run."""
        return self.limits.max_concurrency is None or self.running < self.limits.max_concurrency

    @property
    def is_full(self) -> bool:
        """Whether the limits forbid one more to wait."""
        return self.limits.max_queue is not None and len(self.line) >= self.limits.max_queue


class Queue:
    """All who wait for a pool's slots. Operations take time in proportion to the number of keys with limits."""

    def __init__(self) -> None:
        self._common = Share(ShareLimits())
        self._limited: dict[str | None, Share] = {}
        self._length = 0
        self._numbers = count()

    def __len__(self) -> int:
        return self._length

    def __contains__(self, request: ScheduledRequest) -> bool:
        return request in self.share_of(request).line

    def __iter__(self) -> Iterator[tuple[ScheduledRequest, float]]:
        """Every request with the time of its joining, most urgent first, then longest first."""
        everybody = [entry for share in self._shares() for entry in share.line]
        for request, since, _ in sorted(everybody, key=lambda entry: (-entry[0].priority, entry[2])):
            yield request, since

    def share_of(self, request: ScheduledRequest) -> Share:
        """What this request's key has; what everybody else has, if the key has no limits."""
        return self._limited.get(request.key, self._common) if self._limited else self._common

    def set_limits(self, limits: Mapping[str, ShareLimits]) -> None:
        """Limit each client key named. Everybody keeps place and order; who runs is counted anew by the caller."""
        everybody = sorted((entry for share in self._shares() for entry in share.line), key=lambda entry: entry[2])
        self._common = Share(ShareLimits())
        self._limited = {key: Share(of_key) for key, of_key in limits.items()}
        for request, since, number in everybody:
            self.share_of(request).line.join(request, since, number)

    def join(self, request: ScheduledRequest, now: float) -> None:
        """Join behind everything of the same priority."""
        self.share_of(request).line.join(request, now, next(self._numbers))
        self._length += 1

    def leave(self, request: ScheduledRequest) -> float:
        """Leave from wherever it stands; returns when it joined. KeyError if it does not wait."""
        since = self.share_of(request).line.leave(request)
        self._length -= 1
        return since

    def first(self) -> ScheduledRequest | None:
        """The one to start next, past all whose key's limit forbids it; None if there is none."""
        if not self._limited:
            return self._common.line.first() if self._length else None
        startable = [share.line for share in self._shares() if share.line and share.may_start]
        firsts = ((line.first(), line) for line in startable)
        best = min(firsts, key=lambda each: (-each[0].priority, each[1].number(each[0])), default=None)
        return None if best is None else best[0]

    def lowest_priority(self) -> int:
        """The least urgent priority that waits. The queue must not be empty."""
        return min(share.line.lowest_priority() for share in self._shares() if share.line)

    def youngest_of_lowest(self) -> ScheduledRequest:
        """The last to have come among the least urgent. The queue must not be empty."""
        lowest = self.lowest_priority()
        lines = [share.line for share in self._shares() if share.line and share.line.lowest_priority() == lowest]
        youngest = max(lines, key=lambda line: line.number(line.youngest_of_lowest()))
        return youngest.youngest_of_lowest()

    def _shares(self) -> Iterator[Share]:
        yield self._common
        yield from self._limited.values()
