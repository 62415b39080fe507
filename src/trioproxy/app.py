"""The application: registered Quart-trio handlers, and the one place where everything is joined.

The handlers read what is asked, answer what they can, and hand every request under `/v1/` over by returning a `Relay`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, cast

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from quart import has_request_context, websocket
from quart import request as quart_request
from quart.ctx import RequestContext
from quart.routing import QuartRule
from quart.sessions import NullSession
from quart.typing import ResponseReturnValue
from quart.wrappers import Request as QuartRequest
from quart.wrappers import Response
from quart.wrappers.base import BaseRequestWebsocket
from quart_trio import QuartTrio
from werkzeug.datastructures import Headers as WerkzeugHeaders
from werkzeug.exceptions import HTTPException, InternalServerError
from werkzeug.routing import BaseConverter, MapAdapter
from werkzeug.wrappers import Response as WerkzeugResponse

from trioproxy import __version__, body, errors, request
from trioproxy.admin import Probes
from trioproxy.config import KeySettings, Settings
from trioproxy.connection import Connection, Exchange, Request
from trioproxy.errors import Headers, ProxyError
from trioproxy.events import Listener, Publisher, Refused, RequestFacts, ScheduledRequest
from trioproxy.keys import KeyRing, check_expiry, check_model, queried_model
from trioproxy.observe.logs import RequestLog
from trioproxy.observe.metrics import Metrics
from trioproxy.relay import Relay
from trioproxy.routes import RouteTable
from trioproxy.scheduler import FixedLimit, Scheduler, ShareLimits
from trioproxy.upstream import Upstream
from trioproxy.websocket import Places, Session
from trioproxy.websocket_connection import Handshake, WebSocket, WebSocketConnection

log = structlog.get_logger()

HOUSEKEEPING_SECONDS: Final = 5.0


class Proxy:
    """The parts of one running proxy, and the handlers' logic."""

    def __init__(
        self,
        settings: Settings,
        listeners: tuple[Listener, ...],
        upstream: Upstream | None,
        dropped_lines: Callable[[], int],
    ) -> None:
        self.settings = settings
        limits = settings.scheduler
        self.metrics = Metrics(
            limits.concurrency,
            limits.max_queue,
            limits.queue_timeout,
            clock=trio.current_time,
            dropped_lines=dropped_lines,
        )
        self._failed_listeners: set[int] = set()
        self.publisher = Publisher((self.metrics, RequestLog(), *listeners), self._listener_failed)
        self.scheduler = Scheduler(
            FixedLimit(limits.concurrency), limits.max_queue, limits.queue_timeout, self.publisher, _shares(settings)
        )
        self.upstream = upstream or Upstream(settings.upstream)
        self.routes = RouteTable(limits.routes)
        self.keys = KeyRing(settings.keys)
        self.metrics.name_keys(key.name for key in settings.keys)
        self.probes = Probes(self.scheduler, self.upstream)
        self.websockets = Places(settings.server.max_websockets)

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings, from this moment. What `trioproxy.reload` says needs a restart stays as it is."""
        before, limits = self.settings.scheduler, settings.scheduler
        self.settings = settings
        self.routes = RouteTable(limits.routes)
        self.keys = KeyRing(settings.keys)
        self.upstream.reconfigure(settings.upstream)
        self.websockets.limit = settings.server.max_websockets
        self.scheduler.queue_timeout = limits.queue_timeout
        self.metrics.queue_timeout_changed(limits.queue_timeout)
        self.metrics.name_keys(key.name for key in settings.keys)
        if (limits.concurrency, limits.max_queue) != (before.concurrency, before.max_queue):
            self.scheduler.resize(concurrency=limits.concurrency, max_queue=limits.max_queue, shares=_shares(settings))
        else:
            self.scheduler.set_shares(_shares(settings))

    async def relay(self, exchange: Exchange) -> Relay | Response:
        """What to do about a request under `/v1/`: hand it over, or say what is wrong with it."""
        head = exchange.head
        try:
            request.check(head)
            key = self._identify(exchange, ())
            if self.routes.is_scheduled(head.method, head.rest):
                relay = await self._scheduled(exchange, key)
            else:
                if head.http_version == "2" and head.content_length is None:
                    await exchange.learn_of_body()
                relay = self._relay(exchange, self._facts(exchange), None)
        except ProxyError as error:
            return self.refuse(exchange, error)
        return relay

    def session(self, handshake: Handshake) -> Session | Response:
        """What to do about a WebSocket's handshake under `/v1/`: hand it over, or say what is wrong with it."""
        try:
            request.check(handshake.head)
            check_model(self._identify(handshake, handshake.subprotocols), queried_model(handshake.head))
        except ProxyError as error:
            return self.refuse(handshake, error)
        limits = self.settings.server
        return Session(
            head=handshake.head,
            facts=self._facts(handshake),
            subprotocols=handshake.subprotocols,
            places=self.websockets,
            scheduler=self.scheduler,
            upstream=self.upstream,
            publisher=self.publisher,
            idle_timeout=limits.websocket_idle_timeout,
            max_message_size=limits.websocket_max_message_size,
        )

    def refuse(self, exchange: Exchange | Handshake, error: ProxyError) -> Response:
        """Answer a request that is not going to be scheduled, and say so to the listeners."""
        self.publisher.publish(Refused(self._facts(exchange), trio.current_time(), error.ending, str(error)))
        return _response(error, exchange.head.request_id)

    def refuse_unread(self, reason: str, method: str, path: str, *, counted: bool) -> tuple[int, Headers, bytes]:
        """Answer what the parser could not read: status, headers, body. `counted`: the request counts as another."""
        request_id = request.new_request_id()
        error = ProxyError(errors.INVALID_REQUEST, reason=f"The request cannot be read: {reason}.")
        if not counted:
            now = trio.current_time()
            facts = RequestFacts(request_id=request_id, method=method, path=path, arrived=now)
            self.publisher.publish(Refused(facts, now, error.ending, str(error)))
        return request.refusal(error, request_id, random.random())

    async def housekeeping(self, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED) -> None:
        """What has to be done now and then, until cancelled."""
        with trio.CancelScope() as scope:
            task_status.started(scope)
            while True:
                await trio.sleep(HOUSEKEEPING_SECONDS)
                self.check_invariants()
                self.upstream.end_overdue()
                await self.upstream.close_expired()

    def check_invariants(self) -> None:
        """Compare slots, queue, tasks and metrics with each other; what does not agree is counted and logged."""
        counted = self.metrics.violations(self.scheduler.running, self.scheduler.queued)
        for violation in (*self.scheduler.violations(), *counted):
            self.metrics.invariant_violated()
            log.error("an invariant does not hold", error=violation)

    def _listener_failed(self, listener: Listener, error: Exception) -> None:
        self.metrics.listener_failed()
        if id(listener) not in self._failed_listeners:
            self._failed_listeners.add(id(listener))
            log.error("a listener failed", listener=repr(listener), exc_info=error, error=repr(error))

    def _facts(self, exchange: Exchange | Handshake) -> RequestFacts:
        head = exchange.head
        return RequestFacts(
            request_id=head.request_id,
            method=head.method,
            path=head.path.decode("latin-1"),
            arrived=exchange.arrived,
            key=exchange.key_name,
            bytes_in=head.content_length,
        )

    def _relay(self, exchange: Exchange, facts: RequestFacts, content: bytes | None) -> Relay:
        return Relay(
            head=exchange.head,
            facts=facts,
            body=content,
            scheduler=self.scheduler,
            upstream=self.upstream,
            publisher=self.publisher,
        )

    def _identify(self, exchange: Exchange | Handshake, subprotocols: Iterable[str]) -> KeySettings | None:
        """Whose key the request came with; None if there are no keys. Raises `ProxyError`: INVALID_API_KEY."""
        key = self.keys.identify(exchange.head, subprotocols)
        exchange.key_name = None if key is None else key.name
        check_expiry(key, datetime.now(UTC))
        return key

    async def _scheduled(self, exchange: Exchange, key: KeySettings | None) -> Relay:
        """Read the body and what it says. A body that is not there before the deadline stays unread: the scheduler
        refuses the request then."""
        head, limits = exchange.head, self.settings.scheduler
        if (by_header := request.read_header_priority(head)) is not None:
            request.allowed_priority(by_header, key)  # a wrong one need not wait for the body
        timeout = request.read_timeout(head)
        deadline = exchange.arrived + timeout if timeout is not None else float("inf")
        content = await exchange.read_body(self.settings.server.max_body_size, deadline)
        reading = self._read(exchange, content or b"", key)
        if content is not None:
            check_model(key, reading.model)
            if key is not None and key.models is not None and reading.model is not None:
                self._check_one_model(exchange, content, key)
        facts = ScheduledRequest(
            request_id=head.request_id,
            method=head.method,
            path=head.path.decode("latin-1"),
            arrived=exchange.arrived,
            key=exchange.key_name,
            bytes_in=len(content or b""),
            model=reading.model,
            stream=reading.stream,
            priority=request.read_priority(head, reading, key, limits),
            deadline=deadline,
        )
        return self._relay(exchange, facts, reading.forwarded)

    def _check_one_model(self, exchange: Exchange, content: bytes, key: KeySettings) -> None:
        """What was judged must be what the upstream reads, whichever of several it takes."""
        if request.form_boundary(exchange.head) is None and not body.names_one_model(content):
            check_model(key, None)

    def _read(self, exchange: Exchange, content: bytes, key: KeySettings | None) -> body.Reading:
        """What the body says; of a form, which takes long to read, only what somebody needs to know."""
        try:
            reading = body.read(content)
        except body.TooDeepError as error:
            raise ProxyError(errors.INVALID_REQUEST, reason=str(error)) from error
        model_matters = self.settings.scheduler.model_priorities or (key is not None and key.models is not None)
        if model_matters and (boundary := request.form_boundary(exchange.head)) is not None:
            return replace(reading, model=body.read_form(content, boundary))
        return reading


def _shares(settings: Settings) -> dict[str, ShareLimits]:
    """What the client keys that have limits of their own may have at once."""
    return {
        key.name: ShareLimits(max_concurrency=key.max_concurrency, max_queue=key.max_queue)
        for key in settings.keys
        if key.max_concurrency is not None or key.max_queue is not None
    }


_NO_SESSION: Final = NullSession()

_REMEMBERED_MAX: Final = 256
_REMEMBERED_LENGTH_MAX: Final = 128
"""How many paths Quart's routing is asked for only once, and how long ones."""


class Rest(BaseConverter):
    """Whatever follows `/v1`, empty segments and all."""

    regex = r"(?:/[\s\S]*)?"
    part_isolating = False


class Context(RequestContext):
    """Quart's context of a request, but that routing is not asked again for what it has just found."""

    def match_request(self) -> None:
        """Find the handler, by the path and the method."""
        asked = self.request
        try:
            asked.url_rule, found = cast(ProxyApp, self.app).find(asked.path, asked.method)
        except HTTPException as error:
            asked.routing_exception = error
        else:
            asked.view_args = dict(found)


class ProxyApp(QuartTrio):
    """The Quart-trio application; `proxy` holds its parts."""

    asgi_http_class = Connection
    request_class = Request
    asgi_websocket_class = WebSocketConnection  # type: ignore[assignment]
    websocket_class = WebSocket
    proxy: Proxy

    def __init__(self, import_name: str) -> None:
        super().__init__(import_name, static_folder=None)
        self.url_map.merge_slashes = False
        self.url_map.converters["rest"] = Rest
        self._adapter = self.url_map.bind("", query_args="")
        self._found = lru_cache(_REMEMBERED_MAX)(self._find)

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Routes are found by the path alone, as it was sent: no host name and no query has a say."""
        if isinstance(request, QuartRequest):
            return self._adapter
        if request is None:
            return super().create_url_adapter(None)
        return self.url_map.bind("", path_info=request.path, url_scheme=request.scheme, query_args="")

    def request_context(self, request: QuartRequest) -> RequestContext:
        """Quart's, with a session that need not be opened: there are none here."""
        return Context(self, request, _NO_SESSION)

    async def do_teardown_request(
        self, exc: BaseException | None, request_context: RequestContext | None = None
    ) -> None:
        """Nobody wants to know here."""

    def find(self, path: str, method: str) -> tuple[QuartRule, Mapping[str, Any]]:
        """The rule for a request, and what its handler is called with. Raises HTTPException."""
        find = self._found if len(path) + len(method) <= _REMEMBERED_LENGTH_MAX else self._find
        return find(path, method)

    def _find(self, path: str, method: str) -> tuple[QuartRule, Mapping[str, Any]]:
        rule, found = self._adapter.match(path, method, return_rule=True)
        return cast(QuartRule, rule), found

    async def full_dispatch_request(self, request_context: RequestContext | None = None) -> Response | WerkzeugResponse:
        """Run the handler. There are no hooks, no signals and no cookies around it here."""
        result: object
        try:
            result = cast(object, await self.dispatch_request(request_context))
        except (Exception, BaseExceptionGroup) as error:
            result = await self.handle_user_exception(error)
        if isinstance(result, Relay):  # which `Connection` takes for a response
            return cast(Response, result)
        return await self.make_response(cast(ResponseReturnValue, result))

    def asgi_app(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> Coroutine[None, None, None]:
        """Quart's, in fewer steps for a request; refuses to start under a server that does not run on trio."""
        if scope["type"] == "http":
            return self.asgi_http_class(self, scope)(receive, send)
        if scope["type"] == "lifespan" and not trio.lowlevel.in_trio_run():
            return self._refuse_to_start(receive, send)
        return super().asgi_app(scope, receive, send)

    async def _refuse_to_start(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        await receive()
        message = "trioproxy needs a server that runs on trio: start Hypercorn with --worker-class trio"
        log.error("the server cannot be used", error=message)
        await send({"type": "lifespan.startup.failed", "message": message})


def create_app(
    settings: Settings,
    listeners: tuple[Listener, ...] = (),
    upstream: Upstream | None = None,
    dropped_lines: Callable[[], int] = int,
) -> ProxyApp:
    """Join everything. `listeners` are told of every event, after metrics and log; `upstream` replaces the real one.

    `dropped_lines` tells how many log lines have been lost.
    Raises `ConfigError` if the settings do not fit the machine.
    """
    app = ProxyApp("trioproxy")
    # A body's size and time, and an answer's, are limited by the proxy's own settings.
    app.config.update(MAX_CONTENT_LENGTH=None, BODY_TIMEOUT=None, RESPONSE_TIMEOUT=None)
    proxy = app.proxy = Proxy(settings, listeners, upstream, dropped_lines)
    _register_handlers(app, proxy)
    _register_lifespan(app, proxy)
    return app


def _register_handlers(app: ProxyApp, proxy: Proxy) -> None:
    def current_exchange() -> Exchange:
        return cast(Request, quart_request._get_current_object()).exchange  # type: ignore[attr-defined]

    def current_handshake() -> Handshake:
        return cast(WebSocket, websocket._get_current_object()).handshake  # type: ignore[attr-defined]

    # Without a list of methods a rule matches every one, custom ones too.
    app.url_map.add(app.url_rule_class("/v1<rest:rest>", endpoint="v1", methods=None))

    @app.endpoint("v1")
    async def v1(rest: str) -> Response:
        return cast(Response, await proxy.relay(current_exchange()))

    app.url_map.add(app.url_rule_class("/v1<rest:rest>", endpoint="v1-websocket", methods=None, websocket=True))

    @app.endpoint("v1-websocket")
    async def v1_websocket(rest: str) -> Response:
        return proxy.session(current_handshake())

    @app.get("/health", provide_automatic_options=False)
    async def health() -> dict[str, object]:
        return proxy.probes.health()

    @app.get("/ready", provide_automatic_options=False)
    async def ready() -> tuple[dict[str, object], int]:
        return proxy.probes.ready()

    @app.get("/metrics", provide_automatic_options=False)
    async def metrics() -> Response:
        accept = b",".join(current_exchange().head.values(b"accept")).decode("latin-1")
        exposition, content_type = proxy.metrics.expose(accept)
        return Response(exposition, headers={"content-type": content_type})

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        exchange = current_exchange() if has_request_context() else current_handshake()
        if isinstance(error, InternalServerError):
            request_id = exchange.head.request_id
            log.error("internal error", request_id=request_id, exc_info=error.original_exception, error=repr(error))
            return _response(ProxyError(errors.INTERNAL_ERROR, request_id=request_id), request_id)
        path = exchange.head.path.decode("latin-1")
        return proxy.refuse(exchange, ProxyError(errors.NOT_FOUND, method=exchange.head.method, path=path))


def _register_lifespan(app: ProxyApp, proxy: Proxy) -> None:
    housekeeping: trio.CancelScope

    @app.before_serving
    async def begin() -> None:
        nonlocal housekeeping
        housekeeping = await app.nursery.start(proxy.housekeeping)
        proxy.probes.serving = True
        url = proxy.settings.upstream.base_url
        log.info("started", version=__version__, upstream=url, forward_proxy=proxy.upstream.forward_proxy)
        if not proxy.upstream.has_path:
            log.warning("upstream.base_url has no path: most APIs are at /v1", upstream=url)

    @app.after_serving
    async def end() -> None:
        proxy.scheduler.close()
        housekeeping.cancel()
        await proxy.upstream.aclose()
        log.info("stopped")


def _response(error: ProxyError, request_id: str) -> Response:
    status, headers, content = request.refusal(error, request_id, random.random())
    return Response(
        content, status, headers=WerkzeugHeaders([(name.decode(), value.decode()) for name, value in headers])
    )
