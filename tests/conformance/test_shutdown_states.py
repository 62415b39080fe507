"""A shutdown with every state at once: queued, running, streaming, uploading, a stopped reader, idle (contract 4)."""

from __future__ import annotations

import json
from typing import Any, Final

import figures
import pytest
import trio
from case import OK, chat, chunked, get, request
from http2_client import http2_client
from wire import Deaf, Pause, Script, Until, Wait, Wire, raw_client, raw_upstream, read_reply

from support import running_proxy, until

GRACE: Final = 1.0
PIECE: Final = chunked(b"x" * 65536, last=b"").partition(b"\r\n\r\n")[2]
SCRIPTS: Final[dict[str, Script]] = {
    "running": (Wait.REQUEST, Pause(0.4), OK, Wait.REQUEST, OK),
    "streaming": (Wait.REQUEST, chunked(b"1", last=b""), Pause(0.4), b"1\r\n2\r\n0\r\n\r\n", Wait.REQUEST, OK),
    "uploading": (Wait.REQUEST, OK, Wait.REQUEST, OK),
    "stopped": (Wait.REQUEST, chunked(last=b""), *([PIECE] * 2000)),
    "silent": (Wait.REQUEST,),
}


@pytest.mark.parametrize("stubborn", [False, True], ids=["all end in time", "some do not"])
async def test_shutdown_with_every_state_at_once(stubborn: bool) -> None:
    """What is here goes on, what comes is refused, what does not end within the grace is cut off."""
    names = ["running", "streaming", "uploading", *(["stopped", "silent"] if stubborn else [])]
    settings: dict[str, dict[str, Any]] = {
        "server": {"shutdown_grace": GRACE},
        "scheduler": {"concurrency": len(names) - 1, "max_queue": 5},
    }
    async with (
        raw_upstream(*(SCRIPTS[name] for name in names), (Wait.REQUEST, OK)) as upstream,
        running_proxy(upstream.url, **settings) as proxy,
        trio.open_nursery() as nursery,
    ):
        wires: dict[str, Wire] = {}
        for name in (*names, "queued", "idle", "half a request", "newcomer"):
            wires[name] = await nursery.start(_client, proxy.port)
        for number, name in enumerate(names, 1):
            head = request("POST", "/v1/files", "Content-Length: 9") if name == "uploading" else chat()
            await wires[name].play((head, b"part" if name == "uploading" else b""))
            await until(lambda number=number: len(upstream.wires) == number and upstream.wires[-1].received)  # type: ignore[misc]
        if stubborn:
            await wires["stopped"].play((Until(b"xxx"), Deaf()))
        await wires["queued"].play((chat(b'{"queued": 1}'),))
        await until(lambda: proxy.app.proxy.scheduler.queued == 1)
        await wires["idle"].play((get("/health"), Until(b'"ok"')))
        await wires["half a request"].play((b"POST /v1/chat",))
        await wires["newcomer"].play((get("/health"), Until(b'"ok"')))

        began = trio.current_time()
        proxy.server.shut_down()
        await trio.sleep(0.05)
        wires["another newcomer"] = await nursery.start(_client, proxy.port)
        for name, sent in (("newcomer", chat()), ("another newcomer", get("/v1/models"))):
            wire = wires[name]
            size = len(wire.received)
            await wire.play((sent, Until(b"shutting_down"), Pause(0.02)))
            reply = read_reply(bytes(wire.received[size:]), "")
            assert reply is not None
            assert (reply.status, json.loads(reply.body)["error"]["code"]) == (503, "shutting_down")
            assert reply.fields["x-should-retry"] == "true"
        wires["probe"] = await nursery.start(_client, proxy.port)
        await wires["probe"].play((get("/ready"), Until(b"503"), Pause(0.02)))
        assert b"503" in wires["probe"].received
        await wires["uploading"].play((b"..END",))
        for name, body in (("running", b"ok"), ("streaming", b"12"), ("uploading", b"ok"), ("queued", b"ok")):
            wire = wires[name]
            await wire.until(lambda wire=wire: _whole(wire))  # type: ignore[misc]
            reply = read_reply(bytes(wire.received), wire.ended)
            assert reply is not None
            assert (reply.status, reply.body) == (200, body), name
        for name, wire in wires.items():
            await wire.play((Wait.END,))
            assert wire.ended, name
        took = trio.current_time() - began
        assert GRACE - 0.1 < took < GRACE + 0.7 if stubborn else took < GRACE
        if stubborn:
            await until(lambda: len(proxy.recorder.ended) == 6)
            silent = read_reply(bytes(wires["silent"].received), wires["silent"].ended)
            assert silent is None
        outcomes = sorted(proxy.recorder.outcomes())
        assert outcomes == sorted(["cancelled"] * 2 * stubborn + ["rejected"] + ["success"] * 3)
        assert sorted(e.ending.code for e in proxy.recorder.passed_through) == ["completed", "shutting_down"]
        outlasting = "two" if stubborn else "none"
        figures.note(f"shutdown with every state at once ({outlasting} outlast the grace of 1 s): {took:.2f} s")
        nursery.cancel_scope.cancel()


async def test_a_second_signal_ends_everything_at_once() -> None:
    async with (
        raw_upstream(SCRIPTS["silent"], SCRIPTS["stopped"]) as upstream,
        running_proxy(upstream.url, server={"shutdown_grace": 30}, scheduler={"concurrency": 2}) as proxy,
        raw_client(proxy.port) as silent,
        raw_client(proxy.port) as stopped,
        raw_client(proxy.port) as queued,
        http2_client(proxy.port) as second,
    ):
        await silent.play((chat(),))
        await until(lambda: upstream.wires and upstream.wires[0].received)
        await stopped.play((chat(), Until(b"xxx"), Deaf()))
        await queued.play((chat(),))
        await second.request("POST", "/v1/chat/completions", body=b"{}")
        await until(lambda: proxy.app.proxy.scheduler.queued == 2)
        began = trio.current_time()
        proxy.server.shut_down()
        proxy.server.shut_down()
        for wire in (silent, stopped, queued):
            await wire.play((Wait.END,))
        await until(lambda: second.closed and all(wire.ended for wire in upstream.wires))
        assert trio.current_time() - began < 1
        await until(lambda: len(proxy.recorder.ended) == 4)
        assert proxy.recorder.outcomes() == ["cancelled"] * 4


async def _client(port: int, *, task_status: trio.TaskStatus[Wire]) -> None:
    async with raw_client(port) as wire:
        task_status.started(wire)
        await trio.sleep_forever()


def _whole(wire: Wire) -> bool:
    reply = read_reply(bytes(wire.received), wire.ended)
    return bool(wire.ended) or (reply is not None and reply.whole)
