"""Events → Prometheus metrics. The one place where metric names stand; knows nothing of who publishes events.

Children of labelled metrics are looked up once and kept, and every known set of labels exists at 0 from the start, so
that `increase()` sees the first event.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client import disable_created_metrics as _disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from trioproxy import __version__, errors, priority
from trioproxy.errors import Outcome, Status
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
    WebSocketClosed,
    WebSocketOpening,
    WebSocketOutcome,
)

# Series of their own for the time of creation double every counter and tell Prometheus nothing that it needs.
_disable_created_metrics()  # type: ignore[no-untyped-call]

WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Seconds: from a slot that was free to the longest wait that anybody configures."""

UPSTREAM_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200)
"""Seconds: from an embedding to a long generation."""

TOTAL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200)
"""Seconds: waiting and upstream together."""

FIRST_BYTE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
"""Seconds: from a cached answer to the first token after a long wait."""

OVERHEAD_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
"""Seconds: from what the proxy needs to what a slow sender or a busy machine makes of it."""

UPSTREAM_STATUSES = ("2xx", "3xx", "4xx", "429", "5xx", "error")
PASSED_THROUGH_STATUSES = ("2xx", "3xx", "4xx", "5xx", "error")


KEYS_MAX = 100
"""Client keys that have series of their own; all others share one set, so that a scrape stays small."""

OTHER_KEYS = "(other)"


def _status_class(http_status: int | None) -> str:
    # From 600 on they mean nothing, and are to be treated as 500 (RFC 9110 section 15).
    return "error" if http_status is None else f"{min(http_status // 100, 5)}xx"


def _upstream_status(progress: Progress) -> str:
    if not progress.upstream_whole:
        return "error"
    return "429" if progress.upstream_status == 429 else _status_class(progress.upstream_status)


def _passed_through_status(event: PassedThrough) -> str:
    if event.progress.upstream_whole or event.ending is errors.SHUTTING_DOWN:
        return _status_class(event.progress.http_status)
    return "error"


class _DroppedLines(Collector):
    """The log's own count, read when somebody scrapes."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterable[CounterMetricFamily]:
        yield CounterMetricFamily(
            "openai_proxy_log_lines_dropped",
            "Log lines lost, because the disk or the reader of standard output was too slow, full or gone.",
            value=self._count(),
        )


class _KeySeries(NamedTuple):
    """The series of one client key."""

    requests: dict[Status, Counter]
    running: Gauge
    queue_size: Gauge


class Metrics:
    """A listener that counts. One registry of its own, so that several can live in one process.

    `permits`, `max_queue` and `queue_timeout` (seconds) are the pool's capacity at the start; `clock` is the one that
    events are timed by; `dropped_lines` tells how many log lines have been lost.
    """

    def __init__(
        self,
        permits: int,
        max_queue: int,
        queue_timeout: float,
        *,
        clock: Callable[[], float],
        pool: str = "default",
        dropped_lines: Callable[[], int] = int,
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_DroppedLines(dropped_lines))
        self._pool = pool
        self._clock = clock
        self._waiting: dict[ScheduledRequest, float] = {}  # since when, longest first
        self._define_build()
        self._define_gauges(permits)
        self._define_queue_gauges(max_queue, queue_timeout)
        self._define_counters()
        self._define_counters_beside()
        self._define_keys()
        self._define_histograms()
        self._handlers: dict[type[Event], Callable[..., None]] = {
            Queued: self._queued,
            Started: self._started,
            Ended: self._ended,
            CapacityChanged: self._capacity_changed,
            PassedThrough: self._passed_through,
            Refused: self._refused,
            WebSocketOpening: self._websocket_opening,
            WebSocketClosed: self._websocket_closed,
        }

    def __call__(self, event: Event) -> None:
        """Count one event."""
        self._handlers[type(event)](event)

    def listener_failed(self) -> None:
        """A listener raised an exception."""
        self._listener_failures.inc()

    def violations(self, running: int, queued: int) -> Iterator[str]:
        """How the gauges, which are folded from events, differ from the scheduler's own numbers, in words."""
        if self._in_use != running:
            yield f"the metrics count {self._in_use} slots in use, the scheduler {running}"
        if len(self._waiting) != queued:
            yield f"the metrics count {len(self._waiting)} queued requests, the scheduler {queued}"

    def invariant_violated(self) -> None:
        """Something does not hold although it always must."""
        self._invariant_violations.inc()

    def name_keys(self, names: Iterable[str]) -> None:
        """Give each of these client keys series of its own, from 0 on; who has some keeps them."""
        for name in names:
            if len(self._keys) < KEYS_MAX and name not in self._keys:
                self._keys[name] = self._key_series(name)

    def queue_timeout_changed(self, seconds: float) -> None:
        """Requests may wait for so long from now on."""
        self._queue_timeout.set(seconds)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """All series in the format that the scraper's header `Accept` asks for, and its content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def _define_build(self) -> None:
        build = Info("openai_proxy_build", "What runs: a change marks an update or a rollback.", registry=self.registry)
        build.info({"version": __version__, "python_version": platform.python_version()})

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"openai_proxy_{name}", help_text, ["pool", *labels], registry=self.registry)

    def _define_gauges(self, permits: int) -> None:
        self._available_permits = self._gauge(
            "available_permits", "Free slots. 0 for long: the upstream is used to the full."
        ).labels(self._pool)
        self._permits = self._gauge("permits", "All slots, as limited just now.").labels(self._pool)
        self._websockets = Gauge(
            "openai_proxy_websockets",
            "WebSocket sessions that are open or being opened now. At server.max_websockets new ones are refused.",
            registry=self.registry,
        )
        self._permits.set(permits)
        self._available_permits.set(permits)
        self._in_use = 0
        self._limit = permits

    def _define_queue_gauges(self, max_queue: int, queue_timeout: float) -> None:
        self._queue_size = self._gauge(
            "queue_size",
            "Requests waiting for a slot now. Near max_queue for long: add capacity, or send less.",
        ).labels(self._pool)
        by_priority = self._gauge(
            "queue_size_by_priority", "Requests waiting for a slot now, by level of priority.", "priority_level"
        )
        self._queue_size_by_priority = {level: by_priority.labels(self._pool, level) for level in priority.LEVELS}
        oldest = self._gauge(
            "queue_oldest_seconds",
            "For how long the oldest waiting request has waited; 0 if none waits. Near queue_timeout_seconds while the "
            "queue moves: the least urgent are starved.",
        )
        oldest.labels(self._pool).set_function(self._oldest_seconds)
        self._max_queue = self._gauge(
            "max_queue", "How many requests may wait. A full queue evicts the least urgent, or rejects."
        ).labels(self._pool)
        self._max_queue.set(max_queue)
        timeout = self._gauge("queue_timeout_seconds", "How long a request may wait before it is turned away.")
        self._queue_timeout = timeout.labels(self._pool)
        self._queue_timeout.set(queue_timeout)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"openai_proxy_{name}", help_text, labels, registry=self.registry)

    def _define_counters(self) -> None:
        requests = self._counter(
            "requests", "Scheduled requests that have ended, by how.", "pool", "priority_level", "status"
        )
        self._requests = {
            (level, status): requests.labels(self._pool, level, status)
            for level in priority.LEVELS
            for status in Status
        }
        outcomes = self._counter(
            "requests_outcome",
            "Scheduled requests that have ended, by who or what decided it. upstream_error: look at the upstream; "
            "proxy_error: a bug of the proxy, with a traceback in its log.",
            "pool",
            "outcome",
        )
        self._outcomes = {outcome: outcomes.labels(self._pool, outcome) for outcome in Outcome}
        evicted = self._counter(
            "requests_evicted",
            "Queued requests that had to give their place to a more urgent one, by their own level.",
            "pool",
            "evicted_priority",
        )
        self._evicted = {level: evicted.labels(self._pool, level) for level in priority.LEVELS}
        rejected = self._counter(
            "requests_rejected",
            "Requests turned away because the queue, or what a client key may have of it, was full.",
            "pool",
            "priority_level",
        )
        self._rejected = {level: rejected.labels(self._pool, level) for level in priority.LEVELS}

    def _define_counters_beside(self) -> None:
        passed_through = self._counter(
            "passthrough_requests", "Requests that need no slot, by class of the answer's status.", "http_status"
        )
        self._passed = {status: passed_through.labels(status) for status in PASSED_THROUGH_STATUSES}
        websockets = self._counter(
            "websocket_sessions",
            "WebSocket handshakes under /v1/ and what came of them, by what ended the session. upstream_error: look at "
            "the upstream; rejected: too many at once, or shutting down; proxy_error: a bug of the proxy, see its log.",
            "outcome",
        )
        self._websocket_sessions = {outcome: websockets.labels(outcome) for outcome in WebSocketOutcome}
        self._invariant_violations = self._counter(
            "invariant_violations",
            "Self-checks that failed: slots, queue, tasks and metrics did not agree. Must stay 0; the log says what.",
        )
        self._listener_failures = self._counter(
            "listener_failures", "Events that a metric, the log or another listener failed on: a bug. See the log."
        )
        refused = self._counter(
            "refused", "Requests turned away before scheduling: malformed, too large, or not allowed.", "code"
        )
        self._refusals = {
            ending.code: refused.labels(ending.code)
            for ending in errors.ENDINGS
            if ending.http_status is not None and ending.status is None
        }

    def _define_keys(self) -> None:
        self._keys: dict[str, _KeySeries] = {}
        self._other_keys: _KeySeries | None = None
        self._key_requests = self._counter(
            "key_requests",
            "Scheduled requests that have ended, by client key and how: who uses the upstream, whose are turned away.",
            "pool",
            "key",
            "status",
        )
        self._key_running = self._gauge("key_running", "Slots that requests of a client key hold now.", "key")
        self._key_queue_size = self._gauge("key_queue_size", "Requests of a client key waiting for a slot now.", "key")

    def _key_series(self, name: str) -> _KeySeries:
        return _KeySeries(
            {status: self._key_requests.labels(self._pool, name, status) for status in Status},
            self._key_running.labels(self._pool, name),
            self._key_queue_size.labels(self._pool, name),
        )

    def _of_key(self, request: ScheduledRequest) -> _KeySeries | None:
        """The series of the client key that a request came with, if it came with one."""
        if request.key is None:
            return None
        if (series := self._keys.get(request.key)) is not None:
            return series
        if self._other_keys is None:
            self._other_keys = self._key_series(OTHER_KEYS)
        return self._other_keys

    def _define_histograms(self) -> None:
        def histogram(name: str, help_text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(
                f"openai_proxy_{name}_seconds", help_text, ["pool", *labels], registry=self.registry, buckets=buckets
            )

        waits = histogram(
            "queue_duration",
            "Seconds between asking for a slot and leaving the queue, however it was left; 0 if a slot was free.",
            WAIT_BUCKETS,
            "priority_level",
        )
        self._waits = {level: waits.labels(self._pool, level) for level in priority.LEVELS}
        upstream = histogram(
            "openai_duration",
            "Seconds from sending a request upstream to the last byte of the answer, or to the failure.",
            UPSTREAM_BUCKETS,
            "status",
        )
        self._upstream = {status: upstream.labels(self._pool, status) for status in UPSTREAM_STATUSES}
        totals = histogram(
            "request_duration",
            "Seconds from a scheduled request's arrival to its end.",
            TOTAL_BUCKETS,
            "priority_level",
            "status",
        )
        self._totals = {
            (level, status): totals.labels(self._pool, level, status) for level in priority.LEVELS for status in Status
        }
        first_bytes = histogram(
            "time_to_first_byte",
            "Seconds from a scheduled request's arrival until the upstream's answer began to reach the client: what "
            "somebody who watches a streamed answer waits for. Long although the queue is short: look at the upstream.",
            FIRST_BYTE_BUCKETS,
            "priority_level",
        )
        self._first_bytes = {level: first_bytes.labels(self._pool, level) for level in priority.LEVELS}
        self._overhead = histogram(
            "overhead",
            "Seconds of a scheduled request that neither waiting nor the upstream took: reading it, deciding, "
            "answering. Growing: the process or the machine is busy, or clients send their requests slowly.",
            OVERHEAD_BUCKETS,
        ).labels(self._pool)

    def _oldest_seconds(self) -> float:
        return max(self._clock() - next(iter(self._waiting.values())), 0.0) if self._waiting else 0.0

    def _queued(self, event: Queued) -> None:
        self._waiting[event.request] = event.at
        self._queue_size.set(len(self._waiting))
        self._queue_size_by_priority[event.request.priority_level].inc()
        if (key := self._of_key(event.request)) is not None:
            key.queue_size.inc()

    def _started(self, event: Started) -> None:
        if event.was_queued:
            self._leave_queue(event.request)
        self._waits[event.request.priority_level].observe(event.queue_seconds)
        self._use_slots(+1)
        if (key := self._of_key(event.request)) is not None:
            key.running.inc()

    def _leave_queue(self, request: ScheduledRequest) -> None:
        del self._waiting[request]
        self._queue_size.set(len(self._waiting))
        self._queue_size_by_priority[request.priority_level].dec()
        if (key := self._of_key(request)) is not None:
            key.queue_size.dec()

    def _use_slots(self, change: int) -> None:
        self._in_use += change
        self._available_permits.set(max(self._limit - self._in_use, 0))

    def _ended(self, event: Ended) -> None:
        level = event.request.priority_level
        status, outcome = event.ending.status, event.ending.outcome
        assert status is not None
        assert outcome is not None
        self._requests[level, status].inc()
        self._outcomes[outcome].inc()
        self._totals[level, status].observe(event.total_seconds)
        if (key := self._of_key(event.request)) is not None:
            key.requests[status].inc()
            key.running.dec(event.started)
        if event.started:
            self._use_slots(-1)
        elif event.queue_seconds is not None:
            self._leave_queue(event.request)
            self._waits[level].observe(event.queue_seconds)
        if event.ending is errors.EVICTED:
            self._evicted[level].inc()
        elif status is Status.REJECTED:
            self._rejected[level].inc()
        if event.progress is not None and event.progress.upstream_seconds is not None:
            self._upstream[_upstream_status(event.progress)].observe(event.progress.upstream_seconds)
        if event.time_to_first_byte_seconds is not None:
            self._first_bytes[level].observe(event.time_to_first_byte_seconds)
        if event.overhead_seconds is not None:
            self._overhead.observe(event.overhead_seconds)

    def _capacity_changed(self, event: CapacityChanged) -> None:
        self._limit = event.permits
        self._permits.set(event.permits)
        self._max_queue.set(event.max_queue)
        self._use_slots(0)

    def _passed_through(self, event: PassedThrough) -> None:
        self._passed[_passed_through_status(event)].inc()

    def _refused(self, event: Refused) -> None:
        self._refusals[event.ending.code].inc()

    def _websocket_opening(self, _: WebSocketOpening) -> None:
        self._websockets.inc()

    def _websocket_closed(self, event: WebSocketClosed) -> None:
        self._websocket_sessions[event.progress.outcome].inc()
        if event.opened:
            self._websockets.dec()
