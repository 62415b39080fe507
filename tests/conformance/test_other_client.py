"""The HTTP client that goes through forward proxies, httpcore's, is held to the same cases as the one that most use.

Not to every one: what it does beside httpcore's own work, and what concerns an answer's framing.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final

import httpcore
import httpx
import pytest
import test_failing_upstream
import test_fidelity
from case import Case, run

from trioproxy import httpcore_client, upstream

ROWS: Final = [
    *(row for row in test_failing_upstream.ROWS if not row.name.endswith("passed through") and "1.0" not in row.name),
    *test_fidelity.METHOD_CASES,
    *test_fidelity.ANSWER_BODY_CASES,
    *(row for row in test_fidelity.REQUEST_BODY_CASES if "scheduled" in row.name or "chunks" in row.name),
]


@pytest.fixture(autouse=True)
def _other_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def connections(url: httpx.URL, context: ssl.SSLContext, *_: object) -> Callable[[], httpcore_client.Connection]:
        return lambda: httpcore_client.Connection(httpcore.URL(str(url)), context, None, 60)

    monkeypatch.setattr(upstream, "_connections", connections)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
async def test_other_client(case: Case) -> None:
    await run(case)
