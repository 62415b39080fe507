"""The commands, as real processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trio

from processes import environment, run, running
from support import Upstream, until
from trioproxy import __version__

SERVE = ("-m", "trioproxy", "serve", "--bind", "127.0.0.1:0")


async def test_version() -> None:
    assert await run("-m", "trioproxy", "--version") == (0, f"trioproxy, version {__version__}\n")


async def test_serving_logging_and_stopping(upstream: Upstream, tmp_path: Path) -> None:
    log_file = tmp_path / "new" / "folder" / "proxy.log"
    async with running(*SERVE, "--upstream", upstream.url, "--log-file", str(log_file)) as process:
        (address,) = (await process.line("listening"))["addresses"]
        async with httpx.AsyncClient(base_url=address, trust_env=False) as client, trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: client.post(
                    "/v1/chat/completions",
                    json={"model": "m", "priority": 65},
                    headers={"Authorization": "Bearer sk-secret", "X-Request-Id": "mine"},
                )
            )
            await (await upstream.call()).answer(b"{}")
        line = await process.line("request completed")
        expected = {
            "level": "info",
            "request_id": "mine",
            "priority": 65,
            "priority_level": "high",
            "pool": "default",
            "model": "m",
            "method": "POST",
            "path": "/v1/chat/completions",
            "http_status": 200,
            "status": "completed",
            "outcome": "success",
            "bytes_out": 2,
        }
        assert expected.items() <= line.items()
        assert {
            "timestamp",
            "queue_seconds",
            "upstream_seconds",
            "time_to_first_byte_seconds",
            "total_seconds",
            "bytes_in",
        } <= line.keys()
        process.signal(signal.SIGTERM)
        assert await process.end() == 0
        assert [line["event"] for line in process.lines][-2:] == ["shutting down", "stopped"]
        assert [json.loads(line) for line in log_file.read_text().splitlines()] == process.lines
        assert b"secret" not in process.output


def standard_streams(pid: int) -> list[str]:
    """What they are, where the system tells that."""
    return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").glob("[012]")]


async def test_it_does_without_the_standard_streams(upstream: Upstream, tmp_path: Path) -> None:
    log_file = tmp_path / "proxy.log"
    command = shlex.join([sys.executable, *SERVE, "--upstream", upstream.url, "--log-file", str(log_file)])
    closed = ["sh", "-c", f"exec {command} <&- >&- 2>&-"]
    process = await trio.lowlevel.open_process(closed, env=environment({}))
    try:
        await until(lambda: log_file.exists() and '"listening"' in log_file.read_text(), 60)
        assert standard_streams(process.pid) in ([os.devnull] * 3, [])
        process.send_signal(signal.SIGTERM)
        with trio.fail_after(60):
            assert await process.wait() == 0
    finally:
        process.kill()
    assert json.loads(log_file.read_text().splitlines()[-1])["event"] == "stopped"


async def test_a_signal_finishes_what_runs_and_a_second_one_ends_at_once(upstream: Upstream) -> None:
    for signals, finished in ((1, True), (2, False)):
        async with running(*SERVE, "--upstream", upstream.url) as process:
            (address,) = (await process.line("listening"))["addresses"]
            answers: list[int] = []

            async def send(url: str = address, answers: list[int] = answers) -> None:
                async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
                    try:
                        answers.append((await client.post(f"{url}/v1/chat/completions")).status_code)
                    except httpx.TransportError:
                        answers.append(0)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                call = await upstream.call()
                for _ in range(signals):
                    process.signal(signal.SIGINT)
                    await trio.sleep(0.2)
                if finished:
                    await call.answer()
            assert await process.end() == 0
            assert answers == [200 if finished else 0]


async def test_a_client_that_has_stopped_reading_does_not_hold_the_end_back(upstream: Upstream) -> None:
    settings = {"TRIOPROXY_SERVER__SHUTDOWN_GRACE": "300ms"}
    async with running(*SERVE, "--upstream", upstream.url, variables=settings) as process:
        (address,) = (await process.line("listening"))["addresses"]
        stream = await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2]))
        async with stream, trio.open_nursery() as nursery:
            await stream.send_all(b"GET /v1/files/x/content HTTP/1.1\r\nHost: x\r\n\r\n")
            call = await upstream.call()

            async def pump() -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 100_000_000)

            nursery.start_soon(pump)
            await trio.sleep(0.5)
            process.signal(signal.SIGTERM)
            with trio.fail_after(3):
                assert await process.end() == 0


@pytest.mark.parametrize(
    ("content", "options", "variables", "said"),
    [
        ("scheduler: {concurrency: many}", [], {}, ["scheduler.concurrency", "many", "proxy.yaml"]),
        ("scheduler: {concurency: 3}", [], {}, ["scheduler.concurency", "proxy.yaml", "scheduler.concurrency"]),
        ("server: {max_body_size: huge}", [], {}, ["server.max_body_size", "huge"]),
        ("", ["--bind", "nowhere"], {}, ["server.bind", "nowhere", "command line"]),
        ("upstream: {api_key: '${NO_SUCH_NAME}'}", [], {}, ["upstream.api_key", "NO_SUCH_NAME"]),
        ("a: [", [], {}, ["proxy.yaml", "line"]),
        ("keys: [{name: a}]", [], {}, ["keys[0]", "key_sha256"]),
        ("", ["--concurrency", "0"], {}, ["scheduler.concurrency", "0", "command line"]),
        ("", [], {"TRIOPROXY_SCHEDULER__MAX_QUEUE": "-1"}, ["TRIOPROXY_SCHEDULER__MAX_QUEUE", "-1"]),
        ("", [], {"TRIOPROXY_SCHEDULE__MAX_QUEUE": "1"}, ["TRIOPROXY_SCHEDULE__MAX_QUEUE"]),
        ("", [], {"TRIOPROXY_LOGGING__FILE": "/proc/nothing/x.log"}, ["/proc/nothing"]),
        ("", [], {"HTTPS_PROXY": "gopher://x"}, ["HTTPS_PROXY", "gopher"]),
    ],
)
async def test_a_wrong_configuration_is_said_and_nothing_started(
    tmp_path: Path, content: str, options: list[str], variables: dict[str, str], said: list[str]
) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text(content)
    status, output = await run(*SERVE, "--config", str(file), *options, variables=variables)
    assert status == 2
    assert "Traceback" not in output
    assert "listening" not in output
    (line,) = (json.loads(line) for line in output.splitlines())
    assert line["level"] == "error"
    for text in said:
        assert text in line["error"]


async def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        status, output = await run("-m", "trioproxy", "serve", "--bind", bind)
    assert status == 1
    assert "Traceback" not in output
    (line,) = (json.loads(line) for line in output.splitlines())
    assert bind in line["error"]
    assert "in use" in line["error"]


async def test_check_config(tmp_path: Path) -> None:
    file = tmp_path / "proxy.yaml"
    file.write_text("upstream: {api_key: sk-secret}\nscheduler: {concurrency: 3}\n")
    status, output = await run("-m", "trioproxy", "check-config", str(file))
    assert status == 0
    assert "concurrency: 3" in output
    assert "secret" not in output
    file.write_text("scheduler: {concurrency: three}\n")
    status, output = await run("-m", "trioproxy", "check-config", str(file))
    assert status == 2
    assert "scheduler.concurrency" in output
    assert "Traceback" not in output
