"""Going on with another configuration: read it, judge it whole, then commit it, in one step.

Who asks for it is a signal, or somebody at the control socket, who is told what came of it.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import structlog
import trio

from trioproxy.config import ConfigError, Settings, changes, with_values_of
from trioproxy.server import Server

log = structlog.get_logger()

NEEDS_RESTART: Final = (
    "server.bind",
    "server.backlog",
    "server.control_socket",
    "upstream.base_url",
    "upstream.ca_file",
    "upstream.client_cert",
    "upstream.client_key",
    "logging.format",
    "logging.file",
)
"""Settings that stay as they are until the process is started again."""

_TLS: Final = ("server.tls.cert", "server.tls.key")

_ANSWER_SECONDS_MAX: Final = 30.0


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of a reload. With an `error` nothing has changed."""

    changed: tuple[str, ...] = ()
    """The settings that are others from now on, by dotted key."""
    needs_restart: tuple[str, ...] = ()
    """The settings that the file has others for, but stay until the process is started again."""
    error: str | None = None


class Reloader:
    """Reloads the configuration of one running server.

    `read` reads it anew; it may raise `ConfigError`. `set_level` changes what is logged.
    """

    def __init__(self, read: Callable[[], Settings], server: Server, set_level: Callable[[str], object]) -> None:
        self._read = read
        self._server = server
        self._set_level = set_level
        self._one_at_a_time = trio.Lock()

    async def reload(self) -> Outcome:
        """Read, judge, commit. Says in the log what came of it, and never raises."""
        async with self._one_at_a_time:
            try:
                outcome = self._commit(await trio.to_thread.run_sync(self._read, abandon_on_cancel=True))
            except (ConfigError, OSError) as error:
                outcome = Outcome(error=str(error))
        if outcome.error is not None:
            log.error("configuration not reloaded", error=outcome.error)
        else:
            log.info("configuration reloaded", changed=outcome.changed, needs_restart=outcome.needs_restart)
        return outcome

    def _commit(self, wanted: Settings) -> Outcome:
        """Raises ConfigError or OSError, and nothing has changed, if the proxy cannot go on with these settings: a
        certificate has become unreadable since it was judged, or nobody would need a key any more.
        """
        present = self._server.settings
        if present.keys and not wanted.keys:
            # A file that is empty, or only half written, looks like this.
            raise ConfigError(
                "keys: there are none any more, so anyone could use the proxy: restart it if that is meant"
            )
        staying = list(NEEDS_RESTART)
        if (wanted.server.tls.cert is None) != (present.server.tls.cert is None):
            staying += _TLS  # clients speak either TLS or not
        settings = with_values_of(present, staying, wanted)
        self._server.reconfigure(settings)
        self._set_level(settings.logging.level)
        changed = tuple(changes(present, settings))
        return Outcome(changed, tuple(key for key in changes(present, wanted) if key in staying))


class ControlSocket:
    """A Unix socket at which whoever may connect (by default the same user) has the configuration reloaded."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the socket cannot be had: also if another process listens there."""
        _remove_abandoned(path)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o177)
        try:
            self._socket.bind(str(path))
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise
        finally:
            os.umask(umask)

    async def serve(self, reloader: Reloader) -> None:
        """Reload for each connection, answer with the outcome, until cancelled."""

        async def connection(stream: trio.SocketStream) -> None:
            outcome = await reloader.reload()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(msgspec.json.encode(outcome))
            await stream.aclose()

        try:
            await trio.serve_listeners(connection, [trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))])
        finally:
            self._path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove the socket that a process left behind which was killed."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


def ask(path: Path) -> Outcome:
    """Let the process that listens at this control socket reload. Raises OSError if nobody does, or no answer comes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_SECONDS_MAX)
        connection.connect(str(path))
        answer = b""
        while data := connection.recv(65536):
            answer += data
    try:
        return msgspec.json.decode(answer, type=Outcome)
    except msgspec.DecodeError as error:
        raise OSError(f"what came back is no answer: {answer[:100]!r}") from error
