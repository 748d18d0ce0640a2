import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raylm.errors import CheckpointError
from raylm.training.checkpoint import (
    CheckpointMeta,
    list_checkpoints,
    newest_checkpoint,
    open_state,
    prune,
    read_meta,
    state_file,
    verify_checkpoints,
)
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.state import Piece, share_of

ROOT = Path(__file__).parents[2]
STATE_FILE = state_file(0, 1)
STATE = {"model/w": torch.arange(6.0).reshape(2, 3), "optimizer/w/step": torch.tensor(3.0)}


def _save(root: Path, step: int, loss: float | None = None) -> Path:
    pieces = {name: Piece(tensor, 0, tuple(tensor.shape)) for name, tensor in STATE.items()}
    CheckpointWriter(root, asynchronous=False).save(pieces, CheckpointMeta(step, {"seed": 1}, loss))
    return root / f"step-{step:08d}"


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    path = _save(tmp_path, 20, 0.5)
    assert path.name == "step-00000020"
    meta = read_meta(path)
    assert (meta.step, meta.eval_loss, meta.identity) == (20, 0.5, {"seed": 1})
    loaded = open_state(path, meta)
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
        (2, None, f"{STATE_FILE} is damaged: its SHA-256 differs."),
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
    with pytest.raises(CheckpointError, match=f"{STATE_FILE} is damaged"):
        open_state(path, read_meta(path))


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from raylm.errors import CheckpointError
from raylm.training.checkpoint import CheckpointMeta
from raylm.training.checkpoint_writer import CheckpointWriter
from raylm.training.state import Piece

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # the kernel refuses to write more
writer = CheckpointWriter(Path(sys.argv[1]))
writer.save({"a": Piece(torch.ones(200_000), 0, (200_000,))}, CheckpointMeta(step=1, identity={}))
writer.save({"a": Piece(torch.ones(400_000), 0, (400_000,))}, CheckpointMeta(step=2, identity={}))
try:
    writer.close()
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert "step-00000002: cannot be written: " in done.stdout, done.stderr
    assert "make room and continue with training.resume=auto" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert open_state(tmp_path / "step-00000001", read_meta(tmp_path / "step-00000001"))["a"].sum() == 200_000


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
    CheckpointWriter(tmp_path)
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


def _pieces_of_three(rank: int) -> dict[str, Piece]:
    """A tensor in uneven ranges, one that rank 2 has alone, and a counter."""
    flat = torch.arange(10.0)
    cut = [slice(0, 4), slice(4, 9), slice(9, 10)][rank]
    pieces = {"model/w": Piece(flat[cut], cut.start, (5, 2))}
    if rank == 2:
        pieces["model/b"] = Piece(torch.ones(3), 0, (3,))
    return pieces | ({"optimizer/w/step": Piece(torch.tensor(7.0), 0, ())} if rank == 0 else {})


def test_the_pieces_of_three_ranks_are_one_checkpoint(tmp_path: Path) -> None:
    """Whoever comes last; it is there when rank 0 has it, and its folder holds nothing else."""
    writers = [CheckpointWriter(tmp_path, rank=rank, world_size=3, token="t") for rank in range(3)]
    for rank in (0, 2, 1):
        assert newest_checkpoint(tmp_path) is None
        writers[rank].save(_pieces_of_three(rank), CheckpointMeta(4, {}))
    for writer in writers:
        writer.close()
    path = newest_checkpoint(tmp_path)
    assert path is not None
    state = open_state(path, read_meta(path))
    assert torch.equal(state["model/w"], torch.arange(10.0).reshape(5, 2))
    assert torch.equal(state["model/b"], torch.ones(3))
    assert state["optimizer/w/step"].shape == ()
    assert sorted(file.name for file in path.iterdir()) == ["checkpoint.json", *(state_file(r, 3) for r in range(3))]


def test_files_of_a_group_that_died_do_not_mix_in(tmp_path: Path) -> None:
    """C04: rank 1 of two wrote its part, rank 0 died; the next group saves the same step."""
    dead = CheckpointWriter(tmp_path, rank=1, world_size=2, token="first")
    dead.save({"a": Piece(torch.zeros(2), 2, (4,))}, CheckpointMeta(1, {}))
    dead.close()
    assert len(list(tmp_path.iterdir())) == 1
    writers = [CheckpointWriter(tmp_path, rank=rank, world_size=2, token="second") for rank in (1, 0)]
    for rank, writer in ((1, writers[0]), (0, writers[1])):
        writer.save({"a": Piece(torch.ones(2), 2 * rank, (4,))}, CheckpointMeta(1, {}))
        writer.close()
    path = newest_checkpoint(tmp_path)
    assert path is not None
    assert open_state(path, read_meta(path))["a"].tolist() == [1, 1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_rank_that_cannot_write_is_named_by_both(tmp_path: Path) -> None:
    writers = [CheckpointWriter(tmp_path, rank=rank, world_size=2, token="t") for rank in (0, 1)]
    (tmp_path / ".step-00000001.t" / state_file(1, 2)).mkdir(parents=True)
    for rank, writer in enumerate(writers):
        writer.save({"a": Piece(torch.ones(2), 2 * rank, (4,))}, CheckpointMeta(1, {}))
    with pytest.raises(CheckpointError, match=r"cannot be written: .*directory"):
        writers[1].close()
    with pytest.raises(CheckpointError, match=r"cannot be written: rank 1: .*directory"):
        writers[0].close()
    assert not list(tmp_path.iterdir())


def test_what_changes_while_it_is_written_is_not_in_it(tmp_path: Path) -> None:
    """The pieces are copied when `save` returns, unless they are the last."""
    weights = torch.zeros(3_000_000)
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2):
        writer.save({"a": Piece(weights, 0, (3_000_000,))}, CheckpointMeta(step, {}))
        weights += 1
    writer.close()
    for step, value in ((1, 0.0), (2, 1.0)):
        path = tmp_path / f"step-{step:08d}"
        assert open_state(path, read_meta(path))["a"].unique().tolist() == [value]


def test_pieces_that_are_missing_are_found(tmp_path: Path) -> None:
    for step, start in ((1, 1), (2, 0)):
        writer = CheckpointWriter(tmp_path)
        writer.save({"a": Piece(torch.ones(2), start, (4,))}, CheckpointMeta(step, {}), last=True)
        writer.close()
        path = tmp_path / f"step-{step:08d}"
        with pytest.raises(CheckpointError, match=r"lacks elements of a"):
            open_state(path, read_meta(path))["a"]


def test_ranks_share_what_all_hold_evenly() -> None:
    state = {str(n): torch.zeros(n + 1) for n in range(50)}
    shares = [share_of(state, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(state)
    sizes = [sum(piece.values.numel() for piece in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 50
