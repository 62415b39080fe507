"""trioproxy beside its peers on the same work: LiteLLM's proxy, Portkey's gateway, nginx, HAProxy, the obvious proxy.

Each is a process of its own on the loopback interface, before the same upstream, found on the search path or where an
option says; what is not found is left out by name. Rounds go through all of them, each beginning with another one, and
a ratio or a difference is made within a round; medians count, and the range stands behind them.

    python bench/peers.py --rounds 5 --write

`nox -s peers` installs the peers first. Takes about nine minutes; on a busy machine there are fewer rounds. The exit
status is 1 if trioproxy needs more than a twentieth of LiteLLM's CPU, or if an urgent request is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import charts
import peer_rounds
import peer_text
import peer_urgent
import results
import trio
from parts import OBVIOUS, OURS, Upstream
from peer_rounds import Round
from peer_servers import PEERS, Found, Target, check, find, serving, takes_part
from results import Figure, figure

DIRECT = "no proxy"
ROUNDS_MAX = 20
LITELLM = "LiteLLM"
LITELLM_RATIO_MIN = 20.0
KEPT = results.KEPT / "peers.json"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind of rounds, and what is made of them."""

    part: str
    measure: Callable[[Target], Awaitable[Round]]
    direct: bool
    """Whether the upstream itself takes part."""
    seconds_max: float
    """After so long no other round begins: slow machines have fewer of them."""
    figures: Callable[[str, dict[str, list[Round]]], list[Figure]]


async def rounds_of(comparison: Comparison, targets: Sequence[Target], rounds: int) -> dict[str, list[Round]]:
    """Go round so often, or until the time is up."""
    found: dict[str, list[Round]] = {target.name: [] for target in targets}
    end = trio.current_time() + comparison.seconds_max
    for number in range(rounds):
        first = number % len(targets)
        for target in (*targets[first:], *targets[:first]):
            found[target.name].append(await comparison.measure(target))
        if trio.current_time() > end:
            break
    return found


def of(rounds: Sequence[Round], what: str) -> list[float]:
    """One figure of each round."""
    return [each[what] for each in rounds]


def cpu_figures(part: str, found: dict[str, list[Round]]) -> list[Figure]:
    """Ratios to the obvious proxy, and of LiteLLM to us; the obvious proxy against itself is the noise."""
    figures = []
    for what in found[OBVIOUS][0]:
        base = of(found[OBVIOUS], what)
        noise = [after / before for before, after in pairwise(base)]
        micros = [1e6 * each for each in base]
        figures.append(figure(micros, part=f"{part}, absolute", what=what, who=OBVIOUS, unit="µs"))
        figures.append(figure(noise or [1.0], part=f"{part}, noise", what=what, who=OBVIOUS, unit="ratio"))
        for who, rounds in found.items():
            ratios = [own / other for own, other in zip(of(rounds, what), base, strict=True)]
            figures.append(figure(ratios, part=part, what=what, who=who, unit="ratio"))
            if who.startswith(LITELLM):
                ours = [own / other for own, other in zip(of(rounds, what), of(found[OURS], what), strict=True)]
                gate = LITELLM_RATIO_MIN if who == LITELLM else None
                figures.append(figure(ours, part=f"{part}, gate", what=what, who=who, unit="ratio", at_least=gate))
    return figures


def added_figures(part: str, found: dict[str, list[Round]]) -> list[Figure]:
    """Milliseconds beyond what the upstream itself takes."""
    figures = []
    for what in found[DIRECT][0]:
        base = of(found[DIRECT], what)
        millis = [1e3 * each for each in base]
        figures.append(figure(millis, part=f"{part}, absolute", what=what, who=DIRECT, unit="ms"))
        for who, rounds in found.items():
            added = [1e3 * (own - other) for own, other in zip(of(rounds, what), base, strict=True)]
            figures += [figure(added, part=part, what=what, who=who, unit="ms")] if who != DIRECT else []
    return figures


def plain_figures(part: str, found: dict[str, list[Round]]) -> list[Figure]:
    """As they were measured."""
    return [
        figure(of(rounds, what), part=part, what=what, who=who, unit="")
        for what in found[OBVIOUS][0]
        for who, rounds in found.items()
    ]


COMPARISONS = (
    Comparison("cpu", peer_rounds.cpu, False, 100, cpu_figures),
    Comparison("latency", peer_rounds.latency, True, 60, added_figures),
    Comparison("first token", peer_rounds.first_token, True, 40, added_figures),
    Comparison("rate", peer_rounds.rate, True, 75, plain_figures),
    Comparison("streams", peer_rounds.streams_without_stall, True, 75, plain_figures),
)
PARTS = (*(each.part for each in COMPARISONS), "reclaim", "urgent")


async def reclaim_figures(targets: Sequence[Target], upstream: Upstream) -> list[Figure]:
    """How fast a slot is reclaimed: median and worst; None is more than the bench waits."""
    figures = []
    for target in targets:
        for what, taken in (await peer_rounds.reclaim(target, upstream)).items():
            ends = (min(taken), median(taken), max(taken))
            low, middle, high = (1e3 * each if each < math.inf else None for each in ends)
            figures.append(
                Figure(part="reclaim", what=what, who=target.name, unit="ms", value=middle, low=low, high=high)
            )
    return figures


async def start(
    names: Sequence[str], found: Found, upstream: Upstream, stack: AsyncExitStack, tell: Callable[[str], object]
) -> list[Target]:
    """All that do the work; a peer that does not is left out, with what it said."""
    targets = []
    for name in names:
        tell(f"starting {name}")
        try:
            target = await stack.enter_async_context(serving(name, found, upstream, ("--concurrency", "256")))
            await check(target)
        except (OSError, RuntimeError, AssertionError, trio.TooSlowError) as error:
            if name not in found.programs:
                raise
            found.left_out[name] = f"it does not do the work: {error}"
            del found.programs[name], found.versions[name]
        else:
            targets.append(target)
    return targets


async def measure(
    parts: Sequence[str], rounds: int, seconds: float, found: Found, tell: Callable[[str], object]
) -> list[Figure]:
    """All comparisons that are asked for."""
    names = (OBVIOUS, OURS, *found.programs)
    figures: list[Figure] = []
    upstream = Upstream()
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        async with AsyncExitStack() as stack:
            targets = await start(names, found, upstream, stack, tell)
            tell("warming up")
            for target in targets:
                await peer_rounds.cpu(target)
            for comparison in COMPARISONS:
                if comparison.part in parts:
                    tell(comparison.part)
                    asked = [target for target in targets if takes_part(target.name, comparison.part)]
                    asked += [Target(DIRECT, None, upstream.port)] if comparison.direct else []
                    measured = await rounds_of(comparison, asked, rounds)
                    figures += comparison.figures(comparison.part, measured)
            if "reclaim" in parts:
                tell("reclaim")
                asked = [target for target in targets if takes_part(target.name, "reclaim")]
                figures += await reclaim_figures(asked, upstream)
        nursery.cancel_scope.cancel()
    if "urgent" in parts:
        names = tuple(name for name in names if name not in found.left_out and takes_part(name, "urgent"))
        figures += await peer_urgent.compare(names, found, seconds, tell)
    return figures


def write(found: results.Results) -> None:
    """Keep the figures, put them into the page, draw the charts."""
    results.save(KEPT, found)
    page = results.PAGE.read_text("utf-8")
    results.PAGE.write_text(results.between(page, "comparison", peer_text.section(found)), "utf-8")
    charts.draw()


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each part, at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=peer_urgent.SECONDS, help="of urgent load (%(default)g)")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be said several times")
    programs = {peer.option: peer.program for peer in PEERS}
    for option, program in programs.items():
        parser.add_argument(f"--{option}", metavar="PROGRAM", help=f"instead of {program} on the search path")
    results.add_option(parser)
    parser.add_argument("--write", action="store_true", help="keep the figures, and put them into page and charts")
    parser.add_argument("--note", default="", help="something that must be known beside the figures")
    options = parser.parse_args()
    if not 1 <= options.rounds <= ROUNDS_MAX or not 1 <= options.seconds <= 60:
        parser.error(f"--rounds: from 1 to {ROUNDS_MAX}; --seconds: from 1 to 60")
    if options.write and options.part:
        parser.error("--write is for all parts together")
    asked = {option: said for option in programs if (said := getattr(options, option))}
    peers = find(asked)
    parts = options.part or PARTS
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s: {line}", file=sys.stderr)

    figures = trio.run(measure, parts, options.rounds, options.seconds, peers, tell)
    tell("done")
    found = results.results(figures, options.note, peers.versions, peers.left_out)
    print(peer_text.text(found))
    results.save(options.json, found)
    if options.write:
        write(found)
    sys.exit(not found.good)


if __name__ == "__main__":
    main()
