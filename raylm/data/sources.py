"""Where rows come from: files of LMFlow conversation JSON, or folders of them.

Paths are checked on the driver before Ray starts; files are parsed in Ray tasks, one task a file. What is wrong with
a file or a row travels as data, so that the driver reports the first fault in file order whatever finishes first.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylm.data.schema import RowProblem, conversation_to_json, parse_conversation
from raylm.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One instance: `conversation` is JSON text, or None with a `problem`; index -1 is a fault of the whole file."""

    index: int
    conversation: str | None
    problem: str = ""


def list_files(paths: tuple[str, ...]) -> list[str]:
    """The absolute paths of the dataset files that `paths` name, folders read recursively in sorted order.

    Hidden files and other endings than .json are left out of folders. Raises DataError.
    """
    files: list[str] = []
    for path in paths:
        local = Path(path).expanduser()
        if local.is_dir():
            found = sorted(
                file
                for file in local.rglob("*.json")
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(local).parts)
            )
            if not found:
                raise DataError(path, "the folder holds no .json files.", "Give a folder of LMFlow JSON files.")
            files += [str(file.resolve()) for file in found]
        elif local.is_file():
            files.append(str(local.resolve()))
        else:
            raise DataError(path, "there is no such file or folder.", "Check data.train and data.eval.")
    for file in files:
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise DataError(file, f"cannot be read: {error.strerror}.", "Check its permissions.") from None
    doubled = next((file for position, file in enumerate(files) if file in files[:position]), None)
    if doubled:
        raise DataError(doubled, "is named twice.", "List each file once.")
    return files


def read_file(path: str, role_map: Mapping[str, str]) -> Iterator[Row]:
    """The rows of one LMFlow file `{"type": "conversation", "instances": […]}`, in order.

    An empty file has no rows. A fault of the whole file is one Row with index -1.
    """
    try:
        document = _load_json(path)
        if document is None:
            return
        instances = _instances(document)
    except RowProblem as fault:
        yield Row(-1, None, " ".join(filter(None, (fault.problem, fault.remedy))))
        return
    for index, instance in enumerate(instances):
        try:
            yield Row(index, conversation_to_json(parse_conversation(instance, role_map)))
        except RowProblem as fault:
            yield Row(index, None, " ".join(filter(None, (fault.problem, fault.remedy))))


def _load_json(path: str) -> Any:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RowProblem(f"cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise RowProblem(f"is not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    if not text.strip():
        return None
    try:
        return json.loads(text, object_pairs_hook=_object_with_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise RowProblem(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}.") from None


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise RowProblem(f"key {doubled!r} is given twice in one object.", "Keep one.")
    return mapping


def _refuse_constant(name: str) -> Any:
    raise RowProblem(f"{name} is not JSON.", "Replace it by a number or null.")


def _instances(document: Any) -> list[Any]:
    form = 'Expected {"type": "conversation", "instances": […]}.'
    if not isinstance(document, dict) or "instances" not in document:
        raise RowProblem("is not an LMFlow dataset.", form)
    kind = document.get("type")
    if kind != "conversation":
        raise RowProblem(f"type {kind!r} is not supported; 'conversation' is.", form)
    instances = document["instances"]
    if not isinstance(instances, list):
        raise RowProblem("instances is not a list.", form)
    return instances
