"""A draft made from a model: what is refused, what is predicted, and a whole distillation that pays."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import raylm
from raylm.config import DistillConfig, load_config
from raylm.distillation import predicted_speed_up
from raylm.errors import ConfigError, DataError, ModelError
from tests.tiny import build_tiny_model, build_tokenizer


def test_the_prediction_is_tokens_over_cost() -> None:
    assert predicted_speed_up(3.0, num_speculative_tokens=4, cost_ratio=0.125) == 2.0
    assert predicted_speed_up(1.0, num_speculative_tokens=4, cost_ratio=0.25) == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": [0, 1], "num_layers": 2}, "layers excludes num_layers"),
        ({"layers": [0, 1], "hidden_size": 64}, "layers excludes hidden_size"),
        ({"layers": []}, "layers is empty"),
        ({"data": []}, "data"),
        ({"step": 3}, "Did you mean steps"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DistillConfig, {"model": "m", "data": "d", "output": "o", **keys})


def test_faults_are_found_before_anything_is_written(tmp_path: Path, tiny_model_dir: Path, write_dataset: Any) -> None:
    data = write_dataset([("hello", "yes")])
    given = {"model": str(tiny_model_dir), "data": str(data), "output": str(tmp_path / "out")}
    for keys, kind, message in (
        ({"num_layers": 3}, ModelError, "3 is above the 2 layers"),
        ({"layers": [0, 2]}, ModelError, "2 is not one of the 2 layers"),
        ({"hidden_size": 12}, ModelError, "12 is not a multiple of 8"),
        ({"data": str(tmp_path / "absent.json")}, DataError, "absent.json"),
        ({"train": {"training": {"max_stes": 3}}}, ConfigError, "Did you mean training.max_steps"),
    ):
        with pytest.raises(kind, match=message):
            raylm.distill_draft({**given, **keys})
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ModelError, match="exists and is not an empty folder"):
        raylm.distill_draft(given)


SPOKEN = "the answer is yes no hello world who are you we see red blue green one two three four"
WORDS = SPOKEN.split()


def questions(count: int) -> list[tuple[str, str]]:
    """A small language: an answer goes on with the words of the question in a fixed order."""
    draw = random.Random(0)
    pairs = []
    for _ in range(count):
        first, second = draw.randrange(len(WORDS)), draw.randrange(1, 5)
        told = [WORDS[(first + place * second) % len(WORDS)] for place in range(12)]
        pairs.append((f"{WORDS[first]} {WORDS[second]}?", " ".join(told)))
    return pairs


def trained_model(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    """A tiny model that has learnt a little, so that there is something to distil."""
    from transformers import AutoModelForCausalLM

    build_tiny_model(folder, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = random.Random(1)
    for _ in range(150):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
            )
            for question, answer in draw.sample(pairs, 16)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_distilled_draft_is_accepted_more_often_and_changes_no_answer(
    ray_cluster: Any, tmp_path: Path, write_dataset: Any
) -> None:
    pairs = questions(96)
    target = trained_model(tmp_path / "target", pairs)
    result = raylm.distill_draft(
        {
            "model": str(target),
            "data": str(write_dataset(pairs)),
            "output": str(tmp_path / "draft"),
            "num_layers": 1,
            "steps": 120,
            "learning_rate": 3e-3,
            "max_tokens": 32,
            "eval_rows": 16,
            "dtype": "float32",
            "train": {"training": {"global_batch_size": 2}, "data.max_seq_len": 256},
        }
    )
    assert result.rows == 80
    assert result.layers == (0,)
    assert result.after["acceptance_rate"] > result.before["acceptance_rate"] + 0.1
    assert result.after["mean_accepted_length"] > result.before["mean_accepted_length"]
    assert result.same_answers == 1.0
    count = 4
    expected = result.after["mean_accepted_length"] / (1 + count * result.cost_ratio)
    assert result.predicted_speed_up == pytest.approx(expected, rel=1e-2)
    assert json.loads((tmp_path / "draft" / "distill.json").read_text())["after"] == result.after
    draft = tmp_path / "draft"
    assert result.serve.startswith(f"raylm serve {target} speculation.method=draft_model speculation.model={draft} ")
    # The folder is a draft for the model: the same vocabulary, found fit by the check of serving.
    from raylm.config.speculation import SpeculationSection
    from raylm.models.drafts import speculative_config

    section = SpeculationSection(method="draft_model", model=str(draft))
    assert speculative_config(section, str(target), use_gpu=False)["model"] == str(draft)
