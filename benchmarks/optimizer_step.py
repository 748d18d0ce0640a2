"""Time of a step and bytes of state of each optimizer at SmolLM2-135M's shapes, beside its library called directly.

    python benchmarks/optimizer_step.py [--optimizers adamw,lamb] [--rounds 5] [--layers 30] [--device cuda]

Weights and gradients are random and shared by the two, which step in turn; nothing is downloaded. The library has the
same groups and options as the row; where the table has a file of its own, the peer is what it stands for. Medians over
rounds, after a first step apart. Left out unless named, with few --layers: SOAP and GaLore, whose first step decomposes
every matrix, Muon, whose library multiplies in bfloat16 on every CPU, and paged forms.

The last line of stdout is one JSON object; `ratio` is the library's time over raylm's.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, HEAD_DIM = 576, 1536, 192, 49_152, 64
PEERS = {
    "adagrad": "torch.optim:Adagrad",
    "lamb": "pytorch_optimizer:Lamb",
    "muon": "muon",
    "sophia": "",
    "soap": "pytorch_optimizer:SOAP",
    "adam_mini": "pytorch_optimizer:AdamMini",
    "galore": "pytorch_optimizer:GaLore",
    "apollo": "pytorch_optimizer:APOLLO",
    "adamw_8bit": "bitsandbytes.optim:AdamW8bit",
    "lion_8bit": "bitsandbytes.optim:Lion8bit",
    "paged_adamw_8bit": "bitsandbytes.optim:PagedAdamW8bit",
    "paged_lion_8bit": "bitsandbytes.optim:PagedLion8bit",
}
"""What rows of a file of ours stand for; no library has Sophia-G. The others are the libraries' own."""
SLOW = {"soap", "galore", "muon", "paged_adamw_8bit", "paged_lion_8bit"}


def parameters(layers: int, device: str) -> list[tuple[str, Any]]:
    """SmolLM2-135M's parameters by name, random, fp32; 30 layers are 134.5M elements."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        rows = {"self_attn.q_proj": HIDDEN, "self_attn.k_proj": KEYS, "self_attn.v_proj": KEYS}
        rows |= {"self_attn.o_proj": HIDDEN, "mlp.gate_proj": INTERMEDIATE, "mlp.up_proj": INTERMEDIATE}
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": (size, HIDDEN) for name, size in rows.items()}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{prefix}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (HIDDEN,)
    generator = torch.Generator(device).manual_seed(0)
    named = []
    for name, shape in shapes.items():
        parameter = torch.nn.Parameter(torch.randn(shape, device=device, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, device=device, generator=generator) * 1e-3
        named.append((name, parameter))
    return named


class _Both:
    """Two optimizers of a library that share a model."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def library(name: str, named: list[tuple[str, Any]], rate: float, decay: float) -> Any:
    """The optimizer as its library has it; None where there is none."""
    import torch

    from raylm.optim.build import is_hidden
    from raylm.optim.table import OPTIMIZERS

    row = OPTIMIZERS[name]
    factory, options = PEERS.get(name, row.factory), dict(row.options)
    if not factory:
        return None
    matrices = [p for _, p in named if p.ndim > 1]
    vectors = [p for _, p in named if p.ndim < 2]
    hidden = [p for key, p in named if is_hidden(key, p.ndim)]
    if name == "muon":
        rest = [p for key, p in named if not is_hidden(key, p.ndim)]
        muon = torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return _Both(muon, torch.optim.AdamW(rest, lr=rate, weight_decay=decay, fused=True))
    module, _, attribute = factory.partition(":")
    made: Any = getattr(importlib.import_module(module), attribute)
    if name == "adam_mini":
        heads = {"num_embeds": HIDDEN, "num_heads": HIDDEN // HEAD_DIM}
        return made(SimpleNamespace(named_parameters=lambda: named), lr=rate, weight_decay=decay, **heads)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if row.state_low_rank:
        groups[0]["params"] = [p for key, p in named if p.ndim > 1 and not is_hidden(key, p.ndim)]
        projected = {"rank": options["rank"], "update_proj_gap": options["interval_steps"], "projection_type": "std"}
        groups.append({"params": hidden, "weight_decay": decay, "scale": options["scale"], **projected})
        options = {key: options[key] for key in ("betas", "eps")}
    return made(groups, lr=rate, **options)


def state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors of the state, those in lists and objects too."""
    seen: dict[int, int] = {}
    found = [optimizer.state for optimizer in getattr(optimizer, "optimizers", [optimizer])]
    while found:
        value = found.pop()
        if hasattr(value, "nbytes"):
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple)):
            found += value
        elif hasattr(value, "ortho_matrix"):
            found.append(value.ortho_matrix)
    return sum(seen.values())


def _seconds(optimizer: Any, device: str) -> float:
    import torch

    started = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, named: list[tuple[str, Any]], rounds: int, device: str) -> dict[str, Any]:
    """Milliseconds of a step, state bytes and the ratio of one row."""
    from raylm.config.training import OptimizerSection
    from raylm.optim.build import build_optimizer

    section = OptimizerSection(name=name, learning_rate=1e-6, weight_decay=0.01)
    ours = build_optimizer(named, section, head_dim=HEAD_DIM)
    theirs = library(name, named, 1e-6, 0.01)
    both = {"raylm": ours} | ({"library": theirs} if theirs else {})
    times: dict[str, list[float]] = {key: [] for key in both}
    first = {key: _seconds(optimizer, device) for key, optimizer in both.items()}
    for turn in range(rounds):
        for key in list(both)[:: 1 if turn % 2 else -1]:
            times[key].append(_seconds(both[key], device))
    figures: dict[str, Any] = {f"{key}_ms": round(1000 * statistics.median(values), 1) for key, values in times.items()}
    figures |= {f"{key}_first_ms": round(1000 * value, 1) for key, value in first.items()}
    figures |= {f"{key}_state_bytes": state_bytes(optimizer) for key, optimizer in both.items()}
    if theirs:
        ratios = [their / our for our, their in zip(times["raylm"], times["library"], strict=True)]
        figures["ratio"] = round(statistics.median(ratios), 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", help="names, with commas between; all but the slowest by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    import torch

    from raylm.optim.table import OPTIMIZERS

    torch.set_num_threads(options.threads)
    names = options.optimizers.split(",") if options.optimizers else [n for n in OPTIMIZERS if n not in SLOW]
    named = parameters(options.layers, options.device)
    print(f"{'':20}{'raylm ms':>10}{'library ms':>12}{'ratio':>8}{'state MiB':>11}{'library MiB':>13}")
    found = {}
    for name in names:
        figures = found[name] = measure(name, named, options.rounds, options.device)
        library_mib = figures.get("library_state_bytes", 0) / 2**20
        print(
            f"{name:20}{figures['raylm_ms']:>10.1f}{figures.get('library_ms', float('nan')):>12.1f}"
            f"{figures.get('ratio', float('nan')):>8.2f}{figures['raylm_state_bytes'] / 2**20:>11.1f}"
            f"{library_mib:>13.1f}",
            flush=True,
        )
    elements = sum(parameter.numel() for _, parameter in named)
    print(json.dumps({"parameters": elements, "device": options.device, "optimizers": found}))


if __name__ == "__main__":
    main()
