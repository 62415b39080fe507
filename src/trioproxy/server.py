"""`trioproxy serve`: the application on Hypercorn's own parts, with what an ASGI application cannot do for itself.

Hypercorn's `trio.serve()` lets one connection's exception end the process, shields its writes from cancellation (a
client that stops reading holds its task for ever) and stops listening before `/ready` could say why. So the server is
put together here from Hypercorn's `WorkerContext`, `Lifespan` and a `TCPServer` with protocols of ours, none of them
patched, with an `except` around each connection, a `GuardedStream` below it, and a shutdown in two phases.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from typing import Final

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ConnectionState, LifespanState, Scope
from hypercorn.utils import repr_socket_addr

from trioproxy import sockets
from trioproxy.app import ProxyApp
from trioproxy.config import Settings
from trioproxy.connection import GUARD
from trioproxy.errors import Headers
from trioproxy.protocols import PARSER, HttpServer, Parser, Refusing
from trioproxy.streams import Activity, GuardedStream, TlsStream

log = structlog.get_logger()

HEADERS_SIZE_MAX: Final = 64 * 1024
UPLOAD_PIECES_MAX: Final = 2
"""How many pieces of an upload may wait for being taken, of 64 KiB at most each."""

TLS_HANDSHAKE_SECONDS: Final = 20.0
"""How long a client may take to agree on TLS."""

GOODBYE_SECONDS: Final = 1.0
"""How long WebSocket sessions may take to be closed at the end of the shutdown's grace."""


class Server:
    """One application on its sockets, until it is told to shut down."""

    def __init__(self, app: ProxyApp, settings: Settings) -> None:
        """Binds the sockets. Raises OSError if one cannot be had."""
        self._app = app
        self._config = _hypercorn_config(settings)
        self._tls = self._config.create_ssl_context()
        sockets = self._config.create_sockets()
        self._sockets = sockets.insecure_sockets if self._tls is None else sockets.secure_sockets
        self._is_reachable = not all(_is_local(sock.getsockname()) for sock in self._sockets)
        self._context = WorkerContext(None)
        self._streams: set[GuardedStream] = set()
        self._activity = Activity(settings.server.keep_alive_timeout)
        self._told = (trio.Event(), trio.Event())

    @property
    def settings(self) -> Settings:
        """What is in force."""
        return self._app.proxy.settings

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings: connections with those that concern them from the next one on, all else at once.

        Addresses, and whether TLS is spoken, must stay. Raises OSError (SSLError is one), and nothing has changed, if
        the certificate or its key cannot be used.
        """
        config = _hypercorn_config(settings)
        self._tls = config.create_ssl_context()
        self._config = config
        self._activity.idle_timeout = settings.server.keep_alive_timeout
        self._app.proxy.reconfigure(settings)
        self._warn_if_open()

    def shut_down(self) -> None:
        """The first call drains: requests that are here go on, new ones are refused. The second ends at once."""
        drain, at_once = self._told
        (at_once if drain.is_set() else drain).set()

    async def run(self, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until shut down; `task_status` gets the addresses that are listened on, as URLs."""
        state: LifespanState = {}
        lifespan = Lifespan(self._call_app, self._config, state)
        async with trio.open_nursery() as lifespan_nursery:
            await lifespan_nursery.start(lifespan.handle_lifespan)
            await lifespan.wait_for_startup()
            async with self._app.app_context(), trio.open_nursery() as connections:  # so that no request opens its own
                await self._listen_until_told(connections, task_status)
            await lifespan.wait_for_shutdown()
            lifespan_nursery.cancel_scope.cancel()

    def _call_app(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable, *_: object, **__: object
    ) -> Coroutine[None, None, None]:
        """What Hypercorn calls for its lifespan, and for each request and WebSocket."""
        return self._app.asgi_app(scope, receive, send)

    async def _listen_until_told(self, connections: trio.Nursery, task_status: trio.TaskStatus[list[str]]) -> None:
        listeners = []
        for sock in self._sockets:
            sock.listen(self.settings.server.backlog)
            listeners.append(sockets.Listener(sock))
        addresses = [_url(sock, "http" if self._tls is None else "https") for sock in self._sockets]
        async with trio.open_nursery() as listening:
            listening.start_soon(self._activity.look_around)
            serve = trio.serve_listeners
            await listening.start(
                lambda task_status: serve(
                    self._serve_connection, listeners, handler_nursery=connections, task_status=task_status
                )
            )
            log.info("listening", addresses=addresses)
            self._warn_if_open()
            task_status.started(addresses)
            await self._drain()
            listening.cancel_scope.cancel()
        await self._context.terminated.set()
        for stream in list(self._streams):
            stream.leave()
            stream.abort()
        connections.cancel_scope.cancel()

    def _warn_if_open(self) -> None:
        if self._is_reachable and self.settings.upstream.api_key is not None and not self.settings.keys:
            log.warning(
                "open to anyone who can connect",
                meaning="whoever reaches this address may spend the upstream's key: add client keys ('keys' in the "
                "configuration, `trioproxy keys new NAME`), or listen on 127.0.0.1 alone",
                bind=list(self.settings.server.bind),
            )

    async def _drain(self) -> None:
        """Wait for being told to shut down, and then for what is going on, as long as it may."""
        drain, at_once = self._told
        await drain.wait()
        self._app.proxy.scheduler.close()
        grace = self.settings.server.shutdown_grace
        log.info("shutting down", grace_seconds=grace)
        async with trio.open_nursery() as nursery:

            async def end(wait: Callable[[], object]) -> None:
                await wait()  # type: ignore[misc]
                nursery.cancel_scope.cancel()

            nursery.cancel_scope.deadline = trio.current_time() + grace
            nursery.start_soon(end, at_once.wait)
            nursery.start_soon(end, self._activity.wait_idle)
        with trio.move_on_after(0 if at_once.is_set() else GOODBYE_SECONDS):
            await self._app.proxy.websockets.say_goodbye()

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        limits = self.settings.server
        guarded = GuardedStream(stream, limits.client_write_timeout, self._activity)
        self._streams.add(guarded)
        parser = Parser(self._refuser(guarded), limits.client_write_timeout, guarded)
        state = ConnectionState({GUARD: guarded, PARSER: parser})
        try:
            with guarded.scope:
                outer = guarded if self._tls is None else TlsStream(guarded, self._tls)
                await HttpServer(self._call_app, self._config, self._context, state, outer).run()
        except Exception as error:
            log.warning("a connection failed", exc_info=error, error=repr(error))
        finally:
            self._streams.discard(guarded)
            self._activity.forget(guarded)
            # Hypercorn does not come to closing it when it is cancelled.
            guarded.abort()

    def _refuser(self, guarded: GuardedStream) -> Refusing:
        def refuse(reason: str, method: str, path: str) -> tuple[int, Headers, bytes]:
            guarded.linger_on_close()
            return self._app.proxy.refuse_unread(reason, method, path, counted=guarded.relaying)

        return refuse


def _hypercorn_config(settings: Settings) -> Config:
    config = Config()
    config.bind = list(settings.server.bind)
    config.backlog = settings.server.backlog
    config.keep_alive_timeout = settings.server.keep_alive_timeout
    config.keep_alive_max_requests = 2**31
    config.h11_max_incomplete_size = HEADERS_SIZE_MAX
    config.h2_max_header_list_size = HEADERS_SIZE_MAX
    config.max_app_queue_size = UPLOAD_PIECES_MAX
    config.websocket_max_message_size = settings.server.websocket_max_message_size
    # Field names, Date and Server are the upstream's.
    config.h11_pass_raw_headers = True
    config.include_date_header = False
    config.include_server_header = False
    if settings.server.tls.cert is not None and settings.server.tls.key is not None:
        config.certfile = str(settings.server.tls.cert)
        config.keyfile = str(settings.server.tls.key)
        config.ssl_handshake_timeout = TLS_HANDSHAKE_SECONDS
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


def _is_local(address: object) -> bool:
    """Whether only this machine can connect to what a socket is bound to."""
    return not isinstance(address, tuple) or ip_address(str(address[0]).partition("%")[0]).is_loopback


def _url(sock: socket.socket, scheme: str) -> str:
    address = repr_socket_addr(sock.family, sock.getsockname())
    return address if sock.family == socket.AF_UNIX else f"{scheme}://{address}"
