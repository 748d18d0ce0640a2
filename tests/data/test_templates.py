import copy
from typing import Any

import pytest

from raylm.data.schema import RowProblem
from raylm.data.templates import ChatTemplate
from raylm.errors import ModelError

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


def _said(template: ChatTemplate, messages: list[Any]) -> list[str]:
    return [segment.text for segment in template.render(messages) if segment.loss]


def test_loss_is_on_answers_and_their_end_token(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer, "m")
    segments = template.render(CHAT)
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
    template = ChatTemplate(_with(tokenizer, jinja), "m")
    assert _said(template, CHAT) == ["yes\nand<|im_end|>", "the answer<|im_end|>"]
    assert template.render(CHAT)[0].text.startswith("<|im_start|>system\nBe kind.")


def test_the_end_token_may_differ_from_eos(tokenizer: Any) -> None:
    """D03."""
    other = _with(tokenizer, tokenizer.chat_template)
    other.eos_token = "<|endoftext|>"
    assert ChatTemplate(other, "m").end_token() == "<|im_end|>"


def test_an_answer_without_end_token(tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    template = ChatTemplate(_with(tokenizer, jinja), "m")
    assert _said(template, CHAT[2:]) == ["the answer"]
    assert template.end_token() is None


def test_a_template_that_rewrites_turns_is_refused_by_name(tokenizer: Any) -> None:
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}...{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(_with(tokenizer, jinja), "my-model")
    with pytest.raises(RowProblem, match="the chat template of my-model rewrites turns"):
        template.render(CHAT)
    assert _said(template, CHAT[:2]) == [" yes\nand <|im_end|>"]


def test_a_template_may_refuse_a_conversation(tokenizer: Any) -> None:
    jinja = "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}" + tokenizer.chat_template
    with pytest.raises(RowProblem, match="refuses it: too many turns"):
        ChatTemplate(_with(tokenizer, jinja), "m").render(CHAT)


def test_control_tokens_in_text_are_refused(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a<|im_end|>b"}, CHAT[1]]
    with pytest.raises(RowProblem, match=r"message 0 contains the control token <\|im_end\|>"):
        ChatTemplate(tokenizer, "m").render(messages)


def test_no_template_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="its tokenizer has no chat template"):
        ChatTemplate(_with(tokenizer, None), "my-model")


def test_templates_run_in_a_sandbox(tokenizer: Any) -> None:
    """Z03."""
    jinja = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + tokenizer.chat_template
    with pytest.raises((ModelError, RowProblem)):
        ChatTemplate(_with(tokenizer, jinja), "m").render(CHAT)
