"""One configuration file: YAML, read so that every value has its line, ``${NAME}`` replaced from the environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import yaml

from trioproxy.config.gathered import DOTTED, INNER_SECTIONS, KEYS, Gathered, Given
from trioproxy.config.settings import KeySettings, Settings
from trioproxy.config.values import WHOLE_NUMBER, ConfigError, shown

# Deeper than any setting; bounded, because aliases can make a YAML document contain itself.
_DEPTH_MAX: Final = 3
_REFERENCE: Final = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?")

# YAML 1.2's scalars: in PyYAML's YAML 1.1 `off` is false, 8:30 is 510 and 010 is 8.
_NULL: Final = "tag:yaml.org,2002:null"
_TEXT: Final = "tag:yaml.org,2002:str"
_SCALARS: Final[dict[str, tuple[re.Pattern[str], Callable[[str], object]]]] = {
    _NULL: (re.compile(r"(?:~|null|Null|NULL|)\Z"), lambda _: None),
    "tag:yaml.org,2002:bool": (
        re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
        lambda text: text.lower() == "true",
    ),
    "tag:yaml.org,2002:int": (WHOLE_NUMBER, int),
    "tag:yaml.org,2002:float": (re.compile(r"[+-]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][+-]?[0-9]+)?\Z"), float),
}


class _Loader(yaml.BaseLoader):
    """Knows the scalars above and nothing else; only its node trees are used, so that every value has its line."""


for _tag, (_pattern, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, None)


def _document(path: Path) -> yaml.Node | None:
    """The node tree of a YAML file, None for an empty one. Raises ConfigError without a word of the file's content."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text (at byte {error.start + 1})") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"cannot be read: {error}") from None
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"is not valid YAML: {_yaml_complaint(error, text)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"is not valid YAML: line {line}: has a character that is not allowed") from None
    except RecursionError:
        raise ConfigError("is not usable: nested too deeply") from None
    except (ValueError, OverflowError):
        # PyYAML lets these through for escapes such as "\UFFFFFFFF".
        raise ConfigError("is not valid YAML: has an impossible escape or number") from None


def _yaml_complaint(error: yaml.MarkedYAMLError, text: str) -> str:
    # PyYAML quotes these names, and an unquoted secret may look like one.
    problem = re.sub(r"(alias|anchor|tag handle) (['\"]).*?\2", r"\1", error.problem or "")
    mark = error.problem_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    hint = ""
    if "alias" in f"{error.context} {problem}":
        hint = "; text that begins with * needs quotes"
    elif mark and text[: mark.index + 1].endswith("${"):
        hint = "; between braces, text with ${NAME} needs quotes"
    return f"{place}{problem}{hint}"


class ConfigFile:
    """One configuration file on its way to `Gathered`."""

    def __init__(self, path: Path, environ: Mapping[str, str], gathered: Gathered) -> None:
        self._path = path
        self._environ = environ
        self._gathered = gathered

    def read(self) -> None:
        """Gather all that the file says. Raises ConfigError if it cannot be read as a mapping at all."""
        root = _document(self._path)
        if root is None or root.tag == _NULL:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"must be a mapping of the sections {', '.join(Settings.model_fields)}")
        for section, node, origin in self._entries(root, ""):
            if section not in Settings.model_fields:
                self._gathered.complain_unknown(section, origin)
            elif section == KEYS:
                self._read_keys(node, origin)
            else:
                self._read_section(section, node, origin)

    def _read_section(self, section: str, node: yaml.Node, origin: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            if node.tag != _NULL:
                # Text in the place of upstream's keys may be its api_key.
                showable = isinstance(node, yaml.ScalarNode) and section != "upstream"
                said = f", not {shown(node.value)}" if showable else ""
                self._gathered.complain(section, f"must be a mapping of keys{said}", origin)
            return
        for key, child, at in self._entries(node, f"{section}."):
            if key in INNER_SECTIONS:
                self._read_section(key, child, at)
                continue
            if key not in DOTTED:
                self._gathered.complain_unknown(key, at)
                continue
            self._give(key, child, at)

    def _read_keys(self, node: yaml.Node, origin: str) -> None:
        if node.tag == _NULL or not node.value:
            self._gathered.complain(KEYS, "is empty: leave it out to let anyone who can connect use the proxy", origin)
            return
        if not isinstance(node, yaml.SequenceNode):
            self._gathered.complain(KEYS, "must be a list; an entry is like - {name: web, key: ...}", origin)
            return
        for index, entry in enumerate(node.value):
            subject, at = f"{KEYS}.{index}", f"file {self._path}, line {entry.start_mark.line + 1}"
            if not isinstance(entry, yaml.MappingNode):
                # It may be a key.
                self._gathered.complain(subject, "must be a mapping such as {name: web, key: ...}", at)
                continue
            self._gathered.given[subject] = Given({}, at)
            for key, child, line in self._entries(entry, f"{subject}."):
                if key.rpartition(".")[2] in KeySettings.model_fields:
                    self._give(key, child, line)
                else:
                    self._gathered.complain_unknown(key, line)

    def _give(self, key: str, node: yaml.Node, origin: str) -> None:
        problems_before = len(self._gathered.problems)
        value = self._value(node, key, origin)
        if len(self._gathered.problems) == problems_before:
            self._gathered.given[key] = Given(value, origin)

    def _entries(self, node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node, str]]:
        """Each key with the prefix before it, its value, and where it stands; complains of keys given twice."""
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            origin = f"file {self._path}, line {line}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._gathered.complain(f"{prefix}?", "a key must be plain text", origin)
                continue
            key = prefix + str(key_node.value)
            if key in first_lines:
                self._gathered.complain(key, f"is given twice, first on line {first_lines[key]}", origin)
                continue
            first_lines[key] = line
            yield key, value_node, origin

    def _value(self, node: yaml.Node, key: str, origin: str, depth: int = 0) -> object:
        if depth == _DEPTH_MAX:
            return "…"
        if isinstance(node, yaml.MappingNode):
            prefix = f"{key}."
            entries = self._entries(node, prefix)
            return {name.removeprefix(prefix): self._value(child, name, at, depth + 1) for name, child, at in entries}
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, key, origin, depth + 1) for child in node.value]
        if node.tag == _TEXT:
            return self._expand(node.value, key, origin)
        pattern, convert = _SCALARS.get(node.tag, (None, str))
        if pattern is None or not pattern.match(node.value):
            self._gathered.complain(key, "has a YAML tag that is not supported; text with ! needs quotes", origin)
            return None
        return convert(node.value)

    def _expand(self, text: str, key: str, origin: str) -> str:
        def replace(found: re.Match[str]) -> str:
            if found[0] == "$${":
                return "${"
            name = found[1]
            if name is None:
                complaint = "has ${ without a NAME and } behind it; $${ stands for a literal ${"
                self._gathered.complain(key, complaint, origin)
            elif name not in self._environ:
                self._gathered.complain(key, f"needs the environment variable {name}, which is not set", origin)
            return self._environ.get(name or "", "")

        return _REFERENCE.sub(replace, text)
