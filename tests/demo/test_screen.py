"""How the page gets onto a terminal: what is written, and what is not."""

from __future__ import annotations

import io
import re
import threading

import pytest
from rich.console import Console, ConsoleDimensions

from happened import STAGE, queued, request, started
from trioproxy.demo.page import page
from trioproxy.demo.screen import REPAIR_FRAMES, LivePage, PlainLines, choose
from trioproxy.demo.watch import Watch

POSITION = re.compile(r"\x1b\[(\d+)H(.*?)\x1b\[K", re.DOTALL)
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def take(self) -> str:
        """What was written since the last call."""
        written = self.getvalue()
        self.seek(0)
        self.truncate()
        return written


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def live(terminal: Terminal) -> LivePage:
    made = LivePage(Console(file=terminal, width=80, height=24, force_terminal=True, color_system="truecolor"))
    made.begin(STAGE)
    assert terminal.take() == ENTER
    return made


def rows(written: str) -> dict[int, str]:
    """What was written where, without styles."""
    return {int(row): STYLE.sub("", line) for row, line in POSITION.findall(written)}


def test_a_first_frame_is_the_whole_page(terminal: Terminal, live: LivePage) -> None:
    view = Watch(slots=4, places=12).view(3.0)
    live.show(view)
    written = terminal.take()
    assert "\x1b[2J" in written
    expected = [line.plain for line in page(view, STAGE, 79, 24)]
    assert rows(written) == dict(enumerate(expected, 1))


def test_later_ones_are_only_what_has_changed(terminal: Terminal, live: LivePage) -> None:
    watch = Watch(slots=4, places=12)
    live.show(watch.view(3.0))
    terminal.take()
    live.show(watch.view(3.1))
    assert rows(terminal.take()) == {}
    started(watch, request("low", "reports.1"), at=3.1)
    queued(watch, request("normal"), at=3.1)
    live.show(watch.view(3.2))
    changed = rows(terminal.take())
    assert {line.split()[0] for line in changed.values()} == {"low", "normal", "1"}


def test_now_and_then_everything_is_drawn_again(terminal: Terminal, live: LivePage) -> None:
    watch = Watch(slots=4, places=12)
    sizes = []
    for _ in range(REPAIR_FRAMES + 1):
        live.show(watch.view(3.0))
        sizes.append(len(rows(terminal.take())))
    assert sizes == [24, *[0] * (REPAIR_FRAMES - 1), 24]


def test_another_size_is_another_page(terminal: Terminal, live: LivePage) -> None:
    view = Watch(slots=4, places=12).view(3.0)
    live.show(view)
    terminal.take()
    live._console.size = ConsoleDimensions(50, 9)
    live.show(view)
    written = terminal.take()
    assert "\x1b[2J" in written
    assert set(rows(written)) == set(range(1, 9))
    assert max(map(len, rows(written).values())) <= 49


def test_nothing_is_drawn_after_the_end(terminal: Terminal, live: LivePage) -> None:
    live.end()
    assert terminal.take() == LEAVE
    live.show(Watch(slots=4, places=12).view(3.0))
    assert terminal.take() == ""


def test_the_end_waits_for_a_drawing_that_is_being_written(terminal: Terminal, live: LivePage) -> None:
    with live._writing:
        ending = threading.Thread(target=live.end)
        ending.start()
        ending.join(0.05)
        assert ending.is_alive()
        assert terminal.take() == ""
    ending.join(5)
    assert terminal.take() == LEAVE


def test_what_never_began_leaves_nothing_behind(terminal: Terminal) -> None:
    live = LivePage(Console(file=terminal))
    live.end()
    live.begin(STAGE)
    assert terminal.take() == ""


@pytest.mark.parametrize(
    ("term", "encoding", "expected"),
    [
        ("xterm-256color", "utf-8", LivePage),
        ("linux", "UTF8", LivePage),
        ("dumb", "utf-8", PlainLines),
        ("unknown", "utf-8", PlainLines),
        ("xterm", "latin-1", PlainLines),
    ],
)
def test_the_page_is_for_terminals_that_can_show_it(
    monkeypatch: pytest.MonkeyPatch, term: str, encoding: str, expected: type
) -> None:
    monkeypatch.setenv("TERM", term)
    terminal = Terminal()
    monkeypatch.setattr(Terminal, "encoding", encoding)
    assert type(choose(terminal)) is expected
    assert type(choose(io.StringIO())) is PlainLines


def test_colours_forced_do_not_make_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(choose(io.StringIO())) is PlainLines
