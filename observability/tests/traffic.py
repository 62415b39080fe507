"""Traffic of every kind: each outcome, at each level, and everything that is counted beside them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import httpx
import trio

from support import CHUNKED, Call, chunk
from trioproxy import priority
from trioproxy.upstream import Upstream

SLOTS: Final = 2
PLACES: Final = 3
QUEUE_TIMEOUT: Final = 5.0

LEVEL_NUMBERS: Final = {
    level: [number for number in range(101) if priority.level(number) == level] for level in priority.LEVELS
}


async def behave(call: Call) -> None:
    """The upstream: does what the request's header `X-Behave` says."""
    wish = call.header("x-behave") or "200"
    if wish.isdigit():
        await trio.sleep(0.02)
        await call.answer(b'{"object": "answer"}', int(wish))
    elif wish == "hold":
        await trio.sleep(0.25)
        await call.answer()
    elif wish == "break":
        await call.send(CHUNKED + chunk(b"data: {}\n\n"))
        await trio.sleep(0.02)
        await call.close()
    elif wish == "hang":
        with trio.move_on_after(5):
            await call.gone.wait()


class Faulty:
    """The real connection to the upstream, with a bug in it for requests whose query says so."""

    def __init__(self, real: Upstream) -> None:
        self._real = real

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def open(self, method: str, target: bytes, *rest: Any) -> object:
        """As the real one."""
        if target.endswith(b"?bug"):
            raise RuntimeError("a bug that the test has put in")
        return self._real.open(method, target, *rest)


def with_a_bug(real: Upstream) -> Upstream:
    """An upstream that fails on `?bug`."""
    return cast(Upstream, Faulty(real))


@dataclass(frozen=True)
class Client:
    """Somebody who sends requests of every kind, one round after the other."""

    http: httpx.AsyncClient
    bugs: bool = True
    """Whether the proxy has been given a bug to run into."""

    async def ask(self, number: int, behave: str = "200", timeout: str | None = None, query: str = "") -> int | None:
        """One scheduled request; its status, None if the answer was broken off."""
        headers = {"x-priority": str(number), "x-behave": behave}
        if timeout is not None:
            headers["x-request-timeout"] = timeout
        body = {"model": "gpt-sim", "messages": [], "stream": behave == "break"}
        try:
            answer = await self.http.post(f"/v1/chat/completions{query}", json=body, headers=headers)
        except httpx.RemoteProtocolError:
            return None
        return answer.status_code

    async def one_round(self) -> None:
        """Every outcome at every level, and everything that needs no slot."""
        for numbers in LEVEL_NUMBERS.values():
            await self._outcomes(numbers)
            await self._crowd(numbers)
        await self._unscheduled()

    async def _outcomes(self, numbers: list[int]) -> None:
        for behave in ("200", "302", "404", "429", "503"):
            assert await self.ask(numbers[0], behave) == int(behave)
        assert await self.ask(numbers[-1], "break") is None
        assert await self.ask(numbers[-1], "hang", timeout="0.05") == 504
        if self.bugs:
            assert await self.ask(numbers[-1], query="?bug") == 500
        await self._ask_and_leave(numbers[-1])

    async def _ask_and_leave(self, number: int) -> None:
        url = self.http.base_url
        assert url.port is not None
        async with await trio.open_tcp_stream(url.host, url.port) as stream:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"X-Priority: {number}\r\nX-Behave: hang\r\nContent-Length: 2\r\n\r\n"
            await stream.send_all(head.encode() + b"{}")
            await trio.sleep(0.05)

    async def _crowd(self, numbers: list[int]) -> None:
        """Fill slots and queue, so that one is rejected, one evicted, and the others wait."""
        answers: list[int | None] = []

        async def note(number: int) -> None:
            answers.append(await self.ask(number, "hold"))

        async with trio.open_nursery() as nursery:
            for number in (*[numbers[0]] * (SLOTS + PLACES + 1), numbers[-1]):
                nursery.start_soon(note, number)
                await trio.sleep(0.01)
        assert set(answers) <= {200, 503}

    async def _unscheduled(self) -> None:
        await self.http.get("/v1/models")
        await self.http.get("/v1/files", headers={"x-behave": "404"})
        await self.http.get("/nowhere")
        await self.http.post("/v1/chat/completions", json={}, headers={"x-priority": "urgent"})


KEY: Final = "sk-team"

SETTINGS: Final[dict[str, Any]] = {
    "keys": [{"name": "team", "key": KEY}],
    "scheduler": {"concurrency": SLOTS, "max_queue": PLACES, "queue_timeout": QUEUE_TIMEOUT},
}


@asynccontextmanager
async def client(url: str, *, bugs: bool) -> AsyncIterator[Client]:
    """A client of the proxy at `url`."""
    limits = httpx.Limits(max_connections=None)
    as_team = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=as_team, timeout=20, trust_env=False, limits=limits) as http:
        yield Client(http, bugs)


def as_lines(text: str) -> list[dict[str, Any]]:
    """A log's lines, each of which has to be a JSON object."""
    return [json.loads(line) for line in text.splitlines()]
