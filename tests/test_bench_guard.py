"""The guard's judgement of what was counted, and its reading of what callgrind and it itself have written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import counting
import guard
import pytest
from counting import Count
from guard import Values, Verdict

KEPT = Values(ratio=0.5, system_calls=17.0, instructions=3_000_000, obvious_instructions=6_000_000)
ALL = dict.fromkeys(guard.WORKS, KEPT)

DUMP = """\
# callgrind format
events: Ir sysCount sysTime
fn=_PyEval_EvalFrameDefault
0 700
cfn=write
calls=2 0
0 60 2 9
0 300
fn=write
0 60 2 9
fn=epoll_wait@@GLIBC_2.3.2
0 40 3
fn=clock_gettime@@GLIBC_2.17
0 20 5 1
fn=__futex_abstimed_wait_common
0 10 1
totals: 1130 11 10
"""


def test_a_dump_is_the_sum_of_what_its_functions_have_done_themselves() -> None:
    count = counting.read_dump(DUMP)
    assert count.instructions == 1130
    assert count.calls == {"write": 2, "epoll_wait": 3, "clock_gettime": 5, "__futex_abstimed_wait_common": 1}
    assert count.system_calls == 5, "neither readings of the clock nor locks"


def test_the_typical_count_has_the_median_of_each_number() -> None:
    counts = [Count(9, {"write": 1}), Count(7, {"write": 2, "poll": 1}), Count(8, {"write": 2})]
    assert counting.typical(counts) == Count(8, {"write": 2, "poll": 0})


def test_a_chunk_is_what_a_longer_answer_costs_beyond_a_shorter() -> None:
    counts = {
        "steps 21": Count(7_000_000, {"write": 23, "read": 22, "epoll_wait": 40}),
        "steps 1": Count(3_000_000, {"write": 3, "read": 2, "poll": 2}),
    }
    share = guard.WORKS["paced"].share(counts)
    assert share.instructions == 200_000
    assert share.calls == {"write": 1, "read": 1, "epoll_wait": 2, "poll": -0.1}
    assert guard.WORKS["stream"].share(counts) == counts["steps 1"]


@pytest.mark.parametrize(
    ("now", "instructions", "system_calls"),
    [
        (KEPT, Verdict.OK, Verdict.OK),
        (replace(KEPT, ratio=0.54, system_calls=17.4), Verdict.OK, Verdict.OK),
        (replace(KEPT, ratio=0.46, system_calls=16.6), Verdict.OK, Verdict.OK),
        (replace(KEPT, ratio=0.56), Verdict.MORE, Verdict.OK),
        (replace(KEPT, ratio=0.44), Verdict.LESS, Verdict.OK),
        (replace(KEPT, system_calls=18.0), Verdict.OK, Verdict.MORE),
        (replace(KEPT, system_calls=16.0), Verdict.OK, Verdict.LESS),
        (replace(KEPT, instructions=4_000_000, obvious_instructions=8_000_000), Verdict.OK, Verdict.OK),
    ],
)
def test_the_ratio_and_the_system_calls_are_judged(now: Values, instructions: Verdict, system_calls: Verdict) -> None:
    assert [finding.verdict for finding in guard.compare("request", now, KEPT)] == [instructions, system_calls]


def test_every_work_fails_when_a_fifth_is_added() -> None:
    for work in guard.WORKS:
        assert guard.compare(work, replace(KEPT, ratio=1.2 * KEPT.ratio), KEPT)[0].verdict is Verdict.MORE


def test_alone_it_is_the_instructions_themselves() -> None:
    more, calls = guard.compare_alone("request", Count(3_400_000, {"write": 17}), KEPT)
    assert (more.verdict, calls.verdict) == (Verdict.MORE, Verdict.OK)


@pytest.mark.parametrize(
    ("ratios", "passes", "words"),
    [
        ((0.5, 0.5), True, "Nothing has become longer"),
        ((0.5, 0.4), True, "become shorter: keep"),
        ((0.4, 0.6), False, "longer: stream. .*--alone stream.*\n.*--write"),
    ],
)
def test_what_is_to_be_done(
    ratios: tuple[float, float], passes: bool, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    works = zip(("request", "stream"), ratios, strict=True)
    findings = [finding for work, ratio in works for finding in guard.compare(work, replace(KEPT, ratio=ratio), KEPT)]
    assert guard.report(findings) is passes
    assert re.search(words, capsys.readouterr().out)


def test_nothing_kept_is_no_division_by_zero() -> None:
    (_, calls) = guard.compare("burst", KEPT, replace(KEPT, system_calls=0.0))
    assert str(calls).endswith("MORE")


def test_what_is_written_is_read() -> None:
    assert guard.read(guard.written(ALL)) == ALL


def test_the_values_in_the_repository_can_be_read() -> None:
    assert guard.read(guard.KEPT.read_text("utf-8")).keys() == guard.WORKS.keys()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"works": []}',
        json.dumps({"works": {"request": asdict(KEPT)}}),
        json.dumps({"works": {**dict.fromkeys(ALL, asdict(KEPT)), "another": asdict(KEPT)}}),
        json.dumps({"works": {work: {"ratio": 0.5} for work in ALL}}),
        json.dumps({"works": dict.fromkeys(ALL, asdict(KEPT) | {"ratio": "half"})}),
    ],
)
def test_a_bad_file_is_said_to_be_one(text: str) -> None:
    with pytest.raises(guard.BadValuesError):
        guard.read(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "nonsense is none of request, stream"),
        (["--write", "request"], "--write keeps all"),
        (["--write", "--alone"], "not allowed with"),
        ([], "valgrind is missing"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["guard.py", *arguments])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        guard.main()
    assert words in capsys.readouterr().err
