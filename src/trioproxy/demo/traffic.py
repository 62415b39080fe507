"""Mixed-priority traffic: simulated clients of every level, over real sockets, more than the proxy can serve.

Who sends what and how often is data: `CROWDS`. Each client behaves as one that uses an official SDK: a refused request
is tried again if the refusal says so, twice at most and no sooner than it was told. This module must not know the
proxy's inside: to it, the proxy is an OpenAI base URL that takes priorities.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import httpx
import trio

RETRIES_MAX: Final = 2
"""What OpenAI's SDKs do unless told otherwise."""

REQUEST_SECONDS_MAX: Final = 600.0
"""What they wait for something to happen, too."""

_MESSAGES: Final = [{"role": "user", "content": "Say hello to everyone, please."}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Clients of one kind. They arrive at random (Poisson), one by one or many at once."""

    name: str
    per_second: float
    """Requests on average, those that come back after a refusal not counted."""
    at_once: int = 1
    """Requests that arrive in the same moment; the moments are rarer accordingly."""
    header: str | None = None
    """What the header `X-Priority` says; None: it is not sent."""
    field: str | int | None = None
    """What the body's `priority` says; None: it is not there."""
    stream: bool = False
    patience: float = math.inf
    """Seconds until the client leaves, whether it has its answer or not."""


CROWDS: Final = (
    Crowd(name="bulk evaluation", per_second=4.6, at_once=16, field=10),
    Crowd(name="nightly reports", per_second=0.8, at_once=4, header="low"),
    Crowd(name="production", per_second=1.4),
    Crowd(name="chat users", per_second=1.0, field="high", stream=True),
    Crowd(name="on-call assistant", per_second=0.5, header="critical", stream=True),
    Crowd(name="chat users who leave early", per_second=0.2, header="65", stream=True, patience=0.5),
)
"""In this order they appear, the least urgent first, so that the queue is full when the others come."""

APPEARANCE_SECONDS: Final = 0.25
"""How long after one crowd the next one appears."""

MODELS_PER_SECOND: Final = 0.5
"""How often somebody asks for the list of models, which is passed through and never waits."""


def offered_load(seconds_per_request: float, slots: int) -> float:
    """What the crowds ask for as a multiple of what `slots` slots can serve, retries not counted."""
    return sum(crowd.per_second for crowd in CROWDS) * seconds_per_request / slots


async def offer(base_url: str, seed: int | None) -> None:
    """Send all of the traffic to `base_url` (such as `http://127.0.0.1:8080/v1`) until cancelled.

    The same seed (None: a random one) makes the same arrivals in every run.
    """
    seed = random.getrandbits(64) if seed is None else seed
    # Without a limit: requests have to queue in the proxy, not here.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        httpx.AsyncClient(base_url=base_url, limits=limits, timeout=REQUEST_SECONDS_MAX, trust_env=False) as client,
        trio.open_nursery() as nursery,
    ):
        for index, crowd in enumerate(CROWDS):
            first = trio.current_time() + index * APPEARANCE_SECONDS
            nursery.start_soon(_arrive, crowd, client, first, random.Random(f"{crowd.name} {seed}"))
        nursery.start_soon(_look_at_models, client)


async def _arrive(crowd: Crowd, client: httpx.AsyncClient, first: float, chance: random.Random) -> None:
    due = first
    async with trio.open_nursery() as nursery:
        while True:
            await trio.sleep_until(due)
            for _ in range(crowd.at_once):
                nursery.start_soon(_ask, crowd, client)
            due += chance.expovariate(crowd.per_second / crowd.at_once)


async def _ask(crowd: Crowd, client: httpx.AsyncClient) -> None:
    """One client: its request, and what its SDK does about refusals."""
    with trio.move_on_after(crowd.patience):
        for _ in range(1 + RETRIES_MAX):
            pause = await _try_once(crowd, client)
            if pause is None:
                return
            await trio.sleep(pause)


async def _try_once(crowd: Crowd, client: httpx.AsyncClient) -> float | None:
    """Returns the seconds to stay away before trying again, None if there is nothing to try again."""
    headers = {} if crowd.header is None else {"x-priority": crowd.header}
    body: dict[str, object] = {"model": "gpt-sim", "messages": _MESSAGES, "stream": crowd.stream}
    if crowd.field is not None:
        body["priority"] = crowd.field
    try:
        async with client.stream("POST", "/chat/completions", headers=headers, json=body) as response:
            async for _ in response.aiter_raw():
                pass
    except httpx.TransportError:
        return None
    return _pause(response.headers)


def _pause(headers: Mapping[str, str]) -> float | None:
    """What OpenAI's SDKs read out of an answer's headers: the seconds to stay away, None for not coming back."""
    if headers.get("x-should-retry") != "true":
        return None
    return float(headers["retry-after-ms"]) / 1000


async def _look_at_models(client: httpx.AsyncClient) -> None:
    while True:
        with suppress(httpx.TransportError):
            await client.get("/models")
        await trio.sleep(1 / MODELS_PER_SECOND)
