"""The compose file against the specification, and all files against each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from stack import REPOSITORY, STACK, load_dashboard, load_yaml, panels, readme, rules

DEPLOY = REPOSITORY / "deploy"
COMPOSE_FILES = [
    STACK / "docker-compose.yml",
    *DEPLOY.glob("compose*.yaml"),
    DEPLOY / "observability" / "override.yaml",
]
COMPOSE = load_yaml("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROMETHEUS = load_yaml("prometheus.yml")
LOKI = load_yaml("loki-config.yml")
PROMTAIL = load_yaml("promtail-config.yml")
ALLOY = (STACK / "config.alloy").read_text()
ENVIRONMENT = dict(
    line.split("=", 1) for line in (STACK / ".env").read_text().splitlines() if line and not line.startswith("#")
)

IMAGES = {
    "prometheus": "prom/prometheus:v3.13.4",
    "grafana": "grafana/grafana:13.2.3",
    "loki": "grafana/loki:3.7.8",
    "alloy": "grafana/alloy:v1.19.1",
    "promtail": "grafana/promtail:3.6.11",
}
SHIPPERS = ("alloy", "promtail")


def mounts(service: str) -> dict[str, str]:
    """Where a service's bind mounts and volumes are inside it, to where they come from."""
    parts = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {part[1]: part[0] for part in parts}


def test_they_follow_the_compose_specification() -> None:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", *map(str, COMPOSE_FILES)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "version" not in COMPOSE


def test_compose_itself_takes_it_where_there_is_one() -> None:
    for command in (["docker", "compose"], ["docker-compose"]):
        try:
            there = subprocess.run([*command, "version"], capture_output=True, check=False, timeout=60).returncode == 0
        except FileNotFoundError:
            there = False
        joined = ["-f", "compose.yaml", "-f", "compose.observability.yaml", "--profile", "alloy", "--profile", "demo"]
        for folder, options in (STACK, list[str]()), (DEPLOY, ["--profile", "demo"]), (DEPLOY, joined):
            if there:
                asked = [*command, *options, "config", "-q"]
                done = subprocess.run(asked, cwd=folder, capture_output=True, check=False, timeout=60)
                assert (done.returncode, done.stderr) == (0, b"")


def test_the_images_are_pinned() -> None:
    assert {name: service["image"] for name, service in SERVICES.items()} == IMAGES


def test_exactly_one_shipper_runs() -> None:
    assert ENVIRONMENT["COMPOSE_PROFILES"] == "alloy"
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {"prometheus": None, "loki": None, "grafana": None, "alloy": ["alloy"], "promtail": ["promtail"]}


def test_the_ports_are_the_usual_ones_on_this_machine_only() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {
        "prometheus": ["127.0.0.1:9090:9090"],
        "loki": ["127.0.0.1:3100:3100"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_kept_on_a_short_leash(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert not re.search(r":latest$|:[^:/]*\bmain\b", service["image"])


def test_health_is_asked_with_what_each_image_has() -> None:
    checks = {name: " ".join(service["healthcheck"]["test"]) for name, service in SERVICES.items()}
    assert checks["prometheus"].startswith("CMD promtool check healthy")
    assert checks["loki"] == "CMD /usr/bin/loki -health"  # no shell in it
    assert "/api/health" in checks["grafana"]
    for name in SHIPPERS:
        assert checks[name].startswith("CMD bash -c ")
        assert not re.search(r"curl|wget", checks[name])


def test_nobody_starts_before_what_he_needs() -> None:
    needs = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in SERVICES.items()
    }
    healthy = "service_healthy"
    assert needs == {
        "prometheus": {},
        "loki": {},
        "grafana": {"prometheus": healthy, "loki": healthy},
        "alloy": {"loki": healthy},
        "promtail": {"loki": healthy},
    }


@pytest.mark.parametrize("name", SERVICES)
def test_everything_that_is_mounted_is_there(name: str) -> None:
    for source in mounts(name).values():
        if source.startswith("."):
            assert (STACK / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]
    assert set(COMPOSE["volumes"]) == {f"{service}-data" for service in SERVICES}


def test_the_folder_for_logs_is_in_git() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "logs", "observability/.env"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert tracked.stdout.split() == ["logs/.gitkeep", "observability/.env"]


def test_configurations_are_where_the_commands_say() -> None:
    for name in ("prometheus", "loki", "alloy", "promtail"):
        (file,) = (source for source in mounts(name).values() if Path(source).suffix in (".yml", ".alloy"))
        (target,) = (target for target, source in mounts(name).items() if source == file)
        assert any(target in argument for argument in SERVICES[name]["command"])
    assert mounts("prometheus")["/etc/prometheus/rules"] == "./rules"
    assert PROMETHEUS["rule_files"] == ["rules/*.yml"]


def test_data_is_where_it_outlives_a_restart() -> None:
    assert "--storage.tsdb.path=/prometheus" in SERVICES["prometheus"]["command"]
    assert mounts("prometheus")["/prometheus"] == "prometheus-data"
    assert mounts("loki")[LOKI["common"]["path_prefix"]] == "loki-data"
    assert mounts("grafana")["/var/lib/grafana"] == "grafana-data"
    assert "--storage.path=/var/lib/alloy/data" in SERVICES["alloy"]["command"]
    assert mounts("alloy")["/var/lib/alloy/data"] == "alloy-data"
    assert PROMTAIL["positions"]["filename"].startswith("/var/lib/promtail/")
    assert mounts("promtail")["/var/lib/promtail"] == "promtail-data"


def test_prometheus_scrapes_the_proxy_on_the_host_and_itself() -> None:
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in PROMETHEUS["scrape_configs"]}
    assert jobs == {"openai-proxy": ["host.docker.internal:8080"], "prometheus": ["localhost:9090"]}
    assert SERVICES["prometheus"]["extra_hosts"] == ["host.docker.internal:host-gateway"]


def test_retention_is_seven_days_and_the_readme_says_where() -> None:
    flag = "--storage.tsdb.retention.time=7d"
    assert flag in SERVICES["prometheus"]["command"]
    assert flag in (STACK / "prometheus.yml").read_text()
    assert flag in readme()
    assert LOKI["limits_config"]["retention_period"] == "168h"
    assert "`limits_config.retention_period: 168h`" in readme()


class Strict(BaseModel):
    """A part of Loki's configuration in which nothing unknown may be."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


class Server(Strict):
    http_listen_port: Literal[3100]
    log_level: Literal["warn"]


class Analytics(Strict):
    reporting_enabled: Literal[False]


class KeyValueStore(Strict):
    store: Literal["inmemory"]


class Ring(Strict):
    kvstore: KeyValueStore


class Filesystem(Strict):
    chunks_directory: str
    rules_directory: str


class Storage(Strict):
    filesystem: Filesystem


class Common(Strict):
    instance_addr: Literal["127.0.0.1"]
    path_prefix: str
    replication_factor: Literal[1]
    ring: Ring
    storage: Storage


class Index(Strict):
    prefix: str
    period: Literal["24h"]


class Period(Strict):
    from_: Literal["2024-01-01"]
    store: Literal["tsdb"]
    object_store: Literal["filesystem"]
    schema_: Literal["v13"]
    index: Index

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, alias_generator=lambda name: name.rstrip("_")
    )


class Schema(Strict):
    configs: list[Period]


class Limits(Strict):
    retention_period: Literal["168h"]
    discover_log_levels: Literal[False]
    discover_service_name: list[str]


class Ingester(Strict):
    max_chunk_age: Literal["336h"]


class Compactor(Strict):
    working_directory: str
    retention_enabled: Literal[True]
    delete_request_store: Literal["filesystem"]


class Loki(Strict):
    """What may stand in our configuration of Loki 3.7: https://grafana.com/docs/loki/latest/configure/."""

    auth_enabled: Literal[False]
    server: Server
    analytics: Analytics
    common: Common
    schema_config: Schema
    limits_config: Limits
    ingester: Ingester
    compactor: Compactor


def test_loki_gets_no_key_that_it_does_not_know() -> None:
    Loki.model_validate(LOKI)
    with pytest.raises(ValueError, match="retention_periode"):
        Loki.model_validate({**LOKI, "limits_config": {**LOKI["limits_config"], "retention_periode": "168h"}})


def alloy_string(key: str) -> str:
    """The one value of a key in Alloy's configuration."""
    (value,) = re.findall(rf'\b{key}\s*=\s*"([^"]*)"', ALLOY)
    return str(value)


def test_both_shippers_do_the_same() -> None:
    (scrape,) = PROMTAIL["scrape_configs"]
    (target,) = scrape["static_configs"]
    json_stage, timestamp, labels, keep = scrape["pipeline_stages"]
    path, job = target["labels"]["__path__"], target["labels"]["job"]
    assert (
        (alloy_string("__path__"), alloy_string("job"))
        == (path, job)
        == ("/var/log/openai-proxy/*.log", "openai-proxy")
    )
    assert alloy_string("url") == PROMTAIL["clients"][0]["url"] == "http://loki:3100/loki/api/v1/push"
    assert set(json_stage["json"]["expressions"]) == {"timestamp", "level"}
    assert timestamp["timestamp"] == {"source": alloy_string("source"), "format": alloy_string("format")}
    assert timestamp["timestamp"] == {"source": "timestamp", "format": "RFC3339Nano"}
    assert labels == {"labels": {"level": None}}
    assert keep == {"labelallow": ["job", "level"]}
    assert 'expressions = {timestamp = "", level = ""}' in ALLOY
    assert 'values = {level = ""}' in ALLOY
    assert 'values = ["job", "level"]' in ALLOY
    for name in SHIPPERS:
        assert mounts(name)[str(Path(path).parent)] == "../logs"


ALLOY_ARGUMENTS = {
    "loki.source.file": {"targets", "forward_to"},
    "file_match": {"enabled", "sync_period"},
    "loki.process": {"forward_to"},
    "stage.json": {"expressions"},
    "stage.timestamp": {"source", "format"},
    "stage.labels": {"values"},
    "stage.label_keep": {"values"},
    "loki.write": set[str](),
    "endpoint": {"url", "max_backoff_retries"},
}
"""What Alloy 1.19 knows of what is used here: https://grafana.com/docs/alloy/latest/reference/components/loki/."""


def test_alloy_gets_nothing_that_it_does_not_know() -> None:
    open_blocks: list[str] = []
    found: dict[str, set[str]] = {}
    for line in re.sub(r"^\s*//.*$", "", ALLOY, flags=re.M).splitlines():
        if block := re.fullmatch(r"\s*([\w.]+)( \"\w+\")? \{", line):
            open_blocks.append(block[1])
            found[block[1]] = set()
        elif line.strip() == "}":
            open_blocks.pop()
        elif argument := re.fullmatch(r"\s*(\w+)\s*= .+", line):
            found[open_blocks[-1]].add(argument[1])
        else:
            assert not line.strip()
    assert not open_blocks
    assert found == ALLOY_ARGUMENTS


def test_the_shippers_wait_for_loki_without_end() -> None:
    assert re.search(r"\bmax_backoff_retries = 0$", ALLOY, re.M)
    assert PROMTAIL["clients"][0]["backoff_config"] == {"max_retries": 0}
    assert PROMTAIL["server"]["health_check_target"] is False


def test_the_shippers_listen_where_their_health_is_asked() -> None:
    checks = {name: SERVICES[name]["healthcheck"]["test"][-1] for name in SHIPPERS}
    assert "--server.http.listen-addr=127.0.0.1:12345" in SERVICES["alloy"]["command"]
    assert "/dev/tcp/127.0.0.1/12345" in checks["alloy"]
    assert f"/dev/tcp/127.0.0.1/{PROMTAIL['server']['http_listen_port']} " in checks["promtail"]


def test_grafana_asks_the_servers_that_are_there() -> None:
    sources = load_yaml("grafana/provisioning/datasources/datasources.yml")["datasources"]
    assert {source["uid"]: source["url"] for source in sources} == {
        "prometheus": "http://prometheus:9090",
        "loki": "http://loki:3100",
    }
    (provider,) = load_yaml("grafana/provisioning/dashboards/dashboards.yml")["providers"]
    assert provider["allowUiUpdates"] is True
    assert mounts("grafana")[provider["options"]["path"]] == "./grafana/dashboards"
    assert SERVICES["grafana"]["environment"]["GF_USERS_HOME_PAGE"] == f"/d/{load_dashboard()['uid']}"


def test_grafana_lets_nobody_in_and_calls_nobody() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_USER"] == "${GRAFANA_ADMIN_USER:-admin}"
    assert environment["GF_SECURITY_ADMIN_PASSWORD"] == "${GRAFANA_ADMIN_PASSWORD:-admin}"
    off = {name for name, value in environment.items() if value == "false"}
    assert off >= {
        "GF_AUTH_ANONYMOUS_ENABLED",
        "GF_USERS_ALLOW_SIGN_UP",
        "GF_ANALYTICS_REPORTING_ENABLED",
        "GF_ANALYTICS_CHECK_FOR_UPDATES",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES",
        "GF_NEWS_NEWS_FEED_ENABLED",
        "GF_PLUGINS_PREINSTALL_AUTO_UPDATE",
    }
    assert environment["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"


def test_the_readme_shows_every_panel_and_opens_with_the_shippers() -> None:
    text = readme()
    for panel in panels(load_dashboard()):
        assert re.search(rf"[|,] {re.escape(panel['title'])}[ ,|]", text), panel["title"]
    assert text.index("Promtail reached its end of life") < text.index("## ")
    for service in SHIPPERS:
        assert f"docker compose restart {service}" in text
    for link in re.findall(r"\]\(#([\w-]+)\)", text):
        headings = [re.sub(r"[^\w -]", "", heading).lower() for heading in re.findall(r"^#+ (.*)$", text, re.M)]
        assert link in [heading.replace(" ", "-") for heading in headings]


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) >= 12
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert set(alert["annotations"]) == {"summary", "description"}
        assert len(alert["annotations"]["description"]) > 80
    for quoted in re.findall(r'"([A-Z][\w ]+)"', str([alert["annotations"] for alert in alerts])):
        assert quoted == "Troubleshooting" or quoted in [panel["title"] for panel in panels(load_dashboard())]


def test_no_group_has_an_interval_of_its_own() -> None:
    for file in (STACK / "rules").glob("*.yml"):
        assert not [group for group in load_yaml(f"rules/{file.name}")["groups"] if "interval" in group]


@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "config", "../deploy/observability/prometheus.yml"],
        ["check", "rules", "rules/recording.yml", "rules/alerts.yml"],
        ["test", "rules", "rules/tests/alerts.yml"],
    ],
    ids=" ".join,
)
def test_promtool_has_nothing_against_it(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=STACK, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout + done.stderr
