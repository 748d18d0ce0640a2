"""Training of the rows that vocabulary extension added, by the worker's own code: alone, and beside adapters."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import raylm
from raylm.config import TrainConfig
from raylm.config.training import LoraSection
from raylm.errors import ModelError
from raylm.models.adapters import add_lora, add_new_rows
from raylm.models.load import load_model
from raylm.training.checkpoint import newest_checkpoint
from raylm.training.run import run_training
from tests.tiny import build_tiny_model
from tests.training.support import Rows, make_config, make_plan, read_checkpoint, run_in_process

CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def extended_model(folder: Path, *, tied: bool = True) -> Path:
    """A tiny model with 16 rows for new tokens."""
    base = build_tiny_model(folder / "base", tie_word_embeddings=tied)
    tokens = [f"<|{number}|>" for number in range(16)]
    raylm.extend_vocabulary({"model": str(base), "output": str(folder / "extended"), "special": tokens})
    return folder / "extended"


def rows_with_new_tokens(model: Path) -> Rows:
    """Rows in which every third token is new."""
    rows = Rows()
    first, number = json.loads((model / "config.json").read_text())["raylm_new_rows"]
    for ids in rows.ids:
        ids[::3] = first + ids[::3] % number
    return rows


def _config(model: Path, run: Path, method: str, *more: str) -> TrainConfig:
    options = ("optimizer.weight_decay=0.5", "export.enabled=true", "export.dtype=fp32", f"training.method={method}")
    return make_config(model, run, *options, *more)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def _logits(model: Any, ids: np.ndarray) -> torch.Tensor:
    return model.eval()(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_change_also_under_weight_decay(tmp_path: Path, tied: bool) -> None:
    """V01: old rows bit-identical."""
    model, run = extended_model(tmp_path, tied=tied), tmp_path / "run"
    lines = run_in_process(_config(model, run, "new_rows"), rows_with_new_tokens(model))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    before, after = _weights(model), _weights(run / "export")
    assert before.keys() == after.keys()
    assert (HEAD in after) is not tied
    first, number = json.loads((run / "export" / "config.json").read_text())["raylm_new_rows"]
    for name, tensor in before.items():
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(after[name], tensor), name
            continue
        assert torch.equal(after[name][:first], tensor[:first])
        assert (after[name][first:] != tensor[first:]).any(1).all()
    assert first + number == len(before[EMBEDDING])
    checkpoint = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    trained = [t for n, t in read_checkpoint(checkpoint).items() if n.startswith("model/")]
    assert [t.shape[0] for t in trained] == [number] * (1 if tied else 2)


@pytest.mark.parametrize("tied", [True, False])
def test_the_update_is_that_of_adamw_on_the_rows_alone(tmp_path: Path, tied: bool) -> None:
    """Against a model whose rows are cut out by hand, two steps."""
    model, run = extended_model(tmp_path, tied=tied), tmp_path / "run"
    rows = rows_with_new_tokens(model)
    config = _config(model, run, "new_rows", "training.max_steps=2", "schedule.name=constant")
    run_in_process(config, rows)
    plan = make_plan(config, rows)
    reference = AutoModelForCausalLM.from_pretrained(model)
    first, _ = json.loads((model / "config.json").read_text())["raylm_new_rows"]
    weights = {EMBEDDING: reference.model.embed_tokens.weight.data, HEAD: reference.lm_head.weight.data}
    names = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    parts = {name: torch.nn.Parameter(weights[name][first:].clone()) for name in names}
    optimizer = torch.optim.AdamW(parts.values(), lr=1e-2, weight_decay=0.5)
    for step in range(2):
        full = {name: torch.cat([weights[name][:first], part]) for name, part in parts.items()}
        full.setdefault(HEAD, full[EMBEDDING])
        total, count = torch.zeros(()), 0
        for place in range(4):
            for sequence in plan.row(step, place)[1]:
                ids, mask = rows.ids[sequence], rows.masks[sequence]
                tokens = torch.tensor(ids.astype(np.int64))[None]
                logits = torch.func.functional_call(
                    reference, full, (), {"input_ids": tokens}, tie_weights=False
                ).logits
                target = torch.tensor(np.where(mask[1:], ids[1:], -100).astype(np.int64))
                total = total + cross_entropy(logits[0, :-1], target, reduction="sum")
                count += int(mask[1:].sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parts.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = _weights(run / "export")
    for name, part in parts.items():
        torch.testing.assert_close(after[name][first:], part.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_and_saves_the_new_rows(tmp_path: Path, tied: bool) -> None:
    """V01, A06: the adapter on its base, its merged export, and the live model agree; the tokenizer comes along."""
    model, run = extended_model(tmp_path, tied=tied), tmp_path / "run"
    rows = rows_with_new_tokens(model)
    run_in_process(_config(model, run, "lora", "lora.rank=4"), rows)
    base, exported = _weights(model), _weights(run / "export")
    first, number = json.loads((model / "config.json").read_text())["raylm_new_rows"]
    for name in (EMBEDDING, HEAD) if not tied else (EMBEDDING,):
        assert torch.equal(exported[name][:first], base[name][:first])
        assert (exported[name][first:] != base[name][first:]).any(1).all()
    merged = AutoModelForCausalLM.from_pretrained(run / "export")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run / "adapter")
    ids = rows.ids[0]
    torch.testing.assert_close(_logits(adapted, ids), _logits(merged, ids), rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert tokenizer.convert_tokens_to_ids("<|3|>") == first + 3
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum(len(t) == number and "lora" not in n for n, t in stored.items()) == (1 if tied else 2)
    assert not any(len(tensor) > number * 8 for tensor in stored.values())  # no whole matrices


@pytest.mark.parametrize("method", ["new_rows", "lora"])
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path, method: str) -> None:
    model = extended_model(tmp_path)
    rows = rows_with_new_tokens(model)
    interval = "checkpoint.interval_steps=2"
    run_in_process(_config(model, tmp_path / "whole", method, interval), rows)
    config = _config(model, tmp_path / "cut", method, interval)
    run_in_process(config, rows, stop_after=3)
    newest = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    run_in_process(config, rows, start_from=newest, start=2)
    whole, cut = _weights(tmp_path / "whole" / "export"), _weights(tmp_path / "cut" / "export")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_frozen_new_rows_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """V01."""
    config = _config(extended_model(tmp_path), tmp_path / "run", "lora")
    with caplog.at_level(logging.WARNING):
        adapted = add_lora(load_model(config.model, CPU), LoraSection(new_rows=False), seed=0)
    assert "the 16 tokens that are new to this model will not be learnt" in caplog.text
    assert not any("token" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_a_model_without_new_rows_is_refused_before_anything_starts(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text('{"type": "text_only", "instances": [{"text": "hello"}]}')
    config = _config(tiny_model_dir, tmp_path / "run", "new_rows", f"data.train={data}")
    with pytest.raises(ModelError, match=r"has no new rows\. Make some with raylm vocab extend"):
        run_training(config)


def test_an_output_layer_with_a_bias_is_refused() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=20, raylm_new_rows=[18, 2], **settings))
    with pytest.raises(ModelError, match="its output layer has a bias"):
        add_new_rows(model)
