"""The live page: what it says, and that it fits whatever terminal there is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from happened import STAGE, by_hand, ended, queued, request, started
from trioproxy import errors
from trioproxy.demo.lines import Stage
from trioproxy.demo.page import bar, page
from trioproxy.demo.scenarios import SCENARIOS
from trioproxy.demo.watch import View, Watch
from trioproxy.priority import LEVELS


def busy() -> View:
    """All that can be seen, at once."""
    watch = Watch(slots=4, places=12)
    for number in range(300):
        for level in LEVELS:
            ended(watch, request(level), errors.QUEUE_FULL, at=number)
    for level in ("very_low", "low", "low"):
        queued(watch, request(level, "bulk-eval.12345"))
    for ending in (errors.COMPLETED, errors.UPSTREAM_BROKE_OFF, errors.CANCELLED, errors.EVICTED, errors.QUEUE_TIMEOUT):
        ended(watch, started(watch, request("very_low"), waited=7.5), ending, at=301.0, ran=True)
    queued(watch, request("high"), 301.0)
    started(watch, request("critical", "on-call.3"), at=302.0, waited=0.25)
    started(watch, by_hand("normal"), at=302.3, waited=1.0)
    return watch.view(302.5)


def text(view: View, width: int = 79, height: int = 24, stage: Stage = STAGE) -> list[str]:
    return [line.plain for line in page(view, stage, width, height)]


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, "    "), (1, "████"), (2, "████"), (-1, "    "), (0.5, "██  "), (0.28, "█▏  ")]
)
def test_a_bar_fills_its_share(share: float, drawn: str) -> None:
    assert bar(share, 4) == drawn


def test_an_ordinary_terminal_has_room_for_everything() -> None:
    lines = text(busy())
    assert len(lines) == 24
    everything = "\n".join(lines)
    for expected in (
        "trioproxy demo",
        "critical waits ≤ 0.25 s, 300 refused.  The rest pays: 1201 of 1210 refused.",
        "── slots ──",
        "── what happened last ──",
        "── try in another terminal, and compare with X-Priority: very_low ──",
        "time curl 127.0.0.1:8080/v1/completions -H 'X-Priority: critical' \\",
        """-H 'Content-Type: application/json' -d '{"model":"gpt-sim","prompt":"Hi"}'""",
        "curl -s 127.0.0.1:8080/metrics | grep ^openai_proxy_queue_size",
        "tail -f logs/proxy.log",
        "left or stopped reading",
    ):
        assert expected in everything
    assert "…" not in everything
    assert "npx wscat" not in everything
    assert "npx wscat -c ws://127.0.0.1:8080/v1/realtime" in text(busy(), 79, 30)


def test_each_level_has_its_row_the_most_urgent_first() -> None:
    lines = text(busy(), 120)
    head = next(index for index, line in enumerate(lines) if line.startswith("level"))
    assert " ".join(lines[head].split()) == "level queued run served evicted rejected timeout other p50 p99 wait"
    rows = [line.split() for line in lines[head + 1 : head + 6]]
    assert [row[0] for row in rows] == list(LEVELS[::-1])
    critical, _, normal, low, very_low = ([word for word in row if "█" not in word] for row in rows)
    assert critical[1:10] == ["·", "1", "·", "·", "300", "·", "·", "0.25", "0.25"]
    assert normal[1:3] == ["·", "1"]
    assert low[1:9] == ["2", "·", "·", "·", "300", "·", "·", "-"]
    assert very_low[1:10] == ["1", "·", "1", "1", "300", "1", "2", "7.50", "7.50"]


def test_the_bars_tell_who_waits() -> None:
    watch = Watch(slots=4, places=12)
    for level, wait in (("critical", 0.5), ("low", 4.0)):
        ended(watch, started(watch, request(level), waited=wait), errors.COMPLETED, ran=True)
    for _ in range(6):
        queued(watch, request("very_low"))
    rows = {line.split()[0]: line for line in text(watch.view(5.0), 120) if line.split()[:1] and line[0] in "cl"}
    assert rows["low"].count("█") == 8 * rows["critical"].count("█") == 40
    assert next(line for line in text(watch.view(5.0), 120) if line.startswith("very_low ")).count("█") == 6


def test_slots_show_who_is_in_them_and_for_how_long() -> None:
    lines = text(busy())
    first = next(index for index, line in enumerate(lines) if line.startswith("── slots"))
    slots = [line.split() for line in lines[first + 1 : first + 5]]
    assert [slot[:3] for slot in slots[:2]] == [["1", "critical", "on-call.3"], ["2", "normal", "you"]]
    assert [slot[-2:] for slot in slots[:2]] == [["0.50", "s"], ["0.20", "s"]]
    assert slots[2:] == [["3", "free"], ["4", "free"]]
    assert slots[0][3].count("━") > slots[1][3].count("━") > 0


def test_before_anything_has_happened_nothing_is_claimed() -> None:
    lines = text(Watch(slots=4, places=12).view(0.1))
    assert lines[1] == "The first requests are coming in."
    assert "refused" not in "\n".join(lines)


def test_if_all_goes_well_nobody_pays() -> None:
    watch = Watch(slots=4, places=12)
    started(watch, request("critical"))
    started(watch, request("low"))
    assert text(watch.view(1.0))[1] == "critical waits ≤ 0.00 s, none refused.  The rest: none of 1 refused."


@given(width=st.integers(1, 200), height=st.integers(1, 70), empty=st.booleans())
def test_it_fits_any_terminal(width: int, height: int, empty: bool) -> None:
    lines = page(Watch(slots=4, places=12).view(0.0) if empty else BUSY, STAGE, width, height)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines)
    assert not any("\n" in line.plain for line in lines)


@pytest.mark.parametrize("seconds", [1.0, 99.9, 86_400.0, math.pi * 1e6])
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_title_is_too_long_for_80_columns(name: str, seconds: float) -> None:
    watch = Watch(slots=4, places=12)
    stage = Stage(
        scenario=SCENARIOS[name].at_speed(0.5), upstream_url="", addresses=STAGE.addresses, log_file=STAGE.log_file
    )
    (title, *_) = text(watch.view(seconds), 79, 24, stage)
    assert f"{name} ×0.5: " in title
    assert len(title) <= 79


BUSY = busy()
