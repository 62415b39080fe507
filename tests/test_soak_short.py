"""The soak test for some seconds: it works, and finds nothing that is wrong. `nox -s soak` is the long one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from processes import running

SOAK: Final = Path(__file__).parent / "soak" / "soak.py"
PATIENCE: Final = 200.0
"""Seconds: more than all that it waits for, each at the most."""


async def test_some_seconds_of_everything_leave_nothing_behind() -> None:
    async with running(str(SOAK), "--seconds", "12") as process:
        with trio.move_on_after(PATIENCE):
            await process.ended.wait()
            await process.process.wait()
        status = process.process.returncode
    assert status == 0, process.output.decode()
    assert b" 0 failed" in process.output
    assert b"memory is not checked in runs shorter than" in process.output
