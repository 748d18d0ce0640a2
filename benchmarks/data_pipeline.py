"""The data pipeline beside the raw tokenizer and `datasets.map`, in one run.

    python benchmarks/data_pipeline.py [--tokenizer FOLDER] [--rows 34000] [--times 10] [--growth 50] [--rounds 3]

All tokenise the same conversations with the same ChatML template and byte-level tokenizer: `encode_batch_fast` on texts
that are rendered already (the ceiling: no parsing, rendering or masks), `datasets.map` with `apply_chat_template` and
two processes, and raylm on Ray Data, from the file to ids and loss masks. The start of workers is measured on eight
conversations and shown apart, for both. Rates are tokens/s, medians of the rounds, one way after the other in
each round. Each pass of raylm has a process and a Ray of its own, whose memory is watched: what the driver and the
largest worker hold at most, without the object store. RAYLM_SHARED, if set, gives the conversations (Alpaca and GSM8K,
repeated) and GPT-2's tokenizer; else they are made up. The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = CHATML.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
)


def _pairs() -> list[tuple[str, str]]:
    shared = Path(os.environ.get("RAYLM_SHARED", "/nonexistent"))
    files = [shared / "gsm8k_train_alpaca_format.json", shared / "llamafactory-demo/alpaca_en_demo.json"]
    if all(file.is_file() for file in files):
        rows = [row for file in files for row in json.loads(file.read_text())]
        return [("\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]) for row in rows]
    text = "the model answers a question about numbers and words with care while reading long stories"
    words = text.split()
    return [
        (" ".join(words[(n * k) % len(words)] for k in range(20 + n % 30)), " ".join(words[: 5 + n % 9] * (1 + n % 6)))
        for n in range(2000)
    ]


def _tokenizer(folder: str | None) -> Any:
    from transformers import AutoTokenizer

    from tests.tiny import build_tokenizer

    shared = Path(os.environ.get("RAYLM_SHARED", "/nonexistent")) / "tokenizers" / "gpt2"
    if folder or shared.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(folder or shared)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    else:
        tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def _raw(tokenizer: Any, conversations: list[Any]) -> float:
    texts = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversation)
        for conversation in conversations
    ]
    started = time.perf_counter()
    count = sum(len(e.ids) for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return count / (time.perf_counter() - started)


def _datasets_map(tokenizer: Any, conversations: list[Any]) -> tuple[int, float]:
    """Tokens and seconds."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            batch["messages"], chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    dataset = datasets.Dataset.from_dict({"messages": conversations})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.perf_counter()
    done = dataset.map(encode, batched=True, num_proc=2, remove_columns=["messages"])
    seconds = time.perf_counter() - started
    os.environ.pop("TOKENIZERS_PARALLELISM")
    return sum(map(len, done["input_ids"])), seconds


class _Watch(threading.Thread):
    """The most memory that this process, and any worker among its children, holds without what is shared, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = self.worker = 0.0
        self._done = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.5):
            self.driver = max(self.driver, _own_mib(me))
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("ray::"):
                        self.worker = max(self.worker, _own_mib(child))

    def stop(self) -> None:
        self._done.set()
        self.join()


def _own_mib(process: psutil.Process) -> float:
    memory = process.memory_info()  # pages of the object store are mapped as shared ones
    return (memory.rss - memory.shared) / 2**20


def _one_pass(folder: str, path: str, cache: str) -> dict[str, float]:
    """raylm's stages on a fresh Ray, and once more from the cache where one is given, up to delivered batches."""
    import ray

    from raylm.config.data import DataSection
    from raylm.data import store
    from raylm.data.plan import plan_run
    from raylm.data.stream import micro_batches, ordered_stream, split_in_turn
    from raylm.ray_session import ray_session

    store.SMALL_BYTES = -1
    section = DataSection.model_validate({"train": path, "max_seq_len": 1024, "cache": cache or False})
    source = store.TokenizerSource(folder, "bench")
    with ray_session(None, num_cpus=2):
        watch = _Watch()
        watch.start()
        started = time.perf_counter()
        _, report = store.tokenize_files(section.train, section, source)
        result: dict[str, float] = {"tokens": report.tokens, "seconds": time.perf_counter() - started}
        watch.stop()
        result |= {"driver_mib": watch.driver, "worker_mib": watch.worker}
        if not cache:
            return result
        started = time.perf_counter()
        tokens, _ = store.tokenize_files(section.train, section, source)
        result["cached_seconds"] = time.perf_counter() - started
        plan = plan_run(
            tokens.lengths, max_seq_len=1024, packing=True, shuffle=True, seed=0, num_epochs=1, global_batch_size=16
        )
        result["padding"] = 1 - report.tokens / (plan.epochs[0].num_rows * 1024)
        refs = ray.put(tokens), ray.put(plan)

        def batches(start: int) -> Iterator[Any]:
            stream = ordered_stream(
                *refs, start_step=start, num_steps=plan.num_steps, global_batch_size=16, micro_batch_size=8
            )
            return micro_batches(split_in_turn(stream, 1)[0], 8)

        for name, start in (("warm", 0), ("first_batch_0", 0), ("first_batch_90", int(plan.num_steps * 0.9))) * 3:
            started = time.perf_counter()
            stream = batches(start)
            next(stream)
            result[name] = min(result.get(name, 1e9), time.perf_counter() - started)
            for _ in stream:
                pass
        started = time.perf_counter()
        count = sum(len(row.input_ids) for batch in batches(0) for row in batch.rows)
        result["delivered"] = count / (time.perf_counter() - started)
    return result


def _pass(folder: Path, path: Path, cache: Path | None = None) -> dict[str, float]:
    command = [sys.executable, __file__, "--one-pass", str(folder), str(path), str(cache or "")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _rate(found: dict[str, float], start: dict[str, float]) -> float:
    return (found["tokens"] - start["tokens"]) / (found["seconds"] - start["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--rows", type=int, default=34_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--growth", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-pass", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if options.one_pass:
        print(json.dumps(_one_pass(*options.one_pass)))
        return
    pairs = _pairs()
    chosen = [pairs[n % len(pairs)] for n in range(options.rows)]
    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in chosen
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        tokenizer = _tokenizer(options.tokenizer)
        tokenizer.save_pretrained(folder)
        lines = [json.dumps({"messages": conversation}) + "\n" for conversation in conversations]
        files = {0: lines[:8], 1: lines, options.times: lines, options.growth: lines}
        paths = {times: Path(scratch) / f"{times}.jsonl" for times in files}
        for times, part in files.items():
            with paths[times].open("w") as file:
                for _ in range(times or 1):
                    file.writelines(part)
        gc.collect()
        gc.freeze()  # the conversations held here would be walked again and again
        raw: list[float] = []
        peer: list[float] = []
        ours: list[float] = []
        starts = [_pass(folder, paths[0])]
        peer_start = _datasets_map(tokenizer, conversations[:8])
        for number in range(options.rounds):
            raw.append(_raw(tokenizer, conversations))
            tokens, seconds = _datasets_map(tokenizer, conversations)
            peer.append((tokens - peer_start[0]) / (seconds - peer_start[1]))
            starts.append(_pass(folder, paths[0]))
            start = min(starts, key=lambda found: found["seconds"])
            ours.append(_rate(_pass(folder, paths[options.times]), start))
            raw.append(_raw(tokenizer, conversations))
            print(
                f"round {number}: raw {raw[-2]:,.0f} and {raw[-1]:,.0f}, datasets.map {peer[-1]:,.0f}, "
                f"raylm {ours[-1]:,.0f} tokens/s after {start['seconds']:.1f} s for the start of workers",
                flush=True,
            )
        small = _pass(folder, paths[1], Path(scratch) / "cache")
        print(
            f"padding at 1,024: {small['padding']:.2%}; a cached run starts in {small['cached_seconds']:.2f} s and "
            f"delivers {small['delivered']:,.0f} tokens/s in packed batches; first batch after "
            f"{small['first_batch_0']:.2f} s at 0 %, {small['first_batch_90']:.2f} s at 90 % of an epoch",
            flush=True,
        )
        result = {
            "ratio_raw_tokenizer": round(statistics.median(ours) / statistics.median(raw), 3),
            "ratio_datasets_map": round(statistics.median(ours) / statistics.median(peer), 3),
            "rate_10x_over_1x": round(statistics.median(ours) / _rate(small, start), 3),
            "first_batch_90_over_0": round(small["first_batch_90"] / small["first_batch_0"], 3),
            "cached_tokens_per_second": round(small["delivered"]),
        }
        if options.growth:
            large = _pass(folder, paths[options.growth])
            print(
                f"memory, driver and largest worker: {small['driver_mib']:.0f} and {small['worker_mib']:.0f} MiB for "
                f"{small['tokens']:,} tokens, {large['driver_mib']:.0f} and {large['worker_mib']:.0f} for "
                f"{large['tokens']:,}, at {_rate(large, start):,.0f} tokens/s"
            )
            result["peak_growth_50x"] = round(
                max(large["driver_mib"] / small["driver_mib"], large["worker_mib"] / small["worker_mib"]), 3
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
