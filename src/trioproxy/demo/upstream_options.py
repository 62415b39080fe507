"""How a simulated upstream behaves: by default (`UpstreamOptions`) and for one request (`Controls`).

Values and their validation only: this module must not know HTTP servers, clocks or OpenAI's JSON.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

CONTROL_PREFIX = "x-sim-"

_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("time_to_first_token", 0, 86_400),
    ("tokens_per_second", 0.001, 1e9),
    ("tokens", 0, 1_000_000),
    ("jitter", 0, 1),
    ("slots", 0, 1_000_000),
    ("error_rate", 0, 1),
    ("break_rate", 0, 1),
    ("hang_rate", 0, 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamOptions:
    """What a simulated upstream does unless a request's `x-sim-*` headers say otherwise.

    A *generation* is a request that costs a real upstream model time: chat completions, completions, responses,
    embeddings, moderations, transcriptions. Impossible values raise `ValueError`.
    """

    time_to_first_token: float = 0.3
    """Seconds before a generation's first token, and before the response's headers (default 0.3)."""

    tokens_per_second: float = 50
    """Speed of one generation, whatever else is running (default 50)."""

    tokens: int = 60
    """An answer's length; a request's own limit (`max_tokens` and its like) lowers it (default 60)."""

    jitter: float = 0.2
    """Random spread of time to first token and speed, relative, from 0 to 1 (default 0.2: up to 20% either way)."""

    slots: int | None = None
    """Generations beyond this many at once are refused with 429 (default: no limit)."""

    error_rate: float = 0
    """Share of the generations, from 0 to 1, that are answered 500, chosen at random (default 0)."""

    break_rate: float = 0
    """Share of the generations that are broken off in the middle (default 0)."""

    hang_rate: float = 0
    """Share of the generations that are never answered (default 0). The three shares together must not exceed 1."""

    models: tuple[str, ...] = ("gpt-sim", "gpt-sim-mini", "text-embedding-sim")
    """What `GET /v1/models` lists; generations accept any other name too."""

    seed: int | None = None
    """Makes latencies, errors and ids the same in every run (default: they differ)."""

    def __post_init__(self) -> None:
        for name, lowest, highest in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise ValueError(f"{name} must be from {lowest:g} to {highest:g}, not {value!r}")
        if (troubled := self.error_rate + self.break_rate + self.hang_rate) > 1:
            raise ValueError(
                f"error_rate, break_rate and hang_rate must not exceed 1 together, but come to {troubled:g}"
            )


class Controls(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=lambda name: CONTROL_PREFIX + name):
    """What one request's `x-sim-*` headers ask for; `trioproxy.demo.upstream` has them as a table."""

    status: Annotated[int, Meta(ge=400, le=599)] | UnsetType = UNSET
    """HTTP status of the error to answer with."""

    latency: Annotated[float, Meta(ge=0, le=86_400)] | UnsetType = UNSET
    """Seconds to the first token."""

    tokens: Annotated[int, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    """The answer's length before the request's own limit."""

    break_: Annotated[int, Meta(ge=0)] | UnsetType = msgspec.field(name="x-sim-break", default=UNSET)
    """Streamed tokens before the connection is broken off."""

    hang: bool = False
    """Whether to never answer."""


def read_controls(headers: Iterable[tuple[str, str]]) -> Controls:
    """Reads the `x-sim-*` ones among `headers`; raises `ValueError` for unknown, repeated or unusable ones."""
    found: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        if not key.startswith(CONTROL_PREFIX):
            continue
        if key in found:
            raise ValueError(f"{key} was sent more than once")
        found[key] = value.strip()
    return msgspec.convert(found, Controls, strict=False)
