"""The endpoint as a client sees it: one server behind HAProxy in a process of its own, one behind the Python proxy.

The first is started like the CLI starts it and stopped by ctrl-c; the second joins the Ray of the test session.
"""

import datetime
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI, RateLimitError

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

KEY = "s3cret-" + "k" * 24
LIMITED_KEY = "s3cret-" + "l" * 24
KEYS = f"""
- {{name: main, key: {KEY}}}
- {{name: limited, key: {LIMITED_KEY}, requests_per_minute: 2, tokens_per_minute: 60000}}
"""
SENTINEL = "sentinel of a prompt"
PROGRAM = """
import sys
from raylm.config import ServeConfig, load_config
from raylm.serving import serve
from tests.conftest import command_line

with serve(load_config(ServeConfig, {}, sys.argv[1:])) as server:
    print(server.proxy, server.url, flush=True)
    server.wait()
"""
ALL = list(range(3, 259))
MESSAGES: list[Any] = [{"role": "user", "content": "hello, who are you? ✓ 你好"}]


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    proxy: str
    ray_dir: Path
    log: Path

    def get(
        self, path: str, method: str = "GET", key: str | None = KEY, headers: Any = None, **options: Any
    ) -> httpx.Response:
        headers = {**(headers or {}), **({"authorization": f"Bearer {key}"} if key else {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, trust_env=False, **options)

    def logged(self, request_id: str) -> dict[str, Any]:
        """The line that a request left in the access log, when it is over."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for file in self.ray_dir.rglob("access_raylm_engine_*.log"):
                for line in file.read_text().splitlines():
                    if json.loads(line)["request_id"] == request_id:
                        return json.loads(line)
            time.sleep(0.1)
        raise AssertionError(f"{request_id} is not in the access log")

    def running(self) -> int:
        """Requests in the engine, as vLLM counts them."""
        return running(self.get("/metrics").text)

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


def running(metrics: str) -> int:
    [count] = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.M)
    return int(float(count))


def eventually(condition: Callable[[], bool], *, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys.yaml").write_text(KEYS)
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="rl") as ray_dir, (folder / "log").open("w") as log:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": ray_dir}
        options = [
            f"model={served_model_dir}",
            f"port={free_port()}",
            f"api_key_file={folder / 'keys.yaml'}",
            "proxy=haproxy",
            "kv_cache_gib=0.1",
            "engine.trust_request_chat_template=true",
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *options], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline().split()
            assert line, (folder / "log").read_text()
            yield Running(process, url=line[1], proxy=line[0], ray_dir=Path(ray_dir), log=folder / "log")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=60)


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


ROUTES = """
import json, sys
from vllm.entrypoints.launchers.app import build_app
from raylm.config.serving import ServeArgs
from raylm.serving.replica import _parse

app = build_app(_parse(ServeArgs(model=sys.argv[1]), sys.argv[1]), ("generate",), None)
print(json.dumps([[route.path, sorted(getattr(route, "methods", None) or [])] for route in app.routes]))
"""


def test_only_health_is_open_without_the_key(server: Running, served_model_dir: Path) -> None:
    """Known fault Z06: every route of the app, those too that its description leaves out."""
    assert server.get("/health", key=None).status_code == 200
    assert server.get("/ready", key=None).status_code == 200
    program = [sys.executable, "-c", ROUTES, str(served_model_dir)]
    found = subprocess.run(program, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()[-1]
    routes = {(path, method) for path, methods in json.loads(found) for method in methods or ["GET"]}
    paths: dict[str, dict[str, Any]] = server.get("/openapi.json").json()["paths"]
    routes |= {(path, method.upper()) for path, methods in paths.items() for method in methods}
    assert {("/metrics", "GET"), ("/docs", "GET"), ("/openapi.json", "GET"), ("/v1/models", "GET")} <= routes
    assert len(routes) > 20
    for path, method in sorted(routes | {("/nothing", "GET"), ("/", "GET"), ("/health/", "GET")}):
        if path == "/health":
            continue
        assert server.get(path, method, key=None).status_code == 401, (method, path)
        assert server.get(path, method, key="wrong").status_code == 401, (method, path)
    assert server.get("/metrics").status_code == 200


COUNTED: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 9}),
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 9, "n": 3, "temperature": 1}),
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 7, "stream": True}),
    ("chat/completions", {"messages": MESSAGES, "max_tokens": 7, "stream": True, "n": 2, "temperature": 1}),
    ("completions", {"prompt": ["hello", "who are you?", "a b c"], "max_tokens": 5, "ignore_eos": True}),
    ("completions", {"prompt": "hello", "max_tokens": 5, "n": 2, "temperature": 1, "echo": True}),
    ("completions", {"prompt": ["hello", "a"], "max_tokens": 40, "stop": ["e", "a", "i"], "allowed_token_ids": ALL}),
    ("completions", {"prompt": "hello", "max_tokens": 40, "stream": True, "stop": "e", "allowed_token_ids": ALL}),
    ("completions", {"prompt": [1] * 200, "max_tokens": 20, "stream": True, "ignore_eos": True}),
    ("responses", {"input": "hello", "max_output_tokens": 6}),
]


@pytest.mark.parametrize("number", range(len(COUNTED)))
def test_tokens_are_counted_as_vllm_reports_them(server: Running, number: int) -> None:
    route, body = COUNTED[number]
    streamed = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
    request_id = f"counted-{number}"
    answer = server.get(
        f"/v1/{route}", "POST", json={"model": "tiny-llama", **body, **streamed}, headers={"x-request-id": request_id}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers.get_list("x-request-id") == [request_id]
    if streamed:
        *_, last, _done = (line for line in answer.text.splitlines() if line)
        usage = json.loads(last.removeprefix("data: "))["usage"]
    else:
        usage = answer.json()["usage"]
    names = ("input_tokens", "output_tokens") if route == "responses" else ("prompt_tokens", "completion_tokens")
    reported = [usage[name] for name in names]
    line = server.logged(request_id)
    assert [line["prompt_tokens"], line["completion_tokens"]] == reported
    assert min(reported) > 0
    assert (line["key"], line["status"], line["outcome"]) == ("main", 200, "complete")
    assert line["path"] == f"/v1/{route}"
    assert line["response_bytes"] == len(answer.content)
    assert 0 < line["first_byte_s"] <= line["seconds"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_request_in_the_engine(server: Running, tokenizer: Any, stream: bool) -> None:
    """Known fault W06. What was generated until then is booked."""
    body = {"model": "tiny-llama", "prompt": "hello", "max_tokens": 250, "ignore_eos": True, "stream": stream}
    body |= {"n": 100, "temperature": 1, "logprobs": 5}
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": f"hangs-up-{stream}"}
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        content = json.dumps(body).encode()
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n{head}\r\n"
        connection.sendall(head.encode() + content)
        assert eventually(lambda: server.running() > 0)
    assert eventually(lambda: server.running() == 0)
    line = server.logged(headers["x-request-id"])
    assert line["outcome"] == "disconnect"
    assert line["prompt_tokens"] == len(tokenizer("hello")["input_ids"])
    assert 0 < line["completion_tokens"] < 100 * 250
    assert server.get("/v1/completions", "POST", json={**body, "n": 1, "max_tokens": 3}).status_code == 200


def test_a_key_has_limits_of_its_own(server: Running) -> None:
    body = {"model": "tiny-llama", "prompt": "hello", "max_tokens": 4}
    answers = [server.get("/v1/completions", "POST", key=LIMITED_KEY, json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-tokens"] == "60000"
    assert server.get("/v1/models", key=LIMITED_KEY).status_code == 200
    assert server.get("/v1/completions", "POST", json=body).status_code == 200
    with pytest.raises(RateLimitError, match="2 requests per minute"):
        server.client(LIMITED_KEY).completions.create(**body)


def test_a_body_that_is_too_large_is_413(server: Running) -> None:
    answer = server.get("/v1/completions", "POST", content=b"x" * (16 * 2**20 + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    chunks = (b"x" * 2**20 for _ in range(17))
    answer = server.get("/v1/completions", "POST", content=chunks)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_pages_of_other_origins_are_not_let_in(server: Running) -> None:
    asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
    answers = [
        server.get("/v1/models", headers={"origin": "http://page.example"}),
        httpx.options(f"{server.url}/v1/chat/completions", headers=asked, trust_env=False),
    ]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control-allow-origin")]


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


def test_ctrl_c_leaves_no_process_and_keys_and_prompts_nowhere(server: Running) -> None:
    """Known fault Z01. Stops the module's server, so it is the last test that uses it."""
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


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "raylm test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False).sign(
        key, hashes.SHA256()
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, plain))
    return folder / "cert.pem", folder / "key.pem"


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
            "engine": {"allowed_origins": ["http://page.example"]},
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
        check_allowed_origins(http)
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


def check_allowed_origins(http: httpx.Client) -> None:
    for origin, allowed in (("http://page.example", "http://page.example"), ("http://other.example", None)):
        answer = http.get("/v1/models", headers={"origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed


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
    assert eventually(lambda: running(http.get("/metrics").text) == 0, within_s=5)
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
