"""The demo: its counting and its words from made-up events, and the real command as a user runs it."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from trioproxy import errors
from trioproxy.cli import main
from trioproxy.demo import traffic
from trioproxy.demo.show import Watch, percentile, summary
from trioproxy.errors import Ending
from trioproxy.events import Ended, PassedThrough, Progress, Queued, RequestFacts, ScheduledRequest, Started
from trioproxy.priority import BY_NAME, LEVELS

END_SECONDS_MAX = 2.0


def request(level: str) -> ScheduledRequest:
    return ScheduledRequest(
        request_id="r", method="POST", path="/v1/chat/completions", arrived=0.0, priority=BY_NAME[level]
    )


def ended(made: ScheduledRequest, ending: Ending, *, started: bool = False) -> Ended:
    return Ended(made, 8.0, ending, 0.0, started=started)


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([3.0], 0.99, 3.0),
        ([2.0, 1.0], 0.5, 1.0),
        ([2.0, 1.0], 0.51, 2.0),
        ([2.0, 1.0], 0, 1.0),
        (list(map(float, range(1, 101))), 0.99, 99.0),
        (list(map(float, range(1, 102))), 0.99, 100.0),
        (list(map(float, range(1, 101))), 1, 100.0),
    ],
)
def test_a_percentile_is_the_smallest_value_that_enough_values_do_not_exceed(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_there_is_no_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 0.5))


def test_an_eviction_names_both_sides_and_equal_happenings_share_a_line() -> None:
    watch = Watch()
    for _ in range(2):
        victim, newcomer = request("very_low"), request("high")
        watch(Queued(victim, 0.0))
        watch(ended(victim, errors.EVICTED))
        watch(Queued(newcomer, 0.0))
    watch(ended(request("low"), errors.QUEUE_FULL))
    assert words("\n".join(watch.take_notes())) == [
        ["evicted", "2", "very_low", "by", "high"],
        ["rejected", "1", "low"],
    ]
    assert watch.take_notes() == []


def test_it_is_noted_whom_a_critical_request_overtook() -> None:
    watch = Watch()
    for _ in range(3):
        watch(Queued(request("normal"), 0.0))
    urgent = request("critical")
    watch(Queued(urgent, 1.0))
    assert "queue 4/12 (1 critical, 3 normal)" in watch.status_line()
    watch(Started(urgent, 1.25, 0.25, was_queued=True))
    assert words("\n".join(watch.take_notes())) == words("overtook 1 critical past 3 others in 0.25 s")
    assert "slots 1/4  queue 3/12 (3 normal)" in watch.status_line()


def test_other_ends_are_noted_too() -> None:
    watch = Watch()
    for ending in (errors.QUEUE_TIMEOUT, errors.CANCELLED, errors.UPSTREAM_BROKE_OFF, errors.COMPLETED):
        watch(ended(request("high"), ending, started=True))
    facts = RequestFacts(request_id="r", method="GET", path="/v1/models", arrived=0.0)
    watch(PassedThrough(facts, 1.0, errors.COMPLETED, Progress()))
    assert words("\n".join(watch.take_notes())) == [
        ["timed", "out", "1", "high", "after", "8", "s"],
        ["cancelled", "1", "high", "while", "it", "ran"],
        ["failed", "1", "high"],
    ]
    assert watch.status_line().endswith("served 1  passed through 1")


def test_the_summary_has_every_level_and_says_what_it_means() -> None:
    watch = Watch()
    for wait in (0.1, 0.2):
        made = request("critical")
        watch(Started(made, wait, wait, was_queued=False))
        watch(ended(made, errors.COMPLETED, started=True))
    watch(ended(request("very_low"), errors.QUEUE_FULL))
    watch(Queued(request("very_low"), 0.0))
    watch.close()
    watch(ended(request("very_low"), errors.QUEUE_FULL))
    text = summary(watch)
    assert words(text)[:6] == [
        *words("level sent served evicted rejected cancelled open wait p50 p99 max ms"),
        *words("critical 2 2 0 0 0 0 100 200 200"),
        *words("high 0 0 0 0 0 0 - - -"),
        *words("normal 0 0 0 0 0 0 - - -"),
        *words("low 0 0 0 0 0 0 - - -"),
        *words("very_low 2 0 0 1 0 1 - - -"),
    ]
    assert "critical: 2 of 2 served, waiting p99 0.20 s; very_low: 0 of 2 served." in text
    assert "Evicted or rejected: none of the 2 critical, high ones; 1 of the 2 normal, low, very_low ones." in text


def test_rare_ends_have_a_column_only_if_there_were_any() -> None:
    watch = Watch()
    assert "Nothing was sent" in summary(watch)
    watch(ended(request("low"), errors.QUEUE_TIMEOUT))
    assert "timeout" in summary(watch).splitlines()[0]
    assert "failed" not in summary(watch).splitlines()[0]


def test_the_crowds_are_of_every_level_and_ask_for_more_than_there_is() -> None:
    given = {crowd.header or crowd.field for crowd in traffic.CROWDS}
    assert {"critical", "high", "low", BY_NAME["very_low"], None} <= given
    assert any(crowd.header for crowd in traffic.CROWDS)
    assert any(crowd.field for crowd in traffic.CROWDS)
    assert 1.5 <= traffic.offered_load(seconds_per_request=0.8, slots=4) <= 2


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Run:
    """The command, running."""

    def __init__(self, process: subprocess.Popen[str], url: str, log_file: Path) -> None:
        self.process = process
        self.url = url
        self.log_file = log_file

    def read_until(self, pattern: str) -> None:
        """Read its output, line by line, until one matches."""
        assert self.process.stdout
        while not re.search(pattern, line := self.process.stdout.readline()):
            assert line, "it ended too early"

    def finish(self) -> str:
        """The rest of its output; fails if it does not end well."""
        output, errors = self.process.communicate(timeout=10)
        assert (self.process.returncode, errors) == (0, "")
        return output


@contextmanager
def running(tmp_path: Path, *arguments: str) -> Iterator[Run]:
    port = free_port()
    log_file = tmp_path / "made" / "proxy.log"
    command = [sys.executable, "-m", "trioproxy", "demo", "--bind", f"127.0.0.1:{port}", "--log-file", str(log_file)]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            yield Run(process, f"http://127.0.0.1:{port}", log_file)
        finally:
            process.kill()


def test_it_shows_evictions_leaves_a_log_and_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The user's environment has no say.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TRIOPROXY_SCHEDULER__CONCURRENCY", "nonsense")
    with (
        running(tmp_path, "--duration", "4", "--seed", "1") as demo,
        httpx.Client(base_url=demo.url, trust_env=False) as client,
    ):
        demo.read_until(r"^ +2 s  slots ")
        metrics = client.get("/metrics").text
        asked = client.post("/v1/chat/completions", headers={"x-priority": "100"}, json={"model": "m", "messages": []})
        output = demo.finish()
    assert asked.status_code == 200
    assert re.search(r'^openai_proxy_requests_evicted_total\{.*evicted_priority="very_low".*\} [1-9]', metrics, re.M)
    assert re.search(r"^ +(evicted +.*[0-9]+ very_low by|rejected +[0-9]+) ", output, re.M)
    assert [row[0] for row in words(output) if row and row[0] in LEVELS] == list(LEVELS[::-1])
    lines = [json.loads(line) for line in demo.log_file.read_text().splitlines()]
    assert {"request evicted", "request completed", "request passed through", "stopped"} <= {
        line["event"] for line in lines
    }
    assert not [line for line in lines if "error" in line]
    assert not [line for line in lines if line["event"] == "request evicted" and line["priority"] > 50]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_summary(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as demo:
        demo.read_until(r"^ +1 s  slots 4/4")
        demo.process.send_signal(number)
        began = time.monotonic()
        output = demo.finish()
    assert time.monotonic() - began < END_SECONDS_MAX
    assert "wait p50" in output
    assert re.search(r"^critical: \d+ of \d+ served", output, re.M)


def test_a_signal_while_it_starts_ends_it_too(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        # The file is made right before the signals are listened to.
        while not demo.log_file.exists():
            time.sleep(0.001)
        time.sleep(0.02)
        demo.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert "wait p50" in demo.finish()
    assert time.monotonic() - began < END_SECONDS_MAX


def test_it_ends_quietly_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        demo.read_until(r"^ +1 s  slots")
        assert demo.process.stdout
        assert demo.process.stderr
        demo.process.stdout.close()
        demo.process.wait(timeout=5)
        assert demo.process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--duration", "0"], "--duration"),
        (["--duration", "nan"], "--duration"),
        (["--duration", "soon"], "--duration"),
        (["--bind", "8080"], "--bind"),
        (["--bind", "unix:/tmp/x"], "--bind"),
        (["--log-file", "/dev/null/proxy.log"], "--log-file"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["demo", "--log-file", str(tmp_path / "proxy.log"), *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr


def test_it_listens_at_each_address(tmp_path: Path) -> None:
    second = f"127.0.0.1:{free_port()}"
    with running(tmp_path, "--bind", second) as demo:
        demo.read_until(r"^ +1 s  slots")
        for url in (demo.url, f"http://{second}"):
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with running(tmp_path) as demo, socket.socket() as sock:
        sock.bind(("127.0.0.1", int(demo.url.rpartition(":")[2])))
        sock.listen()
        output, errors = demo.process.communicate(timeout=10)
    assert (demo.process.returncode, output) == (1, "")
    assert re.fullmatch(r"trioproxy: cannot listen on 127\.0\.0\.1:\d+: Address already in use; .*--bind\n", errors)
