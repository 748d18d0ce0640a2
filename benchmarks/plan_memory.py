"""What `raylm plan` says of memory beside what training takes: two sizes of Llama, strategies and methods.

    python benchmarks/plan_memory.py [--only 5m-full-single,45m-full-fsdp] [--steps 3] [--tokens 512]

Each case takes real steps in processes of its own, one a rank, and is measured on rank 0:
  held       bytes of all tensors that Python can see between backward pass and update, each storage once
  allocated  the most bytes that torch's CPU allocator had given out at any time, by its own account (a run of its own)
  resident   growth of the process's own memory (RssAnon: without files and what is shared) from after the imports on;
             freed memory is kept, as in a worker, so this is the peak, with what the C allocator loses to fragments
`worst_error` is the largest of held and allocated, `worst_resident_error` that of resident. The last line of stdout is
one JSON object.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SIZES: dict[str, dict[str, int]] = {
    "5m": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "45m": {
        "vocab_size": 49152,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
}
STRATEGIES = {
    "single": ["training.strategy=single"],
    "ddp": ["training.strategy=ddp", "cluster.num_workers=2"],
    "fsdp": ["training.strategy=fsdp", "cluster.num_workers=2"],
    "fsdp-kept": ["training.strategy=fsdp", "cluster.num_workers=2", "fsdp.reshard_after_forward=false"],
    "zero1": ["training.strategy=deepspeed", "cluster.num_workers=2", "deepspeed.stage=1"],
    "zero2": ["training.strategy=deepspeed", "cluster.num_workers=2", "deepspeed.stage=2"],
    "zero3": ["training.strategy=deepspeed", "cluster.num_workers=2", "deepspeed.stage=3"],
}
METHODS = {
    "full": ["training.method=full"],
    "lora": ["training.method=lora", "lora.rank=16"],
    "lisa": ["training.method=lisa", "lisa.num_active_layers=2", "lisa.interval_steps=100"],
}
CASES = [
    ("full", "single"),
    ("full", "ddp"),
    ("full", "fsdp"),
    ("full", "fsdp-kept"),
    ("full", "zero1"),
    ("full", "zero2"),
    ("full", "zero3"),
    ("lora", "single"),
    ("lisa", "single"),
]


def _rss_anon() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def _held() -> int:
    """Bytes of the storages of all tensors that Python knows of, each once."""
    import torch

    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            for tensor in (getattr(thing, "_local_tensor", thing), thing.grad if thing.is_leaf else None):
                tensor = getattr(tensor, "_local_tensor", tensor)
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _work(options: argparse.Namespace) -> None:
    """One rank: some steps, then a line of figures."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from raylm.config import TrainConfig, load_config
    from raylm.models.load import load_model
    from raylm.optim.build import build_optimizer
    from raylm.training import worker
    from raylm.training.batch import batch_of
    from raylm.training.hardware import keep_freed_memory
    from raylm.training.loop import train_step
    from raylm.training.module import LossModule
    from raylm.training.strategies.table import strategy_class

    keep_freed_memory()
    torch.set_num_threads(1)
    config = load_config(TrainConfig, json.loads(options.work))
    world = config.cluster.max_workers
    if config.strategy != "single":
        store = dist.FileStore(options.store, world)
        dist.init_process_group("gloo", store=store, rank=options.rank, world_size=world)
        dist.all_reduce(torch.zeros(8))
    if config.strategy == "deepspeed":
        from raylm.training.strategies.deepspeed_engine import deepspeed_on

        deepspeed_on(torch.device("cpu"))
    if config.training.method == "lora":
        import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    small = torch.nn.Linear(256, 256)
    small(torch.ones(256, 256)).sum().backward()
    torch.optim.AdamW(small.parameters(), fused=True).step()
    del small
    gc.collect()
    before, held_before = _rss_anon(), _held()
    device = torch.device("cpu")
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    # The account misses what other threads free, as when DeepSpeed's engine starts: of it, from the second step on.
    late, base = config.strategy == "deepspeed", 0
    if options.allocations and not late:
        profiler.start()
    model = load_model(config.model, device)
    loaded = _rss_anon() - before
    module = LossModule(worker.prepared(model, config), config.loss)
    module.train()
    strategy = strategy_class(config.strategy)(
        module,
        lambda trainable: build_optimizer(trainable, config.optimizer),
        device,
        worker._strategy_section(config, model, world),
    )
    if config.training.method == "lisa":
        worker._switching(config, strategy, 0)(0)
    held = 0
    update = strategy.optimizer_step

    def measured_update() -> None:
        nonlocal held
        gc.collect()
        held = _held() - held_before
        update()

    strategy.optimizer_step = measured_update
    rng = np.random.default_rng(options.rank)
    vocabulary = model.config.vocab_size
    for step in range(options.steps):
        if options.allocations and late and step == 1:
            gc.collect()
            base = _held() - held_before
            profiler.start()
        batches = []
        for _ in range(config.gradient_accumulation_steps()):
            ids = [rng.integers(0, vocabulary, options.tokens // 4).astype(np.int32) for _ in range(4)]
            batches.append(batch_of(ids, [np.ones(len(part), bool) for part in ids]))
        train_step(strategy, batches, max_grad_norm=1.0, precision="fp32", step=step)
    figures = {"held": held, "peak": _rss_anon() - before, "loaded": loaded}
    if options.allocations:
        profiler.stop()
        live = highest = base
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        figures = {"held": held, "allocated": highest}
    Path(options.result).write_text(json.dumps(figures))


def measure(tree: dict[str, Any], *, steps: int, tokens: int, allocations: bool = False) -> dict[str, int]:
    """Runs a configuration in a process for each rank; returns the figures of rank 0."""
    with tempfile.TemporaryDirectory() as scratch:
        world = tree.get("cluster", {}).get("num_workers", 1)
        command = [sys.executable, __file__, "--steps", str(steps), "--tokens", str(tokens), "--work", json.dumps(tree)]
        command += ["--allocations"] * allocations
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--store", f"{scratch}/store", "--result", f"{scratch}/{rank}"],
                env={
                    **os.environ,
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "OMP_NUM_THREADS": "1",
                    "HF_DEACTIVATE_ASYNC_LOAD": "1",
                },
                stdout=subprocess.DEVNULL,
            )
            for rank in range(world)
        ]
        try:
            for rank in ranks:
                assert rank.wait(timeout=300) == 0
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return dict(json.loads(Path(f"{scratch}/0").read_text()))


def _model(size: str, folder: Path) -> Path:
    """A Llama with random weights, stored in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import build_tokenizer

    torch.manual_seed(0)
    target = folder / size
    LlamaForCausalLM(LlamaConfig(**SIZES[size], tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(target)
    build_tokenizer().save_pretrained(target)
    return target


def _planned(tree: dict[str, Any], data: Path, *, tokens: int) -> dict[str, int]:
    """Held and most bytes, by the plan."""
    import raylm

    overrides = {"data.train": str(data), "data.loss_on": "all", "data.max_seq_len": tokens, "data.cache": False}
    row = raylm.plan(tree, overrides, tokens_per_second=1.0, memory_gib=1024).chosen
    return {"held": row.weights + row.gradients + row.optimizer, "peak": row.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases such as 45m-full-fsdp, with commas between")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    for hidden in ("--work", "--store", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--allocations", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options)
        return
    from raylm.config import TrainConfig, load_config

    wanted = options.only.split(",") if options.only else None
    report: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.jsonl"
        data.write_text('{"text": "one two three four five six seven eight nine ten"}\n' * 200)
        print(f"{'MiB on rank 0':24}{'held':>8}{'planned':>9}{'allocated':>11}{'planned':>9}{'resident':>10}")
        for size in SIZES:
            model = _model(size, Path(scratch))
            for method, strategy in CASES:
                name = f"{size}-{method}-{strategy}"
                if wanted and name not in wanted:
                    continue
                base = {
                    "model": {"path": str(model)},
                    "data": {"train": "unused.json"},
                    "run": {"dir": f"{scratch}/{name}"},
                    "training": {"precision": "fp32", "global_batch_size": 1 if strategy == "single" else 2},
                }
                config = load_config(TrainConfig, base, METHODS[method] + STRATEGIES[strategy])
                tree = config.model_dump(mode="json", exclude_unset=True)
                planned = _planned(tree, data, tokens=options.tokens)
                allocations = measure(tree, steps=options.steps, tokens=options.tokens, allocations=True)
                resident = measure(tree, steps=options.steps, tokens=options.tokens)["peak"]
                held, allocated = allocations["held"], allocations["allocated"]
                report[name] = {
                    "held": held,
                    "held_error": round(planned["held"] / (held - _bucket_bytes(strategy, size)) - 1, 4),
                    "allocated": allocated,
                    "allocated_error": round(planned["peak"] / allocated - 1, 4),
                    "resident": resident,
                    "resident_error": round(planned["peak"] / resident - 1, 4),
                }
                shown = (held, planned["held"], allocated, planned["peak"], resident)
                widths = (8, 9, 11, 9, 10)
                cells = (f"{value / 2**20:>{width}.0f}" for value, width in zip(shown, widths, strict=True))
                print(f"{name:24}{''.join(cells)}", flush=True)
    errors = [abs(row[key]) for row in report.values() for key in ("held_error", "allocated_error")]
    resident_errors = [abs(row["resident_error"]) for row in report.values()]
    print(
        json.dumps(
            {"worst_error": max(errors), "worst_resident_error": max(resident_errors), "cases": report},
        )
    )


def _bucket_bytes(strategy: str, size: str) -> int:
    """ZeRO-3's bucket lies beside weights, gradients and state; the plan has it under communication."""
    return 4 * max(SIZES[size]["hidden_size"] ** 2, 5_000_000) if strategy == "zero3" else 0


if __name__ == "__main__":
    main()
