"""What a client key may have of a pool at once: each rule once, on the core alone."""

from __future__ import annotations

from trioproxy import errors
from trioproxy.events import Ended, Queued, ScheduledRequest, Started
from trioproxy.scheduler import Core, FixedLimit, ShareLimits
from trioproxy.scheduler.core import SchedulingEvent


class Pool:
    """A core in which requests are named by their key and a number, such as a1."""

    def __init__(self, permits: int, max_queue: int, **shares: tuple[int | None, int | None]) -> None:
        self.core = Core(FixedLimit(permits), max_queue, limits(**shares))
        self.requests: dict[str, ScheduledRequest] = {}

    def submit(self, name: str, priority: int = 50) -> str:
        self.requests[name] = ScheduledRequest(
            request_id=name, method="POST", path="/v1/x", arrived=0.0, priority=priority, key=name[0]
        )
        return told(self.core.submit(self.requests[name], 0.0))

    def finish(self, name: str) -> str:
        return told(self.core.finish(self.requests[name], 1.0, errors.COMPLETED))

    def share(self, **shares: tuple[int | None, int | None]) -> str:
        return told(self.core.set_shares(1.0, limits(**shares)))


def limits(**shares: tuple[int | None, int | None]) -> dict[str, ShareLimits]:
    return {key: ShareLimits(max_concurrency=slots, max_queue=places) for key, (slots, places) in shares.items()}


def told(events: list[SchedulingEvent]) -> str:
    """What happened, in words."""
    words = []
    for event in events:
        match event:
            case Queued(request):
                words.append(f"{request.request_id} queued")
            case Started(request):
                words.append(f"{request.request_id} started")
            case Ended(request, ending=ending):
                words.append(f"{request.request_id} {ending.code}")
    return ", ".join(words)


def test_others_pass_those_whose_key_has_no_slot_left() -> None:
    pool = Pool(2, 10, a=(1, None))
    assert pool.submit("a1") == "a1 started"
    assert pool.submit("a2", 100) == "a2 queued"
    assert pool.submit("b1", 0) == "b1 started"
    assert pool.submit("b2", 0) == "b2 queued"
    assert pool.finish("b1") == "b1 completed, b2 started"
    assert pool.finish("a1") == "a1 completed, a2 started"


def test_a_key_with_a_slot_left_waits_like_everybody() -> None:
    pool = Pool(1, 10, a=(1, None), b=(1, None))
    assert pool.submit("c1") == "c1 started"
    for name, priority in (("b1", 10), ("a1", 50), ("c2", 50), ("b2", 60)):
        assert pool.submit(name, priority) == f"{name} queued"
    for name, follower in (("c1", "b2"), ("b2", "a1"), ("a1", "c2"), ("c2", "b1")):
        assert pool.finish(name) == f"{name} completed, {follower} started"


def test_beyond_a_keys_places_its_own_least_urgent_must_go_and_nobody_elses() -> None:
    pool = Pool(1, 10, a=(None, 2))
    pool.submit("b1")
    pool.submit("b2", 1)
    pool.submit("a1", 20)
    pool.submit("a2", 30)
    assert pool.submit("a3", 20) == "a3 rate_limit_exceeded"
    assert pool.submit("a4", 25) == "a1 evicted, a4 queued"
    assert pool.submit("b3", 1) == "b3 queued"


def test_no_places_means_a_slot_or_a_refusal() -> None:
    pool = Pool(2, 10, a=(1, 0))
    assert pool.submit("a1") == "a1 started"
    assert pool.submit("a2", 100) == "a2 rate_limit_exceeded"
    assert pool.submit("b1") == "b1 started"
    assert pool.finish("a1") == "a1 completed"
    assert pool.submit("a3") == "a3 started"


def test_a_full_queue_is_everybodys() -> None:
    pool = Pool(1, 1, a=(1, 5))
    pool.submit("b1")
    assert pool.submit("b2", 10) == "b2 queued"
    assert pool.submit("a1", 10) == "a1 queue_full"
    assert pool.submit("a2", 11) == "b2 evicted, a2 queued"


def test_who_only_its_key_keeps_from_a_free_slot_is_told_so() -> None:
    pool = Pool(2, 0, a=(1, None))
    pool.submit("a1")
    assert pool.submit("a2") == "a2 rate_limit_exceeded"
    pool.submit("b1")
    assert pool.submit("a3") == "a3 queue_full"


def test_other_limits_start_who_may_now_and_take_nothing_from_anybody() -> None:
    pool = Pool(4, 10, a=(1, None))
    for name in ("a1", "a2", "a3", "a4"):
        pool.submit(name)
    assert pool.share(a=(2, None)) == "a2 started"
    assert pool.share() == "a3 started, a4 started"
    assert pool.share(a=(1, 0)) == ""
    assert pool.finish("a1") == "a1 completed"
    assert pool.submit("a5") == "a5 rate_limit_exceeded"
    assert (pool.finish("a2"), pool.finish("a3")) == ("a2 completed", "a3 completed")
    assert pool.submit("a6") == "a6 rate_limit_exceeded"
    assert pool.finish("a4") == "a4 completed"
    assert pool.submit("a7") == "a7 started"


def test_a_key_is_told_to_come_back_when_its_own_line_is_through() -> None:
    pool = Pool(10, 100, a=(2, 3))
    for name in ("a1", "a2", "a3", "a4", "a5"):
        pool.submit(name)
    pool.submit("b1")
    pool.core.finish(pool.requests["b1"], 6.0, errors.COMPLETED)
    assert pool.core.retry_after(6.0, pool.requests["a1"]) == 6.0 * 4 / 2
    assert pool.core.retry_after(6.0) == 6.0 * 4 / 10
