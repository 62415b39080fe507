"""The guard: tells a change that makes the path of a request longer, on any machine, however busy.

Nothing is timed. Instructions and system calls are counted (`counting.py`), for trioproxy and for the obvious proxy.
The ratio of their instructions is compared with the one that is kept in `guard.json`: a count depends on how Python was
built and on the libraries' versions, the ratio hardly does.

    python bench/guard.py                  # everything; fails if more is done than is kept
    python bench/guard.py --write          # keep the present values
    python bench/guard.py --alone request  # while optimising: trioproxy alone, with its system calls by name
"""

from __future__ import annotations

import argparse
import enum
import json
import platform
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import trio
from counting import Count, counting
from parts import OBVIOUS, OURS

KEPT: Final = Path(__file__).resolve().with_suffix(".json")

SYSTEM_CALLS_SLACK: Final = 0.5
"""How many there may be more or less: one more for each request or chunk is seen."""

BATCHES: Final = 3
WARM: Final = 10


REQUESTS: Final[Mapping[str, int]] = {"json": 8, "steps 1": 8, "steps 21": 4, "burst 1": 8, "burst 201": 2}
"""Kinds of requests (`StepByStep`), and how many make a batch."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is judged: a request of some kind, or one chunk of what makes it longer than another kind."""

    unit: str
    kind: str
    beyond: str | None = None
    units: int = 1
    slack: float = 0.1
    """By which part the instructions may differ from what is kept: two builds of Python differ by half of it."""

    @property
    def kinds(self) -> list[str]:
        """All that is to be counted."""
        return [self.kind] if self.beyond is None else [self.kind, self.beyond]

    def share(self, counts: Mapping[str, Count]) -> Count:
        """One unit's share, by what was counted of each kind."""
        count = counts[self.kind]
        return (count if self.beyond is None else count.less(counts[self.beyond])).each(self.units)


WORKS: Final[Mapping[str, Work]] = {
    "request": Work("request, not streamed", "json"),
    "stream": Work("streamed request of one chunk", "steps 1"),
    "paced": Work("paced chunk", "steps 21", beyond="steps 1", units=20),
    "burst": Work("burst chunk", "burst 201", beyond="burst 1", units=200, slack=0.15),
}


async def count_all(name: str, works: Sequence[str]) -> dict[str, Count]:
    """These works for the server of that name."""
    kinds = dict.fromkeys(kind for work in works for kind in WORKS[work].kinds)
    async with counting(name) as server:
        await server.begin(kinds, WARM)
        counts = {kind: await server.count(kind, REQUESTS[kind], BATCHES) for kind in kinds}
    return {work: WORKS[work].share(counts) for work in works}


@dataclass(frozen=True, slots=True)
class Values:
    """What is kept of a work. The instructions tell which side has moved when the ratio has."""

    ratio: float
    system_calls: float
    instructions: float
    obvious_instructions: float

    @classmethod
    def of(cls, ours: Count, obvious: Count) -> Values:
        """From what was counted, rounded to what can be read."""
        return cls(
            ratio=round(ours.instructions / obvious.instructions, 5),
            system_calls=round(ours.system_calls, 2),
            instructions=round(ours.instructions),
            obvious_instructions=round(obvious.instructions),
        )


class BadValuesError(Exception):
    """The file of kept values cannot be used."""


def read(text: str) -> dict[str, Values]:
    """The kept values by work. Raises BadValuesError."""
    try:
        works = {work: Values(**values) for work, values in json.loads(text)["works"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadValuesError(f"not what --write writes ({type(error).__name__}: {error})") from error
    if works.keys() != WORKS.keys():
        raise BadValuesError(f"values of {', '.join(works) or 'nothing'}, but what is counted is {', '.join(WORKS)}")
    if not all(isinstance(value, int | float) for values in works.values() for value in asdict(values).values()):
        raise BadValuesError("something that is not a number")
    return works


def written(works: Mapping[str, Values]) -> str:
    """The file of kept values."""
    kept = {"python": platform.python_version(), "works": {work: asdict(values) for work, values in works.items()}}
    return json.dumps(kept, indent=2) + "\n"


class Verdict(enum.Enum):
    """How a value compares with what is kept of it."""

    OK = "ok"
    MORE = "MORE"
    LESS = "less"


@dataclass(frozen=True, slots=True)
class Finding:
    """A value beside what is kept of it."""

    work: str
    what: str
    now: float
    kept: float
    slack: float

    @property
    def verdict(self) -> Verdict:
        """More, less, or about as much."""
        if abs(self.now - self.kept) <= self.slack:
            return Verdict.OK
        return Verdict.MORE if self.now > self.kept else Verdict.LESS

    def __str__(self) -> str:
        change = f"{self.now / self.kept - 1:+.1%}" if self.kept > self.slack else ""
        kept, most = number(self.kept), number(self.kept + self.slack)
        return (
            f"{WORKS[self.work].unit:29} {self.what:19} {number(self.now):>9}, kept {kept:>9} {change:>6}, "
            f"at most {most:>9}: {self.verdict.value}"
        )


def number(value: float) -> str:
    """Instructions in full, system calls and ratios with as many places as say something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def compare(work: str, now: Values, kept: Values) -> list[Finding]:
    """What is judged of a work."""
    return [
        Finding(work, "instructions, ratio", now.ratio, kept.ratio, WORKS[work].slack * kept.ratio),
        Finding(work, "system calls", now.system_calls, kept.system_calls, SYSTEM_CALLS_SLACK),
    ]


def compare_alone(work: str, now: Count, kept: Values) -> list[Finding]:
    """The same without the obvious proxy. It says something only with the Python that the kept values are from."""
    return [
        Finding(work, "instructions", now.instructions, kept.instructions, WORKS[work].slack * kept.instructions),
        Finding(work, "system calls", now.system_calls, kept.system_calls, SYSTEM_CALLS_SLACK),
    ]


def advice(findings: Collection[Finding]) -> str:
    """What is to be done, in a sentence or two."""
    if more := [finding.work for finding in findings if finding.verdict is Verdict.MORE]:
        return (
            f"The path has become longer: {', '.join(dict.fromkeys(more))}. Find what was added to it: "
            f"`python bench/guard.py --alone {more[0]}` counts again while you do.\n"
            "If it has to be, keep the new values with `nox -s guard -- --write` and say why in the commit."
        )
    if any(finding.verdict is Verdict.LESS for finding in findings):
        return "The path has become shorter: keep the new values with `nox -s guard -- --write`, so that it stays so."
    return "Nothing has become longer."


def report(findings: Collection[Finding]) -> bool:
    """Print them; whether nothing has become more."""
    print(*findings, advice(findings), sep="\n")
    return all(finding.verdict is not Verdict.MORE for finding in findings)


def both(works: Sequence[str], kept: Mapping[str, Values] | None) -> bool:
    """Count both proxies; compare with what is kept, or keep it if that is None."""
    obvious, ours = (trio.run(count_all, name, works) for name in (OBVIOUS, OURS))
    now = {work: Values.of(ours[work], obvious[work]) for work in works}
    for work, values in now.items():
        print(
            f"{WORKS[work].unit:30} {number(values.instructions)} instructions, the obvious proxy's "
            f"{number(values.obvious_instructions)}; {values.system_calls} system calls"
        )
    if kept is None:
        KEPT.write_text(written(now), "utf-8")
        return True
    return report([finding for work in works for finding in compare(work, now[work], kept[work])])


def alone(works: Sequence[str], kept: Mapping[str, Values]) -> bool:
    """Count trioproxy only, and show its system calls by name."""
    now = trio.run(count_all, OURS, works)
    for work, count in now.items():
        calls = sorted(count.calls.items(), key=lambda call: -call[1])
        print(f"{WORKS[work].unit}:", ", ".join(f"{name} {times:.2f}" for name, times in calls if times >= 0.01))
    return report([finding for work in works for finding in compare_alone(work, now[work], kept[work])])


def main() -> None:
    """Read the options and the kept values, count, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"only these of {', '.join(WORKS)}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help=f"keep the present values in {KEPT.name}")
    how.add_argument("--alone", action="store_true", help="leave out the obvious proxy")
    options = parser.parse_args()
    if unknown := [work for work in options.works if work not in WORKS]:
        parser.error(f"{unknown[0]} is none of {', '.join(WORKS)}")
    if options.write and options.works:
        parser.error("--write keeps all of them")
    if missing := [program for program in ("valgrind", "vgdb") if not shutil.which(program)]:
        parser.error(f"{missing[0]} is missing: install valgrind")
    works = options.works or list(WORKS)
    if options.write:
        sys.exit(not both(works, None))
    try:
        kept = read(KEPT.read_text("utf-8"))
    except (OSError, BadValuesError) as error:
        parser.error(f"{KEPT}: {error}; `--write` makes it")
    sys.exit(not (alone if options.alone else both)(works, kept))


if __name__ == "__main__":
    main()
