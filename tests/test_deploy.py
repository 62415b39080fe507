"""What is in `deploy/`, and the Dockerfile: against the program, against each other, and run as far as that goes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import click
import httpx
import pytest
import trio
import yaml
from hypercorn.config import Config

from authority import Authority
from processes import environment, free_port, running
from support import Upstream, running_proxy
from trioproxy import __version__, server
from trioproxy.cli import EXIT_UNUSABLE_CONFIGURATION
from trioproxy.cli import main as commands
from trioproxy.config import Settings, load
from trioproxy.observe import logs

REPOSITORY: Final = Path(__file__).parent.parent
DEPLOY: Final = REPOSITORY / "deploy"
README: Final = (DEPLOY / "README.md").read_text()
UNIT: Final = (DEPLOY / "trioproxy.service").read_text()

STOP_SECONDS: Final = Settings().server.shutdown_grace + server.GOODBYE_SECONDS + logs.CLOSE_SECONDS_MAX
"""How long `trioproxy serve` may take from SIGTERM to its end, by default."""


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order: name and the rest, on one line."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, rest in re.findall(r"^([A-Z]+) (.*)$", text, re.M)]


def final_stage() -> dict[str, list[str]]:
    """What the image is made by: the arguments of each instruction behind the last FROM."""
    named = defaultdict[str, list[str]](list)
    for name, rest in instructions():
        if name == "FROM":
            named.clear()
        named[name].append(rest)
    return named


def image_environment() -> dict[str, str]:
    """The image's environment variables."""
    return dict(pair.split("=", 1) for line in final_stage()["ENV"] for pair in shlex.split(line))


def health_check() -> list[str]:
    """The image's health check, for this Python."""
    (check,) = final_stage()["HEALTHCHECK"]
    program, *arguments = cast(list[str], json.loads(check[check.index("CMD ") + 4 :]))
    assert program == "python"
    return [sys.executable, *arguments]


def health_check_over_tls(port: int) -> list[str]:
    """The health check that the README has for a proxy with TLS, for this Python and at that port."""
    (block,) = re.findall(r"^  ```yaml\n(  healthcheck:.*?)^  ```$", README, re.M | re.S)
    kind, program, *arguments = yaml.safe_load(block)["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    return [sys.executable, *(argument.replace("8080", str(port)) for argument in arguments)]


async def health(bind: str, check: list[str] | None = None) -> int:
    """The health check's exit status, asked of whoever listens there."""
    done = await trio.run_process(
        check or health_check(), env=environment({"TRIOPROXY_SERVER__BIND": bind}), capture_stderr=True, check=False
    )
    return done.returncode


class TestImage:
    def test_the_base_is_of_one_minor_version_in_both_stages(self) -> None:
        (base,) = (rest for name, rest in instructions() if name == "ARG" and rest.startswith("PYTHON="))
        assert re.fullmatch(r"PYTHON=3\.\d+-slim", base)
        assert [rest for name, rest in instructions() if name == "FROM"] == [
            "python:${PYTHON} AS build",
            "python:${PYTHON}",
        ]
        (labels,) = final_stage()["LABEL"]
        assert f'base.name="docker.io/library/python:{base.removeprefix("PYTHON=")}"' in labels
        assert f'image.version="{__version__}"' in labels

    def test_it_takes_only_the_environment_from_the_build(self) -> None:
        assert final_stage()["COPY"] == ["--from=build /opt/trioproxy /opt/trioproxy"]
        assert any("pip uninstall --yes" in step for step in final_stage()["RUN"])

    def test_the_builder_gets_what_the_wheel_is_made_of(self) -> None:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
        needed = {"pyproject.toml", "src", project["project"]["readme"], *project["project"]["license-files"]}
        copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
        assert {source for sources in copied for source in sources} == needed
        ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
        assert "*" in ignored
        assert {line[1:] for line in ignored if line.startswith("!")} == needed

    def test_it_runs_as_a_user_by_number_without_a_shell_in_between(self) -> None:
        stage = final_stage()
        assert [stage[name] for name in ("USER", "ENTRYPOINT", "CMD", "STOPSIGNAL")] == [
            ["10001:10001"],
            ['["trioproxy"]'],
            ['["serve"]'],
            ["SIGTERM"],
        ]

    def test_its_environment_is_a_configuration(self) -> None:
        settings = load(environ=image_environment())
        assert settings.server.bind == ("0.0.0.0:8080",)
        assert settings.logging.format == "json"
        assert final_stage()["EXPOSE"] == ["8080"]

    async def test_its_health_check_knows_a_proxy_that_is_there_also_without_its_upstream(self) -> None:
        async with running_proxy(f"http://127.0.0.1:{free_port()}/v1") as proxy:
            assert (await proxy.client.get("/v1/models")).status_code == 502
            assert (await proxy.client.get("/ready")).status_code == 503
            assert await health(proxy.url.removeprefix("http://")) == 0

    async def test_the_health_check_for_tls_does_too(self, upstream: Upstream, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        async with running_proxy(upstream.url, (), authority.trusting(), server=authority.settings()) as proxy:
            assert await health("", health_check_over_tls(proxy.port)) == 0
            assert await health("", health_check_over_tls(free_port())) == 1

    async def test_its_health_check_knows_one_that_is_not(self, upstream: Upstream, nursery: trio.Nursery) -> None:
        assert await health(f"127.0.0.1:{free_port()}") == 1

        async def be_ill() -> None:
            await (await upstream.call()).answer(status=500)

        nursery.start_soon(be_ill)
        assert await health(httpx.URL(upstream.url).netloc.decode()) == 1


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    """A Compose file."""
    return cast(dict[str, Any], yaml.safe_load((DEPLOY / name).read_text()))


class TestCompose:
    @pytest.mark.parametrize("name", ["proxy", "demo"])
    def test_every_service_is_kept_on_a_short_leash(self, name: str) -> None:
        service = compose()["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}

    def test_the_proxy_may_end_as_it_wants_and_comes_back(self) -> None:
        proxy = compose()["services"]["proxy"]
        assert float(proxy["stop_grace_period"].removesuffix("s")) > STOP_SECONDS
        assert proxy["restart"] == "unless-stopped"

    def test_only_this_machine_can_connect(self) -> None:
        for service in compose()["services"].values():
            (port,) = service["ports"]
            assert port.startswith(("${PROXY_ADDRESS:-127.0.0.1}:", "127.0.0.1:"))

    @pytest.mark.parametrize("name", ["proxy", "demo"])
    def test_it_listens_where_its_port_and_its_health_check_are(self, name: str) -> None:
        service = compose()["services"][name]
        address = service["environment"]["TRIOPROXY_SERVER__BIND"]
        assert service["ports"][0].rpartition(":")[2] == address.rpartition(":")[2]
        if name == "demo":
            assert address in service["command"]
        else:
            load(environ=image_environment() | service["environment"])

    def test_a_configuration_file_needs_no_more_than_two_comment_signs_less(self) -> None:
        text = (DEPLOY / "compose.yaml").read_text()
        text, count = re.subn(r"^( +)# (TRIOPROXY_CONFIG:|volumes:)", r"\1\2", text, flags=re.M)
        proxy = yaml.safe_load(text)["services"]["proxy"]
        assert count == 2
        assert proxy["volumes"] == ["./etc:/etc/trioproxy:ro"]
        assert proxy["environment"]["TRIOPROXY_CONFIG"] == "/etc/trioproxy/trioproxy.yaml"
        assert "`mkdir etc && cp trioproxy.yaml etc/`" in README

    def test_the_demo_is_a_command_that_exists(self) -> None:
        command, *options = compose()["services"]["demo"]["command"]
        commands.commands[command].make_context(command, options)

    def test_logs_go_where_the_image_lets_the_proxy_write(self) -> None:
        (mount,) = compose()["services"]["demo"]["volumes"]
        assert mount == "logs:/srv/trioproxy/logs"
        assert any(
            step.rpartition("--group=trioproxy")[2].startswith(" /srv/trioproxy/logs") for step in final_stage()["RUN"]
        )
        assert final_stage()["WORKDIR"] == ["/srv/trioproxy"]
        (proxy,) = compose("compose.observability.yaml")["services"].values()
        assert proxy["volumes"] == [mount]
        assert proxy["environment"]["TRIOPROXY_LOGGING__FILE"].startswith("logs/")

    def test_the_stack_is_laid_over_as_it_is(self) -> None:
        stack = yaml.safe_load((REPOSITORY / "observability" / "docker-compose.yml").read_text())["services"]
        (include,) = compose("compose.observability.yaml")["include"]
        first, second = include["path"]
        assert (DEPLOY / first).resolve() == REPOSITORY / "observability" / "docker-compose.yml"
        for name, service in compose(second)["services"].items():
            assert set(service) == {"volumes"}
            for volume in service["volumes"]:
                source, target, _ = volume.split(":")
                (replaced,) = (each for each in stack[name]["volumes"] if each.split(":")[1] == target)
                assert replaced != volume
                assert source == "logs" or (REPOSITORY / "observability" / source).exists()

    def test_prometheus_differs_in_its_targets_alone(self) -> None:
        outside = yaml.safe_load((REPOSITORY / "observability" / "prometheus.yml").read_text())
        inside = compose("observability/prometheus.yml")
        assert {**outside, "scrape_configs": None} == {**inside, "scrape_configs": None}
        (job, *others), (job_inside, *others_inside) = outside["scrape_configs"], inside["scrape_configs"]
        assert others == others_inside
        assert job["job_name"] == job_inside["job_name"]
        found = {f"{source['names'][0]}:{source['port']}" for source in job_inside["dns_sd_configs"]}
        ports = {
            f"{name}:{service['environment']['TRIOPROXY_SERVER__BIND'].rpartition(':')[2]}"
            for name, service in compose()["services"].items()
        }
        assert found == ports


EXAMPLES: Final = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.M))


class TestEnvironmentFile:
    def test_it_sets_nothing_before_it_is_edited(self) -> None:
        assert not re.search(r"^[^#\n]", (DEPLOY / ".env.example").read_text(), re.M)

    @pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("TRIOPROXY_")])
    def test_each_variable_is_a_setting_shown_with_its_default(self, name: str) -> None:
        settings = load(environ={name: EXAMPLES[name]})
        if name == "TRIOPROXY_UPSTREAM__API_KEY":
            assert settings.upstream.api_key is not None
        else:
            assert settings == Settings()

    def test_docker_compose_and_systemd_read_the_values_alike(self) -> None:
        assert not [value for value in EXAMPLES.values() if not re.fullmatch(r"[\w.:/,-]+", value, re.ASCII)]

    def test_the_others_are_those_of_compose_and_of_forward_proxies(self) -> None:
        others = {name for name in EXAMPLES if not name.startswith("TRIOPROXY_")}
        text = (DEPLOY / "compose.yaml").read_text()
        assert {name for name in others if f"${{{name}:-{EXAMPLES[name]}}}" in text} == others - {
            "HTTPS_PROXY",
            "NO_PROXY",
        }


def test_the_configuration_file_shows_the_defaults() -> None:
    assert load(DEPLOY / "trioproxy.yaml", environ={}) == Settings()


def test_what_it_shows_as_examples_works(tmp_path: Path) -> None:
    lines = (DEPLOY / "trioproxy.yaml").read_text().splitlines()
    shown = [line for line in lines if not re.search(r" (tls:|(cert|key): /)", line)]  # there are no such files here
    switched_on = tmp_path / "trioproxy.yaml"
    switched_on.write_text("\n".join(re.sub(r"^( *)# (?=( *)[-a-z_0-9]+:| *- )", r"\1", line) for line in shown))
    settings = load(switched_on, environ={"OPENAI_API_KEY": "sk-x"})
    assert str(settings.server.control_socket) == "/run/trioproxy/control.sock"
    assert [(key.name, key.default_priority, key.max_priority) for key in settings.keys] == [
        ("web", 70, 100),
        ("batch", None, 30),
    ]


KNOWN: Final = {
    "Unit": "Description After Wants StartLimitIntervalSec",
    "Service": """
        Type ExecStart ExecReload Restart RestartSec RestartPreventExitStatus TimeoutStopSec
        User Group WorkingDirectory LogsDirectory RuntimeDirectory StateDirectory EnvironmentFile LimitNOFILE
        AmbientCapabilities CapabilityBoundingSet DevicePolicy KeyringMode LockPersonality MemoryDenyWriteExecute
        NoNewPrivileges PrivateDevices PrivateTmp PrivateUsers ProtectClock ProtectControlGroups ProtectHome
        ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables ProtectProc ProtectSystem RemoveIPC
        RestrictAddressFamilies RestrictNamespaces RestrictRealtime RestrictSUIDSGID
        SystemCallArchitectures SystemCallErrorNumber SystemCallFilter
    """,
    "Install": "WantedBy",
}
"""What systemd 247 knows of what is used here: `systemd --dump-configuration-items`, systemd.directives(7)."""


def unit() -> dict[str, dict[str, list[str]]]:
    """The unit's directives and their values, by section."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in UNIT.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            directives = sections.setdefault(header[1], defaultdict(list))
        elif line and not line.startswith("#"):
            name, value = line.split("=", 1)
            directives[name].append(value)
    return sections


class TestUnit:
    def test_systemd_knows_every_directive(self) -> None:
        assert {section: set(directives) for section, directives in unit().items()} == {
            section: set(names.split()) for section, names in KNOWN.items()
        }

    def test_systemd_itself_has_nothing_against_it_where_it_is(self, tmp_path: Path) -> None:
        if shutil.which("systemd-analyze"):
            file = tmp_path / "trioproxy.service"
            # It wants programs that exist.
            file.write_text(UNIT.replace("/opt/trioproxy/bin/trioproxy", sys.executable))
            command = ["systemd-analyze", "verify", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            assert (done.returncode, [line for line in done.stderr.splitlines() if file.name in line]) == (0, [])

    def test_its_commands_exist(self) -> None:
        service = unit()["Service"]
        for line in [*service["ExecStart"], service["ExecReload"][0]]:
            program, command, *arguments = line.split()
            assert program == "/opt/trioproxy/bin/trioproxy"
            assert isinstance(commands, click.Group)
            commands.commands[command].make_context(command, arguments)
        assert service["ExecReload"][1:] == ["/bin/kill -HUP $MAINPID"]

    def test_it_waits_for_the_proxy_to_end_and_does_not_repeat_what_cannot_work(self) -> None:
        service = unit()["Service"]
        assert float(service["TimeoutStopSec"][0]) > STOP_SECONDS
        assert service["Restart"] == ["on-failure"]
        assert service["RestartPreventExitStatus"] == [str(EXIT_UNUSABLE_CONFIGURATION)]

    def test_the_readme_installs_all_that_it_names(self) -> None:
        service = unit()["Service"]
        (user,), (home,), (variables,) = service["User"], service["WorkingDirectory"], service["EnvironmentFile"]
        assert f"--home-dir {home} --shell /usr/sbin/nologin {user}\n" in README
        assert f"deploy/.env.example {variables.removeprefix('-')}\n" in README
        assert f"deploy/trioproxy.yaml {service['ExecStart'][0].split()[-1]}\n" in README
        assert "-m venv /opt/trioproxy\n" in README


HYPERCORN: Final = tomllib.loads((DEPLOY / "hypercorn.toml").read_text())


class TestHypercorn:
    def test_it_serves_by_its_file_as_the_proxy_does_by_itself(self) -> None:
        # What Hypercorn does not know it ignores.
        assert set(HYPERCORN) <= {name for name in dir(Config) if not name.startswith("_")}
        ours = server._hypercorn_config(Settings())
        own = {
            "worker_class": "trio",
            "workers": 1,
            "graceful_timeout": Settings().server.shutdown_grace,
            "errorlog": "-",
        }
        assert {name: own.get(name, getattr(ours, name)) for name in HYPERCORN} == HYPERCORN

    def test_nothing_that_the_proxy_sets_is_left_out(self) -> None:
        ours = server._hypercorn_config(Settings())
        changed = {name for name in vars(ours) if getattr(ours, name) != getattr(Config(), name)} - {
            "_bind",
            "accesslog",
        }
        assert changed <= set(HYPERCORN)

    async def test_it_answers(self, upstream: Upstream) -> None:
        bind = f"127.0.0.1:{free_port()}"
        command = ("-m", "hypercorn", "--config", str(DEPLOY / "hypercorn.toml"), "--bind", bind, "trioproxy.asgi:app")
        async with running(*command, variables={"TRIOPROXY_UPSTREAM__BASE_URL": upstream.url}) as process:
            await process.line("started")
            async with (
                httpx.AsyncClient(base_url=f"http://{bind}", trust_env=False) as client,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(partial(answer, upstream))
                answered = await client.post("/v1/chat/completions", json={"model": "x"})
            assert answered.json() == {"id": 1}
            assert (b"X-CamelCase", b"1") in answered.headers.raw
            assert not {"date", "server"} & set(answered.headers)
            process.signal(signal.SIGTERM)
            assert await process.end() == 0


async def answer(upstream: Upstream) -> None:
    """Answer the next call."""
    await (await upstream.call()).answer(b'{"id": 1}', X_CamelCase="1")


def test_the_readme_names_what_is_there() -> None:
    table = README[: README.index("**Nothing")]
    named = set(re.findall(r"`([^`]+)`", table))
    assert all((DEPLOY / name).exists() for name in named)
    assert {path.name for path in DEPLOY.iterdir()} - {"README.md", ".env"} <= {name.rstrip("/") for name in named}
