"""Real processes for tests: started, listened to, signalled, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import trio

from support import until

NO_VARIABLES: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass
class Process:
    """A running process and what it has printed."""

    process: trio.Process
    output: bytes = b""
    """Standard output and standard error, as they came."""
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The whole lines so far, each of which must be a JSON object."""
        return [json.loads(line) for line in self.output.split(b"\n")[:-1]]

    async def line(self, event: str) -> dict[str, Any]:
        """Wait for the line of that event."""
        await until(lambda: any(line["event"] == event for line in self.lines) or self.ended.is_set(), 60)
        return next(line for line in self.lines if line["event"] == event)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def end(self) -> int:
        """Wait for its end; the exit status."""
        with trio.fail_after(60):
            await self.ended.wait()
            return await self.process.wait()

    async def listen(self) -> None:
        """Collect what it prints until it ends."""
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self.output += data
        self.ended.set()


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This environment without settings of the proxy and without forward proxies, and some variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIOPROXY_")}
    return {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")} | dict(variables)


@asynccontextmanager
async def running(*command: str, variables: Mapping[str, str] = NO_VARIABLES) -> AsyncIterator[Process]:
    """A Python process (`-m ...`) in the background; killed at the end if it is still there."""
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(variables),
            start_new_session=True,
        )
        running_process = Process(process)
        nursery.start_soon(running_process.listen)
        try:
            yield running_process
        finally:
            with suppress(ProcessLookupError):  # its children too: Hypercorn's workers outlive their master
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()


async def run(*command: str, variables: Mapping[str, str] = NO_VARIABLES) -> tuple[int, str]:
    """A Python process to its end: exit status and everything it printed."""
    async with running(*command, variables=variables) as process:
        status = await process.end()
        return status, process.output.decode()


def free_port() -> int:
    """A port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
