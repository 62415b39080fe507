"""The how-tos whose clients the other tests do not have: `nox -s clients`."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from documents import PROJECT, follow
from standins import STAND_INS, VARIABLES, serve

OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}


@pytest.mark.parametrize("name", ["docs/how-to/langchain.md", "docs/how-to/litellm.md"])
async def test_what_a_page_tells_to_do_works(name: str, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        replaced = {written: await nursery.start(serve, kind) for written, kind in STAND_INS[name].items()}
        await trio.to_thread.run_sync(follow, PROJECT / name, tmp_path, replaced, VARIABLES | OFFLINE)
        nursery.cancel_scope.cancel()
