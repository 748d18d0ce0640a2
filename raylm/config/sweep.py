"""The configuration of a sweep: what is varied, how it is searched, what it may take."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from raylm.config.base import Section
from raylm.config.space import Overrides, Space

RATE_KEY = "optimizer.learning_rate"
"""The setting that the optimizer table suggests a range for."""


def _by_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class ObjectiveSection(Section):
    """One more figure to make good."""

    metric: str = Field(min_length=1)
    """A figure of metrics.jsonl, or `time_s` (seconds of all steps) or `memory_gib` (the most of any step)."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""


class SearchSection(Section):
    """How the next trial's settings are chosen."""

    name: Literal["grid", "random", "optuna"] = "random"
    """`grid` goes through all combinations, `random` draws each trial from the seed and its number, `optuna` learns
    from the trials before (TPE, arXiv:1206.2944 and 2304.11127)."""
    startup_trials: int = Field(8, ge=1)
    """optuna: trials drawn at random before it learns."""
    objectives: tuple[ObjectiveSection, ...] = ()
    """optuna: further objectives beside `metric`, such as `[{metric: time_s}]`. The report shows the trials that no
    other beats in all."""

    @model_validator(mode="after")
    def further_settings_are_optunas(self) -> Self:
        odd = sorted(self.model_fields_set & {"startup_trials", "objectives"})
        if self.name != "optuna" and odd:
            raise ValueError(f"search.{odd[0]} is for search.name=optuna, not {self.name}. Drop it")
        return self


SCHEDULERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "asha": ("grace_steps", "max_steps", "reduction_factor", "brackets"),
    "hyperband": ("max_steps", "reduction_factor"),
    "median_stop": ("grace_steps", "min_trials"),
    "pbt": ("interval_steps", "quantile", "resample_probability", "factors"),
}
"""Scheduler -> the settings it has."""


class SchedulerSection(Section):
    """Which trials go on, by what they report."""

    name: Literal["none", "asha", "hyperband", "median_stop", "pbt"] = "none"
    """`asha` (arXiv:1810.05934) stops a trial at a rung unless it is among the best 1/reduction_factor there;
    `hyperband` (arXiv:1603.06560) waits for a bracket's trials and halves them; `median_stop` stops what is worse than
    the median of the others; `pbt` (arXiv:1711.09846) lets the worst go on from the best's checkpoint with settings
    near theirs."""
    grace_steps: Annotated[int, Field(ge=1)] | None = None
    """asha, median_stop: steps before a trial can be stopped; default: up to the first report."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """asha, hyperband: steps of the last rung; default: those of the longest trial."""
    reduction_factor: float = Field(3.0, gt=1)
    """asha, hyperband: of so many trials at a rung one goes on."""
    brackets: int = Field(1, ge=1)
    """asha: sets of rungs, each beginning one rung later."""
    min_trials: int = Field(3, ge=1)
    """median_stop: trials to compare with."""
    interval_steps: Annotated[int, Field(ge=1)] | None = None
    """pbt: steps between exchanges; default: one report."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """pbt: share of the trials that is replaced, and that is copied."""
    resample_probability: float = Field(0.25, ge=0, le=1)
    """pbt: chance that a setting is drawn anew instead of changed a little."""
    factors: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.8, 1.25)
    """pbt: a number is multiplied by one of these, and kept in its range."""

    @model_validator(mode="after")
    def rungs_go_up(self) -> Self:
        if self.grace_steps is not None and self.max_steps is not None and self.grace_steps > self.max_steps:
            raise ValueError(
                f"grace_steps={self.grace_steps} is above max_steps={self.max_steps}: there would be no rung. Lower it"
            )
        return self

    @model_validator(mode="after")
    def settings_are_of_the_scheduler(self) -> Self:
        odd = sorted(self.model_fields_set - {"name", *SCHEDULERS[self.name]})
        if odd:
            users = [name for name, settings in SCHEDULERS.items() if odd[0] in settings]
            raise ValueError(f"scheduler.{odd[0]} is for {' and '.join(users)}, not {self.name}. Drop it")
        return self


class BudgetSection(Section):
    """What all trials together may take; what comes first ends the sweep."""

    trials: Annotated[int, Field(ge=1)] | None = None
    """Trials. A grid search without it runs all combinations."""
    time_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds of wall time, over all sessions of a sweep that is resumed."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Trained tokens."""


class ResourcesSection(Section):
    """What one trial gets."""

    num_workers: Annotated[int, Field(ge=1)] | None = None
    """Training workers; default: `cluster.num_workers` of the base."""
    cpus_per_worker: Annotated[int, Field(ge=1)] | None = None
    """CPUs of each, which are its threads on a machine without GPU; default: `cluster.cpus_per_worker`, else 1."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each; a part, such as 0.5, lets trials share one. Default: 1 where the cluster has GPUs."""

    @model_validator(mode="after")
    def gpus_are_whole_or_a_part_of_one(self) -> Self:
        gpus = self.gpus_per_worker
        if gpus is not None and gpus > 1:
            raise ValueError(f"gpus_per_worker={gpus:g}: a worker uses one GPU at most. Set more num_workers")
        if gpus is not None and 0 < gpus < 1 and (self.num_workers or 1) > 1:
            raise ValueError(
                f"gpus_per_worker={gpus:g} excludes num_workers={self.num_workers}: workers of one trial cannot share "
                "a GPU. Set gpus_per_worker=1"
            )
        return self


class SweepConfig(Section):
    """Everything `raylm sweep` needs."""

    base: str | dict[str, Any]
    """Training configuration that all trials share: a YAML file, or a mapping."""
    set: Overrides = {}
    """Settings over those of the base, by dotted key; on the command line `--set key=value`."""
    dir: str = Field("runs/sweep", min_length=1)
    """Folder of the sweep: trials, results, report, the best checkpoint. On a cluster all nodes must see it."""
    space: Space = Field(min_length=1)
    """Dotted key of the training configuration -> its values; a list of them takes the first whose `when` holds."""
    metric: str | None = None
    """What trials are compared by, a figure of metrics.jsonl; default: `eval/loss` with `data.eval`, else
    `train/loss` (of one step, so the less to be trusted)."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of the metric is better."""
    search: Annotated[SearchSection, BeforeValidator(_by_name)] = SearchSection()
    scheduler: Annotated[SchedulerSection, BeforeValidator(_by_name)] = SchedulerSection()
    budget: BudgetSection = BudgetSection()
    resources: ResourcesSection = ResourcesSection()
    concurrency: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at a time; `auto`: as many as there is room for."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the search. `run.seed` of the base is that of the trainings."""
    keep: Literal["best", "all"] = "best"
    """Checkpoints kept of trials that have ended: those of the best, or each trial's best."""
    export_best: bool = True
    """Write the model of the best checkpoint to `dir`/best/export, for `raylm serve`."""
    retrain_best: bool = False
    """Train the best settings again at the end, with `retrain_set`, in `dir`/retrained."""
    retrain_set: Overrides = {}
    """Settings of that training, such as all data or more steps."""

    @model_validator(mode="after")
    def searches_end(self) -> Self:
        if self.search.name != "grid" and self.budget == BudgetSection():
            raise ValueError(f"search.name={self.search.name} goes on for ever. Set budget.trials, time_s or tokens")
        return self

    @model_validator(mode="after")
    def grids_are_of_points(self) -> Self:
        for key, alternatives in self.space.items():
            for dimension in alternatives:
                if self.search.name == "grid" and dimension.is_range and dimension.points is None:
                    raise ValueError(
                        f"space.{key}: search.name=grid needs points of a range. Set points, or use choice"
                    )
                if self.search.name != "grid" and dimension.points is not None:
                    raise ValueError(f"space.{key}: points are for search.name=grid, not {self.search.name}. Drop them")
        return self

    @model_validator(mode="after")
    def alternatives_can_be_taken(self) -> Self:
        for key, alternatives in self.space.items():
            if any(not dimension.when for dimension in alternatives[:-1]):
                raise ValueError(
                    f"space.{key}: what follows an alternative without `when` is never taken. Put that one last"
                )
            if key != RATE_KEY and any(dimension.suggested for dimension in alternatives):
                raise ValueError(f"space.{key}: suggested is for {RATE_KEY}. Give a choice or a range")
        return self

    @model_validator(mode="after")
    def several_objectives_exclude_schedulers(self) -> Self:
        if self.search.objectives and self.scheduler.name != "none":
            raise ValueError(
                f"search.objectives excludes scheduler.name={self.scheduler.name}, which compares by one. Drop one"
            )
        return self

    @model_validator(mode="after")
    def a_population_is_drawn_at_random_and_has_a_size(self) -> Self:
        if self.scheduler.name == "pbt":
            if self.search.name != "random":
                raise ValueError(f"scheduler.name=pbt excludes search.name={self.search.name}: it searches by itself")
            if (self.budget.trials or 0) < 2:
                raise ValueError("scheduler.name=pbt needs budget.trials, the size of its population: 2 or more")
        return self

    @model_validator(mode="after")
    def retraining_is_asked_for(self) -> Self:
        if self.retrain_set and not self.retrain_best:
            raise ValueError("retrain_set needs retrain_best=true. Set it, or drop retrain_set")
        return self
