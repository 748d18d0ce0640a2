"""Prompts as token ids, made as training makes them.

A server parses the names of control tokens that somebody types; so do the chat functions of engines. Ids given to an
engine are taken as they are.
"""

from collections.abc import Mapping
from typing import Any

from raylm.data.encode import Encoder
from raylm.data.schema import RowProblem
from raylm.data.templates import Segment, chat_template
from raylm.data.templates.literal import Literals, control_tokens, put_back
from raylm.data.templates.table import AUTO
from raylm.data.tokenize import own_bos

PLAIN = "none"
"""The name of no template."""


class PromptEncoder:
    """A chat template, by default the tokenizer's own, and the tokenizer, for prompts."""

    def __init__(self, tokenizer: Any, name: str, template: str = AUTO) -> None:
        """tokenizer: a transformers fast tokenizer; name: of its model, for messages; template: as `data.template`, or
        `none` for plain text alone. Raises DataError and ModelError."""
        self._template = None if template == PLAIN else chat_template(template, tokenizer, name)
        self._bos = own_bos(tokenizer)
        end = self._template.end_token() if self._template else None
        self.stop_token_ids: list[int] = [tokenizer.convert_tokens_to_ids(end)] if end else []
        """What ends an answer where the template ends it with a control token: an engine knows the model's own only."""
        self._encoder = Encoder(tokenizer)
        self._literals = Literals(control_tokens(tokenizer))

    def types_control_tokens(self, conversation: Mapping[str, Any]) -> bool:
        """True when a message holds the name of a control token as text."""
        return bool(self._literals.taken_out(conversation["messages"])[1])

    def ids(self, conversation: Mapping[str, Any]) -> list[int]:
        """The ids that ask for the next answer; typed names of control tokens stay text.

        Raises RowProblem where the template refuses the conversation or the tokenizer cannot keep such text.
        """
        if self._template is None:
            raise RowProblem("is a conversation, and template=none takes plain text.", "Set template.")
        shown, taken = self._literals.taken_out(dict(conversation))
        return self._encoded(self._template.prompt(shown), taken)

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text that the model goes on with, begun as the tokenizer begins text. Raises RowProblem."""
        shown, taken = self._literals.taken_out(text)
        return self._encoded(self._bos + shown, taken)

    def _encoded(self, text: str, taken: list[str]) -> list[int]:
        segments = put_back([Segment(text, False)], taken)
        tokens = self._encoder.encode([segments])[0]
        if isinstance(tokens, RowProblem):
            raise tokens
        ids: list[int] = tokens.input_ids.tolist()
        return ids
