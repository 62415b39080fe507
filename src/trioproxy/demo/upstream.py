"""A simulated OpenAI upstream: answers like OpenAI's API, without a model, a key or the network.

For demonstrations, and for tests of whatever talks to OpenAI's API: it speaks well enough for the official SDKs, takes
its time as a model does, counts what happens to it, and fails on demand. It must not know the proxy: to it, every
client is just a client.

    async with trio.open_nursery() as nursery:
        upstream = create_upstream(UpstreamOptions(tokens_per_second=100))
        base_url = await nursery.start(serve_upstream, upstream)
        ...
        assert upstream.aborted == 0

It answers `POST` to chat/completions, completions, responses (all three streamed or not), embeddings, moderations and
audio/transcriptions (these six are *generations*); `POST` responses/ID/cancel; `GET` models and models/NAME; `POST` and
`GET` files, `DELETE` files/ID; all below /v1/. A WebSocket at /v1/realtime sends every message back. Everything else is
404. Bodies are judged only as far as an answer depends on them; there is always one choice, and it says the same words
every time.

A request can ask for trouble with these headers, on every path. Unknown, repeated or unusable ones are answered 400.

| header | value | what happens |
| --- | --- | --- |
| `x-sim-status` | 400 to 599 | this status, at once, in OpenAI's error shape; 429 with `retry-after` |
| `x-sim-latency` | seconds, 0 to 86400 | exactly this to the first token, or before an error, or on other paths |
| `x-sim-tokens` | 0 to 1000000 | the answer's length; the request's own limit still lowers it |
| `x-sim-break` | N, from 0 | the connection breaks off after N streamed tokens, or all if there are fewer |
| `x-sim-hang` | 1 | never answers, and keeps its slot |

An answer that is not streamed breaks off after its headers (N = 0) or half of its body, short of its content-length.
"""

from functools import partial

import trio
from hypercorn import Config
from hypercorn.trio import serve

from trioproxy.demo.upstream_endpoints import build_app
from trioproxy.demo.upstream_options import Controls, UpstreamOptions
from trioproxy.demo.upstream_traffic import Exchange, Traffic

__all__ = ["Controls", "Exchange", "SimulatedUpstream", "UpstreamOptions", "create_upstream", "serve_upstream"]

DEFAULT_OPTIONS = UpstreamOptions()


class SimulatedUpstream(Traffic):
    """A simulated upstream: the application, and live counters of what happens to it.

    `app` is an ASGI application for any server that runs on trio. The counters may be read at any time from the
    thread that runs it; when a client goes away they know within milliseconds, not at once.
    """

    def __init__(self, options: UpstreamOptions) -> None:
        super().__init__()
        self.options = options
        self.app = build_app(options, self)


def create_upstream(options: UpstreamOptions = DEFAULT_OPTIONS) -> SimulatedUpstream:
    """A simulated upstream that nobody serves yet."""
    return SimulatedUpstream(options)


async def serve_upstream(
    upstream: SimulatedUpstream,
    bind: str = "127.0.0.1:0",
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `upstream` at `bind` (`HOST:PORT`; port 0 takes a free one) until it is cancelled.

    Starts with the base URL for a client, such as `http://127.0.0.1:43121/v1`, once it listens. What is under way when
    it is cancelled is cut off; a client that has stopped reading can hold the end back until it disconnects.
    """
    async with trio.open_nursery() as nursery:
        urls = await nursery.start(partial(serve, mode="asgi"), upstream.app, _server_config(bind))
        task_status.started(f"{urls[0]}/v1")


def _server_config(bind: str) -> Config:
    config = Config()
    config.bind = [bind]
    config.accesslog = None
    config.errorlog = None
    config.backlog = 1000
    config.keep_alive_timeout = 75
    config.keep_alive_max_requests = 1_000_000_000
    config.graceful_timeout = 0.1
    return config
