"""A model out: a folder that transformers and vLLM load as it is.

The folder is complete or absent: it is written beside its place and renamed.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raylm.errors import ModelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_model(model: Any, tokenizer: Any, target: Path, *, dtype: torch.dtype, end_token: str | None) -> None:
    """Writes safetensors, config, generation_config, tokenizer and chat template.

    end_token: the control token that ends an answer in training; generation stops on it as well as on the base's own.
    Tied weights are stored once. Raises ModelError when the cast makes a weight infinite.
    """
    state = {name: _cast(name, tensor, dtype) for name, tensor in _unshared(model).items()}
    config, generation = model.config, model.generation_config
    used_cache, config.use_cache = config.use_cache, True
    ends = _end_token_ids(tokenizer, config, generation, end_token)
    previous_ends, generation.eos_token_id = generation.eos_token_id, ends
    try:
        with complete_folder(target) as scratch:
            model.save_pretrained(scratch, state_dict=state)
            _name_dtype(scratch / "config.json", dtype)
            tokenizer.save_pretrained(scratch)
    finally:
        config.use_cache = used_cache
        generation.eos_token_id = previous_ends


def export_adapter(peft_model: Any, tokenizer: Any, target: Path) -> None:
    """Writes a PEFT adapter folder with the tokenizer it was trained with."""
    with complete_folder(target) as scratch:
        peft_model.save_pretrained(scratch, safe_serialization=True)
        tokenizer.save_pretrained(scratch)


@contextmanager
def deepspeed_unseen() -> Iterator[None]:
    """Where DeepSpeed is installed, transformers imports it to save any model: more than a second, and a warning on
    machines without a GPU."""
    if "deepspeed" in sys.modules:
        yield
        return
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # "not there", to importlib.util.find_spec too
    try:
        yield
    finally:
        del sys.modules["deepspeed"]


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with deepspeed_unseen():
            yield scratch
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def storage_dtype(name: str, model_config: Any) -> torch.dtype:
    """The dtype that `export.dtype` asks for; `auto` is that of the base model's configuration, else bf16."""
    if name != "auto":
        return DTYPES[name]
    return model_config.dtype if isinstance(model_config.dtype, torch.dtype) else torch.bfloat16


def _unshared(model: Any) -> dict[str, torch.Tensor]:
    """The state with each tied weight once, under the name transformers keeps."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    named = model.state_dict()
    for name in [*(n for n in named if n not in tied), *(n for n in named if n in tied)]:
        tensor = named[name]
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen and tensor.numel():
            continue
        seen.add(key)
        state[name] = tensor
    return state


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.detach().to(dtype=dtype, device="cpu").contiguous()
    if not torch.isfinite(cast).all():
        raise ModelError(name, f"holds values that {dtype} cannot.", "Set export.dtype=fp32 or bf16.")
    return cast


def _end_token_ids(tokenizer: Any, config: Any, generation: Any, end_token: str | None) -> list[int]:
    ids: list[int] = []
    for found in (generation.eos_token_id, config.eos_token_id):
        ids += found if isinstance(found, list) else [] if found is None else [found]
    if end_token is not None:
        ids.insert(0, tokenizer.convert_tokens_to_ids(end_token))
    return list(dict.fromkeys(ids))


def _name_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """`save_pretrained` names the dtype of the live model (fp32 master weights), not that of the stored state."""
    tree = json.loads(config_file.read_text())
    tree["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(tree, indent=2) + "\n")
