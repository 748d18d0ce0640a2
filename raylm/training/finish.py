"""The model that a run leaves behind."""

from typing import Any

import torch

from raylm.config import TrainConfig
from raylm.data.templates.table import AUTO, chat_template
from raylm.data.tokenizer import load_tokenizer
from raylm.models.adapters import merged
from raylm.models.export import export_adapter, export_model, storage_dtype
from raylm.models.folder import as_folder
from raylm.models.load import load_config, load_model
from raylm.optim.build import averaging_beta
from raylm.training.averages import AveragedState
from raylm.training.checkpoint import newest_checkpoint, open_state, read_meta
from raylm.training.job import WorkerJob
from raylm.training.module import LossModule
from raylm.training.prepare import prepared
from raylm.training.state import restore_weights


def tokenizer_and_end(config: TrainConfig) -> tuple[Any, str | None]:
    """The tokenizer with the chat template that was trained with, and the control token that ends an answer."""
    section = config.model
    tokenizer = load_tokenizer(
        as_folder(section.path, section.revision),
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    if config.data.template == AUTO and not tokenizer.chat_template:
        return tokenizer, tokenizer.eos_token  # a base model on plain text
    template = chat_template(config.data.template, tokenizer, section.path)
    if config.data.template != AUTO:
        tokenizer.chat_template = template.jinja()
    return tokenizer, template.end_token()


def rebuilt(job: WorkerJob) -> Any:
    """The trained model on the CPU, from the base as it is stored and the last checkpoint: no rank of a sharded run
    holds it, and one of a quantised run only what its weights became."""
    newest = newest_checkpoint(job.run.checkpoints)
    assert newest is not None, "a run ends with a checkpoint"
    section = job.config.model.model_copy(update={"attention": "auto"})  # that of the run may need a GPU
    model = prepared(load_model(section, torch.device("cpu")), job.config)
    state = AveragedState(open_state(newest, read_meta(newest)), beta=averaging_beta(job.config.optimizer))
    restore_weights(LossModule(model).trainable(), state)
    return model


def export(job: WorkerJob, model: Any, tokenizer: Any, end_token: str | None) -> None:
    config = job.config
    dtype = storage_dtype(config.export.dtype, load_config(config.model))
    if config.method.adapter:
        export_adapter(model, tokenizer, job.run.adapter)
    if config.method.merges:
        model = merged(model.cpu())  # beside the copy there may be no room on the device
    export_model(model, tokenizer, job.run.export, dtype=dtype, end_token=end_token)
