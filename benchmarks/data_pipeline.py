"""The data pipeline beside the raw tokenizer and `datasets.map`, in one run.

    python benchmarks/data_pipeline.py [--tokenizer FOLDER] [--rows 34000] [--times 10]

All tokenise the same conversations with the same ChatML template and byte-level tokenizer: `encode_batch_fast` on texts
that are rendered already (the ceiling: no parsing, rendering or masks), `datasets.map` with `apply_chat_template` and
two processes, and raylm's own stages, from file to loss masks, without the start of workers, which is shown apart.
Rates are tokens/s, medians of the rounds. RAYLM_SHARED, if set, gives the conversations (Alpaca and GSM8K, repeated)
and GPT-2's tokenizer; else they are made up. The last line of stdout is one JSON object.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def _datasets_map(tokenizer: Any, conversations: list[Any]) -> float:
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
    return sum(len(ids) for ids in done["input_ids"]) / seconds


def _raylm(folder: Path, path: Path) -> dict[str, float]:
    """One pass by Ray Data, the start of workers included."""
    from raylm.config.data import DataSection
    from raylm.data import store

    store.SMALL_BYTES = -1
    section = DataSection.model_validate({"train": str(path), "max_seq_len": 4096, "cache": False})
    source = store.TokenizerSource(str(folder), "bench")
    started = time.perf_counter()
    _, report = store.tokenize_files(section.train, section, source)
    seconds = time.perf_counter() - started
    return {"tokens": report.tokens, "seconds": seconds, "rate": report.tokens / seconds}


def _in_process(folder: Path, path: Path) -> float:
    """raylm's stages in this process, both cores by the tokenizer's own threads."""
    from raylm.config.data import DataSection
    from raylm.data import store
    from raylm.data.sources import list_files

    section = DataSection.model_validate({"train": str(path), "max_seq_len": 4096})
    files = list_files(section.train)
    rows = store.row_tokenizer(files, section, store.TokenizerSource(str(folder), "bench"))
    import pyarrow as pa

    numbers = pa.table({"number": pa.array([0], pa.int64())})
    started = time.perf_counter()
    count = sum(
        int(pa.compute.sum(rows.table(table)["length"]).as_py() or 0)
        for table in store._read_files(numbers, files, store._Keep(1.0, 0, None))
    )
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer")
    parser.add_argument("--rows", type=int, default=34_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import logging

    from raylm.ray_session import ray_session

    logging.basicConfig(level=logging.ERROR)
    pairs = _pairs()
    chosen = [pairs[n % len(pairs)] for n in range(options.rows)]
    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for question, answer in chosen
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder, small, large = Path(scratch) / "tokenizer", Path(scratch) / "small.jsonl", Path(scratch) / "large.jsonl"
        tokenizer = _tokenizer(options.tokenizer)
        tokenizer.save_pretrained(folder)
        lines = "".join(json.dumps({"messages": conversation}) + "\n" for conversation in conversations)
        small.write_text(lines)
        with large.open("w") as file:
            for _ in range(options.times):
                file.write(lines)
        gc.collect()
        gc.freeze()  # the conversations held here would be walked again and again
        raw: list[float] = []
        peer: list[float] = []
        ours: list[float] = []
        for number in range(options.rounds):
            raw.append(_raw(tokenizer, conversations))
            peer.append(_datasets_map(tokenizer, conversations))
            ours.append(_in_process(folder, small))
            print(f"round {number}: raw {raw[-1]:,.0f}, datasets.map {peer[-1]:,.0f}, raylm {ours[-1]:,.0f} tokens/s")
        with ray_session(None, num_cpus=2):
            once = _raylm(folder, small)
            many = _raylm(folder, large)
        marginal = (many["tokens"] - once["tokens"]) / (many["seconds"] - once["seconds"])
        print(
            f"Ray Data: {once['tokens']:,} tokens in {once['seconds']:.1f} s, {many['tokens']:,} in "
            f"{many['seconds']:.1f} s; beyond the start of workers {marginal:,.0f} tokens/s"
        )
    ceiling = statistics.median(raw)
    result = {
        "ratio_raw_tokenizer": round(statistics.median(ours) / ceiling, 3),
        "ratio_datasets_map": round(statistics.median(ours) / statistics.median(peer), 3),
        "ray_ratio_raw_tokenizer": round(marginal / ceiling, 3),
        "rate_10x_over_1x": round(many["rate"] / once["rate"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
