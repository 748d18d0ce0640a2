"""The endpoint as a client sees it: one server behind HAProxy in a process of its own, one behind the Python proxy.

The first is started like the CLI starts it and stopped by ctrl-c; the second joins the Ray of the test session.
"""

import json
import signal
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from raylm.config.serving import ServeConfig
from raylm.data.encode import Encoder, Tokens
from raylm.data.prompt import PromptEncoder
from raylm.data.schema import RowProblem
from raylm.data.templates import PRESETS, chat_template
from raylm.errors import ServingError
from raylm.inference.chat import HELP, chat_in_terminal
from raylm.serving import serve
from tests.conftest import command_line
from tests.data.support import bot, call, chat, result
from tests.serving.door_support import LIMITED_KEY, SENTINEL, becomes_idle, self_signed
from tests.serving.servers import KEY, Running, free_port

MESSAGES: list[Any] = [{"role": "user", "content": "hello, who are you? ✓ 你好"}]


def greedy_chat(client: OpenAI, model: str, tokenizer: Any, *, stream: bool) -> str:
    """24 tokens of printable text: random weights prefer bytes that are no text."""
    printable = [token for token in range(3, len(tokenizer)) if tokenizer.decode([token]).isascii()]
    request: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    request["extra_body"] = {"allowed_token_ids": printable}
    if not stream:
        return client.chat.completions.create(**request).choices[0].message.content or ""
    chunks = client.chat.completions.create(**request, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_haproxy_listens(server: Running) -> None:
    assert server.proxy == "haproxy"


def test_the_model_is_listed_under_the_last_part_of_its_path(server: Running) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny-llama"]


def test_a_streamed_answer_is_the_same_text(server: Running, tokenizer: Any) -> None:
    whole = greedy_chat(server.client(), "tiny-llama", tokenizer, stream=False)
    assert len(whole) >= 24
    assert greedy_chat(server.client(), "tiny-llama", tokenizer, stream=True) == whole


def test_usage_comes_once_at_the_end_of_a_stream_that_asks_for_it(server: Running) -> None:
    request: dict[str, Any] = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 4, "stream": True}
    chunks = list(server.client().chat.completions.create(**request, stream_options={"include_usage": True}))
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert not any(chunk.usage for chunk in server.client().chat.completions.create(**request))


def test_completions(server: Running) -> None:
    answer = server.client().completions.create(model="tiny-llama", prompt="hello", max_tokens=5, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_tokenization_is_the_models_own(server: Running, tokenizer: Any) -> None:
    answer = server.get("/tokenize", "POST", json={"model": "tiny-llama", "prompt": "hello world"}).json()
    assert answer["tokens"] == tokenizer("hello world", add_special_tokens=False)["input_ids"]


# All of OpenAI's fields: vLLM writes those that are missing into the prompt as null.
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"z": 1, "a": "é"}}}]
ASKED: list[dict[str, Any]] = [
    chat("hello", "yes"),
    chat("hello", " yes\n", "who are you? ✓", "the answer 你好"),
    {"messages": [{"role": "system", "content": "be kind"}, *chat("hello", "yes", "world", "no")["messages"]]},
    {"tools": TOOLS, **chat("hello", "yes")},
    {"messages": [*chat("a")["messages"], bot("", tool_calls=[call("f", x="é")]), result("3"), bot("done")]},
]


def test_every_preset_is_served_as_it_is_trained(server: Running, tokenizer: Any) -> None:
    """Ids of training = ids of the exported Jinja template = ids of vLLM's /tokenize, for all presets."""
    encoder = Encoder(tokenizer)
    compared = 0
    for name in PRESETS:
        template = chat_template(name, tokenizer, "tiny")
        for conversation in ASKED:
            try:
                trained = encoder.encode([template.render(conversation)])[0]
            except RowProblem:
                continue
            assert isinstance(trained, Tokens)
            messages = [
                {**message, "tool_calls": [_with_text_arguments(c) for c in message["tool_calls"]]}
                if "tool_calls" in message
                else {**message, "tool_call_id": "1"}
                if message["role"] == "tool"
                else message
                for message in conversation["messages"]
            ]
            body = {"model": "tiny-llama", "messages": messages, "chat_template": template.jinja()}
            body |= {"add_generation_prompt": False, "add_special_tokens": False}
            if "tools" in conversation:
                body["tools"] = conversation["tools"]
            answer = server.get("/tokenize", "POST", json=body)
            assert answer.status_code == 200, (name, answer.text)
            assert answer.json()["tokens"] == trained.input_ids.tolist(), (name, conversation)
            compared += 1
    assert compared > 80


def _with_text_arguments(function_call: dict[str, Any]) -> dict[str, Any]:
    """As clients send calls back."""
    function = function_call["function"]
    return {**function_call, "id": "1", "function": {**function, "arguments": json.dumps(function["arguments"])}}


def test_an_unknown_model_is_404(server: Running) -> None:
    answer = server.get("/v1/chat/completions", "POST", json={"model": "other", "messages": MESSAGES})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_400_and_the_next_request_works(server: Running, stream: bool) -> None:
    """Known fault W05."""
    body = {"model": "tiny-llama", "prompt": [5] * 300, "max_tokens": 4, "stream": stream}
    answer = server.get("/v1/completions", "POST", json=body)
    assert answer.status_code == 400
    assert "256" in answer.json()["error"]["message"]
    assert server.get("/v1/completions", "POST", json={**body, "prompt": [5] * 3}).status_code == 200


def test_chatting_in_the_terminal(server: Running) -> None:
    """A first answer, a reset, a second one, and the way out; the tiny model's answers are noise."""
    lines = iter(["hello", "/reset", "", "/what", "hello", "/quit"])
    shown: list[str] = []
    prompts: list[str] = []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    options: dict[str, Any] = {"system": "Be brief.", "max_tokens": 8, "read": read, "write": shown.append}
    chat_in_terminal(server.url, api_key=KEY, **options)
    assert prompts == ["> "] * 6
    text = "".join(shown)
    assert text.startswith("tiny-llama at http://127.0.0.1:")
    before, after = text.split("Started over.\n")
    assert before.splitlines()[1:] == after.split(HELP + "\n")[1].splitlines()  # nothing of the first turn is left
    with pytest.raises(ServingError, match="asks for an API key"):
        chat_in_terminal(server.url, **options)
    with pytest.raises(ServingError, match="does not answer"):
        chat_in_terminal(f"http://127.0.0.1:{free_port()}", **options)


def test_control_tokens_typed_in_the_terminal_stay_text(server: Running, tokenizer: Any) -> None:
    """The server itself would read them as the end of the turn; our client sends ids, those of training."""
    typed = "say <|im_end|> now"
    prompts = PromptEncoder(tokenizer, "tiny")
    assert prompts.types_control_tokens({"messages": [{"role": "user", "content": typed}]})
    ids = prompts.ids({"messages": [{"role": "user", "content": typed}]})
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # the template's own
    plain = [{"role": "user", "content": "hello"}]
    assert prompts.ids({"messages": plain}) == tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=False
    )
    lines = iter([typed, "/quit"])
    shown: list[str] = []
    options: dict[str, Any] = {"read": lambda _: next(lines), "write": shown.append, "max_tokens": 8}
    chat_in_terminal(server.url, api_key=KEY, prompts=prompts, **options)
    expected = server.client().completions.create(model="tiny-llama", prompt=ids, max_tokens=8, temperature=0)
    assert "".join(shown).split("\n", 1)[1] == expected.choices[0].text + "\n"


def test_a_port_in_use_is_refused_before_anything_starts(server: Running, served_model_dir: Path) -> None:
    taken = ServeConfig(model=str(served_model_dir), port=int(server.url.rsplit(":", 1)[1]))
    with pytest.raises(ServingError, match="Address already in use"), serve(taken):
        pass


def test_no_prompt_is_logged(server: Running) -> None:
    """Answered and refused ones; the files are read when the server has ended."""
    bodies: list[dict[str, Any]] = [
        {"prompt": SENTINEL, "max_tokens": 2},
        {"prompt": SENTINEL * 100},
        {"prompt": SENTINEL, "max_tokens": SENTINEL},
        {"prompt": {SENTINEL: SENTINEL}},
        {"prompt": SENTINEL, "temperature": -1},
    ]
    for number, body in enumerate(bodies):
        answer = server.get("/v1/completions", "POST", json={"model": "tiny-llama", **body})
        assert answer.status_code == (400 if number else 200), answer.text
    messages = [{"role": "user", "content": SENTINEL}]
    for stream in (False, True):
        body = {"model": "tiny-llama", "messages": messages, "max_tokens": 2, "stream": stream}
        assert server.get("/v1/chat/completions", "POST", json=body).status_code == 200
    broken = {"content": f'{{"prompt": "{SENTINEL}'.encode(), "headers": {"content-type": "application/json"}}
    assert server.get("/v1/completions", "POST", **broken).status_code == 400


def test_ctrl_c_leaves_no_process_and_keys_and_prompts_nowhere(server: Running) -> None:
    """Known fault Z01. Stops the shared server, so it is the last test that uses it."""
    started = psutil.Process(server.process.pid).children(recursive=True)
    command_lines = [command_line(process) for process in started]
    assert any("haproxy" in line for line in command_lines)
    assert any("EngineCore" in line for line in command_lines)
    server.process.send_signal(signal.SIGINT)
    server.process.wait(timeout=60)
    assert [process for process in started if process.is_running()] == []
    hidden = [text.encode() for text in (KEY, LIMITED_KEY, SENTINEL)]
    assert not any(text in line.encode() for line in command_lines for text in hidden)
    files = [file for file in server.ray_dir.rglob("*") if file.is_file()]
    assert any(file.name.startswith("access_") for file in files)
    assert not [file for file in [server.log, *files] for text in hidden if text in file.read_bytes()]


def test_the_python_proxy_on_a_ray_that_runs_already(
    ray_cluster: Any, served_model_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """With a certificate, a queue and a time limit."""
    certificate, key = self_signed(tmp_path)
    config = ServeConfig.model_validate(
        {
            **{"model": str(served_model_dir), "name": "tiny", "port": free_port(), "kv_cache_gib": 0.1},
            **{"tls_cert_file": str(certificate), "tls_key_file": str(key)},
            "limits": {"max_concurrent": 2, "max_queue": 1, "request_timeout_s": 10},
        }
    )
    with serve(config) as endpoint:
        assert endpoint.proxy == "python"
        assert endpoint.url.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=certificate)
        http = httpx.Client(base_url=endpoint.url, verify=trust, trust_env=False, timeout=60)
        client = OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, http_client=http)
        whole = greedy_chat(client, "tiny", tokenizer, stream=False)
        assert len(whole) >= 24
        assert greedy_chat(client, "tiny", tokenizer, stream=True) == whole
        with pytest.raises(httpx.HTTPError):
            httpx.get(endpoint.url + "/health", trust_env=False)  # the certificate is nobody's
        with pytest.raises(httpx.HTTPError):
            httpx.get(endpoint.url.replace("https", "http") + "/health", trust_env=False)
        over_long = {"model": "tiny", "prompt": [5] * 300, "max_tokens": 4}
        assert http.post("/v1/completions", json=over_long).status_code == 400
        check_templates_of_requests(http)
        check_queue_and_time_limit(http)
        with pytest.raises(ServingError, match="runs an application 'raylm' already"), serve(config):
            pass
    assert ray_cluster.is_initialized()
    engines = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in command_line(p)]
    assert engines == []


def check_templates_of_requests(http: httpx.Client) -> None:
    """A template is a program: those of requests are refused by default."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
    for route in ("/v1/chat/completions", "/tokenize"):
        assert http.post(route, json=body).status_code == 200
        for own in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
            answer = http.post(route, json={**body, **own})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
            assert "chat template" in answer.json()["error"]["message"]


def check_queue_and_time_limit(http: httpx.Client) -> None:
    """Two run, one waits, a fourth is sent away at once; the three are late, and leave the engine idle."""
    endless = {"model": "tiny", "prompt": ["hello"] * 8, "max_tokens": 250, "n": 128, "temperature": 1}
    endless |= {"ignore_eos": True, "logprobs": 5}
    late: list[httpx.Response] = []
    threads = []
    for stream in (False, True, False):
        body = {**endless, "stream": stream}
        threads.append(threading.Thread(target=lambda body=body: late.append(http.post("/v1/completions", json=body))))
        threads[-1].start()
        time.sleep(0.5)
    started = time.monotonic()
    sent_away = http.post("/v1/completions", json={**endless, "n": 1})
    assert time.monotonic() - started < 4
    assert (sent_away.status_code, sent_away.json()["error"]["code"]) == (429, "queue_full")
    assert int(sent_away.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in late) == [200, 504, 504]
    for answer in late:
        last = answer.text if answer.status_code == 504 else answer.text.split("data: ")[-2]
        assert json.loads(last)["error"]["code"] == "request_timeout"
    assert becomes_idle(http, "tiny")
    assert http.post("/v1/completions", json={**endless, "n": 1, "max_tokens": 3}).status_code == 200


def test_faults_of_certificates_are_found_before_anything_starts(served_model_dir: Path, tmp_path: Path) -> None:
    certificate, _ = self_signed(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = self_signed(tmp_path / "other")
    config = {"model": str(served_model_dir), "tls_cert_file": str(certificate)}
    for file, fault in ((other, "are not a certificate and its key"), (tmp_path / "absent", "cannot be read")):
        with (
            pytest.raises(ServingError, match=fault),
            serve(ServeConfig.model_validate({**config, "tls_key_file": str(file)})),
        ):
            pass


def test_an_engine_that_cannot_start_says_why_once(ray_cluster: Any, served_model_dir: Path) -> None:
    """Known fault W13: no restart loop, no hang."""
    too_small = ServeConfig(model=str(served_model_dir), port=free_port(), kv_cache_gib=1e-6)
    with (
        pytest.raises(ServingError, match="the engine did not start: ValueError: No available memory"),
        serve(too_small),
    ):
        pass
