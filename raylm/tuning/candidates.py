"""The training configuration of a trial, and the checks that every one of a sweep's passes before Ray starts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raylm.config import SweepConfig, TrainConfig, load_config
from raylm.config.load import read_yaml
from raylm.config.settings import flat_settings
from raylm.config.space import flat_overrides
from raylm.errors import ConfigError, RaylmError
from raylm.tuning.space import (
    MOST_COMBINATIONS,
    Settings,
    combinations,
    described,
    draw,
    edge_values,
    grid_values,
    ordered,
)

OWNED = ("run.dir", "run.storage_path", "run.overwrite", "training.resume", "export.enabled")
"""Settings that a sweep makes itself."""
DRAWN = 64
"""Points drawn at random beside the values, where a space has too many corners."""
CORNERS = 512
TRIALS_FOLDER, RETRAINED_FOLDER = "trials", "retrained"
TIME, MEMORY = "time_s", "memory_gib"
"""Figures of a trial that no single line of metrics.jsonl has."""


def with_base(config: SweepConfig) -> SweepConfig:
    """The configuration with the content of the base in it: a file may be another tomorrow. Raises ConfigError."""
    if isinstance(config.base, str):
        return config.model_copy(update={"base": read_yaml(Path(config.base))})
    return config


class Candidates:
    """Makes the training configurations of a sweep."""

    def __init__(self, config: SweepConfig, sweep_dir: Path) -> None:
        """config: with its base in it. Raises ConfigError for a base that is wrong whatever the space says."""
        assert isinstance(config.base, dict)
        self.config, self.sweep_dir = config, sweep_dir
        self._passed: set[str] = set()
        self._check_keys()
        first = self.plain(next(iter(self._edges())))
        self.metric_name = self.metric(first)
        """What trials are compared by; `check` makes sure that it is the same for all."""
        self.base_settings = {key: value for key, value in flat_settings(first).items() if key not in config.space}
        for key in {name for dimensions in config.space.values() for one in dimensions for name in one.when}:
            if key not in config.space and key not in self.base_settings:
                raise ConfigError(f"space: when: {key}", "is no setting.", "Name a key of the training configuration.")

    def _check_keys(self) -> None:
        named = {**{key: "space" for key in self.config.space}, **{key: "set" for key in self.config.set}}
        for key in (key for key in OWNED if key in named):
            raise ConfigError(f"{named[key]}.{key}", "is set by the sweep.", "Drop it.")
        for key in self.config.space:
            if key in self.config.set:
                raise ConfigError(f"set.{key}", "is in the space as well.", "Drop one.")
        ordered(self.config.space)
        base = flat_overrides(self.config.base)
        assert isinstance(base, dict)
        if base.get("training.resume") is not None:
            raise ConfigError("base: training.resume", "excludes a sweep, whose trials begin anew.", "Drop it.")

    def _edges(self) -> Iterator[Settings]:
        """Before the base is known: conditions look at the raw tree."""
        raw = flat_overrides(self._tree())
        assert isinstance(raw, dict)
        return combinations(self.config.space, {"optimizer.name": "adamw", **raw, **self.config.set}, edge_values)

    def _tree(self) -> dict[str, Any]:
        assert isinstance(self.config.base, dict)
        return dict(self.config.base)

    def plain(self, settings: Mapping[str, Any]) -> TrainConfig:
        """The base with these settings, without what a sweep sets for its trials. Raises ConfigError."""
        try:
            return load_config(TrainConfig, self._tree(), {**self.config.set, **settings})
        except ConfigError as error:
            raise _at(settings, error) from None

    def build(self, number: int, settings: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a trial. Raises ConfigError."""
        found = self.plain(settings)
        if found.cluster.is_elastic and self.config.resources.num_workers is None:
            raise ConfigError(
                "cluster.num_workers", "is elastic, and trials have as many workers all along.", "Give one number."
            )
        interval = self._interval(found)
        resources = self.config.resources
        name = f"{self.sweep_dir.name}-{number:04d}"
        own = {
            "run.dir": str(self.trial_dir(number)),
            "run.storage_path": None,
            "run.overwrite": False,
            "export.enabled": False,
            # Each trial's own: a mirror holds what one run has, and no more.
            "checkpoint.mirror": found.checkpoint.mirror and f"{found.checkpoint.mirror.rstrip('/')}/{number:04d}",
            "checkpoint.interval_steps": found.checkpoint.interval_steps or interval,
            "metrics.run_name": name,
            "metrics.group": found.metrics.group or self.sweep_dir.name,
            "cluster.num_workers": resources.num_workers or found.cluster.num_workers,
            "cluster.cpus_per_worker": resources.cpus_per_worker or found.cluster.cpus_per_worker or 1,
        }
        if resources.gpus_per_worker is not None:
            own["cluster.use_gpu"] = resources.gpus_per_worker > 0
        try:
            return load_config(TrainConfig, self._tree(), {**self.config.set, **settings, **own})
        except ConfigError as error:
            raise _at(settings, error) from None

    def retraining(self, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> TrainConfig:
        """A training with these settings, that `raylm train` runs as it is, in a folder of its own. changes: over all
        of it, such as `retrain_set`. Raises ConfigError."""
        own = {"run.dir": str(self.sweep_dir / RETRAINED_FOLDER), "run.storage_path": None, "export.enabled": True}
        return load_config(TrainConfig, self.plain(settings).model_dump(mode="json"), {**own, **changes})

    def trial_dir(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.sweep_dir / TRIALS_FOLDER / f"{number:04d}"

    def metric(self, config: TrainConfig) -> str:
        """What a trial of this configuration is compared by."""
        return self.config.metric or ("eval/loss" if config.data.eval else "train/loss")

    def _interval(self, config: TrainConfig) -> int | None:
        """Steps between reports: where the metric is known and a checkpoint lies. None: only at the end."""
        metric = self.metric(config)
        if metric.startswith("eval/") and not config.data.eval:
            raise ConfigError("metric", f"{metric} needs data.eval.", "Name an evaluation file, or another metric.")
        if not metric.startswith(("eval/", "train/", "memory/")) and metric not in (TIME, MEMORY):
            raise ConfigError(
                "metric", f"{metric!r} is no figure of a run.", "Such as eval/loss, train/loss, time_s or memory_gib."
            )
        saves = config.checkpoint.interval_steps
        interval = config.training.eval_interval_steps if metric.startswith("eval/") else saves
        if interval and saves and interval % saves:
            raise ConfigError(
                "checkpoint.interval_steps",
                f"{saves} does not divide training.eval_interval_steps={interval}: a reported loss would have no "
                "checkpoint.",
                "Drop it, or change one of them.",
            )
        every = config.metrics.log_interval_steps
        if interval and not metric.startswith("eval/") and interval % every:
            raise ConfigError(
                "metrics.log_interval_steps", f"{every} does not divide checkpoint.interval_steps={interval}."
            )
        if self.config.scheduler.name != "none" and interval is None:
            key = "training.eval_interval_steps" if metric.startswith("eval/") else "checkpoint.interval_steps"
            raise ConfigError(
                f"scheduler.name={self.config.scheduler.name}",
                "looks at trials while they run, and they report at their end only.",
                f"Set {key}.",
            )
        return interval

    def report_interval(self, config: TrainConfig) -> int | None:
        """Steps between the reports of a built configuration; None: only at the end."""
        return self._interval(config)

    def points(self) -> list[Settings]:
        """All points of a grid search, in their order."""
        return list(combinations(self.config.space, self.base_settings, grid_values))

    def corners(self) -> list[Settings]:
        """Points that show what the space holds: all combinations of choices and ends of ranges where they are few,
        else each value of each dimension at least once."""
        found = []
        for settings in combinations(self.config.space, self.base_settings, edge_values):
            found.append(settings)
            if len(found) > CORNERS:
                return list(self._each_value_once())
        return found

    def _each_value_once(self) -> Iterator[Settings]:
        import random

        rng = random.Random(self.config.seed)
        seen: set[tuple[str, str]] = set()
        for place, settings in enumerate(combinations(self.config.space, self.base_settings, edge_values)):
            new = {(key, repr(value)) for key, value in settings.items()} - seen
            if new:
                seen |= new
                yield settings
            if place >= MOST_COMBINATIONS // 10:
                break
        for _ in range(DRAWN):
            yield draw(self.config.space, self.base_settings, rng, {})

    def check(self) -> None:
        """Holds the space against everything that can be known before Ray starts. Raises RaylmError.

        Every point of a grid, else the corners of the space, make a valid configuration with an optimizer that can be
        used so; of them, enough to have each value once are checked like the start of a training.
        """
        points = self.points() if self.config.search.name == "grid" else self.corners()
        built = [self.build(number, settings) for number, settings in enumerate(points)]
        metrics = {self.metric(config) for config in built}
        if len(metrics) > 1:
            raise ConfigError("metric", f"would be {' or '.join(sorted(metrics))} by the trial.", "Set metric.")
        (self.metric_name,) = metrics
        self._check_population()
        seen: set[tuple[str, str]] = set()
        for config, settings in zip(built, points, strict=True):
            _check_optimizer(config, settings)
            new = {(key, repr(value)) for key, value in settings.items()} - seen
            if new:
                seen |= new
                self.check_whole(config, settings)
            if self.config.retrain_best:
                self._check_retraining(settings, whole=bool(new))

    def check_whole(self, config: TrainConfig, settings: Mapping[str, Any]) -> None:
        """The checks that `raylm train` makes before it starts Ray, once for all trials that they are the same for.
        Raises RaylmError that names the trial's settings."""
        from raylm.training.before_start import check_before_start, with_absolute_paths

        _check_optimizer(config, settings)
        kind = json.dumps(config.model_dump(mode="json", exclude=_NUMBERS), sort_keys=True)
        if kind in self._passed:
            return
        try:
            check_before_start(with_absolute_paths(config))
        except RaylmError as error:
            raise _at(settings, error) from None
        self._passed.add(kind)

    def _check_retraining(self, settings: Mapping[str, Any], *, whole: bool) -> None:
        try:
            config = self.retraining(settings, self.config.retrain_set)
            if whole:
                self.check_whole(config, settings)
        except RaylmError as error:
            raise type(error)("retrain_set", f"{error.where}: {error.problem}", error.remedy) from None

    def _check_population(self) -> None:
        if self.config.scheduler.name != "pbt":
            return
        for key in self.config.space:
            if not key.startswith(PERTURBABLE):
                raise ConfigError(
                    f"space.{key}",
                    "cannot change within a training, as scheduler.name=pbt does.",
                    f"What can: {', '.join(PERTURBABLE)}.",
                )


PERTURBABLE = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.options.",
    "schedule.",
    "loss.",
    "lora.dropout",
)
"""What a training may go on with another value of: the state of a checkpoint stays good."""


_NUMBERS: Any = {
    **dict.fromkeys(("run", "optimizer", "schedule", "loss", "checkpoint", "export", "metrics", "cluster"), True),
    "lora": {"rank", "alpha", "dropout"},
}
"""What the costly checks do not look at, or, as the optimizer, is checked for every trial."""


def _check_optimizer(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    from raylm.optim.build import check_optimizer
    from raylm.optim.checks import check_optimizer_use

    try:
        check_optimizer(config.optimizer)
        check_optimizer_use(config)
    except RaylmError as error:
        raise _at(settings, error) from None


def _at(settings: Mapping[str, Any], error: RaylmError) -> RaylmError:
    return type(error)(f"trial with {described(settings)}", f"{error.where}: {error.problem}", error.remedy)
