"""Keeps text that somebody typed from turning into control tokens.

Where a message holds the name of a control token, a neutral word takes its place while a template renders; afterwards
the name comes back as a segment of its own, marked literal, which the tokenizer must encode as ordinary text.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raylm.data.templates.segments import Segment

_WORD = "Qz{}zQ"
_MARK = re.compile(r"Qz(\d+)zQ")


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a tokenizer, the longest first."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {token for token in tokenizer.all_special_tokens if token}
    return tuple(sorted(names | named, key=lambda token: (-len(token), token)))


class Literals:
    """Takes control tokens out of conversations, and puts them back into segments."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._pattern = re.compile("|".join(re.escape(token) for token in tokens)) if tokens else None
        self._starts = tuple({token[0] for token in tokens} | {_WORD[0]}) if tokens else ()

    def taken_out(self, value: Any) -> tuple[Any, list[str]]:
        """The value (text, or lists and objects of text) with words in place of control tokens, and those tokens."""
        taken: list[str] = []
        if not self._may_hold(value):
            return value, taken
        return self._replaced(value, taken), taken

    def _may_hold(self, value: Any) -> bool:
        """False when no text in the value holds a character that a control token begins with."""
        kind = type(value)  # of JSON, so exact; the checks of abstract classes cost more than the search
        if kind is str:
            return any(map(value.__contains__, self._starts))
        inner = value.values() if kind is dict else value if kind is list or kind is tuple else ()
        return any(map(self._may_hold, inner))

    def _replaced(self, value: Any, taken: list[str]) -> Any:
        if isinstance(value, str):
            if self._pattern is None or ("Qz" not in value and not self._pattern.search(value)):
                return value
            # A text that looks like one of our words is taken out as well, so that it comes back as itself.
            both = re.compile(f"{self._pattern.pattern}|{_MARK.pattern}")

            def take(match: re.Match[str]) -> str:
                taken.append(match[0])
                return _WORD.format(len(taken) - 1)

            return both.sub(take, value)
        if isinstance(value, Mapping):
            return {
                key: inner if key in ("role", "type", "train") else self._replaced(inner, taken)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._replaced(inner, taken) for inner in value]
        return value


def put_back(segments: Sequence[Segment], taken: Sequence[str]) -> list[Segment]:
    """Segments with the tokens that were taken out in their places, as literal segments of their own."""
    result: list[Segment] = []
    for segment in segments:
        done = 0
        for match in _MARK.finditer(segment.text):
            if int(match[1]) >= len(taken):
                continue
            result.append(
                Segment(segment.text[done : match.start()], segment.loss, segment.generated, turn=segment.turn)
            )
            literal = taken[int(match[1])]
            result.append(Segment(literal, segment.loss, segment.generated, literal=True, turn=segment.turn))
            done = match.end()
        result.append(Segment(segment.text[done:], segment.loss, segment.generated, turn=segment.turn))
    return [segment for segment in result if segment.text]
