"""Memory, step time and loss of full fine-tuning, LoRA (rank 128) and LISA (two blocks) on SmolLM2-135M-Instruct.

    python benchmarks/lisa_memory.py [--intervals 30] [--interval-steps 2] [--tokens 512] [--threads 2]

Each method has a process of its own; they take their steps in turn, so that all see the same machine. Bytes are counted
over the live tensors: weights, gradients between backward and update, optimizer state; peak process memory stands
beside. RAYLM_SHARED, if set, gives GSM8K; else conversations are made up. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
METHODS = ("full", "lora", "lisa")
RATES = {"full": 2e-5, "lora": 2e-4, "lisa": 5e-5}
HELD_OUT = 32


def _batches(folder: str, tokens: int) -> Iterator[Any]:
    """Conversations of about `tokens` tokens together, the loss on answers; the first ones are for evaluation."""
    from benchmarks.sft_throughput import conversations
    from raylm.data.encode import Encoder
    from raylm.data.templates import chat_template
    from raylm.data.tokenizer import load_tokenizer
    from raylm.training.batch import batch_of

    tokenizer = load_tokenizer(folder)
    template, encoder = chat_template("auto", tokenizer, "smollm2"), Encoder(tokenizer)
    ids: list[Any] = []
    masks: list[Any] = []
    for question, answer in conversations(5000):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row: Any = encoder.encode([template.render({"messages": turns})])[0]
        if ids and sum(map(len, ids)) + len(row.input_ids) > tokens:
            yield batch_of(ids, masks)
            ids, masks = [], []
        ids.append(row.input_ids)
        masks.append(row.loss_mask)


def _work(method: str, options: argparse.Namespace) -> None:
    """One method: a step for each line of stdin, a line of figures for each step."""
    import torch

    from benchmarks.sft_throughput import SMOLLM2
    from raylm.config.sections import ModelSection
    from raylm.config.training import LisaSection, LoraSection, OptimizerSection
    from raylm.models.adapters import add_lora
    from raylm.models.folder import as_folder
    from raylm.models.load import load_model
    from raylm.optim.build import build_optimizer
    from raylm.training.lisa import Lisa
    from raylm.training.loop import evaluate, train_step
    from raylm.training.module import LossModule
    from raylm.training.strategies.single import SingleStrategy

    torch.set_num_threads(options.threads)
    device, folder = torch.device("cpu"), as_folder(SMOLLM2)
    model = load_model(ModelSection(path=SMOLLM2), device)
    if method == "lora":
        model = add_lora(model, LoraSection(rank=128, alpha=256), seed=0)
    module = LossModule(model)
    optimizer = OptimizerSection(learning_rate=RATES[method])
    strategy = SingleStrategy(module, lambda named: build_optimizer(named, optimizer), device)
    lisa = Lisa(LisaSection(interval_steps=options.interval_steps), model, module.trainable(), seed=0)
    gradients = 0
    update = strategy.optimizer_step

    def measured_update() -> None:
        nonlocal gradients
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in module.parameters() if p.grad is not None)
        update()

    strategy.optimizer_step = measured_update  # type: ignore[method-assign]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    stream = _batches(folder, options.tokens)
    held_out = [next(stream) for _ in range(HELD_OUT * 128 // options.tokens)]
    print(json.dumps({"loss": evaluate(strategy, held_out, precision="fp32").loss}), flush=True)
    module.train()
    for step, line in enumerate(sys.stdin):
        if line.strip() == "end":
            break
        batch = next(stream)
        started = time.perf_counter()
        if method == "lisa" and lisa.begins_interval(step):
            strategy.train_only(lisa.names(lisa.interval_of(step)), keep_state=False)
        train_step(strategy, [batch], max_grad_norm=1.0, precision="fp32", step=step)
        seconds = time.perf_counter() - started
        states = (value for slots in strategy.optimizer.state.values() for value in slots.values())
        optimizer_bytes = sum(value.numel() * value.element_size() for value in states)
        print(
            json.dumps({"s": seconds, "held": weights + gradients + optimizer_bytes, "opt": optimizer_bytes}),
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"loss": evaluate(strategy, held_out, precision="fp32").loss, "peak": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, default=30)
    parser.add_argument("--interval-steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options.work, options)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--work"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    workers = {method: subprocess.Popen([*command, method], text=True, **pipes) for method in METHODS}
    try:
        before = {method: json.loads(worker.stdout.readline()) for method, worker in workers.items()}
        steps: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(options.intervals * options.interval_steps):
            for method, worker in workers.items():
                steps[method].append(_ask(worker, "step"))
        after = {method: _ask(worker, "end") for method, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    print(f"{'':6}{'held MiB':>10}{'optimizer MiB':>15}{'process MiB':>13}{'step s':>8}{'loss before':>13}{'after':>8}")
    held, seconds = {}, {}
    for method in METHODS:
        held[method] = max(step["held"] for step in steps[method])
        seconds[method] = statistics.median(step["s"] for step in steps[method][1:])
        optimizer = max(step["opt"] for step in steps[method])
        print(
            f"{method:6}{held[method] / 2**20:>10.0f}{optimizer / 2**20:>15.0f}{after[method]['peak'] / 2**20:>13.0f}"
            f"{seconds[method]:>8.2f}{before[method]['loss']:>13.3f}{after[method]['loss']:>8.3f}"
        )
    lasts = [step["held"] for step in steps["lisa"][options.interval_steps - 1 :: options.interval_steps]]
    result = {
        "lisa_over_full": round(held["lisa"] / held["full"], 3),
        "lora_over_full": round(held["lora"] / held["full"], 3),
        "growth_over_intervals": round(max(lasts) / lasts[0], 4),
        "step_time_lisa_over_full": round(seconds["lisa"] / seconds["full"], 3),
        "process_lisa_over_full": round(after["lisa"]["peak"] / after["full"]["peak"], 3),
        **{f"loss_{method}": round(after[method]["loss"], 4) for method in METHODS},
    }
    print(json.dumps(result))


def _ask(worker: Any, word: str) -> dict[str, float]:
    worker.stdin.write(word + "\n")
    worker.stdin.flush()
    return dict(json.loads(worker.stdout.readline()))


if __name__ == "__main__":
    main()
