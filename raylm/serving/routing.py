"""Same conversation, same replica: a conversation's key, and a bound that keeps a popular one from starving others.

The key is a digest of the conversation's head: what stays the same from turn to turn. Consistent hashing with bounded
loads (arXiv:1608.01350): the owner of the key answers unless it has more than LOAD_FACTOR times its share of the
requests at work; then the next on the ring does, the same one each time.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

HEAD_CHARACTERS = 256
LOAD_FACTOR = 1.5

_Replica = TypeVar("_Replica")


def conversation_key(body: Mapping[str, Any]) -> str | None:
    """16 hexadecimal digits for the head of `messages`, `input` or `prompt`; None where there is none of them.

    Of messages: all up to and with the first of the user, so that conversations which share a system message part.
    Of a text: its first HEAD_CHARACTERS; of token ids as many.
    """
    for field in ("messages", "input", "prompt"):
        value = body.get(field)
        if value:
            head = json.dumps(_head(value), sort_keys=True, default=str)
            return hashlib.sha256(head.encode()).hexdigest()[:16]
    return None


def _head(value: Any) -> Any:
    if isinstance(value, str):
        return value[:HEAD_CHARACTERS]
    if not isinstance(value, list):
        return value
    if all(isinstance(item, int) for item in value):
        return value[:HEAD_CHARACTERS]
    head = []
    for item in value:
        head.append(item)
        if not isinstance(item, Mapping) or item.get("role") == "user":
            break  # of several prompts the first counts
    return head if isinstance(head[0], Mapping) else _head(head[0])


def bounded(ring: Sequence[_Replica], loads: Mapping[_Replica, int]) -> list[_Replica]:
    """The ring's order with the replicas at or above the bound moved to its end, the least busy of them first.

    ring: replicas from the key's owner on. loads: requests at work in each; one that is missing has none.
    """
    total = sum(loads.get(replica, 0) for replica in ring) + 1
    bound = math.ceil(LOAD_FACTOR * total / len(ring)) if ring else 0
    within = [replica for replica in ring if loads.get(replica, 0) < bound]
    above = sorted((r for r in ring if loads.get(r, 0) >= bound), key=lambda replica: loads.get(replica, 0))
    return within + above
