"""The `trioproxy` script, and `python -m trioproxy`."""

import os
import sys


def _open_standard_streams() -> None:
    """What was closed by whoever started this goes nowhere: its number must not become a client's connection."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115


def main() -> None:
    """Run the command line; a Ctrl-C while the program is still being loaded is no reason for a traceback."""
    _open_standard_streams()
    try:
        from trioproxy.cli import main as commands  # noqa: PLC0415

        commands(prog_name="trioproxy")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
