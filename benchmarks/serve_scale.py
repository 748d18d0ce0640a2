"""Two replicas of one tiny model behind the gateway: who gets the requests, and what routing by prefix spares.

Multi-turn chats, several at a time: every turn sends the whole conversation so far. Each routing gets a server of its
own, one after the other in one run. Hits are vLLM's own counts of prefix-cache tokens, by replica. Last, one replica
with the gateway and without, in turns: what the second hop costs. Prints tables, and JSON last.

    python benchmarks/serve_scale.py --quick
"""

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent))
from serve_overhead import Load, free_port, measure, tiny_model

from raylm.config.load import load_config
from raylm.config.serving import ServeConfig
from raylm.ray_session import ray_session
from raylm.serving import serve

WORDS = "the history of a city by the sea where many ships came with cloth salt wine and letters"


@dataclass(frozen=True)
class Chats:
    """What is sent: `conversations`, `at_once` of them at a time, each of `turns` questions."""

    conversations: int
    turns: int
    at_once: int
    words: int = 60
    max_tokens: int = 16


@dataclass(frozen=True)
class Result:
    """requests: by replica. hit_rate: prompt tokens found in a prefix cache, of all."""

    requests: list[int]
    hit_rate: float
    turns_per_second: float
    time_to_first_token_s: float


async def chat_load(url: str, model: str, chats: Chats, seed: int) -> tuple[float, list[float]]:
    """Seconds for all conversations, and the time to the first token of each turn."""
    waiting = asyncio.Semaphore(chats.at_once)
    first: list[float] = []

    async def converse(client: httpx.AsyncClient, index: int) -> None:
        words = random.Random(seed * 10_000 + index)
        messages: list[dict[str, str]] = []
        async with waiting:
            for turn in range(chats.turns):
                question = " ".join(words.choices(WORDS.split(), k=chats.words))
                messages.append({"role": "user", "content": f"{index} {turn} {question}"})
                answer = await ask(client, messages)
                messages.append({"role": "assistant", "content": answer})

    async def ask(client: httpx.AsyncClient, messages: list[dict[str, str]]) -> str:
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": chats.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        started, parts = time.perf_counter(), []
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    if not parts:
                        first.append(time.perf_counter() - started)
                    parts.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
        return "".join(parts)

    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        started = time.perf_counter()
        await asyncio.gather(*(converse(client, index) for index in range(chats.conversations)))
        return time.perf_counter() - started, first


def counts(url: str) -> dict[str, dict[str, float]]:
    """Counters of vLLM by replica."""
    names = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:request_success")
    found: dict[str, dict[str, float]] = {}
    page = httpx.get(f"{url}/metrics", trust_env=False).text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if family.name in names and sample.name.endswith("_total"):
                replica = found.setdefault(sample.labels.get("replica", "0"), dict.fromkeys(names, 0.0))
                replica[family.name] += sample.value
    return found


def run_routing(folder: str, routing: str, chats: Chats, rounds: int) -> Result:
    """One server with two replicas; the medians over rounds of new conversations."""
    with serve(config_of(folder, num_replicas=2, routing=routing, gateway="always")) as server:
        asyncio.run(chat_load(server.url, "tiny", Chats(4, 1, 4), seed=0))
        before = counts(server.url)
        speeds, ttft = [], []
        for seed in range(1, rounds + 1):
            seconds, first = asyncio.run(chat_load(server.url, "tiny", chats, seed))
            speeds.append(chats.conversations * chats.turns / seconds)
            ttft.append(statistics.median(first))
        after = counts(server.url)
    grown = [{name: after[replica][name] - before[replica][name] for name in after[replica]} for replica in after]
    queries, hits = (sum(row[f"vllm:prefix_cache_{kind}"] for row in grown) for kind in ("queries", "hits"))
    requests = sorted(int(row["vllm:request_success"]) for row in grown)
    return Result(requests, hits / queries, statistics.median(speeds), statistics.median(ttft))


def run_cost(folder: str, rounds: int, *, quick: bool) -> dict[str, dict[str, float]]:
    """Gateway to direct, one replica: ratios of the medians of throughput and time to first token, by load."""
    loads = [
        Load(concurrency, stream, concurrency * (4 if quick else 8), 64)
        for stream in (False, True)
        for concurrency in (1, 16)
    ]
    figures: dict[tuple[str, Load], list[Any]] = {}
    for _ in range(rounds):
        for gateway in ("never", "always"):
            with serve(config_of(folder, gateway=gateway)) as server:
                asyncio.run(measure(server.url, "tiny", Load(4, True, 8, 8)))
                for load in loads:
                    figures.setdefault((gateway, load), []).extend(
                        asyncio.run(measure(server.url, "tiny", load)) for _ in range(3)
                    )
    table = {}
    for load in loads:
        direct, hop = figures["never", load], figures["always", load]
        table[f"{'stream' if load.stream else 'plain'} {load.concurrency}"] = {
            name: round(_median(hop, name) / _median(direct, name), 3)
            for name in ("tokens_per_second", "time_to_first_token_s")
        }
    return table


def _median(figures: list[Any], name: str) -> float:
    return statistics.median(getattr(figure, name) for figure in figures)


def config_of(folder: str, **settings: Any) -> ServeConfig:
    common = {"model": folder, "name": "tiny", "dtype": "float32", "kv_cache_gib": 1, "max_model_len": 2048}
    return load_config(ServeConfig, {**common, "port": free_port(), **settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["routing", "cost"], default=["routing", "cost"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of fewer conversations")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    rounds = 1 if options.quick else options.rounds
    chats = Chats(16, 4, 8) if options.quick else Chats(32, 6, 8)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, ray_session(None, num_cpus=os.cpu_count() or 2):
        folder = tiny_model(Path(scratch) / "tiny")
        if "routing" in options.parts:
            print("routing    requests by replica  hit rate  turns/s  first token", flush=True)
            for routing in ("balanced", "prefix"):
                result = run_routing(folder, routing, chats, rounds)
                found[routing] = asdict(result)
                print(
                    f"{routing:10} {result.requests!s:20} {result.hit_rate:.3f}     "
                    f"{result.turns_per_second:.1f}     {result.time_to_first_token_s * 1000:.0f} ms",
                    flush=True,
                )
            found["throughput_ratio"] = found["prefix"]["turns_per_second"] / found["balanced"]["turns_per_second"]
        if "cost" in options.parts:
            found["gateway_to_direct"] = run_cost(folder, rounds if options.quick else 2, quick=options.quick)
            for name, ratios in found["gateway_to_direct"].items():
                print(f"gateway to direct, {name:10}", ratios, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
