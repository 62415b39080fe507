"""Every LogQL query: in Grafana's own grammar; and the README's queries over the proxy's real log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import trio

import traffic
from processes import environment, free_port
from stack import HERE, load_dashboard, queries, readme, substituted
from support import running_upstream, until

Line = dict[str, Any]

DASHBOARD = load_dashboard()

README_QUERIES: dict[str, Callable[[Line], bool]] = {
    '{job="openai-proxy"}': lambda _: True,
    '{job="openai-proxy"} |= "error"': lambda line: "error" in line,
    '{job="openai-proxy"} |= "evicted"': lambda line: line["event"] == "request evicted",
    '{job="openai-proxy"} | json | priority > 50': lambda line: line.get("priority", 0) > 50,
}
"""What each query is to find, said of a line as data instead of as text."""


def linked_expressions() -> list[str]:
    """The queries that links of the dashboard lead to."""
    links = [*DASHBOARD["links"], *(link for panel in DASHBOARD["panels"] for link in panel.get("links", []))]
    panes = [json.loads(unquote(link["url"].partition("panes=")[2])) for link in links]
    return [query["expr"] for pane in panes for query in pane["logs"]["queries"]]


def expressions() -> list[str]:
    """Every LogQL expression of dashboard and README."""
    shown = [substituted(query.expression, "5s") for query in queries(DASHBOARD, "loki")]
    written = [code.replace("\\|", "|") for code in re.findall(r"`(\{job=[^`]*)`", readme())]
    assert set(README_QUERIES) <= set(written)
    return [*shown, *linked_expressions(), *written]


def complaints(tried: list[str]) -> list[str | None]:
    """What Grafana's grammar has against each expression."""
    done = subprocess.run(
        ["node", "logql.mjs"], cwd=HERE, input=json.dumps(tried), capture_output=True, text=True, check=True, timeout=60
    )
    answer: list[str | None] = json.loads(done.stdout)
    assert len(answer) == len(tried)
    return answer


def test_every_expression_is_logql() -> None:
    tried = expressions()
    assert len(tried) > 10
    assert [complaint for complaint in complaints(tried) if complaint] == []


@pytest.mark.parametrize("broken", ['{job="openai-proxy"', '{job="openai-proxy"} | json | priority >', "{} |= evicted"])
def test_the_grammar_notices_what_is_not(broken: str) -> None:
    assert complaints([broken]) != [None]


def reading(expression: str) -> Callable[[str], bool]:
    """What a LogQL query finds, by a reading of our own: a selector, then `|= "text"` and `| json | name > number`."""
    selector, *stages = re.split(r"\s*\|(?==)|\s*\|\s*", expression)
    assert selector == '{job="openai-proxy"}'
    tests: list[Callable[[str], bool]] = []
    for stage in stages:
        if found := re.fullmatch(r'= *"([^"]*)"', stage):
            tests.append(lambda line, text=found[1]: text in line)  # type: ignore[misc]
        elif found := re.fullmatch(r"(\w+) > (\d+)", stage):
            tests.append(lambda line, name=found[1], least=int(found[2]): json.loads(line).get(name, 0) > least)  # type: ignore[misc]
        else:
            assert stage == "json"
    return lambda line: all(test(line) for test in tests)


async def real_logs(folder: Path) -> tuple[str, str]:
    """What the proxy writes about traffic of every kind: into its log file, and through `tee`."""
    own, teed = folder / "own.log", folder / "teed.log"
    url = f"http://127.0.0.1:{free_port()}"
    async with running_upstream() as upstream, trio.open_nursery() as nursery:
        nursery.start_soon(upstream.behave, traffic.behave)
        variables = {
            f"TRIOPROXY_SCHEDULER__{name.upper()}": str(value) for name, value in traffic.SETTINGS["scheduler"].items()
        }
        command = [sys.executable, "-m", "trioproxy", "serve", "--bind", url.removeprefix("http://")]
        command += ["--upstream", upstream.url, "--log-file", str(own)]
        reader, writer = os.pipe()
        proxy = await trio.lowlevel.open_process(command, stdout=writer, stderr=writer, env=environment(variables))
        tee = await trio.lowlevel.open_process(["tee", "-i", "-a", str(teed)], stdin=reader, stdout=subprocess.DEVNULL)
        os.close(reader)
        os.close(writer)
        try:
            await until(lambda: own.exists() and '"listening"' in own.read_text(), 20)
            async with traffic.client(url, bugs=False) as client:
                await client.one_round()
        finally:
            proxy.terminate()
            with trio.move_on_after(30, shield=True):
                await proxy.wait()
                await tee.wait()
        nursery.cancel_scope.cancel()
    return own.read_text(), teed.read_text()


async def test_the_readmes_queries_find_exactly_the_lines_that_they_say(tmp_path: Path) -> None:
    own, teed = await real_logs(tmp_path)
    assert own == teed
    lines = own.splitlines()
    assert {line["outcome"] for line in traffic.as_lines(own) if "outcome" in line} == {
        "success", "evicted", "rejected", "timeout", "upstream_error", "cancelled",
    }  # fmt: skip
    for expression, expected in README_QUERIES.items():
        found = [line for line in lines if reading(expression)(line)]
        assert found
        assert found == [line for line in lines if expected(json.loads(line))], expression


async def test_the_shippers_stages_fit_every_line(tmp_path: Path) -> None:
    own, _ = await real_logs(tmp_path)
    for line in traffic.as_lines(own):
        # RFC3339Nano, as time.Parse of Go reads it.
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", line["timestamp"])
        assert line["level"] in {"debug", "info", "warning", "error", "critical"}
