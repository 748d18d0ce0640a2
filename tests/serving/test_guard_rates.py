"""Requests and tokens by the minute, on a clock that is set."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.serving.buckets import Allowance, Bucket, duration
from tests.serving.guard_support import KEYS, Clock, ask, behind, costing, echo, run


@settings(deadline=None)
@given(
    per_minute=st.integers(1, 5000),
    steps=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 300)), min_size=1, max_size=60),
)
def test_a_bucket_gives_no_more_than_its_minute_and_what_flowed_in(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    """Against the definition: spent <= capacity + rate x time, for every span of time; the advised wait is enough."""
    bucket, now, spent = Bucket(per_minute, 0.0), 0.0, []
    for wait, amount in steps:
        now += wait
        before = bucket.balance(now)
        assert before <= per_minute
        if before >= amount:
            bucket.spend(amount, now)
            spent.append((now, amount))
        elif amount <= per_minute:
            later = now + bucket.seconds_until(amount, now)
            assert bucket.balance(later) >= amount - 1e-6
            now = later
    for start in range(len(spent)):
        total = 0
        for at, amount in spent[start:]:
            total += amount
            assert total <= per_minute + (at - spent[start][0]) * per_minute / 60 + 1e-6


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 500), min_size=1, max_size=30))
def test_tokens_are_paid_afterwards_and_a_debt_is_waited_for(costs: list[int]) -> None:
    allowance, now, booked = Allowance(None, 600, 0.0), 0.0, 0
    for cost in costs:
        refusal = allowance.admit(now)
        if refusal is not None:
            assert allowance.admit(now + refusal.retry_after_s * 0.99) is not None
            now += refusal.retry_after_s + 1e-6
            assert allowance.admit(now) is None
        allowance.book(cost, now)
        booked += cost
        assert booked <= 600 + now * 10 + cost  # one request may run into debt, never two


def test_a_refused_request_costs_nothing() -> None:
    allowance = Allowance(2, 10, 0.0)
    assert allowance.admit(0.0) is None
    allowance.book(100, 0.0)
    for _ in range(5):
        refusal = allowance.admit(0.0)
        assert refusal is not None
        assert "10 tokens per minute" in refusal.reason
    assert dict(allowance.headers(0.0))[b"x-ratelimit-remaining-requests"] == b"1"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0171, "18ms"),
        (1, "1s"),
        (1.42, "1.5s"),
        (59.95, "60s"),
        (60, "1m0s"),
        (359.5, "6m0s"),
        (3601, "60m1s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_each_key_has_its_own_requests_and_is_told_when_to_come_back() -> None:
    clock = Clock()
    app = behind(echo, keys=KEYS, clock=clock, requests_per_minute=1)
    first, second, third = (run(ask(app, key="b0b")) for _ in range(3))
    assert [answer.status for answer in (first, second, third)] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second, third)] == ["1", "0", "0"]
    assert third.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert third.headers["retry-after"] == "30"
    assert third.error["type"] == "rate_limit_error"
    assert third.error["code"] == "rate_limit_exceeded"
    assert "2 requests per minute" in third.error["message"]
    assert run(ask(app, key="al1ce")).status == 200
    assert run(ask(app, key="al1ce")).status == 429  # the limit of keys without one of their own
    assert run(ask(app, "/v1/models", method="GET", key="b0b")).status == 200  # listing costs nothing
    clock.now = 29.9
    assert run(ask(app, key="b0b")).headers["retry-after"] == "1"
    clock.now = 30.0
    assert run(ask(app, key="b0b")).status == 200


def test_tokens_are_booked_on_the_key_that_used_them() -> None:
    clock = Clock()
    app = behind(costing(30, 90), keys=KEYS, clock=clock)
    first = run(ask(app, key="b0b"))
    assert [message["type"] for message in first.messages] == ["http.response.start", "http.response.body"]
    assert first.headers["x-ratelimit-remaining-tokens"] == "100"  # before its own cost was known
    second = run(ask(app, key="b0b"))
    assert (second.status, second.headers["retry-after"]) == (429, "13")  # 21 of 100 a minute
    assert (second.headers["x-ratelimit-limit-tokens"], second.headers["x-ratelimit-remaining-tokens"]) == ("100", "0")
    assert "x-ratelimit-limit-tokens" not in run(ask(app, key="al1ce")).headers
    clock.now = 12.7
    assert run(ask(app, key="b0b")).status == 200


def test_without_keys_the_rates_hold_for_all_clients_together() -> None:
    app = behind(echo, clock=Clock(), requests_per_minute=2)
    assert [run(ask(app)).status for _ in range(3)] == [200, 200, 429]


def test_tokens_of_a_failed_request_count_too() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        try:
            raise RuntimeError("broken")
        finally:
            await send({"type": "raylm.usage", "prompt_tokens": 100, "completion_tokens": 1})

    guard = behind(app, keys=KEYS, clock=Clock())
    with pytest.raises(RuntimeError, match="broken"):
        run(ask(guard, key="b0b"))
    assert run(ask(guard, key="b0b")).status == 429
