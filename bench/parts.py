"""What the benchmarks are made of: servers as processes, their CPU and memory, a plain upstream and plain clients."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Final

import trio

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from processes import environment, free_port
from support import CHUNKED, LAST_CHUNK, chunk

HERE: Final = Path(__file__).resolve().parent

MODEL: Final = "bench"
EVENT_BYTES: Final = 250
"""About as long as one event of a streamed chat completion."""

PACE_SECONDS: Final = 0.01
STAY_PACE_SECONDS: Final = 0.05
RECEIVE_MAX: Final = 262_144
START_SECONDS_MAX: Final = 120.0
"""How long a server may take, under valgrind on a busy machine too."""

_KIND: Final = re.compile(rb"bench (\w+)((?: \d+)*);")


def event(number: int, finish: str = "null") -> bytes:
    """One event of a stream, as OpenAI sends them. Each says something else: LiteLLM ends streams that repeat."""
    head, tail = (
        f'data: {{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"{MODEL}",'
        f'"choices":[{{"index":0,"delta":{{"content":" t{number:04d}"}},"finish_reason":{finish}}}],"obfuscation":"',
        '"}\n\n',
    )
    return (head + "x" * (EVENT_BYTES - len(head) - len(tail)) + tail).encode()


EVENTS: Final = tuple(chunk(event(number)) for number in range(1_000))
STREAM_END: Final = chunk(event(1_000, '"stop"')) + chunk(b"data: [DONE]\n\n") + LAST_CHUNK

ANSWER: Final = (
    f'{{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"{MODEL}","choices":[{{"index":0,'
    f'"message":{{"role":"assistant","content":"{"x" * 720}"}},"finish_reason":"stop"}}],'
    '"usage":{"prompt_tokens":240,"completion_tokens":180,"total_tokens":420}}'
).encode()
BUSY: Final = b'{"error":{"message":"busy","type":"rate_limit_error","code":"rate_limit_exceeded","param":null}}'


class Upstream:
    """Answers as the first message of a request says, since that is what every proxy passes on:

    `json` at once, `hold` once released, `wait MS` after so many milliseconds; a stream of `paced N MS` events so far
    apart, or of `burst N` events at once; `stay ID` and `silent ID` stream or say nothing until the caller has gone.

    With `slots`, at most so many of `wait` are served at once. The others stand in line, in the order in which they
    came, as before a GPU; or are refused with a 429, if there is no `line`, as by a quota.
    """

    def __init__(self, slots: int = 1_000_000, *, line: bool = True) -> None:
        self.url = ""
        self.released = trio.Event()
        self.left = defaultdict[int, trio.Event](trio.Event)
        """Set once the caller of `stay` or `silent` has gone, by ID."""
        self._slots = trio.Semaphore(slots)
        self._line = line

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2].partition("/")[0])

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on a free port of the loopback interface."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4096)
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        task_status.started()
        await trio.serve_listeners(self._connection, listeners)

    async def _connection(self, stream: trio.SocketStream) -> None:
        buffer = b""
        try:
            while True:
                while (end := buffer.find(b"\r\n\r\n")) < 0:
                    if not (data := await stream.receive_some(65536)):
                        return
                    buffer += data
                head = buffer[:end].lower()
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                while len(buffer) < end + 4 + length:
                    buffer += await stream.receive_some(65536)
                found = _KIND.search(buffer, end)
                buffer = buffer[end + 4 + length :]
                kind, numbers = (found[1].decode(), [int(word) for word in found[2].split()]) if found else ("json", [])
                await self._answer(stream, kind, numbers)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _answer(self, stream: trio.SocketStream, kind: str, numbers: list[int]) -> None:
        match kind, numbers:
            case "hold", _:
                await self.released.wait()
                await stream.send_all(whole(200, ANSWER))
            case "wait", [milliseconds]:
                await stream.send_all(await self._after(milliseconds / 1000))
            case "burst", [count]:
                await stream.send_all(CHUNKED + b"".join(EVENTS[:count]) + STREAM_END)
            case "paced", [count, *rest]:
                await stream.send_all(CHUNKED)
                await _paced(stream, count, rest[0] / 1000 if rest else PACE_SECONDS)
                await stream.send_all(STREAM_END)
            case (("stay" | "silent"), [number]):
                await self._until_left(stream, number, talking=kind == "stay")
            case _:
                await stream.send_all(whole(200, ANSWER))

    async def _after(self, seconds: float) -> bytes:
        """The answer, once a slot was had for so long; the slot is free again before the answer leaves."""
        if not self._line and not self._slots.value:
            return whole(429, BUSY)
        async with self._slots:
            await trio.sleep(seconds)
        return whole(200, ANSWER)

    async def _until_left(self, stream: trio.SocketStream, number: int, *, talking: bool) -> None:
        """Serve a caller for as long as it stays, and tell when it has left."""

        async def talk() -> None:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(CHUNKED)
                await _paced(stream, len(EVENTS), STAY_PACE_SECONDS)

        async with trio.open_nursery() as nursery:
            if talking:
                nursery.start_soon(talk)
            with suppress(trio.BrokenResourceError):
                await stream.receive_some(1)
            self.left[number].set()
            nursery.cancel_scope.cancel()
        raise trio.BrokenResourceError


async def _paced(stream: trio.SocketStream, count: int, pace_seconds: float) -> None:
    due = trio.current_time()
    for each in EVENTS[:count]:
        due += pace_seconds
        await trio.sleep_until(due)
        await stream.send_all(each)


def whole(status: int, body: bytes) -> bytes:
    """An answer that comes at once."""
    reason = {200: "OK", 429: "Too Many Requests"}[status]
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def request(kind: str, headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """A request that the upstream answers in that way, with a body of 1 KB."""
    asked = "true" if kind.partition(" ")[0] in {"paced", "burst", "stay"} else "false"
    said = f"bench {kind};".ljust(930, "x")
    body = f'{{"model": "{MODEL}", "stream": {asked}, "messages": [{{"role": "user", "content": "{said}"}}]}}'
    fields = {"Host": "bench", "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n{body}".encode()


@dataclass(slots=True)
class Answer:
    """What came back, and when, in readings of trio's clock."""

    sent: float
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    """As it came: with the frames of a chunked body."""
    events: list[float] = field(default_factory=list)
    """When something of a stream arrived: one event, or several at once."""
    ended: float = math.nan

    @property
    def gap_seconds_max(self) -> float:
        """The longest that a stream stood still, the time until its first event left out."""
        return max((after - before for before, after in pairwise([*self.events, self.ended])), default=math.inf)


async def call(stream: trio.SocketStream, asked: bytes) -> Answer:
    """One request on a connection that is kept, and its whole answer."""
    answer = Answer(trio.current_time())
    await stream.send_all(asked)
    received = b""
    while b"\r\n\r\n" not in received:
        received += await _some(stream)
    head, _, rest = received.partition(b"\r\n\r\n")
    answer.status = int(head.split(b" ", 2)[1])
    framed = b"transfer-encoding: chunked" in head.lower()
    length = 0 if framed else int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    while True:
        answer.body += rest
        if b"data: " in rest:
            answer.events.append(trio.current_time())
        if answer.body.endswith(LAST_CHUNK) if framed else len(answer.body) >= length:
            answer.ended = trio.current_time()
            return answer
        rest = await _some(stream)


async def ask(stream: trio.SocketStream, kind: str, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
    """The same, for what must be answered with a 200."""
    answer = await call(stream, request(kind, headers))
    assert answer.status == 200, bytes(answer.body)
    return answer


async def _some(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some(RECEIVE_MAX)
    if not data:
        raise ConnectionError("the server has closed the connection")
    return data


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs in a process of its own."""

    name: str
    pid: int
    port: int

    def cpu_seconds(self) -> float:
        """What all of its threads have used so far, those that have ended too, user and system."""
        return time.clock_gettime((~self.pid << 3) | 2)  # clock_getcpuclockid(3), which Python does not have

    def memory_bytes(self) -> int:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


OBVIOUS: Final = "the obvious proxy"
OURS: Final = "trioproxy"


def command(name: str, port: int, upstream: str, extra: Sequence[str]) -> tuple[list[str], dict[str, str], Path | None]:
    """How a server is started: command, environment, folder."""
    bind = f"127.0.0.1:{port}"
    if name == OBVIOUS:
        run = ["-m", "hypercorn", "--worker-class", "trio", "--bind", bind, "--keep-alive", "600", "--backlog", "4096"]
        return [sys.executable, *run, *extra, "obvious:app"], {"UPSTREAM": upstream}, HERE
    run = ["-m", "trioproxy", "serve", "--bind", bind, "--upstream", upstream, "--log-format", "json", *extra]
    return [sys.executable, *run], {}, None


@asynccontextmanager
async def running(name: str, upstream: str, *extra: str, under: Sequence[str] = ()) -> AsyncIterator[Server]:
    """The obvious proxy or ours as a process of its own, ended with the block.

    `under` goes before its command: a program that runs it.
    """
    port = free_port()
    arguments, needed, folder = command(name, port, upstream, extra)
    async with started(name, port, [*under, *arguments], needed, folder) as server:
        yield server


@asynccontextmanager
async def started(
    name: str, port: int, arguments: Sequence[str], needed: Mapping[str, str], folder: Path | None
) -> AsyncIterator[Server]:
    """A server as a process of its own, its log written to a file that nobody keeps; ended with the block."""
    process = await trio.lowlevel.open_process(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(needed),
        cwd=folder,
    )
    try:
        await accepting(port, process)
        yield Server(name, worker_of(process.pid), port)
    finally:
        process.terminate()
        with trio.move_on_after(10, shield=True):
            await process.wait()
        if process.returncode is None:
            process.kill()


def worker_of(pid: int) -> int:
    """The process that serves: Hypercorn's command may start one."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
        if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return children[-1] if children else pid


async def accepting(port: int, process: trio.Process) -> None:
    """Wait until somebody listens at the port."""
    with trio.fail_after(START_SECONDS_MAX):
        while process.poll() is None:
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
            except OSError:
                await trio.sleep(0.02)
            else:
                return
    raise RuntimeError(f"the server has ended with status {process.returncode}")


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(values):.3f} ({min(values):.3f}–{max(values):.3f})"
