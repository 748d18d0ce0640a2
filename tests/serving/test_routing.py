"""The key of a conversation, and bounded loads on a ring."""

import random
from collections import Counter
from typing import Any

import pytest

from raylm.serving.routing import HEAD_CHARACTERS, LOAD_FACTOR, bounded, conversation_key


def turns(system: str, *texts: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_every_turn_of_a_conversation_has_the_same_key() -> None:
    first = conversation_key(turns("be kind", "hello"))
    assert first is not None
    assert conversation_key(turns("be kind", "hello", "hi", "and now?", "well", "more")) == first


def test_conversations_that_share_a_system_message_part_at_the_first_question() -> None:
    assert conversation_key(turns("be kind", "hello")) != conversation_key(turns("be kind", "goodbye"))
    assert conversation_key(turns("be kind", "hello")) != conversation_key(turns("be brief", "hello"))


def test_other_fields_are_no_part_of_the_key() -> None:
    body = turns("", "hello")
    assert conversation_key({**body, "temperature": 1, "user": "u"}) == conversation_key(body)


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_a_text_counts_by_its_head(field: str) -> None:
    head = "x" * HEAD_CHARACTERS
    assert conversation_key({field: head + "a"}) == conversation_key({field: head + "b"})
    assert conversation_key({field: "a" + head}) != conversation_key({field: "b" + head})


def test_token_ids_and_lists_of_prompts() -> None:
    ids = list(range(HEAD_CHARACTERS))
    assert conversation_key({"prompt": [*ids, 1]}) == conversation_key({"prompt": [*ids, 2]})
    assert conversation_key({"prompt": [ids]}) == conversation_key({"prompt": ids})
    assert conversation_key({"prompt": ["a", "b"]}) == conversation_key({"prompt": "a"})


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": None}, {"prompt": ""}, {"documents": ["a"]}])
def test_a_body_without_a_conversation_has_no_key(body: dict[str, Any]) -> None:
    assert conversation_key(body) is None


@pytest.mark.parametrize("messages", ["text", 3, {"a": 1}, ["a"], [None], [[1, 2]], [{"content": "x"}]])
def test_odd_messages_are_the_engines_to_refuse(messages: Any) -> None:
    assert conversation_key({"messages": messages}) is not None


def test_the_owner_answers_while_it_is_below_the_bound() -> None:
    assert bounded(["a", "b", "c"], {}) == ["a", "b", "c"]
    assert bounded(["a", "b", "c"], {"a": 5, "b": 5, "c": 5})[0] == "a"


def test_a_replica_above_the_bound_goes_last() -> None:
    assert bounded(["a", "b", "c"], {"a": 10, "b": 1, "c": 0}) == ["b", "c", "a"]


def test_one_hot_conversation_never_has_more_than_its_share_at_one_replica() -> None:
    """All requests want replica 0; the bound is that of the paper at every moment."""
    generator = random.Random(0)
    loads: Counter[int] = Counter()
    for _ in range(2000):
        if loads.total() > 24:
            loads[generator.choice([replica for replica in loads if loads[replica]])] -= 1
        total = loads.total() + 1
        loads[bounded([0, 1, 2, 3], loads)[0]] += 1
        assert max(loads.values()) <= LOAD_FACTOR * total / 4 + 1
