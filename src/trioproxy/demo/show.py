"""The demo: simulated upstream, proxy and traffic in one process, and somebody who tells what happens.

What is told comes from the proxy's own events, by a listener (`Watch`), never from its log. The settings are the demo's
own: the user's configuration file, environment and forward proxies have no say, so that it shows the same everywhere.
This module must not know how the scheduler decides.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
import trio
from pydantic import ValidationError

from trioproxy.app import create_app
from trioproxy.config import Settings
from trioproxy.demo import screen
from trioproxy.demo.lines import Stage
from trioproxy.demo.scenarios import DEFAULT, SCENARIOS, SPEED_MAX, SPEED_MIN, Scenario
from trioproxy.demo.summary import summary
from trioproxy.demo.traffic import offer
from trioproxy.demo.upstream import create_upstream, serve_upstream
from trioproxy.demo.watch import Watch
from trioproxy.observe import logs
from trioproxy.server import Server
from trioproxy.upstream import Upstream

END_SECONDS_MAX: Final = 1.0
"""How long closing everything may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command was asked for."""

    bind: tuple[str, ...] = ("127.0.0.1:8080",)
    """Where the proxy listens, each `HOST:PORT`; the clients ask at the first."""
    log_file: Path = Path("logs/proxy.log")
    """Where alone the proxy's log is written."""
    duration: float | None = None
    """Seconds, whatever the speed; None: until Ctrl-C, SIGTERM or SIGHUP."""
    seed: int | None = None
    """Makes the clients arrive as in every run with this seed."""
    scenario: str = DEFAULT
    speed: float = 1.0


def run(options: Options, output: screen.Output | None = None) -> int:
    """Run the demo, tell the summary at its end, and return the exit status.

    `output` shows it meanwhile; None: whatever suits standard output. Raises `click.UsageError` if an option is
    impossible.
    """
    duration = math.inf if options.duration is None else options.duration
    if not duration > 0:
        raise click.BadParameter(f"{duration:g} is not above 0.", param_hint="--duration")
    if not SPEED_MIN <= options.speed <= SPEED_MAX:
        reason = f"{options.speed:g} is not from {SPEED_MIN:g} to {SPEED_MAX:g}."
        raise click.BadParameter(reason, param_hint="--speed")
    scenario = SCENARIOS[options.scenario].at_speed(options.speed)
    settings = _settings(options.bind, scenario)
    try:
        writer = logs.configure("info", "json", options.log_file, file_only=True)
    except OSError as error:
        click.echo(f"trioproxy: {options.log_file} cannot be written (--log-file): {error.strerror}", err=True)
        return 2
    show = Show(scenario, settings, options, output or screen.choose(sys.stdout))
    try:
        failure = trio.run(show.run, duration)
    finally:
        show.leave()
        writer.close()
    if failure is not None:
        where = ", ".join(options.bind)
        click.echo(f"trioproxy: cannot listen on {where}: {failure}; give another address with --bind", err=True)
        return 1
    return show.conclude()


def _settings(bind: tuple[str, ...], scenario: Scenario) -> Settings:
    sections = {
        "server": {"bind": list(bind), "client_write_timeout": scenario.client_write_timeout},
        "upstream": {"first_byte_timeout": scenario.first_byte_timeout, "idle_timeout": scenario.idle_timeout},
        "scheduler": {
            "concurrency": scenario.slots,
            "max_queue": scenario.places,
            "queue_timeout": scenario.queue_timeout,
        },
    }
    try:
        settings = Settings.model_validate(sections)
    except ValidationError:
        settings = None
    if settings is None or any(address.startswith("unix:") for address in settings.server.bind):
        raise click.BadParameter(f"{', '.join(bind)} is not HOST:PORT.", param_hint="--bind")
    return settings


class Show:
    """One run: what is played, who watches, and where it is shown."""

    def __init__(self, scenario: Scenario, settings: Settings, options: Options, output: screen.Output) -> None:
        self._scenario = scenario
        self._settings = settings
        self._options = options
        self._output = output
        self._watch = Watch(scenario.slots, scenario.places)

    async def run(self, duration: float) -> str | None:
        """Everything that runs, until the end of it; returns why the proxy cannot listen, if it cannot."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals:
            stop = trio.CancelScope(relative_deadline=duration)
            async with trio.open_nursery() as house:
                house.start_soon(_obey, signals, stop, house.cancel_scope)
                upstream = create_upstream(replace(self._scenario.upstream, seed=self._options.seed))
                upstream_url = await house.start(serve_upstream, upstream)
                try:
                    server = self._proxy(upstream_url)
                except OSError as error:
                    house.cancel_scope.cancel()
                    return error.strerror or str(error)
                async with trio.open_nursery() as proxy:
                    addresses = await proxy.start(server.run)
                    await self._play(stop, upstream_url, tuple(addresses))
                    proxy.cancel_scope.deadline = trio.current_time() + END_SECONDS_MAX
                    server.shut_down()
                    server.shut_down()
                house.cancel_scope.cancel()
        return None

    def leave(self) -> None:
        """Give the terminal back."""
        with suppress(OSError):  # there is none any more
            self._output.end()

    def conclude(self) -> int:
        """Print the summary; returns the exit status, 1 if nobody reads it any more."""
        text = f"{summary(self._watch, self._scenario)}\n\nThe whole story is in {self._options.log_file}."
        try:
            click.echo(f"\n{text}")
        except OSError:
            # What is left in the buffer would raise once more, when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return 0

    def _proxy(self, upstream_url: str) -> Server:
        """Raises OSError if the proxy cannot listen where it is to."""
        upstream = self._settings.upstream.model_copy(update={"base_url": upstream_url})
        settings = self._settings.model_copy(update={"upstream": upstream})
        # The environment's forward proxy could not reach this machine's loopback interface.
        return Server(create_app(settings, (self._watch,), Upstream(upstream, trust_env=False)), settings)

    async def _play(self, stop: trio.CancelScope, upstream_url: str, addresses: tuple[str, ...]) -> None:
        """Traffic and the telling of it, until `stop` is cancelled or has expired."""
        stage = Stage(
            scenario=self._scenario, upstream_url=upstream_url, addresses=addresses, log_file=self._options.log_file
        )
        self._watch.began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, stop, stage)
            nursery.start_soon(offer, f"{addresses[0]}/v1", self._scenario, self._options.seed)
            with stop:
                await trio.sleep_forever()
            self._watch.close(trio.current_time())
            nursery.cancel_scope.cancel()

    async def _tell(self, stop: trio.CancelScope, stage: Stage) -> None:
        """Show what happens, until cancelled; when nobody reads it any more, stop."""
        output = self._output
        try:
            # In threads: a paused terminal must not pause the proxy.
            await trio.to_thread.run_sync(output.begin, stage, abandon_on_cancel=True)
            while True:
                await trio.sleep(output.interval_seconds)
                view = self._watch.view(trio.current_time())
                await trio.to_thread.run_sync(output.show, view, abandon_on_cancel=True)
        except OSError:
            stop.cancel()


async def _obey(signals: AsyncIterator[int], stop: trio.CancelScope, everything: trio.CancelScope) -> None:
    """The first signal ends the show, a second one everything at once."""
    await anext(signals)
    stop.cancel()
    await anext(signals)
    everything.cancel()
