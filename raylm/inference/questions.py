"""What a row of a dataset asks: its conversation up to the turn that is to be answered, or text to go on with.

Rows of every format of `raylm.data` are taken, also without the answer that training would need.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylm.data.formats import ParsedRow, parse_row, recognise, renamed
from raylm.data.prompt import PLAIN
from raylm.data.schema import Message, RowProblem, load_json

_ANSWERS = {
    "alpaca": "output",
    "question_answer": "answer",
    "prompt_response": "response",
    "prompt_completion": "completion",
    "text2text": "output",
}
"""Format -> the key of the answer, which may be missing here."""
_QUESTIONS = (
    ("instruction", "alpaca"),
    ("question", "question_answer"),
    ("prompt", "prompt_response"),
    ("input", "text2text"),
)
"""Key of a row with a question alone -> the format it is taken for."""


@dataclass(frozen=True, slots=True)
class Question:
    """Either a conversation, whose answers are to be made, or text.

    id: the row's own, None where it has none; messages: all turns of the row; answers: places in `messages` at which
    an answer is made, the last one may be their length; tools: as the template takes them.
    """

    id: str | int | None
    messages: tuple[Message, ...] = ()
    answers: tuple[int, ...] = ()
    tools: tuple[Any, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class QuestionReader:
    """Rows of one file as questions. format, columns: of the file; template: the name of its template."""

    format: str
    columns: Mapping[str, str]
    template: str
    role_map: Mapping[str, str]
    system: str | None
    turns: str

    def load(self, text: str) -> dict[str, Any]:
        """The row of a JSON text, its keys as the format names them. Raises RowProblem."""
        try:
            return renamed(load_json(text), self.columns)
        except json.JSONDecodeError as error:
            raise RowProblem(f"column {error.colno}: not valid JSON: {error.msg}.") from None
        except ValueError:  # Python's limit of digits
            raise RowProblem("holds an integer of too many digits.") from None
        except RecursionError:
            raise RowProblem("is nested too deeply.") from None

    def question(self, row: Mapping[str, Any], form: str = "") -> Question:
        """What a row asks; form: what the file says of its rows. Raises RowProblem."""
        name = self.format if self.format != "auto" else form or "auto"
        parsed = _parsed(dict(row), name, self.role_map)
        if self.template == PLAIN:
            return Question(row_id(row), text=_plain_text(parsed))
        messages, tools = _conversation(parsed)
        if messages[0]["role"] != "system" and self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        messages = [_without_train(message) for message in messages]
        answers = _answers(messages, self.turns)
        return Question(row_id(row), tuple(messages[: answers[-1]]), answers, tuple(tools or ()))


def row_id(row: Mapping[str, Any]) -> str | int | None:
    """The id that a row brings, if it is a text or a number."""
    value = row.get("id")
    return value if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _parsed(row: dict[str, Any], name: str, role_map: Mapping[str, str]) -> ParsedRow:
    if name == "auto":
        try:
            name = recognise(row)
        except RowProblem:
            found = next((form for key, form in _QUESTIONS if row.get(key) is not None), "")
            if not found:
                raise
            name = found
    if name == "prompt_response" and isinstance(row.get("prompt"), list):
        row = {"messages": row["prompt"], "system": row.get("system"), "tools": row.get("tools")}
        name = "conversation"
    answer = _ANSWERS.get(name)
    if answer and row.get(answer) is None:
        row = {**row, answer: [] if isinstance(row.get("prompt"), list) else ""}
    return parse_row(row, name, role_map, {})


def _conversation(row: ParsedRow) -> tuple[list[Message], list[Any]]:
    """Messages and tools of a row; a text is what a user says."""
    if row.kind == "conversation":
        return list(row.value["messages"]), row.value.get("tools", [])
    if row.kind in ("preference", "kto"):
        return list(row.value["prompt"]), []
    return [{"role": "user", "content": _text(row)}], []


def _text(row: ParsedRow) -> str:
    if row.kind == "text":
        return str(row.value)
    if row.kind == "text2text":
        return str(row.value[0])
    if row.kind in ("ranked", "scored"):
        return str(row.value["input"])
    raise RowProblem(f"is a row of kind {row.kind}, which cannot be answered.")


def _plain_text(row: ParsedRow) -> str:
    """What is gone on with: a text, or the question of a row that is a single exchange without a system text."""
    if row.kind != "conversation":
        return _text(row)
    messages = row.value["messages"]
    asked = [message for message in messages if not (message is messages[-1] and message["role"] == "assistant")]
    if len(asked) != 1 or asked[0]["role"] != "user":
        raise RowProblem("is a conversation, and template=none takes plain text.", "Set template.")
    return str(asked[0]["content"])


def _answers(messages: list[Message], turns: str) -> tuple[int, ...]:
    """Places at which an answer is made. Raises RowProblem where nothing asks for one."""
    asked = len(messages)
    while asked and messages[asked - 1]["role"] == "assistant":
        asked -= 1
    if not asked or messages[asked - 1]["role"] == "system":
        raise RowProblem("holds nothing to answer.")
    if turns == "last":
        return (asked,)
    first = next(place for place, message in enumerate(messages) if message["role"] != "system")
    places = [place for place in range(first + 1, asked) if messages[place]["role"] == "assistant"]
    return (*places, asked)


def _without_train(message: Message) -> Message:
    if "train" not in message:
        return message
    kept = dict(message)
    del kept["train"]
    return kept  # type: ignore[return-value]
