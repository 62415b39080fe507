"""What tests have measured; printed at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

LINES: Final[list[str]] = []


def note(line: str) -> None:
    """Have a line printed at the end."""
    LINES.append(line)


def milliseconds(seconds: Iterable[float]) -> str:
    """Median and most of some durations."""
    ordered = sorted(1000 * value for value in seconds)
    return f"median {ordered[len(ordered) // 2]:.1f} ms, most {ordered[-1]:.1f} ms of {len(ordered)}"
