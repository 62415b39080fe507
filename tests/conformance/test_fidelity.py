"""What arrives on the other side is what was sent: targets, fields, bodies, framing (RFC 9110, RFC 9112)."""

from __future__ import annotations

import gzip
from typing import Final

import pytest
from case import CHAT, OK, Case, answer, chat, chunked, get, request, run
from wire import End, Pause, Until, Wait

from trioproxy.http1_server import reason_phrase

BASE: Final = b"Host: UPSTREAM\r\n"
GZIPPED: Final = gzip.compress(b'{"compressed": true}' * 10, mtime=0)
ALL_BYTES: Final = bytes(range(256)) * 5

TARGETS: Final = (
    "/v1/models",
    "/v1",
    "/v1/",
    "/v1//",
    "/v1//models",
    "/v1/models/",
    "/v1/models//gpt",
    "/v1/a%20b",
    "/v1/a%2Fb",
    "/v1/a%2fb",
    "/v1/%E2%82%AC",
    "/v1/%e2%82%ac",
    "/v1/%ff%fe",
    "/v1/%41%7E~",
    "/v1/100%",
    "/v1/%",
    "/v1/%zz",
    "/v1/%2",
    "/v1/%25252e",
    "/v1/a+b",
    "/v1/a;v=1,2",
    "/v1/a:b@c",
    "/v1/!$&'()*+,;=:@-._~",
    '/v1/[x]|{y}^`"<z>',
    "/v1/...",
    "/v1/..a",
    "/v1/.a",
    "/v1/a..",
    "/v1/a%00b",
    "/v1/a%0d%0ab",
    "/v1/files/file-1/content",
    "/v1/models?",
    "/v1/models??",
    "/v1/models?a=1&a=2&b=%20+&c",
    "/v1/models?a=1&&b",
    "/v1/models?x=/../y",
    "/v1/models?q=a?b",
    "/v1/models?=%zz;",
    "/v1/models?a[]=1&a[]=2",
    "/v1/models?redirect=http://x/y//z",
    "/v1/" + "a" * 8000,
    "/v1/models?" + "q" * 8000,
)


def _passed(name: str, rule: str, sent: bytes, forwarded: bytes | None, **more: object) -> Case:
    return Case(name=name, rule=rule, client=(sent,), forwarded=forwarded, counts="passed: completed", **more)  # type: ignore[arg-type]


def _target(target: str) -> Case:
    kept = target.removesuffix("?") if target.count("?") == 1 else target  # Hypercorn's loss of a bare `?`
    name = target if len(target) < 60 else f"{target[:20]} and {len(target)} characters"
    return _passed(
        f"target {name}",
        "RFC 9112 3.2: the target goes on as it was sent",
        get(target),
        b"GET " + kept.encode() + b" HTTP/1.1\r\n" + BASE + b"\r\n",
    )


TARGET_CASES: Final = [
    *map(_target, TARGETS),
    *(
        _passed(
            f"absolute-form {target}",
            "RFC 9112 3.2.2: absolute-form is accepted, and its host ignored",
            get(target),
            b"GET " + path.encode() + b" HTTP/1.1\r\n" + BASE + b"\r\n",
        )
        for target, path in (
            ("http://other/v1/models", "/v1/models"),
            ("http://other:99/v1//a%20b?x=1", "/v1//a%20b?x=1"),
            ("HTTPS://user@other/v1/models?a=http://b/c", "/v1/models?a=http://b/c"),
        )
    ),
    *(
        Case(
            name=f"refused target {target}",
            rule=rule,
            client=(get(target),),
            forwarded=b"",
            status=status,
            code=code,
            counts=f"refused: {code}",
        )
        for target, status, code, rule in (
            ("/v1/../admin", 400, "invalid_request", "contract 1: dot segments"),
            ("/v1/a/../b", 400, "invalid_request", "contract 1: dot segments"),
            ("/v1/.", 400, "invalid_request", "contract 1: dot segments"),
            ("/v1/..", 400, "invalid_request", "contract 1: dot segments"),
            ("/v1/./models", 400, "invalid_request", "contract 1: dot segments"),
            ("/v1/%2e%2e/admin", 400, "invalid_request", "contract 1: dot segments, encoded"),
            ("/v1/%2E%2e/admin", 400, "invalid_request", "contract 1: dot segments, encoded"),
            ("/v1/.%2e/admin", 400, "invalid_request", "contract 1: dot segments, encoded"),
            ("/v1/%2e/models", 400, "invalid_request", "contract 1: dot segments, encoded"),
            ("/v1/a%2f..%2fb", 400, "invalid_request", "contract 1: dot segments behind encoded slashes"),
            ("/v1/..%2fadmin", 400, "invalid_request", "contract 1: dot segments behind encoded slashes"),
            ("/v1/..%5cadmin", 400, "invalid_request", "contract 1: dot segments, backslashes"),
            ("/v1/..\\admin", 400, "invalid_request", "contract 1: dot segments, backslashes"),
            ("http://x/v1/../admin", 400, "invalid_request", "contract 1: dot segments"),
            ("/v1/models#part", 400, "invalid_request", "RFC 9112 3.2: a target has no fragment"),
            ("/v1/models?a#part", 400, "invalid_request", "RFC 9112 3.2: a target has no fragment"),
            ("/v2/models", 404, "not_found", "contract 1"),
            ("/", 404, "not_found", "contract 1"),
            ("/v1models", 404, "not_found", "contract 1"),
            ("/V1/models", 404, "not_found", "RFC 9110 4.2.3: paths are case-sensitive"),
            ("//v1/models", 404, "not_found", "contract 1: the path as it was sent"),
            ("/%76%31/models", 404, "not_found", "contract 1: the path as it was sent"),
            ("http://x", 404, "not_found", "RFC 9112 3.2.2"),
            ("*", 404, "not_found", "RFC 9112 3.2.4"),
            ("/health/", 404, "not_found", "contract 1"),
            ("/metrics/x", 404, "not_found", "contract 1"),
        )
    ),
]

FIELDS: Final = (
    "X-Custom: one",
    "x-CUSTOM: two",
    "X-custom: three",
    "Accept: application/json",
    "Accept-Encoding: gzip, br;q=0.5",
    "Authorization: Bearer sk-secret",
    "OpenAI-Organization: org",
    "OpenAI-Beta: assistants=v2",
    "User-Agent: OpenAI/Python 2.0 (x; y)",
    "X-Stainless-Retry-Count: 0",
    "Cookie: a=1; b=2",
    "Cookie: c=3",
    "X-Empty:",
    "X-Forwarded-For: 1.2.3.4",
    "Forwarded: for=1.2.3.4",
    "Via: 1.1 other",
    "Range: bytes=0-9",
    'If-None-Match: "etag", W/"x"',
    "Idempotency-Key: 5",
    "X_Underscore: 1",
    "!#$%&'*+-.^_`|~: token characters",
    "X-Colons: a:b: c",
    "X-Latin: \xe4\xf6\xfc",
    "X-Tab: a\tb",
    'X-Quoted: "a\\"b"',
    "X-Long: " + "l" * 20_000,
)

HOP_BY_HOP: Final = (
    "Connection: keep-alive",
    "Connection: X-Named",
    "connection: x-named, keep-alive",
    "Connection: X-Named , X-Other",
    "Connection: close, X-Named",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "Proxy-Authorization: Basic x",
    "PROXY-AUTHORIZATION: Basic x",
    "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    "TE: trailers, deflate",
    "Upgrade: TLS/1.0",
    "X-Priority: high",
    "x-request-timeout: 30",
)


def _lines(*fields: str) -> bytes:
    return "".join(f"{field}\r\n" for field in fields).encode("latin-1")


REQUEST_FIELD_CASES: Final = [
    Case(
        name="every field in its order and its letter case, scheduled",
        rule="RFC 9110 5.2, 5.3; contract 1",
        client=(chat(b"{}", *FIELDS),),
        forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode()
        + BASE
        + _lines(*(field.replace("X-Empty:", "X-Empty: ") for field in FIELDS), "Content-Length: 2")
        + b"\r\n{}",
    ),
    _passed(
        "every field in its order and its letter case, passed through",
        "RFC 9110 5.2, 5.3; contract 1",
        get("/v1/models", *FIELDS),
        b"GET /v1/models HTTP/1.1\r\n"
        + BASE
        + _lines(*(field.replace("X-Empty:", "X-Empty: ") for field in FIELDS))
        + b"\r\n",
    ),
    *(
        _passed(
            f"{field} stays here",
            "RFC 9110 7.6.1; contract 1",
            get("/v1/models", field, "X-Named: 1", "X-Other: 2", "X-Kept: 3"),
            b"GET /v1/models HTTP/1.1\r\n"
            + BASE
            + (b"" if "named" in field.lower() else b"X-Named: 1\r\n")
            + (b"" if "X-Other" in field else b"X-Other: 2\r\n")
            + b"X-Kept: 3\r\n\r\n",
            client_ends="fin" if "close" in field else "kept",
        )
        for field in HOP_BY_HOP
    ),
    *(
        Case(
            name=f"{field} stays here, scheduled",
            rule="RFC 9110 7.6.1; contract 1",
            client=(chat(b"{}", field, "X-Named: 1", "X-Other: 2"),),
            forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode()
            + BASE
            + (b"" if "named" in field.lower() else b"X-Named: 1\r\n")
            + (b"" if "X-Other" in field else b"X-Other: 2\r\n")
            + b"Content-Length: 2\r\n\r\n{}",
            client_ends="fin" if "close" in field else "kept",
        )
        for field in HOP_BY_HOP
    ),
    _passed(
        "Connection names Content-Length",
        "RFC 9110 7.6.1: fields that frame the message are not up to Connection",
        request("POST", "/v1/files", "Connection: content-length", body=b"abc"),
        b"POST /v1/files HTTP/1.1\r\n" + BASE + b"Content-Length: 3\r\n\r\nabc",
    ),
    _passed(
        "Connection names Authorization",
        "RFC 9110 7.6.1",
        get("/v1/models", "Connection: authorization", "Authorization: Bearer x"),
        b"GET /v1/models HTTP/1.1\r\n" + BASE + b"\r\n",
    ),
    _passed(
        "no Accept-Encoding or User-Agent is added",
        "contract 1: nothing is added that changes meaning",
        get("/v1/models"),
        b"GET /v1/models HTTP/1.1\r\n" + BASE + b"\r\n",
    ),
    _passed(
        "the client's X-Request-Id goes on and comes back as ours",
        "contract 6",
        get("/v1/models", "X-Request-Id: mine-1"),
        b"GET /v1/models HTTP/1.1\r\n" + BASE + b"X-Request-Id: mine-1\r\n\r\n",
        head=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-request-id: mine-1",
    ),
    Case(
        name="the upstream's key replaces all credentials",
        rule="contract 1",
        client=(
            chat(b"{}", "authorization: Bearer a", "OpenAI-Organization: o", "openai-project: p", "X-Api-Key: kept"),
        ),
        forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode()
        + BASE
        + b"X-Api-Key: kept\r\nAuthorization: Bearer sk-proxy\r\nContent-Length: 2\r\n\r\n{}",
        settings={"upstream": {"api_key": "sk-proxy"}},
    ),
    _passed(
        "leading and trailing blanks of a value are no part of it",
        "RFC 9110 5.5",
        b"GET /v1/models HTTP/1.1\r\nHost:x\r\nX-A:  \t v w \t \r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n" + BASE + b"X-A: v w\r\n\r\n",
    ),
    _passed(
        "empty lines before a request are ignored",
        "RFC 9112 2.2",
        b"\r\n\r\n" + get("/v1/models"),
        b"GET /v1/models HTTP/1.1\r\n" + BASE + b"\r\n",
    ),
    Case(
        name="an empty line after a body is ignored",
        rule="RFC 9112 2.2",
        client=(chat() + b"\r\n",),
    ),
    _passed(
        "200 fields",
        "contract 1",
        get("/v1/models", *(f"X-{n}: {n}" for n in range(200))),
        b"GET /v1/models HTTP/1.1\r\n" + BASE + _lines(*(f"X-{n}: {n}" for n in range(200))) + b"\r\n",
    ),
    _passed(
        "60,000 bytes of fields",
        "contract 1: the limit is 64 KiB",
        get("/v1/models", "X-Big: " + "b" * 60_000),
        b"GET /v1/models HTTP/1.1\r\n" + BASE + b"X-Big: " + b"b" * 60_000 + b"\r\n\r\n",
    ),
]

ANSWER_FIELDS: Final = (
    "Server: upstream/1",
    "Date: Mon, 23 Nov 2026 17:00:00 GMT",
    "Content-Type: application/json; charset=utf-8",
    "X-Repeated: 1",
    "x-repeated: 2",
    "X-REPEATED: 3",
    "Set-Cookie: a=1",
    "Set-Cookie: b=2; Path=/",
    "OpenAI-Processing-Ms: 12",
    "X-RateLimit-Remaining-Requests: 5",
    'ETag: W/"x"',
    "Vary: Accept",
    "Via: 1.1 cdn",
    "CF-Ray: abc",
    "Strict-Transport-Security: max-age=1",
    'Alt-Svc: h3=":443"',
    "X-Latin: \xe4",
    "!#$%&'*+-.^_`|~: token",
    "X-Long: " + "l" * 30_000,
)

STATUSES: Final = (
    *(200, 201, 202, 206, 207, 299, 301, 302, 303, 307, 308),
    *(400, 401, 402, 403, 404, 405, 406, 408, 409, 410, 413, 415, 416, 418, 422, 425, 429, 431, 451, 499),
    *(500, 501, 502, 503, 504, 507, 520, 529, 599),
)

ANSWER_HOP_BY_HOP: Final = (
    "Connection: keep-alive",
    "Connection: X-Named",
    "Keep-Alive: timeout=5, max=100",
    "Proxy-Connection: keep-alive",
    "Proxy-Authorization: x",
    "TE: x",
    "Upgrade: h2c",
    "HTTP2-Settings: x",
    "X-TrioProxy-Request-Id: theirs",
)

ANSWER_FIELD_CASES: Final = [
    Case(
        name="every field of the answer in its order and its letter case",
        rule="RFC 9110 5.2, 5.3; contract 1",
        client=(chat(),),
        upstream=((Wait.REQUEST, answer(*ANSWER_FIELDS)),),
        head=b"HTTP/1.1 200 OK\r\n" + _lines(*ANSWER_FIELDS) + b"Content-Length: 2",
    ),
    *(
        Case(
            name=f"{field} of the answer stays here",
            rule="RFC 9110 7.6.1; contract 1",
            client=(chat(),),
            upstream=((Wait.REQUEST, answer(field, "X-Named: 1", "X-Kept: 2")),),
            head=b"HTTP/1.1 200 OK\r\n"
            + (b"" if "X-Named" in field else b"X-Named: 1\r\n")
            + b"X-Kept: 2\r\nContent-Length: 2",
        )
        for field in ANSWER_HOP_BY_HOP
    ),
    Case(
        name="the upstream's x-request-id wins",
        rule="contract 6",
        client=(chat(b"{}", "X-Request-Id: mine"),),
        upstream=((Wait.REQUEST, answer("X-Request-ID: theirs")),),
        head=b"HTTP/1.1 200 OK\r\nX-Request-ID: theirs\r\nContent-Length: 2",
    ),
    *(
        Case(
            name=f"status {status} goes through",
            rule="contract 1, 5: status exact, and which outcome it is",
            client=(chat(),),
            upstream=((Wait.REQUEST, answer("X-A: b", body=b"text", status=f"{status} Anything at all")),),
            status=status,
            head=f"HTTP/1.1 {status} {reason_phrase(status).decode()}\r\nX-A: b\r\nContent-Length: 4".encode(),
            body=b"text",
            counts="upstream_error" if status >= 500 or status == 429 else "success",
        )
        for status in STATUSES
    ),
    Case(
        name="a status without a reason phrase",
        rule="RFC 9112 4",
        client=(chat(),),
        upstream=((Wait.REQUEST, b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"),),
        body=b"",
    ),
    Case(
        name="a status without the blank before the missing reason phrase",
        rule="RFC 9112 4: lenient",
        client=(chat(),),
        upstream=((Wait.REQUEST, b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"),),
        body=b"",
    ),
]


def _upload(*fields: str, body: bytes) -> bytes:
    return "\r\n".join(["POST /v1/files HTTP/1.1", "Host: proxy", *fields, "", ""]).encode() + body


CHUNKED: Final = b"Transfer-Encoding: chunked\r\n\r\n"

REQUEST_BODY_CASES: Final = [
    *(
        Case(
            name=f"scheduled body: {name}",
            rule="contract 1, 2: byte for byte",
            client=(chat(sent),),
            forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode()
            + BASE
            + b"Content-Length: %d\r\n\r\n%b" % (len(arrives), arrives),
        )
        for name, sent, arrives in (
            ("empty", b"", b""),
            ("all bytes", ALL_BYTES, ALL_BYTES),
            ("compressed", GZIPPED, GZIPPED),
            ("blanks and order", b' {"b" : 1.0e1,\n"a":[1 , 2]} ', b' {"b" : 1.0e1,\n"a":[1 , 2]} '),
            ("repeated keys", b'{"a":1,"a":2}', b'{"a":1,"a":2}'),
            ("with priority", b'{"model":"m","priority":"high","x":1.50}', b'{"model":"m","x":1.50}'),
            ("nested priority", b'{"a":{"priority":1}}', b'{"a":{"priority":1}}'),
            ("not JSON", b'{"priority": 1', b'{"priority": 1'),
            ("1 MB", b"x" * 1_000_000, b"x" * 1_000_000),
        )
    ),
    Case(
        name="scheduled body in chunks gets a length",
        rule="RFC 9112 7.1; the body is read completely first (contract 3)",
        client=(
            request("POST", CHAT, "Transfer-Encoding: chunked"),
            b"1\r\n{\r\n",
            Pause(0.02),
            b"1\r\n}\r\n0\r\n\r\n",
        ),
        forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode() + BASE + b"Content-Length: 2\r\n\r\n{}",
    ),
    _passed(
        "passed-through body with a length",
        "RFC 9112 6.2",
        _upload("Content-Length: 1280", body=ALL_BYTES),
        b"POST /v1/files HTTP/1.1\r\n" + BASE + b"Content-Length: 1280\r\n\r\n" + ALL_BYTES,
    ),
    _passed(
        "passed-through empty body with a length",
        "RFC 9110 8.6",
        _upload("Content-Length: 0", body=b""),
        b"POST /v1/files HTTP/1.1\r\n" + BASE + b"Content-Length: 0\r\n\r\n",
    ),
    _passed(
        "POST without a body",
        "RFC 9112 6.3",
        _upload(body=b""),
        b"POST /v1/files HTTP/1.1\r\n" + BASE + b"\r\n",
    ),
    _passed(
        "GET with a body",
        "RFC 9110 9.3.1",
        request("GET", "/v1/models", body=b"why"),
        b"GET /v1/models HTTP/1.1\r\n" + BASE + b"Content-Length: 3\r\n\r\nwhy",
    ),
    _passed(
        "DELETE with a body",
        "RFC 9110 9.3.5",
        request("DELETE", "/v1/models/x", body=b"why"),
        b"DELETE /v1/models/x HTTP/1.1\r\n" + BASE + b"Content-Length: 3\r\n\r\nwhy",
    ),
    *(
        _passed(
            f"passed-through chunks: {name}",
            "RFC 9112 7.1",
            _upload(body=b"")[:-2] + CHUNKED + sent,
            b"POST /v1/files HTTP/1.1\r\n" + BASE + CHUNKED + arrives,
        )
        for name, sent, arrives in (
            ("one", b"3\r\nabc\r\n0\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n"),
            ("none", b"0\r\n\r\n", b"0\r\n\r\n"),
            ("upper-case and leading zeros", b"000A\r\n0123456789\r\n000\r\n\r\n", b"a\r\n0123456789\r\n0\r\n\r\n"),
            ("extensions", b'3;a=b;c="d;e"\r\nabc\r\n0;x\r\n\r\n', b"3\r\nabc\r\n0\r\n\r\n"),
            ("trailers", b"3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-Two: 2\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n"),
        )
    ),
    _passed(
        "Trailer announces what is dropped",
        "RFC 9110 6.5.1: trailers may be discarded",
        _upload("Trailer: X-Sum", body=b"")[:-2] + CHUNKED + b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n",
        None,
    ),
    _passed(
        "Transfer-Encoding in another letter case",
        "RFC 9112 7: case-insensitive",
        _upload("transfer-ENCODING: Chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
        b"POST /v1/files HTTP/1.1\r\n" + BASE + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
    ),
    _passed(
        "equal Content-Lengths",
        "RFC 9112 6.3: may be taken for one",
        _upload("Content-Length: 3", "Content-Length: 3", body=b"abc"),
        b"POST /v1/files HTTP/1.1\r\n" + BASE + b"Content-Length: 3\r\n\r\nabc",
    ),
    Case(
        name="Expect: 100-continue, scheduled",
        rule="RFC 9110 10.1.1: answered, and not passed on",
        client=(request("POST", CHAT, "Expect: 100-continue", "Content-Length: 2"), Until(b"100 "), b"{}"),
        forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode() + BASE + b"Content-Length: 2\r\n\r\n{}",
        interim=(100,),
    ),
    Case(
        name="Expect: 100-continue, passed through in chunks",
        rule="RFC 9110 10.1.1",
        client=(
            request("POST", "/v1/files", "expect: 100-Continue", "Transfer-Encoding: chunked"),
            Until(b"100 "),
            b"3\r\nabc\r\n0\r\n\r\n",
        ),
        forwarded=b"POST /v1/files HTTP/1.1\r\n" + BASE + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
        interim=(100,),
        counts="passed: completed",
    ),
    Case(
        name="Expect: 100-continue, body sent without waiting",
        rule="RFC 9110 10.1.1: 100 may be omitted then, and Hypercorn does not",
        client=(chat(b"{}", "Expect: 100-continue"),),
        interim=(100,),
        forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode() + BASE + b"Content-Length: 2\r\n\r\n{}",
    ),
    Case(
        name="a body byte by byte",
        rule="RFC 9112 2: framing, not packets",
        client=tuple(bytes([b]) for b in chat(b'{"a": 1}')),
        forwarded=f"POST {CHAT} HTTP/1.1\r\n".encode() + BASE + b'Content-Length: 8\r\n\r\n{"a": 1}',
    ),
]

METHOD_CASES: Final = [
    *(
        Case(
            name=f"{method} is passed through",
            rule="contract 1: every method",
            client=(request(method, "/v1/anything"),),
            forwarded=method.encode() + b" /v1/anything HTTP/1.1\r\n" + BASE + b"\r\n",
            upstream=((Wait.REQUEST, OK[:-2] if method == "HEAD" else OK),),
            counts="passed: completed",
            method=method,
            body=b"" if method == "HEAD" else b"ok",
        )
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "X-ODD!")
    ),
    Case(
        name="HEAD of a scheduled path is not scheduled",
        rule="contract 1",
        client=(request("HEAD", CHAT),),
        upstream=((Wait.REQUEST, b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\nX-A: b\r\n\r\n"),),
        head=b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\nX-A: b",
        method="HEAD",
        counts="passed: completed",
    ),
    Case(
        name="HEAD answered with a body all the same",
        rule="RFC 9110 9.3.2: it would be taken for the next answer",
        client=(request("HEAD", "/v1/models"),),
        method="HEAD",
        counts="passed: completed",
        upstream_kept=False,
    ),
    Case(
        name="HEAD answered with Transfer-Encoding",
        rule="RFC 9112 6.1, 6.3: no body to HEAD",
        client=(request("HEAD", "/v1/models"),),
        upstream=((Wait.REQUEST, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"),),
        method="HEAD",
        counts="passed: completed",
    ),
    Case(
        name="HEAD answered 404",
        rule="RFC 9110 9.3.2",
        client=(request("HEAD", "/v1/models"),),
        upstream=((Wait.REQUEST, answer("Content-Length: 77", status="404 Not", body=None)),),
        head=b"HTTP/1.1 404 Not Found\r\nContent-Length: 77",
        status=404,
        method="HEAD",
        counts="passed: completed",
    ),
    Case(
        name="HEAD refused by us has no body",
        rule="RFC 9110 9.3.2",
        client=(request("HEAD", "/v2"),),
        status=404,
        forwarded=b"",
        method="HEAD",
        counts="refused: not_found",
    ),
    Case(
        name="CORS preflight",
        rule="contract 1",
        client=(request("OPTIONS", CHAT, "Origin: http://x", "Access-Control-Request-Method: POST"),),
        upstream=((Wait.REQUEST, answer("Access-Control-Allow-Origin: *", status="204 No Content", body=None)),),
        forwarded=f"OPTIONS {CHAT} HTTP/1.1\r\n".encode()
        + BASE
        + b"Origin: http://x\r\nAccess-Control-Request-Method: POST\r\n\r\n",
        head=b"HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: *",
        status=204,
        counts="passed: completed",
    ),
    Case(
        name="a method in lower case is another method",
        rule="RFC 9110 9.1: methods are case-sensitive",
        client=(request("get", "/v1/models"),),
        forwarded=b"get /v1/models HTTP/1.1\r\n" + BASE + b"\r\n",
        counts="passed: completed",
    ),
]

ANSWER_BODY_CASES: Final = [
    *(
        Case(
            name=f"answer: {name}",
            rule="RFC 9112 6.3, 7.1; contract 1",
            client=(chat(),),
            upstream=((Wait.REQUEST, *said),),
            status=status,
            body=body,
        )
        for name, said, status, body in (
            ("all bytes", [answer(body=ALL_BYTES)], 200, ALL_BYTES),
            ("empty", [answer(body=b"")], 200, b""),
            ("compressed", [answer("Content-Encoding: gzip", body=GZIPPED)], 200, GZIPPED),
            ("compressed badly", [answer("Content-Encoding: gzip", body=b"not")], 200, b"not"),
            ("unknown encoding", [answer("Content-Encoding: x-odd", body=b"not")], 200, b"not"),
            ("1 MB", [answer(body=b"y" * 1_000_000)], 200, b"y" * 1_000_000),
            ("chunks", [chunked(b"a", b"bc", b"def")], 200, b"abcdef"),
            ("no chunks", [chunked()], 200, b""),
            (
                "chunks, compressed",
                [chunked(GZIPPED[:9], GZIPPED[9:], fields=["Content-Encoding: gzip"])],
                200,
                GZIPPED,
            ),
            ("chunks with extensions", [chunked()[:-5] + b'3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n'], 200, b"abc"),
            ("chunks with trailers", [chunked(b"abc", last=b"0\r\nX-Sum: 1\r\nX-B: 2\r\n\r\n")], 200, b"abc"),
            ("chunks in upper case", [chunked()[:-5] + b"00A\r\n0123456789\r\n00\r\n\r\n"], 200, b"0123456789"),
            ("both framings", [chunked(b"abc", fields=["Content-Length: 99"])], 200, b"abc"),
            ("equal lengths", [answer("Content-Length: 2")], 200, b"ok"),
            ("204", [answer(status="204 No Content", body=None)], 204, b""),
            ("204 with a length of 0", [answer(status="204 No Content", body=b"")], 204, b""),
            ("304", [answer('ETag: "x"', status="304 Not Modified", body=None)], 304, b""),
            ("304 with a length", [answer("Content-Length: 99", status="304 Not", body=None)], 304, b""),
            ("205", [answer(status="205 Reset", body=b"")], 205, b""),
            ("byte by byte", [bytes([byte]) for byte in chunked(b"abc", b"d")], 200, b"abcd"),
            ("bare LF lines", [b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"], 200, b"ok"),
            ("obsolete line folding", [b"HTTP/1.1 200 OK\r\nX-A: b\r\n  c\r\nContent-Length: 2\r\n\r\nok"], 200, b"ok"),
        )
    ),
    Case(
        name="304 keeps its Content-Length",
        rule="RFC 9110 8.6",
        client=(get("/v1/models"),),
        upstream=((Wait.REQUEST, b'HTTP/1.1 304 Not\r\nETag: "x"\r\nContent-Length: 99\r\n\r\n'),),
        status=304,
        head=b'HTTP/1.1 304 Not Modified\r\nETag: "x"\r\nContent-Length: 99',
        counts="passed: completed",
    ),
    Case(
        name="an answer that ends with the connection",
        rule="RFC 9112 6.3 (8): whole, and the connection cannot be used again",
        client=(chat(),),
        upstream=((Wait.REQUEST, b"HTTP/1.1 200 OK\r\nX-A: b\r\n\r\nuntil", Pause(0.02), b" the end", End.FIN),),
        body=b"until the end",
        upstream_kept=False,
    ),
    *(
        Case(
            name=f"1xx of the upstream is swallowed: {name}",
            rule="RFC 9110 15.2; contract, traps",
            client=(chat(),),
            upstream=((Wait.REQUEST, *said, OK),),
            body=b"ok",
        )
        for name, said in (
            ("100", [b"HTTP/1.1 100 Continue\r\n\r\n"]),
            ("102", [b"HTTP/1.1 102 Processing\r\n\r\n"]),
            ("103", [b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"]),
            ("199", [b"HTTP/1.1 199 Odd\r\nX-A: b\r\n\r\n"]),
            ("several", [b"HTTP/1.1 100 C\r\n\r\n", Pause(0.02), b"HTTP/1.1 102 P\r\n\r\nHTTP/1.1 103 E\r\n\r\n"]),
        )
    ),
    *(
        Case(
            name=f"100 before the body has been sent changes nothing: {name}",
            rule="RFC 9110 15.2.1",
            client=(_upload("Content-Length: 6", body=b"abc"), Pause(0.1), b"def"),
            upstream=((Wait.HEAD, *said, Until(b"abcdef"), OK),),
            forwarded=b"POST /v1/files HTTP/1.1\r\n" + BASE + b"Content-Length: 6\r\n\r\nabcdef",
            counts="passed: completed",
        )
        for name, said in (
            ("whole", (b"HTTP/1.1 100 Continue\r\n\r\n",)),
            (
                "in parts",
                (b"HTTP", Pause(0.02), b"/1.1 1", Pause(0.02), b"00 Continue\r\nX-A: b\r\n", Pause(0.02), b"\r\n"),
            ),
        )
    ),
]

ROWS: Final = [
    *TARGET_CASES,
    *REQUEST_FIELD_CASES,
    *ANSWER_FIELD_CASES,
    *REQUEST_BODY_CASES,
    *METHOD_CASES,
    *ANSWER_BODY_CASES,
]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
async def test_fidelity(case: Case) -> None:
    await run(case)
