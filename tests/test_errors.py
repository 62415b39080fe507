"""The proxy's own errors: contract section 5 written out, against the one table in the source."""

from __future__ import annotations

import json
import math
from string import Formatter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builders import MESSAGE_FACTS, error_of, happened
from trioproxy import errors
from trioproxy.errors import ENDINGS, Ending, Outcome, ProxyError, Status

REFUSALS = [
    (400, "invalid_priority", "invalid_request_error", "unsaid", None, None),
    (400, "invalid_request", "invalid_request_error", "unsaid", None, None),
    (401, "invalid_api_key", "authentication_error", "unsaid", None, None),
    (403, "model_not_allowed", "permission_error", "unsaid", None, None),
    (403, "priority_not_allowed", "permission_error", "unsaid", None, None),
    (404, "not_found", "invalid_request_error", "unsaid", None, None),
    (413, "request_too_large", "invalid_request_error", "unsaid", None, None),
    (429, "rate_limit_exceeded", "rate_limit_exceeded", "measured", "rejected", "rejected"),
    (500, "internal_error", "internal_error", "never", "failed", "proxy_error"),
    (502, "upstream_unreachable", "upstream_unreachable", "1 s", "failed", "upstream_error"),
    (502, "upstream_protocol_error", "upstream_protocol_error", "1 s", "failed", "upstream_error"),
    (503, "queue_full", "queue_full", "measured", "rejected", "rejected"),
    (503, "shutting_down", "shutting_down", "measured", "rejected", "rejected"),
    (503, "too_many_websockets", "too_many_websockets", "measured", "rejected", "rejected"),
    (503, "evicted", "evicted", "measured", "evicted", "evicted"),
    (504, "queue_timeout", "queue_timeout", "never", "timeout", "timeout"),
    (504, "deadline_exceeded", "deadline_exceeded", "never", "timeout", "timeout"),
    (504, "upstream_timeout", "upstream_timeout", "never", "timeout", "timeout"),
]
"""HTTP status, code, type, what the client is told about coming back, status, outcome."""

ENDS_WITHOUT_AN_ANSWER_OF_OURS = [
    ("completed", "completed", "success"),
    ("upstream_refused", "failed", "upstream_error"),
    ("upstream_broke_off", "failed", "upstream_error"),
    ("cancelled", "cancelled", "cancelled"),
]
"""Code, status, outcome."""

BY_CODE = {ending.code: ending for ending in ENDINGS}
OURS = [ending for ending in ENDINGS if ending.http_status is not None]
MEASURED = [BY_CODE[code] for _, code, _, retry, _, _ in REFUSALS if retry == "measured"]

seconds = st.one_of(st.floats(0, 100), st.floats(min_value=0, allow_nan=False))
spreads = st.floats(min_value=0, max_value=1)


def retry_headers(error: ProxyError, spread: float = 0.5) -> dict[bytes, bytes]:
    fields = list(errors.retry_headers(error, spread))
    assert len(dict(fields)) == len(fields)
    return dict(fields)


def told_about_retries(ending: Ending) -> str:
    """What the headers tell a client that was refused while 17 s was measured."""
    fields = retry_headers(happened(ending, retry_after=17))
    if not fields:
        return "unsaid"
    if fields == {b"x-should-retry": b"false"}:
        return "never"
    assert set(fields) == {b"retry-after", b"retry-after-ms", b"x-should-retry"}
    assert fields[b"x-should-retry"] == b"true"
    return "measured" if fields[b"retry-after"] == b"17" else f"{int(fields[b'retry-after'])} s"


def test_the_table_is_the_contracts() -> None:
    refusals = [
        (ending.http_status, ending.code, ending.type, told_about_retries(ending), ending.status, ending.outcome)
        for ending in OURS
    ]
    assert sorted(refusals) == sorted(REFUSALS)


def test_the_other_ends_are_the_contracts() -> None:
    ends = [(ending.code, ending.status, ending.outcome) for ending in ENDINGS if ending not in OURS]
    assert sorted(ends) == sorted(ENDS_WITHOUT_AN_ANSWER_OF_OURS)
    assert all(ending.http_status is None for ending in ENDINGS if ending not in OURS)


def test_every_ending_of_the_module_is_in_the_table_once() -> None:
    defined = [value for value in vars(errors).values() if isinstance(value, Ending)]
    assert sorted(ending.code for ending in defined) == sorted(ending.code for ending in ENDINGS)
    assert len(BY_CODE) == len(ENDINGS)


def test_what_must_never_be_sent_is_not_there() -> None:
    assert {ending.http_status for ending in ENDINGS} & {408, 409} == set()


def test_labels_are_the_contracts() -> None:
    assert {str(status) for status in Status} == {"completed", "evicted", "rejected", "timeout", "failed", "cancelled"}
    assert {str(outcome) for outcome in Outcome} == {
        *("success", "evicted", "rejected", "timeout", "upstream_error", "proxy_error", "cancelled")
    }


def test_an_end_is_counted_by_both_status_and_outcome_or_not_at_all() -> None:
    for ending in ENDINGS:
        assert (ending.status is None) == (ending.outcome is None), ending.code


@pytest.mark.parametrize(
    ("http_status", "code"),
    [
        *((status, "completed") for status in (200, 201, 204, 299, 301, 304, 400, 401, 404, 408, 428, 430, 499)),
        *((status, "upstream_refused") for status in (429, 500, 502, 503, 504, 529, 599)),
    ],
)
def test_a_whole_answer_counts_by_its_status(http_status: int, code: str) -> None:
    assert errors.of_upstream_status(http_status).code == code


@pytest.mark.parametrize("ending", OURS, ids=lambda ending: ending.code)
def test_the_body_is_openais_error_object(ending: Ending) -> None:
    error = happened(ending)
    assert json.loads(errors.body(error)) == {
        "error": {"message": str(error), "type": ending.type, "param": None, "code": ending.code}
    }
    assert error_of(errors.body(happened(ending, param="priority")))["param"] == "priority"


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.code)
def test_the_message_tells_all_its_facts(ending: Ending) -> None:
    error = happened(ending, retry_after=17.2)
    fields = {name for _, name, _, _ in Formatter().parse(ending.message) if name is not None}
    told = MESSAGE_FACTS.get(ending.code, {})
    assert fields - {"retry_after"} == set(told)
    for value in told.values():
        assert str(value) in str(error)
    assert ("18 s" in str(error)) == ("retry_after" in fields)
    assert "{" not in str(error)


@pytest.mark.parametrize("ending", OURS, ids=lambda ending: ending.code)
def test_every_refusal_has_something_to_say(ending: Ending) -> None:
    assert str(happened(ending))


@pytest.mark.parametrize("ending", MEASURED, ids=lambda ending: ending.code)
def test_a_measured_refusal_says_when_to_come_back_in_words_too(ending: Ending) -> None:
    assert "23 s" in str(happened(ending, retry_after=23))


@pytest.mark.parametrize("text", ["{", "}", "{0}", "{retry_after}", "%s", '"', "\n", "\x00", "é", "💥"])
def test_facts_from_outside_are_never_templates_and_always_json(text: str) -> None:
    error = happened(BY_CODE["not_found"], path=f"/v1{text}")
    assert f"/v1{text}:" in str(error_of(errors.body(error))["message"])


@given(st.sampled_from(MEASURED), seconds, spreads)
@example(MEASURED[0], 0.0, 0.0)
@example(MEASURED[0], 17.2, 0.5)
@example(MEASURED[0], 60.0, 1.0)
@example(MEASURED[0], 48.0, 1.0)
@example(MEASURED[0], math.inf, 1.0)
@example(MEASURED[0], math.inf, 0.0)
def test_the_time_to_stay_away_is_what_the_sdks_obey(ending: Ending, retry_after: float, spread: float) -> None:
    fields = retry_headers(happened(ending, retry_after=retry_after), spread)
    assert set(fields) == {b"retry-after", b"retry-after-ms", b"x-should-retry"}
    whole, milliseconds = fields[b"retry-after"], fields[b"retry-after-ms"]
    assert whole.isdigit()
    assert milliseconds.isdigit()
    limited = min(max(retry_after, 1), 60)
    assert int(whole) == math.ceil(limited)
    assert int(milliseconds) <= 60_000
    # Near it: no earlier than half the time, no later than a quarter more.
    assert 500 * limited <= int(milliseconds) <= 1250 * limited


@given(st.sampled_from(MEASURED), seconds)
def test_the_refused_do_not_come_back_in_one_herd(ending: Ending, retry_after: float) -> None:
    error = happened(ending, retry_after=retry_after)
    earliest, middle, latest = (int(retry_headers(error, spread)[b"retry-after-ms"]) for spread in (0.0, 0.5, 1.0))
    assert earliest < middle < latest
    assert latest - earliest >= 400 * min(max(retry_after, 1), 48)


@given(spreads, seconds)
def test_a_broken_upstream_is_worth_another_try_in_a_second(spread: float, retry_after: float) -> None:
    fields = retry_headers(happened(BY_CODE["upstream_unreachable"], retry_after=retry_after), spread)
    assert fields[b"retry-after"] == b"1"
    assert 750 <= int(fields[b"retry-after-ms"]) <= 1250
