"""The demo: simulated upstream, proxy and traffic in one process, and plain lines that tell what happens.

What is told comes from the proxy's own events, by a listener (`Watch`), never from its log. The settings are the demo's
own: the user's configuration file, environment and forward proxies have no say, so that it shows the same everywhere.
This module must not know how the scheduler decides.
"""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Final

import click
import trio
from pydantic import ValidationError

from trioproxy.app import create_app
from trioproxy.config import Settings
from trioproxy.demo.traffic import offer, offered_load
from trioproxy.demo.upstream import UpstreamOptions, create_upstream, serve_upstream
from trioproxy.errors import Status
from trioproxy.events import Ended, Event, PassedThrough, Queued, ScheduledRequest, Started
from trioproxy.observe import logs
from trioproxy.priority import LEVELS
from trioproxy.server import Server
from trioproxy.upstream import Upstream

SLOTS: Final = 4
PLACES: Final = 12
QUEUE_TIMEOUT: Final = 8.0
"""Seconds; short enough for the lowest level to run into it."""

UPSTREAM: Final = UpstreamOptions(time_to_first_token=0.2, tokens=30, tokens_per_second=50)
SECONDS_PER_REQUEST: Final = UPSTREAM.time_to_first_token + UPSTREAM.tokens / UPSTREAM.tokens_per_second

TICK_SECONDS: Final = 1.0
"""How often the happenings since then and the state are shown."""

END_SECONDS_MAX: Final = 1.0
"""How long closing everything may take."""

MOST_URGENT_FIRST: Final = LEVELS[::-1]


class Watch:
    """A listener that keeps count of what happens, by level, and notes what is worth a line."""

    def __init__(self) -> None:
        self.waiting: dict[ScheduledRequest, None] = {}
        """Who is queued now, in order of arrival."""
        self.running: set[ScheduledRequest] = set()
        self.ended: Counter[tuple[str, Status]] = Counter()
        """How many requests ended, by level and status."""
        self.waits: dict[str, list[float]] = {level: [] for level in LEVELS}
        """Seconds that each request waited that got a slot."""
        self.passed_through = 0
        self._notes: dict[str, Counter[str]] = {}
        self._evicted: str | None = None
        self._closed = False

    def __call__(self, event: Event) -> None:
        """Take notice of an event."""
        if self._closed:
            return
        match event:
            case Queued(request):
                self._queued(request)
            case Started(request, queue_seconds=seconds):
                self._started(request, seconds)
            case Ended():
                self._ended(event)
            case PassedThrough():
                self.passed_through += 1

    def close(self) -> None:
        """The show is over: take no notice of how it is cleared away."""
        self._closed = True

    def total(self, status: Status, levels: Iterable[str] = LEVELS) -> int:
        """How many requests of these levels ended like this."""
        return sum(self.ended[level, status] for level in levels)

    def under_way(self, level: str) -> int:
        """How many requests of a level wait or run."""
        return sum(request.priority_level == level for request in (*self.waiting, *self.running))

    def sent(self, level: str) -> int:
        """How many requests of a level there have been."""
        return sum(self.ended[level, status] for status in Status) + self.under_way(level)

    def take_notes(self) -> list[str]:
        """What happened since the last call, a line for each kind of happening."""
        lines = [
            f"{kind:<10} {', '.join(f'{count} {text}' for text, count in counts.items())}"
            for kind, counts in self._notes.items()
        ]
        self._notes.clear()
        return lines

    def status_line(self) -> str:
        """The state at this moment."""
        queued = Counter(request.priority_level for request in self.waiting)
        by_level = ", ".join(f"{queued[level]} {level}" for level in MOST_URGENT_FIRST if queued[level])
        return (
            f"slots {len(self.running)}/{SLOTS}  queue {len(self.waiting)}/{PLACES}"
            f"{f' ({by_level})' if by_level else ''}  served {self.total(Status.COMPLETED)}"
            f"  passed through {self.passed_through}"
        )

    def _queued(self, request: ScheduledRequest) -> None:
        self.waiting[request] = None
        # An eviction is told right before the queueing of the one that it made room for.
        if self._evicted is not None:
            self._note("evicted", f"{self._evicted} by {request.priority_level}")
            self._evicted = None

    def _started(self, request: ScheduledRequest, seconds: float) -> None:
        self.running.add(request)
        self.waits[request.priority_level].append(seconds)
        if request not in self.waiting:
            return
        overtaken = list(self.waiting).index(request)
        del self.waiting[request]
        if overtaken and request.priority_level == MOST_URGENT_FIRST[0]:
            self._note("overtook", f"{request.priority_level} past {overtaken} others in {seconds:.2f} s")

    def _ended(self, event: Ended) -> None:
        level, status = event.request.priority_level, event.ending.status
        assert status is not None
        self.ended[level, status] += 1
        self.waiting.pop(event.request, None)
        self.running.discard(event.request)
        match status:
            case Status.EVICTED:
                self._evicted = level
            case Status.TIMEOUT:
                self._note("timed out", f"{level} after {event.total_seconds:.0f} s")
            case Status.CANCELLED:
                self._note("cancelled", f"{level} while it {'ran' if event.started else 'waited'}")
            case Status.REJECTED | Status.FAILED:
                self._note(status.value, level)

    def _note(self, kind: str, text: str) -> None:
        self._notes.setdefault(kind, Counter())[text] += 1


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least `share` of them (0 to 1) do not exceed; NaN if there are none."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1] if values else math.nan


def summary(watch: Watch) -> str:
    """A table of all that happened, by level, with waits in milliseconds, and what it says in words."""
    usual = (Status.COMPLETED, Status.EVICTED, Status.REJECTED, Status.CANCELLED)
    statuses = [status for status in Status if status in usual or watch.total(status)]
    names = ["served" if status is Status.COMPLETED else status.value for status in statuses]
    rows: list[tuple[object, ...]] = [("level", "sent", *names, "open", "wait p50", "p99", "max ms")]
    for level in MOST_URGENT_FIRST:
        waits = [1000 * percentile(watch.waits[level], share) for share in (0.5, 0.99, 1)]
        rows.append(
            (
                level,
                watch.sent(level),
                *(watch.ended[level, status] for status in statuses),
                watch.under_way(level),
                *("-" if math.isnan(wait) else round(wait) for wait in waits),
            )
        )
    table = "\n".join(f"{row[0]:<8}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)
    return f"{table}\n\n{reading(watch)}"


def reading(watch: Watch) -> str:
    """What the table says, in words."""
    urgent, others = MOST_URGENT_FIRST[:2], MOST_URGENT_FIRST[2:]
    if not any(map(watch.sent, LEVELS)):
        return "Nothing was sent: it ended too early."

    def fate(level: str) -> str:
        wait = f", waiting p99 {percentile(watch.waits[level], 0.99):.2f} s" if watch.waits[level] else ""
        return f"{level}: {watch.ended[level, Status.COMPLETED]} of {watch.sent(level)} served{wait}"

    def turned_away(levels: Sequence[str]) -> str:
        refused = watch.total(Status.EVICTED, levels) + watch.total(Status.REJECTED, levels)
        return f"{refused or 'none'} of the {sum(map(watch.sent, levels))} {', '.join(levels)} ones"

    return (
        f"{fate(MOST_URGENT_FIRST[0])}; {fate(MOST_URGENT_FIRST[-1])}.\n"
        f"Evicted or rejected: {turned_away(urgent)}; {turned_away(others)}.\n"
        "They were told when to come back, and each try counts as sent. What runs is never interrupted:\n"
        f"even the most urgent request waits until one of {SLOTS} slots comes free."
    )


def run(bind: tuple[str, ...], log_file: Path, duration: float | None, seed: int | None) -> int:
    """Run the demo for `duration` seconds (None: until SIGTERM or Ctrl-C) and return the exit status.

    The proxy listens at each address of `bind`, `HOST:PORT`, and the clients ask at the first; its log is written to
    `log_file` alone. `seed` makes the clients arrive as in every run with that seed. Raises `click.UsageError` if an
    argument is impossible.
    """
    if duration is not None and not duration > 0:
        raise click.BadParameter(f"{duration:g} is not above 0.", param_hint="--duration")
    settings = _settings(bind)
    try:
        writer = logs.configure("info", "json", log_file, file_only=True)
    except OSError as error:
        click.echo(f"trioproxy: {log_file} cannot be written (--log-file): {error.strerror}", err=True)
        return 2
    watch = Watch()
    try:
        failure = trio.run(_main, watch, settings, log_file, math.inf if duration is None else duration, seed)
    finally:
        writer.close()
    if failure is not None:
        where = ", ".join(bind)
        click.echo(f"trioproxy: cannot listen on {where}: {failure}; give another address with --bind", err=True)
        return 1
    click.echo(f"\n{summary(watch)}\nThe whole story is in {log_file}.")
    return 0


def _settings(bind: tuple[str, ...]) -> Settings:
    sections = {
        "server": {"bind": list(bind)},
        "scheduler": {"concurrency": SLOTS, "max_queue": PLACES, "queue_timeout": QUEUE_TIMEOUT},
    }
    try:
        settings = Settings.model_validate(sections)
    except ValidationError:
        settings = None
    if settings is None or any(address.startswith("unix:") for address in settings.server.bind):
        raise click.BadParameter(f"{', '.join(bind)} is not HOST:PORT.", param_hint="--bind")
    return settings


async def _main(watch: Watch, settings: Settings, log_file: Path, duration: float, seed: int | None) -> str | None:
    """Everything that runs, until the end of it; returns why the proxy cannot listen, if it cannot."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        stop = trio.CancelScope(relative_deadline=duration)
        async with trio.open_nursery() as house:
            house.start_soon(_obey, signals, stop, house.cancel_scope)
            upstream_url = await house.start(serve_upstream, create_upstream(UPSTREAM))
            try:
                server = _proxy(settings, upstream_url, watch)
            except OSError as error:
                house.cancel_scope.cancel()
                return error.strerror or str(error)
            async with trio.open_nursery() as proxy:
                addresses = await proxy.start(server.run)
                await _show(watch, stop, addresses[0], _greeting(upstream_url, addresses, log_file), seed)
                proxy.cancel_scope.deadline = trio.current_time() + END_SECONDS_MAX
                server.shut_down()
                server.shut_down()
            house.cancel_scope.cancel()
    return None


async def _show(watch: Watch, stop: trio.CancelScope, address: str, greeting: str, seed: int | None) -> None:
    """Traffic and the telling of it, until `stop` is cancelled or has expired."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell, watch, stop, greeting)
        nursery.start_soon(offer, f"{address}/v1", seed)
        with stop:
            await trio.sleep_forever()
        watch.close()
        nursery.cancel_scope.cancel()


async def _obey(signals: AsyncIterator[int], stop: trio.CancelScope, everything: trio.CancelScope) -> None:
    """The first signal ends the show, a second one everything at once."""
    await anext(signals)
    stop.cancel()
    await anext(signals)
    everything.cancel()


def _proxy(settings: Settings, upstream_url: str, watch: Watch) -> Server:
    """Raises OSError if the proxy cannot listen where it is to."""
    upstream = settings.upstream.model_copy(update={"base_url": upstream_url})
    settings = settings.model_copy(update={"upstream": upstream})
    # The environment's forward proxy could not reach this machine's loopback interface.
    return Server(create_app(settings, (watch,), Upstream(upstream, trust_env=False)), settings)


async def _tell(watch: Watch, stop: trio.CancelScope, greeting: str) -> None:
    """Print what happens, until cancelled; when nobody reads it any more, stop."""
    began = trio.current_time()
    text = greeting
    try:
        while True:
            # In a thread: a paused terminal must not pause the proxy.
            await trio.to_thread.run_sync(click.echo, text, abandon_on_cancel=True)
            await trio.sleep(TICK_SECONDS)
            status = f"{trio.current_time() - began:5.0f} s  {watch.status_line()}"
            text = f"\n{' ' * 9}".join([status, *watch.take_notes()])
    except BrokenPipeError:
        stop.cancel()


def _greeting(upstream_url: str, addresses: Sequence[str], log_file: Path) -> str:
    address = addresses[0]
    load = offered_load(SECONDS_PER_REQUEST, SLOTS)
    return f"""\
proxy      {", ".join(addresses)}, with {SLOTS} slots and {PLACES} places in its queue; its log: {log_file}
upstream   {upstream_url}, simulated: no key is needed, nothing leaves this machine
clients    simulated, of five levels of priority; they ask for {100 * load:.0f} % of what {SLOTS} slots can serve

Try in another terminal, and compare with X-Priority: very_low
  time curl {address}/v1/chat/completions -H 'X-Priority: critical' \\
    -H 'Content-Type: application/json' -d '{{"model": "gpt-sim", "messages": [{{"role": "user", "content": "Hi"}}]}}'
  curl -s {address}/metrics | grep ^openai_proxy_queue_size
  tail -f {log_file}

What you will see, each second, until Ctrl-C:
  evicted    N of a level by another: the queue was full, and the more urgent newcomer took a place
  rejected   N of a level: the queue was full, and nobody in it was less urgent
  overtook   a critical request got the next free slot, past others that had come earlier
  passed through: requests for the list of models, which need no slot
"""
