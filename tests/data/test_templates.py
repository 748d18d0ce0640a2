import copy
from typing import Any

import pytest

from raylm.data.schema import RowProblem
from raylm.data.templates import chat_template
from raylm.data.templates.jinja import TokenizerTemplate, _Renderer
from raylm.errors import ModelError
from tests.data.support import bot, call, result, user

CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": " yes\nand "},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "the answer"},
]


def _with(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def _said(template: TokenizerTemplate, messages: list[Any]) -> list[str]:
    return [segment.text for segment in template.render({"messages": messages}) if segment.loss]


def test_loss_is_on_answers_and_their_end_token(tokenizer: Any) -> None:
    template = TokenizerTemplate(tokenizer, "m")
    segments = template.render({"messages": CHAT})
    assert "".join(s.text for s in segments) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert [s.text for s in segments if s.loss] == [" yes\nand <|im_end|>", "the answer<|im_end|>"]
    assert template.end_token() == "<|im_end|>"


def test_a_default_system_prompt_and_stripping_are_followed(tokenizer: Any) -> None:
    """D06: no generation tags are needed."""
    jinja = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = TokenizerTemplate(_with(tokenizer, jinja), "m")
    assert _said(template, CHAT) == ["yes\nand<|im_end|>", "the answer<|im_end|>"]
    assert template.render({"messages": CHAT})[0].text.startswith("<|im_start|>system\nBe kind.")


def test_the_end_token_may_differ_from_eos(tokenizer: Any) -> None:
    """D03."""
    other = _with(tokenizer, tokenizer.chat_template)
    other.eos_token = "<|endoftext|>"
    assert TokenizerTemplate(other, "m").end_token() == "<|im_end|>"


def test_an_answer_without_end_token(tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    template = TokenizerTemplate(_with(tokenizer, jinja), "m")
    assert _said(template, CHAT[2:]) == ["the answer"]
    assert template.end_token() is None


THINKING = (
    "{% set q = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set q.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 > q.last %}"
    "{% if '</think>' not in c %}<think>\n\n</think>\n\n{% endif %}{{ c }}"
    "{% elif m.role == 'assistant' %}{{ c.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ c }}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_rewritten_earlier_turns_are_found(tokenizer: Any) -> None:
    """Earlier thinking is cut and the last answer gets an empty block, which the model must write: it carries loss."""
    template = TokenizerTemplate(_with(tokenizer, THINKING), "m")
    messages = [user("a"), bot("<think>\nhm\n</think>\n\nyes"), user("b"), bot("no")]
    assert _said(template, messages) == ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]
    whole = "".join(segment.text for segment in template.render({"messages": messages}))
    assert whole == _with(tokenizer, THINKING).apply_chat_template(messages, tokenize=False)


def test_an_answer_that_closes_thinking_is_not_wrapped_again(tokenizer: Any) -> None:
    """D23: what is trained is the prompt and what the model wrote after it."""
    opens = THINKING.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    answer = "2+2=4\n</think>\n\nThe answer is 4."
    template = TokenizerTemplate(_with(tokenizer, opens), "m")
    with pytest.raises(RowProblem, match="is not exact"):  # this template does not write <think> itself
        template.render({"messages": [user("a"), bot(answer)]})
    segments = template.render({"messages": [user("a"), bot("<think>\n" + answer)]})
    prompt = template.prompt({"messages": [user("a")]})
    assert segments[0].text == prompt
    assert segments[1].text == answer + "<|im_end|>"


def test_a_template_whose_answers_cannot_be_placed_is_refused_by_name(tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}...{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = TokenizerTemplate(_with(tokenizer, jinja), "my-model")
    with pytest.raises(RowProblem, match="the chat template of my-model rewrites turns"):
        template.render({"messages": CHAT})
    assert _said(template, CHAT[:2]) == [" yes\nand <|im_end|>"]


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ ARGUMENTS }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("arguments", ["c.function.arguments | tojson", "'' + c.function.arguments"])
def test_calls_are_shown_once_as_json(tokenizer: Any, arguments: str) -> None:
    """D12, D13: templates that print arguments as JSON, and older ones that expect them as text."""
    template = TokenizerTemplate(_with(tokenizer, CALLS.replace("ARGUMENTS", arguments)), "m")
    messages = [user("a"), bot("", tool_calls=[call("f", city="Orléans")]), result("3"), bot("done")]
    assert _said(template, messages) == ['<call>f {"city": "Orléans"}</call><|im_end|>', "done<|im_end|>"]


def test_a_template_without_calls_is_refused_for_rows_that_call(tokenizer: Any) -> None:
    messages = [user("a"), bot("", tool_calls=[call("look_up", x=1)])]
    with pytest.raises(RowProblem, match="leaves the call of look_up out"):
        TokenizerTemplate(tokenizer, "m").render({"messages": messages})


def test_a_template_may_refuse_a_conversation(tokenizer: Any) -> None:
    jinja = "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + tokenizer.chat_template
    with pytest.raises(RowProblem, match="refuses it: too many turns"):
        TokenizerTemplate(_with(tokenizer, jinja), "m").render({"messages": CHAT})


def test_no_template_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="its tokenizer has no chat template"):
        TokenizerTemplate(_with(tokenizer, None), "my-model")


def test_templates_run_in_a_sandbox(tokenizer: Any) -> None:
    """Z03."""
    jinja = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + tokenizer.chat_template
    with pytest.raises((ModelError, RowProblem)):
        TokenizerTemplate(_with(tokenizer, jinja), "m").render({"messages": CHAT})


@pytest.mark.parametrize("answer_follows", [False, True])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "add", "parameters": {}}}]])
@pytest.mark.parametrize(
    "jinja",
    [
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}"
        "{% endfor %}{{ bos_token }}{{ tools | tojson }}{{ documents }}{{ missing is defined }}",
        "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endmacro %}{% for m in messages %}"
        "{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ range(3) | list }}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endif %}{% endfor %}",
        {"default": "d{{ messages[0].content }}", "tool_use": "t{{ messages[0].content }}{{ tools[0].type }}"},
    ],
)
def test_rendering_is_that_of_apply_chat_template(tokenizer: Any, jinja: Any, tools: Any, answer_follows: bool) -> None:
    other = _with(tokenizer, jinja)
    render = _Renderer(other)
    for _ in range(2):  # nothing is kept from one conversation to the next
        assert render(CHAT, tools, answer_follows) == other.apply_chat_template(
            CHAT, tools=tools, tokenize=False, add_generation_prompt=answer_follows
        )


def test_a_template_stays_in_the_sandbox(tokenizer: Any) -> None:
    for jinja in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ messages.__class__.__mro__[1] }}"):
        with pytest.raises(ModelError, match="unsafe"):
            TokenizerTemplate(_with(tokenizer, jinja), "m")


def test_a_template_without_a_place_for_tools_or_calls_refuses_them(tokenizer: Any) -> None:
    """ChatML alone would leave the tools out without a word; joined by +, a call without content breaks it."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    with pytest.raises(RowProblem, match="leaves the tools out"):
        TokenizerTemplate(tokenizer, "m").render({"messages": CHAT, "tools": tools})
    jinja = tokenizer.chat_template.replace("{{ message['content'] }}", "{{ '' + message['content'] }}")
    calling = [user("1 + 2?"), bot("", tool_calls=[call("add", a=1)]), result("3"), bot("3")]
    with pytest.raises(RowProblem, match=r"fails on its tool calls|leaves the call of add out"):
        TokenizerTemplate(_with(tokenizer, jinja), "m").render({"messages": calling})


def test_a_preset_whose_tokens_the_tokenizer_lacks_warns(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    chat_template("qwen2_5", tokenizer, "m")
    assert not caplog.messages
    chat_template("llama3", tokenizer, "m")
    assert any("m has no token <|eot_id|>, which the template llama3 uses" in text for text in caplog.messages)
