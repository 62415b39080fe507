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
"""The methods that the user's own routes can schedule; the built-in ones schedule `POST` alone."""


class RouteTable:
    """Says of a method and a path whether the request needs a slot. The user's routes go before the built-in ones."""

    def __init__(self, routes: Mapping[str, Treatment]) -> None:
        self._own = _Patterns(routes)
        self._built_in = _Patterns(dict.fromkeys(SCHEDULED, "schedule"))

    def is_scheduled(self, method: str, rest: bytes) -> bool:
        """Whether a request needs a slot. `rest` is the raw path behind `/v1`, without the query.

        Matched as the most lenient server would read it: percent-decoded, without empty segments, in any letter case,
        with either slash.
        """
        method = method.upper()  # as many servers read it
        if method not in METHODS:
            return False
        segments = _segments(rest)
        treatment = self._own.find(segments)
        if treatment is None and method == "POST":
            treatment = self._built_in.find(segments)
        return treatment == "schedule"


def _segments(path: bytes | str) -> tuple[str, ...]:
    decoded = unquote_to_bytes(path).decode("utf-8", "replace").replace("\\", "/").lower()
    return tuple(segment for segment in decoded.split("/") if segment)


class _Patterns:
    """Patterns of paths; one without `*` goes before those with it, and those go in their own order."""

    def __init__(self, routes: Mapping[str, Treatment]) -> None:
        patterns = {_segments(pattern): treatment for pattern, treatment in routes.items()}
        self._exact = {segments: treatment for segments, treatment in patterns.items() if "*" not in segments}
        self._starred = {segments: treatment for segments, treatment in patterns.items() if "*" in segments}

    def find(self, segments: tuple[str, ...]) -> Treatment | None:
        if (treatment := self._exact.get(segments)) is not None:
            return treatment
        for pattern, treatment in self._starred.items():
            if len(pattern) == len(segments) and all(
                wanted in ("*", segment) for wanted, segment in zip(pattern, segments, strict=True)
            ):
                return treatment
        return None
