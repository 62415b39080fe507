"""The application for Hypercorn itself: `hypercorn --worker-class trio trioproxy.asgi:app`.

Settings come from `TRIOPROXY_CONFIG` and the environment. The guarantees are fewer than under `trioproxy serve`; the
README says which.
"""

from __future__ import annotations

import atexit
import fcntl
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import IO

import structlog

from trioproxy import config
from trioproxy.app import ProxyApp, create_app
from trioproxy.observe import logs


def _only_worker() -> IO[str] | None:
    """Hold a lock that one worker of a Hypercorn master can have. Raises BlockingIOError if another has it."""
    master = multiprocessing.parent_process()
    if master is None:
        return None
    path = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"trioproxy-of-{master.pid}.lock"
    # The folder may be everybody's: follow no link that somebody has put there.
    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    atexit.register(path.unlink, missing_ok=True)
    return lock


def _create() -> ProxyApp:
    try:
        settings = config.load()
        writer = logs.configure(settings.logging.level, settings.logging.format, settings.logging.file)
    except (config.ConfigError, OSError) as error:
        logs.say_and_exit("the configuration cannot be used", str(error), 1)
    logs.take_over("hypercorn.error")
    try:
        application = create_app(settings, dropped_lines=lambda: writer.dropped)
        lock = _only_worker()
    except config.ConfigError as error:
        structlog.get_logger().error("the configuration cannot be used", error=str(error))
    except BlockingIOError:
        reason = (
            "another worker of this application serves already, and each would start as many requests as "
            "scheduler.concurrency allows: start Hypercorn with --workers 1"
        )
        structlog.get_logger().error("this worker must not serve", error=reason)
    except OSError as error:
        structlog.get_logger().error("the lock against a second worker cannot be had", error=str(error))
    else:

        @application.after_serving
        async def end() -> None:
            if lock is not None:
                lock.close()
            writer.close()

        return application
    writer.close()
    sys.exit(1)


app = _create()
