"""Much at once, against a process of its own: a gigabyte each way, ten thousand in the queue, ten thousand aborted."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import figures
import pytest
import trio
from case import CHAT, chat, get, request

from processes import Process, running
from support import until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

MB: Final = 1_000_000
GIGABYTE: Final = 1000 * MB
GROWTH_MAX: Final = 32 * 1024 * 1024
BLOCK: Final = bytes(1 << 18)
MANY: Final = 10_000
PATIENCE: Final = 120.0
"""Seconds, against hanging: how long ten thousand of anything take is the machine's affair."""
SETTINGS: Final = {
    "TRIOPROXY_SERVER__BIND": "127.0.0.1:0",
    "TRIOPROXY_SERVER__BACKLOG": "4096",
    "TRIOPROXY_SCHEDULER__CONCURRENCY": "8",
    "TRIOPROXY_SCHEDULER__MAX_QUEUE": "20000",
    "TRIOPROXY_LOGGING__LEVEL": "warning",
}
Handler = Callable[[trio.SocketStream], Awaitable[object]]


class Watched:
    """A proxy in its own process, and what the kernel knows of it."""

    def __init__(self, process: Process, port: int) -> None:
        self.port = port
        self._streams: set[trio.SocketStream] = set()
        self._folder = Path(f"/proc/{process.process.pid}")

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        return int((self._folder / "statm").read_text().split()[1]) * 4096

    @property
    def descriptors(self) -> int:
        """Open ones."""
        return len(list((self._folder / "fd").iterdir()))

    async def connect(self) -> trio.SocketStream:
        """A connection to it, closed at the end at the latest."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Close what `connect` has opened."""
        for stream in self._streams:
            stream.socket.close()

    async def metric(self, name: str) -> float:
        """One of its own metrics."""
        stream = await self.connect()
        async with stream:
            await stream.send_all(get("/metrics", "Connection: close"))
            text = b"".join([data async for data in stream]).decode().partition("\r\n\r\n")[2]
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    async def reaches(self, name: str, value: float) -> None:
        """Wait until one of its metrics has that value."""
        with trio.fail_after(PATIENCE):
            while await self.metric(name) != value:  # noqa: ASYNC110 - nobody tells us
                await trio.sleep(0.2)


@asynccontextmanager
async def watched(handler: Handler) -> AsyncIterator[Watched]:
    """A proxy in front of an upstream that treats every connection in one way."""

    async def treat(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await handler(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1000)
        nursery.start_soon(trio.serve_listeners, treat, listeners)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/v1"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        variables = SETTINGS | {"TRIOPROXY_UPSTREAM__BASE_URL": url, "TRIOPROXY_SERVER__BIND": f"127.0.0.1:{port}"}
        async with running("-m", "trioproxy", "serve", variables=variables) as process:
            proxy = Watched(process, port)
            await until(lambda: _listens(port))
            for _ in range(20):  # what is loaded and filled with first use is no growth
                await proxy.metric("openai_proxy_queue_size{")
            try:
                yield proxy
            finally:
                proxy.close()
            assert b"Traceback" not in process.output, process.output[-3000:]
        nursery.cancel_scope.cancel()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@asynccontextmanager
async def growth(proxy: Watched, name: str, size: int = 0) -> AsyncIterator[list[int]]:
    """Watch the memory while something goes on; the most it has grown."""
    before, most = proxy.resident, [0]

    async def watch() -> None:
        while True:
            most[0] = max(most[0], proxy.resident - before)
            await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        began = time.perf_counter()
        yield most
        seconds = time.perf_counter() - began
        nursery.cancel_scope.cancel()
    rate = f", {size / seconds / MB:.0f} MB/s" if size else ""
    figures.note(f"{name}: memory grew by {most[0] / 2**20:.1f} MiB at most, {seconds:.1f} s{rate}")


async def _read_head(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive_some() or b"\r\n\r\n"
    return data


@pytest.mark.parametrize("framing", ["Content-Length", "chunked"])
async def test_a_gigabyte_down(framing: str) -> None:
    """Item 2: at most 32 MB more memory, also while the client stops and while the upstream stops."""
    chunk = b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK)
    blocks = GIGABYTE // len(BLOCK)

    async def send(stream: trio.SocketStream) -> None:
        await _read_head(stream)
        length = b"Content-Length: %d" % (blocks * len(BLOCK))
        field = length if framing == "Content-Length" else b"Transfer-Encoding: chunked"
        await stream.send_all(b"HTTP/1.1 200 OK\r\n" + field + b"\r\n\r\n")
        for number in range(blocks):
            await stream.send_all(BLOCK if framing == "Content-Length" else chunk)
            if number == blocks // 2:
                await trio.sleep(0.5)
        if framing == "chunked":
            await stream.send_all(b"0\r\n\r\n")
        await trio.sleep_forever()

    async with (
        watched(send) as proxy,
        growth(proxy, f"1 GB down ({framing}), client and upstream stop once", GIGABYTE) as most,
    ):
        stream = await proxy.connect()
        await stream.send_all(chat(b"{}", "Connection: close"))
        received, paused = 0, False
        while data := await stream.receive_some(1 << 20):
            received += len(data)
            if received > GIGABYTE // 4 and not paused:
                paused = True
                await trio.sleep(1)
        assert received >= blocks * len(BLOCK)
    assert most[0] <= GROWTH_MAX


async def test_a_gigabyte_up() -> None:
    """Item 2: passed-through uploads stream, also while the upstream stops (for so long that some is read ahead)."""
    blocks = GIGABYTE // len(BLOCK)

    async def take(stream: trio.SocketStream) -> None:
        received, paused = len((await _read_head(stream)).partition(b"\r\n\r\n")[2]), False
        while received < blocks * len(BLOCK):
            received += len(await stream.receive_some(1 << 20))
            if received > GIGABYTE // 4 and not paused:
                paused = True
                await trio.sleep(2.5)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with watched(take) as proxy, growth(proxy, "1 GB up, upstream and client stop once", GIGABYTE) as most:
        stream = await proxy.connect()
        await stream.send_all(request("POST", "/v1/files", f"Content-Length: {blocks * len(BLOCK)}"))
        for number in range(blocks):
            await stream.send_all(BLOCK)
            if number == blocks // 2:
                await trio.sleep(0.5)
        assert b" 200 " in await _read_head(stream)
    assert most[0] <= GROWTH_MAX


async def test_a_side_that_stops_for_good() -> None:
    """Item 2: 20 clients that stop reading endless answers, and an upload that nobody takes."""

    async def treat(stream: trio.SocketStream) -> None:
        head = await _read_head(stream)
        if b"/files" in head:
            await trio.sleep_forever()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await stream.send_all(b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK))

    async with watched(treat) as proxy, trio.open_nursery() as nursery:

        async def stop_reading() -> None:
            stream = await proxy.connect()
            await stream.send_all(get("/v1/endless"))
            await _read_head(stream)
            await trio.sleep_forever()

        async def send_on() -> None:
            stream = await proxy.connect()
            await stream.send_all(request("POST", "/v1/files", "Content-Length: 1000000000"))
            while True:
                await stream.send_all(BLOCK)

        async with growth(proxy, "20 clients that stop reading for good") as most:
            for _ in range(20):
                nursery.start_soon(stop_reading)
            await trio.sleep(2)
        assert most[0] <= GROWTH_MAX
        async with growth(proxy, "one upload that nobody takes") as most:
            nursery.start_soon(send_on)
            await trio.sleep(2.5)
        assert most[0] <= GROWTH_MAX
        nursery.cancel_scope.cancel()


async def test_ten_thousand_in_the_queue() -> None:
    """Item 4: accepted, cheap; most of them leave at once, the others are served, and all is as before."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    gate = trio.Event()

    async def treat(stream: trio.SocketStream) -> None:
        while b"\r\n\r\n" in await stream.receive_some():
            await gate.wait()
            await stream.send_all(answer)

    async with watched(treat) as proxy:
        descriptors, memory = proxy.descriptors, proxy.resident
        body = chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 900}]}).encode())
        clients: list[trio.SocketStream] = []
        began = time.perf_counter()
        limit = trio.CapacityLimiter(200)

        async def ask() -> None:
            async with limit:
                stream = await proxy.connect()
                await stream.send_all(body)
                clients.append(stream)

        async with trio.open_nursery() as nursery:
            for _ in range(MANY + 8):
                nursery.start_soon(ask)
        sent = time.perf_counter() - began
        await proxy.reaches("openai_proxy_queue_size{", MANY)
        queued = time.perf_counter() - began
        each = (proxy.resident - memory) / MANY / 1024
        figures.note(f"10,000 queued: sent in {sent:.1f} s, all queued after {queued:.1f} s, {each:.1f} KiB each")
        probe = await proxy.connect()
        began = time.perf_counter()
        await probe.send_all(get("/health"))
        await _read_head(probe)
        await probe.aclose()
        figures.note(f"10,000 queued: /health after {1000 * (time.perf_counter() - began):.1f} ms")
        staying = [*clients[:8], *clients[8::10]]
        leaving = [stream for number, stream in enumerate(clients[8:]) if number % 10]
        began = time.perf_counter()
        for stream in leaving:
            stream.socket.close()
        await proxy.reaches("openai_proxy_queue_size{", MANY - len(leaving))
        left = time.perf_counter() - began
        gate.set()
        answered = 0
        for stream in staying:
            with trio.fail_after(PATIENCE):
                answered += b" 200 " in await _read_head(stream)
            stream.socket.close()
        served = time.perf_counter() - began - left
        assert answered >= len(staying) - 8  # some of the first may have left with their slots
        await proxy.reaches("openai_proxy_available_permits{", 8)
        await until(lambda: proxy.descriptors <= descriptors + 8, PATIENCE)
        figures.note(
            f"10,000 queued: {len(leaving)} left in {left:.1f} s, {len(staying)} served in {served:.1f} s, "
            f"then {(proxy.resident - memory) / 2**20:.0f} MiB more than before"
        )
        assert each < 64


async def test_ten_thousand_aborted() -> None:
    """Item 4: as many descriptors after as before, whichever way and whenever the clients leave."""

    async def treat(stream: trio.SocketStream) -> None:
        while data := await stream.receive_some():
            if b"stream" in data:
                await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")

    async with watched(treat) as proxy:
        descriptors = proxy.descriptors
        sends = (
            chat(),
            get("/v1/models"),
            chat(b'{"stream": true}'),
            request("POST", CHAT, "Content-Length: 9"),
            b"GE",
        )
        limit = trio.CapacityLimiter(50)

        async def abort(number: int) -> None:
            async with limit:
                stream = await proxy.connect()
                await stream.send_all(sends[number % len(sends)])
                await trio.sleep(0.01 * (number % 4))
                if number % 3 == 0:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stream.socket.close()

        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(MANY):
                nursery.start_soon(abort, number)
        seconds = time.perf_counter() - began
        await proxy.reaches("openai_proxy_available_permits{", 8)
        await proxy.reaches("openai_proxy_queue_size{", 0)
        await until(lambda: proxy.descriptors <= descriptors, PATIENCE)
        figures.note(f"10,000 aborted in {seconds:.1f} s: descriptors {descriptors} before, {proxy.descriptors} after")
        assert await proxy.metric("openai_proxy_invariant_violations_total") == 0
