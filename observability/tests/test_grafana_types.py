"""The dashboard against the types of the Grafana that is pinned: a misspelt key or value does not compile."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stack import HERE, load_dashboard, load_yaml

TSC = HERE / "node_modules" / ".bin" / "tsc"
SCHEMA = "@grafana/schema/dist/esm/raw/composable"

PANEL_TYPES = {
    "barchart": "BarChart",
    "gauge": "Gauge",
    "heatmap": "Heatmap",
    "logs": "Logs",
    "stat": "Stat",
    "timeseries": "TimeSeries",
}
WITHOUT_FIELD_OPTIONS = ("gauge", "logs", "stat")

PROLOGUE = """\
import type { Dashboard, Panel, RowPanel } from '@grafana/schema';
type Json<T> = T extends string ? `${T}` : T extends number ? number : T extends Array<infer U> ? Json<U>[]
  : T extends object ? { [K in keyof T]: Json<T[K]> } : T;
interface PrometheusQuery {
  refId: string; datasource: { type: 'prometheus'; uid: string }; expr: string; legendFormat: string;
  editorMode: 'code'; format: 'time_series' | 'heatmap'; instant: boolean; range: boolean;
}
interface LokiQuery {
  refId: string; datasource: { type: 'loki'; uid: string }; expr: string; legendFormat: string;
  editorMode: 'code'; queryType: 'range';
}
"""


def as_typescript(dashboard: dict[str, Any]) -> str:
    """A module that compiles if and only if the dashboard has the types that Grafana declares."""
    parts = [PROLOGUE]
    parts += [
        f"import type * as {kind} from '{SCHEMA}/{kind}/panelcfg/x/{name}PanelCfg_types.gen';"
        for kind, name in PANEL_TYPES.items()
    ]
    rest = {key: value for key, value in dashboard.items() if key != "panels"}
    parts.append(f"export const dashboard: Json<Omit<Dashboard, 'panels'>> = {json.dumps(rest)};")
    for panel in dashboard["panels"]:
        name, kind = f"panel{panel['id']}", panel["type"]
        if kind == "row":
            parts.append(f"export const {name}: Json<RowPanel> = {json.dumps(panel)};")
            continue
        parts.append(f"export const {name}: Json<Panel> = {json.dumps(panel)};")
        parts.append(f"export const {name}options: Partial<Json<{kind}.Options>> = {json.dumps(panel['options'])};")
        custom = panel["fieldConfig"]["defaults"].get("custom", {})
        field_type = "{}" if kind in WITHOUT_FIELD_OPTIONS else f"Partial<Json<{kind}.FieldConfig>>"
        parts.append(f"export const {name}custom: {field_type} = {json.dumps(custom)};")
        for index, target in enumerate(panel["targets"]):
            query_type = {"prometheus": "PrometheusQuery", "loki": "LokiQuery"}[target["datasource"]["type"]]
            parts.append(f"export const {name}query{index}: {query_type} = {json.dumps(target)};")
    return "\n".join(parts) + "\n"


def complaints(dashboard: dict[str, Any], folder: Path) -> str:
    """What the compiler has against the dashboard."""
    (folder / "node_modules").symlink_to(HERE / "node_modules")
    (folder / "dashboard.ts").write_text(as_typescript(dashboard))
    options = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "preserve"]
    command = [str(TSC), *options, "--moduleResolution", "bundler", "dashboard.ts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode != 0) == bool(done.stdout), (done.returncode, done.stderr)
    return done.stdout


def test_the_dashboard_has_grafanas_types(tmp_path: Path) -> None:
    assert complaints(load_dashboard(), tmp_path) == ""


def break_title(dashboard: dict[str, Any]) -> None:
    panel = dashboard["panels"][1]
    panel["tittle"] = panel.pop("title")


def break_option(dashboard: dict[str, Any]) -> None:
    dashboard["panels"][1]["options"]["graphmode"] = "none"


def break_option_value(dashboard: dict[str, Any]) -> None:
    dashboard["panels"][1]["options"]["graphMode"] = "aera"


def break_query(dashboard: dict[str, Any]) -> None:
    dashboard["panels"][1]["targets"][0]["legend"] = "x"


def break_dashboard(dashboard: dict[str, Any]) -> None:
    dashboard["refreshh"] = "5s"


@pytest.mark.parametrize("break_it", [break_title, break_option, break_option_value, break_query, break_dashboard])
def test_a_misspelling_is_found(break_it: Any, tmp_path: Path) -> None:
    dashboard = copy.deepcopy(load_dashboard())
    break_it(dashboard)
    assert "error TS" in complaints(dashboard, tmp_path)


def test_the_types_are_those_of_the_grafana_that_runs() -> None:
    image = load_yaml("docker-compose.yml")["services"]["grafana"]["image"]
    package = json.loads((HERE / "node_modules" / "@grafana" / "schema" / "package.json").read_text())
    assert image == f"grafana/grafana:{package['version']}"
    assert load_dashboard()["panels"][1]["pluginVersion"] == package["version"]
