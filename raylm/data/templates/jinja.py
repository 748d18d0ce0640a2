"""The tokenizer's own chat template, with exact loss spans and no help from the template.

Templates rarely mark what the assistant says, so it is found from outside, by the first of three ways that applies:

1. The header that asks for an answer holds a control token, which no message can contain (literal.py), and stands
   once for each answer, with the answer word for word and the end token behind it: one rendering.
2. A rendering of the turns before an answer, with its header, begins the whole rendering, and so does one that ends
   with the answer: the difference is the answer. Two renderings an answer.
3. The template rewrites earlier turns (cuts their thinking, say): the answer is replaced by a word that occurs
   nowhere else, and stands between what then precedes and follows it in the whole rendering.

Where none of them gives one exact place the row is refused, naming the template.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raylm.data.schema import Message, RowProblem
from raylm.data.templates.literal import control_tokens
from raylm.data.templates.segments import Segment
from raylm.errors import ModelError

_STANDIN = "Vx5answer5xV"
_PRESET = "Set data.template to a preset with tools (raylm data templates)."


class TokenizerTemplate:
    """Renders conversations as the tokenizer's template does in transformers' sandbox."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """tokenizer: a transformers fast tokenizer; name: of its model, for messages. Raises ModelError."""
        if not tokenizer.chat_template:
            raise ModelError(
                name,
                "its tokenizer has no chat template.",
                "Use a chat model, set data.template to a preset, or put a chat_template.jinja beside tokenizer.json.",
            )
        self.name = name
        self._tokenizer = tokenizer
        self._render = _Renderer(tokenizer)
        self._control_tokens = control_tokens(tokenizer)
        self._header = self._probe_header()
        self._end = self._probe_end()

    def render(self, conversation: Mapping[str, Any]) -> list[Segment]:
        """The whole conversation; the joined texts are what a server would make of it.

        Raises RowProblem where the template refuses the conversation or the place of an answer is not exact.
        """
        messages, tools = conversation["messages"], conversation.get("tools")
        whole = self._apply(messages, tools)
        answers = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
        spans = self._spans_by_header(messages, answers, whole)
        if spans is None:
            spans = [self._span(messages, tools, position, whole) for position in answers]
        segments: list[Segment] = []
        done = 0
        for position, (start, end) in zip(answers, spans, strict=True):
            if start < done:
                raise self._inexact(position)
            segments += [Segment(whole[done:start], False), Segment(whole[start:end], True, turn=position)]
            done = end
        segments.append(Segment(whole[done:], False))
        return [segment for segment in segments if segment.text]

    def prompt(self, conversation: Mapping[str, Any]) -> str:
        """The text that asks the model for the next answer."""
        return self._apply(conversation["messages"], conversation.get("tools"), answer_follows=True)

    def end_token(self) -> str | None:
        """The control token that ends an answer, or None where the template ends answers without one."""
        return self._end or None

    def jinja(self) -> str:
        """The template itself."""
        template = self._tokenizer.chat_template
        return str(template)

    def _apply(self, messages: Sequence[Message], tools: Any = None, *, answer_follows: bool = False) -> str:
        shown = [_as_openai(message) for message in messages]
        try:
            text = self._call(shown, tools, answer_follows)
            missing = _missing_call(messages, text)
        except TypeError:  # templates that expect arguments as text, or null beside tool calls
            missing = "?"
        if missing:
            try:
                text = self._call([_as_older_openai(message) for message in shown], tools, answer_follows)
            except TypeError as error:
                raise RowProblem(
                    f"the chat template of {self.name} fails on its tool calls: {error}.", _PRESET
                ) from None
            if missing := _missing_call(messages, text):
                raise RowProblem(f"the chat template of {self.name} leaves the call of {missing} out.", _PRESET)
        if tools and not answer_follows and text == self._apply(messages):
            raise RowProblem(f"the chat template of {self.name} leaves the tools out.", _PRESET)
        return text

    def _call(self, messages: list[dict[str, Any]], tools: Any, answer_follows: bool) -> str:
        import jinja2

        try:
            return self._render(messages, tools or None, answer_follows)
        except jinja2.exceptions.SecurityError as error:
            raise ModelError(self.name, f"its chat template does something unsafe: {error}.") from None
        except jinja2.exceptions.TemplateError as error:
            raise RowProblem(f"the chat template of {self.name} refuses it: {error}.") from None

    def _probe_header(self) -> str:
        """What asks for an answer after a user turn; empty where it is not the same text each time, or may be typed."""
        question: list[Message] = [{"role": "user", "content": _STANDIN}]
        try:
            without, prompt = self._apply(question), self._apply(question, answer_follows=True)
        except RowProblem:
            return ""
        header = prompt[len(without) :] if prompt.startswith(without) else ""
        return header if any(token in header for token in self._control_tokens) else ""

    def _probe_end(self) -> str:
        """The control token right behind an answer, or empty."""
        chat: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _STANDIN}]
        try:
            _, found, behind = self._apply(chat).rpartition(_STANDIN)
        except RowProblem:
            return ""
        return next((token for token in self._control_tokens if found and behind.startswith(token)), "")

    def _spans_by_header(
        self, messages: Sequence[Message], answers: list[int], whole: str
    ) -> list[tuple[int, int]] | None:
        header, end = self._header, self._end
        if not header or not end or whole.count(header) != len(answers):
            return None
        spans = []
        at = 0
        for position in answers:
            start = whole.index(header, at) + len(header)
            at = start + len(messages[position]["content"]) + len(end)
            if whole[start:at] != messages[position]["content"] + end:
                return None
            spans.append((start, at))
        return spans

    def _span(self, messages: Sequence[Message], tools: Any, position: int, whole: str) -> tuple[int, int]:
        """Characters of `whole` that hold the answer at `position` and its end token."""
        before = self._apply(messages[:position], tools, answer_follows=True)
        last = position == len(messages) - 1
        after = whole if last else self._apply(messages[: position + 1], tools)
        if not after.startswith(before) or not whole.startswith(after):
            return self._span_by_standin(messages, tools, position, whole)
        answer = after[len(before) :]
        if self._end and self._end in answer:
            length = answer.rfind(self._end) + len(self._end)
        else:
            ends = [answer.find(token) + len(token) for token in self._control_tokens if token in answer]
            length = min(ends) if ends else len(answer.rstrip("\n"))
        return len(before), len(before) + length

    def _span_by_standin(self, messages: Sequence[Message], tools: Any, position: int, whole: str) -> tuple[int, int]:
        content = messages[position]["content"]
        thinking, closed, _ = content.rpartition("</think>")
        standin = thinking + closed + ("\n\n" if closed else "") + _STANDIN
        changed = list(messages)
        changed[position] = {**messages[position], "content": standin}
        pieces = self._apply(changed, tools).split(_STANDIN)
        if len(pieces) != 2 or not self._header or len(pieces[0]) + len(pieces[1]) > len(whole):
            raise self._inexact(position)
        ahead, behind = pieces
        said_until = len(whole) - len(behind)
        start = ahead.rfind(self._header) + len(self._header)
        inserted = ahead[start:]
        exact = (
            self._header in ahead
            and whole.startswith(ahead)
            and whole.endswith(behind)
            and not any(token in inserted for token in self._control_tokens)
            and (not self._end or behind.startswith(self._end))
        )
        if not exact:
            raise self._inexact(position)
        return start, said_until + len(self._end)

    def _inexact(self, position: int) -> RowProblem:
        return RowProblem(
            f"the chat template of {self.name} rewrites turns, so the place of answer {position} is not exact.",
            "Set data.template to a preset.",
        )


class _Renderer:
    """`apply_chat_template` without tokenising, in a fifth of the time: what a call of it and of jinja2's `render` does
    anew for each conversation is done once."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template  # the sandbox: no public name

        self._choose = tokenizer.get_chat_template
        self._compile = _compile_jinja_template
        self._names = {"documents": None, **tokenizer.special_tokens_map}

    def __call__(self, messages: list[dict[str, Any]], tools: list[Any] | None, answer_follows: bool) -> str:
        """The rendering. Raises what the template raises."""
        template = self._compile(self._choose(None, tools))
        names = {"messages": messages, "tools": tools, "add_generation_prompt": answer_follows, **self._names}
        environment = template.environment
        context = environment.context_class(
            environment, {**environment.globals, **names}, template.name, template.blocks
        )
        return "".join(template.root_render_func(context))


_PLAIN_KEYS = frozenset(("role", "content"))


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.keys() == _PLAIN_KEYS:
        return dict(message)
    shown = {key: value for key, value in message.items() if key not in ("train", "reasoning")}
    if message.get("reasoning"):
        shown["reasoning_content"] = message["reasoning"]
    return shown


def _as_older_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of calls as text, and no content as null."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        written = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": written}})
    return {**message, "content": message["content"] or None, "tool_calls": calls}


def _missing_call(messages: Sequence[Message], text: str) -> str:
    """The name of a called function that the rendering does not show, or empty."""
    names = [
        call["function"]["name"] for message in messages if "tool_calls" in message for call in message["tool_calls"]
    ]
    return next((name for name in names if name not in text), "")
