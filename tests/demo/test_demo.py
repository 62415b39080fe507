"""The demo as a user runs it, off a terminal."""

from __future__ import annotations

import json
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

from trioproxy.cli import main
from trioproxy.demo import show
from trioproxy.demo.screen import PlainLines
from trioproxy.priority import LEVELS

END_SECONDS_MAX = 2.0


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


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
        output, errors = self.process.communicate(timeout=30)
        assert (self.process.returncode, errors) == (0, "")
        return output


@pytest.fixture(autouse=True)
def hanging_up_is_not_ignored() -> Iterator[None]:
    """As under nohup, which the demo would obey."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
    assert "yours      1 critical got a slot after" in output
    assert [row[0] for row in words(output) if row and row[0] in LEVELS] == 2 * list(LEVELS[::-1])
    assert re.search(r"^Half of the critical ones waited up to \d\.\d\d s", output, re.M)
    lines = [json.loads(line) for line in demo.log_file.read_text().splitlines()]
    assert {"request evicted", "request completed", "request passed through", "stopped"} <= {
        line["event"] for line in lines
    }
    assert not [line for line in lines if "error" in line]
    assert not [line for line in lines if line["event"] == "request evicted" and line["priority"] > 50]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_the_summary(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as demo:
        demo.read_until(r"^ +1 s  slots 4/4")
        demo.process.send_signal(number)
        began = time.monotonic()
        output = demo.finish()
    assert time.monotonic() - began < END_SECONDS_MAX
    assert "cancelled  open" in output
    assert re.search(r"^critical: \d+ of \d+ served", output, re.M)


def test_a_signal_while_it_starts_ends_it_too(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        # The file is made right before the signals are listened to.
        while not demo.log_file.exists():
            time.sleep(0.001)
        time.sleep(0.02)
        demo.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert "cancelled  open" in demo.finish()
    assert time.monotonic() - began < END_SECONDS_MAX


def test_it_ends_quietly_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    with running(tmp_path) as demo:
        demo.read_until(r"^ +1 s  slots")
        assert demo.process.stdout
        assert demo.process.stderr
        demo.process.stdout.close()
        demo.process.wait(timeout=30)
        assert demo.process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--duration", "0"], "--duration"),
        (["--duration", "nan"], "--duration"),
        (["--duration", "soon"], "--duration"),
        (["--speed", "0"], "--speed"),
        (["--speed", "nan"], "--speed"),
        (["--speed", "10.5"], "--speed"),
        (["--scenario", "panic"], "--scenario"),
        (["--bind", "8080"], "--bind"),
        (["--bind", "unix:/tmp/x"], "--bind"),
        (["--log-file", "/dev/null/proxy.log"], "--log-file"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["demo", "--log-file", str(tmp_path / "proxy.log"), *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr


def test_the_terminal_is_given_back_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(PlainLines):
        ended = False

        def end(self) -> None:
            self.ended = True
            raise BrokenPipeError

    async def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    page = Page()
    monkeypatch.setattr(show, "offer", fail)
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a bug"), flatten_subgroups=True):
        show.run(show.Options(bind=("127.0.0.1:0",), log_file=tmp_path / "proxy.log"), page)
    assert page.ended


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
        output, errors = demo.process.communicate(timeout=30)
    assert (demo.process.returncode, output) == (1, "")
    assert re.fullmatch(r"trioproxy: cannot listen on 127\.0\.0\.1:\d+: Address already in use; .*--bind\n", errors)


@pytest.mark.parametrize(
    ("scenario", "one_of"),
    [
        ("calm", {"request completed"}),
        ("overload", {"request rejected"}),
        ("flaky", {"request failed", "request timed out"}),
        ("stopped", {"request cancelled"}),
    ],
)
def test_each_scenario_is_what_it_says(tmp_path: Path, scenario: str, one_of: set[str]) -> None:
    with running(tmp_path, "--scenario", scenario, "--speed", "4", "--duration", "2.5", "--seed", "1") as demo:
        output = demo.finish()
    assert f"scenario   {scenario}: " in output
    assert "at 4 times the usual speed" in output
    lines = [json.loads(line) for line in demo.log_file.read_text().splitlines()]
    assert {line["event"] for line in lines} & one_of
    if scenario == "calm":
        assert not {line["event"] for line in lines} & {"request evicted", "request rejected", "request timed out"}
    if scenario == "stopped":
        told = [line["event"] for line in lines if line.get("request_id", "sim.stopped").startswith("sim.stopped")]
        # Cut off by the proxy: they themselves would have stayed for longer than this has run.
        assert "request cancelled" in told[: told.index("shutting down")]


def test_a_nohup_that_was_asked_for_is_obeyed(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        with running(tmp_path, "--speed", "4") as demo:
            demo.read_until(r"^What you will see")
            demo.process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                demo.process.wait(0.5)
            demo.process.send_signal(signal.SIGTERM)
            demo.finish()
    finally:
        signal.signal(signal.SIGHUP, before)
