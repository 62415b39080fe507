"""The quick benchmarks one after the other: printed, and with `--write` put into `docs/performance.md`.

    python bench/report.py --write

They take some minutes. What misses its mark is shown, not failed: these are figures, not tests.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = HERE.parent / "docs" / "performance.md"
BEGIN: Final = "<!-- figures: written by bench/report.py -->\n"
END: Final = "<!-- end of the figures -->\n"

QUICK: Final = (
    ("What relaying costs", "relay.py", "--rounds", "5"),
    ("What it adds to the time of an answer", "latency.py", "--rounds", "5"),
    ("What waiting costs, and the start", "waiting.py", "--waiting", "2000", "9900"),
    ("What deciding costs", "deciding.py"),
    ("Urgent requests under overload", "urgent.py"),
)
"""A title, a script and its arguments."""

SCRIPT_SECONDS_MAX: Final = 600.0


def run(title: str, script: str, *arguments: str) -> str:
    """One benchmark: its figures as a section of the page. Everything is printed as well."""
    sys.stdout.write(f"\n{title} ({' '.join(('bench/' + script, *arguments))})\n")
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        timeout=SCRIPT_SECONDS_MAX,
    )
    sys.stdout.write(done.stdout)
    if done.returncode not in (0, 1):
        sys.exit(f"{script} has failed with status {done.returncode}")
    command = " ".join(("python", f"bench/{script}", *arguments))
    return f"### {title}\n\n`{command}`\n\n```text\n{done.stdout.rstrip()}\n```\n"


def conditions() -> str:
    """Where and when: a paragraph for the page."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, check=False, cwd=HERE, capture_output=True, text=True).stdout
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, {os.cpu_count()} cores "
        f"({platform.machine()}), Linux, at commit {commit.strip() or 'unknown'}; upstream, clients and proxies share "
        "the machine.\n"
    )


def main() -> None:
    """Run all, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the figures into {PAGE.name}")
    options = parser.parse_args()
    sections = [run(*each) for each in QUICK]
    if options.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(before + BEGIN + "\n" + "\n".join([conditions(), *sections]) + "\n" + END + after, "utf-8")


if __name__ == "__main__":
    main()
