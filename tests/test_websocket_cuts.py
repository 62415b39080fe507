"""A WebSocket session is cut off at its k-th step, for every k: nothing of it is left, and it is counted once.

In memory and on a clock that jumps, as in `test_cuts.py`, so that step k is the same place in the code each time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import trio
from hypercorn.typing import ASGIReceiveEvent, ASGISendEvent, WebsocketScope
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.utilities import generate_accept_token

from faults import Cut
from memory import House
from support import Call
from trioproxy.events import WebSocketClosed, WebSocketOpening

Way = Literal["cancelled", "disconnected"]

TEXT = b"\x81\x05hello"
CLOSE = b"\x88\x02\x03\xe8"


async def switch(call: Call) -> None:
    key = (call.header("sec-websocket-key") or "").encode()
    accept = generate_accept_token(key)
    await call.send(
        b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %b\r\n\r\n" % accept
    )


async def talks(call: Call) -> None:
    await switch(call)
    for _ in range(2):
        await trio.sleep(1)
        await call.send(TEXT)


async def closes(call: Call) -> None:
    await talks(call)
    await call.send(CLOSE)


async def breaks_off(call: Call) -> None:
    await talks(call)
    await call.close()


async def sends_nonsense(call: Call) -> None:
    await talks(call)
    await call.send(b"\xff\xff")


async def refuses(call: Call) -> None:
    await call.answer(b"no", 401)


async def says_nothing(call: Call) -> None:
    await trio.sleep_forever()


async def unreachable() -> None:
    await trio.sleep(1)
    raise OSError("refused")


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the session meets."""

    upstream: Callable[[Call], Awaitable[object]] = talks
    closes: bool = False
    """Whether the client says something and closes."""
    reachable: bool = True
    goodbye: bool = False
    """Whether the proxy is told to end all sessions."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    ends: str
    """The outcome if it is not cut off."""


SITUATIONS = {
    "the client closes": Situation(closes=True, ends="client_closed"),
    "the upstream closes": Situation(upstream=closes, ends="upstream_closed"),
    "the upstream breaks off": Situation(upstream=breaks_off, ends="upstream_error"),
    "the upstream sends nonsense": Situation(upstream=sends_nonsense, ends="upstream_error"),
    "the upstream refuses": Situation(upstream=refuses, ends="upstream_refused"),
    "the upstream cannot be reached": Situation(reachable=False, ends="upstream_error"),
    "the upstream does not answer": Situation(upstream=says_nothing, ends="upstream_error"),
    "nobody says anything": Situation(settings={"server": {"websocket_idle_timeout": 50}}, ends="idle"),
    "the proxy ends": Situation(goodbye=True, ends="shutdown"),
    "there is no place": Situation(settings={"server": {"max_websockets": 0}}, ends="rejected"),
}


class Client:
    """One client: opens a WebSocket, may say something, may leave."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.cancel_scope = trio.CancelScope()
        self.sent: list[ASGISendEvent] = []
        self._to_app, self._receive = trio.open_memory_channel[ASGIReceiveEvent](10)

    def say(self, text: str) -> None:
        self._to_app.send_nowait({"type": "websocket.receive", "bytes": None, "text": text})

    def leave(self) -> None:
        with suppress(trio.WouldBlock):
            self._to_app.send_nowait({"type": "websocket.disconnect", "code": 1006})

    async def open(self) -> None:
        """Until the application is done with it."""
        scope: WebsocketScope = {
            "type": "websocket",
            "asgi": {"spec_version": "2.3", "version": "3.0"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": "/v1/realtime",
            "raw_path": b"/v1/realtime",
            "query_string": b"",
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "subprotocols": [],
            "state": {},  # type: ignore[typeddict-item]
            "extensions": {},
        }
        with self.cancel_scope:
            await self._house.app(scope, self._receive.receive, self._send)

    async def _send(self, message: ASGISendEvent) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(message)
        if message["type"] == "websocket.close":
            self.leave()  # it answers


async def run_once(situation: Situation, way: Way, k: int) -> tuple[bool, str]:
    """Cut at the k-th step: whether there was one, and the outcome if it was counted."""
    outcome = ""
    async with trio.open_nursery() as nursery:
        house = House(nursery, **({"upstream": {"first_byte_timeout": 20}} | situation.settings))
        client = Client(house)
        if not situation.reachable:
            house.upstream.accept = unreachable
        nursery.start_soon(house.upstream.behave, situation.upstream)

        async def later() -> None:
            await trio.sleep(5)
            if situation.goodbye:
                await house.proxy.websockets.say_goodbye()
            if situation.closes:
                client.say("hello")
                client.leave()

        cut = Cut(k, client.cancel_scope.cancel if way == "cancelled" else client.leave)
        trio.lowlevel.add_instrument(cut)
        try:
            with trio.fail_after(10_000):
                async with trio.open_nursery() as running:
                    running.start_soon(later)
                    cut.follow(trio.lowlevel.current_task())
                    await client.open()
                    running.cancel_scope.cancel()
            trio.lowlevel.remove_instrument(cut)
            await wait_all_tasks_blocked()
            outcome = check(house)
        except Exception as error:
            raise AssertionError(f"cut at step {k}") from error
        nursery.cancel_scope.cancel()
    return cut.made, outcome


def check(house: House) -> str:
    """The books balance; how the session ended, empty if it was cut off before it was one."""
    opened = [event for event in house.recorder.events if isinstance(event, WebSocketOpening)]
    closed = [event for event in house.recorder.events if isinstance(event, WebSocketClosed)]
    assert len(closed) <= 1, "counted twice"
    assert len(opened) == sum(event.opened for event in closed), "lost"
    assert house.proxy.websockets.taken == 0
    sample = house.proxy.metrics.registry.get_sample_value
    assert sample("openai_proxy_websockets") == 0
    assert house.upstream.open_connections == house.proxy.upstream.idle
    house.assert_settled()
    return closed[0].progress.outcome.value if closed else ""


@pytest.mark.parametrize("way", ["cancelled", "disconnected"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_nothing_is_left_wherever_it_is_cut_off(name: str, way: Way) -> None:
    situation = SITUATIONS[name]
    k = 0
    made = True
    seen: set[str] = set()
    while made:
        k += 1
        made, outcome = trio.run(run_once, situation, way, k, clock=MockClock(autojump_threshold=0))
        seen.add(outcome)
    assert k > 4, "nothing was cut off"
    assert situation.ends in seen
    if way == "cancelled" and situation.ends != "rejected":
        assert "client_gone" in seen
