"""The sinks, one row each. Plain data: readable without the packages."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from raylm.config.metrics import MetricsSection
from raylm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkRow:
    """Where a sink lives and what it needs. factory: "module:class", imported on use; package: its import name."""

    factory: str
    package: str
    install: str


SINKS = {
    "tensorboard": SinkRow(
        factory="raylm.training.sinks.tensorboard:TensorboardSink",
        package="tensorboard",
        install="pip install tensorboard",
    ),
    "wandb": SinkRow(
        factory="raylm.training.sinks.wandb:WandbSink",
        package="wandb",
        install="pip install 'raylm[tracking]', or pip install 'wandb>=0.31'",
    ),
    "mlflow": SinkRow(
        factory="raylm.training.sinks.mlflow:MlflowSink",
        package="mlflow",
        install="pip install 'raylm[tracking]', or pip install mlflow",
    ),
}


def sink_class(name: str) -> Any:
    """The class of a sink, imported on use; the package behind it only when a run is opened."""
    module, _, attribute = SINKS[name].factory.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_sinks(section: MetricsSection) -> None:
    """Raises ConfigError for a sink that is not installed or lacks what it needs."""
    for name in section.sinks:
        row = SINKS[name]
        if not is_installed(row.package):
            raise ConfigError("metrics.sinks", f"{row.package} is not installed.", f"Install it: {row.install}.")
        sink_class(name).check(section)


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
