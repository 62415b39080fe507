"""`trioproxy serve`: the application on Hypercorn's own parts, with what an ASGI application cannot do for itself.

Hypercorn's `trio.serve()` lets one connection's exception end the process, shields its writes from cancellation (a
client that stops reading holds its task for ever) and stops listening before `/ready` could say why. So the server is
put together here from Hypercorn's `WorkerContext`, `Lifespan` and a `TCPServer` with protocols of ours, none of them
patched, with an `except` around each connection, a `GuardedStream` below it, and a shutdown in two phases.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import ssl
import struct
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
from trioproxy.connection import DRAIN_SECONDS, GUARD
from trioproxy.errors import Headers
from trioproxy.flag import Flag
from trioproxy.protocols import PARSER, HttpServer, Parser, Refusing

log = structlog.get_logger()

HEADERS_SIZE_MAX: Final = 64 * 1024
UPLOAD_PIECES_MAX: Final = 2
"""How many pieces of an upload may wait for being taken, of 64 KiB at most each."""

LOOK_SECONDS: Final = 1.0
"""How often is looked for connections that have been idle for too long, and for clients that have gone unseen in long
exchanges, and how long is long."""

OVERHEARD_BYTES_MAX: Final = 256
"""How much of each write is overheard: more than a WebSocket's control frame (RFC 6455 section 5.5)."""

TLS_HANDSHAKE_SECONDS: Final = 20.0
"""How long a client may take to agree on TLS."""

GOODBYE_SECONDS: Final = 1.0
"""How long WebSocket sessions may take to be closed at the end of the shutdown's grace."""

CLOSING_SECONDS: Final = 0.5
"""How long a connection's tasks may go on after its client has closed it."""

UNWANTED_SIZE: Final = 64 * 1024

_GONE: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class GuardedStream(trio.abc.HalfCloseableStream):
    """The socket below one of Hypercorn's connections.

    A write without progress for `write_timeout` seconds is given up, inside whatever shield it is called, and the
    socket closed: Hypercorn takes that for a disconnect.
    """

    def __init__(self, stream: trio.SocketStream, write_timeout: float, activity: Activity) -> None:
        self.socket: Final = stream.socket
        self.scope: Final = trio.CancelScope()
        """Around all of the connection's tasks."""
        self.relaying = False
        """Whether the exchange is going to be counted as a request, however it ends."""
        self.more_follows = False
        """Whether what is being sent can wait for what is sent next."""
        self._stream = stream
        self._write_timeout = write_timeout
        self._activity = activity
        self._sending: trio.CancelScope | None = None
        self._exchanges: dict[Callable[[], None], float] = {}
        self._resetting = False
        self._told: Callable[[bytes], None] | None = None
        self._held_back: trio.Event | None = None
        self._throwing_away = False
        self.encrypted = False
        """Whether what is sent here is encrypted already."""
        self._lingering = False
        self._throwing_rest_away = False
        self._reading = False
        self._read_over: trio.Event | None = None
        """Set when the read that is under way is over, if somebody waits for that."""
        self._gone = Flag()
        self._writes_until = math.inf
        activity.rest(self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, shielded from cancellation as Hypercorn expects it.

        Raises `BrokenResourceError` when the client has gone or does not read.
        """
        if self._resetting:
            # TLS's notice of closing would make the end look clean.
            raise trio.BrokenResourceError
        if not self.encrypted:
            self.tell(data)
        try:
            rest = memoryview(data)[sockets.send_at_once(self.socket, data) :]
        except trio.BrokenResourceError:
            self.leave()
            raise
        if not rest:
            return
        with trio.CancelScope(shield=True) as self._sending:
            while rest:
                self._sending.deadline = min(trio.current_time() + self._write_timeout, self._writes_until)
                try:
                    sent = await self.socket.send(rest)
                except (OSError, trio.ClosedResourceError) as error:
                    self.leave()
                    raise trio.BrokenResourceError from error
                rest = rest[sent:]
        if self._sending.cancelled_caught:
            self.abort()
            if not self._gone.is_set():
                self.leave()
            raise trio.BrokenResourceError

    @property
    def sends_alone(self) -> bool:
        """Whether `send_all` may be called without Hypercorn's shield, and without giving others their turn before.

        Before the application has taken a request on, it must have had its turn.
        """
        return not self.encrypted and bool(self._exchanges)

    async def wait_send_all_might_not_block(self) -> None:
        """As the socket says."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has come from the client; b"" when it has closed its side."""
        if self._throwing_rest_away:
            await self._gone.wait()
            return b""
        data = await self._read(max_bytes)
        if data and self._held_back is not None:
            await self._held_back.wait()
        while data and self._throwing_away:
            data = await self._read(max_bytes)
        return data

    async def _read(self, max_bytes: int | None) -> bytes:
        self._reading = True
        try:
            data = await sockets.receive(self.socket, max_bytes or UNWANTED_SIZE)
        except trio.BrokenResourceError:
            self.leave()
            raise
        finally:
            self._reading = False
            if self._read_over is not None:
                self._read_over.set()
        if not data:
            self.leave()
        return b"" if self.scope.cancel_called else data  # nothing is begun where all is about to end

    async def send_eof(self) -> None:
        """Close our side, unless the connection is to end with a reset."""
        if not self._resetting:
            await self._stream.send_eof()
            await self.linger()

    async def linger(self) -> None:
        """If so asked, throw away what the client still sends, until it has closed its side, or for a while."""
        if not self._lingering:
            return
        self._throwing_rest_away = True
        with trio.move_on_after(DRAIN_SECONDS):
            while not self._gone.is_set():
                if self._reading:
                    self._read_over = trio.Event()
                    await self._read_over.wait()
                else:
                    await self._read(UNWANTED_SIZE)

    async def aclose(self) -> None:
        """Close the socket."""
        self._gone.set()
        await self._stream.aclose()

    def watch(self, leave: Callable[[], None]) -> None:
        """Call `leave` as soon as the client is seen to have gone, also while nobody reads from it."""
        self._exchanges[leave] = trio.current_time()
        self._writes_until = math.inf
        self._activity.began(self)

    def unwatch(self, leave: Callable[[], None]) -> None:
        """The exchange is over."""
        del self._exchanges[leave]
        if not self._exchanges:  # else the next one has begun
            self.relaying = self.more_follows = False
        self._activity.ended(self, idle=not self._exchanges)

    def stir(self) -> None:
        """A request has been read, which may become an exchange: the connection does not rest any more."""
        self._activity.forget(self)

    def settle(self) -> None:
        """Nothing is going to come of what has been read, or it is over."""
        if not self._exchanges:
            self._activity.rest(self)

    def is_long(self, now: float) -> bool:
        """Whether an exchange has been going on for long enough to be looked at."""
        return any(now - began >= LOOK_SECONDS for began in self._exchanges.values())

    def limit_writes(self, until: float) -> None:
        """No write of this exchange goes on beyond that time: Hypercorn shields it from every deadline outside."""
        self._writes_until = until

    def reset_on_close(self) -> None:
        """Close the connection with a reset, so that an end that is told by closing alone does not look clean."""
        self._resetting = True
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def overhear(self, told: Callable[[bytes], None]) -> None:
        """Call `told` with the beginning of whatever is sent, before it is, as it was before encryption."""
        self._told = told

    def tell(self, data: bytes | bytearray | memoryview) -> None:
        """This is about to be sent."""
        if self._told is not None:
            self._told(bytes(data[:OVERHEARD_BYTES_MAX]))

    def hold_back(self) -> None:
        """Keep what comes from the client from now on until `let_through` or `throw_away`."""
        self._held_back = trio.Event()

    def let_through(self) -> None:
        """Stop holding back."""
        if self._held_back is not None:
            self._held_back.set()
            self._held_back = None

    def throw_away(self) -> None:
        """From now on, throw away what comes from the client, and what was held back."""
        self._throwing_away = True
        self.let_through()

    def linger_on_close(self) -> None:
        """The client is still sending: closing at once would make its kernel throw our answer away (RFC 9112 9.6)."""
        self._lingering = True

    def leave(self) -> None:
        """The client has gone: stop what is done for it, and soon everything else on this connection."""
        for leave in list(self._exchanges):
            leave()
        if self._sending is not None:
            self._sending.cancel(reason="the client has gone")
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + CLOSING_SECONDS)
        self._gone.set()

    def abort(self) -> None:
        """Close the socket now; whoever uses it gets an error, and a client that waits for something a reset."""
        if self._exchanges and self.socket.fileno() != -1:
            self.reset_on_close()
        self.socket.close()


class TlsStream:
    """TLS on top of a `GuardedStream`, as Hypercorn wants it.

    Unlike Hypercorn's own it says that it closes (RFC 9112 section 9.8), and takes that from a client as its leaving:
    some close the socket only when they have been answered.
    """

    def __init__(self, guarded: GuardedStream, context: ssl.SSLContext) -> None:
        self.transport_stream: Final = guarded
        guarded.encrypted = True
        self._tls = trio.SSLStream(guarded, context, server_side=True)

    async def do_handshake(self) -> None:
        """Agree on keys and protocol. Raises `BrokenResourceError` with a client that cannot."""
        await self._tls.do_handshake()

    def selected_alpn_protocol(self) -> str | None:
        """The protocol agreed on: "h2" for HTTP/2."""
        protocol: str | None = self._tls.selected_alpn_protocol()
        return protocol

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. Raises `BrokenResourceError` when the client has gone or does not read."""
        self.transport_stream.tell(data)
        await self._tls.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has come from the client; b"" when it has closed its side."""
        data = await self._tls.receive_some(max_bytes)
        if not data:
            self.transport_stream.leave()
        return bytes(data)

    async def send_eof(self) -> None:
        """Close our side: in TLS that is done by `aclose`, before which a client may be let finish."""
        await self.transport_stream.linger()

    async def aclose(self) -> None:
        """Close the connection, with notice if the client takes it at once, also when it has been idle for too long."""
        with trio.move_on_after(CLOSING_SECONDS, shield=True):
            await self._tls.aclose()


class Activity:
    """Which connections have an exchange going on, and which rest, for `idle_timeout` seconds at most."""

    def __init__(self, idle_timeout: float = math.inf) -> None:
        self.idle_timeout = idle_timeout
        self.streams: set[GuardedStream] = set()
        """Those with an exchange."""
        self._resting: dict[GuardedStream, float] = {}  # since when, longest first
        self._count = 0
        self._idle = trio.Event()
        self._idle.set()

    def began(self, stream: GuardedStream) -> None:
        """An exchange has begun there."""
        self.streams.add(stream)
        self.forget(stream)
        if not self._count:
            self._idle = trio.Event()
        self._count += 1

    def ended(self, stream: GuardedStream, *, idle: bool) -> None:
        """An exchange is over; `idle`: it was the last one there."""
        if idle:
            self.streams.discard(stream)
            self.rest(stream)
        self._count -= 1
        if not self._count:
            self._idle.set()

    def rest(self, stream: GuardedStream) -> None:
        """Nothing goes on there from now on."""
        self.forget(stream)  # its place is behind all others, also if it has rested before
        self._resting[stream] = trio.current_time()

    def forget(self, stream: GuardedStream) -> None:
        """It is closed, or does not rest any more."""
        self._resting.pop(stream, None)

    async def wait_idle(self) -> None:
        """Return once no exchange is going on."""
        while self._count:
            await self._idle.wait()

    async def look_around(self) -> None:
        """Now and then, end what has been idle for too long, and look for clients that have gone unseen."""
        while True:
            await trio.sleep(min(LOOK_SECONDS, self.idle_timeout))
            now = trio.current_time()
            self._look_for_the_gone(now)
            self._end_idle(now)

    def _end_idle(self, now: float) -> None:
        while self._resting:
            stream, since = next(iter(self._resting.items()))
            if now - since < self.idle_timeout:
                break
            del self._resting[stream]
            stream.scope.cancel(reason="idle for too long")

    def _look_for_the_gone(self, now: float) -> None:
        """Look at long exchanges for clients that have closed while nobody was reading from their sockets.

        Hypercorn does not read while another request of the same connection waits, nor while an upload is not taken.
        """
        by_descriptor = {stream.socket.fileno(): stream for stream in self.streams if stream.is_long(now)}
        by_descriptor.pop(-1, None)
        poll = select.poll()
        for descriptor in by_descriptor:
            poll.register(descriptor, _GONE & ~(select.POLLHUP | select.POLLERR))
        for descriptor, _ in poll.poll(0):
            by_descriptor[descriptor].leave()


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
