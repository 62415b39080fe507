"""Writes the pages of `docs/reference/` that can be read from the code, so that they cannot drift.

    python docs/make_reference.py            writes them
    python docs/make_reference.py --check    says which are out of date (exit status 1)

What the code does not say, what an error means to the one who gets it, for example, is in `reference_words.py`, and a
page is not written while a table there lacks an entry. `tests/test_docs.py` fails when a page is not what this makes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Union, cast, get_args, get_origin

import click
import reference_words as words
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from reference_words import LOG_EVENTS, LOG_KEYS, MEANINGS

from trioproxy import config, errors, events, routes
from trioproxy.app import create_app
from trioproxy.cli import main
from trioproxy.config import ConfigError, Settings
from trioproxy.errors import Ending, Retry
from trioproxy.observe import logs
from trioproxy.priority import LEVELS

FOLDER: Final = Path(__file__).parent / "reference"
NOTE: Final = "<!-- Written by docs/make_reference.py from the code: change it there, then run `nox -s docs`. -->"

EXAMPLE: Final[dict[str, object]] = {"keys": [{"name": "web", "key": "sk-trioproxy-example"}]}
"""Sections, where the settings have them, without which some metrics would not be there."""


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heads = tuple(heads)
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def page(title: str, *parts: str) -> str:
    """A whole page."""
    return "\n\n".join([NOTE, f"# {title}", *(part.strip() for part in parts)]) + "\n"


def code(text: object) -> str:
    """As code, in a cell or a sentence."""
    return f"`{text}`"


def in_markdown(docstring: str | None) -> str:
    """A docstring on one line."""
    return re.sub(r"\s+", " ", docstring or "").strip().replace("``", "`")


# Settings


class Setting(NamedTuple):
    """One key of the configuration file."""

    key: str
    field: FieldInfo


def model_in(annotation: object) -> type[BaseModel] | None:
    """The model that a field holds several of (`tuple[Model, ...]`), if it does."""
    for inner in get_args(annotation):
        if inspect.isclass(inner) and issubclass(inner, BaseModel):
            return inner
        if (found := model_in(inner)) is not None:
            return found
    return None


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every key below a model, in its order; `keys[].name` is a key of each mapping in a list."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            yield from settings_of(annotation, f"{prefix}{name}.")
        elif (several := model_in(annotation)) is not None:
            yield from settings_of(several, f"{prefix}{name}[].")
        else:
            yield Setting(prefix + name, field)


def accepted(field: FieldInfo) -> str:
    """What a setting takes, in the words of its own complaint about something impossible."""
    annotation = field.annotation
    whole = Annotated[(annotation, *field.metadata)] if field.metadata else annotation
    try:
        TypeAdapter[object](cast(type[object], whole)).validate_python(Impossible())
    except ValidationError as invalid:
        complaint = invalid.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        if found := re.match(r"must be (.*?)(?:, not <impossible>|; what was given|$)", complaint):
            # How durations and sizes are written stands above all tables.
            return re.sub(r" \((?:seconds|whole bytes), or like [^)]*\)", "", found[1])
    return by_type(annotation)


class Impossible:
    """Nothing that any setting could be."""

    def __repr__(self) -> str:
        return "<impossible>"


def by_type(annotation: object) -> str:
    """What a type takes, where the parser does not say it."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(by_type(inner) for inner in get_args(annotation) if inner is not types.NoneType)
    if origin in (tuple, list):
        return f"a list: {by_type(get_args(annotation)[0])}"
    return BY_TYPE.get(annotation, str(getattr(annotation, "__name__", annotation)))


BY_TYPE: Final[dict[object, str]] = {bool: "true, false", str: "text", int: "a whole number", float: "a number"}


def default(field: FieldInfo) -> str:
    """The value that a setting has when nobody sets it."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}, []):
        return "–"
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, tuple | list):
        return ", ".join(code(item) for item in value)
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return code(f"{value // 2**20}MiB")
    return code(f"{value:g}" if isinstance(value, float) else value)


def variable(key: str) -> str:
    """The environment variable that sets a key, if one does."""
    name = f"TRIOPROXY_{key.upper().replace('.', '__')}"
    try:
        config.load(None, {name: "\0"})
    except ConfigError as refused:
        if f"{name}: unknown environment variable" in str(refused):
            return "only in the file"
    return code(name)


def whole_file(model: type[BaseModel], indent: str = "") -> Iterator[str]:
    """The lines of a configuration file with every default in it; what has none is a comment."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
            yield f"{indent}{name}:"
            yield from whole_file(annotation, f"{indent}  ")
        elif (value := default(field)) == "–":
            yield f"{indent}# {name}:"
        else:
            yield f"{indent}{name}: {value.replace('`', '')}"


def settings_page() -> str:
    """`settings.md`."""
    parts = []
    for section, field in Settings.model_fields.items():
        annotation = field.annotation
        several = model_in(annotation)
        model = several or annotation
        assert inspect.isclass(model)
        assert issubclass(model, BaseModel)
        prefix = f"{section}[]." if several else f"{section}."
        purpose = in_markdown(inspect.getdoc(model)).removeprefix(f"`{section}`: ")
        parts += [f"## {section}", purpose[:1].upper() + purpose[1:]]
        parts.append(
            table(
                ("key, environment variable", "default", "accepted", "what it is"),
                (
                    (
                        f"{code(setting.key)}<br>{variable(setting.key)}",
                        default(setting.field),
                        accepted(setting.field),
                        in_markdown(setting.field.description).replace("None: ", "not set: "),
                    )
                    for setting in settings_of(model, prefix)
                ),
            )
        )
    lines = "\n".join(whole_file(Settings))
    parts += ["## A whole file", "With the defaults; what begins with `#` has none.", f"```yaml\n{lines}\n```"]
    return page("Settings", words.SETTINGS_INTRODUCTION, *parts)


# Metrics


def families() -> list[Metric]:
    """What a proxy exposes that has just been made."""
    sections = {name: value for name, value in EXAMPLE.items() if name in Settings.model_fields}
    app = create_app(Settings.model_validate(sections))
    return sorted(app.proxy.metrics.registry.collect(), key=lambda family: family.name)


def series_name(family: Metric) -> str:
    """The name by which it is queried."""
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def labels(family: Metric) -> dict[str, list[str]]:
    """The values of each label, those of histograms' own `le` left out."""
    found: dict[str, dict[str, None]] = {}
    for sample in family.samples:
        for name, value in sample.labels.items():
            if name != "le":
                found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items()}


def buckets(family: Metric) -> str:
    """The upper bounds of a histogram's buckets."""
    bounds = dict.fromkeys(sample.labels["le"] for sample in family.samples if "le" in sample.labels)
    return ", ".join(f"{float(bound):g}" for bound in bounds if bound != "+Inf")


def metrics_page() -> str:
    """`metrics.md`."""
    own = [family for family in families() if family.name.startswith("openai_proxy_")]
    rows = [
        (
            code(series_name(family)),
            family.type,
            ", ".join(map(code, labels(family))),
            in_markdown(family.documentation),
        )
        for family in own
    ]
    values = [
        (code(series_name(family)), code(label), ", ".join(map(code, found)))
        for family in own
        if family.type != "info"
        for label, found in labels(family).items()
        if label not in {"pool", "priority_level", "evicted_priority", "key"}
    ]
    bounds = [(code(family.name), buckets(family)) for family in own if family.type == "histogram"]
    return page(
        "Metrics",
        words.METRICS_INTRODUCTION,
        "## Series",
        table(("name", "type", "labels", "what it says"), rows),
        "## Values of the labels",
        f"`pool` is {code('default')}. `priority_level` and `evicted_priority` are {', '.join(map(code, LEVELS))}.",
        table(("name", "label", "values"), values),
        "What each `status` and `outcome` means is said with the [errors](errors.md).",
        "## Buckets",
        "In seconds; a histogram `NAME` has the series `NAME_bucket`, `NAME_sum` and `NAME_count`.",
        table(("name", "upper bounds"), bounds),
        "## The process",
        "`process_*` (CPU, memory, descriptors, start) and `python_info` are prometheus-client's own.",
    )


# Logs


FROM_EVENTS: Final = (
    events.RequestFacts,
    events.ScheduledRequest,
    events.Progress,
    events.Started,
    events.Ended,
    events.WebSocketProgress,
)


def attribute_docs(kind: type) -> dict[str, str]:
    """The documentation of a class's fields and properties."""
    (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for before, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        match before, after:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = in_markdown(text)
            case ast.FunctionDef(name=name), _:
                found[name] = in_markdown(ast.get_docstring(before))
    return found


def log_keys() -> dict[str, str]:
    """Every key that a line can have, and what it is."""
    documented: dict[str, str] = {}
    for kind in FROM_EVENTS:
        documented |= {name: text for name, text in attribute_docs(kind).items() if name not in documented}
    hidden = {"arrived", "deadline", "upstream_status", "first_byte_at", "upstream_whole", "was_queued", "request"}
    hidden |= {"started", "ending", "progress", "at", "overhead_seconds", "outcome"}
    return LOG_KEYS | {name: text for name, text in documented.items() if name not in hidden | set(LOG_KEYS)}


def said_in_code() -> tuple[dict[str, str], set[str]]:
    """Every event, with its level, and every key that the code gives to a logger, as far as in so many words."""
    said: dict[str, str] = dict.fromkeys(logs.EVENT_OF_STATUS.values(), "")
    keys: set[str] = set()
    for path in Path(inspect.getfile(config)).parents:
        if path.name == "trioproxy":
            break
    for file in sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=value, attr="debug" | "info" | "warning" | "error" as level),
                    args=[ast.Constant(value=str(event)), *_],
                ) if ast.unparse(value) in {"log", "self._log", "structlog.get_logger()"}:
                    said[event] = level
                    keys |= {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                case ast.Call(func=ast.Attribute(attr="_debug"), args=[ast.Constant(value=str(event)), *_]):
                    said[event] = "debug"
                case ast.Call(
                    func=ast.Name("write") | ast.Attribute(attr="say_and_exit"),
                    args=[ast.Constant(value=str(event)), *_],
                ):
                    said.setdefault(event, "")
    return said, keys - {"exc_info"}


def logs_page() -> str:
    """`logs.md`."""
    said, used = said_in_code()
    keys = log_keys()
    for missing, where in ((said.keys() - LOG_EVENTS.keys(), "LOG_EVENTS"), (used - set(keys), "LOG_KEYS")):
        if missing:
            raise SystemExit(f"docs/reference_words.py: say in {where} what these mean: {', '.join(sorted(missing))}")
    if gone := LOG_EVENTS.keys() - said.keys():
        raise SystemExit(f"docs/reference_words.py: nobody says these any more: {', '.join(sorted(gone))}")
    return page(
        "Log lines",
        words.LOGS_INTRODUCTION,
        f"```json\n{logs.render_json(dict(words.LOG_EXAMPLE))}\n```",
        "## Events",
        table(
            ("`event`", "level", "when"),
            ((code(event), line.level or said[event], line.when) for event, line in LOG_EVENTS.items()),
        ),
        "## Keys",
        "A line has those that apply to its event and are known.",
        table(("key", "what it is"), ((code(key), keys[key]) for key in sorted(keys))),
    )


# Errors


RETRIES: Final = {
    Retry.UNSAID: "–",
    Retry.NEVER: "`x-should-retry: false`",
    Retry.SOON: "`retry-after: 1`, `retry-after-ms`, `x-should-retry: true`",
    Retry.MEASURED: "`retry-after`, `retry-after-ms`, `x-should-retry: true`",
}


def ending_row(ending: Ending) -> tuple[str, ...]:
    """One line of the errors' table."""
    if ending.code not in MEANINGS:
        raise SystemExit(f"docs/reference_words.py: say in MEANINGS when {ending.code} happens and what to do about it")
    meaning = MEANINGS[ending.code]
    counted = f"{ending.status} / {ending.outcome}" if ending.status else "not as a request"
    return str(ending.http_status), code(ending.code), code(ending.type), meaning.when, meaning.remedy, counted


def errors_page() -> str:
    """`errors.md`."""
    answers = [ending for ending in errors.ENDINGS if ending.http_status is not None]
    answers.sort(key=lambda ending: ending.http_status or 0)
    unanswered = [ending for ending in errors.ENDINGS if ending.http_status is None]
    return page(
        "Errors",
        words.ERRORS_INTRODUCTION,
        "## The proxy's own answers",
        table(("status", "`code`", "`type`", "when", "what to do", "`status` / `outcome`"), map(ending_row, answers)),
        "## What they say about coming back",
        words.RETRY_TEXT,
        table(("`code`", "headers"), ((code(ending.code), RETRIES[ending.retry]) for ending in answers)),
        "## Their messages",
        "`{…}` stands for the numbers and names of the case.",
        table(("`code`", "`message`"), ((code(ending.code), ending.message) for ending in answers)),
        "## Endings without an answer of the proxy's",
        "They are counted and logged like the others, under this `code`.",
        table(
            ("`code`", "when", "`status` / `outcome`"), (ending_row(e)[1:2] + ending_row(e)[3::2] for e in unanswered)
        ),
    )


# Routes


def routes_page() -> str:
    """`routes.md`."""
    return page(
        "Routes",
        words.ROUTES_INTRODUCTION,
        "## Scheduled",
        "`POST` to these; `*` is one segment.",
        "\n".join(f"- `/v1/{path}`" for path in routes.SCHEDULED),
        "## Passed through",
        words.ROUTES_PASSED,
        "## Changing it",
        f"""
```yaml
scheduler:
  routes:                      # under /v1/; * is one segment
    custom/generate: schedule
    moderations: pass
```

An own route can schedule {", ".join(map(code, sorted(routes.METHODS)))}, and goes before the table above; among them,
one without `*` goes before those with it, and those go in the order of the file. Paths match without the query, and
percent-decoded.
""",
    )


# The command line


def command_parts(command: click.Command, name: str) -> Iterator[str]:
    """A command's section, and those of the commands below it."""
    context = click.Context(command, info_name=name)
    yield f"## {name}"
    yield in_markdown(command.help)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{name} {usage}\n```"
    options = [record for item in command.get_params(context) if (record := item.get_help_record(context))]
    if options:
        rows = ((code(option), in_markdown(text)) for option, text in options if text)
        yield table(("option", "what it does"), rows)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            below = command.get_command(context, child)
            assert below is not None
            yield from command_parts(below, f"{name} {child}")


def command_page() -> str:
    """`command-line.md`."""
    return page("Command line", words.COMMAND_INTRODUCTION, *command_parts(main, "trioproxy"))


PAGES: Final[dict[str, Callable[[], str]]] = {
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "logs.md": logs_page,
    "errors.md": errors_page,
    "routes.md": routes_page,
    "command-line.md": command_page,
}


def outdated() -> list[str]:
    """The pages that are not what the code says."""
    return [name for name, make in PAGES.items() if read(FOLDER / name) != make()]


def read(path: Path) -> str:
    """A page as it is; empty if it is not there."""
    return path.read_text() if path.exists() else ""


def run(arguments: list[str]) -> int:
    """The exit status."""
    if arguments == ["--check"]:
        names = outdated()
        if names:
            sys.stderr.write(f"{', '.join(names)}: not what the code says; run: python docs/make_reference.py\n")
        return 1 if names else 0
    FOLDER.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
