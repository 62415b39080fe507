"""Events and everything else that the process has to say → JSON lines (or a console), off the request's path.

A line is a dictionary, put into a bounded queue for each sink, whose own thread renders and writes. A slow or full
disk, or a pipe that nobody reads, costs lines, which are counted, and never a request's time. Hypercorn's messages,
warnings and whatever else goes through the standard library's logging take the same way.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, NoReturn, Protocol, TextIO

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from trioproxy.errors import INVALID_PRIORITY, Status
from trioproxy.events import (
    CapacityChanged,
    Ended,
    Event,
    PassedThrough,
    Progress,
    Queued,
    Refused,
    RequestFacts,
    ScheduledRequest,
    Started,
    WebSocketClosed,
    WebSocketOpening,
    WebSocketProgress,
)

QUEUED_LINES_MAX: Final = 10_000
"""Lines that may wait for the writer; more are dropped and counted."""

GATHER_SECONDS: Final = 0.05
"""How long lines are gathered before they are written together: each time that the writer's thread wakes up, it takes
turns with the one that serves requests."""

CLOSE_SECONDS_MAX: Final = 2.0
"""How long the writer may take to write what is left when the process ends."""

Line = MutableMapping[str, Any]
Renderer = Callable[[Line], str]


def render_json(line: Line) -> str:
    """One JSON object; what JSON cannot say is said as text."""
    try:
        return msgspec.json.encode(line, enc_hook=repr).decode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(line, default=repr)


class _Console:
    """Lines for people, as structlog shows them."""

    def __init__(self, *, colors: bool) -> None:
        self._render = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)

    def __call__(self, line: Line) -> str:
        shown: Line = {key: value for key, value in line.items() if value is not None}
        for key, value in shown.items():
            if key.endswith("_seconds") and isinstance(value, float):
                shown[key] = round(value, 3)
        return str(self._render(None, "", shown))


class _File:
    """A log file that is opened again when it was moved or removed (by logrotate, say).

    It looks before each write: who ships the file's lines (Alloy, say) reads a moved file to its end and then turns to
    the new one, so whatever came into the old one later would be lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def write(self, text: str) -> None:
        if self._was_rotated():
            old = self._file
            self._open()
            old.close()
        data = text.encode("utf-8", "backslashreplace")
        if self._torn:  # by a disk that was full: do not let it spoil the next line
            data = b"\n" + data
        while data:
            written = self._file.write(data)
            self._torn = written < len(data)
            data = data[written:]

    def flush(self) -> None:
        """Nothing is buffered: what a full disk did not take is lost, not piled up."""

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)
        self._torn = False
        self._identity = os.fstat(self._file.fileno())

    def _was_rotated(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), self._identity)
        except FileNotFoundError:
            return True


class _Sink(Protocol):
    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def close(self) -> object: ...


class _Lane:
    """One sink, the thread that writes to it, and the queue before that."""

    def __init__(self, sink: _Sink, render: Renderer, *, closes: bool) -> None:
        self.dropped = 0
        self._sink = sink
        self._render = render
        self._closes = closes
        self._lines: SimpleQueue[Line | None] = SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trioproxy-log", daemon=True)
        self._thread.start()

    def put(self, line: Line) -> None:
        if self._lines.qsize() >= QUEUED_LINES_MAX:
            self.dropped += 1
        else:
            self._lines.put(line)

    def stop(self) -> None:
        self._lines.put(None)
        self._stopping.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        going_on = True
        while going_on:
            lines: list[Line] = []
            line = self._lines.get()
            with suppress(Empty):
                while line is not None:
                    lines.append(line)
                    line = self._lines.get_nowait()
            self._write(lines)
            going_on = line is not None
            self._stopping.wait(GATHER_SECONDS)
        if self._closes:
            self._sink.close()

    def _write(self, lines: list[Line]) -> None:
        try:
            self._sink.write("".join([self._rendered(line) for line in lines]))
            self._sink.flush()
        except Exception:
            self.dropped += len(lines)

    def _rendered(self, line: Line) -> str:
        """One line that cannot be said must not take the others along."""
        try:
            return self._render(line) + "\n"
        except Exception:
            self.dropped += 1
            return ""


class Writer:
    """Writes lines to a stream and to a file, each in a thread of its own: neither waits for the other."""

    def __init__(self, stream: TextIO | None, render: Renderer, file: Path | None = None) -> None:
        """Raises OSError if the file cannot be opened for appending."""
        opened = None if file is None else _File(file)
        self._lanes = [] if stream is None else [_Lane(stream, render, closes=False)]
        if opened is not None:
            self._lanes.append(_Lane(opened, render_json, closes=True))

    @property
    def dropped(self) -> int:
        """How many lines were lost, because writing was too slow or failed."""
        return sum(lane.dropped for lane in self._lanes)

    def put(self, line: Line) -> None:
        """Write a line soon. Never waits."""
        for lane in self._lanes:
            lane.put(line)

    def close(self) -> None:
        """Write what is left, as long as that does not take too long."""
        for lane in self._lanes:
            lane.stop()
        ends = time.monotonic() + CLOSE_SECONDS_MAX
        for lane in self._lanes:
            lane.join(max(ends - time.monotonic(), 0))


def _stamp(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Timestamp, level and event first, so that a line can be read from its beginning."""
    second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    now = f"{_date_and_time(second)}.{nanoseconds // 1000:06d}Z"
    level = "error" if method == "exception" else method
    return {"timestamp": now, "level": level, "event": event.pop("event", ""), **event}


@lru_cache(maxsize=1)
def _date_and_time(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _traceback(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """An exception as text, under `exception`, so that one line stays one line."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    elif isinstance(info, BaseException):
        info = (type(info), info, info.__traceback__)
    if info and info[0] is not None:
        event["exception"] = "".join(traceback.format_exception(*info))
    return event


_LEVELS: Final = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)


class _FromStandardLibrary(logging.Handler):
    """Records of the standard library's logging, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, object] = {"logger": record.name}
            if record.levelno >= logging.ERROR:
                fields["error"] = record.getMessage()
            if record.exc_info:
                fields["exc_info"] = record.exc_info
            level = next(level for level in _LEVELS if record.levelno >= level or level == logging.DEBUG)
            structlog.get_logger().log(level, record.getMessage(), **fields)
        except Exception:
            self.handleError(record)


def take_over(logger: str) -> None:
    """Keep a logger of the standard library from writing with handlers of its own, whenever it gets some."""
    handler = _FromStandardLibrary()

    def redirect(record: logging.LogRecord) -> bool:
        handler.emit(record)
        return False

    logging.getLogger(logger).addFilter(redirect)


class _Output:
    """What structlog calls with the finished line."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def msg(self, **line: object) -> None:
        self._writer.put(line)

    debug = info = warning = error = critical = exception = msg


def configure(
    level: str, log_format: str | None, file: Path | None, stream: TextIO | None = None, *, file_only: bool = False
) -> Writer:
    """Send everything the process says to `stream` (default: standard output) and to `file`, or to the file alone.

    `log_format` is "json" or "console"; None chooses console on a terminal. The file is always JSON. Raises OSError if
    the file cannot be written.
    """
    stream = sys.stdout if stream is None else stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a line's odd character must not cost all that go with it
    console = stream.isatty() if log_format is None else log_format == "console"
    render = _Console(colors=stream.isatty()) if console else render_json
    writer = Writer(None if file_only else stream, render, file)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, _traceback, _stamp],
        logger_factory=lambda *_: _Output(writer),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_FromStandardLibrary()]
    set_level(level)
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    return writer


def set_level(level: str) -> None:
    """From now on, log what is at least as severe as this: debug, info, warning or error."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(threshold))
    # Libraries' debug lines would show bodies and keys.
    logging.getLogger().setLevel(max(threshold, logging.INFO))


def say_and_exit(event: str, error: str, status: int) -> NoReturn:
    """Say on standard error what keeps the process from starting, in the form that its log would have had, and end."""
    if sys.stderr.isatty():
        sys.stderr.write(f"trioproxy: {event}:\n{error}\n")
    else:
        writer = configure("info", "json", None, sys.stderr)
        structlog.get_logger().error(event, error=error)
        writer.close()
    sys.exit(status)


EVENT_OF_STATUS: Final = {
    Status.COMPLETED: "request completed",
    Status.EVICTED: "request evicted",
    Status.REJECTED: "request rejected",
    Status.TIMEOUT: "request timed out",
    Status.FAILED: "request failed",
    Status.CANCELLED: "request cancelled",
}


class RequestLog:
    """A listener that writes one line for each request that ended, and at level debug one for each step."""

    def __init__(self) -> None:
        self._bound: FilteringBoundLogger = structlog.get_logger().bind()
        self._bound_by: tuple[object, object] | None = None
        self._writers: dict[type[Event], Callable[..., None]] = {
            Ended: self._ended,
            PassedThrough: self._passed_through,
            Refused: self._refused,
            Queued: self._queued,
            Started: self._started,
            CapacityChanged: self._capacity_changed,
            WebSocketOpening: self._websocket_opening,
            WebSocketClosed: self._websocket_closed,
        }

    def __call__(self, event: Event) -> None:
        """Write what an event is worth."""
        self._writers[type(event)](event)

    @property
    def _log(self) -> FilteringBoundLogger:
        """Bound once: structlog's own would be for each line. The level, and all else, may be changed meanwhile."""
        config = structlog.get_config()
        bound_by = config["wrapper_class"], config["logger_factory"]
        if self._bound_by != bound_by:
            self._bound, self._bound_by = structlog.get_logger().bind(), bound_by
        return self._bound

    def _debug(self, event: str, request: RequestFacts, queue_seconds: float | None = None) -> None:
        if (write := self._log).is_enabled_for(logging.DEBUG):
            write.debug(event, **_known(_facts(request) | {"queue_seconds": _rounded(queue_seconds)}))

    def _queued(self, event: Queued) -> None:
        self._debug("request queued", event.request)

    def _started(self, event: Started) -> None:
        self._debug("request started", event.request, event.queue_seconds)

    def _websocket_opening(self, event: WebSocketOpening) -> None:
        self._debug("websocket opening", event.request)

    def _refused(self, event: Refused) -> None:
        # What is wrong with a priority may quote the body.
        reason = {} if event.ending is INVALID_PRIORITY else {"reason": event.error}
        ending, facts = event.ending, _known(_facts(event.request))
        self._log.info("request refused", **facts, http_status=ending.http_status, code=ending.code, **reason)

    def _capacity_changed(self, event: CapacityChanged) -> None:
        self._log.info("capacity changed", pool=event.pool, permits=event.permits, max_queue=event.max_queue)

    def _ended(self, event: Ended) -> None:
        status, outcome = event.ending.status, event.ending.outcome
        assert status is not None
        assert outcome is not None
        fields = _facts(event.request)
        fields["http_status"] = event.ending.http_status
        if event.progress is not None:
            fields |= _progress(event.progress)
        fields |= {
            "status": status.value,
            "outcome": outcome.value,
            "code": event.ending.code,
            "queue_seconds": _rounded(event.queue_seconds),
            "time_to_first_byte_seconds": _rounded(event.time_to_first_byte_seconds),
            "total_seconds": round(event.total_seconds, 6),
        }
        if status is not Status.FAILED:
            fields["error"] = None
        elif fields.get("error") is None:
            fields["error"] = f"the upstream answered with status {fields['http_status']}"
        write = self._log.info if status in (Status.COMPLETED, Status.CANCELLED) else self._log.warning
        write(EVENT_OF_STATUS[status], **_known(fields))

    def _passed_through(self, event: PassedThrough) -> None:
        fields = _facts(event.request) | _progress(event.progress)
        fields["code"] = event.ending.code
        fields["total_seconds"] = round(event.at - event.request.arrived, 6)
        write = self._log.info if event.progress.error is None else self._log.warning
        write("request passed through", **_known(fields))

    def _websocket_closed(self, event: WebSocketClosed) -> None:
        fields = _facts(event.request) | _websocket(event.progress)
        fields["total_seconds"] = round(event.at - event.request.arrived, 6)
        write = self._log.info if event.progress.error is None else self._log.warning
        write("websocket closed", **_known(fields))


def _facts(request: RequestFacts) -> dict[str, object]:
    fields: dict[str, object] = {"request_id": request.request_id}
    if isinstance(request, ScheduledRequest):
        fields |= {"priority": request.priority, "priority_level": request.priority_level, "pool": request.pool}
    fields["key"] = request.key
    fields |= {"model": request.model, "method": request.method, "path": request.path, "stream": request.stream}
    fields["bytes_in"] = request.bytes_in
    return fields


def _progress(progress: Progress) -> dict[str, object]:
    return {
        "http_status": progress.http_status,
        "bytes_out": progress.bytes_out,
        "upstream_seconds": _rounded(progress.upstream_seconds),
        "error": progress.error,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _websocket(progress: WebSocketProgress) -> dict[str, object]:
    fields = dataclasses.asdict(progress)
    # The key `outcome` is for scheduled requests alone.
    fields["websocket_outcome"] = fields.pop("outcome").value
    return fields


def _known(fields: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in fields.items() if value is not None}
