"""What became of every row: used, or rejected and why. Rows in = rows used + rows rejected, always."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raylm.errors import DataError


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that is not used: `index` within the file's instances, -1 for the file as a whole."""

    file: str
    index: int
    reason: str
    problem: str

    @property
    def where(self) -> str:
        """File and instance, as messages name them."""
        return self.file if self.index < 0 else f"{self.file}: instance {self.index}"


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of one tokenised dataset."""

    rows: int
    used: int
    rejected: tuple[RejectedRow, ...]
    tokens: int
    loss_tokens: int

    def __post_init__(self) -> None:
        assert self.rows == self.used + len(self.rejected), "rows were lost"

    @property
    def rejected_by_reason(self) -> dict[str, int]:
        """Reason -> rows, in order of first appearance."""
        counts: dict[str, int] = {}
        for row in self.rejected:
            counts[row.reason] = counts.get(row.reason, 0) + 1
        return counts

    def check(self, where: str, *, on_bad_row: Literal["error", "quarantine"], max_rejected_share: float) -> None:
        """Raises DataError for the first malformed row, for too many rejected rows, or when none is left."""
        malformed = next((row for row in self.rejected if row.reason == "malformed"), None)
        if malformed and (on_bad_row == "error" or malformed.index < 0):
            remedy = "" if malformed.index < 0 else "Mend the row, or set data.on_bad_row=quarantine."
            raise DataError(malformed.where, malformed.problem, remedy)
        if self.used == 0:
            detail = f" ({self.describe_rejected()})" if self.rejected else ""
            raise DataError(where, f"no row can be used{detail}.", self._first_problem())
        if len(self.rejected) > max_rejected_share * self.rows:
            raise DataError(
                where,
                f"{len(self.rejected)} of {self.rows} rows are rejected ({self.describe_rejected()}), more than "
                f"data.max_rejected_share={max_rejected_share}.",
                self._first_problem(),
            )

    def describe_rejected(self) -> str:
        """`too_long 3, no_loss 1`, or `none`."""
        return ", ".join(f"{reason} {count}" for reason, count in self.rejected_by_reason.items()) or "none"

    def summary(self) -> dict[str, object]:
        """The counts as plain values."""
        return {
            "rows": self.rows,
            "used": self.used,
            "rejected": self.rejected_by_reason,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
        }

    def write_rejected(self, path: Path) -> None:
        """One JSON object a line for each rejected row; no file when there are none."""
        if not self.rejected:
            return
        with path.open("w", encoding="utf-8") as file:
            for row in self.rejected:
                line = {"file": row.file, "index": row.index, "reason": row.reason, "problem": row.problem}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _first_problem(self) -> str:
        return f"The first: {self.rejected[0].where} {self.rejected[0].problem}" if self.rejected else ""
