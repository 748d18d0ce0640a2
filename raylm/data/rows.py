"""Rows of datasets one by one, without Ray: for previews, conversions, counts and prompts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylm.config.data import SourceSection
from raylm.data.formats import ParsedRow, parse_row
from raylm.data.readers import place_in_file, read_rows
from raylm.data.remote import scheme_of
from raylm.data.schema import RowProblem, load_json
from raylm.data.sources import SourceFile, list_files
from raylm.errors import DataError


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row in its final form, or None with a problem."""

    file: SourceFile
    number: int
    """Of the file in the list of files."""
    index: int
    line: int
    row: ParsedRow | None
    problem: str = ""

    @property
    def where(self) -> str:
        """File and row, as messages name them."""
        return place_in_file(self.file.path, self.index, self.line)


def iterate_rows(sources: Sequence[SourceSection], role_map: Mapping[str, str]) -> Iterator[FileRow]:
    """All rows in order. Raises DataError for missing files; faults of rows come as rows."""
    for number, file in enumerate(list_files(sources)):
        yield from _rows_of(number, file, role_map)


def _rows_of(number: int, file: SourceFile, role_map: Mapping[str, str]) -> Iterator[FileRow]:
    for raw in read_rows(file.path, file.options):
        row, problem = None, raw.problem
        if raw.text is not None:
            try:
                row = parse_text(raw.text, raw.format, file, role_map)
            except RowProblem as fault:
                problem = str(fault)
        yield FileRow(file, number, raw.index, raw.line, row, problem)


def check_first_rows(files: Sequence[SourceFile], role_map: Mapping[str, str]) -> None:
    """Looks at the first row of each dataset's first local file, to find data of no known form before the start.
    Raises DataError."""
    seen: set[int] = set()
    for number, file in enumerate(files):
        if file.source in seen or scheme_of(file.path):
            continue
        seen.add(file.source)
        found = next(_rows_of(number, file, role_map), None)
        if found is not None and found.problem:
            remedy = "" if found.index < 0 else "Mend the row, or set data.on_bad_row=quarantine."
            raise DataError(found.where, found.problem, remedy)


def parse_text(text: str, form: str, file: Any, role_map: Mapping[str, str]) -> ParsedRow:
    """A row's JSON text in its final form; file: has `format` and `columns`; form: what the file says of its rows.

    Raises RowProblem.
    """
    try:
        instance = load_json(text)
    except json.JSONDecodeError as error:
        raise RowProblem(f"column {error.colno}: not valid JSON: {error.msg}.") from None
    except RecursionError:
        raise RowProblem("is nested too deeply.") from None
    name = file.format if file.format != "auto" else form or "auto"
    return parse_row(instance, name, role_map, file.columns)
