"""The demo as a user sees it: under a pseudo-terminal that is resized, paused and closed."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx
import pytest

from processes import free_port

ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"
FRAME = "\x1b[?2026h"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
PAUSE, RESUME = b"\x13", b"\x11"
"""Ctrl-S and Ctrl-Q."""

PATIENCE: Final = 60.0
"""Seconds, against hanging."""


class Terminal:
    """The other end of the terminal that the demo runs on."""

    def __init__(self, master: int, process: subprocess.Popen[bytes], url: str) -> None:
        self.master = master
        self.process = process
        self.url = url
        self._raw = b""

    @property
    def output(self) -> str:
        """What it has printed so far, without styles."""
        return STYLE.sub("", self._raw.decode(errors="ignore"))

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds: float, until: Callable[[str], object] = lambda output: False) -> bool:
        """Take what it prints, for so long or until what has been printed is enough; whether it was."""
        deadline = time.monotonic() + seconds
        while not until(self.output):
            ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return False
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux says so when the other end has been closed
                return bool(until(self.output))
            self._raw += data
        return True

    def frames(self) -> int:
        return self.output.count(FRAME)

    def end(self) -> str:
        """Its last words, after it has left the page; fails if it does not end well."""
        self.read(PATIENCE)
        assert self.process.wait(PATIENCE) == 0
        return self.output.rpartition(LEAVE)[2]


@contextmanager
def on_a_terminal(
    tmp_path: Path, columns: int = 80, rows: int = 24, term: str = "xterm-256color"
) -> Iterator[Terminal]:
    port = free_port()
    command = [sys.executable, "-m", "trioproxy", "demo", "--speed", "4", "--seed", "1"]
    command += ["--bind", f"127.0.0.1:{port}", "--log-file", str(tmp_path / "proxy.log")]
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment | {"TERM": term}, start_new_session=True
    ) as process:
        os.close(slave)
        try:
            yield Terminal(master, process, f"http://127.0.0.1:{port}")
        finally:
            process.kill()
            os.close(master)


def completed(terminal: Terminal) -> int:
    metrics = httpx.get(f"{terminal.url}/metrics", trust_env=False, timeout=PATIENCE).text
    return sum(
        int(float(line.split()[-1]))
        for line in metrics.splitlines()
        if "requests_total" in line and '"completed"' in line
    )


def test_it_shows_a_live_page_and_then_the_summary(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as terminal:
        assert terminal.read(PATIENCE, lambda output: "critical waits ≤ " in output)
        assert terminal.output.startswith(ENTER)
        began, before = time.monotonic(), terminal.frames()
        assert terminal.read(PATIENCE, lambda output: output.count(FRAME) >= before + 4)
        terminal.read(0.2)
        assert terminal.frames() - before <= 8 * (time.monotonic() - began) + 1
        assert "─" * 90 not in terminal.output
        terminal.resize(120, 40)
        assert terminal.read(PATIENCE, lambda output: "─" * 90 in output)
        terminal.process.send_signal(signal.SIGINT)
        last_words = terminal.end()
    assert "cancelled  open" in last_words
    assert "first come, first served" in last_words
    assert "\x1b" not in last_words


def test_a_paused_terminal_does_not_pause_the_proxy(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as terminal:
        assert terminal.read(PATIENCE, lambda output: "critical waits ≤ " in output)
        os.write(terminal.master, PAUSE)
        terminal.read(0.3)
        frames, before = terminal.frames(), completed(terminal)
        patience = time.monotonic() + PATIENCE
        while completed(terminal) < before + 5:
            assert time.monotonic() < patience
            terminal.read(0.2)
        terminal.read(1)
        assert terminal.frames() == frames
        os.write(terminal.master, RESUME)
        assert terminal.read(PATIENCE, lambda output: output.count(FRAME) > frames + 1)
        terminal.process.send_signal(signal.SIGTERM)
        assert "cancelled  open" in terminal.end()


def test_a_closed_terminal_ends_it(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as terminal:
        assert terminal.read(PATIENCE, lambda output: "critical waits ≤ " in output)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, terminal.master)
        os.close(nothing)
        assert terminal.process.wait(PATIENCE) == 1
    lines = [json.loads(line) for line in (tmp_path / "proxy.log").read_text().splitlines()]
    assert lines[-1]["event"] == "stopped"
    assert not [line for line in lines if "Traceback" in json.dumps(line)]


@pytest.mark.parametrize(("columns", "rows"), [(20, 5), (200, 60)])
def test_any_size_will_do(tmp_path: Path, columns: int, rows: int) -> None:
    with on_a_terminal(tmp_path, columns, rows) as terminal:
        assert terminal.read(PATIENCE, lambda output: output.count(FRAME) > 4)
        terminal.process.send_signal(signal.SIGINT)
        assert "cancelled  open" in terminal.end()
    positions = [int(row) for row in re.findall(r"\x1b\[(\d+)H", terminal.output)]
    assert max(positions) <= rows
    lines = re.findall(r"\x1b\[\d+H(.*?)\x1b\[K", terminal.output)
    assert max(map(len, lines)) < columns


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path, term="dumb") as terminal:
        assert terminal.read(PATIENCE, lambda output: re.search(r"^ +1 s  slots", output, re.M))
        terminal.process.send_signal(signal.SIGINT)
        terminal.end()
    assert "\x1b" not in terminal.output
    assert "What you will see, each second" in terminal.output
