"""The equivalence class of a run, without Ray: accumulation, packing, resuming, evaluation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from raylm.data.stream import MicroBatch, PackedRow
from raylm.errors import CheckpointError, TrainingError
from raylm.models.load import load_model
from raylm.training.checkpoint import list_checkpoints, newest_checkpoint
from raylm.training.metrics import FIGURES
from raylm.training.worker import steps_of
from tests.training.support import Rows, make_config, make_plan, read_checkpoint, run_in_process

ROWS = Rows()


def _losses(lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    return read_checkpoint(newest)


def test_the_first_step_is_the_token_mean_of_plain_cross_entropy(tiny_model_dir: Path, tmp_path: Path) -> None:
    """L01, P02: whatever packing and accumulation do, each label weighs the same."""
    config = make_config(tiny_model_dir, tmp_path, "training.max_steps=1")
    plan = make_plan(config, ROWS)
    model = load_model(config.model, torch.device("cpu")).eval()
    total, count = 0.0, 0
    for place in range(4):
        for sequence in plan.row(0, place)[1]:
            ids, mask = ROWS.ids[sequence], ROWS.masks[sequence]
            logits = model(input_ids=torch.tensor(ids.astype(np.int64))[None]).logits[0, :-1]
            target = torch.tensor(np.where(mask[1:], ids[1:], -100).astype(np.int64))
            total += cross_entropy(logits, target, reduction="sum").item()
            count += int(mask[1:].sum())
    (line,) = run_in_process(config, ROWS)
    assert line["train/loss_tokens"] == count
    assert line["train/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "override",
    [
        "training.micro_batch_size=4",
        "training.gradient_checkpointing=true",
        "model.attention=sdpa",
        "model.attention=eager",
    ],
)
def test_the_split_of_a_batch_changes_nothing(tiny_model_dir: Path, tmp_path: Path, override: str) -> None:
    reference = run_in_process(make_config(tiny_model_dir, tmp_path / "a"), ROWS)
    other = run_in_process(make_config(tiny_model_dir, tmp_path / "b", override), ROWS)
    np.testing.assert_allclose(_losses(other), _losses(reference), rtol=1e-4)
    assert len(_losses(other)) == make_plan(make_config(tiny_model_dir, tmp_path), ROWS).num_steps


def test_packing_changes_the_rows_of_a_step_but_not_what_a_sequence_sees(tiny_model_dir: Path, tmp_path: Path) -> None:
    """All sequences in one step: packed or one a row, the same loss and gradient."""
    common = ("training.global_batch_size=24", "training.max_steps=2", "training.num_epochs=2")
    packed = run_in_process(make_config(tiny_model_dir, tmp_path / "a", *common), ROWS)
    alone = run_in_process(make_config(tiny_model_dir, tmp_path / "b", *common, "data.packing=false"), ROWS)
    np.testing.assert_allclose(_losses(packed), _losses(alone), rtol=1e-4)


@pytest.mark.parametrize(("method", "killed_at"), [("full", 3), ("full", 5), ("lora", 3), ("lora", 5), ("qlora", 5)])
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(
    tiny_model_dir: Path, tmp_path: Path, method: str, killed_at: int
) -> None:
    """C01, A12; dropout included."""
    options = [f"training.method={method}", "checkpoint.interval_steps=2"]
    options += ["lora.dropout=0.1", "lora.rank=4"] if "lora" in method else []
    whole = run_in_process(make_config(tiny_model_dir, tmp_path / "whole", *options), ROWS)
    config = make_config(tiny_model_dir, tmp_path / "cut", *options)
    run_in_process(config, ROWS, stop_after=killed_at)
    newest = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    step = int(newest.name.removeprefix("step-"))
    assert step == killed_at - killed_at % 2
    resumed = run_in_process(config, ROWS, start_from=newest, start=step)
    assert _losses(resumed) == _losses(whole)
    assert [line["train/learning_rate"] for line in resumed] == [line["train/learning_rate"] for line in whole]
    expected, got = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_lora_trains_adapters_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A01: with gradient checkpointing over frozen embeddings every adapter still learns."""
    config = make_config(
        tiny_model_dir, tmp_path, "training.method=lora", "lora.rank=2", "training.gradient_checkpointing=true"
    )
    lines = run_in_process(config, ROWS)
    state = _weights(tmp_path)
    assert all("lora_" in name for name in state)
    assert all(state[name].any() for name in state if name.startswith("model/") and "lora_B" in name)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_checkpoints_kept_are_the_last_and_the_best(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_model_dir,
        tmp_path,
        "data.eval=unused.json",
        "training.eval_interval_steps=1",
        "checkpoint.interval_steps=1",
        "checkpoint.keep_last=1",
        "optimizer.learning_rate=1.0",  # so large that the loss soon rises
    )
    plan = make_plan(config, ROWS)
    lines = run_in_process(config, ROWS, evaluation=lambda: ROWS.stream(plan, 1))
    scores = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    best = min(scores, key=lambda step: scores[step])
    kept = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path / "checkpoints")]
    assert kept == sorted({best, plan.num_steps})


def test_evaluation_weighs_every_label_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Q01: whatever the rows of a batch are."""
    results = []
    for number, micro in enumerate((1, 4)):
        config = make_config(tiny_model_dir, tmp_path / str(number), "training.max_steps=1", "data.eval=unused.json")
        plan = make_plan(config, ROWS)
        lines = run_in_process(config, ROWS, evaluation=lambda plan=plan, micro=micro: ROWS.stream(plan, micro))  # type: ignore[misc]
        results.append([line for line in lines if "eval/loss" in line][-1])
        assert {name for line in lines for name in line} - {"step", "time"} <= set(FIGURES)
    assert results[0]["eval/loss"] == pytest.approx(results[1]["eval/loss"], rel=1e-5)
    assert results[0]["eval/loss_tokens"] == results[1]["eval/loss_tokens"]
    assert results[0]["eval/perplexity"] == pytest.approx(math.exp(results[0]["eval/loss"]))


def test_a_non_finite_loss_stops_before_the_update(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path, "optimizer.learning_rate=1e30", "checkpoint.interval_steps=1")
    with pytest.raises(TrainingError, match=r"step \d+: the loss is .* the weights were not updated"):
        run_in_process(config, ROWS)
    for name, tensor in _weights(tmp_path).items():
        assert torch.isfinite(tensor).all() or "optimizer" not in name


def test_a_checkpoint_of_other_settings_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path, "training.max_steps=1")
    run_in_process(config, ROWS)
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    meta = newest / "checkpoint.json"
    meta.write_text(meta.read_text().replace('"setting": 1', '"setting": 2'))
    with pytest.raises(CheckpointError, match="was made with setting=2, the configuration says 1"):
        run_in_process(config, ROWS, start_from=newest, start=1)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_each_micro_batch_is_one_ranks_and_all_ranks_have_as_many(world_size: int, start: int) -> None:
    """Six micro-batches a step, dealt in turn from the start step on."""
    stream = [
        MicroBatch(step, 0, [PackedRow(np.full(3, 10 * step + number), np.ones(3, bool), np.array([3]), np.zeros(1))])
        for step in range(start, 6)
        for number in range(6)
    ]
    shares = [
        list(
            steps_of(
                stream[rank::world_size],
                micro_batches_per_step=6,
                start_step=start,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {6 - start}
    for number, step in enumerate(range(start, 6)):
        batches = [batch for share in shares for batch in share[number]]
        assert {len(share[number]) for share in shares} == {-(-6 // world_size)}
        found = sorted(int(batch.input_ids[0, 0]) for batch in batches if batch.loss_tokens)
        assert found == [10 * step + place for place in range(6)]


def test_a_micro_batch_of_another_step_is_a_fault() -> None:
    row = PackedRow(np.ones(3, np.int32), np.ones(3, bool), np.array([3]), np.zeros(1))
    with pytest.raises(AssertionError, match="step 0"):
        list(steps_of([MicroBatch(1, 0, [row])], micro_batches_per_step=1, start_step=0))
