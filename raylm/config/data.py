"""The `data` section: what is read and how it becomes packed rows."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from raylm.config.base import Section


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


def _as_source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class SourceSection(Section):
    """One dataset: a file, a folder, a pattern, an address, or a dataset of the Hugging Face hub."""

    path: str = Field(min_length=1)
    """File, folder, pattern with `*`, `s3://` `gs://` `abfs://` `https://` address, or `hf://ORG/NAME`."""
    format: str = "auto"
    """Shape of the rows; `auto` recognises it by the keys of each row."""
    columns: dict[str, str] = {}
    """Key in the format -> key in the data, such as {question: problem, answer: solution}."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often an epoch uses each row: 2 twice, 0.5 a new half of the rows each epoch."""
    template: str | None = None
    """As `data.template`, for this dataset alone."""
    config: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    revision: str | None = None
    """Revision of a hub dataset."""
    streaming: bool = True
    """Read a hub dataset as a stream, instead of downloading it first."""


Sources = Annotated[tuple[Annotated[SourceSection, BeforeValidator(_as_source)], ...], BeforeValidator(_as_list)]


class DataSection(Section):
    """Datasets, and how their rows become packed rows of tokens."""

    train: Sources = Field(min_length=1)
    """Datasets to train on: a path, or a list of paths and of mappings with path, format, weight, …"""
    eval: Sources = ()
    """Datasets for the loss measured during training."""
    template: str = "auto"
    """Conversation template: `auto` is the tokenizer's own; else a preset (`raylm data templates`), a YAML file, or
    one line with {input_text}."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens carry loss: every answer, the last answer, or all. Plain text always carries loss everywhere."""
    max_seq_len: int = Field(1024, ge=8)
    """Tokens in a packed row, and the longest row that is used whole."""
    truncation: Literal["drop", "keep_start", "keep_end", "split"] = "drop"
    """A row longer than max_seq_len is dropped and counted, cut behind the last answer token that fits, cut to its
    last turns with the system text, or (plain text only) split into several rows."""
    packing: bool = True
    """Several conversations in a row. Attention never crosses from one to the next."""
    shuffle: bool = True
    """A new order each epoch, from `run.seed`; off keeps the order of the files."""
    role_map: dict[str, str] = {}
    """Names of roles in the data -> system, user, assistant or tool."""
    allow_special_tokens: bool = False
    """Names of control tokens in the text of messages become the tokens; off, they stay text."""
    max_rows: int | None = Field(None, ge=1)
    """Use at most this many rows: the first in the order of the files."""
    sample: float = Field(1.0, gt=0, le=1)
    """Use this share of the rows, chosen by `run.seed`."""
    on_bad_row: Literal["error", "quarantine"] = "error"
    """A malformed row stops the run, or goes to rejected.jsonl in the run directory and is counted."""
    max_bad_share: float = Field(0.2, ge=0, le=1)
    """Stop when more than this share of the rows cannot be used (malformed, too long, nothing to train on)."""
    cache: bool | str = True
    """Tokenised rows are kept for the next run: in ~/.cache/raylm/data, in a folder or address of yours, or (off)
    nowhere. A cluster of several nodes needs a shared one."""

    @model_validator(mode="after")
    def splitting_is_for_plain_text(self) -> Self:
        if self.truncation == "split" and self.loss_on == "last_assistant":
            raise ValueError("truncation=split is for plain text and excludes loss_on=last_assistant")
        return self
