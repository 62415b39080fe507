"""Priorities: the levels and their edges, every accepted form, every refused one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioproxy import priority

LEVELS = [
    ("very_low", 0, 19, 10),
    ("low", 20, 39, 30),
    ("normal", 40, 59, 50),
    ("high", 60, 79, 70),
    ("critical", 80, 100, 90),
]
"""Contract section 2: the level, its least and greatest number, what its name alone means."""


@pytest.mark.parametrize(("name", "least", "greatest", "_meaning"), LEVELS)
def test_a_level_covers_its_numbers_to_the_edges(name: str, least: int, greatest: int, _meaning: int) -> None:
    assert {priority.level(number) for number in range(least, greatest + 1)} == {name}


def test_every_number_has_a_level_and_there_are_no_others() -> None:
    assert [name for name, *_ in LEVELS] == list(priority.LEVELS)
    assert sum(greatest - least + 1 for _, least, greatest, _ in LEVELS) == 101
    assert (priority.LOWEST, priority.HIGHEST) == (0, 100)


@pytest.mark.parametrize(("name", "_least", "_greatest", "meaning"), LEVELS)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title, str.capitalize, str.swapcase])
def test_a_name_means_the_middle_of_its_level_in_any_case(
    name: str, _least: int, _greatest: int, meaning: int, spell: Callable[[str], str]
) -> None:
    assert priority.parse(spell(name)) == meaning
    assert priority.level(meaning) == name


def test_every_number_is_accepted_in_digits() -> None:
    assert [priority.parse(str(number)) for number in range(101)] == list(range(101))
    assert [priority.parse(f"000{number}") for number in range(101)] == list(range(101))


@pytest.mark.parametrize("text", [" 70", "70 ", "\t70\t", "  70\r\n", "\thigh ", " HIGH"])
def test_blanks_around_are_ignored(text: str) -> None:
    assert priority.parse(text) == 70


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "\t\r\n"),
        *("101", "0101", "999", "1000", "18446744073709551666", "1" * 5000),
        *("-1", "-0", "+5", "--5", "5-", "1 0", "5 0", "50,", "50;q=1", "50, 50", "50,60"),
        *("50.0", "50.", ".5", "1e1", "1E1", "5e0", "0x32", "0b1", "0o7", "1_0", "5_0"),
        *("٣", "５０", "५०", "²", "Ⅴ", "①", "５0"),
        *("null", "true", "false", "none", "nan", "inf", "default", "medium", "urgent"),
        *("very-low", "very low", "verylow", "_low", "low_", "very__low", "lo", "lows", "high!", "high critical"),
        *('"high"', "'high'", '"50"', "[50]", "{}"),
        *("\x0050", "50\x00", "\u00a050", "50\u2003", "\ufeff50", "ｈigh", "crıtical", "h\u0131gh", "high\u200b"),
    ],
)
def test_anything_else_means_nothing(text: str) -> None:
    assert priority.parse(text) is None


@given(st.one_of(st.text(), st.from_regex(r"\s*[-+]?\d{1,4}(\.\d)?\s*", fullmatch=True)))
def test_only_ascii_digits_and_names_ever_mean_something(text: str) -> None:
    bare = text.strip(" \t\r\n")
    meanings = {name: meaning for name, _, _, meaning in LEVELS} | {str(number): number for number in range(101)}
    digits = bare.lstrip("0") or "0" * bool(bare)
    assert priority.parse(text) == meanings.get(bare.lower(), meanings.get(digits))


def test_what_is_accepted_is_told() -> None:
    for name, *_ in LEVELS:
        assert name in priority.ACCEPTED
    assert "0 to 100" in priority.ACCEPTED
