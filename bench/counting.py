"""Counts what a server does, by valgrind's callgrind: instructions, and system calls by name.

Counts do not depend on what else the machine does. For them to be the same each time, everything goes in step: the
client sends its next request, and the upstream its next piece, only when the server sleeps, so that the server always
reads the same pieces, at the same places.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import trio
from parts import EVENTS, HERE, OBVIOUS, STREAM_END, Server, Upstream, ask, running

from support import CHUNKED

CLOCKS: Final = re.compile(r"clock_gettime|gettimeofday|time")
"""Valgrind makes system calls of these, which they are not elsewhere."""

LOCKS: Final = re.compile(r"\w*(futex|lll_lock|pthread_|sem_)\w*")
"""With these threads wait for each other: how often, depends on how they happen to meet."""

STEADY: Final = HERE / "steady"
"""What the server imports first."""

COMMAND_SECONDS_MAX: Final = 60.0
BATCH_SECONDS_MAX: Final = 120.0
LOOK_SECONDS: Final = 0.0005


@dataclass(frozen=True, slots=True)
class Count:
    """What was counted, for one request, chunk or whatever it was divided by."""

    instructions: float = 0.0
    calls: Mapping[str, float] = field(default_factory=dict)
    """System calls by the names of the functions that make them, readings of the clock and locks included."""

    @property
    def system_calls(self) -> float:
        """All of them, but for readings of the clock and locks."""
        return sum(n for name, n in self.calls.items() if not CLOCKS.fullmatch(name) and not LOCKS.fullmatch(name))

    def less(self, other: Count) -> Count:
        """What this did beyond the other."""
        calls = {name: self.calls.get(name, 0) - other.calls.get(name, 0) for name in {**self.calls, **other.calls}}
        return Count(self.instructions - other.instructions, calls)

    def each(self, units: int) -> Count:
        """One unit's share."""
        return Count(self.instructions / units, {name: n / units for name, n in self.calls.items()})


def typical(counts: Sequence[Count]) -> Count:
    """The median of each number."""
    names = {name for count in counts for name in count.calls}
    calls = {name: median(count.calls.get(name, 0) for count in counts) for name in names}
    return Count(median(count.instructions for count in counts), calls)


def read_dump(text: str) -> Count:
    """What callgrind has written, uncompressed and without line numbers (`events:`, `fn=`, `calls=`, costs)."""
    function, events, inclusive = "", [""], False
    instructions, calls = 0, Counter[str]()
    for line in text.splitlines():
        if line.startswith("events:"):
            events = line.split()[1:]
        elif line.startswith("fn="):
            function = line[3:].split("@")[0].strip()
        elif line.startswith("calls="):
            inclusive = True  # the next line says what the called function has cost, which is counted there
        elif line[:1].isdigit():
            if not inclusive:
                costs = dict(zip(events, map(int, line.split()[1:]), strict=False))
                instructions += costs["Ir"]
                if system_calls := costs.get("sysCount", 0):
                    calls[function] += system_calls
            inclusive = False
    return Count(instructions, calls)


def asleep(pid: int) -> bool:
    """Whether each of its threads waits for something."""
    states = [
        (task / "stat").read_bytes().rpartition(b")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return set(states) == {b"S"}


class StepByStep(Upstream):
    """Answers piece by piece, each when the server sleeps; `steps N` sends N events, each in a piece of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = 0

    async def server_sleeps(self) -> None:
        """Wait until the server has done all that there is to do."""
        while not asleep(self.pid):  # noqa: ASYNC110 - another process, which says nothing
            await trio.sleep(LOOK_SECONDS)

    async def _answer(self, stream: trio.SocketStream, kind: str, numbers: list[int]) -> None:
        await self.server_sleeps()
        if kind != "steps":
            await super()._answer(stream, kind, numbers)
            return
        for piece in (CHUNKED, *EVENTS[: numbers[0]], STREAM_END):
            await stream.send_all(piece)
            await self.server_sleeps()


class Counting:
    """A server under callgrind, and one client's connection to it."""

    def __init__(self, server: Server, upstream: StepByStep, client: trio.SocketStream, file: Path) -> None:
        self._server = server
        self._upstream = upstream
        self._client = client
        self._file = file
        self._dumped = 0

    async def begin(self, kinds: Iterable[str], warm: int) -> None:
        """Let it do everything a few times first; only then count, since counting is slow."""
        for kind in kinds:
            await self._ask(kind, warm)
        await self._command("instrumentation", "on")

    async def count(self, kind: str, requests: int, batches: int) -> Count:
        """One request's share: the median of some batches, for a timer may fall into one."""
        await self._ask(kind, 1)
        await self._dump()
        counts = []
        for _ in range(batches):
            await self._ask(kind, requests)
            counts.append((await self._dump()).each(requests))
        return typical(counts)

    async def _ask(self, kind: str, requests: int) -> None:
        with trio.fail_after(BATCH_SECONDS_MAX):
            for _ in range(requests):
                await self._upstream.server_sleeps()
                await ask(self._client, kind)
            await self._upstream.server_sleeps()

    async def _dump(self) -> Count:
        """What was counted since the last time."""
        await self._command("dump")
        self._dumped += 1
        return read_dump(await trio.Path(f"{self._file}.{self._dumped}").read_text("utf-8", "replace"))

    async def _command(self, *words: str) -> None:
        command = ["vgdb", f"--pid={self._server.pid}", *words]
        with trio.move_on_after(COMMAND_SECONDS_MAX):
            await trio.run_process(command, capture_stdout=True, capture_stderr=True)
            return
        raise RuntimeError("valgrind does not answer vgdb; is ptrace(2) forbidden here?")


@asynccontextmanager
async def counting(name: str) -> AsyncIterator[Counting]:
    """A server of that name under callgrind, with everything switched on."""
    upstream = StepByStep()
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        file = Path(folder) / "dump"
        callgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-systime=yes"]
        written = ["--compress-strings=no", "--compress-pos=no", "--dump-line=no", f"--callgrind-out-file={file}"]
        under = ["env", "PYTHONHASHSEED=0", f"PYTHONPATH={STEADY}", *callgrind, *written]
        extra = ("--workers", "0") if name == OBVIOUS else ()  # in one process: valgrind does not follow into another
        async with trio.open_nursery() as nursery:
            await nursery.start(upstream.serve)
            async with running(name, upstream.url, *extra, under=under) as server:
                upstream.pid = server.pid
                async with await trio.open_tcp_stream("127.0.0.1", server.port) as client:
                    yield Counting(server, upstream, client, file)
            nursery.cancel_scope.cancel()
