"""Two models behind one gateway, as a client sees them: one server for the module, behind HAProxy, and a slow
one behind the Python proxy.

The second model has a long context, so that an answer can be cut off while it is written.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from raylm.config.load import load_config
from raylm.config.serving import ServeConfig
from raylm.serving import serve
from tests.serving.servers import free_port
from tests.tiny import build_tiny_model

KEY = "s3cret-gateway"
PROMPT = [5, 6, 7, 8, 9]
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


@dataclass
class Running:
    """The server's address, and the folders of the two models by name."""

    url: str
    folders: dict[str, Path]

    def get(self, path: str, method: str = "GET", key: str | None = KEY, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, trust_env=False, **options)

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def metrics(self) -> dict[str, list[Any]]:
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {family.name: family.samples for family in families}

    def running(self, model: str) -> float:
        [value] = [s.value for s in self.metrics()["vllm:num_requests_running"] if s.labels["model"] == model]
        return float(value)


@pytest.fixture(scope="module", params=["haproxy", pytest.param("python", marks=pytest.mark.slow)])
def server(
    request: pytest.FixtureRequest, ray_cluster: Any, served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "key").write_text(KEY)
    long = build_tiny_model(
        folder / "long", hidden_size=128, num_hidden_layers=1, max_position_embeddings=32768, initializer_range=0.2
    )
    config = {
        "models": [
            {"model": str(served_model_dir), "name": "org/first", "aliases": ["small", "gpt-4o"]},
            {"model": str(long), "routing": "prefix"},
        ],
        "kv_cache_gib": 0.1,
        "dtype": "float32",
        "api_key_file": str(folder / "key"),
        "port": free_port(),
        "proxy": request.param,
    }
    with serve(load_config(ServeConfig, config)) as endpoint:
        assert endpoint.proxy == request.param
        yield Running(endpoint.url, {"org/first": served_model_dir, "long": long})


def greedy(folder: Path, count: int = 8) -> list[int]:
    """The reference: transformers, one token after the other."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def eventually(holds: Callable[[], bool]) -> bool:
    """True as soon as the condition holds, within 10 s: the engine counts at each step."""
    deadline = time.monotonic() + 10
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


def test_every_model_is_listed_with_its_own_cards(server: Running) -> None:
    cards = server.client().models.list().data
    assert [card.id for card in cards] == ["org/first", "small", "gpt-4o", "long"]
    assert [card.max_model_len for card in cards] == [256, 256, 256, 32768]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["org/first", "small", "long"])
def test_a_name_leads_to_its_model(server: Running, name: str) -> None:
    """Token by token what transformers computes from the weights of that folder."""
    expected = greedy(server.folders.get(name, server.folders["org/first"]))
    body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = server.get("/v1/completions", "POST", json={**body, "return_token_ids": True}).json()
    assert answer["choices"][0]["token_ids"] == expected
    assert answer["model"] == name


def test_the_two_models_differ(server: Running) -> None:
    assert greedy(server.folders["org/first"]) != greedy(server.folders["long"])


@pytest.mark.parametrize("name", ["org/first", "gpt-4o", "long"])
def test_a_stream_is_the_same_text_under_the_name_that_was_asked_for(server: Running, name: str) -> None:
    request: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = server.client().chat.completions.create(**request)
    chunks = list(
        server.client().chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert {chunk.model for chunk in chunks} | {whole.model} == {name}
    assert chunks[-1].usage == whole.usage


def test_the_first_token_does_not_wait_for_the_last(server: Running) -> None:
    request: dict[str, Any] = {"model": "long", "prompt": PROMPT, "max_tokens": 600, "extra_body": {"ignore_eos": True}}
    started = time.monotonic()
    chunks = server.client().completions.create(**request, stream=True)
    next(chunks)
    first = time.monotonic() - started
    rest = sum(1 for _ in chunks)
    assert rest > 50
    assert first < (time.monotonic() - started) / 2


def test_an_unknown_model_is_404_in_the_shape_of_vllm(server: Running) -> None:
    """The same error object as an engine's own: that of the adapter `long:x`, which is the engine's to know."""
    for body in ({"prompt": PROMPT}, {"prompt": PROMPT, "stream": True}):
        answer = server.get("/v1/completions", "POST", json={"model": "other", **body})
        own = server.get("/v1/completions", "POST", json={"model": "long:x", **body})
        assert (answer.status_code, own.status_code) == (404, 404)
        ours, engines = answer.json()["error"], own.json()["error"]
        assert ours.keys() == engines.keys()
        assert [ours[key] for key in ("type", "param", "code")] == [engines[key] for key in ("type", "param", "code")]
        assert ours["message"] == "The model `other` does not exist. It is one of org/first, small, gpt-4o, long."
    with pytest.raises(NotFoundError):
        server.client().chat.completions.create(model="other", messages=MESSAGES)


def test_a_request_that_names_no_model_is_refused_with_the_names(server: Running) -> None:
    answer = server.get("/v1/completions", "POST", json={"prompt": PROMPT})
    assert answer.status_code == 400
    assert "org/first, small, gpt-4o, long" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": ["long"]}', b'{"model": {}}']
)
def test_odd_bodies_are_4xx(server: Running, content: bytes) -> None:
    answer = server.get("/v1/completions", "POST", content=content)
    assert 400 <= answer.status_code < 500, answer.text


def test_other_routes_go_by_the_model_too(server: Running, tokenizer: Any) -> None:
    ids = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    for name, limit in (("small", 256), ("long", 32768)):
        answer = server.get("/tokenize", "POST", json={"model": name, "prompt": "hello world"}).json()
        assert (answer["tokens"], answer["max_model_len"]) == (ids, limit)
        back = server.get("/detokenize", "POST", json={"model": name, "tokens": ids}).json()
        assert back["prompt"] == "hello world"
    assert "version" in server.get("/version").json()
    assert server.get("/nothing").status_code == 404
    assert server.get("/v1/completions", "PUT").status_code == 405


def test_a_prompt_over_the_context_is_400(server: Running) -> None:
    body = {"model": "small", "prompt": [5] * 300, "max_tokens": 4}
    for stream in (False, True):
        answer = server.get("/v1/completions", "POST", json={**body, "stream": stream})
        assert (answer.status_code, "256" in answer.text) == (400, True)


def test_only_health_is_open_without_the_key(server: Running) -> None:
    assert server.get("/health", key=None).status_code == 200
    for path in ("/v1/models", "/metrics", "/v1/completions", "/version", "/nothing"):
        assert server.get(path, key=None).status_code == 401
        assert server.get(path, key="wrong").status_code == 401


def test_metrics_are_those_of_both_engines(server: Running) -> None:
    metrics = server.metrics()
    for name in ("vllm:num_requests_running", "vllm:generation_tokens", "process_resident_memory_bytes"):
        assert {sample.labels["model"] for sample in metrics[name]} == {"org/first", "long"}, name
    named = {(s.labels["model"], s.labels["model_name"]) for s in metrics["vllm:num_requests_running"]}
    assert named == {("org/first", "org/first"), ("long", "long")}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_in_the_engine(server: Running, stream: bool) -> None:
    """Known fault W06. 30,000 tokens would take minutes."""

    def tokens() -> float:
        return sum(s.value for s in server.metrics()["vllm:generation_tokens"] if s.labels["model"] == "long")

    body = {"model": "long", "prompt": PROMPT, "max_tokens": 30000, "ignore_eos": True, "stream": stream}
    options: dict[str, Any] = {"headers": {"authorization": f"Bearer {KEY}"}, "trust_env": False, "json": body}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", **options) as answer:
            chunks = answer.iter_raw()  # kept: the connection ends with it
            next(chunks)
            assert eventually(lambda: server.running("long") == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", **options, timeout=1)
    assert eventually(lambda: server.running("long") == 0)
    before = tokens()
    time.sleep(0.5)
    assert tokens() == before
    assert before < 25000
    assert server.get("/health").status_code == 200
