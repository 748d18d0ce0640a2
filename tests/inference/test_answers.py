"""What a killed run leaves, and what the next start makes of it: files and no engine."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm.config import GenerateConfig
from raylm.data.readers import RawRow, read_rows
from raylm.errors import DataError, RunDirError
from raylm.inference.answers import Answers, Batch
from raylm.inference.manifest import Manifest, describe, differences
from raylm.inference.output import kind_of_output, write_answers
from raylm.inference.reading import batches_of

MANIFEST = Manifest(
    {"temperature": 0.0, "seed": 1}, "weights", {"a.jsonl": {"version": "1"}, "b.jsonl": {"version": "2"}}
)


def line(file: int, row: int) -> bytes:
    return json.dumps({"id": f"{file}:{row}", "answer": "é" * (row % 5)}).encode() + b"\n"


def batch(file: int, start: int, stop: int) -> Batch:
    lines = b"".join(line(file, row) for row in range(start, stop))
    return Batch(file, start, stop, lines, {"too_long": 1} if start == 0 else {}, stop - start, 10, stop - start)


def missing(answers: Answers, sizes: list[int], batch_size: int) -> Iterator[Batch]:
    """What the readers would bring, by the code that brings it."""
    for file, size in enumerate(sizes):
        rows = (RawRow(place, 0, "{}") for place in range(size))
        for table in batches_of(rows, file, list(answers.ledger.done[file]), batch_size):
            found = table.to_pylist()[0]
            if found["num_rows"] >= 0:
                answers.end_file(file, found["num_rows"])
            else:
                yield batch(file, found["start"], found["start"] + len(found["index"]))


def killed(answers: Answers, torn: bytes) -> None:
    """As SIGKILL leaves things: what was not flushed is gone, a line may be half written, locks are free."""
    if answers._file:
        size = os.fstat(answers._file.fileno()).st_size
        answers._file.close()  # writes what was buffered: the system may have had it, or not
        if torn:
            os.truncate(answers._file.name, size)
    if torn:
        with (answers.work / "ledger.jsonl").open("ab") as file:
            file.write(torn)
    answers._lock.close()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_row_is_lost_or_twice_whenever_runs_are_killed(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("answers")
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3), label="rows of files")
    in_folder = data.draw(st.booleans(), label="folder")
    output = str(folder / ("out/" if in_folder else "out.jsonl"))
    for _ in range(data.draw(st.integers(0, 4), label="kills")):
        answers = Answers(output, MANIFEST, shard_rows=data.draw(st.integers(1, 20)))
        found = list(missing(answers, sizes, data.draw(st.integers(1, 9), label="batch size")))
        for one in data.draw(st.permutations(found))[: data.draw(st.integers(0, len(found)))]:
            answers.add(one)
            if data.draw(st.booleans(), label="repeated"):
                answers.add(one)
            if data.draw(st.booleans(), label="commit"):
                answers.commit()
        killed(answers, data.draw(st.sampled_from([b"", b'{"file": 0, "sta', b"{"]), label="torn"))
    with Answers(output, MANIFEST, shard_rows=7) as answers:
        for one in missing(answers, sizes, 4):
            answers.add(one)
        answers.finish(range(len(sizes)))
        assert answers.totals.rows == sum(sizes)
    expected = [line(file, row) for file, size in enumerate(sizes) for row in range(size)]
    if in_folder:
        parts = sorted((folder / "out").glob("part-*.jsonl"))
        assert sorted(b"".join(part.read_bytes() for part in parts).splitlines(keepends=True)) == sorted(expected)
        assert sorted(path.name for path in (folder / "out").iterdir()) == ["_raylm", *(part.name for part in parts)]
    else:
        assert (folder / "out.jsonl").read_bytes() == b"".join(expected)
        assert sorted(path.name for path in folder.iterdir()) == ["_out.jsonl.raylm", "out.jsonl"]
    shutil.rmtree(folder)


def finished(output: str, manifest: Manifest = MANIFEST, **options: Any) -> Answers:
    with Answers(output, manifest, **options) as answers:
        if not answers.is_finished:
            for one in missing(answers, [5, 3], 2):
                answers.add(one)
            answers.finish(range(2))
    return answers


def test_a_finished_run_is_not_done_again_and_keeps_its_counts(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    first = finished(output)
    again = finished(output)
    assert (first.is_finished, again.is_finished) == (False, True)
    assert again.totals == first.totals
    assert again.totals.failed == {"too_long": 2}
    (tmp_path / "out.jsonl").unlink()
    assert not finished(output).is_finished
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(RunDirError, match="has changed since it was finished"):
        finished(output)
    assert not finished(output, overwrite=True).is_finished


def test_overwrite_starts_anew_where_the_same_run_is_damaged(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    with Answers(output, MANIFEST) as answers:
        answers.add(batch(0, 0, 3))
        work = answers.work
    (work / "ledger.jsonl").write_text("torn\n" * 2)
    with pytest.raises(RunDirError, match=r"Start anew with overwrite=true"):
        Answers(output, MANIFEST)
    assert finished(output, overwrite=True).totals.rows == 8
    (work / "manifest.json").write_text("torn")
    with pytest.raises(RunDirError, match=r"Start anew with overwrite=true"):
        Answers(output, MANIFEST)
    assert finished(output, overwrite=True).totals.rows == 8


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": {"temperature": 0.7, "seed": 1}}, "temperature was 0.0 and is 0.7"),
        ({"model": "other"}, "the files of the model have changed"),
        ({"input": {**MANIFEST.input, "b.jsonl": {"version": "3"}}}, "b.jsonl has changed"),
        ({"input": {"a.jsonl": {"version": "1"}}}, "b.jsonl is no longer part of the input"),
        ({"input": {**MANIFEST.input, "c.jsonl": {}}}, "c.jsonl is new in the input"),
        ({"input": dict(reversed(MANIFEST.input.items()))}, "the order of the input has changed"),
        ({"input": {**MANIFEST.input, "b.jsonl": {"version": "2", "format": "text"}}}, "format of b.jsonl has changed"),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_answers_of_other_settings_or_input_are_not_mixed(
    tmp_path: Path, changed: dict[str, Any], said: str, done: bool
) -> None:
    output = str(tmp_path / "out.jsonl")
    if done:
        finished(output)
    else:
        with Answers(output, MANIFEST) as answers:
            answers.add(batch(0, 0, 3))
    other = Manifest(**{"settings": MANIFEST.settings, "model": MANIFEST.model, "input": MANIFEST.input, **changed})
    with pytest.raises(RunDirError, match=said):
        Answers(output, other)
    with Answers(output, other, overwrite=True) as answers:
        assert answers.totals.rows == 0


def test_prompts_alone_are_begun_anew(tmp_path: Path) -> None:
    """What a killed `raylm generate MODEL "…"` leaves must not stop the next one."""
    output = str(tmp_path / "out.jsonl")
    with Answers(output, Manifest({}, "", {"prompts": "1"})) as answers:
        answers.add(batch(-1, 0, 3))
    with Answers(output, Manifest({"seed": 2}, "", {"prompts": "2"})) as answers:
        assert answers.totals.rows == 0
        answers.end_file(-1, 0)
        answers.finish([-1])
        answers.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(Answers(str(tmp_path / "out.jsonl"), MANIFEST))
        with pytest.raises(RunDirError, match="another process"):
            Answers(str(tmp_path / "out.jsonl"), MANIFEST)


def test_damage_is_said_and_never_part_of_the_output(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Answers(str(output), MANIFEST) as answers:
        for one in missing(answers, [5, 3], 2):
            answers.add(one)
    shard = tmp_path / "_out.jsonl.raylm" / "shards" / "00000.jsonl"
    good = shard.read_bytes()
    shard.write_bytes(good[:7] + b"X" + good[8:])
    with Answers(str(output), MANIFEST) as answers, pytest.raises(RunDirError, match="is damaged"):
        answers.finish(range(2))
    assert not output.exists()
    shard.write_bytes(good[:-1])
    with pytest.raises(RunDirError, match="shorter than the ledger says"):
        Answers(str(output), MANIFEST)
    ledger = shard.parents[1] / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() * 2)
    with pytest.raises(RunDirError, match="there already"):
        Answers(str(output), MANIFEST)


@pytest.mark.parametrize("output", ["out.jsonl", "out/"])
def test_a_start_anew_that_is_killed_mixes_no_runs(tmp_path: Path, output: str, monkeypatch: Any) -> None:
    """The removal of a finished run's answers stops at each of its steps; the old settings come back afterwards."""
    other = Manifest({"temperature": 0.5}, MANIFEST.model, MANIFEST.input)
    target = str(tmp_path / output)
    if output == "out/":
        target += "/"

    class Killed(Exception):
        pass

    for steps in range(20):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        with Answers(target, MANIFEST, shard_rows=2) as answers:
            for one in missing(answers, [5, 3], 2):
                answers.add(one)  # closes shards, and is not finished
        left = [steps]

        def unlink(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            if path.exists() or not missing_ok:
                os.unlink(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            try:
                Answers(target, other, overwrite=True, shard_rows=3)._lock.close()
            except Killed:
                pass
            else:
                break
        manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
        assert manifest["settings"] == MANIFEST.settings
        with pytest.raises(RunDirError, match="answers of another run"):
            Answers(target, other)
        done = finished(target, shard_rows=7)
        assert done.totals.rows == 8
        files = sorted((tmp_path / "out").glob("part-*")) if done.is_folder else [tmp_path / "out.jsonl"]
        expected = [line(file, row) for file, size in enumerate([5, 3]) for row in range(size)]
        assert sorted(b"".join(file.read_bytes() for file in files).splitlines(keepends=True)) == sorted(expected)
    assert steps > 1


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path, kind: str) -> None:
    output = tmp_path / f"out.{kind}"
    prompts = Manifest({}, "", {"prompts": "1"})

    def run(manifest: Manifest, **options: Any) -> None:
        with Answers(str(output), manifest, **options) as answers:
            found = [{"id": 0, "answer": "a", "finish_reason": "stop", "tokens": 1}]
            answers.add(Batch(-1, 0, 1, json.dumps(found[0]).encode() + b"\n"))
            answers.end_file(-1, 1)
            answers.finish([-1])
            answers.discard()

    for text in ("mine\n", '{"id": 0, "text": "mine"}\n', ""):
        output.write_text(text)
        for manifest in (prompts, MANIFEST):
            with pytest.raises(RunDirError, match=r"is there, and no run .* Set overwrite=true"):
                run(manifest)
        assert output.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    run(prompts, overwrite=True)
    run(prompts)  # as the answers of prompts are replaced by the next ones
    with pytest.raises(RunDirError, match="is there"):
        run(MANIFEST)


def test_what_a_kill_leaves_of_an_output_is_written_over(tmp_path: Path) -> None:
    """A name with a process's number would stay for ever."""
    scratch = tmp_path / ".out.jsonl.partial"
    scratch.write_text("torn")
    write_answers(tmp_path / "out.jsonl", "jsonl", [b"{}\n"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_missing_rows_are_no_finished_run(tmp_path: Path) -> None:
    with Answers(str(tmp_path / "out.jsonl"), MANIFEST) as answers:
        answers.end_file(0, 5)
        answers.add(batch(0, 0, 4))
        with pytest.raises(RunDirError, match="rows of 1 files are missing"):
            answers.finish([0])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunDirError, match="holds files that are no answers"):
        Answers(str(tmp_path), MANIFEST, overwrite=True)
    with pytest.raises(DataError, match="does not exist"):
        Answers(str(tmp_path / "absent" / "out.jsonl"), MANIFEST)


def test_the_ending_names_the_kind() -> None:
    kinds = {
        "a.jsonl": "jsonl",
        "a.jsonl.gz": "jsonl.gz",
        "a.b.parquet": "parquet",
        "answers/": "folder",
        "x": "folder",
    }
    assert {name: kind_of_output(name) for name in kinds} == kinds
    with pytest.raises(DataError, match="unknown ending"):
        kind_of_output("a.csv")
    with pytest.raises(DataError, match=r"s3://bucket/a\.jsonl: is an address, and answers are written to local paths"):
        kind_of_output("s3://bucket/a.jsonl")


ROWS: list[dict[str, Any]] = [
    {"id": 7, "messages": [{"role": "user", "content": "hi"}], "answer": "yes", "finish_reason": "stop", "tokens": 2},
    {
        "id": "x",
        "messages": [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "content": "3", "name": "f"},
        ],
        "tools": [{"name": "f", "parameters": {"a": {"type": "integer"}}}],
        "answers": [{"answer": "b", "finish_reason": "length", "tokens": 1}],
    },
    {"id": "y", "answer": None, "error": "too long", "error_kind": "too_long"},
]


def test_parquet_holds_the_same_and_is_read_back_as_conversations(tmp_path: Path) -> None:
    """D14: tools and arguments stay JSON, whatever other rows have."""
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    write_answers(tmp_path / "a.parquet", "parquet", [b"".join(lines[:2]), lines[2]])
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["id"] for row in table] == ["7", "x", "y"]
    assert [row["answer"] for row in table] == ["yes", None, None]
    assert table[2]["error_kind"] == "too_long"
    assert json.loads(table[1]["tools"]) == ROWS[1]["tools"]
    second = json.loads(list(read_rows(str(tmp_path / "a.parquet")))[1].text or "")
    assert json.loads(second["messages"][0]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    write_answers(tmp_path / "a.jsonl.gz", "jsonl.gz", lines)
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == b"".join(lines)


@pytest.mark.parametrize("size", [10, 500])
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_written(tmp_path: Path, size: int) -> None:
    """RLIMIT_FSIZE in a process of its own stands for a full disk: writes fail in the middle of a batch.

    500 rows are more than a buffer of Python's, so that the write itself fails and not the flush behind it.
    """
    program = """
import resource, signal, sys
from tests.inference.test_answers import MANIFEST, batch
from raylm.errors import DataError
from raylm.inference.answers import Answers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with Answers(sys.argv[1], MANIFEST) as answers:
        size = int(sys.argv[2])
        answers.add(batch(0, 0, size))
        answers.commit()
        limit = 50 * size
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for start in range(size, 10 * size, size):
            answers.add(batch(0, start, start + size))
            answers.commit()
except DataError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "out.jsonl"), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert "cannot be written: File too large. Free disk space" in done.stdout, done.stderr
    with Answers(str(tmp_path / "out.jsonl"), MANIFEST) as answers:
        rows = answers.totals.rows
        assert size <= rows < 10 * size
        assert list(answers.ledger.done[0]) == [(0, rows)]
        for one in missing(answers, [10 * size], 100):
            answers.add(one)
        answers.finish([0])
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(line(0, row) for row in range(10 * size))


def test_arguments_of_the_engine_that_decide_no_answer_may_change() -> None:
    def of(**engine: Any) -> Manifest:
        return describe(GenerateConfig.model_validate({"model": "a/b", "prompts": ["x"], "engine": engine}), "a/b", [])

    free = {"max_num_seqs": 8, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2, "kv_cache_memory_bytes": 9}
    assert differences(of(), of(**free)) == []
    assert differences(of(quantization="fp8"), of(**free)) == ['engine was {"quantization": "fp8"} and is {}']
