"""Events: what a listener may rely on, and what the facts about a request are."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from builders import facts, scheduled
from trioproxy.errors import COMPLETED
from trioproxy.events import CapacityChanged, Ended, Event, Listener, Publisher, Queued

FIRST: Event = CapacityChanged("default", 1.0, 10, 100)
SECOND: Event = CapacityChanged("default", 2.0, 5, 100)


def test_every_listener_gets_every_event_at_once_in_order() -> None:
    told: list[tuple[str, Event]] = []
    publisher = Publisher([lambda event: told.append(("a", event)), lambda event: told.append(("b", event))])
    publisher.publish(FIRST)
    assert told == [("a", FIRST), ("b", FIRST)]
    publisher.publish(SECOND)
    assert told[2:] == [("a", SECOND), ("b", SECOND)]


def test_listeners_may_come_from_any_iterable() -> None:
    told: list[Event] = []
    publisher = Publisher(listener for listener in (told.append, told.append))
    publisher.publish(FIRST)
    publisher.publish(SECOND)
    assert told == [FIRST, FIRST, SECOND, SECOND]


def test_a_listener_that_raises_hurts_nobody_else_and_is_told_of_later_events() -> None:
    told: list[Event] = []
    failures: list[tuple[Listener, str]] = []
    asked: list[Event] = []

    def broken(event: Event) -> None:
        asked.append(event)
        raise ValueError(f"number {len(asked)}")

    publisher = Publisher(
        [told.append, broken, told.append], lambda listener, error: failures.append((listener, str(error)))
    )
    publisher.publish(FIRST)
    publisher.publish(SECOND)
    assert told == [FIRST, FIRST, SECOND, SECOND]
    assert asked == [FIRST, SECOND]
    assert failures == [(broken, "number 1"), (broken, "number 2")]


def test_a_listener_may_fail_with_nobody_to_tell() -> None:
    told: list[Event] = []

    def broken(event: Event) -> None:
        raise ValueError

    Publisher([broken, told.append]).publish(FIRST)
    assert told == [FIRST]


def test_what_is_no_error_is_not_swallowed() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Publisher([interrupted], lambda *_: None).publish(FIRST)


def test_nobody_needs_to_listen() -> None:
    Publisher().publish(FIRST)


@pytest.mark.parametrize("build", [facts, scheduled])
def test_requests_are_compared_by_identity(build: Any) -> None:
    one, other = build(request_id="same"), build(request_id="same")
    assert one == one  # noqa: PLR0124
    assert one != other
    assert len({one, other, one}) == 2
    assert {one: 1}.get(other) is None
    assert Queued(one, 1.0) == Queued(one, 1.0)
    assert Queued(one, 1.0) != Queued(other, 1.0)


@pytest.mark.parametrize("event", [facts(), scheduled(), FIRST])
def test_facts_are_frozen(event: Any) -> None:
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        event.pool = "other"
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        event.request_id = "other"


def test_a_request_without_a_deadline_has_forever_in_the_default_pool() -> None:
    request = scheduled()
    assert (request.deadline, request.pool) == (math.inf, "default")


@pytest.mark.parametrize(
    ("number", "level"), [(0, "very_low"), (39, "low"), (40, "normal"), (79, "high"), (100, "critical")]
)
def test_a_request_knows_its_level(number: int, level: str) -> None:
    assert scheduled(number).priority_level == level


def test_the_whole_time_is_from_arrival_to_the_end() -> None:
    request = replace(scheduled(), arrived=100.0)
    assert Ended(request, 102.5, COMPLETED, 0.5, started=True).total_seconds == 2.5


def test_even_telling_of_a_failure_may_fail() -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("broken")

    def tell(listener: Listener, error: Exception) -> None:
        raise TypeError("broken too")

    Publisher((broken, heard.append), tell).publish(CapacityChanged("default", 0.0, 1, 1))
    assert len(heard) == 1
