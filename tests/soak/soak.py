"""The soak test: random load of every kind with random faults on a real proxy, and afterwards nothing is left of it.

    python tests/soak/soak.py --seconds 600 --seed 1

Runs `trioproxy serve` as a process of its own between raw-socket clients (`soak_clients`) and a raw-socket upstream
(`soak_upstream`), all on the loopback interface, bounded in rate, number and time. At the end the books of all sides
(metrics, log, clients, upstream) must balance, and memory and descriptors be where they were after warm-up. Exit
status 1 if a check fails. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Final

import trio
from soak_clients import BODY_SIZE_MAX, World
from soak_ledger import Ledger, LoggedLines, disagreements
from soak_upstream import Call, Upstream

SLOTS: Final = 8
QUEUE: Final = 40
GRACE_SECONDS: Final = 2
"""Shorter than `first_byte_timeout`: somebody is cut off at its end."""

SETTINGS: Final = MappingProxyType(
    {
        "SERVER__CLIENT_WRITE_TIMEOUT": "2",
        "SERVER__KEEP_ALIVE_TIMEOUT": "5",
        "SERVER__MAX_BODY_SIZE": str(BODY_SIZE_MAX),
        "SERVER__SHUTDOWN_GRACE": str(GRACE_SECONDS),
        "UPSTREAM__CONNECT_TIMEOUT": "1",
        "UPSTREAM__FIRST_BYTE_TIMEOUT": "3",
        "UPSTREAM__IDLE_TIMEOUT": "2",
        "UPSTREAM__KEEP_ALIVE_EXPIRY": "2",
        "SCHEDULER__CONCURRENCY": str(SLOTS),
        "SCHEDULER__MAX_QUEUE": str(QUEUE),
        "SCHEDULER__QUEUE_TIMEOUT": "4",
        "LOGGING__LEVEL": "info",
        "LOGGING__FORMAT": "json",
    }
)

CLIENTS_MAX: Final = 150
"""So many at once; more are not let in."""

RATES: Final = (250, 20, 60, 120, 40)
"""Clients a second, each for some seconds, in turn: beyond the slots, beyond the queue too, and below both."""

PROGRESS_SECONDS: Final = 10.0
WARM_UP_SECONDS: Final = 20.0
WARM_UP_SHARE: Final = 0.1
MEMORY_RUN_SECONDS_MIN: Final = 60.0
"""In shorter runs memory is still growing to its working size."""

CLIENTS_GO_SECONDS: Final = 40.0
"""How long the clients that are there may take when no more come."""

QUIET_SECONDS: Final = 15.0
"""How long the proxy may take to be idle after that: idle upstream connections expire, silent clients' end."""

ORPHAN_SECONDS: Final = 1.0
EXIT_SECONDS_MAX: Final = 2.5
"""How much longer than the grace its end may take: connections, log and interpreter come to theirs."""

OUTCOMES_WANTED: Final = frozenset({"success", "evicted", "rejected", "timeout", "upstream_error", "cancelled"})
DESCRIPTORS_MORE_MAX: Final = 5
MEMORY_MORE_MAX: Final = 15 * 2**20
MEMORY_MORE_SHARE_MAX: Final = 0.15
MIB: Final = 2**20


def say(line: str) -> None:
    """A line of the report."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    ok: bool
    seen: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<66} {self.seen}"


@dataclass(frozen=True)
class Resources:
    """What the proxy's process uses."""

    memory: int
    memory_max: int
    descriptors: int

    def __str__(self) -> str:
        return f"{self.memory / MIB:.1f} MiB, {self.descriptors} descriptors"


class Proxy:
    """The proxy's process, seen from outside."""

    def __init__(self, process: trio.Process, folder: Path) -> None:
        self.port = 0
        self.process = process
        self.printed = 0
        """Lines on standard output."""
        self.log_file = folder / "proxy.log"
        self.errors_file = folder / "stderr.txt"
        self.ended = trio.Event()
        """Standard output is at its end."""

    async def read(self, task_status: trio.TaskStatus[None]) -> None:
        """Count the lines that it prints until it ends; started when it listens."""
        assert self.process.stdout is not None
        rest = b""
        async for data in self.process.stdout:
            *lines, rest = (rest + bytes(data)).split(b"\n")
            self.printed += len(lines)
            for line in lines if not self.port else ():
                if (said := json.loads(line))["event"] == "listening":
                    self.port = int(said["addresses"][0].rpartition(":")[2])
                    task_status.started()
        self.ended.set()

    def resources(self) -> Resources:
        """As the kernel says."""
        folder = Path("/proc") / str(self.process.pid)
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        memory, memory_max = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return Resources(memory, memory_max, len(list((folder / "fd").iterdir())))

    def processor_seconds(self) -> float:
        """Time on the processor so far."""
        fields = (Path("/proc") / str(self.process.pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def metrics(self, world: World) -> Metrics:
        """A scrape."""
        async with world.connect() as wire:
            await wire.send(b"GET /metrics HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n")
            text = b""
            with trio.fail_after(10):
                while data := await wire.read():
                    text += data
        return Metrics(text.decode())


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self._samples = {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in text.splitlines())
            if name.startswith("openai_proxy_")
        }

    def sum(self, name: str) -> int:
        """Over all labels."""
        found = [value for key, value in self._samples.items() if key.partition("{")[0] == f"openai_proxy_{name}"]
        if not found:
            raise LookupError(name)
        return round(sum(found))

    def by(self, name: str, label: str) -> Counter[str]:
        """By the values of one label."""
        counts: Counter[str] = Counter()
        for key, value in self._samples.items():
            series, _, labels = key.partition("{")
            if series == f"openai_proxy_{name}":
                counts[labels.partition(f'{label}="')[2].partition('"')[0]] += round(value)
        return +counts

    @property
    def in_use(self) -> int:
        """Slots that are taken."""
        return self.sum("permits") - self.sum("available_permits")


class Soak:
    """One run."""

    def __init__(self, seconds: float, seed: int, folder: Path) -> None:
        self.seconds = seconds
        self.seed = seed
        self.folder = folder
        self.ledger = Ledger()
        self.upstream = Upstream(seed, self.ledger.complain, self._judge)
        self.chance = Random(f"{seed}/load")
        self.checks: list[Check] = []
        self.clients = 0
        self.most_clients = 0
        self.turned_away = 0
        self.lag = 0.0
        """By how much this process itself was late, at most, since the last progress line."""
        self.most_lag = 0.0
        self.began = trio.current_time()
        self.proxy: Proxy
        self.world: World

    async def run(self) -> bool:
        """Whether all checks held."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.upstream.serve)
            async with self._running_proxy() as self.proxy:
                self.world = World(self.proxy.port, self.seed, self.ledger)
                nursery.start_soon(self._watch_for_orphans)
                nursery.start_soon(self._watch_lag)
                nursery.start_soon(self._watch_health)
                await self._load_and_measure()
                await self._check_the_end()
            nursery.cancel_scope.cancel()
        self._report()
        return all(check.ok for check in self.checks)

    @asynccontextmanager
    async def _running_proxy(self) -> AsyncIterator[Proxy]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIOPROXY_")}
        kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
        kept |= {f"TRIOPROXY_{name}": value for name, value in SETTINGS.items()}
        kept["TRIOPROXY_UPSTREAM__BASE_URL"] = f"http://127.0.0.1:{self.upstream.port}/v1"
        kept["TRIOPROXY_LOGGING__FILE"] = str(self.folder / "proxy.log")
        with (self.folder / "stderr.txt").open("wb") as errors:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "trioproxy", "serve", "--bind", "127.0.0.1:0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=kept,
            )
        try:
            async with trio.open_nursery() as nursery:
                proxy = Proxy(process, self.folder)
                with trio.fail_after(30):
                    await nursery.start(proxy.read)
                yield proxy
        finally:
            if process.poll() is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    # Load

    async def _load_and_measure(self) -> None:
        before = self.proxy.resources()
        say(f"seed {self.seed}, {self.seconds:g} s, proxy {self.proxy.process.pid} on port {self.proxy.port}: {before}")
        warm_up = min(max(WARM_UP_SECONDS, WARM_UP_SHARE * self.seconds), self.seconds)
        reference = before
        if warm_up < self.seconds:
            await self._load(warm_up)
            reference = await self._quiet("after warm-up")
        await self._load(self.seconds - warm_up if warm_up < self.seconds else self.seconds)
        self._check_resources(reference, await self._quiet("at the end"))

    async def _load(self, seconds: float) -> None:
        """Clients for so long, and until the last of them has gone."""
        self.world.ending = trio.Event()
        self.upstream.steady = False
        async with trio.open_nursery() as clients:
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._show_progress)
                    nursery.start_soon(self._let_in, clients)
            self.world.ending.set()
            self.upstream.steady = True
            clients.cancel_scope.deadline = trio.current_time() + CLIENTS_GO_SECONDS
        if clients.cancel_scope.cancelled_caught:
            self.ledger.complain("clients did not come to their end")

    async def _let_in(self, clients: trio.Nursery) -> None:
        """An open loop: they come whether or not others have gone, up to a limit."""
        for rate in cycle(RATES):
            ends = trio.current_time() + self.chance.uniform(1, 5)
            while trio.current_time() < ends:
                await trio.sleep(self.chance.expovariate(rate))
                if self.clients < CLIENTS_MAX:
                    self.clients += 1
                    self.most_clients = max(self.most_clients, self.clients)
                    clients.start_soon(self._client)
                else:
                    self.turned_away += 1

    async def _client(self) -> None:
        try:
            await self.world.client()
        except OSError as error:
            self.ledger.complain("a client could not connect", repr(error))
        finally:
            self.clients -= 1

    async def _show_progress(self) -> None:
        while True:
            await trio.sleep(PROGRESS_SECONDS)
            await self._show("", await self.proxy.metrics(self.world), self.proxy.resources())

    async def _show(self, when: str, metrics: Metrics, resources: Resources) -> None:
        outcomes = metrics.by("requests_outcome_total", "outcome")
        count = metrics.sum
        say(
            f"{trio.current_time() - self.began:6.1f} s {when:<13} clients {self.clients:3d} "
            f"requests {count('requests_total'):6d} [{_counts(outcomes)}] passed {count('passthrough_requests_total')} "
            f"refused {count('refused_total')} queue {count('queue_size')} in use {metrics.in_use} "
            f"| {resources} | complaints {self.ledger.complaints.total()} lag {1000 * self.lag:.0f} ms"
        )
        self.lag = 0.0

    # Watching

    def _judge(self, call: Call) -> None:
        self.ledger.judge(call.number, call.began, call.treated, web_socket=call.is_web_socket)

    async def _watch_for_orphans(self) -> None:
        while True:
            await trio.sleep(0.25)
            for call in self.upstream.open:
                self._judge(call)

    async def _watch_health(self) -> None:
        """How late the proxy is, new connections included."""
        while True:
            self.ledger.glance()
            try:
                async with await trio.open_tcp_stream("127.0.0.1", self.proxy.port) as stream:
                    await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    await stream.receive_some()
            except (OSError, trio.BrokenResourceError):
                pass  # it is being ended
            self.ledger.glance()
            await trio.sleep(0.1)

    async def _watch_lag(self) -> None:
        while True:
            due = trio.current_time() + 0.05
            await trio.sleep_until(due)
            self.lag = max(self.lag, trio.current_time() - due)
            self.most_lag = max(self.most_lag, self.lag)

    def _check(self, name: str, ok: bool, seen: object) -> None:
        self.checks.append(Check(name, ok, str(seen)))

    async def _quiet(self, when: str) -> Resources:
        """Nobody is there any more: see that the proxy has noticed, and what it uses then."""
        name = f"{when}: no call of the upstream is open {ORPHAN_SECONDS:g} s after the last client"
        while self.upstream.open and self.ledger.since_last_left() < ORPHAN_SECONDS:  # noqa: ASYNC110 - nobody tells us
            await trio.sleep(0.01)
        orphans = [(call.number, call.method) for call in self.upstream.open]
        self._check(name, not orphans, orphans or f"{self.ledger.since_last_left():.2f} s")
        idle = await self._wait_until_idle()
        metrics = await self.proxy.metrics(self.world)
        resources = self.proxy.resources()
        await self._show(when, metrics, resources)
        seen = f"queue {metrics.sum('queue_size')}, in use {metrics.in_use}"
        self._check(f"{when}: nothing is queued, all slots are free", seen == "queue 0, in use 0", seen)
        self._check(f"{when}: no connection to the upstream is left", idle, self.upstream.connections)
        return resources

    async def _wait_until_idle(self) -> bool:
        """Whether all connections to the upstream have been closed in time, and all of the clients' ends."""
        with trio.move_on_after(QUIET_SECONDS) as scope:
            while self.upstream.connections:  # noqa: ASYNC110 - nobody tells us
                await trio.sleep(0.1)
            await trio.sleep(1)
        return not scope.cancelled_caught

    def _check_resources(self, before: Resources, after: Resources) -> None:
        more = after.descriptors - before.descriptors
        seen = f"{before.descriptors} -> {after.descriptors}"
        self._check(f"descriptors within +{DESCRIPTORS_MORE_MAX}", more <= DESCRIPTORS_MORE_MAX, seen)
        seen = f"{before.memory / MIB:.1f} -> {after.memory / MIB:.1f} MiB, at most {after.memory_max / MIB:.1f}"
        if self.seconds < MEMORY_RUN_SECONDS_MIN:
            say(f"memory is not checked in runs shorter than {MEMORY_RUN_SECONDS_MIN:g} s: {seen}")
            return
        limit = max(MEMORY_MORE_MAX, MEMORY_MORE_SHARE_MAX * before.memory)
        self._check(f"memory within +{limit / MIB:.1f} MiB", after.memory - before.memory <= limit, seen)

    # The end

    async def _check_the_end(self) -> None:
        metrics = await self.proxy.metrics(self.world)
        processor = self.proxy.processor_seconds()
        last = await self._terminate()
        logged = LoggedLines()
        with self.proxy.log_file.open() as lines:
            for line in lines:
                logged.add(line)
        say(f"proxy: {processor:.1f} s on the processor, {logged.lines} log lines, outcomes {dict(logged.outcomes)}")
        self._check_books(metrics, logged, last)
        self._check_metrics(metrics)
        self._check_log(logged)
        self._check_upstream(metrics)

    async def _terminate(self) -> int:
        """SIGTERM while some clients are there; how many scheduled requests they had."""
        head = "POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nX-Soak-Body: 0:0\r\n"
        wants = ("flood", "never")
        connect = self.world.connect
        async with connect() as unfinished, connect(receive_buffer=4096) as deaf, connect() as waiting:
            await unfinished.send(head.encode())
            for wire, wanted in zip((deaf, waiting), wants, strict=True):
                number = self.world.next_number()
                said = f"{head}X-Request-Id: soak-{number}\r\nX-Soak-Id: {number}\r\nX-Soak-Wants: {wanted}\r\n\r\n"
                await wire.send(said.encode())
            await trio.sleep(0.3)
            began = time.monotonic()
            self.proxy.process.send_signal(signal.SIGTERM)
            status = "still there"
            with trio.move_on_after(GRACE_SECONDS + 10) as patience:
                status = f"status {await self.proxy.process.wait()}"
                await self.proxy.ended.wait()
            if patience.cancelled_caught:
                self.proxy.process.kill()
            seconds = time.monotonic() - began
        ok = status == "status 0" and seconds < GRACE_SECONDS + EXIT_SECONDS_MAX
        name = f"SIGTERM ends it within the grace of {GRACE_SECONDS} s, with 3 clients there"
        self._check(name, ok, f"{status} after {seconds:.2f} s")
        return len(wants)

    def _check_books(self, metrics: Metrics, logged: LoggedLines, last: int) -> None:
        by_status, by_outcome = metrics.sum("requests_total"), metrics.sum("requests_outcome_total")
        self._check("sum of requests_total = sum of requests_outcome_total", by_status == by_outcome, by_outcome)
        lines = logged.outcomes.total()
        self._check(
            "log lines with an outcome = that + those at the end",
            lines == by_outcome + last,
            f"{lines} = {by_outcome} + {last}",
        )
        self._check("requests with two closing lines", not logged.twice, logged.twice)
        for name, event in (
            ("passthrough_requests", "request passed through"),
            ("refused", "request refused"),
            ("websocket_sessions", "websocket closed"),
        ):
            counted, told = metrics.sum(f"{name}_total"), logged.events[event]
            self._check(f"{name}_total = log lines {event!r}", counted == told, f"{counted} = {told}")
        self._check("no WebSocket session is left", metrics.sum("websockets") == 0, metrics.sum("websockets"))
        patient, sent = len(self.ledger.patient), self.ledger.scheduled_sent
        seen = f"{patient} <= {by_outcome} <= {sent}"
        self._check("patient clients' requests <= scheduled <= sent", patient <= by_outcome <= sent, seen)
        differing = disagreements(self.ledger, logged)
        self._check("the log tells of each what its patient client saw", not differing, f"{patient} compared")
        for difference in differing[:10]:
            say(f"  {difference}")
        complaints = self.ledger.complaints
        self._check("answers as they must be, no orphans: complaints", not complaints, _counts(complaints) or 0)
        for detail in self.ledger.details:
            say(f"  {detail}")

    def _check_metrics(self, metrics: Metrics) -> None:
        for name in ("invariant_violations_total", "listener_failures_total", "log_lines_dropped_total"):
            count = metrics.sum(name)
            self._check(f"openai_proxy_{name} is 0", count == 0, count)
        errors = metrics.by("requests_outcome_total", "outcome")["proxy_error"]
        self._check("no proxy_error", errors == 0, errors)

    def _check_log(self, logged: LoggedLines) -> None:
        self._check("no log line of level error, none with a traceback", not logged.bad, len(logged.bad))
        for line in logged.bad[:5]:
            say(f"  {line}")
        printed = self.proxy.printed
        self._check("as many lines on standard output", printed == logged.lines, f"{printed} = {logged.lines}")
        errors = self.proxy.errors_file.read_text()
        self._check("nothing on standard error", not errors, f"{len(errors)} characters")
        if errors:
            say(errors[:4000])

    def _check_upstream(self, metrics: Metrics) -> None:
        busiest = self.upstream.busiest
        self._check(f"upstream: at most {SLOTS} scheduled calls at once", 0 < busiest <= SLOTS, busiest)
        self._check("upstream: no call is open", not self.upstream.open, len(self.upstream.open))
        self._check("upstream: no connection is open", not self.upstream.connections, self.upstream.connections)
        levels = metrics.by("requests_outcome_total", "outcome")
        missing = OUTCOMES_WANTED - set(levels)
        self._check("every outcome occurred", not missing or self.seconds < MEMORY_RUN_SECONDS_MIN, _counts(levels))

    def _report(self) -> None:
        ledger, upstream = self.ledger, self.upstream
        say(f"clients: {_counts(ledger.kinds)}; most at once {self.most_clients}, not let in {self.turned_away}")
        say(f"answers: {_counts(ledger.answers)}")
        say(
            f"upstream: {upstream.calls} calls, {upstream.given_up} given up by the proxy, {upstream.outages} outages; "
            f"{_counts(upstream.treated)}"
        )
        seen, unseen = (
            f"{1000 * seconds:.0f} ms (request {number})" for seconds, number in ledger.slowest_to_end.values()
        )
        say(f"calls outlived their clients by at most {seen}; pipelining, uploading or on a WebSocket: {unseen}")
        late = (ledger.latest, self.most_lag)
        say("late, at most: the proxy by {:.0f} ms, this process by {:.0f} ms".format(*(1000 * each for each in late)))
        say("")
        for check in self.checks:
            say(str(check))
        failed = sum(not check.ok for check in self.checks)
        say(f"{len(self.checks)} checks, {failed} failed")


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the load lasts (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="what chance depends on (default: 1)")
    parser.add_argument("--keep", type=Path, help="a folder for the log; default: one that is removed afterwards")
    arguments = parser.parse_args()

    async def run(folder: Path) -> bool:
        return await Soak(arguments.seconds, arguments.seed, folder).run()

    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True)
        return 0 if trio.run(run, arguments.keep) else 1
    with tempfile.TemporaryDirectory(prefix="trioproxy-soak-") as folder:
        return 0 if trio.run(run, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
