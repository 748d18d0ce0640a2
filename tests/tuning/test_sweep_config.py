"""What a sweep's file may hold, and what is refused with which words."""

from typing import Any

import pytest
import yaml

from raylm.config import SweepConfig, load_config
from raylm.config.space import DimensionSection
from raylm.errors import ConfigError

GOOD: dict[str, Any] = {
    "base": {"model": {"path": "m"}, "data": {"train": "d"}},
    "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]}},
    "budget": {"trials": 4},
}


def test_shorthands_and_nested_sections_mean_the_same() -> None:
    flat = load_config(SweepConfig, GOOD, {"search": "optuna", "scheduler": "asha"})
    nested = load_config(
        SweepConfig,
        {**GOOD, "space": {"optimizer": {"learning_rate": {"loguniform": [1e-5, 1e-3]}}}},
        ["search.name=optuna", "scheduler={name: asha}"],
    )
    assert flat == nested
    assert flat.space["optimizer.learning_rate"][0].kind == "loguniform"
    suggested = load_config(SweepConfig, GOOD, {"space.optimizer.learning_rate": "suggested"})
    assert suggested.space["optimizer.learning_rate"][0].suggested


def test_what_is_written_down_is_read_back() -> None:
    config = load_config(SweepConfig, GOOD, {"scheduler": "median_stop", "set": {"training": {"max_steps": 3}}})
    assert config.set == {"training.max_steps": 3}
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
    assert load_config(SweepConfig, yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"space.optimizer.learning_rate": {"logunifrm": [1, 2]}},
            r"unknown key space.optimizer.learning_rate.logunifrm. Did you mean .*learning_rate.loguniform\?",
        ),
        (
            {"space": {"optimizer": {"learning_rate": {"choice": [1], "wenn": {}}}}},
            "unknown key space.optimizer.learning_rate.wenn. Did you mean space.optimizer.learning_rate.when",
        ),
        ({"space.a": [1e-3, 1e-4]}, r"space.a: 0.001 is not a dimension. Write {choice: \[0.001, 0.0001\]}, or one of"),
        ({"space.a": 7}, r"space.a: 7 is not a dimension. Write {choice: \[7\]}, or one of grid"),
        ({"space.a": {"choice": "adamw"}}, r"space.a.choice: takes a list, such as \[adamw\]"),
        ({"space.a": {"loguniform": [1, 2, 3]}}, r"space.a.loguniform: takes \[low, high\], not \[1, 2, 3\]"),
        ({"space.a": {"uniform": 3}}, r"space.a.uniform: takes \[low, high\], not 3"),
        ({"space.a": {"quniform": [0, 1]}}, r"space.a.quniform: takes \[low, high, step\], not"),
        ({"space.a": {"uniform": ["low", 1]}}, "space.a.uniform.0='low' is not valid"),
        ({"space.a": {"choice": [1], "when": ["b"]}}, "space.a.when=.* is not valid: a mapping is needed"),
        ({"space.a": "suggested"}, "space.a: suggested is for optimizer.learning_rate"),
        (
            {"space.a": [{"uniform": [0, 1]}, {"choice": [0], "when": {"b": 1}}]},
            "space.a: what follows an alternative without `when` is never taken",
        ),
        ({"budget": 12}, "budget=12 is not valid: a section is needed, with keys trials, time_s, tokens"),
        ({"budget.trials": 0}, "budget.trials=0 is not valid: input should be greater than or equal to 1"),
        ({"concurrency": "max"}, "concurrency='max' is not valid: .* valid integer.*, or input should be 'auto'"),
        (
            {"space": {"schedule": {"warmup_steps": [2, 4]}}},
            r"space.schedule.warmup_steps: 2 is not a dimension. Write {choice: \[2, 4\]}",
        ),
        (
            {"scheduler": {"name": "asha", "grace_steps": 9, "max_steps": 6}},
            "grace_steps=9 is above max_steps=6: there would be no rung",
        ),
        ({"bugdet": 1}, "unknown key bugdet. Did you mean budget"),
        ({"space.a": {"choice": [1], "grid": [1]}}, "give exactly one of choice, grid"),
        ({"space.a": {"when": {"b": 1}}}, "give exactly one of .*, not none"),
        ({"space.a": {"uniform": [2, 1]}}, "uniform: 2 is not below 1"),
        ({"space.a": {"loguniform": [0, 1]}}, "loguniform needs a range above 0"),
        ({"space.a": {"quniform": [0, 1, 2]}}, "the step 2 is larger than the range"),
        ({"space.a": {"choice": [1, 2, 1]}}, "choice: 1 is given twice"),
        ({"space.a": {"choice": []}}, "choice has no values"),
        ({"space.a": {"uniform": [0, 1], "points": 3}}, "points are for search.name=grid, not random"),
        ({"search": "grid"}, "search.name=grid needs points of a range"),
        ({"budget": {}, "search": "random", "budget.trials": None}, "goes on for ever"),
        ({"scheduler": "ahsa"}, "scheduler.name='ahsa' is not valid"),
        ({"scheduler.name": "asha", "scheduler.quantile": 0.1}, "scheduler.quantile is for pbt, not asha"),
        ({"search.name": "random", "search.objectives": [{"metric": "time_s"}]}, "is for search.name=optuna"),
        (
            {"search": {"name": "optuna", "objectives": [{"metric": "time_s"}]}, "scheduler": "asha"},
            "search.objectives excludes scheduler.name=asha",
        ),
        ({"scheduler": "pbt", "search": "optuna"}, "pbt excludes search.name=optuna"),
        ({"scheduler": "pbt", "budget": {"time_s": 9, "trials": 1}}, "the size of its population"),
        ({"resources.gpus_per_worker": 2}, "a worker uses one GPU at most"),
        ({"resources": {"gpus_per_worker": 0.5, "num_workers": 2}}, "cannot share a GPU"),
        ({"retrain_set": {"training.max_steps": 3}}, "retrain_set needs retrain_best=true"),
    ],
)
def test_faults_are_named(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SweepConfig, GOOD, override)


def test_an_alternative_may_be_the_suggested_range() -> None:
    """In a list as by itself."""
    rates = [{"choice": [1.0], "when": {"optimizer.name": "adadelta"}}, "suggested"]
    found = load_config(SweepConfig, {**GOOD, "space": {"optimizer": {"learning_rate": rates}}})
    assert [one.kind for one in found.space["optimizer.learning_rate"]] == ["choice", "suggested"]


def test_a_space_holds_something() -> None:
    with pytest.raises(ConfigError, match=r"space=\{\} is not valid: there are too few entries"):
        load_config(SweepConfig, {**GOOD, "space": {}})


def test_equal_values_of_different_types_are_different_choices() -> None:
    assert DimensionSection(choice=(1, True, 1.0)).values == (1, True, 1.0)
