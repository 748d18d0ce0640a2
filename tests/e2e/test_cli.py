"""The command line as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import build_tiny_model

ROOT = Path(__file__).parents[2]


def raylm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raylm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture
def config(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> Path:
    data = write_dataset([("hello", "yes"), ("who are you?", "the answer")])
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{path: {tiny_model_dir}}}\ndata: {{train: {data}, max_seq_len: 64}}\n")
    return path


def test_version_and_help() -> None:
    assert raylm("--version").stdout == "raylm 0.1.0\n"
    for command in (
        [],
        ["train"],
        ["plan"],
        ["sweep"],
        ["serve"],
        ["chat"],
        ["generate"],
        ["speculate", "bench"],
        ["distill-draft"],
        ["data", "preview"],
        ["config", "show"],
        ["vocab", "extend"],
        ["adapter", "merge"],
        ["checkpoints"],
        ["runs"],
        ["report"],
        ["track"],
    ):
        done = raylm(*command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("usage: raylm")


def test_config_show_resolves_and_is_json_on_request(config: Path) -> None:
    done = raylm("config", "show", str(config), "training.num_epochs=3", "--json")
    assert json.loads(done.stdout)["training"]["num_epochs"] == 3
    assert "learning_rate: 2.0e-05" in raylm("config", "show", str(config)).stdout


def test_a_users_fault_is_one_line_and_exit_code_2(config: Path) -> None:
    done = raylm("train", str(config), "optimizer.learnin_rate=1")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {config}: unknown key optimizer.learnin_rate. Did you mean optimizer.learning_rate?\n"
    )
    assert raylm("train").returncode == 2
    assert "unrecognized arguments: --bogus" in raylm("config", "show", str(config), "--bogus").stderr
    nested = raylm("config", "show", str(config), "--json", "data.train=[{path: a.json, wieght: 2}]")
    assert nested.stderr == f"error: {config}: unknown key data.train.0.wieght. Did you mean data.train.weight?\n"
    absent = raylm("train", str(config), "data.train=absent.json")
    assert absent.returncode == 2
    assert absent.stderr.splitlines()[-1].startswith("error: absent.json: there is no such file or folder.")


def test_preview_marks_what_carries_loss(config: Path) -> None:
    (first, _) = json.loads(raylm("data", "preview", str(config), "--json").stdout)
    assert "".join(text for _, text, loss in first["tokens"] if loss) == "yes<|im_end|>"
    assert "yes<|im_end|>" in raylm("data", "preview", str(config)).stdout


def test_reports_and_trackers_of_a_run_directory(tmp_path: Path) -> None:
    run = tmp_path / "one"
    run.mkdir()
    (run / "config.yaml").write_text("model: {path: m}\ndata: {train: d}\n")
    (run / "events.jsonl").write_text('{"phase": "done", "time": 1.0}\n')
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 2.0}\n')
    written = json.loads(raylm("report", str(run), "--json").stdout)
    assert written == {"markdown": str(run / "report.md"), "html": str(run / "report.html")}
    assert all(Path(path).is_file() for path in written.values())
    assert raylm("track", str(run)).stdout == "sent to tensorboard\n"
    assert json.loads((run / "tracking" / "tensorboard.json").read_text())["sent"] == {"train/loss": 1}
    refused = raylm("runs", str(tmp_path), "--sort", "eval_los")
    assert refused.returncode == 2
    assert refused.stderr == "error: --sort: eval_los is not a column. Did you mean eval_loss?\n"
    nothing = raylm("report", str(tmp_path))
    assert nothing.stderr.startswith(f"error: {tmp_path}: holds no run.")


def test_generate_needs_prompts(tiny_model_dir: Path) -> None:
    done = raylm("generate", str(tiny_model_dir))
    assert done.returncode == 2
    assert "give prompts or data to answer" in done.stderr


def test_generate_answers_in_order(tmp_path: Path) -> None:
    """Q04: joined by number, not by place."""
    model = build_tiny_model(tmp_path / "model", hidden_size=128)  # vLLM's CPU attention takes no heads under 32
    output = tmp_path / "out.jsonl"
    prompts = ["hello", "who are you?", "yes"]
    options = [f"output={output}", "max_tokens=4", "batch_size=2", "max_model_len=128"]
    done = raylm("generate", str(model), *prompts, *options, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["prompts"] == 3
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["messages"][-1]["content"] for line in lines] == prompts
    assert all(0 < line["tokens"] <= 4 for line in lines)


def test_plan_prints_a_table_or_json_and_refuses_what_training_would(config: Path) -> None:
    done = raylm("plan", str(config), "--tokens-per-second", "100", "training.global_batch_size=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "* single" in done.stdout
    found = json.loads(raylm("plan", str(config), "--tokens-per-second", "100", "--json").stdout)
    assert found["fits"]
    assert [row["name"] for row in found["memory"] if row["chosen"]] == ["single"]
    absent = raylm("plan", str(config), "data.train=absent.json")
    assert absent.returncode == 2
    assert absent.stderr.splitlines()[-1].startswith("error: absent.json: there is no such file or folder.")
