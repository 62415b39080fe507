"""A request's way through the house, in memory: every timeout, every refusal, every way of failing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from memory import House
from support import CHUNKED, LAST_CHUNK, chunk
from trioproxy.config import UpstreamSettings
from trioproxy.errors import Status
from trioproxy.upstream import _Phases

ONE_SLOT: dict[str, Any] = {"concurrency": 1, "max_queue": 2, "queue_timeout": 300}

Build = Callable[..., House]


async def test_an_answer_goes_through_unchanged(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    client = h.send(body=b'{"model": "m", "x": 1.10}', headers=[("X-Priority", "high"), ("X-Custom", "a")])
    call = await h.upstream.call()
    assert (call.method, call.target, call.body) == ("POST", "/v1/chat/completions", b'{"model": "m", "x": 1.10}')
    assert call.header("X-Priority") is None
    assert call.header("x-custom") == "a"
    assert call.header("host") == "upstream.test"
    await call.answer(b'{"answer": 42}', status=201, x_request_id="theirs")
    await client.answer.done.wait()
    assert (client.answer.status, client.answer.body, client.answer.whole) == (201, b'{"answer": 42}', True)
    assert client.answer.headers["x-request-id"] == "theirs"
    assert client.answer.headers["server-timing"] == "queue;dur=0.000"
    (ended,) = h.recorder.ended
    assert ended.ending.status is Status.COMPLETED
    assert ended.progress is not None
    assert (ended.progress.http_status, ended.progress.upstream_status, ended.progress.bytes_out) == (201, 201, 14)
    assert ended.progress.upstream_whole
    h.assert_settled()
    assert h.proxy.upstream.idle == 1


async def test_a_stream_arrives_piece_by_piece(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    client = h.send()
    call = await h.upstream.call()
    await call.send(CHUNKED)
    for piece in (b"data: 1\n\n", b"data: 2\n\n"):
        await call.send(chunk(piece))
        await trio.testing.wait_all_tasks_blocked()
        assert client.answer.body.endswith(piece)
        assert not client.answer.whole
    await call.send(LAST_CHUNK)
    await client.answer.done.wait()
    assert client.answer.whole
    (ended,) = h.recorder.ended
    assert ended.progress is not None
    assert ended.progress.bytes_out == len(client.answer.body) == 18
    h.assert_settled()


async def test_the_slot_is_free_before_the_client_has_taken_the_last_piece(
    autojump_clock: MockClock, house: Build
) -> None:
    h = house(scheduler=ONE_SLOT)
    slow = h.client()
    reads_on = trio.Event()

    async def reads() -> None:
        if slow.answer.status is not None:
            await reads_on.wait()

    slow.reads = reads
    h.nursery.start_soon(slow.post)
    call = await h.upstream.call()
    second = h.send()
    await call.answer(b"whole")
    await (await h.upstream.call()).answer()
    await second.answer.done.wait()
    assert slow.answer.body == b""
    reads_on.set()
    await slow.answer.done.wait()
    assert (slow.answer.body, slow.answer.whole) == (b"whole", True)
    h.assert_settled()


async def test_queue_timeout(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler=ONE_SLOT)
    first = h.send()
    call = await h.upstream.call()
    began = trio.current_time()
    second = await h.client().post()
    assert trio.current_time() - began == pytest.approx(300)
    assert (second.status, second.code) == (504, "queue_timeout")
    assert second.headers["x-should-retry"] == "false"
    assert second.headers["server-timing"] == "queue;dur=300000.000"
    await call.answer()
    await first.answer.done.wait()
    assert h.recorder.outcomes() == ["timeout", "success"]
    assert len(h.upstream.calls) == 1
    h.assert_settled()


async def test_own_deadline_while_queued(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler=ONE_SLOT)
    first = h.send()
    call = await h.upstream.call()
    began = trio.current_time()
    second = await h.client().post(headers=[("X-Request-Timeout", "2.5")])
    assert trio.current_time() - began == pytest.approx(2.5)
    assert (second.status, second.code) == (504, "deadline_exceeded")
    await call.answer()
    await first.answer.done.wait()
    h.assert_settled()


async def test_own_deadline_while_the_upstream_works(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    client = h.send(headers=[("X-Request-Timeout", "3")])
    call = await h.upstream.call()
    await client.answer.done.wait()
    assert trio.current_time() == pytest.approx(3)
    assert (client.answer.status, client.answer.code) == (504, "deadline_exceeded")
    await call.gone.wait()
    assert h.recorder.outcomes() == ["timeout"]
    h.assert_settled()


async def test_own_deadline_while_streaming_breaks_the_answer_off(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    client = h.send(headers=[("X-Request-Timeout", "3")])
    call = await h.upstream.call()
    await call.send(CHUNKED + chunk(b"data: 1\n\n"))
    await client.answer.done.wait()
    assert (client.answer.status, client.answer.body, client.answer.whole) == (200, b"data: 1\n\n", False)
    await call.gone.wait()
    assert h.recorder.outcomes() == ["timeout"]
    h.assert_settled()


async def test_own_deadline_while_the_body_arrives(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    answer = await h.client().post(body=None, headers=[("X-Request-Timeout", "1"), ("Content-Length", "5")])
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    assert trio.current_time() == pytest.approx(1 + 2), "the client may go on sending for a while"
    assert h.recorder.outcomes() == ["timeout"]
    assert h.upstream.calls == []
    h.assert_settled()


async def test_connect_timeout(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    h.upstream.accept = trio.sleep_forever
    answer = await h.client().post()
    assert trio.current_time() == pytest.approx(10)
    assert (answer.status, answer.code) == (502, "upstream_unreachable")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-should-retry"] == "true"
    assert h.recorder.outcomes() == ["upstream_error"]
    h.assert_settled()


async def test_first_byte_timeout(autojump_clock: MockClock, house: Build) -> None:
    h = house(upstream={"first_byte_timeout": 7})
    client = h.send()
    call = await h.upstream.call()
    await client.answer.done.wait()
    assert trio.current_time() == pytest.approx(7)
    assert (client.answer.status, client.answer.code) == (504, "upstream_timeout")
    assert "upstream.first_byte_timeout" in client.answer.body.decode()
    await call.gone.wait()
    assert h.recorder.outcomes() == ["timeout"]
    h.assert_settled()


async def test_a_trickled_head_does_not_extend_the_first_byte_timeout(autojump_clock: MockClock, house: Build) -> None:
    h = house(upstream={"first_byte_timeout": 7})
    client = h.send()
    call = await h.upstream.call()
    for byte in b"HTTP/1":
        await call.send(bytes([byte]))
        await trio.sleep(1)
    await client.answer.done.wait()
    assert trio.current_time() == pytest.approx(7)
    assert (client.answer.status, client.answer.code) == (504, "upstream_timeout")


@pytest.mark.parametrize("connect_timeout", [10, 100])
async def test_request_timeout_covers_connecting(
    autojump_clock: MockClock, house: Build, connect_timeout: float
) -> None:
    h = house(upstream={"request_timeout": 2, "connect_timeout": connect_timeout})
    h.upstream.accept = trio.sleep_forever
    client = h.client()
    with trio.fail_after(50):
        await client.post()
    assert trio.current_time() == 2
    assert (client.answer.status, client.answer.code) == (504, "upstream_timeout")
    assert "upstream.request_timeout" in client.answer.body.decode()
    h.assert_settled()


def test_a_short_limit_does_not_outlast_its_phase() -> None:
    settings = UpstreamSettings(first_byte_timeout=1, connect_timeout=120)

    async def main() -> None:
        phases = _Phases(settings, None)
        phases.sent()
        assert phases.scope.deadline == trio.current_time() + 1
        phases.connecting()
        assert phases.scope.deadline == math.inf

    trio.run(main, clock=MockClock())


@pytest.mark.parametrize("limit", [99.5, 100, 600])
async def test_a_long_limit_is_kept_within_some_seconds(autojump_clock: MockClock, house: Build, limit: float) -> None:
    h = house(upstream={"first_byte_timeout": limit, "idle_timeout": limit})
    await h.nursery.start(h.proxy.housekeeping)
    never_answered = h.send()
    first = await h.upstream.call()
    begun = h.send()
    second = await h.upstream.call()
    for piece in (CHUNKED, chunk(b"x"), chunk(b"y")):
        await second.send(piece)
        await trio.sleep(limit - 1)
    await never_answered.answer.done.wait()
    await begun.answer.done.wait()
    (first_ended, second_ended) = h.recorder.ended
    assert limit <= first_ended.total_seconds <= limit + 5
    assert 3 * (limit - 1) <= second_ended.total_seconds - 1 <= 3 * (limit - 1) + 5
    assert (never_answered.answer.status, never_answered.answer.code) == (504, "upstream_timeout")
    assert f"within {limit:g} s (upstream.first_byte_timeout)" in never_answered.answer.body.decode()
    assert (begun.answer.status, begun.answer.whole) == (200, False)
    await first.gone.wait()
    await second.gone.wait()
    h.assert_settled()


async def test_the_next_request_begins_before_the_last_answer_is_finished(
    autojump_clock: MockClock, house: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = house(scheduler={"concurrency": 1})
    order: list[str] = []
    opened = h.proxy.upstream.open

    def open_upstream(*arguments: Any, **options: Any) -> Any:
        order.append("upstream is called")
        return opened(*arguments, **options)

    monkeypatch.setattr(h.proxy.upstream, "open", open_upstream)
    first = h.client()

    async def reads() -> None:
        order.append("client is told")

    first.reads = reads
    h.nursery.start_soon(first.post)
    call = await h.upstream.call()
    second = h.send()
    await trio.sleep(1)
    await call.answer()
    await (await h.upstream.call()).answer()
    await second.answer.done.wait()
    assert order == ["upstream is called", "client is told", "upstream is called", "client is told"]
    h.assert_settled()


async def test_idle_timeout_breaks_the_answer_off(autojump_clock: MockClock, house: Build) -> None:
    h = house(upstream={"idle_timeout": 4})
    client = h.send()
    call = await h.upstream.call()
    await call.send(CHUNKED)
    for _ in range(3):
        await trio.sleep(3)
        await call.send(chunk(b"x"))
    await client.answer.done.wait()
    assert trio.current_time() == pytest.approx(9 + 4)
    assert (client.answer.status, client.answer.body, client.answer.whole) == (200, b"xxx", False)
    await call.gone.wait()
    assert h.recorder.outcomes() == ["timeout"]
    h.assert_settled()


@pytest.mark.parametrize("limit", [4, 200])
async def test_idle_timeout_does_not_count_the_time_that_the_client_takes(
    autojump_clock: MockClock, house: Build, limit: float
) -> None:
    h = house(upstream={"idle_timeout": limit})
    await h.nursery.start(h.proxy.housekeeping)
    client = h.client()
    client.reads = partial(trio.sleep, 5 * limit)
    h.nursery.start_soon(client.post)
    call = await h.upstream.call()
    await call.send(CHUNKED + chunk(b"a"))
    await trio.sleep(1)
    await call.send(chunk(b"b"))  # read when the client has taken the first one, and given to it meanwhile
    await trio.sleep(12 * limit)
    await call.send(LAST_CHUNK)
    await client.answer.done.wait()
    assert client.answer.whole
    h.assert_settled()


@pytest.mark.parametrize("streaming", [False, True])
async def test_request_timeout_covers_all_of_the_upstreams_part(
    autojump_clock: MockClock, house: Build, streaming: bool
) -> None:
    h = house(upstream={"request_timeout": 5})
    client = h.send()
    call = await h.upstream.call()
    if streaming:
        await call.send(CHUNKED)
        for _ in range(4):
            await call.send(chunk(b"x"))
            await trio.sleep(1)
    await client.answer.done.wait()
    assert trio.current_time() == pytest.approx(5)
    assert client.answer.status == (200 if streaming else 504)
    assert client.answer.whole is not streaming
    if not streaming:
        assert "within 5 s (upstream.request_timeout)" in client.answer.body.decode()
    await call.gone.wait()
    assert h.recorder.outcomes() == ["timeout"]
    h.assert_settled()


async def test_request_timeout_does_not_count_the_queue(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler=ONE_SLOT, upstream={"request_timeout": 5})
    first, second = h.send(), None
    call = await h.upstream.call()
    second = h.send()
    await trio.sleep(4)
    await call.answer()
    later = await h.upstream.call()
    await trio.sleep(4)
    await later.answer()
    await second.answer.done.wait()
    assert (first.answer.status, second.answer.status) == (200, 200)


@pytest.mark.parametrize("seconds", [6, 60])
async def test_an_upstream_that_takes_no_body_is_given_up(
    autojump_clock: MockClock, house: Build, seconds: int
) -> None:
    h = house(upstream={"idle_timeout": seconds})
    h.upstream.new_pair = trio.testing.lockstep_stream_pair
    h.upstream.deaf = True
    answer = await h.client().post()
    assert trio.current_time() == pytest.approx(seconds)
    assert (answer.status, answer.code) == (504, "upstream_timeout")
    assert f"within {seconds} s (upstream.idle_timeout)" in answer.body.decode()


async def test_the_queue_is_full(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler=ONE_SLOT)
    clients = [h.send() for _ in range(3)]
    await trio.testing.wait_all_tasks_blocked()
    answer = await h.client().post()
    assert (answer.status, answer.code) == (503, "queue_full")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["server-timing"] == "queue;dur=0.000"
    assert "2 of 2" in answer.body.decode()
    for _ in clients:
        await (await h.upstream.call()).answer()
    for client in clients:
        await client.answer.done.wait()
    assert sorted(h.recorder.outcomes()) == ["rejected", "success", "success", "success"]
    h.assert_settled()


async def test_the_youngest_of_the_lowest_is_evicted(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler=ONE_SLOT)
    running = h.send(headers=[("X-Priority", "low")])
    await trio.testing.wait_all_tasks_blocked()
    older = h.send(headers=[("X-Priority", "low")])
    await trio.testing.wait_all_tasks_blocked()
    younger = h.send(headers=[("X-Priority", "low")])
    await trio.sleep(1)
    urgent = h.send(headers=[("X-Priority", "normal")], body=b'{"urgent": 1}')
    await younger.answer.done.wait()
    assert (younger.answer.status, younger.answer.code) == (503, "evicted")
    assert younger.answer.headers["server-timing"] == "queue;dur=1000.000"
    assert 1 <= int(younger.answer.headers["retry-after"]) <= 60
    await (await h.upstream.call()).answer()
    call = await h.upstream.call()
    assert call.body == b'{"urgent": 1}'
    await call.answer()
    await (await h.upstream.call()).answer()
    for client in (running, older, urgent):
        await client.answer.done.wait()
        assert client.answer.status == 200
    assert len(h.upstream.calls) == 3
    h.assert_settled()


async def test_shutting_down(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    h.proxy.scheduler.close()
    scheduled = await h.client().post()
    assert (scheduled.status, scheduled.code) == (503, "shutting_down")
    assert "retry-after" in scheduled.headers
    passed = await h.client().post(path="/v1/files")
    assert (passed.status, passed.code) == (503, "shutting_down")
    assert h.recorder.outcomes() == ["rejected"]
    assert len(h.recorder.passed_through) == 1


async def refuse() -> None:
    raise OSError("connection refused, says the test")


async def test_an_unreachable_upstream(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    h.upstream.accept = refuse
    answer = await h.client().post()
    assert (answer.status, answer.code) == (502, "upstream_unreachable")
    assert "connection refused, says the test" in answer.body.decode()
    h.assert_settled()


async def test_an_upstream_is_known_to_be_out_for_ten_seconds(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    h.proxy.probes.serving = True
    h.upstream.accept = refuse
    assert h.proxy.probes.ready()[1] == 200
    await h.client().post()
    await trio.sleep(9)
    assert h.proxy.probes.ready() == ({"status": "not ready", "reason": "the upstream cannot be reached"}, 503)
    await trio.sleep(2)
    assert h.proxy.probes.ready()[1] == 200


async def test_an_upstream_that_takes_no_connection_in_time_is_known_to_be_out(
    autojump_clock: MockClock, house: Build
) -> None:
    h = house(upstream={"connect_timeout": 5})
    h.proxy.probes.serving = True
    h.upstream.accept = trio.sleep_forever
    answer = await h.client().post()
    assert (answer.status, answer.code) == (502, "upstream_unreachable")
    assert h.proxy.probes.ready() == ({"status": "not ready", "reason": "the upstream cannot be reached"}, 503)


async def test_an_upstream_that_answers_is_not_out_any_more(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    h.proxy.probes.serving = True
    h.upstream.accept = refuse
    await h.client().post()
    assert h.proxy.probes.ready()[1] == 503
    h.upstream.accept = trio.lowlevel.checkpoint
    client = h.send()
    await (await h.upstream.call()).answer()
    await client.answer.done.wait()
    assert h.proxy.probes.ready()[1] == 200


async def test_a_failed_request_tells_how_long_it_has_waited(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler=ONE_SLOT)
    first = h.send()
    call = await h.upstream.call()
    second = h.send()
    await trio.sleep(2)
    h.upstream.accept = refuse
    await call.send(b"nonsense")
    await call.close()
    for client in (first, second):
        await client.answer.done.wait()
    assert (first.answer.code, second.answer.code) == ("upstream_protocol_error", "upstream_unreachable")
    assert first.answer.headers["server-timing"] == "queue;dur=0.000"
    assert second.answer.headers["server-timing"] == "queue;dur=2000.000"


async def test_the_connection_that_was_used_last_is_used_next(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    clients = [h.send(), h.send()]
    calls = [await h.upstream.call(), await h.upstream.call()]
    for call in calls:
        await call.answer()
        await trio.testing.wait_all_tasks_blocked()
    assert h.proxy.upstream.idle == 2
    clients.append(h.send())
    call = await h.upstream.call()
    assert call.stream is calls[1].stream
    await call.answer()
    for client in clients:
        await client.answer.done.wait()
    h.assert_settled()


async def test_an_idle_connection_is_closed_when_it_has_expired(autojump_clock: MockClock, house: Build) -> None:
    h = house(upstream={"keep_alive_expiry": 30})
    await h.nursery.start(h.proxy.housekeeping)
    client = h.send()
    call = await h.upstream.call()
    await call.answer()
    await client.answer.done.wait()
    await call.gone.wait()
    assert 30 <= trio.current_time() <= 35
    await trio.testing.wait_all_tasks_blocked()
    h.assert_settled()
    assert h.proxy.upstream.idle == 0


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"hello, is this HTTP?\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)
async def test_nonsense_instead_of_a_head(autojump_clock: MockClock, house: Build, said: bytes) -> None:
    h = house()
    client = h.send()
    call = await h.upstream.call()
    await call.send(said)
    await call.close()
    await client.answer.done.wait()
    assert (client.answer.status, client.answer.code) == (502, "upstream_protocol_error")
    assert h.recorder.outcomes() == ["upstream_error"]
    await trio.testing.wait_all_tasks_blocked()
    h.assert_settled()
    assert h.proxy.upstream.idle == 0


@pytest.mark.parametrize(
    "said",
    [
        CHUNKED + chunk(b"data: 1\n\n"),
        CHUNKED + chunk(b"data: 1\n\n") + b"5\r\nda",
        CHUNKED + chunk(b"data: 1\n\n") + b"nonsense\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\ndata: 1\n\n",
    ],
)
async def test_a_broken_answer_never_looks_whole(autojump_clock: MockClock, house: Build, said: bytes) -> None:
    h = house()
    client = h.send()
    call = await h.upstream.call()
    await call.send(said)
    await call.close()
    await client.answer.done.wait()
    assert client.answer.status == 200
    assert client.answer.body.startswith(b"data: 1\n\n")
    assert not client.answer.whole
    assert h.recorder.outcomes() == ["upstream_error"]
    (ended,) = h.recorder.ended
    assert ended.progress is not None
    assert ended.progress.error is not None
    assert "broke off" in ended.progress.error
    assert (ended.progress.http_status, ended.progress.upstream_whole) == (200, False)
    await trio.testing.wait_all_tasks_blocked()
    h.assert_settled()
    assert h.proxy.upstream.idle == 0


@pytest.mark.parametrize(
    ("status", "outcome"), [(200, "success"), (404, "success"), (429, "upstream_error"), (500, "upstream_error")]
)
async def test_the_upstreams_own_status_decides_the_outcome(
    autojump_clock: MockClock, house: Build, status: int, outcome: str
) -> None:
    h = house()
    client = h.send()
    await (await h.upstream.call()).answer(b"{}", status, retry_after="17")
    await client.answer.done.wait()
    assert (client.answer.status, client.answer.headers["retry-after"]) == (status, "17")
    assert h.recorder.outcomes() == [outcome]
    h.assert_settled()


async def test_a_client_that_leaves_the_queue_never_reaches_the_upstream(
    autojump_clock: MockClock, house: Build
) -> None:
    h = house(scheduler=ONE_SLOT)
    first = h.send()
    call = await h.upstream.call()
    second = h.send()
    await trio.testing.wait_all_tasks_blocked()
    second.leave()
    await second.answer.done.wait()
    assert second.answer.messages == []
    await call.answer()
    await first.answer.done.wait()
    assert h.recorder.outcomes() == ["cancelled", "success"]
    assert len(h.upstream.calls) == 1
    h.assert_settled()


@pytest.mark.parametrize("said", [b"", CHUNKED, CHUNKED + chunk(b"x")])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files"])
async def test_a_client_that_leaves_closes_the_upstream(
    autojump_clock: MockClock, house: Build, said: bytes, path: str
) -> None:
    h = house()
    client = h.send(path=path)
    call = await h.upstream.call()
    await call.send(said)
    await trio.testing.wait_all_tasks_blocked()
    client.leave()
    with trio.fail_after(0.05):
        await call.gone.wait()
        await client.answer.done.wait()
    assert h.recorder.outcomes() == (["cancelled"] if "chat" in path else [])
    assert [event.ending.code for event in h.recorder.passed_through] == ([] if "chat" in path else ["cancelled"])
    await trio.testing.wait_all_tasks_blocked()
    h.assert_settled()


async def test_a_client_that_leaves_while_the_last_piece_is_sent_changes_nothing(
    autojump_clock: MockClock, house: Build
) -> None:
    h = house()
    client = h.client()
    client.reads = partial(trio.sleep, 1)
    h.nursery.start_soon(client.post)
    await (await h.upstream.call()).answer()
    await trio.sleep(1.5)
    assert (client.answer.status, client.answer.body) == (200, b"")
    client.leave()
    await client.answer.done.wait()
    assert client.answer.whole
    assert h.recorder.outcomes() == ["success"]
    h.assert_settled()


@pytest.mark.parametrize(
    ("said", "code", "http_status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "completed", 200),
        (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", "upstream_refused", 500),
        (b"nonsense", "upstream_protocol_error", 502),
        (CHUNKED + chunk(b"x"), "upstream_broke_off", 200),
    ],
)
async def test_how_a_passed_through_request_ended_is_told(
    autojump_clock: MockClock, house: Build, said: bytes, code: str, http_status: int
) -> None:
    h = house()
    client = h.send(path="/v1/files")
    call = await h.upstream.call()
    await call.send(said)
    await call.close()
    await client.answer.done.wait()
    assert client.answer.status == http_status
    (event,) = h.recorder.passed_through
    assert (event.ending.code, event.progress.http_status) == (code, http_status)
    assert h.recorder.ended == []


async def test_a_bug_costs_one_request(
    autojump_clock: MockClock, house: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = house()

    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("trioproxy.relay.request.client_headers", bug)
    client = h.send()
    await (await h.upstream.call()).answer()
    await client.answer.done.wait()
    assert (client.answer.status, client.answer.code) == (500, "internal_error")
    assert client.answer.headers["x-should-retry"] == "false"
    assert h.recorder.outcomes() == ["proxy_error"]
    passed = h.send(path="/v1/files")
    await (await h.upstream.call()).answer()
    await passed.answer.done.wait()
    assert (passed.answer.status, passed.answer.code) == (500, "internal_error")
    assert [event.ending.code for event in h.recorder.passed_through] == ["internal_error"]
    await trio.testing.wait_all_tasks_blocked()
    h.assert_settled()


async def test_a_slow_sender_holds_no_slot(autojump_clock: MockClock, house: Build) -> None:
    h = house(scheduler=ONE_SLOT)
    slow = h.send(body=None, headers=[("Content-Length", "100")])
    await trio.testing.wait_all_tasks_blocked()
    quick = h.send()
    await (await h.upstream.call()).answer()
    await quick.answer.done.wait()
    slow.leave()
    await slow.answer.done.wait()
    assert h.recorder.outcomes() == ["success"]


async def test_priorities_are_read_from_header_and_body(autojump_clock: MockClock, house: Build) -> None:
    h = house()
    for body, headers, priority in [
        (b'{"a": 1}', [], 50),
        (b'{"a": 1, "priority": "low"}', [], 30),
        (b'{"a": 1, "priority": 7}', [("X-Priority", "critical")], 90),
        (b"--boundary", [("X-Priority", " 61 ")], 61),
    ]:
        client = h.send(body=body, headers=headers)
        call = await h.upstream.call()
        assert call.body == (b'{"a": 1}' if body.startswith(b"{") else body)
        await call.answer()
        await client.answer.done.wait()
        assert h.recorder.ended[-1].request.priority == priority


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ([("X-Priority", "101")], b"{}", 400, "invalid_priority"),
        ([("X-Priority", "1"), ("X-Priority", "2")], b"{}", 400, "invalid_priority"),
        ([], b'{"priority": null}', 400, "invalid_priority"),
        ([], b'{"priority": 50.0}', 400, "invalid_priority"),
        ([], b'{"priority": true}', 400, "invalid_priority"),
        ([("X-Request-Timeout", "0")], b"{}", 400, "invalid_request"),
        ([("Transfer-Encoding", "chunked")], b"{}", 400, "invalid_request"),
        ([], b"x" * 101, 413, "request_too_large"),
    ],
)
async def test_refused_before_scheduling(
    autojump_clock: MockClock, house: Build, headers: list[tuple[str, str]], body: bytes, status: int, code: str
) -> None:
    h = house(server={"max_body_size": 100})
    answer = await h.client().post(headers=headers, body=body)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["x-request-id"]
    assert answer.whole
    assert h.upstream.calls == []
    assert h.recorder.ended == []
    (refused,) = h.recorder.refused
    assert refused.ending.code == code
    assert h.proxy.metrics.registry.get_sample_value("openai_proxy_refused_total", {"code": code}) == 1


async def test_an_announced_body_that_is_too_large_is_refused_unread(autojump_clock: MockClock, house: Build) -> None:
    h = house(server={"max_body_size": 100})
    answer = await h.client().post(body=None, headers=[("Content-Length", "101")])
    assert (answer.status, answer.code) == (413, "request_too_large")


async def test_an_early_answer_ends_when_the_body_does(autojump_clock: MockClock, house: Build) -> None:
    h = house(server={"max_body_size": 100})
    client = h.send(body=None, headers=[("Content-Length", "101")])
    await trio.sleep(1)
    assert (client.answer.code, client.answer.whole) == ("request_too_large", False)
    client.send_body(b"x" * 101, more=False)
    await client.answer.done.wait()
    assert client.answer.whole
    assert trio.current_time() == pytest.approx(1)


async def test_a_body_of_exactly_the_limit_is_taken(autojump_clock: MockClock, house: Build) -> None:
    h = house(server={"max_body_size": 100})
    client = h.send(body=b"x" * 100)
    await (await h.upstream.call()).answer()
    await client.answer.done.wait()
    assert client.answer.status == 200
