"""Training without Ray: the worker's own code on data that is already packed."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylm.config import TrainConfig, load_config
from raylm.data.plan import RunPlan
from raylm.data.stream import MicroBatch, PackedRow
from raylm.training.checkpoint import open_state, read_meta
from raylm.training.datasets import order_of
from raylm.training.job import WorkerData, WorkerJob
from raylm.training.run_dir import RunDir
from raylm.training.state import Piece
from raylm.training.worker import run_worker


class Rows:
    """Random tokenised rows, and the micro-batches of a plan over them, as Ray Data would deliver them."""

    def __init__(self, count: int = 24, vocabulary: int = 200, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.ids = [rng.integers(3, vocabulary, int(n)).astype(np.int32) for n in rng.integers(4, 30, count)]
        self.masks = [np.arange(len(ids)) >= rng.integers(1, len(ids)) for ids in self.ids]
        self.lengths = np.array([len(ids) for ids in self.ids], np.int32)

    def stream(
        self, plan: RunPlan, micro: int, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterable[MicroBatch]:
        """What worker `rank` of `world` receives from step `start` on."""
        per_step = plan.global_batch_size // micro
        for step in range(start, plan.num_steps):
            for number in range(per_step):
                if ((step - start) * per_step + number) % world == rank:
                    places = range(number * micro, number * micro + micro)
                    found = [plan.row(step, place) for place in places]
                    yield MicroBatch(step, found[0][0], [self._packed(sequences) for _, sequences in found])

    def _packed(self, sequences: np.ndarray) -> PackedRow:
        empty = np.zeros(0, np.int32)
        ids = [self.ids[s] for s in sequences]
        masks = [self.masks[s] for s in sequences]
        return PackedRow(
            np.concatenate(ids) if ids else empty,
            np.concatenate(masks) if ids else empty.astype(bool),
            np.array([len(part) for part in ids], np.int32),
            sequences,
        )


def make_config(model: Path, run_dir: Path, *overrides: str) -> TrainConfig:
    """A configuration of short runs."""
    base = {
        "model": {"path": str(model)},
        "data": {"train": "unused.json", "max_seq_len": 64},
        "run": {"dir": str(run_dir)},
        "training": {"num_epochs": 2, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.01},
        "export": {"enabled": False},
    }
    return load_config(TrainConfig, base, overrides)


def make_plan(config: TrainConfig, rows: Rows) -> RunPlan:
    """The order of a run over `rows`."""
    return order_of(config, rows.lengths, None)


def run_in_process(
    config: TrainConfig,
    rows: Rows,
    *,
    start_from: Path | None = None,
    start: int = 0,
    stop_after: int | None = None,
    evaluation: Callable[[], Iterable[MicroBatch]] | None = None,
) -> list[dict[str, Any]]:
    """Runs a worker in this process and returns the lines of metrics.jsonl; stop_after: steps after which it dies."""
    from raylm.training.metrics import read_metrics

    plan = make_plan(config, rows)
    run = RunDir(Path(config.run.dir))
    run.path.mkdir(parents=True, exist_ok=True)

    def train() -> Iterable[MicroBatch]:
        for micro_batch in rows.stream(plan, config.training.micro_batch_size, start=start):
            if stop_after is not None and micro_batch.step == stop_after:
                raise Killed
            yield micro_batch

    steps = tuple(plan.steps_in_epoch(epoch) for epoch in range(len(plan.epochs)))
    job = WorkerJob(config, run, plan.num_steps, steps, {"setting": 1}, start_from)
    torch.use_deterministic_algorithms(True)
    try:
        run_worker(job, WorkerData(train, evaluation), torch.device("cpu"), rank=0, world_size=1)
    except Killed:
        pass
    finally:
        torch.use_deterministic_algorithms(False)
    return list(read_metrics(run.path))


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it on its way."""


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return dict(open_state(path, read_meta(path)))


def whole_state(strategy: Any) -> dict[str, torch.Tensor]:
    """Copies of all tensors that the ranks hold pieces of, on each rank."""
    own = {
        name: Piece(piece.values.detach().cpu().flatten().clone(), piece.start, piece.shape)
        for name, piece in strategy.pieces().items()
    }
    found = [own]
    if strategy.world_size > 1:
        found = [{} for _ in range(strategy.world_size)]
        torch.distributed.all_gather_object(found, own)
    whole: dict[str, torch.Tensor] = {}
    for pieces in found:
        for name, piece in pieces.items():
            whole.setdefault(name, torch.full(piece.shape, torch.nan)).view(-1)[
                piece.start : piece.start + piece.values.numel()
            ] = piece.values
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole
