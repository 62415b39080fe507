"""Runs what a page of the documentation tells its reader to do, so that the two cannot drift.

A comment before a fenced block says what is to be done with it; blocks without one are only read.

| comment | the block |
| --- | --- |
| `<!-- run -->` | is run to its end, in bash (`sh`) or by Python (`python`), and must succeed |
| `<!-- background 8080 -->` | is left running until the page's end; what follows waits for its port |
| `<!-- output -->` | must be in what the block before has printed: numbers with a point may differ, `…` is anything |
| `<!-- stop 8080 -->` | (no block) ends what was started with that port |
| `<!-- settings -->` | must be a usable configuration file, files that it names left aside |

Blocks share a folder of their own, with `.venv` in it, and what they export. Every port of 127.0.0.1 in them stands for
a free one, and a known upstream's URL for a stand-in's.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt

from processes import environment, free_port
from trioproxy import config
from trioproxy.config import ConfigError

PROJECT: Final = Path(__file__).parent.parent
DOCS: Final = PROJECT / "docs"
SECONDS_MAX: Final = 30.0
"""How long one block may take, starting included."""

_MARK: Final = re.compile(r"<!-- (run|background|output|stop|settings)(?: (\d+))? -->\s*")
_LOCAL_PORT: Final = re.compile(r"(?:(?<=127\.0\.0\.1:)|(?<=--port ))\d+\b")


@dataclass(frozen=True)
class Block:
    """What a page wants done, and where it says so."""

    action: str
    port: str
    language: str
    text: str
    line: int


def blocks(markdown: str) -> Iterator[Block]:
    """The marked blocks of a page, in order."""
    tokens = MarkdownIt("commonmark").parse(markdown)
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type != "html_block" or not token.content.startswith("<!-- "):
            continue
        found = _MARK.fullmatch(token.content)
        if found is None:
            continue
        assert token.map is not None
        action, port = (part or "" for part in found.groups())
        if action == "stop":
            yield Block(action, port, "", "", token.map[0] + 1)
        else:
            assert following is not None
            assert following.type == "fence", f"line {token.map[0] + 1}: no block behind the comment"
            yield Block(action, port, following.info, following.content, token.map[0] + 1)


@dataclass
class Reader:
    """Somebody who does what a page says, in a folder of their own."""

    folder: Path
    replaced: Mapping[str, str] = field(default_factory=dict)
    """By text of the page: what stands for it here."""
    variables: Mapping[str, str] = field(default_factory=dict)
    ports: dict[str, str] = field(default_factory=dict)
    printed: str = ""
    """By the block before."""
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def do(self, block: Block) -> None:
        """What one block says. AssertionError if that does not work."""
        if block.action == "stop":
            self.stop(self.port(block.port))
        elif block.action == "output":
            self.compare(block.text)
        elif block.action == "background":
            self.start(block)
        elif block.action == "settings":
            self.check(block.text)
        else:
            self.run(block)

    def run(self, block: Block) -> None:
        """Run a block to its end."""
        ended = subprocess.run(
            self.command(block),
            check=False,
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS_MAX,
        )
        self.printed = ended.stdout.decode()
        assert ended.returncode == 0, f"exit status {ended.returncode}:\n{self.printed}\nof:\n{block.text}"

    def start(self, block: Block) -> None:
        """Start a block, and wait until its port is listened on."""
        port = self.port(block.port)
        output = self.folder / f"output-{port}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                self.command(block),
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[port] = process
        ends = time.monotonic() + SECONDS_MAX
        while not listens(port):
            assert process.poll() is None, f"ended too early:\n{output.read_text()}\nof:\n{block.text}"
            assert time.monotonic() < ends, f"does not listen:\n{output.read_text()}\nof:\n{block.text}"
            time.sleep(0.02)

    def stop(self, port: str) -> None:
        """End what was started with this port, as Ctrl-C would."""
        process = self._running.pop(port)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop_all(self) -> None:
        """End everything."""
        for port in reversed(list(self._running)):
            self.stop(port)

    def compare(self, expected: str) -> None:
        """That each line of it has been printed."""
        printed = [without_numbers(line) for line in self.printed.splitlines()]
        for line in expected.splitlines():
            pattern = ".*".join(map(re.escape, without_numbers(self.replace(line).strip()).split("…")))
            assert any(re.search(pattern, each) for each in printed), f"{line!r} is not in:\n{self.printed}"

    def check(self, settings: str) -> None:
        """That a configuration file is usable, but for certificates and keys that are not here."""
        file = self.folder / "example.yaml"
        file.write_text(settings)
        try:
            config.load(file, dict.fromkeys(re.findall(r"\$\{(\w+)\}", settings), "sk-example"))
        except ConfigError as error:
            complaints = [line for line in str(error).splitlines() if "must be a PEM file" not in line]
            assert not complaints, "\n".join(complaints)

    def command(self, block: Block) -> list[str]:
        text = self.replace(block.text)
        # Like the lines typed into one terminal: what is exported stays.
        state = self.folder / ".exported"
        state.touch()
        if block.language == "python":
            return ["bash", "-euc", f'source {state}; exec .venv/bin/python -c "$0"', text]
        assert block.language == "sh", f"line {block.line}: nobody can run {block.language}"
        return ["bash", "-euo", "pipefail", "-c", f"source {state}\n{text}\nexport -p > {state}"]

    def environment(self) -> dict[str, str]:
        return environment({"TRIOPROXY_SERVER__BIND": f"127.0.0.1:{self.port('8080')}", **self.variables})

    def replace(self, text: str) -> str:
        for written, here in self.replaced.items():
            text = text.replace(written, here)
        known = set(re.findall(r":(\d+)/", " ".join(self.replaced.values())))
        return _LOCAL_PORT.sub(lambda found: found[0] if found[0] in known else self.port(found[0]), text)

    def port(self, written: str) -> str:
        return self.ports.setdefault(written, str(free_port()))


def without_numbers(line: str) -> str:
    """The line with every decimal fraction the same."""
    return re.sub(r"\d+\.\d+", "#", line).strip()


def listens(port: str) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection(("127.0.0.1", int(port)), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def reader(folder: Path, replaced: Mapping[str, str], variables: Mapping[str, str]) -> Iterator[Reader]:
    """A reader in `folder`, where `.venv` is the environment that runs the tests; leaves nothing running."""
    (folder / ".venv").symlink_to(sys.prefix)
    one = Reader(folder, replaced, variables)
    try:
        yield one
    finally:
        one.stop_all()


def follow(page: Path, folder: Path, replaced: Mapping[str, str], variables: Mapping[str, str]) -> None:
    """Do all that a page says."""
    with reader(folder, replaced, variables) as one:
        for block in blocks(page.read_text()):
            try:
                one.do(block)
            except (AssertionError, subprocess.TimeoutExpired) as failure:
                raise AssertionError(f"{page.relative_to(PROJECT)}, line {block.line}: {failure}") from None
