"""Weights & Biases. Its own process keeps what it cannot send, below `run.dir`/wandb."""

import logging
import os
import uuid
from collections.abc import Sequence
from typing import Any

from raylm.config.metrics import MetricsSection
from raylm.errors import ConfigError
from raylm.training.sinks.base import Figures, RunInfo

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 30.0


class WandbSink:
    """See Sink. The console, command line and code of the process are not recorded: they may hold secrets."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._run: Any = None

    @staticmethod
    def check(section: MetricsSection) -> None:
        """Raises ConfigError for a run that is to be sent and no key to send it with."""
        if section.wandb_or_default.mode == "offline" or os.environ.get("WANDB_API_KEY"):
            return
        import wandb

        if not wandb.api.api_key:
            raise ConfigError(
                "metrics.sinks",
                "wandb has no API key.",
                "Set WANDB_API_KEY, call `wandb login`, or set metrics.wandb.mode=offline.",
            )

    @property
    def place(self) -> str:
        """See Sink. An offline run is one that is sent later: the same id."""
        entity = self._info.section.wandb_or_default.entity
        return "/".join(filter(None, (entity, self._info.section.project)))

    def open(self, run_id: str | None) -> str:
        """See Sink."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports to its makers
        logging.getLogger("wandb").setLevel(logging.WARNING)
        import wandb

        section = self._info.section
        self._run = wandb.init(
            project=section.project,
            entity=section.wandb_or_default.entity,
            id=run_id or uuid.uuid4().hex[:8],
            name=self._info.name,
            group=section.group,
            tags=section.tags,
            config=self._info.config.model_dump(mode="json"),
            dir=str(self._info.dir),
            mode=section.wandb_or_default.mode,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                use_dot_wandb=False,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
            ),
        )
        return str(self._run.id)

    def write(self, lines: Sequence[Figures]) -> None:
        """See Sink."""
        for line in lines:
            self._run.log({**line.values, "_timestamp": line.time}, step=line.step)

    def close(self, status: str) -> None:
        """See Sink."""
        self._run.finish(exit_code=1 if status == "failed" else 0)
