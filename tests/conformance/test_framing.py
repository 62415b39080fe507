"""Connections and framing: what ends with the exchange, what goes on, and what is refused because it can be read in two
ways (RFC 9112 sections 2.2, 3, 5, 6, 7, 9; RFC 9110 section 5.5)."""

from __future__ import annotations

from typing import Any, Final

import pytest
from case import ANSWER, CHAT, OK, Case, answer, chat, chunked, get, request, run
from wire import End, Pause, Wait, raw_client, raw_upstream

from support import running_proxy

BASE: Final = b"Host: UPSTREAM\r\n"
FILES: Final = b"POST /v1/files HTTP/1.1\r\nHost: x\r\n"

CONNECTION_CASES: Final = [
    Case(
        name="HTTP/1.1 is kept",
        rule="RFC 9112 9.3",
        client=(chat(),),
    ),
    Case(
        name="HTTP/1.1 with Connection: close",
        rule="RFC 9112 9.6",
        client=(chat(b"{}", "Connection: close"),),
        head=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close",
        client_ends="fin",
    ),
    *(
        Case(
            name=f"what follows a last request is ignored: {name}",
            rule="RFC 9112 9.6",
            client=(sent, *then),
            upstream=((Wait.REQUEST, Pause(0.05), OK),),
            body=b"ok",
            client_ends="fin",
        )
        for name, sent, then in (
            ("an empty line", chat(b"{}", "Connection: close") + b"\r\n", ()),
            ("an empty line, later", chat(b"{}", "Connection: close"), (Pause(0.02), b"\r\n")),
            ("another request", chat(b"{}", "Connection: close") + chat(), ()),
            ("another request, later", chat(b"{}", "Connection: close"), (Pause(0.02), chat())),
            ("an empty line, HTTP/1.0", chat(version="1.0") + b"\r\n", ()),
            ("nonsense", chat(b"{}", "Connection: close") + bytes(range(256)), ()),
        )
    ),
    Case(
        name="HTTP/1.0 is closed",
        rule="RFC 9112 9.3",
        client=(chat(version="1.0"),),
        client_ends="fin",
        forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode() + BASE + b"Content-Length: 2\r\n\r\n{}",
    ),
    Case(
        name="HTTP/1.0 without Host",
        rule="RFC 9112 3.2: Host is demanded of HTTP/1.1 only",
        client=(get("/v1/models", version="1.0", host=""),),
        client_ends="fin",
        forwarded=b"GET /v1/models HTTP/1.1\r\n" + BASE + b"\r\n",
        counts="passed: completed",
    ),
    Case(
        name="HTTP/1.0 with keep-alive",
        rule="RFC 9112 9.3, appendix C.2.2: a server may close it all the same, and says so",
        client=(chat(b"{}", "Connection: keep-alive", version="1.0"),),
        client_ends="fin",
    ),
    Case(
        name="HTTP/1.0 gets no chunks",
        rule="RFC 9112 6.1: no Transfer-Encoding to HTTP/1.0",
        client=(chat(version="1.0"),),
        upstream=((Wait.REQUEST, chunked(b"abc", b"def", fields=["X-A: b"])),),
        head=b"HTTP/1.1 200 OK\r\nX-A: b\r\nConnection: close",
        body=b"abcdef",
        client_ends="fin",
    ),
    Case(
        name="HTTP/1.0 refused by us",
        rule="contract 5",
        client=(request("GET", "/v2", version="1.0"),),
        status=404,
        code="not_found",
        forwarded=b"",
        counts="refused: not_found",
        client_ends="fin",
    ),
    Case(
        name="the upstream's Connection: close is its own affair",
        rule="RFC 9112 9.6, RFC 9110 7.6.1",
        client=(chat(),),
        upstream=((Wait.REQUEST, answer("Connection: close")),),
        head=b"HTTP/1.1 200 OK\r\nContent-Length: 2",
        upstream_kept=False,
    ),
    Case(
        name="an HTTP/1.0 upstream",
        rule="RFC 9112 9.3: not kept",
        client=(chat(),),
        upstream=((Wait.REQUEST, answer(version="1.0"), End.FIN),),
        head=b"HTTP/1.1 200 OK\r\nContent-Length: 2",
        upstream_kept=False,
    ),
    Case(
        name="an HTTP/1.0 upstream with keep-alive",
        rule="RFC 9112 9.3: need not be kept",
        client=(chat(),),
        upstream=((Wait.REQUEST, answer("Connection: keep-alive", version="1.0")),),
        upstream_kept=False,
    ),
    Case(
        name="an HTTP/1.0 upstream ends its answer by closing",
        rule="RFC 9112 6.3 (8)",
        client=(chat(),),
        upstream=((Wait.REQUEST, b"HTTP/1.0 200 OK\r\n\r\nuntil ", Pause(0.02), b"the end", End.FIN),),
        body=b"until the end",
        head=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked",
        upstream_kept=False,
    ),
    Case(
        name="closing is the end, to an HTTP/1.0 client",
        rule="RFC 9112 6.3 (8)",
        client=(chat(version="1.0"),),
        upstream=((Wait.REQUEST, b"HTTP/1.0 200 OK\r\n\r\nuntil the end", End.FIN),),
        body=b"until the end",
        upstream_kept=False,
        client_ends="fin",
    ),
]


def _refused(name: str, rule: str, *sent: Any, **more: Any) -> Case:
    values: dict[str, Any] = {
        "status": 400,
        "code": "invalid_request",
        "forwarded": b"",
        "counts": "refused: invalid_request",
        "client_ends": "fin",
    }
    return Case(name=name, rule=rule, client=sent, **(values | more))


SMUGGLED: Final = b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

REFUSED_CASES: Final = [
    *(
        _refused(name, rule, sent)
        for name, rule, sent in (
            (
                "both framings",
                "RFC 9112 6.1",
                FILES + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            ),
            (
                "both framings, the other way round",
                "RFC 9112 6.1",
                FILES + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            ),
            (
                "both framings, smuggling",
                "RFC 9112 11.2",
                FILES + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
            ),
            (
                "both framings, scheduled",
                "RFC 9112 6.1",
                request("POST", CHAT, "Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
            ),
            ("two Content-Lengths", "RFC 9112 6.3", FILES + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
            ("two Content-Lengths in a list", "RFC 9112 6.3", FILES + b"Content-Length: 3, 4\r\n\r\nabcd"),
            ("negative Content-Length", "RFC 9110 8.6", FILES + b"Content-Length: -1\r\n\r\n"),
            ("signed Content-Length", "RFC 9110 8.6", FILES + b"Content-Length: +3\r\n\r\nabc"),
            ("hexadecimal Content-Length", "RFC 9110 8.6", FILES + b"Content-Length: 0x3\r\n\r\nabc"),
            ("Content-Length with a blank", "RFC 9110 8.6", FILES + b"Content-Length: 3 3\r\n\r\nabc"),
            ("empty Content-Length", "RFC 9110 8.6", FILES + b"Content-Length:\r\n\r\n"),
            ("an absurd Content-Length", "RFC 9110 8.6", FILES + b"Content-Length: " + b"9" * 50 + b"\r\n\r\n"),
            ("Transfer-Encoding that is not chunked", "RFC 9112 6.1", FILES + b"Transfer-Encoding: gzip\r\n\r\n"),
            (
                "Transfer-Encoding that ends otherwise",
                "RFC 9112 6.3",
                FILES + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
            ),
            (
                "Transfer-Encoding before chunked",
                "RFC 9112 6.1",
                FILES + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            ),
            (
                "two Transfer-Encodings",
                "RFC 9112 6.1",
                FILES + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
            ),
            (
                "Transfer-Encoding with an odd blank",
                "RFC 9112 6.1",
                FILES + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
            ),
            (
                "Transfer-Encoding with HTTP/1.0",
                "RFC 9112 6.1",
                b"POST /v1/files HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            ),
            ("a blank before the colon", "RFC 9112 5.1", FILES + b"X-A : b\r\n\r\n"),
            ("a blank before the framing's colon", "RFC 9112 5.1", FILES + b"Content-Length : 3\r\n\r\nabc"),
            ("a field without a colon", "RFC 9112 5", FILES + b"X-A\r\n\r\n"),
            ("a field without a name", "RFC 9112 5", FILES + b": b\r\n\r\n"),
            ("a field name with a blank", "RFC 9110 5.1", FILES + b"X A: b\r\n\r\n"),
            ("a field name beyond ASCII", "RFC 9110 5.1", FILES + b"X-\xe4: b\r\n\r\n"),
            ("a folded first field", "RFC 9112 5.2", b"GET /v1/models HTTP/1.1\r\n Host: x\r\n\r\n"),
            ("NUL in a value", "RFC 9110 5.5", FILES + b"X-A: a\x00b\r\n\r\n"),
            ("a bare CR in a value", "RFC 9112 2.2", FILES + b"X-A: a\rb\r\n\r\n"),
            ("no Host", "RFC 9112 3.2", b"GET /v1/models HTTP/1.1\r\n\r\n"),
            ("two Hosts", "RFC 9112 3.2", b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
            ("NUL in the target", "RFC 9112 3", b"GET /v1/mo\x00dels HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("a target beyond ASCII", "RFC 9112 3", "GET /v1/m\xf6dels HTTP/1.1\r\nHost: x\r\n\r\n".encode("latin-1")),
            ("a blank in the target", "RFC 9112 3", b"GET /v1/a b HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("two blanks in the request line", "RFC 9112 3", b"GET  /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("no version", "RFC 9112 3", b"GET /v1/models\r\nHost: x\r\n\r\n"),
            ("no target", "RFC 9112 3", b"GET HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("an odd version", "RFC 9112 2.3", b"GET /v1/models HTTP/1.1x\r\nHost: x\r\n\r\n"),
            ("a version in lower case", "RFC 9112 2.3", b"GET /v1/models http/1.1\r\nHost: x\r\n\r\n"),
            ("an odd method", "RFC 9110 9.1", b"G(T /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("a blank before the method", "RFC 9112 3", b" GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
            ("TLS on a plain port", "RFC 9112 3", bytes.fromhex("16030100c8010000c40303") + bytes(200)),
            ("an HTTP/0.9 request", "RFC 9112 3", b"GET /\r\n\r\n"),
            ("binary nonsense", "RFC 9112 3", bytes(range(128, 256)) + b"\r\n\r\n"),
            (
                "a chunk size that is none",
                "RFC 9112 7.1",
                FILES + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
            ),
        )
    ),
    *(
        _refused(
            f"Host: {host}",
            "RFC 9112 3.2",
            f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"),
            client_ends="kept",
        )
        for host in ("a b", "a/b", "user@a", "\xe4", "[::1", "a:b", "a%zz")
    ),
    *(
        _refused(
            f"Content-Length: {length}",
            "RFC 9110 8.6: no overflows",
            FILES + f"Content-Length: {length}\r\n\r\nABCDE".encode() + SMUGGLED,
        )
        for length in (2**63, 2**64 + 5)
    ),
    _refused("a control character in a value", "RFC 9110 5.5", FILES + b"X-A: a\x01b\r\n\r\n", client_ends="kept"),
    *(
        _refused(f"HTTP/{version}", "RFC 9112 2.3", f"GET /v1/models HTTP/{version}\r\nHost: x\r\n\r\n".encode())
        for version in ("2.0", "1.2", "0.9", "3.0", "9.9")
    ),
]

ROWS: Final = [*CONNECTION_CASES, *REFUSED_CASES]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
async def test_framing(case: Case) -> None:
    await run(case)


@pytest.mark.parametrize("odd", [(), ("Expect: 100-continue",)], ids=["read by llhttp", "read by h11"])
@pytest.mark.parametrize(("status", "phrase"), [(200, b"OK"), (404, b"Not Found"), (599, b"")])
async def test_the_status_line_has_its_reason_phrase(odd: tuple[str, ...], status: int, phrase: bytes) -> None:
    """RFC 9112 section 4 lets it be empty, but h2load and others take no status from such a line."""
    async with (
        raw_upstream((Wait.REQUEST, answer(status=f"{status} Odd"))) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.stream.send_all(get("/v1/models", *odd))
        await client.until(lambda: client.received.endswith(b"ok"))
        assert b"HTTP/1.1 %d %b\r\n" % (status, phrase) in client.received


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ("1.1", ("Upgrade: h2c",)),
        ("1.1", ("Upgrade: h2c", "Connection: Upgrade")),
        ("1.1", ("Upgrade: h2c", "HTTP2-Settings: AAMAAABk")),
        ("1.1", ("Upgrade: h2c", "Connection: Upgrade", "HTTP2-Settings: AAMAAABk")),
        ("1.1", ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", *["HTTP2-Settings: AAMAAABk"] * 2)),
        ("1.0", ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk")),
    ],
)
async def test_an_upgrade_to_h2c_that_is_none_is_ignored(version: str, fields: tuple[str, ...]) -> None:
    """RFC 9110 section 7.8, RFC 7540 section 3.2.1."""
    async with (
        raw_upstream(ANSWER) as upstream,
        running_proxy(upstream.url) as proxy,
        raw_client(proxy.port) as client,
    ):
        await client.stream.send_all(get("/v1/models", *fields, version=version))
        await client.until(lambda: client.received.endswith(b"ok") or bool(client.ended))
        assert client.received.startswith(b"HTTP/1.1 200 ")
