"""The settings: every accepted form, every refusal with its text, who wins, and that no secret ever shows."""

import hashlib
import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from trioproxy.config import ConfigError, Settings, describe, load

SECRET = "sk-Very5ecret"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "proxy.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def value_of(settings: Settings, key: str) -> object:
    found: object = settings
    for name in key.split("."):
        found = getattr(found, name)
    return found


def refusal(
    path: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> list[str]:
    """The lines of the error that loading this must raise."""
    with pytest.raises(ConfigError) as raised:
        load(path, environ or {}, overrides)
    return str(raised.value).splitlines()


def only_refusal(
    path: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> str:
    [line] = refusal(path, environ, overrides)
    return line


def variable(key: str) -> str:
    return "TRIOPROXY_" + key.upper().replace(".", "__")


# Defaults and description


DEFAULTS: dict[str, dict[str, object]] = {
    "server": {
        "bind": ["127.0.0.1:8080"],
        "max_body_size": 67_108_864,
        "client_write_timeout": 60.0,
        "shutdown_grace": 30.0,
        "backlog": 2048,
        "keep_alive_timeout": 75.0,
        "max_websockets": 100,
        "websocket_idle_timeout": 3600.0,
        "websocket_max_message_size": 16_777_216,
        "control_socket": None,
        "tls": {"cert": None, "key": None},
    },
    "upstream": {
        "base_url": "https://api.openai.com/v1",
        "api_key": None,
        "connect_timeout": 10.0,
        "first_byte_timeout": 600.0,
        "idle_timeout": 600.0,
        "request_timeout": None,
        "keep_alive_expiry": 30.0,
        "ca_file": None,
        "client_cert": None,
        "client_key": None,
    },
    "scheduler": {
        "concurrency": 10,
        "max_queue": 100,
        "queue_timeout": 300.0,
        "default_priority": 50,
        "model_priorities": {},
        "honor_service_tier": False,
        "routes": {},
    },
    "logging": {"level": "info", "format": None, "file": None},
}


def dotted(section: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


KEYS = list(dotted(DEFAULTS))


def test_without_anything_the_defaults_hold() -> None:
    assert load(None, {}) == Settings()
    assert describe(Settings()) == DEFAULTS
    assert Settings().server.bind == ("127.0.0.1:8080",)


def test_construction_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIOPROXY_SCHEDULER__CONCURRENCY", "3")
    assert Settings().scheduler.concurrency == 10
    assert load().scheduler.concurrency == 3


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "# nothing\n",
        "---\n",
        "null\n",
        "{}",
        "\ufeff",
        "\ufeffserver:\nlogging:\n",
        "server:\n",
        "server: {}\nscheduler: ~\nlogging: null\n",
    ],
)
def test_an_empty_file_or_section_means_the_defaults(write: Write, content: str) -> None:
    file = write(content)
    assert load(file, {}) == Settings()
    for environ in ({}, {"TRIOPROXY_CONFIG": str(file), "TRIOPROXY_SCHEDULER__CONCURRENCY": "3"}):
        with pytest.raises(ConfigError, match="sets nothing"):
            load(None if environ else file, environ, may_be_empty=False)


def test_the_description_of_settings_loads_as_the_same_settings(write: Write) -> None:
    settings = Settings.model_validate(
        {
            "server": {"bind": ["[::1]:0", "unix:/run/p.sock"], "shutdown_grace": "1.5m"},
            "upstream": {"request_timeout": "250ms"},
            "scheduler": {"routes": {"/v1/a/*": "pass"}, "model_priorities": {"gpt-*": "high"}},
            "keys": [{"name": "web", "key_sha256": "AB" * 32, "models": ["gpt-*"], "expires": "2027-01-31"}],
            "logging": {"level": "DEBUG", "format": "json", "file": "logs/proxy.log"},
        }
    )
    described = describe(settings)
    assert load(write(yaml.safe_dump(described)), {}) == settings
    assert load(write(json.dumps(described)), {}) == settings


def test_settings_are_immutable_and_closed() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.scheduler.concurrency = 3
    with pytest.raises(ValidationError):
        Settings.model_validate({"server": {"bound": 1}})


# Accepted forms. What a file says in text, an environment variable may say too.


DURATIONS = [
    ("30", 30.0),
    ("1.5", 1.5),
    ("250ms", 0.25),
    ("1.5s", 1.5),
    ("5m", 300.0),
    ("2h", 7200.0),
    ("1d", 86_400.0),
    ("0.5 h", 1800.0),
    (" 7s ", 7.0),
    ("10000000", 1e7),
    ("0.001", 0.001),
]
TEXTS = [
    *(("upstream.connect_timeout", text, seconds) for text, seconds in DURATIONS),
    ("server.client_write_timeout", "9", 9.0),
    ("server.keep_alive_timeout", "1m", 60.0),
    ("upstream.first_byte_timeout", "1m", 60.0),
    ("upstream.idle_timeout", "1m", 60.0),
    ("upstream.keep_alive_expiry", "1m", 60.0),
    ("scheduler.queue_timeout", "1m", 60.0),
    ("server.shutdown_grace", "0", 0.0),
    ("server.shutdown_grace", "0s", 0.0),
    ("upstream.request_timeout", "off", None),
    ("upstream.request_timeout", "OFF", None),
    ("upstream.request_timeout", "2m", 120.0),
    ("server.max_body_size", "1", 1),
    ("server.max_body_size", "100B", 100),
    ("server.max_body_size", "512KiB", 524_288),
    ("server.max_body_size", "10MB", 10_000_000),
    ("server.max_body_size", "64 MiB", 67_108_864),
    ("server.max_body_size", "1gib", 2**30),
    ("server.max_body_size", "2kB", 2000),
    ("server.max_body_size", "1TiB", 2**40),
    ("server.backlog", "1", 1),
    ("server.max_websockets", "0", 0),
    ("server.websocket_idle_timeout", "2h", 7200.0),
    ("server.websocket_max_message_size", "32MiB", 33_554_432),
    ("scheduler.concurrency", "4", 4),
    ("scheduler.concurrency", "010", 10),
    ("scheduler.max_queue", "0", 0),
    ("scheduler.default_priority", "0", 0),
    ("scheduler.default_priority", "100", 100),
    ("scheduler.default_priority", "very_low", 10),
    ("scheduler.default_priority", "Low", 30),
    ("scheduler.default_priority", "normal", 50),
    ("scheduler.default_priority", "HIGH", 70),
    ("scheduler.default_priority", "Critical", 90),
    ("server.bind", "0.0.0.0:0", ("0.0.0.0:0",)),
    ("server.bind", "localhost:65535", ("localhost:65535",)),
    ("server.bind", "my-host_1.example.:80", ("my-host_1.example.:80",)),
    ("server.bind", "8:30", ("8:30",)),
    ("server.bind", "unix:/run/proxy.sock", ("unix:/run/proxy.sock",)),
    ("upstream.base_url", "http://localhost:8000/v1/", "http://localhost:8000/v1"),
    ("upstream.base_url", "http://[2001:db8::1]:8000//", "http://[2001:db8::1]:8000"),
    ("upstream.base_url", "HTTPS://Example.org", "HTTPS://Example.org"),
    ("upstream.base_url", "https://example.org/a@b/v1", "https://example.org/a@b/v1"),
    ("upstream.api_key", "sk-abc", SecretStr("sk-abc")),
    ("logging.level", "DEBUG", "debug"),
    ("logging.level", "Info", "info"),
    ("logging.level", "warning", "warning"),
    ("logging.level", "error", "error"),
    ("logging.format", "json", "json"),
    ("logging.format", "console", "console"),
    ("logging.file", "logs/proxy.log", Path("logs/proxy.log")),
]


@pytest.mark.parametrize(("key", "text", "value"), TEXTS)
def test_text_is_understood_in_file_environment_and_overrides(write: Write, key: str, text: str, value: object) -> None:
    section, _, name = key.partition(".")
    in_file = load(write(f"{section}:\n  {name}: {text}\n"), {})
    by_reference = load(write(f"{section}:\n  {name}: ${{X}}\n"), {"X": text})
    in_environment = load(None, {variable(key): text})
    overridden = load(None, {}, {key: text})
    for settings in (in_file, by_reference, in_environment, overridden):
        assert value_of(settings, key) == value
        assert type(value_of(settings, key)) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("server.bind", "[a:1, '[::1]:2', '[fe80::1%eth0]:0']", ("a:1", "[::1]:2", "[fe80::1%eth0]:0")),
        ("server.bind", "'[::]:80'", ("[::]:80",)),
        ("server.bind", "unix:/run/a,b", ("unix:/run/a,b",)),
        ("upstream.request_timeout", "null", None),
        ("upstream.request_timeout", "", None),
        ("upstream.api_key", "~", None),
        ("upstream.idle_timeout", "1.0e+3", 1000.0),
        ("upstream.idle_timeout", ".5", 0.5),
        ("upstream.idle_timeout", "!!str 5", 5.0),
        ("upstream.idle_timeout", "!!float 5.0", 5.0),
        ("logging.format", "null", None),
        ("logging.file", "null", None),
        ("logging.file", "'5'", Path("5")),
        ("logging.file", "2026-01-02", Path("2026-01-02")),
        ("scheduler.routes", "{}", {}),
        (
            "scheduler.routes",
            "{a/b: schedule, /c: pass, /v1/d/*/e: pass, '*': schedule, 7: pass, v1/x: pass}",
            {"a/b": "schedule", "c": "pass", "d/*/e": "pass", "*": "schedule", "7": "pass", "x": "pass"},
        ),
    ],
)
def test_yaml_forms(write: Write, key: str, text: str, value: object) -> None:
    section, _, name = key.partition(".")
    assert value_of(load(write(f"{section}:\n  {name}: {text}\n"), {}), key) == value


def test_aliases_work(write: Write) -> None:
    upstream = load(write("upstream:\n  idle_timeout: &t 5\n  first_byte_timeout: *t\n"), {}).upstream
    assert (upstream.idle_timeout, upstream.first_byte_timeout) == (5.0, 5.0)


def test_the_environment_separates_addresses_by_commas() -> None:
    assert load(None, {"TRIOPROXY_SERVER__BIND": "a:1, [::1]:2"}).server.bind == ("a:1", "[::1]:2")


@given(st.integers(1, 10**10), st.sampled_from([("ms", 1000), ("s", 1), ("", 1), ("m", 1 / 60), ("h", 1 / 3600)]))
def test_durations_round_trip(thousandths: int, unit: tuple[str, float]) -> None:
    suffix, per_second = unit
    text = f"{thousandths // 1000}.{thousandths % 1000:03}{suffix}"
    seconds = thousandths / 1000 / per_second
    if seconds > 1e7:
        assert "scheduler.queue_timeout" in only_refusal(overrides={"scheduler.queue_timeout": text})
    else:
        assert load(None, {}, {"scheduler.queue_timeout": text}).scheduler.queue_timeout == pytest.approx(seconds)


@given(st.floats(min_value=1e-9, max_value=1e7))
def test_a_number_of_seconds_stays_what_it_is(seconds: float) -> None:
    assert load(None, {}, {"scheduler.queue_timeout": seconds}).scheduler.queue_timeout == seconds
    described = describe(Settings.model_validate({"scheduler": {"queue_timeout": seconds}}))
    assert Settings.model_validate(described).scheduler.queue_timeout == seconds


@given(st.integers(1, 10**17), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "kB", "MB", "GB"]))
def test_sizes_round_trip(number: int, unit: str) -> None:
    factors = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
    size = load(None, {}, {"server.max_body_size": f"{number}{unit}"}).server.max_body_size
    assert size == number * factors[unit]
    assert load(None, {}, {"server.max_body_size": size}).server.max_body_size == size


# Refused values


NUMBERS = [
    "true",
    "yes",
    "no",
    "[1]",
    "{a: 1}",
    "null",
    "''",
    "0x10",
    "1_000",
    "8:30",
    "-1",
    ".nan",
    ".inf",
    "9" * 5000,
]
BAD = [
    *(("scheduler.concurrency", text, "a whole number from 1") for text in [*NUMBERS, "0", "3.0", "3.5", "4 slots"]),
    *(("server.max_body_size", text, "a size above 0") for text in [*NUMBERS, "0", "0MiB", "1.0", "1.5MiB", "10M"]),
    ("server.max_body_size", "5iB", "64MiB"),
    *(
        ("scheduler.queue_timeout", text, "a duration above 0")
        for text in [*NUMBERS, "0", "0ms", "10000001", "1e9", "1.0e+400", "5 minutes", "5M", "1h30m", "-5s", "off"]
    ),
    ("server.shutdown_grace", "-1", "a duration from 0"),
    ("server.shutdown_grace", "soon", "a duration from 0"),
    ("server.shutdown_grace", "false", "a duration from 0"),
    ("upstream.request_timeout", "0", "must be off or a duration above 0"),
    ("upstream.request_timeout", "false", "must be off or a duration above 0"),
    ("upstream.request_timeout", "never", "must be off or a duration above 0"),
    ("server.backlog", "0", "a whole number from 1 to 2147483647"),
    ("server.backlog", "2147483648", "a whole number from 1 to 2147483647"),
    ("scheduler.max_queue", "-1", "a whole number from 0"),
    *(
        ("scheduler.default_priority", text, "from 0 to 100 or one of very_low, low, normal, high, critical")
        for text in ["101", "-1", "50.0", "true", "urgent", "''", "null", "[50]"]
    ),
    *(
        ("server.bind", text, "HOST:PORT, [IPV6]:PORT or unix:/PATH")
        for text in [
            *("8080", "localhost", "''", "null", "true", "':80'", "'localhost:'", "h:65536", "h:-1", "h:http", "h:1:2"),
            *("'::1:80'", "'[localhost]:80'", "'[::g]:80'", "'[]:80'", "1.2.3.256:80", "1.2.3:80", "a b:80", "-a:80"),
            *("http://h:80", "'unix:'", "unix:run/x", r'"unix:/a\0b"', "'a:1,b:2'", "[]", "[5]", "[[a:1]]", "{a: 1}"),
        ]
    ),
    *(
        ("upstream.base_url", text, "https://HOST/v1")
        for text in [
            *("5", "true", "null", "''", "[a]", "localhost:8000", "example.org/v1", "ftp://h/v1"),
            *("http:///v1", "http://", "//h/v1", "http://a b/"),
            *("http://h:0/v1", "http://h:99999/v1", "http://h:x/v1", "'http://[::1/v1'", "'http://[x]/v1'"),
            *("http://h/v1?", "http://h/v1?a=b", "'http://h/v1#'", "'http://h#x'", "http://u:p@h/v1", "http://u@h/v1"),
            *("http://hö/v1", '"http://h/\\tv1"', "http://1.2.3.256/v1", "'http://h\\x/v1'"),
        ]
    ),
    ("upstream.api_key", "12345", "must be text"),
    ("upstream.api_key", "[a]", "must be text"),
    ("upstream.api_key", "true", "must be text"),
    ("upstream.api_key", "''", "must not be empty"),
    *(
        ("upstream.api_key", text, "without blanks")
        for text in ["a b", '"a\\n"', '"a\\tb"', "' a'", "kéy", '"a\\x7f"', '"a\\0"']
    ),
    *(
        ("logging.level", text, "debug, info, warning, error")
        for text in ["warn", "5", "true", "null", "''", "[info]", "' info'"]
    ),
    *(("logging.format", text, "json, console") for text in ["text", "JSON", "5", "false", "''", "[json]"]),
    *(
        ("logging.file", text, "the path of a file")
        for text in ["5", "true", "''", "[a]", "{a: b}", ".", "/", "logs/", '"a\\0b"', '"a\\nb"', r'"\ud800"']
    ),
    *(("scheduler.routes", text, "a mapping of path patterns") for text in ["5", "schedule", "[a]", "null", "true"]),
    *(
        ("scheduler.routes", f"{{'{pattern}': pass}}", complaint)
        for pattern, complaint in [
            *((empty, "is empty") for empty in ("", "/", "/v1/", "/v1", "v1/")),
            *((query, "query or a fragment") for query in ("a?b", "a?", "a#b")),
            *((dots, "dot segments") for dots in (".", "a/./b", "../a", "a/..", "a/%2e%2E/b", "%2E")),
            *((star, "* only as a whole segment") for star in ("a*", "**", "a/*b/c")),
            *((blank, "without blanks") for blank in ("a b", "é", " ")),
        ]
    ),
    *(
        ("scheduler.routes", f"{{a: {treatment}}}", "'a' must be set to schedule or pass")
        for treatment in ["queue", "null", "true", "5", "[pass]", "{b: {c: {d: e}}}", "''", "PASS"]
    ),
    ("scheduler.routes", "{a: pass, /v1/a: schedule}", "'/v1/a' is there twice"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "accepted"), BAD)
def test_impossible_values_in_a_file_are_refused(write: Write, key: str, text: str, accepted: str) -> None:
    section, _, name = key.partition(".")
    path = write(f"{section}:\n  {name}: {text}\n")
    line = only_refusal(path)
    assert line.startswith(f"{key}: ")
    assert accepted in line
    assert line.endswith(f" (file {path}, line 2)")
    assert len(line) < 600


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scheduler.concurrency", True),
        ("scheduler.concurrency", 3.0),
        ("scheduler.concurrency", 10**400),
        ("scheduler.concurrency", None),
        ("scheduler.default_priority", False),
        ("server.max_body_size", True),
        ("server.max_body_size", 1e3),
        ("scheduler.queue_timeout", True),
        ("scheduler.queue_timeout", float("nan")),
        ("scheduler.queue_timeout", float("inf")),
        ("scheduler.queue_timeout", 10**400),
        ("server.bind", ()),
        ("server.bind", [None]),
        ("logging.file", b"x"),
        ("upstream.base_url", object()),
    ],
)
def test_impossible_values_from_code_are_refused(key: str, value: object) -> None:
    line = only_refusal(overrides={key: value})
    assert line.startswith(f"{key}: must be ")
    assert line.endswith(" (the command line)")
    section, _, name = key.partition(".")
    with pytest.raises(ValidationError):
        Settings.model_validate({section: {name: value}})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("true", "not true ("),
        ("null", "not null ("),
        ("3.0", "not 3.0 ("),
        ("yes", "not 'yes' ("),
        ("[1]", "not [1] ("),
    ],
)
def test_the_offending_value_is_shown_as_it_stands_in_the_file(write: Write, text: str, shown: str) -> None:
    assert shown in only_refusal(write(f"scheduler: {{concurrency: {text}}}"))


def test_every_wrong_address_of_a_list_is_named_and_no_right_one(write: Write) -> None:
    line = only_refusal(write("server: {bind: ['right:1', 'wrong1', 'wrong2']}"))
    assert "not 'wrong1', 'wrong2' (" in line
    assert "right" not in line


# What is wrong with files


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a: b: c", "is not valid YAML: line 1, column 5: mapping values are not allowed here"),
        ("server:\n  bind: [a:1\nlogging:\n", "is not valid YAML: line 3, column"),
        ("server:\n\tbind: a:1", "is not valid YAML: line 2, column 1"),
        ("logging:\n  level: @info", "is not valid YAML: line 2, column 10"),
        ("server: {}\n---\nserver: {}\n", "is not valid YAML: line 2, column 1"),
        ("scheduler:\n  routes:\n    *: pass", "line 3, column 6: expected alphabetic"),
        ("scheduler: {routes: {*: pass}}", "found ':'; text that begins with * needs quotes"),
        ("upstream: {api_key: ${KEY}}", "between braces, text with ${NAME} needs quotes"),
        ("a: 1\nb: \x00", "is not valid YAML: line 2: has a character that is not allowed"),
        ('logging: {file: "\\UFFFFFFFF"}', "is not valid YAML: has an impossible escape"),
        ('logging: {file: "\\U00110000"}', "is not valid YAML: has an impossible escape"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "must be a mapping of the sections server, upstream, scheduler, keys, logging"),
        ("text", "must be a mapping of the sections"),
        ("5", "must be a mapping of the sections"),
        (b"\xff\xfea\x00", "is not UTF-8 text (at byte 1)"),
        ("server: {}\n# é".encode("latin-1"), "is not UTF-8 text (at byte 14)"),
    ],
)  # fmt: skip
def test_unusable_files(write: Write, content: str | bytes, complaint: str) -> None:
    path = write(content)
    line = only_refusal(path)
    assert line.startswith(f"{path}: ")
    assert complaint in line


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    assert only_refusal(tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert only_refusal(str(tmp_path)) == f"{tmp_path}: cannot be read: Is a directory"


def test_a_file_without_permission(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by file mode: the superuser may read everything.
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = write("")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert only_refusal(path) == f"{path}: cannot be read: Permission denied"


def test_impossible_file_names() -> None:
    assert only_refusal("a\0b") == r"a\x00b: cannot be read: embedded null byte"
    assert only_refusal(None, {"TRIOPROXY_CONFIG": ""}) == "(named by TRIOPROXY_CONFIG): the name of the file is empty"


def test_an_inner_section_must_be_a_mapping(write: Write) -> None:
    path = write("server:\n  tls: 5")
    assert only_refusal(path) == f"server.tls: must be a mapping of keys, not '5' (file {path}, line 2)"
    assert load(write("server:\n  tls:\n"), {}) == load(write("server: {tls: {cert: null}}"), {}) == Settings()


@pytest.mark.parametrize("section", ["server", "scheduler", "logging"])
def test_a_section_must_be_a_mapping(write: Write, section: str) -> None:
    path = write(f"# first\n{section}: 5")
    assert only_refusal(path) == f"{section}: must be a mapping of keys, not '5' (file {path}, line 2)"
    assert "must be a mapping of keys (file" in only_refusal(write(f"{section}: [5]"))


@pytest.mark.parametrize(
    ("content", "start", "end"),
    [
        ("server: {}\nlogging: {}\nserver: {}\n", "server: is given twice, first on line 1", "line 3)"),
        ("server:\n  backlog: 1\n  backlog: 1\n", "server.backlog: is given twice, first on line 2", "line 3)"),
        ("scheduler:\n  routes:\n    a: pass\n    'a': pass", "scheduler.routes.a: is given twice, first", "line 4)"),
        ("keys: 1\nserver: {x: {a: 1, a: 2}}\nkeys: 2", "keys: is given twice, first on line 1", "line 3)"),
    ],
)
def test_duplicate_keys_are_refused(write: Write, content: str, start: str, end: str) -> None:
    lines = refusal(write(content))
    assert [line for line in lines if line.startswith(start) and line.endswith(end)]


@pytest.mark.parametrize("content", ["? [a]\n: 1", "server:\n  ? {a: b}\n  : 1", "scheduler: {routes: {? [a] : pass}}"])
def test_keys_are_plain_text(write: Write, content: str) -> None:
    assert "a key must be plain text" in only_refusal(write(content))


@pytest.mark.parametrize(
    "tagged", ["!!int x", "!!python/name:os.system", "!env HOME", "!!timestamp x", "!!binary eA=="]
)
def test_tags_are_refused(write: Write, tagged: str) -> None:
    line = only_refusal(write(f"logging:\n  file: {tagged}"))
    assert line.startswith("logging.file: has a YAML tag that is not supported")


@pytest.mark.parametrize("content", ["server: &a {bind: *a}", "server: {bind: &a [*a]}", "logging: &a {file: {x: *a}}"])
def test_documents_that_contain_themselves_are_refused(write: Write, content: str) -> None:
    assert len(only_refusal(write(content))) < 400


@pytest.mark.parametrize(
    ("content", "key", "suggestion"),
    [
        ("scheduler: {concurency: 3}", "scheduler.concurency", "; did you mean scheduler.concurrency?"),
        ("shceduler: {concurrency: 3}", "shceduler", "; did you mean scheduler?"),
        ("concurrency: 3", "concurrency", "; did you mean scheduler.concurrency?"),
        ("upstream: {queue_timeout: 3}", "upstream.queue_timeout", "; did you mean scheduler.queue_timeout?"),
        ("server: {xyzzy: 3}", "server.xyzzy", ""),
        ("server: {tsl: {}}", "server.tsl", "; did you mean server.tls?"),
        ("server: {tls: {crt: a}}", "server.tls.crt", "; did you mean server.tls.cert?"),
        ("tls: {cert: a}", "tls", "; did you mean server.tls?"),
        ("keys: [{name: web, kei: k}]", "keys[0].kei", "; did you mean key?"),
        ("keys: [{name: web, key: k}, {name: x, key: l, color: blue}]", "keys[1].color", ""),
        ("server: {<<: {bind: a:1}}", "server.<<", ""),
        ("5: 6", "5", ""),
        ('"a\\nb": 1', r"a\nb", ""),
        ('"a\\nserver.bind: b": 1', r"a\nserver.bind: b", "; did you mean server.bind?"),
    ],
)
def test_unknown_keys_in_a_file_are_refused(write: Write, content: str, key: str, suggestion: str) -> None:
    path = write(content)
    assert only_refusal(path) == f"{key}: unknown key{suggestion} (file {path}, line 1)"


# References


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("http://${HOST}:${PORT}/v1", "http://box:8000/v1"),
        ("${SCHEME}://box", "http://box"),
        ("http://box/${EMPTY}v1", "http://box/v1"),
        ("http://box/$${HOST}", "http://box/${HOST}"),
        ("http://box/$HOST", "http://box/$HOST"),
        ("http://box/$$HOST", "http://box/$$HOST"),
        ("http://box/${NESTED}", "http://box/${HOST}"),
    ],
)
def test_references_are_replaced(write: Write, text: str, value: str) -> None:
    environ = {"HOST": "box", "PORT": "8000", "SCHEME": "http", "EMPTY": "", "NESTED": "${HOST}"}
    assert load(write(f"upstream:\n  base_url: {text}"), environ).upstream.base_url == value
    assert load(write(f"upstream:\n  base_url: '{text}'"), environ).upstream.base_url == value


def test_references_work_in_lists_and_mappings(write: Write) -> None:
    settings = load(
        write("server: {bind: ['${A}:1', 'b:2']}\nscheduler: {routes: {x: '${B}'}}"), {"A": "a", "B": "pass"}
    )
    assert settings.server.bind == ("a:1", "b:2")
    assert settings.scheduler.routes == {"x": "pass"}


def test_every_reference_that_is_not_set_is_an_error(write: Write) -> None:
    path = write(
        "server:\n  bind: ['${A}:1', '${B}:2']\nupstream: {api_key: 'x-${C}'}\nscheduler: {routes: {x: '${D}'}}\n"
    )
    text = "needs the environment variable"
    assert refusal(path) == [
        f"server.bind: {text} A, which is not set (file {path}, line 2)",
        f"server.bind: {text} B, which is not set (file {path}, line 2)",
        f"upstream.api_key: {text} C, which is not set (file {path}, line 3)",
        f"scheduler.routes.x: {text} D, which is not set (file {path}, line 4)",
    ]


def test_a_reference_to_an_empty_variable_is_empty(write: Write) -> None:
    assert "upstream.api_key: must not be empty" in only_refusal(write("upstream:\n  api_key: ${KEY}"), {"KEY": ""})


@pytest.mark.parametrize("text", ["${}", "${A", "${A B}", "${A:-b}", "${1}", "x${"])
def test_malformed_references_are_refused(write: Write, text: str) -> None:
    line = only_refusal(write(f"upstream:\n  api_key: '{text}'"), {"A": "a"})
    assert line.startswith("upstream.api_key: has ${ without a NAME and } behind it")


def test_references_are_for_files_only() -> None:
    environ = {"TRIOPROXY_UPSTREAM__API_KEY": "${HOME}", "HOME": "x"}
    key = load(None, environ, {"logging.file": "${HOME}"}).upstream.api_key
    assert key is not None
    assert key.get_secret_value() == "${HOME}"


# Environment and command line


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("TRIOPROXY_SCHEDULER_CONCURRENCY", "; did you mean TRIOPROXY_SCHEDULER__CONCURRENCY?"),
        ("TRIOPROXY_SCHEDULER__CONCURENCY", "; did you mean TRIOPROXY_SCHEDULER__CONCURRENCY?"),
        ("TRIOPROXY_scheduler__concurrency", "; did you mean TRIOPROXY_SCHEDULER__CONCURRENCY?"),
        ("TRIOPROXY_CONFIGS", "; did you mean TRIOPROXY_CONFIG?"),
        ("TRIOPROXY_SCHEDULER__ROUTES", "; scheduler.routes can only be set in the file"),
        ("TRIOPROXY_KEYS", "; keys can only be set in the file"),
        ("TRIOPROXY_SCHEDULER__MODEL_PRIORITIES", "; scheduler.model_priorities can only be set in the file"),
        ("TRIOPROXY_XYZZY", ""),
        ("TRIOPROXY_", ""),
        *(
            (name, "; if it comes from a Kubernetes Service of that name, set enableServiceLinks: false")
            for name in ("TRIOPROXY_PORT", "TRIOPROXY_SERVICE_HOST", "TRIOPROXY_PORT_8080_TCP_ADDR")
        ),
    ],
)
def test_unknown_variables_are_refused(name: str, hint: str) -> None:
    assert only_refusal(None, {name: SECRET}) == f"{name}: unknown environment variable{hint}"


def test_other_variables_do_not_matter() -> None:
    assert load(None, {"TRIOPROXY": "x", "trioproxy_server__bind": "x", "OPENAI_API_KEY": "x"}) == Settings()


def test_impossible_values_in_the_environment_name_the_variable() -> None:
    assert only_refusal(None, {"TRIOPROXY_SCHEDULER__MAX_QUEUE": "many"}) == (
        "scheduler.max_queue: must be a whole number from 0 to 2147483647, not 'many'"
        " (environment variable TRIOPROXY_SCHEDULER__MAX_QUEUE)"
    )


@pytest.mark.parametrize("value", ["", ",", "a:1,", "a:1,b"])
def test_impossible_addresses_in_the_environment(value: str) -> None:
    assert only_refusal(None, {"TRIOPROXY_SERVER__BIND": value}).startswith("server.bind: must be HOST:PORT")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_but_mappings_has_its_variable(key: str) -> None:
    line = only_refusal(None, {variable(key): ""})
    if key in ("scheduler.routes", "scheduler.model_priorities"):
        assert "unknown environment variable" in line
    else:
        assert line.startswith(f"{key}: must ")
        assert line.endswith(f"(environment variable {variable(key)})")


def test_unknown_overrides_are_refused() -> None:
    assert only_refusal(overrides={"server.bnd": 1}) == (
        "server.bnd: unknown key; did you mean server.bind? (the command line)"
    )
    assert "unknown key" in only_refusal(overrides={"server": {"bind": "a:1"}})


def test_overrides_take_lists_and_paths() -> None:
    settings = load(None, {}, {"server.bind": ["127.0.0.1:9000"], "logging.file": Path("x.log")})
    assert settings.server.bind == ("127.0.0.1:9000",)
    assert settings.logging.file == Path("x.log")


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(write: Write) -> None:
    path = write("scheduler: {concurrency: 1, max_queue: 1, queue_timeout: 1}\nserver: {backlog: 1}")
    environ = {"TRIOPROXY_SCHEDULER__CONCURRENCY": "2", "TRIOPROXY_SCHEDULER__MAX_QUEUE": "2"}
    settings = load(path, environ, {"scheduler.max_queue": 3, "server.backlog": 3})
    scheduler = settings.scheduler
    assert (scheduler.concurrency, scheduler.max_queue, scheduler.queue_timeout) == (2, 3, 1.0)
    assert settings.server.backlog == 3


def test_only_the_value_that_wins_is_judged(write: Write) -> None:
    path = write("scheduler: {concurrency: many}")
    assert load(path, {"TRIOPROXY_SCHEDULER__CONCURRENCY": "2"}).scheduler.concurrency == 2
    assert "the command line" in only_refusal(path, overrides={"scheduler.concurrency": "few"})


def test_the_file_may_be_named_by_the_environment(write: Write, tmp_path: Path) -> None:
    path = write("scheduler: {concurrency: 7}")
    assert load(None, {"TRIOPROXY_CONFIG": str(path)}).scheduler.concurrency == 7
    missing = str(tmp_path / "none")
    assert only_refusal(None, {"TRIOPROXY_CONFIG": missing}).startswith(
        f"{missing} (named by TRIOPROXY_CONFIG): cannot"
    )
    assert load(path, {"TRIOPROXY_CONFIG": missing}).scheduler.concurrency == 7


def test_all_problems_of_all_sources_come_at_once(write: Write) -> None:
    path = write("server: 5\nlogging: {level: loud, fiel: x}\nscheduler: {concurrency: 0, max_queue: -1}\nkeys: []\n")
    environ = {"TRIOPROXY_XYZZY": "1", "TRIOPROXY_UPSTREAM__BASE_URL": "nowhere"}
    subjects = {line.partition(":")[0] for line in refusal(path, environ, {"server.bind": "x", "a.b": 1})}
    assert subjects == {
        *("server", "logging.level", "logging.fiel", "scheduler.concurrency", "scheduler.max_queue", "keys"),
        *("TRIOPROXY_XYZZY", "upstream.base_url", "server.bind", "a.b"),
    }


def test_an_unusable_file_does_not_hide_the_environments_problems(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, {"TRIOPROXY_XYZZY": "1", "TRIOPROXY_LOGGING__LEVEL": "loud"})) == 3


# Certificates and keys


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two certificates and their keys, and some files that are neither."""
    folder = tmp_path_factory.mktemp("files")
    ca = trustme.CA()
    for name in ("a", "b"):
        issued = ca.issue_cert(f"{name}.test")
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "both.pem"))
    plain = load_pem_private_key((folder / "a.key").read_bytes(), None)
    secret = BestAvailableEncryption(b"passphrase")
    (folder / "locked.key").write_bytes(plain.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    (folder / "junk").write_text(SECRET)
    (folder / "empty").write_text("")
    return folder


PAIRS = [("server.tls.cert", "server.tls.key"), ("upstream.client_cert", "upstream.client_key")]


@pytest.mark.parametrize(("cert_key", "key_key"), PAIRS)
def test_a_certificate_and_its_key_are_accepted(files: Path, cert_key: str, key_key: str) -> None:
    for cert, key in (("a.pem", "a.key"), ("both.pem", "both.pem")):
        settings = load(None, {variable(cert_key): str(files / cert), variable(key_key): str(files / key)})
        assert (value_of(settings, cert_key), value_of(settings, key_key)) == (files / cert, files / key)


@pytest.mark.parametrize(("cert_key", "key_key"), PAIRS)
@pytest.mark.parametrize(
    ("cert", "key", "wrong", "complaint"),
    [
        ("nope", "a.key", "cert", "which cannot be read: No such file or directory"),
        (".", "a.key", "cert", "which cannot be read: Is a directory"),
        ("a.key", "a.key", "cert", "which has no usable certificate in PEM form"),
        ("empty", "a.key", "cert", "which has no usable certificate in PEM form"),
        ("a.pem", "nope", "key", "which cannot be read: No such file or directory"),
        ("a.pem", "junk", "key", "which has no usable private key in PEM form"),
        ("a.pem", "a.pem", "key", "which has no usable private key in PEM form"),
        ("a.pem", "locked.key", "key", "which is encrypted: it must be there without a passphrase"),
        ("a.pem", "b.key", "key", "which is not the key of the certificate in {a.pem}"),
    ],
)
def test_unusable_certificates_and_keys_are_refused(
    files: Path, write: Write, cert_key: str, key_key: str, cert: str, key: str, wrong: str, complaint: str
) -> None:
    config = write("")
    section, _, name = cert_key.rpartition(".")
    text = f"{{{name}: {files / cert}, {key_key.rpartition('.')[2]}: {files / key}}}"
    for part in reversed(section.split(".")):
        text = f"{{{part}: {text}}}"
    config.write_text(text)
    subject, path = (cert_key, files / cert) if wrong == "cert" else (key_key, files / key)
    line = only_refusal(config)
    complaint = complaint.replace("{a.pem}", str(files / "a.pem"))
    assert line == f"{subject}: must be a PEM file, not '{path}', {complaint} (file {config}, line 1)"
    assert SECRET not in line


@pytest.mark.parametrize(("cert_key", "key_key"), PAIRS)
def test_a_certificate_needs_its_key_and_the_other_way_round(files: Path, cert_key: str, key_key: str) -> None:
    for present, missing in ((cert_key, key_key), (key_key, cert_key)):
        line = only_refusal(None, {variable(present): str(files / "both.pem")})
        assert line == f"{missing}: is missing: {present} needs it (environment variable {variable(present)})"


def test_a_file_of_cas(files: Path) -> None:
    assert load(None, {}, {"upstream.ca_file": str(files / "a.pem")}).upstream.ca_file == files / "a.pem"
    line = only_refusal(None, {}, {"upstream.ca_file": str(files / "junk")})
    assert line.startswith(f"upstream.ca_file: must be a PEM file, not '{files / 'junk'}', which has no usable cert")
    assert line.endswith("(the command line)")


def test_a_certificate_that_openssl_does_not_take_is_refused_with_its_reason(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = ssl.SSLError()
        error.reason = "EE_KEY_TOO_SMALL"
        raise error

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", refuse)
    both = str(files / "both.pem")
    line = only_refusal(None, {}, {"server.tls.cert": both, "server.tls.key": both})
    assert f"which OpenSSL does not take together with {both}: ee key too small" in line


# Secrets


def test_secrets_do_not_show_in_settings(write: Write) -> None:
    settings = load(write("upstream:\n  api_key: ${KEY}"), {"KEY": SECRET})
    assert settings.upstream.api_key == SecretStr(SECRET)
    assert describe(settings)["upstream"] == {**DEFAULTS["upstream"], "api_key": "**********"}
    for text in (str(settings), repr(settings), settings.model_dump_json(), repr(describe(settings))):
        assert SECRET not in text


@pytest.mark.parametrize(
    "content",
    [
        f"upstream: {SECRET}",
        f"upstream: [{SECRET}]",
        f"upstream: {{api_key: {SECRET} x}}",
        f"upstream: {{api_key: [{SECRET}]}}",
        f"upstream: {{api_key: {{a: {SECRET}}}}}",
        f"upstream:\n  api_key: *{SECRET}",
        f"upstream:\n  api_key: !{SECRET} x",
        f"upstream:\n  api_key: !{SECRET}!x y",
        f"upstream:\n  api_key: {SECRET}: x",
        f'upstream:\n  api_key: "{SECRET}',
        f"upstream:\n  api_key: '{SECRET}${{'",
        f"upstream:\n  api_key: {SECRET}\n  api_key: {SECRET}",
        f"upstream:\n  apikey: {SECRET}",
        f"api_key: {SECRET}",
        f"upstream:\n  base_url: https://user:{SECRET}@host/v1",
        f"upstream:\n  base_url: user:{SECRET}@host/v1",
        f"upstream:\n  base_url: 'https://user:x/{SECRET}?@host/v1'",
        f"upstream:\n  base_url: https://host/v1?key={SECRET}",
        f"upstream:\n  base_url: ' https://user:{SECRET}@host/v1'",
        f"keys: [{{name: a, key: '{SECRET} '}}]",
        f"keys: [{{name: a, key: {SECRET}, models: []}}]",
        f"keys: [{{name: a, key: {SECRET}, key_sha256: {SECRET}}}]",
        f"keys: [{{name: a, key: {SECRET}}}, {{name: b, key: {SECRET}}}]",
        f"keys: [{SECRET}]",
        f"keys: {SECRET}",
        SECRET,
        "upstream:\n  api_key: '${KEY} '",
        "upstream:\n  api_key: '${KEY}'\n  api_key: x",
        "upstream: ${KEY}",
        "keys: ['${KEY}']",
    ],
)
def test_secrets_do_not_show_in_errors(write: Write, content: str) -> None:
    lines = refusal(write(content), {"KEY": SECRET})
    assert SECRET not in "\n".join(lines)


def test_secrets_from_the_environment_and_from_code_do_not_show() -> None:
    assert SECRET not in only_refusal(None, {"TRIOPROXY_UPSTREAM__API_KEY": f"{SECRET}\n"})
    assert SECRET not in only_refusal(None, {"TRIOPROXY_UPSTREAM__API_KEYS": SECRET})
    assert SECRET not in only_refusal(overrides={"upstream.api_key": SecretStr(f"{SECRET} ")})
    with pytest.raises(ValidationError) as raised:
        Settings.model_validate({"upstream": {"api_key": [SECRET]}, "keys": SECRET})
    assert SECRET not in str(raised.value)


def test_nothing_of_the_cause_travels_with_the_error(write: Write) -> None:
    with pytest.raises(ConfigError) as raised:
        load(write(f"upstream:\n  api_key: '{SECRET} '"), {})
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


# Client keys

HASH = "ab" * 32


def test_a_key_with_everything(write: Write) -> None:
    path = write(
        "keys:\n"
        "  - {name: web, key: '${WEB_KEY}', default_priority: high, max_priority: critical}\n"
        f"  - name: batch.2\n    key_sha256: '{HASH.upper()}'\n    max_priority: low\n    clamp: true\n"
        "    models: ['gpt-5*', o3]\n    max_concurrency: 2\n    max_queue: 0\n    expires: 2027-01-31\n"
    )
    web, batch = load(path, {"WEB_KEY": "s3cret"}).keys
    assert web.key is not None
    assert (web.name, web.key.get_secret_value(), web.default_priority, web.max_priority) == ("web", "s3cret", 70, 90)
    assert (web.clamp, web.models, web.max_concurrency, web.max_queue, web.expires) == (False, None, None, None, None)
    assert web.sha256 == hashlib.sha256(b"s3cret").hexdigest()
    assert (batch.key, batch.sha256, batch.max_priority, batch.clamp) == (None, HASH, 30, True)
    assert (batch.models, batch.max_concurrency, batch.max_queue) == (("gpt-5*", "o3"), 2, 0)
    assert batch.expires == datetime(2027, 2, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-01-31", datetime(2027, 2, 1, tzinfo=UTC)),
        ("20270131", datetime(2027, 2, 1, tzinfo=UTC)),
        ("2027-01-31T12:30", datetime(2027, 1, 31, 12, 30, tzinfo=UTC)),
        ("2027-01-31 12:30:15+02:00", datetime(2027, 1, 31, 10, 30, 15, tzinfo=UTC)),
        ("2027-01-31T12:30Z", datetime(2027, 1, 31, 12, 30, tzinfo=UTC)),
    ],
)
def test_expiry_is_a_date_to_its_end_or_a_moment(write: Write, text: str, moment: datetime) -> None:
    [key] = load(write(f"keys: [{{name: a, key: b, expires: '{text}'}}]"), {}).keys
    assert key.expires == moment


@pytest.mark.parametrize(
    ("entry", "subject", "said"),
    [
        ("{name: a}", "keys[0]", "has neither key nor key_sha256"),
        (f"{{name: a, key: b, key_sha256: {HASH}}}", "keys[0]", "has both"),
        ("{key: b}", "keys[0].name", "is missing"),
        ("{name: a b, key: b}", "keys[0].name", "1 to 64 letters"),
        ("{name: '(other)', key: b}", "keys[0].name", "1 to 64 letters"),
        (f"{{name: {'x' * 65}, key: b}}", "keys[0].name", "1 to 64 letters"),
        ("{name: a, key: 5}", "keys[0].key", "must be text"),
        ("{name: a, key: ''}", "keys[0].key", "must not be empty"),
        ("{name: a, key: 'b c'}", "keys[0].key", "without blanks"),
        ("{name: a, key_sha256: abc}", "keys[0].key_sha256", "64 hexadecimal digits"),
        (f"{{name: a, key_sha256: {'x' * 64}}}", "keys[0].key_sha256", "64 hexadecimal digits"),
        ("{name: a, key: b, max_priority: urgent}", "keys[0].max_priority", "0 to 100"),
        ("{name: a, key: b, default_priority: 101}", "keys[0].default_priority", "0 to 100"),
        ("{name: a, key: b, default_priority: high, max_priority: low}", "keys[0]", "(70) above its max_priority (30)"),
        ("{name: a, key: b, clamp: 1}", "keys[0].clamp", "true or false"),
        ("{name: a, key: b, clamp: maybe}", "keys[0].clamp", "true or false"),
        ("{name: a, key: b, models: []}", "keys[0].models", "leave it out"),
        ("{name: a, key: b, models: [5]}", "keys[0].models", "not [5]"),
        ("{name: a, key: b, models: ['a b']}", "keys[0].models", "not ['a b']"),
        ("{name: a, key: b, max_concurrency: 0}", "keys[0].max_concurrency", "from 1 on"),
        ("{name: a, key: b, max_queue: -1}", "keys[0].max_queue", "from 0 on"),
        ("{name: a, key: b, expires: soon}", "keys[0].expires", "a date"),
        ("{name: a, key: b, expires: 2027}", "keys[0].expires", "a date"),
        ("{name: a, key: b, expires: 9999-12-31}", "keys[0].expires", "a date"),
        ("{name: a, key: b}, {name: a, key: c}", "keys[1]", "has the name of keys[0]: a"),
        ("{name: a, key: b}, {name: c, key: b}", "keys[1]", "is the same key as keys[0]"),
        ("web", "keys[0]", "must be a mapping"),
    ],
)
def test_unusable_keys_are_refused(write: Write, entry: str, subject: str, said: str) -> None:
    path = write(f"keys: [{entry}]")
    line = only_refusal(path)
    assert line.startswith(f"{subject}: ")
    assert said in line
    assert line.endswith(f"(file {path}, line 1)")


@pytest.mark.parametrize("content", ["keys:\n", "keys: []", "keys: {}", "keys: ''"])
def test_an_empty_list_of_keys_does_not_open_the_proxy_to_all(write: Write, content: str) -> None:
    assert "is empty: leave it out to let anyone" in only_refusal(write(content))


@pytest.mark.parametrize("content", ["keys: web", "keys: {name: a, key: b}", "keys: 5"])
def test_keys_are_a_list(write: Write, content: str) -> None:
    assert only_refusal(write(content)).startswith("keys: must be a list")


@pytest.mark.parametrize(
    ("priorities", "said"),
    [
        ("5", "must be a mapping"),
        ("[a]", "must be a mapping"),
        ("{'gpt-*': urgent}", "'gpt-*' must be a whole number"),
        ("{'a b': 5}", "'a b' is not text"),
        ("{'': 5}", "'' is not text"),
    ],
)
def test_unusable_priorities_of_models_are_refused(write: Write, priorities: str, said: str) -> None:
    assert said in only_refusal(write(f"scheduler: {{model_priorities: {priorities}}}"))


def test_priorities_of_models_keep_their_order(write: Write) -> None:
    settings = load(write("scheduler: {model_priorities: {b*: high, '*': 7, a: low}}"), {})
    assert list(settings.scheduler.model_priorities.items()) == [("b*", 70), ("*", 7), ("a", 30)]


# Whatever is given


def outcome(path: Path | None, overrides: Mapping[str, object] | None = None) -> list[str]:
    """The lines of the error, or none for settings that can be printed."""
    try:
        settings = load(path, {}, overrides)
    except ConfigError as error:
        return str(error).split("\n")
    json.dumps(describe(settings), ensure_ascii=False).encode()
    return []


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text("server:bindupstaloging{}[]&*!|>%@`'\"#?-,$ \n\t\\xU0159.~<é\0\u2028", max_size=60).map(str.encode),
    )
)
def test_any_file_gives_settings_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    assert all(line.isprintable() for line in outcome(path))


@given(
    st.sampled_from(KEYS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)
def test_any_value_gives_settings_or_a_config_error(key: str, value: object) -> None:
    for line in outcome(None, {key: value}):
        assert line.isprintable()
        assert line.startswith(f"{key}: ") or f"is missing: {key} needs it" in line


def test_a_real_environment_is_accepted_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TRIOPROXY_")]:
        monkeypatch.delenv(name)
    assert load() == Settings()
