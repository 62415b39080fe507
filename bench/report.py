"""The quick benchmarks one after the other: printed, with `--write` put into `docs/performance.md` and charts.

    python bench/report.py --write

They take some minutes. What misses its mark is shown, not failed: these are figures, not tests. The figures are also
kept as files: in `bench/results` with `--write`, else in `build/bench`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

import charts
from results import KEPT, PAGE, between, conditions

HERE: Final = Path(__file__).resolve().parent
BUILD: Final = HERE.parent / "build" / "bench"

QUICK: Final = (
    ("What relaying costs", "relay.py", "--rounds", "5"),
    ("What it adds to the time of an answer", "latency.py", "--rounds", "5"),
    ("What waiting costs, and the start", "waiting.py", "--waiting", "2000", "9900"),
    ("What deciding costs", "deciding.py"),
    ("Urgent requests under overload", "urgent.py"),
)
"""A title, a script and its arguments."""

SCRIPT_SECONDS_MAX: Final = 600.0


def run(folder: Path, title: str, script: str, *arguments: str) -> str:
    """One benchmark: its figures into that folder, and as a section of the page. Everything is printed as well."""
    file = folder / Path(script).with_suffix(".json").name
    sys.stdout.write(f"\n{title} ({' '.join(('bench/' + script, *arguments))})\n")
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments, "--json", str(file)],
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


def main() -> None:
    """Run all, and write page and charts if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the figures into {PAGE.name} and the charts")
    options = parser.parse_args()
    sections = [run(KEPT if options.write else BUILD, *each) for each in QUICK]
    if options.write:
        written = "\n".join([conditions().paragraph(), *sections])
        PAGE.write_text(between(PAGE.read_text("utf-8"), "figures", written), "utf-8")
        charts.draw()


if __name__ == "__main__":
    main()
