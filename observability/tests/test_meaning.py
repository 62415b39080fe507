"""The real proxy, traffic of every outcome and level, a real Prometheus: every query means something."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import trio
import yaml

import traffic
from processes import free_port
from stack import STACK, Query, load_dashboard, load_yaml, queries, rules, substituted
from support import Proxy, running_proxy, running_upstream
from trioproxy.errors import Outcome, Status
from trioproxy.priority import LEVELS

SECONDS: Final = 24.0
"""How long there is traffic."""

WINDOW: Final = 10
"""Seconds that rates look back, as a dashboard's would look back over several scrapes."""

DASHBOARD = load_dashboard()


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    http: httpx.AsyncClient

    async def get(self, path: str, **parameters: str) -> Any:
        """What the API answers."""
        answer = await self.http.get(f"/api/v1/{path}", params=parameters)
        content = answer.json()
        assert content["status"] == "success", content
        return content["data"]

    async def ready(self) -> bool:
        """Whether it takes queries."""
        try:
            return (await self.http.get("/-/ready")).is_success
        except httpx.TransportError:
            return False


def configuration(target: str, folder: Path) -> Path:
    """Our configuration, but for where the proxy is and how often it is asked."""
    config = load_yaml("prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(STACK / pattern) for pattern in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["openai-proxy"]["static_configs"] == [{"targets": ["host.docker.internal:8080"]}]
    jobs["openai-proxy"]["static_configs"] = [{"targets": [target]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    return file


@asynccontextmanager
async def running_prometheus(target: str, folder: Path) -> AsyncIterator[Prometheus]:
    """A Prometheus that watches `target`."""
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={configuration(target, folder)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.run_process, command)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as http:
            prometheus = Prometheus(http)
            with trio.fail_after(30):
                while not await prometheus.ready():  # noqa: ASYNC110 - nobody tells us
                    await trio.sleep(0.1)
            yield prometheus
        nursery.cancel_scope.cancel()


async def offer_traffic(proxy: Proxy) -> None:
    """Rounds of every kind of request for a while."""
    async with traffic.client(proxy.url, bugs=True) as client:
        ends = trio.current_time() + SECONDS
        while trio.current_time() < ends:
            await client.one_round()


def assert_everything_happened(proxy: Proxy) -> None:
    """The traffic has had every outcome, at every level."""
    ended = [(event.request.priority_level, event.ending.status) for event in proxy.recorder.ended]
    assert {(level, status) for level in LEVELS for status in Status} <= set(ended)
    assert set(proxy.recorder.outcomes()) == {outcome.value for outcome in Outcome}


async def answer(prometheus: Prometheus, expression: str, *, instant: bool, now: float) -> list[dict[str, Any]]:
    """The series of a query, each with its labels and its values in the last seconds of the traffic."""
    if instant:
        found = await prometheus.get("query", query=expression, time=f"{now}")
    else:
        found = await prometheus.get("query_range", query=expression, start=f"{now - 8}", end=f"{now}", step="1")
    return [
        {"labels": series["metric"], "values": series.get("values") or [series["value"]]} for series in found["result"]
    ]


def legend(pattern: str, labels: dict[str, str]) -> str:
    """What Grafana writes beside a series."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), pattern)


def complaints(query: Query, found: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with the answer to a panel's query."""
    if not found:
        yield f"{query}: no data"
    for series in found:
        wrong = [value for _, value in series["values"] if not math.isfinite(float(value))]
        if wrong:
            yield f"{query} {series['labels']}: {wrong[0]}"
        if missing := set(re.findall(r"{{(\w+)}}", query.legend)) - series["labels"].keys():
            yield f"{query} {series['labels']}: without {missing}"
    shown = [legend(query.legend, series["labels"]) for series in found]
    if len(set(shown)) != len(shown):
        yield f"{query}: {shown}"


async def check_panels(prometheus: Prometheus, now: float) -> list[str]:
    """What is wrong with the panels."""
    wrong: list[str] = []
    for query in queries(DASHBOARD, "prometheus"):
        found = await answer(prometheus, substituted(query.expression, f"{WINDOW}s"), instant=query.instant, now=now)
        wrong += complaints(query, found)
    return wrong


async def check_renamed(prometheus: Prometheus, now: float) -> list[str]:
    """Queries that would not notice that a metric has another name."""
    unnoticed = []
    for query in queries(DASHBOARD, "prometheus"):
        series = re.findall(r"\b(?:openai_proxy|process)_\w+|\bup\b", query.expression)
        for name in {re.sub(r"_(bucket|count|sum)$", "", each) for each in series}:
            renamed = rf"\b{name}(?=(_bucket|_count|_sum)?\b)"
            expression = re.sub(renamed, f"{name}_x", substituted(query.expression, f"{WINDOW}s"))
            if not list(complaints(query, await answer(prometheus, expression, instant=query.instant, now=now))):
                unnoticed.append(f"{query}: {name}")
    return unnoticed


async def check_rules(prometheus: Prometheus, exposed: str) -> list[str]:
    """What is wrong with the rules."""
    groups = (await prometheus.get("rules"))["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    wrong = [f"{rule['name']}: {rule}" for rule in loaded if rule["health"] != "ok"]
    assert len(loaded) == len(list(rules()))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for name in recorded:
        if not (await prometheus.get("query", query=name))["result"]:
            wrong.append(f"{name}: no data")
    known = set(re.findall(r"^(\w+)[{ ]", exposed, re.M)) | recorded
    for rule in rules():
        used = set(re.findall(r"\b(?:openai_proxy_\w+|pool:[\w:]+)", rule["expr"]))
        wrong += [f"{rule['expr']}: no metric {name}" for name in used - known]
    return wrong


async def test_every_panel_and_every_rule_has_data_that_means_something(tmp_path: Path) -> None:
    async with running_upstream() as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, traffic.behave)
        async with (
            running_proxy(upstream.url, **traffic.SETTINGS) as proxy,
            running_prometheus(f"127.0.0.1:{proxy.port}", tmp_path) as prometheus,
        ):
            proxy.app.proxy.upstream = traffic.with_a_bug(proxy.app.proxy.upstream)
            await offer_traffic(proxy)
            now = float((await prometheus.get("query", query="time()"))["result"][1])
            assert_everything_happened(proxy)
            exposed = (await proxy.client.get("/metrics")).text
            assert await check_panels(prometheus, now) == []
            assert await check_rules(prometheus, exposed) == []
            assert await check_renamed(prometheus, now) == []
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("requests", [0, 20])
async def test_no_panel_is_empty_when_all_is_well(requests: int, tmp_path: Path) -> None:
    """Nothing at all, or nothing but a few requests that succeed."""
    async with running_upstream() as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, traffic.behave)
        async with (
            running_proxy(upstream.url, **traffic.SETTINGS) as proxy,
            running_prometheus(f"127.0.0.1:{proxy.port}", tmp_path) as prometheus,
            traffic.client(proxy.url, bugs=False) as client,
        ):
            for _ in range(requests):
                assert await client.ask(50) == 200
            await trio.sleep(WINDOW)
            now = float((await prometheus.get("query", query="time()"))["result"][1])
            assert await check_panels(prometheus, now) == []
        nursery.cancel_scope.cancel()


async def test_promtool_has_nothing_against_the_metrics() -> None:
    async with running_upstream() as upstream, running_proxy(upstream.url) as proxy:
        exposed = (await proxy.client.get("/metrics")).content
    command = ["promtool", "check", "metrics"]
    done = await trio.run_process(command, stdin=exposed, capture_stdout=True, capture_stderr=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
