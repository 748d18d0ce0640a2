"""`raylm.train` on a real Ray: Ray Data -> Ray Train -> checkpoints -> export."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import raylm
from raylm.errors import CheckpointError, ClusterError, DataError, ModelError, RaylmError
from raylm.training.metrics import read_metrics
from tests.conftest import PAIRS, command_line
from tests.training.support import read_checkpoint

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def settings(tiny_model_dir: Path, write_dataset: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        "model.path": str(tiny_model_dir),
        "data.train": str(write_dataset(PAIRS)),
        "data.max_seq_len": 64,
        "run.dir": str(tmp_path / "run"),
        "training": {"num_epochs": 2, "global_batch_size": 4, "precision": "fp32"},
        "optimizer.learning_rate": 1e-2,
        "metrics.sinks": [],
        "cluster.cpus_per_worker": 1,
    }


def _losses(run_dir: str | Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(Path(run_dir)) if "train/loss" in line]


def _final_state(run_dir: str | Path) -> dict[str, torch.Tensor]:

    newest = sorted((Path(run_dir) / "checkpoints").glob("step-*"))[-1]
    return read_checkpoint(newest)


def test_two_ddp_workers_equal_one(settings: dict[str, Any], write_dataset: Any, tmp_path: Path) -> None:
    """L03: labels are unevenly spread over ranks; Q01, Q03: seven evaluation rows over two workers, each once."""
    evaluation = {"data.eval": str(write_dataset(PAIRS[:7], "eval.json")), "training.eval_interval_steps": 3}
    one = raylm.train({**settings, **evaluation})
    two = raylm.train({**settings, **evaluation}, {"run.dir": str(tmp_path / "two"), "cluster.num_workers": 2})
    np.testing.assert_allclose(_losses(two.run_dir), _losses(one.run_dir), rtol=1e-5)
    assert len(_losses(one.run_dir)) == one.steps
    for key in ("eval/loss", "eval/loss_tokens"):
        assert two.metrics[key] == pytest.approx(one.metrics[key], rel=1e-5)
    first, second = _final_state(one.run_dir), _final_state(two.run_dir)
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    assert one.export_dir is not None
    exported = Path(one.export_dir)
    assert {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= {
        file.name for file in exported.iterdir()
    }
    run = Path(one.run_dir)
    assert (run / "loss.png").is_file()
    assert two.report == str(tmp_path / "two" / "report.html")
    report = Path(two.report).read_text()
    for label, value in (("workers", 2), ("strategy", "ddp"), ("state", "done"), ("rows read", len(PAIRS))):
        assert f"<tr><th>{label}</th><td>{value}</td></tr>" in report
    assert f"<td>{json.loads((run / 'data-eval.json').read_text())['rows']}</td>" in report
    assert {"starting Ray", "tokenising", "placing the model", "exporting"} <= set(re.findall("<th>(.*?)</th>", report))
    assert json.loads((run / "data.json").read_text())["used"] == len(PAIRS)


@pytest.mark.slow
def test_two_workers_of_zero_equal_one(settings: dict[str, Any], write_dataset: Any, tmp_path: Path) -> None:
    """With the content of the JSON sent to the workers, evaluation, export and a tied matrix."""
    own = tmp_path / "zero.json"
    own.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 3, "overlap_comm": False}}))
    evaluation = {"data.eval": str(write_dataset(PAIRS[:7], "eval.json")), "training.eval_interval_steps": 3}
    one = raylm.train({**settings, **evaluation})
    zero = {"training.strategy": "deepspeed", "deepspeed.config": str(own), "cluster.num_workers": 2}
    two = raylm.train({**settings, **evaluation}, {"run.dir": str(tmp_path / "two"), **zero})
    np.testing.assert_allclose(_losses(two.run_dir), _losses(one.run_dir), rtol=1e-5)
    assert two.metrics["eval/loss"] == pytest.approx(one.metrics["eval/loss"], rel=1e-5)
    first, second = _final_state(one.run_dir), _final_state(two.run_dir)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    assert two.export_dir is not None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(two.export_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(RaylmError, match=r"zero_optimization.stage=3 contradicts deepspeed.stage=2"):
        raylm.train({**settings, **zero}, {"run.dir": str(tmp_path / "three"), "deepspeed.stage": 2})
    assert not (tmp_path / "three").exists()


def test_a_killed_worker_restarts_and_ends_bit_for_bit_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    """C01, C03: SIGKILL in the middle; Ray Train restarts from the newest complete checkpoint."""
    slow = {"training.num_epochs": 12, "checkpoint.interval_steps": 3}
    whole = raylm.train({**settings, **slow})
    target = tmp_path / "killed"
    killed: list[int] = []

    def kill_once() -> None:
        while not killed:
            time.sleep(0.02)
            if len(_losses(target)) >= 7:
                workers = [
                    process
                    for process in psutil.Process().children(recursive=True)
                    if "RayTrainWorker" in command_line(process)
                ]
                for process in workers:
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

    thread = threading.Thread(target=kill_once, daemon=True)
    thread.start()
    again = raylm.train({**settings, **slow}, {"run.dir": str(target)})
    thread.join(timeout=10)
    assert killed
    assert again.steps == whole.steps
    assert _losses(target) == _losses(whole.run_dir)
    first, second = _final_state(whole.run_dir), _final_state(target)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resuming_extends_a_run_and_refuses_another(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    first = raylm.train(settings, {"training.max_steps": 4, "training.method": "lora", "lora.rank": 4})
    assert first.adapter_dir is not None
    assert (Path(first.adapter_dir) / "adapter_model.safetensors").is_file()
    resume = {"training.method": "lora", "lora.rank": 4, "training.resume": "auto"}
    with pytest.raises(CheckpointError, match="was made with lora="):
        raylm.train(settings, {**resume, "lora.rank": 8})
    with caplog.at_level("INFO", "raylm"):
        again = raylm.train(settings, {**resume, "training.max_steps": 6})
    assert again.steps == 6
    assert "step-00000004: step 5 of 6 steps, formerly 4, learning rate" in caplog.text
    older = {**resume, "training.resume": f"{first.run_dir}/checkpoints/step-00000004"}
    with pytest.raises(CheckpointError, match="holds its own checkpoints, the newest step-00000006"):
        raylm.train(settings, older)
    assert [line["step"] for line in read_metrics(Path(again.run_dir))] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_is_away_ends_a_run_only_when_told(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TIMEOUT", "2"), ("MAX_RETRIES", "0")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    monkeypatch.setattr("raylm.training.sinks.follow.CLOSING_S", 2.0)
    away = {"metrics.sinks": ["mlflow"], "metrics.mlflow.tracking_uri": "http://127.0.0.1:9"}
    long = {"training.num_epochs": 2000, "training.max_steps": 4000}
    stopped = raylm.train(settings, {**away, **long, "metrics.on_sink_failure": "stop"})
    assert stopped.stopped == "mlflow takes no figures (metrics.on_sink_failure=stop)"
    assert 0 < stopped.steps < 4000
    assert stopped.export_dir is None
    assert "stopped: mlflow takes no figures" in Path(stopped.report).read_text()
    goal = stopped.steps + 2
    result = raylm.train(settings, {**away, **long, "training.max_steps": goal, "training.resume": "auto"})
    assert (result.steps, result.stopped) == (goal, None)
    assert len(_losses(result.run_dir)) == goal


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ({"data.train": "absent.json"}, DataError, "there is no such file or folder"),
        ({"model.path": "./absent"}, ModelError, "there is no such file or folder"),
        ({"data.max_seq_len": 512}, ModelError, "512 is above the 256 positions"),
        ({"cluster.num_workers": 2, "cluster.cpus_per_worker": 9}, ClusterError, "need 19 CPUs, the cluster has 6"),
        ({"cluster.use_gpu": True}, ClusterError, "1 GPU needed, the cluster has 0"),
        ({"training.method": "lora", "lora.target_modules": ["W_pack"]}, ModelError, "match no linear module"),
        ({"training.resume": "/absent/step-1"}, CheckpointError, "there is no such checkpoint"),
    ],
)
def test_faults_are_raised_as_themselves(
    settings: dict[str, Any], override: dict[str, Any], kind: type[RaylmError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        raylm.train(settings, override)


def test_malformed_rows_stop_or_go_to_quarantine(settings: dict[str, Any], write_dataset: Any, tmp_path: Path) -> None:
    rows: list[Any] = [*PAIRS]
    rows[17] = {"messages": [{"role": "bot", "content": "x"}]}
    settings = {**settings, "data.train": str(write_dataset(rows, "bad.json")), "training.max_steps": 1}
    with pytest.raises(DataError, match=r"bad\.json: instance 17 \(line 1\): role 'bot' is not one of"):
        raylm.train(settings)
    result = raylm.train(settings, {"run.dir": str(tmp_path / "q"), "data.on_bad_row": "quarantine"})
    assert result.data["rejected"] == {"malformed": 1}
    (line,) = (tmp_path / "q" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 17


def test_a_base_model_learns_a_preset_and_is_exported_with_it(settings: dict[str, Any], tmp_path: Path) -> None:
    """LMFlow's first example: GPT-2's architecture without chat template, Alpaca rows in LMFlow's format, `disable`."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from raylm.data import templates
    from tests.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    base = tmp_path / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    instances = [{"input": f"Instruction: {question}", "output": answer} for question, answer in PAIRS]
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({"type": "text2text", "instances": instances}))
    chats = tmp_path / "alpaca.json"
    chats.write_text(json.dumps([{"instruction": question, "output": answer} for question, answer in PAIRS]))
    changed = {
        **settings,
        "model.path": str(base),
        "data.train": [str(plain), {"path": str(chats), "weight": 2}],
        "data.template": "disable",
        "training.max_steps": 3,
    }
    result = raylm.train(changed)
    assert result.data["rows"] == result.data["used"] == 2 * len(PAIRS)
    assert result.export_dir is not None
    exported = AutoTokenizer.from_pretrained(result.export_dir)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rendered = templates.render(
        templates.get_template("disable"), {"messages": messages}, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    assert exported.apply_chat_template(messages, tokenize=False) == "".join(segment.text for segment in rendered)
    with pytest.raises(DataError, match="and the tokenizer has no chat template"):
        raylm.train(changed, {"data.template": "auto", "run.dir": str(tmp_path / "auto"), "data.train": str(chats)})
