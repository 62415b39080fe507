"""The directions between the rooms of the house, as the design page `ARCHITECTURE.md` draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trioproxy

HOUSE = Path(trioproxy.__file__).parent
NAME = "trioproxy"

EVERYTHING_BUT = {
    "app": {"asgi", "cli", "demo", "server", "simulate", "__main__"},
    "asgi": {"cli", "demo", "server", "simulate", "__main__"},
    "demo": {"asgi", "cli", "__main__"},
    "simulate": {"asgi", "cli", "__main__"},
}
"""Rooms that join others, and what they have no business with."""

ROOMS: dict[str, set[str]] = {
    # What the page does not name: small tables and readers that know nothing of the house.
    "priority": set(),
    "body": set(),
    "routes": set(),
    "certificates": set(),
    "flag": set(),
    # The page's table.
    "config": {"certificates"},  # whether the files that it names can be used is said before anything starts
    "errors": set(),
    "events": {"errors", "priority"},  # an event tells how a request ended, and a priority has a level
    "keys": {"config", "errors", "request"},
    "request": {"config", "errors", "body", "priority"},
    "scheduler.queue": {"events", "priority"},  # a part of core
    "scheduler.limits": {"events", "errors"},
    "scheduler.core": {"events", "errors", "priority", "scheduler.limits", "scheduler.queue"},
    "scheduler.runtime": {"scheduler.core", "scheduler.limits", "scheduler.queue", "events", "errors", "priority"},
    "scheduler": {"scheduler.core", "scheduler.limits", "scheduler.queue", "scheduler.runtime"},
    # What upstream's calls are made of, none of which knows of the house.
    "http1": set(),
    "sockets": set(),
    "network": {"sockets"},
    "upload": set(),
    "http1_client": {"http1", "network", "upload"},
    "http1_transport": {"http1", "http1_client", "upload"},
    "httpcore_client": {"http1", "http1_client", "network", "upload"},
    "upstream": {
        "config",
        "errors",
        "events",
        "http1",
        "http1_client",
        "httpcore_client",
        "network",
        "upload",
    },
    "relay": {"request", "scheduler", "upload", "upstream", "errors", "events"},
    "connection": {"relay", "request", "errors", "flag", "mailbox"},
    "websocket_upstream": {"upstream", "errors"},
    "websocket": {"request", "scheduler", "upload", "upstream", "websocket_upstream", "errors", "events"},
    "websocket_connection": {"connection", "websocket", "websocket_upstream", "request", "errors"},
    "mailbox": set(),
    "http1_server": {"http1"},
    # What the server makes of Hypercorn's.
    "protocols.parser": {"errors"},
    "protocols.http1": {"errors", "http1_server", "protocols.parser", "request"},
    "protocols.http2": {"protocols.parser", "request"},
    "protocols.http_server": {"mailbox", "protocols.http1", "protocols.http2", "protocols.parser"},
    "protocols": {"protocols.http_server", "protocols.parser"},
    "reload": {"config", "server"},
    "streams": {"connection", "flag", "sockets"},
    "server": {"config", "app", "connection", "errors", "protocols", "sockets", "streams"},
    "observe": {"events", "errors", "priority"},
    "admin": {"scheduler", "observe", "upstream"},  # readiness asks whether the upstream is known to be out
    "cli": {"config", "server", "demo", "simulate", "app", "observe.logs", "keys", "reload"},
    "__main__": {"cli"},
}
"""What a room may import from the house, but for those of `EVERYTHING_BUT`. A room holds the modules below its name."""


def module_name(path: Path) -> str:
    """A module's name within the house; empty for the house itself."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


PATHS = {module_name(path): path for path in sorted(HOUSE.rglob("*.py"))}


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that a module imports, wherever in it: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def as_module(dotted: str) -> str:
    """The module of the house that a dotted name is, or is in."""
    name = dotted.removeprefix(NAME).lstrip(".")
    while name not in PATHS:
        name = name.rpartition(".")[0]
    return name


HOUSE_IMPORTS = {
    name: {as_module(dotted) for dotted in imported_names(path) if dotted.split(".")[0] == NAME} - {""}
    for name, path in PATHS.items()
}
FOREIGN_IMPORTS = {
    name: {dotted.split(".")[0] for dotted in imported_names(path)} - {NAME} for name, path in PATHS.items()
}


def is_in(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def room_of(module: str) -> str:
    """The room that a module is in: the longest name that has a rule."""
    rooms = [room for room in (*ROOMS, *EVERYTHING_BUT) if is_in(module, {room})]
    assert rooms, f"{module} is in no room: say in {Path(__file__).name} what it may import"
    return max(rooms, key=len)


def reached_from(module: str) -> set[str]:
    """A module and all that it imports, directly or not."""
    found: set[str] = set()
    todo = {module}
    while todo:
        found |= todo
        todo = set().union(*(HOUSE_IMPORTS[name] for name in todo)) - found
    return found


def importers_of(room: str) -> set[str]:
    """The modules outside a room that import from it."""
    return {
        name
        for name, imported in HOUSE_IMPORTS.items()
        if not is_in(name, {room}) and any(is_in(module, {room}) for module in imported)
    }


def test_the_imports_are_seen() -> None:
    assert {"", "relay", "scheduler", "scheduler.core", "observe.logs", "upstream"} <= set(PATHS)
    assert {"request", "scheduler", "upstream"} <= HOUSE_IMPORTS["relay"]
    assert "scheduler.core" in HOUSE_IMPORTS["scheduler.runtime"]
    assert "trio" in FOREIGN_IMPORTS["scheduler.runtime"]


@pytest.mark.parametrize("module", sorted(set(PATHS) - {""}))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = room_of(module)
    if room in EVERYTHING_BUT:
        strays = {imported for imported in HOUSE_IMPORTS[module] if is_in(imported, EVERYTHING_BUT[room])}
    else:
        strays = {imported for imported in HOUSE_IMPORTS[module] if not is_in(imported, ROOMS[room] | {room})}
    assert strays == set()


def test_the_house_itself_imports_nothing_of_it() -> None:
    assert HOUSE_IMPORTS[""] == set()


def test_there_is_no_import_cycle() -> None:
    TopologicalSorter(HOUSE_IMPORTS).prepare()


def test_only_those_who_run_it_import_the_application() -> None:
    assert not {name for name in importers_of("app") if not is_in(name, {"asgi", "server", "cli", "demo"})}


def test_only_those_who_join_it_import_what_observes() -> None:
    importers = {name for name in importers_of("observe") if not is_in(name, {"app", "admin", "simulate", "demo"})}
    # The commands open the log before there is an application, so that what goes wrong until then is a line in it too.
    assert importers <= {"cli", "asgi"}
    for name in importers:
        assert {module for module in HOUSE_IMPORTS[name] if is_in(module, {"observe"})} == {"observe.logs"}


def test_nothing_depends_on_the_demonstration() -> None:
    assert importers_of("demo") | importers_of("simulate") <= {"cli", "demo", "simulate"}


@pytest.mark.parametrize("module", ["scheduler.core", "scheduler.limits", "scheduler.queue"])
def test_the_scheduler_decides_without_trio_http_and_log(module: str) -> None:
    for reached in reached_from(module):
        assert not FOREIGN_IMPORTS[reached] & {"trio", "httpx", "structlog"}, reached


@pytest.mark.parametrize(
    "module",
    [
        *("certificates", "errors", "events", "priority", "body", "routes", "request", "http1"),
        *("demo.scenarios", "demo.replay", "demo.watch", "demo.lines", "demo.page", "demo.summary"),
    ],
)
def test_what_only_reads_and_tells_is_pure(module: str) -> None:
    assert not FOREIGN_IMPORTS[module] & {"trio", "httpx", "structlog", "quart", "quart_trio", "hypercorn"}


def test_only_the_upstreams_rooms_know_httpx() -> None:
    knowing = {name for name, imported in FOREIGN_IMPORTS.items() if imported & {"httpx", "httpcore"}}
    # The demonstration's traffic is a client of the proxy, as any user's program is, and no part of its way upstream.
    rooms = {"http1_client", "http1_transport", "httpcore_client", "network", "upstream"}
    assert {room_of(name) for name in knowing} - {"demo"} == rooms
