"""Where the demo is shown: a live page on a terminal, plain lines everywhere else.

Outputs are called in a thread, one call at a time: a terminal that does not take what is written (Ctrl-S) holds up that
thread and nothing else. They raise OSError when nobody reads any more. This module must not know trio.
"""

from __future__ import annotations

import threading
from typing import Final, Protocol, TextIO

import click
from rich.console import Console
from rich.text import Text

from trioproxy.demo.lines import Stage, greeting, notes, status_line
from trioproxy.demo.page import page
from trioproxy.demo.watch import View

TICK_SECONDS: Final = 1.0
"""How often plain lines tell the happenings since then and the state."""

FRAME_SECONDS: Final = 1 / 8
"""The pause between two drawings of the page, at least."""

# DEC private modes: 1049 the alternate screen, 25 the cursor, 2026 drawing a whole frame at once, where it is known.
_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_FRAME: Final = "\x1b[?2026h{changes}\x1b[?2026l"
_LINE: Final = "\x1b[{row}H{line}\x1b[K"
_ERASE_ALL: Final = "\x1b[2J"

REPAIR_FRAMES: Final = 16
"""Every so many frames all of the page is drawn, not only what has changed: somebody may have typed into it."""


class Output(Protocol):
    """Something that shows the demo."""

    interval_seconds: float
    """How long to wait before each `show`."""

    def begin(self, stage: Stage) -> None:
        """Called once, before anything else."""
        ...

    def show(self, view: View) -> None:
        """The state at one moment."""
        ...

    def end(self) -> None:
        """Called once, whatever came before: leave everything as it was."""
        ...


class PlainLines:
    """A greeting, then a few lines every second."""

    interval_seconds = TICK_SECONDS

    def __init__(self) -> None:
        self._told = 0

    def begin(self, stage: Stage) -> None:
        """Greet."""
        click.echo(greeting(stage))

    def show(self, view: View) -> None:
        """The state, and what has happened since the last time."""
        status = f"{view.seconds:5.0f} s  {status_line(view)}"
        click.echo(f"\n{' ' * 9}".join([status, *notes(view.since(self._told))]))
        self._told = view.happened

    def end(self) -> None:
        """Nothing to be put back."""


class LivePage:
    """A page that is drawn over and over on the terminal's other screen, at whatever size the terminal has."""

    interval_seconds = FRAME_SECONDS

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: Stage | None = None
        self._size = (0, 0)
        self._drawn: list[str] = []
        self._frames = 0
        self._writing = threading.Lock()
        self._begun = False
        self._ended = False

    def begin(self, stage: Stage) -> None:
        """Go to the other screen."""
        self._stage = stage
        self._write(_ENTER)

    def show(self, view: View) -> None:
        """Draw."""
        assert self._stage is not None
        width, height = size = self._console.size
        # One column less: after a character in the last one, terminals disagree about where the cursor is.
        drawn = [self._escaped(line) for line in page(view, self._stage, max(width - 1, 1), height)]
        resized = size != self._size
        before = {} if resized or not self._frames % REPAIR_FRAMES else dict(enumerate(self._drawn))
        changes = [
            _LINE.format(row=index + 1, line=line) for index, line in enumerate(drawn) if before.get(index) != line
        ]
        self._write(_FRAME.format(changes=(_ERASE_ALL if resized else "") + "".join(changes)))
        self._size, self._drawn, self._frames = size, drawn, self._frames + 1

    def end(self) -> None:
        """Go back to the first screen, and never leave it again. If a drawing is being written, this waits for it."""
        with self._writing:
            if self._begun and not self._ended:
                self._put(_LEAVE)
            self._ended = True

    def _escaped(self, line: Text) -> str:
        with self._console.capture() as captured:
            self._console.print(line, end="", no_wrap=True, crop=False, overflow="ignore")
        return captured.get()

    def _write(self, data: str) -> None:
        with self._writing:
            # A thread that nobody waits for any more may come as late as it likes.
            if self._ended:
                return
            self._begun = True
            self._put(data)

    def _put(self, data: str) -> None:
        self._console.file.write(data)
        self._console.file.flush()


def choose(stream: TextIO) -> Output:
    """The live page if `stream` is a terminal that can show it, else plain lines."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    able = stream.isatty() and not console.is_dumb_terminal and "utf" in (stream.encoding or "").lower()
    return LivePage(console) if able else PlainLines()
