"""The simulated upstream's endpoints: what Quart calls for each request, from its controls to its answer.

Here are the waiting, the chance and the refusing. OpenAI's JSON is in `upstream_shapes`, the counting in
`upstream_traffic`. This module must not know how it is served, nor that proxies exist.
"""

import io
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from itertools import chain
from typing import NamedTuple, TypeVar

import msgspec
import trio
from msgspec import UNSET
from quart import has_request_context, request, websocket
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioResponse
from werkzeug.exceptions import HTTPException
from werkzeug.routing import WebsocketMismatch

from trioproxy.demo import upstream_shapes as shapes
from trioproxy.demo.upstream_options import UpstreamOptions, read_controls
from trioproxy.demo.upstream_shapes import Answer, Json, StreamShape
from trioproxy.demo.upstream_traffic import BrokenOffError, Exchange, Traffic, TrafficMiddleware, current_exchange

MAX_BODY_SIZE = 256 * 1024 * 1024
"""Bytes; a larger request is answered 413."""

MAX_FILES = 1000
"""Uploads that are remembered; the oldest are forgotten first."""

_RATE_LIMIT_REQUESTS = 10_000

_EVENT_STREAM = "text/event-stream; charset=utf-8"

_ERROR_MESSAGES: Mapping[int, str] = {
    401: "Incorrect API key provided.",
    429: "Rate limit reached. Please try again in 1s.",
    500: "The server had an error while processing your request. Sorry about that!",
    503: "The engine is currently overloaded, please try again later.",
}
_ERROR_KINDS: Mapping[int, str] = {429: "requests"}
_ERROR_CODES: Mapping[int, str] = {401: "invalid_api_key", 429: "rate_limit_exceeded"}

Handler = Callable[..., Awaitable[TrioResponse]]
RequestBody = TypeVar("RequestBody")


class Route(NamedTuple):
    """One line of the table of endpoints; `generates` tells whether it takes a slot."""

    method: str
    path: str
    handler: Handler
    generates: bool


class Upload(NamedTuple):
    """What a multipart form holds; `size` is its file's, in bytes."""

    size: int
    filename: str
    fields: Mapping[str, str]


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str | None = None, *, code: str | None = None) -> None:
        self.status = status
        self.message = message or _ERROR_MESSAGES.get(status, "The simulated upstream was told to fail.")
        self.code = code or _ERROR_CODES.get(status)
        super().__init__(self.message)

    def response(self) -> TrioResponse:
        """The error as a response; 429 says when to come back."""
        kind = _ERROR_KINDS.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        response = _json(shapes.error(self.message, kind=kind, code=self.code), status=self.status)
        if self.status == 429:
            response.headers["retry-after"] = "1"
        return response


class Endpoints:
    """All of them, with the state that they share: options, books, chance, uploaded files."""

    def __init__(self, options: UpstreamOptions, traffic: Traffic) -> None:
        self._options = options
        self._traffic = traffic
        self._random = random.Random(options.seed)
        self._files: dict[str, Json] = {}
        self._generating: frozenset[str] = frozenset()

    def routes(self) -> tuple[Route, ...]:
        """Everything that is answered with anything but 404."""
        return (
            Route("POST", "/v1/chat/completions", self.chat_completions, generates=True),
            Route("POST", "/v1/completions", self.completions, generates=True),
            Route("POST", "/v1/responses", self.responses, generates=True),
            Route("POST", "/v1/embeddings", self.embeddings, generates=True),
            Route("POST", "/v1/moderations", self.moderations, generates=True),
            Route("POST", "/v1/audio/transcriptions", self.transcriptions, generates=True),
            Route("POST", "/v1/responses/<response_id>/cancel", self.cancel_response, generates=False),
            Route("GET", "/v1/models", self.list_models, generates=False),
            Route("GET", "/v1/models/<path:model>", self.show_model, generates=False),
            Route("POST", "/v1/files", self.upload_file, generates=False),
            Route("GET", "/v1/files", self.list_files, generates=False),
            Route("DELETE", "/v1/files/<file_id>", self.delete_file, generates=False),
        )

    def register(self, app: QuartTrio) -> None:
        """Makes `app` answer with these endpoints."""
        for method, path, handler, _ in self.routes():
            app.add_url_rule(path, f"{method} {path}", handler, methods=[method])
        app.add_websocket("/v1/realtime", "WEBSOCKET /v1/realtime", self.echo)
        self._generating = frozenset(f"{route.method} {route.path}" for route in self.routes() if route.generates)
        app.before_request(self._obey_controls)
        app.after_request(self._finish)
        app.register_error_handler(ApiError, _answer_api_error)
        app.register_error_handler(HTTPException, _answer_http_exception)

    async def chat_completions(self) -> TrioResponse:
        """`POST /v1/chat/completions`."""
        body = await _read_json(shapes.ChatRequest)
        answer = self._answer(body.model, len(bytes(body.messages)), body.max_completion_tokens or body.max_tokens)
        if body.stream:
            include_usage = _include_usage(body.stream_options)
            return await self._stream(answer, shapes.ChatStream(answer, include_usage=include_usage))
        return await self._whole(answer, shapes.chat_completion(answer))

    async def completions(self) -> TrioResponse:
        """`POST /v1/completions`."""
        body = await _read_json(shapes.CompletionRequest)
        answer = self._answer(body.model, len(bytes(body.prompt)), body.max_tokens)
        if body.stream:
            include_usage = _include_usage(body.stream_options)
            return await self._stream(answer, shapes.CompletionStream(answer, include_usage=include_usage))
        return await self._whole(answer, shapes.completion(answer))

    async def responses(self) -> TrioResponse:
        """`POST /v1/responses`."""
        body = await _read_json(shapes.ResponseRequest)
        answer = self._answer(body.model, len(bytes(body.input)), body.max_output_tokens)
        if body.stream:
            return await self._stream(answer, shapes.ResponseStream(answer))
        return await self._whole(answer, shapes.response(answer))

    async def embeddings(self) -> TrioResponse:
        """`POST /v1/embeddings`."""
        body = await _read_json(shapes.EmbeddingRequest)
        current_exchange.get().model = body.model
        await self._wait_for_first_token()
        return _json(shapes.embeddings(body))

    async def moderations(self) -> TrioResponse:
        """`POST /v1/moderations`."""
        body = await _read_json(shapes.ModerationRequest)
        current_exchange.get().model = body.model
        await self._wait_for_first_token()
        return _json(shapes.moderation(body, self._serial()))

    async def transcriptions(self) -> TrioResponse:
        """`POST /v1/audio/transcriptions`."""
        upload = await _read_upload()
        model = upload.fields.get("model")
        if model is None:
            raise ApiError(400, "you must provide a model parameter")
        answer = self._answer(model, upload.size, None)
        if upload.fields.get("response_format") == "text":
            await self._wait_for_answer(answer)
            return TrioResponse(answer.text + "\n", content_type="text/plain; charset=utf-8")
        return await self._whole(answer, shapes.transcription(answer))

    async def cancel_response(self, response_id: str) -> TrioResponse:
        """`POST /v1/responses/ID/cancel`: nothing is kept, so any id will do."""
        answer = self._answer(self._options.models[0] if self._options.models else "gpt-sim", 0, None)
        return _json(shapes.cancelled_response(answer) | {"id": response_id})

    async def list_models(self) -> TrioResponse:
        """`GET /v1/models`."""
        return _json(shapes.listing([shapes.model(name) for name in self._options.models]))

    async def show_model(self, model: str) -> TrioResponse:
        """`GET /v1/models/NAME`."""
        if model not in self._options.models:
            raise ApiError(404, f"The model '{model}' does not exist", code="model_not_found")
        return _json(shapes.model(model))

    async def upload_file(self) -> TrioResponse:
        """`POST /v1/files`: remembers what describes the file, not its content."""
        upload = await _read_upload()
        file = shapes.file(
            self._serial(),
            size=upload.size,
            created=int(time.time()),
            filename=upload.filename,
            purpose=upload.fields.get("purpose", "user_data"),
        )
        self._files[str(file["id"])] = file
        if len(self._files) > MAX_FILES:
            del self._files[next(iter(self._files))]
        return _json(file)

    async def list_files(self) -> TrioResponse:
        """`GET /v1/files`, newest first."""
        return _json(shapes.listing(list(reversed(self._files.values()))))

    async def delete_file(self, file_id: str) -> TrioResponse:
        """`DELETE /v1/files/ID`."""
        if self._files.pop(file_id, None) is None:
            raise ApiError(404, f"No such File object: {file_id}")
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def echo(self) -> None:
        """A WebSocket at `/v1/realtime`: every message comes back as it is."""
        while True:
            await websocket.send(await websocket.receive())

    async def _obey_controls(self) -> None:
        """Before every endpoint, unknown ones too: does what does not depend on the answer."""
        exchange = current_exchange.get()
        try:
            exchange.controls = read_controls(exchange.headers)
        except ValueError as unusable:
            raise ApiError(400, f"Unusable x-sim header: {unusable}") from unusable
        # As a real upstream does, take the whole request before anything else: no slot for a slow sender.
        await request.get_data()
        generates = request.endpoint in self._generating
        if generates:
            self._take_slot()
        controls = exchange.controls
        if controls.hang:
            await trio.sleep_forever()
        if controls.latency is not UNSET and (controls.status is not UNSET or not generates):
            await trio.sleep(controls.latency)
        if controls.status is not UNSET:
            raise ApiError(controls.status)
        if generates:
            await self._try_luck(exchange)

    async def _try_luck(self, exchange: Exchange) -> None:
        """Lets a generation fail, hang or break off as often as the options say."""
        luck = self._random.random()
        if luck < (bound := self._options.error_rate):
            raise ApiError(500)
        if luck < (bound := bound + self._options.hang_rate):
            await trio.sleep_forever()
        if luck < bound + self._options.break_rate and exchange.controls.break_ is UNSET:
            exchange.controls = msgspec.structs.replace(exchange.controls, break_=max(self._options.tokens // 2, 1))

    def _take_slot(self) -> None:
        slots = self._options.slots
        if slots is not None and self._traffic.running >= slots:
            raise ApiError(429)
        self._traffic.start_generation(current_exchange.get())

    async def _finish(self, response: TrioResponse) -> TrioResponse:
        """After every endpoint: adds OpenAI's headers, breaks a whole answer off if that was asked for."""
        exchange = current_exchange.get()
        elapsed = trio.current_time() - exchange.arrived
        limit = _RATE_LIMIT_REQUESTS if self._options.slots is None else self._options.slots
        response.headers["x-request-id"] = f"req_{self._serial()}"
        response.headers["openai-processing-ms"] = str(round(elapsed * 1000))
        response.headers["openai-version"] = "2020-10-01"
        response.headers["x-ratelimit-limit-requests"] = str(limit)
        response.headers["x-ratelimit-remaining-requests"] = str(max(0, limit - self._traffic.running))
        if response.content_type == _EVENT_STREAM:
            return response
        if exchange.controls.break_ is UNSET:
            return response
        body = await response.get_data(as_text=False)
        part = body[: len(body) // 2] if exchange.controls.break_ else b""
        return TrioResponse(_broken_body(part), status=response.status_code, headers=response.headers)

    def _answer(self, model: str, prompt_size: int, limit: int | None) -> Answer:
        exchange = current_exchange.get()
        exchange.model = model
        wanted = exchange.controls.tokens
        length = self._options.tokens if wanted is UNSET else wanted
        return Answer(
            serial=self._serial(),
            created=int(time.time()),
            model=model,
            prompt_tokens=shapes.token_count(prompt_size),
            tokens=shapes.say(length if limit is None else min(length, limit)),
            cut_short=limit is not None and limit < length,
        )

    async def _whole(self, answer: Answer, body: Json) -> TrioResponse:
        await self._wait_for_answer(answer)
        return _json(body)

    async def _stream(self, answer: Answer, shape: StreamShape) -> TrioResponse:
        # The headers wait for the first token too, as those of a real model do.
        await self._wait_for_first_token()
        return TrioResponse(self._events(answer, shape, current_exchange.get()), content_type=_EVENT_STREAM)

    async def _events(self, answer: Answer, shape: StreamShape, exchange: Exchange) -> AsyncGenerator[bytes, None]:
        yield shape.opening()
        token_seconds = self._token_seconds()
        due = trio.current_time()
        for index, token in enumerate(answer.tokens):
            if index == exchange.controls.break_:
                break
            yield shape.token(token)
            # By the clock, not by pauses: a slow reader does not slow the model down, and errors do not add up.
            due += token_seconds
            await trio.sleep_until(due)
        if exchange.controls.break_ is not UNSET:
            raise BrokenOffError
        self._traffic.end_generation(exchange)
        yield shape.closing()

    async def _wait_for_answer(self, answer: Answer) -> None:
        await self._wait_for_first_token()
        await trio.sleep(len(answer.tokens) * self._token_seconds())

    async def _wait_for_first_token(self) -> None:
        wanted = current_exchange.get().controls.latency
        await trio.sleep(self._options.time_to_first_token * self._spread() if wanted is UNSET else wanted)

    def _token_seconds(self) -> float:
        return self._spread() / self._options.tokens_per_second

    def _spread(self) -> float:
        return 1 + self._options.jitter * self._random.uniform(-1, 1)

    def _serial(self) -> str:
        return f"{self._random.getrandbits(128):032x}"


def build_app(options: UpstreamOptions, traffic: Traffic) -> QuartTrio:
    """An application that answers like OpenAI's API and keeps `traffic`."""
    app = QuartTrio(__name__, static_folder=None)
    app.config.update(BODY_TIMEOUT=None, RESPONSE_TIMEOUT=None, MAX_CONTENT_LENGTH=MAX_BODY_SIZE)
    app.url_map.merge_slashes = False
    Endpoints(options, traffic).register(app)
    app.asgi_app = TrafficMiddleware(app.asgi_app, traffic)  # type: ignore[method-assign] # Quart's documented way
    return app


async def _broken_body(part: bytes) -> AsyncGenerator[bytes, None]:
    yield part
    raise BrokenOffError


async def _read_json(kind: type[RequestBody]) -> RequestBody:
    body = await request.get_data()
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as unfit:
        raise ApiError(400, str(unfit)) from unfit
    except (msgspec.DecodeError, UnicodeDecodeError) as broken:
        raise ApiError(400, f"We could not parse the JSON body of your request. ({broken})") from broken


async def _read_upload() -> Upload:
    files = await request.files
    try:
        fields = (await request.form).to_dict()
        file = files.get("file")
        if file is None:
            raise ApiError(400, "Missing required parameter: 'file'.")
        return Upload(size=file.stream.seek(0, io.SEEK_END), filename=file.filename or "upload", fields=fields)
    finally:
        for each in chain.from_iterable(files.listvalues()):
            each.close()


def _include_usage(options: shapes.StreamOptions | None) -> bool:
    return options is not None and bool(options.include_usage)


def _json(body: Json, status: int = 200) -> TrioResponse:
    return TrioResponse(msgspec.json.encode(body), status=status, content_type="application/json")


async def _answer_api_error(error: ApiError) -> TrioResponse:
    return error.response()


async def _answer_http_exception(error: HTTPException) -> TrioResponse:
    if error.code in (404, 405) or isinstance(error, WebsocketMismatch):
        asked = request if has_request_context() else websocket
        return ApiError(404, f"Invalid URL ({asked.method} {asked.path})").response()
    return ApiError(error.code or 500, error.description).response()
