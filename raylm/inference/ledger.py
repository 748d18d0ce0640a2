"""The record of a generation: which rows of which file are answered, and where their answers lie.

A line a batch is appended after the answers themselves are on the disk, so a row that the ledger names is there, and
one that it does not name is answered again. What a kill leaves behind the last whole line is cut off.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raylm.errors import RunDirError
from raylm.inference.ranges import Ranges


@dataclass(frozen=True, slots=True)
class Entry:
    """Answers of the rows [start, stop) of a file, as bytes [offset, offset + length) of a shard.

    failed: kind of fault -> rows; answers, prompt_tokens, tokens: sums.
    """

    file: int
    start: int
    stop: int
    shard: int
    offset: int
    length: int
    checksum: int
    failed: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Totals:
    """Sums over the entries."""

    rows: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry) -> None:
        """Counts an entry."""
        self.rows += entry.stop - entry.start
        self.answers += entry.answers
        self.prompt_tokens += entry.prompt_tokens
        self.tokens += entry.tokens
        self.failed.update(entry.failed)


class Ledger:
    """One writer at a time. Lines wait in memory until `commit`."""

    def __init__(self, path: Path) -> None:
        """Reads the ledger at `path`, if there is one. Raises RunDirError where it is damaged."""
        self._path = path
        self._waiting: list[str] = []
        self.done: defaultdict[int, Ranges] = defaultdict(Ranges)
        self.num_rows: dict[int, int] = {}
        """File -> its rows, once it was read to its end."""
        self.closed: set[int] = set()
        """Shards that get no more answers."""
        self.totals = Totals()
        self.shard_ends: dict[int, int] = {}
        """Shard -> bytes of it that count."""
        self.shard_rows: Counter[int] = Counter()
        if path.is_file():
            self._cut_off_torn_line()
            for line in _lines(path):
                self._take(line)

    def add(self, entry: Entry) -> None:
        """Raises ValueError where one of the rows is there already."""
        self._count(entry)
        self._waiting.append(json.dumps(asdict(entry)))

    def end_file(self, file: int, num_rows: int) -> None:
        """Notes that a file has so many rows."""
        if self.num_rows.get(file) != num_rows:
            self.num_rows[file] = num_rows
            self._waiting.append(json.dumps({"file": file, "num_rows": num_rows}))

    def close_shard(self, shard: int) -> None:
        """Notes that a shard gets no more answers."""
        self.closed.add(shard)
        self._waiting.append(json.dumps({"closed": shard}))

    def commit(self) -> None:
        """Appends what waits and waits for the disk; the answers that it names must be there already."""
        if not self._waiting:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in self._waiting))
            file.flush()
            os.fsync(file.fileno())
        self._waiting.clear()

    def unfinished(self, files: Iterable[int]) -> list[int]:
        """The files of which a row is missing, or may be."""
        return [
            file for file in files if file not in self.num_rows or not self.done[file].is_all_of(self.num_rows[file])
        ]

    def in_order(self) -> list[Entry]:
        """The committed entries in the order of the input."""
        found = [_entry(line) for line in _lines(self._path) if "shard" in line] if self._path.is_file() else []
        return sorted(found, key=lambda entry: (entry.file, entry.start))

    def _take(self, line: dict[str, Any]) -> None:
        try:
            if "closed" in line:
                self.closed.add(line["closed"])
            elif "num_rows" in line:
                self.num_rows[line["file"]] = line["num_rows"]
            else:
                self._count(_entry(line))
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirError(str(self._path), f"is damaged: {error}.", "Start anew with overwrite=true.") from None

    def _count(self, entry: Entry) -> None:
        self.done[entry.file].add(entry.start, entry.stop)
        self.totals.add(entry)
        end = entry.offset + entry.length
        self.shard_ends[entry.shard] = max(end, self.shard_ends.get(entry.shard, 0))
        self.shard_rows[entry.shard] += entry.stop - entry.start

    def _cut_off_torn_line(self) -> None:
        with self._path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            at = size
            while at > 0:
                start = max(0, at - 65536)
                file.seek(start)
                found = file.read(at - start).rfind(b"\n")
                if found >= 0:
                    at = start + found + 1
                    break
                at = start
            if at != size:
                file.truncate(at)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError:
                raise RunDirError(f"{path}: line {number}", "is damaged.", "Start anew with overwrite=true.") from None


def _entry(line: dict[str, Any]) -> Entry:
    return Entry(**line)
