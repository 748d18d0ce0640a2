"""The training configuration of a trial, and the checks that every one of a sweep's passes before Ray starts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylm.config import SweepConfig, TrainConfig, load_config
from raylm.config.load import check_key, read_yaml
from raylm.config.settings import flat_settings
from raylm.config.space import flat_overrides
from raylm.config.sweep import SchedulerSection
from raylm.errors import ConfigError, RaylmError, nearest
from raylm.optim.checks import check_optimizer_use
from raylm.optim.table import averaging_option, optimizer_row
from raylm.ray_session import is_local
from raylm.training.before_start import check_before_start, check_settings, with_absolute_paths
from raylm.training.mirror import joined
from raylm.tuning.conditions import check_conditions
from raylm.tuning.room import local_cpus, plan_room
from raylm.tuning.space import (
    MOST_COMBINATIONS,
    Settings,
    combinations,
    described,
    draw,
    edge_draws,
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
        """Raises ConfigError for a base that is wrong whatever the space says."""
        self._base_name = f"base {config.base}" if isinstance(config.base, str) else "base"
        self.config, self.sweep_dir = with_base(config), sweep_dir
        """config: with the content of the base in it."""
        self._passed: set[str] = set()
        self._check_keys()
        first = self.plain(next(iter(self._edges())))
        self.metric_name = self.metric(first)
        """What trials are compared by; `check` makes sure that it is the same for all."""
        self._check_metrics(first)
        self.base_settings = {
            **self._own_values(),
            **{k: v for k, v in flat_settings(first).items() if k not in config.space},
        }
        """Those of the base and of `set`, flat: what a setting is where the space gives it no value."""
        check_conditions(config.space, self.base_settings)

    def _check_keys(self) -> None:
        named = {**{key: "space" for key in self.config.space}, **{key: "set" for key in self.config.set}}
        for key, where in named.items():
            check_key(TrainConfig, key, where)
            if key in OWNED:
                raise ConfigError(f"{where}.{key}", "is set by the sweep.", "Drop it.")
        for key in self.config.space:
            if key in self.config.set:
                raise ConfigError(f"set.{key}", "is in the space as well.", "Drop one.")
        ordered(self.config.space)
        base = flat_overrides(self.config.base)
        assert isinstance(base, dict)
        for where, keys in ((self._base_name, base), ("retrain_set", self.config.retrain_set)):
            for key in keys:
                check_key(TrainConfig, key, where)
        if base.get("training.resume") is not None:
            raise ConfigError(
                f"{self._base_name}: training.resume", "excludes a sweep, whose trials begin anew.", "Drop it."
            )

    def _check_metrics(self, config: TrainConfig) -> None:
        """Raises ConfigError for what no report of a training will have."""
        from raylm.training.metrics import FIGURES

        known = [*(name for name in FIGURES if config.data.eval or not name.startswith("eval/")), TIME, MEMORY]
        objectives = {
            f"search.objectives.{n}.metric": one.metric for n, one in enumerate(self.config.search.objectives)
        }
        for where, metric in {"metric": self.metric_name, **objectives}.items():
            if metric in FIGURES and metric not in known:
                raise ConfigError(where, f"{metric} needs data.eval.", "Name an evaluation file, or another metric.")
            if metric not in known:
                raise ConfigError(where, f"{metric!r} is no figure of a run.", nearest(metric, known))
            if where != "metric" and metric == self.metric_name:
                raise ConfigError(where, f"{metric} is the metric already.", "Drop it, or name another figure.")

    def _own_values(self) -> dict[str, Any]:
        """What the base has of the space; nothing where it is no training without the space."""
        try:
            found = flat_settings(load_config(TrainConfig, self._tree(), self.config.set))
        except ConfigError:
            return {}
        return {key: found[key] for key in self.config.space if key in found}

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
            raise self._whose(settings, error) from None

    def _whose(self, settings: Mapping[str, Any], error: ConfigError) -> ConfigError:
        """The fault of a configuration, by what it comes from: the base, `set`, or the settings of a trial."""
        for name, overrides in {self._base_name: {}, "set": self.config.set}.items():
            try:
                load_config(TrainConfig, self._tree(), overrides)
            except ConfigError as other:
                if other.problem == error.problem:
                    return ConfigError(name, error.problem, error.remedy)
        return ConfigError(f"trial with {described(settings)}", error.problem, error.remedy)

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
            "checkpoint.mirror": found.checkpoint.mirror and joined(found.checkpoint.mirror, f"{number:04d}"),
            "checkpoint.interval_steps": found.checkpoint.interval_steps or interval,
            "metrics.run_name": name,
            "metrics.group": found.metrics.group or self.sweep_dir.name,
            "cluster.num_workers": resources.num_workers or found.cluster.num_workers,
            "cluster.cpus_per_worker": resources.cpus_per_worker or found.cluster.cpus_per_worker or 1,
        }
        gpus, workers = resources.gpus_per_worker, resources.num_workers or found.cluster.max_workers
        if gpus and gpus < 1 and workers > 1:
            raise ConfigError(
                "resources.gpus_per_worker",
                f"{gpus:g} excludes cluster.num_workers={workers}: workers of one trial cannot share a GPU.",
                "Set gpus_per_worker=1.",
            )
        if gpus is not None:
            own["cluster.use_gpu"] = gpus > 0
        try:
            return load_config(TrainConfig, self._tree(), {**self.config.set, **settings, **own})
        except ConfigError as error:  # without them it is good
            raise ConfigError(f"trial with {described(settings)}, resources", error.problem, error.remedy) from None

    def retraining(self, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> TrainConfig:
        """A training with these settings, that `raylm train` runs as it is, in a folder of its own. changes: over all
        of it, such as `retrain_set`. Raises ConfigError."""
        found = self.plain(settings)
        own = {"run.dir": str(self.sweep_dir / RETRAINED_FOLDER), "run.storage_path": None, "export.enabled": True}
        mirror = found.checkpoint.mirror and joined(found.checkpoint.mirror, RETRAINED_FOLDER)
        return load_config(TrainConfig, found.model_dump(mode="json"), {**own, "checkpoint.mirror": mirror, **changes})

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
                "metrics.log_interval_steps",
                f"{every} does not divide checkpoint.interval_steps={interval}: a report would have no figures.",
                "Set it to 1, or change one of them.",
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
        for settings in edge_draws(self.config.space, self.base_settings, rng, MOST_COMBINATIONS // 10):
            new = {(key, repr(value)) for key, value in settings.items()} - seen
            if new:
                seen |= new
                yield settings
        for _ in range(DRAWN):
            yield draw(self.config.space, self.base_settings, rng, {})

    def check(self) -> None:
        """Holds the space against everything that can be known before Ray starts. Raises RaylmError.

        Every point of a grid, else the corners of the space, make a valid configuration with an optimizer that can be
        used so; of them, enough to have each value once are checked like the start of a training.
        """
        points = self.points() if self.config.search.name == "grid" else self.corners()
        if not any(points):
            raise ConfigError("space", "no `when` ever holds: all trials would be the base.", "Correct the conditions.")
        built = [self.build(number, settings) for number, settings in enumerate(points)]
        here = is_local(built[0].cluster.address)
        num_cpus = local_cpus(built, self.config.concurrency) if here else 0
        metrics = {self.metric(config) for config in built}
        if len(metrics) > 1:
            raise ConfigError("metric", f"would be {' or '.join(sorted(metrics))} by the trial.", "Set metric.")
        (self.metric_name,) = metrics
        self._check_population(built[0])
        check_scheduler_steps(self.config.scheduler, _most_steps(built))
        for config, settings in zip(built, points, strict=True):  # before torch is imported
            with _named(settings):
                check_optimizer_use(config)
        new = list(_with_new_values(points))
        for place in new:
            with _named(points[place]):
                check_settings(with_absolute_paths(built[place]))
        for place, (config, settings) in enumerate(zip(built, points, strict=True)):
            _check_optimizer(config, settings)
            if place in new:
                self.check_whole(config, settings)
            if self.config.retrain_best:
                self._check_retraining(settings, whole=place in new)
        if here:
            import torch

            node = {"CPU": float(num_cpus), "GPU": float(torch.cuda.device_count())}
            plan_room(built, self.config.resources, self.config.concurrency, [node])

    def check_whole(self, config: TrainConfig, settings: Mapping[str, Any]) -> None:
        """The checks that `raylm train` makes before it starts Ray, once for all trials that they are the same for.
        Raises RaylmError that names the trial's settings."""
        _check_optimizer(config, settings)
        kind = json.dumps(config.model_dump(mode="json", exclude=_NUMBERS), sort_keys=True)
        if kind in self._passed:
            return
        with _named(settings):
            check_before_start(with_absolute_paths(config))
        self._passed.add(kind)

    def _check_retraining(self, settings: Mapping[str, Any], *, whole: bool) -> None:
        try:
            config = self.retraining(settings, self.config.retrain_set)
            if whole:
                self.check_whole(config, settings)
        except RaylmError as error:
            where = "" if error.where == TrainConfig.__name__ else f"{error.where}: "
            raise type(error)("retrain_set", f"{where}{error.problem}", error.remedy) from None

    def _check_population(self, first: TrainConfig) -> None:
        if self.config.scheduler.name != "pbt":
            return
        for key in self.config.space:
            if not key.startswith(PERTURBABLE) or key in _OF_THE_STATE:
                raise ConfigError(
                    f"space.{key}",
                    "cannot change within a training, as scheduler.name=pbt does.",
                    f"What can: {', '.join(f'{key}…' if key.endswith('.') else key for key in PERTURBABLE)}.",
                )
        name = first.optimizer.name  # the same for all
        if (
            option := averaging_option(optimizer_row(name))
        ) is not None and f"optimizer.options.{option}" in self.config.space:
            raise ConfigError(
                f"space.optimizer.options.{option}",
                f"cannot change within a training with {name}: its averaged weights are made with it.",
                "Drop it, or take another scheduler.",
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
_OF_THE_STATE = {
    f"optimizer.options.{name}"
    for name in (
        *("rank", "max_precondition_dim", "precondition_1d", "merge_dims", "data_format", "min_8bit_size"),
        *("amsgrad", "ams_bound", "centered"),
    )
}
"""What shapes the state of an optimizer, or says what there is of it."""


_NUMBERS: Any = {
    **dict.fromkeys(("run", "optimizer", "schedule", "loss", "checkpoint", "export", "metrics", "cluster"), True),
    "lora": {"rank", "alpha", "dropout"},
}
"""What the costly checks do not look at, or, as the optimizer, is checked for every trial."""


def _check_optimizer(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    with _named(settings):
        check_optimizer_use(config)
        from raylm.optim.build import check_optimizer

        check_optimizer(config.optimizer)


@contextmanager
def _named(settings: Mapping[str, Any]) -> Iterator[None]:
    """Faults are those of the trial with these settings."""
    try:
        yield
    except RaylmError as error:
        where = f"trial with {described(settings)}"
        raise type(error)(where, f"{error.where}: {error.problem}", error.remedy) from None


def _with_new_values(points: Sequence[Settings]) -> Iterator[int]:
    """Places of points enough to have each value of each setting once."""
    seen: set[tuple[str, str]] = set()
    for place, settings in enumerate(points):
        new = {(key, repr(value)) for key, value in settings.items()} - seen
        if new or not place:
            seen |= new
            yield place


def _most_steps(configs: Sequence[TrainConfig]) -> int | None:
    """The most steps that any of these trainings can take, where that is known without their data, and a step is the
    same for all."""
    limits = [config.training.max_steps for config in configs]
    batches = [(config.training.global_batch_size, config.data) for config in configs]
    if None in limits or any(other != batches[0] for other in batches):
        return None
    return max(limit for limit in limits if limit is not None)


def check_scheduler_steps(section: SchedulerSection, most: int | None) -> None:
    """Raises ConfigError for a scheduler that would never do anything: its first step is beyond all trials. most:
    steps of the longest one, where they are known."""
    for name in ("grace_steps", "interval_steps"):
        steps = getattr(section, name)
        if most is not None and steps is not None and steps >= most:
            raise ConfigError(
                f"scheduler.{name}",
                f"{steps} is no step before the end of any trial: the longest takes {most} steps.",
                f"Set it below {most}.",
            )
