"""Training at the size of a 7B model on GPUs: full with ZeRO-3, LoRA, LISA. Random weights, made-up data, no network.

    python benchmarks/gpu/train.py [--size 7b] [--gpus N] [--methods full,lora,lisa] [--seq-len 4096] [--steps 12]

Full fine-tuning takes 16 bytes a parameter over all GPUs; where they have less, its optimizer and weights are
offloaded to host memory. LoRA and LISA run on one GPU, or on all with FSDP. Each method is a run of its own, as a user
would start it. Printed are, as medians without the first two steps: tokens/s, MFU (of the matrix peak measured in the
same run), and peak device memory. `--size tiny` runs the same on CPUs and checks the script, not the figures. The last
line of stdout is one JSON object.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SIZES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
}
VOCABULARY = 32_000
BYTES_FULL = 16
"""Of weights, gradients, and AdamW's two moments, in fp32."""


def build_model(folder: Path, size: str) -> int:
    """A Llama of the size with random weights in bf16, saved as a folder; returns its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import build_tokenizer

    shape = SIZES[size]
    vocabulary = VOCABULARY if size != "tiny" else 320
    config = LlamaConfig(
        **shape, num_key_value_heads=shape["num_attention_heads"], vocab_size=vocabulary, max_position_embeddings=8192
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0.0, 0.02)
    model.save_pretrained(folder, max_shard_size="4GB")
    build_tokenizer().save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    if torch.cuda.is_available():  # the workers want all of the device
        torch.cuda.empty_cache()
    return parameters


def check_room(scratch: str, methods: list[str], size: str) -> None:
    """Ends the program where the disk has no room for the model and the checkpoint at the end of a run."""
    shape = SIZES[size]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    parameters = shape["num_hidden_layers"] * (4 * width**2 + 3 * width * inner) + 2 * VOCABULARY * width
    needed = parameters * (2 + (12 if "full" in methods else 4))  # bf16, and fp32 with AdamW's two moments
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(
            f"{scratch} has {free / 2**30:.0f} GiB free, the runs need {needed / 2**30:.0f}: set TMPDIR to a larger "
            "disk, or take --methods lora or --size 1b."
        )


def build_data(path: Path, rows: int) -> Path:
    """Conversations of some hundred tokens."""
    words = ["the", "answer", "of", "a", "question", "about", "numbers", "is", "found", "with", "care"]
    with path.open("w") as file:
        for n in range(rows):
            question = " ".join(words[(n * 7 + k) % len(words)] for k in range(40 + n % 60))
            answer = " ".join(words[(n * 3 + k) % len(words)] for k in range(60 + n % 90))
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    return path


def settings_of(method: str, gpus: int, parameters: int, device_bytes: int) -> dict[str, Any]:
    """The strategy that a method takes on these GPUs."""
    if method == "full":
        zero: dict[str, Any] = {"training.strategy": "deepspeed", "deepspeed.stage": 3}
        if device_bytes and BYTES_FULL * parameters > 0.8 * gpus * device_bytes:
            zero |= {"deepspeed.offload_optimizer": True, "deepspeed.offload_param": True}
        return zero
    extra: dict[str, Any] = {"lora.rank": 64} if method == "lora" else {"lisa.num_active_layers": 2}
    return extra | ({"training.strategy": "fsdp"} if gpus > 1 else {})


def measure(method: str, model: Path, data: Path, run_dir: Path, options: Any, parameters: int) -> dict[str, Any]:
    """One run, and its figures."""
    import raylm
    from raylm.training.metrics import read_metrics

    gpus = torch.cuda.device_count() if options.gpus is None else options.gpus
    workers = max(1, gpus)
    device_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    chosen = settings_of(method, workers, parameters, device_bytes)
    raylm.train(
        {
            "model.path": str(model),
            "data.train": str(data),
            "data.max_seq_len": options.seq_len,
            "run.dir": str(run_dir),
            "training.method": method,
            "training.max_steps": options.steps,
            "training.num_epochs": 100,
            "training.global_batch_size": workers * options.rows,
            "training.gradient_checkpointing": True,
            "cluster.num_workers": workers,
            "checkpoint.interval_steps": None,
            "metrics.sinks": [],
            "export.enabled": False,
            **chosen,
        }
    )
    lines = [line for line in read_metrics(run_dir) if "train/loss" in line][2:]
    figures = {
        "tokens_per_second": round(statistics.median(line["train/tokens_per_second"] for line in lines), 1),
        "mfu": round(statistics.median(line["train/mfu"] for line in lines), 3),
        "peak_gib": round(max(line.get("memory/device_peak_gib", 0.0) for line in lines), 2),
        "host_gib": round(max(line["memory/host_gib"] for line in lines), 2),
    }
    print(method, {key: value for key, value in chosen.items()}, figures, flush=True)
    return figures


def main() -> None:
    """Runs the methods one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--methods", default="full,lora,lisa")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4, help="packed rows a GPU and step")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    if not torch.cuda.is_available() and options.size != "tiny":
        parser.error("there is no GPU here; --size tiny checks the script on CPUs")
    with tempfile.TemporaryDirectory() as scratch:
        check_room(scratch, options.methods.split(","), options.size)
        model = Path(scratch) / "model"
        parameters = build_model(model, options.size)
        data = build_data(Path(scratch) / "data.jsonl", 20_000 if options.size != "tiny" else 200)
        result = {
            method: measure(method, model, data, Path(scratch) / method, options, parameters)
            for method in options.methods.split(",")
        }
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        print(json.dumps({"size": options.size, "parameters": parameters, "device": device, **result}))


if __name__ == "__main__":
    main()
