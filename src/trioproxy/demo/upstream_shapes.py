"""OpenAI's JSON as the simulated upstream reads and writes it.

Requests are decoded into the structs below, which know only the fields that change an answer. Answers are built here
from an `Answer` as plain dictionaries that look like OpenAI's reference. Everything is pure: this module must not know
HTTP, clocks or randomness of its own.
"""

import base64
import math
import random
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta, Raw

Json = dict[str, object]
Positive = Annotated[int, Meta(ge=1)]

DONE = b"data: [DONE]\n\n"

_TEXT = """\
The quick simulated model answers every question with the same calm words, one after the other, so that whoever reads \
them can tell at a glance that nothing was lost, and nothing put in, on the way.
"""
_TOKENS = tuple(re.findall(r" ?\w+|[^\w ]", _TEXT))

_MODERATION_CATEGORIES: dict[str, tuple[str, ...]] = {
    "harassment": ("text",),
    "harassment/threatening": ("text",),
    "hate": ("text",),
    "hate/threatening": ("text",),
    "illicit": ("text",),
    "illicit/violent": ("text",),
    "self-harm": ("text", "image"),
    "self-harm/instructions": ("text", "image"),
    "self-harm/intent": ("text", "image"),
    "sexual": ("text", "image"),
    "sexual/minors": ("text",),
    "violence": ("text", "image"),
    "violence/graphic": ("text", "image"),
}


class StreamOptions(msgspec.Struct):
    """`stream_options` of the two older APIs."""

    include_usage: bool | None = None


class ChatRequest(msgspec.Struct):
    """Body of `POST /v1/chat/completions`."""

    model: str
    messages: Raw
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None


class CompletionRequest(msgspec.Struct):
    """Body of `POST /v1/completions`."""

    model: str
    prompt: Raw
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None


class ResponseRequest(msgspec.Struct):
    """Body of `POST /v1/responses`."""

    model: str
    input: Raw
    stream: bool | None = None
    max_output_tokens: Positive | None = None


class EmbeddingRequest(msgspec.Struct):
    """Body of `POST /v1/embeddings`; the input is one text, some texts, one list of tokens, or some of those."""

    model: str
    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=8192)] = 1536


class ModerationRequest(msgspec.Struct):
    """Body of `POST /v1/moderations`; the input is one text, some texts, or the parts of one message."""

    input: str | list[str | Json]
    model: str = "omni-moderation-latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a simulated model says to one request, whatever API asked."""

    serial: str
    """Hexadecimal digits that make its ids unique."""
    created: int
    """Unix time, in seconds."""
    model: str
    prompt_tokens: int
    tokens: Sequence[str]
    cut_short: bool
    """Whether the request's own limit made it shorter."""

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)

    @property
    def finish_reason(self) -> str:
        """As the two older APIs say it."""
        return "length" if self.cut_short else "stop"


class StreamShape(Protocol):
    """How one API streams an `Answer`: each method gives finished server-sent events, called in this order."""

    def opening(self) -> bytes:
        """What comes before the first token."""

    def token(self, text: str) -> bytes:
        """One token."""

    def closing(self) -> bytes:
        """What comes after the last token, the end marker included."""


def say(count: int) -> list[str]:
    """`count` tokens, the same ones every time."""
    return list(islice(cycle(_TOKENS), count))


def token_count(size: int) -> int:
    """Tokens in `size` bytes of text, by OpenAI's rule of thumb: four characters a token."""
    return max(1, math.ceil(size / 4))


def error(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> Json:
    """An error as every OpenAI API answers it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model(name: str) -> Json:
    """One model of `GET /v1/models`."""
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "simulation"}


def listing(items: Sequence[Json]) -> Json:
    """A list that has one page."""
    return {"object": "list", "data": items, "has_more": False}


def chat_completion(answer: Answer) -> Json:
    """A whole `chat.completion`."""
    message: Json = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
    choice: Json = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    return _completion(answer, "chatcmpl-", "chat.completion", [choice]) | {"usage": _usage(answer)}


def completion(answer: Answer) -> Json:
    """A whole `text_completion`."""
    choice: Json = {"text": answer.text, "index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
    return _completion(answer, "cmpl-", "text_completion", [choice]) | {"usage": _usage(answer)}


def response(answer: Answer) -> Json:
    """A whole `response`."""
    return _response(answer, status="incomplete" if answer.cut_short else "completed")


def cancelled_response(answer: Answer) -> Json:
    """A `response` that was cancelled."""
    return _response(answer, status="cancelled")


def embeddings(request: EmbeddingRequest) -> Json:
    """A list of embeddings, one for each input."""
    vectors = [_embedding(item, request.dimensions) for item in _embedding_inputs(request.input)]
    data: list[Json] = []
    for index, vector in enumerate(vectors):
        value = vector if request.encoding_format == "float" else _base64(vector)
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = token_count(len(msgspec.json.encode(request.input)))
    usage: Json = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def moderation(request: ModerationRequest, serial: str) -> Json:
    """A moderation result, never flagged, for each text."""
    result: Json = {
        "flagged": False,
        "categories": dict.fromkeys(_MODERATION_CATEGORIES, False),
        "category_scores": dict.fromkeys(_MODERATION_CATEGORIES, 0.0001),
        "category_applied_input_types": _MODERATION_CATEGORIES,
    }
    several = isinstance(request.input, list) and all(isinstance(item, str) for item in request.input)
    return {
        "id": f"modr-{serial}",
        "model": request.model,
        "results": [result] * (len(request.input) if several else 1),
    }


def transcription(answer: Answer) -> Json:
    """A transcript."""
    usage: Json = {
        "type": "tokens",
        "input_tokens": answer.prompt_tokens,
        "input_token_details": {"text_tokens": 0, "audio_tokens": answer.prompt_tokens},
        "output_tokens": len(answer.tokens),
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
    }
    return {"text": answer.text, "usage": usage}


def file(serial: str, *, size: int, created: int, filename: str, purpose: str) -> Json:
    """An uploaded file of `size` bytes."""
    return {
        "id": f"file-{serial}",
        "object": "file",
        "bytes": size,
        "created_at": created,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }


class ChatStream:
    """Streams a `chat.completion`."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage

    def opening(self) -> bytes:
        """The chunk that tells the role."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def token(self, text: str) -> bytes:
        """A chunk of content."""
        return self._chunk({"content": text})

    def closing(self) -> bytes:
        """The chunk that tells why it ends, and the usage if it was asked for."""
        end = self._chunk({}, finish_reason=self._answer.finish_reason)
        return end + _closing_usage(self._base([]), self._answer, wanted=self._include_usage)

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> bytes:
        chunk = self._base([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])
        return _event(chunk | {"usage": None} if self._include_usage else chunk)

    def _base(self, choices: list[Json]) -> Json:
        return _completion(self._answer, "chatcmpl-", "chat.completion.chunk", choices)


class CompletionStream:
    """Streams a `text_completion`."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage

    def opening(self) -> bytes:
        """Nothing: this API starts with the first token."""
        return b""

    def token(self, text: str) -> bytes:
        """A chunk of text."""
        return self._chunk(text)

    def closing(self) -> bytes:
        """The chunk that tells why it ends, and the usage if it was asked for."""
        end = self._chunk("", finish_reason=self._answer.finish_reason)
        return end + _closing_usage(self._base([]), self._answer, wanted=self._include_usage)

    def _chunk(self, text: str, finish_reason: str | None = None) -> bytes:
        chunk = self._base([{"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}])
        return _event(chunk | {"usage": None} if self._include_usage else chunk)

    def _base(self, choices: list[Json]) -> Json:
        return _completion(self._answer, "cmpl-", "text_completion", choices)


class ResponseStream:
    """Streams a `response` as typed, numbered events."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._place: Json = {"item_id": f"msg_{answer.serial}", "output_index": 0, "content_index": 0}
        self._sequence_number = 0

    def opening(self) -> bytes:
        """The response and its one message, both still empty."""
        started = _response(self._answer, status="in_progress")
        item = _message(self._answer, status="in_progress")
        return b"".join(
            (
                self._event("response.created", {"response": started}),
                self._event("response.in_progress", {"response": started}),
                self._event("response.output_item.added", {"output_index": 0, "item": item}),
                self._event("response.content_part.added", self._place | {"part": _output_text("")}),
            )
        )

    def token(self, text: str) -> bytes:
        """A piece of the message's text."""
        return self._event("response.output_text.delta", self._place | {"delta": text, "logprobs": []})

    def closing(self) -> bytes:
        """The text, the message and the response again, each whole; this API has no `[DONE]`."""
        text = self._answer.text
        whole = response(self._answer)
        status = str(whole["status"])
        item = _message(self._answer, status=status)
        return b"".join(
            (
                self._event("response.output_text.done", self._place | {"text": text, "logprobs": []}),
                self._event("response.content_part.done", self._place | {"part": _output_text(text)}),
                self._event("response.output_item.done", {"output_index": 0, "item": item}),
                self._event(f"response.{status}", {"response": whole}),
            )
        )

    def _event(self, name: str, fields: Json) -> bytes:
        event = {"type": name, "sequence_number": self._sequence_number} | fields
        self._sequence_number += 1
        return b"event: " + name.encode() + b"\n" + _event(event)


def _event(data: Json) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _closing_usage(base: Json, answer: Answer, *, wanted: bool) -> bytes:
    return (_event(base | {"usage": _usage(answer)}) if wanted else b"") + DONE


def _completion(answer: Answer, prefix: str, kind: str, choices: list[Json]) -> Json:
    return {
        "id": prefix + answer.serial,
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "system_fingerprint": "fp_simulation",
    }


def _usage(answer: Answer) -> Json:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _response(answer: Answer, *, status: str) -> Json:
    ended = status in ("completed", "incomplete")
    return {
        "id": f"resp_{answer.serial}",
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "model": answer.model,
        "output": [_message(answer, status=status)] if ended else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": _response_usage(answer) if ended else None,
    }


def _message(answer: Answer, *, status: str) -> Json:
    content = [] if status == "in_progress" else [_output_text(answer.text)]
    return {
        "id": f"msg_{answer.serial}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response_usage(answer: Answer) -> Json:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": len(answer.tokens),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
    }


def _embedding_inputs(given: str | list[str | int | list[int]]) -> list[object]:
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


def _embedding(item: object, dimensions: int) -> list[float]:
    """A vector of length 1 that depends on nothing but `item`."""
    generator = random.Random(msgspec.json.encode(item))
    vector = [byte - 127.5 for byte in generator.randbytes(dimensions)]
    length = math.hypot(*vector)
    return [value / length for value in vector]


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
