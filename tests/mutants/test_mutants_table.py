"""The table of mutants fits the source, so that it cannot rot unseen; `nox -s mutants` runs them."""

from __future__ import annotations

import pytest

from mutants import MUTANTS, PACKAGE, ROOT, Mutant, find_stale


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_it_fits_the_source_and_is_python(mutant: Mutant) -> None:
    source = (PACKAGE / mutant.file).read_text("utf-8")
    mutated = mutant.apply(source)
    assert mutated != source
    compile(mutated, mutant.file, "exec")


def test_every_name_is_another() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("test", sorted({test for mutant in MUTANTS for test in mutant.tests}))
def test_the_tests_are_there(test: str) -> None:
    assert (ROOT / "tests" / test).is_file()


@pytest.mark.parametrize("snippet", ["nobody has ever written this", "self"])
def test_a_stale_one_is_told_by_its_name(snippet: str) -> None:
    (told,) = find_stale([MUTANTS[0], Mutant("the name", "scheduler/core.py", snippet, "pass", ())])
    assert told.startswith("'the name' is stale: its snippet occurs ")
    assert told.endswith(" times in scheduler/core.py, not once")
