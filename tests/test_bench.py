"""What the benchmarks are made of: upstream, statistics, results, tables and charts. Nothing is timed here."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import charts
import parts
import peer_rounds
import peer_servers
import peer_text
import peers
import pytest
import results
import trio
import trio.testing
from parts import OBVIOUS, OURS, Upstream
from peer_rounds import Round
from peer_servers import Site, Target

from documents import PROJECT

SVG = "{http://www.w3.org/2000/svg}"


@asynccontextmanager
async def serving(upstream: Upstream) -> AsyncIterator[Target]:
    async with trio.open_nursery() as nursery:
        await nursery.start(upstream.serve)
        yield Target(peers.DIRECT, None, upstream.port)
        nursery.cancel_scope.cancel()


def some(value: float | None = 1.0, **others: object) -> results.Figure:
    said: dict[str, object] = {"part": "cpu", "what": "request", "who": OURS, "unit": "ratio", **others}
    return results.Figure(value=value, **said)  # type: ignore[arg-type]


# The upstream and its clients


async def test_the_upstream_does_what_the_message_says() -> None:
    async with serving(Upstream()) as target:
        await peer_servers.check(target)
        stream = await trio.open_tcp_stream("127.0.0.1", target.port)
        answer = await parts.ask(stream, "paced 3 1")
        assert len(answer.events) >= 3
        assert answer.sent < answer.events[0] < answer.ended
        assert answer.gap_seconds_max < peer_rounds.STALL_MS
        assert json.loads((await parts.ask(stream, "wait 1")).body)["object"] == "chat.completion"
        await stream.aclose()


async def test_what_an_event_says_is_json_and_as_long_as_it_is_to_be() -> None:
    events = [parts.event(number) for number in range(3)]
    assert {len(event) for event in events} == {parts.EVENT_BYTES}
    assert len({json.loads(event[6:])["choices"][0]["delta"]["content"] for event in events}) == 3


async def test_an_upstream_without_a_line_refuses_what_is_beyond_its_slots() -> None:
    statuses = []
    async with serving(Upstream(1, line=False)) as target:

        async def one() -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", target.port)
            statuses.append((await parts.call(stream, parts.request("wait 200"))).status)
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
    assert sorted(statuses) == [200, 429, 429]


async def test_who_leaves_is_noticed() -> None:
    upstream = Upstream()
    async with serving(upstream) as target:
        for number, kind in enumerate(("stay", "silent")):
            stream = await trio.open_tcp_stream("127.0.0.1", target.port)
            await stream.send_all(parts.request(f"{kind} {number}"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not upstream.left[number].is_set()
            await stream.aclose()
            with trio.fail_after(20):
                await upstream.left[number].wait()


# Peers


@pytest.mark.parametrize("peer", peer_servers.PEERS, ids=lambda peer: peer.name)
def test_a_peer_is_kept_to_the_loopback_interface(peer: peer_servers.Peer, tmp_path: Path) -> None:
    launch = peer.launch(Site(tmp_path / "program", tmp_path, 1234, 5678))
    said = " ".join([*launch.command, *(file.read_text() for file in tmp_path.iterdir()), *launch.headers.values()])
    assert "127.0.0.1" in said
    assert "1234" in said
    assert "5678" in said
    assert "0.0.0.0" not in said


def test_who_is_not_there_is_left_out_by_name() -> None:
    found = peer_servers.find({peer.option: "/nowhere/at-all" for peer in peer_servers.PEERS})
    assert found.programs == {}
    assert set(found.left_out) == {"LiteLLM", "LiteLLM, bare", "Portkey", "nginx", "HAProxy"}
    assert "no /nowhere/at-all" in found.left_out["nginx"]


def test_who_takes_part_in_what() -> None:
    parts = ("cpu", "latency", "urgent")
    assert [peer_servers.takes_part("LiteLLM, bare", part) for part in parts] == [True, False, False]
    for name in ("LiteLLM", "nginx", OBVIOUS, OURS):
        assert all(peer_servers.takes_part(name, part) for part in parts)


def test_a_version_is_found_in_what_a_program_says() -> None:
    assert peer_servers.version_in("nginx version: nginx/1.22.1\n") == "1.22.1"
    with pytest.raises(ValueError, match="no version"):
        peer_servers.version_in("command not found")


# Statistics


def test_cpu_is_compared_within_a_round() -> None:
    rounds: dict[str, list[Round]] = {
        OBVIOUS: [{"request": 2.0}, {"request": 4.0}, {"request": 3.0}],
        OURS: [{"request": 1.0}, {"request": 1.0}, {"request": 1.5}],
        "LiteLLM": [{"request": 30.0}, {"request": 15.0}, {"request": 30.0}],
    }
    by = {(each.part, each.who): each for each in peers.cpu_figures("cpu", rounds)}
    ours = by["cpu", OURS]
    assert (ours.value, ours.low, ours.high) == (0.5, 0.25, 0.5)
    assert by["cpu", OBVIOUS].value == 1
    assert by["cpu, absolute", OBVIOUS].value == pytest.approx(3e6)
    assert (by["cpu, noise", OBVIOUS].low, by["cpu, noise", OBVIOUS].high) == (0.75, 2.0)
    assert (by["cpu, gate", "LiteLLM"].value, by["cpu, gate", "LiteLLM"].good) == (20.0, True)


def test_what_is_added_is_a_difference_to_no_proxy_in_the_same_round() -> None:
    rounds: dict[str, list[Round]] = {
        OBVIOUS: [{"p50": 0.025}, {"p50": 0.030}],
        peers.DIRECT: [{"p50": 0.020}, {"p50": 0.028}],
    }
    (added,) = (each for each in peers.added_figures("latency", rounds) if each.part == "latency")
    assert (added.who, added.unit) == (OBVIOUS, "ms")
    assert (added.low, added.high) == pytest.approx((2.0, 5.0))


@pytest.mark.parametrize(
    ("value", "marks", "good"),
    [
        (1.0, {}, True),
        (None, {}, True),
        (2.0, {"at_most": 1}, False),
        (None, {"at_least": 1}, False),
        (2, {"at_least": 2}, True),
    ],
)
def test_a_mark_is_reached_or_missed(value: float | None, marks: dict[str, float], good: bool) -> None:
    assert some(value, **marks).good is good


def test_percentiles() -> None:
    assert peer_rounds.percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert peer_rounds.percentile([3.0, 1.0, 2.0], 0.5) == 2.0


# Results, tables, pages


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = results.results(
        [some(0.5, low=0.4, high=0.6, at_most=0.55), some(None)], "a note", {"nginx": "1"}, {"x": "y"}
    )
    results.save(tmp_path / "folder" / "file.json", found)
    assert results.load(tmp_path / "folder" / "file.json") == found


def test_a_table_says_who_what_and_whether() -> None:
    written = peer_text.table([some(0.456, low=0.4, high=0.6, at_most=0.5), some(None, part="reclaim", what="left")])
    assert written.splitlines()[0].split() == ["request", "left"]
    assert "0.456 (0.4–0.6) ok" in written
    assert "not within 10 s" in written


def test_a_part_of_a_page_is_put_in_anew() -> None:
    page = "before\n<!-- figures: written by bench/report.py -->\nold\n<!-- end of the figures -->\nafter\n"
    assert results.between(page, "figures", "new") == page.replace("old", "\nnew\n")
    with pytest.raises(ValueError, match="no place"):
        results.between(page, "comparison", "new")


@pytest.mark.parametrize("name", ["figures", "comparison"])
def test_the_page_has_a_place_for_what_the_benchmarks_write(name: str) -> None:
    assert "\nnew\n" in results.between(results.PAGE.read_text(), name, "new")


# Charts


def chart(log: bool = False) -> charts.Chart:
    bars = (charts.Bar("<us> & them", 0.5, "0.5 “ms”", 0.25, 0.75), charts.Bar(OURS, None, "not within 10 s"))
    return charts.Chart("What <it> costs", "ms", (charts.Group("one & two", bars, 0.55, "at most 0.55"),), "here", log)


@pytest.mark.parametrize("log", [False, True])
def test_a_chart_is_xml_that_says_everything(log: bool) -> None:
    root = ET.fromstring(charts.svg(chart(log)))
    said = [element.text for element in root.iter(f"{SVG}text")]
    for text in (
        "What <it> costs",
        "one & two",
        "<us> & them",
        "0.5 “ms”",
        OURS,
        "not within 10 s",
        "at most 0.55",
        "here",
    ):
        assert text in said
    assert [bar.get("class") for bar in root.iter(f"{SVG}rect")] == ["card", "bar", "bar ours never"]
    width = float(root.get("width", "0"))
    assert all(0 <= float(element.get("x", "0")) <= width for element in root.iter(f"{SVG}text"))


def test_scales() -> None:
    logarithmic = charts.Scale(0.01, 10, log=True)
    assert logarithmic.ticks() == [0.01, 0.1, 1.0, 10.0]
    assert logarithmic.x(0.01) == charts.LEFT == logarithmic.x(0)
    assert logarithmic.x(10) == charts.LEFT + charts.PLOT == logarithmic.x(11)
    assert all(2 <= length / charts.step_of(length) <= 8 for length in (0.009, 0.1, 0.75, 0.9, 1, 5, 8.5, 99, 3_000))
    linear = charts.Scale(0, 50, log=False)
    assert linear.ticks() == [0, 10, 20, 30, 40, 50]
    assert linear.x(25) == charts.LEFT + charts.PLOT / 2


def test_the_pictures_are_what_is_drawn_from_the_results_that_are_kept(tmp_path: Path) -> None:
    drawn = charts.draw(pictures=tmp_path)
    assert drawn
    for picture in drawn:
        assert picture.read_text() == (PROJECT / "docs" / "pictures" / picture.name).read_text(), "run bench/charts.py"
