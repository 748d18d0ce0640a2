import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raylm.errors import CheckpointError
from raylm.training.checkpoint import (
    STATE_FILE,
    CheckpointMeta,
    list_checkpoints,
    load_state,
    newest_checkpoint,
    prune,
    read_meta,
    save_checkpoint,
    verify_checkpoints,
)

ROOT = Path(__file__).parents[2]
STATE = {"model/w": torch.arange(6.0).reshape(2, 3), "optimizer/w/step": torch.tensor(3.0)}


def _save(root: Path, step: int, loss: float | None = None) -> Path:
    return save_checkpoint(root, STATE, CheckpointMeta(step, {"seed": 1}, loss))


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    path = _save(tmp_path, 20, 0.5)
    assert path.name == "step-00000020"
    meta = read_meta(path)
    assert (meta.step, meta.eval_loss, meta.identity) == (20, 0.5, {"seed": 1})
    loaded = load_state(path, meta)
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    assert not list(tmp_path.glob(".step-*"))


def test_verifying_names_what_is_damaged(tmp_path: Path) -> None:
    _save(tmp_path, 1, 0.5)
    flipped, cut = _save(tmp_path, 2), _save(tmp_path, 3)
    data = bytearray((flipped / STATE_FILE).read_bytes())
    data[-1] ^= 1
    (flipped / STATE_FILE).write_bytes(data)
    (cut / STATE_FILE).write_bytes(bytes(data[:-1]))
    found = [(report.step, report.eval_loss, report.problem) for report in verify_checkpoints(tmp_path)]
    assert found == [
        (1, 0.5, ""),
        (2, None, "state.safetensors is damaged: its SHA-256 differs."),
        (3, None, "is not a complete checkpoint."),
    ]
    with pytest.raises(CheckpointError, match="there is no such folder"):
        verify_checkpoints(tmp_path / "none")


def test_incomplete_checkpoints_are_never_the_newest(tmp_path: Path) -> None:
    """C03: truncated, without its weights, or without its description."""
    first = _save(tmp_path, 1)
    for step, damage in ((2, "truncate"), (3, "weights"), (4, "meta"), (5, "empty")):
        path = _save(tmp_path, step)
        if damage == "truncate":
            (path / STATE_FILE).write_bytes((path / STATE_FILE).read_bytes()[:-1])
        elif damage == "weights":
            (path / STATE_FILE).unlink()
        elif damage == "meta":
            (path / "checkpoint.json").unlink()
        else:
            (path / "checkpoint.json").write_text("")
    assert list_checkpoints(tmp_path) == [first]
    assert newest_checkpoint(tmp_path) == first
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        read_meta(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        read_meta(tmp_path / "step-00000009")


def test_damaged_weights_are_found(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    content = bytearray((path / STATE_FILE).read_bytes())
    content[-1] ^= 1
    (path / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        load_state(path, read_meta(path))


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from raylm.errors import CheckpointError
from raylm.training.checkpoint import CheckpointMeta, save_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # the kernel refuses to write more
root = Path(sys.argv[1])
save_checkpoint(root, {"a": torch.ones(200_000)}, CheckpointMeta(step=1, identity={}))
try:
    save_checkpoint(root, {"a": torch.ones(400_000)}, CheckpointMeta(step=2, identity={}))
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert "step-00000002: cannot be written: " in done.stdout, done.stderr
    assert "make room and continue with training.resume=auto" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_state(tmp_path / "step-00000001", read_meta(tmp_path / "step-00000001"))["a"].sum() == 200_000


def test_a_file_that_cannot_be_flushed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        _save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_process_that_died_while_saving_leaves_nothing_that_counts(tmp_path: Path) -> None:
    first = _save(tmp_path, 1)
    scratch = tmp_path / ".step-00000002.999"
    scratch.mkdir()
    (scratch / STATE_FILE).write_bytes(b"half")
    assert list_checkpoints(tmp_path) == [first]
    prune(tmp_path, keep_last=1, keep_best=False)
    assert not scratch.exists()


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step, loss in ((1, 0.9), (2, 0.3), (3, 0.8), (4, None), (5, 0.7)):
        _save(tmp_path, step, loss)
    prune(tmp_path, keep_last=2, keep_best=True)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "4", "5"]
    prune(tmp_path, keep_last=1, keep_best=False)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["5"]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    tree = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**tree, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99"):
        read_meta(path)
