"""An adapter and its base as one folder, the base with and without its new rows (A06)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import raylm
from raylm.config.sections import ModelSection
from raylm.config.training import LoraSection
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import ModelError
from raylm.models.adapters import add_lora
from raylm.models.export import export_adapter
from raylm.models.load import load_model
from raylm.models.vocabulary import new_rows
from tests.tiny import build_tiny_model

TOKENS = ["<|act|>", "<|obs|>", "<|end|>"]


def _adapter(folder: Path, *, tied: bool, new: bool = True) -> Any:
    """A base, the base extended by three tokens, and an adapter on that; returns the live adapted model."""
    base = build_tiny_model(folder / "base", tie_word_embeddings=tied)
    raylm.extend_vocabulary({"model": str(base), "output": str(folder / "extended"), "special": TOKENS})
    model = load_model(ModelSection(path=str(folder / "extended")), torch.device("cpu"))
    adapted = add_lora(model, LoraSection(rank=4, new_rows=new), seed=0)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    export_adapter(adapted, load_tokenizer(str(folder / "extended")), folder / "adapter")
    return adapted


@torch.no_grad()
def _logits(model: Any, last: int) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 9, last - 2, 31, last - 1, last]]), use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base", ["base", "extended"])
def test_the_merged_model_is_the_live_one_whatever_rows_the_base_has(tmp_path: Path, tied: bool, base: str) -> None:
    """A06."""
    live = _adapter(tmp_path, tied=tied)
    raylm.merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / base))
    merged, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    last = tokenizer.convert_tokens_to_ids(TOKENS[-1])
    assert merged.config.vocab_size == len(tokenizer) == last + 1
    torch.testing.assert_close(_logits(merged, last), _logits(live, last), rtol=1e-4, atol=1e-4)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    assert new_rows(merged.config) == range(last - 2, last + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_saved_whole_matrices_merges_too(tmp_path: Path, tied: bool) -> None:
    """A06, as other tools save it; A02: matrices that were one and were trained apart."""
    from peft import LoraConfig, get_peft_model

    _adapter(tmp_path, tied=tied)
    model = load_model(ModelSection(path=str(tmp_path / "extended")), torch.device("cpu"))
    live = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    torch.manual_seed(2)
    for parameter in live.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    export_adapter(live, load_tokenizer(str(tmp_path / "extended")), tmp_path / "whole")
    raylm.merge_adapter(tmp_path / "whole", tmp_path / "out", base=str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    last = merged.config.vocab_size - 1
    torch.testing.assert_close(_logits(merged, last), _logits(live, last), rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight


def test_rows_that_are_nowhere_are_named(tmp_path: Path) -> None:
    _adapter(tmp_path, tied=True, new=False)
    with pytest.raises(ModelError, match=r"does not hold the rows from 287 on, which .*base lacks"):
        raylm.merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_says_so(tmp_path: Path, tiny_model_dir: Path) -> None:
    _adapter(tmp_path, tied=True)
    with pytest.raises(ModelError, match="is not an adapter folder"):
        raylm.merge_adapter(tiny_model_dir, tmp_path / "out")
    other = build_tiny_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(ModelError, match=r"adapter: does not fit .*other: "):
        raylm.merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(other))


def test_the_command_merges_into_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    _adapter(tmp_path, tied=True)
    command = [sys.executable, "-m", "raylm.cli", "adapter", "merge", str(tmp_path / "adapter"), "--json", "--output"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"output": str(tmp_path / "out"), "base": str(tmp_path / "extended")}
    assert (tmp_path / "out" / "model.safetensors").is_file()
