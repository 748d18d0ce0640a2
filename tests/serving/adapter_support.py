"""Adapters that the tests make themselves, and an engine that only keeps count."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylm.models.adapter_files import linear_shapes
from raylm.serving.adapter_root import LocalRoot
from raylm.serving.adapters import AdapterPool, LoadedAdapter

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_adapter(folder: Path, model: Path, *, seed: int, scale: float = 0.3, **options: Any) -> Path:
    """A PEFT adapter with random matrices, large enough to change the model's answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEAR), **options}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def merged_model(model: Path, adapter: Path | None) -> Any:
    """The base in fp32 with an adapter in its weights: what a server of the pair must agree with."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().eval() if adapter else base.eval()


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens one after the other, with their log-probabilities in nats."""
    import torch

    ids: list[int] = []
    logprobs: list[float] = []
    cache, step = None, list(prompt)
    with torch.no_grad():
        for _ in range(count):
            output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            row = torch.log_softmax(output.logits[0, -1].double(), dim=-1)
            cache, step = output.past_key_values, [int(row.argmax())]
            ids += step
            logprobs.append(float(row.max()))
    return ids, logprobs


def is_greedy(model: Any, prompt: list[int], answer: list[int]) -> bool:
    """True when each token of an answer is the likeliest after those before it, up to rounding; one forward pass."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    taken = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return bool((logits.max(dim=1).values - taken).max() < 1e-3)


def replace_adapter(folder: Path, source: Path) -> None:
    """New files under the same name, as somebody puts them there who renames a whole folder into place."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.copytree(source, fresh)
    former = folder.with_name(f".{folder.name}.old")
    folder.rename(former)
    fresh.rename(folder)
    shutil.rmtree(former)


class CountingEngine:
    """`AdapterEngine` without weights."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, int]] = []
        self.held: set[int] = set()
        self.running: set[str] = set()

    async def load(self, adapter: LoadedAdapter) -> None:
        assert (adapter.folder / "adapter_model.safetensors").is_file()
        self.loads.append((adapter.engine_name, adapter.engine_id))
        self.held.add(adapter.engine_id)

    async def unload(self, adapter: LoadedAdapter) -> None:
        self.held.discard(adapter.engine_id)

    async def loaded(self) -> set[int]:
        return set(self.held)

    def in_flight(self) -> set[str]:
        return set(self.running)


def pool_of(root: Path, tmp_path: Path, model: Path, *, max_rank: int = 16) -> tuple[AdapterPool, CountingEngine]:
    engine = CountingEngine()
    shapes = linear_shapes(str(model))
    return AdapterPool(LocalRoot(root), engine, tmp_path / "copies", linear=shapes, max_rank=max_rank), engine


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
