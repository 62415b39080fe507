"""A conformance case as a row of a table, and how it is run against the real server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from wire import Reply, Script, Wait, Wire, raw_client, raw_upstream, read_reply

from support import Proxy, running_proxy, until

OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ANSWER: Final[Script] = (Wait.REQUEST, OK)
CHAT: Final = "/v1/chat/completions"
NOBODY: Final = -1
"""A port's place in a base URL where nobody listens."""

SLOT_FREE_SECONDS: Final = 0.25
"""Within this time of its cause the slot must be free again. The aim is 50 ms; the rest is for noisy machines."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is sent on both sides, and what must come of it.

    `forwarded` is all that arrives at the first connection of the upstream, its own name replaced by `UPSTREAM`: None
    leaves it open, `b""` means that nothing may arrive. `head` and `body` are the answer's; `code` is that of an error
    of ours. `counts` is what is counted, once: an outcome, `passed: CODE` or `refused: CODE`.
    """

    name: str
    rule: str
    """What demands it."""
    client: Script
    upstream: Sequence[Script] = (ANSWER,)
    forwarded: bytes | None = None
    status: int | None = 200
    """None: no answer may come."""
    head: bytes | None = None
    body: bytes | None = None
    code: str | None = None
    whole: bool = True
    interim: tuple[int, ...] = ()
    method: str = "POST"
    counts: str = "success"
    client_ends: str = "kept"
    """`kept`: another request can be sent on it. `fin`, `reset`, `closed` (either of them), `left` (by the client)."""
    upstream_kept: bool = True
    connections: int = 1
    """How many connections the upstream sees."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def request(
    method: str, target: str, *fields: str, body: bytes | None = None, version: str = "1.1", host: str = "Host: proxy"
) -> bytes:
    """A request's bytes; with a body its Content-Length too."""
    lines = [f"{method} {target} HTTP/{version}", *([host] if host else []), *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def get(target: str, *fields: str, **more: Any) -> bytes:
    """A request that is passed through."""
    return request("GET", target, *fields, **more)


def chat(body: bytes = b"{}", *fields: str, **more: Any) -> bytes:
    """A request that is scheduled."""
    return request("POST", CHAT, *fields, body=body, **more)


def answer(*fields: str, body: bytes | None = b"ok", status: str = "200 OK", version: str = "1.1") -> bytes:
    """An answer's bytes; with a body its Content-Length too."""
    lines = [f"HTTP/{version} {status}", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(*pieces: bytes, fields: Sequence[str] = (), last: bytes = b"0\r\n\r\n") -> bytes:
    """An answer's bytes in chunks."""
    head = "\r\n".join(["HTTP/1.1 200 OK", *fields, "Transfer-Encoding: chunked", "", ""]).encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + last


async def run(case: Case) -> None:
    """Run one case and check everything that it says."""
    async with raw_upstream(*case.upstream) as upstream:
        url = upstream.url if case.upstream else "http://127.0.0.1:9/v1"
        async with running_proxy(url, **case.settings) as proxy, raw_client(proxy.port) as client:
            await client.play(case.client)
            reply = await _reply(case, client)
            _check_reply(case, reply)
            await _counted(case, proxy)
            await _check_client(case, client, reply)
            await proxy.settled()
            heard = upstream.heard
            if case.forwarded is not None:
                assert (heard or [b""])[0] == case.forwarded
            if case.forwarded != b"" and case.upstream:
                assert len(heard) == case.connections
                last = upstream.wires[-1]
                if case.upstream_kept:
                    assert (last.ended, proxy.app.proxy.upstream.idle) == ("", 1)
                else:
                    await last.until(lambda: bool(last.ended))
                    assert proxy.app.proxy.upstream.idle == 0
            else:
                assert b"".join(heard) == b""


async def _reply(case: Case, client: Wire) -> Reply | None:
    """The answer, once it is whole or the connection has ended."""
    reply: Reply | None = None

    def arrived() -> bool:
        nonlocal reply
        reply = read_reply(bytes(client.received), client.ended, case.method)
        return bool(client.ended) or (reply is not None and reply.whole)

    if case.client_ends != "left":
        await client.until(arrived)
    return reply


def _check_reply(case: Case, reply: Reply | None) -> None:
    if case.client_ends == "left":
        return
    assert (reply.status if reply else None) == case.status, reply
    if reply is None:
        return
    assert reply.interim == case.interim
    assert reply.whole == case.whole, reply
    if case.head is not None:
        assert reply.head == case.head
    if case.body is not None:
        assert reply.body == case.body
    if case.code is not None:
        error = json.loads(reply.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == case.code, error
        assert b"\r\nx-trioproxy-request-id" not in reply.head
    else:
        assert b'"error"' not in reply.body, reply.body


async def _counted(case: Case, proxy: Proxy) -> None:
    recorder = proxy.recorder

    def counted() -> list[str]:
        return [
            *recorder.outcomes(),
            *(f"passed: {event.ending.code}" for event in recorder.passed_through),
            *(f"refused: {event.ending.code}" for event in recorder.refused),
        ]

    expected = [case.counts] if case.counts else []
    with suppress(trio.TooSlowError):
        await until(lambda: counted() == expected, 4)
    assert counted() == expected


async def _check_client(case: Case, client: Wire, reply: Reply | None) -> None:
    match case.client_ends:
        case "left":
            return
        case "kept":
            assert reply is not None
            assert client.received[reply.size :] == b"", "there is more than the answer"
            await client.stream.send_all(get("/health"))
            await client.until(lambda: b'"ok"' in client.received[reply.size :] or bool(client.ended))
            assert not client.ended
        case _:
            await client.until(lambda: bool(client.ended))
            assert case.client_ends in (client.ended, "closed")
