"""The soak test's books: what was sent, what came back, who has left, what was wrong."""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final

import trio

COMPLAINTS_SHOWN: Final = 20

LEFT_SECONDS_MAX: Final = 0.25
"""How long a call may outlive its client, beside the proxy's own lateness. The contract says 50 ms."""

LATE_SECONDS: Final = 5.0
"""For so long a proxy that was late counts as being late."""

UNSEEN_SECONDS_MAX: Final = 4.0
"""The same for a client that has pipelined a request or is in the middle of an upload (the contract: 3 s), and for one
that leaves a WebSocket: what it has said before is passed on first, one message after the other."""


@dataclass
class Expected:
    """A scheduled request of a patient client, and what it got; the log must tell the same."""

    kind: str
    http_status: int | None = None
    code: str | None = None
    """Of our own error; None for an answer of the upstream."""
    whole: bool = False


@dataclass
class Ledger:
    """Everything that is counted on the clients' side."""

    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    complaints: Counter[str] = field(default_factory=Counter)
    """By kind of complaint; the first ones are kept in full."""
    details: list[str] = field(default_factory=list)
    patient: dict[int, Expected] = field(default_factory=dict)
    scheduled_sent: int = 0
    slowest_to_end: dict[str, tuple[float, int]] = field(default_factory=lambda: {"seen": (0.0, 0), "unseen": (0.0, 0)})
    """For how long calls have outlived their clients, at most, and which did."""
    sent: dict[int, str] = field(default_factory=dict)
    """The client's kind for each request that was sent."""
    _left: dict[int, tuple[float, bool, str]] = field(default_factory=dict)
    _accused: set[int] = field(default_factory=set)
    _last_left: float = 0.0
    latest: float = 0.0
    """How long the proxy has taken for a glance at its health, at most: where it is busy all else is as late."""
    _glance_began: float | None = None
    _glances: deque[tuple[float, float]] = field(default_factory=deque)

    def complain(self, what: str, detail: str = "") -> None:
        """Something is wrong."""
        self.complaints[what] += 1
        if len(self.details) < COMPLAINTS_SHOWN:
            self.details.append(f"{what}: {detail}" if detail else what)

    def left(self, numbers: list[int], *, unseen: bool, way: str) -> None:
        """The client of these requests has gone in that way, or has its answer."""
        self._last_left = trio.current_time()
        for number in numbers:
            self._left.setdefault(number, (self._last_left, unseen, way))

    def since_last_left(self) -> float:
        """Seconds since the last client has gone."""
        return trio.current_time() - self._last_left

    def glance(self) -> None:
        """The proxy is asked for its health, or has answered that."""
        now = trio.current_time()
        if self._glance_began is None:
            self._glance_began = now
            return
        self._glances.append((now, now - self._glance_began))
        self._glance_began = None

    def _lateness(self) -> float:
        """How late the proxy is: as much as it lately was, or as it has not answered yet."""
        now = trio.current_time()
        while self._glances and now - self._glances[0][0] > LATE_SECONDS:
            self._glances.popleft()
        taken = [seconds for _, seconds in self._glances]
        if self._glance_began is not None:
            taken.append(now - self._glance_began)
        late = max(taken, default=0.0)
        self.latest = max(self.latest, late)
        return late

    def judge(self, number: int, began: float, treated: str, *, web_socket: bool) -> None:
        """The upstream's call of that number goes on, or is just over: nobody is served whose client left a while ago.

        A call that began later counts from there: the client's request and its leaving were read one after the other.
        """
        if number not in self._left:
            return
        at, unseen, way = self._left[number]
        seconds = trio.current_time() - max(at, began)
        name, limit = ("unseen", UNSEEN_SECONDS_MAX) if unseen or web_socket else ("seen", LEFT_SECONDS_MAX)
        late = self._lateness()
        self.slowest_to_end[name] = max(self.slowest_to_end[name], (seconds, number))
        if seconds > limit + late and number not in self._accused:
            self._accused.add(number)
            call = f"call {number} ({self.sent.get(number)}, {way}; upstream: {treated})"
            self.complain(
                "orphan", f"{call} was open {seconds:.3f} s after its client had left, the proxy late by {late:.3f} s"
            )


@dataclass
class LoggedLines:
    """What the log says."""

    lines: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    by_number: dict[int, dict[str, Any]] = field(default_factory=dict)
    twice: int = 0
    """Requests with more than one closing line."""
    bad: list[str] = field(default_factory=list)
    """Lines of level error or with a traceback, and what is not JSON."""

    def add(self, text: str) -> None:
        """One line."""
        self.lines += 1
        try:
            line = json.loads(text)
        except ValueError:
            self.bad.append(text[:1000])
            return
        self.events[line["event"]] += 1
        if line["level"] in {"error", "critical"} or "exception" in line:
            self.bad.append(text[:4000])
        if "outcome" in line:
            self._add_outcome(line)

    def _add_outcome(self, line: dict[str, Any]) -> None:
        self.outcomes[line["outcome"]] += 1
        prefix, _, digits = line["request_id"].partition("-")
        if prefix != "soak":
            self.bad.append(f"nobody has sent {line}")
            return
        number = int(digits)
        self.twice += number in self.by_number
        self.by_number[number] = {key: line.get(key) for key in ("outcome", "http_status", "code", "error")}


def disagreements(ledger: Ledger, logged: LoggedLines) -> list[str]:
    """Patient clients' scheduled requests of which the log tells something else than the client saw, or nothing."""
    found = []
    for number, expected in ledger.patient.items():
        line = logged.by_number.get(number)
        if line is None:
            found.append(f"request {number} ({expected.kind}) has no closing line in the log")
        elif complaint := _disagreement(expected, line):
            found.append(f"request {number} ({expected.kind}): {complaint}; client {expected}; log {line}")
    return found


def _disagreement(expected: Expected, line: dict[str, Any]) -> str:
    if expected.http_status is not None and expected.http_status != line["http_status"]:
        return "another status"
    if expected.code is not None and expected.code != line["code"]:
        return "another code"
    if expected.whole and expected.code is None:
        bad = expected.http_status == 429 or (expected.http_status or 0) >= 500
        return "" if line["outcome"] == ("upstream_error" if bad else "success") else "another outcome"
    if not expected.whole and line["outcome"] not in {"timeout", "upstream_error", "cancelled"}:
        return "the client's answer was not whole"
    return ""
