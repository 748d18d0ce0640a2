"""Runs that end before their last step, on one process and on ranks."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raylm.config import TrainConfig, load_config
from raylm.errors import ConfigError
from raylm.training import stopping
from raylm.training.checkpoint import list_checkpoints
from raylm.training.stopping import STOP_FILE, Patience, Stop, Watch, hold, stop_on_sigterm
from tests.training.ranks import Ranks, ranks, train_rank
from tests.training.support import Rows, make_config, run_in_process

ROWS = Rows(60)


def _steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run_dir / "checkpoints")]


def _losses(lines: Iterable[dict[str, Any]]) -> list[float]:
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_patience_counts_evaluations_since_the_best() -> None:
    patience = Patience(2)
    assert [patience.is_over(loss) for loss in (3.0, 2.0, 2.0, 1.0, 1.5, 1.0)] == [False] * 5 + [True]
    resumed = Patience(2, [3.0, 1.0, 1.5])
    assert resumed.is_over(1.2)
    assert not any(Patience(None).is_over(loss) for loss in (1.0, 2.0, 3.0, 4.0))


def test_the_clock_and_the_file_ask_for_a_stop(tmp_path: Path) -> None:
    assert Watch(tmp_path, None).reason() == Stop.NOT
    assert Watch(tmp_path, time.time() + 60).reason() == Stop.NOT
    assert Watch(tmp_path, time.time() - 1).reason() == Stop.TIME_LIMIT
    (tmp_path / STOP_FILE).touch()
    assert Watch(tmp_path, time.time() - 1).reason() == Stop.REQUESTED


def test_a_held_run_waits_before_the_next_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Held at step 2 it takes no third step until it is let on; its numbers are those of a run that was not held."""
    settings = ["training.max_steps=4", "checkpoint.interval_steps=1", "checkpoint.keep_last=9"]
    free = run_in_process(make_config(tiny_model_dir, tmp_path / "free", *settings), ROWS)
    (tmp_path / "held").mkdir()
    hold(tmp_path / "held", 2)
    seen: list[int] = []

    def let_on() -> None:
        while len(_steps(tmp_path / "held")) < 2:
            time.sleep(0.02)
        time.sleep(0.5)
        seen.append(len(_steps(tmp_path / "held")))
        hold(tmp_path / "held", None)

    other = threading.Thread(target=let_on)
    other.start()
    held = run_in_process(make_config(tiny_model_dir, tmp_path / "held", *settings), ROWS)
    other.join()
    assert seen == [2]
    assert _losses(held) == _losses(free)


def test_who_is_told_to_stop_need_not_be_let_on(tmp_path: Path) -> None:
    hold(tmp_path, 3)
    assert Watch(tmp_path, None).reason(2) == Stop.NOT
    (tmp_path / STOP_FILE).touch()
    assert Watch(tmp_path, None).reason(3) == Stop.REQUESTED
    with stop_on_sigterm(tmp_path):
        assert Watch(tmp_path, None).reason(99) == Stop.NOT  # what a former driver asked is forgotten


def test_sigterm_asks_once_and_then_ends(tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm(tmp_path):
        assert not (tmp_path / STOP_FILE).exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (tmp_path / STOP_FILE).exists()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == former


def test_a_run_stops_when_evaluations_no_longer_improve_and_exports(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = ["data.eval=unused.json", "training.eval_interval_steps=1", "training.early_stopping_patience=2"]
    settings += ["optimizer.learning_rate=1.0", "export.enabled=true"]  # so large that the loss soon rises
    config = make_config(tiny_model_dir, tmp_path, *settings)
    plan_rows = Rows(4)
    lines = run_in_process(config, ROWS, evaluation=lambda: list(_stream(config, plan_rows)))
    scores = [line["eval/loss"] for line in lines if "eval/loss" in line]
    best = scores.index(min(scores))
    assert len(scores) == best + 1 + 2  # two evaluations after the best one
    assert _steps(tmp_path)[-1] == len(scores)
    assert (tmp_path / "stopped.txt").read_text() == stopping.DESCRIPTIONS[Stop.NO_IMPROVEMENT]
    assert (tmp_path / "export" / "model.safetensors").is_file()


def _stream(config: TrainConfig, rows: Rows) -> Iterator[Any]:
    from tests.training.support import make_plan

    yield from rows.stream(make_plan(config, rows), 1)


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with ranks(2) as found:
        yield found


def _stopped_at(rank: int, world_size: int, config: TrainConfig, rows: Rows, step: int) -> list[dict[str, Any]]:
    """A run in which rank 0, and nobody else, is asked to stop when it is about to take a step."""
    former = Watch.reason
    seen: list[int] = []

    def reason(self: Watch, *_: object) -> Stop:
        assert rank == 0, "only rank 0 looks"
        seen.append(1)
        return Stop.REQUESTED if len(seen) == step else Stop.NOT

    Watch.reason = reason  # type: ignore[method-assign]
    try:
        return train_rank(rank, world_size, config, rows)
    finally:
        Watch.reason = former  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_stop_after_the_same_step_and_the_run_goes_on(
    pool: Ranks, tiny_model_dir: Path, tmp_path: Path, strategy: str
) -> None:
    settings = [f"training.strategy={strategy}", "cluster.num_workers=2", "export.enabled=true"]
    whole = pool.run(2, train_rank, make_config(tiny_model_dir, tmp_path / "whole", *settings), ROWS)[0]
    config = make_config(tiny_model_dir, tmp_path / "cut", *settings)
    pool.run(2, _stopped_at, config, ROWS, 3)
    assert _steps(tmp_path / "cut") == [3]
    assert not (tmp_path / "cut" / "export").exists(), "whoever asks for a stop does not want to wait"
    checkpoint = list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    resumed = pool.run(2, train_rank, config, ROWS, 3, checkpoint)[0]
    assert _losses(resumed) == _losses(whole)
    assert (tmp_path / "cut" / "export").is_dir()


def test_a_time_limit_ends_a_run_with_a_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    from tests.training import support

    former = support.WorkerJob
    support.WorkerJob = lambda *arguments: replace(former(*arguments), deadline=time.time() - 1)  # type: ignore
    try:
        lines = run_in_process(make_config(tiny_model_dir, tmp_path), ROWS)
    finally:
        support.WorkerJob = former  # type: ignore[misc]
    assert len(lines) == 1
    assert _steps(tmp_path) == [1]
    assert (tmp_path / "stopped.txt").read_text() == "training.max_time_s is over"


def test_patience_needs_evaluations() -> None:
    base: Any = {"model.path": "m", "data.train": "d.json", "training.early_stopping_patience": 2}
    with pytest.raises(ConfigError, match=r"needs training\.eval_interval_steps"):
        load_config(TrainConfig, {}, base)
