"""The data of a run as it starts: tokenised rows, their order, and the blocks of the evaluation."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config import TrainConfig
from raylm.data.plan import RunPlan, plan_run
from raylm.data.report import DataReport

if TYPE_CHECKING:
    from raylm.data.store import TokenizerSource, TokenStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenised rows and what became of the others; evaluation: object references of one micro-batch each."""

    store: "TokenStore"
    report: DataReport
    evaluation: list[Any]


def prepare_data(config: TrainConfig, source: "TokenizerSource", folder: Path) -> PreparedData:
    """Tokenises the datasets of a run, or takes them from the cache, and notes in `folder` what could not be used.

    Needs an initialised Ray. Raises DataError.
    """
    import ray

    from raylm.data.store import tokenize_files
    from raylm.data.stream import materialized_blocks, ordered_stream

    section, micro = config.data, config.training.micro_batch_size
    store, report = tokenize_files(section.train, section, source, seed=config.run.seed)
    report.write_rejected(folder / "rejected.jsonl")
    report.check("data.train", on_bad_row=section.on_bad_row, max_bad_share=section.max_bad_share)
    logger.info("data.train: %s", report.describe())
    blocks: list[Any] = []
    if section.eval:
        eval_store, eval_report = tokenize_files(section.eval, section, source, seed=config.run.seed)
        eval_report.write_rejected(folder / "rejected-eval.jsonl")
        (folder / "data-eval.json").write_text(json.dumps(eval_report.summary(), indent=1))
        logger.info("data.eval: %s", eval_report.describe())
        eval_report.check("data.eval", on_bad_row=section.on_bad_row, max_bad_share=section.max_bad_share)
        plan = plan_run(
            eval_store.lengths,
            max_seq_len=section.max_seq_len,
            packing=section.packing,
            shuffle=False,
            seed=0,
            num_epochs=1,
            global_batch_size=micro,
        )
        stream = ordered_stream(
            ray.put(eval_store),
            ray.put(plan),
            start_step=0,
            num_steps=plan.num_steps,
            global_batch_size=micro,
            micro_batch_size=micro,
        )
        blocks = materialized_blocks(stream)
    return PreparedData(store, report, blocks)


def order_of(config: TrainConfig, lengths: np.ndarray, weights: np.ndarray | None) -> RunPlan:
    """The order of a run over sequences of these lengths, each used as often in an epoch as its weight says."""
    return plan_run(
        lengths,
        max_seq_len=config.data.max_seq_len,
        packing=config.data.packing,
        shuffle=config.data.shuffle,
        seed=config.run.seed,
        num_epochs=config.training.num_epochs,
        global_batch_size=config.training.global_batch_size,
        max_steps=config.training.max_steps,
        weights=weights,
    )
