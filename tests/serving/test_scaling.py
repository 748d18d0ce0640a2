"""Replicas that come, go and are chosen: prefix routing over two, and scaling to none and back."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from raylm.config.load import load_config
from raylm.config.serving import ServeConfig
from raylm.serving import serve
from tests.serving.servers import free_port
from tests.tiny import build_tiny_model

BLOCK = 32
pytestmark = pytest.mark.slow


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/completions", json={"model": "m", **body}, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def by_replica(url: str, name: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text)
    [family] = [family for family in families if family.name == name]
    values: dict[str, float] = {}
    for sample in family.samples:
        if sample.name.endswith("_total"):
            replica = sample.labels["replica"]
            values[replica] = values.get(replica, 0) + sample.value
    return values


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return held


def test_a_conversation_comes_back_to_the_replica_that_has_its_beginning(ray_cluster: Any, tmp_path: Path) -> None:
    """Every later turn finds all whole blocks of the turn before in the cache: a count that other routing misses."""
    model = build_tiny_model(tmp_path / "m", hidden_size=128, max_position_embeddings=2048)
    settings = {"model": str(model), "kv_cache_gib": 0.1, "port": free_port(), "engine": {"block_size": BLOCK}}
    conversations = [[10 + number, *range(20, 276)] for number in range(16)]
    with serve(load_config(ServeConfig, {**settings, "num_replicas": 2, "routing": "prefix"})) as server:
        expected = 0
        for turn in range(3):
            for head in conversations:
                prompt = head + list(range(90, 90 + BLOCK * turn))
                expected += (len(head) + BLOCK * (turn - 1)) // BLOCK * BLOCK if turn else 0
                ask(server.url, {"prompt": prompt, "max_tokens": 1})
        hits = by_replica(server.url, "vllm:prefix_cache_hits")
        requests = by_replica(server.url, "vllm:request_success")
        assert sum(hits.values()) == expected
        assert len(requests) == 2
        assert min(requests.values()) >= 9  # three conversations at least


def test_a_model_without_work_goes_to_sleep_and_wakes(ray_cluster: Any, served_model_dir: Path) -> None:
    from ray import serve as ray_serve

    settings = {"model": str(served_model_dir), "name": "m", "kv_cache_gib": 0.1, "port": free_port()}
    scaled = {"num_replicas": [0, 1], "downscale_delay_s": 2}

    def replicas() -> int:
        deployment = ray_serve.status().applications["raylm"].deployments["engine-m"]
        return deployment.replica_states.get("RUNNING", 0)  # type: ignore[call-overload,no-any-return]

    with serve(load_config(ServeConfig, {**settings, **scaled})) as server:
        before = ask(server.url, {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0})
        cards = httpx.get(f"{server.url}/v1/models", trust_env=False).json()
        assert eventually(lambda: replicas() == 0, 120)
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        assert [c["id"] for c in httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]] == [
            card["id"] for card in cards["data"]
        ]
        assert replicas() == 0
        after = ask(server.url, {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0})
        assert after["choices"] == before["choices"]
        assert replicas() == 1
