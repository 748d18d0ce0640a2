import json
from pathlib import Path

import pytest

from raylm.data.report import DataReport, RejectedRow
from raylm.errors import DataError

BAD = RejectedRow("a.json", 3, "malformed", "has no messages.", 12)
LONG = RejectedRow("a.json", 5, "too_long", "has 99 tokens, more than data.max_seq_len=8.")


def _report(*rejected: RejectedRow, used: int = 8) -> DataReport:
    return DataReport(rows=used + len(rejected), used=used, rejected=rejected, tokens=10, loss_tokens=5)


def test_the_first_malformed_row_stops_by_default() -> None:
    with pytest.raises(DataError) as caught:
        _report(LONG, BAD).check("data.train", on_bad_row="error", max_bad_share=1)
    assert str(caught.value) == (
        "a.json: instance 3 (line 12): has no messages. Mend the row, or set data.on_bad_row=quarantine."
    )


def test_a_fault_of_a_whole_file_stops_always() -> None:
    fault = RejectedRow("a.json", -1, "malformed", "line 3, column 2: not valid JSON.")
    with pytest.raises(DataError, match=r"a\.json: line 3, column 2: not valid JSON"):
        _report(fault).check("data.train", on_bad_row="quarantine", max_bad_share=1)


def test_quarantine_goes_on_below_the_limit_and_writes_the_rows(tmp_path: Path) -> None:
    report = _report(BAD, LONG)
    report.check("data.train", on_bad_row="quarantine", max_bad_share=0.2)
    assert report.rejected_by_reason == {"malformed": 1, "too_long": 1}
    report.write_rejected(tmp_path / "rejected.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines[0] == {"file": "a.json", "index": 3, "line": 12, "reason": "malformed", "problem": "has no messages."}
    with pytest.raises(DataError, match="2 of 10 rows are rejected"):
        report.check("data.train", on_bad_row="quarantine", max_bad_share=0.1)


def test_all_rows_rejected() -> None:
    with pytest.raises(DataError, match=r"data\.train: no row can be used \(too_long 1\)\. The first: a\.json"):
        _report(LONG, used=0).check("data.train", on_bad_row="error", max_bad_share=1)
    with pytest.raises(DataError, match="no row can be used"):
        _report(used=0).check("data.train", on_bad_row="error", max_bad_share=1)


def test_rows_cannot_get_lost() -> None:
    with pytest.raises(AssertionError, match="rows were lost"):
        DataReport(rows=3, used=1, rejected=(BAD,), tokens=0, loss_tokens=0)
