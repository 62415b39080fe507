"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

from memory import House
from support import Upstream, running_upstream


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A scripted upstream on a real socket."""
    async with running_upstream() as running:
        yield running


@pytest.fixture
def house(nursery: trio.Nursery) -> Callable[..., House]:
    """Makes the application on a scripted upstream in memory; sections of the settings as keywords."""

    def build(**settings: dict[str, Any]) -> House:
        return House(nursery, **settings)

    return build
