"""Upstreams that have what the documentation depends on in real ones: their paths, and whose key they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio
from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, Scope

from trioproxy.demo.upstream import UpstreamOptions, create_upstream, serve_upstream

KEY: Final = "sk-stand-in"


@dataclass(frozen=True)
class Kind:
    """An upstream's habits."""

    prefix: str = "/v1"
    """Where its API is."""
    credentials: str = ""
    """What the header has to be; empty: it does not ask."""
    header: str = "authorization"


OPENAI: Final = Kind(credentials=f"Bearer {KEY}")
AZURE: Final = Kind("/openai/v1", f"Bearer {KEY}")
AZURE_DEPLOYMENT: Final = Kind("/openai/deployments/my-deployment", KEY, "api-key")
OPEN: Final = Kind()

STAND_INS: Final[dict[str, dict[str, Kind]]] = {
    "docs/how-to/openai.md": {"https://api.openai.com/v1": OPENAI},
    "docs/how-to/priorities.md": {"https://api.openai.com/v1": OPENAI},
    "docs/how-to/azure.md": {
        "https://RESOURCE.openai.azure.com/openai/v1": AZURE,
        "https://RESOURCE.openai.azure.com/openai": AZURE_DEPLOYMENT,
    },
    "docs/how-to/vllm.md": {"http://127.0.0.1:8000/v1": Kind(credentials="Bearer token-abc123")},
    "docs/how-to/llama-cpp.md": {"http://127.0.0.1:8081/v1": OPEN},
    "docs/how-to/ollama.md": {"http://127.0.0.1:11434/v1": OPEN},
    "docs/how-to/langchain.md": {"https://api.openai.com/v1": OPENAI},
    "docs/how-to/litellm.md": {"https://api.openai.com/v1": OPENAI},
}
"""By page and by the upstream's URL in it."""

VARIABLES: Final = {"OPENAI_API_KEY": KEY, "AZURE_OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
"""What a reader has set; a page that forgets to say where the proxy is gets nowhere."""


class _Habits:
    """Refuses what the real one would not answer."""

    def __init__(self, app: ASGIFramework, kind: Kind) -> None:
        self._app = app
        self._kind = kind

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] == "http":
            headers = {name.lower(): value for name, value in scope["headers"]}
            given = headers.get(self._kind.header.encode(), b"").decode()
            if self._kind.credentials and given != self._kind.credentials:
                scope["path"] = "/wrong-key"
            elif scope["path"].startswith(f"{self._kind.prefix}/"):
                scope["path"] = "/v1" + scope["path"].removeprefix(self._kind.prefix)
            else:
                scope["path"] = "/wrong-path"
        await self._app(scope, receive, send)


async def serve(kind: Kind, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve such an upstream until cancelled; starts with its base URL."""
    upstream = create_upstream(UpstreamOptions(time_to_first_token=0.01, tokens=5, tokens_per_second=1000))
    upstream.app = _Habits(upstream.app, kind)  # type: ignore[assignment]
    async with trio.open_nursery() as nursery:
        url = await nursery.start(serve_upstream, upstream)
        task_status.started(url.removesuffix("/v1") + kind.prefix.partition("/deployments")[0])
