"""The shapes of rows that people bring, and what each becomes. One table; a new shape is one row of it.

A shape is recognised by its keys, most particular first, or named by `format`. What comes out is one of few kinds:
a conversation, plain text, a text with its continuation, or rows for alignment and images, which are validated here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raylm.data.schema import (
    Conversation,
    Message,
    RowProblem,
    check_order,
    checked_text,
    kind_of,
    optional_text,
    parse_conversation,
    parse_messages,
    parse_tools,
    required_text,
)
from raylm.errors import DataError, nearest

RoleMap = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row in its final form. kind: `conversation` (value: Conversation), `text` (str), `text2text` ((input, output)),
    `preference` ({"prompt", "chosen", "rejected"} of messages), `kto` ({"prompt", "completion", "label"}),
    `ranked` ({"input", "outputs"}), `scored` ({"input", "outputs": [(score, text)]}), `image_text`."""

    kind: str
    value: Any


TRAINABLE = ("conversation", "text", "text2text")
"""The kinds that supervised fine-tuning and continued pre-training take."""


@dataclass(frozen=True, slots=True)
class Format:
    """A shape: the keys a row must have to be taken for it, and how it is read."""

    keys: tuple[str, ...]
    parse: Callable[[Mapping[str, Any], RoleMap], ParsedRow]
    summary: str


def parse_row(instance: Any, format_name: str, role_map: RoleMap, columns: Mapping[str, str]) -> ParsedRow:
    """One row of a dataset in its final form. format_name: a key of FORMATS, or `auto`.

    columns: name in the format -> name in the data. Raises RowProblem.
    """
    instance = renamed(instance, columns)
    form = FORMATS[recognise(instance) if format_name == "auto" else format_name]
    missing = [key for key in form.keys if key not in instance]
    if missing:
        raise RowProblem(f"has no {missing[0]}, which format {format_name} needs.")
    return form.parse(instance, role_map)


def renamed(instance: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with its keys as the format names them; columns: name in the format -> name in the data.

    Raises RowProblem.
    """
    if not isinstance(instance, dict):
        raise RowProblem(f"is {kind_of(instance)}, not an object.")
    if not columns:
        return instance
    missing = [name for name in columns.values() if name not in instance]
    if missing:
        raise RowProblem(f"has no column {missing[0]!r}, which columns names.")
    taken = set(columns.values())
    kept = {key: value for key, value in instance.items() if key not in taken and key not in columns}
    return {**kept, **{name: instance[column] for name, column in columns.items()}}


def recognise(instance: Mapping[str, Any]) -> str:
    """The name of the first format whose keys a row has. Raises RowProblem."""
    if name := _with_keys(tuple(instance)):
        return name
    found = ", ".join(sorted(map(str, instance))[:8]) or "none"
    raise RowProblem(
        f"has keys ({found}) of no known format.", f"Set format to one of {', '.join(FORMATS)}, or map the columns."
    )


@lru_cache(maxsize=1024)
def _with_keys(keys: tuple[str, ...]) -> str:
    return next((name for name, form in FORMATS.items() if set(form.keys).issubset(keys)), "")


def check_format(name: str, where: str) -> None:
    """Raises DataError for a format that is not in the table."""
    if name != "auto" and name not in FORMATS:
        raise DataError(where, f"format {name!r} is unknown.", nearest(name, ("auto", *FORMATS)))


def _conversation(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    return ParsedRow("conversation", parse_conversation(instance, roles))


def _sharegpt(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    return _conversation_of(_sharegpt_messages(instance, roles), instance)


def _sharegpt_messages(instance: Mapping[str, Any], roles: RoleMap) -> list[Message]:
    raw = instance["conversations"]
    if not isinstance(raw, list) or not raw:
        raise RowProblem("has no conversations." if not raw else f"conversations is {kind_of(raw)}, not a list.")
    key = "from" if isinstance(raw[0], dict) and "from" in raw[0] else "role"
    return parse_messages(raw, roles, role=key)


def _conversation_of(messages: list[Message], instance: Mapping[str, Any]) -> ParsedRow:
    system = optional_text(instance, "system")
    if system:
        if messages and messages[0]["role"] == "system":
            raise RowProblem("has a system text and a system message.", "Keep one of them.")
        messages = [{"role": "system", "content": system}, *messages]
    conversation: Conversation = {"messages": messages}
    if tools := parse_tools(instance.get("tools")):
        conversation["tools"] = tools
    check_order(messages)
    return ParsedRow("conversation", conversation)


def _turns(*pairs: tuple[str, str]) -> list[Message]:
    messages: list[Message] = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _alpaca(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    history = instance.get("history") or []
    if not isinstance(history, list):
        raise RowProblem(f"history is {kind_of(history)}, not a list.")
    pairs: list[tuple[str, str]] = []
    for place, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowProblem(f"history {place} is not a pair of question and answer.")
        pairs.append((checked_text(turn[0], f"history {place}"), checked_text(turn[1], f"history {place}")))
    instruction, more = required_text(instance, "instruction"), optional_text(instance, "input")
    question = "\n".join(filter(None, (instruction, more)))
    return _conversation_of(_turns(*pairs, (question, required_text(instance, "output"))), instance)


def _pair(question: str, answer: str) -> Callable[[Mapping[str, Any], RoleMap], ParsedRow]:
    def parse(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
        turns = _turns((required_text(instance, question), required_text(instance, answer)))
        return _conversation_of(turns, instance)

    return parse


def _prompt_completion(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    prompt, completion = instance["prompt"], instance["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation_of(parse_messages([*prompt, *completion], roles), instance)
    return ParsedRow("text2text", (checked_text(prompt, "prompt"), checked_text(completion, "completion")))


def _text(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    return ParsedRow("text", required_text(instance, "text"))


def _text2text(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    return ParsedRow("text2text", (required_text(instance, "input"), required_text(instance, "output")))


def _preference(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    """Chosen and rejected as texts, messages, one message, or whole conversations; the prompt apart or shared."""
    chosen = _side(instance["chosen"], "chosen", roles)
    rejected = _side(instance["rejected"], "rejected", roles)
    prompt = _prompt(instance, roles)
    if not prompt:
        shared = 0
        for one, other in zip(chosen, rejected, strict=False):
            if one != other:
                break
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not chosen or not rejected:
        raise RowProblem("chosen and rejected are the same, or one holds nothing.")
    if not prompt:
        raise RowProblem("has no prompt: chosen and rejected share no first turn.")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise RowProblem(f"{name} does not end with the assistant.")
    return ParsedRow("preference", {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _side(value: Any, where: str, roles: RoleMap) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": checked_text(value, where)}]
    if isinstance(value, dict) and "messages" in value:
        return parse_conversation(value, roles)["messages"]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowProblem(f"{where} is {kind_of(value)}, not text or messages.")
    key = "from" if value and isinstance(value[0], dict) and "from" in value[0] else "role"
    return parse_messages(value, roles, role=key)


def _prompt(instance: Mapping[str, Any], roles: RoleMap) -> list[Message]:
    if instance.get("conversations"):
        messages = _sharegpt_messages(instance, roles)
    elif isinstance(instance.get("prompt"), list):
        messages = parse_messages(instance["prompt"], roles)
    elif instance.get("prompt") is not None:
        messages = [{"role": "user", "content": checked_text(instance["prompt"], "prompt")}]
    elif instance.get("instruction") is not None:
        parts = (required_text(instance, "instruction"), optional_text(instance, "input"))
        messages = [{"role": "user", "content": "\n".join(filter(None, parts))}]
    else:
        return []
    system = optional_text(instance, "system")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _kto(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    label = instance["label"]
    if not isinstance(label, bool):
        raise RowProblem(f"label is {kind_of(label)}, not true or false.")
    if "messages" in instance:
        messages = parse_conversation(instance, roles)["messages"]
        if messages[-1]["role"] != "assistant":
            raise RowProblem("does not end with the assistant, whose answer the label judges.")
        prompt, completion = messages[:-1], messages[-1:]
    else:
        prompt = _prompt(instance, roles)
        completion = _side(instance.get("completion"), "completion", roles)
    if not prompt:
        raise RowProblem("has no prompt.")
    return ParsedRow("kto", {"prompt": prompt, "completion": completion, "label": label})


def _kto_messages(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    return _kto(instance, roles)


def _ranked(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    outputs = instance["output"]
    if not isinstance(outputs, list) or not outputs:
        raise RowProblem(f"output is {kind_of(outputs)}, not a list of texts.")
    texts = [checked_text(text, f"output {place}") for place, text in enumerate(outputs)]
    return ParsedRow("ranked", {"input": required_text(instance, "input"), "outputs": texts})


def _scored(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    outputs = instance["output"]
    if not isinstance(outputs, list) or not outputs:
        raise RowProblem(f"output is {kind_of(outputs)}, not a list of scored texts.")
    scored = []
    for place, item in enumerate(outputs):
        score = item.get("score") if isinstance(item, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise RowProblem(f"output {place} has no score.")
        scored.append((float(score), checked_text(item.get("text"), f"output {place}: text")))
    return ParsedRow("scored", {"input": required_text(instance, "input"), "outputs": scored})


def _image_text(instance: Mapping[str, Any], roles: RoleMap) -> ParsedRow:
    images = instance["images"]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise RowProblem("images is not a list of paths.")
    if "messages" in instance:
        return ParsedRow("image_text", {"images": images, **parse_conversation(instance, roles)})
    return ParsedRow("image_text", {"images": images, "text": required_text(instance, "text")})


FORMATS: dict[str, Format] = {
    "paired_text_to_text": Format(("prompt", "chosen", "rejected"), _preference, "LMFlow: prompt, chosen, rejected"),
    "preference": Format(("chosen", "rejected"), _preference, "chosen and rejected, texts or messages"),
    "kto": Format(("label", "completion"), _kto, "prompt, completion and a true or false label"),
    "kto_messages": Format(("label", "messages"), _kto_messages, "messages and a true or false label"),
    "image_text": Format(("images",), _image_text, "images with a text or messages"),
    "conversation": Format(("messages",), _conversation, "LMFlow or OpenAI: messages, system, tools"),
    "sharegpt": Format(("conversations",), _sharegpt, "ShareGPT: conversations of from and value"),
    "alpaca": Format(("instruction", "output"), _alpaca, "Alpaca: instruction, input, output, history, system"),
    "prompt_completion": Format(
        ("prompt", "completion"), _prompt_completion, "a text and its continuation, without a template; or messages"
    ),
    "prompt_response": Format(("prompt", "response"), _pair("prompt", "response"), "one question, one answer"),
    "question_answer": Format(("question", "answer"), _pair("question", "answer"), "one question, one answer"),
    "text2text": Format(("input", "output"), _text2text, "LMFlow: a text and its continuation, without a template"),
    "text": Format(("text",), _text, "plain text, every token trained"),
    "text_to_textlist": Format(("input", "output"), _ranked, "LMFlow: a text and several continuations, best first"),
    "text_to_scored_textlist": Format(("input", "output"), _scored, "LMFlow: a text and scored continuations"),
}
"""In the order in which keys are looked for: the most particular first. The last two are only taken by name."""

LMFLOW_TYPES = {
    "text_only": "text",
    "text2text": "text2text",
    "conversation": "conversation",
    "paired_conversation": "preference",
    "paired_text_to_text": "paired_text_to_text",
    "text_to_textlist": "text_to_textlist",
    "text_to_scored_textlist": "text_to_scored_textlist",
    "image_text": "image_text",
}
"""`type` of an LMFlow file -> format of its instances."""
