"""Which requests need a slot: every operation of OpenAI's, what self-hosted servers add, and the user's own routes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioproxy.routes import METHODS, RouteTable, Treatment

ROWS = [line.split("\t") for line in (Path(__file__).parent / "data" / "endpoints.tsv").read_text().splitlines()[1:]]
"""Class, method, path, flags of every operation of OpenAI's."""

SCHEDULED_CLASSES = {"queue", "queue-light"}
SELF_HOSTED = ["rerank", "score", "pooling", "classify", "messages"]
UNSCHEDULABLE = ["GET", "HEAD", "DELETE", "OPTIONS"]

BUILT_IN = RouteTable({})


def is_scheduled(path: str, method: str = "POST", routes: dict[str, Treatment] | None = None) -> bool:
    table = BUILT_IN if routes is None else RouteTable(routes)
    return table.is_scheduled(method, path.encode())


def rest_of(path: str) -> str:
    """The path of an operation, without the query and with something for each parameter."""
    return path.partition("?")[0].replace("{}", "obj-1.x_2")


SCHEDULED_PATHS = sorted({rest_of(path) for kind, _, path, _ in ROWS if kind in SCHEDULED_CLASSES})


def test_the_table_of_operations_is_whole() -> None:
    assert len(ROWS) == 389 + 6
    assert {kind for kind, *_ in ROWS} == {
        *("pass", "pass-admin", "queue", "queue-light", "job-start", "bypass-cancel", "ws-session")
    }


@pytest.mark.parametrize("kind", sorted({row[0] for row in ROWS}))
def test_every_operation_is_treated_as_its_class_says(kind: str) -> None:
    operations = [("GET" if method == "WS" else method, path) for found, method, path, _ in ROWS if found == kind]
    treated_otherwise = [
        (method, path)
        for method, path in operations
        if is_scheduled(rest_of(path), method) != (kind in SCHEDULED_CLASSES)
    ]
    assert treated_otherwise == []


@pytest.mark.parametrize("path", SELF_HOSTED)
def test_what_self_hosted_servers_add_is_scheduled(path: str) -> None:
    assert is_scheduled(f"/{path}")


@pytest.mark.parametrize(
    "path", ["/", "", "/unknown", "/models/m/generate", "/chat", "/chat/completions/x", "/v1/completions"]
)
def test_unknown_paths_are_passed_through(path: str) -> None:
    assert not is_scheduled(path)


@pytest.mark.parametrize("method", [*UNSCHEDULABLE, "PUT", "PATCH", "QUERY", ""])
def test_by_default_only_post_is_scheduled(method: str) -> None:
    paths = [*SCHEDULED_PATHS, *(f"/{path}" for path in SELF_HOSTED)]
    assert [path for path in paths if is_scheduled(path, method)] == []


def test_a_method_in_lower_case_is_scheduled_too() -> None:
    """It goes on as it is, and many servers take it for the one in capitals."""
    assert is_scheduled(SCHEDULED_PATHS[0], "post")


@pytest.mark.parametrize("method", UNSCHEDULABLE)
def test_what_only_asks_or_takes_away_is_never_scheduled(method: str) -> None:
    wish: dict[str, Treatment] = {
        "*": "schedule",
        "*/*": "schedule",
        "models": "schedule",
        "chat/completions": "schedule",
    }
    for path in ("/models", "/chat/completions", "/responses/resp_1"):
        assert not is_scheduled(path, method, wish)
    assert method not in METHODS


@pytest.mark.parametrize(
    "path",
    [
        *("/chat/completions/", "//chat//completions", "/chat/completions//", "chat/completions"),
        *("/%63hat/completions", "/chat/%63%6F%6dpletions", "/chat%2Fcompletions", "/chat%2fcompletions/"),
        *("/Chat/Completions", "/chat%5Ccompletions", "/chat\\completions", "/RESPONSES"),
        *("/threads/thr%20ead/runs", "/threads/%C3%A4/runs/", "/threads/%ff/runs", "/vector_stores/a%3fb/search"),
    ],
)
def test_odd_spellings_do_not_get_round_the_queue(path: str) -> None:
    assert is_scheduled(path)


@pytest.mark.parametrize(
    "path",
    ["/chat/completionsx", "/xchat/completions", "/chat%252Fcompletions", "/threads//runs/x"],
)
def test_what_is_another_path_is_passed_through(path: str) -> None:
    assert not is_scheduled(path)


@given(st.binary(max_size=40))
def test_no_path_makes_it_stumble(path: bytes) -> None:
    assert BUILT_IN.is_scheduled("POST", b"/" + path) in (True, False)
    assert BUILT_IN.is_scheduled("GET", b"/" + path) is False


@given(st.sampled_from(SCHEDULED_PATHS), st.data())
def test_percent_encoding_changes_nothing(path: str, data: st.DataObject) -> None:
    spelled = "".join(f"%{ord(letter):02x}" if data.draw(st.booleans()) else letter for letter in path)
    assert is_scheduled(spelled)


# ---------------------------------------------------------------------------------------------------------------------
# The user's own routes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_route_of_ones_own_is_added() -> None:
    routes: dict[str, Treatment] = {"models/*/generate": "schedule", "infer": "schedule"}
    assert is_scheduled("/models/m/generate", routes=routes)
    assert is_scheduled("/infer", "PUT", routes)
    assert not is_scheduled("/models/generate", routes=routes)
    assert not is_scheduled("/models/a/b/generate", routes=routes)
    assert not is_scheduled("/models//generate", routes=routes)
    assert not is_scheduled("/models/m/generate/x", routes=routes)
    assert is_scheduled("/chat/completions", routes=routes)


def test_a_star_is_just_one_whole_segment() -> None:
    routes: dict[str, Treatment] = {"*": "schedule", "a/*": "schedule"}
    assert is_scheduled("/anything", routes=routes)
    assert is_scheduled("/a/b.c-d", routes=routes)
    assert not is_scheduled("/", routes=routes)
    assert not is_scheduled("/a/b/c", routes=routes)
    assert not is_scheduled("/x/y", routes=routes)


@pytest.mark.parametrize(
    ("routes", "path"),
    [
        ({"embeddings": "pass"}, "/embeddings"),
        ({"chat/completions": "pass"}, "/chat/completions/"),
        ({"threads/*/runs": "pass"}, "/threads/t/runs"),
        ({"threads/t/runs": "pass"}, "/threads/t/runs"),
        ({"*/*/runs": "pass"}, "/threads/t/runs"),
        ({"threads/t/*": "pass"}, "/threads/t/runs"),
        ({"images/*": "pass"}, "/images/edits"),
        ({"*": "pass"}, "/moderations"),
        ({"*/completions": "pass"}, "/chat/completions"),
    ],
)
def test_a_route_of_ones_own_goes_before_the_built_in_ones(routes: dict[str, Treatment], path: str) -> None:
    assert is_scheduled(path)
    assert not is_scheduled(path, routes=routes)


def test_an_exact_route_of_ones_own_goes_before_a_pattern_of_ones_own() -> None:
    exact: dict[str, Treatment] = {"images/edits": "schedule"}
    pattern: dict[str, Treatment] = {"images/*": "pass"}
    for routes in (exact | pattern, pattern | exact):
        assert is_scheduled("/images/edits", routes=routes)


def test_what_is_passed_can_be_scheduled_again_beside_it() -> None:
    routes: dict[str, Treatment] = {"responses/*/cancel": "pass", "files": "schedule"}
    assert not is_scheduled("/responses/r/cancel", routes=routes)
    assert is_scheduled("/files", routes=routes)
    assert not is_scheduled("/uploads", routes=routes)


@pytest.mark.parametrize("path", ["/my%20model/run", "/my%20model/run/", "/%6dy%20model/run"])
def test_a_route_is_written_as_it_stands_in_a_request(path: str) -> None:
    assert is_scheduled(path, routes={"my%20model/run": "schedule"})


def test_there_are_two_treatments() -> None:
    assert get_args(Treatment) == ("schedule", "pass")
