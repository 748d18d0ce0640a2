"""`training.profile_steps`: a Chrome trace of the steps asked for, and of no others."""

import json
from pathlib import Path

import pytest

from raylm.errors import ConfigError
from tests.training.ranks import ranks, train_rank
from tests.training.support import Rows, make_config, run_in_process

ROWS = Rows()


def _operators(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "cpu_op"]


def test_the_steps_asked_for_are_in_the_trace(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One optimizer step for each of steps 2 and 3, with a backward pass for each of their micro-batches."""
    lines = run_in_process(make_config(tiny_model_dir, tmp_path, "training.profile_steps=[2, 3]"), ROWS)
    assert len(lines) > 3
    names = _operators(tmp_path / "profile" / "rank-0.json")
    assert names.count("aten::_fused_adamw_") == 4  # matrices and norms have groups of their own
    assert names.count("aten::embedding") == 2 * 4
    assert not list((tmp_path / "profile").glob("*.partial.json"))


def test_a_run_that_ends_within_writes_what_there_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    run_in_process(make_config(tiny_model_dir, tmp_path, "training.profile_steps=[2, 99]"), ROWS)
    assert _operators(tmp_path / "profile" / "rank-0.json")


def test_there_is_no_trace_by_default(tiny_model_dir: Path, tmp_path: Path) -> None:
    lines = run_in_process(make_config(tiny_model_dir, tmp_path), ROWS)
    assert not (tmp_path / "profile").exists()
    flops = {line["train/flops"] / line["train/tokens"] for line in lines}
    elements = 320 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # tied; heads 4, of keys and values 2
    assert len(flops) == 1
    assert flops.pop() == pytest.approx(6 * elements, rel=0.05)  # the vocabulary has a few entries less than 320
    assert all(line["memory/host_gib"] > 0 for line in lines)


@pytest.mark.slow
def test_each_rank_writes_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_model_dir, tmp_path, "training.profile_steps=[1, 1]", "cluster.num_workers=2", "training.strategy=ddp"
    )
    with ranks(2) as pool:
        pool.run(2, train_rank, config, ROWS)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-0.json", "rank-1.json"]


def test_steps_out_of_order_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile_steps=\[5, 3\] must be \[first, last\]"):
        make_config(tiny_model_dir, tmp_path, "training.profile_steps=[5, 3]")
