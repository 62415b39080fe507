"""The `trioproxy` script, and `python -m trioproxy`."""

import sys


def main() -> None:
    """Run the command line; a Ctrl-C while the program is still being loaded is no reason for a traceback."""
    try:
        from trioproxy.cli import main as commands  # noqa: PLC0415

        commands(prog_name="trioproxy")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
