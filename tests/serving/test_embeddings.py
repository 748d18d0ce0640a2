"""An embedding model beside a chat model, behind the gateway with its key, as the `openai` client sees it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from raylm.config.load import load_config
from raylm.config.serving import ServeConfig
from raylm.serving import serve
from tests.serving.door_support import access_lines, eventually
from tests.serving.servers import free_port

KEY = "s3cret-embeddings"
KEYS = f"- {{name: main, key: {KEY}}}\n"
TEXTS = ["hello world", "who are you?", "the answer is yes. " * 4]
POOLING = {"runner": "pooling", "convert": "embed"}


@dataclass
class Running:
    url: str

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60, trust_env=False)


@pytest.fixture(scope="module")
def server(ray_cluster: Any, served_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same folder twice: as a decoder, and as an embedder by its last hidden state."""
    keys = tmp_path_factory.mktemp("embeddings") / "keys.yaml"
    keys.write_text(KEYS)
    models = [{"name": "chat"}, {"name": "embed", "engine": POOLING}]
    config = {
        "models": [{"model": str(served_model_dir), **model} for model in models],
        "kv_cache_gib": 0.1,
        "dtype": "float32",
        "api_key_file": str(keys),
        "port": free_port(),
    }
    with serve(load_config(ServeConfig, config)) as endpoint:
        yield Running(endpoint.url)


def reference(folder: Path, text: str) -> list[float]:
    """The last hidden state of the last token after the final norm, of length 1, by transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder, dtype=torch.float32)(ids).last_hidden_state[0, -1]
    found: list[float] = (hidden / hidden.norm()).tolist()
    return found


@pytest.mark.slow
def test_embeddings_are_those_of_the_model(server: Running, served_model_dir: Path, tokenizer: Any) -> None:
    for options in ({}, {"encoding_format": "float"}):  # the client asks for base64 by default
        answer = server.client().embeddings.create(model="embed", input=TEXTS, **options)  # type: ignore[arg-type]
        assert [item.index for item in answer.data] == [0, 1, 2]
        for item, text in zip(answer.data, TEXTS, strict=True):
            assert item.embedding == pytest.approx(reference(served_model_dir, text), abs=1e-4)
        assert answer.model == "embed"
        assert answer.usage.prompt_tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)


@pytest.mark.slow
def test_the_tokens_of_embeddings_are_booked(server: Running, tokenizer: Any) -> None:
    server.client().embeddings.create(model="embed", input=TEXTS, extra_headers={"x-request-id": "embeds"})
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)

    def booked() -> list[tuple[str, int, int]]:
        lines = [line for line in access_lines() if line["request_id"] == "embeds"]
        return [(line["key"], line["prompt_tokens"], line["completion_tokens"]) for line in lines]

    assert eventually(lambda: booked() == [("main", tokens, 0)]), booked()


@pytest.mark.slow
def test_each_model_says_what_it_cannot(server: Running) -> None:
    with pytest.raises(NotFoundError, match=r"`chat` does not serve /v1/embeddings. It serves /v1/chat/completions"):
        server.client().embeddings.create(model="chat", input="hello")
    with pytest.raises(NotFoundError, match=r"`embed` does not serve /v1/chat/completions. It serves /v1/embeddings"):
        server.client().chat.completions.create(model="embed", messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(BadRequestError, match=r"limits.max_sequences"):
        server.client().embeddings.create(model="embed", input=["hello"] * 2049)
    too_long = server.post("/v1/embeddings", model="embed", input=[5] * 300)
    assert (too_long.status_code, "256" in too_long.text) == (400, True)
    assert (
        server.client()
        .chat.completions.create(model="chat", messages=[{"role": "user", "content": "hello"}], max_tokens=4)
        .choices
    )
    assert server.post("/v1/embeddings", model="embed", input="hello").status_code == 200
