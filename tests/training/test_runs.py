from pathlib import Path

import pytest

from raylm.config import dump_yaml
from raylm.errors import RunDirError
from raylm.training.metrics import EventsWriter
from raylm.training.runs import compare_runs, summarise_runs, table_lines
from tests.training.support import Rows, make_config, run_in_process


def test_runs_are_listed_and_compared(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name, rate in (("a", 1e-2), ("b", 1e-3)):
        config = make_config(tiny_model_dir, tmp_path / name, f"optimizer.learning_rate={rate}", "training.max_steps=2")
        lines = run_in_process(config, Rows())
        (tmp_path / name / "config.yaml").write_text(dump_yaml(config))
    EventsWriter(tmp_path / "a").write("done")
    first, second = summarise_runs(tmp_path)
    assert (first.run, first.state, first.method, first.strategy, first.step) == ("a", "done", "full", "single", 2)
    assert (second.run, second.state, second.train_loss) == ("b", "saving", lines[-1]["train/loss"])
    assert compare_runs([tmp_path / "a", tmp_path / "b"]) == {"optimizer.learning_rate": [1e-2, 1e-3]}
    losses = [summary.train_loss for summary in summarise_runs(tmp_path, sort="train_loss")]
    assert losses == sorted([first.train_loss, second.train_loss])
    assert [summary.run for summary in summarise_runs(tmp_path, sort="eval_loss")] == ["a", "b"]
    shown = table_lines([first, second])
    assert shown[0].split()[:4] == ["run", "state", "model", "method"]
    assert len(shown) == 3
    assert len({line.index("full") for line in shown[1:]}) == 1, "columns are aligned"


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no runs"):
        summarise_runs(tmp_path)
    with pytest.raises(RunDirError, match="there is no such folder"):
        summarise_runs(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("[1")
    (tmp_path / "events.jsonl").write_text("")
    with pytest.raises(RunDirError, match=r"holds no readable config\.yaml"):
        summarise_runs(tmp_path)
