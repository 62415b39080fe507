"""Where the settings come from: file, environment and command line, each winning over the one before."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast

from pydantic import ValidationError

from trioproxy.certificates import certificates_complaint, key_complaint
from trioproxy.config.gathered import DOTTED, KEYS, ONLY_IN_FILE, Gathered, Given, did_you_mean
from trioproxy.config.settings import ServerSettings, Settings
from trioproxy.config.values import ConfigError, shown
from trioproxy.config.yaml_file import ConfigFile

_PREFIX: Final = "TRIOPROXY_"
_FILE_VARIABLE: Final = "TRIOPROXY_CONFIG"
_VARIABLES: Final = {_PREFIX + key.upper().replace(".", "__"): key for key in DOTTED if key not in ONLY_IN_FILE}
# Kubernetes sets these in every pod beside a Service that is named trioproxy.
_SERVICE_LINK: Final = re.compile(r"TRIOPROXY_(?:SERVICE|PORT)(?:_|$)")


def _read_file(
    path: Path | str, environ: Mapping[str, str], gathered: Gathered, subject: str, *, may_be_empty: bool
) -> None:
    try:
        if not str(path):
            raise ConfigError("the name of the file is empty")
        ConfigFile(Path(path), environ, gathered).read()
        if not (may_be_empty or gathered.given or gathered.problems):
            raise ConfigError("sets nothing, as if it were not written to its end; restart if all defaults are meant")
    except ConfigError as error:
        gathered.problems.append(f"{subject.strip()}: {error}")


def _read_environment(environ: Mapping[str, str], gathered: Gathered) -> None:
    for name in sorted(environ):
        if not name.startswith(_PREFIX) or name == _FILE_VARIABLE:
            continue
        key = _VARIABLES.get(name)
        if key is None:
            gathered.problems.append(f"{name}: unknown environment variable{_hint(name)}")
            continue
        value = environ[name].split(",") if key == "server.bind" else environ[name]
        gathered.given[key] = Given(value, f"environment variable {name}")


def _hint(variable: str) -> str:
    for key in (KEYS, *ONLY_IN_FILE):
        if variable.startswith(_PREFIX + key.upper().replace(".", "__")):
            return f"; {key} can only be set in the file"
    if _SERVICE_LINK.match(variable):
        return "; if it comes from a Kubernetes Service of that name, set enableServiceLinks: false"
    # Without the common prefix, which would make everything look close.
    known = [name.removeprefix(_PREFIX) for name in (*_VARIABLES, _FILE_VARIABLE)]
    close = difflib.get_close_matches(variable.removeprefix(_PREFIX).upper(), known, n=1)
    return did_you_mean([_PREFIX + name for name in close])


def _validated(gathered: Gathered) -> Settings | None:
    """The settings, or None when some value is impossible, with each such value among the problems."""
    sections: dict[str, object] = {}
    for dotted, (value, _) in gathered.given.items():
        *path, key = dotted.split(".")
        section = sections
        for name in path:
            section = cast(dict[str, object], section.setdefault(name, {}))
        section[key] = value
    if KEYS in sections:
        sections[KEYS] = list(cast(dict[str, object], sections[KEYS]).values())
    try:
        return Settings.model_validate(sections)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False, include_input=False):
            # Behind a setting's own name comes the place within its value.
            names = [".".join(map(str, error["loc"][:depth])) for depth in (3, 2)]
            dotted = next(name for name in names if name in gathered.given)
            missing = error["type"] == "missing"
            text = "is missing" if missing else error["msg"].removeprefix("Value error, ")
            gathered.complain(names[0] if missing else dotted, text, gathered.given[dotted].origin)
        return None


def _check_keys(settings: Settings, gathered: Gathered) -> None:
    """Complain of client keys that cannot be told from each other, or contradict themselves."""
    names: dict[str, int] = {}
    digests: dict[str, int] = {}
    for index, key in enumerate(settings.keys):
        entry = f"{KEYS}.{index}"
        complaint = ""
        if (key.key is None) == (key.key_sha256 is None):
            complaint = "has neither key nor key_sha256: give one" if key.key is None else "has both key and key_sha256"
        elif (first := names.setdefault(key.name, index)) != index:
            complaint = f"has the name of {KEYS}[{first}]: {key.name}"
        elif (first := digests.setdefault(key.sha256, index)) != index:
            complaint = f"is the same key as {KEYS}[{first}]"
        elif key.default_priority is not None and key.default_priority > key.max_priority:
            complaint = f"has a default_priority ({key.default_priority}) above its max_priority ({key.max_priority})"
        if complaint:
            gathered.complain(entry, complaint, gathered.given[entry].origin)


def _check_files(settings: Settings, gathered: Gathered) -> None:
    """Complain of certificates and keys that cannot be used, alone or together."""

    def complain(key: str, text: str, because_of: str = "") -> None:
        gathered.complain(key, text, gathered.given[because_of or key].origin)

    def check(key: str, path: Path, complaint: str) -> bool:
        if complaint:
            complain(key, f"must be a PEM file, not {shown(str(path))}, {complaint}")
        return not complaint

    tls, upstream = settings.server.tls, settings.upstream
    if upstream.ca_file is not None:
        check("upstream.ca_file", upstream.ca_file, certificates_complaint(upstream.ca_file))
    for cert_key, cert, key_key, key in (
        ("server.tls.cert", tls.cert, "server.tls.key", tls.key),
        ("upstream.client_cert", upstream.client_cert, "upstream.client_key", upstream.client_key),
    ):
        if cert is not None and key is not None:
            if check(cert_key, cert, certificates_complaint(cert)):
                check(key_key, key, key_complaint(key, cert))
        elif cert is not None:
            complain(key_key, f"is missing: {cert_key} needs it", cert_key)
        elif key is not None:
            complain(cert_key, f"is missing: {key_key} needs it", key_key)


def _printable(problem: str) -> str:
    # Keys, paths and names are the user's: a line break in one would look like another problem.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in problem)


def load(
    path: Path | str | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] | None = None,
    *,
    may_be_empty: bool = True,
) -> Settings:
    """The settings from the file, the environment and the command line, each winning over the one before.

    Without `path`, the file is what ``TRIOPROXY_CONFIG`` names, if anything. `overrides` go by dotted key. A file that
    sets nothing means all defaults, unless it may not be empty: while it is being written it looks so for a moment.
    Raises ConfigError, with every problem of every source at once, and nothing else, whatever the sources contain.
    """
    gathered = _gather(path, environ, overrides, may_be_empty=may_be_empty)
    settings = _validated(gathered)
    if settings is not None:
        _check_files(settings, gathered)
    if settings is not None and not gathered.problems:
        _check_keys(settings, gathered)
    if settings is None or gathered.problems:
        raise ConfigError("\n".join(map(_printable, gathered.problems)))
    return settings


def control_socket(path: Path | str | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """`server.control_socket` alone, from the same sources.

    Whoever asks the proxy to reload need not have its environment or be able to read its certificates: the rest is
    judged only if it does not name the socket. Raises ConfigError.
    """
    given = _gather(path, environ, None, may_be_empty=True).given.get("server.control_socket")
    try:
        known = None if given is None else ServerSettings.model_validate({"control_socket": given.value}).control_socket
    except ValidationError:
        known = None
    return load(path, environ).server.control_socket if known is None else known


def _gather(
    path: Path | str | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None,
    *,
    may_be_empty: bool,
) -> Gathered:
    gathered = Gathered()
    if path is not None:
        _read_file(path, environ, gathered, str(path), may_be_empty=may_be_empty)
    elif _FILE_VARIABLE in environ:
        path = environ[_FILE_VARIABLE]
        _read_file(path, environ, gathered, f"{path} (named by {_FILE_VARIABLE})", may_be_empty=may_be_empty)
    _read_environment(environ, gathered)
    for key, value in (overrides or {}).items():
        if key in DOTTED:
            gathered.given[key] = Given(value, "the command line")
        else:
            gathered.complain_unknown(key, "the command line")
    return gathered
