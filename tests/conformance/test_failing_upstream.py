"""Every way in which an upstream fails: what the client sees, what is counted, and that the connection is given up
(RFC 9112 sections 6.3, 8, 9.6; RFC 9110 sections 7.8, 9.2.2, 15.6; contract sections 4 and 5)."""

from __future__ import annotations

from typing import Any, Final

import pytest
import trio
from case import OK, Case, answer, chat, chunked, get, request, run
from wire import Deaf, End, Pause, Script, Until, Wait, raw_client, raw_upstream, read_reply

from support import running_proxy, until
from trioproxy import network
from trioproxy.http1_server import reason_phrase

CHUNKED: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GET_EXTRA_INFO: Final = network.Stream.get_extra_info
SHORT: Final = {"upstream": {"first_byte_timeout": 0.3, "idle_timeout": 0.3}}

TRICKLED: Final[Script] = (Wait.REQUEST, b"HTTP/1.1 200 OK\r\n", *(Pause(0.1), b"X-A: b\r\n") * 5)

NO_ANSWER: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("closes without an answer", (End.FIN,)),
    ("resets", (End.RST,)),
    ("half-closes without an answer", (End.HALF,)),
    ("stops in the status line", (b"HTTP/1.1 20", End.FIN)),
    ("is reset in the status line", (b"HTTP/1.1 20", End.RST)),
    ("stops in the head", (b"HTTP/1.1 200 OK\r\nContent-Le", End.FIN)),
    ("stops before the head's end", (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n", End.FIN)),
    ("sends an interim answer and closes", (b"HTTP/1.1 100 Continue\r\n\r\n", End.FIN)),
    ("sends garbage", (b"\x00\x01\x02 garbage \xff\r\n\r\n", End.FIN)),
    ("speaks TLS", (bytes.fromhex("15030100020250"), End.FIN)),
    ("speaks HTTP/2", (bytes.fromhex("000000040000000000"), b"\r\n\r\n")),
    ("speaks SMTP", (b"220 mail ESMTP\r\n", End.FIN)),
    ("speaks HTTP/0.9", (b"<html>hello</html>\n\n", End.FIN)),
    ("has a status that is none", (b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",)),
    ("has a status of two digits", (b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",)),
    ("has a status of four digits", (b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",)),
    ("has an odd version", (b"HTTP/x.y 200 OK\r\nContent-Length: 0\r\n\r\n",)),
    ("has two lengths", (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",)),
    ("has two lengths in a list", (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\nok!",)),
    ("has a negative length", (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",)),
    ("has a length that is none", (b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok",)),
    ("has an absurd length", (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\nok",)),
    ("has an unknown transfer coding", (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",)),
    ("has a field without a colon", (b"HTTP/1.1 200 OK\r\nX-A\r\nContent-Length: 2\r\n\r\nok",)),
    ("has a blank before a colon", (b"HTTP/1.1 200 OK\r\nX-A : b\r\nContent-Length: 2\r\n\r\nok",)),
    ("has NUL in a field", (b"HTTP/1.1 200 OK\r\nX-A: a\x00b\r\nContent-Length: 2\r\n\r\nok",)),
    ("has a head that is too large", (b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n",)),
    ("switches protocols", (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",)),
)

BREAKS_OFF: Final[tuple[tuple[str, tuple[Any, ...], bytes], ...]] = (
    ("too few bytes", (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", End.FIN), b"half"),
    ("no bytes", (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", End.FIN), b""),
    ("too few bytes, reset", (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", Pause(0.05), End.RST), b"half"),
    ("between chunks", (CHUNKED + b"4\r\nhalf\r\n", End.FIN), b"half"),
    ("between chunks, reset", (CHUNKED + b"4\r\nhalf\r\n", Pause(0.05), End.RST), b"half"),
    ("in a chunk", (CHUNKED + b"4\r\nhalf\r\n9\r\nand", End.FIN), b"halfand"),
    ("in a chunk's size", (CHUNKED + b"4\r\nhalf\r\n1", End.FIN), b"half"),
    ("before a chunk's end", (CHUNKED + b"4\r\nhalf", End.FIN), b"half"),
    ("before the first chunk", (CHUNKED, End.FIN), b""),
    ("in the last chunk", (CHUNKED + b"4\r\nhalf\r\n0\r\n", End.FIN), b"half"),
    ("in the trailers", (CHUNKED + b"4\r\nhalf\r\n0\r\nX-A: b\r\n", End.FIN), b"half"),
    ("with a chunk size that is none", (CHUNKED + b"4\r\nhalf\r\nzz\r\n",), b"half"),
    ("with a negative chunk size", (CHUNKED + b"4\r\nhalf\r\n-1\r\n",), b"half"),
    ("with an absurd chunk size", (CHUNKED + b"4\r\nhalf\r\n" + b"f" * 40 + b"\r\n",), b"half"),
    ("with a chunk that is too long", (CHUNKED + b"4\r\nhalf and more\r\n",), b"half"),
    ("compressed", (chunked(b"\x1f\x8b\x08", fields=["Content-Encoding: gzip"], last=b""), End.FIN), b"\x1f\x8b\x08"),
)


def _scheduled_or_not(name: str, rule: str, script: Script, **more: Any) -> list[Case]:
    """The same on a scheduled and on a passed-through route."""
    outcome, code = more.pop("outcome"), more.pop("counted")
    return [
        Case(name=f"{name}, scheduled", rule=rule, client=(chat(),), upstream=(script,), counts=outcome, **more),
        Case(
            name=f"{name}, passed through",
            rule=rule,
            client=(get("/v1/models"),),
            upstream=(script,),
            counts=f"passed: {code}",
            **more,
        ),
    ]


ROWS: Final = [
    *(
        case
        for name, said in NO_ANSWER
        for case in _scheduled_or_not(
            f"no answer: {name}",
            "contract 5: 502 upstream_protocol_error, retry after 1 s",
            (Wait.REQUEST, *said),
            status=502,
            code="upstream_protocol_error",
            outcome="upstream_error",
            counted="upstream_protocol_error",
            upstream_kept=False,
            settings=SHORT,
        )
    ),
    *(
        case
        for name, said, body in BREAKS_OFF
        for case in _scheduled_or_not(
            f"breaks off: {name}",
            "RFC 9112 8; contract 4: a truncated answer must never look whole",
            (Wait.REQUEST, *said),
            body=body,
            whole=False,
            client_ends="closed",
            outcome="upstream_error",
            counted="upstream_broke_off",
            upstream_kept=False,
            settings=SHORT,
        )
    ),
    *(
        Case(
            name=f"breaks off, to HTTP/1.0: {name}",
            rule="contract 4: a reset, since closing alone would look like the end",
            client=(chat(version="1.0"),),
            upstream=((Wait.REQUEST, *said),),
            body=body,
            whole=False,
            client_ends="reset",
            counts="upstream_error",
            upstream_kept=False,
            settings=SHORT,
        )
        for name, said, body in BREAKS_OFF
        if body != b""
    ),
    *_scheduled_or_not(
        "more bytes than announced",
        "RFC 9112 6.3: what follows the answer is none; the connection is not used again",
        (Wait.REQUEST, answer(body=b"ok") + b"and more"),
        body=b"ok",
        outcome="success",
        counted="completed",
        upstream_kept=False,
    ),
    *_scheduled_or_not(
        "a body to 204",
        "RFC 9110 15.3.5",
        (Wait.REQUEST, b"HTTP/1.1 204 No\r\n\r\nbody"),
        status=204,
        body=b"",
        outcome="success",
        counted="completed",
        upstream_kept=False,
    ),
    *_scheduled_or_not(
        "an answer before it was asked",
        "RFC 9112 9.2: an unsolicited answer belongs to no request",
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly", Wait.REQUEST, OK),
        body=b"early",
        outcome="success",
        counted="completed",
        upstream_kept=False,
    ),
    *_scheduled_or_not(
        "never answers",
        "contract 4: upstream.first_byte_timeout",
        (Wait.REQUEST,),
        status=504,
        code="upstream_timeout",
        outcome="timeout",
        counted="upstream_timeout",
        upstream_kept=False,
        settings=SHORT,
    ),
    *_scheduled_or_not(
        "never ends its head",
        "contract 4: upstream.first_byte_timeout",
        TRICKLED,
        status=504,
        code="upstream_timeout",
        outcome="timeout",
        counted="upstream_timeout",
        upstream_kept=False,
        settings=SHORT,
    ),
    *_scheduled_or_not(
        "stops in its body",
        "contract 4: upstream.idle_timeout; broken off, never a clean end",
        (Wait.REQUEST, CHUNKED + b"4\r\nhalf\r\n"),
        body=b"half",
        whole=False,
        client_ends="closed",
        outcome="timeout",
        counted="upstream_timeout",
        upstream_kept=False,
        settings=SHORT,
    ),
    *_scheduled_or_not(
        "stops before its end",
        "contract 4: upstream.idle_timeout",
        (Wait.REQUEST, CHUNKED + b"4\r\nhalf\r\n0\r\n"),
        body=b"half",
        whole=False,
        client_ends="closed",
        outcome="timeout",
        counted="upstream_timeout",
        upstream_kept=False,
        settings=SHORT,
    ),
    *(
        Case(
            name=f"refuses connections, {name}",
            rule="contract 4, 5: 502 upstream_unreachable",
            client=(sent,),
            upstream=(),
            status=502,
            code="upstream_unreachable",
            counts=counts,
        )
        for name, sent, counts in (
            ("scheduled", chat(), "upstream_error"),
            ("passed through", get("/v1/models"), "passed: upstream_unreachable"),
        )
    ),
    *(
        Case(
            name=f"answers {status} before the upload's end, {name}",
            rule="RFC 9112 9.5, 9.6: an early answer is passed on at once, and the connection is not used again",
            client=(request("POST", "/v1/files", *fields), *sent, Until(b"no")),
            upstream=((Wait.HEAD, *said, *then),),
            status=status,
            head=b"HTTP/1.1 %d %b\r\nContent-Length: 2\r\nConnection: close" % (status, reason_phrase(status)),
            body=b"no",
            counts="passed: completed",
            client_ends="fin",
            upstream_kept=False,
        )
        for status in (200, 401, 413)
        for name, fields, sent, said, then in (
            ("length", ["Content-Length: 99"], (b"part",), (answer(body=b"no", status=f"{status} X"),), ()),
            (
                "chunks",
                ["Transfer-Encoding: chunked"],
                (b"4\r\npart\r\n",),
                (b"HTTP/1.1 100 C\r\n\r\n", Pause(0.05), answer(body=b"no", status=f"{status} X"), Pause(0.05)),
                (End.FIN,),
            ),
            (
                "in small pieces",
                ["Content-Length: 99"],
                (b"part",),
                tuple(bytes([byte]) for byte in answer(body=b"no", status=f"{status} X")),
                (),
            ),
        )
    ),
    *(
        Case(
            name=f"goes away in the middle of an upload: {name}",
            rule="contract 5: 502",
            client=(request("POST", "/v1/files", "Content-Length: 99"), b"part"),
            upstream=((Until(b"part"), how),),
            status=502,
            code="upstream_protocol_error",
            counts="passed: upstream_protocol_error",
            client_ends="closed",
            upstream_kept=False,
        )
        for name, how in (("closes", End.FIN), ("resets", End.RST), ("half-closes", End.HALF))
    ),
    Case(
        name="answers early and takes nothing of a large scheduled body",
        rule="RFC 9112 9.5",
        client=(chat(b"x" * 30_000_000),),
        upstream=((Deaf(), Pause(0.1), answer(body=b"no", status="413 Too large")),),
        status=413,
        body=b"no",
        upstream_kept=False,
    ),
    Case(
        name="takes nothing of a large body and says nothing",
        rule="contract 4: upstream.idle_timeout",
        client=(chat(b"x" * 30_000_000),),
        upstream=((Deaf(), Pause(8)),),
        status=504,
        code="upstream_timeout",
        counts="timeout",
        upstream_kept=False,
        settings=SHORT,
    ),
]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
async def test_failing_upstream(case: Case) -> None:
    await run(case)


STALE: Final[tuple[tuple[str, tuple[Any, ...], int, int], ...]] = (
    ("closed while it was idle", (End.FIN,), 200, 2),
    ("reset while it was idle", (End.RST,), 200, 2),
    (
        "closed while it was idle, after a last word",
        (b"HTTP/1.1 408 Timeout\r\nContent-Length: 0\r\n\r\n", End.FIN),
        200,
        2,
    ),
    ("closed when the request had arrived", (Wait.REQUEST, End.FIN), 502, 1),
    ("reset when the request had arrived", (Wait.REQUEST, End.RST), 502, 1),
    ("closed in the answer's head", (Wait.REQUEST, b"HTTP/1.1 2", End.FIN), 502, 1),
)


@pytest.mark.parametrize("sent", [chat(b'{"second": 1}'), get("/v1/second")], ids=["scheduled", "passed through"])
@pytest.mark.parametrize(("name", "then", "status", "connections"), STALE, ids=[row[0] for row in STALE])
async def test_a_kept_connection_that_is_not_there_any_more(
    name: str, then: Script, status: int, connections: int, sent: bytes
) -> None:
    """RFC 9110 9.2.2: what may have been acted on is not sent again."""
    async with (
        raw_upstream((Wait.REQUEST, OK, *then), (Wait.REQUEST, answer(body=b"second"))) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((chat(), Until(b"ok")))
        size = len(client.received)
        if Wait.REQUEST not in then:
            await until(lambda: upstream.wires[0].ended)
        await client.play((sent,))
        await client.until(lambda: read_reply(bytes(client.received[size:]), client.ended) is not None)
        reply = read_reply(bytes(client.received[size:]), client.ended)
        assert reply is not None
        assert (reply.status, len(upstream.wires)) == (status, connections)
        await proxy.settled()


@pytest.mark.parametrize(
    "sent",
    [chat(b'{"second": 1}'), get("/v1/second"), request("POST", "/v1/files", body=b"x" * 1000)],
    ids=["scheduled", "passed through", "upload"],
)
@pytest.mark.parametrize("how", [End.FIN, End.RST], ids=["closed", "reset"])
async def test_a_kept_connection_that_closes_in_the_moment_of_the_request(
    how: End, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic race: the request is on its way when the upstream has closed. Nothing of it has been acknowledged, so
    nothing of it can have been processed, and it is sent once more (RFC 9110 9.2.2)."""
    monkeypatch.setattr(network.Stream, "get_extra_info", _unaware)
    async with (
        raw_upstream((Wait.REQUEST, OK, how), (Wait.REQUEST, answer(body=b"second"))) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((chat(), Until(b"ok")))
        await until(lambda: upstream.wires[0].ended)
        await client.play((sent, Until(b"second")))
        assert b"second" in client.received
        assert sent.split(b"\r\n\r\n")[1] in upstream.heard[1]
        assert len(upstream.wires) == 2
        await proxy.settled()


async def test_a_fresh_connection_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 4: the upstream is tried once; an old connection that is gone is no try."""
    write = network.Stream.write

    async def late(stream: network.Stream, data: bytes, timeout: float | None = None) -> None:
        await trio.sleep(0.05)
        await write(stream, data, timeout)

    monkeypatch.setattr(network.Stream, "write", late)
    async with (
        raw_upstream((End.FIN,), (Wait.REQUEST, OK)) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.play((chat(), Until(b"502")))
        assert b" 502 " in client.received
        assert len(upstream.wires) == 1


def _unaware(stream: network.Stream, info: str) -> object:
    """As if the connection's end had not been seen yet."""
    return None if info == "is_readable" else GET_EXTRA_INFO(stream, info)
