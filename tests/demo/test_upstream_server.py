"""The simulated upstream as a command of its own."""

from __future__ import annotations

import signal
import socket

import httpx
import pytest
from click.testing import CliRunner

from processes import free_port, run, running
from support import until
from trioproxy.demo.upstream_server import main


async def test_it_serves_until_it_is_stopped() -> None:
    bind = f"127.0.0.1:{free_port()}"
    command = ("-m", "trioproxy.demo.upstream_server", "--bind", bind, "--latency", "0", "--tokens", "2")
    async with running(*command) as process:
        await until(lambda: b"\n" in process.output)
        async with httpx.AsyncClient(trust_env=False) as client:
            question = {"model": "gpt-sim", "messages": []}
            answer = await client.post(f"http://{bind}/v1/chat/completions", json=question)
        assert answer.json()["usage"]["completion_tokens"] == 2
        process.signal(signal.SIGINT)
        assert await process.end() == 0
        assert process.output.decode() == (
            f"A simulated upstream is at http://{bind}/v1, and any key will do. Ctrl-C ends it.\n"
        )


async def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        status, output = await run("-m", "trioproxy.demo.upstream_server", "--bind", bind)
    assert status == 1
    assert output.startswith(f"Error: cannot listen on {bind}: ")
    assert "in use" in output


@pytest.mark.parametrize("options", [["--latency", "-1"], ["--error-rate", "2"], ["--slots", "many"]])
def test_impossible_options(options: list[str]) -> None:
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
