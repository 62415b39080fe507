"""The demo as plain lines, for pipes, files and simple terminals: a greeting, then a few lines a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trioproxy.demo.scenarios import Scenario
from trioproxy.demo.watch import Happening, View
from trioproxy.errors import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What is set up, and where."""

    scenario: Scenario
    upstream_url: str
    addresses: tuple[str, ...]
    """Where the proxy listens, as URLs."""
    log_file: Path

    @property
    def commands(self) -> tuple[str, ...]:
        """What to try in another terminal, each line less than 80 columns wide."""
        where = self.addresses[0].removeprefix("http://")
        return (
            f"time curl {where}/v1/completions -H 'X-Priority: critical' \\",
            """  -H 'Content-Type: application/json' -d '{"model":"gpt-sim","prompt":"Hi"}'""",
            f"curl -s {where}/metrics | grep ^openai_proxy_queue_size",
            f"tail -f {self.log_file}",
        )

    @property
    def echo_command(self) -> str:
        """One more, where there is room: a WebSocket through the proxy, at which everything is sent back."""
        return f"npx wscat -c ws://{self.addresses[0].removeprefix('http://')}/v1/realtime"


def greeting(stage: Stage) -> str:
    """What is there, what to try by hand, and how to read the lines that follow."""
    scenario = stage.scenario
    speed = "" if scenario.speed == 1 else f", at {scenario.speed:g} times the usual speed"
    share = f"{100 * scenario.offered_load:.0f} % of what {scenario.slots} slots can serve"
    commands = "\n".join(f"  {line}" for line in (*stage.commands, stage.echo_command))
    return f"""\
scenario   {scenario.name}: {scenario.about}{speed}
proxy      {", ".join(stage.addresses)}, with {scenario.slots} slots and {scenario.places} places in its queue
log        {stage.log_file}
upstream   {stage.upstream_url}, simulated: no key is needed, nothing leaves this machine
clients    simulated, of five levels; they ask for {share}

Try in another terminal, and compare with X-Priority: very_low
{commands}

What you will see, each second:
  evicted    N of a level by another: the queue was full, and the more urgent newcomer took a place
  rejected   N of a level: the queue was full, and nobody in it was less urgent
  overtook   a critical request got the next free slot, past others that had come earlier
  yours      requests that you sent by hand
  passed through: requests for the list of models, which need no slot
"""


def status_line(view: View) -> str:
    """The state at one moment."""
    by_level = ", ".join(f"{level.queued} {level.name}" for level in view.levels if level.queued)
    return (
        f"slots {view.running}/{len(view.slots)}  queue {view.queued}/{view.places}"
        f"{f' ({by_level})' if by_level else ''}  served {view.total(Status.COMPLETED)}"
        f"  passed through {view.passed_through}"
    )


def notes(happenings: Iterable[Happening]) -> list[str]:
    """What happened, a line for each kind of happening."""
    kinds: dict[str, Counter[str]] = {}
    for happening in happenings:
        kinds.setdefault(happening.kind, Counter())[happening.text] += 1
    return [
        f"{kind:<10} {', '.join(f'{count} {text}' for text, count in counts.items())}" for kind, counts in kinds.items()
    ]
