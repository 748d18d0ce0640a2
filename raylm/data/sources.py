"""Where rows come from: the files that the configured datasets name, each with how it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylm.config.data import SourceSection
from raylm.data.files import HUB_SCHEME, check_readable, expand
from raylm.data.formats import check_format
from raylm.data.readers import READERS, ReadOptions
from raylm.data.remote import scheme_of, shown
from raylm.errors import DataError


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a dataset. source: number of the dataset in the configuration."""

    path: str
    source: int = 0
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    template: str | None = None
    options: ReadOptions = field(default_factory=ReadOptions)


def list_files(sources: Sequence[SourceSection], setting: str = "data.train and data.eval") -> list[SourceFile]:
    """The files of all datasets, in order; setting: what names them, for messages.

    Raises DataError for what is missing, unreadable or named twice.
    """
    files: list[SourceFile] = []
    for number, source in enumerate(sources):
        check_format(source.format, source.path)
        options = ReadOptions(source.config, source.split, source.revision, source.streaming)
        for path in _paths(source.path, setting):
            files.append(
                SourceFile(path, number, source.format, source.columns, source.weight, source.template, options)
            )
    seen: set[tuple[str, Any]] = set()
    for file in files:
        key = (file.path, file.options if scheme_of(file.path) == HUB_SCHEME else None)
        if key in seen:
            raise DataError(
                shown(file.path), "is named twice.", "List each file once; a weight above 1 repeats its rows."
            )
        seen.add(key)
        check_readable(file.path)
    return files


def _paths(path: str, setting: str) -> list[str]:
    if scheme_of(path) == HUB_SCHEME:
        return [path]
    saved = Path(path).expanduser()
    if (saved / "state.json").is_file():  # of datasets.save_to_disk
        return _saved_dataset(saved)
    paths = expand(path, tuple(READERS), setting)
    if (saved / "dataset_dict.json").is_file():
        raise DataError(path, "holds several splits.", "Name the folder of one of them.")
    return paths


def _saved_dataset(folder: Path) -> list[str]:
    import json

    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(str(folder), "has a state.json that datasets.save_to_disk did not write.") from None
    return [str((folder / name).resolve()) for name in names]
