"""How long urgent requests wait at 200% load, and how busy the slots are, held against an ideal pool.

The real proxy in a process of its own, between clients and an upstream that this process simulates on loopback sockets.
Urgent requests come at half of the capacity, background requests make it 200%. The same arrivals and service times, as
they really were, are given to a discrete-event simulation of a pool that costs nothing (`tests/scheduler/ideal.py`).

    python bench/urgent.py --seconds 20

The exit status is 1 if a bound is missed: urgent requests' mean wait within 1.25 of the ideal, none of them refused,
slots busy for 98% of the time that anything is queued, never more at the upstream than there are slots. Urgent waits
are a matter of chance, in the ideal pool too: one run says it to a tenth or so. A slot is empty for some milliseconds
between two requests, so the shorter the service, the harder the bounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import fmean

import trio
from parts import OURS
from results import Figure, add_option, results, save

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "scheduler"))

from ideal import URGENT, Pool, urgent_at_half_of_capacity

from openloop import Clients, Figures, TimedUpstream, Visit, figures
from processes import environment, free_port

RATIO_MAX = 1.25
BUSY_SHARE_MIN = 0.98
SECONDS_MAX = 300.0
REQUESTS_MAX = 50_000
DRAIN_SECONDS = 60.0
"""What starting, warming up and serving the rest of the queue may take beside the load itself."""


@asynccontextmanager
async def running_proxy(pool: Pool, upstream: str) -> AsyncIterator[int]:
    """The proxy as a process of its own, ended with the block; its port."""
    port = free_port()
    command = [sys.executable, "-m", "trioproxy", "serve", "--bind", f"127.0.0.1:{port}", "--upstream", upstream]
    command += ["--concurrency", str(pool.slots), "--max-queue", str(pool.places)]
    async with trio.open_nursery() as nursery:
        start = partial(
            trio.run_process, command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment({})
        )
        await nursery.start(start)  # an exit status other than 0 is an error; cancelling ends the process
        with trio.fail_after(20):
            while True:
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.05)
        yield port
        nursery.cancel_scope.cancel()


async def measure(options: argparse.Namespace) -> tuple[Figures, list[Visit], TimedUpstream]:
    """Run the load once."""
    pool = Pool(slots=options.slots, places=options.places)
    workload = urgent_at_half_of_capacity(pool, options.service, options.seconds)
    arrivals = workload.arrivals(options.seed)
    if len(arrivals) > REQUESTS_MAX:
        raise SystemExit(f"{len(arrivals)} requests are more than {REQUESTS_MAX}: fewer seconds or a longer service")
    upstream = TimedUpstream()
    with trio.fail_after(options.seconds + DRAIN_SECONDS):
        async with trio.open_nursery() as nursery:
            await nursery.start(upstream.serve)
            async with running_proxy(pool, upstream.url) as port:
                clients = Clients(port, upstream)
                await clients.open(pool.slots + pool.places)
                transit_seconds = await clients.transit_seconds()
                visits = await clients.come(arrivals)
                clients.close()
            nursery.cancel_scope.cancel()
    return figures(pool, visits, URGENT, transit_seconds), visits, upstream


def report(options: argparse.Namespace, found: Figures, visits: list[Visit], upstream: TimedUpstream) -> bool:
    """Print everything; whether all bounds are kept."""
    served = [visit for visit in visits if visit.served]
    lateness = fmean(visit.lateness_seconds for visit in served)
    turnaround = (1 / found.busy_share - 1) * fmean(visit.service_seconds for visit in served)
    good = {
        "ratio": found.ratio <= RATIO_MAX,
        "busy": found.busy_share >= BUSY_SHARE_MIN,
        "slots": upstream.at_once_max <= options.slots,
        "refused": not found.urgent_refused,
    }

    def verdict(name: str) -> str:
        return "ok" if good[name] else "MISSED"

    print(
        f"{options.slots} slots, {options.places} places, service {1000 * options.service:g} ms ± 50%, "
        f"{len(visits)} requests in {options.seconds:g} s, seed {options.seed}\n"
        f"unloaded transit, median      {1000 * found.transit_seconds:8.2f} ms (taken off from each wait)\n"
        f"upstream's own lateness, mean {1000 * lateness:8.2f} ms (given to the ideal too)\n"
        f"urgent requests               {found.urgent:8d}, refused {found.urgent_refused} {verdict('refused')}\n"
        f"  mean wait                   {1000 * found.wait_seconds_mean:8.2f} ms, "
        f"ideal {1000 * found.ideal_wait_seconds_mean:.2f} ms\n"
        f"  ratio                       {found.ratio:8.3f} (at most {RATIO_MAX}) {verdict('ratio')}\n"
        f"  median wait                 {1000 * found.wait_seconds_median:8.2f} ms, "
        f"ideal {1000 * found.ideal_wait_seconds_median:.2f} ms\n"
        f"  mean wait, the proxy's word {1000 * found.own_wait_seconds_mean:8.2f} ms (server-timing)\n"
        f"background requests served    {found.others_served:8d}, ideal {found.ideal_others_served}\n"
        f"slots busy while any waits    {100 * found.busy_share:8.2f} % at the upstream (at least "
        f"{100 * BUSY_SHARE_MIN:g} %) {verdict('busy')}\n"
        f"  so a slot is empty for      {1000 * turnaround:8.2f} ms between two requests\n"
        f"most at the upstream at once  {upstream.at_once_max:8d} of {options.slots} {verdict('slots')}"
    )
    return all(good.values())


def handed_over(found: Figures) -> list[Figure]:
    """The main figures, for whoever wants to draw them."""
    mean, busy = found.wait_seconds_mean, found.busy_share
    return [
        Figure(part="wait", what="mean wait", who="an ideal queue", unit="s", value=found.ideal_wait_seconds_mean),
        Figure(part="wait", what="mean wait", who=OURS, unit="s", value=mean),
        Figure(part="ratio", what="mean wait", who=OURS, unit="ideal ones", value=found.ratio, at_most=RATIO_MAX),
        Figure(part="busy", what="slots busy", who=OURS, unit="share", value=busy, at_least=BUSY_SHARE_MIN),
        Figure(part="refused", what="urgent refused", who=OURS, unit="", value=found.urgent_refused, at_most=0),
    ]


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=45.0, help="how long requests come (%(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="how many may run at once (%(default)s)")
    parser.add_argument("--places", type=int, default=50, help="how many may wait (%(default)s)")
    parser.add_argument("--service", type=float, default=0.5, help="the mean service time in seconds (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another number is another run (%(default)s)")
    add_option(parser)
    options = parser.parse_args()
    if not 0 < options.seconds <= SECONDS_MAX:
        parser.error(f"--seconds: more than 0, at most {SECONDS_MAX:g}")
    if options.slots < 1 or options.places < 1 or options.service <= 0:
        parser.error("--slots, --places and --service: more than 0")
    found, visits, upstream = trio.run(measure, options)
    save(options.json, results(handed_over(found)))
    sys.exit(not report(options, found, visits, upstream))


if __name__ == "__main__":
    main()
