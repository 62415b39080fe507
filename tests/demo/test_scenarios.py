"""The scenarios: each is what its description says, and a faster world is the same world."""

from __future__ import annotations

import math

import pytest
from click.testing import CliRunner

from trioproxy.cli import main
from trioproxy.demo.scenarios import DEFAULT, SCENARIOS, Scenario
from trioproxy.priority import BY_NAME

EACH = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)


def test_there_are_those_that_the_help_names() -> None:
    assert list(SCENARIOS) == ["calm", "rush", "overload", "flaky", "stopped"]
    assert DEFAULT == "rush"
    told = " ".join(CliRunner().invoke(main, ["demo", "--help"]).output.split())
    for scenario in SCENARIOS.values():
        assert f"{scenario.name} {scenario.about}" in told


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("calm", 0.3, 0.6), ("rush", 1.5, 2), ("overload", 3.5, 4.5), ("flaky", 0.7, 1), ("stopped", 0.7, 1)],
)
def test_the_load_is_what_the_name_says(name: str, low: float, high: float) -> None:
    assert low <= SCENARIOS[name].offered_load <= high


@EACH
def test_every_level_comes_in_both_ways_of_saying_it(scenario: Scenario) -> None:
    given = {crowd.header or crowd.field for crowd in scenario.crowds}
    assert {"critical", "high", "low", BY_NAME["very_low"], None} <= given
    assert any(crowd.header for crowd in scenario.crowds)
    assert any(crowd.field for crowd in scenario.crowds)
    assert len({crowd.name for crowd in scenario.crowds}) == len(scenario.crowds)
    assert all(math.isfinite(crowd.patience) for crowd in scenario.crowds if crowd.stops_reading)


@EACH
def test_urgent_ones_alone_are_not_too_many(scenario: Scenario) -> None:
    urgent = sum(crowd.per_second for crowd in scenario.crowds if (crowd.header or crowd.field) in {"critical", "high"})
    assert urgent * scenario.seconds_per_request / scenario.slots < 0.8


@EACH
def test_a_faster_world_is_the_same_world(scenario: Scenario) -> None:
    fast = scenario.at_speed(4)
    assert fast.offered_load == pytest.approx(scenario.offered_load)
    assert fast.seconds_per_request == pytest.approx(scenario.seconds_per_request / 4)
    for name in ("queue_timeout", "first_byte_timeout", "idle_timeout", "client_write_timeout", "backoff_seconds"):
        assert getattr(fast, name) == pytest.approx(getattr(scenario, name) / 4)
    for before, after in zip(scenario.crowds, fast.crowds, strict=True):
        assert (after.per_second, after.patience) == (before.per_second * 4, before.patience / 4)
    assert fast.models_per_second == scenario.models_per_second * 4
    assert fast.appearance_seconds == scenario.appearance_seconds / 4
    assert (fast.slots, fast.places, fast.speed) == (scenario.slots, scenario.places, 4)
    assert fast.upstream.tokens == scenario.upstream.tokens
    assert fast.at_speed(0.25) == scenario
