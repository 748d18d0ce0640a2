"""python -m raylm.tuning.export FOLDER: the model of the checkpoint in FOLDER/checkpoints, with FOLDER/config.yaml."""

import sys
from pathlib import Path

from raylm.config import TrainConfig, load_config
from raylm.training.finish import export, rebuilt, tokenizer_and_end
from raylm.training.job import WorkerJob
from raylm.training.run_dir import CONFIG_FILE, RunDir


def export_checkpoint(folder: Path) -> None:
    """Writes FOLDER/export, and FOLDER/adapter where the method has one. Raises ModelError, CheckpointError."""
    config = load_config(TrainConfig, folder / CONFIG_FILE)
    job = WorkerJob(config, RunDir(folder), 0, (), {}, None)
    tokenizer, end_token = tokenizer_and_end(config)
    export(job, rebuilt(job), tokenizer, end_token)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.disable_progress_bar()  # in the middle of the sweep's lines
    export_checkpoint(Path(sys.argv[1]))
