"""What we ask of the dashboard beyond its types: completeness, order, and one look everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from stack import load_dashboard, load_yaml, panels, queries
from trioproxy import priority
from trioproxy.errors import Outcome

DASHBOARD = load_dashboard()
PANELS = panels(DASHBOARD)
BY_TITLE = {panel["title"]: panel for panel in PANELS}
MOST_URGENT_FIRST = list(reversed(priority.LEVELS))

PROMISED = {
    "Current Queue Size": "gauge",
    "Available Processing Slots": "gauge",
    "Request Rate by Priority": "timeseries",
    "Queue Wait Time": "timeseries",
    "OpenAI API Latency": "timeseries",
    "Request Outcomes": "timeseries",
    "Evictions (Last Hour)": "barchart",
    "Rejections (Last Hour)": "barchart",
    "Proxy Logs": "logs",
}


def overrides(panel: dict[str, Any], property_id: str) -> dict[str, Any]:
    """What a panel's overrides set by name, for one property."""
    return {
        override["matcher"]["options"]: item["value"]
        for override in panel["fieldConfig"]["overrides"]
        for item in override["properties"]
        if item["id"] == property_id
    }


def colors(panel: dict[str, Any]) -> dict[str, str]:
    """The color of each series, or bar, of a panel."""
    by_series = {name: value["fixedColor"] for name, value in overrides(panel, "color").items()}
    for mappings in overrides(panel, "mappings").values():
        by_series |= {value: shown["color"] for value, shown in mappings[0]["options"].items()}
    return by_series


def test_the_panels_that_were_asked_for_are_there() -> None:
    assert {title: BY_TITLE[title]["type"] for title in PROMISED} == PROMISED
    for title in ("Queue Wait Time", "OpenAI API Latency"):
        assert [target["legendFormat"] for target in BY_TITLE[title]["targets"]] == ["p50", "p95", "p99"]


def test_it_reads_from_top_to_bottom() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == ["Health", "Admission", "Shedding", "Upstream", "Client Keys", "Logs"]
    assert not any(row["collapsed"] for row in rows)
    tops = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"]]
    assert tops == sorted(tops)


def test_it_can_be_provisioned_and_found_again() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["schemaVersion"]) == ("trioproxy", 42)
    assert DASHBOARD["editable"] is True
    assert "id" not in DASHBOARD  # a file has no id: Grafana gives it one
    assert "__inputs" not in DASHBOARD


def test_ids_and_titles_are_unique() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(BY_TITLE) == len(PANELS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_explains_itself(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert len(panel["description"]) > 80
    assert panel["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["noValue"]
    assert defaults["thresholds"]["steps"]
    ref_ids = [target["refId"] for target in panel["targets"]]
    assert len(set(ref_ids)) == len(ref_ids)


def test_nothing_overlaps_or_leaves_the_grid() -> None:
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in DASHBOARD["panels"])
    ]
    assert all(x in range(24) for taken in cells for x, _ in taken)
    assert not [1 for one, other in combinations(cells, 2) if one & other]


def datasources(value: object) -> Iterator[dict[str, str]]:
    """Every reference to a data source, wherever it is."""
    if isinstance(value, dict):
        if isinstance(value.get("datasource"), dict):
            yield value["datasource"]
        for item in value.values():
            yield from datasources(item)
    elif isinstance(value, list):
        for item in value:
            yield from datasources(item)


def test_data_sources_are_named_by_uid_and_chosen_above() -> None:
    provisioned = {source["uid"]: source["type"] for source in load_yaml(SOURCES)["datasources"]}
    assert provisioned == {"prometheus": "prometheus", "loki": "loki"}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    expected = {"prometheus": "${datasource}", "loki": "${logs}", "grafana": "-- Grafana --"}
    found = list(datasources(DASHBOARD))
    assert found == [{"type": source["type"], "uid": expected[source["type"]]} for source in found]
    for name, kind in (("datasource", "prometheus"), ("logs", "loki")):
        assert (variables[name]["type"], variables[name]["query"]) == ("datasource", kind)
        assert variables[name]["current"]["value"] in provisioned


SOURCES = "grafana/provisioning/datasources/datasources.yml"


def test_pool_and_priority_can_be_chosen() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "logs", "pool", "priority"]
    for name in ("pool", "priority"):
        assert variables[name]["multi"]
        assert variables[name]["includeAll"]
        assert variables[name]["allValue"] == ".*"
    assert variables["priority"]["query"].split(",") == MOST_URGENT_FIRST
    text = str(DASHBOARD["panels"])
    assert 'pool=~"$pool"' in text
    assert 'priority_level=~"$priority"' in text


@pytest.mark.parametrize("query", queries(DASHBOARD, "prometheus"), ids=str)
def test_every_rate_fits_the_scrapes(query: Any) -> None:
    ranges = re.findall(r"(\w+)\([^()\[]*\[([^\]]+)\]", query.expression)
    assert len(ranges) == query.expression.count("[")
    for function, window in ranges:
        expected = {"$__rate_interval", "1h"} if function == "increase" else {"$__rate_interval"}
        assert window in expected
    assert ("1h" in query.expression) == (query.panel == "Self-Checks" or "Last Hour" in query.panel)


def test_the_scrape_interval_is_known_to_the_data_source() -> None:
    (source,) = (source for source in load_yaml(SOURCES)["datasources"] if source["type"] == "prometheus")
    assert source["jsonData"]["timeInterval"] == load_yaml("prometheus.yml")["global"]["scrape_interval"]


BY_LEVEL = [
    panel["title"] for panel in PANELS if 'evicted_priority="' in str(panel) or 'priority_level="' in str(panel)
]


def test_what_is_shown_by_level() -> None:
    assert BY_LEVEL == [
        "Request Rate by Priority",
        "Queue Depth by Priority",
        "Queue Wait p95 by Priority",
        "Evictions (Last Hour)",
        "Rejections (Last Hour)",
    ]


@pytest.mark.parametrize("title", BY_LEVEL)
def test_levels_come_in_their_order_and_color_everywhere(title: str) -> None:
    panel = BY_TITLE[title]
    shown = [re.findall(r'(?:evicted_priority|priority_level)="(\w+)"', target["expr"]) for target in panel["targets"]]
    assert [sorted(set(levels)) for levels in shown] == [[level] for level in MOST_URGENT_FIRST]
    assert list(colors(panel)) == MOST_URGENT_FIRST
    assert colors(panel) == colors(BY_TITLE["Queue Depth by Priority"])


def test_a_color_means_the_same_thing_everywhere() -> None:
    meaning: dict[str, str] = {}
    for panel in PANELS:
        for name, color in colors(panel).items():
            key = name if name != "critical" else f"{name} {panel['targets'][0]['datasource']['type']}"
            assert meaning.setdefault(key, color) == color, (panel["title"], name)


def test_every_outcome_has_its_color() -> None:
    assert set(colors(BY_TITLE["Request Outcomes"])) == {outcome.value for outcome in Outcome}


def test_the_logs_are_live() -> None:
    assert (DASHBOARD["refresh"], DASHBOARD["liveNow"]) == ("5s", True)
    assert BY_TITLE["Proxy Logs"]["options"]["sortOrder"] == "Descending"


def test_what_goes_wrong_links_to_its_log_lines() -> None:
    linked = {panel["title"] for panel in PANELS if panel["links"]}
    assert linked >= {
        "Request Outcomes",
        "Evictions (Last Hour)",
        "Rejections (Last Hour)",
        "Upstream Answers by Status",
    }
    assert DASHBOARD["links"]


def test_the_gauges_end_at_their_capacity() -> None:
    for title, capacity in (
        ("Current Queue Size", "openai_proxy_max_queue"),
        ("Available Processing Slots", "openai_proxy_permits"),
    ):
        panel = BY_TITLE[title]
        value, limit = panel["targets"]
        assert capacity in limit["expr"]
        (transformation,) = panel["transformations"]
        assert transformation["options"] == {
            "configRefId": limit["refId"],
            "applyTo": {"id": "byFrameRefID", "options": value["refId"]},
            "mappings": [{"fieldName": limit["legendFormat"], "handlerKey": "max"}],
        }
        assert panel["fieldConfig"]["defaults"]["thresholds"]["mode"] == "percentage"
