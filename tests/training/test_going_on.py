"""Where a resumed run says it goes on (known fault O04)."""

from pathlib import Path

import pytest

from raylm.training.run import where_it_goes_on
from tests.training.support import make_config

OTHER = "learning rate {} by the schedule of the new length ({} by the former)"


@pytest.mark.parametrize(
    ("step", "num_steps", "former", "line"),
    [
        (10, 20, 20, "step 11 of 20 steps, learning rate 5e-05"),
        (10, 20, None, "step 11 of 20 steps, learning rate 5e-05"),
        (10, 40, 20, f"step 11 of 40 steps, formerly 20, {OTHER.format('7.5e-05', '5e-05')}"),
        (20, 40, 20, f"step 21 of 40 steps, formerly 20, {OTHER.format('5e-05', '0')}"),
        (20, 20, 20, "all of 20 steps are done"),
        (20, 10, 20, "all of 10 steps, formerly 20 are done"),
    ],
)
def test_a_run_of_another_length_says_its_next_learning_rate(
    tiny_model_dir: Path, tmp_path: Path, step: int, num_steps: int, former: int | None, line: str
) -> None:
    config = make_config(
        tiny_model_dir, tmp_path, "schedule.name=linear", "schedule.warmup_steps=0", "optimizer.learning_rate=1e-4"
    )
    assert where_it_goes_on(config, step, num_steps, former) == line


def test_a_schedule_without_length_has_nothing_to_compare(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_dir, tmp_path, "schedule.name=constant", "optimizer.learning_rate=1e-4")
    assert where_it_goes_on(config, 10, 40, 20) == "step 11 of 40 steps, formerly 20, learning rate 0.0001"
