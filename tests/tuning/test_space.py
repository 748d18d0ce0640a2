"""Points of a space: draws, grids, conditions. Literal expectations."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.config import SweepConfig, load_config
from raylm.config.space import DimensionSection
from raylm.errors import ConfigError
from raylm.optim.table import OPTIMIZERS
from raylm.tuning.space import combinations, draw, draw_value, edge_values, grid_values, on_steps, ordered, perturbed


def space(**keys: Any) -> Any:
    return sweep({key.replace("__", "."): value for key, value in keys.items()}).space


def sweep(dimensions: dict[str, Any], **settings: Any) -> SweepConfig:
    return load_config(SweepConfig, {"base": {}, "space": dimensions, "budget": {"trials": 2}, **settings})


CONDITIONAL = {
    "optimizer.learning_rate": [
        {"choice": [1, 2], "when": {"optimizer.name": ["adamw", "lion"]}},
        {"choice": [3], "when": {"optimizer.name": "sgd"}},
    ],
    "optimizer.name": {"choice": ["adamw", "sgd", "lamb"]},
}


def test_a_dimension_that_depends_on_another_comes_after_it() -> None:
    found = sweep(CONDITIONAL).space
    assert ordered(found) == ["optimizer.name", "optimizer.learning_rate"]
    assert list(combinations(found, {}, grid_values)) == [
        {"optimizer.name": "adamw", "optimizer.learning_rate": 1},
        {"optimizer.name": "adamw", "optimizer.learning_rate": 2},
        {"optimizer.name": "sgd", "optimizer.learning_rate": 3},
        {"optimizer.name": "lamb"},
    ]


def test_conditions_look_at_the_base_too() -> None:
    found = space(lora__rank={"choice": [4, 8], "when": {"training.method": "lora"}}, run__seed={"choice": [1]})
    assert list(combinations(found, {"training.method": "full"}, grid_values)) == [{"run.seed": 1}]
    assert len(list(combinations(found, {"training.method": "lora"}, grid_values))) == 2


def test_conditions_in_a_circle_are_refused() -> None:
    circle = space(a={"choice": [1], "when": {"b": 1}}, b={"choice": [1], "when": {"a": 1}})
    with pytest.raises(ConfigError, match="depend on themselves"):
        ordered(circle)
    with pytest.raises(ConfigError, match="depend on themselves"):
        ordered(space(a={"choice": [1], "when": {"a": 1}}))


def test_suggested_rates_are_those_of_the_chosen_optimizer() -> None:
    found = space(optimizer__learning_rate="suggested", optimizer__name={"choice": list(OPTIMIZERS)})
    edges = list(combinations(found, {}, edge_values))
    assert len(edges) == 2 * len(OPTIMIZERS)
    for settings in edges:
        assert settings["optimizer.learning_rate"] in OPTIMIZERS[settings["optimizer.name"]].learning_rates
    alone = space(optimizer__learning_rate={"suggested": True})
    assert [s["optimizer.learning_rate"] for s in combinations(alone, {"optimizer.name": "sgd"}, edge_values)] == [
        1e-4,
        1e-1,
    ]


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        ({"uniform": [0, 1], "points": 3}, [0.0, 0.5, 1.0]),
        ({"loguniform": [1e-4, 1e-2], "points": 3}, [1e-4, 1e-3, 1e-2]),
        ({"quniform": [0, 1, 0.25], "points": 3}, [0.0, 0.5, 1.0]),
        ({"integers": [1, 3], "points": 5}, [1, 2, 3]),
        ({"log_integers": [1, 100], "points": 3}, [1, 10, 100]),
        ({"grid": ["a", None, [1]]}, ["a", None, [1]]),
    ],
)
def test_grid_points(dimension: dict[str, Any], expected: list[Any]) -> None:
    found = list(grid_values(DimensionSection(**dimension)))
    assert found == pytest.approx(expected) if isinstance(expected[0], float) else found == expected


@given(st.integers(0, 10_000), st.sampled_from(["uniform", "loguniform", "quniform", "qloguniform", "integers"]))
def test_draws_lie_in_their_range_on_their_steps(seed: int, kind: str) -> None:
    values = {"quniform": [0.1, 0.95, 0.2], "qloguniform": [0.1, 0.95, 0.2], "integers": [3, 7]}.get(kind, [0.1, 0.9])
    drawn = draw_value(DimensionSection(**{kind: values}), random.Random(seed))
    assert values[0] <= drawn <= values[1]
    if kind.startswith("q"):
        assert drawn / 0.2 == pytest.approx(round(drawn / 0.2))
    assert isinstance(drawn, int) == (kind == "integers")


def test_logarithmic_draws_are_as_many_in_each_order_of_magnitude() -> None:
    dimension = DimensionSection(loguniform=(1e-6, 1e-2))
    rng = random.Random(0)
    orders = [math.floor(math.log10(draw_value(dimension, rng))) for _ in range(4000)]
    for order in (-6, -5, -4, -3):
        assert orders.count(order) == pytest.approx(1000, abs=120)


def test_steps_show_no_rounding_errors() -> None:
    assert on_steps(DimensionSection(quniform=(0, 1, 0.1)), 0.31) == 0.3


def test_a_perturbed_setting_is_near_and_in_its_range() -> None:
    found = space(
        optimizer__learning_rate={"loguniform": [1e-4, 1e-2]},
        schedule__min_ratio={"choice": [0.0, 0.1, 0.2]},
    )
    settings = {"optimizer.learning_rate": 9e-3, "schedule.min_ratio": 0.0}
    rates, ratios = set(), set()
    for seed in range(50):
        changed = perturbed(found, {}, settings, random.Random(seed), factors=(0.8, 1.25), resample_probability=0.0)
        rates.add(changed["optimizer.learning_rate"])
        ratios.add(changed["schedule.min_ratio"])
    assert rates == {9e-3 * 0.8, 1e-2}
    assert ratios == {0.0, 0.1}
    anew = {
        perturbed(found, {}, settings, random.Random(s), factors=(0.8, 1.25), resample_probability=1.0)[
            "optimizer.learning_rate"
        ]
        for s in range(20)
    }
    assert len(anew) == 20


def test_decided_settings_stay_and_decide_others() -> None:
    drawn = draw(sweep(CONDITIONAL).space, {}, random.Random(3), {"optimizer.name": "sgd"})
    assert drawn == {"optimizer.name": "sgd", "optimizer.learning_rate": 3}
