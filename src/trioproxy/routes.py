"""Which requests under `/v1/` need a slot: one table, and the user's additions to it.

Everything else is passed through: every `GET`, `HEAD` and `DELETE` (never behind what they cancel), `POST` to
`.../cancel`, jobs that the upstream queues itself (videos, batches, fine-tuning), files, unknown paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal
from urllib.parse import unquote_to_bytes

Treatment = Literal["schedule", "pass"]

SCHEDULED: Final = (
    # OpenAI
    "audio/speech",
    "audio/transcriptions",
    "audio/translations",
    "chat/completions",
    "completions",
    "content_provenance_checks",
    "decisions",
    "embeddings",
    "fine_tuning/alpha/graders/run",
    "images/edits",
    "images/generations",
    "images/variations",
    "moderations",
    "responses",
    "responses/compact",
    "threads/runs",
    "threads/*/runs",
    "threads/*/runs/*/submit_tool_outputs",
    "vector_stores/*/search",
    # vLLM, llama.cpp, Infinity, TEI and the like
    "classify",
    "messages",
    "pooling",
    "rerank",
    "score",
)
"""Paths under `/v1/` whose `POST` occupies the model while it is answered. `*` stands for one segment."""

METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
"""The methods that can be scheduled at all."""


class RouteTable:
    """Says of a method and a path whether the request needs a slot. The user's routes go before the built-in ones."""

    def __init__(self, routes: Mapping[str, Treatment]) -> None:
        table: dict[str, Treatment] = dict.fromkeys(SCHEDULED, "schedule")
        table.update(routes)
        self._exact = {pattern: treatment for pattern, treatment in table.items() if "*" not in pattern}
        own = [pattern for pattern in table if pattern in routes]
        builtin = [pattern for pattern in table if pattern not in routes]
        self._patterns = [(pattern.split("/"), table[pattern]) for pattern in own + builtin if "*" in pattern]

    def is_scheduled(self, method: str, rest: bytes) -> bool:
        """Whether a request needs a slot. `rest` is the raw path behind `/v1/`, without the query.

        Matched as a server would read it: percent-decoded, without empty segments.
        """
        if method not in METHODS:
            return False
        text = unquote_to_bytes(rest).decode("utf-8", "replace")
        if (treatment := self._exact.get(text)) is not None:
            return treatment == "schedule"
        segments = [segment for segment in text.split("/") if segment]
        if (treatment := self._exact.get("/".join(segments))) is not None:
            return treatment == "schedule"
        for pattern, treatment in self._patterns:
            if len(pattern) == len(segments) and all(
                wanted in ("*", segment) for wanted, segment in zip(pattern, segments, strict=True)
            ):
                return treatment == "schedule"
        return False
