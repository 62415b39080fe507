"""What the pages of `docs/reference/` say that the code cannot: introductions, and what things mean to people."""

from __future__ import annotations

from typing import Final, NamedTuple

SETTINGS_INTRODUCTION: Final = """
Settings come from a YAML file (`--config FILE`, or the environment variable `TRIOPROXY_CONFIG`), from environment
variables and from [options of the command line](command-line.md); the later ones win. All are optional. Unknown keys,
wrong types and impossible values are errors that name the key, the value, the place and what would be right;
`trioproxy check-config FILE` says them without starting anything.

- Durations are seconds, or text such as `250ms`, `5m`, `2h`. Sizes are bytes, or text such as `64MiB`. Plain text and
  numbers are read as in YAML 1.2: `off` and `no` are text.
- `${NAME}` in a text of the file is replaced by an environment variable, which must be set; `$${` stands for `${`.
  Between braces, and before text that begins with `*` or `!`, YAML needs quotes.
- An environment variable of several addresses has commas between them:
  `TRIOPROXY_SERVER__BIND=127.0.0.1:8080,[::1]:8080`.
- Any other environment variable that begins with `TRIOPROXY_` is an error. In Kubernetes, a Service named `trioproxy`
  makes such variables: set `enableServiceLinks: false`.
- Secrets are never printed or logged.
"""

METRICS_INTRODUCTION: Final = """
`GET /metrics` answers in Prometheus' text format, or in OpenMetrics to a scraper that asks for it. It needs no slot
and no key. Every known set of labels is there at 0 from the start, so that `increase()` sees the first event.

Only *scheduled* requests count in the series about requests, slots and the queue; requests that are passed through,
refusals before scheduling and WebSocket sessions have series of their own. At any instant the sum of
`openai_proxy_requests_total` over `status` equals the sum of `openai_proxy_requests_outcome_total`.

How to look at them in Grafana: [`observability/`](../../observability/README.md).
"""


class Line(NamedTuple):
    """One kind of log line."""

    when: str
    level: str = ""
    """Where the code does not name it beside the event."""


LOG_EVENTS: Final[dict[str, Line]] = {
    "request completed": Line("a scheduled request ended with an answer of the upstream's", "info"),
    "request evicted": Line("a more urgent request took its place in the queue", "warning"),
    "request rejected": Line("the queue was full, or the proxy was shutting down", "warning"),
    "request timed out": Line("in the queue, by its own deadline, or upstream: `code` says which", "warning"),
    "request failed": Line("the upstream failed or answered 429 or 5xx, or the proxy has a bug", "warning"),
    "request cancelled": Line("the client went away, stopped reading, or was cut off at the shutdown's end", "info"),
    "request passed through": Line("a request that needs no slot ended", "info; warning with `error`"),
    "request refused": Line("turned away before scheduling: `code`, and `reason` unless it might quote a body"),
    "request queued": Line("it waits for a slot"),
    "request started": Line("it has got a slot"),
    "websocket opening": Line("a session has one of the places; its handshake goes on to the upstream"),
    "websocket closed": Line("a session ended, or its handshake was refused", "info; warning with `error`"),
    "capacity changed": Line("the number of slots or places is another from now on"),
    "listening": Line("`addresses` are bound"),
    "started": Line("the application is ready: `version`, `upstream`, `forward_proxy`"),
    "shutting down": Line("a signal came; running and queued requests go on for `grace_seconds`"),
    "stopped": Line("the end"),
    "internal error": Line("a bug of the proxy: `exception` is its traceback"),
    "a connection failed": Line("a bug that one connection ran into; the others go on"),
    "a listener failed": Line("a metric or the log failed on an event, once for each listener"),
    "an invariant does not hold": Line("a self-check failed: see `error`"),
    "upstream.base_url has no path: most APIs are at /v1": Line("at the start"),
    "the configuration cannot be used": Line("`error` has a line for each problem; exit status 2"),
    "cannot listen": Line("an address of `server.bind` cannot be bound; exit status 1"),
    "the lock against a second worker cannot be had": Line("Hypercorn only; see `error`"),
    "this worker must not serve": Line("Hypercorn was started with several workers, whose limits would add up"),
    "the server cannot be used": Line("Hypercorn was started without `--worker-class trio`"),
    "open to anyone who can connect": Line("at the start: the upstream's key can be spent by others: see `meaning`"),
    "configuration reloaded": Line("after a SIGHUP or `trioproxy reload`: what changed, and `needs_restart`"),
    "configuration not reloaded": Line("it could not be used: `error`; nothing has changed"),
}
"""Every `event`. Hypercorn's and other libraries' lines, which have `logger`, are not listed."""

LOG_KEYS: Final[dict[str, str]] = {
    "timestamp": "ISO 8601, UTC, microseconds",
    "level": "`debug`, `info`, `warning`, `error`",
    "event": "what happened: the table above",
    "method": "of the request",
    "priority": "0 to 100, higher is more urgent",
    "priority_level": "`very_low`, `low`, `normal`, `high`, `critical`",
    "pool": "`default`",
    "key": "the name of the client's key, never the key",
    "status": "how a scheduled request ended, as in the metrics",
    "outcome": "who or what decided the end, as in the metrics; scheduled requests only",
    "code": "the exact ending: see [errors](errors.md)",
    "reason": "why a request was refused",
    "websocket_outcome": "what ended a session, as in `openai_proxy_websocket_sessions_total`",
    "error": "what failed, for people; only when something failed",
    "exception": "a traceback",
    "logger": "the library that said it (Hypercorn, `py.warnings`); the proxy's own lines have none",
    "listener": "what failed on an event",
    "addresses": "where it listens, as URLs",
    "meaning": "what a warning means, and what to do",
    "bind": "where it was to listen",
    "version": "of trioproxy",
    "upstream": "the upstream's base URL",
    "forward_proxy": "the proxy that upstream calls go through, from the environment; null if none",
    "grace_seconds": "how long requests may still take",
    "permits": "slots",
    "max_queue": "places in the queue",
    "needs_restart": "settings that changed in the file but not in the process",
    "changed": "settings that have changed",
}
"""Every key that is not documented at its field in `events.py`."""

LOGS_INTRODUCTION: Final = """
One JSON object a line on standard output, and in `logging.file`. On a terminal the lines are made for people instead
(`logging.format`); the file is always JSON. `trioproxy serve 2>&1 | tee -i -a logs/proxy.log` is as good as the file,
as long as that is not rotated. What else the process has to say, Hypercorn's messages and Python's warnings, comes as
such lines too.

Each scheduled request ends with exactly one line of the level `info` or above. Bodies, messages, keys and
`Authorization` are never logged. A slow or full disk costs lines, which are counted, and never a request's time.
"""

LOG_EXAMPLE: Final[dict[str, object]] = {
    "timestamp": "2026-11-23T20:34:09.757878Z",
    "level": "info",
    "event": "request completed",
    "request_id": "req_29420fdcd521e2e8c3e5cdaf3623fbda",
    "priority": 70,
    "priority_level": "high",
    "pool": "default",
    "model": "gpt-sim",
    "method": "POST",
    "path": "/v1/chat/completions",
    "stream": True,
    "bytes_in": 123,
    "http_status": 200,
    "bytes_out": 8226,
    "upstream_seconds": 0.81333,
    "status": "completed",
    "outcome": "success",
    "code": "completed",
    "queue_seconds": 0.111629,
    "time_to_first_byte_seconds": 0.307549,
    "total_seconds": 0.927151,
}


class Meaning(NamedTuple):
    """An error to the one who gets it."""

    when: str
    remedy: str


MEANINGS: Final[dict[str, Meaning]] = {
    "completed": Meaning("the upstream's whole answer, with a status below 500 and not 429", "–"),
    "upstream_refused": Meaning(
        "the upstream's whole answer, with 429 or a status from 500 on", "as the upstream says"
    ),
    "upstream_broke_off": Meaning(
        "the upstream broke off after the answer's head was sent: the client's connection is broken off too",
        "try again",
    ),
    "cancelled": Meaning("the client went away, stopped reading, or was cut off at the end of the shutdown grace", "–"),
    "invalid_priority": Meaning("`X-Priority` or `priority` is not a priority", "correct it"),
    "invalid_request": Meaning("an unusable deadline, path or framing, or JSON nested too deeply", "correct it"),
    "invalid_api_key": Meaning("keys are configured, and this is none of them, or it has expired", "use another key"),
    "model_not_allowed": Meaning("the key's `models` do not match the request's", "use another model or key"),
    "priority_not_allowed": Meaning("above the key's `max_priority`", "ask for less, or set `clamp: true`"),
    "rate_limit_exceeded": Meaning(
        "more requests of this key wait than its `max_queue`", "come back after `retry-after`"
    ),
    "not_found": Meaning("not under `/v1/`", "correct it"),
    "request_too_large": Meaning("the body is larger than `server.max_body_size`", "raise it, or send less"),
    "internal_error": Meaning("a bug of the proxy", "report it, with the log's traceback"),
    "upstream_unreachable": Meaning("no connection, or a certificate that is not accepted", "come back after a second"),
    "upstream_protocol_error": Meaning("nonsense came back instead of HTTP", "come back after a second"),
    "queue_full": Meaning("rejected: the queue is full of others as urgent", "come back after `retry-after`"),
    "shutting_down": Meaning("the proxy is stopping", "come back after `retry-after`"),
    "too_many_websockets": Meaning(
        "`server.max_websockets` are open (counted as a session, not as a request)", "come back after `retry-after`"
    ),
    "evicted": Meaning("a more urgent request took the place in the queue", "come back after `retry-after`"),
    "queue_timeout": Meaning("waited `scheduler.queue_timeout` for a slot", "do not come back: it would not help"),
    "deadline_exceeded": Meaning("the request's own deadline (`X-Request-Timeout`) has passed", "do not come back"),
    "upstream_timeout": Meaning(
        "`upstream.first_byte_timeout`, `idle_timeout` or `request_timeout` has passed; after the answer's head was "
        "sent, the connection is broken off instead",
        "do not come back",
    ),
}
"""By code."""

ERRORS_INTRODUCTION: Final = """
The upstream's own errors go through unchanged, whatever their status. The proxy's own have OpenAI's shape, all four
keys of it, so that every SDK raises its own typed exception:

```json
{"error": {"message": "…", "type": "queue_full", "param": null, "code": "queue_full"}}
```

`status` and `outcome` are how the [metrics](metrics.md) and the [log](logs.md) count it; what is refused before
scheduling is in `openai_proxy_refused_total` instead. A timeout or a failure after the answer's head was sent cannot
be an error any more: the connection is broken off, and a truncated answer never looks whole.

What to do about them as an operator: [Troubleshoot](../how-to/troubleshoot.md).
"""

RETRY_TEXT: Final = """
The official SDKs retry connection errors, 408, 409, 429 and every status from 500 on, twice by default. They obey
`x-should-retry`, then `retry-after-ms`, then `retry-after`; other clients should obey `retry-after` too.
`retry-after` is whole seconds, 1 to 60, from the measured rate at which slots come free; `retry-after-ms` beside it
has up to a quarter of random spread, so that the refused do not come back in one herd. Why:
[Scheduling](../explanation/scheduling.md#coming-back).
"""

ROUTES_INTRODUCTION: Final = """
| path | what happens |
| --- | --- |
| `/v1/…` | forwarded to `upstream.base_url`: *scheduled*, when it needs a slot, or *passed through* |
| `GET /health` | 200 while the process lives, also while it drains |
| `GET /ready` | 200; 503 with the reason while it starts or drains, or the upstream could not be reached |
| `GET /metrics` | [the metrics](metrics.md) |
| anything else | 404 `not_found` |
"""

ROUTES_PASSED: Final = """
Everything else under `/v1/`, at once: every `GET`, `HEAD` and `DELETE`, every `POST` to `…/cancel` (never behind what
it cancels), jobs that the upstream queues itself (videos, batches, fine-tuning), models, files, uploads, unknown
paths. `GET` with `Upgrade: websocket` is [a session](http.md#websockets).
"""

COMMAND_INTRODUCTION: Final = """
`trioproxy` is `.venv/bin/trioproxy`, unless you have activated the environment; `python -m trioproxy` is the same.
Options go before [environment variables and the file](settings.md). The simulated upstream is
`python -m trioproxy.demo.upstream_server`, with a `--help` of its own.

| exit status | |
| --- | --- |
| 0 | ended as it was asked to |
| 1 | an address or the control socket cannot be bound; `reload`: no proxy answers there, and nothing was changed |
| 2 | the configuration or the command line cannot be used; nothing was started, or changed |
"""
