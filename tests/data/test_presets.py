"""Every preset: its text, and the same text from its Jinja form."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.data import templates
from raylm.data.schema import RowProblem
from raylm.data.templates.table import chat_template, one_line, read_template
from raylm.data.templates.to_jinja import to_jinja
from raylm.errors import DataError, ModelError
from tests.data.support import bot, call, chat, result, user

TWO = {"system": "S", **chat("q1", "a1", "q2", "a2")}
QWEN = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[a1<|im_end|>]\n"
QWEN += "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[a2<|im_end|>]\n"
CHATML = "<|im_start|>system\nS<|im_end|>\n" + QWEN
LLAMA3 = "".join(
    f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"
    for role, text in [
        ("system", "S<|eot_id|>"),
        ("user", "q1<|eot_id|>"),
        ("assistant", "[a1<|eot_id|>]"),
        ("user", "q2<|eot_id|>"),
        ("assistant", "[a2<|eot_id|>]"),
    ]
)
DEEPSEEK2 = "<s>S\n\nUser: q1\n\nAssistant: [a1</s>]User: q2\n\nAssistant: [a2</s>]"
DEEPSEEK3 = (
    "<s>S<｜User｜>q1<｜Assistant｜>[a1<｜end▁of▁sentence｜>]<｜User｜>q2<｜Assistant｜>[a2<｜end▁of▁sentence｜>]"
)
GOLDEN = {
    "chatglm3": "[gMASK]sop<|system|>\n S<|user|>\n q1<|assistant|>\n [a1]<|user|>\n q2<|assistant|>\n [a2]",
    "chatml": CHATML,
    "deepseek": DEEPSEEK2,
    "deepseek_v2": DEEPSEEK2,
    "deepseek_v3": DEEPSEEK3,
    "deepseek_r1": DEEPSEEK3,
    "deepseek_r1_distill": DEEPSEEK3,
    "gemma": (
        "<s>S<start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n[a1<end_of_turn>]\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n[a2<end_of_turn>]\n"
    ),
    "gemma3": (
        "<s><start_of_turn>user\nS\n\nq1<end_of_turn>\n<start_of_turn>model\n[a1<end_of_turn>]\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n[a2<end_of_turn>]\n"
    ),
    "hymba": (
        "<extra_id_0>SystemS\n\n<extra_id_1>User\nq1\n<extra_id_1>Assistant\n[a1]\n"
        "<extra_id_1>User\nq2\n<extra_id_1>Assistant\n[a2</s>]"
    ),
    "internlm2": "<s>" + CHATML,
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq1 [/INST][a1</s>]<s>[INST] q2 [/INST][a2</s>]",
    "llama3": "<s>" + LLAMA3,
    "llama3_for_tool": "<s>" + LLAMA3,
    "phi3": (
        "<s><|system|>\nS<|end|>\n<|user|>\nq1<|end|>\n<|assistant|>\n[a1<|end|>]\n"
        "<|user|>\nq2<|end|>\n<|assistant|>\n[a2<|end|>]\n</s>"
    ),
    "qwen2": CHATML,
    "qwen2_5": CHATML,
    "qwen2_5_1m": CHATML,
    "qwen2_5_math": CHATML,
    "qwen2_for_tool": CHATML,
    "qwen3": CHATML.replace("[a2", "[<think>\n\n</think>\n\na2"),
    "qwen_qwq": CHATML,
    "yi": CHATML,
    "yi1_5": "S" + QWEN,
    "zephyr": "<|system|>\nS</s>\n<|user|>\nq1</s>\n<|assistant|>\n[a1</s>]\n<|user|>\nq2</s>\n<|assistant|>\n[a2</s>]",
}
NO_SYSTEM = {
    "disable": "<s>q1[a1</s>]<s>q2[a2</s>]",
    "empty": "<s>q1[a1</s>]<s>q2[a2</s>]",
    "empty_no_special_tokens": "q1[a1]q2[a2]",
    "hymba": GOLDEN["hymba"].replace("SystemS", "System"),
    "llama2": "<s>[INST] q1 [/INST][a1</s>]<s>[INST] q2 [/INST][a2</s>]",
    "qwen2": QWEN,
    "qwen2_5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n" + QWEN
    ),
    "qwen2_5_1m": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + QWEN,
    "qwen2_5_math": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n" + QWEN
    ),
    "qwen_qwq": (
        "<|im_start|>system\nYou are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
        "You should think step-by-step.<|im_end|>\n" + QWEN
    ),
    "qwen3": QWEN.replace("[a2", "[<think>\n\n</think>\n\na2"),
    "zephyr": "<|user|>\nq1</s>\n<|assistant|>\n[a1</s>]\n<|user|>\nq2</s>\n<|assistant|>\n[a2</s>]",
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "é"}}}, {"name": "g"}]
ASKS = {
    "tools": TOOLS,
    "messages": [
        user("q"),
        bot("well", tool_calls=[call("f", city="Orléans"), call("g")]),
        result("r1"),
        result("r2"),
        bot("done"),
    ],
}
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "é"}}}\n{"name": "g"}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_CALLS = (
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[well\n"
    '<tool_call>\n{"name": "f", "arguments": {"city": "Orléans"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>]\n'
    "<|im_start|>user\n<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n[done<|im_end|>]\n"
)
WITH_TOOLS = {
    "qwen2_5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
        + QWEN_TOOLS
        + QWEN_CALLS
    ),
    "qwen3": ("<|im_start|>system\n" + QWEN_TOOLS + QWEN_CALLS.replace("[done", "[<think>\n\n</think>\n\ndone")),
    "qwen2_for_tool": (
        '<|im_start|>system\n{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "é"}}},'
        '{"name": "g"}<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[well\n'
        '{"name": "f", "arguments": {"city": "Orléans"}}\n{"name": "g", "arguments": {}}<|im_end|>]\n'
        "<|im_start|>tool\nr1<|im_end|>\n<|im_start|>tool\nr2<|im_end|>\n<|im_start|>assistant\n[done<|im_end|>]\n"
    ),
    "hymba": (
        '<extra_id_0>System\n<tool> {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "é"}}} '
        '</tool>\n<tool> {"name": "g"} </tool>\n\n<extra_id_1>User\nq\n<extra_id_1>Assistant\n[well\n'
        '{"name": "f", "arguments": {"city": "Orléans"}}\n{"name": "g", "arguments": {}}]\n'
        "<extra_id_1>Tool\nr1\n<extra_id_1>Tool\nr2\n<extra_id_1>Assistant\n[done</s>]"
    ),
}
DEEPSEEK_CALLS = (
    "<s><｜User｜>q<｜Assistant｜>[well<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"city": "Orléans"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>]<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>r1"
    "<｜tool▁output▁end｜>\n<｜tool▁output▁begin｜>r2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>[done<｜end▁of▁sentence｜>]"
)


def _shown(name: str, conversation: Any, **options: Any) -> str:
    segments = templates.render(
        templates.get_template(name), conversation, bos_token="<s>", eos_token="</s>", **options
    )
    return "".join(f"[{segment.text}]" if segment.loss else segment.text for segment in segments)


@pytest.mark.parametrize("name", list(GOLDEN))
def test_text_and_loss_with_a_system_text(name: str) -> None:
    """D20. Brackets stand around what carries loss."""
    assert _shown(name, TWO) == GOLDEN[name]
    as_message = {"messages": [{"role": "system", "content": "S"}, *TWO["messages"]]}
    assert _shown(name, as_message) == GOLDEN[name]


@pytest.mark.parametrize("name", list(NO_SYSTEM))
def test_text_and_loss_without_a_system_text(name: str) -> None:
    assert _shown(name, chat("q1", "a1", "q2", "a2")) == NO_SYSTEM[name]
    assert _shown(name, {"system": "  ", **chat("q1", "a1", "q2", "a2")}) == NO_SYSTEM[name]


@pytest.mark.parametrize("name", list(WITH_TOOLS))
def test_tools_calls_and_results(name: str) -> None:
    assert _shown(name, ASKS) == WITH_TOOLS[name]


def test_deepseek_calls_and_results() -> None:
    without = {"messages": ASKS["messages"]}
    assert _shown("deepseek_v3", without) == DEEPSEEK_CALLS
    assert _shown("deepseek_r1", without) == DEEPSEEK_CALLS.replace(
        "end｜>\n<｜tool▁output▁b", "end｜><｜tool▁output▁b"
    )


def test_every_preset_has_a_golden_text() -> None:
    assert set(GOLDEN) | set(NO_SYSTEM) == set(templates.PRESETS)
    assert len(templates.PRESETS) == 28


def test_thinking() -> None:
    messages = [user("q1"), bot("<think>\nhm\n</think>\n\na1"), user("q2"), bot("<think>\nwell\n</think>\n\na2")]
    shown = _shown("qwen3", {"messages": messages})
    assert "[a1<|im_end|>]" in shown
    assert "[<think>\nwell\n</think>\n\na2<|im_end|>]" in shown
    apart = [user("q1"), bot("a1", reasoning="hm"), user("q2"), bot("a2", reasoning="well")]
    assert _shown("qwen3", {"messages": apart}) == shown
    assert "</think>" not in _shown("deepseek_r1", {"messages": messages})


@pytest.mark.parametrize(
    ("name", "conversation", "problem"),
    [
        ("empty", TWO, "has a system text, for which the template empty has no place"),
        ("llama3", ASKS, "has tools, for which the template llama3 has no place"),
        ("llama3", {"messages": ASKS["messages"]}, "message 1 calls tools, for which the template llama3"),
        ("chatml", {"messages": [user("a"), bot("b", reasoning="c")]}, "message 1 has reasoning"),
        ("gemma3", {"messages": [user("a"), user("b"), bot("c")]}, "message 1 is a second user turn"),
        ("llama2", {"system": "S", "messages": [bot("a")]}, "begins without a user turn"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(name: str, conversation: Any, problem: str) -> None:
    with pytest.raises(RowProblem) as caught:
        _shown(name, conversation)
    assert str(caught.value).startswith(problem)


def test_placeholders_in_the_data_are_text() -> None:
    odd = {"system": "{content} {bos}", **chat("{content}{eos}", "{name} {arguments}")}
    assert "{content}{eos}" in _shown("chatml", odd)
    assert "[{name} {arguments}<|im_end|>]" in _shown("chatml", odd)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CALL = st.builds(lambda name, value: call(name, x=value), st.sampled_from(["f", "g"]), TEXT)


@st.composite
def conversations(draw: Any) -> dict[str, Any]:
    messages: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXT)))
        if draw(st.booleans()) and draw(st.booleans()):
            messages.append(bot(draw(TEXT), tool_calls=draw(st.lists(CALL, min_size=1, max_size=2))))
            messages += [result(draw(TEXT)) for _ in messages[-1]["tool_calls"]]
        answer = draw(TEXT)
        messages.append(bot("<think>\n" + draw(TEXT) + "\n</think>\n\n" + answer if draw(st.booleans()) else answer))
    system = draw(st.none() | TEXT)
    tools = draw(st.sampled_from([[], TOOLS]))
    start = [{"role": "system", "content": system}] if system is not None else []
    return {"messages": [*start, *messages], "tools": tools}


@pytest.mark.parametrize("name", list(templates.PRESETS))
@settings(max_examples=40, deadline=None)
@given(conversation=conversations(), prompt=st.booleans())
def test_the_jinja_form_renders_the_same(tokenizer: Any, name: str, conversation: Any, prompt: bool) -> None:
    """What is served is what was trained; and what one refuses the other refuses."""
    import jinja2

    preset = templates.get_template(name)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    try:
        ours = "".join(
            segment.text
            for segment in templates.render(
                preset, conversation, bos_token=bos, eos_token=eos, add_generation_prompt=prompt
            )
        )
    except RowProblem:
        ours = None
    try:
        theirs = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation["tools"] or None,
            chat_template=to_jinja(preset),
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except jinja2.exceptions.TemplateError:
        theirs = None
    assert ours == theirs


def test_a_prompt_begins_the_rendering(tokenizer: Any) -> None:
    """A header's last space is left out of prompts: a tokenizer joins it to the answer's first word."""
    for name in templates.PRESETS:
        template = chat_template(name, tokenizer, "m")
        conversation = chat("hello", "the answer")
        whole = "".join(segment.text for segment in template.render(conversation))
        assert whole.startswith(template.prompt({"messages": conversation["messages"][:1]}))


def test_one_line_and_yaml_templates(tmp_path: Path, tokenizer: Any) -> None:
    line = read_template("###Human: {input_text}###Assistant:")
    assert [s.text for s in templates.render(line, chat("q", "a"), bos_token=None, eos_token="<e>")] == [
        "###Human: q###Assistant:",
        "a<e>",
    ]
    assert one_line("Q {input_text} A ", end="\n").generation_prompt == " A"
    file = tmp_path / "mine.yaml"
    file.write_text("prompt: '###Human: {input_text}###Assistant:'\nend: '###'\n")
    assert read_template(str(file)).end == "###"
    file.write_text("base: qwen2_5\ndefault_system: Be kind.\n")
    assert "Be kind." in chat_template(str(file), tokenizer, "m").prompt(chat("q"))
    file.write_text("user: '<u>{content}'\nheader: '<a>'\nend: '{eos}'\n")
    assert chat_template(str(file), tokenizer, "m").prompt(chat("q")) == "<u>q<a>"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base: qwen9", r"'qwen9' is no template. Did you mean qwen3\?"),
        ("usr: x", r"unknown key usr. Did you mean user\?"),
        ("user: x\nheader: y", "user must hold {content} once"),
        ("user: '{content}'", "is not a whole template"),
        ("[1]", "is not a mapping"),
        ("a: [", "is not valid YAML"),
        ("base: qwen3\ntools: {eac: x}", r"tools: unknown key eac. Did you mean each\?"),
    ],
)
def test_faulty_yaml_templates(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=problem.replace("{", r"\{")):
        read_template(str(file))


def test_unknown_presets_name_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"'llama_3' is no template. Did you mean llama3\?"):
        templates.get_template("llama_3")
    import copy

    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(ModelError, match="has no end token, which the template llama2 needs"):
        chat_template("llama2", other, "m")
