"""Client keys: who is let in, what each may ask for, what it may have at once, and where the key must not go."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import trio
from trio.testing import MockClock

from builders import head
from memory import House
from support import Upstream, running_proxy
from trioproxy import request
from trioproxy.body import Reading, names_one_model, read_form
from trioproxy.config import KeySettings, SchedulerSettings
from trioproxy.errors import INVALID_API_KEY, MODEL_NOT_ALLOWED, PRIORITY_NOT_ALLOWED, ProxyError
from trioproxy.keys import PREFIX, KeyRing, check_expiry, check_model, digest, new_key, queried_model
from trioproxy.observe import logs

NOW = datetime(2026, 6, 1, tzinfo=UTC)
Build = Callable[..., House]


def key_settings(name: str = "web", **values: Any) -> KeySettings:
    return KeySettings.model_validate({"name": name, "key": f"sk-{name}"} | values)


RING = KeyRing(
    [
        key_settings("web"),
        key_settings("batch", key=None, key_sha256=digest("sk-batch").upper()),
        key_settings("old", expires="2026-05-31"),
        key_settings("new", expires="2026-06-01"),
    ]
)

# Who is let in


@pytest.mark.parametrize(
    ("fields", "subprotocols", "name"),
    [
        ([("Authorization", "Bearer sk-web")], [], "web"),
        ([("authorization", "bearer  sk-batch ")], [], "batch"),
        ([("Authorization", "BEARER sk-new")], [], "new"),
        ([("api-key", "sk-web")], [], "web"),
        ([("Authorization", ""), ("api-key", "sk-web")], [], "web"),
        ([("Authorization", "Basic dTpw"), ("api-key", "sk-web")], [], "web"),
        ([("X-Api-Key", " sk-web")], [], "web"),
        ([("Authorization", "Bearer sk-web"), ("x-api-key", "sk-web")], [], "web"),
        ([], ["realtime", "openai-insecure-api-key.sk-web"], "web"),
    ],
)
def test_a_key_is_known_wherever_clients_put_it(
    fields: list[tuple[str, str]], subprotocols: list[str], name: str
) -> None:
    key = RING.identify(head(headers=fields), subprotocols)
    check_expiry(key, NOW)
    assert key is not None
    assert key.name == name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([], "has no API key"),
        ([("Authorization", "")], "has no API key"),
        ([("Authorization", "Bearer")], "has no API key"),
        ([("Authorization", "sk-web")], "has no API key"),
        ([("Authorization", "Basic sk-web")], "has no API key"),
        ([("api-key", "")], "has no API key"),
        ([("Authorization", "Bearer sk-WEB")], "not one of"),
        ([("Authorization", "Bearer sk-we")], "not one of"),
        ([("Authorization", "Bearer sk-web sk-web")], "not one of"),
        ([("Authorization", f"Bearer {digest('sk-batch')}")], "not one of"),
        ([("Authorization", "Bearer sk-web"), ("Authorization", "Bearer sk-batch")], "more than one"),
        ([("Authorization", "Bearer sk-web"), ("api-key", "sk-batch")], "more than one"),
        ([("Authorization", "Bearer sk-old")], "'old' has expired, on 2026-06-01 at 00:00 UTC"),
    ],
)
def test_whoever_has_none_is_not_let_in(fields: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(ProxyError, match=said) as caught:
        check_expiry(RING.identify(head(headers=fields), []), NOW)
    assert caught.value.ending is INVALID_API_KEY
    assert "sk-" not in str(caught.value)
    status, headers, _ = request.refusal(caught.value, "r", 0.5)
    assert status == 401
    assert (b"www-authenticate", b"Bearer") in headers


def test_without_keys_everybody_is() -> None:
    key = KeyRing([]).identify(head(), [])
    check_expiry(key, NOW)
    assert key is None


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, said: bytes) -> bool:
        compared.append(known)
        return hmac.compare_digest(known, said)

    monkeypatch.setattr("trioproxy.keys.hmac", SimpleNamespace(compare_digest=compare))
    for said in ("sk-web", "sk-new", "sk-batch"):
        compared.clear()
        RING.identify(head(headers=[("api-key", said)]), [])
        assert len(compared) == 4


def test_new_keys_are_long_and_all_different() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(PREFIX) and len(key) - len(PREFIX) == 43 for key in keys)


# What each may ask for


@pytest.mark.parametrize(
    ("models", "model", "allowed"),
    [
        (None, None, True),
        (["gpt-5*"], "gpt-5", True),
        (["gpt-5*"], "gpt-5-mini", True),
        (["gpt-5"], "gpt-5-mini", False),
        (["gpt-5*", "o3"], "o3", True),
        (["gpt-5*"], "GPT-5", False),
        (["gpt-5*"], None, False),
        (["gpt-5*"], "", False),
        (["*"], None, True),
        (["[a]"], "a", True),
    ],
)
def test_models(models: list[str] | None, model: str | None, allowed: bool) -> None:
    key = key_settings(models=models)
    if allowed:
        check_model(key, model)
        return
    with pytest.raises(ProxyError) as caught:
        check_model(key, model)
    assert caught.value.ending is MODEL_NOT_ALLOWED
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("query", "model"),
    [
        ("", None),
        ("model=a", "a"),
        ("x=1&model=a%20b", "a b"),
        ("model=a&model=b", None),
        ("model=a&model=", None),
        ("model=a;model=b", None),
    ],
)
def test_the_model_of_a_realtime_session_is_in_its_query(query: str, model: str | None) -> None:
    assert queried_model(head(f"/v1/realtime?{query}")) == model
    assert queried_model(head(f"/v1/responses?{query}")) is None


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = [f'--xx\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n'.encode() + v + b"\r\n" for n, v in fields]
    return b"".join(parts) + b"--xx--\r\n"


def part(*dispositions: str) -> bytes:
    heads = "".join(f"Content-Disposition: {said}\r\n" for said in dispositions)
    return f"--xx\r\n{heads}\r\nv\r\n".encode()


@pytest.mark.parametrize(
    ("content", "model"),
    [
        (form(("file", b"\xff\x00"), ("model", b"whisper-1")), "whisper-1"),
        (form(("model", b"whisper-1"), ("file", b"\xff" * 100_000)), "whisper-1"),
        (form(("model", b"a"), ("model", b"b")), None),
        (form(("file", b'name="model"\r\n\r\nb')), None),
        (form(("model", b"\xff")), None),
        (form(("model", b"a"))[:-20], None),
        (b"", None),
        (b"{}", None),
        (
            part('form-data; name="model"')
            + part('form-data; name="file"; filename="a; name=\\"model\\".wav"')
            + b"--xx--\r\n",
            "v",
        ),
        (part('form-data; name="model"') + part("form-data; filename*=utf-8''b.wav; name=file") + b"--xx--\r\n", "v"),
        (part('form-data; name="model"') + part('form-data; name = "model"') + b"--xx--\r\n", None),
        (part('form-data; name="model"') + part('form-data; name ="model"') + b"--xx--\r\n", None),
        (part('form-data; name="model"') + part('form-data; name= "model"') + b"--xx--\r\n", None),
        (part('form-data; name="model"') + part('form-data; name="x"; name="model"') + b"--xx--\r\n", None),
        (part('form-data; name="model"') + part('form-data; name="model"; name="x"') + b"--xx--\r\n", None),
        (part('form-data; name="model"') + part('form-data; name="mo\\del"') + b"--xx--\r\n", None),
        (part('form-data; name="model"') + part("form-data; name*=utf-8''model") + b"--xx--\r\n", None),
        (part('form-data; name="model"') + part('form-data; name="x", form-data; name="model"') + b"--xx--\r\n", None),
        (
            part('form-data; name="model"') + part('form-data; name="x"', 'form-data; name="model"') + b"--xx--\r\n",
            None,
        ),
    ],
)
def test_the_model_of_a_form_is_one_of_its_fields(content: bytes, model: str | None) -> None:
    assert read_form(content, b"xx") == model


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=xx", b"xx"),
        ('Multipart/Form-Data; charset=utf-8; boundary="x y"', b"x y"),
        ("multipart/form-data; boundary=----WebKitFormBoundaryx", b"----WebKitFormBoundaryx"),
        ("multipart/form-data; boundary=a=b", None),
        ("multipart/form-data", None),
        ("multipart/form-data; boundary=xx; boundary=yy", None),
        ("multipart/form-data; boundary=xx; boundary = yy", None),
        ("multipart/form-data; boundary=xx; Boundary=yy", None),
        ("multipart/form-data; boundary*=utf-8''xx", None),
        ("multipart/form-data; boundary =xx", None),
        ("multipart/mixed; boundary=xx", None),
        ("application/json", None),
        ("", None),
    ],
)
def test_the_boundary_of_a_form(content_type: str, boundary: bytes | None) -> None:
    assert request.form_boundary(head(headers=[("Content-Type", content_type)])) == boundary


@pytest.mark.parametrize(
    ("content", "one"),
    [
        (b'{"model": "a"}', True),
        (b'{"model": "a", "tools": [{"model": "b"}], "n": 12345678901}', True),
        (b'{"x": "\\u00e4", "model": "a"}', True),
        (b'{"x": "say \\"model\\"", "model": "a"}', True),
        (b'{"model": "a", "model": "a"}', False),
        (b'{"model": "a", "Model": "b"}', False),
        (b'{"m\\u006fdel": "a", "model": "b"}', False),
        (b'{"model": "a", "model": ' + b"[" * 100_000, False),
    ],
)
def test_whether_every_reader_finds_the_same_model(content: bytes, one: bool) -> None:
    assert names_one_model(content) == one


PART = b'--xx\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'


@pytest.mark.parametrize(
    "content",
    [
        form(("model", b"a"))[:-8] + PART * 1001 + b"--xx--\r\n",
        b"--xx\r\n" + b"A: b\r\n" * 100_000 + form(("model", b"a")),
        form(("model", b"a" * 200_000)),
    ],
    ids=["parts", "head", "model"],
)
def test_a_form_that_takes_long_to_read_is_not_read(content: bytes) -> None:
    started = time.process_time()
    assert read_form(content, b"xx") is None
    assert time.process_time() - started < 0.5


LIMITS = SchedulerSettings.model_validate(
    {"default_priority": 41, "model_priorities": {"slow-*": 11, "*-urgent": 95}, "honor_service_tier": True}
)
PLAIN = SchedulerSettings(default_priority=41)


@pytest.mark.parametrize(
    ("header", "reading", "key", "limits", "expected"),
    [
        # Each step of the table goes before those below it.
        ("5", Reading(b"", "slow-1", service_tier="flex", priorities=("6",)), {"default_priority": 71}, LIMITS, 5),
        (None, Reading(b"", "slow-1", service_tier="flex", priorities=("6",)), {"default_priority": 71}, LIMITS, 6),
        (None, Reading(b"", "slow-1", service_tier="flex"), {"default_priority": 71}, LIMITS, 30),
        (None, Reading(b"", "slow-1", service_tier="priority"), {"default_priority": 71}, LIMITS, 70),
        (None, Reading(b"", "slow-1", service_tier="auto"), {"default_priority": 71}, LIMITS, 71),
        (None, Reading(b"", "slow-1"), {"default_priority": 71}, LIMITS, 71),
        (None, Reading(b"", "slow-urgent"), {}, LIMITS, 11),
        (None, Reading(b"", "urgent"), {}, LIMITS, 41),
        (None, Reading(b""), {}, LIMITS, 41),
        (None, Reading(b"", "slow-1", service_tier="priority"), None, PLAIN, 41),
        (None, Reading(b"", "slow-1"), None, LIMITS, 11),
        # What is derived is lowered to the key's highest.
        (None, Reading(b""), {"max_priority": 20}, LIMITS, 20),
        (None, Reading(b"", "x-urgent"), {"max_priority": 20}, LIMITS, 20),
        (None, Reading(b"", service_tier="priority"), {"max_priority": 20}, LIMITS, 20),
        # What is said is lowered where the key says so.
        ("20", Reading(b""), {"max_priority": 20}, LIMITS, 20),
        ("21", Reading(b""), {"max_priority": 20, "clamp": True}, LIMITS, 20),
        (None, Reading(b"", priorities=("100",)), {"max_priority": "low", "clamp": True}, LIMITS, 30),
    ],
)
def test_one_precedence(
    header: str | None, reading: Reading, key: dict[str, Any] | None, limits: SchedulerSettings, expected: int
) -> None:
    fields = [] if header is None else [("X-Priority", header)]
    of_key = None if key is None else key_settings(**key)
    assert request.read_priority(head(headers=fields), reading, of_key, limits) == expected


@pytest.mark.parametrize(
    ("header", "reading"), [("31", Reading(b"")), ("high", Reading(b"")), (None, Reading(b"", priorities=('"31"',)))]
)
def test_a_priority_above_the_keys_highest_is_refused(header: str | None, reading: Reading) -> None:
    fields = [] if header is None else [("X-Priority", header)]
    with pytest.raises(ProxyError, match=r"'web' must not ask for a priority of .*: 30 is the highest") as caught:
        request.read_priority(head(headers=fields), reading, key_settings(max_priority="low"), LIMITS)
    assert caught.value.ending is PRIORITY_NOT_ALLOWED


# In the house

KEYS: list[dict[str, Any]] = [
    {"name": "web", "key": "sk-web", "default_priority": "high", "max_priority": "critical"},
    {"name": "batch", "key_sha256": digest("sk-batch"), "max_priority": "low", "max_concurrency": 1, "max_queue": 1},
    {"name": "audio", "key": "sk-audio", "models": ["whisper-*"]},
]
BATCH = [("Authorization", "Bearer sk-batch")]
WEB = [("Authorization", "Bearer sk-web")]


async def test_strangers_are_refused_before_their_body_is_read(autojump_clock: MockClock, house: Build) -> None:
    h = house(keys=KEYS)
    for path in ("/v1/chat/completions", "/v1/models", "/v1/files"):
        client = h.client()
        with trio.fail_after(3):
            answer = await client.post(
                path, body=None, headers=[("Content-Length", "5"), ("Authorization", "Bearer x")]
            )
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert json.loads(answer.body)["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert [event.ending.code for event in h.recorder.refused] == ["invalid_api_key"] * 3
    assert not h.upstream.calls
    h.assert_settled()


async def test_what_is_wrong_with_the_path_is_said_to_strangers_too(autojump_clock: MockClock, house: Build) -> None:
    h = house(keys=KEYS)
    assert (await h.client().post("/v2/models")).code == "not_found"
    for path in ("/health", "/metrics"):
        assert (await h.client().post(path, method="GET", body=b"")).status == 200


async def test_models_and_priorities_are_judged(autojump_clock: MockClock, house: Build) -> None:
    h = house(keys=KEYS)
    audio = [("Authorization", "Bearer sk-audio")]
    multipart = [*audio, ("Content-Type", "multipart/form-data; boundary=xx")]
    for fields, body, code in (
        (audio, b'{"model": "gpt-5"}', "model_not_allowed"),
        (audio, b"{}", "model_not_allowed"),
        (audio, b'{"model": "gpt-5", "model": "whisper-1"}', "model_not_allowed"),
        (audio, b'{"model": "whisper-1", "Model": "gpt-5"}', "model_not_allowed"),
        (multipart, form(("model", b"gpt-5")), "model_not_allowed"),
        (multipart, form(("file", b"abc")), "model_not_allowed"),
        ([*BATCH, ("X-Priority", "high")], b"{}", "priority_not_allowed"),
        (BATCH, b'{"priority": 31}', "priority_not_allowed"),
    ):
        answer = await h.client().post(body=body, headers=fields)
        assert (answer.status, answer.code) == (403, code)
        assert json.loads(answer.body)["error"]["type"] == "permission_error"
    assert {event.request.key for event in h.recorder.refused} == {"audio", "batch"}
    client = h.send(body=form(("file", b"abc"), ("model", b"whisper-1")), headers=multipart)
    await (await h.upstream.call()).answer()
    await client.answer.done.wait()
    (ended,) = h.recorder.ended
    assert (ended.request.model, ended.request.priority, ended.request.key) == ("whisper-1", 50, "audio")


async def test_a_priority_not_allowed_need_not_wait_for_the_body(autojump_clock: MockClock, house: Build) -> None:
    h = house(keys=KEYS)
    fields = [*BATCH, ("X-Priority", "high"), ("Content-Length", "5")]
    with trio.fail_after(3):
        assert (await h.client().post(body=None, headers=fields)).code == "priority_not_allowed"


async def test_a_body_that_is_late_is_a_deadline_missed_not_a_model_missing(
    autojump_clock: MockClock, house: Build
) -> None:
    h = house(keys=KEYS)
    fields = [("Authorization", "Bearer sk-audio"), ("X-Request-Timeout", "1"), ("Content-Length", "5")]
    assert (await h.client().post(body=None, headers=fields)).code == "deadline_exceeded"


async def test_a_key_has_its_own_slots_and_places_and_others_pass(autojump_clock: MockClock, house: Build) -> None:
    h = house(keys=KEYS, scheduler={"concurrency": 3, "max_queue": 10})
    running = h.send(headers=BATCH)
    held = await h.upstream.call()
    waiting = h.send(headers=BATCH)
    await trio.testing.wait_all_tasks_blocked()
    refused = await h.client().post(headers=BATCH)
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert refused.headers["x-should-retry"] == "true"
    assert int(refused.headers["retry-after"]) >= 1
    assert "'batch' has as many requests here as it may: 1 run (of 1) and 1 wait (of 1)" in refused.body.decode()
    passing = h.send(headers=WEB)
    await (await h.upstream.call()).answer()
    await passing.answer.done.wait()
    more_urgent = h.send(headers=[*BATCH, ("X-Priority", "30")], body=b"{}")
    await trio.testing.wait_all_tasks_blocked()
    assert not waiting.answer.done.is_set(), "its priority is 30 too: the default, lowered"
    assert more_urgent.answer.code == "rate_limit_exceeded"
    await held.answer()
    await (await h.upstream.call()).answer()
    await waiting.answer.done.wait()
    assert (running.answer.status, waiting.answer.status, passing.answer.status) == (200, 200, 200)
    assert [(event.request.key, str(event.ending.outcome)) for event in h.recorder.ended] == [
        *[("batch", "rejected"), ("web", "success"), ("batch", "rejected")],
        *[("batch", "success"), ("batch", "success")],
    ]
    h.assert_settled()


async def test_within_a_full_key_the_more_urgent_takes_the_place(autojump_clock: MockClock, house: Build) -> None:
    h = house(keys=KEYS)
    first = h.send(headers=BATCH)
    held = await h.upstream.call()
    least = h.send(headers=[*BATCH, ("X-Priority", "5")])
    await trio.testing.wait_all_tasks_blocked()
    better = h.send(headers=[*BATCH, ("X-Priority", "6")])
    await least.answer.done.wait()
    assert (least.answer.status, least.answer.code) == (503, "evicted")
    assert (
        "The key 'batch's part of the queue was full (1 places)".replace("'batch's", "'batch''s")
        in (json.loads(least.answer.body)["error"]["message"])
    )
    await held.answer()
    await (await h.upstream.call()).answer()
    await better.answer.done.wait()
    await first.answer.done.wait()
    h.assert_settled()


@pytest.mark.parametrize("own_key", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
async def test_where_a_clients_key_goes(autojump_clock: MockClock, house: Build, own_key: bool, path: str) -> None:
    h = house(keys=KEYS, upstream={"api_key": "sk-upstream"} if own_key else {})
    for fields in (WEB, [("Api-Key", "sk-web")], [("x-api-key", "sk-web"), ("OpenAI-Organization", "o")]):
        client = h.send(path=path, headers=fields)
        call = await h.upstream.call()
        await call.answer()
        await client.answer.done.wait()
        sent = [value for name, value in call.headers if name.lower() not in ("host", "content-length")]
        assert sent == (["Bearer sk-upstream"] if own_key else [value for _, value in fields])


async def test_other_credentials_go_through_where_there_are_no_keys(autojump_clock: MockClock, house: Build) -> None:
    h = house(upstream={"api_key": "sk-upstream"})
    h.send(headers=[("x-api-key", "theirs")])
    call = await h.upstream.call()
    assert call.header("x-api-key") == "theirs"
    await call.answer()


async def test_names_are_in_the_log_and_in_metrics_and_keys_are_not(upstream: Upstream) -> None:
    stream = StringIO()
    writer = logs.configure("debug", "json", None, stream)
    try:
        expired = {"name": "old", "key": "sk-old", "expires": "2020-01-31"}
        async with running_proxy(upstream.url, keys=[*KEYS, expired]) as proxy, trio.open_nursery() as nursery:
            client = partial(openai.AsyncOpenAI, base_url=f"{proxy.url}/v1", max_retries=0)
            async with client(api_key="sk-old") as old:
                with trio.fail_after(20), pytest.raises(openai.AuthenticationError, match="'old' has expired"):
                    await old.models.list()
            async with client(api_key="sk-web") as web, client(api_key="sk-nobody") as nobody:
                nursery.start_soon(partial(web.get, "/models", cast_to=httpx.Response))
                await (await upstream.call()).answer(b'{"object": "list", "data": []}')
                nursery.start_soon(partial(web.embeddings.create, model="m", input="x", encoding_format="float"))
                await (await upstream.call()).answer(b'{"object": "list", "data": [{"embedding": [1.0], "index": 0}]}')
                with pytest.raises(openai.AuthenticationError) as caught:
                    await nobody.models.list()
                assert caught.value.code == "invalid_api_key"
            sample = proxy.app.proxy.metrics.registry.get_sample_value
            labels = {"pool": "default", "key": "web"}
            assert sample("openai_proxy_key_requests_total", {**labels, "status": "completed"}) == 1
            assert sample("openai_proxy_key_requests_total", {**labels, "key": "batch", "status": "completed"}) == 0
            assert sample("openai_proxy_key_running", labels) == 0
            assert sample("openai_proxy_refused_total", {"code": "invalid_api_key"}) == 2
    finally:
        writer.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    named = {line["event"] for line in lines if line.get("key") == "web"}
    assert named == {"request passed through", "request completed", "request started"}
    refused = [line.get("key") for line in lines if line["event"] == "request refused"]
    assert refused == ["old", None], "whose key has expired is known, a stranger's name is not"
    assert "sk-" not in stream.getvalue()


@pytest.mark.parametrize(
    ("target", "fields", "code"),
    [
        ("/v1/realtime", [], "invalid_api_key"),
        ("/v1/realtime", ["Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-nobody"], "invalid_api_key"),
        ("/v1/realtime", ["Authorization: Bearer sk-audio"], "model_not_allowed"),
        ("/v1/realtime?model=gpt-realtime", ["Authorization: Bearer sk-audio"], "model_not_allowed"),
        ("/v1/realtime?model=whisper-live", ["Authorization: Bearer sk-audio"], None),
        ("/v1/realtime", ["Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-web"], None),
        ("/v1/realtime", ["x-api-key: sk-web"], None),
    ],
)
async def test_websockets_need_a_key_too_and_do_not_pass_it_on(
    upstream: Upstream, target: str, fields: list[str], code: str | None
) -> None:
    lines = [f"GET {target} HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket", *fields]
    lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", ""]
    async with running_proxy(upstream.url, keys=KEYS, upstream={"api_key": "sk-upstream"}) as proxy:
        stream = await proxy.connect()
        await stream.send_all("\r\n".join(lines).encode())
        if code is None:
            call = await upstream.call()
            assert call.header("authorization") == "Bearer sk-upstream"
            assert call.header("sec-websocket-protocol") in (None, "realtime")
            assert "sk-web" not in str(call.headers)
            await call.answer(b'{"code": "theirs"}', 426)
        with trio.fail_after(20):
            answer = await stream.receive_some()
            while b'"code"' not in answer:
                answer += await stream.receive_some()
        assert (f'"code":"{code}"' if code else '"code": "theirs"').encode() in answer
        assert (b"www-authenticate: Bearer" in answer.replace(b"WWW-A", b"www-a")) == (code == "invalid_api_key")
