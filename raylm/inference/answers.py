"""Where the answers of a run gather until they are all there, and what a run that was killed goes on from.

Work lies in a folder of its own, `_OUTPUT.raylm` beside a file or `OUTPUT/_raylm` in a folder: the manifest, the ledger
and shards of JSON Lines that grow in the order in which answers get ready. A file is put together from the shards in
the order of the input; of a folder each shard becomes a file as soon as it is full. The price of the order is disk:
while a file is put together, its answers are there twice.
"""

import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from raylm.errors import DataError, RunDirError
from raylm.inference.ledger import Entry, Ledger, Totals
from raylm.inference.manifest import Manifest, differences, read_manifest, write_manifest
from raylm.inference.output import check_output, holds_answers_to_prompts, kind_of_output, sync_folder, write_answers

_COMMIT_S = 2.0
"""Work that a kill may cost, beside the batches that the engines are at."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Answers of the rows [start, stop) of a file. lines: JSON Lines, one a row, in the order of the rows."""

    file: int
    start: int
    stop: int
    lines: bytes
    failed: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


class Answers:
    """The answers of one output. A context: whoever leaves it keeps what was added.

    Raises RunDirError where the output belongs to other settings or another process, DataError where it cannot be
    written.
    """

    def __init__(
        self,
        output: str,
        manifest: Manifest,
        *,
        shard_kind: str = "jsonl",
        shard_rows: int = 10_000,
        overwrite: bool = False,
    ) -> None:
        """shard_kind: ending of the files of a folder; overwrite: answers of another run."""
        check_output(output)
        self.kind = kind_of_output(output)
        self.path = Path(output).expanduser().absolute()
        self.is_folder = self.kind == "folder"
        self.work = self.path / "_raylm" if self.is_folder else self.path.with_name(f"_{self.path.name}.raylm")
        self._shard_kind, self._shard_rows = shard_kind, shard_rows
        self._manifest = manifest
        try:
            self._check_folder()
            if not overwrite:
                self._check_file()
            (self.work / "shards").mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.work / "lock")
        except OSError as error:
            raise DataError(output, f"cannot be written: {error.strerror}.", "Choose another output.") from None
        try:
            self.is_finished = self._open(overwrite)
        except BaseException:
            self._lock.close()
            raise
        self.ledger = Ledger(self.work / "ledger.jsonl")
        self.resumed_rows = self.ledger.totals.rows
        self._shard = max([-1, *self.ledger.shard_ends, *self.ledger.closed])
        self._file: IO[bytes] | None = None
        self._offset = 0
        self._committed = time.monotonic()
        self._mend_shards()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.commit()
        finally:
            if self._file:
                with suppress(OSError):  # of what `commit` could not write, which the ledger does not name
                    self._file.close()
            self._lock.close()

    @property
    def totals(self) -> Totals:
        """Sums over all rows, those of former starts included."""
        if self.is_finished:
            result = dict(self._manifest.result or {})
            result.pop("num_bytes", None)
            return Totals(**{**result, "failed": _counter(result["failed"])})
        return self.ledger.totals

    def add(self, batch: Batch) -> None:
        """Takes a batch, and has it on the disk with the next batch that comes two seconds later.

        A batch that is there already is not taken again: Ray may repeat a task. Raises ValueError for one that is
        there in part.
        """
        if all(row in self.ledger.done[batch.file] for row in range(batch.start, batch.stop)):
            return
        if self._file is None:
            self._next_shard()
        assert self._file is not None
        entry = Entry(
            batch.file,
            batch.start,
            batch.stop,
            self._shard,
            self._offset,
            len(batch.lines),
            zlib.crc32(batch.lines),
            dict(batch.failed),
            batch.answers,
            batch.prompt_tokens,
            batch.tokens,
        )
        with _said(self.work):
            self._file.write(batch.lines)
        self.ledger.add(entry)  # last: the ledger never names what could not be written
        self._offset += len(batch.lines)
        if self.ledger.shard_rows[self._shard] >= self._shard_rows:
            self._close_shard()
        elif time.monotonic() - self._committed > _COMMIT_S:
            self.commit()

    def end_file(self, file: int, num_rows: int) -> None:
        """Notes that a file of the input has so many rows."""
        self.ledger.end_file(file, num_rows)

    def commit(self) -> None:
        """Puts everything on the disk: first answers, then what the ledger says of them."""
        with _said(self.work):
            if self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            self.ledger.commit()
        self._committed = time.monotonic()

    def finish(self, files: Iterable[int]) -> None:
        """Makes the output out of the work. Raises RunDirError where rows are missing or shards damaged."""
        if self.is_finished:
            return
        if self._file:
            self._close_shard()
        self.commit()
        if missing := self.ledger.unfinished(files):
            raise RunDirError(
                str(self.work), f"rows of {len(missing)} files are missing.", "Start the same command again."
            )
        if self.is_folder:
            self._publish_closed()
        else:
            write_answers(self.path, self.kind, self._pieces())
        totals = self.ledger.totals
        result = {
            "rows": totals.rows,
            "answers": totals.answers,
            "prompt_tokens": totals.prompt_tokens,
            "tokens": totals.tokens,
            "failed": dict(totals.failed),
            "num_bytes": self._num_bytes(),
        }
        self._manifest = replace(self._manifest, result=result)
        write_manifest(self.work / "manifest.json", self._manifest)
        shutil.rmtree(self.work / "shards", ignore_errors=True)

    def discard(self) -> None:
        """Removes the work beside a file, for runs that nobody goes on with."""
        if not self.is_folder:
            shutil.rmtree(self.work, ignore_errors=True)

    def _check_folder(self) -> None:
        """Raises RunDirError for a folder with files that are no answers."""
        if self.is_folder and self.path.is_dir() and any(self.path.iterdir()) and not self.work.is_dir():
            raise RunDirError(str(self.path), "holds files that are no answers.", "Choose an empty or a new folder.")

    def _check_file(self) -> None:
        """Raises RunDirError for a file that no run of ours has written: `finish` would replace it."""
        if self.is_folder or not self.path.exists() or (self.work / "manifest.json").is_file():
            return
        if not (self._manifest.is_of_prompts and holds_answers_to_prompts(self.path, self.kind)):
            raise RunDirError(
                str(self.path),
                "is there, and no run that is kept track of has written it.",
                "Set overwrite=true to replace it, or choose another output.",
            )

    def _open(self, overwrite: bool) -> bool:
        """Compares the manifest that is there with ours; True for a finished run of the same."""
        path = self.work / "manifest.json"
        if overwrite:  # whatever is there, the same run's as well: it may be damaged
            self._remove_answers()
        there = read_manifest(path)
        of_prompts = there is not None and there.is_of_prompts  # these are answered again, without a word
        found = differences(there, self._manifest) if there else []
        if found and not of_prompts:
            raise RunDirError(
                str(self.path),
                f"holds answers of another run: {'; '.join(found[:5])}.",
                "Set overwrite=true to start anew, or choose another output.",
            )
        if not found and there and there.result is not None:
            if self._num_bytes() == there.result["num_bytes"]:
                self._manifest = there
                return True
            if not of_prompts and self._num_bytes() > 0:
                raise RunDirError(
                    str(self.path),
                    "has changed since it was finished.",
                    "Set overwrite=true, or choose another output.",
                )
            found = ["the output"]
        if found:
            self._remove_answers()
            there = None
        if not there:
            write_manifest(path, self._manifest)
        return False

    def _num_bytes(self) -> int:
        """Size of the output; -1 where there is none."""
        files = self.path.glob("part-*") if self.is_folder else [self.path] if self.path.is_file() else []
        sizes = [file.stat().st_size for file in files]
        return sum(sizes) if sizes else -1

    def _remove_answers(self) -> None:
        """What a former run has made, and nothing else.

        The manifest goes last: a start after a kill in between still knows whose the rest is. The ledger goes first:
        nothing that is left counts without it.
        """
        (self.work / "ledger.jsonl").unlink(missing_ok=True)
        shutil.rmtree(self.work / "shards", ignore_errors=True)
        (self.work / "shards").mkdir()
        if self.is_folder:
            for part in self.path.glob("part-*"):
                part.unlink()
        (self.work / "manifest.json").unlink(missing_ok=True)

    def _shard_path(self, shard: int) -> Path:
        return self.work / "shards" / f"{shard:05}.jsonl"

    def _mend_shards(self) -> None:
        """Cuts off what the ledger does not know of. Raises RunDirError where a shard lacks what it does."""
        if self.is_finished:
            return
        for path in sorted((self.work / "shards").glob("*.jsonl")):
            shard = int(path.stem)
            end = self.ledger.shard_ends.get(shard, 0)
            if path.stat().st_size > end:
                os.truncate(path, end)
        for shard, end in self.ledger.shard_ends.items():
            path = self._shard_path(shard)
            if self.is_folder and shard in self.ledger.closed and not path.is_file():
                continue  # it is a file of the folder already
            if not path.is_file() or path.stat().st_size < end:
                raise RunDirError(str(path), "is shorter than the ledger says.", "Start anew with overwrite=true.")
        if self.is_folder:
            self._remove_unknown_parts()
            self._publish_closed()
        if self._shard >= 0 and self._shard not in self.ledger.closed:
            self._file = self._shard_path(self._shard).open("ab")
            self._offset = self.ledger.shard_ends.get(self._shard, 0)

    def _remove_unknown_parts(self) -> None:
        """Parts become files after the ledger has closed their shards: others are left of a run that was removed."""
        for part in self.path.glob("part-*"):
            number = part.name.removeprefix("part-").partition(".")[0]
            if number.isdecimal() and int(number) not in self.ledger.closed:
                part.unlink()

    def _next_shard(self) -> None:
        self._shard += 1
        self._file = self._shard_path(self._shard).open("ab")
        self._offset = 0
        sync_folder(self.work / "shards")

    def _close_shard(self) -> None:
        assert self._file is not None
        with _said(self.work):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        self.ledger.close_shard(self._shard)
        self.commit()
        if self.is_folder:
            self._publish_closed()

    def _publish_closed(self) -> None:
        for shard in sorted(self.ledger.closed):
            path = self._shard_path(shard)
            if path.is_file():
                target = self.path / f"part-{shard:05}.{self._shard_kind}"
                write_answers(target, self._shard_kind, _whole(path))
                path.unlink()

    def _pieces(self) -> Iterator[bytes]:
        """All answers in the order of the input. Raises RunDirError for a damaged shard."""
        files: dict[int, IO[bytes]] = {}
        try:
            for entry in self.ledger.in_order():
                if entry.shard not in files:
                    if len(files) >= 64:
                        files.pop(next(iter(files))).close()
                    files[entry.shard] = self._shard_path(entry.shard).open("rb")
                files[entry.shard].seek(entry.offset)
                piece = files[entry.shard].read(entry.length)
                if zlib.crc32(piece) != entry.checksum:
                    raise RunDirError(
                        str(self._shard_path(entry.shard)), "is damaged.", "Start anew with overwrite=true."
                    )
                yield piece
        finally:
            for file in files.values():
                file.close()


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """A full disk in one line. What the ledger names is on the disk all the same."""
    try:
        yield
    except OSError as error:
        raise DataError(
            str(path), f"cannot be written: {error.strerror}.", "Free disk space; the same command goes on."
        ) from None


def _whole(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _lock(path: Path) -> IO[str]:
    """Held until it is closed, also by a kill. Raises RunDirError where another process holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunDirError(
            str(path.parent), "another process writes these answers.", "Wait for it, or choose another output."
        ) from None
    return file


def _counter(values: dict[str, int]) -> Any:
    from collections import Counter

    return Counter(values)
