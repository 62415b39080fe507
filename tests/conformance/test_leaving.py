"""Every way in which a client goes away, in each phase of a request (contract section 4; RFC 9112 section 9.5)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import figures
import pytest
import trio
from case import CHAT, OK, SLOT_FREE_SECONDS, chat, chunked, get, request
from wire import Deaf, End, Pause, RawUpstream, Script, Until, Wait, Wire, raw_client, raw_upstream

from support import Proxy, running_proxy, until
from trioproxy.events import Ended, PassedThrough

UNSEEN_SECONDS: Final = 3.0
"""Within this time a client is noticed that has pipelined another request, or is in the middle of an upload."""

STREAM: Final[Script] = (Wait.HEAD, chunked(b"data: 1\n\n", last=b""))
SILENT: Final[Script] = (Wait.HEAD,)
WAYS: Final[dict[str, Script]] = {
    "FIN": (End.FIN,),
    "reset": (End.RST,),
    "half-close": (End.HALF,),
    "FIN behind another request": (chat(b'{"pipelined": 1}'), Pause(0.05), End.FIN),
    "reset behind another request": (chat(b'{"pipelined": 1}'), Pause(0.05), End.RST),
    "FIN behind half a request": (b"POST /v1/fi", Pause(0.05), End.FIN),
    "FIN behind an empty line": (b"\r\n", Pause(0.05), End.FIN),
}
PHASES: Final = ("sending", "queued", "waiting", "streaming")
TIMES: Final[dict[str, list[float]]] = {"at once": [], "behind something": []}


@dataclass(frozen=True)
class Leaving:
    """A way, a phase and a kind of route."""

    way: str
    phase: str
    scheduled: bool

    @property
    def within(self) -> float:
        """The seconds in which it must be noticed."""
        hidden = "behind" in self.way or (self.phase == "sending" and not self.scheduled)
        return UNSEEN_SECONDS if hidden else SLOT_FREE_SECONDS

    def __str__(self) -> str:
        return f"{self.way}, {self.phase}, {'scheduled' if self.scheduled else 'passed through'}"


ROWS: Final = [
    Leaving(way, phase, scheduled)
    for way in WAYS
    for phase in PHASES
    for scheduled in (True, False)
    if (scheduled or phase != "queued") and not (phase == "sending" and "behind" in way)
]


@pytest.fixture(scope="module", autouse=True)
def _figures() -> Any:
    yield
    for name, times in TIMES.items():
        if times:
            figures.note(
                f"client gone, {name}, until slot and upstream's connection are free: {figures.milliseconds(times)}"
            )


@pytest.mark.parametrize("leaving", [row for row in ROWS if row.within == SLOT_FREE_SECONDS], ids=str)
async def test_leaving(leaving: Leaving) -> None:
    await _leave(leaving)


async def test_leaving_unseen() -> None:
    """Those that take seconds to be noticed, all at once."""
    failed: list[str] = []

    async def leave(leaving: Leaving) -> None:
        try:
            await _leave(leaving)
        except Exception as error:
            failed.append(f"{leaving}: {error!r}")

    async with trio.open_nursery() as nursery:
        for row in ROWS:
            if row.within != SLOT_FREE_SECONDS:
                nursery.start_soon(leave, row)
    assert failed == []


async def _leave(leaving: Leaving) -> None:
    blocked = leaving.phase == "queued"
    script = STREAM if leaving.phase == "streaming" else SILENT
    async with (
        raw_upstream(*([SILENT] if blocked else []), script) as upstream,
        running_proxy(upstream.url, scheduler={"concurrency": 1, "max_queue": 5}) as proxy,
        raw_client(proxy.port) as other,
        raw_client(proxy.port) as client,
    ):
        if blocked:
            await other.play((chat(),))
            await until(lambda: proxy.app.proxy.scheduler.running == 1)
        await _reach(leaving, proxy, upstream, client)
        *before, leave = WAYS[leaving.way]
        await client.play(before)
        began = trio.current_time()
        await client.play((leave,))
        await _over(leaving, proxy, upstream, began)
        if blocked:
            assert len(upstream.wires) == 1, "nothing may be sent upstream"
            assert proxy.app.proxy.scheduler.running == 1
        expected = [] if leaving.phase == "sending" and leaving.scheduled else ["cancelled"]
        counted = _counting(leaving, proxy)
        await until(lambda: len(counted()) == len(expected), 1)
        assert [event.ending.code for event in counted()] == expected
        assert proxy.app.proxy.upstream.idle == 0


def _counting(leaving: Leaving, proxy: Proxy) -> Callable[[], Sequence[Ended | PassedThrough]]:
    recorder = proxy.recorder
    return lambda: recorder.ended if leaving.scheduled else recorder.passed_through


async def _reach(leaving: Leaving, proxy: Proxy, upstream: RawUpstream, client: Wire) -> None:
    """Bring a request into its phase."""
    if leaving.phase == "sending":
        await client.play((request("POST", CHAT if leaving.scheduled else "/v1/files", "Content-Length: 99"), b"part"))
        await until(lambda: leaving.scheduled or (upstream.wires and b"part" in upstream.heard[0]))
        await trio.sleep(0.02)
        return
    await client.play((chat() if leaving.scheduled else get("/v1/models"),))
    match leaving.phase:
        case "queued":
            await until(lambda: proxy.app.proxy.scheduler.queued == 1)
        case "waiting":
            await until(lambda: upstream.wires and upstream.wires[0].received)
        case _:
            await client.play((Until(b"data: 1"),))


async def _over(leaving: Leaving, proxy: Proxy, upstream: RawUpstream, began: float) -> None:
    """Wait until nothing is done for the client any more, as long as that may take."""
    mine = upstream.wires[1 if leaving.phase == "queued" else 0 :]
    scheduler = proxy.app.proxy.scheduler

    def over() -> bool:
        held = scheduler.queued if leaving.phase == "queued" else scheduler.running
        return not held and all(wire.ended for wire in mine)

    with trio.fail_after(leaving.within):
        while not over():  # noqa: ASYNC110 - nobody tells us
            await trio.sleep(0.001)
    if leaving.phase != "sending":
        name = "at once" if leaving.within == SLOT_FREE_SECONDS else "behind something"
        TIMES[name].append(trio.current_time() - began)


@pytest.fixture
async def endless() -> AsyncIterator[RawUpstream]:
    """An upstream that streams without end."""
    piece = chunked(b"x" * 65536, last=b"").partition(b"\r\n\r\n")[2]
    async with raw_upstream((Wait.HEAD, chunked(last=b""), *([piece] * 20_000))) as upstream:
        yield upstream


@pytest.mark.parametrize("sent", [chat(), get("/v1/models"), chat(version="1.0")], ids=["scheduled", "passed", "1.0"])
async def test_a_client_that_stops_reading_is_cut_off(endless: RawUpstream, sent: bytes) -> None:
    """Contract 4: server.client_write_timeout; bounded buffers, no spooling."""
    async with (
        running_proxy(endless.url, server={"client_write_timeout": 0.4}) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((sent, Until(b"xxx"), Deaf()))
        await until(lambda: endless.wires[0].ended)
        await proxy.settled()
        await until(lambda: proxy.recorder.ended or proxy.recorder.passed_through)
        codes = {event.ending.code for event in proxy.recorder.ended}
        assert codes | {event.ending.code for event in proxy.recorder.passed_through} == {"cancelled"}
        await client.play((Wait.END,))
        assert client.ended == "reset"


async def test_a_client_that_reads_slowly_is_not_cut_off() -> None:
    """Contract 4: progress is all that counts."""
    body = bytes(range(256)) * 40_000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with (
        raw_upstream((Wait.REQUEST, answer)) as upstream,
        running_proxy(upstream.url, server={"client_write_timeout": 0.4}) as proxy,
    ):
        stream = await proxy.connect()
        await stream.send_all(chat())
        received = b""
        began = trio.current_time()
        with trio.fail_after(20):
            while not received.endswith(body):
                await trio.sleep(0.05)
                received += await stream.receive_some(600_000)
        assert trio.current_time() - began > 0.8
        assert proxy.recorder.outcomes() == ["success"]


async def test_a_client_that_sends_slowly_holds_no_slot() -> None:
    """Contract 3: the body is read before a slot is asked for."""
    async with (
        raw_upstream((Wait.REQUEST, OK, Wait.REQUEST, OK)) as upstream,
        running_proxy(upstream.url, scheduler={"concurrency": 1, "max_queue": 0}) as proxy,
        raw_client(proxy.port) as slow,
        raw_client(proxy.port) as quick,
    ):
        async with trio.open_nursery() as nursery:
            trickle = [step for byte in chat(b"{}", "X-Long: " + "l" * 40) for step in (bytes([byte]), Pause(0.005))]
            nursery.start_soon(slow.play, trickle)
            await trio.sleep(0.1)
            await quick.play((chat(b'{"quick": 1}'), Until(b"ok")))
            assert b'"quick"' in upstream.heard[0]
            assert b"200" not in slow.received
        await slow.play((Until(b"ok"),))
        assert proxy.recorder.outcomes() == ["success"] * 2


@pytest.mark.parametrize("size", [1_000_000, 6_000_000])
@pytest.mark.parametrize("how", [End.FIN, End.RST], ids=["FIN", "reset"])
async def test_a_client_that_leaves_an_upload_that_nobody_takes(how: End, size: int) -> None:
    """Contract 4: within three seconds in the middle of an upload, also where a FIN comes behind what nobody takes."""
    async with (
        raw_upstream((Deaf(), Pause(30))) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        with trio.move_on_after(0.5):
            await client.play((request("POST", "/v1/files", f"Content-Length: {10 * size}"), b"x" * size))
        began = trio.current_time()
        await client.play((how,))
        await until(lambda: proxy.recorder.passed_through, UNSEEN_SECONDS)
        assert proxy.recorder.passed_through[0].ending.code == "cancelled"
        TIMES["behind something"].append(trio.current_time() - began)


async def test_pipelined_requests_are_answered_in_order() -> None:
    """RFC 9112 9.3.2."""
    answers = [step for n in range(5) for step in (Wait.REQUEST, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % n)]
    async with (
        raw_upstream(answers) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((b"".join(chat(b"%d" % n) for n in range(5)),))
        await client.until(lambda: client.received.count(b"HTTP/1.1 200") == 5 and client.received.endswith(b"4"))
        assert [part[-1:] for part in bytes(client.received).split(b"HTTP/1.1")[1:]] == [b"0", b"1", b"2", b"3", b"4"]
        assert proxy.recorder.outcomes() == ["success"] * 5
