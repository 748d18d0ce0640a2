"""From a bare model to one that says its new control token: extended, trained by `raylm.train`, exported (V01)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raylm
from raylm.training.metrics import read_metrics
from tests.tiny import build_tiny_model

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


@pytest.fixture
def settings(tmp_path: Path, write_dataset: Any) -> dict[str, Any]:
    base = build_tiny_model(tmp_path / "base")
    extended = tmp_path / "extended"
    raylm.extend_vocabulary({"model": str(base), "output": str(extended), "special": ["<|act|>"]})
    pairs = [(f"question {number}", "<|act|>" + "yes" * (number % 3)) for number in range(12)]
    return {
        "model.path": str(extended),
        "data.train": str(write_dataset(pairs)),
        "data.max_seq_len": 64,
        "data.allow_special_tokens": True,
        "run.dir": str(tmp_path / "run"),
        "training": {"num_epochs": 12, "global_batch_size": 4, "precision": "fp32"},
        "optimizer.learning_rate": 3e-2,
        "metrics.sinks": [],
        "cluster.cpus_per_worker": 1,
    }


def _losses(run_dir: str) -> list[float]:
    return [line["train/loss"] for line in read_metrics(Path(run_dir)) if "train/loss" in line]


def _answer(folder: str | None) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert folder is not None
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question 3"}], add_generation_prompt=True, return_dict=False
    )
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=2)[0, len(prompt) :]
    return tokenizer.convert_ids_to_tokens(ids.tolist())


def test_lora_learns_to_say_a_new_token(settings: dict[str, Any]) -> None:
    lora = {"training.method": "lora", "lora.rank": 4, "lora.target_modules": ["q_proj", "v_proj"]}
    result = raylm.train(settings, lora)
    assert _answer(result.export_dir)[0] == "<|act|>"


def test_two_workers_train_new_rows_as_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    alone = {"training.method": "new_rows", "training.num_epochs": 3}
    one = raylm.train(settings, alone)
    two = raylm.train(settings, {**alone, "run.dir": str(tmp_path / "two"), "cluster.num_workers": 2})
    np.testing.assert_allclose(_losses(two.run_dir), _losses(one.run_dir), rtol=1e-5)
    assert _losses(one.run_dir)[-1] < _losses(one.run_dir)[0]
    assert one.adapter_dir is None
