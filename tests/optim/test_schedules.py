import pytest
import torch
from pydantic import ValidationError

from raylm.config.training import ScheduleSection
from raylm.optim.schedules import learning_rate_factor


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"name": "linear"}, [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ({"name": "cosine"}, [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
        ({"name": "polynomial", "power": 2.0}, [0.5, 1.0, 1.0, 0.60625, 0.325, 0.15625]),
        ({"name": "polynomial", "power": 1.0}, [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ({"name": "wsd", "decay_share": 0.5}, [0.5, 1.0, 1.0, 1.0, 1.0, 0.55]),
        ({"name": "wsd", "decay_share": 1.0}, [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ({"name": "inverse_sqrt"}, [0.5, 1.0, 0.816497, 0.707107, 0.632456, 0.577350]),
        ({"name": "inverse_sqrt", "min_ratio": 0.7}, [0.5, 1.0, 0.816497, 0.707107, 0.7, 0.7]),
    ],
)
def test_schedules_on_values(section: dict[str, object], expected: list[float]) -> None:
    """Six steps, two of warm-up, down to a tenth."""
    full = ScheduleSection.model_validate({"warmup_steps": 2, "min_ratio": 0.1, **section})
    assert [learning_rate_factor(full, step, 6) for step in range(6)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("steps", "rise"), [(10, 0.3), (50, 0.25), (7, 0.9)])
def test_one_cycle_is_that_of_torch(steps: int, rise: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch counts its lowest rate from the first one, ours from the peak.
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        1.0,
        total_steps=steps,
        pct_start=rise,
        div_factor=25,
        final_div_factor=0.04 / 0.1,
        cycle_momentum=False,
    )
    section = ScheduleSection(name="one_cycle", rise_share=rise, min_ratio=0.1)
    for step in range(steps):
        assert learning_rate_factor(section, step, steps) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if step + 1 < steps:
            reference.step()


def test_wsd_falls_to_its_lowest_rate_over_a_long_run() -> None:
    section = ScheduleSection(name="wsd", warmup_steps=100, decay_share=0.1)
    factors = [learning_rate_factor(section, step, 1100) for step in range(1100)]
    assert factors[99:1001] == pytest.approx([1.0] * 902)
    assert factors[1050] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["one_cycle", "wsd", "polynomial", "linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_few_steps_have_rates_above_zero(name: str, steps: int) -> None:
    section = ScheduleSection(name=name, min_ratio=0.1)  # type: ignore[arg-type]
    assert all(0 < learning_rate_factor(section, step, steps) <= 1 for step in range(steps))


def test_a_warm_up_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match="inverse_sqrt takes its time scale"):
        ScheduleSection(name="inverse_sqrt")
    with pytest.raises(ValidationError, match="one_cycle excludes warmup_steps"):
        ScheduleSection(name="one_cycle", warmup_steps=3)
