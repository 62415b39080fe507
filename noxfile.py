"""Checks of this project: ``nox`` runs lint, types and tests; ``nox -l`` lists the rest."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")


def group(name: str) -> tuple[str, ...]:
    """The requirements of one dependency group of ``pyproject.toml``."""
    return nox.project.dependency_groups(PROJECT, name)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and common mistakes (ruff)."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict typing (mypy)."""
    session.install("-e", ".", "nox", *group("types"))
    session.run("mypy")


def run_tests(session: nox.Session) -> None:
    """pytest with branch coverage, subprocesses included; arguments after ``--`` go to pytest."""
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "--numprocesses", "auto", *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole test suite with the newest dependencies."""
    session.install("-e", ".", *group("tests"))
    run_tests(session)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, as a site in `build/docs`; what Sphinx warns of is an error. Writes the reference anew."""
    session.install("-e", ".", *group("docs"))
    session.run("python", "docs/make_reference.py")
    session.run("sphinx-build", "-E", "-q", "-W", "--keep-going", "-n", "-b", "html", "docs", "build/docs")


@nox.session
def clients(session: nox.Session) -> None:
    """The how-tos for clients that the other tests do not have: LangChain, LiteLLM."""
    session.install("-e", ".", *group("clients"))
    session.run("pytest", "docs/tests", *session.posargs)


def unpacked(session: nox.Session, package: str, *programs: str, otherwise: str) -> Path | None:
    """A folder with Debian's package in it, only unpacked; none if the machine has the programs itself."""
    if all(shutil.which(program) for program in programs):
        return None
    folder = (Path(session.create_tmp()) / package).resolve()
    if not (folder / "usr").exists():
        if not shutil.which("apt-get"):
            session.error(f"{' or '.join(programs)} is missing: {otherwise}")
        folder.mkdir(exist_ok=True)
        with session.chdir(folder):
            if os.geteuid() == 0:
                session.run("apt-get", "-q", "update", external=True)
            session.run("apt-get", "-q", "download", package, external=True)
            (file,) = Path().glob("*.deb")
            session.run("dpkg-deb", "--extract", str(file), ".", external=True)
    return folder


def with_programs(folder: Path) -> str:
    """The search path with the programs of an unpacked package first."""
    return f"{folder / 'usr' / 'bin'}{os.pathsep}{os.environ['PATH']}"


def prometheus(session: nox.Session) -> str:
    """The search path with `prometheus` and `promtool` on it: the machine's, else Debian's."""
    folder = unpacked(session, "prometheus", "prometheus", "promtool", otherwise="install Prometheus, 2.42 or newer")
    return with_programs(folder) if folder else os.environ["PATH"]


@nox.session
def observability(session: nox.Session) -> None:
    """The stack in observability/: a real Prometheus, promtool, Grafana's types and grammar."""
    path = prometheus(session)
    session.install("-e", ".", *group("observability"))
    with session.chdir("observability/tests"):
        session.run("npm", "ci")
    path = os.pathsep.join([str(Path(session.bin)), path])
    session.run("pytest", "observability/tests", *session.posargs, env={"PATH": path})


@nox.session
def mutants(session: nox.Session) -> None:
    """Small faults put in on purpose: says which test catches each, and fails if one survives."""
    session.install("-e", ".", *group("tests"))
    session.run("python", "tests/mutants/mutants.py", *session.posargs)


@nox.session
def lowest(session: nox.Session) -> None:
    """The whole test suite with the oldest dependencies that ``pyproject.toml`` allows."""
    oldest = [re.sub(r">=([^,;]+).*", r"==\1", line) for line in PROJECT["project"]["dependencies"]]
    session.install("-e", ".", *oldest, *group("tests"))
    run_tests(session)


@nox.session
def bench(session: nox.Session) -> None:
    """The quick benchmarks: some minutes, ratios to the obvious proxy; ``-- --write`` puts them into the docs."""
    session.install("-e", ".", *group("tests"))
    session.run("python", "bench/report.py", *session.posargs)


def valgrind(session: nox.Session) -> dict[str, str]:
    """What the environment needs for `valgrind` and `vgdb`: nothing if the machine has them, else Debian's."""
    folder = unpacked(session, "valgrind", "valgrind", "vgdb", otherwise="install valgrind")
    return {"PATH": with_programs(folder), "VALGRIND_LIB": str(folder / "usr/libexec/valgrind")} if folder else {}


@nox.session
def guard(session: nox.Session) -> None:
    """What a request costs, counted by valgrind, beside what is kept in bench/guard.json; ``-- --write`` keeps it."""
    env = valgrind(session)
    session.install("-e", ".", *group("tests"))
    session.run("python", "bench/guard.py", *session.posargs, env=env)


@nox.session
def soak(session: nox.Session) -> None:
    """Endurance: ten minutes of random load and random faults, then nothing may be left; ``-- --seconds 60`` etc."""
    session.install("-e", ".", *group("tests"))
    session.run("python", "tests/soak/soak.py", *session.posargs)
