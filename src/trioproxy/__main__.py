"""``python -m trioproxy``: the same commands as the ``trioproxy`` script."""

from trioproxy.cli import main

if __name__ == "__main__":
    main()
