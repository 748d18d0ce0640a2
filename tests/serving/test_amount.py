"""How much one request may ask for, by its JSON."""

from typing import Any

import pytest

from raylm.config.limits import LimitsSection
from raylm.serving.amount import excess

LIMITS = LimitsSection(max_n=4, max_sequences=10)


@pytest.mark.parametrize(
    ("content", "parameter"),
    [
        ({"n": 4}, None),
        ({"n": 5}, "n"),
        ({"n": "5"}, "n"),  # pydantic takes it for 5
        ({"n": 5.0}, "n"),
        ({"n": float("inf")}, None),  # the route refuses it
        ({"n": -1}, None),
        ({"n": "many"}, None),
        ({"n": None, "best_of": 5}, "best_of"),
        ({"sampling_params": {"n": 5}}, "sampling_params.n"),
        ({"prompt": ["x"] * 10}, None),
        ({"prompt": ["x"] * 11}, "prompt"),
        ({"prompt": ["x"] * 3, "n": 4}, "prompt"),
        ({"prompt": [[1]] * 11}, "prompt"),
        ({"prompt": [1] * 11}, None),  # one prompt, of ids
        ({"prompt": "x" * 11}, None),
        ({"prompt": []}, None),
        ({"input": ["x"] * 11}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 11}, None),  # one conversation
        ({"messages": [{"role": "user", "content": "x"}] * 11}, None),
        ({"messages": [[{"role": "user", "content": "x"}]] * 11}, "messages"),
        ({"query": "x", "documents": ["x"] * 11}, "documents"),
        ({"texts": ["x"] * 11}, "texts"),
        ({"data_1": "x", "data_2": [{"content": []}] * 11}, "data_2"),
        ([], None),
        (None, None),
        ("n", None),
    ],
)
def test_what_asks_for_too_much(content: Any, parameter: str | None) -> None:
    found = excess(content, LIMITS)
    assert (found and found[0]) == parameter
    if found:
        assert "(limits.max_" in found[1]


def test_the_sentence_says_what_was_asked_and_what_may_be() -> None:
    assert excess({"prompt": ["x"] * 6, "n": 2}, LIMITS) == (
        "prompt",
        "prompt has 6 entries with n=2 each; a request may ask for 10 in all (limits.max_sequences of the server). "
        "Send several requests.",
    )
