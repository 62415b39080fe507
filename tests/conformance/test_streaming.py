"""Streams in both directions: nothing is held back, what has arrived together leaves together (contract section 3)."""

from __future__ import annotations

from typing import Final

import figures
import pytest
import trio
from case import CHAT, chat, chunked, get, request
from wire import Pause, Until, Wait, chunks_so_far, raw_client, raw_upstream, read_reply

from support import running_proxy, until

PACED: Final = 100
EVENT_SECONDS: Final = 0.005
CHUNKED: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(number: int) -> bytes:
    """One event in a chunk of its own."""
    data = b'data: {"choices":[{"delta":{"content":"token %d"}}]}\n\n' % number
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize("sent", [chat(b'{"stream": true}'), get("/v1/models")], ids=["scheduled", "passed through"])
@pytest.mark.parametrize("parts", [1, 3], ids=["whole chunks", "chunks in three parts"])
async def test_paced_events_leave_at_once(sent: bytes, parts: int) -> None:
    """An event must not wait for the next one, nor for the rest of a chunk that has only begun."""
    delays: list[float] = []
    async with (
        raw_upstream((Wait.REQUEST, CHUNKED)) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((sent, Until(b"chunked")))
        wire = upstream.wires[0]
        for number in range(PACED):
            data = event(number)
            size = -(-len(data) // parts)
            for at in range(0, len(data), size):
                began = trio.current_time()
                await wire.stream.send_all(data[at : at + size])
                if at + size < len(data):
                    await trio.sleep(0.001)
            await client.until(lambda number=number: b"token %d" % number in client.received)  # type: ignore[misc]
            delays.append(trio.current_time() - began)
            await trio.sleep(0.002)
        await wire.stream.send_all(b"0\r\n\r\n")
        await client.until(lambda: (reply := read_reply(bytes(client.received), "")) is not None and reply.whole)
    delays.sort()
    figures.note(
        f"paced events, {'scheduled' if b'chat' in sent else 'passed'}, {parts} part(s): {figures.milliseconds(delays)}"
    )
    assert delays[PACED // 2] < EVENT_SECONDS


@pytest.mark.parametrize("sent", [chat(), get("/v1/models"), chat(version="1.0")], ids=["scheduled", "passed", "1.0"])
async def test_what_has_arrived_together_leaves_in_one_write(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst costs one write, not one for each event."""
    from trioproxy.streams import GuardedStream

    writes: list[bytes] = []
    send_all = GuardedStream.send_all

    async def counting(stream: GuardedStream, data: bytes) -> None:
        writes.append(bytes(data))
        await send_all(stream, data)

    monkeypatch.setattr(GuardedStream, "send_all", counting)
    burst = b"".join(event(number) for number in range(300))
    async with (
        raw_upstream((Wait.REQUEST, CHUNKED + event(0), Pause(0.05), burst, Pause(0.05), b"0\r\n\r\n")) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((sent, Until(b"token 299")))
        carrying = [data for data in writes if b"token" in data]
        figures.note(f"a burst of 300 events ({len(burst)} bytes) leaves in {len(carrying) - 1} write(s)")
        assert len(carrying) == 2
        assert carrying[1].count(b"token") == 300


async def test_what_has_arrived_is_passed_on_before_the_answer_breaks_off() -> None:
    """What came before an upstream's end is not lost with it."""
    async with (
        raw_upstream((Wait.REQUEST, CHUNKED + event(1) + event(2) + b"zz\r\n")) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((chat(), Wait.END))
        body = chunks_so_far(bytes(client.received).partition(b"\r\n\r\n")[2])
        assert body.count(b"token") == 2
        assert proxy.recorder.outcomes() == ["upstream_error"]


@pytest.mark.parametrize("framing", ["Content-Length: 300", "Transfer-Encoding: chunked"])
async def test_an_upload_is_passed_on_as_it_arrives(framing: str) -> None:
    """Contract 3: passed-through uploads stream."""
    chunks = "chunked" in framing
    delays = []
    async with (
        raw_upstream((Wait.REQUEST, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((request("POST", "/v1/files", framing),))
        await until(lambda: upstream.wires and upstream.wires[0].received)
        for number in range(30):
            piece = b"piece %02d.." % number
            began = trio.current_time()
            await client.stream.send_all(b"a\r\n" + piece + b"\r\n" if chunks else piece)
            await upstream.wires[0].until(lambda piece=piece: piece in upstream.wires[0].received)  # type: ignore[misc]
            delays.append(trio.current_time() - began)
        if chunks:
            await client.stream.send_all(b"0\r\n\r\n")
        await client.until(lambda: b"200" in client.received)
    figures.note(f"pieces of an upload ({framing}): {figures.milliseconds(delays)}")
    assert sorted(delays)[len(delays) // 2] < EVENT_SECONDS


async def test_both_directions_at_once() -> None:
    """RFC 9110 7.5: an answer may begin before the request has ended, whose rest is not wanted then."""
    async with (
        raw_upstream((Wait.HEAD, chunked(b"early", last=b""), Pause(0.05), b"4\r\nlate\r\n0\r\n\r\n")) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        began = trio.current_time()
        await client.play((request("POST", "/v1/files", "Content-Length: 99"), b"part", Wait.END))
        reply = read_reply(bytes(client.received), client.ended)
        assert reply is not None
        assert (reply.body, reply.whole) == (b"earlylate", True)
        assert trio.current_time() - began < 1
        assert CHAT not in str(upstream.heard)
