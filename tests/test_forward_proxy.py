"""Upstream calls through the forward proxy that the environment names."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from support import running_proxy

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def forward_proxy(heard: list[bytes], answer: bytes) -> AsyncIterator[str]:
    """Takes down the head of each request and gives always the same answer."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            head = b""
            while b"\r\n\r\n" not in head:
                head += await stream.receive_some()
            heard.append(head)
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield f"http://user:secret@127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def test_plain_http_asks_for_the_absolute_url(environment: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []
    async with forward_proxy(heard, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as address:
        environment.setenv("HTTP_PROXY", address)
        async with running_proxy("http://api.test/base/v1") as proxy:
            answer = await proxy.client.get("/v1/models/a%2Fb?x=%201&y")
            assert (answer.status_code, answer.text) == (200, "{}")
    assert heard[0].startswith(b"GET http://api.test/base/v1/models/a%2Fb?x=%201&y HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic" in heard[0]


async def test_https_asks_for_a_tunnel(environment: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []
    async with forward_proxy(heard, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as address:
        environment.setenv("HTTPS_PROXY", address)
        async with running_proxy("https://api.test/v1") as proxy:
            answer = await proxy.client.post(CHAT)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
            assert "403" in answer.json()["error"]["message"]
            assert "secret" not in answer.text
    assert heard[0].startswith(b"CONNECT api.test:443 HTTP/1.1\r\n")


async def test_what_cannot_be_read_of_an_answer_is_not_quoted(environment: pytest.MonkeyPatch) -> None:
    async with forward_proxy([], b"SECRET answer\r\n\r\n") as address:
        environment.setenv("HTTP_PROXY", address)
        async with running_proxy("http://api.test/v1") as proxy:
            answer = await proxy.client.post(CHAT)
            assert answer.json()["error"]["code"] == "upstream_protocol_error"
            assert "SECRET" not in answer.text
    (ended,) = proxy.recorder.ended
    assert ended.progress is not None
    assert "SECRET" not in str(ended.progress.error)


async def test_no_proxy_is_obeyed(environment: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []
    async with forward_proxy(heard, b"") as address:
        environment.setenv("ALL_PROXY", address)
        environment.setenv("NO_PROXY", "127.0.0.1")
        async with running_proxy("http://127.0.0.1:9/v1") as proxy:
            assert (await proxy.client.post(CHAT)).json()["error"]["code"] == "upstream_unreachable"
    assert heard == []
