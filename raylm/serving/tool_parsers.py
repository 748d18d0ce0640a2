"""Which of vLLM's parsers reads a model's tool calls, told by its chat template. Plain data, and one look at files.

A template that offers tools says how calls are to be written; where the text of that is unmistakable, its row names the
parser. Where it is not, none is taken: a wrong parser hides calls, and with none they are text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolParserRow:
    """marks: texts that the template has, all of them. tokens: control tokens that the parser cannot do without."""

    parser: str
    marks: tuple[str, ...]
    tokens: tuple[str, ...] = ()


# The first row that fits counts, so those with more marks come first.
TOOL_PARSERS = (
    ToolParserRow(parser="glm45", marks=("<tool_call>", "<arg_key>"), tokens=("<tool_call>", "</tool_call>")),
    ToolParserRow(parser="qwen3_coder", marks=("<tool_call>", "<function="), tokens=("<tool_call>", "</tool_call>")),
    ToolParserRow(parser="hermes", marks=("<tool_call>", '"name"', '"arguments"')),
    ToolParserRow(parser="hermes", marks=("<tool_call>", r"\"name\"", r"\"arguments\"")),
    ToolParserRow(parser="llama3_json", marks=("<|start_header_id|>", '"parameters"'), tokens=("<|python_tag|>",)),
    ToolParserRow(parser="mistral", marks=("[TOOL_CALLS]",), tokens=("[TOOL_CALLS]",)),
    ToolParserRow(
        parser="deepseek_v3",
        marks=("<｜tool▁calls▁begin｜>", "```json"),
        tokens=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    ),
    ToolParserRow(parser="kimi_k2", marks=("<|tool_calls_section_begin|>",), tokens=("<|tool_calls_section_begin|>",)),
    ToolParserRow(parser="internlm", marks=("<|action_start|>", "<|plugin|>"), tokens=("<|plugin|>",)),
)


def parser_of_template(template: str, vocabulary: str) -> str | None:
    """The parser for a Jinja template, or None where it offers no tools or says nothing unmistakable.

    vocabulary: text in which the tokenizer's control tokens stand, such as its tokenizer.json.
    """
    if "tools" not in template:
        return None
    for row in TOOL_PARSERS:
        if all(mark in template for mark in row.marks) and all(json_text(token) in vocabulary for token in row.tokens):
            return row.parser
    return None


def json_text(token: str) -> str:
    """A token as a JSON file has it."""
    return json.dumps(token, ensure_ascii=False)


def tool_settings(choice: str, engine: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """vLLM's arguments for `tool_parser`; none where `engine` has them, or nothing is known of the model.

    choice: `auto`, `none`, or a parser's name. folder: the model's; a hub id says nothing before it is loaded.
    """
    if choice == "none" or {"tool_call_parser", "enable_auto_tool_choice"} & engine.keys():
        return {}
    parser = choice
    if choice == "auto":
        found = parser_of_template(_template(engine, Path(folder)), _text(Path(folder) / "tokenizer.json"))
        if found is None:
            return {}
        parser = found
    return {"enable_auto_tool_choice": True, "tool_call_parser": parser}


def _template(engine: Mapping[str, Any], folder: Path) -> str:
    """Jinja of `engine.chat_template`, a file or the template itself, else of the folder; empty where there is none."""
    given = engine.get("chat_template")
    if isinstance(given, str):
        return _text(Path(given)) if "{" not in given else given
    in_file = _text(folder / "chat_template.jinja")
    if in_file:
        return in_file
    config = _text(folder / "tokenizer_config.json")
    templates = json.loads(config).get("chat_template", "") if config else ""
    if isinstance(templates, list):  # one for tools among others
        named = {entry["name"]: entry["template"] for entry in templates}
        return str(named.get("tool_use", named.get("default", "")))
    return str(templates)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
