"""Whole generations: files to files with Ray Data, killed and gone on with."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raylm
from raylm.errors import ConfigError, DataError, ModelError, RaylmError, RunDirError
from tests.conftest import command_line

ROOT = Path(__file__).parents[2]
ROWS = 120


def rows_of(folder: Path) -> int:
    """A folder of several formats, with faults; returns the rows that it holds."""
    folder.mkdir()
    chats = [
        {"id": f"c{number}", "messages": [{"role": "user", "content": f"question {number}"}]} for number in range(ROWS)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats[:40]) + "{broken\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in chats[40:80]))
    pq.write_table(pa.Table.from_pylist(chats[80:]), folder / "c.parquet")
    instances = [{"text": "hello"}, {"text": "why " * 300}]
    (folder / "d.json").write_text(json.dumps({"type": "text_only", "instances": instances}))
    (folder / "e.csv").write_text("id,question\nq1,yes\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "f.parquet").write_bytes(b"PAR1 no")
    return ROWS + 1 + 2 + 1 + 1


def settings(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "batch_size": 4,
        "max_tokens": 60,
        "max_model_len": 128,
        "temperature": 1.0,
        "dtype": "float32",
        "engine": {"max_num_seqs": 2},  # slow enough to be killed in the middle
        **more,
    }


def start(config: dict[str, Any], ray_dir: Path | None = None) -> subprocess.Popen[str]:
    """`raylm generate` in a process and a Ray of its own."""
    given = [
        f"{key}={json.dumps(value) if isinstance(value, dict) else value}"
        for key, value in config.items()
        if key != "model"
    ]
    environment = {**os.environ, **({"RAY_TMPDIR": str(ray_dir)} if ray_dir else {})}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "raylm.cli", "generate", config["model"], *given, "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def wait_for_rows(process: subprocess.Popen[str], ledger: Path, rows: int) -> None:
    """Until the ledger has so many rows, or the process is done."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if ledger.is_file():
            entries = [json.loads(line) for line in ledger.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if sum(entry["stop"] - entry["start"] for entry in entries if "stop" in entry) >= rows:
                return
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL of the driver alone; its Ray must end by itself."""
    children = psutil.Process(process.pid).children(recursive=True)
    names = {child.pid: command_line(child) for child in children}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 150  # agents of Ray look for their parent now and then
    while (alive := [child for child in children if runs(child)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    for child in alive:
        child.kill()
    assert not alive, [names[child.pid] for child in alive]


def runs(process: psutil.Process) -> bool:
    """False also for what has ended and waits to be reaped by whoever inherited it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(lines: list[dict[str, Any]]) -> None:
    """All rows of `rows_of`, in order, each once."""
    names = [Path(line["file"]).name for line in lines]
    assert names == ["a.jsonl"] * 41 + ["b.jsonl.gz"] * 40 + ["c.parquet"] * 40 + ["d.json"] * 2 + [
        "e.csv",
        "f.parquet",
    ]
    assert [line["id"] for line in lines if str(line["id"]).startswith("c")] == [f"c{number}" for number in range(ROWS)]
    failed = {(Path(line["file"]).name, line["row"]): line["error_kind"] for line in lines if "error" in line}
    assert failed == {("a.jsonl", 40): "malformed", ("d.json", 1): "too_long", ("f.parquet", None): "malformed"}
    assert all(line["answer"] is not None for line in lines if "error" not in line)


def test_a_killed_run_goes_on_and_a_finished_one_is_not_done_again(
    asked_model_dir: Path, tmp_path: Path, tmp_path_factory: Any, ray_cluster: Any
) -> None:
    """SIGKILL in the middle of the run; the next start does what is left, on another Ray and with other batches."""
    total = rows_of(tmp_path / "data")
    output = tmp_path / "out.jsonl"
    config = settings(asked_model_dir, tmp_path / "data", output)
    ledger = tmp_path / "_out.jsonl.raylm" / "ledger.jsonl"
    ray_address = ray_cluster.get_runtime_context().gcs_address
    process = start({**config, "cluster_address": ray_address})
    wait_for_rows(process, ledger, 8)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    with pytest.raises(RunDirError, match=r"temperature was 1.0 and is 0.5.*overwrite=true"):
        raylm.generate({**config, "temperature": 0.5})
    result = raylm.generate({**config, "batch_size": 16})
    assert 8 <= result.resumed < total
    assert (result.prompts, result.failed) == (total, {"malformed": 2, "too_long": 1})
    check(lines_of(output))
    written = output.stat().st_mtime_ns
    again = raylm.generate(config)
    assert (again.prompts, again.resumed, output.stat().st_mtime_ns) == (total, total, written)
    (tmp_path / "data" / "e.csv").write_text("id,question\nq1,no\n")
    with pytest.raises(RunDirError, match=r"e\.csv has changed"):
        raylm.generate(config)


def test_what_is_wrong_is_said_before_an_engine_starts(asked_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    config = settings(asked_model_dir, tmp_path / "a.jsonl", tmp_path / "out.jsonl")
    for change, error, said in (
        ({"output": str(tmp_path / "out.csv")}, DataError, "unknown ending"),
        ({"output": str(tmp_path / "a.jsonl")}, ConfigError, "is read from"),
        ({"output": str(tmp_path / "b.jsonl"), "data": str(tmp_path)}, ConfigError, "which is read"),
        ({"output": str(tmp_path / "absent" / "out.jsonl")}, DataError, "folder does not exist"),
        ({"output": "/proc/out.jsonl"}, DataError, "cannot be written"),
        ({"engine": {"max-num-seqs": 8}}, ConfigError, "Write engine.max_num_seqs"),
        ({"engine": {"dtype": "float16"}}, ConfigError, "Set dtype instead"),
        ({"template": "chatmll"}, DataError, "Did you mean chatml"),
        ({"n": 2, "temperature": 0}, ConfigError, "set temperature"),
        ({"n": 2, "turns": "all"}, ConfigError, "excludes n=2"),
        ({"structured": {"jsn": {}}}, ConfigError, "structured takes one of"),
        ({"data": str(tmp_path / "absent.jsonl")}, DataError, "no such file or folder. Check the setting data"),
    ):
        with pytest.raises(error, match=said):
            raylm.generate({**config, **change})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.slow
def test_answers_are_the_same_however_often_a_run_is_killed(
    asked_model_dir: Path, tmp_path: Path, tmp_path_factory: Any
) -> None:
    """SIGKILL of the driver at random points, each start in a Ray of its own; folder of Parquet shards against the
    uninterrupted file."""
    total = rows_of(tmp_path / "data")
    whole = start(settings(asked_model_dir, tmp_path / "data", tmp_path / "whole.jsonl"))
    out, error = whole.communicate(timeout=300)
    assert whole.returncode == 3, error
    assert json.loads(out)["failed"] == {"malformed": 2, "too_long": 1}
    expected = lines_of(tmp_path / "whole.jsonl")
    check(expected)
    config = settings(
        asked_model_dir, tmp_path / "data", tmp_path / "parts", shard_rows=10, shard_format="parquet", num_replicas=2
    )
    draw = random.Random(0)
    kills = 0
    for _ in range(3):
        process = start(config)
        done = sum(pq.read_metadata(part).num_rows for part in (tmp_path / "parts").glob("part-*.parquet"))
        wait_for_rows(process, tmp_path / "parts" / "_raylm" / "ledger.jsonl", done + draw.randint(1, 30))
        if process.poll() is not None:
            break
        time.sleep(draw.random())
        kill(process)
        kills += 1
    assert kills
    last = start(config)
    out, error = last.communicate(timeout=300)
    assert last.returncode == 3, error
    result = json.loads(out)
    assert result["prompts"] == total
    assert result["resumed"] > 0
    parts = sorted((tmp_path / "parts").glob("part-*.parquet"))
    assert len(parts) > 3
    found = {(row["file"], row["row"]): row for part in parts for row in pq.read_table(part).to_pylist()}
    assert sum(pq.read_metadata(part).num_rows for part in parts) == len(found) == total
    for line in expected:
        row = found[line["file"], line["row"]]
        assert (row["answer"], row["finish_reason"], row["error"]) == (
            line["answer"],
            line.get("finish_reason"),
            line.get("error"),
        )


@pytest.mark.slow
def test_a_killed_engine_is_replaced_and_no_row_is_lost(
    asked_model_dir: Path, tmp_path: Path, ray_cluster: Any
) -> None:
    total = rows_of(tmp_path / "data")
    output = tmp_path / "out.parquet"
    process = start(settings(asked_model_dir, tmp_path / "data", output))
    wait_for_rows(process, tmp_path / "_out.parquet.raylm" / "ledger.jsonl", 8)
    engines = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "AnswerStage" in command_line(child)
    ]
    assert engines
    engines[0].send_signal(signal.SIGKILL)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 3, error
    assert json.loads(out)["prompts"] == total
    table = pq.read_table(output).to_pylist()
    assert [row["id"] for row in table if row["id"].startswith("c")] == [f"c{number}" for number in range(ROWS)]
    assert len(table) == total


@pytest.mark.slow
def test_the_first_fault_stops_a_run_that_asks_for_it_and_engine_faults_are_one_line(
    asked_model_dir: Path, tmp_path: Path, ray_cluster: Any
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{broken\n{"text": "c"}\n')
    config = settings(asked_model_dir, tmp_path / "a.jsonl", tmp_path / "out.jsonl", batch_size=1, on_error="stop")
    with pytest.raises(DataError, match=r"a\.jsonl: line 3: .*not valid JSON"):
        raylm.generate(config)
    assert not (tmp_path / "out.jsonl").exists()
    result = raylm.generate({**config, "on_error": "keep", "max_rows": None})
    assert (result.prompts, result.failed) == (4, {"malformed": 1})
    for change, error, said in (
        ({"max_model_len": 100_000}, ModelError, "vLLM cannot load it"),
        ({"engine": {"max_num_sequences": 8}}, ConfigError, "Did you mean max_num_seqs"),
    ):
        with pytest.raises(error, match=said) as caught:
            raylm.generate({**config, **change, "output": str(tmp_path / "other.jsonl"), "overwrite": True})
        assert isinstance(caught.value, RaylmError)
