"""What relaying costs: CPU for each request and for each streamed chunk, as ratios to the obvious proxy.

Both proxies run as processes of their own, with everything switched on in ours (scheduler, metrics, log). Rounds
alternate between them, and a ratio is made of each pair of rounds, since these machines drift; the median counts. The
noise is shown beside it: the spread of the ratios, and of the obvious proxy against itself.

    python bench/relay.py --rounds 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import trio
from parts import OBVIOUS, OURS, Server, Upstream, ask, running, spread
from results import Figure, add_option, figure, results, save

CONNECTIONS = 16
ROUNDS_MAX = 100


@dataclass(frozen=True)
class Work:
    """One kind of request, and how many units of work a round of it is."""

    name: str
    kind: str
    requests_per_connection: int
    units_per_request: int
    gate: float

    @property
    def units(self) -> int:
        """Requests or chunks in one round."""
        return CONNECTIONS * self.requests_per_connection * self.units_per_request


WORKS = (
    Work("request, not streamed", "json", 40, 1, 0.55),
    Work("paced chunk, 10 ms apart", "paced 60", 1, 60, 0.75),
    Work("burst chunk", "burst 500", 2, 500, 0.15),
)


async def round_of(server: Server, work: Work) -> float:
    """CPU seconds of the server for each unit of work in one round."""
    streams = [await trio.open_tcp_stream("127.0.0.1", server.port) for _ in range(CONNECTIONS)]

    async def client(stream: trio.SocketStream) -> None:
        for _ in range(work.requests_per_connection):
            await ask(stream, work.kind)

    before = server.cpu_seconds()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(client, stream)
    used = server.cpu_seconds() - before
    for stream in streams:
        await stream.aclose()
    return used / work.units


async def compare(rounds: int, tell: Callable[[str], object]) -> list[Figure]:
    """Run everything, and tell what came of it."""
    upstream, figures = Upstream(), list[Figure]()
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        extra = ("--concurrency", "64", "--max-queue", "100")
        async with running(OBVIOUS, upstream.url) as obvious, running(OURS, upstream.url, *extra) as ours:
            for work in WORKS:
                for server in (obvious, ours):
                    await round_of(server, work)  # warm
                pairs = [(await round_of(obvious, work), await round_of(ours, work)) for _ in range(rounds)]
                ratios = [own / other for other, own in pairs]
                against_itself = [second / first for (first, _), (second, _) in pairwise(pairs)]
                ours_of_it = figure(ratios, part="cpu", what=work.name, who=OURS, unit="ratio", at_most=work.gate)
                itself = figure(against_itself, part="cpu", what=work.name, who=OBVIOUS, unit="ratio")
                alone = [1e6 * other for other, _ in pairs]
                absolute = figure(alone, part="cpu, absolute", what=work.name, who=OBVIOUS, unit="µs")
                figures += [ours_of_it, itself, absolute]
                noise = f"the obvious proxy against itself: {spread(against_itself)}"
                tell(
                    f"{work.name:26} {spread(ratios)} of the obvious proxy's "
                    f"{median(alone):.0f} µs; at most {work.gate}: "
                    f"{'ok' if ours_of_it.good else 'MISSED'}   ({noise})"
                )
        nursery.cancel_scope.cancel()
    return figures


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="pairs of rounds for each kind of work (%(default)s)")
    add_option(parser)
    options = parser.parse_args()
    if not 2 <= options.rounds <= ROUNDS_MAX:
        parser.error(f"--rounds: from 2 to {ROUNDS_MAX}")
    found = results(trio.run(compare, options.rounds, print))
    save(options.json, found)
    sys.exit(not found.good)


if __name__ == "__main__":
    main()
