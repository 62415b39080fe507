"""Small faults, put into the proxy on purpose: each must be caught by an ordinary test, or a test is missing.

Run as `nox -s mutants`, or by hand: `python tests/mutants/mutants.py [--jobs 2] [--only TEXT]`. For each mutant the
package is copied, the one fault put into the copy, and the tests named in the table are run with the copy until the
first one fails. That a snippet still fits the source is checked with every test run (`test_mutants_table.py`).

A mutant that hangs is killed when its time is up and counts as caught, since a run of the tests would not pass either.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = ROOT / "src" / "trioproxy"

SECONDS_MAX: Final = 60.0
"""How long the tests may take with a mutant; with none they take a few seconds at most."""

CORE: Final = ("scheduler/test_core.py",)
QUEUE: Final = ("scheduler/test_queue.py",)
LIMITS: Final = ("scheduler/test_limits.py",)
RUNTIME: Final = ("scheduler/test_runtime.py",)
EVENTS: Final = ("test_events.py",)
METRICS: Final = ("observe/test_metrics.py",)
RELAY: Final = ("test_relay.py",)
REQUEST: Final = ("test_request.py",)
KEYS: Final = ("test_keys.py",)
RELOAD: Final = ("test_reload.py",)
SHARES: Final = ("scheduler/test_shares.py",)
GUARD: Final = ("test_guard.py",)
HTTP1: Final = ("test_http1.py",)
SERVER: Final = ("test_server.py",)
TLS: Final = ("test_tls.py",)
WEBSOCKET: Final = ("test_websocket.py",)
WEBSOCKET_CUTS: Final = ("test_websocket_cuts.py",)
FRAMING: Final = ("conformance/test_framing.py",)
FAILING: Final = ("conformance/test_failing_upstream.py",)
MAILBOX: Final = ("test_mailbox.py",)
PLAIN: Final = ("test_http1_server.py",)
FLAG: Final = ("test_flag.py",)
LOGS: Final = ("observe/test_logs.py",)
SOCKETS: Final = ("test_sockets.py",)
LEAVING: Final = ("conformance/test_leaving.py",)
STREAMING: Final = ("conformance/test_streaming.py",)
HTTP2: Final = ("conformance/test_http2_wire.py",)
MEETINGS: Final = ("conformance/test_meetings.py",)


class Mutant(NamedTuple):
    """One fault."""

    name: str
    """What it does wrong."""
    file: str
    """Where, under `src/trioproxy`."""
    snippet: str
    """What stands there, exactly once in the file."""
    replacement: str
    tests: tuple[str, ...]
    """The files under `tests` that are to catch it."""

    def apply(self, source: str) -> str:
        """The file's source with the fault in it. ValueError if it does not fit any more."""
        if (count := source.count(self.snippet)) != 1:
            raise ValueError(f"{self.name!r} is stale: its snippet occurs {count} times in {self.file}, not once")
        return source.replace(self.snippet, self.replacement)


MUTANTS: Final = (
    # -- What the core decides --
    Mutant(
        "capacity off by one: one more is started than there are slots",
        "scheduler/core.py",
        "if self._has_free_slot and share.may_start:",
        "if len(self._running) <= self._limit.permits and share.may_start:",
        CORE,
    ),
    Mutant(
        "a slot that comes free while a lowered limit drains is given on",
        "scheduler/core.py",
        "while self._has_free_slot and (",
        "while len(self._running) <= self._limit.permits and (",
        CORE,
    ),
    Mutant(
        "the slot is not released when a request finishes",
        "scheduler/core.py",
        "= self._running.pop(request)",
        "= self._running[request]",
        CORE,
    ),
    Mutant(
        "nobody is started when a request finishes",
        "scheduler/core.py",
        "progress=progress), *self._start_waiting(now)]",
        "progress=progress)]",
        CORE,
    ),
    Mutant(
        "nobody is started when the limit is raised",
        "scheduler/core.py",
        "self._max_queue), *self._start_waiting(now)]",
        "self._max_queue)]",
        CORE,
    ),
    Mutant(
        "only one is started when the limit is raised by several",
        "scheduler/core.py",
        "while self._has_free_slot and (",
        "if self._has_free_slot and (",
        CORE,
    ),
    Mutant(
        "one more is queued than there are places",
        "scheduler/core.py",
        "return len(self._queue) < self._max_queue and",
        "return len(self._queue) <= self._max_queue and",
        CORE,
    ),
    Mutant(
        "a newcomer evicts its equal",
        "scheduler/core.py",
        "self._queue.lowest_priority() < request.priority:",
        "self._queue.lowest_priority() <= request.priority:",
        CORE,
    ),
    Mutant(
        "max_queue 0 does not mean that there is no queue",
        "scheduler/core.py",
        "if self._max_queue and self._queue",
        "if self._queue and self._queue",
        CORE,
    ),
    Mutant(
        "the evicted one's end is not told",
        "scheduler/core.py",
        "return [*events, Queued(request, now)]",
        "return [Queued(request, now)]",
        CORE,
    ),
    Mutant(
        "a newcomer whose deadline is now is taken",
        "scheduler/core.py",
        "if request.deadline <= now:",
        "if request.deadline < now:",
        CORE,
    ),
    Mutant(
        "who leaves the queue keeps its place",
        "scheduler/core.py",
        """since = self._queue.leave(request)
        return""",
        """since = dict(self._queue)[request]
        return""",
        CORE,
    ),
    Mutant(
        "newcomers are taken while shutting down",
        "scheduler/core.py",
        "self._accepting = False",
        "self._accepting = True",
        CORE,
    ),
    Mutant(
        "the rate of releases is never measured",
        "scheduler/core.py",
        "self._rate.released(now - started_at)",
        "pass",
        CORE,
    ),
    Mutant(
        "retry-after does not count the newcomer itself",
        "scheduler/core.py",
        "max(self._seconds_until(len(self._queue) + 1, now),",
        "max(self._seconds_until(len(self._queue), now),",
        CORE,
    ),
    Mutant(
        "everyone refused is told the same time",
        "scheduler/limits.py",
        "self._last = max(self._last + release_seconds, now + wait_seconds)",
        "self._last = now + wait_seconds",
        LIMITS,
    ),
    # -- Client keys --
    Mutant(
        "a key may have one slot more than its limit",
        "scheduler/queue.py",
        "or self.running < self.limits.max_concurrency",
        "or self.running <= self.limits.max_concurrency",
        SHARES,
    ),
    Mutant(
        "a key may have one place more than its limit",
        "scheduler/queue.py",
        "and len(self.line) >= self.limits.max_queue",
        "and len(self.line) > self.limits.max_queue",
        SHARES,
    ),
    Mutant(
        "a slot given back is not given back to the key",
        "scheduler/core.py",
        "self._queue.share_of(request).running -= 1",
        "pass",
        SHARES,
    ),
    Mutant(
        "who waits for its key's slot holds all others up",
        "scheduler/queue.py",
        "if share.line and share.may_start]",
        "if share.line]",
        QUEUE,
    ),
    Mutant(
        "of two keys the one named first goes first",
        "scheduler/queue.py",
        "(-each[0].priority, each[1].number(each[0]))",
        "-each[0].priority",
        QUEUE,
    ),
    Mutant(
        "a full key's newcomer evicts somebody of another key",
        "scheduler/core.py",
        "return self.leave(share.line.youngest_of_lowest(), now, EVICTED)",
        "return self.leave(self._queue.youngest_of_lowest(), now, EVICTED)",
        SHARES,
    ),
    Mutant(
        "after a reload nobody runs on account of a key",
        "scheduler/core.py",
        "        for request in self._running:\n            self._queue.share_of(request).running += 1\n",
        "",
        SHARES,
    ),
    Mutant(
        "after a reload of the keys nobody is started",
        "scheduler/core.py",
        "        return self._start_waiting(now)\n\n    def close",
        "        return []\n\n    def close",
        SHARES,
    ),
    Mutant(
        "a key is known by its beginning",
        "keys.py",
        "if hmac.compare_digest(known, wanted):",
        "if hmac.compare_digest(known[:0], wanted[:0]):",
        KEYS,
    ),
    Mutant(
        "an expired key is let in",
        "keys.py",
        "and now >= key.expires:",
        "and now < key.expires:",
        KEYS,
    ),
    Mutant(
        "two different keys are let in",
        "keys.py",
        "if len(said) > 1:",
        "if len(said) > 2:",
        KEYS,
    ),
    Mutant(
        "a request that names no model may use any",
        "keys.py",
        'fnmatchcase(model or "", glob)',
        "model is None or fnmatchcase(model, glob)",
        KEYS,
    ),
    Mutant(
        "a client key reaches the upstream by another field",
        "request.py",
        "replaced = _NOT_SENT_WITH_KEY if has_key else _NOT_SENT_WITH_OURS",
        "replaced = _NOT_SENT_WITH_OURS",
        KEYS,
    ),
    Mutant(
        "a key's highest priority is not looked at",
        "request.py",
        "if key is None or said <= key.max_priority:",
        "if key is None or said <= 100:",
        KEYS,
    ),
    Mutant(
        "a derived priority is above the key's highest",
        "request.py",
        "derived if key is None else min(derived, key.max_priority)",
        "derived",
        KEYS,
    ),
    Mutant(
        "a service tier is a priority unasked",
        "request.py",
        "settings.honor_service_tier and fields.service_tier in",
        "fields.service_tier in",
        KEYS,
    ),
    Mutant(
        "who is no client is told so after the upload",
        "app.py",
        "key = self.keys.identify(exchange.head, subprotocols)",
        "key: KeySettings | None = None",
        KEYS,
    ),
    Mutant(
        "a bad file is half committed",
        "reload.py",
        "            except (ConfigError, OSError) as error:\n",
        "            except KeyError as error:\n",
        RELOAD,
    ),
    Mutant(
        "what needs a restart is changed",
        "reload.py",
        "settings = with_values_of(present, staying, wanted)",
        "settings = wanted",
        RELOAD,
    ),
    # -- The waiting line --
    Mutant(
        "tie broken wrongly: last in, first out within a priority",
        "scheduler/queue.py",
        "next(iter(self._by_priority[self._occupied.bit_length() - 1]))",
        "next(reversed(self._by_priority[self._occupied.bit_length() - 1]))",
        QUEUE,
    ),
    Mutant(
        "eviction picks the oldest",
        "scheduler/queue.py",
        "next(reversed(self._by_priority[self.lowest_priority()]))",
        "next(iter(self._by_priority[self.lowest_priority()]))",
        QUEUE,
    ),
    Mutant(
        "eviction picks the most urgent",
        "scheduler/queue.py",
        "(self._occupied & -self._occupied).bit_length() - 1",
        "self._occupied.bit_length() - 1",
        QUEUE,
    ),
    Mutant(
        "an emptied priority still counts as occupied",
        "scheduler/queue.py",
        "self._occupied &= ~(1 << request.priority)",
        "pass",
        QUEUE,
    ),
    # -- Limits and the rate of releases --
    Mutant(
        "the first holding times count as little as later ones",
        "scheduler/limits.py",
        "weight = max(1 / self._seen, self.WEIGHT)",
        "weight = self.WEIGHT",
        LIMITS,
    ),
    Mutant(
        "the rate of releases forgets that there are several slots",
        "scheduler/limits.py",
        "return releases * mean / permits",
        "return releases * mean",
        LIMITS,
    ),
    # -- How trio carries it out --
    Mutant(
        "release forgotten when the slot's block is left by an exception",
        "scheduler/runtime.py",
        """            self.ending = _ending_of(error)
        if self._sch""",
        """            self.ending = _ending_of(error)
            return
        if self._sch""",
        RUNTIME,
    ),
    Mutant(
        "released twice when the slot's block is left by an exception",
        "scheduler/runtime.py",
        """            self.ending = _ending_of(error)
""",
        """            self.ending = _ending_of(error)
            self._scheduler._give_back(self)
""",
        RUNTIME,
    ),
    Mutant(
        "a finished request's successor is not woken",
        "scheduler/runtime.py",
        "self._carry_out(self._core.finish(slot.request,",
        "list(self._core.finish(slot.request,",
        RUNTIME,
    ),
    Mutant(
        "release forgotten when started and cancelled in the same instant",
        "scheduler/runtime.py",
        "self._carry_out(self._core.finish(request, trio.current_time(), errors.CANCELLED, Progress()))",
        "pass",
        RUNTIME,
    ),
    Mutant(
        "nobody is woken when started and cancelled in the same instant",
        "scheduler/runtime.py",
        "self._carry_out(self._core.finish(request, trio.current_time(), errors.CANCELLED, Progress()))",
        "self._core.finish(request, trio.current_time(), errors.CANCELLED, Progress())",
        RUNTIME,
    ),
    Mutant(
        "evicted and cancelled in the same instant leaves the queue twice",
        "scheduler/runtime.py",
        "elif waiter.verdict is None:",
        "else:",
        RUNTIME,
    ),
    Mutant(
        "a cancelled one stays in the queue",
        "scheduler/runtime.py",
        "self._leave(request, errors.CANCELLED)",
        "pass",
        RUNTIME,
    ),
    Mutant(
        "expiry leaves its entry in the queue",
        "scheduler/runtime.py",
        "self._carry_out(self._core.leave(request, trio.current_time(), ending))",
        "self._carry_out([Ended(request, trio.current_time(), ending, 0.0, started=False)])",
        RUNTIME,
    ),
    Mutant(
        "started and timed out in the same instant counts as timed out",
        "scheduler/runtime.py",
        """if isinstance(waiter.verdict, Started):
            return""",
        """if isinstance(waiter.verdict, Started) and not waiter.scope.cancelled_caught:
            return""",
        RUNTIME,
    ),
    Mutant(
        "of several events only the last is told",
        "scheduler/runtime.py",
        "            self._publisher.publish(event)\n",
        "        self._publisher.publish(event)\n",
        RUNTIME,
    ),
    Mutant(
        "who is started out of the queue is not woken",
        "scheduler/runtime.py",
        "self.woken.set()",
        "pass",
        RUNTIME,
    ),
    Mutant(
        "who is evicted is not woken",
        "scheduler/runtime.py",
        "self.scope.cancel(reason=verdict.ending.code)",
        "pass",
        RUNTIME,
    ),
    Mutant(
        "nobody is woken when the limit is raised",
        "scheduler/runtime.py",
        "self._carry_out(events)\n",
        "events.clear()\n",
        RUNTIME,
    ),
    Mutant(
        "those who have left the queue are remembered for ever",
        "scheduler/runtime.py",
        "self._waiters.pop(request, None)",
        "self._waiters.get(request)",
        RUNTIME,
    ),
    Mutant(
        "the queue's timeout counts from arrival",
        "scheduler/runtime.py",
        "times_out = asked + queue_timeout",
        "times_out = request.arrived + queue_timeout",
        RUNTIME,
    ),
    Mutant(
        "a queued request's own deadline is not armed",
        "scheduler/runtime.py",
        "min(times_out, request.deadline)",
        "times_out",
        RUNTIME,
    ),
    Mutant(
        "every expiry in the queue is told as the queue's timeout",
        "scheduler/runtime.py",
        "errors.DEADLINE_EXCEEDED if request.deadline <= times_out else errors.QUEUE_TIMEOUT",
        "errors.QUEUE_TIMEOUT",
        RUNTIME,
    ),
    Mutant(
        "a refused resize changes the number of slots",
        "scheduler/runtime.py",
        "self._limit.permits = permits_before",
        "pass",
        RUNTIME,
    ),
    Mutant(
        "a cancellation out of a nursery counts as a bug",
        "scheduler/runtime.py",
        "errors.CANCELLED if error_beside is None else errors.INTERNAL_ERROR",
        "errors.INTERNAL_ERROR",
        RUNTIME,
    ),
    Mutant(
        "a bug beside a cancellation counts as a cancellation",
        "scheduler/runtime.py",
        "errors.CANCELLED if error_beside is None else errors.INTERNAL_ERROR",
        "errors.CANCELLED",
        RUNTIME,
    ),
    # -- What is told, and what is counted --
    Mutant(
        "a listener that raises keeps the event from the next ones",
        "events.py",
        """self._on_failure(listener, error)
""",
        """self._on_failure(listener, error)
                return
""",
        EVENTS,
    ),
    Mutant(
        "a listener's failure that cannot be reported gets out to the scheduler",
        "events.py",
        "with suppress(Exception):",
        "if True:",
        EVENTS,
    ),
    Mutant(
        "who leaves the queue without a slot is still counted in it",
        "observe/metrics.py",
        "elif event.queue_seconds is not None:\n            self._leave_queue(event.request)",
        "elif event.queue_seconds is not None:",
        METRICS,
    ),
    Mutant(
        "the oldest that waits is taken for the first in line",
        "observe/metrics.py",
        "next(iter(self._waiting.values()))",
        "next(reversed(self._waiting.values()))",
        METRICS,
    ),
    Mutant(
        "a rotated log file is written to until the next look",
        "observe/logs.py",
        "if self._was_rotated():",
        "if self._torn and self._was_rotated():",
        ("observe/test_logs.py",),
    ),
    # -- A request's way through the house --
    Mutant(
        "the slot is held until the client has the last piece",
        "relay.py",
        """_status(slot.progress.upstream_status)
        await client.finish(last)""",
        """_status(slot.progress.upstream_status)
            await client.finish(last)""",
        RELAY,
    ),
    Mutant(
        "the client's own deadline is not armed once it has a slot",
        "relay.py",
        "trio.CancelScope(deadline=facts.deadline)",
        "trio.CancelScope()",
        RELAY,
    ),
    Mutant(
        "every whole answer of the upstream counts as a success",
        "relay.py",
        "slot.ending = errors.of_upstream_status(slot.progress.upstream_status)",
        "slot.ending = errors.COMPLETED",
        RELAY,
    ),
    Mutant(
        "a broken answer is ended as if it were whole",
        "relay.py",
        "client.abort()\n            return",
        "await client.finish()\n            return",
        RELAY,
    ),
    Mutant(
        "our own error is sent behind the head of a broken answer",
        "relay.py",
        "client.abort()\n            return",
        "client.abort()",
        RELAY,
    ),
    Mutant(
        "pass-through goes on while shutting down",
        "relay.py",
        "if self._scheduler.closed:",
        "if False:",
        RELAY,
    ),
    Mutant(
        "the end of a passed-through request is not told",
        "relay.py",
        "self._publisher.publish(PassedThrough(self._facts, trio.current_time(), ending, progress))",
        "pass",
        RELAY,
    ),
    Mutant(
        "a passed-through request's failure counts as a cancellation",
        "relay.py",
        "ending = _note_failure(error, client, progress, None)",
        "_note_failure(error, client, progress, None)",
        RELAY,
    ),
    Mutant(
        "a failed request does not tell how long it waited",
        "relay.py",
        "error.queue_seconds = queue_seconds",
        "pass",
        RELAY,
    ),
    Mutant(
        "a failure behind the head changes the status that is told",
        "relay.py",
        "if not client.started:\n        progress.http_status",
        "if True:\n        progress.http_status",
        RELAY,
    ),
    Mutant(
        "only the last piece's bytes are counted",
        "relay.py",
        "progress.bytes_out += len(piece)",
        "progress.bytes_out = len(piece)",
        RELAY,
    ),
    Mutant(
        "a bug's request gets no answer",
        "relay.py",
        "await self._refuse(client, ProxyError(errors.INTERNAL_ERROR, request_id=self._facts.request_id))",
        "pass",
        RELAY,
    ),
    # -- Calls to the upstream --
    Mutant(
        "a connection is put back though the answer was not read to its end",
        "upstream.py",
        "if connection.is_kept:",
        "if True:",
        RELAY,
    ),
    Mutant(
        "a connection is not closed though the answer was not read to its end",
        "upstream.py",
        "            await connection.aclose()",
        "            pass",
        RELAY,
    ),
    Mutant(
        "connecting may take as long as it likes",
        "upstream.py",
        'self.enter("upstream.connect_timeout", self._settings.connect_timeout)',
        "pass",
        RELAY,
    ),
    Mutant(
        "a connect timeout counts as a slow answer",
        "upstream.py",
        'if setting == "upstream.connect_timeout":',
        'if setting == "connect_timeout":',
        RELAY,
    ),
    Mutant(
        "sending a request counts as connecting",
        "upstream.py",
        "self.sent_at = trio.current_time()\n        self.leave()",
        "self.sent_at = trio.current_time()",
        RELAY,
    ),
    Mutant(
        "the first byte's timeout is not armed",
        "upstream.py",
        'self.enter("upstream.first_byte_timeout", self._settings.first_byte_timeout)',
        "pass",
        RELAY,
    ),
    Mutant(
        "the idle timeout is not armed",
        "upstream.py",
        'self._phases.enter("upstream.idle_timeout", self._idle_timeout)',
        "pass",
        RELAY,
    ),
    Mutant(
        "a long limit is kept by nobody",
        "upstream.py",
        "            phases.end_overdue(now)\n",
        "            pass\n",
        RELAY,
    ),
    Mutant(
        "a long limit goes on while the client takes its time",
        "upstream.py",
        "        self._due = math.inf\n        if self",
        "        if self",
        RELAY,
    ),
    Mutant(
        "the idle timeout counts the time that the client takes",
        "upstream.py",
        "finally:\n            self._phases.leave()",
        "finally:\n            pass",
        RELAY,
    ),
    Mutant(
        "each phase begins the request's timeout anew",
        "upstream.py",
        "deadline = min(self._due, self._ends) if",
        "deadline = self._due if",
        RELAY,
    ),
    Mutant(
        "the message of a timeout names the phase, not the setting that was exceeded",
        "upstream.py",
        'setting, limit = "upstream.request_timeout", self._request_timeout',
        "setting, limit = self._setting, self._limit",
        RELAY,
    ),
    Mutant(
        "the upstream counts as out for ever",
        "upstream.py",
        "trio.current_time() - self._unreachable_at < KNOWN_OUT_SECONDS",
        "self._unreachable_at > -math.inf",
        RELAY,
    ),
    Mutant(
        "the upstream counts as out though it answers again",
        "upstream.py",
        "phases.leave()\n                self._unreachable_at = -math.inf",
        "phases.leave()",
        RELAY,
    ),
    Mutant(
        "the connection that has been idle for longest is taken",
        "upstream.py",
        "connection, since = self._idle.pop()",
        "connection, since = self._idle.popleft()",
        RELAY,
    ),
    Mutant(
        "expired connections stay open",
        "upstream.py",
        "while self._idle and self._idle[0][1] < oldest:",
        "while False:",
        RELAY,
    ),
    Mutant(
        "it is not told that the upstream's answer is whole",
        "upstream.py",
        "progress.upstream_whole = connection.whole",
        "pass",
        RELAY,
    ),
    # -- The exchange with the client --
    Mutant(
        "a disconnect is ignored",
        "connection.py",
        "self._leave()\n            await",
        "await",
        RELAY,
    ),
    Mutant(
        "a disconnect is noticed only while the client's body is read",
        "connection.py",
        "nursery.start_soon(exchange.incoming.look_after)",
        "pass",
        RELAY,
    ),
    Mutant(
        "cut off although its last piece is being sent",
        "connection.py",
        "if not self._finishing and trio.current_time() < self._ends:",
        "if True:",
        RELAY,
    ),
    Mutant(
        "an early answer does not wait for the rest of the body",
        "connection.py",
        "await self.incoming.complete.wait()",
        "pass",
        RELAY,
    ),
    Mutant(
        "an early answer waits for the rest of the body for ever",
        "connection.py",
        "with trio.move_on_after(DRAIN_SECONDS):",
        "if True:",
        RELAY,
    ),
    Mutant(
        "a body of exactly the limit is too large",
        "connection.py",
        "if size > limit:",
        "if size >= limit:",
        RELAY,
    ),
    Mutant(
        "a body is refused only once it has been read",
        "connection.py",
        "self.head.content_length > limit:",
        "self.head.content_length < 0:",
        RELAY,
    ),
    # -- What real clients and upstreams do --
    Mutant(
        "a request is sent again though the upstream may have acted on it",
        "network.py",
        "return number == errno.EPIPE and self._nothing_is_acknowledged",
        "return True",
        FAILING,
    ),
    Mutant(
        "a request on a connection that was closed is not sent again",
        "network.py",
        "self.untouched = await self._was_refused(error) if has_sent else error is not None",
        "pass",
        FAILING,
    ),
    Mutant(
        "what earlier requests had acknowledged is taken for this one's",
        "network.py",
        "self._sent_before = self._transport.sent\n",
        "self._sent_before = 0\n",
        FAILING,
    ),
    Mutant(
        "a request is sent again whatever became of it",
        "http1_client.py",
        "if not kept.untouched or not body.rewind():",
        "if not body.rewind():",
        FAILING,
    ),
    Mutant(
        "an early answer waits for the upload's end",
        "http1_client.py",
        "            if not sent:\n",
        "            if False:\n",
        FAILING,
    ),
    Mutant(
        "an answer 1xx ends an upload",
        "http1.py",
        "if head.status >= 200 or head.status == 101:",
        "if True:",
        (*HTTP1, "conformance/test_fidelity.py"),
    ),
    Mutant(
        "what follows an answer is taken for the next one",
        "http1_client.py",
        "body.has_rest or stream is None",
        "stream is None",
        FAILING,
    ),
    Mutant(
        "each event of a burst is a write of its own",
        "http1_client.py",
        "data := await self.stream.read()",
        "data := await self.stream.read(100)",
        STREAMING,
    ),
    Mutant(
        "an event waits for the next one",
        "connection.py",
        "self._hold_back(False)",
        "self._hold_back(True)",
        STREAMING,
    ),
    Mutant(
        "what came before an upstream's end is lost with it",
        "http1.py",
        '                self.broken = ProtocolError(f"its chunks',
        '                raise ProtocolError(f"its chunks',
        STREAMING,
    ),
    Mutant(
        "an answer's head waits for a body that is not there",
        "relay.py",
        "more_follows=response.at_hand",
        "more_follows=True",
        STREAMING,
    ),
    Mutant(
        "an answer's head and its body are two writes",
        "relay.py",
        "more_follows=response.at_hand",
        "more_follows=False",
        SERVER,
    ),
    Mutant(
        "a client that has stopped reading is not taken for gone",
        "streams.py",
        "            if not self._gone.is_set():\n                self.leave()\n",
        "",
        (*GUARD, *LEAVING),
    ),
    Mutant(
        "a head's end is not found where it is split",
        "http1.py",
        "len(self._data) - len(data) - 2)",
        "len(self._data) - len(data))",
        HTTP1,
    ),
    Mutant(
        "a connection of HTTP/1.0 is kept",
        "http1.py",
        'if head.version != "1.1":',
        "if False:",
        HTTP1,
    ),
    Mutant(
        "the body of an answer to HEAD is waited for",
        "http1.py",
        'if method == "HEAD" or head.status in _BODILESS:',
        "if head.status in _BODILESS:",
        HTTP1,
    ),
    Mutant(
        "an empty line behind an answer is passed over",
        "http1.py",
        'self._tail[:2] == b"\\r\\n" or not',
        "not",
        HTTP1,
    ),
    Mutant(
        "any transfer coding is taken for chunked",
        "http1.py",
        'if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):',
        "if False:",
        HTTP1,
    ),
    Mutant(
        "what is beside the chunks has no limit",
        "http1.py",
        "if self._beside > HEAD_SIZE_MAX:",
        "if False:",
        HTTP1,
    ),
    Mutant(
        "a field may become two",
        "http1.py",
        'head.count(b"\\n") != ends',
        "False",
        HTTP1,
    ),
    Mutant(
        "what the parser refuses has no body",
        "protocols/http1.py",
        "        await self.stream_send(Body(stream_id=STREAM_ID, data=body))\n",
        "",
        FRAMING,
    ),
    Mutant(
        "what the parser refuses is not counted",
        "app.py",
        "if not counted:",
        "if counted:",
        FRAMING,
    ),
    Mutant(
        "what follows a last request cuts its answer off",
        "protocols/http1.py",
        "        if self.their_state is h11.MUST_CLOSE:\n            return h11.NEED_DATA\n",
        "",
        FRAMING,
    ),
    Mutant(
        "Transfer-Encoding of HTTP/1.0 is believed",
        "request.py",
        'if head.chunked and head.http_version == "1.0":',
        "if False:",
        FRAMING,
    ),
    Mutant(
        "a client's FIN behind its upload is not looked for",
        "connection.py",
        "                await self._read_ahead()\n",
        "                pass\n",
        LEAVING,
    ),
    Mutant(
        "an HTTP/2 client's closed window holds nothing back",
        "protocols/http2.py",
        "                self.priority.block(stream_id)\n                return\n",
        "                pass\n",
        HTTP2,
    ),
    Mutant(
        "an HTTP/2 client's closed window holds the upstream for ever",
        "protocols/http2.py",
        "with trio.CancelScope(deadline=self._latest()) as scope:",
        "with trio.CancelScope() as scope:",
        HTTP2,
    ),
    Mutant(
        "a broken answer leaves its HTTP/2 stream open",
        "protocols/http2.py",
        "await self._reset(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)",
        "pass",
        HTTP2,
    ),
    Mutant(
        "an HTTP/2 upload that nobody takes holds the connection up",
        "protocols/http2.py",
        "self._data_received(event)",
        "await super()._handle_events([event])",
        HTTP2,
    ),
    # -- What the request says --
    Mutant(
        "priority parsed by header only",
        "request.py",
        "by_header if by_header is not None else next(iter(by_body), None)",
        "by_header",
        REQUEST,
    ),
    Mutant(
        "the body's priority goes before the header's",
        "request.py",
        "by_header if by_header is not None else next(iter(by_body), None)",
        "next(iter(by_body), by_header)",
        REQUEST,
    ),
    Mutant(
        "the default priority is ignored",
        "request.py",
        "    return settings.default_priority",
        "    return 50",
        REQUEST,
    ),
    Mutant(
        "our own header fields are forwarded",
        "request.py",
        "_NOT_SENT: Final = HOP_BY_HOP | OURS | _SET_ANEW",
        "_NOT_SENT: Final = HOP_BY_HOP | _SET_ANEW",
        REQUEST,
    ),
    Mutant(
        "the body's priority is not cut out",
        "body.py",
        "rest = body[: found.start()] + body[found.end() :]",
        "return body",
        RELAY,
    ),
    # -- The stream below a connection --
    Mutant(
        "the write timeout is not reset on progress",
        "streams.py",
        """while rest:
                self._sending.deadline = min(trio.current_time() + self._write_timeout, self._writes_until)""",
        """self._sending.deadline = min(trio.current_time() + self._write_timeout, self._writes_until)
            while rest:""",
        GUARD,
    ),
    Mutant(
        "the write timeout is not armed",
        "streams.py",
        "self._sending.deadline = min(trio.current_time() + self._write_timeout, self._writes_until)",
        "pass",
        GUARD,
    ),
    Mutant(
        "a write goes on beyond the deadline",
        "streams.py",
        "min(trio.current_time() + self._write_timeout, self._writes_until)",
        "trio.current_time() + self._write_timeout",
        GUARD,
    ),
    Mutant(
        "the socket stays open when a write is given up",
        "streams.py",
        "if self._sending.cancelled_caught:\n            self.abort()",
        "if self._sending.cancelled_caught:",
        GUARD,
    ),
    Mutant(
        "what a partial write has left is dropped",
        "streams.py",
        "rest = rest[sent:]",
        "break",
        GUARD,
    ),
    Mutant(
        "a write goes on though the client has gone",
        "streams.py",
        'self._sending.cancel(reason="the client has gone")',
        "pass",
        GUARD,
    ),
    Mutant(
        "a client that has left before its request was taken up is not known to have",
        "connection.py",
        "            if self._guard.has_left:",
        "            if self._guard is None:",
        SERVER,
    ),
    Mutant(
        "a client that has left before its WebSocket's handshake was taken up is not known to have",
        "websocket_connection.py",
        "if self._guard is not None and self._guard.has_left:",
        "if self._guard is None and self._accepted:",
        WEBSOCKET,
    ),
    Mutant(
        "a connection's tasks go on though its client has gone",
        "streams.py",
        "self.scope.deadline = min(self.scope.deadline, trio.current_time() + CLOSING_SECONDS)",
        "pass",
        GUARD,
    ),
    Mutant(
        "the shutdown does not wait for what is going on",
        "streams.py",
        "self._count += 1",
        "pass",
        GUARD,
    ),
    Mutant(
        "the shutdown waits though nothing is going on any more",
        "streams.py",
        "self._count -= 1",
        "pass",
        GUARD,
    ),
    Mutant(
        "TLS says that it closes before a reset",
        "streams.py",
        "if self._resetting:\n            # TLS",
        "if False:\n            # TLS",
        GUARD,
    ),
    Mutant(
        "what was held back is not thrown away",
        "streams.py",
        "while data and self._throwing_away:",
        "while data and False:",
        GUARD,
    ),
    Mutant(
        "a TLS connection that was cut off looks like a whole answer",
        "network.py",
        "ssl_context, server_hostname=server_hostname)",
        "ssl_context, server_hostname=server_hostname, https_compatible=True)",
        TLS,
    ),
    Mutant(
        "a connection that was cut off in its TLS handshake stays open",
        "http1_client.py",
        "            stream, self.stream = self.stream, None\n            await stream.aclose()",
        "            self.stream = None",
        TLS,
    ),
    Mutant(
        "an early answer over TLS does not stop the sending",
        "network.py",
        "self._transport.stop_sending()",
        "pass",
        MEETINGS,
    ),
    Mutant(
        "the end of a WebSocket's HTTP/2 stream is passed over",
        "protocols/http2.py",
        "if isinstance(stream, WSStream):",
        "if False:",
        MEETINGS,
    ),
    Mutant(
        "no client certificate is shown",
        "upstream.py",
        "if settings.client_cert is not None:",
        "if False:",
        TLS,
    ),
    Mutant(
        "a WebSocket's place is never left",
        "websocket.py",
        "self.taken -= 1",
        "pass",
        WEBSOCKET_CUTS,
    ),
    Mutant(
        "a WebSocket session's end is not told",
        "websocket.py",
        "self._publisher.publish(WebSocketClosed(",
        "print(WebSocketClosed(",
        WEBSOCKET_CUTS,
    ),
    Mutant(
        "a browser's credentials go to the upstream beside the proxy's own",
        "request.py",
        "if not name.startswith(_CREDENTIALS_IN_SUBPROTOCOLS)",
        "if name",
        REQUEST,
    ),
    Mutant(
        "the client's own WebSocket extensions are offered to the upstream",
        "request.py",
        'return name.lower().startswith(b"sec-websocket-")',
        'return name.lower() in (b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-protocol")',
        REQUEST,
    ),
    # -- What the demo shows --
    Mutant(
        "first come, first served is compared with one place more than there is",
        "demo/replay.py",
        "elif len(waiting) < rules.places:",
        "elif len(waiting) <= rules.places:",
        ("demo/test_replay.py",),
    ),
    Mutant(
        "evicted requests have not waited",
        "demo/watch.py",
        "counts.waits.add(event.queue_seconds or 0.0)",
        "pass",
        ("demo/test_watch.py",),
    ),
    Mutant(
        "the page is drawn on a terminal that it has left",
        "demo/screen.py",
        "if self._ended:",
        "if False:",
        ("demo/test_screen.py",),
    ),
    Mutant(
        "a paused terminal pauses the proxy",
        "demo/show.py",
        "await trio.to_thread.run_sync(output.show, view, abandon_on_cancel=True)",
        "output.show(view)",
        ("demo/test_demo_on_a_terminal.py",),
    ),
    Mutant(
        "a faster world has the slow one's queue timeout",
        "demo/scenarios.py",
        "queue_timeout=self.queue_timeout / speed,",
        "",
        ("demo/test_scenarios.py",),
    ),
    Mutant(
        "an answer is finished before the next request begins",
        "scheduler/runtime.py",
        "if self._scheduler._give_back(self) and error is None:",
        "if self._scheduler._give_back(self) and False:",
        RELAY,
    ),
    # -- Plain requests --
    Mutant(
        "two blanks in a request line are read",
        "http1_server.py",
        'if not head.startswith(b"%b %b HTTP/1.1\\r\\n" % (method, collector.target)):',
        "if False:",
        PLAIN,
    ),
    Mutant(
        "two hosts are plain",
        "http1_server.py",
        "return None if hosts != 1 else size or 0",
        "return size or 0",
        PLAIN,
    ),
    Mutant(
        "what comes behind a last request is read",
        "http1_server.py",
        "        if self.their_state is h11.MUST_CLOSE:\n            return\n",
        "",
        PLAIN,
    ),
    Mutant(
        "an answer that says that it is the last one is not",
        "http1_server.py",
        "self.our_state = h11.MUST_CLOSE if self._closing else h11.DONE",
        "self.our_state = h11.DONE",
        PLAIN,
    ),
    Mutant(
        "an upload that breaks off is complete",
        "http1_server.py",
        "            if self._ended:\n                self.their_state = h11.ERROR",
        "            if False:\n                self.their_state = h11.ERROR",
        PLAIN,
    ),
    Mutant(
        "a pipelined request is read before the last one is answered",
        "http1_server.py",
        "if self.their_state is h11.DONE and self._buffer:",
        "if False:",
        PLAIN,
    ),
    Mutant(
        "what h11 is to read is lost",
        "protocols/http1.py",
        "        if data:\n            self.connection.receive_data(data)\n        if is_all:",
        "        if is_all:",
        SERVER,
    ),
    Mutant(
        "a request that has been read rests",
        "protocols/http1.py",
        "        self._parser.below.stir()\n        method",
        "        method",
        SERVER,
    ),
    Mutant(
        "a request that h11 has read rests",
        "protocols/http_server.py",
        "        self._below.stir()\n",
        "        pass\n",
        SERVER,
    ),
    Mutant(
        "a connection that is about to end begins a request",
        "streams.py",
        'return b"" if self.scope.cancel_called else data',
        "return data",
        GUARD,
    ),
    Mutant(
        "what follows an upload belongs to it",
        "connection.py",
        "            self._guard.more_follows = self._guard.relaying = False\n",
        "            pass\n",
        SERVER,
    ),
    Mutant(
        "what has been refused already is refused again",
        "protocols/http1.py",
        "if self.connection.their_state is not h11.ERROR:",
        "if True:",
        SERVER,
    ),
    Mutant(
        "what was for a stream that was reset is kept",
        "protocols/http2.py",
        "                    await self._throw_away(event.stream_id)\n",
        "",
        HTTP2,
    ),
    Mutant(
        "a short limit outlasts its phase",
        "upstream.py",
        "if limit < COARSE_SECONDS_MIN else self._ends\n        if self.scope.deadline != deadline:",
        "if limit < COARSE_SECONDS_MIN else self._ends\n        if limit < COARSE_SECONDS_MIN:",
        RELAY,
    ),
    # -- What a request costs while nothing goes on --
    Mutant(
        "a connection is not idle after its last exchange",
        "streams.py",
        "            self.streams.discard(stream)\n            self.rest(stream)\n",
        "            self.streams.discard(stream)\n",
        GUARD,
    ),
    Mutant(
        "a connection is idle although an exchange goes on",
        "streams.py",
        "        self.streams.add(stream)\n        self.forget(stream)\n",
        "        self.streams.add(stream)\n",
        GUARD,
    ),
    Mutant(
        "what is idle stays",
        "streams.py",
        "            self._end_idle(now)\n",
        "",
        GUARD,
    ),
    Mutant(
        "TLS does not say that an idle connection is closed",
        "streams.py",
        "with trio.move_on_after(CLOSING_SECONDS, shield=True):",
        "with trio.move_on_after(CLOSING_SECONDS):",
        TLS,
    ),
    Mutant(
        "a full mailbox takes more",
        "mailbox.py",
        "while len(self._messages) >= self._size:",
        "while False:",
        MAILBOX,
    ),
    Mutant(
        "a WebSocket's end waits for its application",
        "mailbox.py",
        "        mailbox = Mailbox(config.max_app_queue_size)\n",
        '        if scope["type"] == "websocket":\n'
        "            return await super().spawn_app(app, config, scope, send)\n"
        "        mailbox = Mailbox(config.max_app_queue_size)\n",
        MAILBOX,
    ),
    Mutant(
        "a disconnect waits for room",
        "mailbox.py",
        """        if message["type"].endswith(".disconnect"):""",
        "        if False:",
        MAILBOX,
    ),
    Mutant(
        "a disconnect is not told before it is read",
        "mailbox.py",
        "                self.on_disconnect()\n",
        "                pass\n",
        MAILBOX,
    ),
    Mutant(
        "what comes behind a disconnect waits for room for ever",
        "mailbox.py",
        "            if self._gone:\n                return\n",
        "",
        MAILBOX,
    ),
    Mutant(
        "a chunked answer goes on with the next one",
        "http1.py",
        "            del pieces[self._last :]",
        "            pass",
        HTTP1,
    ),
    Mutant(
        "a request goes upstream although its client has gone in this moment",
        "http1_client.py",
        "            await trio.lowlevel.checkpoint_if_cancelled()",
        "            pass",
        SERVER,
    ),
    Mutant(
        "a stream that is reset while it is sent ends its connection",
        "protocols/http2.py",
        "            if stream_id in self.stream_buffers:\n                raise\n",
        "            raise\n",
        HTTP2,
    ),
    Mutant(
        "a refusal needs more window than there is",
        "protocols/http2.py",
        "                if len(body) <= self.connection.local_flow_control_window(event.stream_id):\n",
        "                if True:\n",
        HTTP2,
    ),
    Mutant(
        "a handshake without a version is Hypercorn's to refuse",
        "protocols/http1.py",
        "    return unusable_version(fields)\n",
        '    return ""\n',
        ("test_websocket.py",),
    ),
    Mutant(
        "messages behind a handshake do not wait for its answer",
        "protocols/http1.py",
        "        if self.buffer and state is h11.SEND_RESPONSE:\n",
        "        if False:\n",
        ("test_websocket.py",),
    ),
    Mutant(
        "messages behind a refused handshake are for somebody",
        "protocols/http1.py",
        "        if state is not h11.SWITCHED_PROTOCOL:\n            self.buffer.clear()\n",
        "",
        ("test_websocket.py",),
    ),
    Mutant(
        "messages that waited for the handshake's answer wait on",
        "protocols/http1.py",
        "            if isinstance(event, Response) and isinstance(self.connection, Upgrading):\n",
        "            if False:\n",
        ("test_websocket.py",),
    ),
    Mutant(
        "an HTTP/2 handshake without a version is Hypercorn's to refuse",
        "protocols/http2.py",
        " and (reason := unusable_version(fields)):\n",
        ' and (reason := ""):\n',
        HTTP2,
    ),
    Mutant(
        "a method may be two words",
        "request.py",
        '    if not _NAME.fullmatch(head.method.encode("latin-1", "replace")):\n',
        "    if False:\n",
        HTTP2,
    ),
    Mutant(
        "a host may be anything",
        "request.py",
        '    if not all(_HOST.fullmatch(value) for value in head.values(b"host")):\n',
        "    if False:\n",
        FRAMING,
    ),
    Mutant(
        "a length may be greater than 64 bits hold",
        "request.py",
        "    if head.content_length is not None and head.content_length > _LENGTH_MAX:\n",
        "    if False:\n",
        FRAMING,
    ),
    Mutant(
        "any Upgrade to h2c is granted",
        "protocols/http1.py",
        '        if event.method == b"PRI" or _asks_for_h2c(event):\n',
        "        if True:\n",
        FRAMING,
    ),
    Mutant(
        "a body that was announced need not come",
        "protocols/http2.py",
        '    if ended and fields.get(b"content-length", b"").strip(b"0"):\n',
        "    if False:\n",
        HTTP2,
    ),
    Mutant(
        "a 204 may have a length",
        "request.py",
        "or status == 204):\n",
        "):\n",
        HTTP2,
    ),
    Mutant(
        "what could not be read is quoted",
        "errors.py",
        '    return _QUOTED_BYTES.sub("", message)\n',
        "    return message\n",
        SERVER,
    ),
    Mutant(
        "an upstream that takes no connection in time is not known to be out",
        "upstream.py",
        "raise self._noted(phases.error(self.url))",
        "raise phases.error(self.url)",
        RELAY,
    ),
    Mutant(
        "one line that cannot be said takes the others along",
        "observe/logs.py",
        '        except Exception:\n            self.dropped += 1\n            return ""\n',
        '        except ArithmeticError:\n            self.dropped += 1\n            return ""\n',
        LOGS,
    ),
    Mutant(
        "who waits for a message is not woken",
        "mailbox.py",
        "        self._messages.append(message)\n        self._tell()\n",
        "        self._messages.append(message)\n",
        MAILBOX,
    ),
    Mutant(
        "a flag that was set before anybody waited is not set",
        "flag.py",
        "            if self._is_set:\n                self._event.set()\n",
        "",
        FLAG,
    ),
    Mutant(
        "a descriptor that another connection has got meanwhile is read from",
        "sockets.py",
        "        if sock.fileno() == -1:\n            break\n",
        "",
        SOCKETS,
    ),
    Mutant(
        "a changed log level holds for other lines than those of requests",
        "observe/logs.py",
        "        if self._bound_by != bound_by:\n",
        "        if self._bound_by is None:\n",
        LOGS,
    ),
    Mutant(
        "the second of a line's timestamp is that of the first line",
        "observe/logs.py",
        "{_date_and_time(second)}",
        "{_date_and_time(1_000_000_000)}",
        LOGS,
    ),
    Mutant(
        "a remembered route holds for every method",
        "app.py",
        "        return find(path, method)\n",
        "        return find(path, 'GET')\n",
        SERVER,
    ),
    Mutant(
        "new connections are taken one by one",
        "sockets.py",
        "            self._accept_more()\n",
        "",
        SOCKETS,
    ),
    Mutant(
        "connections without end are taken at once",
        "sockets.py",
        "        while len(self._accepted) < ACCEPTED_MAX:\n",
        "        while True:\n",
        SOCKETS,
    ),
)


class Run(NamedTuple):
    """What became of one run of tests."""

    caught_by: str
    """The first test that failed, or that time was up; empty if all of them passed."""
    seconds: float


RUN_TESTS: Final = """
import sys

import pytest

import trioproxy

if trioproxy.__file__ != sys.argv[1]:
    sys.exit(f"This is not the copy: {trioproxy.__file__}")
sys.exit(pytest.main(sys.argv[2:]))
"""
"""Makes sure that the copy is what is tested, and does what `python -m pytest` does."""


def run_tests(source: Path, tests: Iterable[str], seconds_max: float) -> Run:
    """Run tests with the package in `source` until the first one fails. RuntimeError if they cannot be run."""
    command = [sys.executable, "-c", RUN_TESTS, str(source / "trioproxy" / "__init__.py")]
    command += ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += [str(ROOT / "tests" / test) for test in tests]
    began = time.monotonic()
    try:
        # Not in the project's own folder: hypothesis would keep there what only a mutant fails on.
        process = subprocess.run(
            command,
            cwd=source,
            env=os.environ | {"PYTHONPATH": str(source)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds_max,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Run(f"the time limit: killed after {seconds_max:g} s", time.monotonic() - began)
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(.+?)( - |$)", process.stdout, re.MULTILINE)
    if process.returncode not in (0, 1) or (failed is None) != (process.returncode == 0):
        raise RuntimeError(f"the tests cannot be run:\n{process.stdout}")
    return Run(failed[1][:80] if failed else "", time.monotonic() - began)


def run_mutant(mutant: Mutant | None, tests: Sequence[str]) -> Run:
    """Copy the package, put the fault into the copy, run the tests with it; None: the copy alone."""
    with tempfile.TemporaryDirectory(prefix="trioproxy-mutant-") as folder:
        source = Path(folder).resolve()
        shutil.copytree(PACKAGE, source / "trioproxy", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            path = source / "trioproxy" / mutant.file
            path.write_text(mutant.apply(path.read_text("utf-8")), "utf-8")
        return run_tests(source, tests, SECONDS_MAX * len(tests))


def find_stale(mutants: Iterable[Mutant]) -> list[str]:
    """What is wrong with those mutants that do not fit the source any more."""
    stale = []
    for mutant in mutants:
        try:
            mutant.apply((PACKAGE / mutant.file).read_text("utf-8"))
        except ValueError as error:
            stale.append(str(error))
    return stale


def write(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run_all(mutants: Sequence[Mutant], jobs: int) -> int:
    """Run every mutant and print the table; returns how many were caught."""
    columns = [max(len(mutant[column]) for mutant in mutants) for column in (0, 1)]
    write(f"{'mutant':{columns[0]}}  {'file':{columns[1]}}  seconds  caught by")
    caught = 0
    with ThreadPoolExecutor(jobs) as pool:
        runs = pool.map(lambda mutant: run_mutant(mutant, mutant.tests), mutants)
        for mutant, run in zip(mutants, runs, strict=True):
            caught += bool(run.caught_by)
            verdict = run.caught_by or "SURVIVED: a test is missing"
            write(f"{mutant.name:{columns[0]}}  {mutant.file:{columns[1]}}  {run.seconds:7.1f}  {verdict}")
    return caught


def main() -> int:
    """Returns the exit status: 0 if every mutant was caught."""
    parser = argparse.ArgumentParser(description="Put small faults into the proxy: does a test catch each of them?")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="how many mutants to run at a time")
    parser.add_argument("--only", metavar="TEXT", default="", help="those whose name or file has this in it")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.only in f"{mutant.name} {mutant.file}"]
    if not mutants:
        parser.error(f"no mutant has {arguments.only!r} in its name or file")
    if stale := find_stale(mutants):
        write("\n".join(stale))
        return 1
    unmutated = run_mutant(None, sorted({test for mutant in mutants for test in mutant.tests}))
    if unmutated.caught_by:
        write(f"The tests do not pass without a mutant: {unmutated.caught_by}")
        return 1
    write(f"Without a mutant the tests pass, in {unmutated.seconds:.1f} s.\n")
    began = time.monotonic()
    caught = run_all(mutants, arguments.jobs)
    write(f"\n{caught} of {len(mutants)} mutants caught, in {time.monotonic() - began:.0f} s.")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
