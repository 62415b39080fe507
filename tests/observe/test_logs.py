"""Logs: one JSON line for each thing worth telling, and a writer that costs nobody's time."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import pytest
import structlog

from builders import facts, scheduled
from trioproxy import errors
from trioproxy.errors import Ending, Status
from trioproxy.events import CapacityChanged, Ended, Event, PassedThrough, Progress, Queued, Refused, Started
from trioproxy.observe import logs
from trioproxy.observe.logs import RequestLog, Writer

Line = dict[str, Any]


class Log:
    """What the process has said so far."""

    def __init__(self, writer: Writer, stream: TextIO) -> None:
        self.writer = writer
        self.stream = stream

    def text(self) -> str:
        """Everything that reached the stream, once all is written."""
        self.writer.close()
        assert isinstance(self.stream, io.StringIO)
        return self.stream.getvalue()

    def lines(self) -> list[Line]:
        """The same as JSON lines."""
        return as_lines(self.text())


def as_lines(text: str) -> list[Line]:
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.split("\n")[:-1]]


@contextmanager
def configured(
    level: str = "debug", log_format: str | None = "json", file: Path | None = None, stream: TextIO | None = None
) -> Iterator[Log]:
    """The log as the commands configure it, and everything as it was afterwards."""
    root = logging.getLogger()
    handlers, root_level = root.handlers, root.level
    stream = io.StringIO() if stream is None else stream
    log = Log(logs.configure(level, log_format, file, stream), stream)
    try:
        yield log
    finally:
        log.writer.close()
        root.handlers = handlers
        root.setLevel(root_level)
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.NOTSET)
        logging.captureWarnings(capture=False)
        structlog.reset_defaults()


def wait_until(happened: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for the writer's thread, which lives in real time."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def lines_of(*events: Event, level: str = "debug") -> list[Line]:
    """What the events are worth, without the timestamps."""
    with configured(level) as log:
        request_log = RequestLog()
        for event in events:
            request_log(event)
        lines = log.lines()
    for line in lines:
        del line["timestamp"]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------------------------------------------------

REQUEST = scheduled(
    71, request_id="req_7", arrived=100.0, bytes_in=123, model="gpt-x", stream=True, path="/v1/chat/completions"
)
OF_REQUEST: Line = {
    "request_id": "req_7",
    "priority": 71,
    "priority_level": "high",
    "pool": "default",
    "model": "gpt-x",
    "method": "POST",
    "path": "/v1/chat/completions",
    "stream": True,
    "bytes_in": 123,
}


def ended(
    ending: Ending, progress: Progress | None = None, *, queue_seconds: float | None = 1.25, started: bool = False
) -> Ended:
    """An end 3.5 s after arrival."""
    return Ended(REQUEST, 103.5, ending, queue_seconds, started=started, progress=progress)


def whole(http_status: int) -> Progress:
    """An answer that went to the client from beginning to end."""
    return Progress(
        http_status=http_status,
        upstream_status=http_status,
        upstream_seconds=2.0,
        upstream_whole=True,
        bytes_out=456,
    )


def told(level: str, event: str, status: str, outcome: str, code: str, **more: object) -> Line:
    """The line of an end; a value of None is not in it."""
    line: Line = OF_REQUEST | {"level": level, "event": event, "status": status, "outcome": outcome, "code": code}
    line |= {"queue_seconds": 1.25, "total_seconds": 3.5} | more
    return {key: value for key, value in line.items() if value is not None}


ENDS: list[tuple[Ended, Line]] = [
    (
        ended(errors.COMPLETED, whole(200), started=True),
        told(
            *("info", "request completed", "completed", "success", "completed"),
            http_status=200,
            upstream_seconds=2.0,
            bytes_out=456,
        ),
    ),
    (
        ended(errors.EVICTED),
        told("warning", "request evicted", "evicted", "evicted", "evicted", http_status=503),
    ),
    (
        ended(errors.QUEUE_FULL, queue_seconds=None),
        told(
            *("warning", "request rejected", "rejected", "rejected", "queue_full"), http_status=503, queue_seconds=None
        ),
    ),
    (
        ended(errors.SHUTTING_DOWN, queue_seconds=None),
        told(
            *("warning", "request rejected", "rejected", "rejected", "shutting_down"),
            http_status=503,
            queue_seconds=None,
        ),
    ),
    (
        ended(errors.QUEUE_TIMEOUT),
        told("warning", "request timed out", "timeout", "timeout", "queue_timeout", http_status=504),
    ),
    (
        ended(errors.UPSTREAM_TIMEOUT, Progress(http_status=504, upstream_seconds=2.0), started=True),
        told(
            *("warning", "request timed out", "timeout", "timeout", "upstream_timeout"),
            http_status=504,
            upstream_seconds=2.0,
            bytes_out=0,
        ),
    ),
    (
        ended(errors.CANCELLED),
        told("info", "request cancelled", "cancelled", "cancelled", "cancelled"),
    ),
    (
        ended(errors.CANCELLED, Progress(http_status=200, upstream_seconds=2.0, bytes_out=456), started=True),
        told(
            *("info", "request cancelled", "cancelled", "cancelled", "cancelled"),
            http_status=200,
            upstream_seconds=2.0,
            bytes_out=456,
        ),
    ),
    (
        ended(errors.UPSTREAM_REFUSED, whole(529), started=True),
        told(
            *("warning", "request failed", "failed", "upstream_error", "upstream_refused"),
            error="the upstream answered with status 529",
            http_status=529,
            upstream_seconds=2.0,
            bytes_out=456,
        ),
    ),
    (
        ended(errors.UPSTREAM_UNREACHABLE, Progress(http_status=502, error="connection refused"), started=True),
        told(
            *("warning", "request failed", "failed", "upstream_error", "upstream_unreachable"),
            error="connection refused",
            http_status=502,
            bytes_out=0,
        ),
    ),
    (
        ended(errors.INTERNAL_ERROR, Progress(http_status=500, error="KeyError('x')"), started=True),
        told(
            *("warning", "request failed", "failed", "proxy_error", "internal_error"),
            error="KeyError('x')",
            http_status=500,
            bytes_out=0,
        ),
    ),
]


@pytest.mark.parametrize(("event", "expected"), ENDS, ids=[event.ending.code for event, _ in ENDS])
def test_an_end_is_one_line(event: Ended, expected: Line) -> None:
    assert lines_of(event, level="info") == [expected]


def test_every_status_has_its_line() -> None:
    assert {event.ending.status for event, _ in ENDS} == set(Status)


@pytest.mark.parametrize(
    "ending",
    [errors.COMPLETED, errors.EVICTED, errors.QUEUE_FULL, errors.SHUTTING_DOWN, errors.CANCELLED],
    ids=lambda ending: ending.code,
)
@pytest.mark.parametrize("error", [None, "an error"])
def test_who_searches_for_error_does_not_find_what_did_not_fail(ending: Ending, error: str | None) -> None:
    with configured("info") as log:
        RequestLog()(ended(ending, Progress(http_status=200, error=error), started=True))
        assert "error" not in log.text()


def test_who_searches_for_error_finds_what_failed() -> None:
    for ending in errors.ENDINGS:
        if ending.status is Status.FAILED:
            assert lines_of(ended(ending, started=True))[0]["error"]


def test_passed_through_requests_have_a_line_without_an_outcome() -> None:
    request = facts(request_id="req_8", arrived=100.0, bytes_in=0)
    expected = {
        "level": "info",
        "event": "request passed through",
        "request_id": "req_8",
        "method": "GET",
        "path": "/v1/models",
        "bytes_in": 0,
        "http_status": 404,
        "upstream_seconds": 2.0,
        "bytes_out": 456,
        "code": "completed",
        "total_seconds": 3.5,
    }
    assert lines_of(PassedThrough(request, 103.5, errors.COMPLETED, whole(404)), level="info") == [expected]


def test_a_passed_through_request_that_failed_says_why() -> None:
    progress = Progress(http_status=502, error="connection refused")
    (line,) = lines_of(PassedThrough(facts(), 1.0, errors.UPSTREAM_UNREACHABLE, progress), level="info")
    assert (line["event"], line["error"]) == ("request passed through", "connection refused")
    assert not {"outcome", "status"} & set(line)


def test_refusals_have_a_line_without_an_outcome() -> None:
    refused = Refused(facts(path="/v2"), 0.0, errors.NOT_FOUND, "There is nothing at /v2")
    (line,) = lines_of(refused, level="info")
    assert (line["http_status"], line["code"], line["path"]) == (404, "not_found", "/v2")
    assert "There is nothing at /v2" in line.values()
    assert not {"outcome", "status", "priority"} & set(line)


def test_a_change_of_capacity_is_told() -> None:
    (line,) = lines_of(CapacityChanged("default", 1.0, 7, 33), level="info")
    assert (line["pool"], line["permits"], line["max_queue"]) == ("default", 7, 33)


STEPS: list[Event] = [Queued(REQUEST, 101.0), Started(REQUEST, 102.25, 1.25, was_queued=True)]


def test_each_step_has_a_line_at_debug() -> None:
    assert lines_of(*STEPS) == [
        OF_REQUEST | {"level": "debug", "event": "request queued"},
        OF_REQUEST | {"level": "debug", "event": "request started", "queue_seconds": 1.25},
    ]


def test_the_level_decides_what_is_written() -> None:
    course = [*STEPS, *(event for event, _ in ENDS)]
    assert len(lines_of(*course, level="debug")) == len(STEPS) + len(ENDS)
    assert len(lines_of(*course, level="info")) == len(ENDS)
    assert {line["level"] for line in lines_of(*course, level="warning")} == {"warning"}
    assert lines_of(*course, level="error") == []


def test_what_is_not_known_is_not_written() -> None:
    (line,) = lines_of(Queued(scheduled(5), 1.0))
    assert set(line) == {"level", "event", "request_id", "priority", "priority_level", "pool", "method", "path"}


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_format", "encoding", "model"), [("console", "utf-8", "m\ud800"), ("json", "latin-1", "模型")]
)
def test_a_line_that_cannot_be_encoded_takes_no_other_along(log_format: str, encoding: str, model: str) -> None:
    raw = io.BytesIO()
    with configured("info", log_format, stream=io.TextIOWrapper(raw, encoding=encoding, write_through=True)) as log:
        for request_id, name in (("good", "gpt"), ("odd", model), ("next", "gpt")):
            structlog.get_logger().info("request completed", request_id=request_id, model=name)
        log.writer.close()
        assert log.writer.dropped == 0
        assert [raw.getvalue().count(word) for word in (b"good", b"odd", b"next")] == [1, 1, 1]


def test_a_line_that_cannot_be_rendered_takes_no_other_along() -> None:
    with configured("info", "json") as log:
        for value in (1, object(), 3):
            structlog.get_logger().info("something", value=value if isinstance(value, int) else Unsayable())
        log.writer.close()
        assert [line["value"] for line in log.lines()] == [1, 3]
        assert log.writer.dropped == 1


class Unsayable:
    """Has no words for itself."""

    def __repr__(self) -> str:
        raise RuntimeError


def test_a_line_begins_with_when_how_bad_and_what() -> None:
    before = datetime.now(UTC)
    with configured() as log:
        structlog.get_logger().info("something", a=1, level_of_water=2)
        (text,) = log.text().splitlines()
    line = json.loads(text)
    assert list(line) == ["timestamp", "level", "event", "a", "level_of_water"]
    assert line["timestamp"].endswith("Z")
    written = datetime.fromisoformat(line["timestamp"])
    assert written.utcoffset() == timedelta(0)
    assert before <= written <= datetime.now(UTC)


def test_a_changed_level_holds_for_lines_of_requests_too() -> None:
    with configured("info") as log:
        request_log = RequestLog()
        for level in ("info", "debug", "info"):
            logs.set_level(level)
            request_log(Queued(REQUEST, 101.0))
        assert [(line["level"], line["event"]) for line in log.lines()] == [("debug", "request queued")]


@pytest.mark.parametrize("method", ["debug", "info", "warning", "error", "critical"])
def test_a_line_says_its_level(method: str) -> None:
    with configured() as log:
        getattr(structlog.get_logger(), method)("something")
        assert [line["level"] for line in log.lines()] == [method]


ODD_VALUES = {
    "newlines": "a\nb\r\nc\u2028d\x85e",
    "quotes": '"\\',
    "nul": "\x00\x1b[31m",
    "emoji": "💥ä",
    "half a surrogate pair": "file-\udcff-\ud83d",
    "big integer": 10**30,
    "bytes": b"\xff",
    "object": object(),
    "path": Path("/x"),
    "exception": ValueError("\n"),
    "nested": {"a": [1, {"b": object()}]},
    "number as key": {1: 2},
    "not a number": float("nan"),
    "set": {1},
}


@pytest.mark.parametrize("value", ODD_VALUES.values(), ids=ODD_VALUES)
def test_whatever_is_logged_is_one_json_line(value: object) -> None:
    with configured() as log:
        structlog.get_logger().info("before")
        structlog.get_logger().info(f"odd {value}", value=value)
        structlog.get_logger().info("after")
        text = log.text()
    events = [line["event"] for line in as_lines(text)]
    assert [events[0], events[-1], len(events)] == ["before", "after", 3]
    assert log.writer.dropped == 0


def test_a_half_surrogate_pair_does_not_silence_the_neighbours() -> None:
    with configured() as log:
        for number in range(10):
            structlog.get_logger().info("fine", n=number)
        structlog.get_logger().info("odd", value="\udcff")
        assert len([line for line in log.lines() if line["event"] == "fine"]) == 10


def test_strings_come_out_as_they_went_in() -> None:
    with configured() as log:
        structlog.get_logger().info("a\nb", value="ä\r\n💥")
        assert [(line["event"], line["value"]) for line in log.lines()] == [("a\nb", "ä\r\n💥")]


def test_an_exception_is_one_line_with_its_traceback() -> None:
    with configured() as log:
        try:
            raise ValueError("first\nsecond")
        except ValueError as error:
            expected = "".join(traceback.format_exception(error))
            structlog.get_logger().exception("it broke", error=repr(error))
            structlog.get_logger().error("it broke", exc_info=error)
            structlog.get_logger().error("it broke", exc_info=(type(error), error, error.__traceback__))
            logging.getLogger("library").exception("it broke")
        structlog.get_logger().error("no exception", exc_info=True)
        *broke, without = log.lines()
    assert [line["exception"] for line in broke] == [expected] * 4
    assert {line["level"] for line in broke} == {"error"}
    assert "exception" not in without


# ---------------------------------------------------------------------------------------------------------------------
# What others say
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "name", "has_error"),
    [(20, "info", False), (30, "warning", False), (40, "error", True), (50, "critical", True)],
)
def test_the_standard_librarys_records_are_lines(level: int, name: str, has_error: bool) -> None:
    with configured() as log:
        logging.getLogger("hypercorn.error").log(level, "Running on %s (100%%)", "http://[::1]:80")
        (line,) = log.lines()
    assert line["event"] == "Running on http://[::1]:80 (100%)"
    assert (line["level"], line["logger"]) == (name, "hypercorn.error")
    assert line.get("error") == (line["event"] if has_error else None)


@pytest.mark.parametrize("level", [25, 35, 60])
def test_a_record_of_a_level_without_a_name_is_a_line_too(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    with configured() as log:
        logging.getLogger("library").log(level, "between the levels")
        assert [line["event"] for line in log.lines()] == ["between the levels"]
    assert capsys.readouterr().err == ""


def test_libraries_chatter_is_left_out() -> None:
    with configured() as log:
        logging.getLogger("library").debug("Authorization: Bearer secret")
        logging.getLogger("httpx").info("HTTP Request: POST")
        logging.getLogger("httpcore.connection").info("connect_tcp.started")
        assert log.lines() == []


@pytest.mark.parametrize(("level", "count"), [("info", 2), ("warning", 1), ("error", 0)])
def test_the_level_is_for_others_too(level: str, count: int) -> None:
    with configured(level) as log:
        logging.getLogger("library").info("hello")
        logging.getLogger("library").warning("careful")
        assert len(log.lines()) == count


def test_warnings_are_lines() -> None:
    with configured() as log, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old\nway", DeprecationWarning, stacklevel=1)
        (line,) = log.lines()
    assert "DeprecationWarning: old\nway" in line["event"]
    assert line["level"] == "warning"


# ---------------------------------------------------------------------------------------------------------------------
# Where it goes
# ---------------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_format_a_terminal_gets_a_console_and_anything_else_json() -> None:
    with configured(log_format=None) as log:
        structlog.get_logger().info("hello", a=1)
        assert log.lines()[0]["event"] == "hello"
    with configured(log_format=None, stream=Terminal()) as log:
        structlog.get_logger().info("hello", a=1)
        assert "\x1b[" in log.text()


def test_the_console_is_for_people() -> None:
    with configured(log_format="console") as log:
        structlog.get_logger().info("hello", name="ä", total_seconds=1.23456789, absent=None)
        text = log.text()
    assert text.count("\n") == 1
    assert all(part in text for part in ("info", "hello", "name=ä", "total_seconds=1.235"))
    assert "absent" not in text
    assert "\x1b[" not in text


def test_a_terminal_may_have_json() -> None:
    with configured(stream=Terminal()) as log:
        structlog.get_logger().info("hello")
        assert log.lines()[0]["event"] == "hello"


def test_the_file_is_json_whatever_the_stream_is_and_its_folders_are_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "proxy.log"
    with configured(log_format="console", file=file) as log:
        structlog.get_logger().info("hello", name="ä\n💥", total_seconds=1.23456789)
        assert "total_seconds=1.235" in log.text()
    (line,) = as_lines(file.read_text(encoding="utf-8"))
    assert (line["event"], line["name"], line["total_seconds"]) == ("hello", "ä\n💥", 1.23456789)


def test_the_file_is_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "proxy.log"
    file.write_text('{"event":"before"}\n')
    with configured(file=file):
        structlog.get_logger().info("after")
    assert [line["event"] for line in as_lines(file.read_text())] == ["before", "after"]


def test_a_line_is_in_the_file_soon(tmp_path: Path) -> None:
    file = tmp_path / "proxy.log"
    with configured(file=file):
        structlog.get_logger().info("hello")
        wait_until(lambda: file.read_text().endswith("\n"))


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    threads = threading.active_count()
    (tmp_path / "taken").write_text("")
    for file in (tmp_path / "taken" / "proxy.log", tmp_path):
        with pytest.raises(OSError, match=r"taken|directory"):
            Writer(io.StringIO(), logs.render_json, file)
    assert threading.active_count() == threads


def test_a_file_that_is_moved_back_is_written_again(tmp_path: Path) -> None:
    """Meanwhile there could be no new one."""
    path, moved = tmp_path / "proxy.log", tmp_path / "moved"
    with configured("info", "json", path) as log:
        structlog.get_logger().info("line", n=1)
        wait_until(lambda: path.read_text() != "")
        path.rename(moved)
        path.mkdir()
        structlog.get_logger().info("line", n=2)
        wait_until(lambda: log.writer.dropped == 1)
        path.rmdir()
        moved.rename(path)
        structlog.get_logger().info("line", n=3)
        log.writer.close()
        assert [line["n"] for line in as_lines(path.read_text())] == [1, 3]


@pytest.mark.parametrize(
    "take_away",
    [lambda file, moved: file.rename(moved), lambda file, moved: file.unlink()],
    ids=["moved", "removed"],
)
def test_the_file_is_opened_again_when_it_was_moved_or_removed(
    take_away: Callable[[Path, Path], object], tmp_path: Path
) -> None:
    file, moved = tmp_path / "proxy.log", tmp_path / "proxy.log.1"
    with configured(file=file) as log:
        structlog.get_logger().info("line", n=0)
        wait_until(lambda: file.read_text() != "")
        take_away(file, moved)
        structlog.get_logger().info("line", n=1)
        log.writer.close()
    assert [line["n"] for line in as_lines(file.read_text())] == [1]
    if moved.exists():
        assert [line["n"] for line in as_lines(moved.read_text())] == [0]
    assert log.writer.dropped == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sinks that fail or block
# ---------------------------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream that fails as long as it is told to."""

    failing = True

    def write(self, text: str, /) -> int:
        if self.failing:
            raise OSError(28, "No space left on device")
        return super().write(text)


class Stuck(io.StringIO):
    """A stream that blocks until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def write(self, text: str, /) -> int:
        self.entered.set()
        self.let_go.wait(10)
        return super().write(text)


@contextmanager
def writing_to(stream: TextIO, file: Path | None = None) -> Iterator[Writer]:
    writer = Writer(stream, logs.render_json, file)
    try:
        yield writer
    finally:
        writer.close()


def test_a_sink_that_fails_costs_its_own_lines_only(tmp_path: Path) -> None:
    stream, file = Broken(), tmp_path / "proxy.log"
    with writing_to(stream, file) as writer:
        writer.put({"n": 1})
        wait_until(lambda: writer.dropped == 1)
        stream.failing = False
        writer.put({"n": 2})
    assert as_lines(stream.getvalue()) == [{"n": 2}]
    assert as_lines(file.read_text()) == [{"n": 1}, {"n": 2}]
    assert writer.dropped == 1


def test_lines_beyond_the_limit_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "QUEUED_LINES_MAX", 5)
    stream = Stuck()
    with writing_to(stream) as writer:
        writer.put({"n": 0})
        assert stream.entered.wait(5)
        for number in range(1, 9):
            writer.put({"n": number})
        assert writer.dropped == 3
        stream.let_go.set()
        wait_until(lambda: stream.getvalue().count("\n") == 6)
        writer.put({"n": 9})
    assert [line["n"] for line in as_lines(stream.getvalue())] == [0, 1, 2, 3, 4, 5, 9]
    assert writer.dropped == 3


def test_closing_does_not_wait_for_a_blocked_sink_longer_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logs.CLOSE_SECONDS_MAX <= 5
    monkeypatch.setattr(logs, "CLOSE_SECONDS_MAX", 0.1)
    stream = Stuck()
    writer = Writer(stream, logs.render_json)
    writer.put({"n": 0})
    assert stream.entered.wait(5)
    began = time.monotonic()
    writer.close()
    assert 0.05 < time.monotonic() - began < 1.0
    stream.let_go.set()
    wait_until(lambda: stream.getvalue() == '{"n":0}\n')


def test_closing_writes_what_is_left_and_may_happen_twice() -> None:
    stream = io.StringIO()
    writer = Writer(stream, logs.render_json)
    for number in range(1000):
        writer.put({"n": number})
    writer.close()
    writer.close()
    assert [line["n"] for line in as_lines(stream.getvalue())] == list(range(1000))


def test_lines_of_many_threads_are_all_there_and_whole() -> None:
    with configured() as log:

        def say(thread: int) -> None:
            for number in range(100):
                structlog.get_logger().info("line", thread=thread, n=number)

        threads = [threading.Thread(target=say, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = log.lines()
    for number in range(5):
        assert [line["n"] for line in lines if line["thread"] == number] == list(range(100))


def test_a_pipe_that_nobody_reads_costs_lines_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "QUEUED_LINES_MAX", 1000)
    monkeypatch.setattr(logs, "CLOSE_SECONDS_MAX", 0.1)
    reading_end, writing_end = os.pipe()
    with os.fdopen(writing_end, "w", encoding="utf-8") as pipe:
        writer = Writer(pipe, logs.render_json)
        slowest = 0.0
        for number in range(5000):
            began = time.monotonic()
            writer.put({"n": number, "padding": "x" * 200})
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 0.5
        assert 0 < writer.dropped < 5000
        began = time.monotonic()
        writer.close()
        assert time.monotonic() - began < 1.0
        received = bytearray()
        reader = threading.Thread(target=_drain, args=(reading_end, received))
        reader.start()
        wait_until(lambda: received.count(b"\n") + writer.dropped == 5000)
    reader.join()
    numbers = [line["n"] for line in as_lines(received.decode())]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0


def _drain(reading_end: int, received: bytearray) -> None:
    with os.fdopen(reading_end, "rb", buffering=0) as pipe:
        while piece := pipe.read(65536):
            received += piece


def test_a_line_torn_by_a_full_disk_does_not_spoil_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "proxy.log"
    file = logs._File(path)
    real = file._file

    class Full:
        def write(self, data: bytes) -> int:
            real.write(data[:5])
            monkeypatch.setattr(file, "_file", Fuller())
            return 5

    class Fuller:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        file.write("torn line\n")
    monkeypatch.setattr(file, "_file", real)
    file.write("whole line\n")
    file.close()
    assert path.read_text() == "torn \nwhole line\n"
