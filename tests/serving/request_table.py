"""Requests that a server must answer as the bare vLLM server of the same version does. Plain data.

A row is sent to both servers; the status stands in the row, and the rest of the answer is the bare server's. Greedy
answers are compared word for word, `shape_only` ones by their keys and types. The model's context is 256 tokens.
"""

from dataclasses import dataclass, field
from typing import Any

MODEL = "tiny-llama"
CONTEXT = 256
PICTOGRAPHS = "naïve 你好 👩‍👩‍👧 ✓"
NUMBER: dict[str, Any] = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
NUMBER["additionalProperties"] = False
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "pick", "description": "d", "parameters": NUMBER}}
OTHER_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "drop", "parameters": NUMBER}}
FLAT_TOOL: dict[str, Any] = {"type": "function", "name": "pick", "parameters": NUMBER}
CALL_TEXT = '<tool_call>\n{"name": "pick", "arguments": {"n": 7}}\n</tool_call>'
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "pick", "arguments": '{"n": 7}'}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. body: a JSON value, or bytes sent as they are. text: what the answer says, where that is forced.

    stream_too: the request is sent streamed as well, and the joined text must be that of the whole answer.
    """

    path: str
    body: Any = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    shape_only: bool = False
    stream_too: bool = False
    text: str | None = None


def completion(status: int = 200, *, shape_only: bool = False, stream_too: bool = False, **fields: Any) -> Request:
    text = fields.pop("text", None)
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 8, "temperature": 0, **fields}
    options: dict[str, Any] = {"shape_only": shape_only, "stream_too": stream_too, "text": text}
    return Request(path="/v1/completions", body=body, status=status, **options)


def chat(status: int = 200, *, shape_only: bool = False, stream_too: bool = False, **fields: Any) -> Request:
    text = fields.pop("text", None)
    body = {"model": MODEL, "messages": [user("hello")], "max_tokens": 8, "temperature": 0, **fields}
    options: dict[str, Any] = {"shape_only": shape_only, "stream_too": stream_too, "text": text}
    return Request(path="/v1/chat/completions", body=body, status=status, **options)


def response(status: int = 200, *, shape_only: bool = False, **fields: Any) -> Request:
    body = {"model": MODEL, "input": "hello", "max_output_tokens": 8, "temperature": 0, **fields}
    return Request(path="/v1/responses", body=body, status=status, shape_only=shape_only)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def exactly(text: str) -> dict[str, Any]:
    """Fields that force this answer."""
    return {"structured_outputs": {"choice": [text]}, "max_tokens": 120}


REQUESTS: dict[str, Request] = {
    # Routes without a model's answer.
    "health": Request(path="/health", method="GET"),
    "version": Request(path="/version", method="GET"),
    "models": Request(path="/v1/models", method="GET"),
    "tokenize a prompt": Request(path="/tokenize", body={"model": MODEL, "prompt": f"hello {PICTOGRAPHS}"}),
    "tokenize a chat with token texts": Request(
        path="/tokenize", body={"model": MODEL, "messages": [user("hello")], "return_token_strs": True}
    ),
    "detokenize": Request(path="/detokenize", body={"model": MODEL, "tokens": [40, 41, 42]}),
    # Completions.
    "completion": completion(stream_too=True),
    "completion of token ids": completion(prompt=[40, 41, 42], stream_too=True),
    "completions of several prompts": completion(prompt=["hello", "world"]),
    "completion with n": completion(n=2, temperature=0.7, seed=3, stream_too=True),
    "completion with a seed": completion(temperature=0.9, seed=11, max_tokens=24, stream_too=True),
    "completion with a temperature": completion(temperature=1.0, shape_only=True, ignore_eos=True),
    "completion with logprobs": completion(logprobs=3),
    "completion with prompt_logprobs": completion(prompt_logprobs=2),
    "completion with echo": completion(echo=True, logprobs=1),
    "completion with echo and no new token": completion(echo=True, max_tokens=0),
    "completion with logit_bias": completion(logit_bias={"43": 100}, max_tokens=4, text="IIII"),
    "completion with allowed tokens": completion(allowed_token_ids=[40, 41], max_tokens=12, stream_too=True),
    "completion with min_tokens and ignore_eos": completion(min_tokens=6, ignore_eos=True, stream_too=True),
    "completion with token ids": completion(return_token_ids=True),
    "completion with penalties": completion(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    "completion with an unknown field": completion(no_such_field=1),
    # Stop strings (known faults W01 and W02): the forced text is known, so is what must be left of it.
    "a stop string over several tokens": completion(
        **exactly("ABCDEFGHIJKL"), stop=["DEFGHIJ"], stream_too=True, text="ABC"
    ),
    "stop strings that overlap": completion(**exactly("xyz abc abd"), stop=["abc", "ab"], stream_too=True, text="xyz "),
    "a stop string in the middle of characters of several bytes": completion(
        **exactly(PICTOGRAPHS), stop=["好"], stream_too=True, text="naïve 你"
    ),
    "a stop string that is left in": completion(
        **exactly("one two three"), stop="two", include_stop_str_in_output=True, stream_too=True, text="one two"
    ),
    "a stop string that almost comes": completion(**exactly("ABCDEFG"), stop=["DEFX"], stream_too=True, text="ABCDEFG"),
    "characters of several bytes": chat(**exactly(PICTOGRAPHS), stream_too=True, text=PICTOGRAPHS),
    # Chat.
    "chat": chat(stream_too=True),
    "chat with system and developer": chat(
        messages=[{"role": "system", "content": "be kind"}, {"role": "developer", "content": "and brief"}, user("a")]
    ),
    "chat with n": chat(n=3, temperature=0.7, seed=1, stream_too=True),
    "chat with logprobs": chat(logprobs=True, top_logprobs=3),
    "chat with max_completion_tokens": chat(max_completion_tokens=5, max_tokens=None),
    "chat that goes on with the last message": chat(
        messages=[user("a"), {"role": "assistant", "content": "The"}],
        continue_final_message=True,
        add_generation_prompt=False,
    ),
    "chat with a template of the request": chat(chat_template="{{ messages[0]['content'] }}"),
    # History that a client echoes back (known fault W14).
    "history with parts as content": chat(
        messages=[
            user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]),
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            user("go on"),
        ]
    ),
    "history with a tool's result": chat(
        messages=[
            user("a"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "7"},
        ],
        tools=[TOOL],
    ),
    "history with null fields": chat(
        messages=[
            user("a"),
            {
                "role": "assistant",
                "content": "yes",
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            },
            user("b"),
        ]
    ),
    "history with empty content": chat(messages=[user("a"), {"role": "assistant", "content": ""}, user("b")]),
    # Structured outputs.
    "JSON schema": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
        max_tokens=60,
        stream_too=True,
    ),
    "JSON object": chat(response_format={"type": "json_object"}, max_tokens=20),
    "regex": completion(structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}, max_tokens=20, stream_too=True),
    "choice": completion(structured_outputs={"choice": ["yes", "no"]}, max_tokens=20, stream_too=True),
    "grammar": completion(
        structured_outputs={"grammar": 'root ::= "SELECT " column\ncolumn ::= "a" | "b"'},
        max_tokens=20,
        stream_too=True,
    ),
    # Tools.
    "tools, none chosen": chat(tools=[TOOL], tool_choice="none"),
    "tools, the model's choice, no call": chat(tools=[TOOL]),
    "tools, the model's choice, a call": chat(tools=[TOOL, OTHER_TOOL], tool_choice="auto", **exactly(CALL_TEXT)),
    "tools, a named one": chat(
        tools=[TOOL, OTHER_TOOL], tool_choice={"type": "function", "function": {"name": "pick"}}, max_tokens=60
    ),
    "tools, one of them required": chat(tools=[TOOL], tool_choice="required", max_tokens=60),
    "streamed call, the model's choice": chat(tools=[TOOL], tool_choice="auto", **exactly(CALL_TEXT), stream=True),
    "streamed call, a named tool": chat(
        tools=[TOOL], tool_choice={"type": "function", "function": {"name": "pick"}}, max_tokens=60, stream=True
    ),
    "streamed call, required": chat(tools=[TOOL], tool_choice="required", max_tokens=60, stream=True),
    # Usage in streams (known fault W03).
    "stream without stream_options": chat(stream=True),
    "stream with empty stream_options": chat(stream=True, stream_options={}),
    "stream with usage": chat(stream=True, stream_options={"include_usage": True}),
    "stream with usage and n": chat(stream=True, stream_options={"include_usage": True}, n=2, temperature=0.7, seed=1),
    "stream with usage in each chunk": completion(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}
    ),
    "stream of a completion with usage": completion(stream=True, stream_options={"include_usage": True}),
    # Responses.
    "response": response(),
    "response to messages": response(input=[user("hello")], instructions="be kind"),
    "response with a schema": response(
        text={"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}, max_output_tokens=60
    ),
    "response with a named tool": response(
        tools=[FLAT_TOOL], tool_choice={"type": "function", "name": "pick"}, max_output_tokens=60
    ),
    "streamed response": response(stream=True),
    # The edge of the context (known fault W05).
    "prompt that leaves one token": completion(prompt=[40] * (CONTEXT - 1), max_tokens=1),
    "prompt that leaves one token, max_tokens null": completion(prompt=[40] * (CONTEXT - 1), max_tokens=None),
    "prompt with max_tokens null": completion(prompt=[40] * (CONTEXT - 6), max_tokens=None, ignore_eos=True),
    "chat with max_tokens null": chat(messages=[user("a" * 200)], max_tokens=None, ignore_eos=True),
    "prompt as long as the context": completion(400, prompt=[40] * CONTEXT, max_tokens=1),
    "prompt longer than the context": completion(400, prompt=[40] * (CONTEXT + 1), max_tokens=1),
    "prompt longer than the context, streamed": completion(400, prompt=[40] * 300, stream=True),
    "max_tokens over the context is cut to what is left": completion(max_tokens=CONTEXT),
    "chat longer than the context": chat(400, messages=[user("a b " * 400)]),
    "chat longer than the context, streamed": chat(400, messages=[user("a b " * 400)], stream=True),
}

# What no client should send. Every one gets its 4xx, and the server goes on.
ODD_REQUESTS: dict[str, Request] = {
    "unknown model": chat(404, model="other"),
    "unknown model, completion": completion(404, model="other"),
    "unknown model, tokenize": Request(path="/tokenize", body={"model": "other", "prompt": "a"}, status=404),
    "unknown route": Request(path="/v1/nothing", method="GET", status=404),
    "wrong method": Request(path="/v1/chat/completions", method="GET", status=405),
    "wrong method, models": Request(path="/v1/models", body={}, status=405),
    "wrong content type": Request(
        path="/v1/chat/completions", body=b"{}", headers={"content-type": "text/plain"}, status=400
    ),
    "malformed JSON": Request(
        path="/v1/chat/completions", body=b'{"model": ', headers={"content-type": "application/json"}, status=400
    ),
    "bytes that are no text": Request(
        path="/v1/chat/completions", body=b"\xff\xfe\x00", headers={"content-type": "application/json"}, status=400
    ),
    "empty body": Request(path="/v1/completions", body=b"", headers={"content-type": "application/json"}, status=400),
    "a list as body": Request(path="/v1/completions", body=[1, 2], status=400),
    "no messages": Request(path="/v1/chat/completions", body={"model": MODEL}, status=400),
    "empty messages": chat(400, messages=[]),
    "messages as text": chat(400, messages="hello"),
    "message without role": chat(400, messages=[{"content": "a"}]),
    "role as number": chat(400, messages=[{"role": 3, "content": "a"}]),
    "unknown part of content": chat(400, messages=[user([{"type": "hologram", "hologram": "a"}])]),
    "picture for a model of text": chat(
        400, messages=[user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}])]
    ),
    "no prompt": Request(path="/v1/completions", body={"model": MODEL}, status=400),
    "empty prompt": completion(400, prompt=[]),
    "token id outside the vocabulary": completion(400, prompt=[10_000_000]),
    "negative token id": completion(400, prompt=[-1]),
    "temperature below 0": completion(400, temperature=-1),
    "temperature as text": completion(400, temperature="hot"),
    "top_p above 1": completion(400, top_p=1.5),
    "max_tokens below 0": completion(400, max_tokens=-5),
    "max_tokens that is huge": completion(400, max_tokens=10**18),
    "seed that is huge": completion(400, seed=2**70),
    "n of 0": completion(400, n=0),
    "n above 1 of the likeliest answer": completion(400, n=2),
    "n that is huge": completion(400, n=10**6, temperature=1),
    "logprobs above the limit": completion(400, logprobs=10_000),
    "min_tokens above max_tokens": completion(400, min_tokens=9, max_tokens=3),
    "logit_bias outside the vocabulary": completion(400, logit_bias={"999999": 1}),
    "logit_bias with words": completion(400, logit_bias={"word": 1}),
    "allowed tokens outside the vocabulary": completion(400, allowed_token_ids=[10_000_000]),
    "regex that does not parse": completion(400, structured_outputs={"regex": "[a-"}),
    "grammar that does not parse": completion(400, structured_outputs={"grammar": "root := ???"}),
    "schema that is none": completion(400, structured_outputs={"json": {"type": "hologram"}}),
    "two kinds of structured output": completion(400, structured_outputs={"regex": "a", "choice": ["b"]}),
    "tool choice without tools": chat(400, tool_choice="auto"),
    "named tool that is not there": chat(
        400, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "none"}}
    ),
    "stream_options without stream": chat(400, stream_options={"include_usage": True}),
    "response of an earlier one that is gone": response(404, previous_response_id="resp_gone"),
    "no such response": Request(path="/v1/responses/resp_gone", method="GET", status=404),
    "detokenize outside the vocabulary": Request(
        path="/detokenize", body={"model": MODEL, "tokens": [10_000_000_000]}, status=400
    ),
    "template of the request that runs code": chat(400, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template of the request that does not parse": chat(400, chat_template="{% if %}"),
}
