"""The same application under the plain `hypercorn` command."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import trio

from processes import free_port, run, running
from support import Upstream

HYPERCORN = ("-m", "hypercorn", "--worker-class", "trio", "trioproxy.asgi:app", "--bind")


async def test_it_serves_and_says_everything_as_json_lines(upstream: Upstream) -> None:
    bind = f"127.0.0.1:{free_port()}"
    async with running(*HYPERCORN, bind, variables={"TRIOPROXY_UPSTREAM__BASE_URL": upstream.url}) as process:
        await process.line("started")
        async with (
            httpx.AsyncClient(base_url=f"http://{bind}", trust_env=False) as client,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(partial(client.post, "/v1/chat/completions", json={"priority": "high"}))
            call = await upstream.call()
            assert call.body == b"{}"
            await call.answer()
        assert (await process.line("request completed"))["priority"] == 70
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
        assert any("Running on" in line["event"] for line in process.lines)


async def test_a_websocket_client_that_does_not_wait_for_its_answer_ends_no_worker() -> None:
    port = free_port()
    handshake = b"\r\n".join(
        [
            b"GET /nothing HTTP/1.1",
            b"Host: x",
            b"Connection: Upgrade",
            b"Upgrade: websocket",
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            b"\r\n",
        ]
    )
    async with running(*HYPERCORN, f"127.0.0.1:{port}") as process:
        await process.line("started")
        for _ in range(10):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(handshake + b"\x81\x85\0\0\0\0hello" * 3)
                with trio.fail_after(20):
                    assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
        assert b"Traceback" not in process.output


async def test_newcomers_are_not_answered_while_it_drains(upstream: Upstream) -> None:
    bind = f"127.0.0.1:{free_port()}"
    variables = {"TRIOPROXY_UPSTREAM__BASE_URL": upstream.url, "TRIOPROXY_LOGGING__LEVEL": "debug"}
    async with (
        running(*HYPERCORN, bind, "--graceful-timeout", "20", variables=variables) as process,
        httpx.AsyncClient(base_url=f"http://{bind}", trust_env=False, timeout=20) as client,
        trio.open_nursery() as nursery,
    ):
        await process.line("started")
        nursery.start_soon(partial(client.post, "/v1/chat/completions", json={}))
        call = await upstream.call()
        process.signal(signal.SIGTERM)
        waits = False
        with trio.fail_after(20):
            while not waits:  # Hypercorn takes a moment to tell its worker, and breaks off who comes in that moment
                with trio.move_on_after(1) as patience, suppress(httpx.TransportError):
                    assert (await client.get("/ready", headers={"Connection": "close"})).status_code == 200
                waits = patience.cancelled_caught
        await call.answer()
        await process.line("request completed")
        assert await process.end() == 0


async def test_a_second_worker_refuses_to_start() -> None:
    # Hypercorn's own exit status does not tell that a worker failed.
    # What it does when its master ends it, too early for its own handlers of signals, is not ours to say.
    _, output = await run(*HYPERCORN, f"127.0.0.1:{free_port()}", "--workers", "2")
    assert "BlockingIOError" not in output
    assert "another worker of this application serves already" in output
    assert "--workers 1" in output


async def test_a_server_that_does_not_run_on_trio_is_refused() -> None:
    _, output = await run("-m", "hypercorn", "trioproxy.asgi:app", "--bind", f"127.0.0.1:{free_port()}")
    assert "--worker-class trio" in output


async def test_two_masters_do_not_get_in_each_others_way() -> None:
    async with (
        running(*HYPERCORN, f"127.0.0.1:{free_port()}") as one,
        running(*HYPERCORN, f"127.0.0.1:{free_port()}") as two,
    ):
        await one.line("started")
        await two.line("started")


async def test_what_a_hangup_does_is_what_the_documentation_says(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("scheduler: {concurrency: 3}")
    bind = f"127.0.0.1:{free_port()}"
    async with running(*HYPERCORN, bind, variables={"TRIOPROXY_CONFIG": str(file)}) as process:
        await process.line("started")
        file.write_text("scheduler: {concurrency: 4}")
        process.signal(signal.SIGHUP)
        await process.line("stopped")
        async with httpx.AsyncClient(base_url=f"http://{bind}", trust_env=False, timeout=20) as client:
            assert 'openai_proxy_permits{pool="default"} 4.0' in (await client.get("/metrics")).text
        file.write_text("scheduler: {concurrency: many}")
        process.signal(signal.SIGHUP)
        await process.line("the configuration cannot be used")
        await process.end()


async def test_a_wrong_configuration_is_said_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("scheduler: {concurrency: many}")
    _, output = await run(*HYPERCORN, f"127.0.0.1:{free_port()}", variables={"TRIOPROXY_CONFIG": str(file)})
    (line,) = (json.loads(line) for line in output.splitlines())
    assert "scheduler.concurrency" in line["error"]
