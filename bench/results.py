"""What a benchmark has found, as a file: figures with their ranges and marks, and when and where they were measured.

Text, page and charts are all made of these, so none of them says what was not measured. A benchmark takes `--json
FILE`; the files that the documentation's charts were drawn from are kept in `bench/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

HERE: Final = Path(__file__).resolve().parent
KEPT: Final = HERE / "results"
PAGE: Final = HERE.parent / "docs" / "performance.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure."""

    part: str
    """Which comparison it belongs to."""
    what: str
    who: str
    unit: str
    value: float | None
    """The median, or what is counted; None if it never happened."""
    low: float | None = None
    high: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def good(self) -> bool:
        """Whether it passes its mark; what has none passes."""
        over = self.at_most is not None and (self.value is None or self.value > self.at_most)
        under = self.at_least is not None and (self.value is None or self.value < self.at_least)
        return not over and not under


def figure(
    values: Sequence[float],
    *,
    part: str,
    what: str,
    who: str,
    unit: str,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Figure:
    """Median and range of several rounds."""
    return Figure(
        part=part,
        what=what,
        who=who,
        unit=unit,
        value=median(values),
        low=min(values),
        high=max(values),
        at_most=at_most,
        at_least=at_least,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """When, where, with what."""

    date: str
    python: str
    cores: int
    machine: str
    commit: str
    note: str = ""

    def line(self) -> str:
        """In one line, as it stands below a chart."""
        said = f"{self.date}, Python {self.python}, {self.cores} cores ({self.machine}), commit {self.commit}"
        return f"{said}; {self.note}" if self.note else said

    def paragraph(self) -> str:
        """For the page."""
        noted = f" {self.note[:1].upper()}{self.note[1:]}." if self.note else ""
        return (
            f"Measured on {self.date}, Python {self.python}, {self.cores} cores ({self.machine}), Linux, at commit "
            f"{self.commit}; upstream, clients and proxies share the machine.{noted}\n"
        )


def conditions(note: str = "") -> Conditions:
    """Here and now."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, check=False, cwd=HERE, capture_output=True, text=True).stdout.strip()
    return Conditions(
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        machine=platform.machine(),
        commit=commit or "unknown",
        note=note,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that one benchmark has found."""

    conditions: Conditions
    figures: tuple[Figure, ...]
    versions: dict[str, str]
    """Of the peers that took part."""
    left_out: dict[str, str]
    """Peers that did not, and why."""

    def of(self, part: str, what: str = "") -> list[Figure]:
        """The figures of a comparison, in their order."""
        return [each for each in self.figures if each.part == part and what in ("", each.what)]

    @property
    def good(self) -> bool:
        """Whether all marks are reached."""
        return all(each.good for each in self.figures)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark be told where to write its figures."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def results(
    figures: Iterable[Figure],
    note: str = "",
    versions: dict[str, str] | None = None,
    left_out: dict[str, str] | None = None,
) -> Results:
    """Figures that were measured here and now."""
    return Results(
        conditions=conditions(note), figures=tuple(figures), versions=versions or {}, left_out=left_out or {}
    )


def save(file: Path | None, found: Results) -> None:
    """Write them, if there is a file to write to."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n", "utf-8")


def load(file: Path) -> Results:
    """Read them."""
    found = json.loads(file.read_text("utf-8"))
    return Results(
        conditions=Conditions(**found["conditions"]),
        figures=tuple(Figure(**each) for each in found["figures"]),
        versions=found["versions"],
        left_out=found["left_out"],
    )


def between(text: str, name: str, written: str) -> str:
    """A page with the part that a script writes put in anew, between the comments that mark it."""
    begin, end = f"<!-- {name}: written by bench/", f"<!-- end of the {name} -->\n"
    before, found, rest = text.partition(begin)
    mark, _, rest = rest.partition("\n")
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"no place for the {name}")
    return f"{before}{found}{mark}\n\n{written.strip()}\n\n{end}{after}"
