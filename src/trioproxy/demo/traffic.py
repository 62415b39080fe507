"""A scenario's clients, over real sockets.

Each client behaves as one that uses an official SDK: what failed is tried again, twice at most, and no sooner than it
was told. Each names itself in `X-Request-Id`, so that logs and the live page can say who it was. This module must not
know the proxy's inside: to it, the proxy is an OpenAI base URL that takes priorities.
"""

from __future__ import annotations

import json
import math
import random
import socket
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from typing import Final
from urllib.parse import urlsplit

import httpx
import trio

from trioproxy.demo.scenarios import SIMULATED, Crowd, Scenario

RETRIES_MAX: Final = 2
"""What OpenAI's SDKs do unless told otherwise."""

REQUEST_SECONDS_MAX: Final = 600.0
"""What they wait for something to happen, too."""

_MESSAGES: Final = [{"role": "user", "content": "Say hello to everyone, please."}]
_ENDLESS_TOKENS: Final = 1_000_000
_SMALL_SEGMENT: Final = 536
_SMALL_BUFFER: Final = 2048
"""Bytes. With ordinary segments and buffers the kernel would take megabytes for a client that reads nothing."""


async def offer(base_url: str, scenario: Scenario, seed: int | None) -> None:
    """Send all of a scenario's traffic to `base_url` (such as `http://127.0.0.1:8080/v1`) until cancelled.

    The same seed (None: a random one) makes the same arrivals in every run.
    """
    seed = random.getrandbits(64) if seed is None else seed
    # Without a limit: requests have to queue in the proxy, not here.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        httpx.AsyncClient(base_url=base_url, limits=limits, timeout=REQUEST_SECONDS_MAX, trust_env=False) as client,
        trio.open_nursery() as nursery,
    ):
        for index, crowd in enumerate(scenario.crowds):
            first = trio.current_time() + index * scenario.appearance_seconds
            chance = random.Random(f"{crowd.name} {seed}")
            nursery.start_soon(_arrive, crowd, client, first, chance, scenario.backoff_seconds)
        nursery.start_soon(_look_at_models, client, 1 / scenario.models_per_second)


async def _arrive(
    crowd: Crowd, client: httpx.AsyncClient, first: float, chance: random.Random, backoff_seconds: float
) -> None:
    due = first
    numbers = count(1)
    async with trio.open_nursery() as nursery:
        while True:
            await trio.sleep_until(due)
            for _ in range(crowd.at_once):
                request_id = f"{SIMULATED}{crowd.name}.{next(numbers)}"
                if crowd.stops_reading:
                    nursery.start_soon(_ask_and_stop_reading, crowd, str(client.base_url), request_id)
                else:
                    nursery.start_soon(_ask, crowd, client, request_id, backoff_seconds)
            due += chance.expovariate(crowd.per_second / crowd.at_once)


async def _ask(crowd: Crowd, client: httpx.AsyncClient, request_id: str, backoff_seconds: float) -> None:
    """One client: its request, and what its SDK does about failures."""
    with trio.move_on_after(crowd.patience):
        for retry in range(1 + RETRIES_MAX):
            pause = await _try_once(crowd, client, request_id, backoff_seconds * 2**retry)
            if pause is None:
                return
            await trio.sleep(pause)


async def _try_once(crowd: Crowd, client: httpx.AsyncClient, request_id: str, backoff: float) -> float | None:
    """Returns the seconds to stay away before trying again, None if there is nothing to try again."""
    streaming = False
    try:
        async with client.stream(
            "POST", "/chat/completions", headers=_headers(crowd, request_id), json=_body(crowd)
        ) as response:
            streaming = crowd.stream and response.is_success
            async for _ in response.aiter_raw():
                pass
    except httpx.TransportError:
        return None if streaming else backoff
    return _pause(response.status_code, response.headers, backoff)


def _headers(crowd: Crowd, request_id: str) -> dict[str, str]:
    return {"x-request-id": request_id} | ({} if crowd.header is None else {"x-priority": crowd.header})


def _body(crowd: Crowd) -> dict[str, object]:
    body: dict[str, object] = {"model": "gpt-sim", "messages": _MESSAGES, "stream": crowd.stream or crowd.stops_reading}
    return body if crowd.field is None else body | {"priority": crowd.field}


def _pause(status: int, headers: Mapping[str, str], backoff: float) -> float | None:
    """What OpenAI's SDKs read out of an answer: the seconds to stay away, None for not coming back."""
    come_back = headers.get("x-should-retry")
    if come_back == "false" or (come_back is None and status not in {408, 409, 429} and status < 500):
        return None
    return float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else backoff


async def _ask_and_stop_reading(crowd: Crowd, base_url: str, request_id: str) -> None:
    """A client that asks for an endless stream, reads none of it, and closes when its patience is over."""
    assert math.isfinite(crowd.patience)
    url = urlsplit(base_url)
    body = json.dumps(_body(crowd)).encode()
    fields = _headers(crowd, request_id) | {
        "host": url.netloc,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-sim-tokens": str(_ENDLESS_TOKENS),
    }
    head = f"POST {url.path.rstrip('/')}/chat/completions HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    with suppress(OSError):
        family = socket.AF_INET6 if ":" in (url.hostname or "") else socket.AF_INET
        with trio.socket.socket(family) as connection:
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SMALL_SEGMENT)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
            await connection.connect((url.hostname or "", url.port or 80))
            await trio.SocketStream(connection).send_all(head.encode() + b"\r\n" + body)
            await trio.sleep(crowd.patience)


async def _look_at_models(client: httpx.AsyncClient, seconds: float) -> None:
    while True:
        with suppress(httpx.TransportError):
            await client.get("/models")
        await trio.sleep(seconds)
