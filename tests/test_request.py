"""Reading a request's head: priority, deadline, identity, and which fields go on to whom."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import error_of, happened, head, raw
from trioproxy import request
from trioproxy.body import Reading, read
from trioproxy.config import SchedulerSettings
from trioproxy.errors import EVICTED, INVALID_PRIORITY, INVALID_REQUEST, NOT_FOUND, QUEUE_FULL, Ending, ProxyError

NO_BODY = Reading(b"")


def check_refuses(refused: request.Head, ending: Ending) -> str:
    """Have `check` refuse a head in this way: what it says."""
    with pytest.raises(ProxyError) as caught:
        request.check(refused)
    assert caught.value.ending is ending
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The request line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "path", "query", "target"),
    [
        ("/v1/models", "/v1/models", "", "/models"),
        ("/v1", "/v1", "", ""),
        ("/v1/", "/v1/", "", "/"),
        ("/v1?a=1", "/v1", "a=1", "?a=1"),
        ("/v1/models?a=1&a=2&b=%20+", "/v1/models", "a=1&a=2&b=%20+", "/models?a=1&a=2&b=%20+"),
        ("/v1/models?x=../../y?z", "/v1/models", "x=../../y?z", "/models?x=../../y?z"),
        ("/v1/a%2Fb/%c3%A4//c;d", "/v1/a%2Fb/%c3%A4//c;d", "", "/a%2Fb/%c3%A4//c;d"),
        ("http://proxy.example:8080/v1/models?a=1", "/v1/models", "a=1", "/models?a=1"),
        ("HTTPS://user@proxy.example/v1/a%2fb", "/v1/a%2fb", "", "/a%2fb"),
        ("http://[::1]:80/v1", "/v1", "", ""),
        ("/v1/http://other.example/v1/x", "/v1/http://other.example/v1/x", "", "/http://other.example/v1/x"),
    ],
)
def test_path_and_query_go_on_as_they_were_sent(sent: str, path: str, query: str, target: str) -> None:
    read_head = head(sent)
    request.check(read_head)
    assert (read_head.path.decode(), read_head.query.decode()) == (path, query)
    assert read_head.target.decode() == target
    assert read_head.rest.decode() == target.partition("?")[0]


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/../x", "/v1/..", "/v1/.", "/v1/./x", "/v1/a/..", "/v1/a/../b", "/v1/a/./b", "/v1//../x", "/v1/a/../"),
        *("/v1/%2e%2e/x", "/v1/%2E%2E/x", "/v1/.%2e/x", "/v1/%2e./x", "/v1/%2e", "/v1/a/%2E/b", "/v1/a/%2e%2E"),
        *("/v1/a/..%2fb", "/v1/a%2f..%2fb", "/v1/a%2F%2e%2e%2Fb", "/v1/%2f%2e%2e", "/v1/a%2f.", "/v1/..%2f"),
        *("/v1/a%5c..%5cb", "/v1/a%5C%2e%2e%5Cb", "/v1/a\\..\\b", "/v1/..\\x", "/v1/a\\../b", "/v1/..%5c", "/v1/.\\b"),
        *("http://proxy.example/v1/../admin", "http://proxy.example/v1/%2e%2e/admin"),
    ],
)
def test_dot_segments_are_refused_however_they_are_written(path: str) -> None:
    assert "dot segments" in check_refuses(head(path), INVALID_REQUEST)


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/...", "/v1/..a", "/v1/a..", "/v1/.a", "/v1/a.", "/v1/a..b/c", "/v1/....", "/v1/.../x", "/v1/..%20"),
        *(
            "/v1/gpt-4.1",
            "/v1/a%2eb",
            "/v1/%2e%2e%2e",
            "/v1/..%00",
            "/v1/..%25",
            "/v1/%",
            "/v1/%zz",
            "/v1/%2",
            "/v1/%C3%A4",
        ),
    ],
)
def test_dots_in_names_are_fine(path: str) -> None:
    request.check(head(path))


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/",
            "/v2/models",
            "/v1x",
            "/v1x/models",
            "/V1/models",
            "/models",
            "//v1/models",
            "/v11",
            "/v",
            "/v1;x/models",
        ),
        *("/%76%31/models", "/v1%2fmodels", "/v1\\models", "/health/v1/models", "/x/../v1/models", "/admin/../v1"),
        *("http://proxy.example", "http://proxy.example/", "http://proxy.example/v2/x", "*", "", "v1/models"),
    ],
)
def test_paths_elsewhere_are_not_found(path: str) -> None:
    message = check_refuses(head(path), NOT_FOUND)
    assert "/v1/" in message


@pytest.mark.parametrize("version", ["1.0", "1.1", "2"])
def test_http_versions_that_are_spoken(version: str) -> None:
    request.check(head(version=version))


@pytest.mark.parametrize("version", ["0.9", "2.0", "3", "1", "1.2", "", "1.1 "])
def test_http_versions_that_are_not(version: str) -> None:
    assert f"HTTP/{version} " in check_refuses(head(version=version), INVALID_REQUEST)


# ---------------------------------------------------------------------------------------------------------------------
# Framing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "method", "version", "length", "chunked"),
    [
        ([], "POST", "1.1", None, False),
        ([("Content-Length", "0")], "POST", "1.1", 0, False),
        ([("content-length", "12")], "GET", "1.1", 12, False),
        ([("CONTENT-LENGTH", "12")], "POST", "2", 12, False),
        ([("Transfer-Encoding", "chunked")], "POST", "1.1", None, True),
        ([("transfer-encoding", "Chunked")], "DELETE", "1.1", None, True),
        ([], "POST", "2", None, False),
        ([], "GET", "2", None, False),
        ([], "HEAD", "2", None, False),
        ([], "POST", "1.0", None, False),
    ],
)
def test_how_much_body_follows(
    fields: list[tuple[str, str]], method: str, version: str, length: int | None, chunked: bool
) -> None:
    read_head = head(headers=fields, method=method, version=version)
    request.check(read_head)
    assert (read_head.content_length, read_head.chunked) == (length, chunked)


@pytest.mark.parametrize("length", ["5", "0"])
def test_two_lengths_at_once_are_refused(length: str) -> None:
    framed_twice = head(headers=[("Content-Length", length), ("Transfer-Encoding", "chunked")])
    message = check_refuses(framed_twice, INVALID_REQUEST)
    assert "Content-Length" in message
    assert "Transfer-Encoding" in message


# ---------------------------------------------------------------------------------------------------------------------
# Priority
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "body", "expected"),
    [
        ([], "{}", 33),
        ([], '{"priority":71}', 71),
        ([], '{"priority":"71"}', 71),
        ([], '{"priority":" 71 "}', 71),
        ([], '{"priority":"Critical"}', 90),
        ([], r'{"priority":"\u0068igh"}', 70),
        ([], '{"priority":0}', 0),
        ([], '{"priority":71,"priority":"71"}', 71),
        ([], '{"a":{"priority":71}}', 33),
        ([], "not JSON", 33),
        ([], '[{"priority":71}]', 33),
        ([("X-Priority", "12")], "{}", 12),
        ([("x-priority", "LOW")], "{}", 30),
        ([("X-PRIORITY", "  12\t")], "{}", 12),
        ([("X-Priority", "0")], '{"priority":71}', 0),
        ([("X-Priority", "very_low")], '{"priority":"critical"}', 10),
        ([("X-Priority", "12")], "not JSON", 12),
        ([("X-Priority", "12"), ("x-priority", "12")], '{"priority":71}', 12),
    ],
)
def test_priority_by_header_else_body_else_default(fields: list[tuple[str, str]], body: str, expected: int) -> None:
    assert (
        request.read_priority(head(headers=fields), read(body.encode()), None, SchedulerSettings(default_priority=33))
        == expected
    )


@pytest.mark.parametrize(
    "value", ["50.0", "1e1", "", " ", "101", "-1", "+5", "very-low", "null", "50, 60", "\xb2", "5\xa0"]
)
def test_an_unusable_header_is_refused_whatever_the_body_says(value: str) -> None:
    with pytest.raises(ProxyError, match="The header X-Priority is ") as caught:
        request.read_priority(
            head(headers=[("X-Priority", value)]), read(b'{"priority":50}'), None, SchedulerSettings()
        )
    assert (caught.value.ending, caught.value.param) == (INVALID_PRIORITY, "X-Priority")
    assert "0 to 100" in str(caught.value)


@pytest.mark.parametrize("values", [("50", "60"), ("high", "low"), ("50", "60", "50"), ("0", "100")])
def test_two_different_headers_are_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ProxyError) as caught:
        request.read_priority(
            head(headers=[("X-Priority", value) for value in values]), NO_BODY, None, SchedulerSettings()
        )
    assert (caught.value.ending, caught.value.param) == (INVALID_PRIORITY, "X-Priority")


@pytest.mark.parametrize("values", [("50", "junk"), ("junk", "50"), ("", "50")])
def test_one_bad_header_beside_a_good_one_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ProxyError) as caught:
        request.read_priority(
            head(headers=[("X-Priority", value) for value in values]), NO_BODY, None, SchedulerSettings()
        )
    assert caught.value.ending is INVALID_PRIORITY


@pytest.mark.parametrize(
    "value",
    [
        *("50.0", "1e1", "-1", "101", "1e400", "-0", "12345678901234567890", "9" * 5000),
        *("null", "true", "false", "[50]", '{"priority":50}', "[]", "{}"),
        *('""', '" "', '"50.0"', '"1e1"', '"101"', '"+5"', '"very-low"', '"٣"', r'"\u0663"', '"null"', r'"50\n\u00a0"'),
    ],
)
def test_an_unusable_field_in_the_body_is_refused(value: str) -> None:
    reading = read(f'{{"priority":{value}}}'.encode())
    with pytest.raises(ProxyError, match="priority is ") as caught:
        request.read_priority(head(), reading, None, SchedulerSettings())
    assert (caught.value.ending, caught.value.param) == (INVALID_PRIORITY, "priority")
    assert len(str(caught.value)) < 300


@given(st.text(max_size=20))
def test_any_text_in_the_body_is_a_priority_or_refused(text: str) -> None:
    reading = read(json.dumps({"priority": text}, ensure_ascii=False).encode())
    try:
        found = request.read_priority(head(), reading, None, SchedulerSettings())
    except ProxyError as refusal:
        error = error_of(request.refusal(refusal, "r", 0.5)[2])
        found = 0 if (error["code"], error["param"]) == ("invalid_priority", "priority") else -1
    assert 0 <= found <= 100


def test_two_different_fields_in_the_body_are_refused() -> None:
    with pytest.raises(ProxyError) as caught:
        request.read_priority(head(), read(b'{"priority":50,"priority":60}'), None, SchedulerSettings())
    assert (caught.value.ending, caught.value.param) == (INVALID_PRIORITY, "priority")


# ---------------------------------------------------------------------------------------------------------------------
# The client's own deadline
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([], None),
        (["0.001"], 0.001),
        (["86400"], 86400.0),
        (["86400.0"], 86400.0),
        (["30"], 30.0),
        (["1.5"], 1.5),
        ([" 1.5\t"], 1.5),
        (["007"], 7.0),
        (["30", "30"], 30.0),
        (["30", "30.0"], 30.0),
    ],
)
def test_timeouts_that_are_accepted(values: list[str], seconds: float | None) -> None:
    assert request.read_timeout(head(headers=[("X-Request-Timeout", value) for value in values])) == seconds


@pytest.mark.parametrize(
    "values",
    [
        *(
            ["86401"],
            ["86400.001"],
            ["0"],
            ["0.0"],
            ["0.0009"],
            ["-1"],
            ["-0.5"],
            ["abc"],
            [""],
            [" "],
            ["1e3"],
            ["inf"],
        ),
        *(
            ["nan"],
            ["Infinity"],
            ["+5"],
            ["5s"],
            ["5 s"],
            ["1,5"],
            ["1_0"],
            ["0x10"],
            [".5"],
            ["5."],
            ["1.2.3"],
            ["9" * 500],
        ),
        *(["\xb2"], ["5\xa0"], ["30", "60"], ["30", "abc"], ["abc", "30"], ["30, 30"]),
    ],
)
def test_timeouts_that_are_refused(values: list[str]) -> None:
    with pytest.raises(ProxyError, match="X-Request-Timeout") as caught:
        request.read_timeout(head(headers=[("x-request-timeout", value) for value in values]))
    assert (caught.value.ending, caught.value.param) == (INVALID_REQUEST, "X-Request-Timeout")
    assert "0.001" in str(caught.value)
    assert "86400" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Request ids
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a", "req-1", "A.b_c-9", "0" * 128, "...", "3f2c1f6e-9d0b-4a50-8f1e-2b7c1d9e0a11"])
def test_a_usable_request_id_is_adopted(value: str) -> None:
    assert head(headers=[("X-REQUEST-ID", value)]).request_id == value


@pytest.mark.parametrize(
    "value", ["", "0" * 129, "a b", "a\n", "a/b", "a:b", "a,b", "\xe4", "<x>", '"a"', "a\x00", " a", "a="]
)
def test_an_unusable_request_id_is_replaced(value: str) -> None:
    request_id = head(headers=[("X-Request-Id", value)]).request_id
    assert request_id != value
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id)


def test_our_own_ids_are_usable_and_all_different() -> None:
    ids = {head().request_id for _ in range(1000)}
    assert len(ids) == 1000
    assert all(head(headers=[("X-Request-Id", request_id)]).request_id == request_id for request_id in ids)


# ---------------------------------------------------------------------------------------------------------------------
# Fields to the upstream
# ---------------------------------------------------------------------------------------------------------------------

Sent = list[tuple[str, str]]

HOP_BY_HOP = [
    ("Connection", "close"),
    ("Keep-Alive", "timeout=5"),
    ("Proxy-Connection", "keep-alive"),
    ("Proxy-Authorization", "Basic eDp5"),
    ("HTTP2-Settings", "AAMAAABkAAQAAP__"),
    ("TE", "trailers"),
    ("Transfer-Encoding", "chunked"),
    ("Upgrade", "h2c"),
]
"""Fields that concern one connection only."""

END_TO_END = [
    ("Accept", "*/*"),
    ("accept", "application/json"),
    ("User-Agent", "OpenAI/Python 2.0"),
    ("X-Stainless-Retry-Count", "0"),
    ("Cookie", "a=1"),
    ("COOKIE", "b=2"),
    ("Accept-Encoding", "gzip"),
    ("Content-Type", "application/json"),
    ("Content-Encoding", "gzip"),
    ("X-Request-Id", "mine"),
    ("Forwarded", "for=1.2.3.4"),
    ("Range", "bytes=0-1"),
    ("Empty", ""),
    ("X-Bytes", "\xe4\xff"),
]
"""Fields that go through, repeated ones and odd ones among them."""


def to_upstream(
    fields: Sent, *, authorization: bytes | None = None, body_size: int | None = None, version: str = "1.1"
) -> Sent:
    """What goes upstream of these fields, but for the Host, which is always first."""
    first, *rest = request.upstream_headers(
        head(headers=fields, version=version), host=b"api.example", authorization=authorization, body_size=body_size
    )
    assert first == (b"Host", b"api.example")
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in rest]


def to_client(fields: Sent, queue_seconds: float | None = None) -> Sent:
    """What goes to the client of these fields."""
    fields_sent = request.client_headers(200, raw(fields), "req_ours", queue_seconds)
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields_sent]


OURS_TO_CLIENT = [("x-request-id", "req_ours"), ("x-trioproxy-request-id", "req_ours")]


def test_other_fields_go_upstream_as_they_are_in_their_order() -> None:
    assert to_upstream(END_TO_END) == END_TO_END


@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title])
@pytest.mark.parametrize(("name", "value"), HOP_BY_HOP)
def test_hop_by_hop_fields_are_stripped_both_ways(name: str, value: str, spell: Callable[[str], str]) -> None:
    around = [("A", "1"), (spell(name), value), ("B", "2")]
    assert [field for field in to_upstream(around, body_size=0) if field[0] != "Content-Length"] == [
        ("A", "1"),
        ("B", "2"),
    ]
    assert to_client(around) == [("A", "1"), ("B", "2"), *OURS_TO_CLIENT]


@pytest.mark.parametrize(
    "connection",
    [
        [("Connection", "X-Hop, x-other")],
        [("connection", "keep-alive,X-HOP ,\tX-Other")],
        [("Connection", "x-hop"), ("CONNECTION", "close, X-Other")],
        [("Connection", ",, X-Hop,,x-other,")],
    ],
)
def test_fields_that_connection_names_are_stripped_both_ways(connection: Sent) -> None:
    around = [("X-Hop", "1"), ("A", "1"), *connection, ("x-hop", "2"), ("X-OTHER", "3"), ("X-Hop-Not", "4")]
    assert to_upstream(around) == [("A", "1"), ("X-Hop-Not", "4")]
    assert to_client(around) == [("A", "1"), ("X-Hop-Not", "4"), *OURS_TO_CLIENT]


@pytest.mark.parametrize("authorization", [None, b"Bearer upstream"])
def test_what_is_for_us_is_never_forwarded(authorization: bytes | None) -> None:
    fields = [("X-Priority", "5"), ("x-priority", "5"), ("X-REQUEST-TIMEOUT", "5"), ("X-Priority-Not", "5")]
    sent = to_upstream(fields, authorization=authorization)
    assert [name for name, _ in sent if name != "Authorization"] == ["X-Priority-Not"]


@pytest.mark.parametrize("host", ["proxy.example", "api.example", ""])
def test_the_host_is_the_upstreams(host: str) -> None:
    assert to_upstream([("hOST", host), ("A", "1")]) == [("A", "1")]


@pytest.mark.parametrize(
    ("fields", "version", "body_size", "framing"),
    [
        ([("Content-Length", "12")], "1.1", 12, [("Content-Length", "12")]),
        ([("Content-Length", "30")], "1.1", 12, [("Content-Length", "12")]),  # a priority was taken out
        ([("content-length", "30"), ("Expect", "100-continue")], "1.1", 0, [("Content-Length", "0")]),
        ([("Transfer-Encoding", "chunked")], "1.1", 12, [("Content-Length", "12")]),
        ([("Transfer-Encoding", "chunked")], "1.1", None, [("Transfer-Encoding", "chunked")]),
        ([], "1.1", None, []),
    ],
)
def test_the_bodys_framing_is_set_anew(fields: Sent, version: str, body_size: int | None, framing: Sent) -> None:
    assert to_upstream([("A", "1"), *fields], version=version, body_size=body_size) == [("A", "1"), *framing]


@pytest.mark.parametrize("path", ["/v1/x#y", "/v1/chat/completions#", "/v1/ä", "/v1/a b", "/v1/\x00"])
def test_paths_that_must_be_encoded_are_refused(path: str) -> None:
    assert "percent-encoded" in check_refuses(head(path), INVALID_REQUEST)


def test_a_field_that_http_2_let_through_is_refused_and_its_value_not_shown() -> None:
    message = check_refuses(head(headers=[("authorization", "Bearer sk-secret\x0b")], version="2"), INVALID_REQUEST)
    assert "authorization" in message
    assert "secret" not in message
    assert "na me" in check_refuses(head(headers=[("na me", "x")], version="2"), INVALID_REQUEST)


def test_a_tunnel_is_refused() -> None:
    check_refuses(head(method="CONNECT"), INVALID_REQUEST)


CREDENTIALS = [
    ("Authorization", "Bearer client"),
    ("authorization", "Bearer again"),
    ("OpenAI-Organization", "org"),
    ("openai-project", "project"),
]


def test_without_a_key_of_ours_the_clients_credentials_go_through() -> None:
    assert to_upstream(CREDENTIALS) == CREDENTIALS


@pytest.mark.parametrize("fields", [CREDENTIALS, []])
def test_with_a_key_of_ours_the_clients_credentials_are_replaced(fields: Sent) -> None:
    sent = to_upstream([*fields, ("OpenAI-Beta", "x")], authorization=b"Bearer upstream")
    assert sorted(sent) == [("Authorization", "Bearer upstream"), ("OpenAI-Beta", "x")]


names = st.sampled_from(["A", "a", "B", "X-Hop", "x-hop", "Content-Type", "TE", "te", "Upgrade", "X-Priority"])


@given(st.lists(st.tuples(names, st.sampled_from(["1", "2", "3"]))), st.booleans())
def test_what_is_left_keeps_its_order_and_its_letter_case(fields: Sent, is_named: bool) -> None:
    connection = [("Connection", "x-HOP")] if is_named else []
    dropped = {"te", "upgrade", *(["x-hop"] if is_named else [])}
    end_to_end = [field for field in fields if field[0].lower() not in dropped]
    assert to_client([*connection, *fields]) == [*end_to_end, *OURS_TO_CLIENT]
    assert to_upstream([*fields, *connection]) == [field for field in end_to_end if field[0] != "X-Priority"]


# ---------------------------------------------------------------------------------------------------------------------
# Fields to the client
# ---------------------------------------------------------------------------------------------------------------------


def test_an_answers_own_fields_go_to_the_client_as_they_are_in_their_order() -> None:
    fields = [
        *(("Content-Type", "text/event-stream"), ("Content-Encoding", "br"), ("Content-Length", "5")),
        *(("Set-Cookie", "a=1"), ("set-cookie", "b=2"), ("Server", "x"), ("Date", "today"), ("Retry-After", "7")),
        *(("x-ratelimit-remaining-requests", "9"), ("X-Priority", "5"), ("Authorization", "?"), ("Host", "?")),
    ]
    assert to_client(fields) == [*fields, *OURS_TO_CLIENT]


def test_the_upstreams_request_id_stays_and_ours_stands_beside_it() -> None:
    assert to_client([("X-Request-ID", "theirs")]) == [
        ("X-Request-ID", "theirs"),
        ("x-trioproxy-request-id", "req_ours"),
    ]


def test_there_is_only_one_id_of_ours() -> None:
    assert to_client([("X-Trioproxy-Request-Id", "forged")]) == OURS_TO_CLIENT


@pytest.mark.parametrize(
    ("seconds", "value"), [(0.0, "queue;dur=0.000"), (1.2345678, "queue;dur=1234.568"), (1e-7, "queue;dur=0.000")]
)
def test_the_wait_is_told_in_milliseconds(seconds: float, value: str) -> None:
    assert to_client([], seconds)[-1] == ("server-timing", value)


def test_the_upstreams_own_timing_stays() -> None:
    assert to_client([("Server-Timing", "llm;dur=5")], 1.0) == [
        ("Server-Timing", "llm;dur=5"),
        *OURS_TO_CLIENT,
        ("server-timing", "queue;dur=1000.000"),
    ]


@given(st.floats(min_value=0, max_value=1e6))
def test_the_timing_is_w3cs(seconds: float) -> None:
    (value,) = (value for name, value in to_client([], seconds) if name == "server-timing")
    assert re.fullmatch(r"queue;dur=[0-9]+\.[0-9]{3}", value)
    assert float(value.rpartition("=")[2]) == pytest.approx(1000 * seconds, abs=0.001)


# ---------------------------------------------------------------------------------------------------------------------
# Our own answers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_refusal_is_a_whole_answer() -> None:
    error = happened(EVICTED, queue_seconds=1.5, retry_after=20)
    status, fields, body = request.refusal(error, "req_ours", 0.5)
    assert status == 503
    assert error_of(body)["code"] == "evicted"
    assert dict(fields) == {
        b"content-type": b"application/json",
        b"content-length": b"%d" % len(body),
        b"x-request-id": b"req_ours",
        b"x-trioproxy-request-id": b"req_ours",
        b"retry-after": b"20",
        b"retry-after-ms": b"20000",
        b"x-should-retry": b"true",
        b"server-timing": b"queue;dur=1500.000",
    }
    assert len(dict(fields)) == len(fields)


def test_a_refusal_before_scheduling_tells_no_wait() -> None:
    status, fields, body = request.refusal(ProxyError(NOT_FOUND, method="GET", path="/x"), "req_ours", 0.5)
    assert status == 404
    assert sorted(name for name, _ in fields) == [
        *(b"content-length", b"content-type", b"x-request-id", b"x-trioproxy-request-id"),
    ]
    assert error_of(body)["type"] == "invalid_request_error"


def test_a_rejection_tells_a_wait_of_none() -> None:
    _, fields, _ = request.refusal(happened(QUEUE_FULL, queue_seconds=0.0), "req_ours", 0.5)
    assert (b"server-timing", b"queue;dur=0.000") in fields


def websocket_head(*fields: tuple[str, str]) -> request.Head:
    upgrade = [
        ("Connection", "keep-alive, Upgrade, X-Hop"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "theirs"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Extensions", "permessage-deflate"),
        ("Sec-WebSocket-Protocol", "realtime"),
        ("X-Hop", "1"),
        ("X-Priority", "high"),
        ("Transfer-Encoding", "chunked"),
    ]
    return head("/v1/realtime", [*upgrade, *fields], method="GET")


def test_a_websocket_handshake_is_made_anew_but_for_what_goes_from_end_to_end() -> None:
    told = websocket_head(("Cookie", "a"), ("Cookie", "b"), ("Authorization", "Bearer mine"))
    fields = request.websocket_headers(
        told, host=b"upstream", authorization=None, key=b"ours", subprotocols=["realtime", "other"]
    )
    assert fields == [
        (b"Host", b"upstream"),
        (b"Cookie", b"a"),
        (b"Cookie", b"b"),
        (b"Authorization", b"Bearer mine"),
        (b"Connection", b"Upgrade"),
        (b"Upgrade", b"websocket"),
        (b"Sec-WebSocket-Key", b"ours"),
        (b"Sec-WebSocket-Version", b"13"),
        (b"Sec-WebSocket-Protocol", b"realtime, other"),
    ]
    replaced = request.websocket_headers(
        told, host=b"upstream", authorization=b"Bearer ours", key=b"ours", subprotocols=[]
    )
    assert [value for name, value in replaced if name == b"Authorization"] == [b"Bearer ours"]
    assert b"Sec-WebSocket-Protocol" not in dict(replaced)


def test_credentials_in_subprotocols_are_taken_out() -> None:
    offered = ["realtime", "openai-insecure-api-key.sk", "openai-organization.o", "openai-project.p", "openai-beta.x"]
    assert request.without_credentials(offered) == ["realtime", "openai-beta.x"]


def test_an_accepted_handshake_is_passed_on_but_for_what_is_the_connections() -> None:
    upstream = [
        (b"Upgrade", b"websocket"),
        (b"Connection", b"Upgrade"),
        (b"Sec-WebSocket-Accept", b"x"),
        (b"Sec-WebSocket-Protocol", b"realtime"),
        (b"Content-Length", b"0"),
        (b"Set-Cookie", b"a"),
    ]
    assert request.accepted_headers(upstream, "req_1") == [
        (b"Set-Cookie", b"a"),
        (b"x-request-id", b"req_1"),
        (b"x-trioproxy-request-id", b"req_1"),
    ]
