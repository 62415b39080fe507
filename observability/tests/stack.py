"""The files of the observability stack as data, for tests that check them against each other and against servers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import yaml

HERE: Final = Path(__file__).parent
STACK: Final = HERE.parent
REPOSITORY: Final = STACK.parent

Json = Mapping[str, Any]


def load_yaml(name: str) -> dict[str, Any]:
    """A YAML file of the stack, by its path in `observability/`."""
    return cast(dict[str, Any], yaml.safe_load((STACK / name).read_text()))


def load_dashboard() -> dict[str, Any]:
    """The one dashboard."""
    (file,) = (STACK / "grafana" / "dashboards").glob("*.json")
    return cast(dict[str, Any], json.loads(file.read_text()))


def panels(dashboard: Json) -> list[dict[str, Any]]:
    """All panels that show something, in reading order."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@dataclass(frozen=True)
class Query:
    """One query of a panel, as it is written there."""

    panel: str
    kind: str
    ref_id: str
    source: str
    """`prometheus` or `loki`."""
    expression: str
    legend: str
    instant: bool

    def __str__(self) -> str:
        return f"{self.panel} {self.ref_id}"


def queries(dashboard: Json, source: str) -> list[Query]:
    """Every query to one kind of data source, those of variables and annotations not counted."""
    return [
        Query(
            panel=panel["title"],
            kind=panel["type"],
            ref_id=target["refId"],
            source=source,
            expression=target["expr"],
            legend=target["legendFormat"],
            instant=target.get("instant", False),
        )
        for panel in panels(dashboard)
        for target in panel["targets"]
        if target["datasource"]["type"] == source
    ]


def substituted(expression: str, interval: str) -> str:
    """An expression as Grafana sends it with `All` chosen everywhere, and `interval` for its own intervals."""
    expression = re.sub(r"\$(__rate_interval|__interval)\b", interval, expression)
    expression = re.sub(r"\$(pool|priority)\b", ".*", expression)
    assert "$" not in expression, expression
    return expression


def rules() -> Iterator[dict[str, Any]]:
    """Every recording and alert rule."""
    for file in sorted((STACK / "rules").glob("*.yml")):
        for group in load_yaml(f"rules/{file.name}")["groups"]:
            yield from group["rules"]


def readme() -> str:
    """The text for people."""
    return (STACK / "README.md").read_text()
