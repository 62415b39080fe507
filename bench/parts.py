"""What the benchmarks are made of: servers as processes, their CPU and memory, a plain upstream and plain clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import trio

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from processes import environment, free_port
from support import CHUNKED, LAST_CHUNK, chunk

HERE: Final = Path(__file__).resolve().parent
EVENT: Final = b"data: " + b"x" * 242 + b"\n\n"
"""250 bytes, about as long as one event of a streamed chat completion."""

ANSWER: Final = b'{"object": "chat.completion", "padding": "' + b"x" * 980 + b'"}'
REQUEST_BODY: Final = b'{"model": "gpt-sim", "messages": [{"role": "user", "content": "' + b"x" * 950 + b'"}]}'


START_SECONDS_MAX: Final = 120.0
"""How long a server may take, under valgrind on a busy machine too."""


class Upstream:
    """Answers as the header `X-Bench` says: `json`; `paced N` or `burst N` events; `hold` until released."""

    def __init__(self) -> None:
        self.url = ""
        self.released = trio.Event()

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
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                while len(buffer) < end + 4 + length:
                    buffer += await stream.receive_some(65536)
                buffer = buffer[end + 4 + length :]
                kind, _, count = head.partition(b"x-bench:")[2].partition(b"\r\n")[0].strip().partition(b" ")
                await self._answer(stream, kind, int(count or 0))
        except trio.BrokenResourceError:
            pass

    async def _answer(self, stream: trio.SocketStream, kind: bytes, count: int) -> None:
        if kind == b"hold":
            await self.released.wait()
        if kind in (b"json", b"hold"):
            length = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)
            await stream.send_all(b"HTTP/1.1 200 OK\r\n" + length + ANSWER)
        elif kind == b"burst":
            await stream.send_all(CHUNKED + chunk(EVENT) * count + LAST_CHUNK)
        else:
            await stream.send_all(CHUNKED)
            due = trio.current_time()
            for _ in range(count):
                due += 0.01
                await trio.sleep_until(due)
                await stream.send_all(chunk(EVENT))
            await stream.send_all(LAST_CHUNK)


def request(kind: str) -> bytes:
    """A request that the upstream answers in that way."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nX-Bench: {kind}\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(REQUEST_BODY), REQUEST_BODY)


async def ask(stream: trio.SocketStream, kind: str) -> None:
    """One request on a connection that is kept, and its whole answer."""
    await stream.send_all(request(kind))
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += await _some(stream)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    if b"chunked" in head.lower():
        while not body.endswith(LAST_CHUNK):
            body = body[-8:] + await _some(stream)
        return
    missing = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]) - len(body)
    while missing > 0:
        missing -= len(await _some(stream))


async def _some(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some(262_144)
    assert data, "the server has closed the connection"
    return data


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs in a process of its own."""

    name: str
    pid: int
    port: int

    def cpu_seconds(self) -> float:
        """What all of its threads have used so far, user and system (proc(5), schedstat)."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

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
    """A server as a process of its own, its log written to a file that nobody keeps; ended with the block.

    `under` goes before its command: a program that runs it.
    """
    port = free_port()
    arguments, needed, folder = command(name, port, upstream, extra)
    process = await trio.lowlevel.open_process(
        [*under, *arguments],
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
