"""Fixtures that several test modules share."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import figures
import pytest
import structlog
import trio

from memory import House
from support import Upstream, running_upstream

FOREVER = 100_000.0
"""Seconds after which whoever still waits will wait for ever. A clock that jumps is there at once."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what has been measured, a line for each figure."""
    if figures.LINES:
        terminalreporter.section("figures")
        for line in figures.LINES:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """Whatever a test makes of the log, the next one finds it as it was, in whatever order they run."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A scripted upstream on a real socket."""
    async with running_upstream() as running:
        yield running


@pytest.fixture
def house(nursery: trio.Nursery) -> Callable[..., House]:
    """Makes the application on a scripted upstream in memory; sections of the settings as keywords.

    A test that waits for ever on a clock that jumps is failed instead.
    """

    async def give_up() -> None:
        await trio.sleep(FOREVER)
        raise trio.TooSlowError

    nursery.start_soon(give_up)

    def build(**settings: dict[str, Any]) -> House:
        return House(nursery, **settings)

    return build
