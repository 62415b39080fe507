"""The simulated upstream, seen through sockets by OpenAI's own client, and by a raw one where bytes matter."""

import base64
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import trio
import trio_websocket
from openai.types import Completion, CreateEmbeddingResponse, ModerationCreateResponse, ModerationTextInputParam
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionUserMessageParam
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from support import until
from trioproxy.demo.upstream import SimulatedUpstream, UpstreamOptions, create_upstream, serve_upstream

HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Say hello to everyone, please."}]
FAST = UpstreamOptions(time_to_first_token=0, tokens_per_second=1e6, jitter=0, tokens=12)

# The SDK leaves its generators to the garbage collector once it has seen [DONE]; trio says so.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx2|httpcore2).*:ResourceWarning")


class Stage:
    """A simulated upstream that is being served, and a client for it."""

    def __init__(self, upstream: SimulatedUpstream, base_url: str) -> None:
        self.upstream = upstream
        self.base_url = base_url
        self.client = openai.AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0)

    async def chat(self, **headers: str) -> ChatCompletion:
        extra = {"x-sim-" + name.rstrip("_"): value for name, value in headers.items()}
        return await self.client.chat.completions.create(model="gpt-sim", messages=HELLO, extra_headers=extra)

    async def connect(self) -> trio.SocketStream:
        url = urlsplit(self.base_url)
        assert url.hostname
        assert url.port
        return await trio.open_tcp_stream(url.hostname, url.port)

    async def exchange(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[bytes, bytes]:
        """Head and body of the answer, as they came before the upstream closed the connection."""
        fields = {"host": "sim", "content-length": str(len(body)), "connection": "close"} | headers
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in fields.items())
        async with await self.connect() as stream:
            await stream.send_all(head.encode() + b"\r\n" + body)
            received = b"".join([piece async for piece in stream])
        got_head, _, got_body = received.partition(b"\r\n\r\n")
        return got_head, got_body


@asynccontextmanager
async def staged(options: UpstreamOptions) -> AsyncIterator[Stage]:
    async with trio.open_nursery() as nursery:
        upstream = create_upstream(options)
        stage = Stage(upstream, await nursery.start(serve_upstream, upstream))
        async with stage.client:
            with trio.fail_after(20):
                yield stage
        nursery.cancel_scope.cancel()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged(FAST) as ready:
        yield ready


def data_lines(body: str) -> list[str]:
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]


# --- answers, each judged by the SDK's own models ---------------------------------------------------------------------


async def test_chat_completion(stage: Stage) -> None:
    raw = await stage.client.chat.completions.with_raw_response.create(model="gpt-sim", messages=HELLO)
    answer = ChatCompletion.model_validate_json(raw.text)
    assert answer == raw.parse()
    assert (
        answer.choices[0].message.content == "The quick simulated model answers every question with the same calm words"
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


async def test_chat_completion_is_cut_short_by_the_requests_own_limit(stage: Stage) -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = await stage.client.chat.completions.create(
            model="gpt-sim", messages=HELLO, extra_body=limit, extra_headers={"x-sim-tokens": "9"}
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content == "The quick simulated"


async def test_chat_stream(stage: Stage) -> None:
    whole = (await stage.chat()).choices[0].message.content
    stream = await stage.client.chat.completions.create(
        model="gpt-sim", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    assert stream.response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = [ChatCompletionChunk.model_validate(chunk.model_dump()) async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert len(chunks) == 1 + 12 + 2
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completion_and_its_stream(stage: Stage) -> None:
    raw = await stage.client.completions.with_raw_response.create(model="gpt-sim", prompt="hi", max_tokens=5)
    answer = Completion.model_validate_json(raw.text)
    assert answer.choices[0].text == "The quick simulated model answers"
    stream = await stage.client.completions.create(model="gpt-sim", prompt=["hi"], max_tokens=5, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


async def test_older_streams_end_with_done(stage: Stage) -> None:
    for path, field in (("chat/completions", "messages"), ("completions", "prompt")):
        body = json.dumps({"model": "gpt-sim", field: [], "stream": True}).encode()
        _, streamed = await stage.exchange("POST", f"/v1/{path}", body)
        assert b"data: [DONE]\n\n" in streamed
        assert streamed.endswith(b"0\r\n\r\n")


async def test_response(stage: Stage) -> None:
    raw = await stage.client.responses.with_raw_response.create(model="gpt-sim", input="hi")
    answer = Response.model_validate_json(raw.text)
    assert answer.status == "completed"
    assert answer.output_text.startswith("The quick simulated model")
    assert answer.usage is not None
    assert answer.usage.output_tokens == 12
    cut = await stage.client.responses.create(model="gpt-sim", input="hi", max_output_tokens=2)
    assert (cut.status, cut.output_text) == ("incomplete", "The quick")


async def test_response_stream(stage: Stage) -> None:
    stream = await stage.client.responses.create(model="gpt-sim", input=[], stream=True)
    adapter: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
    events = [adapter.validate_python(event.model_dump()) async for event in stream]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 12,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "".join(
        event.delta for event in events if event.type == "response.output_text.delta"
    )


async def test_response_stream_helper_of_the_sdk_puts_it_together(stage: Stage) -> None:
    async with stage.client.responses.stream(model="gpt-sim", input="hi") as stream:
        names = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert names[-1] == "response.completed"
    assert final.output_text.startswith("The quick")


async def test_response_events_are_named_on_the_wire(stage: Stage) -> None:
    body = json.dumps({"model": "gpt-sim", "input": "hi", "stream": True, "max_output_tokens": 1}).encode()
    _, streamed = await stage.exchange("POST", "/v1/responses", body)
    names = [line.removeprefix("event: ") for line in streamed.decode().splitlines() if line.startswith("event: ")]
    assert names == [json.loads(line)["type"] for line in data_lines(streamed.decode())]
    assert names[-1] == "response.incomplete"


async def test_cancel_response(stage: Stage) -> None:
    answer = await stage.client.responses.cancel("resp_123")
    assert (answer.id, answer.status) == ("resp_123", "cancelled")


async def test_embeddings_in_both_formats_are_the_same_vectors(stage: Stage) -> None:
    create = stage.client.embeddings.with_raw_response.create
    floats = await create(model="text-embedding-sim", input=["a", "b"], encoding_format="float", dimensions=8)
    answer = CreateEmbeddingResponse.model_validate_json(floats.text)
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.data[0].embedding != answer.data[1].embedding
    assert sum(value * value for value in answer.data[0].embedding) == pytest.approx(1)
    encoded = await create(model="text-embedding-sim", input=["a", "b"], encoding_format="base64", dimensions=8)
    for item, expected in zip(json.loads(encoded.text)["data"], answer.data, strict=True):
        assert struct.unpack("<8f", base64.b64decode(item["embedding"])) == pytest.approx(expected.embedding)


async def test_embeddings_inputs(stage: Stage) -> None:
    inputs: list[tuple[Any, int]] = [("one", 1), (["one", "two", "three"], 3), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]
    for given, count in inputs:
        answer = await stage.client.embeddings.create(model="text-embedding-sim", input=given)
        assert [len(item.embedding) for item in answer.data] == [1536] * count
    with pytest.raises(openai.BadRequestError):
        await stage.client.embeddings.create(model="text-embedding-sim", input=[])


async def test_moderations(stage: Stage) -> None:
    raw = await stage.client.moderations.with_raw_response.create(input=["fine", "too"])
    answer = ModerationCreateResponse.model_validate_json(raw.text)
    assert [result.flagged for result in answer.results] == [False, False]
    part: ModerationTextInputParam = {"type": "text", "text": "fine"}
    parts = await stage.client.moderations.create(input=[part])
    assert len(parts.results) == 1


async def test_transcription(stage: Stage) -> None:
    upload = ("speech.wav", b"RIFF" * 100)
    answer = await stage.client.audio.transcriptions.create(model="whisper-sim", file=upload)
    assert answer.text.startswith("The quick")
    text = await stage.client.audio.transcriptions.create(model="whisper-sim", file=upload, response_format="text")
    assert text == answer.text + "\n"
    assert stage.upstream.log[-1].model == "whisper-sim"


async def test_files_come_and_go(stage: Stage) -> None:
    content = bytes(range(256)) * 8192  # 2 MiB: enough to be spooled to disk by the form parser
    uploaded = await stage.client.files.create(file=("täglich.jsonl", content), purpose="batch")
    assert (uploaded.bytes, uploaded.filename, uploaded.purpose) == (len(content), "täglich.jsonl", "batch")
    assert [file.id async for file in stage.client.files.list()] == [uploaded.id]
    assert (await stage.client.files.delete(uploaded.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await stage.client.files.delete(uploaded.id)
    assert stage.upstream.log[0].body_size > len(content)


async def test_models(stage: Stage) -> None:
    names = [model.id async for model in stage.client.models.list()]
    assert names == ["gpt-sim", "gpt-sim-mini", "text-embedding-sim"]
    assert (await stage.client.models.retrieve("gpt-sim")).id == "gpt-sim"
    with pytest.raises(openai.NotFoundError) as caught:
        await stage.client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


async def test_headers(stage: Stage) -> None:
    raw = await stage.client.chat.completions.with_raw_response.create(
        model="gpt-sim", messages=HELLO, extra_headers={"x-sim-latency": "0.05"}
    )
    assert raw.headers["x-request-id"].startswith("req_")
    assert 45 <= int(raw.headers["openai-processing-ms"]) < 1000
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["x-ratelimit-limit-requests"] == "10000"
    assert 0 < int(raw.headers["x-ratelimit-remaining-requests"]) <= 10000


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nonsense", b"", 404),
        ("POST", "/v1//models", b"", 404),
        ("GET", "/v1/chat/completions", b"", 404),
        ("GET", "/", b"", 404),
        ("GET", "/v1/realtime", b"", 404),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"{no json", 400),
        ("POST", "/v1/chat/completions", b'{"model": "\xff"}', 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b'{"messages": []}', 400),
        ("POST", "/v1/responses", b'{"model": "m", "input": "x", "max_output_tokens": 0}', 400),
        ("POST", "/v1/embeddings", b'{"model": "m", "input": "x", "encoding_format": "hex"}', 400),
        ("POST", "/v1/files", b"no form", 400),
        ("POST", "/v1/audio/transcriptions", b"", 400),
    ],
)
async def test_refusals_have_openais_shape(stage: Stage, method: str, path: str, body: bytes, status: int) -> None:
    head, answer = await stage.exchange(method, path, body)
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    error = json.loads(answer)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize("form", ["file", "model"])
async def test_transcription_needs_file_and_model(stage: Stage, form: str) -> None:
    part = f'--b\r\ncontent-disposition: form-data; name="{form}"; filename="x"\r\n\r\nx\r\n--b--\r\n'
    if form == "model":
        part = part.replace('; filename="x"', "")
    body, kind = part.encode(), "multipart/form-data; boundary=b"
    head, answer = await stage.exchange("POST", "/v1/audio/transcriptions", body, content_type=kind)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert ("model" if form == "file" else "file") in json.loads(answer)["error"]["message"]


async def test_too_large_a_body_is_refused(stage: Stage) -> None:
    async with await stage.connect() as stream:
        await stream.send_all(b"POST /v1/files HTTP/1.1\r\nhost: sim\r\ncontent-length: 300000000\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 413 ")


async def test_slots_refuse_what_is_beyond_them() -> None:
    async with staged(replace(FAST, slots=2)) as stage, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(lambda: stage.chat(hang="1"))
        await until(lambda: stage.upstream.running == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            await stage.chat()
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        assert [model.id async for model in stage.client.models.list()]
        assert stage.upstream.peak == 2
        nursery.cancel_scope.cancel()


async def test_who_has_the_answer_finds_it_in_the_books(stage: Stage) -> None:
    async with await stage.connect() as stream:
        for number, (more, end) in enumerate([(b"", b"}"), (b', "stream": true', b"[DONE]\n\n\r\n")] * 10):
            body = b'{"model": "gpt-sim", "messages": []' + more + b"}"
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: sim\r\ncontent-length: %d\r\n\r\n" % len(body)
            await stream.send_all(head + body)
            answer = b""
            while not answer.endswith((end, b"0\r\n\r\n")):
                answer += await stream.receive_some()
            assert stage.upstream.running == 0
            if not more:
                assert stage.upstream.completed == number + 1
            while more and not answer.endswith(b"0\r\n\r\n"):
                answer += await stream.receive_some()


async def test_a_slot_is_free_once_the_answer_has_arrived() -> None:
    async with staged(replace(FAST, slots=1)) as stage:
        for _ in range(20):
            await stage.chat()
            async for _ in await stage.client.responses.create(model="gpt-sim", input="x", stream=True):
                pass
            await stage.client.embeddings.create(model="text-embedding-sim", input="x")
        assert stage.upstream.completed == 60
        assert stage.upstream.peak == 1


async def test_error_rate() -> None:
    async with staged(replace(FAST, error_rate=0.5, seed=1)) as stage:
        failed = 0
        for _ in range(40):
            try:
                await stage.chat()
            except openai.InternalServerError:
                failed += 1
        assert 10 <= failed <= 30


async def test_break_rate() -> None:
    async with staged(replace(FAST, break_rate=0.5, seed=1)) as stage:
        for number in range(40):
            with suppress(openai.APIConnectionError):
                if number % 2:
                    await stage.chat()
                    continue
                stream = await stage.client.chat.completions.create(model="gpt-sim", messages=HELLO, stream=True)
                assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"
        assert 10 <= stage.upstream.broken <= 30
        assert stage.upstream.completed == 40 - stage.upstream.broken


async def test_hang_rate() -> None:
    async with staged(replace(FAST, hang_rate=0.5, seed=1)) as stage, trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(stage.chat)
        await until(lambda: stage.upstream.received == 40)
        await until(lambda: stage.upstream.completed + stage.upstream.running == 40)
        assert 10 <= stage.upstream.running <= 30
        nursery.cancel_scope.cancel()


async def test_troubles_are_apart_from_each_other() -> None:
    async with staged(replace(FAST, error_rate=0.5, break_rate=0.5)) as stage:
        for _ in range(20):
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                await stage.chat()
        assert 1 <= stage.upstream.broken <= 19


async def test_same_seed_same_run() -> None:
    ids = []
    for _ in range(2):
        async with staged(replace(FAST, seed=7)) as stage:
            ids.append([(await stage.chat()).id for _ in range(3)])
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"jitter": 2},
        {"tokens_per_second": 0},
        {"tokens": -1},
        {"slots": -1},
        {"time_to_first_token": -0.1},
        {"break_rate": 2},
        {"hang_rate": -1},
    ],
)
def test_impossible_options(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UpstreamOptions(**wrong)  # type: ignore[arg-type]


def test_more_trouble_than_there_are_generations() -> None:
    with pytest.raises(ValueError, match=r"error_rate, break_rate and hang_rate must not exceed 1 together.*1\.2"):
        UpstreamOptions(error_rate=0.5, break_rate=0.5, hang_rate=0.2)


# --- trouble on demand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 422, 429, 500, 503, 599])
async def test_status_on_demand(stage: Stage, status: int) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await stage.chat(status=str(status))
    assert caught.value.status_code == status
    assert caught.value.type
    assert ("retry-after" in caught.value.response.headers) == (status == 429)
    with pytest.raises(openai.APIStatusError):
        await stage.client.get("/anything", cast_to=object, options={"headers": {"x-sim-status": str(status)}})


async def test_latency_on_demand() -> None:
    async with staged(replace(FAST, time_to_first_token=100)) as stage:
        begin = trio.current_time()
        await stage.chat(latency="0.05")
        assert 0.05 <= trio.current_time() - begin < 2
        with pytest.raises(openai.InternalServerError):
            await stage.chat(latency="0.05", status="500")
        await stage.client.models.list(extra_headers={"x-sim-latency": "0.05"})
        assert trio.current_time() - begin >= 0.15


async def test_tokens_flow_at_their_rate() -> None:
    async with staged(replace(FAST, tokens_per_second=100)) as stage:
        for stream in (False, True):
            begin = trio.current_time()
            answer = await stage.client.chat.completions.create(model="gpt-sim", messages=HELLO, stream=stream)
            times = (
                [trio.current_time() - begin async for _ in answer] if isinstance(answer, openai.AsyncStream) else []
            )
            assert 0.115 <= trio.current_time() - begin < 1
            assert all(later >= 0.01 * index - 0.005 for index, later in enumerate(times[1:13]))


@pytest.mark.parametrize(
    "headers",
    [
        {"status": "200"},
        {"status": "null"},
        {"status": "5OO"},
        {"latency": "-1"},
        {"latency": "nan"},
        {"tokens": "1.5"},
        {"tokens": ""},
        {"break_": "-1"},
        {"hang": "maybe"},
        {"nonsense": "1"},
    ],
)
async def test_unusable_controls(stage: Stage, headers: dict[str, str]) -> None:
    with pytest.raises(openai.BadRequestError, match="x-sim"):
        await stage.chat(**headers)


async def test_repeated_control(stage: Stage) -> None:
    head, _ = await stage.exchange("GET", "/v1/models", x_sim_tokens="1", X_Sim_Tokens="1")
    assert head.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("tokens", [0, 3, 1000])
async def test_broken_stream_looks_broken(stage: Stage, tokens: int) -> None:
    body = json.dumps({"model": "gpt-sim", "messages": [], "stream": True}).encode()
    head, streamed = await stage.exchange("POST", "/v1/chat/completions", body, x_sim_break=str(tokens))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding: chunked" in head.lower()
    assert len(data_lines(streamed.decode())) == 1 + min(tokens, 12)
    assert not streamed.endswith(b"0\r\n\r\n")
    assert b"[DONE]" not in streamed
    assert b'"stop"' not in streamed
    assert stage.upstream.broken == 1


async def test_broken_stream_raises_in_the_sdk(stage: Stage) -> None:
    stream = await stage.client.chat.completions.create(
        model="gpt-sim", messages=HELLO, stream=True, extra_headers={"x-sim-break": "3"}
    )
    with pytest.raises(openai.APIConnectionError):
        _ = [chunk async for chunk in stream]
    events = await stage.client.responses.create(
        model="gpt-sim", input="hi", stream=True, extra_headers={"x-sim-break": "3"}
    )
    with pytest.raises(openai.APIConnectionError):
        _ = [event async for event in events]
    assert stage.upstream.broken == 2


@pytest.mark.parametrize("amount", [0, 1])
@pytest.mark.parametrize("target", ["POST /v1/chat/completions", "GET /v1/models", "GET /v1/nonsense"])
async def test_broken_whole_answer_looks_broken(stage: Stage, target: str, amount: int) -> None:
    method, path = target.split()
    head, body = await stage.exchange(
        method, path, b'{"model": "gpt-sim", "messages": []}' if method == "POST" else b"", x_sim_break=str(amount)
    )
    promised = next(int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:"))
    assert len(body) == (promised // 2 if amount else 0) < promised
    assert stage.upstream.broken == 1


async def test_broken_whole_answer_raises_in_the_sdk(stage: Stage) -> None:
    with pytest.raises(openai.APIConnectionError):
        await stage.chat(break_="1")


async def test_hang_holds_its_slot_until_the_client_leaves(stage: Stage) -> None:
    with trio.move_on_after(0.1) as scope:
        await stage.chat(hang="1")
    assert scope.cancelled_caught
    await until(lambda: stage.upstream.aborted == 1)
    assert stage.upstream.running == 0
    assert stage.upstream.peak == 1
    assert stage.upstream.completed == 0


# --- WebSockets -------------------------------------------------------------------------------------------------------


async def test_a_websocket_sends_everything_back(stage: Stage) -> None:
    url = stage.base_url.replace("http", "ws") + "/realtime?model=gpt-sim"
    async with trio_websocket.open_websocket_url(url) as socket:
        for message in ("text", b"bytes\x00", "{}"):
            await socket.send_message(message)
            assert await socket.get_message() == message


@pytest.mark.parametrize("path", ["/v1/nonsense", "/v1/models"])
async def test_elsewhere_there_is_no_websocket(stage: Stage, path: str) -> None:
    handshake = {"connection": "upgrade, close", "upgrade": "websocket", "sec-websocket-version": "13"}
    key = {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    head, body = await stage.exchange("GET", path, b"", **handshake, **key)
    assert head.startswith(b"HTTP/1.1 404 ")
    assert json.loads(body)["error"] == {
        "message": f"Invalid URL (GET {path})",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


# --- the books --------------------------------------------------------------------------------------------------------


async def test_client_leaves_while_it_waits_for_a_whole_answer() -> None:
    async with staged(replace(FAST, time_to_first_token=100)) as stage:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.chat)
            await until(lambda: stage.upstream.running == 1)
            nursery.cancel_scope.cancel()
        await until(lambda: stage.upstream.running == 0)
        assert (stage.upstream.received, stage.upstream.aborted, stage.upstream.completed) == (1, 1, 0)
        assert stage.upstream.log[0].outcome == "aborted"
        assert stage.upstream.log[0].status is None


async def test_client_leaves_in_the_middle_of_a_stream() -> None:
    async with staged(replace(FAST, tokens_per_second=100, tokens=1000)) as stage:
        stream = await stage.client.chat.completions.create(model="gpt-sim", messages=HELLO, stream=True)
        for _ in range(3):
            await anext(stream)
        assert stage.upstream.running == 1
        await stream.close()
        await until(lambda: stage.upstream.running == 0)
        assert (stage.upstream.received, stage.upstream.aborted, stage.upstream.completed) == (1, 1, 0)
        assert stage.upstream.log[0].status == 200


async def test_client_leaves_in_the_middle_of_its_upload(stage: Stage) -> None:
    async with await stage.connect() as stream:
        await stream.send_all(b"POST /v1/embeddings HTTP/1.1\r\nhost: sim\r\ncontent-length: 100\r\n\r\n{")
        await until(lambda: stage.upstream.received == 1)
        assert stage.upstream.running == 0
    await until(lambda: stage.upstream.aborted == 1)
    assert stage.upstream.peak == 0


async def test_books_balance_after_a_storm_of_departures() -> None:
    async with staged(replace(FAST, tokens_per_second=200, tokens=40, slots=30)) as stage:
        upstream = stage.upstream

        async def visit(number: int) -> None:
            body = json.dumps({"model": "gpt-sim", "messages": [], "stream": number % 2 == 0}).encode()
            async with trio.open_nursery() as visiting:
                visiting.start_soon(stage.exchange, "POST", "/v1/chat/completions", body)
                await until(lambda: upstream.received >= number)
                if number % 3:
                    visiting.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(visit, number)
        await until(lambda: upstream.received == upstream.completed + upstream.aborted)
        assert upstream.running == 0
        assert upstream.aborted > 0
        assert upstream.peak <= 30


async def test_log_tells_what_arrived(stage: Stage) -> None:
    body = b'{"model": "m-1", "input": "x"}'
    await stage.exchange("POST", "/v1/embeddings?a=%2F", body, X_Custom="Yes")
    record = stage.upstream.log[0]
    assert (record.method, record.target, record.model, record.status) == ("POST", "/v1/embeddings?a=%2F", "m-1", 200)
    assert record.body_size == len(body)
    assert ("x-custom", "Yes") in record.headers
    assert record.outcome == "completed"
    assert repr(stage.upstream) == ("<SimulatedUpstream running=0 peak=1 received=1 completed=1 aborted=0 broken=0>")


# --- serving ----------------------------------------------------------------------------------------------------------


async def test_connections_are_reused_and_closed_when_asked(stage: Stage) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nhost: sim\r\n"
    async with await stage.connect() as stream:
        for _ in range(3):
            await stream.send_all(request + b"\r\n")
            answer = b""
            while not answer.endswith(b'"has_more":false}'):
                answer += await stream.receive_some()
            assert answer.startswith(b"HTTP/1.1 200 ")
        await stream.send_all(request + b"connection: close\r\n\r\n")
        rest = b"".join([piece async for piece in stream])
    assert rest.startswith(b"HTTP/1.1 200 ")


async def test_cancelling_the_server_ends_what_is_under_way() -> None:
    upstream = create_upstream()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            stage = Stage(upstream, await nursery.start(serve_upstream, upstream, "127.0.0.1:0"))
            assert stage.base_url.endswith("/v1")
            nursery.start_soon(lambda: stage.exchange("GET", "/v1/models", x_sim_hang="1"))
            await until(lambda: upstream.received == 1)
            nursery.cancel_scope.cancel()
    await stage.client.close()
    assert upstream.aborted == 1
