"""Where the figures of a run go."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from raylm.config.base import Section

SinkName = Literal["tensorboard", "wandb", "mlflow"]
Name = Annotated[str, Field(min_length=1, max_length=128)]


class WandbSection(Section):
    """Weights & Biases. Used when `metrics.sinks` names `wandb`. The key comes from WANDB_API_KEY or `wandb login`."""

    mode: Literal["online", "offline"] = "online"
    """`offline` writes below `run.dir`/wandb and sends nothing; `wandb sync` sends it later."""
    entity: Name | None = None
    """User or team the project belongs to; default: that of the key."""


class MlflowSection(Section):
    """MLflow. Used when `metrics.sinks` names `mlflow`. Credentials come from MLflow's own environment variables."""

    tracking_uri: Name | None = None
    """Address of a tracking server; default: MLFLOW_TRACKING_URI, else a database in the run directory, mlflow.db."""

    @field_validator("tracking_uri")
    @classmethod
    def addresses_hold_no_credentials(cls, uri: str | None) -> str | None:
        if uri is not None and re.match(r"[\w+.-]+://[^/]*@", uri):
            raise ValueError(
                "the address holds credentials, which would stand in the run directory. Leave them out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give the address in MLFLOW_TRACKING_URI"
            )
        return uri


class MetricsSection(Section):
    """Where figures go besides metrics.jsonl and the report, which are always written (docs/tracking.md)."""

    sinks: tuple[SinkName, ...] = ("tensorboard",)
    """Any of `tensorboard` (event files in the run directory), `wandb` and `mlflow`."""
    log_interval_steps: int = Field(1, ge=1)
    """Steps between lines of metrics.jsonl; in between nothing is read back from the device."""
    project: Name = "raylm"
    """Project (W&B) or experiment (MLflow) that the run is listed in."""
    run_name: Name | None = None
    """Name of the run in trackers and in its report; default: the last part of `run.dir`."""
    group: Name | None = None
    """Runs that belong together: W&B's group, a tag `group` in MLflow."""
    tags: tuple[Name, ...] = ()
    """Labels such as `baseline` or `team=nlp`; MLflow gets name and value."""
    on_sink_failure: Literal["continue", "stop"] = "continue"
    """When a sink takes no figures: warn once, try again later and go on training, or end the run with a checkpoint."""
    wandb: WandbSection | None = None
    mlflow: MlflowSection | None = None

    @field_validator("sinks")
    @classmethod
    def sinks_are_named_once(cls, sinks: tuple[SinkName, ...]) -> tuple[SinkName, ...]:
        if len(set(sinks)) != len(sinks):
            raise ValueError("a sink is named twice")
        return sinks

    @field_validator("project")
    @classmethod
    def projects_can_stand_in_an_address(cls, project: str) -> str:
        if found := re.search(r"[/\\#?%:]", project):
            raise ValueError(f"a project's name cannot hold {found[0]!r}")
        return project

    @model_validator(mode="after")
    def settings_of_a_sink_go_with_the_sink(self) -> Self:
        for name in ("wandb", "mlflow"):
            if getattr(self, name) is not None and name not in self.sinks:
                raise ValueError(f"section metrics.{name} needs {name} in metrics.sinks. Name it there, or drop it")
        return self

    @property
    def wandb_or_default(self) -> WandbSection:
        """The settings in force when `sinks` names `wandb`."""
        return self.wandb or WandbSection()

    @property
    def mlflow_or_default(self) -> MlflowSection:
        """The settings in force when `sinks` names `mlflow`."""
        return self.mlflow or MlflowSection()
