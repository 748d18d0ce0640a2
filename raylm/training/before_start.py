"""What a run is held against before Ray starts or weights load, and its paths as all nodes see them.

Nothing heavy is imported for `check_settings`, so that what it refuses is refused within a second.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from raylm.config import TrainConfig
from raylm.config.data import SourceSection
from raylm.config.deepspeed import deepspeed_config, read_deepspeed_json
from raylm.data.remote import scheme_of
from raylm.data.rows import check_first_rows
from raylm.data.sources import SourceFile, list_files
from raylm.models.folder import locate
from raylm.optim.checks import check_optimizer_use
from raylm.training.checkpoint import read_meta
from raylm.training.run_dir import locate_run_dir
from raylm.training.sinks.table import check_sinks

if TYPE_CHECKING:
    from raylm.data.store import TokenizerSource


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration as workers on any node should see it: paths of local files absolute, run.dir too, and the
    content of small ones."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path

    def template(setting: str) -> str:
        return str(Path(setting).expanduser().resolve()) if setting.endswith((".yaml", ".yml")) else setting

    def at_absolute_path(sources: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
        return tuple(
            source.model_copy(
                update={
                    "path": _absolute_pattern(source.path),
                    "template": source.template and template(source.template),
                }
            )
            for source in sources
        )

    data = config.data.model_copy(
        update={
            "train": at_absolute_path(config.data.train),
            "eval": at_absolute_path(config.data.eval),
            "template": template(config.data.template),
        }
    )
    model = config.model.model_copy(update={"path": absolute(config.model.path)})
    run = config.run.model_copy(update={"dir": str(locate_run_dir(config))})
    zero = config.deepspeed
    if zero is not None and isinstance(zero.config, str):
        zero = zero.model_copy(update={"config": read_deepspeed_json(zero.config)})
    return config.model_copy(update={"data": data, "model": model, "run": run, "deepspeed": zero})


def _absolute_pattern(path: str) -> str:
    """A local path or pattern from the root of the file system; addresses, and what does not exist, as they are."""
    local = Path(path).expanduser()
    is_local = not scheme_of(path) and (local.exists() or any(sign in path for sign in "*?["))
    return os.path.abspath(local) if is_local else path


def check_settings(config: TrainConfig) -> list[list[SourceFile]]:
    """Raises for all that settings and file names show; returns the files of `data.train` and `data.eval`."""
    check_sinks(config.metrics)
    resume = config.training.resume
    if resume not in (None, "auto") and not scheme_of(str(resume)):
        read_meta(Path(str(resume)).expanduser().resolve())
    files = [list_files(config.data.train, "data.train"), list_files(config.data.eval, "data.eval")]
    check_optimizer_use(config)
    locate(config.model.path)
    if config.data.on_bad_row == "error":
        for own in files:
            check_first_rows(own, config.data.role_map)
    return files


def check_before_start(config: TrainConfig) -> "TokenizerSource":
    """Raises for all that can be known to be wrong without Ray and without weights; returns where the tokenizer is."""
    files = check_settings(config)
    from raylm.data.store import TokenizerSource, row_tokenizer
    from raylm.models.adapters import check_lora, check_new_rows
    from raylm.models.folder import as_folder
    from raylm.models.kernels import check_liger
    from raylm.models.load import check_max_seq_len, load_config, structure_of
    from raylm.models.quantize import check_bitsandbytes, check_quantizable
    from raylm.optim.build import check_optimizer
    from raylm.training.lisa import check_lisa
    from raylm.training.prepare import check_compiler, freeze

    check_optimizer(config.optimizer)
    section = config.model
    model_config = load_config(section)
    check_max_seq_len(section, model_config, config.data.max_seq_len)
    if section.kernels == "liger":
        check_liger(model_config.model_type)
    if config.training.compile:
        check_compiler()
    if config.method.quantized:
        check_bitsandbytes()
    if config.method.adapter:
        structure = structure_of(section)
        check_lora(structure, config.lora_or_default)
        if config.method.quantized:
            check_quantizable(structure)
    if config.training.freeze:
        freeze(structure_of(section), config.training.freeze)
    if config.strategy == "deepspeed":
        deepspeed_config(config, hidden_size=model_config.get_text_config().hidden_size)
    if config.training.method == "lisa":
        check_lisa(config.lisa_or_default, model_config)
    if config.training.method == "new_rows":
        check_new_rows(model_config, section.path)
    source = TokenizerSource(
        as_folder(section.path, section.revision), section.path, section.revision, section.trust_remote_code
    )
    for own in files:
        row_tokenizer(own, config.data, source)
    return source
