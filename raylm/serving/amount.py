"""How many answers one request may ask for: the `n` of each prompt, and its prompts times that.

vLLM 0.32 takes an `n` of 16,384 and any number of prompts, so that one small body fills the engine for hours.
"""

from collections.abc import Mapping
from typing import Any

from raylm.config.limits import LimitsSection

_ANSWERS = ("n", "best_of")
_OF_SCORING = ("documents", "queries", "items", "text_1", "text_2", "data_1", "data_2")
_PROMPTS = ("prompt", "input", "messages", "prompt_embeds", "texts", "images", "inputs", *_OF_SCORING)
_OR_ONE_CONVERSATION = ("input", "messages")


def excess(content: Any, limits: LimitsSection) -> tuple[str, str] | None:
    """The parameter that asks for too much, and a sentence that says so; None for a request within the limits.

    content: the body as JSON, of any route, not checked yet: what is no number or list is the route's to refuse.
    """
    if not isinstance(content, Mapping):
        return None
    sampling = content.get("sampling_params")
    given = {key: _number(content.get(key)) for key in _ANSWERS}
    given["sampling_params.n"] = _number(sampling.get("n")) if isinstance(sampling, Mapping) else 1
    most = max(given, key=lambda key: given[key])
    if given[most] > limits.max_n:
        return most, f"{most} must be at most {limits.max_n} (limits.max_n of the server), got {given[most]}."
    prompts = {key: _count(key, content.get(key)) for key in _PROMPTS}
    longest = max(prompts, key=lambda key: prompts[key])
    sequences = prompts[longest] * given[most]
    if sequences > limits.max_sequences:
        each = f" with {most}={given[most]} each" if given[most] > 1 else ""
        return longest, (
            f"{longest} has {prompts[longest]} entries{each}; a request may ask for {limits.max_sequences} in all "
            "(limits.max_sequences of the server). Send several requests."
        )
    return None


def _number(value: Any) -> int:
    """As pydantic reads an integer, at least 1."""
    try:
        return max(1, int(value))
    except (TypeError, ValueError, OverflowError):
        return 1


def _count(key: str, value: Any) -> int:
    """Prompts in a value: a list of token ids is one, and so is a list of messages."""
    if not isinstance(value, list) or not value:
        return 1
    if isinstance(value[0], int | float) or (key in _OR_ONE_CONVERSATION and isinstance(value[0], Mapping)):
        return 1
    return len(value)
