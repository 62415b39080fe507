"""Metrics: the series of contract section 9, as a scraper sees them after any course of events."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from prometheus_client.samples import Sample

from builders import facts, scheduled
from trioproxy import __version__, errors
from trioproxy.errors import ENDINGS, Ending
from trioproxy.events import (
    CapacityChanged,
    Ended,
    Event,
    PassedThrough,
    Progress,
    Queued,
    Refused,
    ScheduledRequest,
    Started,
)
from trioproxy.observe.metrics import KEYS_MAX, OTHER_KEYS, Metrics

LEVELS = ("very_low", "low", "normal", "high", "critical")
STATUSES = ("completed", "evicted", "rejected", "timeout", "failed", "cancelled")
OUTCOMES = ("success", "evicted", "rejected", "timeout", "upstream_error", "proxy_error", "cancelled")
UPSTREAM_STATUSES = ("2xx", "3xx", "4xx", "429", "5xx", "error")
PASSED_THROUGH_STATUSES = ("2xx", "3xx", "4xx", "5xx", "error")
REFUSALS = (
    *("invalid_priority", "invalid_request", "invalid_api_key", "model_not_allowed", "priority_not_allowed"),
    *("not_found", "request_too_large"),
)

PERMITS = 10
MAX_QUEUE = 100
QUEUE_TIMEOUT = 300.0
POOL = {"pool": "default"}

GAUGES: dict[str, dict[str, tuple[str, ...]]] = {
    "openai_proxy_queue_size": {},
    "openai_proxy_queue_size_by_priority": {"priority_level": LEVELS},
    "openai_proxy_queue_oldest_seconds": {},
}
COUNTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "openai_proxy_requests_total": {"priority_level": LEVELS, "status": STATUSES},
    "openai_proxy_requests_outcome_total": {"outcome": OUTCOMES},
    "openai_proxy_requests_evicted_total": {"evicted_priority": LEVELS},
    "openai_proxy_requests_rejected_total": {"priority_level": LEVELS},
}
HISTOGRAMS: dict[str, dict[str, tuple[str, ...]]] = {
    "openai_proxy_queue_duration_seconds": {"priority_level": LEVELS},
    "openai_proxy_openai_duration_seconds": {"status": UPSTREAM_STATUSES},
    "openai_proxy_request_duration_seconds": {"priority_level": LEVELS, "status": STATUSES},
    "openai_proxy_time_to_first_byte_seconds": {"priority_level": LEVELS},
    "openai_proxy_overhead_seconds": {},
}
WITHOUT_POOL: dict[str, dict[str, tuple[str, ...]]] = {
    "openai_proxy_passthrough_requests_total": {"http_status": PASSED_THROUGH_STATUSES},
    "openai_proxy_refused_total": {"code": REFUSALS},
}


def series(table: dict[str, dict[str, tuple[str, ...]]], fixed: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every name of the table with every set of its labels."""
    for name, labels in table.items():
        for values in product(*labels.values()):
            yield name, {**fixed, **dict(zip(labels, values, strict=True))}


def of_histogram(name: str, labels: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    yield f"{name}_count", labels
    yield f"{name}_sum", labels
    yield f"{name}_bucket", {**labels, "le": "+Inf"}


AT_ZERO = [
    *series(GAUGES, POOL),
    *series(COUNTERS, POOL),
    *series(WITHOUT_POOL, {}),
    *(sample for name, labels in series(HISTOGRAMS, POOL) for sample in of_histogram(name, labels)),
]


class Scraped:
    """The metrics of one process, read one by one."""

    def __init__(self, permits: int = PERMITS) -> None:
        self.now = 0.0
        self.metrics = Metrics(permits, MAX_QUEUE, QUEUE_TIMEOUT, clock=lambda: self.now)

    def tell(self, *events: Event) -> Scraped:
        for event in events:
            self.metrics(event)
        return self

    def __call__(self, name: str, **labels: str) -> float:
        """A series about scheduling."""
        return self.plain(name, pool="default", **labels)

    def plain(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"openai_proxy_{name}", labels)
        assert value is not None, (name, labels)
        return value

    def total(self, name: str) -> float:
        """A series summed over all its labels."""
        return sum(sample.value for sample in self._samples(name))

    def above_zero(self, name: str, label: str) -> dict[str, float]:
        """The values of one label that were counted under this name, and how often."""
        return {sample.labels[label]: sample.value for sample in self._samples(name) if sample.value}

    def _samples(self, name: str) -> Iterator[Sample]:
        full_name = f"openai_proxy_{name}"
        for family in self.metrics.registry.restricted_registry([full_name]).collect():
            yield from (sample for sample in family.samples if sample.name == full_name)


def ended_at_once(ending: Ending, priority: int = 50, *, at: float = 0.0) -> Ended:
    """A request that neither waited nor started."""
    return Ended(scheduled(priority), at, ending, None, started=False)


def served(progress: Progress, ending: Ending = errors.COMPLETED, priority: int = 50) -> list[Event]:
    """The life of a request that found a free slot and took 3 s."""
    request = scheduled(priority)
    return [
        Started(request, 0.0, 0.0, was_queued=False),
        Ended(request, 3.0, ending, 0.0, started=True, progress=progress),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is there from the start
# ---------------------------------------------------------------------------------------------------------------------


def test_every_series_of_the_contract_is_at_zero_from_the_start() -> None:
    registry = Scraped().metrics.registry
    assert [series for series in AT_ZERO if registry.get_sample_value(*series) != 0] == []


def test_all_slots_are_free_at_the_start() -> None:
    scraped = Scraped(7)
    assert (scraped("permits"), scraped("available_permits")) == (7, 7)


@pytest.mark.parametrize(
    ("table", "kind"),
    [(GAUGES, "gauge"), (COUNTERS, "counter"), (WITHOUT_POOL, "counter"), (HISTOGRAMS, "histogram")],
)
def test_every_series_is_of_its_kind_and_says_what_it_is(table: dict[str, object], kind: str) -> None:
    families = {family.name: family for family in Scraped().metrics.registry.collect()}
    for name in table:
        family = families[name.removesuffix("_total")]
        assert family.type == kind
        assert family.documentation


def test_every_refusal_before_scheduling_has_its_series() -> None:
    before_scheduling = [ending for ending in ENDINGS if ending.http_status is not None and ending.status is None]
    assert sorted(ending.code for ending in before_scheduling) == sorted(REFUSALS)


# ---------------------------------------------------------------------------------------------------------------------
# What is exposed, and how
# ---------------------------------------------------------------------------------------------------------------------

ACCEPT_OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain", "text/html", "text/plain;version=0.0.4"])
def test_text_is_the_format_unless_asked_otherwise(accept: str) -> None:
    exposition, content_type = Scraped().metrics.expose(accept)
    assert content_type.startswith("text/plain; version=")
    assert "# EOF" not in exposition.decode()
    assert {"openai_proxy_queue_size", "openai_proxy_requests"} <= {
        family.name for family in read_text(exposition.decode())
    }


def test_openmetrics_is_for_those_who_ask_for_it() -> None:
    exposition, content_type = Scraped().metrics.expose(ACCEPT_OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert exposition.endswith(b"# EOF\n")
    assert "openai_proxy_requests" in {
        family.name
        for family in read_openmetrics(exposition.decode())  # type: ignore[no-untyped-call]
    }


@pytest.mark.parametrize("accept", ["", ACCEPT_OPENMETRICS])
def test_the_process_shows_itself_and_no_times_of_creation(accept: str) -> None:
    scraped = Scraped().tell(*served(Progress(upstream_seconds=1.0, upstream_status=200, upstream_whole=True)))
    exposition = scraped.metrics.expose(accept)[0].decode()
    names = {line.partition(" ")[0].partition("{")[0] for line in exposition.splitlines() if line[0] != "#"}
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "python_info"} <= names
    assert {"openai_proxy_requests_total", "openai_proxy_request_duration_seconds_bucket"} <= names
    assert not {name for name in names if name.endswith("_created")}


def test_several_live_in_one_process_and_count_for_themselves() -> None:
    one, other = Scraped(), Scraped()
    one.tell(ended_at_once(errors.QUEUE_FULL))
    assert (one.total("requests_total"), other.total("requests_total")) == (1, 0)


def test_a_listener_that_fails_is_counted() -> None:
    scraped = Scraped()
    scraped.metrics.listener_failed()
    assert scraped.plain("listener_failures_total") == 1


# ---------------------------------------------------------------------------------------------------------------------
# One request
# ---------------------------------------------------------------------------------------------------------------------


def test_a_request_that_finds_a_free_slot() -> None:
    scraped, request = Scraped(), scheduled(85, arrived=100.0)
    scraped.tell(Started(request, 100.0, 0.0, was_queued=False))
    assert (scraped("available_permits"), scraped("queue_size")) == (PERMITS - 1, 0)
    assert scraped("queue_duration_seconds_count", priority_level="critical") == 1
    assert scraped("queue_duration_seconds_sum", priority_level="critical") == 0
    assert scraped.total("requests_total") == 0
    progress = Progress(http_status=200, upstream_status=200, upstream_seconds=2.5, upstream_whole=True)
    scraped.tell(Ended(request, 103.0, errors.COMPLETED, 0.0, started=True, progress=progress))
    assert scraped("available_permits") == PERMITS
    assert scraped("requests_total", priority_level="critical", status="completed") == 1
    assert scraped("requests_outcome_total", outcome="success") == 1
    assert scraped("request_duration_seconds_sum", priority_level="critical", status="completed") == 3.0
    assert scraped("openai_duration_seconds_sum", status="2xx") == 2.5
    assert scraped.total("queue_duration_seconds_count") == 1
    assert scraped.total("requests_total") == scraped.total("requests_outcome_total") == 1
    assert scraped.total("requests_evicted_total") == scraped.total("requests_rejected_total") == 0


def test_a_request_that_waits_and_starts() -> None:
    scraped, request = Scraped(), scheduled(5)
    scraped.tell(Queued(request, 1.0))
    assert scraped("queue_size") == 1
    assert scraped.above_zero("queue_size_by_priority", "priority_level") == {"very_low": 1}
    assert scraped("available_permits") == PERMITS
    assert scraped.total("queue_duration_seconds_count") == 0
    scraped.tell(Started(request, 5.0, 4.0, was_queued=True))
    assert scraped("queue_size") == scraped.total("queue_size_by_priority") == 0
    assert scraped("available_permits") == PERMITS - 1
    assert scraped("queue_duration_seconds_sum", priority_level="very_low") == 4.0
    scraped.tell(Ended(request, 6.0, errors.CANCELLED, 4.0, started=True, progress=Progress()))
    assert scraped("available_permits") == PERMITS
    assert scraped.total("queue_duration_seconds_count") == 1
    assert scraped.total("openai_duration_seconds_count") == 0


@pytest.mark.parametrize(
    ("ending", "status", "outcome", "evicted"),
    [
        (errors.EVICTED, "evicted", "evicted", 1),
        (errors.QUEUE_TIMEOUT, "timeout", "timeout", 0),
        (errors.DEADLINE_EXCEEDED, "timeout", "timeout", 0),
        (errors.CANCELLED, "cancelled", "cancelled", 0),
    ],
    ids=lambda value: value.code if isinstance(value, Ending) else None,
)
def test_a_request_that_leaves_the_queue_without_a_slot(
    ending: Ending, status: str, outcome: str, evicted: int
) -> None:
    request = scheduled(25)
    scraped = Scraped().tell(Queued(request, 1.0), Ended(request, 8.0, ending, 7.0, started=False))
    assert scraped("queue_size") == scraped.total("queue_size_by_priority") == 0
    assert scraped("available_permits") == PERMITS
    assert scraped.above_zero("queue_duration_seconds_count", "priority_level") == {"low": 1}
    assert scraped("queue_duration_seconds_sum", priority_level="low") == 7.0
    assert scraped("requests_total", priority_level="low", status=status) == 1
    assert scraped.above_zero("requests_outcome_total", "outcome") == {outcome: 1}
    assert scraped("request_duration_seconds_sum", priority_level="low", status=status) == 8.0
    assert scraped("requests_evicted_total", evicted_priority="low") == evicted
    assert scraped.total("requests_evicted_total") == evicted
    assert scraped.total("requests_rejected_total") == scraped.total("openai_duration_seconds_count") == 0


@pytest.mark.parametrize("ending", [errors.QUEUE_FULL, errors.SHUTTING_DOWN], ids=lambda ending: ending.code)
def test_a_rejected_request_has_not_waited(ending: Ending) -> None:
    scraped = Scraped().tell(ended_at_once(ending, 65))
    assert scraped("requests_total", priority_level="high", status="rejected") == 1
    assert scraped.above_zero("requests_outcome_total", "outcome") == {"rejected": 1}
    assert scraped.above_zero("requests_rejected_total", "priority_level") == {"high": 1}
    assert scraped.total("queue_duration_seconds_count") == 0
    assert (scraped("queue_size"), scraped("available_permits")) == (0, PERMITS)
    assert scraped.total("requests_evicted_total") == 0


def test_a_deadline_that_had_passed_before_it_asked_for_a_slot_is_no_wait() -> None:
    scraped = Scraped().tell(ended_at_once(errors.DEADLINE_EXCEEDED, at=2.0))
    assert scraped("requests_total", priority_level="normal", status="timeout") == 1
    assert scraped.total("queue_duration_seconds_count") == scraped.total("requests_rejected_total") == 0
    assert scraped("request_duration_seconds_sum", priority_level="normal", status="timeout") == 2.0


SCHEDULED_ENDINGS = [ending for ending in ENDINGS if ending.status is not None]


@pytest.mark.parametrize("priority", [0, 20, 40, 60, 100])
@pytest.mark.parametrize("ending", SCHEDULED_ENDINGS, ids=lambda ending: ending.code)
def test_every_end_is_counted_once_by_status_and_once_by_outcome(ending: Ending, priority: int) -> None:
    scraped = Scraped().tell(ended_at_once(ending, priority))
    assert scraped.above_zero("requests_total", "status") == {str(ending.status): 1}
    assert scraped.above_zero("requests_total", "priority_level") == {scheduled(priority).priority_level: 1}
    assert scraped.above_zero("requests_outcome_total", "outcome") == {str(ending.outcome): 1}
    assert scraped.above_zero("request_duration_seconds_count", "status") == {str(ending.status): 1}


# ---------------------------------------------------------------------------------------------------------------------
# The upstream's part
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("http_status", "is_whole", "counted_as"),
    [
        *((status, True, "2xx") for status in (200, 201, 204, 299)),
        *((status, True, "3xx") for status in (300, 301, 304, 399)),
        *((status, True, "4xx") for status in (400, 401, 404, 428, 430, 499)),
        (429, True, "429"),
        *((status, True, "5xx") for status in (500, 502, 503, 504, 529, 599)),
        *((status, False, "error") for status in (None, 200, 429, 500)),
    ],
)
def test_the_upstreams_time_is_observed_by_how_it_answered(
    http_status: int | None, is_whole: bool, counted_as: str
) -> None:
    progress = Progress(upstream_status=http_status, upstream_seconds=2.5, upstream_whole=is_whole)
    scraped = Scraped().tell(*served(progress))
    assert scraped.above_zero("openai_duration_seconds_count", "status") == {counted_as: 1}
    assert scraped("openai_duration_seconds_sum", status=counted_as) == 2.5


@pytest.mark.parametrize("progress", [None, Progress(), Progress(http_status=504)])
def test_where_nothing_was_sent_there_is_no_upstreams_time(progress: Progress | None) -> None:
    request = scheduled()
    scraped = Scraped().tell(
        Started(request, 0.0, 0.0, was_queued=False),
        Ended(request, 3.0, errors.DEADLINE_EXCEEDED, 0.0, started=True, progress=progress),
    )
    assert scraped.total("openai_duration_seconds_count") == 0


@pytest.mark.parametrize("http_status", [600, 999])
def test_a_status_that_http_does_not_know_is_counted_too(http_status: int) -> None:
    """HTTP clients take any three digits from 200 on, and RFC 9110 section 15 says to treat them as 5xx."""
    progress = Progress(http_status=http_status, upstream_status=http_status, upstream_seconds=2.5, upstream_whole=True)
    ending = errors.of_upstream_status(http_status)
    scraped = Scraped().tell(*served(progress, ending), PassedThrough(facts(), 1.0, ending, progress))
    assert scraped.total("requests_total") == 1
    assert scraped.total("openai_duration_seconds_count") == 1
    assert scraped.total("passthrough_requests_total") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is not scheduled
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "http_status", "is_whole", "counted_as"),
    [
        (errors.COMPLETED, 200, True, "2xx"),
        (errors.COMPLETED, 304, True, "3xx"),
        (errors.COMPLETED, 404, True, "4xx"),
        (errors.UPSTREAM_REFUSED, 429, True, "4xx"),
        (errors.UPSTREAM_REFUSED, 500, True, "5xx"),
        (errors.SHUTTING_DOWN, 503, False, "5xx"),
        (errors.UPSTREAM_UNREACHABLE, 502, False, "error"),
        (errors.UPSTREAM_TIMEOUT, 504, False, "error"),
        (errors.UPSTREAM_BROKE_OFF, 200, False, "error"),
        (errors.CANCELLED, 200, False, "error"),
        (errors.CANCELLED, None, False, "error"),
        (errors.INTERNAL_ERROR, 500, False, "error"),
    ],
)
def test_passed_through_requests_have_a_counter_of_their_own(
    ending: Ending, http_status: int | None, is_whole: bool, counted_as: str
) -> None:
    progress = Progress(http_status=http_status, upstream_status=http_status, upstream_whole=is_whole)
    scraped = Scraped().tell(PassedThrough(facts(), 1.0, ending, progress))
    assert scraped.above_zero("passthrough_requests_total", "http_status") == {counted_as: 1}
    assert scraped.total("requests_total") == scraped.total("requests_outcome_total") == 0
    assert scraped.total("request_duration_seconds_count") == scraped.total("openai_duration_seconds_count") == 0


@pytest.mark.parametrize("code", REFUSALS)
def test_refusals_before_scheduling_have_a_counter_of_their_own(code: str) -> None:
    (ending,) = (ending for ending in ENDINGS if ending.code == code)
    scraped = Scraped().tell(Refused(facts(), 1.0, ending, "why"), Refused(scheduled(), 1.0, ending, "why"))
    assert scraped.above_zero("refused_total", "code") == {code: 2}
    assert scraped.total("requests_total") == scraped.total("requests_rejected_total") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Who waits longest
# ---------------------------------------------------------------------------------------------------------------------


def test_the_oldest_waiting_ages_until_it_leaves() -> None:
    scraped, first, second = Scraped(), scheduled(5), scheduled(85)

    def oldest_at(now: float) -> float:
        scraped.now = now
        return scraped("queue_oldest_seconds")

    assert oldest_at(10.0) == 0
    scraped.tell(Queued(first, 10.0), Queued(second, 12.0))
    assert (oldest_at(10.0), oldest_at(15.0)) == (0.0, 5.0)
    scraped.tell(Started(first, 15.0, 5.0, was_queued=True))
    assert oldest_at(16.0) == 4.0
    scraped.tell(Ended(second, 16.0, errors.CANCELLED, 4.0, started=False))
    assert oldest_at(17.0) == 0


def test_the_oldest_is_not_the_first_to_be_served() -> None:
    scraped, patient, urgent = Scraped(), scheduled(5), scheduled(85)
    scraped.tell(Queued(patient, 0.0), Queued(urgent, 3.0), Started(urgent, 4.0, 1.0, was_queued=True))
    scraped.now = 9.0
    assert scraped("queue_oldest_seconds") == 9.0


# ---------------------------------------------------------------------------------------------------------------------
# Where the time went
# ---------------------------------------------------------------------------------------------------------------------


def test_the_first_byte_counts_from_arrival() -> None:
    scraped, request = Scraped(), scheduled(65, arrived=100.0)
    progress = Progress(upstream_status=200, upstream_seconds=5.0, upstream_whole=True, first_byte_at=104.0)
    scraped.tell(Ended(request, 107.0, errors.COMPLETED, 1.5, started=True, progress=progress))
    assert scraped.above_zero("time_to_first_byte_seconds_count", "priority_level") == {"high": 1}
    assert scraped("time_to_first_byte_seconds_sum", priority_level="high") == 4.0


def test_the_overhead_is_what_neither_queue_nor_upstream_took() -> None:
    scraped, request = Scraped(), scheduled(arrived=100.0)
    progress = Progress(upstream_status=200, upstream_seconds=5.0, upstream_whole=True)
    scraped.tell(Ended(request, 107.0, errors.COMPLETED, 1.5, started=True, progress=progress))
    assert (scraped("overhead_seconds_count"), scraped("overhead_seconds_sum")) == (1, 0.5)


@pytest.mark.parametrize("progress", [None, Progress()], ids=["never started", "nothing sent"])
def test_what_never_reached_the_upstream_has_neither_a_first_byte_nor_an_overhead(progress: Progress | None) -> None:
    request = scheduled()
    scraped = Scraped().tell(Started(request, 0.0, 0.0, was_queued=False))
    scraped.tell(Ended(request, 1.0, errors.CANCELLED, 0.0, started=True, progress=progress))
    assert scraped.total("time_to_first_byte_seconds_count") == scraped.total("overhead_seconds_count") == 0


# ---------------------------------------------------------------------------------------------------------------------
# Capacity
# ---------------------------------------------------------------------------------------------------------------------


def test_the_queues_capacity_is_shown_and_follows() -> None:
    scraped = Scraped()
    assert (scraped("max_queue"), scraped("queue_timeout_seconds")) == (MAX_QUEUE, QUEUE_TIMEOUT)
    scraped.tell(CapacityChanged("default", 1.0, PERMITS, 7))
    assert scraped("max_queue") == 7


def test_what_runs_says_its_version() -> None:
    assert scraped_build() == {"version": __version__, "python_version": platform.python_version()}


def scraped_build() -> dict[str, str]:
    (family,) = Scraped().metrics.registry.restricted_registry(["openai_proxy_build_info"]).collect()
    (sample,) = family.samples
    assert sample.value == 1
    return sample.labels


def test_the_gauges_follow_a_limit_that_is_raised_lowered_and_drained() -> None:
    scraped = Scraped(2)
    first, second = scheduled(), scheduled()
    for request in (first, second):
        scraped.tell(Started(request, 0.0, 0.0, was_queued=False))

    def gauges() -> tuple[float, float]:
        return scraped("permits"), scraped("available_permits")

    assert gauges() == (2, 0)
    scraped.tell(CapacityChanged("default", 1.0, 5, 100))
    assert gauges() == (5, 3)
    scraped.tell(CapacityChanged("default", 2.0, 1, 100))
    assert gauges() == (1, 0)
    scraped.tell(Ended(first, 3.0, errors.COMPLETED, 0.0, started=True))
    assert gauges() == (1, 0)
    scraped.tell(Ended(second, 4.0, errors.COMPLETED, 0.0, started=True))
    assert gauges() == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Any course of events
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Books:
    """A second book-keeping: what a scraper has to find, kept in the simplest way."""

    permits: int = 3
    events: list[Event] = field(default_factory=list)
    queued: list[ScheduledRequest] = field(default_factory=list)
    running: list[ScheduledRequest] = field(default_factory=list)
    received: int = 0
    waits: int = 0
    ended: int = 0

    def arrive(self, priority: int) -> None:
        request = scheduled(priority)
        self.received += 1
        if len(self.running) < self.permits:
            self._start(request, was_queued=False)
        elif len(self.queued) < 3:
            self.queued.append(request)
            self.events.append(Queued(request, 1.0))
        else:
            self.ended += 1
            self.events.append(ended_at_once(errors.QUEUE_FULL, priority))

    def finish(self, which: int) -> None:
        if self.running:
            request = self.running.pop(which % len(self.running))
            self.ended += 1
            self.events.append(Ended(request, 1.0, errors.COMPLETED, 0.0, started=True, progress=Progress()))
        if self.queued and len(self.running) < self.permits:
            self._start(self.queued.pop(0), was_queued=True)

    def give_up(self, which: int) -> None:
        if self.queued:
            request = self.queued.pop(which % len(self.queued))
            self.ended += 1
            self.waits += 1
            ending = (errors.EVICTED, errors.QUEUE_TIMEOUT, errors.CANCELLED)[which % 3]
            self.events.append(Ended(request, 1.0, ending, 1.0, started=False))

    def resize(self, permits: int) -> None:
        self.permits = 1 + permits % 5
        self.events.append(CapacityChanged("default", 1.0, self.permits, 3))

    def _start(self, request: ScheduledRequest, *, was_queued: bool) -> None:
        self.running.append(request)
        self.waits += 1
        self.events.append(Started(request, 1.0, 1.0, was_queued))


STEPS: list[Callable[[Books, int], None]] = [Books.arrive, Books.arrive, Books.finish, Books.give_up, Books.resize]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 100)), max_size=60))
@settings(deadline=None, max_examples=60)
def test_the_books_balance_at_every_instant(course: list[tuple[Callable[[Books, int], None], int]]) -> None:
    books, scraped = Books(), Scraped(3)
    for step, number in course:
        before = len(books.events)
        step(books, number)
        scraped.tell(*books.events[before:])
    assert scraped("queue_size") == scraped.total("queue_size_by_priority") == len(books.queued)
    for level in LEVELS:
        waiting = [request for request in books.queued if request.priority_level == level]
        assert scraped("queue_size_by_priority", priority_level=level) == len(waiting)
    assert scraped("permits") == books.permits
    assert scraped("available_permits") == max(books.permits - len(books.running), 0)
    assert scraped.total("requests_total") == scraped.total("requests_outcome_total") == books.ended
    assert scraped.total("request_duration_seconds_count") == books.ended
    assert scraped.total("queue_duration_seconds_count") == books.waits
    assert books.received == scraped.total("requests_total") + scraped("queue_size") + len(books.running)


def test_lost_log_lines_are_counted() -> None:
    lost = 0
    metrics = Metrics(1, MAX_QUEUE, QUEUE_TIMEOUT, clock=lambda: 0.0, dropped_lines=lambda: lost)
    assert metrics.registry.get_sample_value("openai_proxy_log_lines_dropped_total") == 0
    lost = 3
    assert metrics.registry.get_sample_value("openai_proxy_log_lines_dropped_total") == 3


def test_each_client_key_has_series_of_its_own_up_to_a_limit() -> None:
    scraped = Scraped()
    names = [f"key{number}" for number in range(KEYS_MAX + 2)]
    scraped.metrics.name_keys(names)
    first, last = (scheduled(key=name) for name in (names[0], names[-1]))
    for request in (first, last):
        scraped.tell(Queued(request, 0.0))
    assert scraped("key_queue_size", key=names[0]) == scraped("key_queue_size", key=OTHER_KEYS) == 1
    for request in (first, last):
        scraped.tell(Started(request, 1.0, 1.0, was_queued=True))
    for name in (names[0], OTHER_KEYS):
        assert (scraped("key_queue_size", key=name), scraped("key_running", key=name)) == (0, 1)
    for request in (first, last):
        scraped.tell(Ended(request, 2.0, errors.COMPLETED, 1.0, started=True))
    for name in (names[0], OTHER_KEYS):
        assert scraped("key_running", key=name) == 0
        assert scraped("key_requests_total", key=name, status="completed") == 1
    assert scraped("key_requests_total", key=names[KEYS_MAX - 1], status="completed") == 0
    labels = {"pool": "default", "key": names[KEYS_MAX], "status": "completed"}
    assert scraped.metrics.registry.get_sample_value("openai_proxy_key_requests_total", labels) is None


def test_a_request_without_a_key_or_turned_away_leaves_the_keys_gauges_alone() -> None:
    scraped = Scraped()
    scraped.metrics.name_keys(["web"])
    scraped.tell(Queued(scheduled(), 0.0))
    waits, refused = scheduled(key="web"), scheduled(key="web")
    scraped.tell(Queued(waits, 0.0), Ended(refused, 0.0, errors.QUEUE_FULL, None, started=False))
    assert (scraped("key_queue_size", key="web"), scraped("key_running", key="web")) == (1, 0)
    scraped.tell(Ended(waits, 1.0, errors.EVICTED, 1.0, started=False))
    assert (scraped("key_queue_size", key="web"), scraped("key_running", key="web")) == (0, 0)
    assert scraped("key_requests_total", key="web", status="evicted") == 1
