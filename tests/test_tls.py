"""TLS on both sides, over real sockets: what holds without it holds with it."""

from __future__ import annotations

import signal
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from authority import EXPIRED, Authority
from processes import run, running
from support import CHUNKED, LAST_CHUNK, Call, Proxy, Upstream, chunk, running_proxy, running_upstream

CHAT = "/v1/chat/completions"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@asynccontextmanager
async def tls_proxy(upstream_url: str, authority: Authority, **server: Any) -> AsyncIterator[Proxy]:
    """The proxy, served over TLS."""
    settings = authority.settings(**server)
    async with running_proxy(upstream_url, (), authority.trusting(), server=settings) as proxy:
        yield proxy


async def connect(
    proxy: Proxy, authority: Authority, *, says_goodbye: bool = True
) -> trio.SSLStream[trio.SocketStream]:
    """A bare connection: unless it `says_goodbye`, it closes without notice and does not mind when the other does."""
    stream = trio.SSLStream(
        await proxy.connect(),
        authority.trusting("http/1.1"),
        server_hostname="127.0.0.1",
        https_compatible=not says_goodbye,
    )
    await stream.do_handshake()
    return stream


# Clients


@pytest.mark.parametrize("http2", [False, True])
async def test_clients_are_served_over_tls_and_choose_http_2_by_alpn(
    upstream: Upstream, authority: Authority, http2: bool
) -> None:
    async with tls_proxy(upstream.url, authority) as proxy, trio.open_nursery() as nursery:
        assert proxy.url.startswith("https://127.0.0.1:")
        nursery.start_soon(upstream.behave, lambda call: call.send(CHUNKED + chunk(call.body) + LAST_CHUNK))
        async with httpx.AsyncClient(verify=authority.trusting(), http2=http2, trust_env=False) as client:
            for _ in range(3):
                answer = await client.post(proxy.url + CHAT, content=b'{"x":  1}')
                assert (answer.status_code, answer.content) == (200, b'{"x":  1}')
                assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        nursery.cancel_scope.cancel()
    assert proxy.recorder.outcomes() == ["success"] * 3
    proxy.assert_settled()


@pytest.mark.parametrize("way", ["notice", "fin", "half-close", "reset"])
@pytest.mark.parametrize("phase", ["waiting", "streaming"])
async def test_a_client_that_leaves_closes_the_upstream(
    upstream: Upstream, authority: Authority, way: str, phase: str
) -> None:
    async with tls_proxy(upstream.url, authority) as proxy:
        stream = await connect(proxy, authority, says_goodbye=way == "notice")
        await stream.send_all(POST)
        call = await upstream.call()
        if phase == "streaming":
            await call.send(CHUNKED + chunk(b"data: 1\n\n"))
            await stream.receive_some()
        began = trio.current_time()
        match way:
            case "notice":  # and waits for the answer to it, as asyncio does, before it closes the socket
                with trio.fail_after(2), suppress(trio.BrokenResourceError):
                    await stream.unwrap()
            case "fin":
                await stream.aclose()
            case "half-close":
                stream.transport_stream.socket.shutdown(socket.SHUT_WR)
            case "reset":
                sock = stream.transport_stream.socket
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
        with trio.fail_after(2):
            await call.gone.wait()
        assert trio.current_time() - began < 1
        await proxy.settled()
    assert proxy.recorder.outcomes() == ["cancelled"]


async def test_a_client_that_says_that_it_closes_an_idle_connection_is_answered(
    upstream: Upstream, authority: Authority
) -> None:
    async with tls_proxy(upstream.url, authority) as proxy:
        stream = await connect(proxy, authority)
        await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        with trio.fail_after(3), suppress(trio.BrokenResourceError):
            await stream.unwrap()


async def test_an_idle_connection_is_closed_with_notice_after_a_while(upstream: Upstream, authority: Authority) -> None:
    async with tls_proxy(upstream.url, authority, keep_alive_timeout=0.3) as proxy:
        for asked in (False, True):
            stream = await connect(proxy, authority)
            if asked:
                await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            with trio.fail_after(3):
                assert await stream.receive_some() == b""  # without notice: BrokenResourceError


async def test_a_pipelined_second_request_does_not_hide_that_the_client_has_left(
    upstream: Upstream, authority: Authority
) -> None:
    async with tls_proxy(upstream.url, authority) as proxy:
        stream = await connect(proxy, authority, says_goodbye=False)
        await stream.send_all(POST + POST)
        call = await upstream.call()
        await trio.sleep(0.1)
        await stream.aclose()
        with trio.fail_after(3):
            await call.gone.wait()


async def test_a_client_that_stops_reading_loses_its_slot(upstream: Upstream, authority: Authority) -> None:
    async with tls_proxy(upstream.url, authority, client_write_timeout=0.4) as proxy, trio.open_nursery() as nursery:
        stream = await connect(proxy, authority)
        await stream.send_all(POST)
        call = await upstream.call()
        nursery.start_soon(pump, call)
        with trio.fail_after(20):
            await call.gone.wait()
            await proxy.settled()
    assert proxy.recorder.outcomes() == ["cancelled"]


async def pump(call: Call) -> None:
    """Send without end."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await call.send(CHUNKED)
        while True:
            await call.send(chunk(b"x" * 65536))


@pytest.mark.parametrize("whole", [True, False])
async def test_to_http_1_0_only_a_whole_answer_ends_with_notice(
    upstream: Upstream, authority: Authority, whole: bool
) -> None:
    async with tls_proxy(upstream.url, authority) as proxy:
        stream = await connect(proxy, authority)
        await stream.send_all(b"GET /v1/models HTTP/1.0\r\n\r\n")
        call = await upstream.call()
        await call.send(CHUNKED + chunk(b"data: 1\n\n"))
        received = b""
        with trio.fail_after(20):
            while not received.endswith(b"data: 1\n\n"):
                received += await stream.receive_some()
            if whole:
                await call.send(LAST_CHUNK)
                assert await stream.receive_some() == b""
            else:
                await call.close()
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()


async def test_connections_without_tls_hurt_nobody(upstream: Upstream, authority: Authority) -> None:
    async with tls_proxy(upstream.url, authority) as proxy:
        for nonsense in (POST, b"\x16\x03\x01\x02\x00" + b"x" * 600, b"\0" * 100, b""):
            stream = await proxy.connect()
            await stream.send_all(nonsense)
            if nonsense == POST:
                with trio.fail_after(2), suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
            else:
                await trio.sleep(0.02)
                await stream.aclose()
        assert (await proxy.client.get("/health")).json()["status"] == "ok"
        silent = await proxy.connect()
        await trio.sleep(0.05)
        proxy.server.shut_down()
        with trio.fail_after(2), suppress(trio.BrokenResourceError):
            assert await silent.receive_some() == b""


async def test_serving_over_tls_and_ending_though_a_client_has_stopped_reading(
    upstream: Upstream, authority: Authority
) -> None:
    files = authority.issue()
    variables = {
        "TRIOPROXY_SERVER__TLS__CERT": files["cert"],
        "TRIOPROXY_SERVER__TLS__KEY": files["key"],
        "TRIOPROXY_SERVER__SHUTDOWN_GRACE": "300ms",
        "TRIOPROXY_UPSTREAM__BASE_URL": upstream.url,
    }
    async with running("-m", "trioproxy", "serve", "--bind", "127.0.0.1:0", variables=variables) as process:
        (address,) = (await process.line("listening"))["addresses"]
        assert address.startswith("https://")
        raw = await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2]))
        async with raw, trio.open_nursery() as nursery:
            stream = trio.SSLStream(raw, authority.trusting(), server_hostname="127.0.0.1")
            await stream.send_all(POST)
            nursery.start_soon(pump, await upstream.call())
            await trio.sleep(0.3)
            process.signal(signal.SIGTERM)
            with trio.fail_after(3):
                assert await process.end() == 0


async def test_wrong_files_are_said_and_nothing_started(authority: Authority, tmp_path: Path) -> None:
    config = tmp_path / "proxy.yaml"
    files = authority.issue()
    config.write_text(f"server: {{bind: '127.0.0.1:0', tls: {{cert: {files['cert']}, key: {tmp_path}/none}}}}")
    for command in (["serve", "--config"], ["check-config"]):
        status, output = await run("-m", "trioproxy", *command, str(config))
        assert status == 2
        assert "Traceback" not in output
        assert "listening" not in output
        for text in ("server.tls.key", f"{tmp_path}/none", "No such file", str(config)):
            assert text in output


# The upstream


async def answer_all(upstream: Upstream) -> None:
    await upstream.behave(lambda call: call.answer(b'{"secure": true}'))


async def test_an_upstream_of_a_private_ca(authority: Authority) -> None:
    async with running_upstream(authority.serving()) as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, upstream)
        async with running_proxy(upstream.url, upstream={"ca_file": str(authority.file)}) as proxy:
            for _ in range(3):
                answer = await proxy.client.post(CHAT)
                assert (answer.status_code, answer.content) == (200, b'{"secure": true}')
        assert upstream.connections == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("name", "trusted", "expired", "reason"),
    [
        ("127.0.0.1", False, False, "unable to get local issuer certificate"),
        ("127.0.0.1", True, True, "certificate has expired"),
        ("other.test", True, False, "IP address mismatch"),
    ],
)
async def test_an_upstreams_certificate_that_is_not_accepted(
    authority: Authority, name: str, trusted: bool, expired: bool, reason: str
) -> None:
    tls = authority.serving(name, expires=EXPIRED if expired else None)
    async with running_upstream(tls) as upstream:
        settings = {"ca_file": str(authority.file)} if trusted else {}
        async with running_proxy(upstream.url, upstream=settings) as proxy:
            answer = await proxy.client.post(CHAT)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (502, "upstream_unreachable")
            assert "its certificate is not accepted" in error["message"]
            assert reason in error["message"]
            assert answer.headers["x-should-retry"] == "true"
            assert (await proxy.client.get("/ready")).status_code == 503
        assert upstream.calls == []
    assert proxy.recorder.outcomes() == ["upstream_error"]


async def test_a_ca_file_stands_instead_of_the_public_cas(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path)
    settings = {"ca_file": str(authority.file)}
    async with running_upstream(other.serving()) as upstream, running_proxy(upstream.url, upstream=settings) as proxy:
        assert (await proxy.client.post(CHAT)).status_code == 502
        assert len(proxy.app.proxy.upstream.tls.get_ca_certs()) == 1


async def test_an_upstream_without_tls_where_there_should_be_some() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        async with running_proxy(f"https://127.0.0.1:{listener.socket.getsockname()[1]}/v1") as proxy:
            error = (await proxy.client.post(CHAT)).json()["error"]
            assert error["code"] == "upstream_unreachable"
            assert "wrong version number" in error["message"]
        nursery.cancel_scope.cancel()


async def test_an_upstream_that_asks_for_a_client_certificate(authority: Authority) -> None:
    async with running_upstream(authority.serving(asks_clients=True)) as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, upstream)
        ours = authority.issue("proxy.test")
        trusting = {"ca_file": str(authority.file)}
        known = trusting | {"client_cert": ours["cert"], "client_key": ours["key"]}
        async with running_proxy(upstream.url, upstream=known) as proxy:
            assert (await proxy.client.post(CHAT)).status_code == 200
        async with running_proxy(upstream.url, upstream=trusting) as proxy:
            assert (await proxy.client.post(CHAT)).status_code == 502
        nursery.cancel_scope.cancel()


async def test_that_a_client_certificate_is_missing_is_told(authority: Authority) -> None:
    """The standard library's server says so to its client; trio's closes the connection."""
    context = authority.serving(asks_clients=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection = listener.accept()[0]
            with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as tls:
                with suppress(ssl.SSLError):
                    tls.do_handshake()
                while socket.socket.recv(tls, 65536):  # what is unread when it closes would make a reset of it
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, refuse)
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
            async with running_proxy(url, upstream={"ca_file": str(authority.file)}) as proxy:
                answer = await proxy.client.post(CHAT)
                assert answer.status_code == 502
                assert "certificate required" in answer.json()["error"]["message"]


@pytest.mark.parametrize("cause", ["the time is up", "the client leaves"])
async def test_a_handshake_that_is_not_answered_is_given_up_and_its_connection_closed(cause: str) -> None:
    seconds = 0.2 if cause == "the time is up" else 10
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}/v1"
    async with listener, running_proxy(url, upstream={"connect_timeout": seconds}) as proxy:
        client = await proxy.connect()
        await client.send_all(POST)
        async with await listener.accept() as silent:
            hello = await silent.receive_some()
            assert hello.startswith(b"\x16\x03")
            if seconds < 1:
                answer = b""
                with trio.fail_after(2):
                    while b"0.2 s" not in answer:
                        answer += await client.receive_some()
                assert answer.startswith(b"HTTP/1.1 502")
            else:
                await client.aclose()
            with trio.fail_after(0.5):
                assert await silent.receive_some() == b""
        await proxy.settled()
    assert proxy.recorder.outcomes() == ["upstream_error" if seconds < 1 else "cancelled"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("with_notice", [True, False])
async def test_an_answer_that_ends_by_closing_is_whole_only_with_notice(
    authority: Authority, with_notice: bool, version: ssl.TLSVersion
) -> None:
    tls = authority.serving()
    tls.maximum_version = version
    settings = {"ca_file": str(authority.file)}
    async with (
        running_upstream(tls) as upstream,
        running_proxy(upstream.url, upstream=settings) as proxy,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(end_by_closing, upstream, with_notice)
        if with_notice:
            assert (await proxy.client.post(CHAT)).content == b"up to here"
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                await proxy.client.post(CHAT)
    assert proxy.recorder.outcomes() == ["success" if with_notice else "upstream_error"]


async def end_by_closing(upstream: Upstream, with_notice: bool) -> None:
    call = await upstream.call()
    await call.send(b"HTTP/1.1 200 OK\r\n\r\nup to here")
    assert isinstance(call.stream, trio.SSLStream)
    await (call.stream if with_notice else call.stream.transport_stream).aclose()


async def test_an_answer_of_known_length_is_whole_without_notice(authority: Authority) -> None:
    async with running_upstream(authority.serving()) as upstream, trio.open_nursery() as nursery:

        async def answer(call: Call) -> None:
            await call.answer(b"whole")
            await call.close()

        nursery.start_soon(upstream.behave, answer)
        async with running_proxy(upstream.url, upstream={"ca_file": str(authority.file)}) as proxy:
            assert (await proxy.client.post(CHAT)).content == b"whole"
            nursery.cancel_scope.cancel()
