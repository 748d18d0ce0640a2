"""The tokenizer's own chat template, with exact loss spans and no help from the template.

Templates rarely mark what the assistant says. It is found by rendering prefixes of the conversation: what a template
adds between "turns before, and the header of an answer" and "turns before, and the answer" is the answer with its end
token. A template that rewrites earlier turns has no such prefixes and is refused for the rows where it does so. The
price is two renderings for each assistant turn.
"""

from typing import Any

from raylm.data.schema import Message, RowProblem
from raylm.data.templates.segments import Segment
from raylm.errors import ModelError


class ChatTemplate:
    """Renders conversations as the tokenizer's template does in transformers' sandbox."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """tokenizer: a transformers fast tokenizer; name: of its model, for messages. Raises ModelError."""
        if not tokenizer.chat_template:
            raise ModelError(
                name,
                "its tokenizer has no chat template.",
                "Use a chat model, or put a chat_template.jinja beside its tokenizer.json.",
            )
        self._tokenizer = tokenizer
        self._name = name
        specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._control_tokens = sorted(specials | {tokenizer.eos_token or ""} - {""}, key=len, reverse=True)

    def render(self, messages: list[Message]) -> list[Segment]:
        """The whole conversation; the joined texts are what a server would make of it.

        Raises RowProblem where the template refuses the conversation, where it rewrites earlier turns, or where a
        message contains the text of a control token, which would turn into the token.
        """
        for position, message in enumerate(messages):
            found = next((token for token in self._control_tokens if token in message["content"]), None)
            if found:
                raise RowProblem(f"message {position} contains the control token {found}.", "Remove it from the text.")
        whole = self._apply(messages, answer_follows=False)
        segments: list[Segment] = []
        done = 0
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._answer_span(messages, position, whole)
            segments += [Segment(whole[done:start], False), Segment(whole[start:end], True)]
            done = end
        segments.append(Segment(whole[done:], False))
        return [segment for segment in segments if segment.text]

    def answer_prefix(self, messages: list[Message]) -> str:
        """The prompt that asks the model for the next answer."""
        return self._apply(messages, answer_follows=True)

    def end_token(self) -> str | None:
        """The control token that ends an answer, or None where the template ends answers without one."""
        probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        answer = next(segment.text for segment in self.render(probe) if segment.loss)
        return next((token for token in self._control_tokens if answer.endswith(token)), None)

    def _apply(self, messages: list[Message], *, answer_follows: bool) -> str:
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer_follows
            )
        except jinja2.exceptions.SecurityError as error:
            raise ModelError(self._name, f"its chat template does something unsafe: {error}.") from None
        except jinja2.exceptions.TemplateError as error:
            raise RowProblem(f"the chat template of {self._name} refuses it: {error}.") from None
        return str(text)

    def _answer_span(self, messages: list[Message], position: int, whole: str) -> tuple[int, int]:
        """Characters of `whole` that hold the answer at `position` and its end token."""
        before = self._apply(messages[:position], answer_follows=True)
        after = whole if position == len(messages) - 1 else self._apply(messages[: position + 1], answer_follows=False)
        if not after.startswith(before) or not whole.startswith(after):
            raise RowProblem(
                f"the chat template of {self._name} rewrites turns, so the place of answer {position} is not exact."
            )
        answer = after[len(before) :]
        ends = [answer.find(token) + len(token) for token in self._control_tokens if token in answer]
        length = min(ends) if ends else len(answer.rstrip("\n"))
        return len(before), len(before) + length
