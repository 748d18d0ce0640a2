"""Hours under load in minutes: does the memory of any process of a server grow?

Streams, whole answers, clients that go away and requests that are refused, eight at a time, against a tiny model, so
that the bookkeeping and not the model is at work. Prints a line a minute, and JSON last: the resident memory of each
kind of process over time, and how much of it the second half added.

    python benchmarks/serve_soak.py --minutes 10
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from serve_overhead import free_port, tiny_model

from raylm.config.serving import ServeConfig
from raylm.serving import serve

AT_ONCE = 8
SAMPLE_S = 10.0
# What a process is, by a part of its command line; the first that fits.
KINDS = {
    "replica": "ray::ServeReplica",
    "engine": "EngineCore",
    "controller": "ray::ServeController",
    "proxy manager": "ray::HAProxyManager",
    "proxy": "ray::ProxyActor",
    "haproxy": "haproxy",
    "raylet": "raylet/raylet",
    "gcs": "gcs_server",
    "agents": "dashboard/agent.py",
    "runtime env agent": "runtime_env/agent",
    "idle workers": "ray::IDLE",
}


def memory_mib() -> dict[str, float]:
    """Resident memory of this process's descendants by kind, MiB; processes of a kind are added up."""
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
            kind = next((kind for kind, part in KINDS.items() if part in line), "other")
            found[kind] = found.get(kind, 0.0) + process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
    return found


async def soak(url: str, model: str, seconds: float) -> tuple[dict[str, int], list[dict[str, float]]]:
    """Sends until the time is over. Gives what became of the requests, and memory every SAMPLE_S."""
    outcomes = {"answered": 0, "streamed": 0, "dropped": 0, "refused": 0, "failed": 0}
    samples: list[dict[str, float]] = []
    deadline = time.monotonic() + seconds
    generator = random.Random(0)

    async def client_of(client: httpx.AsyncClient) -> None:
        while time.monotonic() < deadline:
            kind = generator.choices(["answered", "streamed", "dropped", "refused"], [4, 4, 1, 1])[0]
            prompt = f"Question {generator.randrange(10**6)}: tell me about the history of Paris."
            body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 32, "ignore_eos": True}
            body |= {"stream": kind in ("streamed", "dropped")}
            if kind == "refused":
                body["temperature"] = -1
            try:
                outcomes[await _send(client, url, body, kind, generator.uniform(0, 0.2))] += 1
            except httpx.TransportError:
                outcomes["failed"] += 1

    async def watch() -> None:
        while time.monotonic() < deadline:
            samples.append(await asyncio.to_thread(memory_mib))
            if len(samples) % 6 == 1:
                print(
                    f"{len(samples) * SAMPLE_S / 60:5.1f} min  {sum(outcomes.values()):7} requests  "
                    f"{sum(samples[-1].values()):7.0f} MiB",
                    flush=True,
                )
            await asyncio.sleep(min(SAMPLE_S, max(0.0, deadline - time.monotonic())))

    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        await asyncio.gather(watch(), *(client_of(client) for _ in range(AT_ONCE)))
    return outcomes, samples


async def _send(client: httpx.AsyncClient, url: str, body: dict[str, Any], kind: str, patience: float) -> str:
    """What became of the request: its kind, or `failed`."""
    expected = 400 if kind == "refused" else 200
    try:
        async with (
            asyncio.timeout(patience if kind == "dropped" else None),
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            async for _ in response.aiter_raw():
                pass
            return kind if response.status_code == expected else "failed"
    except TimeoutError:
        return "dropped"


def growth(samples: list[dict[str, float]]) -> dict[str, float]:
    """MiB that the mean of the last quarter is above that of the second, by kind: the first one is warming up."""
    quarter = len(samples) // 4
    if not quarter:
        return {}
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    kinds = {kind for sample in samples for kind in sample}
    return {kind: _mean(late, kind) - _mean(early, kind) for kind in sorted(kinds)}


def _mean(samples: list[dict[str, float]], kind: str) -> float:
    return sum(sample.get(kind, 0.0) for sample in samples) / len(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_model(Path(scratch) / "tiny")
        config = ServeConfig(model=folder, name="tiny", port=free_port(), dtype="float32", max_model_len=1024)
        with serve(config) as server:
            outcomes, samples = asyncio.run(soak(server.url, "tiny", options.minutes * 60))
    print(
        json.dumps(
            {
                "minutes": options.minutes,
                "requests": outcomes,
                "growth_mib": {kind: round(value, 1) for kind, value in growth(samples).items()},
                "rss_mib": [{kind: round(value) for kind, value in sample.items()} for sample in samples],
            }
        )
    )


if __name__ == "__main__":
    main()
