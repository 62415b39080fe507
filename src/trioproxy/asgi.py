"""The application for Hypercorn itself: `hypercorn --worker-class trio trioproxy.asgi:app`.

Settings come from `TRIOPROXY_CONFIG` and the environment. The guarantees are fewer than under `trioproxy serve`; the
README says which.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import IO

import trio

from trioproxy import config
from trioproxy.app import ProxyApp, create_app
from trioproxy.observe import logs


def _only_worker() -> IO[str] | None:
    """Hold a lock that one worker of a Hypercorn master can have; the others must not serve."""
    master = multiprocessing.parent_process()
    if master is None:
        return None
    path = Path(tempfile.gettempdir()) / f"trioproxy-workers-of-{master.pid}.lock"
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RuntimeError(
            "another worker of this application serves already: each would start as many requests as "
            "scheduler.concurrency allows. Start Hypercorn with --workers 1."
        ) from error
    return lock


def _create() -> ProxyApp:
    try:
        settings = config.load()
        writer = logs.configure(settings.logging.level, settings.logging.format, settings.logging.file)
        application = create_app(settings)
    except (config.ConfigError, OSError) as error:
        sys.exit(f"trioproxy: {error}")
    lock: IO[str] | None = None

    @application.before_serving
    async def begin() -> None:
        nonlocal lock
        logging.getLogger("hypercorn.error").handlers.clear()
        lock = _only_worker()

    @application.after_serving
    async def end() -> None:
        if lock is not None:
            await trio.Path(lock.name).unlink(missing_ok=True)
            lock.close()
        writer.close()

    return application


app = _create()
