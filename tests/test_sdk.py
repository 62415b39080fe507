"""The official `openai` Python client, sync and async, pointed at the proxy in front of the simulated upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import trio

from support import Proxy, running_proxy, until
from trioproxy.demo.upstream import SimulatedUpstream, UpstreamOptions, create_upstream, serve_upstream

# The SDK leaves the generators of its streams to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx2|httpcore2).*:ResourceWarning")

FAST = UpstreamOptions(time_to_first_token=0, tokens_per_second=1e6, tokens=8)
MESSAGES: Any = [{"role": "user", "content": "Say something."}]


@asynccontextmanager
async def setting(
    options: UpstreamOptions = FAST, **settings: dict[str, Any]
) -> AsyncIterator[tuple[Proxy, SimulatedUpstream, openai.AsyncOpenAI]]:
    """Upstream, proxy and client."""
    upstream = create_upstream(options)
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_upstream, upstream)
        async with running_proxy(url, **settings) as proxy, client_of(proxy) as client:
            yield proxy, upstream, client
        nursery.cancel_scope.cancel()


def client_of(proxy: Proxy, **options: Any) -> openai.AsyncOpenAI:
    """A client that does not retry unless it is told to."""
    return openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="sk-test", **({"max_retries": 0} | options))


async def test_chat_and_responses_streaming_and_not() -> None:
    async with setting() as (proxy, upstream, client):
        chat = await client.chat.completions.create(model="gpt-sim", messages=MESSAGES)
        assert chat.choices[0].message.content
        text = ""
        async for chunk in await client.chat.completions.create(model="gpt-sim", messages=MESSAGES, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == chat.choices[0].message.content
        response = await client.responses.create(model="gpt-sim", input="Say something.")
        assert response.output_text
        kinds = [event.type async for event in await client.responses.create(model="gpt-sim", input="x", stream=True)]
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert proxy.recorder.outcomes() == ["success"] * 4
        assert [event.request.stream for event in proxy.recorder.ended] == [None, True, None, True]
        assert {event.request.model for event in proxy.recorder.ended} == {"gpt-sim"}
        assert upstream.completed == 4


async def test_embeddings_upload_and_models() -> None:
    async with setting() as (proxy, _, client):
        embedding = await client.embeddings.create(model="text-embedding-sim", input=["a", "b"])
        assert len(embedding.data) == 2
        uploaded = await client.files.create(file=("notes.txt", b"x" * 300_000), purpose="assistants")
        assert (uploaded.bytes, uploaded.filename) == (300_000, "notes.txt")
        transcript = await client.audio.transcriptions.create(model="gpt-sim", file=("a.wav", b"RIFF" * 1000))
        assert transcript.text
        assert [model.id async for model in client.models.list()]
        assert [event.request.path for event in proxy.recorder.ended] == ["/v1/embeddings", "/v1/audio/transcriptions"]
        assert len(proxy.recorder.passed_through) == 2


async def test_the_sync_client_with_upstream_headers() -> None:
    async with setting() as (proxy, _, _):

        def talk() -> None:
            with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="sk-test", max_retries=0) as client:
                raw = client.chat.completions.with_raw_response.create(
                    model="gpt-sim", messages=MESSAGES, extra_headers={"X-Priority": "high"}
                )
                assert raw.headers["openai-version"]
                assert raw.headers["x-ratelimit-limit-requests"]
                assert raw.headers["server-timing"].startswith("queue;dur=")
                assert raw.headers["x-request-id"].startswith("req_")
                assert raw.headers["x-request-id"] != raw.headers["x-trioproxy-request-id"]
                assert raw.parse().choices[0].message.content
                stream = client.chat.completions.create(
                    model="gpt-sim", messages=MESSAGES, stream=True, extra_body={"priority": "low"}
                )
                assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                assert client.responses.create(model="gpt-sim", input="x").output_text
                assert client.embeddings.create(model="text-embedding-sim", input="a").data[0].embedding
                assert client.files.create(file=b"x" * 10, purpose="assistants").bytes == 10
                assert list(client.models.list())

        await trio.to_thread.run_sync(talk)
        assert [event.request.priority for event in proxy.recorder.ended] == [70, 30, 50, 50]


async def test_each_of_our_refusals_is_the_sdks_typed_exception() -> None:
    small = {"max_body_size": 400}
    async with setting(server=small) as (proxy, upstream, client):
        with pytest.raises(openai.BadRequestError) as invalid:
            await client.responses.create(model="m", input="x", extra_headers={"X-Priority": "urgent"})
        assert (invalid.value.code, invalid.value.type) == ("invalid_priority", "invalid_request_error")
        assert invalid.value.param == "X-Priority"
        assert invalid.value.request_id == invalid.value.response.headers["x-trioproxy-request-id"]
        with pytest.raises(openai.APIStatusError) as large:
            await client.responses.create(model="m", input="x" * 400)
        assert (large.value.status_code, large.value.code) == (413, "request_too_large")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.with_options(base_url=proxy.url).models.list()
        assert missing.value.code == "not_found"
        proxy.app.proxy.scheduler.close()
        with pytest.raises(openai.InternalServerError) as closing:
            await client.responses.create(model="m", input="x")
        assert (closing.value.status_code, closing.value.code) == (503, "shutting_down")
        assert upstream.received == 0


async def test_waiting_too_long_evicted_and_rejected() -> None:
    slow = UpstreamOptions(time_to_first_token=30)
    limits = {"concurrency": 1, "max_queue": 1, "queue_timeout": 1}
    async with setting(slow, scheduler=limits) as (proxy, upstream, client), trio.open_nursery() as nursery:
        codes: dict[str, str | None] = {}

        async def ask(name: str, priority: str, **headers: str) -> None:
            try:
                await client.responses.create(
                    model="m", input="x", extra_headers={"X-Priority": priority} | headers, timeout=10
                )
            except openai.InternalServerError as error:
                codes[name] = error.code

        nursery.start_soon(ask, "running", "low")
        await until(lambda: upstream.running)
        nursery.start_soon(ask, "evicted", "low")
        await until(lambda: proxy.app.proxy.scheduler.snapshot().queued)
        await ask("rejected", "low")
        nursery.start_soon(ask, "times out", "high")
        await until(lambda: "times out" in codes)
        assert codes == {"rejected": "queue_full", "evicted": "evicted", "times out": "queue_timeout"}
        with pytest.raises(openai.InternalServerError, match="deadline"):
            await client.responses.create(model="m", input="x", extra_headers={"X-Request-Timeout": "0.05"})
        nursery.cancel_scope.cancel()
    assert upstream.aborted == 1


async def test_the_upstreams_own_errors_go_through() -> None:
    async with setting() as (proxy, _, client):
        for status, kind in [
            (400, openai.BadRequestError),
            (401, openai.AuthenticationError),
            (429, openai.RateLimitError),
            (500, openai.InternalServerError),
        ]:
            with pytest.raises(kind) as raised:
                await client.responses.create(model="m", input="x", extra_headers={"x-sim-status": str(status)})
            assert isinstance(raised.value, openai.APIStatusError)
            assert raised.value.status_code == status
        assert proxy.recorder.outcomes() == ["success", "success", "upstream_error", "upstream_error"]


async def test_a_stream_that_breaks_raises_and_is_never_whole() -> None:
    async with setting() as (proxy, _, client):
        stream = await client.chat.completions.create(
            model="gpt-sim", messages=MESSAGES, stream=True, extra_headers={"x-sim-break": "3"}
        )
        reasons: list[str | None] = []

        async def read() -> None:
            async for chunk in stream:
                reasons.append(chunk.choices[0].finish_reason)

        with pytest.raises(openai.APIError):
            await read()
        assert set(reasons) == {None}
        assert proxy.recorder.outcomes() == ["upstream_error"]


async def test_an_upstream_that_is_out_is_a_status_error_that_may_be_retried() -> None:
    async with running_proxy("http://127.0.0.1:9/v1") as proxy, client_of(proxy) as client:
        with pytest.raises(openai.InternalServerError) as unreachable:
            await client.responses.create(model="m", input="x")
        assert (unreachable.value.status_code, unreachable.value.code) == (502, "upstream_unreachable")
        assert unreachable.value.response.headers["x-should-retry"] == "true"


async def test_the_sdk_does_not_come_back_after_a_timeout_of_ours() -> None:
    slow = UpstreamOptions(time_to_first_token=30)
    limits = {"concurrency": 1, "queue_timeout": 0.1}
    async with setting(slow, scheduler=limits) as (proxy, upstream, client), trio.open_nursery() as nursery:
        patient = client.with_options(max_retries=2)
        nursery.start_soon(lambda: patient.responses.create(model="m", input="x"))
        await until(lambda: upstream.running)
        with pytest.raises(openai.InternalServerError, match="queue_timeout"):
            await patient.responses.create(model="m", input="x")
        assert proxy.recorder.outcomes() == ["timeout"]
        nursery.cancel_scope.cancel()


async def test_the_sdk_comes_back_after_an_eviction_and_is_served() -> None:
    options = UpstreamOptions(time_to_first_token=0.3, tokens=1, jitter=0)
    async with setting(options, scheduler={"concurrency": 1, "max_queue": 1}) as (proxy, _, client):
        served: list[str] = []

        async def ask(name: str, priority: str) -> None:
            patient = client.with_options(max_retries=3)
            await patient.responses.create(model="m", input=name, extra_headers={"X-Priority": priority})
            served.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "first", "low")
            await until(lambda: proxy.app.proxy.scheduler.snapshot().running)
            nursery.start_soon(ask, "evicted", "low")
            await until(lambda: proxy.app.proxy.scheduler.snapshot().queued)
            nursery.start_soon(ask, "urgent", "high")
        assert served == ["first", "urgent", "evicted"]
        assert sorted(proxy.recorder.outcomes()) == ["evicted", "success", "success", "success"]
