"""The obvious proxy: what one would write in an afternoon, and the yardstick that every cost is a ratio to.

A Quart-trio handler that sends the request on with `httpx.AsyncClient` and yields the answer's chunks. No scheduler, no
metrics, no log, no timeouts, no deadlines. Run under Hypercorn's trio worker; `UPSTREAM` names the base URL.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import httpx
from quart import Response, request
from quart_trio import QuartTrio

UPSTREAM = os.environ["UPSTREAM"]
HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}

app = QuartTrio(__name__)
app.config["RESPONSE_TIMEOUT"] = None
client: httpx.AsyncClient


@app.before_serving
async def begin() -> None:
    """Connect lazily, with as many connections as are asked for."""
    global client  # noqa: PLW0603 - as one would write it
    client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=None, trust_env=False)


@app.route("/v1/<path:path>", methods=["POST"])
async def forward(path: str) -> Response:
    """Send the request on, and the answer back as it comes."""
    headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
    body = await request.get_data()
    sent = client.build_request("POST", f"{UPSTREAM}/{path}", headers=headers, content=body)
    answer = await client.send(sent, stream=True)

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in answer.aiter_raw():
            yield piece
        await answer.aclose()

    kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
    return Response(pieces(), answer.status_code, kept)
