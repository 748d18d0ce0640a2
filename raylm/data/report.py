"""What became of every row: used, rejected and why, or left out on purpose. The sum is always the rows read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raylm.data.readers import place_in_file
from raylm.data.remote import shown
from raylm.errors import DataError
from raylm.words import counted


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that is not used: `index` within the file, -1 for the file as a whole; `line` from 1, 0 where unknown."""

    file: str
    index: int
    reason: str
    problem: str
    line: int = 0

    @property
    def where(self) -> str:
        """File and row, as messages name them."""
        return place_in_file(self.file, self.index, self.line)


@dataclass(frozen=True, slots=True)
class SourceReport:
    """Counts of one dataset of the configuration. tokens: of an epoch, so a weight of 2 counts them twice."""

    path: str
    rows: int
    used: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of one tokenised dataset. sequences: more than `used` where rows are split; left_out: rows that
    `data.sample` or `data.max_rows` leave aside; straddling: tokens over the border of an answer, without loss."""

    rows: int
    used: int
    rejected: tuple[RejectedRow, ...]
    tokens: int
    loss_tokens: int
    sequences: int = 0
    left_out: int = 0
    straddling: int = 0
    sources: tuple[SourceReport, ...] = ()

    def __post_init__(self) -> None:
        assert self.rows == self.used + len(self.rejected) + self.left_out, "rows were lost"

    @property
    def rejected_by_reason(self) -> dict[str, int]:
        """Reason -> rows, in order of first appearance."""
        counts: dict[str, int] = {}
        for row in self.rejected:
            counts[row.reason] = counts.get(row.reason, 0) + 1
        return counts

    def check(self, where: str, *, on_bad_row: Literal["error", "quarantine"], max_bad_share: float) -> None:
        """Raises DataError for the first malformed row or file, for too many rejected rows, or when none is left."""
        malformed = (row for row in self.rejected if row.reason == "malformed")
        if fault := next((row for row in malformed if on_bad_row == "error" or row.index < 0), None):
            remedy = "" if fault.index < 0 else "Mend the row, or set data.on_bad_row=quarantine."
            raise DataError(fault.where, fault.problem, remedy)
        if self.used == 0:
            detail = f" ({self.describe_rejected()})" if self.rejected else ""
            raise DataError(where, f"no row can be used{detail}.", self._first_problem())
        if len(self.rejected) > max_bad_share * (self.rows - self.left_out):
            raise DataError(
                where,
                f"{len(self.rejected)} of {self.rows - self.left_out} rows are rejected "
                f"({self.describe_rejected()}), more than data.max_bad_share={max_bad_share}.",
                self._first_problem(),
            )

    def describe_rejected(self) -> str:
        """`too_long 3, no_loss 1`, or `none`."""
        return ", ".join(f"{reason} {count}" for reason, count in self.rejected_by_reason.items()) or "none"

    def describe(self) -> str:
        """All counts in a line, and the share of each dataset where there are several."""
        rejected = f"{len(self.rejected)} rejected" + (f" ({self.describe_rejected()})" if self.rejected else "")
        parts = [f"{counted(self.rows, 'row')} = {self.used} used + {rejected}"]
        if self.left_out:
            parts[0] += f" + {self.left_out} left out"
        parts.append(f"{counted(self.tokens, 'token')}, {self.loss_tokens:,} carry loss")
        if self.straddling:
            parts.append(f"{counted(self.straddling, 'token')} across an answer's border, without loss")
        total = sum(source.tokens for source in self.sources)
        if len(self.sources) > 1 and total:
            shares = ", ".join(f"{source.path} {source.tokens / total:.1%}" for source in self.sources)
            parts.append(f"shares of an epoch's tokens: {shares}")
        return "; ".join(parts)

    def summary(self) -> dict[str, object]:
        """The counts as plain values."""
        return {
            "rows": self.rows,
            "used": self.used,
            "rejected": self.rejected_by_reason,
            "left_out": self.left_out,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "straddling": self.straddling,
            "sources": [
                {"path": source.path, "rows": source.rows, "used": source.used, "tokens": source.tokens}
                for source in self.sources
            ],
        }

    def write_rejected(self, path: Path) -> None:
        """One JSON object a line for each rejected row; no file when there are none."""
        if not self.rejected:
            return
        with path.open("w", encoding="utf-8") as file:
            for row in self.rejected:
                line = {
                    "file": shown(row.file),
                    "index": row.index,
                    "line": row.line,
                    "reason": row.reason,
                    "problem": row.problem,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _first_problem(self) -> str:
        return f"The first: {self.rejected[0].where} {self.rejected[0].problem}" if self.rejected else ""
