"""Another configuration while running: what changes at once, what stays, and that a bad file changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import trio
import trio.testing
from trio.testing import MockClock

from authority import Authority
from memory import House
from processes import Process, run, running
from support import Upstream, running_proxy, until
from trioproxy import config
from trioproxy.config import ConfigError, Settings
from trioproxy.observe import logs
from trioproxy.reload import NEEDS_RESTART, ControlSocket, Outcome, Reloader, ask
from trioproxy.server import Server

CHAT = "/v1/chat/completions"


def settings(**sections: Any) -> Settings:
    return Settings.model_validate({"server": {"bind": "127.0.0.1:0"}} | sections)


# In the house


async def test_more_slots_start_who_waits_and_fewer_drain(
    autojump_clock: MockClock, house: Callable[..., House]
) -> None:
    h = house(scheduler={"concurrency": 1})
    clients = [h.send() for _ in range(3)]
    first = await h.upstream.call()
    h.proxy.reconfigure(settings(scheduler={"concurrency": 3}))
    second, third = await h.upstream.call(), await h.upstream.call()
    h.proxy.reconfigure(settings(scheduler={"concurrency": 1}))
    clients.append(h.send())
    for call in (first, second):
        await call.answer()
        await trio.testing.wait_all_tasks_blocked()
        assert len(h.upstream.calls) == 3, "nobody starts while two are still running"
    sample = h.proxy.metrics.registry.get_sample_value
    assert sample("openai_proxy_permits", {"pool": "default"}) == 1
    assert sample("openai_proxy_available_permits", {"pool": "default"}) == 0
    await third.answer()
    await (await h.upstream.call()).answer()
    for client in clients:
        await client.answer.done.wait()
    assert h.recorder.outcomes() == ["success"] * 4
    h.assert_settled()


async def test_keys_priorities_routes_and_timeouts_are_others_at_once(
    autojump_clock: MockClock, house: Callable[..., House]
) -> None:
    h = house()
    h.proxy.reconfigure(
        settings(
            keys=[{"name": "web", "key": "sk-web", "default_priority": 77, "max_concurrency": 1, "max_queue": 0}],
            scheduler={"routes": {"x": "schedule"}, "queue_timeout": 7, "concurrency": 2},
            upstream={"first_byte_timeout": 5, "api_key": "sk-new"},
        )
    )
    assert (await h.client().post()).code == "invalid_api_key"
    client = h.send(path="/v1/x", headers=[("Authorization", "Bearer sk-web")])
    call = await h.upstream.call()
    assert call.header("authorization") == "Bearer sk-new"
    assert (await h.client().post(headers=[("Authorization", "Bearer sk-web")])).code == "rate_limit_exceeded"
    await client.answer.done.wait()
    assert client.answer.code == "upstream_timeout"
    assert [event.request.priority for event in h.recorder.ended] == [77, 77]
    assert h.proxy.metrics.registry.get_sample_value("openai_proxy_queue_timeout_seconds", {"pool": "default"}) == 7
    labels = {"pool": "default", "key": "web", "status": "timeout"}
    assert h.proxy.metrics.registry.get_sample_value("openai_proxy_key_requests_total", labels) == 1


async def test_who_waits_does_so_for_as_long_as_it_was_told(
    autojump_clock: MockClock, house: Callable[..., House]
) -> None:
    h = house(scheduler={"concurrency": 1, "queue_timeout": 20})
    h.send()
    call = await h.upstream.call()
    early = h.send()
    await trio.testing.wait_all_tasks_blocked()
    h.proxy.reconfigure(settings(scheduler={"concurrency": 1, "queue_timeout": 3}))
    late = await h.client().post()
    assert trio.current_time() == pytest.approx(3)
    assert "within 3 s" in late.body.decode()
    await early.answer.done.wait()
    assert trio.current_time() == pytest.approx(20)
    assert "within 20 s" in early.answer.body.decode()
    await call.answer()


async def test_slots_and_what_keys_may_have_of_them_change_in_one_step(
    autojump_clock: MockClock, house: Callable[..., House]
) -> None:
    fields = [("Authorization", "Bearer sk-a")]
    key = {"name": "a", "key": "sk-a"}
    h = house(scheduler={"concurrency": 1}, keys=[key])
    clients = [h.send(headers=fields) for _ in range(3)]
    await h.upstream.call()
    h.proxy.reconfigure(settings(scheduler={"concurrency": 4}, keys=[key | {"max_concurrency": 1}]))
    assert h.proxy.scheduler.running == 1
    h.proxy.reconfigure(settings(scheduler={"concurrency": 1}, keys=[key]))
    assert h.proxy.scheduler.running == 1
    for call in range(3):
        await h.upstream.calls[call].answer()
        await trio.testing.wait_all_tasks_blocked()
    for client in clients:
        await client.answer.done.wait()
    h.assert_settled()


async def test_the_places_alone_and_those_of_websockets(autojump_clock: MockClock, house: Callable[..., House]) -> None:
    h = house(scheduler={"concurrency": 1})
    h.proxy.reconfigure(settings(scheduler={"concurrency": 1, "max_queue": 0}, server={"max_websockets": 3}))
    h.send()
    call = await h.upstream.call()
    assert (await h.client().post()).code == "queue_full"
    assert h.proxy.websockets.limit == 3
    await call.answer()


# Reading, judging, committing


@asynccontextmanager
async def reloading(upstream: Upstream, wanted: list[Settings | Exception]) -> AsyncIterator[tuple[Server, Reloader]]:
    """A running server, and what reloads it with the next of `wanted` each time."""

    def read() -> Settings:
        result = wanted.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    async with running_proxy(upstream.url) as proxy:
        yield proxy.server, Reloader(read, proxy.server, logs.set_level)


async def test_a_bad_file_changes_nothing_and_says_why(upstream: Upstream) -> None:
    async with reloading(upstream, [ConfigError("scheduler.concurrency: must be")]) as (server, reloader):
        before = server.settings
        assert await reloader.reload() == Outcome(error="scheduler.concurrency: must be")
        assert server.settings is before


async def test_whoever_needed_a_key_needs_one_until_a_restart(upstream: Upstream) -> None:
    async with reloading(upstream, [settings(keys=[{"name": "web", "key": "x"}]), settings()]) as (server, reloader):
        assert (await reloader.reload()).error is None
        assert "anyone could use the proxy" in str((await reloader.reload()).error)
        assert [key.name for key in server.settings.keys] == ["web"]


async def test_another_order_of_patterns_is_a_change(upstream: Upstream) -> None:
    wanted = [settings(scheduler={"model_priorities": order}) for order in ({"a*": 1, "*": 2}, {"*": 2, "a*": 1})]
    async with reloading(upstream, [*wanted]) as (_, reloader):
        for _ in wanted:
            assert "scheduler.model_priorities" in (await reloader.reload()).changed


async def test_how_long_new_connections_may_be_idle(upstream: Upstream) -> None:
    async with reloading(upstream, []) as (server, reloader):
        limits = server.settings.server.model_copy(update={"keep_alive_timeout": 0.2})
        reloader._read = lambda: server.settings.model_copy(update={"server": limits})
        assert (await reloader.reload()).changed == ("server.keep_alive_timeout",)
        stream = await trio.open_tcp_stream(*server._sockets[0].getsockname())
        async with stream:
            await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            with trio.fail_after(20):
                while await stream.receive_some():
                    pass


async def test_when_it_no_longer_listens_a_reload_says_what_it_did(upstream: Upstream) -> None:
    async with reloading(upstream, [settings(scheduler={"default_priority": 3})]) as (server, reloader):
        pass
    assert (await reloader.reload()).error is None
    assert server.settings.scheduler.default_priority == 3


def changed(key: str, before: Settings) -> Settings:
    """The same, but for one setting."""
    other: dict[str, Any] = {
        "server.bind": ("127.0.0.1:1",),
        "server.backlog": 7,
        "upstream.base_url": "http://elsewhere/v1",
        "logging.format": "console",
    }
    *path, name = key.split(".")
    section = getattr(before, path[0])
    values = section.model_copy(update={name: other.get(key, Path("/elsewhere"))})
    return before.model_copy(update={path[0]: values})


@pytest.mark.parametrize("key", NEEDS_RESTART)
async def test_what_needs_a_restart_is_said_each_time_and_stays(upstream: Upstream, key: str) -> None:
    async with reloading(upstream, []) as (server, reloader):
        before = server.settings
        reloader._read = lambda: changed(key, before)
        for _ in range(2):
            assert await reloader.reload() == Outcome(needs_restart=(key,))
            assert server.settings == before


async def test_what_is_changed_is_named_and_the_rest_goes_on(upstream: Upstream) -> None:
    async with reloading(upstream, []) as (server, reloader):
        before = server.settings
        wanted = changed("logging.format", before).model_copy(
            update={
                "scheduler": before.scheduler.model_copy(update={"concurrency": 3, "default_priority": 7}),
                "keys": settings(keys=[{"name": "web", "key": "x"}]).keys,
            }
        )
        reloader._read = lambda: wanted
        outcome = await reloader.reload()
        expected = ("scheduler.concurrency", "scheduler.default_priority", "keys.web")
        assert outcome == Outcome(expected, ("logging.format",))
        assert server.settings.scheduler.concurrency == 3
        assert server.settings.logging.format is None
        assert await reloader.reload() == Outcome(needs_restart=("logging.format",))


async def test_the_level_of_the_log(upstream: Upstream) -> None:
    stream = StringIO()
    writer = logs.configure("info", "json", None, stream)
    try:
        async with reloading(upstream, []) as (server, reloader):
            loud = server.settings.logging.model_copy(update={"level": "warning"})
            reloader._read = lambda: server.settings.model_copy(update={"logging": loud})
            assert (await reloader.reload()).changed == ("logging.level",)
            structlog.get_logger().info("not any more")
            structlog.get_logger().warning("still")
    finally:
        writer.close()
    assert "not any more" not in stream.getvalue()
    assert "still" in stream.getvalue()


async def test_certificates_are_read_again(upstream: Upstream, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = old.issue()
    async with running_proxy(upstream.url, (), old.trusting(), server={"tls": files}) as proxy:
        reloader = Reloader(lambda: proxy.server.settings, proxy.server, logs.set_level)
        assert (await proxy.client.get("/health")).status_code == 200
        for name, renewed in new.issue().items():
            shutil.copy(renewed, files[name])
        assert (await reloader.reload()).error is None
        async with httpx.AsyncClient(verify=new.trusting(), trust_env=False) as client:
            assert (await client.get(f"{proxy.url}/health")).status_code == 200
        shutil.copy(files["key"], files["cert"])
        assert (await reloader.reload()).error
        async with httpx.AsyncClient(verify=new.trusting(), trust_env=False) as client:
            assert (await client.get(f"{proxy.url}/health")).status_code == 200


async def test_speaking_tls_or_not_needs_a_restart(upstream: Upstream, tmp_path: Path) -> None:
    async with reloading(upstream, [settings(server={"tls": Authority(tmp_path).issue()})]) as (server, reloader):
        outcome = await reloader.reload()
        assert {"server.tls.cert", "server.tls.key"} <= set(outcome.needs_restart)
        assert server.settings.server.tls.cert is None


# By the control socket


async def test_the_control_socket_answers_and_is_ours_alone(upstream: Upstream, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    wanted: list[Settings | Exception] = [settings(scheduler={"concurrency": 2}), ConfigError("a line\nanother")]
    async with reloading(upstream, wanted) as (_, reloader), trio.open_nursery() as nursery:
        nursery.start_soon(ControlSocket(path).serve, reloader)
        await until(path.exists)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "scheduler.concurrency" in (await trio.to_thread.run_sync(ask, path)).changed
        assert (await trio.to_thread.run_sync(ask, path)).error == "a line\nanother"
        with pytest.raises(OSError, match="in use"):
            ControlSocket(path)
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_an_abandoned_control_socket_is_replaced_and_another_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    ControlSocket(path)._socket.close()
    assert path.exists()
    ControlSocket(path)._socket.close()
    path.unlink()
    path.write_text("mine")
    with pytest.raises(OSError, match="in use"):
        ControlSocket(path)
    assert path.read_text() == "mine"
    with pytest.raises(OSError):
        ask(path)


# As a user does it

SERVE = ("-m", "trioproxy", "serve", "--bind", "127.0.0.1:0")
RELOAD = ("-m", "trioproxy", "reload")


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Process]:
    async with running(*SERVE, "--config", str(path)) as process:
        await process.line("listening")
        yield process


async def test_a_signal_reloads_and_the_log_says_what_came_of_it(upstream: Upstream, tmp_path: Path) -> None:
    path = tmp_path / "proxy.yaml"
    path.write_text(f"upstream: {{base_url: '{upstream.url}'}}\nscheduler: {{concurrency: 1}}\n")
    async with serving(path) as process:
        (address,) = (await process.line("listening"))["addresses"]
        async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
            path.write_text("scheduler: {concurrency: none}\n")
            process.signal(signal.SIGHUP)
            line = await process.line("configuration not reloaded")
            assert "scheduler.concurrency: must be a whole number" in line["error"]
            path.write_text(
                "upstream: {base_url: http://elsewhere/v1}\nscheduler: {concurrency: 5}\n"
                "keys: [{name: web, key: sk-web}]\n"
            )
            process.signal(signal.SIGHUP)
            line = await process.line("configuration reloaded")
            assert line["changed"] == ["scheduler.concurrency", "keys.web"]
            assert line["needs_restart"] == ["upstream.base_url"]
            assert 'permits{pool="default"} 5.0' in (await client.get("/metrics")).text
            assert (await client.get("/v1/models")).status_code == 401
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
    assert b"sk-web" not in process.output


@pytest.mark.parametrize("content", ["", "# scheduler: {concurrency: 3}\n", "upstream:\n", None])
async def test_a_file_that_has_become_empty_or_is_gone_changes_nothing(tmp_path: Path, content: str | None) -> None:
    path, control = tmp_path / "proxy.yaml", tmp_path / "control.sock"
    path.write_text(f"server: {{control_socket: '{control}'}}\nupstream: {{api_key: sk-upstream}}\n")
    async with serving(path) as process:
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        status, said = await run(*RELOAD, "--socket", str(control))
        assert status == 2
        assert said.startswith(
            f"nothing was changed:\n{path}: {'cannot be read' if content is None else 'sets nothing'}"
        )
        process.signal(signal.SIGTERM)
        assert await process.end() == 0


async def test_a_file_that_cannot_be_read_to_its_end_keeps_no_signal_waiting(
    upstream: Upstream, tmp_path: Path
) -> None:
    path = tmp_path / "proxy.yaml"
    path.write_text(f"upstream: {{base_url: '{upstream.url}'}}\n")
    async with serving(path) as process:
        path.unlink()
        os.mkfifo(path)
        process.signal(signal.SIGHUP)
        await trio.sleep(0.3)
        process.signal(signal.SIGTERM)
        assert await process.end() == 0


async def test_the_command_reload_needs_no_secret_of_the_proxys_environment(upstream: Upstream, tmp_path: Path) -> None:
    path, control = tmp_path / "proxy.yaml", tmp_path / "control.sock"
    path.write_text(
        f"server: {{control_socket: '{control}'}}\n"
        f"upstream:\n  base_url: '{upstream.url}'\n  api_key: ${{UPSTREAM_KEY}}\n"
    )
    variables = {"UPSTREAM_KEY": "sk-x"}
    async with running(*SERVE, "--config", str(path), variables=variables) as process:
        await process.line("listening")
        assert await run(*RELOAD, "--config", str(path)) == (0, "changed: nothing\n")
        process.signal(signal.SIGTERM)
        assert await process.end() == 0


async def test_the_end_of_its_terminal_is_its_end_behind_a_pipe_too(upstream: Upstream, tmp_path: Path) -> None:
    """`trioproxy serve 2>&1 | tee -a proxy.log`, and then the terminal is closed."""
    primary, secondary = os.openpty()
    process = subprocess.Popen(  # noqa: ASYNC220 - it takes no time
        [sys.executable, *SERVE, "--upstream", upstream.url],
        stdin=secondary,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        os.close(secondary)
        assert process.stdout is not None
        while b'"listening"' not in await trio.to_thread.run_sync(process.stdout.readline):
            pass
        os.close(primary)
        process.send_signal(signal.SIGHUP)
        with trio.fail_after(20):
            assert await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True) == 0
    finally:
        process.kill()
        process.communicate()


async def test_the_command_reload(tmp_path: Path) -> None:
    path, control = tmp_path / "proxy.yaml", tmp_path / "control.sock"
    options = ("--config", str(path))
    path.write_text("scheduler: {concurrency: 1}\n")
    status, said = await run(*RELOAD, *options)
    assert status == 2
    assert "server.control_socket is not set" in said
    with_socket = f"server: {{control_socket: '{control}'}}\n"
    path.write_text(f"{with_socket}scheduler: {{concurrency: 1}}\n")
    status, said = await run(*RELOAD, *options)
    assert status == 1
    assert "nothing was changed" in said
    assert "is the proxy running?" in said
    assert "--socket" in said
    async with serving(path) as process:
        path.write_text(f"{with_socket}scheduler: {{concurrency: 2}}\nlogging: {{format: json}}\n")
        assert await run(*RELOAD, *options) == (0, "changed: scheduler.concurrency\nneeds a restart: logging.format\n")
        assert await run(*RELOAD, *options) == (0, "changed: nothing\nneeds a restart: logging.format\n")
        path.write_text("scheduler: {concurrency: 0}\n")
        for arguments in (options, ("--socket", str(control))):
            status, said = await run(*RELOAD, *arguments)
            assert status == 2
            assert said.startswith("nothing was changed:\n")
            assert "scheduler.concurrency: must be a whole number" in said
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
    assert not control.exists()


async def test_keys_new_prints_a_line_that_works(upstream: Upstream, tmp_path: Path) -> None:
    status, said = await run("-m", "trioproxy", "keys", "new", "web")
    assert status == 0
    key = next(line for line in said.splitlines() if line.startswith("sk-trioproxy-"))
    entry = next(line for line in said.splitlines() if line.startswith("  - {"))
    path = tmp_path / "proxy.yaml"
    path.write_text(f"keys:\n{entry}\n")
    (known,) = config.load(path, {}).keys
    async with running_proxy(upstream.url, keys=[known.model_dump()]) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, lambda call: call.answer())
        for said_key, expected in ((key, 200), (f"{key}x", 401)):
            answer = await proxy.client.get("/v1/models", headers={"Authorization": f"Bearer {said_key}"})
            assert answer.status_code == expected
        nursery.cancel_scope.cancel()
    status, said = await run("-m", "trioproxy", "keys", "new", "not a name")
    assert status == 2
    assert "1 to 64 letters" in said


@pytest.mark.parametrize(
    ("bind", "upstream_key", "keys", "warned"),
    [
        ("0.0.0.0:0", "sk-x", [], True),
        ("[::]:0", "sk-x", [], True),
        ("127.0.0.1:0", "sk-x", [], False),
        ("[::1]:0", "sk-x", [], False),
        ("0.0.0.0:0", None, [], False),
        ("0.0.0.0:0", "sk-x", [{"name": "web", "key": "k"}], False),
    ],
)
async def test_whoever_lets_anyone_spend_the_upstreams_key_is_warned(
    upstream: Upstream, bind: str, upstream_key: str | None, keys: list[dict[str, Any]], warned: bool
) -> None:
    stream = StringIO()
    writer = logs.configure("info", "json", None, stream)
    sections: dict[str, dict[str, Any]] = {"server": {"bind": bind}, "upstream": {"api_key": upstream_key}}
    try:
        async with running_proxy(upstream.url, keys=keys, **sections):
            pass
    finally:
        writer.close()
    assert ("may spend the upstream's key" in stream.getvalue()) == warned
