"""A draft made from a model: what is refused, what is predicted, and a whole distillation that pays."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raylm
from raylm.config import DistillConfig, load_config
from raylm.data.plan import plan_run
from raylm.distillation import _check_output, _seq_len, _settings, _train_config, predicted_speed_up, split_rows
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


def answered(text: str, *, finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A row as `raylm generate` writes it."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "answer": "yes", "finish_reason": finish_reason, "tokens": 3, **more}


def test_prompts_that_are_measured_with_and_cut_answers_are_not_trained_on() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        *(answered(text) for text in ("a", "b", "c")),
        answered("d", finish_reason="length"),
        answered("a", tools=tools),
        answered("b"),
        answered("e", finish_reason="length"),
    ]
    train, held_out = split_rows(rows, eval_rows=2, max_tokens=3)
    assert train == [rows[0], rows[2], rows[4]], "the same words with tools are another prompt"
    assert held_out == rows[5:]
    with pytest.raises(DataError, match=r"only 0 of 20 answers end within 3 tokens\. Raise max_tokens"):
        split_rows([answered(str(n), finish_reason="length") for n in range(21)], eval_rows=1, max_tokens=3)
    for few in (rows[:2], [answered("a")] * 5):
        with pytest.raises(DataError, match="Give more rows"):
            split_rows(few, eval_rows=2, max_tokens=3)


def test_training_takes_whole_rows_and_reaches_its_steps(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = DistillConfig.model_validate({"model": "m", "data": ["d"], "output": "o", "steps": 7})
    resolved = _train_config(config, "m", "d", tmp_path, max_seq_len=900)
    assert (resolved.data.max_seq_len, resolved.data.loss_on) == (900, "last_assistant")
    lengths = np.array([5, 6])
    plan = plan_run(
        lengths,
        max_seq_len=900,
        packing=True,
        shuffle=True,
        seed=0,
        num_epochs=resolved.training.num_epochs,
        global_batch_size=4,
        max_steps=resolved.training.max_steps,
    )
    assert plan.num_steps == 7
    limit = json.loads((tiny_model_dir / "config.json").read_text())["max_position_embeddings"]
    for longest, wanted in ((20, min(512, limit)), (limit + 30, limit)):
        assert _seq_len([answered("a", prompt_tokens=longest - 3)], str(tiny_model_dir)) == wanted


def test_unfinished_work_of_the_same_settings_alone_is_gone_on_with(tmp_path: Path) -> None:
    def config(**more: Any) -> DistillConfig:
        return DistillConfig.model_validate({"model": "m", "data": ["d"], "output": str(tmp_path), **more})

    (tmp_path / "distillation").mkdir()
    with pytest.raises(ModelError, match="is not an empty folder"):
        _check_output(config(), "m", tmp_path)
    note = tmp_path / "distillation" / "settings.json"
    note.write_text(json.dumps(_settings(config(), "m"), indent=1) + "\n")
    _check_output(config(num_replicas=2), "m", tmp_path)
    with pytest.raises(ModelError, match="unfinished work of other settings"):
        _check_output(config(max_tokens=9), "m", tmp_path)
    (tmp_path / "distill.json").touch()
    with pytest.raises(ModelError, match="is not an empty folder"):
        _check_output(config(), "m", tmp_path)


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
    measured = {question for question, _ in pairs[-16:]}
    assert 0 < result.rows <= sum(question not in measured for question, _ in pairs[:80]) < 80
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
