"""MLflow: a tracking server, or a database of its own in the run directory."""

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raylm.config.metrics import MetricsSection
from raylm.config.settings import flat_settings
from raylm.errors import ConfigError
from raylm.training.sinks.base import Figures, RunInfo
from raylm.training.sinks.secrets import without_secrets

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"
METRICS_PER_REQUEST = 1000
PARAMETERS_PER_REQUEST = 100
LONGEST_PARAMETER = 6000
_STATUSES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# For a caller that tries again by itself; MLflow's own are 120 s and 7 retries, four minutes in all.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class MlflowSink:
    """See Sink. Through MLflow's client alone: the process's active run and tracking address stay as they are."""

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._uri = _uri(info.section)
        self._client: Any = None
        self._run_id = ""

    @staticmethod
    def check(section: MetricsSection) -> None:
        """Raises ConfigError where a database is to be written without what writes one."""
        from raylm.training.sinks.table import is_installed

        missing = [name for name in ("sqlalchemy", "alembic") if not is_installed(name)]
        if missing and not re.match(r"https?://|databricks", _uri(section) or ""):
            raise ConfigError(
                "metrics.sinks",
                f"mlflow needs {' and '.join(missing)} to write a database.",
                "Install it: pip install 'raylm[tracking]', or name a server in metrics.mlflow.tracking_uri.",
            )

    @property
    def place(self) -> str:
        """See Sink."""
        return f"{without_secrets(self._uri or DATABASE)} {self._info.section.project}"

    def open(self, run_id: str | None) -> str:
        """See Sink."""
        for name, value in {**_PATIENCE, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic", "urllib3.connectionpool"):  # after the import, which sets levels
            logging.getLogger(noisy).setLevel(logging.ERROR)
        local = f"sqlite:///{self._info.dir / DATABASE}"
        self._client = MlflowClient(tracking_uri=self._uri or local, registry_uri=self._uri or local)
        if run_id and self._goes_on(run_id):
            self._run_id = run_id
        else:
            self._run_id = self._new_run()
        return self._run_id

    def write(self, lines: Sequence[Figures]) -> None:
        """See Sink."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), round(line.time * 1000), line.step)
            for line in lines
            for name, value in line.values.items()
        ]
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])

    def close(self, status: str) -> None:
        """See Sink."""
        self._client.set_terminated(self._run_id, _STATUSES[status])

    def _goes_on(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # deleted there
                return False
            raise
        return True

    def _new_run(self) -> str:
        from mlflow.entities import Param

        section = self._info.section
        tags = {name: value or "true" for name, _, value in (tag.partition("=") for tag in section.tags)}
        if section.group:
            tags["group"] = section.group
        run = self._client.create_run(self._experiment(section.project), run_name=self._info.name, tags=tags)
        settings = [
            Param(name, (value if isinstance(value, str) else json.dumps(value))[:LONGEST_PARAMETER])
            for name, value in flat_settings(self._info.config).items()
        ]
        for start in range(0, len(settings), PARAMETERS_PER_REQUEST):
            self._client.log_batch(run.info.run_id, params=settings[start : start + PARAMETERS_PER_REQUEST])
        return str(run.info.run_id)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        artifacts = None if self._uri else Path(self._info.dir / ARTIFACTS).as_uri()
        try:
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
                raise
            return str(self._client.get_experiment_by_name(name).experiment_id)


def _uri(section: MetricsSection) -> str | None:
    return section.mlflow_or_default.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
