"""The peers: how each is found, set up to do what trioproxy does, and started. What to measure is `peers.py`'s.

Each forwards `POST /v1/chat/completions` to the bench's upstream, listens on the loopback interface alone, has one
process (nginx and HAProxy: one thread), keeps its connections to the upstream, passes streams on as they come, and
calls nobody else. What its documentation recommends for that is set, what it does by default is left.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Final

import trio
from parts import MODEL, OBVIOUS, OURS, Server, Upstream, ask, running, started

from processes import free_port


@dataclass(frozen=True, slots=True)
class Site:
    """Where one server of one run is to be."""

    program: Path
    folder: Path
    """For its configuration and whatever it writes."""
    port: int
    upstream_port: int

    @property
    def upstream(self) -> str:
        """The base URL, as OpenAI's ends with `/v1`."""
        return f"http://127.0.0.1:{self.upstream_port}/v1"

    def write(self, name: str, text: str) -> str:
        """A file in the folder; its path."""
        file = self.folder / name
        file.write_text(text, "utf-8")
        return str(file)


@dataclass(frozen=True, slots=True)
class Launch:
    """What starts a server, and what each request to it must have."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """A program that passes on requests to models, or could."""

    name: str
    program: str
    """What it is called on the search path."""
    version: Callable[[Path], str]
    launch: Callable[[Site], Launch]
    parts: tuple[str, ...] | None = None
    """The parts of the bench that it takes part in; None: in all."""

    @property
    def option(self) -> str:
        """The name of the bench's option that says where it is."""
        return self.name.partition(",")[0].lower()


@dataclass(frozen=True, slots=True)
class Target:
    """A server that answers; requests to it need these headers."""

    name: str
    server: Server | None
    """None: the upstream itself."""
    port: int
    headers: Mapping[str, str] = field(default_factory=dict)


# Each peer: what it is asked for its version, and what it needs.

LITELLM_ENVIRONMENT: Final = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
}
"""No look at the network, and what its documentation recommends for production."""


def litellm(site: Site) -> Launch:
    """With its Prometheus metrics and its JSON log, as trioproxy has them: it logs requests at level INFO alone."""
    launch = litellm_bare(site, {"litellm_settings": {"callbacks": ["prometheus"], "json_logs": True}})
    return replace(launch, environment=launch.environment | {"LITELLM_LOG": "INFO"})


def litellm_bare(site: Site, more_settings: Mapping[str, object] = MappingProxyType({})) -> Launch:
    """No database; it does not start without a key. What is refused it tries again, as it does by default."""
    settings = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {"model": f"openai/{MODEL}", "api_base": site.upstream, "api_key": "none"},
            }
        ],
        **more_settings,
    }
    config = site.write("litellm.yaml", json.dumps(settings))  # JSON is YAML
    key = f"sk-{secrets.token_hex(32)}"
    command = [str(site.program), "--config", config, "--host", "127.0.0.1", "--port", str(site.port)]
    return Launch(
        [*command, "--num_workers", "1", "--telemetry", "False"],
        LITELLM_ENVIRONMENT | {"LITELLM_MASTER_KEY": key, "HOME": str(site.folder)},
        {"Authorization": f"Bearer {key}"},
    )


def litellm_version(program: Path) -> str:
    """As it says."""
    return _said([str(program), "--version"], LITELLM_ENVIRONMENT)


PORTKEY_ON_LOOPBACK: Final = """
const { Server } = require("net");
const { listen } = Server.prototype;
Server.prototype.listen = function (port, ...rest) {
  return listen.call(this, { port, host: "127.0.0.1" }, rest.find((each) => typeof each === "function"));
};
"""
"""It has no option for its address, listens on all of them, and would forward to wherever whoever comes says."""


def portkey(site: Site) -> Launch:
    """The upstream is said with each request; the loopback interface is among the hosts that it trusts."""
    loopback = site.write("loopback.cjs", PORTKEY_ON_LOOPBACK)
    return Launch(
        ["node", "--require", loopback, str(site.program.resolve()), f"--port={site.port}", "--headless"],
        {"NODE_ENV": "production"},
        {
            "x-portkey-provider": "openai",
            "x-portkey-custom-host": site.upstream,
            "Authorization": "Bearer none",
        },
    )


def portkey_version(program: Path) -> str:
    """Its package's, and node's."""
    package = json.loads((program.resolve().parent.parent / "package.json").read_text("utf-8"))
    if package["name"] != "@portkey-ai/gateway":
        raise ValueError(f"{program} is not Portkey's gateway")
    return f"{package['version']}, node {_said(['node', '--version'])}"


NGINX: Final = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/client;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  upstream model {{ server 127.0.0.1:{upstream_port}; keepalive 1024; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://model;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
      proxy_next_upstream off;
    }}
  }}
}}
"""


def nginx(site: Site) -> Launch:
    """One process, its access log on as it is by default."""
    text = NGINX.format(folder=site.folder, port=site.port, upstream_port=site.upstream_port)
    config, errors = site.write("nginx.conf", text), str(site.folder / "error.log")
    return Launch([str(site.program), "-p", str(site.folder), "-e", errors, "-c", config])


HAPROXY: Final = """
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  retries 0
  option abortonclose
  option http-no-delay
  http-reuse always
listen model
  bind 127.0.0.1:{port} backlog 4096
  server upstream 127.0.0.1:{upstream_port} pool-max-conn 1024
"""


def haproxy(site: Site) -> Launch:
    """One thread; what its manual has for such work, and is off by default: `abortonclose`, so that calls of clients
    that have left are given up, and `http-no-delay`, without which events of a stream wait for one another.
    """
    config = site.write("haproxy.cfg", HAPROXY.format(port=site.port, upstream_port=site.upstream_port))
    return Launch([str(site.program), "-db", "-f", config])


def _said(command: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> str:
    """The first thing that looks like a version in what a command prints."""
    done = subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    return version_in(done.stdout)


def version_in(text: str) -> str:
    """The first thing that looks like a version."""
    found = re.search(r"\d+\.\d+\.\d+", text)
    if found is None:
        raise ValueError(f"no version in {text[:200]!r}")
    return found[0]


PEERS: Final = (
    Peer("LiteLLM", "litellm", litellm_version, litellm),
    Peer("LiteLLM, bare", "litellm", litellm_version, litellm_bare, ("cpu",)),
    Peer("Portkey", "gateway", portkey_version, portkey),
    Peer("nginx", "nginx", lambda program: _said([str(program), "-v"]), nginx),
    Peer("HAProxy", "haproxy", lambda program: _said([str(program), "-v"]), haproxy),
)


@dataclass(frozen=True, slots=True)
class Found:
    """Which peers there are, and why the others are left out."""

    programs: dict[str, Path]
    versions: dict[str, str]
    left_out: dict[str, str]


def find(asked: Mapping[str, str]) -> Found:
    """Look for each where `asked` says, else on the search path."""
    found = Found({}, {}, {})
    for peer in PEERS:
        wanted = asked.get(peer.option) or peer.program
        program = shutil.which(wanted)
        if program is None:
            found.left_out[peer.name] = f"no {wanted} on the search path"
            continue
        try:
            found.versions[peer.name] = peer.version(Path(program))
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            found.left_out[peer.name] = f"its version cannot be told: {error}"
        else:
            found.programs[peer.name] = Path(program)
    return found


def takes_part(name: str, part: str) -> bool:
    """Whether a server takes part in a part of the bench."""
    limits = [peer.parts for peer in PEERS if peer.name == name and peer.parts is not None]
    return all(part in parts for parts in limits)


@asynccontextmanager
async def serving(name: str, found: Found, upstream: Upstream, ours: tuple[str, ...]) -> AsyncIterator[Target]:
    """A proxy before that upstream, `ours` being trioproxy's options; ended, its files gone, with the block."""
    if name in (OBVIOUS, OURS):
        async with running(name, upstream.url, *(ours if name == OURS else ())) as server:
            yield Target(name, server, server.port)
        return
    (peer,) = (peer for peer in PEERS if peer.name == name)
    with TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        site = Site(found.programs[name], Path(folder), free_port(), upstream.port)
        launch = peer.launch(site)
        async with started(name, site.port, launch.command, launch.environment, site.folder) as server:
            yield Target(name, server, server.port, launch.headers)


async def check(target: Target) -> None:
    """Whether it does the work at all: whole answers, and every event of a stream."""
    events = 20
    with trio.fail_after(60):
        stream = await trio.open_tcp_stream("127.0.0.1", target.port)
        answer = await ask(stream, "json", target.headers)
        if b"x" * 720 not in answer.body:
            raise RuntimeError(f"{target.name} does not pass answers on: {bytes(answer.body)!r}")
        for kind in (f"burst {events}", f"paced {events}"):
            answer = await ask(stream, kind, target.headers)
            missing = [number for number in range(events) if f" t{number:04d}".encode() not in answer.body]
            if missing or b"[DONE]" not in answer.body:
                raise RuntimeError(f"{target.name} does not pass streams on: {bytes(answer.body)!r}")
        await stream.aclose()
