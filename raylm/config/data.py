"""The `data` section: what is read and how it becomes packed rows."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from raylm.config.base import Section


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class DataSection(Section):
    """Conversation datasets in LMFlow's JSON format, files or folders of `.json` files."""

    train: Paths = Field(min_length=1)
    """Files or folders to train on."""
    eval: Paths = ()
    """Files or folders for the loss measured during training."""
    max_seq_len: int = Field(1024, ge=8)
    """Tokens in a packed row, and the longest conversation that is used."""
    packing: bool = True
    """Several conversations in a row. Attention never crosses from one to the next."""
    shuffle: bool = True
    """A new order each epoch, from `run.seed`; off keeps the order of the files."""
    role_map: dict[str, str] = {}
    """Names of roles in the data -> system, user, assistant or tool."""
    on_bad_row: Literal["error", "quarantine"] = "error"
    """A malformed row stops the run, or goes to rejected.jsonl in the run directory and is counted."""
    max_rejected_share: float = Field(0.2, ge=0, le=1)
    """Stop when more than this share of the rows is rejected (malformed, too long, nothing to train on)."""
