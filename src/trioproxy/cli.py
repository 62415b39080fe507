"""The commands: `trioproxy serve`, `check-config`, `reload`, `keys new`, `demo`."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import structlog
import trio
import yaml
from pydantic import ValidationError

from trioproxy import __version__, config
from trioproxy.app import create_app
from trioproxy.config import ConfigError, KeySettings, Settings
from trioproxy.demo import scenarios, show
from trioproxy.keys import digest, new_key
from trioproxy.observe import logs
from trioproxy.reload import ControlSocket, Reloader, ask
from trioproxy.server import Server

EXIT_UNUSABLE_CONFIGURATION = 2


@click.group()
@click.version_option(__version__, prog_name="trioproxy")
def main() -> None:
    """An OpenAI-API proxy that shares scarce model capacity by priority."""


@main.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="The YAML file with the settings.")
@click.option("--bind", multiple=True, metavar="HOST:PORT", help="Where to listen; may be given more than once.")
@click.option("--upstream", metavar="URL", help="The API to forward to: upstream.base_url.")
@click.option("--concurrency", type=int, metavar="N", help="How many requests may run upstream at once.")
@click.option("--max-queue", type=int, metavar="N", help="How many requests may wait.")
@click.option("--log-file", metavar="FILE", help="Also write the log to this file, as JSON lines.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@click.option("--log-format", metavar="FORMAT", help="json or console.")
def serve(
    config_file: Path | None,
    bind: tuple[str, ...],
    upstream: str | None,
    concurrency: int | None,
    max_queue: int | None,
    log_file: str | None,
    log_level: str | None,
    log_format: str | None,
) -> None:
    """Run the proxy until SIGTERM or Ctrl-C."""
    overrides: Mapping[str, object] = {
        "server.bind": list(bind) or None,
        "upstream.base_url": upstream,
        "scheduler.concurrency": concurrency,
        "scheduler.max_queue": max_queue,
        "logging.file": log_file,
        "logging.level": log_level,
        "logging.format": log_format,
    }
    run(config_file, {key: value for key, value in overrides.items() if value is not None})


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
def check_config(file: Path) -> None:
    """Say whether FILE, together with the environment, is a usable configuration, and what it comes to."""
    try:
        settings = config.load(file)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_UNUSABLE_CONFIGURATION)
    click.echo(yaml.safe_dump(config.describe(settings), sort_keys=False), nl=False)


@main.command(
    epilog="\b\nScenarios:\n" + "\n".join(f"  {each.name:<9}{each.about}" for each in scenarios.SCENARIOS.values())
)
@click.option(
    "--bind",
    multiple=True,
    default=("127.0.0.1:8080",),
    metavar="HOST:PORT",
    help="Where to listen; may be given more than once.  [default: 127.0.0.1:8080]",
)
@click.option(
    "--log-file",
    default="logs/proxy.log",
    show_default=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where the proxy writes its log, as JSON lines.",
)
@click.option("--duration", type=float, metavar="SECONDS", help="How long to run.  [default: until Ctrl-C]")
@click.option("--seed", type=int, metavar="N", help="Let the clients arrive as in every run with this number.")
@click.option(
    "--scenario",
    type=click.Choice(tuple(scenarios.SCENARIOS)),
    default=scenarios.DEFAULT,
    show_default=True,
    help="What is played; see below.",
)
@click.option(
    "--speed",
    type=float,
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help=f"How fast the simulated world runs, {scenarios.SPEED_MIN:g} to {scenarios.SPEED_MAX:g}: arrivals, the "
    "upstream's times and all timeouts together.  The times shown are real ones, and so are --duration and the time "
    "after which refused clients come back, a second at least.",
)
def demo(
    bind: tuple[str, ...], log_file: Path, duration: float | None, seed: int | None, scenario: str, speed: float
) -> None:
    """Show queueing, priority and eviction live, with a simulated upstream and simulated clients: no key needed.

    On a terminal a live page, elsewhere plain lines, and a summary at the end. Ctrl-C ends it.
    """
    options = show.Options(bind=bind, log_file=log_file, duration=duration, seed=seed, scenario=scenario, speed=speed)
    sys.exit(show.run(options))


@main.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="The YAML file of the running proxy.")
@click.option("--socket", "path", type=click.Path(path_type=Path), help="Its server.control_socket.")
def reload(config_file: Path | None, path: Path | None) -> None:
    """Let the running proxy read its configuration again. If something is wrong with it, nothing is changed."""
    if path is None:
        try:
            path = config.control_socket(config_file)
        except ConfigError as error:
            click.echo(f"nothing was changed:\n{error}", err=True)
            sys.exit(EXIT_UNUSABLE_CONFIGURATION)
    if path is None:
        raise click.UsageError("server.control_socket is not set: set it, restart, or send the process SIGHUP instead.")
    try:
        outcome = ask(path)
    except OSError as error:
        hint = "is the proxy running? (If it listens elsewhere: --socket PATH.)"
        click.echo(f"nothing was changed: {path}: {error.strerror or error}; {hint}", err=True)
        sys.exit(1)
    if outcome.error is not None:
        click.echo(f"nothing was changed:\n{outcome.error}", err=True)
        sys.exit(EXIT_UNUSABLE_CONFIGURATION)
    click.echo(f"changed: {', '.join(outcome.changed) or 'nothing'}")
    if outcome.needs_restart:
        click.echo(f"needs a restart: {', '.join(outcome.needs_restart)}")


@main.group()
def keys() -> None:
    """Client keys: who may use the proxy, and for what."""


@keys.command()
@click.argument("name")
def new(name: str) -> None:
    """Make a key for NAME: print the key, and its line for the configuration file."""
    try:
        name = KeySettings.model_validate({"name": name}).name
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.BadParameter(reason, param_hint="NAME") from None
    key = new_key()
    click.echo(
        f"{key}\n\nThis is the key for {name}; it is shown only now. Its line in the configuration, below keys:\n\n"
        f'  - {{name: "{name}", key_sha256: "{digest(key)}"}}'
    )


def run(config_file: Path | None, overrides: Mapping[str, object]) -> None:
    """Load the settings, serve, and exit with the right status."""
    try:
        settings = config.load(config_file, overrides=overrides)
    except ConfigError as error:
        logs.say_and_exit("the configuration cannot be used", str(error), EXIT_UNUSABLE_CONFIGURATION)
    try:
        writer = logs.configure(settings.logging.level, settings.logging.format, settings.logging.file)
    except OSError as error:
        reason = f"logging.file: {settings.logging.file} cannot be written: {error.strerror}"
        logs.say_and_exit("the configuration cannot be used", reason, EXIT_UNUSABLE_CONFIGURATION)
    try:
        status = _serve(settings, writer, lambda: config.load(config_file, overrides=overrides, may_be_empty=False))
    finally:
        writer.close()
    sys.exit(status)


def _serve(settings: Settings, writer: logs.Writer, read: Callable[[], Settings]) -> int:
    log = structlog.get_logger()
    try:
        app = create_app(settings, dropped_lines=lambda: writer.dropped)
    except ConfigError as error:
        log.error("the configuration cannot be used", error=str(error))
        return EXIT_UNUSABLE_CONFIGURATION
    try:
        server = Server(app, settings)
    except OSError as error:
        hint = ": another process listens there already" if error.errno == errno.EADDRINUSE else ""
        log.error(
            "cannot listen",
            bind=list(settings.server.bind),
            error=f"server.bind: cannot listen on {', '.join(settings.server.bind)}: {error.strerror or error}{hint}",
        )
        return 1
    control: ControlSocket | None = None
    if (path := settings.server.control_socket) is not None:
        try:
            control = ControlSocket(path)
        except OSError as error:
            reason = f"server.control_socket: cannot listen on {path}: {error.strerror or error}"
            log.error("cannot listen", error=reason)
            return 1
    trio.run(_until_signalled, server, Reloader(read, server, logs.set_level), control)
    return 0


async def _until_signalled(server: Server, reloader: Reloader, control: ControlSocket | None) -> None:
    terminals = _terminals()
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:

            async def listen_for_signals() -> None:
                async for received in signals:
                    # Whose terminal was closed gets a SIGHUP too.
                    if received == signal.SIGHUP and _terminals() == terminals:
                        nursery.start_soon(reloader.reload)  # a file may take long to read; other signals must not
                    else:
                        server.shut_down()

            nursery.start_soon(listen_for_signals)
            if control is not None:
                nursery.start_soon(control.serve, reloader)
            await server.run()
            nursery.cancel_scope.cancel()


def _terminals() -> list[int]:
    """Which of the standard streams are a terminal that is still there; behind a pipe, standard input alone."""
    return [stream for stream in (0, 1, 2) if os.isatty(stream)]
