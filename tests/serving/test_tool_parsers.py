"""Which parser a chat template asks for, by templates of known families and our own presets."""

import json
from pathlib import Path
from typing import Any

import pytest

from raylm.config import ServeConfig, load_config
from raylm.config.serving import ServeArgs
from raylm.data.templates import chat_template
from raylm.errors import ConfigError
from raylm.serving.engine_args import command_line
from raylm.serving.tool_parsers import TOOL_PARSERS, parser_of_template, tool_settings

# How each family writes calls, as its own template says; shortened.
LLAMA = '{% if tools %}Respond in the format {"name": function name, "parameters": {}}<|start_header_id|>{% endif %}'
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}{{ '[TOOL_CALLS] [' }}"
QWEN_CODER = "{% if tools %}<tool_call>\n<function=example_function_name>\n</tool_call>{% endif %}"
GLM = "{% if tools %}<tool_call>{name}\n<arg_key>{key}</arg_key></tool_call>{% endif %}"


@pytest.mark.parametrize(
    ("template", "tokens", "parser"),
    [
        (LLAMA, ["<|python_tag|>"], "llama3_json"),
        (LLAMA, [], None),
        (MISTRAL, ["[TOOL_CALLS]"], "mistral"),
        (QWEN_CODER, ["<tool_call>", "</tool_call>"], "qwen3_coder"),
        (GLM, ["<tool_call>", "</tool_call>"], "glm45"),
        ("{{ messages }}", ["<tool_call>", "[TOOL_CALLS]"], None),
        ("{% if tools %}{{ tools }}{% endif %}", ["<tool_call>"], None),
    ],
)
def test_a_template_names_its_parser(template: str, tokens: list[str], parser: str | None) -> None:
    assert parser_of_template(template, json.dumps({"added_tokens": tokens}, ensure_ascii=False)) == parser


@pytest.mark.parametrize("preset", ["qwen2_5", "qwen3"])
def test_presets_that_write_calls_as_hermes_does(preset: str, tokenizer: Any) -> None:
    assert parser_of_template(chat_template(preset, tokenizer, "tiny").jinja(), "") == "hermes"


def test_vllm_has_every_parser_of_the_table() -> None:
    from vllm.tool_parsers import ToolParserManager

    assert {row.parser for row in TOOL_PARSERS} <= set(ToolParserManager.list_registered())


def test_a_folder_decides_and_engine_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "nothing"}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": ["[TOOL_CALLS]"]}))
    folder = str(tmp_path)
    assert tool_settings("auto", {}, folder) == {}
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": MISTRAL}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    mistral = {"enable_auto_tool_choice": True, "tool_call_parser": "mistral"}
    assert tool_settings("auto", {}, folder) == mistral
    assert tool_settings("none", {}, folder) == {}
    assert tool_settings("hermes", {}, folder) == {**mistral, "tool_call_parser": "hermes"}
    assert tool_settings("auto", {"tool_call_parser": "xlam"}, folder) == {}
    assert tool_settings("auto", {}, "org/model") == {}
    words = command_line(ServeArgs(model=folder), folder, on_cpu=True, native_bf16=False)
    assert words[words.index("--tool-call-parser") + 1] == "mistral"
    assert "--enable-auto-tool-choice" in words


def test_two_keys_for_one_thing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tool_parser excludes engine\.tool_call_parser"):
        load_config(ServeConfig, {"model": "m", "tool_parser": "hermes", "engine": {"tool_call_parser": "xlam"}})
