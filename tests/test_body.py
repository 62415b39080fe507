"""Bodies: exactly the top-level fields `priority` are taken out, and nothing else changes by a byte."""

from __future__ import annotations

import gzip
import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trioproxy.body import MODEL_LENGTH_MAX, Reading, TooDeepError, read

# ---------------------------------------------------------------------------------------------------------------------
# JSON objects as text, in all the ways in which JSON can be written
# ---------------------------------------------------------------------------------------------------------------------

blanks = st.text(" \t\r\n", max_size=3)
string_pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters='"\\'), max_size=4),
    st.sampled_from(
        [r"\"", r"\\", r"\/", r"\b", r"\n", r"\u0000", r"\u00e9", r"\ud83d\ude00", ",", "}", "{", ":", "]"]
    ),
    st.sampled_from(["priority", r",\"priority\":1"]),
)
strings = st.lists(string_pieces, max_size=4).map(lambda pieces: '"' + "".join(pieces) + '"')
numbers = st.sampled_from(
    ["0", "-0", "-0.0", "1.10", "12345678901234567890", "1e400", "-1E+2", "1e-999", "0.1000", "9" * 400]
)
scalars = st.one_of(strings, numbers, st.sampled_from(["true", "false", "null"]))
plain_keys = st.one_of(
    strings, st.sampled_from(['"a"', '"Priority"', '"priority "', '"priorit"', '"prioritys"', '"PRIORITY"'])
).filter(lambda key: json.loads(key) not in ("priority", "model", "stream"))
priority_keys = st.sampled_from(
    ['"priority"', r'"\u0070riority"', r'"priorit\u0079"', r'"\u0070\u0072\u0069\u006f\u0072\u0069\u0074\u0079"']
)


@st.composite
def members(draw: st.DrawFn, keys: st.SearchStrategy[str], values: st.SearchStrategy[str]) -> str:
    return f"{draw(keys)}{draw(blanks)}:{draw(blanks)}{draw(values)}"


@st.composite
def joined(draw: st.DrawFn, brackets: str, items: st.SearchStrategy[str]) -> str:
    separated = ",".join(draw(blanks) + item + draw(blanks) for item in draw(st.lists(items, max_size=3)))
    return brackets[0] + (separated or draw(blanks)) + brackets[1]


values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        joined("[]", inner),
        joined("{}", members(st.one_of(plain_keys, priority_keys), inner)),
    ),
    max_leaves=8,
)


@dataclass
class Written:
    """A JSON object as text, and what was written into it."""

    text: str
    kept: list[str]
    """The top-level members that are not ours, as they stand in the text."""
    priorities: list[str]
    """The values of those that are."""

    @property
    def body(self) -> bytes:
        return self.text.encode()

    def without_priorities(self) -> re.Pattern[str]:
        """Every text that has just the members kept, each as it was, with any blanks between them."""
        separator = r"[ \t\r\n]*"
        inner = rf"{separator},{separator}".join(re.escape(member) for member in self.kept)
        return re.compile(rf"{separator}\{{{separator}{inner}{separator}\}}{separator}")


@st.composite
def objects(draw: st.DrawFn, *, least_priorities: int = 0, most_priorities: int = 3) -> Written:
    known = st.one_of(
        members(st.just('"model"'), st.one_of(strings, st.sampled_from(["null", "[1]", "3"]))),
        members(st.sampled_from(['"stream"', r'"str\u0065am"']), st.sampled_from(["true", "false", "null", '"x"'])),
    )
    kept = draw(st.lists(st.one_of(members(plain_keys, values), known), max_size=4))
    priorities = draw(st.lists(values, min_size=least_priorities, max_size=most_priorities))
    ours = [f"{draw(priority_keys)}{draw(blanks)}:{draw(blanks)}{value}" for value in priorities]
    places = draw(st.permutations([True] * len(ours) + [False] * len(kept)))
    left, right = iter(ours), iter(kept)
    mixed = [next(left) if is_ours else next(right) for is_ours in places]
    inner = ",".join(draw(blanks) + member + draw(blanks) for member in mixed) or draw(blanks)
    return Written(f"{draw(blanks)}{{{inner}}}{draw(blanks)}", kept, priorities)


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    text: str


@dataclass(frozen=True)
class Pairs:
    """An object with all its members, duplicates too, in order."""

    members: list[tuple[str, Any]]


def parsed(text: str) -> Pairs:
    found = json.loads(text, object_pairs_hook=Pairs, parse_int=Number, parse_float=Number)
    assert isinstance(found, Pairs)
    return found


def is_what_remains_of(part: bytes, whole: bytes) -> bool:
    """Whether `part` comes from `whole` by deleting alone."""
    rest = iter(whole)
    return all(byte in rest for byte in part)


@given(objects(least_priorities=1))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_exactly_the_top_level_priorities_are_taken_out(written: Written) -> None:
    reading = read(written.body)
    forwarded = reading.forwarded.decode()
    assert list(reading.priorities) == written.priorities
    assert written.without_priorities().fullmatch(forwarded)
    assert is_what_remains_of(reading.forwarded, written.body)
    before = parsed(written.text).members
    assert parsed(forwarded).members == [(key, value) for key, value in before if key != "priority"]


@given(objects(most_priorities=0))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_body_without_priority_is_forwarded_as_the_very_same(written: Written) -> None:
    body = written.body
    reading = read(body)
    assert reading.forwarded is body
    assert reading.priorities == ()


@given(objects())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_model_and_stream_are_read_and_the_last_of_several_wins(written: Written) -> None:
    fields = json.loads(written.text)
    reading = read(written.body)
    assert reading.model == (fields.get("model") if isinstance(fields.get("model"), str) else None)
    assert reading.stream == (fields.get("stream") if isinstance(fields.get("stream"), bool) else None)


@given(objects(least_priorities=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_has_been_taken_out_is_gone(written: Written) -> None:
    forwarded = read(written.body).forwarded
    assert read(forwarded).forwarded is forwarded


@pytest.mark.parametrize(
    ("body", "forwarded", "priorities"),
    [
        (b'{"priority":5}', b"{}", ("5",)),
        (b'{"priority":5,"a":1}', b'{"a":1}', ("5",)),
        (b'{"a":1,"priority":5}', b'{"a":1}', ("5",)),
        (b'{"a":1,"priority":5,"b":2}', b'{"a":1,"b":2}', ("5",)),
        (b'{"priority":1,"priority":"2"}', b"{}", ("1", '"2"')),
        (b'{"priority":1,"a":1,"priority":2}', b'{"a":1}', ("1", "2")),
        (b'{"a":1,"priority":1,"priority":2}', b'{"a":1}', ("1", "2")),
        (b'{"a":",","priority":1}', b'{"a":","}', ("1",)),
        (rb'{"\u0070riority":5,"a":1}', b'{"a":1}', ("5",)),
        (b'{"a":1.10,"priority":"high"}', b'{"a":1.10}', ('"high"',)),
        (b'{"priority":null}', b"{}", ("null",)),
        (b'{"priority":{"priority":[1]}}', b"{}", ('{"priority":[1]}',)),
        (b'{"priority":1e400,"a":1e400}', b'{"a":1e400}', ("1e400",)),
        ('{"ü":"ö","priority":"٣"}'.encode(), '{"ü":"ö"}'.encode(), ('"٣"',)),
    ],
)
def test_examples(body: bytes, forwarded: bytes, priorities: tuple[str, ...]) -> None:
    assert read(body) == Reading(forwarded, priorities=priorities)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":{"priority":1}}',
        b'{"messages":[{"priority":1}]}',
        b'{"a":"\\"priority\\":1"}',
        b'{"Priority":1}',
        b'{"priority ":1}',
        b'{"":{"":{"priority":1}},"a":["priority",1]}',
    ],
)
def test_what_only_looks_like_it_stays(body: bytes) -> None:
    reading = read(body)
    assert reading.forwarded is body
    assert reading.priorities == ()


# ---------------------------------------------------------------------------------------------------------------------
# What is no JSON object
# ---------------------------------------------------------------------------------------------------------------------

JSON = b'{"model":"m","stream":true,"priority":5}'
NO_JSON_OBJECTS = {
    "empty": b"",
    "blanks": b" \r\n\t",
    "array": b"[" + JSON + b"]",
    "string": b'"priority"',
    "number": b"5",
    "null": b"null",
    "text": b"priority=5",
    "form": b"model=m&priority=5",
    "multipart": b'--b\r\nContent-Disposition: form-data; name="priority"\r\n\r\n5\r\n--b--\r\n',
    "json lines": JSON + b"\n" + JSON,
    "trailing garbage": JSON + b"x",
    "trailing brace": JSON + b"}",
    "trailing nul": JSON + b"\x00",
    "cut off": JSON[:-1],
    "cut off in the value": JSON[:-2],
    "cut off in the key": JSON[:-6],
    "single brace": b"{",
    "byte order mark": b"\xef\xbb\xbf" + JSON,
    "utf-16": JSON.decode().encode("utf-16"),
    "utf-32": JSON.decode().encode("utf-32-le"),
    "gzip": gzip.compress(JSON),
    "other blanks": b"\x0b" + JSON,
    "trailing comma": JSON[:-1] + b",}",
    "trailing comma within": JSON[:-1] + b',"a":[1,]}',
    "comma alone": b'{,"priority":5}',
    "no comma": b'{"model":"m" "priority":5}',
    "no colon": b'{"model" "m","priority":5}',
    "comment": b'{"priority":5/**/}',
    "single quotes": b"{'priority':5}",
    "bare key": b"{priority:5}",
    "leading zero": b'{"priority":05}',
    "leading plus": b'{"priority":+5}',
    "half a number": b'{"model":"m","a":1.,"priority":5}',
    "NaN": b'{"model":"m","priority":NaN}',
    "Infinity within": b'{"model":"m","a":[-Infinity],"priority":5}',
    "unknown word": b'{"model":"m","priority":True}',
    "unknown escape": b'{"model":"m","a":"\\q","priority":5}',
    "half an escape": b'{"model":"m","a":"\\u12","priority":5}',
    "raw newline in a string": b'{"model":"m","priority":"5\n"}',
    "raw nul in a string": b'{"model":"m","a":"\x00","priority":5}',
    "invalid UTF-8": b'{"model":"m","a":"\xff","priority":5}',
    "invalid UTF-8 in the key": b'{"model":"m","\xff":1,"priority":5}',
    "cut-off UTF-8": b'{"model":"m","a":"\xc3","priority":5}',
    "overlong UTF-8": b'{"model":"m","a":"\xc0\x80","priority":5}',
    "surrogate in UTF-8": b'{"model":"m","a":"\xed\xa0\x80","priority":5}',
    "invalid UTF-8, no priority": b'{"model":"m","a":"\xff"}',
}


@pytest.mark.parametrize("body", NO_JSON_OBJECTS.values(), ids=NO_JSON_OBJECTS)
def test_what_is_no_json_object_is_forwarded_untouched_and_has_no_fields(body: bytes) -> None:
    reading = read(body)
    assert reading.forwarded is body
    assert reading == Reading(body)


@given(st.one_of(st.binary(), st.text().map(str.encode), st.binary().map(lambda rest: b'{"priority":5,' + rest)))
@settings(deadline=None)
def test_no_bytes_make_it_stumble(body: bytes) -> None:
    reading = read(body)
    try:
        is_object = isinstance(json.loads(body.decode()), dict) and "priority" in json.loads(body)
    except ValueError:
        is_object = False
    if not is_object:
        assert reading.forwarded is body


# ---------------------------------------------------------------------------------------------------------------------
# JSON at the edge of what readers bear
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "forwarded"),
    [
        # What JavaScript's JSON.stringify makes of a text that was cut in the middle of an emoji.
        (rb'{"messages":[{"content":"\ud83d"}],"priority":5}', rb'{"messages":[{"content":"\ud83d"}]}'),
        (rb'{"priority":5,"model":"\udc00"}', rb'{"model":"\udc00"}'),
        (rb'{"\ud83d":1,"priority":5}', rb'{"\ud83d":1}'),
    ],
    ids=["value", "model", "key"],
)
def test_an_escaped_half_of_a_surrogate_pair_is_json(body: bytes, forwarded: bytes) -> None:
    reading = read(body)
    assert reading.priorities == ("5",)
    assert reading.forwarded == forwarded


@pytest.mark.parametrize("name", ["model", "stream", "a"])
@pytest.mark.parametrize("number", ["1e400", "-1e999", "9" * 5000])
def test_a_number_of_any_size_is_json(name: str, number: str) -> None:
    reading = read(f'{{"{name}":{number},"priority":5}}'.encode())
    assert reading == Reading(f'{{"{name}":{number}}}'.encode(), priorities=("5",))


DEPTHS = [10, 500, 2_000, 100_000]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("brackets", ['["', '{"'])
def test_deep_nesting_without_priority_is_forwarded_untouched(depth: int, brackets: str) -> None:
    opening, closing = ("[", "]") if brackets == '["' else ('{"a":', "}")
    for text in (
        f'{{"model":"m","a":{opening * depth}1{closing * depth}}}',
        f'{{"model":"m","a":{opening * depth}',  # never closed
    ):
        body = text.encode()
        reading = read(body)
        assert reading.forwarded is body
        assert reading.priorities == ()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("template", ['{"priority":5,"a":%s}', '{"a":%s,"priority":5}', '{"a":%s,"\\u0070riority":5}'])
def test_deep_nesting_beside_a_priority_is_cut_or_refused_never_forwarded_with_it(depth: int, template: str) -> None:
    nested = "[" * depth + "]" * depth
    body = (template % nested).encode()
    if depth < 600:
        assert read(body) == Reading(f'{{"a":{nested}}}'.encode(), priorities=("5",))
        return
    try:
        reading = read(body)
    except TooDeepError:
        return
    assert reading == Reading(f'{{"a":{nested}}}'.encode(), priorities=("5",))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_deep_priority_is_cut_or_refused_never_forwarded(depth: int) -> None:
    try:
        reading = read(b'{"priority":%b,"a":1}' % (b"[" * depth + b"]" * depth))
    except TooDeepError:
        assert depth > sys.getrecursionlimit() // 2
    else:
        assert reading.forwarded == b'{"a":1}'


@pytest.mark.parametrize("template", ['{"priority":5,"a":[%s]}', '{"a":[%s],"priority":5}'])
def test_a_big_body_works(template: str) -> None:
    big = ",".join(['{"role":"user","content":"' + "ä\\n" * 1000 + '","priority":1.10}'] * 1500)
    body = (template % big).encode()
    assert len(body) > 5_000_000
    assert read(body) == Reading(f'{{"a":[{big}]}}'.encode(), priorities=("5",))


def test_many_priorities_take_no_quadratic_time() -> None:
    body = b'{"a":1,' + b",".join([b'"priority":5'] * 100_000) + b"}"
    assert read(body) == Reading(b'{"a":1}', priorities=("5",) * 100_000)


@pytest.mark.parametrize("member", ['"priority": 7', '"priority":"high"'])
@pytest.mark.parametrize(
    "filling", ["[1, 2, 3]", '{"priority": 7}', '"\\"priority\\": 7,"', '[{"priority":"high"}, 1]']
)
def test_the_quick_way_takes_out_the_right_one(member: str, filling: str) -> None:
    """A nested or quoted look-alike before, behind and on both sides of the field."""
    for head, tail in ((f'"a": {filling}', ""), ("", f'"b": {filling}'), (f'"a": {filling}', f'"b": {filling}')):
        members = [part for part in (head, member, tail) if part]
        rest = [part for part in (head, tail) if part]
        body = ("{" + ", ".join(members) + "}").encode()
        reading = read(body)
        assert reading.forwarded == ("{" + ", ".join(rest) + "}").encode()
        assert len(reading.priorities) == 1


def test_a_models_name_is_kept_only_so_far() -> None:
    assert read(b'{"model": "' + b"m" * 5000 + b'"}').model == "m" * MODEL_LENGTH_MAX
