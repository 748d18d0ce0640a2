"""The official `openai` client, its streaming helpers and its parsing of answers, unchanged against our server."""

import json
from typing import Any, Literal

import pytest
from openai import BadRequestError, NotFoundError, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from tests.serving.request_table import CALL_TEXT, MODEL, TOOL, user
from tests.serving.servers import Running

MESSAGES: list[Any] = [user("hello")]


class Answer(BaseModel):
    colour: Literal["red", "blue"]
    sure: bool


class Pick(BaseModel):
    """Picks a number."""

    n: Literal[7]


PICK = pydantic_function_tool(Pick, name="pick")


@pytest.fixture
def client(server: Running) -> OpenAI:
    return server.client()


def test_chat_is_parsed_into_a_pydantic_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Answer, max_tokens=60, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_a_streamed_chat_is_parsed_and_says_what_the_whole_one_says(client: OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 60, "temperature": 0}
    with client.chat.completions.stream(**request, response_format=Answer) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Answer)
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    whole = client.chat.completions.parse(**request, response_format=Answer)
    assert final.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
def test_a_tool_call_is_parsed_whole_and_streamed(client: OpenAI, choice: Any) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 180, "temperature": 0}
    request |= {"tools": [PICK], "tool_choice": choice}
    called = client.chat.completions.parse(**request).choices[0].message.tool_calls
    assert called is not None
    assert called[0].function.parsed_arguments == Pick(n=7)
    with client.chat.completions.stream(**request) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0].message.tool_calls
    assert final is not None
    assert [call.function.parsed_arguments for call in final] == [Pick(n=7)] * len(called)
    assert [event.name for event in done] == ["pick"] * len(called)


def test_a_call_that_the_model_chose_is_the_same_whole_and_in_deltas(client: OpenAI) -> None:
    """The text of the answer is forced; that it is a call is the parser's finding."""
    request: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 120, "temperature": 0}
    request |= {"tools": [TOOL], "tool_choice": "auto", "extra_body": {"structured_outputs": {"choice": [CALL_TEXT]}}}
    choice = client.chat.completions.create(**request).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (called,) = choice.message.tool_calls or ()
    assert called.type == "function"
    assert (called.function.name, json.loads(called.function.arguments)) == ("pick", {"n": 7})
    names, arguments, reasons = [], "", []
    for chunk in client.chat.completions.create(**request, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.function is not None
            names += [part.function.name] if part.function.name else []
            arguments += part.function.arguments or ""
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert (names, json.loads(arguments), reasons) == (["pick"], {"n": 7}, ["tool_calls"])


def test_responses_whole_streamed_and_parsed(client: OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "input": "hello", "max_output_tokens": 60, "temperature": 0}
    whole = client.responses.create(**request)
    with client.responses.stream(**request) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert deltas == final.output_text == whole.output_text
    parsed = client.responses.parse(**request, text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)


def test_logprobs_n_and_usage_come_typed(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, n=2, temperature=0.5, seed=1, logprobs=True, top_logprobs=2
    )
    assert len(answer.choices) == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(
        len(choice.logprobs.content or ()) for choice in answer.choices if choice.logprobs
    )


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
